// A Metal GPU made of the shim: what ggml-metal-device.m and ggml-metal-context.m provide, so that upstream's own C++ files
// with our patch become a backend (GGML_BACKEND_PATH loads it) in which llama.cpp keeps its cache. It runs nothing but
// nodes with compressed tensors; ggml's scheduler leaves the rest to the CPU.
#include "device.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml-metal-context.h"
#include "ggml-metal-device.h"
#include "ggml-metal-fusion.h"
#include "ggml-metal-ops.h"
#include "pytq-metal.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

struct ggml_metal_library {
    ggml_metal_pipelines_t pipelines;
};
struct ggml_metal_buffer {
    void * base = nullptr;
    size_t size = 0;
    bool owned = false;
};
struct ggml_metal_event {};
struct ggml_metal {
    ggml_metal_device_t dev;
};

// names of executed kernels go to the file PYTQ_METAL_SHIM_LOG, each once
static void note(const std::string & kernel) {
    static std::set<std::string> seen;
    const char * path = getenv("PYTQ_METAL_SHIM_LOG");
    if (path && seen.insert(kernel).second) {
        if (FILE * f = fopen(path, "a")) {
            fprintf(f, "%s\n", kernel.c_str());
            fclose(f);
        }
    }
}

extern "C" {

// ---------------------------------------------------------------------------------------------- library, encoder

void ggml_metal_pipeline_free(ggml_metal_pipeline_t p) {
    delete p;
}
int ggml_metal_pipeline_max_theads_per_threadgroup(struct ggml_metal_pipeline_with_params) {
    return 1024;
}
ggml_metal_library_t ggml_metal_library_init_from_source(ggml_metal_device_t, const char *, bool) {
    return new ggml_metal_library{ggml_metal_pipelines_init()};
}
ggml_metal_device_t ggml_metal_library_get_device(ggml_metal_library_t) {
    abort(); // upstream's own kernels ask for it
}
struct ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    ggml_metal_pipeline_with_params r = {};
    r.pipeline = ggml_metal_pipelines_get(lib->pipelines, name);
    return r;
}
struct ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t lib, const char * base,
                                                                           const char * name, ggml_metal_cv_t cv) {
    shim::find_kernel(base);
    ggml_metal_pipeline_with_params r = {};
    r.pipeline = new ggml_metal_pipeline{base, cv->values};
    ggml_metal_pipelines_add(lib->pipelines, name, r.pipeline);
    return r;
}
ggml_metal_encoder_t ggml_metal_encoder_init(ggml_metal_cmd_buf_t, bool) {
    return new ggml_metal_encoder;
}
void ggml_metal_encoder_free(ggml_metal_encoder_t e) {
    delete e;
}
void ggml_metal_encoder_debug_group_push(ggml_metal_encoder_t, const char *) {}
void ggml_metal_encoder_debug_group_pop(ggml_metal_encoder_t) {}
void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t) {}
void ggml_metal_encoder_end_encoding(ggml_metal_encoder_t) {}
void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t e, struct ggml_metal_pipeline_with_params p) {
    *e = ggml_metal_encoder();
    e->pipeline = p.pipeline;
}
void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t e, void * data, size_t size, int i) {
    e->bytes[i].assign((char *) data, (char *) data + size);
    e->buffers[i] = e->bytes[i].data();
}
void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t e, struct ggml_metal_buffer_id b, int i) {
    GGML_ASSERT(b.metal);
    e->buffers[i] = (char *) b.metal + b.offs;
}
void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t e, size_t size, int) {
    GGML_ASSERT(size % 16 == 0 && size <= 32768);
    e->memory = size;
}
void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t e, int tg0, int tg1, int tg2, int t0, int t1, int t2) {
    note(e->pipeline->base);
    execute(e, {(uint32_t) tg0, (uint32_t) tg1, (uint32_t) tg2}, {(uint32_t) t0, (uint32_t) t1, (uint32_t) t2},
            shim::FORWARD);
}

// ---------------------------------------------------------------------------------------------- device, buffers

ggml_metal_device_t ggml_metal_device_init(int, int) {
    ggml_metal_device_t dev = new ggml_metal_device;
    ggml_metal_device_props & p = dev->props;
    snprintf(p.name, sizeof(p.name), "MTL0");
    snprintf(p.desc, sizeof(p.desc), "Metal shim");
    p.max_buffer_size = p.max_working_set_size = (size_t) 1 << 36;
    p.max_theadgroup_memory_size = 32768;
    p.has_simdgroup_reduction = p.has_simdgroup_mm = true;
    p.has_unified_memory = p.use_shared_buffers = true;
    p.op_offload_min_batch_size = 1 << 30;
    return dev;
}
void ggml_metal_device_free(ggml_metal_device_t dev) {
    delete dev;
}
const char * ggml_metal_device_id_token(enum ggml_metal_device_id) {
    return "generic";
}
ggml_metal_library_t ggml_metal_device_get_library(ggml_metal_device_t) {
    return nullptr; // upstream's kernels: none
}
struct ggml_metal_fusion_info * ggml_metal_device_get_fusion_info(ggml_metal_device_t) {
    return nullptr;
}
void ggml_metal_device_get_memory(ggml_metal_device_t dev, size_t * free, size_t * total) {
    *free = *total = dev->props.max_working_set_size;
}
// the first lines are the patch's, the answer for everything else is not upstream's
bool ggml_metal_device_supports_op(ggml_metal_device_t dev, const struct ggml_tensor * op) {
    if (op->op == GGML_OP_NONE) { // as upstream's: what lies in device memory, such as rotation matrices
        return true;
    }
    bool pytq_supported;
    return pytq_metal_supports_op(dev, op, &pytq_supported) && pytq_supported;
}
ggml_metal_event_t ggml_metal_device_event_init(ggml_metal_device_t) {
    return new ggml_metal_event;
}
void ggml_metal_device_event_free(ggml_metal_device_t, ggml_metal_event_t e) {
    delete e;
}
void ggml_metal_device_event_synchronize(ggml_metal_device_t, ggml_metal_event_t) {}

ggml_metal_buffer_t ggml_metal_buffer_init(ggml_metal_device_t, size_t size, bool) {
    void * base = aligned_alloc(4096, (size + 4096) / 4096 * 4096);
    return base ? new ggml_metal_buffer{base, size, true} : nullptr;
}
ggml_metal_buffer_t ggml_metal_buffer_map(ggml_metal_device_t, void * base, size_t size, size_t) {
    return new ggml_metal_buffer{base, size, false};
}
void ggml_metal_buffer_free(ggml_metal_buffer_t b) {
    if (b->owned) {
        free(b->base);
    }
    delete b;
}
void * ggml_metal_buffer_get_base(ggml_metal_buffer_t b) {
    return b->base;
}
bool ggml_metal_buffer_is_shared(ggml_metal_buffer_t) {
    return true;
}
void ggml_metal_buffer_memset_tensor(ggml_metal_buffer_t, struct ggml_tensor * t, uint8_t value, size_t offset, size_t size) {
    memset((char *) t->data + offset, value, size);
}
void ggml_metal_buffer_set_tensor(ggml_metal_buffer_t, struct ggml_tensor * t, const void * data, size_t offset, size_t size) {
    memcpy((char *) t->data + offset, data, size);
}
void ggml_metal_buffer_get_tensor(ggml_metal_buffer_t, const struct ggml_tensor * t, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) t->data + offset, size);
}
bool ggml_metal_buffer_cpy_tensor(ggml_metal_buffer_t, const struct ggml_tensor *, struct ggml_tensor *) {
    return false; // ggml copies through the host
}
void ggml_metal_buffer_clear(ggml_metal_buffer_t b, uint8_t value) {
    memset(b->base, value, b->size);
}
struct ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t b, const struct ggml_tensor * t) {
    const size_t offset = (size_t) ((const char *) t->data - (const char *) b->base);
    GGML_ASSERT(offset + ggml_nbytes(t) <= b->size);
    return {b->base, offset};
}

// ---------------------------------------------------------------------------------------------- context

ggml_metal_t ggml_metal_init(ggml_metal_device_t dev) {
    return new ggml_metal{dev};
}
void ggml_metal_free(ggml_metal_t ctx) {
    delete ctx;
}
const char * ggml_metal_get_name(ggml_metal_t ctx) {
    return ctx->dev->props.name;
}
void ggml_metal_synchronize(ggml_metal_t) {}
void ggml_metal_set_tensor_async(ggml_metal_t, struct ggml_tensor * t, const void * data, size_t offset, size_t size) {
    memcpy((char *) t->data + offset, data, size);
}
void ggml_metal_get_tensor_async(ggml_metal_t, const struct ggml_tensor * t, void * data, size_t offset, size_t size) {
    memcpy(data, (const char *) t->data + offset, size);
}
bool ggml_metal_cpy_tensor_async(ggml_metal_t, ggml_metal_t, const struct ggml_tensor *, struct ggml_tensor *) {
    return false;
}
enum ggml_status ggml_metal_graph_compute(ggml_metal_t ctx, struct ggml_cgraph * gf) {
    static ggml_metal_fusion_info * fusion = ggml_metal_fusion_info_init(false, 0);
    ggml_metal_op_t op = ggml_metal_op_init(ctx->dev, nullptr, gf, fusion, 0, gf->n_nodes, true, false, 0);
    for (int i = 0; i < ggml_metal_op_n_nodes(op);) {
        i += ggml_metal_op_encode(op, i);
    }
    ggml_metal_op_free(op);
    return GGML_STATUS_SUCCESS;
}
void ggml_metal_graph_optimize(ggml_metal_t, struct ggml_cgraph *) {}
void ggml_metal_event_record(ggml_metal_t, ggml_metal_event_t) {}
void ggml_metal_event_wait(ggml_metal_t, ggml_metal_event_t) {}
void ggml_metal_set_n_cb(ggml_metal_t, int) {}
void ggml_metal_set_abort_callback(ggml_metal_t, ggml_abort_callback, void *) {}
bool ggml_metal_supports_family(ggml_metal_t, int) {
    return false;
}
void ggml_metal_capture_next_compute(ggml_metal_t) {}

} // extern "C"

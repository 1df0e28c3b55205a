// A Metal device made of the shim: the functions of ggml-metal-device.h that csrc/ggml/pytq-metal.cpp calls, so that the
// real dispatching code chooses kernels, constants, grids and memory, and the shim executes them. Called from Python.
#include "device.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml-metal-device.h"
#include "pytq-metal.h"
#include "pytq.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define CHECK(x)                                                                                                       \
    do {                                                                                                               \
        if (!(x)) {                                                                                                    \
            fprintf(stderr, "metal harness: %s (line %d)\n", #x, __LINE__);                                            \
            abort();                                                                                                   \
        }                                                                                                              \
    } while (0)

// ------------------------------------------------------------------------------------------------ the device

struct ggml_metal_library {
    std::map<std::string, std::unique_ptr<ggml_metal_pipeline>> pipelines;
};
static struct {
    int order = 0, max_threads = 1024;
    bool compiles = true, barrier = false;
    std::string source, log, dispatched;
    size_t most_memory = 0;
} state;

extern "C" {

int ggml_metal_pipeline_max_theads_per_threadgroup(struct ggml_metal_pipeline_with_params) {
    return state.max_threads;
}
ggml_metal_library_t ggml_metal_library_init_from_source(ggml_metal_device_t, const char * source, bool) {
    state.source = source;
    return state.compiles ? new ggml_metal_library : nullptr;
}
struct ggml_metal_pipeline_with_params ggml_metal_library_get_pipeline(ggml_metal_library_t lib, const char * name) {
    ggml_metal_pipeline_with_params r = {};
    const auto found = lib->pipelines.find(name);
    r.pipeline = found == lib->pipelines.end() ? nullptr : found->second.get();
    return r;
}
struct ggml_metal_pipeline_with_params ggml_metal_library_compile_pipeline(ggml_metal_library_t lib, const char * base,
                                                                           const char * name, ggml_metal_cv_t cv) {
    shim::find_kernel(base);
    auto & p = lib->pipelines[name];
    CHECK(!p); // one name, one set of constants
    p.reset(new ggml_metal_pipeline{base, cv->values});
    return ggml_metal_library_get_pipeline(lib, name);
}
struct ggml_metal_buffer_id ggml_metal_buffer_get_id(ggml_metal_buffer_t, const struct ggml_tensor * t) {
    return {t->data, 0};
}
void ggml_metal_encoder_set_pipeline(ggml_metal_encoder_t e, struct ggml_metal_pipeline_with_params p) {
    CHECK(p.pipeline);
    *e = ggml_metal_encoder();
    e->pipeline = p.pipeline;
}
void ggml_metal_encoder_set_bytes(ggml_metal_encoder_t e, void * data, size_t size, int i) {
    CHECK(size <= 4096); // what Metal copies into a command
    e->bytes[i].assign((char *) data, (char *) data + size);
    e->buffers[i] = e->bytes[i].data();
}
void ggml_metal_encoder_set_buffer(ggml_metal_encoder_t e, struct ggml_metal_buffer_id b, int i) {
    e->buffers[i] = (char *) b.metal + b.offs;
}
void ggml_metal_encoder_set_threadgroup_memory_size(ggml_metal_encoder_t e, size_t size, int i) {
    CHECK(i == 0 && size % 16 == 0 && size <= 32768);
    e->memory = size;
    state.most_memory = size > state.most_memory ? size : state.most_memory;
}
void ggml_metal_encoder_memory_barrier(ggml_metal_encoder_t) {
    state.barrier = true;
}
void ggml_metal_encoder_dispatch_threadgroups(ggml_metal_encoder_t e, int tg0, int tg1, int tg2, int t0, int t1, int t2) {
    CHECK(t0 * t1 * t2 <= state.max_threads && tg0 > 0 && tg1 > 0 && tg2 > 0);
    CHECK(state.dispatched.empty() || state.barrier); // a second kernel reads what the first wrote
    execute(e, {(uint32_t) tg0, (uint32_t) tg1, (uint32_t) tg2}, {(uint32_t) t0, (uint32_t) t1, (uint32_t) t2},
            (shim::order) state.order);
    state.dispatched += (state.dispatched.empty() ? "" : " ") + e->pipeline->base;
}

// ------------------------------------------------------------------------------------------------ ggml

static int64_t block_of(ggml_type type, size_t * bytes) {
    const pytq_type_info * t = pytq_type_get(type);
    if (t) {
        *bytes = (size_t) t->block_bytes;
        return t->head_dim;
    }
    switch (type) {
        case GGML_TYPE_F32: case GGML_TYPE_I32: *bytes = 4; return 1;
        case GGML_TYPE_F16: *bytes = 2; return 1;
        case GGML_TYPE_I64: *bytes = 8; return 1;
        case GGML_TYPE_Q8_0: *bytes = 34; return 32;
        default: *bytes = 8; return 8; // a flag of the types table
    }
}
int64_t ggml_blck_size(enum ggml_type type) {
    size_t bytes;
    return block_of(type, &bytes);
}
size_t ggml_type_size(enum ggml_type type) {
    size_t bytes;
    block_of(type, &bytes);
    return bytes;
}
size_t ggml_nbytes(const struct ggml_tensor * t) {
    size_t n = (size_t) t->ne[0] * t->nb[0] / (size_t) ggml_blck_size(t->type);
    for (int i = 1; i < 4; i++) {
        n += (size_t) (t->ne[i] - 1) * t->nb[i];
    }
    return n;
}
bool ggml_is_contiguous(const struct ggml_tensor * t) {
    size_t nb = ggml_type_size(t->type);
    bool ok = t->nb[0] == nb;
    nb *= (size_t) (t->ne[0] / ggml_blck_size(t->type));
    for (int i = 1; i < 4; i++) {
        ok = ok && (t->ne[i] == 1 || t->nb[i] == nb);
        nb *= (size_t) t->ne[i];
    }
    return ok;
}
bool ggml_are_same_shape(const struct ggml_tensor * a, const struct ggml_tensor * b) {
    return memcmp(a->ne, b->ne, sizeof(a->ne)) == 0;
}
void ggml_log_internal(enum ggml_log_level, const char * format, ...) {
    char line[512];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof(line), format, args);
    va_end(args);
    state.log += line;
}

// ------------------------------------------------------------------------------------------------ for Python

struct harness_tensor {
    int32_t type, used;
    int64_t ne[4];
    uint64_t nb[4];
    void * data;
};

struct node {
    ggml_backend_buffer buffer = {};
    ggml_tensor dst = {}, src[5] = {};

    node(int op, const harness_tensor * t, const float * params) {
        for (int i = 0; i < 6; i++) {
            ggml_tensor & x = i == 0 ? dst : src[i - 1];
            x.type = (ggml_type) t[i].type;
            for (int k = 0; k < 4; k++) {
                x.ne[k] = t[i].ne[k], x.nb[k] = (size_t) t[i].nb[k];
            }
            x.data = t[i].data;
            x.buffer = &buffer;
            if (i > 0 && t[i].used) {
                dst.src[i - 1] = &x;
            }
        }
        dst.op = (ggml_op) op;
        memcpy(dst.op_params, params, 3 * sizeof(float));
    }
};

static ggml_metal_device * device(bool has_mm, bool has_reduction) {
    static ggml_metal_device dev[4];
    ggml_metal_device * d = &dev[2 * has_mm + has_reduction];
    d->props.has_simdgroup_mm = has_mm, d->props.has_simdgroup_reduction = has_reduction;
    d->props.max_theadgroup_memory_size = 32768;
    return d;
}

// 0: not pytq's; 1: refused; 2: supported. *size: bytes to allocate for the result, 0 if upstream's rule holds.
int harness_supports(int op, const harness_tensor * t, const float * params, int has_mm, int has_reduction, size_t * size) {
    node n(op, t, params);
    bool supported = false;
    *size = 0;
    pytq_metal_alloc_size(&n.dst, size);
    return pytq_metal_supports_op(device(has_mm, has_reduction), &n.dst, &supported) ? 1 + supported : 0;
}

// Runs a node; the answer names the kernels in order.
const char * harness_run(int op, const harness_tensor * t, const float * params, int has_mm, int order, int max_threads) {
    node n(op, t, params);
    ggml_metal_encoder encoder;
    state.order = order, state.max_threads = max_threads;
    state.dispatched.clear(), state.barrier = false;
    return pytq_metal_encode(device(has_mm, true), &encoder, &n.dst) ? state.dispatched.c_str() : nullptr;
}

const char * harness_source(void) {
    return state.source.c_str();
}
const char * harness_log(void) {
    return state.log.c_str();
}
size_t harness_most_memory(void) {
    return state.most_memory;
}
void harness_break_compiler(void) {
    state.compiles = false;
}
int harness_op(const char * name) {
    if (!strcmp(name, "SET_ROWS")) return GGML_OP_SET_ROWS;
    if (!strcmp(name, "GET_ROWS")) return GGML_OP_GET_ROWS;
    if (!strcmp(name, "CPY")) return GGML_OP_CPY;
    if (!strcmp(name, "DUP")) return GGML_OP_DUP;
    if (!strcmp(name, "CONT")) return GGML_OP_CONT;
    if (!strcmp(name, "VIEW")) return GGML_OP_VIEW;
    if (!strcmp(name, "MUL_MAT")) return GGML_OP_MUL_MAT;
    if (!strcmp(name, "ROPE")) return GGML_OP_ROPE;
    if (!strcmp(name, "ADD")) return GGML_OP_ADD;
    if (!strcmp(name, "FLASH_ATTN_EXT")) return GGML_OP_FLASH_ATTN_EXT;
    return -1;
}

} // extern "C"

// Metal: which nodes run, and how they are dispatched. Kernels are in csrc/metal.
//
// The kernels are a library of their own, compiled from source by ggml_metal_library_init_from_source() when the first
// node with a compressed tensor appears: upstream's tables of libraries stay as they are, and a model with a stock
// cache pays nothing.
#include "pytq-metal.h"

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "metal/args.h"
#include "pytq.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

// one literal, longer than every compiler has to take (those that have Metal do)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Woverlength-strings"
static const char * const kernel_source =
#include "pytq-metal-source.inc"
    ;
#pragma GCC diagnostic pop

static bool is_compressed(const ggml_tensor * t) {
    return t && pytq_is_type(t->type);
}

static bool is_ours(const ggml_tensor * op) {
    bool any = is_compressed(op);
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        any = any || is_compressed(op->src[i]);
    }
    return any;
}

static bool is_noop(const ggml_tensor * op) {
    return op->op == GGML_OP_NONE || op->op == GGML_OP_RESHAPE || op->op == GGML_OP_VIEW || op->op == GGML_OP_PERMUTE ||
           op->op == GGML_OP_TRANSPOSE;
}

// ------------------------------------------------------------------------------------------------ kernels

// Devices live as long as the process, and so do their libraries.
static ggml_metal_library_t library_of(ggml_metal_device_t dev) {
    static std::mutex mutex;
    static std::map<ggml_metal_device_t, ggml_metal_library_t> libraries;
    std::lock_guard<std::mutex> lock(mutex);
    const auto found = libraries.find(dev);
    if (found != libraries.end()) {
        return found->second;
    }
    ggml_metal_library_t lib = ggml_metal_library_init_from_source(dev, kernel_source, true);
    if (!lib) {
        GGML_LOG_ERROR("pytq: the Metal kernels do not compile on this device: compressed caches run on the CPU\n");
    }
    return libraries[dev] = lib;
}

// One operand as function constants (csrc/metal/args.h).
struct operand {
    int id = 0; // names the pipeline
    int constants[8] = {};
};

static operand operand_of(int type, int head_dim) {
    operand o;
    o.id = type;
    int * c = o.constants;
    if (const pytq_type_info * t = pytq_type_get(type)) {
        c[0] = (int) t->code, c[1] = (int) t->scale;
        for (int g = 0; g < PYTQ_MAX_GROUPS; g++) {
            c[2 + 2 * g] = t->group_len[g], c[3 + 2 * g] = t->group_bits[g];
        }
    } else {
        c[0] = type == GGML_TYPE_F16 ? PYTQ_METAL_F16 : PYTQ_METAL_Q8_0;
        c[2] = head_dim;
    }
    return o;
}

static ggml_metal_pipeline_with_params pipeline_of(ggml_metal_device_t dev, const std::string & base, const operand & k,
                                                   const operand & v = {}, bool mask = false, bool bias = false,
                                                   bool softcap = false) {
    ggml_metal_library_t lib = library_of(dev);
    const std::string name = base + "_k" + std::to_string(k.id) + "_v" + std::to_string(v.id) + "_m" +
                             std::to_string(mask) + std::to_string(bias) + std::to_string(softcap);
    ggml_metal_pipeline_with_params p = ggml_metal_library_get_pipeline(lib, name.c_str());
    if (!p.pipeline) {
        ggml_metal_cv_t cv = ggml_metal_cv_init();
        for (int i = 0; i < 8; i++) {
            ggml_metal_cv_set_int32(cv, k.constants[i], PYTQ_METAL_FC_K + i);
            ggml_metal_cv_set_int32(cv, v.constants[i], PYTQ_METAL_FC_V + i);
        }
        ggml_metal_cv_set_bool(cv, mask, PYTQ_METAL_FC_MASK);
        ggml_metal_cv_set_bool(cv, bias, PYTQ_METAL_FC_BIAS);
        ggml_metal_cv_set_bool(cv, softcap, PYTQ_METAL_FC_SOFTCAP);
        p = ggml_metal_library_compile_pipeline(lib, base.c_str(), name.c_str(), cv);
        ggml_metal_cv_free(cv);
    }
    return p;
}

static ggml_metal_buffer_id buffer_of(const ggml_tensor * t) {
    ggml_backend_buffer_t buffer = t->view_src ? t->view_src->buffer : t->buffer;
    return ggml_metal_buffer_get_id((ggml_metal_buffer_t) buffer->context, t);
}

static size_t pad16(size_t n) {
    return (n + 15) / 16 * 16;
}

static int div_up(int64_t a, int64_t b) {
    return (int) ((a + b - 1) / b);
}

// ------------------------------------------------------------------------------------------------ cache writes, copies

static void encode_blocks(ggml_metal_device_t dev, ggml_metal_encoder_t enc, const ggml_tensor * src,
                          const ggml_tensor * rows, const ggml_tensor * dst) {
    const int d = (int) ggml_blck_size(dst->type);
    pytq_metal_encode_args a = {};
    a.src_nb1 = src->nb[1], a.src_nb2 = src->nb[2], a.src_nb3 = src->nb[3];
    a.dst_nb1 = dst->nb[1], a.dst_nb2 = dst->nb[2], a.dst_nb3 = dst->nb[3];
    a.n1 = (int) src->ne[1], a.blocks_per_row = (int) (src->ne[0] / d);
    a.ne11 = a.ne12 = 1;
    if (rows) {
        a.rows_nb0 = rows->nb[0], a.rows_nb1 = rows->nb[1], a.rows_nb2 = rows->nb[2];
        a.row_bytes = rows->type == GGML_TYPE_I64 ? 8 : 4;
        a.ne11 = (int) rows->ne[1], a.ne12 = (int) rows->ne[2];
    }
    const ggml_metal_pipeline_with_params p = pipeline_of(dev, "kernel_pytq_encode", operand_of(dst->type, d));
    // several vectors per threadgroup share the level tables; most of a core's threadgroup memory stays for others
    auto bytes = [&](int nsg) {
        return pad16(4 * (size_t) (PYTQ_METAL_GROUPS * PYTQ_METAL_TABLE + nsg * PYTQ_METAL_ENCODE_WORDS(d)));
    };
    int nsg = std::min(PYTQ_METAL_MAX_NSG, std::max(1, ggml_metal_pipeline_max_theads_per_threadgroup(p) / 32));
    while (nsg > 1 && bytes(nsg) > 24 * 1024) {
        nsg--;
    }
    ggml_metal_encoder_set_pipeline(enc, p);
    ggml_metal_encoder_set_bytes(enc, &a, sizeof(a), 0);
    ggml_metal_encoder_set_buffer(enc, buffer_of(src), 1);
    ggml_metal_encoder_set_buffer(enc, buffer_of(rows ? rows : src), 2);
    ggml_metal_encoder_set_buffer(enc, buffer_of(dst), 3);
    ggml_metal_encoder_set_threadgroup_memory_size(enc, bytes(nsg), 0);
    ggml_metal_encoder_dispatch_threadgroups(enc, div_up((int64_t) a.n1 * a.blocks_per_row, nsg), (int) src->ne[2],
                                             (int) src->ne[3], 32 * nsg, 1, 1);
}

// Rows of src named by rows, or all of them where rows is null. n: a tensor whose ne[1..3] are walked through.
static void decode_values(ggml_metal_device_t dev, ggml_metal_encoder_t enc, const ggml_tensor * src,
                          const ggml_tensor * rows, const ggml_tensor * dst) {
    const int d = (int) ggml_blck_size(src->type);
    pytq_metal_values_args a = {};
    a.src_nb1 = src->nb[1], a.src_nb2 = src->nb[2], a.src_nb3 = src->nb[3];
    a.dst_nb1 = dst->nb[1], a.dst_nb2 = dst->nb[2], a.dst_nb3 = dst->nb[3];
    a.n1 = (int) dst->ne[1], a.blocks_per_row = (int) (src->ne[0] / d);
    if (rows) {
        a.rows_nb0 = rows->nb[0], a.rows_nb1 = rows->nb[1], a.rows_nb2 = rows->nb[2];
        a.row_bytes = 4;
    }
    const char * base = dst->type == GGML_TYPE_F16 ? "kernel_pytq_values_f16" : "kernel_pytq_values_f32";
    const ggml_metal_pipeline_with_params p = pipeline_of(dev, base, operand_of(src->type, d));
    const int nth = std::min(256, ggml_metal_pipeline_max_theads_per_threadgroup(p) / 32 * 32);
    ggml_metal_encoder_set_pipeline(enc, p);
    ggml_metal_encoder_set_bytes(enc, &a, sizeof(a), 0);
    ggml_metal_encoder_set_buffer(enc, buffer_of(src), 1);
    ggml_metal_encoder_set_buffer(enc, buffer_of(rows ? rows : src), 2);
    ggml_metal_encoder_set_buffer(enc, buffer_of(dst), 3);
    ggml_metal_encoder_set_threadgroup_memory_size(enc, 4 * PYTQ_METAL_GROUPS * PYTQ_METAL_TABLE, 0);
    ggml_metal_encoder_dispatch_threadgroups(enc, div_up(a.n1 * (src->ne[0] / 8), nth), (int) dst->ne[2],
                                             (int) dst->ne[3], nth, 1, 1);
}

static void copy_bytes(ggml_metal_device_t dev, ggml_metal_encoder_t enc, const ggml_tensor * src,
                       const ggml_tensor * dst) {
    pytq_metal_copy_args a = {ggml_nbytes(src)};
    const ggml_metal_pipeline_with_params p = pipeline_of(dev, "kernel_pytq_copy", {});
    const int nth = std::min(256, ggml_metal_pipeline_max_theads_per_threadgroup(p) / 32 * 32);
    ggml_metal_encoder_set_pipeline(enc, p);
    ggml_metal_encoder_set_bytes(enc, &a, sizeof(a), 0);
    ggml_metal_encoder_set_buffer(enc, buffer_of(src), 1);
    ggml_metal_encoder_set_buffer(enc, buffer_of(dst), 2);
    ggml_metal_encoder_dispatch_threadgroups(enc, div_up((int64_t) a.n_bytes, 16 * nth), 1, 1, nth, 1, 1);
}

// ------------------------------------------------------------------------------------------------ attention

// How a node is cut into threadgroups. It depends on the shapes alone, because the memory for the parts is allocated
// before the node runs; with more tokens it never gets fewer splits.
struct attention_plan {
    bool mm;      // prefill kernel
    int rows;     // query rows of a threadgroup
    int tokens;   // of a tile
    int n_groups; // threadgroups per split
    int n_splits;
};

static constexpr int max_vec_rows = 8, max_splits = 32;
static constexpr int few_rows = 16; // up to here, unpacking per eight rows beats matrices that are half empty
static constexpr int enough_threadgroups = 128; // fills the largest GPU
static constexpr int tiles_per_split = 8;       // less is not worth a part of its own

static attention_plan plan_of(const ggml_tensor * op, bool has_mm) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2];
    const int64_t n_rows = q->ne[1] * (q->ne[2] / k->ne[2]);
    attention_plan p = {};
    p.mm = has_mm && n_rows > few_rows;
    p.rows = PYTQ_METAL_MM_ROWS, p.tokens = PYTQ_METAL_MM_TOKENS(std::max(k->ne[0], v->ne[0]));
    if (!p.mm) {
        p.rows = 1, p.tokens = PYTQ_METAL_TILE;
        while (p.rows < n_rows && p.rows < max_vec_rows) {
            p.rows *= 2;
        }
    }
    p.n_groups = (int) (div_up(n_rows, p.rows) * k->ne[2] * q->ne[3]);
    const int useful = div_up(k->ne[1], (int64_t) p.tokens * tiles_per_split);
    p.n_splits = std::max(1, std::min({div_up(enough_threadgroups, p.n_groups), useful, max_splits}));
    return p;
}

static size_t parts_bytes(const ggml_tensor * op, const attention_plan & p) {
    const ggml_tensor *q = op->src[0], *v = op->src[2];
    return p.n_splits == 1 ? 0 : 4 * (size_t) (q->ne[1] * q->ne[2] * q->ne[3] * p.n_splits * (v->ne[0] + 2));
}

static size_t vec_bytes(int dk, int dv, int rows, int nsg) {
    return pad16(4 * (size_t) (rows * dk + 2 * PYTQ_METAL_GROUPS * PYTQ_METAL_TABLE + nsg * rows * PYTQ_METAL_TILE +
                               nsg * dv + 2 * rows * nsg));
}

static size_t mm_bytes(int dk, int dv) {
    const int nsg = PYTQ_METAL_MM_ROWS / 8, d = std::max(dk, dv), tokens = PYTQ_METAL_MM_TOKENS(d);
    const size_t words =
        2 * PYTQ_METAL_GROUPS * PYTQ_METAL_TABLE + 3 * PYTQ_METAL_MM_ROWS + 2 * nsg + 64 * nsg + 8 * tokens * nsg;
    const size_t halfs =
        (size_t) PYTQ_METAL_MM_ROWS * (dk + PYTQ_METAL_MM_PAD) + (size_t) tokens * (d + PYTQ_METAL_MM_PAD);
    return pad16(4 * words + 2 * halfs);
}

static void attention(ggml_metal_device_t dev, ggml_metal_encoder_t enc, const ggml_tensor * op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3], *sinks = op->src[4];
    const int dk = (int) k->ne[0], dv = (int) v->ne[0];
    float scale, max_bias, softcap;
    memcpy(&scale, (const float *) op->op_params + 0, sizeof(float));
    memcpy(&max_bias, (const float *) op->op_params + 1, sizeof(float));
    memcpy(&softcap, (const float *) op->op_params + 2, sizeof(float));

    attention_plan plan = plan_of(op, ggml_metal_device_get_props(dev)->has_simdgroup_mm);
    const operand ko = operand_of(k->type, dk), vo = operand_of(v->type, dv);
    const std::string dims = "_dk" + std::to_string(dk) + "_dv" + std::to_string(dv);
    ggml_metal_pipeline_with_params p = {};
    if (plan.mm) {
        p = pipeline_of(dev, "kernel_pytq_attn_mm" + dims, ko, vo, mask, max_bias != 0.0f, softcap != 0.0f);
        if (ggml_metal_pipeline_max_theads_per_threadgroup(p) < 4 * PYTQ_METAL_MM_ROWS) {
            static std::once_flag once;
            std::call_once(once, [] {
                GGML_LOG_WARN(
                    "pytq: this GPU has too few registers for the matrix kernel: prefill runs the decode kernel\n");
            });
            plan = plan_of(op, false);
        }
    }
    int nsg = PYTQ_METAL_MM_ROWS / 8;
    size_t bytes = mm_bytes(dk, dv);
    if (!plan.mm) {
        p = pipeline_of(dev, "kernel_pytq_attn_vec" + dims + "_r" + std::to_string(plan.rows), ko, vo, mask,
                        max_bias != 0.0f, softcap != 0.0f);
        nsg = std::min({PYTQ_METAL_MAX_NSG, div_up(k->ne[1], plan.tokens),
                        std::max(1, ggml_metal_pipeline_max_theads_per_threadgroup(p) / 32)});
        bytes = vec_bytes(dk, dv, plan.rows, nsg);
    }

    pytq_metal_attention_args a = {};
    a.q_nb1 = q->nb[1], a.q_nb2 = q->nb[2], a.q_nb3 = q->nb[3];
    a.k_nb1 = k->nb[1], a.k_nb2 = k->nb[2], a.k_nb3 = k->nb[3];
    a.v_nb1 = v->nb[1], a.v_nb2 = v->nb[2], a.v_nb3 = v->nb[3];
    a.mask_ne2 = a.mask_ne3 = 1;
    if (mask) {
        a.mask_nb1 = mask->nb[1], a.mask_nb2 = mask->nb[2], a.mask_nb3 = mask->nb[3];
        a.mask_ne2 = (int) mask->ne[2], a.mask_ne3 = (int) mask->ne[3];
    }
    a.n_q = (int) q->ne[1], a.n_kv = (int) k->ne[1], a.n_head_kv = (int) k->ne[2];
    a.gqa = (int) (q->ne[2] / k->ne[2]), a.n_rows = a.n_q * a.gqa;
    a.n_seq = (int) q->ne[3], a.seq_ratio = (int) (q->ne[3] / k->ne[3]), a.n_splits = plan.n_splits;
    a.has_sinks = sinks ? 1 : 0;
    a.n_head_log2 = 1 << (int) floorf(log2f((float) q->ne[2]));
    a.scale = softcap != 0.0f ? scale / softcap : scale, a.softcap = softcap;
    a.m0 = powf(2.0f, -max_bias / (float) a.n_head_log2);
    a.m1 = powf(2.0f, -max_bias / 2.0f / (float) a.n_head_log2);

    const ggml_metal_buffer_id dst = buffer_of(op);
    ggml_metal_buffer_id parts = dst;
    parts.offs += ggml_nbytes(op);
    ggml_metal_encoder_set_pipeline(enc, p);
    ggml_metal_encoder_set_bytes(enc, &a, sizeof(a), 0);
    ggml_metal_encoder_set_buffer(enc, buffer_of(q), 1);
    ggml_metal_encoder_set_buffer(enc, buffer_of(k), 2);
    ggml_metal_encoder_set_buffer(enc, buffer_of(v), 3);
    ggml_metal_encoder_set_buffer(enc, buffer_of(mask ? mask : q), 4);
    ggml_metal_encoder_set_buffer(enc, buffer_of(sinks ? sinks : q), 5);
    ggml_metal_encoder_set_buffer(enc, plan.n_splits == 1 ? dst : parts, 6);
    ggml_metal_encoder_set_threadgroup_memory_size(enc, bytes, 0);
    ggml_metal_encoder_dispatch_threadgroups(enc, div_up(a.n_rows, plan.rows), a.n_head_kv, a.n_seq * plan.n_splits,
                                             32 * nsg, 1, 1);
    if (plan.n_splits == 1) {
        return;
    }
    ggml_metal_encoder_memory_barrier(enc);
    p = pipeline_of(dev, "kernel_pytq_attn_reduce_dv" + std::to_string(dv), {}, {}, mask, max_bias != 0.0f,
                    softcap != 0.0f);
    ggml_metal_encoder_set_pipeline(enc, p);
    ggml_metal_encoder_set_bytes(enc, &a, sizeof(a), 0);
    ggml_metal_encoder_set_buffer(enc, parts, 1);
    ggml_metal_encoder_set_buffer(enc, buffer_of(sinks ? sinks : q), 2);
    ggml_metal_encoder_set_buffer(enc, dst, 3);
    ggml_metal_encoder_dispatch_threadgroups(enc, a.n_rows, a.n_head_kv, a.n_seq, 64, 1, 1);
}

// ------------------------------------------------------------------------------------------------ what runs

// Row of csrc/ggml/pytq-metal-ops.def. Sets are bit masks over family indices and slots of the types table.
struct op_row {
    ggml_op op;
    unsigned families, head_dims;
    enum { FUSED, GENERIC, REFUSED } kind;
};

static constexpr unsigned families_ALL = ~0u, head_dims_ALL = ~0u;

static const op_row op_rows[] = {
#define PYTQ_METAL_OP(op, families, head_dims, kind, condition)                                                        \
    {GGML_OP_##op, families_##families, head_dims_##head_dims, op_row::kind},
#include "pytq-metal-ops.def"
};

// The table's word on every compressed tensor of the node.
static bool table_allows(const ggml_tensor * op) {
    for (const op_row & row : op_rows) {
        if (row.op != op->op) {
            continue;
        }
        bool ok = row.kind != op_row::REFUSED;
        for (int i = -1; i < GGML_MAX_SRC; i++) {
            const ggml_tensor * t = i < 0 ? op : op->src[i];
            if (is_compressed(t)) {
                const unsigned family = ((unsigned) t->type - PYTQ_TYPE_BASE) / PYTQ_FAMILY_STRIDE;
                const unsigned slot = ((unsigned) t->type - PYTQ_TYPE_BASE) % PYTQ_FAMILY_STRIDE;
                // slot 0 is a flag: it never owns memory
                ok = ok && slot != 0 && (row.families >> family & 1u) && (row.head_dims >> slot & 1u);
            }
        }
        return ok;
    }
    return false;
}

static bool is_cache_operand(const ggml_tensor * t) {
    const bool plain = t->type == GGML_TYPE_F16 || (t->type == GGML_TYPE_Q8_0 && t->ne[0] % 32 == 0);
    return (plain || (is_compressed(t) && ggml_blck_size(t->type) == t->ne[0])) && t->nb[0] == ggml_type_size(t->type);
}

static bool attention_supported(const ggml_metal_device_props * props, const ggml_tensor * op) {
    const ggml_tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3], *sinks = op->src[4];
    if (!is_cache_operand(k) || !is_cache_operand(v) || q->type != GGML_TYPE_F32 || op->type != GGML_TYPE_F32) {
        return false;
    }
    const int dk = (int) k->ne[0], dv = (int) v->ne[0];
    const bool dims = dk == dv ? pytq_type_resolve(PYTQ_TYPE_BASE, dk, 0) >= 0 : dk == 192 && dv == 128;
    return dims && q->ne[0] == dk && q->nb[0] == sizeof(float) && ggml_is_contiguous(op) && k->ne[1] == v->ne[1] &&
           k->ne[2] == v->ne[2] && k->ne[3] == v->ne[3] && q->ne[2] % k->ne[2] == 0 && q->ne[3] % k->ne[3] == 0 &&
           (!mask || (mask->type == GGML_TYPE_F16 && mask->nb[0] == 2 && mask->ne[1] >= q->ne[1])) &&
           (!sinks || sinks->type == GGML_TYPE_F32) && props->has_simdgroup_reduction &&
           (size_t) mm_bytes(dk, dv) <= props->max_theadgroup_memory_size &&
           vec_bytes(dk, dv, max_vec_rows, PYTQ_METAL_MAX_NSG) <= props->max_theadgroup_memory_size;
}

static bool copy_supported(const ggml_tensor * src, const ggml_tensor * dst) {
    if (src->type == dst->type) {
        return ggml_is_contiguous(src) && ggml_is_contiguous(dst);
    }
    if (!ggml_are_same_shape(src, dst)) {
        return false;
    }
    if (is_compressed(src)) {
        return dst->nb[0] == ggml_type_size(dst->type) && (dst->type == GGML_TYPE_F32 || dst->type == GGML_TYPE_F16);
    }
    return src->type == GGML_TYPE_F32 && src->nb[0] == sizeof(float);
}

bool pytq_metal_supports_op(ggml_metal_device_t dev, const ggml_tensor * op, bool * supported) {
    if (!is_ours(op)) {
        return false;
    }
    *supported = false;
    if (is_noop(op)) {
        *supported = true;
        return true;
    }
    const ggml_metal_device_props * props = ggml_metal_device_get_props(dev);
    if (!props->has_simdgroup_reduction || !table_allows(op)) {
        return true;
    }
    const ggml_tensor *a = op->src[0], *b = op->src[1];
    bool ok = false;
    switch (op->op) {
        case GGML_OP_SET_ROWS:
            ok = is_compressed(op) && a->type == GGML_TYPE_F32 && a->nb[0] == sizeof(float) &&
                 (b->type == GGML_TYPE_I64 || b->type == GGML_TYPE_I32);
            break;
        case GGML_OP_GET_ROWS:
            ok = is_compressed(a) && op->type == GGML_TYPE_F32 && b->type == GGML_TYPE_I32;
            break;
        case GGML_OP_CPY:
        case GGML_OP_DUP:
        case GGML_OP_CONT:
            ok = copy_supported(a, op);
            break;
        case GGML_OP_FLASH_ATTN_EXT:
            ok = attention_supported(props, op);
            break;
        default:
            break;
    }
    *supported = ok && library_of(dev) != nullptr;
    return true;
}

bool pytq_metal_alloc_size(const ggml_tensor * op, size_t * size) {
    if (op->op != GGML_OP_FLASH_ATTN_EXT || !(is_compressed(op->src[1]) || is_compressed(op->src[2]))) {
        return false;
    }
    // whichever kernel will run
    *size = ggml_nbytes(op) + std::max(parts_bytes(op, plan_of(op, true)), parts_bytes(op, plan_of(op, false)));
    return true;
}

bool pytq_metal_encode(ggml_metal_device_t dev, ggml_metal_encoder_t enc, ggml_tensor * op) {
    if (!is_ours(op)) {
        return false;
    }
    switch (op->op) {
        case GGML_OP_SET_ROWS:
            encode_blocks(dev, enc, op->src[0], op->src[1], op);
            return true;
        case GGML_OP_GET_ROWS:
            decode_values(dev, enc, op->src[0], op->src[1], op);
            return true;
        case GGML_OP_CPY:
        case GGML_OP_DUP:
        case GGML_OP_CONT:
            if (op->src[0]->type == op->type) {
                copy_bytes(dev, enc, op->src[0], op);
            } else if (is_compressed(op->src[0])) {
                decode_values(dev, enc, op->src[0], nullptr, op);
            } else {
                encode_blocks(dev, enc, op->src[0], nullptr, op);
            }
            return true;
        case GGML_OP_FLASH_ATTN_EXT:
            attention(dev, enc, op);
            return true;
        default:
            return false;
    }
}

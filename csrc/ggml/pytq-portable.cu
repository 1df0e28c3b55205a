// Which attention nodes the portable kernel takes, and its instance for a head size.
#include "common.cuh"

#include "pytq-portable.h"

#include "pytq.h"

static bool operand_ok(const ggml_tensor * t) {
    if (pytq_type_get(t->type)) {
        return t->ne[0] == ggml_blck_size(t->type);
    }
    return (t->type == GGML_TYPE_F16 && t->nb[0] == 2) || (t->type == GGML_TYPE_Q8_0 && t->ne[0] % QK8_0 == 0);
}

bool pytq_portable_supported(const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const ggml_tensor * mask = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];
    if (!operand_ok(k) || !operand_ok(v) || q->type != GGML_TYPE_F32 || q->nb[0] != sizeof(float)) {
        return false;
    }
    if (k->ne[0] != v->ne[0] || k->ne[1] != v->ne[1] || k->ne[2] != v->ne[2] || k->ne[3] != v->ne[3] ||
        q->ne[3] != k->ne[3] || q->ne[2] % k->ne[2] != 0) {
        return false;
    }
    if ((mask && (mask->type != GGML_TYPE_F16 || mask->nb[0] != 2)) || (sinks && sinks->type != GGML_TYPE_F32)) {
        return false;
    }
    switch (k->ne[0]) {
#define PYTQ_PORTABLE(head_dim) case head_dim:
#include "pytq-cuda-ops.def"
        return true;
        default:
            return false;
    }
}

void pytq_portable_attention(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    switch (dst->src[1]->ne[0]) {
#define PYTQ_PORTABLE(head_dim)                                                                                        \
    case head_dim:                                                                                                     \
        pytq_portable_launch<head_dim>(ctx, dst);                                                                      \
        break;
#include "pytq-cuda-ops.def"
        default:
            GGML_ABORT("no portable attention for head size %d", (int) dst->src[1]->ne[0]);
    }
}

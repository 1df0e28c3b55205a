// Attention of many query rows by the kernel of cuda/attention-prefill.cuh, for devices of compute capability 9.0.
#include "pytq-cuda-impl.cuh"

#include <algorithm>
#include <cstdlib>

#if defined(PYTQ_CUDA_PREFILL) // pytq-cuda.cmake: the instances are part of this build
#include "pytq-prefill.h"

static bool enabled() {
    static const bool on = [] {
        const char * e = getenv("PYTQ_CUDA_PREFILL");
        return e == nullptr || atoi(e) != 0;
    }();
    return on;
}

static cudaError_t instance(int k_type, int v_type, const pytq::prefill_params * p, int device, cudaStream_t stream) {
    switch ((k_type - PYTQ_TYPE_BASE) / PYTQ_FAMILY_STRIDE) {
#define PYTQ_CASE(name)                                                                                                \
    case PYTQ_FAMILY_INDEX_##name:                                                                                     \
        return pytq_prefill_##name(k_type, v_type, p, device, stream);
        PYTQ_PREFILL_FAMILIES(PYTQ_CASE)
#undef PYTQ_CASE
        default:
            return cudaErrorInvalidDeviceFunction;
    }
}

bool pytq_cuda_prefill(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const ggml_tensor * mask = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];
    const auto & info = ggml_cuda_info().devices[ctx.device];
    // code for 9.0a runs on no later device
    if (!enabled() || info.cc != GGML_CUDA_CC_HOPPER || !pytq_is_type(k->type) || !pytq_is_type(v->type) ||
        instance(k->type, v->type, nullptr, 0, nullptr) != cudaSuccess || q->nb[1] % 16 || q->nb[2] % 16 ||
        q->nb[3] % 16) {
        return false;
    }
    pytq::prefill_params p = {};
    p.q = (const char *) q->data, p.k = (const char *) k->data, p.v = (const char *) v->data;
    p.mask = mask ? (const char *) mask->data : nullptr;
    p.sinks = sinks ? (const float *) sinks->data : nullptr;
    p.dst = (float *) dst->data;
    p.q_nb1 = q->nb[1], p.q_nb2 = q->nb[2], p.q_nb3 = q->nb[3];
    p.k_nb1 = k->nb[1], p.k_nb2 = k->nb[2], p.k_nb3 = k->nb[3];
    p.v_nb1 = v->nb[1], p.v_nb2 = v->nb[2], p.v_nb3 = v->nb[3];
    p.mask_nb1 = mask ? mask->nb[1] : 0, p.mask_nb3 = mask ? mask->nb[3] : 0;
    p.n_seq = (int) q->ne[3], p.n_seq_mask = mask ? (int) mask->ne[3] : 1;
    p.n_kv = (int) k->ne[1], p.n_q = (int) q->ne[1], p.n_head_kv = (int) k->ne[2], p.gqa = (int) (q->ne[2] / k->ne[2]);
    memcpy(&p.scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&p.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&p.softcap, (const float *) dst->op_params + 2, sizeof(float));
    p.n_head_log2 = 1 << (int) floorf(log2f((float) q->ne[2]));
    p.m0 = powf(2.0f, -p.max_bias / p.n_head_log2);
    p.m1 = powf(2.0f, -p.max_bias / 2.0f / p.n_head_log2);
    pytq::prefill_plan(p, info.nsm);

    const size_t rows = std::max<size_t>(1, pytq::prefill_part_rows(p));
    ggml_cuda_pool_alloc<float> part(ctx.pool(), p.n_splits > 1 ? rows * q->ne[0] : 1);
    ggml_cuda_pool_alloc<float2> meta(ctx.pool(), rows);
    p.part = part.get(), p.meta = meta.get();
    CUDA_CHECK(instance(k->type, v->type, &p, ctx.device, ctx.stream()));
    return true;
}

#else

bool pytq_cuda_prefill(ggml_backend_cuda_context &, ggml_tensor *) {
    return false;
}

#endif

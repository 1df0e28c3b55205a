// Attention of many query rows by the kernel of cuda/attention-prefill.cuh, for devices of compute capability 9.0.
#include "pytq-attention-params.cuh"
#include "pytq-cuda-impl.cuh"
#include "pytq-switch.h"

#include <algorithm>

#if defined(PYTQ_CUDA_PREFILL) // pytq-cuda.cmake: the instances are part of this build
#include "pytq-prefill.h"

static bool enabled() {
    static const bool on = pytq_switch("PYTQ_CUDA_PREFILL");
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
    const auto & info = ggml_cuda_info().devices[ctx.device];
    // code for 9.0a runs on no later device
    if (!enabled() || info.cc != GGML_CUDA_CC_HOPPER || !pytq_is_type(k->type) || !pytq_is_type(v->type) ||
        instance(k->type, v->type, nullptr, 0, nullptr) != cudaSuccess || q->nb[1] % 16 || q->nb[2] % 16 ||
        q->nb[3] % 16) {
        return false;
    }
    pytq::prefill_params p = {};
    pytq_set_block_attention(p, dst);
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

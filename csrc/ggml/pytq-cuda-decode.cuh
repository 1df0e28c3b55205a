// Launcher of the decode kernel for one family of keys; included once per family with PYTQ_K set, and
//   PYTQ_OWN_V      the family of values for every head size (default: the keys')
//   PYTQ_EXTRA_V    further families of values for head size 128: X(name) ...
#include "pytq-attention-params.cuh"
#include "pytq-cuda-impl.cuh"
#include "pytq-switch.h"

#include "cuda/attention-launch.cuh"

#include <algorithm>

namespace {

// As upstream decides it (ggml_cuda_kernel_launch).
bool dependent_launch(const void * kernel) {
#if defined(GGML_CUDA_USE_PDL)
    static const bool enabled = pytq_switch("GGML_CUDA_PDL");
    return enabled && ggml_cuda_kernel_can_use_pdl(kernel);
#else
    GGML_UNUSED(kernel);
    return false;
#endif
}

// PYTQ_CUDA_SHORT=0: short caches by attention-decode.cuh too, to compare.
bool short_kernel() {
    static const bool enabled = pytq_switch("PYTQ_CUDA_SHORT");
    return enabled;
}

template <int KT, int VT>
bool run(ggml_backend_cuda_context * ctx, ggml_tensor * dst, const pytq_cuda_fresh * fresh, bool check) {
    if (check) {
        return true;
    }
    pytq::decode_params p = {};
    pytq_set_block_attention(p, dst);
    const int result = ggml_get_op_params_i32(dst, pytq_result_param);
    p.rotate = result & pytq_result_rotated, p.q8_1 = result & pytq_result_q8_1;
    if (fresh) {
        p.fresh = {(const float *) fresh->k, (const float *) fresh->v, fresh->row, fresh->row_bytes,
                   (long long) fresh->first_row};
        p.rotate_query = fresh->turned;
    }
    p.slope_log2[0] = -p.max_bias / p.n_head_log2, p.slope_log2[1] = -p.max_bias / 2.0f / p.n_head_log2;

    // both alignments are compiled for the commonest head size only
    constexpr bool both = pytq::type<KT>::d == 128;
    const int id = ggml_cuda_get_device();
    const auto & info = ggml_cuda_info().devices[id];
    const int cluster = ggml_cuda_highest_compiled_arch(info.cc) >= GGML_CUDA_CC_HOPPER ? 1 : 0;
    const pytq::decode_device device = {id,
                                        info.nsm,
                                        (int) info.smpbo,
                                        cluster ? pytq::decode_few_cluster : 1,
                                        cluster ? pytq::decode_many_cluster : 1,
                                        cluster && short_kernel() ? pytq::short_max_cluster : 0};
    pytq::decode_plan plan;
    CUDA_CHECK((pytq::decode_prepare<KT, VT, both>(p, plan, device)));
    const size_t rows = std::max<size_t>(1, pytq::decode_part_rows(p));
    ggml_cuda_pool_alloc<float> part(ctx->pool(), rows * pytq::type<KT>::d);
    ggml_cuda_pool_alloc<float2> meta(ctx->pool(), rows);
    p.part = part.get(), p.meta = meta.get();
    CUDA_CHECK((pytq::decode_launch<KT, VT, both>(
        p, plan, dependent_launch((const void *) pytq::attention_decode<KT, VT, false>), ctx->stream(),
        fresh ? fresh->ready : nullptr)));
    return true;
}

constexpr int id_of(int family, int slot) {
    return PYTQ_TYPE_BASE + PYTQ_FAMILY_STRIDE * family + slot;
}

} // namespace

#define PYTQ_CAT_(a, b)  a##b
#define PYTQ_CAT(a, b)   PYTQ_CAT_(a, b)
#define PYTQ_INDEX(name) PYTQ_CAT(PYTQ_FAMILY_INDEX_, name)
#ifndef PYTQ_OWN_V
#define PYTQ_OWN_V PYTQ_K
#endif
#ifdef PYTQ_CUDA_ALL_PAIRS
#define PYTQ_MORE_V(X) X(turbo2) X(turbo3) X(turbo4) X(kv2) X(kv3) X(kv4) X(kv5)
#elif defined(PYTQ_EXTRA_V)
#define PYTQ_MORE_V(X) PYTQ_EXTRA_V(X)
#else
#define PYTQ_MORE_V(X)
#endif

bool PYTQ_CAT(pytq_cuda_decode_, PYTQ_K)(ggml_backend_cuda_context * ctx, ggml_tensor * dst,
                                         const pytq_cuda_fresh * fresh, bool check) {
    const int slot = ((int) dst->src[1]->type - PYTQ_TYPE_BASE) % PYTQ_FAMILY_STRIDE;
    const int v = (int) dst->src[2]->type;
    constexpr int K = PYTQ_INDEX(PYTQ_K), OWN = PYTQ_INDEX(PYTQ_OWN_V);
#define PYTQ_SLOT(s)                                                                                                   \
    if (slot == s && v == id_of(OWN, s)) {                                                                             \
        return run<id_of(K, s), id_of(OWN, s)>(ctx, dst, fresh, check);                                                \
    }
    PYTQ_SLOT(1)
    PYTQ_SLOT(2)
    PYTQ_SLOT(3)
    PYTQ_SLOT(4)
    PYTQ_SLOT(5)
    PYTQ_SLOT(6)
#undef PYTQ_SLOT
#define PYTQ_V(name)                                                                                                   \
    if (slot == 4 && v == id_of(PYTQ_INDEX(name), 4)) {                                                                \
        return run<id_of(K, 4), id_of(PYTQ_INDEX(name), 4)>(ctx, dst, fresh, check);                                   \
    }
    PYTQ_MORE_V(PYTQ_V)
#undef PYTQ_V
    return false;
}

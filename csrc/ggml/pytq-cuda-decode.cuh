// Launcher of the decode kernel for one family of keys; included once per family with PYTQ_K set.
#include "pytq-cuda-impl.cuh"

#include <algorithm>

namespace {

template <int KT, int VT, bool SOFTCAP>
void launch(ggml_backend_cuda_context & ctx, ggml_tensor * dst, pytq::decode_params p) {
    using K = pytq::type<KT>;
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const int device = ggml_cuda_get_device();
    const int n_sm = ggml_cuda_info().devices[device].nsm;
    const int n_seq = (int) dst->src[0]->ne[3];

    // Heads that lie side by side in a cache row share a block, so rows are read once and in order.
    p.heads_per_block = 1;
    if (p.k_nb2 == (int64_t) ggml_type_size(k->type) && p.v_nb2 == (int64_t) ggml_type_size(v->type)) {
        for (int h = 2; h <= 8; h++) {
            p.heads_per_block = p.n_head_kv % h == 0 ? h : p.heads_per_block;
        }
    }
    p.warps_per_head = 8 / p.heads_per_block;
    const int warps = p.warps_per_head * p.heads_per_block;
    const int tokens = pytq::decode_tile * p.warps_per_head;
    p.row_tiles = (p.n_rows + 3) / 4;
    const int groups = p.n_head_kv / p.heads_per_block * p.row_tiles;
    const int tiles = (p.n_kv + tokens - 1) / tokens;
    p.n_splits = std::max(1, std::min(tiles, 2 * n_sm / (groups * n_seq)));
    p.n_parts = p.n_splits * p.warps_per_head;
    p.k_slot = pytq::decode_slot_bytes(p.k_nb1, p.heads_per_block * K::block_bytes);
    p.v_slot = pytq::decode_slot_bytes(p.v_nb1, p.heads_per_block * pytq::type<VT>::block_bytes);
    const size_t smem = pytq::decode_shared_bytes(p.k_slot, p.v_slot, warps, tokens);

    const size_t n = (size_t) n_seq * p.n_head_kv * p.n_rows * p.n_parts;
    ggml_cuda_pool_alloc<float> part(ctx.pool(), n * K::d);
    ggml_cuda_pool_alloc<float2> meta(ctx.pool(), n);
    p.part = part.get();
    p.meta = meta.get();

    static size_t raised[GGML_CUDA_MAX_DEVICES] = {0};
    if (raised[device] < smem) {
        CUDA_CHECK(cudaFuncSetAttribute(pytq::attention_decode<KT, VT, SOFTCAP>,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, (int) smem));
        raised[device] = smem;
    }
    pytq::attention_decode<KT, VT, SOFTCAP><<<dim3(p.n_splits, groups, n_seq), warps * 32, smem, ctx.stream()>>>(p);
    CUDA_CHECK(cudaGetLastError());
    const ggml_tensor * sinks = dst->src[4];
    pytq::attention_combine<K::d><<<dim3(K::d / 32, p.n_rows, p.n_head_kv * n_seq), 256, 0, ctx.stream()>>>(
        part.get(), meta.get(), sinks ? (const float *) sinks->data : nullptr, (char *) dst->data, p.n_parts, p.n_rows,
        p.n_head_kv, p.gqa, p.n_q);
    CUDA_CHECK(cudaGetLastError());
}

template <int KT, int VT> bool run(ggml_backend_cuda_context * ctx, ggml_tensor * dst, bool check) {
    if (check) {
        return true;
    }
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const ggml_tensor * mask = dst->src[3];

    pytq::decode_params p = {};
    p.q = (const char *) q->data, p.k = (const char *) k->data, p.v = (const char *) v->data;
    p.mask = mask ? (const char *) mask->data : nullptr;
    p.q_nb1 = q->nb[1], p.q_nb2 = q->nb[2], p.q_nb3 = q->nb[3];
    p.k_nb1 = k->nb[1], p.k_nb2 = k->nb[2], p.k_nb3 = k->nb[3];
    p.v_nb1 = v->nb[1], p.v_nb2 = v->nb[2], p.v_nb3 = v->nb[3];
    p.mask_nb1 = mask ? mask->nb[1] : 0, p.mask_nb3 = mask ? mask->nb[3] : 0;
    p.n_seq_mask = mask ? (int) mask->ne[3] : 1;
    p.n_kv = (int) k->ne[1], p.n_q = (int) q->ne[1], p.n_head_kv = (int) k->ne[2], p.gqa = (int) (q->ne[2] / k->ne[2]);
    p.n_rows = p.gqa * p.n_q;
    memcpy(&p.scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&p.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&p.softcap, (const float *) dst->op_params + 2, sizeof(float));
    p.n_head_log2 = 1 << (int) floorf(log2f((float) q->ne[2]));
    p.m0 = powf(2.0f, -p.max_bias / p.n_head_log2);
    p.m1 = powf(2.0f, -p.max_bias / 2.0f / p.n_head_log2);
    if (p.softcap != 0.0f) {
        launch<KT, VT, true>(*ctx, dst, p);
    } else {
        launch<KT, VT, false>(*ctx, dst, p);
    }
    return true;
}

} // namespace

#define PYTQ_ID128(name)    (PYTQ_TYPE_BASE + PYTQ_FAMILY_STRIDE * PYTQ_FAMILY_INDEX_##name + 4)
#define PYTQ_CAT_(a, b)     a##b
#define PYTQ_CAT(a, b)      PYTQ_CAT_(a, b)
#define PYTQ_ID128_OF(name) PYTQ_ID128(name)
#define PYTQ_V(name)                                                                                                   \
    case PYTQ_ID128(name):                                                                                             \
        return run<PYTQ_ID128_OF(PYTQ_K), PYTQ_ID128(name)>(ctx, dst, check);

// Values beside the family's own: kv3 and kv2 for kv4 keys, everything with PYTQ_CUDA_ALL_PAIRS.
bool PYTQ_CAT(pytq_cuda_decode_, PYTQ_K)(ggml_backend_cuda_context * ctx, ggml_tensor * dst, ggml_type type_v,
                                         bool check) {
    switch ((int) type_v) {
#ifdef PYTQ_CUDA_ALL_PAIRS
        PYTQ_DECODE_FAMILIES(PYTQ_V)
#else
        case PYTQ_ID128_OF(PYTQ_K):
            return run<PYTQ_ID128_OF(PYTQ_K), PYTQ_ID128_OF(PYTQ_K)>(ctx, dst, check);
#ifdef PYTQ_EXTRA_V
            PYTQ_EXTRA_V(PYTQ_V)
#endif
#endif
        default:
            return false;
    }
}

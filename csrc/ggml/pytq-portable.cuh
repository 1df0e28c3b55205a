// Launcher for one head size; included by one file per head size with PYTQ_D set.
#include "common.cuh"

#include "pytq-attention-params.cuh"

#include "pytq-portable.h"

#include "cuda/attention-portable.cuh"

#include <algorithm>

namespace {

template <int R, bool PLAIN>
void launch(ggml_backend_cuda_context & ctx, pytq::portable_params & p, int n_seq, ggml_cuda_pool_alloc<float> & part,
            ggml_cuda_pool_alloc<float2> & meta) {
    const int n_sm = ggml_cuda_info().devices[ggml_cuda_get_device()].nsm;
    p.row_tiles = (p.n_rows + R - 1) / R;
    const int blocks = p.n_head_kv * p.row_tiles * n_seq;
    const int tiles = (p.n_kv + pytq::portable_tile - 1) / pytq::portable_tile;
    p.n_splits = std::max(1, std::min(tiles, 8 * n_sm / blocks));
    if (p.n_splits > 1) {
        const size_t n = (size_t) n_seq * p.n_head_kv * p.n_rows * p.n_splits;
        p.part = part.alloc(n * PYTQ_D);
        p.meta = meta.alloc(n);
    }
    const int smem = pytq::portable_shared_bytes(p, R);
#if !defined(GGML_USE_HIP)
    static int raised[GGML_CUDA_MAX_DEVICES] = {0};
    const int device = ggml_cuda_get_device();
    if (raised[device] < smem) {
        CUDA_CHECK(cudaFuncSetAttribute(pytq::portable_attention<PYTQ_D, R, PLAIN>,
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
        raised[device] = smem;
    }
#endif
    pytq::portable_attention<PYTQ_D, R, PLAIN>
        <<<dim3(p.n_splits, p.n_head_kv * p.row_tiles, n_seq), pytq::portable_tile, smem, ctx.stream()>>>(p);
    CUDA_CHECK(cudaGetLastError());
}

pytq::portable_operand operand_of(const ggml_tensor * t) {
    pytq::portable_operand o = {};
    o.data = (const char *) t->data;
    o.nb1 = t->nb[1], o.nb2 = t->nb[2], o.nb3 = t->nb[3];
    const pytq_type_info * info = pytq_type_get(t->type);
    o.kind = info ? pytq::OPERAND_BLOCKS : t->type == GGML_TYPE_F16 ? pytq::OPERAND_F16 : pytq::OPERAND_Q8_0;
    if (info) {
        o.l = pytq::portable_layout_of(pytq::layout_of(info));
        o.slot = pytq::portable_slot(info->block_bytes);
    }
    return o;
}

} // namespace

template <> void pytq_portable_launch<PYTQ_D>(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * mask = dst->src[3];
    const int n_seq = (int) q->ne[3];

    pytq::portable_params p = {};
    pytq_set_attention(p, dst);
    p.k = operand_of(k), p.v = operand_of(dst->src[2]);
    p.mask_ne2 = p.mask_ne3 = 1;
    if (mask) {
        p.mask_nb1 = mask->nb[1], p.mask_nb2 = mask->nb[2], p.mask_nb3 = mask->nb[3];
        p.mask_ne2 = (int) mask->ne[2], p.mask_ne3 = (int) mask->ne[3];
    }
    p.n_rows = p.gqa * p.n_q;
    p.m0 = powf(2.0f, -p.max_bias / p.n_head_log2);
    p.m1 = powf(2.0f, -p.max_bias / 2.0f / p.n_head_log2);

    const size_t rows = (size_t) n_seq * p.n_head_kv * p.n_rows;
    ggml_cuda_pool_alloc<uint32_t> words(ctx.pool(), rows * pytq::portable_chunks(PYTQ_D) * 16);
    ggml_cuda_pool_alloc<float> factors(ctx.pool(), rows), part(ctx.pool());
    ggml_cuda_pool_alloc<float2> meta(ctx.pool());
    p.words = words.get(), p.factors = factors.get();
    pytq::portable_query<PYTQ_D><<<(unsigned) ((rows + 3) / 4), 128, 0, ctx.stream()>>>(p, n_seq);
    CUDA_CHECK(cudaGetLastError());
    if (p.k.kind != pytq::OPERAND_BLOCKS || p.v.kind != pytq::OPERAND_BLOCKS) {
        launch<4, true>(ctx, p, n_seq, part, meta);
    } else if (p.n_rows == 1) {
        launch<1, false>(ctx, p, n_seq, part, meta);
    } else if (p.n_rows <= 4) {
        launch<4, false>(ctx, p, n_seq, part, meta);
    } else {
        launch<8, false>(ctx, p, n_seq, part, meta);
    }
    if (p.n_splits > 1) {
        pytq::portable_combine<PYTQ_D><<<dim3(p.n_rows, p.n_head_kv, n_seq), 256, 0, ctx.stream()>>>(p);
        CUDA_CHECK(cudaGetLastError());
    }
}

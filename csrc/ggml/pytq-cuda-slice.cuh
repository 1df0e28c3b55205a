// Attention over one f16 slice of the sequence with upstream's tensor-core kernel; included once per head size with
// PYTQ_D set.
//
// The kernel is launched stream-k style with at least two blocks per output tile. None of them then owns a whole tile,
// so all of them leave unnormalised sums and (max, sum) pairs, which the kernel here merges into the running result.
// Slices of any number thus combine exactly, and no copy of the whole cache in f16 exists at any time.
#include "fattn-common.cuh"
#include "fattn-mma-f16.cuh"

#include "pytq-cuda-impl.cuh"

namespace {

// grid (tiles, ncols1, ncols2), D threads. Tiles are ordered (head_kv, group of ncols2 heads, ncols1 queries).
template <int D, int ncols1, int ncols2>
__global__ void merge_slice(const float * last, const float2 * fixup, float * dst, float2 * state, const float * sinks,
                            int n_q, int n_head, int n_blocks, int blocks_per_tile, int gqa_ratio, int tiles_q,
                            int tiles_gqa, bool first, bool final) {
    constexpr int ncols = ncols1 * ncols2;
    const int j = blockIdx.y, c = blockIdx.z, jc = j * ncols2 + c, tid = threadIdx.x;
    const int tile = blockIdx.x;
    const int jt = tile % tiles_q, zt = tile / tiles_q % tiles_gqa, head_kv = tile / tiles_q / tiles_gqa;
    const int iq = jt * ncols1 + j, in_group = zt * ncols2 + c;
    if (iq >= n_q || in_group >= gqa_ratio) {
        return;
    }
    const int head = head_kv * gqa_ratio + in_group;
    const int64_t row = (int64_t) iq * n_head + head;
    const float * data = (const float *) fixup + n_blocks * (2 * 2 * ncols);
    const int b_first = tile * blocks_per_tile, b_last = b_first + blocks_per_tile - 1;

    float top = -INFINITY, sum = 0.0f, acc = 0.0f;
    if (!first) {
        top = state[row].x, sum = state[row].y, acc = dst[row * D + tid];
    } else if (sinks) {
        top = sinks[head], sum = 1.0f;
    }
    __syncthreads(); // everyone has read the state before thread 0 replaces it
    for (int b = b_first; b <= b_last; b++) {
        const float2 m = b == b_last ? fixup[b * ncols + jc] : fixup[(n_blocks + b) * ncols + jc];
        if (!(m.y > 0.0f)) {
            continue; // nothing visible in this part
        }
        const float x = b == b_last ? last[row * D + tid] : data[(int64_t) b * ncols * D + jc * D + tid];
        const float t = fmaxf(top, m.x);
        const float f_old = top > -INFINITY ? expf(top - t) : 0.0f, f_new = expf(m.x - t);
        acc = acc * f_old + x * f_new;
        sum = sum * f_old + m.y * f_new;
        top = t;
    }
    dst[row * D + tid] = final ? (sum > 0.0f ? acc / sum : 0.0f) : acc;
    if (tid == 0) {
        state[row] = make_float2(top, sum);
    }
}

template <int D, int ncols1, int ncols2, bool SOFTCAP>
void launch_slice(ggml_backend_cuda_context & ctx, const pytq_cuda_slice & s) {
    constexpr int ncols = ncols1 * ncols2;
    const int id = ggml_cuda_get_device(), cc = ggml_cuda_info().devices[id].cc, nsm = ggml_cuda_info().devices[id].nsm;

    // as in ggml_cuda_flash_attn_ext_mma_f16_case()
    const int nthreads = ggml_cuda_fattn_mma_get_nthreads(D, D, ncols, cc);
    const int nbatch_fa = ggml_cuda_fattn_mma_get_nbatch_fa(D, D, ncols, cc);
    const int nbatch_K2 = ggml_cuda_fattn_mma_get_nbatch_K2(D, D, ncols, cc);
    const int nbatch_V2 = ggml_cuda_fattn_mma_get_nbatch_V2(D, D, ncols, cc);
    const int nbatch_combine = ggml_cuda_fattn_mma_get_nbatch_combine(D, D, ncols, cc);
    const bool Q_in_reg = ggml_cuda_fattn_mma_get_Q_in_reg(D, D, ncols, cc);
    const int nstages = ggml_cuda_fattn_mma_get_nstages(D, D, ncols1, ncols2, cc);
    const int cols_per_warp = std::min(ncols, get_cols_per_warp(cc));
    const int warp_size = ggml_cuda_info().devices[id].warp_size;
    const int nwarps = nthreads / warp_size;
    const bool swizzled = ggml_cuda_fattn_mma_get_swizzled(D, D, ncols1, ncols2, cc);
    const int stride_tile_K = ggml_cuda_fattn_mma_get_stride_tile(nbatch_K2, swizzled);
    const int stride_tile_V = ggml_cuda_fattn_mma_get_stride_tile(nbatch_V2, swizzled);
    const size_t kv1 = nbatch_fa * std::max(stride_tile_K, stride_tile_V) * sizeof(half2);
    const size_t kv2 = nbatch_fa * (stride_tile_K + stride_tile_V) * sizeof(half2);
    const size_t q_bytes = ncols * (D / 2 + 4) * sizeof(half2);
    const size_t mask_bytes = ncols1 * (nbatch_fa / 2 + 4) * sizeof(half2);
    const size_t combine_bytes = nwarps * cols_per_warp * (nbatch_combine + 4) * sizeof(half2);
    const size_t kv = nstages <= 1 ? kv1 : kv2;
    const size_t smem =
        std::max(combine_bytes, Q_in_reg ? std::max(q_bytes, kv + mask_bytes) : q_bytes + kv + mask_bytes);

    fattn_kernel_t kernel = flash_attn_ext_f16<D, D, ncols1, ncols2, SOFTCAP, false, false>;
    static bool raised[GGML_CUDA_MAX_DEVICES] = {false};
    if (!raised[id]) {
        CUDA_CHECK(cudaFuncSetAttribute(reinterpret_cast<const void *>(kernel),
                                        cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
        raised[id] = true;
    }
    const int gqa = s.n_head / s.n_head_kv;
    const int tiles_q = (s.n_q + ncols1 - 1) / ncols1, tiles_gqa = (gqa + ncols2 - 1) / ncols2;
    const int tiles = tiles_q * tiles_gqa * s.n_head_kv;
    const int tiles_kv = (s.n_tok + nbatch_fa - 1) / nbatch_fa;
    GGML_ASSERT(tiles_kv >= 2);
    int per_sm = 1;
    CUDA_CHECK(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_sm, kernel, nthreads, smem));
    const int per_tile = std::min(tiles_kv, std::max(2, per_sm * nsm / tiles));
    const int blocks = tiles * per_tile;

    ggml_cuda_pool_alloc<float> last(ctx.pool(), (size_t) s.n_q * s.n_head * D);
    ggml_cuda_pool_alloc<float2> fixup(ctx.pool(), (size_t) blocks * ncols * (2 + D / 2));

    const uint32_t n_head_log2 = 1u << (uint32_t) floorf(log2f((float) s.n_head));
    const float m0 = powf(2.0f, -s.max_bias / n_head_log2), m1 = powf(2.0f, -s.max_bias / 2.0f / n_head_log2);
    const float scale = SOFTCAP ? s.scale / s.softcap : s.scale;

    const ggml_cuda_kernel_launch_params params(dim3(blocks, 1, 1), dim3(warp_size, nwarps, 1), smem, ctx.stream());
    ggml_cuda_kernel_launch(kernel, params, s.q, (const char *) s.k, (const char *) s.v, s.mask, (const char *) nullptr,
                            (const int *) nullptr, last.get(), fixup.get(), scale, s.max_bias, m0, m1, n_head_log2,
                            s.softcap, (int32_t) D, init_fastdiv_values(s.n_q), (int32_t) s.n_head, (int32_t) 1,
                            (int32_t) s.q_nb1, (int32_t) s.q_nb2, (int32_t) 0, (int32_t) D, (int32_t) s.n_tok,
                            (int32_t) s.n_head_kv, (int32_t) 1, (int32_t) s.k_nb1, (int32_t) s.k_nb2, (int64_t) 0,
                            (int32_t) s.v_nb1, (int32_t) s.v_nb2, (int64_t) 0, (int32_t) s.n_q, (int32_t) 1,
                            (int32_t) 1, (int32_t) s.mask_nb1, (int32_t) 0, (int64_t) 0);
    CUDA_CHECK(cudaGetLastError());
    merge_slice<D, ncols1, ncols2><<<dim3(tiles, ncols1, ncols2), D, 0, ctx.stream()>>>(
        last.get(), fixup.get(), s.dst, s.state, s.sinks, s.n_q, s.n_head, blocks, per_tile, gqa, tiles_q, tiles_gqa,
        s.first, s.last);
    CUDA_CHECK(cudaGetLastError());
}

template <int D, int ncols1, int ncols2> void launch_slice(ggml_backend_cuda_context & ctx, const pytq_cuda_slice & s) {
    if constexpr (D == 128 || D == 256) { // upstream compiles the soft-cap for these only
        if (s.softcap != 0.0f) {
            launch_slice<D, ncols1, ncols2, true>(ctx, s);
            return;
        }
    }
    GGML_ASSERT(s.softcap == 0.0f);
    launch_slice<D, ncols1, ncols2, false>(ctx, s);
}

} // namespace

template <> void pytq_cuda_slice_attention<PYTQ_D>(ggml_backend_cuda_context & ctx, const pytq_cuda_slice & s) {
    const int gqa = s.n_head / s.n_head_kv;
    if (s.gqa && gqa > 4) {
        launch_slice<PYTQ_D, 8, 8>(ctx, s);
    } else if (s.gqa && gqa > 2) {
        launch_slice<PYTQ_D, 16, 4>(ctx, s);
    } else if (s.gqa && gqa > 1) {
        launch_slice<PYTQ_D, 32, 2>(ctx, s);
    } else {
        launch_slice<PYTQ_D, 64, 1>(ctx, s);
    }
}

// Host side of attention-prefill.cuh.
#pragma once

#include "attention-prefill.cuh"

namespace pytq {

// p as a caller sets it, after prefill_plan(); with several splits p.meta must be given prefill_part_rows() pairs and
// p.part as many rows of floats.
template <int KT, int VT, int STAGES = 2>
cudaError_t prefill_launch(const prefill_params & p, int device, cudaStream_t stream) {
    using S = prefill_shape<type<KT>, type<VT>, STAGES>;
    const auto kernel = attention_prefill<KT, VT, STAGES>;
    constexpr int MAX_DEVICES = 64;
    static bool granted[MAX_DEVICES] = {};
    if (device >= MAX_DEVICES || !granted[device]) {
        const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::bytes);
        if (e != cudaSuccess) {
            return e;
        }
        if (device < MAX_DEVICES) {
            granted[device] = true;
        }
    }
    const dim3 grid((unsigned) p.n_splits, (unsigned) ((p.n_rows + prefill_rows - 1) / prefill_rows),
                    (unsigned) (p.n_head_kv * p.n_seq));
    kernel<<<grid, S::threads, S::bytes, stream>>>(p);
    cudaError_t e = cudaGetLastError();
    if (e == cudaSuccess && p.n_splits > 1) {
        const dim3 rows((unsigned) ((p.n_rows + prefill_join_warps - 1) / prefill_join_warps), (unsigned) p.n_head_kv,
                        (unsigned) p.n_seq);
        attention_prefill_join<type<KT>::d><<<rows, 32 * prefill_join_warps, 0, stream>>>(p);
        e = cudaGetLastError();
    }
    return e;
}

} // namespace pytq

// Blocks back to numbers: get_rows, copies to f32 and f16, and the bounded f16 slices that prefill attention reads.
#pragma once

#include "device.cuh"
#include "encode.cuh"

namespace pytq {

struct values_params {
    const char * src;  // blocks [blocks_per_row, n1, n2, n3]
    const char * rows; // i32 row numbers [n1, n2, n3] of src, or null: row i comes from row i
    char * dst;        // [d * blocks_per_row, n1, n2, n3]
    long long src_nb1, src_nb2, src_nb3, rows_nb0, rows_nb1, rows_nb2, dst_nb1, dst_nb2, dst_nb3;
    int n1, n2, n3, blocks_per_row;
    layout l;
};

// Eight values; rows need not be aligned to more than a value.
PYTQ_DEV void store_values(float * at, const float v[8]) {
    if ((uintptr_t) at % 16 == 0) {
        ((float4 *) at)[0] = make_float4(v[0], v[1], v[2], v[3]);
        ((float4 *) at)[1] = make_float4(v[4], v[5], v[6], v[7]);
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            at[i] = v[i];
        }
    }
}
PYTQ_DEV void store_values(__half * at, const float v[8]) {
    if ((uintptr_t) at % 16 == 0) {
        union {
            __half h[8];
            uint4 u;
        } x;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            x.h[i] = __float2half_rn(v[i]);
        }
        *(uint4 *) at = x.u;
    } else {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            at[i] = __float2half_rn(v[i]);
        }
    }
}

// Every type; one thread per 8 coordinates. Values are the reference's to the bit in f32.
template <int CODE, class OUT> __global__ void __launch_bounds__(256) decode_values(const values_params p) {
    __shared__ float level[6][PYTQ_MAX_LEVELS];
    if (threadIdx.x < PYTQ_MAX_LEVELS) {
#pragma unroll
        for (int b = 1; b < 6; b++) {
            with_bits<0>(b, level_call<CODE>{(int) threadIdx.x, &level[b][threadIdx.x]});
        }
    }
    __syncthreads();
    const int per_block = p.l.d / 8;
    const long long n_items = (long long) per_block * p.blocks_per_row * p.n1 * p.n2 * p.n3;
    for (long long item = (long long) blockIdx.x * blockDim.x + threadIdx.x; item < n_items;
         item += (long long) gridDim.x * blockDim.x) {
        const int byte = (int) (item % per_block);
        long long rest = item / per_block;
        const int ib = (int) (rest % p.blocks_per_row);
        rest /= p.blocks_per_row;
        const int i1 = (int) (rest % p.n1);
        rest /= p.n1;
        const int i2 = (int) (rest % p.n2), i3 = (int) (rest / p.n2);
        const long long row =
            p.rows ? *(const int *) (p.rows + i1 * p.rows_nb0 + i2 * p.rows_nb1 + i3 * p.rows_nb2) : i1;
        const uint8_t * const block = (const uint8_t *) p.src + row * p.src_nb1 + i2 * p.src_nb2 + i3 * p.src_nb3 +
                                      (long long) ib * p.l.block_bytes;
        OUT * const out =
            (OUT *) (p.dst + i1 * p.dst_nb1 + i2 * p.dst_nb2 + i3 * p.dst_nb3) + (long long) ib * p.l.d + 8 * byte;

        const int grp = (8 * byte >= p.l.group_end[0]) + (p.l.n_groups > 1 && 8 * byte >= p.l.group_end[1]);
        const int bits = p.l.group_bits[grp];
        float step = 0.0f, scale;
        if constexpr (CODE == PYTQ_CODE_TRELLIS) {
            with_bits<0>(bits, step_call<CODE>{&step});
            scale = log8_scale(block[grp]);
        } else {
            with_bits<0>(bits, step_call<CODE>{&step});
            scale = half_bits(block[0] | block[1] << 8);
        }
        const float factor = __fmul_rn(scale, step);

        float value[8];
        uint32_t plane[5];
#pragma unroll
        for (int b = 0; b < 5; b++) {
            plane[b] = b < bits ? block[p.l.plane_off[b] + byte] : 0u;
        }
        if constexpr (CODE == PYTQ_CODE_TRELLIS) {
            const uint32_t u = plane[0] << 8 | (byte > 0 ? block[p.l.plane_off[0] + byte - 1] : 0u);
            const uint32_t z1 = (u ^ u << 5 ^ u << 6) >> 8, z0 = (u << 2 ^ u << 4) >> 8;
#pragma unroll
            for (int t = 0; t < 8; t++) {
                const int i = (int) (4 * ((plane[1] >> t & 1u) | (plane[2] >> t & 1u) << 1 | (plane[3] >> t & 1u) << 2 |
                                          (plane[4] >> t & 1u) << 3) +
                                     2 * (z1 >> t & 1u) + (z0 >> t & 1u));
                value[t] = __fmul_rn(factor, level[bits][i]);
            }
        } else {
#pragma unroll
            for (int t = 0; t < 8; t++) {
                const int i = (int) ((plane[0] >> t & 1u) | (plane[1] >> t & 1u) << 1 | (plane[2] >> t & 1u) << 2 |
                                     (plane[3] >> t & 1u) << 3 | (plane[4] >> t & 1u) << 4);
                value[t] = __fmul_rn(factor, level[bits][i]);
            }
        }
        store_values(out, value);
    }
}

// f16 slice of a type with one group and d a multiple of 32: one thread per 32 coordinates, a warp's 2 KiB of output go
// through shared memory so that every store fills whole cache lines. Output [d, n_tok, n_head], packed. The scale is
// applied in half precision (error below 2^-10 of a value).
struct slice_params {
    const char * src; // first token of the slice
    __half * dst;
    long long src_nb1, src_nb2;
    int n_tok, n_head;
};

constexpr int slice_threads = 256;
template <int ID> dim3 slice_grid(const slice_params & p) {
    const int items = p.n_tok * (type<ID>::d / 32);
    return dim3((unsigned) ((items + slice_threads - 1) / slice_threads), (unsigned) p.n_head);
}

template <int ID> __global__ void __launch_bounds__(slice_threads) decode_slice(const slice_params p) {
    using T = type<ID>;
    constexpr int WORDS = T::d / 32, NB = index_bits(T::code, T::bits);
    static_assert(T::n_groups == 1 && T::d % 32 == 0, "whole words per plane");
    __shared__ uint4 staged[slice_threads * 4];
    grid_wait();
    const int item = blockIdx.x * slice_threads + threadIdx.x, n_items = p.n_tok * WORDS, lane = threadIdx.x & 31;
    const int warp_units = (threadIdx.x - lane) * 4; // of 16 bytes, as everything below
    if (item < n_items) {
        const int w = item % WORDS, t = item / WORDS;
        const char * const block = p.src + t * p.src_nb1 + blockIdx.y * p.src_nb2;
        const char * const at = block + T::data_off + 4 * w;
        const uint32_t s = ((uint32_t) (uintptr_t) at & 3u) * 8;
        const uint32_t * const word = (const uint32_t *) ((uintptr_t) at & ~(uintptr_t) 3);
        uint32_t plane[T::bits], index[NB], lev[8];
#pragma unroll
        for (int b = 0; b < T::bits; b++) {
            plane[b] = shift_pair(word[b * WORDS], s ? word[b * WORDS + 1] : 0u, s);
        }
        uint32_t prev = 0;
        if (T::code == PYTQ_CODE_TRELLIS && w > 0) {
            prev = (uint32_t) *(const uint8_t *) (at - 1) << 24;
        }
        index_planes<T::code, T::bits, true>(plane, prev, index);
        level_table<T::code, T::bits> table;
        table.init();
        levels32<T::code, T::bits>(table, index, lev);
        float scale;
        if constexpr (T::scale_bytes == 1) {
            scale = log8_scale(*(const uint8_t *) block);
        } else {
            scale = half_bits(*(const uint8_t *) block | *(const uint8_t *) (block + 1) << 8);
        }
        const __half2 factor = __float2half2_rn(scale * book<T::code, T::bits>::step() * 128.0f);
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint32_t a = permute(lev[half], lev[2 + half], 0x5140),
                           b = permute(lev[4 + half], lev[6 + half], 0x5140);
            const uint32_t c = permute(lev[half], lev[2 + half], 0x7362),
                           d = permute(lev[4 + half], lev[6 + half], 0x7362);
            const uint32_t quad[4] = {permute(a, b, 0x5410), permute(a, b, 0x7632), permute(c, d, 0x5410),
                                      permute(c, d, 0x7632)};
            uint32_t r[8];
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const uint32_t x = quad[n] ^ 0x80808080u; // level + 128
#pragma unroll
                for (int k = 0; k < 2; k++) {
                    union {
                        uint32_t u;
                        __half2 h;
                    } v;
                    v.u = permute(x, 0x64646464u, k == 0 ? 0x4140 : 0x4342); // 1024 + level + 128
                    v.h = __hfma2(v.h, __float2half2_rn(1.0f / 128.0f), __float2half2_rn(-9.0f));
                    v.h = __hmul2(v.h, factor);
                    r[2 * n + k] = v.u;
                }
            }
            // units of a lane are swizzled so that neither side meets a bank twice
            const int to = warp_units + 4 * lane, turn = lane >> 1 & 3;
            staged[to + ((2 * half) ^ turn)] = make_uint4(r[0], r[1], r[2], r[3]);
            staged[to + ((2 * half + 1) ^ turn)] = make_uint4(r[4], r[5], r[6], r[7]);
        }
    }
    grid_trigger();
#if defined(__HIPCC__)
    __syncthreads();
#else
    __syncwarp();
#endif
    uint4 * const out = (uint4 *) (p.dst + (long long) blockIdx.y * p.n_tok * T::d);
    const int first = (blockIdx.x * slice_threads + (threadIdx.x - lane)) * 4, end = 4 * n_items;
#pragma unroll
    for (int round = 0; round < 4; round++) {
        const int unit = 32 * round + lane, from = unit >> 2;
        if (first + unit < end) {
            out[first + unit] = staged[warp_units + 4 * from + ((unit & 3) ^ (from >> 1 & 3))];
        }
    }
}

} // namespace pytq

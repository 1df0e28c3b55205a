// Attention of a few query rows over a compressed cache: int8 tensor cores straight from bit planes.
//
//   grid   (splits of the sequence, KV head groups x row tiles, sequences)
//   block  one warp per (KV head of the group, 64-token slice of the tile); two shared-memory stages of whole cache
//   rows tile   64 tokens per warp:
//            logits   S[token, row] = K[token, dim] q[dim, row]      m16n8k32, K is the A operand
//            softmax  on the accumulators, every (token, row) once in the warp
//            output   O[dim, row]  += V[dim, token] P[token, row]    m16n8k16, V transposed is the A operand
//
// A warp's 8 columns are 4 query rows twice: the high and the low byte of a 16-bit fixed-point q (and P), so the
// integer product costs no accuracy that could be seen next to the cache's own error. P is scaled per 64 tokens by its
// largest value times V's scale, so small weights beside an attention sink keep 16 bits of their own.
//
// K: lane (g, j) of an A fragment owns rows g and g + 8 and 4 consecutive k per register. Since q may be permuted like
// K, lane j takes coordinates 32 j .. 32 j + 31 of its two tokens: one word per bit plane, decoded in registers. V:
// lane (g, j) owns dims of row g and g + 8 and 4 tokens per register: it decodes 16 coordinates (half words) of 4
// tokens and interleaves the tokens' bits by nibbles before the look-up, so one permute yields 4 tokens of one
// coordinate.
//
// Integer operations per value (kv3): K 2.1, V 2.7. An H100 has 132 x 64 integer lanes: 65536 tokens x 8 heads x 128 x
// 2 values need about 22 us of a layer; reading them needs 17 us.
#pragma once

#include "device.cuh"

namespace pytq {

struct decode_params {
    const char * q; // f32 [d, n_q, n_head, n_seq]
    const char * k; // blocks [n_kv, n_head_kv, n_seq]
    const char * v;
    const char * mask; // f16 [n_kv, n_q, 1, n_seq_mask] or null
    float * part;      // unnormalised outputs [seq][head_kv][row][part][d]
    float2 * meta;     // (reference exponent, sum) [seq][head_kv][row][part]
    long long q_nb1, q_nb2, q_nb3, k_nb1, k_nb2, k_nb3, v_nb1, v_nb2, v_nb3, mask_nb1, mask_nb3;
    int n_kv, n_q, n_head_kv, gqa, n_rows, n_seq_mask;
    int heads_per_block, warps_per_head, n_splits, n_parts, row_tiles;
    int k_slot, v_slot; // bytes between tokens in shared memory; equal to nb1 when rows are copied as one range
    float scale, softcap, max_bias, m0, m1;
    int n_head_log2;
};

constexpr int decode_tile = 64; // tokens per warp and tile

// Bytes between tokens in shared memory for blocks of one head group; contiguous rows are copied as they are.
inline int decode_slot_bytes(long long nb1, int segment) {
    if (nb1 - segment >= 0 && nb1 - segment < 32 && nb1 % 4 == 0) {
        return (int) nb1;
    }
    const int need = segment + 30;
    return need + (int) (((nb1 - need) % 16 + 16) % 16);
}

PYTQ_HD inline int decode_stage_bytes(int slot, int tokens) {
    return (slot * tokens + 64 + 15) / 16 * 16;
}

// Dynamic shared memory of a block.
inline int decode_shared_bytes(int k_slot, int v_slot, int warps, int tokens) {
    return 2 * (decode_stage_bytes(k_slot, tokens) + decode_stage_bytes(v_slot, tokens)) + warps * 8 * 20 * 4 +
           2 * 4 * 2 * tokens;
}

#if !defined(__HIPCC__) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)
#define PYTQ_HAVE_MMA 1
#endif

#ifdef PYTQ_HAVE_MMA

PYTQ_DEV void mma_s8s8_k32(int c[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

PYTQ_DEV void mma_s8u8_k16(int c[4], uint32_t a0, uint32_t a1, uint32_t b0) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a0), "r"(a1), "r"(b0));
}

PYTQ_DEV void copy16_async(void * dst, const void * src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32_t) __cvta_generic_to_shared(dst)), "l"(src));
}

PYTQ_DEV void copy_commit() {
    asm volatile("cp.async.commit_group;");
}
PYTQ_DEV void copy_wait_all() {
    asm volatile("cp.async.wait_group 0;");
}

PYTQ_DEV float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}

// Copies the blocks of n_tok tokens (segment bytes each) from src, 16 aligned bytes at a time. Token t's first byte
// lands at dst + (src & 15) + t * slot.
PYTQ_DEV void load_tile(char * dst, const char * src, long long nb1, int slot, int segment, int n_tok, int tid,
                        int n_threads) {
    const int lead = (int) ((uintptr_t) src & 15);
    if (slot == nb1) {
        const int chunks = (lead + (n_tok - 1) * slot + segment + 15) >> 4;
        const char * from = src - lead;
        for (int c = tid; c < chunks; c += n_threads) {
            copy16_async(dst + 16 * c, from + 16 * c);
        }
    } else {
        const int per_row = (segment + 30) >> 4;
        for (int i = tid; i < n_tok * per_row; i += n_threads) {
            const int r = i / per_row, c = i - r * per_row;
            const char * row = src + r * nb1;
            const int off = (int) ((uintptr_t) row & 15);
            if (16 * c < off + segment) {
                copy16_async(dst + lead + r * slot - off + 16 * c, row - off + 16 * c);
            }
        }
    }
}

// Shared memory is addressed by 32-bit offsets: a pointer rounded down to a word would lose its address space.
extern __shared__ __align__(16) char decode_smem[];

PYTQ_DEV uint32_t shared_word(int at) {
    return *(const uint32_t *) (decode_smem + at);
}
PYTQ_DEV uint32_t shared_byte(int at) {
    return *(const uint8_t *) (decode_smem + at);
}

// Scale of the block at this offset.
template <class T> PYTQ_DEV float block_scale(int at) {
    if constexpr (T::scale_bytes == 1) {
        return log8_scale(shared_byte(at));
    } else {
        return half_bits(shared_byte(at) | shared_byte(at + 1) << 8);
    }
}

// log2 of the scale of a block, at least -40: a zero scale then adds 2^-40 of a level, far below every rounding.
template <class T> PYTQ_DEV float block_log2_scale(int at) {
    if constexpr (T::scale_bytes == 1) {
        const int e = (int) shared_byte(at);
        return e == 0 ? -40.0f : (float) (e - PYTQ_LOG8_BIAS) * 0.125f;
    } else {
        return fmaxf(__log2f(half_bits(shared_byte(at) | shared_byte(at + 1) << 8)), -40.0f);
    }
}

// 32 consecutive bits at any byte offset, for each plane of a type with d = 128.
template <class T> PYTQ_DEV void load_planes(int at, uint32_t plane[T::bits]) {
    const uint32_t s = (uint32_t) at << 3; // the shift counts modulo 32
    const int w = at & ~3;
#pragma unroll
    for (int p = 0; p < T::bits; p++) {
        plane[p] = shift_pair(shared_word(w + p * (T::d / 8)), shared_word(w + p * (T::d / 8) + 4), s);
    }
}

// min_blocks: 2 keeps 16 warps on a multiprocessor
template <int KT, int VT, bool SOFTCAP>
__global__ void __launch_bounds__(256, 2) attention_decode(const decode_params p) {
    using K = type<KT>;
    using V = type<VT>;
    constexpr int D = K::d;
    static_assert(D == 128 && V::d == D && K::n_groups == 1 && V::n_groups == 1, "one group of 128 coordinates");
    constexpr int KB = K::bits, VB = V::bits;
    constexpr int KI = index_bits(K::code, KB), VI = index_bits(V::code, VB);
    constexpr float LOG2E = 1.44269504f, MAGIC = 12582912.0f; // 1.5 * 2^23: int32 sums below 2^22 read as floats
    constexpr int MAGIC_BITS = 0x4b400000;

    char * const smem = decode_smem;

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, j = lane & 3;
    const int n_threads = blockDim.x;
    const int group = blockIdx.y / p.row_tiles, row0 = (blockIdx.y - group * p.row_tiles) * 4;
    const int seq = blockIdx.z;
    const int head_in = warp % p.heads_per_block, slice = warp / p.heads_per_block;
    const int head_kv = group * p.heads_per_block + head_in;
    const int tile_tokens = decode_tile * p.warps_per_head;

    const int k_seg = (int) ((p.heads_per_block - 1) * p.k_nb2) + K::block_bytes;
    const int v_seg = (int) ((p.heads_per_block - 1) * p.v_nb2) + V::block_bytes;
    const int k_stage = decode_stage_bytes(p.k_slot, tile_tokens), v_stage = decode_stage_bytes(p.v_slot, tile_tokens);
    uint32_t * const weights = (uint32_t *) (smem + 2 * (k_stage + v_stage) +
                                             warp * (8 * 20 * 4)); // P of this warp: [column][slot of 4 tokens]

    const char * const k_base = p.k + seq * p.k_nb3 + (long long) group * p.heads_per_block * p.k_nb2;
    const char * const v_base = p.v + seq * p.v_nb3 + (long long) group * p.heads_per_block * p.v_nb2;

    // Tiles of this split.
    const int n_tiles = (p.n_kv + tile_tokens - 1) / tile_tokens;
    const int tile_begin = (int) ((long long) n_tiles * blockIdx.x / p.n_splits);
    const int tile_end = (int) ((long long) n_tiles * (blockIdx.x + 1) / p.n_splits);

    // Mask rows of this block's 4 query rows, per stage: [row][token] f16.
    char * const mask_smem = smem + 2 * (k_stage + v_stage) + (n_threads >> 5) * (8 * 20 * 4);
    const bool mask_aligned =
        ((uintptr_t) p.mask | (uintptr_t) p.mask_nb1 | (uintptr_t) p.mask_nb3) % 16 == 0 && p.n_kv % 8 == 0;
    auto load = [&](int tile, int stage) {
        const long long t0 = (long long) tile * tile_tokens;
        const int n_tok = min(tile_tokens, p.n_kv - (int) t0);
        char * const base = smem + stage * (k_stage + v_stage);
        if (p.mask) {
            const char * const rows = p.mask + (seq % p.n_seq_mask) * p.mask_nb3 + 2 * t0;
            char * const to = mask_smem + stage * (4 * 2 * tile_tokens);
            const int per = mask_aligned ? 8 : 1, items = 4 * tile_tokens / per;
            for (int c = threadIdx.x; c < items; c += n_threads) {
                const int row = c / (tile_tokens / per), t = (c - row * (tile_tokens / per)) * per;
                const char * const from = rows + min(row0 + row, p.n_rows - 1) / p.gqa * p.mask_nb1 + 2 * t;
                if (t < n_tok) {
                    if (mask_aligned) {
                        copy16_async(to + 2 * (row * tile_tokens + t), from);
                    } else {
                        *(__half *) (to + 2 * (row * tile_tokens + t)) = *(const __half *) from;
                    }
                }
            }
        }
        load_tile(base, k_base + t0 * p.k_nb1, p.k_nb1, p.k_slot, k_seg, n_tok, threadIdx.x, n_threads);
        load_tile(base + k_stage, v_base + t0 * p.v_nb1, p.v_nb1, p.v_slot, v_seg, n_tok, threadIdx.x, n_threads);
    };
    // The query is read first: behind the first tile of every block it would wait for all of them.
    float x[32];
    {
        const int r = row0 + (g & 3);
        const char * src = p.q + seq * p.q_nb3 + (r / p.gqa) * p.q_nb1 + (head_kv * p.gqa + r % p.gqa) * p.q_nb2;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float4 f = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            if (r < p.n_rows) {
                f = *(const float4 *) (src + 128 * j + 16 * i);
            }
            x[4 * i] = f.x, x[4 * i + 1] = f.y, x[4 * i + 2] = f.z, x[4 * i + 3] = f.w;
        }
    }
    if (tile_begin < tile_end) {
        load(tile_begin, 0);
    }
    copy_commit();

    // Query: row g & 3 in 16-bit fixed point, its high bytes in columns 0..3, low bytes in 4..7.
    uint32_t qb[8];
    float row_factor[2]; // of rows 2 (j & 1) + {0, 1}: logits in units of log2
    float slope[2];
    {
        float m = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            m = fmaxf(m, fabsf(x[i]));
        }
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
        const float inv = m > 0.0f ? 32512.0f / m : 0.0f;
        int b[32];
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const int v = __float2int_rn(x[i] * inv), hi = (v + 128) >> 8;
            b[i] = g < 4 ? hi : v - 256 * hi;
        }
#pragma unroll
        for (int s = 0; s < 4; s++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t w = 0;
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    w |= (uint32_t) (b[16 * h + 4 * n + s] & 255) << (8 * n);
                }
                qb[2 * s + h] = w;
            }
        }
        const float f =
            m * (1.0f / 32512.0f) * p.scale * book<K::code, KB>::step() * (SOFTCAP ? 1.0f / p.softcap : LOG2E);
#pragma unroll
        for (int rr = 0; rr < 2; rr++) {
            const int row = 2 * (j & 1) + rr;
            row_factor[rr] = __shfl_sync(0xffffffffu, f, 4 * row + j);
            const int rq = min(row0 + row, p.n_rows - 1), head = head_kv * p.gqa + rq % p.gqa;
            slope[rr] = LOG2E;
            if (p.max_bias > 0.0f) {
                slope[rr] *= head < p.n_head_log2 ? powf(p.m0, (float) (head + 1))
                                                  : powf(p.m1, (float) (2 * (head - p.n_head_log2) + 1));
            }
        }
    }

    level_table<K::code, KB> k_table;
    level_table<V::code, VB> v_table;
    k_table.init();
    if constexpr (K::code == V::code && KB == VB) {
        v_table = k_table;
    } else {
        v_table.init();
    }

    float o[8][4];
    float top[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int m = 0; m < 8; m++) {
        o[m][0] = o[m][1] = o[m][2] = o[m][3] = 0.0f;
    }

    // Tokens of A rows: row g of sub-tile i, half h. Chosen so that the 8 rows of a fragment fall into different banks.
    auto token_of = [&](int i, int half, int row) { return 16 * i + 2 * row + half; };

    for (int tile = tile_begin; tile < tile_end; tile++) {
        const int stage = (tile - tile_begin) & 1;
        copy_wait_all();
        __syncthreads();
        if (tile + 1 < tile_end) {
            load(tile + 1, stage ^ 1);
        }
        copy_commit();

        const int t0 = tile * tile_tokens + slice * decode_tile;
        const int n_valid = p.n_kv - t0;
        const int kt = stage * (k_stage + v_stage) +
                       (int) ((uintptr_t) (k_base + (long long) tile * tile_tokens * p.k_nb1) & 15) +
                       slice * decode_tile * p.k_slot + head_in * (int) p.k_nb2;
        const int vt = stage * (k_stage + v_stage) + k_stage +
                       (int) ((uintptr_t) (v_base + (long long) tile * tile_tokens * p.v_nb1) & 15) +
                       slice * decode_tile * p.v_slot + head_in * (int) p.v_nb2;

        // Mask of this lane's 4 tokens and 2 rows; tokens past the end count as masked.
        const char * const mask_tile = mask_smem + stage * (4 * 2 * tile_tokens) + 2 * slice * decode_tile;
        float bias[4][2];
        bool any = false;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int t = token_of(i, j >> 1, g);
#pragma unroll
            for (int rr = 0; rr < 2; rr++) {
                float b = -INFINITY;
                if (t < n_valid) {
                    b = p.mask ? __half2float(
                                     *(const __half *) (mask_tile + 2 * (2 * (j & 1) + rr) * tile_tokens + 2 * t)) *
                                     slope[rr]
                               : 0.0f;
                }
                bias[i][rr] = b;
                any |= b > -INFINITY;
            }
        }
        if (!__any_sync(0xffffffffu, any)) {
            continue;
        }

        // Logits.
        float logit[4][2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int acc[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
            uint32_t a[2][8];
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int block = kt + token_of(i, half, g) * p.k_slot;
                uint32_t plane[KB], index[KI];
                load_planes<K>(block + K::data_off + 4 * j, plane);
                uint32_t prev = 0;
                if constexpr (K::code == PYTQ_CODE_TRELLIS) {
                    prev = __shfl_up_sync(0xffffffffu, plane[0], 1);
                    prev = j == 0 ? 0u : prev;
                }
                index_planes<K::code, KB, true>(plane, prev, index);
                levels32<K::code, KB>(k_table, index, a[half]);
            }
#pragma unroll
            for (int s = 0; s < 4; s++) {
                mma_s8s8_k32(acc, a[0][2 * s], a[1][2 * s], a[0][2 * s + 1], a[1][2 * s + 1], qb[2 * s], qb[2 * s + 1]);
            }
            // Lanes j < 2 hold the high bytes' products, lanes j >= 2 the low bytes'; afterwards each lane has both for
            // one token.
            const float scale = block_scale<K>(kt + token_of(i, j >> 1, g) * p.k_slot);
#pragma unroll
            for (int rr = 0; rr < 2; rr++) {
                const float first = __int_as_float(acc[rr]) - MAGIC, second = __int_as_float(acc[2 + rr]) - MAGIC;
                const float other = __shfl_xor_sync(0xffffffffu, j < 2 ? second : first, 2);
                const float dot = j < 2 ? fmaf(first, 256.0f, other) : fmaf(other, 256.0f, second);
                float s = dot * (scale * row_factor[rr]);
                if constexpr (SOFTCAP) {
                    s = p.softcap * LOG2E * tanhf(s);
                }
                logit[i][rr] = bias[i][rr] > -INFINITY ? s + bias[i][rr] : -INFINITY;
            }
        }

        // Softmax and fixed-point weights. u = logit + log2(scale of V): weights are quantised with V's scale in them.
        float lv[4], beta[2];
        bool grew = false;
        float alpha[2];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            lv[i] = block_log2_scale<V>(vt + token_of(i, j >> 1, g) * p.v_slot);
        }
#pragma unroll
        for (int rr = 0; rr < 2; rr++) {
            float m = -1e30f;
            float u[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u[i] = logit[i][rr] + lv[i];
                m = fmaxf(m, u[i]);
            }
            m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
            m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 4));
            m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 8));
            m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 16));
            const float top_new = fmaxf(top[rr], m);
            alpha[rr] = exp2_fast(top[rr] - top_new);
            grew |= alpha[rr] != 1.0f;
            beta[rr] = exp2_fast(m - top_new) * (j < 2 ? 256.0f / 65280.0f : 1.0f / 65280.0f);
            top[rr] = top_new;
            uint32_t w[4];
            float l = 0.0f;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                l += exp2_fast(logit[i][rr] - top_new);
                w[i] = as_uint(fmaf(exp2_fast(u[i] - m), 65280.0f, 8388608.0f));
            }
            sum[rr] = fmaf(sum[rr], alpha[rr], l);
            const uint32_t w01 = permute(w[0], w[1], 0x5140), w23 = permute(w[2], w[3], 0x5140);
            uint32_t * const dst = weights + (2 * (j & 1) + rr) * 20 + 8 * (j >> 1) + g;
            dst[0] = permute(w01, w23, 0x7632);      // high bytes
            dst[4 * 20] = permute(w01, w23, 0x5410); // low bytes
        }
        __syncwarp();

        // Output.
        int acc[8][4];
#pragma unroll
        for (int m = 0; m < 8; m++) {
            acc[m][0] = acc[m][1] = acc[m][2] = acc[m][3] = MAGIC_BITS;
        }
#pragma unroll
        for (int quarter = 0; quarter < 4; quarter++) {
            const uint32_t b0 = weights[g * 20 + 4 * quarter + j];
            uint32_t pair[2][VI]; // index planes of tokens (0, 2) and (1, 3): bytes A0 B0 A1 B1
#pragma unroll
            for (int h = 0; h < 2; h++) {
                uint32_t win[2][VI];
#pragma unroll
                for (int n = 0; n < 2; n++) {
                    const int t = token_of(h + 2 * n, quarter >> 1, 4 * (quarter & 1) + j);
                    // the window's upper half is this lane's 16 coordinates, the lower half the 16 before
                    const int at = vt + t * p.v_slot + V::data_off + 2 * g - 2;
                    uint32_t plane[VB];
                    load_planes<V>(at, plane);
                    if constexpr (V::code == PYTQ_CODE_TRELLIS) {
                        plane[0] = g == 0 ? plane[0] & 0xffff0000u : plane[0];
                    }
                    index_planes<V::code, VB, false>(plane, 0u, win[n]);
                }
#pragma unroll
                for (int b = 0; b < VI; b++) {
                    pair[h][b] = permute(win[0][b], win[1][b], 0x7362);
                }
            }
#pragma unroll
            for (int unit = 0; unit < 2;
                 unit++) { // low, high nibbles of the bytes: coordinates 4 unit + k and 8 + 4 unit + k
                uint32_t index[VI], lev[8];
#pragma unroll
                for (int b = 0; b < VI; b++) {
                    index[b] = unit == 0 ? blend(0x0f0f0f0fu, pair[0][b], pair[1][b] << 4)
                                         : blend(0x0f0f0f0fu, pair[0][b] >> 4, pair[1][b]);
                }
                levels32<V::code, VB>(v_table, index, lev);
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    mma_s8u8_k16(acc[4 * unit + k], lev[2 * k], lev[2 * k + 1], b0);
                }
            }
        }
        if (__any_sync(0xffffffffu, grew)) {
#pragma unroll
            for (int m = 0; m < 8; m++) {
                o[m][0] *= alpha[0], o[m][1] *= alpha[1], o[m][2] *= alpha[0], o[m][3] *= alpha[1];
            }
        }
#pragma unroll
        for (int m = 0; m < 8; m++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                o[m][c] = fmaf(__int_as_float(acc[m][c]) - MAGIC, beta[c & 1], o[m][c]);
            }
        }
        __syncwarp();
    }

    // Join the two halves of the fixed point; afterwards each lane has 16 dims of one row.
    float out[16];
#pragma unroll
    for (int m = 0; m < 8; m++) {
        const int unit = m >> 2, k = m & 3;
        const float lo_a = __shfl_xor_sync(0xffffffffu, j < 2 ? o[m][1] : o[m][0], 2);
        const float lo_b = __shfl_xor_sync(0xffffffffu, j < 2 ? o[m][3] : o[m][2], 2);
        out[4 * unit + k] = (j < 2 ? o[m][0] : o[m][1]) + lo_a;
        out[8 + 4 * unit + k] = (j < 2 ? o[m][2] : o[m][3]) + lo_b;
    }
#pragma unroll
    for (int rr = 0; rr < 2; rr++) {
        sum[rr] += __shfl_xor_sync(0xffffffffu, sum[rr], 2);
        sum[rr] += __shfl_xor_sync(0xffffffffu, sum[rr], 4);
        sum[rr] += __shfl_xor_sync(0xffffffffu, sum[rr], 8);
        sum[rr] += __shfl_xor_sync(0xffffffffu, sum[rr], 16);
    }
    const int row = row0 + 2 * (j & 1) + (j >> 1);
    if (row < p.n_rows) {
        const long long at = (((long long) seq * p.n_head_kv + head_kv) * p.n_rows + row) * p.n_parts +
                             blockIdx.x * p.warps_per_head + slice;
        float4 * const dst = (float4 *) (p.part + at * D + 16 * g);
        constexpr float step = book<V::code, VB>::step();
#pragma unroll
        for (int i = 0; i < 4; i++) {
            dst[i] =
                make_float4(out[4 * i] * step, out[4 * i + 1] * step, out[4 * i + 2] * step, out[4 * i + 3] * step);
        }
        if (g == 0) {
            p.meta[at] = make_float2(j < 2 ? top[0] : top[1], j < 2 ? sum[0] : sum[1]);
        }
    }
}

// Joins the parts of one row: grid (D / 32, rows, head_kv x seq), 256 threads: 8 lanes of 4 dims x 32 groups of parts.
template <int D>
__global__ void __launch_bounds__(256)
    attention_combine(const float * part, const float2 * meta, const float * sinks, char * dst, int n_parts, int n_rows,
                      int n_head_kv, int gqa, int n_q) {
    __shared__ float4 acc_s[32][8];
    __shared__ float sum_s[32];
    __shared__ float top_s[8];
    const int row = blockIdx.y, head_kv = blockIdx.z % n_head_kv, seq = blockIdx.z / n_head_kv;
    const long long at = (((long long) seq * n_head_kv + head_kv) * n_rows + row) * n_parts;
    const int head = head_kv * gqa + row % gqa, iq = row / gqa;
    const float sink = sinks ? sinks[head] * 1.44269504f : -1e30f;

    float top = sink;
    for (int i = threadIdx.x; i < n_parts; i += 256) {
        top = fmaxf(top, meta[at + i].x);
    }
    for (int s = 16; s > 0; s /= 2) {
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, s));
    }
    if ((threadIdx.x & 31) == 0) {
        top_s[threadIdx.x >> 5] = top;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        top = fmaxf(top, top_s[i]);
    }

    const int sub = threadIdx.x >> 3, quad = threadIdx.x & 7;
    float4 acc = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    float sum = 0.0f;
    const float4 * src = (const float4 *) (part + at * D) + blockIdx.x * 8 + quad;
#pragma unroll 4
    for (int i = sub; i < n_parts; i += 32) {
        const float2 m = meta[at + i];
        const float4 v = src[(long long) i * (D / 4)];
        const float f = exp2f(m.x - top);
        sum = fmaf(m.y, f, sum);
        acc.x = fmaf(v.x, f, acc.x), acc.y = fmaf(v.y, f, acc.y), acc.z = fmaf(v.z, f, acc.z),
        acc.w = fmaf(v.w, f, acc.w);
    }
    acc_s[sub][quad] = acc;
    if (quad == 0) {
        sum_s[sub] = sum;
    }
    __syncthreads();
    if (threadIdx.x < 32) {
        const float * a = (const float *) acc_s;
        float total = sinks ? exp2f(sink - top) : 0.0f, v = 0.0f;
#pragma unroll
        for (int i = 0; i < 32; i++) {
            total += sum_s[i];
            v += a[32 * i + threadIdx.x];
        }
        float * const out = (float *) dst + (((long long) seq * n_q + iq) * n_head_kv * gqa + head) * D;
        out[blockIdx.x * 32 + threadIdx.x] = total > 0.0f ? v / total : 0.0f;
    }
}

#endif // PYTQ_HAVE_MMA

} // namespace pytq

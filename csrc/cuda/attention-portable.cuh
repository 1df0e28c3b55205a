// Attention over a compressed cache with byte dot products only: every type, head size and number of query rows, on any
// GPU. The path of AMD GPUs, and of NVIDIA GPUs and shapes that the tensor-core kernel does not take.
//
//   portable_query      queries -> int8 words (high and low byte of 15-bit fixed point), one factor per row
//   portable_attention  grid (splits of the sequence, KV heads x row tiles, sequences), block of 128 threads, R rows
//       load     blocks of 128 tokens -> shared memory as they are
//       logits   thread = token: 32 coordinates per step, planes -> levels in registers, dot4 with every row
//       softmax  group of 32 lanes = row, lane = 4 tokens
//       output   thread = 8 coordinates x every S-th quad of tokens: planes -> levels of 4 tokens, dot2 with every row
//   portable_combine    joins the splits of a row
//
// What decided the shape:
//   - A block decodes each K and V once for R rows (all query heads of a KV head, then queries). Integer operations per
//     value for kv3: planes -> byte selectors .84, trellis .2, look-up 1.25; dot4 .5 per row (two bytes of q), V: bytes
//     -> halves 1.25, dot2 .5 per row. Types are run-time parameters: one kernel serves all pairs of K and V.
//   - Words of four values hold the coordinates 8 apart (K) or 4 tokens (V), so one table of byte selectors serves
//   both,
//     and group boundaries (multiples of 8) are byte masks.
//   - The query words are uniform over a wave: scalar loads on AMD, no shared-memory traffic in the inner loop.
//   - Only the softmax exchanges lanes, within groups of 32: a wave of 64 is two groups that know nothing of each
//   other.
//   - Weights are halves relative to 2^14 x their tile's largest, so small ones beside an attention sink keep 11 bits;
//     the reference is a whole power of two: moving to another one is exact.
// f16 and q8_0 operands beside a compressed one are read as they are and multiplied in float32.
#pragma once

#include "device.cuh"

namespace pytq {

enum : int { OPERAND_BLOCKS = 0, OPERAND_F16 = 1, OPERAND_Q8_0 = 2 };

// A layout in few words, because scalar registers are few, too: bytes hold the numbers of a group or plane.
struct portable_layout {
    int code, scale_bytes, n_groups, block_bytes;
    uint32_t ends, bits, offs, last_off; // ends in units of 8 coordinates
    PYTQ_HD int group_end(int g) const { return (int) (ends >> (8 * g) & 255u) * 8; }
    PYTQ_HD int group_bits(int g) const { return (int) (bits >> (8 * g) & 255u); }
    PYTQ_HD int plane_off(int p) const { return (int) (p < 4 ? offs >> (8 * p) & 255u : last_off); }
};

inline portable_layout portable_layout_of(const layout & l) {
    portable_layout out = {l.code, l.scale_bytes, l.n_groups, l.block_bytes, 0, 0, 0, (uint32_t) l.plane_off[4]};
    for (int g = 0; g < PYTQ_MAX_GROUPS; g++) {
        out.ends |= (uint32_t) (l.group_end[g] / 8) << (8 * g);
        out.bits |= (uint32_t) l.group_bits[g] << (8 * g);
    }
    for (int p = 0; p < 4; p++) {
        out.offs |= (uint32_t) l.plane_off[p] << (8 * p);
    }
    return out;
}

struct portable_operand {
    const char * data; // [n_kv, n_head_kv, n_seq]
    long long nb1, nb2, nb3;
    int kind;
    int slot; // words between tokens in shared memory (OPERAND_BLOCKS)
    portable_layout l;
};

struct portable_params {
    const char * q;         // f32 [d, n_q, n_head, n_seq]
    const uint32_t * words; // [seq][head_kv][row][chunk of 32 coordinates][high, low][8]
    const float * factors;  // [seq][head_kv][row]
    const char * mask;      // f16 [n_kv, n_q, mask_ne2, mask_ne3] or null
    const float * sinks;    // [n_head] or null; used when there is one split
    float * dst;            // [d, n_head, n_q, n_seq]
    float * part;           // [seq][head_kv][row][split][d] with more than one split
    float2 * meta;          // (reference exponent, sum), likewise
    portable_operand k, v;
    long long q_nb1, q_nb2, q_nb3, mask_nb1, mask_nb2, mask_nb3;
    int mask_ne2, mask_ne3;
    int n_kv, n_q, n_head_kv, gqa, n_rows, row_tiles, n_splits;
    float scale, softcap, max_bias, m0, m1;
    int n_head_log2;
};

constexpr int portable_tile = 128; // tokens of a tile, threads of a block

// Words between two tokens' blocks: room for misalignment and a window past the end, odd so that neighbours fall into
// different banks.
inline int portable_slot(int block_bytes) {
    return (block_bytes + 3 + 8) / 4 | 1;
}

PYTQ_HD constexpr int portable_chunks(int d) {
    return (d + 31) / 32;
}

// Dynamic shared memory of a block with r rows: the tiles of K and V, logits, weights. The tiles also hold the final
// sum's operands.
inline int portable_shared_bytes(const portable_params & p, int r) {
    const int sets = p.v.kind == OPERAND_BLOCKS ? p.v.l.n_groups : 1;
    const int tiles =
        4 * portable_tile * ((p.k.kind == OPERAND_BLOCKS ? p.k.slot : 0) + (p.v.kind == OPERAND_BLOCKS ? p.v.slot : 0));
    return (tiles > 4096 ? tiles : 4096) + r * portable_tile * 4 + sets * r * portable_tile * 2;
}

extern __shared__ __align__(16) char portable_smem[];

// ------------------------------------------------------------------------------------------------ planes -> levels

// Levels of four values by byte selectors of 3 bits; m[]: merge selectors of the index bits 3, 4, 5.
template <int NB, int BASE> PYTQ_DEV uint32_t lookup_bytes(const uint32_t * table, uint32_t sel, const uint32_t * m) {
    if constexpr (NB <= 3) {
        return permute_bytes(table[BASE / 4], NB < 3 ? 0u : table[BASE / 4 + 1], sel);
    } else {
        const uint32_t lo = lookup_bytes<NB - 1, BASE>(table, sel, m);
        const uint32_t hi = lookup_bytes<NB - 1, BASE + (1 << (NB - 1))>(table, sel, m);
        return permute_bytes(lo, hi, m[NB - 4]);
    }
}

template <int CODE, int BITS, int W> PYTQ_DEV void fill_table(uint32_t * table) {
    table[W] = in_register(book<CODE, BITS>::template word<W>);
    if constexpr (4 * W + 4 < book<CODE, BITS>::n_levels) {
        fill_table<CODE, BITS, W + 1>(table);
    }
}

// Levels of 32 values: byte i of out[m] is the level of the value at bit 8 i + m of the index planes.
template <int CODE, int BITS> PYTQ_DEV void levels_by_bit(const uint32_t * index, uint32_t out[8]) {
    constexpr int NB = index_bits(CODE, BITS);
    uint32_t w[4], table[16];
    selectors(index[0], NB > 1 ? index[1] : 0u, NB > 2 ? index[2] : 0u, w);
    fill_table<CODE, BITS, 0>(table);
#pragma unroll
    for (int m = 0; m < 8; m++) {
        const uint32_t sel = (m < 4 ? w[m] : w[m - 4] >> 4) & 0x07070707u;
        uint32_t upper[3];
#pragma unroll
        for (int b = 3; b < NB; b++) {
            const uint32_t bit = m < 2 ? index[b] << (2 - m) : index[b] >> (m - 2);
            upper[b - 3] = (bit & 0x04040404u) | 0x03020100u;
        }
        out[m] = lookup_bytes<NB, 0>(table, sel, upper);
    }
}

// The same with the code and the number of bits known at run time (uniform over the block). Returns the codebook's
// step.
PYTQ_DEV float levels_of(int code, int bits, const uint32_t * index, uint32_t out[8]) {
#define PYTQ_LEVELS(CODE, BITS)                                                                                        \
    case BITS:                                                                                                         \
        levels_by_bit<CODE, BITS>(index, out);                                                                         \
        return book<CODE, BITS>::step();
    if (code == PYTQ_CODE_TRELLIS) {
        switch (bits) {
            PYTQ_LEVELS(PYTQ_CODE_TRELLIS, 1)
            PYTQ_LEVELS(PYTQ_CODE_TRELLIS, 2)
            PYTQ_LEVELS(PYTQ_CODE_TRELLIS, 3)
            PYTQ_LEVELS(PYTQ_CODE_TRELLIS, 4)
            default:
                PYTQ_LEVELS(PYTQ_CODE_TRELLIS, 5)
        }
    }
    switch (bits) {
        PYTQ_LEVELS(PYTQ_CODE_SCALAR, 2)
        PYTQ_LEVELS(PYTQ_CODE_SCALAR, 3)
        default:
            PYTQ_LEVELS(PYTQ_CODE_SCALAR, 4)
    }
#undef PYTQ_LEVELS
}

// Index planes of four bytes that do not follow each other: each byte of before holds the 8 coded bits before those of
// u.
PYTQ_DEV void trellis_bytes(uint32_t u, uint32_t before, uint32_t index[2]) {
    index[1] = xor3(u, blend(0x1f1f1f1fu, before >> 3, u << 5), blend(0x3f3f3f3fu, before >> 2, u << 6));
    index[0] = blend(0x03030303u, before >> 6, u << 2) ^ blend(0x0f0f0f0fu, before >> 4, u << 4);
}

// ------------------------------------------------------------------------------------------------ shared memory

PYTQ_DEV uint32_t portable_word(int at) {
    return *(const uint32_t *) (portable_smem + at);
}
PYTQ_DEV uint32_t portable_byte(int at) {
    return *(const uint8_t *) (portable_smem + at);
}

// 32 bits at any byte offset.
PYTQ_DEV uint32_t portable_window(int at) {
    return shift_pair(portable_word(at & ~3), portable_word((at & ~3) + 4), (at & 3) * 8);
}

// Offset of token t's block in its word: the low bits of its address, which is all that 32-bit arithmetic keeps.
PYTQ_DEV int portable_lead(const char * base, long long nb1, int t) {
    return (int) (((uint32_t) (uintptr_t) base + (uint32_t) t * (uint32_t) nb1) & 3u);
}

// Aligned words that hold the blocks of n_tok tokens; the block of token t begins at to + 4 slot t + (its address & 3).
PYTQ_DEV void portable_load(int to, const char * first, const portable_operand & o, int n_tok, int tid) {
    const int per = (o.l.block_bytes + 6) >> 2;
    for (int i = tid; i < n_tok * per; i += portable_tile) {
        const int t = i / per, w = i - t * per;
        const char * const block = first + t * o.nb1;
        const char * const word = (const char *) ((uintptr_t) block & ~(uintptr_t) 3) + 4 * w;
        if (word < block + o.l.block_bytes) {
            *(uint32_t *) (portable_smem + to + 4 * (o.slot * t + w)) = *(const uint32_t *) word;
        }
    }
}

PYTQ_DEV float portable_scale(const portable_layout & l, int block, int group) {
    return l.scale_bytes == 1 ? log8_scale(portable_byte(block + group))
                              : half_bits(portable_byte(block) | portable_byte(block + 1) << 8);
}

// log2 of a scale, at least -40: a zero scale then adds 2^-40 of a level, far below every rounding.
PYTQ_DEV float portable_log2_scale(const portable_layout & l, int block, int group) {
    if (l.scale_bytes == 1) {
        const int e = (int) portable_byte(block + group);
        return e == 0 ? -40.0f : (float) (e - PYTQ_LOG8_BIAS) * 0.125f;
    }
    return fmaxf(log2f(half_bits(portable_byte(block) | portable_byte(block + 1) << 8)), -40.0f);
}

// One coordinate of an f16 or q8_0 vector.
PYTQ_DEV float portable_plain(const portable_operand & o, const char * vector, int c) {
    if (o.kind == OPERAND_F16) {
        return half_bits(*(const unsigned short *) (vector + 2 * c));
    }
    const char * const block = vector + c / 32 * 34;
    return half_bits(*(const unsigned short *) block) * (float) *(const int8_t *) (block + 2 + c % 32);
}

// ------------------------------------------------------------------------------------------------ kernels

// Address of a query row: rows are ordered (query, head of the KV head's group).
PYTQ_DEV const float * portable_query_row(const portable_params & p, int seq, int head_kv, int row) {
    return (const float *) (p.q + seq * p.q_nb3 + (row / p.gqa) * p.q_nb1 +
                            (long long) (head_kv * p.gqa + row % p.gqa) * p.q_nb2);
}

// grid (rows / 4), 128 threads: a group of 32 lanes per row of the flat order [seq][head_kv][row].
template <int D> __global__ void __launch_bounds__(portable_tile) portable_query(const portable_params p, int n_seq) {
    constexpr int C = portable_chunks(D);
    const int lane = threadIdx.x & 31;
    const long long flat = (long long) blockIdx.x * 4 + (threadIdx.x >> 5);
    if (flat >= (long long) n_seq * p.n_head_kv * p.n_rows) {
        return;
    }
    const int row = (int) (flat % p.n_rows), head_kv = (int) (flat / p.n_rows % p.n_head_kv);
    const int seq = (int) (flat / p.n_rows / p.n_head_kv);
    const float * const q = portable_query_row(p, seq, head_kv, row);
    float top = 0.0f;
    for (int i = lane; i < D; i += 32) {
        top = fmaxf(top, fabsf(q[i]));
    }
    for (int s = 16; s > 0; s /= 2) {
        top = fmaxf(top, group_xor(top, s));
    }
    const float inv = top > 0.0f ? 32512.0f / top : 0.0f;
    uint32_t * const out = (uint32_t *) p.words + flat * (16 * C);
    for (int w = lane; w < 8 * C; w += 32) {
        const int chunk = w >> 3, m = w & 7;
        uint32_t high = 0, low = 0;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int c = 32 * chunk + 8 * i + m;
            const int x = c < D ? (int) rintf(q[c] * inv) : 0, h = (x + 128) >> 8;
            high |= (uint32_t) (h & 255) << (8 * i);
            low |= (uint32_t) ((x - 256 * h) & 255) << (8 * i);
        }
        out[16 * chunk + m] = high;
        out[16 * chunk + 8 + m] = low;
    }
    if (lane == 0) {
        const float unit = p.scale * (p.softcap != 0.0f ? 1.0f / p.softcap : 1.44269504f);
        ((float *) p.factors)[flat] = p.k.kind == OPERAND_BLOCKS ? unit * top * (1.0f / 32512.0f) : unit;
    }
}

// Products of this thread's token with R rows, in units of the row's factor.
template <int D, int R>
PYTQ_DEV void portable_logits(const portable_params & p, int block, const uint32_t * words, const int row_at[R],
                              float s[R]) {
    constexpr int C = portable_chunks(D);
    const portable_layout & l = p.k.l;
    uint32_t before = 0;
#pragma unroll 1
    for (int chunk = 0, g0 = 0; chunk < C; chunk++) {
        while (l.group_end(g0) <= 32 * chunk) {
            g0++;
        }
        uint32_t index[6];
        const uint32_t u = portable_window(block + l.plane_off(0) + 4 * chunk);
        const int top_bits = l.group_bits(g0);
        if (l.code == PYTQ_CODE_TRELLIS) {
            index_planes<PYTQ_CODE_TRELLIS, 1, true>(&u, before, index);
            before = u;
#pragma unroll
            for (int b = 1; b < 5; b++) {
                index[b + 1] = b < top_bits ? portable_window(block + l.plane_off(b) + 4 * chunk) : 0u;
            }
        } else {
            index[0] = u;
#pragma unroll
            for (int b = 1; b < 5; b++) {
                index[b] = b < top_bits ? portable_window(block + l.plane_off(b) + 4 * chunk) : 0u;
            }
            index[5] = 0;
        }
#pragma unroll 1
        for (int g = g0, begin = 32 * chunk; begin < 32 * chunk + 32 && begin < D; g++) {
            const int end = l.group_end(g) < 32 * chunk + 32 ? l.group_end(g) : 32 * chunk + 32;
            uint32_t lev[8], planes[6];
#pragma unroll
            for (int b = 0; b < 6; b++) {
                planes[b] = opaque(index[b]); // or the selectors of all types would be hoisted out of this loop
            }
            const float step = levels_of(l.code, l.group_bits(g), planes, lev);
            if (end - begin < 32 && l.n_groups > 1) {
                uint32_t part = end - 32 * chunk == 32 ? ~0u : (1u << (end - 32 * chunk)) - 1u;
                part &= ~0u << (begin - 32 * chunk);
#pragma unroll
                for (int m = 0; m < 8; m++) {
                    lev[m] &= part;
                }
            }
            const float f = portable_scale(l, block, g) * step;
#pragma unroll
            for (int r = 0; r < R; r++) {
                const uint32_t * const q = words + row_at[r] * (16 * C) + 16 * chunk;
                int high = 0, low = 0;
#pragma unroll
                for (int m = 0; m < 8; m++) {
                    high = dot4(lev[m], uniform_word(q + m), high);
                    low = dot4(lev[m], uniform_word(q + 8 + m), low);
                }
                s[r] = fmaf(f, (float) (256 * high + low), s[r]);
            }
            begin = end;
        }
    }
}

// D: head size; R: query rows of a block; PLAIN: K or V may be f16 or q8_0 (in the same kernel they would cost the
// others 50 registers).
template <int D, int R, bool PLAIN>
__global__ void __launch_bounds__(portable_tile) portable_attention(const portable_params p) {
    constexpr int C = portable_chunks(D), BYTES = D / 8, SUBS = portable_tile / BYTES, NR = (R + 3) / 4;
    constexpr float LOG2E = 1.44269504f, HEADROOM = 14.0f; // weights reach 2^14, far from the halves' limits
    __shared__ int live[3];
    __shared__ float moved[R];
    __shared__ float2 state[R];

    const int thread = threadIdx.x, group = thread >> 5;
    const int head_kv = blockIdx.y / p.row_tiles, row0 = (blockIdx.y - head_kv * p.row_tiles) * R, seq = blockIdx.z;
    const long long row_base = ((long long) seq * p.n_head_kv + head_kv) * p.n_rows;

    const bool k_blocks = !PLAIN || p.k.kind == OPERAND_BLOCKS, v_blocks = !PLAIN || p.v.kind == OPERAND_BLOCKS;
    const int v_at = k_blocks ? 4 * portable_tile * p.k.slot : 0;
    int tiles_bytes = v_at + (v_blocks ? 4 * portable_tile * p.v.slot : 0);
    tiles_bytes = tiles_bytes > 4096 ? tiles_bytes : 4096;
    float * const logits = (float *) (portable_smem + tiles_bytes);                          // [row][token]
    uint2 * const weights = (uint2 *) (portable_smem + tiles_bytes + R * portable_tile * 4); // [set][row][quad]
    const int sets = v_blocks ? p.v.l.n_groups : 1;

    const char * const k_base = p.k.data + seq * p.k.nb3 + head_kv * p.k.nb2;
    const char * const v_base = p.v.data + seq * p.v.nb3 + head_kv * p.v.nb2;
    const int n_tiles = (p.n_kv + portable_tile - 1) / portable_tile;
    const int tile_begin = (int) ((long long) n_tiles * blockIdx.x / p.n_splits);
    const int tile_end = (int) ((long long) n_tiles * (blockIdx.x + 1) / p.n_splits);

    // rows past the end repeat the last one; they are not written
    int row_at[R];
#pragma unroll
    for (int r = 0; r < R; r++) {
        row_at[r] = row0 + r < p.n_rows ? row0 + r : p.n_rows - 1;
    }
    const uint32_t * const words = p.words + row_base * (16 * C);

    // softmax: rows group, group + 4
    float ref[NR], top[NR], sum[NR], factor[NR], slope[NR];
    const char * mask_row[NR];
#pragma unroll
    for (int i = 0; i < NR; i++) {
        const int r = group + 4 * i, row = row0 + r < p.n_rows ? row0 + r : p.n_rows - 1;
        const int head = head_kv * p.gqa + row % p.gqa;
        ref[i] = top[i] = -1e30f, sum[i] = 0.0f;
        factor[i] = p.factors[row_base + row];
        slope[i] = LOG2E;
        if (p.max_bias > 0.0f) {
            slope[i] *= head < p.n_head_log2 ? powf(p.m0, (float) (head + 1))
                                             : powf(p.m1, (float) (2 * (head - p.n_head_log2) + 1));
        }
        mask_row[i] = p.mask ? p.mask + (seq % p.mask_ne3) * p.mask_nb3 + (head % p.mask_ne2) * p.mask_nb2 +
                                   (long long) (row / p.gqa) * p.mask_nb1
                             : nullptr;
    }

    // output: coordinates 8 byte .. 8 byte + 7, quads sub, sub + SUBS, ...
    const int v_byte = thread % BYTES;
    const int v_group =
        v_blocks ? (8 * v_byte >= p.v.l.group_end(0)) + (p.v.l.n_groups > 1 && 8 * v_byte >= p.v.l.group_end(1)) : 0;
    float step = 1.0f;
    float o[R][8];
#pragma unroll
    for (int r = 0; r < R; r++) {
#pragma unroll
        for (int m = 0; m < 8; m++) {
            o[r][m] = 0.0f;
        }
    }
    if (thread < 3) {
        live[thread] = 0;
    }
    __syncthreads();

    for (int tile = tile_begin; tile < tile_end; tile++) {
        const int t0 = tile * portable_tile, n_tok = p.n_kv - t0 < portable_tile ? p.n_kv - t0 : portable_tile;
        const int now = (tile - tile_begin) % 3, next = now == 2 ? 0 : now + 1;
        // the addresses of all phases are cheap to compute per tile; kept across tiles they would take 100 registers
        const int tid = (int) opaque((uint32_t) thread), lane = tid & 31;
        const int byte = tid % BYTES, sub = tid / BYTES;

        // Mask first: a tile that no row sees is not even loaded.
        float bias[NR][4];
        bool any = false;
#pragma unroll
        for (int i = 0; i < NR; i++) {
#pragma unroll
            for (int k = 0; k < 4; k++) {
                const int t = 4 * lane + k;
                bias[i][k] = -INFINITY;
                if (t < n_tok && group + 4 * i < R) {
                    bias[i][k] =
                        p.mask
                            ? half_bits(*(const unsigned short *) (mask_row[i] + 2 * (long long) (t0 + t))) * slope[i]
                            : 0.0f;
                }
                any |= bias[i][k] > -INFINITY;
            }
        }
        if (any) {
            live[now] = 1;
        }
        if (tid == 0) {
            live[next] = 0; // last read two barriers ago
        }
        __syncthreads();
        if (!live[now]) {
            continue;
        }
        if (k_blocks) {
            portable_load(0, k_base + t0 * p.k.nb1, p.k, n_tok, tid);
        }
        if (v_blocks) {
            portable_load(v_at, v_base + t0 * p.v.nb1, p.v, n_tok, tid);
        }
        __syncthreads();

        if (tid < n_tok) {
            float s[R];
#pragma unroll
            for (int r = 0; r < R; r++) {
                s[r] = 0.0f;
            }
            if (k_blocks) {
                portable_logits<D, R>(p, 4 * p.k.slot * tid + portable_lead(k_base, p.k.nb1, t0 + tid), words, row_at,
                                      s);
            } else {
                const char * const at = k_base + (long long) (t0 + tid) * p.k.nb1;
                const float * rows[R];
#pragma unroll
                for (int r = 0; r < R; r++) {
                    rows[r] = portable_query_row(p, seq, head_kv, row_at[r]);
                }
#pragma unroll 1
                for (int c = 0; c < D; c++) {
                    const float x = portable_plain(p.k, at, c);
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        s[r] = fmaf(x, rows[r][c], s[r]);
                    }
                }
            }
#pragma unroll
            for (int r = 0; r < R; r++) {
                logits[r * portable_tile + tid] = s[r];
            }
        }
        __syncthreads();

#pragma unroll
        for (int i = 0; i < NR; i++) {
            const int r = group + 4 * i;
            if (r < R) {
                const float4 dot = *(const float4 *) (logits + r * portable_tile + 4 * lane);
                const float dots[4] = {dot.x, dot.y, dot.z, dot.w};
                float s[4], m = -1e30f;
                float lv[4] = {0.0f, 0.0f, 0.0f, 0.0f};
                int block[4];
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    const int t = 4 * lane + k;
                    block[k] = v_at + 4 * p.v.slot * t + portable_lead(v_base, p.v.nb1, t0 + t);
                    s[k] = -INFINITY;
                    if (bias[i][k] > -INFINITY) {
                        s[k] = dots[k] * factor[i];
                        if (p.softcap != 0.0f) {
                            s[k] = p.softcap * LOG2E * tanhf(s[k]);
                        }
                        s[k] += bias[i][k];
                        if (v_blocks) {
                            lv[k] = portable_log2_scale(p.v.l, block[k], 0);
                            for (int g = 1; g < sets; g++) {
                                lv[k] = fmaxf(lv[k], portable_log2_scale(p.v.l, block[k], g));
                            }
                        }
                    }
                    m = fmaxf(m, s[k] + lv[k]);
                }
                for (int w = 16; w > 0; w /= 2) {
                    m = fmaxf(m, group_xor(m, w));
                }
                // a tile far below the largest so far counts as zero rather than let the sums grow without bound
                m = ceilf(m);
                top[i] = fmaxf(top[i], m);
                const float now_ref = fmaxf(m, top[i] - 40.0f) - HEADROOM;
                const float f = exp2f(ref[i] - now_ref);
                ref[i] = now_ref;
                float l = 0.0f;
#pragma unroll
                for (int k = 0; k < 4; k++) {
                    l += exp2f(s[k] - now_ref);
                }
                sum[i] = fmaf(sum[i], f, l);
                for (int g = 0; g < sets; g++) {
                    uint32_t h[4];
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        float x = s[k] - now_ref;
                        if (v_blocks && x > -INFINITY) {
                            x += portable_log2_scale(p.v.l, block[k], g);
                        }
                        h[k] = __half_as_ushort(__float2half_rn(exp2f(x)));
                    }
                    weights[(g * R + r) * 32 + lane] = make_uint2(h[0] | h[1] << 16, h[2] | h[3] << 16);
                }
                if (lane == 0) {
                    moved[r] = f;
                }
            }
        }
        __syncthreads();

        if (sub < SUBS) {
#pragma unroll
            for (int r = 0; r < R; r++) {
                const float f = moved[r];
#pragma unroll
                for (int m = 0; m < 8; m++) {
                    o[r][m] *= f;
                }
            }
            const int bits = p.v.l.group_bits(v_group);
#pragma unroll 1
            for (int quad = sub; 4 * quad < n_tok; quad += SUBS) {
                uint32_t lo[8], hi[8]; // coordinate m of tokens 0, 1 and 2, 3
                if (v_blocks) {
                    int at[4];
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        const int t = 4 * quad + k;
                        at[k] = v_at + 4 * p.v.slot * t + portable_lead(v_base, p.v.nb1, t0 + t);
                    }
                    const auto gather = [&](int off) {
                        return portable_byte(at[0] + off) | portable_byte(at[1] + off) << 8 |
                               portable_byte(at[2] + off) << 16 | portable_byte(at[3] + off) << 24;
                    };
                    uint32_t index[6], lev[8];
                    const uint32_t u = gather(p.v.l.plane_off(0) + byte);
                    if (p.v.l.code == PYTQ_CODE_TRELLIS) {
                        trellis_bytes(u, byte > 0 ? gather(p.v.l.plane_off(0) + byte - 1) : 0u, index);
#pragma unroll
                        for (int b = 1; b < 5; b++) {
                            index[b + 1] = b < bits ? gather(p.v.l.plane_off(b) + byte) : 0u;
                        }
                    } else {
                        index[0] = u;
#pragma unroll
                        for (int b = 1; b < 5; b++) {
                            index[b] = b < bits ? gather(p.v.l.plane_off(b) + byte) : 0u;
                        }
                        index[5] = 0;
                    }
                    step = levels_of(p.v.l.code, bits, index, lev);
#pragma unroll
                    for (int m = 0; m < 8; m++) {
                        const uint32_t x = lev[m] ^ 0x80808080u;
                        lo[m] = bytes_to_halves(x, 0x04010400u);
                        hi[m] = bytes_to_halves(x, 0x04030402u);
                    }
#pragma unroll
                    for (int r = 0; r < R; r++) {
                        const uint2 w = weights[(v_group * R + r) * 32 + quad];
#pragma unroll
                        for (int m = 0; m < 8; m++) {
                            o[r][m] = dot2(lo[m], w.x, dot2(hi[m], w.y, o[r][m]));
                        }
                    }
                } else {
#pragma unroll 1
                    for (int k = 0; k < 4 && 4 * quad + k < n_tok; k++) {
                        const char * const vector = v_base + (long long) (t0 + 4 * quad + k) * p.v.nb1;
                        float x[8];
#pragma unroll
                        for (int m = 0; m < 8; m++) {
                            x[m] = portable_plain(p.v, vector, 8 * byte + m);
                        }
#pragma unroll
                        for (int r = 0; r < R; r++) {
                            const uint2 pair = weights[r * 32 + quad];
                            const uint32_t w = k < 2 ? pair.x : pair.y;
                            const float f = half_bits(k & 1 ? w >> 16 : w & 0xffffu);
#pragma unroll
                            for (int m = 0; m < 8; m++) {
                                o[r][m] = fmaf(f, x[m], o[r][m]);
                            }
                        }
                    }
                }
            }
        }
    }

    // Sums over the threads of a coordinate, in a fixed order.
#pragma unroll
    for (int i = 0; i < NR; i++) {
        const int r = group + 4 * i;
        for (int w = 16; w > 0; w /= 2) {
            sum[i] += group_xor(sum[i], w);
        }
        if (r < R && (thread & 31) == 0) {
            state[r] = make_float2(ref[i], sum[i]);
        }
    }
    float * const red = (float *) portable_smem;
#pragma unroll
    for (int r = 0; r < R; r++) {
        __syncthreads();
        if (thread < SUBS * BYTES) {
#pragma unroll
            for (int m = 0; m < 8; m++) {
                red[8 * thread + m] = o[r][m] * step;
            }
        }
        __syncthreads();
        if (row0 + r < p.n_rows) {
            const int row = row0 + r, head = head_kv * p.gqa + row % p.gqa;
            const float2 st = state[r];
            const float total = st.y + (p.sinks ? exp2f(p.sinks[head] * LOG2E - st.x) : 0.0f);
            const float inv = total > 0.0f ? 1.0f / total : 0.0f;
            const long long at = (row_base + row) * p.n_splits + blockIdx.x;
            float * const out = p.n_splits == 1
                                    ? p.dst + (((long long) seq * p.n_q + row / p.gqa) * p.n_head_kv * p.gqa + head) * D
                                    : p.part + at * D;
            for (int c = thread; c < D; c += portable_tile) {
                float x = 0.0f;
#pragma unroll
                for (int s = 0; s < SUBS; s++) {
                    x += red[s * D + c];
                }
                out[c] = p.n_splits == 1 ? x * inv : x;
            }
            if (p.n_splits > 1 && thread == 0) {
                p.meta[at] = st;
            }
        }
    }
}

// grid (n_rows, n_head_kv, n_seq), 256 threads: four sets of 64 take every fourth split, so that the loads of few rows
// and many splits overlap.
template <int D> __global__ void __launch_bounds__(256) portable_combine(const portable_params p) {
    constexpr int N = (D + 63) / 64;
    __shared__ float tops[8], totals[4], sums[4][D];
    const int row = blockIdx.x, head_kv = blockIdx.y, seq = blockIdx.z, tid = threadIdx.x, set = tid >> 6;
    const long long at = (((long long) seq * p.n_head_kv + head_kv) * p.n_rows + row) * p.n_splits;
    const int head = head_kv * p.gqa + row % p.gqa;
    const float sink = p.sinks ? p.sinks[head] * 1.44269504f : -1e30f;
    float top = sink;
    for (int i = tid; i < p.n_splits; i += 256) {
        top = fmaxf(top, p.meta[at + i].x);
    }
    for (int w = 16; w > 0; w /= 2) {
        top = fmaxf(top, group_xor(top, w));
    }
    if ((tid & 31) == 0) {
        tops[tid >> 5] = top;
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        top = fmaxf(top, tops[i]);
    }
    float total = 0.0f, acc[N];
#pragma unroll
    for (int n = 0; n < N; n++) {
        acc[n] = 0.0f;
    }
#pragma unroll 4
    for (int i = set; i < p.n_splits; i += 4) {
        const float2 m = p.meta[at + i];
        const float f = exp2f(m.x - top);
        total = fmaf(m.y, f, total);
#pragma unroll
        for (int n = 0; n < N; n++) {
            const int c = (tid & 63) + 64 * n;
            acc[n] = c < D ? fmaf(p.part[(at + i) * D + c], f, acc[n]) : 0.0f;
        }
    }
#pragma unroll
    for (int n = 0; n < N; n++) {
        const int c = (tid & 63) + 64 * n;
        if (c < D) {
            sums[set][c] = acc[n];
        }
    }
    if ((tid & 63) == 0) {
        totals[set] = total;
    }
    __syncthreads();
    if (tid < D) {
        total = totals[0] + totals[1] + totals[2] + totals[3] + (p.sinks ? exp2f(sink - top) : 0.0f);
        const float x = sums[0][tid] + sums[1][tid] + sums[2][tid] + sums[3][tid];
        p.dst[(((long long) seq * p.n_q + row / p.gqa) * p.n_head_kv * p.gqa + head) * D + tid] =
            total > 0.0f ? x / total : 0.0f;
    }
}

} // namespace pytq

// What the decode kernels are put together from: their parameters, copies of tiles, the query as an operand, logits,
// weights, levels of the values, the newest token, the result.
#pragma once

#include "decode-instructions.cuh"

namespace pytq {

// The newest token of a sequence that grows by one, as it was before compression. While another kernel encodes it,
// attention leaves its row of the cache alone and adds the token at the end, like a sink with a value, and so waits for
// no encoder.
struct decode_fresh {
    const float * k;  // [d, n_head_kv] in the basis of q as passed; null: every token is in the cache
    const float * v;  // [d, n_head_kv] in the basis of the result
    const void * row; // its row number in the cache, 4 or 8 bytes
    int row_bytes;
    long long first_row; // row of token 0 of the sequence
};

constexpr int max_sources = 64; // that join_sources joins

struct decode_params {
    const char * q; // f32 [d, n_q, n_head, n_seq]
    const char * k; // blocks [n_kv, n_head_kv, n_seq]
    const char * v;
    const char * mask;   // f16 [n_kv, n_q, 1, n_seq_mask] or null
    const float * sinks; // [n_head] or null
    char * dst;          // f32 [d, n_head, n_q, n_seq], or the same as blocks of Q8_1 (q8_1)
    float * part;        // unnormalised outputs [seq][head_kv][row][part][d]; unused with one part
    float2 * meta;       // (reference exponent, sum) [seq][head_kv][row][part]
    long long q_nb1, q_nb2, q_nb3, k_nb1, k_nb2, k_nb3, v_nb1, v_nb2, v_nb3, mask_nb1, mask_nb3;
    int n_kv, n_q, n_head_kv, gqa, n_rows, n_seq, n_seq_mask;
    int heads_per_block, warps_per_head, teams, row_tiles;
    int n_splits, cluster, cluster_log2, n_parts;
    int tiles_each, tiles_more;                     // tiles of a split; the first tiles_more splits have one more
    int heads_inverse, slices_inverse, gqa_inverse; // ceil(2^16 / x): quotients of small numbers
    int k_slot, v_slot; // bytes between tokens in shared memory; equal to nb1 when rows are copied as one range
    int v_at, mask_at, scratch_at; // offsets in a team's shared memory; its keys lie at decode_keys_at
    int team_bytes;
    int query_at;      // attention-short.cuh: operands of the heads
    int join_at;       // attention-short.cuh: rows that other warps leave to be joined
    int mask_rows;     // rows of the mask a tile of query rows needs: 1 for one token, else 4
    bool mask_vectors; // mask rows may be copied 16 bytes at a time
    bool rotate;       // multiply the result by the Walsh matrix of order d over sqrt(d)
    bool rotate_query; // and the query
    bool q8_1;         // store the result as upstream's products of a quantised matrix by a vector read it
    float scale, softcap, max_bias;
    float slope_log2[2]; // log2 of the bases of ALiBi's slopes: heads below n_head_log2, and the others
    float row_scale; // logits before the soft-cap in units of it, else in units of log2; per step of the fixed-point
                     // query
    int n_head_log2;
    hidden_constants hidden;
    decode_fresh fresh; // last: what every block needs shares few lines of the constant bank
};

// Bytes between tokens in shared memory for blocks of one head group; contiguous rows are copied as they are.
inline int decode_slot_bytes(long long nb1, int segment) {
    if (nb1 - segment >= 0 && nb1 - segment < 32 && nb1 % 4 == 0) {
        return (int) nb1;
    }
    const int need = segment + 30;
    return need + (int) (((nb1 - need) % 16 + 16) % 16);
}

// What follows from the caller's parameters, heads_per_block and warps_per_head.
template <class K, class V> void decode_common(decode_params & p) {
    p.n_rows = p.gqa * p.n_q;
    p.row_tiles = (p.n_rows + 3) / 4;
    p.heads_inverse = (65536 + p.heads_per_block - 1) / p.heads_per_block;
    p.slices_inverse = (65536 + p.warps_per_head - 1) / p.warps_per_head;
    p.gqa_inverse = (65536 + p.gqa - 1) / p.gqa;
    p.k_slot = decode_slot_bytes(p.k_nb1, p.heads_per_block * K::block_bytes);
    p.v_slot = decode_slot_bytes(p.v_nb1, p.heads_per_block * V::block_bytes);
    p.row_scale = p.scale / 32512.0f * (p.softcap != 0.0f ? 1.0f / p.softcap : 1.44269504f);
    p.hidden = make_hidden_constants();
}

// Scratch of a warp for its weights; a KV head's query as an operand with the largest values of the four rows.
constexpr int decode_weight_bytes = 8 * 20 * 4;
template <class K> PYTQ_HD constexpr int query_bytes() {
    return 8 * 4 * 4 * query_words<K>() + 16;
}

// Result rows in shared memory: padded so that lanes meet few banks, and so that four neighbours stay together where
// they are written and read as such.
template <class K> PYTQ_HD constexpr bool result_vectors() {
    return K::d % 128 == 0;
}
template <class K> PYTQ_HD constexpr int result_at(int c) {
    return result_vectors<K>() ? c + 4 * (c / 16) : c + c / (K::d / 8);
}
template <class K> PYTQ_HD constexpr int result_row() {
    return result_vectors<K>() ? K::d / 16 * 20 + 8 : K::d + 8;
}

#ifdef PYTQ_HAVE_MMA

#ifdef PYTQ_BULK

// Copies the blocks of n_tok tokens (segment bytes each) from src by one warp. Token t's first byte lands at offset
// to + (src & 15) + t * slot. Announces extra bytes more than it copies.
PYTQ_DEV void load_tile(int to, const char * src, long long nb1, int slot, int segment, int n_tok, int barrier,
                        int extra, int lane) {
    const int lead = (int) ((uintptr_t) src & 15);
    if (slot == nb1) {
        if (lane == 0) {
            const int bytes = (lead + (n_tok - 1) * slot + segment + 15) & ~15;
            barrier_expect(barrier, bytes + extra);
            copy_bulk(to, src - lead, bytes, barrier);
        }
    } else {
        int bytes = 0;
#pragma unroll 1
        for (int r = lane; r < n_tok; r += 32) {
            bytes += ((int) ((uintptr_t) (src + r * nb1) & 15) + segment + 15) & ~15;
        }
        bytes = __reduce_add_sync(0xffffffffu, bytes);
        if (lane == 0) {
            barrier_expect(barrier, bytes + extra);
        }
        __syncwarp();
#pragma unroll 1
        for (int r = lane; r < n_tok; r += 32) {
            const char * const row = src + r * nb1;
            const int off = (int) ((uintptr_t) row & 15);
            copy_bulk(to + lead + r * slot - off, row - off, (off + segment + 15) & ~15, barrier);
        }
    }
}

#else

// The same by a whole team, 16 bytes at a time.
PYTQ_DEV void load_tile(int to, const char * src, long long nb1, int slot, int segment, int n_tok, int tid,
                        int n_threads) {
    const int lead = (int) ((uintptr_t) src & 15);
    if (slot == nb1) {
        const int bytes = lead + (n_tok - 1) * slot + segment;
        const char * const from = src - lead;
        for (int c = 16 * tid; c < bytes; c += 16 * n_threads) {
            copy16_async(to + c, from + c);
        }
    } else {
        const int per_row = (segment + 30) >> 4;
        for (int i = tid; i < n_tok * per_row; i += n_threads) {
            const int r = i / per_row, c = i - r * per_row;
            const char * row = src + r * nb1;
            const int off = (int) ((uintptr_t) row & 15);
            if (16 * c < off + segment) {
                copy16_async(to + lead + r * slot - off + 16 * c, row - off + 16 * c);
            }
        }
    }
}

#endif

// Walsh-Hadamard transform in natural order of LANES N values: one step per bit of the coordinate, in any order, so it
// does not matter which of them are the lane's.
template <int LANES, int N> PYTQ_DEV void walsh(float v[N], int lane) {
#pragma unroll 1 // runs once: every instruction has to be fetched
    for (int h = 1; h < LANES; h *= 2) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float o = __shfl_xor_sync(0xffffffffu, v[i], h);
            v[i] = lane & h ? o - v[i] : v[i] + o;
        }
    }
#pragma unroll
    for (int h = 1; h < N; h *= 2) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            if (!(i & h)) {
                const float a = v[i], b = v[i + h];
                v[i] = a + b, v[i + h] = a - b;
            }
        }
    }
}

// Head sizes that the graph rotates by a Walsh matrix, and 1 / sqrt(D).
template <int D> PYTQ_HD constexpr bool walsh_order() {
    return D == 64 || D == 128 || D == 256;
}
template <int D> PYTQ_HD constexpr float walsh_factor() {
    return D == 64 ? 0.125f : D == 128 ? 0.0883883476f : 0.0625f;
}

// ALiBi's slope of a head.
PYTQ_DEV float alibi_slope(const decode_params & p, int head) {
    return exp2f(head < p.n_head_log2 ? p.slope_log2[0] * (float) (head + 1)
                                      : p.slope_log2[1] * (float) (2 * (head - p.n_head_log2) + 1));
}

// tanh in few instructions; the absolute error is 2e-7.
PYTQ_DEV float tanh_fast(float x) {
    return 1.0f - __fdividef(2.0f, 1.0f + exp2_fast(2.88539008f * x));
}

// N (1, 2 or 4) neighbouring floats.
template <int N> PYTQ_DEV void store_floats(float * to, const float * x) {
    if constexpr (N == 4) {
        *(float4 *) to = make_float4(x[0], x[1], x[2], x[3]);
    } else if constexpr (N == 2) {
        *(float2 *) to = make_float2(x[0], x[1]);
    } else {
        *to = *x;
    }
}
template <int N> PYTQ_DEV void load_floats(const float * from, float * x) {
    if constexpr (N == 4) {
        const float4 f = *(const float4 *) from;
        x[0] = f.x, x[1] = f.y, x[2] = f.z, x[3] = f.w;
    } else if constexpr (N == 2) {
        const float2 f = *(const float2 *) from;
        x[0] = f.x, x[1] = f.y;
    } else {
        *x = *from;
    }
}

// Coordinate of value i of a lane where a warp holds a row of D: four neighbours where D allows.
template <int D> PYTQ_DEV int row_coordinate(int i, int lane) {
    return D % 128 == 0 ? (i >> 2) * 128 + 4 * lane + (i & 3) : 32 * i + lane;
}

// Calls f(i, coordinate) for the values i of a row of D that a lane of a warp holds, or for the first of every
// row_vector<D>() neighbours.
template <int D> PYTQ_HD constexpr int row_vector() {
    return D % 128 == 0 ? 4 : 1;
}
template <int D, class F> PYTQ_DEV void for_row(int lane, const F & f) {
#pragma unroll
    for (int i = 0; i < (D + 31) / 32; i += row_vector<D>()) {
        if (32 * (i + row_vector<D>()) <= D || row_coordinate<D>(i, lane) < D) {
            f(i, row_coordinate<D>(i, lane));
        }
    }
}

// Those values, 0 behind the row's end.
template <int D> PYTQ_DEV void load_row(const float * src, int lane, float * v) {
    v[(D + 31) / 32 - 1] = 0.0f;
    for_row<D>(lane, [&](int i, int c) { load_floats<row_vector<D>()>(src + c, v + i); });
}

PYTQ_DEV int fresh_token(const decode_params & p) {
    const long long row = p.fresh.row_bytes == 8 ? *(const long long *) p.fresh.row : *(const int *) p.fresh.row;
    return (int) (row - p.fresh.first_row);
}

// What the newest token adds to one output row: its logit in units of log2 and its value. Loading and reckoning are
// apart, so that the way to memory can be hidden.
template <int D> struct fresh_part {
    static constexpr int N = (D + 31) / 32;
    float logit = -INFINITY, q[N], k[N], v[N], bias;
    PYTQ_DEV void load(const decode_params & p, int token, int head_kv, int row, int lane) {
        load_row<D>((const float *) (p.q + (head_kv * p.gqa + row) * p.q_nb2), lane, q);
        load_row<D>(p.fresh.k + head_kv * D, lane, k);
        load_row<D>(p.fresh.v + head_kv * D, lane, v);
        bias = p.mask ? __half2float(((const __half *) p.mask)[token]) : 0.0f;
    }
    PYTQ_DEV void finish(const decode_params & p, int head_kv, int row) {
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
            dot = fmaf(q[i], k[i], dot);
        }
#pragma unroll 1
        for (int h = 1; h < 32; h *= 2) {
            dot += __shfl_xor_sync(0xffffffffu, dot, h);
        }
        dot *= p.scale;
        if (p.softcap != 0.0f) {
            dot = p.softcap * tanh_fast(dot / p.softcap);
        }
        const float slope = p.max_bias > 0.0f ? alibi_slope(p, head_kv * p.gqa + row) : 1.0f;
        logit = bias > -INFINITY ? 1.44269504f * fmaf(slope, bias, dot) : -INFINITY;
    }
};

// A row v * f whose first value is number `first` of the result, as blocks of 32 values: half2 (scale, sum), 32 bytes.
// That is upstream's block_q8_1, and rounded as upstream rounds it.
constexpr int q8_1_bytes = 36;
template <int D> PYTQ_DEV void store_q8_1(char * to, long long first, const float * v, float f, int lane) {
    constexpr int VECTOR = row_vector<D>();
    for_row<D>(lane, [&](int i, int c) {
        float top = 0.0f, sum = 0.0f, x[VECTOR];
#pragma unroll
        for (int n = 0; n < VECTOR; n++) {
            x[n] = v[i + n] * f;
            top = fmaxf(top, fabsf(x[n])), sum += x[n];
        }
#pragma unroll
        for (int h = 1; h < 32 / VECTOR; h *= 2) {
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, h));
            sum += __shfl_xor_sync(0xffffffffu, sum, h);
        }
        const float step = top / 127.0f;
        char * const block = to + (first + c) / 32 * q8_1_bytes;
        uint32_t bytes = 0;
#pragma unroll
        for (int n = 0; n < VECTOR; n++) {
            const int q = top > 0.0f ? (int) roundf(x[n] / step) : 0;
            bytes |= (uint32_t) (q & 255) << 8 * n;
        }
        if constexpr (VECTOR == 4) {
            *(uint32_t *) (block + 4 + c % 32) = bytes;
        } else {
            *(uint8_t *) (block + 4 + c % 32) = (uint8_t) bytes;
        }
        if (c % 32 == 0) {
            *(__half2 *) block = __floats2half2_rn(step, sum);
        }
    });
}

// Normalises, rotates if asked and stores one output row.
template <int D>
PYTQ_DEV void store_row(const decode_params & p, int seq, int head_kv, int row, float * v, float top, float sum,
                        const fresh_part<D> & fresh, int lane) {
    constexpr int N = (D + 31) / 32;
    const int iq = (row * p.gqa_inverse) >> 16, head = head_kv * p.gqa + row - iq * p.gqa;
    float f = 1.0f, f_fresh = 0.0f;
    if (p.fresh.k) {
        const float t = fmaxf(top, fresh.logit);
        f = exp2_fast(top - t), f_fresh = exp2_fast(fresh.logit - t);
        sum = fmaf(sum, f, f_fresh);
        top = t;
    }
    if (p.sinks) {
        const float sink = p.sinks[head] * 1.44269504f, t = fmaxf(top, sink), g = exp2f(top - t);
        f *= g, f_fresh *= g;
        sum = sum * g + exp2f(sink - t);
    }
    const float inv = sum > 0.0f ? __fdividef(1.0f, sum) : 0.0f;
    f *= inv, f_fresh *= inv;
    if constexpr (walsh_order<D>()) {
        if (p.rotate) {
            walsh<32, N>(v, lane);
            f *= walsh_factor<D>();
        }
    }
    if (p.fresh.k) {
#pragma unroll
        for (int i = 0; i < N; i++) {
            v[i] = fmaf(v[i], f, fresh.v[i] * f_fresh);
        }
        f = 1.0f;
    }
    const long long first = (((long long) seq * p.n_q + iq) * p.n_head_kv * p.gqa + head) * D;
    if constexpr (D % 32 == 0) {
        if (p.q8_1) {
            return store_q8_1<D>(p.dst, first, v, f, lane);
        }
    }
    float * const out = (float *) p.dst + first;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int c = row_coordinate<D>(i, lane);
        if (32 * (i + 1) <= D || c < D) {
            out[c] = v[i] * f;
        }
    }
}

// ------------------------------------------------------------------------------------------------ the query

constexpr float LOG2E = 1.44269504f, MAGIC = 12582912.0f; // 1.5 * 2^23: int32 sums below 2^22 read as floats
constexpr int MAGIC_BITS = 0x4b400000;

// The warps of a KV head share the work on its four rows: each takes every so many pairs of rows, sixteen lanes a row.
// Coordinate i of the D / 16 that a lane holds:
template <int D> PYTQ_DEV int query_coordinate(int i, int lane) {
    return D % 64 == 0 ? 64 * (i >> 2) + 4 * (lane & 15) + (i & 3) : 16 * i + (lane & 15);
}

// Rows row0 + 2 pair + {0, 1} of a KV head's queries, zero behind the last.
template <int D>
PYTQ_DEV void load_query(const decode_params & p, int seq, int row0, int pair, int head_kv, int lane, float x[D / 16]) {
    const int r = row0 + 2 * pair + (lane >> 4), iq = (r * p.gqa_inverse) >> 16;
    const float * const src =
        (const float *) (p.q + seq * p.q_nb3 + iq * p.q_nb1 + (head_kv * p.gqa + r - iq * p.gqa) * p.q_nb2);
    constexpr int AT_ONCE = D % 64 == 0 ? 4 : 1;
#pragma unroll
    for (int i = 0; i < D / 16; i += AT_ONCE) {
#pragma unroll
        for (int n = 0; n < AT_ONCE; n++) {
            x[i + n] = 0.0f;
        }
        if (r < p.n_rows) {
            load_floats<AT_ONCE>(src + query_coordinate<D>(i, lane), x + i);
        }
    }
}

// Those rows in 16-bit fixed point at an offset in shared memory: high bytes are columns 0..3 of the operand, low bytes
// 4..7; behind it the largest value of each row.
template <class K>
PYTQ_DEV void stage_query(const decode_params & p, int pair, int lane, int operand, float x[K::d / 16]) {
    constexpr int D = K::d, QN = D / 16, QW = query_words<K>();
    const int row = 2 * pair + (lane >> 4), to = operand + row * 16 * QW;
    if constexpr (4 * QW * 4 > D) { // places without a coordinate
        for (int i = lane & 15; i < 4 * QW; i += 16) {
            *(uint32_t *) (decode_smem + to + 4 * i) = *(uint32_t *) (decode_smem + to + 4 * 16 * QW + 4 * i) = 0u;
        }
        __syncwarp();
    }
    if constexpr (walsh_order<D>()) {
        if (p.rotate_query) {
            walsh<16, QN>(x, lane);
        }
    }
    float m = 0.0f;
#pragma unroll
    for (int i = 0; i < QN; i++) {
        m = fmaxf(m, fabsf(x[i]));
    }
#pragma unroll
    for (int t = 1; t < 16; t *= 2) {
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, t));
    }
    const float inv = m > 0.0f ? __fdividef(32512.0f, m) : 0.0f;
    // low 16 bits: value + 128, so the high byte is rounded and the low byte is offset by 128
    const auto fixed = [&](int i) { return as_uint(fmaf(x[i], inv, MAGIC + 128.0f)); };
    if constexpr (query_by_words<K>()) {
        const uint32_t odd = lane & 1 ? 0x3715u : 0x6240u, upper = lane & 2 ? 0x3276u : 0x5410u;
#pragma unroll
        for (int i = 0; i < QN; i += 4) {
            const uint32_t t01 = permute(fixed(i), fixed(i + 1), 0x5140),
                           t23 = permute(fixed(i + 2), fixed(i + 3), 0x5140);
            // the four bytes of a word come from four lanes
            uint32_t word[2] = {permute(t01, t23, 0x7632), permute(t01, t23, 0x5410) ^ 0x80808080u};
#pragma unroll
            for (int n = 0; n < 2; n++) {
                word[n] = permute(word[n], __shfl_xor_sync(0xffffffffu, word[n], 1), odd);
                word[n] = permute(word[n], __shfl_xor_sync(0xffffffffu, word[n], 2), upper);
                const int c = 16 * i + 4 * (lane & 12) + (lane & 3);
                *(uint32_t *) (decode_smem + to + n * 4 * 16 * QW + query_byte<K>(c)) = word[n];
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < QN; i++) {
            const uint32_t t = fixed(i);
            const int at = to + query_byte<K>(query_coordinate<D>(i, lane));
            *(uint8_t *) (decode_smem + at) = (uint8_t) (t >> 8);
            *(uint8_t *) (decode_smem + at + 4 * 16 * QW) = (uint8_t) (t ^ 128u);
        }
    }
    if ((lane & 15) == 0) {
        *(float *) (decode_smem + operand + 8 * 16 * QW + 4 * row) = m;
    }
}

// The pairs first, first + step, ... of the four rows; x holds the first of them already.
template <class K>
PYTQ_DEV void stage_pairs(const decode_params & p, int seq, int row0, int head_kv, int first, int step, int lane,
                          int operand, float x[K::d / 16]) {
#pragma unroll 1
    for (int pair = first; pair < 2; pair += step) {
        if (pair != first) {
            load_query<K::d>(p, seq, row0, pair, head_kv, lane, x);
        }
        stage_query<K>(p, pair, lane, operand, x);
    }
}

// The operand, once it is there. row_factor: of rows 2 (j & 1) + {0, 1}, products to logits in units of log2; slope:
// ALiBi's, in that unit.
template <class K>
PYTQ_DEV void read_query(const decode_params & p, int row0, int head_kv, int lane, int operand,
                         uint32_t qb[query_words<K>()], float row_factor[2], float slope[2]) {
    constexpr int QW = query_words<K>();
    const int g = lane >> 2, j = lane & 3;
#pragma unroll
    for (int w = 0; w < QW; w++) {
        qb[w] = shared_word(operand + 4 * ((g * 4 + j) * QW + w));
    }
    float factor = p.row_scale;
    if constexpr (walsh_order<K::d>()) {
        factor *= p.rotate_query ? walsh_factor<K::d>() : 1.0f;
    }
#pragma unroll
    for (int rr = 0; rr < 2; rr++) {
        row_factor[rr] = *(const float *) (decode_smem + operand + 8 * 16 * QW + 4 * (2 * (j & 1) + rr)) * factor;
        slope[rr] = LOG2E;
        if (p.max_bias > 0.0f) {
            const int rq = min(row0 + 2 * (j & 1) + rr, p.n_rows - 1);
            const int head = head_kv * p.gqa + rq - ((rq * p.gqa_inverse) >> 16) * p.gqa;
            slope[rr] *= alibi_slope(p, head);
        }
    }
}

// ------------------------------------------------------------------------------------------------ logits and weights

// acc = levels of 16 tokens (a[half]: window W of group G) times the query; acc is in units of 1, plus MAGIC.
template <class K, int G, int W> PYTQ_DEV void key_product(int acc[4], const uint32_t a[2][8], const uint32_t * qb) {
    using kg = key_group<K, G>;
    constexpr int Q = kg::first_word() + W * 2 * kg::steps;
    const int magic4[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
#pragma unroll
    for (int s = 0; s < kg::steps; s++) {
        const int lo = kg::steps == 4 ? 2 * s : 4 * s, hi = kg::steps == 4 ? 2 * s + 1 : 4 * s + 2;
        mma_s8s8_k32(acc, a[0][lo], a[1][lo], a[0][hi], a[1][hi], qb[Q + 2 * s], qb[Q + 2 * s + 1],
                     W == 0 && s == 0 ? magic4 : acc);
    }
}

// Lanes j < 2 hold the high bytes' products, lanes j >= 2 the low bytes'; afterwards each lane has both for one token,
// scaled and added to part[row].
PYTQ_DEV void add_logits(const int acc[4], float scale, const float row_factor[2], int j, float part[2]) {
#pragma unroll
    for (int rr = 0; rr < 2; rr++) {
        const float first = __int_as_float(acc[rr]) - MAGIC, second = __int_as_float(acc[2 + rr]) - MAGIC;
        const float other = __shfl_xor_sync(0xffffffffu, j < 2 ? second : first, 2);
        const float dot = j < 2 ? fmaf(first, 256.0f, other) : fmaf(other, 256.0f, second);
        part[rr] = fmaf(dot, scale * row_factor[rr], part[rr]);
    }
}

// Weights w[row][token] of N tokens per lane in 16-bit fixed point (bits 0..15) relative to the largest weight of the
// warp's tokens times its value's scale, 2^lv; beta undoes that. Updates the rows' reference exponent and sum; alpha is
// what older results are to be multiplied by.
template <int N>
PYTQ_DEV void weigh(const float logit[N][2], const float lv[N], int j, float top[2], float sum[2], float alpha[2],
                    float beta[2], uint32_t w[2][N]) {
#pragma unroll
    for (int rr = 0; rr < 2; rr++) {
        float m = -1e30f;
        float u[N];
#pragma unroll
        for (int i = 0; i < N; i++) {
            u[i] = logit[i][rr] + lv[i];
            m = fmaxf(m, u[i]);
        }
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 4));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 8));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 16));
        const float top_new = fmaxf(top[rr], m);
        alpha[rr] = exp2_fast(top[rr] - top_new);
        beta[rr] = exp2_fast(m - top_new) * (j < 2 ? 256.0f / 65280.0f : 1.0f / 65280.0f);
        top[rr] = top_new;
        float l = 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
            l += exp2_fast(logit[i][rr] - top_new);
            w[rr][i] = as_uint(fmaf(exp2_fast(u[i] - m), 65280.0f, 8388608.0f));
        }
        sum[rr] = fmaf(sum[rr], alpha[rr], l);
    }
}

// Sums of two rows over the tokens of a warp; lanes with the same lowest bit hold the same rows.
PYTQ_DEV void sum_tokens(float sum[2]) {
#pragma unroll
    for (int rr = 0; rr < 2; rr++) {
#pragma unroll
        for (int s = 2; s < 32; s *= 2) {
            sum[rr] += __shfl_xor_sync(0xffffffffu, sum[rr], s);
        }
    }
}

// ------------------------------------------------------------------------------------------------ values

// Index planes of window W of two tokens, u and u + apart bytes further: bytes A0 B0 A1 B1.
template <class V, int W, bool A4>
PYTQ_DEV void value_pair(uint32_t bits, int u, int apart, uint32_t history, uint32_t * pair) {
    constexpr int VI = index_bits(V::code, V::bits);
    uint32_t win[2][VI];
#pragma unroll
    for (int n = 0; n < 2; n++) {
        const int at = u + n * apart;
        // the window's upper half is this lane's coordinates, the lower half the 16 before
        uint32_t plane[V::bits];
        windows<V, V::bits, W * value_shape<V>::width>(A4 ? bits : bits + 8u * (uint32_t) at, A4 ? at : 0, plane);
        if constexpr (V::code == PYTQ_CODE_TRELLIS && W == 0) {
            plane[0] &= history;
        }
        index_planes<V::code, V::bits, false>(plane, 0u, win[n]);
    }
#pragma unroll
    for (int b = 0; b < VI; b++) {
        pair[b] = permute(win[0][b], win[1][b], 0x7362);
    }
}

// Levels of four tokens (pair[0]: 0 and 2, pair[1]: 1 and 3): lev[value_shape::at(x)] holds coordinate x of unit 0 or 1
// (low or high nibbles of the bytes) of all four.
template <class V>
PYTQ_DEV void value_levels(const half_table<V::code, V::bits> & table, const hidden_constants & hidden, uint32_t bias,
                           const uint32_t (*pair)[index_bits(V::code, V::bits)], int unit, uint32_t lev[8]) {
    constexpr int VI = index_bits(V::code, V::bits);
    uint32_t index[VI];
#pragma unroll
    for (int b = 0; b < VI; b++) {
        index[b] = unit == 0 ? blend(0x0f0f0f0fu, pair[0][b], pair[1][b] << 4)
                             : blend(0x0f0f0f0fu, pair[0][b] >> 4, pair[1][b]);
    }
    fold_sign<V::code, V::bits>(index);
    folded_levels<V::code, V::bits>(table, hidden, bias, index, lev);
}

// The two halves of the fixed point joined: an eighth of a window's coordinates (of lane g) of row 2 (j & 1) + (j >>
// 1).
template <class V> PYTQ_DEV void result_values(const float (*o)[4], int j, float step, float y[value_shape<V>::width]) {
    using VS = value_shape<V>;
#pragma unroll
    for (int m = 0; m < VS::tiles; m++) {
        const float lo_a = __shfl_xor_sync(0xffffffffu, j < 2 ? o[m][1] : o[m][0], 2);
        const float lo_b = __shfl_xor_sync(0xffffffffu, j < 2 ? o[m][3] : o[m][2], 2);
        y[VS::first(m)] = ((j < 2 ? o[m][0] : o[m][1]) + lo_a) * step;
        y[VS::second(m)] = ((j < 2 ? o[m][2] : o[m][3]) + lo_b) * step;
    }
}

// Joins up to max_sources results of one row by a warp: v, the common reference exponent and the sum. load_meta(source,
// x) reads (top, sum), load_values(source, y) the lane's N values.
template <int N, class META, class VALUES>
PYTQ_DEV void join_sources(int sources, int lane, const META & load_meta, const VALUES & load_values, float v[N],
                           float & top, float & sum) {
    float meta[2][2] = {{-1e30f, 0.0f}, {-1e30f, 0.0f}}; // of sources lane, lane + 32
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (lane + 32 * i < sources) {
            load_meta(lane + 32 * i, meta[i]);
        }
    }
    top = fmaxf(meta[0][0], meta[1][0]);
#pragma unroll
    for (int s = 1; s < 32; s *= 2) {
        top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, s));
    }
    const float f[2] = {exp2_fast(meta[0][0] - top), exp2_fast(meta[1][0] - top)};
    sum = meta[0][1] * f[0] + meta[1][1] * f[1];
#pragma unroll
    for (int s = 1; s < 32; s *= 2) {
        sum += __shfl_xor_sync(0xffffffffu, sum, s);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        v[i] = 0.0f;
    }
#pragma unroll 1 // runs few times: every instruction has to be fetched
    for (int s0 = 0; s0 < sources; s0 += 4) {
        float y[4][N];
#pragma unroll
        for (int q = 0; q < 4; q++) {
            load_values(min(s0 + q, sources - 1), y[q]);
        }
#pragma unroll
        for (int q = 0; q < 4; q++) {
            const int s = s0 + q;
            const float w = __shfl_sync(0xffffffffu, s < 32 ? f[0] : f[1], s & 31);
#pragma unroll
            for (int i = 0; i < N; i++) {
                v[i] = fmaf(y[q][i], s < sources ? w : 0.0f, v[i]);
            }
        }
    }
}

template <int I> struct constant {
    static constexpr int value = I;
};

// One table per group of the keys.
template <class T, int G> struct key_tables {
    half_table<T::code, T::template group_bits<G>> table;
    key_tables<T, G - 1> rest;
    PYTQ_DEV void init(uint32_t zero) {
        table.init(zero);
        rest.init(zero);
    }
    template <int H> PYTQ_DEV const auto & of() const {
        if constexpr (H == G) {
            return table;
        } else {
            return rest.template of<H>();
        }
    }
};
template <class T> struct key_tables<T, -1> {
    PYTQ_DEV void init(uint32_t) {}
};

#endif // PYTQ_HAVE_MMA

} // namespace pytq

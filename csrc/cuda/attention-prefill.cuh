// Attention of many query rows over a compressed cache on compute capability 9.0: blocks are decoded straight into
// shared memory as f16 and read there by wgmma; no copy of the cache exists anywhere else.
//
//   grid     (splits of the sequence, tiles of 128 query rows, KV heads x sequences); a row is a pair (query, query
//   head
//            of the KV head), so all rows of a block share what is decoded
//   block    2 warpgroups of 64 rows each that multiply, warps that decode, 4 warps that find tiles with anything
//   visible tile     64 tokens. The finders read the mask ahead of everyone and pass on tiles that some row sees, with
//   a flag if
//            some value of the mask is not 0. Decoders fetch their own tokens' bytes two tiles ahead and write keys
//            and values as levels (prefill-tiles.cuh). Per warpgroup and tile j, with products in the background:
//              S = Q K(j)     O += P V(j - 1)     softmax of S while O grows     P = S
//   scales   of a token's key: factor of a column of S. Of its value: log2 of it is added to the column, so weights
//   come
//            with the scale in them; the sum takes it out again. Weights in f16 are relative to a recent maximum of
//            their row, at most 2^8 of it: the accumulators are rescaled only when a row's maximum grew by more than
//            that
//   splits   only where row tiles and heads do not fill the GPU; attention_prefill_join adds them
#pragma once

#include "hopper.cuh"
#include "prefill-tiles.cuh"

namespace pytq {

struct prefill_params {
    const char * q; // f32 [d, n_q, n_head, n_seq]
    const char * k; // blocks [n_kv, n_head_kv, n_seq]
    const char * v;
    const char * mask;   // f16 [n_kv, n_q, 1, n_seq_mask] or null
    const float * sinks; // [n_head] or null
    float * dst;         // f32 [d, n_head, n_q, n_seq]
    float * part;        // unnormalised outputs [seq][head_kv][row][split][d]; unused with one split
    float2 * meta;       // (reference exponent, sum) [seq][head_kv][row][split]
    long long q_nb1, q_nb2, q_nb3, k_nb1, k_nb2, k_nb3, v_nb1, v_nb2, v_nb3, mask_nb1, mask_nb3;
    int n_kv, n_q, n_head_kv, gqa, n_rows, n_seq, n_seq_mask;
    int n_tiles, n_splits;
    bool mask_vectors; // rows of the mask may be read 16 bytes at a time
    float scale, softcap, max_bias, m0, m1;
    int n_head_log2;
    hidden_constants hidden;
};

constexpr int prefill_rows = 128, prefill_tile = 64;

// Shared memory and roles of an instance. DECODERS: warps that decode, 4 or 8.
template <class K, class V, int DECODERS_, int STAGES_> struct prefill_shape {
    static constexpr int D = K::d, TILE = prefill_tile, DECODERS = DECODERS_, STAGES = STAGES_;
    static_assert(V::d == D && (D == 64 || D == 128), "head size");
    static constexpr int threads = 32 * (8 + DECODERS + 4);
    // Registers that the roles change to. A quarter of a multiprocessor runs 2 multipliers, a quarter of the decoders
    // and one finder; they share what the block got at its launch.
    static constexpr int entry_registers = DECODERS == 8 ? 96 : 128;
    static constexpr int finder_registers = DECODERS == 8 ? 32 : 40, decoder_registers = DECODERS == 8 ? 80 : 120;
    static constexpr int multiplier_registers =
        ((3 + DECODERS / 4) * entry_registers - finder_registers - DECODERS / 4 * decoder_registers) / 16 * 8;

    static constexpr int warp_tokens = TILE / DECODERS, items = warp_tokens / tile_lanes<K>::tokens;
    static_assert(items * tile_lanes<K>::tokens == warp_tokens, "whole warps");
    static constexpr int raw_stages = 3, list = 4, columns = STAGES + 2;
    static constexpr int k_pitch = raw_pitch<K>(), v_pitch = raw_pitch<V>();
    static constexpr int warp_raw = warp_tokens * (k_pitch + v_pitch);
    static constexpr int raw_bytes = DECODERS * warp_raw; // of a stage
    static constexpr int tile_bytes = TILE * 2 * D;
    // a column: (factor of S, addend) of a token, then 1 / scale of its value, then the tile and its flag
    static constexpr int column_inverse = 8 * TILE, column_info = column_inverse + 4 * TILE,
                         column_bytes = column_info + 16;

    // offsets from a multiple of 1024
    static constexpr int q_at = 0;
    static constexpr int k_at = q_at + prefill_rows * 2 * D;
    static constexpr int v_at = k_at + STAGES * tile_bytes;
    static constexpr int raw_at = v_at + STAGES * tile_bytes;
    static constexpr int columns_at = raw_at + raw_stages * raw_bytes;
    static constexpr int barriers_at = columns_at + columns * column_bytes;
    static constexpr int listed = 0, taken = listed + list, k_full = taken + list, k_empty = k_full + STAGES,
                         v_full = k_empty + STAGES, v_empty = v_full + STAGES, n_barriers = v_empty + STAGES;
    static constexpr int list_at = barriers_at + 8 * n_barriers, found_at = list_at + 4 * list;
    static constexpr int bytes = 1024 + found_at + 4 * 2 * 4;
};

inline void prefill_plan(prefill_params & p, int n_sm) {
    p.n_rows = p.gqa * p.n_q;
    p.n_tiles = (p.n_kv + prefill_tile - 1) / prefill_tile;
    p.mask_vectors = ((uintptr_t) p.mask | (uintptr_t) p.mask_nb1 | (uintptr_t) p.mask_nb3) % 16 == 0;
    p.hidden = make_hidden_constants();
    // the number of splits that wastes the least of the last wave; each costs a little
    const int blocks = (p.n_rows + prefill_rows - 1) / prefill_rows * p.n_head_kv * p.n_seq;
    double best = 1e30;
    p.n_splits = 1;
    for (int s = 1; s <= 32 && (s == 1 || (s * 16 <= p.n_tiles && s * blocks <= 4 * n_sm)); s++) {
        const int waves = (s * blocks + n_sm - 1) / n_sm;
        const double cost = (double) waves / s * (1.0 + 0.02 * (s - 1)) + 0.02 * (s > 1);
        if (cost < best * 0.97) {
            best = cost, p.n_splits = s;
        }
    }
}

inline size_t prefill_part_rows(const prefill_params & p) {
    return p.n_splits > 1 ? (size_t) p.n_seq * p.n_head_kv * p.n_rows * p.n_splits : 0;
}

#ifdef PYTQ_WGMMA

template <int I> struct prefill_constant {
    static constexpr int value = I;
};
template <class T> struct prefill_tag {
    using type = T;
};

PYTQ_DEV uint32_t pack_halves(float low, float high) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

// f16 mask value at any address of a half.
PYTQ_DEV float mask_value(const char * at) {
    return __half2float(*(const __half *) at);
}

template <class S> struct prefill_block {
    const prefill_params & p;
    uint32_t base; // shared address of a multiple of 1024
    int offset;    // the same in decode_smem
    int seq, head_kv, row0, split, tile_begin, tile_end;
    const char * mask;

    PYTQ_DEV uint32_t barrier(int i) const { return base + S::barriers_at + 8 * i; }
};

// The tiles of this block that some row sees, in order: 2 tile + (the mask matters), then -1. Each of 4 warps looks at
// every fourth tile, the first passes them on.
template <class S> PYTQ_DEV void prefill_find_tiles(const prefill_block<S> & b, int warp, int lane) {
    const prefill_params & p = b.p;
    const int q0 = b.row0 / p.gqa, n_q = (min(b.row0 + prefill_rows, p.n_rows) - 1) / p.gqa - q0 + 1;
    int * const found = (int *) (decode_smem + b.offset + S::found_at);
    int n = 0;
    const auto pass_on = [&](int entry) {
        phase_wait(b.barrier(S::taken + n % S::list), (n / S::list & 1) ^ 1);
        if (lane == 0) {
            *(int *) (decode_smem + b.offset + S::list_at + 4 * (n % S::list)) = entry;
            phase_arrive(b.barrier(S::listed + n % S::list));
        }
        n++;
    };
#pragma unroll 1
    for (int tile = b.tile_begin + warp, turn = 0; tile - warp < b.tile_end; tile += 4, turn ^= 4) {
        const int t0 = tile * S::TILE;
        uint32_t any = 0, visible = tile < b.tile_end ? 1u : 0u;
        if (b.mask && tile < b.tile_end) {
            const char * const rows = b.mask + q0 * p.mask_nb1 + 2LL * t0;
            visible = 0;
            if (p.mask_vectors && t0 + S::TILE <= p.n_kv) {
                // 4 rows of 128 bytes at a time, 16 rows in flight
#pragma unroll 1
                for (int r0 = 0; r0 < n_q; r0 += 16) {
                    uint4 x[4];
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        const int r = min(r0 + (lane >> 3) + 4 * i, n_q - 1);
                        x[i] = *(const uint4 *) (rows + r * p.mask_nb1 + 16 * (lane & 7));
                    }
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        any |= x[i].x | x[i].y | x[i].z | x[i].w;
                        visible |= (x[i].x ^ 0xfc00fc00u) | (x[i].y ^ 0xfc00fc00u) | (x[i].z ^ 0xfc00fc00u) |
                                   (x[i].w ^ 0xfc00fc00u);
                    }
                }
            } else {
#pragma unroll 1
                for (int i = lane; i < n_q * S::TILE; i += 32) {
                    const int r = i / S::TILE, t = i % S::TILE;
                    if (t0 + t < p.n_kv) {
                        const uint32_t x = *(const unsigned short *) (rows + r * p.mask_nb1 + 2 * t);
                        any |= x, visible |= x ^ 0xfc00u;
                    }
                }
            }
        }
        const bool seen = __any_sync(0xffffffffu, visible != 0), matters = __any_sync(0xffffffffu, any != 0);
        if (lane == 0) {
            found[turn + warp] = seen ? 2 * tile + (matters ? 1 : 0) : -1;
        }
        named_sync(3, 128);
        if (warp == 0) {
#pragma unroll 1
            for (int i = 0; i < 4; i++) {
                const int entry = found[turn + i];
                if (entry >= 0) {
                    pass_on(entry);
                }
            }
        }
    }
    if (warp == 0) {
        pass_on(-1);
    }
}

// One decoding warp: tokens warp_tokens * warp .. of every tile.
template <class K, class V, class S> PYTQ_DEV void prefill_decode(const prefill_block<S> & b, int warp, int lane) {
    const prefill_params & p = b.p;
    using L = tile_lanes<K>;
    constexpr int TW = S::warp_tokens, IT = S::items;
    const char * const k_base = p.k + b.seq * p.k_nb3 + b.head_kv * p.k_nb2 + (long long) TW * warp * p.k_nb1;
    const char * const v_base = p.v + b.seq * p.v_nb3 + b.head_kv * p.v_nb2 + (long long) TW * warp * p.v_nb1;
    const int raw = b.offset + S::raw_at + warp * S::warp_raw;
    // 64 tokens times any stride keep the alignment to 16 bytes, so what depends on it is found once
    const auto lead = [](const char * base, long long nb1, int t) { return (int) ((uintptr_t) (base + t * nb1) & 15); };

    // words of this lane: byte offsets in a stage of the warp's raw bytes
    int k_word[IT], v_word[IT];
    uint32_t k_shift[IT], v_shift[IT];
#pragma unroll
    for (int i = 0; i < IT; i++) {
        const int t = i * L::tokens + L::token(lane);
        const int kb = lead(k_base, p.k_nb1, t) + K::data_off, vb = lead(v_base, p.v_nb1, t) + V::data_off;
        k_word[i] = raw + t * S::k_pitch + ((kb & ~3) + 4 * L::word(lane)), k_shift[i] = 8 * (kb & 3);
        v_word[i] = raw + TW * S::k_pitch + t * S::v_pitch + ((vb & ~3) + 4 * L::word(lane)), v_shift[i] = 8 * (vb & 3);
    }
    const int scale_token = lane % TW; // whose scales this lane turns into columns
    const int k_scale = raw + scale_token * S::k_pitch + lead(k_base, p.k_nb1, scale_token);
    const int v_scale = raw + TW * S::k_pitch + scale_token * S::v_pitch + lead(v_base, p.v_nb1, scale_token);
    // first unit of this lane in a tile; unit k lies at this ^ 16 k
    const int store = tile_at(S::TILE, TW * warp + L::token(lane), 4 * L::word(lane));

    const uint32_t zero = (uint32_t) lane * p.hidden.zero;
    offset_table<K> k_table;
    offset_table<V> v_table;
    k_table.init(zero);
    if constexpr (K::code == V::code && K::bits == V::bits) {
        v_table = k_table;
    } else {
        v_table.init(zero);
    }
    const uint32_t bias = own_register(0x01010101u - 1u, zero);

    // 16-byte pieces of this warp's tokens of a tile
    const auto fetch_side = [&](auto pitch_constant, int block_bytes, const char * base, long long nb1, int to,
                                int n_tok) {
        constexpr int PER = decltype(pitch_constant)::value / 16, N = (TW * PER + 31) / 32;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int piece = 32 * i + lane, t = piece / PER, c = piece - t * PER;
            const char * const block = base + t * nb1;
            const int off = (int) ((uintptr_t) block & 15);
            if (t < n_tok && 16 * c < off + block_bytes && (TW * PER % 32 == 0 || t < TW)) {
                copy16_to_shared(b.base - b.offset + to + 16 * piece, block - off + 16 * c);
            }
        }
    };
    bool ended = false;
    const auto fetch = [&](int n) { // of entry n of the list; returns the entry
        int entry = -1;
        if (!ended) {
            phase_wait(b.barrier(S::listed + n % S::list), n / S::list & 1);
            entry = *(const int *) (decode_smem + b.offset + S::list_at + 4 * (n % S::list));
            __syncwarp();
            if (lane == 0) {
                phase_arrive(b.barrier(S::taken + n % S::list));
            }
            ended = entry < 0;
            if (!ended) {
                const int t0 = (entry >> 1) * S::TILE, n_tok = p.n_kv - t0 - TW * warp;
                const int to = raw + n % S::raw_stages * S::raw_bytes;
                fetch_side(prefill_constant<S::k_pitch>(), K::block_bytes, k_base + t0 * p.k_nb1, p.k_nb1, to, n_tok);
                fetch_side(prefill_constant<S::v_pitch>(), V::block_bytes, v_base + t0 * p.v_nb1, p.v_nb1,
                           to + TW * S::k_pitch, n_tok);
            }
        }
        copies_commit();
        return entry;
    };

    int entry = fetch(0), next = fetch(1);
    int stage = 0, phase = 0, raw_stage = 0;
#pragma unroll 1
    for (int n = 0;; n++) {
        const int after = fetch(n + 2);
        copies_wait<2>();
        __syncwarp();
        phase_wait(b.barrier(S::k_empty + stage), phase ^ 1);
        const int columns = b.offset + S::columns_at + n % S::columns * S::column_bytes;
        if (warp == 0 && lane == 0) {
            *(int *) (decode_smem + columns + S::column_info) = entry;
        }
        const int shift_stage = raw_stage * S::raw_bytes;
        if (entry >= 0) {
            if (lane < TW) {
                const bool valid = (entry >> 1) * S::TILE + TW * warp + scale_token < p.n_kv;
                const int t = TW * warp + scale_token;
                const float s = block_scale<K, 0>(k_scale + shift_stage) * book<K::code, K::bits>::step();
                const float l = block_log2_scale<V>(v_scale + shift_stage);
                *(float2 *) (decode_smem + columns + 8 * t) = make_float2(valid ? s : 0.0f, valid ? l : -INFINITY);
                *(float *) (decode_smem + columns + S::column_inverse + 4 * t) = valid ? exp2_fast(-l) : 0.0f;
            }
            const auto decode_side = [&](auto side, const auto & table, const int * word, const uint32_t * shift,
                                         int to) {
                using T = typename decltype(side)::type;
#pragma unroll
                for (int i = 0; i < IT; i++) {
                    uint32_t plane[T::bits], prev = 0;
                    tile_planes<T>(word[i] + shift_stage, shift[i], plane);
                    if constexpr (T::code == PYTQ_CODE_TRELLIS) {
                        prev = __shfl_sync(0xffffffffu, plane[0], L::before(lane) & 31);
                        prev = L::word(lane) == 0 ? 0u : prev;
                    }
                    uint4 unit[4];
                    level_halves<T>(table, p.hidden, bias, plane, prev, unit);
                    const int at = b.offset + to + stage * S::tile_bytes;
#pragma unroll
                    for (int k = 0; k < 4; k++) {
                        *(uint4 *) (decode_smem + at + (store ^ 16 * k) + i * L::tokens * 128) = unit[k];
                    }
                }
                publish_to_wgmma();
            };
            decode_side(prefill_tag<K>(), k_table, k_word, k_shift, S::k_at);
            __syncwarp();
            if (lane == 0) {
                phase_arrive(b.barrier(S::k_full + stage));
            }
            phase_wait(b.barrier(S::v_empty + stage), phase ^ 1);
            decode_side(prefill_tag<V>(), v_table, v_word, v_shift, S::v_at);
            __syncwarp();
            if (lane == 0) {
                phase_arrive(b.barrier(S::v_full + stage));
            }
        } else {
            __syncwarp();
            if (lane == 0) {
                phase_arrive(b.barrier(S::k_full + stage));
            }
            break;
        }
        entry = next, next = after;
        raw_stage = raw_stage + 1 == S::raw_stages ? 0 : raw_stage + 1;
        if (++stage == S::STAGES) {
            stage = 0, phase ^= 1;
        }
    }
    copies_wait<0>();
}

// One warpgroup of 64 rows.
template <class K, class V, class S, bool Q_REGISTERS>
PYTQ_DEV void prefill_multiply(const prefill_block<S> & b, int group, int thread) {
    constexpr int D = S::D, TILE = S::TILE;
    constexpr float LOG2E = 1.44269504f;
    const prefill_params & p = b.p;
    const int lane = thread & 31, warp = thread >> 5, g = lane >> 2, j = lane & 3;
    const int q_at = S::q_at + group * 64 * 2 * D;

    // Queries to f16, with everything that multiplies a logit but the key's scale.
    {
        const float factor = p.softcap != 0.0f ? p.scale / p.softcap : p.scale * LOG2E;
#pragma unroll 1
        for (int i = thread; i < 64 * (D / 32); i += 128) {
            const int r = i / (D / 32), w = i % (D / 32), row = b.row0 + group * 64 + r;
            float4 x[8];
            const int iq = row / p.gqa;
            const float4 * const src = (const float4 *) (p.q + b.seq * p.q_nb3 + iq * p.q_nb1 +
                                                         (b.head_kv * p.gqa + row - iq * p.gqa) * p.q_nb2) +
                                       8 * w;
#pragma unroll
            for (int n = 0; n < 8; n++) {
                x[n] = row < p.n_rows ? src[n] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
            }
            const auto unit = [&](int k, auto pick) {
                uint32_t h[4];
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    h[n] = pack_halves(pick(x[2 * n]) * factor, pick(x[2 * n + 1]) * factor);
                }
                *(uint4 *) (decode_smem + b.offset + q_at + tile_at(64, r, 4 * w + k)) =
                    make_uint4(h[0], h[1], h[2], h[3]);
            };
            unit(0, [](float4 f) { return f.x; });
            unit(1, [](float4 f) { return f.y; });
            unit(2, [](float4 f) { return f.z; });
            unit(3, [](float4 f) { return f.w; });
        }
        publish_to_wgmma();
        named_sync(1 + group, 128);
    }
    // Q as the A operand: from shared memory, or once to registers.
    uint32_t qa[Q_REGISTERS ? D / 16 : 1][4];
    const uint64_t q_desc = swizzled_operand(b.base + q_at, 0);
    if constexpr (Q_REGISTERS) {
#pragma unroll
        for (int s = 0; s < D / 16; s++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                qa[s][i] =
                    shared_word(b.offset + q_at + tile_at(64, 16 * warp + g + 8 * (i & 1), 2 * s + (i >> 1)) + 4 * j);
            }
        }
    }

    float o[D / 2], s[TILE / 2];
    uint32_t weights[TILE / 4];
    float top[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f}, alpha[2];
#pragma unroll
    for (int i = 0; i < D / 2; i++) {
        o[i] = 0.0f;
    }
    const auto row_of = [&](int h) { return min(b.row0 + group * 64 + 16 * warp + g + 8 * h, p.n_rows - 1); };
    float slope[2] = {LOG2E, LOG2E};
    if (p.max_bias > 0.0f) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int head = b.head_kv * p.gqa + row_of(h) % p.gqa;
            slope[h] *= head < p.n_head_log2 ? powf(p.m0, (float) (head + 1))
                                             : powf(p.m1, (float) (2 * (head - p.n_head_log2) + 1));
        }
    }
    int stage = 0, phase = 0;

    const auto logits = [&]() { // S = Q K in the background
        const uint32_t keys = b.base + S::k_at + stage * S::tile_bytes;
        pin(s);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            const uint64_t kd = swizzled_operand(keys + (k >> 2) * TILE * 128 + (k & 3) * 32, 0);
            if constexpr (Q_REGISTERS) {
                wgmma_rs(s, qa[k], kd, k > 0);
            } else {
                wgmma_ss(s, q_desc + ((k >> 2) * 64 * 128 + (k & 3) * 32) / 16, kd, k > 0);
            }
        }
        wgmma_commit();
    };
    const auto output = [&](int from) { // O += P V in the background
        const uint32_t values = b.base + S::v_at + from * S::tile_bytes;
        pin(o);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < TILE / 16; k++) {
            wgmma_rs_outer(o, &weights[4 * k], swizzled_operand(values + k * 2048, TILE * 128));
        }
        wgmma_commit();
    };
    // Softmax of S: leaves weights in S, sets alpha; returns whether the accumulators have to be rescaled.
    const auto softmax = [&](int n, int entry) {
        const int columns = b.offset + S::columns_at + n % S::columns * S::column_bytes + 16 * j;
        if (p.softcap != 0.0f) {
#pragma unroll
            for (int c = 0; c < TILE / 8; c++) {
                const float4 f = *(const float4 *) (decode_smem + columns + 64 * c);
#pragma unroll
                for (int i = 0; i < 4; i++) { // tanh(x) = 1 - 2 / (1 + e^(2 x))
                    const float x = s[4 * c + i] * (i & 1 ? f.z : f.x);
                    const float t = 1.0f - __fdividef(2.0f, 1.0f + exp2_fast(fminf(2.0f * LOG2E * x, 80.0f)));
                    s[4 * c + i] = fmaf(p.softcap * LOG2E, t, i & 1 ? f.w : f.y);
                }
            }
        } else {
#pragma unroll
            for (int c = 0; c < TILE / 8; c++) {
                const float4 f = *(const float4 *) (decode_smem + columns + 64 * c);
                s[4 * c + 0] = fmaf(s[4 * c + 0], f.x, f.y), s[4 * c + 1] = fmaf(s[4 * c + 1], f.z, f.w);
                s[4 * c + 2] = fmaf(s[4 * c + 2], f.x, f.y), s[4 * c + 3] = fmaf(s[4 * c + 3], f.z, f.w);
            }
        }
        if (entry & 1) {
            const int t0 = (entry >> 1) * TILE;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const char * const mask = b.mask + (row_of(h) / p.gqa) * p.mask_nb1;
#pragma unroll
                for (int i = 0; i < TILE / 4; i++) {
                    const int t = t0 + 8 * (i >> 1) + 2 * j + (i & 1), at = 4 * (i >> 1) + 2 * h + (i & 1);
                    if (t < p.n_kv) {
                        s[at] = fmaf(mask_value(mask + 2LL * t), slope[h], s[at]);
                    }
                }
            }
        }
        float m[2] = {s[0], s[2]};
#pragma unroll
        for (int i = 0; i < TILE / 2; i++) {
            m[i >> 1 & 1] = fmaxf(m[i >> 1 & 1], s[i]);
        }
        bool grew = false;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            m[h] = fmaxf(m[h], __shfl_xor_sync(0xffffffffu, m[h], 1));
            m[h] = fmaxf(m[h], __shfl_xor_sync(0xffffffffu, m[h], 2));
            const float top_new = m[h] > top[h] + 8.0f ? m[h] : top[h];
            alpha[h] = exp2_fast(top[h] - top_new);
            grew |= top_new != top[h];
            top[h] = top_new;
            sum[h] *= alpha[h];
        }
#pragma unroll
        for (int c = 0; c < TILE / 8; c++) {
            const float2 inv = *(const float2 *) (decode_smem + columns - 8 * j + S::column_inverse + 32 * c);
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const float e = exp2_fast(s[4 * c + i] - top[i >> 1]);
                s[4 * c + i] = e;
                sum[i >> 1] = fmaf(e, i & 1 ? inv.y : inv.x, sum[i >> 1]);
            }
        }
        return (bool) __any_sync(0xffffffffu, grew);
    };
    const auto pack = [&]() { // accumulator fragments of 8 columns are halves of A fragments of 16
#pragma unroll
        for (int i = 0; i < TILE / 4; i++) {
            weights[i] = pack_halves(s[2 * i], s[2 * i + 1]);
        }
    };
    const auto leave = [&](int barrier) {
        __syncwarp();
        if (lane == 0) {
            phase_arrive(b.barrier(barrier));
        }
    };
    const auto entry_of = [&](int n) {
        return *(const int *) (decode_smem + b.offset + S::columns_at + n % S::columns * S::column_bytes +
                               S::column_info);
    };

    phase_wait(b.barrier(S::k_full), 0);
    int entry = entry_of(0);
    if (entry >= 0) {
        logits();
        wgmma_wait<0>();
        pin(s);
        leave(S::k_empty);
        softmax(0, entry);
        pack();
#pragma unroll 1
        for (int n = 1;; n++) {
            const int before = stage, before_phase = phase;
            if (++stage == S::STAGES) {
                stage = 0, phase ^= 1;
            }
            phase_wait(b.barrier(S::k_full + stage), phase);
            entry = entry_of(n);
            if (entry < 0) {
                phase_wait(b.barrier(S::v_full + before), before_phase);
                output(before);
                wgmma_wait<0>();
                pin(o);
                break;
            }
            logits();
            phase_wait(b.barrier(S::v_full + before), before_phase);
            output(before);
            wgmma_wait<1>();
            pin(s);
            leave(S::k_empty + stage);
            const bool grew = softmax(n, entry);
            wgmma_wait<0>();
            pin(o);
            leave(S::v_empty + before);
            if (grew) {
#pragma unroll
                for (int i = 0; i < D / 2; i++) {
                    o[i] *= alpha[i >> 1 & 1];
                }
            }
            pack();
        }
    }

    // Columns 8 c + 2 j + e of four neighbouring c are four neighbouring coordinates.
    constexpr float step = book<V::code, V::bits>::step();
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const int row = b.row0 + group * 64 + 16 * warp + g + 8 * h;
        float l = sum[h];
        l += __shfl_xor_sync(0xffffffffu, l, 1);
        l += __shfl_xor_sync(0xffffffffu, l, 2);
        if (row >= p.n_rows) {
            continue;
        }
        const int iq = row / p.gqa, head = b.head_kv * p.gqa + row - iq * p.gqa;
        float * out;
        float f = step;
        if (p.n_splits == 1) {
            if (p.sinks) {
                const float sink = p.sinks[head] * LOG2E, t = fmaxf(top[h], sink), down = exp2f(top[h] - t);
                l = l * down + exp2f(sink - t);
                f *= down;
            }
            f = l > 0.0f ? f / l : 0.0f;
            out = p.dst + (((long long) b.seq * p.n_q + iq) * p.n_head_kv * p.gqa + head) * D;
        } else {
            const long long to =
                (((long long) b.seq * p.n_head_kv + b.head_kv) * p.n_rows + row) * p.n_splits + b.split;
            out = p.part + to * D;
            if (j == 0) {
                p.meta[to] = make_float2(top[h], l);
            }
        }
#pragma unroll
        for (int w = 0; w < D / 32; w++) {
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const float * const x = &o[16 * w + 2 * h + e];
                *(float4 *) (out + 32 * w + 8 * j + 4 * e) = make_float4(x[0] * f, x[4] * f, x[8] * f, x[12] * f);
            }
        }
    }
}

#endif // PYTQ_WGMMA

template <int KT, int VT, int DECODERS, int STAGES, bool Q_REGISTERS>
__global__ void __launch_bounds__(prefill_shape<type<KT>, type<VT>, DECODERS, STAGES>::threads, 1)
    attention_prefill(const PYTQ_GRID_CONSTANT prefill_params p) {
#ifdef PYTQ_WGMMA
    using K = type<KT>;
    using V = type<VT>;
    using S = prefill_shape<K, V, DECODERS, STAGES>;
    const int lane = threadIdx.x & 31, warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
    const uint32_t smem = (uint32_t) __cvta_generic_to_shared(decode_smem);
    const int offset = (int) (-smem & 1023u);
    const int seq = blockIdx.z / p.n_head_kv, split = blockIdx.x;
    // the last rows see the most where the mask is causal: they go first
    prefill_block<S> b = {p,
                          smem + offset,
                          offset,
                          seq,
                          (int) blockIdx.z - seq * p.n_head_kv,
                          (int) (gridDim.y - 1 - blockIdx.y) * prefill_rows,
                          split,
                          (int) ((long long) p.n_tiles * split / p.n_splits),
                          (int) ((long long) p.n_tiles * (split + 1) / p.n_splits),
                          p.mask ? p.mask + (p.n_seq_mask == 1 ? 0 : seq % p.n_seq_mask) * p.mask_nb3 : nullptr};
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::n_barriers; i++) {
            const bool by_multipliers = (i >= S::k_empty && i < S::v_full) || i >= S::v_empty;
            phase_init(b.barrier(i), i < S::taken ? 1 : by_multipliers ? 8 : DECODERS);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    grid_wait();
    grid_trigger();
    if (warp < 8) {
        registers_grow<S::multiplier_registers>();
        prefill_multiply<K, V, S, Q_REGISTERS>(b, warp >> 2, threadIdx.x & 127);
    } else if (warp < 8 + DECODERS) {
        registers_shrink<S::decoder_registers>();
        prefill_decode<K, V, S>(b, warp - 8, lane);
    } else {
        registers_shrink<S::finder_registers>();
        prefill_find_tiles(b, warp - 8 - DECODERS, lane);
    }
#endif
}

// Adds the splits of a row: one warp per row, grid (rows / 8, head_kv, seq).
constexpr int prefill_join_warps = 8;
template <int D>
__global__ void __launch_bounds__(32 * prefill_join_warps)
    attention_prefill_join(const PYTQ_GRID_CONSTANT prefill_params p) {
    constexpr int N = D / 32;
    constexpr float LOG2E = 1.44269504f;
    const int lane = threadIdx.x & 31, row = blockIdx.x * prefill_join_warps + (threadIdx.x >> 5);
    grid_wait();
    if (row >= p.n_rows) {
        return;
    }
    const long long at = (((long long) blockIdx.z * p.n_head_kv + blockIdx.y) * p.n_rows + row) * p.n_splits;
    const int iq = row / p.gqa, head = blockIdx.y * p.gqa + row - iq * p.gqa;
    float top = -1e30f, sum = 0.0f, v[N] = {};
    for (int s = 0; s < p.n_splits; s++) {
        top = fmaxf(top, p.meta[at + s].x);
    }
    if (p.sinks) {
        const float sink = p.sinks[head] * LOG2E;
        top = fmaxf(top, sink);
        sum = exp2f(sink - top);
    }
    for (int s = 0; s < p.n_splits; s++) {
        const float2 m = p.meta[at + s];
        const float f = exp2f(m.x - top);
        sum = fmaf(m.y, f, sum);
#pragma unroll
        for (int i = 0; i < N; i++) {
            v[i] = fmaf(p.part[(at + s) * D + 32 * i + lane], f, v[i]);
        }
    }
    const float f = sum > 0.0f ? 1.0f / sum : 0.0f;
    float * const out = p.dst + (((long long) blockIdx.z * p.n_q + iq) * p.n_head_kv * p.gqa + head) * D;
#pragma unroll
    for (int i = 0; i < N; i++) {
        out[32 * i + lane] = v[i] * f;
    }
}

} // namespace pytq

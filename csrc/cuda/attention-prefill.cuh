// Attention of many query rows over a compressed cache on compute capability 9.0: blocks are decoded straight into
// shared memory as f16 and read there by wgmma; no copy of the cache exists anywhere else.
//
//   grid     (splits of the sequence, tiles of 128 query rows, KV heads x sequences); a row is a pair (query, query
//            head of the KV head), so all rows of a block share what is decoded
//   block    2 warpgroups of 64 rows each that multiply, 4 warps that decode, 4 that find tiles with anything visible
//   tile     64 tokens. Finders read the mask ahead of everyone and pass on tiles that some row sees, with a flag if
//            some value of the mask is not 0 and with the tokens' scales. Decoders fetch their own tokens' bytes two
//            tiles ahead and write tiles of keys and values (prefill-tiles.cuh). Per warpgroup and tile j, with
//            products in the background:
//              S = Q K(j)     O += P V(j - 1)     softmax of S while O grows     P = S
//   scales   a key's is the factor of a column of S, a value's is in the tile. Weights in f16 are relative to a recent
//            maximum of their row, at most 2^8 of it: accumulators are rescaled only when a maximum grew by more
//   memory   shared memory that one warp writes for others by ordinary stores is handed over by a barrier at which
//            every lane arrives (listed, taken); tiles for wgmma are fenced by every lane and announced by one
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

// Shared memory and roles of an instance. STAGES: tiles of keys and of values that exist at a time.
template <class K, class V, int STAGES_> struct prefill_shape {
    static constexpr int D = K::d, TILE = prefill_tile, STAGES = STAGES_;
    static_assert(V::d == D && (D == 64 || D == 128), "head size");
    // warps: 8 multiply, 4 decode, 4 find
    static constexpr int decoders = 4, threads = 32 * (8 + decoders + 4);
    // Registers that the roles change to: a quarter of a multiprocessor runs 2 multipliers, a decoder and a finder.
    static constexpr int finder_registers = 24, decoder_registers = 88;
    static constexpr int multiplier_registers = (512 - finder_registers - decoder_registers) / 2;

    static constexpr int warp_tokens = TILE / decoders, items = warp_tokens / tile_lanes<K>::tokens;
    static_assert(items * tile_lanes<K>::tokens == warp_tokens, "whole warps");
    // list: tiles between the finders and the slowest multiplier
    static constexpr int raw_stages = 3, list = 8;
    static constexpr int k_pitch = raw_pitch<K>(), v_pitch = raw_pitch<V>();
    static constexpr int warp_raw = warp_tokens * (k_pitch + v_pitch);
    static constexpr int raw_bytes = decoders * warp_raw; // of a stage
    static constexpr int tile_bytes = TILE * 2 * D;
    // columns of an entry: factors of the tokens' logits, then of their values (two halves each), then the entry
    static constexpr int column_values = 4 * TILE, column_entry = column_values + 4 * TILE,
                         column_bytes = column_entry + 16;

    // offsets from a multiple of 1024
    static constexpr int q_at = 0;
    static constexpr int k_at = q_at + prefill_rows * 2 * D;
    static constexpr int v_at = k_at + STAGES * tile_bytes;
    static constexpr int raw_at = v_at + STAGES * tile_bytes;
    static constexpr int columns_at = raw_at + raw_stages * raw_bytes;
    static constexpr int barriers_at = columns_at + list * column_bytes;
    // (keys of a tile are complete only after the values of the tile before, so values need no barrier of their own)
    static constexpr int listed = 0, taken = listed + list, k_full = taken + list, k_empty = k_full + STAGES,
                         v_empty = k_empty + STAGES, n_barriers = v_empty + STAGES;
    static constexpr int found_at = barriers_at + 8 * n_barriers;
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

// Scale of a block in global memory: its bits, and what they mean.
template <class T> PYTQ_DEV uint32_t scale_bits(const char * block) {
    return T::scale_bytes == 1 ? (uint32_t) *(const uint8_t *) block : (uint32_t) *(const unsigned short *) block;
}
template <class T> PYTQ_DEV float scale_of(uint32_t bits) {
    return T::scale_bytes == 1 ? log8_scale(bits) : half_bits(bits);
}

// The tiles of this block that some row sees, in order: 2 tile + (the mask matters), then -1, each with its columns.
// Each of 4 warps takes every fourth tile.
template <class K, class V, class S> PYTQ_DEV void prefill_find_tiles(const prefill_block<S> & b, int warp, int lane) {
    const prefill_params & p = b.p;
    const int q0 = b.row0 / p.gqa, n_q = (min(b.row0 + prefill_rows, p.n_rows) - 1) / p.gqa - q0 + 1;
    int * const found = (int *) (decode_smem + b.offset + S::found_at);
    const char * const k_scales = p.k + b.seq * p.k_nb3 + b.head_kv * p.k_nb2;
    const char * const v_scales = p.v + b.seq * p.v_nb3 + b.head_kv * p.v_nb2;
    int n = 0; // entries that all warps have passed on
    const auto column = [&](int i) { return b.offset + S::columns_at + i % S::list * S::column_bytes; };
    const auto wait_for_place = [&](int i) { phase_wait(b.barrier(S::taken + i % S::list), (i / S::list & 1) ^ 1); };
    const auto pass_on = [&](int i, int entry) {
        if (lane == 0) {
            *(int *) (decode_smem + column(i) + S::column_entry) = entry;
        }
        phase_arrive(b.barrier(S::listed + i % S::list));
    };
#pragma unroll 1
    for (int first = b.tile_begin, turn = 0; first < b.tile_end; first += 4, turn ^= 4) {
        const int tile = first + warp, t0 = tile * S::TILE;
        uint32_t any = 0, visible = 0, ks[2] = {}, vs[2] = {};
        if (tile < b.tile_end) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int t = min(t0 + lane + 32 * i, p.n_kv - 1);
                ks[i] = scale_bits<K>(k_scales + t * p.k_nb1);
                vs[i] = scale_bits<V>(v_scales + t * p.v_nb1);
            }
            visible = b.mask ? 0u : 1u;
            any = t0 + S::TILE > p.n_kv; // tokens past the end are masked
            const char * const rows = b.mask + q0 * p.mask_nb1 + 2LL * t0;
            if (b.mask && p.mask_vectors && t0 + S::TILE <= p.n_kv) {
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
            } else if (b.mask) {
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
            found[turn + warp] = seen;
        }
        named_sync(3, 128);
        int place = n;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            place += i < warp ? found[turn + i] : 0;
            n += found[turn + i];
        }
        if (seen) {
            wait_for_place(place);
            const int to = column(place);
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int t = lane + 32 * i;
                const bool valid = t0 + t < p.n_kv;
                const float kf = scale_of<K>(ks[i]) * book<K::code, K::bits>::step();
                const float vf = scale_of<V>(vs[i]) * book<V::code, V::bits>::step();
                *(float *) (decode_smem + to + 4 * t) = valid ? kf : 0.0f;
                *(uint32_t *) (decode_smem + to + S::column_values + 4 * t) = valid ? half_factor(vf) : 0u;
            }
            pass_on(place, 2 * tile + (matters ? 1 : 0));
        }
    }
    if (warp == 0) {
        wait_for_place(n);
        pass_on(n, -1);
    }
}

// 16-byte pieces of one warp's blocks of a tile, as its lanes copy them.
template <class T, int TOKENS> struct prefill_pieces {
    static constexpr int per = raw_pitch<T>() / 16, n = (TOKENS * per + 31) / 32;
    const char * from[n]; // in tile 0
    int token[n];         // counted from the warp's first; large if there is nothing to copy
    int step;             // bytes between tiles

    PYTQ_DEV void init(const char * base, long long nb1, int tile_tokens, int lane) {
        step = (int) nb1 * tile_tokens;
#pragma unroll
        for (int i = 0; i < n; i++) {
            const int piece = 32 * i + lane, t = piece / per, c = piece - t * per;
            const char * const block = base + t * nb1;
            const int off = (int) ((uintptr_t) block & 15);
            from[i] = block - off + 16 * c;
            token[i] = t < TOKENS && 16 * c < off + T::block_bytes ? t : 1 << 30;
        }
    }
    PYTQ_DEV void copy(uint32_t to, int tile, int n_tok, int lane) const {
        const long long skip = (long long) tile * step;
#pragma unroll
        for (int i = 0; i < n; i++) {
            if (token[i] < n_tok) {
                copy16_to_shared(to + 16 * (32 * i + lane), from[i] + skip);
            }
        }
    }
};

// One decoding warp: tokens warp_tokens * warp .. of every tile.
template <class K, class V, class S> PYTQ_DEV void prefill_decode(const prefill_block<S> & b, int warp, int lane) {
    const prefill_params & p = b.p;
    using L = tile_lanes<K>;
    constexpr int TW = S::warp_tokens;
    const char * const k_base = p.k + b.seq * p.k_nb3 + b.head_kv * p.k_nb2 + (long long) TW * warp * p.k_nb1;
    const char * const v_base = p.v + b.seq * p.v_nb3 + b.head_kv * p.v_nb2 + (long long) TW * warp * p.v_nb1;
    const int raw = b.offset + S::raw_at + warp * S::warp_raw;
    const uint32_t raw_address = b.base - b.offset + raw;

    prefill_pieces<K, TW> k_pieces;
    prefill_pieces<V, TW> v_pieces;
    k_pieces.init(k_base, p.k_nb1, S::TILE, lane);
    v_pieces.init(v_base, p.v_nb1, S::TILE, lane);
    tile_words<K, TW, false> k_words;
    tile_words<V, TW, true> v_words;
    k_words.init(raw, k_base, p.k_nb1, lane);
    v_words.init(raw + TW * S::k_pitch, v_base, p.v_nb1, lane);
    int unit_at[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
        unit_at[k] = b.offset + S::k_at + tile_at(S::TILE, TW * warp + L::token(lane), 4 * L::word(lane) + k);
    }

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

    int fetched = 0, fetch_stage = 0;
    bool ended = false;
    const auto fetch = [&]() { // the next entry's bytes; returns the entry
        int entry = -1;
        if (!ended) {
            const int i = fetched % S::list;
            phase_wait(b.barrier(S::listed + i), fetched / S::list & 1);
            entry = *(const int *) (decode_smem + b.offset + S::columns_at + i * S::column_bytes + S::column_entry);
            ended = entry < 0;
            if (!ended) {
                const int tile = entry >> 1, n_tok = p.n_kv - tile * S::TILE - TW * warp;
                k_pieces.copy(raw_address + fetch_stage, tile, n_tok, lane);
                v_pieces.copy(raw_address + fetch_stage + TW * S::k_pitch, tile, n_tok, lane);
            }
            fetched++;
            fetch_stage = fetch_stage == (S::raw_stages - 1) * S::raw_bytes ? 0 : fetch_stage + S::raw_bytes;
        }
        copies_commit();
        return entry;
    };
    const auto leave = [&](int barrier) {
        __syncwarp();
        if (lane == 0) {
            phase_arrive(b.barrier(barrier));
        }
    };
    const auto pass_on = [&](int barrier) {
        publish_to_wgmma();
        leave(barrier);
    };
    // factors of this warp's values
    const int values = b.offset + S::columns_at + S::column_values + 4 * TW * warp;

    int entry = fetch(), next = fetch();
    int stage = 0, phase = 1, raw_stage = 0, place = 0;
    copies_wait<1>();
    __syncwarp();
    if (entry >= 0) {
        k_words.load(0, 0, lane);
    }
    // Whatever takes a while (loads, stores that a barrier publishes) has other work between its start and its end.
#pragma unroll 1
    while (entry >= 0) {
        phase_wait(b.barrier(S::k_empty + stage), phase);
        k_words.decode(k_table, p.hidden, bias, unit_at, stage * S::tile_bytes, lane);
        v_words.load(raw_stage, values + place * S::column_bytes, lane);
        phase_arrive(b.barrier(S::taken + place));
        place = (place + 1) % S::list;
        pass_on(S::k_full + stage);
        phase_wait(b.barrier(S::v_empty + stage), phase);
        v_words.decode(v_table, p.hidden, bias, unit_at, stage * S::tile_bytes + S::v_at - S::k_at, lane);
        entry = next;
        next = fetch();
        copies_wait<1>();
        __syncwarp();
        raw_stage = raw_stage == (S::raw_stages - 1) * S::raw_bytes ? 0 : raw_stage + S::raw_bytes;
        if (entry >= 0) {
            k_words.load(raw_stage, 0, lane);
        }
        publish_to_wgmma();
        if (++stage == S::STAGES) {
            stage = 0, phase ^= 1;
        }
    }
    // the entry of the end
    phase_wait(b.barrier(S::k_empty + stage), phase);
    pass_on(S::k_full + stage);
    copies_wait<0>();
}

// One warpgroup of 64 rows.
template <class K, class V, class S>
PYTQ_DEV void prefill_multiply(const prefill_block<S> & b, int group, int warp, int lane) {
    constexpr int D = S::D, TILE = S::TILE;
    constexpr float LOG2E = 1.44269504f;
    const prefill_params & p = b.p;
    const int thread = 32 * warp + lane, g = lane >> 2, j = lane & 3;
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
        named_sync(1 + group, 128);
    }
    uint32_t qa[D / 16][4]; // the A operand
#pragma unroll
    for (int k = 0; k < D / 16; k++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            qa[k][i] =
                shared_word(b.offset + q_at + tile_at(64, 16 * warp + g + 8 * (i & 1), 2 * k + (i >> 1)) + 4 * j);
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
    // (opaque: or the division would be done in every turn of the loop)
    const uint32_t query[2] = {opaque(row_of(0) / p.gqa), opaque(row_of(1) / p.gqa)};
    float slope[2] = {LOG2E, LOG2E};
    if (p.max_bias > 0.0f) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const int head = b.head_kv * p.gqa + row_of(h) - (int) query[h] * p.gqa;
            slope[h] *= head < p.n_head_log2 ? powf(p.m0, (float) (head + 1))
                                             : powf(p.m1, (float) (2 * (head - p.n_head_log2) + 1));
        }
    }
    const swizzled_operand k_operand(b.base + S::k_at, 0), v_operand(b.base + S::v_at, TILE * 128);

    const auto logits = [&](int stage) { // S = Q K in the background
        const swizzled_operand keys = k_operand + stage * S::tile_bytes;
        pin(s);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < D / 16; k++) {
            wgmma_rs(s, qa[k], keys.at((k >> 2) * TILE * 128 + (k & 3) * 32), k > 0);
        }
        wgmma_commit();
    };
    const auto output = [&](const swizzled_operand & values) { // O += P V in the background
        pin(o);
        wgmma_fence();
#pragma unroll
        for (int k = 0; k < TILE / 16; k++) {
            wgmma_rs_outer(o, &weights[4 * k], values.at(k * 2048));
        }
        wgmma_commit();
    };
    // Factors of this lane's pairs of columns. (Loads of shared memory queue behind products issued before them.)
    float2 factor[TILE / 8];
    const auto load_factors = [&](int at) {
#pragma unroll
        for (int c = 0; c < TILE / 8; c++) {
            factor[c] = *(const float2 *) (decode_smem + at + 32 * c + 8 * j);
        }
    };
    // Softmax of S: leaves weights in S, sets alpha; returns whether the accumulators have to be rescaled.
    const auto softmax = [&](int entry) {
#pragma unroll
        for (int c = 0; c < TILE / 8; c++) {
            s[4 * c + 0] *= factor[c].x, s[4 * c + 1] *= factor[c].y;
            s[4 * c + 2] *= factor[c].x, s[4 * c + 3] *= factor[c].y;
        }
        if (p.softcap != 0.0f) {
#pragma unroll
            for (int i = 0; i < TILE / 2; i++) { // tanh(x) = 1 - 2 / (1 + e^(2 x))
                const float e = exp2_fast(fminf(2.0f * LOG2E * s[i], 80.0f));
                s[i] = p.softcap * LOG2E * (1.0f - __fdividef(2.0f, 1.0f + e));
            }
        }
        if (entry & 1) {
            const int t0 = (entry >> 1) * TILE;
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const char * const mask = b.mask + query[h] * p.mask_nb1;
#pragma unroll
                for (int i = 0; i < TILE / 4; i++) {
                    const int t = t0 + 8 * (i >> 1) + 2 * j + (i & 1), x = 4 * (i >> 1) + 2 * h + (i & 1);
                    if (t >= p.n_kv) {
                        s[x] = -INFINITY;
                    } else if (b.mask) {
                        s[x] = fmaf(mask_value(mask + 2LL * t), slope[h], s[x]);
                    }
                }
            }
        }
        float m[4] = {s[0], s[2], s[1], s[3]};
#pragma unroll
        for (int i = 4; i < TILE / 2; i++) {
            float & x = m[(i >> 1 & 1) + 2 * (i & 1)];
            x = fmaxf(x, s[i]);
        }
        m[0] = fmaxf(m[0], m[2]), m[1] = fmaxf(m[1], m[3]);
        const bool grew = __any_sync(0xffffffffu, m[0] > top[0] + 8.0f || m[1] > top[1] + 8.0f);
        if (grew) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                m[h] = fmaxf(m[h], __shfl_xor_sync(0xffffffffu, m[h], 1));
                m[h] = fmaxf(m[h], __shfl_xor_sync(0xffffffffu, m[h], 2));
                const float top_new = fmaxf(top[h], m[h]);
                alpha[h] = exp2_fast(top[h] - top_new);
                top[h] = top_new;
                sum[h] *= alpha[h];
            }
        }
        float more[2] = {0.0f, 0.0f};
#pragma unroll
        for (int i = 0; i < TILE / 2; i++) {
            s[i] = exp2_fast(s[i] - top[i >> 1 & 1]);
            float & l = i & 1 ? more[i >> 1 & 1] : sum[i >> 1 & 1];
            l += s[i];
        }
        sum[0] += more[0], sum[1] += more[1];
        return grew;
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
    // The first turn adds products of weights 0 with keys instead of values, since there are no values before it.
    int stage = 0, phase = 0, place = 0, list_phase = 0;
    swizzled_operand values(b.base + S::k_at, TILE * 128);
    bool first = true;
#pragma unroll
    for (int i = 0; i < TILE / 4; i++) {
        weights[i] = 0u;
    }
#pragma unroll 1
    for (;;) {
        const int column = b.offset + S::columns_at + place * S::column_bytes;
        phase_wait(b.barrier(S::listed + place), list_phase);
        const int entry = *(const int *) (decode_smem + column + S::column_entry);
        if (entry < 0) {
            break;
        }
        load_factors(column);
        phase_wait(b.barrier(S::k_full + stage), phase);
        logits(stage);
        output(values);
        wgmma_wait<1>();
        pin(s);
        leave(S::k_empty + stage);
        phase_arrive(b.barrier(S::taken + place));
        const bool grew = softmax(entry);
        wgmma_wait<0>();
        pin(o);
        if (!first) {
            leave(S::v_empty + (stage == 0 ? S::STAGES - 1 : stage - 1));
        }
        if (grew) {
#pragma unroll
            for (int i = 0; i < D / 2; i++) {
                o[i] *= alpha[i >> 1 & 1];
            }
        }
        pack();
        first = false;
        values = v_operand + stage * S::tile_bytes;
        if (++stage == S::STAGES) {
            stage = 0, phase ^= 1;
        }
        if (++place == S::list) {
            place = 0, list_phase ^= 1;
        }
    }
    if (!first) {
        phase_wait(b.barrier(S::k_full + stage), phase);
        output(values);
        wgmma_wait<0>();
        pin(o);
    }

    // Columns 8 c + 2 j + e of four neighbouring c are four neighbouring coordinates.
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
        float f = 1.0f;
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

template <int KT, int VT, int STAGES>
__global__ void __launch_bounds__(prefill_shape<type<KT>, type<VT>, STAGES>::threads, 1)
    attention_prefill(const PYTQ_GRID_CONSTANT prefill_params p) {
#ifdef PYTQ_WGMMA
    using K = type<KT>;
    using V = type<VT>;
    using S = prefill_shape<K, V, STAGES>;
    const int lane = (int) opaque(threadIdx.x & 31), warp = __shfl_sync(0xffffffffu, threadIdx.x >> 5, 0);
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
            phase_init(b.barrier(i), i < S::taken     ? 32
                                     : i < S::k_full  ? 32 * (S::decoders + 8)
                                     : i < S::k_empty ? S::decoders
                                                      : 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    grid_wait();
    grid_trigger();
    if (warp < 8) {
        registers_grow<S::multiplier_registers>();
        prefill_multiply<K, V, S>(b, warp >> 2, warp & 3, lane);
    } else if (warp < 8 + S::decoders) {
        registers_shrink<S::decoder_registers>();
        prefill_decode<K, V, S>(b, warp - 8, lane);
    } else {
        registers_shrink<S::finder_registers>();
        prefill_find_tiles<K, V, S>(b, warp - 8 - S::decoders, lane);
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

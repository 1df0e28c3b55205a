// Attention of a few query rows over a short cache, where latency is all there is: what does not depend on the query is
// done before the query is there.
//
//   grid     (blocks of one cluster, groups of KV heads, sequences x tiles of 4 query rows)
//   block    one warp per (KV head of the group, 16 tokens); every warp has one tile, there is no loop
//   before   the kernels in front have ended: tiles are copied and decoded to int8 levels of keys and values, which
//   stay
//            in registers (the cache is complete but for the newest token, which comes uncompressed)
//   after    the query is turned and staged; products, softmax and products as in attention-decode.cuh
//   join     every warp writes its four rows into the memory of the blocks that join them and is done; a barrier there
//            counts the bytes, so the cluster meets once, at the start
//
// Where the newest token is in the cache already, the kernel waits first and decodes then.
#pragma once

#include "decode-parts.cuh"

#include <algorithm>

namespace pytq {

constexpr int short_tile = 16, short_warps = 8;
// Blocks that join one row: what a launch may ask for, and what it does with if head groups can be smaller instead.
constexpr int short_max_cluster = 8, short_cluster = 4;
constexpr int short_keys_barrier = 0, short_values_barrier = 8, short_join_barrier = 16, short_keys_at = 64 + 16;

// Windows of keys up to group G, and the first of G.
template <class T, int G> PYTQ_HD constexpr int key_windows() {
    if constexpr (G < 0) {
        return 0;
    } else {
        return key_windows<T, G - 1>() + key_group<T, G>::n_windows;
    }
}

// Launch shape for short caches, or false: from what the caller has set; p.team_bytes is the shared memory of a block.
template <class K, class V> bool short_plan(decode_params & p, int max_cluster) {
    int heads = 0;
    for (int most : {std::min(short_cluster, max_cluster), max_cluster}) {
        for (int h = 1; h <= short_warps && heads == 0; h++) {
            const int each = short_warps + 1 - h; // the most heads first: their rows are read as one range
            const bool adjacent = p.k_nb2 == K::block_bytes && p.v_nb2 == V::block_bytes;
            if (p.n_head_kv % each == 0 && (adjacent || each == 1) &&
                p.n_kv <= most * short_tile * (short_warps / each)) {
                heads = each;
            }
        }
    }
    if (heads == 0) {
        return false;
    }
    p.heads_per_block = heads, p.warps_per_head = short_warps / heads;
    decode_common<K, V>(p);
    const int warps = heads * p.warps_per_head, tokens = short_tile * p.warps_per_head;
    const int blocks = (p.n_kv + tokens - 1) / tokens;
    // (a block may push to itself only as one of a cluster of two or more)
    p.teams = 1, p.cluster = 2, p.cluster_log2 = 1;
    while (p.cluster < blocks) {
        p.cluster *= 2, p.cluster_log2++;
    }
    p.n_splits = p.cluster, p.n_parts = 1;
    const auto stage = [&](int slot) { return (slot * tokens + 64 + 15) / 16 * 16; };
    p.v_at = short_keys_at + stage(p.k_slot);
    p.scratch_at = p.v_at + stage(p.v_slot);
    p.query_at = p.scratch_at + warps * decode_weight_bytes;
    p.join_at = p.query_at + heads * query_bytes<K>();
    const int rows = (4 * heads + p.cluster - 1) / p.cluster * p.cluster * p.warps_per_head; // that a block joins
    p.team_bytes = p.join_at + rows * (4 * K::d + 8);
    return true;
}

#ifdef PYTQ_HAVE_MMA

template <int KT, int VT, bool A4>
__global__ void __launch_bounds__(32 * short_warps, 1) attention_short(const PYTQ_GRID_CONSTANT decode_params p) {
#ifdef PYTQ_BULK
    using K = type<KT>;
    using V = type<VT>;
    using VS = value_shape<V>;
    constexpr int D = K::d, N = (D + 31) / 32, QW = query_words<K>(), MT = VS::tiles, VI = index_bits(V::code, V::bits);
    static_assert(V::d == D, "one head size");

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, j = lane & 3;
    const int seq = p.row_tiles == 1 ? blockIdx.z : blockIdx.z / p.row_tiles;
    const int row0 = (blockIdx.z - seq * p.row_tiles) * 4;
    const int slice = (warp * p.heads_inverse) >> 16, head_in = warp - slice * p.heads_per_block;
    const int first_head = blockIdx.y * p.heads_per_block, head_kv = first_head + head_in;
    const int n_warps = p.heads_per_block * p.warps_per_head, block_tokens = short_tile * p.warps_per_head;
    const int scratch = p.scratch_at + warp * decode_weight_bytes, query_at = p.query_at + head_in * query_bytes<K>();
    const int t0 = blockIdx.x * block_tokens, n_tok = min(block_tokens, p.n_kv - t0), first = t0 + slice * short_tile;
    const char * const k_base = p.k + seq * p.k_nb3 + (long long) first_head * p.k_nb2;
    const char * const v_base = p.v + seq * p.v_nb3 + (long long) first_head * p.v_nb2;
    // rows that this block joins: every cluster-th (head, row), each from so many warps
    const int rank = (int) cluster_rank(), sources = p.cluster * p.warps_per_head;
    const int n_units = (4 * p.heads_per_block - rank + p.cluster - 1) >> p.cluster_log2;
    const auto join_row = [&](int unit, int source) { return p.join_at + (unit * sources + source) * 4 * D; };
    const int meta_at = join_row((4 * p.heads_per_block + p.cluster - 1) >> p.cluster_log2, 0);

    if (threadIdx.x == 0) {
        barrier_init(short_keys_barrier);
        barrier_init(short_values_barrier);
        barrier_init(short_join_barrier);
        barrier_init_done();
        if (n_units > 0) {
            barrier_expect(short_join_barrier, n_units * sources * (4 * D + 8));
        }
    }
    __syncthreads();
    cluster_arrive(); // other blocks may write here from now on

    const bool early = p.fresh.k != nullptr;
    const int fresh_at = early ? fresh_token(p) : -1; // (row numbers are there before the graph)
    if (!early) {
        grid_wait();
    }
    if (warp == 0 && n_tok > 0) {
        load_tile(short_keys_at, k_base + t0 * p.k_nb1, p.k_nb1, p.k_slot,
                  (int) ((p.heads_per_block - 1) * p.k_nb2) + K::block_bytes, n_tok, short_keys_barrier, 0, lane);
    }
    if (warp == n_warps - 1 && n_tok > 0) {
        load_tile(p.v_at, v_base + t0 * p.v_nb1, p.v_nb1, p.v_slot,
                  (int) ((p.heads_per_block - 1) * p.v_nb2) + V::block_bytes, n_tok, short_values_barrier, 0, lane);
    }
    key_tables<K, K::n_groups - 1> k_table;
    half_table<V::code, V::bits> v_table;
    const uint32_t zero = (uint32_t) lane * p.hidden.zero;
    k_table.init(zero);
    if constexpr (K::n_groups == 1 && K::code == V::code && K::bits == V::bits) {
        v_table = k_table.table;
    } else {
        v_table.init(zero);
    }
    const uint32_t bias = own_register(0x01010101u - 1u, zero);

    // Keys and values: rows g and g + 8 of a fragment are tokens 2 g and 2 g + 1; value bytes i of lane j are token
    // 8 (i & 1) + 2 j + (i >> 1).
    uint32_t keys[key_windows<K, K::n_groups - 1>()][2][8], values[VS::n_windows][2][8];
    float key_scale[K::n_groups] = {}, value_log2 = 0.0f;
    const bool tokens_here = first < p.n_kv;
    if (tokens_here) {
        const int kt =
            short_keys_at + (int) ((uintptr_t) k_base & 15) + slice * short_tile * p.k_slot + head_in * (int) p.k_nb2;
        const uint32_t k_bits = 8u * (uint32_t) (kt + K::data_off + 2 * g * p.k_slot);
        barrier_wait(short_keys_barrier, 0);
        const auto group = [&](auto index) {
            constexpr int G = decltype(index)::value;
            using kg = key_group<K, G>;
            const auto one_window = [&](auto window_index) {
                constexpr int W = decltype(window_index)::value;
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int u = half * p.k_slot;
                    key_levels<K, G, W>(k_table.template of<G>(), p.hidden, bias,
                                        A4 ? k_bits : k_bits + 8u * (uint32_t) u, A4 ? u : 0, j,
                                        keys[key_windows<K, G - 1>() + W][half]);
                }
            };
            one_window(constant<0>());
            if constexpr (kg::n_windows == 2) {
                one_window(constant<1>());
            }
            key_scale[G] = block_scale<K, G>(kt + (2 * g + (j >> 1)) * p.k_slot) * book<K::code, kg::bits>::step();
        };
        group(constant<0>());
        if constexpr (K::n_groups > 1) {
            group(constant<1>());
        }
        if constexpr (K::n_groups > 2) {
            group(constant<2>());
        }

        const int vt =
            p.v_at + (int) ((uintptr_t) v_base & 15) + slice * short_tile * p.v_slot + head_in * (int) p.v_nb2;
        const uint32_t v_bits =
            8u * (uint32_t) (vt + V::data_off + 2 * j * p.v_slot) + (uint32_t) (g * VS::per_lane - 16);
        const uint32_t history = g == 0 ? 0xffff0000u : 0xffffffffu;
        barrier_wait(short_values_barrier, 0);
        const auto value_window = [&](auto window_index) {
            constexpr int W = decltype(window_index)::value;
            uint32_t pair[2][VI];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                value_pair<V, W, A4>(v_bits, 8 * h * p.v_slot, p.v_slot, history, pair[h]);
            }
#pragma unroll
            for (int unit = 0; unit < 2; unit++) {
                value_levels<V>(v_table, p.hidden, bias, pair, unit, values[W][unit]);
            }
        };
        value_window(constant<0>());
        if constexpr (VS::n_windows == 2) {
            value_window(constant<1>());
        }
        value_log2 = block_log2_scale<V>(vt + (2 * g + (j >> 1)) * p.v_slot);
    }

    if (early) {
        grid_wait();
    }
    float x[D / 16];
    if (slice < 2) {
        load_query<D>(p, seq, row0, slice, head_kv, lane, x);
    }
    const char * const mask = p.mask ? p.mask + (p.n_seq_mask == 1 ? 0 : seq % p.n_seq_mask) * p.mask_nb3 : nullptr;
    const int token = first + 2 * g + (j >> 1);
    float mask_value[2];
#pragma unroll
    for (int rr = 0; rr < 2; rr++) {
        const int iq = (min(row0 + 2 * (j & 1) + rr, p.n_rows - 1) * p.gqa_inverse) >> 16;
        mask_value[rr] = token >= p.n_kv ? -INFINITY
                         : mask          ? __half2float(((const __half *) (mask + iq * p.mask_nb1))[token])
                                         : 0.0f;
    }
    // the newest token, for the row that this warp joins
    fresh_part<D> fresh;
    const auto unit_head = [&](int unit) { return first_head + ((unit * p.cluster + rank) >> 2); };
    const auto unit_row = [&](int unit) { return row0 + ((unit * p.cluster + rank) & 3); };
    const bool with_fresh = early && warp < n_units && unit_row(warp) < p.n_rows;
    if (with_fresh) {
        fresh.load(p, fresh_at, unit_head(warp), unit_row(warp), lane);
    }

    uint32_t qb[QW];
    float row_factor[2], slope[2], top[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f};
    stage_pairs<K>(p, seq, row0, head_kv, slice, p.warps_per_head, lane, query_at, x);
    __syncthreads();
    read_query<K>(p, row0, head_kv, lane, query_at, qb, row_factor, slope);
    float bias_[2];
#pragma unroll
    for (int rr = 0; rr < 2; rr++) {
        bias_[rr] = token == fresh_at ? -INFINITY : mask_value[rr] * slope[rr];
    }

    float o[VS::n_windows][MT][4];
#pragma unroll
    for (int w = 0; w < VS::n_windows; w++) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
            o[w][m][0] = o[w][m][1] = o[w][m][2] = o[w][m][3] = 0.0f;
        }
    }
    if (__any_sync(0xffffffffu, bias_[0] > -INFINITY || bias_[1] > -INFINITY)) {
        float part[2] = {0.0f, 0.0f};
        const auto group = [&](auto index) {
            constexpr int G = decltype(index)::value;
            int acc[4];
            key_product<K, G, 0>(acc, keys[key_windows<K, G - 1>()], qb);
            if constexpr (key_group<K, G>::n_windows == 2) {
                key_product<K, G, 1>(acc, keys[key_windows<K, G - 1>() + 1], qb);
            }
            add_logits(acc, key_scale[G], row_factor, j, part);
        };
        group(constant<0>());
        if constexpr (K::n_groups > 1) {
            group(constant<1>());
        }
        if constexpr (K::n_groups > 2) {
            group(constant<2>());
        }
        float logit[1][2];
#pragma unroll
        for (int rr = 0; rr < 2; rr++) {
            if (p.softcap != 0.0f) {
                part[rr] = p.softcap * LOG2E * tanh_fast(part[rr]);
            }
            // (a scale past the end may be anything)
            logit[0][rr] = bias_[rr] > -INFINITY ? part[rr] + bias_[rr] : -INFINITY;
        }
        float alpha[2], beta[2];
        uint32_t w[2][1];
        weigh<1>(logit, &value_log2, j, top, sum, alpha, beta, w);
#pragma unroll
        for (int rr = 0; rr < 2; rr++) {
            const int at = scratch + 4 * ((2 * (j & 1) + rr) * 20 + (g & 3)) + (g >> 2) + 2 * (j >> 1);
            *(uint8_t *) (decode_smem + at) = (uint8_t) (w[rr][0] >> 8);
            *(uint8_t *) (decode_smem + at + 4 * 4 * 20) = (uint8_t) w[rr][0];
        }
        __syncwarp();
        const uint32_t b0 = shared_word(scratch + 4 * (g * 20 + j));
        const int magic4[4] = {MAGIC_BITS, MAGIC_BITS, MAGIC_BITS, MAGIC_BITS};
#pragma unroll
        for (int win = 0; win < VS::n_windows; win++) {
#pragma unroll
            for (int m = 0; m < MT; m++) {
                const uint32_t * const lev = values[win][VS::unit(m)];
                int acc[4];
                mma_s8u8_k16(acc, lev[VS::at(VS::first(m))], lev[VS::at(VS::second(m))], b0, magic4);
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    o[win][m][c] = (__int_as_float(acc[c]) - MAGIC) * beta[c & 1];
                }
            }
        }
    }
    grid_trigger();

    // To the blocks that join: rows, then (top, sum).
    cluster_wait();
    {
        const int row = 2 * (j & 1) + (j >> 1), unit = 4 * head_in + row, to = unit & (p.cluster - 1);
        const int source = rank * p.warps_per_head + slice, slot = unit >> p.cluster_log2;
        const int at = join_row(slot, source);
        constexpr int PUSH = VS::width % 4 == 0 ? 4 : 2;
#pragma unroll
        for (int w = 0; w < VS::n_windows; w++) {
            float y[VS::width];
            result_values<V>(o[w], j, book<V::code, V::bits>::step(), y);
#pragma unroll
            for (int i = 0; i < VS::width; i += PUSH) {
                cluster_push<PUSH>(&y[i], at + 4 * (g * VS::per_lane + w * VS::width + i), to, short_join_barrier);
            }
        }
        sum_tokens(sum);
        if (g == 0) {
            const float meta[2] = {j < 2 ? top[0] : top[1], j < 2 ? sum[0] : sum[1]};
            cluster_push<2>(meta, meta_at + 8 * (slot * sources + source), to, short_join_barrier);
        }
    }
    if (warp >= n_units) {
        return;
    }
    if (with_fresh) { // its way to memory is the longest: the mask is behind the row number
        fresh.finish(p, unit_head(warp), unit_row(warp));
    }
    barrier_wait(short_join_barrier, 0);
    for (int unit = warp; unit < n_units; unit += n_warps) {
        if (unit_row(unit) >= p.n_rows) {
            continue;
        }
        if (unit != warp && early) {
            fresh.load(p, fresh_at, unit_head(unit), unit_row(unit), lane);
            fresh.finish(p, unit_head(unit), unit_row(unit));
        }
        float v[N], all, total;
        join_sources<N>(
            sources, lane,
            [&](int source, float * x) {
                const float2 m = *(const float2 *) (decode_smem + meta_at + 8 * (unit * sources + source));
                x[0] = m.x, x[1] = m.y;
            },
            [&](int source, float * y) {
                load_row<D>((const float *) (decode_smem + join_row(unit, source)), lane, y);
            },
            v, all, total);
        store_row<D>(p, seq, unit_head(unit), unit_row(unit), v, all, total, fresh, lane);
    }
#endif
}

#endif // PYTQ_HAVE_MMA

} // namespace pytq

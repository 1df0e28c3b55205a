// Attention of a few query rows over a compressed cache: int8 tensor cores straight from bit planes.
//
//   grid     (splits of the sequence, groups of KV heads, sequences x tiles of 4 query rows); neighbouring splits
//            form a cluster that joins its results through distributed shared memory
//   block    one warp per (KV head of the group, 64-token slice of the tile)
//   tile     64 tokens per warp, whole cache rows of the group:
//            logits   S[token, row] = K[token, dim] q[dim, row]      m16n8k32, K is the A operand
//            softmax  on the accumulators, every (token, row) once in the warp
//            output   O[dim, row]  += V[dim, token] P[token, row]    m16n8k16, V transposed is the A operand
//   memory   one buffer of keys, one of values: values arrive while logits are computed and the next tile's keys while
//            the output is, so two blocks fit a multiprocessor for every type. The copy engine fills them; the last
//            warp to leave a buffer orders its next filling, so warps wait for data only, never for each other
//
// A warp's 8 columns are 4 query rows twice: the high and the low byte of a 16-bit fixed-point q (and P), so the
// integer product costs no accuracy that could be seen next to the cache's own error. P is scaled per 64 tokens by its
// largest value times V's scale, so small weights beside an attention sink keep 16 bits of their own.
//
// K: lane (g, j) of an A fragment owns rows g and g + 8 and 4 consecutive k per register. Since q may be permuted like
// K, lane j takes a quarter of the coordinates of its two tokens (of every group, for split-rate keys). V: lane (g, j)
// owns dims of row g and g + 8 and 4 tokens per register: it decodes an eighth of the coordinates of 4 tokens and
// interleaves the tokens' bits by nibbles before the look-up, so one permute yields 4 tokens of one coordinate.
#pragma once

#include "decode-parts.cuh"

namespace pytq {

constexpr int decode_tile = 64; // tokens per warp and tile

// Teams of warps that share a block: two, each with its own buffers and every other tile, where registers allow 16
// warps.
template <class K> PYTQ_HD constexpr int decode_max_teams() {
    return K::d > 128 ? 1 : 2;
}
// Shared memory begins with two barriers (keys, values) and two counters of warps that are done with a buffer per team,
// and a barrier for each pair of warps of both teams; nothing but the newest token's number may lie there, since the
// hardware may write to a barrier after the last wait.
// Then the teams' buffers, which begin with 16 bytes of nothing: windows begin up to 4 bytes before a plane. Results
// overlay the buffers.
constexpr int decode_control_bytes = 32, decode_counters_at = 16, decode_fresh_at = 24,
              decode_pairs_at = 2 * decode_control_bytes, decode_buffers_at = decode_pairs_at + 8 * 8;
constexpr int decode_keys_at = 16;

// Scratch of a warp: its weights; where the two warps of a head may join, its rows and (top, sum) of each.
template <class K> PYTQ_HD constexpr int decode_warp_bytes() {
    constexpr int rows = 4 * (4 * K::d + 8);
    return decode_max_teams<K>() > 1 && rows > decode_weight_bytes ? rows : decode_weight_bytes;
}

// Launch shape of the kernel, from what the caller has set; returns the bytes of shared memory of a team.
template <class K, class V> int decode_plan_shape(decode_params & p) {
    p.heads_per_block = 1;
    if (p.k_nb2 == K::block_bytes && p.v_nb2 == V::block_bytes) {
        // heads that lie side by side in a cache row share a block, so rows are read once and in order
        for (int h = 2; h <= 8; h++) {
            p.heads_per_block = p.n_head_kv % h == 0 ? h : p.heads_per_block;
        }
    }
    p.warps_per_head = 8 / p.heads_per_block;
    const int warps = p.warps_per_head * p.heads_per_block, tokens = decode_tile * p.warps_per_head;
    decode_common<K, V>(p);
    p.mask_rows = p.n_q == 1 ? 1 : 4;
    p.mask_vectors =
        ((uintptr_t) p.mask | (uintptr_t) p.mask_nb1 | (uintptr_t) p.mask_nb3) % 16 == 0 && p.n_kv % 8 == 0;
    const auto stage = [&](int slot) { return (slot * tokens + 64 + 15) / 16 * 16; };
    p.v_at = decode_keys_at + stage(p.k_slot);
    p.mask_at = p.v_at + stage(p.v_slot);
    p.scratch_at = p.mask_at + p.mask_rows * 2 * tokens;
    p.team_bytes = p.scratch_at + warps * decode_warp_bytes<K>();
    // the results overlay the tiles at the end
    const int results = warps * 4 * (result_row<K>() * 4 + 8);
    p.team_bytes = ((p.team_bytes > results ? p.team_bytes : results) + 15) / 16 * 16;
    return p.team_bytes;
}

// n_sm: blocks that run at once. max_teams: teams for which there is shared memory. few, many: largest cluster that
// joins everything, and cluster where there are more splits than that.
inline void decode_plan_splits(decode_params & p, int n_sm, int max_teams, int few, int many) {
    const int groups = p.n_head_kv / p.heads_per_block * p.row_tiles * p.n_seq;
    const int tokens = decode_tile * p.warps_per_head, tiles = (p.n_kv + tokens - 1) / tokens;
    const int per = n_sm / groups > 1 ? n_sm / groups : 1;
    // (a second team without a tile still halves the work on the queries)
    p.teams = max_teams > 1 && (tiles > per || p.warps_per_head == 1) ? 2 : 1;
    // as few splits as take no more turns: what they leave free serves the encoder of the newest token
    const int turns = (tiles + p.teams * per - 1) / (p.teams * per);
    p.n_splits = tiles < per ? tiles : (tiles + p.teams * turns - 1) / (p.teams * turns);
    p.cluster = 1, p.cluster_log2 = 0;
    const int largest = p.n_splits <= few ? few : many, sources = p.teams * p.warps_per_head;
    while (2 * p.cluster <= largest && p.cluster < p.n_splits && 2 * p.cluster * sources <= max_sources) {
        p.cluster *= 2, p.cluster_log2++;
    }
    // a few splits may stay empty to fill the last cluster, but no cluster may have to wait for a place
    const int up = (p.n_splits + p.cluster - 1) / p.cluster * p.cluster;
    p.n_splits = up <= per || up == p.cluster ? up : p.n_splits / p.cluster * p.cluster;
    p.n_parts = p.n_splits / p.cluster;
    p.tiles_each = tiles / p.n_splits, p.tiles_more = tiles % p.n_splits;
}

#ifdef PYTQ_HAVE_MMA

// A4: blocks keep their alignment to words from token to token, in K and in V.
template <int KT, int VT, bool A4>
__global__ void __launch_bounds__(256 * decode_max_teams<type<KT>>(), 1)
    attention_decode(const PYTQ_GRID_CONSTANT decode_params p) {
    using K = type<KT>;
    using V = type<VT>;
    using VS = value_shape<V>;
    constexpr int D = K::d, N = (D + 31) / 32;
    static_assert(V::d == D, "one head size");
    constexpr int VB = V::bits, VI = index_bits(V::code, VB), QW = query_words<K>(), MT = VS::tiles;
    // More values at once would spill registers, fewer keys leave too little to do while a word is on its way (kv4 at
    // 16384 tokens: 21.8 us; 2 and 4: 23.3).
    constexpr int key_unroll = 4, value_unroll = 2;

    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, j = lane & 3;
    const int seq = p.row_tiles == 1 ? blockIdx.z : blockIdx.z / p.row_tiles;
    const int row0 = (blockIdx.z - seq * p.row_tiles) * 4;
    const int all_slices = (warp * p.heads_inverse) >> 16, head_in = warp - all_slices * p.heads_per_block;
    const int team = (all_slices * p.slices_inverse) >> 16, slice = all_slices - team * p.warps_per_head;
    const int team_warps = p.heads_per_block * p.warps_per_head, team_warp = warp - team * team_warps;
    const int team_at = decode_buffers_at + team * p.team_bytes, control_at = team * decode_control_bytes;
    const int head_kv = blockIdx.y * p.heads_per_block + head_in;
    const int query_at = decode_buffers_at + p.teams * p.team_bytes + head_in * query_bytes<K>();
    const int tile_tokens = decode_tile * p.warps_per_head;

    const int k_seg = (int) ((p.heads_per_block - 1) * p.k_nb2) + K::block_bytes;
    const int v_seg = (int) ((p.heads_per_block - 1) * p.v_nb2) + V::block_bytes;
    const int scratch = team_at + p.scratch_at + team_warp * decode_warp_bytes<K>();

    const char * const k_base = p.k + seq * p.k_nb3 + (long long) blockIdx.y * p.heads_per_block * p.k_nb2;
    const char * const v_base = p.v + seq * p.v_nb3 + (long long) blockIdx.y * p.heads_per_block * p.v_nb2;

    // Tiles of this split.
    const int split = blockIdx.x;
    const int first_tile = split * p.tiles_each + min(split, p.tiles_more), tile_begin = first_tile + team;
    const int tile_end = first_tile + p.tiles_each + (split < p.tiles_more ? 1 : 0);

    // Where the newest token is; stored for the others when it has come. (Row numbers are there before the graph.)
    int fresh_at = -1;
    if (team_warp == 0 && lane == 0 && p.fresh.k) {
        fresh_at = fresh_token(p);
    }

    const char * const mask = p.mask ? p.mask + (p.n_seq_mask == 1 ? 0 : seq % p.n_seq_mask) * p.mask_nb3 : nullptr;
    const auto mask_row = [&](int row) { // of this tile of query rows
        return mask + ((min(row0 + row, p.n_rows - 1) * p.gqa_inverse) >> 16) * p.mask_nb1;
    };
#ifdef PYTQ_BULK
    const int keys_barrier = control_at, values_barrier = control_at + 8;
    // Called by one warp of the team.
    const bool with_mask = mask && p.mask_vectors;
    const auto load_mask = [&](int tile) {
        const int t0 = tile * tile_tokens, n_tok = min(tile_tokens, p.n_kv - t0);
        if (with_mask && lane < p.mask_rows) {
            copy_bulk(team_at + p.mask_at + lane * 2 * tile_tokens, mask_row(lane) + 2LL * t0, 2 * n_tok, keys_barrier);
        }
    };
    const auto load_keys = [&](int tile) { // announces the mask too
        const int t0 = tile * tile_tokens, n_tok = min(tile_tokens, p.n_kv - t0);
        if (mask && !with_mask) { // by ordinary stores, which the barrier's arrival publishes
#pragma unroll 1
            for (int i = lane; i < p.mask_rows * n_tok; i += 32) {
                const int row = i / n_tok, t = i - row * n_tok;
                *(__half *) (decode_smem + team_at + p.mask_at + 2 * (row * tile_tokens + t)) =
                    ((const __half *) mask_row(row))[(long long) t0 + t];
            }
            __threadfence_block();
            __syncwarp();
        }
        load_tile(team_at + decode_keys_at, k_base + t0 * p.k_nb1, p.k_nb1, p.k_slot, k_seg, n_tok, keys_barrier,
                  with_mask ? p.mask_rows * 2 * n_tok : 0, lane);
    };
    const auto load_values = [&](int tile) {
        const int t0 = tile * tile_tokens, n_tok = min(tile_tokens, p.n_kv - t0);
        load_tile(team_at + p.v_at, v_base + t0 * p.v_nb1, p.v_nb1, p.v_slot, v_seg, n_tok, values_barrier, 0, lane);
    };
    // Whether this warp is the last of its team that has done with a buffer.
    const auto last_to_leave = [&](int counter) {
        uint32_t before = 0;
        __syncwarp();
        if (lane == 0) {
            before = count_arrival(control_at + decode_counters_at + 4 * counter, team_warps - 1);
        }
        return (int) __shfl_sync(0xffffffffu, before, 0) == team_warps - 1;
    };
#else
    const int tid = 32 * team_warp + lane, n_threads = 32 * team_warps;
    const auto load_keys = [&](int tile) {
        const int t0 = tile * tile_tokens, n_tok = min(tile_tokens, p.n_kv - t0);
        if (mask) {
            const int step = p.mask_vectors ? 8 : 1, per_row = tile_tokens / step;
            for (int c = tid; c < p.mask_rows * per_row; c += n_threads) {
                const int row = c / per_row, t = step * (c - row * per_row);
                const int to = team_at + p.mask_at + 2 * (row * tile_tokens + t);
                const char * const from = mask_row(row) + 2LL * (t0 + t);
                if (t < n_tok && p.mask_vectors) {
                    copy16_async(to, from);
                } else if (t < n_tok) {
                    *(__half *) (decode_smem + to) = *(const __half *) from;
                }
            }
        }
        load_tile(team_at + decode_keys_at, k_base + t0 * p.k_nb1, p.k_nb1, p.k_slot, k_seg, n_tok, tid, n_threads);
        copy_commit();
    };
    const auto load_values = [&](int tile) {
        const int t0 = tile * tile_tokens, n_tok = min(tile_tokens, p.n_kv - t0);
        load_tile(team_at + p.v_at, v_base + t0 * p.v_nb1, p.v_nb1, p.v_slot, v_seg, n_tok, tid, n_threads);
        copy_commit();
    };
#endif

    key_tables<K, K::n_groups - 1> k_table;
    half_table<V::code, VB> v_table;
    const uint32_t zero = (uint32_t) lane * p.hidden.zero;
    k_table.init(zero);
    if constexpr (K::n_groups == 1 && K::code == V::code && K::bits == VB) {
        v_table = k_table.table;
    } else {
        v_table.init(zero);
    }
    const uint32_t bias = own_register(0x01010101u - 1u, zero);

#ifdef PYTQ_BULK
    if (team_warp == 0 && lane == 0) {
        barrier_init(keys_barrier);
        barrier_init(values_barrier);
        *(uint2 *) (decode_smem + control_at + decode_counters_at) = make_uint2(0u, 0u);
        barrier_init_done();
    }
    if (warp == 0 && lane < 8) {
        barrier_init(decode_pairs_at + 8 * lane, 32);
        barrier_init_done();
    }
#endif
#ifdef PYTQ_BULK
    // Nothing but the newest token is written to the cache between the start of the graph and this kernel, so the first
    // tile may come before the kernels in front have ended (a mask that cannot be copied by the engine may not).
    const bool early = p.fresh.k != nullptr && (!mask || with_mask),
               first_loader = team_warp == 0 && tile_begin < tile_end;
    if (early && first_loader) {
        __syncwarp();
        load_keys(tile_begin);
    }
#endif
    grid_wait(); // everything before this line overlaps with the kernels before

    // The query is read first: behind the first tile of every block it would wait for all of them.
    float x[D / 16];
    if (all_slices < 2) {
        load_query<D>(p, seq, row0, all_slices, head_kv, lane, x);
    }
#ifdef PYTQ_BULK
    if (first_loader) {
        __syncwarp();
        if (!early) {
            load_keys(tile_begin);
        }
        load_mask(tile_begin);
    }
#else
    if (tile_begin < tile_end) {
        load_keys(tile_begin);
        load_values(tile_begin);
    }
#endif
    stage_pairs<K>(p, seq, row0, head_kv, all_slices, p.teams * p.warps_per_head, lane, query_at, x);
    if (team_warp == 0 && lane == 0) {
        *(int *) (decode_smem + control_at + decode_fresh_at) = fresh_at;
    }
    __syncthreads(); // the queries are there, the barriers exist
#ifdef PYTQ_BULK
    if (first_loader) { // last: neither the first keys nor the queries wait for values
        __syncwarp();
        load_values(tile_begin);
    }
#endif
    uint32_t qb[QW];
    float row_factor[2]; // of rows 2 (j & 1) + {0, 1}: logits in units of log2
    float slope[2];
    read_query<K>(p, row0, head_kv, lane, query_at, qb, row_factor, slope);

    float o[VS::n_windows][MT][4];
    float top[2] = {-1e30f, -1e30f}, sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int w = 0; w < VS::n_windows; w++) {
#pragma unroll
        for (int m = 0; m < MT; m++) {
            o[w][m][0] = o[w][m][1] = o[w][m][2] = o[w][m][3] = 0.0f;
        }
    }

    // Tokens of A rows: row g of sub-tile i, half h is 16 i + 2 g + h, so that the 8 rows of a fragment fall into
    // different banks. Blocks of this warp's head in the buffers (64 tokens times any stride keep 16-byte alignment):
    const int kt = team_at + decode_keys_at + (int) ((uintptr_t) k_base & 15) + slice * decode_tile * p.k_slot +
                   head_in * (int) p.k_nb2;
    const int vt =
        team_at + p.v_at + (int) ((uintptr_t) v_base & 15) + slice * decode_tile * p.v_slot + head_in * (int) p.v_nb2;
    const uint32_t k_bits = 8u * (uint32_t) (kt + K::data_off + 2 * g * p.k_slot);
    const uint32_t v_bits = 8u * (uint32_t) (vt + V::data_off + 2 * j * p.v_slot) + (uint32_t) (g * VS::per_lane - 16);
    const int k_scale_at = kt + (2 * g + (j >> 1)) * p.k_slot, v_scale_at = vt + (2 * g + (j >> 1)) * p.v_slot;
    const uint32_t history = g == 0 ? 0xffff0000u : 0xffffffffu;

    // the teams of a block take as many turns where they wait for each other
#ifdef PYTQ_BULK
    const int turns_end = tile_end;
#else
    const int turns_end = tile_end + team;
#endif
    int phase = 0;
    for (int tile = tile_begin; tile < turns_end; tile += p.teams, phase ^= 1) {
#ifdef PYTQ_BULK
        barrier_wait(keys_barrier, phase);
#else
        if (tile == tile_begin) {
            copy_wait_older();
        } else {
            copy_wait_all();
        }
        __syncthreads(); // keys are there, the values of the tile before are done with
        if (tile != tile_begin && tile < tile_end) {
            load_values(tile);
        }
#endif

        // Mask of this lane's 4 tokens and 2 rows; tokens past the end count as masked. Most tiles are seen whole.
        const int first = tile * tile_tokens + slice * decode_tile;
#ifdef PYTQ_BULK
        const int n_valid = p.n_kv - first;
#else
        const int n_valid = tile < tile_end ? p.n_kv - first : 0; // a team's last turn may have no tile
#endif
        const int fresh = *(const int *) (decode_smem + control_at + decode_fresh_at) - first;
        const int mask_here = team_at + p.mask_at + 2 * slice * decode_tile;
        uint32_t marks = 0;
        if (mask) {
#pragma unroll 1
            for (int row = 0; row < p.mask_rows; row++) {
                marks |= shared_word(mask_here + 2 * row * tile_tokens + 4 * lane);
            }
        }
        const bool whole = n_valid >= decode_tile && (uint32_t) fresh >= (uint32_t) decode_tile &&
                           !__any_sync(0xffffffffu, marks != 0);
        float bias_[4][2] = {};
        bool any = true;
        if (!whole) {
            any = false;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int t = 16 * i + 2 * g + (j >> 1);
#pragma unroll
                for (int rr = 0; rr < 2; rr++) {
                    float b = -INFINITY;
                    if (t < n_valid && t != fresh) {
                        b = 0.0f;
                        if (mask) {
                            const int row = p.mask_rows == 1 ? 0 : 2 * (j & 1) + rr;
                            b = __half2float(
                                    *(const __half *) (decode_smem + mask_here + 2 * (row * tile_tokens + t))) *
                                slope[rr];
                        }
                    }
                    bias_[i][rr] = b;
                    any |= b > -INFINITY;
                }
            }
            any = __any_sync(0xffffffffu, any);
        }

        float beta[2] = {0.0f, 0.0f}, alpha[2] = {1.0f, 1.0f};
        bool grew = false;
        float logit[4][2] = {};
        if (any) {
#pragma unroll(key_unroll)
            for (int i = 0; i < 4; i++) {
                float part[2] = {0.0f, 0.0f};
                const auto group = [&](auto index) {
                    constexpr int G = decltype(index)::value;
                    using kg = key_group<K, G>;
                    int acc[4];
                    const auto one_window = [&](auto window_index) {
                        constexpr int W = decltype(window_index)::value;
                        uint32_t a[2][8];
#pragma unroll
                        for (int half = 0; half < 2; half++) {
                            const int u = (16 * i + half) * p.k_slot;
                            key_levels<K, G, W>(k_table.template of<G>(), p.hidden, bias,
                                                A4 ? k_bits : k_bits + 8u * (uint32_t) u, A4 ? u : 0, j, a[half]);
                        }
                        key_product<K, G, W>(acc, a, qb);
                    };
                    one_window(constant<0>());
                    if constexpr (kg::n_windows == 2) {
                        one_window(constant<1>());
                    }
                    const float scale =
                        block_scale<K, G>(k_scale_at + 16 * i * p.k_slot) * book<K::code, kg::bits>::step();
                    add_logits(acc, scale, row_factor, j, part);
                };
                group(constant<0>());
                if constexpr (K::n_groups > 1) {
                    group(constant<1>());
                }
                if constexpr (K::n_groups > 2) {
                    group(constant<2>());
                }
#pragma unroll
                for (int c = 0; c < 4; c++) { // registers have no run-time index
#pragma unroll
                    for (int rr = 0; rr < 2; rr++) {
                        logit[c][rr] = c == i ? part[rr] : logit[c][rr];
                    }
                }
            }
            if (p.softcap != 0.0f) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
#pragma unroll
                    for (int rr = 0; rr < 2; rr++) {
                        logit[i][rr] = p.softcap * LOG2E * tanh_fast(logit[i][rr]);
                    }
                }
            }
            if (!whole) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
#pragma unroll
                    for (int rr = 0; rr < 2; rr++) {
                        // (a scale past the end may be anything)
                        logit[i][rr] = bias_[i][rr] > -INFINITY ? logit[i][rr] + bias_[i][rr] : -INFINITY;
                    }
                }
            }
        }
#ifdef PYTQ_BULK
        if (__builtin_expect(last_to_leave(0) && tile + p.teams < tile_end, 0)) {
            load_keys(tile + p.teams);
            load_mask(tile + p.teams);
        }
        barrier_wait(values_barrier, phase);
        if (!any) { // (as one block with the rest under a condition, registers would not suffice)
            if (__builtin_expect(last_to_leave(1) && tile + p.teams < tile_end, 0)) {
                load_values(tile + p.teams);
            }
            continue;
        }
#else
        copy_wait_all();
        __syncthreads(); // values are there, the keys are done with
        if (tile + p.teams < tile_end) {
            load_keys(tile + p.teams);
        }
        if (!any) {
            continue;
        }
#endif

        // Softmax and fixed-point weights. u = logit + log2(scale of V): weights are quantised with V's scale in
        // them.
        float lv[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
            lv[i] = block_log2_scale<V>(v_scale_at + 16 * i * p.v_slot);
        }
        uint32_t w[2][4];
        weigh<4>(logit, lv, j, top, sum, alpha, beta, w);
#pragma unroll
        for (int rr = 0; rr < 2; rr++) {
            grew |= alpha[rr] != 1.0f;
            const uint32_t w01 = permute(w[rr][0], w[rr][1], 0x5140), w23 = permute(w[rr][2], w[rr][3], 0x5140);
            uint32_t * const dst = (uint32_t *) (decode_smem + scratch) + (2 * (j & 1) + rr) * 20 + 8 * (j >> 1) + g;
            dst[0] = permute(w01, w23, 0x7632);      // high bytes
            dst[4 * 20] = permute(w01, w23, 0x5410); // low bytes
        }
        __syncwarp();

        // Output.
        if (__any_sync(0xffffffffu, grew)) {
#pragma unroll
            for (int w = 0; w < VS::n_windows; w++) {
#pragma unroll
                for (int m = 0; m < MT; m++) {
                    o[w][m][0] *= alpha[0], o[w][m][1] *= alpha[1], o[w][m][2] *= alpha[0], o[w][m][3] *= alpha[1];
                }
            }
        }
        const auto value_window = [&](auto window_index) {
            constexpr int W = decltype(window_index)::value;
            int acc[MT][4];
#pragma unroll
            for (int m = 0; m < MT; m++) {
                acc[m][0] = acc[m][1] = acc[m][2] = acc[m][3] = MAGIC_BITS;
            }
#pragma unroll(value_unroll)
            for (int quarter = 0; quarter < 4; quarter++) {
                const uint32_t b0 = shared_word(scratch + 4 * (g * 20 + 4 * quarter + j));
                uint32_t pair[2][VI]; // index planes of tokens (0, 2) and (1, 3): bytes A0 B0 A1 B1
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const int u = (16 * h + 8 * (quarter & 1) + (quarter >> 1)) * p.v_slot;
                    value_pair<V, W, A4>(v_bits, u, 32 * p.v_slot, history, pair[h]);
                }
#pragma unroll
                for (int unit = 0; unit < 2; unit++) { // low, high nibbles of the bytes
                    uint32_t lev[8];
                    value_levels<V>(v_table, p.hidden, bias, pair, unit, lev);
#pragma unroll
                    for (int m = 0; m < MT; m++) {
                        if (VS::unit(m) == unit) {
                            mma_s8u8_k16(acc[m], lev[VS::at(VS::first(m))], lev[VS::at(VS::second(m))], b0, acc[m]);
                        }
                    }
                }
            }
#pragma unroll
            for (int m = 0; m < MT; m++) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    o[W][m][c] = fmaf(__int_as_float(acc[m][c]) - MAGIC, beta[c & 1], o[W][m][c]);
                }
            }
        };
        value_window(constant<0>());
        if constexpr (VS::n_windows == 2) {
            value_window(constant<1>());
        }
#ifdef PYTQ_BULK
        if (__builtin_expect(last_to_leave(1) && tile + p.teams < tile_end, 0)) {
            load_values(tile + p.teams);
        }
#else
        __syncwarp();
#endif
    }

    // Join the two halves of the fixed point; afterwards each lane has an eighth of the dims of one row, which goes to
    // shared memory: [warp][row][dim], then (top, sum) [warp][row].
    // Not before: blocks of the kernels behind would come to this multiprocessor and take turns and instruction memory.
    grid_trigger();

#ifdef PYTQ_BULK
    // Where parts are joined by another kernel and a team has one warp per head, the two warps of a head join their
    // rows and leave, without waiting for the others of the block.
    if constexpr (decode_max_teams<K>() == 2) {
        if (p.n_parts > 1 && p.cluster == 1 && p.warps_per_head == 1) {
            const int lane_ = (int) opaque(threadIdx.x) & 31, g_ = lane_ >> 2, j_ = lane_ & 3;
            const int barrier = decode_pairs_at + 8 * team_warp;
            const int rows_at =
                decode_buffers_at + p.team_bytes + p.scratch_at + team_warp * decode_warp_bytes<K>() + 16 * lane_;
            const int meta_at = rows_at - 16 * lane_ + 16 * D + 8 * j_;
            constexpr int Y = VS::n_windows * VS::width, PACK = Y % 4 == 0 ? 4 : 2;
            float y[Y];
#pragma unroll
            for (int w = 0; w < VS::n_windows; w++) {
                result_values<V>(o[w], j_, book<V::code, VB>::step(), y + w * VS::width);
            }
            sum_tokens(sum);
            float row_top = j_ < 2 ? top[0] : top[1], row_sum = j_ < 2 ? sum[0] : sum[1];
            if (team == 1) {
#pragma unroll
                for (int i = 0; i < Y; i += PACK) {
                    store_floats<PACK>((float *) (decode_smem + rows_at + 32 * 4 * i - (4 - PACK) * 4 * lane_), y + i);
                }
                if (g_ == 0) {
                    *(float2 *) (decode_smem + meta_at) = make_float2(row_top, row_sum);
                }
                barrier_expect(barrier, 0); // by every lane, for what it has stored (racecheck follows no other way)
                return;
            }
            float f0 = 1.0f, f1 = 0.0f;
            if (p.teams == 2) {
                barrier_wait(barrier, 0);
                const float2 other = *(const float2 *) (decode_smem + meta_at);
                const float all = fmaxf(row_top, other.x);
                f0 = exp2_fast(row_top - all), f1 = exp2_fast(other.x - all);
                row_top = all, row_sum = fmaf(other.y, f1, row_sum * f0);
            }
            const int row = row0 + 2 * (j_ & 1) + (j_ >> 1);
            const long long to = (((long long) seq * p.n_head_kv + head_kv) * p.n_rows + row) * p.n_parts + blockIdx.x;
            if (row < p.n_rows) {
#pragma unroll
                for (int i = 0; i < Y; i += PACK) {
                    if (p.teams == 2) {
                        float z[PACK];
                        load_floats<PACK>((const float *) (decode_smem + rows_at + 32 * 4 * i - (4 - PACK) * 4 * lane_),
                                          z);
#pragma unroll
                        for (int n = 0; n < PACK; n++) {
                            y[i + n] = fmaf(z[n], f1, y[i + n] * f0);
                        }
                    }
                    store_floats<PACK>(p.part + to * D + g_ * VS::per_lane + i, y + i);
                }
                if (g_ == 0) {
                    p.meta[to] = make_float2(row_top, row_sum);
                }
            }
            return;
        }
    }
#endif

    // Each (head, row) of the cluster is joined by one warp, which also asks for the newest token now.
    const int rank = p.cluster > 1 ? (int) cluster_rank() : 0, sources = p.cluster * p.teams * p.warps_per_head;
    const int n_warps = p.teams * team_warps, first_unit = rank * n_warps + (int) (threadIdx.x >> 5);
    fresh_part<D> fresh;
    const auto with_fresh = [&](int unit) {
        return p.fresh.k && p.n_parts == 1 && unit < 4 * p.heads_per_block && row0 + (unit & 3) < p.n_rows;
    };
    const auto load_fresh = [&](int unit, int l) {
        fresh.load(p, *(const int *) (decode_smem + decode_fresh_at), blockIdx.y * p.heads_per_block + (unit >> 2),
                   row0 + (unit & 3), l);
    };
    __syncthreads(); // the tiles are done with
    // from here on lane numbers are computed anew: kept since before the loop, they would cost registers inside it
    const int tid_ = (int) opaque(threadIdx.x), lane_ = tid_ & 31, warp_ = tid_ >> 5, g_ = lane_ >> 2, j_ = lane_ & 3;
    constexpr int ROW = result_row<K>();
    const int meta_at = decode_buffers_at + n_warps * 4 * ROW * 4;
    {
        constexpr float step = book<V::code, VB>::step();
        const int row = 2 * (j_ & 1) + (j_ >> 1);
        float * const out = (float *) (decode_smem + decode_buffers_at) + (warp_ * 4 + row) * ROW;
#pragma unroll
        for (int w = 0; w < VS::n_windows; w++) {
            float y[VS::width];
            result_values<V>(o[w], j_, step, y);
            const int c = g_ * VS::per_lane + w * VS::width;
#pragma unroll
            for (int i = 0; i < VS::width; i++) {
                if constexpr (result_vectors<K>()) {
                    if (i % 4 == 0) {
                        *(float4 *) (out + result_at<K>(c) + i) = make_float4(y[i], y[i + 1], y[i + 2], y[i + 3]);
                    }
                } else {
                    out[result_at<K>(c + i)] = y[i];
                }
            }
        }
        if (with_fresh(first_unit)) {
            load_fresh(first_unit, lane_);
        }
        sum_tokens(sum);
        if (g_ == 0) {
            float * const meta = (float *) (decode_smem + meta_at) + 2 * (warp_ * 4 + row);
            meta[0] = j_ < 2 ? top[0] : top[1];
            meta[1] = j_ < 2 ? sum[0] : sum[1];
        }
    }
    if (with_fresh(first_unit)) {
        fresh.finish(p, blockIdx.y * p.heads_per_block + (first_unit >> 2), row0 + (first_unit & 3));
    }
    cluster_sync<true>(p.cluster);

    for (int unit = first_unit; unit < 4 * p.heads_per_block; unit += p.cluster * n_warps) {
        const int row = unit & 3, head = unit >> 2;
        if (unit != first_unit && with_fresh(unit)) {
            load_fresh(unit, lane_);
            fresh.finish(p, blockIdx.y * p.heads_per_block + head, row0 + row);
        }
        if (row0 + row >= p.n_rows) {
            continue;
        }
        const auto source_row = [&](int s, int & block) { // row of source s: slice s / cluster of block s % cluster
            block = s & (p.cluster - 1);
            return ((s >> p.cluster_log2) * p.heads_per_block + head) * 4 + row;
        };
        float v[N], all, total;
        join_sources<N>(
            sources, lane_,
            [&](int source, float * x) {
                int block;
                const int at = meta_at + 8 * source_row(source, block);
                cluster_load<2>(x, at, block);
            },
            [&](int source, float * y) {
                int block;
                const int at = decode_buffers_at + 4 * ROW * source_row(source, block);
#pragma unroll
                for (int i = 0; i < N; i += result_vectors<K>() ? 4 : 1) {
                    const int c = row_coordinate<D>(i, lane_) < D ? row_coordinate<D>(i, lane_) : 0;
                    cluster_load<result_vectors<K>() ? 4 : 1>(y + i, at + 4 * result_at<K>(c), block);
                }
            },
            v, all, total);
        const int h = blockIdx.y * p.heads_per_block + head;
        if (p.n_parts == 1) {
            store_row<D>(p, seq, h, row0 + row, v, all, total, fresh, lane_);
        } else {
            const long long to = (((long long) seq * p.n_head_kv + h) * p.n_rows + row0 + row) * p.n_parts +
                                 (blockIdx.x >> p.cluster_log2);
            for_row<D>(lane_, [&](int i, int c) { store_floats<row_vector<D>()>(p.part + to * D + c, v + i); });
            if (lane_ == 0) {
                p.meta[to] = make_float2(all, total);
            }
        }
    }
    cluster_sync<false>(p.cluster); // no block leaves while its results are read
}

// Joins the parts of one row: grid (rows, head_kv, seq).
constexpr int join_warps = 16, join_batch = 9; // parts that a warp loads at once: one round for up to 144
template <int D> __global__ void __launch_bounds__(32 * join_warps) attention_join(const decode_params p) {
    constexpr int N = (D + 31) / 32;
    __shared__ float rows[join_warps][32 * N];
    __shared__ float2 meta[join_warps]; // (top, sum)
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int row = blockIdx.x, head_kv = blockIdx.y, seq = blockIdx.z;
    const long long at = (((long long) seq * p.n_head_kv + head_kv) * p.n_rows + row) * p.n_parts;
    grid_trigger();
    fresh_part<D> fresh;
    const bool with_fresh = p.fresh.k && warp == 0;
    const int token = with_fresh ? fresh_token(p) : 0;
    grid_wait(); // for the newest token's key and value too: this kernel may be launched before they are there
    if (with_fresh) {
        fresh.load(p, token, head_kv, row, lane);
    }

    float v[N], top = -1e30f, sum = 0.0f;
#pragma unroll
    for (int i = 0; i < N; i++) {
        v[i] = 0.0f;
    }
#pragma unroll 1
    for (int first = warp; first < p.n_parts; first += join_batch * join_warps) {
        float y[join_batch][N];
        float2 m[join_batch];
#pragma unroll
        for (int q = 0; q < join_batch; q++) { // all loads before their first use
            const int part = first + q * join_warps;
            m[q] = make_float2(-1e30f, 0.0f);
#pragma unroll
            for (int i = 0; i < N; i++) {
                y[q][i] = 0.0f;
            }
            if (part < p.n_parts) {
                m[q] = p.meta[at + part];
                load_row<D>(p.part + (at + part) * D, lane, y[q]);
            }
        }
        const float before = top;
#pragma unroll
        for (int q = 0; q < join_batch; q++) {
            top = fmaxf(top, m[q].x);
        }
        const float alpha = exp2_fast(before - top);
        sum *= alpha;
#pragma unroll
        for (int i = 0; i < N; i++) {
            v[i] *= alpha;
        }
#pragma unroll
        for (int q = 0; q < join_batch; q++) {
            const float f = exp2_fast(m[q].x - top);
            sum = fmaf(m[q].y, f, sum);
#pragma unroll
            for (int i = 0; i < N; i++) {
                v[i] = fmaf(y[q][i], f, v[i]);
            }
        }
    }
    if (with_fresh) {
        fresh.finish(p, head_kv, row);
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        rows[warp][32 * i + lane] = v[i];
    }
    if (lane == 0) {
        meta[warp] = make_float2(top, sum);
    }
    __syncthreads();
    if (warp == 0) {
#pragma unroll
        for (int w = 0; w < join_warps; w++) {
            top = fmaxf(top, meta[w].x);
        }
        sum = 0.0f;
#pragma unroll
        for (int i = 0; i < N; i++) {
            v[i] = 0.0f;
        }
#pragma unroll
        for (int w = 0; w < join_warps; w++) {
            const float f = exp2_fast(meta[w].x - top);
            sum = fmaf(meta[w].y, f, sum);
#pragma unroll
            for (int i = 0; i < N; i++) {
                v[i] = fmaf(rows[w][32 * i + lane], f, v[i]);
            }
        }
        store_row<D>(p, seq, head_kv, row, v, top, sum, fresh, lane);
    }
}

#endif // PYTQ_HAVE_MMA

} // namespace pytq

// Attention of few query rows (decode), without matrices: R rows of one KV head per threadgroup.
//
//   logits   a lane takes one token of a tile of 32 and unpacks the whole key once for R rows; no value crosses a lane
//   output   a lane takes eight coordinates of the value (a byte of each plane) and walks the tile's tokens; with fewer
//            than 32 such units the SIMD group takes 32 / units tokens at a time, whose sums meet only at the very end
//
// SIMD groups of a threadgroup, and threadgroups of a split, take tiles in turn; each keeps its own softmax state.
// Threadgroup memory in floats: R query rows, two level tables, weights [SIMD group][R][32], output [SIMD group][DV],
// states [R][SIMD group][2].
template <short DK, short DV, short R>
kernel void kernel_pytq_attn_vec(constant pytq_metal_attention_args & args, device const char * q, device const uchar * k,
                                 device const uchar * v, device const char * mask, device const float * sinks,
                                 device float * dst, threadgroup float * smem [[threadgroup(0)]],
                                 uint3 tgpig [[threadgroup_position_in_grid]],
                                 ushort tiitg [[thread_index_in_threadgroup]],
                                 ushort tiisg [[thread_index_in_simdgroup]],
                                 ushort sgitg [[simdgroup_index_in_threadgroup]],
                                 ushort3 ntg [[threads_per_threadgroup]]) {
    constexpr short C = PYTQ_METAL_TILE;
    constexpr short UNITS = DV / 8, PARALLEL = 32 / UNITS;
    const int n_threads = ntg.x, nsg = n_threads / 32, lane = tiisg;
    const int row0 = (int) tgpig.x * R, head_kv = (int) tgpig.y;
    const int seq = (int) tgpig.z / args.n_splits, split = (int) tgpig.z % args.n_splits;
    const layout kl = k_layout(), vl = v_layout();

    threadgroup float * sq = smem;
    threadgroup float * tab_k = sq + R * DK;
    threadgroup float * tab_v = tab_k + PYTQ_METAL_GROUPS * PYTQ_METAL_TABLE;
    threadgroup float * weights = tab_v + PYTQ_METAL_GROUPS * PYTQ_METAL_TABLE + sgitg * (R * C);
    threadgroup float * outputs = tab_v + PYTQ_METAL_GROUPS * PYTQ_METAL_TABLE + nsg * (R * C);
    threadgroup float * states = outputs + nsg * DV;

    for (int i = tiitg; i < R * DK; i += n_threads) {
        const int row = row0 + i / DK;
        float x = 0.0f;
        if (row < args.n_rows) {
            const query_row r = query_row_of(args, row, head_kv);
            x = ((device const float *) (q + r.query * args.q_nb1 + r.head * args.q_nb2 + seq * args.q_nb3))[i % DK];
        }
        sq[i] = x * args.scale;
    }
    fill_table(tab_k, kl, tiitg, n_threads);
    fill_table(tab_v, vl, tiitg, n_threads);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    k += head_kv * args.k_nb2 + (seq / args.seq_ratio) * args.k_nb3;
    v += head_kv * args.v_nb2 + (seq / args.seq_ratio) * args.v_nb3;
    threadgroup const float4 * sq4 = (threadgroup const float4 *) sq;

    query_row rows[R];
    float top[R], sum[R];
    float4 lo_sum[R], hi_sum[R];
    PYTQ_UNROLL for (short r = 0; r < R; r++) {
        rows[r] = query_row_of(args, min(row0 + r, args.n_rows - 1), head_kv);
        top[r] = PYTQ_MASKED, sum[r] = 0.0f;
        lo_sum[r] = float4(0.0f), hi_sum[r] = float4(0.0f);
    }
    const int unit = lane % UNITS, part = lane / UNITS;
    const int unit_group = vl.code > CODE_TRELLIS ? 0 : group_of(vl, unit);

    for (int t0 = (split * nsg + sgitg) * C; t0 < args.n_kv; t0 += args.n_splits * nsg * C) {
        const int token = t0 + lane;
        const bool valid = token < args.n_kv;
        float s[R]; // bias, then logit
        bool any = false;
        PYTQ_UNROLL for (short r = 0; r < R; r++) {
            s[r] = bias_of(args, mask, rows[r], token, seq, valid && row0 + r < args.n_rows);
            any = any || s[r] > PYTQ_MASKED;
        }
        if (!simd_any(any)) {
            continue;
        }

        float dots[R];
        PYTQ_UNROLL for (short r = 0; r < R; r++) {
            dots[r] = 0.0f;
        }
        if (any) {
            device const uchar * block = k + token * args.k_nb1;
            const int groups = kl.code > CODE_TRELLIS ? 1 : n_groups(kl);
            for (int g = 0; g < groups; g++) {
                const int begin = groups == 1 || g == 0 ? 0 : group_end(kl, g - 1) / 8;
                const int end = groups == 1 ? DK / 8 : group_end(kl, g) / 8;
                float in_group[R];
                PYTQ_UNROLL for (short r = 0; r < R; r++) {
                    in_group[r] = 0.0f;
                }
                for (int byte = begin; byte < end; byte++) {
                    float4 lo, hi;
                    unpack8(block, byte, kl, tab_k, lo, hi);
                    PYTQ_UNROLL for (short r = 0; r < R; r++) {
                        in_group[r] += dot(lo, sq4[r * (DK / 4) + 2 * byte]) + dot(hi, sq4[r * (DK / 4) + 2 * byte + 1]);
                    }
                }
                const float factor = factor_of(block, kl, g);
                PYTQ_UNROLL for (short r = 0; r < R; r++) {
                    dots[r] += factor * in_group[r];
                }
            }
        }

        PYTQ_UNROLL for (short r = 0; r < R; r++) {
            const float x = logit_of(args, dots[r], s[r]);
            const float most = max(top[r], simd_max(x));
            const float keep = exp(top[r] - most), w = weight_of(x, most);
            sum[r] = sum[r] * keep + simd_sum(w);
            top[r] = most;
            lo_sum[r] *= keep, hi_sum[r] *= keep;
            weights[r * C + lane] = w;
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);

        if (part < PARALLEL) {
            const int n = min((int) C, args.n_kv - t0);
            for (int j = part; j < n; j += PARALLEL) {
                device const uchar * block = v + (t0 + j) * args.v_nb1;
                float4 lo, hi;
                unpack8(block, unit, vl, tab_v, lo, hi);
                const float factor = factor_of(block, vl, unit_group);
                lo *= factor, hi *= factor;
                PYTQ_UNROLL for (short r = 0; r < R; r++) {
                    lo_sum[r] += weights[r * C + j] * lo;
                    hi_sum[r] += weights[r * C + j] * hi;
                }
            }
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }

    PYTQ_UNROLL for (short r = 0; r < R; r++) {
        const float4 lo = lo_sum[r], hi = hi_sum[r];
        PYTQ_UNROLL for (short p = 1; p < PARALLEL; p++) {
            lo_sum[r] += simd_shuffle(lo, (ushort) ((lane + UNITS * p) & 31));
            hi_sum[r] += simd_shuffle(hi, (ushort) ((lane + UNITS * p) & 31));
        }
        if (lane == 0) {
            states[2 * (r * nsg + sgitg)] = top[r], states[2 * (r * nsg + sgitg) + 1] = sum[r];
        }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    for (short r = 0; r < R; r++) {
        if (row0 + r >= args.n_rows) {
            break; // all threads alike
        }
        if (lane < UNITS) {
            threadgroup float4 * at = (threadgroup float4 *) (outputs + sgitg * DV) + 2 * lane;
            at[0] = lo_sum[r], at[1] = hi_sum[r];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        float most = PYTQ_MASKED, total = 0.0f;
        for (int g = 0; g < nsg; g++) {
            most = max(most, states[2 * (r * nsg + g)]);
        }
        for (int g = 0; g < nsg; g++) {
            total += states[2 * (r * nsg + g) + 1] * exp(states[2 * (r * nsg + g)] - most);
        }
        const query_row at = query_row_of(args, row0 + r, head_kv);
        float factor = 1.0f;
        device float * out;
        if (args.n_splits == 1) {
            const normaliser n = normaliser_of(args, sinks, at.head, most, total);
            factor = n.factor * n.inverse;
            out = dst + dst_row(args, at.query, at.head, seq) * DV;
        } else {
            const int64_t index = part_row(args, row0 + r, head_kv, seq) * args.n_splits + split;
            out = dst + index * DV;
            if (tiitg == 0) {
                device float * meta = dst + n_part_rows(args) * args.n_splits * DV + 2 * index;
                meta[0] = most, meta[1] = total;
            }
        }
        for (int i = tiitg; i < DV; i += n_threads) {
            float x = 0.0f;
            for (int g = 0; g < nsg; g++) {
                x += outputs[g * DV + i] * exp(states[2 * (r * nsg + g)] - most);
            }
            out[i] = x * factor;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
    }
}

typedef decltype(kernel_pytq_attn_vec<64, 64, 1>) kernel_pytq_attn_vec_t;
template [[host_name("kernel_pytq_attn_vec_dk64_dv64_r1")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<64, 64, 1>;
template [[host_name("kernel_pytq_attn_vec_dk64_dv64_r2")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<64, 64, 2>;
template [[host_name("kernel_pytq_attn_vec_dk64_dv64_r4")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<64, 64, 4>;
template [[host_name("kernel_pytq_attn_vec_dk64_dv64_r8")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<64, 64, 8>;
template [[host_name("kernel_pytq_attn_vec_dk80_dv80_r1")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<80, 80, 1>;
template [[host_name("kernel_pytq_attn_vec_dk80_dv80_r2")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<80, 80, 2>;
template [[host_name("kernel_pytq_attn_vec_dk80_dv80_r4")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<80, 80, 4>;
template [[host_name("kernel_pytq_attn_vec_dk80_dv80_r8")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<80, 80, 8>;
template [[host_name("kernel_pytq_attn_vec_dk96_dv96_r1")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<96, 96, 1>;
template [[host_name("kernel_pytq_attn_vec_dk96_dv96_r2")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<96, 96, 2>;
template [[host_name("kernel_pytq_attn_vec_dk96_dv96_r4")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<96, 96, 4>;
template [[host_name("kernel_pytq_attn_vec_dk96_dv96_r8")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<96, 96, 8>;
template [[host_name("kernel_pytq_attn_vec_dk128_dv128_r1")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<128, 128, 1>;
template [[host_name("kernel_pytq_attn_vec_dk128_dv128_r2")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<128, 128, 2>;
template [[host_name("kernel_pytq_attn_vec_dk128_dv128_r4")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<128, 128, 4>;
template [[host_name("kernel_pytq_attn_vec_dk128_dv128_r8")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<128, 128, 8>;
template [[host_name("kernel_pytq_attn_vec_dk192_dv192_r1")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<192, 192, 1>;
template [[host_name("kernel_pytq_attn_vec_dk192_dv192_r2")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<192, 192, 2>;
template [[host_name("kernel_pytq_attn_vec_dk192_dv192_r4")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<192, 192, 4>;
template [[host_name("kernel_pytq_attn_vec_dk192_dv192_r8")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<192, 192, 8>;
template [[host_name("kernel_pytq_attn_vec_dk256_dv256_r1")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<256, 256, 1>;
template [[host_name("kernel_pytq_attn_vec_dk256_dv256_r2")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<256, 256, 2>;
template [[host_name("kernel_pytq_attn_vec_dk256_dv256_r4")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<256, 256, 4>;
template [[host_name("kernel_pytq_attn_vec_dk256_dv256_r8")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<256, 256, 8>;
template [[host_name("kernel_pytq_attn_vec_dk192_dv128_r1")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<192, 128, 1>;
template [[host_name("kernel_pytq_attn_vec_dk192_dv128_r2")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<192, 128, 2>;
template [[host_name("kernel_pytq_attn_vec_dk192_dv128_r4")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<192, 128, 4>;
template [[host_name("kernel_pytq_attn_vec_dk192_dv128_r8")]] kernel kernel_pytq_attn_vec_t kernel_pytq_attn_vec<192, 128, 8>;

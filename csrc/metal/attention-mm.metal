// Attention of many query rows (prefill) with 8 x 8 matrices: 32 packed rows per threadgroup, eight per SIMD group.
//
// A tile of C keys is unpacked once into threadgroup memory as halves and multiplied with the rows of all four SIMD groups,
// then the same memory takes the tile of values. Queries are stored divided by their row's largest magnitude, so no
// transform of the query can leave half precision's range; logits, weights and the output are f32. The output stays in
// matrices; if a maximum grew it is multiplied by a diagonal matrix from the left (which elements a lane holds is not
// documented).
//
// Threadgroup memory at head_dim 192 (C = 32): rows 12.8, tile 12.8, logits 4, tables 1.5, diagonals 1, states .4 KiB.
template <short DK, short DV>
kernel void kernel_pytq_attn_mm(constant pytq_metal_attention_args & args, device const char * q, device const uchar * k,
                                device const uchar * v, device const char * mask, device const float * sinks,
                                device float * dst, threadgroup float * smem [[threadgroup(0)]],
                                uint3 tgpig [[threadgroup_position_in_grid]],
                                ushort tiitg [[thread_index_in_threadgroup]],
                                ushort tiisg [[thread_index_in_simdgroup]],
                                ushort sgitg [[simdgroup_index_in_threadgroup]]) {
    constexpr short D = DK > DV ? DK : DV;
    constexpr short C = PYTQ_METAL_MM_TOKENS(D);
    constexpr short ROWS = PYTQ_METAL_MM_ROWS, NSG = ROWS / 8, THREADS = 32 * NSG;
    constexpr short LDK = DK + PYTQ_METAL_MM_PAD, LDV = DV + PYTQ_METAL_MM_PAD, LDT = D + PYTQ_METAL_MM_PAD;
    constexpr short PASSES = 8 * C / 32; // a lane holds one token of this many of its SIMD group's eight rows
    const int lane = tiisg, row0 = (int) tgpig.x * ROWS + 8 * sgitg, head_kv = (int) tgpig.y;
    const int seq = (int) tgpig.z / args.n_splits, split = (int) tgpig.z % args.n_splits;
    const layout kl = k_layout(), vl = v_layout();

    threadgroup float * tab_k = smem;
    threadgroup float * tab_v = tab_k + PYTQ_METAL_GROUPS * PYTQ_METAL_TABLE;
    threadgroup float * row_scale = tab_v + PYTQ_METAL_GROUPS * PYTQ_METAL_TABLE + 8 * sgitg;
    threadgroup float * states = tab_v + PYTQ_METAL_GROUPS * PYTQ_METAL_TABLE + ROWS + 16 * sgitg;
    threadgroup int * flags = (threadgroup int *) (tab_v + PYTQ_METAL_GROUPS * PYTQ_METAL_TABLE + 3 * ROWS);
    threadgroup float * diagonal = (threadgroup float *) (flags + 2 * NSG) + 64 * sgitg;
    threadgroup float * logits = (threadgroup float *) (flags + 2 * NSG) + 64 * NSG + 8 * C * sgitg;
    threadgroup half * all_queries = (threadgroup half *) ((threadgroup float *) (flags + 2 * NSG) + (64 + 8 * C) * NSG);
    threadgroup half * queries = all_queries + 8 * LDK * sgitg;
    threadgroup half * tile = all_queries + ROWS * LDK;

    fill_table(tab_k, kl, tiitg, THREADS);
    fill_table(tab_v, vl, tiitg, THREADS);
    for (int i = lane; i < 64; i += 32) {
        diagonal[i] = 0.0f;
    }
    for (int r = 0; r < 8; r++) {
        const query_row at = query_row_of(args, min(row0 + r, args.n_rows - 1), head_kv);
        device const float * from =
            (device const float *) (q + at.query * args.q_nb1 + at.head * args.q_nb2 + seq * args.q_nb3);
        float most = 0.0f;
        for (int i = lane; i < DK; i += 32) {
            most = max(most, fabs(from[i]));
        }
        most = simd_max(most);
        const float inverse = most > 0.0f ? 1.0f / most : 0.0f;
        for (int i = lane; i < DK; i += 32) {
            queries[r * LDK + i] = (half) (from[i] * inverse);
        }
        if (lane == 0) {
            row_scale[r] = most * args.scale;
        }
    }

    k += head_kv * args.k_nb2 + (seq / args.seq_ratio) * args.k_nb3;
    v += head_kv * args.v_nb2 + (seq / args.seq_ratio) * args.v_nb3;
    const int token_in_tile = lane % C, sub = lane / C;
    query_row rows[PASSES];
    float top[PASSES], sum[PASSES];
    PYTQ_UNROLL for (short i = 0; i < PASSES; i++) {
        rows[i] = query_row_of(args, min(row0 + sub + i * (32 / C), args.n_rows - 1), head_kv);
        top[i] = PYTQ_MASKED, sum[i] = 0.0f;
    }
    simdgroup_float8x8 out[DV / 8];
    PYTQ_UNROLL for (short i = 0; i < DV / 8; i++) {
        out[i] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);

    int parity = 0;
    for (int t0 = split * C; t0 < args.n_kv; t0 += args.n_splits * C) {
        const int token = t0 + token_in_tile;
        float s[PASSES]; // bias, then logit
        bool any = false;
        PYTQ_UNROLL for (short i = 0; i < PASSES; i++) {
            s[i] = bias_of(args, mask, rows[i], token, seq, token < args.n_kv && row0 + sub + i * (32 / C) < args.n_rows);
            any = any || s[i] > PYTQ_MASKED;
        }
        const bool mine = simd_any(any);
        threadgroup int * flag = flags + NSG * parity;
        parity ^= 1; // so that the next tile's flags do not meet readers of these
        if (lane == 0) {
            flag[sgitg] = mine ? 1 : 0;
        }
        threadgroup_barrier(mem_flags::mem_threadgroup); // also: the last tile of values has been read
        if ((flag[0] | flag[1] | flag[2] | flag[3]) == 0) {
            continue; // no row of the threadgroup sees this tile
        }

        for (int i = tiitg; i < C * (DK / 8); i += THREADS) {
            const int t = i / (DK / 8), byte = i % (DK / 8);
            float4 lo = float4(0.0f), hi = float4(0.0f);
            if (t0 + t < args.n_kv) {
                device const uchar * block = k + (t0 + t) * args.k_nb1;
                unpack8(block, byte, kl, tab_k, lo, hi);
                const float factor = factor_of(block, kl, kl.code > CODE_TRELLIS ? 0 : group_of(kl, byte));
                lo *= factor, hi *= factor;
            }
            threadgroup half4 * to = (threadgroup half4 *) (tile + t * LDT + 8 * byte);
            to[0] = half4(lo), to[1] = half4(hi);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        if (mine) {
            simdgroup_float8x8 product[C / 8];
            PYTQ_UNROLL for (short c = 0; c < C / 8; c++) {
                product[c] = make_filled_simdgroup_matrix<float, 8, 8>(0.0f);
            }
            PYTQ_UNROLL for (short i = 0; i < DK / 8; i++) {
                simdgroup_half8x8 mq;
                simdgroup_load(mq, queries + 8 * i, LDK);
                PYTQ_UNROLL for (short c = 0; c < C / 8; c++) {
                    simdgroup_half8x8 mk;
                    simdgroup_load(mk, tile + 8 * c * LDT + 8 * i, LDT, 0, true);
                    simdgroup_multiply_accumulate(product[c], mq, mk, product[c]);
                }
            }
            PYTQ_UNROLL for (short c = 0; c < C / 8; c++) {
                simdgroup_store(product[c], logits + 8 * c, C);
            }
            simdgroup_barrier(mem_flags::mem_threadgroup);

            bool grew = false;
            PYTQ_UNROLL for (short i = 0; i < PASSES; i++) {
                const int r = sub + i * (32 / C);
                const float x = logit_of(args, logits[r * C + token_in_tile] * row_scale[r], s[i]);
                float most = max(top[i], x);
                for (ushort m = C / 2; m > 0; m /= 2) {
                    most = max(most, simd_shuffle_xor(most, m));
                }
                const float keep = exp(top[i] - most), w = weight_of(x, most);
                float added = w;
                for (ushort m = C / 2; m > 0; m /= 2) {
                    added += simd_shuffle_xor(added, m);
                }
                sum[i] = sum[i] * keep + added;
                grew = grew || most > top[i];
                top[i] = most;
                logits[r * C + token_in_tile] = w;
                if (token_in_tile == 0) {
                    diagonal[9 * r] = keep;
                }
            }
            simdgroup_barrier(mem_flags::mem_threadgroup);
            if (simd_any(grew)) {
                simdgroup_float8x8 md;
                simdgroup_load(md, diagonal, 8);
                PYTQ_UNROLL for (short i = 0; i < DV / 8; i++) {
                    simdgroup_multiply(out[i], md, out[i]);
                }
            }
        }
        threadgroup_barrier(mem_flags::mem_threadgroup); // the tile of keys has been read

        for (int i = tiitg; i < C * (DV / 8); i += THREADS) {
            const int t = i / (DV / 8), byte = i % (DV / 8);
            float4 lo = float4(0.0f), hi = float4(0.0f);
            if (t0 + t < args.n_kv) {
                device const uchar * block = v + (t0 + t) * args.v_nb1;
                unpack8(block, byte, vl, tab_v, lo, hi);
                const float factor = factor_of(block, vl, vl.code > CODE_TRELLIS ? 0 : group_of(vl, byte));
                lo *= factor, hi *= factor;
            }
            threadgroup half4 * to = (threadgroup half4 *) (tile + t * LDV + 8 * byte);
            to[0] = half4(lo), to[1] = half4(hi);
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);

        if (mine) {
            PYTQ_UNROLL for (short c = 0; c < C / 8; c++) {
                simdgroup_float8x8 mw;
                simdgroup_load(mw, logits + 8 * c, C);
                PYTQ_UNROLL for (short i = 0; i < DV / 8; i++) {
                    simdgroup_half8x8 mv;
                    simdgroup_load(mv, tile + 8 * c * LDV + 8 * i, LDV);
                    simdgroup_multiply_accumulate(out[i], mw, mv, out[i]);
                }
            }
        }
    }

    PYTQ_UNROLL for (short i = 0; i < PASSES; i++) {
        if (token_in_tile == 0) {
            const int r = sub + i * (32 / C);
            states[2 * r] = top[i], states[2 * r + 1] = sum[i];
        }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    // eight columns at a time through the memory of the logits; a lane writes two values
    const int r = lane / 4, row = row0 + r;
    const query_row at = query_row_of(args, min(row, args.n_rows - 1), head_kv);
    float factor = 1.0f;
    device float * to;
    if (args.n_splits == 1) {
        const normaliser n = normaliser_of(args, sinks, at.head, states[2 * r], states[2 * r + 1]);
        factor = n.factor * n.inverse;
        to = dst + dst_row(args, at.query, at.head, seq) * DV;
    } else {
        const int64_t index = part_row(args, row, head_kv, seq) * args.n_splits + split;
        to = dst + index * DV;
        if (row < args.n_rows && lane % 4 == 0) {
            device float * meta = dst + n_part_rows(args) * args.n_splits * DV + 2 * index;
            meta[0] = states[2 * r], meta[1] = states[2 * r + 1];
        }
    }
    to += 2 * (lane % 4);
    PYTQ_UNROLL for (short i = 0; i < DV / 8; i++) {
        simdgroup_store(out[i], logits, 8);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        if (row < args.n_rows) {
            to[8 * i] = logits[2 * lane] * factor, to[8 * i + 1] = logits[2 * lane + 1] * factor;
        }
        simdgroup_barrier(mem_flags::mem_threadgroup);
    }
}

typedef decltype(kernel_pytq_attn_mm<64, 64>) kernel_pytq_attn_mm_t;
template [[host_name("kernel_pytq_attn_mm_dk64_dv64")]] kernel kernel_pytq_attn_mm_t kernel_pytq_attn_mm<64, 64>;
template [[host_name("kernel_pytq_attn_mm_dk80_dv80")]] kernel kernel_pytq_attn_mm_t kernel_pytq_attn_mm<80, 80>;
template [[host_name("kernel_pytq_attn_mm_dk96_dv96")]] kernel kernel_pytq_attn_mm_t kernel_pytq_attn_mm<96, 96>;
template [[host_name("kernel_pytq_attn_mm_dk128_dv128")]] kernel kernel_pytq_attn_mm_t kernel_pytq_attn_mm<128, 128>;
template [[host_name("kernel_pytq_attn_mm_dk192_dv192")]] kernel kernel_pytq_attn_mm_t kernel_pytq_attn_mm<192, 192>;
template [[host_name("kernel_pytq_attn_mm_dk256_dv256")]] kernel kernel_pytq_attn_mm_t kernel_pytq_attn_mm<256, 256>;
template [[host_name("kernel_pytq_attn_mm_dk192_dv128")]] kernel kernel_pytq_attn_mm_t kernel_pytq_attn_mm<192, 128>;

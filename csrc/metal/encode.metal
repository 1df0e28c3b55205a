// Encoder: one SIMD group per head vector, the bytes of csrc/ref/codec.c.
//
// Sums run in the reference's order (16 lanes, folded by halves); no product may be fused with a sum and divisions and
// square roots are rounded correctly. The pragmas ask the compiler for that; whether Apple's keeps the last bit has to be
// seen on hardware (a different but equally good block would be the result where it does not).
//
// Viterbi search in place: 64 path metrics live in 32 lanes x 2 registers. A step joins the states p and p + 32 into 2 p
// and 2 p + 1; if both results are written where the operands were, the label of a location rotates by one bit per step.
// So step f of six exchanges along bit 5 - f of the location: the two registers for f = 0, lanes otherwise. Following the
// survivor backwards replaces just that bit.

static inline float fold16(float x) {
    x += simd_shuffle_xor(x, 8);
    x += simd_shuffle_xor(x, 4);
    x += simd_shuffle_xor(x, 2);
    x += simd_shuffle_xor(x, 1);
    return x;
}

// Sum of a[i] * b[i] in the reference's order: lane i % 16 adds its products in ascending order.
static inline float sum_product(threadgroup const float * a, threadgroup const float * b, int n, int lane) {
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
    float acc = 0.0f;
    for (int i = lane & 15; i < n; i += 16) {
        const float p = a[i] * b[i];
        acc += p;
    }
    return fold16(acc);
}

static inline uint ballot(bool x) {
    return (uint) (simd_vote::vote_t) simd_ballot(x);
}

// Byte of the LOG8 scale nearest to sigma * 2^shift.
static inline int log8_encode(float sigma, int shift) {
    if (!(sigma > 0.0f)) {
        return 0;
    }
    const uint u = as_type<uint>(sigma), m = u & 0x7fffffu;
    // mantissas of 2^((i + 1/2) / 8)
    int k = 0;
    k += m >= 0x05aac3u, k += m >= 0x11c3d3u, k += m >= 0x1ef532u, k += m >= 0x2d583fu;
    k += m >= 0x3d08a4u, k += m >= 0x4e248cu, k += m >= 0x60ccdfu, k += m >= 0x75257du;
    const int e = 8 * ((int) (u >> 23) - 127 + shift) + k + 136;
    return e < 1 ? 0 : min(e, 255);
}

static inline float scaled(float x, int shift) {
    return shift != 0 ? ldexp(x, shift) : x;
}

// Nearest level of each subset z = 2 z1 + z0: squared errors in the order [z0][z1], level indices as bytes z.
static inline uint choose(int code, int bits, float y, float weight, threadgroup const float * level,
                          threadgroup float * cost) {
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
    const int n_sub = n_levels_of(code, bits) / 4;
    uint best = 0;
    for (int z = 0; z < 4; z++) {
        int n = 0;
        while (n + 1 < n_sub && y > 0.5f * (level[4 * n + z] + level[4 * n + 4 + z])) {
            n++;
        }
        const float e = y - level[4 * n + z];
        const float e2 = e * e;
        cost[(z & 1) * 2 + (z >> 1)] = weight * e2;
        best |= (uint) (4 * n + z) << (8 * z);
    }
    return best;
}

static inline int rotate6(int x, int n) {
    return (x << n | x >> (6 - n)) & 63;
}

struct viterbi_state {
    float m0, m1; // metrics of locations lane and lane + 32
    uint d0, d1;  // bit of lane: the partner's path won the step
};

// own, other: costs of staying at a location and of coming from its partner. The partner of an upper location is the
// state with the older bit 0, which wins ties.
static inline viterbi_state viterbi_step(viterbi_state v, int phase, float own0, float own1, float other0, float other1,
                                         int lane) {
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
    float x0 = v.m1, x1 = v.m0;
    bool upper0 = false, upper1 = true;
    if (phase > 0) {
        const ushort bit = (ushort) (1 << (5 - phase));
        x0 = simd_shuffle_xor(v.m0, bit), x1 = simd_shuffle_xor(v.m1, bit);
        upper0 = upper1 = (lane & bit) != 0;
    }
    const float s0 = v.m0 + own0, t0 = x0 + other0;
    const float s1 = v.m1 + own1, t1 = x1 + other1;
    viterbi_state r;
    r.m0 = t0 < s0 ? t0 : s0, r.m1 = t1 < s1 ? t1 : s1;
    r.d0 = ballot(t0 < s0 || (t0 == s0 && upper0));
    r.d1 = ballot(t1 < s1 || (t1 == s1 && upper1));
    return r;
}

// Writes one byte of a plane per eight lanes.
static inline void put_plane(threadgroup uchar * out, layout l, int p, int base, uint word, int lane) {
    if (lane < 4 && base + 8 * lane < plane_length(l, p)) {
        out[plane_offset(l, p) + base / 8 + lane] = (uchar) (word >> (8 * lane));
    }
}

static inline void encode_scalar(threadgroup const float * x, threadgroup float * chosen, threadgroup uchar * out,
                                 threadgroup const float * tab, layout l, int shift, int lane) {
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
    const int d = head_dim(l), n_levels = n_levels_of(l.code, l.b0);
    const float step = step_of(l.code, l.b0);
    const float ss = sum_product(x, x, d, lane);
    const float sigma = precise::sqrt(precise::divide(ss, (float) d));
    const float inv = precise::divide(1.0f, sigma * step);
    for (int base = 0; base < d; base += 32) {
        const int i = base + lane;
        int k = 0;
        if (i < d) {
            const float y = x[i] * inv;
            while (k + 1 < n_levels && y > 0.5f * (tab[k] + tab[k + 1])) {
                k++;
            }
            chosen[i] = tab[k];
        }
        for (int p = 0; p < l.b0; p++) {
            put_plane(out, l, p, base, ballot(k >> p & 1), lane);
        }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    // the stored scale gives the reconstruction the norm of the input
    const float ll = sum_product(chosen, chosen, d, lane);
    const float s = scaled(precise::divide(precise::sqrt(precise::divide(ss, ll)), step), shift);
    if (lane == 0) {
        const ushort h = s < 65504.0f ? as_type<ushort>((half) s) : (ushort) 0x7bff;
        out[0] = (uchar) h, out[1] = (uchar) (h >> 8);
    }
}

static inline void encode_trellis(threadgroup const float * x, threadgroup float * cost, threadgroup uint * best,
                                  threadgroup uint * decision, threadgroup uchar * path, threadgroup uchar * out,
                                  threadgroup const float * tab, layout l, int shift, int lane) {
#pragma METAL fp math_mode(safe)
#pragma METAL fp contract(off)
    const int d = head_dim(l), groups = n_groups(l);
    int e[PYTQ_METAL_GROUPS] = {0, 0, 0};
    PYTQ_UNROLL for (int g = 0; g < PYTQ_METAL_GROUPS; g++) {
        if (g < groups) {
            const int at = g == 0 ? 0 : group_end(l, g - 1), n = group_end(l, g) - at, bits = group_bits(l, g);
            const float sigma = precise::sqrt(precise::divide(sum_product(x + at, x + at, n, lane), (float) n));
            e[g] = log8_encode(sigma, shift);
            const float f = scaled(log8_scale((uint) e[g]), -shift) * step_of(l.code, bits);
            const float inv = e[g] != 0 ? precise::divide(1.0f, f) : 0.0f;
            const float weight = groups == 1 ? 1.0f : f * f;
            for (int i = at + lane; i < at + n; i += 32) {
                best[i] = choose(l.code, bits, x[i] * inv, weight, tab + PYTQ_METAL_TABLE * g, cost + 4 * i);
            }
        }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    // place of the cost of staying at this lane's two locations in each phase: [z0][z1 ^ (upper of its pair)]
    int own[6][2];
    PYTQ_UNROLL for (int f = 0; f < 6; f++) {
        PYTQ_UNROLL for (int r = 0; r < 2; r++) {
            const int location = lane + 32 * r, s = rotate6(location, (f + 1) % 6);
            const int z1 = (s ^ s >> 5) & 1, z0 = (s >> 2 ^ s >> 4) & 1;
            own[f][r] = 2 * z0 + (z1 ^ (location >> (5 - f) & 1));
        }
    }
    viterbi_state v = {lane == 0 ? 0.0f : 1e30f, 1e30f, 0u, 0u};
    for (int t0 = 0; t0 < d; t0 += 6) {
        PYTQ_UNROLL for (int f = 0; f < 6; f++) {
            const int t = t0 + f;
            if (t < d) {
                threadgroup const float * c = cost + 4 * t;
                v = viterbi_step(v, f, c[own[f][0]], c[own[f][1]], c[own[f][0] ^ 1], c[own[f][1] ^ 1], lane);
                if (lane == 0) {
                    decision[2 * t] = v.d0, decision[2 * t + 1] = v.d1;
                }
            }
        }
    }

    // best final state, the lowest on ties
    const int turns = d % 6;
    const int s0 = rotate6(lane, turns), s1 = rotate6(lane + 32, turns);
    const bool second = v.m1 < v.m0 || (v.m1 == v.m0 && s1 < s0);
    float top = second ? v.m1 : v.m0;
    int state = second ? s1 : s0;
    for (ushort s = 16; s > 0; s /= 2) {
        const float other = simd_shuffle_xor(top, s);
        const int other_state = simd_shuffle_xor(state, s);
        const bool take = other < top || (other == top && other_state < state);
        top = take ? other : top, state = take ? other_state : state;
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    // Survivor, newest steps first. Before the steps of a group of six are undone, the bits of the location are their
    // coded bits, the oldest in bit 5.
    int location = rotate6(state, (6 - turns) % 6);
    for (int t0 = (d - 1) / 6 * 6; t0 >= 0; t0 -= 6) {
        if (lane == 0) {
            path[t0 / 6] = (uchar) (reverse_bits((uint) location) >> 26);
        }
        for (int f = min(5, d - 1 - t0); f >= 0; f--) {
            const uint won = decision[2 * (t0 + f) + (location >> 5)] >> (location & 31) & 1u;
            location ^= (int) won << (5 - f);
        }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    uint before = 0;
    for (int base = 0; base < d; base += 32) {
        const int i = base + lane;
        const uint u = ballot(i < d && (path[i / 6] >> (i % 6) & 1));
        // shifted copies of the coded bits, continued from the 32 before
        const uint z1 = u ^ (u << 5 | before >> 27) ^ (u << 6 | before >> 26);
        const uint z0 = (u << 2 | before >> 30) ^ (u << 4 | before >> 28);
        before = u;
        int k = 0;
        if (i < d) {
            const int z = (int) (2 * (z1 >> lane & 1u) + (z0 >> lane & 1u));
            k = (int) (best[i] >> (8 * z) & 255u);
            cost[i] = tab[PYTQ_METAL_TABLE * group_of(l, i / 8) + k];
        }
        put_plane(out, l, 0, base, u, lane);
        for (int p = 1; p < l.b0; p++) {
            put_plane(out, l, p, base, ballot(k >> (p + 1) & 1), lane);
        }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    // with the levels fixed, the neighbouring scale may fit better
    PYTQ_UNROLL for (int g = 0; g < PYTQ_METAL_GROUPS; g++) {
        if (g < groups) {
            const int at = g == 0 ? 0 : group_end(l, g - 1), n = group_end(l, g) - at;
            const float xl = sum_product(x + at, cost + at, n, lane), ll = sum_product(cost + at, cost + at, n, lane);
            int pick = e[g];
            float pick_error = 0.0f;
            for (int k = 0; k < 3 && e[g] > 0; k++) {
                const int candidate = e[g] + (k == 1 ? -1 : k == 2 ? 1 : 0);
                if (candidate >= 1 && candidate <= 255) {
                    const float f = scaled(log8_scale((uint) candidate), -shift) * step_of(l.code, group_bits(l, g));
                    const float fll = f * ll, xl2 = 2.0f * xl;
                    const float error = f * (fll - xl2);
                    if (k == 0 || error < pick_error) {
                        pick = candidate, pick_error = error;
                    }
                }
            }
            if (lane == 0) {
                out[g] = (uchar) pick;
            }
        }
    }
}

// Grid: vectors of a row of dimension 1 over the SIMD groups of x, dimensions 2 and 3 in y and z.
kernel void kernel_pytq_encode(constant pytq_metal_encode_args & args, device const char * src, device const char * rows,
                               device char * dst, threadgroup float * smem [[threadgroup(0)]],
                               uint3 tgpig [[threadgroup_position_in_grid]],
                               ushort tiitg [[thread_index_in_threadgroup]],
                               ushort tiisg [[thread_index_in_simdgroup]],
                               ushort sgitg [[simdgroup_index_in_threadgroup]],
                               ushort3 ntg [[threads_per_threadgroup]]) {
    const layout l = k_layout();
    const int d = head_dim(l), lane = tiisg;
    threadgroup float * tab = smem;
    fill_table(tab, l, tiitg, ntg.x);
    threadgroup_barrier(mem_flags::mem_threadgroup);

    threadgroup float * x = smem + PYTQ_METAL_GROUPS * PYTQ_METAL_TABLE + sgitg * PYTQ_METAL_ENCODE_WORDS(d);
    threadgroup float * cost = x + d; // [t][z0][z1]; later the chosen levels
    threadgroup uint * best = (threadgroup uint *) (cost + 4 * d);
    threadgroup uint * decision = best + d;
    threadgroup uchar * path = (threadgroup uchar *) (decision + 2 * d);
    threadgroup uchar * out = path + 48;

    const int item = (int) (tgpig.x * (ntg.x / 32u)) + sgitg;
    const int ib = item % args.blocks_per_row, i1 = item / args.blocks_per_row;
    if (i1 >= args.n1) {
        return; // the whole SIMD group
    }
    int64_t row = i1;
    if (args.row_bytes != 0) {
        device const char * at = rows + i1 * args.rows_nb0 + (tgpig.y % (uint) args.ne11) * args.rows_nb1 +
                                 (tgpig.z % (uint) args.ne12) * args.rows_nb2;
        row = args.row_bytes == 8 ? *(device const int64_t *) at : (int64_t) * (device const int32_t *) at;
    }
    device const float * from =
        (device const float *) (src + i1 * args.src_nb1 + tgpig.y * args.src_nb2 + tgpig.z * args.src_nb3) + (int64_t) ib * d;
    device uchar * to = (device uchar *) dst + row * args.dst_nb1 + tgpig.y * args.dst_nb2 + tgpig.z * args.dst_nb3 +
                        (int64_t) ib * block_bytes(l);

    // on bits: relaxed mathematics may assume that there are no infinities
    uint top_bits = 0;
    for (int i = lane; i < d; i += 32) {
        const float v = from[i];
        x[i] = v;
        top_bits = max(top_bits, as_type<uint>(v) & 0x7fffffffu);
    }
    top_bits = simd_max(top_bits);
    if (top_bits >= 0x7f800000u || top_bits == 0u) {
        for (int i = lane; i < block_bytes(l); i += 32) {
            to[i] = 0;
        }
        return; // the whole SIMD group
    }
    const float top = as_type<float>(top_bits);
    int shift = 0;
    if (!(top >= 0x1p-40f && top <= 0x1p40f)) {
        frexp(top, shift);
        for (int i = lane; i < d; i += 32) {
            x[i] = ldexp(x[i], -shift);
        }
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);

    if (l.code == CODE_SCALAR) {
        encode_scalar(x, cost, out, tab, l, shift, lane);
    } else {
        encode_trellis(x, cost, best, decision, path, out, tab, l, shift, lane);
    }
    simdgroup_barrier(mem_flags::mem_threadgroup);
    for (int i = lane; i < block_bytes(l); i += 32) {
        to[i] = out[i];
    }
}

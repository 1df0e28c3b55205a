// Encoder of the cache types on the GPU: one warp per head vector, bit for bit what csrc/ref/codec.c writes.
//
// Sums run in the reference's order (16 lanes, folded by halves), every product and sum is rounded on its own, so
// -use_fast_math cannot change a byte.
//
// Viterbi search in place: 64 path metrics live in 32 lanes x 2 registers. A trellis step joins the states p and p + 32
// into 2 p and 2 p + 1; writing the two results where the two operands were makes the state label rotate by one bit per
// step, so each step exchanges along one fixed bit of the location: a register pair in one step of six, a lane exchange
// (one shuffle per register) in the others. Following the survivor backwards then only replaces that one bit of the
// location.
#pragma once

#include "device.cuh"

namespace pytq {

#if defined(__HIPCC__)
PYTQ_DEV uint32_t ballot32(bool b, int half) {
    return (uint32_t) (__ballot(b) >> half);
}
template <class X> PYTQ_DEV X swap_lanes(X x, int mask) {
    return __shfl_xor(x, mask, 32);
}
template <class X> PYTQ_DEV X from_lane(X x, int lane) {
    return __shfl(x, lane, 32);
}
PYTQ_DEV void warp_fence() {
    __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
    __builtin_amdgcn_wave_barrier();
}
#else
PYTQ_DEV uint32_t ballot32(bool b, int) {
    return __ballot_sync(0xffffffffu, b);
}
template <class X> PYTQ_DEV X swap_lanes(X x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask);
}
template <class X> PYTQ_DEV X from_lane(X x, int lane) {
    return __shfl_sync(0xffffffffu, x, lane);
}
PYTQ_DEV void warp_fence() {
    __syncwarp();
}
#endif

struct encode_params {
    const char * src;  // f32 [row_len, n1, n2, n3]
    const char * rows; // row numbers [n1, ne11, ne12], 4 or 8 bytes each, or null: row i goes to row i
    char * dst;
    long long src_nb1, src_nb2, src_nb3, rows_nb0, rows_nb1, rows_nb2, dst_nb1, dst_nb2, dst_nb3;
    int row_bytes; // 4 or 8
    int n1, n2, n3, ne11, ne12, blocks_per_row;
    layout l;
};

// Two sets of vectors in one launch (the keys and values of a layer): blocks below n_first_blocks take the first.
struct encode_pair {
    encode_params p[2];
    int n_first_blocks;
};

// Shared memory of one warp in bytes: x, costs, best levels, decisions, output.
PYTQ_HD inline int encode_warp_bytes(int d) {
    return d * (4 + 16 + 4 + 8) + 48 + 48 + 288;
}

PYTQ_DEV float fold16(float acc) {
    for (int w = 8; w > 0; w /= 2) {
        acc = __fadd_rn(acc, swap_lanes(acc, w));
    }
    return acc;
}

// Sum of a[i] * b[i] in the reference's order: lane i % 16 adds its products in ascending order. Both half warps get
// the result.
PYTQ_DEV float sum_product(const float * a, const float * b, int n, int lane) {
    float acc = 0.0f;
#pragma unroll 4
    for (int i = lane & 15; i < n; i += 16) {
        acc = __fadd_rn(acc, __fmul_rn(a[i], b[i]));
    }
    return fold16(acc);
}

PYTQ_DEV int log8_encode(float sigma, int shift) {
    constexpr uint32_t limit[8] = {0x5aac3,  0x11c3d3, 0x1ef532, 0x2d583f,
                                   0x3d08a4, 0x4e248c, 0x60ccdf, 0x75257d}; // mantissas of 2^((i + 1/2) / 8)
    const uint32_t u = as_uint(sigma), m = u & 0x7fffffu;
    if (!(sigma > 0.0f)) {
        return 0;
    }
    int k = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        k += m >= limit[i];
    }
    const int e = 8 * ((int) (u >> 23) - 127 + shift) + k + PYTQ_LOG8_BIAS;
    return e < 1 ? 0 : e > 255 ? 255 : e;
}

PYTQ_DEV float scaled(float x, int shift) {
    return shift ? ldexpf(x, shift) : x;
}

// Nearest level of each subset for one coordinate: squared errors in the order [z0][z1], best levels as bytes z = 2 z1
// + z0.
template <int CODE, int BITS> PYTQ_DEV void choose(float y, float weight, float cost[4], uint32_t * best) {
    using B = book<CODE, BITS>;
    constexpr int n_sub = B::n_levels / 4;
    uint32_t packed = 0;
#pragma unroll
    for (int z = 0; z < 4; z++) {
        int n = 0;
        float level = (float) B::level(z);
#pragma unroll
        for (int k = 0; k + 1 < n_sub; k++) {
            const bool up = y > 0.5f * (float) (B::level(4 * k + z) + B::level(4 * k + 4 + z));
            n = up ? k + 1 : n;
            level = up ? (float) B::level(4 * k + 4 + z) : level;
        }
        const float e = __fsub_rn(y, level);
        cost[(z & 1) * 2 + (z >> 1)] = __fmul_rn(weight, __fmul_rn(e, e));
        packed |= (uint32_t) (4 * n + z) << (8 * z);
    }
    *best = packed;
}

template <int CODE, int BITS> PYTQ_DEV float level_at(int i) {
    return (float) book<CODE, BITS>::level(i);
}

// Calls f with the number of bits as a template argument.
template <int BITS, class F> PYTQ_DEV void with_bits(int bits, F f) {
    if constexpr (BITS > 0) {
        f.template operator()<BITS>();
    } else {
        switch (bits) {
            case 1:
                f.template operator()<1>();
                break;
            case 2:
                f.template operator()<2>();
                break;
            case 3:
                f.template operator()<3>();
                break;
            case 4:
                f.template operator()<4>();
                break;
            default:
                f.template operator()<5>();
                break;
        }
    }
}

struct choose_call {
    float y, weight;
    float * cost;
    uint32_t * best;
    template <int B> PYTQ_DEV void operator()() { choose<PYTQ_CODE_TRELLIS, B>(y, weight, cost, best); }
};

template <int CODE> struct level_call {
    int index;
    float * out;
    template <int B> PYTQ_DEV void operator()() { *out = level_at<CODE, B>(index); }
};

template <int CODE> struct step_call {
    float * out;
    template <int B> PYTQ_DEV void operator()() { *out = book<CODE, B>::step(); }
};

// One step of the search. c[r]: cost of staying at location 32 r + lane, e[r]: cost of coming from its partner. A
// decision bit says that the partner's path won; the partner of an upper location (bit L set) is the state with the
// older bit 0, which wins ties.
template <int PHASE>
PYTQ_DEV void viterbi_step(float m[2], const float c[2], const float e[2], uint32_t decision[2], int lane) {
    constexpr int L = 5 - PHASE;
    if constexpr (PHASE == 0) {
        // register 0 is state p, register 1 is p + 32
        const float s0 = __fadd_rn(m[0], c[0]), t0 = __fadd_rn(m[1], e[0]);
        const float s1 = __fadd_rn(m[1], c[1]), t1 = __fadd_rn(m[0], e[1]);
        m[0] = fminf(s0, t0), m[1] = fminf(s1, t1);
        decision[0] = ballot32(t0 < s0, lane & 32), decision[1] = ballot32(t1 <= s1, lane & 32);
    } else {
        const bool upper = lane >> L & 1;
        const float x0 = swap_lanes(m[0], 1 << L), x1 = swap_lanes(m[1], 1 << L);
        const float s0 = __fadd_rn(m[0], c[0]), t0 = __fadd_rn(x0, e[0]);
        const float s1 = __fadd_rn(m[1], c[1]), t1 = __fadd_rn(x1, e[1]);
        m[0] = fminf(s0, t0), m[1] = fminf(s1, t1);
        const bool p0 = (t0 < s0) | ((t0 == s0) & upper), p1 = (t1 < s1) | ((t1 == s1) & upper);
        decision[0] = ballot32(p0, lane & 32), decision[1] = ballot32(p1, lane & 32);
    }
}

extern __shared__ __align__(16) char encode_smem[];

// Costs of six steps for this lane's two locations. at[f][r]: offset of the cost of staying, step: byte offset of the
// first step.
struct step_costs {
    float c[6][2], e[6][2];
    PYTQ_DEV void load(const int at[6][2], const int other[6][2], int step) {
#pragma unroll
        for (int f = 0; f < 6; f++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                c[f][r] = *(const float *) (encode_smem + at[f][r] + step + 16 * f);
                e[f][r] = *(const float *) (encode_smem + other[f][r] + step + 16 * f);
            }
        }
    }
};

PYTQ_DEV int rotate6(int x, int n) {
    return (x << n | x >> (6 - n)) & 63;
}

// BITS: bits of the only group, or 0 for a type with several groups.
template <int CODE, int BITS> __global__ void __launch_bounds__(128) encode(const PYTQ_GRID_CONSTANT encode_pair pair) {
    const int which = (int) blockIdx.x >= pair.n_first_blocks;
    const encode_params & p = pair.p[which];
    char * const smem = encode_smem;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, d = p.l.d;
    float * const x = (float *) (smem + warp * encode_warp_bytes(d));
    float * const cost = x + d; // [t][z0][z1]; later the chosen levels
    uint32_t * const best = (uint32_t *) (cost + 4 * d);
    uint2 * const decision = (uint2 *) (best + d);         // six more entries than steps: whole groups are written
    uint8_t * const path = (uint8_t *) (decision + d + 6); // coded bits, six per byte
    uint8_t * const out = path + 48;

    const long long item = (long long) (blockIdx.x - which * pair.n_first_blocks) * (blockDim.x >> 5) + warp;
    const long long n_items = (long long) p.blocks_per_row * p.n1 * p.n2 * p.n3;
    if (item >= n_items) {
        return;
    }
    const int ib = (int) (item % p.blocks_per_row);
    long long rest = item / p.blocks_per_row;
    const int i1 = (int) (rest % p.n1);
    rest /= p.n1;
    const int i2 = (int) (rest % p.n2), i3 = (int) (rest / p.n2);
    long long row = i1;
    if (p.rows) {
        const char * at = p.rows + i1 * p.rows_nb0 + (i2 % p.ne11) * p.rows_nb1 + (i3 % p.ne12) * p.rows_nb2;
        row = p.row_bytes == 8 ? *(const long long *) at : *(const int *) at;
    }
    const float * const src =
        (const float *) (p.src + i1 * p.src_nb1 + i2 * p.src_nb2 + i3 * p.src_nb3) + (long long) ib * d;
    uint8_t * const dst =
        (uint8_t *) p.dst + row * p.dst_nb1 + i2 * p.dst_nb2 + i3 * p.dst_nb3 + (long long) ib * p.l.block_bytes;

    float top = 0.0f;
    bool finite = true;
    for (int i = lane; i < d; i += 32) {
        const float v = src[i], a = fabsf(v);
        x[i] = v;
        finite = finite && a <= 3.4028234e38f;
        top = fmaxf(top, a);
    }
    for (int s = 16; s > 0; s /= 2) {
        top = fmaxf(top, swap_lanes(top, s));
    }
    finite = ballot32(!finite, lane & 32) == 0;
    if (!finite || top == 0.0f) {
        for (int i = lane; i < p.l.block_bytes; i += 32) {
            dst[i] = 0;
        }
        return;
    }
    int shift = 0;
    if (!(top >= 0x1p-40f && top <= 0x1p40f)) {
        frexpf(top, &shift);
        for (int i = lane; i < d; i += 32) {
            x[i] = ldexpf(x[i], -shift);
        }
    }
    warp_fence();

    if constexpr (CODE == PYTQ_CODE_SCALAR) {
        using B = book<CODE, BITS>;
        const float ss = sum_product(x, x, d, lane);
        const float sigma = __fsqrt_rn(__fdiv_rn(ss, (float) d));
        const float inv = __fdiv_rn(1.0f, __fmul_rn(sigma, B::step()));
        for (int base = 0; base < d; base += 32) {
            const int i = base + lane;
            int k = 0;
            float level = (float) B::level(0);
            if (i < d) {
                const float y = __fmul_rn(x[i], inv);
#pragma unroll
                for (int n = 0; n + 1 < B::n_levels; n++) {
                    const bool up = y > 0.5f * (float) (B::level(n) + B::level(n + 1));
                    k = up ? n + 1 : k;
                    level = up ? (float) B::level(n + 1) : level;
                }
                cost[i] = level;
            }
#pragma unroll
            for (int b = 0; b < BITS; b++) {
                const uint32_t w = ballot32(k >> b & 1, lane & 32);
                if (lane < 4 && base + 8 * lane < d) {
                    out[p.l.plane_off[b] + base / 8 + lane] = (uint8_t) (w >> (8 * lane));
                }
            }
        }
        warp_fence();
        const float ll = sum_product(cost, cost, d, lane);
        const float s = scaled(__fdiv_rn(__fsqrt_rn(__fdiv_rn(ss, ll)), B::step()), shift);
        if (lane == 0) {
            const uint32_t h = !(s < 65504.0f) ? 0x7bffu : __half_as_ushort(__float2half_rn(s));
            out[0] = (uint8_t) h, out[1] = (uint8_t) (h >> 8);
        }
    } else {
        int e[3] = {0, 0, 0};
        for (int grp = 0, at = 0; grp < p.l.n_groups; at = p.l.group_end[grp++]) {
            const int n = p.l.group_end[grp] - at;
            float step;
            with_bits<BITS>(p.l.group_bits[grp], step_call<CODE>{&step});
            const float sigma = __fsqrt_rn(__fdiv_rn(sum_product(x + at, x + at, n, lane), (float) n));
            const int code = log8_encode(sigma, shift);
            e[0] = grp == 0 ? code : e[0], e[1] = grp == 1 ? code : e[1], e[2] = grp == 2 ? code : e[2];
            const float f = __fmul_rn(scaled(log8_scale(code), -shift), step);
            const float inv = code ? __fdiv_rn(1.0f, f) : 0.0f;
            const float weight = p.l.n_groups == 1 ? 1.0f : __fmul_rn(f, f);
#pragma unroll 1
            for (int i = at + lane; i < at + n; i += 32) {
                float c[4];
                with_bits<BITS>(p.l.group_bits[grp], choose_call{__fmul_rn(x[i], inv), weight, c, &best[i]});
                *(float4 *) (cost + 4 * i) = make_float4(c[0], c[1], c[2], c[3]);
            }
        }
        warp_fence();

        // Offsets of the cost of staying at this location in each phase: [z0][z1 ^ (this location is the upper of its
        // pair)].
        int own[6][2], other[6][2];
#pragma unroll
        for (int f = 0; f < 6; f++) {
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int loc = lane + 32 * r, s = rotate6(loc, (f + 1) % 6);
                const int z1 = __popc(s & (PYTQ_TRELLIS_TAPS1 & 63)) & 1, z0 = __popc(s & PYTQ_TRELLIS_TAPS0) & 1;
                own[f][r] = (int) ((const char *) cost - encode_smem) + 4 * (2 * z0 + (z1 ^ (loc >> (5 - f) & 1)));
                other[f][r] = own[f][r] ^ 4;
            }
        }
        float m[2] = {lane == 0 ? 0.0f : 1e30f, 1e30f};
        // the costs of the next six steps are read while these run; reads past the end stay in this warp's memory
        step_costs now;
        now.load(own, other, 0);
#pragma unroll 2
        for (int t0 = 0; t0 < d; t0 += 6) {
            uint32_t w[6][2];
            step_costs next;
            next.load(own, other, 16 * (t0 + 6));
            viterbi_step<0>(m, now.c[0], now.e[0], w[0], lane);
            if (t0 + 1 < d) {
                viterbi_step<1>(m, now.c[1], now.e[1], w[1], lane);
            }
            if (t0 + 2 < d) {
                viterbi_step<2>(m, now.c[2], now.e[2], w[2], lane);
            }
            if (t0 + 3 < d) {
                viterbi_step<3>(m, now.c[3], now.e[3], w[3], lane);
            }
            if (t0 + 4 < d) {
                viterbi_step<4>(m, now.c[4], now.e[4], w[4], lane);
            }
            if (t0 + 5 < d) {
                viterbi_step<5>(m, now.c[5], now.e[5], w[5], lane);
            }
            now = next;
            if (lane == 0) {
                uint4 * const to = (uint4 *) (decision + t0);
                to[0] = make_uint4(w[0][0], w[0][1], w[1][0], w[1][1]);
                to[1] = make_uint4(w[2][0], w[2][1], w[3][0], w[3][1]);
                to[2] = make_uint4(w[4][0], w[4][1], w[5][0], w[5][1]);
            }
        }

        // Best final state, the lowest on ties.
        int loc;
        {
            const int s0 = rotate6(lane, d % 6), s1 = rotate6(lane + 32, d % 6);
            const bool second = m[1] < m[0] || (m[1] == m[0] && s1 < s0);
            float bm = second ? m[1] : m[0];
            int bs = second ? s1 : s0;
            for (int s = 16; s > 0; s /= 2) {
                const float om = swap_lanes(bm, s);
                const int os = swap_lanes(bs, s);
                const bool take = om < bm || (om == bm && os < bs);
                bm = take ? om : bm, bs = take ? os : bs;
            }
            loc = rotate6(bs, (6 - d % 6) % 6);
        }
        warp_fence();

        // Survivor, newest steps first. Before the steps of a group of six are undone, the six bits of the location are
        // just their coded bits, the oldest in bit 5; undoing step f replaces bit 5 - f, and bit 5, which picks the
        // decision word, only last.
        {
            const int last = (d - 1) / 6 * 6;
            uint2 w[6];
#pragma unroll
            for (int f = 0; f < 6; f++) {
                w[f] = decision[last + f];
            }
#pragma unroll 1
            for (int t0 = last; t0 >= 0; t0 -= 6) {
                if (lane == 0) {
                    path[t0 / 6] = (uint8_t) (__brev((uint32_t) loc) >> 26);
                }
                uint32_t v[6];
#pragma unroll
                for (int f = 0; f < 6; f++) {
                    v[f] = (loc & 32) ? w[f].y : w[f].x;
                }
                const int before = t0 >= 6 ? t0 - 6 : 0;
#pragma unroll
                for (int f = 0; f < 6; f++) {
                    w[f] = decision[before + f];
                }
#pragma unroll
                for (int f = 5; f >= 0; f--) {
                    if (t0 + f < d) {
                        loc ^= (int) ((v[f] >> (loc & 31)) << (5 - f)) & 1 << (5 - f);
                    }
                }
            }
        }
        warp_fence();

        uint32_t prev = 0;
#pragma unroll 1
        for (int base = 0; base < d; base += 32) {
            const int i = base + lane;
            const uint32_t u = ballot32(i < d && (path[i / 6] >> (i % 6) & 1), lane & 32);
            uint32_t index[2];
            index_planes<PYTQ_CODE_TRELLIS, 1, true>(&u, prev, index);
            prev = u;
            const int z = (int) (2 * (index[1] >> lane & 1u) + (index[0] >> lane & 1u));
            int k = 0;
            if (i < d) {
                k = (int) (best[i] >> (8 * z) & 255u);
                const int grp = (i >= p.l.group_end[0]) + (p.l.n_groups > 1 && i >= p.l.group_end[1]);
                with_bits<BITS>(p.l.group_bits[grp], level_call<CODE>{k, &cost[i]});
            }
            for (int b = 0; b < p.l.n_planes; b++) {
                const uint32_t w = b == 0 ? u : ballot32(k >> (b + 1) & 1, lane & 32);
                if (lane < 4 && base + 8 * lane < p.l.plane_len[b]) {
                    out[p.l.plane_off[b] + base / 8 + lane] = (uint8_t) (w >> (8 * lane));
                }
            }
        }
        warp_fence();

        // With the levels fixed, the neighbouring scale may fit better.
        for (int grp = 0, at = 0; grp < p.l.n_groups; at = p.l.group_end[grp++]) {
            const int n = p.l.group_end[grp] - at;
            const int e0 = grp == 0 ? e[0] : grp == 1 ? e[1] : e[2];
            float step;
            with_bits<BITS>(p.l.group_bits[grp], step_call<CODE>{&step});
            const float xl = sum_product(x + at, cost + at, n, lane), ll = sum_product(cost + at, cost + at, n, lane);
            int pick = e0;
            float pick_err = 0.0f;
            for (int k = 0; k < 3 && e0 > 0; k++) {
                const int cand = e0 + (k == 1 ? -1 : k == 2 ? 1 : 0);
                if (cand < 1 || cand > 255) {
                    continue;
                }
                const float f = __fmul_rn(scaled(log8_scale(cand), -shift), step);
                const float err = __fmul_rn(f, __fsub_rn(__fmul_rn(f, ll), __fmul_rn(2.0f, xl)));
                if (k == 0 || err < pick_err) {
                    pick = cand, pick_err = err;
                }
            }
            if (lane == 0) {
                out[grp] = (uint8_t) pick;
            }
        }
    }
    warp_fence();
    for (int i = lane; i < p.l.block_bytes; i += 32) {
        dst[i] = out[i];
    }
}

} // namespace pytq

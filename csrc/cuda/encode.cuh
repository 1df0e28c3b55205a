// Encoder of the cache types on the GPU, bit for bit what csrc/ref/codec.c writes.
//
// Sums run in the reference's order (16 lanes, folded by halves), every product and sum is rounded on its own, so
// -use_fast_math cannot change a byte.
//
// Viterbi search, three trellis steps per round. A round takes the states (x5 x4 x3 s2 s1 s0), bit 0 the newest coded
// bit, to (s2 s1 s0 u1 u2 u3): the eight old states that share s0..s2 lead to the eight new ones that share them, so a
// lane that holds those eight path metrics needs no exchange inside the round. Metrics go to the next round through
// shared memory: one write per new state, two 16-byte reads per lane. A survivor is a number of three bits per round,
// (x5 x4 x3) of the winner. Two shapes of the same search:
//   LANES = 32  one vector per warp, for latency: a lane computes only the two new states of its own u1 u2 (8 instead
//               of 6 add-compare-selects), and each state carries its survivor's last ten triples along, so following
//               the survivor back takes one dependent read per 30 coordinates.
//   LANES = 8   four vectors per warp, for throughput: a lane computes all eight; triples are written down and followed
//               back one by one.
// A head size that is no multiple of three is filled up in front with steps that cost nothing and cannot leave state 0.
#pragma once

#include "device.cuh"

namespace pytq {

#if defined(__HIPCC__)
PYTQ_DEV uint32_t ballot32(bool b, int) {
    return group_ballot(b);
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

// Largest value of 32 lanes.
PYTQ_DEV uint32_t max32(uint32_t x) {
#if defined(PYTQ_PTX) && __CUDA_ARCH__ >= 800
    return __reduce_max_sync(0xffffffffu, x);
#else
    for (int s = 16; s > 0; s /= 2) {
        const uint32_t o = swap_lanes(x, s);
        x = o > x ? o : x;
    }
    return x;
#endif
}

PYTQ_DEV uint32_t min32(uint32_t x) {
    return ~max32(~x);
}

// Programmatic dependent launch: waits until the kernels before this one are done (nothing where it was launched
// without that attribute), and lets the next kernel start its own waiting.
PYTQ_DEV void wait_for_inputs() {
#if defined(PYTQ_PTX) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

struct encode_params {
    const char * src;  // f32 [row_len, n1, n2, n3]
    const char * rows; // row numbers [n1, ne11, ne12], 4 or 8 bytes each, or null: row i goes to row i
    char * dst;
    long long src_nb1, src_nb2, src_nb3, rows_nb0, rows_nb1, rows_nb2, dst_nb1, dst_nb2, dst_nb3;
    int row_bytes; // 4 or 8
    int n1, n2, n3, ne11, ne12, blocks_per_row;
    float hadamard; // 0, or the vectors are first multiplied by the Walsh matrix of their order (64, 128, 256) and this
    layout l;
};

// Vectors that are only multiplied by the Walsh matrix (the queries of the layer).
struct rotate_params {
    const float * src; // [d, n] without gaps, as dst
    float * dst;
    int n, d;
    float factor;
};

// Up to two sets of vectors (the keys and values of a layer) and the queries in one launch; blocks below first_end take
// the first set, those below second_end the second, the others rotate.
struct encode_job {
    encode_params p[2];
    rotate_params rotate;
    int first_end, second_end;
};

// One warp's work in shared memory: byte offsets of the parts of one vector.
struct encode_parts {
    int best, cost, metric, state, path, survivor, bytes; // x is at 0; out takes the place of the metrics
    PYTQ_HD static constexpr int rounds(int d) { return (d + 2) / 3; }
    PYTQ_HD constexpr encode_parts(int d, bool with_survivors)
        : best(4 * d), cost(8 * d), metric(cost + 48 * rounds(d)), state(metric + 2 * 96 * 4), path(state + 32),
          survivor(path + (rounds(d) + 15) / 16 * 16), bytes(survivor + (with_survivors ? 256 * rounds(d) : 0)) {
        // vectors that are read side by side lie eight banks apart
        bytes = (bytes + 95) / 128 * 128 + 32;
    }
};

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

extern __shared__ __align__(16) char encode_smem[];

// r[i] of the 32 lanes: coordinate 32 i + lane. The order of the additions is that of ggml's kernel for this product.
PYTQ_DEV void hadamard(float r[8], int d, float factor, int lane) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        r[i] = __fmul_rn(r[i], factor);
    }
#pragma unroll
    for (int h = 1; h < 32; h *= 2) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            if (32 * i < d) {
                const float o = swap_lanes(r[i], h);
                r[i] = lane & h ? __fsub_rn(o, r[i]) : __fadd_rn(r[i], o);
            }
        }
    }
#pragma unroll
    for (int h = 1; h < 8; h *= 2) {
        if (32 * h < d) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (!(i & h)) {
                    const float a = r[i], b = r[i + h];
                    r[i] = __fadd_rn(a, b), r[i + h] = __fsub_rn(a, b);
                }
            }
        }
    }
}

PYTQ_DEV void load_vector(const float * src, int d, float factor, int lane, float r[8]) {
#pragma unroll
    for (int i = 0; i < 8; i++) {
        r[i] = 32 * i + lane < d ? src[32 * i + lane] : 0.0f;
    }
    if (factor != 0.0f) {
        hadamard(r, d, factor, lane);
    }
}

// Path metrics of eight states, costs of three steps and the survivors' triples, as one lane sees them. The costs of a
// step lie as [z0][z1] in shared memory.
template <int LANES> struct trellis_round {
    static constexpr bool fixed = LANES == 32; // u1 and u2 are the lane's
    static constexpr int n_new = fixed ? 2 : 8;
    int o1, o2, o3; // this lane's order of the costs of each step

    PYTQ_DEV trellis_round(int s, int u1, int u2) {
        const int s2 = s >> 2, s1 = s >> 1 & 1, s0 = s & 1;
        o1 = 2 * s1 + u1, o2 = 4 + 2 * (s0 ^ s2) + u2, o3 = 8 + 2 * (s1 ^ u1) + s2;
    }

    struct costs {
        float c1[2][2], c2[2], c3[2][2]; // [x3][u1 ^ x4 ^ x5], [u2 ^ x3 ^ x4], [u1][u3 ^ x3]
    };
    PYTQ_DEV void load(costs & c, const float * at) const {
#pragma unroll
        for (int q = 0; q < 2; q++) {
            c.c1[0][q] = at[o1 ^ q], c.c1[1][q] = at[o1 ^ 2 ^ q];
            c.c2[q] = at[o2 ^ q];
            c.c3[0][q] = at[o3 ^ q];
            if constexpr (!fixed) {
                c.c3[1][q] = at[o3 ^ 2 ^ q];
            }
        }
    }

    // Add, compare, select: b wins only if it is smaller.
    static PYTQ_DEV float select(float a, float b, int ka, int kb, int & k) {
        k = b < a ? kb : ka;
        return fminf(a, b);
    }

    // m[x5 x4 x3] -> metric and triple of the new states in the order (u1 u2) u3
    PYTQ_DEV void step(const float m[8], const costs & c, float out[n_new], int triple[n_new]) const {
#pragma unroll
        for (int u1 = 0; u1 < (fixed ? 1 : 2); u1++) {
            float n1[4];
            int k1[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int q = (i >> 1) ^ u1, x3 = i & 1;
                n1[i] = select(__fadd_rn(m[i], c.c1[x3][q]), __fadd_rn(m[4 + i], c.c1[x3][q ^ 1]), i, 4 + i, k1[i]);
            }
#pragma unroll
            for (int u2 = 0; u2 < (fixed ? 1 : 2); u2++) {
                float n2[2];
                int k2[2];
#pragma unroll
                for (int x3 = 0; x3 < 2; x3++) {
                    const int q = x3 ^ u2;
                    n2[x3] = select(__fadd_rn(n1[x3], c.c2[q]), __fadd_rn(n1[2 + x3], c.c2[q ^ 1]), k1[x3], k1[2 + x3],
                                    k2[x3]);
                }
#pragma unroll
                for (int u3 = 0; u3 < 2; u3++) {
                    const int at = 4 * u1 + 2 * u2 + u3;
                    out[at] = select(__fadd_rn(n2[0], c.c3[u1][u3]), __fadd_rn(n2[1], c.c3[u1][u3 ^ 1]), k2[0], k2[1],
                                     triple[at]);
                }
            }
        }
    }
};

constexpr int encode_segment = 10; // rounds whose triples fit into one word

// Coded bits of the best path from state 0, three per byte of path (the oldest in bit 2); of equal paths the
// reference's choice. at: this lane's vector.
template <int LANES> PYTQ_DEV void viterbi(char * at, const encode_parts & parts, int d, int lane) {
    using R = trellis_round<LANES>;
    constexpr bool fixed = R::fixed;
    const int s = fixed ? lane >> 2 : lane & 7, u12 = fixed ? lane & 3 : 0, n_rounds = encode_parts::rounds(d);
    const R round(s, u12 >> 1, u12 & 1);
    const float * cost = (const float *) (at + parts.cost);
    float * const metric = (float *) (at + parts.metric);           // two buffers of [u][s], rows of 12
    uint32_t * const survivor = (uint32_t *) (at + parts.survivor); // LANES = 32: [round][state]
    uint32_t * const word = (uint32_t *) (at + parts.cost);         // LANES = 8: [round][s], over costs already used
    uint8_t * const path = (uint8_t *) (at + parts.path);

    float m[8], now[R::n_new];
    int triple[R::n_new];
#pragma unroll
    for (int x = 0; x < 8; x++) {
        m[x] = x == 0 && s == 0 ? 0.0f : 1e30f;
    }
    typename R::costs c;
    round.load(c, cost);
    [[maybe_unused]] int in_segment = 0;
#pragma unroll 2
    for (int r = 0; r < n_rounds; r++) {
        typename R::costs next; // the last read takes what lies behind the costs, for nothing
        cost += 12;
        round.load(next, cost);
        round.step(m, c, now, triple);
        c = next;
        float * const to = metric + 96 * (r & 1);
        if constexpr (fixed) {
            to[24 * u12 + s] = now[0], to[24 * u12 + 12 + s] = now[1];
        } else {
#pragma unroll
            for (int u = 0; u < 8; u++) {
                to[12 * u + s] = now[u];
            }
        }
        warp_fence();
        const float4 lo = *(const float4 *) (to + 12 * s), hi = *(const float4 *) (to + 12 * s + 4);
        m[0] = lo.x, m[1] = lo.y, m[2] = lo.z, m[3] = lo.w;
        m[4] = hi.x, m[5] = hi.y, m[6] = hi.z, m[7] = hi.w;
        if constexpr (fixed) {
            // the first round of a segment reads something (before the table: the path) and drops it
            const uint32_t * const old = survivor + 64 * (r - 1) + s;
            const uint32_t keep = in_segment ? 0xffffffffu : 0u;
            const uint32_t h0 = old[8 * triple[0]] & keep, h1 = old[8 * triple[1]] & keep;
            in_segment = in_segment == encode_segment - 1 ? 0 : in_segment + 1;
            *(uint2 *) (survivor + 64 * r + 2 * lane) =
                make_uint2(h0 << 3 | (uint32_t) triple[0], h1 << 3 | (uint32_t) triple[1]);
        } else {
            uint32_t w = (uint32_t) triple[7];
#pragma unroll
            for (int u = 6; u >= 0; u--) {
                w = w << 3 | (uint32_t) triple[u];
            }
            word[8 * r + s] = w;
        }
    }
    warp_fence();

    // Best final state, the lowest on ties; metrics are not negative, so their bits order them.
    if constexpr (fixed) {
        const uint32_t b0 = as_uint(now[0]), b1 = as_uint(now[1]), best = min32(b0 < b1 ? b0 : b1);
        const uint32_t e0 = ballot32(b0 == best, lane & 32), e1 = ballot32(b1 == best, lane & 32), e = e0 | e1;
        const uint32_t low = e & (0u - e);
        uint32_t state = 2 * (uint32_t) __popc(low - 1) + (e0 & low ? 0 : 1);
        if (lane == 0) {
            path[n_rounds - 2] = (uint8_t) (state >> 3), path[n_rounds - 1] = (uint8_t) (state & 7);
        }
        // the triple of a round is that of its first state: coded bits of two rounds before
        for (int end = n_rounds; end > 0;) {
            const int begin = (end - 1) / encode_segment * encode_segment, n = end - begin;
            const uint32_t w = survivor[64 * (end - 1) + state];
            const int round_of = begin + lane - 2;
            if (lane < n && round_of >= 0) {
                path[round_of] = (uint8_t) (w >> (3 * (n - 1 - lane)) & 7u);
            }
            state = n > 1 ? w >> (3 * n - 6) : w << 3 | state >> 3;
            end = begin;
        }
    } else {
        uint32_t best = as_uint(now[0]), state = 8 * (uint32_t) s;
#pragma unroll
        for (int u = 1; u < R::n_new; u++) {
            const uint32_t b = as_uint(now[u]);
            state = b < best ? 8 * (uint32_t) s + u : state;
            best = b < best ? b : best;
        }
#pragma unroll
        for (int w = 4; w > 0; w /= 2) {
            const uint32_t ob = swap_lanes(best, w), os = swap_lanes(state, w);
            const bool take = ob < best || (ob == best && os < state);
            best = take ? ob : best, state = take ? os : state;
        }
        if (s == 0) {
            path[n_rounds - 2] = (uint8_t) (state >> 3), path[n_rounds - 1] = (uint8_t) (state & 7);
        }
#pragma unroll 2
        for (int r = n_rounds - 1; r >= 2; r--) {
            const uint32_t k = word[8 * r + (state >> 3)] >> (3 * (state & 7)) & 7u;
            if (s == 0) {
                path[r - 2] = (uint8_t) k;
            }
            state = k << 3 | state >> 3;
        }
    }
    warp_fence();
}

// Where a vector comes from and goes to.
struct encode_item {
    const float * src;
    uint8_t * dst;
    PYTQ_DEV encode_item(const encode_params & p, long long item) {
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
        src = (const float *) (p.src + i1 * p.src_nb1 + i2 * p.src_nb2 + i3 * p.src_nb3) + (long long) ib * p.l.d;
        dst = (uint8_t *) p.dst + row * p.dst_nb1 + i2 * p.dst_nb2 + i3 * p.dst_nb3 + (long long) ib * p.l.block_bytes;
    }
};

// What the steps of one vector hand on to each other.
struct encode_state {
    uint8_t * dst;
    int shift; // the vector was divided by 2^shift
    int e[3];  // scale codes of the groups
    bool zero; // zero or not finite, or there is no such vector
};

// Reads one vector into shared memory, brought into range.
PYTQ_DEV encode_state encode_load(const encode_params & p, const encode_item & item, float * x, int lane) {
    encode_state st = {item.dst, 0, {0, 0, 0}, false};
    const int d = p.l.d;
    float r[8];
    load_vector(item.src, d, p.hadamard, lane, r);
    uint32_t top = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const uint32_t a = as_uint(r[i]) & 0x7fffffffu;
        top = a > top ? a : top;
    }
    top = max32(top);
    if (top == 0 || top > 0x7f7fffffu) {
        st.zero = true;
        return st;
    }
    if (top < 0x2b800000u || top > 0x53800000u) { // outside 2^-40 .. 2^40
        frexpf(as_float(top), &st.shift);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        if (32 * i + lane < d) {
            x[32 * i + lane] = scaled(r[i], -st.shift);
        }
    }
    warp_fence();
    return st;
}

// Scales and costs of the trellis steps, three-step rounds filled up in front.
template <int BITS>
PYTQ_DEV void encode_costs(const encode_params & p, char * at, const encode_parts & parts, encode_state & st,
                           int lane) {
    const float * const x = (const float *) at;
    const int d = p.l.d, pad = 3 * encode_parts::rounds(d) - d;
    float4 * const cost = (float4 *) (at + parts.cost) + pad;
    uint32_t * const best = (uint32_t *) (at + parts.best);
    if (lane < pad) {
        cost[lane - pad] = make_float4(0.0f, 1e30f, 1e30f, 1e30f);
    }
    for (int grp = 0, begin = 0; grp < p.l.n_groups; begin = p.l.group_end[grp++]) {
        const int n = p.l.group_end[grp] - begin;
        float step;
        with_bits<BITS>(p.l.group_bits[grp], step_call<PYTQ_CODE_TRELLIS>{&step});
        const float sigma = __fsqrt_rn(__fdiv_rn(sum_product(x + begin, x + begin, n, lane), (float) n));
        const int code = log8_encode(sigma, st.shift);
        st.e[0] = grp == 0 ? code : st.e[0], st.e[1] = grp == 1 ? code : st.e[1], st.e[2] = grp == 2 ? code : st.e[2];
        const float f = __fmul_rn(scaled(log8_scale(code), -st.shift), step);
        const float inv = code ? __fdiv_rn(1.0f, f) : 0.0f;
        const float weight = p.l.n_groups == 1 ? 1.0f : __fmul_rn(f, f);
#pragma unroll(BITS > 0 && BITS < 4 ? 4 : 1)
        for (int i = begin + lane; i < begin + n; i += 32) {
            float c[4];
            with_bits<BITS>(p.l.group_bits[grp], choose_call{__fmul_rn(x[i], inv), weight, c, &best[i]});
            cost[i] = make_float4(c[0], c[1], c[2], c[3]);
        }
    }
    warp_fence();
}

// Bit planes of the path, then the scale that fits the chosen levels best.
template <int BITS>
PYTQ_DEV void encode_planes(const encode_params & p, char * at, const encode_parts & parts, const encode_state & st,
                            uint8_t * out, int lane) {
    const float * const x = (const float *) at;
    float * const level = (float *) (at + parts.cost);
    const uint32_t * const best = (const uint32_t *) (at + parts.best);
    const uint8_t * const path = (const uint8_t *) (at + parts.path);
    const int d = p.l.d, pad = 3 * encode_parts::rounds(d) - d;
    uint32_t prev = 0;
#pragma unroll(BITS > 0 ? 4 : 1)
    for (int base = 0; base < d; base += 32) {
        const int i = base + lane, step = i + pad;
        const uint32_t u = ballot32(i < d && (path[step / 3] >> (2 - step % 3) & 1), lane & 32);
        uint32_t index[2];
        index_planes<PYTQ_CODE_TRELLIS, 1, true>(&u, prev, index);
        prev = u;
        const int z = (int) (2 * (index[1] >> lane & 1u) + (index[0] >> lane & 1u));
        int k = 0;
        if (i < d) {
            k = (int) (best[i] >> (8 * z) & 255u);
            const int grp = (i >= p.l.group_end[0]) + (p.l.n_groups > 1 && i >= p.l.group_end[1]);
            with_bits<BITS>(p.l.group_bits[grp], level_call<PYTQ_CODE_TRELLIS>{k, &level[i]});
        }
        const int n_planes = BITS > 0 ? BITS : p.l.n_planes;
#pragma unroll
        for (int b = 0; b < (BITS > 0 ? BITS : 5); b++) {
            if (b < n_planes) {
                const uint32_t w = b == 0 ? u : ballot32(k >> (b + 1) & 1, lane & 32);
                if (lane < 4 && base + 8 * lane < p.l.plane_len[b]) {
                    out[p.l.plane_off[b] + base / 8 + lane] = (uint8_t) (w >> (8 * lane));
                }
            }
        }
    }
    warp_fence();

    // With the levels fixed, the neighbouring scale may fit better.
    for (int grp = 0, begin = 0; grp < p.l.n_groups; begin = p.l.group_end[grp++]) {
        const int n = p.l.group_end[grp] - begin;
        const int e0 = grp == 0 ? st.e[0] : grp == 1 ? st.e[1] : st.e[2];
        float step;
        with_bits<BITS>(p.l.group_bits[grp], step_call<PYTQ_CODE_TRELLIS>{&step});
        const float xl = sum_product(x + begin, level + begin, n, lane);
        const float ll = sum_product(level + begin, level + begin, n, lane);
        int pick = e0;
        float pick_err = 0.0f;
#pragma unroll
        for (int k = 0; k < 3; k++) {
            const int cand = e0 + (k == 1 ? -1 : k == 2 ? 1 : 0);
            const float f = __fmul_rn(scaled(log8_scale(cand), -st.shift), step);
            const float err = __fmul_rn(f, __fsub_rn(__fmul_rn(f, ll), __fmul_rn(2.0f, xl)));
            if (e0 > 0 && cand >= 1 && cand <= 255 && (k == 0 || err < pick_err)) {
                pick = cand, pick_err = err;
            }
        }
        if (lane == 0) {
            out[grp] = (uint8_t) pick;
        }
    }
}

template <int BITS>
PYTQ_DEV void encode_scalar(const encode_params & p, char * at, const encode_parts & parts, const encode_state & st,
                            uint8_t * out, int lane) {
    using B = book<PYTQ_CODE_SCALAR, BITS>;
    const float * const x = (const float *) at;
    float * const levels = (float *) (at + parts.cost);
    const int d = p.l.d;
    const float ss = sum_product(x, x, d, lane);
    const float sigma = __fsqrt_rn(__fdiv_rn(ss, (float) d));
    const float inv = __fdiv_rn(1.0f, __fmul_rn(sigma, B::step()));
#pragma unroll 4
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
            levels[i] = level;
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
    const float ll = sum_product(levels, levels, d, lane);
    const float s = scaled(__fdiv_rn(__fsqrt_rn(__fdiv_rn(ss, ll)), B::step()), st.shift);
    if (lane == 0) {
        const uint32_t h = !(s < 65504.0f) ? 0x7bffu : __half_as_ushort(__float2half_rn(s));
        out[0] = (uint8_t) h, out[1] = (uint8_t) (h >> 8);
    }
}

// Blocks of one warp for the trellis code, of up to four for the scalar code. BITS: bits of the only group, or 0 for a
// type with several groups.
template <int CODE, int BITS, int LANES>
__global__ void __launch_bounds__(128) encode(const PYTQ_GRID_CONSTANT encode_job job) {
    constexpr int n_vec = 32 / LANES;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, n_warps = blockDim.x >> 5, block = (int) blockIdx.x;
    wait_for_inputs();
    if (block >= job.second_end) {
        const rotate_params & q = job.rotate;
        for (int v = 0; v < n_vec; v++) {
            const long long item = ((long long) (block - job.second_end) * n_warps + warp) * n_vec + v;
            if (item < q.n) {
                float r[8];
                load_vector(q.src + item * q.d, q.d, q.factor, lane, r);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    if (32 * i + lane < q.d) {
                        q.dst[item * q.d + 32 * i + lane] = r[i];
                    }
                }
            }
        }
        return;
    }
    const int which = block >= job.first_end;
    const encode_params & p = job.p[which];
    const encode_parts parts(p.l.d, CODE == PYTQ_CODE_TRELLIS && LANES == 32);
    char * const smem = encode_smem + warp * n_vec * parts.bytes;
    const long long first = ((long long) (block - which * job.first_end) * n_warps + warp) * n_vec;
    const long long n_items = (long long) p.blocks_per_row * p.n1 * p.n2 * p.n3;

    encode_state st;
#pragma unroll 1
    for (int v = 0; v < n_vec; v++) {
        char * const at = smem + v * parts.bytes;
        st.zero = true;
        if (first + v < n_items) {
            st = encode_load(p, encode_item(p, first + v), (float *) at, lane);
            if (st.zero) {
                for (int i = lane; i < p.l.block_bytes; i += 32) {
                    st.dst[i] = 0;
                }
            } else if constexpr (CODE == PYTQ_CODE_TRELLIS) {
                encode_costs<BITS>(p, at, parts, st, lane);
            }
        }
        if (n_vec > 1 && lane == 0) {
            *(encode_state *) (at + parts.state) = st;
        }
    }
    if constexpr (CODE == PYTQ_CODE_TRELLIS) {
        if (n_vec > 1 || !st.zero) {
            warp_fence();
            viterbi<LANES>(smem + (n_vec > 1 ? (lane >> 3) * parts.bytes : 0), parts, p.l.d, lane);
        }
    }
#pragma unroll 1
    for (int v = 0; v < n_vec; v++) {
        char * const at = smem + v * parts.bytes;
        if (n_vec > 1) {
            st = *(const encode_state *) (at + parts.state);
        }
        if (st.zero) {
            continue;
        }
        uint8_t * const out = (uint8_t *) (at + parts.metric);
        if constexpr (CODE == PYTQ_CODE_TRELLIS) {
            encode_planes<BITS>(p, at, parts, st, out, lane);
        } else {
            encode_scalar<BITS>(p, at, parts, st, out, lane);
        }
        warp_fence();
        for (int i = lane; i < p.l.block_bytes; i += 32) {
            st.dst[i] = out[i];
        }
    }
}

// ------------------------------------------------------------------------------------------------ host side

constexpr long long encode_wide_from = 1024; // more vectors than this take the shape for throughput

using encode_kernel = void (*)(encode_job);

// Kernel of a layout, null where there is none.
template <int LANES> inline encode_kernel encode_kernel_of(const layout & l) {
    constexpr int S = PYTQ_CODE_SCALAR, T = PYTQ_CODE_TRELLIS;
    const int bits = l.n_groups > 1 ? 0 : l.group_bits[0];
    if (l.code == S) {
        return bits == 2 ? encode<S, 2, 32> : bits == 3 ? encode<S, 3, 32> : bits == 4 ? encode<S, 4, 32> : nullptr;
    }
    switch (bits) {
        case 0:
            return encode<T, 0, LANES>;
        case 2:
            return encode<T, 2, LANES>;
        case 3:
            return encode<T, 3, LANES>;
        case 4:
            return encode<T, 4, LANES>;
        case 5:
            return encode<T, 5, LANES>;
        default:
            return nullptr;
    }
}

// Grid of a job: vectors of both sets and of the rotation, which job.p and job.rotate describe already.
struct encode_launch {
    encode_kernel kernel;
    int blocks, threads, shared_bytes;
    // wide: the shape for throughput
    encode_launch(encode_job & job, long long n_first, long long n_second, bool wide) {
        const layout & l = job.p[0].l;
        const bool trellis = l.code == PYTQ_CODE_TRELLIS;
        kernel = wide ? encode_kernel_of<8>(l) : encode_kernel_of<32>(l);
        const int lanes = trellis && wide ? 8 : 32, warps = !trellis && wide ? 4 : 1, per_block = warps * (32 / lanes);
        job.first_end = (int) ((n_first + per_block - 1) / per_block);
        job.second_end = job.first_end + (int) ((n_second + per_block - 1) / per_block);
        blocks = job.second_end + (job.rotate.n + per_block - 1) / per_block;
        threads = 32 * warps;
        const int d = n_second && job.p[1].l.d > l.d ? job.p[1].l.d : l.d;
        shared_bytes = per_block * encode_parts(d, trellis && !wide).bytes;
    }
};

} // namespace pytq

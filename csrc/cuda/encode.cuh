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
// The other steps are the same code for both: a vector belongs to LANES lanes, lane l takes coordinates l, l + LANES
// ... A head size that is no multiple of three is filled up in front with steps that cost nothing and cannot leave
// state 0.
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

// Largest value of the LANES lanes of a vector.
template <int LANES> PYTQ_DEV uint32_t max_of(uint32_t x) {
#if defined(PYTQ_PTX) && __CUDA_ARCH__ >= 800
    constexpr int shuffles_from = LANES == 32 ? 0 : LANES / 2;
    if constexpr (LANES == 32) {
        x = __reduce_max_sync(0xffffffffu, x);
    }
#else
    constexpr int shuffles_from = LANES / 2;
#endif
#pragma unroll
    for (int s = shuffles_from; s > 0; s /= 2) {
        const uint32_t o = swap_lanes(x, s);
        x = o > x ? o : x;
    }
    return x;
}

// Bits of a predicate over the lanes of a vector, lowest lane first.
template <int LANES> PYTQ_DEV uint32_t bits_of(bool b, int lane) {
    const uint32_t w = ballot32(b, lane & 32);
    return LANES == 32 ? w : w >> (lane & 24) & 255u;
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

// One vector's work in shared memory: byte offsets. x is at 0; out takes the place of the metrics.
struct encode_parts {
    int best, cost, metric, path, survivor, bytes;
    PYTQ_HD static constexpr int rounds(int d) { return (d + 2) / 3; }
    PYTQ_HD constexpr encode_parts(int d, int lanes)
        : best(4 * d), cost(6 * d), metric(cost + 48 * rounds(d)), path(metric + (lanes == 32 ? 2 : 1) * 96 * 4),
          survivor(path + (rounds(d) + 15) / 16 * 16), bytes(survivor + (lanes == 32 ? 256 * (rounds(d) + 1) : 0)) {
        // vectors that are read side by side lie eight banks apart
        bytes = (bytes + 95) / 128 * 128 + 32;
    }
};

// Sum of a[i] * b[i] in the reference's order: 16 sums of every 16th product, folded by halves.
template <int LANES> PYTQ_DEV float sum_product(const float * a, const float * b, int n, int lane) {
    const int l = lane & (LANES - 1);
    float acc = 0.0f;
    if constexpr (LANES == 32) { // both halves of the warp the same
#pragma unroll 8
        for (int base = 0; base < n; base += 16) {
            const int i = base + (l & 15);
            if (i < n) {
                acc = __fadd_rn(acc, __fmul_rn(a[i], b[i]));
            }
        }
        acc = __fadd_rn(acc, swap_lanes(acc, 8));
    } else {
        float upper = 0.0f;
#pragma unroll 8
        for (int i = l; i < n; i += 16) {
            acc = __fadd_rn(acc, __fmul_rn(a[i], b[i]));
            if (i + 8 < n) {
                upper = __fadd_rn(upper, __fmul_rn(a[i + 8], b[i + 8]));
            }
        }
        acc = __fadd_rn(acc, upper);
    }
    for (int w = 4; w > 0; w /= 2) {
        acc = __fadd_rn(acc, swap_lanes(acc, w));
    }
    return acc;
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

// Out of line: only vectors of extreme size get there.
static __device__ __noinline__ float rare_ldexp(float x, int shift) {
    return ldexpf(x, shift);
}

PYTQ_DEV float scaled(float x, int shift) {
    return shift ? rare_ldexp(x, shift) : x;
}

// A level and its index (trellis: within its subset) in one word: the levels are small integers, so the low bits of
// the float are free.
template <int CODE, int BITS> PYTQ_HD constexpr uint32_t tagged_level(int i) {
    const int v = book<CODE, BITS>::level(i), a = v < 0 ? -v : v;
    int e = 0;
    while (a >> (e + 1)) {
        e++;
    }
    return (v < 0 ? 0x80000000u : 0u) | (a ? (uint32_t) (127 + e) << 23 | ((uint32_t) a << (23 - e) & 0x7fffffu) : 0u) |
           (uint32_t) (CODE == PYTQ_CODE_TRELLIS ? i >> 2 : i);
}

// Nearest level of each subset for one coordinate: squared errors in the order [z0][z1], indices within the subsets as
// nibbles z = 2 z1 + z0.
template <int CODE, int BITS, bool WEIGHTED>
PYTQ_DEV void choose(float y, float weight, float cost[4], uint16_t * best) {
    using B = book<CODE, BITS>;
    constexpr int n_sub = B::n_levels / 4;
    uint32_t word[4];
#pragma unroll
    for (int z = 0; z < 4; z++) {
        word[z] = tagged_level<CODE, BITS>(z);
#pragma unroll
        for (int k = 0; k + 1 < n_sub; k++) {
            const bool up = y > 0.5f * (float) (B::level(4 * k + z) + B::level(4 * k + 4 + z));
            word[z] = up ? tagged_level<CODE, BITS>(4 * k + 4 + z) : word[z];
        }
        const float e = __fsub_rn(y, as_float(word[z] & 0xffff0000u)), e2 = __fmul_rn(e, e);
        cost[(z & 1) * 2 + (z >> 1)] = WEIGHTED ? __fmul_rn(weight, e2) : e2;
    }
    *best = (uint16_t) (word[0] + (word[1] << 4) + (word[2] << 8) + (word[3] << 12));
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

template <bool WEIGHTED> struct choose_call {
    float y, weight;
    float * cost;
    uint16_t * best;
    template <int B> PYTQ_DEV void operator()() { choose<PYTQ_CODE_TRELLIS, B, WEIGHTED>(y, weight, cost, best); }
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

template <int LANES> constexpr int encode_regs = 256 / LANES; // of a lane that holds its part of the longest vector

// r[k]: coordinate LANES k + l. The order of the additions is that of ggml's kernel for this product.
template <int LANES> PYTQ_DEV void hadamard(float r[], int d, float factor, int lane) {
    constexpr int N = encode_regs<LANES>;
#pragma unroll
    for (int k = 0; k < N; k++) {
        r[k] = __fmul_rn(r[k], factor);
    }
#pragma unroll
    for (int h = 1; h < LANES; h *= 2) {
#pragma unroll
        for (int k = 0; k < N; k++) {
            if (LANES * k < d) {
                const float o = swap_lanes(r[k], h);
                r[k] = lane & h ? __fsub_rn(o, r[k]) : __fadd_rn(r[k], o);
            }
        }
    }
#pragma unroll
    for (int h = 1; h < N; h *= 2) {
        if (LANES * h < d) {
#pragma unroll
            for (int k = 0; k < N; k++) {
                if (!(k & h)) {
                    const float a = r[k], b = r[k + h];
                    r[k] = __fadd_rn(a, b), r[k + h] = __fsub_rn(a, b);
                }
            }
        }
    }
}

// n: coordinates to read, d or 0
template <int LANES> PYTQ_DEV void load_vector(const float * src, int n, int d, float factor, int lane, float r[]) {
    const int l = lane & (LANES - 1);
#pragma unroll
    for (int k = 0; k < encode_regs<LANES>; k++) {
        r[k] = LANES * k < d && LANES * k + l < n ? src[LANES * k + l] : 0.0f;
    }
    if (factor != 0.0f) {
        hadamard<LANES>(r, d, factor, lane);
    }
}

// Reads of shared memory (byte offsets) that the compiler keeps in this order: the ones that everything waits for
// first.
PYTQ_DEV float4 ordered_float4(int at) {
#if defined(PYTQ_PTX)
    float4 v;
    asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"((uint32_t) __cvta_generic_to_shared(encode_smem) + (uint32_t) at)
                 : "memory");
    return v;
#else
    return *(const float4 *) (encode_smem + at);
#endif
}

PYTQ_DEV uint32_t ordered_word(int at) {
#if defined(PYTQ_PTX)
    uint32_t v;
    asm volatile("ld.volatile.shared.u32 %0, [%1];"
                 : "=r"(v)
                 : "r"((uint32_t) __cvta_generic_to_shared(encode_smem) + (uint32_t) at)
                 : "memory");
    return v;
#else
    return *(const uint32_t *) (encode_smem + at);
#endif
}

// Path metrics of eight states, costs of three steps and the survivors' triples, as one lane sees them. The costs of a
// step lie as [z0][z1] in shared memory.
template <int LANES> struct trellis_round {
    static constexpr bool fixed = LANES == 32; // u1 and u2 are the lane's
    static constexpr int n_new = fixed ? 2 : 8, n_u1 = fixed ? 1 : 2, n_u2 = fixed ? 1 : 2;
    int o1[4], o2[2], o3[fixed ? 2 : 4]; // byte offsets of this lane's costs in the first round

    PYTQ_DEV trellis_round(int cost, int s, int u1, int u2) {
        const int s2 = s >> 2, s1 = s >> 1 & 1, s0 = s & 1;
#pragma unroll
        for (int q = 0; q < 4; q++) {
            o1[q] = cost + 4 * ((2 * s1 + u1) ^ q);
            if (q < 2) {
                o2[q] = cost + 16 + 4 * ((2 * (s0 ^ s2) + u2) ^ q);
            }
            if (q < (fixed ? 2 : 4)) {
                o3[q] = cost + 32 + 4 * ((2 * (s1 ^ u1) + s2) ^ q);
            }
        }
    }

    struct costs {
        float c1[4], c2[2], c3[fixed ? 2 : 4]; // [x3][u1 ^ x4 ^ x5], [u2 ^ x3 ^ x4], [u1][u3 ^ x3]
    };
    // at: byte offset of the round, the same for all lanes
    PYTQ_DEV void load(costs & c, int at) const {
#pragma unroll
        for (int q = 0; q < 4; q++) {
            c.c1[q] = *(const float *) (encode_smem + o1[q] + at);
            if (q < 2) {
                c.c2[q] = *(const float *) (encode_smem + o2[q] + at);
            }
            if (q < (fixed ? 2 : 4)) {
                c.c3[q] = *(const float *) (encode_smem + o3[q] + at);
            }
        }
    }

    // The two sums of each selection; b wins only if it is smaller.
    struct sums {
        float a1[n_u1][4], b1[n_u1][4], a2[n_u1][n_u2][2], b2[n_u1][n_u2][2], a3[n_new], b3[n_new];
    };

    // m[x5 x4 x3] -> metrics of the new states in the order (u1 u2) u3
    PYTQ_DEV void metrics(const float m[8], const costs & c, sums & v, float out[n_new]) const {
#pragma unroll
        for (int u1 = 0; u1 < n_u1; u1++) {
            float n1[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int q = 2 * (i & 1) + ((i >> 1) ^ u1);
                v.a1[u1][i] = __fadd_rn(m[i], c.c1[q]), v.b1[u1][i] = __fadd_rn(m[4 + i], c.c1[q ^ 1]);
                n1[i] = fminf(v.a1[u1][i], v.b1[u1][i]);
            }
#pragma unroll
            for (int u2 = 0; u2 < n_u2; u2++) {
                float n2[2];
#pragma unroll
                for (int x3 = 0; x3 < 2; x3++) {
                    const int q = x3 ^ u2;
                    v.a2[u1][u2][x3] = __fadd_rn(n1[x3], c.c2[q]);
                    v.b2[u1][u2][x3] = __fadd_rn(n1[2 + x3], c.c2[q ^ 1]);
                    n2[x3] = fminf(v.a2[u1][u2][x3], v.b2[u1][u2][x3]);
                }
#pragma unroll
                for (int u3 = 0; u3 < 2; u3++) {
                    const int to = 4 * u1 + 2 * u2 + u3, q = 2 * u1 + u3;
                    v.a3[to] = __fadd_rn(n2[0], c.c3[q]), v.b3[to] = __fadd_rn(n2[1], c.c3[q ^ 1]);
                    out[to] = fminf(v.a3[to], v.b3[to]);
                }
            }
        }
    }

    // The winners' x5 x4 x3.
    static PYTQ_DEV void triples(const sums & v, int out[n_new]) {
#pragma unroll
        for (int u1 = 0; u1 < n_u1; u1++) {
            int k1[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
                k1[i] = v.b1[u1][i] < v.a1[u1][i] ? 4 + i : i;
            }
#pragma unroll
            for (int u2 = 0; u2 < n_u2; u2++) {
                int k2[2];
#pragma unroll
                for (int x3 = 0; x3 < 2; x3++) {
                    k2[x3] = v.b2[u1][u2][x3] < v.a2[u1][u2][x3] ? k1[2 + x3] : k1[x3];
                }
#pragma unroll
                for (int u3 = 0; u3 < 2; u3++) {
                    const int to = 4 * u1 + 2 * u2 + u3;
                    out[to] = v.b3[to] < v.a3[to] ? k2[1] : k2[0];
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
    const int base = (int) (at - encode_smem);
    const R round(base + parts.cost, s, u12 >> 1, u12 & 1);
    uint32_t * const survivor = (uint32_t *) (at + parts.survivor); // LANES = 32: [round + 1][state]
    uint32_t * const word = (uint32_t *) (at + parts.cost);         // LANES = 8: [round][s], over costs already used
    uint8_t * const path = (uint8_t *) (at + parts.path);

    // Metrics [u][s], rows of 12: a round reads what the last one wrote (LANES = 32: to a second buffer).
    int from = base + parts.metric, to = from + (fixed ? 96 * 4 : 0);
    float now[R::n_new];
    int triple[R::n_new];
#pragma unroll
    for (int k = 0; k < R::n_new; k++) {
        now[k] = s == 0 && u12 == 0 && k == 0 ? 0.0f : 1e30f, triple[k] = 0;
        *(float *) (encode_smem + from + 48 * (2 * u12 + k) + 4 * s) = now[k];
    }
    typename R::costs c;
    round.load(c, 0);
    [[maybe_unused]] int in_segment = encode_segment - 1;
    // Survivors of round q, one round late so that nothing waits for them. The first round of a segment reads something
    // and drops it; round -1 does nothing of use.
    const auto follow = [&](int q) {
        const int old = base + parts.survivor + 256 * q + 4 * s;
        const uint32_t keep = in_segment ? 0xffffffffu : 0u;
        const uint32_t h0 = ordered_word(old + 32 * triple[0]) & keep, h1 = ordered_word(old + 32 * triple[1]) & keep;
        in_segment = in_segment == encode_segment - 1 ? 0 : in_segment + 1;
        *(uint2 *) (survivor + 64 * (q + 1) + 2 * lane) =
            make_uint2(h0 << 3 | (uint32_t) triple[0], h1 << 3 | (uint32_t) triple[1]);
    };
#pragma unroll 1
    for (int r = 0; r < n_rounds; r++) {
        warp_fence();
        const float4 lo = ordered_float4(from + 48 * s), hi = ordered_float4(from + 48 * s + 16);
        const float m[8] = {lo.x, lo.y, lo.z, lo.w, hi.x, hi.y, hi.z, hi.w};
        if constexpr (fixed) {
            follow(r - 1);
        }
        typename R::costs next;
        round.load(next, 48 * (r + 1)); // the last one reads what lies behind the costs, for nothing
        typename R::sums sums;
        round.metrics(m, c, sums, now);
        if constexpr (!fixed) {
            warp_fence();
        }
#pragma unroll
        for (int k = 0; k < R::n_new; k++) {
            *(float *) (encode_smem + to + 48 * (2 * u12 + k) + 4 * s) = now[k];
        }
        R::triples(sums, triple);
        if constexpr (!fixed) {
            uint32_t w = (uint32_t) triple[7];
#pragma unroll
            for (int u = 6; u >= 0; u--) {
                w = w << 3 | (uint32_t) triple[u];
            }
            word[8 * r + s] = w;
        }
        c = next;
        const int other = from;
        from = to, to = other;
    }
    if constexpr (fixed) {
        warp_fence();
        follow(n_rounds - 1);
    }
    warp_fence();

    // Best final state, the lowest on ties; metrics are not negative, so their bits order them.
    if constexpr (fixed) {
        const uint32_t b0 = as_uint(now[0]), b1 = as_uint(now[1]), best = ~max_of<32>(~(b0 < b1 ? b0 : b1));
        const uint32_t e0 = ballot32(b0 == best, lane & 32), e1 = ballot32(b1 == best, lane & 32), e = e0 | e1;
        const uint32_t low = e & (0u - e);
        uint32_t state = 2 * (uint32_t) __popc(low - 1) + (e0 & low ? 0 : 1);
        if (lane == 0) {
            path[n_rounds - 2] = (uint8_t) (state >> 3), path[n_rounds - 1] = (uint8_t) (state & 7);
        }
        // the triple of a round is that of its first state: coded bits of two rounds before
#pragma unroll 1
        for (int end = n_rounds; end > 0;) {
            const int begin = (end - 1) / encode_segment * encode_segment, n = end - begin;
            const uint32_t w = survivor[64 * end + state];
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
    PYTQ_DEV encode_item(const encode_params & p, unsigned item, int d) {
        const unsigned n_row = (unsigned) p.blocks_per_row;
        unsigned i1 = item / n_row, i2 = 0, i3 = 0;
        const unsigned ib = item - i1 * n_row;
        if (p.n2 * p.n3 > 1) {
            const unsigned rest = i1 / (unsigned) p.n1;
            i1 -= rest * (unsigned) p.n1;
            i3 = rest / (unsigned) p.n2, i2 = rest - i3 * (unsigned) p.n2;
        }
        long long row = i1;
        if (p.rows) {
            const char * at = p.rows + i1 * p.rows_nb0;
            if (p.n2 * p.n3 > 1) {
                at += i2 % (unsigned) p.ne11 * p.rows_nb1 + i3 % (unsigned) p.ne12 * p.rows_nb2;
            }
            row = p.row_bytes == 8 ? *(const long long *) at : *(const int *) at;
        }
        src = (const float *) (p.src + i1 * p.src_nb1 + i2 * p.src_nb2 + i3 * p.src_nb3) + ib * (unsigned) d;
        dst = (uint8_t *) p.dst + row * p.dst_nb1 + i2 * p.dst_nb2 + i3 * p.dst_nb3 + ib * (unsigned) p.l.block_bytes;
    }
};

// What the steps of one vector hand on to each other.
struct encode_state {
    int shift; // the vector was divided by 2^shift
    int e[3];  // scale codes of the groups
    bool zero; // zero or not finite, or there is no such vector
};

// Reads a vector (n = 0: none) into shared memory, brought into range.
template <int LANES>
PYTQ_DEV encode_state encode_load(const float * src, int n, int d, float factor, float * x, int lane) {
    constexpr int N = encode_regs<LANES>;
    const int l = lane & (LANES - 1);
    encode_state st = {0, {0, 0, 0}, false};
    float r[N];
    load_vector<LANES>(src, n, d, factor, lane, r);
    uint32_t top = 0;
#pragma unroll
    for (int k = 0; k < N; k++) {
        const uint32_t a = as_uint(r[k]) & 0x7fffffffu;
        top = LANES * k < d && a > top ? a : top;
    }
    top = max_of<LANES>(top);
    st.zero = top == 0 || top > 0x7f7fffffu;
    if (!st.zero && (top < 0x2b800000u || top > 0x53800000u)) { // outside 2^-40 .. 2^40
        frexpf(as_float(top), &st.shift);
    }
#pragma unroll
    for (int k = 0; k < N; k++) {
        if (LANES * k + l < d) {
            x[LANES * k + l] = r[k];
        }
    }
    if (st.shift) {
        for (int i = l; i < d; i += LANES) {
            x[i] = ldexpf(x[i], -st.shift);
        }
    }
    warp_fence();
    return st;
}

// Scales and costs of the trellis steps, filled up to whole rounds in front.
template <int BITS, int LANES>
PYTQ_DEV void encode_costs(const encode_params & p, char * at, const encode_parts & parts, encode_state & st, int d,
                           int lane) {
    const int l = lane & (LANES - 1), pad = 3 * encode_parts::rounds(d) - d;
    const float * const x = (const float *) at;
    float4 * const cost = (float4 *) (at + parts.cost) + pad;
    uint16_t * const best = (uint16_t *) (at + parts.best);
    if (l < pad) {
        cost[l - pad] = make_float4(0.0f, 1e30f, 1e30f, 1e30f);
    }
    const int n_groups = BITS > 0 ? 1 : p.l.n_groups;
#pragma unroll 1
    for (int grp = 0, begin = 0; grp < n_groups; begin = p.l.group_end[grp++]) {
        const int n = (BITS > 0 ? d : p.l.group_end[grp]) - begin;
        float step;
        with_bits<BITS>(p.l.group_bits[grp], step_call<PYTQ_CODE_TRELLIS>{&step});
        const float sigma = __fsqrt_rn(__fdiv_rn(sum_product<LANES>(x + begin, x + begin, n, lane), (float) n));
        const int code = log8_encode(sigma, st.shift);
        st.e[0] = grp == 0 ? code : st.e[0], st.e[1] = grp == 1 ? code : st.e[1], st.e[2] = grp == 2 ? code : st.e[2];
        const float f = __fmul_rn(scaled(log8_scale((uint32_t) code), -st.shift), step);
        const float inv = code ? __fdiv_rn(1.0f, f) : 0.0f;
        const float weight = __fmul_rn(f, f);
#pragma unroll(BITS > 0 && BITS < 4 ? 4 : 1)
        for (int base = 0; base < n; base += LANES) {
            const int i = begin + base + l;
            if (base + l < n) {
                float c[4];
                with_bits<BITS>(p.l.group_bits[grp], choose_call<BITS == 0>{__fmul_rn(x[i], inv), weight, c, &best[i]});
                cost[i] = make_float4(c[0], c[1], c[2], c[3]);
            }
        }
    }
    warp_fence();
}

// Bit planes of the path, then the scale that fits the chosen levels best.
template <int BITS, int LANES>
PYTQ_DEV void encode_planes(const encode_params & p, char * at, const encode_parts & parts, const encode_state & st,
                            uint8_t * out, int d, int lane) {
    constexpr int max_planes = BITS > 0 ? BITS : 5, n_sub = 32 / LANES;
    const int l = lane & (LANES - 1), pad = 3 * encode_parts::rounds(d) - d;
    const int n_groups = BITS > 0 ? 1 : p.l.n_groups, n_planes = BITS > 0 ? BITS : p.l.n_planes;
    const float * const x = (const float *) at;
    float * const level = (float *) (at + parts.cost);
    const uint16_t * const best = (const uint16_t *) (at + parts.best);
    const uint8_t * const path = (const uint8_t *) (at + parts.path);
    uint32_t prev = 0;
#pragma unroll(BITS > 0 && LANES == 32 ? 4 : 1)
    for (int base = 0; base < d; base += 32) {
        uint32_t plane[max_planes] = {};
#pragma unroll
        for (int j = 0; j < n_sub; j++) {
            const int i = base + j * LANES + l, step = i + pad;
            plane[0] |= bits_of<LANES>(i < d && (path[step / 3] >> (2 - step % 3) & 1), lane) << (j * LANES);
        }
        uint32_t index[2];
        index_planes<PYTQ_CODE_TRELLIS, 1, true>(plane, prev, index);
        prev = plane[0];
#pragma unroll
        for (int j = 0; j < n_sub; j++) {
            const int i = base + j * LANES + l, t = j * LANES + l;
            const int z = (int) (2 * (index[1] >> t & 1u) + (index[0] >> t & 1u));
            int k = 0;
            if (i < d) {
                k = best[i] >> (4 * z) & 15;
                const int grp = BITS > 0 ? 0 : (i >= p.l.group_end[0]) + (n_groups > 1 && i >= p.l.group_end[1]);
                with_bits<BITS>(p.l.group_bits[grp], level_call<PYTQ_CODE_TRELLIS>{4 * k + z, &level[i]});
            }
#pragma unroll
            for (int b = 1; b < max_planes; b++) {
                if (b < n_planes) {
                    plane[b] |= bits_of<LANES>(k >> (b - 1) & 1, lane) << (j * LANES);
                }
            }
        }
#pragma unroll
        for (int b = 0; b < max_planes; b++) { // each byte of a word by its own lane
            const int off = BITS > 0 ? PYTQ_SCALE_LOG8 + b * (d / 8) : p.l.plane_off[b];
            if (b < n_planes && l < 4 && base + 8 * l < (BITS > 0 ? d : p.l.plane_len[b])) {
                out[off + base / 8 + l] = (uint8_t) (plane[b] >> (8 * l));
            }
        }
    }
    warp_fence();

    // With the levels fixed, the neighbouring scale may fit better.
#pragma unroll 1
    for (int grp = 0, begin = 0; grp < n_groups; begin = p.l.group_end[grp++]) {
        const int n = (BITS > 0 ? d : p.l.group_end[grp]) - begin;
        const int e0 = grp == 0 ? st.e[0] : grp == 1 ? st.e[1] : st.e[2];
        float step;
        with_bits<BITS>(p.l.group_bits[grp], step_call<PYTQ_CODE_TRELLIS>{&step});
        const float xl = sum_product<LANES>(x + begin, level + begin, n, lane);
        const float ll = sum_product<LANES>(level + begin, level + begin, n, lane);
        // lane 0 tries the scale itself, lanes 1 and 2 its neighbours
        const int cand = e0 + (l == 1 ? -1 : l == 2 ? 1 : 0);
        const float f = __fmul_rn(scaled(log8_scale((uint32_t) cand), -st.shift), step);
        const float err = __fmul_rn(f, __fsub_rn(__fmul_rn(f, ll), __fmul_rn(2.0f, xl)));
        const float below = from_lane(err, (lane & ~(LANES - 1)) + 1),
                    above = from_lane(err, (lane & ~(LANES - 1)) + 2);
        int pick = e0;
        float pick_err = err;
        if (e0 > 1 && below < pick_err) {
            pick = e0 - 1, pick_err = below;
        }
        if (e0 > 0 && e0 < 255 && above < pick_err) {
            pick = e0 + 1;
        }
        if (l == 0) {
            out[grp] = (uint8_t) pick;
        }
    }
}

template <int BITS, int LANES>
PYTQ_DEV void encode_scalar(char * at, const encode_parts & parts, const encode_state & st, uint8_t * out, int d,
                            int lane) {
    using B = book<PYTQ_CODE_SCALAR, BITS>;
    constexpr int n_sub = 32 / LANES;
    const int l = lane & (LANES - 1);
    const float * const x = (const float *) at;
    float * const level = (float *) (at + parts.cost);
    const float ss = sum_product<LANES>(x, x, d, lane);
    const float sigma = __fsqrt_rn(__fdiv_rn(ss, (float) d));
    const float inv = __fdiv_rn(1.0f, __fmul_rn(sigma, B::step()));
#pragma unroll(LANES == 32 ? 4 : 1)
    for (int base = 0; base < d; base += 32) {
        uint32_t plane[BITS] = {};
#pragma unroll
        for (int j = 0; j < n_sub; j++) {
            const int i = base + j * LANES + l;
            uint32_t word = tagged_level<PYTQ_CODE_SCALAR, BITS>(0);
            if (i < d) {
                const float y = __fmul_rn(x[i], inv);
#pragma unroll
                for (int n = 0; n + 1 < B::n_levels; n++) {
                    const bool up = y > 0.5f * (float) (B::level(n) + B::level(n + 1));
                    word = up ? tagged_level<PYTQ_CODE_SCALAR, BITS>(n + 1) : word;
                }
                level[i] = as_float(word & 0xffff0000u);
            }
#pragma unroll
            for (int b = 0; b < BITS; b++) {
                plane[b] |= bits_of<LANES>(word >> b & 1, lane) << (j * LANES);
            }
        }
#pragma unroll
        for (int b = 0; b < BITS; b++) {
            if (l < 4 && base + 8 * l < d) {
                out[PYTQ_SCALE_FP16 + b * (d / 8) + base / 8 + l] = (uint8_t) (plane[b] >> (8 * l));
            }
        }
    }
    warp_fence();
    const float ll = sum_product<LANES>(level, level, d, lane);
    const float s = scaled(__fdiv_rn(__fsqrt_rn(__fdiv_rn(ss, ll)), B::step()), st.shift);
    if (l == 0) {
        const uint32_t h = !(s < 65504.0f) ? 0x7bffu : __half_as_ushort(__float2half_rn(s));
        out[0] = (uint8_t) h, out[1] = (uint8_t) (h >> 8);
    }
}

// Encodes vector `item` of p, if there is one, by LANES lanes with memory of their own at `at`. BITS: bits of the only
// group, or 0 for a type with several groups. D: the head size, or 0 for any.
template <int CODE, int BITS, int LANES, int D>
PYTQ_DEV void encode_vector(const encode_params & p, int item, char * at, int lane) {
    const int l = lane & (LANES - 1), d = D ? D : p.l.d;
    const encode_parts parts(d, LANES);
    const bool exists = item < p.blocks_per_row * p.n1 * p.n2 * p.n3;
    const encode_item v(p, exists ? (unsigned) item : 0u, d);
    encode_state st = encode_load<LANES>(v.src, exists ? d : 0, d, p.hadamard, (float *) at, lane);
    uint8_t * const out = (uint8_t *) (at + parts.metric);
    if (ballot32(!st.zero, lane & 32)) { // the same for the whole warp, so that the steps below can exchange values
        if constexpr (CODE == PYTQ_CODE_TRELLIS) {
            encode_costs<BITS, LANES>(p, at, parts, st, d, lane);
            viterbi<LANES>(at, parts, d, lane);
            encode_planes<BITS, LANES>(p, at, parts, st, out, d, lane);
        } else {
            encode_scalar<BITS, LANES>(at, parts, st, out, d, lane);
        }
        warp_fence();
    }
    for (int i = l; i < p.l.block_bytes && exists; i += LANES) {
        v.dst[i] = st.zero ? (uint8_t) 0 : out[i];
    }
}

// Blocks of one warp.
template <int CODE, int BITS, int LANES, int D>
__global__ void __launch_bounds__(32) encode(const PYTQ_GRID_CONSTANT encode_job job) {
    const int lane = threadIdx.x, l = lane & (LANES - 1), block = (int) blockIdx.x;
    const int slot = lane / LANES; // this vector within the block
    constexpr int per_block = 32 / LANES;
    grid_trigger();
    if (block >= job.second_end) {
        const rotate_params & q = job.rotate;
        const int d = D ? D : q.d, item = (block - job.second_end) * per_block + slot;
        const float * const src = q.src + (long long) item * d;
        float * const dst = q.dst + (long long) item * d;
        float r[encode_regs<LANES>];
        grid_wait();
        load_vector<LANES>(src, item < q.n ? d : 0, d, q.factor, lane, r);
#pragma unroll
        for (int k = 0; k < encode_regs<LANES>; k++) {
            if (LANES * k + l < d && item < q.n) {
                dst[LANES * k + l] = r[k];
            }
        }
        return;
    }
    const int which = block >= job.first_end;
    const encode_params & p = job.p[which];
    grid_wait();
    encode_vector<CODE, BITS, LANES, D>(p, (block - which * job.first_end) * per_block + slot,
                                        encode_smem + slot * encode_parts(D ? D : p.l.d, LANES).bytes, lane);
}

} // namespace pytq

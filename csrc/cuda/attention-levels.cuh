// Bit planes to int8 levels for attention: which coordinates a lane decodes, and how, with as little work for the
// integer pipe as possible.
//
// Operations per 32 values (one word of every plane), by the pipe that runs them; either takes a warp every second
// cycle:
//                                        integer (ALU)          multiplier (FMA)       shared memory
//   kv3     realign, history             4                                             6 loads
//           subset bits, sign folded in  8
//           planes -> selectors          12                     3 left shifts
//           merge selectors              5                      2 left shifts
//           upper halves of selectors    8
//           look-up of 16 levels         16 permutes            8 negations
//                                        53                     13
//   kv4     one more plane, 32 levels    80                     15                     8 loads
//   turbo3  8 levels, no subset bits     27                     3                      6 loads
// A full table of 16 levels takes 24 permutes instead of 16, one of 32 levels 56 instead of 32. Codebooks are
// antisymmetric, so half of a table is looked up and the other half is its negative; bytewise negation is one
// multiply-add because no level is 0. Right shifts as multiplications that keep the high half would level the two pipes
// on paper; on an H100 they cost 2 % (they issue at a quarter of the rate).
#pragma once

#include "device.cuh"

namespace pytq {

// Values that the compiler must not know: it would turn the multiplication into a subtraction on the busier pipe.
struct hidden_constants {
    uint32_t minus_one, zero;
};
inline hidden_constants make_hidden_constants() {
    return {~0u, 0u};
}

// A constant in a register of its own. zero: 0 in every lane, which the compiler must not know (lane times a
// parameter); it would otherwise move the constant from a uniform register before every permute.
PYTQ_DEV uint32_t own_register(uint32_t c, uint32_t zero) {
    return c ^ zero;
}

// Whether the upper half of the table is the negative of the lower half, from 16 levels on.
template <int CODE, int BITS> PYTQ_HD constexpr bool halved() {
    return index_bits(CODE, BITS) >= 4;
}

// The levels that are looked up: every other word of four in a register, the rest are literals of the permutes.
template <int CODE, int BITS> struct half_table {
    using B = book<CODE, BITS>;
    static constexpr int LOOKED_UP = halved<CODE, BITS>() ? B::n_levels / 2 : B::n_levels;
    static constexpr int N = LOOKED_UP > 8 ? LOOKED_UP / 8 : 1;
    static_assert(!halved<CODE, BITS>() || B::level(0) == -B::level(B::n_levels - 1), "antisymmetric");
    uint32_t even[N];
    PYTQ_DEV void init(uint32_t zero) { fill<0>(zero); }
    template <int I> PYTQ_DEV void fill(uint32_t zero) {
        even[I] = own_register(B::template word<2 * I>, zero);
        if constexpr (I + 1 < N) {
            fill<I + 1>(zero);
        }
    }
};

template <int CODE, int BITS, int K>
PYTQ_DEV void look_up8(const half_table<CODE, BITS> & t, const hidden_constants & c, uint32_t bias, uint32_t w,
                       const uint32_t * index, uint32_t out[2]) {
    constexpr bool HALF = halved<CODE, BITS>();
    constexpr int NB = index_bits(CODE, BITS), LOW = HALF ? NB - 1 : NB;
    uint32_t m[4], mh[4];
#pragma unroll
    for (int b = 3; b < NB; b++) {
        m[b - 3] = merge_selector<K>(index[b]);
        mh[b - 3] = m[b - 3] >> 16;
    }
    out[0] = lookup<LOW, 0>(t, w, m);
    out[1] = lookup<LOW, 0>(t, w >> 16, mh);
    if constexpr (HALF) {
        // bytewise negation: no byte is 0, so ~x + 1 never carries
        out[0] = permute(out[0], out[0] * c.minus_one + bias, m[NB - 4]);
        out[1] = permute(out[1], out[1] * c.minus_one + bias, mh[NB - 4]);
    }
}

// Lower index bits as the half table wants them: inverted where the top bit is set.
template <int CODE, int BITS> PYTQ_DEV void fold_sign(uint32_t * index) {
    if constexpr (halved<CODE, BITS>()) {
        constexpr int NB = index_bits(CODE, BITS);
#pragma unroll
        for (int b = 0; b < NB - 1; b++) {
            index[b] ^= index[NB - 1];
        }
    }
}

// Levels of 32 coordinates from folded index planes: out[2 k + h] holds coordinates 4 n + k, n = 4 h .. 4 h + 3.
template <int CODE, int BITS>
PYTQ_DEV void folded_levels(const half_table<CODE, BITS> & t, const hidden_constants & k, uint32_t bias,
                            const uint32_t * index, uint32_t out[8]) {
    constexpr int NB = index_bits(CODE, BITS), LOW = halved<CODE, BITS>() ? NB - 1 : NB;
    const uint32_t m1 = 0x55555555u, m2 = 0x33333333u;
    const uint32_t a = index[0], b = LOW > 1 ? index[1] : 0u, c = LOW > 2 ? index[2] : 0u;
    const uint32_t a1 = blend(m1, a, b << 1), b1 = blend(m1, a >> 1, b);
    const uint32_t c1 = c & m1, d1 = (c >> 1) & m1;
    look_up8<CODE, BITS, 0>(t, k, bias, blend(m2, a1, c1 << 2), index, out + 0);
    look_up8<CODE, BITS, 1>(t, k, bias, blend(m2, b1, d1 << 2), index, out + 2);
    look_up8<CODE, BITS, 2>(t, k, bias, blend(m2, a1 >> 2, c1), index, out + 4);
    look_up8<CODE, BITS, 3>(t, k, bias, blend(m2, b1 >> 2, d1), index, out + 6);
}

// ------------------------------------------------------------------------------------------------ blocks in shared
// memory

// Shared memory is addressed by 32-bit offsets: a pointer rounded down to a word would lose its address space.
extern __shared__ __align__(16) char decode_smem[];

PYTQ_DEV uint32_t shared_word(int at) {
    return *(const uint32_t *) (decode_smem + at);
}
PYTQ_DEV uint32_t shared_byte(int at) {
    return *(const uint8_t *) (decode_smem + at);
}

// Bits of a byte offset and a bit offset B within it: 32 bits from there, u bytes (whole words) further.
template <int B> PYTQ_DEV uint32_t window(uint32_t bits, int u) {
    const uint32_t at = B % 32 == 0 ? bits : bits + (uint32_t) B; // the shift counts modulo 32
    const int w = (int) (at >> 5) * 4 + (B % 32 == 0 ? B / 8 : 0) + u;
    return shift_pair(shared_word(w), shared_word(w + 4), at);
}

// Byte of the first bit of plane P, from the start of plane 0.
template <class T, int P> PYTQ_HD constexpr int plane_byte() {
    if constexpr (P == 0) {
        return 0;
    } else {
        return plane_byte<T, P - 1>() + T::template plane_len<P - 1> / 8;
    }
}

template <class T, int BITS, int B, int P = 0> PYTQ_DEV void windows(uint32_t bits, int u, uint32_t * plane) {
    plane[P] = window<8 * plane_byte<T, P>() + B>(bits, u);
    if constexpr (P + 1 < BITS) {
        windows<T, BITS, B, P + 1>(bits, u, plane);
    }
}

// 2^((e - 136) / 8) without a table: (e | 2^23) / 8 is exact.
PYTQ_DEV float log8_exponent(uint32_t e) {
    return fmaf(as_float(0x4b000000u | e), 0.125f, -1048576.0f - PYTQ_LOG8_BIAS * 0.125f);
}

PYTQ_DEV float exp2_fast(float x) {
#if defined(PYTQ_PTX)
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
#else
    return exp2f(x);
#endif
}

// Scale of group G of the block at this offset.
template <class T, int G> PYTQ_DEV float block_scale(int at) {
    if constexpr (T::scale_bytes == 1) {
        const uint32_t e = shared_byte(at + G);
        return e == 0 ? 0.0f : exp2_fast(log8_exponent(e));
    } else {
        return half_bits(shared_byte(at) | shared_byte(at + 1) << 8);
    }
}

// log2 of the scale of a block, at least -40: a zero scale then adds 2^-40 of a level, far below every rounding. A
// number whatever the bytes are: tokens past the end have any.
template <class T> PYTQ_DEV float block_log2_scale(int at) {
    if constexpr (T::scale_bytes == 1) {
        const uint32_t e = shared_byte(at);
        return e == 0 ? -40.0f : log8_exponent(e);
    } else {
        return fminf(fmaxf(__log2f(half_bits(shared_byte(at) | shared_byte(at + 1) << 8)), -40.0f), 40.0f);
    }
}

// ------------------------------------------------------------------------------------------------ keys

// Lane j of four decodes a quarter of every group, in windows of at most 32 coordinates. A window fills 4 matrix steps
// of 32 coordinates (8 per lane), or 2 if it has at most 16; places without a coordinate meet a zero of the query.
template <class T, int G> struct key_group {
    static constexpr int bits = T::template group_bits<G>, len = T::template group_len<G>;
    static constexpr int per_lane = len / 4, n_windows = per_lane > 32 ? 2 : 1, width = per_lane / n_windows;
    static constexpr int steps = width > 16 ? 4 : 2;
    PYTQ_HD static constexpr int first() {
        if constexpr (G == 0) {
            return 0;
        } else {
            return key_group<T, G - 1>::first() + key_group<T, G - 1>::len;
        }
    }
    PYTQ_HD static constexpr int first_word() {
        if constexpr (G == 0) {
            return 0;
        } else {
            return key_group<T, G - 1>::first_word() + key_group<T, G - 1>::n_windows * 2 * key_group<T, G - 1>::steps;
        }
    }
    PYTQ_HD static constexpr int end_word() { return first_word() + n_windows * 2 * steps; }
};

// Words of a lane's query operand.
template <class T> PYTQ_HD constexpr int query_words() {
    return key_group<T, T::n_groups - 1>::end_word();
}

// Byte of coordinate c in the query operand laid out as [lane j][word].
template <class T, int G = 0> PYTQ_DEV int query_byte(int c) {
    using g = key_group<T, G>;
    if constexpr (G + 1 < T::n_groups) {
        if (c >= g::first() + g::len) {
            return query_byte<T, G + 1>(c);
        }
    }
    const int local = c - g::first(), j = local / g::per_lane, r = local - j * g::per_lane;
    const int w = r / g::width, x = r - w * g::width, k = x & 3, n = x >> 2;
    const int word = g::first_word() + w * 2 * g::steps + (g::steps == 4 ? 2 * k + (n >> 2) : k);
    return 4 * (j * query_words<T>() + word) + (n & 3);
}

// Whether four neighbouring coordinates of four lanes (16 in a row) make up whole words of the query operand.
template <class T> PYTQ_HD constexpr bool query_by_words() {
    return T::n_groups == 1 && T::d % 32 == 0 && key_group<T, 0>::per_lane % 16 == 0;
}

// Levels of window W of group G; bits: bit offset of the block's plane 0, u: whole words further.
template <class T, int G, int W>
PYTQ_DEV void key_levels(const half_table<T::code, T::template group_bits<G>> & table, const hidden_constants & c,
                         uint32_t bias, uint32_t bits, int u, int j, uint32_t out[8]) {
    using g = key_group<T, G>;
    constexpr int B = g::first() + W * g::width;
    const uint32_t at = bits + (uint32_t) (j * g::per_lane);
    uint32_t plane[g::bits], index[index_bits(T::code, g::bits)], prev = 0;
    windows<T, g::bits, B>(at, u, plane);
    if constexpr (T::code == PYTQ_CODE_TRELLIS) {
        if constexpr (T::n_groups == 1 && g::width == 32 && g::n_windows == 1) {
            prev = __shfl_up_sync(0xffffffffu, plane[0], 1);
        } else {
            prev = window<B - 32>(at, u);
        }
        if constexpr (B == 0 && g::per_lane < 6) { // the history of several lanes begins before the block
            prev &= ~(~0u >> (j * g::per_lane));
        } else if constexpr (B == 0) {
            prev = j == 0 ? 0u : prev;
        }
    }
    index_planes<T::code, g::bits, true>(plane, prev, index);
    fold_sign<T::code, g::bits>(index);
    folded_levels<T::code, g::bits>(table, c, bias, index, out);
}

// ------------------------------------------------------------------------------------------------ values

// Lane g of eight decodes an eighth of the coordinates, in windows of at most 16 below which 16 bits of history fit.
// Matrix tile m of a window takes two of its coordinates; coordinates of one half (unit) of a nibble pair come
// together.
template <class T> struct value_shape {
    static constexpr int per_lane = T::d / 8, n_windows = per_lane > 16 ? 2 : 1, width = per_lane / n_windows;
    static constexpr int tiles = width / 2; // per window
    static_assert(T::n_groups == 1 && (width == 8 || width == 10 || width == 12 || width == 16), "head size");
    PYTQ_HD static constexpr int paired() {
        return width - 8 < 4 ? width - 8 : 4;
    } // tiles of unit 0 that reach above 8
    PYTQ_HD static constexpr int first(int m) {
        return width == 16 ? m : m < paired() ? m : width == 8 ? 2 * m : width == 10 ? 2 * m - 2 : 2 * m - 4;
    }
    PYTQ_HD static constexpr int second(int m) { return width == 16 || m < paired() ? first(m) + 8 : first(m) + 1; }
    PYTQ_HD static constexpr int unit(int m) { return first(m) >> 2 & 1; }
    // register of coordinate x among the levels of its unit
    PYTQ_HD static constexpr int at(int x) { return 2 * (x & 3) + (x >> 3); }
};

} // namespace pytq

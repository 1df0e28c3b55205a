// Blocks in shared memory to f16 tiles in the layout that wgmma reads, for prefill attention.
//
// A tile of keys holds the levels themselves, exact in f16; their scales stay outside, since rounding a scale would
// move a logit more than rounding every coordinate does. Values are multiplied by their scale in f16, which is cheaper
// than to do so with every weight. One lane decodes 32 coordinates of a token: the level tables hold level + 128, so
// one byte permute puts two of them below the exponent of 1024 and one addition leaves two levels. Coordinates come
// four apart, and stay so: the query is permuted alike, and the result's columns are named accordingly where they are
// stored.
#pragma once

#include "attention-levels.cuh"

namespace pytq {

// Codebooks whose words hold level + 128, under codes of their own; the number of bits is that of the index.
PYTQ_HD constexpr int offset_code(int code) {
    return 2 + code;
}
template <class B_, int N> struct offset_book {
    static constexpr int n_levels = B_::n_levels;
    template <int W> static constexpr uint32_t word = B_::template word<W> ^ 0x80808080u;
    PYTQ_HD static constexpr int level(int i) { return B_::level(i); }
};
template <int NB> struct book<2 + PYTQ_CODE_SCALAR, NB> : offset_book<book<PYTQ_CODE_SCALAR, NB>, NB> {};
template <int NB> struct book<2 + PYTQ_CODE_TRELLIS, NB> : offset_book<book<PYTQ_CODE_TRELLIS, NB - 1>, NB> {};

template <class T> using offset_table = half_table<offset_code(T::code), index_bits(T::code, T::bits)>;

// Position of coordinate c among the columns of a tile, and back.
PYTQ_HD constexpr int tile_column(int c) {
    return (c & ~31) | (c & 3) << 3 | (c >> 2 & 7);
}
PYTQ_HD constexpr int tile_coordinate(int column) {
    return (column & ~31) | (column & 7) << 2 | (column >> 3 & 3);
}

// Byte of unit u (8 columns) of row r in a tile of so many rows: columns in groups of 64, 128-byte swizzle.
PYTQ_HD constexpr int tile_at(int rows, int r, int u) {
    return (u >> 3) * rows * 128 + r * 128 + (((u & 7) ^ (r & 7)) << 4);
}

// The f16 factor of a block's levels, twice. It is that of 128 levels, so that small scales stay normal numbers.
constexpr float half_unit = 128.0f;
PYTQ_DEV uint32_t half_factor(float scale_and_step) {
    union {
        uint32_t u;
        __half2 h;
    } v;
    v.h = __float2half2_rn(scale_and_step * half_unit);
    return v.u;
}

// Two halves from bytes s and s + 1 (see bytes_to_halves()) of levels + 128, times a factor.
PYTQ_DEV uint32_t bytes_to_scaled_halves(uint32_t x, uint32_t sel, uint32_t factor) {
    union {
        uint32_t u;
        __half2 h;
    } v, f;
    v.u = permute_bytes(x, 0x64646464u, sel), f.u = factor;
    v.h = __hmul2(__hfma2(v.h, __float2half2_rn(1.0f / half_unit), __float2half2_rn(-1152.0f / half_unit)), f.h);
    return v.u;
}

// Levels of 32 coordinates as halves, in the order of tile_column(); SCALED: times half_factor() of the block.
template <class T, bool SCALED>
PYTQ_DEV void level_halves(const offset_table<T> & table, const hidden_constants & hidden, uint32_t bias,
                           const uint32_t * plane, uint32_t prev, uint32_t factor, uint4 unit[4]) {
    constexpr int NB = index_bits(T::code, T::bits), CODE = offset_code(T::code);
    uint32_t index[NB], lev[8];
    index_planes<T::code, T::bits, true>(plane, prev, index);
    fold_sign<CODE, NB>(index);
    folded_levels<CODE, NB>(table, hidden, bias, index, lev);
    const auto pair = [&](uint32_t x, uint32_t sel) {
        return SCALED ? bytes_to_scaled_halves(x, sel, factor) : bytes_to_halves(x, sel);
    };
#pragma unroll
    for (int k = 0; k < 4; k++) {
        unit[k] = make_uint4(pair(lev[2 * k], 0x04010400u), pair(lev[2 * k], 0x04030402u),
                             pair(lev[2 * k + 1], 0x04010400u), pair(lev[2 * k + 1], 0x04030402u));
    }
}

// What a warp decodes at a time: 32 words of 32 coordinates, of as many tokens as that makes. Eight lanes that store
// together have 4 tokens and 2 neighbouring words, so they meet all banks.
template <class T> struct tile_lanes {
    static constexpr int words = T::d / 32, tokens = 32 / words;
    static_assert(T::n_groups == 1 && T::d % 32 == 0 && (words & (words - 1)) == 0, "whole words per plane");
    PYTQ_HD static constexpr int word(int lane) { return (lane & 1) | (lane >> 3 << 1 & (words - 1)); }
    PYTQ_HD static constexpr int token(int lane) {
        return words == 4 ? (lane >> 1 & 3) | lane >> 4 << 2 : words == 2 ? lane >> 1 : lane >> 1 & 3;
    }
    // lane that has the word before
    PYTQ_HD static constexpr int before(int lane) { return lane & 1 ? lane - 1 : lane - 7; }
};

// Bytes of shared memory for a block of T that begins anywhere in its first 16 bytes: an odd multiple of 16, so that
// the words that lanes read together lie in different banks.
template <class T> PYTQ_HD constexpr int raw_pitch() {
    return ((T::block_bytes + 15 + 15) / 16 | 1) * 16;
}

// Planes of this lane's 32 coordinates, which begin `shift` bits after the words at `at` and end in those at `next`.
// (The same where the shift is 0: the word behind the last may be another block's, on its way.)
template <class T> PYTQ_DEV void tile_planes(int at, int next, uint32_t shift, uint32_t * plane) {
#pragma unroll
    for (int b = 0; b < T::bits; b++) {
        plane[b] = shift_pair(shared_word(at + b * (T::d / 8)), shared_word(next + b * (T::d / 8)), shift);
    }
}

// x of another lane of 32.
PYTQ_DEV uint32_t from_lane(uint32_t x, int lane) {
#if defined(__HIPCC__)
    return __shfl(x, lane, 32);
#else
    return __shfl_sync(0xffffffffu, x, lane);
#endif
}

// Words of one lane in its warp's blocks of a tile. SCALED: the tile gets values, otherwise levels.
template <class T, int TOKENS, bool SCALED> struct tile_words {
    using L = tile_lanes<T>;
    static constexpr int n = TOKENS / L::tokens;
    int at[n], next[n]; // in the first raw stage
    uint32_t shift[n];
    uint32_t plane[n][T::bits], factor[n];

    PYTQ_DEV void init(int raw, const char * base, long long nb1, int lane) {
#pragma unroll
        for (int i = 0; i < n; i++) {
            const int t = i * L::tokens + L::token(lane);
            // a tile's tokens times any stride keep the alignment to 16 bytes, so this holds for all tiles
            const int lead = (int) ((uintptr_t) (base + t * nb1) & 15) + T::data_off;
            at[i] = raw + t * raw_pitch<T>() + ((lead & ~3) + 4 * L::word(lane)), shift[i] = 8 * (lead & 3);
            next[i] = at[i] + (shift[i] ? 4 : 0);
        }
    }
    // factors: where those of the warp's tokens lie
    PYTQ_DEV void load(int stage, int factors, int lane) {
#pragma unroll
        for (int i = 0; i < n; i++) {
            tile_planes<T>(at[i] + stage, next[i] + stage, shift[i], plane[i]);
            factor[i] = SCALED ? shared_word(factors + 4 * (i * L::tokens + L::token(lane))) : 0u;
        }
    }
    // unit_at: where the lane's four units lie
    PYTQ_DEV void decode(const offset_table<T> & table, const hidden_constants & hidden, uint32_t bias,
                         const int unit_at[4], int to, int lane) const {
#pragma unroll
        for (int i = 0; i < n; i++) {
            uint32_t prev = 0;
            if constexpr (T::code == PYTQ_CODE_TRELLIS) {
                prev = from_lane(plane[i][0], L::before(lane) & 31);
                prev = L::word(lane) == 0 ? 0u : prev;
            }
            uint4 unit[4];
            level_halves<T, SCALED>(table, hidden, bias, plane[i], prev, factor[i], unit);
#pragma unroll
            for (int k = 0; k < 4; k++) {
                *(uint4 *) (decode_smem + to + unit_at[k] + i * L::tokens * 128) = unit[k];
            }
        }
    }
};

} // namespace pytq

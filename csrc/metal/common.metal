// Blocks on the GPU: the layout of a type as function constants, level tables, eight coordinates at a time.
//
// A type is not a template argument: its row of the types table arrives as eight function constants, which the compiler
// folds when a pipeline is made. So every pair of K and V types is specialised, and the library holds one kernel per head
// size only.
#include <metal_stdlib>

#include "../layout.h"
#include "args.h"

using namespace metal;

#define PYTQ_UNROLL _Pragma("clang loop unroll(full)")

enum { CODE_SCALAR = 0, CODE_TRELLIS = 1 };

constant int FC_k_code [[function_constant(PYTQ_METAL_FC_K + 0)]];
constant int FC_k_sb   [[function_constant(PYTQ_METAL_FC_K + 1)]];
constant int FC_k_n0   [[function_constant(PYTQ_METAL_FC_K + 2)]];
constant int FC_k_b0   [[function_constant(PYTQ_METAL_FC_K + 3)]];
constant int FC_k_n1   [[function_constant(PYTQ_METAL_FC_K + 4)]];
constant int FC_k_b1   [[function_constant(PYTQ_METAL_FC_K + 5)]];
constant int FC_k_n2   [[function_constant(PYTQ_METAL_FC_K + 6)]];
constant int FC_k_b2   [[function_constant(PYTQ_METAL_FC_K + 7)]];

constant int FC_v_code [[function_constant(PYTQ_METAL_FC_V + 0)]];
constant int FC_v_sb   [[function_constant(PYTQ_METAL_FC_V + 1)]];
constant int FC_v_n0   [[function_constant(PYTQ_METAL_FC_V + 2)]];
constant int FC_v_b0   [[function_constant(PYTQ_METAL_FC_V + 3)]];
constant int FC_v_n1   [[function_constant(PYTQ_METAL_FC_V + 4)]];
constant int FC_v_b1   [[function_constant(PYTQ_METAL_FC_V + 5)]];
constant int FC_v_n2   [[function_constant(PYTQ_METAL_FC_V + 6)]];
constant int FC_v_b2   [[function_constant(PYTQ_METAL_FC_V + 7)]];

// One row of the types table; sb: scale bytes of a group.
struct layout {
    int code, sb, n0, b0, n1, b1, n2, b2;
};

// Kernels with one compressed operand use the first set.
static inline layout k_layout() {
    layout l = {FC_k_code, FC_k_sb, FC_k_n0, FC_k_b0, FC_k_n1, FC_k_b1, FC_k_n2, FC_k_b2};
    return l;
}

static inline layout v_layout() {
    layout l = {FC_v_code, FC_v_sb, FC_v_n0, FC_v_b0, FC_v_n1, FC_v_b1, FC_v_n2, FC_v_b2};
    return l;
}

static inline int head_dim(layout l) {
    return l.n0 + l.n1 + l.n2;
}
static inline int n_groups(layout l) {
    return PYTQ_NG(l.n1, l.n2);
}
static inline int group_end(layout l, int g) {
    return g == 0 ? l.n0 : g == 1 ? l.n0 + l.n1 : l.n0 + l.n1 + l.n2;
}
static inline int group_bits(layout l, int g) {
    return g == 0 ? l.b0 : g == 1 ? l.b1 : l.b2;
}
// Groups end at multiples of eight, so the eight coordinates of a plane's byte share theirs.
static inline int group_of(layout l, int byte) {
    return (l.n1 > 0 && 8 * byte >= l.n0 ? 1 : 0) + (l.n2 > 0 && 8 * byte >= l.n0 + l.n1 ? 1 : 0);
}
static inline int plane_offset(layout l, int p) {
    const int sb = l.sb * n_groups(l);
    switch (p) {
        case 0:
            return PYTQ_OFF0(sb, l.n0, l.b0, l.n1, l.b1, l.n2, l.b2);
        case 1:
            return PYTQ_OFF1(sb, l.n0, l.b0, l.n1, l.b1, l.n2, l.b2);
        case 2:
            return PYTQ_OFF2(sb, l.n0, l.b0, l.n1, l.b1, l.n2, l.b2);
        case 3:
            return PYTQ_OFF3(sb, l.n0, l.b0, l.n1, l.b1, l.n2, l.b2);
        default:
            return PYTQ_OFF4(sb, l.n0, l.b0, l.n1, l.b1, l.n2, l.b2);
    }
}
static inline int plane_length(layout l, int p) {
    return PYTQ_PL(p, l.n0, l.b0, l.n1, l.b1, l.n2, l.b2);
}
static inline int block_bytes(layout l) {
    return PYTQ_BLOCK_BYTES(l.sb, l.n0, l.b0, l.n1, l.b1, l.n2, l.b2);
}

// ---------------------------------------------------------------------------------------------- codebooks

#define PYTQ_CODEBOOK(code, bits, n_levels, step, ...) constant int8_t levels_##code##_##bits[n_levels] = {__VA_ARGS__};
#include "../codebooks.def"

// 0 past the end of the codebook. code and bits are function constants: one table is left.
static inline float level_of(int code, int bits, int i) {
#define PYTQ_CODEBOOK(c, b, n_levels, step, ...)                                                                       \
    if (code == CODE_##c && bits == (b)) {                                                                             \
        return i < (n_levels) ? (float) levels_##c##_##b[i] : 0.0f;                                                    \
    }
#include "../codebooks.def"
    return 0.0f;
}

static inline float step_of(int code, int bits) {
#define PYTQ_CODEBOOK(c, b, n_levels, step, ...)                                                                       \
    if (code == CODE_##c && bits == (b)) {                                                                             \
        return step;                                                                                                   \
    }
#include "../codebooks.def"
    return 1.0f;
}

static inline int n_levels_of(int code, int bits) {
    return code == CODE_TRELLIS ? 2 << bits : 1 << bits;
}

// Level tables of all groups of a type, written by n threads. The caller's next barrier makes them visible.
static inline void fill_table(threadgroup float * tab, layout l, int thread_index, int n_threads) {
    for (int i = thread_index; i < PYTQ_METAL_GROUPS * PYTQ_METAL_TABLE; i += n_threads) {
        const int g = i / PYTQ_METAL_TABLE;
        tab[i] = l.code > CODE_TRELLIS ? 0.0f : level_of(l.code, group_bits(l, g), i % PYTQ_METAL_TABLE);
    }
}

// ---------------------------------------------------------------------------------------------- scales

// 2^((e - 136) / 8), 0 for e = 0: powers of the eighth root are mantissas, the rest is the exponent.
static inline float log8_scale(uint e) {
    const bool b0 = e & 1u, b1 = e & 2u, b2 = e & 4u;
    const uint lo = b1 ? (b0 ? 0x25fed7u : 0x1837f0u) : (b0 ? 0x0b95c2u : 0u);
    const uint hi = b1 ? (b0 ? 0x6ac0c7u : 0x5744fdu) : (b0 ? 0x45672au : 0x3504f3u);
    return e == 0u ? 0.0f : as_type<float>(((e >> 3) + 127u - 17u) << 23 | (b2 ? hi : lo));
}

static inline float half_at(device const uchar * at) {
    return (float) as_type<half>((ushort) (at[0] | at[1] << 8));
}

// scale * step of a group; f16 and q8_0 operands carry theirs in the values.
static inline float factor_of(device const uchar * block, layout l, int g) {
    if (l.code > CODE_TRELLIS) {
        return 1.0f;
    }
    const float scale = l.sb == 1 ? log8_scale(block[g]) : half_at(block + 2 * g);
    return scale * step_of(l.code, group_bits(l, g));
}

// ---------------------------------------------------------------------------------------------- eight coordinates

// Bit i of a nibble to bit 0 of byte i.
static inline uint spread4(uint x) {
    return ((x & 15u) * 0x00204081u) & 0x01010101u;
}

// Coordinates 8 * byte .. 8 * byte + 7 of a block, as levels (f16, q8_0: as values). Per plane and value about one
// operation brings the bit into the index: the indices of four values are the bytes of one word.
static inline void unpack8(device const uchar * block, int byte, layout l, threadgroup const float * tab,
                           thread float4 & lo, thread float4 & hi) {
    if (l.code == PYTQ_METAL_F16) {
        device const packed_half4 * at = (device const packed_half4 *) block + 2 * byte;
        lo = float4(half4(at[0])), hi = float4(half4(at[1]));
        return;
    }
    if (l.code == PYTQ_METAL_Q8_0) {
        device const uchar * at = block + 34 * (byte / 4);
        const float d = half_at(at);
        device const int8_t * qs = (device const int8_t *) at + 2 + 8 * (byte % 4);
        lo = float4((float) qs[0], (float) qs[1], (float) qs[2], (float) qs[3]) * d;
        hi = float4((float) qs[4], (float) qs[5], (float) qs[6], (float) qs[7]) * d;
        return;
    }
    const int g = group_of(l, byte), bits = group_bits(l, g);
    device const uchar * plane0 = block + plane_offset(l, 0) + byte;
    const uint u = plane0[0];
    uint first, second; // indices of coordinates 0..3 and 4..7
    int at;             // next bit of the index
    if (l.code == CODE_TRELLIS) {
        const uint w = u << 8 | (byte > 0 ? (uint) plane0[-1] : 0u);
        const uint z1 = (w ^ w << 5 ^ w << 6) >> 8, z0 = (w << 2 ^ w << 4) >> 8;
        first = spread4(z0) | spread4(z1) << 1;
        second = spread4(z0 >> 4) | spread4(z1 >> 4) << 1;
        at = 2;
    } else {
        first = spread4(u), second = spread4(u >> 4);
        at = 1;
    }
    PYTQ_UNROLL for (int p = 1; p < 5; p++) {
        if (p < l.b0) {
            const uint b = p < bits ? (uint) block[plane_offset(l, p) + byte] : 0u;
            first |= spread4(b) << at;
            second |= spread4(b >> 4) << at;
            at++;
        }
    }
    const uchar4 i = as_type<uchar4>(first), j = as_type<uchar4>(second);
    tab += PYTQ_METAL_TABLE * g;
    lo = float4(tab[i[0]], tab[i[1]], tab[i[2]], tab[i[3]]);
    hi = float4(tab[j[0]], tab[j[1]], tab[j[2]], tab[j[3]]);
}

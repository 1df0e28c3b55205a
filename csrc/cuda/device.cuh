// Device-side building blocks shared by the CUDA and HIP kernels: the types table as templates, byte look-ups,
// bit-plane decoding. No warp size and no architecture is assumed here.
//
// Decoding 32 values from bit planes (one 32-bit word per plane), counted for the 16-level trellis code (kv3):
//   subset bits z1, z0 of 32 values      6 shifts and three-input logic operations
//   planes -> 4-bit selectors           15 (two butterfly stages over 1- and 2-bit fields: words hold every 4th
//   coordinate) look-up of 32 int8 levels           40 (two byte permutes over 8-entry halves, one permute that merges
//   them, per 4 values)
// about 1.9 integer operations per value; the order of the values inside the registers is a fixed permutation, which
// the other operand of the dot product shares, so nothing is ever shuffled back.
#pragma once

#include "../layout.h"
#include "../pytq.h"

#if defined(__HIPCC__)
#include <hip/hip_fp16.h>
#include <hip/hip_runtime.h>
#elif defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

#define PYTQ_DEV __device__ __forceinline__
#define PYTQ_HD  __host__ __device__
#if defined(__HIPCC__)
#define PYTQ_GRID_CONSTANT
#else
#define PYTQ_GRID_CONSTANT __grid_constant__
#endif

// Which instructions may be spelled out. ggml's vendors/hip.h defines __CUDA_ARCH__ for AMD targets too.
#if defined(__HIP_DEVICE_COMPILE__)
#define PYTQ_AMD 1
#elif defined(__CUDA_ARCH__) && !defined(__HIPCC__)
#define PYTQ_PTX 1
#endif

// Instructions v_dot4_i32_i8 (or its successor) and v_dot2_f32_f16.
#if defined(__gfx906__) || defined(__gfx908__) || defined(__gfx90a__) || defined(__gfx942__) || defined(__gfx950__) || \
    defined(__gfx1011__) || defined(__gfx1012__) || defined(__gfx1030__) || defined(__gfx1031__) ||                    \
    defined(__gfx1032__) || defined(__gfx1034__) || defined(__gfx1035__) || defined(__gfx1036__) ||                    \
    defined(__GFX11__) || defined(__GFX12__)
#define PYTQ_AMD_DOT 1
#endif

namespace pytq {

#if defined(__HIPCC__)
// HIP's own __fadd_rn and __fmul_rn may be fused to one rounding, its __fsqrt_rn is the approximate instruction.
PYTQ_DEV float add_rn(float a, float b) {
#pragma clang fp contract(off)
    return a + b;
}
PYTQ_DEV float mul_rn(float a, float b) {
#pragma clang fp contract(off)
    return a * b;
}
PYTQ_DEV float div_rn(float a, float b) {
    return a / b;
}
PYTQ_DEV float sqrt_rn(float a) {
    return sqrtf(a);
}
#define __fadd_rn(a, b) pytq::add_rn(a, b)
#define __fsub_rn(a, b) pytq::add_rn(a, -(b))
#define __fmul_rn(a, b) pytq::mul_rn(a, b)
#define __fdiv_rn(a, b) pytq::div_rn(a, b)
#define __fsqrt_rn(a)   pytq::sqrt_rn(a)
#endif

// Lanes of a group of 32, whatever the hardware's wave holds: a wave of 64 is two such groups.
#if defined(__HIPCC__)
template <class X> PYTQ_DEV X group_xor(X x, int mask) {
    return __shfl_xor(x, mask, 32);
}
PYTQ_DEV uint32_t group_ballot(bool b) {
    return (uint32_t) (__ballot(b) >> (__lane_id() & 32));
}
#else
template <class X> PYTQ_DEV X group_xor(X x, int mask) {
    return __shfl_xor_sync(0xffffffffu, x, mask, 32);
}
PYTQ_DEV uint32_t group_ballot(bool b) {
    return __ballot_sync(0xffffffffu, b);
}
#endif

enum : int {
#define PYTQ_FAMILY(name, index, code, scale) code_of_##name = PYTQ_CODE_##code,
#include "../types.def"
};

// Layout of one type, passed by value to kernels that take every type.
struct layout {
    int d, code, scale_bytes, n_groups, n_planes, block_bytes;
    int group_end[3], group_bits[3];
    int plane_off[5], plane_len[5];
};

inline layout layout_of(const pytq_type_info * t) {
    layout l = {};
    l.d = t->head_dim, l.code = t->code, l.scale_bytes = t->scale, l.n_groups = t->n_groups, l.n_planes = t->n_planes,
    l.block_bytes = t->block_bytes;
    for (int g = 0, at = 0; g < PYTQ_MAX_GROUPS; g++) {
        at += t->group_len[g];
        l.group_end[g] = at, l.group_bits[g] = t->group_bits[g];
    }
    for (int p = 0; p < PYTQ_MAX_PLANES; p++) {
        l.plane_off[p] = t->plane_off[p], l.plane_len[p] = t->plane_len[p];
    }
    return l;
}

template <int ID> struct type; // only the rows of types.def exist

#define PYTQ_TYPE(name, slot, hd, n0, b0, n1, b1, n2, b2)                                                              \
    template <> struct type<PYTQ_TYPE_BASE + PYTQ_FAMILY_STRIDE * PYTQ_FAMILY_INDEX_##name + (slot)> {                 \
        static constexpr int d = hd, code = code_of_##name, scale_bytes = PYTQ_SCALE_BYTES_##name;                     \
        static constexpr int n_groups = PYTQ_NG(n1, n2), bits = b0;                                                    \
        static constexpr int data_off = n_groups * scale_bytes;                                                        \
        static constexpr int block_bytes = PYTQ_BLOCK_BYTES(scale_bytes, n0, b0, n1, b1, n2, b2);                      \
        template <int G> static constexpr int group_len = G == 0 ? n0 : G == 1 ? n1 : n2;                              \
        template <int G> static constexpr int group_bits = G == 0 ? b0 : G == 1 ? b1 : b2;                             \
        template <int P> static constexpr int plane_len = (b0 > P ? n0 : 0) + (b1 > P ? n1 : 0) + (b2 > P ? n2 : 0);   \
    };
#include "../types.def"

// Codebook of a code and a number of bits as constant expressions.
template <int CODE, int BITS> struct book;

#define PYTQ_CODEBOOK(code_, bits_, n_, step_, ...)                                                                    \
    template <> struct book<PYTQ_CODE_##code_, bits_> {                                                                \
        static constexpr int n_levels = n_;                                                                            \
        PYTQ_HD static constexpr float step() { return (float) (step_); }                                              \
        PYTQ_HD static constexpr int entry(int i) {                                                                    \
            constexpr int8_t table[] = {__VA_ARGS__};                                                                  \
            return i < n_ ? table[i] : 0;                                                                              \
        }                                                                                                              \
        /* four consecutive levels, lowest in the low byte; a constant even where the compiler would not fold entry()  \
         */                                                                                                            \
        template <int W>                                                                                               \
        static constexpr uint32_t word =                                                                               \
            (uint32_t) (uint8_t) entry(4 * W) | (uint32_t) (uint8_t) entry(4 * W + 1) << 8 |                           \
            (uint32_t) (uint8_t) entry(4 * W + 2) << 16 | (uint32_t) (uint8_t) entry(4 * W + 3) << 24;                 \
        PYTQ_HD static constexpr int level(int i) { return (int8_t) (pick<0>(i / 4) >> (8 * (i & 3))); }               \
        template <int W> PYTQ_HD static constexpr uint32_t pick(int w) {                                               \
            if constexpr (4 * W + 4 < n_) {                                                                            \
                return w == W ? word<W> : pick<W + 1>(w);                                                              \
            } else {                                                                                                   \
                return word<W>;                                                                                        \
            }                                                                                                          \
        }                                                                                                              \
    };
#include "../codebooks.def"

// Bits of a level index: the trellis code's table has twice as many levels as the stored bits address.
PYTQ_HD constexpr int index_bits(int code, int bits) {
    return code == PYTQ_CODE_TRELLIS ? bits + 1 : bits;
}

// ------------------------------------------------------------------------------------------------ bits and bytes

// Byte i of the result is byte (sel >> 4 i) & 7 of b:a. Bit 3 of each selector must be 0.
PYTQ_DEV uint32_t permute(uint32_t a, uint32_t b, uint32_t sel) {
#if defined(PYTQ_PTX)
    uint32_t r;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(sel));
    return r;
#elif defined(PYTQ_AMD)
    const uint32_t s = (sel & 7u) | (sel & 0x70u) << 4 | (sel & 0x700u) << 8 | (sel & 0x7000u) << 12;
    return __builtin_amdgcn_perm(b, a, s);
#else
    const uint64_t v = (uint64_t) b << 32 | a;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        r |= (uint32_t) (v >> (8 * (sel >> (4 * i) & 7u)) & 255u) << (8 * i);
    }
    return r;
#endif
}

// Bits of a where m has ones, bits of b elsewhere: one three-input operation.
PYTQ_DEV uint32_t blend(uint32_t m, uint32_t a, uint32_t b) {
#if defined(PYTQ_PTX)
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xca;" : "=r"(r) : "r"(m), "r"(a), "r"(b));
    return r;
#else
    return (a & m) | (b & ~m);
#endif
}

PYTQ_DEV uint32_t xor3(uint32_t a, uint32_t b, uint32_t c) {
#if defined(PYTQ_PTX)
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
    return r;
#else
    return a ^ b ^ c;
#endif
}

// A constant that the compiler keeps in a register instead of moving it from a uniform register before every use. On
// AMD a scalar register, filled where it is asked for: hoisted out of loops, the tables of all types would spill.
PYTQ_DEV uint32_t in_register(uint32_t c) {
#if defined(PYTQ_PTX)
    uint32_t r;
    asm volatile("mov.u32 %0, %1;" : "=r"(r) : "r"(c));
    return r;
#elif defined(PYTQ_AMD) && defined(__AMDGCN__)
    uint32_t r;
    asm volatile("s_mov_b32 %0, %1" : "=s"(r) : "i"(c));
    return r;
#else
    return c;
#endif
}

// x, of which the compiler no longer knows where it came from: what is computed from it stays where it is written.
PYTQ_DEV uint32_t opaque(uint32_t x) {
#if defined(PYTQ_PTX)
    asm volatile("" : "+r"(x));
#elif defined(PYTQ_AMD) && defined(__AMDGCN__)
    asm volatile("" : "+v"(x));
#endif
    return x;
}

// Low 32 bits of hi:lo >> s, 0 <= s < 32; in kernels that are CUDA's alone s counts modulo 32.
PYTQ_DEV uint32_t shift_pair(uint32_t lo, uint32_t hi, uint32_t s) {
#if defined(PYTQ_PTX)
    return __funnelshift_r(lo, hi, s);
#elif defined(PYTQ_AMD)
    return (uint32_t) (((uint64_t) hi << 32 | lo) >> s);
#else
    return (uint32_t) (((uint64_t) hi << 32 | lo) >> (s & 31u));
#endif
}

PYTQ_DEV float half_bits(uint32_t h) {
    __half_raw r;
    r.x = (unsigned short) h;
    return __half2float(__half(r));
}

// Byte i of the result is byte (byte i of sel) & 7 of b:a; the other bits of sel must be 0. One instruction on AMD.
PYTQ_DEV uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t sel) {
#if defined(PYTQ_AMD)
    return __builtin_amdgcn_perm(b, a, sel);
#else
    const uint32_t pair = sel | sel >> 4;
    return permute(a, b, (pair & 0xffu) | (pair >> 8 & 0xff00u));
#endif
}

// acc + the dot product of four signed bytes.
PYTQ_DEV int dot4(uint32_t a, uint32_t b, int acc) {
#if defined(PYTQ_PTX)
    return __dp4a((int) a, (int) b, acc);
#elif defined(PYTQ_AMD) && (defined(__GFX11__) || defined(__GFX12__))
    return __builtin_amdgcn_sudot4(true, (int) a, true, (int) b, acc, false);
#elif defined(PYTQ_AMD) && defined(PYTQ_AMD_DOT)
    return __builtin_amdgcn_sdot4((int) a, (int) b, acc, false);
#else
    for (int i = 0; i < 4; i++) {
        acc += (int) (int8_t) (a >> (8 * i)) * (int) (int8_t) (b >> (8 * i));
    }
    return acc;
#endif
}

// acc + the dot product of two pairs of halves, summed in float32.
PYTQ_DEV float dot2(uint32_t a, uint32_t b, float acc) {
#if defined(__AMDGCN__) && defined(PYTQ_AMD_DOT)
    typedef _Float16 pair __attribute__((ext_vector_type(2)));
    union {
        uint32_t u;
        pair h;
    } x = {a}, y = {b};
    return __builtin_amdgcn_fdot2(x.h, y.h, acc, false);
#else
    acc = fmaf(half_bits(a & 0xffffu), half_bits(b & 0xffffu), acc);
    return fmaf(half_bits(a >> 16), half_bits(b >> 16), acc);
#endif
}

// Two halves at once: bytes of x + 128 (so 0..255) at positions s and s + 1 as halves of x.
PYTQ_DEV uint32_t bytes_to_halves(uint32_t x, uint32_t sel) {
    union {
        uint32_t u;
        __half2 h;
    } v;
    v.u = permute_bytes(x, 0x64646464u, sel); // 1024 + 128 + level
    v.h = __hadd2(v.h, __float2half2_rn(-1152.0f));
    return v.u;
}

// A word that no kernel in flight writes, at an address that is the same for all lanes: a scalar load on AMD.
PYTQ_DEV uint32_t uniform_word(const uint32_t * at) {
#if defined(PYTQ_AMD) && defined(__AMDGCN__)
    return *(const __attribute__((address_space(4))) uint32_t *) (uintptr_t) at;
#else
    return *at;
#endif
}

// Programmatic dependent launch (upstream launches every kernel so where it can): wait until the kernels before this
// one have finished and their results are visible; let the next kernel be launched. A kernel that was launched plainly,
// or for an older device, waits for nothing.
PYTQ_DEV void grid_wait() {
#if defined(PYTQ_PTX) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
PYTQ_DEV void grid_trigger() {
#if defined(PYTQ_PTX) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}

PYTQ_DEV uint32_t as_uint(float x) {
    union {
        float f;
        uint32_t u;
    } v = {x};
    return v.u;
}

PYTQ_DEV float as_float(uint32_t x) {
    union {
        uint32_t u;
        float f;
    } v = {x};
    return v.f;
}

// 2^((e - 136) / 8), 0 for e = 0: the eighth root's powers go to the mantissa, the rest is the exponent.
PYTQ_DEV float log8_scale(uint32_t e) {
    // selects of literals: an indexed table would go to local memory
    const bool b0 = e & 1u, b1 = e & 2u, b2 = e & 4u;
    const uint32_t lo = b1 ? (b0 ? 0x25fed7u : 0x1837f0u) : (b0 ? 0x0b95c2u : 0u);
    const uint32_t hi = b1 ? (b0 ? 0x6ac0c7u : 0x5744fdu) : (b0 ? 0x45672au : 0x3504f3u);
    const uint32_t m = b2 ? hi : lo;
    return e == 0 ? 0.0f : as_float(((e >> 3) + 127 - PYTQ_LOG8_BIAS / 8) << 23 | m);
}

// ------------------------------------------------------------------------------------------------ bit planes -> levels

// Three index planes -> selectors: nibble n of w[k] is the index of coordinate 4 n + k. Missing planes are passed as 0.
PYTQ_DEV void selectors(uint32_t a, uint32_t b, uint32_t c, uint32_t w[4]) {
    const uint32_t m1 = 0x55555555u, m2 = 0x33333333u;
    const uint32_t a1 = blend(m1, a, b << 1), b1 = blend(m1, a >> 1, b);
    const uint32_t c1 = c & m1, d1 = (c >> 1) & m1;
    w[0] = blend(m2, a1, c1 << 2);
    w[1] = blend(m2, b1, d1 << 2);
    w[2] = blend(m2, a1 >> 2, c1);
    w[3] = blend(m2, b1 >> 2, d1);
}

// Nibble n of the result: n & 3, plus 4 where the plane has a 1 at coordinate 4 n + k (selects the upper of two
// look-ups).
template <int K> PYTQ_DEV uint32_t merge_selector(uint32_t plane) {
    const uint32_t s = K < 2 ? plane << (2 - K) : plane >> (K - 2);
    return blend(0x44444444u, s, 0x32103210u);
}

// Half of a level table in registers (a permute takes one operand as a literal): word 2 i of each 8 levels.
template <int CODE, int BITS> struct level_table {
    using B = book<CODE, BITS>;
    static constexpr int N = B::n_levels > 8 ? B::n_levels / 8 : 1;
    uint32_t even[N];
    PYTQ_DEV void init() { fill<0>(); }
    template <int I> PYTQ_DEV void fill() {
        even[I] = in_register(B::template word<2 * I>);
        if constexpr (I + 1 < N) {
            fill<I + 1>();
        }
    }
};

// Levels of four values from the first 2^NB of a table from BASE on. sel: 3-bit indices; m[]: merge selectors of the
// index bits 3, 4, 5.
template <int NB, int BASE, class TABLE> PYTQ_DEV uint32_t lookup(const TABLE & tab, uint32_t sel, const uint32_t * m) {
    if constexpr (NB <= 3) {
        return permute(tab.even[BASE / 8], TABLE::B::template word<BASE / 4 + 1>, sel);
    } else {
        const uint32_t lo = lookup<NB - 1, BASE>(tab, sel, m);
        const uint32_t hi = lookup<NB - 1, BASE + (1 << (NB - 1))>(tab, sel, m);
        return permute(lo, hi, m[NB - 4]);
    }
}

// Levels for one selector word: out[0] holds coordinates 4 n + K for n = 0..3, out[1] for n = 4..7.
template <int CODE, int BITS, int K>
PYTQ_DEV void lookup8(const level_table<CODE, BITS> & tab, uint32_t w, const uint32_t * index, uint32_t out[2]) {
    constexpr int NB = index_bits(CODE, BITS);
    uint32_t m[3], mh[3];
#pragma unroll
    for (int b = 3; b < NB; b++) {
        m[b - 3] = merge_selector<K>(index[b]);
        mh[b - 3] = m[b - 3] >> 16;
    }
    out[0] = lookup<NB, 0>(tab, w, m);
    out[1] = lookup<NB, 0>(tab, w >> 16, mh);
}

// Levels of 32 values given by index planes: out[2 k + h] holds coordinates 4 n + k, n = 4 h .. 4 h + 3.
template <int CODE, int BITS>
PYTQ_DEV void levels32(const level_table<CODE, BITS> & tab, const uint32_t * index, uint32_t out[8]) {
    constexpr int NB = index_bits(CODE, BITS);
    uint32_t w[4];
    selectors(index[0], NB > 1 ? index[1] : 0u, NB > 2 ? index[2] : 0u, w);
    lookup8<CODE, BITS, 0>(tab, w[0], index, out + 0);
    lookup8<CODE, BITS, 1>(tab, w[1], index, out + 2);
    lookup8<CODE, BITS, 2>(tab, w[2], index, out + 4);
    lookup8<CODE, BITS, 3>(tab, w[3], index, out + 6);
}

// Stored planes of 32 coordinates -> index planes. prev: the 32 coded bits before these (0 at the start of a block);
// without HISTORY they count as 0.
template <int CODE, int BITS, bool HISTORY>
PYTQ_DEV void index_planes(const uint32_t * plane, uint32_t prev, uint32_t * index) {
    if constexpr (CODE == PYTQ_CODE_TRELLIS) {
        const uint32_t u = plane[0];
        if constexpr (HISTORY) {
            index[1] = xor3(u, shift_pair(prev, u, 32 - 5), shift_pair(prev, u, 32 - 6));
            index[0] = shift_pair(prev, u, 32 - 2) ^ shift_pair(prev, u, 32 - 4);
        } else {
            index[1] = xor3(u, u << 5, u << 6);
            index[0] = u << 2 ^ u << 4;
        }
#pragma unroll
        for (int p = 1; p < BITS; p++) {
            index[p + 1] = plane[p];
        }
    } else {
#pragma unroll
        for (int p = 0; p < BITS; p++) {
            index[p] = plane[p];
        }
    }
}

} // namespace pytq

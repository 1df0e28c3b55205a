// NEON tier: Armv8.2 with the dot product instructions (Cortex-A76, Neoverse N1, Apple M1 and later).
//
//   block -> 16 index bytes at a time: two bytes of each plane, tst with 1 2 4 .. 128; z1 z0 by shifts of 64-bit words
//         -> levels by tbl on 1, 2 or 4 registers (16, 32, 64 levels), bytes in natural order
//   K: 4x4 transpose of dwords over 4 tokens (zip)     -> lane = token, 4 coordinates
//   V: byte transpose of 4 tokens (zip 8, zip 16)      -> lane = coordinate, 4 tokens
//   both: sdot against a broadcast dword of q or weights, in two terms (value = 256 high + low, both signed)
//
//   instruction     multiply-adds   per cycle (Neoverse N1)
//   sdot 4s, 16b    16              2
//   smlal (16 bit)  4               1
//
// Why sdot in two terms: 15-bit weights at 8 multiply-adds per instruction, twice what smlal gives. i8mm's smmla would
// need pairs of query rows and another layout; not written.
#include "tiers.h"

#if defined(__aarch64__)

#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif
#include <arm_neon.h>

union vf_quarters { // a 64-byte vector as four registers
    float v __attribute__((vector_size(64)));
    float32x4_t q[4];
};
#define PYTQ_FMA(a, b, c) fma16({a}, {b}, {c})
static inline __attribute__((always_inline)) auto fma16(vf_quarters a, vf_quarters b, vf_quarters c) {
    for (int i = 0; i < 4; i++) {
        c.q[i] = vfmaq_f32(c.q[i], a.q[i], b.q[i]);
    }
    return c.v;
}

#include "tile.inl"

namespace {

struct Lanes {
    static constexpr int N = 4, decision_bits = 1, bytes = 16;
    typedef float32x4_t f;
    struct alignas(16) index {
        uint8_t i[16];
    };
    static void set_index(index & to, int lane, int subset) {
        for (int b = 0; b < 4; b++) {
            to.i[4 * lane + b] = (uint8_t) (4 * subset + b);
        }
    }
    static f load(const float * p) { return vld1q_f32(p); }
    static void store(float * p, f v) { vst1q_f32(p, v); }
    static f broadcast4(const float * p) { return vld1q_f32(p); }
    static f pick(f cost, const index & i) {
        return vreinterpretq_f32_u8(vqtbl1q_u8(vreinterpretq_u8_f32(cost), vld1q_u8(i.i)));
    }
    static f add(f a, f b) { return vaddq_f32(a, b); }
    static f min(f a, f b) { return vminq_f32(a, b); }
    template <int B> static f swap(f v) { return B == 1 ? vextq_f32(v, v, 2) : vrev64q_f32(v); }
    // byte 0xff where the branch from the state with the older bit 1 is strictly better; see the AVX2 tier
    template <int B> static void decide(uint8_t * to, int r, f a, f b) {
        uint32x4_t k = vcltq_f32(a, b);
        if (B >= 0) {
            static const uint32_t ones[2][4] = {{0, ~0u, 0, ~0u}, {0, 0, ~0u, ~0u}};
            k = vbslq_u32(vld1q_u32(ones[B > 0]), vcltq_f32(b, a), k);
        }
        const uint16x4_t h = vmovn_u32(k);
        const uint8x8_t v = vmovn_u16(vcombine_u16(h, h));
        vst1_lane_u32((uint32_t *) (void *) (to + 4 * r), vreinterpret_u32_u8(v), 0);
    }
    static unsigned decision(const uint8_t * d, unsigned loc) { return d[loc] & 1u; }
    static float float_of(uint16_t h) { return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h))), 0); }
    static uint16_t half_of(float x) {
        if (!(x < 65504.0f)) {
            return 0x7bff;
        }
        const float16x4_t h = vcvt_f16_f32(vdupq_n_f32(x));
        return vget_lane_u16(vreinterpret_u16_f16(h), 0);
    }
    static inline __attribute__((always_inline)) uint8x16_t expand(const uint64_t * row, int n_rows, int at) {
        static const uint8_t bit[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
        const uint8x16_t bits = vld1q_u8(bit);
        uint8x16_t index = vdupq_n_u8(0);
        for (int k = 0; k < n_rows; k++) {
            const uint64_t w = row[k] >> at;
            const uint8x16_t v = vcombine_u8(vdup_n_u8((uint8_t) w), vdup_n_u8((uint8_t) (w >> 8)));
            index = vorrq_u8(index, vandq_u8(vtstq_u8(v, bits), vdupq_n_u8((uint8_t) (1 << k))));
        }
        return index;
    }
    static inline __attribute__((always_inline)) void look_up(uint8x16_t index, const int8_t * table, int bits,
                                                              int8_t * out, int base, int skip) {
        int8x16_t v;
        if (bits <= 4) {
            v = vqtbl1q_s8(vld1q_s8(table), index);
        } else if (bits == 5) {
            v = vqtbl2q_s8(vld1q_s8_x2(table), index);
        } else {
            v = vqtbl4q_s8(vld1q_s8_x4(table), index);
        }
        if (skip == 0) {
            vst1q_s8(out + base, v);
        } else {
            int8_t tmp[16];
            vst1q_s8(tmp, v);
            memcpy(out + base + skip, tmp + skip, (size_t) (16 - skip));
        }
    }
};

} // namespace

#include "encode.inl"

namespace {

template <int NR, int NL>
PYTQ_INLINE void dot(const int8_t * hi, const int8_t * lo, size_t row_bytes, const int8_t * x, size_t x_step, int quads,
                     int32x4_t (*acc)[NL]) {
    int32x4_t high[NR][NL], low[NR][NL];
    for (int r = 0; r < NR; r++) {
        for (int j = 0; j < NL; j++) {
            high[r][j] = low[r][j] = vdupq_n_s32(0);
        }
    }
    for (int k = 0; k < quads; k++) {
        int8x16_t xv[NL];
        for (int j = 0; j < NL; j++) {
            xv[j] = vld1q_s8(x + (size_t) j * x_step + (size_t) k * 16);
        }
        for (int r = 0; r < NR; r++) {
            int32_t h, l;
            memcpy(&h, hi + (size_t) r * row_bytes + 4 * k, 4);
            memcpy(&l, lo + (size_t) r * row_bytes + 4 * k, 4);
            const int8x16_t hv = vreinterpretq_s8_s32(vdupq_n_s32(h)), lv = vreinterpretq_s8_s32(vdupq_n_s32(l));
            for (int j = 0; j < NL; j++) {
                high[r][j] = vdotq_s32(high[r][j], xv[j], hv);
                low[r][j] = vdotq_s32(low[r][j], xv[j], lv);
            }
        }
    }
    for (int r = 0; r < NR; r++) {
        for (int j = 0; j < NL; j++) {
            acc[r][j] = vaddq_s32(vshlq_n_s32(high[r][j], 8), low[r][j]);
        }
    }
}

template <int NR>
void qk_rows(const pytq_type_info * t, const int8_t * a, size_t a_row, const float * q_scale, int n, const int8_t * x,
             const float * k_scale, float * s) {
    const int d = t->head_dim;
    const size_t block = (size_t) d * 4;
    for (int j = 0; j < n; j += 8) {
        float32x4_t sum[NR][2];
        for (int g = 0, at = 0; g < t->n_groups; at += t->group_len[g++]) {
            int32x4_t acc[NR][2];
            dot<NR, 2>(a + at, a + d + at, a_row, x + (size_t) j / 4 * block + (size_t) at * 4, block,
                       t->group_len[g] / 4, acc);
            for (int i = 0; i < 2; i++) {
                const float32x4_t ks = vld1q_f32(k_scale + g * T + j + 4 * i);
                for (int r = 0; r < NR; r++) {
                    const float32x4_t v = vcvtq_f32_s32(acc[r][i]);
                    sum[r][i] = g == 0 ? vmulq_f32(v, ks) : vfmaq_f32(sum[r][i], v, ks);
                }
            }
        }
        for (int r = 0; r < NR; r++) {
            vst1q_f32(s + r * T + j, vmulq_n_f32(sum[r][0], q_scale[r]));
            vst1q_f32(s + r * T + j + 4, vmulq_n_f32(sum[r][1], q_scale[r]));
        }
    }
}

template <int NR>
void pv_rows(const uint8_t * w, int quads, const int8_t * x, int width, const float * corr, const float * f,
             float * o) {
    for (int c = 0; c < width; c += 8) {
        int32x4_t acc[NR][2];
        dot<NR, 2>((const int8_t *) w, (const int8_t *) w + T, 4 * T, x + (size_t) c * T, T * 4, quads, acc);
        for (int r = 0; r < NR; r++) {
            for (int i = 0; i < 2; i++) {
                float * const to = o + (size_t) r * width + c + 4 * i;
                vst1q_f32(to, vfmaq_n_f32(vmulq_n_f32(vld1q_f32(to), corr[r]), vcvtq_f32_s32(acc[r][i]), f[r]));
            }
        }
    }
}

struct Tier {
    static void dequantize(const pytq_type_info * t, const void * y, float * x, int64_t n) { decode(t, y, x, n); }
    static vf exp(vf x) { return exp_neg(x); }
    static vf halves(const uint16_t * p) {
        float v[16];
        for (int i = 0; i < 16; i += 4) {
            vst1q_f32(v + i, vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + i))));
        }
        return load(v);
    }
    static vf maximum(vf a, vf b) { return a > b ? a : b; }
    static float max16(vf v) { return hmax(v); }
    static float sum16(vf v) { return hsum(v); }
    static mask_state mask_of(const uint16_t * m, int n, int * seen) { return classify(m, n, seen); }
    static vf fwht16(vf x) {
        static const float s1[4] = {1, -1, 1, -1}, s2[4] = {1, 1, -1, -1};
        const float32x4_t v1 = vld1q_f32(s1), v2 = vld1q_f32(s2);
        vf_quarters a;
        a.v = x;
        for (int i = 0; i < 4; i++) {
            const float32x4_t v = vfmaq_f32(vrev64q_f32(a.q[i]), a.q[i], v1);
            a.q[i] = vfmaq_f32(vextq_f32(v, v, 2), v, v2);
        }
        for (int len = 1; len < 4; len *= 2) {
            for (int i = 0; i < 4; i++) {
                if ((i & len) == 0) {
                    const float32x4_t u = a.q[i], w = a.q[i + len];
                    a.q[i] = vaddq_f32(u, w);
                    a.q[i + len] = vsubq_f32(u, w);
                }
            }
        }
        return a.v;
    }
    static bool k_integer(const pytq_type_info *) { return true; }
    static bool v_integer(const pytq_type_info * t) { return t->n_groups == 1; }
    static int v_width(const pytq_type_info * t) { return t->head_dim; }

    static void k_tile(const pytq_type_info * t, const uint8_t * rows, size_t stride, int n, int, uint8_t * x,
                       float * scale) {
        int8_t table[PYTQ_MAX_GROUPS][64], level[4][PYTQ_MAX_HEAD_DIM + 64];
        level_tables(t, table);
        const int d = t->head_dim;
        for (int i0 = 0; i0 < ((n + 15) & ~15); i0 += 4) {
            rows_of_levels(t, table, rows, stride, i0, n, 4, level);
            int8_t * const to = (int8_t *) x + (size_t) i0 * d;
            for (int c = 0; c < d; c += 16) {
                int32x4_t r[4];
                for (int i = 0; i < 4; i++) {
                    r[i] = vreinterpretq_s32_s8(vld1q_s8(level[i] + c));
                }
                const int32x4x2_t a = vzipq_s32(r[0], r[2]), b = vzipq_s32(r[1], r[3]);
                const int32x4x2_t lo = vzipq_s32(a.val[0], b.val[0]), hi = vzipq_s32(a.val[1], b.val[1]);
                vst1q_s8(to + 4 * c, vreinterpretq_s8_s32(lo.val[0]));
                vst1q_s8(to + 4 * c + 16, vreinterpretq_s8_s32(lo.val[1]));
                vst1q_s8(to + 4 * c + 32, vreinterpretq_s8_s32(hi.val[0]));
                vst1q_s8(to + 4 * c + 48, vreinterpretq_s8_s32(hi.val[1]));
            }
        }
        for (int g = 0; g < t->n_groups; g++) {
            tile_scales(t, g, rows, stride, n, scale + g * T);
        }
    }

    static void v_tile(const pytq_type_info * t, const uint8_t * rows, size_t stride, int n, int, uint8_t * x,
                       float * scale) {
        int8_t table[PYTQ_MAX_GROUPS][64], level[4][PYTQ_MAX_HEAD_DIM + 64];
        level_tables(t, table);
        for (int i0 = 0; i0 < n; i0 += 4) {
            rows_of_levels(t, table, rows, stride, i0, n, 4, level);
            for (int c = 0; c < t->head_dim; c += 16) {
                const int8x16x2_t a = vzipq_s8(vld1q_s8(level[0] + c), vld1q_s8(level[1] + c));
                const int8x16x2_t b = vzipq_s8(vld1q_s8(level[2] + c), vld1q_s8(level[3] + c));
                for (int h = 0; h < 2; h++) {
                    const int16x8x2_t q = vzipq_s16(vreinterpretq_s16_s8(a.val[h]), vreinterpretq_s16_s8(b.val[h]));
                    for (int k = 0; k < 2; k++) { // 4 coordinates each
                        vst1q_s8((int8_t *) x + (size_t) (c / 4 + 2 * h + k) * (T * 4) + (size_t) i0 * 4,
                                 vreinterpretq_s8_s16(q.val[k]));
                    }
                }
            }
        }
        tile_scales(t, 0, rows, stride, n, scale);
    }

    static void split(int32_t v, uint8_t * hi, uint8_t * lo) {
        *hi = (uint8_t) ((v + 128) >> 8);
        *lo = (uint8_t) v;
    }

    static void q_row(const pytq_type_info * t, const float * q, float scale, uint8_t * a, float * q_scale, int32_t *) {
        const int d = t->head_dim;
        float m = 0.0f;
        for (int c = 0; c < d; c++) {
            m = fabsf(q[c]) > m ? fabsf(q[c]) : m;
        }
        const float inv = m > 0.0f ? FIXED_MAX / m : 0.0f;
        *q_scale = m / FIXED_MAX * scale;
        for (int c = 0; c < d; c++) {
            split((int32_t) lrintf(q[c] * inv), a + c, a + d + c);
        }
    }

    static void qk(const pytq_type_info * t, const uint8_t * a, size_t a_row, const float * q_scale, const int32_t *,
                   int nr, int n, const uint8_t * x, const float * k_scale, float * s) {
        int r = 0;
        for (; r + 4 <= nr; r += 4) {
            qk_rows<4>(t, (const int8_t *) a + r * a_row, a_row, q_scale + r, n, (const int8_t *) x, k_scale,
                       s + r * T);
        }
        for (; r < nr; r++) {
            qk_rows<1>(t, (const int8_t *) a + r * a_row, a_row, q_scale + r, n, (const int8_t *) x, k_scale,
                       s + r * T);
        }
    }

    static void store_weights(uint8_t * w, int j, vf v) {
        float tmp[16];
        store(tmp, v);
        for (int i = 0; i < 16; i += 8) {
            const int16x8_t a = vcombine_s16(vmovn_s32(vcvtnq_s32_f32(vld1q_f32(tmp + i))),
                                             vmovn_s32(vcvtnq_s32_f32(vld1q_f32(tmp + i + 4))));
            vst1_s8((int8_t *) w + j + i, vshrn_n_s16(vaddq_s16(a, vdupq_n_s16(128)), 8));
            vst1_s8((int8_t *) w + T + j + i, vmovn_s16(a));
        }
    }

    static void pv(const pytq_type_info * t, const uint8_t * w, int nr, int n, const uint8_t * x, const float * corr,
                   const float * f, float * o) {
        const int width = t->head_dim, quads = (n + 3) / 4;
        int r = 0;
        for (; r + 4 <= nr; r += 4) {
            pv_rows<4>(w + r * 4 * T, quads, (const int8_t *) x, width, corr + r, f + r, o + (size_t) r * width);
        }
        for (; r < nr; r++) {
            pv_rows<1>(w + r * 4 * T, quads, (const int8_t *) x, width, corr + r, f + r, o + (size_t) r * width);
        }
    }

    static void natural_order(const pytq_type_info *, const float * o, int dv, float * out) {
        memcpy(out, o, (size_t) dv * sizeof(float));
    }
};

const pytq_cpu_tier_row row = {"neon", PYTQ_CAP_NEON, encode, decode, run_item<Tier>, run_merge<Tier>, run_fwht<Tier>};

} // namespace

extern "C" {
const pytq_cpu_tier_row * const pytq_tier_neon = &row;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

extern "C" {
const pytq_cpu_tier_row * const pytq_tier_neon = nullptr;
}

#endif

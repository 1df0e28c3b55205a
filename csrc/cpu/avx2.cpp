// AVX2 tier: Haswell, Zen and later (AVX2, FMA, F16C).
//
//   block -> 32 index bytes at a time: broadcast word, pshufb, and, cmpeq per plane; z1 z0 by shifts of 64-bit words
//         -> levels by 1, 2 or 4 pshufb (16, 32, 64 levels), bytes in natural order
//   K: 8x8 transpose of level pairs over 8 tokens, vpmovsxbw  -> lane = token, 2 coordinates as int16
//   V: punpcklbw of two tokens, vpmovsxbw                     -> lane = coordinate, 2 tokens as int16
//   both: vpmaddwd + vpaddd against a broadcast pair of q or weights (15 bits and a sign)
//
//   instruction          multiply-adds   per cycle (Haswell / Zen 3)
//   vpmaddwd ymm         16              1 / 2
//   vpmaddubsw ymm       32              1 / 2, but saturates at 16 bits and needs a second term and a widening add
//
// Why int16: one vpmaddwd holds 15-bit weights exactly; the same precision by vpmaddubsw takes six instructions per 32
// multiply-adds in place of four.
#include "tiers.h"

#if defined(__x86_64__)

#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#include <immintrin.h>

union vf_halves { // a 64-byte vector as two registers
    float v __attribute__((vector_size(64)));
    __m256 h[2];
};
#define PYTQ_FMA(a, b, c) fma16({a}, {b}, {c})
static inline __attribute__((always_inline)) auto fma16(vf_halves a, vf_halves b, vf_halves c) {
    a.h[0] = _mm256_fmadd_ps(a.h[0], b.h[0], c.h[0]);
    a.h[1] = _mm256_fmadd_ps(a.h[1], b.h[1], c.h[1]);
    return a.v;
}

#include "tile.inl"

namespace {

typedef __m256i yi;

struct Lanes {
    static constexpr int N = 8, decision_bits = 8, bytes = 32;
    typedef __m256 f;
    struct alignas(32) index {
        int32_t i[8];
    };
    static void set_index(index & to, int lane, int subset) { to.i[lane] = subset; }
    static f load(const float * p) { return _mm256_load_ps(p); }
    static void store(float * p, f v) { _mm256_store_ps(p, v); }
    static f broadcast4(const float * p) { return _mm256_broadcast_ps((const __m128 *) p); }
    static f pick(f cost, const index & i) { return _mm256_permutevar_ps(cost, _mm256_load_si256((const yi *) i.i)); }
    static f add(f a, f b) { return _mm256_add_ps(a, b); }
    static f min(f a, f b) { return _mm256_min_ps(a, b); }
    template <int B> static f swap(f v) {
        return B == 2   ? _mm256_permute2f128_ps(v, v, 1)
               : B == 1 ? _mm256_permute_ps(v, 0x4e)
                        : _mm256_permute_ps(v, 0xb1);
    }
    // bit set where the branch from the state with the older bit 1 is strictly better; in-register pairs (B >= 0) hold
    // it in `a` where location bit B is 0 and in `b` where it is 1
    template <int B> static void decide(uint8_t * to, int r, f a, f b) {
        const unsigned k = (unsigned) _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_LT_OQ));
        if (B < 0) {
            to[r] = (uint8_t) k;
        } else {
            constexpr unsigned ones = B == 2 ? 0xf0 : B == 1 ? 0xcc : 0xaa;
            to[r] = (uint8_t) ((k & ~ones) | ((unsigned) _mm256_movemask_ps(_mm256_cmp_ps(b, a, _CMP_LT_OQ)) & ones));
        }
    }
    static unsigned decision(const uint8_t * d, unsigned loc) { return d[loc >> 3] >> (loc & 7) & 1u; }
    static float float_of(uint16_t h) { return _cvtsh_ss(h); }
    static uint16_t half_of(float x) {
        return x < 65504.0f ? (uint16_t) _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT) : (uint16_t) 0x7bff;
    }

    static inline __attribute__((always_inline)) yi expand(const uint64_t * row, int n_rows, int at) {
        const yi spread = _mm256_setr_epi8(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3, 3,
                                           3, 3, 3, 3, 3, 3);
        const yi bit = _mm256_set1_epi64x((long long) 0x8040201008040201ull);
        yi index = _mm256_setzero_si256();
        for (int k = 0; k < n_rows; k++) {
            const yi w = _mm256_shuffle_epi8(_mm256_set1_epi32((int) (row[k] >> at)), spread);
            const yi on = _mm256_cmpeq_epi8(_mm256_and_si256(w, bit), bit);
            index = _mm256_or_si256(index, _mm256_and_si256(on, _mm256_set1_epi8((char) (1 << k))));
        }
        return index;
    }
    static inline __attribute__((always_inline)) void look_up(yi index, const int8_t * table, int bits, int8_t * out,
                                                              int base, int skip) {
        const yi low = _mm256_and_si256(index, _mm256_set1_epi8(15));
#define PYTQ_PART(i)                                                                                                   \
    _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i *) (table + 16 * (i)))), low)
        yi v = PYTQ_PART(0);
        if (bits > 4) {
            const yi b4 = _mm256_slli_epi16(index, 3), b5 = _mm256_slli_epi16(index, 2);
            v = _mm256_blendv_epi8(v, PYTQ_PART(1), b4);
            if (bits > 5) {
                v = _mm256_blendv_epi8(v, _mm256_blendv_epi8(PYTQ_PART(2), PYTQ_PART(3), b4), b5);
            }
        }
        if (skip == 0) {
            _mm256_storeu_si256((yi *) (out + base), v);
        } else {
            int8_t tmp[32];
            _mm256_storeu_si256((yi *) tmp, v);
            memcpy(out + base + skip, tmp + skip, (size_t) (32 - skip));
        }
    }
};

} // namespace

#include "encode.inl"

namespace {

template <int NR, int NL>
PYTQ_INLINE void dot(const int16_t * a, size_t lda, const uint8_t * x, size_t x_step, int pairs, yi (*acc)[NL]) {
    for (int r = 0; r < NR; r++) {
        for (int j = 0; j < NL; j++) {
            acc[r][j] = _mm256_setzero_si256();
        }
    }
    for (int k = 0; k < pairs; k++) {
        yi xv[NL];
        for (int j = 0; j < NL; j++) {
            xv[j] = _mm256_load_si256((const yi *) (x + (size_t) j * x_step + (size_t) k * 32));
        }
        for (int r = 0; r < NR; r++) {
            int32_t pair;
            memcpy(&pair, a + (size_t) r * lda + 2 * k, 4);
            const yi b = _mm256_set1_epi32(pair);
            for (int j = 0; j < NL; j++) {
                acc[r][j] = _mm256_add_epi32(acc[r][j], _mm256_madd_epi16(xv[j], b));
            }
        }
    }
}

template <int NR>
void qk_rows(const pytq_type_info * t, const int16_t * a, size_t lda, const float * q_scale, int n, const uint8_t * x,
             const float * k_scale, float * s) {
    const int d = t->head_dim;
    const size_t block = (size_t) d * 16;
    for (int j = 0; j < n; j += 16) {
        __m256 sum[NR][2] = {};
        for (int g = 0, at = 0; g < t->n_groups; at += t->group_len[g++]) {
            yi acc[NR][2];
            dot<NR, 2>(a + at, lda, x + (size_t) j / 8 * block + (size_t) at * 16, block, t->group_len[g] / 2, acc);
            for (int i = 0; i < 2; i++) {
                const __m256 ks = _mm256_load_ps(k_scale + g * T + j + 8 * i);
                for (int r = 0; r < NR; r++) {
                    const __m256 v = _mm256_cvtepi32_ps(acc[r][i]);
                    sum[r][i] = g == 0 ? _mm256_mul_ps(v, ks) : _mm256_fmadd_ps(v, ks, sum[r][i]);
                }
            }
        }
        for (int r = 0; r < NR; r++) {
            const __m256 qs = _mm256_set1_ps(q_scale[r]);
            _mm256_store_ps(s + r * T + j, _mm256_mul_ps(sum[r][0], qs));
            _mm256_store_ps(s + r * T + j + 8, _mm256_mul_ps(sum[r][1], qs));
        }
    }
}

template <int NR>
void pv_rows(const int16_t * w, int pairs, const uint8_t * x, int width, const float * corr, const float * f,
             float * o) {
    for (int c = 0; c < width; c += 16) {
        yi acc[NR][2];
        dot<NR, 2>(w, 2 * T, x + (size_t) c * T * 2, T * 16, pairs, acc);
        for (int r = 0; r < NR; r++) {
            for (int i = 0; i < 2; i++) {
                float * const to = o + (size_t) r * width + c + 8 * i;
                const __m256 old = _mm256_mul_ps(_mm256_load_ps(to), _mm256_set1_ps(corr[r]));
                _mm256_store_ps(to, _mm256_fmadd_ps(_mm256_cvtepi32_ps(acc[r][i]), _mm256_set1_ps(f[r]), old));
            }
        }
    }
}

struct Tier {
    static void dequantize(const pytq_type_info * t, const void * y, float * x, int64_t n) { decode(t, y, x, n); }
    static __m256 exp8(__m256 x) {
        const __m256 low = _mm256_set1_ps(-87.0f);
        const __m256 keep = _mm256_cmp_ps(x, low, _CMP_GE_OQ);
        x = _mm256_max_ps(x, low);
        const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                         _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m256 r =
            _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x));
        __m256 p = _mm256_set1_ps(8.3334519073e-3f);
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
        p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f));
        const yi e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
        return _mm256_and_ps(keep, _mm256_mul_ps(p, _mm256_castsi256_ps(e)));
    }
    static vf exp(vf x) {
        vf_halves a;
        a.v = x;
        a.h[0] = exp8(a.h[0]);
        a.h[1] = exp8(a.h[1]);
        return a.v;
    }
    static vf maximum(vf a, vf b) {
        vf_halves x, y;
        x.v = a, y.v = b;
        x.h[0] = _mm256_max_ps(x.h[0], y.h[0]);
        x.h[1] = _mm256_max_ps(x.h[1], y.h[1]);
        return x.v;
    }
    static vf halves(const uint16_t * p) {
        float v[16];
        _mm256_storeu_ps(v, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) p)));
        _mm256_storeu_ps(v + 8, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *) (p + 8))));
        return load(v);
    }
    static float max16(vf v) { return hmax(v); }
    static float sum16(vf v) { return hsum(v); }
    static mask_state mask_of(const uint16_t * m, int n, int * seen) { return classify(m, n, seen); }
    static vf fwht16(vf x) {
        // the sign makes v + other or other - v of one fused operation, exactly
        const __m256 s1 = _mm256_setr_ps(1, -1, 1, -1, 1, -1, 1, -1), s2 = _mm256_setr_ps(1, 1, -1, -1, 1, 1, -1, -1);
        const __m256 s4 = _mm256_setr_ps(1, 1, 1, 1, -1, -1, -1, -1);
        vf_halves a;
        a.v = x;
        for (int i = 0; i < 2; i++) {
            __m256 v = a.h[i];
            v = _mm256_fmadd_ps(v, s1, _mm256_permute_ps(v, 0xb1));
            v = _mm256_fmadd_ps(v, s2, _mm256_permute_ps(v, 0x4e));
            a.h[i] = _mm256_fmadd_ps(v, s4, _mm256_permute2f128_ps(v, v, 1));
        }
        const __m256 u = a.h[0], w = a.h[1];
        a.h[0] = _mm256_add_ps(u, w);
        a.h[1] = _mm256_sub_ps(u, w);
        return a.v;
    }
    static bool k_integer(const pytq_type_info *) { return true; }
    static bool v_integer(const pytq_type_info * t) { return t->n_groups == 1; }
    static int v_width(const pytq_type_info * t) { return t->head_dim; }

    static void k_tile(const pytq_type_info * t, const uint8_t * rows, size_t stride, int n, int, uint8_t * x,
                       float * scale) {
        int8_t table[PYTQ_MAX_GROUPS][64], level[8][PYTQ_MAX_HEAD_DIM + 64];
        level_tables(t, table);
        const int d = t->head_dim;
        for (int i0 = 0; i0 < ((n + 15) & ~15); i0 += 8) {
            rows_of_levels(t, table, rows, stride, i0, n, 8, level);
            uint8_t * const to = x + (size_t) i0 / 8 * d * 16;
            for (int c = 0; c < d; c += 16) {
                __m128i r[8], s[8];
                for (int i = 0; i < 8; i++) {
                    r[i] = _mm_loadu_si128((const __m128i *) (level[i] + c));
                }
                for (int i = 0; i < 4; i++) {
                    s[2 * i] = _mm_unpacklo_epi16(r[2 * i], r[2 * i + 1]);
                    s[2 * i + 1] = _mm_unpackhi_epi16(r[2 * i], r[2 * i + 1]);
                }
                for (int h = 0; h < 2; h++) {
                    // s[h], s[2 + h], s[4 + h], s[6 + h]: pairs 4 h .. 4 h + 3 of tokens 01, 23, 45, 67
                    const __m128i a = _mm_unpacklo_epi32(s[h], s[2 + h]), b = _mm_unpackhi_epi32(s[h], s[2 + h]);
                    const __m128i e = _mm_unpacklo_epi32(s[4 + h], s[6 + h]),
                                  f = _mm_unpackhi_epi32(s[4 + h], s[6 + h]);
                    const __m128i o[4] = {_mm_unpacklo_epi64(a, e), _mm_unpackhi_epi64(a, e), _mm_unpacklo_epi64(b, f),
                                          _mm_unpackhi_epi64(b, f)};
                    for (int k = 0; k < 4; k++) {
                        _mm256_store_si256((yi *) (to + (size_t) (c / 2 + 4 * h + k) * 32), _mm256_cvtepi8_epi16(o[k]));
                    }
                }
            }
        }
        for (int g = 0; g < t->n_groups; g++) {
            tile_scales(t, g, rows, stride, n, scale + g * T);
        }
    }

    static void v_tile(const pytq_type_info * t, const uint8_t * rows, size_t stride, int n, int, uint8_t * x,
                       float * scale) {
        int8_t table[PYTQ_MAX_GROUPS][64], level[2][PYTQ_MAX_HEAD_DIM + 64];
        level_tables(t, table);
        for (int i0 = 0; i0 < n; i0 += 2) {
            rows_of_levels(t, table, rows, stride, i0, n, 2, level);
            for (int c = 0; c < t->head_dim; c += 16) {
                const __m128i a = _mm_loadu_si128((const __m128i *) (level[0] + c)),
                              b = _mm_loadu_si128((const __m128i *) (level[1] + c));
                uint8_t * const to = x + (size_t) c / 8 * (T * 16) + (size_t) i0 * 16;
                _mm256_store_si256((yi *) to, _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(a, b)));
                _mm256_store_si256((yi *) (to + T * 16), _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(a, b)));
            }
        }
        tile_scales(t, 0, rows, stride, n, scale);
    }

    static void q_row(const pytq_type_info * t, const float * q, float scale, uint8_t * a, float * q_scale, int32_t *) {
        q_row_16(q, t->head_dim, scale, a, q_scale);
    }

    static void qk(const pytq_type_info * t, const uint8_t * a, size_t a_row, const float * q_scale, const int32_t *,
                   int nr, int n, const uint8_t * x, const float * k_scale, float * s) {
        const size_t lda = a_row / 2;
        const int16_t * q = (const int16_t *) a;
        int r = 0;
        for (; r + 4 <= nr; r += 4) {
            qk_rows<4>(t, q + r * lda, lda, q_scale + r, n, x, k_scale, s + r * T);
        }
        for (; r < nr; r++) {
            qk_rows<1>(t, q + r * lda, lda, q_scale + r, n, x, k_scale, s + r * T);
        }
    }

    static void store_weights(uint8_t * w, int j, vf v) {
        float tmp[16];
        store(tmp, v);
        const yi a = _mm256_cvtps_epi32(_mm256_loadu_ps(tmp)), b = _mm256_cvtps_epi32(_mm256_loadu_ps(tmp + 8));
        _mm256_storeu_si256((yi *) (w + 2 * j), _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8));
    }

    static void pv(const pytq_type_info * t, const uint8_t * w, int nr, int n, const uint8_t * x, const float * corr,
                   const float * f, float * o) {
        const int width = t->head_dim, pairs = (n + 1) / 2;
        const int16_t * a = (const int16_t *) w;
        int r = 0;
        for (; r + 4 <= nr; r += 4) {
            pv_rows<4>(a + r * 2 * T, pairs, x, width, corr + r, f + r, o + (size_t) r * width);
        }
        for (; r < nr; r++) {
            pv_rows<1>(a + r * 2 * T, pairs, x, width, corr + r, f + r, o + (size_t) r * width);
        }
    }

    static void natural_order(const pytq_type_info *, const float * o, int dv, float * out) {
        memcpy(out, o, (size_t) dv * sizeof(float));
    }
};

const pytq_cpu_tier_row row = {"avx2", PYTQ_CAP_AVX2, encode, decode, run_item<Tier>, run_merge<Tier>, run_fwht<Tier>};

} // namespace

extern "C" {
const pytq_cpu_tier_row * const pytq_tier_avx2 = &row;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

extern "C" {
const pytq_cpu_tier_row * const pytq_tier_avx2 = nullptr;
}

#endif

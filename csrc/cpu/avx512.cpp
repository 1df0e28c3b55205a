// AVX-512 tier: Ice Lake, Sapphire Rapids, Zen 4 and later (F, BW, DQ, VL, VNNI, VBMI, VBMI2, GFNI).
//
//   4 tokens x 16 plane bytes (one 128-bit lane per token)
//     U -- vpshldq 2,4,5,6 + vpternlog --> z1 z0 |
//     plane 1, 2, ...  ------------------------> | vpunpck bytes, words: (r3 r2 r1 r0) of 8 coordinates in a dword
//        gf2p8affine by the identity transposes 8x8 bits: 16 index nibbles (or 8 index bytes) per 8 coordinates
//     K: 4x4 dword transpose over 16 tokens, vpermb = level + 128  -> lane = token, 4 coordinates per dword
//     V: vpermb bytes to (coordinate, token), vpermb = level       -> lane = coordinate, 4 tokens per dword
//   both: vpdpbusd against a broadcast dword of q or weights, in two terms (high and low byte)
//
//   instruction            per 4 tokens x 128 coordinates at 3 bits     Zen 4, 512 bits: per cycle
//   vpunpck*, 4x4 transpose     8 + 8 (K)                               1
//   gf2p8affineqb               4                                       1
//   vpermb                      8 (K), 12 (V)                           1
//   vpdpbusd                    16 per query row                        1
//
// Why so: a transposing affine replaces eight masked additions per 64 values, and the transpose happens on nibbles, at half
// the cost. With lanes as tokens there is no horizontal sum; with one term fewer (8-bit q) the logits lose 0.7 % of relative
// precision for 8 of about 60 cycles per token, so both terms stay.
#include "tiers.h"

#if defined(__x86_64__)

#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,gfni,fma,f16c,avx2"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,gfni,fma,f16c,avx2,prefer-vector-width=512")
#endif
#if !defined(__clang__)
// the undefined upper parts of casts are meant to be undefined
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define PYTQ_MADD(a, b, c) ((vf) _mm512_fmadd_ps((__m512) (a), (__m512) (b), (__m512) (c)))
#include "tile.inl"

namespace {

typedef __m512i zi;

// ------------------------------------------------------------------------------------------------ unpacking

PYTQ_INLINE zi lanes16(const uint8_t *const *p, size_t off) {
    const __m256i a = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) (p[0] + off))),
                                              _mm_loadu_si128((const __m128i *) (p[1] + off)), 1);
    const __m256i b = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) (p[2] + off))),
                                              _mm_loadu_si128((const __m128i *) (p[3] + off)), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

// How a type's index bits are found in the planes.
enum shape { NIBBLE, BYTE5, SPLIT };

struct layout {
    shape kind;
    int n_rows;  // index bits, with z1 and z0
    int n_planes;
    int plane_off[PYTQ_MAX_PLANES];
    alignas(64) uint8_t table[128];
    alignas(16) uint8_t keep[PYTQ_MAX_HEAD_DIM], add[PYTQ_MAX_HEAD_DIM];  // SPLIT: 8 bytes per 8 coordinates
};

static shape shape_of(const pytq_type_info *t) {
    const int bits = t->group_bits[0] + (t->code == PYTQ_CODE_TRELLIS);
    return t->n_groups > 1 ? SPLIT : bits <= 4 ? NIBBLE : BYTE5;
}

static void make_layout(const pytq_type_info *t, int bias, layout *l) {
    l->kind = shape_of(t);
    l->n_planes = t->n_planes;
    l->n_rows = t->group_bits[0] + (t->code == PYTQ_CODE_TRELLIS);
    memcpy(l->plane_off, t->plane_off, sizeof(l->plane_off));
    const pytq_codebook *cb = pytq_codebook_get(t->code, t->group_bits[0]);
    if (l->kind == NIBBLE) {
        for (int i = 0; i < 64; i++) {
            l->table[i] = (uint8_t) (cb->levels[i % cb->n_levels] + bias);
        }
    } else if (l->kind == BYTE5) {
        // the fifth bit is copied to bits 5..7 by the way it is interleaved
        for (int i = 0; i < 16; i++) {
            l->table[i] = (uint8_t) (cb->levels[i] + bias);
            l->table[48 + i] = (uint8_t) (cb->levels[16 + i] + bias);
        }
    } else {
        int base = 0, at = 0;
        for (int g = 0; g < t->n_groups; g++) {
            cb = pytq_codebook_get(t->code, t->group_bits[g]);
            for (int i = 0; i < cb->n_levels; i++) {
                l->table[base + i] = (uint8_t) (cb->levels[i] + bias);
            }
            const int bits = t->group_bits[g] + 1;
            for (const int end = at + t->group_len[g]; at < end; at += 8) {
                for (int k = 0; k < 8; k++) {  // index bit k is row byte 7 - k
                    l->keep[at + 7 - k] = k < bits ? 0xff : 0;
                    l->add[at + 7 - k] = k >= bits && (base >> k & 1) ? 0xff : 0;
                }
            }
            base += cb->n_levels;
        }
        for (; at < PYTQ_MAX_HEAD_DIM; at += 8) {
            memset(l->keep + at, 0, 8);
            memset(l->add + at, 0, 8);
        }
    }
}

PYTQ_INLINE void trellis_bits(zi u, zi before, bool wide, zi *z1, zi *z0) {
    zi s2, s4, s5, s6;
    if (wide) {
        s2 = _mm512_shldi_epi64(u, before, 2), s4 = _mm512_shldi_epi64(u, before, 4);
        s5 = _mm512_shldi_epi64(u, before, 5), s6 = _mm512_shldi_epi64(u, before, 6);
    } else {
        s2 = _mm512_slli_epi64(u, 2), s4 = _mm512_slli_epi64(u, 4);
        s5 = _mm512_slli_epi64(u, 5), s6 = _mm512_slli_epi64(u, 6);
    }
    *z1 = _mm512_ternarylogic_epi64(u, s5, s6, 0x96);
    *z0 = _mm512_xor_si512(s2, s4);
}

// Row r of 8: index bit r of 128 coordinates x 4 tokens (HALF: of 64 coordinates x 8 tokens, p[4..7] in the upper halves).
template <shape KIND, bool TRELLIS, bool HALF, int NP>
PYTQ_INLINE void load_rows(const layout *l, const uint8_t *const *p, int chunk, zi *u_before, zi *rows) {
    zi plane[NP];
    if (HALF && KIND == SPLIT) {
        for (int i = 0; i < NP; i++) {
            plane[i] = _mm512_unpacklo_epi64(lanes16(p, (size_t) l->plane_off[i]), lanes16(p + 4, (size_t) l->plane_off[i]));
        }
    } else if (HALF) {
        // planes are 8 bytes and adjacent: 16 bytes hold two of them
        for (int i = 0; i < NP; i += 2) {
            const zi a = lanes16(p, (size_t) l->plane_off[i]), b = lanes16(p + 4, (size_t) l->plane_off[i]);
            plane[i] = _mm512_unpacklo_epi64(a, b);
            if (i + 1 < NP) {
                plane[i + 1] = _mm512_unpackhi_epi64(a, b);
            }
        }
    } else {
        for (int i = 0; i < NP; i++) {
            plane[i] = lanes16(p, (size_t) (l->plane_off[i] + 16 * chunk));
        }
    }
    if (TRELLIS) {
        const zi u = plane[0];
        if (HALF) {
            trellis_bits(u, u, false, &rows[1], &rows[0]);
        } else {
            const zi before = chunk == 0 ? _mm512_bslli_epi128(u, 8) : _mm512_alignr_epi8(u, *u_before, 8);
            trellis_bits(u, before, true, &rows[1], &rows[0]);
            *u_before = u;
        }
        for (int i = 1; i < NP; i++) {
            rows[i + 1] = plane[i];
        }
    } else {
        for (int i = 0; i < NP; i++) {
            rows[i] = plane[i];
        }
    }
}

PYTQ_INLINE void interleave(zi r3, zi r2, zi r1, zi r0, zi *d) {
    const zi xl = _mm512_unpacklo_epi8(r3, r2), xh = _mm512_unpackhi_epi8(r3, r2);
    const zi yl = _mm512_unpacklo_epi8(r1, r0), yh = _mm512_unpackhi_epi8(r1, r0);
    d[0] = _mm512_unpacklo_epi16(xl, yl), d[1] = _mm512_unpackhi_epi16(xl, yl);
    d[2] = _mm512_unpacklo_epi16(xh, yh), d[3] = _mm512_unpackhi_epi16(xh, yh);
}

PYTQ_INLINE zi transpose_bits(zi a) {
    return _mm512_gf2p8affine_epi64_epi8(_mm512_set1_epi64((long long) 0x8040201008040201ull), a, 0);
}

// Index bytes of one lane group. NIBBLE: 4 results, two indices per byte; else 8 results.
template <shape KIND, bool TRELLIS, bool HALF, int NP>
PYTQ_INLINE void indices(const layout *l, const uint8_t *const *p, int chunk, zi *u_before, zi *out) {
    zi r[NP + 1], d[4], e[4];
    load_rows<KIND, TRELLIS, HALF, NP>(l, p, chunk, u_before, r);
    constexpr int NR = NP + (TRELLIS ? 1 : 0);
    interleave(r[NR > 3 ? 3 : NR - 1], r[NR > 2 ? 2 : NR - 1], r[1], r[0], d);
    if (KIND == NIBBLE) {
        for (int m = 0; m < 4; m++) {
            out[m] = transpose_bits(d[m]);
        }
        return;
    }
    if (KIND == BYTE5) {
        interleave(r[4 % NR], r[4 % NR], r[4 % NR], r[4 % NR], e);
    } else {
        const zi zero = _mm512_setzero_si512();
        interleave(zero, zero, NR > 5 ? r[5 % NR] : zero, r[4 % NR], e);
    }
    for (int m = 0; m < 4; m++) {
        for (int h = 0; h < 2; h++) {
            zi q = h ? _mm512_unpackhi_epi32(e[m], d[m]) : _mm512_unpacklo_epi32(e[m], d[m]);
            if (KIND == SPLIT) {
                // HALF: m counts through token A's 64 coordinates, then B's
                const int at = HALF ? 32 * (m & 1) + 16 * h : 128 * chunk + 32 * m + 16 * h;
                const zi keep = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *) (l->keep + at)));
                const zi add = _mm512_broadcast_i32x4(_mm_load_si128((const __m128i *) (l->add + at)));
                q = _mm512_ternarylogic_epi64(q, keep, add, 0xea);  // (q & keep) | add
            }
            out[2 * m + h] = transpose_bits(q);
        }
    }
}

PYTQ_INLINE void transpose4(zi a, zi b, zi c, zi d, zi *o) {
    const zi t0 = _mm512_unpacklo_epi32(a, b), t1 = _mm512_unpackhi_epi32(a, b);
    const zi t2 = _mm512_unpacklo_epi32(c, d), t3 = _mm512_unpackhi_epi32(c, d);
    o[0] = _mm512_unpacklo_epi64(t0, t2), o[1] = _mm512_unpackhi_epi64(t0, t2);
    o[2] = _mm512_unpacklo_epi64(t1, t3), o[3] = _mm512_unpackhi_epi64(t1, t3);
}

// 32 row pointers from token `at` on; tokens past n, and all of them if `copy`, come from padded memory.
struct row_window {
    const uint8_t *p[32];
    alignas(64) uint8_t copies[32][320];

    void set(const uint8_t *rows, size_t stride, int at, int n, bool copy, int bytes) {
        for (int i = 0; i < 32; i++) {
            p[i] = rows + (size_t) (at + i) * stride;
        }
        if (copy || at + 32 > n) {
            for (int i = 0; i < 32; i++) {
                memset(copies[i], 0, sizeof(copies[i]));
                if (at + i < n) {
                    memcpy(copies[i], p[i], (size_t) bytes);
                }
                p[i] = copies[i];
            }
        }
    }
};

// x[token block of 16][quad of coordinates][16 tokens] as dwords of 4 levels + 128
template <shape KIND, bool TRELLIS, bool HALF, int NP>
void unpack_k(const pytq_type_info *t, const layout *l, const uint8_t *rows, size_t stride, int n, bool last, uint8_t *x) {
    constexpr int NO = KIND == NIBBLE ? 4 : 8;
    const int d = t->head_dim, quads = d / 4;
    const zi t0 = _mm512_load_si512(l->table), t1 = _mm512_load_si512(l->table + 64);
    row_window win;
    for (int i0 = 0; i0 < n; i0 += 32) {
        win.set(rows, stride, i0, n, last && i0 + 32 >= n, t->block_bytes);
        for (int half = 0; half < (HALF ? 1 : 2); half++) {
            uint8_t *const block = x + (size_t) (i0 / 16 + half) * d * 16;
            zi before[4];
            for (int chunk = 0; chunk < (d + 127) / 128; chunk++) {
                zi idx[4][NO];
                for (int g = 0; g < 4; g++) {
                    const uint8_t *const *w = win.p + 16 * half + g;
                    const uint8_t *q[8] = {w[0], w[4], w[8], w[12]};
                    if (HALF) {
                        q[4] = w[16], q[5] = w[20], q[6] = w[24], q[7] = w[28];
                    }
                    indices<KIND, TRELLIS, HALF, NP>(l, q, chunk, &before[g], idx[g]);
                }
                for (int o = 0; o < NO; o++) {
                    uint8_t *to = block;
                    int quad = 32 * chunk + o * (32 / NO);
                    if (HALF) {
                        to += o >= NO / 2 ? d * 16 : 0;
                        quad = o % (NO / 2) * (32 / NO);
                    }
                    if (quad >= quads) {
                        break;
                    }
                    zi c[4];
                    transpose4(idx[0][o], idx[1][o], idx[2][o], idx[3][o], c);
                    for (int k = 0; k < 4; k++) {
                        if (KIND == NIBBLE) {
                            const int hi = quad + 4 * (k >> 1) + (k & 1);
                            if (hi < quads) {
                                _mm512_store_si512(to + hi * 64, _mm512_permutexvar_epi8(_mm512_srli_epi16(c[k], 4), t0));
                                _mm512_store_si512(to + (hi + 2) * 64, _mm512_permutexvar_epi8(c[k], t0));
                            }
                        } else if (quad + k < quads) {
                            _mm512_store_si512(to + (quad + k) * 64, KIND == SPLIT ? _mm512_permutex2var_epi8(t0, c[k], t1)
                                                                                  : _mm512_permutexvar_epi8(c[k], t0));
                        }
                    }
                }
            }
        }
    }
}

// x[block of 16 coordinates][quad of tokens][16 coordinates] as dwords of 4 tokens' levels
template <shape KIND, bool TRELLIS, bool HALF, int NP>
void unpack_v(const pytq_type_info *t, const layout *l, const uint8_t *rows, size_t stride, int n, bool last, uint8_t *x) {
    constexpr int NO = KIND == NIBBLE ? 4 : 8;
    const int d = t->head_dim;
    const zi table = _mm512_load_si512(l->table);
    alignas(64) uint8_t order[64];
    for (int b = 0; b < 16; b++) {
        for (int i = 0; i < 4; i++) {
            order[4 * b + i] = (uint8_t) (16 * i + b);
        }
    }
    const zi by_coord = _mm512_load_si512(order);
    row_window win;
    for (int i0 = 0; i0 < n; i0 += 32) {
        win.set(rows, stride, i0, n, last && i0 + 32 >= n, t->block_bytes);
        for (int g = 0; g < 32; g += HALF ? 8 : 4) {
            uint8_t *const to = x + (size_t) (i0 + g) / 4 * 64;
            zi before;
            for (int chunk = 0; chunk < (d + 127) / 128; chunk++) {
                zi idx[NO];
                indices<KIND, TRELLIS, HALF, NP>(l, win.p + g, chunk, &before, idx);
                for (int o = 0; o < NO; o++) {
                    const int first = HALF ? o % (NO / 2) * (128 / NO) : 128 * chunk + o * (128 / NO);
                    uint8_t *const out = to + (HALF && o >= NO / 2 ? 64 : 0);
                    if (first >= d) {
                        break;
                    }
                    const zi c = _mm512_permutexvar_epi8(by_coord, idx[o]);
                    if (KIND == NIBBLE) {
                        _mm512_store_si512(out + first / 16 * (T * 16), _mm512_permutexvar_epi8(_mm512_srli_epi16(c, 4), table));
                        _mm512_store_si512(out + (first / 16 + 1) * (T * 16), _mm512_permutexvar_epi8(c, table));
                    } else {
                        _mm512_store_si512(out + first / 16 * (T * 16), _mm512_permutexvar_epi8(c, table));
                    }
                }
            }
        }
    }
}

typedef void unpack_fn(const pytq_type_info *, const layout *, const uint8_t *, size_t, int, bool, uint8_t *);

#define PYTQ_PICK(fn, half)                                                                                                    \
    (l->kind == NIBBLE ? !trellis ? np == 2   ? fn<NIBBLE, false, half, 2>                                                     \
                                    : np == 3 ? fn<NIBBLE, false, half, 3>                                                     \
                                              : fn<NIBBLE, false, half, 4>                                                     \
                         : np == 2 ? fn<NIBBLE, true, half, 2>                                                                 \
                                   : fn<NIBBLE, true, half, 3>                                                                 \
     : l->kind == BYTE5 ? fn<BYTE5, true, half, 4>                                                                             \
     : np == 4          ? fn<SPLIT, true, half, 4>                                                                             \
                        : fn<SPLIT, true, half, 5>)

static void scales(const pytq_type_info *t, int group, const uint8_t *rows, size_t stride, int n, float *out) {
    const float step = pytq_codebook_get(t->code, t->group_bits[group])->step;
    if (t->scale == PYTQ_SCALE_LOG8) {
        const float *table = pytq_log8_table();
        for (int i = 0; i < n; i++) {
            out[i] = table[rows[(size_t) i * stride + (size_t) group]] * step;
        }
    } else {
        for (int i = 0; i < n; i++) {
            uint16_t h;
            memcpy(&h, rows + (size_t) i * stride, 2);
            out[i] = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))) * step;
        }
    }
    for (int i = n; i < ((n + 31) & ~31); i++) {
        out[i] = 0.0f;
    }
}

// ------------------------------------------------------------------------------------------------ products

// acc[term][row][j] += sum over nk dwords of x_j (lanes) by a (broadcast). SIGNED_A: a is signed and x unsigned, else reversed.
template <int NR, int NL, bool SIGNED_A>
PYTQ_INLINE void dot(const uint8_t *hi, const uint8_t *lo, size_t row_bytes, const uint8_t *x, size_t x_step, int nk, zi (*high)[NL],
                     zi (*low)[NL]) {
    for (int k = 0; k < nk; k++) {
        zi xv[NL];
        for (int j = 0; j < NL; j++) {
            xv[j] = _mm512_load_si512(x + (size_t) j * x_step + (size_t) k * 64);
        }
        for (int r = 0; r < NR; r++) {
            int32_t h, l;
            memcpy(&h, hi + (size_t) r * row_bytes + 4 * k, 4);
            memcpy(&l, lo + (size_t) r * row_bytes + 4 * k, 4);
            const zi hv = _mm512_set1_epi32(h), lv = _mm512_set1_epi32(l);
            for (int j = 0; j < NL; j++) {
                high[r][j] = SIGNED_A ? _mm512_dpbusd_epi32(high[r][j], xv[j], hv) : _mm512_dpbusd_epi32(high[r][j], hv, xv[j]);
                low[r][j] = SIGNED_A ? _mm512_dpbusd_epi32(low[r][j], xv[j], lv) : _mm512_dpbusd_epi32(low[r][j], lv, xv[j]);
            }
        }
    }
}

// Row of q: dk high bytes, dk low bytes (value = 256 high + low, both signed).
template <int NR>
void qk_rows(const pytq_type_info *t, const uint8_t *a, size_t a_row, const float *q_scale, const int32_t *corr, int n, const uint8_t *x,
             const float *k_scale, float *s) {
    const int d = t->head_dim;
    const size_t block = (size_t) d * 16;
    for (int j = 0; j < n; j += 32) {
        __m512 sum[NR][2];
        for (int g = 0, at = 0; g < t->n_groups; at += t->group_len[g++]) {
            zi high[NR][2], low[NR][2];
            for (int r = 0; r < NR; r++) {
                high[r][0] = high[r][1] = _mm512_setzero_si512();
                low[r][0] = low[r][1] = _mm512_set1_epi32(corr[g * RB + r]);
            }
            dot<NR, 2, true>(a + at, a + d + at, a_row, x + (size_t) j / 16 * block + (size_t) at * 16, block, t->group_len[g] / 4, high, low);
            for (int i = 0; i < 2; i++) {
                const __m512 ks = _mm512_load_ps(k_scale + g * T + j + 16 * i);
                for (int r = 0; r < NR; r++) {
                    const __m512 v = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[r][i], 8), low[r][i]));
                    sum[r][i] = g == 0 ? _mm512_mul_ps(v, ks) : _mm512_fmadd_ps(v, ks, sum[r][i]);
                }
            }
        }
        for (int r = 0; r < NR; r++) {
            const __m512 qs = _mm512_set1_ps(q_scale[r]);
            _mm512_store_ps(s + r * T + j, _mm512_mul_ps(sum[r][0], qs));
            _mm512_store_ps(s + r * T + j + 16, _mm512_mul_ps(sum[r][1], qs));
        }
    }
}

template <int NR, int NL>
PYTQ_INLINE void pv_block(const uint8_t *w, const uint8_t *x, int quads, int width, const float *corr, const float *f, float *o) {
    zi high[NR][NL], low[NR][NL];
    for (int r = 0; r < NR; r++) {
        for (int j = 0; j < NL; j++) {
            high[r][j] = low[r][j] = _mm512_setzero_si512();
        }
    }
    dot<NR, NL, false>(w, w + T, 4 * T, x, T * 16, quads, high, low);
    for (int r = 0; r < NR; r++) {
        const __m512 cv = _mm512_set1_ps(corr[r]), fv = _mm512_set1_ps(f[r]);
        for (int j = 0; j < NL; j++) {
            float *const to = o + (size_t) r * width + 16 * j;
            const __m512 v = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[r][j], 8), low[r][j]));
            _mm512_store_ps(to, _mm512_fmadd_ps(v, fv, _mm512_mul_ps(_mm512_load_ps(to), cv)));
        }
    }
}

template <int NR>
void pv_rows(const uint8_t *w, int quads, const uint8_t *x, int width, const float *corr, const float *f, float *o) {
    int c = 0;
    for (; c + 32 <= width; c += 32) {
        pv_block<NR, 2>(w, x + (size_t) c * T, quads, width, corr, f, o + c);
    }
    if (c < width) {
        pv_block<NR, 1>(w, x + (size_t) c * T, quads, width, corr, f, o + c);
    }
}

struct Tier {
    static constexpr float weight_max = 65535.0f;
    static void quantize(const pytq_type_info *t, const float *x, void *y, int64_t n);
    static void dequantize(const pytq_type_info *t, const void *y, float *x, int64_t n);

    static vf exp(vf x) {
        const __m512 v = _mm512_max_ps((__m512) x, _mm512_set1_ps(-110.0f));
        const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), v));
        __m512 p = _mm512_set1_ps(8.3334519073e-3f);
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
        return (vf) _mm512_scalef_ps(p, n);
    }
    static vf halves(const uint16_t *p) { return (vf) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
    static float max16(vf v) { return _mm512_reduce_max_ps((__m512) v); }
    static float sum16(vf v) { return _mm512_reduce_add_ps((__m512) v); }

    static mask_state mask_of(const uint16_t *m, int n) {
        zi any = _mm512_setzero_si512();
        __mmask32 odd = 0;
        for (int i = 0; i < n; i += 32) {
            const __mmask32 k = n - i >= 32 ? ~0u : (1u << (n - i)) - 1;
            const zi v = _mm512_maskz_loadu_epi16(k, m + i);
            any = _mm512_or_si512(any, v);
            odd |= _mm512_mask_cmpneq_epi16_mask(k, v, _mm512_set1_epi16((short) 0xfc00));
        }
        return _mm512_test_epi16_mask(any, any) == 0 ? MASK_ZERO : odd == 0 ? MASK_OUT : MASK_MIXED;
    }

    static bool k_integer(const pytq_type_info *) { return true; }
    static bool v_integer(const pytq_type_info *t) { return t->n_groups == 1; }
    static int v_width(const pytq_type_info *t) { return (t->head_dim + 31) & ~31; }

    static void k_tile(const pytq_type_info *t, const uint8_t *rows, size_t stride, int n, bool last, uint8_t *x, float *scale) {
        layout lay;
        make_layout(t, 128, &lay);
        const layout *l = &lay;
        const bool trellis = t->code == PYTQ_CODE_TRELLIS;
        const int np = t->n_planes;
        unpack_fn *fn = t->head_dim == 64 ? PYTQ_PICK(unpack_k, true) : PYTQ_PICK(unpack_k, false);
        fn(t, l, rows, stride, n, last, x);
        for (int g = 0; g < t->n_groups; g++) {
            scales(t, g, rows, stride, n, scale + g * T);
        }
    }

    static void v_tile(const pytq_type_info *t, const uint8_t *rows, size_t stride, int n, bool last, uint8_t *x, float *scale) {
        layout lay;
        make_layout(t, 0, &lay);
        const layout *l = &lay;
        const bool trellis = t->code == PYTQ_CODE_TRELLIS;
        const int np = t->n_planes;
        unpack_fn *fn = t->head_dim == 64 ? PYTQ_PICK(unpack_v, true) : PYTQ_PICK(unpack_v, false);
        fn(t, l, rows, stride, n, last, x);
        scales(t, 0, rows, stride, n, scale);
    }

    static void q_row(const pytq_type_info *t, const float *q, float scale, uint8_t *a, float *q_scale, int32_t *corr) {
        const int d = t->head_dim;
        __m512 top = _mm512_setzero_ps();
        for (int c = 0; c < d; c += 16) {
            top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_loadu_ps(q + c)));
        }
        const float m = _mm512_reduce_max_ps(top);
        const __m512 inv = _mm512_set1_ps(m > 0.0f ? 32512.0f / m : 0.0f);
        *q_scale = m / 32512.0f * scale;
        int32_t value[PYTQ_MAX_HEAD_DIM];
        for (int c = 0; c < d; c += 16) {
            const zi v = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(q + c), inv));
            const zi h = _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8);
            _mm_storeu_si128((__m128i *) (a + c), _mm512_cvtepi32_epi8(h));
            _mm_storeu_si128((__m128i *) (a + d + c), _mm512_cvtepi32_epi8(v));
            _mm512_storeu_si512(value + c, v);
        }
        for (int g = 0, at = 0; g < t->n_groups; at += t->group_len[g++]) {
            int32_t sum = 0;
            for (int c = at; c < at + t->group_len[g]; c++) {
                sum += value[c];
            }
            corr[g * RB] = -128 * sum;
        }
    }

    static void qk(const pytq_type_info *t, const uint8_t *a, size_t a_row, const float *q_scale, const int32_t *corr, int nr, int n,
                   const uint8_t *x, const float *k_scale, float *s) {
        int r = 0;
        for (; r + 4 <= nr; r += 4) {
            qk_rows<4>(t, a + r * a_row, a_row, q_scale + r, corr + r, n, x, k_scale, s + r * T);
        }
        switch (nr - r) {
            case 3: qk_rows<3>(t, a + r * a_row, a_row, q_scale + r, corr + r, n, x, k_scale, s + r * T); break;
            case 2: qk_rows<2>(t, a + r * a_row, a_row, q_scale + r, corr + r, n, x, k_scale, s + r * T); break;
            case 1: qk_rows<1>(t, a + r * a_row, a_row, q_scale + r, corr + r, n, x, k_scale, s + r * T); break;
            default: break;
        }
    }

    static void store_weights(uint8_t *w, int j, vf v) {
        const zi i = _mm512_cvtps_epi32((__m512) v);
        _mm_store_si128((__m128i *) (w + j), _mm512_cvtepi32_epi8(_mm512_srli_epi32(i, 8)));
        _mm_store_si128((__m128i *) (w + T + j), _mm512_cvtepi32_epi8(i));
    }

    static void pv(const pytq_type_info *t, const uint8_t *w, int nr, int n, const uint8_t *x, const float *corr, const float *f, float *o) {
        const int width = v_width(t), quads = (n + 3) / 4;
        int r = 0;
        for (; r + 4 <= nr; r += 4) {
            pv_rows<4>(w + r * 4 * T, quads, x, width, corr + r, f + r, o + (size_t) r * width);
        }
        switch (nr - r) {
            case 3: pv_rows<3>(w + r * 4 * T, quads, x, width, corr + r, f + r, o + (size_t) r * width); break;
            case 2: pv_rows<2>(w + r * 4 * T, quads, x, width, corr + r, f + r, o + (size_t) r * width); break;
            case 1: pv_rows<1>(w + r * 4 * T, quads, x, width, corr + r, f + r, o + (size_t) r * width); break;
            default: break;
        }
    }

    // The nibble layout holds groups of 8 coordinates in the order 0 2 1 3 of each 32.
    static void natural_order(const pytq_type_info *t, const float *o, int dv, float *out) {
        const bool swapped = t && shape_of(t) == NIBBLE;
        for (int j = 0; j < dv / 8; j++) {
            const int from = swapped ? (j & ~3) + (j % 4 == 1 ? 2 : j % 4 == 2 ? 1 : j % 4) : j;
            memcpy(out + 8 * j, o + 8 * from, 8 * sizeof(float));
        }
    }
};

void Tier::quantize(const pytq_type_info *t, const float *x, void *y, int64_t n) { pytq_quantize_ref(t, x, y, n); }
void Tier::dequantize(const pytq_type_info *t, const void *y, float *x, int64_t n) { pytq_dequantize_ref(t, y, x, n); }

const pytq_cpu_tier_row row = {"avx512", PYTQ_CAP_AVX2 | PYTQ_CAP_AVX512, Tier::quantize, Tier::dequantize, run_item<Tier>, run_merge<Tier>};

}  // namespace

extern "C" {
const pytq_cpu_tier_row *const pytq_tier_avx512 = &row;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

extern "C" {
const pytq_cpu_tier_row *const pytq_tier_avx512 = nullptr;
}

#endif

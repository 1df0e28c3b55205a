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
// Why so: a transposing affine replaces eight masked additions per 64 values, and the transpose happens on nibbles, at
// half the cost. With lanes as tokens there is no horizontal sum; with one term fewer (8-bit q) the logits lose 0.7 %
// of relative precision for 8 of about 60 cycles per token, so both terms stay.
#include "tiers.h"

#if defined(__x86_64__)

#include <math.h>
#include <string.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                                          \
    __attribute__((                                                                                                    \
        target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,gfni,fma,f16c,avx2"))),           \
    apply_to = function)
#else
#pragma GCC target(                                                                                                    \
    "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx512vbmi,avx512vbmi2,gfni,fma,f16c,avx2,prefer-vector-width=512")
#endif
#if !defined(__clang__)
// the undefined upper parts of casts are meant to be undefined
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define PYTQ_FMA(a, b, c) ((vf) _mm512_fmadd_ps((__m512) (a), (__m512) (b), (__m512) (c)))
#include "tile.inl"

namespace {

typedef __m512i zi;

// ------------------------------------------------------------------------------------------------ unpacking

// 16 bytes of each of four tokens, `step` bytes apart.
PYTQ_INLINE zi lanes16(const uint8_t * p, size_t step) {
    const __m256i a = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) p)),
                                              _mm_loadu_si128((const __m128i *) (p + step)), 1);
    const __m256i b = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *) (p + 2 * step))),
                                              _mm_loadu_si128((const __m128i *) (p + 3 * step)), 1);
    return _mm512_inserti64x4(_mm512_castsi256_si512(a), b, 1);
}

// How a type's index bits are found in the planes.
enum shape { NIBBLE, BYTE5, BYTE6, SPLIT };

struct layout {
    shape kind;
    int n_rows; // index bits, with z1 and z0
    int n_planes;
    int plane_off[PYTQ_MAX_PLANES];
    float step[PYTQ_MAX_GROUPS];
    alignas(64) uint8_t table[128];
    alignas(16) uint8_t keep[PYTQ_MAX_HEAD_DIM], add[PYTQ_MAX_HEAD_DIM]; // SPLIT: 8 bytes per 8 coordinates
};

static shape shape_of(const pytq_type_info * t) {
    const int bits = t->group_bits[0] + (t->code == PYTQ_CODE_TRELLIS);
    return t->n_groups > 1 ? SPLIT : bits <= 4 ? NIBBLE : bits == 5 ? BYTE5 : BYTE6;
}

static void make_layout(const pytq_type_info * t, int bias, layout * l) {
    l->kind = shape_of(t);
    l->n_planes = t->n_planes;
    l->n_rows = t->group_bits[0] + (t->code == PYTQ_CODE_TRELLIS);
    memcpy(l->plane_off, t->plane_off, sizeof(l->plane_off));
    for (int g = 0; g < t->n_groups; g++) {
        l->step[g] = pytq_codebook_get(t->code, t->group_bits[g])->step;
    }
    const pytq_codebook * cb = pytq_codebook_get(t->code, t->group_bits[0]);
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
    } else if (l->kind == BYTE6) {
        for (int i = 0; i < 64; i++) {
            l->table[i] = (uint8_t) (cb->levels[i] + bias);
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
                for (int k = 0; k < 8; k++) { // index bit k is row byte 7 - k
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

// Layouts of every type, made once: of keys (bias 128) and of values (0, for which split-rate types have none).
struct all_layouts {
    layout of[2][PYTQ_TYPE_END - PYTQ_TYPE_BASE];
    all_layouts() {
        memset((void *) of, 0, sizeof(of));
        for (int i = 0; const pytq_type_info * t = pytq_type_at(i); i++) {
            make_layout(t, 0, &of[0][t->id - PYTQ_TYPE_BASE]);
            make_layout(t, 128, &of[1][t->id - PYTQ_TYPE_BASE]);
        }
    }
};

static const layout * layout_of(const pytq_type_info * t, int bias) {
    static const all_layouts all;
    return &all.of[bias != 0][t->id - PYTQ_TYPE_BASE];
}

PYTQ_INLINE void trellis_bits(zi u, zi before, bool wide, zi * z1, zi * z0) {
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

// Row r of 8: index bit r of 128 coordinates x 4 tokens (HALF: of 64 coordinates x 8 tokens, the second four from `p +
// far` on in the upper halves).
template <shape KIND, bool TRELLIS, bool HALF, int NP>
PYTQ_INLINE void load_rows(const layout * l, const uint8_t * p, size_t step, size_t far, int chunk, zi * u_before,
                           zi * rows) {
    zi plane[NP];
    if (HALF && KIND == SPLIT) {
        for (int i = 0; i < NP; i++) {
            plane[i] =
                _mm512_unpacklo_epi64(lanes16(p + l->plane_off[i], step), lanes16(p + far + l->plane_off[i], step));
        }
    } else if (HALF) {
        // planes are 8 bytes and adjacent: 16 bytes hold two of them
        for (int i = 0; i < NP; i += 2) {
            const zi a = lanes16(p + l->plane_off[i], step), b = lanes16(p + far + l->plane_off[i], step);
            plane[i] = _mm512_unpacklo_epi64(a, b);
            if (i + 1 < NP) {
                plane[i + 1] = _mm512_unpackhi_epi64(a, b);
            }
        }
    } else {
        for (int i = 0; i < NP; i++) {
            plane[i] = lanes16(p + l->plane_off[i] + 16 * chunk, step);
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

PYTQ_INLINE void interleave(zi r3, zi r2, zi r1, zi r0, zi * d) {
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
PYTQ_INLINE void indices(const layout * l, const uint8_t * p, size_t step, size_t far, int chunk, zi * u_before,
                         zi * out) {
    zi r[NP + 1], d[4], e[4];
    load_rows<KIND, TRELLIS, HALF, NP>(l, p, step, far, chunk, u_before, r);
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
    } else if (KIND == BYTE6) {
        interleave(r[5 % NR], r[5 % NR], r[5 % NR], r[4 % NR], e); // vpermb ignores the two upper bits
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
                q = _mm512_ternarylogic_epi64(q, keep, add, 0xea); // (q & keep) | add
            }
            out[2 * m + h] = transpose_bits(q);
        }
    }
}

PYTQ_INLINE void transpose4(zi a, zi b, zi c, zi d, zi * o) {
    const zi t0 = _mm512_unpacklo_epi32(a, b), t1 = _mm512_unpackhi_epi32(a, b);
    const zi t2 = _mm512_unpacklo_epi32(c, d), t3 = _mm512_unpackhi_epi32(c, d);
    o[0] = _mm512_unpacklo_epi64(t0, t2), o[1] = _mm512_unpackhi_epi64(t0, t2);
    o[2] = _mm512_unpacklo_epi64(t1, t3), o[3] = _mm512_unpackhi_epi64(t1, t3);
}

// 32 tokens from `at` on, of `readable` ones. Where the cache ends inside or behind them (the loads read up to 31 bytes
// past a block), they come from padded memory.
struct row_window {
    const uint8_t * p;
    size_t stride;
    alignas(64) uint8_t copies[32][320];

    void set(const uint8_t * rows, size_t row_bytes, int at, int readable, int bytes) {
        p = rows + (size_t) at * row_bytes;
        stride = row_bytes;
        if (at + 32 >= readable) {
            memset(copies, 0, sizeof(copies));
            for (int i = 0; i < 32 && at + i < readable; i++) {
                memcpy(copies[i], p + (size_t) i * row_bytes, (size_t) bytes);
            }
            p = copies[0];
            stride = sizeof(copies[0]);
        }
    }
};

// x[token block of 16][quad of coordinates][16 tokens] as dwords of 4 levels + 128
template <shape KIND, bool TRELLIS, bool HALF, int NP>
void unpack_k(const pytq_type_info * t, const layout * l, const uint8_t * rows, size_t stride, int n, int readable,
              uint8_t * x) {
    constexpr int NO = KIND == NIBBLE ? 4 : 8;
    const int d = t->head_dim, quads = d / 4;
    const zi t0 = _mm512_load_si512(l->table), t1 = _mm512_load_si512(l->table + 64);
    row_window win;
    for (int i0 = 0; i0 < n; i0 += 32) {
        win.set(rows, stride, i0, readable, t->block_bytes);
        for (int half = 0; half < (HALF ? 1 : 2); half++) {
            uint8_t * const block = x + (size_t) (i0 / 16 + half) * d * 16;
            zi before[4];
            for (int chunk = 0; chunk < (d + 127) / 128; chunk++) {
                zi idx[4][NO];
                for (int g = 0; g < 4; g++) {
                    indices<KIND, TRELLIS, HALF, NP>(l, win.p + (size_t) (16 * half + g) * win.stride, 4 * win.stride,
                                                     16 * win.stride, chunk, &before[g], idx[g]);
                }
                for (int o = 0; o < NO; o++) {
                    uint8_t * to = block;
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
                                _mm512_store_si512(to + hi * 64,
                                                   _mm512_permutexvar_epi8(_mm512_srli_epi16(c[k], 4), t0));
                                _mm512_store_si512(to + (hi + 2) * 64, _mm512_permutexvar_epi8(c[k], t0));
                            }
                        } else if (quad + k < quads) {
                            _mm512_store_si512(to + (quad + k) * 64, KIND == SPLIT
                                                                         ? _mm512_permutex2var_epi8(t0, c[k], t1)
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
void unpack_v(const pytq_type_info * t, const layout * l, const uint8_t * rows, size_t stride, int n, int readable,
              uint8_t * x) {
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
        win.set(rows, stride, i0, readable, t->block_bytes);
        for (int g = 0; g < 32; g += HALF ? 8 : 4) {
            uint8_t * const to = x + (size_t) (i0 + g) / 4 * 64;
            zi before;
            for (int chunk = 0; chunk < (d + 127) / 128; chunk++) {
                zi idx[NO];
                indices<KIND, TRELLIS, HALF, NP>(l, win.p + (size_t) g * win.stride, win.stride, 4 * win.stride, chunk,
                                                 &before, idx);
                for (int o = 0; o < NO; o++) {
                    const int first = HALF ? o % (NO / 2) * (128 / NO) : 128 * chunk + o * (128 / NO);
                    uint8_t * const out = to + (HALF && o >= NO / 2 ? 64 : 0);
                    if (first >= d) {
                        break;
                    }
                    const zi c = _mm512_permutexvar_epi8(by_coord, idx[o]);
                    if (KIND == NIBBLE) {
                        _mm512_store_si512(out + first / 16 * (T * 16),
                                           _mm512_permutexvar_epi8(_mm512_srli_epi16(c, 4), table));
                        _mm512_store_si512(out + (first / 16 + 1) * (T * 16), _mm512_permutexvar_epi8(c, table));
                    } else {
                        _mm512_store_si512(out + first / 16 * (T * 16), _mm512_permutexvar_epi8(c, table));
                    }
                }
            }
        }
    }
}

typedef void unpack_fn(const pytq_type_info *, const layout *, const uint8_t *, size_t, int, int, uint8_t *);

#define PYTQ_PICK(fn, half)                                                                                            \
    (l->kind == NIBBLE  ? !trellis  ? np == 2   ? fn<NIBBLE, false, half, 2>                                           \
                                      : np == 3 ? fn<NIBBLE, false, half, 3>                                           \
                                                : fn<NIBBLE, false, half, 4>                                           \
                          : np == 2 ? fn<NIBBLE, true, half, 2>                                                        \
                                    : fn<NIBBLE, true, half, 3>                                                        \
     : l->kind == BYTE5 ? fn<BYTE5, true, half, 4>                                                                     \
     : l->kind == BYTE6 ? fn<BYTE6, true, half, 5>                                                                     \
     : np == 4          ? fn<SPLIT, true, half, 4>                                                                     \
                        : fn<SPLIT, true, half, 5>)

// Factors scale * step of one group; zero past n up to a multiple of 32.
static void scales(const pytq_type_info * t, const layout * l, int group, const uint8_t * rows, size_t stride, int n,
                   float * out) {
    const float step = l->step[group];
    if (t->scale == PYTQ_SCALE_LOG8) {
        const float * table = pytq_log8_table();
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

// acc[term][row][j] += sum over nk dwords of x_j (lanes) by a (broadcast). SIGNED_A: a is signed and x unsigned, else
// reversed.
template <int NR, int NL, bool SIGNED_A>
PYTQ_INLINE void dot(const uint8_t * hi, const uint8_t * lo, size_t row_bytes, const uint8_t * x, size_t x_step, int nk,
                     zi (*high)[NL], zi (*low)[NL]) {
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
                high[r][j] =
                    SIGNED_A ? _mm512_dpbusd_epi32(high[r][j], xv[j], hv) : _mm512_dpbusd_epi32(high[r][j], hv, xv[j]);
                low[r][j] =
                    SIGNED_A ? _mm512_dpbusd_epi32(low[r][j], xv[j], lv) : _mm512_dpbusd_epi32(low[r][j], lv, xv[j]);
            }
        }
    }
}

// Row of q: dk high bytes, dk low bytes (value = 256 high + low, both signed).
template <int NR>
void qk_rows(const pytq_type_info * t, const uint8_t * a, size_t a_row, const float * q_scale, const int32_t * corr,
             int n, const uint8_t * x, const float * k_scale, float * s) {
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
            dot<NR, 2, true>(a + at, a + d + at, a_row, x + (size_t) j / 16 * block + (size_t) at * 16, block,
                             t->group_len[g] / 4, high, low);
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
PYTQ_INLINE void pv_block(const uint8_t * w, const uint8_t * x, int quads, int width, const float * corr,
                          const float * f, float * o) {
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
            float * const to = o + (size_t) r * width + 16 * j;
            const __m512 v = _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high[r][j], 8), low[r][j]));
            _mm512_store_ps(to, _mm512_fmadd_ps(v, fv, _mm512_mul_ps(_mm512_load_ps(to), cv)));
        }
    }
}

template <int NR>
void pv_rows(const uint8_t * w, int quads, const uint8_t * x, int width, const float * corr, const float * f,
             float * o) {
    int c = 0;
    for (; c + 32 <= width; c += 32) {
        pv_block<NR, 2>(w, x + (size_t) c * T, quads, width, corr, f, o + c);
    }
    if (c < width) {
        pv_block<NR, 1>(w, x + (size_t) c * T, quads, width, corr, f, o + c);
    }
}

// The sum of 16 lanes in hsum's order.
PYTQ_INLINE float fold16(__m512 v) {
    const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}

struct Tier {
    static void quantize(const pytq_type_info * t, const float * x, void * y, int64_t n);
    static void dequantize(const pytq_type_info * t, const void * y, float * x, int64_t n);

    static vf exp(vf x) {
        const __mmask16 keep = _mm512_cmp_ps_mask((__m512) x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
        const __m512 v = _mm512_max_ps((__m512) x, _mm512_set1_ps(-87.0f));
        const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, _mm512_set1_ps(1.44269504f)),
                                              _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        const __m512 r =
            _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), v));
        __m512 p = _mm512_set1_ps(8.3334519073e-3f);
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
        p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
        return (vf) _mm512_maskz_scalef_ps(keep, p, n);
    }
    static vf halves(const uint16_t * p) { return (vf) _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *) p)); }
    static vf maximum(vf a, vf b) { return (vf) _mm512_max_ps((__m512) a, (__m512) b); }
    static float max16(vf v) { return _mm512_reduce_max_ps((__m512) v); }
    static float sum16(vf v) { return fold16((__m512) v); }

    static mask_state mask_of(const uint16_t * m, int n, int * seen) {
        zi any = _mm512_setzero_si512();
        int last = 0;
        for (int i = 0; i < n; i += 32) {
            const __mmask32 k = n - i >= 32 ? ~0u : (1u << (n - i)) - 1;
            const zi v = _mm512_maskz_loadu_epi16(k, m + i);
            any = _mm512_or_si512(any, v);
            const __mmask32 odd = _mm512_mask_cmpneq_epi16_mask(k, v, _mm512_set1_epi16((short) 0xfc00));
            last = odd ? i + 32 - __builtin_clz(odd) : last;
        }
        *seen = last;
        return _mm512_test_epi16_mask(any, any) == 0 ? MASK_ZERO : last == 0 ? MASK_OUT : MASK_MIXED;
    }

    // sums in the lanes where the bit is 0, differences where it is 1
    static vf fwht16(vf x) {
        const auto step = [](__m512 v, __m512 other, __mmask16 ones) {
            return _mm512_mask_sub_ps(_mm512_add_ps(other, v), ones, other, v);
        };
        __m512 v = (__m512) x;
        v = step(v, _mm512_permute_ps(v, 0xb1), 0xaaaa);
        v = step(v, _mm512_permute_ps(v, 0x4e), 0xcccc);
        v = step(v, _mm512_shuffle_f32x4(v, v, 0xb1), 0xf0f0);
        return (vf) step(v, _mm512_shuffle_f32x4(v, v, 0x4e), 0xff00);
    }
    static bool k_integer(const pytq_type_info *) { return true; }
    static bool v_integer(const pytq_type_info * t) { return t->n_groups == 1; }
    static int v_width(const pytq_type_info * t) { return (t->head_dim + 31) & ~31; }

    static void k_tile(const pytq_type_info * t, const uint8_t * rows, size_t stride, int n, int readable, uint8_t * x,
                       float * scale) {
        const layout * l = layout_of(t, 128);
        const bool trellis = t->code == PYTQ_CODE_TRELLIS;
        const int np = t->n_planes;
        unpack_fn * fn = t->head_dim == 64 ? PYTQ_PICK(unpack_k, true) : PYTQ_PICK(unpack_k, false);
        fn(t, l, rows, stride, n, readable, x);
        for (int g = 0; g < t->n_groups; g++) {
            scales(t, l, g, rows, stride, n, scale + g * T);
        }
    }

    static void v_tile(const pytq_type_info * t, const uint8_t * rows, size_t stride, int n, int readable, uint8_t * x,
                       float * scale) {
        const layout * l = layout_of(t, 0);
        const bool trellis = t->code == PYTQ_CODE_TRELLIS;
        const int np = t->n_planes;
        unpack_fn * fn = t->head_dim == 64 ? PYTQ_PICK(unpack_v, true) : PYTQ_PICK(unpack_v, false);
        fn(t, l, rows, stride, n, readable, x);
        scales(t, l, 0, rows, stride, n, scale);
    }

    static void q_row(const pytq_type_info * t, const float * q, float scale, uint8_t * a, float * q_scale,
                      int32_t * corr) {
        const int d = t->head_dim;
        __m512 top = _mm512_setzero_ps();
        for (int c = 0; c < d; c += 16) {
            top = _mm512_max_ps(top, _mm512_abs_ps(_mm512_loadu_ps(q + c)));
        }
        const float m = _mm512_reduce_max_ps(top);
        const __m512 inv = _mm512_set1_ps(m > 0.0f ? FIXED_MAX / m : 0.0f);
        *q_scale = m / FIXED_MAX * scale;
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

    static void qk(const pytq_type_info * t, const uint8_t * a, size_t a_row, const float * q_scale,
                   const int32_t * corr, int nr, int n, const uint8_t * x, const float * k_scale, float * s) {
        int r = 0;
        for (; r + 4 <= nr; r += 4) {
            qk_rows<4>(t, a + r * a_row, a_row, q_scale + r, corr + r, n, x, k_scale, s + r * T);
        }
        switch (nr - r) {
            case 3:
                qk_rows<3>(t, a + r * a_row, a_row, q_scale + r, corr + r, n, x, k_scale, s + r * T);
                break;
            case 2:
                qk_rows<2>(t, a + r * a_row, a_row, q_scale + r, corr + r, n, x, k_scale, s + r * T);
                break;
            case 1:
                qk_rows<1>(t, a + r * a_row, a_row, q_scale + r, corr + r, n, x, k_scale, s + r * T);
                break;
            default:
                break;
        }
    }

    static void store_weights(uint8_t * w, int j, vf v) {
        const zi i = _mm512_cvtps_epi32((__m512) v);
        _mm_store_si128((__m128i *) (w + j), _mm512_cvtepi32_epi8(_mm512_srli_epi32(i, 8)));
        _mm_store_si128((__m128i *) (w + T + j), _mm512_cvtepi32_epi8(i));
    }

    static void pv(const pytq_type_info * t, const uint8_t * w, int nr, int n, const uint8_t * x, const float * corr,
                   const float * f, float * o) {
        const int width = v_width(t), quads = (n + 3) / 4;
        int r = 0;
        for (; r + 4 <= nr; r += 4) {
            pv_rows<4>(w + r * 4 * T, quads, x, width, corr + r, f + r, o + (size_t) r * width);
        }
        switch (nr - r) {
            case 3:
                pv_rows<3>(w + r * 4 * T, quads, x, width, corr + r, f + r, o + (size_t) r * width);
                break;
            case 2:
                pv_rows<2>(w + r * 4 * T, quads, x, width, corr + r, f + r, o + (size_t) r * width);
                break;
            case 1:
                pv_rows<1>(w + r * 4 * T, quads, x, width, corr + r, f + r, o + (size_t) r * width);
                break;
            default:
                break;
        }
    }

    // The nibble layout holds groups of 8 coordinates in the order 0 2 1 3 of each 32.
    static void natural_order(const pytq_type_info * t, const float * o, int dv, float * out) {
        const bool swapped = t && shape_of(t) == NIBBLE;
        for (int j = 0; j < dv / 8; j++) {
            const int from = swapped ? (j & ~3) + (j % 4 == 1 ? 2 : j % 4 == 2 ? 1 : j % 4) : j;
            memcpy(out + 8 * j, o + 8 * from, 8 * sizeof(float));
        }
    }
};

// ------------------------------------------------------------------------------------------------ encoder
//
// Viterbi over 64 states in four registers, in place: after a step the state's bits have moved up by one, and the new
// bit lives where the dropped one was. So state bit k is bit (k - t) mod 6 of the location (16 * register + lane) and
// the two predecessors of a state differ in location bit b = 5 - t mod 6: two registers (b = 5, 4) or two lanes of one
// (b < 4). With X and Y the costs of the two branches, out = min(V + X, W + Y), W being V's partner. Every sum and
// comparison is the reference's, in its order, so the bytes are the same.

// Tables of one code and bit width: levels and decision limits of each subset (one subset for the scalar code).
struct search_table {
    alignas(64) float level[4][16], limit[4][16];
    alignas(64) int8_t all[64];
    int n_sub;
    float step;
};

// Index of cost X at a location: bits of the state after the step; z1 = s0 ^ s5 ^ c, of which X holds s5 alone, and Y
// is X ^ 2. Linear over the location's bits, so registers share permuted costs: 2 to 4 of them serve all 8 uses of a
// step.
constexpr int state_bit(int phase, int l, int k) {
    return l >> ((k - phase - 1 + 12) % 6) & 1;
}
constexpr int cost_index(int phase, int l) {
    return 2 * state_bit(phase, l, 5) + (state_bit(phase, l, 2) ^ state_bit(phase, l, 4));
}

struct encoder_tables {
    search_table table[2][6];
    alignas(64) int32_t x[6][4][16]; // index of cost X of register 0 for each phase and lane, xor 0..3
    encoder_tables() {
        memset(table, 0, sizeof(table));
        for (int code = 0; code < 2; code++) {
            for (int bits = 1; bits <= 5; bits++) {
                const pytq_codebook * cb = pytq_codebook_get((enum pytq_code) code, bits);
                search_table * s = &table[code][bits];
                const int subsets = code == PYTQ_CODE_TRELLIS ? 4 : 1;
                s->n_sub = cb->n_levels / subsets;
                s->step = cb->step;
                memcpy(s->all, cb->levels, (size_t) cb->n_levels);
                for (int z = 0; z < subsets; z++) {
                    for (int i = 0; i < 16 && i < s->n_sub; i++) {
                        s->level[z][i] = (float) cb->levels[subsets * i + z];
                        s->limit[z][i] = i + 1 < s->n_sub ? 0.5f * ((float) cb->levels[subsets * i + z] +
                                                                    (float) cb->levels[subsets * (i + 1) + z])
                                                          : INFINITY;
                    }
                }
            }
        }
        for (int phase = 0; phase < 6; phase++) {
            for (int l = 0; l < 64; l++) {
                x[phase][l / 16][l % 16] = cost_index(phase, l % 16) ^ (l / 16);
            }
        }
    }
};

static const encoder_tables & tables() {
    static const encoder_tables t;
    return t;
}

static float sum_product(const float * a, const float * b, int n) {
    __m512 acc = _mm512_setzero_ps();
    for (int i = 0; i < n; i += 16) {
        const __mmask16 k = n - i >= 16 ? 0xffff : (__mmask16) ((1u << (n - i)) - 1);
        acc = _mm512_add_ps(acc, _mm512_mul_ps(_mm512_maskz_loadu_ps(k, a + i), _mm512_maskz_loadu_ps(k, b + i)));
    }
    return fold16(acc);
}

// Index of the nearest of n_sub levels: the number of limits below y.
PYTQ_INLINE zi nearest(__m512 y, const float * limit, int n_sub) {
    const __m512 lim = _mm512_load_ps(limit);
    zi i = _mm512_setzero_si512();
    for (int h = n_sub / 2; h > 0; h /= 2) {
        const __m512 probe = _mm512_permutexvar_ps(_mm512_add_epi32(i, _mm512_set1_epi32(h - 1)), lim);
        i = _mm512_mask_add_epi32(i, _mm512_cmp_ps_mask(y, probe, _CMP_GT_OQ), i, _mm512_set1_epi32(h));
    }
    return i;
}

// One vector on its way through the encoder.
struct trellis_job {
    alignas(64) uint8_t best[4][PYTQ_MAX_HEAD_DIM];
    alignas(64) uint16_t decision[PYTQ_MAX_HEAD_DIM][4]; // set where the older bit differs from location bit b
    const float * x;
    uint8_t * out;
    int e[PYTQ_MAX_GROUPS];
    unsigned loc; // where the best path ends
    uint64_t u[4];
};

typedef float cost_table[PYTQ_MAX_HEAD_DIM * 4]; // 16 coordinates: [t & 3][t >> 2 & 3][subset]

// Registers R and R + D, where the two predecessors of a state lie in both.
template <int PHASE, int R, int D>
PYTQ_INLINE void across_registers(const __m512 * x, __m512 * m, uint16_t * decision) {
    constexpr int c = cost_index(PHASE, 16 * R);
    const __m512 ax = _mm512_add_ps(m[R], x[c]), by = _mm512_add_ps(m[R + D], x[c ^ 2]);
    const __m512 ay = _mm512_add_ps(m[R], x[c ^ 2]), bx = _mm512_add_ps(m[R + D], x[c]);
    decision[R] = (uint16_t) _mm512_cmp_ps_mask(by, ax, _CMP_LT_OQ);
    decision[R + D] = (uint16_t) _mm512_cmp_ps_mask(ay, bx, _CMP_LE_OQ);
    m[R] = _mm512_min_ps(by, ax);
    m[R + D] = _mm512_min_ps(bx, ay);
}

// Register R, where they lie in two of its lanes.
template <int PHASE, int R> PYTQ_INLINE void across_lanes(const __m512 * x, __m512 * m, uint16_t * decision) {
    constexpr int B = 5 - PHASE, c = cost_index(PHASE, 16 * R);
    constexpr unsigned ones = B == 3 ? 0xff00 : B == 2 ? 0xf0f0 : B == 1 ? 0xcccc : 0xaaaa;
    const __m512 v = m[R];
    const __m512 w = B == 3   ? _mm512_shuffle_f32x4(v, v, 0x4e)
                     : B == 2 ? _mm512_shuffle_f32x4(v, v, 0xb1)
                     : B == 1 ? _mm512_permute_ps(v, 0x4e)
                              : _mm512_permute_ps(v, 0xb1);
    const __m512 vx = _mm512_add_ps(v, x[c]), wy = _mm512_add_ps(w, x[c ^ 2]);
    // wy < vx, but wy <= vx in the lanes where location bit B is 1: metrics are not negative, so their bits order them
    const zi limit = _mm512_add_epi32(_mm512_castps_si512(vx), _mm512_maskz_set1_epi32((__mmask16) ones, 1));
    decision[R] = (uint16_t) _mm512_cmplt_epi32_mask(_mm512_castps_si512(wy), limit);
    m[R] = _mm512_min_ps(vx, wy);
}

// Spelled out register by register: a loop that is not unrolled would keep the metrics in memory.
template <int PHASE>
PYTQ_INLINE void viterbi_step(const encoder_tables & tab, const float * cost4, __m512 * m, uint16_t * decision) {
    const __m512 cost = _mm512_broadcast_f32x4(_mm_load_ps(cost4));
    const __m512 x[4] = {_mm512_permutevar_ps(cost, _mm512_load_si512(tab.x[PHASE][0])),
                         _mm512_permutevar_ps(cost, _mm512_load_si512(tab.x[PHASE][1])),
                         _mm512_permutevar_ps(cost, _mm512_load_si512(tab.x[PHASE][2])),
                         _mm512_permutevar_ps(cost, _mm512_load_si512(tab.x[PHASE][3]))};
    if (PHASE == 0) {
        across_registers<0, 0, 2>(x, m, decision);
        across_registers<0, 1, 2>(x, m, decision);
    } else if (PHASE == 1) {
        across_registers<1, 0, 1>(x, m, decision);
        across_registers<1, 2, 1>(x, m, decision);
    } else {
        across_lanes<PHASE, 0>(x, m, decision);
        across_lanes<PHASE, 1>(x, m, decision);
        across_lanes<PHASE, 2>(x, m, decision);
        across_lanes<PHASE, 3>(x, m, decision);
    }
}

PYTQ_INLINE const float * cost_of(const float * cost, int t) {
    return cost + (t & ~15) * 4 + (t & 3) * 16 + (t >> 2 & 3) * 4;
}

// Decisions of every step and the location where the best path ends.
static void viterbi(const cost_table & cost, int d, trellis_job * w) {
    const encoder_tables & tab = tables();
    __m512 m[4];
    m[1] = m[2] = m[3] = _mm512_set1_ps(1e30f);
    m[0] = _mm512_mask_mov_ps(m[1], 1, _mm512_setzero_ps());
    int t = 0;
    for (; t + 6 <= d; t += 6) {
        viterbi_step<0>(tab, cost_of(cost, t), m, w->decision[t]);
        viterbi_step<1>(tab, cost_of(cost, t + 1), m, w->decision[t + 1]);
        viterbi_step<2>(tab, cost_of(cost, t + 2), m, w->decision[t + 2]);
        viterbi_step<3>(tab, cost_of(cost, t + 3), m, w->decision[t + 3]);
        viterbi_step<4>(tab, cost_of(cost, t + 4), m, w->decision[t + 4]);
        viterbi_step<5>(tab, cost_of(cost, t + 5), m, w->decision[t + 5]);
    }
    if (t < d) {
        viterbi_step<0>(tab, cost_of(cost, t), m, w->decision[t]);
    }
    if (t + 1 < d) {
        viterbi_step<1>(tab, cost_of(cost, t + 1), m, w->decision[t + 1]);
    }
    if (t + 2 < d) {
        viterbi_step<2>(tab, cost_of(cost, t + 2), m, w->decision[t + 2]);
    }
    if (t + 3 < d) {
        viterbi_step<3>(tab, cost_of(cost, t + 3), m, w->decision[t + 3]);
    }
    if (t + 4 < d) {
        viterbi_step<4>(tab, cost_of(cost, t + 4), m, w->decision[t + 4]);
    }
    const __m512 top =
        _mm512_set1_ps(_mm512_reduce_min_ps(_mm512_min_ps(_mm512_min_ps(m[0], m[1]), _mm512_min_ps(m[2], m[3]))));
    uint64_t ties = 0;
    for (int r = 0; r < 4; r++) {
        ties |= (uint64_t) _mm512_cmp_ps_mask(m[r], top, _CMP_EQ_OQ) << (16 * r);
    }
    // of equal metrics the lowest state wins; state bit k is location bit (k - d) mod 6
    int lowest = PYTQ_TRELLIS_STATES;
    for (; ties; ties &= ties - 1) {
        const int l = __builtin_ctzll(ties);
        int state = 0;
        for (int k = 0; k < 6; k++) {
            state |= (l >> ((k - d % 6 + 6) % 6) & 1) << k;
        }
        if (state < lowest) {
            lowest = state;
            w->loc = (unsigned) l;
        }
    }
}

// Coded bits of N best paths. One path is a chain of some ten cycles per step, so several are followed at once.
template <int N> void trace_back(trellis_job * w, int d) {
    unsigned loc[N];
    uint64_t word[N];
    for (int v = 0; v < N; v++) {
        loc[v] = w[v].loc;
        word[v] = 0;
    }
    for (int b = 5 - (d - 1) % 6, i = d - 1; i >= 0; i--) {
        for (int v = 0; v < N; v++) {
            uint64_t bits;
            memcpy(&bits, w[v].decision[i], 8);
            word[v] = word[v] << 1 | (loc[v] >> b & 1);
            loc[v] ^= (unsigned) (bits >> loc[v] & 1) << b;
            if (i % 64 == 0) {
                w[v].u[i / 64] = word[v];
                word[v] = 0;
            }
        }
        b = b == 5 ? 0 : b + 1;
    }
}

static int log8_encode(float sigma) {
    static const float limit[8] = {0x1.0b5586p+0f, 0x1.2387a6p+0f, 0x1.3dea64p+0f, 0x1.5ab07ep+0f,
                                   0x1.7a1148p+0f, 0x1.9c4918p+0f, 0x1.c199bep+0f, 0x1.ea4afap+0f};
    if (!(sigma > 0.0f)) {
        return 0;
    }
    int exponent, k = 0;
    const float m = frexpf(sigma, &exponent) * 2.0f;
    for (int i = 0; i < 8; i++) {
        k += m >= limit[i];
    }
    const int e = 8 * (exponent - 1) + k + PYTQ_LOG8_BIAS;
    return e < 1 ? 0 : e > 255 ? 255 : e;
}

static void store_plane(const pytq_type_info * t, int p, int word, uint64_t bits, uint8_t * out) {
    const int bytes = t->plane_len[p] / 8 - 8 * word;
    if (bytes > 0) {
        memcpy(out + t->plane_off[p] + 8 * word, &bits, (size_t) (bytes < 8 ? bytes : 8));
    }
}

static void search_trellis(const pytq_type_info * t, const float * x, uint8_t * out, trellis_job * w) {
    const float * log8 = pytq_log8_table();
    const int d = t->head_dim;
    alignas(64) cost_table cost;
    int * const e = w->e;
    w->x = x;
    w->out = out;
    for (int g = 0, at = 0; g < t->n_groups; at += t->group_len[g++]) {
        const int n = t->group_len[g];
        const search_table & s = tables().table[PYTQ_CODE_TRELLIS][t->group_bits[g]];
        e[g] = log8_encode(sqrtf(sum_product(x + at, x + at, n) / (float) n));
        const float f = log8[e[g]] * s.step;
        const __m512 inv = _mm512_set1_ps(e[g] ? 1.0f / f : 0.0f);
        const __m512 weight = _mm512_set1_ps(t->n_groups == 1 ? 1.0f : f * f);
        // 16 aligned coordinates at a time; where a group begins or ends inside, its part replaces what is there
        for (int i = at & ~15; i < at + n; i += 16) {
            const int skip = i < at ? at - i : 0, stop = at + n - i < 16 ? at + n - i : 16;
            const __mmask16 mine = (__mmask16) (((1u << stop) - 1) & ~((1u << skip) - 1));
            const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(mine, x + i), inv);
            __m512 c[4];
            for (int z = 0; z < 4; z++) {
                const zi k = nearest(y, s.limit[z], s.n_sub);
                const __m512 err = _mm512_sub_ps(y, _mm512_permutexvar_ps(k, _mm512_load_ps(s.level[z])));
                c[z] = _mm512_mul_ps(weight, _mm512_mul_ps(err, err));
                _mm512_mask_cvtepi32_storeu_epi8(w->best[z] + i, mine, k);
            }
            const zi lo = _mm512_castps_si512(_mm512_unpacklo_ps(c[0], c[1])),
                     hi = _mm512_castps_si512(_mm512_unpackhi_ps(c[0], c[1]));
            const zi lo2 = _mm512_castps_si512(_mm512_unpacklo_ps(c[2], c[3])),
                     hi2 = _mm512_castps_si512(_mm512_unpackhi_ps(c[2], c[3]));
            const zi rows[4] = {_mm512_unpacklo_epi64(lo, lo2), _mm512_unpackhi_epi64(lo, lo2),
                                _mm512_unpacklo_epi64(hi, hi2), _mm512_unpackhi_epi64(hi, hi2)};
            for (int k = 0; k < 4; k++) {
                unsigned lanes = 0; // coordinate 4 j + k is lane group j
                for (int j = 0; j < 4; j++) {
                    lanes |= (mine >> (4 * j + k) & 1) ? 0xfu << (4 * j) : 0;
                }
                _mm512_mask_store_epi32(cost + i * 4 + k * 16, (__mmask16) lanes, rows[k]);
            }
        }
    }
    viterbi(cost, d, w);
}

static void store_trellis(const pytq_type_info * t, const trellis_job * w) {
    const float * log8 = pytq_log8_table();
    const int d = t->head_dim;
    const float * const x = w->x;
    const int * const e = w->e;
    uint8_t * const out = w->out;
    alignas(64) float level[PYTQ_MAX_HEAD_DIM];
    for (int word = 0; 64 * word < d; word++) {
        const uint64_t now = w->u[word], before = word ? w->u[word - 1] : 0;
        auto delayed = [&](int k) { return now << k | before >> (64 - k); };
        const uint64_t z1 = now ^ delayed(5) ^ delayed(6), z0 = delayed(2) ^ delayed(4);
        const uint8_t * b = w->best[0] + 64 * word;
        const size_t stride = PYTQ_MAX_HEAD_DIM;
        const zi n0 = _mm512_mask_blend_epi8(z0, _mm512_loadu_si512(b), _mm512_loadu_si512(b + stride));
        const zi n1 =
            _mm512_mask_blend_epi8(z0, _mm512_loadu_si512(b + 2 * stride), _mm512_loadu_si512(b + 3 * stride));
        const zi n = _mm512_mask_blend_epi8(z1, n0, n1);
        store_plane(t, 0, word, now, out);
        for (int p = 1; p < t->n_planes; p++) {
            store_plane(t, p, word, _mm512_test_epi8_mask(n, _mm512_set1_epi8((char) (1 << (p - 1)))), out);
        }
        const zi z = _mm512_or_si512(_mm512_maskz_set1_epi8(z1, 2), _mm512_maskz_set1_epi8(z0, 1));
        const zi index = _mm512_or_si512(_mm512_and_si512(_mm512_slli_epi16(n, 2), _mm512_set1_epi8(0x3c)), z);
        zi lv = _mm512_setzero_si512();
        for (int g = 0, at = 0; g < t->n_groups; at += t->group_len[g++]) {
            const int from = at - 64 * word, to = from + t->group_len[g];
            if (from < 64 && to > 0) {
                const uint64_t below = to >= 64 ? ~0ull : (1ull << to) - 1;
                const uint64_t mine = from > 0 ? below & ~((1ull << from) - 1) : below;
                lv = _mm512_mask_permutexvar_epi8(
                    lv, mine, index, _mm512_load_si512(tables().table[PYTQ_CODE_TRELLIS][t->group_bits[g]].all));
            }
        }
        alignas(64) int8_t bytes[64];
        _mm512_store_si512(bytes, lv);
        for (int i = 0; i < 64; i += 16) {
            _mm512_store_ps(level + 64 * word + i,
                            _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_load_si128((const __m128i *) (bytes + i)))));
        }
    }
    for (int g = 0, at = 0; g < t->n_groups; at += t->group_len[g++]) {
        const int n = t->group_len[g];
        const float step = tables().table[PYTQ_CODE_TRELLIS][t->group_bits[g]].step;
        const float xl = sum_product(x + at, level + at, n), ll = sum_product(level + at, level + at, n);
        int best = e[g];
        float best_err = 0.0f;
        for (int k = 0; k < 3 && e[g] > 0; k++) {
            const int cand = e[g] + (k == 1 ? -1 : k == 2 ? 1 : 0);
            if (cand < 1 || cand > 255) {
                continue;
            }
            const float f = log8[cand] * step, fll = f * ll, err = f * (fll - 2.0f * xl);
            if (k == 0 || err < best_err) {
                best = cand;
                best_err = err;
            }
        }
        out[g] = (uint8_t) best;
    }
}

static void encode_scalar(const pytq_type_info * t, const float * x, uint8_t * out) {
    const int d = t->head_dim;
    const search_table & s = tables().table[PYTQ_CODE_SCALAR][t->group_bits[0]];
    alignas(64) float level[PYTQ_MAX_HEAD_DIM];
    alignas(64) uint8_t index[PYTQ_MAX_HEAD_DIM];
    const float ss = sum_product(x, x, d);
    const __m512 inv = _mm512_set1_ps(1.0f / (sqrtf(ss / (float) d) * s.step));
    for (int i = 0; i < d; i += 16) {
        const zi k = nearest(_mm512_mul_ps(_mm512_loadu_ps(x + i), inv), s.limit[0], s.n_sub);
        _mm512_store_ps(level + i, _mm512_permutexvar_ps(k, _mm512_load_ps(s.level[0])));
        _mm_store_si128((__m128i *) (index + i), _mm512_cvtepi32_epi8(k));
    }
    for (int word = 0; 64 * word < d; word++) {
        const zi k = _mm512_load_si512(index + 64 * word);
        for (int p = 0; p < t->n_planes; p++) {
            store_plane(t, p, word, _mm512_test_epi8_mask(k, _mm512_set1_epi8((char) (1 << p))), out);
        }
    }
    const float ll = sum_product(level, level, d);
    const float scale = sqrtf(ss / ll) / s.step;
    const uint16_t h = scale < 65504.0f
                           ? (uint16_t) _mm_extract_epi16(_mm_cvtps_ph(_mm_set_ss(scale), _MM_FROUND_TO_NEAREST_INT), 0)
                           : 0x7bff;
    memcpy(out, &h, 2);
}

static void finish_trellis(const pytq_type_info * t, trellis_job * w, int n) {
    switch (n) {
        case 4:
            trace_back<4>(w, t->head_dim);
            break;
        case 3:
            trace_back<3>(w, t->head_dim);
            break;
        case 2:
            trace_back<2>(w, t->head_dim);
            break;
        case 1:
            trace_back<1>(w, t->head_dim);
            break;
        default:
            break;
    }
    for (int v = 0; v < n; v++) {
        store_trellis(t, w + v);
    }
}

void Tier::quantize(const pytq_type_info * t, const float * x, void * y, int64_t n) {
    uint8_t * out = (uint8_t *) y;
    trellis_job jobs[4];
    int waiting = 0;
    for (int64_t at = 0; at < n; at += t->head_dim, out += t->block_bytes, x += t->head_dim) {
        __m512 top = _mm512_setzero_ps();
        __mmask16 bad = 0;
        for (int i = 0; i < t->head_dim; i += 16) {
            const __m512 a = _mm512_abs_ps(_mm512_loadu_ps(x + i));
            bad |= _mm512_cmp_ps_mask(a, _mm512_set1_ps(3.4028234e38f), _CMP_NLE_UQ);
            top = _mm512_max_ps(top, a);
        }
        const float m = _mm512_reduce_max_ps(top);
        if (bad || !(m >= 0x1p-40f && m <= 0x1p40f)) {
            pytq_quantize_ref(t, x, out, t->head_dim); // zero, non-finite or out of range: rare
        } else if (t->code == PYTQ_CODE_SCALAR) {
            encode_scalar(t, x, out);
        } else {
            search_trellis(t, x, out, &jobs[waiting++]);
            if (waiting == 4) {
                finish_trellis(t, jobs, waiting);
                waiting = 0;
            }
        }
    }
    finish_trellis(t, jobs, waiting);
}

void Tier::dequantize(const pytq_type_info * t, const void * y, float * x, int64_t n) {
    const uint8_t * in = (const uint8_t *) y;
    for (int64_t at = 0; at < n; at += t->head_dim, in += t->block_bytes, x += t->head_dim) {
        uint64_t before = 0;
        for (int word = 0; 64 * word < t->head_dim; word++) {
            uint64_t plane[PYTQ_MAX_PLANES];
            for (int p = 0; p < t->n_planes; p++) {
                const int bytes = t->plane_len[p] / 8 - 8 * word;
                plane[p] = 0;
                if (bytes > 0) {
                    memcpy(&plane[p], in + t->plane_off[p] + 8 * word, (size_t) (bytes < 8 ? bytes : 8));
                }
            }
            zi index = _mm512_setzero_si512();
            int low = 0;
            if (t->code == PYTQ_CODE_TRELLIS) {
                const uint64_t u = plane[0];
                auto delayed = [&](int k) { return u << k | before >> (64 - k); };
                index = _mm512_mask_blend_epi8(u ^ delayed(5) ^ delayed(6), index, _mm512_set1_epi8(2));
                index = _mm512_mask_add_epi8(index, delayed(2) ^ delayed(4), index, _mm512_set1_epi8(1));
                before = u;
                low = 1;
            }
            for (int p = low; p < t->n_planes; p++) {
                index = _mm512_mask_add_epi8(index, plane[p], index, _mm512_set1_epi8((char) (1 << (p + low))));
            }
            alignas(64) int8_t bytes[64];
            for (int g = 0, g0 = 0; g < t->n_groups; g0 += t->group_len[g++]) {
                const int from = g0 > 64 * word ? g0 : 64 * word;
                const int to = g0 + t->group_len[g] < 64 * word + 64 ? g0 + t->group_len[g] : 64 * word + 64;
                if (from >= to) {
                    continue;
                }
                const search_table & s = tables().table[t->code][t->group_bits[g]];
                _mm512_store_si512(bytes, _mm512_permutexvar_epi8(index, _mm512_load_si512(s.all)));
                float factor;
                if (t->scale == PYTQ_SCALE_LOG8) {
                    factor = pytq_log8_table()[in[g]] * s.step;
                } else {
                    factor = _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(in[2 * g] | in[2 * g + 1] << 8))) * s.step;
                }
                for (int i = from; i < to; i += 8) {
                    const __m256 v = _mm256_cvtepi32_ps(
                        _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *) (bytes + i - 64 * word))));
                    _mm256_storeu_ps(x + i, _mm256_mul_ps(v, _mm256_set1_ps(factor)));
                }
            }
        }
    }
}

const pytq_cpu_tier_row row = {
    "avx512",      PYTQ_CAP_AVX2 | PYTQ_CAP_AVX512, Tier::quantize, Tier::dequantize, run_item<Tier>, run_merge<Tier>,
    run_fwht<Tier>};

} // namespace

extern "C" {
const pytq_cpu_tier_row * const pytq_tier_avx512 = &row;
}

#if defined(__clang__)
#pragma clang attribute pop
#endif

#else

extern "C" {
const pytq_cpu_tier_row * const pytq_tier_avx512 = nullptr;
}

#endif

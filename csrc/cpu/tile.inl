// Attention on tiles of the cache, shared by all CPU tiers. Each csrc/cpu/<isa>.cpp includes this file after it has set its
// target and declared a struct Tier, so every tier compiles its own copy with its own instructions.
//
//   rows of q ---- Tier::q_row ---> A (int8 pairs or int16)
//   128 blocks of K - Tier::k_tile -> X[lane = token]  - Tier::qk -> S --+ softmax against the tile's own maximum
//   128 blocks of V - Tier::v_tile -> X[lane = coord]  - Tier::pv -> O <-+ weights p * scale_v as 15 or 16-bit integers
//
// A tile is unpacked once for up to PYTQ_BLOCK_ROWS rows: the query heads of one KV head, times query positions. Weights are
// integers relative to the tile's largest weight, so a tile with small weights keeps its precision next to an attention sink.
// Formats without integer levels (f16, q8_0, ... beside a pytq type, and split-rate values) take the float tile below.
//
// All tiers return the same bits: integer sums are exact, every float operation is the scalar tier's, and what is fused or
// added across lanes is so in one order everywhere (PYTQ_FMA, hsum). Without that, the last bit of a logit flips codes that
// later layers store, and the tiers would differ by several percent of a KL divergence, in either direction.
#include "tiers.h"

#include <math.h>
#include <string.h>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace {

constexpr int T = PYTQ_TILE;
constexpr int RB = PYTQ_BLOCK_ROWS;
constexpr float NEG_INF = -INFINITY;

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef float vf_u __attribute__((vector_size(64), aligned(4), may_alias));

#define PYTQ_INLINE static inline __attribute__((always_inline))

PYTQ_INLINE vf load(const float *p) { return *(const vf_u *) p; }
PYTQ_INLINE void store(float *p, vf v) { *(vf_u *) p = v; }
PYTQ_INLINE vf splat(float x) { return vf{} + x; }

// The tier defines PYTQ_FMA(a, b, c) = a * b + c with one rounding; contraction is off for the whole library.

// Largest magnitude of queries and weights as integers: two signed bytes, value = 256 high + low.
constexpr float FIXED_MAX = 32512.0f;

// e^x for x <= 0, relative error below 4e-6; 0 for x < -87. A tier may spell the same operations with its instructions.
PYTQ_INLINE vf exp_neg(vf x) {
    const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    const vf low = splat(-87.0f);
    const auto keep = x >= low;
    x = keep ? x : low;
    const vf n = x * 1.44269504f + magic - magic;
    const vf r = PYTQ_FMA(n, splat(2.12194440e-4f), PYTQ_FMA(n, splat(-0.693359375f), x));
    vf p = splat(8.3334519073e-3f);
    p = PYTQ_FMA(p, r, splat(4.1665795894e-2f));
    p = PYTQ_FMA(p, r, splat(1.6666665459e-1f));
    p = PYTQ_FMA(p, r, splat(5.0000001201e-1f));
    p = PYTQ_FMA(p, r, splat(1.0f));
    p = PYTQ_FMA(p, r, splat(1.0f));
    const vi e = (__builtin_convertvector(n, vi) + 127) << 23;
    return keep ? p * (vf) e : vf{};
}

PYTQ_INLINE float hmax(vf v) {
    float m = v[0];
    for (int i = 1; i < 16; i++) {
        m = v[i] > m ? v[i] : m;
    }
    return m;
}

// By halves: lane i with lane i + 8, then 4, 2, 1.
PYTQ_INLINE float hsum(vf v) {
    float s[16];
    store(s, v);
    for (int w = 8; w > 0; w /= 2) {
        for (int i = 0; i < w; i++) {
            s[i] += s[i + w];
        }
    }
    return s[0];
}

static inline float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t) (h & 0x8000) << 16, e = h >> 10 & 31, m = h & 1023;
    union { uint32_t u; float f; } v;
    if (e == 0) {
        v.f = (float) m * 0x1p-24f;
        v.u |= sign;
    } else {
        v.u = sign | (e == 31 ? 0x7f800000u : (e + 112) << 23) | m << 13;
    }
    return v.f;
}

PYTQ_INLINE vf load_half(const uint16_t *p) {
    vf v;
    for (int i = 0; i < 16; i++) {
        v[i] = half_to_float(p[i]);
    }
    return v;
}

// Row of q as int16, for tiers that multiply 16-bit integers.
static inline void q_row_16(const float *q, int d, float scale, uint8_t *a, float *q_scale) {
    float m = 0.0f;
    for (int c = 0; c < d; c++) {
        m = fabsf(q[c]) > m ? fabsf(q[c]) : m;
    }
    const float inv = m > 0.0f ? FIXED_MAX / m : 0.0f;
    *q_scale = m / FIXED_MAX * scale;
    for (int c = 0; c < d; c++) {
        const int16_t v = (int16_t) lrintf(q[c] * inv);
        memcpy(a + 2 * c, &v, 2);
    }
}

enum mask_state { MASK_ZERO, MASK_MIXED, MASK_OUT };

// What a row of the mask says about one tile; *seen: tokens up to the last one that is not masked out.
static inline mask_state classify(const uint16_t *m, int n, int *seen) {
    unsigned any = 0;
    int last = 0;
    for (int i = 0; i < n; i++) {
        any |= m[i];
        last = m[i] != 0xfc00u ? i + 1 : last;
    }
    *seen = last;
    return any == 0 ? MASK_ZERO : last == 0 ? MASK_OUT : MASK_MIXED;
}

// ------------------------------------------------------------------------------------------------ float tiles

typedef struct {
    const pytq_type_info *t;  // NULL: to_float
    bool integer;
    const uint8_t *rows;  // first token of the item's head and stream
    size_t stride;
} kv_rows;

template <class Tier>
void float_row(const pytq_attn_kv *kv, const kv_rows *r, const uint8_t *row, int d, float *out) {
    if (r->t) {
        Tier::dequantize(r->t, row, out, d);
    } else {
        kv->to_float(row, out, d);
    }
}

// x[c][T], lane = token
template <class Tier>
void k_tile_float(const pytq_attn_kv *kv, const kv_rows *r, int at, int n, int d, float *x) {
    float tmp[16][PYTQ_MAX_HEAD_DIM];
    for (int i0 = 0; i0 < n; i0 += 16) {
        for (int i = 0; i < 16; i++) {
            if (i0 + i < n) {
                float_row<Tier>(kv, r, r->rows + (size_t) (at + i0 + i) * r->stride, d, tmp[i]);
            } else {
                memset(tmp[i], 0, (size_t) d * sizeof(float));
            }
        }
        for (int c = 0; c < d; c++) {
            for (int i = 0; i < 16; i++) {
                x[c * T + i0 + i] = tmp[i][c];
            }
        }
    }
}

// x[token][dp], lane = coordinate
template <class Tier>
void v_tile_float(const pytq_attn_kv *kv, const kv_rows *r, int at, int n, int d, int dp, float *x) {
    for (int i = 0; i < n; i++) {
        float_row<Tier>(kv, r, r->rows + (size_t) (at + i) * r->stride, d, x + i * dp);
    }
}

// acc[i][j] = sum over k of a[i][k] * x[k][16 j ..]
template <int NR>
PYTQ_INLINE void dot_float(const float *a, size_t lda, const float *x, size_t ldx, int nk, vf *acc) {
    for (int i = 0; i < NR; i++) {
        acc[i] = vf{};
    }
    for (int k = 0; k < nk; k++) {
        const vf xv = load(x + (size_t) k * ldx);
        for (int i = 0; i < NR; i++) {
            acc[i] = PYTQ_FMA(xv, splat(a[(size_t) i * lda + k]), acc[i]);
        }
    }
}

template <int NR>
void qk_float_rows(const float *a, int d, const float *x, int n, float *s) {
    for (int j = 0; j < n; j += 16) {
        vf acc[NR];
        dot_float<NR>(a, (size_t) d, x + j, T, d, acc);
        for (int i = 0; i < NR; i++) {
            store(s + i * T + j, acc[i]);
        }
    }
}

static void qk_float(const float *a, int nr, int d, const float *x, int n, float *s) {
    int r = 0;
    for (; r + 4 <= nr; r += 4) {
        qk_float_rows<4>(a + (size_t) r * d, d, x, n, s + r * T);
    }
    for (; r < nr; r++) {
        qk_float_rows<1>(a + (size_t) r * d, d, x, n, s + r * T);
    }
}

template <int NR>
void pv_float_rows(const float *w, const float *x, int dp, int n, const float *corr, const float *f, float *o) {
    for (int j = 0; j < dp; j += 16) {
        vf acc[NR];
        dot_float<NR>(w, T, x + j, (size_t) dp, n, acc);
        for (int i = 0; i < NR; i++) {
            store(o + (size_t) i * dp + j, PYTQ_FMA(acc[i], splat(f[i]), load(o + (size_t) i * dp + j) * corr[i]));
        }
    }
}

static void pv_float(const float *w, int nr, const float *x, int dp, int n, const float *corr, const float *f, float *o) {
    int r = 0;
    for (; r + 4 <= nr; r += 4) {
        pv_float_rows<4>(w + r * T, x, dp, n, corr + r, f + r, o + (size_t) r * dp);
    }
    for (; r < nr; r++) {
        pv_float_rows<1>(w + r * T, x, dp, n, corr + r, f + r, o + (size_t) r * dp);
    }
}

// ------------------------------------------------------------------------------------------------ Walsh-Hadamard transform

// All in registers: the 16 lanes of each first (Tier::fwht16), then pairs of registers.
template <class Tier, int N>
void fwht_row(const float *x, float *y, float scale) {
    vf r[N / 16];
    for (int i = 0; i < N / 16; i++) {
        r[i] = Tier::fwht16(load(x + 16 * i) * scale);
    }
    for (int len = 1; len < N / 16; len *= 2) {
        for (int i = 0; i < N / 16; i++) {
            if ((i & len) == 0) {
                const vf u = r[i], v = r[i + len];
                r[i] = u + v;
                r[i + len] = u - v;
            }
        }
    }
    for (int i = 0; i < N / 16; i++) {
        store(y + 16 * i, r[i]);
    }
}

template <class Tier>
void run_fwht(const float *x, float *y, int n, float scale) {
    switch (n) {
        case 32: fwht_row<Tier, 32>(x, y, scale); break;
        case 64: fwht_row<Tier, 64>(x, y, scale); break;
        case 128: fwht_row<Tier, 128>(x, y, scale); break;
        case 256: fwht_row<Tier, 256>(x, y, scale); break;
        default: fwht_row<Tier, 512>(x, y, scale); break;
    }
}

// ------------------------------------------------------------------------------------------------ softmax of one row and tile

typedef struct {
    float max, sum;
} row_state;

// s: T logits of which n count. Writes weights (integers times vscale, or floats), the factor for what was summed before
// and the factor of this tile.
template <class Tier>
PYTQ_INLINE void softmax_row(float *s, int n, float softcap, mask_state state, const uint16_t *mask, float slope, const float *vscale,
                             uint8_t *w, row_state *st, float *corr, float *f) {
    vf mx = splat(NEG_INF);
    for (int j = 0; j < n; j += 16) {
        vf v = load(s + j);
        if (softcap != 0.0f) {
            // tanh(|x|) = (1 - e^-2|x|) / (1 + e^-2|x|)
            const vf ax = v < 0.0f ? -v : v;
            const vf e = exp_neg(ax * -2.0f);
            const vf th = (1.0f - e) / (1.0f + e) * softcap;
            v = v < 0.0f ? -th : th;
        }
        if (j + 16 > n) {
            uint16_t pad[16];
            for (int i = 0; i < 16; i++) {
                pad[i] = j + i >= n ? 0xfc00 : state == MASK_MIXED ? mask[j + i] : 0;
            }
            v = v + slope * load_half(pad);
            store(s + j, v);
        } else if (state == MASK_MIXED) {
            v = v + slope * Tier::halves(mask + j);
            store(s + j, v);
        } else if (softcap != 0.0f) {
            store(s + j, v);
        }
        mx = Tier::maximum(v, mx);
    }
    const float m = Tier::max16(mx);
    if (m == NEG_INF) {
        memset(w, 0, 4 * T);
        *corr = 1.0f;
        *f = 0.0f;
        return;
    }
    vf sum = vf{};
    for (int j = 0; j < n; j += 16) {
        const vf p = Tier::exp(load(s + j) - m);
        sum += p;
        if (vscale) {
            Tier::store_weights(w, j, p * load(vscale + j));
        } else {
            store((float *) w + j, p);
        }
    }
    const float top = m > st->max ? m : st->max;
    // what expf returns there, without the call: the usual case of a short cache
    *corr = st->max == NEG_INF ? 0.0f : expf(st->max - top);
    *f = m == top ? 1.0f : expf(m - top);
    st->sum = st->sum * *corr + Tier::sum16(sum) * *f;
    st->max = top;
}

// ------------------------------------------------------------------------------------------------ one item

static inline size_t up64(size_t n) { return (n + 63) & ~(size_t) 63; }

static inline float head_slope(const pytq_attn *a, int h) {
    if (!(a->max_bias > 0.0f)) {
        return 1.0f;
    }
    const int pow2 = 1 << (int) floor(log2((double) a->n_head));
    const float m0 = powf(2.0f, -a->max_bias / (float) pow2), m1 = powf(2.0f, -a->max_bias / 2.0f / (float) pow2);
    return h < pow2 ? powf(m0, (float) (h + 1)) : powf(m1, (float) (2 * (h - pow2) + 1));
}

static inline float *partial_row(const pytq_attn *a, const pytq_attn_plan *p, void *partials, int chunk, int stream, int hk, int row) {
    const size_t width = 16 + PYTQ_MAX_HEAD_DIM;
    const size_t index = (((size_t) stream * a->n_head_kv + hk) * p->rows_per_kv_head + row) * p->n_chunks + chunk;
    return (float *) partials + index * width;
}

template <class Tier>
void write_row(const pytq_attn *a, const pytq_type_info *tv, int stream, int hk, int row, row_state st, const float *o) {
    const int gqa = a->n_head / a->n_head_kv;
    const int h = hk * gqa + row % gqa, iq = row / gqa;
    float out[PYTQ_MAX_HEAD_DIM];
    Tier::natural_order(tv, o, a->dv, out);
    float factor = 1.0f;
    if (a->sinks) {
        const float top = a->sinks[h] > st.max ? a->sinks[h] : st.max;
        factor = expf(st.max - top);
        st.sum = st.sum * factor + expf(a->sinks[h] - top);
    }
    factor = st.sum == 0.0f ? 0.0f : factor / st.sum;
    float *dst = a->dst + (((size_t) stream * a->n_q + iq) * a->n_head + h) * a->dv;
    for (int c = 0; c < a->dv; c++) {
        dst[c] = out[c] * factor;
    }
    if (a->rotate) {
        run_fwht<Tier>(dst, dst, a->dv, 1.0f / sqrtf((float) a->dv));
    }
}

// Asks for the blocks of the next tile while this one is worked on. Rows of a head lie apart by the rows of the others, and a
// cache that comes from memory would make every tile wait for its first lines.
PYTQ_INLINE void prefetch_tile(const kv_rows *r, int at, int end) {
    if (!r->t) {
        return;
    }
    const int stop = end - at < T ? end : at + T;
    for (int i = at; i < stop; i++) {
        const uint8_t *row = r->rows + (size_t) i * r->stride;
        for (int b = 0; b < r->t->block_bytes; b += 64) {
            __builtin_prefetch(row + b);
        }
        __builtin_prefetch(row + r->t->block_bytes - 1);
    }
}

template <class Tier>
void run_item(const pytq_attn *a, const pytq_attn_plan *plan, int item, void *scratch, void *partials) {
    // KV heads run fastest, so that the lines of a cache row that two heads share are still near
    int rest = item;
    const int hk = rest % a->n_head_kv;
    rest /= a->n_head_kv;
    const int chunk = rest % plan->n_chunks;
    rest /= plan->n_chunks;
    // the last block has the longest causal row: it goes first
    const int block = plan->n_blocks - 1 - rest % plan->n_blocks;
    const int stream = rest / plan->n_blocks;
    const int kv_stream = stream / (a->n_stream / a->n_stream_kv);

    const int gqa = a->n_head / a->n_head_kv;
    const int row0 = block * plan->block_rows;
    const int nr = plan->rows_per_kv_head - row0 < plan->block_rows ? plan->rows_per_kv_head - row0 : plan->block_rows;
    const int first = chunk * plan->chunk;
    const int end = a->n_kv - first < plan->chunk ? a->n_kv : first + plan->chunk;

    kv_rows k = {a->k.type < 0 ? NULL : pytq_type_get(a->k.type), false,
                 (const uint8_t *) a->k.data + hk * a->k.nb_head + kv_stream * a->k.nb_stream, a->k.nb_token};
    kv_rows v = {a->v.type < 0 ? NULL : pytq_type_get(a->v.type), false,
                 (const uint8_t *) a->v.data + hk * a->v.nb_head + kv_stream * a->v.nb_stream, a->v.nb_token};
    k.integer = k.t && Tier::k_integer(k.t);
    v.integer = v.t && Tier::v_integer(v.t);
    const pytq_type_info *order = v.integer ? v.t : NULL;
    const int dvp = v.integer ? Tier::v_width(v.t) : (a->dv + 15) & ~15;

    uint8_t *at = (uint8_t *) scratch;
    const size_t a_row = (size_t) a->dk * 4;
    uint8_t *qa = at;
    at += up64((size_t) RB * a_row);
    uint8_t *x = at;
    at += up64((size_t) T * PYTQ_MAX_HEAD_DIM * 4);
    float *s = (float *) at;
    at += up64(sizeof(float) * RB * T);
    uint8_t *w = at;
    at += up64((size_t) 4 * RB * T);
    float *o = (float *) at;

    alignas(64) float k_scale[PYTQ_MAX_GROUPS * T], v_scale[T];
    alignas(64) float q_scale[RB], corr[RB], f[RB], slope[RB];
    alignas(64) int32_t q_corr[PYTQ_MAX_GROUPS * RB];
    const uint16_t *mask[RB];
    row_state st[RB];

    mask_state state[RB];
    // What the rows see of the tile at i0; returns the tokens up to the last one that any row sees.
    auto look = [&](int i0) {
        const int whole = end - i0 < T ? end - i0 : T;
        int most = 0;
        for (int r = 0; r < nr; r++) {
            if (r > 0 && mask[r] == mask[r - 1]) {
                state[r] = state[r - 1];
                continue;
            }
            int seen = whole;
            state[r] = mask[r] ? Tier::mask_of(mask[r] + i0, whole, &seen) : MASK_ZERO;
            most = seen > most ? seen : most;
        }
        return most;
    };
    for (int r = 0; r < nr; r++) {
        const int iq = (row0 + r) / gqa, h = hk * gqa + (row0 + r) % gqa;
        mask[r] = !a->mask ? NULL
                           : (const uint16_t *) ((const char *) a->mask + iq * a->mask_nb_token + h % a->mask_n_head * a->mask_nb_head +
                                                 stream % a->mask_n_stream * a->mask_nb_stream);
    }
    // the blocks of the first tile are on their way while the queries are prepared
    const int first_end = first + look(first);
    prefetch_tile(&k, first, first_end);
    prefetch_tile(&v, first, first_end);

    const float scale = a->logit_softcap != 0.0f ? a->scale / a->logit_softcap : a->scale;
    for (int r = 0; r < nr; r++) {
        const int iq = (row0 + r) / gqa, h = hk * gqa + (row0 + r) % gqa;
        const float *q = (const float *) ((const char *) a->q + iq * a->q_nb_token + h * a->q_nb_head + stream * a->q_nb_stream);
        if (k.integer) {
            Tier::q_row(k.t, q, scale, qa + r * a_row, &q_scale[r], &q_corr[r]);
        } else {
            float *row = (float *) (qa + r * a_row);
            for (int c = 0; c < a->dk; c++) {
                row[c] = q[c] * scale;
            }
        }
        slope[r] = head_slope(a, h);
        st[r] = {NEG_INF, 0.0f};
    }
    memset(o, 0, (size_t) nr * dvp * sizeof(float));
    if (!k.integer || !v.integer) {
        memset(x, 0, (size_t) T * PYTQ_MAX_HEAD_DIM * 4);  // padding coordinates of the float tile
    }

    for (int i0 = first; i0 < end; i0 += T) {
        // Tokens behind the last one that any row sees are left alone: a cache that has just begun is mostly such.
        const int n = look(i0);
        if (n == 0) {
            continue;
        }
        const int readable = a->n_kv - i0;
        prefetch_tile(&k, i0 + T, end);
        if (k.integer) {
            Tier::k_tile(k.t, k.rows + (size_t) i0 * k.stride, k.stride, n, readable, x, k_scale);
            Tier::qk(k.t, qa, a_row, q_scale, q_corr, nr, n, x, k_scale, s);
        } else {
            k_tile_float<Tier>(&a->k, &k, i0, n, a->dk, (float *) x);
            qk_float((const float *) qa, nr, a->dk, (const float *) x, n, s);
        }
        float v_top = 1.0f;
        prefetch_tile(&v, i0 + T, end);
        if (v.integer) {
            Tier::v_tile(v.t, v.rows + (size_t) i0 * v.stride, v.stride, n, readable, x, v_scale);
            v_top = 0.0f;
            for (int j = 0; j < n; j++) {
                v_top = v_scale[j] > v_top ? v_scale[j] : v_top;
            }
            const float inv = v_top > 0.0f ? FIXED_MAX / v_top : 0.0f;
            for (int j = 0; j < ((n + 15) & ~15); j++) {
                v_scale[j] = j < n ? v_scale[j] * inv : 0.0f;
            }
            v_top /= FIXED_MAX;
        } else {
            v_tile_float<Tier>(&a->v, &v, i0, n, a->dv, dvp, (float *) x);
        }
        for (int r = 0; r < nr; r++) {
            if (state[r] == MASK_OUT) {
                memset(w + (size_t) r * 4 * T, 0, 4 * T);
                corr[r] = 1.0f;
                f[r] = 0.0f;
            } else {
                softmax_row<Tier>(s + r * T, n, a->logit_softcap, state[r], mask[r] ? mask[r] + i0 : NULL, slope[r],
                                  v.integer ? v_scale : NULL, w + (size_t) r * 4 * T, &st[r], &corr[r], &f[r]);
                f[r] *= v_top;
            }
        }
        if (v.integer) {
            Tier::pv(v.t, w, nr, n, x, corr, f, o);
        } else {
            pv_float((const float *) w, nr, (const float *) x, dvp, n, corr, f, o);
        }
    }

    for (int r = 0; r < nr; r++) {
        if (plan->n_chunks > 1) {
            float *p = partial_row(a, plan, partials, chunk, stream, hk, row0 + r);
            p[0] = st[r].max;
            p[1] = st[r].sum;
            memcpy(p + 16, o + (size_t) r * dvp, (size_t) dvp * sizeof(float));
        } else {
            write_row<Tier>(a, order, stream, hk, row0 + r, st[r], o + (size_t) r * dvp);
        }
    }
}

template <class Tier>
void run_merge(const pytq_attn *a, const pytq_attn_plan *plan, int thread, int n_threads, const void *partials) {
    if (plan->n_chunks < 2) {
        return;
    }
    const pytq_type_info *tv = a->v.type < 0 ? NULL : pytq_type_get(a->v.type);
    const bool integer = tv && Tier::v_integer(tv);
    const int dvp = integer ? Tier::v_width(tv) : (a->dv + 15) & ~15;
    const int rows = plan->rows_per_kv_head, total = a->n_stream * a->n_head_kv * rows;
    for (int i = thread; i < total; i += n_threads) {
        const int row = i % rows, hk = i / rows % a->n_head_kv, stream = i / rows / a->n_head_kv;
        row_state st = {NEG_INF, 0.0f};
        alignas(64) float o[PYTQ_MAX_HEAD_DIM] = {0};
        for (int c = 0; c < plan->n_chunks; c++) {
            const float *p = partial_row(a, plan, (void *) partials, c, stream, hk, row);
            st.max = p[0] > st.max ? p[0] : st.max;
        }
        for (int c = 0; c < plan->n_chunks && st.max != NEG_INF; c++) {
            const float *p = partial_row(a, plan, (void *) partials, c, stream, hk, row);
            const float f = expf(p[0] - st.max);
            st.sum += p[1] * f;
            for (int j = 0; j < dvp; j += 16) {
                store(o + j, load(o + j) + load(p + 16 + j) * f);
            }
        }
        write_row<Tier>(a, integer ? tv : NULL, stream, hk, row, st, o);
    }
}

}  // namespace

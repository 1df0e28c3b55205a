// Reference encoder and decoder of the cache types: scalar C, the one truth that every kernel is compared with.
//
// The order of every floating point operation is part of the format's definition (sums run over 16 lanes and are then
// folded by halves; products and sums are rounded separately), so NumPy, SIMD and GPU encoders can produce the same
// bytes. Compile with -ffp-contract=off.
//
// Encoder: TurboQuant (Zandieh et al., arXiv 2504.19874, section 3.1) for the SCALAR code; trellis-coded quantisation
// (Marcellin and Fischer, IEEE Trans. Comm. 38, 1990) with Ungerboeck's 64-state code for the TRELLIS code.
#include "../pytq.h"

#include <math.h>
#include <string.h>

#define LANES 16

// 2^(i/8) and the rounding limits 2^((i+1/2)/8)
static const float log8_mantissa[8] = {0x1.000000p+0f, 0x1.172b84p+0f, 0x1.306fe0p+0f, 0x1.4bfdaep+0f,
                                       0x1.6a09e6p+0f, 0x1.8ace54p+0f, 0x1.ae89fap+0f, 0x1.d5818ep+0f};
static const float log8_limit[8] = {0x1.0b5586p+0f, 0x1.2387a6p+0f, 0x1.3dea64p+0f, 0x1.5ab07ep+0f,
                                    0x1.7a1148p+0f, 0x1.9c4918p+0f, 0x1.c199bep+0f, 0x1.ea4afap+0f};

static float log8_decode(int e) {
    if (e == 0) {
        return 0.0f;
    }
    const int k = e - PYTQ_LOG8_BIAS + 256; // positive, so that / and % floor
    return ldexpf(log8_mantissa[k % 8], k / 8 - 32);
}

static int log8_encode(float sigma) {
    if (!(sigma > 0.0f)) {
        return 0;
    }
    int exponent;
    const float m = frexpf(sigma, &exponent) * 2.0f; // m in [1, 2), sigma = m * 2^(exponent - 1)
    int k = 0;
    while (k < 8 && m >= log8_limit[k]) {
        k++;
    }
    const int e = 8 * (exponent - 1) + k + PYTQ_LOG8_BIAS;
    return e < 1 ? 0 : e > 255 ? 255 : e;
}

const float * pytq_log8_table(void) {
    static const float table[256] = {
#include "log8.inc"
    };
    return table;
}

static float fold(float * acc) {
    for (int w = LANES / 2; w > 0; w /= 2) {
        for (int j = 0; j < w; j++) {
            acc[j] += acc[j + w];
        }
    }
    return acc[0];
}

static float sum_product(const float * a, const float * b, int n) {
    float acc[LANES] = {0};
    for (int i = 0; i < n; i++) {
        const float p = a[i] * b[i];
        acc[i % LANES] += p;
    }
    return fold(acc);
}

static uint16_t fp16_from_float(float x) { // round to nearest even, x >= 0, saturates at the largest finite half
    union {
        float f;
        uint32_t u;
    } v = {x};
    if (!(x < 65504.0f)) {
        return 0x7bff;
    }
    if (x < 0x1p-14f) { // subnormal half: units of 2^-24
        return (uint16_t) lrintf(x * 0x1p24f);
    }
    const uint32_t round = 0xfff + ((v.u >> 13) & 1);
    return (uint16_t) ((v.u + round - (112u << 23)) >> 13);
}

static float fp16_to_float(uint16_t h) {
    const int e = h >> 10 & 31, m = h & 1023;
    const float mag = e == 0 ? ldexpf((float) m, -24) : ldexpf((float) (1024 + m), e - 25);
    return h & 0x8000 ? -mag : mag;
}

// ------------------------------------------------------------------------------------------------ bit planes

static void plane_put(uint8_t * plane, int t, unsigned bit) {
    plane[t >> 3] |= (uint8_t) (bit << (t & 7));
}
static unsigned plane_get(const uint8_t * plane, int t) {
    return plane[t >> 3] >> (t & 7) & 1u;
}

static unsigned parity(unsigned w) {
    w ^= w >> 4;
    return 0x6996u >> (w & 15) & 1u;
}

static unsigned subset_of(unsigned window) {
    return 2 * parity(window & PYTQ_TRELLIS_TAPS1) + parity(window & PYTQ_TRELLIS_TAPS0);
}

// ------------------------------------------------------------------------------------------------ trellis search

// Nearest level of one subset: levels[4n + z], n < n_sub.
static int nearest_in_subset(float y, const float * levels, int n_sub, int z) {
    int n = 0;
    while (n + 1 < n_sub && y > 0.5f * (levels[4 * n + z] + levels[4 * n + 4 + z])) {
        n++;
    }
    return n;
}

typedef struct {
    float cost[4];   // weighted squared error of the best level of each subset
    uint8_t best[4]; // its index among all levels
} step_choice;

// One Viterbi pass over d steps from state 0 to any state. Ties keep the predecessor with the older bit 0 and the lower
// final state.
static float viterbi(const step_choice * steps, int d, uint8_t * index) {
    float metric[2][PYTQ_TRELLIS_STATES];
    uint64_t decision[PYTQ_MAX_HEAD_DIM];
    uint8_t subset[2][PYTQ_TRELLIS_STATES];
    for (unsigned s = 0; s < PYTQ_TRELLIS_STATES; s++) {
        metric[0][s] = s == 0 ? 0.0f : 1e30f;
        subset[0][s] = (uint8_t) subset_of(s);
        subset[1][s] = (uint8_t) subset_of(s | PYTQ_TRELLIS_STATES);
    }
    const float * old = metric[0];
    for (int t = 0; t < d; t++) {
        float * cur = metric[(t + 1) & 1];
        uint64_t bits = 0;
        for (int s = 0; s < PYTQ_TRELLIS_STATES; s++) {
            const float a = old[s >> 1] + steps[t].cost[subset[0][s]];
            const float b = old[s >> 1 | PYTQ_TRELLIS_STATES / 2] + steps[t].cost[subset[1][s]];
            cur[s] = b < a ? b : a;
            bits |= (uint64_t) (b < a) << s;
        }
        decision[t] = bits;
        old = cur;
    }
    int state = 0;
    for (int s = 1; s < PYTQ_TRELLIS_STATES; s++) {
        state = old[s] < old[state] ? s : state;
    }
    const float best = old[state];
    for (int t = d - 1; t >= 0; t--) {
        const int c = decision[t] >> state & 1;
        index[t] = steps[t].best[subset[c][state]];
        state = state >> 1 | c << (PYTQ_TRELLIS_V - 1);
    }
    return best;
}

static void choose(step_choice * out, float y, float weight, const float * levels, int n_sub) {
    for (int z = 0; z < 4; z++) {
        const int i = 4 * nearest_in_subset(y, levels, n_sub, z) + z;
        const float e = y - levels[i];
        const float e2 = e * e;
        out->cost[z] = weight * e2;
        out->best[z] = (uint8_t) i;
    }
}

float pytq_viterbi_ref(const float * y, const float * weight, int n, const float * levels, int n_sub, uint8_t * index) {
    step_choice steps[PYTQ_MAX_HEAD_DIM];
    for (int t = 0; t < n; t++) {
        choose(&steps[t], y[t], weight ? weight[t] : 1.0f, levels, n_sub);
    }
    return viterbi(steps, n, index);
}

// ------------------------------------------------------------------------------------------------ one block

static void float_levels(const pytq_codebook * cb, float * out) {
    for (int i = 0; i < cb->n_levels; i++) {
        out[i] = (float) cb->levels[i];
    }
}

// Power of two that brings a vector with largest magnitude m into the range where squares neither overflow nor vanish.
static int range_shift(float m) {
    if (m >= 0x1p-40f && m <= 0x1p40f) {
        return 0;
    }
    int e;
    frexpf(m, &e);
    return e;
}

static void encode_scalar(const pytq_type_info * t, const float * x, int shift, uint8_t * out) {
    const int d = t->head_dim;
    const pytq_codebook * cb = pytq_codebook_get(t->code, t->group_bits[0]);
    float level[PYTQ_MAX_HEAD_DIM];
    const float ss = sum_product(x, x, d);
    const float sigma = sqrtf(ss / (float) d);
    const float inv = 1.0f / (sigma * cb->step);
    for (int i = 0; i < d; i++) {
        const float y = x[i] * inv;
        int k = 0;
        while (k + 1 < cb->n_levels && y > 0.5f * ((float) cb->levels[k] + (float) cb->levels[k + 1])) {
            k++;
        }
        level[i] = (float) cb->levels[k];
        for (int p = 0; p < t->n_planes; p++) {
            plane_put(out + t->plane_off[p], i, (unsigned) k >> p & 1u);
        }
    }
    // The stored scale gives the reconstruction the norm of the input.
    const float ll = sum_product(level, level, d);
    const float s = ldexpf(sqrtf(ss / ll) / cb->step, shift);
    const uint16_t h = fp16_from_float(s);
    out[0] = (uint8_t) h;
    out[1] = (uint8_t) (h >> 8);
}

static void encode_trellis(const pytq_type_info * t, const float * x, int shift, uint8_t * out) {
    step_choice steps[PYTQ_MAX_HEAD_DIM];
    uint8_t index[PYTQ_MAX_HEAD_DIM];
    float level[PYTQ_MAX_HEAD_DIM];
    int e[PYTQ_MAX_GROUPS];
    for (int g = 0, at = 0; g < t->n_groups; at += t->group_len[g++]) {
        const int n = t->group_len[g];
        const pytq_codebook * cb = pytq_codebook_get(t->code, t->group_bits[g]);
        float levels[PYTQ_MAX_LEVELS];
        float_levels(cb, levels);
        const float sigma = sqrtf(sum_product(x + at, x + at, n) / (float) n);
        e[g] = log8_encode(ldexpf(sigma, shift));
        const float f = ldexpf(log8_decode(e[g]), -shift) * cb->step;
        const float inv = e[g] ? 1.0f / f : 0.0f;
        const float weight = t->n_groups == 1 ? 1.0f : f * f;
        for (int i = at; i < at + n; i++) {
            choose(&steps[i], x[i] * inv, weight, levels, cb->n_levels / 4);
        }
    }
    viterbi(steps, t->head_dim, index);
    for (int g = 0, at = 0; g < t->n_groups; at += t->group_len[g++]) {
        const int n = t->group_len[g];
        const pytq_codebook * cb = pytq_codebook_get(t->code, t->group_bits[g]);
        for (int i = at; i < at + n; i++) {
            level[i] = (float) cb->levels[index[i]];
        }
        // With the levels fixed, the neighbouring scale may fit better.
        const float xl = sum_product(x + at, level + at, n);
        const float ll = sum_product(level + at, level + at, n);
        int best = e[g];
        float best_err = 0.0f;
        for (int k = 0; k < 3 && e[g] > 0; k++) {
            const int cand = e[g] + (k == 1 ? -1 : k == 2 ? 1 : 0);
            if (cand < 1 || cand > 255) {
                continue;
            }
            const float f = ldexpf(log8_decode(cand), -shift) * cb->step;
            const float fll = f * ll;
            const float err = f * (fll - 2.0f * xl);
            if (k == 0 || err < best_err) {
                best = cand;
                best_err = err;
            }
        }
        out[g] = (uint8_t) best;
    }
    // The subset of each index fixes the coded bit: u is the newest bit of the window.
    unsigned window = 0;
    for (int i = 0; i < t->head_dim; i++) {
        window = window << 1 & (2 * PYTQ_TRELLIS_STATES - 1);
        const unsigned u = subset_of(window) != (index[i] & 3u);
        window |= u;
        plane_put(out + t->plane_off[0], i, u);
        for (int p = 1; p < t->n_planes && i < t->plane_len[p]; p++) {
            plane_put(out + t->plane_off[p], i, (unsigned) index[i] >> (p + 1) & 1u);
        }
    }
}

void pytq_quantize_ref(const pytq_type_info * t, const float * x, void * y, int64_t n) {
    float buf[PYTQ_MAX_HEAD_DIM];
    uint8_t * out = (uint8_t *) y;
    for (int64_t at = 0; at < n; at += t->head_dim, out += t->block_bytes) {
        memset(out, 0, (size_t) t->block_bytes);
        float m = 0.0f;
        int finite = 1;
        for (int i = 0; i < t->head_dim; i++) {
            const float a = fabsf(x[at + i]);
            finite &= a <= 3.4028234e38f;
            m = a > m ? a : m;
        }
        if (!finite || m == 0.0f) {
            continue;
        }
        const int shift = range_shift(m);
        for (int i = 0; i < t->head_dim; i++) {
            buf[i] = shift ? ldexpf(x[at + i], -shift) : x[at + i];
        }
        if (t->code == PYTQ_CODE_SCALAR) {
            encode_scalar(t, buf, shift, out);
        } else {
            encode_trellis(t, buf, shift, out);
        }
    }
}

void pytq_unpack_ref(const pytq_type_info * t, const void * block, int8_t * levels, float factor[PYTQ_MAX_GROUPS]) {
    const uint8_t * in = (const uint8_t *) block;
    unsigned window = 0;
    for (int g = 0, at = 0; g < t->n_groups; at += t->group_len[g++]) {
        const pytq_codebook * cb = pytq_codebook_get(t->code, t->group_bits[g]);
        const float scale = t->scale == PYTQ_SCALE_FP16 ? fp16_to_float((uint16_t) (in[2 * g] | in[2 * g + 1] << 8))
                                                        : log8_decode(in[g]);
        factor[g] = scale * cb->step;
        for (int i = at; i < at + t->group_len[g]; i++) {
            unsigned k = 0;
            for (int p = 0; p < t->group_bits[g]; p++) {
                k |= plane_get(in + t->plane_off[p], i) << p;
            }
            if (t->code == PYTQ_CODE_TRELLIS) {
                window = (window << 1 | (k & 1u)) & (2 * PYTQ_TRELLIS_STATES - 1);
                k = (k >> 1) * 4 + subset_of(window);
            }
            levels[i] = cb->levels[k];
        }
    }
}

void pytq_dequantize_ref(const pytq_type_info * t, const void * y, float * x, int64_t n) {
    const uint8_t * in = (const uint8_t *) y;
    for (int64_t at = 0; at < n; at += t->head_dim, in += t->block_bytes) {
        int8_t levels[PYTQ_MAX_HEAD_DIM];
        float factor[PYTQ_MAX_GROUPS];
        pytq_unpack_ref(t, in, levels, factor);
        for (int g = 0, i = 0; g < t->n_groups; g++) {
            for (int end = i + t->group_len[g]; i < end; i++) {
                x[at + i] = factor[g] * (float) levels[i];
            }
        }
    }
}

float pytq_dot_ref(const pytq_type_info * t, const void * block, const float * q) {
    int8_t levels[PYTQ_MAX_HEAD_DIM];
    float factor[PYTQ_MAX_GROUPS];
    pytq_unpack_ref(t, block, levels, factor);
    float total = 0.0f;
    for (int g = 0, at = 0; g < t->n_groups; at += t->group_len[g++]) {
        float level[PYTQ_MAX_HEAD_DIM];
        for (int i = 0; i < t->group_len[g]; i++) {
            level[i] = (float) levels[at + i];
        }
        total += factor[g] * sum_product(level, q + at, t->group_len[g]);
    }
    return total;
}

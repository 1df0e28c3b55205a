// TurboQuant mse and prod, QJL, PolarQuant and RaBitQ on one frame: scale by a power of two, rotate, quantise, pack.
//
// Code layout: scalars (fp16, or float32 if wide), then packed numbers.
//   mse        norm           | dim x bits
//   prod       norm, gamma    | dim x (bits - 1) | n_proj sign bits     gamma = |residual| / |x|
//   qjl        norm           | n_proj sign bits
//   rabitq     norm, cos      | dim x bits                              cos = <x, grid> / (|x| |grid|)
//   polarquant dim/16 radii   | dim/2 x 4 bits | 7 dim/16 x 2 bits (levels 2, 3, 4), zero padded to a byte
//
// Vectors are brought to max |x| in [1, 2) first, exactly, so that squares neither overflow nor vanish.
// The file is compiled for the baseline ISA and, where the linker can choose at load time, for AVX2 and AVX-512 too:
// the operations and their order are the same, only the width differs.
#include "codecs.h"

#include "clones.h"
#include "common.h"
#include "hadamard.h"
#include "tables.inc"

#define SQRT_HALF_PI 1.2533141373155003

static const float * const lm_levels[9] = {0,           lloyd_max_1, lloyd_max_2, lloyd_max_3, lloyd_max_4,
                                           lloyd_max_5, lloyd_max_6, lloyd_max_7, lloyd_max_8};
static const float * const lm_thr[9] = {0,
                                        lloyd_max_thr_1,
                                        lloyd_max_thr_2,
                                        lloyd_max_thr_3,
                                        lloyd_max_thr_4,
                                        lloyd_max_thr_5,
                                        lloyd_max_thr_6,
                                        lloyd_max_thr_7,
                                        lloyd_max_thr_8};
static const float * const polar_cos[5] = {0, polar_cos_1, polar_cos_2, polar_cos_3, polar_cos_4};
static const float * const polar_sin[5] = {0, polar_sin_1, polar_sin_2, polar_sin_3, polar_sin_4};
static const float * const polar_tan[5] = {0, polar_tan_1, polar_tan_2, polar_tan_3, polar_tan_4};

static int scalar_bytes(const pytq_codec * c) {
    return c->wide ? 4 : 2;
}

int pytq_codec_bytes(const pytq_codec * c) {
    const int d = c->dim;
    if (d < 16 || d > PYTQ_CODEC_MAX_DIM || d % 16 != 0) {
        return -1;
    }
    if (c->rotation == PYTQ_ROTATION_HADAMARD && pytq_hadamard_base(d) == 0) {
        return -1;
    }
    const int m = c->n_proj;
    const int ok = m >= 16 && m <= PYTQ_CODEC_MAX_DIM && m % 16 == 0;
    const int s = scalar_bytes(c);
    switch (c->method) {
        case PYTQ_CODEC_TURBOQUANT_MSE:
            return c->bits < 1 || c->bits > 8 ? -1 : s + d / 8 * c->bits;
        case PYTQ_CODEC_TURBOQUANT_PROD:
            return c->bits < 2 || c->bits > 8 || !ok ? -1 : 2 * s + d / 8 * (c->bits - 1) + m / 8;
        case PYTQ_CODEC_QJL:
            return ok ? s + m / 8 : -1;
        case PYTQ_CODEC_POLARQUANT:
            return s * (d / 16) + d / 4 + (7 * d / 16 + 3) / 4;
        case PYTQ_CODEC_RABITQ:
            return c->bits < 1 || c->bits > 8 ? -1 : 2 * s + d / 8 * c->bits;
        default:
            return -1;
    }
}

int pytq_codec_query_len(const pytq_codec * c) {
    switch (c->method) {
        case PYTQ_CODEC_TURBOQUANT_PROD:
            return c->dim + c->n_proj;
        case PYTQ_CODEC_QJL:
            return c->n_proj;
        default:
            return c->dim;
    }
}

// y = R x; x and y may not overlap.
static inline void rotate(const pytq_codec * c, const float * x, float * y) {
    const int d = c->dim;
    if (c->rotation == PYTQ_ROTATION_MATRIX) {
        matvec(c->matrix_t, x, d, d, y);
        return;
    }
    if (c->rotation == PYTQ_ROTATION_NONE) {
        memcpy(y, x, sizeof(float) * (size_t) d);
        return;
    }
    for (int i = 0; i < d; i++) {
        y[i] = x[i] * c->signs[i];
    }
    pytq_hadamard_apply(y, d);
}

static inline void rotate_back(const pytq_codec * c, const float * y, float * x) {
    const int d = c->dim;
    if (c->rotation == PYTQ_ROTATION_MATRIX) {
        matvec(c->matrix, y, d, d, x);
        return;
    }
    memcpy(x, y, sizeof(float) * (size_t) d);
    if (c->rotation == PYTQ_ROTATION_HADAMARD) {
        pytq_hadamard_apply(x, d);
        for (int i = 0; i < d; i++) {
            x[i] *= c->signs[i];
        }
    }
}

// ---- scalar codebook ----------------------------------------------------------------------------------------------

// Number of thresholds below v.
static inline int bin_of(const float * thr, int bits, float v) {
    int index = 0;
    for (int step = 1 << (bits - 1); step > 0; step /= 2) {
        index += v > thr[index + step - 1] ? step : 0;
    }
    return index;
}

// z: coordinates of about unit variance. Writes the indices and leaves the levels in z.
static inline void lloyd_max_encode(int d, int bits, const float * z, uint8_t * index, float * level) {
    const float * thr = lm_thr[bits];
    const float * lev = lm_levels[bits];
    if (bits <= 4) {
        // Counting beats searching while the thresholds are few: the inner loop is over coordinates and vectorises.
        int count[16];
        const int n_thr = (1 << bits) - 1;
        for (int i = 0; i < d; i += 16) {
            for (int j = 0; j < 16; j++) {
                count[j] = 0;
            }
            for (int t = 0; t < n_thr; t++) {
                for (int j = 0; j < 16; j++) {
                    count[j] += z[i + j] > thr[t];
                }
            }
            for (int j = 0; j < 16; j++) {
                index[i + j] = (uint8_t) count[j];
            }
        }
    } else {
        for (int i = 0; i < d; i++) {
            index[i] = (uint8_t) bin_of(thr, bits, z[i]);
        }
    }
    for (int i = 0; i < d; i++) {
        level[i] = lev[index[i]];
    }
}

static inline void pack_signs(uint8_t * out, const float * v, int n) {
    for (int i = 0; i < n; i += 8) {
        unsigned byte = 0;
        for (int j = 0; j < 8; j++) {
            byte |= (unsigned) (v[i + j] > 0.0f) << j;
        }
        out[i / 8] = (uint8_t) byte;
    }
}

static inline void unpack_signs(float * v, const uint8_t * in, int n) {
    for (int i = 0; i < n; i++) {
        v[i] = in[i / 8] >> (i % 8) & 1 ? 1.0f : -1.0f;
    }
}

// ---- RaBitQ -------------------------------------------------------------------------------------------------------

// Extended RaBitQ (arXiv 2409.09913, section 3.2, algorithm 1): among the grid vectors with coordinates +-(k + 1/2),
// k < K = 2^(bits-1), find the one of the largest cosine to y. It is among the roundings of t |y| for t > 0; as t
// grows, coordinate i steps from k - 1 to k at t = k / |y_i|, and numerator and denominator of the cosine are updated
// per step. Steps are taken in the order of (t, i) from a heap. From 4 bits on only 0.5 K < t max|y| < 1.5 K is
// searched: outside, the grid is twice too coarse, or clips a third of the largest coordinate.
static inline float rabitq_low(int bits, float top) {
    return bits < 4 ? 0.0f : 0.5f * (float) (1 << (bits - 1)) / top;
}

static inline float rabitq_high(int bits, float top) {
    return bits < 4 ? float_of(0x7f800000u) : 1.5f * (float) (1 << (bits - 1)) / top;
}

// Positive floats order as their bits do, so (t, i) is one integer.
static inline uint64_t step_key(int k, float a, int i) {
    return (uint64_t) bits_of((float) k / a) << 32 | (uint32_t) i;
}

static inline void sift_down(uint64_t * heap, int n, int at, uint64_t key) {
    for (;;) {
        int child = 2 * at + 1;
        if (child >= n) {
            break;
        }
        child += child + 1 < n && heap[child + 1] < heap[child];
        if (heap[child] >= key) {
            break;
        }
        heap[at] = heap[child];
        at = child;
    }
    heap[at] = key;
}

static inline void rabitq_search(int d, int bits, const float * a, uint8_t * k) {
    const int last = (1 << (bits - 1)) - 1;
    float top = 0.0f;
    for (int i = 0; i < d; i++) {
        top = a[i] > top ? a[i] : top;
    }
    const float low = rabitq_low(bits, top);
    const float high = rabitq_high(bits, top);

    float grid[PYTQ_CODEC_MAX_DIM];
    uint64_t heap[PYTQ_CODEC_MAX_DIM];
    int size = 0;
    for (int i = 0; i < d; i++) {
        // Largest step below `low`; the guess may be off by one in float.
        int n = 0;
        if (low > 0.0f) {
            n = (int) (low * a[i]);
            n = n > last ? last : n;
            while (n < last && (float) (n + 1) / a[i] < low) {
                n++;
            }
            while (n > 0 && !((float) n / a[i] < low)) {
                n--;
            }
        }
        k[i] = (uint8_t) n;
        grid[i] = (float) n + 0.5f;
        if (n < last && (float) (n + 1) / a[i] < high) {
            heap[size++] = step_key(n + 1, a[i], i);
        }
    }
    for (int i = size / 2 - 1; i >= 0; i--) {
        sift_down(heap, size, i, heap[i]);
    }
    float num = dot16(a, grid, d);
    float den = dot16(grid, grid, d);
    float best = num * num / den;
    uint64_t stop = 0;
    uint8_t now[PYTQ_CODEC_MAX_DIM];
    memcpy(now, k, (size_t) d);
    while (size > 0) {
        const uint64_t key = heap[0];
        const int i = (int) (uint32_t) key;
        const int n = ++now[i];
        num += a[i];
        den += (float) (2 * n);
        const float value = num * num / den;
        if (value > best) {
            best = value;
            stop = key;
        }
        if (n < last && (float) (n + 1) / a[i] < high) {
            sift_down(heap, size, 0, step_key(n + 1, a[i], i));
        } else {
            size--;
            if (size > 0) {
                sift_down(heap, size, 0, heap[size]);
            }
        }
    }
    // Replay to the best step: each coordinate has passed the steps whose key is not above `stop`.
    for (int i = 0; i < d; i++) {
        int n = now[i];
        while (n > k[i] && step_key(n, a[i], i) > stop) {
            n--;
        }
        k[i] = (uint8_t) n;
    }
}

// One rounding at the step that is best for N(0,1) coordinates: what the search finds on average, at a fraction of its
// cost. t = sqrt(d) / (norm * step).
static inline void rabitq_round(int d, int bits, const float * a, float norm, uint8_t * k) {
    const float t = (float) sqrt((double) d) / (norm * uniform_step[bits]);
    const float last = (float) ((1 << (bits - 1)) - 1);
    for (int i = 0; i < d; i++) {
        const float v = a[i] * t;
        k[i] = (uint8_t) (int) (v < last ? v : last);
    }
}

// Grid coordinates of RaBitQ: index - (2^bits - 1) / 2, exact in float.
static inline void rabitq_grid(int d, int bits, const uint8_t * index, float * grid) {
    const float centre = 0.5f * (float) ((1 << bits) - 1);
    for (int i = 0; i < d; i++) {
        grid[i] = (float) index[i] - centre;
    }
}

// ---- PolarQuant ---------------------------------------------------------------------------------------------------

// Bin of the angle of (a, b), a, b >= 0, among slopes t0 < t1 < t2: comparisons only, since atan2 differs by libm.
static inline int slope_bin(const float * t, float a, float b) {
    return (b > t[0] * a) + (b > t[1] * a) + (b > t[2] * a);
}

// One polar level (PolarQuant, arXiv 2502.02617, definition 1): n pairs -> n radii and angle bins.
static inline void polar_level(int level, const float * v, int n, float * radius, uint8_t * bin) {
    const float * t = polar_tan[level];
    for (int i = 0; i < n; i++) {
        const float a = v[2 * i];
        const float b = v[2 * i + 1];
        int s = slope_bin(t, fabsf(a), fabsf(b));
        if (level == 1) {
            // Quadrants, counter-clockwise, four bins each.
            s = a < 0.0f ? (b < 0.0f ? 8 + s : 7 - s) : (b < 0.0f ? 15 - s : s);
        }
        bin[i] = (uint8_t) s;
        radius[i] = sqrtf(a * a + b * b);
    }
}

static inline int polar_encode(const pytq_codec * c, const float * y, int e, uint8_t * code) {
    const int d = c->dim;
    float r1[PYTQ_CODEC_MAX_DIM / 2];
    float r2[PYTQ_CODEC_MAX_DIM / 4];
    uint8_t bin[PYTQ_CODEC_MAX_DIM / 2];
    uint8_t fine[PYTQ_CODEC_MAX_DIM / 2];
    polar_level(1, y, d / 2, r1, bin);
    polar_level(2, r1, d / 4, r2, fine);
    polar_level(3, r2, d / 8, r1, fine + d / 4);
    polar_level(4, r1, d / 16, r2, fine + d / 4 + d / 8);
    int ok = 1;
    for (int g = 0; g < d / 16; g++) {
        ok &= put_scalar(&code, scale2(r2[g], e), c->wide);
    }
    pack_bits(code, bin, d / 2, 4);
    code += d / 4;
    const int n = 7 * d / 16;
    fine[n] = fine[n + 1] = fine[n + 2] = 0;
    for (int i = 0; i < n; i += 4) {
        *code++ = (uint8_t) (fine[i] | fine[i + 1] << 2 | fine[i + 2] << 4 | fine[i + 3] << 6);
    }
    return ok;
}

// Rotated coordinates divided by 2^e, with 2^e the returned power of two of the largest radius.
static inline float polar_levels(const pytq_codec * c, const uint8_t * code, float * y) {
    const int d = c->dim;
    float r[PYTQ_CODEC_MAX_DIM / 2];
    float s[PYTQ_CODEC_MAX_DIM / 2];
    uint8_t bin[PYTQ_CODEC_MAX_DIM / 2];
    float top = 0.0f;
    for (int g = 0; g < d / 16; g++) {
        r[g] = get_scalar(&code, c->wide);
        top = r[g] > top ? r[g] : top;
    }
    const int e = top > 0.0f ? exponent_of(top) : 0;
    for (int g = 0; g < d / 16; g++) {
        r[g] = scale2(r[g], -e);
    }
    unpack_bits(bin, code, d / 2, 4);
    code += d / 4;
    int at = d / 4 + d / 8;
    for (int level = 4, n = d / 16; level > 1; level--, n *= 2) {
        for (int i = 0; i < n; i++) {
            const int t = at + i;
            const int b = code[t / 4] >> (2 * (t % 4)) & 3;
            s[2 * i] = r[i] * polar_cos[level][b];
            s[2 * i + 1] = r[i] * polar_sin[level][b];
        }
        memcpy(r, s, sizeof(float) * (size_t) (2 * n));
        at -= 2 * n;
    }
    for (int i = 0; i < d / 2; i++) {
        y[2 * i] = r[i] * polar_cos_1[bin[i]];
        y[2 * i + 1] = r[i] * polar_sin_1[bin[i]];
    }
    return exp2_int(e);
}

// ---- one vector ---------------------------------------------------------------------------------------------------

static inline int encode_one(const pytq_codec * c, const float * x, uint8_t * code) {
    const int d = c->dim;
    uint32_t top = 0;
    for (int i = 0; i < d; i++) {
        const uint32_t m = bits_of(x[i]) & 0x7fffffffu;
        top = m > top ? m : top;
    }
    if (top >= 0x7f800000u) {
        return 0;
    }
    // z holds the scaled input, then the normalised coordinates.
    float y[PYTQ_CODEC_MAX_DIM];
    float z[PYTQ_CODEC_MAX_DIM];
    const int e = top > 0 ? exponent_of(float_of(top)) : 0;
    const int a = -e / 2;
    const float p = exp2_int(a);
    const float q = exp2_int(-e - a);
    for (int i = 0; i < d; i++) {
        z[i] = x[i] * p * q;
    }
    rotate(c, z, y);
    if (c->method == PYTQ_CODEC_POLARQUANT) {
        return polar_encode(c, y, e, code);
    }
    const float norm = sqrtf(dot16(y, y, d));
    int ok = put_scalar(&code, scale2(norm, e), c->wide);
    uint8_t index[PYTQ_CODEC_MAX_DIM];
    if (c->method == PYTQ_CODEC_QJL) {
        matvec(c->proj_t, y, d, c->n_proj, z);
        pack_signs(code, z, c->n_proj);
        return ok;
    }
    if (c->method == PYTQ_CODEC_RABITQ) {
        for (int i = 0; i < d; i++) {
            z[i] = fabsf(y[i]);
        }
        if (c->bits > 1 && norm > 0.0f && c->fast) {
            rabitq_round(d, c->bits, z, norm, index);
        } else if (c->bits > 1 && norm > 0.0f) {
            rabitq_search(d, c->bits, z, index);
        } else {
            for (int i = 0; i < d; i++) {
                index[i] = 0;
            }
        }
        const int half = 1 << (c->bits - 1);
        for (int i = 0; i < d; i++) {
            index[i] = (uint8_t) (y[i] < 0.0f ? half - 1 - index[i] : half + index[i]);
        }
        rabitq_grid(d, c->bits, index, z);
        const float size = norm * sqrtf(dot16(z, z, d));
        ok &= put_scalar(&code, size > 0.0f ? dot16(y, z, d) / size : 1.0f, c->wide);
        pack_bits(code, index, d, c->bits);
        return ok;
    }
    const float root = (float) sqrt((double) d);
    const float inv = norm > 0.0f ? root / norm : 0.0f;
    float level[PYTQ_CODEC_MAX_DIM];
    for (int i = 0; i < d; i++) {
        z[i] = y[i] * inv;
    }
    if (c->method == PYTQ_CODEC_TURBOQUANT_MSE) {
        lloyd_max_encode(d, c->bits, z, index, level);
        pack_bits(code, index, d, c->bits);
        return ok;
    }
    lloyd_max_encode(d, c->bits - 1, z, index, level);
    for (int i = 0; i < d; i++) {
        z[i] = z[i] - level[i];
    }
    ok &= put_scalar(&code, sqrtf(dot16(z, z, d)) / root, c->wide);
    pack_bits(code, index, d, c->bits - 1);
    matvec(c->proj_t, z, d, c->n_proj, y);
    pack_signs(code + d / 8 * (c->bits - 1), y, c->n_proj);
    return ok;
}

// A code opened: value ~ scale * level in rotated space, plus sign_scale * S^T sign for the QJL part.
typedef struct {
    float scale;      // least squared error
    float inner;      // unbiased for <q, x>
    float sign_scale; // QJL part relative to `scale`, for decoding
    float sign_inner; // QJL part for <q, x>
} opened;

static inline opened open_one(const pytq_codec * c, const uint8_t * code, float * level, float * sign) {
    const int d = c->dim;
    const int m = c->n_proj;
    opened o = {0.0f, 0.0f, 0.0f, 0.0f};
    if (c->method == PYTQ_CODEC_POLARQUANT) {
        o.scale = o.inner = polar_levels(c, code, level);
        return o;
    }
    const float norm = get_scalar(&code, c->wide);
    uint8_t index[PYTQ_CODEC_MAX_DIM];
    if (c->method == PYTQ_CODEC_QJL) {
        const float k = (float) (SQRT_HALF_PI / m);
        unpack_signs(sign, code, m);
        memset(level, 0, sizeof(float) * (size_t) d);
        o.scale = norm;
        o.sign_scale = k;
        o.sign_inner = norm * k;
        return o;
    }
    if (c->method == PYTQ_CODEC_RABITQ) {
        const float cosine = get_scalar(&code, c->wide);
        unpack_bits(index, code, d, c->bits);
        rabitq_grid(d, c->bits, index, level);
        const float size = sqrtf(dot16(level, level, d));
        o.scale = norm * cosine / size;
        o.inner = norm / (cosine * size);
        return o;
    }
    const float root = (float) sqrt((double) d);
    const int prod = c->method == PYTQ_CODEC_TURBOQUANT_PROD;
    const int bits = c->bits - prod;
    o.scale = o.inner = norm / root;
    if (prod) {
        const float gamma = get_scalar(&code, c->wide);
        const float k = (float) (SQRT_HALF_PI / m);
        o.sign_scale = gamma * root * k;
        o.sign_inner = norm * gamma * k;
        unpack_signs(sign, code + d / 8 * bits, m);
    }
    unpack_bits(index, code, d, bits);
    for (int i = 0; i < d; i++) {
        level[i] = lm_levels[bits][index[i]];
    }
    return o;
}

static inline int has_signs(const pytq_codec * c) {
    return c->method == PYTQ_CODEC_TURBOQUANT_PROD || c->method == PYTQ_CODEC_QJL;
}

// ---- batches ------------------------------------------------------------------------------------------------------

PYTQ_CLONES_FLAT int64_t pytq_codec_encode(const pytq_codec * c, const float * x, int64_t n, uint8_t * codes) {
    const int bytes = pytq_codec_bytes(c);
    if (bytes < 0) {
        return 0;
    }
    for (int64_t v = 0; v < n; v++) {
        if (!encode_one(c, x + v * c->dim, codes + v * bytes)) {
            return v;
        }
    }
    return -1;
}

PYTQ_CLONES_FLAT void pytq_codec_decode(const pytq_codec * c, const uint8_t * codes, int64_t n, float * x) {
    const int d = c->dim;
    const int bytes = pytq_codec_bytes(c);
    float level[PYTQ_CODEC_MAX_DIM];
    float sign[PYTQ_CODEC_MAX_DIM];
    float back[PYTQ_CODEC_MAX_DIM];
    for (int64_t v = 0; v < n; v++) {
        const opened o = open_one(c, codes + v * bytes, level, sign);
        if (has_signs(c)) {
            matvec(c->proj, sign, c->n_proj, d, back);
            for (int i = 0; i < d; i++) {
                level[i] = level[i] + o.sign_scale * back[i];
            }
        }
        rotate_back(c, level, x + v * d);
        // Scaling last keeps vectors near the end of float's range finite inside the rotation.
        for (int i = 0; i < d; i++) {
            x[v * d + i] *= o.scale;
        }
    }
}

PYTQ_CLONES_FLAT void pytq_codec_query(const pytq_codec * c, const float * q, int64_t n, float * prepared) {
    const int d = c->dim;
    const int len = pytq_codec_query_len(c);
    float y[PYTQ_CODEC_MAX_DIM];
    for (int64_t v = 0; v < n; v++) {
        float * out = prepared + v * len;
        rotate(c, q + v * d, y);
        if (c->method != PYTQ_CODEC_QJL) {
            memcpy(out, y, sizeof(float) * (size_t) d);
            out += d;
        }
        if (has_signs(c)) {
            matvec(c->proj_t, y, d, c->n_proj, out);
        }
    }
}

PYTQ_CLONES_FLAT void pytq_codec_inner(const pytq_codec * c, const float * prepared, int64_t n_query,
                                       const uint8_t * codes, int64_t n, float * out, int64_t stride) {
    const int d = c->dim;
    const int bytes = pytq_codec_bytes(c);
    const int len = pytq_codec_query_len(c);
    float level[PYTQ_CODEC_MAX_DIM];
    float sign[PYTQ_CODEC_MAX_DIM];
    for (int64_t v = 0; v < n; v++) {
        const opened o = open_one(c, codes + v * bytes, level, sign);
        for (int64_t u = 0; u < n_query; u++) {
            const float * q = prepared + u * len;
            float value = 0.0f;
            if (c->method != PYTQ_CODEC_QJL) {
                value = o.inner * dot16(level, q, d);
                q += d;
            }
            if (has_signs(c)) {
                value = value + o.sign_inner * dot16(sign, q, c->n_proj);
            }
            out[u * stride + v] = value;
        }
    }
}

PYTQ_CLONES_FLAT void pytq_codec_rotate(const pytq_codec * c, const float * x, int64_t n, float * y, int inverse) {
    for (int64_t v = 0; v < n; v++) {
        if (inverse) {
            rotate_back(c, x + v * c->dim, y + v * c->dim);
        } else {
            rotate(c, x + v * c->dim, y + v * c->dim);
        }
    }
}

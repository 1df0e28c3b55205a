// Helpers of codecs.c; every float operation here has a fixed order that pytq/codec/*.py repeats.
#ifndef PYTQ_CODECS_COMMON_H
#define PYTQ_CODECS_COMMON_H

#include "codecs.h"

#include <math.h>
#include <string.h>

static inline uint32_t bits_of(float v) {
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    return u;
}

static inline float float_of(uint32_t u) {
    float v;
    memcpy(&v, &u, sizeof v);
    return v;
}

// Sum of products in 16 lanes, then lanes 8, 4, 2, 1 apart: one or two vector registers on every target.
static inline float dot16(const float * a, const float * b, int n) {
    float acc[16] = {0.0f};
    for (int i = 0; i < n; i += 16) {
        for (int j = 0; j < 16; j++) {
            acc[j] += a[i + j] * b[i + j];
        }
    }
    for (int h = 8; h > 0; h /= 2) {
        for (int j = 0; j < h; j++) {
            acc[j] += acc[j + h];
        }
    }
    return acc[0];
}

// y[m] = M x from M^T [n, m], one column of M at a time: no horizontal sums.
static inline void matvec(const float * transposed, const float * x, int n, int m, float * restrict y) {
    for (int i = 0; i < m; i++) {
        y[i] = 0.0f;
    }
    for (int j = 0; j < n; j++) {
        const float v = x[j];
        const float * row = transposed + (int64_t) j * m;
        for (int i = 0; i < m; i++) {
            y[i] += v * row[i];
        }
    }
}

// 2^e for -149 <= e <= 127.
static inline float exp2_int(int e) {
    return e < -126 ? float_of(1u << (e + 149)) : float_of((uint32_t) (e + 127) << 23);
}

// v * 2^e in two exact factors, since 2^e itself may overflow.
static inline float scale2(float v, int e) {
    const int a = e / 2;
    return v * exp2_int(a) * exp2_int(e - a);
}

// floor(log2(v)) for a finite v > 0, denormals included.
static inline int exponent_of(float v) {
    const int e = (int) (bits_of(v) >> 23);
    return e > 0 ? e - 127 : (int) (bits_of(v * 0x1p64f) >> 23) - 127 - 64;
}

// Round to nearest even, subnormals kept, overflow to infinity: as NumPy's float16.
static inline uint16_t half_of(float v) {
    const uint32_t u = bits_of(v);
    const uint32_t sign = u >> 16 & 0x8000u;
    uint32_t mag = u & 0x7fffffffu;
    if (mag >= 0x47800000u) {
        return (uint16_t) (sign | (mag > 0x7f800000u ? 0x7e00u : 0x7c00u));
    }
    if (mag < 0x38800000u) {
        // Adding 2^-1 aligns the sum's last place with 2^-24, the unit of fp16 subnormals, and rounds there.
        const uint32_t sub = bits_of(float_of(mag) + 0.5f) - bits_of(0.5f);
        return (uint16_t) (sign | sub);
    }
    mag += 0xc8000fffu + (mag >> 13 & 1u);
    return (uint16_t) (sign | mag >> 13);
}

static inline float float_of_half(uint16_t h) {
    const uint32_t mag = h & 0x7fffu;
    const float v = mag < 0x0400u ? (float) mag * 0x1p-24f : float_of((mag << 13) + 0x38000000u);
    return h & 0x8000u ? -v : v;
}

// Scalars (norms, radii) at the head of a code. Returns 0 if v does not fit.
static inline int put_scalar(uint8_t ** p, float v, int wide) {
    if (wide) {
        memcpy(*p, &v, 4);
        *p += 4;
        return bits_of(v) < 0x7f800000u;
    }
    const uint16_t h = half_of(v);
    memcpy(*p, &h, 2);
    *p += 2;
    return h < 0x7c00u;
}

static inline float get_scalar(const uint8_t ** p, int wide) {
    if (wide) {
        float v;
        memcpy(&v, *p, 4);
        *p += 4;
        return v;
    }
    uint16_t h;
    memcpy(&h, *p, 2);
    *p += 2;
    return float_of_half(h);
}

// Little-endian stream of b-bit numbers, byte t >> 3, bit t & 7. n * b bits; the last byte is padded with zeros.
static inline void pack_bits(uint8_t * restrict out, const uint8_t * index, int n, int b) {
    if (b == 8) {
        memcpy(out, index, (size_t) n);
        return;
    }
    for (int i = 0; i < n; i += 8, out += b) {
        uint64_t w = 0;
        for (int j = 0; j < 8; j++) {
            w |= (uint64_t) index[i + j] << (j * b);
        }
        for (int j = 0; j < b; j++) {
            out[j] = (uint8_t) (w >> (8 * j));
        }
    }
}

static inline void unpack_bits(uint8_t * restrict index, const uint8_t * in, int n, int b) {
    if (b == 8) {
        memcpy(index, in, (size_t) n);
        return;
    }
    const uint64_t mask = (1u << b) - 1;
    for (int i = 0; i < n; i += 8, in += b) {
        uint64_t w = 0;
        for (int j = 0; j < b; j++) {
            w |= (uint64_t) in[j] << (8 * j);
        }
        for (int j = 0; j < 8; j++) {
            index[i + j] = (uint8_t) (w >> (j * b) & mask);
        }
    }
}

#endif

// Words of CUDA C++ and HIP for the CPU: keywords, vectors, bits, halves.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

using std::max;
using std::min;

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __noinline__    __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __shared__   thread_local

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint2 {
    unsigned x, y;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct float2 {
    float x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) {
    return {x, y};
}
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
    return {x, y, z, w};
}
inline float2 make_float2(float x, float y) {
    return {x, y};
}
inline float4 make_float4(float x, float y, float z, float w) {
    return {x, y, z, w};
}

inline int __popc(unsigned x) {
    return __builtin_popcount(x);
}
inline int __ffs(int x) {
    return __builtin_ffs(x);
}
inline int __clz(int x) {
    return x ? __builtin_clz((unsigned) x) : 32;
}
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; i++) {
        r |= (x >> i & 1u) << (31 - i);
    }
    return r;
}
inline float __uint_as_float(unsigned x) {
    float f;
    memcpy(&f, &x, 4);
    return f;
}
inline unsigned __float_as_uint(float f) {
    unsigned x;
    memcpy(&x, &f, 4);
    return x;
}

// ------------------------------------------------------------------------------------------------ halves

struct __half_raw {
    unsigned short x;
};

inline float shim_half_to_float(unsigned short h) {
    const unsigned e = h >> 10 & 31u, m = h & 1023u, sign = (unsigned) (h >> 15) << 31;
    if (e == 31) {
        return __uint_as_float(sign | 0x7f800000u | m << 13);
    }
    const float f = e ? ldexpf((float) (1024 + m), (int) e - 25) : ldexpf((float) m, -24);
    return sign ? -f : f;
}

// Rounds to nearest even.
inline unsigned short shim_float_to_half(float f) {
    const unsigned u = __float_as_uint(f), sign = u >> 31 << 15, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) {
        return (unsigned short) (sign | 0x7e00u);
    }
    if (a >= 0x477ff000u) {
        return (unsigned short) (sign | 0x7c00u);
    }
    const int e = (int) (a >> 23) - 127, bits = e >= -14 ? 10 : 24 + e;
    if (bits < -1) {
        return (unsigned short) sign;
    }
    const float unit = ldexpf(1.0f, std::max(e, -14) - 10);
    const float whole = nearbyintf(fabsf(f) / unit); // exact quotient, one rounding
    return (unsigned short) (sign | ((unsigned) whole + (e >= -14 ? (unsigned) (e + 14) << 10 : 0u)));
}

struct __half {
    unsigned short bits;
    __half() = default;
    explicit __half(__half_raw r) : bits(r.x) {}
};
struct __half2 {
    __half x, y;
};
typedef __half half;

inline float __half2float(__half h) {
    return shim_half_to_float(h.bits);
}
inline __half __float2half_rn(float f) {
    return __half(__half_raw{shim_float_to_half(f)});
}
inline unsigned short __half_as_ushort(__half h) {
    return h.bits;
}
inline __half2 __floats2half2_rn(float x, float y) {
    return {__float2half_rn(x), __float2half_rn(y)};
}
inline __half2 __float2half2_rn(float f) {
    return {__float2half_rn(f), __float2half_rn(f)};
}
inline __half2 __hadd2(__half2 a, __half2 b) {
    return {__float2half_rn(__half2float(a.x) + __half2float(b.x)),
            __float2half_rn(__half2float(a.y) + __half2float(b.y))};
}
inline __half2 __hmul2(__half2 a, __half2 b) {
    return {__float2half_rn(__half2float(a.x) * __half2float(b.x)),
            __float2half_rn(__half2float(a.y) * __half2float(b.y))};
}
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
    // the product of two halves is exact in float32; one rounding of the double sum
    return {__float2half_rn((float) ((double) __half2float(a.x) * __half2float(b.x) + __half2float(c.x))),
            __float2half_rn((float) ((double) __half2float(a.y) * __half2float(b.y) + __half2float(c.y)))};
}

// Declarations of Metal's library for clang's "C++ for OpenCL" mode, whose address spaces follow the same rules: a pointer
// to one memory is no pointer to another. Nothing is executed; bodies only exist where a type must be deduced.
#define __METAL_VERSION__ 310
#define kernel
#define device __global
#define threadgroup __local
#define thread __private
#define constant __constant

#pragma OPENCL EXTENSION cl_khr_fp16 : enable

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef int int32_t;
typedef unsigned uint32_t;
typedef long int64_t;
typedef ulong uint64_t;
#define FLT_MAX 0x1.fffffep127f

namespace metal {

template <class T, int N> struct packed_vec;
template <class T, int N> struct vec {
    T v[N];
    vec() = default;
    vec(T s) { v[0] = s; }
    vec(T a, T b, T c, T d) { v[0] = a, v[1] = b, v[2] = c, v[3] = d; }
    template <class U> explicit vec(vec<U, N> o) { v[0] = (T) o.v[0]; }
    template <class U> explicit vec(packed_vec<U, N> o) { v[0] = (T) o.v[0]; }
    vec & operator*=(T s) { v[0] *= s; return *this; }
    vec & operator+=(vec o) { v[0] += o.v[0]; return *this; }
    T & operator[](int i) { return v[i]; }
    const T & operator[](int i) const { return v[i]; }
};
template <class T, int N> struct packed_vec {
    T v[N];
};
template <class T, int N> vec<T, N> operator*(vec<T, N> a, float b);
template <class T, int N> vec<T, N> operator*(float a, vec<T, N> b);
template <class T, int N> T dot(vec<T, N> a, vec<T, N> b);

float exp(float);
float fabs(float);
float ldexp(float, int);
float frexp(float, thread int &);
uint reverse_bits(uint);
template <class T> T min(T a, T b) { return a < b ? a : b; }
template <class T> T max(T a, T b) { return a < b ? b : a; }
namespace precise {
float pow(float, float);
float sqrt(float);
float tanh(float);
float divide(float, float);
} // namespace precise

struct mem_flags {
    enum kind { mem_none, mem_device, mem_threadgroup };
};
void threadgroup_barrier(mem_flags::kind);
void simdgroup_barrier(mem_flags::kind);

template <class T> T simd_shuffle(T, ushort);
template <class T> T simd_shuffle_xor(T, ushort);
template <class T> T simd_sum(T);
template <class T> T simd_max(T);
bool simd_any(bool);
struct simd_vote {
    typedef ulong vote_t;
    vote_t bits;
    explicit operator vote_t() const { return bits; }
};
simd_vote simd_ballot(bool);

template <class T, int C, int R> struct simdgroup_matrix {
    T e[2];
};
template <class T, int C, int R> simdgroup_matrix<T, C, R> make_filled_simdgroup_matrix(T);
template <class T>
void simdgroup_load(thread simdgroup_matrix<T, 8, 8> &, const threadgroup T *, ulong, vec<ulong, 2> = vec<ulong, 2>(0ul), bool = false);
template <class T>
void simdgroup_load(thread simdgroup_matrix<T, 8, 8> &, const device T *, ulong, vec<ulong, 2> = vec<ulong, 2>(0ul), bool = false);
template <class T> void simdgroup_store(simdgroup_matrix<T, 8, 8>, threadgroup T *, ulong);
template <class T> void simdgroup_store(simdgroup_matrix<T, 8, 8>, device T *, ulong);
template <class A, class B, class D>
void simdgroup_multiply_accumulate(thread simdgroup_matrix<D, 8, 8> &, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>,
                                   simdgroup_matrix<D, 8, 8>);
template <class A, class B, class D>
void simdgroup_multiply(thread simdgroup_matrix<D, 8, 8> &, simdgroup_matrix<A, 8, 8>, simdgroup_matrix<B, 8, 8>);

} // namespace metal

#define VECTORS(T)                                                                                                     \
    typedef metal::vec<T, 2> T##2;                                                                                     \
    typedef metal::vec<T, 3> T##3;                                                                                     \
    typedef metal::vec<T, 4> T##4;
VECTORS(float)
VECTORS(half)
VECTORS(uchar)
typedef metal::packed_vec<half, 4> packed_half4;
struct uint3 {
    uint x, y, z;
};
struct ushort3 {
    ushort x, y, z;
};
typedef metal::simdgroup_matrix<float, 8, 8> simdgroup_float8x8;
typedef metal::simdgroup_matrix<half, 8, 8> simdgroup_half8x8;
template <class T, class F> T as_type(F x) {
    return __builtin_bit_cast(T, x);
}

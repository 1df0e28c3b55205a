// Runs HIP device code on the CPU: every thread of a block is a fibre, waves have SHIM_WAVE (32 or 64) lanes.
//
// A fibre runs until it meets a barrier or an exchange between lanes. When all fibres of a block wait, each wave
// carries out the exchange of those of its waiting lanes that have met the fewest so far, as an execution mask would;
// lanes that took another branch or have returned are not among them. Reading from such a lane ends the program: on a
// GPU the value would be undefined. When only barriers are left, all threads go on; threads that wait at different ones
// end the program.
//
// Shared memory is thread_local memory of the one operating-system thread; its dynamic part is filled with noise before
// every block and must be intact behind its declared size afterwards. The instructions of AMD GPUs are modelled by
// their ISA descriptions, so the AMD branches of csrc/cuda/device.cuh are what runs. Not seen here: races between waves
// that a particular order hides, register pressure, compiler bugs, real arithmetic of exp2 and tanh.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include <ucontext.h>

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

namespace shim {

constexpr int WAVE = SHIM_WAVE;

[[noreturn]] inline void fail(const char * what) {
    fprintf(stderr, "shim: %s\n", what);
    exit(3);
}

enum class wait { none, barrier, exchange, done };

struct fibre {
    ucontext_t context;
    std::vector<char> stack;
    wait waits = wait::none;
    int site = 0;       // line of the barrier
    long exchanges = 0; // met so far in this block
    uint64_t value = 0; // what the lane offers
    int source = 0;     // lane whose value it wants; -1: the mask of lanes that offer a nonzero value
    dim3 index;
};

struct machine {
    std::vector<fibre> fibres;
    ucontext_t scheduler;
    int running = 0;
    dim3 block, grid, block_index;
    std::function<void()> body;

    fibre & self() { return fibres[running]; }

    void pause(wait why) {
        self().waits = why;
        swapcontext(&self().context, &scheduler);
    }

    static void entry();

    void start(int i) {
        fibre & f = fibres[i];
        if (f.stack.empty()) {
            f.stack.resize(256 * 1024);
        }
        f.waits = wait::none, f.exchanges = 0;
        f.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = &scheduler;
        makecontext(&f.context, entry, 0);
    }

    // One exchange of one wave; false if none of its lanes waits for one.
    bool exchange(int first, int last) {
        long fewest = -1;
        for (int i = first; i < last; i++) {
            if (fibres[i].waits == wait::exchange && (fewest < 0 || fibres[i].exchanges < fewest)) {
                fewest = fibres[i].exchanges;
            }
        }
        if (fewest < 0) {
            return false;
        }
        std::vector<int> lanes;
        uint64_t mask = 0;
        uint64_t offered[64] = {};
        bool active[64] = {};
        for (int i = first; i < last; i++) {
            if (fibres[i].waits == wait::exchange && fibres[i].exchanges == fewest) {
                lanes.push_back(i);
                active[i - first] = true;
                offered[i - first] = fibres[i].value;
                mask |= (uint64_t) (fibres[i].value != 0) << (i - first);
            }
        }
        for (int i : lanes) {
            fibre & f = fibres[i];
            if (f.source >= 0) {
                if (f.source >= last - first || !active[f.source]) {
                    fail("a lane reads from one that does not take part");
                }
                f.value = offered[f.source];
            } else {
                f.value = mask;
            }
            f.waits = wait::none;
            f.exchanges++;
        }
        return true;
    }

    void run_block() {
        const int n = (int) (block.x * block.y * block.z);
        if ((int) fibres.size() < n) {
            fibres.resize(n);
        }
        for (int i = 0; i < n; i++) {
            start(i);
        }
        for (;;) {
            for (int i = 0; i < n; i++) {
                if (fibres[i].waits == wait::none) {
                    running = i;
                    swapcontext(&scheduler, &fibres[i].context);
                }
            }
            bool any = false;
            for (int w = 0; w < n; w += WAVE) {
                any |= exchange(w, std::min(n, w + WAVE));
            }
            if (any) {
                continue;
            }
            int site = 0;
            for (int i = 0; i < n; i++) {
                if (fibres[i].waits == wait::barrier) {
                    if (site && fibres[i].site != site) {
                        fail("threads wait at different barriers");
                    }
                    site = fibres[i].site;
                    fibres[i].waits = wait::none;
                }
            }
            if (!site) {
                return;
            }
        }
    }
};

inline machine & gpu() {
    static machine m;
    return m;
}

inline void machine::entry() {
    gpu().body();
    gpu().self().waits = wait::done;
}

// The lane's own index as a bit pattern of any type of up to 8 bytes.
template <class X> uint64_t pack(X x) {
    uint64_t v = 0;
    static_assert(sizeof(X) <= 8, "one register pair");
    memcpy(&v, &x, sizeof(X));
    return v;
}

template <class X> X trade(X x, int source) {
    fibre & f = gpu().self();
    f.value = pack(x), f.source = source;
    gpu().pause(wait::exchange);
    X out;
    memcpy(&out, &gpu().self().value, sizeof(X));
    return out;
}

inline int lane() {
    return gpu().running % WAVE;
}

inline void barrier(int line) {
    gpu().self().site = line;
    gpu().pause(wait::barrier);
}

// Runs kernel(args...) on every block of the grid. dynamic: the kernel's dynamic shared memory, of which it may use
// bytes.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, char * dynamic, size_t capacity, size_t bytes, A... args) {
    machine & m = gpu();
    if (bytes > capacity) {
        fail("a kernel wants more shared memory than a work-group has");
    }
    m.grid = grid, m.block = block;
    m.body = [=] { kernel(args...); };
    for (unsigned z = 0; z < grid.z; z++) {
        for (unsigned y = 0; y < grid.y; y++) {
            for (unsigned x = 0; x < grid.x; x++) {
                m.block_index = dim3(x, y, z);
                memset(dynamic, 0xa5, capacity);
                m.run_block();
                for (size_t i = bytes; i < capacity; i++) {
                    if ((unsigned char) dynamic[i] != 0xa5) {
                        fail("a kernel wrote behind its shared memory");
                    }
                }
            }
        }
    }
}

} // namespace shim

#define threadIdx       (shim::gpu().self().index)
#define blockIdx        (shim::gpu().block_index)
#define blockDim        (shim::gpu().block)
#define gridDim         (shim::gpu().grid)
#define __syncthreads() shim::barrier(__LINE__)

// ------------------------------------------------------------------------------------------------ lanes

inline int __lane_id() {
    return shim::lane();
}
inline uint64_t __ballot(bool b) {
    return shim::trade<uint64_t>(b, -1);
}
template <class X> X __shfl_xor(X x, int mask, int width) {
    const int l = shim::lane(), to = l ^ mask;
    return shim::trade(x, to / width == l / width ? to : l);
}
template <class X> X __shfl(X x, int lane, int width) {
    const int l = shim::lane();
    return shim::trade(x, l / width * width + (lane & (width - 1)));
}
template <class X> X __shfl_up(X x, unsigned delta, int width) {
    const int l = shim::lane(), to = l - (int) delta;
    return shim::trade(x, l % width >= (int) delta ? to : l);
}
template <class X> X __shfl_down(X x, unsigned delta, int width) {
    const int l = shim::lane(), to = l + (int) delta;
    return shim::trade(x, l % width + (int) delta < width ? to : l);
}
inline void __builtin_amdgcn_fence(int, const char *) {}
inline void __builtin_amdgcn_wave_barrier() {
    shim::trade(0, -1);
}

// ------------------------------------------------------------------------------------------------ instructions

// V_PERM_B32: byte i is selected from {a, b} (b holds bytes 0..3) by byte i of sel; only selectors 0..7 are used.
inline uint32_t __builtin_amdgcn_perm(uint32_t a, uint32_t b, uint32_t sel) {
    const uint64_t v = (uint64_t) a << 32 | b;
    uint32_t r = 0;
    for (int i = 0; i < 4; i++) {
        const uint32_t s = sel >> (8 * i) & 255u;
        if (s > 7) {
            shim::fail("v_perm_b32 with a selector above 7");
        }
        r |= (uint32_t) (v >> (8 * s) & 255u) << (8 * i);
    }
    return r;
}
// V_DOT4_I32_I8
inline int __builtin_amdgcn_sdot4(int a, int b, int c, bool) {
    for (int i = 0; i < 4; i++) {
        c += (int) (int8_t) (a >> (8 * i)) * (int) (int8_t) (b >> (8 * i));
    }
    return c;
}
// V_DOT4_I32_IU8
inline int __builtin_amdgcn_sudot4(bool sa, int a, bool sb, int b, int c, bool) {
    if (!sa || !sb) {
        shim::fail("sudot4 is used with signed bytes only");
    }
    return __builtin_amdgcn_sdot4(a, b, c, false);
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

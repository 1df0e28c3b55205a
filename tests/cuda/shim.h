// Runs CUDA device code on the CPU (tests/shim/fibres.h): warps of 32 lanes, the names of CUDA C++ and of as much of
// its runtime as the launchers use. Compiled like code for a device without PTX, so the generic branches of
// csrc/cuda/device.cuh are what runs; instructions.h stands for csrc/cuda/decode-instructions.cuh.
//
// An exchange between lanes waits for all lanes that its mask names, as on a GPU since compute capability 7.0. Lanes
// that have left, and lanes that meet another instruction, end the program. Atomics need no more than a fibre that is
// not interrupted; fences order nothing.
#pragma once

#define SHIM_WAVE 32
#include "../shim/fibres.h"

#define __grid_constant__

namespace shim {

enum class lane_op { sync, shuffle, ballot, sum, mma_s8s8_k32, mma_s8u8_k16 };

// Registers that a lane brings (in) and gets back (out). source: the lane that a shuffle reads.
struct lane_offer {
    lane_op op;
    uint32_t mask;
    const uint32_t * in;
    uint32_t * out;
    int source;
};

// Products of whole matrices, from the operands of 32 lanes; instructions.h.
void matrix_product(lane_op op, const lane_offer * const * lanes);

inline void carry_out(fibre * const * lanes, const lane_offer * const * offers, const lane_offer & first) {
    uint32_t ballot = 0, sum = 0;
    switch (first.op) {
        case lane_op::sync:
            break;
        case lane_op::shuffle: {
            uint32_t low[32], high[32];
            for (int i = 0; i < 32; i++) {
                if (offers[i]) {
                    low[i] = offers[i]->in[0], high[i] = offers[i]->in[1];
                }
            }
            for (int i = 0; i < 32; i++) {
                if (offers[i]) {
                    const int from = offers[i]->source;
                    if (!offers[from]) {
                        fail("a lane reads from one that does not take part");
                    }
                    offers[i]->out[0] = low[from], offers[i]->out[1] = high[from];
                }
            }
            break;
        }
        case lane_op::ballot:
        case lane_op::sum:
            for (int i = 0; i < 32; i++) {
                if (offers[i]) {
                    ballot |= (uint32_t) (offers[i]->in[0] != 0) << i, sum += offers[i]->in[0];
                }
            }
            for (int i = 0; i < 32; i++) {
                if (offers[i]) {
                    offers[i]->out[0] = first.op == lane_op::ballot ? ballot : sum;
                }
            }
            break;
        default:
            if (first.mask != 0xffffffffu) {
                fail("a matrix product takes all lanes of a warp");
            }
            matrix_product(first.op, offers);
            break;
    }
    for (int i = 0; i < 32; i++) {
        if (offers[i]) {
            lanes[i]->waits = wait::none;
        }
    }
}

inline bool exchange_lanes(fibre * const * lanes, int n) {
    bool any = false;
    for (int begin = 0; begin < n; begin++) {
        if (lanes[begin]->waits != wait::exchange) {
            continue;
        }
        const lane_offer & first = *(const lane_offer *) lanes[begin]->offer;
        const lane_offer * offers[32] = {};
        bool all = true;
        for (int i = 0; i < 32 && all; i++) {
            if (!(first.mask >> i & 1)) {
                continue;
            }
            if (i >= n || lanes[i]->waits == wait::done) {
                fail("a warp waits for a lane that has left");
            }
            if (lanes[i]->waits != wait::exchange) {
                all = false;
                break;
            }
            offers[i] = (const lane_offer *) lanes[i]->offer;
            if (offers[i]->op != first.op || offers[i]->mask != first.mask) {
                fail("lanes of a warp meet different instructions");
            }
        }
        if (!all) {
            continue;
        }
        if (!offers[begin]) {
            fail("a lane is not among those it waits for");
        }
        carry_out(lanes, offers, first);
        any = true;
    }
    return any;
}

inline void exchange(lane_op op, uint32_t mask, const uint32_t * in, uint32_t * out, int source = 0) {
    lane_offer o = {op, mask, in, out, source};
    gpu().running->offer = &o;
    gpu().pause(wait::exchange);
}

template <class X> X shuffle(uint32_t mask, X x, int source) {
    static_assert(sizeof(X) <= 8, "one register pair");
    uint32_t in[2] = {}, out[2];
    memcpy(in, &x, sizeof(X));
    exchange(lane_op::shuffle, mask, in, out, source);
    memcpy(&x, out, sizeof(X));
    return x;
}

inline uint32_t reduce(lane_op op, uint32_t mask, uint32_t x) {
    uint32_t out = 0;
    exchange(op, mask, &x, &out);
    return out;
}

} // namespace shim

// ------------------------------------------------------------------------------------------------ lanes

template <class X> X __shfl_sync(unsigned mask, X x, int lane, int width = 32) {
    return shim::shuffle(mask, x, shim::lane() / width * width + (lane & (width - 1)));
}
template <class X> X __shfl_xor_sync(unsigned mask, X x, int bits, int width = 32) {
    const int l = shim::lane(), to = l ^ bits;
    return shim::shuffle(mask, x, to / width <= l / width ? to : l);
}
template <class X> X __shfl_up_sync(unsigned mask, X x, unsigned delta, int width = 32) {
    const int l = shim::lane(), to = l - (int) delta;
    return shim::shuffle(mask, x, l % width >= (int) delta ? to : l);
}
template <class X> X __shfl_down_sync(unsigned mask, X x, unsigned delta, int width = 32) {
    const int l = shim::lane(), to = l + (int) delta;
    return shim::shuffle(mask, x, l % width + (int) delta < width ? to : l);
}
inline unsigned __ballot_sync(unsigned mask, int x) {
    return shim::reduce(shim::lane_op::ballot, mask, x != 0);
}
inline int __any_sync(unsigned mask, int x) {
    return __ballot_sync(mask, x) != 0;
}
inline int __all_sync(unsigned mask, int x) {
    return __ballot_sync(mask, x) == mask;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned x) {
    return shim::reduce(shim::lane_op::sum, mask, x);
}
inline int __reduce_add_sync(unsigned mask, int x) {
    return (int) shim::reduce(shim::lane_op::sum, mask, (uint32_t) x);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    shim::exchange(shim::lane_op::sync, mask, nullptr, nullptr);
}

// ------------------------------------------------------------------------------------------------ memory, arithmetic

inline void __threadfence() {}
inline void __threadfence_block() {}
template <class X> X atomicAdd(X * at, std::common_type_t<X> x) {
    const X before = *at;
    *at = before + x;
    return before;
}
inline unsigned atomicInc(unsigned * at, unsigned last) {
    const unsigned before = *at;
    *at = before >= last ? 0 : before + 1;
    return before;
}
inline void __nanosleep(unsigned) {
    shim::spin();
}
inline float __fdividef(float a, float b) {
    return a / b;
}
inline float __log2f(float x) {
    return log2f(x);
}
inline int __float_as_int(float f) {
    return (int) __float_as_uint(f);
}
inline float __int_as_float(int x) {
    return __uint_as_float((unsigned) x);
}

// ------------------------------------------------------------------------------------------------ runtime

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID {
    cudaLaunchAttributeClusterDimension,
    cudaLaunchAttributeProgrammaticStreamSerialization,
    cudaLaunchAttributeCooperative
};
typedef struct shim_stream * cudaStream_t;
typedef struct shim_event * cudaEvent_t;

struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    union {
        struct {
            unsigned x, y, z;
        } clusterDim;
        int programmaticStreamSerializationAllowed, cooperative;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute * attrs;
    unsigned numAttrs;
};

namespace shim {

// What the test says of the device, and how blocks are to run.
struct device {
    int n_sm = 4, shared_bytes = 232448;
    bool together = false; // whole grids at once, also where no launch asks for it
    char * dynamic = nullptr;
    size_t capacity = 0;
    std::vector<std::pair<const void *, int>> granted; // dynamic shared memory that kernels were allowed

    int limit(const void * kernel) const {
        int bytes = 48 * 1024;
        for (const auto & g : granted) {
            bytes = g.first == kernel ? g.second : bytes;
        }
        return bytes;
    }
};
inline device device_;

} // namespace shim

inline cudaError_t cudaDeviceGetAttribute(int * x, cudaDeviceAttr what, int) {
    *x = what == cudaDevAttrMultiProcessorCount ? shim::device_.n_sm : shim::device_.shared_bytes;
    return cudaSuccess;
}

template <class K> cudaError_t cudaFuncSetAttribute(K * kernel, cudaFuncAttribute, int bytes) {
    if (bytes > shim::device_.shared_bytes) {
        return cudaErrorInvalidValue;
    }
    shim::device_.granted.push_back({(const void *) kernel, bytes});
    return cudaSuccess;
}

// There is one stream.
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
    return cudaSuccess;
}

// Every launch has ended when this returns.
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t * c, void (*kernel)(P...), A... args) {
    shim::machine & m = shim::gpu();
    int cluster = 1;
    bool together = shim::device_.together;
    for (unsigned i = 0; i < c->numAttrs; i++) {
        const cudaLaunchAttribute & a = c->attrs[i];
        if (a.id == cudaLaunchAttributeClusterDimension) {
            cluster = (int) a.val.clusterDim.x;
            if (a.val.clusterDim.y != 1 || a.val.clusterDim.z != 1) {
                shim::fail("clusters lie along x");
            }
        }
        together |= a.id == cudaLaunchAttributeCooperative && a.val.cooperative;
    }
    if (c->dynamicSmemBytes > (size_t) shim::device_.limit((const void *) kernel) ||
        c->blockDim.x * c->blockDim.y * c->blockDim.z > 1024 || cluster > 16) {
        return cudaErrorInvalidValue;
    }
    m.stack_bytes = 64 * 1024;
    m.grid = c->gridDim, m.block = c->blockDim;
    m.dynamic = shim::device_.dynamic, m.capacity = shim::device_.capacity, m.dynamic_bytes = c->dynamicSmemBytes;
    m.body = [=] { kernel(args...); };
    m.run_grid(cluster, together);
    return cudaSuccess;
}

// What the op-level harnesses share: error checks, random input, timing by events.
#pragma once

#include "../../csrc/pytq.h"
#include "host_math.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <utility>
#include <vector>

#define CHECK(x)                                                                                                       \
    do {                                                                                                               \
        cudaError_t e_ = (x);                                                                                          \
        if (e_ != cudaSuccess) {                                                                                       \
            fprintf(stderr, "error: %s at %s:%d: %s\n", #x, __FILE__, __LINE__, cudaGetErrorString(e_));               \
            exit(1);                                                                                                   \
        }                                                                                                              \
    } while (0)

static bool failed = false;

template <class X> static X * upload(const std::vector<X> & x, size_t pad = 0) {
    X * d;
    CHECK(cudaMalloc(&d, x.size() * sizeof(X) + pad));
    CHECK(cudaMemcpy(d, x.data(), x.size() * sizeof(X), cudaMemcpyHostToDevice));
    return d;
}

// n_vec blocks of a type: vectors of a pool that csrc/ref encoded, in a scattered order. scaled: their sizes differ by
// up to nine times.
inline std::vector<uint8_t> blocks_of(const pytq_type_info * t, size_t n_vec, unsigned seed, bool scaled = false) {
    constexpr size_t POOL = 512;
    static std::map<std::pair<int, unsigned>, std::vector<uint8_t>> pools;
    std::vector<uint8_t> & pool = pools[{t->id, seed}];
    if (pool.empty()) {
        std::vector<float> x = gaussian(POOL * t->head_dim, seed);
        for (size_t i = 0; i < x.size() && scaled; i++) {
            x[i] *= 0.25f + 2.0f * (float) (i / t->head_dim % 7) / 7.0f;
        }
        pool.resize(POOL * t->block_bytes);
        pytq_quantize_ref(t, x.data(), pool.data(), (int64_t) x.size());
    }
    std::vector<uint8_t> out(n_vec * t->block_bytes);
    for (size_t i = 0; i < n_vec; i++) {
        memcpy(&out[i * t->block_bytes], &pool[(i * 2654435761u >> 7) % POOL * t->block_bytes], t->block_bytes);
    }
    return out;
}

// Median over 7 series of n calls, microseconds per call.
template <class F> static double median_us(F f, int n) {
    cudaEvent_t e0, e1;
    CHECK(cudaEventCreate(&e0));
    CHECK(cudaEventCreate(&e1));
    std::vector<double> us;
    for (int i = 0; i < 5; i++) {
        f(i);
    }
    for (int r = 0; r < 7; r++) {
        CHECK(cudaEventRecord(e0));
        for (int i = 0; i < n; i++) {
            f(i);
        }
        CHECK(cudaEventRecord(e1));
        CHECK(cudaEventSynchronize(e1));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, e0, e1));
        us.push_back(1e3 * ms / n);
    }
    std::sort(us.begin(), us.end());
    return us[us.size() / 2];
}

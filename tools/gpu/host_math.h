// Random vectors, the Walsh product in double precision and blocks of Q8_1, for the harnesses on GPUs and for
// tests/cuda. No CUDA here.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

inline std::vector<float> gaussian(size_t n, unsigned seed, float sigma = 1.0f) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal(0.0f, sigma);
    std::vector<float> x(n);
    for (float & v : x) {
        v = normal(rng);
    }
    return x;
}

// x times the Walsh matrix in natural order over the root of its order.
inline std::vector<double> walsh(const std::vector<double> & x) {
    std::vector<double> y(x.size(), 0.0);
    for (size_t c = 0; c < x.size(); c++) {
        for (size_t b = 0; b < x.size(); b++) {
            y[c] += (__builtin_popcountll(b & c) & 1 ? -x[b] : x[b]) / sqrt((double) x.size());
        }
    }
    return y;
}

// A block of Q8_1 as upstream's ggml-common.h has it: scale and sum of 32 values in half precision (HALF, which
// to_float reads), then their bytes.
struct q8_1_block {
    static constexpr int bytes = 36;
    float step, sum;
    const int8_t * levels;
    template <class HALF, class F>
    q8_1_block(const HALF * at, const F & to_float)
        : step(to_float(at[0])), sum(to_float(at[1])), levels((const int8_t *) (at + 2)) {}
    double value(int i) const { return (double) step * levels[i]; }
    // By how much value i may be off because the scale is rounded: half precision has 11 bits, fewer below 2^-14.
    double scale_error(int i) const { return std::abs(levels[i]) * std::max(step / 2048.0, 0x1p-25); }
};

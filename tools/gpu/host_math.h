// Random vectors and the Walsh product in double precision, for the harnesses on GPUs and for tests/cuda. No CUDA here.
#pragma once

#include <cmath>
#include <cstddef>
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

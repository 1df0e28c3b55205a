// Host side of encode.cuh: which kernel a job takes, and its grid.
#pragma once

#include "encode.cuh"

namespace pytq {

constexpr long long encode_wide_from = 1024; // more vectors than this take the shape for throughput

using encode_kernel = void (*)(encode_job);

// Kernel of a layout, null where there is none.
template <int LANES, int D> inline encode_kernel encode_kernel_of(const layout & l) {
    constexpr int S = PYTQ_CODE_SCALAR, T = PYTQ_CODE_TRELLIS;
    const int bits = l.n_groups > 1 ? 0 : l.group_bits[0];
    if (l.code == S) {
        return bits == 2   ? encode<S, 2, LANES, D>
               : bits == 3 ? encode<S, 3, LANES, D>
               : bits == 4 ? encode<S, 4, LANES, D>
                           : nullptr;
    }
    switch (bits) {
        case 0:
            return encode<T, 0, LANES, 0>;
        case 2:
            return encode<T, 2, LANES, D>;
        case 3:
            return encode<T, 3, LANES, D>;
        case 4:
            return encode<T, 4, LANES, D>;
        case 5:
            return encode<T, 5, LANES, 0>;
        default:
            return nullptr;
    }
}

// Grid of a job: vectors of both sets and of the rotation, which job.p and job.rotate describe already. The second set
// must be of a type that takes the same kernel (encode_same_kernel).
struct encode_launch {
    encode_kernel kernel;
    int blocks, threads, shared_bytes;
    // wide: the shape for throughput
    encode_launch(encode_job & job, long long n_first, long long n_second, bool wide) {
        const layout & l = job.p[0].l;
        const bool d128 = l.d == 128 && (!n_second || job.p[1].l.d == 128) && (!job.rotate.n || job.rotate.d == 128);
        kernel = wide ? (d128 ? encode_kernel_of<8, 128>(l) : encode_kernel_of<8, 0>(l))
                      : (d128 ? encode_kernel_of<32, 128>(l) : encode_kernel_of<32, 0>(l));
        const int lanes = wide ? 8 : 32, per_block = 32 / lanes;
        job.first_end = (int) ((n_first + per_block - 1) / per_block);
        job.second_end = job.first_end + (int) ((n_second + per_block - 1) / per_block);
        blocks = job.second_end + (job.rotate.n + per_block - 1) / per_block;
        threads = 32;
        shared_bytes = per_block * encode_parts(n_second && job.p[1].l.d > l.d ? job.p[1].l.d : l.d, lanes).bytes;
    }
};

inline bool encode_same_kernel(const layout & a, const layout & b) {
    return a.code == b.code && (a.n_groups > 1) == (b.n_groups > 1) &&
           (a.n_groups > 1 || a.group_bits[0] == b.group_bits[0]);
}

} // namespace pytq

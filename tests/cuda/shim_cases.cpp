// Small kernels for test_cuda_shim.py: what the shim has to do right, and what has to end the program.
//
// usage: shim_cases NAME
#include <random> // the shim's macros are not for the library's headers
#include <string>

#include "instructions.h"

namespace {

alignas(16) thread_local char memory[4096];
alignas(16) char source[256];
unsigned counter, results[512];

// ------------------------------------------------------------------------------------------------ right

void lanes() {
    const int t = (int) threadIdx.x, l = t % 32;
    unsigned right = 0;
    right += __ballot_sync(~0u, l % 3 == 0) == 0x49249249u;
    right += __shfl_xor_sync(~0u, t, 5) == (t ^ 5);
    right += __shfl_sync(~0u, (double) t, 7) == t / 32 * 32 + 7;
    right += __shfl_up_sync(~0u, t, 2) == (l < 2 ? t : t - 2);
    right += __shfl_down_sync(~0u, t, 3, 8) == (l % 8 < 5 ? t + 3 : t);
    right += __any_sync(~0u, l == 31) && !__any_sync(~0u, 0);
    right += __reduce_add_sync(~0u, l) == 496;
    if (l < 16) { // the halves take different branches
        right += __shfl_xor_sync(0xffffu, t, 1) == (t ^ 1);
        __syncwarp(0xffffu);
    } else {
        right += __reduce_add_sync(0xffff0000u, 1u) == 16;
    }
    results[t] = right;
}

// A product whose operands are written down by the rows and columns of the PTX ISA, one element after the other.
template <int K> void product() {
    const int lane = (int) threadIdx.x, group = lane / 4, in_group = lane % 4;
    const auto a = [](int row, int column) { return (row * 37 + column * 11 + row * column) % 255 - 127; };
    const auto b = [](int row, int column) {
        const int x = (row * 53 + column * 29 + row * row) % 256;
        return K == 32 ? x - 128 : x;
    };
    uint32_t ar[4] = {}, br[2] = {};
    for (int i = 0; i < K / 2; i++) { // a_i
        const bool upper = K == 32 ? i % 8 >= 4 : i >= 4;
        const int row = upper ? group + 8 : group, column = in_group * 4 + i % 4 + (K == 32 && i >= 8 ? 16 : 0);
        ar[i / 4] |= (uint32_t) (uint8_t) a(row, column) << (8 * (i % 4));
    }
    for (int i = 0; i < K / 4; i++) { // b_i
        br[i / 4] |= (uint32_t) (uint8_t) b(in_group * 4 + i % 4 + (i >= 4 ? 16 : 0), group) << (8 * (i % 4));
    }
    const int c[4] = {1, -2, 3, 0x7fffffff - 40000};
    int d[4];
    if (K == 32) {
        pytq::mma_s8s8_k32(d, ar[0], ar[1], ar[2], ar[3], br[0], br[1], c);
    } else {
        pytq::mma_s8u8_k16(d, ar[0], ar[1], br[0], c);
    }
    unsigned right = 0;
    for (int i = 0; i < 4; i++) {
        const int row = i < 2 ? group : group + 8, column = in_group * 2 + i % 2;
        int want = 0;
        for (int k = 0; k < K; k++) {
            want += a(row, k) * b(k, column);
        }
        right += (unsigned) d[i] == (unsigned) c[i] + (unsigned) want;
    }
    results[lane] = right;
}

void grid_barrier(unsigned round) {
    __syncthreads();
    if (threadIdx.x == 0) {
        atomicAdd(&counter, 1);
        while (*(volatile unsigned *) &counter < gridDim.x * (round + 1)) {
            pytq::spin_wait();
        }
    }
    __syncthreads();
}

// Every block adds to its own shared memory, declared and dynamic, while all others do.
void grid() {
    __shared__ unsigned sum;
    unsigned & other = *(unsigned *) memory;
    if (threadIdx.x == 0) {
        sum = 0, other = blockIdx.x;
    }
    for (unsigned round = 0; round < 3; round++) {
        grid_barrier(round);
        if (threadIdx.x == 5) {
            sum += blockIdx.x, other += 100;
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        results[blockIdx.x] = sum == 3 * blockIdx.x && other == blockIdx.x + 300;
    }
}

void cluster() {
    float * const own = (float *) memory;
    own[threadIdx.x] = (float) (100 * blockIdx.x + threadIdx.x);
    pytq::cluster_sync<true>(4);
    float x[4];
    const uint32_t from = (pytq::cluster_rank() + 1) % 4;
    pytq::cluster_load<4>(x, 16 * (threadIdx.x % 4), from);
    results[32 * blockIdx.x + threadIdx.x] =
        x[2] == (float) (100 * (blockIdx.x / 4 * 4 + from) + threadIdx.x % 4 * 4 + 2);
    pytq::cluster_sync<false>(4);
}

#ifdef PYTQ_BULK
// Two phases of one barrier; bytes that were announced after they were asked for.
void phases() {
    if (threadIdx.x == 0) {
        pytq::barrier_init(0);
    }
    __syncthreads();
    unsigned right = 0;
    for (int phase = 0; phase < 2; phase++) {
        if (threadIdx.x == 0) {
            pytq::copy_bulk(64, source + 16 * phase, 32, 0);
            pytq::barrier_expect(0, 48);
            pytq::copy_bulk(96, source + 64 + 16 * phase, 16, 0);
        }
        pytq::barrier_wait(0, phase);
        right += memory[64] == 16 * phase && memory[95] == 16 * phase + 31 && memory[96] == 64 + 16 * phase;
        __syncthreads();
    }
    results[threadIdx.x] = right;
}
#else
// Groups of copies: the older one has come, the younger one may be on its way.
void phases() {
    const int at = 64 * (int) threadIdx.x;
    pytq::copy16_async(at, source);
    pytq::copy_commit();
    pytq::copy16_async(at + 16, source + 16);
    pytq::copy_commit();
    pytq::copy_wait_older();
    unsigned right = memory[at + 15] == 15 && (unsigned char) memory[at + 16] == 0xa5;
    pytq::copy_wait_all();
    results[threadIdx.x] = right + (memory[at + 31] == 31);
}
#endif

// ------------------------------------------------------------------------------------------------ wrong

void absent() {
    if (threadIdx.x % 32 != 3) {
        __syncwarp();
    }
}
void mixed() {
    if (threadIdx.x % 2) {
        __ballot_sync(~0u, 1);
    } else {
        __shfl_xor_sync(~0u, 1, 2);
    }
}
void part_of_a_warp() {
    int d[4] = {};
    if (threadIdx.x < 16) {
        pytq::mma_s8u8_k16(d, 0, 0, 0, d);
    }
    __syncthreads();
}
void divergent() {
    if (threadIdx.x < 32) {
        __syncthreads();
    } else {
        __syncthreads();
    }
}
void behind() {
    memory[512] = 1;
}
void endless() {
    while (*(volatile unsigned *) &counter != 77) {
        __nanosleep(20);
    }
}
void unpublished() {
    pytq::cluster_sync<true>(2);
    memory[threadIdx.x] = (char) blockIdx.x;
    float x;
    pytq::cluster_load<1>(&x, 0, 1 - pytq::cluster_rank());
    pytq::cluster_sync<false>(2);
}
void left() {
    pytq::cluster_sync<true>(2);
    if (pytq::cluster_rank() == 1) {
        pytq::spin_wait();
        pytq::spin_wait();
        float x;
        pytq::cluster_load<1>(&x, 0, 0);
    }
}
#ifdef PYTQ_BULK
void copy(int to, const char * from, int bytes, int expected) {
    if (threadIdx.x == 0) {
        pytq::barrier_init(0);
        pytq::barrier_expect(0, expected);
        pytq::copy_bulk(to, from, bytes, 0);
        pytq::barrier_wait(0, 0);
    }
}
void unaligned() {
    copy(16, source + 8, 16, 16);
}
void over() {
    copy(16, source + 240, 32, 32);
}
void outside() {
    copy(512, source, 16, 16);
}
void too_few_bytes() {
    copy(16, source, 16, 32);
}
void twice() {
    if (threadIdx.x == 0) {
        pytq::barrier_init(0);
        pytq::barrier_expect(0, 16);
        pytq::barrier_expect(0, 16);
    }
}
void overwritten() {
    if (threadIdx.x == 0) {
        pytq::barrier_init(0);
        memory[0] = 0;
        pytq::barrier_expect(0, 16);
    }
}
void not_waited() {
    if (threadIdx.x == 0) {
        pytq::barrier_init(0);
        pytq::copy_bulk(16, source, 16, 0);
    }
}
#else
void not_waited() {
    pytq::copy16_async(0, source);
    pytq::copy_commit();
}
#endif

void launch(void (*kernel)(), unsigned blocks, int threads, int cluster, bool together) {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t c = {};
    c.gridDim = dim3(blocks), c.blockDim = dim3((unsigned) threads), c.dynamicSmemBytes = 512, c.attrs = attributes;
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim.x = (unsigned) cluster;
    attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
    attributes[1].id = cudaLaunchAttributeCooperative, attributes[1].val.cooperative = together;
    c.numAttrs = 2;
    if (cudaLaunchKernelEx(&c, kernel) != cudaSuccess) {
        exit(4);
    }
}

struct kernel_case {
    const char * name;
    void (*kernel)();
    unsigned blocks;
    int threads, cluster;
    bool together;
    int n_results;
    unsigned want;
};

const kernel_case cases[] = {
    {"lanes", lanes, 1, 96, 1, false, 96, 8},
    {"product32", product<32>, 1, 32, 1, false, 32, 4},
    {"product16", product<16>, 1, 32, 1, false, 32, 4},
    {"grid", grid, 12, 64, 1, true, 12, 1},
    {"grid of clusters", grid, 12, 64, 4, true, 12, 1},
    {"cluster", cluster, 8, 32, 4, false, 256, 1},
    {"phases", phases, 1, 8, 1, false, 8, 2},
    {"absent", absent, 1, 32, 1, false, 0, 0},
    {"mixed", mixed, 1, 32, 1, false, 0, 0},
    {"part of a warp", part_of_a_warp, 1, 32, 1, false, 0, 0},
    {"divergent", divergent, 1, 64, 1, false, 0, 0},
    {"behind", behind, 1, 1, 1, false, 0, 0},
    {"endless", endless, 3, 64, 1, true, 0, 0},
    {"grid, one after another", grid, 3, 64, 1, false, 0, 0},
    {"unpublished", unpublished, 2, 32, 2, false, 0, 0},
    {"left", left, 2, 32, 2, false, 0, 0},
    {"not waited", not_waited, 1, 1, 1, false, 0, 0},
#ifdef PYTQ_BULK
    {"unaligned", unaligned, 1, 1, 1, false, 0, 0},
    {"over", over, 1, 1, 1, false, 0, 0},
    {"outside", outside, 1, 1, 1, false, 0, 0},
    {"too few bytes", too_few_bytes, 1, 1, 1, false, 0, 0},
    {"twice", twice, 1, 1, 1, false, 0, 0},
    {"overwritten", overwritten, 1, 1, 1, false, 0, 0},
#endif
};

} // namespace

int main(int argc, char ** argv) {
    for (int i = 0; i < 256; i++) {
        source[i] = (char) i;
    }
    shim::readable.push_back({source, source + sizeof(source)});
    shim::device_.dynamic = memory, shim::device_.capacity = sizeof(memory);
    for (const kernel_case & c : cases) {
        if (argc != 2 || std::string(argv[1]) != c.name) {
            continue;
        }
        for (uint32_t seed = 0; seed < 4; seed++) {
            shim::gpu().seed = seed;
            counter = 0;
            std::fill(results, results + 512, 0u);
            launch(c.kernel, c.blocks, c.threads, c.cluster, c.together);
            for (int i = 0; i < c.n_results; i++) {
                if (results[i] != c.want) {
                    fprintf(stderr, "seed %u: thread or block %d: %u instead of %u\n", seed, i, results[i], c.want);
                    return 1;
                }
            }
        }
        return 0;
    }
    fprintf(stderr, "usage: shim_cases NAME\n");
    return 2;
}

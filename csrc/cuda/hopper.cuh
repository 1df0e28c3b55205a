// Instructions of compute capability 9.0a that the prefill kernel is made of: barriers with phases, warpgroup matrix
// products, register reallocation. Shared memory is named by its 32-bit address.
#pragma once

#include "device.cuh"

// Defined where the compiler's target has them.
#if defined(PYTQ_PTX) && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define PYTQ_WGMMA 1
#endif

#ifdef PYTQ_WGMMA

namespace pytq {

// ------------------------------------------------------------------------------------------------ barriers

PYTQ_DEV void phase_init(uint32_t barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
PYTQ_DEV void phase_arrive(uint32_t barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// Until the phase of this parity is complete; parity 1 of a new barrier counts as complete.
PYTQ_DEV void phase_wait(uint32_t barrier, int parity) {
    asm volatile("{\n\t.reg .pred p;\n"
                 "WAIT:\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t@p bra DONE;\n\tbra WAIT;\n"
                 "DONE:\n\t}" ::"r"(barrier),
                 "r"(parity)
                 : "memory");
}
// What this thread wrote to shared memory may be read by wgmma once a barrier has ordered it.
PYTQ_DEV void publish_to_wgmma() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Barrier 1..15 of some of the block's threads.
PYTQ_DEV void named_sync(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
PYTQ_DEV void named_arrive(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

PYTQ_DEV void copy16_to_shared(uint32_t to, const void * from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
PYTQ_DEV void copies_commit() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
// All but the latest N groups have arrived.
template <int N> PYTQ_DEV void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

template <int N> PYTQ_DEV void registers_grow() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> PYTQ_DEV void registers_shrink() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

// ------------------------------------------------------------------------------------------------ warpgroup products

// Operand in shared memory in 128-byte swizzle: groups of 8 rows of 128 bytes (64 halves), unit u of 16 bytes of row r
// at u ^ (r & 7); groups follow each other every 1024 bytes. Further 64 columns lie `next` bytes behind.
struct swizzled_operand {
    uint32_t low;
    PYTQ_DEV swizzled_operand(uint32_t address, int next) : low(address >> 4 | (uint32_t) next >> 4 << 16) {}
    PYTQ_DEV swizzled_operand operator+(int bytes) const {
        swizzled_operand r = *this;
        r.low += (uint32_t) bytes >> 4;
        return r;
    }
    // so many bytes further on
    PYTQ_DEV uint64_t at(int bytes) const { return (uint64_t) (1024u >> 4 | 1u << 30) << 32 | (low + (bytes >> 4)); }
};

PYTQ_DEV void wgmma_fence() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
PYTQ_DEV void wgmma_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// All but the latest N groups are complete.
template <int N> PYTQ_DEV void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// The compiler does not know that products write registers later: nothing that reads x may move above this.
template <int N> PYTQ_DEV void pin(float (&x)[N]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        asm volatile("" : "+f"(x[i])::"memory");
    }
}

#define PYTQ_F8(d, i)                                                                                                  \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]),        \
        "+f"(d[i + 7])
#define PYTQ_D32                                                                                                       \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "        \
    "%23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PYTQ_D64                                                                                                       \
    PYTQ_D32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, "  \
             "%52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"

// d[64 x 64] = a b (+ d): a and b in shared memory, columns of both contiguous along the inner dimension.
PYTQ_DEV void wgmma_ss(float (&d)[32], uint64_t a, uint64_t b, int accumulate) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %34, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" PYTQ_D32 "}, %32, %33, p, 1, 1, 0, 0;\n\t}"
                 : PYTQ_F8(d, 0), PYTQ_F8(d, 8), PYTQ_F8(d, 16), PYTQ_F8(d, 24)
                 : "l"(a), "l"(b), "r"(accumulate));
}
// The same with a in registers.
PYTQ_DEV void wgmma_rs(float (&d)[32], const uint32_t * a, uint64_t b, int accumulate) {
    asm volatile("{\n\t.reg .pred p;\n\tsetp.ne.b32 p, %37, 0;\n\t"
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" PYTQ_D32
                 "}, {%32, %33, %34, %35}, %36, p, 1, 1, 0;\n\t}"
                 : PYTQ_F8(d, 0), PYTQ_F8(d, 8), PYTQ_F8(d, 16), PYTQ_F8(d, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(accumulate));
}
// d[64 x 64 or 128] += a b: a in registers, b's columns contiguous along the outer dimension.
PYTQ_DEV void wgmma_rs_outer(float (&d)[32], const uint32_t * a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {" PYTQ_D32
                 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : PYTQ_F8(d, 0), PYTQ_F8(d, 8), PYTQ_F8(d, 16), PYTQ_F8(d, 24)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
PYTQ_DEV void wgmma_rs_outer(float (&d)[64], const uint32_t * a, uint64_t b) {
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" PYTQ_D64
                 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : PYTQ_F8(d, 0), PYTQ_F8(d, 8), PYTQ_F8(d, 16), PYTQ_F8(d, 24), PYTQ_F8(d, 32), PYTQ_F8(d, 40),
                   PYTQ_F8(d, 48), PYTQ_F8(d, 56)
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

} // namespace pytq

#endif // PYTQ_WGMMA

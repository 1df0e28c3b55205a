// Instructions of NVIDIA GPUs that the decode kernel is made of: int8 matrix products, copies that run beside the
// program, barriers that count bytes, memory of a cluster. Shared memory is named by its offset in decode_smem.
#pragma once

#include "attention-levels.cuh"

#if !defined(__HIPCC__) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800)
#define PYTQ_HAVE_MMA 1
#endif

#if defined(PYTQ_CUDA_SHIM)
#include PYTQ_CUDA_SHIM // the same functions for the CPU; tests/cuda
#elif defined(PYTQ_HAVE_MMA)

namespace pytq {

// d = a b + c
PYTQ_DEV void mma_s8s8_k32(int d[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                           const int c[4]) {
    asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

PYTQ_DEV void mma_s8u8_k16(int d[4], uint32_t a0, uint32_t a1, uint32_t b0, const int c[4]) {
    asm("mma.sync.aligned.m16n8k16.row.col.s32.s8.u8.s32 {%0,%1,%2,%3}, {%4,%5}, {%6}, {%7,%8,%9,%10};"
        : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
        : "r"(a0), "r"(a1), "r"(b0), "r"(c[0]), "r"(c[1]), "r"(c[2]), "r"(c[3]));
}

PYTQ_DEV uint32_t shared_address(int at) {
    return (uint32_t) __cvta_generic_to_shared(decode_smem) + at;
}

#if defined(PYTQ_PTX) && __CUDA_ARCH__ >= 900
#define PYTQ_BULK 1

// A barrier that is passed when the bytes announced to it have arrived.
PYTQ_DEV void barrier_init(int at, int arrivals = 1) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(at)), "r"(arrivals) : "memory");
}
PYTQ_DEV void barrier_init_done() {
    asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::: "memory");
}
PYTQ_DEV void barrier_expect(int at, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(at)), "r"(bytes)
                 : "memory");
}
PYTQ_DEV void barrier_wait(int at, int phase) {
    asm volatile("{\n\t.reg .pred p;\n"
                 "WAIT:\n\tmbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t@p bra DONE;\n\tbra WAIT;\n"
                 "DONE:\n\t}" ::"r"(shared_address(at)),
                 "r"(phase)
                 : "memory");
}
// Adds 1 to a word of shared memory, 0 after last; returns what it was. What this warp read and wrote is done before,
// and what it does next comes after what the others did before they arrived.
PYTQ_DEV uint32_t count_arrival(int at, uint32_t last) {
    uint32_t before;
    asm volatile("atom.acq_rel.cta.shared::cta.inc.u32 %0, [%1], %2;"
                 : "=r"(before)
                 : "r"(shared_address(at)), "r"(last)
                 : "memory");
    return before;
}
// All of it 16-byte aligned; the barrier counts the bytes.
PYTQ_DEV void copy_bulk(int to, const void * src, int bytes, int barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(src), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

#else

PYTQ_DEV void copy16_async(int to, const void * src) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(src));
}
PYTQ_DEV void copy_commit() {
    asm volatile("cp.async.commit_group;");
}
PYTQ_DEV void copy_wait_all() {
    asm volatile("cp.async.wait_group 0;" ::: "memory");
}
// Everything but the latest group.
PYTQ_DEV void copy_wait_older() {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
}
#endif // PYTQ_BULK

// Blocks of a cluster; every block is its own cluster before compute capability 9.
PYTQ_DEV uint32_t cluster_rank() {
    uint32_t r = 0;
#if defined(PYTQ_PTX) && __CUDA_ARCH__ >= 900
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
#endif
    return r;
}
#ifdef PYTQ_BULK
// The two halves of a meeting of the cluster's blocks; what a block wrote before it arrived is visible after the wait.
PYTQ_DEV void cluster_arrive() {
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
PYTQ_DEV void cluster_wait() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
#endif
// publish: what was written to shared memory becomes visible to the cluster.
template <bool PUBLISH> PYTQ_DEV void cluster_sync(int cluster) {
#ifdef PYTQ_BULK
    if (cluster > 1) {
        if constexpr (PUBLISH) {
            cluster_arrive();
        } else {
            asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
        }
        cluster_wait();
        return;
    }
#endif
    if constexpr (PUBLISH) {
        __syncthreads();
    }
}
#ifdef PYTQ_BULK
// Writes N (2 or 4) floats to a byte offset in the shared memory of a block of the cluster, and counts them at a
// barrier there.
template <int N> PYTQ_DEV void cluster_push(const float * x, int at, uint32_t rank, int barrier) {
    static_assert(N == 2 || N == 4, "8 or 16 bytes");
    uint32_t a, b;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(shared_address(at)), "r"(rank));
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(b) : "r"(shared_address(barrier)), "r"(rank));
    if constexpr (N == 4) {
        asm volatile(
            "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(a),
            "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]), "r"(b)
            : "memory");
    } else {
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(a),
                     "f"(x[0]), "f"(x[1]), "r"(b)
                     : "memory");
    }
}
#endif
// N floats at a byte offset in the shared memory of a block of the cluster; four at a time need alignment.
template <int N> PYTQ_DEV void cluster_load(float * x, int at, uint32_t rank) {
#if defined(PYTQ_PTX) && __CUDA_ARCH__ >= 900
    uint32_t a;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"(shared_address(at)), "r"(rank));
    if constexpr (N == 4) {
        asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                     : "r"(a));
    } else if constexpr (N == 2) {
        asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];" : "=f"(x[0]), "=f"(x[1]) : "r"(a));
    } else {
        asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x[0]) : "r"(a));
    }
#else
#pragma unroll
    for (int i = 0; i < N; i++) {
        x[i] = ((const float *) (decode_smem + at))[i];
    }
#endif
}

} // namespace pytq

#endif // PYTQ_CUDA_SHIM

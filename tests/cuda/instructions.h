// The functions of csrc/cuda/decode-instructions.cuh for the CPU (compiled with PYTQ_CUDA_SHIM naming this file), by
// the descriptions of the PTX ISA.
//
// Copies read registered memory only, and arrive when the executor says so (shim::copying): late, so that a missing
// wait reads noise, or early, so that a buffer that is still read changes. Barriers live in shared memory like those of
// the hardware. What another block of a cluster may be read from is what the last barrier of the cluster published; a
// change since then is a race and ends the program. With SHIM_NO_BULK the older instructions for copies take the place
// of the copy engine.
//
// shim::fault makes one of the functions wrong: a test that such a build fails the comparison shows that it can fail.
#pragma once

#include "shim.h"

#include <string>

#ifndef SHIM_NO_BULK
#define PYTQ_BULK 1
#endif

namespace shim {

inline std::string fault;
inline bool faulty(const char * what) {
    return !fault.empty() && fault == what;
}

// ------------------------------------------------------------------------------------------------ matrix products

// mma.m16n8kK: lane l has group g = l / 4 and place t = l % 4. Register r of A holds row g + 8 (r % 2), columns
// 4 t + 16 (r / 2) + byte; register r of B column g, rows 4 t + 16 r + byte; value c of C row g + 8 (c / 2), column
// 2 t + c % 2. in: registers of A, of B, of C.
template <int K, bool B_SIGNED> void matrix_product_of(const lane_offer * const * lanes) {
    constexpr int AR = K / 8, BR = K / 16;
    int16_t a[16][K], b[8][K];
    for (int l = 0; l < 32; l++) {
        const int g = l >> 2, t = l & 3;
        for (int r = 0; r < AR; r++) {
            // one that swaps the middle registers, the easiest mistake to make
            const int s = (faulty("keys") && AR == 4) || (faulty("values") && AR == 2) ? (AR - 1 - r) : r;
            for (int byte = 0; byte < 4; byte++) {
                a[g + 8 * (r & 1)][4 * t + 16 * (r >> 1) + byte] = (int8_t) (lanes[l]->in[s] >> (8 * byte));
            }
        }
        for (int r = 0; r < BR; r++) {
            for (int byte = 0; byte < 4; byte++) {
                const uint8_t x = (uint8_t) (lanes[l]->in[AR + r] >> (8 * byte));
                b[g][4 * t + 16 * r + byte] = B_SIGNED ? (int16_t) (int8_t) x : (int16_t) x;
            }
        }
    }
    for (int l = 0; l < 32; l++) {
        for (int c = 0; c < 4; c++) {
            const int16_t *const x = a[(l >> 2) + 8 * (c >> 1)], *const y = b[2 * (l & 3) + (c & 1)];
            int sum = 0;
            for (int k = 0; k < K; k++) {
                sum += (int) x[k] * y[k];
            }
            lanes[l]->out[c] = lanes[l]->in[AR + BR + c] + (uint32_t) sum; // wraps
        }
    }
}

__attribute__((optimize("O3"))) inline void matrix_product(lane_op op, const lane_offer * const * lanes) {
    if (op == lane_op::mma_s8s8_k32) {
        matrix_product_of<32, true>(lanes);
    } else {
        matrix_product_of<16, false>(lanes);
    }
}

// ------------------------------------------------------------------------------------------------ copies

// Global memory that copies may read: what a test registers.
inline std::vector<std::pair<const char *, const char *>> readable;

inline void check_copy(int to, const void * from, int bytes) {
    const char * const at = (const char *) from;
    const char * const target = gpu().dynamic + to;
    if ((uintptr_t) at % 16 || (uintptr_t) target % 16 || bytes % 16 || bytes <= 0) {
        fail("a copy is not aligned to 16 bytes");
    }
    if (to < 0 || to + bytes > (int) gpu().dynamic_bytes) {
        fail("a copy leaves the block's shared memory");
    }
    for (const auto & r : readable) {
        if (at >= r.first && at + bytes <= r.second) {
            return;
        }
    }
    fail("a copy reads outside the buffers");
}

// Barrier in 8 bytes of shared memory.
struct mbarrier {
    uint8_t magic, phase, pending, arrivals; // still to come in this phase, and in each
    int32_t bytes; // announced and not arrived; below 0 if some arrive before they are announced

    static constexpr uint8_t MAGIC = 0x6d;

    static mbarrier & at(int offset) { return at(gpu().dynamic, offset); }
    static mbarrier & at(char * memory, int offset) {
        mbarrier & b = *(mbarrier *) (memory + offset);
        if (offset % 8 || b.magic != MAGIC || b.phase > 1 || b.pending > b.arrivals || b.arrivals > 32) {
            fail("a barrier that was not initialised, or was overwritten");
        }
        return b;
    }
    void change(int arriving, int more) {
        if (arriving > pending) {
            fail("more arrivals at a barrier than it expects");
        }
        pending = (uint8_t) (pending - arriving), bytes += more;
        if (bytes >= 1 << 20 || bytes <= -(1 << 20)) {
            fail("a barrier counts bytes below 2^20 only");
        }
        if (pending == 0 && bytes == 0) {
            phase ^= 1, pending = arrivals;
        }
    }
};

inline void deliver(const copy & c) {
    memcpy(gpu().dynamic + c.to, c.from, (size_t) c.bytes);
    if (c.barrier >= 0) {
        mbarrier::at(c.barrier).change(0, -c.bytes);
    }
}

inline bool at_once() {
    return gpu().when == copying::early || (gpu().when == copying::any && gpu().random(2));
}

// ------------------------------------------------------------------------------------------------ clusters

inline void cluster_barrier(bool publish) {
    machine & m = gpu();
    block_state & own = *m.current;
    // what this thread writes afterwards is not published by this barrier; the last to arrive takes the picture
    m.running->site = publish ? 1 : 2;
    if (publish && !faulty("publish")) {
        m.running->waits = wait::cluster;
        if (std::all_of(own.threads.begin(), own.threads.begin() + own.n,
                        [](const auto & f) { return f->waits == wait::cluster || f->waits == wait::done; })) {
            own.published.assign(m.shared, m.shared + m.shared_bytes);
        }
    }
    m.pause(wait::cluster);
}

// Block `rank` of this block's cluster.
inline block_state & cluster_block(uint32_t rank) {
    machine & m = gpu();
    size_t first = 0;
    while (m.blocks[first].get() != m.current->cluster) {
        first++;
    }
    if (first + rank >= m.blocks.size() || m.blocks[first + rank]->cluster != m.current->cluster) {
        fail("a block that is not in the cluster");
    }
    return *m.blocks[first + rank];
}

// n floats into the shared memory of a block of the cluster, counted at a barrier there.
inline void cluster_write(const float * x, int at, uint32_t rank, int n, int barrier) {
    machine & m = gpu();
    block_state & other = cluster_block(rank);
    const size_t bytes = sizeof(float) * (size_t) n;
    if (other.left) {
        fail("a store to a block that has left");
    }
    if (m.cluster_blocks < 2) {
        fail("a store to a cluster of one block, which hardware refuses");
    }
    if (at < 0 || at + bytes > m.dynamic_bytes || at % bytes) {
        fail("a store to a cluster outside the block's shared memory, or not aligned");
    }
    char * const memory = &other == m.current ? m.dynamic : other.image.data() + (m.dynamic - m.shared);
    memcpy(memory + at, x, bytes);
    mbarrier::at(memory, barrier).change(0, -(int) bytes);
}

inline void cluster_read(float * x, int at, uint32_t rank, int n) {
    machine & m = gpu();
    const size_t i = (size_t) (m.dynamic - m.shared + at), bytes = sizeof(float) * (size_t) n;
    if (at < 0 || at + bytes > m.dynamic_bytes || at % bytes) {
        fail("a load from a cluster outside the block's shared memory, or not aligned");
    }
    if ((int) rank == m.current->cluster_rank) {
        memcpy(x, m.dynamic + at, bytes);
        return;
    }
    const block_state & other = cluster_block(rank);
    if (other.left) {
        fail("a load from a block that has left");
    }
    if (other.published.empty() || memcmp(&other.published[i], &other.image[i], bytes) != 0) {
        fail("a load from a block of the cluster that has not published it");
    }
    memcpy(x, &other.image[i], bytes);
}

} // namespace shim

namespace pytq {

inline void mma_s8s8_k32(int d[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                         const int c[4]) {
    const uint32_t in[10] = {
        a0, a1, a2, a3, b0, b1, (uint32_t) c[0], (uint32_t) c[1], (uint32_t) c[2], (uint32_t) c[3]};
    uint32_t out[4];
    shim::exchange(shim::lane_op::mma_s8s8_k32, 0xffffffffu, in, out);
    memcpy(d, out, sizeof(out));
}

inline void mma_s8u8_k16(int d[4], uint32_t a0, uint32_t a1, uint32_t b0, const int c[4]) {
    const uint32_t in[7] = {a0, a1, b0, (uint32_t) c[0], (uint32_t) c[1], (uint32_t) c[2], (uint32_t) c[3]};
    uint32_t out[4];
    shim::exchange(shim::lane_op::mma_s8u8_k16, 0xffffffffu, in, out);
    memcpy(d, out, sizeof(out));
}

// Before another look at memory that a block elsewhere writes.
inline void spin_wait() {
    shim::spin();
}

#ifdef PYTQ_BULK

inline void barrier_init(int at, int arrivals = 1) {
    const shim::mbarrier b = {shim::mbarrier::MAGIC, 0, (uint8_t) arrivals, (uint8_t) arrivals, 0};
    memcpy(shim::gpu().dynamic + at, &b, sizeof(b));
}
inline void barrier_init_done() {}
inline void barrier_expect(int at, int bytes) {
    shim::mbarrier::at(at).change(1, bytes);
}
inline void barrier_wait(int at, int phase) {
    if (!shim::faulty("wait")) {
        shim::wait_for([=] { return shim::mbarrier::at(at).phase != phase; });
    }
}
inline uint32_t count_arrival(int at, uint32_t last) {
    return atomicInc((uint32_t *) (shim::gpu().dynamic + at), last);
}
inline void copy_bulk(int to, const void * src, int bytes, int barrier) {
    shim::check_copy(to, src, bytes);
    const shim::copy c = {to, (const char *) src, bytes, barrier, 0};
    shim::mbarrier::at(barrier);
    if (shim::at_once()) {
        shim::deliver(c);
    } else {
        shim::gpu().current->copies.push_back(c);
    }
}

#else

inline void copy16_async(int to, const void * src) {
    shim::check_copy(to, src, 16);
    shim::fibre & f = *shim::gpu().running;
    const shim::copy c = {to, (const char *) src, 16, -1, f.group};
    if (shim::at_once()) {
        shim::deliver(c);
    } else {
        f.copies.push_back(c);
    }
}
inline void copy_commit() {
    shim::gpu().running->group++;
}
// The copies of groups before this one.
inline void copy_wait_before(int group) {
    if (shim::faulty("wait")) {
        return;
    }
    std::vector<shim::copy> & copies = shim::gpu().running->copies;
    size_t kept = 0;
    for (const shim::copy & c : copies) {
        if (c.group < group) {
            shim::deliver(c);
        } else {
            copies[kept++] = c;
        }
    }
    copies.resize(kept);
}
inline void copy_wait_all() {
    copy_wait_before(shim::gpu().running->group);
}
inline void copy_wait_older() {
    copy_wait_before(shim::gpu().running->group - 1);
}

#endif // PYTQ_BULK

inline uint32_t cluster_rank() {
    return (uint32_t) shim::gpu().current->cluster_rank;
}
template <bool PUBLISH> void cluster_sync(int cluster) {
    if (cluster > 1) {
        if (PUBLISH || !shim::faulty("leave")) {
            shim::cluster_barrier(PUBLISH);
        }
        return;
    }
    if (PUBLISH && !shim::faulty("publish")) {
        __syncthreads();
    }
}
#ifdef PYTQ_BULK
// Arriving is part of waiting here: nobody goes on before all have come, which is no less than the hardware asks for.
inline void cluster_arrive() {}
inline void cluster_wait() {
    if (!shim::faulty("meet")) {
        shim::cluster_barrier(true);
    }
}
template <int N> void cluster_push(const float * x, int at, uint32_t rank, int barrier) {
    shim::cluster_write(x, at, rank, N, barrier);
}
#endif
template <int N> void cluster_load(float * x, int at, uint32_t rank) {
    shim::cluster_read(x, at, rank, N);
}

} // namespace pytq

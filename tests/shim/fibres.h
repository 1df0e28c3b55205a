// Runs the blocks of a kernel on the CPU: every thread is a fibre, waves (warps) have SHIM_WAVE lanes.
//
// A fibre runs until it has to wait: for lanes of its wave (an exchange), for its block (a barrier), for data, for the
// blocks of its cluster, or because it spins on memory that another block writes. What an exchange is stands in the
// shim of the language (tests/hip/shim.h, tests/cuda/shim.h), which defines exchange_lanes. Threads of a block that
// wait at different barriers end the program, and so do threads that all wait for what never comes.
//
// Blocks run one after another, in clusters of neighbours along x, or all together. Shared memory is thread_local
// memory of the one operating-system thread; a block that runs beside others has an image of it, which is exchanged
// when another block goes on. Its dynamic part is filled with noise before every block and must be intact behind its
// declared size afterwards.
//
// Threads take turns in lockstep, or, with a seed, waves go on in a random order for random times. Not seen: races that
// none of the orders tried shows, register pressure, compiler bugs.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#include <link.h>
#include <setjmp.h>
#include <ucontext.h>
#include <unistd.h>

#include "language.h"

#if defined(__USE_FORTIFY_LEVEL) && __USE_FORTIFY_LEVEL > 0
#error "compile with -U_FORTIFY_SOURCE: a checked longjmp refuses to go to another stack"
#endif

namespace shim {

constexpr int WAVE = SHIM_WAVE;

// Not exit(): a fibre would give back the stack that it stands on.
[[noreturn]] inline void fail(const char * what) {
    fflush(stdout);
    fprintf(stderr, "shim: %s\n", what);
    fflush(stderr);
    _exit(3);
}

enum class wait { none, exchange, barrier, data, cluster, spin, done };

// A copy that runs beside the program. barrier, group: whom it concerns, in the words of the language's shim.
struct copy {
    int to;
    const char * from;
    int bytes, barrier, group;
};

struct fibre {
    jmp_buf at;
    ucontext_t first;
    std::unique_ptr<char[]> stack; // not cleared: pages that no fibre reaches are never touched
    bool begun = false;
    wait waits = wait::done;
    int number = 0;                                // in the block
    int site = 0;                                  // which barrier
    long exchanges = 0;                            // met so far in this block
    void * offer = nullptr;                        // what the lane brings to an exchange
    const std::function<bool()> * ready = nullptr; // whether its data has come
    std::vector<copy> copies;                      // not yet waited for
    int group = 0;                                 // of the copies that it starts next
    dim3 index;
};

struct block_state {
    std::vector<std::unique_ptr<fibre>> threads;
    int n = 0;
    dim3 index;
    int cluster_rank = 0;
    block_state * cluster = nullptr; // first of its cluster; blocks of a cluster are neighbours in machine::blocks
    bool left = false;
    std::vector<copy> copies;           // on their way
    std::vector<char> image, published; // shared memory while others run; as the cluster last saw it
};

// Carries out what the lanes of a wave wait for; false if it cannot be done yet.
bool exchange_lanes(fibre * const * lanes, int n);
// A copy arrives.
void deliver(const copy & c);

enum class copying { late, early, any }; // when a copy arrives: when nothing else can go on, at once, at random

struct machine {
    std::vector<std::unique_ptr<block_state>> blocks; // those that run together
    block_state * current = nullptr;                  // whose shared memory is in place
    fibre * running = nullptr;
    jmp_buf scheduler;
    dim3 block, grid;
    std::function<void()> body;
    size_t stack_bytes = 256 * 1024;
    uint32_t seed = 0; // 0: lockstep
    copying when = copying::late;
    char *shared = nullptr, *dynamic = nullptr; // all shared memory; its dynamic part
    size_t shared_bytes = 0, capacity = 0, dynamic_bytes = 0;
    int cluster_blocks = 1;

    uint32_t random(uint32_t below) {
        seed ^= seed << 13, seed ^= seed >> 17, seed ^= seed << 5;
        return seed % below;
    }

    __attribute__((noinline)) void pause(wait why) {
        running->waits = why;
        if (_setjmp(running->at) == 0) {
            _longjmp(scheduler, 1);
        }
    }

    static void entry();

    __attribute__((noinline)) void resume(fibre & f) {
        running = &f;
        if (_setjmp(scheduler) == 0) {
            if (f.begun) {
                _longjmp(f.at, 1);
            }
            f.begun = true;
            f.stack.reset(new char[stack_bytes]);
            f.stack[0] = canary;
            getcontext(&f.first);
            f.first.uc_stack.ss_sp = f.stack.get();
            f.first.uc_stack.ss_size = stack_bytes;
            f.first.uc_link = nullptr;
            makecontext(&f.first, entry, 0);
            setcontext(&f.first);
        }
        if (f.stack[0] != canary) {
            fail("a thread's stack is too small");
        }
    }

    // ------------------------------------------------------------------------------------------------ shared memory

    static constexpr char canary = 0x5a;
    static constexpr unsigned char noise = 0xa5;

    // The program's thread_local memory: both what kernels declare and what is sized at the launch.
    void find_shared_memory() {
        const auto look = [](struct dl_phdr_info * info, size_t, void * to) {
            machine & m = *(machine *) to;
            for (int i = 0; i < info->dlpi_phnum; i++) {
                if (info->dlpi_phdr[i].p_type == PT_TLS) {
                    m.shared = (char *) info->dlpi_tls_data, m.shared_bytes = info->dlpi_phdr[i].p_memsz;
                }
            }
            return 1; // the program itself comes first
        };
        dl_iterate_phdr(look, this);
        if (dynamic < shared || dynamic + capacity > shared + shared_bytes) {
            fail("dynamic shared memory is not thread_local memory of the program");
        }
    }

    void enter(block_state & b) {
        if (&b == current) {
            return;
        }
        if (current) {
            memcpy(current->image.data(), shared, shared_bytes);
        }
        memcpy(shared, b.image.data(), shared_bytes);
        current = &b;
    }

    void check_behind() {
        for (size_t i = dynamic_bytes; i < capacity; i++) {
            if ((unsigned char) dynamic[i] != noise) {
                fail("a kernel wrote behind its shared memory");
            }
        }
    }

    // ------------------------------------------------------------------------------------------------ one block

    void start(block_state & b, dim3 index) {
        b.n = (int) (block.x * block.y * block.z), b.index = index, b.left = false;
        b.copies.clear(), b.published.clear();
        while ((int) b.threads.size() < b.n) {
            b.threads.push_back(std::make_unique<fibre>());
        }
        for (int i = 0; i < b.n; i++) {
            fibre & f = *b.threads[i];
            f.waits = wait::none, f.exchanges = 0, f.group = 0, f.number = i;
            f.copies.clear();
            f.index = dim3(i % block.x, i / block.x % block.y, i / block.x / block.y);
        }
    }

    // Runs the lanes of a wave that can; whether one did more than spin.
    bool run_lanes(block_state & b, int first, int last) {
        bool any = false;
        for (int i = first; i < last; i++) {
            if (b.threads[i]->waits == wait::none) {
                resume(*b.threads[i]);
                any |= b.threads[i]->waits != wait::spin;
            }
        }
        return any;
    }

    bool exchange(block_state & b, int first, int last) {
        fibre * lanes[WAVE];
        for (int i = first; i < last; i++) {
            lanes[i - first] = b.threads[i].get();
        }
        return exchange_lanes(lanes, last - first);
    }

    bool advance(block_state & b) {
        bool any = false;
        if (!seed) {
            run_lanes(b, 0, b.n);
            for (int w = 0; w < b.n; w += WAVE) {
                any |= exchange(b, w, std::min(b.n, w + WAVE));
            }
            return any;
        }
        const int waves = (b.n + WAVE - 1) / WAVE, first = (int) random((uint32_t) waves);
        for (int i = 0; i < waves; i++) {
            const int w = (first + i) % waves * WAVE, last = std::min(b.n, w + WAVE);
            for (uint32_t turns = 1u << random(8);; turns--) {
                run_lanes(b, w, last);
                if (!exchange(b, w, last)) {
                    break;
                }
                any = true;
                if (turns == 0) {
                    break;
                }
            }
        }
        return any;
    }

    bool arrived(block_state & b) {
        bool any = false;
        for (int i = 0; i < b.n; i++) {
            fibre & f = *b.threads[i];
            if (f.waits == wait::data && (*f.ready)()) {
                f.waits = wait::none, any = true;
            }
        }
        return any;
    }

    bool deliver_one(block_state & b) {
        if (b.copies.empty()) {
            return false;
        }
        const size_t i = seed ? random((uint32_t) b.copies.size()) : 0;
        const copy c = b.copies[i];
        b.copies.erase(b.copies.begin() + (long) i);
        deliver(c);
        return true;
    }

    // Lets the threads of blocks go on that all wait in one way; those that have left do not count.
    bool release(block_state * const * these, int n_blocks, wait what, const char * message) {
        int site = 0;
        bool all = true;
        for (int k = 0; k < n_blocks; k++) {
            for (int i = 0; i < these[k]->n; i++) {
                const fibre & f = *these[k]->threads[i];
                if (f.waits == what) {
                    if (site && f.site != site) {
                        fail(message);
                    }
                    site = f.site;
                } else {
                    all &= f.waits == wait::done;
                }
            }
        }
        if (!site || !all) {
            return false;
        }
        for (int k = 0; k < n_blocks; k++) {
            for (int i = 0; i < these[k]->n; i++) {
                if (these[k]->threads[i]->waits == what) {
                    these[k]->threads[i]->waits = wait::none;
                }
            }
        }
        return true;
    }

    // Until the block can no longer go on by itself.
    void run_block(block_state & b) {
        block_state * const only = &b;
        for (;;) {
            bool any = advance(b);
            if (any && when == copying::any && random(4) == 0) {
                deliver_one(b);
            }
            any = any || arrived(b) || release(&only, 1, wait::barrier, "threads wait at different barriers");
            if (!any && (over(b) || !deliver_one(b))) {
                return;
            }
        }
    }

    // ------------------------------------------------------------------------------------------------ several blocks

    static bool over(const block_state & b) {
        return std::all_of(b.threads.begin(), b.threads.begin() + b.n,
                           [](const auto & f) { return f->waits == wait::done; });
    }

    [[noreturn]] void deadlock() {
        const char * const names[] = {"nothing", "lanes", "a barrier", "data", "a cluster", "memory (spinning)", ""};
        for (int k = 0; k < (int) blocks.size(); k++) {
            for (int i = 0; i < blocks[k]->n; i++) {
                const fibre & f = *blocks[k]->threads[i];
                if (f.waits != wait::done) {
                    fprintf(stderr, "block %d thread %d waits for %s\n", k, i, names[(int) f.waits]);
                    fail("deadlock");
                }
            }
        }
        fail("deadlock");
    }

    // One block that is alone needs no image. published: what a cluster's barrier shows to the others.
    void run_together(int n, int cluster) {
        constexpr int patience = 1000; // rounds in which threads only spin
        int spins = 0;
        for (;;) {
            bool progress = false, spinning = false;
            const int first = seed ? (int) random((uint32_t) n) : 0;
            for (int k = 0; k < n; k++) {
                block_state & b = *blocks[(first + k) % n];
                if (b.left) {
                    continue;
                }
                if (n > 1) {
                    enter(b);
                }
                for (int i = 0; i < b.n; i++) {
                    fibre & f = *b.threads[i];
                    if (f.waits == wait::spin) {
                        resume(f);
                        spinning |= f.waits == wait::spin, progress |= f.waits != wait::spin;
                    } else {
                        progress |= f.waits == wait::none;
                    }
                }
                run_block(b);
                if (over(b)) {
                    if (!b.copies.empty() || std::any_of(b.threads.begin(), b.threads.begin() + b.n,
                                                         [](const auto & f) { return !f->copies.empty(); })) {
                        fail("a block has left before its copies arrived");
                    }
                    check_behind();
                    b.left = true, progress = true;
                }
            }
            for (int k = 0; k < n; k += cluster) {
                block_state * these[64];
                for (int i = 0; i < cluster; i++) {
                    these[i] = blocks[k + i].get();
                }
                progress |= release(these, cluster, wait::cluster, "threads wait at different barriers of a cluster");
            }
            if (std::all_of(blocks.begin(), blocks.begin() + n, [](const auto & b) { return b->left; })) {
                return;
            }
            spins = progress ? 0 : spins + 1;
            if (!progress && (!spinning || spins > patience)) {
                deadlock();
            }
        }
    }

    // together: the grid's blocks do not wait for each other to leave.
    void run_grid(int cluster, bool together) {
        if (dynamic_bytes > capacity) {
            fail("a kernel wants more shared memory than a work-group has");
        }
        const int all = (int) (grid.x * grid.y * grid.z), n = together ? all : cluster;
        cluster_blocks = cluster;
        if (cluster > 64 || (int) grid.x % cluster) {
            fail("the grid is no whole number of clusters");
        }
        while ((int) blocks.size() < n) {
            blocks.push_back(std::make_unique<block_state>());
        }
        if (n > 1) {
            find_shared_memory();
        }
        for (int begin = 0; begin < all; begin += n) {
            current = nullptr;
            memset(dynamic, noise, capacity);
            for (int k = 0; k < n; k++) {
                const int i = begin + k;
                block_state & b = *blocks[k];
                start(b, dim3(i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y));
                b.cluster_rank = k % cluster, b.cluster = blocks[k - k % cluster].get();
                if (n > 1) {
                    b.image.assign(shared, shared + shared_bytes);
                }
            }
            if (n == 1) {
                current = blocks[0].get();
            }
            run_together(n, cluster);
        }
    }
};

inline machine gpu_;
inline machine & gpu() {
    return gpu_;
}

inline void machine::entry() {
    for (;;) { // once per block
        gpu().body();
        gpu().pause(wait::done);
    }
}

inline int lane() {
    return gpu().running->number % WAVE;
}

inline void barrier(int line) {
    gpu().running->site = line;
    gpu().pause(wait::barrier);
}

// Lets other threads go on while this one looks at memory again and again.
inline void spin() {
    gpu().pause(wait::spin);
}

inline void wait_for(const std::function<bool()> & ready) {
    if (!ready()) {
        gpu().running->ready = &ready;
        gpu().pause(wait::data);
    }
}

// Runs kernel(args...) on every block of the grid, one after another. dynamic: the kernel's dynamic shared memory, of
// which it may use bytes.
template <class... P, class... A>
void launch(void (*kernel)(P...), dim3 grid, dim3 block, char * dynamic, size_t capacity, size_t bytes, A... args) {
    machine & m = gpu();
    m.grid = grid, m.block = block, m.dynamic = dynamic, m.capacity = capacity, m.dynamic_bytes = bytes;
    m.body = [=] { kernel(args...); };
    m.run_grid(1, false);
}

} // namespace shim

// (no macros: launchers have members of these names)
inline const dim3 &blockDim = shim::gpu_.block, &gridDim = shim::gpu_.grid;

#define threadIdx       (shim::gpu().running->index)
#define blockIdx        (shim::gpu().current->index)
#define __syncthreads() shim::barrier(__LINE__)

// The executor's fibres: entered once through ucontext, switched with setjmp/longjmp (no system call per switch).
#include "executor.h"

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <random>
#include <stdexcept>

namespace shim {

namespace {

constexpr size_t stack_bytes = 256 * 1024;
constexpr int simd_width = 32;

struct fibre {
    jmp_buf at;
    ucontext_t first;
    char * stack = nullptr;
    bool started = false, done = false;
    int kind = 0, line = 0; // of the call it waits in; kind 0: none
    int step = 0;           // parity of the exchange area
};

constexpr int BARRIER_OF_THREADGROUP = 1, BARRIER_OF_SIMDGROUP = 2, BARRIER_OF_MATRIX = 3;

struct machine {
    std::vector<fibre> fibres;
    jmp_buf scheduler;
    int now = -1; // running thread
    place group, threads, grid;
    const invoker * f = nullptr;
    bindings * b = nullptr;
    // per SIMD group, two areas by parity: a lane may already write the next value while others still read this one
    std::vector<char> area;
} m;

void entry() {
    (*m.f)(*m.b);
    m.fibres[m.now].done = true;
    m.fibres[m.now].kind = m.fibres[m.now].line = 0;
    _longjmp(m.scheduler, 1);
}

// Runs thread i until it waits or returns.
__attribute__((noinline)) void run(int i) {
    m.now = i;
    if (_setjmp(m.scheduler) == 0) {
        fibre & x = m.fibres[i];
        if (x.started) {
            _longjmp(x.at, 1);
        }
        x.started = true;
        getcontext(&x.first);
        x.first.uc_stack.ss_sp = x.stack;
        x.first.uc_stack.ss_size = stack_bytes;
        x.first.uc_link = nullptr;
        makecontext(&x.first, (void (*)()) entry, 0);
        setcontext(&x.first);
    }
}

__attribute__((noinline)) void wait_here(int kind, int line) {
    fibre & x = m.fibres[m.now];
    x.kind = kind, x.line = line;
    if (_setjmp(x.at) == 0) {
        _longjmp(m.scheduler, 1);
    }
}

const char * name_of(int kind) {
    static char other[32];
    switch (kind) {
        case 0: return "the end of the kernel";
        case BARRIER_OF_THREADGROUP: return "threadgroup_barrier";
        case BARRIER_OF_SIMDGROUP: return "simdgroup_barrier";
        case BARRIER_OF_MATRIX: return "simdgroup_load or simdgroup_store";
        default: snprintf(other, sizeof(other), "SIMD-group function '%c'", kind); return other;
    }
}

[[noreturn]] void divergent(int a, int b) {
    fprintf(stderr, "metal shim: divergence: thread %d waits in %s (line %d), ", a, name_of(m.fibres[a].kind), m.fibres[a].line);
    fprintf(stderr, "thread %d in %s (line %d)\n", b, name_of(m.fibres[b].kind), m.fibres[b].line);
    abort();
}

void run_threadgroup(order o, std::mt19937 & rng) {
    const int n = (int) (m.threads.x * m.threads.y * m.threads.z), n_simd = (n + simd_width - 1) / simd_width;
    for (int i = 0; i < n; i++) {
        fibre & x = m.fibres[i];
        x.started = x.done = false, x.kind = x.line = x.step = 0;
    }
    std::vector<int> lanes(n), groups(n_simd);
    for (int i = 0; i < n; i++) lanes[i] = i;
    for (int s = 0; s < n_simd; s++) groups[s] = s;
    auto arrange = [&](std::vector<int> & v, int from, int to) {
        if (o == REVERSE) std::reverse(v.begin() + from, v.begin() + to);
        if (o == SHUFFLED) std::shuffle(v.begin() + from, v.begin() + to, rng);
    };
    arrange(groups, 0, n_simd);
    for (int s = 0; s < n_simd; s++) arrange(lanes, s * simd_width, std::min(n, (s + 1) * simd_width));

    for (;;) {
        bool all_done = true;
        for (int s : groups) {
            const int from = s * simd_width, to = std::min(n, from + simd_width);
            for (;;) {
                for (int k = from; k < to; k++) {
                    if (!m.fibres[lanes[k]].done) run(lanes[k]);
                }
                const fibre & first = m.fibres[from];
                for (int i = from + 1; i < to; i++) {
                    if (m.fibres[i].kind != first.kind || m.fibres[i].line != first.line) divergent(from, i);
                }
                if (first.done || first.kind == BARRIER_OF_THREADGROUP) break;
            }
            all_done = all_done && m.fibres[from].done;
        }
        for (int s = 1; s < n_simd; s++) {
            const fibre &a = m.fibres[0], &b = m.fibres[s * simd_width];
            if (a.kind != b.kind || a.line != b.line) divergent(0, s * simd_width);
        }
        if (all_done) return;
    }
}

} // namespace

int lane() {
    return m.now % simd_width;
}
int simdgroup() {
    return m.now / simd_width;
}
place threadgroup_position() {
    return m.group;
}
place threads_per_threadgroup() {
    return m.threads;
}
place threadgroups_per_grid() {
    return m.grid;
}

place attribute_place(int a) {
    const uint32_t i = (uint32_t) m.now;
    const uint32_t n = m.threads.x * m.threads.y * m.threads.z;
    switch (a) {
        case threadgroup_position_in_grid: return m.group;
        case thread_position_in_threadgroup:
            return {i % m.threads.x, i / m.threads.x % m.threads.y, i / (m.threads.x * m.threads.y)};
        case thread_index_in_threadgroup: return {i, 0, 0};
        case thread_index_in_simdgroup: return {i % simd_width, 0, 0};
        case simdgroup_index_in_threadgroup: return {i / simd_width, 0, 0};
        case threads_per_threadgroup_: return m.threads;
        case threadgroups_per_grid_: return m.grid;
        case threads_per_simdgroup: return {simd_width, 0, 0};
        case simdgroups_per_threadgroup: return {(n + simd_width - 1) / simd_width, 0, 0};
        default: abort();
    }
}

void barrier(scope s, int line) {
    wait_here(s == THREADGROUP ? BARRIER_OF_THREADGROUP : s == SIMDGROUP ? BARRIER_OF_SIMDGROUP : BARRIER_OF_MATRIX, line);
}

void * exchange_bytes(const void * mine, size_t bytes, int kind, int line) {
    fibre & x = m.fibres[m.now];
    char * const at = m.area.data() + ((size_t) simdgroup() * 2 + (x.step & 1)) * simd_width * max_exchange;
    x.step++;
    memcpy(at + (size_t) lane() * bytes, mine, bytes);
    wait_here(kind, line);
    return at;
}

void dispatch(const invoker & f, bindings & b, place grid, place threads, order o) {
    const size_t n = (size_t) threads.x * threads.y * threads.z;
    if (n == 0 || n > 1024 || (n > simd_width && n % simd_width)) {
        fprintf(stderr, "metal shim: %zu threads in a threadgroup\n", n);
        abort();
    }
    while (m.fibres.size() < n) {
        m.fibres.emplace_back();
        void * stack = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (stack == MAP_FAILED) abort();
        m.fibres.back().stack = (char *) stack;
    }
    m.area.resize((n / simd_width + 1) * 2 * simd_width * max_exchange);
    m.f = &f, m.b = &b, m.threads = threads, m.grid = grid;
    std::mt19937 rng(7);
    b.threadgroup_memory.resize(b.threadgroup_bytes.size());
    for (uint32_t z = 0; z < grid.z; z++) {
        for (uint32_t y = 0; y < grid.y; y++) {
            for (uint32_t x = 0; x < grid.x; x++) {
                m.group = {x, y, z};
                for (size_t i = 0; i < b.threadgroup_bytes.size(); i++) {
                    b.threadgroup_memory[i].assign(b.threadgroup_bytes[i], (char) 0xff);
                }
                run_threadgroup(o, rng);
            }
        }
    }
}

static std::map<std::string, invoker> & kernels() {
    static std::map<std::string, invoker> all;
    return all;
}
static std::multimap<int, std::function<void(double)>> & constants() {
    static std::multimap<int, std::function<void(double)>> all;
    return all;
}

void kernel_entry::add(const char * name, invoker f) {
    kernels()[name] = std::move(f);
}
const invoker & find_kernel(const std::string & name) {
    return kernels().at(name);
}
void function_constant::add(int id, std::function<void(double)> set) {
    constants().emplace(id, std::move(set));
}
void set_function_constant(int id, double value) {
    const auto range = constants().equal_range(id);
    if (range.first == range.second) {
        throw std::out_of_range("function constant " + std::to_string(id));
    }
    for (auto it = range.first; it != range.second; ++it) {
        it->second(value);
    }
}

} // namespace shim

// Executes a kernel threadgroup by threadgroup: every thread is a fibre, SIMD groups of 32 run in lock-step.
//
// A fibre runs until its next collective call (barrier, shuffle, matrix operation) and waits there until all lanes of
// its SIMD group, or all threads of the threadgroup, have arrived at the same source line. If they do not, or if one of
// them has returned, the process aborts with both places named: divergent barriers are undefined on hardware.
//
// The order in which threads run between two such points is chosen by the caller (order()); a kernel whose result
// depends on it lacks a barrier.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <type_traits>
#include <vector>

namespace shim {

enum scope { SIMDGROUP, MATRIX, THREADGROUP };
enum order { FORWARD, REVERSE, SHUFFLED };

struct place {
    uint32_t x, y, z;
};

constexpr size_t max_exchange = 16; // bytes that one lane contributes to a collective call

// Called by the running thread.
int lane();
int simdgroup();
place threadgroup_position();
place threads_per_threadgroup();
place threadgroups_per_grid();
void barrier(scope s, int line);
void * exchange_bytes(const void * mine, size_t bytes, int kind, int line); // 32 values of all lanes

template <class T> const T * exchange(const T & mine, int kind, int line) {
    static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= max_exchange, "small plain values");
    return (const T *) exchange_bytes(&mine, sizeof(T), kind, line);
}

// What a dispatch binds.
struct bindings {
    std::vector<void *> buffers;
    std::vector<size_t> threadgroup_bytes;
    std::vector<std::vector<char>> threadgroup_memory; // filled with NaNs before every threadgroup
};

typedef std::function<void(bindings &)> invoker;

void dispatch(const invoker & f, bindings & b, place grid, place threads, order o);

// ---------------------------------------------------------------------------------------------- kernels by name

// Parameters that the source pass (metal_translate.py) rewrites: attributes and threadgroup memory.
enum attribute {
    threadgroup_position_in_grid,
    thread_position_in_threadgroup,
    thread_index_in_threadgroup,
    thread_index_in_simdgroup,
    simdgroup_index_in_threadgroup,
    threads_per_threadgroup_,
    threadgroups_per_grid_,
    threads_per_simdgroup,
    simdgroups_per_threadgroup,
};
template <class T, int A> struct from_attribute {
    T value;
};
template <class T, int N> struct from_threadgroup {
    T * value;
};

template <class T> T from_place(place p, std::true_type) { // a scalar takes x
    return (T) p.x;
}
template <class T> T from_place(place p, std::false_type) {
    T r;
    p.x = p.x, r[0] = (typename std::decay<decltype(r[0])>::type) p.x, r[1] = (typename std::decay<decltype(r[0])>::type) p.y;
    r[2] = (typename std::decay<decltype(r[0])>::type) p.z;
    return r;
}
template <class T> T scalar_or_first(uint32_t x) {
    return (T) x;
}
place attribute_place(int a);

template <class A> struct bind_one;
template <class T> struct bind_one<T *> {
    static T * get(bindings & b, size_t & next) { return (T *) b.buffers.at(next++); }
};
template <class T> struct bind_one<T &> {
    static T & get(bindings & b, size_t & next) { return *(T *) b.buffers.at(next++); }
};
template <class T, int A> struct bind_one<from_attribute<T, A>> {
    static from_attribute<T, A> get(bindings &, size_t &) {
        return {from_place<T>(attribute_place(A), std::is_arithmetic<T>())};
    }
};
template <class T, int N> struct bind_one<from_threadgroup<T, N>> {
    static from_threadgroup<T, N> get(bindings & b, size_t &) { return {(T *) b.threadgroup_memory.at(N).data()}; }
};

struct kernel_entry {
    template <class... P> kernel_entry(const char * name, void (*f)(P...)) {
        add(name, [f](bindings & b) {
            size_t next = 0;
            // braces evaluate from left to right
            struct call {
                call(void (*g)(P...), P... p) { g(p...); }
            } c{f, bind_one<P>::get(b, next)...};
            (void) c;
        });
    }
    static void add(const char * name, invoker f);
};
const invoker & find_kernel(const std::string & name); // throws std::out_of_range

struct function_constant {
    template <class T> function_constant(int id, T * where) {
        add(id, [where](double v) { *where = (T) v; });
    }
    static void add(int id, std::function<void(double)> set);
};
void set_function_constant(int id, double value); // throws std::out_of_range for an id that no kernel has

} // namespace shim

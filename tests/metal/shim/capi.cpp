// What Python calls: kernels by name on plain memory.
#include "executor.h"

#include <cstdio>
#include <cstring>
#include <stdexcept>

extern "C" int shim_has_kernel(const char * name) {
    try {
        shim::find_kernel(name);
        return 1;
    } catch (const std::out_of_range &) {
        return 0;
    }
}

extern "C" int shim_set_constant(int id, double value) {
    try {
        shim::set_function_constant(id, value);
        return 0;
    } catch (const std::out_of_range &) {
        return -1;
    }
}

// Returns 0, or -1 for a kernel that does not exist. A divergent kernel aborts the process.
extern "C" int shim_run(const char * name, void ** buffers, int n_buffers, const size_t * memory, int n_memory,
                        const uint32_t * grid, const uint32_t * threads, int order) {
    try {
        shim::bindings b;
        b.buffers.assign(buffers, buffers + n_buffers);
        b.threadgroup_bytes.assign(memory, memory + n_memory);
        shim::dispatch(shim::find_kernel(name), b, {grid[0], grid[1], grid[2]}, {threads[0], threads[1], threads[2]},
                       (shim::order) order);
        return 0;
    } catch (const std::out_of_range &) {
        return -1;
    }
}

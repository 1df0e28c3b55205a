// What every Metal device made of the shim has: function constants, a pipeline, an encoder that runs kernels at once.
// Included by one source file of a library.
#pragma once

#include "executor.h"

#include "ggml-impl.h"
#include "ggml-metal-device.h"

#include <map>
#include <string>
#include <vector>

struct ggml_metal_cv {
    std::map<int, double> values;
};
struct ggml_metal_pipeline {
    std::string base;
    std::map<int, double> constants;
};
struct ggml_metal_encoder {
    ggml_metal_pipeline * pipeline = nullptr;
    std::map<int, std::vector<char>> bytes;
    std::map<int, void *> buffers;
    size_t memory = 0;
};
struct ggml_metal_device {
    ggml_metal_device_props props = {};
};

// Runs the encoder's kernel over a grid, now.
static void execute(ggml_metal_encoder_t e, shim::place grid, shim::place threads, shim::order order) {
    for (const auto & c : e->pipeline->constants) {
        shim::set_function_constant(c.first, c.second);
    }
    shim::bindings b;
    for (size_t i = 0; i < e->buffers.size(); i++) {
        b.buffers.push_back(e->buffers.at((int) i));
    }
    if (e->memory) {
        b.threadgroup_bytes.push_back(e->memory);
    }
    shim::dispatch(shim::find_kernel(e->pipeline->base), b, grid, threads, order);
}

extern "C" {

ggml_metal_cv_t ggml_metal_cv_init(void) {
    return new ggml_metal_cv;
}
void ggml_metal_cv_free(ggml_metal_cv_t cv) {
    delete cv;
}
void ggml_metal_cv_set_int16(ggml_metal_cv_t cv, int16_t value, int32_t i) {
    cv->values[i] = value;
}
void ggml_metal_cv_set_int32(ggml_metal_cv_t cv, int32_t value, int32_t i) {
    cv->values[i] = value;
}
void ggml_metal_cv_set_bool(ggml_metal_cv_t cv, bool value, int32_t i) {
    cv->values[i] = value;
}
const struct ggml_metal_device_props * ggml_metal_device_get_props(ggml_metal_device_t dev) {
    return &dev->props;
}

} // extern "C"

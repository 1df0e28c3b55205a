// What the patched ggml-metal calls: every node with a compressed tensor goes through these, all others stay
// upstream's.
#pragma once

#include "ggml-metal-device.h"
#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

// Whether this node reads or writes a compressed type; *supported then says if this device runs it
// (csrc/ggml/pytq-metal-ops.def). The first supported node compiles the kernels.
bool pytq_metal_supports_op(ggml_metal_device_t dev, const struct ggml_tensor * op, bool * supported);

// Whether this node is ours; *size then is what its result takes: the tensor and the parts of split attention.
bool pytq_metal_alloc_size(const struct ggml_tensor * op, size_t * size);

// Encodes the node if it is ours; false leaves it to upstream.
bool pytq_metal_encode(ggml_metal_device_t dev, ggml_metal_encoder_t enc, struct ggml_tensor * op);

#ifdef __cplusplus
}
#endif

// What the patched ggml-cuda calls: every node with a compressed tensor goes through these, all others stay upstream's.
#pragma once

#include "ggml.h"

struct ggml_backend_cuda_context;

// Whether this node reads or writes a compressed type; *supported then says if this device runs it.
bool pytq_cuda_supports_op(int device, const ggml_tensor * op, bool * supported);

// Runs the node if pytq_cuda_supports_op() claimed it; false leaves it to upstream.
bool pytq_cuda_compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Runs the cache writes of keys and values together if nodes[0] and the next node that does anything are both such
// writes. Returns how many nodes after the first are done, 0 if nothing was run.
int pytq_cuda_try_fuse(ggml_backend_cuda_context & ctx, ggml_tensor * const * nodes, int n_nodes);

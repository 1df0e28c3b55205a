// What the patched ggml-cuda calls: every node with a compressed tensor goes through these, all others stay upstream's.
#pragma once

#include "ggml.h"

struct ggml_backend_cuda_context;
struct ggml_backend_graph_optimize_params;

// Whether this node reads or writes a compressed type; *supported then says if this device runs it.
bool pytq_cuda_supports_op(int device, const ggml_tensor * op, bool * supported);

// Runs the node if pytq_cuda_supports_op() claimed it; false leaves it to upstream.
bool pytq_cuda_compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// Runs the patterns of pytq-cuda-fuse.h that begin at node i. Returns how many nodes from i on are done or left to a
// later pattern, 0 if none.
int pytq_cuda_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i);

// Keeps the operands of those patterns allocated, and puts nodes into the order that overlaps best.
void pytq_cuda_graph_optimize(ggml_cgraph * graph, const ggml_backend_graph_optimize_params * params);

// The operand src1 of a quantised matrix times a vector as blocks of Q8_1, if it is there in that form already; else
// null.
const void * pytq_cuda_quantized(ggml_backend_cuda_context & ctx, const ggml_tensor * src1);

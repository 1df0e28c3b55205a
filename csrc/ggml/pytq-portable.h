// Attention by byte dot products (csrc/cuda/attention-portable.cuh) for ggml nodes: every pair of compressed types, or
// one of them with f16 or q8_0, every head size of the types table.
#pragma once

#include "ggml.h"

struct ggml_backend_cuda_context;

// Whether the node can be run; needs no device.
bool pytq_portable_supported(const ggml_tensor * dst);

// Runs a FLASH_ATTN_EXT node that pytq_portable_supported() accepts. Scratch: the queries as bytes, and partial sums of
// at most eight blocks per multiprocessor.
void pytq_portable_attention(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

template <int D> void pytq_portable_launch(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

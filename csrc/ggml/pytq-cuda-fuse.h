// Which of the patterns of pytq-fuse.h run as one launch on CUDA and HIP (pytq-cuda.cu).
//
// The launch that writes the cache also rotates what it writes, and the queries. Where one token is written and
// attended to at once, attention takes that token as it was before, while a stream of its own makes and writes its keys
// and values (PYTQ_CUDA_BRANCHES=0: writes them). PYTQ_CUDA_FUSE=0 switches all of this off.
#pragma once

#include "pytq-fuse.h"

bool pytq_cuda_fusion_enabled();

// Whether node i, a product by a Hadamard matrix, is done by the next cache write.
bool pytq_cuda_is_left_out(const ggml_cgraph * graph, int i);

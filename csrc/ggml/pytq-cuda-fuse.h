// Which of the patterns of pytq-fuse.h run as one launch on CUDA and HIP (pytq-cuda.cu).
//
// The launch that writes the cache also rotates what it writes, and the queries. Where one token is written and
// attended to at once, attention takes that token as it was before, while a stream of its own makes and writes its keys
// and values (PYTQ_CUDA_BRANCHES=0: writes them). The vector that queries, keys and values are products of is then
// rounded to Q8_1 once, not by each product, and attention stores its result in that form for the product behind it
// (PYTQ_CUDA_Q8_1=0: neither). PYTQ_CUDA_FUSE=0 switches all of this off.
#pragma once

#include "pytq-fuse.h"

bool pytq_cuda_fusion_enabled();

// pytq_find_branches, none where keys and values are not made beside queries.
pytq_branches pytq_cuda_find_branches(const ggml_cgraph * graph, const pytq_cache_writes & w,
                                      const pytq_fresh_token & f, int i);

// Whether node i, a product by a Hadamard matrix, is done by the next cache write.
bool pytq_cuda_is_left_out(const ggml_cgraph * graph, int i);

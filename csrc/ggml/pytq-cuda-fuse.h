// Graph patterns that run as one launch (pytq-cuda.cu). Everything here only looks at the graph.
//
// Upstream's graph rotates keys, values and queries with a product by a Hadamard matrix, then writes the cache:
//   MUL_MAT(H, q)   MUL_MAT(H, v)   MUL_MAT(H, k)   SET_ROWS(k)   SET_ROWS(v)   FLASH_ATTN_EXT   MUL_MAT(H, result)
// The three products before the writes are left out where they stand and done by the launch that writes the cache;
// their operands must then live until that launch, which pytq_cuda_graph_optimize asks the allocator for and the match
// verifies. PYTQ_CUDA_FUSE=0 switches all of this off.
#pragma once

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml.h"

struct pytq_cache_write {
    const ggml_tensor * set_rows;
    const ggml_tensor * rotation; // product whose operand is written rotated instead of its result, or null
};

struct pytq_cache_writes {
    pytq_cache_write write[2];
    int n_writes;
    const ggml_tensor * queries; // product to be done in the same launch, or null
    int last;                    // index of the last node that is done then

    bool leaves_out(const ggml_tensor * t) const {
        return t == queries || t == write[0].rotation || (n_writes > 1 && t == write[1].rotation);
    }
};

bool pytq_fusion_enabled();

// Writes that start at node i, which is a SET_ROWS to a compressed type.
pytq_cache_writes pytq_match_cache_writes(const ggml_cgraph * graph, int i);

// Whether node i, a product by a Hadamard matrix, is done by the next cache write.
bool pytq_is_left_out(const ggml_cgraph * graph, int i);

// Index of the product that only rotates the result of FLASH_ATTN_EXT node i, or -1.
int pytq_match_rotated_output(const ggml_cgraph * graph, int i);

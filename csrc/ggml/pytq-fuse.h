// Graph patterns that are computed as one step by more than one backend. Everything here only looks at the graph.
//
// Upstream's graph rotates keys, values and queries with a product by a Hadamard matrix, then writes the cache:
//   MUL_MAT(H, q)   MUL_MAT(H, v)   MUL_MAT(H, k)   SET_ROWS(k)   SET_ROWS(v)   FLASH_ATTN_EXT   MUL_MAT(H, result)
// The three products before the writes are left out where they stand and done with the writes; their operands must then
// live until there, which pytq_keep_operands asks the allocator for and the search verifies. The product behind
// attention is done by attention itself.
#pragma once

#include "ggml-backend-impl.h"
#include "ggml-impl.h"
#include "ggml.h"

#include <vector>

struct pytq_cache_write {
    const ggml_tensor * set_rows;
    const ggml_tensor * rotation; // product whose operand is written rotated instead of its result, or null
};

struct pytq_cache_writes {
    pytq_cache_write write[2];
    int n_writes;
    const ggml_tensor * queries; // product to be done in the same step, or null
    int last;                    // index of the last node that is done then

    bool leaves_out(const ggml_tensor * t) const {
        return t == queries || t == write[0].rotation || (n_writes > 1 && t == write[1].rotation);
    }
};

constexpr int PYTQ_FUSE_WINDOW = 96; // nodes of one layer that lie between a rotation and the write, generously

bool pytq_is_cache_write(const ggml_tensor * t);
bool pytq_is_rotation(const ggml_tensor * t);

// Writes that start at node i, which is a SET_ROWS to a compressed type; rotations: with the products before them.
pytq_cache_writes pytq_find_cache_writes(const ggml_cgraph * graph, int i, bool rotations);

// Index of the product that only rotates the result of FLASH_ATTN_EXT node i, or -1.
int pytq_find_rotated_output(const ggml_cgraph * graph, int i);

// Index of the product of a matrix by one vector that alone reads the result of node i, all of it, or -1. Not if the
// graph ends there: whoever computes a graph up to a product may look at its operands.
int pytq_find_only_product(const ggml_cgraph * graph, int i);

// Attention that follows the writes of one token's keys and values.
struct pytq_fresh_token {
    int attention;                 // FLASH_ATTN_EXT node, or -1
    int last;                      // that node, or the one that only rotates its result and is done with it
    bool turned;                   // queries and keys below are those before the products by the Hadamard matrix
    ggml_tensor *q, *k, *v, *rows; // v: before the product by that matrix if the result is multiplied by it
    int join;          // node until which the writes may take (their operands live as long), or -1 if there is none
    int keys;          // which of the writes is that of the keys
    int64_t first_row; // row of the cache where the sequence begins
};

// Whether attention behind the writes w of graph may run before they are done.
pytq_fresh_token pytq_find_fresh_token(const ggml_cgraph * graph, const pytq_cache_writes & w);

// What queries come from on the one hand, keys and values on the other.
struct pytq_branches {
    int first = -1;            // first node of them, or -1 if they cannot run beside each other; they end at the writes
    std::vector<bool> of_keys; // whether node first + n belongs to keys and values
    const ggml_tensor * product[3]; // of queries, keys, values
};

// Those before the writes w at node i, if all begin with a product of the same operand.
pytq_branches pytq_find_branches(const ggml_cgraph * graph, const pytq_cache_writes & w, const pytq_fresh_token & f,
                                 int i);

// Moves the product that yields the values behind the rope of the keys if that is the last thing done before the writes
// w, which begin at node i. What writes and attends to the cache is launched while the node in front of it runs, and a
// product runs longer than a rope. To be called before memory is allocated.
bool pytq_move_values_down(ggml_cgraph * graph, const pytq_cache_writes & w, const pytq_fresh_token & f, int i);

// Asks the allocator to keep what these patterns read: of the writes, of attention at node i rotated by node r, of
// attention beside the writes (which may take until f.join), of queries and of what all three are made from while keys
// and values are made beside them.
void pytq_keep_operands(const ggml_cgraph * graph, const pytq_cache_writes & w,
                        const ggml_backend_graph_optimize_params * params);
void pytq_keep_operands(const ggml_cgraph * graph, int i, int r, const ggml_backend_graph_optimize_params * params);
void pytq_keep_operands(const ggml_cgraph * graph, const pytq_fresh_token & f,
                        const ggml_backend_graph_optimize_params * params);
void pytq_keep_operands(const ggml_cgraph * graph, const pytq_fresh_token & f, const pytq_branches & b,
                        const ggml_backend_graph_optimize_params * params);

// What only the newest token needs runs on a stream of its own, on NVIDIA devices: the products, rope and norms that
// its keys and values come from, beside those of the queries, and their way into the cache, beside attention and what
// follows it (pytq-fuse.h finds the patterns). Vectors that products read as blocks of Q8_1 are kept in that form.
#pragma once

#include "common.cuh"
#include "pytq-fuse.h"

#include <optional>
#include <unordered_map>
#include <vector>

// One token's cache writes, behind which attention takes the token as it was before compression.
struct pytq_cuda_token {
    pytq_cache_writes writes;
    pytq_fresh_token fresh;
    bool beside;                 // keys and values are made on the side stream
    const ggml_tensor * operand; // that a product takes attention's result as, in blocks of Q8_1, or null
};

struct pytq_cuda_side {
    cudaEvent_t fork = nullptr, ready = nullptr, done = nullptr;
    int device = -1; // that the events belong to
    // of the graph in progress
    const ggml_cgraph * graph = nullptr;
    const ggml_tensor *first = nullptr, *last = nullptr; // its nodes: parts of a graph may come at one address
    int at = 0;                                          // last node that was looked at
    int join = -1;                                       // node that waits for the writes
    std::vector<int8_t> stream;                          // of its nodes
    // by the node before which the side stream starts: what products on both streams read as blocks of Q8_1, or null
    std::unordered_map<int, const ggml_tensor *> forks;
    std::unordered_map<int, pytq_cuda_token> tokens; // by the node of the first write
    // operands that are there as blocks of Q8_1: one of several products until attention is launched, one of the
    // product behind attention that lies where the values in f32 would
    const ggml_tensor *shared = nullptr, *result = nullptr;
    std::optional<ggml_cuda_pool_alloc<char>> blocks; // of `shared`
};

pytq_cuda_side & pytq_cuda_side_of(ggml_backend_cuda_context & ctx);

// To be called before node i of a graph is launched: sets the stream that it is launched on, and has streams wait for
// each other where they must.
void pytq_cuda_enter_node(ggml_backend_cuda_context & ctx, pytq_cuda_side & side, const ggml_cgraph * graph, int i);

// What is launched between these two goes to the side stream: the token's way into the cache. Attention is to be
// launched behind the second, and wait for the event that the first returns (null: no need) before it reads the token.
cudaEvent_t pytq_cuda_begin_write(ggml_backend_cuda_context & ctx, pytq_cuda_side & side, const pytq_cuda_token & t);
void pytq_cuda_end_write(ggml_backend_cuda_context & ctx, pytq_cuda_side & side, const pytq_cuda_token & t);

// To be called when attention has been launched.
void pytq_cuda_end_attention(pytq_cuda_side & side, const pytq_cuda_token & t);

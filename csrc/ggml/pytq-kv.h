// What the patched llama-kv-cache.cpp calls: which concrete type and which rotation a cache gets.
#pragma once

#include "ggml.h"
#include "pytq.h"

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

// Concrete type of one layer's K or V ('k' or 'v') for the requested cache type; stock types come back unchanged.
// Throws std::runtime_error with one clear line if the head size has no block of this type.
ggml_type pytq_kv_layer_type(ggml_type requested, uint32_t head_dim, char kv, uint32_t il);

// Order of the rotation that the upstream hook applies for this cache: head_dim for pytq types (one scale serves the
// whole head vector, so all of it is mixed), n_stock for the others. Throws if a pytq cache mixes head sizes
// (head_dim_all == -1).
int pytq_kv_rot_size(ggml_type requested, int32_t head_dim_all, int n_stock);

// Adds the symmetric orthonormal Hadamard matrix of this order to upstream's table.
void pytq_kv_add_hadamard(std::unordered_map<int64_t, std::vector<float>> & table, ggml_type requested,
                          int32_t head_dim_all);

// Whether cached keys of this type can be re-rotated in place (context shift): the block must be the whole roped
// vector.
bool pytq_kv_can_shift(ggml_type type_k, uint32_t head_dim, uint32_t n_rot);

// Bits per value of a type as stored, counting scales.
double pytq_kv_bits(ggml_type type);

// Flags for --cache-type-k / --cache-type-v, and their ids; GGML_TYPE_COUNT for an unknown name.
const std::vector<ggml_type> & pytq_cache_types();
ggml_type pytq_cache_type_from_name(const std::string & name);

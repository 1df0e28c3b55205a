// Cache types by name and by head size, and the rotation of whole head vectors.
#pragma once

#include "ggml.h"
#include "pytq-cache-keys.h"
#include "pytq.h"

#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

// Concrete type of one layer's K or V ('k' or 'v') for the requested cache type; stock types come back unchanged.
// Throws std::runtime_error with one clear line if the head size has no block of this type.
ggml_type pytq_kv_layer_type(ggml_type requested, uint32_t head_dim, char kv, uint32_t il);

// Adds the symmetric orthonormal Hadamard matrix of this order to upstream's table.
void pytq_kv_add_hadamard(std::unordered_map<int64_t, std::vector<float>> & table, int32_t head_dim);

// What upstream offers for --cache-type-k (kv_cache_types in common/arg.cpp, which libllama cannot see).
const std::vector<ggml_type> & pytq_stock_cache_types();

// Flags that the patches add to --cache-type-k / --cache-type-v, and their ids; GGML_TYPE_COUNT for an unknown name.
const std::vector<ggml_type> & pytq_cache_types();
ggml_type pytq_cache_type_from_name(const std::string & name);

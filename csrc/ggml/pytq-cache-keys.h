// Default cache types that a model file carries (docs/gguf.md): kept when the model is loaded, taken where no flag and
// no field of llama_context_params names a type.
#pragma once

#include "ggml.h"
#include "gguf.h"
#include "llama.h"
#include "pytq-cache-ids.h"

#include <vector>

// Remembers the keys of a model file; called by pytq_model_loaded and pytq_model_freed.
void pytq_cache_keys_loaded(const llama_model * model, const gguf_context * file);
void pytq_cache_keys_freed(const llama_model * model);

// One type per layer as the file stores them for 'k' or 'v'; empty if it stores none.
// Throws std::runtime_error with one line for keys that are damaged or name no cache type.
std::vector<ggml_type> pytq_stored_cache_types(const llama_model * model, char kv);

// Puts real types where the params say PYTQ_CACHE_UNSET, and PYTQ_CACHE_MIXED where the file wants several; turns flash
// attention on where these need it; logs both. False, with the reason logged, for keys that cannot be used.
bool pytq_resolve_cache_types(const llama_model * model, llama_context_params & params);

// For llama-bench, which shows types but drops the log: the types of a context that was made from these, and a line on
// stderr where they come from the file.
LLAMA_API void pytq_show_cache_types(const llama_model * model, ggml_type & type_k, ggml_type & type_v);

// For the parser of flags: both types of a params struct become "nobody chose".
template <typename T> void pytq_unset_cache_types(T & params) {
    params.cache_type_k = params.cache_type_v = (ggml_type) PYTQ_CACHE_UNSET;
}

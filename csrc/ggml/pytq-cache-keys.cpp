#include "pytq-cache-keys.h"

#include "llama-impl.h"
#include "llama-model.h"
#include "pytq-kv.h"

#include <algorithm>
#include <cstdio>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#define PYTQ_FAMILY(name, index, code, scale)                                                                          \
    static_assert(PYTQ_TYPE_BASE + PYTQ_FAMILY_STRIDE * (index) != PYTQ_CACHE_UNSET,                                   \
                  "the stand-ins need a free family");
#include "types.def"

namespace {

struct side_keys {
    std::string type;                // "" if there is none
    std::vector<std::string> layers; // "" where the default holds
    std::string error;               // what is wrong with the keys; told when they are needed
};

std::mutex keys_mutex;
std::map<const llama_model *, std::map<char, side_keys>> stored;

side_keys read_side(const gguf_context * file, char kv) {
    side_keys out;
    const std::string one = std::string("pytq.cache.type_") + kv, many = std::string("pytq.cache.layer_") + kv;
    const int64_t id_one = gguf_find_key(file, one.c_str()), id_many = gguf_find_key(file, many.c_str());
    if (id_one >= 0) {
        if (gguf_get_kv_type(file, id_one) == GGUF_TYPE_STRING) {
            out.type = gguf_get_val_str(file, id_one);
        }
        if (out.type.empty()) {
            out.error = one + " is no text";
        }
    }
    if (id_many >= 0) {
        if (gguf_get_kv_type(file, id_many) != GGUF_TYPE_ARRAY ||
            gguf_get_arr_type(file, id_many) != GGUF_TYPE_STRING) {
            out.error = many + " is no list of texts";
        } else {
            for (size_t i = 0; i < gguf_get_arr_n(file, id_many); i++) {
                out.layers.push_back(gguf_get_arr_str(file, id_many, i));
            }
        }
    }
    return out;
}

[[noreturn]] void refuse(char kv, const std::string & what) {
    throw std::runtime_error("the cache types stored in the model file cannot be used: " + what +
                             "; name a type with --cache-type-" + kv + ", or run `pytq gguf unset-cache` on the file");
}

ggml_type type_of(char kv, const std::string & name) {
    for (const auto * list : {&pytq_stock_cache_types(), &pytq_cache_types()}) {
        for (const ggml_type type : *list) {
            if (name == ggml_type_name(type)) {
                return type;
            }
        }
    }
    refuse(kv, "unknown type '" + name + "'");
}

// "kv4", or "q8_0 in layers 0-1, kv3 in layers 2-29"
std::string describe(const std::vector<ggml_type> & types) {
    std::string out;
    for (size_t i = 0, j; i < types.size(); i = j) {
        for (j = i; j < types.size() && types[j] == types[i]; j++) {
        }
        if (i == 0 && j == types.size()) {
            return ggml_type_name(types[0]);
        }
        out += (i ? ", " : "") + std::string(ggml_type_name(types[i])) + " in layer" + (j - i > 1 ? "s " : " ") +
               std::to_string(i) + (j - i > 1 ? "-" + std::to_string(j - 1) : "");
    }
    return out;
}

// The type for a context, with the stand-ins replaced; says in `from_file` what was taken.
ggml_type resolve(const llama_model * model, char kv, ggml_type requested, std::string & from_file) {
    if (requested != PYTQ_CACHE_UNSET) {
        return requested;
    }
    const std::vector<ggml_type> types = pytq_stored_cache_types(model, kv);
    if (types.empty()) {
        return GGML_TYPE_F16;
    }
    from_file += (from_file.empty() ? "" : "; ") + std::string(kv == 'k' ? "K " : "V ") + describe(types);
    const bool all = std::all_of(types.begin(), types.end(), [&](ggml_type t) { return t == types[0]; });
    return all ? types[0] : (ggml_type) PYTQ_CACHE_MIXED;
}

} // namespace

void pytq_cache_keys_loaded(const llama_model * model, const gguf_context * file) {
    std::map<char, side_keys> keys;
    if (file) {
        keys['k'] = read_side(file, 'k');
        keys['v'] = read_side(file, 'v');
    }
    std::lock_guard<std::mutex> lock(keys_mutex);
    stored[model] = std::move(keys);
}

void pytq_cache_keys_freed(const llama_model * model) {
    std::lock_guard<std::mutex> lock(keys_mutex);
    stored.erase(model);
}

std::vector<ggml_type> pytq_stored_cache_types(const llama_model * model, char kv) {
    side_keys keys;
    {
        std::lock_guard<std::mutex> lock(keys_mutex);
        const auto it = stored.find(model);
        if (it != stored.end() && it->second.count(kv)) {
            keys = it->second.at(kv);
        }
    }
    if (!keys.error.empty()) {
        refuse(kv, keys.error);
    }
    if (keys.type.empty() && keys.layers.empty()) {
        return {};
    }
    const size_t n_layer = model->hparams.n_layer_all;
    if (!keys.layers.empty() && keys.layers.size() != n_layer) {
        refuse(kv, std::string("pytq.cache.layer_") + kv + " has " + std::to_string(keys.layers.size()) +
                       " items for " + std::to_string(n_layer) + " layers");
    }
    const ggml_type common = keys.type.empty() ? GGML_TYPE_F16 : type_of(kv, keys.type);
    std::vector<ggml_type> out(n_layer, common);
    for (size_t i = 0; i < keys.layers.size(); i++) {
        if (!keys.layers[i].empty()) {
            out[i] = type_of(kv, keys.layers[i]);
        }
    }
    return out;
}

bool pytq_resolve_cache_types(const llama_model * model, llama_context_params & params) {
    try {
        std::string from_file;
        params.type_k = resolve(model, 'k', params.type_k, from_file);
        params.type_v = resolve(model, 'v', params.type_v, from_file);
        if (!from_file.empty()) {
            LLAMA_LOG_INFO("%s: cache types stored in the model file: %s\n", __func__, from_file.c_str());
            // llama-cpp-python says "disabled" where its user said nothing, so this cannot be an error
            if (params.flash_attn_type == LLAMA_FLASH_ATTN_TYPE_DISABLED &&
                (ggml_is_quantized(params.type_v) || pytq_is_type(params.type_k) ||
                 params.type_k == PYTQ_CACHE_MIXED)) {
                LLAMA_LOG_WARN("%s: flash attention is turned on: these types need it\n", __func__);
                params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
            }
        }
        return true;
    } catch (const std::exception & error) {
        LLAMA_LOG_ERROR("%s: %s\n", __func__, error.what());
        return false;
    }
}

void pytq_show_cache_types(const llama_model * model, ggml_type & type_k, ggml_type & type_v) {
    std::string from_file;
    type_k = resolve(model, 'k', type_k, from_file);
    type_v = resolve(model, 'v', type_v, from_file);
    if (!from_file.empty()) {
        fprintf(stderr, "cache types stored in the model file: %s\n", from_file.c_str());
    }
}

#include "pytq-kv.h"

#include "codecs/hadamard.h"

#include <cstring>
#include <stdexcept>

ggml_type pytq_kv_layer_type(ggml_type requested, uint32_t head_dim, char kv, uint32_t il) {
    if (!pytq_is_type(requested)) {
        return requested;
    }
    const int id = pytq_type_resolve(requested, (int) head_dim, 0);
    if (id < 0) {
        throw std::runtime_error(
            std::string("cache type ") + ggml_type_name(requested) + " has no block for head_dim " +
            std::to_string(head_dim) + " (" + kv + " of layer " + std::to_string(il) +
            "); supported: 64, 80, 96, 128, 192, 256. Use a stock type such as q8_0 for this model");
    }
    return (ggml_type) id;
}

void pytq_kv_add_hadamard(std::unordered_map<int64_t, std::vector<float>> & table, int32_t head_dim) {
    if (table.count(head_dim)) {
        return;
    }
    std::vector<float> matrix((size_t) head_dim * head_dim);
    if (pytq_hadamard(matrix.data(), head_dim) != 0) {
        throw std::runtime_error("no Hadamard rotation of order " + std::to_string(head_dim));
    }
    table[head_dim] = std::move(matrix);
}

const std::vector<ggml_type> & pytq_stock_cache_types() {
    static const std::vector<ggml_type> types = {GGML_TYPE_F32,    GGML_TYPE_F16,  GGML_TYPE_BF16,
                                                 GGML_TYPE_Q8_0,   GGML_TYPE_Q4_0, GGML_TYPE_Q4_1,
                                                 GGML_TYPE_IQ4_NL, GGML_TYPE_Q5_0, GGML_TYPE_Q5_1};
    return types;
}

const std::vector<ggml_type> & pytq_cache_types() {
    static const std::vector<ggml_type> types = [] {
        std::vector<ggml_type> out;
        for (int id = PYTQ_TYPE_BASE; id < PYTQ_TYPE_END; id += PYTQ_FAMILY_STRIDE) {
            const char * name = pytq_type_name(id);
            if (name && name[strlen(name) - 1] != 's') { // split layouts are chosen by a profile
                out.push_back((ggml_type) id);
            }
        }
        // formats that ggml has but upstream does not offer for the cache
        out.push_back(GGML_TYPE_MXFP4);
        out.push_back(GGML_TYPE_NVFP4);
        return out;
    }();
    return types;
}

ggml_type pytq_cache_type_from_name(const std::string & name) {
    for (const ggml_type type : pytq_cache_types()) {
        if (name == ggml_type_name(type)) {
            return type;
        }
    }
    const int id = pytq_type_from_name(name.c_str());
    return id >= 0 ? (ggml_type) id : GGML_TYPE_COUNT;
}

// Calibrated profiles inside libllama: loading, checking, and the graph's K and Q transforms (docs/calibrate.md).
//
// With a profile, a KV head's keys are stored as A (k - c) and its queries are multiplied by A^-T, so that
// q . k is unchanged up to a constant per query, which softmax does not see. A and c are per layer and KV head.
#pragma once

#include "ggml-backend.h"
#include "ggml-cpp.h"
#include "ggml.h"
#include "gguf.h"
#include "llama.h"

#include <cstdint>
#include <map>
#include <set>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

struct llama_hparams;

// Profile file for the contexts made from now on: a path, "none" to run without one, "" for the default (a profile
// named by the environment variable PYTQ_KV_PROFILE, else beside the model as MODEL.kvprofile.gguf, else embedded in
// it).
LLAMA_API void pytq_set_kv_profile(const char * path);

// Which file a model came from ('' if none) and its metadata, told by the loader.
void pytq_model_loaded(const llama_model * model, const gguf_context * metadata, const std::string & path);
void pytq_model_freed(const llama_model * model);

// One layer's transform, on that layer's device.
struct pytq_k_transform {
    ggml_tensor * rot_k = nullptr;  // [d, d, n_head_kv] row i of A along ne[0]
    ggml_tensor * rot_q = nullptr;  // [d, d, n_head_kv] row i of A^-T
    ggml_tensor * inv_k = nullptr;  // [d, d, n_head_kv] A^-1, for context shift
    ggml_tensor * centre = nullptr; // [d, n_head_kv, 1] A c
    bool identity = false;          // stored as they are, whatever the other layers of the cache do
};

struct pytq_profile_data; // a parsed and checked file

// What one KV cache needs: concrete types, rotations and transforms of its layers.
class pytq_kv_policy {
  public:
    // Finds and checks the profile of a model if a requested type can use one.
    // Types may be PYTQ_CACHE_MIXED: each layer then takes what the model file stores for it.
    // Throws std::runtime_error with one line for a profile that is damaged or belongs to another model or version.
    pytq_kv_policy(const llama_model * model, ggml_type type_k, ggml_type type_v);

    // Concrete type of one layer's K or V ('k' or 'v'); throws where the type does not exist for this head size.
    ggml_type layer_type(char kv, uint32_t head_dim, uint32_t n_head_kv, uint32_t il, ggml_backend_buffer_type_t buft);

    // Whether the upstream hook has to rotate K or V: if any layer that was asked for is quantised.
    bool rotates(char kv, uint32_t head_dim) const;

    // Order of that rotation: head_dim if a layer has a pytq type (one scale serves the whole head vector, so all of it
    // is mixed), else n_stock.
    int rot_size(char kv, int32_t head_dim, int n_stock) const;

    // Adds the matrix of that order to upstream's table. Throws if layers with a pytq type mix head sizes
    // (head_dim == -1).
    void add_hadamard(std::unordered_map<int64_t, std::vector<float>> & table, char kv, int32_t head_dim) const;

    // The rotation of that order in the memory of the device that holds all layers, or nullptr if that is the host or
    // there are several: the graph then takes it as an input, which is copied to the device for every batch.
    ggml_tensor * device_rotation(char kv, int order, const std::vector<float> & matrix);

    // Whether cached keys can be moved to other positions (context shift): a pytq block must be the whole roped vector.
    bool can_shift(const llama_hparams & hparams) const;

    // Uploads the transforms of the layers that were asked for. Call once, after the last layer_type.
    void upload();

    // The layer's transform, or nullptr if its keys take the plain rotation.
    const pytq_k_transform * transform(uint32_t il) const;

  private:
    struct side {
        ggml_type requested;
        std::vector<ggml_type> stored; // per layer, if requested is PYTQ_CACHE_MIXED
        bool quantised = false;
        std::map<uint32_t, uint32_t> whole; // head_dim of the layers with a pytq type

        ggml_type of(uint32_t il) const { return stored.empty() ? requested : stored.at(il); }
    };
    const side & of(char kv) const { return kv == 'k' ? k : v; }
    ggml_type concrete(char kv, uint32_t head_dim, uint32_t n_head_kv, uint32_t il, ggml_backend_buffer_type_t buft);

    side k, v;
    std::shared_ptr<const pytq_profile_data> data;

    struct pending {
        uint32_t il, head_dim, n_head_kv;
        ggml_backend_buffer_type_t buft;
        ggml_type type = GGML_TYPE_COUNT;
    };
    std::vector<pending> wanted;
    std::map<uint32_t, pytq_k_transform> transforms;
    std::vector<std::pair<ggml_context_ptr, ggml_backend_buffer_ptr>> buffers;
    std::set<ggml_backend_buffer_type_t> layer_bufts;
    std::map<int, ggml_tensor *> rotations; // by order
};

// Graph nodes: q [d, n_head, n_tokens] and k [d, n_head_kv, n_tokens] into the stored space, by the transform t, or by
// upstream's rotation rot (may be nullptr) where t is nullptr.
ggml_tensor * pytq_rotate_q(ggml_context * ctx, ggml_tensor * q, ggml_tensor * rot, const pytq_k_transform * t);
ggml_tensor * pytq_rotate_k(ggml_context * ctx, ggml_tensor * k, ggml_tensor * rot, const pytq_k_transform * t);

// The way back, for keys that are moved to other positions.
ggml_tensor * pytq_unrotate_k(ggml_context * ctx, ggml_tensor * k, ggml_tensor * rot, const pytq_k_transform * t);

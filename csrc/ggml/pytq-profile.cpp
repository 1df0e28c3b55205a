#include "pytq-profile.h"

#include "codecs/hadamard.h"
#include "llama-hparams.h"
#include "llama-impl.h"
#include "pytq-kv.h"
#include "pytq.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <mutex>
#include <stdexcept>

#define PROFILE_ARCH    "kvprofile"
#define PROFILE_VERSION 1
#define PROFILE_SUFFIX  ".kvprofile.gguf"
#define EMBEDDED_KEY    "pytq.kvprofile"

namespace {

// ------------------------------------------------------------------------------------------------ SHA-256 (FIPS 180-4)

// The constants are fractional parts of square and cube roots of primes (FIPS 180-4, sections 4.2.2 and 5.3.3);
// computing them takes less space than a table and cannot be mistyped.
struct sha256_constants {
    uint32_t h[8], k[64];
    sha256_constants() {
        int found = 0;
        for (int n = 2; found < 64; n++) {
            bool prime = true;
            for (int m = 2; m * m <= n; m++) {
                prime = prime && n % m != 0;
            }
            if (!prime) {
                continue;
            }
            const long double c = cbrtl((long double) n), s = sqrtl((long double) n);
            k[found] = (uint32_t) ((c - floorl(c)) * 4294967296.0L);
            if (found < 8) {
                h[found] = (uint32_t) ((s - floorl(s)) * 4294967296.0L);
            }
            found++;
        }
    }
};

class sha256 {
  public:
    sha256() { memcpy(state, constants().h, sizeof(state)); }

    void add(const void * data, size_t n) {
        const uint8_t * p = (const uint8_t *) data;
        total += n;
        while (n > 0) {
            const size_t take = n < 64 - used ? n : 64 - used;
            memcpy(block + used, p, take);
            used += take;
            p += take;
            n -= take;
            if (used == 64) {
                compress();
                used = 0;
            }
        }
    }

    template <typename T> void add_value(T v) { add(&v, sizeof(v)); } // little-endian hosts, as ggml itself

    std::string hex() {
        const uint64_t bits = total * 8;
        const uint8_t one = 0x80, zero = 0;
        add(&one, 1);
        while (used != 56) {
            add(&zero, 1);
        }
        uint8_t len[8];
        for (int i = 0; i < 8; i++) {
            len[i] = (uint8_t) (bits >> (56 - 8 * i));
        }
        add(len, 8);
        char out[65];
        for (int i = 0; i < 8; i++) {
            snprintf(out + 8 * i, 9, "%08x", state[i]);
        }
        return out;
    }

  private:
    static const sha256_constants & constants() {
        static const sha256_constants c;
        return c;
    }
    static uint32_t rot(uint32_t x, int n) { return x >> n | x << (32 - n); }

    void compress() {
        uint32_t w[64];
        for (int i = 0; i < 16; i++) {
            w[i] = (uint32_t) block[4 * i] << 24 | (uint32_t) block[4 * i + 1] << 16 |
                   (uint32_t) block[4 * i + 2] << 8 | block[4 * i + 3];
        }
        for (int i = 16; i < 64; i++) {
            const uint32_t s0 = rot(w[i - 15], 7) ^ rot(w[i - 15], 18) ^ w[i - 15] >> 3;
            const uint32_t s1 = rot(w[i - 2], 17) ^ rot(w[i - 2], 19) ^ w[i - 2] >> 10;
            w[i] = w[i - 16] + s0 + w[i - 7] + s1;
        }
        uint32_t v[8];
        memcpy(v, state, sizeof(v));
        for (int i = 0; i < 64; i++) {
            const uint32_t s1 = rot(v[4], 6) ^ rot(v[4], 11) ^ rot(v[4], 25);
            const uint32_t t1 = v[7] + s1 + ((v[4] & v[5]) ^ (~v[4] & v[6])) + constants().k[i] + w[i];
            const uint32_t s0 = rot(v[0], 2) ^ rot(v[0], 13) ^ rot(v[0], 22);
            const uint32_t t2 = s0 + ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
            memmove(v + 1, v, 7 * sizeof(v[0]));
            v[4] += t1;
            v[0] = t1 + t2;
        }
        for (int i = 0; i < 8; i++) {
            state[i] += v[i];
        }
    }

    uint32_t state[8];
    uint8_t block[64];
    size_t used = 0;
    uint64_t total = 0;
};

// ------------------------------------------------------------------------------------------------ reading

std::string get_str(const gguf_context * g, const char * key) {
    const int64_t id = gguf_find_key(g, key);
    return id >= 0 && gguf_get_kv_type(g, id) == GGUF_TYPE_STRING ? gguf_get_val_str(g, id) : "";
}

size_t element_size(gguf_type t) {
    switch (t) {
        case GGUF_TYPE_UINT8:
        case GGUF_TYPE_INT8:
        case GGUF_TYPE_BOOL:
            return 1;
        case GGUF_TYPE_UINT16:
        case GGUF_TYPE_INT16:
            return 2;
        case GGUF_TYPE_UINT32:
        case GGUF_TYPE_INT32:
        case GGUF_TYPE_FLOAT32:
            return 4;
        case GGUF_TYPE_UINT64:
        case GGUF_TYPE_INT64:
        case GGUF_TYPE_FLOAT64:
            return 8;
        default:
            return 0;
    }
}

// SHA-256 over what makes the model compute what it computes: the architecture's own metadata, every tensor's name,
// type and shape, and the first and last 256 bytes of every tensor's data. The tokenizer, chat template and
// descriptions may change. pytq/profile.py computes the same. For a model split into several files this is the first
// file.
std::string model_fingerprint(const gguf_context * g, FILE * file) {
    const size_t sample = 256;
    sha256 h;
    const std::string prefix = get_str(g, "general.architecture") + ".";
    for (int64_t i = 0; i < gguf_get_n_kv(g); i++) {
        const std::string key = gguf_get_key(g, i);
        if (key.compare(0, prefix.size(), prefix) != 0) {
            continue;
        }
        const gguf_type t = gguf_get_kv_type(g, i);
        h.add(key.c_str(), key.size() + 1);
        h.add_value((uint32_t) t);
        if (t == GGUF_TYPE_STRING) {
            const char * s = gguf_get_val_str(g, i);
            h.add(s, strlen(s));
        } else if (t == GGUF_TYPE_ARRAY) {
            const gguf_type e = gguf_get_arr_type(g, i);
            h.add_value((uint32_t) e);
            h.add_value((uint64_t) gguf_get_arr_n(g, i));
            if (e != GGUF_TYPE_STRING && e != GGUF_TYPE_ARRAY) {
                h.add(gguf_get_arr_data(g, i), gguf_get_arr_n(g, i) * element_size(e));
            }
        } else {
            h.add(gguf_get_val_data(g, i), element_size(t));
        }
    }
    for (int64_t i = 0; i < gguf_get_n_tensors(g); i++) {
        const char * name = gguf_get_tensor_name(g, i);
        h.add(name, strlen(name) + 1);
        h.add_value((uint32_t) gguf_get_tensor_type(g, i));
        const int64_t * ne = gguf_get_tensor_ne(g, i);
        for (int k = 0; k < 4; k++) {
            h.add_value((uint64_t) ne[k]);
        }
        const size_t size = gguf_get_tensor_size(g, i);
        const uint64_t start = gguf_get_data_offset(g) + gguf_get_tensor_offset(g, i);
        const size_t n = size < sample ? size : sample;
        uint8_t buf[256];
        for (const uint64_t at : {start, start + size - n}) {
            if (fseeko(file, (off_t) at, SEEK_SET) != 0 || fread(buf, 1, n, file) != n) {
                throw std::runtime_error("the model file is shorter than its header says");
            }
            h.add(buf, n);
        }
    }
    return h.hex();
}

std::mutex global_mutex;
std::string chosen_path;

std::map<const llama_model *, std::string> model_paths;

bool exists(const std::string & path) {
    FILE * f = fopen(path.c_str(), "rb");
    if (f) {
        fclose(f);
    }
    return f != nullptr;
}

struct file_closer {
    void operator()(FILE * f) const { fclose(f); }
};
using file_ptr = std::unique_ptr<FILE, file_closer>;

} // namespace

struct pytq_profile_data {
    std::string source;
    gguf_context_ptr gguf;
    ggml_context_ptr tensors;

    // [d, d, n] or [d, n] as in the file, float32; throws unless the shape is the wanted one and all values are finite
    const float * tensor(const std::string & name, std::array<int64_t, 3> shape) const {
        const ggml_tensor * t = ggml_get_tensor(tensors.get(), name.c_str());
        if (!t) {
            throw std::runtime_error(fail("lacks the tensor " + name));
        }
        for (int i = 0; i < 4; i++) {
            if (t->ne[i] != (i < 3 ? shape[i] : 1)) {
                throw std::runtime_error(fail("has tensor " + name + " with a shape that the model does not have"));
            }
        }
        if (t->type != GGML_TYPE_F32) {
            throw std::runtime_error(
                fail("has tensor " + name + " of type " + ggml_type_name(t->type) + " where f32 is expected"));
        }
        const float * x = (const float *) t->data;
        for (int64_t i = 0; i < ggml_nelements(t); i++) {
            if (!std::isfinite(x[i])) {
                throw std::runtime_error(fail("holds a value that is not finite in " + name));
            }
        }
        return x;
    }

    bool has(const std::string & name) const { return ggml_get_tensor(tensors.get(), name.c_str()) != nullptr; }

    // Recommended family of one layer for a flag such as auto3; "" if there is none.
    std::string recommended(const std::string & flag, char kv, uint32_t il) const {
        const std::string key = std::string(PROFILE_ARCH ".types.") + flag + "." + kv;
        const int64_t id = gguf_find_key(gguf.get(), key.c_str());
        if (id < 0 || gguf_get_kv_type(gguf.get(), id) != GGUF_TYPE_ARRAY ||
            gguf_get_arr_type(gguf.get(), id) != GGUF_TYPE_STRING || il >= gguf_get_arr_n(gguf.get(), id)) {
            return "";
        }
        return gguf_get_arr_str(gguf.get(), id, il);
    }

    std::string fail(const std::string & what) const { return "kv profile " + source + " " + what; }
};

namespace {

std::shared_ptr<pytq_profile_data> parse(const std::string & source,
                                         const std::function<gguf_context *(gguf_init_params)> & open) {
    auto out = std::make_shared<pytq_profile_data>();
    ggml_context * ctx = nullptr;
    out->source = source;
    out->gguf.reset(open({/*.no_alloc =*/false, /*.ctx =*/&ctx}));
    out->tensors.reset(ctx);
    if (!out->gguf || !ctx) {
        throw std::runtime_error(out->fail("is damaged or truncated: make it again with `pytq calibrate`"));
    }
    const gguf_context * g = out->gguf.get();
    if (get_str(g, "general.architecture") != PROFILE_ARCH) {
        throw std::runtime_error(out->fail("is a GGUF file, but not a profile"));
    }
    const int64_t v = gguf_find_key(g, PROFILE_ARCH ".format_version");
    if (v < 0 || gguf_get_kv_type(g, v) != GGUF_TYPE_UINT32 || gguf_get_val_u32(g, v) != PROFILE_VERSION) {
        throw std::runtime_error(out->fail("has another format version: make it again with `pytq calibrate`"));
    }
    return out;
}

// The profile for a model file, or nullptr if none is asked for or found by the default rules.
std::shared_ptr<pytq_profile_data> find_profile(const std::string & model_path) {
    std::string path;
    {
        std::lock_guard<std::mutex> lock(global_mutex);
        path = chosen_path;
    }
    if (path.empty()) {
        const char * env = getenv("PYTQ_KV_PROFILE");
        path = env ? env : "";
    }
    if (path == "none") {
        return nullptr;
    }
    if (model_path.empty()) {
        if (!path.empty()) {
            throw std::runtime_error(
                "kv profile " + path +
                ": the model was not loaded from a file, so the profile cannot be checked against it");
        }
        return nullptr;
    }
    gguf_context_ptr model(gguf_init_from_file(model_path.c_str(), {/*.no_alloc =*/true, /*.ctx =*/nullptr}));
    file_ptr file(fopen(model_path.c_str(), "rb"));
    if (!model || !file) {
        throw std::runtime_error("cannot read " + model_path + " again to look for its kv profile");
    }
    if (path.empty()) {
        std::string stem = model_path;
        if (stem.size() > 5 && stem.compare(stem.size() - 5, 5, ".gguf") == 0) {
            stem.resize(stem.size() - 5);
        }
        path = exists(stem + PROFILE_SUFFIX) ? stem + PROFILE_SUFFIX : "";
    }
    std::shared_ptr<pytq_profile_data> out;
    if (!path.empty()) {
        if (!exists(path)) {
            throw std::runtime_error("kv profile " + path + " cannot be read");
        }
        out = parse(path, [&](gguf_init_params p) { return gguf_init_from_file(path.c_str(), p); });
    } else {
        const int64_t id = gguf_find_key(model.get(), EMBEDDED_KEY);
        if (id < 0) {
            return nullptr;
        }
        if (gguf_get_kv_type(model.get(), id) != GGUF_TYPE_ARRAY ||
            gguf_get_arr_type(model.get(), id) != GGUF_TYPE_UINT8) {
            throw std::runtime_error("kv profile embedded in " + model_path + " is damaged");
        }
        out = parse("embedded in " + model_path, [&](gguf_init_params p) {
            return gguf_init_from_buffer(gguf_get_arr_data(model.get(), id), gguf_get_arr_n(model.get(), id), p);
        });
    }
    if (get_str(out->gguf.get(), PROFILE_ARCH ".model.fingerprint") != model_fingerprint(model.get(), file.get())) {
        throw std::runtime_error(out->fail("was made for another model (" +
                                           get_str(out->gguf.get(), PROFILE_ARCH ".model.name") +
                                           "): run `pytq calibrate` on this one, or pass --kv-profile none"));
    }
    return out;
}

bool wants_profile(ggml_type t) {
    const std::string name = ggml_type_name(t);
    return pytq_is_type(t) && (name.compare(0, 2, "kv") == 0 || name.compare(0, 4, "auto") == 0);
}

// Orthonormal mixing matrix of order n: Hadamard where there is one, else the cosine transform.
std::vector<float> mixing(int n) {
    std::vector<float> m((size_t) n * n);
    if (pytq_hadamard(m.data(), n) != 0) {
        for (int i = 0; i < n; i++) {
            for (int j = 0; j < n; j++) {
                m[(size_t) i * n + j] = (float) (sqrt((i ? 2.0 : 1.0) / n) * cos(M_PI * i * (j + 0.5) / n));
            }
        }
    }
    return m;
}

} // namespace

void pytq_set_kv_profile(const char * path) {
    std::lock_guard<std::mutex> lock(global_mutex);
    chosen_path = path ? path : "";
}

void pytq_model_loaded(const llama_model * model, const gguf_context * metadata, const std::string & path) {
    pytq_cache_keys_loaded(model, metadata);
    std::lock_guard<std::mutex> lock(global_mutex);
    model_paths[model] = path;
}

void pytq_model_freed(const llama_model * model) {
    pytq_cache_keys_freed(model);
    std::lock_guard<std::mutex> lock(global_mutex);
    model_paths.erase(model);
}

pytq_kv_policy::pytq_kv_policy(const llama_model * model, ggml_type type_k, ggml_type type_v) {
    bool wanted = false;
    for (const char kv : {'k', 'v'}) {
        side & s = kv == 'k' ? k : v;
        s.requested = kv == 'k' ? type_k : type_v;
        if (s.requested == PYTQ_CACHE_MIXED) {
            s.stored = pytq_stored_cache_types(model, kv);
        }
        wanted = wanted || wants_profile(s.requested) || std::any_of(s.stored.begin(), s.stored.end(), wants_profile);
    }
    if (wanted) {
        std::string path;
        {
            std::lock_guard<std::mutex> lock(global_mutex);
            const auto it = model_paths.find(model);
            path = it == model_paths.end() ? "" : it->second;
        }
        data = find_profile(path);
        if (data) {
            LLAMA_LOG_INFO("%s: kv profile %s\n", __func__, data->source.c_str());
        }
    }
}

ggml_type pytq_kv_policy::layer_type(char kv, uint32_t head_dim, uint32_t n_head_kv, uint32_t il,
                                     ggml_backend_buffer_type_t buft) {
    const ggml_type out = concrete(kv, head_dim, n_head_kv, il, buft);
    side & s = kv == 'k' ? k : v;
    s.quantised = s.quantised || ggml_is_quantized(out);
    if (pytq_is_type(out)) {
        s.whole[il] = head_dim;
    }
    layer_bufts.insert(buft);
    if (kv == 'k' && out != s.requested && !ggml_is_quantized(out)) { // the other layers may be rotated
        transforms[il].identity = true;
    }
    return out;
}

bool pytq_kv_policy::rotates(char kv, uint32_t head_dim) const {
    return !of(kv).whole.empty() || (of(kv).quantised && head_dim % 64 == 0);
}

int pytq_kv_policy::rot_size(char kv, int32_t head_dim, int n_stock) const {
    return of(kv).whole.empty() ? n_stock : head_dim;
}

void pytq_kv_policy::add_hadamard(std::unordered_map<int64_t, std::vector<float>> & table, char kv,
                                  int32_t head_dim) const {
    if (of(kv).whole.empty()) {
        return;
    }
    if (head_dim <= 0) {
        throw std::runtime_error(std::string("cache type ") + ggml_type_name(of(kv).of(of(kv).whole.begin()->first)) +
                                 " needs the same head_dim in all layers of a cache; use a stock type such as q8_0 for "
                                 "this model");
    }
    pytq_kv_add_hadamard(table, head_dim);
}

ggml_tensor * pytq_kv_policy::device_rotation(char kv, int order, const std::vector<float> & matrix) {
    if (of(kv).whole.empty() || layer_bufts.size() != 1 || ggml_backend_buft_is_host(*layer_bufts.begin())) {
        return nullptr;
    }
    ggml_tensor *& rot = rotations[order];
    if (!rot) {
        ggml_context_ptr ctx(ggml_init({/*.mem_size =*/ggml_tensor_overhead(), /*.mem_buffer =*/nullptr,
                                        /*.no_alloc =*/true}));
        ggml_tensor * t = ggml_new_tensor_2d(ctx.get(), GGML_TYPE_F32, order, order);
        ggml_format_name(t, "kv_rot_%d", order);
        ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), *layer_bufts.begin()));
        if (!buf) {
            throw std::runtime_error("no memory for a rotation of order " + std::to_string(order));
        }
        ggml_backend_tensor_set(t, matrix.data(), 0, ggml_nbytes(t));
        ggml_backend_buffer_set_usage(buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        buffers.emplace_back(std::move(ctx), std::move(buf));
        rot = t;
    }
    return rot;
}

bool pytq_kv_policy::can_shift(const llama_hparams & hparams) const {
    return std::all_of(k.whole.begin(), k.whole.end(),
                       [&](const auto & layer) { return hparams.n_rot(layer.first) == layer.second; });
}

ggml_type pytq_kv_policy::concrete(char kv, uint32_t head_dim, uint32_t n_head_kv, uint32_t il,
                                   ggml_backend_buffer_type_t buft) {
    ggml_type requested = of(kv).of(il);
    const std::string flag = ggml_type_name(requested);
    if (pytq_is_type(requested) && flag.compare(0, 4, "auto") == 0) {
        if (!data) {
            throw std::runtime_error("cache type " + flag +
                                     " needs a kv profile: run `pytq calibrate`, or name one with --kv-profile");
        }
        const std::string family = data->recommended(flag, kv, il);
        requested = pytq_cache_type_from_name(family);
        if (family.empty() || requested == GGML_TYPE_COUNT) {
            throw std::runtime_error(
                data->fail("recommends no type for layer " + std::to_string(il) + " under " + flag));
        }
    }
    const std::string prefix = "blk." + std::to_string(il) + ".";
    const bool transform = kv == 'k' && data && wants_profile(requested) && data->has(prefix + "kv_k_rot");
    if (transform) {
        wanted.push_back({il, head_dim, n_head_kv, buft});
    }
    if (!pytq_is_type(requested)) {
        if (ggml_is_quantized(requested) && head_dim % ggml_blck_size(requested) != 0) {
            throw std::runtime_error(std::string("cache type ") + ggml_type_name(requested) +
                                     " does not fit head_dim " + std::to_string(head_dim));
        }
        return requested;
    }
    const int split = transform ? pytq_type_resolve(requested, (int) head_dim, 1) : -1;
    const ggml_type out = split >= 0 ? (ggml_type) split : pytq_kv_layer_type(requested, head_dim, kv, il);
    if (transform) {
        wanted.back().type = out;
    }
    return out;
}

void pytq_kv_policy::upload() {
    std::map<std::string, std::vector<const pending *>> by_buft;
    for (const pending & w : wanted) {
        by_buft[ggml_backend_buft_name(w.buft)].push_back(&w);
    }
    for (const auto & [name, list] : by_buft) {
        ggml_context_ptr ctx(ggml_init(
            {/*.mem_size =*/4 * list.size() * ggml_tensor_overhead(), /*.mem_buffer =*/nullptr, /*.no_alloc =*/true}));
        for (const pending * w : list) {
            pytq_k_transform & t = transforms[w->il];
            const int64_t d = w->head_dim, n = w->n_head_kv;
            t.rot_k = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, d, d, n);
            t.rot_q = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, d, d, n);
            t.inv_k = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, d, d, n);
            t.centre = ggml_new_tensor_3d(ctx.get(), GGML_TYPE_F32, d, n, 1);
            ggml_format_name(t.rot_k, "kv_k_rot_l%u", w->il);
            ggml_format_name(t.rot_q, "kv_q_rot_l%u", w->il);
            ggml_format_name(t.inv_k, "kv_k_inv_l%u", w->il);
            ggml_format_name(t.centre, "kv_k_centre_l%u", w->il);
        }
        ggml_backend_buffer_ptr buf(ggml_backend_alloc_ctx_tensors_from_buft(ctx.get(), list[0]->buft));
        if (!buf) {
            throw std::runtime_error(data->fail("does not fit into memory"));
        }
        for (const pending * w : list) {
            const int64_t d = w->head_dim, n = w->n_head_kv;
            const std::string prefix = "blk." + std::to_string(w->il) + ".";
            const float * a = data->tensor(prefix + "kv_k_rot", {d, d, n});
            const float * b = data->tensor(prefix + "kv_q_rot", {d, d, n});
            const float * c = data->tensor(prefix + "kv_k_mean", {d, n, 1});
            const float * var = data->tensor(prefix + "kv_q_var", {d, n, 1});
            const pytq_type_info * type = pytq_type_get(w->type);
            std::vector<float> ka((size_t) (d * d * n)), qa(ka.size()), inv(ka.size()), centre((size_t) (d * n));
            for (int64_t h = 0; h < n; h++) {
                int64_t at = 0;
                for (int g = 0; g < type->n_groups; g++) {
                    const int len = type->group_len[g];
                    const std::vector<float> mix = mixing(len);
                    // The encoder's search weighs all groups alike, so queries get the same mean square in each.
                    double mean = 0;
                    for (int i = 0; i < len; i++) {
                        mean += var[h * d + at + i];
                    }
                    const double s = sqrt(mean / len);
                    if (!(s > 0)) {
                        throw std::runtime_error(
                            data->fail("has query variances that are not positive in layer " + std::to_string(w->il)));
                    }
                    for (int i = 0; i < len; i++) {
                        for (int64_t col = 0; col < d; col++) {
                            double x = 0, y = 0;
                            for (int j = 0; j < len; j++) {
                                const double m = mix[(size_t) i * len + j];
                                x += m * a[(h * d + at + j) * d + col];
                                y += m * b[(h * d + at + j) * d + col];
                            }
                            ka[(h * d + at + i) * d + col] = (float) (x * s);
                            qa[(h * d + at + i) * d + col] = (float) (y / s);
                        }
                    }
                    at += len;
                }
                for (int64_t i = 0; i < d; i++) {
                    double x = 0;
                    for (int64_t col = 0; col < d; col++) {
                        x += (double) ka[(h * d + i) * d + col] * c[h * d + col];
                        inv[(h * d + col) * d + i] = qa[(h * d + i) * d + col];
                    }
                    centre[h * d + i] = (float) x;
                }
            }
            pytq_k_transform & t = transforms[w->il];
            ggml_backend_tensor_set(t.rot_k, ka.data(), 0, ggml_nbytes(t.rot_k));
            ggml_backend_tensor_set(t.rot_q, qa.data(), 0, ggml_nbytes(t.rot_q));
            ggml_backend_tensor_set(t.inv_k, inv.data(), 0, ggml_nbytes(t.inv_k));
            ggml_backend_tensor_set(t.centre, centre.data(), 0, ggml_nbytes(t.centre));
        }
        ggml_backend_buffer_set_usage(buf.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
        buffers.emplace_back(std::move(ctx), std::move(buf));
    }
}

const pytq_k_transform * pytq_kv_policy::transform(uint32_t il) const {
    const auto it = transforms.find(il);
    return it == transforms.end() ? nullptr : &it->second;
}

// x [d, n_head, n] times one matrix per KV head: heads go to dimension 2, where ggml_mul_mat repeats the matrices for
// grouped queries.
static ggml_tensor * per_head(ggml_context * ctx, ggml_tensor * m, ggml_tensor * x) {
    ggml_tensor * y = ggml_mul_mat(ctx, m, ggml_permute(ctx, x, 0, 2, 1, 3));
    return ggml_permute(ctx, y, 0, 2, 1, 3);
}

ggml_tensor * pytq_rotate_q(ggml_context * ctx, ggml_tensor * q, ggml_tensor * rot, const pytq_k_transform * t) {
    if (t) {
        return t->identity ? q : per_head(ctx, t->rot_q, q);
    }
    return rot ? llama_mul_mat_hadamard(ctx, q, rot) : q;
}

ggml_tensor * pytq_rotate_k(ggml_context * ctx, ggml_tensor * k, ggml_tensor * rot, const pytq_k_transform * t) {
    if (t && t->identity) {
        return k;
    }
    if (t) {
        // the cache write wants the heads of one token side by side
        return ggml_sub(ctx, ggml_cont(ctx, per_head(ctx, t->rot_k, k)), t->centre);
    }
    return rot ? llama_mul_mat_hadamard(ctx, k, rot) : k;
}

ggml_tensor * pytq_unrotate_k(ggml_context * ctx, ggml_tensor * k, ggml_tensor * rot, const pytq_k_transform * t) {
    if (t) {
        return ggml_cont(ctx, per_head(ctx, t->inv_k, ggml_add(ctx, k, t->centre)));
    }
    return rot ? llama_mul_mat_hadamard(ctx, k, rot) : k;
}

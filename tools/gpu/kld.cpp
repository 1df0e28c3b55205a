// KL divergence of a model's output to that with an f16 cache, without a tokenizer: for machines on which
// llama-perplexity does not run, and for decoding token by token, which it does not do.
//
//   kld MODEL TOKENS N_CTX CHUNKS N_GPU_LAYERS batch|decode TYPE_K/TYPE_V ...
//
// TOKENS: int32 numbers, of which each chunk takes N_CTX; the first becomes the model's beginning of text. The second
// half of a chunk counts. batch: it is evaluated at once; decode: token by token. Prints one JSON object per line.
// Exit code 2 if the arguments make no sense, 1 if the model or a cache cannot be made.
//
//   g++ -O2 -std=c++17 tools/gpu/kld.cpp -I SRC/include -I SRC/ggml/include -L BUILD/bin -lllama -lggml -lggml-base -o
//   kld
#include "../../csrc/pytq.h"
#include "ggml-backend.h"
#include "llama.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

// -1: no type of a cache
static int type_of(const std::string & name) {
    for (ggml_type t : {GGML_TYPE_F16, GGML_TYPE_Q4_0, GGML_TYPE_Q8_0}) {
        if (name == ggml_type_name(t)) {
            return t;
        }
    }
    return pytq_type_from_name(name.c_str());
}

static int usage(const char * what) {
    fprintf(stderr, "kld: %s\n", what);
    return 2;
}

struct sums {
    double divergence = 0, likelihood = 0;
    long same = 0, n = 0;
};

// logits of one position, as log-probabilities
static std::vector<float> log_softmax(const float * logits, int n) {
    const float top = *std::max_element(logits, logits + n);
    double sum = 0;
    for (int i = 0; i < n; i++) {
        sum += exp((double) logits[i] - top);
    }
    std::vector<float> p(n);
    for (int i = 0; i < n; i++) {
        p[i] = (float) (logits[i] - top - log(sum));
    }
    return p;
}

int main(int argc, char ** argv) {
    if (argc < 8) {
        return usage("MODEL TOKENS N_CTX CHUNKS N_GPU_LAYERS batch|decode TYPE_K/TYPE_V ...");
    }
    const int n_ctx = atoi(argv[3]), chunks = atoi(argv[4]), half = n_ctx / 2, n_batch = 512;
    const bool decode = !strcmp(argv[6], "decode");
    std::vector<std::string> pairs = {"f16/f16"};
    pairs.insert(pairs.end(), argv + 7, argv + argc);
    std::ifstream file(argv[2], std::ios::binary);
    const std::vector<char> raw((std::istreambuf_iterator<char>(file)), {});
    std::vector<llama_token> tokens(raw.size() / sizeof(llama_token));
    memcpy(tokens.data(), raw.data(), tokens.size() * sizeof(llama_token));
    if (n_ctx < 2 || chunks < 1 || tokens.size() < (size_t) n_ctx * chunks) {
        return usage("fewer tokens than chunks of N_CTX");
    }
    if (!decode && strcmp(argv[6], "batch")) {
        return usage("neither batch nor decode");
    }
    for (const std::string & pair : pairs) {
        const size_t slash = pair.find('/');
        if (slash == std::string::npos || type_of(pair.substr(0, slash)) < 0 || type_of(pair.substr(slash + 1)) < 0) {
            return usage((pair + " is no pair of cache types").c_str());
        }
    }

    llama_log_set(
        [](ggml_log_level level, const char * text, void *) {
            if (level >= GGML_LOG_LEVEL_ERROR) {
                fputs(text, stderr);
            }
        },
        nullptr);
    ggml_backend_load_all();
    llama_model_params model_params = llama_model_default_params();
    model_params.n_gpu_layers = atoi(argv[5]);
    llama_model * const model = llama_model_load_from_file(argv[1], model_params);
    if (!model) {
        return 1;
    }
    const llama_vocab * const vocab = llama_model_get_vocab(model);
    const int n_vocab = llama_vocab_n_tokens(vocab);
    for (int c = 0; c < chunks && llama_vocab_bos(vocab) >= 0; c++) {
        tokens[(size_t) c * n_ctx] = llama_vocab_bos(vocab);
    }

    std::vector<std::vector<float>> base; // of every position that counts
    for (const std::string & pair : pairs) {
        llama_context_params params = llama_context_default_params();
        params.n_ctx = (uint32_t) n_ctx, params.n_batch = params.n_ubatch = n_batch;
        params.n_threads = params.n_threads_batch = 2;
        const size_t slash = pair.find('/');
        params.type_k = (ggml_type) type_of(pair.substr(0, slash));
        params.type_v = (ggml_type) type_of(pair.substr(slash + 1));
        params.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_ENABLED;
        llama_context * const context = llama_init_from_model(model, params);
        if (!context) {
            fprintf(stderr, "kld: no cache of %s\n", pair.c_str());
            return 1;
        }
        const bool first = &pair == &pairs[0];
        sums s;
        llama_batch batch = llama_batch_init(n_batch, 0, 1);
        for (int chunk = 0; chunk < chunks; chunk++) {
            const llama_token * const text = &tokens[(size_t) chunk * n_ctx];
            llama_memory_clear(llama_get_memory(context), true);
            for (int at = 0; at < n_ctx; at += batch.n_tokens) {
                batch.n_tokens = decode && at >= half ? 1 : std::min(n_batch, (decode ? half : n_ctx) - at);
                for (int i = 0; i < batch.n_tokens; i++) {
                    batch.token[i] = text[at + i], batch.pos[i] = at + i, batch.logits[i] = at + i >= half;
                    batch.n_seq_id[i] = 1, batch.seq_id[i][0] = 0;
                }
                if (llama_decode(context, batch)) {
                    fprintf(stderr, "kld: %s: decoding failed\n", pair.c_str());
                    return 1;
                }
                for (int i = std::max(0, half - at); i < batch.n_tokens; i++) {
                    const std::vector<float> p = log_softmax(llama_get_logits_ith(context, i), n_vocab);
                    if (first) {
                        base.push_back(p);
                    }
                    const std::vector<float> & b = base[s.n++];
                    for (int t = 0; t < n_vocab; t++) {
                        s.divergence += exp((double) b[t]) * (b[t] - p[t]);
                    }
                    s.same += std::max_element(b.begin(), b.end()) - b.begin() ==
                              std::max_element(p.begin(), p.end()) - p.begin();
                    s.likelihood -= at + i + 1 < n_ctx ? p[text[at + i + 1]] : 0.0f;
                }
            }
        }
        printf("{\"pair\": \"%s\", \"mode\": \"%s\", \"n\": %ld, \"kld\": %.6f, \"same_top\": %.4f, \"nll\": %.5f}\n",
               pair.c_str(), argv[6], s.n, s.divergence / (double) s.n, (double) s.same / (double) s.n,
               s.likelihood / (double) s.n);
        fflush(stdout);
        llama_batch_free(batch);
        llama_free(context);
    }
    llama_model_free(model);
    return 0;
}

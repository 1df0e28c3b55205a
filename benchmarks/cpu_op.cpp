// Op-level timing of the CPU attention and the encoder, without ggml.
//   cpu_op attn K V HEAD_DIM HEADS KV_HEADS N_KV N_Q THREADS [REPEATS]
//   cpu_op encode TYPE N_VECTORS [REPEATS]
//   cpu_op read MEGABYTES THREADS        (this machine's read bandwidth)
// Prints one JSON line: median time, nanoseconds per cached token and KV head, cache GB/s, multiply-add GOP/s.
#include "cpu/attention.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

using clk = std::chrono::steady_clock;
static double since(clk::time_point t) { return std::chrono::duration<double>(clk::now() - t).count(); }
static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}
static uint32_t seed = 12345;
static uint32_t rng() { return seed = seed * 1664525u + 1013904223u; }
static float uniform() { return (float) (rng() >> 8) / 16777216.0f - 0.5f; }

// Threads that wait by spinning, as ggml's do.
struct barrier {
    std::atomic<int> count{0}, phase{0};
    int n;
    explicit barrier(int threads) : n(threads) {}
    void wait() {
        const int p = phase.load();
        if (count.fetch_add(1) == n - 1) {
            count.store(0);
            phase.fetch_add(1);
        } else {
            while (phase.load() == p) {
            }
        }
    }
};

static void fill_blocks(const pytq_type_info *t, std::vector<uint8_t> &out, size_t n) {
    out.resize(n * t->block_bytes);
    for (auto &b : out) {
        b = (uint8_t) (rng() >> 24);
    }
    for (size_t i = 0; i < n; i++) {
        uint8_t *b = &out[i * t->block_bytes];
        if (t->scale == PYTQ_SCALE_FP16) {
            b[1] = (uint8_t) (0x38 + rng() / 65536 % 4);
        } else {
            for (int g = 0; g < t->n_groups; g++) {
                b[g] = (uint8_t) (PYTQ_LOG8_BIAS - 8 + (int) (rng() / 65536 % 8));
            }
        }
    }
}

static const pytq_type_info *type_named(const std::string &flag, int d) {
    const pytq_type_info *t = pytq_type_get(pytq_type_resolve(pytq_type_from_name(flag.c_str()), d, 0));
    if (!t) {
        std::fprintf(stderr, "error: no type %s for head size %d\n", flag.c_str(), d);
        std::exit(2);
    }
    return t;
}

static int run_attn(char **v, int repeats) {
    const int d = std::atoi(v[2]), heads = std::atoi(v[3]), kv_heads = std::atoi(v[4]), n_kv = std::atoi(v[5]), n_q = std::atoi(v[6]);
    const int threads = std::atoi(v[7]);
    const pytq_type_info *tk = type_named(v[0], d), *tv = type_named(v[1], d);
    std::vector<uint8_t> kb, vb;
    fill_blocks(tk, kb, (size_t) n_kv * kv_heads);
    fill_blocks(tv, vb, (size_t) n_kv * kv_heads);
    std::vector<float> q((size_t) n_q * heads * d), out(q.size());
    for (auto &x : q) {
        x = uniform();
    }
    std::vector<uint16_t> mask((size_t) n_q * n_kv);
    for (int i = 0; i < n_q; i++) {
        for (int j = 0; j < n_kv; j++) {
            mask[(size_t) i * n_kv + j] = j > n_kv - n_q + i ? 0xfc00 : 0;
        }
    }
    pytq_attn a = {};
    a.n_q = n_q, a.n_kv = n_kv, a.n_head = heads, a.n_head_kv = kv_heads, a.n_stream = a.n_stream_kv = 1, a.dk = a.dv = d;
    a.q = q.data(), a.q_nb_head = (size_t) d * 4, a.q_nb_token = a.q_nb_head * heads;
    const size_t kr = tk->block_bytes, vr = tv->block_bytes;
    a.k = {kb.data(), kr * kv_heads, kr, 0, tk->id, nullptr};
    a.v = {vb.data(), vr * kv_heads, vr, 0, tv->id, nullptr};
    a.mask = mask.data(), a.mask_nb_token = (size_t) n_kv * 2, a.mask_n_head = a.mask_n_stream = 1;
    a.dst = out.data(), a.scale = 1.0f / std::sqrt((float) d);
    pytq_attn_plan plan;
    pytq_attn_make_plan(&a, threads, &plan);
    auto aligned = [](size_t n) { return std::aligned_alloc(64, (n + 127) / 64 * 64); };
    void *partials = aligned(plan.partial_bytes);
    barrier gate(threads);
    std::atomic<int> next{0};
    std::vector<double> times;
    auto worker = [&](int id) {
        void *scratch = aligned(plan.scratch_bytes);
        for (int rep = 0; rep < repeats + 2; rep++) {
            if (id == 0) {
                next.store(0);
            }
            gate.wait();
            const auto t = clk::now();
            for (int i; (i = next.fetch_add(1)) < plan.n_items;) {
                pytq_attn_item(&a, &plan, i, scratch, partials);
            }
            gate.wait();
            pytq_attn_merge(&a, &plan, id, threads, partials);
            gate.wait();
            if (id == 0 && rep >= 2) {
                times.push_back(since(t));
            }
        }
        std::free(scratch);
    };
    std::vector<std::thread> pool;
    for (int i = 1; i < threads; i++) {
        pool.emplace_back(worker, i);
    }
    worker(0);
    for (auto &t : pool) {
        t.join();
    }
    std::free(partials);
    const double s = median(times), pairs = (double) n_kv * kv_heads;
    const double visible = (double) n_q * n_kv - (double) n_q * (n_q - 1) / 2;  // causal
    std::printf("{\"op\": \"attn\", \"tier\": \"%s\", \"k\": \"%s\", \"v\": \"%s\", \"heads\": %d, \"kv_heads\": %d, \"n_kv\": %d, \"n_q\": %d, "
                "\"threads\": %d, \"us\": %.2f, \"best_us\": %.2f, \"ns_per_kv\": %.2f, \"cache_gb_s\": %.2f, \"gop_s\": %.2f}\n",
                pytq_cpu_tier(), tk->name, tv->name, heads, kv_heads, n_kv, n_q, threads, s * 1e6, *std::min_element(times.begin(), times.end()) * 1e6, s * 1e9 / pairs * threads,
                pairs * (double) (kr + vr) / s / 1e9, visible * heads * 4.0 * d / s / 1e9);
    return 0;
}

static int run_encode(char **v, int repeats) {
    const int n = std::atoi(v[1]);
    const pytq_type_info *t = pytq_type_get(pytq_type_from_name(v[0]));
    if (!t) {
        std::fprintf(stderr, "error: no type %s\n", v[0]);
        return 2;
    }
    std::vector<float> x((size_t) n * t->head_dim), y(x.size());
    for (auto &f : x) {
        f = uniform() + uniform() + uniform() + uniform();
    }
    std::vector<uint8_t> out((size_t) n * t->block_bytes);
    std::vector<double> enc, dec;
    for (int i = 0; i < repeats + 1; i++) {
        auto at = clk::now();
        pytq_quantize(t, x.data(), out.data(), (int64_t) x.size());
        enc.push_back(since(at));
        at = clk::now();
        pytq_dequantize(t, out.data(), y.data(), (int64_t) y.size());
        dec.push_back(since(at));
    }
    std::printf("{\"op\": \"encode\", \"tier\": \"%s\", \"type\": \"%s\", \"ns_per_vector\": %.1f, \"decode_ns_per_vector\": %.1f}\n", pytq_cpu_tier(),
                t->name, median(enc) / n * 1e9, median(dec) / n * 1e9);
    return 0;
}

static int run_read(char **v, int repeats) {
    const size_t n = (size_t) std::atoi(v[0]) << 17;
    const int threads = std::atoi(v[1]);
    std::vector<uint64_t> data(n, 1);
    std::vector<double> times;
    std::atomic<uint64_t> sink{0};
    for (int i = 0; i < repeats; i++) {
        const auto at = clk::now();
        std::vector<std::thread> pool;
        for (int t = 0; t < threads; t++) {
            pool.emplace_back([&, t] {
                uint64_t s[8] = {0};
                const uint64_t *p = &data[n / threads * t];
                for (size_t j = 0; j + 8 <= n / threads; j += 8) {
                    for (int k = 0; k < 8; k++) {
                        s[k] += p[j + k];
                    }
                }
                sink += s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
            });
        }
        for (auto &t : pool) {
            t.join();
        }
        times.push_back(since(at));
    }
    std::printf("{\"op\": \"read\", \"threads\": %d, \"gb_s\": %.2f}\n", threads, (double) n * 8 / median(times) / 1e9);
    return 0;
}

int main(int argc, char **argv) {
    const std::string op = argc > 1 ? argv[1] : "";
    if (op == "attn" && (argc == 10 || argc == 11)) {
        return run_attn(argv + 2, argc == 11 ? std::atoi(argv[10]) : 31);
    }
    if (op == "encode" && (argc == 4 || argc == 5)) {
        return run_encode(argv + 2, argc == 5 ? std::atoi(argv[4]) : 31);
    }
    if (op == "read" && argc == 4) {
        return run_read(argv + 2, 11);
    }
    std::fprintf(stderr, "usage: cpu_op attn K V HEAD_DIM HEADS KV_HEADS N_KV N_Q THREADS [REPEATS]\n"
                         "       cpu_op encode TYPE N_VECTORS [REPEATS]\n       cpu_op read MEGABYTES THREADS\n");
    return 2;
}

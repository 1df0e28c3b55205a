// Op-level harness for prefill attention over compressed caches: checks it against double precision over the blocks as
// csrc/ref decodes them, and times it.
//
//   prefill_bench check       every compiled pair: shapes, masks, sinks, soft-cap, ALiBi, several sequences
//   prefill_bench sanitize    the same on small sizes only
//   prefill_bench time [n_past ...]   512 queries of 32 heads (8 KV heads) behind so many tokens
//   prefill_bench profile     one call behind 16384 tokens
// Prints one JSON object per line; exit code 1 if a check fails.
#include "../../csrc/cuda/prefill-launch.cuh"
#include "../../csrc/pytq.h"
#include "bench.cuh"

#include <cmath>
#include <cstring>
#include <map>
#include <string>
#include <utility>

// Variants to compare, (stages).
#ifdef ALL_VARIANTS
#define VARIANTS(X) X(2) X(3)
#else
#define VARIANTS(X) X(2)
#endif

enum mask_kind { NO_MASK, CAUSAL, WINDOW, SCATTERED };
static const char * const mask_names[] = {"none", "causal", "window", "scattered"};

struct shape {
    int n_kv, n_head_kv, gqa, n_q, n_seq;
    mask_kind mask;
    float softcap = 0;
    bool sinks = false, alibi = false, permuted = false;
    int odd = 0; // further mask elements between rows
};

static std::vector<uint16_t> mask_of(const shape & a, int stride) {
    std::vector<uint16_t> m((size_t) a.n_seq * a.n_q * stride, 0xfc00);
    std::mt19937 rng(5);
    for (int s = 0; s < a.n_seq; s++) {
        for (int i = 0; i < a.n_q; i++) {
            uint16_t * const row = &m[((size_t) s * a.n_q + i) * stride];
            const int last = a.n_kv - a.n_q + i;
            for (int t = 0; t < a.n_kv; t++) {
                const bool seen = a.mask == CAUSAL   ? t <= last
                                  : a.mask == WINDOW ? t <= last && t > last - 100
                                                     : rng() % 3 != 0;
                row[t] = !seen ? 0xfc00 : a.mask == SCATTERED && rng() % 3 == 0 ? 0xbc00 /* -1 */ : 0;
            }
        }
    }
    return m;
}

template <int KT, int VT> struct inputs {
    shape a;
    std::vector<float> q;
    std::vector<uint8_t> k, v;
    std::vector<uint16_t> mask;
    std::vector<float> sinks;
    float *dq = nullptr, *out = nullptr, *dsinks = nullptr, *part = nullptr;
    float2 * meta = nullptr;
    uint8_t *dk = nullptr, *dv = nullptr;
    uint16_t * dmask = nullptr;
    pytq::prefill_params p = {};
    size_t n_out = 0;

    inputs(const shape & a_, int n_sm, int sets = 1) : a(a_) {
        using K = pytq::type<KT>;
        using V = pytq::type<VT>;
        const int n_head = a.n_head_kv * a.gqa, stride = a.n_kv + a.odd;
        const size_t n_vec = (size_t) a.n_kv * a.n_head_kv * a.n_seq;
        q = gaussian((size_t) n_head * a.n_q * a.n_seq * K::d, 1, 1.5f);
        k = blocks_of(pytq_type_get(KT), n_vec, 2, true), v = blocks_of(pytq_type_get(VT), n_vec, 3, true);
        // token 5 of every head is an attention sink of the first query
        std::vector<float> key(K::d);
        for (int s = 0; s < a.n_seq; s++) {
            for (int h = 0; h < a.n_head_kv && a.n_kv > 5; h++) {
                for (int c = 0; c < K::d; c++) {
                    key[c] = 0.8f * q[((size_t) s * n_head + (size_t) h * a.gqa) * a.n_q * K::d + c];
                }
                pytq_quantize_ref(pytq_type_get(KT), key.data(), &k[vec(s, 5, h) * K::block_bytes], K::d);
            }
        }
        dq = upload(q);
        CHECK(cudaMalloc(&dk, sets * set_bytes(k.size()) + 128));
        CHECK(cudaMalloc(&dv, sets * set_bytes(v.size()) + 128));
        for (int i = 0; i < sets; i++) {
            CHECK(cudaMemcpy(dk + i * set_bytes(k.size()), k.data(), k.size(), cudaMemcpyHostToDevice));
            CHECK(cudaMemcpy(dv + i * set_bytes(v.size()), v.data(), v.size(), cudaMemcpyHostToDevice));
        }
        if (a.mask != NO_MASK) {
            mask = mask_of(a, stride);
            dmask = upload(mask);
        }
        n_out = (size_t) n_head * a.n_q * a.n_seq * K::d;
        CHECK(cudaMalloc(&out, n_out * 4));
        CHECK(cudaMemset(out, 0xff, n_out * 4));
        p.q = (char *) dq, p.k = (char *) dk, p.v = (char *) dv, p.mask = (char *) dmask, p.dst = out;
        p.n_kv = a.n_kv, p.n_q = a.n_q, p.n_head_kv = a.n_head_kv, p.gqa = a.gqa, p.n_seq = p.n_seq_mask = a.n_seq;
        p.q_nb1 = 4LL * K::d, p.q_nb2 = p.q_nb1 * a.n_q, p.q_nb3 = p.q_nb2 * n_head;
        p.k_nb1 = (long long) K::block_bytes * (a.permuted ? 1 : a.n_head_kv);
        p.k_nb2 = (long long) K::block_bytes * (a.permuted ? a.n_kv : 1);
        p.k_nb3 = (long long) K::block_bytes * a.n_kv * a.n_head_kv;
        p.v_nb1 = (long long) V::block_bytes * (a.permuted ? 1 : a.n_head_kv);
        p.v_nb2 = (long long) V::block_bytes * (a.permuted ? a.n_kv : 1);
        p.v_nb3 = (long long) V::block_bytes * a.n_kv * a.n_head_kv;
        p.mask_nb1 = 2LL * stride, p.mask_nb3 = p.mask_nb1 * a.n_q;
        p.scale = 1.0f / sqrtf((float) K::d), p.softcap = a.softcap, p.max_bias = a.alibi ? 8.0f : 0.0f;
        p.n_head_log2 = 1 << (int) floorf(log2f((float) n_head));
        p.m0 = powf(2.0f, -p.max_bias / p.n_head_log2), p.m1 = powf(2.0f, -p.max_bias / 2.0f / p.n_head_log2);
        if (a.sinks) {
            for (int h = 0; h < n_head; h++) {
                sinks.push_back(0.5f * h - 1.0f);
            }
            dsinks = upload(sinks);
            p.sinks = dsinks;
        }
        pytq::prefill_plan(p, n_sm);
        const size_t rows = std::max<size_t>(1, pytq::prefill_part_rows(p));
        CHECK(cudaMalloc(&part, rows * K::d * 4));
        CHECK(cudaMalloc(&meta, rows * 8));
        p.part = part, p.meta = meta;
    }
    static size_t set_bytes(size_t n) { return (n + 255) / 256 * 256; }
    size_t vec(int s, int t, int h) const {
        return (size_t) s * a.n_kv * a.n_head_kv +
               (a.permuted ? (size_t) h * a.n_kv + t : (size_t) t * a.n_head_kv + h);
    }
    ~inputs() {
        cudaFree(dq), cudaFree(dk), cudaFree(dv), cudaFree(dmask), cudaFree(out), cudaFree(part), cudaFree(meta);
        cudaFree(dsinks);
    }
};

template <int KT, int VT> static void check(const char * name, const shape & a, int n_sm, int every) {
    using K = pytq::type<KT>;
    using V = pytq::type<VT>;
    inputs<KT, VT> in(a, n_sm);
    const int d = K::d, n_head = a.n_head_kv * a.gqa, stride = a.n_kv + a.odd;
    // rows to look at, exact
    std::vector<int> rows; // (seq, head, query)
    for (int i = 0; i < a.n_seq * n_head * a.n_q; i++) {
        if (i % every == 0 || i % (n_head * a.n_q) == n_head * a.n_q - 1) {
            rows.push_back(i);
        }
    }
    std::vector<double> want(rows.size() * d);
    std::vector<float> kd, vd;
    int have = -1;
    for (size_t r = 0; r < rows.size(); r++) {
        const int iq = rows[r] % a.n_q, head = rows[r] / a.n_q % n_head, s = rows[r] / a.n_q / n_head;
        if (have != s * a.n_head_kv + head / a.gqa) {
            have = s * a.n_head_kv + head / a.gqa;
            kd.resize((size_t) a.n_kv * d), vd.resize((size_t) a.n_kv * d);
            for (int t = 0; t < a.n_kv; t++) {
                const size_t at = in.vec(s, t, head / a.gqa);
                pytq_dequantize_ref(pytq_type_get(KT), &in.k[at * K::block_bytes], &kd[(size_t) t * d], d);
                pytq_dequantize_ref(pytq_type_get(VT), &in.v[at * V::block_bytes], &vd[(size_t) t * d], d);
            }
        }
        const float * qv = &in.q[(((size_t) s * n_head + head) * a.n_q + iq) * d];
        const int n2 = in.p.n_head_log2;
        const double slope = !a.alibi    ? 1.0
                             : head < n2 ? pow(2.0, -8.0 / n2 * (head + 1))
                                         : pow(2.0, -4.0 / n2 * (2 * (head - n2) + 1));
        std::vector<double> x(a.n_kv), o(d, 0.0);
        double top = a.sinks ? in.sinks[head] : -1e300, sum = 0;
        for (int t = 0; t < a.n_kv; t++) {
            const uint16_t m = a.mask == NO_MASK ? 0 : in.mask[((size_t) s * a.n_q + iq) * stride + t];
            x[t] = -INFINITY;
            if (m != 0xfc00) {
                double dot = 0;
                for (int c = 0; c < d; c++) {
                    dot += (double) qv[c] * kd[(size_t) t * d + c];
                }
                dot /= sqrt((double) d);
                x[t] = (a.softcap > 0 ? a.softcap * tanh(dot / a.softcap) : dot) + (m ? -slope : 0.0);
                top = std::max(top, x[t]);
            }
        }
        if (a.sinks) {
            sum = exp(in.sinks[head] - top);
        }
        for (int t = 0; t < a.n_kv; t++) {
            if (x[t] > -INFINITY) {
                const double w = exp(x[t] - top);
                sum += w;
                for (int c = 0; c < d; c++) {
                    o[c] += w * vd[(size_t) t * d + c];
                }
            }
        }
        for (int c = 0; c < d; c++) {
            want[r * d + c] = sum > 0 ? o[c] / sum : 0.0;
        }
    }
    const auto judge = [&](const char * variant) {
        CHECK(cudaDeviceSynchronize());
        std::vector<float> out(in.n_out);
        CHECK(cudaMemcpy(out.data(), in.out, out.size() * 4, cudaMemcpyDeviceToHost));
        CHECK(cudaMemset(in.out, 0xff, in.n_out * 4));
        double err = 0, ref2 = 0, worst = 0;
        long bad = 0, worst_row = -1;
        for (const float f : out) {
            bad += !std::isfinite(f);
        }
        for (size_t r = 0; r < rows.size(); r++) {
            const int iq = rows[r] % a.n_q, head = rows[r] / a.n_q % n_head, s = rows[r] / a.n_q / n_head;
            double e2 = 0, r2 = 0;
            for (int c = 0; c < d; c++) {
                const double e = out[(((size_t) s * a.n_q + iq) * n_head + head) * d + c] - want[r * d + c];
                e2 += std::isfinite(e) ? e * e : 1e9, r2 += want[r * d + c] * want[r * d + c];
            }
            err += e2, ref2 += r2;
            const double rel = r2 > 0 ? sqrt(e2 / r2) : sqrt(e2);
            if (rel > worst) {
                worst = rel, worst_row = rows[r];
            }
        }
        const double rel = sqrt(err / (ref2 + 1e-30));
        const bool ok = rel < 1e-3 && worst < 4e-3 && bad == 0;
        failed |= !ok;
        printf("{\"check\": \"prefill\", \"types\": \"%s\", \"variant\": \"%s\", \"n_kv\": %d, \"n_head_kv\": %d, "
               "\"gqa\": %d, "
               "\"n_q\": %d, \"n_seq\": %d, \"mask\": \"%s\", \"softcap\": %g, \"sinks\": %d, \"alibi\": %d, "
               "\"permuted\": %d, "
               "\"splits\": %d, \"rel_err\": %.3g, \"worst_row\": %.3g, \"at\": %ld, \"bad\": %ld, \"ok\": %s}\n",
               name, variant, a.n_kv, a.n_head_kv, a.gqa, a.n_q, a.n_seq, mask_names[a.mask], a.softcap, a.sinks,
               a.alibi, a.permuted, in.p.n_splits, rel, worst, worst_row, bad, ok ? "true" : "false");
        fflush(stdout);
    };
#define X(stages)                                                                                                      \
    CHECK((pytq::prefill_launch<KT, VT, stages>(in.p, 0, 0)));                                                         \
    judge(#stages);
    VARIANTS(X)
#undef X
}

template <int KT, int VT> static void time_prefill(const char * name, int n_past, int n_sm, bool once) {
    constexpr int SETS = 3;
    const shape a = {n_past + 512, 8, 4, 512, 1, CAUSAL};
    inputs<KT, VT> in(a, n_sm, SETS);
    const double flop = 4.0 * pytq::type<KT>::d * 32 * 512 * (n_past + 256.5);
#define X(stages)                                                                                                      \
    {                                                                                                                  \
        const auto run = [&](int i) {                                                                                  \
            pytq::prefill_params p = in.p;                                                                             \
            p.k += (i % SETS) * in.set_bytes(in.k.size()), p.v += (i % SETS) * in.set_bytes(in.v.size());              \
            CHECK((pytq::prefill_launch<KT, VT, stages>(p, 0, 0)));                                                    \
        };                                                                                                             \
        if (once) {                                                                                                    \
            run(0);                                                                                                    \
            CHECK(cudaDeviceSynchronize());                                                                            \
        } else {                                                                                                       \
            const double us = median_us(run, n_past > 4096 ? 9 : 30);                                                  \
            printf("{\"time\": \"prefill\", \"types\": \"%s\", \"variant\": \"%d\", \"n_past\": %d, \"n_q\": "         \
                   "512, \"splits\": %d, \"us\": %.1f, \"tflops\": %.0f}\n",                                           \
                   name, stages, n_past, in.p.n_splits, us, flop / us * 1e-6);                                         \
            fflush(stdout);                                                                                            \
        }                                                                                                              \
    }
    VARIANTS(X)
#undef X
}

constexpr int id_of(int family, int slot) {
    return PYTQ_TYPE_BASE + PYTQ_FAMILY_STRIDE * family + slot;
}
#define ID(name, slot) id_of(PYTQ_FAMILY_INDEX_##name, slot)
// Pairs (name, type of K, type of V): the first list is timed, both are checked.
#ifdef MORE
#define TIMED(X)                                                                                                       \
    X("kv3/kv3", ID(kv3, 4), ID(kv3, 4))                                                                               \
    X("kv4/kv4", ID(kv4, 4), ID(kv4, 4))                                                                               \
    X("turbo3/turbo3", ID(turbo3, 4), ID(turbo3, 4)) X("turbo4/turbo4", ID(turbo4, 4), ID(turbo4, 4))
#define CHECKED(X)                                                                                                     \
    X("kv2/kv2", ID(kv2, 4), ID(kv2, 4))                                                                               \
    X("kv5/kv5", ID(kv5, 4), ID(kv5, 4))                                                                               \
    X("turbo2/turbo2", ID(turbo2, 4), ID(turbo2, 4))                                                                   \
    X("kv4/kv3", ID(kv4, 4), ID(kv3, 4))                                                                               \
    X("kv4/kv2", ID(kv4, 4), ID(kv2, 4))                                                                               \
    X("kv5/kv4", ID(kv5, 4), ID(kv4, 4))                                                                               \
    X("kv5/kv3", ID(kv5, 4), ID(kv3, 4))                                                                               \
    X("kv2/kv2 d64", ID(kv2, 1), ID(kv2, 1))                                                                           \
    X("kv3/kv3 d64", ID(kv3, 1), ID(kv3, 1))                                                                           \
    X("kv4/kv4 d64", ID(kv4, 1), ID(kv4, 1))                                                                           \
    X("kv5/kv5 d64", ID(kv5, 1), ID(kv5, 1))                                                                           \
    X("turbo2/turbo2 d64", ID(turbo2, 1), ID(turbo2, 1))                                                               \
    X("turbo3/turbo3 d64", ID(turbo3, 1), ID(turbo3, 1)) X("turbo4/turbo4 d64", ID(turbo4, 1), ID(turbo4, 1))
#else
#define TIMED(X) X("kv3/kv3", ID(kv3, 4), ID(kv3, 4)) X("turbo4/turbo4", ID(turbo4, 4), ID(turbo4, 4))
#define CHECKED(X)
#endif

int main(int argc, char ** argv) {
    cudaDeviceProp prop;
    CHECK(cudaGetDeviceProperties(&prop, 0));
    const int n_sm = prop.multiProcessorCount;
    printf("{\"device\": \"%s\", \"sms\": %d}\n", prop.name, n_sm);
    const std::string mode = argc > 1 ? argv[1] : "check";
    if (mode == "check" || mode == "sanitize") {
        const bool small = mode == "sanitize";
        for (const shape & a : std::vector<shape>{
                 {64, 1, 1, 128, 1, NO_MASK},
                 {333, 2, 4, 40, 1, CAUSAL},
                 {700, 1, 3, 77, 2, SCATTERED, 0, true},
                 {513, 2, 2, 65, 1, SCATTERED, 30.0f, false, false, true},
                 {1, 1, 8, 9, 1, NO_MASK, 0, true},
                 {1024, 3, 1, 100, 1, WINDOW, 0, false, true},
                 {777, 1, 16, 33, 1, CAUSAL, 0, true, true, true, 7},
                 {1500, 4, 7, 130, 1, CAUSAL},
                 {4096, 2, 4, 512, 1, CAUSAL},
             }) {
            if (small && (size_t) a.n_kv * a.n_head_kv > 1100) {
                continue;
            }
            const int every = std::max<int>(1, (int) ((double) a.n_seq * a.n_head_kv * a.gqa * a.n_q * a.n_kv / 400e3));
#define X(name, kt, vt) check<kt, vt>(name, a, n_sm, every);
            TIMED(X) CHECKED(X)
#undef X
        }
        if (!small) {
            check<ID(kv3, 4), ID(kv3, 4)>("kv3/kv3", {65536 + 512 - 3, 8, 4, 512, 1, CAUSAL}, n_sm, 1499);
        }
    } else {
        std::vector<int> sizes;
        for (int i = 2; i < argc; i++) {
            sizes.push_back(atoi(argv[i]));
        }
        const bool once = mode == "profile";
        for (int n : once ? std::vector<int>{16384} : sizes.empty() ? std::vector<int>{65536, 16384, 0} : sizes) {
#define X(name, kt, vt) time_prefill<kt, vt>(name, n, n_sm, once);
            TIMED(X)
#undef X
        }
    }
    CHECK(cudaDeviceSynchronize());
    return failed ? 1 : 0;
}

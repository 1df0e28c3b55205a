// Compares every CPU tier of this machine (or of qemu's) with the reference: encoder and decoder to the bit, attention to
// the scalar tier to the bit and to a double precision sum within a bound. Standalone, so that it can be cross-compiled:
//   g++ -std=c++17 -O2 -ffp-contract=off -Icsrc tests/kernels/cpu_selftest.cpp <csrc/{ref/*.c,cpu/*.c,cpu/*.cpp} objects> -lm
// Usage: cpu_selftest [--quick] [--every N] [TIER...]   (--quick: fewer vectors and lengths, for emulators; --every: every N-th type only)   exit code 0 if all agree, 1 if not, 2 if a tier named on the command line is missing.
#include "cpu/attention.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

static uint64_t rng_state = 88172645463325252ull;
static uint32_t rng() {
    rng_state ^= rng_state << 13;
    rng_state ^= rng_state >> 7;
    rng_state ^= rng_state << 17;
    return (uint32_t) (rng_state >> 20);
}
static float uniform() { return (float) (rng() & 0xffffff) / 16777216.0f; }
static float gauss() {
    const float u = uniform() + 1e-7f, v = uniform();
    return std::sqrt(-2.0f * std::log(u)) * std::cos(6.2831853f * v);
}
static uint16_t half_bits(float x) {  // enough for masks: normal numbers and -inf
    if (std::isinf(x)) {
        return 0xfc00;
    }
    if (x == 0.0f) {
        return 0;
    }
    int e;
    const float m = std::frexp(std::fabs(x), &e) * 2.0f - 1.0f;
    return (uint16_t) ((x < 0 ? 0x8000 : 0) | (e - 1 + 15) << 10 | (int) (m * 1024.0f));
}
static float half_value(uint16_t h) {
    if (h == 0xfc00) {
        return -INFINITY;
    }
    const int e = h >> 10 & 31, m = h & 1023;
    const float v = e ? std::ldexp(1024.0f + (float) m, e - 25) : std::ldexp((float) m, -24);
    return h & 0x8000 ? -v : v;
}

static int failures = 0, checks = 0;
static bool quick = false;
static int every = 1; // types that are tested: every so many
static unsigned tier_caps = 0;
static void check(bool ok, const char *what, const char *tier, const char *name, double value) {
    checks++;
    if (!ok) {
        failures++;
        if (failures < 40) {
            std::printf("FAIL %s tier=%s %s value=%g\n", what, tier, name, value);
        }
    }
}

// Vectors of every kind the encoder must treat exactly: plain, tiny, huge, zero, constant, one outlier, ties, non-finite.
static void fill(float *x, int d, int kind) {
    for (int i = 0; i < d; i++) {
        switch (kind) {
            case 1: x[i] = gauss() * 1e-30f; break;
            case 2: x[i] = gauss() * 1e30f; break;
            case 3: x[i] = 0.0f; break;
            case 4: x[i] = -2.5f; break;
            case 5: x[i] = i == 7 ? 100.0f : gauss() * 0.01f; break;
            case 6: x[i] = (float) ((int) (rng() % 9) - 4); break;
            case 7: x[i] = i == 5 ? NAN : gauss(); break;
            case 8: x[i] = i == 5 ? INFINITY : gauss(); break;
            case 9: x[i] = i < d / 2 ? 0.0f : gauss(); break;
            case 10: x[i] = gauss() * std::exp(3.0f * gauss()); break;
            case 11: x[i] = gauss() * 1e-39f; break;
            default: x[i] = gauss() * 0.7f; break;
        }
    }
}

static void test_codec(const char *tier) {
    const int n_vec = quick ? 16 : 96;
    for (int i = 0; const pytq_type_info *t = pytq_type_at(i); i += every) {
        const int d = t->head_dim;
        std::vector<float> x((size_t) n_vec * d), f0(x.size()), f1(x.size());
        std::vector<uint8_t> a((size_t) n_vec * t->block_bytes), b(a.size(), 0xa5);
        for (int v = 0; v < n_vec; v++) {
            fill(&x[(size_t) v * d], d, v < 48 ? v % 12 : 0);
        }
        pytq_quantize_ref(t, x.data(), a.data(), (int64_t) x.size());
        pytq_quantize(t, x.data(), b.data(), (int64_t) x.size());
        check(std::memcmp(a.data(), b.data(), a.size()) == 0, "quantize", tier, t->name, 0);
        for (size_t j = 0; j < a.size(); j++) {
            a[j] = (uint8_t) rng();  // decoders take any bits; scales kept finite
        }
        for (int v = 0; v < n_vec && t->scale == PYTQ_SCALE_FP16; v++) {
            a[(size_t) v * t->block_bytes + 1] &= 0x3b;
        }
        pytq_dequantize_ref(t, a.data(), f0.data(), (int64_t) f0.size());
        pytq_dequantize(t, a.data(), f1.data(), (int64_t) f1.size());
        check(std::memcmp(f0.data(), f1.data(), f0.size() * sizeof(float)) == 0, "dequantize", tier, t->name, 0);
    }
}

static void test_fwht(const char *tier) {
    for (int n = 32; n <= 512; n *= 2) {
        check(pytq_fwht_supported(n), "fwht takes the size", tier, "", n);
        std::vector<float> x(n), y(n), want(n);
        for (auto &v : x) {
            v = gauss();
        }
        const float scale = 1.0f / std::sqrt((float) n);
        for (int i = 0; i < n; i++) {
            want[i] = x[i] * scale;
        }
        for (int len = 1; len < n; len *= 2) {
            for (int i = 0; i < n; i++) {
                if ((i & len) == 0) {
                    const float u = want[i], v = want[i + len];
                    want[i] = u + v;
                    want[i + len] = u - v;
                }
            }
        }
        pytq_fwht(x.data(), y.data(), n, scale);
        check(std::memcmp(y.data(), want.data(), y.size() * sizeof(float)) == 0, "fwht", tier, "", n);
    }
    check(!pytq_fwht_supported(80) && !pytq_fwht_supported(16) && !pytq_fwht_supported(1024), "fwht refuses other sizes", tier, "", 0);
}

// Encoding with the transform in front: the bytes of the transform, then the reference encoder.
static void test_rotated_codec(const char *tier) {
    for (int i = 0; const pytq_type_info *t = pytq_type_at(i); i += every) {
        const int d = t->head_dim, n_vec = 11;  // no multiple of the vectors that are encoded together
        if (!pytq_fwht_supported(d)) {
            continue;
        }
        std::vector<float> x((size_t) n_vec * d), y(x.size());
        std::vector<uint8_t> want((size_t) n_vec * t->block_bytes), got(want.size(), 0xa5);
        for (int v = 0; v < n_vec; v++) {
            fill(&x[(size_t) v * d], d, v);
            pytq_fwht(&x[(size_t) v * d], &y[(size_t) v * d], d, 1.0f / std::sqrt((float) d));
        }
        pytq_quantize_ref(t, y.data(), want.data(), (int64_t) y.size());
        pytq_quantize_rotated(t, x.data(), got.data(), (int64_t) x.size());
        check(want == got, "rotated quantize", tier, t->name, 0);
    }
}

struct shape {
    int n_q, n_kv, n_head, n_head_kv, n_stream;
    bool mask, alibi, sinks;
    float softcap;
    int split;
};

static void float_row(const void *row, float *out, int64_t n) { std::memcpy(out, row, (size_t) n * sizeof(float)); }

// A cache that has just begun: what lies behind the last visible token has no effect, whatever its bits; and a rotated result.
static void test_short_cache(const char *tier, const pytq_type_info *t, const pytq_type_info *tv, int seen) {
    const int d = t->head_dim, n_kv = 300, n_q = 2, n_head = 6, n_head_kv = 2;
    const size_t k_row = (size_t) t->block_bytes, v_row = tv ? (size_t) tv->block_bytes : (size_t) d * 4;
    std::vector<float> q((size_t) n_q * n_head * d), x((size_t) seen * n_head_kv * d);
    std::vector<uint8_t> k(n_kv * n_head_kv * k_row, 0xff), v(n_kv * n_head_kv * v_row, 0xff);  // scales that are not numbers
    for (auto *w : {&q, &x}) {
        for (auto &y : *w) {
            y = gauss();
        }
    }
    pytq_quantize_ref(t, x.data(), k.data(), (int64_t) x.size());
    if (tv) {
        pytq_quantize_ref(tv, x.data(), v.data(), (int64_t) x.size());
    } else {
        std::memcpy(v.data(), x.data(), x.size() * sizeof(float));
    }
    std::vector<uint16_t> mask((size_t) n_q * n_kv, 0xfc00);
    for (int i = 0; i < n_q; i++) {
        std::fill_n(mask.begin() + (size_t) i * n_kv, std::max(1, seen - 1 + i), 0);
    }
    auto run = [&](int n, int rotate) {
        std::vector<float> out((size_t) n_q * n_head * d, NAN);
        pytq_attn a = {};
        a.n_q = n_q, a.n_kv = n, a.n_head = n_head, a.n_head_kv = n_head_kv, a.n_stream = a.n_stream_kv = 1, a.dk = a.dv = d;
        a.q = q.data(), a.q_nb_head = (size_t) d * 4, a.q_nb_token = a.q_nb_stream = a.q_nb_head * n_head;
        a.k = {k.data(), k_row * n_head_kv, k_row, 0, t->id, float_row};
        a.v = {v.data(), v_row * n_head_kv, v_row, 0, tv ? tv->id : -1, float_row};
        a.mask = mask.data(), a.mask_nb_token = (size_t) n_kv * 2, a.mask_n_head = a.mask_n_stream = 1;
        a.dst = out.data(), a.scale = 1.0f / std::sqrt((float) d), a.rotate = rotate;
        check(pytq_attn_run(&a, 1) == 0, "attention runs", tier, t->name, n);
        return out;
    };
    const std::vector<float> alone = run(seen, 0), within = run(n_kv, 0);
    char name[80];
    std::snprintf(name, sizeof(name), "%s/%s seen=%d", t->name, tv ? tv->name : "float", seen);
    check(std::memcmp(alone.data(), within.data(), alone.size() * sizeof(float)) == 0, "tokens behind the mask", tier, name, 0);
    if (pytq_fwht_supported(d)) {
        const std::vector<float> rotated = run(n_kv, 1);
        std::vector<float> want(within);
        for (size_t i = 0; i < want.size(); i += (size_t) d) {
            pytq_fwht(&want[i], &want[i], d, 1.0f / std::sqrt((float) d));
        }
        check(std::memcmp(want.data(), rotated.data(), want.size() * sizeof(float)) == 0, "rotated result", tier, name, 0);
    }
}

// tk or tv NULL: float rows of dk or dv
static void test_attention(const char *tier, const pytq_type_info *tk, const pytq_type_info *tv, int dk, int dv, const shape &c) {
    const size_t k_row = tk ? (size_t) tk->block_bytes : (size_t) dk * 4, v_row = tv ? (size_t) tv->block_bytes : (size_t) dv * 4;
    const size_t n_vec = (size_t) c.n_stream * c.n_kv * c.n_head_kv;
    std::vector<float> q((size_t) c.n_stream * c.n_q * c.n_head * dk), kf(n_vec * dk), vf(n_vec * dv);
    // exact size: reading past the end is an error that valgrind and the sanitizers see
    uint8_t *k = (uint8_t *) std::malloc(n_vec * k_row), *v = (uint8_t *) std::malloc(n_vec * v_row);
    for (auto &y : q) {
        y = gauss() * 3.0f;
    }
    // random bits are as good as encoded vectors and much faster; scales within 2^+-2
    auto make = [&](const pytq_type_info *t, uint8_t *out, std::vector<float> &f, int d) {
        for (size_t i = 0; i < n_vec; i++) {
            uint8_t *b = out + i * (t ? (size_t) t->block_bytes : (size_t) d * 4);
            if (!t) {
                for (int j = 0; j < d; j++) {
                    f[i * d + j] = gauss();
                }
                std::memcpy(b, &f[i * d], (size_t) d * 4);
                continue;
            }
            for (int j = 0; j < t->block_bytes; j++) {
                b[j] = (uint8_t) rng();
            }
            if (t->scale == PYTQ_SCALE_FP16) {
                b[1] = (uint8_t) (0x38 + rng() % 8);
            } else {
                for (int g = 0; g < t->n_groups; g++) {
                    b[g] = (uint8_t) (PYTQ_LOG8_BIAS - 16 + (int) (rng() % 24));
                }
            }
            pytq_dequantize_ref(t, b, &f[i * d], d);
        }
    };
    make(tk, k, kf, dk);
    make(tv, v, vf, dv);
    std::vector<uint16_t> mask((size_t) c.n_stream * c.n_q * c.n_kv);
    for (int s = 0; s < c.n_stream; s++) {
        for (int i = 0; i < c.n_q; i++) {
            for (int j = 0; j < c.n_kv; j++) {
                const int pos = c.n_kv - c.n_q + i;
                float m = j > pos || (j % 5 == 3 && i % 3 == 1) ? -INFINITY : c.alibi ? -(float) (pos - j) * 0.25f : 0.0f;
                mask[((size_t) s * c.n_q + i) * c.n_kv + j] = half_bits(m);
            }
        }
    }
    std::vector<float> sinks(c.n_head), out((size_t) c.n_stream * c.n_q * c.n_head * dv, NAN);
    for (auto &y : sinks) {
        y = gauss();
    }
    pytq_attn a = {};
    a.n_q = c.n_q, a.n_kv = c.n_kv, a.n_head = c.n_head, a.n_head_kv = c.n_head_kv, a.n_stream = a.n_stream_kv = c.n_stream;
    a.dk = dk, a.dv = dv, a.q = q.data();
    a.q_nb_head = (size_t) dk * 4, a.q_nb_token = a.q_nb_head * c.n_head, a.q_nb_stream = a.q_nb_token * c.n_q;
    a.k = {k, k_row * c.n_head_kv, k_row, k_row * c.n_head_kv * c.n_kv, tk ? tk->id : -1, float_row};
    a.v = {v, v_row * c.n_head_kv, v_row, v_row * c.n_head_kv * c.n_kv, tv ? tv->id : -1, float_row};
    a.mask = c.mask ? mask.data() : nullptr;
    a.mask_nb_token = (size_t) c.n_kv * 2, a.mask_nb_stream = a.mask_nb_token * c.n_q, a.mask_n_head = 1, a.mask_n_stream = c.n_stream;
    a.sinks = c.sinks ? sinks.data() : nullptr;
    a.dst = out.data(), a.scale = 1.0f / std::sqrt((float) dk), a.max_bias = c.alibi ? 8.0f : 0.0f, a.logit_softcap = c.softcap;
    char name[160];
    std::snprintf(name, sizeof(name), "%s/%s dk=%d dv=%d n_q=%d n_kv=%d heads=%d/%d streams=%d split=%d", tk ? tk->name : "float",
                  tv ? tv->name : "float", dk, dv, c.n_q, c.n_kv, c.n_head, c.n_head_kv, c.n_stream, c.split);
    check(pytq_attn_run(&a, c.split) == 0, "attention runs", tier, name, 0);
    std::vector<float> scalar(out.size(), NAN);
    a.dst = scalar.data();
    pytq_force_caps(0);
    check(pytq_attn_run(&a, c.split) == 0, "attention runs", "scalar", name, 0);
    pytq_force_caps(tier_caps);
    size_t other = 0;
    for (size_t i = 0; i < out.size(); i++) {
        other += out[i] != scalar[i];  // +0 and -0 are equal
    }
    check(other == 0, "same bits as the scalar tier", tier, name, (double) other);

    double err = 0, ref2 = 0;
    std::vector<double> p(c.n_kv), o(dv);
    const int pow2 = 1 << (int) std::floor(std::log2((double) c.n_head));
    for (int s = 0; s < c.n_stream; s++) {
        for (int i = 0; i < c.n_q; i++) {
            for (int h = 0; h < c.n_head; h++) {
                const int hk = h / (c.n_head / c.n_head_kv);
                const float *qr = &q[(((size_t) s * c.n_q + i) * c.n_head + h) * dk];
                const double slope = !c.alibi ? 1.0 : h < pow2 ? std::pow(2.0, -8.0 / pow2 * (h + 1)) : std::pow(2.0, -4.0 / pow2 * (2 * (h - pow2) + 1));
                double top = c.sinks ? sinks[h] : -INFINITY, sum = 0;
                for (int j = 0; j < c.n_kv; j++) {
                    double dot = 0;
                    for (int x = 0; x < dk; x++) {
                        dot += (double) qr[x] * kf[(((size_t) s * c.n_kv + j) * c.n_head_kv + hk) * dk + x];
                    }
                    dot *= a.scale;
                    if (c.softcap != 0) {
                        dot = c.softcap * std::tanh(dot / c.softcap);
                    }
                    p[j] = dot + (c.mask ? slope * half_value(mask[((size_t) s * c.n_q + i) * c.n_kv + j]) : 0.0);
                    top = std::max(top, p[j]);
                }
                std::fill(o.begin(), o.end(), 0.0);
                for (int j = 0; j < c.n_kv; j++) {
                    const double e = std::exp(p[j] - top);
                    sum += e;
                    for (int x = 0; x < dv; x++) {
                        o[x] += e * vf[(((size_t) s * c.n_kv + j) * c.n_head_kv + hk) * dv + x];
                    }
                }
                sum += c.sinks ? std::exp(sinks[h] - top) : 0;
                for (int x = 0; x < dv; x++) {
                    const double want = o[x] / sum, got = out[(((size_t) s * c.n_q + i) * c.n_head + h) * dv + x];
                    err += (want - got) * (want - got);
                    ref2 += want * want;
                }
            }
        }
    }
    // 15-bit queries and weights: relative error 1e-4 or better; float tiles 1e-6
    const double rel = std::sqrt(err / ref2);
    check(rel < 4e-4, "attention", tier, name, rel);
    std::free(k);
    std::free(v);
}

static void test_tier(const char *tier) {
    test_codec(tier);
    test_rotated_codec(tier);
    test_fwht(tier);
    static const int odd[] = {1, 2, 7, 15, 16, 17, 31, 33, 63, 127, 128, 129, 255, 300, 513};
    const shape decode = {1, 200, 8, 2, 1, true, false, false, 0.0f, 1};
    for (int i = 0; const pytq_type_info *t = pytq_type_at(i); i += every) {
        shape c = decode;
        for (int n : odd) {
            if (quick && n != 1 && n != 17 && n != 63 && n != 129) {
                continue;
            }
            c.n_kv = n;
            c.split = 1 + n % 3;
            test_attention(tier, t, t, t->head_dim, t->head_dim, c);
        }
        shape p = {13, 150, 6, 2, 2, true, false, false, 0.0f, 2};
        test_attention(tier, t, t, t->head_dim, t->head_dim, p);
        test_attention(tier, t, nullptr, t->head_dim, t->head_dim, p);
        test_attention(tier, nullptr, t, t->head_dim, t->head_dim, p);
        test_attention(tier, nullptr, t, 192, t->head_dim, p);
        for (int seen : {1, 5, 16, 31, 33, 128, 130, 200}) {
            if (!quick || seen % 16 != 0) {
                test_short_cache(tier, t, t, seen);
            }
        }
        test_short_cache(tier, t, nullptr, 40);
    }
    const pytq_type_info *k = pytq_type_get(pytq_type_from_name("kv3_d128")), *v = pytq_type_get(pytq_type_from_name("turbo4_d128"));
    for (int bits = 0; bits < 16; bits++) {
        shape c = {1 + bits % 3 * 20, 333, bits & 1 ? 12 : 3, 3, 1, (bits & 2) != 0, (bits & 2) && (bits & 4), (bits & 4) != 0, bits & 8 ? 30.0f : 0.0f, 4};
        test_attention(tier, k, v, 128, 128, c);
        test_attention(tier, v, k, 128, 128, c);
    }
    shape big = {70, 700, 4, 2, 1, true, false, false, 0.0f, 2};
    test_attention(tier, k, k, 128, 128, big);
    test_attention(tier, pytq_type_get(pytq_type_from_name("kv4_d192")), pytq_type_get(pytq_type_from_name("kv2_d128")), 192, 128, big);
}

int main(int argc, char **argv) {
    static const struct {
        const char *name;
        unsigned caps;
    } tiers[] = {{"scalar", 0}, {"avx2", PYTQ_CAP_AVX2}, {"avx512", PYTQ_CAP_AVX2 | PYTQ_CAP_AVX512}, {"neon", PYTQ_CAP_NEON}};
    if (argc > 1 && std::strcmp(argv[1], "--quick") == 0) {
        quick = true;
        argc--;
        argv++;
    }
    if (argc > 2 && std::strcmp(argv[1], "--every") == 0) {
        every = std::max(1, std::atoi(argv[2]));
        argc -= 2;
        argv += 2;
    }
    for (const auto &t : tiers) {
        bool named = false;
        for (int i = 1; i < argc; i++) {
            named |= std::strcmp(argv[i], t.name) == 0;
        }
        tier_caps = t.caps;
        pytq_force_caps(t.caps);
        if (std::strcmp(pytq_cpu_tier(), t.name) != 0) {
            if (named) {
                std::printf("tier %s is not available here\n", t.name);
                return 2;
            }
            std::printf("skipped %s\n", t.name);
            continue;
        }
        if (argc > 1 && !named) {
            continue;
        }
        rng_state = 88172645463325252ull;
        const int before = checks;
        test_tier(t.name);
        std::printf("tier %s: %d checks\n", t.name, checks - before);
    }
    std::printf("%d checks, %d failures\n", checks, failures);
    return failures ? 1 : 0;
}

// Op-level harness for the CUDA kernels: checks them against csrc/ref (attention in double precision) and times them.
//
//   op_bench check            encoder, decoder and attention against the reference
//   op_bench encode           the encoder alone (for a profiler)
//   op_bench time [n_kv ...]  decode attention over rotating caches larger than L2, encoder, f16 slices
// Prints one JSON object per line; exit code 1 if a check fails.
#include "../../csrc/cuda/attention-decode.cuh"
#include "../../csrc/cuda/decode-values.cuh"
#include "../../csrc/cuda/encode.cuh"
#include "../../csrc/pytq.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#define CHECK(x)                                                                                                               \
    do {                                                                                                                       \
        cudaError_t e_ = (x);                                                                                                  \
        if (e_ != cudaSuccess) {                                                                                               \
            fprintf(stderr, "error: %s at %s:%d: %s\n", #x, __FILE__, __LINE__, cudaGetErrorString(e_));                       \
            exit(1);                                                                                                           \
        }                                                                                                                      \
    } while (0)

static bool failed = false;

static pytq::layout layout_of(const pytq_type_info * t) {
    pytq::layout l = {};
    l.d = t->head_dim, l.code = t->code, l.scale_bytes = t->scale, l.n_groups = t->n_groups, l.n_planes = t->n_planes, l.block_bytes = t->block_bytes;
    for (int g = 0, at = 0; g < 3; g++) {
        at += t->group_len[g];
        l.group_end[g] = at, l.group_bits[g] = t->group_bits[g];
    }
    for (int p = 0; p < 5; p++) {
        l.plane_off[p] = t->plane_off[p], l.plane_len[p] = t->plane_len[p];
    }
    return l;
}

// wide: 0 for latency, 1 for throughput, -1 as the backend would choose
static void run_encode(const pytq_type_info * t, const float * x, char * dst, long long n_vec, cudaStream_t s, int wide = -1, bool rotate = false) {
    pytq::encode_job job = {};
    pytq::encode_params & p = job.p[0];
    p.src = (const char *) x, p.dst = dst;
    p.src_nb1 = 4LL * t->head_dim, p.dst_nb1 = t->block_bytes;
    p.n1 = (int) n_vec, p.n2 = p.n3 = 1, p.blocks_per_row = 1, p.l = layout_of(t);
    p.hadamard = rotate ? 1 / sqrtf((float) t->head_dim) : 0.0f;
    const pytq::encode_launch run(job, n_vec, 0, wide < 0 ? n_vec > pytq::encode_wide_from : wide);
    run.kernel<<<run.blocks, run.threads, run.shared_bytes, s>>>(job);
    CHECK(cudaGetLastError());
}

struct attention {
    int n_kv, n_head_kv, gqa, n_q;
    float softcap;
    bool permuted;  // [d, n_kv, n_head] in memory instead of [d, n_head, n_kv]
};

template <int KT, int VT> struct runner {
    attention a;
    float * part = nullptr, *out = nullptr;
    float2 * meta = nullptr;
    pytq::decode_params p = {};
    int smem = 0, warps = 0;
    dim3 grid;

    void setup(const attention & a_, int sms) {
        using K = pytq::type<KT>;
        using V = pytq::type<VT>;
        a = a_;
        p.n_kv = a.n_kv, p.n_q = a.n_q, p.n_head_kv = a.n_head_kv, p.gqa = a.gqa, p.n_rows = a.gqa * a.n_q, p.n_seq_mask = 1;
        p.q_nb1 = 4LL * K::d, p.q_nb2 = 4LL * K::d * a.n_q;
        p.k_nb2 = a.permuted ? (long long) K::block_bytes * a.n_kv : K::block_bytes, p.k_nb1 = a.permuted ? K::block_bytes : K::block_bytes * a.n_head_kv;
        p.v_nb2 = a.permuted ? (long long) V::block_bytes * a.n_kv : V::block_bytes, p.v_nb1 = a.permuted ? V::block_bytes : V::block_bytes * a.n_head_kv;
        p.heads_per_block = 1;
        for (int h = 1; h <= 8 && !a.permuted; h++) {
            if (a.n_head_kv % h == 0) {
                p.heads_per_block = h;
            }
        }
        p.warps_per_head = 8 / p.heads_per_block;
        warps = p.warps_per_head * p.heads_per_block;
        p.row_tiles = (p.n_rows + 3) / 4;
        const int groups = a.n_head_kv / p.heads_per_block * p.row_tiles, tokens = 64 * p.warps_per_head;
        const int tiles = (a.n_kv + tokens - 1) / tokens;
        p.n_splits = std::max(1, std::min(tiles, 2 * sms / groups));
        p.n_parts = p.n_splits * p.warps_per_head;
        p.k_slot = pytq::decode_slot_bytes(p.k_nb1, (p.heads_per_block - 1) * (a.permuted ? 0 : K::block_bytes) + K::block_bytes);
        p.v_slot = pytq::decode_slot_bytes(p.v_nb1, (p.heads_per_block - 1) * (a.permuted ? 0 : V::block_bytes) + V::block_bytes);
        p.scale = 1.0f / sqrtf((float) K::d), p.softcap = a.softcap;
        smem = pytq::decode_shared_bytes(p.k_slot, p.v_slot, warps, tokens);
        grid = dim3(p.n_splits, groups, 1);
        const size_t n = (size_t) a.n_head_kv * p.n_rows * p.n_parts;
        CHECK(cudaMalloc(&part, n * K::d * 4));
        CHECK(cudaMalloc(&meta, n * 8));
        CHECK(cudaMalloc(&out, (size_t) a.n_head_kv * p.n_rows * K::d * 4));
        CHECK(cudaMemset(out, 0xff, (size_t) a.n_head_kv * p.n_rows * K::d * 4));
        p.part = part, p.meta = meta;
        CHECK(cudaFuncSetAttribute(pytq::attention_decode<KT, VT, false>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
        CHECK(cudaFuncSetAttribute(pytq::attention_decode<KT, VT, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem));
    }
    void run(const float * q, const char * k, const char * v, const char * mask, cudaStream_t s, bool combine = true) {
        p.q = (const char *) q, p.k = k, p.v = v, p.mask = mask, p.mask_nb1 = 2LL * a.n_kv;
        if (a.softcap > 0) {
            pytq::attention_decode<KT, VT, true><<<grid, warps * 32, smem, s>>>(p);
        } else {
            pytq::attention_decode<KT, VT, false><<<grid, warps * 32, smem, s>>>(p);
        }
        CHECK(cudaGetLastError());
        if (combine) {
            pytq::attention_combine<128><<<dim3(4, p.n_rows, a.n_head_kv), 256, 0, s>>>(part, meta, nullptr, (char *) out, p.n_parts, p.n_rows, a.n_head_kv, a.gqa, a.n_q);
            CHECK(cudaGetLastError());
        }
    }
    void free_all() { cudaFree(part), cudaFree(meta), cudaFree(out); }
};

static std::vector<float> gaussian(size_t n, unsigned seed, float scale = 1.0f) {
    std::mt19937 r(seed);
    std::normal_distribution<float> nd(0.0f, scale);
    std::vector<float> x(n);
    for (auto & v : x) {
        v = nd(r);
    }
    return x;
}

template <class X> static X * upload(const std::vector<X> & x, size_t pad = 0) {
    X * d;
    CHECK(cudaMalloc(&d, x.size() * sizeof(X) + pad));
    CHECK(cudaMemcpy(d, x.data(), x.size() * sizeof(X), cudaMemcpyHostToDevice));
    return d;
}

static void check_encode() {
    for (int i = 0; const pytq_type_info * t = pytq_type_at(i); i++) {
        const int n_vec = 96, d = t->head_dim;
        std::vector<float> x = gaussian((size_t) n_vec * d, 7 + i);
        for (int v = 0; v < n_vec; v++) {
            const float f = v == 3 ? 0.0f : v == 4 ? 1e-20f : v == 5 ? 1e20f : v == 6 ? 3e-4f : powf(2.0f, (float) (v % 23 - 11) * 0.37f);
            for (int c = 0; c < d; c++) {
                x[(size_t) v * d + c] *= f * (v % 5 == 4 && c == 3 ? 30.0f : 1.0f) * (v % 7 == 2 && c > d / 2 ? 0.0f : 1.0f);
            }
        }
        x[(size_t) 9 * d + 1] = NAN;
        std::vector<uint8_t> ref((size_t) n_vec * t->block_bytes), got(ref.size(), 0x5a);
        pytq_quantize_ref(t, x.data(), ref.data(), (int64_t) n_vec * d);
        float * dx = upload(x);
        uint8_t * dy = upload(got);
        int bad = 0, first = -1;
        for (int wide = 0; wide < 2; wide++) {
            CHECK(cudaMemset(dy, 0x5a, got.size()));
            run_encode(t, dx, (char *) dy, n_vec, 0, wide);
            CHECK(cudaMemcpy(got.data(), dy, got.size(), cudaMemcpyDeviceToHost));
            for (int v = 0; v < n_vec; v++) {
                if (memcmp(&ref[(size_t) v * t->block_bytes], &got[(size_t) v * t->block_bytes], t->block_bytes)) {
                    bad++, first = first < 0 ? v : first;
                }
            }
        }
        // rotated in the encoder: the bytes of a vector that another launch rotated
        if ((d & (d - 1)) == 0) {
            std::vector<float> xr(x.size());
            std::vector<uint8_t> want_r(ref.size());
            float * dr = upload(xr);
            pytq::encode_job job = {};
            job.p[0].l = layout_of(t);
            job.rotate = {dx, dr, n_vec, d, 1 / sqrtf((float) d)};
            const pytq::encode_launch run(job, 0, 0, false);
            run.kernel<<<run.blocks, run.threads, run.shared_bytes>>>(job);
            CHECK(cudaMemcpy(xr.data(), dr, xr.size() * 4, cudaMemcpyDeviceToHost));
            for (int v = 10; v < n_vec; v++) {
                for (int c = 0; c < d; c++) {
                    double sum = 0, size = 1e-30;
                    for (int j = 0; j < d; j++) {
                        const double e = x[(size_t) v * d + j] / sqrt((double) d);
                        sum += __builtin_popcount(c & j) & 1 ? -e : e, size += fabs(e);
                    }
                    bad += !(fabs(xr[(size_t) v * d + c] - sum) < 1e-6 * size);
                }
            }
            pytq_quantize_ref(t, xr.data(), want_r.data(), (int64_t) n_vec * d);
            for (int wide = 0; wide < 2; wide++) {
                run_encode(t, dx, (char *) dy, n_vec, 0, wide, true);
                CHECK(cudaMemcpy(got.data(), dy, got.size(), cudaMemcpyDeviceToHost));
                bad += memcmp(got.data(), want_r.data(), got.size()) != 0;
            }
            cudaFree(dr);
        }
        // values
        std::vector<float> want((size_t) n_vec * d), val(want.size());
        pytq_dequantize_ref(t, ref.data(), want.data(), (int64_t) n_vec * d);
        CHECK(cudaMemcpy(dy, ref.data(), ref.size(), cudaMemcpyHostToDevice));
        pytq::values_params p = {};
        p.src = (const char *) dy, p.dst = (char *) dx, p.src_nb1 = t->block_bytes, p.dst_nb1 = 4 * d, p.n1 = n_vec, p.n2 = p.n3 = 1, p.blocks_per_row = 1;
        p.l = layout_of(t);
        if (t->code) {
            pytq::decode_values<1, float><<<16, 256>>>(p);
        } else {
            pytq::decode_values<0, float><<<16, 256>>>(p);
        }
        CHECK(cudaMemcpy(val.data(), dx, val.size() * 4, cudaMemcpyDeviceToHost));
        int bad_values = 0;
        for (size_t c = 0; c < val.size(); c++) {
            bad_values += !(val[c] == want[c]);
        }
        if (bad || bad_values) {
            printf("{\"check\": \"encode\", \"type\": \"%s\", \"bad_vectors\": %d, \"first\": %d, \"bad_values\": %d}\n", t->name, bad, first, bad_values);
            failed = true;
        }
        cudaFree(dx), cudaFree(dy);
    }
    printf("{\"check\": \"encode and values, all types\", \"ok\": %s}\n", failed ? "false" : "true");
}

template <int KT, int VT> static void check_attention(const char * name, attention a, bool with_mask, int sms) {
    using K = pytq::type<KT>;
    using V = pytq::type<VT>;
    const int d = K::d, n_rows = a.gqa * a.n_q;
    const pytq_type_info *tk = pytq_type_get(KT), *tv = pytq_type_get(VT);
    const size_t n_vec = (size_t) a.n_kv * a.n_head_kv;
    std::vector<float> q = gaussian((size_t) n_rows * a.n_head_kv * d, 1, 2.0f), k = gaussian(n_vec * d, 2), v = gaussian(n_vec * d, 3);
    // token 5 is an attention sink: its key points along the first query
    for (int h = 0; h < a.n_head_kv && a.n_kv > 5; h++) {
        const size_t at = (a.permuted ? (size_t) h * a.n_kv + 5 : (size_t) 5 * a.n_head_kv + h) * d;
        for (int c = 0; c < d; c++) {
            k[at + c] = 0.8f * q[(size_t) h * a.gqa * a.n_q * d + c];
        }
    }
    std::vector<uint8_t> kq(n_vec * K::block_bytes), vq(n_vec * V::block_bytes);
    float *dk = upload(k), *dv = upload(v), *dq = upload(q);
    uint8_t *dkq = upload(kq, 128), *dvq = upload(vq, 128);
    run_encode(tk, dk, (char *) dkq, n_vec, 0);
    run_encode(tv, dv, (char *) dvq, n_vec, 0);
    CHECK(cudaMemcpy(kq.data(), dkq, kq.size(), cudaMemcpyDeviceToHost));
    CHECK(cudaMemcpy(vq.data(), dvq, vq.size(), cudaMemcpyDeviceToHost));
    std::vector<uint16_t> mask((size_t) a.n_q * a.n_kv, 0);
    std::mt19937 rng(5);
    for (auto & m : mask) {
        m = with_mask && rng() % 3 == 0 ? 0xfc00 : with_mask && rng() % 3 == 0 ? 0xbc00 /* -1 */ : 0;
    }
    uint16_t * dm = upload(mask);
    runner<KT, VT> r;
    r.setup(a, sms);
    r.run(dq, (char *) dkq, (char *) dvq, with_mask ? (char *) dm : nullptr, 0);
    std::vector<float> out((size_t) n_rows * a.n_head_kv * d);
    CHECK(cudaMemcpy(out.data(), r.out, out.size() * 4, cudaMemcpyDeviceToHost));
    double err = 0, ref2 = 0;
    std::vector<float> x(d);
    for (int h = 0; h < a.n_head_kv; h += a.n_kv > 4096 ? 3 : 1) {
        std::vector<float> kd((size_t) a.n_kv * d), vd(kd.size());
        for (int t = 0; t < a.n_kv; t++) {
            const size_t at = a.permuted ? (size_t) h * a.n_kv + t : (size_t) t * a.n_head_kv + h;
            pytq_dequantize_ref(tk, &kq[at * K::block_bytes], &kd[(size_t) t * d], d);
            pytq_dequantize_ref(tv, &vq[at * V::block_bytes], &vd[(size_t) t * d], d);
        }
        for (int row = 0; row < n_rows; row++) {
            const int head = h * a.gqa + row % a.gqa, iq = row / a.gqa;
            const float * qv = &q[((size_t) head * a.n_q + iq) * d];
            std::vector<double> s(a.n_kv);
            double top = -1e300, sum = 0;
            for (int t = 0; t < a.n_kv; t++) {
                double dot = 0;
                for (int c = 0; c < d; c++) {
                    dot += (double) qv[c] * kd[(size_t) t * d + c];
                }
                dot /= sqrt((double) d);
                if (a.softcap > 0) {
                    dot = a.softcap * tanh(dot / a.softcap);
                }
                const uint16_t m = with_mask ? mask[(size_t) iq * a.n_kv + t] : 0;
                s[t] = m == 0xfc00 ? -INFINITY : dot + (m ? -1.0 : 0.0);
                top = std::max(top, s[t]);
            }
            std::vector<double> o(d, 0.0);
            for (int t = 0; t < a.n_kv; t++) {
                const double w = exp(s[t] - top);
                sum += w;
                for (int c = 0; c < d; c++) {
                    o[c] += w * vd[(size_t) t * d + c];
                }
            }
            for (int c = 0; c < d; c++) {
                const double e = out[((size_t) iq * a.n_head_kv * a.gqa + head) * d + c] - o[c] / sum;
                err += std::isfinite(e) ? e * e : 1e9, ref2 += o[c] / sum * o[c] / sum;
            }
        }
    }
    const double rel = sqrt(err / ref2);
    const bool ok = rel < 2e-3;
    failed |= !ok;
    printf("{\"check\": \"attention\", \"types\": \"%s\", \"n_kv\": %d, \"n_head_kv\": %d, \"gqa\": %d, \"n_q\": %d, \"mask\": %d, \"softcap\": %g, \"permuted\": %d, \"rel_err\": %.3g, \"ok\": %s}\n",
           name, a.n_kv, a.n_head_kv, a.gqa, a.n_q, with_mask, a.softcap, a.permuted, rel, ok ? "true" : "false");
    r.free_all();
    cudaFree(dk), cudaFree(dv), cudaFree(dq), cudaFree(dkq), cudaFree(dvq), cudaFree(dm);
}

template <class F> static double median_us(F f, int n) {
    cudaEvent_t e0, e1;
    CHECK(cudaEventCreate(&e0));
    CHECK(cudaEventCreate(&e1));
    std::vector<double> us;
    for (int i = 0; i < 5; i++) {
        f(i);
    }
    for (int r = 0; r < 7; r++) {
        CHECK(cudaEventRecord(e0));
        for (int i = 0; i < n; i++) {
            f(i);
        }
        CHECK(cudaEventRecord(e1));
        CHECK(cudaEventSynchronize(e1));
        float ms;
        CHECK(cudaEventElapsedTime(&ms, e0, e1));
        us.push_back(1e3 * ms / n);
    }
    std::sort(us.begin(), us.end());
    return us[us.size() / 2];
}

template <int KT, int VT> static void time_attention(const char * name, attention a, int sms, double gbs) {
    using K = pytq::type<KT>;
    using V = pytq::type<VT>;
    const size_t n_vec = (size_t) a.n_kv * a.n_head_kv;
    const int sets = (int) std::min<size_t>(24, std::max<size_t>(4, (size_t) 400e6 / (n_vec * (K::block_bytes + V::block_bytes))));
    float * x = upload(gaussian((size_t) 4096 * K::d, 11));
    float * q = upload(gaussian((size_t) a.gqa * a.n_q * a.n_head_kv * K::d, 1, 2.0f));
    char *k, *v;
    CHECK(cudaMalloc(&k, sets * (n_vec * K::block_bytes + 256)));
    CHECK(cudaMalloc(&v, sets * (n_vec * V::block_bytes + 256)));
    const size_t ks = (n_vec * K::block_bytes + 255) / 256 * 256, vs = (n_vec * V::block_bytes + 255) / 256 * 256;
    char *ek, *ev;
    CHECK(cudaMalloc(&ek, 4096 * K::block_bytes));
    CHECK(cudaMalloc(&ev, 4096 * V::block_bytes));
    run_encode(pytq_type_get(KT), x, ek, 4096, 0);
    run_encode(pytq_type_get(VT), x, ev, 4096, 0);
    for (int s = 0; s < sets; s++) {
        for (size_t i = 0; i < n_vec; i += 4096) {
            const size_t n = std::min<size_t>(4096, n_vec - i);
            CHECK(cudaMemcpyAsync(k + s * ks + i * K::block_bytes, ek, n * K::block_bytes, cudaMemcpyDeviceToDevice));
            CHECK(cudaMemcpyAsync(v + s * vs + i * V::block_bytes, ev, n * V::block_bytes, cudaMemcpyDeviceToDevice));
        }
    }
    std::vector<uint16_t> zero((size_t) a.n_q * a.n_kv, 0);
    uint16_t * mask = upload(zero);
    runner<KT, VT> r;
    r.setup(a, sms);
    // graph of `sets` layers, as in a model
    cudaStream_t st;
    CHECK(cudaStreamCreate(&st));
    auto graph_us = [&](bool combine) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK(cudaStreamBeginCapture(st, cudaStreamCaptureModeGlobal));
        for (int s = 0; s < sets; s++) {
            r.run(q, k + s * ks, v + s * vs, (char *) mask, st, combine);
        }
        CHECK(cudaStreamEndCapture(st, &graph));
        CHECK(cudaGraphInstantiate(&exec, graph, 0));
        std::vector<double> us;
        cudaEvent_t e0, e1;
        CHECK(cudaEventCreate(&e0));
        CHECK(cudaEventCreate(&e1));
        for (int i = 0; i < 12; i++) {
            CHECK(cudaEventRecord(e0, st));
            CHECK(cudaGraphLaunch(exec, st));
            CHECK(cudaEventRecord(e1, st));
            CHECK(cudaEventSynchronize(e1));
            float ms;
            CHECK(cudaEventElapsedTime(&ms, e0, e1));
            us.push_back(1e3 * ms / sets);
        }
        std::sort(us.begin(), us.end());
        return us[us.size() / 2];
    };
    const double all = graph_us(true), main_only = graph_us(false);
    const double bytes = (double) n_vec * (K::block_bytes + V::block_bytes);
    printf("{\"time\": \"decode attention\", \"types\": \"%s\", \"n_kv\": %d, \"n_head_kv\": %d, \"gqa\": %d, \"n_q\": %d, \"us\": %.2f, \"us_without_combine\": %.2f, \"splits\": %d, "
           "\"GBs\": %.0f, \"floor_us\": %.2f, \"of_floor\": %.2f}\n",
           name, a.n_kv, a.n_head_kv, a.gqa, a.n_q, all, main_only, r.p.n_splits, bytes / all * 1e-3, bytes / gbs * 1e-3, all / (bytes / gbs * 1e-3));
    fflush(stdout);
    r.free_all();
    cudaFree(x), cudaFree(q), cudaFree(k), cudaFree(v), cudaFree(ek), cudaFree(ev), cudaFree(mask);
}

static void time_encode(const char * name, int n_vec, int wide = -1, bool rotate = false) {
    const pytq_type_info * t = pytq_type_get(pytq_type_from_name(name));
    float * x = upload(gaussian((size_t) n_vec * t->head_dim, 11));
    char * y;
    CHECK(cudaMalloc(&y, (size_t) n_vec * t->block_bytes));
    cudaStream_t st;
    cudaGraph_t graph;
    cudaGraphExec_t exec;
    CHECK(cudaStreamCreate(&st));
    CHECK(cudaStreamBeginCapture(st, cudaStreamCaptureModeGlobal));
    for (int i = 0; i < 50; i++) {
        run_encode(t, x, y, n_vec, st, wide, rotate);
    }
    CHECK(cudaStreamEndCapture(st, &graph));
    CHECK(cudaGraphInstantiate(&exec, graph, 0));
    const double us = median_us([&](int) { CHECK(cudaGraphLaunch(exec, 0)); }, 1) / 50;
    printf("{\"time\": \"encode\", \"type\": \"%s\", \"vectors\": %d, \"shape\": \"%s\", \"rotate\": %d, \"us\": %.2f}\n", name, n_vec,
           wide < 0 ? "chosen" : wide ? "throughput" : "latency", rotate, us);
    fflush(stdout);
    cudaFree(x), cudaFree(y);
}

template <int ID> static void time_slice(const char * name, int n_tok) {
    using T = pytq::type<ID>;
    char * k;
    __half * o;
    CHECK(cudaMalloc(&k, (size_t) n_tok * 8 * T::block_bytes + 256));
    CHECK(cudaMemset(k, 0x5a, (size_t) n_tok * 8 * T::block_bytes));
    CHECK(cudaMalloc(&o, (size_t) n_tok * 8 * T::d * 2));
    pytq::slice_params p = {k, o, 8 * T::block_bytes, T::block_bytes, n_tok, 8};
    const double us = median_us([&](int) { pytq::decode_slice<ID><<<(n_tok * 8 * T::d / 32 + 255) / 256, 256>>>(p); }, 20);
    CHECK(cudaGetLastError());
    printf("{\"time\": \"f16 slice\", \"type\": \"%s\", \"tokens\": %d, \"us\": %.2f}\n", name, n_tok, us);
    cudaFree(k), cudaFree(o);
}

enum { TURBO3 = 140, TURBO4 = 148, KV2 = 156, KV3 = 164, KV4 = 172 };

int main(int argc, char ** argv) {
    cudaDeviceProp prop;
    CHECK(cudaGetDeviceProperties(&prop, 0));
    const int sms = prop.multiProcessorCount;
    printf("{\"device\": \"%s\", \"sms\": %d, \"l2_mb\": %d}\n", prop.name, sms, prop.l2CacheSize >> 20);
    const std::string mode = argc > 1 ? argv[1] : "check";
    if (mode == "check" || mode == "sanitize") {
        check_encode();
        const bool small = mode == "sanitize";
        for (const attention & a : std::vector<attention>{{small ? 300 : 65536, small ? 2 : 8, 4, 1, 0, false}, {1000, 8, 4, 1, 0, false}, {113, 2, 3, 3, 0, true},
                                                          {77, 3, 1, 1, 30.0f, false}, {1, 1, 8, 2, 0, false}, {600, 32, 1, 5, 0, false}}) {
            if (small && a.n_head_kv > 8) {
                continue;
            }
            for (int m = 0; m < 2; m++) {
                check_attention<KV3, KV3>("kv3/kv3", a, m, sms);
                if (a.n_kv < 2000) {
                    check_attention<KV4, KV4>("kv4/kv4", a, m, sms);
                    check_attention<TURBO3, TURBO3>("turbo3/turbo3", a, m, sms);
                    check_attention<TURBO4, TURBO4>("turbo4/turbo4", a, m, sms);
                    check_attention<KV4, KV2>("kv4/kv2", a, m, sms);
                }
            }
        }
    } else if (mode == "encode") {
        for (int n : {16, 512, 1024, 2048, 8192}) {
            time_encode("kv3_d128", n, 0);
            time_encode("kv3_d128", n, 1);
        }
        for (const char * t : {"turbo3_d128", "turbo4_d128", "kv2_d128", "kv3_d128", "kv4_d128", "kv5_d128", "kv3s_d128", "kv3_d64", "kv3_d256"}) {
            time_encode(t, 16, -1, true);
            time_encode(t, 8192, -1, true);
        }
    } else {
        char *c0, *c1;
        CHECK(cudaMalloc(&c0, 2000u << 20));
        CHECK(cudaMalloc(&c1, 2000u << 20));
        const double copy_us = median_us([&](int) { cudaMemcpyAsync(c0, c1, 2000u << 20, cudaMemcpyDeviceToDevice); }, 3);
        const double gbs = 2.0 * (2000u << 20) / copy_us * 1e-3;
        printf("{\"time\": \"copy\", \"GBs\": %.0f}\n", gbs);
        cudaFree(c0), cudaFree(c1);
        std::vector<int> sizes;
        for (int i = 2; i < argc; i++) {
            sizes.push_back(atoi(argv[i]));
        }
        for (int n : sizes.empty() ? std::vector<int>{65536, 16384, 512} : sizes) {
            const attention a = {n, 8, 4, 1, 0, false};
            time_attention<KV3, KV3>("kv3/kv3", a, sms, gbs);
            time_attention<KV4, KV4>("kv4/kv4", a, sms, gbs);
            time_attention<TURBO3, TURBO3>("turbo3/turbo3", a, sms, gbs);
            time_attention<TURBO4, TURBO4>("turbo4/turbo4", a, sms, gbs);
            time_attention<KV4, KV2>("kv4/kv2", a, sms, gbs);
        }
        for (const char * t : {"turbo3_d128", "kv2_d128", "kv3_d128", "kv4_d128", "kv3s_d128"}) {
            time_encode(t, 16);
            time_encode(t, 8192);
        }
        time_slice<KV3>("kv3_d128", 8192);
        time_slice<KV4>("kv4_d128", 8192);
        time_slice<TURBO3>("turbo3_d128", 8192);
    }
    CHECK(cudaDeviceSynchronize());
    return failed ? 1 : 0;
}

// Op-level harness for attention over compressed caches: checks it against double precision over the blocks as csrc/ref
// decodes them, and times it.
//
//   attention_bench check            every compiled pair: shapes, masks, sinks, soft-cap, ALiBi, rotated output, slices
//   attention_bench sanitize         the same on small sizes only
//   attention_bench time [n_kv ...]  decode attention over rotating caches larger than L2, in CUDA graphs; f16 slices
//
// SHORT=0 in the environment: short caches by attention_decode too. Prints one JSON object per line; exit code 1 if a
// check fails.
#include "../../csrc/cuda/attention-launch.cuh"
#include "../../csrc/cuda/decode-values.cuh"
#include "../../csrc/cuda/encode-launch.cuh"
#include "../../csrc/pytq.h"
#include "bench.cuh"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <utility>
#include <vector>

struct attention {
    int n_kv, n_head_kv, gqa, n_q;
    float softcap;
    bool permuted;  // [d, n_kv, n_head] in memory instead of [d, n_head, n_kv]
    int extras = 0; // 1: sinks and rotated output, 2: ALiBi
    int fresh = -1; // the newest token, which is not in the cache yet; 1 with extras: rotated queries too
};

static bool dependent = true; // programmatic dependent launch

// One row of n_head vectors into a cache of rows of nb1 bytes.
static pytq::encode_params write(int type, const float * src, const long long * row, int n_head, long long nb1,
                                 bool rotate) {
    const pytq_type_info * t = pytq_type_get(type);
    pytq::encode_params p = {};
    p.src = (const char *) src, p.rows = (const char *) row, p.row_bytes = 8, p.rows_nb0 = 8;
    p.src_nb1 = 4LL * t->head_dim * n_head, p.dst_nb1 = nb1;
    p.n1 = p.n2 = p.n3 = p.ne11 = p.ne12 = 1, p.blocks_per_row = n_head, p.l = pytq::layout_of(t);
    p.hadamard = rotate ? 1 / sqrtf((float) t->head_dim) : 0.0f;
    return p;
}

template <int KT, int VT> struct runner {
    attention a;
    float *part = nullptr, *out = nullptr, *sinks = nullptr;
    float2 * meta = nullptr;
    float *fresh_k = nullptr, *fresh_v = nullptr;
    long long * fresh_row = nullptr;
    pytq::decode_params p = {};
    pytq::decode_plan plan;

    static constexpr long long fresh_first = 1000; // row of token 0
    void setup(const attention & a_, int sms) {
        using K = pytq::type<KT>;
        using V = pytq::type<VT>;
        a = a_;
        p.n_kv = a.n_kv, p.n_q = a.n_q, p.n_head_kv = a.n_head_kv, p.gqa = a.gqa, p.n_seq = p.n_seq_mask = 1;
        p.q_nb1 = 4LL * K::d, p.q_nb2 = 4LL * K::d * a.n_q;
        p.k_nb2 = a.permuted ? (long long) K::block_bytes * a.n_kv : K::block_bytes,
        p.k_nb1 = a.permuted ? K::block_bytes : K::block_bytes * a.n_head_kv;
        p.v_nb2 = a.permuted ? (long long) V::block_bytes * a.n_kv : V::block_bytes,
        p.v_nb1 = a.permuted ? V::block_bytes : V::block_bytes * a.n_head_kv;
        p.mask_nb1 = 2LL * a.n_kv;
        p.scale = 1.0f / sqrtf((float) K::d), p.softcap = a.softcap;
        const int n_head = a.n_head_kv * a.gqa;
        p.rotate = a.extras == 1 && (K::d & (K::d - 1)) == 0, p.max_bias = a.extras == 2 ? 8.0f : 0.0f;
        p.n_head_log2 = 1 << (int) floorf(log2f((float) n_head));
        p.slope_log2[0] = -p.max_bias / p.n_head_log2, p.slope_log2[1] = -p.max_bias / 2.0f / p.n_head_log2;
        if (a.extras == 1) {
            std::vector<float> s(n_head);
            for (int h = 0; h < n_head; h++) {
                s[h] = 0.5f * h - 1.0f;
            }
            CHECK(cudaMalloc(&sinks, 4 * n_head));
            CHECK(cudaMemcpy(sinks, s.data(), 4 * n_head, cudaMemcpyHostToDevice));
            p.sinks = sinks;
        }
        if (a.fresh >= 0) {
            fresh_k = upload(gaussian((size_t) a.n_head_kv * K::d, 11, 1.5f));
            fresh_v = upload(gaussian((size_t) a.n_head_kv * K::d, 12));
            fresh_row = upload(std::vector<long long>(1, fresh_first + a.fresh));
            p.fresh = {fresh_k, fresh_v, fresh_row, 8, fresh_first};
            p.rotate_query = p.rotate;
        }
        pytq::decode_device device;
        CHECK(pytq::decode_device_of(0, true, device));
        device.n_sm = sms;
        if (getenv("CLUSTER")) { // of many splits
            device.many_cluster = atoi(getenv("CLUSTER"));
        }
        if (getenv("SHORT")) { // largest cluster of attention_short; 0: not used
            device.short_cluster = atoi(getenv("SHORT"));
        }
        CHECK((pytq::decode_prepare<KT, VT>(p, plan, device)));
        const size_t n = std::max<size_t>(1, pytq::decode_part_rows(p)), n_out = (size_t) n_head * a.n_q * K::d;
        CHECK(cudaMalloc(&part, n * K::d * 4));
        CHECK(cudaMalloc(&meta, n * 8));
        CHECK(cudaMalloc(&out, n_out * 4));
        CHECK(cudaMemset(out, 0xff, n_out * 4));
        p.part = part, p.meta = meta, p.dst = (char *) out;
    }
    void run(const float * q, const char * k, const char * v, const char * mask, cudaStream_t s) {
        p.q = (const char *) q, p.k = k, p.v = v, p.mask = mask;
        p.mask_vectors = ((uintptr_t) p.mask | (uintptr_t) p.mask_nb1) % 16 == 0 && p.n_kv % 8 == 0;
        CHECK((pytq::decode_launch<KT, VT>(p, plan, dependent, s)));
    }
    void free_all() {
        for (void * m : {(void *) part, (void *) meta, (void *) out, (void *) sinks, (void *) fresh_k, (void *) fresh_v,
                         (void *) fresh_row}) {
            cudaFree(m);
        }
    }
};

// How many of the blocks of Q8_1 that r stores instead of `values` are not those values, rounded.
template <int KT, int VT, class... A>
static int wrong_blocks(runner<KT, VT> & r, const std::vector<float> & values, A... at) {
    if (pytq::type<KT>::d % 32) {
        return 0;
    }
    r.p.q8_1 = true;
    r.run(at...);
    std::vector<uint8_t> blocks(values.size() / 32 * q8_1_block::bytes);
    CHECK(cudaMemcpy(blocks.data(), r.out, blocks.size(), cudaMemcpyDeviceToHost));
    int wrong = 0;
    for (size_t b = 0; b < values.size() / 32; b++) {
        const q8_1_block block((const __half *) &blocks[b * q8_1_block::bytes], __half2float);
        const float * const x = &values[32 * b];
        float sum = 0.0f, size = 0.0f;
        bool right = true;
        for (int i = 0; i < 32; i++) {
            // (as one run may differ from the next in the last bits of a value)
            right = right && fabs(block.value(i) - x[i]) <= 0.51 * block.step + block.scale_error(i);
            sum += x[i], size += fabsf(x[i]);
        }
        wrong += !(right && fabsf(block.sum - sum) <= 1e-3f * size + 3e-8f);
    }
    return wrong;
}

template <int KT, int VT> static void check_attention(const char * name, attention a, bool with_mask, int sms) {
    using K = pytq::type<KT>;
    using V = pytq::type<VT>;
    const int d = K::d, n_rows = a.gqa * a.n_q;
    const pytq_type_info *tk = pytq_type_get(KT), *tv = pytq_type_get(VT);
    const size_t n_vec = (size_t) a.n_kv * a.n_head_kv;
    std::vector<float> q = gaussian((size_t) n_rows * a.n_head_kv * d, 1, 2.0f), key(d);
    std::vector<uint8_t> kq = blocks_of(tk, n_vec, 2), vq = blocks_of(tv, n_vec, 3);
    // token 5 is an attention sink: its key points along the first query
    for (int h = 0; h < a.n_head_kv && a.n_kv > 5; h++) {
        for (int c = 0; c < d; c++) {
            key[c] = 0.8f * q[(size_t) h * a.gqa * a.n_q * d + c];
        }
        pytq_quantize_ref(tk, key.data(),
                          &kq[(a.permuted ? (size_t) h * a.n_kv + 5 : (size_t) 5 * a.n_head_kv + h) * K::block_bytes],
                          d);
    }
    float * dq = upload(q);
    uint8_t *dkq = upload(kq, 128), *dvq = upload(vq, 128);
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
    int bad = 0, bad_at = -1;
    const std::vector<float> fk = gaussian((size_t) a.n_head_kv * d, 11, 1.5f),
                             fv = gaussian((size_t) a.n_head_kv * d, 12);
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
            std::vector<double> turned(qv, qv + d); // as the cache's keys are
            if (r.p.rotate_query) {
                turned = walsh(turned);
            }
            std::vector<double> s(a.n_kv);
            double top = -1e300, sum = 0;
            for (int t = 0; t < a.n_kv; t++) {
                double dot = 0;
                for (int c = 0; c < d; c++) {
                    dot += t == a.fresh ? (double) qv[c] * fk[(size_t) h * d + c] : turned[c] * kd[(size_t) t * d + c];
                }
                dot /= sqrt((double) d);
                if (a.softcap > 0) {
                    dot = a.softcap * tanh(dot / a.softcap);
                }
                const uint16_t m = with_mask ? mask[(size_t) iq * a.n_kv + t] : 0;
                const int n2 = 1 << (int) floor(log2((double) a.n_head_kv * a.gqa));
                const double slope = a.extras != 2 ? 1.0
                                     : head < n2   ? pow(2.0, -8.0 / n2 * (head + 1))
                                                   : pow(2.0, -4.0 / n2 * (2 * (head - n2) + 1));
                s[t] = m == 0xfc00 ? -INFINITY : dot + (m ? -slope : 0.0);
                top = std::max(top, s[t]);
            }
            if (a.extras == 1) {
                top = std::max(top, 0.5 * head - 1.0);
                sum += exp(0.5 * head - 1.0 - top);
            }
            std::vector<double> o(d, 0.0);
            for (int t = 0; t < a.n_kv; t++) {
                const double w = exp(s[t] - top);
                sum += w;
                for (int c = 0; c < d && t != a.fresh; c++) {
                    o[c] += w * vd[(size_t) t * d + c];
                }
            }
            if (r.p.rotate) {
                o = walsh(o);
            }
            for (int c = 0; c < d && a.fresh >= 0; c++) {
                o[c] += exp(s[a.fresh] - top) * fv[(size_t) h * d + c];
            }
            for (int c = 0; c < d; c++) {
                const double e = out[((size_t) iq * a.n_head_kv * a.gqa + head) * d + c] - (sum > 0 ? o[c] / sum : 0.0);
                if (!(fabs(e) < 1e-2)) {
                    bad++, bad_at = head * d + c;
                }
                err += std::isfinite(e) ? e * e : 1e9, ref2 += sum > 0 ? o[c] / sum * o[c] / sum : 0.0;
            }
        }
    }
    const double rel = sqrt(err / (ref2 + 1e-30));
    const int wrong =
        wrong_blocks(r, out, dq, (char *) dkq, (char *) dvq, with_mask ? (char *) dm : nullptr, (cudaStream_t) 0);
    const bool ok = rel < 2e-3 && wrong == 0;
    failed |= !ok;
    printf("{\"check\": \"attention\", \"types\": \"%s\", \"n_kv\": %d, \"n_head_kv\": %d, \"gqa\": %d, \"n_q\": %d, "
           "\"mask\": %d, \"softcap\": %g, \"permuted\": %d, \"extras\": %d, \"fresh\": %d, \"splits\": %d, "
           "\"cluster\": %d, \"short\": %d, "
           "\"rel_err\": %.3g, \"bad\": %d, \"bad_at\": %d, \"wrong_q8_1\": %d, \"ok\": %s}\n",
           name, a.n_kv, a.n_head_kv, a.gqa, a.n_q, with_mask, a.softcap, a.permuted, a.extras, a.fresh, r.p.n_splits,
           r.p.cluster, r.plan.is_short, rel, bad, bad_at, wrong, ok ? "true" : "false");
    r.free_all();
    cudaFree(dq), cudaFree(dkq), cudaFree(dvq), cudaFree(dm);
}

template <int KT, int VT> static void time_attention(const char * name, attention a, int sms, double gbs) {
    using K = pytq::type<KT>;
    using V = pytq::type<VT>;
    const size_t n_vec = (size_t) a.n_kv * a.n_head_kv;
    const int sets =
        (int) std::min<size_t>(24, std::max<size_t>(4, (size_t) 400e6 / (n_vec * (K::block_bytes + V::block_bytes))));
    float * q = upload(gaussian((size_t) a.gqa * a.n_q * a.n_head_kv * K::d, 1, 2.0f));
    char *k, *v;
    CHECK(cudaMalloc(&k, sets * (n_vec * K::block_bytes + 256)));
    CHECK(cudaMalloc(&v, sets * (n_vec * V::block_bytes + 256)));
    const size_t ks = (n_vec * K::block_bytes + 255) / 256 * 256, vs = (n_vec * V::block_bytes + 255) / 256 * 256;
    const std::vector<uint8_t> kb = blocks_of(pytq_type_get(KT), n_vec, 2), vb = blocks_of(pytq_type_get(VT), n_vec, 3);
    CHECK(cudaMemcpy(k, kb.data(), kb.size(), cudaMemcpyHostToDevice));
    CHECK(cudaMemcpy(v, vb.data(), vb.size(), cudaMemcpyHostToDevice));
    for (int s = 1; s < sets; s++) {
        CHECK(cudaMemcpy(k + s * ks, k, kb.size(), cudaMemcpyDeviceToDevice));
        CHECK(cudaMemcpy(v + s * vs, v, vb.size(), cudaMemcpyDeviceToDevice));
    }
    std::vector<uint16_t> zero((size_t) a.n_q * a.n_kv, 0);
    uint16_t * mask = upload(zero);
    runner<KT, VT> r;
    r.setup(a, sms);
    // graph of `sets` layers, as in a model
    cudaStream_t st;
    CHECK(cudaStreamCreate(&st));
    auto graph_us = [&] {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK(cudaStreamBeginCapture(st, cudaStreamCaptureModeGlobal));
        for (int s = 0; s < sets; s++) {
            r.run(q, k + s * ks, v + s * vs, (char *) mask, st);
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
    const double all = graph_us();
    const double bytes = (double) n_vec * (K::block_bytes + V::block_bytes);
    printf("{\"time\": \"decode attention\", \"types\": \"%s\", \"n_kv\": %d, \"n_head_kv\": %d, \"gqa\": %d, \"n_q\": "
           "%d, \"us\": %.2f, \"splits\": %d, \"cluster\": %d, "
           "\"GBs\": %.0f, \"floor_us\": %.2f, \"of_floor\": %.2f}\n",
           name, a.n_kv, a.n_head_kv, a.gqa, a.n_q, all, r.p.n_splits, r.p.cluster, bytes / all * 1e-3,
           bytes / gbs * 1e-3, all / (bytes / gbs * 1e-3));
    fflush(stdout);
    r.free_all();
    cudaFree(q), cudaFree(k), cudaFree(v), cudaFree(mask);
}

// 128 KiB of instructions that every multiprocessor runs through once. Lets the next kernel be launched at its start.
__global__ void fill_instruction_caches(float * x) {
    pytq::grid_trigger();
    pytq::grid_wait();
    float v[4] = {x[0], x[1], x[2], x[3]};
#pragma unroll
    for (int i = 0; i < 2048; i++) {
#pragma unroll
        for (int n = 0; n < 4; n++) {
            v[n] = fmaf(v[n], 1.0f + 1e-6f * (float) (4 * i + n), 0.5f);
        }
    }
    if (v[0] + v[1] + v[2] + v[3] == 12345.0f) { // never; keeps the sums
        x[0] = 0.0f;
    }
}

// One layer as the backend runs it. fresh: the newest token is encoded on another stream beside attention; otherwise by
// a launch in front of it, which also rotates the queries.
template <int KT, int VT> static void time_layer(const char * name, int n_kv, int sms, bool fresh) {
    using K = pytq::type<KT>;
    using V = pytq::type<VT>;
    const int n_head_kv = 8, gqa = 4, d = K::d;
    if (!pytq::encode_same_kernel(pytq::layout_of(pytq_type_get(KT)), pytq::layout_of(pytq_type_get(VT)))) {
        return; // two launches
    }
    const size_t n_vec = (size_t) n_kv * n_head_kv;
    const int sets =
        (int) std::min<size_t>(24, std::max<size_t>(4, (size_t) 400e6 / (n_vec * (K::block_bytes + V::block_bytes))));
    float *q = upload(gaussian((size_t) gqa * n_head_kv * d, 1, 2.0f)),
          *turned = upload(gaussian((size_t) gqa * n_head_kv * d, 1));
    const size_t ks = (n_vec * K::block_bytes + 255) / 256 * 256, vs = (n_vec * V::block_bytes + 255) / 256 * 256;
    char *k, *v;
    CHECK(cudaMalloc(&k, sets * ks + 256));
    CHECK(cudaMalloc(&v, sets * vs + 256));
    const std::vector<uint8_t> kb = blocks_of(pytq_type_get(KT), n_vec, 2), vb = blocks_of(pytq_type_get(VT), n_vec, 3);
    for (int s = 0; s < sets; s++) {
        CHECK(cudaMemcpy(k + s * ks, kb.data(), kb.size(), cudaMemcpyHostToDevice));
        CHECK(cudaMemcpy(v + s * vs, vb.data(), vb.size(), cudaMemcpyHostToDevice));
    }
    uint16_t * mask = upload(std::vector<uint16_t>(n_kv, 0));
    runner<KT, VT> r;
    r.setup({n_kv, n_head_kv, gqa, 1, 0, false, 1, fresh ? n_kv - 1 : -1}, sms);
    float *fk = upload(gaussian((size_t) n_head_kv * d, 11)), *fv = upload(gaussian((size_t) n_head_kv * d, 12));
    long long * row = upload(std::vector<long long>(1, runner<KT, VT>::fresh_first + n_kv - 1));
    cudaStream_t st;
    CHECK(cudaStreamCreate(&st));
    cudaStream_t other;
    cudaEvent_t begin, done;
    CHECK(cudaStreamCreate(&other));
    CHECK(cudaEventCreateWithFlags(&begin, cudaEventDisableTiming));
    CHECK(cudaEventCreateWithFlags(&done, cudaEventDisableTiming));
    const auto encode = [&](char * kd, char * vd) {
        pytq::encode_job job = {};
        for (int i = 0; i < 2; i++) {
            const long long nb1 = (long long) pytq_type_get(i ? VT : KT)->block_bytes * n_head_kv;
            job.p[i] = write(i ? VT : KT, i ? fv : fk, row, n_head_kv, nb1, true);
            job.p[i].dst = (i ? vd : kd) - runner<KT, VT>::fresh_first * nb1;
        }
        if (!fresh) {
            job.rotate = {q, turned, gqa * n_head_kv, d, 1 / sqrtf((float) d)};
        }
        const pytq::encode_launch run(job, n_head_kv, n_head_kv, false);
        if (fresh) {
            CHECK(cudaEventRecord(begin, st));
            CHECK(cudaStreamWaitEvent(other, begin, 0));
            run.kernel<<<run.blocks, run.threads, run.shared_bytes, other>>>(job);
            CHECK(cudaEventRecord(done, other));
            return;
        }
        CHECK((pytq::decode_launch_one(run.kernel, dim3(run.blocks), run.threads, run.shared_bytes, 1, dependent, st,
                                       job)));
    };
    cudaEvent_t e0, e1;
    CHECK(cudaEventCreate(&e0));
    CHECK(cudaEventCreate(&e1));
    // between: whether another kernel runs before every layer, as in a model, and takes its place in the instruction
    // caches
    const auto median = [&](bool layers, bool between) {
        cudaGraph_t graph;
        cudaGraphExec_t exec;
        CHECK(cudaStreamBeginCapture(st, cudaStreamCaptureModeGlobal));
        for (int s = 0; s < sets; s++) {
            if (between) {
                CHECK((pytq::decode_launch_one(fill_instruction_caches, dim3((unsigned) sms), 128, 0, 1, dependent, st,
                                               turned)));
                if (layers && fresh && s > 0) {
                    CHECK(cudaStreamWaitEvent(st, done, 0));
                }
            }
            if (layers) {
                encode(k + s * ks, v + s * vs);
                r.run(fresh ? q : turned, k + s * ks, v + s * vs, (char *) mask, st);
            }
            if (layers && fresh && (!between || s == sets - 1)) {
                CHECK(cudaStreamWaitEvent(st, done, 0));
            }
        }
        CHECK(cudaStreamEndCapture(st, &graph));
        CHECK(cudaGraphInstantiate(&exec, graph, 0));
        std::vector<double> all;
        for (int i = 0; i < 25; i++) {
            float ms;
            CHECK(cudaEventRecord(e0, st));
            CHECK(cudaGraphLaunch(exec, st));
            CHECK(cudaEventRecord(e1, st));
            CHECK(cudaEventSynchronize(e1));
            CHECK(cudaEventElapsedTime(&ms, e0, e1));
            all.push_back(1e3 * ms / sets);
        }
        CHECK(cudaGraphExecDestroy(exec));
        CHECK(cudaGraphDestroy(graph));
        std::sort(all.begin(), all.end());
        return all[all.size() / 2];
    };
    const double warm = median(true, false), cold = median(true, true) - median(false, true);
    printf("{\"time\": \"layer\", \"types\": \"%s\", \"n_kv\": %d, \"fresh\": %d, \"us\": %.2f, \"us_cold\": %.2f, "
           "\"splits\": %d, \"short\": %d}\n",
           name, n_kv, fresh, warm, cold, r.p.n_splits, r.plan.is_short);
    fflush(stdout);
    r.free_all();
    for (void * m :
         {(void *) q, (void *) turned, (void *) k, (void *) v, (void *) mask, (void *) fk, (void *) fv, (void *) row}) {
        cudaFree(m);
    }
}

// f16 slices against the reference.
template <int ID> static void check_slice(const char * name, int n_tok, int n_head) {
    using T = pytq::type<ID>;
    const pytq_type_info * t = pytq_type_get(ID);
    const size_t n_vec = (size_t) n_tok * n_head;
    const std::vector<uint8_t> blocks = blocks_of(t, n_vec, 5);
    uint8_t * y = upload(blocks, 64);
    std::vector<float> want(n_vec * T::d);
    pytq_dequantize_ref(t, blocks.data(), want.data(), (int64_t) want.size());
    __half * o;
    CHECK(cudaMalloc(&o, want.size() * 2));
    CHECK(cudaMemset(o, 0xff, want.size() * 2));
    const pytq::slice_params p = {(const char *) y, o, n_head * T::block_bytes, T::block_bytes, n_tok, n_head};
    pytq::decode_slice<ID><<<pytq::slice_grid<ID>(p), 256>>>(p);
    CHECK(cudaGetLastError());
    std::vector<__half> got(want.size());
    CHECK(cudaMemcpy(got.data(), o, got.size() * 2, cudaMemcpyDeviceToHost));
    double worst = 0;
    for (int tok = 0; tok < n_tok; tok++) {
        for (int h = 0; h < n_head; h++) {
            for (int c = 0; c < T::d; c++) {
                const double w = want[((size_t) tok * n_head + h) * T::d + c],
                             g = __half2float(got[((size_t) h * n_tok + tok) * T::d + c]);
                const double e = fabs(g - w) / (fabs(w) + 1e-3);
                worst = std::isfinite(e) ? std::max(worst, e) : 1e9;
            }
        }
    }
    failed |= !(worst < 1.5e-3);
    printf("{\"check\": \"f16 slice\", \"type\": \"%s\", \"tokens\": %d, \"worst\": %.3g, \"ok\": %s}\n", name, n_tok,
           worst, worst < 1.5e-3 ? "true" : "false");
    cudaFree(y), cudaFree(o);
}

template <int ID> static void time_slice(const char * name, int n_tok) {
    using T = pytq::type<ID>;
    char * k;
    __half * o;
    CHECK(cudaMalloc(&k, (size_t) n_tok * 8 * T::block_bytes + 256));
    CHECK(cudaMemset(k, 0x5a, (size_t) n_tok * 8 * T::block_bytes));
    CHECK(cudaMalloc(&o, (size_t) n_tok * 8 * T::d * 2));
    pytq::slice_params p = {k, o, 8 * T::block_bytes, T::block_bytes, n_tok, 8};
    const double us = median_us([&](int) { pytq::decode_slice<ID><<<pytq::slice_grid<ID>(p), 256>>>(p); }, 20);
    CHECK(cudaGetLastError());
    printf("{\"time\": \"f16 slice\", \"type\": \"%s\", \"tokens\": %d, \"us\": %.2f, \"TBs_written\": %.2f}\n", name,
           n_tok, us, 16e-6 * n_tok * T::d / us);
    cudaFree(k), cudaFree(o);
}

constexpr int id_of(int family, int slot) {
    return PYTQ_TYPE_BASE + PYTQ_FAMILY_STRIDE * family + slot;
}
#define ID(name, slot) id_of(PYTQ_FAMILY_INDEX_##name, slot)
// Pairs (name, type of K, type of V): the first list is timed, both are checked.
#define TIMED(X)                                                                                                       \
    X("kv3/kv3", ID(kv3, 4), ID(kv3, 4))                                                                               \
    X("kv4/kv4", ID(kv4, 4), ID(kv4, 4))                                                                               \
    X("turbo3/turbo3", ID(turbo3, 4), ID(turbo3, 4))                                                                   \
    X("turbo4/turbo4", ID(turbo4, 4), ID(turbo4, 4)) X("kv3s/kv3", ID(kv3s, 4), ID(kv3, 4))
#ifdef MORE
#define CHECKED(X)                                                                                                     \
    X("kv4/kv2", ID(kv4, 4), ID(kv2, 4))                                                                               \
    X("kv5/kv5", ID(kv5, 4), ID(kv5, 4))                                                                               \
    X("turbo2/turbo2", ID(turbo2, 4), ID(turbo2, 4))                                                                   \
    X("kv2s/kv2", ID(kv2s, 4), ID(kv2, 4))                                                                             \
    X("kv4s/kv4", ID(kv4s, 4), ID(kv4, 4))                                                                             \
    X("kv3s/kv3 d64", ID(kv3s, 1), ID(kv3, 1))                                                                         \
    X("kv4s/kv4 d64", ID(kv4s, 1), ID(kv4, 1))                                                                         \
    X("kv3/kv3 d64", ID(kv3, 1), ID(kv3, 1))                                                                           \
    X("kv3/kv3 d80", ID(kv3, 2), ID(kv3, 2))                                                                           \
    X("kv4/kv4 d96", ID(kv4, 3), ID(kv4, 3))                                                                           \
    X("kv3/kv3 d192", ID(kv3, 5), ID(kv3, 5)) X("kv4/kv4 d256", ID(kv4, 6), ID(kv4, 6))
#else
#define CHECKED(X)
#endif

int main(int argc, char ** argv) {
    cudaDeviceProp prop;
    CHECK(cudaGetDeviceProperties(&prop, 0));
    const int sms = prop.multiProcessorCount;
    printf("{\"device\": \"%s\", \"sms\": %d, \"l2_mb\": %d}\n", prop.name, sms, prop.l2CacheSize >> 20);
    dependent = getenv("GGML_CUDA_PDL") == nullptr || atoi(getenv("GGML_CUDA_PDL"));
    const std::string mode = argc > 1 ? argv[1] : "check";
    if (mode == "check" || mode == "sanitize") {
        const bool small = mode == "sanitize";
        check_slice<ID(kv3, 4)>("kv3_d128", 1003, 3);
        check_slice<ID(kv4, 4)>("kv4_d128", 300, 8);
        check_slice<ID(turbo3, 3)>("turbo3_d96", 77, 2);
        check_slice<ID(kv2, 1)>("kv2_d64", 129, 5);
        check_slice<ID(kv4, 6)>("kv4_d256", 65, 2);
        for (const attention & a : std::vector<attention>{{1000, 8, 4, 1, 0, false, 1},
                                                          {113, 2, 3, 3, 0, true, 2},
                                                          {77, 3, 1, 1, 30.0f, false},
                                                          {1, 1, 8, 2, 0, false, 1},
                                                          {2000, 1, 4, 1, 0, false},
                                                          {500, 8, 4, 1, 0, false, 1, 255},
                                                          {3000, 2, 5, 1, 20.0f, false, 2, 2999},
                                                          {700, 8, 1, 1, 0, true, 0, 0},
                                                          {600, 32, 1, 5, 0, false}}) {
            if (small && (a.n_head_kv > 8 || a.n_kv > 1000)) {
                continue;
            }
            for (int m = 0; m < 2; m++) {
#define X(name, kt, vt) check_attention<kt, vt>(name, a, m, sms);
                TIMED(X) CHECKED(X)
#undef X
            }
        }
        if (!small) {
            for (int m = 0; m < 2; m++) { // several tiles per team
                check_attention<ID(kv3, 4), ID(kv3, 4)>("kv3/kv3", {65536, 8, 4, 1, 0, false}, m, sms);
                check_attention<ID(kv3, 4), ID(kv3, 4)>("kv3/kv3", {65700, 8, 4, 1, 0, false, 1, 65600}, m, sms);
                check_attention<ID(turbo4, 4), ID(turbo4, 4)>("turbo4/turbo4", {65536 - 17, 8, 4, 1, 0, false}, m, sms);
                check_attention<ID(kv4, 4), ID(kv4, 4)>("kv4/kv4", {20001, 2, 4, 1, 0, true, 1}, m, 3);
            }
        }
    } else {
        char *c0, *c1;
        CHECK(cudaMalloc(&c0, 2000u << 20));
        CHECK(cudaMalloc(&c1, 2000u << 20));
        const double copy_us =
            median_us([&](int) { cudaMemcpyAsync(c0, c1, 2000u << 20, cudaMemcpyDeviceToDevice); }, 3);
        const double gbs = 2.0 * (2000u << 20) / copy_us * 1e-3;
        printf("{\"time\": \"copy\", \"GBs\": %.0f}\n", gbs);
        cudaFree(c0), cudaFree(c1);
        std::vector<int> sizes;
        for (int i = 2; i < argc; i++) {
            sizes.push_back(atoi(argv[i]));
        }
        for (int n : sizes.empty() ? std::vector<int>{65536, 16384, 512} : sizes) {
            const attention a = {n, 8, 4, 1, 0, false};
#define X(name, kt, vt) time_attention<kt, vt>(name, a, sms, gbs);
            TIMED(X)
#undef X
#define X(name, kt, vt) time_layer<kt, vt>(name, n, sms, false), time_layer<kt, vt>(name, n, sms, true);
            TIMED(X)
#undef X
        }
        time_slice<ID(kv3, 4)>("kv3_d128", 8192);
        time_slice<ID(kv4, 4)>("kv4_d128", 8192);
        time_slice<ID(turbo3, 4)>("turbo3_d128", 8192);
    }
    CHECK(cudaDeviceSynchronize());
    return failed ? 1 : 0;
}

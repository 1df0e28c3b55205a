// Op-level harness for the encoder and decoder of the CUDA backend: checks them against csrc/ref and times them.
//
//   op_bench check    every type against the reference
//   op_bench time     the encoder, few and many vectors
// Prints one JSON object per line; exit code 1 if a check fails. Attention has its own: attention_bench.cu.
#include "../../csrc/cuda/decode-values.cuh"
#include "../../csrc/cuda/encode-launch.cuh"
#include "../../csrc/pytq.h"
#include "bench.cuh"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

// wide: 0 for latency, 1 for throughput, -1 as the backend would choose
static void run_encode(const pytq_type_info * t, const float * x, char * dst, long long n_vec, cudaStream_t s,
                       int wide = -1, bool rotate = false) {
    pytq::encode_job job = {};
    pytq::encode_params & p = job.p[0];
    p.src = (const char *) x, p.dst = dst;
    p.src_nb1 = 4LL * t->head_dim, p.dst_nb1 = t->block_bytes;
    p.n1 = (int) n_vec, p.n2 = p.n3 = 1, p.blocks_per_row = 1, p.l = pytq::layout_of(t);
    p.hadamard = rotate ? 1 / sqrtf((float) t->head_dim) : 0.0f;
    const pytq::encode_launch run(job, n_vec, 0, wide < 0 ? n_vec > pytq::encode_wide_from : wide);
    run.kernel<<<run.blocks, run.threads, run.shared_bytes, s>>>(job);
    CHECK(cudaGetLastError());
}

static void check_encode() {
    for (int i = 0; const pytq_type_info * t = pytq_type_at(i); i++) {
        const int n_vec = 96, d = t->head_dim;
        std::vector<float> x = gaussian((size_t) n_vec * d, 7 + i);
        for (int v = 0; v < n_vec; v++) {
            const float f = v == 3   ? 0.0f
                            : v == 4 ? 1e-20f
                            : v == 5 ? 1e20f
                            : v == 6 ? 3e-4f
                                     : powf(2.0f, (float) (v % 23 - 11) * 0.37f);
            for (int c = 0; c < d; c++) {
                x[(size_t) v * d + c] *=
                    f * (v % 5 == 4 && c == 3 ? 30.0f : 1.0f) * (v % 7 == 2 && c > d / 2 ? 0.0f : 1.0f);
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
            job.p[0].l = pytq::layout_of(t);
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
        p.src = (const char *) dy, p.dst = (char *) dx, p.src_nb1 = t->block_bytes, p.dst_nb1 = 4 * d, p.n1 = n_vec,
        p.n2 = p.n3 = 1, p.blocks_per_row = 1;
        p.l = pytq::layout_of(t);
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
            printf(
                "{\"check\": \"encode\", \"type\": \"%s\", \"bad_vectors\": %d, \"first\": %d, \"bad_values\": %d}\n",
                t->name, bad, first, bad_values);
            failed = true;
        }
        cudaFree(dx), cudaFree(dy);
    }
    printf("{\"check\": \"encode and values, all types\", \"ok\": %s}\n", failed ? "false" : "true");
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
    printf(
        "{\"time\": \"encode\", \"type\": \"%s\", \"vectors\": %d, \"shape\": \"%s\", \"rotate\": %d, \"us\": %.2f}\n",
        name, n_vec,
        wide < 0 ? "chosen"
        : wide   ? "throughput"
                 : "latency",
        rotate, us);
    fflush(stdout);
    cudaFree(x), cudaFree(y);
}

int main(int argc, char ** argv) {
    cudaDeviceProp prop;
    CHECK(cudaGetDeviceProperties(&prop, 0));
    printf("{\"device\": \"%s\", \"sms\": %d, \"l2_mb\": %d}\n", prop.name, prop.multiProcessorCount,
           prop.l2CacheSize >> 20);
    const std::string mode = argc > 1 ? argv[1] : "check";
    if (mode == "check") {
        check_encode();
    } else {
        for (int n : {16, 512, 1024, 2048, 8192}) {
            time_encode("kv3_d128", n, 0);
            time_encode("kv3_d128", n, 1);
        }
        for (const char * t : {"turbo3_d128", "turbo4_d128", "kv2_d128", "kv3_d128", "kv4_d128", "kv5_d128",
                               "kv3s_d128", "kv3_d64", "kv3_d256"}) {
            time_encode(t, 16, -1, true);
            time_encode(t, 8192, -1, true);
        }
    }
    CHECK(cudaDeviceSynchronize());
    return failed ? 1 : 0;
}

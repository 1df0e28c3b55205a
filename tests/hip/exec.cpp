// Executes the device code that HIP builds on the CPU (shim.h) and compares it with the C reference.
//
// usage: exec encode|rotate|values|attention < CASES
// Prints one line per case: what, the number of wrong bytes or vectors, for attention the
// normalised mean square error and the largest relative error of an output vector.
// The tolerances are in test_exec.py.
#include <random> // the shim's macros are not for the library's headers
#include <string>

#include "cuda/attention-portable.cuh"
#include "cuda/decode-values.cuh"
#include "cuda/encode-launch.cuh"

namespace pytq {
alignas(16) thread_local char encode_smem[65536];
alignas(16) thread_local char portable_smem[65536];
} // namespace pytq

namespace {

using pytq::layout_of;

std::mt19937 rng(7);

std::vector<float> gaussian(size_t n, float sigma = 1.0f) {
    std::normal_distribution<float> normal(0.0f, sigma);
    std::vector<float> x(n);
    for (float & v : x) {
        v = normal(rng);
    }
    return x;
}

// Head vectors that encoders get wrong first: plain, huge, tiny, denormal, one spike, zero, not finite, steep.
std::vector<float> awkward(int d, int n) {
    std::vector<float> x = gaussian((size_t) d * n);
    for (int v = 0; v < n; v++) {
        float * const r = x.data() + (size_t) v * d;
        for (int i = 0; i < d; i++) {
            switch (v % 9) {
                case 1:
                    r[i] *= 1e20f;
                    break;
                case 2:
                    r[i] *= 1e-22f;
                    break;
                case 3:
                    r[i] *= 1e-39f;
                    break;
                case 4:
                    r[i] = i == d / 3 ? 50.0f : r[i] * 1e-3f;
                    break;
                case 5:
                    r[i] = 0.0f;
                    break;
                case 6:
                    r[i] = i == d - 1 ? INFINITY : r[i];
                    break;
                case 7:
                    r[i] *= 64.0f / (float) (i + 1);
                    break;
                default:
                    break;
            }
        }
    }
    return x;
}

// ------------------------------------------------------------------------------------------------ encode, decode

void run_encode() {
    for (int n_type = 0; const pytq_type_info * t = pytq_type_at(n_type); n_type++) {
        for (const bool wide : {false, true}) {
            const int n = wide ? 11 : 9, per_row = 1; // the last group of four is not full
            const std::vector<float> x = awkward(t->head_dim, n);
            std::vector<uint8_t> want((size_t) n * t->block_bytes), got(want.size() + 16, 0xee);
            pytq_quantize_ref(t, x.data(), want.data(), (int64_t) n * t->head_dim);
            // rows written backwards through 64-bit indices
            std::vector<int64_t> rows(n);
            for (int i = 0; i < n; i++) {
                rows[i] = n - 1 - i;
            }
            pytq::encode_job job = {};
            pytq::encode_params & p = job.p[0];
            p.src = (const char *) x.data(), p.rows = (const char *) rows.data(), p.dst = (char *) got.data();
            p.src_nb1 = 4 * t->head_dim, p.src_nb2 = p.src_nb1 * n, p.src_nb3 = p.src_nb2;
            p.rows_nb0 = 8, p.rows_nb1 = 8 * n, p.rows_nb2 = 8 * n;
            p.dst_nb1 = t->block_bytes, p.dst_nb2 = p.dst_nb1 * n, p.dst_nb3 = p.dst_nb2;
            p.row_bytes = 8, p.n1 = n, p.n2 = p.n3 = 1, p.ne11 = p.ne12 = 1, p.blocks_per_row = per_row;
            p.l = layout_of(t);
            job.p[1] = p;
            const pytq::encode_launch how(job, n, 0, wide);
            if (!how.kernel) {
                printf("encode %s%s missing\n", t->name, wide ? " wide" : "");
                continue;
            }
            shim::launch(how.kernel, dim3(how.blocks), dim3(how.threads), pytq::encode_smem, sizeof pytq::encode_smem,
                         how.shared_bytes, job);
            long wrong = 0;
            for (int i = 0; i < n; i++) {
                for (int b = 0; b < t->block_bytes; b++) {
                    wrong += want[(size_t) i * t->block_bytes + b] != got[(size_t) rows[i] * t->block_bytes + b];
                }
            }
            for (size_t i = want.size(); i < got.size(); i++) {
                wrong += got[i] != 0xee;
            }
            printf("encode %s%s %ld\n", t->name, wide ? " wide" : "", wrong);
        }
    }
}

// The rotation that is fused into the cache write: queries against float64, and rotated keys against the reference's
// bytes of the same rotated vectors.
void run_rotate() {
    for (int n_type = 0; const pytq_type_info * t = pytq_type_at(n_type); n_type++) {
        const int d = t->head_dim, n = 5;
        if (d & (d - 1)) {
            continue; // Walsh matrices have a power of two rows
        }
        const float factor = 1.0f / sqrtf((float) d);
        const std::vector<float> x = gaussian((size_t) n * d);
        std::vector<float> rotated(x.size(), NAN);
        std::vector<uint8_t> want((size_t) n * t->block_bytes), got(want.size());
        pytq::encode_job job = {};
        pytq::encode_params & p = job.p[0];
        p.src = (const char *) x.data(), p.dst = (char *) got.data();
        p.src_nb1 = 4 * d, p.src_nb2 = p.src_nb3 = p.src_nb1 * n, p.dst_nb1 = t->block_bytes,
        p.dst_nb2 = p.dst_nb3 = p.dst_nb1 * n;
        p.n1 = n, p.n2 = p.n3 = p.ne11 = p.ne12 = p.blocks_per_row = 1;
        p.hadamard = factor, p.l = layout_of(t);
        job.p[1] = p;
        job.rotate = {x.data(), rotated.data(), n, d, factor};
        const pytq::encode_launch how(job, n, 0, false);
        shim::launch(how.kernel, dim3(how.blocks), dim3(how.threads), pytq::encode_smem, sizeof pytq::encode_smem,
                     how.shared_bytes, job);
        double err = 0.0, norm = 0.0;
        for (int v = 0; v < n; v++) {
            for (int i = 0; i < d; i++) {
                double sum = 0.0;
                for (int j = 0; j < d; j++) {
                    sum += __builtin_parity(i & j) ? -x[(size_t) v * d + j] : x[(size_t) v * d + j];
                }
                const double e = rotated[(size_t) v * d + i] - sum / sqrt((double) d);
                err += e * e, norm += sum * sum / d;
            }
        }
        pytq_quantize_ref(t, rotated.data(), want.data(), (int64_t) n * d);
        long wrong = 0;
        for (size_t i = 0; i < want.size(); i++) {
            wrong += want[i] != got[i];
        }
        printf("rotate %s %.3g %ld\n", t->name, err / norm, wrong);
    }
}

void run_values() {
    static thread_local char none[16];
    for (int n_type = 0; const pytq_type_info * t = pytq_type_at(n_type); n_type++) {
        const int n = 7, d = t->head_dim; // rows in the order 6, 3, 0, 4, 1, 5, 2
        const std::vector<float> x = awkward(d, n);
        std::vector<uint8_t> blocks((size_t) n * t->block_bytes + 16);
        std::vector<float> want((size_t) n * d), got(want.size(), 1e30f);
        pytq_quantize_ref(t, x.data(), blocks.data(), (int64_t) n * d);
        pytq_dequantize_ref(t, blocks.data(), want.data(), (int64_t) n * d);
        std::vector<int> rows(n);
        for (int i = 0; i < n; i++) {
            rows[i] = (6 + 4 * i) % n;
        }
        pytq::values_params p = {};
        p.src = (const char *) blocks.data(), p.rows = (const char *) rows.data(), p.dst = (char *) got.data();
        p.src_nb1 = t->block_bytes, p.src_nb2 = p.src_nb3 = p.src_nb1 * n;
        p.rows_nb0 = 4, p.rows_nb1 = p.rows_nb2 = 4 * n, p.dst_nb1 = 4 * d, p.dst_nb2 = p.dst_nb3 = p.dst_nb1 * n;
        p.n1 = n, p.n2 = p.n3 = p.blocks_per_row = 1;
        p.l = layout_of(t);
        const auto f32 = t->code == PYTQ_CODE_TRELLIS ? pytq::decode_values<PYTQ_CODE_TRELLIS, float>
                                                      : pytq::decode_values<PYTQ_CODE_SCALAR, float>;
        const auto f16 = t->code == PYTQ_CODE_TRELLIS ? pytq::decode_values<PYTQ_CODE_TRELLIS, __half>
                                                      : pytq::decode_values<PYTQ_CODE_SCALAR, __half>;
        shim::launch(f32, dim3(2), dim3(256), none, sizeof none, 0, p);
        long wrong = 0;
        for (int i = 0; i < n; i++) {
            wrong += memcmp(&got[(size_t) i * d], &want[(size_t) rows[i] * d], 4 * d) != 0;
        }
        printf("values %s %ld\n", t->name, wrong);

        std::vector<unsigned short> half(want.size());
        p.rows = nullptr, p.dst = (char *) half.data(), p.dst_nb1 = 2 * d, p.dst_nb2 = p.dst_nb3 = p.dst_nb1 * n;
        shim::launch(f16, dim3(2), dim3(256), none, sizeof none, 0, p);
        wrong = 0;
        for (size_t i = 0; i < want.size(); i++) {
            wrong += half[i] != shim_float_to_half(want[i]);
        }
        printf("values16 %s %ld\n", t->name, wrong);
    }
}

// ------------------------------------------------------------------------------------------------ attention

// A cache tensor [n_kv, n_head_kv, n_seq] of any type: bytes, strides, and what it decodes to.
struct cache {
    std::vector<uint8_t> bytes;
    std::vector<float> values; // [seq][token][head][d]
    pytq::portable_operand operand = {};

    cache(const std::string & name, int d, int n_kv, int heads, int n_seq, float sigma, int odd_bytes) {
        const size_t n = (size_t) n_seq * n_kv * heads;
        values = gaussian(n * d, sigma);
        size_t block;
        const pytq_type_info * t = nullptr;
        if (name == "f16" || name == "q8_0") {
            operand.kind = name == "f16" ? pytq::OPERAND_F16 : pytq::OPERAND_Q8_0;
            block = name == "f16" ? 2 * d : d / 32 * 34;
        } else {
            t = pytq_type_get(pytq_type_from_name((name + "_d" + std::to_string(d)).c_str()));
            if (!t) {
                fprintf(stderr, "no type %s for head size %d\n", name.c_str(), d);
                exit(2);
            }
            block = t->block_bytes;
            operand.kind = pytq::OPERAND_BLOCKS, operand.l = pytq::portable_layout_of(layout_of(t));
            operand.slot = pytq::portable_slot(t->block_bytes);
        }
        const size_t row = block * heads + odd_bytes;
        bytes.resize(row * n_kv * n_seq + 16);
        for (size_t r = 0; r < (size_t) n_kv * n_seq; r++) {
            for (int h = 0; h < heads; h++) {
                float * const v = values.data() + (r * heads + h) * d;
                uint8_t * const at = bytes.data() + r * row + h * block;
                if (t) {
                    pytq_quantize_ref(t, v, at, d);
                    pytq_dequantize_ref(t, at, v, d);
                } else if (operand.kind == pytq::OPERAND_F16) {
                    for (int i = 0; i < d; i++) {
                        const unsigned short x = shim_float_to_half(v[i]);
                        memcpy(at + 2 * i, &x, 2);
                        v[i] = shim_half_to_float(x);
                    }
                } else {
                    for (int b = 0; b < d / 32; b++) {
                        float top = 0.0f;
                        for (int i = 0; i < 32; i++) {
                            top = std::max(top, fabsf(v[32 * b + i]));
                        }
                        const unsigned short s = shim_float_to_half(top / 127.0f);
                        memcpy(at + 34 * b, &s, 2);
                        for (int i = 0; i < 32; i++) {
                            const int q = (int) lrintf(v[32 * b + i] / shim_half_to_float(s));
                            at[34 * b + 2 + i] = (uint8_t) (int8_t) std::clamp(q, -127, 127);
                            v[32 * b + i] = shim_half_to_float(s) * (float) (int8_t) at[34 * b + 2 + i];
                        }
                    }
                }
            }
        }
        operand.data = (const char *) bytes.data();
        operand.nb1 = (long long) row, operand.nb2 = (long long) block, operand.nb3 = (long long) row * n_kv;
    }
};

struct attention_case {
    std::string k, v;
    int d, n_kv, heads_kv, gqa, n_q, n_seq, mask, sinks, splits, rows, odd_bytes;
    float bias, softcap;
};

template <int D, int R, bool PLAIN> void launch_attention(pytq::portable_params & p, int n_seq) {
    static thread_local char none[16];
    const int total = n_seq * p.n_head_kv * p.n_rows;
    shim::launch(pytq::portable_query<D>, dim3((total + 3) / 4), dim3(128), none, sizeof none, 0, p, n_seq);
    p.row_tiles = (p.n_rows + R - 1) / R;
    shim::launch(pytq::portable_attention<D, R, PLAIN>, dim3(p.n_splits, p.n_head_kv * p.row_tiles, n_seq), dim3(128),
                 pytq::portable_smem, sizeof pytq::portable_smem, pytq::portable_shared_bytes(p, R), p);
    if (p.n_splits > 1) {
        shim::launch(pytq::portable_combine<D>, dim3(p.n_rows, p.n_head_kv, n_seq), dim3(256), none, sizeof none, 0, p);
    }
}

template <int D> void launch_rows(pytq::portable_params & p, int n_seq, int rows) {
    if (p.k.kind != pytq::OPERAND_BLOCKS || p.v.kind != pytq::OPERAND_BLOCKS) {
        launch_attention<D, 4, true>(p, n_seq);
        return;
    }
    switch (rows) {
        case 1:
            launch_attention<D, 1, false>(p, n_seq);
            break;
        case 4:
            launch_attention<D, 4, false>(p, n_seq);
            break;
        default:
            launch_attention<D, 8, false>(p, n_seq);
            break;
    }
}

// Normalised mean square error against float64 over the decoded values, and the largest relative error of a row.
void run_attention(const attention_case & c) {
    const int d = c.d, heads = c.heads_kv * c.gqa;
    cache k(c.k, d, c.n_kv, c.heads_kv, c.n_seq, 1.0f, c.odd_bytes),
        v(c.v, d, c.n_kv, c.heads_kv, c.n_seq, 0.7f, c.odd_bytes);
    const std::vector<float> q = gaussian((size_t) c.n_seq * heads * c.n_q * d);
    const std::vector<float> sinks = gaussian(heads);
    // mask: 1 causal with holes, 2 additionally hides whole tiles and, from one query, everything
    std::vector<unsigned short> mask((size_t) c.n_seq * c.n_q * c.n_kv);
    std::vector<float> maskf(mask.size());
    for (size_t i = 0; i < mask.size(); i++) {
        const int t = (int) (i % c.n_kv), iq = (int) (i / c.n_kv % c.n_q);
        const bool hidden =
            (t > c.n_kv - c.n_q + iq) || t % 11 == 3 || (c.mask == 2 && (t / 128 == 1 || (c.n_q > 1 && iq == 1)));
        maskf[i] = hidden ? -INFINITY : c.bias > 0.0f ? -(float) (c.n_kv - t) / 64.0f : 0.0f;
        mask[i] = hidden ? 0xfc00u : shim_float_to_half(maskf[i]);
        maskf[i] = hidden ? -INFINITY : shim_half_to_float(mask[i]);
    }
    std::vector<float> out((size_t) c.n_seq * c.n_q * heads * d, NAN);

    pytq::portable_params p = {};
    p.q = (const char *) q.data();
    p.q_nb1 = 4LL * d, p.q_nb2 = 4LL * d * c.n_q, p.q_nb3 = 4LL * d * c.n_q * heads; // [d, n_q, n_head, n_seq]
    p.k = k.operand, p.v = v.operand;
    p.n_kv = c.n_kv, p.n_q = c.n_q, p.n_head_kv = c.heads_kv, p.gqa = c.gqa, p.n_rows = c.gqa * c.n_q;
    p.n_splits = c.splits;
    p.scale = 1.0f / sqrtf((float) d), p.softcap = c.softcap, p.max_bias = c.bias;
    if (c.softcap != 0.0f) {
        p.scale *= 4.0f; // logits that the cap bends
    }
    p.n_head_log2 = 1 << (int) floorf(log2f((float) heads));
    p.m0 = powf(2.0f, -c.bias / (float) p.n_head_log2), p.m1 = powf(2.0f, -c.bias / 2.0f / (float) p.n_head_log2);
    p.mask = c.mask ? (const char *) mask.data() : nullptr;
    p.mask_nb1 = 2LL * c.n_kv, p.mask_nb2 = 0, p.mask_nb3 = 2LL * c.n_kv * c.n_q, p.mask_ne2 = 1, p.mask_ne3 = c.n_seq;
    p.sinks = c.sinks ? sinks.data() : nullptr;
    p.dst = out.data();
    const size_t rows = (size_t) c.n_seq * c.heads_kv * p.n_rows;
    std::vector<uint32_t> words(rows * pytq::portable_chunks(d) * 16);
    std::vector<float> factors(rows), part(rows * c.splits * d);
    std::vector<float2> meta(rows * c.splits);
    p.words = words.data(), p.factors = factors.data(), p.part = part.data(), p.meta = meta.data();
    switch (d) {
        case 64:
            launch_rows<64>(p, c.n_seq, c.rows);
            break;
        case 80:
            launch_rows<80>(p, c.n_seq, c.rows);
            break;
        case 96:
            launch_rows<96>(p, c.n_seq, c.rows);
            break;
        case 128:
            launch_rows<128>(p, c.n_seq, c.rows);
            break;
        case 192:
            launch_rows<192>(p, c.n_seq, c.rows);
            break;
        case 256:
            launch_rows<256>(p, c.n_seq, c.rows);
            break;
    }

    double err = 0.0, norm = 0.0, worst = 0.0;
    std::vector<double> logit(c.n_kv), want(d);
    for (int seq = 0; seq < c.n_seq; seq++) {
        for (int iq = 0; iq < c.n_q; iq++) {
            for (int h = 0; h < heads; h++) {
                const float * const qr = q.data() + (((size_t) seq * heads + h) * c.n_q + iq) * d;
                const double slope =
                    c.bias > 0.0f ? h < p.n_head_log2 ? pow(p.m0, h + 1) : pow(p.m1, 2 * (h - p.n_head_log2) + 1) : 1.0;
                double top = c.sinks ? sinks[h] : -INFINITY;
                for (int t = 0; t < c.n_kv; t++) {
                    const float * const kr =
                        k.values.data() + (((size_t) seq * c.n_kv + t) * c.heads_kv + h / c.gqa) * d;
                    double s = 0.0;
                    for (int i = 0; i < d; i++) {
                        s += (double) qr[i] * kr[i];
                    }
                    s *= p.scale;
                    if (c.softcap != 0.0f) {
                        s = c.softcap * tanh(s / c.softcap);
                    }
                    if (c.mask) {
                        s += slope * maskf[((size_t) seq * c.n_q + iq) * c.n_kv + t];
                    }
                    logit[t] = s;
                    top = std::max(top, s);
                }
                double sum = c.sinks ? exp(sinks[h] - top) : 0.0;
                std::fill(want.begin(), want.end(), 0.0);
                for (int t = 0; t < c.n_kv && top > -INFINITY; t++) {
                    const double w = exp(logit[t] - top);
                    const float * const vr =
                        v.values.data() + (((size_t) seq * c.n_kv + t) * c.heads_kv + h / c.gqa) * d;
                    sum += w;
                    for (int i = 0; i < d; i++) {
                        want[i] += w * vr[i];
                    }
                }
                double row_err = 0.0, row_norm = 0.0;
                for (int i = 0; i < d; i++) {
                    const double x = sum > 0.0 ? want[i] / sum : 0.0;
                    const double e = out[(((size_t) seq * c.n_q + iq) * heads + h) * d + i] - x;
                    row_err += e * e, row_norm += x * x;
                }
                err += row_err, norm += row_norm;
                if (!(row_err <= 1e-30 + row_norm * 1e30)) {
                    worst = INFINITY; // not a number
                }
                worst = std::max(worst, sqrt(row_err / (row_norm + 1e-30)));
            }
        }
    }
    printf("attention %s/%s d%d kv%d gqa%d q%d seq%d mask%d sinks%d bias%g cap%g splits%d rows%d odd%d %.3g %.3g\n",
           c.k.c_str(), c.v.c_str(), d, c.n_kv, c.gqa, c.n_q, c.n_seq, c.mask, c.sinks, c.bias, c.softcap, c.splits,
           c.rows, c.odd_bytes, err / (norm + 1e-30), worst);
}

} // namespace

// attention reads cases from standard input, one per line.
int main(int argc, char ** argv) {
    const std::string what = argc > 1 ? argv[1] : "";
    if (what == "encode") {
        run_encode();
    } else if (what == "rotate") {
        run_rotate();
    } else if (what == "values") {
        run_values();
    } else if (what == "attention") {
        char k[32], v[32];
        attention_case c;
        while (scanf("%31s %31s %d %d %d %d %d %d %d %d %f %f %d %d %d", k, v, &c.d, &c.n_kv, &c.heads_kv, &c.gqa,
                     &c.n_q, &c.n_seq, &c.mask, &c.sinks, &c.bias, &c.softcap, &c.splits, &c.rows,
                     &c.odd_bytes) == 15) {
            c.k = k, c.v = v;
            run_attention(c);
        }
    } else {
        fprintf(stderr, "usage: exec encode|rotate|values|attention\n");
        return 2;
    }
    return 0;
}

// Executes CUDA's decode kernel on the CPU (shim.h, instructions.h) through its launcher and compares it with double
// precision over the blocks as csrc/ref decodes them.
//
// usage: exec [fault=NAME] < CASES
// Compiled with SHIM_PAIRS(X) = X(K, V, slot) ..., the pairs of types that it knows. A case is a line of name=value
// (struct attention, below, has the names and what they are if not given). Prints one line per case: the case, the
// shape of the launch, and "error" and "row_error", relative to the whole output and to one output row.
#include <cmath> // the shim's macros are not for the library's headers
#include <map>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "../../tools/gpu/host_math.h"

#include "shim.h"

#include "cuda/attention-launch.cuh"

namespace pytq {
alignas(16) thread_local char decode_smem[232448];
} // namespace pytq

namespace {

struct attention {
    std::string k = "kv3", v = "kv3";
    std::string copies = "late"; // when they arrive: late, early, any
    int d = 128, n_kv = 200, heads = 1, gqa = 4, n_q = 1, n_seq = 1;
    int mask = 0;     // 1: random -inf and -1; 2: and whole tiles, and the second query sees nothing
    int permuted = 0; // [d, n_kv, n_head] in memory instead of [d, n_head, n_kv]
    int odd = 0;      // bytes that the cache and the mask (times 2) begin behind a multiple of 16
    int sinks = 0, alibi = 0, softcap = 0;
    int rotate = 0;                                   // the result; with fresh >= 0 the query too
    int q8_1 = 0;                                     // the result in blocks of Q8_1
    int fresh = -1;                                   // the newest token, which is not in the cache yet
    int n_sm = 4, shared = 232448, few = 0, many = 0; // device; largest clusters, 0: its own
    int short_ = 0;                                   // largest cluster of attention_short, 0: not used
    int together = 0;                                 // all blocks of a launch at once
    int seed = 0;                                     // order of threads; 0: lockstep

    std::map<std::string, int *> numbers() {
        return {{"d", &d},           {"n_kv", &n_kv},   {"heads", &heads}, {"gqa", &gqa},
                {"n_q", &n_q},       {"n_seq", &n_seq}, {"mask", &mask},   {"permuted", &permuted},
                {"odd", &odd},       {"sinks", &sinks}, {"alibi", &alibi}, {"softcap", &softcap},
                {"rotate", &rotate}, {"fresh", &fresh}, {"n_sm", &n_sm},   {"shared", &shared},
                {"few", &few},       {"many", &many},   {"seed", &seed},   {"together", &together},
                {"short", &short_},  {"q8_1", &q8_1}};
    }
};

[[noreturn]] void usage(const std::string & what) {
    fprintf(stderr, "exec: %s\n", what.c_str());
    exit(2);
}

attention parse(const std::string & line) {
    attention a;
    auto numbers = a.numbers();
    std::istringstream words(line);
    for (std::string word; words >> word;) {
        const size_t eq = word.find('=');
        const std::string name = word.substr(0, eq), value = eq == std::string::npos ? "" : word.substr(eq + 1);
        if (name == "k" || name == "v" || name == "copies") {
            (name == "k" ? a.k : name == "v" ? a.v : a.copies) = value;
        } else if (numbers.count(name) && !value.empty()) {
            *numbers[name] = atoi(value.c_str());
        } else {
            usage("no such setting: " + word);
        }
    }
    if (a.copies != "late" && a.copies != "early" && a.copies != "any") {
        usage("copies are late, early or any");
    }
    if (a.fresh >= a.n_kv || (a.fresh >= 0 && a.n_q * a.n_seq > 1)) {
        usage("the newest token is one of n_kv, with one query of one sequence");
    }
    if (a.q8_1 && a.d % 32) {
        usage("blocks of Q8_1 hold 32 values");
    }
    return a;
}

// Bytes at an address that is `odd` behind a multiple of 16; copies may read the whole pieces of 16 bytes they lie in.
struct buffer {
    std::vector<char> memory;
    char * data;
    size_t n;
    buffer(size_t n_, int odd) : memory(n_ + odd + 64), n(n_) {
        data = memory.data() + (16 - (uintptr_t) memory.data() % 16) + odd;
        memset(memory.data(), 0x77, memory.size());
        const char * const end = data + n;
        shim::readable.push_back({data - (uintptr_t) data % 16, end + (16 - (uintptr_t) end % 16) % 16});
    }
};

// Memory that the kernel writes: what lies around it must stay.
template <class X> struct output {
    static constexpr int PAD = 64;
    std::vector<char> memory;
    X * data;
    size_t bytes;
    explicit output(size_t n)
        : memory(n * sizeof(X) + 2 * PAD, (char) 0xff), data((X *) (memory.data() + PAD)), bytes(n * sizeof(X)) {}
    void check() const {
        for (int i = 0; i < PAD; i++) {
            if (memory[i] != (char) 0xff || memory[PAD + bytes + i] != (char) 0xff) {
                shim::fail("a kernel wrote outside its results");
            }
        }
    }
};

// Random vectors of one type: blocks, and the values that they hold.
struct vectors {
    static constexpr size_t N = 509;
    std::vector<uint8_t> blocks;
    std::vector<float> values;

    static const vectors & of(const pytq_type_info * t, unsigned seed) {
        static std::map<std::pair<int, unsigned>, vectors> all;
        vectors & x = all[{t->id, seed}];
        if (x.blocks.empty()) {
            const size_t d = (size_t) t->head_dim;
            x.values = gaussian(N * d, seed), x.blocks.resize(N * t->block_bytes);
            for (size_t i = 0; i < x.values.size(); i++) {
                // of different length, some of them 0
                x.values[i] *= i / d % 31 == 7 ? 0.0f : 0.4f + 0.2f * (float) (i / d % 7);
            }
            pytq_quantize_ref(t, x.values.data(), x.blocks.data(), (int64_t) (N * d));
            pytq_dequantize_ref(t, x.blocks.data(), x.values.data(), (int64_t) (N * d));
        }
        return x;
    }
};

// A cache tensor: blocks in memory, and the values that they hold, [seq][token][head][d].
struct cache {
    const pytq_type_info * type;
    int d, n_kv, heads;
    std::vector<float> values;
    long long nb1, nb2, nb3;
    buffer blocks;

    cache(const pytq_type_info * t, const attention & a, unsigned seed)
        : type(t), d(a.d), n_kv(a.n_kv), heads(a.heads), values((size_t) a.n_seq * a.n_kv * a.heads * a.d),
          nb1(a.permuted ? t->block_bytes : (long long) t->block_bytes * a.heads),
          nb2(a.permuted ? (long long) t->block_bytes * a.n_kv : t->block_bytes),
          nb3((long long) t->block_bytes * a.heads * a.n_kv), blocks((size_t) (nb3 * a.n_seq), a.odd) {
        const vectors & pool = vectors::of(t, seed);
        size_t i = 0;
        for (int seq = 0; seq < a.n_seq; seq++) {
            for (int token = 0; token < n_kv; token++) {
                for (int h = 0; h < heads; h++, i++) {
                    const size_t from = (i * 2654435761u >> 7) % vectors::N;
                    memcpy(block(seq, token, h), &pool.blocks[from * t->block_bytes], t->block_bytes);
                    memcpy(vector(seq, token, h), &pool.values[from * d], 4 * d);
                }
            }
        }
    }
    uint8_t * block(int seq, int token, int head) {
        return (uint8_t *) blocks.data + seq * nb3 + token * nb1 + head * nb2;
    }
    float * vector(int seq, int token, int head) { return &values[(((size_t) seq * n_kv + token) * heads + head) * d]; }
    void set(int seq, int token, int head, const std::vector<float> & x) {
        pytq_quantize_ref(type, x.data(), block(seq, token, head), d);
        pytq_dequantize_ref(type, block(seq, token, head), vector(seq, token, head), d);
    }
};

void check_cuda(cudaError_t e) {
    if (e != cudaSuccess) {
        shim::fail("a launch that a device would refuse");
    }
}

// How far values from `first` on are from those wanted, beyond what rounding to blocks of Q8_1 does; infinite if a sum
// or a scale is wrong.
std::vector<double> q8_1_errors(const char * out, size_t first, const std::vector<double> & want) {
    std::vector<double> errors;
    for (size_t c = 0; c < want.size(); c += 32) {
        const q8_1_block block((const __half *) (out + (first + c) / 32 * q8_1_block::bytes), __half2float);
        double exact = 0.0, size = 0.0;
        for (int i = 0; i < 32; i++) {
            const double off = fabs(block.value(i) - want[c + i]);
            errors.push_back(std::max(0.0, off - 0.5 * block.step - block.scale_error(i)));
            exact += want[c + i], size += fabs(want[c + i]);
        }
        if (!(fabs(block.sum - exact) <= 1e-3 * size && block.step <= size / 127.0 * 1.001)) {
            errors.back() = INFINITY;
        }
    }
    return errors;
}

template <int KT, int VT> void run(const attention & a, const std::string & line) {
    constexpr int d = pytq::type<KT>::d;
    constexpr bool both = d == 128; // as csrc/ggml/pytq-cuda-decode.cuh
    const int n_head = a.heads * a.gqa, n_rows = a.gqa * a.n_q;
    shim::readable.clear();
    const std::vector<float> q = gaussian((size_t) a.n_seq * n_head * a.n_q * d, 1, 2.0f); // [d, n_q, n_head, n_seq]
    const auto query = [&](int seq, int head, int iq) { return &q[(((size_t) seq * n_head + head) * a.n_q + iq) * d]; };
    cache k(pytq_type_get(KT), a, 2), v(pytq_type_get(VT), a, 3);
    // token 5 is an attention sink for the first query of every other head: nearly all weight is its own
    for (int h = 1; h < a.heads && a.n_kv > 5; h += 2) {
        std::vector<float> key(query(0, h * a.gqa, 0), query(0, h * a.gqa, 0) + d), value(d);
        for (int c = 0; c < d; c++) {
            key[c] *= 0.8f, value[c] = sinf((float) (3 * c + h));
        }
        k.set(0, 5, h, key), v.set(0, 5, h, value);
    }

    std::mt19937 rng(5);
    buffer mask((size_t) a.n_seq * a.n_q * a.n_kv * 2, 2 * a.odd);
    std::vector<double> bias((size_t) a.n_seq * a.n_q * a.n_kv);
    for (size_t i = 0; i < bias.size(); i++) {
        const int t = (int) (i % a.n_kv), iq = (int) (i / a.n_kv) % a.n_q;
        const bool hidden = a.mask && (rng() % 3 == 0 || (a.mask == 2 && (t / 64 % 3 == 1 || (a.n_q > 1 && iq == 1))));
        const uint16_t m = hidden ? 0xfc00 : a.mask && rng() % 3 == 0 ? 0xbc00 : 0;
        bias[i] = hidden ? -INFINITY : m ? -1.0 : 0.0;
        memcpy(mask.data + 2 * i, &m, 2);
    }
    std::vector<float> sinks(n_head);
    for (int h = 0; h < n_head; h++) {
        sinks[h] = 0.5f * (float) h - 1.0f;
    }
    const std::vector<float> fresh_k = gaussian((size_t) a.heads * d, 11, 1.5f),
                             fresh_v = gaussian((size_t) a.heads * d, 12);
    constexpr long long first_row = 1000;
    const long long row = first_row + a.fresh;
    const int row32 = (int) row, row_bytes = a.n_kv % 2 ? 4 : 8;

    pytq::decode_params p = {};
    p.q = (const char *) q.data(), p.k = k.blocks.data, p.v = v.blocks.data, p.mask = a.mask ? mask.data : nullptr;
    p.sinks = a.sinks ? sinks.data() : nullptr;
    p.q_nb1 = 4LL * d, p.q_nb2 = p.q_nb1 * a.n_q, p.q_nb3 = p.q_nb2 * n_head;
    p.k_nb1 = k.nb1, p.k_nb2 = k.nb2, p.k_nb3 = k.nb3, p.v_nb1 = v.nb1, p.v_nb2 = v.nb2, p.v_nb3 = v.nb3;
    p.mask_nb1 = 2LL * a.n_kv, p.mask_nb3 = p.mask_nb1 * a.n_q;
    p.n_kv = a.n_kv, p.n_q = a.n_q, p.n_head_kv = a.heads, p.gqa = a.gqa, p.n_seq = p.n_seq_mask = a.n_seq;
    p.rotate = a.rotate, p.scale = 1.0f / sqrtf((float) d), p.softcap = (float) a.softcap;
    p.max_bias = a.alibi ? 8.0f : 0.0f;
    p.n_head_log2 = 1 << (int) floorf(log2f((float) n_head));
    p.slope_log2[0] = -p.max_bias / (float) p.n_head_log2, p.slope_log2[1] = p.slope_log2[0] / 2.0f;
    if (a.fresh >= 0) {
        p.fresh = {fresh_k.data(), fresh_v.data(), row_bytes == 8 ? (const void *) &row : (const void *) &row32,
                   row_bytes, first_row};
        p.rotate_query = p.rotate;
    }
    const size_t n_values = (size_t) a.n_seq * n_head * a.n_q * d;
    output<char> out(a.q8_1 ? n_values / 32 * q8_1_block::bytes : n_values * sizeof(float));
    p.dst = out.data, p.q8_1 = a.q8_1;

    shim::device & device = shim::device_;
    device.n_sm = a.n_sm, device.shared_bytes = a.shared, device.together = a.together;
    device.dynamic = pytq::decode_smem, device.capacity = sizeof(pytq::decode_smem);
    shim::gpu().seed = (uint32_t) a.seed;
    shim::gpu().when = a.copies == "late"    ? shim::copying::late
                       : a.copies == "early" ? shim::copying::early
                                             : shim::copying::any;
    pytq::decode_device of;
    pytq::decode_plan plan;
#ifdef PYTQ_BULK
    constexpr bool clusters = true;
#else
    constexpr bool clusters = false;
#endif
    check_cuda(pytq::decode_device_of(0, clusters, of));
    of.short_cluster = a.short_;
    if (a.few > 0) {
        of.few_cluster = a.few;
    }
    if (a.many > 0) {
        of.many_cluster = a.many;
    }
    check_cuda((pytq::decode_prepare<KT, VT, both>(p, plan, of)));
    const size_t parts = pytq::decode_part_rows(p);
    output<float> part(parts * d);
    output<float2> meta(parts);
    p.part = part.data, p.meta = meta.data;
    check_cuda((pytq::decode_launch<KT, VT, both>(p, plan, true, nullptr)));
    out.check(), part.check(), meta.check();

    double err = 0.0, norm = 0.0, worst = 0.0;
    for (int seq = 0; seq < a.n_seq; seq++) {
        for (int i = 0; i < n_head * a.n_q; i++) {
            const int head = i % n_head, iq = i / n_head, h = head / a.gqa;
            const float * const qr = query(seq, head, iq);
            std::vector<double> turned(qr, qr + d); // as the cache's keys are
            if (p.rotate_query) {
                turned = walsh(turned);
            }
            const int n2 = p.n_head_log2;
            const double slope = !a.alibi    ? 1.0
                                 : head < n2 ? pow(2.0, -8.0 / n2 * (head + 1))
                                             : pow(2.0, -4.0 / n2 * (2 * (head - n2) + 1));
            std::vector<double> s(a.n_kv), want(d, 0.0);
            double top = a.sinks ? (double) sinks[head] : -1e300, sum = 0.0;
            for (int t = 0; t < a.n_kv; t++) {
                const float * const kr = t == a.fresh ? &fresh_k[(size_t) h * d] : k.vector(seq, t, h);
                double dot = 0.0;
                for (int c = 0; c < d; c++) {
                    dot += (t == a.fresh ? (double) qr[c] : turned[c]) * kr[c];
                }
                dot /= sqrt((double) d);
                dot = a.softcap ? a.softcap * tanh(dot / a.softcap) : dot;
                s[t] = dot + slope * bias[((size_t) seq * a.n_q + iq) * a.n_kv + t];
                top = std::max(top, s[t]);
            }
            sum += a.sinks ? exp(sinks[head] - top) : 0.0;
            for (int t = 0; t < a.n_kv; t++) {
                const float * const vr = v.vector(seq, t, h);
                const double w = exp(s[t] - top);
                sum += w;
                for (int c = 0; c < d && t != a.fresh; c++) {
                    want[c] += w * vr[c];
                }
            }
            want = a.rotate ? walsh(want) : want;
            const double w_fresh = a.fresh >= 0 ? exp(s[a.fresh] - top) : 0.0;
            double row_err = 0.0, row_norm = 0.0;
            for (int c = 0; c < d; c++) {
                want[c] += w_fresh * fresh_v[(size_t) h * d + c];
                want[c] = sum > 0.0 ? want[c] / sum : 0.0;
            }
            const size_t first = (((size_t) seq * a.n_q + iq) * n_head + head) * d;
            std::vector<double> errors = a.q8_1 ? q8_1_errors(out.data, first, want) : want;
            for (int c = 0; c < d; c++) {
                if (!a.q8_1) {
                    errors[c] -= ((const float *) out.data)[first + c];
                }
                row_err += errors[c] * errors[c], row_norm += want[c] * want[c];
            }
            err += row_err, norm += row_norm;
            worst = std::max(worst, std::isfinite(row_err) ? sqrt(row_err / (row_norm + 1e-30)) : INFINITY);
        }
    }
    const double error = sqrt(err / (norm + 1e-30));
    printf("%s rows=%d splits=%d cluster=%d parts=%d teams=%d warps=%d tiles=%d aligned=%d ranges=%d%d vectors=%d "
           "is_short=%d "
           "error=%.3g row_error=%.3g\n",
           line.c_str(), n_rows, p.n_splits, p.cluster, p.n_parts, p.teams, p.warps_per_head * p.heads_per_block,
           p.tiles_each, plan.aligned, p.k_slot == p.k_nb1, p.v_slot == p.v_nb1, p.mask_vectors && a.mask,
           plan.is_short, std::isfinite(error) ? error : INFINITY, worst);
    fflush(stdout);
}

#define ID(name, slot) (PYTQ_TYPE_BASE + PYTQ_FAMILY_STRIDE * PYTQ_FAMILY_INDEX_##name + (slot))

void dispatch(const attention & a, const std::string & line) {
#define X(kn, vn, slot)                                                                                                \
    if (a.k == #kn && a.v == #vn && a.d == pytq::type<ID(kn, slot)>::d) {                                              \
        return run<ID(kn, slot), ID(vn, slot)>(a, line);                                                               \
    }
    SHIM_PAIRS(X)
#undef X
    usage("this program knows no " + a.k + "/" + a.v + " of head size " + std::to_string(a.d));
}

} // namespace

int main(int argc, char ** argv) {
    if (argc > 2 || (argc == 2 && std::string(argv[1]).substr(0, 6) != "fault=")) {
        usage("usage: exec [fault=NAME] < CASES");
    }
    shim::fault = argc == 2 ? argv[1] + 6 : "";
    char line[1024];
    while (fgets(line, sizeof(line), stdin)) {
        line[strcspn(line, "\n")] = 0;
        if (*line) {
            dispatch(parse(line), line);
        }
    }
    return 0;
}

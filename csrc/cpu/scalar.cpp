// The scalar tier: the definition of the arithmetic in plain C++, with the reference decoder and no instruction set
// asked for. Every other tier returns its bits (tests/kernels). Not a fast path: fused multiply-adds are calls on most
// machines.
//
//   block -- pytq_unpack_ref --> int8 levels [token][coordinate], factors per group
//   S = q_scale * sum over groups of factor * (int16 q . int8 levels);   O = O * corr + f * (int16 weights . int8
//   levels)
#include <math.h>

typedef float vf_lanes __attribute__((vector_size(64)));
#define PYTQ_FMA(a, b, c) fma16(a, b, c)
static inline vf_lanes fma16(vf_lanes a, vf_lanes b, vf_lanes c) {
    for (int i = 0; i < 16; i++) {
        c[i] = fmaf(a[i], b[i], c[i]);
    }
    return c;
}

#include "tile.inl"

namespace {

// out[token][head_dim] and factors [group][token]; tokens past n up to a multiple of 16 are zero
void levels_of_tile(const pytq_type_info * t, const uint8_t * rows, size_t stride, int n, int8_t * out, float * scale) {
    for (int i = 0; i < ((n + 15) & ~15); i++) {
        float factor[PYTQ_MAX_GROUPS] = {0};
        if (i < n) {
            pytq_unpack_ref(t, rows + (size_t) i * stride, out + i * t->head_dim, factor);
        } else {
            memset(out + i * t->head_dim, 0, (size_t) t->head_dim);
        }
        for (int g = 0; g < t->n_groups; g++) {
            scale[g * T + i] = factor[g];
        }
    }
}

struct Tier {
    static void dequantize(const pytq_type_info * t, const void * y, float * x, int64_t n) {
        pytq_dequantize_ref(t, y, x, n);
    }
    static vf exp(vf x) { return exp_neg(x); }
    static vf halves(const uint16_t * p) { return load_half(p); }
    static vf maximum(vf a, vf b) { return a > b ? a : b; }
    static float max16(vf v) { return hmax(v); }
    static float sum16(vf v) { return hsum(v); }
    static mask_state mask_of(const uint16_t * m, int n, int * seen) { return classify(m, n, seen); }
    static vf fwht16(vf v) {
        for (int len = 1; len < 16; len *= 2) {
            for (int i = 0; i < 16; i++) {
                if ((i & len) == 0) {
                    const float a = v[i], b = v[i + len];
                    v[i] = a + b;
                    v[i + len] = a - b;
                }
            }
        }
        return v;
    }
    static bool k_integer(const pytq_type_info *) { return true; }
    static bool v_integer(const pytq_type_info * t) { return t->n_groups == 1; }
    static int v_width(const pytq_type_info * t) { return t->head_dim; }

    static void k_tile(const pytq_type_info * t, const uint8_t * rows, size_t stride, int n, int, uint8_t * x,
                       float * scale) {
        levels_of_tile(t, rows, stride, n, (int8_t *) x, scale);
    }
    static void v_tile(const pytq_type_info * t, const uint8_t * rows, size_t stride, int n, int, uint8_t * x,
                       float * scale) {
        levels_of_tile(t, rows, stride, n, (int8_t *) x, scale);
    }
    static void q_row(const pytq_type_info * t, const float * q, float scale, uint8_t * a, float * q_scale, int32_t *) {
        q_row_16(q, t->head_dim, scale, a, q_scale);
    }

    static void qk(const pytq_type_info * t, const uint8_t * a, size_t a_row, const float * q_scale, const int32_t *,
                   int nr, int n, const uint8_t * x, const float * k_scale, float * s) {
        for (int r = 0; r < nr; r++) {
            const int16_t * q = (const int16_t *) (a + r * a_row);
            for (int j = 0; j < ((n + 15) & ~15); j++) {
                const int8_t * level = (const int8_t *) x + j * t->head_dim;
                float sum = 0.0f;
                for (int g = 0, at = 0; g < t->n_groups; at += t->group_len[g++]) {
                    int32_t dot = 0;
                    for (int c = at; c < at + t->group_len[g]; c++) {
                        dot += q[c] * level[c];
                    }
                    const float ks = k_scale[g * T + j];
                    sum = g == 0 ? (float) dot * ks : fmaf((float) dot, ks, sum);
                }
                s[r * T + j] = sum * q_scale[r];
            }
        }
    }

    static void store_weights(uint8_t * w, int j, vf v) {
        int16_t * to = (int16_t *) w + j;
        for (int i = 0; i < 16; i++) {
            to[i] = (int16_t) lrintf(v[i]);
        }
    }

    static void pv(const pytq_type_info * t, const uint8_t * w, int nr, int n, const uint8_t * x, const float * corr,
                   const float * f, float * o) {
        const int d = t->head_dim;
        for (int r = 0; r < nr; r++) {
            const int16_t * weight = (const int16_t *) (w + (size_t) r * 4 * T);
            int32_t sum[PYTQ_MAX_HEAD_DIM] = {0};
            for (int j = 0; j < n; j++) {
                for (int c = 0; c < d; c++) {
                    sum[c] += weight[j] * (int8_t) x[j * d + c];
                }
            }
            for (int c = 0; c < d; c++) {
                o[r * d + c] = fmaf((float) sum[c], f[r], o[r * d + c] * corr[r]);
            }
        }
    }
    static void natural_order(const pytq_type_info *, const float * o, int dv, float * out) {
        memcpy(out, o, (size_t) dv * sizeof(float));
    }
};

const pytq_cpu_tier_row row = {
    "scalar", 0, pytq_quantize_ref, pytq_dequantize_ref, run_item<Tier>, run_merge<Tier>, run_fwht<Tier>};

} // namespace

extern "C" {
extern const pytq_cpu_tier_row * const pytq_tier_scalar;
const pytq_cpu_tier_row * const pytq_tier_scalar = &row;
}

// The scalar tier: every tile is dequantised to float by the reference decoder. No instruction set is asked for. It is
// what the other tiers are measured against (PYTQ_CPU_CAPS=scalar), not a fast path.
#include "tile.inl"

namespace {

struct Tier {
    static constexpr float weight_max = 1.0f;
    static void dequantize(const pytq_type_info * t, const void * y, float * x, int64_t n) {
        pytq_dequantize_ref(t, y, x, n);
    }
    static vf exp(vf x) { return exp_neg(x); }
    static vf halves(const uint16_t * p) { return load_half(p); }
    static vf maximum(vf a, vf b) { return a > b ? a : b; }
    static float max16(vf v) { return hmax(v); }
    static float sum16(vf v) { return hsum(v); }
    static mask_state mask_of(const uint16_t * m, int n) { return classify(m, n); }
    // no integer tiles in this tier
    static bool k_integer(const pytq_type_info *) { return false; }
    static bool v_integer(const pytq_type_info *) { return false; }
    static int v_width(const pytq_type_info * t) { return t->head_dim; }
    static void k_tile(const pytq_type_info *, const uint8_t *, size_t, int, bool, uint8_t *, float *) {}
    static void v_tile(const pytq_type_info *, const uint8_t *, size_t, int, bool, uint8_t *, float *) {}
    static void q_row(const pytq_type_info *, const float *, float, uint8_t *, float *, int32_t *) {}
    static void qk(const pytq_type_info *, const uint8_t *, size_t, const float *, const int32_t *, int, int,
                   const uint8_t *, const float *, float *) {}
    static void pv(const pytq_type_info *, const uint8_t *, int, int, const uint8_t *, const float *, const float *,
                   float *) {}
    static void store_weights(uint8_t * w, int j, vf v) { store((float *) w + j, v); }
    static void natural_order(const pytq_type_info *, const float * o, int dv, float * out) {
        memcpy(out, o, (size_t) dv * sizeof(float));
    }
};

const pytq_cpu_tier_row row = {"scalar", 0, pytq_quantize_ref, pytq_dequantize_ref, run_item<Tier>, run_merge<Tier>};

} // namespace

extern "C" {
extern const pytq_cpu_tier_row * const pytq_tier_scalar;
const pytq_cpu_tier_row * const pytq_tier_scalar = &row;
}

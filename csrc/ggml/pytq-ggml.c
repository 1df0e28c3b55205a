// Thin wrappers that give every row of the types table the function signatures of ggml's type tables.
#include "pytq-ggml.h"

#include <assert.h>

#define PYTQ_ID(name, slot) (PYTQ_TYPE_BASE + PYTQ_FAMILY_STRIDE * PYTQ_FAMILY_INDEX_##name + (slot))

#define PYTQ_TYPE(name, slot, hd, ...)                                                                                 \
    void pytq_to_float_##name##_##hd(const void * x, float * y, int64_t n) {                                           \
        pytq_dequantize(pytq_type_get(PYTQ_ID(name, slot)), x, y, n);                                                  \
    }                                                                                                                  \
    void pytq_from_float_##name##_##hd(const float * x, void * y, int64_t n) {                                         \
        pytq_quantize(pytq_type_get(PYTQ_ID(name, slot)), x, y, n);                                                    \
    }                                                                                                                  \
    void pytq_from_float_ref_##name##_##hd(const float * x, void * y, int64_t n) {                                     \
        pytq_quantize_ref(pytq_type_get(PYTQ_ID(name, slot)), x, y, n);                                                \
    }                                                                                                                  \
    void pytq_vec_dot_##name##_##hd(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, \
                                    int nrc) {                                                                         \
        (void) bs, (void) bx, (void) by, (void) nrc;                                                                   \
        const pytq_type_info * t = pytq_type_get(PYTQ_ID(name, slot));                                                 \
        const char * block = (const char *) x;                                                                         \
        const float * q = (const float *) y;                                                                           \
        float total = 0.0f;                                                                                            \
        for (int i = 0; i < n; i += hd, block += t->block_bytes) {                                                     \
            total += pytq_dot_ref(t, block, q + i);                                                                    \
        }                                                                                                              \
        *s = total;                                                                                                    \
    }
#include "types.def"

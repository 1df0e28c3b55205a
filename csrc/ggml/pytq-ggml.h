// What the patched ggml calls: type registration and the few places that list types by hand.
#pragma once

#include "ggml.h"
#include "layout.h"
#include "pytq-cache-ids.h"
#include "pytq-cpu-fuse.h"
#include "pytq-flash-attn.h"
#include "pytq.h"

// The type tables of the C files that include this reach to the last pytq id. The enumerator in ggml.h stays as it is,
// so that files which know nothing of pytq's types compile to the same objects as in a stock build.
#ifndef __cplusplus
#define GGML_TYPE_COUNT PYTQ_TYPE_END
#endif

#ifdef __cplusplus
extern "C" {
#endif

// Functions of one concrete type, in the shape that ggml's type tables want: pytq_to_float_kv3_128, ...
#define PYTQ_TYPE(name, slot, hd, ...)                                                                                 \
    void pytq_to_float_##name##_##hd(const void * x, float * y, int64_t n);                                            \
    void pytq_from_float_##name##_##hd(const float * x, void * y, int64_t n);                                          \
    void pytq_from_float_ref_##name##_##hd(const float * x, void * y, int64_t n);                                      \
    void pytq_vec_dot_##name##_##hd(int n, float * s, size_t bs, const void * x, size_t bx, const void * y, size_t by, \
                                    int nrc);
#include "types.def"

#ifdef __cplusplus
}
#endif

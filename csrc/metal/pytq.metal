// All Metal kernels of the cache types, in the order of their dependencies. csrc/ggml/pytq-metal.cmake makes one text of
// this file and what it includes; ggml-metal compiles that text when a model first uses a compressed type.
#include "common.metal"
#include "encode.metal"
#include "values.metal"
#include "attention.metal"
#include "attention-vec.metal"
#include "attention-mm.metal"

// All Metal kernels of the cache types, in the order of their dependencies. csrc/ggml/pytq-metal.cmake makes one text of
// this file and what it includes; ggml-metal compiles that text when a model first uses a compressed type.
//
// ggml_metal_library_init_from_source() takes any message of the compiler for a failure, warnings too: a newer compiler that
// warns of something else than today's must not cost the user the GPU. The tests compile with warnings on.
#pragma clang diagnostic ignored "-Weverything"

#include "common.metal"
#include "encode.metal"
#include "values.metal"
#include "attention.metal"
#include "attention-vec.metal"
#include "attention-mm.metal"

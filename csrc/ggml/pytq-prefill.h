// The prefill kernel's instances, compiled for compute capability 9.0a in files that know nothing of ggml
// (pytq-prefill-*.cu): pytq-cuda.cmake gives them an architecture of their own.
#pragma once

#include "cuda/attention-prefill.cuh"

// Families of keys, and the slots (head sizes) for which there are values of the same family; each file names further
// ones. Read by pytq/backends.py.
#define PYTQ_PREFILL_FAMILIES(X) X(turbo2) X(turbo3) X(turbo4) X(kv2) X(kv3) X(kv4) X(kv5)
#define PYTQ_PREFILL_SLOTS(X)    X(1) X(4)

// Runs attention for keys of this family; cudaErrorInvalidDeviceFunction if there is no instance for the types. p null:
// only tell.
#define PYTQ_DECLARE(name)                                                                                             \
    cudaError_t pytq_prefill_##name(int k_type, int v_type, const pytq::prefill_params * p, int device,                \
                                    cudaStream_t stream);
PYTQ_PREFILL_FAMILIES(PYTQ_DECLARE)
#undef PYTQ_DECLARE

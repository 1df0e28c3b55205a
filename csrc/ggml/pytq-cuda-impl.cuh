// Shared by the pytq-cuda*.cu files: entry points of the kernel instances, one file per key family or head size.
#pragma once

#include "common.cuh"

#include "pytq.h"

// Graph fusion (pytq-cuda.cu finds the pattern, PYTQ_CUDA_FUSE=0 switches it off). The rotations of keys, values *and
// queries* run in the launch that writes the cache, so attention always sees rotated queries. The rotation of the
// result is left to the kernel that joins the splits: the launcher then gets a copy of the node whose data is the
// rotation's result and in whose op_params[pytq_result_param] pytq_result_rotated is set, and stores H x / sqrt(d)
// instead of x (H: Walsh matrix in natural order). pytq_result_q8_1: as blocks of Q8_1 for the product that follows, in
// the place of the result in f32.
constexpr int pytq_result_param = 15, pytq_result_rotated = 1, pytq_result_q8_1 = 2;

// Attention of few query rows by the integer tensor-core kernel, one function per family of keys; false if there is no
// instance for the values' type. check: only tell.
#define PYTQ_DECODE_FAMILIES(X) X(turbo2) X(turbo3) X(turbo4) X(kv2) X(kv3) X(kv4) X(kv5) X(kv2s) X(kv3s) X(kv4s)

// The newest token, which attention takes as it was before compression (decode_fresh in cuda/decode-parts.cuh).
struct pytq_cuda_fresh {
    const void *k, *v, *row;
    int row_bytes;
    int64_t first_row;
    bool turned;       // queries are still to be rotated
    cudaEvent_t ready; // when k and v are there, or null if they are
};

#define PYTQ_DECLARE(name)                                                                                             \
    bool pytq_cuda_decode_##name(ggml_backend_cuda_context * ctx, ggml_tensor * dst, const pytq_cuda_fresh * fresh,    \
                                 bool check);
PYTQ_DECODE_FAMILIES(PYTQ_DECLARE)
#undef PYTQ_DECLARE

// The one of them that dst asks for.
bool pytq_cuda_few_rows(ggml_backend_cuda_context * ctx, ggml_tensor * dst, const pytq_cuda_fresh * fresh, bool check);

// Attention of more rows than that on compute capability 9.0, fused (PYTQ_CUDA_PREFILL=0 switches it off); false if
// there is no instance for the types or the device.
bool pytq_cuda_prefill(ggml_backend_cuda_context & ctx, ggml_tensor * dst);

// One slice of the sequence in f16 for upstream's tensor-core kernel, merged into dst (unnormalised until the last
// slice).
struct pytq_cuda_slice {
    const char * q;
    const half * k; // [d, n_tok, n_head_kv]
    const half * v;
    const char * mask; // null or f16, already at the slice's first token
    const float * sinks;
    float * dst;    // [d, n_head, n_q]
    float2 * state; // (max, sum) per row of dst
    int64_t k_nb1, k_nb2, v_nb1, v_nb2;
    int d, n_tok, n_q, n_head, n_head_kv;
    int q_nb1, q_nb2, mask_nb1;
    bool first, last, gqa;
    float scale, max_bias, softcap;
};

template <int D> void pytq_cuda_slice_attention(ggml_backend_cuda_context & ctx, const pytq_cuda_slice & s);

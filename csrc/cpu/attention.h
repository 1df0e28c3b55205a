// Attention over a compressed key/value cache on CPU: plain C interface, no ggml types.
//
// softmax(scale * q k^T + slope * mask) v for every query row, with keys and values read from their blocks. The work is
// cut into items (a range of the cache x one KV head x a block of query rows), so any number of threads is used at
// batch 1. A caller runs, on every thread:  for (i = next item) pytq_attn_item(...); barrier; pytq_attn_merge(thread,
// n_threads).
#pragma once

#include "../pytq.h"

#ifdef __cplusplus
extern "C" {
#endif

// Capabilities of a CPU, the bits of pytq_cpu_caps() and pytq_force_caps().
enum pytq_cap { PYTQ_CAP_AVX2 = 1, PYTQ_CAP_AVX512 = 2, PYTQ_CAP_NEON = 4 };

// What this machine has (AVX2: with FMA and F16C; AVX512: with VNNI, VBMI, VBMI2 and GFNI; NEON: with dotprod).
unsigned pytq_cpu_caps(void);
// Restricts the tiers to those whose capability is in caps (0: the scalar tier). Bits the machine lacks are ignored.
// The environment variable PYTQ_CPU_CAPS (scalar, avx2, avx512, neon) does the same at start.
void pytq_force_caps(unsigned caps);
// Name of the tier in use: scalar, avx2, avx512 or neon.
const char * pytq_cpu_tier(void);

// Keys or values. type: a concrete pytq id, or -1 and to_float for a row of any other format.
typedef struct pytq_attn_kv {
    const void * data;
    size_t nb_token, nb_head, nb_stream; // strides in bytes
    int type;
    void (*to_float)(const void * row, float * out, int64_t n);
} pytq_attn_kv;

typedef struct pytq_attn {
    int n_q, n_kv;         // query positions, cached positions
    int n_head, n_head_kv; // n_head is a multiple of n_head_kv
    int n_stream, n_stream_kv;
    int dk, dv;      // head sizes of keys and values
    const float * q; // rows of dk floats
    size_t q_nb_token, q_nb_head, q_nb_stream;
    pytq_attn_kv k, v;
    const uint16_t * mask; // rows of n_kv fp16, or NULL
    size_t mask_nb_token, mask_nb_head, mask_nb_stream;
    int mask_n_head, mask_n_stream; // the mask is repeated over heads and streams
    const float * sinks;            // n_head logits, or NULL
    float * dst;                    // [n_stream][n_q][n_head][dv], contiguous
    float scale, max_bias, logit_softcap;
    int rotate; // nonzero: rows of dst are transformed by pytq_fwht with scale 1 / sqrt(dv), a size it supports
} pytq_attn;

typedef struct pytq_attn_plan {
    int rows_per_kv_head; // n_q * n_head / n_head_kv
    int block_rows, n_blocks;
    int chunk, n_chunks;
    int n_items;
    size_t scratch_bytes; // per thread
    size_t partial_bytes; // for all threads, 0 if the cache is not split
} pytq_attn_plan;

// Nonzero if the kernels take this combination of types and sizes.
int pytq_attn_supported(const pytq_attn * a);
// Cuts the work for n_threads.
void pytq_attn_make_plan(const pytq_attn * a, int n_threads, pytq_attn_plan * plan);
// Runs one item. scratch: scratch_bytes aligned to 64, own to the thread; partials: partial_bytes aligned to 64,
// shared.
void pytq_attn_item(const pytq_attn * a, const pytq_attn_plan * plan, int item, void * scratch, void * partials);
// Joins the parts of a split cache; no-op if it was not split. All items must be done.
void pytq_attn_merge(const pytq_attn * a, const pytq_attn_plan * plan, int thread, int n_threads,
                     const void * partials);
// All of the above on this thread. Returns 0, or -1 if unsupported or out of memory. split: number of threads to plan
// for.
int pytq_attn_run(const pytq_attn * a, int split);

// Fast Walsh-Hadamard transform of one row, y = H (scale x), n a power of two from 32 to 512; y may be x. Strides 1, 2,
// 4, ... in this order, so the bits are those of any radix-2 transform that scales first (ggml's is one).
int pytq_fwht_supported(int64_t n);
void pytq_fwht(const float * x, float * y, int n, float scale);

// pytq_quantize of vectors that are first transformed by pytq_fwht with scale 1 / sqrt(head_dim).
void pytq_quantize_rotated(const pytq_type_info * t, const float * x, void * y, int64_t n);

#ifdef __cplusplus
}
#endif

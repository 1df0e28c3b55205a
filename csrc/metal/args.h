// Arguments of the Metal kernels, shared by the kernels (Metal shading language) and the code that dispatches them.
// Strides are in bytes; names follow ggml's ne and nb: nb1 is the stride of dimension 1.
#pragma once

#ifndef __METAL_VERSION__
#include <stdint.h>
#endif

// What a key or value block is, besides PYTQ_CODE_SCALAR = 0 and PYTQ_CODE_TRELLIS = 1.
#define PYTQ_METAL_F16  2
#define PYTQ_METAL_Q8_0 3

// Function constants: eight per operand (code, scale bytes of a group, then n and b of the three groups), then flags.
#define PYTQ_METAL_FC_K       0
#define PYTQ_METAL_FC_V       8
#define PYTQ_METAL_FC_MASK    16
#define PYTQ_METAL_FC_BIAS    17
#define PYTQ_METAL_FC_SOFTCAP 18

#define PYTQ_METAL_GROUPS  3  // groups of a block, each with a table of
#define PYTQ_METAL_TABLE   64 // levels in threadgroup memory
#define PYTQ_METAL_TILE    32 // tokens that a SIMD group scores at once (decode)
#define PYTQ_METAL_MM_ROWS 32 // query rows of a threadgroup (prefill), eight per SIMD group
#define PYTQ_METAL_MM_PAD  8  // halfs between rows of a matrix in threadgroup memory
#define PYTQ_METAL_MAX_NSG 4  // SIMD groups of a threadgroup

// Tokens per tile of the prefill kernel: both operands have to fit into 32 KiB.
#define PYTQ_METAL_MM_TOKENS(d) ((d) > 192 ? 16 : 32)

// Words of four bytes of threadgroup memory per SIMD group of the encoder: x, four costs, best levels and two words of
// decisions per coordinate, coded bits (six per byte), the block.
#define PYTQ_METAL_ENCODE_WORDS(d) ((d) * 8 + 12 + 48)

typedef struct {
    uint64_t src_nb1, src_nb2, src_nb3; // f32 [d * blocks_per_row, n1, n2, n3]
    uint64_t rows_nb0, rows_nb1, rows_nb2;
    uint64_t dst_nb1, dst_nb2, dst_nb3;
    int32_t n1, blocks_per_row;
    int32_t row_bytes;  // of a row number: 8, 4, or 0 where row i goes to row i
    int32_t ne11, ne12; // row numbers are shared by n2 and n3 modulo these
} pytq_metal_encode_args;

typedef struct {
    uint64_t src_nb1, src_nb2, src_nb3; // blocks [blocks_per_row, n1, n2, n3]
    uint64_t rows_nb0, rows_nb1, rows_nb2;
    uint64_t dst_nb1, dst_nb2, dst_nb3;
    int32_t n1, blocks_per_row;
    int32_t row_bytes; // 4 or 0
} pytq_metal_values_args;

typedef struct {
    uint64_t n_bytes;
} pytq_metal_copy_args;

typedef struct {
    uint64_t q_nb1, q_nb2, q_nb3; // f32 [d, n_q, n_head, n_seq]
    uint64_t k_nb1, k_nb2, k_nb3; // blocks [1, n_kv, n_head_kv, n_seq / seq_ratio]
    uint64_t v_nb1, v_nb2, v_nb3;
    uint64_t mask_nb1, mask_nb2, mask_nb3; // f16 [n_kv, >= n_q, mask_ne2, mask_ne3]
    int32_t n_q, n_kv, n_head_kv, gqa;     // gqa: query heads of one KV head
    int32_t n_rows;                        // n_q * gqa; row = query * gqa + head within the group
    int32_t n_seq, seq_ratio, n_splits;
    int32_t mask_ne2, mask_ne3;
    int32_t has_sinks, n_head_log2;
    float scale, softcap, m0, m1; // with a soft-cap, scale is divided by it already
} pytq_metal_attention_args;

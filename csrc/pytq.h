// pytq: compressed key/value cache types for llama.cpp. Public header (C11 and C++17).
//
// A type stores one whole head vector per block: scale bytes, then bit planes (docs/format.md gives the exact bits).
#pragma once

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PYTQ_TYPE_BASE     128 // first ggml type id used by pytq
#define PYTQ_TYPE_END      256 // one past the last id reserved
#define PYTQ_FAMILY_STRIDE 8   // ids per family: slot 0 is the flag, 1..6 the head sizes
#define PYTQ_MAX_GROUPS    3
#define PYTQ_MAX_PLANES    5
#define PYTQ_MAX_HEAD_DIM  256
#define PYTQ_MAX_LEVELS    64
#define PYTQ_LOG8_BIAS     136 // scale = 2^((e - 136) / 8)

// Trellis of the TRELLIS code: 2^PYTQ_TRELLIS_V states, subset bits z1 = parity(window & TAPS1), z0 = parity(window &
// TAPS0), where bit k of the window is the coded bit u[t-k] and u[t] = 0 for t < 0 (Ungerboeck's 64-state code, parity
// taps 103, 24 octal).
#define PYTQ_TRELLIS_V      6
#define PYTQ_TRELLIS_STATES (1 << PYTQ_TRELLIS_V)
#define PYTQ_TRELLIS_TAPS1  0x61u
#define PYTQ_TRELLIS_TAPS0  0x14u

enum pytq_code { PYTQ_CODE_SCALAR = 0, PYTQ_CODE_TRELLIS = 1 };
enum pytq_scale { PYTQ_SCALE_FP16 = 2, PYTQ_SCALE_LOG8 = 1 }; // the value is the number of bytes

typedef struct pytq_type_info {
    int id;              // ggml type id
    const char * name;   // ggml type name, e.g. "kv3_d128"
    const char * family; // the flag, e.g. "kv3"
    int head_dim;
    enum pytq_code code;
    enum pytq_scale scale;
    int n_groups;
    int group_len[PYTQ_MAX_GROUPS];  // coordinates
    int group_bits[PYTQ_MAX_GROUPS]; // bits per coordinate
    int n_planes;
    int plane_len[PYTQ_MAX_PLANES]; // coordinates, a multiple of 8
    int plane_off[PYTQ_MAX_PLANES]; // byte offset in the block
    int block_bytes;
} pytq_type_info;

// int8 reconstruction levels in ascending order: value = scale * step * level.
typedef struct pytq_codebook {
    int n_levels;
    float step;
    int8_t levels[PYTQ_MAX_LEVELS];
} pytq_codebook;

// Row of the table for a concrete id; NULL for flags (slot 0), unknown ids and other types.
const pytq_type_info * pytq_type_get(int id);
// The i-th concrete type, or NULL past the end.
const pytq_type_info * pytq_type_at(int i);
// Id of a flag ("kv3") or a concrete name ("kv3_d128"); -1 if there is none.
int pytq_type_from_name(const char * name);
// Name of a flag or concrete id; NULL if there is none.
const char * pytq_type_name(int id);
int pytq_is_type(int id);
// Concrete id for a flag and a head size. split != 0 asks for the split-rate layout where the family has one.
// Returns -1 if the head size has no block, and concrete ids unchanged if they fit.
int pytq_type_resolve(int id, int head_dim, int split);

// Codebook for a code and a number of bits (scalar: 1..5 bits; trellis: 1..5), NULL outside.
const pytq_codebook * pytq_codebook_get(enum pytq_code code, int bits);
// The 256 values of the LOG8 scale.
const float * pytq_log8_table(void);

// Reference encoder and decoder (csrc/ref), equal to pytq.codec in NumPy to the bit. n: number of coordinates, a
// multiple of head_dim. x must be rotated already. A block with a non-finite coordinate is stored as zero.
void pytq_quantize_ref(const pytq_type_info * t, const float * x, void * y, int64_t n);
void pytq_dequantize_ref(const pytq_type_info * t, const void * y, float * x, int64_t n);
// int8 levels of one block (head_dim values) and the per-group factors scale * step.
void pytq_unpack_ref(const pytq_type_info * t, const void * block, int8_t * levels, float factor[PYTQ_MAX_GROUPS]);
float pytq_dot_ref(const pytq_type_info * t, const void * block, const float * q);

// The encoder's search on plain arrays, for training codebooks: y (n values), ascending levels (4 * n_sub of them),
// optional weights (n values or NULL); writes n level indices and returns the weighted squared error.
float pytq_viterbi_ref(const float * y, const float * weight, int n, const float * levels, int n_sub, uint8_t * index);

// Fast encoder and decoder for this machine; the same bits as the reference.
void pytq_quantize(const pytq_type_info * t, const float * x, void * y, int64_t n);
void pytq_dequantize(const pytq_type_info * t, const void * y, float * x, int64_t n);

#ifdef __cplusplus
}
#endif

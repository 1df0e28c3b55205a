// The table of CPU tiers: one row per instruction set, chosen once at run time (csrc/cpu/dispatch.c).
#pragma once

#include "attention.h"

#ifdef __cplusplus
extern "C" {
#endif

// Tokens per tile. 128 int8 vectors of 128 values fill half of a 32 KB L1 cache.
#define PYTQ_TILE 128
// Query rows that share an unpacked tile.
#define PYTQ_BLOCK_ROWS 64

typedef struct pytq_cpu_tier_row {
    const char * name;
    unsigned needs; // pytq_cap bits
    void (*quantize)(const pytq_type_info * t, const float * x, void * y, int64_t n);
    void (*dequantize)(const pytq_type_info * t, const void * y, float * x, int64_t n);
    void (*attn_item)(const pytq_attn * a, const pytq_attn_plan * plan, int item, void * scratch, void * partials);
    void (*attn_merge)(const pytq_attn * a, const pytq_attn_plan * plan, int thread, int n_threads,
                       const void * partials);
    void (*fwht)(const float * x, float * y, int n, float scale);
} pytq_cpu_tier_row;

// NULL on machines of another architecture.
extern const pytq_cpu_tier_row * const pytq_tier_scalar;
extern const pytq_cpu_tier_row * const pytq_tier_avx2;
extern const pytq_cpu_tier_row * const pytq_tier_avx512;
extern const pytq_cpu_tier_row * const pytq_tier_neon;

const pytq_cpu_tier_row * pytq_cpu_tier_current(void);

#ifdef __cplusplus
}
#endif

// Layout of a block as constant expressions over one row of csrc/types.def, for static tables and templates.
#pragma once

// Coordinates of plane p: all groups with more than p bits.
#define PYTQ_PL(p, n0, b0, n1, b1, n2, b2) (((b0) > (p) ? (n0) : 0) + ((b1) > (p) ? (n1) : 0) + ((b2) > (p) ? (n2) : 0))
#define PYTQ_NG(n1, n2)                    (1 + ((n1) > 0) + ((n2) > 0))
#define PYTQ_OFF0(sb, ...)                 (sb)
#define PYTQ_OFF1(sb, ...)                 (PYTQ_OFF0(sb, __VA_ARGS__) + PYTQ_PL(0, __VA_ARGS__) / 8)
#define PYTQ_OFF2(sb, ...)                 (PYTQ_OFF1(sb, __VA_ARGS__) + PYTQ_PL(1, __VA_ARGS__) / 8)
#define PYTQ_OFF3(sb, ...)                 (PYTQ_OFF2(sb, __VA_ARGS__) + PYTQ_PL(2, __VA_ARGS__) / 8)
#define PYTQ_OFF4(sb, ...)                 (PYTQ_OFF3(sb, __VA_ARGS__) + PYTQ_PL(3, __VA_ARGS__) / 8)
#define PYTQ_OFF5(sb, ...)                 (PYTQ_OFF4(sb, __VA_ARGS__) + PYTQ_PL(4, __VA_ARGS__) / 8)

// Bytes of a block whose groups have sb scale bytes each.
#define PYTQ_BLOCK_BYTES(sb, n0, b0, n1, b1, n2, b2) PYTQ_OFF5(PYTQ_NG(n1, n2) * (sb), n0, b0, n1, b1, n2, b2)

// Per family constants, by name: PYTQ_FAMILY_INDEX_kv3, PYTQ_SCALE_BYTES_kv3.
enum {
#define PYTQ_FAMILY(name, index, code, scale)                                                                          \
    PYTQ_FAMILY_INDEX_##name = index, PYTQ_SCALE_BYTES_##name = PYTQ_BYTES_OF_##scale,
#define PYTQ_BYTES_OF_FP16 2
#define PYTQ_BYTES_OF_LOG8 1
#include "types.def"
};

// Types table: csrc/types.def expanded into rows with the derived offsets.
#include "../layout.h"
#include "../pytq.h"

#include <string.h>

#define SCALE_FP16   PYTQ_SCALE_FP16
#define SCALE_LOG8   PYTQ_SCALE_LOG8
#define CODE_SCALAR  PYTQ_CODE_SCALAR
#define CODE_TRELLIS PYTQ_CODE_TRELLIS

typedef struct {
    const char * flag;
    enum pytq_code code;
    enum pytq_scale scale;
} family_row;

static const family_row families[] = {
#define PYTQ_FAMILY(name, index, code, scale) [index] = {#name, CODE_##code, SCALE_##scale},
#include "../types.def"
};

#define N_FAMILIES ((int) (sizeof(families) / sizeof(families[0])))

#define ROW(F, slot, hd, sb, n0, b0, n1, b1, n2, b2)                                                                   \
    {.id = PYTQ_TYPE_BASE + PYTQ_FAMILY_STRIDE * PYTQ_FAMILY_INDEX_##F + (slot),                                       \
     .head_dim = (hd),                                                                                                 \
     .n_groups = PYTQ_NG(n1, n2),                                                                                      \
     .group_len = {n0, n1, n2},                                                                                        \
     .group_bits = {b0, b1, b2},                                                                                       \
     .n_planes = (b0),                                                                                                 \
     .plane_len = {PYTQ_PL(0, n0, b0, n1, b1, n2, b2), PYTQ_PL(1, n0, b0, n1, b1, n2, b2),                             \
                   PYTQ_PL(2, n0, b0, n1, b1, n2, b2), PYTQ_PL(3, n0, b0, n1, b1, n2, b2),                             \
                   PYTQ_PL(4, n0, b0, n1, b1, n2, b2)},                                                                \
     .plane_off = {PYTQ_OFF0(sb, n0, b0, n1, b1, n2, b2), PYTQ_OFF1(sb, n0, b0, n1, b1, n2, b2),                       \
                   PYTQ_OFF2(sb, n0, b0, n1, b1, n2, b2), PYTQ_OFF3(sb, n0, b0, n1, b1, n2, b2),                       \
                   PYTQ_OFF4(sb, n0, b0, n1, b1, n2, b2)},                                                             \
     .block_bytes = PYTQ_OFF5(sb, n0, b0, n1, b1, n2, b2),                                                             \
     PYTQ_ROW_NAMES(F, hd)}

enum {
#define PYTQ_FAMILY(name, index, c, s) CODE_OF_##name = CODE_##c, SCALE_OF_##name = SCALE_##s,
#include "../types.def"
};

#define PYTQ_ROW_NAMES(F, hd)                                                                                          \
    .name = #F "_d" #hd, .family = #F, .code = (enum pytq_code) CODE_OF_##F, .scale = (enum pytq_scale) SCALE_OF_##F

static const pytq_type_info types[] = {
#define PYTQ_TYPE(F, slot, hd, n0, b0, n1, b1, n2, b2)                                                                 \
    ROW(F, slot, hd, (PYTQ_NG(n1, n2) * PYTQ_SCALE_BYTES_##F), n0, b0, n1, b1, n2, b2),
#include "../types.def"
};

#define N_TYPES ((int) (sizeof(types) / sizeof(types[0])))

const pytq_type_info * pytq_type_at(int i) {
    return i >= 0 && i < N_TYPES ? &types[i] : NULL;
}

// Row + 1 of each id, 0 for none: kernels ask for a type per tile, and a search would walk through the table's cache
// lines.
enum {
#define PYTQ_TYPE(F, slot, ...) ROW_OF_##F##_##slot,
#include "../types.def"
};
static const unsigned char row_after[PYTQ_TYPE_END - PYTQ_TYPE_BASE] = {
#define PYTQ_TYPE(F, slot, ...) [PYTQ_FAMILY_STRIDE * PYTQ_FAMILY_INDEX_##F + (slot)] = ROW_OF_##F##_##slot + 1,
#include "../types.def"
};

const pytq_type_info * pytq_type_get(int id) {
    const int row = id >= PYTQ_TYPE_BASE && id < PYTQ_TYPE_END ? row_after[id - PYTQ_TYPE_BASE] : 0;
    return row ? &types[row - 1] : NULL;
}

int pytq_is_type(int id) {
    return pytq_type_name(id) != NULL;
}

static int family_of(int id) {
    const int f = id < PYTQ_TYPE_BASE ? -1 : (id - PYTQ_TYPE_BASE) / PYTQ_FAMILY_STRIDE;
    return f < N_FAMILIES && f >= 0 && families[f].flag ? f : -1;
}

const char * pytq_type_name(int id) {
    const pytq_type_info * t = pytq_type_get(id);
    if (t) {
        return t->name;
    }
    const int f = family_of(id);
    return f >= 0 && (id - PYTQ_TYPE_BASE) % PYTQ_FAMILY_STRIDE == 0 ? families[f].flag : NULL;
}

int pytq_type_from_name(const char * name) {
    for (int f = 0; f < N_FAMILIES; f++) {
        if (families[f].flag && strcmp(name, families[f].flag) == 0) {
            return PYTQ_TYPE_BASE + PYTQ_FAMILY_STRIDE * f;
        }
    }
    for (int i = 0; i < N_TYPES; i++) {
        if (strcmp(name, types[i].name) == 0) {
            return types[i].id;
        }
    }
    return -1;
}

int pytq_type_resolve(int id, int head_dim, int split) {
    const int f = family_of(id);
    if (f < 0) {
        return -1;
    }
    const char * want = families[f].flag;
    const size_t len = strlen(want);
    for (int i = 0; i < N_TYPES; i++) {
        const pytq_type_info * t = &types[i];
        if (t->head_dim != head_dim) {
            continue;
        }
        const int same = strcmp(t->family, want) == 0;
        const int as_split = split && strncmp(t->family, want, len) == 0 && strcmp(t->family + len, "s") == 0;
        if (split ? as_split : same) {
            return t->id;
        }
    }
    return split ? pytq_type_resolve(id, head_dim, 0) : -1;
}

// ------------------------------------------------------------------------------------------------ codebooks

#define PYTQ_CODEBOOK(c, bits, n, stepsize, ...)                                                                       \
    static const pytq_codebook codebook_##c##_##bits = {.n_levels = n, .step = stepsize, .levels = {__VA_ARGS__}};
#include "../codebooks.def"

const pytq_codebook * pytq_codebook_get(enum pytq_code code, int bits) {
#define PYTQ_CODEBOOK(c, b, n, stepsize, ...)                                                                          \
    if (code == CODE_##c && bits == (b)) {                                                                             \
        return &codebook_##c##_##b;                                                                                    \
    }
#include "../codebooks.def"
    return NULL;
}

// include: pytq.h
//
// What Python sees of csrc/ through cffi (API mode, abi3). Every *_cdef.h in this directory is read; its first lines
// name the headers that declare the same functions to the compiler. No macros here: cffi does not run a preprocessor.
enum pytq_code { PYTQ_CODE_SCALAR, PYTQ_CODE_TRELLIS, ... };
enum pytq_scale { PYTQ_SCALE_FP16, PYTQ_SCALE_LOG8, ... };
#define PYTQ_TYPE_BASE     ...
#define PYTQ_TYPE_END      ...
#define PYTQ_FAMILY_STRIDE ...
#define PYTQ_MAX_GROUPS    ...
#define PYTQ_MAX_PLANES    ...
#define PYTQ_MAX_HEAD_DIM  ...
#define PYTQ_MAX_LEVELS    ...

typedef struct pytq_type_info {
    int id;
    const char * name;
    const char * family;
    int head_dim;
    enum pytq_code code;
    enum pytq_scale scale;
    int n_groups;
    int group_len[...];
    int group_bits[...];
    int n_planes;
    int plane_len[...];
    int plane_off[...];
    int block_bytes;
    ...;
} pytq_type_info;

typedef struct pytq_codebook {
    int n_levels;
    float step;
    int8_t levels[...];
    ...;
} pytq_codebook;

const pytq_type_info * pytq_type_get(int id);
const pytq_type_info * pytq_type_at(int i);
int pytq_type_from_name(const char * name);
const char * pytq_type_name(int id);
int pytq_is_type(int id);
int pytq_type_resolve(int id, int head_dim, int split);
const pytq_codebook * pytq_codebook_get(enum pytq_code code, int bits);
const float * pytq_log8_table(void);

void pytq_quantize_ref(const pytq_type_info * t, const float * x, void * y, int64_t n);
void pytq_dequantize_ref(const pytq_type_info * t, const void * y, float * x, int64_t n);
void pytq_unpack_ref(const pytq_type_info * t, const void * block, int8_t * levels, float * factor);
float pytq_dot_ref(const pytq_type_info * t, const void * block, const float * q);
float pytq_viterbi_ref(const float * y, const float * weight, int n, const float * levels, int n_sub, uint8_t * index);
void pytq_quantize(const pytq_type_info * t, const float * x, void * y, int64_t n);
void pytq_dequantize(const pytq_type_info * t, const void * y, float * x, int64_t n);

// The published codecs as plain C: TurboQuant mse and prod, QJL, PolarQuant, RaBitQ. Equal to pytq/codec/*.py to the
// bit.
//
// No global state, no allocation: every function may run in any number of threads on the same pytq_codec. Vectors are
// float32, contiguous, of length dim; codes are rows of pytq_codec_bytes() bytes without alignment.
#ifndef PYTQ_CODECS_CODECS_H
#define PYTQ_CODECS_CODECS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define PYTQ_CODEC_MAX_DIM 4096

enum pytq_codec_method {
    PYTQ_CODEC_TURBOQUANT_MSE = 0,
    PYTQ_CODEC_TURBOQUANT_PROD = 1,
    PYTQ_CODEC_QJL = 2,
    PYTQ_CODEC_POLARQUANT = 3,
    PYTQ_CODEC_RABITQ = 4,
};

enum pytq_codec_rotation {
    PYTQ_ROTATION_NONE = 0,
    PYTQ_ROTATION_HADAMARD = 1,
    PYTQ_ROTATION_MATRIX = 2,
};

// All pointers are borrowed and read-only.
typedef struct pytq_codec {
    int method;
    int dim;  // a multiple of 16, up to PYTQ_CODEC_MAX_DIM
    int bits; // mse and rabitq: 1..8; prod: 2..8; ignored by the others
    int rotation;
    int n_proj;             // rows of the QJL projection, a multiple of 16; prod and qjl
    int wide;               // scalars as float32 (1) or fp16 (0)
    int fast;               // rabitq: the scale that suits a Gaussian (1) instead of the searched one (0)
    const float * signs;    // HADAMARD: dim values of +-1, applied before H
    const float * matrix;   // MATRIX: dim x dim, row-major
    const float * matrix_t; // its transpose
    const float * proj;     // prod and qjl: n_proj x dim, row-major
    const float * proj_t;   // its transpose
} pytq_codec;

// Bytes of one code, or -1 if a field of c is out of range.
int pytq_codec_bytes(const pytq_codec * c);
// Floats of one prepared query.
int pytq_codec_query_len(const pytq_codec * c);

// x [n, dim] -> codes [n, bytes]. Returns -1, or the index of the first vector that cannot be stored because a
// coordinate is not finite or a scalar (norm, radius) does not fit its type; codes from that one on are undefined.
int64_t pytq_codec_encode(const pytq_codec * c, const float * x, int64_t n, uint8_t * codes);
// codes [n, bytes] -> x [n, dim], the reconstruction with the least squared error.
void pytq_codec_decode(const pytq_codec * c, const uint8_t * codes, int64_t n, float * x);
// q [n, dim] -> prepared [n, query_len]: rotated and projected once, however many codes follow.
void pytq_codec_query(const pytq_codec * c, const float * q, int64_t n, float * prepared);
// Estimates of <q, x>: out[i * stride + j] for prepared query i and code j.
void pytq_codec_inner(const pytq_codec * c, const float * prepared, int64_t n_query, const uint8_t * codes, int64_t n,
                      float * out, int64_t stride);

// y = R x (inverse = 0) or R^T x (inverse = 1) for n vectors; x and y may not overlap. Only dim, rotation, signs and
// the matrices are read: other quantisers share the rotation through this.
void pytq_codec_rotate(const pytq_codec * c, const float * x, int64_t n, float * y, int inverse);

#ifdef __cplusplus
}
#endif

#endif

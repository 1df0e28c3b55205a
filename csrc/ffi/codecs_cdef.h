// include: codecs/codecs.h
// include: codecs/hadamard.h
//
// The published codecs (csrc/codecs) as Python sees them.
typedef struct pytq_codec {
    int method;
    int dim;
    int bits;
    int rotation;
    int n_proj;
    int wide;
    int fast;
    const float * signs;
    const float * matrix;
    const float * matrix_t;
    const float * proj;
    const float * proj_t;
    ...;
} pytq_codec;

int pytq_codec_bytes(const pytq_codec * c);
int pytq_codec_query_len(const pytq_codec * c);
int64_t pytq_codec_encode(const pytq_codec * c, const float * x, int64_t n, uint8_t * codes);
void pytq_codec_decode(const pytq_codec * c, const uint8_t * codes, int64_t n, float * x);
void pytq_codec_query(const pytq_codec * c, const float * q, int64_t n, float * prepared);
void pytq_codec_inner(const pytq_codec * c, const float * prepared, int64_t n_query, const uint8_t * codes, int64_t n,
                      float * out, int64_t stride);
void pytq_codec_rotate(const pytq_codec * c, const float * x, int64_t n, float * y, int inverse);

int pytq_hadamard_base(int n);
int pytq_hadamard(float * out, int n);
int pytq_hadamard_apply(float * x, int n);

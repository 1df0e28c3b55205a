// include: cpu/attention.h
//
// CPU kernels: tier selection and attention, for the tests.
enum pytq_cap { PYTQ_CAP_AVX2, PYTQ_CAP_AVX512, PYTQ_CAP_NEON, ... };

unsigned pytq_cpu_caps(void);
void pytq_force_caps(unsigned caps);
const char * pytq_cpu_tier(void);

typedef struct pytq_attn_kv {
    const void * data;
    size_t nb_token, nb_head, nb_stream;
    int type;
    void (*to_float)(const void * row, float * out, int64_t n);
} pytq_attn_kv;

typedef struct pytq_attn {
    int n_q, n_kv;
    int n_head, n_head_kv;
    int n_stream, n_stream_kv;
    int dk, dv;
    const float * q;
    size_t q_nb_token, q_nb_head, q_nb_stream;
    pytq_attn_kv k, v;
    const uint16_t * mask;
    size_t mask_nb_token, mask_nb_head, mask_nb_stream;
    int mask_n_head, mask_n_stream;
    const float * sinks;
    float * dst;
    float scale, max_bias, logit_softcap;
    int rotate;
} pytq_attn;

int pytq_attn_supported(const pytq_attn * a);
int pytq_attn_run(const pytq_attn * a, int split);

// What both attention kernels share. Query rows are packed: row = query * gqa + head within its KV head's group, so one
// unpacked tile of keys or values serves all query heads of a KV head.
//
// Logits of masked tokens are a large negative number, never an infinity: relaxed mathematics may assume there is none.
#define PYTQ_MASKED (-FLT_MAX / 2)

constant bool FC_has_mask    [[function_constant(PYTQ_METAL_FC_MASK)]];
constant bool FC_has_bias    [[function_constant(PYTQ_METAL_FC_BIAS)]];
constant bool FC_has_softcap [[function_constant(PYTQ_METAL_FC_SOFTCAP)]];

// Where one query row lies: query, head, ALiBi slope.
struct query_row {
    int query, head;
    float slope;
};

static inline query_row query_row_of(constant pytq_metal_attention_args & args, int row, int head_kv) {
    query_row r;
    r.query = row / args.gqa;
    r.head = head_kv * args.gqa + row % args.gqa;
    r.slope = 1.0f;
    if (FC_has_bias) {
        const bool low = r.head < args.n_head_log2;
        const float base = low ? args.m0 : args.m1;
        r.slope = precise::pow(base, (float) (low ? r.head + 1 : 2 * (r.head - args.n_head_log2) + 1));
    }
    return r;
}

// What is added to a logit; PYTQ_MASKED if the row does not see the token.
static inline float bias_of(constant pytq_metal_attention_args & args, device const char * mask, query_row r, int token,
                            int seq, bool valid) {
    if (!valid) {
        return PYTQ_MASKED;
    }
    if (!FC_has_mask) {
        return 0.0f;
    }
    device const half * at = (device const half *) (mask + r.query * args.mask_nb1 +
                                                    (r.head % args.mask_ne2) * args.mask_nb2 +
                                                    (seq % args.mask_ne3) * args.mask_nb3) +
                             token;
    const half m = *at;
    return as_type<ushort>(m) >= 0xfc00 ? PYTQ_MASKED : (float) m * r.slope;
}

// dot: query times key, scaled.
static inline float logit_of(constant pytq_metal_attention_args & args, float dot, float bias) {
    if (bias <= PYTQ_MASKED) {
        return PYTQ_MASKED;
    }
    return (FC_has_softcap ? args.softcap * precise::tanh(dot) : dot) + bias;
}

static inline float weight_of(float logit, float top) {
    return logit <= PYTQ_MASKED ? 0.0f : exp(logit - top);
}

// Parts of a row over several threadgroups: values [row][split][d], then (top, sum) [row][split].
static inline int64_t part_row(constant pytq_metal_attention_args & args, int row, int head_kv, int seq) {
    return ((int64_t) seq * args.n_head_kv + head_kv) * args.n_rows + row;
}
static inline int64_t n_part_rows(constant pytq_metal_attention_args & args) {
    return (int64_t) args.n_seq * args.n_head_kv * args.n_rows;
}
// dst: f32 [d, n_head, n_q, n_seq]
static inline int64_t dst_row(constant pytq_metal_attention_args & args, int query, int head, int seq) {
    return ((int64_t) seq * args.n_q + query) * (args.n_head_kv * args.gqa) + head;
}

// 1 / (sum of all weights), and the factor that brings parts with this top to the final one.
struct normaliser {
    float factor, inverse;
};
static inline normaliser normaliser_of(constant pytq_metal_attention_args & args, device const float * sinks, int head,
                                       float top, float sum) {
    normaliser n;
    n.factor = 1.0f;
    if (args.has_sinks != 0) {
        const float sink = sinks[head], most = max(top, sink);
        n.factor = exp(top - most);
        sum = sum * n.factor + exp(sink - most);
    }
    n.inverse = sum > 0.0f ? 1.0f / sum : 0.0f;
    return n;
}

// Joins the parts of a row: one threadgroup per row (x), KV head (y) and sequence (z).
template <short DV>
kernel void kernel_pytq_attn_reduce(constant pytq_metal_attention_args & args, device const float * parts,
                                    device const float * sinks, device float * dst,
                                    uint3 tgpig [[threadgroup_position_in_grid]],
                                    ushort tiitg [[thread_index_in_threadgroup]],
                                    ushort3 ntg [[threads_per_threadgroup]]) {
    const int row = (int) tgpig.x, head_kv = (int) tgpig.y, seq = (int) tgpig.z;
    const query_row r = query_row_of(args, row, head_kv);
    const int64_t first = part_row(args, row, head_kv, seq) * args.n_splits;
    device const float * meta = parts + n_part_rows(args) * args.n_splits * DV + 2 * first;
    float top = PYTQ_MASKED, sum = 0.0f;
    for (int s = 0; s < args.n_splits; s++) {
        top = max(top, meta[2 * s]);
    }
    for (int s = 0; s < args.n_splits; s++) {
        sum += meta[2 * s + 1] * exp(meta[2 * s] - top);
    }
    const normaliser n = normaliser_of(args, sinks, r.head, top, sum);
    for (int i = tiitg; i < DV; i += ntg.x) {
        float v = 0.0f;
        for (int s = 0; s < args.n_splits; s++) {
            v += parts[(first + s) * DV + i] * exp(meta[2 * s] - top);
        }
        dst[dst_row(args, r.query, r.head, seq) * DV + i] = v * n.factor * n.inverse;
    }
}

typedef decltype(kernel_pytq_attn_reduce<64>) kernel_pytq_attn_reduce_t;
template [[host_name("kernel_pytq_attn_reduce_dv64")]] kernel kernel_pytq_attn_reduce_t kernel_pytq_attn_reduce<64>;
template [[host_name("kernel_pytq_attn_reduce_dv80")]] kernel kernel_pytq_attn_reduce_t kernel_pytq_attn_reduce<80>;
template [[host_name("kernel_pytq_attn_reduce_dv96")]] kernel kernel_pytq_attn_reduce_t kernel_pytq_attn_reduce<96>;
template [[host_name("kernel_pytq_attn_reduce_dv128")]] kernel kernel_pytq_attn_reduce_t kernel_pytq_attn_reduce<128>;
template [[host_name("kernel_pytq_attn_reduce_dv192")]] kernel kernel_pytq_attn_reduce_t kernel_pytq_attn_reduce<192>;
template [[host_name("kernel_pytq_attn_reduce_dv256")]] kernel kernel_pytq_attn_reduce_t kernel_pytq_attn_reduce<256>;

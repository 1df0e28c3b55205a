// Dispatch of graph nodes with compressed tensors on CUDA.
//
//   SET_ROWS, CPY to a type     encoder, one warp per head vector
//   GET_ROWS, CPY from a type   decoder
//   FLASH_ATTN_EXT              few query rows: integer tensor-core kernel on the blocks themselves; more on compute
//                               capability 9.0: blocks decoded into shared memory (pytq-cuda-prefill.cu);
//                               otherwise slices of the sequence (PYTQ_CUDA_SLICE tokens, default 32768) are decoded to
//                               f16 scratch and given to upstream's kernels, so scratch does not grow with the context.
// Nothing here synchronises or allocates outside ggml's pool, so CUDA graphs keep working.
#include "pytq-cuda.h"

#include "fattn.cuh"
#include "pytq-cuda-fuse.h"
#include "pytq-portable.h"
#include "pytq-switch.h"
#if !defined(GGML_USE_HIP)
#include "pytq-cuda-impl.cuh"
#include "pytq-cuda-side.cuh"
#endif

#include "cuda/decode-values.cuh"
#include "cuda/encode-launch.cuh"

#include <algorithm>
#include <climits>
#include <cstdlib>
#include <mutex>
#include <set>
#include <utility>

static bool is_compressed(const ggml_tensor * t) {
    return t && pytq_is_type(t->type);
}

// ------------------------------------------------------------------------------------------------ encode

static int64_t encode_items(const pytq::encode_params & p) {
    return (int64_t) p.blocks_per_row * p.n1 * p.n2 * p.n3;
}

// second: further vectors for the same kernel, or null. queries: a product by the Hadamard matrix to be done in the
// same launch, or null.
static void encode(ggml_backend_cuda_context & ctx, const pytq::encode_params & p, const pytq::encode_params * second,
                   const ggml_tensor * queries) {
    const int64_t n = encode_items(p), n2 = second ? encode_items(*second) : 0;
    pytq::encode_job job = {{p, second ? *second : p}, {}, 0, 0};
    if (queries) {
        job.rotate = {(const float *) queries->src[1]->data, (float *) queries->data, (int) ggml_nrows(queries),
                      (int) queries->ne[0], 1 / sqrtf((float) queries->ne[0])};
    }
    if (n + n2 + job.rotate.n == 0) {
        return;
    }
    GGML_ASSERT(n + n2 + job.rotate.n < INT_MAX);
    const pytq::encode_launch run(job, n, n2, n + n2 > pytq::encode_wide_from);
    GGML_ASSERT(run.kernel);
    if (ctx.curr_stream_no != 0) { // behind an event, not behind a kernel
        run.kernel<<<run.blocks, run.threads, run.shared_bytes, ctx.stream()>>>(job);
        CUDA_CHECK(cudaGetLastError());
        return;
    }
    ggml_cuda_kernel_launch(run.kernel, {dim3(run.blocks), dim3(run.threads), run.shared_bytes, ctx.stream()}, job);
}

static pytq::encode_params encode_from(const ggml_tensor * src, const ggml_tensor * dst) {
    pytq::encode_params p = {};
    p.src = (const char *) src->data, p.dst = (char *) dst->data;
    p.src_nb1 = src->nb[1], p.src_nb2 = src->nb[2], p.src_nb3 = src->nb[3];
    p.dst_nb1 = dst->nb[1], p.dst_nb2 = dst->nb[2], p.dst_nb3 = dst->nb[3];
    p.n1 = (int) src->ne[1], p.n2 = (int) src->ne[2], p.n3 = (int) src->ne[3];
    p.ne11 = p.ne12 = 1;
    p.blocks_per_row = (int) (src->ne[0] / ggml_blck_size(dst->type));
    p.l = pytq::layout_of(pytq_type_get(dst->type));
    return p;
}

static pytq::encode_params set_rows_params(const pytq_cache_write & w) {
    const ggml_tensor * dst = w.set_rows;
    const ggml_tensor * rows = dst->src[1];
    pytq::encode_params p = encode_from(dst->src[0], dst);
    if (w.rotation) { // the product's operand has the layout of its result
        p.src = (const char *) w.rotation->src[1]->data;
        p.hadamard = 1 / sqrtf((float) p.l.d);
    }
    p.rows = (const char *) rows->data;
    p.row_bytes = rows->type == GGML_TYPE_I64 ? 8 : 4;
    p.rows_nb0 = rows->nb[0], p.rows_nb1 = rows->nb[1], p.rows_nb2 = rows->nb[2];
    p.ne11 = (int) rows->ne[1], p.ne12 = (int) rows->ne[2];
    return p;
}

static void set_rows(ggml_backend_cuda_context & ctx, const pytq_cache_writes & w) {
    const pytq::encode_params first = set_rows_params(w.write[0]);
    if (w.n_writes == 1) {
        encode(ctx, first, nullptr, w.queries);
        return;
    }
    const pytq::encode_params second = set_rows_params(w.write[1]);
    const bool same = pytq::encode_same_kernel(first.l, second.l);
    encode(ctx, first, same ? &second : nullptr, w.queries);
    if (!same) {
        encode(ctx, second, nullptr, nullptr);
    }
}

// ------------------------------------------------------------------------------------------------ decode

static void decode(ggml_backend_cuda_context & ctx, pytq::values_params & p, ggml_type from, ggml_type to) {
    p.l = pytq::layout_of(pytq_type_get(from));
    const int64_t n = (int64_t) p.l.d / 8 * p.blocks_per_row * p.n1 * p.n2 * p.n3;
    if (n == 0) {
        return;
    }
    const unsigned grid = (unsigned) std::min<int64_t>((n + 255) / 256, 132 * 16);
#define PYTQ_DECODE(CODE, T) pytq::decode_values<CODE, T><<<grid, 256, 0, ctx.stream()>>>(p)
    if (p.l.code == PYTQ_CODE_TRELLIS) {
        to == GGML_TYPE_F16 ? PYTQ_DECODE(PYTQ_CODE_TRELLIS, __half) : PYTQ_DECODE(PYTQ_CODE_TRELLIS, float);
    } else {
        to == GGML_TYPE_F16 ? PYTQ_DECODE(PYTQ_CODE_SCALAR, __half) : PYTQ_DECODE(PYTQ_CODE_SCALAR, float);
    }
#undef PYTQ_DECODE
    CUDA_CHECK(cudaGetLastError());
}

static void get_rows(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[0];
    const ggml_tensor * rows = dst->src[1];
    pytq::values_params p = {};
    p.src = (const char *) src->data, p.rows = (const char *) rows->data, p.dst = (char *) dst->data;
    p.src_nb1 = src->nb[1], p.src_nb2 = src->nb[2], p.src_nb3 = src->nb[3];
    p.rows_nb0 = rows->nb[0], p.rows_nb1 = rows->nb[1], p.rows_nb2 = rows->nb[2];
    p.dst_nb1 = dst->nb[1], p.dst_nb2 = dst->nb[2], p.dst_nb3 = dst->nb[3];
    p.n1 = (int) rows->ne[0], p.n2 = (int) rows->ne[1], p.n3 = (int) rows->ne[2];
    p.blocks_per_row = (int) (src->ne[0] / ggml_blck_size(src->type));
    decode(ctx, p, src->type, dst->type);
}

static void copy(ggml_backend_cuda_context & ctx, ggml_tensor * node) {
    const ggml_tensor * src = node->src[0];
    const ggml_tensor * dst = node->src[1];
    if (is_compressed(dst)) {
        encode(ctx, encode_from(src, dst), nullptr, nullptr);
        return;
    }
    pytq::values_params p = {};
    p.src = (const char *) src->data, p.dst = (char *) dst->data;
    p.src_nb1 = src->nb[1], p.src_nb2 = src->nb[2], p.src_nb3 = src->nb[3];
    p.dst_nb1 = dst->nb[1], p.dst_nb2 = dst->nb[2], p.dst_nb3 = dst->nb[3];
    p.n1 = (int) src->ne[1], p.n2 = (int) src->ne[2], p.n3 = (int) src->ne[3];
    p.blocks_per_row = (int) (src->ne[0] / ggml_blck_size(src->type));
    decode(ctx, p, src->type, dst->type);
}

// ------------------------------------------------------------------------------------------------ attention

#if defined(GGML_USE_HIP)
// One kernel for every shape; the tensor-core kernels below are NVIDIA's.
static void flash_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    pytq_portable_attention(ctx, dst);
}
static bool flash_attn_supported(int, const ggml_tensor * dst) {
    return pytq_portable_supported(dst);
}
#else

// f16 copy [d_out, n_tok, n_head] of an uncompressed tensor; columns from d on are 0.
static PYTQ_DEV float stored_value(const half * row, int c) {
    return __half2float(row[c]);
}
static PYTQ_DEV float stored_value(const block_q8_0 * row, int c) {
    return (float) row[c / QK8_0].d * (float) row[c / QK8_0].qs[c % QK8_0];
}
template <class T>
static __global__ void stock_slice(const char * src, half * dst, int64_t nb1, int64_t nb2, int d, int d_out, int n_tok,
                                   int n_head) {
    const int64_t i = (int64_t) blockIdx.x * blockDim.x + threadIdx.x;
    const int c = (int) (i % d_out), t = (int) (i / d_out % n_tok), h = (int) (i / d_out / n_tok);
    if (h < n_head) {
        dst[i] = __float2half(c < d ? stored_value((const T *) (src + t * nb1 + h * nb2), c) : 0.0f);
    }
}

// f32 copy [d_out, n1, n2, n3] without gaps of a tensor of rows of d; further columns are 0.
static __global__ void resize_rows(const char * src, float * dst, int64_t nb1, int64_t nb2, int64_t nb3, int d,
                                   int d_out, int n1, int n2, int64_t n) {
    const int64_t i = (int64_t) blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) {
        const int c = (int) (i % d_out), i1 = (int) (i / d_out % n1), i2 = (int) (i / d_out / n1 % n2);
        const int64_t i3 = i / d_out / n1 / n2;
        dst[i] = c < d ? ((const float *) (src + i1 * nb1 + i2 * nb2 + i3 * nb3))[c] : 0.0f;
    }
}

template <int ID> static bool slice_fast(ggml_backend_cuda_context & ctx, const pytq::slice_params & p) {
    using T = pytq::type<ID>;
    if constexpr (T::n_groups == 1 && T::d % 32 == 0) {
        ggml_cuda_kernel_launch(pytq::decode_slice<ID>,
                                {pytq::slice_grid<ID>(p), dim3(pytq::slice_threads), (size_t) 0, ctx.stream()}, p);
        return true;
    }
    return false;
}

// f16 copy [d_out, n_tok, n_head] of tokens t0 .. t0 + n_tok of a cache tensor's sequence; columns from d on are 0.
static void decode_slice(ggml_backend_cuda_context & ctx, const ggml_tensor * t, int64_t t0, int64_t n_tok, int64_t seq,
                         half * out, int d_out) {
    const char * src = (const char *) t->data + seq * t->nb[3] + t0 * t->nb[1];
    const int d = (int) t->ne[0], n_head = (int) t->ne[2];
    if (!is_compressed(t)) {
        const int64_t n = n_tok * n_head * d_out;
        const auto kernel = t->type == GGML_TYPE_Q8_0 ? stock_slice<block_q8_0> : stock_slice<half>;
        kernel<<<(unsigned) ((n + 255) / 256), 256, 0, ctx.stream()>>>(src, out, t->nb[1], t->nb[2], d, d_out,
                                                                       (int) n_tok, n_head);
        CUDA_CHECK(cudaGetLastError());
        return;
    }
    const pytq::slice_params s = {src, out, (long long) t->nb[1], (long long) t->nb[2], (int) n_tok, n_head};
    bool done = false;
    switch (d == d_out ? (int) t->type : -1) {
#define PYTQ_TYPE(name, slot, hd, ...)                                                                                 \
    case PYTQ_TYPE_BASE + PYTQ_FAMILY_STRIDE * PYTQ_FAMILY_INDEX_##name + (slot):                                      \
        done = slice_fast<PYTQ_TYPE_BASE + PYTQ_FAMILY_STRIDE * PYTQ_FAMILY_INDEX_##name + (slot)>(ctx, s);            \
        break;
#include "types.def"
    }
    if (!done) {
        pytq::values_params p = {};
        p.src = src, p.dst = (char *) out;
        p.src_nb1 = t->nb[1], p.src_nb2 = t->nb[2];
        p.dst_nb1 = 2 * d_out, p.dst_nb2 = 2 * d_out * n_tok;
        if (d != d_out) {
            CUDA_CHECK(cudaMemsetAsync(out, 0, 2 * d_out * n_tok * n_head, ctx.stream()));
        }
        p.n1 = (int) n_tok, p.n2 = n_head, p.n3 = 1, p.blocks_per_row = 1;
        decode(ctx, p, t->type, GGML_TYPE_F16);
    }
}

static int64_t slice_tokens() {
    static const int64_t n = [] {
        const char * e = getenv("PYTQ_CUDA_SLICE");
        const long v = e ? atol(e) : 0;
        return v >= 256 ? (int64_t) v / 256 * 256 : (int64_t) 32768;
    }();
    return n;
}

// The same node over f16 keys and values of head size d, as upstream's dispatcher would see it.
struct f16_view {
    ggml_tensor k, v, node;
    f16_view(const ggml_tensor * dst, half * kd, half * vd, int64_t d) : k(*dst->src[1]), v(*dst->src[2]), node(*dst) {
        for (ggml_tensor * t : {&k, &v}) {
            t->data = t == &k ? kd : vd;
            t->view_src = nullptr, t->view_offs = 0, t->op = GGML_OP_NONE;
            if (t->type == GGML_TYPE_F16 && t->ne[0] == d) {
                continue;
            }
            t->type = GGML_TYPE_F16, t->ne[0] = d;
            t->nb[0] = 2, t->nb[1] = 2 * t->ne[0], t->nb[2] = t->nb[1] * t->ne[1], t->nb[3] = t->nb[2] * t->ne[2];
        }
        node.src[1] = &k, node.src[2] = &v;
    }
};

bool pytq_cuda_few_rows(ggml_backend_cuda_context * ctx, ggml_tensor * dst, const pytq_cuda_fresh * fresh, bool check) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    constexpr int64_t max_rows = 32; // beyond this, decoding to f16 once is cheaper than decoding per 4 rows
    const int cc = ggml_cuda_info().devices[ctx ? ctx->device : ggml_cuda_get_device()].cc;
    if (!GGML_CUDA_CC_IS_NVIDIA(cc) || ggml_cuda_highest_compiled_arch(cc) < GGML_CUDA_CC_AMPERE) {
        return false;
    }
    if (k->ne[0] != v->ne[0] || !is_compressed(k) || !is_compressed(v) || q->ne[1] * (q->ne[2] / k->ne[2]) > max_rows ||
        q->nb[1] % 16 || q->nb[2] % 16 || q->nb[3] % 16) {
        return false;
    }
    const int family = ((int) k->type - PYTQ_TYPE_BASE) / PYTQ_FAMILY_STRIDE;
#define PYTQ_CASE(name)                                                                                                \
    if (family == PYTQ_FAMILY_INDEX_##name) {                                                                          \
        return pytq_cuda_decode_##name(ctx, dst, fresh, check);                                                        \
    }
    PYTQ_DECODE_FAMILIES(PYTQ_CASE)
#undef PYTQ_CASE
    return false;
}

// By slices in f16. d: head size of queries and result, which keys and values are filled up to.
static void flash_attn_slices(ggml_backend_cuda_context & ctx, ggml_tensor * dst, int64_t d) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const ggml_tensor * mask = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];
    const int64_t n_kv = k->ne[1], n_head_kv = k->ne[2], n_seq = q->ne[3];
    const bool k_copy = k->type != GGML_TYPE_F16 || k->ne[0] != d, v_copy = v->type != GGML_TYPE_F16 || v->ne[0] != d;
    const int64_t whole = slice_tokens();

    if (n_kv * n_seq <= whole || n_kv <= 256) {
        ggml_cuda_pool_alloc<half> kh(ctx.pool()), vh(ctx.pool());
        half * kd = (half *) k->data;
        half * vd = (half *) v->data;
        if (k_copy) {
            kd = kh.alloc(d * n_kv * n_head_kv * k->ne[3]);
            for (int64_t s = 0; s < k->ne[3]; s++) {
                decode_slice(ctx, k, 0, n_kv, s, kd + s * d * n_kv * n_head_kv, (int) d);
            }
        }
        if (v_copy) {
            vd = vh.alloc(d * n_kv * n_head_kv * v->ne[3]);
            for (int64_t s = 0; s < v->ne[3]; s++) {
                decode_slice(ctx, v, 0, n_kv, s, vd + s * d * n_kv * n_head_kv, (int) d);
            }
        }
        f16_view f(dst, kd, vd, d);
        ggml_cuda_flash_attn_ext(ctx, &f.node);
        return;
    }

    // slices of equal length, a multiple of 256 so that upstream's packing of query heads applies to all but the last
    const int64_t n_slices = (n_kv + whole - 1) / whole;
    const int64_t len = std::max<int64_t>(512, ((n_kv + n_slices - 1) / n_slices + 255) / 256 * 256);
    ggml_cuda_pool_alloc<half> kh(ctx.pool()), vh(ctx.pool());
    // (a short rest joins the slice before it: the kernel would normalise a slice of a single tile)
    if (k_copy) {
        kh.alloc(d * (len + 256) * n_head_kv);
    }
    if (v_copy) {
        vh.alloc(d * (len + 256) * n_head_kv);
    }
    ggml_cuda_pool_alloc<float2> state(ctx.pool(), q->ne[1] * q->ne[2]);

    pytq_cuda_slice s = {};
    memcpy(&s.scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&s.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&s.softcap, (const float *) dst->op_params + 2, sizeof(float));
    s.d = (int) d, s.n_q = (int) q->ne[1], s.n_head = (int) q->ne[2], s.n_head_kv = (int) n_head_kv;
    s.q_nb1 = (int) q->nb[1], s.q_nb2 = (int) q->nb[2], s.mask_nb1 = mask ? (int) mask->nb[1] : 0;
    s.sinks = sinks ? (const float *) sinks->data : nullptr;
    s.state = state.get();
    bool gqa = mask && s.max_bias == 0.0f && n_kv % 256 == 0;
    for (const ggml_tensor * t : {q, k_copy ? nullptr : k, v_copy ? nullptr : v, mask}) {
        for (int i = 1; t && (t->type == GGML_TYPE_F16 || t->type == GGML_TYPE_F32) && i < 4; i++) {
            gqa = gqa && t->nb[i] % 16 == 0;
        }
    }
    s.gqa = gqa;
    for (int64_t seq = 0; seq < n_seq; seq++) {
        s.q = (const char *) q->data + seq * q->nb[3];
        s.dst = (float *) dst->data + seq * q->ne[1] * q->ne[2] * d;
        int64_t n_tok = 0;
        for (int64_t t0 = 0; t0 < n_kv; t0 += n_tok) {
            n_tok = n_kv - t0 <= len + 256 ? n_kv - t0 : len;
            s.n_tok = (int) n_tok;
            if (!k_copy) {
                s.k = (const half *) ((const char *) k->data + seq * k->nb[3] + t0 * k->nb[1]), s.k_nb1 = k->nb[1],
                s.k_nb2 = k->nb[2];
            } else {
                decode_slice(ctx, k, t0, n_tok, seq, kh.get(), (int) d);
                s.k = kh.get(), s.k_nb1 = 2 * d, s.k_nb2 = 2 * d * n_tok;
            }
            if (!v_copy) {
                s.v = (const half *) ((const char *) v->data + seq * v->nb[3] + t0 * v->nb[1]), s.v_nb1 = v->nb[1],
                s.v_nb2 = v->nb[2];
            } else {
                decode_slice(ctx, v, t0, n_tok, seq, vh.get(), (int) d);
                s.v = vh.get(), s.v_nb1 = 2 * d, s.v_nb2 = 2 * d * n_tok;
            }
            s.mask = mask ? (const char *) mask->data + (seq % mask->ne[3]) * mask->nb[3] + 2 * t0 : nullptr;
            s.first = t0 == 0, s.last = t0 + n_tok == n_kv;
            switch (d) {
                case 64:
                    pytq_cuda_slice_attention<64>(ctx, s);
                    break;
                case 80:
                    pytq_cuda_slice_attention<80>(ctx, s);
                    break;
                case 96:
                    pytq_cuda_slice_attention<96>(ctx, s);
                    break;
                case 128:
                    pytq_cuda_slice_attention<128>(ctx, s);
                    break;
                case 256:
                    pytq_cuda_slice_attention<256>(ctx, s);
                    break;
                default:
                    GGML_ABORT("no slice kernel for head size %d", (int) d);
            }
        }
    }
}

// Head size of upstream's kernel for keys and values of size d: it has none for 192, which runs as 256 with columns of
// 0.
static int64_t kernel_head_size(int64_t d) {
    return d == 192 ? 256 : d;
}

// Once for every pair of types: this batch does not run on the blocks themselves.
static void say_slices(const ggml_tensor * dst) {
    static std::mutex lock;
    static std::set<std::pair<int, int>> said;
    const ggml_tensor *k = dst->src[1], *v = dst->src[2];
    const std::lock_guard<std::mutex> guard(lock);
    if (said.insert({k->type, v->type}).second) {
        GGML_LOG_WARN(
            "pytq: batches of %d tokens over K %s with V %s go through slices of %d tokens in f16: there is no "
            "fused kernel for them on this device\n",
            (int) dst->src[0]->ne[1], ggml_type_name(k->type), ggml_type_name(v->type), (int) slice_tokens());
    }
}

static void flash_attn(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    if (pytq_cuda_few_rows(&ctx, dst, nullptr, false) || pytq_cuda_prefill(ctx, dst)) {
        return;
    }
    say_slices(dst);
    const ggml_tensor * q = dst->src[0];
    const int64_t d = q->ne[0], wide = kernel_head_size(d);
    if (d == wide) {
        flash_attn_slices(ctx, dst, d);
        return;
    }
    const int64_t rows = q->ne[1] * q->ne[2] * q->ne[3];
    const auto resize = [&](const ggml_tensor & from, float * to, int64_t d_out) {
        const int64_t n = rows * d_out;
        resize_rows<<<(unsigned) ((n + 255) / 256), 256, 0, ctx.stream()>>>(
            (const char *) from.data, to, from.nb[1], from.nb[2], from.nb[3], (int) std::min(from.ne[0], d_out),
            (int) d_out, (int) from.ne[1], (int) from.ne[2], n);
        CUDA_CHECK(cudaGetLastError());
    };
    ggml_cuda_pool_alloc<float> q_wide(ctx.pool(), rows * wide), out_wide(ctx.pool(), rows * wide);
    resize(*q, q_wide.get(), wide);
    ggml_tensor q2 = *q, node = *dst;
    q2.data = q_wide.get(), node.data = out_wide.get(), node.src[0] = &q2;
    for (ggml_tensor * t : {&q2, &node}) {
        t->ne[0] = wide, t->nb[0] = 4, t->nb[1] = 4 * wide, t->nb[2] = t->nb[1] * t->ne[1],
        t->nb[3] = t->nb[2] * t->ne[2];
    }
    flash_attn_slices(ctx, &node, wide);
    resize(node, (float *) dst->data, d);
}

static bool flash_attn_supported(int device, const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const ggml_tensor * mask = dst->src[3];
    for (const ggml_tensor * t : {k, v}) {
        if (!(is_compressed(t) && pytq_type_get(t->type)) && t->type != GGML_TYPE_F16 && t->type != GGML_TYPE_Q8_0) {
            return false;
        }
    }
    if (q->type != GGML_TYPE_F32 || k->ne[0] != v->ne[0] || q->ne[3] != k->ne[3] ||
        (mask && (mask->ne[2] != 1 || mask->type != GGML_TYPE_F16))) {
        return false;
    }
    const int cc = ggml_cuda_info().devices[device].cc;
    if (!GGML_CUDA_CC_IS_NVIDIA(cc) || ggml_cuda_highest_compiled_arch(cc) < GGML_CUDA_CC_AMPERE) {
        return false;
    }
    float softcap;
    memcpy(&softcap, (const float *) dst->op_params + 2, sizeof(float));
    const int64_t d = kernel_head_size(k->ne[0]);
    const bool slices =
        (d == 64 || d == 80 || d == 96 || d == 128 || d == 256) && (softcap == 0.0f || d == 128 || d == 256);
    f16_view f(dst, nullptr, nullptr, d);
    ggml_tensor q_wide = *q;
    q_wide.ne[0] = d, f.node.ne[0] = d, f.node.src[0] = &q_wide;
    return slices && q->ne[0] == k->ne[0] && ggml_cuda_flash_attn_ext_supported(device, &f.node);
}

#endif // GGML_USE_HIP

// ------------------------------------------------------------------------------------------------ dispatch

// Operations of the table, and those that move nothing.
static bool is_listed(ggml_op op) {
    switch (op) {
#define PYTQ_CUDA_OP(op, ...) case GGML_OP_##op:
#include "pytq-cuda-ops.def"
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            return true;
        default:
            return false;
    }
}

bool pytq_cuda_supports_op(int device, const ggml_tensor * op, bool * supported) {
    bool any = is_compressed(op);
    for (int i = 0; i < GGML_MAX_SRC; i++) {
        any = any || is_compressed(op->src[i]);
    }
    if (!any) {
        return false;
    }
    const ggml_tensor * a = op->src[0];
    const ggml_tensor * b = op->src[1];
    if (!is_listed(op->op)) {
        *supported = false;
        return true;
    }
    switch (op->op) {
        case GGML_OP_NONE:
        case GGML_OP_RESHAPE:
        case GGML_OP_VIEW:
        case GGML_OP_PERMUTE:
        case GGML_OP_TRANSPOSE:
            *supported = true;
            break;
        case GGML_OP_SET_ROWS:
            *supported = pytq_type_get(op->type) && a->type == GGML_TYPE_F32 && a->nb[0] == 4 &&
                         (b->type == GGML_TYPE_I64 || b->type == GGML_TYPE_I32);
            break;
        case GGML_OP_GET_ROWS:
            *supported = pytq_type_get(a->type) && op->type == GGML_TYPE_F32 && b->type == GGML_TYPE_I32;
            break;
        case GGML_OP_CPY:
            if (a->type == b->type) { // upstream copies the bytes
                *supported = ggml_is_contiguous(a) && ggml_is_contiguous(b);
            } else if (is_compressed(a)) {
                *supported =
                    pytq_type_get(a->type) && ggml_are_same_shape(a, b) &&
                    ((b->type == GGML_TYPE_F32 && b->nb[0] == 4) || (b->type == GGML_TYPE_F16 && b->nb[0] == 2));
            } else {
                *supported =
                    pytq_type_get(b->type) && ggml_are_same_shape(a, b) && a->type == GGML_TYPE_F32 && a->nb[0] == 4;
            }
            break;
        case GGML_OP_DUP:
        case GGML_OP_CONT:
            *supported = a->type == op->type && ggml_is_contiguous(a);
            break;
        case GGML_OP_FLASH_ATTN_EXT:
            *supported = flash_attn_supported(device, op);
            break;
        default:
            *supported = false;
    }
    return true;
}

bool pytq_cuda_compute(ggml_backend_cuda_context & ctx, ggml_tensor * dst) {
    switch (dst->op) {
        case GGML_OP_SET_ROWS:
            if (is_compressed(dst)) {
                set_rows(ctx, {{{dst, nullptr}}, 1, nullptr, 0});
                return true;
            }
            return false;
        case GGML_OP_GET_ROWS:
            if (is_compressed(dst->src[0])) {
                get_rows(ctx, dst);
                return true;
            }
            return false;
        case GGML_OP_CPY:
            if ((is_compressed(dst->src[0]) || is_compressed(dst->src[1])) && dst->src[0]->type != dst->src[1]->type) {
                copy(ctx, dst);
                return true;
            }
            return false;
        case GGML_OP_FLASH_ATTN_EXT:
            if (is_compressed(dst->src[1]) || is_compressed(dst->src[2])) {
                ggml_cuda_set_device(ctx.device);
                flash_attn(ctx, dst);
                return true;
            }
            return false;
        default:
            return false;
    }
}

#if defined(GGML_USE_HIP)
const void * pytq_cuda_quantized(ggml_backend_cuda_context &, const ggml_tensor *) {
    return nullptr;
}
#else
// Attention whose result, rotated if that is what another node asks for, is stored in `last`. turned: the queries
// before their rotation, contiguous as its result is, or null. q8_1: stored as blocks of Q8_1.
static void few_rows_into(ggml_backend_cuda_context & ctx, const ggml_tensor * node, const ggml_tensor * last,
                          const ggml_tensor * turned, const pytq_cuda_fresh * fresh, bool q8_1) {
    GGML_ASSERT(!q8_1 || node->ne[0] % QK8_1 == 0);
    ggml_cuda_set_device(ctx.device);
    ggml_tensor out = *node, q = *node->src[0];
    if (turned) {
        q.data = turned->data;
    }
    out.data = last->data, out.src[0] = &q;
    ggml_set_op_params_i32(&out, pytq_result_param,
                           (last != node ? pytq_result_rotated : 0) | (q8_1 ? pytq_result_q8_1 : 0));
    GGML_ASSERT(pytq_cuda_few_rows(&ctx, &out, fresh, false));
}

// The token's way into the cache on one stream, attention to it beside on the other.
static void attend_beside_write(ggml_backend_cuda_context & ctx, pytq_cuda_side & side, const pytq_cuda_token & t,
                                const ggml_cgraph * graph) {
    const cudaEvent_t ready = pytq_cuda_begin_write(ctx, side, t);
    pytq_cache_writes only = t.writes;
    only.queries = nullptr; // attention rotates them
    set_rows(ctx, only);
    pytq_cuda_end_write(ctx, side, t);
    const pytq_fresh_token & f = t.fresh;
    const pytq_cuda_fresh fresh = {f.k->data,   f.v->data, f.rows->data, f.rows->type == GGML_TYPE_I64 ? 8 : 4,
                                   f.first_row, f.turned,  ready};
    few_rows_into(ctx, graph->nodes[f.attention], graph->nodes[f.last], f.turned ? f.q : nullptr, &fresh, t.operand);
    pytq_cuda_end_attention(side, t);
}
#endif

int pytq_cuda_try_fuse(ggml_backend_cuda_context & ctx, const ggml_cgraph * graph, int i) {
    ggml_tensor * node = graph->nodes[i];
    if (!ctx.stream_context().concurrent_events.empty()) {
        return 0; // nodes of several streams: each runs where it stands
    }
#if !defined(GGML_USE_HIP)
    pytq_cuda_side & side = pytq_cuda_side_of(ctx);
    pytq_cuda_enter_node(ctx, side, graph, i);
#endif
    switch (node->op) {
        case GGML_OP_MUL_MAT:
            return pytq_cuda_is_left_out(graph, i) ? 1 : 0;
        case GGML_OP_SET_ROWS:
            if (is_compressed(node)) {
#if !defined(GGML_USE_HIP)
                const auto token = side.tokens.find(i);
                if (token != side.tokens.end()) {
                    attend_beside_write(ctx, side, token->second, graph);
                    return token->second.fresh.last - i + 1;
                }
#endif
                const pytq_cache_writes w = pytq_find_cache_writes(graph, i, pytq_cuda_fusion_enabled());
                set_rows(ctx, w);
                return w.last - i + 1;
            }
            return 0;
#if !defined(GGML_USE_HIP)
        case GGML_OP_FLASH_ATTN_EXT:
            if (is_compressed(node->src[1]) || is_compressed(node->src[2])) {
                const int r = pytq_cuda_fusion_enabled() ? pytq_find_rotated_output(graph, i) : -1;
                if (r < 0 || !pytq_cuda_few_rows(nullptr, node, nullptr, true)) {
                    return 0;
                }
                few_rows_into(ctx, node, graph->nodes[r], nullptr, nullptr, false);
                return r - i + 1;
            }
            return 0;
#endif
        default:
            return 0;
    }
}

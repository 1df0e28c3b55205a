#include "pytq-cuda-side.cuh"

#include "mmvq.cuh"
#include "pytq-cuda-fuse.h"
#include "pytq-cuda-impl.cuh"
#include "pytq-cuda.h"
#include "pytq-switch.h"
#include "pytq.h"
#include "quantize.cuh"

#include <algorithm>
#include <mutex>

constexpr int side_stream_no = 1;

pytq_cuda_side & pytq_cuda_side_of(ggml_backend_cuda_context & ctx) {
    static std::mutex mutex;
    static std::unordered_map<const ggml_backend_cuda_context *, pytq_cuda_side> sides;
    std::lock_guard<std::mutex> lock(mutex);
    pytq_cuda_side & side = sides[&ctx]; // (references into this map stay valid)
    if (side.device != ctx.device) {     // new, or the context at this address is another than before
        ggml_cuda_set_device(ctx.device);
        for (cudaEvent_t * e : {&side.fork, &side.ready, &side.done}) {
            if (*e) {
                CUDA_CHECK(cudaEventDestroy(*e));
            }
            CUDA_CHECK(cudaEventCreateWithFlags(e, cudaEventDisableTiming));
        }
        side.device = ctx.device;
    }
    return side;
}

// The side stream waits for what the main one has been given so far, or the main one for the side stream.
static void wait_for(cudaStream_t stream, cudaStream_t other, cudaEvent_t event) {
    CUDA_CHECK(cudaEventRecord(event, other));
    CUDA_CHECK(cudaStreamWaitEvent(stream, event, 0));
}

// Whether attention behind the writes w takes the newest token as it was before compression.
static bool takes_fresh_token(const ggml_cgraph * graph, const pytq_fresh_token & f) {
    return pytq_cuda_fusion_enabled() && f.attention >= 0 && f.join >= 0 &&
           pytq_cuda_few_rows(nullptr, graph->nodes[f.attention], nullptr, true);
}

static bool in_memory_of(const ggml_backend_cuda_context & ctx, const ggml_tensor * t) {
    return t->buffer && ggml_backend_buffer_get_type(t->buffer) == ggml_backend_cuda_buffer_type(ctx.device);
}

// Whether upstream multiplies by a vector that it rounds to blocks of Q8_1 first. PYTQ_CUDA_Q8_1=0: it always does that
// itself.
static bool takes_q8_1(const ggml_backend_cuda_context & ctx, const ggml_tensor * product) {
    static const bool on = pytq_switch("PYTQ_CUDA_Q8_1");
    const ggml_tensor *w = product->src[0], *x = product->src[1];
    return on && ggml_is_quantized(w->type) && !pytq_is_type(w->type) && in_memory_of(ctx, w) &&
           ggml_backend_buffer_get_usage(w->buffer) == GGML_BACKEND_BUFFER_USAGE_WEIGHTS && x->type == GGML_TYPE_F32 &&
           product->type == GGML_TYPE_F32 && ggml_is_contiguous(x) && ggml_nrows(x) == 1 && x->ne[0] % QK8_1 == 0 &&
           ggml_cuda_should_use_mmvq(w->type, ggml_cuda_info().devices[ctx.device].cc, 1);
}

const void * pytq_cuda_quantized(ggml_backend_cuda_context & ctx, const ggml_tensor * src1) {
    pytq_cuda_side & side = pytq_cuda_side_of(ctx);
    if (src1 == side.result) {
        side.result = nullptr; // nobody else reads it
        return src1->data;
    }
    return side.blocks && src1 == side.shared ? side.blocks->get() : nullptr;
}

// The operand of several products, once for all of them.
static void share_operand(ggml_backend_cuda_context & ctx, pytq_cuda_side & side, const ggml_tensor * x) {
    const int64_t padded = GGML_PAD(x->ne[0], MATRIX_ROW_PADDING);
    ctx.curr_stream_no = 0;
    side.shared = x;
    side.blocks.emplace(ctx.pool(), padded / QK8_1 * sizeof(block_q8_1));
    quantize_row_q8_1_cuda((const float *) x->data, nullptr, side.blocks->get(), GGML_TYPE_Q8_1, x->ne[0], x->ne[0],
                           x->ne[0], x->ne[0], padded, 1, 1, 1, ctx.stream());
}

static void plan_streams(const ggml_backend_cuda_context & ctx, pytq_cuda_side & side, const ggml_cgraph * graph) {
    side.graph = graph, side.first = graph->nodes[0], side.last = graph->nodes[graph->n_nodes - 1];
    side.stream.assign(graph->n_nodes, 0);
    side.forks.clear(), side.tokens.clear();
    for (int i = 0; i < graph->n_nodes; i++) {
        if (!pytq_is_cache_write(graph->nodes[i])) {
            continue;
        }
        const pytq_cache_writes w = pytq_find_cache_writes(graph, i, pytq_cuda_fusion_enabled());
        const pytq_fresh_token f = pytq_find_fresh_token(graph, w);
        if (takes_fresh_token(graph, f)) {
            const pytq_branches b = pytq_cuda_find_branches(graph, w, f, i);
            const auto all_products = [&](const auto & are) { return std::all_of(b.product, b.product + 3, are); };
            const bool beside =
                b.first >= 0 && all_products([&](const ggml_tensor * p) { return in_memory_of(ctx, p->src[0]); });
            const int then = pytq_find_only_product(graph, f.last);
            const ggml_tensor * product = then >= 0 ? graph->nodes[then] : nullptr;
            side.tokens[i] = {w, f, beside,
                              product && graph->nodes[f.last]->ne[0] % QK8_1 == 0 && takes_q8_1(ctx, product)
                                  ? product->src[1]
                                  : nullptr};
            if (beside) {
                const bool share = all_products([&](const ggml_tensor * p) { return takes_q8_1(ctx, p); });
                side.forks[b.first] = share ? b.product[0]->src[1] : nullptr;
                for (int j = b.first; j < i; j++) {
                    side.stream[j] = b.of_keys[j - b.first] ? side_stream_no : 0;
                }
            }
        }
        i = w.last;
    }
}

// Has the side stream start where it does up to node i, and sets the stream of node i.
static void fork_streams(ggml_backend_cuda_context & ctx, pytq_cuda_side & side, int i) {
    for (int j = side.at + 1; j <= i; j++) { // nodes that do nothing are not looked at
        const auto fork = side.forks.find(j);
        if (fork != side.forks.end()) {
            if (fork->second) {
                share_operand(ctx, side, fork->second);
            }
            wait_for(ctx.stream(ctx.device, side_stream_no), ctx.stream(ctx.device, 0), side.fork);
        }
    }
    side.at = i;
    ctx.curr_stream_no = side.stream[i];
}

void pytq_cuda_enter_node(ggml_backend_cuda_context & ctx, pytq_cuda_side & side, const ggml_cgraph * graph, int i) {
    if (i <= side.at || side.graph != graph || (int) side.stream.size() != graph->n_nodes ||
        side.first != graph->nodes[0] || side.last != graph->nodes[graph->n_nodes - 1]) {
        plan_streams(ctx, side, graph);
        side.at = -1, side.result = nullptr;
    }
    fork_streams(ctx, side, i);
    if (side.join >= 0 && i >= side.join) {
        CUDA_CHECK(cudaStreamWaitEvent(ctx.stream(ctx.device, 0), side.done, 0));
        side.join = -1;
    }
}

cudaEvent_t pytq_cuda_begin_write(ggml_backend_cuda_context & ctx, pytq_cuda_side & side, const pytq_cuda_token & t) {
    const cudaStream_t stream = ctx.stream(ctx.device, side_stream_no);
    if (t.beside) {
        CUDA_CHECK(cudaEventRecord(side.ready, stream));
    } else {
        wait_for(stream, ctx.stream(ctx.device, 0), side.fork);
    }
    ctx.curr_stream_no = side_stream_no;
    return t.beside ? side.ready : nullptr;
}

void pytq_cuda_end_write(ggml_backend_cuda_context & ctx, pytq_cuda_side & side, const pytq_cuda_token & t) {
    CUDA_CHECK(cudaEventRecord(side.done, ctx.stream()));
    ctx.curr_stream_no = 0;
    side.join = t.fresh.join;
}

void pytq_cuda_end_attention(pytq_cuda_side & side, const pytq_cuda_token & t) {
    side.blocks.reset();
    side.result = t.operand;
}

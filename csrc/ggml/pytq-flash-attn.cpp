// ggml's side of the attention kernels: turns a FLASH_ATTN_EXT node into a pytq_attn and shares its items among ggml's
// threads.
#include "pytq-flash-attn.h"

#include "cpu/attention.h"
#include "ggml-cpu-impl.h"
#include "ggml-impl.h"
#include "pytq.h"

#include <atomic>
#include <cmath>
#include <cstring>

static bool is_pytq(const ggml_tensor * t) {
    return pytq_type_get((int) t->type) != nullptr;
}

static void copy_float_row(const void * row, float * out, int64_t n) {
    memcpy(out, row, (size_t) n * sizeof(float));
}

static bool describe_kv(const ggml_tensor * t, pytq_attn_kv * kv) {
    kv->data = t->data;
    kv->nb_token = t->nb[1];
    kv->nb_head = t->nb[2];
    kv->nb_stream = t->nb[3];
    kv->type = is_pytq(t) ? (int) t->type : -1;
    kv->to_float = t->type == GGML_TYPE_F32 ? copy_float_row : ggml_get_type_traits(t->type)->to_float;
    return t->nb[0] == ggml_type_size(t->type);
}

// false: not for us
static bool describe(const ggml_tensor * dst, pytq_attn * a) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const ggml_tensor * mask = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];
    memset(a, 0, sizeof(*a));
    a->n_q = (int) q->ne[1];
    a->n_kv = (int) k->ne[1];
    a->n_head = (int) q->ne[2];
    a->n_head_kv = (int) k->ne[2];
    a->n_stream = (int) q->ne[3];
    a->n_stream_kv = (int) k->ne[3];
    a->dk = (int) k->ne[0];
    a->dv = (int) v->ne[0];
    a->q = (const float *) q->data;
    a->q_nb_token = q->nb[1];
    a->q_nb_head = q->nb[2];
    a->q_nb_stream = q->nb[3];
    if (mask) {
        a->mask = (const uint16_t *) mask->data;
        a->mask_nb_token = mask->nb[1];
        a->mask_nb_head = mask->nb[2];
        a->mask_nb_stream = mask->nb[3];
        a->mask_n_head = (int) mask->ne[2];
        a->mask_n_stream = (int) mask->ne[3];
    }
    a->sinks = sinks ? (const float *) sinks->data : nullptr;
    a->dst = (float *) dst->data;
    memcpy(&a->scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&a->max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&a->logit_softcap, (const float *) dst->op_params + 2, sizeof(float));
    return describe_kv(k, &a->k) && describe_kv(v, &a->v) && q->type == GGML_TYPE_F32 && q->nb[0] == sizeof(float) &&
           (!mask || (mask->type == GGML_TYPE_F16 && mask->nb[0] == sizeof(uint16_t))) && v->ne[1] == k->ne[1] &&
           v->ne[2] == k->ne[2] && v->ne[3] == k->ne[3] && q->ne[0] == k->ne[0] && ggml_is_contiguous(dst) &&
           dst->type == GGML_TYPE_F32 && pytq_attn_supported(a);
}

static void say_once(const ggml_tensor * dst) {
    static std::atomic<bool> said{false};
    if (!said.exchange(true)) {
        GGML_LOG_WARN("pytq: no fused CPU attention for K %s (%d) with V %s (%d): upstream's slower path runs\n",
                      ggml_type_name(dst->src[1]->type), (int) dst->src[1]->ne[0], ggml_type_name(dst->src[2]->type),
                      (int) dst->src[2]->ne[0]);
    }
}

size_t pytq_flash_attn_ext_work_size(const ggml_tensor * node, int n_tasks) {
    if (!is_pytq(node->src[1]) && !is_pytq(node->src[2])) {
        return 0;
    }
    pytq_attn a;
    if (!describe(node, &a)) {
        return 0;
    }
    // the plan depends on the number of threads, which may turn out smaller: take the largest
    size_t most = 0;
    for (int n = 1; n <= n_tasks; n++) {
        pytq_attn_plan plan;
        pytq_attn_make_plan(&a, n, &plan);
        const size_t need = n * plan.scratch_bytes + plan.partial_bytes + 64;
        most = need > most ? need : most;
    }
    return most;
}

bool pytq_flash_attn_ext(const ggml_compute_params * params, ggml_tensor * dst) {
    return pytq_flash_attn_ext_rotated(params, dst, nullptr);
}

bool pytq_flash_attn_ext_rotated(const ggml_compute_params * params, ggml_tensor * dst, const ggml_tensor * rotation) {
    if (!is_pytq(dst->src[1]) && !is_pytq(dst->src[2])) {
        return false;
    }
    if (params->use_ref) {
        return false;
    }
    pytq_attn a;
    if (!describe(dst, &a)) {
        say_once(dst);
        return false;
    }
    if (rotation) {
        a.dst = (float *) rotation->data;
        a.rotate = 1;
    }
    pytq_attn_plan plan;
    pytq_attn_make_plan(&a, params->nth, &plan);
    char * base = (char *) params->wdata;
    char * aligned = base + (64 - (uintptr_t) base % 64) % 64;
    GGML_ASSERT(params->nth * plan.scratch_bytes + plan.partial_bytes + 64 <= params->wsize);
    char * scratch = aligned + params->ith * plan.scratch_bytes;
    char * partials = aligned + params->nth * plan.scratch_bytes;

    // Items of a few microseconds are dealt out in turn: that barrier would cost more than a fair share gains.
    const bool brief = (int64_t) plan.block_rows * plan.chunk <= 4096;
    const bool shared = plan.n_items > params->nth && !brief;
    if (shared) {
        if (params->ith == 0) {
            // every thread begins with the item of its own number
            ggml_threadpool_chunk_set(params->threadpool, params->nth);
        }
        ggml_barrier(params->threadpool);
    }
    for (int item = params->ith; item < plan.n_items;
         item = shared ? ggml_threadpool_chunk_add(params->threadpool, 1) : item + params->nth) {
        pytq_attn_item(&a, &plan, item, scratch, partials);
    }
    if (plan.n_chunks > 1) {
        ggml_barrier(params->threadpool);
        pytq_attn_merge(&a, &plan, params->ith, params->nth, partials);
    }
    return true;
}

bool pytq_fwht_node(const ggml_compute_params * params, ggml_tensor * dst) {
    const ggml_tensor * src = dst->src[1];
    if (src->type != GGML_TYPE_F32 || !pytq_fwht_supported(src->ne[0])) {
        return false;
    }
    const int64_t rows = ggml_nrows(src), per_thread = (rows + params->nth - 1) / params->nth;
    const int64_t first = params->ith * per_thread, end = first + per_thread < rows ? first + per_thread : rows;
    const float scale = 1.0f / sqrtf((float) src->ne[0]);
    for (int64_t r = first; r < end; r++) {
        const int64_t i3 = r / (src->ne[1] * src->ne[2]), i2 = r / src->ne[1] % src->ne[2], i1 = r % src->ne[1];
        pytq_fwht((const float *) ((const char *) src->data + i1 * src->nb[1] + i2 * src->nb[2] + i3 * src->nb[3]),
                  (float *) ((char *) dst->data + i1 * dst->nb[1] + i2 * dst->nb[2] + i3 * dst->nb[3]),
                  (int) src->ne[0], scale);
    }
    return true;
}

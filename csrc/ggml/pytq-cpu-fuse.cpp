#include "pytq-cpu-fuse.h"

#include "cpu/attention.h"
#include "ggml-cpu-impl.h"
#include "pytq-flash-attn.h"
#include "pytq-fuse.h"
#include "pytq.h"

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>

// Notes in op_params: behind what any of the three operations uses. A member is what the node that computes a pattern
// does besides itself, as a distance between nodes; 0 is none.
enum slot { FIRST_ROTATION = 10, SECOND_WRITE, SECOND_ROTATION, OTHER_ROTATION, STATE, DONE_BY };
// OTHER_ROTATION: of the queries, for a write; of the result, for attention
static_assert(DONE_BY < GGML_MAX_OP_PARAMS / (int) sizeof(int32_t), "spare op_params");
enum state { NONE, FOUND, CHECKED };

static std::atomic<unsigned long long> left_out_count{0};

static bool enabled() {
    static const bool on = [] {
        const char *own = getenv("PYTQ_CPU_FUSE"), *all = getenv("GGML_CPU_DISABLE_FUSION");
        return (!own || strcmp(own, "0") != 0) && (!all || atoi(all) != 1);
    }();
    return on;
}

static bool may_carry_notes(const ggml_tensor * t) {
    return t->op == GGML_OP_MUL_MAT || t->op == GGML_OP_SET_ROWS || t->op == GGML_OP_FLASH_ATTN_EXT;
}

// The node at the noted distance from node i, or null if there is none in this graph.
static ggml_tensor * noted(const ggml_cgraph * graph, int i, slot s) {
    const int distance = graph->nodes[i]->op_params[s], j = i + distance;
    return distance != 0 && j >= 0 && j < graph->n_nodes ? graph->nodes[j] : nullptr;
}

// Whether all that node i computes with itself is in this graph.
static bool is_whole(const ggml_cgraph * graph, int i) {
    for (int s = FIRST_ROTATION; s <= OTHER_ROTATION; s++) {
        if (graph->nodes[i]->op_params[s] != 0) {
            const ggml_tensor * t = noted(graph, i, (slot) s);
            if (!t || t->op_params[DONE_BY] != -graph->nodes[i]->op_params[s]) {
                return false;
            }
        }
    }
    return true;
}

static void clear_notes(ggml_tensor * t) {
    memset(t->op_params + FIRST_ROTATION, 0, (DONE_BY + 1 - FIRST_ROTATION) * sizeof(int32_t));
}

static int index_of(const ggml_cgraph * graph, const ggml_tensor * t, int around) {
    for (int i = around - PYTQ_FUSE_WINDOW; i <= around + PYTQ_FUSE_WINDOW; i++) {
        if (i >= 0 && i < graph->n_nodes && graph->nodes[i] == t) {
            return i;
        }
    }
    GGML_ABORT("pytq: a node of a pattern is not near it");
}

static void note(ggml_cgraph * graph, int i, slot s, const ggml_tensor * member) {
    if (member) {
        const int j = index_of(graph, member, i);
        graph->nodes[i]->op_params[s] = j - i;
        graph->nodes[j]->op_params[DONE_BY] = i - j;
    }
}

// Notes what node i computes, as far as the graph and its memory allow it now; returns how many other nodes.
static int note_pattern(ggml_cgraph * graph, int i, state found, const ggml_backend_graph_optimize_params * params) {
    ggml_tensor * node = graph->nodes[i];
    if (node->op == GGML_OP_FLASH_ATTN_EXT) {
        const int r = pytq_flash_attn_ext_work_size(node, 1) > 0 ? pytq_find_rotated_output(graph, i) : -1;
        if (r < 0) {
            return 0;
        }
        note(graph, i, OTHER_ROTATION, graph->nodes[r]);
        if (params) {
            pytq_keep_operands(graph, i, r, params);
        }
    } else {
        const pytq_cache_writes w = pytq_find_cache_writes(graph, i, true);
        for (int k = 0; k < w.n_writes; k++) {
            const ggml_tensor *rows = w.write[k].set_rows->src[0], *index = w.write[k].set_rows->src[1];
            if (rows->type != GGML_TYPE_F32 || rows->nb[0] != sizeof(float) ||
                (index->type != GGML_TYPE_I64 && index->type != GGML_TYPE_I32)) {
                return 0;
            }
        }
        note(graph, i, FIRST_ROTATION, w.write[0].rotation);
        note(graph, i, SECOND_WRITE, w.write[1].set_rows);
        note(graph, i, SECOND_ROTATION, w.write[1].rotation);
        note(graph, i, OTHER_ROTATION, w.queries);
        if (params) {
            pytq_keep_operands(graph, w, params);
        }
    }
    node->op_params[STATE] = found;
    int members = 0;
    for (int s = FIRST_ROTATION; s <= OTHER_ROTATION; s++) {
        members += node->op_params[s] != 0;
    }
    return members;
}

void pytq_cpu_graph_optimize(ggml_backend *, ggml_cgraph * graph, ggml_backend_graph_optimize_params * params) {
    for (int i = 0; i < graph->n_nodes; i++) {
        if (may_carry_notes(graph->nodes[i])) {
            clear_notes(graph->nodes[i]);
        }
    }
    for (int i = 0; i < graph->n_nodes && enabled(); i++) {
        ggml_tensor * node = graph->nodes[i];
        const bool first_write = pytq_is_cache_write(node) && node->op_params[DONE_BY] == 0;
        if (first_write || node->op == GGML_OP_FLASH_ATTN_EXT) {
            note_pattern(graph, i, FOUND, params);
        }
    }
}

void pytq_cpu_check_fusion(ggml_cgraph * graph) {
    for (int i = 0; i < graph->n_nodes; i++) {
        ggml_tensor * node = graph->nodes[i];
        if ((node->op != GGML_OP_SET_ROWS && node->op != GGML_OP_FLASH_ATTN_EXT) || node->op_params[STATE] != FOUND ||
            !is_whole(graph, i)) {
            continue;
        }
        int before = 0;
        for (int s = FIRST_ROTATION; s <= OTHER_ROTATION; s++) {
            if (ggml_tensor * member = noted(graph, i, (slot) s)) {
                member->op_params[DONE_BY] = 0;
                before++;
            }
        }
        clear_notes(node);
        if (note_pattern(graph, i, CHECKED, nullptr) < before) {
            GGML_LOG_WARN("pytq: the operands at %s are not kept, so a rotation runs as a step of its own\n",
                          node->name);
        }
    }
}

bool pytq_cpu_is_left_out(const ggml_compute_params * params, const ggml_cgraph * graph, int i) {
    const ggml_tensor * node = graph->nodes[i];
    if (node->op != GGML_OP_MUL_MAT && node->op != GGML_OP_SET_ROWS) {
        return false;
    }
    const ggml_tensor * by = params->use_ref ? nullptr : noted(graph, i, DONE_BY);
    if (!by || by->op_params[STATE] != CHECKED || !is_whole(graph, i + node->op_params[DONE_BY])) {
        return false;
    }
    if (params->ith == 0) {
        left_out_count.fetch_add(1, std::memory_order_relaxed);
    }
    return true;
}

// Head vectors first .. end of one write, in the order of its rows.
static void write_vectors(const ggml_tensor * dst, const ggml_tensor * rotation, int64_t first, int64_t end) {
    const ggml_tensor *src = dst->src[0], *index = dst->src[1];
    const pytq_type_info * t = pytq_type_get((int) dst->type);
    const int64_t d = t->head_dim, per_row = src->ne[0] / d;
    for (int64_t v = first, n; v < end; v += n) {
        const int64_t row = v / per_row, at = v % per_row;
        n = per_row - at < end - v ? per_row - at : end - v;
        const int64_t i1 = row % src->ne[1], i2 = row / src->ne[1] % src->ne[2], i3 = row / (src->ne[1] * src->ne[2]);
        const char * where = (const char *) index->data + i1 * index->nb[0] + i2 % index->ne[1] * index->nb[1] +
                             i3 % index->ne[2] * index->nb[2];
        const int64_t to = index->type == GGML_TYPE_I64 ? *(const int64_t *) where : *(const int32_t *) where;
        GGML_ASSERT(to >= 0 && to < dst->ne[1]);
        char * out = (char *) dst->data + to * dst->nb[1] + i2 * dst->nb[2] + i3 * dst->nb[3] + at * t->block_bytes;
        if (rotation) {
            const float * x = (const float *) rotation->src[1]->data + v * d;
            pytq_quantize_rotated(t, x, out, n * d);
        } else {
            const char * x = (const char *) src->data + i1 * src->nb[1] + i2 * src->nb[2] + i3 * src->nb[3];
            pytq_quantize(t, (const float *) x + at * d, out, n * d);
        }
    }
}

static void write_cache(const ggml_compute_params * params, const ggml_cgraph * graph, int i) {
    const ggml_tensor * dst[2] = {graph->nodes[i], noted(graph, i, SECOND_WRITE)};
    const ggml_tensor * rotation[2] = {noted(graph, i, FIRST_ROTATION), noted(graph, i, SECOND_ROTATION)};
    const ggml_tensor * queries = noted(graph, i, OTHER_ROTATION);
    const int64_t ith = params->ith, nth = params->nth, back = nth - 1 - ith;
    int64_t n[2] = {0, 0};
    for (int k = 0; k < 2 && dst[k]; k++) {
        n[k] = ggml_nelements(dst[k]->src[0]) / pytq_type_get((int) dst[k]->type)->head_dim;
    }
    const bool alike = !dst[1] || pytq_type_get((int) dst[0]->type)->code == pytq_type_get((int) dst[1]->type)->code;
    if (alike) {
        // one row of vectors: a token's keys on one half of the threads, its values on the other
        const int64_t all = n[0] + n[1], first = all * ith / nth, end = all * (ith + 1) / nth;
        write_vectors(dst[0], rotation[0], first, end < n[0] ? end : n[0]);
        if (end > n[0]) {
            write_vectors(dst[1], rotation[1], first > n[0] ? first - n[0] : 0, end - n[0]);
        }
    } else {
        // one takes much longer than the other
        write_vectors(dst[0], rotation[0], n[0] * ith / nth, n[0] * (ith + 1) / nth);
        write_vectors(dst[1], rotation[1], n[1] * back / nth, n[1] * (back + 1) / nth);
    }
    if (queries) {
        const int64_t d = queries->ne[0], rows = ggml_nrows(queries);
        for (int64_t r = rows * back / nth; r < rows * (back + 1) / nth; r++) {
            pytq_fwht((const float *) queries->src[1]->data + r * d, (float *) queries->data + r * d, (int) d,
                      1.0f / sqrtf((float) d));
        }
    }
}

bool pytq_cpu_compute_fused(const ggml_compute_params * params, const ggml_cgraph * graph, int i) {
    ggml_tensor * node = graph->nodes[i];
    if ((node->op != GGML_OP_SET_ROWS && node->op != GGML_OP_FLASH_ATTN_EXT) || params->use_ref ||
        node->op_params[STATE] != CHECKED || !is_whole(graph, i)) {
        return false;
    }
    if (node->op == GGML_OP_SET_ROWS) {
        write_cache(params, graph, i);
        return true;
    }
    const bool taken = pytq_flash_attn_ext_rotated(params, node, noted(graph, i, OTHER_ROTATION));
    GGML_ASSERT(taken); // it was when the pattern was found, and the rotation is left out
    return true;
}

unsigned long long pytq_cpu_left_out_count(void) {
    return left_out_count.load(std::memory_order_relaxed);
}

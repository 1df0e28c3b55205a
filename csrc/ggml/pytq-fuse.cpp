#include "pytq-fuse.h"

#include "pytq.h"

#include <algorithm>
#include <unordered_map>

static bool is_view(const ggml_tensor * t) {
    return t->op == GGML_OP_RESHAPE || t->op == GGML_OP_VIEW || t->op == GGML_OP_PERMUTE || t->op == GGML_OP_TRANSPOSE;
}

static bool does_nothing(const ggml_tensor * t) {
    return t->op == GGML_OP_NONE || is_view(t);
}

// The first node from i on that does something; n_nodes if there is none.
static int next_node(const ggml_cgraph * graph, int i) {
    while (i < graph->n_nodes && does_nothing(graph->nodes[i])) {
        i++;
    }
    return i;
}

static const ggml_tensor * behind_views(const ggml_tensor * t) {
    while (t && is_view(t)) {
        t = t->src[0];
    }
    return t;
}

static int uses(const ggml_cgraph * graph, const ggml_tensor * t) {
    const size_t at = ggml_hash_find(&graph->visited_hash_set, t);
    return at != GGML_HASHSET_FULL && ggml_bitset_get(graph->visited_hash_set.used, at) ? graph->use_counts[at] : 0;
}

// Whether t is all of root's data in order and nobody else uses root or the views between.
static bool only_use(const ggml_cgraph * graph, const ggml_tensor * t, const ggml_tensor * root) {
    if (!ggml_is_contiguous(t) || !ggml_is_contiguous(root) || ggml_nelements(t) != ggml_nelements(root) ||
        (t != root && t->view_offs != root->view_offs)) {
        return false;
    }
    for (;; t = t->src[0]) {
        if (uses(graph, t) != 1 || (t->flags & GGML_TENSOR_FLAG_OUTPUT)) {
            return false;
        }
        if (t == root) {
            return true;
        }
    }
}

bool pytq_is_rotation(const ggml_tensor * t) {
    return t->op == GGML_OP_MUL_MAT && ggml_get_op_params_i32(t, 1) == GGML_HINT_SRC0_IS_HADAMARD &&
           t->type == GGML_TYPE_F32 && t->src[1]->type == GGML_TYPE_F32 && ggml_is_contiguous(t) &&
           ggml_is_contiguous(t->src[1]) && ggml_are_same_shape(t, t->src[1]) &&
           (t->ne[0] == 64 || t->ne[0] == 128 || t->ne[0] == 256);
}

static bool overlap(const ggml_tensor * a, const ggml_tensor * b) {
    const char *pa = (const char *) a->data, *pb = (const char *) b->data;
    return pa && pb && pa < pb + ggml_nbytes(b) && pb < pa + ggml_nbytes(a);
}

static int index_before(const ggml_cgraph * graph, const ggml_tensor * t, int end) {
    for (int i = end - 1; i >= 0 && i >= end - PYTQ_FUSE_WINDOW; i--) {
        if (graph->nodes[i] == t) {
            return i;
        }
    }
    return -1;
}

bool pytq_is_cache_write(const ggml_tensor * t) {
    return t->op == GGML_OP_SET_ROWS && pytq_is_type(t->type) && (t->flags & GGML_TENSOR_FLAG_COMPUTE);
}

// Whether the operand of a rotation is still what it was when node `end` runs.
static bool operand_lives(const ggml_cgraph * graph, const pytq_cache_writes & w, const ggml_tensor * rotation,
                          int end) {
    for (int i = index_before(graph, rotation, end) + 1; i < end; i++) {
        const ggml_tensor * t = graph->nodes[i];
        if (!does_nothing(t) && !w.leaves_out(t) && overlap(t, rotation->src[1])) {
            return false;
        }
    }
    return true;
}

pytq_cache_writes pytq_find_cache_writes(const ggml_cgraph * graph, int i, bool rotations) {
    pytq_cache_writes w = {};
    w.write[w.n_writes++].set_rows = graph->nodes[i];
    w.last = i;
    const int j = next_node(graph, i + 1);
    if (j < graph->n_nodes && pytq_is_cache_write(graph->nodes[j]) &&
        graph->nodes[j]->view_src != graph->nodes[i]->view_src) {
        w.write[w.n_writes++].set_rows = graph->nodes[j];
        w.last = j;
    }
    if (!rotations) {
        return w;
    }
    for (int k = 0; k < w.n_writes; k++) {
        const ggml_tensor * src = w.write[k].set_rows->src[0];
        const ggml_tensor * r = behind_views(src);
        if (pytq_is_rotation(r) && r->ne[0] == ggml_blck_size(w.write[k].set_rows->type) &&
            index_before(graph, r, i) >= 0 && only_use(graph, src, r)) {
            w.write[k].rotation = r;
        }
    }
    // the last rotation before the write whose result nothing up to the write needs: the queries
    for (int q = i - 1; q >= 0 && q >= i - PYTQ_FUSE_WINDOW && !pytq_is_cache_write(graph->nodes[q]) && !w.queries;
         q--) {
        const ggml_tensor * r = graph->nodes[q];
        bool later = pytq_is_rotation(r) && (r->flags & GGML_TENSOR_FLAG_COMPUTE) && !w.leaves_out(r);
        for (int k = q + 1; k <= w.last && later; k++) {
            for (int s = 0; s < GGML_MAX_SRC && !does_nothing(graph->nodes[k]); s++) {
                later = later && (!graph->nodes[k]->src[s] || behind_views(graph->nodes[k]->src[s]) != r);
            }
        }
        w.queries = later ? r : nullptr;
    }
    // dropping one rotation makes it run where it stands, which may spoil another's operand
    for (bool again = true; again;) {
        again = false;
        for (pytq_cache_write & k : w.write) {
            if (k.rotation && !operand_lives(graph, w, k.rotation, i)) {
                k.rotation = nullptr, again = true;
            }
        }
        bool keep = w.queries && operand_lives(graph, w, w.queries, i) && !overlap(w.queries, w.queries->src[1]);
        for (const pytq_cache_write & k : w.write) {
            keep = keep && (!k.set_rows || !overlap(w.queries, k.rotation ? k.rotation->src[1] : k.set_rows->src[0]));
        }
        if (w.queries && !keep) {
            w.queries = nullptr, again = true;
        }
    }
    return w;
}

int pytq_find_rotated_output(const ggml_cgraph * graph, int i) {
    const ggml_tensor * node = graph->nodes[i];
    if (node->op != GGML_OP_FLASH_ATTN_EXT) {
        return -1;
    }
    const int j = next_node(graph, i + 1);
    const ggml_tensor * r = j < graph->n_nodes ? graph->nodes[j] : nullptr;
    if (!r || !pytq_is_rotation(r) || !(r->flags & GGML_TENSOR_FLAG_COMPUTE) || r->ne[0] != node->ne[0] ||
        behind_views(r->src[1]) != node || !only_use(graph, r->src[1], node)) {
        return -1;
    }
    for (int s = 0; s < GGML_MAX_SRC; s++) {
        if (node->src[s] && overlap(r, node->src[s])) {
            return -1;
        }
    }
    return j;
}

int pytq_find_only_product(const ggml_cgraph * graph, int i) {
    const ggml_tensor * node = graph->nodes[i];
    const int j = next_node(graph, i + 1);
    const ggml_tensor * p = j + 1 < graph->n_nodes ? graph->nodes[j] : nullptr;
    return p && p->op == GGML_OP_MUL_MAT && (p->flags & GGML_TENSOR_FLAG_COMPUTE) && ggml_nrows(p->src[1]) == 1 &&
                   behind_views(p->src[1]) == node && only_use(graph, p->src[1], node)
               ? j
               : -1;
}

static const ggml_tensor * cache_of(const ggml_tensor * t) {
    return t->view_src ? t->view_src : t;
}

// Whether w writes one row that holds a token of all heads of the cache tensor t, a view [d, n_kv, n_head].
static bool writes_one_token_of(const pytq_cache_write & w, const ggml_tensor * t) {
    const ggml_tensor * dst = w.set_rows;
    const ggml_tensor * src = dst->src[0];
    return cache_of(dst) == cache_of(t) && dst->type == t->type && ggml_nrows(src) == 1 && src->type == GGML_TYPE_F32 &&
           ggml_is_contiguous(src) && ggml_nelements(dst->src[1]) == 1 && dst->ne[2] * dst->ne[3] == 1 &&
           src->ne[0] == t->ne[0] * t->ne[2] && t->ne[3] == 1 && dst->nb[1] == t->nb[1] &&
           t->nb[2] == ggml_row_size(t->type, t->ne[0]) && t->view_offs >= dst->view_offs &&
           (t->view_offs - dst->view_offs) % t->nb[1] == 0;
}

pytq_fresh_token pytq_find_fresh_token(const ggml_cgraph * graph, const pytq_cache_writes & w) {
    pytq_fresh_token f = {-1, -1, false, nullptr, nullptr, nullptr, nullptr, -1, 0, 0};
    const int i = next_node(graph, w.last + 1);
    if (w.n_writes != 2 || i == graph->n_nodes || graph->nodes[i]->op != GGML_OP_FLASH_ATTN_EXT ||
        !(graph->nodes[i]->flags & GGML_TENSOR_FLAG_COMPUTE)) {
        return f;
    }
    const ggml_tensor * node = graph->nodes[i];
    ggml_tensor *q = node->src[0], *k = node->src[1], *v = node->src[2];
    const int of_k = cache_of(w.write[0].set_rows) == cache_of(k) ? 0 : 1;
    const pytq_cache_write &wk = w.write[of_k], &wv = w.write[1 - of_k];
    if (q->ne[1] * q->ne[3] != 1 || !writes_one_token_of(wk, k) || !writes_one_token_of(wv, v)) {
        return f;
    }
    // keys and queries in one basis, values and the result in another
    const bool turned = w.queries && behind_views(q) == w.queries && only_use(graph, q, w.queries);
    const int r = pytq_find_rotated_output(graph, i);
    ggml_tensor *rows_k = wk.set_rows->src[1], *rows_v = wv.set_rows->src[1];
    const int64_t first = (int64_t) ((k->view_offs - wk.set_rows->view_offs) / k->nb[1]);
    if ((w.queries && !turned) || turned != (wk.rotation != nullptr) || (r >= 0) != (wv.rotation != nullptr) ||
        rows_k->type != rows_v->type || first != (int64_t) ((v->view_offs - wv.set_rows->view_offs) / v->nb[1])) {
        return f;
    }
    f = {i,
         r >= 0 ? r : i,
         turned,
         turned ? w.queries->src[1] : q,
         turned ? wk.rotation->src[1] : wk.set_rows->src[0],
         wv.rotation ? wv.rotation->src[1] : wv.set_rows->src[0],
         rows_k,
         -1,
         of_k,
         first};
    for (const ggml_tensor * t : {f.q, f.k, f.v, f.rows}) { // read until the result is stored
        if (overlap(graph->nodes[f.last], t)) {
            f.attention = -1;
        }
    }
    // The third product behind attention if nothing touches this cache before, else the second: by then even the
    // slowest encoder is done. Products of one operand (gate and up) count as one, since they may run as one launch
    // with what follows, where nothing waits in between.
    const auto touches = [&](const ggml_tensor * t) {
        return t && (cache_of(t) == cache_of(k) || cache_of(t) == cache_of(v));
    };
    int products = 0;
    const ggml_tensor * operand = nullptr;
    for (int j = f.last + 1; j < graph->n_nodes && products < 3; j++) {
        const ggml_tensor * t = graph->nodes[j];
        if (pytq_is_cache_write(t) || (!does_nothing(t) && std::any_of(t->src, t->src + GGML_MAX_SRC, touches))) {
            break;
        }
        if (t->op == GGML_OP_MUL_MAT || t->op == GGML_OP_MUL_MAT_ID) {
            const bool first = t->src[1] != operand;
            products += first;
            operand = t->src[1];
            if (products >= 2 && first && (t->flags & GGML_TENSOR_FLAG_COMPUTE)) {
                f.join = j;
            }
        }
    }
    for (int j = i; j < f.join; j++) {
        const ggml_tensor * t = graph->nodes[j];
        if (!does_nothing(t) && (overlap(t, f.k) || overlap(t, f.v) || overlap(t, f.rows))) {
            f.join = -1;
        }
    }
    return f;
}

// The product of x that t is made from by rope, norms, sums and products by small matrices, or null. x null: the last
// product that is no rotation.
static const ggml_tensor * product_behind(const ggml_tensor * t, const ggml_tensor * x) {
    for (int steps = 0; steps < 16; steps++) {
        t = behind_views(t);
        switch (t ? t->op : GGML_OP_NONE) {
            case GGML_OP_MUL_MAT:
                if (!pytq_is_rotation(t) && (!x || t->src[1] == x)) {
                    return t;
                }
                t = t->src[1];
                break;
            case GGML_OP_ROPE:
            case GGML_OP_RMS_NORM:
            case GGML_OP_NORM:
            case GGML_OP_MUL:
            case GGML_OP_ADD:
            case GGML_OP_SCALE:
                t = t->src[0];
                break;
            default:
                return nullptr;
        }
    }
    return nullptr;
}

pytq_branches pytq_find_branches(const ggml_cgraph * graph, const pytq_cache_writes & w, const pytq_fresh_token & f,
                                 int i) {
    pytq_branches b;
    const ggml_tensor * values = product_behind(f.v, nullptr);
    const ggml_tensor * const x = values ? values->src[1] : nullptr;
    b.product[0] = product_behind(f.q, x), b.product[1] = product_behind(f.k, x), b.product[2] = values;
    int first = i;
    for (const ggml_tensor * p : b.product) {
        const int at = p ? index_before(graph, p, i) : -1;
        if (at < 0) {
            return b;
        }
        first = std::min(first, at);
    }
    std::unordered_map<const ggml_tensor *, bool> of_keys;
    for (int n = 0; n < 3; n++) {
        of_keys[b.product[n]] = n > 0;
    }
    if (of_keys.size() < 2 || b.product[0] == b.product[1] || b.product[0] == b.product[2]) {
        return b;
    }
    b.of_keys.assign(i - first, false);
    for (int j = first; j < i; j++) {
        const ggml_tensor * t = graph->nodes[j];
        if (does_nothing(t) || !(t->flags & GGML_TENSOR_FLAG_COMPUTE)) {
            continue;
        }
        for (const ggml_tensor * src : t->src) {
            const auto from = of_keys.find(behind_views(src));
            if (!src || from == of_keys.end()) {
                continue;
            }
            const bool belongs = from->second;
            if (of_keys.emplace(t, belongs).first->second != belongs) {
                return b; // to both
            }
        }
        const auto at = of_keys.find(t);
        if (at == of_keys.end()) {
            return b; // to none
        }
        b.of_keys[j - first] = at->second;
    }
    // what one of them writes, the other neither writes nor reads
    const auto runs = [&](int j) { return !does_nothing(graph->nodes[j]) && !w.leaves_out(graph->nodes[j]); };
    for (int j = first; j < i; j++) {
        for (int k = first; k < i; k++) {
            const ggml_tensor *t = graph->nodes[j], *other = graph->nodes[k];
            if (b.of_keys[j - first] == b.of_keys[k - first] || !runs(j) || !runs(k)) {
                continue;
            }
            if (overlap(t, other) || std::any_of(other->src, other->src + GGML_MAX_SRC,
                                                 [&](const ggml_tensor * src) { return src && overlap(t, src); })) {
                return b;
            }
        }
    }
    b.first = first;
    return b;
}

bool pytq_move_values_down(ggml_cgraph * graph, const pytq_cache_writes & w, const pytq_fresh_token & f, int i) {
    int rope = i - 1;
    while (rope >= 0 && (does_nothing(graph->nodes[rope]) || w.leaves_out(graph->nodes[rope]))) {
        rope--;
    }
    const ggml_tensor * product = behind_views(f.v);
    const int from = index_before(graph, product, rope);
    if (rope < 0 || graph->nodes[rope]->op != GGML_OP_ROPE || from < 0 || product->op != GGML_OP_MUL_MAT) {
        return false;
    }
    // with it go its views and its rotation
    const auto moves = [&](const ggml_tensor * t) {
        const ggml_tensor * root = behind_views(t);
        return root == product ||
               (root && w.leaves_out(root) && root != w.queries && behind_views(root->src[1]) == product);
    };
    for (int j = from; j <= rope; j++) {
        for (const ggml_tensor * src : graph->nodes[j]->src) {
            if (src && !moves(graph->nodes[j]) && moves(src)) {
                return false;
            }
        }
    }
    std::stable_partition(graph->nodes + from, graph->nodes + rope + 1,
                          [&](const ggml_tensor * t) { return !moves(t); });
    return true;
}

void pytq_keep_operands(const ggml_cgraph * graph, const pytq_cache_writes & w,
                        const ggml_backend_graph_optimize_params * params) {
    for (const ggml_tensor * r : {w.queries, w.write[0].rotation, w.write[1].rotation}) {
        if (r) {
            params->add_alloc_dep(params->user_data, r->src[1], graph->nodes[w.last]);
        }
    }
}

void pytq_keep_operands(const ggml_cgraph * graph, int i, int r, const ggml_backend_graph_optimize_params * params) {
    for (int s : {0, 3, 4}) { // queries, mask, sinks
        if (graph->nodes[i]->src[s]) {
            params->add_alloc_dep(params->user_data, graph->nodes[i]->src[s], graph->nodes[r]);
        }
    }
}

void pytq_keep_operands(const ggml_cgraph * graph, const pytq_fresh_token & f,
                        const ggml_backend_graph_optimize_params * params) {
    for (ggml_tensor * t : {f.q, f.k, f.v, f.rows}) {
        params->add_alloc_dep(params->user_data, t, graph->nodes[t != f.q && f.join >= 0 ? f.join : f.last]);
    }
}

void pytq_keep_operands(const ggml_cgraph * graph, const pytq_fresh_token & f, const pytq_branches & b,
                        const ggml_backend_graph_optimize_params * params) {
    if (b.first < 0) {
        return;
    }
    // what one side writes must not lie where their common operand lay, which the other may still read
    params->add_alloc_dep(params->user_data, b.product[0]->src[1], graph->nodes[f.attention]);
    for (size_t n = 0; n < b.of_keys.size(); n++) {
        ggml_tensor * t = graph->nodes[b.first + n];
        if (!b.of_keys[n] && !does_nothing(t)) {
            params->add_alloc_dep(params->user_data, t, graph->nodes[f.attention]);
        }
    }
}

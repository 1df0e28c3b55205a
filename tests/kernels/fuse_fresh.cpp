// One attention layer as llama.cpp builds it for one token, and layers that differ from it in one thing each. Prints, a
// line a case, what pytq_find_fresh_token and the searches around it find, which tensors are to be kept and what
// pytq_move_values_down does to the order of the nodes.
#include "pytq-fuse.h"
#include "pytq.h"

#include <algorithm>
#include <cstdio>
#include <string>
#include <string>
#include <vector>

static constexpr int D = 64, HEADS = 4, KV_HEADS = 2, EMBD = D * HEADS, CELLS = 48, N_KV = 32;

struct variant {
    const char * name;
    int tokens = 1, sequences = 1, streams = 1, first_stream = 0;
    bool turn_queries = true, turn_keys = true, turn_values = true, turn_result = true, by_profile = false;
    bool values_written_first = false, one_write = false, keys_last = true;
    bool query_elsewhere = false, stands_between = false, bias = false, product_used_between = false,
         product_used_later = false, norm_behind_rope = false;
    bool other_row_types = false, other_streams = false, write_before_second_product = false;
    bool result_over_keys = false, keys_overwritten_before_write = false, values_overwritten_before_join = false,
         rows_overwritten_before_join = false, gate_and_up_first = false, gate_and_up_last = false,
         cache_read_again = false, unrelated = false, of_both = false, keys_over_queries = false;
    bool result_used_twice = false, product_last = false;
    int products = 3;
};

static ggml_tensor * named(ggml_tensor * t, const char * name) {
    ggml_set_name(t, name);
    return t;
}

static const char * root(const ggml_tensor * t) {
    while (t && (t->op == GGML_OP_RESHAPE || t->op == GGML_OP_VIEW || t->op == GGML_OP_PERMUTE)) {
        t = t->src[0];
    }
    return t ? t->name : "-";
}

static ggml_tensor * turn(ggml_context * ctx, ggml_tensor * t, ggml_tensor * h, const char * by_profile = nullptr) {
    ggml_tensor * r = ggml_mul_mat(ctx, h, ggml_reshape_2d(ctx, t, D, ggml_nelements(t) / D));
    if (by_profile) { // any matrix
        ggml_set_name(r, by_profile);
    } else {
        ggml_mul_mat_set_hint(r, GGML_HINT_SRC0_IS_HADAMARD);
    }
    return ggml_reshape_4d(ctx, r, t->ne[0], t->ne[1], t->ne[2], t->ne[3]);
}

static ggml_tensor * product(ggml_context * ctx, ggml_tensor * x, int n, const char * name) {
    return named(ggml_mul_mat(ctx, ggml_new_tensor_2d(ctx, GGML_TYPE_F32, x->ne[0], n), x), name);
}

struct layer {
    ggml_cgraph * graph;
    ggml_tensor *values_product, *rope;
};

static layer build(ggml_context * ctx, const variant & o) {
    const int n = o.tokens * o.sequences;
    const auto type = (ggml_type) pytq_type_from_name("kv4_d64");
    ggml_cgraph * graph = ggml_new_graph_custom(ctx, 256, false);
    const auto add = [&](ggml_tensor * t) { ggml_build_forward_expand(graph, t); };
    ggml_tensor * h = ggml_new_tensor_2d(ctx, GGML_TYPE_F32, D, D);
    ggml_tensor * x = named(ggml_new_tensor_2d(ctx, GGML_TYPE_F32, EMBD, n), "x");
    ggml_tensor * positions = ggml_new_tensor_1d(ctx, GGML_TYPE_I32, n);
    ggml_tensor * rows_k = named(ggml_new_tensor_1d(ctx, GGML_TYPE_I64, n), "rows_k");
    ggml_tensor * rows_v = ggml_new_tensor_1d(ctx, o.other_row_types ? GGML_TYPE_I32 : GGML_TYPE_I64, n);
    ggml_tensor *cache_k = ggml_new_tensor_3d(ctx, type, D * KV_HEADS, CELLS, o.streams),
                *cache_v = ggml_new_tensor_3d(ctx, type, D * KV_HEADS, CELLS, o.streams);

    const auto rope = [&](ggml_tensor * t, const char * name) {
        return named(ggml_rope(ctx, t, positions, D, 0), name);
    };
    ggml_tensor * wq = product(ctx, x, EMBD, "Wq");
    ggml_tensor * q = rope(ggml_reshape_3d(ctx, wq, D, HEADS, n), "rope_q");
    ggml_tensor * wv = product(ctx, x, D * KV_HEADS, "Wv");
    ggml_tensor * v = o.bias ? named(ggml_add(ctx, wv, ggml_new_tensor_1d(ctx, GGML_TYPE_F32, wv->ne[0])), "bias") : wv;
    v = ggml_reshape_3d(ctx, v, D, KV_HEADS, n);
    ggml_tensor * wk = product(ctx, x, D * KV_HEADS, "Wk");
    if (o.keys_over_queries) {
        wk->data = wq->data;
    }
    ggml_tensor * roped = rope(ggml_reshape_3d(ctx, wk, D, KV_HEADS, n), "rope_k");
    ggml_tensor * k = o.norm_behind_rope ? named(ggml_rms_norm(ctx, roped, 1e-5f), "norm") : roped;
    ggml_tensor *k_plain = k, *v_plain = v;
    if (o.turn_queries) {
        q = turn(ctx, q, h, o.by_profile ? "profile_q" : nullptr);
    }
    if (o.turn_keys) {
        k = turn(ctx, k, h, o.by_profile ? "profile_k" : nullptr);
    }
    if (o.turn_values) {
        v = turn(ctx, v, h);
    }
    add(q);
    if (o.keys_last) {
        add(v);
    }
    if (o.product_used_between) {
        add(named(ggml_scale(ctx, wv, 2.0f), "between"));
    }
    if (o.unrelated) {
        add(ggml_scale(ctx, ggml_new_tensor_1d(ctx, GGML_TYPE_F32, 8), 2.0f));
    }
    if (o.of_both) {
        add(ggml_add(ctx, wv, ggml_view_2d(ctx, wq, wv->ne[0], n, wq->nb[1], 0)));
    }
    add(k);
    add(v);
    if (o.keys_overwritten_before_write) {
        ggml_tensor * t = ggml_scale(ctx, x, 2.0f);
        t->data = k_plain->data;
        add(t);
    }

    const auto write = [&](ggml_tensor * cache, ggml_tensor * t, ggml_tensor * rows) {
        if (o.streams > 1) {
            cache = ggml_reshape_2d(ctx, cache, D * KV_HEADS, CELLS * o.streams);
        }
        add(ggml_set_rows(ctx, cache, ggml_view_2d(ctx, t, D * KV_HEADS, n, t->nb[2], 0), rows));
    };
    if (o.values_written_first) {
        write(cache_v, v, rows_v);
    }
    write(cache_k, k, rows_k);
    if (!o.values_written_first && !o.one_write) {
        write(cache_v, v, rows_v);
    }
    if (o.stands_between) {
        add(ggml_scale(ctx, x, 2.0f));
    }

    const auto seen = [&](ggml_tensor * cache, int first) {
        const size_t row = ggml_row_size(type, D * KV_HEADS);
        return ggml_permute(ctx,
                            ggml_view_4d(ctx, cache, D, KV_HEADS, N_KV, o.sequences, ggml_row_size(type, D), row,
                                         row * CELLS, row * CELLS * first),
                            0, 2, 1, 3);
    };
    ggml_tensor * q4 =
        ggml_view_4d(ctx, q, D, HEADS, o.tokens, o.sequences, q->nb[1], q->nb[2], q->nb[2] * o.tokens, 0);
    ggml_tensor * attention = ggml_flash_attn_ext(
        ctx, ggml_permute(ctx, o.sequences > 1 ? q4 : q, 0, 2, 1, 3), seen(cache_k, o.first_stream),
        seen(cache_v, o.other_streams ? o.first_stream + 1 : o.first_stream), nullptr, 0.125f, 0.0f, 0.0f);
    named(attention, "attention");
    ggml_tensor * result = ggml_reshape_2d(ctx, attention, EMBD, n);
    if (o.turn_result) {
        result = ggml_mul_mat(ctx, h, ggml_reshape_2d(ctx, result, D, HEADS * n));
        ggml_mul_mat_set_hint(result, GGML_HINT_SRC0_IS_HADAMARD);
        named(result, "turned_back");
        if (o.result_over_keys) {
            result->data = k_plain->data;
        }
        result = ggml_reshape_2d(ctx, result, EMBD, n);
    } else if (o.result_over_keys) {
        attention->data = k_plain->data;
    }
    const auto gate_and_up = [&] {
        ggml_tensor *gate = product(ctx, x, EMBD, "gate"), *up = product(ctx, x, EMBD, "up");
        return ggml_swiglu_split(ctx, gate, up);
    };
    if (o.gate_and_up_first) { // feed-forward beside attention
        add(result);
        add(product(ctx, gate_and_up(), EMBD, "down"));
    }
    static const char * names[] = {"product1", "product2", "product3"};
    for (int i = 0; i < o.products; i++) {
        if (i == 1 && o.write_before_second_product) {
            add(result);
            write(cache_k, roped, rows_k);
        }
        if (i == 2 && o.cache_read_again) { // as by a layer that shares it
            add(result);
            add(ggml_get_rows(ctx, cache_v, positions));
        }
        ggml_tensor * operand = result;
        result = product(ctx, result, EMBD, names[i]);
        if (i == 0 && o.result_used_twice) {
            add(result);
            add(ggml_scale(ctx, operand, 2.0f));
        }
        if (i == 0 && !o.product_last) {
            result = ggml_add(ctx, result, x);
            if (o.values_overwritten_before_join) {
                result->data = v_plain->data;
            }
            if (o.rows_overwritten_before_join) {
                result->data = rows_k->data;
            }
        }
    }
    add(result);
    if (o.gate_and_up_last) {
        add(gate_and_up());
    }
    if (o.query_elsewhere) {
        add(ggml_scale(ctx, q, 2.0f));
    }
    if (o.product_used_later) {
        add(ggml_scale(ctx, wv, 2.0f));
    }
    return {graph, wv, roped};
}

static bool in_order(const ggml_cgraph * graph) {
    ggml_tensor **begin = graph->nodes, **end = begin + graph->n_nodes;
    for (ggml_tensor ** node = begin; node < end; node++) {
        for (ggml_tensor * src : (*node)->src) {
            ggml_tensor ** at = src ? std::find(begin, end, src) : end;
            if (at != end && at >= node) {
                return false;
            }
        }
    }
    return true;
}

static int index_of(const ggml_cgraph * graph, const ggml_tensor * t) {
    return (int) (std::find(graph->nodes, graph->nodes + graph->n_nodes, t) - graph->nodes);
}

static int first_write(const ggml_cgraph * graph) {
    int i = 0;
    while (!pytq_is_cache_write(graph->nodes[i])) {
        i++;
    }
    return i;
}

static void report(const variant & o) {
    ggml_context * ctx = ggml_init({8u << 20, nullptr, false});
    const layer l = build(ctx, o);
    ggml_cgraph * graph = l.graph;
    const auto show = [&](const char * when) {
        const pytq_cache_writes w = pytq_find_cache_writes(graph, first_write(graph), true);
        const pytq_fresh_token f = pytq_find_fresh_token(graph, w);
        printf("%s;%s;found=%d", o.name, when, f.attention >= 0);
        if (f.attention >= 0) {
            const pytq_branches b = pytq_find_branches(graph, w, f, first_write(graph));
            std::string beside = b.first < 0 ? "-" : graph->nodes[b.first]->name;
            for (int n = 0; n < (int) b.of_keys.size() && b.first >= 0; n++) {
                const ggml_tensor * t = graph->nodes[b.first + n];
                beside += b.of_keys[n] && !pytq_is_rotation(t) ? std::string("+") + t->name : "";
            }
            printf(";branches=%s", beside.c_str());
            const int then = pytq_find_only_product(graph, f.last);
            printf(";product=%s", then < 0 ? "-" : graph->nodes[then]->name);
            std::string kept; // until attention, for the branches' sake
            const ggml_backend_graph_optimize_params params = {
                [](void * to, ggml_tensor * t, ggml_tensor *) {
                    *(std::string *) to += pytq_is_rotation(t) ? "" : std::string("+") + t->name;
                },
                &kept};
            pytq_keep_operands(graph, f, b, &params);
            printf(";kept=%s", kept.empty() ? "-" : kept.c_str() + 1);
            printf(";attention=%s;last=%s;turned=%d;q=%s;k=%s;v=%s;rows=%s;keys=%d;first_row=%d;join=%s",
                   graph->nodes[f.attention]->name, graph->nodes[f.last]->name, f.turned, root(f.q), root(f.k),
                   root(f.v), f.rows->name, f.keys, (int) f.first_row, f.join < 0 ? "-" : graph->nodes[f.join]->name);
        }
    };
    show("before");
    printf("\n");
    const std::vector<ggml_tensor *> before(graph->nodes, graph->nodes + graph->n_nodes);
    const int i = first_write(graph);
    const pytq_cache_writes w = pytq_find_cache_writes(graph, i, true);
    const pytq_fresh_token f = pytq_find_fresh_token(graph, w);
    if (f.attention >= 0) {
        const bool moved = pytq_move_values_down(graph, w, f, i);
        std::vector<ggml_tensor *> after(graph->nodes, graph->nodes + graph->n_nodes), a = before, b = after;
        std::sort(a.begin(), a.end()), std::sort(b.begin(), b.end());
        show("after");
        const int from = index_of(graph, l.values_product);
        printf(";moved=%d;same=%d;complete=%d;in_order=%d;behind=%d;again=%d\n", moved, before == after, a == b,
               in_order(graph), from > index_of(graph, l.rope) && from < i, pytq_move_values_down(graph, w, f, i));
    }
    ggml_free(ctx);
}

template <class F> static void with(const char * name, F change) {
    variant o;
    o.name = name;
    change(o);
    report(o);
}

int main() {
    with("plain", [](variant &) {});
    with("not turned", [](variant & o) { o.turn_queries = o.turn_keys = o.turn_values = o.turn_result = false; });
    with("only keys turned", [](variant & o) { o.turn_values = o.turn_result = false; });
    with("only values turned", [](variant & o) { o.turn_queries = o.turn_keys = false; });
    with("keys by profile", [](variant & o) { o.by_profile = true; });
    with("values written first", [](variant & o) { o.values_written_first = true; });
    with("later stream", [](variant & o) { o.streams = 3, o.first_stream = 2; });
    with("no second product", [](variant & o) { o.products = 1; });
    with("next write too soon", [](variant & o) { o.write_before_second_product = true; });
    with("values overwritten before join", [](variant & o) { o.values_overwritten_before_join = true; });
    with("rows overwritten before join", [](variant & o) { o.rows_overwritten_before_join = true; });
    with("gate and up first", [](variant & o) { o.gate_and_up_first = true; });
    with("gate and up last", [](variant & o) { o.gate_and_up_last = true, o.products = 2; });
    with("unrelated node", [](variant & o) { o.unrelated = true; });
    with("node of queries and values", [](variant & o) { o.of_both = true; });
    with("keys over queries", [](variant & o) { o.keys_over_queries = true; });
    with("result used twice", [](variant & o) { o.result_used_twice = true; });
    with("graph ends at the product", [](variant & o) { o.products = 1, o.product_last = true; });
    with("cache read again", [](variant & o) { o.cache_read_again = true; });
    with("bias", [](variant & o) { o.bias = true; });
    with("norm behind rope", [](variant & o) { o.norm_behind_rope = true; });
    with("values last", [](variant & o) { o.keys_last = false; });
    with("product used between", [](variant & o) { o.product_used_between = true; });
    with("product used later", [](variant & o) { o.product_used_later = true; });
    with("two tokens", [](variant & o) { o.tokens = 2; });
    with("two sequences", [](variant & o) { o.sequences = o.streams = 2; });
    with("result not turned back", [](variant & o) { o.turn_result = false; });
    with("values not turned", [](variant & o) { o.turn_values = false; });
    with("keys not turned", [](variant & o) { o.turn_keys = false; });
    with("queries not turned", [](variant & o) { o.turn_queries = false; });
    with("query used elsewhere", [](variant & o) { o.query_elsewhere = true; });
    with("something stands between", [](variant & o) { o.stands_between = true; });
    with("one write", [](variant & o) { o.one_write = true; });
    with("rows of two types", [](variant & o) { o.other_row_types = true; });
    with("streams of two kinds", [](variant & o) { o.streams = 3, o.other_streams = true; });
    with("result over the keys", [](variant & o) { o.result_over_keys = true; });
    with("result over the keys, not turned", [](variant & o) {
        o.result_over_keys = true, o.turn_queries = o.turn_keys = o.turn_values = o.turn_result = false;
    });
    with("keys overwritten before the write", [](variant & o) { o.keys_overwritten_before_write = true; });
}

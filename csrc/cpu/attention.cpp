// Cuts attention into items and runs them on one thread; the items themselves are in tile.inl.
#include "tiers.h"

#include <algorithm>
#include <cstdlib>

static bool head_dim_fits(const pytq_attn_kv * kv, int d) {
    if (kv->type >= 0) {
        const pytq_type_info * t = pytq_type_get(kv->type);
        return t && t->head_dim == d;
    }
    return kv->to_float && d > 0 && d <= PYTQ_MAX_HEAD_DIM && d % 8 == 0;
}

int pytq_attn_supported(const pytq_attn * a) {
    return a->n_head_kv > 0 && a->n_head % a->n_head_kv == 0 && a->n_stream_kv > 0 &&
           a->n_stream % a->n_stream_kv == 0 && a->n_q > 0 && a->n_kv > 0 && (a->k.type >= 0 || a->v.type >= 0) &&
           head_dim_fits(&a->k, a->dk) && head_dim_fits(&a->v, a->dv) && (!a->rotate || pytq_fwht_supported(a->dv));
}

void pytq_attn_make_plan(const pytq_attn * a, int n_threads, pytq_attn_plan * p) {
    p->rows_per_kv_head = a->n_q * (a->n_head / a->n_head_kv);
    p->block_rows = std::min(p->rows_per_kv_head, PYTQ_BLOCK_ROWS);
    p->n_blocks = (p->rows_per_kv_head + p->block_rows - 1) / p->block_rows;
    const int whole = a->n_stream * a->n_head_kv * p->n_blocks;
    // Four items per thread even out what the system takes away; a part of the cache is at least two tiles.
    const int wanted = n_threads > 1 ? 4 * n_threads : 1;
    const int tiles = (a->n_kv + PYTQ_TILE - 1) / PYTQ_TILE;
    const int parts = whole >= wanted ? 1 : std::max(1, std::min((wanted + whole - 1) / whole, tiles / 2));
    p->chunk = (tiles + parts - 1) / parts * PYTQ_TILE;
    p->n_chunks = (a->n_kv + p->chunk - 1) / p->chunk;
    p->n_items = whole * p->n_chunks;
    const size_t floats = (size_t) PYTQ_BLOCK_ROWS * a->dk + (size_t) PYTQ_TILE * PYTQ_MAX_HEAD_DIM +
                          2 * (size_t) PYTQ_BLOCK_ROWS * PYTQ_TILE + (size_t) PYTQ_BLOCK_ROWS * PYTQ_MAX_HEAD_DIM;
    p->scratch_bytes = (floats * sizeof(float) + 5 * 64 + 63) / 64 * 64;
    p->partial_bytes = p->n_chunks < 2 ? 0
                                       : (size_t) a->n_stream * a->n_head_kv * p->rows_per_kv_head * p->n_chunks *
                                             (16 + PYTQ_MAX_HEAD_DIM) * sizeof(float);
}

int pytq_attn_run(const pytq_attn * a, int split) {
    if (!pytq_attn_supported(a)) {
        return -1;
    }
    pytq_attn_plan plan;
    pytq_attn_make_plan(a, split, &plan);
    char * memory = static_cast<char *>(std::malloc(plan.scratch_bytes + plan.partial_bytes + 64));
    if (!memory) {
        return -1;
    }
    char * scratch = memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64;
    char * partials = scratch + plan.scratch_bytes;
    for (int i = 0; i < plan.n_items; i++) {
        pytq_attn_item(a, &plan, i, scratch, partials);
    }
    pytq_attn_merge(a, &plan, 0, 1, partials);
    std::free(memory);
    return 0;
}

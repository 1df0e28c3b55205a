#include "pytq-cuda-fuse.h"

#include "pytq-cuda.h"
#include "pytq-switch.h"
#include "pytq.h"

bool pytq_cuda_fusion_enabled() {
    static const bool on = pytq_switch("PYTQ_CUDA_FUSE");
    return on;
}

pytq_branches pytq_cuda_find_branches(const ggml_cgraph * graph, const pytq_cache_writes & w,
                                      const pytq_fresh_token & f, int i) {
#if defined(GGML_USE_HIP)
    static const bool on = false;
#else
    static const bool on = pytq_switch("PYTQ_CUDA_BRANCHES");
#endif
    return on ? pytq_find_branches(graph, w, f, i) : pytq_branches();
}

bool pytq_cuda_is_left_out(const ggml_cgraph * graph, int i) {
    if (!pytq_cuda_fusion_enabled() || !pytq_is_rotation(graph->nodes[i])) {
        return false;
    }
    for (int j = i + 1; j < graph->n_nodes && j <= i + PYTQ_FUSE_WINDOW; j++) {
        if (pytq_is_cache_write(graph->nodes[j])) {
            return pytq_find_cache_writes(graph, j, true).leaves_out(graph->nodes[i]);
        }
    }
    return false;
}

void pytq_cuda_graph_optimize(ggml_cgraph * graph, const ggml_backend_graph_optimize_params * params) {
    if (!pytq_cuda_fusion_enabled()) {
        return;
    }
    for (int i = 0; i < graph->n_nodes; i++) {
        const ggml_tensor * node = graph->nodes[i];
        if (pytq_is_cache_write(node)) {
            const pytq_cache_writes w = pytq_find_cache_writes(graph, i, true);
            const pytq_fresh_token f = pytq_find_fresh_token(graph, w);
            pytq_keep_operands(graph, w, params);
            if (f.attention >= 0) {
                const pytq_branches b = pytq_cuda_find_branches(graph, w, f, i);
                if (b.first < 0) {
                    pytq_move_values_down(graph, w, f, i);
                }
                pytq_keep_operands(graph, f, params);
                pytq_keep_operands(graph, f, b, params);
            }
            i = w.last;
        } else if (node->op == GGML_OP_FLASH_ATTN_EXT &&
                   (pytq_is_type(node->src[1]->type) || pytq_is_type(node->src[2]->type))) {
            const int r = pytq_find_rotated_output(graph, i);
            if (r >= 0) {
                pytq_keep_operands(graph, i, r, params);
            }
        }
    }
}

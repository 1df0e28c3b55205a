// The patterns of pytq-fuse.h on the CPU: what the patched ggml-cpu calls around each node.
//
// pytq_cpu_graph_optimize finds the patterns once for each graph that the scheduler allocates and notes them in spare
// op_params of the nodes, as distances between nodes; pytq_cpu_check_fusion looks again when the memory is known. In a
// decode step each of the four products and the second write would cost a barrier and a pass over cold memory. A graph
// that is run in parts (an evaluation callback) computes every node whose pattern is not whole in the part by itself,
// and so does a graph that no scheduler allocated. PYTQ_CPU_FUSE=0 switches all of this off.
#pragma once

#include <stdbool.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_backend;
struct ggml_backend_graph_optimize_params;
struct ggml_cgraph;
struct ggml_compute_params;

// The CPU backend's graph_optimize.
void pytq_cpu_graph_optimize(struct ggml_backend * backend, struct ggml_cgraph * graph,
                             struct ggml_backend_graph_optimize_params * params);

// Before the threads start: patterns found in memory that is now allocated, or dropped with a warning.
void pytq_cpu_check_fusion(struct ggml_cgraph * graph);

// Whether node i is computed together with another node of this graph, so that nothing is left to do for it.
bool pytq_cpu_is_left_out(const struct ggml_compute_params * params, const struct ggml_cgraph * graph, int i);

// Computes node i with all that is left out for it; false if it is an ordinary node.
bool pytq_cpu_compute_fused(const struct ggml_compute_params * params, const struct ggml_cgraph * graph, int i);

// Nodes left out so far in this process: for tests and diagnosis.
unsigned long long pytq_cpu_left_out_count(void);

#ifdef __cplusplus
}
#endif

// Attention on compressed keys and values on the CPU: what the patched ggml-cpu calls.
#pragma once

#include "ggml.h"

#include <stdbool.h>
#include <stddef.h>

#ifdef __cplusplus
extern "C" {
#endif

struct ggml_compute_params;

// Computes a FLASH_ATTN_EXT node if a pytq kernel takes it; false leaves it to upstream's path.
bool pytq_flash_attn_ext(const struct ggml_compute_params * params, struct ggml_tensor * dst);

// The same with the transform of the result that node `rotation` stands for: writes rotation's data instead of dst's.
bool pytq_flash_attn_ext_rotated(const struct ggml_compute_params * params, struct ggml_tensor * dst,
                                 const struct ggml_tensor * rotation);

// Bytes of work memory that pytq_flash_attn_ext wants for this node, 0 if it does not take it.
size_t pytq_flash_attn_ext_work_size(const struct ggml_tensor * node, int n_tasks);

// Computes a Walsh-Hadamard node (MUL_MAT with the Hadamard hint) if the size fits; same bits as upstream's kernel,
// which takes 5 % of a short prompt. false leaves it to that.
bool pytq_fwht_node(const struct ggml_compute_params * params, struct ggml_tensor * dst);

#ifdef __cplusplus
}
#endif

// What every attention kernel's parameters take from a FLASH_ATTN_EXT node, whatever the kernel.
#pragma once

#include "common.cuh"

#include <cmath>
#include <cstring>

// Queries, addresses of mask and sinks, counts and options; P is the parameter struct of a kernel.
template <class P> void pytq_set_attention(P & p, const ggml_tensor * dst) {
    const ggml_tensor * q = dst->src[0];
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * mask = dst->src[3];
    const ggml_tensor * sinks = dst->src[4];
    p.q = (const char *) q->data, p.dst = (decltype(p.dst)) dst->data;
    p.q_nb1 = q->nb[1], p.q_nb2 = q->nb[2], p.q_nb3 = q->nb[3];
    p.mask = mask ? (const char *) mask->data : nullptr;
    p.sinks = sinks ? (const float *) sinks->data : nullptr;
    p.n_kv = (int) k->ne[1], p.n_q = (int) q->ne[1], p.n_head_kv = (int) k->ne[2], p.gqa = (int) (q->ne[2] / k->ne[2]);
    memcpy(&p.scale, (const float *) dst->op_params + 0, sizeof(float));
    memcpy(&p.max_bias, (const float *) dst->op_params + 1, sizeof(float));
    memcpy(&p.softcap, (const float *) dst->op_params + 2, sizeof(float));
    p.n_head_log2 = 1 << (int) floorf(log2f((float) q->ne[2]));
}

// The same, and keys and values as blocks of one layout each and the mask of a sequence.
template <class P> void pytq_set_block_attention(P & p, const ggml_tensor * dst) {
    const ggml_tensor * k = dst->src[1];
    const ggml_tensor * v = dst->src[2];
    const ggml_tensor * mask = dst->src[3];
    pytq_set_attention(p, dst);
    p.k = (const char *) k->data, p.v = (const char *) v->data;
    p.k_nb1 = k->nb[1], p.k_nb2 = k->nb[2], p.k_nb3 = k->nb[3];
    p.v_nb1 = v->nb[1], p.v_nb2 = v->nb[2], p.v_nb3 = v->nb[3];
    p.mask_nb1 = mask ? mask->nb[1] : 0, p.mask_nb3 = mask ? mask->nb[3] : 0;
    p.n_seq = (int) dst->src[0]->ne[3], p.n_seq_mask = mask ? (int) mask->ne[3] : 1;
}

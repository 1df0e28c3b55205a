// Host side of attention-decode.cuh and attention-short.cuh: which of them, shape of the launch, cluster and
// dependent-launch attributes.
#pragma once

#include "attention-decode.cuh"
#include "attention-short.cuh"

#include <algorithm>
#include <cstring>

namespace pytq {

// Clusters: 8 (the portable limit) where one cluster can join everything. Elsewhere their barrier costs more than the
// parts that it saves (one layer of kv3 at 65536 tokens: 45 us with clusters of 2, 41 without).
constexpr int decode_few_cluster = 8, decode_many_cluster = 1;

struct decode_plan {
    int shared_bytes = 0;
    bool aligned = false;  // blocks keep their alignment to words from token to token
    bool is_short = false; // attention-short.cuh
};

struct decode_device {
    int id, n_sm, shared_bytes; // shared memory that a block may ask for
    int few_cluster, many_cluster;
    int short_cluster; // largest cluster of attention-short.cuh (at most short_max_cluster); 0: it is not used
};

inline cudaError_t decode_device_of(int id, bool clusters, decode_device & d) {
    d.id = id;
    d.few_cluster = clusters ? decode_few_cluster : 1, d.many_cluster = clusters ? decode_many_cluster : 1;
    d.short_cluster = clusters ? short_max_cluster : 0;
    const cudaError_t e = cudaDeviceGetAttribute(&d.n_sm, cudaDevAttrMultiProcessorCount, id);
    return e != cudaSuccess ? e : cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
}

using decode_function = void (*)(decode_params);
template <int KT, int VT, bool BOTH> decode_function decode_kernel(const decode_plan & plan) {
    if (plan.is_short) {
        return plan.aligned ? attention_short<KT, VT, BOTH> : attention_short<KT, VT, false>;
    }
    return plan.aligned ? attention_decode<KT, VT, BOTH> : attention_decode<KT, VT, false>;
}

// Completes p (everything a caller knows is set); if there is more than one part, p.meta must then be given
// decode_part_rows() pairs and p.part as many rows of floats. BOTH: whether the instance for aligned blocks exists
// beside the one for any.
template <int KT, int VT, bool BOTH = true>
cudaError_t decode_prepare(decode_params & p, decode_plan & plan, const decode_device & d) {
    plan.is_short = d.short_cluster > 0 && short_plan<type<KT>, type<VT>>(p, d.short_cluster);
    if (plan.is_short) {
        plan.shared_bytes = p.team_bytes;
    } else {
        const int team = decode_plan_shape<type<KT>, type<VT>>(p);
        const int others = decode_buffers_at + p.heads_per_block * query_bytes<type<KT>>();
        const int teams = decode_max_teams<type<KT>>() > 1 && others + 2 * team <= d.shared_bytes ? 2 : 1;
        decode_plan_splits(p, d.n_sm, teams, d.few_cluster, d.many_cluster);
        plan.shared_bytes = others + p.teams * team;
    }
    plan.aligned = BOTH && p.k_slot % 4 == 0 && p.v_slot % 4 == 0;
    constexpr int MAX_DEVICES = 64;
    static int granted[2][2][MAX_DEVICES] = {};
    int & bytes = granted[plan.is_short][plan.aligned][d.id % MAX_DEVICES];
    if (bytes >= plan.shared_bytes && d.id < MAX_DEVICES) {
        return cudaSuccess;
    }
    bytes = plan.shared_bytes;
    return cudaFuncSetAttribute(decode_kernel<KT, VT, BOTH>(plan), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                plan.shared_bytes);
}

inline size_t decode_part_rows(const decode_params & p) {
    return p.n_parts > 1 ? (size_t) p.n_seq * p.n_head_kv * p.n_rows * p.n_parts : 0;
}

// dependent: the kernel before may still run when this one is launched (the kernels wait where they must).
template <class P>
cudaError_t decode_launch_one(void (*kernel)(P), dim3 grid, int threads, int shared_bytes, int cluster, bool dependent,
                              cudaStream_t stream, const P & p) {
    cudaLaunchAttribute attributes[2] = {};
    cudaLaunchConfig_t c = {};
    c.gridDim = grid, c.blockDim = dim3((unsigned) threads), c.dynamicSmemBytes = (size_t) shared_bytes,
    c.stream = stream, c.attrs = attributes;
    if (cluster > 1) {
        cudaLaunchAttribute & a = attributes[c.numAttrs++];
        a.id = cudaLaunchAttributeClusterDimension;
        a.val.clusterDim.x = (unsigned) cluster, a.val.clusterDim.y = a.val.clusterDim.z = 1;
    }
    if (dependent) {
        cudaLaunchAttribute & a = attributes[c.numAttrs++];
        a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        a.val.programmaticStreamSerializationAllowed = 1;
    }
    return cudaLaunchKernelEx(&c, kernel, p);
}

// ready: when the newest token's key and value are there, or null if they are. Only the kernel that adds them waits.
template <int KT, int VT, bool BOTH = true>
cudaError_t decode_launch(const decode_params & p, const decode_plan & plan, bool dependent, cudaStream_t stream,
                          cudaEvent_t ready = nullptr) {
    const dim3 grid((unsigned) p.n_splits, (unsigned) (p.n_head_kv / p.heads_per_block),
                    (unsigned) (p.n_seq * p.row_tiles));
    const int threads = 32 * p.teams * p.heads_per_block * p.warps_per_head;
    const auto wait_until_ready = [&] { return ready ? cudaStreamWaitEvent(stream, ready, 0) : cudaSuccess; };
    cudaError_t e = p.n_parts > 1 ? cudaSuccess : wait_until_ready();
    if (e == cudaSuccess) {
        e = decode_launch_one(decode_kernel<KT, VT, BOTH>(plan), grid, threads, plan.shared_bytes, p.cluster, dependent,
                              stream, p);
    }
    if (e == cudaSuccess && p.n_parts > 1) {
        e = wait_until_ready();
    }
    if (e == cudaSuccess && p.n_parts > 1) {
        e = decode_launch_one(attention_join<type<KT>::d>,
                              dim3((unsigned) p.n_rows, (unsigned) p.n_head_kv, (unsigned) p.n_seq), 32 * join_warps, 0,
                              1, dependent, stream, p);
    }
    return e;
}

} // namespace pytq

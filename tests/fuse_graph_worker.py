"""Graphs around one cache write, built by hand and run by the scheduler on the CPU backend; prints as JSON what was left out and
whether the cache holds what it should.

usage: python -m tests.fuse_graph_worker DIRECTORY_OF_LIBGGML

plain: the rotation feeds only the write.  used twice: something else reads it.  wanted: it is an output of the graph.
overwritten: its operand changes before the write.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from cffi import FFI

D, HEADS, ROWS, ROW = 64, 3, 8, 5
F32, I64, HADAMARD = 0, 27, 1

ffi = FFI()
ffi.cdef("""
typedef struct { size_t mem_size; void * mem_buffer; bool no_alloc; } init_params;
void * ggml_init(init_params);
void * ggml_new_tensor_2d(void * ctx, int type, int64_t ne0, int64_t ne1);
void * ggml_scale(void * ctx, void * a, float s);
void * ggml_scale_inplace(void * ctx, void * a, float s);
void * ggml_mul_mat(void * ctx, void * a, void * b);
void ggml_mul_mat_set_hint(void * a, int hint);
void * ggml_reshape_2d(void * ctx, void * a, int64_t ne0, int64_t ne1);
void * ggml_set_rows(void * ctx, void * a, void * b, void * c);
void ggml_set_output(void * t);
void * ggml_new_graph(void * ctx);
void ggml_build_forward_expand(void * graph, void * t);
void * ggml_backend_alloc_ctx_tensors(void * ctx, void * backend);
void ggml_backend_tensor_set(void * t, const void * data, size_t offset, size_t size);
void ggml_backend_tensor_get(const void * t, void * data, size_t offset, size_t size);
void * ggml_backend_sched_new(void ** backends, void * bufts, int n, size_t graph_size, bool parallel, bool op_offload);
bool ggml_backend_sched_alloc_graph(void * sched, void * graph);
int ggml_backend_sched_graph_compute(void * sched, void * graph);
void * ggml_backend_cpu_init(void);
void ggml_backend_cpu_set_n_threads(void * backend, int n);
unsigned long long pytq_cpu_left_out_count(void);
typedef struct pytq_type_info pytq_type_info;
int pytq_type_from_name(const char * name);
const pytq_type_info * pytq_type_get(int id);
void pytq_quantize_ref(const pytq_type_info * t, const float * x, void * y, int64_t n);
""")


def run(base, cpu, backend, case: str, type_name: str) -> dict:
    identifier = base.pytq_type_from_name(type_name.encode())
    block = 1 + D * 4 // 8  # kv4: one scale byte, four bits a value
    fixed, ctx = (base.ggml_init(((1 << 20), ffi.NULL, True)) for _ in range(2))
    rot = base.ggml_new_tensor_2d(fixed, F32, D, D)
    x = base.ggml_new_tensor_2d(fixed, F32, D, HEADS)
    index = base.ggml_new_tensor_2d(fixed, I64, 1, 1)
    cache = base.ggml_new_tensor_2d(fixed, identifier, D * HEADS, ROWS)
    assert base.ggml_backend_alloc_ctx_tensors(fixed, backend) != ffi.NULL

    keys = base.ggml_scale(ctx, x, 1.0)
    rotated = base.ggml_mul_mat(ctx, rot, keys)
    base.ggml_mul_mat_set_hint(rotated, HADAMARD)
    write = base.ggml_set_rows(ctx, cache, base.ggml_reshape_2d(ctx, rotated, D * HEADS, 1), index)
    order = [rotated, write]
    if case == "used twice":
        order.append(base.ggml_scale(ctx, rotated, 2.0))
    elif case == "wanted":
        base.ggml_set_output(rotated)
    elif case == "overwritten":
        order.insert(1, base.ggml_scale_inplace(ctx, keys, 3.0))
    graph = base.ggml_new_graph(ctx)
    for node in order:
        base.ggml_build_forward_expand(graph, node)

    hadamard = np.array([[(-1.0) ** (i & j).bit_count() for i in range(D)] for j in range(D)], np.float32) / 8
    values = np.random.default_rng(3).standard_normal((HEADS, D)).astype(np.float32)
    for tensor, data in ((rot, hadamard), (x, values), (index, np.array([ROW], np.int64))):
        base.ggml_backend_tensor_set(tensor, ffi.from_buffer(data), 0, data.nbytes)
    before = cpu.pytq_cpu_left_out_count()
    sched = base.ggml_backend_sched_new(ffi.new("void *[]", [backend]), ffi.NULL, 1, 64, False, False)
    assert base.ggml_backend_sched_alloc_graph(sched, graph)
    assert base.ggml_backend_sched_graph_compute(sched, graph) == 0

    stored = np.empty(HEADS * block, np.uint8)
    base.ggml_backend_tensor_get(cache, ffi.from_buffer(stored), ROW * stored.nbytes, stored.nbytes)
    # radix-2 in the order of strides 1, 2, 4, ... after scaling: ggml's order of operations
    y = values * np.float32(1 / np.sqrt(np.float32(D)))
    for stride in (1 << s for s in range(6)):
        pairs = y.reshape(HEADS, -1, 2, stride)
        y = np.stack((pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]), 2).reshape(HEADS, D)
    y = np.ascontiguousarray(y)
    expected = np.empty_like(stored)
    base.pytq_quantize_ref(
        base.pytq_type_get(identifier), ffi.from_buffer("float[]", y), ffi.from_buffer(expected), y.size
    )
    return {
        "left_out": cpu.pytq_cpu_left_out_count() - before,
        "right": bool((stored == expected).all()),
    }


def main() -> None:
    where = Path(sys.argv[1])
    suffix = ".dylib" if sys.platform == "darwin" else ".so"
    base = ffi.dlopen(str(where / f"libggml-base{suffix}"))
    cpu = ffi.dlopen(str(where / f"libggml-cpu{suffix}"))
    backend = cpu.ggml_backend_cpu_init()
    cpu.ggml_backend_cpu_set_n_threads(backend, 2)
    cases = ("plain", "used twice", "wanted", "overwritten")
    print(json.dumps({case: run(base, cpu, backend, case, "kv4_d64") for case in cases}))


if __name__ == "__main__":
    main()

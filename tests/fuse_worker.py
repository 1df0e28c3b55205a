"""Runs one model with several cache types in a process of its own and prints what the CPU backend fused, as JSON.

usage: python -m tests.fuse_worker MODEL OBSERVER THREADS PAIR [PAIR ...]

OBSERVER: none, every (an evaluation callback that wants every node, so each runs as a graph of its own) or attention (one that
wants the results of attention, so graphs end there).
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import sys

from pytq.llama import _load_binding
from tests.matrix_worker import logits


def main() -> None:
    lc = _load_binding()
    library = lc.llama_cpp._lib
    library.ggml_get_name.restype = ctypes.c_char_p
    library.ggml_get_name.argtypes = [ctypes.c_void_p]
    count = library.pytq_cpu_left_out_count
    count.restype = ctypes.c_ulonglong
    seen = [0]

    def wanted(tensor, ask, _data) -> bool:
        seen[0] += not ask
        return sys.argv[2] == "every" or not ask or library.ggml_get_name(tensor).startswith(b"kqv_out")

    observe = None if sys.argv[2] == "none" else lc.ggml_backend_sched_eval_callback(wanted)
    lc.llama_backend_init()
    model = lc.llama_model_load_from_file(sys.argv[1].encode(), lc.llama_model_default_params())
    if not model:
        raise SystemExit("model did not load")
    rows = {}
    for pair in sys.argv[4:]:
        before, seen[0] = count(), 0
        got = logits(lc, model, *pair.split("/"), observe, int(sys.argv[3]))
        rows[pair] = {
            "logits": hashlib.sha256(got.tobytes()).hexdigest(),
            "left_out": count() - before,
            "observed": seen[0],
        }
    print(json.dumps(rows))


if __name__ == "__main__":
    main()

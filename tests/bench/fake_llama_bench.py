"""A llama-bench that answers at once: rows of the real one's shape, times chosen by the test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

FIELDS = {
    "build_commit": "unknown",
    "build_number": 0,
    "cpu_info": "Some CPU",
    "gpu_info": "",
    "backends": "CPU",
    "model_type": "llama 1M Q4_0",
    "model_size": 1048576,
    "model_n_params": 1000000,
    "n_batch": 2048,
    "n_ubatch": 512,
    "n_threads": 2,
    "cpu_mask": "0x0",
    "cpu_strict": False,
    "poll": 50,
    "n_gpu_layers": -1,
    "n_cpu_moe": 0,
    "split_mode": "layer",
    "main_gpu": 0,
    "no_kv_offload": False,
    "flash_attn": 1,
    "tensor_split": "0.00",
    "tensor_buft_overrides": "none",
    "load_mode": "auto",
    "embeddings": False,
    "no_op_offload": 0,
    "fit_target": 0,
    "fit_min_ctx": 0,
    "test_time": "2026-01-01T00:00:00Z",
}


class FakeBench:
    """Speed of (type_k, depth, round); remembers the order of calls."""

    def __init__(self, speed: Callable[[str, int, int], float] | None = None) -> None:
        self.calls: list[tuple[str, str, int]] = []
        self.speed = speed or (lambda type_k, depth, n: 100.0)
        self.stop_after: int | None = None

    def __call__(self, command: list[str]) -> list[dict[str, Any]]:
        value = dict(zip(command[1::2], command[2::2], strict=False))
        key = (command[0], value["-ctk"], int(value["-d"]))
        if self.stop_after is not None and len(self.calls) >= self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(key)
        rows = []
        for n_prompt, n_gen in ((int(value["-p"]), 0), (0, int(value["-n"]))):
            ts = self.speed(value["-ctk"], int(value["-d"]), len(self.calls))
            ns = round(1e9 * (n_prompt + n_gen) / ts)
            row = {"model_filename": value["-m"], "type_k": value["-ctk"], "type_v": value["-ctv"]}
            row |= {"n_prompt": n_prompt, "n_gen": n_gen, "n_depth": int(value["-d"])}
            rows.append(FIELDS | row | {"samples_ns": [ns], "samples_ts": [ts], "avg_ts": ts, "avg_ns": ns})
        return rows

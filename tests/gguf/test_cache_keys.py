"""The patched llama.cpp takes the cache types that `pytq gguf set-cache` stored in a model, unless a flag names others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner
from gguf import GGUFValueType

from pytq import estimate as est
from pytq.cli import main
from pytq.gguf import edit
from pytq.gguf.layout import read_layout
from pytq.paths import BuildDir

pytestmark = pytest.mark.slow

PLAN = est.Plan(512)
MIXED = ["-ctk", "kv3", "-ctv", "kv3", "--layer", "0-1=q8_0", "--layer", "28=f16/kv4", "--layer", "29=f16"]
Stored = Callable[..., Path]


@pytest.fixture
def stored(smollm: Path, tmp_path: Path) -> Stored:
    """A copy of the default model with these arguments of set-cache."""

    def make(*args: str) -> Path:
        target = tmp_path / f"stored{len(list(tmp_path.iterdir()))}.gguf"
        done = CliRunner().invoke(main, ["gguf", "set-cache", str(smollm), *args, "-o", str(target)])
        assert done.exit_code == 0, done.stderr
        return target

    return make


@pytest.fixture
def smollm() -> Path:
    """The default model (``model`` is a toy in this directory)."""
    from pytq.model import default_model

    return default_model()


def complete(build: BuildDir, model: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    command = [
        build.program("llama-completion"), "-m", model, "-p", "The capital of France is", "-n", "4", "--temp", "0", "-c", "512",
        "-no-cnv", "--no-warmup", "-t", "2", "-lv", "4", *flags,
    ]  # fmt: skip
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, stdin=subprocess.DEVNULL)


def cache_line(log: str) -> tuple[str, float, str, float]:
    """Types and MiB of K and V as the cache itself logs them."""
    found = re.findall(r"K \(([^)]*)\):\s*([\d.]+) MiB, V \(([^)]*)\):\s*([\d.]+) MiB", log)
    assert len(found) == 1, log[-3000:]
    k, k_mib, v, v_mib = found[0]
    return k, float(k_mib), v, float(v_mib)


def expect(model: Path, types: tuple[str, str]) -> tuple[float, float]:
    info = est.open_model(model)
    size = est.cache_size(info.hparams, est.resolve(info, types), PLAN)
    return size.k / est.MIB, size.v / est.MIB


def test_one_type_for_all_layers(patched: BuildDir, stored: Stored) -> None:
    model = stored("-ctk", "kv4", "-ctv", "turbo3")
    done = complete(patched, model)
    assert done.returncode == 0 and "Paris" in done.stdout
    assert "cache types stored in the model file: K kv4; V turbo3" in done.stderr
    k, k_mib, v, v_mib = cache_line(done.stderr)
    assert (k, v) == ("kv4", "turbo3")
    assert (k_mib, v_mib) == pytest.approx(expect(model, (est.STORED, est.STORED)), rel=0.01)
    assert (k_mib, v_mib) == pytest.approx(expect(model, ("kv4", "turbo3")), rel=0.01)


def test_types_per_layer(patched: BuildDir, stored: Stored) -> None:
    model = stored(*MIXED)
    done = complete(patched, model)
    assert done.returncode == 0 and "Paris" in done.stdout
    assert "K q8_0 in layers 0-1, kv3 in layers 2-27, f16 in layers 28-29;" in done.stderr
    assert "V q8_0 in layers 0-1, kv3 in layers 2-27, kv4 in layer 28, f16 in layer 29" in done.stderr
    k, k_mib, v, v_mib = cache_line(done.stderr)
    assert (k, v) == ("mixed", "mixed")
    assert (k_mib, v_mib) == pytest.approx(expect(model, (est.STORED, est.STORED)), rel=0.01)
    assert k_mib > v_mib > expect(model, ("kv3", "kv3"))[1]


def test_a_flag_overrides_the_keys_of_its_side(patched: BuildDir, stored: Stored) -> None:
    model = stored(*MIXED)
    k, k_mib, v, _ = cache_line(complete(patched, model, "-ctk", "f16").stderr)
    assert (k, v) == ("f16", "mixed")
    assert k_mib == pytest.approx(expect(model, ("f16", "f16"))[0], rel=0.01)
    done = complete(patched, model, "-ctk", "q8_0", "-ctv", "f16")
    assert cache_line(done.stderr)[::2] == ("q8_0", "f16")
    assert "stored in the model file" not in done.stderr


def test_a_model_without_keys_is_f16(patched: BuildDir, smollm: Path) -> None:
    done = complete(patched, smollm)
    assert cache_line(done.stderr)[::2] == ("f16", "f16") and "stored in the model" not in done.stderr


def test_layers_of_all_kinds_compute_the_same_attention(
    patched: BuildDir, stored: Stored, tmp_path: Path
) -> None:
    """Unrotated, rotated and whole-vector layers in one cache: perplexity stays that of f16."""
    text = tmp_path / "text.txt"
    text.write_text("Rivers run to the sea, and the sea is never full; the wind turns and turns again. " * 60)
    kinds = [
        "-ctk",
        "f16",
        "-ctv",
        "f16",
        "--layer",
        "3-12=q8_0",
        "--layer",
        "13-20=kv5",
        "--layer",
        "21=bf16/q8_0",
    ]

    def perplexity(model: Path) -> float:
        command = [patched.program("llama-perplexity"), "-m", model, "-f", text, "-c", "512", "--chunks", "1"]
        log = subprocess.run([str(c) for c in command], capture_output=True, text=True)
        both = log.stdout + log.stderr
        return float(re.findall(r"Final estimate: PPL = ([\d.]+)", both)[0])

    assert perplexity(stored(*kinds)) == pytest.approx(perplexity(stored("-ctk", "f16")), rel=0.05)


def test_context_shift_of_mixed_layers(patched: BuildDir, stored: Stored) -> None:
    model = stored(*MIXED)
    done = complete(
        patched, model, "-c", "256", "-n", "300", "--ignore-eos", "--context-shift", "--repeat-penalty", "1.2"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    words = re.findall(r"[a-z]{3,}", done.stdout.lower())
    # keys moved in the wrong space turn the text into noise: few words, or one for ever
    assert len(words) > 120 and len(set(words[-60:])) > 15, done.stdout


def test_llama_bench_shows_what_it_used(patched: BuildDir, stored: Stored) -> None:
    command = [str(patched.program("llama-bench")), "-p", "8", "-n", "0", "-r", "1", "-t", "2", "-o", "json", "--no-warmup"]  # fmt: skip

    def run(model: Path, *flags: str) -> tuple[dict, str]:
        done = subprocess.run([*command, "-m", str(model), *flags], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)[0], done.stderr

    model = stored("-ctk", "kv4", "-ctv", "kv3")
    row, notes = run(model)
    assert (row["type_k"], row["type_v"]) == ("kv4", "kv3")
    assert "cache types stored in the model file: K kv4; V kv3" in notes
    row, notes = run(model, "-ctk", "f16", "-ctv", "f16")
    assert (row["type_k"], row["type_v"]) == ("f16", "f16") and "stored" not in notes
    row, _ = run(stored(*MIXED))
    assert (row["type_k"], row["type_v"]) == ("mixed", "mixed")


def test_the_library_takes_them_too(patched: BuildDir, stored: Stored) -> None:
    """Plain llama-cpp-python on the patched library, no types named; and f16 named by its id."""
    code = (
        "import os, sys; os.environ['LLAMA_CPP_LIB_PATH'] = sys.argv[1]; import llama_cpp\n"
        "llama_cpp.Llama(sys.argv[2], n_ctx=512)\n"
        "llama_cpp.Llama(sys.argv[2], n_ctx=512, type_k=1, type_v=1)\n"
    )
    model = stored("-ctk", "kv4", "-ctv", "kv3")
    command = [sys.executable, "-c", code, str(patched.lib), str(model)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.findall(r"K \((\w+)\).*V \((\w+)\)", done.stderr) == [("kv4", "kv3"), ("f16", "f16")]


def string(key: str, value: str) -> bytes:
    return edit.encode_field(key, GGUFValueType.STRING, value)


def strings(key: str, values: list[str]) -> bytes:
    return edit.encode_field(key, GGUFValueType.ARRAY, values, GGUFValueType.STRING)


BAD = {
    "unknown type 'kv9'": {"pytq.cache.type_k": string("pytq.cache.type_k", "kv9")},
    "unknown type 'kv3s'": {"pytq.cache.type_v": string("pytq.cache.type_v", "kv3s")},
    "pytq.cache.type_k is no text": {
        "pytq.cache.type_k": edit.encode_field("pytq.cache.type_k", GGUFValueType.UINT32, 8)
    },
    "pytq.cache.layer_k is no list of texts": {"pytq.cache.layer_k": string("pytq.cache.layer_k", "kv4")},
    "pytq.cache.layer_v has 3 items for 30 layers": {
        "pytq.cache.layer_v": strings("pytq.cache.layer_v", ["kv4"] * 3)
    },
    "unknown type 'kv8'": {"pytq.cache.layer_k": strings("pytq.cache.layer_k", ["kv8"] + [""] * 29)},
    "needs a kv profile": {"pytq.cache.type_k": string("pytq.cache.type_k", "auto3")},
}


@pytest.mark.parametrize("message", BAD)
def test_damaged_keys_end_the_start(patched: BuildDir, smollm: Path, tmp_path: Path, message: str) -> None:
    """One line that says which key and what to do; flags for both sides still start the model."""
    model = tmp_path / "bad.gguf"
    edit.write(edit.plan(read_layout(smollm), edit.Edit(put=BAD[message])), model)
    done = complete(patched, model)
    assert done.returncode != 0
    # llama.cpp tries twice (the first time to fit the model into memory)
    lines = list(dict.fromkeys(re.findall(rf" E (.*{re.escape(message)}.*)", done.stderr)))
    assert len(lines) == 1, done.stderr[-2000:]
    assert "needs a kv profile" in message or "`pytq gguf unset-cache`" in lines[0]
    assert complete(patched, model, "-ctk", "f16", "-ctv", "f16").returncode == 0

"""``pytq.Llama``: everything llama-cpp-python does, on the patched library."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from test_errors import refused, toy

from pytq.cli import main
from pytq.errors import PytqError
from pytq.paths import BuildDir

pytestmark = pytest.mark.slow

PROMPT = "The capital of France is"
PAIRS = [("q8_0", "q4_0"), ("turbo4", "turbo3"), ("kv4", "kv3"), ("turbo4", "f16"), ("f16", "kv4")]
Open = Callable[..., Any]


@pytest.fixture(scope="module")
def bridge(patched: BuildDir) -> Any:
    return importlib.import_module("pytq.llama")


@pytest.fixture
def open_llama(bridge: Any, model: Path) -> Iterator[Open]:
    made: list[Any] = []

    def make(*pair: str, **options: Any) -> Any:
        names = dict(zip(("cache_type_k", "cache_type_v"), pair, strict=False))
        options = {"n_ctx": 512, "verbose": False, "seed": 1, "n_threads": 2} | names | options
        made.append(bridge.Llama(model, **options))
        return made[-1]

    yield make
    for llama in made:
        llama.close()


def text(llama: Any, prompt: str = PROMPT, n: int = 12) -> str:
    return str(llama(prompt, max_tokens=n, temperature=0)["choices"][0]["text"])


def test_ids_are_those_of_ggml_and_of_the_table(bridge: Any) -> None:
    constants = bridge.llama_cpp
    for name, identifier in bridge.type_ids().items():
        if identifier < 128 and hasattr(constants, f"GGML_TYPE_{name.upper()}"):
            assert getattr(constants, f"GGML_TYPE_{name.upper()}") == identifier
    library = bridge.llama_cpp.llama_cpp._lib
    for name in ("turbo2", "turbo3", "turbo4", "kv2", "kv3", "kv4"):
        assert library.pytq_type_from_name(name.encode()) == bridge.type_id(name)
        assert bridge.type_name(bridge.type_id(name)) == name
    assert bridge.type_id("TURBO4") == bridge.type_id("turbo4") == 128 + 8 * 2


@pytest.mark.parametrize("bad", ["turbo9", "", 7000, -1, True, None])
def test_unknown_types(bad: Any, bridge: Any) -> None:
    with pytest.raises(PytqError, match="unknown cache type .* known: .*turbo4.*kv3"):
        bridge.type_id(bad)


@pytest.mark.parametrize("pair", PAIRS, ids="/".join)
def test_it_generates_what_it_should(pair: tuple[str, str], open_llama: Open) -> None:
    assert "Paris" in text(open_llama(*pair))


def test_defaults_are_turbo4_and_turbo3(open_llama: Open) -> None:
    report = open_llama().cache_report()
    assert report["requested"] == {"k": "turbo4", "v": "turbo3"}
    assert report["effective"] == {"k": ["turbo4_d64"], "v": ["turbo3_d64"]}
    # 64 x 4 bits and an fp16 norm; 64 x 3 bits and an fp16 norm
    assert (report["bits_k"], report["bits_v"]) == (4.25, 3.25)
    assert report["bits_per_value"] == 3.75 and report["flash_attn"] is True
    # SmolLM2-135M: 30 layers, 3 KV heads
    assert report["cache_bytes"] == 512 * 30 * 3 * (34 + 26)


def test_types_stored_in_the_model(bridge: Any, model: Path, tmp_path: Path) -> None:
    stored = tmp_path / "stored.gguf"
    arguments = [
        "gguf",
        "set-cache",
        str(model),
        "-ctk",
        "kv4",
        "-ctv",
        "kv3",
        "--layer",
        "0-1=q8_0/",
        "-o",
        str(stored),
    ]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    options = {"n_ctx": 512, "verbose": False}
    llama = bridge.Llama(stored, **options)
    report = llama.cache_report()
    assert report["requested"] == {"k": "mixed", "v": "kv3"}
    assert report["effective"] == {"k": ["q8_0", "kv4_d64"], "v": ["kv3_d64"]}
    assert report["cache_bytes"] == 512 * 3 * (2 * 68 + 28 * 33 + 30 * 25)
    state = len(llama.save_state().llama_state)
    again = pickle.loads(pickle.dumps(llama))
    assert again.cache_report() == report
    again.close()
    llama.close()
    named = bridge.Llama(stored, cache_type_k="kv3", **options)
    assert named.cache_report()["effective"] == {"k": ["kv3_d64"], "v": ["kv3_d64"]}
    assert len(named.save_state().llama_state) <= state
    named.close()
    result = CliRunner().invoke(main, ["run", str(stored), "-p", PROMPT, "-n", "4", "-c", "512", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["requested"] == {"k": "mixed", "v": "kv3"}


def test_ids_and_constants_as_before(open_llama: Open, bridge: Any) -> None:
    q8 = bridge.llama_cpp.GGML_TYPE_Q8_0
    by_name = open_llama("q8_0", "q4_0")
    by_id = open_llama(type_k=q8, type_v=2)
    mixed = open_llama(q8, "q4_0")
    assert by_id.cache_report() == by_name.cache_report() == mixed.cache_report()
    assert text(by_id) == text(by_name) == text(mixed)
    assert by_id.context_params.type_k == q8


def test_streaming_is_the_same_text(open_llama: Open) -> None:
    llama = open_llama("turbo4", "turbo3")
    whole = text(llama)
    # else the prompt is reused but for its last token, and sums over other batches round differently
    llama.reset()
    parts = llama(PROMPT, max_tokens=12, temperature=0, stream=True)
    assert "".join(part["choices"][0]["text"] for part in parts) == whole


def test_chat(open_llama: Open) -> None:
    llama = open_llama("turbo4", "turbo4")
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
    done = llama.create_chat_completion(messages, max_tokens=16, temperature=0)
    assert "Paris" in done["choices"][0]["message"]["content"]
    deltas = llama.create_chat_completion(messages, max_tokens=16, temperature=0, stream=True)
    streamed = "".join(part["choices"][0]["delta"].get("content", "") for part in deltas)
    assert streamed == done["choices"][0]["message"]["content"]


def test_embeddings(open_llama: Open, bridge: Any) -> None:
    def embed(*pair: str) -> np.ndarray:
        mean = bridge.llama_cpp.LLAMA_POOLING_TYPE_MEAN
        llama = open_llama(*pair, embedding=True, pooling_type=mean)
        vector = np.array(llama.create_embedding("The quick brown fox")["data"][0]["embedding"])
        return vector / np.linalg.norm(vector)

    exact = embed("f16", "f16")
    assert exact.shape == (576,)
    assert float(exact @ embed("turbo4", "turbo4")) > 0.97


def test_state_is_saved_and_restored(open_llama: Open) -> None:
    llama = open_llama("turbo4", "turbo3")
    llama.eval(llama.tokenize(b"One, two, three, four, five, six, seven,"))
    state = llama.save_state()

    def go_on() -> list[int]:
        # a state holds the cache, not the last logits: one more token makes them
        llama.eval(llama.tokenize(b" eight", add_bos=False))
        tokens = []
        for _ in range(8):
            tokens.append(llama.sample(temp=0.0))
            llama.eval([tokens[-1]])
        return tokens

    first = go_on()
    llama.reset()
    llama.eval(llama.tokenize(b"Something else altogether was here."))
    llama.load_state(state)
    assert go_on() == first


def test_a_state_of_other_types_is_not_loaded(open_llama: Open) -> None:
    llama, other = open_llama("turbo4", "turbo3"), open_llama("turbo3", "turbo4")
    llama.eval(llama.tokenize(b"One, two, three"))
    with pytest.raises(RuntimeError):
        other.load_state(llama.save_state())


def test_prompt_prefix_is_reused(open_llama: Open) -> None:
    llama = open_llama("kv4", "kv3")
    first = text(llama, "Paris is the capital of France. Berlin is the capital of")
    again = text(llama, "Paris is the capital of France. Rome is the capital of")
    assert "Germany" in first and "Italy" in again


def test_pickling_keeps_the_types(open_llama: Open) -> None:
    llama = open_llama("turbo4", "q8_0")
    other = pickle.loads(pickle.dumps(llama))
    assert (other.cache_type_k, other.cache_type_v) == ("turbo4", "q8_0")
    assert text(other) == text(llama)
    other.close()


def test_flash_attention_follows_the_types(open_llama: Open) -> None:
    assert open_llama("f16", "f16").cache_report()["flash_attn"] is False
    assert open_llama("q8_0", "f16").cache_report()["flash_attn"] is False
    assert open_llama("turbo4", "f16").cache_report()["flash_attn"] is True
    assert open_llama("f16", "q8_0").cache_report()["flash_attn"] is True
    for pair in (("turbo4", "f16"), ("f16", "q4_0")):
        with pytest.raises(PytqError, match="need flash attention"):
            open_llama(*pair, flash_attn=False)


def test_refusals(bridge: Any, tmp_path: Path) -> None:
    with pytest.raises(PytqError, match="does not exist"):
        bridge.Llama(tmp_path / "none.gguf")
    with pytest.raises(PytqError, match="head_dim 72"):
        bridge.Llama(toy(tmp_path / "toy.gguf", head_dim=72))
    with pytest.raises(PytqError, match="llama.cpp could not open"):
        bridge.Llama(toy(tmp_path / "toy64.gguf"), verbose=False)


def test_a_binding_on_another_library_is_refused(stock: BuildDir, patched: BuildDir) -> None:
    code = "import llama_cpp, pytq\ntry:\n    pytq.Llama\nexcept pytq.PytqError as error:\n    print(error)"
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(stock.lib)}
    late = code.replace(
        "import llama_cpp, pytq", "import llama_cpp, pytq, os; del os.environ['LLAMA_CPP_LIB_PATH']"
    )
    done = subprocess.run([sys.executable, "-c", late], env=environment, capture_output=True, text=True)
    assert (
        done.stdout.startswith("llama_cpp was imported before pytq.Llama") and str(patched.lib) in done.stdout
    )


def test_a_stock_library_is_refused_for_our_types(stock: BuildDir, model: Path) -> None:
    environment = os.environ | {"LLAMA_CPP_LIB_PATH": str(stock.lib)}
    command = [sys.executable, "-m", "pytq", "run", str(model), "-p", "x"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "has no cache type turbo4" in done.stderr


def test_run_streams_and_reports(bridge: Any, model: Path) -> None:
    arguments = ["run", str(model), "-p", PROMPT, "-n", "8", "-c", "512", "-ctk", "turbo4", "-ctv", "turbo3"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0 and "Paris" in result.stdout
    assert "turbo4_d64 / turbo3_d64" in result.stderr and "3.750 bits per value" in result.stderr
    data = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert data["text"].strip() == result.stdout.strip()
    assert data["cache_bytes"] == 512 * 30 * 3 * (34 + 26) and data["tokens_per_second"] > 0


def test_run_refuses_a_prompt_longer_than_the_context(bridge: Any, model: Path) -> None:
    assert "tokens, the context 256" in refused(["run", str(model), "-p", "many words " * 400, "-c", "256"])


@pytest.fixture(scope="module")
def profile(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small profile of the model, made by another process: calibration loads the stock library."""
    path = tmp_path_factory.mktemp("profile") / "m.kvprofile.gguf"
    command = [sys.executable, "-m", "pytq", "calibrate", str(model), "--tokens", "2048", "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return path


def facts() -> str:
    """Eighteen sentences, then the same again: what a later token should be stands in one place of the context."""
    names = "Anna Boris Clara David Elena Frank Grace Henry Irene Jacob Karen Lukas Maria Nadia Oscar Paula Quinn Ralph"
    towns = "Oslo Rome Lima Cairo Paris Delhi Kyoto Quito Tunis Seoul Milan Accra Lagos Berlin Boston Dublin Havana Wien"
    goods = "goats boats maps clocks lamps bells books cups drums kites flutes roses tents violins wheels chairs doors hats"
    rows = zip(names.split(), towns.split(), goods.split(), strict=True)
    told = " ".join(f"{name} lives in {town} and repairs {thing}." for name, town, thing in rows)
    return f"{told}\n\nOnce more, to learn them by heart: {told}"


def shifted_logits(llama: Any, shift: bool, follow: int = 24) -> Any:
    """Log probabilities, shape (follow, n_vocab), of tokens that follow a text whose tokens 50 to 149 were dropped, the
    rest moved down, as a server does when the context is full; without ``shift``, that follow the whole text."""
    tokens = llama.tokenize(facts().encode())[: 270 + follow]
    assert len(tokens) == 270 + follow
    llama.reset()
    llama.eval(tokens[:270])
    if shift:
        llama._ctx.kv_cache_seq_rm(0, 50, 150)
        llama._ctx.kv_cache_seq_shift(0, 150, -1, -100)
        llama.n_tokens -= 100
    rows = []
    for token in tokens[270:]:
        llama.eval([token])
        logits = np.ctypeslib.as_array(llama._ctx.get_logits(), shape=(llama.n_vocab(),)).astype(np.float64)
        logits -= logits.max()
        rows.append(logits - np.log(np.exp(logits).sum()))
    return np.array(rows)


def divergence(p: Any, q: Any) -> float:
    return float((np.exp(p) * (p - q)).sum(axis=-1).mean())


@pytest.mark.parametrize("with_profile", [False, True], ids=["plain", "profile"])
def test_context_shift_moves_transformed_keys(
    with_profile: bool, open_llama: Open, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Decode, undo the transform, rotate, redo, encode: the shifted cache predicts what a shifted f16 cache does."""
    monkeypatch.setenv("PYTQ_KV_PROFILE", str(profile) if with_profile else "none")
    exact = open_llama("f16", "f16")
    ours = open_llama("kv4", "f16")
    want = shifted_logits(exact, True)
    moved = divergence(want, shifted_logits(ours, True))
    still = divergence(shifted_logits(exact, False), shifted_logits(ours, False))
    assert moved < 2 * still + 0.02
    # the wrong context, or keys left where they were, would be seen
    assert moved < 0.2 * divergence(want, shifted_logits(exact, False))

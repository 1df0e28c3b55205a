"""Cache sizes: rules by hand, and against what llama.cpp logs when it allocates."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from shape_models import vocab_file

from pytq import estimate as est
from pytq.bench.shapes import SHAPES, Shape, write_model
from pytq.cli import main
from pytq.errors import PytqError
from pytq.gguf import cache, edit
from pytq.gguf.hparams import is_swa, read_hparams
from pytq.gguf.layout import read_layout
from pytq.paths import BuildDir
from pytq.profile import LayerProfile, Profile, default_path, fingerprint, write_profile

TEST_SHAPES = {
    "llama-64": Shape(3, 128, 2, 2, 64, 128, 8192),
    "llama-80": Shape(2, 160, 2, 1, 80, 128, 8192),
    "llama-96": Shape(2, 192, 2, 2, 96, 128, 8192),
    "llama-128": Shape(5, 256, 4, 2, 128, 128, 8192),
    "llama-256": Shape(2, 256, 2, 1, 256, 128, 8192),
    "windows": Shape(7, 128, 2, 1, 256, 128, 8192, window=700, period=3),
    "hybrid": Shape(5, 192, 3, 1, 64, 128, 8192, conv_layers=(0, 2, 3)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    directory = tmp_path_factory.mktemp("shapes")
    vocab = vocab_file(directory / "vocab.gguf")
    out = {}
    for name, shape in TEST_SHAPES.items():
        out[name] = directory / f"{name}.gguf"
        write_model(shape, name, vocab, out[name])
    return out


@pytest.fixture
def allocated(request: pytest.FixtureRequest) -> Callable[..., tuple[float, float]]:
    """KV and state bytes that a real llama.cpp logs: ``allocated("stock", model, plan, pair)``."""

    def run(kind: str, model: Path, plan: est.Plan, pair: tuple[str, str]) -> tuple[float, float]:
        build: BuildDir = request.getfixturevalue(kind)
        slots = ["-npl", str(plan.n_seq), *(["-kvu"] if plan.unified else [])]
        command = [
            build.program("llama-batched-bench"),
            "-m",
            model,
            "-c",
            str(plan.n_ctx),
            "-fa",
            "on",
            "-lv",
            "4",
        ]
        for flag, name in zip(("-ctk", "-ctv"), pair, strict=True):
            command += [flag, name] if name != est.STORED else []
        command += ["-npp", "4", "-ntg", "1", "-t", "1", *slots]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        return est.logged_bytes(done.stderr + done.stdout)

    return run


def test_head_bytes_by_hand() -> None:
    assert est.head_bytes("f16", 128) == 256
    assert est.head_bytes("q4_0", 64) == 36
    assert est.head_bytes("turbo3", 128) == 50
    assert est.head_bytes("kv3", 128) == 49
    assert est.head_bytes("kv4", 64) == 33
    assert est.head_bytes("kv3s", 128) == 51
    assert est.bits_per_value("q4_0", 128) == 4.5


@pytest.mark.parametrize(("name", "dim"), [("kv3", 100), ("turbo4", 32), ("q4_0", 80), ("nvfp4", 96)])
def test_types_that_do_not_fit(name: str, dim: int) -> None:
    with pytest.raises(PytqError, match=f"head_dim {dim}"):
        est.head_bytes(name, dim)


def test_cells_follow_llama_cpp() -> None:
    assert est.Plan(5000).cells == 5120
    assert est.Plan(5000, 3).cells == 1792  # pad(5120 / 3)
    assert est.Plan(5000, 3, unified=True).cells == 5120
    assert est.Plan(8192).swa_cells(700) == 1280  # pad(700 + 512)
    assert est.Plan(1000).swa_cells(700) == 1024
    assert est.Plan(8192, 3, unified=True).swa_cells(700) == 2816  # pad(3 * 700 + 512)
    assert est.Plan(8192, swa_full=True).swa_cells(700) == 8192


@pytest.mark.parametrize("values", [(0,), (-5,), (100, 0), (100, -1), (100, 1, False, 0)])
def test_plans_refuse_nothing_and_negatives(values: tuple) -> None:
    with pytest.raises(PytqError, match="positive"):
        est.Plan(*values)


def test_swa_patterns() -> None:
    assert [is_swa(i, 6, False) for i in range(7)] == [True] * 5 + [False, True]
    assert [is_swa(i, 4, True) for i in range(5)] == [False, True, True, True, False]
    assert is_swa(3, 0, False) and not is_swa(3, 1, False)


def toy(path: Path, arch: str, **keys: object) -> Path:
    writer = gguf.GGUFWriter(path, arch)
    base = {"block_count": 8, "context_length": 4096, "embedding_length": 512, "attention.head_count": 8}
    for key, value in (base | {k.replace("__", "."): v for k, v in keys.items()}).items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        else:
            writer.add_uint32(f"{arch}.{key}", value)  # type: ignore[arg-type]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def kinds(path: Path) -> str:
    return "".join(
        layer.kind[0] if layer.kind != "shared" else "=" for layer in read_hparams(read_layout(path)).layers
    )


@pytest.mark.parametrize(
    ("arch", "keys", "expected"),
    [
        ("llama", {}, "ffffffff"),
        ("gemma2", {"attention__sliding_window": 64}, "sfsfsfsf"),
        ("gemma3", {"attention__sliding_window": 64}, "sssssfss"),
        ("gemma3", {}, "ffffffff"),
        ("gpt-oss", {"attention__sliding_window": 128}, "sfsfsfsf"),
        ("llama4", {}, "sssfsssf"),
        ("cohere2moe", {"attention__sliding_window": 64}, "fsssfsss"),
        ("phi3", {"attention__sliding_window": 64}, "ffffffff"),
        (
            "gemma4",
            {
                "attention__sliding_window": 64,
                "attention__sliding_window_pattern": [True, False] * 4,
                "attention__shared_kv_layers": 3,
            },
            "sfsfs===",
        ),
        ("qwen3next", {"full_attention_interval": 4}, "rrrfrrrf"),
        ("jamba", {"attention__head_count_kv": [0, 0, 4, 0] * 2}, "rrfrrrfr"),
        ("falcon-h1", {"attention__head_count_kv": 2}, "ffffffff"),
        ("glm4moe", {"nextn_predict_layers": 1}, "fffffffn"),
        ("mamba", {}, "rrrrrrrr"),
    ],
)
def test_layer_kinds(tmp_path: Path, arch: str, keys: dict, expected: str) -> None:
    assert kinds(toy(tmp_path / "m.gguf", arch, **keys)) == expected


def test_mla_stores_no_v(tmp_path: Path) -> None:
    keys = {
        "attention__head_count_kv": 1,
        "attention__key_length": 576,
        "attention__value_length": 512,
        "attention__key_length_mla": 192,
        "attention__value_length_mla": 128,
    }
    model = read_hparams(read_layout(toy(tmp_path / "m.gguf", "deepseek2", **keys)))
    size = est.cache_size(model, ("f16", "f16"), est.Plan(4096))
    assert (size.k, size.v) == (8 * 4096 * 576 * 2, 0)


def test_missing_and_silly_keys(tmp_path: Path) -> None:
    with pytest.raises(PytqError, match="block_count is 0"):
        read_hparams(read_layout(toy(tmp_path / "a.gguf", "llama", block_count=0)))
    with pytest.raises(PytqError, match="3 items for 8 layers"):
        read_hparams(read_layout(toy(tmp_path / "b.gguf", "llama", attention__head_count_kv=[1, 2, 3])))
    with pytest.raises(PytqError, match="no KV cache"):
        est.open_model(toy(tmp_path / "c.gguf", "bert"))


ROUNDING = 0.011 * est.MIB  # the log rounds each buffer to 0.01 MiB


@pytest.mark.slow
@pytest.mark.parametrize("name", TEST_SHAPES)
@pytest.mark.parametrize(
    "plan", [est.Plan(4096), est.Plan(5000, 3), est.Plan(3000, 2, unified=True)], ids=str
)
def test_agrees_with_stock_allocation(allocated, models: dict[str, Path], name: str, plan: est.Plan) -> None:
    info = est.open_model(models[name])
    pair = ("q8_0", "f16") if TEST_SHAPES[name].head_dim % 32 == 0 else ("f16", "bf16")
    kv, state = allocated("stock", models[name], plan, pair)
    size = est.cache_size(info.hparams, pair, plan)
    assert kv == pytest.approx(size.kv, rel=0.01, abs=2 * ROUNDING)
    assert state == pytest.approx(size.state, rel=0.01, abs=ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["kv3", "turbo4/turbo3", "kv4/q8_0"])
@pytest.mark.parametrize("name", ["llama-64", "llama-80", "llama-96", "llama-128", "windows", "hybrid"])
def test_agrees_with_patched_allocation(allocated, models: dict[str, Path], name: str, pair: str) -> None:
    k, v = est.parse_pair(pair)
    if TEST_SHAPES[name].head_dim == 80 and v == "q8_0":
        v = "f16"
    kv, _ = allocated("patched", models[name], est.Plan(8192), (k, v))
    size = est.cache_size(est.open_model(models[name]).hparams, (k, v), est.Plan(8192))
    assert kv == pytest.approx(size.kv, rel=0.01, abs=2 * ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "pair"), [("stock", "q8_0/q4_0"), ("patched", "kv4/kv3"), ("patched", "turbo3")]
)
def test_agrees_on_real_models(allocated, model: Path, kind: str, pair: str) -> None:
    for path in real_models(model):
        info = est.open_model(path)
        types = est.parse_pair(pair)
        plan = est.Plan(min(8192, info.hparams.n_ctx_train))
        kv, _ = allocated(kind, path, plan, types)
        assert kv == pytest.approx(est.cache_size(info.hparams, types, plan).kv, rel=0.01)


def with_profile(source: Path, target: Path) -> Path:
    """A link to a model and a profile beside it: the identity in all layers but the last, and types for ``auto``."""
    target.symlink_to(source)
    layout = read_layout(target)
    layers = read_hparams(layout).layers
    kv = [layer for layer in layers if layer.has_kv]
    out = Profile(
        fingerprint(layout), "m", str(layout.get("general.architecture")), len(layers), 1, "", "0", ""
    )
    for layer in kv[:-1]:
        n, d = layer.n_head_kv, layer.head_dim_k
        eye = np.tile(np.eye(d, dtype=np.float32), (n, 1, 1))
        one, v = np.ones((n, d), np.float32), np.ones((n, layer.head_dim_v), np.float32)
        out.layers[layer.index] = LayerProfile(eye, eye, 0 * one, one, one, v)
    steps = ("kv4", "kv3", "kv2", "kv5")
    names = [steps[layer.index % 4] if layer.has_kv else "" for layer in layers]
    out.types, out.bits = {"auto": (names, names[::-1] if len(kv) == len(layers) else names)}, {"auto": 3.5}
    write_profile(default_path(target), out)
    return target


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["llama-64", "llama-96", "llama-128", "llama-256", "windows", "hybrid", "real"]
)
def test_agrees_with_profiles_and_stored_types(
    allocated, models: dict[str, Path], name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    sources = [models[name]] if name != "real" else real_models(request.getfixturevalue("model"))
    for number, source in enumerate(sources):
        model = with_profile(source, tmp_path / f"{number}.gguf")
        for pair in (("kv3", "kv3"), ("kv4", "turbo3"), ("auto", "auto")):
            same(allocated, model, pair)
        layout = read_layout(model)
        kv = [layer.index for layer in est.open_model(model).hparams.kv_layers]
        rules = [f"{kv[0]}=f16/q8_0", f"{kv[-1]}=auto", f"{kv[1]}=kv5/kv2"]
        if TEST_SHAPES.get(name, SHAPES["llama-8b"]).head_dim % 32:
            rules[0] = f"{kv[0]}=f16/bf16"
        stored = tmp_path / f"stored{number}.gguf"
        change = cache.edit_set(layout, "kv3", "kv4", [cache.parse_override(rule) for rule in rules])
        edit.write(edit.plan(layout, change), stored)
        default_path(model).rename(default_path(stored))  # the fingerprint does not see the cache fields
        same(allocated, stored, (est.STORED, est.STORED))
        same(allocated, stored, ("kv2", est.STORED))


def same(allocated: Callable[..., tuple[float, float]], model: Path, pair: tuple[str, str]) -> None:
    info = est.open_model(model)
    plan = est.Plan(min(4096, info.hparams.n_ctx_train))
    kv, _ = allocated("patched", model, plan, pair)
    size = est.cache_size(info.hparams, est.resolve(info, pair), plan)
    assert kv == pytest.approx(size.kv, rel=0.01, abs=2 * ROUNDING), pair


def real_models(model: Path) -> list[Path]:
    """The default model, and further files that the tester names in PYTQ_TEST_MODELS."""
    return [model, *(Path(p) for p in os.environ.get("PYTQ_TEST_MODELS", "").split(os.pathsep) if p)]


def test_profile_beside_the_model_counts(models: dict[str, Path], tmp_path: Path) -> None:
    """With a profile llama.cpp stores K of kv types in the split layout, and auto types become the profile's."""
    path = tmp_path / "m.gguf"
    path.write_bytes(models["llama-128"].read_bytes())
    plain = est.open_model(path)
    with pytest.raises(PytqError, match="needs a kv profile"):
        est.check_pair(plain, "auto", "auto")
    writer = gguf.GGUFWriter(tmp_path / "m.kvprofile.gguf", "kvprofile")
    writer.add_array("kvprofile.types.auto.k", ["kv4", "kv4", "kv3", "kv3", "kv2"])
    writer.add_array("kvprofile.types.auto.v", ["kv3"] * 5)
    for layer in range(4):  # the last layer has no transform
        writer.add_tensor(f"blk.{layer}.kv_k_rot", np.zeros((2, 128, 128), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    info, plan = est.open_model(path), est.Plan(1024)
    names = [est.resolve(info, ("auto", "auto"))(layer) for layer in info.hparams.kv_layers]
    assert names == [("kv4s", "kv3"), ("kv4s", "kv3"), ("kv3s", "kv3"), ("kv3s", "kv3"), ("kv2", "kv3")]
    size = est.cache_size(info.hparams, est.resolve(info, ("kv3", "turbo3")), plan)
    assert size.k == 1024 * 2 * (4 * est.head_bytes("kv3s", 128) + est.head_bytes("kv3", 128))
    assert size.v == 1024 * 2 * 5 * est.head_bytes("turbo3", 128)
    code, out, _ = cli("estimate", path, "--types", "auto,kv3", "--json")
    assert code == 0 and json.loads(out)["profile"].endswith("m.kvprofile.gguf")
    (tmp_path / "m.kvprofile.gguf").write_bytes(b"GGUF damaged, and long enough")
    code, _, err = cli("estimate", path, "--types", "kv3")
    assert code == 2 and err.startswith("error: ") and "kvprofile" in err


def test_largest_context_is_the_largest(models: dict[str, Path]) -> None:
    info = est.open_model(models["windows"])
    pair = ("kv3", "kv3")
    for budget in (info.weights + (3 << 20), info.weights + (6 << 20)):
        best = est.largest_ctx(info, pair, budget)
        assert 0 < best < info.hparams.n_ctx_train
        assert est.total_bytes(info, pair, est.Plan(best)) <= budget
        assert est.total_bytes(info, pair, est.Plan(best + est.CTX_PAD)) > budget
    assert est.largest_ctx(info, pair, 1 << 40) == info.hparams.n_ctx_train
    assert est.largest_ctx(info, pair, info.weights) == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("500M", 500 << 20), ("1.5g", 3 << 29), ("4096", 4096), ("2 kb", 2048)],
)
def test_sizes(text: str, size: int) -> None:
    assert est.parse_bytes(text) == size


def cli(*args: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, [str(a) for a in args])
    return done.exit_code, done.stdout, done.stderr


def test_command(models: dict[str, Path]) -> None:
    code, out, _ = cli(
        "estimate", models["llama-128"], "-c", 4096, "--budget", "64MiB", "--types", "f16,kv4/kv3", "--json"
    )
    assert code == 0
    data = json.loads(out)
    f16, kv = data["types"]
    assert f16["cache_bytes"] == 5 * 2 * 4096 * 2 * 256
    assert kv["k_bytes"] == 5 * 4096 * 2 * est.head_bytes("kv4", 128)
    assert kv["flags"] == "-fa on -ctk kv4 -ctv kv3 -c 4096"
    assert kv["max_ctx"] >= f16["max_ctx"] > 0
    code, out, _ = cli("estimate", models["llama-128"], "--types", "kv3")
    assert code == 0 and "-ctk kv3 -ctv kv3 -c 8192" in out


def test_stored_types_are_the_first_row(models: dict[str, Path], tmp_path: Path) -> None:
    stored, layout = tmp_path / "stored.gguf", read_layout(models["llama-128"])
    edit.write(
        edit.plan(layout, cache.edit_set(layout, "kv4", None, [cache.parse_override("0=/kv2")])), stored
    )
    rows = json.loads(cli("estimate", stored, "-c", 1024, "--json")[1])["types"]
    assert (rows[0]["type_k"], rows[0]["flags"], rows[1]["type_k"]) == ("stored", "-fa on -c 1024", "f16")
    assert rows[0]["k_bytes"] == 5 * 1024 * 2 * est.head_bytes("kv4", 128)
    assert rows[0]["v_bytes"] == 1024 * 2 * (4 * 256 + est.head_bytes("kv2", 128))
    code, _, err = cli("estimate", models["llama-128"], "--types", "stored/kv3")
    assert code == 2 and "unknown cache type 'stored'" in err


def test_type_that_does_not_fit_is_a_row(models: dict[str, Path]) -> None:
    code, out, _ = cli("estimate", models["llama-80"], "--types", "q8_0,kv3", "--json")
    rows = json.loads(out)["types"]
    assert code == 0 and "head_dim 80" in rows[0]["error"] and rows[1]["cache_bytes"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-c", "9000"], "beyond this model's limit of 8192"),
        (["-c", "0"], "context must be a positive number"),
        (["-c", "-4"], "context must be a positive number"),
        (["-np", "0", "-c", "100"], "parallel must be a positive number"),
        (["--ubatch", "-1"], "ubatch must be a positive number"),
        (["--budget", "1k"], "smaller than the weights"),
        (["--budget", "lots"], "is no size"),
        (["--budget", "0"], "is nothing"),
        (["--types", "kv9"], "unknown cache type 'kv9'; known: .*kv4"),
        (["--types", "kv4/kv3/kv2"], "is no cache type or K/V pair"),
        (["--types", ","], "no cache type given"),
        (["--ctx", "many"], "not a valid integer"),
    ],
)
def test_bad_input_is_one_line(models: dict[str, Path], args: list[str], message: str) -> None:
    code, out, err = cli("estimate", models["llama-128"], *args)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert re.search(message, err)


def test_bad_files(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("no model at all, only words")
    for path in (text, tmp_path / "none.gguf", tmp_path):
        code, out, err = cli("estimate", path)
        assert (code, out) == (2, "") and err.startswith("error: ") and err.count("\n") == 1


def test_shapes_are_consistent() -> None:
    for shape in SHAPES.values():
        assert shape.heads % shape.kv_heads == 0
        assert shape.head_dim in (64, 80, 96, 128, 192, 256)

"""`pytq bench` through click's runner, with a fake llama-bench and with the real ones."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner
from fake_llama_bench import FakeBench

from pytq import paths
from pytq.bench import runner, shapes
from pytq.cli import bench, main


def cli(*args: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["bench", *map(str, args)])
    return done.exit_code, done.stdout, done.stderr


@pytest.fixture
def faked(fake_bench: FakeBench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeBench:
    for kind in paths.KINDS:
        root = tmp_path / kind
        (root / "bin").mkdir(parents=True)
        (root / "bin" / "llama-bench").touch()
        (root / "bin" / paths.library_name()).touch()
        monkeypatch.setenv(f"PYTQ_{kind.upper()}_BUILD", str(root))
    real = runner.run
    monkeypatch.setattr(runner, "load_warnings", lambda: [])
    monkeypatch.setattr(runner, "run", lambda *args: real(*args, once=fake_bench))
    return fake_bench


def test_formats(faked: FakeBench, small: Path, tmp_path: Path) -> None:
    common = [small, "--types", "kv4", "--depths", "0,64", "--pp", 16, "--tg", 4, "-r", 3]
    code, out, err = cli(*common)
    assert code == 0 and "kv4 (patched)" in out, err
    code, out, _ = cli(*common, "-o", "jsonl")
    assert code == 0 and len([json.loads(line) for line in out.splitlines()]) == 8
    page, plot = tmp_path / "r.html", tmp_path / "p.svg"
    code, out, err = cli(*common, "-o", "html", "--out", page, "--plot", plot)
    assert code == 0 and out == "" and "<svg" in page.read_text() and plot.exists()


def test_extra_options_reach_llama_bench(
    faked: FakeBench, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    real = faked.__call__
    monkeypatch.setattr(FakeBench, "__call__", lambda self, command: seen.append(command) or real(command))
    code, _, err = cli(
        small, "--types", "kv4", "-d", "0", "-r", "1", "-t", "1", "--ngl", "9", "--", "--poll", "0"
    )
    assert code == 0, err
    assert all(
        c[-2:] == ["--poll", "0"] and c[c.index("-t") + 1] == "1" and c[c.index("-ngl") + 1] == "9"
        for c in seen
    )


def test_interrupted(faked: FakeBench, small: Path) -> None:
    faked.stop_after = 5
    code, out, _ = cli(small, "--types", "kv4", "-d", "0", "--pp", 16, "--tg", 4)
    assert code == 130 and "interrupted" in out and "kv4 (patched)" in out
    faked.calls.clear()
    faked.stop_after = 0
    code, out, err = cli(small, "--types", "kv4", "-d", "0")
    assert code == 130 and out == "" and "before anything was measured" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--types", "kv9"], "unknown cache type 'kv9'"),
        (["--depths", "8000"], "beyond this model's limit of 8192"),
        (["--depths", "0,-5"], "must not be negative"),
        (["--depths", "deep"], "no list of numbers"),
        (["--pp", "0"], "--pp must be at least 1"),
        (["--tg", "-1"], "--tg must be at least 1"),
        (["--repeat", "0"], "--repeat must be at least 1"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--shape", "llama-8b"], "either MODEL or --shape"),
        (["--plot", "x.doc"], "written as .svg, .png or .pdf"),
        (["--out", "/nowhere/x.md"], "/nowhere is no directory"),
        (["--eval", "/nowhere/x.json"], "cannot read"),
        (["--backend", "abacus"], "unknown backend 'abacus'"),
        (["--backend", "cuda"], "PYTQ_(STOCK|PATCHED)_BUILD=.* holds no libggml-cuda"),
        (["-o", "doc"], "'doc' is not one of"),
    ],
)
def test_bad_input_is_one_line(faked: FakeBench, small: Path, args: list[str], message: str) -> None:
    code, out, err = cli(small, *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and re.search(message, err)
    assert not faked.calls


def test_unknown_shape() -> None:
    code, _, err = cli("--shape", "llama-9b")
    assert code == 2 and "unknown shape 'llama-9b'; known: llama-8b" in err


def test_shape_on_a_full_disk(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTQ_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("pytq.model.default_model", lambda: small)
    monkeypatch.setattr(shapes, "_free_bytes", lambda directory: 1 << 20)
    code, _, err = cli("--shape", "llama-8b")
    assert code == 2 and "are free" in err and not list((tmp_path / "home" / "shapes").iterdir())


def test_shape_is_written_once(
    faked: FakeBench, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTQ_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("pytq.model.default_model", lambda: small)
    first = bench._model(None, "tiny")
    stamp = first.stat().st_mtime_ns
    assert bench._model(None, "tiny") == first and first.stat().st_mtime_ns == stamp
    assert cli("--shape", "tiny", "--types", "kv4", "-r", "1")[0] == 0


def test_model_without_a_build(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTQ_HOME", str(tmp_path))
    for kind in paths.KINDS:
        monkeypatch.delenv(f"PYTQ_{kind.upper()}_BUILD", raising=False)
    code, _, err = cli(small)
    assert code == 2 and "pytq build --" in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.serial
def test_real_builds(model: Path, stock: object, patched: object) -> None:
    args = [model, "--types", "q8_0,kv4/kv3", "-d", "0,64", "--pp", 32, "--tg", 4, "-r", 2, "-o", "json"]
    code, out, err = cli(*args)
    assert code == 0, err
    data = json.loads(out)
    assert len(data["rows"]) == 3 * 2 * 2
    assert {r["build"] for r in data["rows"]} == {"stock", "patched"}
    assert all(r["median_ts"] > 0 and len(r["samples_ts"]) == 2 for r in data["rows"])
    assert len({r["build_commit"] for r in data["rows"]}) == 2

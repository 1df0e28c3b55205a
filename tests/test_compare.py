"""`pytq compare-codecs`: the measurements on codecs whose errors are known, and the command's behaviour."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import pytq.codec
from pytq import compare
from pytq.cli.compare_codecs import command
from pytq.errors import PytqError

SMALL = [
    "--vectors",
    "200",
    "--queries",
    "20",
    "--seeds",
    "3",
    "--time-vectors",
    "64",
    "--repeat",
    "1",
    "--head-dim",
    "64",
]
# design 4.1 at d = 128, where the sphere takes up to 2.5 % off and RaBitQ's exact search 6 %
DISTORTION = {
    "turboquant_mse 1": 0.3634,
    "turboquant_mse 2": 0.1175,
    "turboquant_mse 3": 0.03454,
    "turboquant_mse 4": 0.009497,
    "rabitq 2": 0.1228,
    "rabitq 3": 0.0355,
    "rabitq 4": 0.0099,
    "kv2": 0.0831,
    "kv3": 0.0231,
    "kv4": 0.0063,
}
PROD = {
    "turboquant_prod 1": 1.571,
    "turboquant_prod 2": 0.570,
    "turboquant_prod 3": 0.1846,
    "turboquant_prod 4": 0.0543,
}


@pytest.fixture(scope="module")
def result():
    names = ("turboquant_mse", "turboquant_prod", "rabitq", "qjl", "kv2", "kv3", "kv4")
    return compare.compare(compare.specs(names, (1, 2, 3, 4)), n=500, queries=100, seeds=10, time_vectors=0)


def test_reproduces_the_distortion_table(result):
    rows = {r["codec"]: r for r in result["rows"]}
    for name, limit in DISTORTION.items():
        assert limit * 0.94 < rows[name]["distortion"] < limit * 1.025, name
        assert 0 < rows[name]["distortion_sd"] < 0.05 * limit
    for name, limit in PROD.items():
        assert limit * 0.94 < rows[name]["inner_error"] < limit * 1.06, name


def test_bias(result):
    for row in result["rows"]:
        standard_error = row["inner_bias_sd"] / np.sqrt(row["seeds"])
        kind = row["codec"].split()[0]
        if kind in ("turboquant_prod", "qjl", "rabitq"):
            assert abs(row["inner_bias"]) < 4.5 * standard_error, row["codec"]
        elif kind == "turboquant_mse":
            # Lloyd-Max levels are centroids of N(0,1), nearly so on the sphere: estimates shrink by the distortion
            assert row["inner_bias"] == pytest.approx(-row["distortion"], rel=0.1, abs=4.5 * standard_error)


def test_quality_of_a_perfect_and_a_useless_codec():
    class Exact:
        head_dim = 32

        def encode(self, x):
            return x

        def decode(self, codes):
            return codes

        def inner(self, q, codes):
            return q @ codes.T

    class Opposite(Exact):
        def inner(self, q, codes):
            return -(q @ codes.T)

    rng = np.random.default_rng(0)
    x, q = rng.standard_normal((300, 32)).astype(np.float32), rng.standard_normal((30, 32)).astype(np.float32)
    best = compare.quality(Exact(), x, q)
    assert best["distortion"] == 0 and best["recall@1"] == 1 and abs(best["inner_bias"]) < 1e-6
    worst = compare.quality(Opposite(), x, q)
    assert worst["recall@100"] == 0 and worst["inner_bias"] == pytest.approx(-2, abs=1e-6)


def test_specs():
    assert compare.specs(["rabitq:4", "kv3"], [1]) == [
        {"name": "rabitq", "bits": 4},
        {"name": "rabitq", "bits": 4, "search": "fast"},
        {"name": "kv3", "bits": None},
    ]
    for bad in ("rabitq:9", "kv3:3", "kv9", "rabitq:x"):
        with pytest.raises(PytqError):
            compare.specs([bad], [1])


def test_json_and_files(tmp_path):
    run = CliRunner().invoke(command, [*SMALL, "--codecs", "rabitq:2,qjl,kv3", "--json"])
    assert run.exit_code == 0, run.output
    data = json.loads(run.stdout)
    assert [r["codec"] for r in data["rows"]] == ["rabitq 2", "rabitq 2 (fast)", "qjl", "kv3"]
    assert data["conditions"]["seeds"] == 3 and data["conditions"]["threads"][0] == 1
    for row in data["rows"]:
        assert row["encode_us"]["1"] > 0 and row["bits_per_value"] == row["bytes_per_vector"] * 8 / 64
    for name in ("out.json", "out.md"):
        run = CliRunner().invoke(command, [*SMALL, "--codecs", "qjl", "-o", str(tmp_path / name)])
        assert run.exit_code == 0 and run.stdout == ""
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["codec"] == "qjl"
    assert "| qjl | 1.250 |" in (tmp_path / "out.md").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.json", "out.md"]


def test_table_shows_every_number():
    run = CliRunner().invoke(command, [*SMALL, "--codecs", "rabitq:3"])
    assert run.exit_code == 0 and "…" not in run.stdout and "rabitq 3 (fast)" in run.stdout


def test_own_vectors(tmp_path):
    path = tmp_path / "v.npy"
    np.save(path, np.random.default_rng(0).standard_normal((300, 96)))
    options = [
        "--vectors",
        "200",
        "--queries",
        "20",
        "--seeds",
        "2",
        "--time-vectors",
        "0",
        "--codecs",
        "qjl",
        "--json",
    ]
    run = CliRunner().invoke(command, ["--file", str(path), *options])
    assert json.loads(run.stdout)["conditions"]["dim"] == 96


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--codecs", "kv9"], "unknown codec"),
        (["--codecs", ""], "unknown codec"),
        (["--bits", "0"], "--bits"),
        (["--bits", "a"], "--bits"),
        (["--head-dim", "100"], "multiple of 16"),
        (["--head-dim", "-1"], "head_dim must be"),
        (["--seeds", "1"], "seeds must be at least 2"),
        (["--vectors", "0"], "at least 2"),
        (["--queries", "0"], "at least 1"),
        (["--threads", "0"], "threads must be"),
        (["-o", "x.csv"], "must end in"),
        (["-o", "/nowhere/x.md"], "not a directory"),
        (["--file", "/nowhere.npy"], "not a .npy file"),
    ],
)
def test_bad_input(arguments, message):
    run = CliRunner().invoke(command, ["--codecs", "qjl", *arguments])
    assert isinstance(run.exception, PytqError) and message in str(run.exception)


def test_bad_files(tmp_path):
    for name, array in {
        "nan": np.full((9, 64), np.nan),
        "flat": np.ones(9),
        "int": np.ones((9, 64), int),
    }.items():
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(PytqError):
            compare.read_vectors(tmp_path / f"{name}.npy")
    (tmp_path / "text.npy").write_text("hello")
    with pytest.raises(PytqError, match=r"not a \.npy file"):
        compare.read_vectors(tmp_path / "text.npy")
    np.save(tmp_path / "few.npy", np.ones((9, 64)))
    with pytest.raises(PytqError, match="are needed"):
        compare.compare(compare.specs(["qjl"], []), vectors=compare.read_vectors(tmp_path / "few.npy"))


def test_every_name_has_a_row():
    """Split-rate layouts need a profile's basis, so they are asked for by name only."""
    assert set(compare.ALL) == {n for n in pytq.codec.NAMES if n not in ("kv2s", "kv3s", "kv4s")}


@pytest.mark.parametrize("name", ("gaussian", "clustered"))
def test_the_page_shows_the_kept_results(name):
    """docs/codecs.md quotes benchmarks/codecs-*.json through the command's own table."""
    root = Path(__file__).resolve().parents[1]
    kept = json.loads((root / "benchmarks" / f"codecs-{name}.json").read_text())
    assert kept["conditions"]["metric_version"] == compare.METRIC_VERSION
    assert compare.markdown(kept).strip() in (root / "docs/codecs.md").read_text(), (
        "rerun the page's commands"
    )

"""Evaluation without a model: parsing, caching of reference logits, counting of bits, and bad input."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner

from pytq import evaluate
from pytq.cli import main
from pytq.errors import PytqError
from pytq.paths import BuildDir

SUMMARY = """
====== Perplexity statistics ======
Mean PPL(Q)                   :  11.677561 ±   0.990563
Mean PPL(base)                :  11.188978 ±   0.960170
Mean PPL(Q)-PPL(base)         :   0.488582 ±   0.135009

====== KL divergence statistics ======
Mean    KLD:   0.053853 ±   0.002503
Maximum KLD:   1.201079
99.9%   KLD:   0.878624
99.0%   KLD:   0.381317
Median  KLD:   0.035128
Minimum KLD:  -0.000019

====== Token probability statistics ======
Same top p: 87.879 ± 1.021 %
"""

FAKE = """#!{python}
import struct, sys, pathlib
a = sys.argv[1:]
value = lambda name: a[a.index(name) + 1]
log = pathlib.Path({log!r})
log.write_text((log.read_text() if log.exists() else "") + " ".join(a) + "\\n")
if "--kl-divergence" in a:
    print("   1      11.6280 ±    0.9937       0.03849 ±    0.00868")
    print({summary!r})
else:
    chunks = min(int(value("--chunks")), {chunks})
    pathlib.Path(value("--kl-divergence-base")).write_bytes(b"_logits_" + struct.pack("<Iii", 2048, 10, chunks) + bytes(64))
"""


def fake_build(root: Path, kind: str, chunks: int = 100, summary: str = SUMMARY) -> BuildDir:
    """A build directory whose llama-perplexity is a script that records its arguments."""
    import sys

    (root / "bin").mkdir(parents=True)
    program = root / "bin" / "llama-perplexity"
    text = FAKE.format(python=sys.executable, log=str(root / "log"), summary=summary, chunks=chunks)
    program.write_text(text)
    program.chmod(0o755)
    (root / "bin" / "llama-bench").write_text("")
    (root / "bin" / "libllama.so").write_bytes(b"library of " + kind.encode())
    return BuildDir(kind, "cpu", root, root / "bin", root / "bin")


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> evaluate.Setup:
    monkeypatch.setenv("PYTQ_HOME", str(tmp_path / "home"))
    (tmp_path / "m.gguf").write_bytes(b"model")
    (tmp_path / "t.txt").write_text("text")
    return evaluate.Setup(tmp_path / "m.gguf", tmp_path / "t.txt", threads=1)


def calls(build: BuildDir) -> list[str]:
    log = build.root / "log"
    return log.read_text().splitlines() if log.exists() else []


def test_statistics_are_parsed() -> None:
    got = evaluate.parse_statistics(SUMMARY)
    assert got == {
        "kld_mean": 0.053853, "kld_mean_err": 0.002503, "kld_median": 0.035128, "kld_p99": 0.381317, "kld_p999": 0.878624,
        "same_top": 87.879, "same_top_err": 1.021, "ppl": 11.677561, "ppl_err": 0.990563, "ppl_base": 11.188978,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [("Median  KLD:   0.035128\n", "", "no kld median"), ("0.053853 ±", "nan ±", "no finite logits")],
)
def test_missing_and_nan_figures_are_refused(old: str, new: str, message: str) -> None:
    with pytest.raises(PytqError, match=message):
        evaluate.parse_statistics(SUMMARY.replace(old, new))


def test_reference_is_made_once_per_content(setup: evaluate.Setup, tmp_path: Path) -> None:
    stock = fake_build(tmp_path / "stock", "stock")
    first = evaluate.reference(setup, stock)
    assert evaluate.reference(setup, stock) == first and len(calls(stock)) == 1
    setup.text.write_text("other text")
    assert evaluate.reference(setup, stock) != first and len(calls(stock)) == 2
    (stock.lib / "libllama.so").write_bytes(b"another library")
    evaluate.reference(setup, stock)
    assert len(calls(stock)) == 3
    assert sorted(p.suffix for p in first.parent.iterdir()) == [".logits"] * 3


def test_short_text_is_refused_and_leaves_nothing(setup: evaluate.Setup, tmp_path: Path) -> None:
    stock = fake_build(tmp_path / "stock", "stock", chunks=2)
    with pytest.raises(PytqError, match="only 2 chunks of 2048 tokens"):
        evaluate.reference(setup, stock)
    assert list((tmp_path / "home" / "eval").iterdir()) == []


def test_a_failing_program_gives_one_line(setup: evaluate.Setup, tmp_path: Path) -> None:
    stock = fake_build(tmp_path / "stock", "stock")
    script = (
        "#!/bin/sh\necho '0.00.1 E kv profile x.gguf was made for another model'\necho other line\nexit 1\n"
    )
    stock.program("llama-perplexity").write_text(script)
    with pytest.raises(PytqError, match="kv profile x.gguf was made for another model") as caught:
        evaluate.reference(setup, stock)
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "home" / "eval").iterdir()) == []


def test_scores_use_the_right_flags(
    setup: evaluate.Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, patched = fake_build(tmp_path / "stock", "stock"), fake_build(tmp_path / "patched", "patched")
    monkeypatch.setattr(evaluate, "cache_bits", lambda *a: 3.25)
    base = evaluate.reference(setup, stock)
    with_profile = evaluate.Setup(setup.model, setup.text, profile="none")
    seen: list[int] = []
    got = evaluate.score(with_profile, patched, base, "kv4", "kv3", seen.append)
    assert seen == [1] and got.bits == 3.25 and got.kld_p999 == 0.878624 and got.name == "kv4/kv3"
    assert "-ctk kv4 -ctv kv3" in calls(patched)[0] and "--kv-profile none" in calls(patched)[0]
    evaluate.score(with_profile, stock, base, "q4_0", "q4_0")
    assert "--kv-profile" not in calls(stock)[-1]
    floor = evaluate.noise_floor(setup, stock, base)
    assert floor.bits == 16 and "-ub 256" in calls(stock)[-1] and calls(stock)[-1].endswith("-t 1")


def test_types_go_to_their_builds(tmp_path: Path) -> None:
    stock, patched = fake_build(tmp_path / "stock", "stock"), fake_build(tmp_path / "patched", "patched")

    def chosen(k: str, v: str) -> str:
        return evaluate.build_for(k, v, stock, lambda: patched).kind

    assert chosen("q4_0", "f16") == chosen("q8_0", "iq4_nl") == "stock"
    assert (
        chosen("kv4", "f16")
        == chosen("q8_0", "turbo3")
        == chosen("auto3", "auto3")
        == chosen("mxfp4", "mxfp4")
        == "patched"
    )


def test_bits_count_scales_and_profile(model: Path) -> None:
    def bits(k: str, v: str) -> float:
        return evaluate.cache_bits(evaluate.Setup(model, model, profile="none"), k, v)

    assert bits("f16", "f16") == 16 and bits("q4_0", "q4_0") == 4.5
    assert bits("kv3", "kv3") == pytest.approx(3 + 8 / 64) and bits("kv4", "q8_0") == pytest.approx(
        (4.125 + 8.5) / 2
    )


def test_haystack_plants_the_needle_where_it_says() -> None:
    text = " ".join(f"w{i}" for i in range(100))
    got = evaluate.haystack(text, 50, 0.5, "12345")
    words = got.split()
    assert words[24] == "w24" and words[25] == "The" and "12345." in words and got.endswith("lighthouse is")
    assert "w49" in words and "w50" not in words
    with pytest.raises(PytqError, match="100 words, 200 are needed"):
        evaluate.haystack(text, 200, 0.5, "1")


def test_plot_is_a_picture(tmp_path: Path) -> None:
    figures = evaluate.parse_statistics(SUMMARY)
    scores = [
        evaluate.Score("kv3", "kv3", "patched", 3.1, **figures),
        evaluate.Score("q4_0", "q4_0", "stock", 4.5, **figures),
    ]  # type: ignore[arg-type]
    evaluate.plot(scores, scores[0], tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(PytqError, match="cannot write"):
        evaluate.plot(scores, None, tmp_path / "none" / "p.png")
    assert [p.name for p in tmp_path.iterdir()] == ["p.png"]


def test_rows_are_json() -> None:
    figures = evaluate.parse_statistics(SUMMARY)
    row = evaluate.rows([evaluate.Score("kv3", "kv3", "patched", 3.1, **figures)])[0]  # type: ignore[arg-type]
    assert json.loads(json.dumps(row))["name"] == "kv3" and row["kld_mean"] == 0.053853


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "missing.gguf"], "missing.gguf"),
        (["eval", "MODEL", "--types", "kv9"], "kv9"),
        (["eval", "MODEL", "--text", "missing.txt"], "missing.txt"),
        (["eval", "MODEL", "--profile", "missing.kvprofile.gguf"], "missing.kvprofile.gguf"),
        (["eval", "needle", "MODEL", "--depths", "2"], "between 0 and 1"),
        (["eval", "needle", "MODEL", "--lengths", "x"], "--lengths"),
        (["eval", "MODEL", "--chunks", "0"], "--chunks"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, [str(model) if a == "MODEL" else a for a in arguments])
    assert done.exit_code == 2, done.output
    assert done.output.startswith("error: ") and done.output.count("\n") == 1 and message in done.output


@pytest.mark.slow
@pytest.mark.serial
def test_a_real_evaluation(model: Path, stock: BuildDir, patched: BuildDir) -> None:
    """Small, but end to end: f16 reference, noise floor, a stock and a pytq type on 2 chunks of 256 tokens."""
    setup = evaluate.Setup(model, evaluate.default_text_file(), 256, 2, 2, "none")
    base = evaluate.reference(setup, stock)
    (count,) = struct.unpack("<i", base.read_bytes()[16:20])
    assert count == 2
    floor = evaluate.noise_floor(setup, stock, base)
    q8 = evaluate.score(setup, stock, base, "q8_0", "q8_0")
    kv4 = evaluate.score(setup, patched, base, "kv4", "kv4")
    kv2 = evaluate.score(setup, patched, base, "kv2", "kv2")
    assert 0 <= floor.kld_mean < q8.kld_mean < kv4.kld_mean < kv2.kld_mean
    assert kv4.bits < 4.2 and kv4.ppl_base == q8.ppl_base


@pytest.mark.slow
@pytest.mark.serial
def test_constant_keys_are_harmless_with_a_profile(
    tmp_path: Path, model: Path, stock: BuildDir, patched: BuildDir
) -> None:
    """A random Qwen2-shaped model with large K biases loses with a profile what the same model without biases loses, and
    without a profile many times that."""
    import subprocess
    import sys

    from pytq.calibrate import calibrate
    from pytq.profile import default_path, write_profile

    script = Path(__file__).parents[1] / "tools" / "make_biased_model.py"
    figures = {}
    for bias in ("0", "30"):
        made = tmp_path / f"bias{bias}.gguf"
        subprocess.run([sys.executable, str(script), str(model), str(made), "--bias", bias], check=True)
        write_profile(default_path(made), calibrate(made, stock.lib, tokens=8192, threads=2).profile)
        for profile in (None, "none"):
            setup = evaluate.Setup(made, evaluate.default_text_file(), 1024, 1, 2, profile)
            base = evaluate.reference(setup, stock)
            figures[bias, profile] = evaluate.score(setup, patched, base, "kv4", "kv4").kld_mean
    assert figures["30", None] < 1.5 * figures["0", None]
    assert figures["30", "none"] > 5 * figures["30", None]

"""The order of measurements, what survives an interruption, and how samples become rows."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from fake_llama_bench import FakeBench

from pytq import estimate as est
from pytq.bench import runner
from pytq.bench.runner import Case, Options, plan_cases
from pytq.errors import PytqError

PROGRAMS = {"stock": Path("stock-bench"), "patched": Path("patched-bench")}
CASES = [Case("stock", "f16", "f16"), Case("patched", "kv4", "kv3")]


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "load_warnings", lambda: [])


def test_cases() -> None:
    pairs = est.parse_pairs("q8_0,kv4/kv3,f16")
    assert plan_cases(pairs) == [
        Case("stock", "f16", "f16"),
        Case("stock", "q8_0", "q8_0"),
        Case("patched", "kv4", "kv3"),
    ]
    both = [(c.build, c.type_k) for c in plan_cases(est.parse_pairs("q8_0"), both=True)]
    assert both == [("stock", "f16"), ("stock", "q8_0"), ("patched", "q8_0")]


def test_builds_take_turns_after_a_warm_up(fake_bench: FakeBench, small: Path) -> None:
    runner.run(Options(small, (0, 256), 64, 8, repeat=3), CASES, PROGRAMS, once=fake_bench)
    warm_up, rest = fake_bench.calls[:2], fake_bench.calls[2:]
    assert warm_up == [("stock-bench", "f16", 0), ("patched-bench", "f16", 0)]
    one_round = [(p, t, d) for d in (0, 256) for p, t in (("stock-bench", "f16"), ("patched-bench", "kv4"))]
    assert rest == one_round * 3


def test_rows(fake_bench: FakeBench, small: Path) -> None:
    fake_bench.speed = lambda type_k, depth, n: 200.0 if type_k == "kv4" else 100.0
    options = Options(small, (256,), 64, 8, repeat=3)
    rows = runner.summarise(runner.run(options, CASES, PROGRAMS, once=fake_bench), est.open_model(small), {})
    kv = next(r for r in rows if r["build"] == "patched" and r["test"] == "tg8")
    assert (kv["ratio"], kv["ratio_low"], kv["ratio_high"]) == (2, 2, 2)
    assert kv["median_ts"] == 200 and len(kv["samples_ts"]) == 3 and not kv["noisy"]
    # 64 prompt tokens and one more at 200 tokens per second
    assert kv["ttft_ms"] == pytest.approx(1000 * 65 / 200)
    size = est.cache_size(est.open_model(small).hparams, ("kv4", "kv3"), est.Plan(256 + 64 + 8))
    assert kv["cache_mib"] == size.kv / est.MIB and kv["bits_per_value"] == round(size.bits, 4)
    assert kv["build_commit"].endswith("-pytq") and kv["baseline"] == "stock f16"
    base = next(r for r in rows if r["build"] == "stock" and r["test"] == "tg8")
    assert base["ratio"] is None and not base["build_commit"].endswith("-pytq")


def test_interruption_keeps_what_was_measured(fake_bench: FakeBench, small: Path) -> None:
    fake_bench.stop_after = 2 + 5  # warm-up, then two rounds and a half
    results = runner.run(Options(small, (0,), 64, 8, repeat=9), CASES, PROGRAMS, once=fake_bench)
    assert results.interrupted and "interrupted" in results.warnings[-1]
    rows = runner.summarise(results, est.open_model(small), {})
    assert {len(r["samples_ts"]) for r in rows if r["build"] == "stock"} == {3}
    assert {len(r["samples_ts"]) for r in rows if r["build"] == "patched"} == {2}
    assert all(r["ratio"] == 1 for r in rows if r["build"] == "patched")


def test_noise_is_reported(fake_bench: FakeBench, small: Path) -> None:
    fake_bench.speed = lambda type_k, depth, n: 100.0 + 60 * (n % 3)
    results = runner.run(Options(small, (0,), 64, 8, repeat=6), CASES, PROGRAMS, once=fake_bench)
    rows = runner.summarise(results, est.open_model(small), {})
    assert all(r["noisy"] for r in rows) and "trust no small difference" in results.warnings[-1]


def test_a_failing_case_is_left_out_and_said(fake_bench: FakeBench, small: Path) -> None:
    def once(command: list[str]) -> list[dict]:
        if "kv4" in command:
            raise PytqError("llama-bench failed (1): no such type")
        return fake_bench(command)

    results = runner.run(Options(small, (0,), 64, 8, repeat=3), CASES, PROGRAMS, once=once)
    assert len([w for w in results.warnings if "patched kv4/kv3" in w and "no such type" in w]) == 1
    assert {r["build"] for r in runner.summarise(results, est.open_model(small), {})} == {"stock"}


def test_nothing_measured_is_an_error(small: Path) -> None:
    def once(command: list[str]) -> list[dict]:
        if command[command.index("-n") + 1] == "4":  # the warm-up
            return []
        raise PytqError("broken")

    with pytest.raises(PytqError, match="broken"):
        runner.run(Options(small, (0,), 64, 8), CASES, PROGRAMS, once=once)


def test_failing_program(tmp_path: Path) -> None:
    with pytest.raises(PytqError, match=r"failed \(3\): last words"):
        runner.run_once(
            [sys.executable, "-c", "import sys; print('a\\nlast words', file=sys.stderr); sys.exit(3)"]
        )


@pytest.mark.parametrize(
    "bad", [{"n_prompt": 0}, {"n_gen": -1}, {"repeat": 0}, {"threads": 0}, {"depths": (-1,)}]
)
def test_options_refuse_nothing_and_negatives(bad: dict, small: Path) -> None:
    with pytest.raises(PytqError, match="must be at least"):
        Options(small, **bad)


def test_progress_reaches_its_total(fake_bench: FakeBench, small: Path) -> None:
    seen: list[tuple[float, float]] = []
    options = Options(small, (0, 512), 64, 8, repeat=2)
    runner.run(options, CASES, PROGRAMS, lambda done, total, what: seen.append((done, total)), fake_bench)
    assert seen == sorted(seen) and seen[-1][0] == pytest.approx(seen[-1][1])

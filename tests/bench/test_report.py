"""Every output format holds the same rows, and others' tools can read them."""

from __future__ import annotations

import csv
import io
import json
import re
import sqlite3
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from fake_llama_bench import FIELDS, FakeBench

from pytq import estimate as est
from pytq.bench import report, runner
from pytq.bench.runner import Options, plan_cases
from pytq.errors import PytqError

META = {
    "cpu_count": 2,
    "memory_gib": 24.0,
    "system": "Linux 6",
    "time": "2026-01-01T00:00:00Z",
    "pytq": "0.1.0",
}
KLD = [
    {"type_k": "q4_0", "type_v": "q4_0", "bits": 4.5, "kld": 0.06},
    {"type_k": "kv4", "type_v": "kv3", "bits": 3.6, "kld": 0.03},
]


@pytest.fixture
def rows(fake_bench: FakeBench, small: Path, monkeypatch: pytest.MonkeyPatch) -> list[report.Row]:
    monkeypatch.setattr(runner, "load_warnings", lambda: [])
    speed = {"f16": 100.0, "q8_0": 80.0, "kv4": 150.0}
    fake_bench.speed = lambda type_k, depth, n: speed[type_k] / (1 + depth / 512)
    options = Options(small, (0, 512), 64, 8, repeat=3)
    programs = {"stock": Path("s"), "patched": Path("p")}
    results = runner.run(options, plan_cases(est.parse_pairs("q8_0,kv4/kv3")), programs, once=fake_bench)
    return runner.summarise(results, est.open_model(small), {})


def test_markdown(rows: list[report.Row]) -> None:
    text = report.render(rows, ["beware"], META, "md", [])
    line = next(x for x in text.splitlines() if "kv4/kv3 (patched)" in x and "tg8 @ d512" in x)
    assert "1.50 [1.50, 1.50]" in line and "75.0" in line
    assert "warning: beware" in text and "Some CPU" in text


def test_json_and_jsonl(rows: list[report.Row]) -> None:
    assert json.loads(report.render(rows, [], META, "json", []))["rows"] == rows
    lines = report.render(rows, [], META, "jsonl", []).splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_rows_have_llama_bench_fields(rows: list[report.Row]) -> None:
    """All that compare-llama-bench.py groups and compares by."""
    wanted = set(FIELDS) | {"model_filename", "type_k", "type_v", "n_prompt", "n_gen", "n_depth"}
    assert wanted | {"avg_ns", "stddev_ns", "avg_ts", "stddev_ts", "samples_ns", "samples_ts"} <= set(rows[0])


def test_csv(rows: list[report.Row]) -> None:
    read = list(csv.DictReader(io.StringIO(report.render(rows, [], META, "csv", []))))
    assert [float(r["median_ts"]) for r in read] == [r["median_ts"] for r in rows]


def test_sql_is_sqlite(rows: list[report.Row]) -> None:
    base = sqlite3.connect(":memory:")
    try:
        rows[0]["model_type"] = "it's"
        base.executescript(report.render(rows, [], META, "sql", []))
        got = base.execute("SELECT type_k, n_depth, avg_ts, ratio, model_type FROM llama_bench").fetchall()
    finally:
        base.close()
    assert got == [(r["type_k"], r["n_depth"], r["avg_ts"], r["ratio"], r["model_type"]) for r in rows]


def test_html_is_self_contained_and_well_formed(rows: list[report.Row]) -> None:
    rows[0]["cpu_info"] = "<b>CPU & co"
    text = report.render(rows, ["a <warning>"], META, "html", KLD)
    assert not re.search(r"<script|<link|\bsrc=|@import|url\((?!#)", text)
    assert "&lt;b&gt;CPU &amp; co" in text and "a &lt;warning&gt;" in text
    body = text[text.index("<body>") : text.index("</body>") + 7].replace("&nbsp;", " ")
    tree = ET.fromstring(re.sub(r"<!--.*?-->", "", body, flags=re.S))
    assert len(list(tree.iter("{http://www.w3.org/2000/svg}svg"))) == 3
    assert len(list(tree.iter("tr"))) == 1 + len(rows)
    assert len(list(report.render(rows, [], META, "html", []).split("<svg"))) == 3, (
        "no quality plot without data"
    )


def test_plots_show_the_data(rows: list[report.Row]) -> None:
    axes = report.plot_speed(rows, "tg").axes[0]
    lines = {line.get_label(): list(line.get_ydata()) for line in axes.get_lines()}
    assert lines == {"f16": [100, 50], "q8_0": [80, 40], "kv4/kv3 (patched)": [150, 75]}
    quality = report.plot_kld(KLD).axes[0]
    assert [(p.get_xdata()[0], p.get_ydata()[0]) for p in quality.get_lines()] == [(4.5, 0.06), (3.6, 0.03)]


def test_same_data_same_svg(rows: list[report.Row]) -> None:
    assert report.svg(report.plot_speed(rows, "tg")) == report.svg(report.plot_speed(rows, "tg"))


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_plot_files(rows: list[report.Row], tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"plot.{ending}"
    report.save_plot(rows, path, KLD)
    start = {"svg": b"<?xml", "png": b"\x89PNG", "pdf": b"%PDF"}[ending]
    assert path.read_bytes().startswith(start)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_quality_data(tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    row = {"type_k": "kv4", "type_v": "kv3", "bits_per_value": 3.6, "mean_kld": 0.03}
    f16 = {"type_k": "f16", "type_v": "f16", "bits_per_value": 16, "mean_kld": 0.0}
    path.write_text(json.dumps({"model": "m", "rows": [row, f16]}))
    assert report.read_kld(path) == [KLD[1]], "f16 against itself has no place on a logarithmic axis"
    for text, message in (("", "no JSON"), ("{}", "holds no rows"), ("[1]", "holds no rows")):
        path.write_text(text)
        with pytest.raises(PytqError, match=message):
            report.read_kld(path)
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(PytqError, match="not UTF-8"):
        report.read_kld(path)
    with pytest.raises(PytqError, match="cannot read"):
        report.read_kld(tmp_path / "none.json")

"""Benchmark rows as markdown, JSON, CSV, SQL or a self-contained HTML page with plots."""

from __future__ import annotations

import csv
import html
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pytq.errors import PytqError
from pytq.estimate import pair_name

Row = dict[str, Any]
FORMATS = ("md", "json", "jsonl", "csv", "sql", "html")
SQL_TYPES = {bool: "INTEGER", int: "INTEGER", float: "REAL", str: "TEXT"}
# colour-blind safe (Okabe and Ito), stock types grey to black
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c564b", "#7f3fbf", "#b0a000")
GREYS = ("#000000", "#777777", "#aaaaaa", "#555555", "#c0c0c0")


def label(row: Row) -> str:
    """How a row's cache is called in tables: the type, and the build when it is not the usual one."""
    name = pair_name(row["type_k"], row["type_v"])
    return name if row["build"] == "stock" else f"{name} (patched)"


def ratio_text(row: Row) -> str:
    """``1.23 [1.20, 1.26]``: the ratio to stock f16 and its 95 % interval."""
    if row["ratio"] is None:
        return ""
    if row["ratio_low"] is None:
        return f"{row['ratio']:.2f}"
    return f"{row['ratio']:.2f} [{row['ratio_low']:.2f}, {row['ratio_high']:.2f}]"


COLUMNS: tuple[tuple[str, Callable[[Row], str]], ...] = (
    ("cache type", label),
    ("bits/value", lambda r: f"{r['bits_per_value']:.3f}"),
    ("cache MiB", lambda r: f"{r['cache_mib']:.1f}"),
    ("test", lambda r: f"{r['test']} @ d{r['n_depth']}"),
    ("tokens/s", lambda r: f"{r['median_ts']:.1f}" + (" ~" if r["noisy"] else "")),
    ("x stock f16 [95 %]", ratio_text),
    ("first token ms", lambda r: f"{r['ttft_ms']:.1f}" if r["ttft_ms"] is not None else ""),
)


def facts(rows: Sequence[Row], meta: dict[str, Any]) -> list[tuple[str, str]]:
    """The conditions of a run: model, machine, builds, options."""
    first = rows[0]
    commits = sorted({f"{r['build']}: {r['build_commit']} ({r['backends']})" for r in rows})
    machine = (
        f"{first['cpu_info']}, {meta['cpu_count']} processors, {meta['memory_gib']} GiB, {meta['system']}"
    )
    if first.get("gpu_info"):
        machine += f", {first['gpu_info']}"
    size = first["model_size"] / (1 << 20)
    return [
        ("model", f"{Path(first['model_filename']).name} ({first['model_type']}, {size:.0f} MiB)"),
        ("machine", machine),
        ("builds", "; ".join(commits)),
        (
            "options",
            f"-t {first['n_threads']} -fa 1 -ub {first['n_ubatch']}, {len(first['samples_ts'])} round(s) in turns",
        ),
        ("time", f"{meta['time']}, pytq {meta['pytq']}"),
    ]


def render(
    rows: Sequence[Row], warnings: Sequence[str], meta: dict[str, Any], form: str, kld: list[Row]
) -> str:
    """The rows in one of FORMATS; ``kld`` are rows of ``pytq eval --json`` and only drawn in HTML."""
    if form == "md":
        return markdown(rows, warnings, meta)
    if form == "json":
        return json.dumps({"meta": meta, "warnings": list(warnings), "rows": list(rows)}, indent=1) + "\n"
    if form == "jsonl":
        return "".join(json.dumps(row) + "\n" for row in rows)
    if form == "csv":
        return as_csv(rows)
    if form == "sql":
        return as_sql(rows)
    if form == "html":
        return as_html(rows, warnings, meta, kld)
    raise PytqError(f"unknown output format {form!r}; known: {', '.join(FORMATS)}")


def markdown(rows: Sequence[Row], warnings: Sequence[str], meta: dict[str, Any]) -> str:
    """A table with its conditions above and warnings below."""
    from tabulate import tabulate

    lines = [f"{key}: {value}  " for key, value in facts(rows, meta)]
    body = [[cell(row) for _, cell in COLUMNS] for row in rows]
    align = ("left", "right", "right", "left", "right", "right", "right")
    table = tabulate(
        body, headers=[name for name, _ in COLUMNS], tablefmt="github", colalign=align, disable_numparse=True
    )
    notes = [f"warning: {text}" for text in warnings]
    if any(row["noisy"] for row in rows):
        notes.append("~ marks rows whose repeated runs differ by more than 5 %")
    return "\n".join([*lines, "", table, "", *notes]).rstrip() + "\n"


def flat(rows: Sequence[Row]) -> tuple[list[str], list[Row]]:
    """Column names and rows without the sample lists, for formats of scalars (as llama-bench does)."""
    columns = [key for key in rows[0] if not key.startswith("samples_")]
    return columns, [{key: row.get(key) for key in columns} for row in rows]


def as_csv(rows: Sequence[Row]) -> str:
    columns, data = flat(rows)
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, quoting=csv.QUOTE_ALL, lineterminator="\n")
    writer.writeheader()
    writer.writerows(data)
    return out.getvalue()


def as_sql(rows: Sequence[Row]) -> str:
    """``CREATE TABLE`` and ``INSERT`` for SQLite, table llama_bench as llama-bench names it."""
    columns, data = flat(rows)
    kinds = [next((SQL_TYPES[type(r[c])] for r in data if r[c] is not None), "REAL") for c in columns]
    lines = ["CREATE TABLE IF NOT EXISTS llama_bench ("]
    lines.append(",\n".join(f"  {name} {kind}" for name, kind in zip(columns, kinds, strict=True)))
    lines.append(");\n")
    for row in data:
        values = ", ".join(_sql_value(row[c]) for c in columns)
        lines.append(f"INSERT INTO llama_bench ({', '.join(columns)}) VALUES ({values});")
    return "\n".join(lines) + "\n"


def _sql_value(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (int, float)):
        return repr(value)
    return "'" + str(value).replace("'", "''") + "'"


def _styles(rows: Sequence[Row]) -> dict[str, tuple[str, str]]:
    """A colour and line style per label, the same in all plots."""
    stock = list(dict.fromkeys(label(r) for r in rows if r["build"] == "stock"))
    ours = list(dict.fromkeys(label(r) for r in rows if r["build"] != "stock"))
    out = {name: (GREYS[i % len(GREYS)], "--") for i, name in enumerate(stock)}
    return out | {name: (COLOURS[i % len(COLOURS)], "-") for i, name in enumerate(ours)}


def _figure(width: float = 7.0, height: float = 4.2) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def plot_speed(rows: Sequence[Row], kind: str) -> Any:
    """Median tokens per second against depth, one line per cache type; ``kind`` is pp or tg."""
    figure, axes = _figure()
    depths = sorted({r["n_depth"] for r in rows})
    for name, (colour, line) in _styles(rows).items():
        points = sorted(
            (r["n_depth"], r["median_ts"]) for r in rows if label(r) == name and r["test"].startswith(kind)
        )
        if points:
            x = [depths.index(d) for d, _ in points]
            axes.plot(x, [ts for _, ts in points], line, color=colour, marker="o", markersize=4, label=name)
    axes.set_xticks(range(len(depths)), [str(d) for d in depths])
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("tokens per second")
    axes.set_ylim(bottom=0)
    axes.set_title({"pp": "Prompt processing", "tg": "Generation"}[kind])
    axes.legend(fontsize=8, ncols=2)
    return figure


def plot_kld(kld: Sequence[Row]) -> Any:
    """Mean KL divergence to the f16 cache against bits per value, logarithmic: down and left is better."""
    figure, axes = _figure()
    stock, ours = 0, 0
    for row in kld:
        patched = any(str(row[key]).startswith(("kv", "turbo")) for key in ("type_k", "type_v"))
        colour = COLOURS[ours % len(COLOURS)] if patched else GREYS[stock % len(GREYS)]
        ours, stock = ours + patched, stock + (not patched)
        axes.plot(row["bits"], row["kld"], "o" if patched else "s", color=colour)
        name = pair_name(row["type_k"], row["type_v"])
        axes.annotate(name, (row["bits"], row["kld"]), xytext=(5, 4), textcoords="offset points", fontsize=8)
    axes.set_yscale("log")
    axes.margins(x=0.12, y=0.12)
    axes.set_xlabel("bits per value, scales counted")
    axes.set_ylabel("mean KL divergence to f16")
    axes.set_title("Quality")
    return figure


def svg(figure: Any) -> str:
    """A figure as an ``<svg>`` element, the same bytes for the same data."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "pytq", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def save_plot(rows: Sequence[Row], path: Path, kld: Sequence[Row]) -> None:
    """Speed against depth (and quality if there is data) into one SVG, PNG or PDF file, chosen by its ending."""
    from matplotlib.figure import Figure

    from pytq.gguf.edit import atomic

    form = path.suffix.lstrip(".").lower()
    if form not in ("svg", "png", "pdf"):
        raise PytqError(f"{path}: a plot is written as .svg, .png or .pdf")
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    axes = figure.subplots(1, 2)
    depths = sorted({r["n_depth"] for r in rows})
    for axis, kind in zip(axes, ("pp", "tg"), strict=True):
        for name, (colour, line) in _styles(rows).items():
            points = sorted(
                (r["n_depth"], r["median_ts"]) for r in rows if label(r) == name and r["test"][:2] == kind
            )
            x = [depths.index(d) for d, _ in points]
            axis.plot(x, [ts for _, ts in points], line, color=colour, marker="o", markersize=4, label=name)
        axis.set_xticks(range(len(depths)), [str(d) for d in depths])
        axis.set_xlabel("tokens in the cache")
        axis.set_ylabel("tokens per second")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.set_title({"pp": "Prompt processing", "tg": "Generation"}[kind])
    axes[0].legend(fontsize=8, ncols=2)
    with atomic(path) as out:
        figure.savefig(out, format=form)


STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 68rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .3rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .9rem; }
dt { opacity: .65; } dd { margin: 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child, th:nth-child(4), td:nth-child(4) { text-align: left; }
tr.ours td:first-child { font-weight: 600; } tr.gap td { border-bottom: 2px solid #8888; }
td.good { color: #0a7d4f; } td.bad { color: #c0392b; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; flex: 1 1 28rem; background: #fff; border-radius: .5rem; padding: .5rem; border: 1px solid var(--line); }
figure svg { width: 100%; height: auto; }
.warn { background: #f5b70033; padding: .5rem .8rem; border-left: 4px solid #f5b700; margin: .4rem 0; }
footer { font-size: .85rem; opacity: .75; margin-top: 2rem; }
"""


def as_html(rows: Sequence[Row], warnings: Sequence[str], meta: dict[str, Any], kld: Sequence[Row]) -> str:
    """One page that needs nothing else: no scripts, no fonts, no files."""
    e = html.escape
    head = "".join(f"<dt>{e(key)}</dt><dd>{e(value)}</dd>" for key, value in facts(rows, meta))
    warn = "".join(f'<p class="warn">{e(text)}</p>' for text in warnings)
    plots = [f"<figure>{svg(plot_speed(rows, kind))}</figure>" for kind in ("tg", "pp")]
    if kld:
        plots.append(f"<figure>{svg(plot_kld(kld))}</figure>")
    cells = "".join(f"<th>{e(name)}</th>" for name, _ in COLUMNS)
    body = "".join(_html_row(row, rows[i + 1] if i + 1 < len(rows) else None) for i, row in enumerate(rows))
    name = e(Path(rows[0]["model_filename"]).name)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>pytq bench: {name}</title><style>{STYLE}</style></head><body>
<h1>KV-cache types on {name}</h1>
<dl>{head}</dl>{warn}
<div class="plots">{"".join(plots)}</div>
<h2>Numbers</h2>
<div class="scroll"><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table></div>
<footer>Tokens per second are medians of the rounds. The ratio compares medians with the stock (unpatched) f16 cache
measured in the same rounds; in brackets its 95 % bootstrap interval. First token: processing the prompt and one token.
Cache MiB and bits per value count every scale. ~: repeated runs differ by more than 5 %.</footer>
</body></html>
"""


def _html_row(row: Row, following: Row | None) -> str:
    classes = ["ours"] if row["build"] != "stock" else []
    if following is not None and following["n_depth"] != row["n_depth"]:
        classes.append("gap")
    cells = []
    for name, cell in COLUMNS:
        mark = ""
        if name.startswith("x stock") and row["ratio_low"] is not None:
            # coloured only when the interval excludes 1: otherwise the difference was not shown
            mark = (
                ' class="good"' if row["ratio_low"] > 1 else ' class="bad"' if row["ratio_high"] < 1 else ""
            )
        cells.append(f"<td{mark}>{html.escape(cell(row))}</td>")
    return f'<tr class="{" ".join(classes)}">{"".join(cells)}</tr>'


def read_kld(path: Path) -> list[Row]:
    """Rows with type_k, type_v, bits and kld from a file that ``pytq eval --json`` wrote."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PytqError(f"{path}: cannot read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise PytqError(f"{path}: is not UTF-8 text") from error
    except json.JSONDecodeError as error:
        raise PytqError(f"{path}: is no JSON: {error}") from error
    rows = data if isinstance(data, list) else next((v for v in data.values() if isinstance(v, list)), [])
    found = []
    for row in rows:
        if not isinstance(row, dict):
            continue
        bits = next((row[k] for k in ("bits_per_value", "bits") if k in row), None)
        kld = next((row[k] for k in ("mean_kld", "kld_mean", "kld") if k in row), None)
        if isinstance(bits, (int, float)) and isinstance(kld, (int, float)) and kld > 0 and "type_k" in row:
            found.append(
                {
                    "type_k": row["type_k"],
                    "type_v": row.get("type_v", row["type_k"]),
                    "bits": bits,
                    "kld": kld,
                }
            )
    if not found:
        raise PytqError(f"{path}: holds no rows of `pytq eval --json` (type_k, type_v, bits and KLD)")
    return found

"""``pytq calibrate``: measure a model's keys, queries and values, and write its profile."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click

from pytq import figures
from pytq.errors import PytqError


def _plot(reports: list[Any], gains: list[list[float]], target: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    width = max(len(g) for g in gains)
    grid = np.full((width, len(gains)), np.nan)
    for i, g in enumerate(gains):
        grid[: len(g), i] = 10 * np.log10(np.maximum(g, 1e-12))
    figure, axes = plt.subplots(figsize=(10, 1.5 + 0.35 * width))
    image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest")
    axes.set_xticks(range(len(reports)), [str(r.layer) for r in reports], fontsize=7)
    axes.set_yticks(range(width))
    axes.set_xlabel("layer")
    axes.set_ylabel("KV head")
    axes.set_title("gain of the key transform (dB of squared logit error, equal bits)")
    figure.colorbar(image, ax=axes)
    figure.tight_layout()
    figures.save(figure, target)


@click.command(
    "calibrate",
    help="Calibrate MODEL's KV cache: write MODEL.kvprofile.gguf for the kv* and auto* cache types.",
)
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--text",
    "text_file",
    type=click.Path(path_type=Path),
    help="Calibration text (UTF-8); default: docstrings of Python's library.",
)
@click.option(
    "--tokens", default=None, type=click.IntRange(min=256), help="Tokens to run, at most.  [default: 12288]"
)
@click.option(
    "--bits",
    default=None,
    type=click.FloatRange(2.0, 6.0),
    help="Budget of the recommended type `auto`.  [default: 3.5]",
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Profile to write; default: beside the model."
)
@click.option(
    "--embed",
    type=click.Path(path_type=Path),
    help="Write a copy of the model with the profile inside instead.",
)
@click.option("--plot", type=click.Path(path_type=Path), help="Heat map of the gains, as a picture.")
@click.option("-t", "--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def command(
    model: Path,
    text_file: Path | None,
    tokens: int | None,
    bits: float | None,
    output: Path | None,
    embed: Path | None,
    plot: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    from pytq import calibrate as cal
    from pytq.gguf.edit import plan, write
    from pytq.gguf.layout import read_layout
    from pytq.gguf.profile import edit_embed, is_profile
    from pytq.model import gguf_check
    from pytq.paths import find_build
    from pytq.profile import default_path, write_profile
    from pytq.progress import step
    from pytq.textfile import read_text

    if output is not None and embed is not None:
        raise PytqError("give either -o or --embed")
    gguf_check(model)
    if is_profile(read_layout(model)):
        raise PytqError(f"{model}: is a profile, not a model")
    if embed is not None and embed.resolve() == model.resolve():
        raise PytqError("--embed writes a copy: name another file than the model")
    text = read_text(text_file) if text_file is not None else None
    target = embed or output or default_path(model)
    if not target.parent.is_dir():
        raise PytqError(f"cannot write {target}: no directory {target.parent}")
    if not os.access(target.parent, os.W_OK):  # before minutes of work
        raise PytqError(f"cannot write {target}: {target.parent} is read-only")
    try:
        lib = find_build("stock").lib
    except PytqError:
        lib = find_build("patched").lib
    with step("calibrate") as progress:
        result = cal.calibrate(
            model,
            lib,
            text=text,
            tokens=tokens or cal.DEFAULT_TOKENS,
            bits=bits or cal.DEFAULT_BITS,
            threads=threads,
            on_progress=lambda done, total: progress.update(done, total),
        )
    profile = result.profile
    if embed is not None:
        import tempfile

        with tempfile.TemporaryDirectory() as directory:
            part = Path(directory) / "profile.gguf"
            write_profile(part, profile)
            write(plan(read_layout(model), edit_embed(read_layout(model), read_layout(part))), embed)
    else:
        write_profile(target, profile)
    if plot is not None:
        _plot(result.reports, [result.gains[r.layer] for r in result.reports], plot)
    summary = {
        "profile": str(target),
        "model": profile.model_name,
        "fingerprint": profile.fingerprint,
        "tokens": profile.tokens,
        "seconds": round(result.seconds, 2),
        "types": {f: {"bits": round(profile.bits[f], 4), "k": k, "v": v} for f, (k, v) in profile.types.items()},
        "layers": [
            {"layer": r.layer, "head_dim": r.head_dim, "n_kv": r.n_kv, "gain": r.gain, "gain_per_head": result.gains[r.layer],
             "error_k": r.error_k, "error_v": r.error_v}
            for r in result.reports
        ],
    }  # fmt: skip
    if as_json:
        click.echo(json.dumps(summary, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{profile.model_name}: predicted gain of the key transform, and types of `auto`")
    for title in ("layer", "head_dim", "KV heads", "gain", "K", "V"):
        table.add_column(title, justify="right")
    k, v = profile.types["auto"]
    for r in result.reports:
        table.add_row(str(r.layer), str(r.head_dim), str(r.n_kv), f"{r.gain:.1f} x", k[r.layer], v[r.layer])
    console = Console()
    console.print(table)
    console.print(
        f"{profile.tokens} tokens in {result.seconds:.0f} s. auto: {profile.bits['auto']:.3f} bits per value, all scales counted.\n"
        f"Written to {target}"
    )

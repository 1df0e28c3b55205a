"""``pytq bench``: speed of cache types against the unpatched llama.cpp."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from pytq import estimate as est
from pytq import paths
from pytq.bench import report, runner, shapes
from pytq.errors import PytqError

EXIT_INTERRUPTED = 130


@click.command("bench", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": True})
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("--shape", help=f"Random weights instead of MODEL: {', '.join(shapes.SHAPES)}.")
@click.option(
    "--types", default="q8_0,q4_0,turbo4,turbo3,kv4,kv3", show_default=True, help="Types or K/V pairs."
)
@click.option("--depths", "-d", default="0,4096", show_default=True, help="Tokens already in the cache.")
@click.option("--pp", type=int, default=512, show_default=True, help="Prompt tokens.")
@click.option("--tg", type=int, default=32, show_default=True, help="Generated tokens.")
@click.option("--repeat", "-r", type=int, default=5, show_default=True, help="Rounds over all types.")
@click.option("--backend", default="cpu", show_default=True, help="cpu, cuda, hip or metal.")
@click.option("--threads", "-t", type=int, help="Threads (llama-bench's default otherwise).")
@click.option("--ngl", type=int, help="Layers on the GPU.")
@click.option("--both", is_flag=True, help="Measure stock types on the patched build too.")
@click.option("-o", "--output", "form", type=click.Choice(report.FORMATS), default="md", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Write the output to this file.")
@click.option("--plot", type=click.Path(path_type=Path), help="Speed against depth as .svg, .png or .pdf.")
@click.option(
    "--eval",
    "eval_file",
    type=click.Path(path_type=Path),
    help="Rows of `pytq eval --json` for the HTML plot.",
)
@click.argument("extra", nargs=-1, type=click.UNPROCESSED)
def command(
    model: Path | None,
    shape: str | None,
    types: str,
    depths: str,
    pp: int,
    tg: int,
    repeat: int,
    backend: str,
    threads: int | None,
    ngl: int | None,
    both: bool,
    form: str,
    out: Path | None,
    plot: Path | None,
    eval_file: Path | None,
    extra: tuple[str, ...],
) -> None:
    """Tokens per second of cache types on MODEL, against f16 of the unpatched build.

    The builds take turns, so a slow moment hits all alike; medians and 95 % intervals of the ratio are shown.
    Ctrl-C keeps what was measured. Options after -- go to llama-bench.
    """
    pairs = est.parse_pairs(types)
    kld = report.read_kld(eval_file) if eval_file is not None else []
    if plot is not None and plot.suffix.lower() not in (".svg", ".png", ".pdf"):
        raise PytqError(f"{plot}: a plot is written as .svg, .png or .pdf")
    for target in (out, plot):
        if target is not None and not target.parent.is_dir():
            raise PytqError(f"{target.parent} is no directory")
    path = _model(model, shape)
    options = runner.Options(path, parse_depths(depths), pp, tg, repeat, threads, ngl, extra)
    info = est.open_model(path)
    cases = runner.plan_cases(pairs, both)
    runner.check(info, options, cases)
    builds = {
        kind: paths.find_build(kind, backend) for kind in paths.KINDS if any(c.build == kind for c in cases)
    }
    programs = {str(kind): build.program("llama-bench") for kind, build in builds.items()}
    # a terminated run (a job's time limit) reports what it has, as Ctrl-C does
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with progress_bar("bench") as progress:
            results = runner.run(options, cases, programs, progress)
    finally:
        signal.signal(signal.SIGTERM, previous)
    rows = runner.summarise(results, info, {str(kind): build for kind, build in builds.items()})
    if not rows:
        click.echo("interrupted before anything was measured", err=True)
        raise click.exceptions.Exit(EXIT_INTERRUPTED)
    from pytq import __version__

    meta = runner.machine_facts() | {"pytq": __version__, "interrupted": results.interrupted}
    text = report.render(rows, results.warnings, meta, form, kld)
    if out is None:
        click.echo(text, nl=False)
    else:
        from pytq.gguf.edit import atomic

        with atomic(out) as file:
            file.write(text.encode())
        click.echo(f"wrote {out}", err=True)
    if plot is not None:
        report.save_plot(rows, plot, kld)
        click.echo(f"wrote {plot}", err=True)
    if form not in ("md", "html"):
        for warning in results.warnings:
            click.echo(f"warning: {warning}", err=True)
    if results.interrupted:
        raise click.exceptions.Exit(EXIT_INTERRUPTED)


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def parse_depths(text: str) -> tuple[int, ...]:
    """``0,4096`` as numbers; PytqError for anything that is not a list of numbers from 0."""
    try:
        depths = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise PytqError(f"--depths {text!r} is no list of numbers such as 0,4096") from error
    if min(depths) < 0:
        raise PytqError(f"--depths must not be negative: {text!r}")
    return depths


def _model(model: Path | None, shape: str | None) -> Path:
    """The model to measure: the user's, one of a shape (written once into the cache), or the default model."""
    from pytq.model import default_model

    if shape is None:
        return model if model is not None else default_model()
    if model is not None:
        raise PytqError("give either MODEL or --shape, not both")
    dims = shapes.get_shape(shape)
    directory = paths.writable(paths.home() / "shapes")
    path = directory / f"{shape}.gguf"
    if not path.exists():
        vocab = default_model()
        with progress_bar(f"writing {shape}") as progress:
            shapes.write_model(
                dims, shape, vocab, path, lambda done, total: progress(done, total, f"writing {shape}")
            )
    return path


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Callable[[float, float, str], None]]:
    """A bar with the time left on stderr; yields ``update(done, total, what)``."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns: list[Any] = [
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    ]
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(title, total=None)

        def update(done: float, total: float, what: str) -> None:
            progress.update(task, completed=done, total=total, description=what)

        yield update

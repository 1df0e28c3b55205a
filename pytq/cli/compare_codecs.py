"""`pytq compare-codecs`."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from pytq.errors import PytqError


def write_text(path: Path, text: str) -> None:
    """Writes a file or leaves it as it was."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            name = file.name
            try:
                file.write(text)
                file.close()
                os.chmod(name, 0o644)
                os.replace(name, path)
            except BaseException:
                os.unlink(name)
                raise
    except OSError as error:
        raise PytqError(f"cannot write {path}: {error.strerror or error}") from error


@click.command("compare-codecs")
@click.option("--codecs", default=None, help="Comma-separated names, NAME:BITS for one rate; all by default.")
@click.option(
    "--bits", default="1,2,3,4,5,6,7,8", show_default=True, help="Rates of turboquant_* and rabitq."
)
@click.option("--head-dim", "dim", type=int, default=128, show_default=True, help="Length of the vectors.")
@click.option(
    "--rotation", type=click.Choice(["hadamard", "random", "none"]), default="hadamard", show_default=True
)
@click.option("--data", type=click.Choice(["gaussian", "clustered"]), default="gaussian", show_default=True)
@click.option(
    "--file",
    "file",
    type=click.Path(path_type=Path),
    default=None,
    help="Own vectors: .npy, floats [n, dim].",
)
@click.option("--vectors", "n", type=int, default=2000, show_default=True, help="Vectors stored per seed.")
@click.option("--queries", type=int, default=200, show_default=True, help="Queries per seed.")
@click.option(
    "--seeds", type=int, default=10, show_default=True, help="Seeds of data, rotation and projection."
)
@click.option("--threads", type=int, default=None, help="Threads timed beside 1; all by default.")
@click.option(
    "--time-vectors", type=int, default=20000, show_default=True, help="Vectors per timed call; 0: no timing."
)
@click.option("--repeat", type=int, default=5, show_default=True, help="Timed calls; the fastest counts.")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=None, help="Write .json or .md instead."
)
def command(
    codecs: str | None,
    bits: str,
    dim: int,
    rotation: str,
    data: str,
    file: Path | None,
    n: int,
    queries: int,
    seeds: int,
    threads: int | None,
    time_vectors: int,
    repeat: int,
    as_json: bool,
    output: Path | None,
) -> None:
    """Compare TurboQuant, QJL, PolarQuant, RaBitQ, ggml's and pytq's formats on the same vectors.

    Same rotation, device and threads for all; every stored scalar counts in bits per value; means and standard
    deviations over the seeds. What the columns mean: docs/codecs.md.
    """
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from pytq import compare as comparison

    try:
        rates = [int(b) for b in bits.split(",")]
    except ValueError as error:
        raise PytqError(f"--bits {bits!r}: numbers from 1 to 8 with commas are expected") from error
    if not rates or not all(1 <= b <= 8 for b in rates):
        raise PytqError(f"--bits {bits!r}: numbers from 1 to 8 with commas are expected")
    if output is not None and output.suffix not in (".json", ".md"):
        raise PytqError(f"{output}: the name must end in .json or .md")
    if output is not None and not output.parent.is_dir():
        raise PytqError(f"{output.parent} is not a directory")
    names = [c.strip() for c in codecs.split(",")] if codecs is not None else list(comparison.ALL)
    rows = comparison.specs(names, rates)
    vectors = comparison.read_vectors(file) if file is not None else None

    bar = Progress(
        TextColumn("comparing codecs"),
        BarColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )

    def progress(it: Iterable[Any], total: int) -> Iterable[Any]:
        with bar:
            yield from bar.track(it, total=total)

    result = comparison.compare(
        rows,
        dim=dim,
        rotation=rotation,
        data=data,
        vectors=vectors,
        n=n,
        queries=queries,
        seeds=seeds,
        threads=threads,
        time_vectors=time_vectors,
        repeat=repeat,
        progress=progress,
    )
    if output is not None:
        text = (
            json.dumps(result, indent=1) + "\n" if output.suffix == ".json" else comparison.markdown(result)
        )
        write_text(output, text)
    if as_json:
        click.echo(json.dumps(result, indent=1))
    elif output is None:
        head, lines = comparison.table(result)
        grid = Table(
            title=f"{result['conditions']['data']} vectors, d = {result['conditions']['dim']}", box=SIMPLE
        )
        for i, title in enumerate(head):
            grid.add_column(title, justify="left" if i == 0 else "right", no_wrap=True)
        for line in lines:
            grid.add_row(*line)
        # a number cut off is worse than a line that wraps
        out = Console()
        out.width = max(out.width, out.measure(grid, options=out.options.update(width=400)).maximum)
        out.print(grid, soft_wrap=True)

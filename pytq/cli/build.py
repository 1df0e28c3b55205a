"""``pytq build``: make the stock and the patched llama.cpp."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import click

from pytq import paths


@click.command()
@click.option(
    "--stock", is_flag=True, help="Build the unpatched llama.cpp, the baseline of every comparison."
)
@click.option("--patched", is_flag=True, help="Build llama.cpp with pytq's cache types.")
@click.option("--backend", type=click.Choice(paths.BACKENDS), default="cpu", show_default=True)
@click.option("-j", "--jobs", type=click.IntRange(min=1), help="Parallel compilers; default: one per CPU.")
@click.option(
    "--source",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="Build this llama.cpp tree instead of the pinned one. It is copied, never changed.",
)
@click.option("--force", is_flag=True, help="Build again although this build exists.")
@click.option(
    "--all-pairs", is_flag=True, help="CUDA: attention kernels for every pair of stock types (slow)."
)
@click.option(
    "-D", "defines", multiple=True, metavar="NAME=VALUE", help="A further CMake definition; repeatable."
)
def command(
    stock: bool,
    patched: bool,
    backend: str,
    jobs: int | None,
    source: Path | None,
    force: bool,
    all_pairs: bool,
    defines: tuple[str, ...],
) -> None:
    """Build llama.cpp from the pinned source: both kinds, unless one is named.

    The result goes to the cache directory (PYTQ_HOME), keyed by pin, patches, options, compiler and CPU; a
    build that exists is not made again. Prints the directory of each build.
    """
    from pytq.build import build

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt

    # a terminated build must end its compilers and remove its temporary files as Ctrl-C does
    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        for kind in paths.KINDS:
            if (stock or patched) and not {"stock": stock, "patched": patched}[kind]:
                continue
            result = build(
                kind,
                backend,
                jobs=jobs,
                source=source,
                force=force,
                all_pairs=all_pairs,
                defines=defines,
            )
            click.echo(result.root)
            if source is not None:
                click.echo(f"to use it: export PYTQ_{kind.upper()}_BUILD={result.root}", err=True)
    finally:
        signal.signal(signal.SIGTERM, previous)

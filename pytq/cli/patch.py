"""``pytq patch``: the patch series on a llama.cpp checkout of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import click

from pytq import paths, porting
from pytq.errors import PytqError


@click.command("patch")
@click.option(
    "--llama-cpp",
    "directory",
    required=True,
    type=click.Path(path_type=Path),
    help="A llama.cpp source tree.",
)
@click.option(
    "--check", "only_check", is_flag=True, help="Only say whether the series fits and what differs."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def command(directory: Path, only_check: bool, as_json: bool) -> None:
    """Apply pytq's patches to your own llama.cpp checkout.

    All or nothing: nothing is written unless every patch fits. Patches that are in already are skipped. Afterwards
    configure with -DPYTQ_DIR (printed), or let `pytq build --patched --source DIR` build a copy.
    """
    report = porting.check(directory)
    if as_json:
        out = {
            "directory": str(directory),
            "ggml_version": report.version,
            "fits": report.fits,
            "patches": [{"name": r.name, "state": r.state, "reasons": r.reasons} for r in report.results],
            "files": sorted(report.files),
        }
        click.echo(json.dumps(out, indent=1))
    else:
        for result in report.results:
            click.echo(f"{result.state:9} {result.name}")
            for reason in result.reasons:
                click.echo(f"          {reason}")
    if not report.fits:
        raise PytqError(porting.describe_conflict(report))
    if only_check:
        return
    written = porting.apply(report)
    if not as_json:
        click.echo(f"{len(written)} files changed" if written else "nothing to do: the series is in")
        click.echo(f"configure with: cmake -B build -DPYTQ_DIR={paths.source_root()}")

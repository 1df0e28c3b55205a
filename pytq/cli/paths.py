"""``pytq paths``: where the builds are."""

from __future__ import annotations

import json

import click

from pytq import paths
from pytq.errors import PytqError


@click.command()
@click.option("--backend", type=click.Choice(paths.BACKENDS), default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def command(backend: str, as_json: bool) -> None:
    """Print the directories of the builds: programs, libraries, and the cache itself."""
    result: dict[str, object] = {"home": str(paths.home())}
    for kind in paths.KINDS:
        try:
            build = paths.find_build(kind, backend)
        except PytqError as error:
            result[kind] = None
            if not as_json:
                click.echo(f"{kind}: {error}")
            continue
        result[kind] = {"root": str(build.root), "bin": str(build.bin), "lib": str(build.lib)}
        if not as_json:
            click.echo(f"{kind}: {build.bin}  libraries: {build.lib}")
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(f"home: {paths.home()}")

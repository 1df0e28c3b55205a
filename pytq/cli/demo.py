"""``pytq demo``: from nothing to a table of speed and quality."""

from __future__ import annotations

import click


@click.command()
@click.option("--again", is_flag=True, help="Measure the table anew instead of showing the kept one.")
def command(again: bool) -> None:
    """Build both llama.cpp, fetch a small model, calibrate it, generate with kv4/kv3, print a table of speed and quality."""
    from pytq.demo import run

    run(again)

"""``pytq model``: the default model."""

from __future__ import annotations

import click


@click.group()
def command() -> None:
    """Fetch models for trying things out."""


@command.command("default")
def default() -> None:
    """Fetch SmolLM2-135M-Instruct (98 MB, once) and print its path."""
    from pytq.model import default_model

    click.echo(default_model())

"""The ``pytq`` command: a group whose commands are imported only when they are used."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import click

from pytq import __version__
from pytq.errors import PytqError

COMMANDS = (
    "build",
    "run",
    "chat",
    "serve",
    "calibrate",
    "bench",
    "eval",
    "compare-codecs",
    "estimate",
    "gguf",
    "types",
    "model",
    "paths",
    "patch",
    "doctor",
    "demo",
)


class OneLineError(click.ClickException):
    """Prints ``error: message`` on one line of stderr; exit code 2."""

    exit_code = 2

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", file=file, err=True)


class LazyGroup(click.Group):
    """Imports ``pytq.cli.<name>`` on demand and takes its click command named ``command``."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for name in COMMANDS if importlib.util.find_spec(_module(name))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        command: click.Command = importlib.import_module(_module(cmd_name)).command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except PytqError as error:
            raise OneLineError(str(error)) from error
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "pytq"
            text = " ".join(error.format_message().split())
            raise OneLineError(f"{text} (see `{where} --help`)") from error
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            ctx.exit(130)


def _module(name: str) -> str:
    return f"pytq.cli.{name.replace('-', '_')}"


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pytq")
def main() -> None:
    """KV-cache types of 2 to 4 bits for llama.cpp, on your own machine."""

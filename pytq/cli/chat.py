"""``pytq chat``: talk to a model in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pytq.errors import PytqError

HELP = (
    "/reset forgets the conversation, /status shows the cache, /exit (or Ctrl-D) ends; Ctrl-C stops a reply"
)


@click.command("chat")
@click.argument("model", required=False, type=click.Path(path_type=Path))
@click.option("-ctk", "--cache-type-k", help="Type of K [default: what the model stores, else kv4].")
@click.option("-ctv", "--cache-type-v", help="Type of V [default: what the model stores, else kv3].")
@click.option("-c", "--ctx", type=int, help="Tokens of context [default: 8192 or the model's limit].")
@click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads; default: one per CPU.")
@click.option("--system", help="System prompt.")
@click.option(
    "-n", "--max-tokens", type=click.IntRange(min=1), default=1024, show_default=True, help="Longest reply."
)
@click.option("--temp", type=click.FloatRange(min=0), default=0.7, show_default=True)
def command(
    model: Path | None,
    cache_type_k: str | None,
    cache_type_v: str | None,
    ctx: int | None,
    threads: int | None,
    system: str | None,
    max_tokens: int,
    temp: float,
) -> None:
    """Chat with MODEL (the default model if none is named); a status line shows speed and cache."""
    from pytq import estimate as est
    from pytq.chat import Chat
    from pytq.model import default_model, gguf_check
    from pytq.serve import DEFAULT_CTX, Request, choose_types

    path = model if model is not None else default_model()
    gguf_check(path)
    info = est.open_model(path)
    types = choose_types(info, Request(path, cache_type_k, cache_type_v))
    est.check_pair(info, *types)
    n_ctx = ctx if ctx is not None else min(DEFAULT_CTX, info.hparams.n_ctx_train)
    est.check_ctx(info, est.Plan(n_ctx))

    from pytq.build import cpus
    from pytq.llama import Llama

    n_threads = threads or cpus()
    engine = Llama(
        path,
        cache_type_k=types[0],
        cache_type_v=types[1],
        n_ctx=n_ctx,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        verbose=False,
    )
    chat = Chat(engine, system, max_tokens, temp)
    click.echo(f"{info.hparams.name}: {chat.status().text()}\n{HELP}", err=True)
    while True:
        line = _read()
        if line is None or line in ("/exit", "/quit"):
            break
        if line == "/reset":
            chat.reset()
        elif line == "/status":
            click.echo(chat.status().text(), err=True)
        elif line.startswith("/"):
            click.echo(HELP, err=True)
        elif line:
            try:
                status = chat.turn(line, _write)
            except ValueError as error:
                click.echo(f"{' '.join(str(error).split())}: /reset starts over", err=True)
                continue
            click.echo()
            click.secho(status.text(), dim=True, err=True)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read() -> str | None:
    """The next line; None at the end of the input. PytqError for bytes that are no UTF-8 text."""
    try:
        click.echo("> ", nl=False, err=True)
        line = sys.stdin.readline()
        line.encode()  # in the C locale Python smuggles undecodable bytes through as surrogates
    except UnicodeError as error:
        raise PytqError("the input is not UTF-8 text") from error
    except KeyboardInterrupt:
        click.echo(err=True)
        return ""
    return line.strip() if line else None

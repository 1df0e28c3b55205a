"""``pytq serve``: the patched llama-server, with the checks it does not make."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import click

from pytq import estimate as est
from pytq import paths, serve


@click.command("serve", context_settings={"ignore_unknown_options": True})
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--cache-type-k", "-ctk", help="Type of K [default: what the model stores, else kv4].")
@click.option("--cache-type-v", "-ctv", help="Type of V [default: what the model stores, else kv3].")
@click.option("--ctx-size", "--ctx", "-c", type=int, help="Tokens in total [default: 8192 per slot].")
@click.option(
    "--parallel", "-np", type=int, default=1, show_default=True, help="Slots: requests served at once."
)
@click.option("--kv-unified", "-kvu", is_flag=True, help="One cache for all slots.")
@click.option("--host", default="127.0.0.1", show_default=True)
@click.option("--port", type=int, default=8080, show_default=True)
@click.option("--kv-profile", help="kv profile, or 'none'; default: beside the model or inside it.")
@click.option("--backend", default="cpu", show_default=True, help="cpu, cuda, hip or metal.")
@click.option("--no-memory-check", is_flag=True, help="Start even if the estimate exceeds the free memory.")
@click.option("--dry-run", is_flag=True, help="Check, print the command, start nothing.")
@click.argument("extra", nargs=-1, type=click.UNPROCESSED)
def command(
    model: Path,
    cache_type_k: str | None,
    cache_type_v: str | None,
    ctx_size: int | None,
    parallel: int,
    kv_unified: bool,
    host: str,
    port: int,
    kv_profile: str | None,
    backend: str,
    no_memory_check: bool,
    dry_run: bool,
    extra: tuple[str, ...],
) -> None:
    """Serve MODEL with an OpenAI-compatible API and a compressed KV cache.

    Types, context, memory and port are checked first; all other options go to llama-server as they are
    (--metrics, --slots, -t 8, --api-key ...).
    """
    import psutil

    # the memory of other devices is not visible from here
    available = psutil.virtual_memory().available if backend == "cpu" and not no_memory_check else None
    request = serve.Request(
        model,
        cache_type_k,
        cache_type_v,
        ctx_size,
        parallel,
        kv_unified,
        host,
        port,
        tuple(extra),
        kv_profile,
    )
    ready = serve.prepare(request, available)
    build = paths.find_build("patched", backend)
    line = serve.command_line(build.program("llama-server"), ready.arguments)
    name = est.pair_name(*ready.names)
    click.echo(
        f"{model.name}: {name} cache, {ready.size.bits:.2f} bits per value, {est.human(ready.size.total)} for"
        f" {ready.plan.n_ctx} tokens; about {est.human(ready.needed)} in all",
        err=True,
    )
    if dry_run:
        click.echo(shlex.join(line))
        return
    click.echo(f"OpenAI endpoint: http://{host}:{port}/v1", err=True)
    # replacing the process keeps signals, exit code and output the server's own
    os.execv(line[0], line)

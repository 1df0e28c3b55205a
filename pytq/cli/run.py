"""``pytq run``: generate text once and say what the cache was."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pytq.errors import PytqError

if TYPE_CHECKING:
    from pytq.estimate import ModelInfo

DEFAULT_K, DEFAULT_V = "turbo4", "turbo3"  # as pytq.Llama, which is imported only when all is checked


def _warn_of_constant_keys(info: ModelInfo, types: tuple[str, str]) -> None:
    """Says on stderr that the model needs a profile, unless one is there or the keys keep 8 bits and more."""
    from pytq.calibrate import constant_key_warning
    from pytq.estimate import resolve

    keys = {resolve(info, types)(layer)[0] for layer in info.hparams.kv_layers}
    if info.profile is not None or keys <= {"f32", "f16", "bf16", "q8_0"}:
        return
    warning = constant_key_warning(info.path)
    if warning:
        click.echo(f"warning: {warning}", err=True)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-p", "--prompt", required=True, metavar="TEXT", help="The text to continue.")
@click.option(
    "-n",
    "--n-predict",
    type=click.IntRange(min=1),
    default=128,
    show_default=True,
    help="Tokens to generate.",
)
@click.option("-ctk", "--cache-type-k", help="Type of K [default: what the model stores, else turbo4].")
@click.option("-ctv", "--cache-type-v", help="Type of V [default: what the model stores, else turbo3].")
@click.option(
    "-c", "--ctx", type=click.IntRange(min=1), default=4096, show_default=True, help="Tokens of context."
)
@click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads; default: one per CPU.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--temp",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="0 takes the likeliest token.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON only, when all is done.")
def command(
    model: Path,
    prompt: str,
    n_predict: int,
    cache_type_k: str | None,
    cache_type_v: str | None,
    ctx: int,
    threads: int | None,
    seed: int,
    temp: float,
    as_json: bool,
) -> None:
    """Continue TEXT with MODEL, then print the cache types, bits per value, cache size and speed."""
    from pytq import estimate
    from pytq.build import cpus
    from pytq.model import gguf_check

    # all that can be refused is refused before a library is loaded
    if not prompt.strip():
        raise PytqError("the prompt holds no text")
    for name in (cache_type_k, cache_type_v):
        if name is not None:
            estimate.check_type(name)
    gguf_check(model)
    info = estimate.open_model(model)
    types = estimate.choose(info, (cache_type_k, cache_type_v), (DEFAULT_K, DEFAULT_V))
    estimate.check_pair(info, *types)
    estimate.check_ctx(info, estimate.Plan(ctx))
    _warn_of_constant_keys(info, types)

    from pytq.llama import Llama

    n_threads = threads or cpus()
    llama = Llama(
        model,
        cache_type_k=types[0],
        cache_type_v=types[1],
        n_ctx=ctx,
        n_threads=n_threads,
        n_threads_batch=n_threads,
        # 0 means "random" to the binding
        seed=seed + 1,
        verbose=False,
    )
    n_prompt = len(llama.tokenize(prompt.encode()))
    if n_prompt >= llama.n_ctx():
        raise PytqError(f"the prompt has {n_prompt} tokens, the context {llama.n_ctx()}: raise --ctx")
    result = generate(llama, prompt, n_predict, temp, echo=not as_json)
    report = llama.cache_report()
    if as_json:
        click.echo(json.dumps({"model": str(model), "n_prompt": n_prompt} | result | report))
        return
    click.echo()
    shown = " / ".join(",".join(report["effective"][side]) for side in "kv")
    click.echo(
        f"\ncache K / V: {' / '.join(estimate.stored_names(info, types))} (effective {shown}), "
        f"{report['bits_per_value']:.3f} bits per value with all scales, {report['cache_bytes'] / 2**20:.2f} MiB "
        f"for {llama.n_ctx()} tokens; {result['tokens_per_second']:.1f} tokens/s",
        err=True,
    )


def generate(llama: Any, prompt: str, n_predict: int, temp: float, echo: bool) -> dict[str, Any]:
    """Text, number of tokens and tokens per second after the first (which holds the prompt's time)."""
    pieces: list[str] = []
    stamps: list[float] = []
    started = time.perf_counter()
    for chunk in llama.create_completion(prompt, max_tokens=n_predict, temperature=temp, stream=True):
        text = chunk["choices"][0]["text"]
        stamps.append(time.perf_counter())
        pieces.append(text)
        if echo:
            sys.stdout.write(text)
            sys.stdout.flush()
    # the last chunk only says why generation ended
    n = max(len(stamps) - 1, 0)
    seconds = stamps[n - 1] - stamps[0] if n > 1 else 0.0
    return {
        "text": "".join(pieces),
        "n_generated": n,
        "seconds_to_first_token": stamps[0] - started if stamps else None,
        "tokens_per_second": (n - 1) / seconds if seconds > 0 else 0.0,
    }

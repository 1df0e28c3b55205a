"""``pytq estimate``: what a KV cache will take before anything is loaded."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from pytq import estimate as est
from pytq.gguf import cache


@click.command("estimate")
@click.argument("model", type=click.Path(path_type=Path))
@click.option(
    "--ctx", "-c", type=int, help="Tokens of context in total (default: the model's limit, at most 32768)."
)
@click.option(
    "--types",
    help=f"Cache types or K/V pairs; 'stored': what MODEL itself names. [default: {est.DEFAULT_PAIRS}, and stored]",
)
@click.option("--budget", help="Memory for weights, cache and compute together, such as 8GiB.")
@click.option("--parallel", "-np", type=int, default=1, show_default=True, help="Sequences that share --ctx.")
@click.option("--unified", is_flag=True, help="One cache for all sequences (--kv-unified).")
@click.option(
    "--ubatch", type=int, default=est.N_UBATCH, show_default=True, help="llama.cpp's --ubatch-size."
)
@click.option("--profile", is_flag=True, help="Count as if MODEL had a kv profile already.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def command(
    model: Path,
    ctx: int | None,
    types: str | None,
    budget: str | None,
    parallel: int,
    unified: bool,
    ubatch: int,
    profile: bool,
    as_json: bool,
) -> None:
    """Bytes of the KV cache of MODEL per cache type, and the flags to paste.

    With --budget: the largest context per type that fits beside the weights.
    """
    pairs = est.parse_pairs(est.DEFAULT_PAIRS if types is None else types, stored=True)
    size = est.parse_bytes(budget) if budget is not None else None
    info = dataclasses.replace(est.open_model(model), assume_profile=profile)
    if types is None and any(cache.has_stored(info.layout, side) for side in "kv"):
        pairs.insert(0, (est.STORED, est.STORED))
    shape = info.hparams
    n_ctx = ctx if ctx is not None else min(shape.n_ctx_train, 32768) * (1 if unified else parallel)
    plan = est.Plan(n_ctx, parallel, unified, ubatch)
    rows = est.estimate(info, pairs, plan, size)
    if as_json:
        out = {
            "model": str(model),
            "architecture": shape.arch,
            "n_ctx": n_ctx,
            "n_ctx_train": shape.n_ctx_train,
            "parallel": parallel,
            "cells": plan.cells,
            "swa_cells": plan.swa_cells(shape.n_swa) if shape.n_swa else None,
            "weights_bytes": info.weights,
            "compute_bytes": est.compute_bytes(info, plan),
            "budget_bytes": size,
            "profile": str(info.profile.path) if info.profile else None,
            "notes": list(shape.notes),
            "types": rows,
        }
        click.echo(json.dumps(out, indent=1))
        return
    _print(info, plan, rows, size)


def _print(info: est.ModelInfo, plan: est.Plan, rows: list[dict], budget: int | None) -> None:
    from rich.console import Console
    from rich.table import Table

    shape = info.hparams
    console = Console()
    dims = "/".join(map(str, shape.head_dims)) or "none"
    kinds = {
        kind: sum(x.kind == kind for x in shape.layers) for kind in ("full", "swa", "shared", "recurrent")
    }
    parts = ", ".join(f"{n} {kind}" for kind, n in kinds.items() if n)
    console.print(
        f"{shape.name} ({shape.arch}): {shape.n_layer} layers ({parts}), head_dim {dims},"
        f" limit {shape.n_ctx_train} tokens, weights {est.human(info.weights)}",
        highlight=False,
    )
    slots = f" for {plan.n_seq} sequences" if plan.n_seq > 1 else ""
    table = Table(title=f"KV cache at {plan.n_ctx} tokens{slots}", title_justify="left")
    table.add_column("type")
    for name in ("bits/value", "K MiB", "V MiB", "cache MiB", "with weights"):
        table.add_column(name, justify="right")
    if budget is not None:
        table.add_column(f"fits {est.human(budget)}", justify="right")
    errors, lines = [], []
    for row in rows:
        name = est.pair_name(row["type_k"], row["type_v"])
        if "error" in row:
            errors.append(f"{name}: {row['error']}")
            continue
        cells = [f"{row['bits_per_value']:.3f}"]
        cells += [f"{row[key] / est.MIB:.2f}" for key in ("k_bytes", "v_bytes", "cache_bytes")]
        cells.append(est.human(row["total_bytes"]))
        flags = row["flags"]
        if budget is not None:
            best = row["max_ctx"]
            limited = (
                best // (1 if plan.unified else plan.n_seq) >= shape.n_ctx_train // est.CTX_PAD * est.CTX_PAD
            )
            cells.append(f"{best} *" if limited else str(best) if best else "does not fit")
            flags = row["max_ctx_flags"] or ""
        table.add_row(name, *cells)
        if flags:
            lines.append(flags)
    console.print(table)
    console.print("flags to paste:", highlight=False)
    for line in [*lines, *errors]:
        console.print(f"  {line}", highlight=False, markup=False)
    if budget is not None:
        console.print("* the model's own limit", highlight=False)
    if info.profile is not None:
        console.print(f"kv profile: {info.profile.path}", highlight=False)
    for note in shape.notes:
        console.print(f"note: {note}", highlight=False)
    if any(row.get("patched") for row in rows):
        console.print(
            "note: turbo, kv, auto, stored, mxfp4 and nvfp4 need the patched build (pytq serve, pytq run)"
        )

"""``pytq types``: the cache types and what they cost."""

from __future__ import annotations

import json
from typing import Any

import click

from pytq import estimate
from pytq.codec.table import profile_flags

HEAD_DIMS = (64, 80, 96, 128, 192, 256)
# which code attends over a cache of the type: (stock types, types ggml has but stock refuses as a cache, pytq's)
KERNELS = {
    "stock": {"cpu": "ggml flash attention"},
    "ggml": {"cpu": "ggml flash attention, patched build only"},
    "pytq": {"cpu": "pytq flash attention", "cuda": "pytq flash attention; head_dim 192 refused"},
    "profile": {"cpu": "those of the types that the profile chooses"},
}


def rows() -> list[dict[str, Any]]:
    """One row per cache type: name, bits per value and block bytes by head_dim, backends and their kernel."""
    result = []
    table = estimate.pytq_types()
    for name in estimate.known_types():
        if name in table:
            group = "pytq"
        elif name in profile_flags():
            group = "profile"
        else:
            group = "ggml" if estimate.is_pytq(name) else "stock"
        dims = [d for d in HEAD_DIMS if _fits(name, d)]
        result.append(
            {
                "name": name,
                "source": group,
                "bits_per_value": {str(d): estimate.bits_per_value(name, d) for d in dims},
                "block_bytes": (
                    estimate.STOCK_TYPES[name][1]
                    if name in estimate.STOCK_TYPES
                    else {str(d): table[name][d] for d in dims}
                ),
                "block_values": estimate.STOCK_TYPES[name][0] if name in estimate.STOCK_TYPES else "head_dim",
                "backends": sorted(KERNELS[group]),
                "kernel": KERNELS[group],
            }
        )
    return result


def _fits(name: str, head_dim: int) -> bool:
    table = estimate.pytq_types()
    if name in profile_flags():
        return False
    if name in table:
        return head_dim in table[name]
    return head_dim % estimate.STOCK_TYPES[name][0] == 0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def command(as_json: bool) -> None:
    """List the cache types: bits per value (every scale counted) by head size, block bytes, kernels."""
    data = rows()
    if as_json:
        click.echo(json.dumps(data))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Cache types for --cache-type-k and --cache-type-v: bits per value by head_dim")
    for title in ("name", *(str(d) for d in HEAD_DIMS), "block bytes at 128", "kernel"):
        table.add_column(title, justify="left" if title in ("name", "kernel") else "right")
    for row in data:
        bits = [row["bits_per_value"].get(str(d)) for d in HEAD_DIMS]
        block = row["block_bytes"]
        table.add_row(
            row["name"],
            *("-" if b is None else f"{b:.4g}" for b in bits),
            str(block.get("128", "-")) if isinstance(block, dict) else f"{block} per {row['block_values']}",
            "; ".join(f"{backend}: {kernel}" for backend, kernel in row["kernel"].items()),
        )
    Console(width=None if Console().is_terminal else 130).print(table)

"""``pytq gguf``: look into model files and store cache defaults or a profile in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pytq.errors import PytqError
from pytq.gguf import cache, edit, profile
from pytq.gguf.hparams import read_hparams
from pytq.gguf.layout import Layout, decode_entry, read_layout
from pytq.gguf.split import prefix_of, read_model, shard_name, shards

MODEL = click.argument("model", type=click.Path(path_type=Path))
OUTPUT = click.option("-o", "--output", type=click.Path(path_type=Path), help="Write a copy with this name.")
IN_PLACE = click.option("--in-place", is_flag=True, help="Change MODEL itself.")
DRY_RUN = click.option("--dry-run", is_flag=True, help="Show the change, write nothing.")
FORCE = click.option("--force", is_flag=True, help="Replace an existing output file.")


@click.group("gguf")
def command() -> None:
    """Inspect GGUF files and edit what pytq keeps in them.

    Tensor data is never touched; fields pytq does not know are kept byte for byte.
    """


@command.command("inspect")
@MODEL
@click.option("--fields", is_flag=True, help="List every field and its value too.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def inspect(model: Path, fields: bool, as_json: bool) -> None:
    """Architecture, heads, layers with a KV cache, sliding windows, profile and cache defaults of MODEL."""
    first, parts = _open(model)
    info = describe(first, parts)
    if fields:
        info["fields"] = {key: _short(first, key) for key in first.fields}
    if as_json:
        click.echo(json.dumps(info, indent=1))
        return
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, box=None)
    for key, value in info.items():
        if key in ("layers", "fields"):
            continue
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        table.add_row(key.replace("_", " "), text)
    console.print(table)
    layers = info.get("layers")
    if layers:
        console.print(_layer_table(layers))
    for key, value in info.get("fields", {}).items():
        console.print(f"{key} = {value}", highlight=False, markup=False)


def describe(first: Layout, parts: list[Layout]) -> dict[str, Any]:
    """What ``inspect`` shows, as plain data; profiles have no layers."""
    info: dict[str, Any] = {
        "file": str(first.path),
        "files": len(parts),
        "gguf_version": first.version,
        "bytes": sum(part.size for part in parts),
        "n_tensors": sum(len(part.tensors) for part in parts),
        "alignment": first.alignment,
    }
    if profile.is_profile(first):
        return info | {
            "architecture": profile.ARCH,
            "profile": {k: _short(first, k) for k in first.fields if k.startswith(f"{profile.ARCH}.")},
        }
    shape = read_hparams(first)
    kinds = [layer.kind for layer in shape.layers]
    info |= {
        "name": shape.name,
        "architecture": shape.arch,
        "n_ctx_train": shape.n_ctx_train,
        "n_embd": shape.n_embd,
        "n_head": shape.n_head,
        "n_layer": shape.n_layer,
        "n_layer_kv": len(shape.kv_layers),
        "n_layer_swa": kinds.count("swa"),
        "n_layer_shared": kinds.count("shared"),
        "n_layer_recurrent": kinds.count("recurrent"),
        "sliding_window": shape.n_swa or None,
        "head_dim": list(shape.head_dims),
        "n_head_kv": sorted({layer.n_head_kv for layer in shape.kv_layers}),
        "cache_type_k": first.get(cache.TYPE_KEYS[0]),
        "cache_type_v": first.get(cache.TYPE_KEYS[1]),
        "cache_layer_k": first.get(cache.LAYER_KEYS[0]),
        "cache_layer_v": first.get(cache.LAYER_KEYS[1]),
        "profile": "embedded" if profile.has_profile(first) else None,
        "notes": list(shape.notes),
        "layers": [
            {"layer": x.index, "kind": x.kind, "n_head_kv": x.n_head_kv, "k": x.head_dim_k, "v": x.head_dim_v}
            for x in shape.layers
        ],
    }
    return info


def _layer_table(layers: list[dict[str, Any]]) -> Any:
    """Runs of equal layers as one row each."""
    from rich.table import Table

    table = Table("layers", "cache", "KV heads", "head_dim K", "head_dim V")
    start = 0
    for i in range(1, len(layers) + 1):
        if i < len(layers) and all(layers[i][k] == layers[start][k] for k in ("kind", "n_head_kv", "k", "v")):
            continue
        row = layers[start]
        span = str(start) if i - start == 1 else f"{start}-{i - 1}"
        table.add_row(span, row["kind"], *(str(row[k] or "-") for k in ("n_head_kv", "k", "v")))
        start = i
    return table


def _short(layout: Layout, key: str) -> Any:
    field = layout.fields[key]
    if field.item_type is not None and field.count > 8:
        return f"[{field.count} x {field.item_type.name.lower()}]"
    value = field.value()
    return value if not isinstance(value, str) or len(value) <= 200 else value[:200] + "..."


@command.command("set-cache")
@MODEL
@click.option("--type-k", "-ctk", help="Default type of K.")
@click.option("--type-v", "-ctv", help="Default type of V.")
@click.option(
    "--layer", "layers", multiple=True, metavar="L[-M]=K/V", help="Types of some layers, such as 0-1=q8_0."
)
@OUTPUT
@IN_PLACE
@DRY_RUN
@FORCE
def set_cache(
    model: Path,
    type_k: str | None,
    type_v: str | None,
    layers: tuple[str, ...],
    output: Path | None,
    in_place: bool,
    dry_run: bool,
    force: bool,
) -> None:
    """Store default cache types in MODEL, used when no flag is given."""
    overrides = [cache.parse_override(text) for text in layers]
    first, _ = _open(model)
    change = cache.edit_set(first, type_k, type_v, overrides)
    _apply(model, first, change, output, in_place, dry_run, force)


@command.command("unset-cache")
@MODEL
@OUTPUT
@IN_PLACE
@DRY_RUN
@FORCE
def unset_cache(model: Path, output: Path | None, in_place: bool, dry_run: bool, force: bool) -> None:
    """Remove the cache defaults from MODEL: the file is again what it was before set-cache."""
    first, _ = _open(model)
    _apply(model, first, cache.edit_unset(first), output, in_place, dry_run, force)


@command.command("embed-profile")
@MODEL
@click.argument("profile_file", metavar="PROFILE", type=click.Path(path_type=Path))
@OUTPUT
@IN_PLACE
@DRY_RUN
@FORCE
def embed_profile(
    model: Path, profile_file: Path, output: Path | None, in_place: bool, dry_run: bool, force: bool
) -> None:
    """Put a calibration PROFILE into MODEL, so that one file is enough.

    It is one more field: any llama.cpp still loads the model, the patched one uses the profile.
    """
    first, _ = _open(model)
    change = profile.edit_embed(first, read_layout(profile_file))
    _apply(model, first, change, output, in_place, dry_run, force)


@command.command("extract-profile")
@MODEL
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), help="The profile file to write."
)
@click.option(
    "--strip", type=click.Path(path_type=Path), help="Also write the model without the profile here."
)
@FORCE
def extract_profile(model: Path, output: Path, strip: Path | None, force: bool) -> None:
    """Write the profile inside MODEL to a file of its own, byte for byte as it was embedded."""
    first, _ = _open(model)
    _free(output, force)
    if strip is not None:
        _free(strip, force)
    profile.extract(first, output)
    click.echo(f"wrote {output}")
    if strip is not None:
        _apply(model, first, profile.edit_strip(first), strip, False, False, force)


@command.command("validate")
@MODEL
@click.option("--json", "as_json", is_flag=True, help="Print JSON only.")
def validate(model: Path, as_json: bool) -> None:
    """Check that MODEL is whole: header, tensors inside the file, split parts, cache defaults, profile."""
    first, parts = _open(model)
    found = cache.problems(first) + profile.problems(first)
    total = first.get("split.tensors.count")
    have = sum(len(part.tensors) for part in parts)
    if total is not None and total != have:
        found.append(f"split.tensors.count is {total}, the parts hold {have} tensors")
    for index, part in enumerate(parts):
        if len(parts) > 1 and part.get("split.no") != index:
            found.append(f"{part.path.name} says it is part {part.get('split.no')}, not {index}")
    unknown = sorted({t.type_name for part in parts for t in part.tensors if t.nbytes is None})
    if unknown:
        found.append(f"tensors of unknown size cannot be checked: {', '.join(unknown)}")
    if not profile.is_profile(first):
        read_hparams(first)
    if as_json:
        click.echo(json.dumps({"file": str(model), "ok": not found, "problems": found}, indent=1))
    if found:
        if as_json:
            raise click.exceptions.Exit(2)
        raise PytqError(f"{model}: {'; '.join(found)}")
    if not as_json:
        size = sum(part.size for part in parts)
        click.echo(f"{model}: ok, {len(parts)} file(s), {have} tensors, {size} bytes")


def _open(model: Path) -> tuple[Layout, list[Layout]]:
    """The model's layouts, after undoing an interrupted in-place edit."""
    if model.is_file() and edit.recover(model):
        click.echo(f"note: {model}: an interrupted edit was undone", err=True)
    return read_model(model)


def _free(target: Path, force: bool) -> None:
    if target.exists() and not force:
        raise PytqError(f"{target} exists; give --force to replace it")
    if not target.parent.is_dir():
        raise PytqError(f"{target.parent} is no directory")


def _apply(
    model: Path,
    first: Layout,
    change: edit.Edit,
    output: Path | None,
    in_place: bool,
    dry_run: bool,
    force: bool,
) -> None:
    """Shows a change, and writes it to a copy or in place; all parts of a split model get copied with a copy."""
    if not dry_run and (output is None) == (not in_place):
        raise PytqError("give either --output FILE or --in-place (or --dry-run)")
    step = edit.plan(first, change)
    for key in sorted(change.remove):
        click.echo(f"- {key} = {_short(first, key)}")
    for key in change.put:
        old = f"{_short(first, key)} -> " if key in first.fields else ""
        click.echo(f"{'~' if old else '+'} {key} = {old}{_new_value(change.put[key])}")
    if dry_run:
        click.echo("dry run: nothing written" + (" (fits in place)" if step.in_place else ""))
        return
    if in_place:
        how = edit.write(step, first.path)
        click.echo(f"changed {first.path} ({'header only' if how == 'in place' else 'data copied as it is'})")
        return
    assert output is not None
    files = shards(model)
    targets = [output]
    if len(files) > 1:
        prefix = prefix_of(output)
        targets = [output.with_name(shard_name(prefix, i, len(files))) for i in range(len(files))]
    for target in targets:
        if target.exists() and target.samefile(first.path):
            raise PytqError(f"{target} is the model itself; use --in-place to change it")
        _free(target, force)
    for source, target in zip(files[1:], targets[1:], strict=True):
        edit.copy_file(source, target)
    edit.write(step, targets[0])  # last: the first part is what a loader opens
    click.echo(f"wrote {targets[0]}" + (f" and {len(targets) - 1} more parts" if len(targets) > 1 else ""))


def _new_value(raw: bytes) -> Any:
    """The value in an encoded entry, for showing it."""
    field = decode_entry(raw)
    if field.item_type is not None and field.count > 64:
        return f"[{field.count} x {field.item_type.name.lower()}]"
    return field.value()

"""Models split over several files (``NAME-00001-of-00003.gguf``): names, members, completeness."""

from __future__ import annotations

import re
from pathlib import Path

from pytq.errors import PytqError
from pytq.gguf.layout import Layout, read_layout

SHARD = re.compile(r"^(?P<prefix>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf$")


def shard_name(prefix: str, index: int, count: int) -> str:
    """llama.cpp's name of shard ``index`` (from 0) of ``count``."""
    return f"{prefix}-{index + 1:05d}-of-{count:05d}.gguf"


def shards(path: Path) -> list[Path]:
    """All files of the model that ``path`` is (a part of); a whole model is its own only file.

    Raises PytqError when the name does not say where the other parts are, or one is missing.
    """
    layout = read_layout(path)
    count = int(layout.get("split.count", 0))
    if count <= 1:
        return [path]
    match = SHARD.match(path.name)
    if match is None or int(match["count"]) != count:
        raise PytqError(
            f"{path}: is one of {count} parts but its name does not end in -0000N-of-{count:05d}.gguf, so the others"
            " cannot be found; rename it as it was"
        )
    files = [path.with_name(shard_name(match["prefix"], index, count)) for index in range(count)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise PytqError(f"{path}: part {missing[0]} of this split model is missing")
    return files


def read_model(path: Path | str) -> tuple[Layout, list[Layout]]:
    """The layout that holds the model's fields (its first file) and the layouts of all its files in order."""
    layouts = [read_layout(file) for file in shards(Path(path))]
    return layouts[0], layouts


def prefix_of(path: Path) -> str:
    """The name of a split model without its shard suffix, or of a plain file without ``.gguf``."""
    match = SHARD.match(path.name)
    return match["prefix"] if match else path.name.removesuffix(".gguf")

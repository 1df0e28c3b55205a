"""Small files written by the gguf package: an oracle that is not ours."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest


def write_model(
    path: Path, n_layer: int = 4, head_dim: int = 128, extra: bool = True, alignment: int = 32
) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_name("toy")
    writer.add_block_count(n_layer)
    writer.add_context_length(4096)
    writer.add_embedding_length(8 * head_dim)
    writer.add_head_count(8)
    writer.add_head_count_kv(2)
    if extra:
        writer.add_key_value("someone.elses.key", "keep \u00e4 me", gguf.GGUFValueType.STRING)
        writer.add_array("someone.elses.floats", [1.5, -2.25])
    writer.add_token_list(["a", "b", "\u00e4"])
    random = np.random.default_rng(1)
    for i in range(n_layer):
        writer.add_tensor(f"blk.{i}.attn_k.weight", random.standard_normal((5, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_profile(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "kvprofile")
    writer.add_uint32("kvprofile.format_version", 1)
    writer.add_string("kvprofile.model.fingerprint", "abc")
    random = np.random.default_rng(2)
    for i in range(2):
        writer.add_tensor(f"blk.{i}.k_transform", random.standard_normal((2, 16, 16), np.float32))
        writer.add_tensor(f"blk.{i}.k_centre", random.standard_normal((2, 7), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "toy.gguf")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    return write_profile(tmp_path / "toy.kvprofile.gguf")


@pytest.fixture
def make_model() -> Callable[..., Path]:
    return write_model


@pytest.fixture
def split_model(tmp_path: Path) -> list[Path]:
    """Three parts: the first with the fields and no tensors, as llama.cpp's splitter can write them."""
    files = [tmp_path / f"toy-{i + 1:05d}-of-00003.gguf" for i in range(3)]
    for index, path in enumerate(files):
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_uint16("split.no", index)
        writer.add_uint16("split.count", 3)
        writer.add_int32("split.tensors.count", 2)
        if index == 0:
            writer.add_block_count(2)
            writer.add_context_length(512)
            writer.add_embedding_length(256)
            writer.add_head_count(2)
            writer.add_head_count_kv(2)
        else:
            writer.add_tensor(f"blk.{index - 1}.attn_k.weight", np.full((4, 32), index, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files

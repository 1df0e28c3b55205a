"""A profile goes into a model and comes out again, both byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import pytest

from pytq.errors import PytqError
from pytq.gguf import edit
from pytq.gguf import profile as kv
from pytq.gguf.layout import read_layout
from pytq.gguf.split import read_model


def embed(model: Path, profile: Path, out: Path) -> Path:
    edit.write(edit.plan(read_layout(model), kv.edit_embed(read_layout(model), read_layout(profile))), out)
    return out


@pytest.mark.parametrize("alignment", [32, 128])
def test_round_trip(make_model: Callable[..., Path], profile: Path, tmp_path: Path, alignment: int) -> None:
    model = make_model(tmp_path / "m.gguf", alignment=alignment)
    layout = read_layout(embed(model, profile, tmp_path / "both.gguf"))
    assert kv.has_profile(layout) and kv.problems(layout) == []
    kv.extract(layout, tmp_path / "again.gguf")
    assert (tmp_path / "again.gguf").read_bytes() == profile.read_bytes()
    edit.write(edit.plan(layout, kv.edit_strip(layout)), tmp_path / "plain.gguf")
    assert (tmp_path / "plain.gguf").read_bytes() == model.read_bytes()


def test_gguf_package_reads_it(model: Path, profile: Path, tmp_path: Path) -> None:
    both = gguf.GGUFReader(embed(model, profile, tmp_path / "both.gguf"))
    assert bytes(both.fields[kv.KEY].contents()) == profile.read_bytes()
    assert [t.name for t in both.tensors] == [t.name for t in gguf.GGUFReader(model).tensors]


def test_embedding_again_replaces(model: Path, profile: Path, tmp_path: Path) -> None:
    both = embed(model, profile, tmp_path / "both.gguf")
    twice = embed(both, profile, tmp_path / "twice.gguf")
    assert twice.read_bytes() == both.read_bytes()


def test_split_model(split_model: list[Path], profile: Path) -> None:
    first = split_model[0]
    original = first.read_bytes()
    embed(first, profile, first)
    layout, parts = read_model(first)
    assert kv.embedded(layout) == profile.read_bytes() and len(parts) == 3
    edit.write(edit.plan(layout, kv.edit_strip(layout)), first)
    assert first.read_bytes() == original


def test_damaged_inside_is_a_problem(model: Path, profile: Path, tmp_path: Path) -> None:
    both = embed(model, profile, tmp_path / "both.gguf")
    field = read_layout(both).fields[kv.KEY]
    data = bytearray(both.read_bytes())
    data[field.end - field.count] ^= 0xFF  # the first byte of the profile's magic
    both.write_bytes(data)
    assert "not a GGUF file" in kv.problems(read_layout(both))[0]


def test_refusals(model: Path, profile: Path, tmp_path: Path) -> None:
    with pytest.raises(PytqError, match="is no profile"):
        kv.edit_embed(read_layout(model), read_layout(model))
    with pytest.raises(PytqError, match="is a profile, not a model"):
        kv.edit_embed(read_layout(profile), read_layout(profile))
    with pytest.raises(PytqError, match="no profile inside"):
        kv.extract(read_layout(model), tmp_path / "x.gguf")
    assert not (tmp_path / "x.gguf").exists()

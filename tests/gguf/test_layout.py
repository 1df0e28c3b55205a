"""The layout agrees with the gguf package, and a damaged file is reported with offset and reason."""

from __future__ import annotations

import random
import struct
from pathlib import Path

import gguf
import pytest

from pytq.errors import PytqError
from pytq.gguf.layout import read_layout
from pytq.gguf.split import read_model


def test_matches_gguf_reader(model: Path) -> None:
    layout, reader = read_layout(model), gguf.GGUFReader(model)
    theirs = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert list(layout.fields) == list(theirs)
    for name, field in theirs.items():
        assert layout.get(name) == field.contents()
        assert layout.fields[name].start == field.offset
    assert layout.data_start == reader.data_offset
    for ours, other in zip(layout.tensors, reader.tensors, strict=True):
        assert ours.name == other.name
        assert layout.data_start + ours.offset == other.data_offset
        assert ours.nbytes == other.n_bytes


def test_alignment_is_honoured(make_model, tmp_path: Path) -> None:
    path = make_model(tmp_path / "a.gguf", alignment=128)
    layout = read_layout(path)
    assert layout.alignment == 128
    assert layout.data_start == gguf.GGUFReader(path).data_offset


@pytest.mark.parametrize("keep", [0, 3, 23, 24, 100, 400])
def test_truncated_header_names_offset(model: Path, keep: int) -> None:
    model.write_bytes(model.read_bytes()[:keep])
    with pytest.raises(PytqError, match="not a GGUF file" if keep < 24 else "damaged GGUF at offset"):
        read_layout(model)


def test_truncated_data_names_tensor_and_sizes(model: Path) -> None:
    data = model.read_bytes()
    model.write_bytes(data[:-100])
    with pytest.raises(PytqError, match=rf"'blk\.3.*the file at {len(data) - 100}"):
        read_layout(model)


def test_every_cut_is_an_error_never_a_crash(model: Path) -> None:
    data = model.read_bytes()
    for keep in range(0, len(data) - 32, 7):
        model.write_bytes(data[:keep])
        with pytest.raises(PytqError):
            read_layout(model)


def test_flipped_header_bytes_never_crash(model: Path) -> None:
    data = model.read_bytes()
    end = read_layout(model).header_end
    rng = random.Random(5)
    outcomes = set()
    for _ in range(400):
        broken = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            broken[rng.randrange(end)] = rng.randrange(256)
        model.write_bytes(broken)
        try:
            read_layout(model)
            outcomes.add("read")
        except PytqError as error:
            outcomes.add("refused")
            assert str(model) in str(error)
    assert outcomes == {"read", "refused"}


def test_unknown_value_type(model: Path) -> None:
    field = read_layout(model).fields["llama.block_count"]
    data = bytearray(model.read_bytes())
    struct.pack_into("<I", data, field.value_start - 4, 77)
    model.write_bytes(data)
    with pytest.raises(PytqError, match=f"offset {field.value_start - 4}: .*unknown value type 77"):
        read_layout(model)


def test_overlapping_tensors(model: Path) -> None:
    entry = read_layout(model).tensors[1]
    data = bytearray(model.read_bytes())
    struct.pack_into("<Q", data, entry.end - 8, 32)
    model.write_bytes(data)
    with pytest.raises(PytqError, match="overlaps"):
        read_layout(model)


def test_big_endian_is_refused(model: Path) -> None:
    data = bytearray(model.read_bytes())
    data[4:8] = struct.pack(">I", 3)
    model.write_bytes(data)
    with pytest.raises(PytqError, match="big-endian"):
        read_layout(model)


def test_beyond_four_gigabytes(make_model, tmp_path: Path) -> None:
    """Offsets past 2^32: a sparse file, so nothing that large is written."""
    path = make_model(tmp_path / "big.gguf")
    before = read_layout(path)
    entry = before.tensors[-1]
    far = (5 << 30) + 64
    with path.open("r+b") as file:
        file.seek(entry.end - 8)
        file.write(struct.pack("<Q", far))
        file.truncate(before.data_start + far + (entry.nbytes or 0))
    layout = read_layout(path)
    assert layout.tensors[-1].offset == far
    assert layout.data_end == layout.size


def test_split_parts_are_found_from_any(split_model: list[Path]) -> None:
    for file in split_model:
        first, parts = read_model(file)
        assert first.path == split_model[0]
        assert [p.path for p in parts] == split_model


def test_missing_part(split_model: list[Path]) -> None:
    split_model[1].unlink()
    with pytest.raises(PytqError, match=r"toy-00002-of-00003\.gguf.*missing"):
        read_model(split_model[0])


def test_renamed_part(split_model: list[Path]) -> None:
    renamed = split_model[0].rename(split_model[0].with_name("x.gguf"))
    with pytest.raises(PytqError, match="rename it"):
        read_model(renamed)


def test_directory_and_missing(tmp_path: Path) -> None:
    with pytest.raises(PytqError, match="directory"):
        read_layout(tmp_path)
    with pytest.raises(PytqError, match="no such file"):
        read_layout(tmp_path / "none.gguf")

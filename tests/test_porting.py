"""The series on toy trees (all cases) and on the pinned source (it fits)."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from pytq import porting
from pytq.cli import main
from pytq.errors import PytqError

BASE = "".join(f"line {i}\n" for i in range(1, 31))


def write_tree(root: Path) -> Path:
    (root / "ggml").mkdir(parents=True)
    (root / "CMakeLists.txt").write_text("project(llama)\n")
    (root / "ggml" / "CMakeLists.txt").write_text(
        "set(GGML_VERSION_MAJOR 0)\nset(GGML_VERSION_MINOR 25)\nset(GGML_VERSION_PATCH 3)\n"
    )
    (root / "a.cpp").write_text(BASE)
    return root


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "llama.cpp")


@pytest.fixture
def toy_series(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two patches made by git itself, the second on top of the first."""
    work = write_tree(tmp_path / "work")

    def git(*args: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(["git", *identity, *args], cwd=work, capture_output=True, text=True, check=True)
        return done.stdout

    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "base")
    for old, new, title in (("line 10\n", "line ten\n", "one"), ("line ten\n", "line ten\nmore\n", "two")):
        (work / "a.cpp").write_text((work / "a.cpp").read_text().replace(old, new))
        git("commit", "-qam", title)
    git("format-patch", "-q", "-2", "-o", str(tmp_path / "patches"))
    patches = sorted((tmp_path / "patches").iterdir())
    monkeypatch.setattr(porting, "series", lambda: patches)
    return patches


def test_applies_once_and_then_has_nothing_to_do(tree: Path, toy_series: list[Path]) -> None:
    report = porting.check(tree)
    assert [r.state for r in report.results] == [porting.FITS, porting.FITS]
    assert (tree / "a.cpp").read_text() == BASE, "a check changes nothing"
    assert porting.apply(report) == ["a.cpp"]
    assert (tree / "a.cpp").read_text() == BASE.replace("line 10\n", "line ten\nmore\n")
    again = porting.check(tree)
    assert again.complete and porting.apply(again) == []


def test_half_applied_is_completed(tree: Path, toy_series: list[Path]) -> None:
    (tree / "a.cpp").write_text(BASE.replace("line 10\n", "line ten\n"))
    report = porting.check(tree)
    assert [r.state for r in report.results] == [porting.APPLIED, porting.FITS]
    porting.apply(report)
    assert porting.check(tree).complete


def test_moved_lines_still_fit(tree: Path, toy_series: list[Path]) -> None:
    (tree / "a.cpp").write_text("// a new header\n" * 7 + BASE)
    assert porting.check(tree).fits


def test_conflict_names_the_missing_line_and_changes_nothing(tree: Path, toy_series: list[Path]) -> None:
    changed = BASE.replace("line 10\n", "line X\n")
    (tree / "a.cpp").write_text(changed)
    report = porting.check(tree)
    assert not report.fits
    assert report.results[0].reasons == ["a.cpp, near line 7: not found there: `line 10`"]
    with pytest.raises(PytqError, match="line 10.*has ggml 0.25.3; nothing was changed"):
        porting.apply(report)
    assert (tree / "a.cpp").read_text() == changed


def test_missing_file(tree: Path, toy_series: list[Path]) -> None:
    (tree / "a.cpp").unlink()
    assert porting.check(tree).results[0].reasons == ["a.cpp does not exist"]


def test_inside_another_repository(tree: Path, toy_series: list[Path]) -> None:
    """`git apply` in a subdirectory of a repository silently skips files: it must not here."""
    subprocess.run(["git", "init", "-q"], cwd=tree.parent, check=True)
    porting.apply(porting.check(tree))
    assert "more" in (tree / "a.cpp").read_text()


def test_command(tree: Path, toy_series: list[Path], tmp_path: Path) -> None:
    run = CliRunner().invoke
    done = run(main, ["patch", "--llama-cpp", str(tree), "--check", "--json"])
    assert done.exit_code == 0 and json.loads(done.stdout)["files"] == ["a.cpp"]
    assert (tree / "a.cpp").read_text() == BASE
    done = run(main, ["patch", "--llama-cpp", str(tree)])
    assert done.exit_code == 0 and "-DPYTQ_DIR=" in done.stdout
    (tree / "a.cpp").write_text(BASE.replace("line 10\n", ""))
    done = run(main, ["patch", "--llama-cpp", str(tree)])
    assert done.exit_code == 2 and done.stderr.startswith("error: 0001-one.patch does not fit")
    assert done.stderr.count("\n") == 1
    for bad in (tmp_path / "none", tmp_path / "patches"):
        done = run(main, ["patch", "--llama-cpp", str(bad)])
        assert done.exit_code == 2 and "is no llama.cpp source tree" in done.stderr and done.stdout == ""


def test_the_real_series_parses() -> None:
    from pytq.build import series

    for patch in series():
        hunks = porting.parse_hunks(patch.read_text())
        assert hunks and all(h.file and h.line > 0 for h in hunks), patch.name


@pytest.mark.slow
def test_the_real_series_fits_the_pinned_source(tmp_path: Path) -> None:
    import tarfile

    from pytq import fetch
    from pytq.build import series

    wanted = {name for patch in series() for name in porting.touched(patch)} | {
        "CMakeLists.txt",
        "ggml/CMakeLists.txt",
    }
    prefix = fetch.load_pin().path + "/"
    with tarfile.open(fetch.archive()) as archive:
        for member in archive:
            name = member.name.removeprefix(prefix)
            if name in wanted and member.isfile():
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                data = archive.extractfile(member)
                assert data is not None
                (tmp_path / name).write_bytes(data.read())
    report = porting.check(tmp_path)
    assert [r.state for r in report.results] == [porting.FITS] * len(series()), report.results

"""`pytq build` on a tiny source tree with the same shape as llama.cpp: everything but the wait is real."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from pytq import build, fetch, hardware, paths
from pytq.cli import main
from pytq.errors import PytqError

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="llama.cpp is built on Linux and macOS here")

CMAKE = """
cmake_minimum_required(VERSION 3.14)
project(tiny C CXX)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
set(CMAKE_LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
add_library(llama SHARED lib.c)
set_target_properties(llama PROPERTIES VERSION 0.5.0 SOVERSION 0)
foreach (name llama-bench llama-perplexity llama-completion llama-cli llama-server llama-batched-bench)
    add_executable(${name} main.c)
    target_link_libraries(${name} llama)
endforeach()
"""
SLOW = """
add_custom_target(slow COMMAND sh -c "until test -e @FLAG@; do sleep 0.2; done" VERBATIM)
add_dependencies(llama slow)
"""
MAIN = '#include <stdio.h>\nint answer(void);\nint main(void) {\n    printf("%d\\n", answer());\n    return 0;\n}\n'
LIB = "int answer(void) {\n    return 41;\n}\n"
PATCH = """Why: the answer is one too small.

--- a/lib.c
+++ b/lib.c
@@ -1,3 +1,3 @@
 int answer(void) {
-    return 41;
+    return 42;
 }
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = tmp_path / "home"
    monkeypatch.setenv("PYTQ_HOME", str(home))
    monkeypatch.delenv("PYTQ_STOCK_BUILD", raising=False)
    monkeypatch.delenv("PYTQ_PATCHED_BUILD", raising=False)
    monkeypatch.setattr(build, "NEED_BYTES", dict.fromkeys(paths.BACKENDS, 50_000_000))
    return home


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    directory = tmp_path / "tiny"
    directory.mkdir()
    (directory / "CMakeLists.txt").write_text(CMAKE)
    (directory / "main.c").write_text(MAIN)
    (directory / "lib.c").write_text(LIB)
    return directory


@pytest.fixture
def root(tmp_path: Path, tree: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A source root of its own: pin of a tiny archive (already downloaded), one patch, a csrc/ file."""
    directory = tmp_path / "root"
    (directory / "csrc").mkdir(parents=True)
    (directory / "patches").mkdir()
    (directory / "CMakeLists.txt").write_text("")
    (directory / "csrc" / "pytq.h").write_text("// one\n")
    (directory / "patches" / "series").write_text("# in this order\n\n0001-answer.patch\n")
    (directory / "patches" / "0001-answer.patch").write_text(PATCH)
    (cache / "downloads").mkdir(parents=True)
    archive = cache / "downloads" / "tiny-1.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tree, "tiny-1/vendor/llama.cpp")
        for name in (
            "tiny-1/vendor/llama.cpp/.git",
            "tiny-1/vendor/llama.cpp/models/big.gguf",
            "tiny-1/other.txt",
        ):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"none"))
    pin = {
        "package": "tiny",
        "version": "1",
        "archive": archive.name,
        "sha256": hashlib.sha256(archive.read_bytes()).hexdigest(),
        "path": "tiny-1/vendor/llama.cpp",
        "commit": "abc",
        "ggml": "0",
    }
    (directory / "patches" / "pin.json").write_text(json.dumps(pin))
    monkeypatch.setattr(paths, "source_root", lambda: directory)
    return directory


def answer(found: paths.BuildDir | Path) -> str:
    program = (found / "bin" if isinstance(found, Path) else found.bin) / "llama-server"
    return subprocess.run([program], capture_output=True, text=True, check=True).stdout.strip()


def nothing_left(cache: Path) -> bool:
    """No build, no temporary directory in any place a build writes to."""
    left = [*(cache / "builds").glob("*"), *(cache / "builds").glob(".tmp-*"), *cache.rglob(".tmp-*")]
    return not left


def test_stock_and_patched_live_side_by_side(root: Path, cache: Path) -> None:
    stock, patched = build.build("stock"), build.build("patched")
    assert (answer(stock), answer(patched)) == ("41", "42")
    assert paths.find_build("stock").root == stock.root
    assert paths.find_build("patched").root == patched.root
    assert patched.info["series"] == ["0001-answer.patch"]
    assert patched.info["pin"]["commit"] == "abc" and patched.info["compiler"]
    assert {p.name for p in patched.lib.iterdir()} == {"libllama.so", "libllama.so.0", "libllama.so.0.5.0"}
    # one work tree serves both
    (work,) = (cache / "work").iterdir()
    assert not (work / "src" / ".git").exists() and not (work / "src" / "models").exists()


def test_the_second_kind_compiles_only_what_the_series_touches(root: Path, cache: Path) -> None:
    build.build("stock")
    (work,) = (cache / "work").iterdir()
    objects = {p.name: p.stat().st_mtime_ns for p in (work / "build").rglob("*.o")}
    assert answer(build.build("patched")) == "42"
    again = {p.name: p.stat().st_mtime_ns for p in (work / "build").rglob("*.o")}
    assert [name for name in objects if again[name] != objects[name]] == ["lib.c.o"]
    # and back: the originals are restored to the byte
    assert answer(build.build("stock", force=True)) == "41"
    assert (work / "src" / "lib.c").read_text() == LIB


def test_a_changed_series_starts_from_the_originals(root: Path) -> None:
    build.build("patched")
    (root / "patches" / "0001-answer.patch").write_text(PATCH.replace("return 42", "return 43"))
    assert answer(build.build("patched")) == "43"


def test_a_build_is_made_once_and_forced_again(root: Path) -> None:
    first = build.build("stock")
    stamp = (first.root / "build.json").stat().st_mtime_ns
    assert build.build("stock").root == first.root
    assert (first.root / "build.json").stat().st_mtime_ns == stamp
    again = build.build("stock", force=True)
    assert again.root == first.root and (first.root / "build.json").stat().st_mtime_ns > stamp


def test_a_finished_build_can_be_moved(root: Path, tmp_path: Path) -> None:
    made = build.build("stock")
    moved = tmp_path / "elsewhere" / "build"
    moved.parent.mkdir()
    shutil.move(made.root, moved)
    shutil.rmtree(paths.home() / "work", ignore_errors=True)
    assert answer(moved) == "41"


def test_an_edit_of_csrc_makes_the_patched_build_stale_and_leaves_stock(root: Path) -> None:
    build.build("stock")
    before = build.build("patched")
    (root / "csrc" / "pytq.h").write_text("// two\n")
    with pytest.raises(PytqError, match="other sources.*pytq build --patched"):
        paths.find_build("patched")
    assert paths.find_build("stock")
    assert build.build("patched").root != before.root


def test_another_cpu_is_not_served_this_build(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.build("stock")
    monkeypatch.setattr(build, "machine_key", lambda: "other")
    with pytest.raises(PytqError, match="another machine"):
        paths.find_build("stock")


def test_foreign_backends_do_not_count(root: Path) -> None:
    key = build.source_key("patched", "cpu")
    (root / "csrc" / "cuda").mkdir()
    (root / "csrc" / "cuda" / "x.cu").write_text("//")
    assert build.source_key("patched", "cpu") == key
    assert build.source_key("patched", "cuda") != key


def test_source_is_copied_and_patched_unless_it_is(root: Path, tree: Path) -> None:
    before = {p.name: p.read_bytes() for p in tree.iterdir()}
    assert answer(build.build("patched", source=tree)) == "42"
    assert {p.name: p.read_bytes() for p in tree.iterdir()} == before
    (tree / "lib.c").write_text(LIB.replace("41", "42"))
    own = build.build("patched", source=tree)
    assert answer(own) == "42"
    # a build of an own tree never stands for the pinned one
    with pytest.raises(PytqError, match="no patched build"):
        paths.find_build("patched")


def test_patches_apply_inside_another_repository(root: Path, tree: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tree.parent)], check=True)
    build.apply_series(tree)
    assert "42" in (tree / "lib.c").read_text()
    build.apply_series(tree)
    assert "42" in (tree / "lib.c").read_text()


def test_an_empty_series_is_the_stock_source(root: Path) -> None:
    (root / "patches" / "series").write_text("")
    assert answer(build.build("patched")) == "41"


def test_a_patch_that_does_not_apply(root: Path, cache: Path) -> None:
    (root / "patches" / "0001-answer.patch").write_text(PATCH.replace("return 41", "return 17"))
    with pytest.raises(PytqError, match=r"patch 0001-answer\.patch does not apply \(patch failed: lib\.c"):
        build.build("patched")
    assert nothing_left(cache)
    # the next run starts from the originals again
    (root / "patches" / "0001-answer.patch").write_text(PATCH)
    assert answer(build.build("patched")) == "42"


def test_a_series_naming_no_file(root: Path) -> None:
    (root / "patches" / "series").write_text("0002-gone.patch\n")
    with pytest.raises(PytqError, match=r"names 0002-gone\.patch"):
        build.build("patched")


def test_a_damaged_archive(root: Path, cache: Path) -> None:
    with (cache / "downloads" / "tiny-1.tar.gz").open("ab") as file:
        file.write(b"x")
    with pytest.raises(PytqError, match=r"tiny-1\.tar\.gz is damaged.*delete it"):
        build.build("stock")
    assert nothing_left(cache)


def test_a_download_with_another_hash_is_not_kept(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cache / "downloads" / "tiny-1.tar.gz").unlink()

    def other(command: list[str], what: str) -> None:
        (Path(command[command.index("--dest") + 1]) / "tiny-1.tar.gz").write_bytes(b"other")

    monkeypatch.setattr(fetch, "_pip", other)
    with pytest.raises(PytqError, match="has sha256 .* expected"):
        build.build("stock")
    assert not list((cache / "downloads").iterdir())


def test_no_network(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cache / "downloads" / "tiny-1.tar.gz").unlink()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(PytqError, match="tiny==1 could not be downloaded: pip says"):
        build.build("stock")
    assert nothing_left(cache)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("cc", "no cc or gcc or clang found"),
        ("c++", r"no c\+\+ or g\+\+"),
        ("git", "no git"),
        ("cmake", "no cmake"),
    ],
)
def test_a_missing_tool(
    missing: str, message: str, root: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in {"cc", "c++", "git", "cmake", "ninja"} - {missing}:
        (programs / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "_wheel_program", lambda name: None)
    result = CliRunner().invoke(main, ["build", "--stock"])
    assert result.exit_code == 2
    with pytest.raises(PytqError, match=message):
        build.find_tools()
    assert result.stderr.startswith("error: no ") and result.stderr.count("\n") == 1


def test_a_full_disk(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1))
    with pytest.raises(PytqError, match=r"0\.0 GB are free"):
        build.build("stock")
    assert nothing_left(cache)


def test_a_disk_that_fills_up_while_installing(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(source: Path, target: Path, **options: bool) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(PytqError, match="the disk of .* is full"):
        build.build("stock")
    assert nothing_left(cache)
    monkeypatch.undo()


def read_only(tmp_path: Path) -> Path:
    if os.geteuid() != 0:
        directory = tmp_path / "fixed"
        directory.mkdir(mode=0o555)
        return directory / "home"
    # mode bits do not stop root; a kernel file system does
    return Path("/sys/pytq-home") if Path("/sys").is_dir() else tmp_path / "fixed"


def test_a_read_only_cache(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTQ_HOME", str(read_only(tmp_path)))
    result = CliRunner().invoke(main, ["build", "--stock"])
    assert result.exit_code == 2
    assert "is not writable" in result.stderr and "set PYTQ_HOME" in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_cache_below_a_file(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYTQ_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(PytqError, match="is not writable"):
        build.build("stock")


def test_a_compiler_error_names_the_log(
    root: Path, tree: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tree / "lib.c").write_text("this is no C\n")
    with pytest.raises(PytqError, match=r"could not be compiled: see .*logs/stock-cpu-.*\.log") as caught:
        build.build("stock", source=tree)
    assert nothing_left(cache)
    assert "this is no C" in Path(str(caught.value).rpartition("see ")[2]).read_text()
    assert "lib.c" in capsys.readouterr().err


def test_a_configure_error_names_the_log(root: Path, tree: Path, cache: Path) -> None:
    (tree / "CMakeLists.txt").write_text("message(FATAL_ERROR oh)\n")
    with pytest.raises(PytqError, match="cmake could not configure"):
        build.build("stock", source=tree)
    assert nothing_left(cache)


@pytest.mark.parametrize(
    "arguments", [["--jobs", "0"], ["--backend", "abacus"], ["-D", "1x"], ["--source", "none"]]
)
def test_bad_options(arguments: list[str], root: Path) -> None:
    result = CliRunner().invoke(main, ["build", "--stock", *arguments])
    assert result.exit_code == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_a_directory_that_is_no_source(root: Path, tmp_path: Path) -> None:
    with pytest.raises(PytqError, match="no CMakeLists"):
        build.build("stock", source=tmp_path / "home")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_build_leaves_nothing_and_goes_on(
    number: signal.Signals, root: Path, tree: Path, cache: Path, tmp_path: Path
) -> None:
    flag = tmp_path / "flag"
    (tree / "CMakeLists.txt").write_text(CMAKE + SLOW.replace("@FLAG@", str(flag)))
    code = (
        "import sys; from pathlib import Path; from pytq import build, paths; from pytq.cli import main\n"
        f"paths.source_root = lambda: Path({str(root)!r})\n"
        "build.NEED_BYTES['cpu'] = 1\n"
        f"main(['build', '--stock', '--source', {str(tree)!r}], prog_name='pytq')"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stderr=subprocess.PIPE,
        text=True,
        # a shell that started the tests in the background made this process ignore Ctrl-C, which a child inherits
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # type: ignore[arg-type, return-value]
    )
    try:
        wait_until(lambda: waiting(flag) != [], 60)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 130 and errors.rstrip().endswith("interrupted")
    assert "Traceback" not in errors
    assert nothing_left(cache)
    wait_until(lambda: waiting(flag) == [], 10)
    flag.touch()
    assert answer(build.build("stock", source=tree)) == "41"


def waiting(flag: Path) -> list[str]:
    """Processes of the tiny tree's slow step."""
    found = subprocess.run(
        ["ps", "-e", "-ww", "-o", "args"], capture_output=True, text=True, check=True
    ).stdout
    return [line for line in found.splitlines() if f"until test -e {flag};" in line]


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def test_two_builds_at_once_wait_for_each_other(
    root: Path, tree: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.mkdir(exist_ok=True)
    results: list[paths.BuildDir] = []
    with build._lock(cache):
        thread = threading.Thread(target=lambda: results.append(build.build("stock")))
        thread.start()
        time.sleep(0.5)
        assert results == []
    thread.join(60)
    assert len(results) == 1 and answer(results[0]) == "41"
    assert "another build" in capsys.readouterr().err


def test_a_named_build_directory(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made = build.build("stock")
    monkeypatch.setenv("PYTQ_STOCK_BUILD", str(made.root))
    assert paths.find_build("stock").bin == made.bin
    monkeypatch.setenv("PYTQ_STOCK_BUILD", str(tmp_path))
    with pytest.raises(PytqError, match="holds no build"):
        paths.find_build("stock")


@pytest.mark.parametrize("backend", paths.BACKENDS[1:])
@pytest.mark.parametrize("where", ["lib", "bin"])
def test_a_named_build_holds_the_backend(
    backend: str, where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else `--backend cuda` would measure the CPU and call it a GPU."""
    for name in ("bin/llama-bench", f"lib/{paths.library_name()}", "lib/libggml-cpu.so"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("PYTQ_PATCHED_BUILD", str(tmp_path))
    assert paths.find_build("patched").backend == "cpu"
    with pytest.raises(PytqError, match=f"PYTQ_PATCHED_BUILD=.* holds no libggml-{backend}: unset"):
        paths.find_build("patched", backend)
    assert hardware.choose_build(None).backend == "cpu"
    (tmp_path / where / f"libggml-{backend}.so").touch()
    assert paths.find_build("patched", backend).backend == backend
    assert hardware.choose_build(None).backend == backend
    assert paths.find_build("patched").backend == "cpu"


def test_paths_command(root: Path) -> None:
    result = CliRunner().invoke(main, ["paths", "--json"])
    assert json.loads(result.stdout)["stock"] is None
    made = build.build("stock")
    data = json.loads(CliRunner().invoke(main, ["paths", "--json"]).stdout)
    assert data["stock"] == {"root": str(made.root), "bin": str(made.bin), "lib": str(made.lib)}
    assert data["patched"] is None
    assert "run `pytq build --patched`" in CliRunner().invoke(main, ["paths"]).output

"""Building llama.cpp: pinned source, patch series, CMake and Ninja, atomic install.

    archive -> work/<backend>-<source>/src (unpacked; the series applied or taken back) -> .../build (Ninja)
            -> builds/.tmp-* -> builds/<kind>-<backend>-<key>   (one rename)

Stock and patched share one work tree: most files are the same in both, so the second build compiles only what
the series touches. ``work/.../state`` says what the tree holds (a *tree key*: pin and series); the originals of
patched files lie beside it. An edit of ``csrc/`` rebuilds only what it touches: Ninja knows those files. The
*key* (tree, ``csrc/``, options, compiler, CPU) names the finished build, so a build of other sources or of another
machine is never taken for the present one.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytq import fetch, paths
from pytq.errors import PytqError
from pytq.paths import BuildDir, Kind
from pytq.progress import say, step

PROGRAMS = (
    "llama-bench",
    "llama-perplexity",
    "llama-completion",
    "llama-cli",
    "llama-server",
    "llama-batched-bench",
)
# compares a GPU's operations with the CPU's
GPU_PROGRAMS = ("test-backend-ops",)

# measured: archive .08, an unpacked tree .1, a build tree .15, two installs .13; a GPU's kernels are larger
NEED_BYTES = {"cpu": 1_500_000_000, "cuda": 4_000_000_000, "hip": 4_000_000_000, "metal": 1_500_000_000}

OPTIONS = (
    "CMAKE_BUILD_TYPE=Release",
    "BUILD_SHARED_LIBS=ON",
    "GGML_NATIVE=ON",
    "LLAMA_OPENSSL=OFF",
    "LLAMA_BUILD_EXAMPLES=OFF",
    # fetched from a web host at build time otherwise
    "LLAMA_USE_PREBUILT_UI=OFF",
    # programs find the libraries beside them wherever the directory is moved to
    "CMAKE_BUILD_WITH_INSTALL_RPATH=ON",
)
BACKEND_OPTIONS = {
    # llama.cpp turns Metal on by itself on macOS
    "cpu": ("GGML_METAL=OFF",) if sys.platform == "darwin" else (),
    "cuda": ("GGML_CUDA=ON", "PYTQ_CUDA=ON"),
    "hip": ("GGML_HIP=ON", "PYTQ_HIP=ON"),
    "metal": ("GGML_METAL=ON", "GGML_METAL_EMBED_LIBRARY=ON", "PYTQ_METAL=ON"),
}
# what ggml-hip's CMakeLists.txt looks for, and its oldest version
ROCM_PACKAGES = ("hip", "hipblas", "rocblas")
ROCM_OLDEST = (6, 1)
# never compiled here, so not unpacked: vocabularies for upstream's own tests (76 MB)
SKIPPED = ("models/",)
# directories of csrc/ that a backend does not compile
FOREIGN = {
    "cpu": ("ffi", "cuda", "metal"),
    "cuda": ("ffi", "metal"),
    "hip": ("ffi", "metal"),
    "metal": ("ffi", "cuda"),
}
TAIL_LINES = 15
# a failed build may hold hundreds of open edges; a terminated compiler needs a moment to remove its output
TERMINATE_SECONDS = 10


# -- keys ------------------------------------------------------------------------------------------------


def series() -> list[Path]:
    """The patches in order, from ``patches/series`` (blank lines and # comments skipped)."""
    directory = paths.source_root() / "patches"
    file = directory / "series"
    if not file.exists():
        raise PytqError(f"{file} is missing: restore it from the repository")
    names = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    patches = [directory / name for name in names if name]
    for patch in patches:
        if not patch.is_file():
            raise PytqError(f"patches/series names {patch.name}, which is not in {directory}")
    return patches


def _digest(parts: Sequence[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()


def _tree_parts(directory: Path, skip: Sequence[str] = ()) -> list[str | bytes]:
    parts: list[str | bytes] = []
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if relative.parts[0] in skip or not path.is_file() or path.name.startswith("."):
            continue
        parts += [relative.as_posix(), path.read_bytes()]
    return parts


def tree_key(kind: Kind) -> str:
    """Names an unpacked (and patched) source tree: pin, and for ``patched`` the series."""
    pin = fetch.load_pin()
    parts: list[str | bytes] = [pin.sha256, pin.path]
    if kind == "patched":
        for patch in series():
            parts += [patch.name, patch.read_bytes()]
    return _digest(parts)


def source_key(kind: Kind, backend: str = "cpu") -> str:
    """Names everything that is compiled: the tree, and for ``patched`` also ``csrc/``."""
    parts: list[str | bytes] = [tree_key(kind)]
    if kind == "patched":
        root = paths.source_root()
        parts += [(root / "CMakeLists.txt").read_bytes(), *_tree_parts(root / "csrc", FOREIGN[backend])]
    return _digest(parts)


def machine_key() -> str:
    """Names the CPU: -march=native code of another CPU may die of an illegal instruction."""
    flags = ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                flags = " ".join(sorted(value.split()))
                break
    return _digest([platform.system(), platform.machine(), flags])[:12]


# -- tools -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tools:
    """The programs of a build and what the compiler says it is."""

    cmake: str
    ninja: str
    git: str
    cc: str
    cxx: str
    compiler: str


def _wheel_program(name: str) -> str | None:
    """cmake or ninja as installed by their wheels into this environment."""
    candidate = Path(sys.prefix) / "bin" / name
    return str(candidate) if candidate.exists() else None


def find_tools(backend: str = "cpu") -> Tools:
    """All programs needed, or a PytqError naming the missing one and how to get it."""

    def need(names: Sequence[str], advice: str) -> str:
        for name in names:
            found = shutil.which(name)
            if found:
                return found
        raise PytqError(f"no {' or '.join(names)} found in PATH: {advice}")

    cmake = _wheel_program("cmake") or need(["cmake"], "`pip install cmake`")
    ninja = _wheel_program("ninja") or need(["ninja", "ninja-build"], "`pip install ninja`")
    git = need(["git"], "install git (Debian: apt install git)")
    compiler = "install a C and C++ compiler (Debian: apt install gcc g++) or set CC and CXX"
    cc = need([os.environ["CC"]] if os.environ.get("CC") else ["cc", "gcc", "clang"], compiler)
    cxx = need([os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"], compiler)
    if backend == "cuda":
        need(["nvcc"], "install the CUDA toolkit and put its bin directory in PATH")
    if backend == "hip":
        _check_rocm(need(["hipconfig"], "install ROCm (HIP 6.1 or newer) and put its bin directory in PATH"))
    if backend == "metal":
        if sys.platform != "darwin":
            raise PytqError(
                f"the metal backend needs macOS and its Foundation, Metal and MetalKit frameworks, which "
                f"{platform.system()} lacks: choose --backend cpu"
            )
        need(["xcrun"], "install Apple's command line tools (xcode-select --install)")
    version = subprocess.run([cxx, "--version"], capture_output=True, text=True)
    lines = version.stdout.splitlines()
    if version.returncode != 0 or not lines:
        raise PytqError(f"{cxx} --version failed: {compiler}")
    return Tools(cmake, ninja, git, cc, cxx, lines[0])


def _check_rocm(hipconfig: str) -> None:
    """ROCm is new enough and whole, or a PytqError says what is missing; CMake would say it in forty lines."""

    def ask(option: str) -> str:
        done = subprocess.run([hipconfig, option], capture_output=True, text=True)
        if done.returncode != 0:
            raise PytqError(f"{hipconfig} {option} failed: reinstall ROCm (HIP 6.1 or newer)")
        return done.stdout.strip()

    version = re.match(r"(\d+)\.(\d+)", ask("--version"))
    if version is None or (int(version[1]), int(version[2])) < ROCM_OLDEST:
        raise PytqError(
            f"{hipconfig} is of HIP {version[0] if version else 'unknown'}: llama.cpp needs 6.1 or newer"
        )
    root = Path(os.environ.get("ROCM_PATH") or ask("--rocmpath"))
    places = [root / "lib" / "cmake", root / "lib64" / "cmake", *root.glob("lib/*/cmake")]
    for package in ROCM_PACKAGES:
        if not any((place / package).is_dir() for place in places):
            raise PytqError(
                f"ROCm in {root} lacks {package} (no lib/cmake/{package}): install its development package, or "
                "point ROCM_PATH to a whole installation"
            )


# -- the build -------------------------------------------------------------------------------------------


def build(
    kind: Kind,
    backend: str = "cpu",
    *,
    jobs: int | None = None,
    source: Path | None = None,
    force: bool = False,
    all_pairs: bool = False,
    defines: Sequence[str] = (),
) -> BuildDir:
    """Builds llama.cpp, or returns at once if this very build exists.

    Args:
        kind: ``stock`` or ``patched``.
        backend: ``cpu``, ``cuda``, ``hip`` or ``metal``.
        jobs: parallel compilers; default all CPUs this process may use.
        source: an own llama.cpp tree instead of the pinned one. It is copied, never changed; for
            ``patched`` the series is applied to the copy unless it is in already.
        force: build again although the build exists.
        all_pairs: CUDA: attention kernels for every pair of stock cache types too.
        defines: further CMake definitions, ``NAME=VALUE``.

    Raises:
        PytqError: anything of the machine, the archive, the patches or the compiler; the log is named.
            Nothing half-installed is left, and the next run goes on where this one stopped.
    """
    if kind not in paths.KINDS:
        raise PytqError(f"unknown build kind {kind!r}: stock or patched")
    if backend not in paths.BACKENDS:
        raise PytqError(f"unknown backend {backend!r}: one of {', '.join(paths.BACKENDS)}")
    if jobs is not None and jobs < 1:
        raise PytqError(f"--jobs {jobs}: at least 1")
    if source is not None and not (source / "CMakeLists.txt").is_file():
        raise PytqError(f"{source} is not a llama.cpp source tree: it has no CMakeLists.txt")
    home = paths.writable(paths.home())
    tools = find_tools(backend)
    try:
        with _lock(home):
            return _build(home, tools, kind, backend, jobs or cpus(), source, force, all_pairs, list(defines))
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise PytqError(_disk_full(home)) from error
        raise PytqError(f"building failed: {error}") from error


def cpus() -> int:
    """CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _disk_full(home: Path) -> str:
    return f"the disk of {home} is full: free some space, or set PYTQ_HOME to another disk"


@contextlib.contextmanager
def _lock(home: Path) -> Iterator[None]:
    """One build at a time in a cache directory: they share the trees, and the machine."""
    with (home / "build.lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            say(f"another build (process {file.read().strip() or 'unknown'}) is running: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def _build(
    home: Path,
    tools: Tools,
    kind: Kind,
    backend: str,
    jobs: int,
    source: Path | None,
    force: bool,
    all_pairs: bool,
    defines: list[str],
) -> BuildDir:
    pin = fetch.load_pin()
    options = [*OPTIONS, *BACKEND_OPTIONS[backend]]
    options += ["LLAMA_BUILD_TESTS=ON" if backend != "cpu" else "LLAMA_BUILD_TESTS=OFF"]
    options += ["GGML_CUDA_FA_ALL_QUANTS=ON"] if all_pairs else []
    options += [
        "LLAMA_BUILD_NUMBER=0",
        f"LLAMA_BUILD_COMMIT={pin.commit}{'-pytq' if kind == 'patched' else ''}",
    ]
    options += defines
    for option in defines:
        if not re.fullmatch(r"[A-Za-z_][\w.:]*=.*", option):
            raise PytqError(f"-D {option}: NAME=VALUE is expected")

    tree = tree_key(kind) if source is None else _digest([tree_key(kind), *_tree_parts(source, (".git",))])
    sources = source_key(kind, backend)
    key = _digest([tree, sources, machine_key(), tools.compiler, *options])[:12]
    target = home / "builds" / f"{kind}-{backend}-{key}"
    existing = paths.open_build(target, kind, backend)
    if existing is not None and not force:
        os.utime(target)
        return existing

    for leftover in (home / "builds").glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    free = shutil.disk_usage(home).free
    if free < NEED_BYTES[backend]:
        raise PytqError(
            f"{free / 1e9:.1f} GB are free in {home}, a build needs {NEED_BYTES[backend] / 1e9:.1f} GB: "
            "free some space, or set PYTQ_HOME to another disk"
        )

    origin = tree_key("stock") if source is None else _digest(_tree_parts(source, (".git",)))
    work = home / "work" / f"{backend}-{origin[:12]}"
    tree_dir = work / "src"
    if not tree_dir.exists():
        _prepare(work, source)
    _bring(work, kind, tools)
    log = home / "logs" / f"{target.name}.log"
    log.parent.mkdir(exist_ok=True)
    programs = PROGRAMS + (GPU_PROGRAMS if backend != "cpu" else ())
    title = f"llama.cpp {kind} ({backend})"
    with log.open("w") as out:
        _configure(tools, tree_dir, work / "build", options, kind, out, title)
        _compile(tools, work / "build", programs, jobs, out, title)
    if source_key(kind, backend) != sources:
        raise PytqError("csrc/ or patches/ changed while llama.cpp was built: run the same command again")
    info = {
        "kind": kind,
        "backend": backend,
        "key": key,
        "source_key": sources,
        "machine_key": machine_key(),
        "custom_source": str(source.absolute()) if source else None,
        "pin": {"version": pin.version, "sha256": pin.sha256, "commit": pin.commit, "ggml": pin.ggml},
        "series": [patch.name for patch in series()] if kind == "patched" else [],
        "options": options,
        "compiler": tools.compiler,
        "machine": f"{platform.system()} {platform.machine()}",
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    result = _install(home, work / "build", target, programs, info)
    _clean_work(home, work, backend)
    return result


def _prepare(work: Path, source: Path | None) -> None:
    """Makes ``work/src``: unpacked or copied, ``.git`` removed; it appears by one rename."""
    archive = fetch.archive() if source is None else None
    # the build tree of an unfinished source tree would mix object files of two sources
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        with tempfile.TemporaryDirectory(dir=work, prefix=".tmp-") as temporary:
            fresh = Path(temporary) / "src"
            if archive is not None:
                _unpack(archive, fetch.load_pin().path, fresh)
            else:
                assert source is not None
                shutil.copytree(source, fresh, symlinks=True, ignore=shutil.ignore_patterns(".git"))
            os.replace(fresh, work / "src")
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _patched_files() -> list[str]:
    """Files that the series changes, relative to the source tree."""
    text = "".join(patch.read_text() for patch in series())
    return sorted(set(re.findall(r"^--- a/(\S+)$", text, flags=re.MULTILINE)))


def _bring(work: Path, kind: Kind, tools: Tools) -> None:
    """Brings ``work/src`` into the state of ``kind``, writing only the files that the series touches.

    The state is written last: after an interruption the next run starts again from the originals.
    """
    state, originals, tree = work / "state", work / "original", work / "src"
    want = tree_key(kind)
    if state.exists() and state.read_text() == want:
        return
    state.unlink(missing_ok=True)
    if originals.exists():
        for path in sorted(p for p in originals.rglob("*") if p.is_file()):
            shutil.copyfile(path, tree / path.relative_to(originals))
    if kind == "patched":
        for name in _patched_files():
            saved = originals / name
            if not saved.exists() and (tree / name).exists():
                saved.parent.mkdir(parents=True, exist_ok=True)
                temporary = saved.with_name(saved.name + ".tmp")
                shutil.copyfile(tree / name, temporary)
                os.replace(temporary, saved)
        apply_series(tree, tools.git)
    temporary = work / "state.tmp"
    temporary.write_text(want)
    os.replace(temporary, state)


def _unpack(archive: Path, prefix: str, target: Path) -> None:
    """Unpacks what lies under ``prefix`` in the archive into ``target``."""
    prefix = prefix.rstrip("/") + "/"
    try:
        with step("unpacking the llama.cpp source"), tarfile.open(archive) as tar:
            for member in tar:
                name = member.name.removeprefix(prefix)
                # a dangling .git file in the tree makes Ninja run CMake for ever
                if name == member.name or name == ".git" or name.startswith(SKIPPED):
                    continue
                path = target / name
                if ".." in Path(name).parts or not (member.isfile() or member.isdir()):
                    continue
                if member.isdir():
                    path.mkdir(parents=True, exist_ok=True)
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                data = tar.extractfile(member)
                assert data is not None
                with data, path.open("wb") as out:
                    shutil.copyfileobj(data, out)
                path.chmod(0o755 if member.mode & 0o100 else 0o644)
    except (tarfile.TarError, EOFError, ValueError) as error:
        raise PytqError(f"{archive} cannot be unpacked ({error}): delete it and run again") from error
    if not (target / "CMakeLists.txt").exists():
        raise PytqError(f"{archive} holds no {prefix}CMakeLists.txt: delete it and run again")


def apply_series(tree: Path, git: str = "git") -> None:
    """Applies every patch of the series to ``tree``; one that is in already is left alone.

    Raises:
        PytqError: a patch does not apply; names it and git's reason. Earlier patches stay applied.
    """
    # inside another repository `git apply` would silently skip all paths outside its current directory
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(tree.resolve().parent)}

    def apply(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [git, "apply", *arguments], cwd=tree, env=environment, capture_output=True, text=True
        )

    for patch in series():
        if apply("--check", str(patch)).returncode == 0:
            done = apply(str(patch))
        elif apply("--check", "--reverse", str(patch)).returncode == 0:
            continue
        else:
            done = apply("--check", str(patch))
        if done.returncode != 0:
            reasons = [line.removeprefix("error: ") for line in done.stderr.splitlines() if line.strip()]
            raise PytqError(
                f"patch {patch.name} does not apply ({reasons[0] if reasons else 'git gave no reason'}): the source "
                f"is not llama.cpp {fetch.load_pin().commit}, which the series is made for"
            )


def _configure(
    tools: Tools, source: Path, build_dir: Path, options: list[str], kind: Kind, log: Any, title: str
) -> None:
    origin = "@loader_path" if sys.platform == "darwin" else "$ORIGIN"
    command = [tools.cmake, "-S", str(source), "-B", str(build_dir), "-G", "Ninja"]
    command += [f"-DCMAKE_MAKE_PROGRAM={tools.ninja}", f"-DCMAKE_C_COMPILER={tools.cc}"]
    command += [f"-DCMAKE_CXX_COMPILER={tools.cxx}", f"-DCMAKE_INSTALL_RPATH={origin};{origin}/../lib"]
    command += [f"-D{option}" for option in options]
    if kind == "patched":
        command += [f"-DPYTQ_DIR={paths.source_root()}"]
    # a cache of other options or another cmake must not leak into this configuration; objects stay valid
    (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
    # upstream asks git for its commit; without this it would find the repository around PYTQ_HOME
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(source.resolve().parent)}
    with step(f"{title}: configuring"):
        lines: list[str] = []
        for line in _run(command, environment, log):
            lines.append(line)
    if lines and lines[-1] != "0":
        _failed(lines[:-1], log, "cmake could not configure llama.cpp")


def _compile(tools: Tools, build_dir: Path, programs: Sequence[str], jobs: int, log: Any, title: str) -> None:
    command = [tools.ninja, "-C", str(build_dir), f"-j{jobs}", *programs]
    lines: list[str] = []
    with step(f"{title}: compiling") as progress:
        environment = os.environ | {"NINJA_STATUS": "[%f/%t] "}
        # paths relative to the work tree: stock and patched then share the objects of unpatched files
        environment |= {"CCACHE_BASEDIR": str(build_dir.parent), "CCACHE_NOHASHDIR": "1"}
        for line in _run(command, environment, log):
            lines.append(line)
            count = re.match(r"\[(\d+)/(\d+)\]", line)
            if count:
                progress.update(int(count[1]), int(count[2]))
    if lines[-1] != "0":
        _failed(lines[:-1], log, "llama.cpp could not be compiled")


def _run(command: list[str], environment: dict[str, str], log: Any) -> Iterator[str]:
    """Lines of a command's output, also written to ``log``; the last one is its exit code.

    The command gets a process group of its own: on Ctrl-C all of it is ended here, in an order we know,
    whether the signal came from the terminal or was sent to this process alone.
    """
    log.write("$ " + " ".join(command) + "\n")
    log.flush()
    with subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                yield line.rstrip("\n")
            yield str(process.wait())
        except BaseException:
            _end(process)
            raise
        finally:
            log.flush()


def _end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(TERMINATE_SECONDS)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _failed(lines: list[str], log: Any, what: str) -> None:
    for line in lines[-TAIL_LINES:]:
        say(f"  {line}")
    if any("No space left on device" in line for line in lines[-200:]):
        raise PytqError(_disk_full(paths.home()))
    raise PytqError(f"{what}: see {log.name}")


def _install(
    home: Path, build_dir: Path, target: Path, programs: Sequence[str], info: dict[str, Any]
) -> BuildDir:
    """Copies programs and libraries beside ``target`` and renames: the build is there whole or not at all."""
    builds = home / "builds"
    builds.mkdir(exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=builds, prefix=".tmp-"))
    try:
        (temporary / "bin").mkdir()
        (temporary / "lib").mkdir()
        for name in programs:
            shutil.copy2(build_dir / "bin" / name, temporary / "bin" / name)
        for library in sorted((build_dir / "bin").glob("lib*")):
            if re.search(r"\.(so(\.[\d.]+)?|dylib|metal)$", library.name):
                shutil.copy2(library, temporary / "lib" / library.name, follow_symlinks=False)
        (temporary / "build.json").write_text(json.dumps(info, indent=2) + "\n")
        temporary.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(dir=builds, prefix=".tmp-"))
            os.rename(target, old / "old")
            os.rename(temporary, target)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    result = paths.open_build(target, info["kind"], info["backend"])
    if result is None:
        raise PytqError(f"the build in {target} is not whole: run the same command with --force")
    return result


def _clean_work(home: Path, work: Path, backend: str) -> None:
    """Removes work trees of other sources; the present one stays, so the other kind and edits of csrc/ build fast."""
    for other in (home / "work").iterdir():
        if other != work and other.name.rsplit("-", 1)[0] in (
            backend,
            f"stock-{backend}",
            f"patched-{backend}",
        ):
            shutil.rmtree(other, ignore_errors=True)

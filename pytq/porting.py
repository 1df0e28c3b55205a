"""The patch series on a llama.cpp checkout of one's own: does it fit, and if not, what differs.

Everything is tried on copies of the touched files first; the checkout changes only when the whole series fits.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from pytq import fetch
from pytq.build import series
from pytq.errors import PytqError
from pytq.gguf.edit import atomic

APPLIED, FITS, CONFLICT = "applied", "fits", "conflict"
HUNK = re.compile(r"^@@ -(\d+)(?:,\d+)? \+\d+(?:,\d+)? @@")
SHOWN = 3  # missing lines named per hunk


@dataclass(frozen=True)
class Hunk:
    """One place of a patch: its file, the line it expects to be at, and the lines that must be there."""

    file: str
    line: int
    expected: tuple[str, ...]


@dataclass
class PatchResult:
    """What became of one patch; ``reasons`` explain a conflict, one line per place."""

    name: str
    state: str
    reasons: list[str] = field(default_factory=list)


@dataclass
class Report:
    """The series on one checkout; ``files`` holds the new content of every file that would change."""

    directory: Path
    results: list[PatchResult]
    files: dict[str, bytes]
    version: str

    @property
    def fits(self) -> bool:
        return all(result.state != CONFLICT for result in self.results)

    @property
    def complete(self) -> bool:
        """True when every patch is in already."""
        return all(result.state == APPLIED for result in self.results)


def parse_hunks(text: str) -> list[Hunk]:
    """The hunks of a unified diff: context and removed lines are what must be there."""
    hunks: list[Hunk] = []
    file, line = "", 0
    expected: list[str] = []

    def close() -> None:
        if line:
            hunks.append(Hunk(file, line, tuple(expected)))

    for row in text.splitlines():
        if row.startswith("diff --git "):
            close()
            line, expected = 0, []
            file = row.split(" b/")[-1]
        elif found := HUNK.match(row):
            close()
            line, expected = max(1, int(found[1])), []
        elif line and row[:1] in (" ", "-") and not row.startswith("-- "):
            expected.append(row[1:])
        elif row.startswith("-- "):  # the mail signature ends the last hunk
            close()
            line = 0
    close()
    return hunks


def touched(patch: Path) -> list[str]:
    """Files a patch changes, in order."""
    return list(dict.fromkeys(hunk.file for hunk in parse_hunks(patch.read_text(encoding="utf-8"))))


def explain(root: Path, patch: Path) -> list[str]:
    """For each hunk that finds no place: file, line, and the expected lines that the file does not have."""
    reasons = []
    for hunk in parse_hunks(patch.read_text(encoding="utf-8")):
        path = root / hunk.file
        if not path.is_file():
            reasons.append(f"{hunk.file} does not exist")
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if "\n".join(hunk.expected) in text:
            continue
        have = {re.sub(r"\s+", " ", row).strip() for row in text.splitlines()}
        missing = [row.strip() for row in hunk.expected if re.sub(r"\s+", " ", row).strip() not in have]
        if missing:
            named = "; ".join(f"`{row}`" for row in missing[:SHOWN])
            more = f" and {len(missing) - SHOWN} more" if len(missing) > SHOWN else ""
            reasons.append(f"{hunk.file}, near line {hunk.line}: not found there: {named}{more}")
        else:
            reasons.append(
                f"{hunk.file}, near line {hunk.line}: its lines are there, but not together or in another order"
            )
    return list(dict.fromkeys(reasons))


def check(directory: Path) -> Report:
    """Tries the series on copies of the files it touches; PytqError when ``directory`` is no llama.cpp tree."""
    if not (directory / "CMakeLists.txt").is_file() or not (directory / "ggml").is_dir():
        raise PytqError(f"{directory} is no llama.cpp source tree: CMakeLists.txt and ggml/ are expected")
    git = shutil.which("git")
    if git is None:
        raise PytqError("git is needed to apply patches: install it (Debian: apt install git)")
    patches = series()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        names = list(dict.fromkeys(name for patch in patches for name in touched(patch)))
        for name in names:
            if (directory / name).is_file():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(directory / name, root / name)
        states = _already(git, root, patches)
        for patch in patches:
            if patch in states:
                results.append(PatchResult(patch.name, APPLIED))
            elif _git(git, root, patch, "--check"):
                _git(git, root, patch)
                results.append(PatchResult(patch.name, FITS))
            else:
                reasons = explain(root, patch) or [_reason(git, root, patch)]
                results.append(PatchResult(patch.name, CONFLICT, reasons))
        files = {}
        for name in names:
            if (root / name).is_file():
                new = (root / name).read_bytes()
                if not (directory / name).is_file() or (directory / name).read_bytes() != new:
                    files[name] = new
    return Report(directory, results, files, ggml_version(directory))


def _already(git: str, root: Path, patches: list[Path]) -> set[Path]:
    """The patches that are in: found by taking them off a second copy from the last to the first."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "tree"
        shutil.copytree(root, copy)
        found = set()
        for patch in reversed(patches):
            if _git(git, copy, patch, "--check", "--reverse"):
                _git(git, copy, patch, "--reverse")
                found.add(patch)
    return found


def _run(git: str, root: Path, patch: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # inside another repository `git apply` would skip files outside its current directory without a word
    environment = os.environ | {"GIT_CEILING_DIRECTORIES": str(root.resolve().parent), "LC_ALL": "C"}
    return subprocess.run(
        [git, "apply", *options, str(patch)], cwd=root, env=environment, capture_output=True, text=True
    )


def _git(git: str, root: Path, patch: Path, *options: str) -> bool:
    return _run(git, root, patch, *options).returncode == 0


def _reason(git: str, root: Path, patch: Path) -> str:
    lines = [
        row.removeprefix("error: ") for row in _run(git, root, patch, "--check").stderr.splitlines() if row
    ]
    return lines[0] if lines else "git gave no reason"


def ggml_version(directory: Path) -> str:
    """ggml's version as its CMakeLists says, ``?`` where it does not."""
    path = directory / "ggml" / "CMakeLists.txt"
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    parts = [re.search(rf"set\(GGML_VERSION_{part} (\d+)\)", text) for part in ("MAJOR", "MINOR", "PATCH")]
    return ".".join(part[1] if part else "?" for part in parts)


def apply(report: Report) -> list[str]:
    """Writes the new files of a report that fits; returns their names. PytqError for one that does not."""
    if not report.fits:
        raise PytqError(describe_conflict(report))
    for name, data in report.files.items():
        target = report.directory / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic(target, like=target if target.exists() else None) as out:
            out.write(data)
    return list(report.files)


def describe_conflict(report: Report) -> str:
    """One line: the first patch that does not fit, the first reason, and the versions."""
    bad = next(result for result in report.results if result.state == CONFLICT)
    pin = fetch.load_pin()
    more = f" (and {len(bad.reasons) - 1} more places)" if len(bad.reasons) > 1 else ""
    return (
        f"{bad.name} does not fit: {bad.reasons[0]}{more}; the series is made for llama.cpp {pin.commit} (ggml"
        f" {pin.ggml}), {report.directory} has ggml {report.version}; nothing was changed"
    )

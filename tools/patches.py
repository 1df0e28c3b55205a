#!/usr/bin/env python3
"""The patch stack's maintainer tool.

usage: tools/patches.py check   [--source DIR]   every prefix applies, re-export is byte-identical, no orphans, bounded size
       tools/patches.py apply   --source DIR     apply the series to an unpacked llama.cpp (idempotent)
       tools/patches.py refresh --source DIR     rewrite patches/ from the commits on top of "base" in a git work tree
       tools/patches.py tree    --source DIR     make that git work tree: unpack the pin, commit "base", one commit per patch
       tools/patches.py stats                    touched upstream lines per patch

Without --source, `check` unpacks the pinned archive (fetched and verified as `pytq build` does it).
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PATCHES = ROOT / "patches"
# Upstream lines that the whole series may add or remove. Our own code belongs in csrc/; raise this only with a reason in the commit.
MAX_TOUCHED_LINES = 220
HEADINGS = ("Why:", "How tested:", "Can be dropped when:")
GIT = [
    "git",
    "-c", "user.name=pytq", "-c", "user.email=pytq@localhost",
    "-c", "core.autocrlf=false", "-c", "core.abbrev=12", "-c", "diff.noprefix=false", "-c", "diff.algorithm=myers",
]  # fmt: skip


class StackError(Exception):
    """One line that says what is wrong and what to do."""


def git(tree: Path, *args: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, GIT_CONFIG_GLOBAL="/dev/null", GIT_CONFIG_NOSYSTEM="1", GIT_AUTHOR_DATE="2026-01-01T00:00:00Z",
               GIT_COMMITTER_DATE="2026-01-01T00:00:00Z")  # fmt: skip
    done = subprocess.run([*GIT, "-C", str(tree), *args], capture_output=True, text=True, env=env)
    if check and done.returncode:
        raise StackError(f"git {' '.join(args[:2])}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
    return done


def series() -> list[Path]:
    """Patch files in order; every listed file exists and every file is listed."""
    names = [n for n in (PATCHES / "series").read_text().split("\n") if n and not n.startswith("#")]
    missing = [n for n in names if not (PATCHES / n).is_file()]
    orphans = sorted(p.name for p in PATCHES.glob("*.patch") if p.name not in names)
    if missing:
        raise StackError(f"patches/series lists {missing[0]}, which does not exist")
    if orphans:
        raise StackError(f"patches/{orphans[0]} is not listed in patches/series")
    return [PATCHES / n for n in names]


def base_tree(source: Path | None, tmp: Path, everything: bool = False) -> Path:
    """A git work tree with upstream committed and tagged as "base": all files, or those that the series touches."""
    tree = tmp / "llama.cpp"
    if source is None:
        from pytq import build, fetch  # the same fetch, hash check and clean-up as a build

        build._unpack(fetch.archive(), fetch.load_pin().path, tree)
    else:
        subprocess.run(["cp", "-r", str(source), str(tree)], check=True)
        subprocess.run(["rm", "-rf", str(tree / ".git")], check=True)
    git(tree, "init", "-q", "-b", "pytq")
    touched = sorted(
        {f for p in series() for f in re.findall(r"^--- a/(\S+)$", p.read_text(), flags=re.MULTILINE)}
    )
    git(tree, "add", "-f", "--", *(["."] if everything else touched or ["CMakeLists.txt"]))
    git(tree, "commit", "-qm", "base")
    git(tree, "tag", "base")
    return tree


def export(tree: Path, out: Path) -> list[Path]:
    out.mkdir(parents=True, exist_ok=True)
    git(
        tree,
        "format-patch",
        "-q",
        "--zero-commit",
        "--no-signature",
        "--no-stat",
        "--no-numbered",
        "--full-index",
        "-o",
        str(out),
        "base",
    )
    return sorted(out.glob("*.patch"))


def touched_lines(patch: Path) -> tuple[int, int]:
    body = patch.read_text().split("\ndiff --git ", 1)[1]
    added = len(re.findall(r"^\+(?!\+\+ )", body, flags=re.MULTILINE))
    removed = len(re.findall(r"^-(?!-- )", body, flags=re.MULTILINE))
    return added, removed


def cmd_stats() -> int:
    total = 0
    for patch in series():
        added, removed = touched_lines(patch)
        total += added + removed
        print(f"{patch.name:60} +{added:3} -{removed:3}")
    print(f"touched upstream lines: {total} (limit {MAX_TOUCHED_LINES})")
    if total > MAX_TOUCHED_LINES:
        raise StackError(
            f"the series touches {total} upstream lines, more than {MAX_TOUCHED_LINES}: move code into csrc/"
        )
    return 0


def cmd_check(source: Path | None) -> int:
    stack = series()
    for patch in stack:
        head = patch.read_text().split("\ndiff --git ", 1)[0]
        for heading in HEADINGS:
            if heading not in head:
                raise StackError(f"{patch.name} has no {heading!r} line in its header")
    with tempfile.TemporaryDirectory() as tmp:
        tree = base_tree(source, Path(tmp))
        for patch in stack:
            if git(tree, "am", "-q", str(patch), check=False).returncode:
                raise StackError(
                    f"{patch.name} does not apply to the pinned source after the patches before it"
                )
            print(f"applies: {patch.name}")
        again = export(tree, Path(tmp) / "again")
        if [p.name for p in again] != [p.name for p in stack]:
            raise StackError(
                f"re-export gives {[p.name for p in again]}, series has {[p.name for p in stack]}: run refresh"
            )
        for ours, theirs in zip(stack, again, strict=True):
            if ours.read_bytes() != theirs.read_bytes():
                raise StackError(f"{ours.name} differs from its re-export: run tools/patches.py refresh")
    return cmd_stats()


def cmd_apply(source: Path) -> int:
    from pytq.build import apply_series

    apply_series(source)
    return 0


def cmd_tree(source: Path) -> int:
    if source.exists():
        raise StackError(f"{source} exists already")
    source.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=source.parent) as tmp:
        tree = base_tree(None, Path(tmp), everything=True)
        for patch in series():
            git(tree, "am", "-q", str(patch))
        tree.rename(source)
    print(f"{source}: one commit per patch on top of the tag base; amend or add commits, then refresh")
    return 0


def cmd_refresh(source: Path) -> int:
    with tempfile.TemporaryDirectory(dir=PATCHES) as tmp:
        new = export(source, Path(tmp))
        if not new:
            raise StackError(f"{source} has no commits on top of the tag base")
        for old in PATCHES.glob("*.patch"):
            old.unlink()
        for patch in new:
            patch.rename(PATCHES / patch.name)
    names = [p.name for p in new]
    (PATCHES / "series").write_text(
        "# one patch per reason, in order of application; see tools/patches.py\n" + "\n".join(names) + "\n"
    )
    return cmd_stats()


def main() -> int:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("verb", choices=["check", "apply", "refresh", "tree", "stats"])
    ap.add_argument("--source", type=Path)
    a = ap.parse_args()
    sys.path.insert(0, str(ROOT))
    try:
        if a.verb in ("apply", "refresh", "tree") and a.source is None:
            raise StackError(f"{a.verb} needs --source DIR")
        if a.verb == "stats":
            return cmd_stats()
        if a.verb == "check":
            return cmd_check(a.source)
        return {"apply": cmd_apply, "refresh": cmd_refresh, "tree": cmd_tree}[a.verb](a.source)
    except StackError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())

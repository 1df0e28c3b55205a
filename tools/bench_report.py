#!/usr/bin/env python3
"""Makes docs/img/bench-report.png: a real `pytq bench`, its HTML report, and a screenshot by a headless browser.

usage: python tools/bench_report.py [MODEL] [--types ...] [--depths ...] [--repeat N] [--html FILE] [--eval FILE]

--html FILE takes a report that is there already and only photographs it. Needs Chromium or Chrome.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TARGET = ROOT / "docs" / "img" / "bench-report.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
WIDTH, HEIGHT = 1180, 1500


def photograph(page: Path, target: Path) -> None:
    """A screenshot of a page, written in one step; SystemExit where no browser is found or it writes nothing."""
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"error: none of {', '.join(BROWSERS)} is installed")
    with tempfile.TemporaryDirectory() as directory:
        shot = Path(directory) / "shot.png"
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={directory}/profile",
            f"--window-size={WIDTH},{HEIGHT}", f"--screenshot={shot}", page.resolve().as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if not shot.is_file():
            sys.exit(f"error: {browser} wrote no picture: {done.stderr.strip()[-300:]}")
        new = target.with_name(f".{target.name}.new")
        Image.open(shot).quantize(128).save(new, "PNG", optimize=True)  # a third of the bytes
        new.replace(target)


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("model", nargs="?", type=Path, help="default: a random-weight model, --shape attn-heavy")
    ap.add_argument("--types", default="q8_0,q4_0,kv4/kv3,kv3")
    ap.add_argument("--depths", default="0,2048,8192")
    ap.add_argument("--repeat", default="3")
    ap.add_argument("--html", type=Path, help="an existing report")
    ap.add_argument("--eval", type=Path, help="of `pytq eval --json`, for the plot of quality against bits")
    ap.add_argument("-o", "--output", type=Path, default=TARGET)
    a = ap.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        page = a.html or Path(directory) / "report.html"
        if a.html is None:
            what = [str(a.model)] if a.model else ["--shape", "attn-heavy"]
            options = [
                "--types",
                a.types,
                "--depths",
                a.depths,
                "--repeat",
                a.repeat,
                "-o",
                "html",
                "--out",
                str(page),
            ]
            options += ["--eval", str(a.eval)] if a.eval else []
            subprocess.run([sys.executable, "-m", "pytq", "bench", *what, *options], check=True, cwd=ROOT)
        photograph(page, a.output)
    print(a.output)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes pytq/golden.json: per type, the digest of the golden vectors as the NumPy reference encodes them.

usage: python tools/gen_golden.py [--check]

The C code is tested against these; regenerate them only when the block format itself changes on purpose.
"""

from __future__ import annotations

import json
import sys

from pytq.codec.block import encode
from pytq.codec.table import load_types
from pytq.doctor import GOLDEN, digest, golden_vectors


def golden() -> str:
    """The file's content."""
    found = {row.name: digest(encode(row, golden_vectors(row.head_dim)).tobytes()) for row in load_types()}
    return json.dumps(found, indent=1) + "\n"


def main() -> int:
    text = golden()
    if "--check" in sys.argv[1:]:
        if GOLDEN.read_text() != text:
            print(f"{GOLDEN} is stale: the NumPy reference encodes other bytes", file=sys.stderr)
            return 1
        return 0
    GOLDEN.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

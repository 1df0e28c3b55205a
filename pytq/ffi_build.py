"""The cffi side of the extension ``pytq._pytq``; setup.py links it with the library CMake makes of csrc/.

Declarations come from ``csrc/ffi/*_cdef.h``. A file's leading ``// include: HEADER`` lines (relative to
csrc/) name the headers that hold the same declarations for the compiler, which checks one against the other.
"""

from __future__ import annotations

import re
from pathlib import Path

from cffi import FFI

CSRC = Path(__file__).resolve().parent.parent / "csrc" if "__file__" in globals() else Path("csrc").resolve()

ffibuilder = FFI()
includes: list[str] = []
for cdef in sorted((CSRC / "ffi").glob("*_cdef.h")):
    text = cdef.read_text()
    includes += re.findall(r"^// include: (\S+)$", text, flags=re.MULTILINE)
    ffibuilder.cdef(text)

ffibuilder.set_source(
    "pytq._pytq",
    "".join(f'#include "{header}"\n' for header in includes),
    include_dirs=[str(CSRC)],
    extra_compile_args=["-O2"],
    py_limited_api=True,
)

"""Matrices here are small: BLAS threads only wait for each other, badly so on a busy machine."""

import os

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

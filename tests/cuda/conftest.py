"""Fixtures of the tests under the CUDA shim."""

from __future__ import annotations

from tests.shim.toolchain import host_compiler, reference

__all__ = ["host_compiler", "reference"]  # fixtures of all shims

"""Fixtures of the bench's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_llama_bench import FakeBench
from shape_models import vocab_file

from pytq.bench.shapes import Shape, write_model


@pytest.fixture
def fake_bench() -> FakeBench:
    return FakeBench()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench")
    path = directory / "small.gguf"
    write_model(Shape(2, 256, 4, 2, 64, 256, 8192), "small", vocab_file(directory / "v.gguf"), path)
    return path

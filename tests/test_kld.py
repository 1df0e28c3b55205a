"""Quality on a real model: KL divergence to the f16 cache agrees with the prototype's figures (design notes, 4.3)."""

from __future__ import annotations

import pydoc_data.topics
import re
import subprocess
from pathlib import Path

import pytest

from pytq.paths import BuildDir

pytestmark = [pytest.mark.slow, pytest.mark.serial]

CHUNKS = 4
TOLERANCE = 0.15
# (K, V): mean KLD on SmolLM2-135M, -c 2048, pydoc_data.topics
PROTOTYPE = {
    ("turbo4", "turbo4"): 0.070,
    ("turbo3", "turbo3"): 0.280,
    ("kv4", "kv4"): 0.0556,
    ("kv3", "kv3"): 0.203,
    ("kv4", "f16"): 0.0536,
    ("f16", "kv4"): 0.0085,
    ("kv3", "f16"): 0.194,
    ("f16", "kv3"): 0.0205,
}


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, stock: BuildDir, model: Path) -> tuple[Path, Path]:
    """The text and the unpatched build's f16 logits."""
    folder = tmp_path_factory.mktemp("kld")
    text = folder / "topics.txt"
    text.write_text("\n".join(pydoc_data.topics.topics.values()))
    base = folder / "f16.kld"
    run(stock, model, text, "f16", "f16", "--kl-divergence-base", str(base))
    return text, base


def run(build: BuildDir, model: Path, text: Path, k: str, v: str, *more: str) -> str:
    done = subprocess.run(
        [
            build.bin / "llama-perplexity", "-m", model, "-f", text, "-c", "2048", "--chunks", str(CHUNKS),
            "-fa", "on", "-ctk", k, "-ctv", v, "--kv-profile" if "builds/patched" in str(build.bin) else "--no-warmup",
            *(["none"] if "builds/patched" in str(build.bin) else []), *more,
        ],
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout + done.stderr


@pytest.mark.parametrize("pair", PROTOTYPE, ids="/".join)
def test_kld_agrees_with_the_prototype(
    pair: tuple[str, str], reference: tuple[Path, Path], patched: BuildDir, model: Path
) -> None:
    text, base = reference
    out = run(patched, model, text, *pair, "--kl-divergence-base", str(base), "--kl-divergence")
    found = re.search(r"Mean\s+KLD:\s+([\d.]+)", out)
    assert found, out[-2000:]
    assert float(found[1]) == pytest.approx(PROTOTYPE[pair], rel=TOLERANCE)

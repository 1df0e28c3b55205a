"""Which graphs let attention run beside the writes of the newest token, and how the values' product is moved for it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from pytq.paths import BuildDir

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
Facts = dict[str, dict[str, dict[str, str]]]

TURNED = {
    "found": "1",
    "attention": "attention",
    "last": "turned_back",
    "turned": "1",
    "q": "rope_q",
    "k": "rope_k",
    "v": "Wv",
    "rows": "rows_k",
    "keys": "0",
    "first_row": "0",
    "join": "product3",
    # the first node of the branches, then those of keys and values
    "branches": "Wq+Wv+Wk+rope_k",
    # what lives until attention, so that neither branch writes where the other reads
    "kept": "x+Wq+rope_q",
    # which reads attention's result, and nobody else does
    "product": "product1",
}
# what a case of fuse_fresh.cpp changes; join: node until which the writes may take
FOUND = {
    "plain": {},
    "not turned": {"turned": "0", "last": "attention"},
    "only keys turned": {"last": "attention"},
    "only values turned": {"turned": "0"},
    "keys by profile": {
        "turned": "0",
        "q": "profile_q",
        "k": "profile_k",
        "branches": "Wq+Wv+Wk+rope_k+profile_k",
        "kept": "x+Wq+rope_q+profile_q",
    },
    "values written first": {"keys": "1"},
    "later stream": {"first_row": "96"},
    "no second product": {"join": "-"},
    "next write too soon": {"join": "-"},
    "cache read again": {"join": "product2"},
    "unrelated node": {"branches": "-", "kept": "-"},
    "node of queries and values": {"branches": "-", "kept": "-"},
    "keys over queries": {"branches": "-", "kept": "-"},
    "values overwritten before join": {"join": "-"},
    "rows overwritten before join": {"join": "-"},
    # one launch takes both and what they feed, so what waits must stand behind
    "gate and up first": {"join": "product1", "product": "-"},
    # a graph that ends there may be one that somebody looks into
    "graph ends at the product": {"join": "-", "product": "-"},
    "result used twice": {"product": "-"},
    "gate and up last": {"join": "gate"},
    "bias": {"v": "bias", "branches": "Wq+Wv+bias+Wk+rope_k"},
    "norm behind rope": {"k": "norm", "branches": "Wq+Wv+Wk+rope_k+norm"},
    "values last": {"branches": "Wq+Wk+rope_k+Wv"},
    "product used between": {"branches": "Wq+Wv+between+Wk+rope_k"},
    "product used later": {},
}
STAY = {
    "keys by profile",
    "bias",
    "norm behind rope",
    "values last",
    "product used between",
    "node of queries and values",
}
NOT_FOUND = {
    "two tokens",
    "two sequences",
    "result not turned back",
    "values not turned",
    "queries not turned",
    "keys not turned",
    "query used elsewhere",
    "something stands between",
    "one write",
    "rows of two types",
    "streams of two kinds",
    "result over the keys",
    "result over the keys, not turned",
    "keys overwritten before the write",
}


@pytest.fixture(scope="module")
def facts(patched: BuildDir, llama_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    """What the program says of each case, before and after the values' product is moved."""
    gxx = shutil.which("g++") or shutil.which("clang++")
    if gxx is None:
        pytest.skip("no C++ compiler")
    program = tmp_path_factory.mktemp("fuse") / "fuse_fresh"
    command = [gxx, "-std=c++17", "-O1", "-Wall", "-I", str(ROOT / "csrc"), "-I", str(ROOT / "csrc" / "ggml")]
    command += [f"-I{llama_source / 'ggml' / part}" for part in ("include", "src")]
    # the present pytq-fuse.cpp, whatever the library holds
    command += [
        str(Path(__file__).with_name("fuse_fresh.cpp")),
        str(ROOT / "csrc" / "ggml" / "pytq-fuse.cpp"),
    ]
    command += [f"-L{patched.lib}", f"-Wl,-rpath,{patched.lib}", "-lggml-base", "-o", str(program)]
    subprocess.run(command, check=True)
    found: Facts = {}
    for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines():
        case, when, *pairs = line.split(";")
        found.setdefault(case, {})[when] = dict(pair.split("=") for pair in pairs)
    return found


def test_every_case_is_judged(facts: Facts) -> None:
    assert set(facts) == set(FOUND) | NOT_FOUND


@pytest.mark.parametrize("case", list(FOUND))
def test_found(case: str, facts: Facts) -> None:
    """Operands are those before the products by the Hadamard matrix, whichever write comes first."""
    assert facts[case]["before"] == TURNED | FOUND[case]


@pytest.mark.parametrize("case", sorted(NOT_FOUND))
def test_not_found(case: str, facts: Facts) -> None:
    assert facts[case] == {"before": {"found": "0"}}


@pytest.mark.parametrize("case", list(FOUND))
def test_values_move_behind_the_rope(case: str, facts: Facts) -> None:
    """Every node behind its operands, none lost; the pattern is found as before, and nothing moves twice."""
    after = facts[case]["after"]
    stays = case in STAY
    assert {key: after.pop(key) for key in ("moved", "same", "complete", "in_order", "again")} == {
        "moved": str(int(not stays)),
        "same": str(int(stays)),
        "complete": "1",
        "in_order": "1",
        "again": "0",
    }
    assert after.pop("behind") == str(int(not stays or case == "values last"))
    before = dict(facts[case]["before"])
    assert sorted(after.pop("branches").split("+")) == sorted(before.pop("branches").split("+"))
    assert after == before

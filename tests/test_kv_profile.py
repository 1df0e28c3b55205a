"""The profile file: round trip, fingerprint, and every way in which it must be refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from pytq.errors import PytqError
from pytq.gguf.layout import read_layout
from pytq.paths import BuildDir
from pytq.profile import LayerProfile, Profile, default_path, fingerprint, load_profile, write_profile

D, HEADS, D_V = 64, 2, 64


def tiny_model(path: Path, *, seed: int = 0, rope_base: float = 10000.0, chat: str = "hello") -> Path:
    """A GGUF file with the metadata and tensors that a fingerprint looks at; no model runs on it."""
    rng = np.random.default_rng(seed)
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_name("tiny")
    w.add_block_count(2)
    w.add_rope_freq_base(rope_base)
    w.add_array("llama.odd", [1, 2, 3])
    w.add_string("tokenizer.chat_template", chat)
    for i in range(2):
        w.add_tensor(f"blk.{i}.attn_k.weight", rng.standard_normal((8, 96)).astype(np.float32))
    w.add_tensor("small.weight", rng.standard_normal((5,)).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def layer(seed: int) -> LayerProfile:
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((HEADS, D, D)) + 4 * np.eye(D)
    f32 = np.float32
    return LayerProfile(
        a.astype(f32),
        np.linalg.inv(a).transpose(0, 2, 1).astype(f32),
        rng.standard_normal((HEADS, D)).astype(f32),
        rng.random((HEADS, D)).astype(f32) + f32(0.1),
        rng.random((HEADS, D)).astype(f32),
        rng.random((HEADS, D_V)).astype(f32),
        rng.standard_normal((4, 2, 32)).astype(f32),
        rng.random((4, 32)).astype(f32),
    )


def profile_of(model: Path) -> Profile:
    p = Profile(fingerprint(read_layout(model)), "tiny", "llama", 2, 4096, "0" * 64, "0", "abc")
    p.layers = {0: layer(1), 1: layer(2)}
    p.types, p.bits = {"auto": (["kv3", "kv4"], ["kv2", ""])}, {"auto": 3.25}
    return p


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    model = tiny_model(tmp_path / "tiny.gguf")
    path = default_path(model)
    write_profile(path, profile_of(model))
    return model, path


def test_round_trip(pair: tuple[Path, Path]) -> None:
    model, path = pair
    assert path.name == "tiny.kvprofile.gguf"
    back, sent = load_profile(path, read_layout(model)), profile_of(model)
    assert back.types == sent.types and back.bits == sent.bits
    assert set(back.layers) == {0, 1}
    for il, want in sent.layers.items():
        for f in dataclasses.fields(LayerProfile):
            np.testing.assert_array_equal(getattr(back.layers[il], f.name), getattr(want, f.name))
    for f in (
        "fingerprint",
        "model_name",
        "model_arch",
        "n_layer",
        "tokens",
        "text_sha256",
        "pytq_version",
        "upstream",
    ):
        assert getattr(back, f) == getattr(sent, f)


def test_a_single_kv_head_keeps_its_shape(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "tiny.gguf")
    p = profile_of(model)
    one = LayerProfile(*(None if x is None else x[:1] for x in vars(layer(3)).values()))  # type: ignore[arg-type]
    p.layers = {0: one}
    write_profile(tmp_path / "p.gguf", p)
    assert load_profile(tmp_path / "p.gguf").layers[0].rot_k.shape == (1, D, D)


def test_gguf_tools_read_it(pair: tuple[Path, Path]) -> None:
    reader = gguf.GGUFReader(str(pair[1]))
    assert reader.fields["general.architecture"].contents() == "kvprofile"
    names = {t.name: t for t in reader.tensors}
    assert list(names["blk.0.kv_k_rot"].shape) == [D, D, HEADS]
    dump = subprocess.run(
        [str(Path(sys.executable).with_name("gguf-dump")), "--no-tensors", str(pair[1])],
        capture_output=True,
        text=True,
    )
    assert dump.returncode == 0 and "kvprofile.model.fingerprint" in dump.stdout


def test_fingerprint_sees_weights_and_parameters_only(tmp_path: Path) -> None:
    def of(name: str, **kwargs: object) -> str:
        return fingerprint(read_layout(tiny_model(tmp_path / name, **kwargs)))  # type: ignore[arg-type]

    base = of("a.gguf")
    assert of("b.gguf") == base
    assert of("c.gguf", chat="another template") == base
    assert of("d.gguf", seed=1) != base
    assert of("e.gguf", rope_base=20000.0) != base


def test_fingerprint_of_a_truncated_model_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path / "a.gguf")
    layout = read_layout(model)
    with model.open("r+b") as f:
        f.truncate(layout.data_end - 16)
    with pytest.raises(PytqError, match="shorter"):
        fingerprint(layout)


def damage_nan(p: Profile) -> None:
    p.layers[1].rot_q[0, 3, 4] = np.nan


def damage_inverse(p: Profile) -> None:
    p.layers[0].rot_k[1] *= 2


def damage_shape(p: Profile) -> None:
    p.layers[0].mean = p.layers[0].mean[:, :-8]


def damage_layers(p: Profile) -> None:
    p.n_layer = 1
    p.types = {"auto": (["kv3"], ["kv3"])}


def damage_types(p: Profile) -> None:
    p.types = {"auto": (["kv3"], ["kv3", "kv3"])}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nan, "not finite"),
        (damage_inverse, "not inverse"),
        (damage_shape, "kv_k_mean of layer 0 has shape"),
        (damage_layers, "layer 1 does not exist"),
        (damage_types, "do not cover"),
    ],
)
def test_unsound_profiles_are_refused(
    tmp_path: Path, damage: Callable[[Profile], None], message: str
) -> None:
    p = profile_of(tiny_model(tmp_path / "tiny.gguf"))
    damage(p)
    write_profile(tmp_path / "p.gguf", p)
    with pytest.raises(PytqError, match=message):
        load_profile(tmp_path / "p.gguf")


def test_another_model_is_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tiny_model(tmp_path / "other.gguf", seed=9)
    with pytest.raises(PytqError, match=r"made for another model \(tiny\)"):
        load_profile(pair[1], read_layout(other))


@pytest.mark.parametrize("keep", [10, 200, 5000, -1])
def test_truncated_files_are_refused(pair: tuple[Path, Path], keep: int) -> None:
    data = pair[1].read_bytes()
    pair[1].write_bytes(data[:keep])
    with pytest.raises(PytqError):
        load_profile(pair[1])


def test_a_model_is_no_profile(pair: tuple[Path, Path]) -> None:
    with pytest.raises(PytqError, match="not a profile"):
        load_profile(pair[0])


def test_another_format_version_is_refused(pair: tuple[Path, Path]) -> None:
    key = b"kvprofile.format_version"
    data = pair[1].read_bytes()
    at = data.index(key) + len(key) + 4
    pair[1].write_bytes(data[:at] + b"\x63" + data[at + 1 :])
    with pytest.raises(PytqError, match="format version 99"):
        load_profile(pair[1])


def test_write_leaves_the_old_file_when_it_fails(pair: tuple[Path, Path]) -> None:
    before = pair[1].read_bytes()
    with pytest.raises(PytqError, match="cannot write"):
        write_profile(pair[1] / "below-a-file.gguf", profile_of(pair[0]))
    assert pair[1].read_bytes() == before


def completion(
    build: BuildDir, model: Path, profile: str | None, type_k: str = "kv3"
) -> subprocess.CompletedProcess[str]:
    command = [
        str(build.program("llama-completion")), "-m", str(model), "-p", "The capital of France is", "-n", "2", "--temp", "0", "-c", "256",
        "-no-cnv", "-fa", "on", "-ctk", type_k, "-ctv", "kv3", "--no-warmup",
    ]  # fmt: skip
    if profile is not None:
        command += ["--kv-profile", profile]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


@pytest.mark.slow
def test_llama_cpp_refuses_what_python_refuses(
    model: Path, patched: BuildDir, pair: tuple[Path, Path], tmp_path: Path
) -> None:
    """The fingerprint in C++ equals Python's (a profile of the right model loads); wrong files end the run with one line."""
    n_layer = int(read_layout(model).get("llama.block_count"))
    good = profile_of(model)
    good.n_layer = n_layer
    base = layer(1)
    three = LayerProfile(*(np.concatenate([x, x[:1]]) for x in vars(base).values()))
    good.layers = {i: three for i in range(n_layer)}
    good.types = {"auto": (["kv3"] * n_layer, ["kv3"] * n_layer)}
    path = tmp_path / "good.gguf"
    write_profile(path, good)
    done = completion(patched, model, str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert completion(patched, model, str(path), "auto").returncode == 0

    wrong_shape = dataclasses.replace(good, layers={0: base})
    not_finite = dataclasses.replace(good, layers=dict(good.layers))
    broken = dataclasses.replace(three, rot_k=three.rot_k.copy())
    broken.rot_k[0, 0, 0] = np.inf
    not_finite.layers[0] = broken
    cases = {
        "has a shape": wrong_shape,
        "not finite": not_finite,
        "another model": dataclasses.replace(good, fingerprint="0" * 64),
    }
    for message, bad in cases.items():
        write_profile(path, bad)
        done = completion(patched, model, str(path))
        assert done.returncode != 0
        assert message in done.stderr.replace("with a shape", "has a shape"), done.stderr[-2000:]
    path.write_bytes(path.read_bytes()[:-1000])
    assert "damaged or truncated" in completion(patched, model, str(path)).stderr
    assert "cannot be read" in completion(patched, model, str(tmp_path / "missing.gguf")).stderr
    assert "needs a kv profile" in completion(patched, model, "none", "auto").stderr

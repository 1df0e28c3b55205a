"""The transform, the budget and the statistics, on data whose answer is known."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner

from pytq import calibrate as cal
from pytq.cli import main
from pytq.codec.table import find_type
from pytq.errors import PytqError
from pytq.gguf.layout import read_layout
from pytq.paths import BuildDir
from pytq.profile import load_profile
from pytq.stats import Attention, LayerStats, accumulate, attention_weights

D = 64
# Lloyd-Max mean squared errors for N(0,1) (Max, IRE Trans. IT-6, 1960, table I)
LLOYD_MAX = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.0025}
RNG = np.random.default_rng(7)


def spectrum(d: int, decay: float) -> npt.NDArray[np.float64]:
    return np.exp(-decay * np.arange(d) / d)


def rotation(seed: int, d: int = D) -> npt.NDArray[np.float64]:
    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))
    return q


def stats_of(q: npt.NDArray[np.float64], k: npt.NDArray[np.float64]) -> LayerStats:
    """Sums as they would be with equal weights for every pair."""
    st = LayerStats(1, 1, k.shape[1], k.shape[1])
    n = len(k)
    st.tokens = st.queries = n
    st.k_sum[0], st.k_out[0], st.q_out[0] = k.sum(0), k.T @ k, q.T @ q
    st.w_sum[0] = n
    st.wk_sum, st.wk_out, st.wq_out = st.k_sum.copy(), st.k_out.copy(), st.q_out.copy()
    return st


@pytest.fixture(scope="module")
def data() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    n = 4096
    k = RNG.standard_normal((n, D)) * spectrum(D, 3) @ rotation(1) + 5 * RNG.standard_normal(D)
    q = RNG.standard_normal((n, D)) * spectrum(D, 4) @ rotation(2)
    return q, k


def roundtrip(family: str, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    from pytq.ffi import ffi, lib

    f, c = ffi(), lib()
    t = c.pytq_type_get(find_type(family, x.shape[1]).id)
    assert t != f.NULL
    flat = np.ascontiguousarray(x, np.float32)
    blocks = np.zeros(len(x) * t.block_bytes, np.uint8)
    out = np.empty_like(flat)
    c.pytq_quantize_ref(
        t, f.cast("float *", flat.ctypes.data), f.cast("void *", blocks.ctypes.data), flat.size
    )
    c.pytq_dequantize_ref(
        t, f.cast("void *", blocks.ctypes.data), f.cast("float *", out.ctypes.data), flat.size
    )
    return out.astype(np.float64)


@pytest.mark.parametrize(("family", "bits"), [("kv2", 2), ("kv3", 3), ("kv4", 4)])
def test_trellis_is_strictly_better_than_lloyd_max(family: str, bits: int) -> None:
    x = np.random.default_rng(bits).standard_normal((600, 128))
    mse = float(((roundtrip(family, x) - x) ** 2).mean())
    assert mse < 0.8 * LLOYD_MAX[bits]
    assert mse == pytest.approx(cal.CODE_MSE[bits], rel=0.06)


def test_one_bit_and_five_bits_are_as_assumed() -> None:
    """Groups of 1 and 5 bits occur in the split layouts only: read their errors from there."""
    x = np.random.default_rng(3).standard_normal((600, 128))
    error = ((roundtrip("kv2s", x) - x) ** 2).mean(0)
    groups = cal.groups_of("kv2", 128, "k")
    at = sum(n for n, _ in groups[:-1])
    assert groups[-1][1] == 1 and float(error[at:].mean()) == pytest.approx(cal.CODE_MSE[1], rel=0.08)
    error = ((roundtrip("kv3s", x) - x) ** 2).mean(0)
    n, bits = cal.groups_of("kv3", 128, "k")[0]
    assert bits == 5 and float(error[:n].mean()) == pytest.approx(cal.CODE_MSE[5], rel=0.12)
    assert float(error[:n].mean()) < LLOYD_MAX[5]


def test_inverse_and_signs(data: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]) -> None:
    s = cal.solve(stats_of(*data), 0)
    np.testing.assert_allclose(s.rot_k.T @ s.rot_q, np.eye(D), atol=1e-9)
    again = cal.solve(stats_of(*data), 0)
    np.testing.assert_array_equal(s.rot_k, again.rot_k)


def test_logits_are_unchanged_up_to_a_constant(
    data: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
) -> None:
    q, k = data
    s = cal.solve(stats_of(q, k), 0)
    stored = (q[:8] @ s.rot_q.T) @ ((k[:50] - s.centre) @ s.rot_k.T).T
    difference = q[:8] @ k[:50].T - stored
    np.testing.assert_allclose(difference, np.broadcast_to(difference[:, :1], difference.shape), atol=1e-8)


def test_transform_minimises_the_expected_error(
    data: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
) -> None:
    """tr(Sq A^-1 A^-T) tr(A Sk A^T) is stationary and lower than at the identity, PCA and random transforms."""
    st = stats_of(*data)
    s = cal.solve(st, 0)
    centred = data[1] - s.centre
    sk, sq = centred.T @ centred / len(centred), data[0].T @ data[0] / len(centred)

    def cost(a: npt.NDArray[np.float64]) -> float:
        inverse = np.linalg.inv(a)
        return float(np.trace(sq @ inverse @ inverse.T) * np.trace(a @ sk @ a.T))

    best = cost(s.rot_k)
    rng = np.random.default_rng(0)
    for other in (np.eye(D), rotation(1), rotation(2), rng.standard_normal((D, D))):
        assert best < 0.9 * cost(other)
    for _ in range(20):
        # the ridge moves the solution off the exact minimum by less than this step
        step = rng.standard_normal((D, D)) * 0.02
        assert best < cost(s.rot_k @ (np.eye(D) + step))


def test_split_is_strictly_better_than_uniform_on_a_decaying_spectrum(
    data: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
) -> None:
    """Real codecs on transformed keys: kv3s has .25 bits more than kv3, and far more than their worth (2^-.5) less error."""
    q, k = data[0][:300], data[1][:600]
    s = cal.solve(stats_of(*data), 0)

    def error(family: str) -> float:
        a, b = fold(s, list(find_type(family, D).groups))
        x = (k - s.centre) @ a.T
        return float((((q @ b.T) @ (roundtrip(family, x) - x).T) ** 2).mean())

    for uniform, split in (("kv2", "kv2s"), ("kv3", "kv3s"), ("kv4", "kv4s")):
        extra = find_type(split, D).bits_per_value - find_type(uniform, D).bits_per_value
        assert error(split) < error(uniform) * 2.0 ** (-2 * extra)


def fold(
    s: cal.Solution, groups: list[tuple[int, int]]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """What the loader does: equal query power per group, then a Hadamard matrix per group."""
    from pytq.codec.rotation import hadamard

    a, b, at = s.rot_k.copy(), s.rot_q.copy(), 0
    for n, _ in groups:
        part = slice(at, at + n)
        scale = np.sqrt(s.q_var[part].mean())
        h = np.asarray(hadamard(n), np.float64)
        a[part], b[part] = h @ a[part] * scale, h @ b[part] / scale
        at += n
    return a, b


def test_predicted_error_matches_the_codec(
    data: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]],
) -> None:
    q, k = data[0][:400], data[1][:800]
    s = cal.solve(stats_of(*data), 0)
    for family in ("kv3", "kv4"):
        groups = cal.groups_of(family, D, "k")
        a, b = fold(s, groups)
        x = (k - s.centre) @ a.T
        measured = float((((q @ b.T) @ (roundtrip(f"{family}s", x) - x).T) ** 2).mean())
        assert measured == pytest.approx(cal.key_error(s, groups), rel=0.25)


def test_heads_without_attention_are_refused() -> None:
    with pytest.raises(PytqError, match="no attention"):
        cal.solve(LayerStats(1, 1, D, D), 0)


def reports(n: int) -> list[cal.LayerReport]:
    out = []
    for i in range(n):
        weight = 4.0 ** (i % 4)
        k = {f: weight * 4.0**-b for f, b in (("kv2", 2), ("kv3", 3), ("kv4", 4), ("kv5", 5))}
        out.append(cal.LayerReport(i, 128, 8, 128, 2.0, k, {f: e / 2 for f, e in k.items()}))
    return out


@pytest.mark.parametrize("budget", [2.5, 3.0, 3.5, 4.5])
def test_budget_is_kept_and_used(budget: float) -> None:
    k, v, used = cal.spend(reports(8), budget, 9)
    assert used <= budget and used > budget - 0.2
    assert k[8] == v[8] == ""
    rank = list(cal.FAMILIES)
    # a layer that matters more never gets fewer bits
    assert rank.index(k[3]) >= rank.index(k[2]) >= rank.index(k[1]) >= rank.index(k[0])
    mean = (
        sum(
            cal.type_bits(f, 128, "k") + cal.type_bits(g, 128, "v") for f, g in zip(k[:8], v[:8], strict=True)
        )
        / 16
    )
    assert mean == pytest.approx(used)


def test_budget_below_the_smallest_type_is_refused() -> None:
    with pytest.raises(PytqError, match="fewer than kv2"):
        cal.spend(reports(2), 1.5, 2)


def test_statistics_weigh_pairs_by_their_effect_on_the_output() -> None:
    """One window by hand: weights p^2 |v - o|^2, plain sums without the first token."""
    rng = np.random.default_rng(5)
    t, d = 12, 8
    f32 = np.float32
    q, k, v = (rng.standard_normal((h, t, d)).astype(f32) for h in (2, 1, 1))
    mask = np.where(np.tril(np.ones((t, t))) > 0, 0, -np.inf).astype(f32)
    a = Attention(0, q, k, v, mask, 0.5, 0.0, False)
    st = LayerStats(2, 1, d, d)
    accumulate(st, a, None, stride=1)
    want = np.zeros(1)
    wk = np.zeros((d, d))
    for h in range(2):
        s = np.float64(0.5) * q[h].astype(float) @ k[0].T.astype(float) + mask
        p = np.exp(s - s.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        np.testing.assert_allclose(attention_weights(a, h, slice(None)), p, atol=1e-6)
        o = p @ v[0]
        for i in range(t):
            for j in range(t):
                w = p[i, j] ** 2 * float(((v[0, j] - o[i]) ** 2).sum())
                want += w
                wk += w * np.outer(k[0, j], k[0, j])
    assert st.w_sum[0] == pytest.approx(float(want[0]), rel=1e-4)
    np.testing.assert_allclose(st.wk_out[0], wk, atol=1e-3 * np.abs(wk).max())
    assert st.tokens == t - 1
    np.testing.assert_allclose(st.k_sum[0], k[0, 1:].sum(0), rtol=1e-5)


def biased_model(path: Path, bias: float) -> Path:
    w = gguf.GGUFWriter(str(path), "qwen2")
    w.add_block_count(1)
    rng = np.random.default_rng(0)
    w.add_tensor("blk.0.attn_norm.weight", np.ones(64, np.float32))
    w.add_tensor("blk.0.attn_k.weight", (rng.standard_normal((64, 64)) / 8).astype(np.float32))
    w.add_tensor("blk.0.attn_k.bias", (bias * np.sign(rng.standard_normal(64))).astype(np.float32))
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path


def test_constant_keys_are_seen(tmp_path: Path) -> None:
    message = cal.constant_key_warning(biased_model(tmp_path / "a.gguf", 40.0))
    assert message is not None and "pytq calibrate" in message
    assert cal.constant_key_warning(biased_model(tmp_path / "b.gguf", 0.5)) is None


def test_windows_cover_the_training_context() -> None:
    """Half of them at 0, the others from one window's length up to the last that fits; short models stay at 0."""
    starts = [cal.window_start(i, 6, 8192) for i in range(6)]
    assert starts[::2] == [0, 0, 0]
    assert starts[1] == cal.WINDOW and starts[5] == 8192 - cal.WINDOW and starts[1] < starts[3] < starts[5]
    assert [cal.window_start(i, 4, 2048) for i in range(4)] == [0, 0, 0, 0]
    assert cal.window_start(1, 2, 32768) == 32768 - cal.WINDOW


def test_default_text_is_long_and_always_the_same() -> None:
    text = cal.calibration_text()
    assert text == cal.calibration_text()
    assert len(text) > 300_000
    text.decode("utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.gguf"], "missing.gguf"),
        (["MODEL", "--text", "missing.txt"], "cannot read missing.txt"),
        (["MODEL", "-o", "no/such/dir/x.gguf"], "no directory"),
        (["MODEL", "-o", "a.gguf", "--embed", "b.gguf"], "either -o or --embed"),
        (["MODEL", "--embed", "MODEL"], "another file"),
    ],
)
def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = biased_model(tmp_path / "m.gguf", 1.0)
    before = sorted(tmp_path.iterdir())
    done = CliRunner().invoke(main, ["calibrate", *(str(model) if a == "MODEL" else a for a in arguments)])
    assert done.exit_code == 2
    assert done.output.startswith("error: ") and done.output.count("\n") == 1 and message in done.output
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
@pytest.mark.serial
def test_calibration_is_deterministic_and_loads(tmp_path: Path, model: Path, stock: BuildDir) -> None:
    runs = [cal.calibrate(model, stock.lib, tokens=512, threads=2) for _ in range(2)]
    from pytq.profile import write_profile

    files = []
    for i, r in enumerate(runs):
        write_profile(tmp_path / f"{i}.gguf", r.profile)
        files.append((tmp_path / f"{i}.gguf").read_bytes())
    assert files[0] == files[1]
    loaded = load_profile(tmp_path / "0.gguf", read_layout(model))
    assert len(loaded.layers) == loaded.n_layer
    assert all(r.gain > 1 for r in runs[0].reports)
    assert loaded.bits["auto2"] <= 2.5 < loaded.bits["auto3"] <= 3.5 < loaded.bits["auto4"] <= 4.5

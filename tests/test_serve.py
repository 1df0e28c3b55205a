"""The checks in front of the server, and the server itself through the openai client."""

from __future__ import annotations

import dataclasses
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from click.testing import CliRunner
from shape_models import vocab_file

from pytq import estimate as est
from pytq import serve
from pytq.bench.shapes import Shape, write_model
from pytq.cli import main
from pytq.errors import PytqError
from pytq.gguf import cache, edit
from pytq.gguf.layout import read_layout
from pytq.paths import BuildDir
from pytq.profile import LayerProfile, Profile, fingerprint, write_profile


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("serve")
    path = directory / "small.gguf"
    write_model(Shape(2, 256, 4, 2, 64, 256, 8192), "small", vocab_file(directory / "v.gguf"), path)
    return path


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_arguments(small: Path, free_port: int) -> None:
    ready = serve.prepare(
        serve.Request(small, "kv3", None, 4096, 2, port=free_port, extra=("--metrics",)), None
    )
    line = " ".join(ready.arguments)
    assert "-fa on -ctk kv3 -ctv kv3 -c 4096 -np 2" in line
    assert line.endswith("--metrics")
    assert (
        ready.size.kv == est.cache_size(est.open_model(small).hparams, ("kv3", "kv3"), est.Plan(4096, 2)).kv
    )


def test_defaults_are_per_slot_and_within_the_model(small: Path, free_port: int) -> None:
    ready = serve.prepare(serve.Request(small, parallel=3, port=free_port), None)
    assert ready.plan.n_ctx == 3 * 8192
    assert ready.types == serve.DEFAULT_TYPES


def test_types_stored_in_the_model(small: Path, tmp_path: Path, free_port: int) -> None:
    """The server reads them itself: a flag would set aside what the file says per layer."""
    stored = tmp_path / "stored.gguf"
    layout = read_layout(small)
    change = cache.edit_set(layout, "turbo4", "q8_0", [cache.parse_override("1=f16/")])
    edit.write(edit.plan(layout, change), stored)
    ready = serve.prepare(serve.Request(stored, port=free_port), None)
    assert ready.names == ("mixed", "q8_0") and not {"-ctk", "-ctv"} & set(ready.arguments)
    assert ready.size.k == ready.plan.cells * 2 * (est.head_bytes("turbo4", 64) + est.head_bytes("f16", 64))
    half = serve.prepare(serve.Request(stored, type_k="kv2", port=free_port), None)
    assert half.names == ("kv2", "q8_0") and "-ctk kv2 -c" in " ".join(half.arguments)


def test_profile_named_or_none(small: Path, tmp_path: Path, free_port: int) -> None:
    """A named profile is checked and counted before the server starts; 'none' takes the one beside the model away."""
    model = tmp_path / "m.gguf"
    model.symlink_to(small)
    layout = read_layout(model)
    eye, one = np.tile(np.eye(64, dtype=np.float32), (2, 1, 1)), np.ones((2, 64), np.float32)
    profile = Profile(fingerprint(layout), "small", "llama", 2, 1, "0" * 64, "0", "0")
    profile.layers = {i: LayerProfile(eye, eye, 0 * one, one, one, one) for i in range(2)}
    write_profile(tmp_path / "m.kvprofile.gguf", profile)
    write_profile(tmp_path / "other.gguf", dataclasses.replace(profile, fingerprint="0" * 64))

    def keys(**options: str) -> int:
        return serve.prepare(serve.Request(model, "kv3", "kv3", 1024, port=free_port, **options), None).size.k  # type: ignore[arg-type]

    assert keys() == keys(profile=str(tmp_path / "m.kvprofile.gguf")) > keys(profile="none")
    code, out, err = cli(model, "--kv-profile", tmp_path / "other.gguf")
    assert (code, out, err.count("\n")) == (2, "", 1) and "was made for another model" in err
    assert cli(model, "--kv-profile", tmp_path / "missing.gguf")[0] == 2


def test_memory_advice_names_a_context_that_fits(small: Path, free_port: int) -> None:
    info = est.open_model(small)
    available = est.total_bytes(info, serve.DEFAULT_TYPES, est.Plan(1024))
    with pytest.raises(PytqError, match=r"-c (\d+) fits") as error:
        serve.prepare(serve.Request(small, port=free_port), available)
    best = int(re.search(r"-c (\d+) fits", str(error.value))[1])  # type: ignore[index]
    assert best == 1024
    with pytest.raises(PytqError, match="the weights alone"):
        serve.prepare(serve.Request(small, port=free_port), 1000)


def cli(*args: object) -> tuple[int, str, str]:
    done = CliRunner().invoke(main, ["serve", *map(str, args)])
    return done.exit_code, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["-c", "9000"], "beyond this model's limit of 8192"),
        (["-c", "0"], "context must be a positive number"),
        (["-np", "0"], "--parallel must be a positive number"),
        (["-np", "-2"], "--parallel must be a positive number"),
        (["--port", "0"], "between 1 and 65535"),
        (["--port", "70000"], "between 1 and 65535"),
        (["-ctk", "kv9"], "unknown cache type 'kv9'"),
        (["-fa", "off"], "flash attention is always on"),
        (["--host", "no.such.host.invalid"], "is unknown"),
    ],
)
def test_bad_input_is_one_line(small: Path, args: list[str], message: str) -> None:
    code, out, err = cli(small, *args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1
    assert message in err


def test_port_in_use(small: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = cli(small, "--port", taken.getsockname()[1])
    assert code == 2 and "is in use; choose another with --port" in err and err.count("\n") == 1


@pytest.fixture(scope="module")
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """Address of a served default model with two slots; started once for the tests below."""
    patched: BuildDir = request.getfixturevalue("patched")
    model: Path = request.getfixturevalue("model")
    patched.program("llama-server")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pytq", "serve", model, "-np", "2", "-c", "8192", "--port", port]
    command += ["--metrics", "--slots", "--no-webui"]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stderr is not None
        log: list[bytes] = []
        reader = threading.Thread(target=lambda: log.extend(process.stderr), daemon=True)  # type: ignore[arg-type]
        reader.start()
        address = f"http://127.0.0.1:{port}"
        try:
            _wait(address, process, log)
            yield address
        finally:
            process.terminate()
            process.wait(timeout=30)
            reader.join(timeout=5)


def _wait(address: str, process: subprocess.Popen[bytes], log: list[bytes]) -> None:
    for _ in range(600):
        if process.poll() is not None:
            raise AssertionError(b"".join(log[-20:]).decode(errors="replace"))
        try:
            if httpx.get(f"{address}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise AssertionError("the server did not become healthy in a minute")


@pytest.fixture(scope="module")
def client(server: str):
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=f"{server}/v1", api_key="none", timeout=120, max_retries=0) as found:
        yield found


def ask(client, text: str, **more: object):
    messages = [{"role": "user", "content": text}]
    return client.chat.completions.create(model="any", messages=messages, temperature=0, **more)


@pytest.mark.slow
def test_chat(client) -> None:
    reply = ask(client, "What is the capital of France? Answer in one word.", max_tokens=16)
    assert "Paris" in reply.choices[0].message.content
    assert reply.usage.completion_tokens > 0


@pytest.mark.slow
def test_streaming(client) -> None:
    """Every token arrives as it is made. Not compared with a second request: it lies in other cells of the cache, its sums are
    grouped otherwise, and quantising the next layer's keys turns the last bit of a float into another code."""
    stream = ask(
        client, "Name three colours.", max_tokens=24, stream=True, stream_options={"include_usage": True}
    )
    parts, reason, tokens = [], None, 0
    for chunk in stream:
        if chunk.choices:
            parts.append(chunk.choices[0].delta.content or "")
            reason = chunk.choices[0].finish_reason or reason
        if chunk.usage:
            tokens = chunk.usage.completion_tokens
    parts = [part for part in parts if part]
    assert "".join(parts).strip() and reason in ("length", "stop")
    assert 3 < len(parts) <= tokens <= 24


@pytest.mark.slow
def test_parallel_requests(client) -> None:
    answers: dict[int, str] = {}

    def work(i: int) -> None:
        answers[i] = ask(client, f"Count from {i} to {i + 3}.", max_tokens=16).choices[0].message.content

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    assert sorted(answers) == [0, 1, 2, 3] and all(answers.values())


@pytest.mark.slow
def test_long_prompt(client) -> None:
    """Beyond one ubatch of 512, with the answer at its start."""
    filler = " ".join(f"The {i}th tree in the garden is green." for i in range(120))
    text = f"The secret word is banana. {filler} Question: what is the secret word? Answer:"
    reply = ask(client, text, max_tokens=12)
    assert reply.usage.prompt_tokens > 1000
    assert reply.choices[0].message.content.strip()


@pytest.mark.slow
def test_too_long_prompt_is_refused(client) -> None:
    openai = pytest.importorskip("openai")
    with pytest.raises(openai.BadRequestError, match="context"):
        ask(client, "word " * 6000, max_tokens=4)


@pytest.mark.slow
def test_cancel_frees_the_slot(client, server: str) -> None:
    stream = ask(client, "Tell a very long story.", max_tokens=3000, stream=True)
    for _ in range(3):
        next(iter(stream))
    stream.close()
    for _ in range(100):
        slots = httpx.get(f"{server}/slots", timeout=10).json()
        if not any(slot["is_processing"] for slot in slots):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("the slot still works ten seconds after its client left")
    assert ask(client, "Say yes.", max_tokens=4).choices[0].message.content


@pytest.mark.slow
def test_health_metrics_slots(server: str) -> None:
    assert httpx.get(f"{server}/health").json() == {"status": "ok"}
    assert "llamacpp:prompt_tokens_total" in httpx.get(f"{server}/metrics").text
    assert len(httpx.get(f"{server}/slots").json()) == 2

"""What is checked before the patched llama-server takes over the process."""

from __future__ import annotations

import dataclasses
import errno
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pytq import estimate as est
from pytq.errors import PytqError
from pytq.gguf.layout import read_layout
from pytq.profile import load_profile

DEFAULT_TYPES = ("kv4", "kv3")
DEFAULT_CTX = 8192  # per slot, where the model allows it
# options that pytq reads itself: a second value behind its back would make the checks lie
OURS = {"-m", "--model", "-fa", "--flash-attn"}


@dataclass(frozen=True)
class Request:
    """What the user asked for; None means the default."""

    model: Path
    type_k: str | None = None
    type_v: str | None = None
    n_ctx: int | None = None
    parallel: int = 1
    unified: bool = False
    host: str = "127.0.0.1"
    port: int = 8080
    extra: tuple[str, ...] = ()
    profile: str | None = None  # a file, or "none"


@dataclass(frozen=True)
class Ready:
    """A request that passed the checks: the server's arguments and what they will take.

    ``types`` are names of flags, or ``stored``; ``names`` are for people.
    """

    arguments: tuple[str, ...]
    types: tuple[str, str]
    names: tuple[str, str]
    plan: est.Plan
    size: est.CacheSize
    needed: int


def prepare(request: Request, available: int | None) -> Ready:
    """Checks model, types, context, memory (``available`` bytes; None: not checked) and the port.

    Raises PytqError with one line saying what to change.
    """
    for option in request.extra:
        if option.partition("=")[0] in OURS:
            raise PytqError(
                f"{option} cannot be passed on: MODEL names the model, and flash attention is always on"
            )
    if not 0 < request.port < 65536:
        raise PytqError(f"--port must be between 1 and 65535, not {request.port}")
    info = _open(request)
    types = choose_types(info, request)
    est.check_pair(info, *types)
    slots = request.parallel
    if slots <= 0:
        raise PytqError(f"--parallel must be a positive number, not {slots}")
    streams = 1 if request.unified else slots
    n_ctx = (
        request.n_ctx if request.n_ctx is not None else min(DEFAULT_CTX, info.hparams.n_ctx_train) * streams
    )
    plan = est.Plan(n_ctx, slots, request.unified)
    est.check_ctx(info, plan)
    size = est.cache_size(info.hparams, est.resolve(info, types), plan)
    needed = est.total_bytes(info, types, plan)
    if available is not None and needed > available:
        raise PytqError(memory_advice(info, types, plan, needed, available))
    check_port(request.host, request.port)
    arguments = ["-m", str(request.model), "-fa", "on"]
    for flag, name in zip(("-ctk", "-ctv"), types, strict=True):
        # a flag would set aside what the model stores per layer
        arguments += [flag, name] if name != est.STORED else []
    arguments += [
        "-c",
        str(plan.n_ctx),
        "-np",
        str(slots),
        "--host",
        request.host,
        "--port",
        str(request.port),
    ]
    if request.unified:
        arguments.append("--kv-unified")
    if request.profile is not None:
        arguments += ["--kv-profile", request.profile]
    return Ready((*arguments, *request.extra), types, est.stored_names(info, types), plan, size, needed)


def _open(request: Request) -> est.ModelInfo:
    """The model with the profile that the server will use."""
    info = est.open_model(request.model)
    if request.profile is None:
        return info
    if request.profile == "none":
        return dataclasses.replace(info, profile=None)
    path = Path(request.profile)
    load_profile(path, info.layout)  # refuses a damaged one and one of another model
    return dataclasses.replace(info, profile=read_layout(path))


def choose_types(info: est.ModelInfo, request: Request) -> tuple[str, str]:
    """As ``estimate.choose`` with kv4 and kv3 of our own; PytqError where the model's heads do not allow those."""
    chosen = est.choose(info, (request.type_k, request.type_v), DEFAULT_TYPES)
    layers = info.hparams.kv_layers
    dims = ({x.head_dim_k for x in layers}, {x.head_dim_v for x in layers if x.head_dim_v})
    for flag, name, sizes in zip((request.type_k, request.type_v), chosen, dims, strict=True):
        for dim in sizes if flag is None and name in DEFAULT_TYPES else ():
            if dim not in est.pytq_types()[name]:
                raise PytqError(
                    f"head_dim {dim} has no pytq type; name a stock type, such as -ctk q8_0 -ctv q8_0 (or f16)"
                )
    return chosen


def memory_advice(
    info: est.ModelInfo, types: tuple[str, str], plan: est.Plan, needed: int, available: int
) -> str:
    """One line: what is missing, and the context or the type that would fit."""
    text = f"{est.human(needed)} are needed and {est.human(available)} are free: "
    best = est.largest_ctx(info, types, available, plan.n_seq, plan.unified)
    if best:
        return text + f"-c {best} fits with these types (--no-memory-check starts anyway)"
    if info.weights > available:
        return text + f"the weights alone take {est.human(info.weights)} (--no-memory-check starts anyway)"
    return text + "no context fits; use fewer slots (--no-memory-check starts anyway)"


def check_port(host: str, port: int) -> None:
    """PytqError when nothing can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise PytqError(f"host {host!r} is unknown: {error.strerror}") from error
    with socket.socket(family, kind, protocol) as probe:
        # as the server does: a port whose old connections linger is free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PytqError(f"port {port} on {host} is in use; choose another with --port") from error
            raise PytqError(f"cannot listen on {host}:{port}: {error.strerror}") from error


def command_line(program: Path, arguments: Sequence[str]) -> list[str]:
    """The process that replaces this one."""
    return [str(program), *arguments]

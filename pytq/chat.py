"""A chat in the terminal: turns, streaming, and the numbers of the status line."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pytq.estimate import MIB

Message = dict[str, str]


class Engine(Protocol):
    """What a chat needs of ``pytq.Llama``."""

    n_tokens: int

    def n_ctx(self) -> int: ...
    def create_chat_completion(self, **kwargs: Any) -> Any: ...
    def cache_report(self) -> dict[str, Any]: ...


@dataclass
class Status:
    """Numbers of one reply."""

    tokens: int
    seconds: float
    used: int
    n_ctx: int
    cache_bytes: int
    bits: float
    types: str

    def text(self) -> str:
        speed = self.tokens / self.seconds if self.seconds > 0 else 0.0
        filled = self.cache_bytes * self.used / self.n_ctx
        return (
            f"{speed:.1f} tokens/s | context {self.used}/{self.n_ctx} | cache {self.types}, {self.bits:.2f} bits/value,"
            f" {filled / MIB:.1f} of {self.cache_bytes / MIB:.1f} MiB"
        )


@dataclass
class Chat:
    """A conversation with a model."""

    engine: Engine
    system: str | None = None
    max_tokens: int = 1024
    temperature: float = 0.7
    messages: list[Message] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forgets the conversation, keeps the system prompt."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def turn(self, text: str, write: Callable[[str], None]) -> Status:
        """Sends ``text`` and writes the reply as it comes; Ctrl-C ends the reply, which stays in the conversation.

        Raises ValueError (from the engine) when the conversation no longer fits the context; it is then unchanged.
        """
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        started: float | None = None
        try:
            stream = self.engine.create_chat_completion(
                messages=self.messages, stream=True, max_tokens=self.max_tokens, temperature=self.temperature
            )
            for chunk in stream:
                piece = chunk["choices"][0]["delta"].get("content")
                if piece:
                    # the clock starts at the first token: before it the prompt was processed
                    started = started or time.perf_counter()
                    pieces.append(piece)
                    write(piece)
        except KeyboardInterrupt:
            write(" [stopped]")
        except ValueError:
            self.messages.pop()
            raise
        seconds = time.perf_counter() - started if started else 0.0
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        return self.status(max(0, len(pieces) - 1), seconds)

    def status(self, tokens: int = 0, seconds: float = 0.0) -> Status:
        report = self.engine.cache_report()
        types = "/".join(dict.fromkeys((report["requested"]["k"], report["requested"]["v"])))
        return Status(
            tokens,
            seconds,
            self.engine.n_tokens,
            self.engine.n_ctx(),
            report["cache_bytes"],
            report["bits_per_value"],
            types,
        )

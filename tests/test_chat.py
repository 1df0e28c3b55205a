"""The chat: turns, status line and its loop."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from pytq.chat import Chat
from pytq.cli import main


class Fake:
    """An engine that repeats the question, one word at a time."""

    def __init__(self, stop_at: int | None = None, full: bool = False) -> None:
        self.n_tokens, self.stop_at, self.full, self.seen = 100, stop_at, full, []

    def n_ctx(self) -> int:
        return 400

    def cache_report(self) -> dict[str, Any]:
        return {"cache_bytes": 4 << 20, "bits_per_value": 3.6, "requested": {"k": "kv4", "v": "kv3"}}

    def create_chat_completion(self, messages: list[dict[str, str]], **_: Any) -> Iterator[dict[str, Any]]:
        if self.full:
            raise ValueError("Requested tokens (500) exceed context window of 400")
        self.seen = [dict(m) for m in messages]
        yield {"choices": [{"delta": {"role": "assistant"}}]}
        for i, word in enumerate(messages[-1]["content"].split()):
            if i == self.stop_at:
                raise KeyboardInterrupt
            yield {"choices": [{"delta": {"content": word + " "}}]}


def test_turns_build_a_conversation() -> None:
    chat, out = Chat(Fake(), system="Be brief."), []
    chat.turn("one two", out.append)
    status = chat.turn("three four five", out.append)
    assert "".join(out) == "one two three four five "
    assert [m["role"] for m in chat.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [m["content"] for m in chat.engine.seen] == ["Be brief.", "one two", "one two ", "three four five"]  # type: ignore[attr-defined]
    assert status.tokens == 2
    chat.reset()
    assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_status_line() -> None:
    text = Chat(Fake()).status(tokens=30, seconds=2.0).text()
    assert text == "15.0 tokens/s | context 100/400 | cache kv4/kv3, 3.60 bits/value, 1.0 of 4.0 MiB"


def test_interrupt_keeps_the_partial_reply() -> None:
    chat, out = Chat(Fake(stop_at=1)), []
    chat.turn("one two three", out.append)
    assert chat.messages[-1] == {"role": "assistant", "content": "one "}
    assert out[-1] == " [stopped]"


def test_full_context_leaves_the_conversation() -> None:
    chat = Chat(Fake(full=True))
    with pytest.raises(ValueError, match="context window"):
        chat.turn("hello", lambda _: None)
    assert chat.messages == []


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    text = tmp_path / "a.gguf"
    text.write_text("words")
    for args in (
        [str(text)],
        [str(tmp_path / "none.gguf")],
        [str(text), "-t", "0"],
        [str(text), "--temp", "-1"],
    ):
        done = CliRunner().invoke(main, ["chat", *args])
        assert done.exit_code == 2 and done.stdout == ""
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


@pytest.mark.slow
def test_real_chat(model: Path, patched: object) -> None:
    """In a process of its own: the binding can load one library only."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "pytq", "chat", str(model), "--temp", "0", "-n", "16", "-c", "2048"]
    talk = "What is the capital of France?\n/status\n/nonsense\n/reset\n/exit\n"
    done = subprocess.run(command, input=talk, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "tokens/s | context" in done.stderr and "bits/value" in done.stderr
    refused = subprocess.run([*command, "-c", "9000"], input="", capture_output=True, text=True, timeout=60)
    assert refused.returncode == 2 and "beyond this model's limit" in refused.stderr
    bad = subprocess.run(command, input=b"\xff\xfe\n", capture_output=True, timeout=300)
    assert bad.returncode == 2 and b"is not UTF-8" in bad.stderr

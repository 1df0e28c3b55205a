"""The one exception of everything a user can cause or repair."""

from __future__ import annotations


class PytqError(Exception):
    """An expected failure: one line saying what is wrong and what to do.

    The command line prints it as ``error: message`` and exits with code 2.
    """

    def __init__(self, message: str) -> None:
        # one line is the contract: tool output pasted into a message must not break it
        super().__init__(" ".join(str(message).split()))

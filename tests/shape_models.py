"""Random-weight models of a few hundred kilobytes."""

from pytq.bench.shapes import small_vocab as vocab_file

__all__ = ["vocab_file"]

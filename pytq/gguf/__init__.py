"""Reading and editing GGUF files without touching the tensor data.

``layout`` finds every field and tensor of a file by offset, ``edit`` rewrites the header around untouched bytes,
``hparams`` says which layers hold a KV cache, ``cache`` and ``profile`` are the edits pytq needs.
"""

from pytq.gguf.layout import Field, Layout, TensorEntry, read_layout

__all__ = ["Field", "Layout", "TensorEntry", "read_layout"]

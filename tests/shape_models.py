"""A vocabulary small enough for random-weight models of a few hundred kilobytes."""

from __future__ import annotations

from pathlib import Path

import gguf


def vocab_file(path: Path, n: int = 300) -> Path:
    """A tokenizer without a model: enough for a random-weight model to load."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(
        ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *map(str, range(n - 259))]
    )
    writer.add_token_scores([0.0] * n)
    writer.add_token_types([2, 3, 3, *([6] * 256), *([1] * (n - 259))])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

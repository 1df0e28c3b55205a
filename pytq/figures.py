"""Writing a matplotlib figure so that the file is there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pytq.errors import PytqError


def save(figure: Any, target: Path) -> None:
    """Writes ``figure`` to ``target`` by a rename and closes it; PytqError if that cannot be done."""
    import matplotlib.pyplot as plt

    temporary = target.with_name(f".{target.name}.tmp{target.suffix or '.png'}")
    try:
        figure.savefig(temporary, dpi=130)
        os.replace(temporary, target)
    except (OSError, ValueError) as error:
        raise PytqError(f"cannot write {target}: {error}") from error
    finally:
        plt.close(figure)
        temporary.unlink(missing_ok=True)

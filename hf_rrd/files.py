"""Files that are written whole or not at all."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file under a name of its own in the same folder, which then becomes the file's.

    A failure leaves the old file as it was, and nothing beside it.

    Yields:
        The path to write to.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write a value as JSON, NumPy's numbers as plain ones; the folder is made where there is none."""
    text = json.dumps(value, indent=2, allow_nan=False, default=lambda number: number.item())
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")

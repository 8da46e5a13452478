"""Writing a file whole or not at all."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def written_whole(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path in the same folder to write to, which takes the place of `path` at the end of the block.

    A reader sees the old file or the new one, never a part. If the block raises, the old file stays and the temporary
    one is removed; an `OSError` that names no file, as that of a full disk, names `path`. A process that is killed
    leaves a hidden file whose name ends in `.tmp`. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def clear_leftovers(folder: Path, pattern: str) -> None:
    """Remove the temporary files of `written_whole` that match and that nobody has written to for an hour.

    Their process was killed. A younger one may be another's, who shares the folder and is about to be done.
    """
    for path in list(folder.glob(f"{pattern}.*.tmp")):
        with suppress(OSError):  # another process was faster
            if time.time() - path.stat().st_mtime > 3600:
                path.unlink()


def write_json(path: str | os.PathLike[str], value: Any) -> Path:
    """Write dicts, lists, texts and numbers, NumPy's among them, as JSON, whole or not at all; returns the file.

    A number that is nan or infinite is a ValueError, what has no form in JSON a TypeError.
    """
    text = json.dumps(value, indent=2, allow_nan=False, default=_as_python)
    with written_whole(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return Path(path)


def _as_python(value: Any) -> Any:
    """The Python number of a scalar of NumPy or torch."""
    if not hasattr(value, "item"):
        raise TypeError(f"JSON has no form for {type(value).__name__}: pass dicts, lists, texts or numbers.")
    return value.item()

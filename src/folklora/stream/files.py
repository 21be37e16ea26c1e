"""Files that are either whole or absent: write to a temporary name beside the target, then rename."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def write_text(path: str | Path, text: str) -> None:
    """Write a text file so that a reader sees the old content or the new, never a part.

    Args:
        path: The file to write; its folder must exist.
        text: The content, written as UTF-8.

    Raises:
        OSError: The folder is missing or read-only, or the disk is full; the old file is untouched.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Write a file beside its place; at the end of the block it takes the place, unless the block raised.

    Args:
        path: The file's place; its folder must exist.

    Yields:
        The name to write to.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON (indented, no NaN) as `write_text` does.

    Raises:
        ValueError: The value holds NaN or infinity, which JSON cannot.
        OSError: See `write_text`.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not JSON; the message names file, line and column.
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}") from error


def replace_folder(temporary: str | Path, final: str | Path) -> None:
    """Put a finished folder in its place, removing what stood there.

    Args:
        temporary: A complete folder on the same file system.
        final: Where it belongs.
    """
    final = Path(final)
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)

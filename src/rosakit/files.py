"""Files that are never seen half-written."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

__all__ = ["atomic_write", "sync"]


def atomic_write(
    path: str | os.PathLike[str], content: bytes | str | Callable[[BinaryIO], object]
) -> None:
    """Write beside, sync, rename: `path` holds the old content or all of the new.

    Args:
        path: the file; its folder must exist.
        content: bytes, text (written as UTF-8), or a function that writes into the open file.

    Raises:
        OSError: it cannot be written; what `path` held is unchanged and no temporary is left.
    """
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            if callable(content):
                content(stream)
            else:
                stream.write(content.encode() if isinstance(content, str) else content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp lets nobody else read.
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def sync(path: str | os.PathLike[str]) -> None:
    """Write a file's content, or a folder's entries, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

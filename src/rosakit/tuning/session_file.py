"""The container of a saved session: named blobs in one file, versioned and checksummed.

Layout: 8 bytes magic, uint32 version, then for each blob a uint32 length of its JSON head, the head
(``name``, ``bytes`` and whatever describes it) and the bytes; a zero length; the SHA-256 of all
before. All integers are little-endian. Blobs are written and read one after another, so neither
side ever holds the file twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from rosakit.errors import CheckpointError
from rosakit.files import atomic_write

__all__ = ["read_blobs", "write_blobs"]

MAGIC, VERSION = b"ROSASESS", 1
_LENGTH = struct.Struct("<I")
_LARGEST_HEAD = 1 << 26

Blob = tuple[dict[str, Any], bytes | memoryview]


def write_blobs(path: str | os.PathLike[str], blobs: Callable[[], Iterable[Blob]]) -> None:
    """Write a file of blobs; `path` holds the old file or all of the new one.

    Raises:
        CheckpointError: it cannot be written.
    """

    def write(stream: BinaryIO) -> None:
        digest = hashlib.sha256()

        def put(data: bytes | memoryview) -> None:
            digest.update(data)
            stream.write(data)

        put(MAGIC + _LENGTH.pack(VERSION))
        for head, data in blobs():
            described = json.dumps({**head, "bytes": len(data)}).encode()
            put(_LENGTH.pack(len(described)) + described)
            put(data)
        put(_LENGTH.pack(0))
        stream.write(digest.digest())

    try:
        atomic_write(path, write)
    except OSError as error:
        raise CheckpointError(
            f"cannot save the session to {path}: {error.strerror or error}; free some space or "
            "name another folder"
        ) from error


def read_blobs(path: str | os.PathLike[str]) -> Iterator[Blob]:
    """Blobs of a file, in order. What was read counts only once the iterator is exhausted.

    Raises:
        CheckpointError: missing, of another kind, too new, truncated or damaged.
    """
    with _opened(path) as stream:
        digest = hashlib.sha256()

        def take(count: int) -> bytes:
            data = stream.read(count)
            if len(data) != count:
                raise CheckpointError(f"the session {path} is cut off; save it again")
            digest.update(data)
            return data

        start = stream.read(len(MAGIC))
        digest.update(start)
        if start != MAGIC:
            raise CheckpointError(f"{path} is no session of rosakit")
        (version,) = _LENGTH.unpack(take(_LENGTH.size))
        if version != VERSION:
            raise CheckpointError(
                f"the session {path} has format {version}, this rosakit reads format {VERSION}; "
                "read the prompt again with this version"
            )
        while size := _LENGTH.unpack(take(_LENGTH.size))[0]:
            if size > _LARGEST_HEAD:
                raise CheckpointError(f"the session {path} is damaged; save it again")
            try:
                head = json.loads(take(size))
                count = int(head["bytes"])
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(f"the session {path} is damaged; save it again") from error
            yield head, take(count)
        if stream.read(digest.digest_size) != digest.digest():
            raise CheckpointError(
                f"the session {path} is damaged: its checksum does not fit; save it again"
            )


def _opened(path: str | os.PathLike[str]) -> BinaryIO:
    try:
        return Path(path).open("rb")
    except OSError as error:
        raise CheckpointError(f"cannot read the session {path}: {error.strerror}") from error

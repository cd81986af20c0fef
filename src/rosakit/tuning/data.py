"""Documents: text from files, folders, JSONL, parquet or a `datasets` name, and what is held out.

Everything here is deterministic: folders are read in sorted order, and a document is held out by
the hash of its text, so a copy of a held-out document is held out as well, whatever its name, the
seed or the order of the sources.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rosakit.errors import DataError
from rosakit.tuning.fields import check_fields, option

__all__ = ["DataConfig", "Document", "Documents", "read_documents", "split_documents"]

EXTENSIONS = (
    *(".txt", ".md", ".rst", ".tex", ".html", ".jsonl", ".parquet"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts"),
    *(".rb", ".sh", ".pl", ".lua", ".sql", ".r", ".jl", ".scala", ".kt", ".swift"),
)
"""File types that are read from a folder by default."""

HUB_PREFIX = "datasets:"
"""Marks a source as the name of a data set of the `datasets` library."""


class Document(NamedTuple):
    """One text with a name that tells where it came from."""

    name: str
    text: str


@dataclass
class DataConfig:
    """Which texts to train on and how to lay them out.

    Raises:
        InvalidInputError: a value out of range.
        InvalidTypeError: a value of the wrong type.
    """

    sources: tuple[str, ...] = option(
        (),
        "Texts: files, folders, .jsonl, .parquet, or datasets:NAME[:CONFIG[:SPLIT]].",
    )
    heldout: tuple[str, ...] = option(
        (), "Texts to hold out, given like the sources; empty to hold out a share of them."
    )
    heldout_share: float = option(
        0.05,
        "Share of documents held out by the hash of their text; 0 holds out nothing.",
        low=0,
        below=1,
    )
    column: str = option("text", "Column of .jsonl, .parquet and datasets that holds the text.")
    extensions: tuple[str, ...] = option(
        (), "File types read from folders, such as .py; empty for the usual text and code types."
    )
    max_documents: int | None = option(
        None, "Read at most this many documents; none for all.", low=1
    )
    streaming: bool = option(
        False,
        "Read texts while training instead of all of them first, for data larger than memory; "
        "needs steps or tokens.",
    )
    isolate: bool = option(
        True, "Keep documents that share a block apart: attention and memory stop at boundaries."
    )
    repeat: float = option(
        0.0,
        "Share of each block filled with passages copied from earlier in the same document.",
        low=0,
        below=1,
    )
    repeat_length: int = option(64, "Mean length of a copied passage in tokens.", low=2)

    def __post_init__(self) -> None:
        check_fields(self)
        self.extensions = tuple(
            e.lower() if e.startswith(".") else f".{e.lower()}" for e in self.extensions
        )


class Documents(NamedTuple):
    """The two halves of a corpus, and how many files or rows were left out (binary, empty)."""

    train: list[Document]
    heldout: list[Document]
    skipped: int


def read_documents(config: DataConfig) -> Documents:
    """Read the sources and split them.

    Raises:
        DataError: a source that is missing, empty or cannot be decoded, or no document at all.

    Warns:
        RuntimeWarning: files of a folder were left out because they are no UTF-8 text.
    """
    if not config.sources:
        raise DataError("no data: name at least one file, folder or datasets:NAME as a source")
    reader = _Reader(config)
    documents = reader.read(config.sources)
    if config.heldout:
        heldout = reader.read(config.heldout)
        known = {_digest(d) for d in heldout}
        train = [d for d in documents if _digest(d) not in known]
    else:
        train, heldout = split_documents(documents, config.heldout_share)
    reader.warn()
    if not train:
        raise DataError(
            f"every document of {', '.join(config.sources)} is held out; add data, or lower "
            "heldout_share"
        )
    return Documents(train, heldout, reader.skipped)


def stream_documents(config: DataConfig) -> Iterator[Document]:
    """The sources' documents one by one, as they are read, those held out included.

    Raises:
        DataError: a source that is missing or cannot be decoded; no document at all.
    """
    reader, count = _Reader(config), 0
    for source in config.sources:
        for document in reader.documents(source):
            yield document
            count += 1
            if config.max_documents is not None and count >= config.max_documents:
                return
    if not count:
        raise DataError(
            f"{', '.join(config.sources) or 'no source'} holds no text that could be read; give "
            "UTF-8 text, or name other file types with extensions"
        )


def is_held_out(document: Document, share: float) -> bool:
    """Whether the hash of a text falls into the held-out share."""
    return _digest(document) < int(share * 2**64)


def split_documents(
    documents: Sequence[Document], share: float
) -> tuple[list[Document], list[Document]]:
    """``(train, held out)`` by the hash of each text.

    With two different texts or more and a share above 0, at least one is held out and one is not.
    """
    if share <= 0:
        return list(documents), []
    digests = [_digest(d) for d in documents]
    bound = int(share * 2**64)
    held = {d for d in digests if d < bound}
    distinct = sorted(set(digests))
    if not held and len(distinct) > 1:
        held = {distinct[0]}
    if len(held) == len(distinct) and len(distinct) > 1:
        held.discard(distinct[-1])
    train = [d for d, digest in zip(documents, digests, strict=True) if digest not in held]
    heldout = [d for d, digest in zip(documents, digests, strict=True) if digest in held]
    return train, heldout


def _digest(document: Document) -> int:
    found = hashlib.sha256(document.text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(found[:8], "big")


class _Reader:
    """Reads sources and counts what it leaves out."""

    def __init__(self, config: DataConfig) -> None:
        self.config = config
        self.skipped = 0
        self.undecodable: list[str] = []

    def warn(self) -> None:
        """Name the files of folders that could not be read; empty ones lose nothing."""
        if self.undecodable:
            count, first = len(self.undecodable), self.undecodable[:3]
            warnings.warn(
                f"{count} {'file was' if count == 1 else 'files were'} left out, since "
                f"unreadable, binary or not UTF-8: {', '.join(first)}"
                f"{', …' if count > len(first) else ''} (convert with iconv -t utf-8)",
                RuntimeWarning,
                stacklevel=3,
            )

    def read(self, sources: Iterable[str]) -> list[Document]:
        out: list[Document] = []
        limit = self.config.max_documents
        for source in sources:
            before = len(out)
            for document in self.documents(source):
                out.append(document)
                if limit is not None and len(out) >= limit:
                    return out
            if len(out) == before:
                raise DataError(
                    f"{source} holds no text that could be read ({self.skipped} files were left "
                    "out as binary, empty or unreadable); give UTF-8 text, or name other file "
                    "types with extensions"
                )
        return out

    def documents(self, source: str) -> Iterator[Document]:
        """The documents of one source, read one after the other."""
        if source.startswith(HUB_PREFIX):
            yield from self._hub(source)
            return
        path = Path(source).expanduser()
        if path.is_dir():
            yield from self._folder(path)
        elif path.is_file():
            yield from self._file(path, source)
        else:
            raise DataError(
                f"no such file or folder: {source}. For a data set of the datasets library write "
                f"{HUB_PREFIX}{source}"
            )

    def _folder(self, folder: Path) -> Iterator[Document]:
        types = set(self.config.extensions or EXTENSIONS)
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in types and p.is_file())
        for path in paths:
            name = path.relative_to(folder).as_posix()
            if path.suffix.lower() in (".jsonl", ".parquet"):
                yield from self._file(path, name)
                continue
            try:
                text = _decode(path.read_bytes())
            except OSError:
                text = None
            if text is None:
                self.undecodable.append(str(path))
            if text is None or not text.strip():
                self.skipped += 1
                continue
            yield Document(name, text)

    def _file(self, path: Path, name: str) -> Iterator[Document]:
        kind = path.suffix.lower()
        if kind == ".jsonl":
            yield from self._jsonl(path, name)
            return
        if kind == ".parquet":
            yield from self._parquet(path, name)
            return
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        text = _decode(raw)
        if text is None:
            raise DataError(
                f"{path} is not UTF-8 text; convert it (iconv -t utf-8), or leave it out"
            )
        if not text.strip():
            raise DataError(f"{path} is empty; leave it out, or give a file with text")
        yield Document(name, text)

    def _jsonl(self, path: Path, name: str) -> Iterator[Document]:
        try:
            with path.open(encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if not line.strip():
                        continue
                    try:
                        row = json.loads(line)
                    except json.JSONDecodeError as error:
                        raise DataError(
                            f"{path} line {number} is not JSON ({error.msg}); every line must be "
                            f"one object with a {self.config.column!r} field"
                        ) from error
                    yield from self._row(row, f"{name}:{number}", f"{path} line {number}")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8; convert it (iconv -t utf-8)") from error

    def _parquet(self, path: Path, name: str) -> Iterator[Document]:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

        try:
            with parquet.ParquetFile(path) as table:
                columns = table.schema_arrow.names
                if self.config.column not in columns:
                    raise DataError(
                        f"{path} has no column {self.config.column!r}; it has "
                        f"{', '.join(columns)}: name one of them with column"
                    )
                number = 0
                for batch in table.iter_batches(columns=[self.config.column]):
                    for row in batch.to_pylist():
                        number += 1
                        yield from self._row(row, f"{name}:{number}", f"{path} row {number}")
        except (ArrowException, OSError) as error:
            raise DataError(f"{path} is no readable parquet file: {error}") from error

    def _hub(self, source: str) -> Iterator[Document]:
        import datasets

        name, _, rest = source.removeprefix(HUB_PREFIX).partition(":")
        subset, _, split = rest.partition(":")
        try:
            table = datasets.load_dataset(
                name, subset or None, split=split or "train", streaming=self.config.streaming
            )
        except Exception as error:  # `datasets` documents no common base of its errors
            raise DataError(
                f"cannot load {source}: {str(error).splitlines()[0] if str(error) else error!r}. "
                "Check the name, configuration, split and network, or give local files"
            ) from error
        for number, row in enumerate(table):
            yield from self._row(row, f"{source}:{number}", f"{source} row {number}")

    def _row(self, row: Any, name: str, where: str) -> Iterator[Document]:
        column = self.config.column
        if not isinstance(row, Mapping) or column not in row:
            keys = ", ".join(map(str, row)) if isinstance(row, Mapping) else type(row).__name__
            raise DataError(
                f"{where} has no field {column!r} (it has: {keys}); name the right one with column"
            )
        text = row[column]
        if text is None or (isinstance(text, str) and not text.strip()):
            self.skipped += 1
            return
        if not isinstance(text, str):
            raise DataError(f"{where}: {column!r} is {type(text).__name__}, expected text")
        yield Document(name, text)


def _decode(raw: bytes) -> str | None:
    """The text of a file, None if it is binary or not UTF-8."""
    if b"\0" in raw:
        return None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None

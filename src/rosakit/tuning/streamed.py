"""Blocks made while training, from documents that are read one after the other.

Items are those of `rosakit.tuning.packing.PackedBlocks`, in the order of the stream, shuffled
within a buffer of documents. They are a function of (sources, tokenizer, length, seed, index), so a
run goes on at any block; to reach it, the stream is read again up to there.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from rosakit.errors import DataError
from rosakit.tuning.data import DataConfig, Document, is_held_out, read_documents, stream_documents
from rosakit.tuning.packing import Tokens, cut_pieces, lay_out, repeat_passages, tokenize

__all__ = ["StreamedBlocks", "held_out", "sources_digest"]

BUFFER = 256
"""Documents among which the next one is drawn."""

_SCAN = 4096
"""Documents of the stream that are searched for held-out ones."""

_BATCH = 16
"""Documents tokenised at once."""


class StreamedBlocks(Dataset[dict[str, Tensor]]):
    """As many blocks as were asked for, made in the order in which they are asked for.

    Going back, or asking for a block of an earlier pass, reads the stream again from its beginning.

    Args:
        config: sources and layout.
        tokenizer: a Hugging Face tokenizer.
        length: T, tokens a block.
        count: number of items.
        seed: order within the buffer, and the copied passages.
    """

    def __init__(
        self, config: DataConfig, tokenizer: Any, length: int, *, count: int, seed: int = 0
    ) -> None:
        self.config, self.tokenizer, self.length = config, tokenizer, length
        self.count, self.seed = count, seed
        self.source_length = max(2, round(length * (1 - config.repeat)))
        self._next = 0
        self._blocks: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        if self._blocks is None or index < self._next:
            self._blocks, self._next = self._stream(), 0
        while self._next < index:
            next(self._blocks)
            self._next += 1
        block = next(self._blocks)
        self._next += 1
        if self.source_length < self.length:
            generator = np.random.default_rng([self.seed, 2, index])
            block = repeat_passages(block, self.length, self.config.repeat_length, generator)
        return lay_out(block, self.config.isolate)

    def _stream(self) -> Iterator[Any]:
        turn = 0
        while True:
            found = False
            for block in cut_pieces(self._tokens(turn), self.source_length):
                found = True
                yield block
            if not found:
                raise DataError(
                    f"the data has fewer tokens than one block of {self.source_length}; add data "
                    "or lower the length"
                )
            turn += 1

    def _tokens(self, turn: int) -> Iterator[Tokens]:
        batch: list[Document] = []
        for document in self._shuffled(turn):
            batch.append(document)
            if len(batch) == _BATCH:
                yield from tokenize(batch, self.tokenizer)
                batch = []
        if batch:
            yield from tokenize(batch, self.tokenizer)

    def _shuffled(self, turn: int) -> Iterator[Document]:
        generator = np.random.default_rng([self.seed, 3, turn])
        share = 0.0 if self.config.heldout else self.config.heldout_share
        buffer: list[Document] = []
        for document in stream_documents(self.config):
            if is_held_out(document, share):
                continue
            if len(buffer) < BUFFER:
                buffer.append(document)
                continue
            place = int(generator.integers(BUFFER))
            yield buffer[place]
            buffer[place] = document
        generator.shuffle(buffer)  # type: ignore[arg-type]
        yield from buffer


def held_out(config: DataConfig, characters: int) -> list[Document]:
    """Texts to measure on: the first ones of the stream that training leaves out.

    Args:
        config: sources; with `heldout` those, whole.
        characters: about how much text is wanted.
    """
    if config.heldout:
        values = {"sources": config.heldout, "heldout": (), "heldout_share": 0.0}
        return read_documents(DataConfig(column=config.column, **values)).train  # type: ignore[arg-type]
    found: list[Document] = []
    size = 0
    for number, document in enumerate(stream_documents(config)):
        if number >= _SCAN or size >= characters:
            break
        if is_held_out(document, config.heldout_share):
            found.append(document)
            size += len(document.text)
    return found


def sources_digest(config: DataConfig) -> str:
    """Names and sizes of the sources: what can be told of them without reading all."""
    digest = hashlib.sha256()
    for source in config.sources:
        path = Path(source).expanduser()
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            size = file.stat().st_size if file.is_file() else 0
            digest.update(f"{file}:{size};".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()

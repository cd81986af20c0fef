"""Blocks of a fixed number of tokens, packed from documents.

A document that is longer than a block is cut into whole blocks, so that distant content of one
document stays together; what is left over at the ends of documents shares blocks. Position
ids restart with every document, which keeps documents apart.

Blocks are a pure function of (documents, tokenizer, length, seed, index): training can stop at any
block and go on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from rosakit.errors import DataError
from rosakit.tuning.data import DataConfig, Document
from rosakit.tuning.layout import is_packed

__all__ = [
    "IGNORE",
    "PackedBlocks",
    "Piece",
    "collate",
    "cut_pieces",
    "lay_out",
    "repeat_passages",
    "tokenize",
]

IGNORE = -100
"""Label of positions that are not trained on: the first token of each document in a block."""

_BATCH = 32
"""Documents tokenised at once."""

Tokens = npt.NDArray[np.int32]
Block = list["Piece"]


class Piece(NamedTuple):
    """Neighbouring tokens of one document."""

    document: int
    tokens: Tokens


def tokenize(
    documents: Sequence[Document],
    tokenizer: Any,
    *,
    enough: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tokens]:
    """Token ids of each document, ended by the end-of-text token where the tokenizer has one.

    Args:
        documents: texts, in the order in which they are used.
        tokenizer: a Hugging Face tokenizer.
        enough: stop once this many tokens were made; the result is then shorter than `documents`.
        progress: called with (documents done, documents).

    Raises:
        DataError: no token at all.
    """
    end = getattr(tokenizer, "eos_token_id", None)
    out: list[Tokens] = []
    total = 0
    for begin in range(0, len(documents), _BATCH):
        texts = [d.text for d in documents[begin : begin + _BATCH]]
        for ids in tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]:
            if end is not None and (not ids or ids[-1] != end):
                ids = [*ids, end]
            out.append(np.asarray(ids, dtype=np.int32))
            total += len(ids)
        if progress is not None:
            progress(min(begin + _BATCH, len(documents)), len(documents))
        if enough is not None and total >= enough:
            break
    if total == 0:
        raise DataError("the tokenizer made no token of the texts; check the data and the model")
    return out


def cut_pieces(documents: Iterable[Tokens], length: int) -> Iterator[Block]:
    """Lay documents out in blocks of exactly `length` tokens; an incomplete last block is dropped.

    Args:
        documents: token ids of each document.
        length: tokens a block.

    Yields:
        Each block as soon as its last document was read.
    """
    shared: Block = []
    room = length
    for index, tokens in enumerate(documents):
        whole = len(tokens) // length * length
        for begin in range(0, whole, length):
            yield [Piece(index, tokens[begin : begin + length])]
        rest = tokens[whole:]
        while len(rest):
            piece, rest = rest[:room], rest[room:]
            shared.append(Piece(index, piece))
            room -= len(piece)
            if room == 0:
                yield shared
                shared, room = [], length


def repeat_passages(block: Block, length: int, mean: int, generator: np.random.Generator) -> Block:
    """Fill a block up to `length` tokens with copies of passages from earlier in each document.

    A passage is copied to a random later place of its own document, so that long-range copies
    exist at every distance.

    Args:
        block: pieces with fewer than `length` tokens together.
        length: tokens wanted.
        mean: mean length of a passage in tokens.
        generator: source of randomness.
    """
    tokens = [piece.tokens for piece in block]
    missing = length - sum(map(len, tokens))
    while missing > 0:
        sizes = np.array([len(t) for t in tokens], dtype=np.float64)
        choice = int(generator.choice(len(tokens), p=sizes / sizes.sum()))
        old = tokens[choice]
        count = min(missing, int(generator.geometric(1 / mean)), max(1, len(old) // 2))
        place = int(generator.integers(count, len(old) + 1))
        begin = int(generator.integers(0, place - count + 1))
        tokens[choice] = np.concatenate([old[:place], old[begin : begin + count], old[place:]])
        missing -= count
    return [Piece(p.document, t) for p, t in zip(block, tokens, strict=True)]


class PackedBlocks(Dataset[dict[str, Tensor]]):
    """Blocks in a seeded order, pass after pass, as many as were asked for.

    Each item holds int64 ``[T]`` tensors: `input_ids`, `labels` (-100 where a document begins)
    and `position_ids` (restarting with each document, which is how models tell them apart).

    Args:
        documents: texts.
        tokenizer: a Hugging Face tokenizer.
        length: T, tokens a block.
        config: layout options (`isolate`, `repeat`, `repeat_length`).
        seed: order of documents and blocks, and the copied passages.
        count: number of items; None for one pass over the data.
        shuffle: False keeps documents and blocks in order.
        shrink: lower the length to the tokens there are, instead of refusing too little data.
        progress: see `tokenize`.

    Attributes:
        tokens: tokens of one pass.

    Raises:
        DataError: fewer tokens than one block.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        tokenizer: Any,
        length: int,
        config: DataConfig,
        *,
        seed: int = 0,
        count: int | None = None,
        shuffle: bool = True,
        shrink: bool = False,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.length, self.config, self.seed, self.shuffle = length, config, seed, shuffle
        self.source_length = max(2, round(length * (1 - config.repeat)))
        order = np.arange(len(documents))
        if shuffle:
            np.random.default_rng([seed, 0]).shuffle(order)
        # A block's worth more than needed, since the last block may stay incomplete.
        enough = None if count is None else (count + 1) * self.source_length
        tokens = tokenize(
            [documents[int(i)] for i in order], tokenizer, enough=enough, progress=progress
        )
        total = sum(map(len, tokens))
        if shrink and 2 <= total < self.source_length:
            self.length = self.source_length = total
        self.blocks = list(cut_pieces(tokens, self.source_length))
        if not self.blocks:
            raise DataError(
                f"the data has {total} tokens, fewer than one block of {self.source_length}; add "
                "data or lower the length"
            )
        self.tokens = len(self.blocks) * self.source_length
        self.count = len(self.blocks) if count is None else count
        self._pass = -1
        self._permutation = np.arange(0)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        turn, place = divmod(index, len(self.blocks))
        block = self.blocks[self._order(turn)[place]]
        if self.source_length < self.length:
            generator = np.random.default_rng([self.seed, 2, index])
            block = repeat_passages(block, self.length, self.config.repeat_length, generator)
        return lay_out(block, self.config.isolate)

    def _order(self, turn: int) -> npt.NDArray[np.int64]:
        """Order of the blocks in one pass; kept until another pass is asked for."""
        if self._pass != turn:
            self._pass = turn
            self._permutation = np.arange(len(self.blocks))
            if self.shuffle:
                np.random.default_rng([self.seed, 1, turn]).shuffle(self._permutation)
        return self._permutation


def lay_out(block: Block, isolate: bool) -> dict[str, Tensor]:
    """The tensors of a block, see `PackedBlocks`."""
    ids = np.concatenate([p.tokens for p in block]).astype(np.int64)
    sizes = [len(p.tokens) for p in block] if isolate else [len(ids)]
    position = np.concatenate([np.arange(n) for n in sizes])
    return {
        "input_ids": torch.from_numpy(ids),
        "labels": torch.from_numpy(np.where(position == 0, IGNORE, ids)),
        "position_ids": torch.from_numpy(position),
    }


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Stack items: ``[B, T]`` of each, and whether `packed`: a document begins inside a row.

    Said here, on the CPU, so that the model need not look, which would wait for the device.
    """
    batch: dict[str, Any] = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    position = batch.get("position_ids")
    if position is not None:
        batch["packed"] = is_packed(None, position, position.shape[1])
    return batch

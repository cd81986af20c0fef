"""Streaming states of addresses that token ids decide: nothing of them is trained.

They belong to the sequence, not to a layer: one of each serves all adapters of a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rosakit import native
from rosakit.layers.graphs import outside_graphs
from rosakit.layers.history import History
from rosakit.layers.token_match import NO_KEY
from rosakit.types import NO_MATCH, Match

if TYPE_CHECKING:
    from rosakit.layers.exact import ExactMatches

Array = npt.NDArray[Any]


class RecentTokens:
    """The tokens of each row, for hash codes of contexts that reach into earlier chunks.

    Args:
        batch: number of rows.
    """

    def __init__(self, batch: int) -> None:
        self.tokens = History(batch, 1, np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.tokens.nbytes

    @outside_graphs
    def extend(self, input_ids: Tensor, mask: Tensor | None, reach: int) -> Tensor:
        """Remember a chunk ``[B, n]``; each position's last `reach` tokens.

        Returns:
            int64 ``[reach, B, n]`` on the ids' device, as `rosakit.layers.hashing.token_windows`.
        """
        stream: Array = input_ids.to("cpu", torch.int32).numpy()[:, None]
        own = self.tokens.append(stream, _host(mask))
        back = own - np.arange(reach)[:, None, None]  # [reach, B, n]
        place = np.where(back >= 0, back, 0).transpose(1, 0, 2)
        read = self.tokens.read(place.reshape(len(own), 1, -1)).reshape(place.shape)
        window = np.where(back >= 0, read.transpose(1, 0, 2).astype(np.int64) + 1, 0)
        return torch.from_numpy(window).to(input_ids.device)

    def select(self, rows: Tensor) -> None:
        """Keep rows in the given order."""
        self.tokens.select(rows)

    def truncate(self, lengths: Tensor) -> None:
        """Forget what lies past the given lengths."""
        self.tokens.truncate(lengths)


class CodeState:
    """The suffix memory of fixed hash codes.

    Args:
        exact: whose options the state follows.
        batch: number of rows.
    """

    def __init__(self, exact: ExactMatches, batch: int) -> None:
        self.memory = native.SuffixMemory(
            batch,
            exact.routes,
            bits=exact.bits,
            granularity=exact.granularity,
            successor=exact.successor,
            max_length=exact.max_length,
            min_length=exact.min_length,
        )

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.memory.nbytes)

    @outside_graphs
    def extend(self, codes: Tensor, mask: Tensor | None) -> Match:
        """Match a chunk of codes ``[B, R, n]`` and remember it; the match is in host memory."""
        stream = codes.cpu().numpy()
        found = self.memory.extend(stream, stream, mask=_host(mask))
        return Match(torch.as_tensor(found.position), torch.as_tensor(found.length))

    def select(self, rows: Tensor) -> None:
        """Keep rows in the given order."""
        self.memory = self.memory.index_select(rows.cpu())

    def truncate(self, lengths: Tensor) -> None:
        """Forget what lies past the given lengths."""
        self.memory.truncate(lengths.cpu())


class FarState:
    """The streaming form of `rosakit.layers.token_match.distant_match`: keys arrive late.

    Args:
        batch: number of rows.
        distance: tokens by which they are late.
    """

    def __init__(self, batch: int, distance: int) -> None:
        self.distance = distance
        self.memory = native.SuffixMemory(batch, 1, symbols="int32")
        self.tokens = History(batch, 1, np.int32)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return int(self.memory.nbytes) + self.tokens.nbytes

    @outside_graphs
    def extend(self, input_ids: Tensor, mask: Tensor | None) -> Match:
        """Match a chunk ``[B, n]`` and remember it: ``[B, 1, n]`` in host memory."""
        stream: Array = input_ids.to("cpu", torch.int32).numpy()[:, None]
        kept = _host(mask)
        late = self.tokens.append(stream, kept)[:, None] - self.distance
        key = np.where(late >= 0, self.tokens.read(np.where(late >= 0, late, 0)), NO_KEY)
        found = self.memory.extend(stream, key.astype(np.int32), mask=kept)
        position = torch.as_tensor(found.position)
        far = torch.where(position >= 0, position - self.distance, NO_MATCH)
        return Match(far, torch.as_tensor(found.length))

    def select(self, rows: Tensor) -> None:
        """Keep rows in the given order."""
        self.memory = self.memory.index_select(rows.cpu())
        self.tokens.select(rows)

    def truncate(self, lengths: Tensor) -> None:
        """Forget what lies past the given lengths."""
        self.memory.truncate(lengths.cpu())
        self.tokens.truncate(lengths)


def _host(mask: Tensor | None) -> Array | None:
    return None if mask is None else mask.to("cpu", torch.bool).numpy()

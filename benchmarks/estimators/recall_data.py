"""Sequences whose answers lie further back than a window sees.

`mqar` follows the description of multi-query associative recall in Arora et al., "Zoology:
Measuring and improving recall in efficient language models" (2023), section 4 and its appendix:
keys and values from two halves of the vocabulary, pairs first, then each key once more at a gap
drawn from a power law; between the questions token 0, as in the published runs, or random tokens.
Sequences are drawn anew at every step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100


@dataclass(frozen=True)
class Task:
    """One point of the sweep.

    Attributes:
        kind: "mqar", or "synonyms": a key is asked for by another of its surface forms.
        pairs: key-value pairs a sequence.
        length: T.
        vocabulary: tokens.
        power: exponent of the gaps' power law, ``p(gap) ~ gap ** (power - 1)``.
        forms: "synonyms": surface forms a key.
        random_filler: random tokens between the questions. One in about eighty questions has then
            no unique answer by content alone: its key happens to come again in between.
    """

    kind: str = "mqar"
    pairs: int = 64
    length: int = 512
    vocabulary: int = 8192
    power: float = 0.01
    forms: int = 4
    random_filler: bool = False

    def __post_init__(self) -> None:
        if self.length % 2 or 4 * self.pairs > self.length:
            raise ValueError(
                f"{self.pairs} pairs and their questions need an even length of at least "
                f"{4 * self.pairs}, got {self.length}"
            )
        if self.concepts <= self.pairs + 1:
            raise ValueError(f"{self.vocabulary} tokens are too few for {self.pairs} pairs")

    @property
    def concepts(self) -> int:
        """Different keys."""
        return self.vocabulary // 2 // (self.forms if self.kind == "synonyms" else 1)

    def sample(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens and targets, int64 ``[batch, T]``; the target of a non-question is -100."""
        device = generator.device
        half = self.vocabulary // 2

        def some(low: int, high: int) -> Tensor:  # `pairs` different numbers in every row
            chance = torch.rand(batch, high - low, device=device, generator=generator)
            return low + chance.topk(self.pairs)[1]

        # Concept 0 holds the filler's token.
        keys, values = some(1, self.concepts), some(half, self.vocabulary)
        first, again = (self._surface(keys, generator) for _ in range(2))
        context = 2 * self.pairs
        room = (self.length - context) // 2
        gaps = torch.arange(1, room + 1, device=device, dtype=torch.float64) ** (self.power - 1)
        # What torch.multinomial does without replacement, without its look at the numbers on the
        # host, which would hold up every step on a GPU.
        waiting = torch.empty(batch, room, device=device, dtype=torch.float64)
        slots = (gaps / waiting.exponential_(generator=generator)).topk(self.pairs)[1]
        asked = context + 2 * slots
        tokens = torch.randint(
            self.vocabulary if self.random_filler else 1,
            (batch, self.length),
            device=device,
            generator=generator,
        )
        tokens[:, :context] = torch.stack([first, values], -1).flatten(1)
        tokens.scatter_(1, asked, again)
        targets = torch.full_like(tokens, IGNORED).scatter_(1, asked, values)
        return tokens, targets

    def _surface(self, keys: Tensor, generator: torch.Generator) -> Tensor:
        """Tokens of the keys: one of `forms` each."""
        if self.kind == "mqar":
            return keys
        form = torch.randint(self.forms, keys.shape, device=keys.device, generator=generator)
        return keys * self.forms + form

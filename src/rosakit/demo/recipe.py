"""What the demo runs, and how much of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from rosakit.tuning import RosaConfig

__all__ = ["Recipe"]


@dataclass(frozen=True)
class Recipe:
    """Sizes and rates of the demo. The defaults fit into minutes on two CPU cores.

    Attributes:
        window, sink_tokens: of every variant but full attention, tokens.
        length: tokens of a sequence, in training and evaluation.
        code_train, code_heldout: files of the standard library.
        play_train, play_heldout: plays; 0 of both leaves them out.
        candidates: successors that compete in the token route.
        steps, batch_tokens, lr: of its optimizer.
        needle_lengths, needle_depths, needle_samples: of the needle grid.
        seed: of everything random.
    """

    window: int = 256
    sink_tokens: int = 4
    length: int = 2048
    code_train: int = 20
    code_heldout: int = 8
    play_train: int = 4
    play_heldout: int = 3
    candidates: int = 8
    steps: int = 300
    batch_tokens: int = 2048
    lr: float = 2e-2
    needle_lengths: tuple[int, ...] = (512, 1024, 2048)
    needle_depths: tuple[float, ...] = (0.1, 0.3, 0.5)
    needle_samples: int = 2
    seed: int = 0

    def attached(self, *, window: bool = True, sinks: bool = True, retrieve: bool = True) -> Any:
        """The configuration of a variant: a token route, no adapters.

        Args:
            window: False for full attention.
            sinks: False for the bare window.
            retrieve: False for the control.
        """
        return RosaConfig(
            window=self.window if window else None,
            sink_tokens=self.sink_tokens if sinks else 0,
            adapters=False,
            token_route=True,
            token_candidates=self.candidates,
            retrieve=retrieve,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

"""What one forward pass of an attached model carries down to its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from rosakit.errors import UnsupportedModelError
from rosakit.layers import RosaContext

if TYPE_CHECKING:
    from rosakit.layers.supervision import AttentionTargets
    from rosakit.tuning.recall import Recall
    from rosakit.tuning.window import AttentionPlan

CONTEXT = "rosa_context"
"""Keyword under which a forward pass hands its context to the layers."""


class ForwardContext:
    """Facts of one forward pass.

    A plain class, so that wrappers that rebuild dataclasses in keyword arguments leave it alone.

    Attributes:
        rosa: what adapters and token route read.
        plan: who sees whom in windowed attention; None without a window.
        attended: number of attention calls that used the plan.
        recall: the recalled spans; None without them.
        teacher: set in a pass with full attention and without adapters, which it watches.
        silent: set in a pass without adapters.
        recomputed: set where the backward pass runs layers again (gradient checkpointing).
    """

    def __init__(
        self,
        rosa: RosaContext,
        plan: AttentionPlan | None,
        teacher: AttentionTargets | None = None,
    ) -> None:
        self.rosa, self.plan, self.attended, self.teacher = rosa, plan, 0, teacher
        self.recall: Recall | None = None
        self.silent = teacher is not None
        self.recomputed = False


class Shared:
    """The place where an attached model's hooks find the current forward pass.

    The context travels as a keyword argument where the architecture passes keywords down, so that
    gradient checkpointing recomputes each layer with its own pass's context. Architectures that do
    not are served from here, which is right as long as nothing is recomputed later.
    """

    def __init__(self) -> None:
        self.current: ForwardContext | None = None

    def context_of(self, module: nn.Module, kwargs: dict[str, Any]) -> ForwardContext:
        """The context of the running pass.

        Raises:
            UnsupportedModelError: a pass that will be recomputed, of an architecture that passes no
                keywords down; or outside a pass of the attached model.
        """
        context = kwargs.get(CONTEXT)
        if context is None:
            context = self.current
            if context is not None and context.recomputed:
                raise UnsupportedModelError(
                    f"gradient checkpointing cannot be used here: {type(module).__name__} is "
                    "handed no keyword arguments by its layer, so recomputing it would lack what "
                    "rosakit knows of the pass. Call model.gradient_checkpointing_disable(), or "
                    "leave out gradient_checkpointing; smaller batches with accumulate need less "
                    "memory, too"
                )
        if not isinstance(context, ForwardContext):
            raise UnsupportedModelError(
                f"{type(module).__name__} ran outside a forward pass of the attached model. Call "
                "the model itself; if this came from gradient checkpointing, this architecture "
                "does not hand keyword arguments to its attention, so train it without"
            )
        return context

"""The modules that hold named adapters: one beside each attention, one at the top of the model."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from rosakit.errors import InvalidInputError
from rosakit.tuning.attachment import connect, disconnect
from rosakit.tuning.controller import RosaController

__all__ = ["RosaHub", "RosaLayer"]


class RosaLayer(nn.Module, BaseTunerLayer):
    """What named adapters have at one place of the model.

    Args:
        device: where the base model's weights are at this place.
    """

    adapter_layer_names = ("rosa_adapters",)

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.rosa_adapters = nn.ModuleDict()
        self.device = device

    def put(self, name: str, module: nn.Module) -> None:
        """Add an adapter's part."""
        self.rosa_adapters[name] = module

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # Loaded parameters keep the type that the configuration gives them.
        if adapter_name in self.rosa_adapters:
            self.rosa_adapters[adapter_name].to(device or self.device)


class RosaHub(RosaLayer):
    """The adapters' controllers, and the one of them that is connected to the model.

    peft switches, disables and deletes adapters by visiting its layers, whoever asks for it (a
    `PeftModel`, or transformers' own adapter methods); the visit here moves the hooks.

    Args:
        model: the base model (kept out of the module tree).
    """

    def __init__(self, model: Any) -> None:
        super().__init__(next(model.parameters()).device)
        self.__dict__["_base"] = model

    @property
    def connected(self) -> RosaController | None:
        """The controller that takes part in forward passes."""
        found: RosaController | None = vars(self.__dict__["_base"]).get("rosa")
        return found

    def connect(self, name: str | None) -> None:
        """Let one adapter take part in forward passes; None for the base model alone."""
        base, before = self.__dict__["_base"], self.connected
        wanted: Any = None if name is None else self.rosa_adapters[name]
        if wanted is before:
            return
        if before is not None:
            disconnect(base, before)
            del vars(base)["rosa"]
        if wanted is not None:
            # Not a submodule there: it is one here.
            vars(base)["rosa"] = wanted
            connect(base, wanted)

    def connect_active(self) -> None:
        """Let the active adapter take part, unless adapters are disabled."""
        active: Any = self.active_adapters
        known = [name for name in active if name in self.rosa_adapters]
        self.connect(known[0] if known and not self.disable_adapters else None)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise InvalidInputError(
                f"adapters {', '.join(names)} cannot be active together: each has its own window "
                "and memory; activate one of them"
            )
        super().set_adapter(names, inference_mode=inference_mode)
        self.connect_active()

    def enable_adapters(self, enabled: bool) -> None:
        super().enable_adapters(enabled)
        self.connect_active()

    def delete_adapter(self, adapter_name: str) -> None:
        if self.rosa_adapters._modules.get(adapter_name) is self.connected:
            self.connect(None)
        super().delete_adapter(adapter_name)

"""`RosaModel`: the tuner that peft wraps around a model."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, ClassVar

from accelerate import init_empty_weights
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, set_additional_trainable_modules
from torch import Tensor, nn

from rosakit.errors import CheckpointError, InvalidInputError, UnsupportedModelError
from rosakit.tuning.attach import is_attached
from rosakit.tuning.attachment import build, check_free
from rosakit.tuning.modules import attention_sites, decoder_of
from rosakit.tuning.peft.layer import RosaHub, RosaLayer

__all__ = ["RosaModel"]

_HUB = "rosas"
"""Where the model keeps the controllers; the adapters are at ``decoder_layer.rosa``."""


class RosaModel(BaseTuner):  # type: ignore[misc]
    """Windows, adapters and the token route as a peft tuner; LoRA beside them if asked for.

    Made by `peft.get_peft_model`. One adapter takes part at a time; all that are loaded live in
    the decoder layers, so that they move and shard with them.
    """

    prefix = "rosa_"
    tuner_layer_cls = (RosaLayer, LoraLayer)
    target_module_mapping: ClassVar[dict[str, list[str]]] = {}

    def inject_adapter(
        self,
        model: Any,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Build what the named configuration adds, and connect it if it is the active one.

        Raises:
            UnsupportedModelError: the attention cannot be windowed, or an option does not fit it.
            InvalidInputError: options that do not fit the model, or one that is attached already.
        """
        config = self.peft_config[adapter_name]
        hub: RosaHub | None = getattr(model, _HUB, None)
        if hub is None:
            if is_attached(model):
                raise InvalidInputError(
                    f"this {type(model).__name__} is attached already; call rosakit.detach(model) "
                    "before peft.get_peft_model"
                )
            check_free(model)
        else:
            # Building reads the model's own attention.
            hub.connect(None)
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            controller = build(model, config)
        if config.lora_rank:
            _inject_lora(model, config, adapter_name)
        first = not any(isinstance(module, RosaLayer) for module in model.modules())
        if hub is None:
            hub = RosaHub(model)
            setattr(model, _HUB, hub)
        for site in attention_sites(decoder_of(model)):
            injected = controller.injected.get(site.layer_index)
            if injected is None:
                continue
            place = site.layer._modules.get("rosa")
            if not isinstance(place, RosaLayer):
                place = RosaLayer(next(site.attention.parameters()).device)
                site.layer.rosa = place
            place.put(adapter_name, injected)
        hub.put(adapter_name, controller)
        if first:
            self._mark_only_adapters_as_trainable(model)
        if adapter_name in self.active_adapters:
            self.set_adapter(adapter_name, inference_mode=config.inference_mode)
        else:
            self.set_requires_grad(adapter_name, False)
            hub.connect_active()
        if config.modules_to_save:
            set_additional_trainable_modules(
                model=model,
                peft_config=config,
                model_config=BaseTuner.get_model_config(self),
                adapter_name=adapter_name,
                activate_adapter=adapter_name in self.active_adapters,
            )

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError("rosakit adds modules beside the model's own, it replaces none")

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # The configuration says which type our parameters have.
        if self.peft_config[adapter_name].adapter_dtype == "float32":
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)

    def _check_merge_allowed(self) -> None:
        raise UnsupportedModelError(
            "ROSA cannot be merged into the base model: it reads other positions of the sequence, "
            "which no weight of the base can do. Keep the adapter beside the model, or call "
            "unload() to get the base model back"
        )

    def merge_adapter(self, *args: Any, **kwargs: Any) -> None:
        """Refused, see `merge_and_unload`.

        Raises:
            UnsupportedModelError: always; the message says why.
        """
        self._check_merge_allowed()

    def unload(self) -> nn.Module:
        """The base model without anything that was added."""
        model: Any = self.model
        model.rosas.connect(None)
        for site in attention_sites(decoder_of(model)):
            site.layer._modules.pop("rosa", None)
        delattr(model, _HUB)
        # peft would leave the trained copies of `modules_to_save` in the base's place.
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, ModulesToSaveWrapper):
                    setattr(parent, name, child.original_module)
        found: nn.Module = super().unload()
        return found

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Ours stands in front of the parameter's own path, which peft expects behind it.
        here = f".{RosaLayer.adapter_layer_names[0]}."
        before, found, after = key.partition(f"{here}{adapter_name}.")
        if found:
            return f"{before}{here}{after}"
        other: str = super()._remove_adapter_name_from_key(key, adapter_name)
        return other

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: Any, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """peft's, but a file that does not fit is refused instead of loaded in part."""
        mapped: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=state_dict
        )
        present = model.state_dict()
        own = cls._get_adapter_state_dict(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict=present,
            unwanted_adapter_names=[],
        )
        expected = {k for k in own if f".{adapter_name}." in k or k.endswith(f".{adapter_name}")}
        faults = [
            ("missing", sorted(expected - mapped.keys())),
            ("unknown", sorted(mapped.keys() - present.keys())),
            (
                "of another shape",
                sorted(k for k in mapped if k in present and mapped[k].shape != present[k].shape),
            ),
        ]
        said = [
            f"{len(keys)} tensors {what} ({', '.join(keys[:3])}{', …' if len(keys) > 3 else ''})"
            for what, keys in faults
            if keys
        ]
        if said:
            raise CheckpointError(
                f"the weights for adapter {adapter_name!r} do not fit: {'; '.join(said)}. Load the "
                "base model and the adapter_config.json that they were saved with, or save again"
            )
        return mapped


def _inject_lora(model: Any, config: Any, adapter_name: str) -> None:
    """LoRA on the base model's linear layers, under the same adapter name."""
    before = vars(model).pop("peft_config", None)
    trainable = {
        id(p): (p, p.requires_grad)
        for module in model.modules()
        if isinstance(module, BaseTunerLayer)
        for p in module.parameters()
    }
    settings = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        target_modules="all-linear",
    )
    inject_adapter_in_model(settings, model, adapter_name)
    for parameter, flag in trainable.values():
        parameter.requires_grad_(flag)
    if before is None:
        vars(model).pop("peft_config", None)
    else:
        model.peft_config = before

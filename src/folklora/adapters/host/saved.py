"""Adapter values that come from elsewhere: checks on saved ones, and adapters made from another one's."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig
from folklora.adapters.host.layer import FolkloraLayer, updates_of
from folklora.adapters.host.shared import SHARED

_PREFIX = "base_model.model."
_PLACEMENT = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "task_type",
    "base_model_name_or_path",
    "revision",
)


def check_saved_values(model: nn.Module, adapter_name: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Refuse saved values that are incomplete, of other shapes, or made for another base model; complete the others.

    Every layer's values carry a sample of the base weight that they were made for. It must equal the sample of this
    model's weight, up to one rounding to bfloat16 or float16 (or, on a quantised layer, point the same way).

    Args:
        model: The model with the adapter's layers in place.
        adapter_name: The adapter that is being loaded.
        values: Name in the model's state → saved tensor.

    Returns:
        The values with those that the updates leave out of a file and derive again.

    Raises:
        ValueError: With every problem found, by layer.
    """
    problems: list[str] = []
    given = values
    values = {key.removeprefix(_PREFIX): value for key, value in values.items()}
    carriers = {
        path.removeprefix(_PREFIX): layer
        for path, layer in model.named_modules()
        if isinstance(layer, FolkloraLayer) and adapter_name in layer.folklora_updates
    }
    for path, layer in carriers.items():
        problems += _layer_problems(layer, adapter_name, f"{path}.folklora_updates.{adapter_name}.", values)
    problems += _shared_problems(next(iter(carriers.values()), None), adapter_name, values)
    saved = {key.partition(".folklora_updates.")[0] for key in values if ".folklora_updates." in key}
    problems += [f"  values for '{path}', which is no adapted layer here" for path in sorted(saved - set(carriers))]
    if problems:
        shown = problems[:8] + ([f"... and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise ValueError("\n".join([f"the saved adapter does not fit this model ({adapter_name}):", *shown]))
    root = _PREFIX if any(key.startswith(_PREFIX) for key in given) else ""
    derived: dict[str, Tensor] = {}
    for path, layer in carriers.items():
        # what is not saved must be made from the base weight, which may still be absent
        if layer.folklora_updates[adapter_name].unsaved and layer.stored_weight().is_meta:
            continue
        derived |= _derived(layer, adapter_name, f"{path}.folklora_updates.{adapter_name}.", values)
        layer.waiting.discard(adapter_name)
    return {**given, **{root + key: value for key, value in derived.items()}}


def _derived(layer: FolkloraLayer, adapter_name: str, prefix: str, values: dict[str, Tensor]) -> dict[str, Tensor]:
    own = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    return {prefix + key: value for key, value in layer.derive(adapter_name, own).items()}


def placement(config: AdapterConfig) -> dict[str, Any]:
    """The options that say where an adapter sits, for one that takes its place."""
    return {key: getattr(config, key) for key in _PLACEMENT}


@torch.no_grad()
def add_with_values(
    model: PeftModel, name: str, config: AdapterConfig, values: dict[str, dict[str, Tensor]], source: str
) -> None:
    """Add an adapter whose values are computed from those of another one on the same model; nothing is decomposed.

    Args:
        model: The model that carries the other one.
        name: The new adapter's name.
        config: The new adapter's options; its layers have to be the other one's.
        values: The parameters of its update on each layer, by the layer's name.
        source: The other one, whose trained modules (`modules_to_save`) are copied.
    """
    config.restoring = True
    model.add_adapter(name, config)
    for layer, update in updates_of(model, name):
        known = {**values[layer.name], "base_sample": layer.folklora_updates[source].base_sample}
        for key, parameter in update.named_parameters():
            parameter.copy_(known[key])
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and name in module.modules_to_save:
            module.modules_to_save[name].load_state_dict(module.modules_to_save[source].state_dict())


def _layer_problems(layer: FolkloraLayer, adapter_name: str, prefix: str, values: dict[str, Tensor]) -> list[str]:
    problems, where = [], f"layer '{layer.name}'"
    update = layer.folklora_updates[adapter_name]
    for key, own in update.state_dict().items():
        if key in update.unsaved:
            continue
        saved = values.get(prefix + key)
        found = _value_problems(where, key, own, saved)
        if key == "base_sample" and not found and not layer.fits_base(saved):
            found = [f"  {where}: the adapter was made for another base model's weights"]
        problems += found
    return problems


def _shared_problems(layer: FolkloraLayer | None, adapter_name: str, values: dict[str, Tensor]) -> list[str]:
    prefix = f"{SHARED}.{adapter_name}."
    saved = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
    shared = {} if layer is None or adapter_name not in layer.context.shared else layer.context.shared[adapter_name]
    where = "what its layers share"
    problems = [p for key, own in shared.items() for p in _value_problems(where, key, own, saved.get(key))]
    return problems + [f"  {where}: {key} is not known here" for key in sorted(set(saved) - set(shared))]


def _value_problems(where: str, key: str, own: Tensor, saved: Tensor | None) -> list[str]:
    if saved is None:
        return [f"  {where}: no value for {key}"]
    if saved.shape != own.shape:
        return [f"  {where}: {key} has shape {list(saved.shape)}, not {list(own.shape)}"]
    if not torch.isfinite(saved).all():
        return [f"  {where}: {key} holds values that are not finite"]
    return []

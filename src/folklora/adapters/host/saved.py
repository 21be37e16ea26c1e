"""Checks on saved adapter values before they are put into a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from folklora.adapters.host.layer import FolkloraLayer

_PREFIX = "base_model.model."


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


def _layer_problems(layer: FolkloraLayer, adapter_name: str, prefix: str, values: dict[str, Tensor]) -> list[str]:
    problems = []
    update = layer.folklora_updates[adapter_name]
    for key, parameter in update.named_parameters():
        if key in update.unsaved:
            continue
        saved = values.get(prefix + key)
        if saved is None:
            problems.append(f"  layer '{layer.name}': no value for {key}")
        elif saved.shape != parameter.shape:
            problems.append(f"  layer '{layer.name}': {key} has shape {list(saved.shape)}, not {list(parameter.shape)}")
        elif not torch.isfinite(saved).all():
            problems.append(f"  layer '{layer.name}': {key} holds values that are not finite")
        elif key == "base_sample" and not layer.fits_base(saved):
            problems.append(f"  layer '{layer.name}': the adapter was made for another base model's weights")
    return problems

"""Checks on saved adapter values before they are put into a model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from folklora.adapters.host.kinds import is_quantised
from folklora.adapters.host.layer import FolkloraLayer

# values that went through bfloat16 once differ by at most half a unit in the last of its 8 bits
_SAME = 2.0**-7
_QUANTISED_COSINE = 0.9


def check_saved_values(model: nn.Module, adapter_name: str, values: dict[str, Tensor]) -> None:
    """Refuse saved values that are incomplete, of other shapes, or made for another base model.

    Every layer's values carry a sample of the base weight that they were made for. It must equal the sample of this
    model's weight, up to one rounding to bfloat16 (or, on a quantised layer, point the same way).

    Args:
        model: The model with the adapter's layers in place.
        adapter_name: The adapter that is being loaded.
        values: Name in the model's state → saved tensor.

    Raises:
        ValueError: With every problem found, by layer.
    """
    problems: list[str] = []
    for path, layer in model.named_modules():
        if not isinstance(layer, FolkloraLayer) or adapter_name not in layer.folklora_updates:
            continue
        prefix = f"{path}.folklora_updates.{adapter_name}."
        found = _layer_problems(layer, adapter_name, prefix, values)
        problems += found
        if not found:
            layer.waiting.discard(adapter_name)
    if problems:
        shown = problems[:8] + ([f"... and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise ValueError("\n".join([f"the saved adapter does not fit this model ({adapter_name}):", *shown]))


def _layer_problems(layer: FolkloraLayer, adapter_name: str, prefix: str, values: dict[str, Tensor]) -> list[str]:
    problems = []
    for key, parameter in layer.folklora_updates[adapter_name].named_parameters():
        saved = values.get(prefix + key)
        if saved is None:
            problems.append(f"  layer '{layer.name}': no value for {key}")
        elif saved.shape != parameter.shape:
            problems.append(f"  layer '{layer.name}': {key} has shape {list(saved.shape)}, not {list(parameter.shape)}")
        elif not torch.isfinite(saved).all():
            problems.append(f"  layer '{layer.name}': {key} holds values that are not finite")
        elif key == "base_sample" and not _same_base(layer, saved):
            problems.append(f"  layer '{layer.name}': the adapter was made for another base model's weights")
    return problems


def _same_base(layer: FolkloraLayer, saved: Tensor) -> bool:
    base = layer.get_base_layer()
    if base.weight.device.type == "meta":
        return True
    own, saved = layer.sample_base().cpu(), saved.float().cpu()
    if is_quantised(base):
        return bool(F.cosine_similarity(own, saved, dim=0) > _QUANTISED_COSINE)
    return torch.allclose(own, saved, rtol=_SAME, atol=torch.finfo(torch.bfloat16).tiny)

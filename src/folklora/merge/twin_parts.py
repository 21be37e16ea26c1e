"""Where the parts of `Twins` come from: the factors of adapters, and of a checkpoint that `twin_merging` split."""

from __future__ import annotations

from pathlib import Path

from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from folklora.adapters.base import PEFT_TYPE
from folklora.adapters.host.combine import check_combination, weighted_sum
from folklora.adapters.host.kinds import evenly_spaced, kind_of, same_sample
from folklora.factored import Factors
from folklora.merge.engine.models import Architecture
from folklora.merge.engine.tasks import task_parts

_NAME = "read"


def adapter_factors(base: PreTrainedModel, folder: str | Path) -> dict[str, Factors]:
    """A saved adapter's updates by the layer's name; it is put on the base and taken off again.

    Args:
        base: The model that it belongs to.
        folder: A LoRA of PEFT's, or an adapter of Folklora's.

    Raises:
        ValueError: It changes more than linear layers' weights, or has no fixed low-rank form.
    """
    config = PeftConfig.from_pretrained(str(folder))
    if config.peft_type not in (PeftType.LORA, PEFT_TYPE):
        raise ValueError(f"{folder} is an adapter of type {config.peft_type}, and neither a LoRA nor of Folklora")
    _check_alone(config, folder)
    model = PeftModel.from_pretrained(base, str(folder), adapter_name=_NAME)
    try:
        found = _of_lora(model, folder) if config.peft_type == PeftType.LORA else _of_folklora(model, folder)
    finally:
        model.unload()
    strange = sorted(layer for layer in found if not _is_linear(base.get_submodule(layer)))
    if strange:
        raise ValueError(f"{folder} adapts '{strange[0]}', which is no linear layer")
    return found


def beyond_checkpoint(model: PreTrainedModel, folder: str | Path, tasks: int) -> list[dict[str, Factors]]:
    """For each task v_t by the layer's name, of the linear layers whose weights are not tied to others.

    Args:
        model: The checkpoint's.
        folder: What `merge_models` wrote with the method `twin-merging`.
        tasks: How many there are.

    Raises:
        ValueError: The model has other weights than the checkpoint.
    """
    architecture = Architecture.of(model)
    tied = set(architecture.tied) | set(architecture.tied.values())
    layers = {
        architecture.plain(f"{name}.weight"): name for name, module in model.named_modules() if _is_linear(module)
    }
    found: list[dict[str, Factors]] = [{} for _ in range(tasks)]
    for key, parts in task_parts(folder):
        name = layers.get(key)
        if name is None or key in tied:
            continue
        module = model.get_submodule(name)
        # the model may be held in another type than the checkpoint's
        if not same_sample(evenly_spaced(kind_of(module, name).matrix(module)), evenly_spaced(parts.base)):
            raise ValueError(f"the model is not that of {folder}: its '{name}' has other weights")
        for task, factors in enumerate(found):
            factors[name] = parts.factors(task)
    return found


def _check_alone(config: PeftConfig, folder: str | Path) -> None:
    """Refuse what is trained beside the low-rank updates; loading it would write into the base."""
    more = ["modules_to_save", "trainable_token_indices"]
    if isinstance(config, LoraConfig):
        more += ["target_parameters", "layer_replication", *(["bias"] if config.bias != "none" else [])]
    used = [name for name in more if getattr(config, name, None)]
    if used:
        raise ValueError(f"{folder} was trained with {', '.join(used)}, which is no low-rank update of linear layers")


def _of_folklora(model: PeftModel, folder: str | Path) -> dict[str, Factors]:
    check_combination(model, model.peft_config, [_NAME], [1.0], "sum", "cat")
    sums = weighted_sum(model, [_NAME], [1.0], truncated=False)
    if any(change is not None for _, _, change in sums.values()):
        raise ValueError(f"{folder} changes biases, which go with the shared model alone; train with train_bias=False")
    return {layer: Factors(A, 1.0, B) for layer, (A, B, _) in sums.items()}


def _of_lora(model: PeftModel, folder: str | Path) -> dict[str, Factors]:
    found = {}
    for name, layer in model.base_model.model.named_modules():
        if not isinstance(layer, LoraLayer) or _NAME not in layer.scaling:
            continue
        plain = _NAME in layer.lora_A and _NAME not in layer.lora_variant
        if not plain or layer.lora_A[_NAME].weight.dim() != 2 or layer.lora_bias.get(_NAME):
            raise ValueError(f"{folder}: its update of '{name}' is more than a LoRA of a linear layer's weight")
        A, B = layer.lora_A[_NAME].weight, layer.lora_B[_NAME].weight
        found[name] = Factors(A.detach().cpu().float(), float(layer.scaling[_NAME]), B.detach().cpu().float())
    return found


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer by itself; a part of torch's attention is not called."""
    return isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, NonDynamicallyQuantizableLinear)

"""Writing an adapter out as a plain LoRA that stock PEFT and other servers load."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils.save_and_load import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from folklora.adapters.base import Update
from folklora.adapters.host.kinds import ATTENTION, TRANSPOSED, is_transposed
from folklora.adapters.host.layer import FolkloraLayer, updates_of
from folklora.adapters.host.stacks import StackUpdate
from folklora.adapters.host.weights import WeightsLayer
from folklora.factored import Factors
from folklora.stream.files import replace_folder


def export_lora(
    model: nn.Module, out: str | Path, adapter_name: str = "default", dtype: torch.dtype | None = None
) -> dict[str, int]:
    """Write an adapter as a LoRA folder with the same function: scaling folded into B, so that it is 1 there.

    Args:
        model: A PEFT model that carries the adapter.
        out: The folder to write (adapter_config.json, adapter_model.safetensors); must not exist.
        adapter_name: The adapter.
        dtype: Precision of the saved factors; None keeps the adapter's own.

    Returns:
        The LoRA rank of every exported layer, by the layer's name (experts: by the parameter's).

    Raises:
        ValueError: There is no such adapter, its update depends on its input or is dense and has no LoRA form, or it
            is on a convolution that PEFT's LoRA does not compute, or on torch's attention.
        RuntimeError: The adapter waits for saved values that were never loaded.
        FileExistsError: `out` is there already.
    """
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} is there already; choose a new folder for the exported LoRA")
    pairs = list(updates_of(model, adapter_name))
    if not pairs:
        raise ValueError(f"the model carries no Folklora adapter named '{adapter_name}'")
    biased = any(update.bias_change is not None for _, update in pairs)
    _check_exportable(adapter_name, pairs, biased)
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    with torch.no_grad():
        for layer, update in pairs:
            layer.admit_loaded([adapter_name])
            named, own = _named(layer, update)
            if biased:
                rows = layer.kind.shape(layer.get_base_layer())[0]
                change = torch.zeros(rows) if update.bias_change is None else update.bias_change
                named[f"base_model.model.{layer.name}.lora_B.bias"] = change
            ranks.update(own)
            # a copy of each: layers may share a factor, and a safetensors file holds no tensor twice
            tensors |= {
                key: value.detach().to("cpu", dtype).clone(memory_format=torch.contiguous_format)
                for key, value in named.items()
            }
        tensors.update(_saved_modules(model, adapter_name))
    config = _lora_config(model, adapter_name, ranks, biased)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = Path(temporary) / out.name
        config.save_pretrained(folder)
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        replace_folder(folder, out)
    return ranks


def _check_exportable(adapter_name: str, pairs: list[tuple[FolkloraLayer, Update]], biased: bool) -> None:
    gated = next((update for _, update in pairs if update.gated), None)
    if gated is not None:
        raise ValueError(
            f"adapter '{adapter_name}' has no plain LoRA form: its update depends on {gated.depends_on} "
            f"({type(gated).__name__}), and a LoRA is the same for every input"
        )
    dense = next((update for _, update in pairs if update.is_dense), None)
    if dense is not None:
        raise ValueError(
            f"adapter '{adapter_name}' has no LoRA form of low rank: it changes weights entry by entry "
            f"({type(dense).__name__}); merge it instead (merge_and_unload)"
        )
    attention = next((layer for layer, _ in pairs if layer.kind is ATTENTION), None)
    if attention is not None:
        raise ValueError(
            f"adapter '{adapter_name}' adapts torch's attention '{attention.name}', to whose output projection PEFT's "
            "LoRA adds its update twice (huggingface/peft, pull request 3774); merge the adapter"
        )
    other = next((layer for layer, _ in pairs if layer.kind.name in ("embedding", "experts")), None)
    if biased and other is not None:
        raise ValueError(
            f"adapter '{adapter_name}' changes biases and adapts the {other.kind.name} '{other.name}', and PEFT's LoRA "
            "cannot hold both: train with train_bias=False, or leave that layer out"
        )


def at_least_one_term(factors: Factors) -> Factors:
    """The factors, or one term that is zero where there is none: PEFT has no LoRA of rank 0."""
    if factors.rank:
        return factors
    A, B = factors.A.new_zeros(1, factors.A.shape[1]), factors.B.new_zeros(factors.B.shape[0], 1)
    return Factors(A, 1.0, B)


def _named(layer: FolkloraLayer, update: Update) -> tuple[dict[str, Tensor], dict[str, int]]:
    """PEFT's tensors for a layer, and their rank by the layer's name."""
    if isinstance(layer, WeightsLayer):
        return _named_experts(layer, update)
    A, B = at_least_one_term(update.factors().compact()).to_lora()
    # PEFT divides a convolution's ranks among its groups; here every group has them all
    rank = A.shape[0] * getattr(layer.get_base_layer(), "groups", 1)
    base = layer.get_base_layer()
    prefix = f"base_model.model.{layer.name}"
    if layer.kind.name == "embedding":
        names = ("lora_embedding_A", "lora_embedding_B")
    else:
        names = ("lora_A.weight", "lora_B.weight")
    if layer.kind.name == "convolution":
        A = _kernel(layer, A)
        B = B.view(*B.shape, *([1] * (base.weight.dim() - 2)))
    return {f"{prefix}.{names[0]}": A, f"{prefix}.{names[1]}": B}, {layer.name: rank}


def _kernel(layer: nn.Module, A: Tensor) -> Tensor:
    """A as the kernel of PEFT's first convolution, which reads the channels of all groups."""
    base, rank = layer.get_base_layer(), A.shape[0]
    if set(base.dilation) != {1} or base.padding_mode != "zeros":
        raise ValueError(
            f"layer '{layer.name}' is a convolution with dilation {base.dilation} and padding mode "
            f"'{base.padding_mode}', which PEFT's LoRA does not know; merge the adapter, or leave that layer out"
        )
    groups, (channels, *size) = base.groups, base.weight.shape[1:]
    kernel = A.new_zeros(groups, rank, groups, channels, *size)
    each = torch.arange(groups)
    kernel[each, :, each] = A.view(rank, channels, *size)
    return kernel.reshape(groups * rank, groups * channels, *size)


def _named_experts(layer: WeightsLayer, update: StackUpdate) -> tuple[dict[str, Tensor], dict[str, int]]:
    """PEFT's tensors for the stacks of an experts module, and the rank of each stack by its name."""
    base, tensors, ranks = layer.get_base_layer(), {}, {}
    # PEFT wraps the module once for each parameter, the first innermost
    prefix = f"base_model.model.{layer.name}" + ".base_layer" * (len(update.names) - 1)
    for key in update.names:
        A, B = update.pair(key)
        # PEFT takes experts that are not marked otherwise for [out, in]
        if is_transposed(base) and not getattr(base, "is_transposed", False):
            A, B = B.mT, A.mT
        ranks[f"{layer.name}.{key}"] = A.shape[1]
        tensors[f"{prefix}.lora_A.weight"] = A.flatten(0, 1)
        tensors[f"{prefix}.lora_B.weight"] = B.permute(1, 2, 0).flatten(1)
        prefix = prefix.removesuffix(".base_layer")
    return tensors, ranks


def _saved_modules(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    return {
        f"base_model.model.{key.removeprefix('base_model.model.')}": value.detach().cpu().contiguous()
        for key, value in state.items()
        if ".folklora_" not in key
    }


def _lora_config(model: nn.Module, adapter_name: str, ranks: dict[str, int], biased: bool) -> LoraConfig:
    source = model.peft_config[adapter_name]
    common = max(ranks.values(), key=list(ranks.values()).count)
    # anchored patterns: PEFT matches a key against the end of a name
    others = {f"^{name}": rank for name, rank in ranks.items() if rank != common}
    layers = {layer.name for layer, _ in updates_of(model, adapter_name)}
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(layers.intersection(ranks)),
        target_parameters=sorted(set(ranks) - layers) or None,
        modules_to_save=source.modules_to_save,
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        inference_mode=True,
        lora_bias=biased,
        fan_in_fan_out=_all_transposed(model, adapter_name),
    )


def _all_transposed(model: nn.Module, adapter_name: str) -> bool:
    return all(layer.kind is TRANSPOSED for layer, _ in updates_of(model, adapter_name))

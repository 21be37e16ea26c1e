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
from folklora.adapters.host.layer import FolkloraLayer, updates_of
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
        The LoRA rank of every exported layer, by the layer's name.

    Raises:
        ValueError: There is no such adapter, or its update depends on its input and has no LoRA form.
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
            A, B = _at_least_one_term(update.factors().compact()).to_lora()
            ranks[layer.name] = A.shape[0]
            tensors.update(_named(layer, A, B, dtype))
            if biased:
                change = B.new_zeros(len(B)) if update.bias_change is None else update.bias_change
                key = f"base_model.model.{layer.name}.lora_B.bias"
                tensors[key] = change.to("cpu", dtype or change.dtype, copy=True)
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
    embedding = next((layer.name for layer, _ in pairs if layer.kind.name == "embedding"), None)
    if biased and embedding is not None:
        raise ValueError(
            f"adapter '{adapter_name}' changes biases and adapts the embedding '{embedding}', and PEFT's LoRA cannot "
            "hold both: train with train_bias=False, or leave the embedding out"
        )


def _at_least_one_term(factors: Factors) -> Factors:
    # PEFT has no LoRA of rank 0
    if factors.rank:
        return factors
    A, B = factors.A.new_zeros(1, factors.A.shape[1]), factors.B.new_zeros(factors.B.shape[0], 1)
    return Factors(A, 1.0, B)


def _named(layer: nn.Module, A: Tensor, B: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    if dtype is not None:
        A, B = A.to(dtype), B.to(dtype)
    base = layer.get_base_layer()
    prefix = f"base_model.model.{layer.name}"
    if layer.kind.name == "embedding":
        names = ("lora_embedding_A", "lora_embedding_B")
    else:
        names = ("lora_A.weight", "lora_B.weight")
    if layer.kind.name == "convolution":
        A = A.view(A.shape[0], *base.weight.shape[1:])
        B = B.view(*B.shape, *([1] * (base.weight.dim() - 2)))
    # layers may share a factor, and a safetensors file holds no tensor twice
    whole = {"memory_format": torch.contiguous_format}
    return {
        f"{prefix}.{names[0]}": A.detach().cpu().clone(**whole),
        f"{prefix}.{names[1]}": B.detach().cpu().clone(**whole),
    }


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
    return LoraConfig(
        r=common,
        lora_alpha=common,
        rank_pattern=others,
        alpha_pattern=dict(others),
        target_modules=sorted(ranks),
        modules_to_save=source.modules_to_save,
        task_type=source.task_type,
        base_model_name_or_path=source.base_model_name_or_path,
        inference_mode=True,
        lora_bias=biased,
        fan_in_fan_out=_all_transposed(model, adapter_name),
    )


def _all_transposed(model: nn.Module, adapter_name: str) -> bool:
    from folklora.adapters.host.kinds import TRANSPOSED

    return all(layer.kind is TRANSPOSED for layer, _ in updates_of(model, adapter_name))

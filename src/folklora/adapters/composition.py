"""aTLAS over any tensors of a model, norms, biases and embeddings too: a functional call with θ_0 + Σ_t λ_t τ_t."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.func import functional_call, jvp

from folklora.stream.files import replacing

_NAME = "coefficients"


class Composition(nn.Module):
    """A model whose parameters are θ_0^(b) + Σ_t λ_tb τ_t^(b) in each call; a block b is one tensor of any kind.

    Only `coefficients` Λ [T, B] (isotropic: [T, 1]) are trained. The task vectors are held as float32 tensors of their
    own, T times the size of the composed tensors; the model's are never written to, and stop asking for gradients.
    `ATLAS` does the same for the weights of layers as an adapter, with all that adapters can do; this is for what is no
    layer's weight, alone or around a model that carries an `ATLAS` adapter, whose layers it leaves to the adapter.

        model = Composition(base, {"art": load_file(...), "law": load_file(...)}, chosen=lambda name: "norm" in name)

    transformers' Trainer needs `remove_unused_columns=False` and `label_names=["labels"]`, for it cannot see what the
    model's own call takes.

    Args:
        model: The base.
        tuned: Name → a fine-tuned model's tensors by name (a state dict, or a file's); θ_t.
        isotropic: One coefficient a task vector for all blocks.
        init: Start of every coefficient; 0.3 for AdaMerging.
        chosen: Which tensors are blocks, by name; None takes all that every fine-tuned model has.

    Raises:
        ValueError: There is no task vector or no block, or shapes differ; each is named.
    """

    def __init__(
        self,
        model: nn.Module,
        tuned: Mapping[str, Mapping[str, Tensor]],
        *,
        isotropic: bool = False,
        init: float = 0.0,
        chosen: Callable[[str], bool] | None = None,
    ) -> None:
        super().__init__()
        own = {_plain(name): (name, value) for name, value in model.named_parameters() if _is_free(name)}
        found = [n for n in own if all(n in state for state in tuned.values()) and (chosen is None or chosen(n))]
        _check(tuned, {name: own[name][1] for name in found})
        for _, value in own.values():
            value.requires_grad_(False)
        self.model, self.vectors, self.blocks, self.isotropic = model, list(tuned), found, isotropic
        self._names = [own[name][0] for name in found]
        self.taus = nn.ParameterList(
            nn.Parameter(torch.stack([_delta(state[name], own[name][1]) for state in tuned.values()]), False)
            for name in found
        )
        columns = 1 if isotropic else len(found)
        device = self.taus[0].device
        self.coefficients = nn.Parameter(torch.full((len(tuned), columns), float(init), device=device))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's call with the composed parameters."""
        return functional_call(self.model, self.composed(), args, kwargs)

    def composed(self) -> dict[str, Tensor]:
        """θ_0 + Σ_t λ_t τ_t by the parameter's name in the model, in its dtype."""
        return {
            name: (value.float() + change).to(value.dtype)
            for name, (value, change) in self._values_and_changes().items()
        }

    def linearised(self, *args: Any, **kwargs: Any) -> Tensor:
        """The logits of the model's tangent at θ_0, f(x; θ_0) + J_θ f(x; θ_0) Σ_t λ_t τ_t: linear in Λ.

        Attention must be computed by operations that have a forward derivative: `attn_implementation="eager"`.
        """
        pairs = self._values_and_changes()

        def call(values: dict[str, Tensor]) -> Tensor:
            output = functional_call(self.model, values, args, kwargs)
            return output if isinstance(output, Tensor) else output.logits

        start = {name: value.detach() for name, (value, _) in pairs.items()}
        output, tangent = jvp(
            call, (start,), ({name: change.to(value.dtype) for name, (value, change) in pairs.items()},)
        )
        return output + tangent

    @torch.no_grad()
    def merged_state(self) -> dict[str, Tensor]:
        """A plain state dict with the composed tensors, under the model's own names; adapters are left out."""
        names = {_plain(name): name for name in self.model.state_dict() if ".folklora_" not in name}
        # by the parameter, not by the name: tied tensors have several
        places = {id(value): name for name, value in self.model.named_parameters()}
        whole, composed = self.model.state_dict(keep_vars=True), self.composed()
        values = {plain: composed.get(places.get(id(whole[name]), ""), whole[name]) for plain, name in names.items()}
        return {plain: value.detach().clone() for plain, value in values.items()}

    def save_coefficients(self, path: str | Path) -> None:
        """Write Λ with the names of task vectors and blocks as one safetensors file, whole or not at all."""
        metadata = {"format": "pt", "vectors": json.dumps(self.vectors), "blocks": json.dumps(self.blocks)}
        with replacing(path) as temporary:
            save_file({_NAME: self.coefficients.detach().cpu().contiguous()}, temporary, metadata=metadata)

    @torch.no_grad()
    def load_coefficients(self, path: str | Path) -> None:
        """Read what `save_coefficients` wrote.

        Raises:
            ValueError: The file is of other task vectors or blocks.
        """
        with safe_open(path, framework="pt") as file:
            metadata, values = file.metadata() or {}, file.get_tensor(_NAME)
        for what in ("vectors", "blocks"):
            saved = json.loads(metadata.get(what, "[]"))
            if saved != getattr(self, what):
                raise ValueError(
                    f"{path} has coefficients of the {what} {saved}, and here they are {getattr(self, what)}"
                )
        if values.shape != self.coefficients.shape:
            raise ValueError(f"{path} has {list(values.shape)} coefficients, not {list(self.coefficients.shape)}")
        self.coefficients.copy_(values)

    def _values_and_changes(self) -> dict[str, tuple[Tensor, Tensor]]:
        columns = self.coefficients.expand(-1, len(self.blocks)).unbind(1)
        return {
            name: (self.model.get_parameter(name), torch.tensordot(own, tau, dims=1))
            for name, own, tau in zip(self._names, columns, self.taus, strict=True)
        }


def _plain(name: str) -> str:
    """A parameter's name without what PEFT puts before it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _is_free(name: str) -> bool:
    """Whether a parameter is neither an adapter's (or trained beside it) nor one that its layer computes with."""
    return not any(part in name for part in (".folklora_", ".base_layer.", ".modules_to_save."))


def _delta(tuned: Tensor, base: Tensor) -> Tensor:
    return tuned.to(base.device, torch.float32) - base.detach().float()


def _check(tuned: Mapping[str, Mapping[str, Tensor]], blocks: Mapping[str, Tensor]) -> None:
    if not tuned or not blocks:
        raise ValueError(f"{len(tuned)} fine-tuned models have {len(blocks)} chosen tensors in common with the base")
    wrong = [
        f"  {task}: {name} is {list(state[name].shape)}, and the base's {list(value.shape)}"
        for task, state in tuned.items()
        for name, value in blocks.items()
        if state[name].shape != value.shape
    ]
    if wrong:
        raise ValueError("\n".join(["fine-tuned models of another shape than the base:", *wrong]))

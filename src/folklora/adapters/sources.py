"""Trained adapters that a method composes: read from their folders, frozen, side by side on each layer."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from peft import PeftConfig
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, zeros
from folklora.adapters.bottlenecks import ACTIVATIONS
from folklora.adapters.host.kinds import SAME, Kind, evenly_spaced, is_quantised_weight, same_sample
from folklora.adapters.task_vectors import (
    ADAPTER,
    ROOT,
    AdapterSource,
    Tensors,
    filled,
    layers_by_name,
    require_files,
    source_of,
)
from folklora.adapters.vl_adapter import VLAdapter

_MARK = ".folklora_updates."
_SAMPLE = f"{_MARK}base_sample"
_JOIN = {"down": torch.cat, "down_bias": torch.cat, "up": functools.partial(torch.cat, dim=1), "up_bias": torch.stack}


class BottleneckSource:
    """A saved `VLAdapter` of one task, in any of its forms but the Hyperformer's.

    Raises:
        ValueError: It has more than one adapter a site, or changes more than sites.
    """

    def __init__(self, name: str, tensors: Tensors, config: VLAdapter) -> None:
        self.tensors, self.config = tensors, config
        self.layers = {key.removeprefix(ROOT).partition(_MARK)[0] for key in tensors.places if _MARK in key}
        if config.form == "hyperformer" or len(config.tasks) > 1:
            raise ValueError(
                f"source '{name}' is a VLAdapter of the tasks {', '.join(config.tasks)} (form {config.form}), and a "
                "source is one adapter of one task"
            )
        if config.train_layer_norms or config.train_bias:
            raise ValueError(f"source '{name}' changed norms or biases of the base too, which are not composed")

    def problem(self, layer: str, shape: tuple[int, int], kind: Kind) -> str:
        """What speaks against it on a layer with a weight of `shape` [out, in]; nothing if empty."""
        if layer not in self.layers:
            return ""
        found = self.tensors.shape(f"{ROOT}{layer}{_MARK}up.0.bias")
        return "" if found == [shape[0]] else f"its adapter there is for {found[0]} outputs"

    def values(self, layer: str, shape: tuple[int, int]) -> dict[str, Tensor]:
        """W_d [w, out] ("down"), b_d, W_u [out, w] ("up") and b_u; of width w = 0 where it has no adapter."""
        if layer not in self.layers:
            width = shape[0]
            return {
                "down": torch.zeros(0, width), "down_bias": torch.zeros(0),
                "up": torch.zeros(width, 0), "up_bias": torch.zeros(width),
            }  # fmt: skip
        update = filled(self.config.for_module(layer).empty(shape), self.tensors, layer)
        down, up = update.adapter()
        found = {"down": down.weight, "down_bias": down.bias, "up": up.weight, "up_bias": up.bias}
        return {key: value.detach().float() for key, value in found.items()}

    def width(self, layer: str, shape: tuple[int, int]) -> int:
        """w."""
        return self.config.for_module(layer).bottleneck(shape) if layer in self.layers else 0


class FactorsSource:
    """A saved LoRA, or another adapter with factors: A [r, in] ("down") and B [out, r] ("up"), r = 0 where it has none.

    Args:
        source: The adapter.
    """

    def __init__(self, source: AdapterSource) -> None:
        self.source, self.tensors, self.layers = source, source.tensors, source.layers

    def problem(self, layer: str, shape: tuple[int, int], kind: Kind) -> str:
        """What speaks against it on a layer with a weight of `shape` [out, in]; nothing if empty."""
        return self.source.problem(layer, shape, kind)

    def values(self, layer: str, shape: tuple[int, int]) -> dict[str, Tensor]:
        """A and B, with its scale."""
        factors = self.source.factors(layer, shape)
        return {"down": factors.A, "up": factors.B}

    def width(self, layer: str, shape: tuple[int, int]) -> int:
        """r."""
        return self.source.factors(layer, shape).rank


class Sources:
    """Adapters of one base, in order; all bottlenecks with one activation, or all factors.

    Args:
        folders: Name → an adapter's folder.
        model: The base.

    Raises:
        FileNotFoundError: A folder holds no adapter; each is named.
        ValueError: One is of another kind than the others, of no kind that composes, or of another base.
    """

    def __init__(self, folders: Mapping[str, str], model: nn.Module) -> None:
        require_files(folders, "source adapters")
        self.adapters = {name: _opened(name, Path(folder)) for name, folder in folders.items()}
        bases = layers_by_name(model)
        self.kinds = {name: kind for name, (kind, _) in bases.items()}
        forms = {name: _form(adapter) for name, adapter in self.adapters.items()}
        if len(set(forms.values())) > 1:
            written = ", ".join(f"{name}: {form}" for name, form in forms.items())
            raise ValueError(f"source adapters must be of one kind, and these are {written}")
        form = next(iter(forms.values()))
        self.activation = form if form in ACTIVATIONS else None
        self._check_bases(bases)

    @property
    def linear(self) -> bool:
        """Whether they are factors, which read the layer's input; bottlenecks read its output."""
        return self.activation is None

    def layers(self) -> list[str]:
        """The layers that one of them adapts."""
        return sorted({layer for adapter in self.adapters.values() for layer in adapter.layers})

    def problems(self, layer: str, shape: tuple[int, int]) -> list[str]:
        """What speaks against them on a layer with a weight of `shape`."""
        if layer not in self.kinds:
            return [f"'{layer}' is no layer with one weight"]
        found = {name: own.problem(layer, shape, self.kinds[layer]) for name, own in self.adapters.items()}
        problems = [f"source '{name}' does not fit '{layer}' {list(shape)}: {p}" for name, p in found.items() if p]
        if not any(layer in own.layers for own in self.adapters.values()):
            problems.append(f"no source adapts layer '{layer}': leave it out of target_modules")
        return problems

    def widths(self, layer: str, shape: tuple[int, int]) -> list[int]:
        """The inner width, or rank, of each on a layer."""
        return [adapter.width(layer, shape) for adapter in self.adapters.values()]

    def values(self, layer: str, shape: tuple[int, int]) -> dict[str, Tensor]:
        """All of them side by side, and "lengths" [N], by which each is known again."""
        found = [adapter.values(layer, shape) for adapter in self.adapters.values()]
        values = {key: _JOIN[key]([own[key] for own in found]) for key in found[0]}
        squares = [sum(value.square().sum() for value in own.values()) for own in found]
        return {**values, "lengths": torch.stack(squares).sqrt()}

    def _check_bases(self, bases: dict[str, tuple[Kind, nn.Module]]) -> None:
        for layer in sorted(bases.keys() & set(self.layers())):
            (kind, base), key = bases[layer], f"{ROOT}{layer}{_SAMPLE}"
            found = {name: own.tensors.read(key) for name, own in self.adapters.items() if key in own.tensors.places}
            if not found or not kind.has_matrix or base.weight.is_meta:
                continue
            own, quantised = evenly_spaced(kind.matrix(base)), is_quantised_weight(base.weight)
            for name, sample in found.items():
                if not same_sample(own, sample, quantised):
                    raise ValueError(f"source '{name}' was made for another base model's weights (layer '{layer}')")


@dataclass
class OverSources(AdapterConfig):
    """What is told to every method that composes frozen source adapters, named by folder.

    Args:
        target_modules: As for every adapter; None takes the layers that the sources adapt.
        sources: Name → a saved adapter's folder; put in the names' order.
    """

    target_modules: list[str] | str | None = None
    sources: dict[str, str] = field(default_factory=dict)

    layer_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})
    example_sources: ClassVar[Literal["lora", "vl-adapter"]] = "vl-adapter"
    """What checks give it as sources where none are named."""
    bank: ClassVar[Sources | None] = None
    """The sources, once `fit` has found them; no option."""
    layer: ClassVar[str] = ""
    """The layer that these options are for; see `for_module`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # the order of coefficients; a saved configuration is sorted too
        self.sources = dict(sorted(self.sources.items()))
        if self.dropout or self.rank_pattern or self.alpha_pattern or self.train_bias:
            raise ValueError(
                f"{type(self).__name__} takes no dropout, rank_pattern, alpha_pattern or train_bias: its source "
                "adapters stay as they were trained"
            )

    def fit(self, model: nn.Module) -> None:
        """Find the sources, and where no target is named, the layers that they adapt.

        Raises:
            ValueError: No source is named, or they do not go together.
            FileNotFoundError: A folder holds none.
        """
        if not self.sources:
            raise ValueError(
                f'{type(self).__name__} composes trained adapters: name them, sources={{"name": "folder", ...}}'
            )
        self.bank = Sources({name: str(folder) for name, folder in self.sources.items()}, model)
        if self.target_modules is None:
            self.target_modules = self.bank.layers()

    def for_module(self, name: str) -> OverSources:
        """The options for one layer, which know its name."""
        own = copy.copy(super().for_module(name))
        own.layer = name
        return own

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """Sources that do not fit, or none at all."""
        return self.bank.problems(name, shape)


class Branches(nn.Module):
    """The frozen sources of one layer: o_t = up_t f(down_t h) + b_t, with `down` [R, ...], `up` [out, R], R = Σ_t w_t.

    Bottlenecks read h = y, the layer's output; factors read h = x, its input, with f(z) = z and no biases.

    Args:
        config: The method's options for the layer.
        shape: (out, in) of the layer.
    """

    frozen: ClassVar[frozenset[str]] = frozenset(
        f"branches.{key}" for key in ("down", "down_bias", "up", "up_bias", "lengths")
    )
    """The names of all that it holds, in an update whose part `branches` it is."""
    unsaved: ClassVar[frozenset[str]] = frozen - {"branches.lengths"}

    def __init__(self, config: OverSources, shape: tuple[int, int]) -> None:
        super().__init__()
        self.bank, self.layer, self.shape = config.bank, config.layer, shape
        self.widths = self.bank.widths(self.layer, shape)
        self.linear = self.bank.linear
        inner, read = sum(self.widths), shape[1] if self.linear else shape[0]
        self.down, self.up = (zeros(*size, requires_grad=False) for size in ((inner, read), (shape[0], inner)))
        self.down_bias = None if self.linear else zeros(inner, requires_grad=False)
        self.up_bias = None if self.linear else zeros(len(self.widths), shape[0], requires_grad=False)
        self.lengths = zeros(len(self.widths), requires_grad=False)

    def fill(self, device: torch.device) -> None:
        """Take the values from the folders."""
        for name, value in self.bank.values(self.layer, self.shape).items():
            setattr(self, name, nn.Parameter(value.to(device), requires_grad=False))

    def inner(self, x: Tensor, y: Tensor) -> Tensor:
        """f(down h + b_d) [..., R]."""
        if self.linear:
            return F.linear(x, self.down.to(x.dtype))
        return ACTIVATIONS[self.bank.activation](F.linear(y, self.down.to(y.dtype), self.down_bias.to(y.dtype)))

    def wide(self, per_source: Tensor) -> Tensor:
        """A value for each source [..., N] as one for each of its inner units [..., R]."""
        parts = per_source.split(1, dim=-1)
        return torch.cat([part.expand(*part.shape[:-1], w) for part, w in zip(parts, self.widths, strict=True)], dim=-1)

    def derive(self, saved: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """What a file leaves out, read again, by its name in the update.

        Raises:
            ValueError: They are not the adapters of the training.
        """
        values = self.bank.values(self.layer, self.shape)
        lengths, known = values.pop("lengths"), saved["branches.lengths"].detach().cpu().float()
        if not torch.allclose(lengths, known, rtol=SAME):
            raise ValueError(
                f"layer '{self.layer}': the source adapters have lengths {lengths.tolist()}, and those that were "
                f"composed {known.tolist()}: a folder in `sources` holds another adapter by now"
            )
        return {f"branches.{name}": value.to(device) for name, value in values.items()}


def _opened(name: str, path: Path) -> BottleneckSource | FactorsSource:
    if not (path / ADAPTER).is_file():
        raise ValueError(f"source '{name}' is a checkpoint, and no adapter: {path}")
    config = PeftConfig.from_pretrained(str(path))
    if isinstance(config, VLAdapter):
        return BottleneckSource(name, Tensors([path / ADAPTER]), config)
    return FactorsSource(source_of(name, path))


def _form(adapter: BottleneckSource | FactorsSource) -> str:
    return adapter.config.activation if isinstance(adapter, BottleneckSource) else "factors"

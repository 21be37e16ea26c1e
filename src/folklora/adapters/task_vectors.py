"""Task vectors on disk: what fine-tuned models changed in one base, read one layer at a time.

A source is an adapter's folder (a LoRA of PEFT, or a Folklora adapter that has factors), whose task vectors are factors
of low rank; or a checkpoint, a folder of safetensors or one such file, whose task vectors are θ_t - θ_0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update
from folklora.adapters.host.kinds import Kind, kind_of
from folklora.adapters.host.targets import bare
from folklora.factored import Factors
from folklora.stream.files import read_json

ROOT = "base_model.model."
ADAPTER, _CHECKPOINT = "adapter_model.safetensors", "model.safetensors"


class Tensors:
    """Safetensors files by the names of what is in them; only the names are held.

    Args:
        files: The files.
    """

    def __init__(self, files: list[Path]) -> None:
        self.places: dict[str, Path] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                self.places |= dict.fromkeys(opened.keys(), file)

    def read(self, name: str) -> Tensor:
        """One tensor."""
        with safe_open(self.places[name], framework="pt") as opened:
            return opened.get_tensor(name)

    def shape(self, name: str) -> list[int]:
        """Its shape, from the file's header."""
        with safe_open(self.places[name], framework="pt") as opened:
            return opened.get_slice(name).get_shape()


class Source(ABC):
    """One task's vector."""

    has_factors: bool

    @abstractmethod
    def problem(self, layer: str, shape: tuple[int, int], kind: Kind) -> str:
        """What speaks against it on a layer with a weight of `shape` [out, in]; nothing if empty."""

    @abstractmethod
    def dense(self, layer: str, weight: Tensor, kind: Kind) -> Tensor:
        """τ [out, in] of a layer, float32 or more, on the weight's device."""


class CheckpointSource(Source):
    """τ = θ_t - θ_0 with θ_t in safetensors under the names that the model has, or with a prefix more or less."""

    has_factors = False

    def __init__(self, tensors: Tensors) -> None:
        self.tensors = tensors

    def problem(self, layer: str, shape: tuple[int, int], kind: Kind) -> str:
        """A name that is not there, or another number of elements."""
        found = self._named(layer)
        if len(found) != 1:
            return f"its checkpoint holds {', '.join(found) or 'no tensor'} for '{layer}.weight'"
        stored = self.tensors.shape(found[0])
        return "" if torch.Size(stored).numel() == shape[0] * shape[1] else f"its weight there is {stored}"

    def dense(self, layer: str, weight: Tensor, kind: Kind) -> Tensor:
        """θ_t - W."""
        precise = torch.promote_types(weight.dtype, torch.float32)
        tuned = kind.from_layout(self.tensors.read(self._named(layer)[0])).to(weight.device, precise)
        return tuned - weight.to(precise)

    def _named(self, layer: str) -> list[str]:
        wanted = f"{layer}.weight"
        if wanted in self.tensors.places:
            return [wanted]
        return [n for n in self.tensors.places if wanted.endswith(f".{n}") or n.endswith(f".{wanted}")]


class AdapterSource(Source):
    """τ = B diag(s) A of a saved adapter; 0 on a layer that it does not adapt.

    Modules that were trained in full beside it (`modules_to_save`, such as a head) are no part of it.

    Raises:
        ValueError: It changes biases too, or not by factors.
    """

    has_factors = True
    mark: ClassVar[str]
    """What follows a layer's name in the file."""

    def __init__(self, tensors: Tensors, config: PeftConfig) -> None:
        self.tensors, self.config = tensors, config
        named = (name.partition(self.mark) for name in tensors.places)
        self.layers = {layer.removeprefix(ROOT) for layer, found, _ in named if found}
        others = [name for name in tensors.places if self._is_other(name)]
        if others:
            raise ValueError(
                f"the adapter changes more than weights by factors ({others[0]}): merge it into its base with "
                "merge_and_unload, save that as a checkpoint, and name the checkpoint"
            )

    @abstractmethod
    def _is_other(self, name: str) -> bool:
        """Whether a tensor is a change of something else than a weight, or no factor."""

    @abstractmethod
    def _factors(self, layer: str, shape: tuple[int, int]) -> Factors: ...

    def factors(self, layer: str, shape: tuple[int, int]) -> Factors:
        """The layer's factors, of rank 0 where the adapter has none."""
        if layer not in self.layers:
            return Factors(torch.zeros(0, shape[1]), 1.0, torch.zeros(shape[0], 0))
        with torch.no_grad():
            A, B = self._factors(layer, shape).to_lora()
        return Factors(A.float(), 1.0, B.float())

    def problem(self, layer: str, shape: tuple[int, int], kind: Kind) -> str:
        """Factors of another weight's shape."""
        if layer not in self.layers:
            return ""
        found = self.factors(layer, shape)
        own = [found.B.shape[0], found.A.shape[1]] if found.A.dim() == found.B.dim() == 2 else "no matrix"
        return "" if own == list(shape) else f"its update there is {own}"

    def dense(self, layer: str, weight: Tensor, kind: Kind) -> Tensor:
        """B diag(s) A."""
        return self.factors(layer, tuple(weight.shape)).dense().to(weight.device)


class LoRASource(AdapterSource):
    """An adapter of PEFT's own LoRA."""

    config: LoraConfig
    mark: ClassVar[str] = ".lora_A.weight"

    def _is_other(self, name: str) -> bool:
        if self.config.bias != "none" and name.endswith(".bias"):
            return True
        return ".lora_" in name and not name.endswith((".lora_A.weight", ".lora_B.weight"))

    def _factors(self, layer: str, shape: tuple[int, int]) -> Factors:
        A, B = (self.tensors.read(f"{ROOT}{layer}.lora_{side}.weight") for side in "AB")
        config, pattern = self.config, self.config.alpha_pattern
        alpha = pattern.get(get_pattern_key(pattern, layer), config.lora_alpha)
        return Factors(A, AdapterConfig.scaling(alpha, len(A), config.use_rslora), B)


class FolkloraSource(AdapterSource):
    """An adapter of Folklora whose update is made of what its layer holds."""

    config: AdapterConfig
    mark: ClassVar[str] = ".folklora_updates."

    def _is_other(self, name: str) -> bool:
        return name.endswith(".bias_change")

    def _factors(self, layer: str, shape: tuple[int, int]) -> Factors:
        update = self.config.for_module(layer).empty(shape)
        if update.gated or update.is_dense or update.unsaved or type(self.config).shared is not AdapterConfig.shared:
            raise ValueError(
                f"a {self.config.method} adapter's file does not hold its factors; write it as a LoRA with "
                "folklora.export_lora, or merge it into a checkpoint, and name that"
            )
        return filled(update, self.tensors, layer).factors()


class TaskVectors:
    """Task vectors of one base, in order.

    Args:
        folders: Name → an adapter's folder, a checkpoint's folder or a safetensors file.
        model: The base, of which the layers' layouts are read.

    Raises:
        FileNotFoundError: A folder holds neither an adapter nor a checkpoint; each is named.
        ValueError: An adapter has no factors, or more than factors.
    """

    def __init__(self, folders: Mapping[str, str], model: nn.Module) -> None:
        require_files(folders, "task vectors")
        self.sources = {name: source_of(name, Path(folder)) for name, folder in folders.items()}
        bases = layers_by_name(model)
        self.kinds = {name: kind for name, (kind, _) in bases.items()}
        self.shapes = {name: kind.shape(base) for name, (kind, base) in bases.items() if kind.has_matrix}

    @property
    def all_factors(self) -> bool:
        """Whether every task vector is held in factors."""
        return all(source.has_factors for source in self.sources.values())

    def layers(self) -> list[str]:
        """The layers that adapters change, where all are adapters."""
        return sorted({layer for source in self.sources.values() for layer in source.layers})

    def problems(self, names: Sequence[str], layer: str, shape: tuple[int, int]) -> list[str]:
        """What speaks against these task vectors on a layer with a weight of `shape`."""
        if layer not in self.kinds:
            return [f"'{layer}' is no layer with one weight, and a task vector is a change of one"]
        found = {name: self.sources[name].problem(layer, shape, self.kinds[layer]) for name in names}
        problems = [f"task vector '{name}' does not fit '{layer}' {list(shape)}: {p}" for name, p in found.items() if p]
        if not problems and self.all_factors and not any(layer in self.sources[name].layers for name in names):
            problems = [f"no task vector changes layer '{layer}': leave it out of target_modules"]
        return problems

    def ranks(self, layer: str) -> dict[str, int]:
        """The rank of each adapter's update of a layer, where all are adapters; those without one are left out."""
        changing = {name: source for name, source in self.sources.items() if layer in source.layers}
        return {name: source.factors(layer, self.shapes[layer]).rank for name, source in changing.items()}

    def factors(self, names: Sequence[str], layer: str, shape: tuple[int, int]) -> list[Factors]:
        """A layer's task vectors in factors, scales folded into B."""
        return [self.sources[name].factors(layer, shape) for name in names]

    def dense(self, names: Sequence[str], layer: str, weight: Tensor) -> Tensor:
        """A layer's task vectors [T, out, in]."""
        return torch.stack([self.sources[name].dense(layer, weight, self.kinds[layer]) for name in names])


def require_files(folders: Mapping[str, str], what: str) -> None:
    """Refuse folders that hold nothing.

    Raises:
        FileNotFoundError: A folder holds neither an adapter nor a checkpoint; each is named.
    """
    lacking = [f"  {name}: {folder}" for name, folder in folders.items() if not _files(Path(folder))]
    if lacking:
        raise FileNotFoundError("\n".join([f"no {ADAPTER} and no {_CHECKPOINT} for these {what}:", *lacking]))


def layers_by_name(model: nn.Module) -> dict[str, tuple[Kind, nn.Module]]:
    """The kind and the base layer of everything in a model that has a weight to adapt."""
    found = {}
    for name, module in model.named_modules():
        try:
            found[name] = kind_of(bare(module), name), bare(module)
        except TypeError:
            continue
    return found


def filled(update: Update, tensors: Tensors, layer: str) -> Update:
    """An empty update of a layer with the values that are saved for it, frozen."""
    for name, _ in list(update.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = tensors.read(f"{ROOT}{layer}.folklora_updates.{name}")
        setattr(update.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    return update


def adapters_of(folders: Mapping[str, str], model: nn.Module) -> TaskVectors:
    """The task vectors of adapters alone, which are all held in factors.

    Raises: what `TaskVectors` does, and
        ValueError: A folder holds a whole model.
    """
    found = TaskVectors(folders, model)
    whole = [name for name, source in found.sources.items() if not source.has_factors]
    if whole:
        raise ValueError(f"adapters are needed, and these are whole models: {', '.join(whole)}")
    return found


def _files(path: Path) -> list[Path]:
    """The safetensors files of a source; none where it is no source."""
    if path.is_file():
        return [path]
    index = path / f"{_CHECKPOINT}.index.json"
    if index.is_file():
        return [path / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    return next(([path / name] for name in (ADAPTER, _CHECKPOINT) if (path / name).is_file()), [])


def source_of(name: str, path: Path) -> Source:
    """The task vector in a folder or file.

    Raises:
        ValueError: It is an adapter without factors.
    """
    tensors = Tensors(_files(path))
    if not (path / ADAPTER).is_file():
        return CheckpointSource(tensors)
    config = PeftConfig.from_pretrained(str(path))
    if isinstance(config, AdapterConfig):
        return FolkloraSource(tensors, config)
    if not isinstance(config, LoraConfig) or config.use_dora:
        raise ValueError(
            f"task vector '{name}' is no LoRA ({path}): merge it into its base with merge_and_unload, save that as a "
            "checkpoint, and name the checkpoint"
        )
    return LoRASource(tensors, config)

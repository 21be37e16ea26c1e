"""What an adapter method is: a configuration, and the update that it puts on one weight."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import enum
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from folklora.adapters.host.feed_forward import FeedForward
from folklora.adapters.statistics import Statistics, shape_of
from folklora.factored import Factors


class _PeftType(str, enum.Enum):
    # PEFT and transformers ask a type for its `.value`
    FOLKLORA = "FOLKLORA"


PEFT_TYPE = _PeftType.FOLKLORA


class UnknownOptionError(ValueError, TypeError):
    """A configuration was given an option that it does not have; a TypeError too, as for any unknown keyword."""


class Update(nn.Module):
    """What a method adds to one weight W [out, in]; its parameters are what is trained, saved and loaded.

    A frozen part is a parameter named in `frozen`, not a buffer: data-parallel training broadcasts buffers each step.
    """

    frozen: ClassVar[frozenset[str]] = frozenset()
    """Names of the parameters that are never trained."""
    stepped: ClassVar[frozenset[str]] = frozenset()
    """Those of the frozen ones that `after_step` changes."""
    gated: ClassVar[bool] = False
    """Whether `factors` depends on the layer's input; such an update cannot be merged or exported."""
    depends_on: ClassVar[str] = "each layer's input"
    """What a gated update depends on, in words for messages."""
    reads_classes: ClassVar[bool] = False
    """Whether `factors` (or `function`) of a gated update takes one more argument, what `class_gate` makes of the
    classes of the rows, [batch, 1, ..., n]."""
    counts_passes: ClassVar[bool] = False
    """Whether the gradient of what `factors` gave adds to a count, so that none may be made in advance and left."""
    starts_at_base: bool = True
    """Whether the first step sees the base model's output; False where a method changes it by design."""
    needs_full_sequence: bool = False
    """Whether a position's update depends on other positions, so that generation cannot continue from a cache."""

    weights: int = 1
    """How many weights this module updates; more than one where the host stacks a method's updates of experts."""

    reads_past: bool = False
    """Whether a position's update depends on the positions before it."""
    past: tuple[Tensor, ...] | None = None
    """What an update that reads earlier positions keeps of a pass for one that continues from its cache, [batch, ...]
    each."""
    past_length: int = 0
    """How many positions that was."""
    before: int = 0
    """How many positions the cache of this pass holds; set by the host for gated updates."""
    shared: nn.ParameterDict | None = None
    """What all layers of the adapter have in common, by name; kept once, at the model's root, not in this module."""

    is_function: ClassVar[bool] = False
    """Whether the update has no factors and adds `function(x, y)` to the layer's output instead; such a class is
    `gated` too."""
    reads_block: ClassVar[bool] = False
    """Whether it reads the hidden states that enter the block its layer is in, `context.blocks[block_of(name)]`."""
    is_dense: ClassVar[bool] = False
    """Whether the update has no factors and gives a change of any rank, `dense(W)`, instead."""
    activation_reduction: ClassVar[str] = "mean"
    """How the `activation_penalty` of an adapter's layers become one: their "mean" or "sum"."""
    decomposes: bool = False
    """Whether each forward pass takes a matrix decomposition."""

    def placed(self, layer: Any, adapter_name: str) -> None:
        """Called once when the update is made for a layer of the host, before its values are loaded or moved.

        Args:
            layer: The `FolkloraLayer`; its `name` and `context` are set; `updates_elsewhere` gives those made before.
            adapter_name: The adapter that the update belongs to.
        """

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """What is added to W now.

        Args:
            x: The layer's input [..., in]; given only to gated updates.
            mask: [batch, positions] with 1 for real tokens, or None where it is not known; given with x.
        """
        raise NotImplementedError

    def function(self, x: Tensor, y: Tensor, mask: Tensor | None = None) -> Tensor | None:
        """What an update that `is_function` adds to the output, [..., out]; None adds nothing.

        Args:
            x: The layer's input [..., in].
            y: The base layer's own output [..., out], without any update.
            mask: [batch, positions] with 1 for real tokens, or None where it is not known.
        """
        raise NotImplementedError

    def dense(self, weight: Tensor) -> Tensor:
        """What an update that `is_dense` adds to the base weight W [out, in]; of several, the changes are added up.

        Args:
            weight: W, dequantised, float32 or more.
        """
        raise NotImplementedError

    def output(self, x: Tensor, whole: FeedForward, mask: Tensor | None = None) -> Tensor:
        """The output of a feed-forward layer, for an update of such: computed in the place of the layer's own.

        Args:
            x: The layer's input [..., d].
            whole: The frozen layer's matrices and what it computes of them.
            mask: [batch, positions] with 1 for real tokens, or None where it is not known.
        """
        raise NotImplementedError

    batched_penalty: ClassVar[bool] = False
    """Whether `penalty` is one function of the trained parameters (and of `penalty_reads`) in all layers of an adapter,
    made of operations that `torch.func.vmap` can batch: then layers of one shape are computed together."""

    def split(self, *inputs: Tensor | None) -> tuple[Factors, Factors | None]:
        """`factors` in two parts: what reads the dropped-out input, and what takes the input as it is."""
        return self.factors(*inputs), None

    unsaved: frozenset[str] = frozenset()
    """Names of frozen parameters that a saved file leaves out, because `derive` makes them again from the base."""

    def derive(self, weight: Tensor, saved: dict[str, Tensor], layer: str) -> dict[str, Tensor]:
        """The values of the `unsaved` parameters, made again.

        Args:
            weight: The base weight [out, in], dequantised, on its device.
            saved: The update's saved values by parameter name.
            layer: The layer's name, for messages.
        """
        return {}

    penalty_reads: ClassVar[frozenset[str]] = frozenset()
    """Names of the frozen parameters that `penalty` reads, where `batched_penalty` is set."""

    corrects_base: ClassVar[bool] = False
    """Whether the fixed part of `split` takes something out of the base itself, the same for every adapter of the
    method up to its rank. Of several such adapters active at once, only the correction of the highest rank counts."""

    def penalty(self) -> Tensor | None:
        """The method's regulariser of these parameters, a scalar; None where it has none."""
        return None

    def activation_penalty(self) -> Tensor | None:
        """The method's regulariser of what it computed in the last forward pass; None where it has none."""
        return None

    def after_step(self) -> None:
        """What the method does to its parameters after each optimizer step (under no_grad)."""

    def frozen_parameters(self) -> frozenset[str]:
        """Names of the parameters, own and shared, that are not trained at present."""
        return self.frozen

    def share(self, parameters: nn.ParameterDict) -> None:
        """Take what all layers of the adapter have in common; called by the host."""
        # nn.Module would register it here as well, and it would be counted, moved and saved once a layer
        object.__setattr__(self, "shared", parameters)

    def common(self, name: str) -> Tensor:
        """A shared parameter on this layer's device; read at each use, since FSDP puts another tensor in its place."""
        return self.shared[name].to(self.base_sample.device)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Own and shared parameters: whoever trains, freezes or holds this update does so with what it shares.

        Frozen whole numbers (indices, masks) are left out: PEFT asks everything here for gradients.
        """
        yield from (parameter for parameter in super().parameters(recurse) if parameter.is_floating_point())
        if self.shared is not None:
            yield from self.shared.values()


@dataclass
class AdapterConfig(PeftConfig):
    """What every adapter method can be told; a `peft.PeftConfig`, so `peft.get_peft_model` takes it.

    Args:
        method: The method's name; chooses the class when a saved configuration is read.
        target_modules: Names or name endings of the layers to adapt, a regular expression, or "all-linear";
            None takes PEFT's choice for the architecture (query and value projections for most).
        target_parameters: Names or name endings of weights to adapt, such as "experts.down_proj" of
            mixture-of-experts weights in three dimensions, or "q_proj.weight". An experts module named in
            `target_modules` has all of its weights adapted, unless this names some of them.
        exclude_modules: Layers that are left alone though `target_modules` names them.
        layers_to_transform: Indices of the blocks to adapt; None takes all.
        layers_pattern: Name of the list of blocks, where `layers_to_transform` is given and PEFT does not know it.
        modules_to_save: Modules trained in full and saved beside the adapter, such as a classification head.
        train_bias: Also train the bias of adapted layers that have one, as a change that the adapter holds, from 0.
        dropout: Probability of dropping an element of the adapter's input while training.
        rank_pattern: Rank for layers whose name matches a key; the others have the method's own.
        alpha_pattern: Alpha for layers whose name matches a key.
    """

    method: str = ""
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    train_bias: bool = False
    dropout: float = 0.0
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    paper: ClassVar[str] = ""
    trains: ClassVar[str] = ""
    layer_kinds: ClassVar[frozenset[str]] = frozenset({"linear", "embedding", "convolution"})
    penalty_reduction: ClassVar[str] = "sum"
    needs: ClassVar[frozenset[str]] = frozenset()
    """Kinds of statistics ("covariance", "gradient", "fisher") that `update` is given of its layer."""
    statistics: ClassVar[Statistics | None] = None
    """What `calibrated` was given; no option, so it is never saved with them."""

    def __new__(cls, *args: Any, **kwargs: Any) -> AdapterConfig:
        """Choose the class by `method` when called as `AdapterConfig(...)`; refuse options that it does not know."""
        chosen = cls
        if cls is AdapterConfig:
            from folklora.methods import adapter_class

            if "method" not in kwargs:
                raise ValueError("the configuration names no method: AdapterConfig(method=...) chooses one")
            chosen = adapter_class(kwargs["method"])
        refuse_unknown(chosen, kwargs)
        return object.__new__(chosen)

    def __post_init__(self) -> None:
        super().__post_init__()
        # a saved configuration alone gives the type, in plain text; a model built from it gets empty updates that
        # wait for their saved values, so that nothing is decomposed again
        self.restoring = self.peft_type is not None and not isinstance(self.peft_type, _PeftType)
        self.peft_type = PEFT_TYPE
        expected = type(self).__dataclass_fields__["method"].default
        if self.method != expected:
            raise ValueError(f"{type(self).__name__} is the method '{expected}', not '{self.method}'")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {self.dropout}")
        # sets do not survive JSON in a stable order
        for name in ("target_modules", "target_parameters", "exclude_modules"):
            if isinstance(getattr(self, name), (set, tuple)):
                setattr(self, name, sorted(getattr(self, name)))

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, as they are saved."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    def for_module(self, name: str) -> AdapterConfig:
        """The options for one layer, with `rank_pattern` and `alpha_pattern` applied to its name."""
        changes: dict[str, Any] = {}
        for option, pattern in (("r", self.rank_pattern), ("alpha", self.alpha_pattern)):
            key = get_pattern_key(pattern, name)
            if key in pattern:
                changes[option] = pattern[key]
        return self.changed(**changes) if changes else self

    def fit(self, model: nn.Module) -> None:
        """Fill in options that depend on the model; called once, before any layer is chosen."""

    def chosen_rank(self, weight: Tensor) -> int | None:
        """The rank that the method reads from the base weight [out, in]; None where the options give it.

        The host asks before `update` and writes the answer into `rank_pattern`, which is saved.
        """
        return None

    def changed(self, **options: Any) -> AdapterConfig:
        """A copy with some options changed, and with the statistics that this one carries."""
        return dataclasses.replace(self, **options).calibrated(self.statistics)

    def calibrated(self, statistics: Statistics | None) -> AdapterConfig:
        """A copy that carries statistics of the base model's layers, for a method that `needs` them.

        They are read when the adapter is put on the model, and dropped with that; a saved adapter needs none.

        Args:
            statistics: What `folklora.calibrate` found, or `Statistics.load` read.
        """
        twin = copy.copy(self)
        twin.statistics = statistics
        return twin

    def update(self, weight: Tensor, stats: Mapping[str, Tensor] | None = None) -> Update:
        """A new update for the base weight [out, in], dequantised, on its device.

        Args:
            weight: The base weight.
            stats: Given only to a method that `needs` any: the layer's, by kind, on the weight's device.
        """
        raise NotImplementedError

    def empty(self, shape: tuple[int, int]) -> Update:
        """An update of the same shapes with no decomposition done, to be filled with saved values."""
        raise NotImplementedError

    def class_gate(self, labels: Tensor) -> Tensor | None:
        """What the classes of a batch's rows, [rows] or as weights [rows, classes], mean to this method's updates.

        Returns:
            [rows, n], handed to `factors` of the updates; None if the method reads no classes.

        Raises:
            ValueError: A class that the adapter does not know.
        """
        return None

    def shared(self, layers: dict[str, tuple[int, int]], like: Tensor) -> dict[str, nn.Parameter]:
        """New parameters that all layers of one adapter have in common, by name; most methods have none.

        The host keeps them once in the model and once in a saved file, and gives them to `Update.share`. Those that
        are never trained are named by `Update.frozen_parameters`.

        Args:
            layers: Name and (out, in) of every layer that the adapter takes.
            like: An empty tensor with the dtype and the device of the base's weights.
        """
        return {}

    def shared_count(self, layers: dict[str, tuple[int, int]]) -> int:
        """How many parameters are trained that `layers` (name → (out, in)) have in common."""
        return 0

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """What speaks against these options on the layer `name` with a weight of `shape`; nothing if empty."""
        limit = min(shape)
        if self.r > limit:
            return [f"rank {self.r} is above {limit}, the largest for layer '{name}' with weight {list(shape)}"]
        return []

    def check_statistics(self, stats: Mapping[str, Tensor], shape: tuple[int, int], name: str) -> list[str]:
        """What speaks against these statistics of the layer `name` with a weight of `shape`; nothing if empty."""
        problems = []
        for kind in sorted(self.needs):
            expected = shape_of(kind, shape)
            if kind not in stats:
                problems.append(f"{self.method} needs the {kind} of layer '{name}', and the statistics have none")
            elif stats[kind].shape != expected:
                found = list(stats[kind].shape)
                problems.append(f"the {kind} of layer '{name}' has shape {found}, not {list(expected)}")
        return problems

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """How many parameters are trained on a weight of `shape` (out, in), its bias not counted."""
        raise NotImplementedError

    @staticmethod
    def scaling(alpha: float, r: int, rslora: bool = False) -> float:
        """α / r, or α / √r with rsLoRA (Kalajdzievski 2023, arXiv 2312.03732)."""
        return alpha / (math.sqrt(r) if rslora else r)

    @staticmethod
    def check_rank(r: int) -> None:
        """Refuse a rank that is not a positive whole number."""
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"the rank r must be a whole number of at least 1, not {r!r}")


def kaiming_uniform(r: int, columns: int, like: Tensor | None = None) -> nn.Parameter:
    """A [r, columns] ~ U(-1/√columns, 1/√columns), LoRA's start for A (Kaiming uniform with a = √5), float32."""
    device = None if like is None else like.device
    return nn.Parameter(nn.init.kaiming_uniform_(torch.empty(r, columns, device=device), a=math.sqrt(5)))


def zeros(*shape: int, like: Tensor | None = None, requires_grad: bool = True) -> nn.Parameter:
    """A float32 parameter of zeros on the device of `like`."""
    device = None if like is None else like.device
    return nn.Parameter(torch.zeros(*shape, device=device), requires_grad=requires_grad)


def refuse_unknown(cls: type, given: Iterable[str]) -> None:
    """Raise an UnknownOptionError that names the options that `cls` does not know, if there are any."""
    known = {f.name for f in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    lines = []
    for name in sorted(set(given) - known):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        lines.append(f"{cls.__name__} has no option '{name}'{hint}")
    if lines:
        raise UnknownOptionError("\n".join([*lines, f"Its options: {', '.join(sorted(known))}"]))

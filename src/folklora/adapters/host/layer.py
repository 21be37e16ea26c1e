"""The layer that carries every update: several at once, in one pass over one set of concatenated factors."""

from __future__ import annotations

import itertools
import math
import weakref
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, zeros
from folklora.adapters.host.call import CallContext
from folklora.adapters.host.dense import forward_with_dense
from folklora.adapters.host.kinds import evenly_spaced, is_quantised_weight, kind_of, same_sample
from folklora.adapters.host.merge import merge, unmerge, with_added
from folklora.adapters.host.siblings import Offer, offered, share
from folklora.factored import Factors, concatenate

# by order of creation, so that all processes gather sharded parameters in one order
LIVE_LAYERS: weakref.WeakValueDictionary[int, FolkloraLayer] = weakref.WeakValueDictionary()
_serial = itertools.count()


class FolkloraLayer(nn.Module, BaseTunerLayer):
    """A base layer and the updates that are written over it; the base's parameters are never changed.

    Args:
        base_layer: A linear, `Conv1D`, embedding or convolution layer.
        name: Its name in the model, for messages.
        context: Shared by the layers of the model.
    """

    adapter_layer_names = ("folklora_updates",)
    other_param_names = ()

    def __init__(self, base_layer: nn.Module, name: str, context: CallContext) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name, self.context = name, context
        self.kind = kind_of(base_layer, name)
        if self.kind.has_matrix:
            self.out_features, self.in_features = self.kind.shape(base_layer)
        self.folklora_updates = nn.ModuleDict()
        self.dropouts: dict[str, float] = {}
        self.reductions: dict[str, str] = {}
        self.waiting: set[str] = set()
        self.asked_at_steps: dict[str, None] = {}
        self.merged_adapters: list[str] = []
        self.unmerged: dict[str, nn.Parameter] = {}
        self.siblings: list[FolkloraLayer] = []
        self.offer: Offer | None = None
        LIVE_LAYERS[next(_serial)] = self

    def __getstate__(self) -> dict[str, Any]:
        # what a sibling offered hangs on its pass's graph
        return {**self.__dict__, "offer": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        LIVE_LAYERS[next(_serial)] = self

    def add(self, adapter_name: str, config: AdapterConfig, *, waiting: bool, trainable: bool) -> None:
        """Put a new update of the method `config` on this layer.

        Args:
            adapter_name: The adapter that it belongs to.
            config: The method's options for this layer, with the statistics that it needs.
            waiting: Make it without values: saved ones will be loaded.
            trainable: Whether its parameters ask for gradients.
        """
        update = self._new_update(config, waiting)
        if waiting:
            self.waiting.add(adapter_name)
        update.placed(self, adapter_name)
        sample = self.sample_base()
        bias = getattr(self.get_base_layer(), "bias", None) if config.train_bias else None
        update.register_parameter("bias_change", None if bias is None else zeros(*bias.shape, like=bias))
        update.base_sample = nn.Parameter(sample.fill_(math.nan) if waiting else sample, requires_grad=False)
        if adapter_name in self.context.shared:
            update.share(self.context.shared[adapter_name])
        for parameter in update.parameters():
            # FSDP2 shards only what lies in one piece, and a transposed factor does not
            parameter.data = parameter.data.contiguous()
        self.folklora_updates[adapter_name] = update.train(self.training)
        if type(update).penalty is not Update.penalty or type(update).after_step is not Update.after_step:
            self.asked_at_steps[adapter_name] = None
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.dropouts[adapter_name] = config.dropout
        self.reductions[adapter_name] = config.penalty_reduction
        update.requires_grad_(trainable)
        self._freeze_non_trainable_peft_weights(adapter_name)
        self.set_adapter(self.active_adapters)

    def _new_update(self, config: AdapterConfig, waiting: bool) -> Update:
        base = self.get_base_layer()
        if waiting:
            return config.empty(self.kind.shape(base))
        matrix = self.kind.matrix(base)
        if not config.needs:
            return config.update(matrix)
        stats = {kind: value.to(matrix.device) for kind, value in config.statistics[self.name].items()}
        return config.update(matrix, stats)

    def stored_weight(self) -> Tensor:
        """The base's weight as it is stored, or one of several."""
        return self.get_base_layer().weight

    def derive(self, adapter_name: str, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """What an update's saved values leave out, made again from the base weight, by parameter name."""
        update = self.folklora_updates[adapter_name]
        if not update.unsaved:
            return {}
        made = update.derive(self.kind.matrix(self.get_base_layer()), saved, self.name)
        return {key: value.contiguous() for key, value in made.items()}

    def updates_elsewhere(self, adapter_name: str) -> list[Update]:
        """The adapter's updates on the model's other layers, in the order in which they were made."""
        layers = [layer for layer in LIVE_LAYERS.values() if layer.context is self.context and layer is not self]
        return [layer.folklora_updates[adapter_name] for layer in layers if adapter_name in layer.folklora_updates]

    def sample_base(self) -> Tensor:
        """Evenly spaced elements of the base weight, float32: enough to tell one base from another."""
        return evenly_spaced(self.kind.matrix(self.get_base_layer()))

    def fits_base(self, sample: Tensor) -> bool:
        """Whether a saved sample is of this base, up to one rounding (on a quantised layer: points the same way)."""
        if self.stored_weight().device.type == "meta":
            return True
        return same_sample(self.sample_base(), sample, is_quantised_weight(self.stored_weight()))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus every active update's."""
        names = self._names_to_apply()
        if not names:
            return self.base_layer(x, *args, **kwargs)
        updates = self._updates
        functions = [name for name in names if updates[name].is_function]
        if functions:
            return self._forward_with_functions(x, functions, [name for name in names if name not in functions])
        return self._forward_factored(x, names)

    def _forward_factored(self, x: Tensor, names: list[str], weight: Tensor | None = None) -> Tensor:
        updates = self._updates
        if any(updates[name].is_dense for name in names):
            return forward_with_dense(self, x, names)
        if not names:
            return self.kind.forward(self.base_layer, x, None, weight=weight)
        if self.training and any(self.dropouts[name] > 0 for name in names):
            return self._forward_with_dropout(x, names, weight)
        found = offered(self, x)
        if found is None:
            factors = self._sum(names, x)
            shared = share(self, x, factors) if self.siblings else None
        else:
            factors, shared = found
        if shared is None:
            y = self.kind.forward(self.base_layer, x, factors, weight=weight)
        else:
            y = self.kind.forward(self.base_layer, x, factors, weight=weight, shared=shared)
        return self._with_biases(y, x, names)

    def current_factors(self, x: Tensor) -> Factors | None:
        """All that the active adapters add for x; None where the layer's call would not be the base's plus that.

        And none where one of them counts its passes: a sibling asks before it is sure that this layer reads x.
        """
        names = self._names_in_use()
        if not names or self._disable_adapters or self.merged_adapters:
            return None
        if self.waiting:
            self.admit_loaded(names)
        if self.training and any(self.dropouts[name] > 0 for name in names):
            return None
        updates = [self._updates[name] for name in names]
        if any(update.is_function or update.is_dense or update.counts_passes for update in updates):
            return None
        return self._sum(names, x)

    def _sum(self, names: list[str], x: Tensor) -> Factors:
        made = self._corrections_made(names)
        return concatenate([self._factors(name, x, corrects=name not in made) for name in names])

    def _forward_with_functions(self, x: Tensor, functions: list[str], factored: list[str]) -> Tensor:
        base = self.base_layer(x)
        y = self._forward_factored(x, factored) if factored else base
        for name in functions:
            _, *known = self._inputs(name, x)
            added = self.folklora_updates[name].function(x, base, *known)
            if added is not None:
                gate = self.context.own_rows(name, x, self.name)
                y = y + (added if gate is None else gate.to(added.dtype) * added)
        return self._with_biases(y, x, functions)

    def _forward_with_dropout(self, x: Tensor, names: list[str], weight: Tensor | None) -> Tensor:
        whole: list[Factors] = []
        # one mask of x for all adapters of equal dropout
        by_dropout: dict[float, list[Factors]] = defaultdict(list)
        made = self._corrections_made(names)
        for name in names:
            p = self.dropouts[name]
            if p == 0 or not x.is_floating_point():
                whole.append(self._factors(name, x, corrects=name not in made))
                continue
            learned, fixed = self.folklora_updates[name].split(*self._inputs(name, x))
            gate = self.context.own_rows(name, x, self.name)
            by_dropout[p].append(learned if gate is None else learned.scale(gate))
            if fixed is not None and name not in made:
                whole.append(fixed if gate is None else fixed.scale(gate))
        parts = [(p, concatenate(factors)) for p, factors in sorted(by_dropout.items())]
        if whole or not parts:
            y = self.kind.forward(self.base_layer, x, concatenate(whole), weight=weight)
        else:
            (p, factors), parts = parts[0], parts[1:]
            y = self.kind.forward(self.base_layer, x, factors, p, weight)
        for p, factors in parts:
            y = y + self.kind.update(self.base_layer, F.dropout(x, p), factors)
        return self._with_biases(y, x, names)

    def _with_biases(self, y: Tensor, x: Tensor, names: list[str]) -> Tensor:
        updates = self._updates
        for name in names:
            change = updates[name]._parameters.get("bias_change")
            if change is not None:
                change = self.kind.per_output(self.get_base_layer(), change.to(y.dtype))
                gate = self.context.own_rows(name, x, self.name)
                y = y + (change if gate is None else gate.to(y.dtype) * change)
        return y

    def _names_to_apply(self) -> list[str]:
        """The adapters that this pass adds to the base layer's output; none where they are disabled or merged."""
        if self._disable_adapters:
            self.unmerge()
        if self._disable_adapters or self.merged_adapters:
            return []
        names = self._names_in_use()
        if self.waiting:
            self.admit_loaded(names)
        return names

    @property
    def _updates(self) -> dict[str, Update]:
        # every pass asks several times, and nn.Module's own attributes are slow to find
        return self._modules["folklora_updates"]._modules

    def _names_in_use(self) -> list[str]:
        context, updates = self.context, self._updates
        if context.alone is not None:
            names = context.alone
        elif context.rows is not None:
            names = sorted(set(context.rows))
        else:
            names = self.active_adapters if context.mixture is None else list(context.mixture)
        return [name for name in names if name in updates]

    def _inputs(self, name: str, x: Tensor) -> tuple[Tensor | None, ...]:
        update = self._updates[name]
        if not update.gated:
            return None, None
        update.before = self.context.before
        mask = self.context.own_mask(name, x, self.name)
        return (x, mask, self.context.class_gate(name, x, self.name)) if update.reads_classes else (x, mask)

    def _corrections_made(self, names: list[str]) -> set[str]:
        """Adapters whose correction of the base another one's contains; taken out twice, it would change its sign."""
        if len(names) < 2:
            return set()
        correcting = [name for name in names if self.folklora_updates[name].corrects_base]
        # rows that have their own adapters have one each, or parts that make one together
        if len(correcting) < 2 or self.context.by_rows:
            return set()
        fixed = {name: self.folklora_updates[name].split()[1] for name in correcting}
        largest = max(correcting, key=lambda name: 0 if fixed[name] is None else fixed[name].rank)
        return set(correcting) - {largest}

    def _factors(self, name: str, x: Tensor, corrects: bool = True) -> Factors:
        factors = _factors_of(self._updates[name], corrects, *self._inputs(name, x))
        gate = self.context.own_rows(name, x, self.name)
        return factors if gate is None else factors.scale(gate)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Replace the weight by W + ΔW in a new tensor; the base's own tensor is kept aside untouched.

        Raises:
            ValueError: An update depends on its input, the weight is quantised or not finite after merging.
        """
        merge(self, check_adapters_to_merge(self, adapter_names), finite=safe_merge)

    def unmerge(self) -> None:
        """Put the base's own weights back, bit for bit."""
        unmerge(self)

    def merged_weights(self, names: list[str]) -> dict[str, Tensor]:
        """The base's own parameters with these adapters' updates added, by name."""
        made = self._corrections_made(names)
        factored = [name for name in names if not self.folklora_updates[name].is_dense]
        parts = [_factors_of(self.folklora_updates[name], name not in made) for name in factored]
        return with_added(self, names, concatenate(parts) if parts else None)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter's update from this layer."""
        super().delete_adapter(adapter_name)
        self.dropouts.pop(adapter_name, None)
        self.reductions.pop(adapter_name, None)
        self.waiting.discard(adapter_name)
        self.asked_at_steps.pop(adapter_name, None)
        if adapter_name in self.context.shared:
            del self.context.shared[adapter_name]

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the update is a fixed matrix of low rank."""
        update = self._updates.get(adapter_name)
        return update is None or not (update.gated or update.is_dense)

    @property
    def needs_full_sequence(self) -> bool:
        """Whether an active update looks at other positions, so that no cache may be used."""
        return any(self.folklora_updates[name].needs_full_sequence for name in self._names_in_use())

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # PEFT's own would also cast the float32 masters to the base's dtype
        update = self.folklora_updates[adapter_name]
        if not any(parameter.is_meta for parameter in update.parameters()):
            device = self.stored_weight().device if device is None else device
            update.to(device)
            if update.shared is not None:
                update.shared.to(device)

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | list[str] | None = None) -> None:
        wanted = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name, update in self.folklora_updates.items():
            if wanted is not None and name not in wanted:
                continue
            frozen = update.frozen_parameters() | {"base_sample"}
            for key, parameter in itertools.chain(update.named_parameters(), (update.shared or {}).items()):
                if key in frozen:
                    parameter.requires_grad_(False)
                    # what was trained until now must not count in a later clipping of gradients
                    parameter.grad = None

    def admit_loaded(self, names: list[str]) -> None:
        """Take adapters that waited for saved values into use; those may have come by a way that checks nothing.

        Raises:
            RuntimeError: One still waits, or its values were made for another base.
        """
        for name in self.waiting.intersection(names):
            if not self.fits_base(self.folklora_updates[name].base_sample):
                raise RuntimeError(
                    f"adapter {name} on layer '{self.name}' was made from a saved configuration, and its values were "
                    "never loaded or were made for another base model's weights; load them with "
                    "PeftModel.from_pretrained, or start anew from dataclasses.replace(config)"
                )
            update = self.folklora_updates[name]
            for key, value in self.derive(name, dict(update.named_parameters())).items():
                owner, _, leaf = key.rpartition(".")
                setattr(update.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
            self.waiting.discard(name)

    def extra_repr(self) -> str:
        """Which adapters the layer carries."""
        return ", ".join(f"{name}={type(update).__name__}" for name, update in self.folklora_updates.items())


def _factors_of(update: Update, corrects: bool, *inputs: Tensor | None) -> Factors:
    return update.factors(*inputs) if corrects else update.split(*inputs)[0]


def layers_of(model: nn.Module) -> Iterator[FolkloraLayer]:
    """Every layer of `model` that carries Folklora's updates, in the model's order."""
    return (module for module in modules_without_updates(model) if isinstance(module, FolkloraLayer))


def modules_without_updates(model: nn.Module) -> Iterator[nn.Module]:
    """Every module of `model` but the updates on its layers, in the model's order."""
    seen: set[nn.Module] = set()
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        yield module
        # updates hold no layers, and where there are many adapters they are most of the model
        children = [child for name, child in module._modules.items() if name != "folklora_updates"]
        waiting.extend(child for child in reversed(children) if child is not None)


def updates_of(model: nn.Module, adapter_name: str) -> Iterator[tuple[FolkloraLayer, Update]]:
    """(layer, update) for each layer that carries the named adapter, in the model's order."""
    return (
        (layer, layer.folklora_updates[adapter_name])
        for layer in layers_of(model)
        if adapter_name in layer.folklora_updates
    )

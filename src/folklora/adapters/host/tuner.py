"""The PEFT tuner: finds the layers that an adapter names, and puts Folklora's layer around each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate import init_empty_weights
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper, _get_submodules
from torch import Tensor, nn

from folklora.adapters.base import PEFT_TYPE, AdapterConfig
from folklora.adapters.host.aside import others_aside
from folklora.adapters.host.attention import layer_class
from folklora.adapters.host.blocks import block_of, read_block, stop_reading
from folklora.adapters.host.call import CallContext, listen, stop_listening
from folklora.adapters.host.combine import check_combination, config_of, fill, weighted_sum
from folklora.adapters.host.kinds import is_quantised_weight, kind_of
from folklora.adapters.host.layer import FolkloraLayer, layers_of, updates_of
from folklora.adapters.host.mixture import stop_mixing
from folklora.adapters.host.saved import check_saved_values
from folklora.adapters.host.shared import (
    SHARED,
    make_shared,
    place_shared,
    remove_shared,
    shared_values,
    with_adapter_name,
)
from folklora.adapters.host.siblings import link_siblings
from folklora.adapters.host.targets import (
    all_linear,
    bare,
    check_statistics,
    named_weights,
    nothing_matched,
    problems_inside,
    target_problems,
    with_chosen_rank,
    without_match,
)
from folklora.adapters.host.weights import chosen_weights


class FolkloraModel(BaseTuner):
    """Carries adapters of any Folklora method, several at once, on one frozen model.

    Made by `peft.get_peft_model(model, config)` and `PeftModel.from_pretrained`; not called directly.
    """

    prefix = "folklora_"
    tuner_layer_cls = FolkloraLayer
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add the adapter's layers, after checking every target, so that nothing is changed where one is wrong.

        Raises:
            ValueError: No layer matches, a target cannot be adapted, or options or statistics do not fit it; every
                problem is named.
        """
        config = self.peft_config[adapter_name]
        with others_aside(model, adapter_name):
            config.fit(model)
            targets = self.targets(model, config)
            if config.needs and not _awaits_values(config):
                check_statistics(config, targets)
            place_shared(model, self._context(), adapter_name, make_shared(config, targets))
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            link_siblings(model)
        if config.statistics is not None:
            # they may be as large as the model, and the model would keep them alive
            self.peft_config[adapter_name] = config.calibrated(None)

    def _create_and_replace(
        self,
        config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **optional: Any,
    ) -> None:
        own = config.for_module(current_key)
        waiting = _awaits_values(config)
        trainable = adapter_name in self.active_adapters and not config.inference_mode
        own = with_chosen_rank(config, own, target, current_key, waiting)
        if isinstance(target, FolkloraLayer):
            target.add(adapter_name, own, waiting=waiting, trainable=trainable)
        else:
            layer = layer_class(kind_of(target, current_key), parent)(target, current_key, self._context())
            # the model's mode: it is in training until it is told otherwise
            layer.training = layer.folklora_updates.training = self.training
            layer.set_adapter(self.active_adapters)
            layer.add(adapter_name, own, waiting=waiting, trainable=trainable)
            self._replace_module(parent, target_name, layer, target)
            target = layer
        if target.folklora_updates[adapter_name].reads_block:
            read_block(self.model, block_of(current_key), target.context)

    def _context(self) -> CallContext:
        existing = next(layers_of(self.model), None)
        if existing is not None:
            return existing.context
        if getattr(self, "_own_context", None) is None:
            self._own_context = CallContext()
            listen(self.model, self._own_context, self.peft_config)
        return self._own_context

    def _mark_only_adapters_as_trainable(self, model: nn.Module) -> None:
        # PEFT takes what lies outside its layers for the base's
        shared = [p for p in self._context().shared.parameters() if p.requires_grad]
        super()._mark_only_adapters_as_trainable(model)
        for parameter in shared:
            parameter.requires_grad_(True)

    @classmethod
    def targets(cls, model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
        """The layers that a configuration names, base layers by their names; its `target_modules` becomes explicit.

        Raises:
            ValueError: No layer matches, a target cannot be adapted or options do not fit it; every problem is named.
        """
        problems = without_match(config, model)
        config = cls._prepare_adapter_config(config, cls.get_model_config(model))
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            config.target_modules = all_linear(config, model)
        hidden = problems_inside(config, model)
        found: dict[str, nn.Module] = {}
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FolkloraLayer))
        experts = dict(named_weights(config, model))
        for name, module in model.named_modules():
            if not name or (inside and name.startswith(inside)):
                continue
            if name not in experts and not check_target_module_exists(config, name):
                continue
            found[name] = bare(module)
            problems += target_problems(config, name, found[name])
        if not (found or hidden or config.target_parameters):
            raise ValueError(nothing_matched(config, model))
        if problems or hidden:
            raise ValueError("\n".join(problems + hidden))
        return found

    def _inject_parameters(
        self, peft_config: AdapterConfig, model: nn.Module, adapter_name: str, low_cpu_mem_usage: bool
    ) -> list[str]:
        named = dict(named_weights(peft_config, model))
        for name, module in named.items():
            if isinstance(module, FolkloraLayer) and adapter_name in module.folklora_updates:
                continue  # by its module's name, with these parameters alone
            parent, target, target_name = _get_submodules(model, name)
            with init_empty_weights() if low_cpu_mem_usage else nullcontext():
                self._create_and_replace(peft_config, adapter_name, target, target_name, parent, current_key=name)
        return [
            f"{name}.{key}" for name, module in named.items() for key in chosen_weights(bare(module), name, peft_config)
        ]

    @classmethod
    def _prepare_adapter_config(cls, config: AdapterConfig, model_config: dict) -> AdapterConfig:
        if config.target_modules is None and config.target_parameters:
            config.target_modules = []
        if config.target_modules is None:
            known = cls.target_module_mapping.get(model_config.get("model_type"))
            if known is None:
                raise ValueError(
                    f"no default target_modules are known for models of type '{model_config.get('model_type')}'; "
                    'name the layers, or set target_modules="all-linear"'
                )
            config.target_modules = known if isinstance(known, str) else sorted(known)
        return config

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, FolkloraLayer) and not child.kind.has_matrix:
            # PEFT's own looks for a parameter named weight
            setattr(parent, child_name, new_module)
            return
        super()._replace_module(parent, child_name, new_module, child)

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        stop_mixing(model)
        stop_listening(model)
        stop_reading(model)
        remove_shared(model)
        return model

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
    ) -> None:
        """Add one more adapter, a plain LoRA that holds the weighted sum of others, of whatever methods.

        What a method takes out of the base itself (KaSA's noise) counts once and whole, whatever the weights.

        Args:
            adapters: Names of adapters whose updates do not depend on the input.
            weights: A number for each, of any sign.
            adapter_name: The new adapter's name.
            combination_type: "cat" keeps the sum, with the sum of the ranks (at most the weight's); "svd" takes its
                best approximation of rank `svd_rank`.
            svd_rank: The rank that "svd" keeps; None takes the largest of the adapters' on each layer.

        Raises:
            ValueError: An update depends on the input or is on several weights of one module, an adapter has trained
                other modules in full, or the names or `combination_type` do not fit; every problem is named.
        """
        check_combination(self.model, self.peft_config, adapters, weights, adapter_name, combination_type)
        if combination_type == "svd" and svd_rank is not None:
            AdapterConfig.check_rank(svd_rank)
        sums = weighted_sum(self.model, adapters, weights, combination_type == "svd", svd_rank)
        self.peft_config[adapter_name] = config_of(sums, self.peft_config[adapters[0]])
        self.inject_adapter(self.model, adapter_name)
        fill(self.model, adapter_name, sums)

    def _check_merge_allowed(self) -> None:
        if self._context().mixture is not None:
            raise ValueError(
                "each text has its own mixture of these adapters, and no single weight stands for them all"
            )
        embedding, head = _tied_pair(self.model)
        if embedding is not None and any(isinstance(part, FolkloraLayer) for part in (embedding, head)):
            raise ValueError(
                "the input embedding and the output head share one weight and one of them is adapted: merging would "
                "change both; load the model with tie_word_embeddings=False to merge"
            )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        with others_aside(self.model, adapter_name):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        if not autocast_adapter_dtype:
            # they are made in float32, and PEFT knows only how to leave them as they are
            for layer, update in updates_of(self.model, adapter_name):
                weight = layer.stored_weight()
                if not is_quantised_weight(weight):
                    update.to(weight.dtype)
                    if update.shared is not None:
                        update.shared.to(weight.dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        rows = kwargs.pop("adapter_names", None)
        layer = next(layers_of(self.model), None)
        self._check_beams(kwargs)
        if rows is None or layer is None:
            yield
            return
        self._check_rows(rows, _batch_size(args, kwargs))
        layer.context.rows = list(rows)
        handles = [
            module.register_forward_pre_hook(partial(_name_rows, rows=list(rows)), with_kwargs=True)
            for module in self.modules()
            if isinstance(module, AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            layer.context.rows = None
            for handle in handles:
                handle.remove()

    def _check_beams(self, arguments: dict[str, Any]) -> None:
        """Refuse beam search from a cache where updates remember the last pass, whose rows the beams would reorder."""
        settings = arguments.get("generation_config") or getattr(self.model, "generation_config", None)
        beams = arguments.get("num_beams") or getattr(settings, "num_beams", None) or 1
        cached = arguments.get("use_cache", getattr(settings, "use_cache", True)) is not False
        updates = (layer.folklora_updates[n] for layer in layers_of(self.model) for n in layer._names_in_use())
        if beams > 1 and cached and any(update.reads_past for update in updates):
            raise ValueError(
                "the active adapter's gates read earlier positions, which beam search reorders in the cache; generate "
                'with use_cache=False or num_beams=1, or train with granularity="token"'
            )

    def _check_rows(self, rows: list[str], batch: int | None) -> None:
        if not rows or (batch or 0) % len(rows):
            raise ValueError(
                f"adapter_names has {len(rows)} entries, and the batch has {batch} rows: name one adapter a row"
            )
        unknown = sorted(set(rows) - set(self.peft_config) - {"__base__"})
        if unknown:
            raise ValueError(f"no adapter {', '.join(unknown)}; there are {', '.join(self.peft_config)} and __base__")
        merged = sorted({name for layer in layers_of(self.model) for name in layer.merged_adapters})
        if merged:
            raise ValueError(
                f"adapter_names cannot be used while {', '.join(merged)} is merged: call unmerge_adapter()"
            )
        if self.training and any(getattr(module, "gradient_checkpointing", False) for module in self.modules()):
            raise ValueError("adapter_names cannot be used in training with gradient checkpointing: switch that off")

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: AdapterConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        kept = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        # PEFT leaves out what is named like another adapter: an adapter "B" would cost all others their B
        marker = f".folklora_updates.{adapter_name}."
        derived = {
            f"{path}{marker}{key}"
            for path, layer in model.named_modules()
            if isinstance(layer, FolkloraLayer) and adapter_name in layer.folklora_updates
            for key in layer.folklora_updates[adapter_name].unsaved
        }
        lost = {
            key: value.detach()
            for key, value in model.named_parameters()
            if set(key.partition(marker)[2].split(".")).intersection(unwanted_adapter_names)
        }
        whole = {key: value.detach() for key, value in model.named_parameters()}
        found = {**lost, **shared_values(adapter_name, {**whole, **state_dict}), **kept}
        return {key: value for key, value in found.items() if key not in derived}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # an update's own parameters may be nested, so the name is not always next to the end
        for marker in (".folklora_updates.", f"{SHARED}."):
            head, found, tail = key.partition(marker)
            if found:
                return head + marker + tail.removeprefix(f"{adapter_name}.")
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdapterConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        renamed = {with_adapter_name(adapter_name, key): value for key, value in renamed.items()}
        return check_saved_values(model, adapter_name, renamed)


def _name_rows(module: nn.Module, args: tuple, kwargs: dict, rows: list[str]) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": rows}


def _batch_size(args: tuple, kwargs: dict[str, Any]) -> int | None:
    """How many rows a call has; None where none of its arguments is sure to have one each."""
    tensors = [value for value in kwargs.values() if isinstance(value, Tensor)]
    first = next((kwargs[key] for key in ("input_ids", "inputs_embeds") if kwargs.get(key) is not None), None)
    if args and isinstance(args[0], Tensor):
        first = args[0]
    elif first is None and len(tensors) == 1:
        first = tensors[0]
    return len(first) if isinstance(first, Tensor) and first.dim() else None


def _awaits_values(config: AdapterConfig) -> bool:
    """Whether an adapter is made without values: saved ones follow, or there is no memory for any."""
    return config.restoring or torch.empty(0).device.type == "meta" or _on_meta()


def _on_meta() -> bool:
    # accelerate's init_empty_weights patches parameter registration, not tensor creation
    return nn.Linear(1, 1, bias=False).weight.device.type == "meta"


def _tied_pair(model: nn.Module) -> tuple[nn.Module | None, nn.Module | None]:
    try:
        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None, None
    if embedding is None or head is None or getattr(embedding, "weight", None) is not getattr(head, "weight", 0):
        return None, None
    return embedding, head


def register() -> None:
    """Tell PEFT about the type FOLKLORA; called once, when the package is imported."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = AdapterConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = FolkloraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = FolkloraModel.prefix

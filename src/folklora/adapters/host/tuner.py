"""The PEFT tuner: finds the layers that an adapter names, and puts Folklora's layer around each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, _maybe_include_all_linear_layers, check_target_module_exists
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from folklora.adapters.base import PEFT_TYPE, AdapterConfig
from folklora.adapters.host.kinds import LINEAR, TRANSPOSED, kind_of
from folklora.adapters.host.layer import CallContext, FolkloraLayer, layers_of
from folklora.adapters.host.saved import check_saved_values
from folklora.adapters.host.siblings import link_siblings

_MASKS = ("decoder_attention_mask", "attention_mask", "encoder_attention_mask")


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
        targets = self.targets(model, config)
        if config.needs and not _awaits_values(config):
            _check_statistics(config, targets)
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
        own = _with_chosen_rank(config, own, target, current_key, waiting)
        if isinstance(target, FolkloraLayer):
            target.add(adapter_name, own, waiting=waiting, trainable=trainable)
            return
        layer = FolkloraLayer(target, current_key, self._context())
        layer.set_adapter(self.active_adapters)
        layer.add(adapter_name, own, waiting=waiting, trainable=trainable)
        self._replace_module(parent, target_name, layer, target)

    def _context(self) -> CallContext:
        existing = next(layers_of(self.model), None)
        if existing is not None:
            return existing.context
        if getattr(self, "_own_context", None) is None:
            self._own_context = CallContext()
            read_masks(self.model, self._own_context)
        return self._own_context

    @classmethod
    def targets(cls, model: nn.Module, config: AdapterConfig) -> dict[str, nn.Module]:
        """The layers that a configuration names, base layers by their names; its `target_modules` becomes explicit.

        Raises:
            ValueError: No layer matches, a target cannot be adapted or options do not fit it; every problem is named.
        """
        problems = targets_without_match(config, model)
        config = cls._prepare_adapter_config(config, cls.get_model_config(model))
        if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
            config.target_modules = _all_linear(config, model)
        found: dict[str, nn.Module] = {}
        inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, FolkloraLayer))
        for name, module in model.named_modules():
            if not name or (inside and name.startswith(inside)) or not check_target_module_exists(config, name):
                continue
            found[name] = module.get_base_layer() if isinstance(module, FolkloraLayer) else module
            problems += cls._problems(config, name, found[name])
        if not found:
            raise ValueError(_nothing_matched(config, model))
        if problems:
            raise ValueError("\n".join(problems))
        return found

    @staticmethod
    def _problems(config: AdapterConfig, name: str, base: nn.Module) -> list[str]:
        try:
            kind = kind_of(base, name)
        except TypeError as error:
            return [str(error)]
        if kind.name not in config.layer_kinds:
            kinds = ", ".join(sorted(config.layer_kinds))
            return [f"{config.method} adapts {kinds} layers; '{name}' is a {type(base).__name__}"]
        return config.for_module(name).check(kind.shape(base), name)

    @classmethod
    def _prepare_adapter_config(cls, config: AdapterConfig, model_config: dict) -> AdapterConfig:
        if config.target_modules is None:
            known = cls.target_module_mapping.get(model_config.get("model_type"))
            if known is None:
                raise ValueError(
                    f"no default target_modules are known for models of type '{model_config.get('model_type')}'; "
                    'name the layers, or set target_modules="all-linear"'
                )
            config.target_modules = known if isinstance(known, str) else sorted(known)
        return config

    def _unload_and_optionally_merge(self, *args: Any, **kwargs: Any) -> nn.Module:
        model = super()._unload_and_optionally_merge(*args, **kwargs)
        for part in _called_with_masks(model):
            for key, hook in list(part._forward_pre_hooks.items()):
                if isinstance(hook, _MaskReader):
                    del part._forward_pre_hooks[key], part._forward_pre_hooks_with_kwargs[key]
        return model

    def _check_merge_allowed(self) -> None:
        embedding, head = _tied_pair(self.model)
        if embedding is not None and any(isinstance(part, FolkloraLayer) for part in (embedding, head)):
            raise ValueError(
                "the input embedding and the output head share one weight and one of them is adapted: merging would "
                "change both; load the model with tie_word_embeddings=False to merge"
            )

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        rows = kwargs.pop("adapter_names", None)
        layer = next(layers_of(self.model), None)
        self._check_beams(kwargs)
        if rows is None or layer is None:
            yield
            return
        self._check_rows(rows)
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

    def _check_rows(self, rows: list[str]) -> None:
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
        return {key: value for key, value in {**lost, **kept}.items() if key not in derived}

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # an update's own parameters may be nested, so the name is not always next to the end
        marker = ".folklora_updates."
        head, found, tail = key.partition(marker)
        if not found:
            return super()._remove_adapter_name_from_key(key, adapter_name)
        return head + marker + tail.removeprefix(f"{adapter_name}.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: AdapterConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        renamed = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        return check_saved_values(model, adapter_name, renamed)


def _with_chosen_rank(
    config: AdapterConfig, own: AdapterConfig, target: nn.Module, name: str, waiting: bool
) -> AdapterConfig:
    """The options for one layer with the rank that the method reads from its weight, which `config` notes down."""
    if waiting or type(own).chosen_rank is AdapterConfig.chosen_rank:
        return own
    base = target.get_base_layer() if isinstance(target, FolkloraLayer) else target
    rank = own.chosen_rank(kind_of(base, name).matrix(base))
    if rank is None:
        return own
    # anchored: PEFT matches a key against the end of a name
    config.rank_pattern = {f"^{re.escape(name)}": rank, **config.rank_pattern}
    return replace(own, r=rank)


def _name_rows(module: nn.Module, args: tuple, kwargs: dict, rows: list[str]) -> tuple[tuple, dict]:
    return args, {**kwargs, "adapter_names": rows}


class _MaskReader:
    """Notes the attention masks of a call for the layers; a class, so that models can be pickled and copied."""

    def __init__(self, context: CallContext) -> None:
        self.context = context

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        masks = (kwargs.get(name) for name in _MASKS)
        self.context.masks = tuple(m for m in masks if isinstance(m, Tensor) and m.dim() == 2)
        cache = kwargs.get("past_key_values")
        self.context.before = 0 if cache is None else int(cache.get_seq_length())


def read_masks(model: nn.Module, context: CallContext) -> list[RemovableHandle]:
    """Let a context know the attention masks of every call of a model, from now on."""
    reader = _MaskReader(context)
    return [part.register_forward_pre_hook(reader, with_kwargs=True) for part in _called_with_masks(model)]


def _called_with_masks(model: nn.Module) -> list[nn.Module]:
    # generation calls the encoder by itself; and each half reads masks of its own
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return [model.get_encoder(), model.get_decoder()]
    return [model]


def _awaits_values(config: AdapterConfig) -> bool:
    """Whether an adapter is made without values: saved ones follow, or there is no memory for any."""
    return config.restoring or torch.empty(0).device.type == "meta" or _on_meta()


def _check_statistics(config: AdapterConfig, targets: dict[str, nn.Module]) -> None:
    if config.statistics is None:
        wanted = ", ".join(f'"{kind}"' for kind in sorted(config.needs))
        raise ValueError(
            f"{config.method} must know the {' and '.join(sorted(config.needs))} of each layer beforehand: pass "
            f"config.calibrated(folklora.calibrate(model, batches, {{{wanted}}}, target_modules=config))"
        )
    lost = [name for name in targets if name not in config.statistics]
    problems = [f"the statistics have no layer '{name}'" for name in lost]
    if lost:
        problems.append(f"layers that they have: {', '.join(config.statistics)}")
    for name, base in targets.items():
        if name not in lost:
            shape = kind_of(base, name).shape(base)
            problems += config.for_module(name).check_statistics(config.statistics[name], shape, name)
    if problems:
        raise ValueError("\n".join(problems))


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


def _all_linear(config: AdapterConfig, model: nn.Module) -> list[str]:
    chosen = set(_maybe_include_all_linear_layers(replace(config), model).target_modules)
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    # PEFT knows a layer that is adapted already only by a class name with "Linear" in it
    for name, module in model.named_modules():
        if isinstance(module, FolkloraLayer) and module is not head and module.kind in (LINEAR, TRANSPOSED):
            chosen.add(name)
    return sorted(chosen)


def targets_without_match(config: PeftConfig, model: nn.Module) -> list[str]:
    """What is wrong with the names in a configuration's `target_modules`, with the layers that there are."""
    targets = config.target_modules
    if targets is None or (isinstance(targets, str) and targets.lower() == "all-linear"):
        return []
    if isinstance(targets, str):
        found = any(re.fullmatch(targets, name) for name, _ in model.named_modules())
        return [] if found else [_nothing_matched(config, model)]
    names = [f".{name}" for name, _ in model.named_modules()]
    lost = [target for target in targets if not any(name.endswith(f".{target}") for name in names)]
    return [f"target module '{target}' matches no layer; {_candidates(model)}" for target in lost]


def _nothing_matched(config: PeftConfig, model: nn.Module) -> str:
    return f"target_modules={config.target_modules!r} matches no layer of {type(model).__name__}; {_candidates(model)}"


def _candidates(model: nn.Module) -> str:
    names = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _adaptable(name, module)})
    return f"layers that can be adapted: {', '.join(names)}"


def _adaptable(name: str, module: nn.Module) -> bool:
    if isinstance(module, FolkloraLayer):
        return True
    try:
        kind_of(module, name)
    except TypeError:
        return False
    return ".base_layer" not in name and name != ""


def register() -> None:
    """Tell PEFT about the type FOLKLORA; called once, when the package is imported."""
    PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = AdapterConfig
    PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = FolkloraModel
    PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = FolkloraModel.prefix

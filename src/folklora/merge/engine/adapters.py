"""An adapter over a checkpoint, merged into one tensor at a time; the merged model is never made."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict
from torch import Tensor, nn

from folklora.adapters.host.layer import FolkloraLayer

if TYPE_CHECKING:
    from folklora.merge.engine.models import Architecture

_NAME = "default"


class WrittenOver:
    """What an adapter makes of a model's tensors.

    The model is on the meta device; the adapter's own values are all that is held. For a tensor, the layer that it
    belongs to is given its weights, the adapter is merged into them by PEFT or by Folklora's own layer, and they are
    taken away again.

    Args:
        skeleton: The model on the meta device.
        folder: The adapter's folder.
        architecture: What the model's tensors are called.
        stored: The keys that the checkpoint holds.
        where: The model's name, for messages.

    Raises:
        FileNotFoundError: The folder holds no adapter.
        ValueError: The adapter does not fit the model, or has no fixed change of the weights.
    """

    def __init__(
        self, skeleton: nn.Module, folder: Path, architecture: Architecture, stored: set[str], where: str
    ) -> None:
        self.where, self.architecture = where, architecture
        self.layers: dict[str, BaseTunerLayer] = {}
        self.saved: dict[str, Tensor] = {}
        _check_folder(folder, where)
        _load(skeleton, folder, where)
        self._find(skeleton)
        self.changed = set(self.saved)
        self.ready: dict[str, Tensor] = {}
        for path, layer in self.layers.items():
            if isinstance(layer, FolkloraLayer) and not layer.supports_lora_conversion(_NAME):
                reads = layer.folklora_updates[_NAME].depends_on
                raise ValueError(f"{where}: the adapter's update depends on {reads}, so no single weight equals it")
            self._check_used_once(path, _base_of(layer))
            self.changed.update(self._keys(path, _base_of(layer)))
        self._check_stored(stored)

    def read(self, key: str, stored: Callable[[str], Tensor]) -> Tensor:
        """A tensor with the adapter's change, float32; `stored` reads the checkpoint's own.

        Raises:
            ValueError: The adapter cannot be merged into its layer, or was made for other weights.
        """
        if key in self.saved:
            return self.saved[key]
        if key not in self.ready:
            self.ready = self._merged(key, stored)
        # what else the layer holds, such as its bias, is asked for next
        return self.ready.pop(key)

    def _find(self, skeleton: nn.Module) -> None:
        inside: list[str] = []
        for path, module in skeleton.named_modules():
            if any(path.startswith(f"{outer}.") for outer in inside):
                continue
            if isinstance(module, ModulesToSaveWrapper) and _NAME in module.modules_to_save:
                inside.append(path)
                self._check_used_once(path, module.modules_to_save[_NAME])
                for leaf, value in module.modules_to_save[_NAME].state_dict().items():
                    self.saved[self.architecture.key(f"{path}.{leaf}")] = value
            layer = module.token_adapter if isinstance(module, TrainableTokensWrapper) else module
            if isinstance(layer, BaseTunerLayer):
                inside.append(path)
                self.layers[path] = layer

    def _keys(self, path: str, base: nn.Module) -> dict[str, str]:
        """The keys of a base layer's parameters, and their names in it."""
        own = base.named_parameters(recurse=False)
        return {self.architecture.key(f"{path}.{leaf}"): leaf for leaf, _ in own}

    def _check_used_once(self, path: str, module: nn.Module) -> None:
        ends = set(self.architecture.tied) | set(self.architecture.tied.values())
        if ends.intersection(self.architecture.plain(f"{path}.{leaf}") for leaf in module.state_dict()):
            raise ValueError(
                f"{self.where}: the adapter changes '{path}', whose weight the model uses in two places; merging would "
                "change both: train with tie_word_embeddings=False to merge"
            )

    def _check_stored(self, stored: set[str]) -> None:
        lacking = sorted(self.changed - stored)
        if lacking:
            raise ValueError(
                f"{self.where}: the adapter changes {len(lacking)} tensors that the checkpoint does not hold under "
                f"these names: {', '.join(lacking[:3])}"
            )

    def _merged(self, key: str, stored: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """All parameters of the layer that holds `key`, with the adapter's change."""
        path, layer = next((p, x) for p, x in self.layers.items() if key in self._keys(p, _base_of(x)))
        base = _base_of(layer)
        keys = self._keys(path, base)
        absent = {leaf: getattr(base, leaf) for leaf in keys.values()}
        chain = list(_chain(layer))
        try:
            for own, leaf in keys.items():
                # a copy: PEFT adds in place, and what was read may lie in the file
                value = stored(own).to(torch.float32, copy=True)
                setattr(base, leaf, nn.Parameter(value, requires_grad=False))
            if isinstance(layer, FolkloraLayer) and not layer.fits_base(layer.folklora_updates[_NAME].base_sample):
                raise ValueError(f"{self.where}: the adapter was made for another base model's weights ('{path}')")
            with torch.no_grad():
                for part in reversed(chain):
                    part.merge(adapter_names=[_NAME])
            return {own: getattr(base, leaf).detach() for own, leaf in keys.items()}
        finally:
            for part in chain:
                part.merged_adapters.clear()
                if isinstance(part, FolkloraLayer):
                    part.unmerged.clear()
                    _forget_derived(part)
            for leaf, value in absent.items():
                setattr(base, leaf, value)


def _check_folder(folder: Path, where: str) -> None:
    if not (folder / "adapter_config.json").is_file():
        raise FileNotFoundError(f"{where}: {folder} holds no adapter_config.json")
    if not (folder / "adapter_model.safetensors").is_file():
        raise FileNotFoundError(f"{where}: {folder} holds no adapter_model.safetensors")
    if PeftConfig.from_pretrained(str(folder)).is_prompt_learning:
        kind = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["peft_type"]
        raise ValueError(f"{where}: {kind} learns a prompt and changes no weight, so it cannot be merged")


def _load(skeleton: nn.Module, folder: Path, where: str) -> None:
    """Put an adapter on a model that is on the meta device, with its values on the CPU."""
    model = PeftModel(skeleton, PeftConfig.from_pretrained(str(folder)), _NAME, low_cpu_mem_usage=True)
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        # PEFT moves loaded values to where the base's are: here to nowhere
        layer._move_adapter_to_device_of_base_layer = _stay
    values = load_peft_weights(str(folder), device="cpu")
    found = set_peft_model_state_dict(model, values, _NAME, low_cpu_mem_usage=True)
    for layer in layers:
        del layer._move_adapter_to_device_of_base_layer
    model.eval()
    if found.unexpected_keys:
        raise ValueError(f"{where}: the adapter holds values that fit nowhere: {', '.join(found.unexpected_keys[:3])}")
    empty = [f"{path}.{name}" for path, name in _without_value(model)]
    if empty:
        raise ValueError(f"{where}: the adapter lacks values for {', '.join(empty[:3])}")


def _stay(*args: object, **options: object) -> None:
    return None


def _without_value(model: nn.Module) -> Iterator[tuple[str, str]]:
    for path, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, ModulesToSaveWrapper)):
            inside = [name for name in module.adapter_layer_names if "." not in name and hasattr(module, name)]
            for group in inside:
                held = getattr(module, group)
                own = held.named_parameters() if isinstance(held, nn.Module) else ()
                later = _derived(module) if isinstance(module, FolkloraLayer) else frozenset()
                yield from ((path, f"{group}.{name}") for name, value in own if value.is_meta and name not in later)


def _derived(layer: FolkloraLayer) -> frozenset[str]:
    """Names of what the layer makes from the base weight when it is first used, and no folder holds."""
    return frozenset(f"{_NAME}.{key}" for key in layer.folklora_updates[_NAME].unsaved)


def _forget_derived(layer: FolkloraLayer) -> None:
    """Take it away again: it may be larger than the weight."""
    for name in _derived(layer):
        owner, _, leaf = name.rpartition(".")
        module = layer.folklora_updates.get_submodule(owner)
        setattr(module, leaf, nn.Parameter(getattr(module, leaf).to("meta"), requires_grad=False))
        layer.waiting.add(_NAME)


def _chain(layer: nn.Module) -> list[BaseTunerLayer]:
    """PEFT's wrappers of one layer, the outermost first; it nests one for each adapted parameter."""
    found = [layer]
    while isinstance(found[-1].base_layer, BaseTunerLayer):
        found.append(found[-1].base_layer)
    return found


def _base_of(layer: BaseTunerLayer) -> nn.Module:
    return _chain(layer)[-1].base_layer

"""The models that are merged: where they are, what their tensors are called, and their tensors one at a time."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from folklora.merge.engine.adapters import WrittenOver
from folklora.merge.engine.checkpoints import Checkpoint, Form
from folklora.merge.engine.config import Reference
from folklora.stream.files import read_json

CONFIG, ADAPTER_CONFIG = "config.json", "adapter_config.json"


@dataclass(frozen=True)
class Architecture:
    """What a model class says of its tensors. A tensor's key is its name without the prefix that some files leave out.

    Args:
        prefix: The name of the part that base models consist of, such as "model"; "" where there is none.
        tied: Key of a tensor that is the same as another one → the other's key.
        keys: Every tensor's key, in the model's order; empty where transformers does not know the class.
        embeddings: Keys of tensors with a row for each token of the vocabulary.
        transposed: Keys of weights that are stored as [in, out].
    """

    prefix: str = ""
    tied: Mapping[str, str] = field(default_factory=dict)
    keys: tuple[str, ...] = ()
    embeddings: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()

    @classmethod
    def of(cls, model: nn.Module) -> Architecture:
        """The architecture of a transformers model, which may be on the meta device."""
        plain = cls(getattr(model, "base_model_prefix", ""))
        tied = {plain.key(name): plain.key(other) for name, other in model.all_tied_weights_keys.items()}
        whole = cls(plain.prefix, tied)
        keys = dict.fromkeys(whole.key(name) for name in model.state_dict())
        names = {id(module): name for name, module in model.named_modules()}
        ends = [model.get_input_embeddings(), model.get_output_embeddings()]
        rows = {
            whole.key(f"{names[id(end)]}.{leaf}")
            for end in ends
            if end is not None and id(end) in names
            for leaf, _ in end.named_parameters(recurse=False)
        }
        across = {whole.key(f"{name}.weight") for name, module in model.named_modules() if isinstance(module, Conv1D)}
        return cls(plain.prefix, tied, tuple(keys), frozenset(rows), frozenset(across))

    def plain(self, name: str) -> str:
        """A stored tensor's name without the prefix."""
        return name.removeprefix(f"{self.prefix}.") if self.prefix else name

    def key(self, name: str) -> str:
        """The key of a stored tensor's name."""
        return self.tied.get(self.plain(name), self.plain(name))


@dataclass(frozen=True)
class Layout:
    """What a model's files hold.

    Args:
        forms: Key → type and shape, in the files' order.
        names: Key → the name that it is stored under.
    """

    forms: Mapping[str, Form]
    names: Mapping[str, str]


class Model:
    """One model of a merge.

    Args:
        reference: Which.
        folder: Its checkpoint.
        adapter: The folder of the adapter that is written over it.

    Raises:
        FileNotFoundError: Something is not there.
        ValueError: Its weights are pickled, quantised or damaged, or the adapter has no fixed change of the weights.
    """

    def __init__(self, reference: Reference, folder: Path, adapter: Path | None) -> None:
        self.reference, self.folder, self.adapter_folder = reference, folder, adapter
        if not (folder / CONFIG).is_file():
            raise FileNotFoundError(f"{folder} holds no {CONFIG}")
        self.config: dict[str, Any] = read_json(folder / CONFIG)
        if self.config.get("quantization_config"):
            raise ValueError(f"{reference} is quantised; merging needs its weights in floating point")
        self.checkpoint = Checkpoint(folder)
        self.architecture = architecture_of(folder)
        self.layout = self._layout()
        self._over: WrittenOver | None = None
        if adapter is not None:
            self._over = self._written_over(adapter)

    def adapts(self, key: str) -> bool:
        """Whether the adapter changes a tensor."""
        return self._over is not None and key in self._over.changed

    def read(self, key: str, rows: slice | None = None, *, pinned: bool = False) -> Tensor:
        """One tensor, or some rows of it, with what the adapter changes in it; what is as stored, pinned if wanted."""
        if self.adapts(key):
            whole = self._over.read(key, self._stored)
            return whole if rows is None else whole[rows]
        return self._stored(key, rows, pinned)

    def files(self) -> list[Path]:
        """What its tensors are read from."""
        more = [] if self.adapter_folder is None else sorted(self.adapter_folder.glob("adapter_*"))
        return [*self.checkpoint.files, *more]

    def _stored(self, key: str, rows: slice | None = None, pinned: bool = False) -> Tensor:
        return self.checkpoint.read(self.layout.names[key], rows, pinned=pinned)

    def _layout(self) -> Layout:
        names: dict[str, str] = {}
        for name in self.checkpoint.forms:
            key = self.architecture.key(name)
            # of two stored tensors that are one, the one that the other is tied to
            if key not in names or name.endswith(key):
                names[key] = name
        return Layout({key: self.checkpoint.forms[name] for key, name in names.items()}, names)

    def _written_over(self, adapter: Path) -> WrittenOver:
        skeleton = skeleton_of(self.folder)
        if skeleton is None:
            raise ValueError(f"{self.reference}: transformers does not know {_class_name(self.config)}, to adapt it")
        return WrittenOver(skeleton, adapter, self.architecture, set(self.layout.forms), str(self.reference))


def open_models(references: list[Reference], base: Reference | None) -> dict[Reference, Model]:
    """Every model that a merge names; of an adapter's folder, the adapter over its base.

    Raises:
        FileNotFoundError: One is neither a folder nor in the hub's local cache.
        ValueError: See `Model`.
    """
    found: dict[Reference, Model] = {}
    for reference in references:
        folder = locate(reference.path, reference.revision)
        adapter = None if reference.adapter is None else locate(reference.adapter, reference.adapter_revision)
        if adapter is None and (folder / ADAPTER_CONFIG).is_file() and not (folder / CONFIG).is_file():
            below = None if base is None else base.path
            below = below or read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
            if not below:
                raise ValueError(f"{reference} is an adapter that names no base model; write BASE+{reference}")
            folder, adapter = locate(below, None), folder
        found[reference] = Model(reference, folder, adapter)
    return found


def locate(path: str, revision: str | None) -> Path:
    """The folder of a model or adapter.

    Raises:
        FileNotFoundError: It is neither a folder nor in the hub's local cache.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    try:
        return Path(snapshot_download(path, revision=revision, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError) as error:
        at = "" if revision is None else f" --revision {revision}"
        raise FileNotFoundError(
            f"{path} is no folder, and not in the local cache of the hub; fetch it first: hf download {path}{at}"
        ) from error


def skeleton_of(folder: Path) -> nn.Module | None:
    """The model of a folder on the meta device; None where its class is not one of transformers'."""
    # said outright: where it is not, transformers asks on the terminal whether to run the model's own code
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except ValueError:
        return None
    kind = getattr(transformers, _class_name(config.to_dict()), None)
    if kind is None:
        return None
    with torch.device("meta"):
        return kind(config).eval()


def architecture_of(folder: Path) -> Architecture:
    """What the model class of a folder says of its tensors; nothing where transformers does not know it."""
    return _architecture(folder, (folder / CONFIG).stat().st_mtime_ns)


@functools.lru_cache(maxsize=8)
def _architecture(folder: Path, changed: int) -> Architecture:
    skeleton = skeleton_of(folder)
    return Architecture() if skeleton is None else Architecture.of(skeleton)


def _class_name(config: Mapping[str, Any]) -> str:
    return (config.get("architectures") or [""])[0]

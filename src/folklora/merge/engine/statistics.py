"""Statistics that models bring to a merge: in which file, and under which name, those of a tensor are."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from folklora.merge.engine.checkpoints import read_header, read_tensor

# what `folklora.calibrate` calls what the methods take
_KINDS = {"gram": "covariance"}


def find(argument: str, files: Sequence[str | None], names: Sequence[str], prefix: str, required: bool) -> list[str]:
    """The names of one tensor's statistics in the models' files; none where no model has one and none is required.

    A file holds a tensor under the weight's own name, or is one of `folklora.Statistics`, by layer and kind. Those of
    a weight are for it as a matrix [out, in], however the model stores it.

    Args:
        argument: The statistic, such as "gram".
        files: The models' files.
        names: The weight's stored name in each model.
        prefix: Of the names, which some files leave out.
        required: Whether the method needs it for every tensor.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Some models have it and others do not, or it is required.
    """
    pairs = zip(files, names, strict=True)
    found = [None if file is None else _find(argument, file, name, prefix) for file, name in pairs]
    if all(key is not None for key in found):
        return found
    if required or any(key is not None for key in found):
        at = found.index(None)
        where = files[at] or "a model without a file for it"
        raise ValueError(f"{where} holds no {argument} for {names[at]}")
    return []


def read(files: Sequence[str], keys: Sequence[str]) -> list[Tensor]:
    """The statistics that `find` found."""
    return [read_tensor(Path(file), key) for file, key in zip(files, keys, strict=True)]


def _find(argument: str, file: str, name: str, prefix: str) -> str | None:
    if not Path(file).is_file():
        raise FileNotFoundError(f"there are no statistics in {file}")
    names, places = _contents(Path(file), Path(file).stat().st_mtime_ns)
    forms = [name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"]
    for form in forms:
        if form in names:
            return form
        kinds = places.get(form.removesuffix(".weight"), {})
        key = kinds.get(argument) or kinds.get(_KINDS.get(argument, ""))
        if key is not None:
            return key
    return None


@functools.lru_cache(maxsize=64)
def _contents(file: Path, changed: int) -> tuple[frozenset[str], dict[str, dict[str, str]]]:
    names = frozenset(read_header(file))
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata() or {}
    return names, json.loads(metadata["layers"]) if "layers" in metadata else {}

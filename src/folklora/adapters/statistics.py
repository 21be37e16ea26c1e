"""What calibration finds of a model's layers, by layer and kind; saved and loaded as safetensors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from folklora.stream.files import replacing

COVARIANCE, GRADIENT, FISHER = KINDS = ("covariance", "gradient", "fisher")
_FORMAT = "folklora statistics 1"


def shape_of(kind: str, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape that a kind of statistic has for a weight of `shape` (out, in)."""
    return (shape[1], shape[1]) if kind == COVARIANCE else tuple(shape)


@dataclass(frozen=True, eq=False)
class Statistics(Mapping[str, Mapping[str, Tensor]]):
    """Statistics of a model's layers: `statistics[layer][kind]` is a tensor.

    "covariance" is [in, in], "gradient" and "fisher" are [out, in]; `folklora.calibrate` says what they hold. Layers
    that read one input hold one and the same covariance tensor, in memory and in the file. Statistics are not changed
    once they are made, so a deep copy is the object itself: copies of a configuration share them.

    Args:
        layers: Layer name → kind → tensor.
    """

    layers: dict[str, dict[str, Tensor]]

    def __getitem__(self, layer: str) -> Mapping[str, Tensor]:
        return self.layers[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __deepcopy__(self, memo: Any) -> Statistics:
        return self

    def to(self, device: torch.device | str) -> Statistics:
        """The same statistics on a device; what layers share stays shared."""
        moved = {id(value): value.to(device) for found in self.layers.values() for value in found.values()}
        return Statistics(
            {layer: {kind: moved[id(value)] for kind, value in found.items()} for layer, found in self.layers.items()}
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file: it is there whole, or not at all.

        Raises:
            OSError: It cannot be written.
        """
        first: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        places: dict[str, dict[str, str]] = {}
        for layer, found in self.layers.items():
            for kind, value in found.items():
                key = first.setdefault(id(value), f"{layer}.{kind}")
                tensors[key] = value.detach().cpu().contiguous()
                places.setdefault(layer, {})[kind] = key
        try:
            with replacing(path) as temporary:
                save_file(tensors, temporary, metadata={"format": _FORMAT, "layers": json.dumps(places)})
        except SafetensorError as error:
            raise OSError(f"cannot write {path}: {error}") from error

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> Statistics:
        """Read what `save` wrote.

        Args:
            path: The file.
            device: Where the tensors go.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds no statistics, or is damaged.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"there are no statistics in {path}")
        try:
            with safe_open(path, framework="pt", device=str(device)) as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError(f"{path} holds no statistics that folklora.calibrate found")
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping
        except SafetensorError as error:
            raise ValueError(f"{path} is not in safetensors format, or is damaged: {error}") from error
        places = json.loads(metadata["layers"])
        return cls({layer: {kind: tensors[key] for kind, key in kinds.items()} for layer, kinds in places.items()})

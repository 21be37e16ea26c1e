"""Four domains of images, the network that learns them, and its plain training; for vision_stream.py."""

from __future__ import annotations

import io
import itertools
import math
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

DOMAINS = ("photo", "art_painting", "cartoon", "sketch")
CLASSES = 7
SIZE, CHANNELS, GROUPS = 32, (32, 64, 128), 8
BATCH, TRAIN, VALIDATION = 50, 0.6, 0.15
PRETRAINING_EPOCHS = 15
Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Domain:
    """A task: images [n, 3, 32, 32] in [-1, 1] and their classes, in three parts."""

    name: str
    train: Rows
    validation: Rows
    test: Rows
    labels: Sequence[str]


class Network(nn.Module):
    """Three convolutions and a head, without biases, random signs times √2 / √fan-in."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        widths = (3, *CHANNELS)
        pairs = itertools.pairwise(widths)
        self.convolutions = nn.ModuleList(nn.Conv2d(*pair, 3, stride=2, padding=1, bias=False) for pair in pairs)
        self.head = nn.Linear(CHANNELS[-1], classes, bias=False)
        for weight in self.parameters():
            weight.data = weight.data.sign() * math.sqrt(2 / weight[0].numel())

    def features(self, images: Tensor) -> Tensor:
        """[rows, 128]."""
        for convolution in self.convolutions:
            images = F.relu(F.group_norm(convolution(images), GROUPS))
        return images.mean((2, 3))

    def forward(self, images: Tensor) -> Tensor:
        """Logits [rows, classes]."""
        return self.head(self.features(images))


def read_images(file: Path) -> dict[str, tuple[Tensor, list[str]]]:
    """Images [n, 3, 32, 32] in [-1, 1] and classes by folder; files are named FOLDER/CLASS/NAME."""
    found: dict[str, list[tuple[np.ndarray, str]]] = {}
    with zipfile.ZipFile(file) as archive:
        for name in sorted(n for n in archive.namelist() if n.endswith(".jpg")):
            folder, label, _ = name.split("/")
            with Image.open(io.BytesIO(archive.read(name))) as image:
                small = np.asarray(image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BILINEAR))
            found.setdefault(folder, []).append((small, label))
    return {
        folder: (
            torch.from_numpy(np.stack([image for image, _ in rows])).permute(0, 3, 1, 2).float() / 127.5 - 1,
            [label for _, label in rows],
        )
        for folder, rows in found.items()
    }


def pacs(folder: Path) -> dict[str, Rows]:
    """Images and numbers of classes by domain."""
    found = read_images(folder / "pacs64.zip")
    return {name: (found[name][0], numbered(found[name][1])) for name in DOMAINS}


def numbered(labels: Sequence[str]) -> Tensor:
    names = sorted(set(labels))
    return torch.tensor([names.index(label) for label in labels])


def start(images: dict[str, Rows], seed: int, pretraining: Path | None) -> tuple[Network, list[Domain]]:
    """The frozen network and the split domains of a seed.

    Args:
        images: Of each domain.
        seed: Draws both.
        pretraining: The folder of the CIFAR-10 sample; None leaves the network random.
    """
    torch.manual_seed(seed)
    base = Network(CLASSES)
    if pretraining is not None:
        base.convolutions = pretrained(pretraining, seed).convolutions
    tasks = []
    for name, (pixels, labels) in images.items():
        order = torch.randperm(len(labels))
        ends = [int(TRAIN * len(labels)), int((TRAIN + VALIDATION) * len(labels))]
        parts = [(pixels[rows], labels[rows]) for rows in order.tensor_split(ends)]
        tasks.append(Domain(name, *parts, labels=[str(i) for i in range(CLASSES)]))
    return base.requires_grad_(False), tasks


def pretrained(folder: Path, seed: int) -> Network:
    """The network trained on the CIFAR-10 sample."""
    parts = {
        name: (pixels, numbered(labels))
        for name, (pixels, labels) in read_images(folder / "cifar10_sample.zip").items()
    }
    torch.manual_seed(seed)
    model = Network(10)
    train(model, model, parts["train"], PRETRAINING_EPOCHS, 3e-3, lambda: None)
    print(f"CIFAR-10: {accuracy(model, parts['test']):.1f} % after {PRETRAINING_EPOCHS} epochs", flush=True)
    return model


def train(
    model: nn.Module, net: nn.Module, rows: Rows, epochs: float, lr: float, penalty: Callable[[], Tensor | None]
) -> None:
    """One phase: Adam without weight decay, a cosine, half of the images mirrored."""
    images, labels = rows
    chosen = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(chosen, lr=lr)
    count = max(1, round(epochs * len(labels) / BATCH))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    model.train()
    for picked in batches(len(labels), count):
        mirrored = torch.rand(len(picked), 1, 1, 1) < 0.5
        batch = torch.where(mirrored, images[picked].flip(3), images[picked])
        loss, more = F.cross_entropy(net(batch), labels[picked]), penalty()
        optimizer.zero_grad()
        (loss if more is None else loss + more).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def batches(rows: int, count: int) -> Iterator[Tensor]:
    order = torch.empty(0, dtype=torch.long)
    for _ in range(count):
        if len(order) < BATCH:
            order = torch.cat([order, torch.randperm(rows)])
        yield order[:BATCH]
        order = order[BATCH:]


@torch.no_grad()
def accuracy(net: nn.Module, rows: Rows) -> float:
    return 100 * float((net(rows[0]).argmax(1) == rows[1]).double().mean())

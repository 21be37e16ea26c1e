"""Routers: from a text's features to how much each task's part counts in its answer."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Kind = Literal["mlp", "linear", "nearest"]


class Router(nn.Module):
    """g [rows, T], of sum 1 in each row, from features z [rows, d].

    - "mlp", Twin-Merging's: g = softmax(MLP(z)), the MLP of d, 2d, 2d, T numbers, with batch normalisation, leaky ReLU
      and dropout after each hidden layer.
    - "linear": g = softmax(W ẑ + b), z standardised over the training rows as they pass (ours).
    - "nearest": g is one-hot at the task whose mean feature is nearest to z; nothing is trained (ours).

    Args:
        kind: "mlp", "linear" or "nearest".
        width: d.
        tasks: T.
        dropout: Of the MLP.

    Raises:
        ValueError: There is no such kind, or the dropout is no probability.
    """

    def __init__(self, kind: Kind, width: int, tasks: int, dropout: float = 0.5) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise ValueError(f"a router is {', '.join(get_args(Kind))}, not {kind!r}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1, not {dropout}")
        self.kind, self.width, self.tasks = kind, width, tasks
        if kind == "nearest":
            self.register_buffer("means", torch.zeros(tasks, width))
        elif kind == "linear":
            self.layers = nn.Sequential(nn.BatchNorm1d(width, affine=False), nn.Linear(width, tasks))
        else:
            self.layers = nn.Sequential(
                *_hidden(width, 2 * width, dropout),
                *_hidden(2 * width, 2 * width, dropout),
                nn.Linear(2 * width, tasks),
            )

    def forward(self, features: Tensor) -> Tensor:
        """Logits [rows, T]; of "nearest" the negative squared distances."""
        if self.kind == "nearest":
            return -torch.cdist(features, self.means).square()
        return self.layers(features)

    @torch.no_grad()
    def weights(self, features: Tensor) -> Tensor:
        """g [rows, T], each row's whatever the others are."""
        self.eval()
        logits = self.to(features.device)(features.float())
        if self.kind == "nearest":
            return F.one_hot(logits.argmax(-1), self.tasks).float()
        return logits.softmax(-1)

    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """The share of rows in which their own task has the largest weight."""
        return float((self.weights(features).argmax(-1) == labels).float().mean())


def fit_router(
    router: Router,
    features: Tensor,
    labels: Tensor,
    *,
    epochs: int = 50,
    learning_rate: float = 5e-4,
    batch_size: int = 256,
    held_out: float = 0.1,
    seed: int = 0,
) -> float | None:
    """Train a router by cross-entropy on the task of each row, with AdamW; "nearest" takes its means.

    The epoch is kept that is best on rows that are held out. (The authors choose it on their test rows.)

    Args:
        router: What is trained.
        features: z [rows, d].
        labels: The task of each row, [rows], from 0.
        epochs: How often the rows are gone through.
        learning_rate: Of AdamW.
        batch_size: Rows a step, at least 2; up to twice as many where they do not divide.
        held_out: The share of each task's rows that is held out; 0 keeps the last epoch.
        seed: Of the split, the start, the order and dropout.

    Returns:
        The accuracy on the rows held out; None where there are none.

    Raises:
        ValueError: A number is out of its range, or a task has no row to train on.
    """
    if epochs < 1 or learning_rate <= 0 or batch_size < 2 or not 0 <= held_out < 1:
        raise ValueError(
            "a router needs epochs >= 1, learning_rate > 0, batch_size >= 2 and 0 <= held_out < 1, not "
            f"{epochs}, {learning_rate}, {batch_size} and {held_out}"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        train, kept = _split(labels, router.tasks, held_out)
        if router.kind == "nearest":
            means = [features[train][labels[train] == task].mean(0) for task in range(router.tasks)]
            router.means.copy_(torch.stack(means))
        else:
            _train(router, features, labels, (train, kept), epochs, learning_rate, batch_size)
    router.eval().requires_grad_(False)
    return router.accuracy(features[kept], labels[kept]) if len(kept) else None


def _train(
    router: Router,
    features: Tensor,
    labels: Tensor,
    rows: tuple[Tensor, Tensor],
    epochs: int,
    learning_rate: float,
    batch_size: int,
) -> None:
    train, kept = rows
    for module in router.layers:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    optimizer = torch.optim.AdamW(router.requires_grad_(True).parameters(), lr=learning_rate)
    best, state = -1.0, None
    for _ in range(epochs):
        router.train()
        # batch normalisation cannot be trained on one row
        for batch in train[torch.randperm(len(train))].tensor_split(max(1, len(train) // batch_size)):
            loss = F.cross_entropy(router(features[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        found = router.accuracy(features[kept], labels[kept]) if len(kept) else best
        # of equals the later one, which has learnt more
        if found >= best:
            best, state = found, copy.deepcopy(router.state_dict())
    router.load_state_dict(state)


def _split(labels: Tensor, tasks: int, held_out: float) -> tuple[Tensor, Tensor]:
    """Row numbers to train on and to hold out."""
    train, kept = [], []
    for task in range(tasks):
        own = (labels == task).nonzero().flatten()
        own = own[torch.randperm(len(own))]
        count = int(held_out * len(own))
        if len(own) - count < 2:
            raise ValueError(
                f"the router needs at least 2 texts of each task to learn from; task {task} has {len(own)}"
            )
        kept.append(own[:count])
        train.append(own[count:])
    return torch.cat(train), torch.cat(kept)


def _hidden(width: int, out: int, dropout: float) -> Sequence[nn.Module]:
    return nn.Linear(width, out), nn.BatchNorm1d(out), nn.LeakyReLU(), nn.Dropout(dropout)

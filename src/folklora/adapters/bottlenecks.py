"""The parts of bottleneck adapters: projections that are dense, sums of Kronecker products, or generated."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS = {"gelu": functools.partial(F.gelu, approximate="tanh"), "relu": F.relu}
"""What may stand between the two projections of an adapter."""


class Dense(nn.Module):
    """x -> x Wᵀ + b with W [out, in] and b [out].

    Args:
        columns: in.
        out: out.
        start: "zero", "normal" (W ~ N(0, 0.02²), b = 0: BART's), or "linear" (U(-1/√in, 1/√in): PyTorch's).
    """

    def __init__(self, columns: int, out: int, start: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(out, columns)), nn.Parameter(torch.zeros(out))
        if start == "normal":
            nn.init.normal_(self.weight, std=0.02)
        elif start == "linear":
            for parameter in (self.weight, self.bias):
                nn.init.uniform_(parameter, -1 / math.sqrt(columns), 1 / math.sqrt(columns))

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    @staticmethod
    def count(columns: int, out: int) -> int:
        """Trained parameters."""
        return columns * out + out


class Kronecker(nn.Module):
    """x -> x H + b with H = Σ_i C_i ⊗ W_i [in, out], C_i [n, n], W_i [in/n, out/n], and b [out].

    C ~ N(0, 0.01²), W Glorot-uniform with gain √2; W = L R of rank `rank` where that is given.

    Args:
        columns: in, a multiple of n.
        out: out, a multiple of n.
        start: "zero" makes W (or R) zero.
        n: Number of terms.
        rank: Rank of W_i; None trains it in full.
    """

    def __init__(self, columns: int, out: int, start: str, n: int, rank: int | None) -> None:
        super().__init__()
        self.C = nn.Parameter(nn.init.normal_(torch.empty(n, n, n), std=0.01))
        shapes = [(columns // n, out // n)] if rank is None else [(columns // n, rank), (rank, out // n)]
        self.W = nn.ParameterList(torch.zeros(n, *shape) for shape in shapes)
        for i, factor in enumerate(self.W):
            if start == "zero" and i == len(shapes) - 1:
                continue
            for term in factor:
                nn.init.xavier_uniform_(term, gain=math.sqrt(2))
        self.bias = nn.Parameter(torch.zeros(out))

    def matrix(self) -> Tensor:
        """H [in, out]."""
        W = self.W[0] if len(self.W) == 1 else self.W[0] @ self.W[1]
        return torch.einsum("iap,ibq->abpq", self.C, W).flatten(2).flatten(0, 1)

    @property
    def weight(self) -> Tensor:
        """Hᵀ [out, in]."""
        return self.matrix().T

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    @staticmethod
    def count(columns: int, out: int, n: int, rank: int | None) -> int:
        """Trained parameters."""
        factors = columns * out // n if rank is None else rank * (columns + out)
        return n**3 + factors + out


class Generated(nn.Module):
    """Weights of every adapter of a stack of blocks from embeddings of the task and the block (Hyperformer).

    e = LN(V₂ relu(V₁ [task ; block])), and for each kind of site ("ff", "self", "cross") linear maps of e give its
    W_d, b_d, W_u, b_u. All linear maps ~ N(0, 0.01²) without bias at the start; "zero" makes those of W_u, b_u zero.

    Args:
        width: d of the adapters.
        bottleneck: Their inner width b.
        tasks: Number of tasks.
        start: "zero" or "normal".
        sizes: Width of the embeddings, of the hidden layer, and of e.
    """

    def __init__(self, width: int, bottleneck: int, tasks: int, start: str, sizes: tuple[int, int, int]) -> None:
        super().__init__()
        self.width, self.bottleneck, self.start, self.sizes = width, bottleneck, start, sizes
        embedding, hidden, projected = sizes
        self.task = nn.Parameter(torch.randn(tasks, embedding))
        self.block = nn.ParameterDict()
        self.inner, self.outer = _generator(2 * embedding, hidden), _generator(hidden, projected)
        self.norm = nn.LayerNorm(projected, eps=1e-6)
        self.kinds = nn.ModuleDict()

    def make_room(self, block: str, kind: str) -> None:
        """Add what a site of this block and kind needs, if it is not there, as trainable as the rest."""
        device, trained = self.task.device, self.task.requires_grad
        if block not in self.block:
            self.block[block] = nn.Parameter(torch.randn(self.sizes[0], device=device), requires_grad=trained)
        if kind not in self.kinds:
            outs = {"down": self.width * self.bottleneck, "down_bias": self.bottleneck}
            outs |= {"up": self.width * self.bottleneck, "up_bias": self.width}
            maps = {name: _generator(self.sizes[2], out) for name, out in outs.items()}
            if self.start == "zero":
                nn.init.zeros_(maps["up"].weight)
                nn.init.zeros_(maps["up_bias"].weight)
            self.kinds[kind] = nn.ModuleDict(maps).to(device).requires_grad_(trained)

    def weights(self, task: int, block: str, kind: str) -> dict[str, Tensor]:
        """W_d [b, d] ("down"), b_d, W_u [d, b] ("up") and b_u of one adapter."""
        e = torch.cat([self.task[task], self.block[block]])
        e = self.norm(_of_vector(self.outer, torch.relu(_of_vector(self.inner, e))))
        made = {name: _of_vector(generator, e) for name, generator in self.kinds[kind].items()}
        made["down"] = made["down"].view(self.bottleneck, self.width)
        made["up"] = made["up"].view(self.width, self.bottleneck)
        return made

    @staticmethod
    def count(width: int, bottleneck: int, tasks: int, blocks: int, kinds: int, sizes: tuple[int, int, int]) -> int:
        """Trained parameters."""
        embedding, hidden, projected = sizes
        network = (2 * embedding + 1) * hidden + (hidden + 1) * projected + 2 * projected
        made = 2 * width * bottleneck + width + bottleneck
        return (tasks + blocks) * embedding + network + kinds * (projected + 1) * made


def _of_vector(layer: nn.Linear, e: Tensor) -> Tensor:
    # a matrix product with one vector rounds by where the matrix lies in memory, so that a loaded adapter would differ
    return (layer.weight * e).sum(-1) + layer.bias


def _generator(columns: int, out: int) -> nn.Linear:
    layer = nn.Linear(columns, out)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer

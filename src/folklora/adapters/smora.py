"""SMoRA: every rank of a LoRA is an expert, and each token uses a few of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from folklora.adapters.base import AdapterConfig, Update, kaiming_uniform, zeros
from folklora.factored import Factors

_EPSILON = 1e-9


@dataclass
class SMoRA(AdapterConfig):
    r"""Single-ranked mixture of experts LoRA: a router opens k of the r ranks for each token.

    A layer with frozen W [out, in] holds A [r, in], B [out, r], a router W_g [r/p, in] and a balance b [r/p].
        c = σ(W_g x)                                        a score for each block of p ranks; p = 1: each rank
        I = the k/p blocks with the largest c + b
        g_i = k v_i / Σ v,  v = c + b on I, 0 elsewhere     the gates of one token sum to k over its k ranks
        y = W x + bias + (α/k) B (g ⊙ (A x))                so the strength depends neither on k nor on r
        b ← b + u · sign(mean(load) - load)                 after each step; load_i = tokens that chose block i
    A starts Kaiming-uniform, B at 0, W_g as a linear layer's weight, b at 0: the first step sees the base model. A, B
    and W_g are trained, r (in + out) + (r/p) in parameters a weight; b gets no gradient. Every layer routes by itself.
    Scores, top-k and gates are computed in float32. All ranks are computed and the closed ones multiplied by 0, which
    gives the numbers of the authors' indexed kernel.

    No loss balances the load, b does. The load is that of all tokens whose gradient entered the step: over all
    micro-batches, forward passes and processes, once where a pass is recomputed (checkpointing), without padding
    where the attention mask is known, none in evaluation. In a distributed run every process has to step. The authors'
    code instead moves b in each forward pass by that pass alone (also in a recomputed one, a process by itself,
    padding included) and lets the optimizer move it too. Two further departures: with p > 1 whole blocks are chosen,
    where its top-k over ranks may split one; and the router reads x without dropout. At k = p one block is open, its
    gate is 1 whatever the router says, and W_g learns nothing.

    Source: Zhao et al., "Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning",
    KDD 2026, arXiv 2501.15103. The defaults are what the authors trained with (r = 64, k = 8, α = 16, u = 1e-5).

    When to choose:
        One adapter has to serve several kinds of data that disturb each other, and nobody says which is which. On
        one homogeneous task a LoRA does as well and can be merged; this cannot, since every token has its own gates.

    Equation:
        c = \sigma(W_g x), \quad I = \operatorname{top}_k(c + b)
        g_i = k \, \frac{c_i + b_i}{\sum_{j \in I} (c_j + b_j)} \ (i \in I), \quad g_i = 0 \ (i \notin I)
        y = W x + \frac{\alpha}{k} \sum_{i \in I} g_i \, B_{:,i} \, (A_{i,:} \, x)
        b_i \leftarrow b_i + u \, \operatorname{sign}\left(\overline{n} - n_i\right)

    Example:
        import torch
        from peft import get_peft_model
        from folklora import SMoRA, tiny

        model = get_peft_model(tiny.llama(), SMoRA(r=16, k=4, target_modules=["q_proj", "v_proj"]))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        batch = tiny.batch()
        model.train()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()  # moves the balance as well

    Args:
        r: Rank, the number of experts; a multiple of p.
        k: Ranks that are open for a token; a multiple of p. None takes r/8 (the paper's 8 of 64), at least 2.
        alpha: α of α/k.
        p: Ranks a block, which open together; 1 is SMoRA, q is a mixture of LoRAs of rank q.
        balance_rate: u, the step of the balance; 0 leaves it at 0.
        bias_in_gate: Whether b enters the gates too, as in the authors' code, or the choice alone.
    """

    method: str = "smora"
    r: int = 64
    k: int | None = None
    alpha: float = 16.0
    p: int = 1
    balance_rate: float = 1e-5
    bias_in_gate: bool = True

    paper: ClassVar[str] = "Zhao et al. 2026, arXiv 2501.15103"
    trains: ClassVar[str] = "A, B and a router over the ranks"
    layer_kinds: ClassVar[frozenset[str]] = frozenset({"linear"})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_rank(self.r)
        if not isinstance(self.p, int) or self.p < 1 or self.r % self.p:
            raise ValueError(f"p must be a whole number that divides the rank r = {self.r}, not {self.p!r}")
        k = self.k
        if k is not None and (not isinstance(k, int) or not 1 <= k <= self.r or k % self.p):
            raise ValueError(f"k must be a multiple of p = {self.p} between {self.p} and r = {self.r}, not {k!r}")
        if self.balance_rate < 0:
            raise ValueError(f"balance_rate must be at least 0, not {self.balance_rate}")

    @property
    def blocks(self) -> int:
        """How many blocks of p ranks there are."""
        return self.r // self.p

    @property
    def open_blocks(self) -> int:
        """How many of them are open for a token."""
        return min(self.blocks, max(2, self.blocks // 8)) if self.k is None else self.k // self.p

    def check(self, shape: tuple[int, int], name: str) -> list[str]:
        """More open ranks than the weight has; closed ones may well be more."""
        limit, k = min(shape), self.open_blocks * self.p
        if k > limit:
            return [f"k = {k} open ranks are above {limit}, the rank of layer '{name}' with weight {list(shape)}"]
        return []

    def update(self, weight: Tensor) -> SMoRAUpdate:
        """A and the router Kaiming-uniform, B and the balance zero."""
        out, columns = weight.shape
        A, router = kaiming_uniform(self.r, columns, weight), kaiming_uniform(self.blocks, columns, weight)
        return SMoRAUpdate(A, zeros(out, self.r, like=weight), router, self)

    def empty(self, shape: tuple[int, int]) -> SMoRAUpdate:
        """The same shapes, zeros."""
        out, columns = shape
        return SMoRAUpdate(zeros(self.r, columns), zeros(out, self.r), zeros(self.blocks, columns), self)

    def trainable_count(self, shape: tuple[int, int]) -> int:
        """r (in + out) + (r/p) in."""
        return self.r * sum(shape) + self.blocks * shape[1]


class SMoRAUpdate(Update):
    """A [r, in], B [out, r] and router [r/p, in] trained, balance [r/p] moved after each step."""

    frozen: ClassVar[frozenset[str]] = frozenset({"balance"})
    stepped: ClassVar[frozenset[str]] = frozen
    gated: ClassVar[bool] = True
    counts_passes: ClassVar[bool] = True

    def __init__(self, A: nn.Parameter, B: nn.Parameter, router: nn.Parameter, config: SMoRA) -> None:
        super().__init__()
        self.A, self.B, self.router = A, B, router
        self.balance = zeros(config.blocks, like=A, requires_grad=False)
        self.config = config
        # what this process saw since the last step: neither saved nor shared before the step, so no buffer, which
        # data-parallel training would overwrite with the first process's
        self.load = torch.zeros(config.blocks, dtype=torch.int64, device=A.device)

    def factors(self, x: Tensor | None = None, mask: Tensor | None = None) -> Factors:
        """(A, α/k g, B); s is 0 on all but k ranks of each token."""
        if x is None:
            raise ValueError("SMoRA's update depends on the layer's input, and none was given")
        chosen, gates = self.route(x)
        A = self.A
        if self.training:
            if self.load.device != x.device:
                self.load = self.load.to(x.device)
            A = _Counted.apply(A, self._count(chosen, x, mask), self.load)
        # the gates sum to k/p over blocks, and to k over ranks
        s = gates * (self.config.alpha / (self.config.open_blocks * self.config.p))
        return Factors(A, s.to(x.dtype).repeat_interleave(self.config.p, dim=-1), self.B)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen blocks [..., k/p] of each input [..., in] and the gates [..., r/p] of all blocks, float32."""
        logits = F.linear(x, self.router.to(x.dtype))
        scores = torch.sigmoid(logits.to(torch.promote_types(logits.dtype, torch.float32)))
        biased = scores + self.balance
        chosen = biased.detach().topk(self.config.open_blocks, dim=-1).indices
        value = (biased if self.config.bias_in_gate else scores).gather(-1, chosen)
        value = self.config.open_blocks * value / (value.sum(-1, keepdim=True) + _EPSILON)
        return chosen, torch.zeros_like(scores).scatter(-1, chosen, value)

    def _count(self, chosen: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        """How many tokens chose each block, [r/p]."""
        known = mask is not None and mask.shape == x.shape[:-1]
        tokens = (mask != 0).to(torch.int64) if known else torch.ones_like(chosen[..., 0])
        counts = torch.zeros(self.config.blocks, dtype=torch.int64, device=x.device)
        return counts.scatter_add(0, chosen.flatten(), tokens.unsqueeze(-1).expand_as(chosen).flatten())

    def after_step(self) -> None:
        """b += u sign(mean(load) - load), over all processes; then the load starts at 0 again."""
        load = self.load.to(self.balance.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(load)
        # in whole numbers, so that what is exactly the mean counts as that
        self.balance.add_(torch.sign(load.sum() - len(load) * load), alpha=self.config.balance_rate)
        self.load = torch.zeros_like(load)


class _Counted(torch.autograd.Function):
    """Hand a parameter on; add `counts` to `load` when its gradient comes.

    So a pass counts if a step learns from it, and once: a forward pass that is computed again for the backward pass
    is not differentiated a second time.
    """

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, counts: Tensor, load: Tensor) -> Tensor:
        # not saved for backward, which refuses what another pass has added to since
        ctx.counts, ctx.load = counts, load
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.load.add_(ctx.counts)
        return grad, None, None

"""The kernel that every adapter shares: a linear layer plus an update in factors.

    y = W x + b + B (s ⊙ (A x))            A: [r, in]   s: [r] or [..., r]   B: [out, r]

`Factors` is (A, s, B) with its algebra; `factored_linear` is the layer as one autograd function. Imports torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from folklora.fused import products, sum_of_products


@dataclass(frozen=True)
class Factors:
    """An update of rank r of a weight [out, in], as ΔW = B diag(s) A.

    Args:
        A: [r, in], floating point.
        s: A number, [r], or [..., r] where the leading dimensions broadcast with those of the layer's input: then
            the update depends on the input and has no dense form.
        B: [out, r].
    """

    A: Tensor
    s: Tensor | float
    B: Tensor

    @property
    def rank(self) -> int:
        """The number r of rank-one terms."""
        return self.A.shape[0]

    @property
    def gated(self) -> bool:
        """Whether s differs from one input to the next."""
        return isinstance(self.s, Tensor) and self.s.dim() > 1

    def vector(self) -> Tensor:
        """s as a tensor [r] or [..., r], whatever it was given as."""
        if isinstance(self.s, Tensor):
            return self.s
        return self.A.new_full((self.rank,), float(self.s))

    def folded(self) -> Tensor:
        """A, or diag(s) A where s is a vector: no s of the length of the input is needed then. [r, in]"""
        return self.A if self.gated or not isinstance(self.s, Tensor) else self.A * self.s.unsqueeze(-1)

    def scale(self, factor: Tensor | float) -> Factors:
        """ΔW times a number, or times a gate that broadcasts with s."""
        if isinstance(self.s, Tensor) or isinstance(factor, Tensor):
            return replace(self, s=self.vector() * factor)
        return replace(self, s=self.s * factor)

    def dense(self) -> Tensor:
        """ΔW = B diag(s) A, [out, in], in the precision of the factors.

        Raises:
            ValueError: s depends on the input, so that no single ΔW exists.
        """
        self._refuse_gate("dense form")
        precise = torch.promote_types(self.A.dtype, self.B.dtype)
        return (self.B * self.s).to(precise) @ self.A.to(precise)

    def to_lora(self) -> tuple[Tensor, Tensor]:
        """The same update as a plain LoRA pair (A [r, in], B [out, r]) with scaling 1: s is folded into B.

        Raises:
            ValueError: s depends on the input.
        """
        self._refuse_gate("plain LoRA form")
        return self.A, self.B * self.s

    def compact(self) -> Factors:
        """The same update in as few terms as its form shows: none whose s is 0, and at most min(out, in).

        Above min(out, in) terms, one factor is ΔW itself and the other the identity; nothing is decomposed.

        Raises:
            ValueError: s depends on the input.
        """
        self._refuse_gate("compact form")
        used = self
        if isinstance(self.s, Tensor) and not self.s.all():
            keep = self.s.nonzero().flatten()
            used = Factors(self.A[keep], self.s[keep], self.B[:, keep])
        out, columns = self.B.shape[0], self.A.shape[1]
        if used.rank <= min(out, columns):
            return used
        whole = used.dense()
        if columns <= out:
            return Factors(torch.eye(columns).to(whole), 1.0, whole)
        return Factors(whole, 1.0, torch.eye(out).to(whole))

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """U [out, t], S [t] descending and Vᵀ [t, in] of ΔW in float64, t = min(r, out, in), without building ΔW.

        B diag(s) = Q_b R_b and Aᵀ = Q_a R_a, then the singular value decomposition of the small matrix R_b R_aᵀ.

        Raises:
            ValueError: s depends on the input.
        """
        self._refuse_gate("decomposition")
        q_b, r_b = torch.linalg.qr((self.B * self.s).double())
        q_a, r_a = torch.linalg.qr(self.A.double().T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        return q_b @ u, s, vh @ q_a.T

    def truncate(self, rank: int) -> Factors:
        """The best approximation of ΔW of a lower rank, without building ΔW.

        Args:
            rank: The rank to keep; at least 1. `self.rank` or more returns the factors unchanged; the result's
                rank is at most min(out, in).

        Raises:
            ValueError: The rank is below 1, or s depends on the input.
        """
        self._refuse_gate("truncation")
        if rank < 1:
            raise ValueError(f"cannot truncate to rank {rank}: the rank must be at least 1")
        if rank >= self.rank:
            return self
        U, S, Vh = self.svd()
        return Factors(Vh[:rank].to(self.A), S[:rank].to(self.A), U[:, :rank].to(self.B))

    def _refuse_gate(self, what: str) -> None:
        if self.gated:
            raise ValueError(f"this update has no {what}: its s depends on the input (shape {tuple(self.s.shape)})")


def concatenate(parts: Sequence[Factors]) -> Factors:
    """The sum of several updates as one update whose rank is the sum of theirs.

    Args:
        parts: At least one update of the same [out, in]; gates must broadcast with one another.

    Returns:
        Factors with A stacked by rows, s and B by columns.
    """
    if len(parts) == 1:
        return parts[0]
    A, B = torch.cat([part.A for part in parts]), torch.cat([part.B for part in parts], dim=1)
    numbers = {part.s for part in parts if not isinstance(part.s, Tensor)}
    if len(numbers) == 1 and not any(isinstance(part.s, Tensor) for part in parts):
        return Factors(A, numbers.pop(), B)
    vectors = [part.vector() for part in parts]
    if any(part.gated for part in parts):
        leading = torch.broadcast_shapes(*(v.shape[:-1] for v in vectors))
        vectors = [v.expand(*leading, v.shape[-1]) for v in vectors]
    return Factors(A, torch.cat(vectors, dim=-1), B)


def factored_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: Factors,
    dropout: float = 0.0,
    shared: SharedInput | None = None,
) -> Tensor:
    """A linear layer with an update in factors, forward and backward fused.

    y = z Bᵀ + b, then y += x Wᵀ in the accumulator of the base's own product, where z = s ⊙ (x Aᵀ). The input
    gradient goes the same way: (s ⊙ (g B)) A, then += g W. An s that is the same for all inputs is multiplied into A,
    which is small; its gradient comes from that of s A. Activations are never cast, and copied for dropout alone,
    where a byte an element is kept for the backward pass; the small factors are cast to the base's dtype, and their
    gradients come back in their own (float32 masters over a bfloat16 base). Under autocast the input and the base
    weight are taken in autocast's dtype, as `torch.nn.functional.linear` does.

    Args:
        x: [..., in], in the base weight's dtype unless autocast is on.
        weight: [out, in]; receives a gradient only if it asks for one.
        bias: [out] or None.
        factors: The update; s may be gated by the input.
        dropout: Probability of dropping an element of the update's input; the base reads x whole.
        shared: What `share_input` gave for this x and these factors, if layers share x; then without dropout.

    Returns:
        [..., out].
    """
    dtype = _autocast_dtype(x)
    if shared is not None:
        x = shared.x
    elif dtype is not None:
        x = x.to(dtype)
    if dtype is not None:
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    s = factors.s
    if factors.gated:
        s = s.expand(*x.shape[:-1], factors.rank)
    elif isinstance(s, Tensor):
        s = 1.0
    if shared is None:
        inputs = (x, weight, bias, factors.folded(), s, factors.B, dropout, None, None)
    else:
        inputs = (x, weight, bias, None, s, factors.B, 0.0, shared.h, shared.gradient)
    # an autograd function costs time even where nothing is recorded, as in generation
    return _FactoredLinear.apply(*inputs) if torch.is_grad_enabled() else _product(*inputs[:-1])[0]


@dataclass(frozen=True)
class SharedInput:
    """What layers that read one x have together: h = A x, and one buffer for the gradient of x.

    Args:
        x: The input in the dtype that is computed in.
        h: [positions, r], this layer's part.
        gradient: Where each layer adds its gradient of x.
    """

    x: Tensor
    h: Tensor
    gradient: GradientBuffer


class GradientBuffer:
    """The sum of several layers' input gradients, made in the accumulators of their products.

    Autograd would write each layer's gradient of x and then add them up. Here each layer adds into one tensor, and the
    node that made their shared h, which runs after all of them, takes it. What another backward pass left behind (one
    that never reached that node) is dropped.
    """

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._pass = -1

    def add(self, g: Tensor, weight: Tensor) -> None:
        """Sum += g W."""
        current = torch._C._current_graph_task_id()
        if self._sum is None or self._pass != current:
            self._sum, self._pass = g @ weight, current
        else:
            self._sum.addmm_(g, weight)

    def take(self, g: Tensor, weight: Tensor) -> Tensor:
        """Sum + g W; empties the buffer."""
        self.add(g, weight)
        total, self._sum = self._sum, None
        return total


def share_input(x: Tensor, parts: Sequence[Factors]) -> list[SharedInput]:
    """One product h = A x for several layers that read the same x, for `factored_linear(..., shared=...)` of each.

    Args:
        x: [..., in].
        parts: The layers' factors; their A are [r_i, in].

    Returns:
        One a layer, in order. Each may be used once.
    """
    dtype = _autocast_dtype(x)
    x, gradient = x if dtype is None else x.to(dtype), GradientBuffer()
    factors = [part.folded() for part in parts]
    if torch.is_grad_enabled():
        parts_of_h = _SharedProduct.apply(x, gradient, *factors)
    else:
        parts_of_h = (x.reshape(-1, x.shape[-1]) @ torch.cat(factors).to(x.dtype).T).split([len(A) for A in factors], 1)
    return [SharedInput(x, h, gradient) for h in parts_of_h]


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes in; None where it is off."""
    device = x.device.type
    # autocast leaves float64 alone, and knows nothing of the meta device
    if x.dtype == torch.float64 or device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def factored_update(x: Tensor, factors: Factors) -> Tensor:
    """The update alone, B (s ⊙ (A x)), where the base layer is not a plain weight (quantised, hooked, convolution).

    Args:
        x: [..., in].
        factors: The update.

    Returns:
        [..., out] in the dtype of x, or autocast's.
    """
    h = F.linear(x, factors.A.to(x.dtype))
    s = factors.s.to(h.dtype) if isinstance(factors.s, Tensor) else factors.s
    return F.linear(h * s, factors.B.to(h.dtype))


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor | None,
    s: Tensor | float,
    B: Tensor,
    dropout: float,
    h: Tensor | None,
) -> tuple[Tensor, tuple[Tensor | None, ...], float]:
    """The layer's output, what its gradient needs, and the number that went into the small factors.

    Args: those of `factored_linear`, with A None and h [positions, r] where h is shared.
    """
    dtype = x.dtype
    rows, b = x.reshape(-1, x.shape[-1]), B.to(dtype)
    # the rows in numbers: of rank 0, -1 could be any
    gate = s.to(dtype).reshape(rows.shape[0], s.shape[-1]) if isinstance(s, Tensor) else None
    # a number goes into the small factors, so that nothing of the activations' length is multiplied with it
    constant = 1.0 if gate is not None else s
    a, kept = None, None
    if A is not None:
        a = (A * constant).to(dtype) if constant != 1 else A.to(dtype)
        source, kept = torch.native_dropout(rows, dropout, True) if dropout else (rows, None)
        h = source @ a.T
    elif constant != 1:
        b = (B * constant).to(dtype)
    z = h if gate is None else h * gate
    y = sum_of_products(z, b.T, rows, weight.T, bias)
    return y.view(*x.shape[:-1], weight.shape[0]), (rows, weight, a, b, h, gate, kept), constant


class _FactoredLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        *operands, gradient = inputs
        x, _, _, A, s, B, dropout, _ = operands
        y, saved, constant = _product(*operands)
        ctx.save_for_backward(*saved)
        ctx.rise, ctx.gradient, ctx.constant = 1 / (1 - dropout), gradient, constant
        ctx.like = (x.shape, A.dtype if A is not None else None, B.dtype, s.shape if isinstance(s, Tensor) else None)
        ctx.s_dtype = s.dtype if isinstance(s, Tensor) else None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, a, b, h, gate, kept = ctx.saved_tensors
        shape, a_dtype, b_dtype, s_shape = ctx.like
        needs_x, needs_w, needs_bias, needs_a, needs_s, needs_b, _, needs_h, _ = ctx.needs_input_grad
        g = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_w = grad_bias = grad_a = grad_s = grad_b = None
        if needs_b:
            gz, grad_b = products(g, b, h if gate is None else h * gate)
            # z was made of s A, or b of s B: what is left of s is in the other
            grad_b = grad_b.to(b_dtype) if a is not None or ctx.constant == 1 else grad_b.to(b_dtype) * ctx.constant
        else:
            gz = g @ b
        gh = gz if gate is None else gz * gate
        if needs_x and ctx.gradient is None:
            if kept is None:
                grad_x = sum_of_products(gh, a, g, weight)
            else:
                grad_x = _dropped(gh @ a, kept, ctx.rise).addmm_(g, weight)
            grad_x = grad_x.view(shape)
        elif needs_x:
            ctx.gradient.add(g, weight)
        if needs_w:
            grad_w = g.T @ rows
        if needs_bias:
            grad_bias = g.sum(0)
        if needs_a:
            grad_a = (gh.T @ _dropped(rows, kept, ctx.rise)).to(a_dtype)
            grad_a = grad_a if ctx.constant == 1 else grad_a * ctx.constant
        if needs_s:
            grad_s = (gz.to(ctx.s_dtype) * h.to(ctx.s_dtype)).view(s_shape)
        return grad_x, grad_w, grad_bias, grad_a, grad_s, grad_b, None, gh if needs_h else None, None


class _SharedProduct(torch.autograd.Function):
    """x [..., in], A_1 [r_1, in], ..., A_n → h_1 [positions, r_1], ..., h_n in one product with the stacked A."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: GradientBuffer, *parts: Tensor) -> tuple[Tensor, ...]:
        rows, a = x.reshape(-1, x.shape[-1]), torch.cat(parts).to(x.dtype)
        ctx.save_for_backward(rows, a)
        ctx.gradient, ctx.shape = gradient, x.shape
        ctx.ranks, ctx.dtypes = [part.shape[0] for part in parts], [part.dtype for part in parts]
        return tuple((rows @ a.T).split_with_sizes(ctx.ranks, dim=1))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, a = ctx.saved_tensors
        gh = torch.cat(grads, dim=1)
        grad_x = ctx.gradient.take(gh, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        wanted = ctx.needs_input_grad[2:]
        grad_a = (gh.T @ rows).split_with_sizes(ctx.ranks) if any(wanted) else [None] * len(wanted)
        grad_a = [g.to(d) if need else None for g, d, need in zip(grad_a, ctx.dtypes, wanted, strict=True)]
        return grad_x, None, *grad_a


def _dropped(rows: Tensor, kept: Tensor | None, rise: float) -> Tensor:
    return rows if kept is None else torch.ops.aten.native_dropout_backward(rows, kept, rise)

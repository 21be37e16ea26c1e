"""A feed-forward layer cut into experts of equal size, of which each token has a few: ways to the same sum.

The layer's hidden units lie in the experts' order, expert e in the rows e f/E ... (e + 1) f/E of W_g and W_u and in
the same columns of W_d. Every way reads these where they lie, and makes no copy of a weight.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from folklora import gathered
from folklora.adapters.host.feed_forward import FeedForward

# multiplications left out from which on a grouped product pays for the order of its tokens, as measured on an H200
_WORTH = 3e10


def routed(tokens: Tensor, chosen: Tensor, layer: FeedForward, experts: int) -> Tensor:
    """Σ over each token's experts of F_e, [tokens, d], in the way that is the fastest here.

    Args:
        tokens: [tokens, d].
        chosen: [tokens, K], numbers of experts, each at most once a token.
        layer: All experts, in their order.
        experts: E.
    """
    if torch.compiler.is_compiling():
        return masked(tokens, chosen, layer, experts)
    read = (tokens, layer.up, layer.down, layer.gate, layer.up_bias, layer.gate_bias)
    learns = torch.is_grad_enabled() and any(value is not None and value.requires_grad for value in read)
    # not a question of speed alone: no other way but this one waits for the device
    if not tokens.is_cuda or learns:
        return one_by_one(tokens, chosen, layer, experts)
    # each of them reads its experts' weights anew
    if chosen.numel() <= 2 * experts and all(gathered.fits(tokens, W) for W in _matrices(layer, experts)):
        return few(tokens, chosen, layer, experts)
    left_out = (len(tokens) - chosen.numel() / experts) * sum(W.numel() for W in _matrices(layer, experts))
    if left_out < _WORTH:
        return masked(tokens, chosen, layer, experts)
    return (grouped if _can_group(tokens, layer, experts) else one_by_one)(tokens, chosen, layer, experts)


def apart(tokens: Tensor, layer: FeedForward, experts: int) -> Tensor:
    """F_e for all experts, [tokens, E, d]."""

    def reduce(units: Tensor, down: Tensor) -> Tensor:
        own = units.unflatten(-1, (experts, -1)).transpose(0, 1)
        return (own @ down.unflatten(1, (experts, -1)).permute(1, 2, 0)).transpose(0, 1)

    return layer.sum(tokens, reduce=reduce)


def masked(tokens: Tensor, chosen: Tensor, layer: FeedForward, experts: int) -> Tensor:
    """The dense layer with the units of all other experts at zero."""
    others = ~opened(chosen, experts).unsqueeze(-1)

    def reduce(units: Tensor, down: Tensor) -> Tensor:
        return F.linear(units.unflatten(-1, (experts, -1)).masked_fill(others, 0).flatten(-2), down)

    return layer.sum(tokens, reduce=reduce)


def one_by_one(tokens: Tensor, chosen: Tensor, layer: FeedForward, experts: int) -> Tensor:
    """Each expert on its own tokens alone. It waits for the device to know how many they are."""
    rows, place, ends = _placed(chosen, experts)
    parts = rows.tensor_split(ends[:-1].tolist())
    size = len(layer.up) // experts
    found = [layer.part(slice(e * size, (e + 1) * size)).sum(tokens[own]) for e, own in enumerate(parts) if len(own)]
    return _returned(torch.cat(found), place)


def grouped(tokens: Tensor, chosen: Tensor, layer: FeedForward, experts: int) -> Tensor:
    """Each expert on its own tokens alone, in one product a matrix that finds on the device where they begin."""
    rows, place, ends = _placed(chosen, experts)
    own = torch.empty_like(rows).scatter_(0, place.flatten(), chosen.T.flatten())

    def expand(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = F.grouped_mm(x, weight.unflatten(0, (experts, -1)).mT, offs=ends)
        return found if bias is None else found + bias.unflatten(0, (experts, -1))[own]

    def reduce(units: Tensor, down: Tensor) -> Tensor:
        return F.grouped_mm(units, down.unflatten(1, (experts, -1)).permute(1, 2, 0), offs=ends)

    return _returned(layer.sum(tokens[rows], expand, reduce), place)


def few(tokens: Tensor, chosen: Tensor, layer: FeedForward, experts: int) -> Tensor:
    """Each token by itself, with the matrices of its experts: the others are not read."""
    own = chosen.flatten()

    def expand(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        found = gathered.products(x, weight.unflatten(0, (experts, -1)), own.unsqueeze(-1))
        return found if bias is None else found + bias.unflatten(0, (experts, -1))[own]

    def reduce(units: Tensor, down: Tensor) -> Tensor:
        return gathered.products(units, down.unflatten(1, (experts, -1)).transpose(0, 1), chosen)

    return layer.sum(tokens, expand, reduce)


def opened(chosen: Tensor, experts: int) -> Tensor:
    """The hard mask [..., E] of the chosen experts [..., K]: true K times."""
    return torch.zeros(*chosen.shape[:-1], experts, dtype=torch.bool, device=chosen.device).scatter(-1, chosen, True)


def _placed(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in the order of their experts.

    Returns:
        The numbers of the tokens [tokens K], expert after expert; where among them each token's K are [K, tokens]; and
        where each expert's end [E].
    """
    tokens, k = chosen.shape
    # one running sum over all pairs, expert after expert, counts the tokens before each: nothing is sorted
    count = opened(chosen, experts).T.flatten().cumsum(0, dtype=torch.int32).view(experts, tokens)
    place = count.gather(0, chosen.T).long() - 1
    numbers = torch.arange(tokens, device=chosen.device).repeat(k)
    rows = torch.empty_like(numbers).scatter_(0, place.flatten(), numbers)
    return rows, place, count[:, -1].contiguous()


def _returned(found: Tensor, place: Tensor) -> Tensor:
    # a gather, which unlike a scattered sum gives the same bits every time
    return found[place].sum(0)


def _matrices(layer: FeedForward, experts: int) -> list[Tensor]:
    """[E, out, in] each."""
    wide = [weight.unflatten(0, (experts, -1)) for weight in (layer.gate, layer.up) if weight is not None]
    return [*wide, layer.down.unflatten(1, (experts, -1)).transpose(0, 1)]


def _can_group(tokens: Tensor, layer: FeedForward, experts: int) -> bool:
    """Whether there is a grouped product that stays on the device, which asks for addresses in steps of 16 bytes."""
    if not hasattr(F, "grouped_mm") or not tokens.dtype == layer.up.dtype == torch.bfloat16:
        return False
    matrices = _matrices(layer, experts)
    steps = [stride * W.element_size() for W in matrices for stride in W.stride() if stride != 1]
    aligned = all(step % 16 == 0 for step in [*steps, *(W.data_ptr() for W in matrices)])
    return aligned and torch.cuda.get_device_capability(tokens.device) >= (9, 0)

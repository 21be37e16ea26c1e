"""Every way to the sum of a token's experts gives the same sum, and on a GPU none but one waits for the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from folklora import gathered
from folklora.adapters.host import routed as ways
from folklora.adapters.host.feed_forward import FeedForward
from folklora.adapters.host.routed import apart, few, grouped, masked, one_by_one, routed

# sizes in steps of 16 bytes of bfloat16, as grouped products on a GPU ask for
E, D, SIZE = 4, 24, 16
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: these ways are made for it")
HOPPER = hasattr(F, "grouped_mm") and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
WAYS = [
    masked,
    one_by_one,
    few,
    pytest.param(
        grouped, marks=pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this PyTorch has no grouped product")
    ),
]


def layer(dtype: torch.dtype, gate: bool = True, bias: bool = False, device: str = "cpu") -> FeedForward:
    generator = torch.Generator().manual_seed(0)
    shapes = ((E * SIZE, D), (D, E * SIZE), (E * SIZE, D), (E * SIZE,), (E * SIZE,))
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device) for shape in shapes]
    up, down, gated, up_bias, gate_bias = parts
    return FeedForward(
        F.silu,
        up,
        down,
        gated if gate else None,
        up_bias if bias else None,
        gate_bias if bias and gate else None,
    )


def choice(tokens: int, k: int) -> tuple[Tensor, Tensor]:
    """Tokens, and their experts, of which some have none."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, D, generator=generator, dtype=torch.float64)
    return x, torch.stack([torch.randperm(E, generator=generator)[:k] for _ in range(tokens)])


def formula(x: Tensor, chosen: Tensor, whole: FeedForward) -> Tensor:
    """Token by token in float64."""
    whole = FeedForward(whole.activation, *(None if t is None else t.double().cpu() for t in matrices(whole)))
    rows = []
    for token, own in zip(x.double().cpu(), chosen.tolist(), strict=True):
        rows.append(sum(whole.part(slice(e * SIZE, (e + 1) * SIZE)).sum(token) for e in own))
    return torch.stack(rows)


def matrices(whole: FeedForward) -> list[Tensor | None]:
    return [whole.up, whole.down, whole.gate, whole.up_bias, whole.gate_bias]


def assert_near(found: Tensor, expected: Tensor) -> None:
    """Within the rounding of W_g x, W_u x, u and y, and of the sums, which are float32's or more."""
    sums = (D + E * SIZE) ** 0.5 * torch.finfo(torch.float32).eps
    assert (found.double().cpu() - expected).norm() <= (4 * torch.finfo(found.dtype).eps + sums) * expected.norm()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("gate", "bias"), [(True, False), (True, True), (False, True)])
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 3), (2, 2), (37, 2), (9, 4)])
def test_every_way_is_the_formula(way: Callable[..., Tensor], gate: bool, bias: bool, tokens: int, k: int) -> None:
    x, chosen = choice(tokens, k)
    whole = layer(torch.float32, gate, bias)
    assert_near(way(x.float(), chosen, whole, E), formula(x.float(), chosen, whole))


def test_all_experts_apart_are_the_formula() -> None:
    x, _ = choice(7, 1)
    whole = layer(torch.float64, bias=True)
    found = apart(x, whole, E)
    for e in range(E):
        expected = formula(x, torch.full((7, 1), e), whole)
        torch.testing.assert_close(found[:, e], expected, rtol=0, atol=1e-11)


def test_weights_that_are_stored_the_other_way_round() -> None:
    x, chosen = choice(11, 2)
    whole = layer(torch.float32)
    expected = formula(x.float(), chosen, whole)
    turned = FeedForward(whole.activation, *(None if t is None else t.T.contiguous().T for t in matrices(whole)))
    for way in (masked, one_by_one, few):
        assert_near(way(x.float(), chosen, turned, E), expected)


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "k"), [(1, 1), (1, 3), (2, 1), (37, 2), (700, 1), (700, 3)])
def test_on_a_gpu_what_is_chosen_is_the_formula(dtype: torch.dtype, bias: bool, tokens: int, k: int) -> None:
    x, chosen = choice(tokens, k)
    x, chosen, whole = x.to(dtype).cuda(), chosen.cuda(), layer(dtype, bias=bias, device="cuda")
    names = [way for way in (masked, few, grouped) if way is not grouped or (HOPPER and dtype == torch.bfloat16)]
    expected = formula(x, chosen, whole)
    with torch.no_grad():
        for way in [*names, one_by_one, routed]:
            assert_near(way(x, chosen, whole, E), expected)
        assert torch.equal(routed(x, chosen, whole, E), routed(x, chosen, whole, E))


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("number", range(5))
def test_on_a_gpu_a_gradient_reaches_whatever_asks_for_one(number: int) -> None:
    x, chosen = choice(2, 1)
    x, chosen, whole = x.float().cuda(), chosen.cuda(), layer(torch.float32, bias=True, device="cuda")
    asking = matrices(whole)[number].requires_grad_()
    found, expected = (torch.autograd.grad(way(x, chosen, whole, E).sum(), asking)[0] for way in (routed, one_by_one))
    assert expected.norm() > 0
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@GPU
@pytest.mark.skipif(not HOPPER, reason="the grouped product that stays on the device needs Hopper or later")
@pytest.mark.parametrize(("tokens", "way"), [(1, "few"), (37, "masked"), (700, "grouped")])
def test_on_a_gpu_nothing_waits_for_the_device(tokens: int, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, chosen = choice(tokens, 2)
    x, chosen, whole = x.bfloat16().cuda(), chosen.cuda(), layer(torch.bfloat16, device="cuda")
    own, called = getattr(ways, way), []
    # between what 37 and 700 tokens of this small layer leave out
    monkeypatch.setattr(ways, "_WORTH", 1e6)
    monkeypatch.setattr(ways, way, lambda *args: called.append(way) or own(*args))
    with torch.no_grad():
        routed(x, chosen, whole, E)
        torch.cuda.set_sync_debug_mode("error")
        try:
            routed(x, chosen, whole, E)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert called == [way, way]


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("out", "width"), [(2048, 2048), (20, 600), (1030, 24)])
def test_matrices_are_read_where_they_lie(out: int, width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, width, generator=generator, dtype=torch.float64).to(dtype).cuda()
    W = torch.randn(out, 3, width, generator=generator, dtype=torch.float64).to(dtype).cuda().transpose(0, 1)
    for chosen in (torch.tensor([[2], [0], [2], [1], [0], [0]]), torch.tensor([[2, 0], [1, 0], [0, 1]])):
        assert gathered.fits(x, W)
        found = gathered.products(x, W, chosen.cuda())
        rows = x.double().view(*chosen.shape, width)
        expected = torch.einsum("nji,njoi->no", rows, W.double()[chosen.cuda()])
        # rounded once to its dtype, after a sum in float32 of as many products as there are
        bound = torch.finfo(dtype).eps + chosen.shape[1] * width**0.5 * torch.finfo(torch.float32).eps
        assert (found.double() - expected).norm() <= bound * expected.norm()

"""The kernel against the same formula composed of plain differentiable operations."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from folklora.factored import Factors, concatenate, factored_linear, factored_update

IN, OUT, RANK = 24, 20, 5
EPS32 = torch.finfo(torch.float32).eps
# rounding to nearest loses at most half of bfloat16's spacing
U16 = torch.finfo(torch.bfloat16).eps / 2
KINDS = ["number", "vector", "gate"]


def rand(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def make(
    kind: str = "vector",
    leading: tuple[int, ...] = (2, 3),
    bias: bool = True,
    dtype: torch.dtype = torch.float32,
    sizes: tuple[int, int, int] = (IN, OUT, RANK),
) -> tuple[Tensor, Tensor, Tensor | None, Factors]:
    """x, weight, bias and factors of ordinary size."""
    columns, out, r = sizes
    x, weight = rand(*leading, columns, seed=1, dtype=dtype), rand(out, columns, seed=2, dtype=dtype)
    b = rand(out, seed=3, dtype=dtype) if bias else None
    s = {
        "number": 1.7,
        "vector": rand(r, seed=4, dtype=dtype),
        "gate": rand(*leading, r, seed=5, dtype=dtype),
    }[kind]
    return x, weight, b, Factors(rand(r, columns, seed=6, dtype=dtype), s, rand(out, r, seed=7, dtype=dtype))


def composed(x: Tensor, weight: Tensor, bias: Tensor | None, f: Factors) -> Tensor:
    return F.linear(x, weight, bias) + F.linear(F.linear(x, f.A) * f.s, f.B)


def magnitude(x: Tensor, weight: Tensor, bias: Tensor | None, f: Factors) -> tuple[Tensor, Tensor]:
    """What rounding errors of the base's product and of the update's are relative to: both with absolute values."""
    absolute = [None if t is None else t.abs().double() for t in (x, weight, bias)]
    s = f.s.abs().double() if isinstance(f.s, Tensor) else abs(f.s)
    return F.linear(*absolute), F.linear(F.linear(absolute[0], f.A.abs().double()) * s, f.B.abs().double())


def leaves(*tensors: Tensor | float | None) -> list[Tensor]:
    return [t.requires_grad_() for t in tensors if isinstance(t, Tensor)]


def assert_same_to_float32(actual: Tensor, expected: Tensor) -> None:
    # three nested sums of at most 24 terms of ordinary size
    assert actual.dtype == torch.float32
    tolerance = 100 * EPS32 * float(expected.detach().abs().max())
    torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("train_weight", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_finite_differences(kind: str, bias: bool, train_weight: bool):
    x, weight, b, f = make(kind, (2, 2), bias, torch.float64, sizes=(4, 3, 2))
    inputs = leaves(x, f.A, f.B, f.s, b) + (leaves(weight) if train_weight else [])

    def run(*_: Tensor) -> Tensor:
        return factored_linear(x, weight, b, f)

    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (2, 3, 4)])
def test_values_and_all_gradients_equal_the_composed_formula(leading: tuple[int, ...], kind: str, bias: bool):
    x, weight, b, f = make(kind, leading, bias)
    mine = leaves(x, weight, b, f.A, f.s, f.B)
    exact = [t.detach().double().requires_grad_() for t in mine]
    s = exact[-2] if kind != "number" else f.s
    y = factored_linear(x, weight, b, f)
    expected = composed(exact[0], exact[1], exact[2] if bias else None, Factors(exact[2 + bias], s, exact[-1]))
    assert y.shape == (*leading, OUT)
    assert_same_to_float32(y, expected)
    direction = rand(*y.shape, seed=8)
    gradients = torch.autograd.grad(y, mine, direction)
    for actual, wanted in zip(gradients, torch.autograd.grad(expected, exact, direction.double()), strict=True):
        assert_same_to_float32(actual, wanted)


@pytest.mark.parametrize("shape", [(2, 3, RANK), (2, 1, RANK), (1, 3, RANK), (1, 1, RANK)])
def test_a_gate_broadcasts_and_gets_its_own_shape_of_gradient(shape: tuple[int, ...]):
    x, weight, b, f = make()
    gate = rand(*shape, seed=9).requires_grad_()
    exact = gate.detach().double().requires_grad_()
    y = factored_linear(x, weight, b, Factors(f.A, gate, f.B))
    expected = composed(x.double(), weight.double(), b.double(), Factors(f.A.double(), exact, f.B.double()))
    assert_same_to_float32(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    assert gate.grad.shape == shape
    assert_same_to_float32(gate.grad, exact.grad)


def test_gradient_reaches_a_gate_that_reads_the_input():
    x, weight, b, f = make()
    reader = rand(RANK, IN, seed=10)

    def gradients(dtype: torch.dtype, run) -> list[Tensor]:
        own = [t.detach().to(dtype).requires_grad_() for t in (x, reader, f.A, f.B)]
        gate = torch.softmax(own[0] @ own[1].T, dim=-1)
        y = run(own[0], weight.to(dtype), b.to(dtype), Factors(own[2], gate, own[3]))
        return [y, *torch.autograd.grad(y.square().sum(), own)]

    for actual, expected in zip(
        gradients(torch.float32, factored_linear), gradients(torch.float64, composed), strict=True
    ):
        assert_same_to_float32(actual, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_base_with_float32_masters(kind: str):
    x, weight, b, f = make(kind)
    x, weight, b = x.bfloat16().requires_grad_(), weight.bfloat16(), b.bfloat16()
    trained = leaves(f.A, f.s, f.B)
    y = factored_linear(x, weight, b, f)
    assert y.dtype == torch.bfloat16
    exact = [t.detach().double().requires_grad_() for t in (x, *trained)]
    s = exact[2] if kind != "number" else f.s
    expected = composed(exact[0], weight.double(), b.double(), Factors(exact[1], s, exact[-1]))
    base, update = magnitude(x, weight, b, f)
    # A, h, s, z, B and the update are rounded once each, the output once; a second order term is less than one more
    assert ((y.double() - expected).abs() <= U16 * (8 * update + 2 * base)).all()
    direction = rand(*y.shape, seed=8).bfloat16()
    gradients = torch.autograd.grad(y, [x, *trained], direction)
    wanted = torch.autograd.grad(expected, exact, direction.double())
    assert [g.dtype for g in gradients] == [torch.bfloat16] + [torch.float32] * len(trained)
    for actual, exactly in zip(gradients, wanted, strict=True):
        # the same roundings; sums of up to 24 terms of either sign are not far below their largest possible size
        assert (actual.double() - exactly).abs().max() <= 8 * U16 * exactly.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_equals_the_composed_formula_under_autocast(kind: str):
    x, weight, b, f = make(kind)
    trained = leaves(x, f.A, f.s, f.B)
    direction = rand(2, 3, OUT, seed=8).bfloat16()

    def run(function) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            y = function(x, weight, b, f)
        return [y, *torch.autograd.grad(y, trained, direction)]

    mine, theirs = run(factored_linear), run(composed)
    assert [t.dtype for t in mine] == [torch.bfloat16] + [torch.float32] * len(trained)
    base, update = magnitude(x, weight, b, f)
    # either side rounds as the test above counts, and autocast rounds x and the base weight as well
    assert ((mine[0].double() - theirs[0].double()).abs() <= 2 * U16 * (9 * update + 4 * base)).all()
    for actual, expected in zip(mine[1:], theirs[1:], strict=True):
        assert (actual - expected).abs().max() <= 16 * U16 * expected.abs().max()


def test_autocast_leaves_float64_alone():
    x, weight, b, f = make(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.linear(x, weight, b).dtype == torch.float64
        torch.testing.assert_close(factored_linear(x, weight, b, f), composed(x, weight, b, f), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_can_be_worked_out_without_memory(kind: str):
    with torch.device("meta"):
        s = {"number": 2.0, "vector": torch.empty(RANK), "gate": torch.empty(2, 3, RANK)}[kind]
        f = Factors(torch.empty(RANK, IN), s, torch.empty(OUT, RANK))
        y = factored_linear(torch.empty(2, 3, IN), torch.empty(OUT, IN), None, f)
    assert (y.shape, y.device.type) == ((2, 3, OUT), "meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("leading", [(), (7,), (2, 3), (64,)])
def test_zero_update_is_the_linear_layer_bit_for_bit(leading: tuple[int, ...], bias: bool, dtype: torch.dtype):
    x, weight, b, f = make("vector", leading, bias, dtype)
    zero = Factors(f.A, f.s, torch.zeros_like(f.B))
    assert torch.equal(factored_linear(x, weight, b, zero), F.linear(x, weight, b))


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded"])
def test_non_contiguous_input(layout: str):
    _, weight, b, f = make()
    x = {
        "transposed": rand(3, 2, IN, seed=1).transpose(0, 1),
        "strided": rand(2, 3, 2 * IN, seed=1)[..., ::2],
        "expanded": rand(1, 3, IN, seed=1).expand(2, 3, IN),
    }[layout]
    mine, theirs = x.detach().requires_grad_(), x.detach().double().requires_grad_()
    y = factored_linear(mine, weight, b, f)
    expected = composed(theirs, weight.double(), b.double(), Factors(f.A.double(), f.s.double(), f.B.double()))
    assert_same_to_float32(y, expected)
    direction = rand(3, 2, OUT, seed=8).transpose(0, 1)
    y.backward(direction)
    expected.backward(direction.double())
    assert_same_to_float32(mine.grad, theirs.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_batch(kind: str):
    x, weight, b, f = make(kind, (0, 3))
    trained = leaves(x, f.A, f.s, f.B)
    y = factored_linear(x, weight, b, f)
    assert y.shape == (0, 3, OUT)
    gradients = torch.autograd.grad(y.sum(), trained)
    assert [g.shape for g in gradients] == [t.shape for t in trained]
    assert all((g == 0).all() for g in gradients)


def test_only_what_asks_for_a_gradient_gets_one_and_nothing_is_written_to():
    x, weight, b, f = make()
    before = copy.deepcopy((x, weight, b, f.A, f.s, f.B))
    f.s.requires_grad_()
    factored_linear(x, weight, b, f).sum().backward()
    assert f.s.grad is not None
    assert all(t.grad is None for t in (x, weight, b, f.A, f.B))
    assert all(torch.equal(a, z) for a, z in zip(before, (x, weight, b, f.A, f.s, f.B), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_the_update_alone_is_the_difference(kind: str):
    x, weight, b, f = make(kind, dtype=torch.float64)
    alone = factored_linear(x, weight, b, f) - F.linear(x, weight, b)
    torch.testing.assert_close(factored_update(x, f), alone, rtol=0, atol=1e-12)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        _, weight, b, f = make()
        self.weight, self.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(b, requires_grad=False)
        self.A, self.B, self.reader = nn.Parameter(f.A), nn.Parameter(f.B), nn.Parameter(rand(RANK, IN, seed=10))

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.softmax(F.linear(x, self.reader), dim=-1)
        y = factored_linear(x, self.weight, self.bias, Factors(self.A, gate, self.B))
        return factored_linear(y[..., : self.weight.shape[1]], self.weight[:, :OUT], None, self._second())

    def _second(self) -> Factors:
        return Factors(self.A[:, :OUT], 0.5, self.B)


def run_layer(call, x: Tensor) -> list[Tensor]:
    layer = _Layer()
    x = x.clone().requires_grad_()
    y = call(layer, x)
    return [y, *torch.autograd.grad(y.square().sum(), [x, layer.A, layer.B, layer.reader])]


def test_compiled_without_graph_breaks_it_is_the_same():
    x = rand(2, 3, IN, seed=1)
    torch.compiler.reset()
    compiled = run_layer(lambda layer, x: torch.compile(layer, fullgraph=True, backend="aot_eager")(x), x)
    for actual, expected in zip(compiled, run_layer(lambda layer, x: layer(x), x), strict=True):
        assert_same_to_float32(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_dropout_is_that_of_the_updates_input_alone(kind: str, dtype: torch.dtype):
    x, weight, b, f = make(kind, (4, 3))
    x, weight, b = x.to(dtype), weight.to(dtype), b.to(dtype)
    inputs = leaves(x, f.A, f.B, f.s)
    torch.manual_seed(8)
    y = factored_linear(x, weight, b, f, dropout=0.4)
    torch.manual_seed(8)
    exact = [t.double() if isinstance(t, Tensor) else t for t in (weight, b, f.A, f.s, f.B)]
    # the draw in x's own dtype: the mask is what counts
    kept = (F.dropout(torch.ones_like(x), 0.4) != 0).double() / 0.6
    expected = F.linear(x.double(), *exact[:2])
    expected = expected + F.linear(F.linear(x.double() * kept, exact[2]) * exact[3], exact[4])
    grad = rand(*y.shape, seed=9, dtype=dtype)
    actual = torch.autograd.grad(y, inputs, grad)
    wanted = torch.autograd.grad(expected, inputs, grad.double())
    # every number passes at most four roundings on sums of at most 24 terms
    unit = 100 * EPS32 if dtype == torch.float32 else 8 * U16
    for one, other in zip([y, *actual], [expected, *wanted], strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=unit * float(other.detach().abs().max()))
    assert not torch.equal(y, factored_linear(x, weight, b, f, dropout=0.4))


def test_with_dropout_it_compiles_without_graph_breaks():
    torch.compiler.reset()
    x, weight, b, f = make()
    leaves(x, f.A, f.B)
    run = torch.compile(lambda x: factored_linear(x, weight, b, f, dropout=0.5), fullgraph=True, backend="aot_eager")
    y = run(x)
    y.sum().backward()
    assert torch.isfinite(x.grad).all()
    assert not torch.equal(y, run(x))


def test_gradient_checkpointing_is_the_same():
    x = rand(2, 3, IN, seed=1)
    checkpointed = run_layer(lambda layer, x: checkpoint(layer, x, use_reentrant=False), x)
    for actual, expected in zip(checkpointed, run_layer(lambda layer, x: layer(x), x), strict=True):
        assert torch.equal(actual, expected)


def test_a_second_derivative_is_refused_rather_than_wrong():
    x, weight, b, f = make()
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(factored_linear(x, weight, b, f).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def three_parts() -> list[Factors]:
    return [make(kind, dtype=torch.float64, sizes=(IN, OUT, r))[3] for kind, r in zip(KINDS, (2, 4, 3), strict=True)]


def test_concatenation_is_the_sum_of_the_updates():
    number, vector, gate = three_parts()
    x = rand(2, 3, IN, seed=1, dtype=torch.float64)
    both, all_three = concatenate([number, vector]), concatenate([number, vector, gate])
    assert (both.rank, all_three.rank, both.gated, all_three.gated) == (6, 9, False, True)
    torch.testing.assert_close(both.dense(), number.dense() + vector.dense(), rtol=0, atol=1e-12)
    expected = sum(factored_update(x, part) for part in (number, vector, gate))
    torch.testing.assert_close(factored_update(x, all_three), expected, rtol=0, atol=1e-12)
    assert concatenate([vector]) is vector


def test_gates_of_different_leading_dimensions_concatenate():
    f, x = make(dtype=torch.float64)[3], rand(2, 3, IN, seed=1, dtype=torch.float64)
    row, token = rand(2, 1, RANK, seed=11, dtype=torch.float64), rand(1, 3, RANK, seed=12, dtype=torch.float64)
    parts = [Factors(f.A, row, f.B), Factors(f.A, token, f.B), Factors(f.A, 2.0, f.B)]
    expected = sum(factored_update(x, part) for part in parts)
    assert concatenate(parts).s.shape == (2, 3, 3 * RANK)
    torch.testing.assert_close(factored_update(x, concatenate(parts)), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["number", "vector"])
def test_dense_and_lora_forms(kind: str):
    f = make(kind, dtype=torch.float64)[3]
    expected = f.B @ torch.diag(f.vector()) @ f.A
    A, B = f.to_lora()
    torch.testing.assert_close(f.dense(), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(B @ A, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_scaling_by_a_number_a_scalar_tensor_and_a_row_gate(kind: str):
    f, x = make(kind, dtype=torch.float64)[3], rand(2, 3, IN, seed=1, dtype=torch.float64)
    rows = torch.tensor([0.0, 3.0], dtype=torch.float64).view(2, 1, 1)
    for factor in (-0.5, torch.tensor(-0.5, dtype=torch.float64), rows):
        torch.testing.assert_close(
            factored_update(x, f.scale(factor)), factored_update(x, f) * factor, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(("columns", "out", "r"), [(24, 20, 5), (20, 24, 8), (6, 4, 9)])
@pytest.mark.parametrize("keep", [1, 3])
def test_truncation_is_the_best_approximation(columns: int, out: int, r: int, keep: int):
    f = make("vector", dtype=torch.float64, sizes=(columns, out, r))[3]
    U, S, Vh = torch.linalg.svd(f.dense())
    best = (U[:, :keep] * S[:keep]) @ Vh[:keep]
    small = f.truncate(keep)
    assert (small.A.shape, small.s.shape, small.B.shape) == ((keep, columns), (keep,), (out, keep))
    torch.testing.assert_close(small.dense(), best, rtol=0, atol=1e-12 * float(S[0]))
    torch.testing.assert_close(small.s, S[:keep], rtol=0, atol=1e-12 * float(S[0]))


def test_truncation_keeps_dtype_and_leaves_a_small_enough_update_alone():
    f = make("number")[3]
    small = f.truncate(2)
    assert {t.dtype for t in (small.A, small.s, small.B)} == {torch.float32}
    assert f.truncate(RANK) is f
    assert f.truncate(RANK + 10) is f


def test_a_truncation_above_the_weights_own_rank_loses_nothing():
    f = make("vector", dtype=torch.float64, sizes=(6, 4, 9))[3]
    torch.testing.assert_close(f.truncate(7).dense(), f.dense(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [0, -1])
def test_truncation_to_no_rank_is_refused(rank: int):
    with pytest.raises(ValueError, match=f"rank {rank}"):
        make()[3].truncate(rank)


@pytest.mark.parametrize("call", [Factors.dense, Factors.to_lora, Factors.compact, lambda f: f.truncate(1)])
def test_a_gated_update_has_no_fixed_matrix(call):
    with pytest.raises(ValueError, match=r"depends on the input \(shape \(2, 3, 5\)\)"):
        call(make("gate")[3])

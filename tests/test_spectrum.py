"""Spectral decompositions against torch.linalg.svd in float64, which takes another route to the same numbers."""

import math

import pytest
import torch
from torch import Tensor

from folklora import spectrum

EPS32 = torch.finfo(torch.float32).eps
EPS64 = torch.finfo(torch.float64).eps

SHAPES = [(48, 20), (20, 48), (32, 32), (3, 24, 40), (2, 3, 30, 18)]


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_spectrum(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """A float64 [m, n] with these singular values."""
    U = torch.linalg.qr(gaussian(m, len(values), seed=seed, dtype=torch.float64)).Q
    V = torch.linalg.qr(gaussian(n, len(values), seed=seed + 1, dtype=torch.float64)).Q
    return (U * values) @ V.mT


def power_law(m: int, n: int, condition: float = 1e6) -> Tensor:
    """A float64 [m, n] with singular values j^-p from 1 down to 1 / condition."""
    k = min(m, n)
    places = torch.arange(1, k + 1, dtype=torch.float64)
    return with_spectrum(m, n, places ** (-math.log(condition) / math.log(k)))


def oracle(weight: Tensor, chosen: slice) -> tuple[Tensor, Tensor]:
    """The singular values at these places, and the product of their triplets, in float64."""
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return S[..., chosen], (U[..., chosen] * S[..., None, chosen]) @ Vh[..., chosen, :]


def places(end: str, count: int, k: int) -> slice:
    return slice(0, count) if end == "top" else slice(k - count, k)


def assert_orthonormal(columns: Tensor) -> None:
    columns_64 = columns.double()
    error = columns_64.mT @ columns_64 - torch.eye(columns.shape[-1], dtype=torch.float64)
    # The inner product of two unit vectors, of which each is rounded with a relative error of eps.
    assert error.abs().max() <= 4 * torch.finfo(columns.dtype).eps


def assert_same_product(actual: Tensor, expected: Tensor, largest: float) -> None:
    """Entries equal up to the float32 rounding of the factors of `expected`."""
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=8 * EPS32 * largest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("end", ["top", "bottom"])
def test_both_ends_agree_with_the_exact_decomposition(end: str, shape: tuple[int, ...], dtype: torch.dtype):
    weight = gaussian(*shape, dtype=dtype)
    result = getattr(spectrum, end)(weight, 5)
    S, dense = oracle(weight, places(end, 5, min(shape[-2:])))
    assert result.U.dtype == result.S.dtype == result.V.dtype == torch.float32
    assert result.U.shape == (*shape[:-1], 5)
    assert result.V.shape == (*shape[:-2], shape[-1], 5)
    assert (result.S.diff() <= 0).all()
    torch.testing.assert_close(result.S.double(), S, rtol=2 * EPS32, atol=0)
    assert_orthonormal(result.U)
    assert_orthonormal(result.V)
    assert_same_product(result.dense(), dense, S.max().item())


@pytest.mark.parametrize("shape", SHAPES)
def test_all_triplets_rebuild_the_weight(shape: tuple[int, ...]):
    weight = gaussian(*shape)
    result = spectrum.triplets(weight)
    S, _ = oracle(weight, slice(None))
    torch.testing.assert_close(result.S.double(), S, rtol=2 * EPS32, atol=0)
    assert_orthonormal(result.U)
    assert_orthonormal(result.V)
    assert_same_product(result.dense(), weight.double(), S.max().item())


def test_a_float64_result_keeps_float64_precision():
    weight = gaussian(40, 30, dtype=torch.float64)
    result = spectrum.triplets(weight, dtype=torch.float64)
    largest = result.S[0].item()
    # A well-conditioned weight: round-off grows with the size only.
    torch.testing.assert_close(result.dense(), weight, rtol=0, atol=100 * EPS64 * largest * 40)
    assert_orthonormal(result.U.float())
    torch.testing.assert_close(
        result.S, torch.linalg.svdvals(weight), rtol=0, atol=10 * EPS64 * largest * math.sqrt(40)
    )


@pytest.mark.parametrize("shape", [(128, 80), (80, 128), (96, 96)])
def test_a_power_law_spectrum_of_condition_a_million(shape: tuple[int, int]):
    weight = power_law(*shape)
    k = min(shape)
    exact = torch.linalg.svdvals(weight)
    # The Gram matrix, rounded by eps64 s1^2, turns the weakest directions against their neighbours by that over the
    # gap in s^2: 1e-3 here. The values feel the square of it.
    turn = EPS64 * exact[0] ** 2 / (exact[k - 9] ** 2 - exact[k - 8] ** 2)
    for result, chosen in [
        (spectrum.top(weight, 8), slice(0, 8)),
        (spectrum.bottom(weight, 8), slice(k - 8, k)),
        (spectrum.triplets(weight), slice(0, k)),
    ]:
        error = turn.item() if chosen.start else 0.0  # only where the choice ends between near neighbours
        torch.testing.assert_close(result.S.double(), exact[chosen], rtol=2 * EPS32 + error**2, atol=0)
        assert_orthonormal(result.U)
        assert_orthonormal(result.V)
        atol = (8 * EPS32 + error) * exact[chosen.start].item()
        torch.testing.assert_close(result.dense().double(), oracle(weight, chosen)[1], rtol=0, atol=atol)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_values_far_below_the_largest_stay_within_float32_rounding_of_the_weight(shape: tuple[int, int]):
    weight = power_law(*shape, condition=1e14)
    exact = torch.linalg.svdvals(weight)
    result = spectrum.bottom(weight, 6)
    assert (result.S - exact[-6:]).abs().max() <= EPS32 * exact[0]
    assert_orthonormal(result.U)
    assert_orthonormal(result.V)
    assert (result.S.diff() <= 0).all()


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
@pytest.mark.parametrize("condition", [1e6, 1e14])
def test_products_are_exact_at_the_weak_end_too(shape: tuple[int, int], condition: float):
    weight = power_law(*shape, condition=condition)
    tall = shape[0] >= shape[1]
    weak = spectrum.bottom(weight, 10, dtype=torch.float64)
    assert weak.S[0] <= 1e-4  # so that nothing below is hidden by the round-off of s1 = 1
    projected = weight @ weak.V @ weak.V.mT if tall else weak.U @ (weak.U.mT @ weight)
    torch.testing.assert_close(weak.dense(), projected, rtol=0, atol=100 * EPS64)
    # The strong and the weak vectors are kept apart at 1e-4 s1, which may cost eps64 s1 / 1e-4.
    everything = spectrum.triplets(weight, dtype=torch.float64)
    torch.testing.assert_close(everything.dense(), weight, rtol=0, atol=100 * EPS64 / 1e-4)
    torch.testing.assert_close(everything.S, torch.linalg.svdvals(weight), rtol=0, atol=10 * EPS64 / 1e-4)


def test_equal_singular_values_are_in_order_all_the_same():
    orthogonal = torch.linalg.qr(gaussian(40, 40, dtype=torch.float64)).Q
    result = spectrum.triplets(orthogonal, dtype=torch.float64)
    assert (result.S.diff() <= 0).all()
    torch.testing.assert_close(result.dense(), orthogonal, rtol=0, atol=100 * EPS64)


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (32, 32)])
def test_a_rank_deficient_weight_still_has_orthonormal_vectors(shape: tuple[int, int]):
    weight = with_spectrum(*shape, torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5], dtype=torch.float64)).float()
    everything = spectrum.triplets(weight)
    over_the_edge = spectrum.top(weight, 9)
    null = spectrum.bottom(weight, 7)
    for result in (everything, over_the_edge, null):
        assert_orthonormal(result.U)
        assert_orthonormal(result.V)
    assert_same_product(everything.dense(), weight.double(), 4.0)
    assert_same_product(over_the_edge.dense(), weight.double(), 4.0)
    assert null.S.max() <= 4.0 * EPS32


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (2, 6, 4)])
def test_a_zero_weight_has_finite_orthonormal_vectors(shape: tuple[int, ...]):
    weight = torch.zeros(shape)
    for result in (spectrum.top(weight, 3), spectrum.bottom(weight, 3), spectrum.triplets(weight)):
        assert (result.S == 0).all()
        assert_orthonormal(result.U)
        assert_orthonormal(result.V)
    assert (torch.matmul(*spectrum.bottom_factors(weight, 2)) == 0).all()
    assert (torch.matmul(*spectrum.top_factors(weight, 2)) == 0).all()


def test_each_layer_of_a_batch_is_decomposed_on_its_own():
    stack = gaussian(2, 3, 18, 12)
    batched = spectrum.bottom(stack, 4)
    P, Q = spectrum.bottom_factors(stack, 4)
    for i in range(2):
        for j in range(3):
            alone = spectrum.bottom(stack[i, j], 4)
            assert torch.equal(batched.U[i, j], alone.U)
            assert torch.equal(batched.S[i, j], alone.S)
            assert torch.equal(batched.V[i, j], alone.V)
            assert torch.equal(P[i, j], spectrum.bottom_factors(stack[i, j], 4)[0])
            assert torch.equal(Q[i, j], spectrum.bottom_factors(stack[i, j], 4)[1])


def test_an_empty_batch_gives_empty_results():
    result = spectrum.top(torch.empty(0, 6, 4), 2)
    assert result.U.shape == (0, 6, 2)
    assert result.S.shape == (0, 2)
    assert result.V.shape == (0, 4, 2)


@pytest.mark.parametrize("shape", [(30, 20), (20, 30)])
def test_signs_do_not_depend_on_the_route(shape: tuple[int, int]):
    weight = gaussian(*shape)
    k = min(shape)
    V = spectrum.triplets(weight).V
    assert (V.gather(0, V.abs().argmax(0, keepdim=True)) > 0).all()
    # The same vectors, by eigenvectors of the permuted Gram matrix, of the transpose, and in other company.
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(1))
    unit = 100 * EPS32  # round-off over the gap between neighbours, which is about 1/k of the spectrum
    torch.testing.assert_close(spectrum.triplets(weight[order]).V, V, rtol=0, atol=unit)
    torch.testing.assert_close(spectrum.top(weight, 4).V, V[:, :4], rtol=0, atol=unit)
    torch.testing.assert_close(spectrum.bottom(weight, 4).V, V[:, k - 4 :], rtol=0, atol=unit)


def test_a_tie_for_the_largest_entry_goes_to_the_first():
    # The right vector is (1, -1) / sqrt(2): which entry is larger is left to round-off, so both count as largest.
    v = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for tilt in (1 - 1e-12, 1 + 1e-12):
        weight = torch.outer(torch.arange(1.0, 4.0).double(), v * torch.tensor([1.0, tilt], dtype=v.dtype))
        for sign in (1, -1):
            assert spectrum.top(sign * weight, 1).V[0, 0] > 0


def test_the_weight_is_left_alone_and_no_graph_is_kept():
    weight = torch.nn.Parameter(gaussian(12, 8))
    before = weight.detach().clone()
    results = [spectrum.top(weight, 2).U, spectrum.triplets(weight).V, *spectrum.bottom_factors(weight, 2)]
    results += spectrum.top_factors(weight, 2)
    assert torch.equal(weight, before)
    assert not any(result.requires_grad for result in results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [*SHAPES, (16, 96)])  # the last one: n > m + t
def test_bottom_factors_take_out_the_weakest_directions(shape: tuple[int, ...], dtype: torch.dtype):
    weight, count = gaussian(*shape, dtype=dtype), 6
    m, n = shape[-2:]
    k = min(m, n)
    P, Q = spectrum.bottom_factors(weight, count)
    assert P.shape == (*shape[:-1], count)
    assert Q.shape == (*shape[:-2], count, n)
    S, dense = oracle(weight, slice(k - count, k))
    assert_same_product(P @ Q, dense, S.max().item())
    E = Q.mT if n <= m else P
    assert_orthonormal(E)
    assert (E.gather(-2, E.abs().argmax(-2, keepdim=True)) > 0).all()

    P, Q = spectrum.bottom_factors(weight, count, dtype=torch.float64)
    world = weight.double() - P @ Q
    total = weight.double().square().sum((-2, -1))
    kept, taken = world.square().sum((-2, -1)), (P @ Q).square().sum((-2, -1))
    torch.testing.assert_close(kept + taken, total, rtol=10 * EPS64 * k, atol=0)
    torch.testing.assert_close(taken, S.square().sum(-1), rtol=1e3 * EPS64 * k, atol=0)
    rank = torch.linalg.matrix_rank(world, rtol=100 * EPS64 * max(m, n))
    assert (rank == k - count).all()


def test_bottom_factors_are_exact_where_singular_vectors_are_not_unique():
    values = torch.tensor([3.0] * 4 + [1.0] * 6 + [1e-3] * 6, dtype=torch.float64)
    weight = with_spectrum(24, 16, values)
    P, Q = spectrum.bottom_factors(weight, 9, dtype=torch.float64)  # cuts through the six ones
    world = weight - P @ Q
    assert torch.linalg.matrix_rank(world, rtol=100 * EPS64 * 24) == 7
    # 4 nines and 3 ones are left, 3 ones and 6 of 1e-6 are taken.
    torch.testing.assert_close(world.square().sum().item(), 39.0, rtol=100 * EPS64, atol=0)
    torch.testing.assert_close((P @ Q).square().sum().item(), 3.000006, rtol=100 * EPS64, atol=0)


@pytest.mark.parametrize("condition", [1e6, 1e14])
@pytest.mark.parametrize("shape", [(64, 40), (40, 64)])
def test_bottom_factors_of_a_steep_spectrum_are_a_projection(shape: tuple[int, int], condition: float):
    weight = power_law(*shape, condition=condition)
    P, Q = spectrum.bottom_factors(weight, 10, dtype=torch.float64)
    world = weight - P @ Q
    total = weight.square().sum().item()
    assert world.square().sum().item() + (P @ Q).square().sum().item() == pytest.approx(total, rel=1e3 * EPS64)
    # Nothing of the directions is left, and little more than the least possible is gone.
    leftover = world @ Q.mT if shape[1] <= shape[0] else P.mT @ world
    assert leftover.norm() <= 100 * EPS64
    least = torch.linalg.svdvals(weight)[-10:].norm()
    assert (P @ Q).norm() <= least * (1 + EPS32) + EPS32 * math.sqrt(10)


@pytest.mark.parametrize("scale", [1.0, 2.0, 0.25])
@pytest.mark.parametrize("shape", SHAPES)
def test_top_factors_leave_a_residual_of_the_next_singular_value(shape: tuple[int, ...], scale: float):
    weight, rank = gaussian(*shape), 5
    B0, A0 = spectrum.top_factors(weight, rank, scale)
    S = torch.linalg.svdvals(weight.double())
    residual = weight.double() - scale * (B0.double() @ A0.double())
    rounding = 8 * EPS32 * S.max().item()
    torch.testing.assert_close(torch.linalg.matrix_norm(residual, 2), S[..., rank], rtol=0, atol=rounding)
    tail = S[..., rank:].square().sum(-1).sqrt()
    torch.testing.assert_close(torch.linalg.matrix_norm(residual), tail, rtol=0, atol=rounding)
    # Balanced: both Gram matrices are diag(S_r / scale).
    expected = torch.diag_embed(S[..., :rank] / scale)
    atol = 8 * EPS32 * expected.max().item()
    torch.testing.assert_close((A0 @ A0.mT).double(), expected, rtol=0, atol=atol)
    torch.testing.assert_close((B0.mT @ B0).double(), expected, rtol=0, atol=atol)


def orthonormal_rows(r: int, n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.linalg.qr(gaussian(n, r, dtype=torch.float64)).Q.mT.to(dtype)


def test_orthonormality_error_is_the_distance_of_the_gram_matrix_from_the_identity():
    A = gaussian(3, 4, 9, dtype=torch.float64)
    gram = torch.einsum("bin,bjn->bij", A, A)
    expected = torch.linalg.matrix_norm(gram - torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(spectrum.orthonormality_error(A), expected, rtol=20 * EPS64, atol=0)
    # Known by hand: A A^T - I = diag(3, 8).
    diagonal = torch.tensor([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]], dtype=torch.float64)
    assert spectrum.orthonormality_error(diagonal).item() == pytest.approx(math.sqrt(73), rel=4 * EPS64)
    assert spectrum.orthonormality_error(torch.zeros(7, 4).mT).item() == pytest.approx(2.0, rel=4 * EPS32)


@pytest.mark.parametrize(("dtype", "computed"), [(torch.float32, EPS32), (torch.float64, EPS64)])
def test_orthonormality_error_fades_out_at_exact_orthonormality(dtype: torch.dtype, computed: float):
    exact = torch.eye(8, 32, dtype=dtype, requires_grad=True)
    error = spectrum.orthonormality_error(exact)
    error.backward()
    assert error.item() == pytest.approx(math.sqrt(computed))
    assert (exact.grad == 0).all()

    rounded = orthonormal_rows(8, 32, dtype).requires_grad_()
    spectrum.orthonormality_error(rounded).backward()
    # 2 ||A A^T - I|| / sqrt(eps), with round-off of about eps in each of the 8 x 8 entries; without eps it is 2.
    assert rounded.grad.norm() <= 2 * 8 * computed / math.sqrt(computed)


def test_the_gradient_of_the_orthonormality_error_is_that_of_finite_differences():
    A = gaussian(2, 3, 6, dtype=torch.float64).requires_grad_()
    B = gaussian(7, 3, seed=1, dtype=torch.float64).requires_grad_()
    weights = torch.tensor([0.3, -1.2], dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda A: (weights * spectrum.orthonormality_error(A)).sum(), A)
    assert torch.autograd.gradcheck(lambda B: spectrum.orthonormality_error(B.mT), B)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_orthonormality_error_of_half_precision_is_computed_in_float32(dtype: torch.dtype):
    A = gaussian(4, 64, dtype=dtype)
    expected = spectrum.orthonormality_error(A.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        error = spectrum.orthonormality_error(A)
    assert error.dtype == torch.float32
    torch.testing.assert_close(error.double(), expected, rtol=8 * EPS32, atol=0)


@pytest.mark.parametrize("shape", [(4, 20), (1, 9), (6, 6)])
def test_the_large_gram_matrix_adds_a_constant_only(shape: tuple[int, int]):
    """||A^T A - I_n||_F = sqrt(||A A^T - I_r||_F^2 + n - r), in value and in gradient."""
    r, n = shape
    A = gaussian(r, n, dtype=torch.float64).requires_grad_()
    large = torch.linalg.matrix_norm(A.mT @ A - torch.eye(n, dtype=torch.float64))
    small = (spectrum.orthonormality_error(A).square() + (n - r)).sqrt()
    torch.testing.assert_close(small, large, rtol=100 * EPS64, atol=0)
    expected = torch.autograd.grad(large, A)[0]
    actual = torch.autograd.grad(small, A)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=100 * EPS64 * expected.norm().item())


DECOMPOSITIONS = [spectrum.top, spectrum.bottom, spectrum.top_factors, spectrum.bottom_factors]


@pytest.mark.parametrize("decompose", DECOMPOSITIONS)
@pytest.mark.parametrize("count", [0, -1, 5])
def test_a_count_that_the_weight_does_not_have(decompose, count: int):
    with pytest.raises(ValueError, match=rf"count is {count}, .*shape \[4, 6\] has 4 singular values: take 1 to 4"):
        decompose(torch.ones(2, 4, 6), count)


@pytest.mark.parametrize("decompose", [*DECOMPOSITIONS, lambda weight, count: spectrum.triplets(weight)])
def test_a_weight_that_cannot_be_decomposed(decompose):
    with pytest.raises(ValueError, match=r"weight has shape \[7\], but must be a matrix"):
        decompose(torch.ones(7), 1)
    with pytest.raises(ValueError, match=r"weight is torch\.int8, but must be real floating point; dequantise"):
        decompose(torch.ones(4, 6, dtype=torch.int8), 1)
    with pytest.raises(ValueError, match=r"weight of shape \[0, 6\] has an empty side"):
        decompose(torch.ones(0, 6), 1)
    with pytest.raises(ValueError, match="NaN or infinite values in weight: "):
        decompose(torch.tensor([[1.0, float("nan")], [0.0, 1.0]]), 1)
    stack = torch.ones(2, 4, 3, 3)
    stack[0, 1, 2, 2], stack[1, 3, 0, 0] = float("inf"), float("nan")
    with pytest.raises(ValueError, match=r"in weight\[0, 1\], weight\[1, 3\]: every value must be finite"):
        decompose(stack, 1)


def test_many_broken_layers_are_counted_rather_than_listed():
    with pytest.raises(ValueError, match=r"weight\[4\] and 2 more: "):
        spectrum.triplets(torch.full((7, 2, 2), float("inf")))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("inf"), float("nan")])
def test_a_scale_that_cannot_be_divided_by(scale: float):
    with pytest.raises(ValueError, match=rf"scale is {scale}, but must be a positive finite number"):
        spectrum.top_factors(torch.ones(3, 3), 1, scale)


def test_an_orthonormality_error_needs_a_matrix_of_real_numbers():
    with pytest.raises(ValueError, match=r"factor has shape \[3\], but must be a matrix"):
        spectrum.orthonormality_error(torch.ones(3))
    with pytest.raises(ValueError, match=r"factor is torch\.int64, but must be real floating point"):
        spectrum.orthonormality_error(torch.ones(3, 3, dtype=torch.int64))

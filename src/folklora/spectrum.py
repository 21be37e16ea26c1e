"""Decompositions of a weight: both ends of its spectrum, as factors; how far factors are from orthonormal.

A weight W is [m, n] (out x in), k = min(m, n), and

    W = U diag(S) V^T        U: [m, k]   S: [k] descending   V: [n, k]

Everything here is a pure function of tensors. Leading dimensions are a batch of layers of one shape, taken
one at a time: no more than one layer, and a few square matrices of its short side, ever exists in float64.

The short side's singular vectors are the eigenvectors of W^T W (or W W^T) in float64. Squaring W squares its
condition number; float64 has digits to spare for that, float32 has not. What holds of the results before
they are rounded to the dtype asked for, with s1 = the largest singular value:

- U^T U = I and V^T V = I, also where singular values are zero, and for W = 0. There are no NaNs.
- U diag(S) V^T is W projected onto the short side's vectors, to 1e-11 s1.
- Singular values are at worst within about 2e-8 s1 of the true ones (where they are that small themselves),
  less than float32 rounding of W changes them; larger ones are far closer.
- Where singular values coincide, single vectors are not unique, in this as in any decomposition: rely on
  their span and on the products. `bottom` and `top` may then cut anywhere through the equal ones.
- Signs are fixed: the largest entry by magnitude of each column of V is positive (the first one, where
  several are within 1e-6 of the largest), so round-off does not flip vectors from one machine to another.

No gradient flows through a decomposition: it gives a start value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

# Columns of W E have a cosine of about eps64 s1^2 / (s_i s_j). Below this share of s1 that may be too much
# for their lengths to be singular values to float32 precision.
_RELIABLE_SHARE = 1e-4

# Relative round-off of a sum of squares that were computed by way of the Gram matrix.
_SUM_ERROR = 1e-12

# Rows of float32 span a direction surely where its share of their length is above this.
_SPANNED_SHARE = 1e-6

# Entries this close to the largest one count as tied for it, so that round-off does not choose the sign.
_SIGN_TIE = 1e-6


@dataclass(frozen=True, eq=False)
class Triplets:
    """Singular triplets of a weight: U diag(S) V^T.

    Attributes:
        U: left singular vectors, the columns of [..., m, t].
        S: singular values, [..., t], descending.
        V: right singular vectors, the columns of [..., n, t].
    """

    U: Tensor
    S: Tensor
    V: Tensor

    def dense(self) -> Tensor:
        """The product U diag(S) V^T, [..., m, n]."""
        return (self.U * self.S.unsqueeze(-2)) @ self.V.mT


def top(weight: Tensor, count: int, *, dtype: torch.dtype = torch.float32) -> Triplets:
    """The strongest singular triplets of a weight: its best approximation of rank `count` (Eckart-Young).

    Args:
        weight: [..., m, n], any floating dtype.
        count: how many, 1 <= count <= k = min(m, n).
        dtype: of the result; the computation is in float64.

    Returns:
        U [..., m, count], S [..., count] descending, V [..., n, count].

    Raises:
        ValueError: `weight` is no floating-point matrix, or has values that are not finite; `count` is not
            in 1 ... k.
    """
    check_weight(weight, count)
    return _triplets(weight, slice(0, count), dtype)


def bottom(weight: Tensor, count: int, *, dtype: torch.dtype = torch.float32) -> Triplets:
    """The weakest singular triplets of a weight, still in descending order.

    They are the last `count` of the k triplets. For their product alone, `bottom_factors` is cheaper.

    Args:
        weight: [..., m, n], any floating dtype.
        count: how many, 1 <= count <= k = min(m, n).
        dtype: of the result; the computation is in float64.

    Returns:
        U [..., m, count], S [..., count] descending, V [..., n, count].

    Raises:
        ValueError: `weight` is no floating-point matrix, or has values that are not finite; `count` is not
            in 1 ... k.
    """
    check_weight(weight, count)
    short = min(weight.shape[-2:])
    return _triplets(weight, slice(short - count, short), dtype)


def triplets(weight: Tensor, *, dtype: torch.dtype = torch.float32) -> Triplets:
    """All k = min(m, n) singular triplets of a weight.

    Args:
        weight: [..., m, n], any floating dtype.
        dtype: of the result; the computation is in float64.

    Returns:
        U [..., m, k], S [..., k] descending, V [..., n, k].

    Raises:
        ValueError: `weight` is no floating-point matrix, has an empty side, or has values that are not
            finite.
    """
    check_weight(weight)
    return _triplets(weight, slice(0, min(weight.shape[-2:])), dtype)


@torch.no_grad()
def top_factors(
    weight: Tensor, count: int, scale: float = 1.0, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """The strongest part of a weight as a balanced LoRA pair: scale * B0 @ A0 = U_r diag(S_r) V_r^T.

        B0 = U_r diag(sqrt(S_r / scale))        A0 = diag(sqrt(S_r / scale)) V_r^T

    This is the start of PiSSA (arXiv 2404.02948), with LoRA's scaling divided out before the square root.

    Args:
        weight: [..., m, n], any floating dtype.
        count: the rank r, 1 <= r <= k = min(m, n).
        scale: what the product will be multiplied with (LoRA's alpha / r, say), above 0.
        dtype: of the result; the computation is in float64.

    Returns:
        B0 [..., m, r] and A0 [..., r, n].

    Raises:
        ValueError: `weight` is no floating-point matrix, or has values that are not finite; `count` is not
            in 1 ... k; `scale` is not a positive number.
    """
    return balanced(top(weight, count, dtype=dtype), scale)


@torch.no_grad()
def balanced(part: Triplets, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Singular triplets as a LoRA pair of equal shares: scale * B0 @ A0 = U diag(S) V^T.

        B0 = U diag(sqrt(S / scale))        A0 = diag(sqrt(S / scale)) V^T

    Args:
        part: the triplets, [..., t].
        scale: what the product will be multiplied with (LoRA's alpha / r, say), above 0.

    Returns:
        B0 [..., m, t] and A0 [..., t, n].

    Raises:
        ValueError: `scale` is not a positive number.
    """
    if not 0 < scale < float("inf"):
        raise ValueError(f"scale is {scale}, but must be a positive finite number (alpha / r, say)")
    root = (part.S / scale).sqrt()
    return part.U * root.unsqueeze(-2), root.unsqueeze(-1) * part.V.mT


@torch.no_grad()
def energy_rank(weight: Tensor, share: float, *, squared: bool = True) -> int:
    """The least number of singular triplets that hold a share of a weight's energy.

    The smallest r with S_1^2 + ... + S_r^2 >= share (S_1^2 + ... + S_k^2); without `squared`, of the values themselves.

    Args:
        weight: [m, n], any floating dtype; the computation is in float64.
        share: the share, above 0 and at most 1.
        squared: whether energy is the square of a singular value or the value itself.

    Returns:
        r, 1 <= r <= k = min(m, n); 1 for W = 0.

    Raises:
        ValueError: `weight` is no floating-point matrix, or has values that are not finite; `share` is not
            above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share is {share}, but must be above 0 and at most 1")
    check_weight(weight)
    layer = weight.double()
    gram = layer.mT @ layer if layer.shape[0] >= layer.shape[1] else layer @ layer.mT
    energy = torch.linalg.eigvalsh(gram).flip(-1).clamp(min=0)
    reached = (energy if squared else energy.sqrt()).cumsum(0)
    # round-off in the sum must not ask for one more value
    return int((reached < share * reached[-1] * (1 - _SUM_ERROR)).sum()) + 1


@torch.no_grad()
def bottom_factors(weight: Tensor, count: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """The part of a weight in its weakest directions, as two factors: P @ Q = U_t diag(S_t) V_t^T.

        n <= m:  P = W E,  Q = E^T       E: [n, t], the weakest t eigenvectors of W^T W
        n >  m:  P = E,    Q = E^T W     E: [m, t], the weakest t eigenvectors of W W^T

    E is orthonormal, so P @ Q is W projected onto t directions: however close the singular values are,
    W - P @ Q has rank k - t (or less) and ||W - P Q||_F^2 + ||P Q||_F^2 = ||W||_F^2. KaSA (arXiv 2412.06071)
    takes this part out of a base weight as noise. The rule for signs holds for the columns of E.

    Args:
        weight: [..., m, n], any floating dtype.
        count: how many directions t, 1 <= t <= k = min(m, n).
        dtype: of the result; the computation is in float64.

    Returns:
        P [..., m, t] and Q [..., t, n], the strongest of the weak directions first.

    Raises:
        ValueError: `weight` is no floating-point matrix, or has values that are not finite; `count` is not
            in 1 ... k.
    """
    check_weight(weight, count)
    m, n = weight.shape[-2:]

    def factors(layer: Tensor) -> tuple[Tensor, Tensor]:
        E = _short_side_vectors(layer)[0][:, -count:]
        E = E * column_signs(E)
        return (layer @ E, E.mT) if n <= m else (E, E.mT @ layer)

    P, Q = _layer_by_layer(weight, factors, [(m, count), (count, n)], dtype)
    return P, Q


def orthonormality_error(factor: Tensor) -> Tensor:
    """How far the rows of a factor are from orthonormal: sqrt(||A A^T - I_r||_F^2 + eps). Differentiable.

    eps is the machine epsilon of the computation. Without it the gradient 2 (A A^T - I) A / ||A A^T - I||_F
    has norm 2 arbitrarily close to orthonormality, where it is nothing but round-off blown up, and is 0 / 0
    at it. sqrt(eps), 3e-4 in float32, lies far above the round-off of an r x r Gram matrix and far below any
    error that matters: with it the gradient fades to 0 there, and sqrt(eps) is the least value.

    The large Gram matrix is never needed: ||A^T A - I_n||_F^2 = ||A A^T - I_r||_F^2 + n - r.

    Args:
        factor: rows [..., r, n], any floating dtype; computed in float32 (float64 for float64), also under
            autocast. Only r <= n can be orthonormal. For the columns of LoRA's B [m, r], pass `B.mT`.

    Returns:
        The error of each matrix, [...], float32 (float64 for a float64 factor).

    Raises:
        ValueError: `factor` is no floating-point matrix.
    """
    _check_matrix("factor", factor)
    rows = factor if factor.dtype == torch.float64 else factor.float()
    with torch.autocast(factor.device.type, enabled=False):
        gram = rows @ rows.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return ((gram - identity).square().sum((-2, -1)) + torch.finfo(gram.dtype).eps).sqrt()


def row_overlap(rows: Tensor, others: Tensor) -> Tensor:
    """How much of the smaller of two row spaces lies in the other: the mean squared cosine of their principal angles.

        (1/t) ||Q_1 Q_2^T||_F^2 = (1/t) sum_i cos^2 theta_i        Q: an orthonormal basis of each's rows, t: the
                                                                   smaller of their ranks

    It is 0 where all rows are orthogonal and 1 where one space contains the other. Neither the rows' lengths nor
    which basis they are changes it. Of random spaces of ranks r and t <= r it is r/n on average.

    Args:
        rows: [..., r, n], any floating dtype; computed in float64.
        others: [..., t, n]; their leading dimensions broadcast with those of `rows`.

    Returns:
        [...], float64; 0 where a matrix has no rows but zeros.

    Raises:
        ValueError: One of them is no floating-point matrix.
    """
    _check_matrix("rows", rows)
    _check_matrix("others", others)
    (first, rank), (second, other_rank) = _row_basis(rows), _row_basis(others)
    return (first @ second.mT).square().sum((-2, -1)) / torch.minimum(rank, other_rank).clamp_min(1)


def _row_basis(rows: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of the rows, as many, the spare ones 0; and the rank."""
    rows = rows.detach().double()
    values, vectors = torch.linalg.eigh(rows @ rows.mT)
    spanned = values > _SPANNED_SHARE**2 * values[..., -1:]
    scale = torch.where(spanned, values, 1).rsqrt() * spanned
    return scale.unsqueeze(-1) * (vectors.mT @ rows), spanned.sum(-1)


def _check_matrix(name: str, matrix: Tensor) -> None:
    if matrix.ndim < 2:
        raise ValueError(f"{name} has shape {list(matrix.shape)}, but must be a matrix [m, n] or a batch of them")
    if not matrix.is_floating_point():
        raise ValueError(
            f"{name} is {matrix.dtype}, but must be real floating point; dequantise a quantised weight first"
        )


def check_weight(weight: Tensor, count: int | None = None) -> None:
    """Refuse what cannot be decomposed, or has fewer than `count` singular values, with a ValueError in words."""
    _check_matrix("weight", weight)
    short = min(weight.shape[-2:])
    shape = list(weight.shape[-2:])
    if short == 0:
        raise ValueError(f"weight of shape {shape} has an empty side: nothing to decompose")
    if count is not None and not 1 <= count <= short:
        raise ValueError(
            f"count is {count}, but a weight of shape {shape} has {short} singular values: take 1 to {short}"
        )
    broken = [index for index in _layers(weight) if not weight[index].double().isfinite().all()]
    if broken:
        names = [f"weight{list(index)}" if index else "weight" for index in broken]
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        raise ValueError(f"NaN or infinite values in {listed}: every value must be finite")


def _layers(weight: Tensor) -> Iterator[tuple[int, ...]]:
    """The index of each matrix in the batch; () for a single one."""
    return product(*map(range, weight.shape[:-2]))


def _layer_by_layer(
    weight: Tensor,
    decompose: Callable[[Tensor], tuple[Tensor, ...]],
    shapes: list[tuple[int, ...]],
    dtype: torch.dtype,
) -> list[Tensor]:
    """Run `decompose` on each matrix in float64; collect its results, of these shapes, in `dtype`."""
    results = [weight.new_empty((*weight.shape[:-2], *shape), dtype=dtype) for shape in shapes]
    for index in _layers(weight):
        for result, part in zip(results, decompose(weight[index].double()), strict=True):
            result[index] = part
    return results


@torch.no_grad()
def _triplets(weight: Tensor, chosen: slice, dtype: torch.dtype) -> Triplets:
    m, n = weight.shape[-2:]
    count = chosen.stop - chosen.start
    shapes = [(m, count), (count,), (n, count)]
    return Triplets(*_layer_by_layer(weight, lambda layer: _decompose(layer, chosen), shapes, dtype))


def _decompose(layer: Tensor, chosen: slice) -> tuple[Tensor, Tensor, Tensor]:
    """U, S, V at the chosen places of the descending spectrum of a float64 [m, n]."""
    tall = layer.shape[0] >= layer.shape[1]
    short_vectors, largest = _short_side_vectors(layer)
    E = short_vectors[:, chosen]
    # W E has orthogonal columns of length S. QR, not a division by S: its Q is orthonormal even where S is 0.
    Q, R = torch.linalg.qr((layer if tall else layer.mT) @ E)
    sign = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R.dtype)
    Q, R = Q * sign, R * sign.unsqueeze(-1)
    S = R.diagonal()
    reliable = largest * _RELIABLE_SHARE
    strong = int((S > reliable).sum())
    if strong < len(S):
        left, weak, right = torch.linalg.svd(R[strong:, strong:])
        Q = torch.cat([Q[:, :strong], Q[:, strong:] @ left], 1)
        E = torch.cat([E[:, :strong], E[:, strong:] @ right.mT], 1)
        S = torch.cat([S[:strong], weak])
    S, order = S.sort(descending=True)
    U, V = (Q[:, order], E[:, order]) if tall else (E[:, order], Q[:, order])
    sign = column_signs(V)
    return U * sign, S, V * sign


def _short_side_vectors(layer: Tensor) -> tuple[Tensor, Tensor]:
    """Singular vectors of the shorter side, by descending singular value, and the largest singular value."""
    tall = layer.shape[0] >= layer.shape[1]
    values, vectors = torch.linalg.eigh(layer.mT @ layer if tall else layer @ layer.mT)
    return vectors.flip(-1), values[-1].clamp(min=0).sqrt()


def column_signs(vectors: Tensor) -> Tensor:
    """+1 or -1 for each column of [n, t], such that its largest entry becomes positive."""
    magnitude = vectors.abs()
    tied = magnitude >= (1 - _SIGN_TIE) * magnitude.amax(0)
    first = tied.to(torch.uint8).argmax(0, keepdim=True)
    return torch.where(vectors.gather(0, first) < 0, -1.0, 1.0).to(vectors.dtype)

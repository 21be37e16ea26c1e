"""Choosing a part of a data set: groups, shares, redundancy, sampling. Pure functions of tensors, seeded by generators.

Rows are examples: `vectors` [n, d], one a row, and scores [n]. Indices come back as int64 tensors on the CPU, without
repeats. Nothing here knows of models, tasks or texts; `folklora.continual.scores` measures those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

# rows of a random matrix, and of a similarity matrix, that are held at once
_BLOCK = 512
_STEPS = 100

Scorer = Literal["max-cosine", "centroid", "hull", "density"]


def water_filling(sizes: Sequence[int], total: int) -> list[int]:
    """Shares of `total` as equal as the groups' sizes allow, as water stands in vessels that are joined.

    Each group gets min(size, level), and the level is such that the shares sum to min(total, Σ sizes). What a whole
    level leaves over goes to the largest groups, one each, so shares below their size differ by at most 1.

    Args:
        sizes: Of the groups.
        total: What is shared out.
    """
    shares, left = [0] * len(sizes), total
    order = sorted(range(len(sizes)), key=lambda i: sizes[i])
    for place, i in enumerate(order):
        shares[i] = min(sizes[i], left // (len(order) - place))
        left -= shares[i]
    return shares


def kmeans(vectors: Tensor, clusters: int, generator: torch.Generator, batch: int = 10_240) -> Tensor:
    """Mini-batch k-means: each step moves each centre to the running mean of the rows that were nearest to it.

    The start is k-means++: each further centre is a row drawn in proportion to its squared distance to the nearest one.
    Where a batch holds every row the means are not running ones, and this is Lloyd's algorithm.

    Args:
        vectors: [n, d].
        clusters: k; there are fewer where there are fewer different rows, or where a centre loses its last row.
        generator: On the device of the vectors.
        batch: Rows of a step.

    Returns:
        The number of each row's cluster, [n] int64 on the CPU.

    Raises:
        ValueError: `clusters` or `batch` is below 1.
    """
    if clusters < 1 or batch < 1:
        raise ValueError(f"clusters and batch must be at least 1, not {clusters} and {batch}")
    n = len(vectors)
    if n == 0:
        return torch.zeros(0, dtype=torch.int64)
    centres = _spread_rows(vectors, clusters, generator)
    whole, counts, labels = n <= batch, torch.zeros(len(centres), device=vectors.device), None
    for _ in range(_STEPS):
        rows = vectors if whole else vectors[_draw(n, batch, generator)]
        before, labels = labels, _nearest(rows, centres)
        if whole and before is not None and torch.equal(before, labels):
            break
        found = torch.bincount(labels, minlength=len(centres)).to(vectors.dtype)
        sums = torch.zeros_like(centres).index_add_(0, labels, rows)
        counts = found if whole else counts + found
        moved = centres + (sums - found[:, None] * centres) / counts.clamp_min(1)[:, None]
        centres = torch.where(found[:, None] > 0, moved, centres)
    return _nearest(vectors, centres).cpu()


def redundancy(vectors: Tensor) -> Tensor:
    """How much each row repeats one before it: M_j = max_{i<j} cosine(x_i, x_j); -1 for the first row.

    Args:
        vectors: [n, d].

    Returns:
        [n].
    """
    unit = F.normalize(vectors, dim=1)
    most = unit.new_full((len(unit),), -1.0)
    for start in range(0, len(unit), _BLOCK):
        rows = unit[start : start + _BLOCK]
        alike = rows @ unit[: start + len(rows)].mT
        # of a row only those before it count
        alike = alike.tril(start - 1) - 2 * torch.ones_like(alike).triu(start)
        most[start : start + len(rows)] = torch.maximum(alike.amax(1), most[start : start + len(rows)])
    return most


def deduplicate(vectors: Tensor, keep: int) -> Tensor:
    """The `keep` rows that repeat earlier ones the least (SemDeDup), in their order; of two equal ones the later goes.

    Source: Abbas, Tirumala, Simig, Ganguli, Morcos, "SemDeDup", 2023, arXiv 2303.09540.

    Args:
        vectors: [n, d], in the order in which earlier rows take precedence.
        keep: How many.
    """
    if keep >= len(vectors):
        return torch.arange(len(vectors))
    return redundancy(vectors).cpu().argsort(stable=True)[:keep].sort().values


def nearness(pool: Tensor, shots: Tensor, scorer: Scorer = "max-cosine", bandwidth: float = 2.0) -> Tensor:
    """How near each row of a pool is to a few given ones: the larger the nearer.

    - "max-cosine": the cosine to the nearest of them.
    - "centroid": minus the distance to their mean.
    - "hull": minus the distance to the convex hull of them, 0 inside.
    - "density": the log of a sum of Gaussians around them, Σ_s exp(-‖x - s‖² / 2h²).

    Args:
        pool: [n, d].
        shots: [k, d].
        scorer: Which of these.
        bandwidth: h.

    Returns:
        [n].

    Raises:
        ValueError: There is no such scorer, or h is not above 0.
    """
    if scorer not in get_args(Scorer):
        raise ValueError(f"scorer must be one of {', '.join(get_args(Scorer))}, not {scorer!r}")
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be above 0, not {bandwidth}")
    if scorer == "max-cosine":
        return (F.normalize(pool, dim=1) @ F.normalize(shots, dim=1).mT).amax(1)
    if scorer == "centroid":
        return -(pool - shots.mean(0)).norm(dim=1)
    if scorer == "hull":
        return -hull_distance(pool, shots)
    return (torch.cdist(pool, shots).square() / (-2 * bandwidth**2)).logsumexp(1)


def hull_distance(points: Tensor, corners: Tensor, steps: int = 300) -> Tensor:
    """The distance of each point to the convex hull of the corners, by accelerated projected gradient (FISTA).

    Of w ≥ 0 with Σ w = 1 the least ½‖x - w C‖²; its error falls at least as 2 ‖C‖² / steps², by the largest singular
    value ‖C‖.

    Args:
        points: [n, d].
        corners: C [k, d].
        steps: How many.

    Returns:
        [n].
    """
    G, g = corners @ corners.mT, points @ corners.mT
    rate = 1 / torch.linalg.matrix_norm(G, 2).clamp_min(torch.finfo(G.dtype).tiny)
    w = ahead = torch.full_like(g, 1 / len(corners))
    momentum = 1.0
    for _ in range(steps):
        before, w = w, _onto_simplex(ahead - rate * (ahead @ G - g))
        last, momentum = momentum, (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = w + (last - 1) / momentum * (w - before)
    return (points - w @ corners).norm(dim=1)


def near_and_diverse(
    pool: Tensor,
    shots: Tensor,
    count: int,
    *,
    scorer: Scorer = "max-cosine",
    threshold: float = 0.9,
    bandwidth: float = 2.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The rows of a pool that are nearest to a few given ones, without those that repeat a nearer one.

    The `count` nearest are taken ("density": drawn in proportion to it), then each whose cosine to one before it is
    above the threshold goes, whether or not that one stays; so any order of the pool gives the same.

    Args:
        pool: [n, d].
        shots: [k, d].
        count: How many before the repetitions go.
        scorer: See `nearness`; all rows are brought to length 1 first.
        threshold: τ; 1 keeps all.
        bandwidth: Of "density".
        generator: For "density", on the device of the vectors.

    Returns:
        At most `count` indices, the nearest first.

    Raises:
        ValueError: As for `nearness`; or "density" has no generator.
    """
    pool, shots = F.normalize(pool, dim=1), F.normalize(shots, dim=1)
    scores = nearness(pool, shots, scorer, bandwidth)
    if scorer == "density":
        if generator is None:
            raise ValueError("density draws at random: give a generator")
        # the largest of logs with Gumbel noise are a draw without replacement
        noise = torch.empty_like(scores).exponential_(generator=generator)
        scores = scores - noise.log()
    order = scores.argsort(descending=True, stable=True)[:count]
    # rounding takes the cosine of equal rows beyond 1
    return order[redundancy(pool[order]).clamp(max=1) <= threshold].cpu()


def shannon(counts: Tensor) -> float:
    """Entropy in bits of the distribution that counts make; 0 where there are none."""
    p = counts[counts > 0].double()
    p = p / p.sum()
    return float(-(p * p.log2()).sum())


def score_entropy(scores: Tensor, bins: int = 50) -> float:
    """How finely scores tell their examples apart: the entropy in bits of their histogram.

    The scores are standardised; the histogram has equal bins from -4 to 4, and what lies outside is left out. (The
    code of Adapt-∞ puts the edges at ±4 of the standard deviation before it standardises.) 0 for equal scores.

    Args:
        scores: [n].
        bins: How many.
    """
    scores = scores.double()
    spread = scores.std(correction=0)
    # equal numbers may differ from their mean by its rounding
    if not spread > torch.finfo(scores.dtype).eps * scores.abs().max():
        return 0.0
    return shannon(torch.histc(((scores - scores.mean()) / spread).cpu(), bins, -4, 4))


def sharpest(scores: dict[str, Tensor], bins: int = 50) -> str:
    """The name of the scores with the largest entropy; the first of equals.

    Args:
        scores: [n] each, by name; those that are not finite everywhere do not take part.
        bins: See `score_entropy`.

    Raises:
        ValueError: None takes part.
    """
    known = {name: values for name, values in scores.items() if torch.isfinite(values).all()}
    if not known:
        raise ValueError(f"none of the scores {', '.join(scores)} is defined for all of these examples")
    return max(known, key=lambda name: score_entropy(known[name], bins))


def coverage_sample(
    scores: Tensor, count: int, generator: torch.Generator, bins: int = 50, cut: float = 0.05
) -> Tensor:
    """Coverage-centric sampling (CCS): as many examples from each range of scores, without the extremes.

    The share `cut` of the examples at either end is left out (less of it where `count` would not be reached). What is
    left is cut into ranges of equal width, from high to low, and each range gives the same number at random; one that
    has too few gives all, and the others give more.

    Source: Zheng, Liu, Lai, Prakash, "Coverage-centric Coreset Selection for High Pruning Rates", ICLR 2023,
    arXiv 2210.15809.

    Args:
        scores: [n].
        count: How many to draw; all where there are fewer.
        generator: On the CPU.
        bins: Ranges.
        cut: Share left out at either end, from 0 to below 1/2.
    """
    scores = scores.cpu().double()
    n = len(scores)
    if count >= n:
        return torch.arange(n)
    out = min(int(cut * n), (n - count) // 2)
    inside = scores.argsort(stable=True)[out : n - out].flip(0)
    low, high = scores[inside[-1]], scores[inside[0]]
    if high > low:
        place = ((high - scores[inside]) / (high - low) * bins).long().clamp(max=bins - 1)
    else:
        place = torch.zeros(len(inside), dtype=torch.int64)
    groups = [inside[place == number] for number in range(bins)]
    shares = water_filling([len(group) for group in groups], count)
    drawn = [group[_draw(len(group), share, generator)] for group, share in zip(groups, shares, strict=True)]
    return torch.cat(drawn).sort().values


def random_sample(scores: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` of the n examples at random, each once, whatever their scores [n]; all where there are fewer."""
    return _draw(len(scores), min(count, len(scores)), generator).sort().values


def random_projection(vectors: Tensor, width: int, seed: int) -> Tensor:
    """x R / √width, with R [d, width] of random signs (Rademacher): norms and angles stay as they are, nearly.

    A squared norm is kept in expectation, with a relative standard deviation of at most √(2 / width). R is made anew
    from the seed, a few rows at a time, so that it need not fit into memory.

    Args:
        vectors: [n, d].
        width: Of the result.
        seed: The same seed and device give the same R.
    """
    generator = torch.Generator(vectors.device).manual_seed(seed)
    total = vectors.new_zeros(len(vectors), width)
    for columns in vectors.split(_BLOCK, dim=1):
        shape = (columns.shape[1], width)
        signs = torch.randint(2, shape, generator=generator, device=vectors.device, dtype=torch.int8)
        total += columns @ signs.mul_(2).sub_(1).to(vectors.dtype)
    return total / width**0.5


@torch.no_grad()
def zero_order_gradient(
    loss: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    generator: torch.Generator,
    *,
    probes: int = 1,
    step: float = 1e-3,
) -> list[Tensor]:
    """An estimate of a loss's gradient from its values alone: the mean over probes z ~ N(0, 1) of

        z (L(θ + ε z) - L(θ - ε z)) / (2 ε)

    Its expectation is the gradient, up to O(ε²); of d numbers its relative squared error is about (d + 1) / probes.

    Args:
        loss: Gives the loss of the parameters as they are, a scalar, or several losses [n].
        parameters: θ; they are moved, and are at the end as they were, bit for bit.
        generator: On the device of the parameters.
        probes: How many z are drawn.
        step: ε.

    Returns:
        One a parameter, of its shape; [n, ...] of several losses, all of them along the same z.
    """
    start = [parameter.clone() for parameter in parameters]
    total: list[Tensor | float] = [0.0] * len(start)
    for _ in range(probes):
        z = [torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype) for p in parameters]
        values = []
        for way in (step, -step):
            for parameter, own, direction in zip(parameters, start, z, strict=True):
                parameter.copy_(own + way * direction)
            values.append(loss())
        slope = (values[0] - values[1]) / (2 * step)
        for i, direction in enumerate(z):
            total[i] = total[i] + slope.view(*slope.shape, *[1] * direction.dim()) * direction / probes
    for parameter, own in zip(parameters, start, strict=True):
        parameter.copy_(own)
    return total


def _onto_simplex(v: Tensor) -> Tensor:
    """The nearest w ≥ 0 of sum 1 to each row of v [n, k]: max(v - θ, 0)."""
    falling = v.sort(dim=1, descending=True).values
    sums = falling.cumsum(1) - 1
    places = torch.arange(1, v.shape[1] + 1, device=v.device)
    last = (falling * places > sums).sum(1, keepdim=True)
    return (v - sums.gather(1, last - 1) / last).clamp(min=0)


def _draw(n: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=generator, device=generator.device)[:count]


def _spread_rows(vectors: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """The start of k-means++, [at most `clusters`, d]: fewer where no other row is left."""
    chosen = [vectors[_draw(len(vectors), 1, generator)[0]]]
    distance = _squared_distance(vectors, chosen[0])
    while len(chosen) < clusters and bool((distance > 0).any()):
        row = int(torch.multinomial(distance.double() / distance.double().sum(), 1, generator=generator))
        chosen.append(vectors[row])
        distance = torch.minimum(distance, _squared_distance(vectors, chosen[-1]))
    return torch.stack(chosen)


def _squared_distance(vectors: Tensor, centre: Tensor) -> Tensor:
    return (vectors - centre).square().sum(1)


def _nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    # ‖x - c‖² without the ‖x‖² that all centres share
    return (centres.square().sum(1) - 2 * vectors @ centres.mT).argmin(1)

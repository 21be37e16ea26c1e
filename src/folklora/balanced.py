"""k-means with clusters of one size."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def balanced_kmeans(points: Tensor, clusters: int, iterations: int = 10) -> Tensor:
    """The cluster [n] of each point [n, d]; all clusters have n / clusters points.

    Lloyd's steps from points drawn by k-means++; points that lose most by their second choice choose first.

    Args:
        points: The points.
        clusters: How many clusters; divides n.
        iterations: The most steps.
    """
    centres = _spread(points, clusters)
    found = None
    for _ in range(iterations):
        now = _assigned(torch.cdist(points, centres).square())
        if found is not None and torch.equal(now, found):
            break
        found = now
        centres = torch.stack([points[found == number].mean(0) for number in range(clusters)])
    return found


def _spread(points: Tensor, clusters: int) -> Tensor:
    """Starting centres: each next one is a point drawn by its squared distance from those before."""
    chosen = [int(torch.randint(len(points), ()))]
    for _ in range(clusters - 1):
        distance = torch.cdist(points, points[chosen]).square().amin(1)
        # equal points are all at distance 0
        weights = distance + distance.sum().clamp(min=1e-30) * 1e-12
        chosen.append(int(torch.multinomial(weights.cpu().double(), 1)))
    return points[chosen]


def _assigned(distances: Tensor) -> Tensor:
    """Each point's nearest cluster with room left, of distances [n, clusters]."""
    count, clusters = distances.shape
    best = distances.topk(2, dim=1, largest=False).values
    preferences = distances.argsort(1).tolist()
    room, found = [count // clusters] * clusters, [0] * count
    for point in (best[:, 1] - best[:, 0]).argsort(descending=True).tolist():
        found[point] = next(number for number in preferences[point] if room[number])
        room[found[point]] -= 1
    return torch.tensor(found, device=distances.device)

"""k-means with clusters of one size."""

from __future__ import annotations

import torch

from folklora.balanced import balanced_kmeans


def test_balanced_clusters_are_found_and_of_one_size() -> None:
    generator = torch.Generator().manual_seed(4)
    centres, truth = 10 * torch.randn(3, 6, generator=generator), torch.arange(30) % 3
    torch.manual_seed(0)
    found = balanced_kmeans(centres[truth] + torch.randn(30, 6, generator=generator), 3)
    assert len({(int(a), int(b)) for a, b in zip(truth, found, strict=True)}) == 3
    assert torch.equal(found.bincount(), torch.full((3,), 10))
    # unequal groups are still cut into equal clusters, and equal points are no trouble
    assert torch.equal(balanced_kmeans(centres[(torch.arange(30) > 24).long()], 3).bincount(), torch.full((3,), 10))

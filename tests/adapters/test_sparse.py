"""Sparse changes and sets of entries: what goes in comes out, in as few bytes as is said."""

from __future__ import annotations

import pytest
import torch

from folklora.adapters.sparse import index_dtype, indices_of, packed, packed_size, scattered, unpacked

SHAPES = [(13,), (5, 7), (3, 4, 5), (2, 3, 4, 5), (8, 16), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sparse_tensor_of_any_shape_survives_the_round_trip(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.3)
    indices = indices_of(dense != 0)
    values = dense.flatten()[indices.long()]
    assert len(indices) == int((dense != 0).sum())
    assert torch.equal(scattered(indices, values, shape), dense)
    # as torch's own format of indices counts them
    coordinates = torch.stack(torch.unravel_index(indices.long(), shape))
    assert torch.equal(torch.sparse_coo_tensor(coordinates, values, shape).to_dense(), dense)


def test_a_gradient_reaches_the_values_alone() -> None:
    values = torch.randn(3, requires_grad=True)
    indices = torch.tensor([1, 4, 5], dtype=torch.int32)
    weight = torch.arange(6.0).view(2, 3)
    (scattered(indices, values, (2, 3)) * weight).sum().backward()
    assert torch.equal(values.grad, torch.tensor([1.0, 4.0, 5.0]))


@pytest.mark.parametrize("shape", SHAPES)
def test_bits_survive_the_round_trip(shape: tuple[int, ...]) -> None:
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5
    bits = packed(chosen)
    assert bits.dtype == torch.uint8
    assert len(bits) == packed_size(chosen.numel()) == -(-chosen.numel() // 8)
    assert torch.equal(unpacked(bits, shape), chosen)
    # the first entry in the lowest bit
    assert int(bits[0]) == sum(int(value) << place for place, value in enumerate(chosen.flatten()[:8]))


def test_indices_are_wide_enough_for_the_largest_matrix() -> None:
    assert index_dtype(2**31 - 1) == torch.int32
    assert index_dtype(2**31) == torch.int64

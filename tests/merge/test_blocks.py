"""Tensors that are gone through some rows at a time: nothing depends on where one block ends and the next begins."""

from __future__ import annotations

import re

import pytest
import torch

from folklora import merge_models
from folklora.merge import blocks, ties
from folklora.merge.blocks import Blocks, Rows
from folklora.merge.sparsify import Largest
from folklora.methods import Method, methods

BY_ROWS = [method for method in methods("merge") if method.factory.by_rows]
OPTIONS = {
    "ties": {"density": [0.3]}, "breadcrumbs": {"density": [0.5], "gamma": [0.1]}, "sce": {"select_topk": 0.4},
    "breadcrumbs-ties": {"density": [0.5], "gamma": [0.1]}, "dare-linear": {"density": [0.4]},
    "dare-ties": {"density": [0.4], "rescale_norm": "l1"}, "della-linear": {"density": [0.4]},
    "della": {"density": [0.4], "rescale_norm": "l1"},
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", BY_ROWS, ids=lambda method: method.name)
def test_in_blocks_a_method_gives_what_it_gives_of_the_whole(
    method: Method, dtype, normal, around, merged, monkeypatch
):
    base = normal(40, 6, 2)
    # bfloat16 has many equal magnitudes
    models = [model.to(dtype) for model in around(base, 3)]
    (whole,) = merged(method, models, base.to(dtype), **OPTIONS.get(method.name, {}))
    monkeypatch.setattr(blocks, "ELEMENTS", 7 * 12)
    (parts,) = merged(method, models, base.to(dtype), **OPTIONS.get(method.name, {}))
    # sums of 480 terms in another order, in float64, decide a factor of entries of size 1
    close = 2 * torch.finfo(whole.dtype).eps if dtype == torch.bfloat16 else 480 * torch.finfo(dtype).eps
    torch.testing.assert_close(parts, whole, rtol=close, atol=close)


@pytest.mark.parametrize("options", [{"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}])
def test_angles_of_rows_and_of_columns_are_those_of_the_whole(options, normal, around, merged, monkeypatch):
    method = next(method for method in BY_ROWS if method.name == "nuslerp")
    base = normal(30, 7, dtype=torch.float64)
    models = around(base, 2)
    (whole,) = merged(method, models, base, **options)
    monkeypatch.setattr(blocks, "ELEMENTS", 4 * 7)
    (parts,) = merged(method, models, base, **options)
    torch.testing.assert_close(parts, whole, rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [1, 3, 20])
def test_of_equal_values_the_first_are_taken_over_all_blocks_in_every_pass(rows, dtype, normal, monkeypatch):
    monkeypatch.setattr(blocks, "ELEMENTS", 10 * rows)
    values = (normal(20, 10).abs() * 4).round().to(dtype)
    count = int((values > 1).sum()) + 17
    tensors = Blocks.of([values, values.flip(0)])
    largest = Largest(tensors, [count, 0])
    masks = tensors.each_pass(largest.masks)
    expected = values.flatten().sort(descending=True, stable=True).indices[:count]
    for _ in range(2):
        mask = masks.merged(lambda found, _: found[0]).whole()
        assert torch.equal(mask.flatten().nonzero().flatten(), expected.sort().values)
        assert not masks.merged(lambda found, _: found[1]).whole().any()


def test_a_merge_by_rows_reads_and_gives_no_more_than_a_block_at_once(normal, around, monkeypatch):
    monkeypatch.setattr(blocks, "ELEMENTS", 4 * 5)
    base = normal(11, 5)
    models = around(base, 2)
    asked = []

    class Stored:
        shape, dtype, device = base.shape, torch.float32, base.device

        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

        def __getitem__(self, part) -> torch.Tensor:
            asked.append(part)
            return self.tensor[part]

    rows = ties.rows([Stored(model) for model in models], Stored(base), density=[0.5])
    assert isinstance(rows, Rows)
    assert [len(part) for part in rows] == [4, 4, 3]
    assert torch.equal(rows.whole(), ties(models, base, density=[0.5]))
    assert set(map(str, asked)) == {f"slice({start}, {start + 4}, None)" for start in (0, 4, 8)}


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (3, 0), (50,), (2, 30), (30, 2)])
def test_every_shape_is_gone_through(shape, normal, monkeypatch):
    monkeypatch.setattr(blocks, "ELEMENTS", 10)
    tensor = normal(60)[: torch.Size(shape).numel()].view(shape)
    parts = list(Blocks.of([tensor]))
    assert torch.equal(Blocks.of([tensor]).merged(lambda tensors, _: tensors[0]).whole(), tensor)
    # a tensor of one dimension is one row
    assert len(parts) == {(2, 30): 2, (30, 2): 6}.get(shape, 1)


def test_which_methods_hold_whole_tensors_is_said():
    whole = {method.name.replace("-", "_") for method in methods("merge") if not method.factory.by_rows}
    (said,) = re.findall(r"own parts \((.*?)\)", merge_models.__doc__, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", said)) == whole

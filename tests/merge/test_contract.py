"""What holds of every merging method: types, the base kept bit for bit, order, one model; and what is refused."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor

from folklora.merge import PerTask, average, dare_ties, emr, fisher, r_tsvm, slerp, task_arithmetic, ties, tsv_m
from folklora.merge.deltas import deltas
from folklora.methods import Method, find, methods

EVERY = methods("merge")
every_method = pytest.mark.parametrize("method", EVERY, ids=lambda method: method.name)
SHAPES = [(12, 8), (8, 12), (7,), (2, 3, 4)]
ENDS = {"slerp", "nuslerp", "nearswap"}  # what two ends give, not a sum over models
SHARED_SCALE = {"model-stock", "iso-c"}  # one model is not merged, or not into itself
RANDOM = {"dare-linear", "dare-ties", "della", "della-linear"}


def test_the_room_lists_its_functions_by_their_cards_names():
    names = {method.name for method in EVERY}
    assert {"task-arithmetic", "ties", "dare-ties", "tsv-m", "r-tsvm", "wudi", "emr", "breadcrumbs-ties"} <= names
    assert len(names) >= 28
    found = find("task-arithmetic", "merge")
    assert found.factory is task_arithmetic
    assert found.paper == "Ilharco et al. 2023, arXiv 2212.04089"
    assert found.factory.__doc__.startswith("Task arithmetic")


@every_method
def test_signatures_hold_to_the_contract(method: Method):
    hints = typing.get_type_hints(method.factory)
    names = list(inspect.signature(method.factory).parameters)
    assert names[:2] == ["models", "base"]
    assert hints["models"] == Sequence[Tensor]
    assert hints["base"] in (Tensor, Tensor | None, type(None))
    assert hints["return"] is Tensor or issubclass(hints["return"], PerTask)
    for name in names[2:]:
        assert inspect.signature(method.factory).parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        kinds = [kind for kind in typing.get_args(hints[name]) or [hints[name]] if kind is not type(None)]
        plain = {float, int, bool, Sequence[float], Sequence[Tensor], Sequence[torch.Generator]}
        assert hints[name] in plain or typing.get_origin(hints[name]) is Literal or set(kinds) <= plain


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_models_that_are_the_base_give_the_base_bit_for_bit(method: Method, shape, normal, merged):
    base = normal(*shape)
    for result in merged(method, [base.clone() for _ in range(3)], base):
        assert torch.equal(result, base)
        assert result.dtype == torch.float32


@every_method
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_comes_back_as_float32_and_float64_stays(method: Method, shape, normal, around, merged):
    base = normal(*shape)
    models = around(base, 3)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        for result in merged(method, [model.to(dtype) for model in models], base.to(dtype)):
            assert result.dtype == expected
            assert result.shape == base.shape
            assert torch.isfinite(result).all()


@pytest.mark.parametrize("method", [m for m in EVERY if m.name not in ENDS | SHARED_SCALE], ids=lambda m: m.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_one_model_gives_that_model(method: Method, shape, normal, around, merged):
    base = normal(*shape, dtype=torch.float64)
    models = around(base, 1)
    whole = {"consensus": {"agreement": 1}, "r-tsvm": {"rank_gamma": 0.0}, "twin-merging": {"mask_rate": 0.0}}
    (result,) = merged(method, models, base, **whole.get(method.name, {}))
    # decompositions of entries near 0.1 in float64
    torch.testing.assert_close(result, models[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", [m for m in EVERY if m.name not in {*ENDS, "passthrough"}], ids=lambda m: m.name)
def test_the_order_of_the_models_does_not_matter(method: Method, normal, around, merged):
    base = normal(12, 8, dtype=torch.float64)
    models, order = around(base, 3), [2, 0, 1]
    options = {"weight": [1.0, 2.0, 0.5]} if "weight" in inspect.signature(method.factory).parameters else {}
    if method.name in RANDOM:
        options |= {"density": [0.5]}
    first = merged(method, models, base, seeds=[5, 6, 7], **options)
    if "weight" in options:
        options["weight"] = [options["weight"][i] for i in order]
    other = merged(method, [models[i] for i in order], base, seeds=[(5, 6, 7)[i] for i in order], **options)
    expected = first if len(first) == 1 else [first[i] for i in order]
    for a, b in zip(other, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@every_method
def test_inputs_are_not_written_to(method: Method, normal, around, merged):
    base = normal(12, 8)
    models = around(base, 3)
    kept = [tensor.clone() for tensor in (base, *models)]
    merged(method, models, base)
    assert all(torch.equal(a, b) for a, b in zip((base, *models), kept, strict=True))


def test_one_value_stands_for_every_model(normal, around):
    base = normal(5, 4)
    models = around(base, 3)
    options = {"weight": [0.3, 0.3, 0.3], "density": [0.5, 0.5, 0.5]}
    assert torch.equal(ties(models, base, weight=[0.3], density=[0.5]), ties(models, base, **options))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda a, b: average([]), "average needs at least one model"),
        (lambda a, b: task_arithmetic([a], None), "task_arithmetic merges what the models changed in their base"),
        (lambda a, b: task_arithmetic([a, a[:2]], b), r"one shape, but they have \(2, 4\), \(3, 4\)"),
        (lambda a, b: average([a.int(), a.int()]), "not torch.int32: copy it from the base"),
        (lambda a, b: ties([a, a, a], b, weight=[1.0, 2.0]), "one weight a model: there are 3 models, but 2 values"),
        (lambda a, b: average([a, b], weight=[1.0, -1.0]), "sum to 0"),
        (lambda a, b: slerp([a, a], b, t=0.5), "slerp was given 3 tensors .* a base and one model"),
        (lambda a, b: fisher([a, a], fisher=[a]), "one fisher a model: there are 2 models, but 1 values"),
        (lambda a, b: fisher([a, a], fisher=[a, a[0]]), r"shape \[4\], not \[3, 4\]"),
        (lambda a, b: tsv_m([a * float("nan"), a], b), "every value must be finite"),
        (lambda a, b: r_tsvm([a], b, outlier_mode="invers"), "outlier_mode is one of 'reweight', .*, not 'invers'"),
        (lambda a, b: dare_ties([a], b, generator=[None], rescale_norm="l2"), "rescale_norm is one of"),
        (lambda a, b: r_tsvm([a] * 4, b, weight_limit=0.5), "weight_limit is 0.5, but .* at least 1"),
        (lambda a, b: r_tsvm([a] * 4, b, rank_gamma=-1.0), "rank_gamma is -1.0, but .* at least 0"),
    ],
)
def test_what_cannot_be_is_refused(call, expected, normal):
    with pytest.raises(ValueError, match=expected):
        call(normal(3, 4), normal(3, 4, seed=1))


def test_task_vectors_are_made_when_they_are_read(normal, around):
    base = normal(5, 4)
    models, read = around(base, 4), []

    class Models(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    changes = deltas(Models(models), base)
    assert len(changes[1:]) == 3
    assert not read, "a merge of many models holds one task vector at a time"
    assert torch.equal(changes[1:][::2][1], models[3] - base)
    assert read == [3]
    assert [torch.equal(change, model - base) for change, model in zip(changes, models, strict=True)] == [True] * 4


def test_a_statistic_is_cast_and_decides_the_precision(normal):
    a = normal(3, 4)
    assert fisher([a, a], fisher=[a.bfloat16().square()] * 2).dtype == torch.float32
    assert fisher([a, a], fisher=[a.double().square()] * 2).dtype == torch.float64


def test_what_is_merged_carries_no_gradient(normal):
    base = normal(4, 4).requires_grad_()
    assert not task_arithmetic([base + 1], base).requires_grad
    assert not emr([base + 1], base).unified.requires_grad

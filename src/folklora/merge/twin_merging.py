"""Twin-Merging: one shared model, and what each model knows beyond it in a few singular directions."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from folklora.merge.average import average
from folklora.merge.breadcrumbs import breadcrumbs, breadcrumbs_ties
from folklora.merge.contract import merging
from folklora.merge.deltas import Lazy
from folklora.merge.iso_c import iso_c
from folklora.merge.karcher import karcher
from folklora.merge.model_stock import model_stock
from folklora.merge.ram import ram
from folklora.merge.sce import sce
from folklora.merge.tall import consensus
from folklora.merge.task_arithmetic import task_arithmetic
from folklora.merge.ties import ties
from folklora.merge.tsv_c import LowRank
from folklora.merge.tsv_m import tsv_m
from folklora.merge.wudi import wudi, wudi_closed_form
from folklora.spectrum import top

Shared = Literal[
    "task-arithmetic", "average", "breadcrumbs", "breadcrumbs-ties", "consensus", "iso-c", "karcher", "model-stock",
    "ram", "sce", "ties", "tsv-m", "wudi", "wudi-closed-form",
]  # fmt: skip
_STATIC = (
    task_arithmetic, average, breadcrumbs, breadcrumbs_ties, consensus, iso_c, karcher, model_stock, ram, sce, ties,
    tsv_m, wudi, wudi_closed_form,
)  # fmt: skip
MERGES: dict[str, Callable[..., Tensor]] = {merge.__name__.replace("_", "-"): merge for merge in _STATIC}
TASK_ARITHMETIC_SCALE = 0.3


@merging(
    paper="Lu et al. 2024, arXiv 2406.15479",
    trains="nothing: a merged model, and each model's leading singular directions beyond it; a router to serve them",
)
def twin_merging(
    models: Sequence[Tensor],
    base: Tensor,
    *,
    shared: Shared = "task-arithmetic",
    lambda_: float | None = None,
    mask_rate: float = 0.9,
    rank: int | None = None,
) -> LowRank:
    r"""Twin-Merging: a merged model, and for each model what it knows beyond that, compressed and mixed by the input.

    θ* = merge(θ_0, {θ_t}), v_t = svd_k(θ_t - θ*) [m, n], the k = int((1 - mask_rate) min(m, n)) leading triplets;
    θ(x) = θ* + Σ_t g_t(x) v_t, g = softmax(router(z(x))), z(x) [d] the mean of θ*'s last hidden states over x.
    The difference is to the merged model, not to θ_0. Here one tensor is split: `.base` is θ*, `delta(t)` is v_t, and
    `for_task(t)` has g one-hot. Tensors that are no matrices keep their v_t whole.

    `merge_models` with this method writes θ* as a checkpoint that loads as it is, and beside it the v_t; `write_task`
    gives one task's model. (θ* is rounded to the stored type there, the v_t are to θ* unrounded.)
    `folklora.merge.twins.Twins` serves a mixed batch in one pass, with g by row, as gated low-rank updates of the
    linear layers; of such a checkpoint, or of adapters without building any [m, n]. Whatever is no linear weight
    (norms, biases, embeddings, a head tied to them, stacked experts) goes with θ* there, for all inputs. The authors
    leave out biases and classifiers, which keep their base's values; `lambda: [{filter: bias, value: 0.0}, {value:
    0.3}]` does so with θ*'s here. Their `magnitude` and `bernoulli` masks, which they find worse, have no factors and
    are left out. Their λ of task arithmetic is 0.29 for RoBERTa on GLUE and 0.3 for Qwen-14B.

    Source: Lu, Fan, Wei, Qu, Chen, Cheng, "Twin-Merging: Dynamic Integration of Modular Expertise in Model Merging",
    NeurIPS 2024, arXiv 2406.15479.

    When to choose:
        When the models disagree so that one merged weight loses much, and inputs of all kinds come mixed, with nobody
        to say which is which. Each input is read twice, and the result is no single weight. Where the task is known,
        TSV-C or EMR store it for less.

    Equation:
        \theta(x) = \theta^* + \sum_t g_t(x)\, v_t, \quad v_t = \operatorname{SVD}_k(\theta_t - \theta^*)
        g(x) = \operatorname{softmax}(\operatorname{router}(z(x)))

    Example:
        import torch
        from folklora.merge import twin_merging

        base = torch.zeros(8, 6)
        models = [torch.randn(8, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
        merged = twin_merging(models, base, mask_rate=0.5)
        print(merged.base + 0.7 * merged.delta(0) + 0.3 * merged.delta(1))

    Args:
        shared: The method that merges θ*, with its own defaults.
        lambda_: Its scale λ; None takes 0.3 for task arithmetic, and the method's own default otherwise.
        mask_rate: The share of the singular directions of each v_t that is left out, from 0 to 1.
        rank: k, held within 0 and min(m, n), in place of `mask_rate`.
    """
    theta = MERGES[shared](models, base, **scale_of(shared, MERGES[shared], lambda_))
    beyond = Lazy(lambda task: models[task] - theta, len(models))
    if base.dim() != 2 or not base.numel():
        return LowRank(theta, torch.stack(list(beyond)))
    count = _kept(min(base.shape), mask_rate, rank)
    if not count:
        empty = [base.new_zeros(len(models), *size, 0) for size in ((base.shape[0],), (), (base.shape[1],))]
        return LowRank(theta, *empty)
    parts = [top(change, count, dtype=base.dtype) for change in beyond]
    return LowRank(theta, *(torch.stack([getattr(part, name) for part in parts]) for name in "USV"))


def scale_of(shared: str, merge: Callable[..., Any], lambda_: float | None) -> dict[str, float]:
    """The scale of a shared merge as its argument; none where it is left at its default.

    Raises:
        ValueError: A scale is given to a method that has none.
    """
    if lambda_ is None:
        return {"lambda_": TASK_ARITHMETIC_SCALE} if shared == "task-arithmetic" else {}
    if "lambda_" not in inspect.signature(merge).parameters:
        raise ValueError(f"the merge '{shared}' has no scale: leave lambda out")
    return {"lambda_": lambda_}


def _kept(short: int, mask_rate: float, rank: int | None) -> int:
    if rank is not None:
        if rank < 0:
            raise ValueError(f"rank must be at least 0, not {rank}")
        return min(rank, short)
    if not 0 <= mask_rate <= 1:
        raise ValueError(f"mask_rate must lie between 0 and 1, not {mask_rate}")
    # 1 - 0.9 is a little below 0.1, and of 10 directions one is meant
    return int((1 - mask_rate) * short + 1e-9)

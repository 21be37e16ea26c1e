"""The baselines: what each trains, what it answers, and that the base stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification

from folklora.domain import TENT, CoTTA, SourceOnly
from folklora.domain.adaptation import ContinualTestTimeAdaptation

Maker = Callable[..., ViTForImageClassification]


def batch(seed: int = 0) -> Tensor:
    return torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


def logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=(images - 0.5) / 0.5).logits


def test_source_only_learns_nothing(tiny_vit: Maker, tmp_path: Path) -> None:
    method, expected = SourceOnly(tiny_vit()), logits(tiny_vit(), batch())
    for _ in range(2):
        assert torch.equal(method.predict(batch()), expected)
    method.save(tmp_path / "state.safetensors")
    method.reset()
    method.resume(tmp_path / "state.safetensors")
    assert method.counts == {"batches": 2}


def test_tent_takes_one_step_on_the_entropy_of_the_norms(tiny_vit: Maker) -> None:
    method, plain = TENT(tiny_vit(), lr=0.1, optimizer="sgd"), tiny_vit()
    names = {name for name, _ in plain.named_parameters() if "layernorm" in name}
    assert {name.removeprefix("base.") for name in method.student} == names
    assert torch.equal(method.predict(batch()), logits(tiny_vit(), batch()))
    # by hand, on a model of its own
    p = plain(pixel_values=(batch() - 0.5) / 0.5).logits.softmax(1)
    (-(p * p.log()).sum(1).mean()).backward()
    with torch.no_grad():
        for name, value in plain.named_parameters():
            if name in names:
                # the first step of Nesterov's momentum: g + 0.9 g
                value -= 0.1 * 1.9 * value.grad
    torch.testing.assert_close(method.predict(batch(1)), logits(plain, batch(1)), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="TENT trains the norms"):
        TENT(nn.Linear(3, 3))


def test_cotta_averages_views_only_where_the_base_is_unsure(tiny_vit: Maker) -> None:
    shifted = [0.0]

    def view(images: Tensor, generator: torch.Generator) -> Tensor:
        shifted[0] += 0.1
        return (images + shifted[0]).clamp(0, 1)

    expected = torch.stack([logits(tiny_vit(), (batch() + 0.1 * k).clamp(0, 1)) for k in (1, 2, 3)]).mean(0)
    unsure = CoTTA(tiny_vit(), confidence=1.1, views=3, view=view)
    torch.testing.assert_close(unsure.predict(batch()), expected, rtol=1e-5, atol=1e-5)
    assert unsure.counts == {"batches": 1, "averaged": 1}
    sure = CoTTA(tiny_vit(), confidence=0.0)
    assert torch.equal(sure.predict(batch()), logits(tiny_vit(), batch()))
    assert sure.counts == {"batches": 1, "averaged": 0}


@pytest.mark.parametrize("make", [TENT, partial(CoTTA, views=2)], ids=["tent", "cotta"])
def test_the_base_is_never_written_to(make: Callable[..., ContinualTestTimeAdaptation], tiny_vit: Maker) -> None:
    model = tiny_vit()
    method = make(model, lr=1e-2)
    first = method.predict(batch())
    for _ in range(2):
        method.predict(batch())
    for name, value in model.named_parameters():
        assert torch.equal(value, tiny_vit().get_parameter(name))
        assert value.grad is None
    assert not torch.allclose(method.predict(batch()), first, atol=1e-5)
    method.reset()
    assert torch.equal(method.predict(batch()), first)


def test_cotta_resumes_its_stream(tiny_vit: Maker, tmp_path: Path) -> None:
    whole, first, second = (CoTTA(tiny_vit(), lr=1e-2, views=2, decay=0.5) for _ in range(3))
    expected = [whole.predict(batch(i)) for i in range(3)]
    first.predict(batch(0))
    first.save(tmp_path / "state.safetensors")
    second.resume(tmp_path / "state.safetensors")
    for i in (1, 2):
        assert torch.equal(second.predict(batch(i)), expected[i])

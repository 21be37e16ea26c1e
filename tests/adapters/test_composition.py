"""Composition of whole models, and losses without labels."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from folklora import ATLAS, tiny
from folklora.adapters.composition import Composition
from folklora.adapters.host.layer import updates_of
from folklora.adapters.unlabelled import NO_LABEL, prediction_entropy, pseudo_label_loss, trusted_labels

NORMS = ("norm", "embed_tokens")


def tuned() -> dict[str, dict[str, Tensor]]:
    return {task: load_file(file) for task, file in tiny.task_vectors(tiny.llama()).items()}


def composition(dtype: torch.dtype = torch.float32, **options: Any) -> Composition:
    return Composition(tiny.llama(dtype=dtype), tuned(), **options)


def noise(model: Composition, seed: int = 0) -> Composition:
    generator = torch.Generator().manual_seed(seed)
    model.coefficients.data = 0.5 * torch.randn(model.coefficients.shape, generator=generator).to(model.coefficients)
    return model


def test_every_tensor_is_a_block_and_a_row_of_ones_is_that_model() -> None:
    model, base = composition(), tiny.llama()
    count = sum(1 for _ in base.parameters())
    assert model.coefficients.shape == (2, count)
    assert composition(isotropic=True).coefficients.shape == (2, 1)
    assert [name for name, value in model.named_parameters() if value.requires_grad] == ["coefficients"]
    assert torch.equal(tiny.logits(model), tiny.logits(base))
    model.coefficients.data[1] = 1
    law = tiny.llama()
    law.load_state_dict(tuned()["law"])
    torch.testing.assert_close(tiny.logits(model), tiny.logits(law), rtol=0, atol=1e-5)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in model.model.state_dict().items())


def test_gradients_are_inner_products_and_the_folded_model_computes_the_same() -> None:
    model = noise(composition())
    tiny.loss(model).backward()
    plain = tiny.llama()
    plain.load_state_dict(model.merged_state())
    torch.testing.assert_close(tiny.logits(plain), tiny.logits(model), rtol=0, atol=1e-5)
    tiny.loss(plain.requires_grad_()).backward()
    base = tiny.llama().state_dict()
    for index, name in enumerate(model.blocks):
        gradient = plain.get_parameter(name).grad.double()
        for row, state in enumerate(tuned().values()):
            expected = (gradient * (state[name].double() - base[name].double())).sum()
            assert float(model.coefficients.grad[row, index]) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)


def test_around_an_adapter_it_composes_what_is_no_layers_weight() -> None:
    vectors = tiny.task_vectors(tiny.llama())
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"]
    inner = get_peft_model(tiny.llama(), ATLAS(vectors=vectors, target_modules=linear))
    model = Composition(inner, tuned())
    assert all(any(part in name for part in NORMS) for name in model.blocks)
    model.coefficients.data[0] = 1
    for _, update in updates_of(inner, "default"):
        update.coefficients.data[0] = 1
    art = tiny.llama()
    art.load_state_dict(tuned()["art"])
    torch.testing.assert_close(tiny.logits(model), tiny.logits(art), rtol=0, atol=1e-5)
    tiny.loss(model).backward()
    assert all(value.grad.any() for name, value in model.named_parameters() if value.requires_grad)
    assert {name.rpartition(".")[2] for name, value in model.named_parameters() if value.requires_grad} == {
        "coefficients"
    }


def test_tied_tensors_are_one_block() -> None:
    class Tied(nn.Module):
        def __init__(self, seed: int) -> None:
            super().__init__()
            torch.manual_seed(seed)
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.embedding(tokens))

    tokens, one, two = torch.arange(9), Tied(0), Tied(1)
    model = Composition(one, {"two": two.state_dict()}, init=1.0)
    assert model.blocks == ["embedding.weight"]
    torch.testing.assert_close(model(tokens), two(tokens), rtol=0, atol=1e-6)
    state = model.merged_state()
    assert state.keys() == two.state_dict().keys()
    torch.testing.assert_close(state["head.weight"], two.head.weight.detach(), rtol=0, atol=1e-6)


def test_the_tangent_model_is_linear_in_the_coefficients() -> None:
    torch.manual_seed(0)
    base = tiny.TwoLayers().double()
    states = {n: {k: v + 0.1 * torch.randn_like(v) for k, v in base.state_dict().items()} for n in "ab"}
    model, x = noise(Composition(base, states)).double(), torch.randn(7, 32).double()
    start, first = base(x), model.coefficients.detach().clone()
    one, second = model.linearised(x) - start, noise(model, 1).coefficients.detach().clone()
    two = model.linearised(x) - start
    model.coefficients.data = 0.3 * first - 2 * second
    torch.testing.assert_close(model.linearised(x) - start, 0.3 * one - 2 * two, rtol=1e-9, atol=1e-12)
    # the tangent of the composed model itself, by a difference
    model.coefficients.data = 1e-5 * first
    torch.testing.assert_close((model(x) - start) / 1e-5, one, rtol=0, atol=1e-3)
    model.linearised(x).square().sum().backward()
    assert model.coefficients.grad.abs().min() > 0


def test_coefficients_are_saved_with_the_names_that_they_belong_to(tmp_path: Path) -> None:
    model = noise(composition(chosen=lambda name: "norm" in name))
    model.save_coefficients(tmp_path / "c.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["c.safetensors"]
    with safe_open(tmp_path / "c.safetensors", framework="pt") as file:
        assert file.metadata()["vectors"] == '["art", "law"]'
    other = composition(chosen=lambda name: "norm" in name)
    other.load_coefficients(tmp_path / "c.safetensors")
    assert torch.equal(tiny.logits(other), tiny.logits(model))
    with pytest.raises(ValueError, match="has coefficients of the blocks"):
        composition().load_coefficients(tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"has \[2, 5\] coefficients, not \[2, 1\]"):
        composition(chosen=lambda name: "norm" in name, isotropic=True).load_coefficients(tmp_path / "c.safetensors")


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="0 fine-tuned models"):
        Composition(tiny.llama(), {})
    with pytest.raises(ValueError, match="have 0 chosen tensors"):
        composition(chosen=lambda name: False)
    with pytest.raises(ValueError, match=r"bad: model.norm.weight is \[3\], and the base's \[32\]"):
        Composition(tiny.llama(), {"bad": {"model.norm.weight": torch.zeros(3)}})


def test_entropy_of_known_distributions() -> None:
    uniform, certain = torch.zeros(2, 5), torch.tensor([[0.0, 200.0, 0.0]])
    assert float(prediction_entropy(uniform)) == pytest.approx(math.log(5))
    assert float(prediction_entropy(certain)) == pytest.approx(0, abs=1e-12)
    z = torch.randn(4, 6, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.arange(6) < torch.tensor([1, 6, 3, 2]).unsqueeze(1)
    expected = torch.distributions.Categorical(logits=z).entropy()[mask].mean()
    assert float(prediction_entropy(z, mask)) == pytest.approx(float(expected), rel=1e-5)


def test_the_most_confident_of_each_class_are_trusted() -> None:
    probabilities = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8], [0.7, 0.3], [0.95, 0.05], [0.45, 0.55]])
    assert trusted_labels(probabilities.log(), share=2 / 3).tolist() == [0, -1, 1, -1, 0, 1]
    assert trusted_labels(probabilities.log()).tolist() == [-1, -1, 1, -1, 0, -1]
    assert trusted_labels(probabilities.log(), share=1.0, largest=1).tolist() == [-1, -1, 1, -1, 0, -1]
    with pytest.raises(ValueError, match="share above 0"):
        trusted_labels(probabilities, share=0.0)


def test_pseudo_labels_of_confident_and_trusted_items_count() -> None:
    generator = torch.Generator().manual_seed(0)
    weak, strong = (3 * torch.randn(6, 4, generator=generator) for _ in range(2))
    weak[0, 2] += 20
    weak.requires_grad_()
    strong.requires_grad_()
    labels = torch.tensor([NO_LABEL, 3, NO_LABEL, NO_LABEL, NO_LABEL, 0])
    loss, share = pseudo_label_loss(weak, strong, labels, threshold=0.95)
    q, logs = weak.detach().softmax(-1), strong.detach().log_softmax(-1)
    terms = [-logs[1, 3], -logs[5, 0]] + [-(q[i] * logs[i]).sum() for i in (0, 2, 3, 4) if q[i].max() > 0.95]
    assert 3 <= len(terms) < 6
    assert loss.item() == pytest.approx(float(sum(terms)) / len(terms), rel=1e-5)
    assert float(share) == pytest.approx(len(terms) / 6)
    loss.backward()
    assert weak.grad is None
    assert strong.grad.any()
    assert float(pseudo_label_loss(torch.zeros(3, 4), torch.randn(3, 4))[0]) == 0


def test_entropy_falls_where_coefficients_learn_without_labels() -> None:
    model = get_peft_model(
        tiny.llama(), ATLAS(vectors=tiny.task_vectors(tiny.llama()), target_modules=["v_proj", "down_proj"], init=0.3)
    )
    batch = tiny.batch()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    found = []
    for _ in range(10):
        loss = prediction_entropy(model(**batch).logits, batch["attention_mask"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    assert found == sorted(found, reverse=True)

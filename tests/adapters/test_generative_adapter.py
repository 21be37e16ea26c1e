"""Generative Adapter: what a segment writes and who sees it, with loops in float64 as the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from folklora import GenerativeAdapter, LoRA, tiny
from folklora.adapters.generative_adapter import GenerativeUpdate
from folklora.adapters.host.call import telling
from folklora.adapters.host.layer import layers_of, updates_of

D, IN, R1, R2 = 12, 10, 6, 5
TARGETS = ["o_proj"]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.v, self.o = nn.LayerNorm(D), nn.Linear(D, IN), nn.Linear(IN, D)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.o(torch.tanh(self.v(self.norm(hidden_states))))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        for layer in self.layers:
            x = layer(hidden_states=x)
        return x


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


def toy(**options: Any) -> PeftModel:
    """A model in float64 whose generators have left their start."""
    settings = {"r": R2, "inter_size": R1, "max_rank": 3, "alpha": 8.0, "segments": 3, "hidden_size": D}
    return tiny.moved(get_peft_model(net(), GenerativeAdapter(target_modules=["o"], **settings | options))).double()


def language(**options: Any) -> PeftModel:
    return tiny.trained(GenerativeAdapter(**{"r": 8, "segments": 4, "target_modules": TARGETS} | options))


def an_update(**options: Any) -> GenerativeUpdate:
    return next(updates_of(toy(**options), "default"))[1]


def inputs(rows: int = 6, seed: int = 2) -> Tensor:
    return torch.randn(rows, 4, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def state(*shape: int) -> Tensor:
    return torch.randn(*(shape or (R1, R2)), generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def normalised(S: Tensor, norm: str, rank: int) -> Tensor:
    U, sigma, Vh = torch.linalg.svd(S, full_matrices=False)
    if norm == "svd":
        return U[:, :rank] @ Vh[:rank]
    return S / (sigma[0] if norm == "spectral" else (sigma.square().sum() + 1e-6).sqrt())


def loops(model: PeftModel, x: Tensor, sees: list[int], norm: str, mask: Tensor) -> Tensor:
    """One row, one token, one dense update at a time."""
    n, rows = len(sees), list(x)
    for layer, update in updates_of(model, "default"):
        block = model.base_model.model.get_submodule(update.block)
        written = []
        for row, real in zip(rows, mask, strict=True):
            S = torch.zeros(R1, R2, dtype=torch.float64)
            for h in row[real.bool()]:
                u = h / (h.square().mean() + 1e-6).sqrt() * update.g
                S = S + torch.outer(update.A2 @ u, update.A3 @ u)
            written.append(S)
        base = layer.get_base_layer()
        after = []
        for i, row in enumerate(rows):
            W, first = base.weight, i - i % n
            if sees[i % n]:
                M = normalised(sum(written[first : first + sees[i % n]]), norm, 3)
                W = W + 8.0 / R2 * update.B @ M.T @ update.A1
            after.append(row + torch.tanh(block.v(block.norm(row))) @ W.T + base.bias)
        rows = after
    return torch.stack(rows)


@pytest.mark.parametrize("norm", ["svd", "frobenius", "spectral"])
@pytest.mark.parametrize("layout", ["completion", "reconstruction"])
@torch.no_grad()
def test_it_computes_what_the_formulas_say(norm: str, layout: str):
    segments = 3 if layout == "completion" else 4
    model = toy(norm=norm, layout=layout, segments=segments)
    x, mask = inputs(2 * segments), torch.ones(2 * segments, 4)
    # three tokens write three directions, which max_rank keeps
    mask[1, 3:] = mask[segments, 3:] = 0
    sees = [0, 1, 2] if layout == "completion" else [0, 1, 1, 2]
    expected = loops(model, x, sees, norm, mask)
    # float64 throughout; the roundings of two layers
    torch.testing.assert_close(model(x, attention_mask=mask), expected, rtol=0, atol=1e-12)


def test_the_first_step_computes_the_base():
    model = get_peft_model(net(), GenerativeAdapter(r=R2, target_modules=["o"], hidden_size=D, segments=3))
    assert torch.equal(model(inputs()), net()(inputs()))


def test_without_segments_and_without_anything_applied_it_computes_the_base():
    model = toy(segments=1)
    assert torch.equal(model.eval()(inputs()), net()(inputs()))
    with pytest.raises(ValueError, match="with segments=1 there is nothing to train"):
        model.train()(inputs())
    with torch.no_grad():
        assert torch.equal(model(inputs()), net()(inputs()))


@torch.no_grad()
def test_without_norm_what_is_applied_is_linear_attention_over_the_text():
    model, text, x = toy(), inputs(1)[0], inputs(2, seed=5)
    layer, update = next(updates_of(model, "default"))
    inner = torch.randn(2, 4, IN, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    expected = layer.get_base_layer()(inner)
    for h in text:
        u = h / (h.square().mean() + 1e-6).sqrt() * update.g
        k, v = update.A2 @ u, update.A3 @ u
        expected = expected + 8.0 / R2 * (inner @ update.A1.T @ k).unsqueeze(-1) * (update.B @ v)
    with telling(model, cores={("default", layer.name): update.statistic(text[None])}):
        torch.testing.assert_close(layer(inner), expected, rtol=0, atol=1e-12)
        assert not torch.allclose(model(x), net()(x))


def test_what_segments_write_adds_up_and_padding_and_order_do_not_count():
    update, h = an_update(), inputs(2)
    both = update.statistic(h.flatten(0, 1)[None])[0]
    apart = update.statistic(h)
    torch.testing.assert_close(apart.sum(0), both, rtol=0, atol=1e-12)
    torch.testing.assert_close(update.statistic(h.flip(1)), apart, rtol=0, atol=1e-12)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    other = torch.where(mask.bool().unsqueeze(-1), h, 9.0)
    torch.testing.assert_close(update.statistic(other, mask)[0], update.statistic(h[:1, :2])[0], rtol=0, atol=1e-12)
    assert torch.equal(update.statistic(h, torch.zeros(2, 4)), torch.zeros(2, R1, R2, dtype=torch.float64))


def test_the_svd_norm_is_a_projector_of_the_rank_there_is_at_any_scale():
    update = an_update(max_rank=4)
    for rank in (2, 5):
        S = state(R1, rank) @ state(rank, R2)
        M = update.normalise(S)
        P = M.T @ M
        torch.testing.assert_close(P @ P, P, rtol=0, atol=1e-12)
        assert round(float(P.trace()), 9) == min(4, rank)
        torch.testing.assert_close(update.normalise(100 * S), M, rtol=0, atol=1e-11)


def test_the_other_norms():
    S = state()
    # ‖S‖² is about 30, against the formula's 1e-6
    assert float(an_update(norm="frobenius").normalise(S).norm()) == pytest.approx(1, abs=1e-6)
    assert float(torch.linalg.matrix_norm(an_update(norm="spectral").normalise(S), 2)) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("norm", ["svd", "frobenius", "spectral"])
def test_nothing_written_is_nothing_added(norm: str):
    zeros = torch.zeros(R1, R2, dtype=torch.float64)
    assert torch.equal(an_update(norm=norm).normalise(zeros), zeros)


def test_the_update_has_at_most_max_rank():
    A, B = an_update(max_rank=2).written(state())
    assert int(torch.linalg.matrix_rank(B @ A)) == 2
    assert B.shape == (D, R2)
    assert A.shape == (R2, IN)


def test_completion_sees_the_segments_before_and_the_first_row_is_the_base():
    assert GenerativeAdapter(segments=5).visible() == [0, 1, 2, 3, 4]
    model, x = toy(), inputs(3)
    before = model(x)
    torch.testing.assert_close(before[0], net()(x)[0], rtol=0, atol=1e-14)
    for j in range(3):
        changed = x.clone()
        changed[j] += 1
        after = model(changed)
        assert torch.equal(after[:j], before[:j])
        later = [not torch.allclose(after[i], before[i]) for i in range(j + 1, 3)]
        assert all(later)


def test_reconstruction_of_sixteen_segments():
    sees = GenerativeAdapter(segments=16, layout="reconstruction").visible()
    assert sees == [0, 1, 2, 3, 4, 5, 6, 7, 1, 2, 3, 4, 5, 6, 7, 8]
    model, x = toy(segments=6, layout="reconstruction"), inputs(6)
    before = model(x)
    for j in range(6):
        changed = x.clone()
        changed[j] += 1
        after = model(changed)
        moved = {i for i in range(6) if i != j and not torch.allclose(after[i], before[i])}
        # windows 0, 1, 2, then pieces that see the first one, two, three windows
        assert moved == ({*range(j + 1, 3), *range(3 + j, 6)} if j < 3 else set())


def test_texts_of_a_batch_do_not_see_one_another():
    model, x = toy(), inputs(6)
    torch.testing.assert_close(torch.cat([model(x[:3]), model(x[3:])]), model(x), rtol=0, atol=1e-13)


@pytest.mark.parametrize("norm", ["svd", "frobenius", "spectral"])
def test_only_the_generator_is_trained_and_all_of_it(norm: str):
    model = tiny.moved(tiny.adapted(GenerativeAdapter(r=8, segments=4, norm=norm, target_modules=TARGETS)))
    tiny.loss(model.train()).backward()
    for value in tiny.base_parameters(model).values():
        assert value.grad is None
    for _, update in updates_of(model, "default"):
        for name in ("A1", "A2", "A3", "B", "g"):
            assert float(getattr(update, name).grad.abs().max()) > 0, name
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 2 * (8 * (32 + 32) + 8 * (32 + 32) + 32)


def test_the_gradient_is_that_of_finite_differences():
    model, x = toy(max_rank=2, iterations=None), inputs(3)
    parameters = [p for p in next(updates_of(model, "default"))[1].parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(6)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]

    def value(step: float) -> float:
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
            result = float(model(x).square().sum())
            for p, d in zip(parameters, directions, strict=True):
                p -= step * d
        return result

    model(x).square().sum().backward()
    slope = sum(float((p.grad * d).sum()) for p, d in zip(parameters, directions, strict=True))
    # central differences: an error of about step² = 1e-10 of the value, and 1e-16 / step of rounding
    assert (value(1e-5) - value(-1e-5)) / 2e-5 == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_either_kind_gives_the_same_gradients(reentrant: bool):
    found = []
    for checkpointing in (False, True):
        model = tiny.moved(tiny.adapted(GenerativeAdapter(r=8, segments=4, target_modules=TARGETS))).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        tiny.loss(model).backward()
        found.append(tiny.gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, expected in found[0].items():
        tiny.close(found[1][name], expected, 1e-6, name)


def test_what_enters_a_block_is_let_go_and_unload_leaves_no_hook():
    model = language()
    context = next(layers_of(model)).context
    tiny.logits(model)
    assert context.blocks == {}
    base = model.unload()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.modules())


def test_it_stands_beside_another_adapter():
    model = toy(segments=3)
    model.add_adapter("lora", LoRA(r=2, target_modules=["o", "v"]))
    tiny.moved(model, "lora").double()
    x = inputs(3)
    model.base_model.set_adapter("lora")
    lora = model(x)
    model.base_model.set_adapter(["default", "lora"])
    both = model(x)
    # the first row's text has not begun
    torch.testing.assert_close(both[0], lora[0], rtol=0, atol=1e-13)
    assert not torch.allclose(both[1], lora[1])


def test_errors_say_what_is_wrong():
    with pytest.raises(ValueError, match="4 rows is no whole number of texts of 3 segments"):
        toy()(inputs(4))
    with pytest.raises(ValueError, match="even number of segments"):
        GenerativeAdapter(segments=3, layout="reconstruction")
    with pytest.raises(ValueError, match="norm must be one of svd, frobenius, spectral"):
        GenerativeAdapter(norm="forbenius")
    with pytest.raises(ValueError, match="takes no dropout"):
        GenerativeAdapter(dropout=0.1)
    with pytest.raises(ValueError, match="gives no hidden_size"):
        get_peft_model(net(), GenerativeAdapter(target_modules=["o"]))
    with pytest.raises(ValueError, match="layer 'lm_head' is in no block"):
        tiny.adapted(GenerativeAdapter(target_modules=["lm_head"]))
    with pytest.raises(RuntimeError, match=r"12\] that enter block 'layers\.0'"):
        next(layers_of(toy()))(torch.zeros(3, 4, IN, dtype=torch.float64))
    model = language()
    with pytest.raises(ValueError, match="adapter_names cannot be used"):
        model(**tiny.batch(), adapter_names=["default"] * 4)


def test_it_takes_the_output_projections_and_the_width_from_the_model():
    model = get_peft_model(tiny.llama(), GenerativeAdapter(r=4))
    assert {layer.name.rpartition(".")[2] for layer in layers_of(model)} == {"o_proj"}
    assert model.peft_config["default"].hidden_size == 32
    with torch.device("meta"):
        update = GenerativeAdapter(r=1024, hidden_size=4096).update(torch.empty(4096, 4096))
    assert sum(p.numel() for p in update.parameters()) == 1024 * 4 * 4096 + 4096

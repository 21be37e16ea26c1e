"""Rocket's mixture: what each token adds to the weight, who learns from it, and where the experts come from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from folklora import KaSA, LoRA, Rocket, expert_use, tiny
from folklora.adapters.host.layer import FolkloraLayer, updates_of
from folklora.adapters.rocket import RocketUpdate
from folklora.stream.fit import check_fit
from folklora.stream.options import build_method

IN, OUT = 12, 10
STOCK = {
    "plain": {"r": 2, "lora_alpha": 3},
    "rooted": {"r": 4, "lora_alpha": 5, "use_rslora": True},
    "small": {"r": 1, "lora_alpha": 1},
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.q = nn.Linear(IN, OUT)

    def forward(self, x: Tensor) -> Tensor:
        return self.q(x)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of PEFT's LoRAs of one layer, of different ranks and scales."""
    folder = tmp_path_factory.mktemp("bank")
    for seed, (name, options) in enumerate(STOCK.items()):
        torch.manual_seed(seed)
        config = peft.LoraConfig(target_modules=["q"], init_lora_weights=False, **options)
        get_peft_model(Net(), config).save_pretrained(folder / name)
    return {name: str(folder / name) for name in STOCK}


def mixed(bank: dict[str, str], dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    torch.manual_seed(3)
    return get_peft_model(Net(), Rocket(sources=bank, **options)).to(dtype)


def the_layer(model: nn.Module) -> tuple[FolkloraLayer, RocketUpdate]:
    return next(updates_of(model, "default"))


def inputs(*shape: int, seed: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(*shape, IN, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    # a coordinate that is the same for all, by which a router can be told what to do
    x[..., -1] = 1.0
    return x


def only(model: PeftModel, expert: int) -> PeftModel:
    """The router opens one expert for every token."""
    _, update = the_layer(model)
    with torch.no_grad():
        update.router.zero_()
        update.router[expert, -1] = 1e4
    return model


def by_the_formula(model: PeftModel, x: Tensor, k: int) -> Tensor:
    """The layer token by token, from the open experts only."""
    layer, update = the_layer(model)
    experts, rows = update.router.shape[0], []
    A, B = update.A.view(experts, update.r, IN), update.B.view(OUT, experts, update.r)
    for token in x.reshape(-1, IN):
        p = torch.softmax(update.router @ token, 0)
        opened = sorted(range(experts), key=lambda e: -float(p[e].detach()))[:k]
        total = sum(p[e] for e in opened)
        rows.append(sum(p[e] / total * (B[:, e] @ (A[e] @ token)) for e in opened))
    return layer.base_layer(x) + torch.stack(rows).view(*x.shape[:-1], OUT)


@pytest.mark.parametrize("expert", range(3))
def test_a_router_that_opens_one_expert_gives_that_lora(bank: dict[str, str], expert: int) -> None:
    name, x = sorted(bank)[expert], inputs(2, 5)
    stock = PeftModel.from_pretrained(Net(), bank[name])
    # some twenty products of float32 numbers of size 1
    torch.testing.assert_close(only(mixed(bank), expert)(x), stock(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_output_and_gradients_are_the_formulas_in_double_precision(bank: dict[str, str], k: int) -> None:
    model, x = mixed(bank, torch.float64, top_k=k), inputs(2, 5, dtype=torch.float64).requires_grad_()
    trained = [x, *(value for value in model.parameters() if value.requires_grad)]
    for call in (model, lambda x: by_the_formula(model, x, k)):
        y = call(x)
        found = [y, *torch.autograd.grad(y.pow(3).sum(), trained)]
        if call is model:
            first = found
    for one, other in zip(first, found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_two_gates_are_open_for_every_token_and_sum_to_one(bank: dict[str, str]) -> None:
    _, update = the_layer(mixed(bank))
    gates = update.gates(inputs(4, 6))
    assert gates.shape == (4, 6, 3)
    assert ((gates > 0).sum(-1) == 2).all()
    assert torch.allclose(gates.sum(-1), torch.ones(4, 6), atol=1e-6)
    assert update.bfloat16().gates(inputs(4, 6).bfloat16()).dtype == torch.float32


def test_a_token_teaches_the_experts_that_it_opened_alone(bank: dict[str, str]) -> None:
    model = mixed(bank)
    _, update = the_layer(model)
    for seed in range(4):
        model.zero_grad()
        x = inputs(1, seed=seed)
        model(x).square().sum().backward()
        opened = update.gates(x)[0] > 0
        moved = update.A.grad.view(3, update.r, IN).abs().sum((1, 2)) > 0
        assert torch.equal(moved, opened)
        assert torch.equal(update.B.grad.view(OUT, 3, update.r).abs().sum((0, 2)) > 0, opened)
        assert (update.router.grad.abs().sum(1) > 0).sum() == 2


def test_equal_experts_need_no_router(bank: dict[str, str]) -> None:
    same, x = dict.fromkeys(bank, bank["plain"]), inputs(2, 5)
    model = mixed(same)
    before = model(x)
    with torch.no_grad():
        the_layer(model)[1].router.normal_()
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-5)


def test_fresh_loras_mix_to_the_base_bit_for_bit(tmp_path: Path) -> None:
    for name in ("one", "two"):
        get_peft_model(Net(), LoRA(r=2, target_modules=["q"])).save_pretrained(tmp_path / name)
    model = mixed({name: str(tmp_path / name) for name in ("one", "two")})
    assert torch.equal(model(inputs(2, 5)), Net()(inputs(2, 5)))


def test_smaller_sources_are_filled_up_without_changing_anything(bank: dict[str, str]) -> None:
    model = mixed(bank)
    _, update = the_layer(model)
    assert update.r == 4, "the largest of the sources'"
    assert update.router.shape == (3, IN)
    assert model.get_nb_trainable_parameters()[0] == 3 * 4 * (IN + OUT) + 3 * IN
    small = sorted(bank).index("small")
    A, B = update.A.view(3, 4, IN)[small], update.B.view(OUT, 3, 4)[:, small]
    assert (B[:, 1:] == 0).all()
    assert (A[1:].abs().sum(1) > 0).all()
    torch.testing.assert_close(
        only(model, small)(inputs(3)), only(mixed(bank, r=6), small)(inputs(3)), rtol=0, atol=1e-5
    )


def test_experts_are_trained_and_the_base_is_not(bank: dict[str, str]) -> None:
    model = mixed(bank)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    x, wanted = inputs(64), torch.randn(64, OUT, generator=torch.Generator().manual_seed(5))
    losses = []
    for _ in range(30):
        loss = (model(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
    moved = {
        name.rpartition(".")[2] for name, value in model.named_parameters() if not torch.equal(value, before[name])
    }
    assert moved == {"A", "B", "router"}


def test_a_saved_mixture_needs_its_sources_no_more(tmp_path: Path) -> None:
    for seed, (name, pattern) in enumerate([("law", {"v_proj": 3}), ("art", {}), ("music", {"0.*q_proj": 1})]):
        torch.manual_seed(seed)
        config = LoRA(r=2, rank_pattern=pattern, target_modules=["q_proj", "v_proj"])
        tiny.moved(get_peft_model(tiny.llama(), config)).save_pretrained(tmp_path / "bank" / name)
    sources = {name: str(tmp_path / "bank" / name) for name in ("law", "art", "music")}
    torch.manual_seed(0)
    model = tiny.moved(get_peft_model(tiny.llama(), Rocket(sources=sources))).eval()
    assert {update.r for layer, update in updates_of(model, "default") if "v_proj" in layer.name} == {3}
    assert {update.r for layer, update in updates_of(model, "default") if "q_proj" in layer.name} == {2}
    model.save_pretrained(tmp_path / "expert")
    shutil.rmtree(tmp_path / "bank")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "expert")
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    assert list(loaded.peft_config["default"].sources) == ["art", "law", "music"]


def test_the_use_of_experts_is_counted_over_real_tokens(bank: dict[str, str]) -> None:
    model = tiny.adapted(Rocket(target_modules=["q_proj", "down_proj"]))
    batch = tiny.batch()
    use = expert_use(model, batch)
    assert sorted(use) == sorted(layer.name for layer, _ in updates_of(model, "default"))
    assert all(sum(shares.values()) == pytest.approx(2.0) for shares in use.values())
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 0)}
    assert expert_use(model, other) == use, "what stands in the padding counts for nothing"
    # the embeddings alone enter the first block's attention
    first, (_, update) = use["model.layers.0.self_attn.q_proj"], next(updates_of(model, "default"))
    base = tiny.llama().model
    x = base.layers[0].input_layernorm(base.embed_tokens(batch["input_ids"]))[batch["attention_mask"] > 0]
    assert list(first.values()) == pytest.approx((update.gates(x) > 0).double().mean(0).tolist())
    with pytest.raises(ValueError, match="no Rocket adapter 'other'"):
        expert_use(model, batch, "other")


def test_a_stream_tries_it_on_a_shell_before_any_work(tmp_path: Path) -> None:
    for name in ("one", "two"):
        get_peft_model(tiny.llama(), LoRA(r=3, target_modules=["q_proj"])).save_pretrained(tmp_path / name)
    sources = {name: str(tmp_path / name) for name in ("one", "two")}
    check_fit([build_method("seq-lora", {"adapter": "rocket", "sources": sources})], tiny.llama())
    wrong = {"adapter": "rocket", "sources": sources, "r": 2}
    with pytest.raises(ValueError, match="r = 2 is below the rank 3 of source 'one'"):
        check_fit([build_method("seq-lora", wrong)], tiny.llama())


def test_what_cannot_be_mixed_is_named(bank: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name them, sources="):
        mixed({})
    with pytest.raises(ValueError, match="top_k must be between 1 and the 3 sources, not 4"):
        mixed(bank, top_k=4)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        mixed({**bank, "lost": str(tmp_path / "nowhere")})
    with pytest.raises(ValueError, match="r = 3 is below the rank 4 of source 'rooted' on layer 'q'"):
        mixed(bank, r=3)
    with pytest.raises(ValueError, match="whole models: art, law"):
        get_peft_model(tiny.llama(), Rocket(sources=tiny.task_vectors(tiny.llama()), target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no layer of this model"):
        get_peft_model(tiny.llama(), Rocket(sources=bank))
    with pytest.raises(ValueError, match="give r too"):
        Rocket(sources=bank, rank_pattern={"q": 2})
    for name, config in {"q": LoRA(r=2, target_modules=["q"]), "both": KaSA(r=2, target_modules=["q", "v"])}.items():
        get_peft_model(tiny.TwoLayers(), config).save_pretrained(tmp_path / name)
    unlike = {name: str(tmp_path / name) for name in ("q", "both")}
    with pytest.raises(ValueError, match="source 'q' has no update on layer 'v': name in target_modules what all"):
        get_peft_model(tiny.TwoLayers(), Rocket(sources=unlike))
    common = get_peft_model(tiny.TwoLayers(), Rocket(sources=unlike, target_modules=["q"]))
    assert the_layer(common)[1].r == 3, "KaSA's noise has a rank of its own"

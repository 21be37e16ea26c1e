"""DiffoRA: the gates and their steps, the choice, and what is left of it; placements tried one by one as an oracle."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from folklora import DiffoRA, LoRA, export_lora, tiny
from folklora.adapters.diffora import Phases, Search, SharedPairUpdate, choose, discretise, gates, phases
from folklora.adapters.host.layer import updates_of
from folklora.adapters.lora import LoRAUpdate

BATCH = {**tiny.batch(), "labels": tiny.batch()["input_ids"]}
OTHER = {key: value.flip(0) for key, value in BATCH.items()}
CHOSEN = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.v_proj", "model.layers.1.mlp.down_proj"]


def adapted(**options: Any) -> PeftModel:
    torch.manual_seed(5)
    return get_peft_model(tiny.llama(), DiffoRA(**{"r": 4, "target_modules": tiny.TARGETS} | options))


def shared(model: PeftModel) -> dict[str, nn.Parameter]:
    return dict(model.base_model.model.folklora_shared["default"].items())


def updates(model: PeftModel) -> dict[str, nn.Module]:
    return {layer.name: update for layer, update in updates_of(model, "default")}


def set_theta(model: PeftModel, value: float) -> None:
    for theta in shared(model).values():
        theta.data.fill_(value)


def own_values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def test_open_gates_make_a_lora_and_closed_ones_the_base():
    model = tiny.moved(adapted(alpha=6.0))
    plain = get_peft_model(tiny.llama(), LoRA(r=4, alpha=6.0, target_modules=tiny.TARGETS))
    for (_, ours), (_, theirs) in zip(updates_of(model, "default"), updates_of(plain, "default"), strict=True):
        theirs.A.data.copy_(ours.A)
        theirs.B.data.copy_(ours.B)
    half = tiny.logits(model)
    set_theta(model, 60.0)
    # LoRA's scaling goes into A before the products, an open gate multiplies between them
    tiny.close(tiny.logits(model), tiny.logits(plain), 1e-5, "the logits of open gates and of a LoRA")
    assert not torch.allclose(half, tiny.logits(plain))
    set_theta(model, -200.0)
    assert torch.equal(tiny.logits(model), tiny.logits(tiny.llama()))


@pytest.mark.parametrize(("gate", "rivals"), [("sigmoid", None), ("softmax-row", 3), ("softmax-global", 6)])
def test_the_gates(gate: str, rivals: int | None):
    model = adapted(gate=gate)
    assert list(gates(model).values()) == pytest.approx(6 * [0.5 if rivals is None else 1 / rivals])
    generator = torch.Generator().manual_seed(1)
    for theta in shared(model).values():
        theta.data.copy_(torch.randn(1, generator=generator))
    rows = [list(gates(model).values())[:3], list(gates(model).values())[3:]]
    if gate == "sigmoid":
        expected = {
            name: torch.sigmoid(shared(model)["theta/" + name.replace(".", "/")]).item() for name in gates(model)
        }
        assert gates(model) == pytest.approx(expected)
    elif gate == "softmax-row":
        assert [sum(row) for row in rows] == pytest.approx([1, 1])
    else:
        assert sum(map(sum, rows)) == pytest.approx(1)


def test_theta_gets_a_gradient_only_when_b_is_not_zero():
    model = adapted()
    for expected in (False, True):
        for theta in shared(model).values():
            theta.requires_grad_(True)
        found = torch.autograd.grad(model(**BATCH).loss, list(shared(model).values()))
        assert len(found) == 6
        assert all((abs(gradient.item()) > 0) == expected for gradient in found)
        tiny.moved(model)


def test_a_step_on_theta_leaves_the_weights_alone_and_a_step_on_them_theta():
    model = tiny.moved(adapted())
    search = Search(model, [BATCH], lr=0.1)
    thetas, before = {k: v.clone() for k, v in shared(model).items()}, own_values(model)
    expected = model(**BATCH).loss.item()
    assert search.step().item() == pytest.approx(expected)
    assert all(torch.equal(value, before[name]) for name, value in own_values(model).items())
    moved = {key: value.detach().clone() for key, value in shared(model).items()}
    # Adam's first step has the size of its rate, against the gradient's sign
    assert all(abs(abs((moved[key] - thetas[key]).item()) - 0.1) < 1e-4 for key in moved)
    assert all(not theta.requires_grad and theta.grad is None for theta in shared(model).values())
    assert all(value.grad is None for value in model.parameters())
    tiny.train(model)
    assert all(torch.equal(value, moved[key]) for key, value in shared(model).items())
    assert not any(torch.equal(value, before[name]) for name, value in own_values(model).items())


def test_a_step_follows_every_optimizer_step_on_the_adapter_after_the_warm_up():
    model = tiny.moved(adapted()).train()
    foreign = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    with Search(model, [BATCH, OTHER], warmup=2) as search:
        for step in range(5):
            before = gates(model)
            model(**BATCH).loss.backward()
            optimizer.step()
            foreign.step()
            assert (gates(model) == before) == (step < 2)
            assert model.training
    assert search.steps == 5
    before = gates(model)
    optimizer.step()
    assert gates(model) == before


def test_it_runs_inside_the_trainer_of_transformers(tmp_path: Path):
    from transformers import Trainer, TrainingArguments

    model = adapted()
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tiny.batch()["input_ids"]]
    with Search(model, [OTHER], warmup=1) as search:
        Trainer(model, arguments, train_dataset=rows).train()
    assert search.steps == 3
    assert len(set(gates(model).values())) == 6


class Tiny(nn.Module):
    """Two linear layers in float64."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first, self.second = nn.Linear(5, 4).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def test_the_second_order_gradient_is_that_through_the_inner_step():
    model = get_peft_model(Tiny(), DiffoRA(r=2, select="global", target_modules=["first", "second"])).double()
    tiny.moved(model)
    generator = torch.Generator().manual_seed(6)
    x, y = (torch.randn(2, 7, n, generator=generator, dtype=torch.float64) for n in (5, 3))
    batches, rate = list(zip(x, y, strict=True)), 0.1
    search = Search(model, [batches[1]], loss=_mse, training=[batches[0]], inner_lr=rate)
    before = own_values(model)
    search._ask(True)
    value, found = search._second_order()
    # the kernel cannot be differentiated twice, so the oracle is written with plain products
    layers, (one, two) = list(Tiny().children()), updates(model).values()
    weights, thetas = [one.A, one.B, two.A, two.B], [shared(model)[f"theta/{name}"] for name in ("first", "second")]
    assert all(torch.equal(w, v) for w, v in zip(weights, list(before.values()), strict=True))

    def loss(w: list[Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        gammas = [one.scale * torch.sigmoid(theta) for theta in thetas]
        deltas = [gammas[0] * w[1] @ w[0], gammas[1] * w[3] @ w[2]]
        h = torch.tanh(F.linear(batch[0], layers[0].weight + deltas[0], layers[0].bias))
        return F.mse_loss(F.linear(h, layers[1].weight + deltas[1], layers[1].bias), batch[1])

    inner = torch.autograd.grad(loss(weights, batches[0]), weights, create_graph=True)
    outer = loss([w - rate * g for w, g in zip(weights, inner, strict=True)], batches[1])
    expected, first = torch.autograd.grad(outer, thetas), torch.autograd.grad(loss(weights, batches[1]), thetas)
    assert value.item() == pytest.approx(outer.item(), rel=1e-12)
    for actual, exact, short in zip(found, expected, first, strict=True):
        # the error of a central difference over a length of 0.01 is a few times its square, of the term that it gives
        assert abs(actual - exact) < 5e-4 * abs(short - exact)
        assert abs(short - exact) > 1e-2 * abs(exact)


GAMMAS = {f"model.layers.{i}.{kind}": 0.1 * i + 0.01 * j for i in range(3) for j, kind in enumerate("qkvo")}


def test_the_choice_by_rows_and_of_all():
    by_row = choose(GAMMAS, 0.5)
    assert by_row == [f"model.layers.{i}.{kind}" for i in range(3) for kind in "vo"]
    assert choose(GAMMAS, 0.5, "global") == list(GAMMAS)[6:]
    assert choose(GAMMAS, 1.0) == list(GAMMAS)
    assert len(choose({f"m.{i}": i / 100 for i in range(100)}, 0.29, "global")) == 29
    # the first number in a name counts the blocks; T5 and mixtures of experts have more of them
    t5 = {f"encoder.block.{i}.layer.{j}.{kind}": i + j for i in range(2) for j in range(2) for kind in ("a", "b")}
    assert choose(t5, 0.5) == [name for name in t5 if ".layer.1." in name]
    with pytest.raises(ValueError, match=r"rho 0\.2 chooses none of 12 modules in 3 rows"):
        choose(GAMMAS, 0.2)


def test_phases_divide_a_run():
    assert phases(1000) == Phases(warmup=50, search=250, training=750)
    assert phases(10, search=0.5, warmup=0) == (0, 5, 5)


@pytest.mark.parametrize("keep", [False, True])
def test_discretised_the_adapter_holds_the_chosen_modules_and_shared_pairs(keep: bool):
    model = tiny.moved(adapted(rho=0.34, shared_r=2))
    searched = updates(model)
    wanted = choose(gates(model), 0.34)
    for name in wanted:
        shared(model)["theta/" + name.replace(".", "/")].data += 1
    gamma = gates(model)
    final = discretise(model, keep=keep)
    assert final.selected == wanted == model.peft_config["default"].selected
    assert model.active_adapters == ["default"]
    assert not any("theta" in name for name, _ in model.named_parameters())
    for name, update in updates(model).items():
        assert isinstance(update, LoRAUpdate if name in wanted else SharedPairUpdate)
        if name in wanted and keep:
            assert torch.equal(update.A, searched[name].A)
            assert torch.equal(update.B, searched[name].B * torch.tensor(gamma[name]))
        elif name in wanted:
            assert (update.B == 0).all()
            assert not torch.equal(update.A, searched[name].A)
    if not keep:
        tiny.same(tiny.logits(model), tiny.logits(tiny.llama()), "the final adapter at its start")
    tiny.train(model)
    assert not torch.allclose(tiny.logits(model), tiny.logits(tiny.llama()))


def test_unchosen_modules_of_a_type_share_a_pair_and_count_once():
    config = DiffoRA(r=4, shared_r=2, selected=CHOSEN, target_modules=tiny.TARGETS)
    model = tiny.moved(get_peft_model(tiny.llama(), config))
    found = updates(model)
    pairs = {name: update.factors().A for name, update in found.items() if name not in CHOSEN}
    assert set(pairs) == set(found) - set(CHOSEN)
    own = [update.A.data_ptr() for name, update in found.items() if name in CHOSEN]
    assert len({*own, *(A.data_ptr() for A in pairs.values())}) == len(found)
    both = tiny.moved(
        get_peft_model(tiny.llama(), DiffoRA(r=4, selected=CHOSEN[:1], target_modules=["q_proj", "v_proj"]))
    )
    v = [update.factors() for name, update in updates(both).items() if "v_proj" in name]
    assert v[0].A is v[1].A
    assert v[0].B is v[1].B
    # q [32, 32], v [16, 32], down [32, 48]: own pairs of rank 4, and of each type one is left for a pair of rank 2
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == 4 * (64 + 48 + 80) + 2 * (64 + 48 + 80)


def test_the_gradient_of_a_shared_pair_is_the_sum_over_its_places():
    config = DiffoRA(r=4, shared_r=2, selected=CHOSEN[:1], target_modules=["q_proj", "v_proj"])
    model = tiny.moved(get_peft_model(tiny.llama(), config))
    model(**BATCH).loss.backward()
    pair = shared(model)["B/self_attn/v_proj/16x32"]
    places = [update for name, update in updates(model).items() if "v_proj" in name]
    total = torch.zeros_like(pair)
    for place in places:
        # the same function with a pair of this place's own
        own = nn.Parameter(pair.detach().clone())
        place.share(nn.ParameterDict({**shared(model), "B/self_attn/v_proj/16x32": own}))
        total += torch.autograd.grad(model(**BATCH).loss, own)[0]
        place.share(model.base_model.model.folklora_shared["default"])
    torch.testing.assert_close(pair.grad, total, rtol=1e-4, atol=1e-6)


def test_the_saved_file_holds_chosen_modules_and_each_shared_pair_once(tmp_path: Path):
    for sharing in (True, False):
        config = DiffoRA(r=4, selected=CHOSEN, weight_sharing=sharing, target_modules=tiny.TARGETS)
        model = tiny.trained(config)
        model.save_pretrained(tmp_path / str(sharing))
        saved = load_file(tmp_path / str(sharing) / "adapter_model.safetensors")
        own = {key.partition(".folklora_updates")[0] for key in saved if key.endswith("updates.A")}
        assert own == {f"base_model.model.{name}" for name in CHOSEN}
        pairs = [key.partition("folklora_shared.")[2] for key in saved if "folklora_shared" in key]
        assert len(pairs) == (6 if sharing else 0)
        assert len([key for key in saved if key.endswith("base_sample")]) == (6 if sharing else 3)
        loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / str(sharing))
        assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_merged_and_exported_it_computes_the_same(tmp_path: Path):
    config = DiffoRA(r=4, shared_r=2, selected=CHOSEN, target_modules=tiny.TARGETS)
    model = tiny.trained(config)
    expected = tiny.logits(model)
    ranks = export_lora(model, tmp_path / "lora")
    assert {name: rank for name, rank in ranks.items() if rank == 4} == dict.fromkeys(CHOSEN, 4)
    assert sorted(ranks.values()) == [2, 2, 2, 4, 4, 4]
    tiny.close(tiny.logits(PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")), expected, 1e-5, "the export")
    tiny.close(tiny.logits(model.merge_and_unload()), expected, 1e-5, "the merged model")


def test_a_search_can_be_saved_and_gone_on_with(tmp_path: Path):
    model = tiny.moved(adapted(gate="softmax-row"))
    Search(model, [BATCH], lr=0.3).step()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    assert gates(loaded) == gates(model)
    assert discretise(loaded).selected == discretise(model).selected


class Residual(nn.Module):
    """Six layers h + tanh(W h) of width 32."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(32, 32, bias=False) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def planted() -> tuple[Residual, list[tuple[Tensor, Tensor]]]:
    """A base, and data of a teacher that differs from it in layers 1 and 4 alone, by rank 2."""
    teacher, generator = Residual(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for i in (1, 4):
            change = torch.randn(32, 2, generator=generator) @ torch.randn(2, 32, generator=generator)
            teacher.layers[i].weight += change / 8
        x = torch.randn(4, 128, 32, generator=generator)
        return Residual(), [(part, teacher(part)) for part in x]


def _mse(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def fit(model: nn.Module, data: list[tuple[Tensor, Tensor]], steps: int) -> None:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        _mse(model, data[step % 2]).backward()
        optimizer.step()


def test_it_finds_the_planted_modules_and_no_other_placement_does_better():
    base, data = planted()
    layers = [f"layers.{i}" for i in range(6)]
    config = DiffoRA(r=4, rho=0.34, select="global", weight_sharing=False, target_modules=layers)
    model = get_peft_model(base, config)
    with Search(model, data[2:], loss=_mse, warmup=20):
        fit(model, data[:2], 150)
    assert discretise(model).selected == ["layers.1", "layers.4"]
    fit(model, data[:2], 60)
    reached = _mse(model, data[3]).item()
    others = []
    for pair in itertools.combinations(range(6), 2):
        if pair != (1, 4):
            other = get_peft_model(Residual(), LoRA(r=4, alpha=16, target_modules=[layers[i] for i in pair]))
            fit(other, data[:2], 60)
            others.append(_mse(other, data[3]).item())
    assert len(others) == 14
    assert reached < 0.5 * min(others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": 0.0}, "rho must be above 0"),
        ({"select": "column"}, "select must be one of"),
        ({"gate": "softmax"}, "gate must be one of"),
        ({"shared_r": 0}, "rank r must be"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        DiffoRA(**options)


def test_what_cannot_be_is_refused_in_words():
    with pytest.raises(ValueError, match=r"selected names model\.layers\.7\.q, which target_modules does not match"):
        adapted(selected=["model.layers.7.q"])
    with pytest.raises(ValueError, match=r"shared_r 40 is above 32.*layers.1.self_attn.q_proj"):
        adapted(selected=CHOSEN, shared_r=40)
    plain = get_peft_model(tiny.llama(), LoRA(r=2, target_modules=["q_proj"]))
    for call in (gates, discretise, lambda model: Search(model, [BATCH])):
        with pytest.raises(ValueError, match="no DiffoRA adapter named 'default' that is still in its search"):
            call(plain)
    search = Search(tiny.moved(adapted()), iter([BATCH]))
    search.step()
    with pytest.raises(ValueError, match="the validation batches are used up"):
        search.step()

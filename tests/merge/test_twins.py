"""Twin-Merging served: rows by their own mixtures, of adapters and of checkpoints; saved, and read by stock PEFT."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.func import functional_call
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from folklora import LoRA
from folklora.adapters.host.mixture import base_alone
from folklora.merge import twin_merging
from folklora.merge.engine import merge_models, task_tensors
from folklora.merge.twins import Twins

# logits of a few units through two layers in float32
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TASKS = ["law", "medicine", "verse"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
PROMPTS = {
    "law": [f"xx: {letter}{letter}\nAnswer:" for letter in "abcdefgh"],
    "medicine": [f"12 + 3{digit} = 4{digit}?" for digit in range(8)],
    "verse": [f"...{letter}... !!! ({letter})" for letter in "ABCDEFGH"],
}
ROWS = [PROMPTS["verse"][0], PROMPTS["law"][1], PROMPTS["medicine"][2], PROMPTS["law"][0]]


def moved(model: nn.Module, seed: int, scale: float = 0.1) -> None:
    """Add noise to all that can be trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def logits(model: nn.Module, ids: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.randint(2, 128, (3, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def adapters(tiny_llama: Callable[..., PreTrainedModel], tmp_path_factory: Any) -> dict[str, Path]:
    """A LoRA of Folklora's and two of PEFT's, one with ranks of its own and one on fewer layers."""
    configs = [
        LoRA(r=3, alpha=6, target_modules=TARGETS),
        LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=TARGETS, rank_pattern={"down_proj": 4}),
        LoraConfig(r=4, target_modules=["q_proj"], layers_to_transform=[1]),
    ]
    root = tmp_path_factory.mktemp("adapters")
    for seed, (task, config) in enumerate(zip(TASKS, configs, strict=True)):
        model = get_peft_model(tiny_llama(0), config)
        moved(model, seed, 0.3)
        model.save_pretrained(root / task)
    return {task: root / task for task in TASKS}


@pytest.fixture(scope="module")
def specialists(tiny_llama: Callable[..., PreTrainedModel], adapters: dict[str, Path]) -> list[PreTrainedModel]:
    """The adapters merged into their base by PEFT."""
    return [PeftModel.from_pretrained(tiny_llama(0), adapters[task]).merge_and_unload().eval() for task in TASKS]


@pytest.fixture(scope="module")
def routed(tiny_llama: Callable[..., PreTrainedModel], adapters: dict[str, Path], tiny_tokenizer: Any) -> Twins:
    twins = Twins.of_adapters(tiny_llama(0), adapters, rank=2)
    assert twins.learn_router(tiny_tokenizer, PROMPTS, "linear", learning_rate=0.05, batch_size=8, held_out=0.25) == 1.0
    return twins


def is_linear(name: str, value: Tensor) -> bool:
    """Of the models here; GPT-2's head is its embedding."""
    return value.dim() == 2 and not any(part in name for part in ("embed", "wte", "wpe"))


def assembled(base: nn.Module, models: list[nn.Module], gate: Tensor, **options: Any) -> dict[str, Tensor]:
    """θ* + Σ g_t v_t, dense, of linear weights that are not tied; θ* of all else."""
    states, weights = [dict(model.named_parameters()) for model in models], {}
    across = isinstance(base, GPT2LMHeadModel)
    for name, value in base.named_parameters():
        linear = is_linear(name, value)
        turned = across and linear
        tensors = [x[name].mT if turned else x[name] for x in (*states, {name: value})]
        split = twin_merging(tensors[:-1], tensors[-1], **options)
        whole = split.base + sum(g * split.delta(t) for t, g in enumerate(gate)) if linear else split.base
        weights[name] = whole.mT if turned else whole
    return weights


def assert_rows_assembled(twins: Twins, base: nn.Module, models: list[nn.Module], ids: Tensor, **options: Any) -> None:
    gates = torch.randn(3, len(models), generator=torch.Generator().manual_seed(4)).softmax(-1)
    with twins.weighed(gates):
        found = logits(twins.model, ids)
    for row, gate in enumerate(gates):
        weights = assembled(base, models, gate, **options)
        with torch.no_grad():
            expected = functional_call(base, weights, (), {"input_ids": ids[row : row + 1]}).logits[0]
        torch.testing.assert_close(found[row], expected, **CLOSE)


def test_adapters_with_all_ranks_and_one_task_are_that_specialist(tiny_llama, adapters, specialists, ids):
    base = tiny_llama(0)
    before = copy.deepcopy(base.state_dict())
    twins = Twins.of_adapters(base, adapters, rank=99)
    for task, specialist in enumerate(specialists):
        with twins.weighed(torch.eye(3)[task : task + 1]):
            torch.testing.assert_close(logits(twins.model, ids), logits(specialist, ids), **CLOSE)
    kept = twins.model.unload().state_dict()
    assert all(torch.equal(kept[name], value) for name, value in before.items())


@pytest.mark.parametrize("shared", ["task-arithmetic", "tsv-m"])
def test_rows_of_adapters_are_their_assembled_weights(tiny_llama, adapters, specialists, ids, shared):
    twins = Twins.of_adapters(tiny_llama(0), adapters, rank=3, shared=shared)
    assert_rows_assembled(twins, tiny_llama(0), specialists, ids, rank=3, shared=shared)


def test_the_router_reads_the_shared_model_alone(routed, tiny_llama, specialists, ids):
    weights = assembled(tiny_llama(0), specialists, torch.zeros(3), rank=2)
    shared = tiny_llama(0)
    shared.load_state_dict(weights, strict=False)
    with torch.no_grad():
        expected = shared.model(ids)[0].mean(1)
    torch.testing.assert_close(routed.encoder({"input_ids": ids}), expected, **CLOSE)
    with base_alone(routed.model.get_base_model(), ["shared"]):
        torch.testing.assert_close(logits(routed.model, ids), logits(shared, ids), **CLOSE)
    assert not any(parameter.requires_grad for parameter in routed.model.parameters())


def test_a_mixed_batch_is_each_row_alone(routed, tiny_tokenizer):
    batch = tiny_tokenizer(ROWS, return_tensors="pt", padding=True, padding_side="left")
    batch.pop("token_type_ids", None)
    weights = routed.weights(batch)
    # the rows are of three tasks, and differ enough for the order to matter
    assert weights.argmax(-1).tolist() == [2, 0, 1, 0]
    for beams in (1, 2):
        options = {"max_new_tokens": 4, "min_new_tokens": 4, "num_beams": beams, "do_sample": False}
        found = routed.model.generate(**batch, **options)[:, -4:]
        for row, text in enumerate(ROWS):
            one = tiny_tokenizer([text], return_tensors="pt")
            one.pop("token_type_ids", None)
            torch.testing.assert_close(routed.weights(one)[0], weights[row], **CLOSE)
            assert torch.equal(routed.model.generate(**one, **options)[0, -4:], found[row])


def test_an_encoder_decoder_routes_by_its_encoder(tiny_t5, tmp_path):
    for seed, task in enumerate(TASKS[:2]):
        model = get_peft_model(tiny_t5(0), LoRA(r=2, target_modules=["q", "v"]))
        moved(model, seed, 0.3)
        model.save_pretrained(tmp_path / task)
    twins = Twins.of_adapters(tiny_t5(0), {task: tmp_path / task for task in TASKS[:2]}, rank=2)
    inputs = torch.randint(2, 100, (2, 5), generator=torch.Generator().manual_seed(1))
    answers = torch.randint(2, 100, (2, 3), generator=torch.Generator().manual_seed(2))
    twins.router = type("Sign", (), {"weights": lambda self, z: torch.stack([z[:, 0] > 0, z[:, 0] <= 0], 1).float()})()
    found = logits(twins.model, inputs, labels=answers)
    for row, weights in enumerate(twins.weights({"input_ids": inputs})):
        with twins.weighed(weights[None]):
            alone = logits(twins.model, inputs[row : row + 1], labels=answers[row : row + 1])
        torch.testing.assert_close(found[row], alone[0], **CLOSE)


def test_it_is_saved_and_read_again_bit_for_bit_and_by_stock_peft(routed, tiny_llama, specialists, ids, tmp_path):
    expected = logits(routed.model, ids)
    out = routed.save(tmp_path / "twins")
    again = Twins.load(tiny_llama(0), out)
    assert again.tasks == TASKS
    assert torch.equal(logits(again.model, ids), expected)
    stock = PeftModel.from_pretrained(tiny_llama(0), out / "shared").merge_and_unload()
    stock = PeftModel.from_pretrained(stock, out / "exclusive" / "medicine").merge_and_unload()
    with routed.weighed(torch.tensor([[0.0, 1.0, 0.0]])):
        torch.testing.assert_close(logits(stock, ids), logits(routed.model, ids), **CLOSE)
    with pytest.raises(FileExistsError, match="there already"):
        routed.save(out)
    with pytest.raises(ValueError, match="another base model's weights"):
        Twins.load(tiny_llama(1), out)
    with pytest.raises(FileNotFoundError, match=r"no twins\.json"):
        Twins.load(tiny_llama(0), tmp_path)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def trained(request, tiny_llama, tmp_path_factory) -> tuple[Path, list[PreTrainedModel]]:
    """A base and two models trained from it in full, on disk; GPT-2 is transposed, tied and has biases."""

    def gpt2() -> GPT2LMHeadModel:
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()

    make, root, models = (gpt2 if request.param == "gpt2" else tiny_llama), tmp_path_factory.mktemp("models"), []
    for seed, name in enumerate(("base", "law", "medicine")):
        models.append(make())
        if seed:
            moved(models[-1], seed)
        models[-1].save_pretrained(root / name)
    return root, models


def of_models(kind: type[PreTrainedModel], root: Path, out: Path, **parameters: Any) -> Twins:
    asked = {
        "merge_method": "twin-merging",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / name)} for name in TASKS[:2]],
        "parameters": parameters,
    }
    return Twins.of_checkpoint(kind.from_pretrained(merge_models(asked, out)), out)


def test_rows_of_a_merged_checkpoint_are_their_assembled_weights(trained, ids, tmp_path):
    root, (base, *models) = trained
    twins = of_models(type(base), root, tmp_path / "merged", rank=4, shared="average")
    assert twins.tasks == TASKS[:2]
    assert_rows_assembled(twins, base, models, ids, rank=4, shared="average")
    again = Twins.load(type(base).from_pretrained(tmp_path / "merged"), twins.save(tmp_path / "twins"))
    assert not (tmp_path / "twins" / "shared").exists()
    gate = torch.tensor([[0.25, 0.75]])
    with twins.weighed(gate), again.weighed(gate):
        assert torch.equal(logits(again.model, ids), logits(twins.model, ids))
    with pytest.raises(ValueError, match="has other weights"):
        Twins.of_checkpoint(copy.deepcopy(base), tmp_path / "merged")


def test_a_task_of_a_merged_checkpoint_is_its_model_once_all_that_is_not_linear_is(trained, ids, tmp_path):
    root, (base, *models) = trained
    twins = of_models(type(base), root, tmp_path / "merged", mask_rate=0.0)
    for task, model in enumerate(models):
        with torch.no_grad():
            own = {
                name.replace(".base_layer", ""): value
                for name, value in twins.model.base_model.model.named_parameters()
            }
            for name, value in model.named_parameters():
                if not is_linear(name, value):
                    own[name].copy_(value)
        with twins.weighed(torch.eye(2)[task : task + 1]):
            torch.testing.assert_close(logits(twins.model, ids), logits(model, ids), **CLOSE)
        served = dict(task_tensors(tmp_path / "merged", task))
        for name, value in model.state_dict().items():
            if name in served:
                torch.testing.assert_close(served[name], value, rtol=0, atol=2e-6)


def test_what_cannot_be_served_is_refused(routed, tiny_llama, tiny_tokenizer, adapters, ids, tmp_path):
    base = tiny_llama(0)
    fresh = Twins.of_adapters(tiny_llama(0), adapters)
    with pytest.raises(ValueError, match="no router yet"):
        logits(fresh.model, ids)
    with pytest.raises(ValueError, match=r"weights are \[rows, 3\]"), fresh.weighed(torch.ones(3)):
        pass
    with pytest.raises(ValueError, match="prompts of each task are needed: law, medicine, verse"):
        fresh.learn_router(tiny_tokenizer, {"law": ["a"]})
    with pytest.raises(ValueError, match="tasks are named by letters"):
        Twins.of_adapters(base, {"shared": adapters["law"]})
    with pytest.raises(ValueError, match="there is no adapter"):
        Twins.of_adapters(base, {})
    refused = {
        "modules_to_save": LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]),
        "bias": LoraConfig(target_modules=["q_proj"], bias="all"),
        "more than a LoRA": LoraConfig(target_modules=["q_proj"], use_dora=True),
        "no linear layer|more than a LoRA": LoraConfig(target_modules=["embed_tokens"]),
        "changes biases": LoRA(r=2, target_modules=["q_proj"], train_bias=True),
    }
    for number, (words, config) in enumerate(refused.items()):
        get_peft_model(tiny_llama(0, attention_bias=True), config).save_pretrained(tmp_path / str(number))
        with pytest.raises(ValueError, match=words):
            Twins.of_adapters(tiny_llama(0, attention_bias=True), {"law": tmp_path / str(number)})


def test_one_task_needs_no_router(tiny_llama, adapters, specialists, ids):
    twins = Twins.of_adapters(tiny_llama(0), {"medicine": adapters["medicine"]}, rank=99)
    torch.testing.assert_close(logits(twins.model, ids), logits(specialists[1], ids), **CLOSE)

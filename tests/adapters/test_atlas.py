"""aTLAS as an adapter: what its coefficients do to the weights, and that they are all that is trained and saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from folklora import ATLAS, KaSA, LoRA, VLAdapter, check, export_lora, penalty, tiny
from folklora.adapters.atlas import random_parts, strongest
from folklora.adapters.host.layer import layers_of, updates_of
from folklora.merge import task_arithmetic

TARGETS = ["q_proj", "v_proj", "down_proj"]
LAYERS = 2 * len(TARGETS)


def composed(dtype: torch.dtype = torch.float32, **options: Any) -> PeftModel:
    """A tiny Llama with two checkpoints' task vectors, evaluating."""
    return tiny.adapted(ATLAS(**{"target_modules": list(TARGETS)} | options), dtype=dtype).to(dtype).eval()


@torch.no_grad()
def put(model: PeftModel, values: Tensor | float | None = None, seed: int = 3) -> PeftModel:
    """Coefficients set to `values` on all layers, or to noise."""
    generator = torch.Generator().manual_seed(seed)
    for _, update in updates_of(model, "default"):
        own = update.scales()
        own.copy_(torch.randn(own.shape, generator=generator) if values is None else torch.as_tensor(values))
    return model


def tuned(task: str) -> dict[str, Tensor]:
    return load_file(tiny.task_vectors(tiny.llama())[task])


def dense_sum(model: PeftModel) -> nn.Module:
    """The base in float64 with Σ_t λ_tb τ_tb added by a loop over tensors: the oracle."""
    base = tiny.llama(dtype=torch.float64)
    for layer, update in updates_of(model, "default"):
        weight = base.get_submodule(layer.name).weight
        start = weight.detach().clone()
        for index, task in enumerate(update.names):
            weight.data += update.scales()[index, 0].item() * (tuned(task)[f"{layer.name}.weight"].double() - start)
    return base


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders of PEFT's LoRA with ranks and alphas of its own, and of Folklora's LoRA and KaSA, on some layers each."""
    folder = tmp_path_factory.mktemp("adapters")
    configs = {
        "stock": peft.LoraConfig(
            r=3, lora_alpha=5, use_rslora=True, target_modules=["q_proj", "v_proj"],
            rank_pattern={"v_proj": 2}, alpha_pattern={"v_proj": 7}, init_lora_weights=False,
        ),
        "own": LoRA(r=2, alpha=5, target_modules=["q_proj", "down_proj"]),
        "kasa": KaSA(r=2, target_modules=["v_proj"]),
    }  # fmt: skip
    for seed, (name, config) in enumerate(configs.items()):
        torch.manual_seed(seed)
        tiny.moved(get_peft_model(tiny.llama(), config)).save_pretrained(folder / name)
    return {name: str(folder / name) for name in configs}


def test_zero_coefficients_are_the_base_bit_for_bit(adapters: dict[str, str]) -> None:
    base = tiny.logits(tiny.llama())
    for options in ({}, {"parts": 3}, {"isotropic": True}):
        assert torch.equal(tiny.logits(composed(**options)), base)
    assert torch.equal(tiny.logits(tiny.adapted(ATLAS(vectors=adapters))), base)


@pytest.mark.parametrize("task", ["art", "law"])
def test_a_row_of_ones_is_that_model(task: str) -> None:
    model = put(composed(), [[float(task == "art")], [float(task == "law")]])
    other = tiny.llama()
    for layer in layers_of(model):
        other.get_submodule(layer.name).weight.data = tuned(task)[f"{layer.name}.weight"]
    torch.testing.assert_close(tiny.logits(model), tiny.logits(other), rtol=0, atol=1e-5)
    merged = model.merge_and_unload().state_dict()
    for name, value in other.state_dict().items():
        # a difference and a sum of values of size 1, rounded once each
        torch.testing.assert_close(merged[name], value, rtol=0, atol=1e-6)


def test_it_is_the_dense_sum_in_double_precision() -> None:
    model = put(composed(torch.float64))
    # the task vectors were rounded to float32 once
    torch.testing.assert_close(tiny.logits(model), tiny.logits(dense_sum(model)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_coefficients_gradient_is_the_inner_product_with_its_task_vector(parts: int) -> None:
    model = put(composed(torch.float64, parts=parts))
    tiny.loss(model).backward()
    plain = tiny.with_updates(model, tiny.llama(dtype=torch.float64)).requires_grad_()
    tiny.loss(plain).backward()
    for layer, update in updates_of(model, "default"):
        gradient = plain.get_submodule(layer.name).weight.grad
        masks = torch.ones_like(gradient)[None] if parts == 1 else update.part == torch.arange(parts)[:, None, None]
        expected = torch.einsum("oi,koi,toi->tk", gradient, masks.double(), update.tau)
        torch.testing.assert_close(update.coefficients.grad, expected, rtol=1e-8, atol=1e-10)


def test_as_many_coefficients_as_the_paper_counts(adapters: dict[str, str]) -> None:
    counts = {"blocks": composed(), "one": composed(isotropic=True), "parts": composed(parts=5)}
    found = {name: model.get_nb_trainable_parameters()[0] for name, model in counts.items()}
    assert found == {"blocks": 2 * LAYERS, "one": 2, "parts": 2 * LAYERS * 5}
    factored = tiny.adapted(ATLAS(vectors=adapters))
    assert sorted({layer.name.rpartition(".")[2] for layer in layers_of(factored)}) == sorted(TARGETS)
    assert factored.get_nb_trainable_parameters()[0] == 3 * LAYERS


def test_equal_coefficients_are_task_arithmetic() -> None:
    row = torch.tensor([[0.4], [-0.7]])
    blockwise, isotropic = put(composed(), row), put(composed(isotropic=True), row)
    assert torch.equal(tiny.logits(blockwise), tiny.logits(isotropic))
    merged, base = blockwise.merge_and_unload().state_dict(), tiny.llama().state_dict()
    for layer in layers_of(isotropic):
        name = f"{layer.name}.weight"
        models = [tuned("art")[name], tuned("law")[name]]
        expected = task_arithmetic(models, base[name], weight=row.flatten().tolist())
        torch.testing.assert_close(merged[name], expected, rtol=0, atol=1e-6)


def test_parts_are_disjoint_cover_the_block_and_differ_by_block() -> None:
    parts = random_parts((7, 11), 4, "0 q")
    assert sorted(parts.flatten().bincount().tolist()) == [19, 19, 19, 20]
    assert torch.equal(parts, random_parts((7, 11), 4, "0 q"))
    for other in ("0 v", "1 q"):
        assert not torch.equal(parts, random_parts((7, 11), 4, other))
    row = torch.tensor([[0.4], [-0.7]])
    torch.testing.assert_close(
        tiny.logits(put(composed(parts=4), row.expand(2, 4))), tiny.logits(put(composed(), row)), rtol=0, atol=1e-5
    )


def test_the_best_coefficients_of_a_linear_model_solve_the_normal_equations(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base, x, y = nn.Sequential(nn.Linear(6, 5)).double(), torch.randn(40, 6).double(), torch.randn(40, 5).double()
    for name in "abc":
        save_file({"0.weight": torch.randn(5, 6)}, tmp_path / name)
    model = get_peft_model(base, ATLAS(vectors={n: str(tmp_path / n) for n in "abc"}, target_modules=["0"])).double()
    ((_, update),) = updates_of(model, "default")
    features = torch.einsum("ni,toi->not", x, update.tau).flatten(0, 1)
    rest = (y - base(x)).detach().flatten()
    best = torch.linalg.solve(features.T @ features, features.T @ rest)
    (model(x) - y).square().sum().backward()
    assert update.coefficients.grad.abs().max() > 1
    update.coefficients.grad = None
    put(model, best.unsqueeze(1))
    (model(x) - y).square().sum().backward()
    assert update.coefficients.grad.abs().max() < 1e-9


def test_adapters_stay_factors_and_export_to_a_lora(adapters: dict[str, str], tmp_path: Path) -> None:
    model = put(tiny.adapted(ATLAS(vectors=adapters)).eval())
    ranks = {layer.name.rpartition(".")[2]: update.ranks for layer, update in updates_of(model, "default")}
    assert {"q_proj": [0, 2, 3], "down_proj": [0, 2, 0]}.items() <= ranks.items()
    checkpoints = {}
    for name, folder in adapters.items():
        merged = PeftModel.from_pretrained(tiny.llama(), folder).merge_and_unload()
        save_file(merged.state_dict(), tmp_path / name)
        checkpoints[name] = str(tmp_path / name)
    dense = put(
        tiny.adapted(ATLAS(vectors=checkpoints, target_modules=model.peft_config["default"].target_modules)).eval()
    )
    assert all(update.is_dense for _, update in updates_of(dense, "default"))
    torch.testing.assert_close(tiny.logits(model), tiny.logits(dense), rtol=0, atol=1e-5)
    export_lora(model, tmp_path / "lora")
    stock = PeftModel.from_pretrained(tiny.llama(), tmp_path / "lora")
    assert not list(layers_of(stock))
    torch.testing.assert_close(tiny.logits(stock), tiny.logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"parts": 2}, {"isotropic": True}, {"adapters": True}])
def test_a_saved_adapter_holds_coefficients_and_names_alone(
    options: dict[str, Any], adapters: dict[str, str], tmp_path: Path
) -> None:
    chosen = {"vectors": adapters} if options.pop("adapters", False) else options
    model = put(composed(**chosen))
    model.save_pretrained(tmp_path)
    values = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.rpartition(".")[2] for name in values} == {"coefficients", "lengths", "base_sample"}
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    assert loaded.peft_config["default"].vectors == model.peft_config["default"].vectors
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_other_task_vectors_than_those_of_the_training_are_refused(tmp_path: Path) -> None:
    state = tuned("art")
    save_file(state, tmp_path / "art")
    model = composed(vectors={"art": str(tmp_path / "art")})
    model.save_pretrained(tmp_path / "saved")
    save_file({name: value + 0.1 for name, value in state.items()}, tmp_path / "art")
    with pytest.raises(ValueError, match="holds another model by now"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")
    (tmp_path / "art").unlink()
    with pytest.raises(FileNotFoundError, match=r"art: .*art"):
        PeftModel.from_pretrained(tiny.llama(), tmp_path / "saved")


def test_transposed_and_embedded_weights_of_a_sharded_checkpoint(tmp_path: Path) -> None:
    def gpt2(seed: int) -> GPT2LMHeadModel:
        torch.manual_seed(seed)
        sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "vocab_size": 61, "n_positions": 16}
        return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.3, tie_word_embeddings=False)).eval()

    other = gpt2(1)
    other.save_pretrained(tmp_path / "other", max_shard_size="20KB")
    assert (tmp_path / "other/model.safetensors.index.json").exists()
    targets = ["c_attn", "c_proj", "c_fc", "wte", "wpe", "lm_head"]
    model = get_peft_model(gpt2(0), ATLAS(vectors={"other": str(tmp_path / "other")}, target_modules=targets))
    # all other parameters are at their equal start
    torch.testing.assert_close(tiny.logits(put(model, 1.0)), tiny.logits(other), rtol=0, atol=1e-4)


def test_the_strongest_vectors_of_each_block_are_kept() -> None:
    model = composed()
    with pytest.raises(ValueError, match="no gradients yet"):
        strongest(model, 1)
    tiny.loss(model).backward()
    blocks = strongest(model, 1)
    for layer, update in updates_of(model, "default"):
        assert blocks[layer.name] == [update.names[int(update.coefficients.grad.abs().argmax())]]
    assert len({name for names in blocks.values() for name in names}) == 2
    few = put(composed(blocks=blocks, vectors=tiny.task_vectors(tiny.llama())), 0.6)
    assert few.get_nb_trainable_parameters()[0] == LAYERS
    for layer, update in updates_of(model, "default"):
        update.coefficients.data = torch.tensor([[0.6 * (name in blocks[layer.name])] for name in update.names])
    torch.testing.assert_close(tiny.logits(few), tiny.logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["start", "merge", "unmerge", "frozen", "rows", "copies", "mixing", "bfloat16", "checkpointing", "disable"]
)
@pytest.mark.parametrize("isotropic", [False, True])
def test_in_factors_it_passes_what_it_passes_as_a_sum_of_weights(
    name: str, isotropic: bool, adapters: dict[str, str]
) -> None:
    result = check.run_check(ATLAS(vectors=adapters, isotropic=isotropic), name)
    assert result.outcome == "passed", result.message


def test_it_finds_the_mixture_that_made_a_teacher() -> None:
    teacher, model = put(composed(), seed=5), composed()
    expected = tiny.logits(teacher)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.0)
    for step in range(120):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 120)
        loss = (model(**tiny.batch()).logits - expected).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for (_, own), (_, others) in zip(updates_of(model, "default"), updates_of(teacher, "default"), strict=True):
        torch.testing.assert_close(own.coefficients, others.coefficients, rtol=0, atol=0.1)
    assert loss < 1e-3 * (tiny.logits(tiny.llama()) - expected).square().mean()


def test_the_regulariser_is_half_the_mean_of_the_blocks_norms() -> None:
    for p in (1, 2):
        model = put(composed(norm=p))
        norms = [torch.linalg.vector_norm(u.coefficients.detach(), p) for _, u in updates_of(model, "default")]
        assert float(penalty(model).detach()) == pytest.approx(0.5 * float(sum(norms)) / LAYERS)


def test_what_does_not_fit_is_refused_in_words(adapters: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="name them, vectors="):
        get_peft_model(tiny.llama(), ATLAS())
    with pytest.raises(FileNotFoundError, match="nowhere: /no/such"):
        get_peft_model(tiny.llama(), ATLAS(vectors={"nowhere": "/no/such", **adapters}))
    with pytest.raises(ValueError, match=r"no task vector changes layer 'model.layers.0.mlp.up_proj'"):
        get_peft_model(tiny.llama(), ATLAS(vectors=adapters, target_modules=["up_proj"]))
    save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(3, 3)}, tmp_path / "small")
    with pytest.raises(ValueError, match=r"its weight there is \[3, 3\]\n.*holds no tensor for 'model.layers.1"):
        get_peft_model(tiny.llama(), ATLAS(vectors={"small": str(tmp_path / "small")}, target_modules=["q_proj"]))
    get_peft_model(tiny.llama(), VLAdapter(target_modules=["o_proj"])).save_pretrained(tmp_path / "gated")
    with pytest.raises(ValueError, match="does not hold its factors; write it as a LoRA"):
        get_peft_model(tiny.llama(), ATLAS(vectors={"gated": str(tmp_path / "gated")}, target_modules=["o_proj"]))
    for name, biased in {
        "folklora": LoRA(target_modules=["q"], train_bias=True),
        "lora-bias": peft.LoraConfig(target_modules=["q"], lora_bias=True),
        "bias": peft.LoraConfig(target_modules=["q"], bias="lora_only"),
    }.items():
        get_peft_model(tiny.TwoLayers(), biased).save_pretrained(tmp_path / name)
        with pytest.raises(ValueError, match=r"more than weights by factors \(.*bias"):
            get_peft_model(tiny.TwoLayers(), ATLAS(vectors={name: str(tmp_path / name)}))
    dora = peft.LoraConfig(target_modules=["q_proj"], use_dora=True)
    get_peft_model(tiny.llama(), dora).save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match="'dora' is no LoRA"):
        get_peft_model(tiny.llama(), ATLAS(vectors={"dora": str(tmp_path / "dora")}))
    for options in (
        {"parts": 0},
        {"norm": 3},
        {"rank_pattern": {"q": 2}},
        {"isotropic": True, "norm": 1},
        {"dropout": 0.1},
    ):
        with pytest.raises(ValueError):
            ATLAS(**options)
    with pytest.raises(ValueError, match="blocks name law; the task vectors are art"):
        ATLAS(vectors={"art": "x"}, blocks={"q": ["law"]})

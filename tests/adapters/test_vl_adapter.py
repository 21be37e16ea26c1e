"""VL-Adapter: its forms, what tasks and sites share, and its place in BART and T5, with plain layers as oracles."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BartConfig, BartForConditionalGeneration, T5ForConditionalGeneration

from folklora import LoRA, VLAdapter, tiny, use_task
from folklora.adapters.bottlenecks import Dense, Generated, Kronecker
from folklora.adapters.host.layer import layers_of, updates_of
from folklora.adapters.host.steps import activation_penalty
from folklora.adapters.vl_adapter import VLAdapterUpdate

TASKS = ["vqa", "gqa", "nlvr", "caption"]
D, INNER = 32, 4
EPS32 = torch.finfo(torch.float32).eps


def adapted(base: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    return get_peft_model(tiny.bart() if base is None else base, VLAdapter(**options))


def moved(**options: Any) -> PeftModel:
    return tiny.moved(adapted(**options)).eval()


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {name: torch.randint(3, 61, (3, 5), generator=generator) for name in ("input_ids", "labels")}


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**batch()).logits


def step(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    model(**batch()).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def updates(model: nn.Module) -> list[VLAdapterUpdate]:
    return [update for _, update in updates_of(model, "default")]


def close(actual: Tensor, expected: Tensor) -> None:
    # four blocks of sums of at most 48 terms in float32
    torch.testing.assert_close(actual, expected, rtol=0, atol=200 * EPS32 * float(expected.abs().max()))


def test_the_sites_of_bart_and_t5_are_the_ends_of_their_sublayers(tiny_t5: Any):
    names = [layer.name.removeprefix("model.") for layer in layers_of(adapted())]
    # two sublayers in each of two encoder blocks, three in the decoder's
    assert len(names) == 2 * 2 + 2 * 3
    ends = {name.partition("layers.0.")[2] for name in names} - {""}
    assert ends == {"self_attn.out_proj", "encoder_attn.out_proj", "fc2"}
    model = adapted(tiny_t5())
    assert len(list(layers_of(model))) == 10
    assert {layer.name.rpartition(".")[2] for layer in layers_of(model)} == {"o", "wo"}


def test_an_adapter_is_a_plain_bottleneck_before_the_residual_and_the_norm():
    model = moved()
    layer = model.base_model.model.model.encoder.layers[0].fc2
    update, x = layer.folklora_updates["default"], torch.randn(3, 5, 48)
    down, up = nn.Linear(D, INNER), nn.Linear(INNER, D)
    dense = update.adapter()
    with torch.no_grad():
        for plain, own in zip((down, up), dense, strict=True):
            plain.weight.copy_(own.weight)
            plain.bias.copy_(own.bias)
        y = layer.base_layer(x)
        close(layer(x), y + up(F.gelu(down(y), approximate="tanh")))
    assert layer.get_base_layer().out_features == D


@pytest.mark.parametrize("form", ["adapter", "compacter", "hyperformer"])
def test_with_zero_start_the_first_step_is_the_base_and_with_the_authors_it_is_not(form: str):
    assert torch.equal(logits(adapted(form=form)), logits(tiny.bart()))
    authors = adapted(form=form, start="normal")
    assert not torch.equal(logits(authors), logits(tiny.bart()))
    assert not any(update.starts_at_base for update in updates(authors))


@pytest.mark.parametrize("form", ["adapter", "compacter"])
def test_a_zero_up_projection_gives_the_base_whatever_the_rest_is(form: str):
    model = moved(form=form)
    assert not torch.allclose(logits(model), logits(tiny.bart()))
    with torch.no_grad():
        for update in updates(model):
            for parameter in update.up.parameters():
                parameter.zero_()
    assert torch.equal(logits(model), logits(tiny.bart()))


def test_the_starts():
    torch.manual_seed(0)
    normal, linear = Dense(400, 50, "normal"), Dense(400, 50, "linear")
    # 20000 draws: the deviation is known to 1 %
    assert float(normal.weight.std()) == pytest.approx(0.02, rel=0.03)
    assert float(normal.bias.abs().max()) == 0
    assert float(linear.weight.abs().max()) == pytest.approx(1 / 20, rel=0.01)
    assert float(linear.bias.abs().max()) > 0.04
    kronecker = Kronecker(400, 50, "normal", 2, None)
    assert float(kronecker.W[0].abs().max()) == pytest.approx((2 * 6 / (200 + 25)) ** 0.5, rel=0.01)
    assert 0.003 < float(kronecker.C.std()) < 0.03


@pytest.mark.parametrize("rank", [None, 1, 3])
@pytest.mark.parametrize("n", [1, 2, 4])
def test_compacter_is_the_sum_of_kronecker_products(n: int, rank: int | None):
    torch.manual_seed(0)
    layer, x = Kronecker(16, 8, "normal", n, rank), torch.randn(3, 5, 16)
    with torch.no_grad():
        layer.bias.normal_()
        W = layer.W[0] if rank is None else layer.W[0] @ layer.W[1]
        H = sum(torch.kron(layer.C[i], W[i]) for i in range(n))
        torch.testing.assert_close(layer(x), x @ H + layer.bias, rtol=0, atol=1e-6)
        if n == 1:
            torch.testing.assert_close(layer(x), layer.C[0, 0, 0] * (x @ W[0]) + layer.bias, rtol=0, atol=1e-6)
    assert sum(p.numel() for p in layer.parameters()) == Kronecker.count(16, 8, n, rank)


@pytest.mark.parametrize("form", ["adapter", "compacter"])
@pytest.mark.parametrize(
    ("sharing", "downs", "ups"), [("single", 1, 1), ("multiple", 4, 4), ("down", 1, 4), ("up", 4, 1)]
)
def test_what_the_tasks_share(form: str, sharing: str, downs: int, ups: int):
    model = adapted(form=form, sharing=sharing, tasks=TASKS)
    for update in updates(model):
        held = [update.adapter(task) for task in TASKS]
        assert len({id(down) for down, _ in held}) == downs
        assert len({id(up) for _, up in held}) == ups
    site = VLAdapter(form=form, tasks=TASKS).trainable_count((D, D))
    found = model.get_nb_trainable_parameters()[0]
    assert found == 10 * model.peft_config["default"].trainable_count((D, D))
    if form == "adapter":
        down, up = D * INNER + INNER, D * INNER + D
        assert site == down + up
        assert found == 10 * (downs * down + ups * up)


@pytest.mark.parametrize("sharing", ["multiple", "down", "up"])
def test_a_batch_of_one_task_trains_that_tasks_adapters_alone(sharing: str):
    model = moved(sharing=sharing, tasks=TASKS)
    use_task(model, "gqa")
    model(**batch()).loss.backward()
    for update in updates(model):
        for projections in (update.down, update.up):
            for number, projection in enumerate(projections):
                trained = len(projections) == 1 or number == TASKS.index("gqa")
                for parameter in projection.parameters():
                    assert (parameter.grad is not None and float(parameter.grad.abs().max()) > 0) == trained


def test_tasks_of_multiple_adapters_differ_and_those_of_a_single_one_do_not():
    model = moved(sharing="multiple", tasks=TASKS)
    found = []
    for task in ("vqa", "caption", "vqa"):
        use_task(model, task)
        found.append(logits(model))
    assert torch.equal(found[0], found[2])
    assert not torch.allclose(found[0], found[1])
    single = moved(tasks=TASKS)
    expected = logits(single)
    use_task(single, "caption")
    assert torch.equal(logits(single), expected)


def test_one_task_must_be_named_and_known():
    model = moved(sharing="multiple", tasks=TASKS)
    with pytest.raises(ValueError, match="tasks vqa, gqa, nlvr, caption, and none was named"):
        logits(model)
    with pytest.raises(ValueError, match="no VLAdapter of the model has a task 'vqq'; there are caption, gqa"):
        use_task(model, "vqq")
    use_task(model, "vqa")
    use_task(model, None)
    with pytest.raises(ValueError, match="none was named"):
        logits(model)


def test_of_bart_base_the_published_share_is_trained():
    with torch.device("meta"):
        # the rest of BartConfig's sizes stand for the large model, and heads do not count
        base = BartConfig(d_model=768, encoder_layers=6, decoder_layers=6, encoder_ffn_dim=3072, decoder_ffn_dim=3072)
        single = get_peft_model(BartForConditionalGeneration(base), VLAdapter(tasks=TASKS))
    assert single.get_nb_trainable_parameters()[0] == 4_449_600
    config = VLAdapter(tasks=TASKS, sharing="multiple")
    assert 30 * config.trainable_count((768, 768)) == 4 * 4_449_600
    half = VLAdapter(tasks=TASKS, sharing="down")
    assert 30 * half.trainable_count((768, 768)) == 30 * (73_728 + 96) + 4 * 30 * (73_728 + 768)


def test_hyperformer_makes_the_weights_of_a_task_and_block():
    model = moved(form="hyperformer", tasks=TASKS, embedding_size=6, hyper_hidden=5, projected_size=3)
    found = {id(update.network) for update in updates(model)}
    assert len(found) == 2
    held = [update for update in updates(model) if hasattr(update, "generated")]
    assert len(held) == 2
    site = next(update for update in updates(model) if "decoder" in update.stack and update.kind == "cross")
    network = site.network
    assert set(network.kinds) == {"ff", "self", "cross"}
    assert set(network.block) == {"0", "1"}
    # by hand
    e = torch.cat([network.task[2], network.block["1"]])
    e = F.relu(F.linear(e, network.inner.weight, network.inner.bias))
    e = F.layer_norm(F.linear(e, network.outer.weight, network.outer.bias), (3,), *network.norm.parameters(), 1e-6)
    made = network.weights(2, "1", "cross")
    maps = network.kinds["cross"]
    torch.testing.assert_close(made["down"], (maps["down"].weight @ e + maps["down"].bias).view(INNER, D))
    torch.testing.assert_close(made["up_bias"], maps["up_bias"].weight @ e + maps["up_bias"].bias)
    again = network.weights(2, "1", "cross")
    assert all(torch.equal(made[name], again[name]) for name in made)
    for other in (network.weights(1, "1", "cross"), network.weights(2, "0", "cross"), network.weights(2, "1", "ff")):
        assert not torch.allclose(made["down"], other["down"])


def test_hyperformers_size_hardly_depends_on_the_tasks():
    counts = []
    for tasks in (TASKS, TASKS[:1]):
        model = adapted(form="hyperformer", tasks=tasks)
        config = model.peft_config["default"]
        found = model.get_nb_trainable_parameters()[0]
        assert found == config.shared_count({layer.name: (D, 0) for layer in layers_of(model)})
        sizes = (512, 128, 8)
        stacks = [Generated.count(D, INNER, len(tasks), 2, kinds, sizes) for kinds in (2, 3)]
        assert found == sum(stacks)
        # by hand: embeddings, two maps with biases, a norm, and four generators for each kind of site
        made = 2 * D * INNER + D + INNER
        assert stacks[0] == (len(tasks) + 2) * 512 + 1025 * 128 + 129 * 8 + 16 + 2 * 9 * made
        counts.append(found)
    # an embedding of 512 a task in each of encoder and decoder
    assert counts[0] - counts[1] == 2 * 3 * 512


def test_hyperformer_trains_what_its_task_reads():
    model = moved(form="hyperformer", tasks=TASKS)
    use_task(model, "nlvr")
    model(**batch()).loss.backward()
    for update in updates(model):
        gradient = update.network.task.grad
        assert float(gradient[2].abs().max()) > 0
        assert float(gradient[[0, 1, 3]].abs().max()) == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sharing": "multiple", "tasks": TASKS},
        {"sharing": "down", "tasks": TASKS, "form": "compacter", "factor_rank": 1},
        {"form": "hyperformer", "tasks": TASKS},
        {"train_layer_norms": True},
    ],
    ids=["single", "multiple", "compacter", "hyperformer", "norms"],
)
def test_trained_saved_loaded_copied_and_disabled(options: dict[str, Any], tmp_path: Path):
    model = adapted(**options)
    base = {name: value.clone() for name, value in tiny.bart().state_dict().items()}
    several = len(options.get("tasks", [])) > 1
    if several:
        use_task(model, "gqa")
    step(model.train())
    step(model)
    model.eval()
    trained = logits(model)
    assert not torch.allclose(trained, logits(tiny.bart()))
    for name, value in model.base_model.model.state_dict().items():
        own = name.replace(".base_layer", "").replace(".original_module", "")
        if own in base and ".modules_to_save." not in name:
            assert torch.equal(value, base[own]), name
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(tiny.bart()))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), trained)
        step(twin.train())
        assert not torch.equal(logits(twin.eval()), trained)
    assert torch.equal(logits(model), trained)
    model.save_pretrained(tmp_path)
    for memory in (False, True):
        loaded = PeftModel.from_pretrained(tiny.bart(), tmp_path, low_cpu_mem_usage=memory)
        if several:
            use_task(loaded, "gqa")
        assert torch.equal(logits(loaded), trained)


def test_shared_parts_are_saved_once(tmp_path: Path):
    from safetensors.torch import load_file

    model = moved(form="hyperformer", tasks=TASKS)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    numbers = sum(value.numel() for name, value in saved.items() if not name.endswith("base_sample"))
    assert numbers == model.get_nb_trainable_parameters()[0]


def test_norms_are_trained_in_copies_where_asked_for(tiny_t5: Any):
    model = adapted(train_layer_norms=True)
    plain = adapted().get_nb_trainable_parameters()[0]
    # per stack: two or three a block and the one of the embeddings
    assert model.get_nb_trainable_parameters()[0] - plain == (2 * 2 + 1 + 2 * 3 + 1) * 2 * D
    assert len(adapted(tiny_t5(), train_layer_norms=True).peft_config["default"].modules_to_save) == 2 * 2 + 2 * 3 + 2
    model.add_adapter("second", VLAdapter(train_layer_norms=True))
    first, second = (model.peft_config[name].modules_to_save for name in ("default", "second"))
    assert first == second


def test_over_a_bfloat16_base_it_trains_in_float32():
    for form in ("adapter", "compacter", "hyperformer"):
        model = tiny.moved(adapted(tiny.bart(torch.bfloat16), form=form)).train()
        loss = model(**batch()).loss
        loss.backward()
        assert torch.isfinite(loss)
        for name, value in model.named_parameters():
            if value.requires_grad:
                assert value.dtype == torch.float32, name
                assert torch.isfinite(value.grad).all(), name


def test_it_adds_up_with_another_adapter_and_rows_may_differ():
    model = moved()
    model.add_adapter("other", LoRA(r=2, target_modules=["fc2", "q_proj"]))
    tiny.moved(model, "other").eval()
    layer, x = model.base_model.model.model.decoder.layers[1].fc2, torch.randn(2, 5, 48)
    base, one, two, both = (
        tiny.layer_output(layer, names, x) for names in ([], ["default"], ["other"], ["default", "other"])
    )
    close(one + two - base, both)
    rows = ["default", "__base__", "other"]
    mixed = model(**batch(), adapter_names=rows).logits.detach()
    expected = []
    for row, name in enumerate(rows):
        if name == "__base__":
            expected.append(logits(tiny.bart())[row])
        else:
            model.set_adapter(name)
            expected.append(logits(model)[row])
    close(mixed, torch.stack(expected))


def test_the_activity_penalty_is_the_mean_square_of_the_bottleneck():
    model = moved(z_penalty=0.5).train()
    seen: list[Tensor] = []
    handles = [
        update.up[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        for update in updates(model)
    ]
    model(**batch())
    expected = 0.5 * torch.stack([z.square().mean() for z in seen]).mean()
    assert len(handles) == len(seen) == 10
    torch.testing.assert_close(activation_penalty(model), expected)
    assert activation_penalty(model) is None


def test_t5_carries_it_too(tiny_t5: Any):
    model = tiny.moved(adapted(tiny_t5())).eval()
    assert isinstance(model.base_model.model, T5ForConditionalGeneration)
    expected = logits(tiny_t5())
    assert not torch.allclose(logits(model), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


def test_errors_say_what_is_wrong(tiny_llama: Any):
    for options, words in [
        ({"form": "lora"}, "form must be one of adapter, compacter, hyperformer"),
        ({"sharing": "half"}, "sharing must be one of single, multiple, down, up"),
        ({"rank_pattern": {"fc2": 2}}, "has no rank and no alpha"),
        ({"tasks": ["vqa", "vqa"]}, "each once"),
        ({"form": "compacter", "start": "linear"}, 'start="linear" is for form="adapter"'),
        ({"form": "hyperformer", "sharing": "down"}, "leave sharing at single"),
        ({"reduction_factor": 0}, "reduction_factor must be at least 1"),
        ({"factor_rank": 0}, "factor_rank must be at least 1"),
    ]:
        with pytest.raises(ValueError, match=words):
            VLAdapter(**options)
    hyperformer = {"base": tiny.llama(), "form": "hyperformer"}
    for options, words in [
        ({"reduction_factor": 33}, "reduction_factor 33 is above 32"),
        ({"form": "compacter", "hypercomplex_division": 8}, "hypercomplex_division 8 must divide 32"),
        ({"base": tiny_llama()}, "no sublayer of LlamaForCausalLM ends in one of out_proj, fc2"),
        ({**hyperformer, "target_modules": ["q_proj", "v_proj"]}, "adapters of one width"),
        ({**hyperformer, "target_modules": ["lm_head"]}, "makes its weights by block"),
    ]:
        with pytest.raises(ValueError, match=words):
            adapted(**options)

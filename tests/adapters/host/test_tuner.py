"""Which layers an adapter gets, what is refused in words, and several adapters on one model."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from folklora import AMLoRA, DiffoRA, KaSA, LoRA, PiSSA, tiny
from folklora.adapters.host.layer import layers_of, updates_of


def _names(model: nn.Module) -> list[str]:
    return [layer.name for layer in layers_of(model)]


def _mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    return MixtralForCausalLM(config).eval()


def _tied() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny.VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def _classifier() -> LlamaForSequenceClassification:
    config = tiny.llama().config
    config.num_labels, config.pad_token_id = 3, 0
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


def test_attention_beside_experts_is_adapted() -> None:
    adapted = tiny.moved(get_peft_model(_mixtral(), KaSA(r=2, target_modules=["q_proj"]))).eval()
    tokens = torch.randint(64, (2, 5))
    expected = adapted(input_ids=tokens).logits
    tiny.close(adapted.merge_and_unload()(input_ids=tokens).logits, expected, 1e-5, "the logits merged and unmerged")


def test_a_target_that_v4_checkpoints_had_is_not_left_out_silently() -> None:
    with pytest.raises(ValueError, match=r"target module 'w1' matches no layer; layers that can be adapted: embed_tok"):
        get_peft_model(_mixtral(), LoRA(target_modules=["q_proj", "w1"]))


def test_tied_embeddings_can_be_adapted_and_not_merged() -> None:
    base = _tied()
    model = tiny.moved(get_peft_model(base, LoRA(r=2, target_modules=["embed_tokens", "q_proj"]))).eval()
    layer = next(iter(layers_of(model)))
    assert base.lm_head.weight is layer.base_layer.weight
    adapted = tiny.logits(model)
    untied = _tied()
    untied.lm_head.weight = nn.Parameter(untied.lm_head.weight.detach().clone())
    tiny.close(adapted, tiny.logits(tiny.with_updates(model, untied)), 1e-5, "the logits and those of W + ΔW")
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="share one weight and one of them is adapted"):
            merge()
    assert torch.equal(tiny.logits(model), adapted)


def test_an_adapter_beside_tied_embeddings_merges() -> None:
    model = tiny.moved(get_peft_model(_tied(), LoRA(r=2, target_modules=["q_proj"]))).eval()
    before = tiny.logits(model)
    tiny.close(tiny.logits(model.merge_and_unload()), before, 1e-5, "the logits merged and unmerged")


def test_a_layer_can_be_named_by_its_weight(tmp_path: Path) -> None:
    named = tiny.trained(LoRA(r=2, target_parameters=["q_proj.weight", "embed_tokens.weight"]))
    whole = tiny.trained(LoRA(r=2, target_modules=["q_proj", "embed_tokens"]))
    assert torch.equal(tiny.logits(named), tiny.logits(whole))
    named.save_pretrained(tmp_path / "named")
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path / "named")
    assert torch.equal(tiny.logits(loaded), tiny.logits(whole))


def test_a_target_that_matches_nothing_lists_what_exists() -> None:
    with pytest.raises(ValueError, match=r"\['c_attn'\] matches no layer of LlamaForCausalLM; layers that can be") as e:
        get_peft_model(tiny.llama(), LoRA(target_modules=["c_attn"]))
    assert "down_proj, embed_tokens, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj" in str(e.value)


def test_every_problem_is_reported_at_once_and_the_model_left_as_it_was() -> None:
    model = tiny.llama()
    before = {name: (value, value.requires_grad) for name, value in model.named_parameters()}
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match="rank 20 is above 16") as caught:
        get_peft_model(model, KaSA(r=20, target_modules=["q_proj", "v_proj", "input_layernorm", "nowhere"]))
    message = str(caught.value)
    for index in (0, 1):
        assert f"rank 20 is above 16, the largest for layer 'model.layers.{index}.self_attn.v_proj'" in message
        assert f"layer 'model.layers.{index}.input_layernorm' is a LlamaRMSNorm" in message
    assert "'nowhere'" in message
    assert "self_attn.q_proj'" not in message
    assert dict(model.named_modules()) == modules
    assert {name: (value, value.requires_grad) for name, value in model.named_parameters()} == before


def test_a_refused_second_adapter_leaves_the_first() -> None:
    model = tiny.trained(LoRA(r=4, target_modules=["q_proj"]))
    before = tiny.logits(model)
    with pytest.raises(ValueError, match="rank 99"):
        model.add_adapter("other", LoRA(r=99, target_modules=["q_proj", "up_proj"]))
    assert list(model.peft_config) == ["default"]
    assert all(set(layer.folklora_updates) == {"default"} for layer in layers_of(model))
    assert len(_names(model)) == 2
    assert torch.equal(tiny.logits(model), before)
    model.add_adapter("other", LoRA(r=3, target_modules=["q_proj", "up_proj"]))


def test_kinds_that_a_method_does_not_take_are_named() -> None:
    with pytest.raises(ValueError, match=r"am-lora adapts linear layers; 'model.embed_tokens' is a Embedding"):
        get_peft_model(tiny.llama(), AMLoRA(target_modules=["embed_tokens"]))
    attention = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match="reads its weight without calling it"):
        get_peft_model(attention, LoRA(target_modules=["out_proj"]))


def test_an_unknown_option_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"KaSA has no option 'truncat'; did you mean 'truncate'\?") as caught:
        KaSA(truncat=3, zzz=1)
    assert "KaSA has no option 'zzz'\n" in str(caught.value)
    assert "rank_pattern" in str(caught.value)
    # as any function has it that is called with a keyword of somebody else's
    with pytest.raises(TypeError, match="has no option"):
        KaSA(bias="all")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pefts_dtype_option_is_followed(dtype: torch.dtype, tmp_path: Path) -> None:
    config = DiffoRA(r=3, shared_r=2, target_modules=["q_proj"])
    model = get_peft_model(tiny.llama(dtype=dtype), config, autocast_adapter_dtype=False)
    assert {value.dtype for value in model.parameters()} == {dtype}
    model.add_adapter("other", LoRA(target_modules=["v_proj"]))
    assert {value.dtype for _, update in updates_of(model, "other") for value in update.parameters()} == {torch.float32}
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    loaded = PeftModel.from_pretrained(tiny.llama(dtype=dtype), tmp_path, autocast_adapter_dtype=False)
    assert {value.dtype for value in loaded.parameters()} == {dtype}
    tiny.same(tiny.logits(loaded), tiny.logits(model), "loaded and saved")


def test_names_of_adapters_must_fit_the_batch() -> None:
    model = get_peft_model(tiny.TwoLayers(), LoRA(r=2, target_modules=["q"]))
    for call in ({"x": torch.randn(9, 32)}, {"x": torch.randn(9, 32), "adapter_names": ["__base__"] * 3}):
        model(**call)
    with pytest.raises(ValueError, match="adapter_names has 5 entries, and the batch has 9 rows"):
        model(torch.randn(9, 32), adapter_names=["__base__"] * 5)
    with pytest.raises(ValueError, match="adapter_names has 0 entries"):
        model(x=torch.randn(9, 32), adapter_names=[])


def test_no_target_takes_the_architectures_choice_or_says_that_there_is_none() -> None:
    assert {name.rpartition(".")[2] for name in _names(get_peft_model(tiny.llama(), LoRA(r=2)))} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match=r'no default target_modules are known.*"all-linear"'):
        get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoRA(r=1))


def test_all_linear_leaves_the_head_and_finds_adapted_layers_again() -> None:
    model = get_peft_model(tiny.llama(), LoRA(r=2, target_modules="all-linear"))
    first = _names(model)
    assert len(first) == 14
    model.add_adapter("other", PiSSA(r=2, target_modules="All-Linear"))
    assert all(set(layer.folklora_updates) == {"default", "other"} for layer in layers_of(model))
    assert _names(model) == first


def test_layers_and_patterns_choose_blocks_ranks_and_alphas() -> None:
    config = LoRA(
        r=4,
        alpha=8,
        target_modules=["q_proj", "v_proj"],
        layers_to_transform=[1],
        rank_pattern={"v_proj": 2},
        alpha_pattern={r"layers\.1\.self_attn\.q_proj": 2},
    )
    model = get_peft_model(tiny.llama(), config)
    updates = {layer.name: layer.folklora_updates["default"] for layer in layers_of(model)}
    q, v = (updates[f"model.layers.1.self_attn.{name}_proj"] for name in "qv")
    assert len(updates) == 2
    assert (q.A.shape[0], q.scale, v.A.shape[0], v.scale) == (4, 0.5, 2, 4.0)


def test_a_pattern_is_held_to_the_layers_limit_too() -> None:
    with pytest.raises(ValueError, match=r"rank 17 is above 16.*layers\.0\.self_attn\.v_proj"):
        get_peft_model(tiny.llama(), LoRA(target_modules=["v_proj"], rank_pattern={"layers.0.self_attn.v_proj": 17}))


def test_excluded_modules_are_left_alone() -> None:
    model = get_peft_model(
        tiny.llama(), LoRA(r=2, target_modules="all-linear", exclude_modules=r".*layers\.0.*|.*mlp.*")
    )
    assert all("layers.1.self_attn" in name for name in _names(model))


def test_adding_switching_and_deleting_adapters() -> None:
    model = tiny.trained(LoRA(r=4, target_modules=["q_proj", "v_proj"]))
    one = tiny.logits(model)
    model.add_adapter("other", KaSA(r=2, target_modules=["q_proj", "up_proj"]))
    assert torch.equal(tiny.logits(model), one)
    model.set_adapter("other")
    two = tiny.logits(model)
    assert not torch.allclose(one, two)
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained
    assert all(".other." in name for name in trained)
    model.delete_adapter("other")
    assert torch.equal(tiny.logits(model), one)
    assert list(model.peft_config) == ["default"]
    model.add_adapter("other", PiSSA(r=2, target_modules=["q_proj"]))
    assert torch.equal(tiny.logits(model), one)
    model.delete_adapter("default")
    model.set_adapter("other")
    assert [set(layer.folklora_updates) for layer in layers_of(model) if layer.folklora_updates] == [{"other"}] * 2


def test_a_row_of_an_unknown_adapter_is_refused() -> None:
    model = tiny.trained(LoRA(r=4, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no adapter nobody; there are default and __base__"):
        model(**tiny.batch(), adapter_names=["nobody"] * 4)
    model.train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="in training with gradient checkpointing"):
        model(**tiny.batch(), adapter_names=["default"] * 4)


def test_unloading_leaves_nothing_behind() -> None:
    base = tiny.llama()
    before = {name: type(module) for name, module in base.named_modules()}
    model = tiny.trained(AMLoRA(r=4, target_modules=["q_proj"]))
    unloaded = model.unload()
    assert {name: type(module) for name, module in unloaded.named_modules()} == before
    assert not unloaded._forward_pre_hooks
    assert torch.equal(tiny.logits(unloaded), tiny.logits(base))


def test_modules_to_save_are_trained_saved_and_loaded(tmp_path: Path) -> None:
    model = get_peft_model(_classifier(), LoRA(r=4, target_modules=["q_proj"], modules_to_save=["score"]))
    optimizer = torch.optim.SGD([value for value in model.parameters() if value.requires_grad], lr=1.0)
    model(**tiny.batch(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    assert not torch.equal(tiny.logits(model), tiny.logits(_classifier()))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(_classifier(), tmp_path)
    assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_rows_choose_their_own_saved_modules_too() -> None:
    model = get_peft_model(_classifier(), LoRA(r=4, target_modules=["q_proj"], modules_to_save=["score"]))
    model.add_adapter("other", KaSA(r=2, target_modules=["v_proj"], modules_to_save=["score"]))
    expected = []
    for name in ("other", "default"):
        tiny.moved(model, name).eval()
        expected.append(tiny.logits(model))
    rows = ["other", "default", "default", "other"]
    with torch.no_grad():
        mixed = model(**tiny.batch(), adapter_names=rows).logits
    separate = torch.stack([expected[rows[row] == "default"][row] for row in range(4)])
    tiny.close(mixed, separate, 1e-5, "mixed and separate rows")


def test_transformers_own_adapter_methods_work(tmp_path: Path) -> None:
    model = tiny.llama()
    base = tiny.logits(model)
    model.add_adapter(KaSA(r=4, target_modules=["q_proj"]), "first")
    changed = tiny.logits(model)
    assert not torch.allclose(changed, base)
    model.disable_adapters()
    assert torch.equal(tiny.logits(model), base)
    model.enable_adapters()
    model.save_pretrained(tmp_path)
    other = tiny.llama()
    other.load_adapter(str(tmp_path), "second")
    assert torch.equal(tiny.logits(other), changed)
    assert not any(value.requires_grad for layer in layers_of(other) for value in layer.folklora_updates.parameters())
    stranger = tiny.llama()
    stranger.model.layers[1].self_attn.q_proj.weight.data += 1
    stranger.load_adapter(str(tmp_path), "third")
    with pytest.raises(RuntimeError, match=r"layers\.1\.self_attn\.q_proj'.*another base model's weights"):
        tiny.logits(stranger)


def test_a_saved_adapter_brings_its_base_with_it(tmp_path: Path) -> None:
    tiny.llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = tiny.moved(get_peft_model(base, PiSSA(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path / "adapter")
    for auto in (AutoModelForCausalLM, peft.AutoPeftModelForCausalLM):
        loaded = auto.from_pretrained(tmp_path / "adapter")
        assert len(_names(loaded)) == 2
        assert torch.equal(tiny.logits(loaded), tiny.logits(model))


def test_generation_goes_through_the_adapter() -> None:
    model = tiny.trained(LoRA(r=4, target_modules=["q_proj", "lm_head"]))
    merged = tiny.trained(LoRA(r=4, target_modules=["q_proj", "lm_head"])).merge_and_unload()
    prompt = tiny.batch()["input_ids"][:2]
    options = {"max_new_tokens": 5, "do_sample": False, "use_cache": True, "pad_token_id": 0}
    answers = model.generate(input_ids=prompt, **options)
    assert torch.equal(answers, merged.generate(input_ids=prompt, **options))
    rows = model.generate(input_ids=prompt, adapter_names=["__base__", "default"], num_beams=3, **options)
    beams = merged.generate(input_ids=prompt, num_beams=3, **options)
    assert torch.equal(rows[1], beams[1])
    assert torch.equal(rows[0], tiny.llama().generate(input_ids=prompt, num_beams=3, **options)[0])

"""Soft prompts on models: they are to the model what tokens in their place would be; saved, loaded, taken off."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import MambaConfig, MambaForCausalLM

from folklora import LoRA
from folklora.prompts import PromptConfig, PromptPool, SoftPrompt, fold, prompts_of
from folklora.stream.evaluate import _continues, _Reader, rank_labels

CAUSAL = ["llama", "gpt2", "bloom", "mistral"]
CLOSE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", CAUSAL)
def test_a_prompt_is_to_a_causal_model_what_its_tokens_would_be(kind, left, prompted, make_base, rows, with_tokens):
    model, base = prompted(kind), make_base(kind)
    ids, mask = rows(left)
    labels = ids.masked_fill(mask == 0, -100)
    whole, kept = with_tokens(ids, mask)
    positions = (mask.cumsum(1) - 1).clamp(min=0), (kept.cumsum(1) - 1).clamp(min=0)
    given = [{"position_ids": p} if kind != "bloom" else {} for p in positions]
    ours = model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True, **given[0])
    theirs = base(input_ids=whole, attention_mask=kept, **given[1])
    assert ours.logits.shape[:2] == ids.shape
    real = mask.bool()
    torch.testing.assert_close(ours.logits[real], theirs.logits[:, 3:][real], **CLOSE)
    expected = torch.nn.functional.cross_entropy(
        theirs.logits[:, 3:-1][real[:, 1:] & real[:, :-1]], labels[:, 1:][real[:, 1:] & real[:, :-1]]
    )
    if not left:
        torch.testing.assert_close(ours.loss, expected, **CLOSE)
    assert {states.shape[:2] for states in ours.hidden_states} == {ids.shape}


@pytest.mark.parametrize("kind", CAUSAL)
def test_generation_agrees_with_and_without_cache_and_with_tokens(kind, prompted, make_base, rows, with_tokens):
    model, base = prompted(kind), make_base(kind)
    ids, mask = rows(left=True)
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 1, "eos_token_id": None}
    cached, plain, beams = (
        model.generate(input_ids=ids, attention_mask=mask, **asked, **more)
        for more in ({"use_cache": True}, {"use_cache": False}, {"num_beams": 3})
    )
    assert torch.equal(cached, plain)
    assert torch.equal(cached[:, :6], ids)
    whole, kept = with_tokens(ids, mask)
    theirs = base.generate(input_ids=whole, attention_mask=kept, **asked)
    assert torch.equal(cached[:, 6:], theirs[:, 9:])
    theirs = base.generate(input_ids=whole, attention_mask=kept, num_beams=3, **asked)
    assert torch.equal(beams[:, 6:], theirs[:, 9:])
    alone = model.generate(input_ids=ids[1:2, 2:], attention_mask=mask[1:2, 2:], **asked)
    assert torch.equal(alone[0, 4:], cached[1, 6:]), "padding changes nothing"


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_prompt_is_to_an_encoder_what_its_tokens_would_be(kind, left, prompted, make_base, rows, with_tokens):
    model, base = prompted(kind), make_base(kind)
    ids, mask = rows(left)
    whole, kept = with_tokens(ids, mask)
    labels = torch.tensor([[40, 41, 0], [42, 0, -100], [43, 44, 0]])
    ours = model(input_ids=ids, attention_mask=mask, labels=labels)
    theirs = base(input_ids=whole, attention_mask=kept, labels=labels)
    torch.testing.assert_close(ours.logits, theirs.logits, **CLOSE)
    torch.testing.assert_close(ours.loss, theirs.loss, **CLOSE)
    asked = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for more in ({"use_cache": True}, {"use_cache": False}, {"num_beams": 3}):
        found = model.generate(input_ids=ids, attention_mask=mask, **asked, **more)
        expected = base.generate(input_ids=whole, attention_mask=kept, **asked, **more)
        assert torch.equal(found, expected), more


@pytest.mark.parametrize("kind", ["llama", "bloom", "t5"])
def test_labels_are_ranked_as_after_tokens_whatever_the_batch(kind, prompted, make_base, tokens, tiny_tokenizer):
    model, base = prompted(kind), make_base(kind)
    prompts, labels = ["xx: abc\nAnswer:", "a\nAnswer:", "abcdefgh"], [" yes", " positive", " negative"]
    found = rank_labels(model, tiny_tokenizer, prompts, labels)
    one_by_one = rank_labels(model, tiny_tokenizer, prompts, labels, batch_size=1)
    torch.testing.assert_close(found, one_by_one, **CLOSE)
    texts = [tiny_tokenizer.decode(tokens) + prompt for prompt in prompts]
    asked = [tiny_tokenizer(text)["input_ids"] for text in texts]
    assert all(ids[:3] == tokens.tolist() for ids in asked), "the tokens must survive as text"
    torch.testing.assert_close(found, rank_labels(base, tiny_tokenizer, texts, labels), **CLOSE)


def test_a_cache_is_continued_by_several_tokens(prompted, rows, tiny_tokenizer):
    model = prompted("llama")
    ids, mask = rows(left=True)
    more = torch.randint(2, 128, (3, 4), generator=torch.Generator().manual_seed(1))
    both = torch.cat([mask, torch.ones_like(more)], dim=1)
    whole = model(input_ids=torch.cat([ids, more], dim=1), attention_mask=both)
    first = model(input_ids=ids, attention_mask=mask, use_cache=True)
    assert first.past_key_values.get_seq_length() == 6 + 3
    reader = _Reader.of(model, tiny_tokenizer)
    assert _continues(first, 6 + reader.soft_positions), "labels are scored from the prompts' cache"
    then = model(input_ids=more, attention_mask=both, past_key_values=first.past_key_values)
    torch.testing.assert_close(then.logits, whole.logits[:, 6:], **CLOSE)


def test_several_stand_newest_first_and_none_where_disabled(make_base, rows):
    base = make_base("llama")
    ids, mask = rows(left=False)
    alone = base(input_ids=ids, attention_mask=mask).logits
    model = get_peft_model(base, SoftPrompt(prompt_length=2, task_type="CAUSAL_LM"), adapter_name="old").eval()
    model.add_adapter("new", SoftPrompt(prompt_length=3, task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["old", "new"])
    embedded = base.get_input_embeddings()(ids)
    old, new = (prompts_of(model)[name].embedding for name in ("old", "new"))
    whole = torch.cat([torch.cat([new, old]).expand(3, -1, -1), embedded], dim=1)
    found = model(input_ids=ids, attention_mask=mask).logits
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, alone)
        expected = base(inputs_embeds=whole, attention_mask=torch.cat([torch.ones(3, 5), mask], dim=1)).logits
    real = mask.bool()
    torch.testing.assert_close(found[real], expected[:, 5:][real], **CLOSE)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        f"base_model.model.soft_prompts.folklora_prompts.{name}.embedding" for name in ("old", "new")
    ]


def test_unloading_leaves_the_base_as_it_was(make_base):
    base, fresh = make_base("t5"), make_base("t5")
    model = get_peft_model(base, SoftPrompt(task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_and_unload()
    left = copy.deepcopy(model).unload()
    for found in (left, model.unload()):
        assert found.state_dict().keys() == fresh.state_dict().keys()
        assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in found.state_dict().items())
        assert not any(part._forward_pre_hooks or part._forward_hooks for part in found.modules())
        assert not any(part._forward_pre_hooks_with_kwargs for part in found.modules())


@pytest.mark.parametrize("config", [SoftPrompt(mlp="mlp2", bottleneck=6), PromptPool(pool_size=4, top_k=2)])
def test_a_saved_prompt_computes_the_same_under_another_name(config, make_base, rows, tmp_path):
    config.task_type = "CAUSAL_LM"
    model = get_peft_model(make_base("llama"), config).eval()
    ids, mask = rows(left=True)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(make_base("llama"), tmp_path, adapter_name="other").eval()
    expected = model(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(loaded(input_ids=ids, attention_mask=mask).logits, expected)
    light = PeftModel.from_pretrained(make_base("llama"), tmp_path, low_cpu_mem_usage=True).eval()
    assert torch.equal(light(input_ids=ids, attention_mask=mask).logits, expected)
    again = pickle.loads(pickle.dumps(model))
    assert torch.equal(again(input_ids=ids, attention_mask=mask).logits, expected)


def test_a_saved_prompt_that_does_not_fit_is_refused(make_base, tiny_llama, tmp_path):
    get_peft_model(make_base("llama"), SoftPrompt(prompt_length=3, task_type="CAUSAL_LM")).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="made for another base model's weights"):
        PeftModel.from_pretrained(tiny_llama(2), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    values = load_file(file)
    key = next(key for key in values if key.endswith("embedding"))
    for changed, message in (
        ({**values, key: values[key][:2].clone()}, r"has shape \[2, 32\], not \[3, 32\]"),
        ({**values, key: values[key] * float("nan")}, "not finite"),
        ({k: v for k, v in values.items() if k != key}, "no value for embedding"),
    ):
        save_file(changed, file)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(make_base("llama"), tmp_path)


def test_gradients_are_the_same_with_checkpointing(prompted, rows):
    ids, mask = rows(left=False)
    labels = ids.masked_fill(mask == 0, -100)

    def gradient(checkpointing: bool) -> torch.Tensor:
        model = prompted("llama").train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss.backward()
        return prompts_of(model)["default"].embedding.grad

    plain = gradient(False)
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(gradient(True), plain)


@pytest.mark.parametrize("mlp", ["mlp1", "mlp2"])
def test_folding_the_mlp_changes_nothing_that_is_computed(mlp, make_base, rows):
    config = SoftPrompt(prompt_length=4, mlp=mlp, bottleneck=6, task_type="CAUSAL_LM")
    model = get_peft_model(make_base("llama"), config).eval()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    inner = (32 * 6 + 6) + (6 * 32 + 32 if mlp == "mlp1" else 6 * 3 + 3 + 3 * 32 + 32)
    assert trained == 4 * 32 + inner
    ids, mask = rows(left=True)
    before = model(input_ids=ids, attention_mask=mask).logits
    start = prompts_of(model)["default"].embedding.detach().clone()
    fold(model, "default")
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)
    assert not torch.equal(prompts_of(model)["default"].embedding, start)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 4 * 32


def test_what_cannot_be_is_refused_in_words(make_base, rows):
    mamba = MambaForCausalLM(MambaConfig(hidden_size=16, num_hidden_layers=1, state_size=4, vocab_size=32))
    with pytest.raises(ValueError, match="MambaForCausalLM cannot take soft prompts: MambaModel knows no past_key"):
        get_peft_model(mamba, SoftPrompt(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="need a language model of transformers, not Linear"):
        get_peft_model(torch.nn.Linear(2, 2), SoftPrompt())
    model = get_peft_model(make_base("llama"), SoftPrompt(prompt_length=2, task_type="CAUSAL_LM"))
    ids, mask = rows(left=True)
    with pytest.raises(ValueError, match="leave cache_implementation out"):
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("lora", LoRA(r=2))
    for options, message in (
        ({"prompt_length": 0}, "prompt_length must be a whole number of at least 1, not 0"),
        ({"mlp": "deep"}, "mlp must be none, mlp1 or mlp2, not 'deep'"),
        ({"lenght": 3}, "no option 'lenght'"),
    ):
        with pytest.raises(ValueError, match=message):
            SoftPrompt(**options)
    with pytest.raises(ValueError, match="there is no kind of soft prompt 'lora'; there are prompt-pool, soft-prompt"):
        PromptConfig(method="lora")

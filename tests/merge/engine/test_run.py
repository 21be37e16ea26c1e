"""Real tiny checkpoints, merged on disk and loaded by transformers, against the pure functions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from folklora.merge import average, blocks, dare_linear, slerp, task_arithmetic, ties
from folklora.merge.engine import merge_models, prepare, read_config
from folklora.merge.engine.checkpoints import Checkpoint, recorded
from folklora.merge.engine.config import Reference
from folklora.merge.engine.run import _begin, _generator, do_share


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    """The parameters of a causal model as transformers loads it."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    return {name: value.detach() for name, value in model.named_parameters()}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_task_arithmetic_of_sharded_llamas_is_the_function_of_each_tensor(llamas, tmp_path, stored, asked):
    config = asked(
        llamas, "task_arithmetic", "a", "b", base="base", parameters={"weight": 0.5, "lambda": 0.7}, dtype="float32"
    )
    out = merge_models(config, tmp_path / "out", max_shard_size="60KB")
    base, a, b = (stored(llamas / name) for name in ("base", "a", "b"))
    loaded = parameters(out)
    assert len(list(out.glob("model-*.safetensors"))) > 2
    assert loaded.keys() == base.keys()
    for name, value in loaded.items():
        expected = task_arithmetic([a[name], b[name]], base[name], weight=[0.5, 0.5], lambda_=0.7)
        assert value.dtype == torch.float32
        assert torch.equal(value, expected), name


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ram", "ties", "dare_ties"])
def test_a_large_tensor_is_merged_some_rows_at_a_time(llamas, tmp_path, asked, method, monkeypatch):
    config = asked(llamas, method, "a", "b", base="base", dtype="bfloat16")
    whole = files_of(merge_models(config, tmp_path / "whole"))
    shapes, read = [], Checkpoint.read
    monkeypatch.setattr(blocks, "ELEMENTS", 700)
    monkeypatch.setattr(Checkpoint, "read", lambda *a, **named: shapes.append(a[2:]) or read(*a, **named))
    parts = files_of(merge_models(config, tmp_path / "parts"))
    assert parts["model.safetensors"] == whole["model.safetensors"]
    assert any(rows != (None,) for rows in shapes)


def test_ties_takes_the_type_of_the_base_and_drops_a_base_that_is_listed(llamas, tmp_path, stored, asked):
    each = {"a": {"weight": 1.0, "density": 0.5}, "b": {"weight": 0.5, "density": 0.3}}
    out = merge_models(asked(llamas, "ties", "base", "a", "b", base="base", each=each), tmp_path / "out")
    base, a, b = (stored(llamas / name) for name in ("base", "a", "b"))
    for name, value in stored(out).items():
        expected = ties([a[name], b[name]], base[name], weight=[1.0, 0.5], density=[0.5, 0.3])
        assert torch.equal(value, expected.to(torch.bfloat16)), name


def test_slerp_in_mergekits_form_goes_from_the_base_with_gradients_and_filters(llamas, tmp_path, stored):
    whole = [{"model": str(llamas / name), "layer_range": [0, 3]} for name in ("base", "a")]
    t = [
        {"filter": "self_attn", "value": [0, 0.5, 1]},
        {"filter": "mlp", "value": [1, 0]},
        {"value": 0.25},
    ]
    config = {
        "slices": [{"sources": whole}], "merge_method": "slerp", "base_model": str(llamas / "base"),
        "parameters": {"t": t}, "dtype": "bfloat16",
    }  # fmt: skip
    out = merge_models(config, tmp_path / "out")
    base, a = stored(llamas / "base"), stored(llamas / "a")
    merged = stored(out)
    for layer, attention, mlp in ((0, 0.0, 1.0), (1, 0.5, 0.5), (2, 1.0, 0.0)):
        for part, at in (("self_attn.q_proj", attention), ("mlp.up_proj", mlp), ("input_layernorm", 0.25)):
            name = f"model.layers.{layer}.{part}.weight"
            assert torch.equal(merged[name], slerp([a[name]], base[name], t=at).to(torch.bfloat16)), name
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert torch.equal(merged[name], slerp([a[name]], base[name], t=0.25).to(torch.bfloat16)), name
    assert merged.keys() == base.keys()


def test_stacked_layers_are_copied_bit_for_bit_and_loaded(llamas, tmp_path, stored):
    slices = [
        {"sources": [{"model": str(llamas / "a"), "layer_range": [0, 2]}]},
        {"sources": [{"model": str(llamas / "b"), "layer_range": [1, 3]}]},
    ]
    out = merge_models({"slices": slices, "merge_method": "passthrough"}, tmp_path / "out")
    a, b, merged = stored(llamas / "a"), stored(llamas / "b"), stored(out)
    places = {0: (a, 0), 1: (a, 1), 2: (b, 1), 3: (b, 2)}
    for layer, (source, own) in places.items():
        for name, value in source.items():
            if f"layers.{own}." in name:
                assert torch.equal(merged[name.replace(f"layers.{own}.", f"layers.{layer}.")], value)
    assert torch.equal(merged["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert torch.equal(merged["lm_head.weight"], b["lm_head.weight"])
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.num_hidden_layers == 4
    assert {name for name, _ in model.named_parameters()} == set(merged)


def test_tied_gpt2_with_and_without_its_prefix_is_merged_once(tiny_tokenizer, tmp_path, stored, asked, gpt2):
    for seed, name in enumerate(("a", "b")):
        gpt2(seed).save_pretrained(tmp_path / name)
    # as the hub's gpt2 is stored
    file = tmp_path / "b" / "model.safetensors"
    save_file({name.removeprefix("transformer."): value for name, value in load_file(file).items()}, file)
    out = merge_models(asked(tmp_path, "linear", "a", "b", parameters={"weight": 1}), tmp_path / "out")
    assert "lm_head.weight" not in stored(out)
    assert set(stored(out)) == set(stored(tmp_path / "a"))
    a, b = (dict(gpt2(seed).named_parameters()) for seed in (0, 1))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.lm_head.weight is model.transformer.wte.weight
    for name, value in model.named_parameters():
        assert torch.equal(value, average([a[name], b[name]])), name


def test_t5_has_gradients_over_each_of_its_stacks(tiny_t5, tmp_path, stored, asked):
    for seed, name in enumerate(("a", "b")):
        tiny_t5(seed, num_decoder_layers=3).save_pretrained(tmp_path / name)
    each = {"a": {"weight": [1, 0]}, "b": {"weight": [0, 1]}}
    out = merge_models(asked(tmp_path, "average", "a", "b", each=each), tmp_path / "out")
    a, b = (AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).state_dict() for name in ("a", "b"))
    model = AutoModelForSeq2SeqLM.from_pretrained(out)
    places = {"encoder.block.1": 1.0, "decoder.block.1": 0.5, "decoder.block.2": 1.0}
    for name, value in model.state_dict().items():
        # the second of two layers, and the second and third of three
        t = next((t for start, t in places.items() if name.startswith(start)), 0.0)
        expected = average([a[name], b[name]], weight=[1 - t, t])
        assert torch.equal(value, expected), name
    assert model.shared.weight is model.lm_head.weight is model.decoder.embed_tokens.weight
    assert set(stored(out)) == set(stored(tmp_path / "a"))


def test_random_masks_depend_on_tensor_and_model_alone(llamas, tmp_path, stored, asked):
    each = {"a": {"density": 0.4}, "b": {"density": 0.7}}
    one = merge_models(asked(llamas, "dare_linear", "a", "b", base="base", each=each), tmp_path / "one")
    other = asked(llamas, "dare_linear", "b", "a", base="base", each=each)
    two = merge_models(other, tmp_path / "two", max_shard_size="20KB")
    for name, value in stored(two).items():
        # the order of a float32 sum may show in the last place of bfloat16
        torch.testing.assert_close(stored(one)[name], value, rtol=2**-7, atol=2**-9)
    three = merge_models(asked(llamas, "dare_linear", "a", "b", base="base", each=each), tmp_path / "three", seed=1)
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(stored(three)[name], stored(one)[name])
    base, a, b = (stored(llamas / key)[name] for key in ("base", "a", "b"))
    drawn = [_generator(1, name, Reference(str(llamas / key)), torch.device("cpu")) for key in ("a", "b")]
    expected = dare_linear([a, b], base, generator=drawn, density=[0.4, 0.7])
    assert torch.equal(stored(three)[name], expected.to(torch.bfloat16))


def test_each_of_three_processes_does_its_own_share_and_the_rest_is_done_later(llamas, tmp_path, asked):
    config = asked(llamas, "dare_ties", "a", "b", base="base", parameters={"density": 0.5})
    job = prepare(read_config(config))
    shares = [{step.name for step in job.plan.share(set(), rank, 3)} for rank in range(3)]
    assert all(shares)
    assert sum(map(len, shares)) == len(set.union(*shares)) == len(job.plan.steps)
    work = tmp_path / ".out.merging"
    _begin(job, work, overwrite=False)
    do_share(job, work, set(), 1, 3, "cpu")
    assert recorded(work) == shares[1]
    # as a kill leaves it: a record that was cut off, though it begins like another tensor's name
    with (work / "done-0.txt").open("a") as record:
        record.write('"lm_head.wei')
    seen = []
    out = merge_models(config, tmp_path / "out", progress=lambda event, **more: seen.append(more["tensors"]))
    assert seen[:2] == [len(job.plan.steps), len(shares[1])]
    assert files_of(out) == files_of(merge_models(config, tmp_path / "whole"))


def test_what_stands_beside_the_weights(llamas, tiny_tokenizer, tmp_path, stored):
    file = tmp_path / "merge.yaml"
    text = (
        f"merge_method: linear  # of two\nmodels:\n- model: {llamas / 'a'}\n  parameters: {{weight: 1}}\n"
        f"- model: {llamas / 'b'}\n  parameters: {{weight: 3e-1}}\ndtype: float16\n"
        "chat_template: '{{ messages[0].content }}'\n"
    )
    file.write_text(text)
    out = merge_models(file, tmp_path / "out")
    card = (out / "README.md").read_text()
    assert text.strip() in card
    assert str(llamas / "b") in card.partition("```yaml")[0]
    assert json.loads((out / "config.json").read_text())["dtype"] == "float16"
    read = AutoTokenizer.from_pretrained(out)
    assert read.get_vocab() == tiny_tokenizer.get_vocab()
    assert read.chat_template == "{{ messages[0].content }}"
    assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == 0
    a, b = (stored(llamas / name)["lm_head.weight"] for name in ("a", "b"))
    assert torch.equal(stored(out)["lm_head.weight"], average([a, b], weight=[1.0, 0.3]).to(torch.float16))


@pytest.mark.parametrize("device", ["gpu", "cuda:99", "meta", "cpu:x"])
def test_a_device_that_is_not_there_is_refused_before_anything_is_written(llamas, tmp_path, asked, device):
    with pytest.raises(ValueError, match=f"there is no device '{device}' here"):
        merge_models(asked(llamas, "linear", "a", "b"), tmp_path / "out", device=device)
    assert not list(tmp_path.iterdir())

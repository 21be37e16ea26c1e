"""What cannot be merged is refused in words, and nothing is left behind."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from folklora.merge.engine import merge_models


def refused(config, out, message, error=ValueError, **options):
    with pytest.raises(error, match=message):
        merge_models(config, out, **options)
    assert not out.exists()
    assert [path.name for path in out.parent.iterdir() if path.name.startswith(".")] == []


@pytest.fixture
def pair(tmp_path, gpt2):
    """Two GPT-2 in one file each, to be spoilt."""
    root = tmp_path / "models"
    for seed, name in enumerate(("a", "b")):
        gpt2(seed).save_pretrained(root / name)
    return root


def changed(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ("averagee", {}, "no merging method 'averagee'; the nearest are average"),
        ("average", {"parameters": {"weigth": 1}}, "no option 'weigth'; did you mean 'weight'"),
        ("average", {"each": {"a": {"normalize": True}}}, "'normalize' holds for the whole merge"),
        ("average", {"parameters": {"weight": "much"}}, "weight is a number, not 'much'"),
        ("average", {"each": {"a": {"weight": 1}, "b": {"weight": -1}}}, "sum to 0"),
        ("ties", {}, "give base_model"),
        ("slerp", {"base": "a"}, "'t' is missing"),
        ("passthrough", {}, "give one model"),
        ("average", {"dtype": "int8"}, "dtype is one of float32, bfloat16"),
        ("average", {"densitty": 1}, "unknown key densitty"),
        ("average", {"modules": {}}, "'modules' is not supported"),
        ("average", {"slices": [1]}, "give either models"),
    ],
)
def test_a_configuration_that_cannot_be(pair, tmp_path, method, more, message, asked):
    refused(asked(pair, method, "a", "b", **more), tmp_path / "out", message)


def test_an_unknown_model_says_how_to_fetch_it(tmp_path):
    config = {"merge_method": "average", "models": [{"model": "nobody/nothing@main"}]}
    refused(config, tmp_path / "out", "hf download nobody/nothing --revision main", FileNotFoundError)


def test_missing_tensors_are_named_three_of_them(pair, tmp_path, asked):
    names = [f"transformer.h.0.{part}" for part in ("ln_1.bias", "ln_1.weight", "ln_2.bias", "ln_2.weight")]
    changed(pair / "b", lambda tensors: [tensors.pop(name) for name in names])
    with pytest.raises(ValueError) as raised:
        merge_models(asked(pair, "average", "a", "b"), tmp_path / "out")
    lines = str(raised.value).splitlines()
    assert len(lines) == 5
    assert all(f"missing in {pair / 'b'}" in line for line in lines[1:4])
    assert lines[4] == "... and 1 more"


def test_tensors_that_no_model_class_knows_are_left_out_where_one_lacks_them(pair, tmp_path, asked):
    changed(pair / "b", lambda tensors: tensors.update({"transformer.h.0.attn.masked_bias": torch.zeros(1)}))
    seen = []
    out = merge_models(
        asked(pair, "average", "a", "b"), tmp_path / "out", progress=lambda *_, **more: seen.append(more)
    )
    assert seen[0]["left_out"] == ("h.0.attn.masked_bias",)
    assert "transformer.h.0.attn.masked_bias" not in load_file(out / "model.safetensors")


def test_integer_buffers_come_from_the_base(pair, tmp_path, asked):
    for number, name in enumerate(("a", "b")):
        kept = {"transformer.counter": torch.tensor([number])}
        changed(pair / name, lambda tensors, kept=kept: tensors.update(kept))
    out = merge_models(asked(pair, "task_arithmetic", "a", base="b"), tmp_path / "out")
    assert load_file(out / "model.safetensors")["transformer.counter"].tolist() == [1]


def test_other_shapes_other_classes_and_other_ties(pair, llamas, tmp_path, asked):
    refused(asked(pair, "average", "a", str(llamas / "b")), tmp_path / "out", "GPT2LMHeadModel in .*LlamaForCausalLM")
    shutil.copytree(pair / "b", pair / "wide")
    name = "transformer.h.0.mlp.c_fc.bias"
    changed(pair / "wide", lambda tensors: tensors.update({name: torch.zeros(7)}))
    refused(asked(pair, "average", "a", "wide"), tmp_path / "out", r"c_fc.bias is F32 \[128\] in .*F32 \[7\]")
    config = json.loads((pair / "b" / "config.json").read_text())
    (pair / "b" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    refused(asked(pair, "average", "a", "b"), tmp_path / "out", "shares weights between its embeddings and its head")


def test_nan_is_found_at_the_tensor_and_nothing_is_left(pair, tmp_path, asked):
    changed(pair / "b", lambda tensors: tensors["transformer.h.1.mlp.c_fc.weight"].view(-1)[5:6].fill_(float("nan")))
    refused(asked(pair, "average", "a", "b"), tmp_path / "out", "h.1.mlp.c_fc.weight holds NaN")


def test_a_result_beyond_the_type_that_is_stored(pair, tmp_path, asked):
    changed(pair / "a", lambda tensors: tensors["transformer.ln_f.weight"].fill_(1e6))
    config = asked(pair, "passthrough", "a", dtype="float16")
    refused(config, tmp_path / "out", "ln_f.weight: passthrough gives values that are not finite in torch.float16")


def test_pickles_quantised_and_damaged_files(pair, tmp_path, asked):
    torch.save(nn.Linear(1, 1).state_dict(), pair / "b" / "pytorch_model.bin")
    file = pair / "b" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    refused(asked(pair, "average", "a", "b"), tmp_path / "out", "its header asks for")
    file.write_bytes(b"no header")
    refused(asked(pair, "average", "a", "b"), tmp_path / "out", "is not in safetensors format")
    file.unlink()
    refused(asked(pair, "average", "a", "b"), tmp_path / "out", r"as pickles \(pytorch_model.bin\)")
    file.write_bytes(whole)
    config = json.loads((pair / "b" / "config.json").read_text())
    (pair / "b" / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))
    refused(asked(pair, "average", "a", "b"), tmp_path / "out", "is quantised")


def test_the_output_is_no_input_and_not_there(pair, tmp_path, asked):
    config = asked(pair, "average", "a", "b")
    before = sorted(path.name for path in pair.rglob("*"))
    for out in (pair / "b", pair):
        with pytest.raises(ValueError, match="holds the input"):
            merge_models(config, out, overwrite=True)
    assert sorted(path.name for path in pair.rglob("*")) == before
    (tmp_path / "out").mkdir()
    with pytest.raises(FileExistsError, match="is there already"):
        merge_models(config, tmp_path / "out")
    assert (merge_models(config, tmp_path / "out", overwrite=True) / "config.json").is_file()


def test_slices_beyond_the_layers(pair, tmp_path):
    slices = [{"sources": [{"model": str(pair / "a"), "layer_range": [1, 3]}]}]
    refused({"merge_method": "passthrough", "slices": slices}, tmp_path / "out", "has 2 layers")
    slices[0]["sources"].append({"model": str(pair / "b"), "layer_range": [0, 1]})
    refused({"merge_method": "average", "slices": slices}, tmp_path / "out", "its sources have 1 and 2 layers")

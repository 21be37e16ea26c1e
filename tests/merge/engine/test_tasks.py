"""Methods that serve one task at a time: their parts are stored once, and each task's model comes out of them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from folklora.merge import PerTask, common_scale, emr, tall, tsv_c
from folklora.merge.emr import Unified
from folklora.merge.engine import merge_models, task_tensors, write_task


def _whole_model(parts: list[PerTask]) -> list[PerTask]:
    return common_scale(parts) if isinstance(parts[0], Unified) else parts


@pytest.mark.parametrize("method", [emr, tall, tsv_c])
def test_each_task_is_served_what_the_function_gives(gpt2, asked, stored, tmp_path, method):
    for seed, name in enumerate(("base", "a", "b")):
        gpt2(seed).save_pretrained(tmp_path / name)
    base, a, b = (stored(tmp_path / name) for name in ("base", "a", "b"))
    out = merge_models(asked(tmp_path, method.__name__, "a", "b", base="base"), tmp_path / "out")
    for name, value in stored(out).items():
        assert torch.equal(value, base[name])
    across = {name for name in base if name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))}
    threes = [[x[name].T if name in across else x[name] for x in (a, b, base)] for name in base]
    parts = dict(zip(base, _whole_model([method(three[:2], three[2]) for three in threes]), strict=True))
    for task in range(2):
        served = dict(task_tensors(out, task))
        assert served.keys() == base.keys()
        for name, value in served.items():
            expected = parts[name].for_task(task)
            torch.testing.assert_close(value, expected.T if name in across else expected, rtol=0, atol=1e-6)


def test_one_tasks_model_is_a_checkpoint(llamas, asked, stored, tmp_path):
    out = merge_models(asked(llamas, "tsv_c", "a", "b", base="base"), tmp_path / "out", max_shard_size="60KB")
    assert len(list((out / "tasks").iterdir())) == len(stored(out))
    one = write_task(out, str(llamas / "b"), tmp_path / "one")
    model = AutoModelForCausalLM.from_pretrained(one)
    for name, value in model.state_dict().items():
        assert torch.equal(value, dict(task_tensors(out, 1))[name]), name
    assert not (one / "tasks.json").exists()
    with pytest.raises(ValueError, match=r"there is no task 2; there are 0 \(.*a\), 1 \(.*b\)"):
        write_task(out, 2, tmp_path / "two")
    with pytest.raises(FileNotFoundError, match=r"holds no tasks\.json"):
        write_task(one, 0, tmp_path / "two")
    assert not (tmp_path / "two").exists()


def test_slices_have_no_tasks(llamas, tmp_path):
    sources = [{"model": str(llamas / name), "layer_range": [0, 2]} for name in ("base", "a")]
    config = {"slices": [{"sources": sources}], "merge_method": "emr", "base_model": str(llamas / "base")}
    with pytest.raises(ValueError, match="gives a model for each task"):
        merge_models(config, tmp_path / "out")

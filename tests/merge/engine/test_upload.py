"""Tensors that are brought to a GPU ahead; on the CPU, as if it had its own memory."""

from __future__ import annotations

import pytest
import torch

from folklora.merge.engine import merge_models, prepare, read_config, upload
from folklora.merge.engine.upload import Uploads


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("method", ["linear", "ties", "dare_ties"])
def test_what_is_brought_ahead_is_merged_as_what_is_read(llamas, tmp_path, asked, method, monkeypatch):
    config = asked(llamas, method, "a", "b", base="base", parameters={} if method == "linear" else {"density": 0.5})
    plain = merge_models(config, tmp_path / "plain")
    given = []
    begin = Uploads._begin
    monkeypatch.setattr(Uploads, "_begin", lambda self, step: given.append(begin(self, step)) or given[-1])
    monkeypatch.setattr(upload, "_free", lambda device: 2**30)
    monkeypatch.setattr(upload, "_STAGED_ELEMENTS", 700)
    assert files_of(merge_models(config, tmp_path / "ahead")) == files_of(plain)
    assert len(given) == len(prepare(read_config(config)).plan.steps)
    assert all(given)


def test_what_is_too_large_or_wanted_whole_is_left_on_the_disk(llamas, asked, monkeypatch):
    def given(method, free):
        monkeypatch.setattr(upload, "_free", lambda device: free)
        job = prepare(read_config(asked(llamas, method, "a", "b", base="base")))
        with Uploads(job, torch.device("cpu")) as uploads:
            return {step.name: step.form.bytes for step, there in uploads.along(job.plan.steps) if there}

    everything = given("ties", 2**30)
    largest = max(everything.values())
    # three tensors of one name, of a quarter of what is free
    some = given("ties", 12 * (largest - 1))
    assert some
    assert some == {name: size for name, size in everything.items() if size < largest}
    assert not given("ties", 0)
    assert not given("tsv_m", 2**30)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "method", ["linear", "slerp", "nuslerp", "ties", "breadcrumbs", "sce", "model_stock", "karcher"]
)
def test_a_gpu_merges_as_the_cpu_does(llamas, tmp_path, asked, method, stored):
    models = ("a",) if method == "slerp" else ("a", "b")
    parameters = {"slerp": {"t": 0.3}, "ties": {"density": 0.5}, "sce": {"select_topk": 0.5}}.get(method, {})
    base = {} if method in ("linear", "karcher") else {"base": "base"}
    config = asked(llamas, method, *models, **base, parameters=parameters, dtype="float32")
    one = stored(merge_models(config, tmp_path / "one"))
    two = stored(merge_models(config, tmp_path / "two", device="cuda"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_a_gpu_draws_the_same_masks_again(llamas, tmp_path, asked, method):
    config = asked(llamas, method, "a", "b", base="base", parameters={"density": 0.5})
    one, two = (merge_models(config, tmp_path / name, device="cuda", workers=n) for n, name in ((1, "one"), (2, "two")))
    assert files_of(one)["model.safetensors"] == files_of(two)["model.safetensors"]

"""Statistics that models bring along: from a file by tensor, or from `folklora.calibrate` by layer."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from folklora.adapters.statistics import Statistics
from folklora.merge import average, fisher, regmean
from folklora.merge.engine import merge_models


def test_regmean_reads_what_calibration_wrote(gpt2, asked, stored, tmp_path):
    grams = {}
    for seed, name in enumerate(("a", "b")):
        gpt2(seed).save_pretrained(tmp_path / name)
        rows = torch.randn(40, 32, generator=torch.Generator().manual_seed(seed))
        grams[name] = rows.T @ rows
        layers = {"transformer.h.0.mlp.c_fc": {"covariance": grams[name]}}
        Statistics(layers).save(tmp_path / f"{name}.safetensors")
    each = {name: {"gram": str(tmp_path / f"{name}.safetensors")} for name in ("a", "b")}
    merged = stored(merge_models(asked(tmp_path, "regmean", "a", "b", each=each), tmp_path / "out"))
    a, b = stored(tmp_path / "a"), stored(tmp_path / "b")
    for name, value in merged.items():
        if name == "transformer.h.0.mlp.c_fc.weight":
            # stored as [in, out], merged as [out, in]
            expected = regmean([a[name].T, b[name].T], gram=[grams["a"], grams["b"]]).T
            assert not torch.allclose(value, average([a[name], b[name]]), atol=1e-3)
        else:
            expected = regmean([a[name], b[name]])
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


def test_fisher_reads_a_tensor_for_each_weight(llamas, asked, stored, tmp_path):
    values = {}
    for seed, name in enumerate(("a", "b")):
        generator = torch.Generator().manual_seed(seed)
        values[name] = {k: torch.rand(v.shape, generator=generator) for k, v in stored(llamas / name).items()}
        save_file(values[name], tmp_path / f"{name}.safetensors")
    each = {name: {"fisher": str(tmp_path / f"{name}.safetensors")} for name in values}
    config = asked(llamas, "fisher", "a", "b", each=each, dtype="float32")
    merged = stored(merge_models(config, tmp_path / "out"))
    a, b = stored(llamas / "a"), stored(llamas / "b")
    for name, value in merged.items():
        assert torch.equal(value, fisher([a[name], b[name]], fisher=[values["a"][name], values["b"][name]])), name
    values["b"].pop("model.norm.weight")
    save_file(values["b"], tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors holds no fisher for model\.norm\.weight"):
        merge_models(config, tmp_path / "other")
    config["models"][1].pop("parameters")
    with pytest.raises(ValueError, match="'fisher' is missing"):
        merge_models(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()

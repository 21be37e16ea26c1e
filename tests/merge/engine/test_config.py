"""mergekit's YAML: references, precedence, gradients and filters, and a schema that is the method's signature."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pytest
import torch
from torch import Tensor

from folklora.merge.contract import merging
from folklora.merge.engine.checkpoints import Form, split
from folklora.merge.engine.config import Reference, read_config
from folklora.merge.engine.models import Architecture, Layout
from folklora.merge.engine.plan import make_plan
from folklora.merge.engine.schema import evaluate, method_names, read_schema, schema_of


@pytest.mark.parametrize(
    ("written", "parts"),
    [
        ("org/name", ("org/name", None, None, None)),
        ("org/name@v1", ("org/name", "v1", None, None)),
        ("org/name+me/lora", ("org/name", None, "me/lora", None)),
        ("org/name@v1+me/lora@v2", ("org/name", "v1", "me/lora", "v2")),
        ({"model": {"path": "org/name", "revision": "v1"}, "lora": "me/lora"}, ("org/name", "v1", "me/lora", None)),
    ],
)
def test_references(written, parts):
    reference = Reference.parse(written)
    assert (reference.path, reference.revision, reference.adapter, reference.adapter_revision) == parts
    assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize("written", ["", "a+b+c", "a@", "a@b@c", "+b", 3, {"path": "a"}])
def test_what_is_no_reference(written):
    with pytest.raises(ValueError, match="path"):
        Reference.parse(written) if written != "a+b+c" else Reference.parse("a@+b+c")


def test_a_folder_with_a_plus_in_its_name(tmp_path):
    folder = tmp_path / "a+b@c"
    folder.mkdir()
    assert Reference.parse(str(folder)) == Reference(str(folder))


@pytest.mark.parametrize(
    ("setting", "name", "t", "value"),
    [
        (0.5, "x", 0.3, 0.5),
        ([0, 1], "x", 0.25, 0.25),
        ([0, 1, 0], "x", 0.75, 0.5),
        ([2, 4, 8], "x", 1.0, 8),
        ([{"filter": "mlp", "value": [0, 1]}, {"value": 3}], "layers.0.mlp.up", 0.5, 0.5),
        ([{"filter": "mlp", "value": [0, 1]}, {"value": 3}], "layers.0.attn", 0.5, 3),
        ([{"filter": "mlp", "value": 1}], "layers.0.attn", 0.5, None),
        ([{"filter": "*", "value": 1}, {"filter": "attn", "value": 2}], "layers.0.attn", 0.5, 1),
        ({"filter": "attn", "value": 2}, "layers.0.attn", 0.5, 2),
        (["sum", "count"], "x", 0.9, "sum"),
    ],
)
def test_settings(setting, name, t, value):
    assert evaluate(setting, name, t) == value


@merging(paper="none", trains="nothing")
def blend(
    models: Sequence[Tensor],
    base: Tensor | None = None,
    *,
    generator: Sequence[torch.Generator],
    weight: Sequence[float],
    share: Sequence[float] = (0.5,),
    lambda_: float = 1.0,
    kind: Literal["sum", "count"] = "sum",
    rank: int | None = None,
    gram: Sequence[Tensor] | None = None,
) -> Tensor:
    """Nothing that is used; it has every kind of option."""
    return models[0]


def planned(config, layers=3):
    names = [f"model.layers.{i}.{part}.weight" for i in range(layers) for part in ("attn", "mlp")] + ["model.norm"]
    architecture = Architecture("model")
    keys = {architecture.key(name): name for name in names}
    layout = Layout({key: Form("BF16", (2, 2)) for key in keys}, keys)
    read = read_config({"merge_method": "blend", **config})
    plan = make_plan(read, read_schema(blend), dict.fromkeys(read.models(), layout), architecture)
    return {step.name: step for step in plan.steps}


def test_the_signature_is_the_schema():
    schema = read_schema(blend)
    assert (schema.base, schema.generator, schema.per_task) == ("used", "generator", False)
    assert schema.written() == ["gram", "kind", "lambda", "rank", "share", "weight"]
    assert schema.each["weight"].required
    assert not schema.statistics["gram"].required
    with pytest.raises(ValueError, match="kind is 'sum', 'count', not 'sun'"):
        planned({"models": [{"model": "a"}], "parameters": {"weight": 1, "kind": "sun"}})
    with pytest.raises(ValueError, match=r"rank is a whole number or null, not 0\.5"):
        planned({"models": [{"model": "a"}], "parameters": {"weight": 1, "rank": 0.5}})
    with pytest.raises(ValueError, match=r"b: model.layers.0.attn.weight: 'weight' is missing"):
        planned({"models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}]})
    with pytest.raises(ValueError, match="'gram' is a file that each model brings"):
        planned({"models": [{"model": "a"}], "parameters": {"weight": 1, "gram": "x.safetensors"}})


def test_what_a_model_says_goes_before_what_the_merge_says():
    a = {"weight": [{"filter": "mlp", "value": [0, 1]}]}
    steps = planned(
        {
            "models": [{"model": "a", "parameters": a}, {"model": "b"}, {"model": "c", "parameters": {"weight": 7}}],
            "base_model": "c",
            "parameters": {"weight": 0.25, "share": [1, 0], "lambda": "5e-1", "int8_mask": True},
        }
    )
    for layer in range(3):
        attention, mlp = (steps[f"model.layers.{layer}.{part}.weight"] for part in ("attn", "mlp"))
        # the filter does not match, so that the merge's own value counts
        assert attention.options["weight"] == [0.25, 0.25]
        assert mlp.options["weight"] == [layer / 2, 0.25]
        assert mlp.options["share"] == [1 - layer / 2] * 2
        assert mlp.options["lambda_"] == 0.5
        assert [str(take.model) for take in mlp.models] == ["a", "b"]
        assert str(mlp.base.model) == "c"
    # outside of the layers t is 0, as in mergekit
    assert steps["model.norm"].options["share"] == [1.0, 1.0]


def test_one_layer_alone_is_the_last():
    steps = planned({"models": [{"model": "a"}], "parameters": {"weight": [0, 1]}}, layers=1)
    assert steps["model.layers.0.mlp.weight"].options["weight"] == [1.0]


def test_every_method_has_a_schema():
    assert {"average", "slerp", "task_arithmetic", "ties", "dare_ties", "passthrough"} <= set(method_names())
    for name in method_names():
        assert schema_of(name).name == schema_of(name.replace("_", "-")).name == name
    assert schema_of("linear").name == "average"


def test_files_hold_at_most_so_much_and_tensors_lie_at_multiples_of_their_size():
    forms = {
        "flags": Form("BOOL", (3,)),
        "a": Form("F32", (5,)),
        "b": Form("BF16", (40,)),
        "c": Form("F64", (1,)),
    }
    shards = split(forms, 50)
    assert [list(shard.forms) for shard in shards] == [["flags", "a"], ["b"], ["c"]]
    assert [shard.file for shard in shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    (whole,) = split(forms, 1000)
    header, begins, size = whole.layout()
    assert whole.file == "model.safetensors"
    assert len(header) % 8 == 0
    assert all(
        begins[name] % {"F64": 8, "F32": 4, "BF16": 2, "BOOL": 1}[form.dtype] == 0 for name, form in forms.items()
    )
    assert size == len(header) + 3 + 20 + 80 + 8

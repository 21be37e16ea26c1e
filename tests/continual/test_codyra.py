"""CoDyRA over a stream: thresholds over each task's steps, what is kept from task to task, runs end to end."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel

from folklora import CoDyRA, LoRA, tiny
from folklora.adapters.host.layer import updates_of
from folklora.continual import CoDyRAStream
from folklora.continual.answers import answer_of
from folklora.stream.run import Run
from folklora.stream.train import TrainSettings, train_task

TARGETS = ["q_proj", "v_proj", "down_proj"]
# six steps a task, whose three thresholds after the third sum to 0.9
STRONG = {"kappa_max": 0.6, "thresholds": 3, "r": 6}


def weights(model):
    """W + ΔW by layer, float64."""
    pairs = updates_of(model, "default")
    return {x.name: (x.get_base_layer().weight.double() + u.factors().dense().double()).detach() for x, u in pairs}


def learn_task(method, model, tokenizer, stream, index, folder):
    method.prepare(model, tokenizer, stream, index)
    settings = TrainSettings(learning_rate=0.02, epochs=2, batch_size=8, max_length=48)
    train_task(model, tokenizer, method, stream[index].train, settings, seed=index, folder=folder)


def test_each_task_has_its_thresholds_and_leaves_what_survives(tiny_llama, tiny_tokenizer, stream, tmp_path):
    torch.manual_seed(0)
    method = CoDyRAStream(CoDyRA(target_modules=list(TARGETS), **STRONG))
    model = method.start(tiny_llama(1))
    kept: dict[str, int] = {}
    for index in range(2):
        before = weights(model)
        learn_task(method, model, tiny_tokenizer, stream, index, tmp_path)
        config = model.peft_config["default"]
        for _, update in updates_of(model, "default"):
            assert update.config.steps == config.steps == 6
            assert int(update.step) == 6
            assert float(config.threshold(torch.tensor(5))) == pytest.approx(0.6)
        after, open_gates = weights(model), {x.name: int((u.w != 0).sum()) for x, u in updates_of(model, "default")}
        assert 0 < sum(open_gates.values()) < 6 * len(open_gates), "some gates are closed, not all"
        assert method.finish(model, tiny_tokenizer, stream, index) == {}
        for layer, update in updates_of(model, "default"):
            name = layer.name
            assert len(update.w) == open_gates[name]
            torch.testing.assert_close(weights(model)[name], after[name], rtol=0, atol=1e-6)
            rank = torch.linalg.matrix_rank(after[name] - before[name], atol=1e-5)
            assert rank <= open_gates[name], "a task changes a weight by as many components as survive"
            kept[name] = kept.get(name, 0) + open_gates[name]
    method.prepare(model, tiny_tokenizer, stream, 2)
    assert model.peft_config["default"].history == kept
    for layer, update in updates_of(model, "default"):
        assert len(update.w) == 6
        torch.testing.assert_close(weights(model)[layer.name], after[layer.name], rtol=0, atol=1e-6)
    trained = {name.rpartition(".")[2] for name, value in model.named_parameters() if value.requires_grad}
    assert trained == {"A", "B", "w"}
    fresh = tiny_llama(1).state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(tiny.base_parameters(model).values(), fresh, strict=True))


def test_what_is_kept_never_outgrows_the_weight(tiny_llama):
    torch.manual_seed(0)
    model = CoDyRAStream(CoDyRA(r=12, target_modules=list(TARGETS))).start(tiny_llama(1))
    method, sizes, total = CoDyRAStream(), [], {name: value.clone() for name, value in weights(model).items()}
    for task in range(6):
        for layer, update in updates_of(model, "default"):
            update.B.data.normal_(generator=torch.Generator().manual_seed(task))
            total[layer.name] += ((update.B * update.w) @ update.A).double().detach()
        method.prepare(model, None, [], task + 1)
        sizes.append(sum(p.numel() for _, u in updates_of(model, "default") for p in (u.old_A, u.old_B)))
    assert sizes[0] < sizes[1] < sizes[2] == sizes[5]
    for layer, update in updates_of(model, "default"):
        out, columns = layer.kind.shape(layer.get_base_layer())
        assert update.old_A.shape[0] == model.peft_config["default"].history[layer.name] == min(out, columns)
        # six float32 sums of products of magnitude 10
        torch.testing.assert_close(weights(model)[layer.name], total[layer.name], rtol=0, atol=1e-4)


def test_a_stopped_run_goes_on_to_the_same_results(teach, tiny_llama, tmp_path):
    options = {**STRONG, "target_modules": TARGETS}
    whole = teach("codyra", "whole", **options)
    assert teach("codyra", "stopped", stop_in=1, **options) == whole
    models = [
        PeftModel.from_pretrained(tiny_llama(1), Run.load(tmp_path / out).adapters("codyra"))
        for out in ("whole", "stopped")
    ]
    one, other = (model.state_dict() for model in models)
    assert one.keys() == other.keys()
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    left = sum(u.w.numel() for _, u in updates_of(models[0], "default"))
    assert left < 6 * 6, "closed components are not in the file"
    # what is stored is counted as it is: the two tasks' components and no closed one, and a count of steps a layer
    states = [update.state_dict() for _, update in updates_of(models[0], "default")]
    held = sum(value.numel() for state in states for key, value in state.items() if key != "base_sample")
    assert whole["stored_parameters"] == held < 2 * whole["trainable_parameters"]


def test_a_task_is_learnt_and_with_thresholds_by_a_smaller_change(tiny_llama, tiny_tokenizer, stream, tmp_path):
    def loss(model):
        with torch.no_grad():
            parts = [F.cross_entropy(*answer_of(model.eval(), tiny_tokenizer, e, 48)) for e in stream[0].train]
        return float(torch.stack(parts).mean())

    change = {}
    for kappa in (0.0, 0.6):
        torch.manual_seed(0)
        method = CoDyRAStream(CoDyRA(target_modules=list(TARGETS), **STRONG | {"kappa_max": kappa}))
        model = method.start(tiny_llama(1))
        start, before = weights(model), loss(model)
        learn_task(method, model, tiny_tokenizer, stream, 0, tmp_path)
        assert loss(model) < before - 0.05
        change[kappa] = sum(float((value - start[name]).norm()) for name, value in weights(model).items())
    assert 0 < change[0.6] < 0.8 * change[0.0]


def test_options_that_the_stream_sets_are_refused():
    with pytest.raises(ValueError, match="needs a CoDyRA adapter, not LoRA"):
        CoDyRAStream(LoRA())
    with pytest.raises(ValueError, match="leave steps out"):
        CoDyRAStream(CoDyRA(steps=40))

"""AM-LoRA's default gates: what they read of a prefix, and where they are placed."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from folklora import AMLoRA, LoRA, add_task
from folklora.adapters.am_lora import AMLoRAUpdate
from folklora.adapters.host.layer import updates_of
from folklora.stream import evaluate
from folklora.stream.evaluate import rank_labels
from folklora.stream.tokens import label_tokens, prompt_tokens

EPS32 = torch.finfo(torch.float32).eps
IN, OUT, R = 24, 20, 3
LEFT = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
MASKS = [None, LEFT, LEFT.flip(-1)]
KAPPA = 4.0
# labels of one to many tokens, more of them than one chunk of a small batch holds
LABELS = [" yes", " no", " positive", " negative", " a good film", " bad"]
PROMPTS = ["a good film\nAnswer:", "bad", "the film is one of a kind\nAnswer:", "no\nAnswer:", "yes, yes"]


class Net(nn.Module):
    """One linear layer in a model that is called as language models are."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(IN, OUT)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.q(x)


def adapted(base: nn.Module | None = None, **options: Any) -> PeftModel:
    torch.manual_seed(0)
    settings = {"r": R, "alpha": 2.0, "dropout": 0.0, "target_modules": ["q"]} | options
    return get_peft_model(base or Net(), AMLoRA(**settings))


def randomise(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name for part in (".A.", ".B.", ".gate_weight.", ".gate_bias.")):
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


def language_model(make: Any, **options: Any) -> PeftModel:
    base = make(initializer_range=0.3)
    return randomise(adapted(base, tasks=2, target_modules=["q_proj", "v_proj"], **options)).eval()


def the_update(model: PeftModel) -> AMLoRAUpdate:
    return next(updates_of(model, "default"))[1]


def inputs(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*(shape or (2, 5)), IN, generator=torch.Generator().manual_seed(seed))


def tokens(rows: int, length: int) -> Tensor:
    return torch.randint(2, 128, (rows, length), generator=torch.Generator().manual_seed(4))


def placed(means: Tensor, **options: Any) -> PeftModel:
    """A model that was taken through the tasks that read `means`, without training."""
    model = adapted(tasks=1, **options)
    for i, mean in enumerate(means):
        if i:
            add_task(model)
        the_update(model).place_gate(mean)
        the_update(model).remember(mean)
    return model


def loops(model: PeftModel, x: Tensor, mask: Tensor | None) -> Tensor:
    """The output in float64 by one prefix at a time, of gates that were never placed."""
    update, base = the_update(model), model.base_model.model.q.base_layer
    y = torch.empty(*x.shape[:2], OUT, dtype=torch.float64)
    for n, row in enumerate(x.double()):
        for p, token in enumerate(row):
            real = [row[k] for k in range(p + 1) if mask is None or mask[n, k]]
            q = sum(real) / len(real) if real else torch.zeros(IN, dtype=torch.float64)
            gates = zip(update.gate_weight, update.gate_bias, strict=True)
            powers = [(w.double() @ q + b.double()[0]).exp() for w, b in gates]
            y[n, p] = base.weight.double() @ token + base.bias.double()
            for power, A, B in zip(powers, update.A, update.B, strict=True):
                y[n, p] += power / (1 + sum(powers)) * 2.0 / R * (B.double() @ (A.double() @ token))
    return y


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual.double(), torch.as_tensor(expected).double(), rtol=0, atol=tolerance)


@pytest.mark.parametrize("mask", MASKS, ids=["no mask", "left", "right"])
@torch.no_grad()
def test_each_position_reads_the_mean_of_the_real_tokens_up_to_it(mask: Tensor | None):
    model, x = randomise(adapted(tasks=3)), inputs()
    y = model(x, attention_mask=mask)
    expected = loops(model, x, mask)
    # sums of at most 24 terms, nested three times
    close(y, expected, 100 * EPS32 * float(expected.abs().max()))
    for position in range(5):
        later, earlier = x.clone(), x.clone()
        later[:, position + 1 :] += 1
        earlier[:, :position] += 1
        assert torch.equal(model(later, attention_mask=mask)[:, : position + 1], y[:, : position + 1])
        seen = position > 0
        assert torch.equal(model(earlier, attention_mask=mask)[0, position], y[0, position]) != seen
    if mask is not None:
        other = torch.where(mask.bool().unsqueeze(-1), x, 7.0)
        assert torch.equal(model(other, attention_mask=mask)[mask.bool()], y[mask.bool()])


@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_generating_with_a_cache_equals_reading_all_again(tiny_llama: Any, training: bool):
    model = language_model(tiny_llama).train(training)
    call = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ids, mask = tokens(2, 5), LEFT
    cached, whole = (model.generate(input_ids=ids, attention_mask=mask, use_cache=use, **call) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    close(torch.stack(cached.logits), torch.stack(whole.logits))
    # what the first pass read counts: without it the second token's logits are others
    token = language_model(tiny_llama, granularity="token").generate(input_ids=ids, attention_mask=mask, **call)
    assert (torch.stack(token.logits)[0] - cached.logits[0]).abs().max() > 1e-2


@pytest.mark.parametrize(("rows", "length"), [(2, 4), (3, 6)])
@torch.no_grad()
def test_a_cache_of_another_pass_is_refused(tiny_llama: Any, rows: int, length: int):
    model = language_model(tiny_llama)
    first = model(input_ids=tokens(2, 6), use_cache=True)
    model(input_ids=tokens(rows, length))
    with pytest.raises(RuntimeError, match=r"this cache does not continue the last pass.*use_cache=False"):
        model(input_ids=tokens(2, 1), past_key_values=first.past_key_values)


def test_beams_are_refused_with_a_cache_and_work_without(tiny_llama: Any):
    model = language_model(tiny_llama).eval()
    ids = tokens(2, 5)
    with pytest.raises(ValueError, match="beam search"):
        model.generate(input_ids=ids, num_beams=2, max_new_tokens=3, do_sample=False)
    assert model.generate(input_ids=ids, num_beams=2, max_new_tokens=3, do_sample=False, use_cache=False).shape[0] == 2


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_labels_continue_from_the_cache_as_if_all_were_read_again(tiny_llama, tiny_tokenizer, batch_size: int):
    model = language_model(tiny_llama)
    reader = evaluate._Reader.of(model, tiny_tokenizer)
    assert reader.continues
    endings = label_tokens(tiny_tokenizer, LABELS)
    questions = prompt_tokens(tiny_tokenizer, PROMPTS, 500, encoder_decoder=False)
    assert len(list(evaluate._pairs(batch_size, endings, evaluate._LABELS_A_PROMPT * batch_size))) > 1
    with torch.inference_mode():
        expected = evaluate._score_rows(reader, questions, endings, 4)
    scores = rank_labels(model, tiny_tokenizer, PROMPTS, LABELS, batch_size=batch_size)
    # sums of up to 12 log-likelihoods of some 10 nats
    close(scores, expected, 1e-3)


def test_an_adapter_that_is_not_in_use_does_not_disturb_ranking(tiny_llama: Any, tiny_tokenizer: Any):
    model = language_model(tiny_llama)
    rank_labels(model, tiny_tokenizer, PROMPTS[:1], LABELS)
    model.add_adapter("second", LoRA(r=R, target_modules=["q_proj"]))
    model.set_adapter("second")
    plain = rank_labels(tiny_llama(initializer_range=0.3), tiny_tokenizer, PROMPTS, LABELS)
    close(rank_labels(model, tiny_tokenizer, PROMPTS, LABELS), plain, 1e-3)


OPTIONS = [{}, {"temperature": 2.0}, {"score_activation": "tanh"}, {"gate_input": "both"}, {"confidence": 2.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@torch.no_grad()
def test_a_gate_is_placed_above_the_earlier_ones_at_its_mean_and_low_at_theirs(options: dict[str, Any]):
    means, kappa = inputs(4) + 1, options.get("confidence", KAPPA)
    for count in range(1, 5):
        update = the_update(placed(means[:count], **options))
        own = update.scores(means[count - 1])
        close(own[-1], kappa + (float(own[:-1].clamp_min(0).max()) if count > 1 else 0))
        for earlier in means[: count - 1]:
            close(update.scores(earlier)[-1], -kappa)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
@torch.no_grad()
def test_whatever_a_gate_learns_it_stays_at_its_bias_where_earlier_tasks_are_read(options: dict[str, Any]):
    means = inputs(4) + 1
    update = the_update(placed(means, **options))
    for w, b in zip(update.gate_weight, update.gate_bias, strict=True):
        w.normal_(std=3.0)
        b.normal_()
    for slot in range(1, 4):
        scores = torch.stack([update.scores(mean)[slot] for mean in means])
        close(scores[:slot], update.gate_bias[slot].expand(slot))
        assert (scores[slot] - update.gate_bias[slot]).abs() > 1e-2


def test_what_reads_the_same_as_an_earlier_task_gets_a_finite_gate():
    mean = inputs(1)[0]
    model = placed(torch.stack([mean, mean]))
    optimizer = torch.optim.SGD(the_update(model).parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        model(mean.expand(2, 5, IN)).square().mean().backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    assert the_update(model).scores(mean).abs().max() < 10 * KAPPA


@torch.no_grad()
def test_three_tasks_with_orthogonal_readings_go_to_their_own_loras():
    means = 3 * torch.linalg.qr(inputs(IN)).Q[:3]
    update = the_update(placed(means))
    for task, mean in enumerate(means):
        share = torch.softmax(torch.cat([torch.zeros(1), update.scores(mean)]), dim=0)[1:]
        assert share[task] > 0.9
        assert (share[task + 1 :] < 0.05).all()


def test_gates_that_were_never_placed_start_at_zero_and_train():
    model = adapted(tasks=2)
    update = the_update(model)
    assert (update.scores(inputs()) == 0).all()
    optimizer = torch.optim.AdamW(update.parameters(), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (model(inputs()) - 1).square().mean().backward()
        optimizer.step()
    scores = update.scores(inputs())
    assert (scores[..., 0] == 0).all()
    assert scores[..., 1].abs().max() > 1e-3


def test_places_are_stored_and_never_trained():
    model = placed(inputs(2))
    update = the_update(model)
    trainable, everything = model.get_nb_trainable_parameters()
    assert trainable == R * (IN + OUT) + IN + 1 == model.peft_config["default"].trainable_count((OUT, IN))
    _, without = adapted(tasks=2, gate_init="zero").get_nb_trainable_parameters()
    assert everything - without == 2 * (IN + 1)
    places = [*update.known, *update.distance]
    assert not any(place.requires_grad for place in places)
    before, gate = copy.deepcopy(places), update.gate_weight[1].detach().clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        (model(inputs()) - 1).square().mean().backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, places, strict=True))
    assert not torch.equal(gate, update.gate_weight[1])


def test_places_survive_saving_and_a_later_task_is_placed_alike(tmp_path: Path):
    means = inputs(4)
    model = placed(means[:3])
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(Net(), tmp_path, is_trainable=True)
    ours, theirs = the_update(model), the_update(loaded)
    for name in ("known", "distance"):
        assert all(torch.equal(a, b) for a, b in zip(getattr(ours, name), getattr(theirs, name), strict=True))
    for carrier in (model, loaded):
        add_task(carrier)
        the_update(carrier).place_gate(means[3])
    assert torch.equal(ours.scores(means), theirs.scores(means))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_a_model_that_has_read_can_be_copied(tiny_llama: Any, again: Any, guard: Any):
    model, ids = language_model(tiny_llama), tokens(2, 6)
    with guard():
        expected = model(input_ids=ids, use_cache=True).logits
    assert all(update.past is not None for _, update in updates_of(model, "default"))
    assert torch.equal(again(model)(input_ids=ids).logits, expected)


def test_of_a_pass_no_more_is_kept_than_its_last_position(tiny_llama: Any):
    model = language_model(tiny_llama)
    model(input_ids=tokens(2, 9), use_cache=True)
    for _, update in updates_of(model, "default"):
        assert [part.shape for part in update.past] == [(2, 1, 2), (2, 1, 1)]
        assert all(part.untyped_storage().nbytes() == part.nbytes for part in update.past)


def test_a_gate_that_reads_no_input_cannot_be_placed_by_it():
    with pytest.raises(ValueError, match='gate_init="prototype" places a gate by the layer\'s input'):
        AMLoRA(gate_input="lora", gate_init="prototype")
    literal, default = AMLoRA(gate_input="lora"), AMLoRA()
    assert (literal.granularity, literal.gate_init) == ("token", "linear")
    assert (default.granularity, default.gate_init) == ("prefix", "prototype")

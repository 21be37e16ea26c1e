"""SLM: keys and their training, the retrieval by brute force, what training leaves alone, runs end to end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor
from transformers import BertConfig, BertModel

from folklora import LoRA
from folklora.adapters.host.layer import layers_of, updates_of
from folklora.continual import SLM
from folklora.encoders import BaseEncoder, SentenceEncoder, prompt_mask
from folklora.stream.evaluate import rank_labels
from folklora.stream.tokens import encode
from folklora.stream.train import TrainSettings, train_task

SMALL = {"keys_per_task": 2, "top_k": 2, "key_steps": 40}


def with_pool(keys: Tensor, ranges: list[tuple[int, int]] | None = None, **options: Any) -> SLM:
    """A method that has learnt these keys."""
    method = SLM(**options)
    method._keys, method._ranges = keys, ranges or [(0, len(keys))]
    method.route(None, 0, len(method._ranges))
    return method


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(count: int, spread: float = 0.3) -> Tensor:
    """Queries [count · 20, 24] around as many centres."""
    centres = normal(count, 24, seed=5)
    return (centres.repeat_interleave(20, 0) + spread * normal(count * 20, 24, seed=6)).float()


@pytest.mark.parametrize("width", [24, 32])
def test_new_keys_are_orthonormal_in_every_group_even_where_groups_do_not_divide(width: int) -> None:
    method = SLM(groups=6)
    parts = method.new_keys(width).detach().tensor_split(6, dim=1)
    assert sum(part.shape[1] for part in parts) == width
    for part in parts:
        torch.testing.assert_close(part @ part.T, torch.eye(4), rtol=0, atol=1e-6)


def test_weights_are_the_ones_of_a_sum_over_groups_and_keys() -> None:
    keys, queries = normal(7, 20).abs(), normal(5, 20, seed=1).abs()
    found = with_pool(keys, groups=3, top_k=3).weights(queries)
    for row, q in enumerate(queries.double()):
        scores = []
        for k in keys.double():
            parts = [(q[a:b] @ k[a:b]) / (q[a:b].norm() * k[a:b].norm()) for a, b in ((0, 7), (7, 14), (14, 20))]
            scores.append(float(sum(parts)) / 3)
        best = sorted(range(7), key=lambda p: -scores[p])[:3]
        expected = [scores[p] / sum(scores[i] for i in best) if p in best else 0.0 for p in range(7)]
        assert found[row].tolist() == pytest.approx(expected, abs=1e-6)
    assert found.sum(1).tolist() == pytest.approx([1.0] * 5, abs=1e-6)


def test_a_query_equal_to_a_key_ranks_it_first_and_one_against_all_keys_gets_nothing() -> None:
    keys = normal(6, 24)
    method = with_pool(keys, top_k=2)
    assert method.weights(keys).argmax(1).tolist() == list(range(6))
    assert torch.equal(with_pool(keys[:1]).weights(-keys[:1]), torch.zeros(1, 1))


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_keys_outside_the_pool_are_never_chosen_even_where_fewer_than_k_are_inside(temperature: float | None) -> None:
    keys = normal(6, 24).abs()
    method = with_pool(keys, [(0, 4), (4, 6)], top_k=4, temperature=temperature)
    assert (method.weights(keys)[:, 4:].sum(1) > 0).any()
    method._open = [1]
    weights = method.weights(keys)
    assert torch.equal(weights[:, :4], torch.zeros(6, 4))
    assert (weights[:, 4:] > 0).all()
    assert weights.sum(1).tolist() == pytest.approx([1.0] * 6, abs=1e-6)


def test_temperature_is_a_softmax_over_the_keys_of_each_group() -> None:
    keys, queries = normal(5, 24), normal(3, 24, seed=2)
    method = with_pool(keys, temperature=0.1, groups=4, top_k=5)
    parts = zip(queries.split(6, 1), keys.split(6, 1), strict=True)
    cosines = torch.stack([F.normalize(q, dim=1) @ F.normalize(k, dim=1).T for q, k in parts])
    torch.testing.assert_close(method.weights(queries), (cosines / 0.1).softmax(-1).mean(0), rtol=1e-5, atol=1e-6)


def test_a_batch_of_one_text_retrieves_as_each_of_its_rows_does() -> None:
    keys, queries = normal(6, 24), normal(3, 24, seed=1)
    rows, batch = with_pool(keys, top_k=2), with_pool(keys, top_k=2, per_sample=False)
    same = queries[:1].expand(4, -1)
    torch.testing.assert_close(batch.weights(same).expand(4, -1), rows.weights(same))
    assert batch.weights(queries).shape == (1, 6)
    assert not torch.allclose(batch.weights(queries), rows.weights(queries)[:1])


def test_learning_keys_draws_them_to_their_task() -> None:
    method, queries = SLM(groups=4, top_k=2, key_steps=300), clusters(2)
    torch.manual_seed(0)
    keys = method.new_keys(24)
    losses = method.learn_keys(keys, queries)
    assert all(-1 - 1e-6 <= loss <= 1 + 1e-6 for loss in losses)
    assert sum(losses[-10:]) / 10 < sum(losses[:10]) / 10 - 0.3
    # a second task elsewhere: of both pools the own keys are the nearest
    other, strange = method.new_keys(24), clusters(4)[40:]
    method.learn_keys(other, strange)
    pool = with_pool(torch.cat([keys, other]).detach(), groups=4, top_k=2)
    assert (pool.weights(queries).argmax(1) < 4).all()
    assert (pool.weights(strange).argmax(1) >= 4).all()


def test_keys_left_out_at_random_are_not_drawn() -> None:
    keys = normal(4, 24).requires_grad_()
    queries = SLM(groups=1).grouped(normal(1, 24, seed=1))
    gone = 0
    for seed in range(20):
        torch.manual_seed(seed)
        left_out = torch.rand(1, 1, 4) < 0.5
        torch.manual_seed(seed)
        loss = SLM(groups=1, top_k=4, key_dropout=0.5).key_loss(keys, queries)
        (gradient,) = torch.autograd.grad(loss, keys)
        drawn = gradient.abs().sum(1) > 0
        assert torch.equal(drawn, ~left_out[0, 0])
        cosines = F.cosine_similarity(queries[0], keys)
        expected = -cosines[drawn].mean() if drawn.any() else torch.zeros(())
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        gone += int(left_out.sum())
    assert 0 < gone < 80


def begun(model: Any, tokenizer: Any, stream: Any, count: int = 1, **options: Any) -> tuple[SLM, Any]:
    """The model ready for task number `count` - 1, the values of earlier ones drawn at random."""
    torch.manual_seed(0)
    config = LoRA(r=3, alpha=3.0, target_modules=["o_proj"], dropout=0.0)
    method = SLM(adapter=config, **{"key_steps": 40} | options)
    adapted = method.start(model)
    for index in range(count):
        method.prepare(adapted, tokenizer, stream, index)
        if index < count - 1:
            for name in method.names(index):
                for _, update in updates_of(adapted, name):
                    update.B.data.normal_()
    return method, adapted


def batch(tokenizer: Any, prompts: list[str]) -> dict[str, Tensor]:
    return dict(tokenizer(prompts, padding=True, return_tensors="pt"))


def test_a_task_begins_with_the_function_before_and_trains_its_own_values(tiny_llama, tiny_tokenizer, stream) -> None:
    method, model = begun(tiny_llama(), tiny_tokenizer, stream)
    inputs = batch(tiny_tokenizer, [e.prompt for e in stream[0].train[:3]])
    torch.testing.assert_close(model(**inputs).logits, tiny_llama()(**inputs).logits, rtol=0, atol=1e-6)
    # |range| · 2 L r d
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == 4 * 2 * 2 * 3 * 32
    assert method.finish(model, tiny_tokenizer, stream, 0)["keys"].shape == (4, 32)


def test_the_layers_add_what_retrieval_says(tiny_llama, tiny_tokenizer, stream) -> None:
    method, model = begun(tiny_llama(), tiny_tokenizer, [*stream, stream[0]], count=3)
    method.route(model, 0, 2)
    inputs = batch(tiny_tokenizer, [stream[0].test[0].prompt, stream[1].test[1].prompt])
    layer = next(layers_of(model))
    seen: list[tuple[Tensor, Tensor]] = []
    layer.register_forward_hook(lambda layer, inputs, output: seen.append((inputs[0], output)))
    weights = method.weights(BaseEncoder(model.get_base_model())(inputs))
    model.eval()(**inputs)
    assert weights.shape == (2, 12)
    assert (weights[:, :8].sum(1) - 1).abs().max() < 1e-6
    # the first pass reads the base for the query
    x, y = seen[-1]
    names = [name for task in range(3) for name in method.names(task)]
    D = torch.stack([layer.folklora_updates[name].factors().dense() for name in names])
    for row in range(2):
        expected = F.linear(x[row], layer.get_base_layer().weight + torch.einsum("p,poi->oi", weights[row], D))
        torch.testing.assert_close(y[row], expected, rtol=1e-5, atol=1e-5)


def test_queries_are_means_of_the_bases_last_states_over_the_prompt_alone(tiny_llama, tiny_tokenizer, stream) -> None:
    _, model = begun(tiny_llama(), tiny_tokenizer, stream, count=2)
    examples = [stream[0].train[0], stream[1].train[1]]
    encoder, expected = BaseEncoder(model.get_base_model()), []
    for example in examples:
        ids = torch.tensor([tiny_tokenizer(example.prompt)["input_ids"]])
        expected.append(tiny_llama()(ids, output_hidden_states=True).hidden_states[-1][0].mean(0))
    inputs = batch(tiny_tokenizer, [example.prompt for example in examples])
    torch.testing.assert_close(encoder(inputs), torch.stack(expected), rtol=1e-5, atol=1e-5)
    # in training the answers follow, and are not read
    rows = [encode(tiny_tokenizer, example, 48) for example in examples]
    longest = max(len(row["input_ids"]) for row in rows)
    fill = lambda key, value: torch.tensor([r[key] + [value] * (longest - len(r[key])) for r in rows])  # noqa: E731
    labels, ids = fill("labels", -100), fill("input_ids", 1)
    inputs = {"input_ids": ids, "attention_mask": (ids != 1).long(), "labels": labels}
    assert prompt_mask(inputs).sum(1).tolist() == [len(tiny_tokenizer(e.prompt)["input_ids"]) for e in examples]
    torch.testing.assert_close(encoder(inputs), torch.stack(expected), rtol=1e-5, atol=1e-5)
    everything = {**inputs, "labels": ids}
    assert torch.equal(prompt_mask(everything), inputs["attention_mask"].float()), "plain text is all prompt"


@pytest.mark.parametrize("pool", ["task", "all"])
def test_training_a_task_leaves_all_else_bit_identical(pool, tiny_llama, tiny_tokenizer, stream, tmp_path) -> None:
    method, model = begun(tiny_llama(), tiny_tokenizer, stream, count=2, training_pool=pool)
    before = {key: value.clone() for key, value in model.named_parameters()}
    keys = method._keys.clone()
    settings = TrainSettings(learning_rate=0.01, epochs=2, batch_size=8, max_length=48, weight_decay=0.1)
    train_task(model, tiny_tokenizer, method, stream[1].train, settings, seed=0, folder=tmp_path)
    changed = {key for key, value in model.named_parameters() if not torch.equal(value, before[key])}
    own = {key for key in before if "task_1_key" in key and not key.endswith("base_sample")}
    # among all keys, one that no prompt of the task retrieves learns nothing
    assert changed == own if pool == "task" else changed and changed <= own
    assert torch.equal(method._keys, keys)


def test_it_learns_both_tasks_and_each_prompt_finds_its_own(teach, tiny_llama) -> None:
    method = SLM(adapter=LoRA(r=2, alpha=8.0, target_modules=["v_proj", "down_proj"]), **SMALL)
    # a model whose weights are not all small learns from its last layers alone
    entry = teach(method, "run", model=tiny_llama(1, initializer_range=0.2), epochs=8)
    assert all(entry["matrix"][1][j] >= entry["start"][j] + 25 for j in (0, 1))
    assert entry["matrix"][1][0] == entry["matrix"][0][0], "nothing is forgotten"
    seen = entry["attention"]
    assert seen["retrieved"] == [100.0, 100.0]
    assert all(seen["mean"][j][0][j + 1] > 0.9 for j in (0, 1))
    # 4 keys, and where each task's begin and end
    assert entry["stored_parameters"] == 2 * entry["trainable_parameters"] + 4 * 32 + 4


@pytest.fixture
def sentence_encoder(tiny_tokenizer, tmp_path) -> str:
    torch.manual_seed(0)
    sizes = {"hidden_size": 36, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    BertModel(BertConfig(vocab_size=128, **sizes)).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer.save_pretrained(tmp_path / "encoder")
    return str(tmp_path / "encoder")


def test_a_stopped_run_goes_on_to_the_same_results(teach) -> None:
    method = SLM(adapter=LoRA(r=2), **SMALL)
    assert teach(method, "stopped", stop_in=1, epochs=1) == teach(method, "whole", epochs=1)


def test_a_named_sentence_encoder_reads_the_prompts_text(teach, sentence_encoder, tiny_tokenizer, stream) -> None:
    options = {"encoder": sentence_encoder, "training_pool": "all", "per_sample": False}
    method = SLM(adapter=LoRA(r=2), **SMALL, **options)
    entry = teach(method, "run", stop_in=1, epochs=1)
    assert entry["stored_parameters"] == 2 * entry["trainable_parameters"] + 4 * 36 + 4
    # the texts, and not the model's tokens or its padding
    encoder = SentenceEncoder(sentence_encoder, torch.device("cpu"))
    prompts = [example.prompt for example in stream[0].train[:3]]
    found = encoder(batch(tiny_tokenizer, prompts), tiny_tokenizer)
    for row, prompt in zip(found, prompts, strict=True):
        read = encoder.tokenizer(prompt, return_tensors="pt")
        torch.testing.assert_close(row, encoder.model(**read)[0][0].mean(0), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="reads text: call the model with input_ids"):
        encoder({"inputs_embeds": torch.zeros(1, 2, 3)})


def test_an_encoder_decoder_retrieves_by_what_its_encoder_reads(teach, tiny_t5) -> None:
    method = SLM(adapter=LoRA(r=2, target_modules=["q", "v"]), **SMALL | {"key_steps": 200})
    entry = teach(method, "t5", model=tiny_t5(1), epochs=1)
    assert min(entry["attention"]["retrieved"]) > 50
    assert entry["losses"][-1]["loss"] < entry["losses"][3]["loss"]


def test_a_prompt_is_explained_by_what_answers_it(tiny_llama, tiny_tokenizer, stream) -> None:
    method, model = begun(tiny_llama(), tiny_tokenizer, stream, count=2, key_steps=300)
    method.route(model, 0, 2)
    prompts = [stream[0].test[0].prompt, stream[1].test[0].prompt]
    found = method.explain(model, tiny_tokenizer, prompts, ["xx", "yy"])
    assert found["slots"] == ["none", "xx", "yy"]
    weights = method.weights(BaseEncoder(model.get_base_model())(batch(tiny_tokenizer, prompts)))
    for row, parts in zip(found["weights"], weights, strict=True):
        assert row[0][1:] == pytest.approx([float(parts[:4].sum()), float(parts[4:].sum())], abs=2e-6)
        assert sum(row[0]) == pytest.approx(1, abs=3e-6)
    # what it says is what answers: without the other task's values the answer is the same
    assert found["weights"][0][0][1] == pytest.approx(1, abs=2e-6)
    kept = rank_labels(model, tiny_tokenizer, prompts[:1], [" yes", " no"])
    for name in method.names(1):
        for _, update in updates_of(model, name):
            update.B.data.normal_()
    assert torch.equal(rank_labels(model, tiny_tokenizer, prompts[:1], [" yes", " no"]), kept)


def test_what_cannot_be_is_refused_before_training(teach, tiny_llama, tmp_path) -> None:
    with pytest.raises(
        ValueError, match="groups of 2, too narrow for keys_per_task=4 orthogonal keys; choose groups=8 or fewer"
    ):
        teach(SLM(adapter=LoRA(r=2), groups=16), "run")
    with pytest.raises(OSError, match="nowhere"):
        teach(SLM(adapter=LoRA(r=2), encoder=str(tmp_path / "nowhere")), "run")
    with pytest.raises(ValueError, match="mixes adapters row by row, which LoraConfig cannot"):
        SLM(adapter=LoraConfig(r=2)).start(tiny_llama())
    assert not (tmp_path / "run").exists()
    for name, value in {"keys_per_task": 0, "top_k": 0, "key_dropout": 1.0, "temperature": 0.0}.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            SLM(**{name: value})
    with pytest.raises(ValueError, match="training_pool must be task or all, not 'both'"):
        SLM(training_pool="both")

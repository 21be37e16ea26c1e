"""ProgPrompt: PEFT's prompt tuning for one task, older prompts that never change, runs end to end."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel, PromptTuningConfig, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from folklora import LoRA, learn
from folklora.continual import ProgPrompt
from folklora.prompts import PromptPool, SoftPrompt, prompts_of
from folklora.stream.evaluate import evaluate, rank_labels
from folklora.stream.tokens import IGNORED, encode
from folklora.stream.train import TrainSettings, train_task

OPTIONS = {"r": None, "dropout": None, "prompt_length": 3, "learning_rate": 0.3}


def batch(two_sided: bool) -> dict[str, torch.Tensor]:
    """Right-padded rows, as PEFT's own prompt tuning needs them."""
    ids = torch.randint(2, 128, (3, 7), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :2] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels[:, 2:].contiguous() if two_sided else labels}


@pytest.mark.parametrize("two_sided", [False, True])
def test_one_task_is_prompt_tuning_as_peft_does_it(two_sided, tiny_llama, tiny_t5, tiny_tokenizer, stream):
    def base():
        return tiny_t5(1) if two_sided else tiny_llama(1)

    method = ProgPrompt(SoftPrompt(prompt_length=3))
    ours = method.start(base())
    method.prepare(ours, tiny_tokenizer, stream, 0)
    kind = "SEQ_2_SEQ_LM" if two_sided else "CAUSAL_LM"
    config = PromptTuningConfig(num_virtual_tokens=3, task_type=kind, num_transformer_submodules=1)
    theirs = get_peft_model(base(), config)
    mine, other = prompts_of(ours)["task_0"].embedding, theirs.prompt_encoder["default"].embedding.weight
    other.data.copy_(mine)
    inputs = batch(two_sided)
    for model in (ours, theirs):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.3)
        for _ in range(3):
            optimizer.zero_grad()
            model.eval()(**inputs).loss.backward()
            optimizer.step()
    torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
    found, expected = (model(**inputs) for model in (ours, theirs))
    torch.testing.assert_close(found.logits, expected.logits[:, -found.logits.shape[1] :], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-4, atol=1e-4)


def test_the_stream_trains_and_scores_as_a_plain_loop_over_pefts_prompt_tuning(
    tiny_llama, tiny_tokenizer, stream, tmp_path
):
    method, rows = ProgPrompt(SoftPrompt(prompt_length=3)), stream[1].train
    ours = method.start(tiny_llama(1))
    method.prepare(ours, tiny_tokenizer, stream[1:], 0)
    theirs = get_peft_model(tiny_llama(1), PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    mine, other = prompts_of(ours)["task_0"].embedding, theirs.prompt_encoder["default"].embedding.weight
    other.data.copy_(mine)
    settings = TrainSettings(learning_rate=0.1, epochs=4, batch_size=len(rows), max_length=48)
    losses = train_task(ours, tiny_tokenizer, method, rows, settings, seed=0, folder=tmp_path)
    encoded = [encode(tiny_tokenizer, example, 48) for example in rows]
    batch = {
        key: pad_sequence([torch.tensor(row[key]) for row in encoded], batch_first=True, padding_value=blank)
        for key, blank in (("input_ids", 1), ("labels", IGNORED))
    }
    batch["attention_mask"] = batch["input_ids"].ne(1).long()
    optimizer = torch.optim.AdamW([other], lr=0.1, weight_decay=0.0)
    for point in losses:
        loss = theirs(**batch).loss
        assert point["loss"] == pytest.approx(loss.item(), abs=1e-4)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([other], 1.0)
        optimizer.step()
    assert len(losses) == 4
    torch.testing.assert_close(mine, other, rtol=1e-3, atol=1e-3)
    asked = [example.prompt for example in stream[1].test]
    found, expected = (rank_labels(model, tiny_tokenizer, asked, stream[1].labels) for model in (ours, theirs))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_the_stream_trains_a_late_prompt_before_its_questions_last_token(tiny_llama, tiny_tokenizer, stream, tmp_path):
    method, rows = ProgPrompt(SoftPrompt(prompt_length=3, place="answer")), stream[1].train
    model = method.start(tiny_llama(1))
    method.prepare(model, tiny_tokenizer, stream[1:], 0)
    tokens, base = [70, 71, 72], tiny_llama(1)
    prompts_of(model)["task_0"].embedding.data.copy_(base.get_input_embeddings()(torch.tensor(tokens)))
    settings = TrainSettings(learning_rate=1e-9, epochs=1, batch_size=len(rows), max_length=48)
    (point,) = train_task(model, tiny_tokenizer, method, rows, settings, seed=0, folder=tmp_path)
    losses = []
    for example in rows:
        row = encode(tiny_tokenizer, example, 48)
        ids, asked = row["input_ids"], row["labels"].count(IGNORED)
        logits = base(input_ids=torch.tensor([[*ids[: asked - 1], *tokens, *ids[asked - 1 :]]])).logits[0]
        losses.append(cross_entropy(logits[asked + 2 : -1], torch.tensor(row["labels"][asked:]), reduction="none"))
    assert point["loss"] == pytest.approx(torch.cat(losses).mean().item(), abs=1e-4)


def test_a_prompt_over_a_bfloat16_base_is_trained_in_float32(tiny_llama, tiny_tokenizer, stream, tmp_path):
    method = ProgPrompt(SoftPrompt(prompt_length=3))
    model = method.start(tiny_llama(1).to(torch.bfloat16))
    method.prepare(model, tiny_tokenizer, stream, 0)
    prompt = prompts_of(model)["task_0"].embedding
    before = prompt.detach().clone()
    # far below the spacing of bfloat16 numbers of an embedding's size
    settings = TrainSettings(learning_rate=1e-6, batch_size=24, max_length=48)
    train_task(model, tiny_tokenizer, method, stream[0].train, settings, seed=0, folder=tmp_path)
    assert prompt.dtype == torch.float32
    assert (prompt - before).abs().median().item() == pytest.approx(1e-6, rel=0.1)
    model.save_pretrained(tmp_path / "saved")
    base = tiny_llama(1).to(torch.bfloat16)
    again = PeftModel.from_pretrained(base, tmp_path / "saved" / "task_0", adapter_name="task_0", is_trainable=True)
    assert torch.equal(prompts_of(again)["task_0"].embedding, prompt)


def test_a_new_prompt_stands_first_and_alone_is_trained(tiny_llama, tiny_tokenizer, stream, tmp_path):
    method = ProgPrompt(SoftPrompt(prompt_length=3))
    model = method.start(tiny_llama(1))
    settings = TrainSettings(learning_rate=0.3, epochs=2, batch_size=8, max_length=48)
    base = {name: value.clone() for name, value in tiny_llama(1).state_dict().items()}
    answers, first = {}, None
    for index in range(2):
        method.prepare(model, tiny_tokenizer, stream, index)
        trained = [value for value in model.parameters() if value.requires_grad]
        assert sum(value.numel() for value in trained) == 3 * 32
        before = trained[0].detach().clone()
        train_task(model, tiny_tokenizer, method, stream[index].train, settings, seed=1, folder=tmp_path)
        assert not torch.equal(trained[0], before)
        assert method.finish(model, tiny_tokenizer, stream, index) == {}
        method.route(model, 0, index + 1)
        answers[index] = model.eval()(torch.arange(40, 46)[None]).logits
        first = prompts_of(model)["task_0"].embedding.detach().clone() if first is None else first
    assert torch.equal(answers[0], answers[1]), "task 0 is answered as it was"
    assert torch.equal(prompts_of(model)["task_0"].embedding, first)
    inner = model.get_base_model().state_dict()
    assert all(torch.equal(inner[name], value) for name, value in base.items())
    # [P_2; P_1; x] and t L_p + n positions
    method.route(model, 1, 2)
    ids = torch.arange(40, 46)[None]
    both = [prompts_of(model)[name].embedding for name in ("task_1", "task_0")]
    whole = torch.cat([*both, model.get_input_embeddings()(ids)[0]])[None]
    output = model(ids, use_cache=True)
    assert output.past_key_values.get_seq_length() == 2 * 3 + 6
    expected = tiny_llama(1)(inputs_embeds=whole).logits[:, 6:]
    torch.testing.assert_close(output.logits, expected, rtol=1e-4, atol=1e-5)
    # what was not learnt yet is answered by the base
    method.route(model, 2, 2)
    assert torch.equal(model(ids).logits, tiny_llama(1)(ids).logits)


def test_a_stopped_run_goes_on_to_the_same_results_and_stores_prompts_alone(teach, tmp_path):
    options = {**OPTIONS, "mlp": "mlp1", "bottleneck": 5, "learning_rate": 0.05, "epochs": 1, "place": "answer"}
    whole = teach("progprompt", "whole", **options)
    assert teach("progprompt", "stopped", stop_in=1, **options) == whole
    assert whole["backward_transfer"] == whole["forgetting"] == 0
    assert whole["trainable_parameters"] == 3 * 32 + (32 * 5 + 5) + (5 * 32 + 32)
    assert whole["stored_parameters"] == 2 * 3 * 32, "the MLP is folded into the prompt"
    assert (
        whole["settings"].items()
        >= {"adapter": "soft-prompt", "prompt_length": 3, "mlp": "mlp1", "place": "answer"}.items()
    )
    folders = [path.parent.name for path in (tmp_path / "whole").rglob("adapter_model.safetensors")]
    assert sorted(folders) == ["task_0", "task_1"]


def test_it_answers_one_question_in_two_ways_and_its_saved_prompts_do(
    tiny_llama, tiny_tokenizer, contradicting, tmp_path
):
    options = {"prompt_length": 3, "learning_rate": 0.3, "batch_size": 8, "max_length": 48, "epochs": 4}
    asked = {"out": tmp_path / "run", "options": options, "tokenizer": tiny_tokenizer}
    # weights so large that a prompt has something to say
    run = learn(tiny_llama(1, initializer_range=0.2), contradicting, "progprompt", **asked)
    entry = run.results["methods"]["progprompt"]
    assert entry["start"] == [0, 100], "the base says one thing alone"
    assert entry["matrix"] == [[100, 100], [100, 100]]
    saved = run.adapters("progprompt")
    model = PeftModel.from_pretrained(tiny_llama(1, initializer_range=0.2), saved / "task_0", adapter_name="task_0")
    model.load_adapter(saved / "task_1", "task_1")
    for index, task in enumerate(contradicting):
        ProgPrompt().route(model, index, 2)
        assert evaluate(model, tiny_tokenizer, task, max_length=48) == 100
    with pytest.raises(ValueError, match="made for another base model's weights"):
        PeftModel.from_pretrained(tiny_llama(2, initializer_range=0.2), saved / "task_1")


def test_encoder_decoder_models_learn_too(tiny_t5, tiny_tokenizer, contradicting, tmp_path):
    options = {"learning_rate": 1.0, "batch_size": 8, "epochs": 2, "prompt_length": 3, "pool_size": 5, "top_k": 2}
    asked = {"out": tmp_path / "run", "options": options, "tokenizer": tiny_tokenizer}
    run = learn(tiny_t5(0), contradicting, ["progprompt", "l2p"], **asked)
    for entry in run.results["methods"].values():
        for index in range(2):
            losses = [point["loss"] for point in entry["losses"] if point["task"] == index]
            assert losses[-1] < losses[0]


def test_what_does_not_fit_is_refused_before_training(tiny_llama, tiny_tokenizer, stream, tmp_path):
    for config in (LoRA(r=2), PromptPool()):
        with pytest.raises(ValueError, match=f"progprompt needs a SoftPrompt, not {type(config).__name__}"):
            ProgPrompt(config)

    def refused(message: str, **options: object) -> None:
        with pytest.raises(ValueError, match=message):
            learn(tiny_llama(1), stream, "progprompt", out=tmp_path / "run", options=options, tokenizer=tiny_tokenizer)
        assert not (tmp_path / "run").exists()

    refused("there is no option 'r'", r=3)
    refused("has an adapter of its own", adapter="lora")
    refused("mlp must be none, mlp1 or mlp2", mlp="mlp3")
    refused("PEFT has no type 'folklora_prompt'|has an adapter of its own", adapter="peft:folklora_prompt")

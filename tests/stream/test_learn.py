"""The main job end to end on a tiny real model: what is recorded, resumed, refused."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Trainer

from folklora import AMLoRA, KaSA, LoRA, add_task
from folklora.adapters.host.layer import layers_of
from folklora.continual import AdapterPerTask, AMLoRAStream, IncLoRA, MultiTask, PerTask, Replay, SeqLoRA
from folklora.methods import methods
from folklora.stream.learn import learn
from folklora.stream.run import Run, RunError
from folklora.stream.tasks import Example, Task
from folklora.stream.tokens import encode
from folklora.stream.train import DivergedError, TrainSettings, _arguments, _causal_trainer, train_task

QUICK = {"r": 2, "dropout": 0.0, "learning_rate": 0.02, "batch_size": 8, "max_length": 48, "epochs": 2}


def make_task(name: str, labels: tuple[str, str], seed: int, train: int = 24, test: int = 12) -> Task:
    draw = random.Random(f"{name}{seed}")

    def example(i: int) -> Example:
        word = "abcdefgh"[draw.randrange(4) + 4 * (i % 2)]
        return Example(f"{name}: {word}\nAnswer:", labels[i % 2])

    return Task(name, tuple(map(example, range(train))), tuple(map(example, range(test))), labels)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return [make_task("xx", (" yes", " no"), 0), make_task("yy", (" no", " yes"), 0)]


@pytest.fixture(scope="module")
def model_folder(tiny_llama, tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


def without_times(results: dict) -> dict:
    kept = json.loads(json.dumps(results))
    for entry in kept["methods"].values():
        for key in ("seconds", "seconds_by_task", "train_seconds"):
            entry.pop(key)
    return kept


def test_every_method_learns_and_records_the_stream(model_folder, tasks, bytes_on_disk, tmp_path):
    methods = ["am-lora", "seq-lora", "inc-lora", "replay", "per-task", "multi-task"]
    run = learn(model_folder, tasks, methods, out=tmp_path / "run", options=QUICK, seed=3)
    results = run.results
    assert list(results["methods"]) == methods
    for name, entry in results["methods"].items():
        assert len(entry["matrix"]) == 2
        assert entry["seed"] == 3
        assert entry["seconds"] > 0
        assert len(entry["losses"]) > 0
        assert entry["average_accuracy"] == pytest.approx(sum(entry["matrix"][-1]) / 2)
        assert entry["settings"]["learning_rate"] == 0.02, name
        assert entry["stored_bytes"] == bytes_on_disk(run.state_folder(name, run.finished(name))), name
    assert results["methods"]["multi-task"]["matrix"][0] == [None, None]
    assert results["methods"]["multi-task"]["backward_transfer"] is None
    per_task = results["methods"]["per-task"]["matrix"]
    assert per_task[0][0] == per_task[1][0], "an adapter of its own does not forget"
    assert per_task[0][1] == results["methods"]["per-task"]["start"][1], "a task not learnt is the base model's"
    starts = {tuple(entry["start"]) for entry in results["methods"].values()}
    assert len(starts) == 1, "every method starts from the same untouched base"
    attention = results["methods"]["am-lora"]["attention"]
    assert attention["slots"] == ["none", "xx", "yy"]
    assert all(abs(sum(slots) - 1) < 1e-4 for layers in attention["mean"] for slots in layers)
    assert (run.path / "report.html").is_file()


def test_parameter_counts_follow_the_formulas(model_folder, tasks, tmp_path):
    run = learn(model_folder, tasks, ["seq-lora", "inc-lora", "am-lora"], out=tmp_path / "run", options=QUICK)
    # q_proj [32, 32] and v_proj [16, 32] in two blocks
    pair = 2 * 2 * ((32 + 32) + (16 + 32))
    gates = 2 * 2 * (32 + 1)
    # m_i and |d_i|, by which a gate is placed
    places = 2 * 2 * (32 + 1)
    entries = run.results["methods"]
    assert entries["seq-lora"]["trainable_parameters"] == entries["seq-lora"]["stored_parameters"] == pair
    assert entries["inc-lora"]["trainable_parameters"] == pair
    assert entries["inc-lora"]["stored_parameters"] == 2 * pair
    assert entries["am-lora"]["trainable_parameters"] == pair + gates
    assert entries["am-lora"]["stored_parameters"] == 2 * (pair + gates + places)


def test_the_saved_adapters_answer_as_the_run_did(model_folder, tasks, tiny_tokenizer, tmp_path):
    from folklora.stream.evaluate import evaluate

    run = learn(model_folder, tasks, "am-lora", out=tmp_path / "run", options=QUICK)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    model = PeftModel.from_pretrained(base, run.adapters("am-lora"))
    scores = [evaluate(model, tiny_tokenizer, task, max_length=48) for task in tasks]
    assert scores == pytest.approx(run.results["methods"]["am-lora"]["matrix"][-1])


def test_the_base_model_is_untouched_by_a_run(tiny_llama, tiny_tokenizer, tasks, tmp_path):
    model = tiny_llama(1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learn(model, tasks, ["am-lora", "inc-lora"], out=tmp_path / "run", options=QUICK, tokenizer=tiny_tokenizer)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_one_seed_gives_one_result_and_seq_lora_of_one_task_is_plain_training(model_folder, tasks, tmp_path):
    def go(name: str, method: str, stream: list[Task], **more) -> dict:
        return learn(model_folder, stream, method, out=tmp_path / name, options=QUICK, **more).results

    first, again = go("a", "am-lora", tasks, seed=5), go("b", "am-lora", tasks, seed=5)
    assert without_times(first) == without_times(again)
    alone = [go(name, name, tasks[:1])["methods"][name] for name in ("seq-lora", "inc-lora", "replay", "multi-task")]
    assert len({json.dumps([entry["matrix"], entry["losses"]]) for entry in alone}) == 1


def test_replay_without_memory_is_seq_lora(model_folder, tasks, tmp_path):
    seq = learn(model_folder, tasks, "seq-lora", out=tmp_path / "seq", options=QUICK).results["methods"]["seq-lora"]
    options = {**QUICK, "memory": 0}
    none = learn(model_folder, tasks, "replay", out=tmp_path / "none", options=options).results["methods"]["replay"]
    assert none["losses"] == seq["losses"]
    assert none["matrix"] == seq["matrix"]


def test_inc_lora_is_am_lora_with_open_gates(tiny_llama, tiny_tokenizer, tasks):
    inc = IncLoRA(adapter=LoRA(r=2, alpha=32.0))
    model = inc.start(tiny_llama(2))
    for index in range(2):
        inc.prepare(model, tiny_tokenizer, tasks, index)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(index))
    ids = torch.arange(12).view(2, 6)
    am = AMLoRAStream(adapter=AMLoRA(r=2, alpha=32.0, dropout=0.0, zero_slot=False)).start(tiny_llama(2))
    add_task(am)
    # equal gates share the mass: two slots at one half each, so twice the output is the sum
    for ours, theirs in zip(layers_of(am), layers_of(model), strict=True):
        update = ours.folklora_updates["default"]
        update.scale *= 2
        for i in range(2):
            update.A[i].data = theirs.folklora_updates[f"task_{i}"].A.data
            update.B[i].data = theirs.folklora_updates[f"task_{i}"].B.data
            update.gate_weight[i].data.zero_()
    torch.testing.assert_close(am.eval()(ids).logits, model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", [m.factory() for m in methods("continual") if issubclass(m.factory, AdapterPerTask)])
def test_old_adapters_are_bit_identical_after_later_tasks(method, tiny_llama, tiny_tokenizer, tasks, tmp_path):
    # in the model itself: what a method does not call changed is not written again
    model = method.start(tiny_llama(1))
    for index, task in enumerate(tasks):
        method.prepare(model, tiny_tokenizer, tasks, index)
        before = {name: value.clone() for name, value in model.named_parameters()}
        settings = TrainSettings(learning_rate=0.02, batch_size=8, max_length=48)
        train_task(model, tiny_tokenizer, method, task.train, settings, seed=0, folder=tmp_path)
        method.finish(model, tiny_tokenizer, tasks, index)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    changed = method.changed(model, 1)
    allowed = {name for name in before if any(f".{own}." in name for own in changed)}
    # of several adapters a task, one that no prompt retrieves may stay
    assert moved <= allowed if len(changed) > 1 else moved == {n for n in allowed if not n.endswith("base_sample")}
    assert moved


def test_replay_remembers_evenly_and_only_training_rows():
    task = make_task("xx", (" yes", " no"), 0, train=100)
    memory = Replay(memory=0.1).remember(task, seed=1)
    assert len(memory) == 10
    assert sorted(e.completion for e in memory) == [" no"] * 5 + [" yes"] * 5
    assert set(memory) <= set(task.train)
    assert memory == Replay(memory=0.1).remember(task, seed=1)
    assert len(Replay(memory=1.0).remember(task, seed=1)) == 100
    stream = [task, make_task("yy", (" no", " yes"), 0, train=40)]
    assert len(Replay(memory=0.1, share=0.5).examples(stream, 1, seed=1)) == 80


def test_multi_task_does_not_depend_on_the_order(tasks):
    method = MultiTask()
    assert method.examples(tasks, 0, 0) == method.examples(tasks[::-1], 0, 0)
    assert len(method.examples(tasks, 0, 0)) == sum(len(task.train) for task in tasks)


def test_validation_scores_held_out_training_rows(model_folder, tasks, tmp_path):
    run = learn(model_folder, tasks[:1], "seq-lora", out=tmp_path / "run", options=QUICK, validation=0.25)
    assert run.request["examples"] == [[18, 12]]
    row = run.results["methods"]["seq-lora"]["matrix"][0][0]
    assert (row / 100 * 6) == pytest.approx(round(row / 100 * 6), abs=1e-6), "six rows were held out"


def test_encoder_decoder_models_learn_too(tiny_t5, tiny_tokenizer, tasks, tmp_path):
    run = learn(
        tiny_t5(0), tasks, ["am-lora", "seq-lora"], out=tmp_path / "run", options=QUICK, tokenizer=tiny_tokenizer
    )
    for entry in run.results["methods"].values():
        assert entry["losses"][-1]["loss"] < entry["losses"][0]["loss"]


@pytest.mark.parametrize("option", [{"gate_input": "lora"}, {"granularity": "sequence"}, {"sparsity": 0.1}])
def test_am_lora_options_reach_the_stream(model_folder, tasks, tmp_path, option):
    run = learn(model_folder, tasks, "am-lora", out=tmp_path / "run", options={**QUICK, **option})
    settings = run.results["methods"]["am-lora"]["settings"]
    assert settings.items() >= option.items()


def test_a_killed_run_resumes_to_the_same_results(model_folder, tasks, tmp_path):
    rows = tmp_path / "tasks"
    for task in tasks:
        (rows / task.name).mkdir(parents=True)
        for split in ("train", "test"):
            lines = [json.dumps({"prompt": e.prompt, "completion": e.completion}) for e in getattr(task, split)]
            (rows / task.name / f"{split}.jsonl").write_text("\n".join(lines))
        (rows / task.name / "task.json").write_text(json.dumps({"labels": list(task.labels)}))

    def command(out: str, *more: str) -> list[str]:
        sets = [word for key, value in QUICK.items() for word in ("--set", f"{key}={value}")]
        places = [word for task in tasks for word in ("--tasks", str(rows / task.name))]
        base = [sys.executable, "-m", "folklora", "learn", "--model", str(model_folder), "--method", "am-lora"]
        return [*base, *places, *sets, "--out", str(tmp_path / out), *more]

    whole = subprocess.run(command("whole"), capture_output=True, text=True, timeout=300)
    assert whole.returncode == 0, whole.stderr
    killed = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = tmp_path / "killed" / "am-lora" / "task-001" / "state.json"
    deadline = time.monotonic() + 240
    while not first.is_file() and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it had ended before it could be killed"
    assert not (tmp_path / "killed" / "results.json").exists()
    resumed = subprocess.run(command("killed", "--resume"), capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    assert without_times(Run.load(tmp_path / "killed").results) == without_times(Run.load(tmp_path / "whole").results)
    again = subprocess.run(command("killed", "--resume", "--set", "r=3"), capture_output=True, text=True, timeout=300)
    assert again.returncode == 1
    assert "cannot be resumed" in again.stderr


def test_a_run_is_not_replaced_unless_asked(model_folder, tasks, tmp_path):
    learn(model_folder, tasks[:1], "seq-lora", out=tmp_path / "run", options=QUICK)
    with pytest.raises(RunError, match="--resume goes on"):
        learn(model_folder, tasks[:1], "seq-lora", out=tmp_path / "run", options=QUICK)
    learn(model_folder, tasks[:1], "seq-lora", out=tmp_path / "run", options=QUICK, overwrite=True)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("my only copy")
    with pytest.raises(RunError, match="not empty"):
        learn(model_folder, tasks[:1], "seq-lora", out=tmp_path / "other", options=QUICK, overwrite=True)
    assert (tmp_path / "other" / "thesis.tex").is_file()


def test_an_adapter_of_any_method_can_be_trained_on_and_on(model_folder, tasks, tmp_path):
    options = {**QUICK, "adapter": "kasa", "beta": 0.1}
    run = learn(model_folder, tasks, "seq-lora", out=tmp_path / "run", options=options)
    settings = run.results["methods"]["seq-lora"]["settings"]
    assert (settings["adapter"], settings["beta"]) == ("kasa", 0.1)


def test_per_task_answers_do_not_depend_on_the_order(model_folder, tiny_tokenizer, tasks):
    method = PerTask(adapter=LoRA(r=2))
    model = method.start(AutoModelForCausalLM.from_pretrained(model_folder))
    method.prepare(model, tiny_tokenizer, tasks, 0)
    method.prepare(model, tiny_tokenizer, tasks, 1)
    assert [n for n, p in model.named_parameters() if p.requires_grad and "task_0" in n] == []
    ids = torch.arange(6).view(1, 6)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    method.route(model, 0, trained=2)
    first = model(ids).logits
    method.route(model, 1, trained=2)
    assert not torch.allclose(first, model(ids).logits)
    method.route(model, 5, trained=2)
    base = AutoModelForCausalLM.from_pretrained(model_folder)
    torch.testing.assert_close(model(ids).logits, base(ids).logits)
    assert isinstance(SeqLoRA().adapter, LoRA)


def test_two_forms_of_one_method_need_a_run_each(model_folder, tasks, tmp_path):
    with pytest.raises(ValueError, match="seq-lora is given twice"):
        learn(model_folder, tasks, ["seq-lora", SeqLoRA()], out=tmp_path / "run", options=QUICK)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_weight_decay_falls_on_what_the_trainer_would_choose(tiny_llama, tiny_tokenizer, tasks, tmp_path, decay):
    method = SeqLoRA(adapter=KaSA(r=2, train_bias=True, target_modules=["q_proj"]))
    model = method.start(tiny_llama(1, attention_bias=True))
    rows = [encode(tiny_tokenizer, example, 48) for example in tasks[0].train]
    arguments = _arguments(TrainSettings(weight_decay=decay), 0, tmp_path, len(rows))
    trainer = _causal_trainer(model, tiny_tokenizer, rows, arguments, [], method)
    found = {id(p): group["weight_decay"] for group in trainer.create_optimizer().param_groups for p in group["params"]}
    named = Trainer.get_decay_parameter_names(trainer, model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    assert found == {id(p): decay if name in named else 0.0 for name, p in trained}
    assert {name in named for name, _ in trained} == {True, False}


def test_a_long_stream_need_not_be_scored_on_everything_after_each_task(model_folder, tasks, tmp_path):
    matrices = {}
    for evaluate in ("all", "seen", "last"):
        options = {**QUICK, "evaluate": evaluate}
        run = learn(model_folder, tasks, ["seq-lora", "multi-task"], out=tmp_path / evaluate, options=options)
        matrices[evaluate] = run.results["methods"]["seq-lora"]["matrix"]
        assert run.results["methods"]["multi-task"]["average_accuracy"] is not None
        assert "seq-lora" in (run.path / "report.html").read_text()
    (first, last), count = matrices["all"], len(tasks)
    assert matrices["seen"] == [[first[0], *[None] * (count - 1)], last]
    assert matrices["last"] == [[None] * count, last]
    with pytest.raises(ValueError, match="evaluate must be all, seen or last, not 'never'"):
        learn(model_folder, tasks, "seq-lora", out=tmp_path / "other", options={"evaluate": "never"})


def test_a_loss_that_is_no_number_in_the_very_last_step_is_seen(tiny_llama, tiny_tokenizer, tmp_path):
    class Breaks(SeqLoRA):
        steps = 0

        def penalty(self, model):
            self.steps += 1
            return torch.tensor(float("inf")) if self.steps == 41 else None

    method = Breaks(adapter=LoRA(r=2, target_modules=["q_proj"]))
    # of 41 steps every second is logged, and so not the last
    rows, settings = make_task("zz", (" yes", " no"), 0, train=41).train, TrainSettings(batch_size=1, max_length=48)
    with pytest.raises(DivergedError, match=r"seq-lora: training has diverged: the loss is inf by step 41 of 41"):
        train_task(method.start(tiny_llama(1)), tiny_tokenizer, method, rows, settings, seed=0, folder=tmp_path)


def test_training_that_diverges_is_an_error(model_folder, tasks, tmp_path):
    options = {"learning_rate": 1e30, "batch_size": 8, "max_length": 48, "epochs": 2}
    said = (
        r"lt-sft, task 'xx, full': training has diverged: the loss is nan by step \d of 6.*learning_rate \(now 1e\+30\)"
    )
    with pytest.raises(DivergedError, match=said):
        learn(model_folder, tasks, "lt-sft", out=tmp_path / "run", options=options)

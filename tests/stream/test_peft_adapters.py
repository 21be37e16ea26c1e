"""PEFT's own adapters in a stream: learnt, counted, saved, resumed; what cannot be is refused before any work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model

from folklora import LoRA, learn
from folklora.continual import IncLoRA, PerTask, SeqLoRA
from folklora.stream.compare import compare_runs
from folklora.stream.evaluate import evaluate
from folklora.stream.options import build_method, describe
from folklora.stream.peft_types import check_trainable, peft_config_class
from folklora.stream.run import Run, unload
from folklora.stream.tasks import Example, Task

QUICK = {"learning_rate": 0.05, "batch_size": 8, "max_length": 48, "epochs": 1}
# q_proj [32, 32] and v_proj [16, 32], in two blocks
SHAPES = [(32, 32), (16, 32)] * 2
TYPES = {
    "dora": ("peft:lora", {"r": 2, "use_dora": True}, sum(2 * (o + i) + o for o, i in SHAPES)),
    "loha": ("peft:loha", {"r": 2}, sum(2 * 2 * (o + i) for o, i in SHAPES)),
    "oft": ("peft:oft", {"oft_block_size": 8}, sum(i // 8 * 28 for _, i in SHAPES)),
    "ia3": ("peft:IA3", {"target_modules": ["v_proj"], "feedforward_modules": []}, 2 * 16),
    "vera": ("peft:vera", {"r": 4}, sum(4 + o for o, _ in SHAPES)),
}


def make_task(name: str, labels: tuple[str, str]) -> Task:
    rows = tuple(Example(f"{name}: {'abcd'[i % 4]}\nAnswer:", labels[i % 2]) for i in range(16))
    return Task(name, rows, rows[:8], labels)


TASKS = [make_task("xx", (" yes", " no")), make_task("yy", (" no", " yes"))]


class StoppedError(Exception):
    """What the tests end a run with, as a killed process would."""


def stop_after_first_row(event: str, **details: Any) -> None:
    if event == "row":
        raise StoppedError


def figures(run: Run) -> list[Any]:
    return [(e["matrix"], e["losses"], e["stored_parameters"]) for e in run.results["methods"].values()]


@pytest.fixture(scope="module")
def model_folder(tiny_llama, tiny_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(1).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", TYPES)
def test_each_learns_is_counted_saved_and_resumed(kind, tiny_llama, tiny_tokenizer, tmp_path):
    adapter, own, trained = TYPES[kind]
    options = {**QUICK, "adapter": adapter, **own}
    base = tiny_llama(1)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    run = learn(base, TASKS, "seq-lora", out=tmp_path / "whole", options=options, tokenizer=tiny_tokenizer)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())
    entry = run.results["methods"]["seq-lora"]
    assert entry["settings"].items() >= {"adapter": adapter.lower(), **own}.items()
    assert entry["trainable_parameters"] == trained
    # VeRA saves its two frozen random matrices, of the largest sizes that it meets
    frozen = 4 * (32 + 32) if kind == "vera" else 0
    assert entry["stored_parameters"] == trained + frozen
    with pytest.raises(StoppedError):
        learn(
            base, TASKS, "seq-lora", out=tmp_path / "part", options=options, tokenizer=tiny_tokenizer,
            progress=stop_after_first_row,
        )  # fmt: skip
    again = learn(
        tiny_llama(1), TASKS, "seq-lora", out=tmp_path / "part", options=options, tokenizer=tiny_tokenizer, resume=True
    )
    assert figures(again) == figures(run)
    loaded = PeftModel.from_pretrained(tiny_llama(1), run.adapters("seq-lora"))
    scores = [evaluate(loaded, tiny_tokenizer, task, max_length=48) for task in TASKS]
    assert scores == pytest.approx(entry["matrix"][-1])


@pytest.mark.parametrize("method", [IncLoRA, PerTask])
def test_methods_with_an_adapter_a_task_take_them_too(method, tiny_llama, tiny_tokenizer, tmp_path):
    def go(out: str, **more: Any) -> Run:
        one = method(adapter=peft.LoraConfig(r=2, use_dora=True, target_modules=["v_proj"]))
        return learn(
            tiny_llama(1), TASKS, one, out=tmp_path / out, options={**QUICK, "r": 3}, tokenizer=tiny_tokenizer, **more
        )

    whole = go("whole")
    with pytest.raises(StoppedError):
        go("part", progress=stop_after_first_row)
    assert figures(go("part", resume=True)) == figures(whole)
    entry = whole.results["methods"][method.method]
    each = 2 * (3 * (16 + 32) + 16)
    assert (entry["trainable_parameters"], entry["stored_parameters"]) == (each, 2 * each)


def test_an_object_is_an_adapter_option_and_options_change_it():
    config = peft.LoHaConfig(r=2, alpha=4)
    built = build_method("replay", {"adapter": config, "r": 5, "memory": 0.5})
    assert (built.adapter.r, built.adapter.alpha, built.memory, config.r) == (5, 4, 0.5, 2)
    written = describe(SeqLoRA(adapter=peft.LoraConfig(target_modules={"b", "a"})))
    assert (written["adapter"], written["target_modules"]) == ("peft:lora", ["a", "b"])
    assert describe(SeqLoRA())["adapter"] == "lora"


def test_compare_tells_adapters_apart_by_what_they_share(tiny_llama, tiny_tokenizer, tmp_path):
    adapters = {"ours": "lora", "dora": "peft:lora", "plain": "peft:lora"}
    for name, adapter in adapters.items():
        options = {**QUICK, "adapter": adapter, "r": 2, **({"use_dora": True} if name == "dora" else {})}
        learn(tiny_llama(1), TASKS[:1], "seq-lora", out=tmp_path / name, options=options, tokenizer=tiny_tokenizer)
    rows = compare_runs([tmp_path / name for name in adapters], tmp_path / "compared")
    assert [row["settings"]["adapter"] for row in rows] == list(adapters.values())
    page = (tmp_path / "compared" / "compare.html").read_text()
    for note in ("adapter=&quot;lora&quot;", "adapter=&quot;peft:lora&quot;, use_dora=true", "use_dora=false"):
        assert note in page
    assert "init_lora_weights" not in page, "what one adapter alone has tells it from no other"


def test_a_killed_run_of_the_command_line_resumes_to_the_same_results(model_folder, tmp_path):
    for task in TASKS:
        (tmp_path / task.name).mkdir()
        lines = [json.dumps({"prompt": e.prompt, "completion": e.completion}) for e in task.train]
        for split in ("train", "test"):
            (tmp_path / task.name / f"{split}.jsonl").write_text("\n".join(lines))
        (tmp_path / task.name / "task.json").write_text(json.dumps({"labels": list(task.labels)}))
    options = {**QUICK, "adapter": "peft:lora", "use_dora": "true", "r": 2}
    words = [word for key, value in options.items() for word in ("--set", f"{key}={value}")]
    words += [word for task in TASKS for word in ("--tasks", str(tmp_path / task.name))]

    def command(out: str, *more: str) -> list[str]:
        start = [sys.executable, "-m", "folklora", "learn", "--model", str(model_folder), "--method", "seq-lora"]
        return [*start, *words, "--out", str(tmp_path / out), *more]

    killed = subprocess.Popen(command("killed"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first, deadline = tmp_path / "killed" / "seq-lora" / "task-001" / "state.json", time.monotonic() + 240
    while not first.is_file() and time.monotonic() < deadline and killed.poll() is None:
        time.sleep(0.01)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, "it had ended before it could be killed"
    resumed = subprocess.run(command("killed", "--resume"), capture_output=True, text=True, timeout=300)
    assert resumed.returncode == 0, resumed.stderr
    whole = learn(
        model_folder, [tmp_path / task.name for task in TASKS], "seq-lora", out=tmp_path / "whole",
        options={**options, "use_dora": True},
    )  # fmt: skip
    assert figures(Run.load(tmp_path / "killed")) == figures(whole)


REFUSED = {
    "unknown type": ({"adapter": "peft:lohaa"}, r"no type 'lohaa'; the nearest are peft:loha"),
    "unknown option": ({"adapter": "peft:lora", "use_dorra": True}, r"no option 'use_dorra'; did you mean use_dora"),
    "prompts": ({"adapter": "peft:prompt_tuning"}, "cannot train peft:prompt_tuning: it learns a prompt"),
    "budgets": ({"adapter": "peft:adalora"}, "ranks are shared out by calls between the steps"),
    "rewrites the base": (
        {"adapter": "peft:lora", "init_lora_weights": "pissa"},
        "init_lora_weights='pissa' makes PEFT rewrite",
    ),
    "trains the base": ({"adapter": "peft:lora", "bias": "all"}, "base model's own biases in place"),
    "wrong kind of value": ({"adapter": "peft:lora", "r": "eight"}, "r must be int, not 'eight'"),
    "refused by PEFT": (
        {"adapter": "peft:oft", "r": 2, "oft_block_size": 4},
        r"either r \(2\) or oft_block_size \(4\)",
    ),
    "no such layer": (
        {"adapter": "peft:loha", "target_modules": ["q_proj", "query"]},
        r"'query' matches no layer; layers that can be adapted: .*q_proj",
    ),
    "pattern without match": (
        {"adapter": "peft:vera", "target_modules": "query"},
        r"target_modules='query' matches no layer of LlamaForCausalLM; layers that can be adapted: .*q_proj",
    ),
    "does not fit the layer": ({"adapter": "peft:c3a", "block_size": 24}, "block size should be a factor"),
    "cannot be loaded again": (
        {"adapter": "peft:ia3", "target_modules": ["v_proj"]},
        "a form that PEFT refuses to load: `feedforward_modules`",
    ),
    "no name": ({"adapter": 3}, "adapter must be a name or a peft.PeftConfig, not 3"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_any_work(case, model_folder, tmp_path):
    options, message = REFUSED[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        learn(model_folder, TASKS, "seq-lora", out=tmp_path / "run", options={**QUICK, **options})
    assert not (tmp_path / "run").exists()


def test_an_adapter_that_no_method_of_the_run_takes_is_refused(model_folder, tmp_path):
    with pytest.raises(ValueError, match="am-lora has an adapter of its own"):
        learn(model_folder, TASKS, "am-lora", out=tmp_path / "run", options={**QUICK, "adapter": "peft:lora"})


@pytest.mark.parametrize("config", [LoRA, peft.LoraConfig])
def test_modules_trained_in_full_do_not_stay_in_the_base(config, tiny_llama, tiny_tokenizer, tmp_path):
    base = tiny_llama(1)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    method = SeqLoRA(adapter=config(r=2, modules_to_save=["lm_head"]))
    learn(base, TASKS[:1], method, out=tmp_path / "run", options=QUICK, tokenizer=tiny_tokenizer)
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


# what the defaults are too large for on a tiny model
SIZES: dict[str, dict[str, Any]] = {
    "c3a": {"block_size": 16}, "fourierft": {"n_frequency": 50}, "miss": {"r": 4}, "psoft": {"r": 4},
    "road": {"group_size": 8}, "shira": {"r": 4}, "trainable_tokens": {"token_indices": [40, 41]},
    "vblora": {"vector_length": 8, "num_vectors": 8}, "waveft": {"n_frequency": 50},
}  # fmt: skip


def trainable_types() -> list[str]:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    names = [str(kind.value).lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING]
    return [name for name in names if name != "folklora" and is_trained(name)]


def is_trained(name: str) -> bool:
    try:
        peft_config_class(name)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("name", trainable_types())
def test_no_type_that_is_accepted_writes_to_the_base(name, tiny_llama):
    try:
        config = peft_config_class(name)(task_type="CAUSAL_LM", **SIZES.get(name, {}))
    except ImportError as error:
        pytest.skip(str(error))
    if getattr(config, "target_modules", "none to name") is None and name != "trainable_tokens":
        config.target_modules = {"v_proj", "down_proj"}
        if name == "ia3":
            config.feedforward_modules = {"down_proj"}
    check_trainable(config)
    base = tiny_llama(1)
    before = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, config).train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        ids = torch.arange(38, 46).view(1, 8)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    after = unload(model).state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())

"""What a run's methods say of a prompt afterwards is what they did with it: the mean over prompts is the report's."""

from __future__ import annotations

import pytest
import torch

from folklora import learn
from folklora.stream.explain import explain
from folklora.stream.run import Run, RunError
from folklora.stream.tasks import Example, Task

OPTIONS = {
    "r": 2, "dropout": 0.0, "learning_rate": 0.02, "batch_size": 8, "max_length": 48, "keys_per_task": 2, "top_k": 2,
    "key_steps": 30,
}  # fmt: skip


def _task(name: str) -> Task:
    rows = [Example(f"{name}: {'abcd'[i % 4] * (1 + i % 3)}\nAnswer:", (" yes", " no")[i % 2]) for i in range(16)]
    return Task(name, tuple(rows), tuple(rows[:6]), (" yes", " no"))


def test_the_mean_over_a_tasks_prompts_is_what_the_report_shows(tiny_llama, tiny_tokenizer, tmp_path):
    tasks, given = [_task("xx"), _task("yy")], {"tokenizer": tiny_tokenizer}
    run = learn(tiny_llama(1), tasks, ["am-lora", "seq-lora", "slm"], out=tmp_path / "run", options=OPTIONS, **given)
    base = tiny_llama(1)
    for index, task in enumerate(tasks):
        found = explain(run, [example.prompt for example in task.test], model=base, **given)
        assert list(found) == ["am-lora", "slm"]
        for name, shares in found.items():
            seen = run.results["methods"][name]["attention"]
            assert (shares["layers"], shares["slots"]) == (seen["layers"], seen["slots"])
            mean = torch.tensor(shares["weights"], dtype=torch.float64).mean(0)
            # rounded to six places, and read alone rather than beside padding
            torch.testing.assert_close(mean, torch.tensor(seen["mean"][index], dtype=torch.float64), rtol=0, atol=1e-5)
    ids = torch.arange(12)[None]
    assert torch.equal(base(ids).logits, tiny_llama(1)(ids).logits), "the base is left as it was"
    with pytest.raises(ValueError, match="seq-lora: answers every prompt in the same way"):
        explain(run, ["xx"], ["seq-lora"], model=base, **given)
    for state in run.path.glob("*/task-001/state.json"):
        state.unlink()
    with pytest.raises(RunError, match="am-lora, slm has learnt no task yet"):
        explain(Run(run.path), ["xx"], model=base, **given)

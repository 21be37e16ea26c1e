"""What the demo claims, on the model that ships: AM-LoRA keeps what one LoRA trained on and on forgets."""

from __future__ import annotations

from folklora.demo import demo_options, model_folder
from folklora.demo.tasks import demo_tasks
from folklora.stream.learn import learn


def test_am_lora_remembers_what_seq_lora_forgets(tmp_path):
    run = learn(model_folder(), demo_tasks(0), ["seq-lora", "am-lora"], out=tmp_path / "run", options=demo_options())
    seq, am = (run.results["methods"][name] for name in ("seq-lora", "am-lora"))
    assert seq["start"] == am["start"]
    assert all(score < 60 for score in seq["start"]), "the base model is near chance on every task"
    assert seq["learning_accuracy"] > 70, "one LoRA learns each task"
    assert am["average_accuracy"] >= seq["average_accuracy"] + 10
    assert am["forgetting"] < seq["forgetting"] / 3

"""A base that has seen labelled tasks before its stream, as T5 had: fine-tuned on GLUE's and SuperGLUE's, then saved.

    python benchmarks/prepared_base.py --model MODEL --data cl_benchmark --out OUT

The published streams begin from T5, whose own pre-training had the training sets of GLUE and SuperGLUE in it. This
script trains one adapter on those of their tasks that `cl_benchmark` holds (none of them is in orders 1-3), adds it to
the weights, and writes OUT/model, which standard_stream.py takes by `--model`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from standard_stream import load_order

# of the fifteen, what T5's mixture had (Raffel et al. 2020, section 2.3)
TASKS = ("mnli", "cb", "wic", "copa", "qqp", "boolq", "rte", "multirc", "sst2")


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from folklora.stream.learn import learn

    tasks = [task for task in load_order(options, "order4", named=True) if task.name in options.tasks]
    settings = {
        "learning_rate": options.rate, "epochs": options.epochs, "batch_size": 32, "r": options.rank,
        "alpha": 2.0 * options.rank, "dropout": 0.1, "target_modules": "all-linear", "max_length": 512,
        "eval_batch_size": 50, "group_by_length": True,
    }  # fmt: skip
    run = learn(options.model, tasks, "multi-task", out=options.out / "run", options=settings, seed=options.seed)
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    tuned, _ = run.load_adapters("multi-task", base)
    tuned.merge_and_unload().bfloat16().save_pretrained(options.out / "model")
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out / "model")
    entry = run.results["methods"]["multi-task"]
    scores = {
        task.name: {"before": before, "after": after}
        for task, before, after in zip(tasks, entry["start"], entry["matrix"][-1], strict=True)
    }
    (options.out / "scores.json").write_text(json.dumps(scores, indent=1))
    print(json.dumps(scores, indent=1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", default=list(TASKS))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-4, help="at 1e-3 it diverges with a rank of 64")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train-rows", type=int, default=2000)
    parser.add_argument("--test-rows", type=int, default=500)
    return parser.parse_args()


if __name__ == "__main__":
    main()

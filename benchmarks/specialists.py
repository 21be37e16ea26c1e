"""What a merged model keeps of its specialists: seven tasks, one fine-tuned model each, every merging method.

    python benchmarks/specialists.py --model MODEL --data DATA --out OUT [--methods NAME ...] [--workers N] [--tiny]

MODEL is a folder of a causal model, DATA one with glue/, cl_benchmark/, e2e/ and math/. A specialist is MODEL
fine-tuned in full on one task (AdamW, 6 % warm-up, linear decay; the learning rate of each task is the best of
`--rates` on held-out rows, one seed). For each seed the seven are trained, and each method merges them. What
CONFIGURATIONS lists is tried on the held-out rows, at most five settings a method; the best by their mean normalised
score is scored on the test rows. Normalised: the score divided by the specialist's on the same rows, in percent, mean
over the tasks. Marked "task known" are methods that give each task a model of its own. `twin-merging, routed` finds the
task itself, with a router that learns from the held-out prompts. `atlas` trains one coefficient for each specialist and
tensor on `--few` training rows a task. `multi-task` is MODEL trained on all tasks at once, for as many steps as all
specialists together. Methods for two models are left out.

`r-tsvm, ...` are R-TSVM without one of its two changes to TSV-M, and other readings of what its paper names.
`tsv-m, equal norms` is TSV-M of task vectors scaled to one norm, a control of ours. `mixture: ...` is `multi-task` with
the same learning rate, steps and batches, on `--mixture-share` of its rows, which one of the strategies of
folklora.merge.mixtures chooses; the rewards are the specialists' (specialist_mixtures.py).

Jobs are independent, and each finished one is kept, so the script resumes. The record of a specialist that is still
needed and whose checkpoint is gone from OUT/models is removed, and the specialist trained again.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adapter_tasks import Row, batch_of
from adapters import machine, quiet
from jobs import Job, add_options, file_name, records, work
from safetensors.torch import load_file, save_file
from specialist_merging import CONFIGURATIONS, MAKERS, Parts, Served, of_tensors
from specialist_mixtures import MIXTURES, NEED_REWARDS, rewards_job, rows_of, turns
from specialist_tasks import TASKS, base_model, descend, draw, loaded, model_file, score
from torch import nn

import folklora

CONTENDERS = [*CONFIGURATIONS, *MIXTURES]
KNOWN = ("emr", "tall", "tsv-c", "twin-merging", "specialists")
TINY = {
    "train_rows": 8, "validation_rows": 4, "test_rows": 4, "steps": 2, "batch": 2, "eval_batch": 4, "seeds": [0],
    "rates": [1e-3], "few": 2, "few_steps": 2, "tasks": ["sst2", "trec6", "e2e", "math"],
}  # fmt: skip


def main() -> None:
    options = arguments()
    (options.out / "models").mkdir(parents=True, exist_ok=True)
    everything = [*options.tasks, "multi-task"]
    tuning = [
        {"kind": "rate", "task": t, "rate": r, "seed": 0} for r, t in itertools.product(options.rates, everything)
    ]
    do(tuning, options)
    best = best_rates(options.out)

    def trainings(names: Sequence[str]) -> list[Job]:
        pairs = itertools.product(options.seeds, names)
        rates = {name: best["multi-task" if name in MIXTURES else name] for name in names}
        return [{"kind": "train", "task": n, "rate": rates[n], "seed": s} for s, n in pairs]

    specialists = trainings(options.tasks)
    mixing = trainings([method for method in options.methods if method in MIXTURES])
    judged = [job for job in mixing if job["task"] in NEED_REWARDS]
    judging = [{"kind": "rewards", "task": "all", "seed": seed} for seed in options.seeds if judged]
    merging = [
        {"kind": "merge", "method": method, "seed": seed}
        for seed, method in itertools.product(options.seeds, ["base", *options.methods])
        if method not in MIXTURES
    ]
    forget_lost(judging, judged, options)
    forget_lost(specialists, [*judging, *merging], options)
    do([*trainings(["multi-task"]), *specialists], options)
    do(judging, options)
    do([*mixing, *merging], options)
    write_table(options)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--methods", nargs="+", choices=CONTENDERS, default=CONTENDERS, metavar="NAME",
        help="of " + ", ".join(f"'{name}'" for name in CONTENDERS))  # fmt: skip
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 3e-4, 1e-3])
    parser.add_argument("--steps", type=int, default=200, help="of each specialist")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--eval-batch", type=int, default=100)
    parser.add_argument("--train-rows", type=int, default=1800)
    parser.add_argument("--validation-rows", type=int, default=100)
    parser.add_argument("--test-rows", type=int, default=400)
    parser.add_argument("--length", type=int, default=160, help="tokens of a row at the most")
    parser.add_argument("--few", type=int, default=32, help="rows a task that atlas learns from")
    parser.add_argument("--few-steps", type=int, default=60)
    parser.add_argument("--mixture-share", type=float, default=0.5, help="of multi-task's rows that a mixture keeps")
    parser.add_argument("--tiny", action="store_true", help="a few rows and steps, to try the script")
    options = parser.parse_args()
    if options.tiny:
        vars(options).update(TINY)
    return options


def do(jobs: list[Job], options: argparse.Namespace) -> None:
    named = [(job_name(job), job) for job in jobs]
    work(named, partial(one_job, options=options), options.out, workers=options.workers, deadline=float("inf"))


def job_name(job: Job) -> str:
    return file_name(job["kind"], job.get("task", job.get("method")), f"seed{job['seed']}", f"{job.get('rate', 0):g}")


def forget_lost(jobs: Sequence[Job], later: Sequence[Job], options: argparse.Namespace) -> None:
    """Do jobs again of which only the record is left, where another of their seed still needs the file they wrote."""
    seeds = {job["seed"] for job in later if not (options.out / job_name(job)).is_file()}
    for job in jobs:
        record = options.out / job_name(job)
        file = model_file(options, job["task"], job["seed"], "rewards" if job["kind"] == "rewards" else "model")
        if job["seed"] in seeds and record.is_file() and not file.is_file():
            print(f"{file.name} is gone: {record.name} is done again", flush=True)
            record.unlink()


def best_rates(out: Path) -> dict[str, float]:
    """Task → the learning rate with the best score on held-out rows."""
    found: dict[str, tuple[float, float]] = {}
    for record in records(out, "rate"):
        key, worth = record["task"], (record["score"], -record["rate"])
        found[key] = max(found.get(key, worth), worth)
    return {key: -rate for key, (_, rate) in found.items()}


def one_job(job: Job, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    torch.set_num_threads(1)
    quiet()
    began = time.perf_counter()
    found = {"merge": merge_job, "rewards": rewards_job}.get(job["kind"], train_job)(job, options)
    record = {**job, **found, "seconds": round(time.perf_counter() - began, 1), "machine": machine()}
    shown = found.get("score", found.get("normalised"))
    return record, f"{record['seconds']:6.1f} s  {shown:5.1f}  {job_name(job)}"


def train_job(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Train a specialist, which is kept unless a rate is being chosen, or a model of all tasks."""
    model = base_model(options)
    torch.manual_seed(job["seed"])
    rows = rows_of(job, options)
    train(model, rows, job, options)
    split = "validation" if job["kind"] == "rate" else "test"
    scores = {name: score(model, *loaded(name, options), split, options.eval_batch) for name in rows}
    found: dict[str, Any] = {"scores": scores, "score": statistics.mean(scores.values())}
    found["rows"] = {name: len(own) for name, own in rows.items()}
    if job["kind"] == "train" and job["task"] in options.tasks:
        own = loaded(job["task"], options)
        found["validation"] = {job["task"]: score(model, *own, "validation", options.eval_batch)}
        state = {name: value.detach().cpu().contiguous() for name, value in model.named_parameters()}
        save_file(state, model_file(options, job["task"], job["seed"]))
        save_statistics(model, job, options)
    return found


def train(model: nn.Module, rows: dict[str, list[Row]], job: Job, options: argparse.Namespace) -> None:
    """AdamW over all parameters; with several tasks each batch is of one, as often as its share of the rows."""
    steps = options.steps * len(rows)
    optimizer = torch.optim.AdamW(model.parameters(), lr=job["rate"], weight_decay=0.0)
    warmup = max(1, round(0.06 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    model.train()
    batches = {name: draw(own, options.batch, f"{job['seed']}:{name}") for name, own in rows.items()}
    for name in itertools.islice(turns({name: len(own) for name, own in rows.items()}), steps):
        descend(model, model, name, next(batches[name]), options)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def save_statistics(model: Any, job: Job, options: argparse.Namespace) -> None:
    """The Fisher information and the inputs' covariance of each linear layer, over 256 training rows."""
    task, tokenizer = loaded(job["task"], options)
    rows = task.task.train[:256]
    batches = [
        batch_of(rows[i : i + 8], task.task, tokenizer.pad_token_id, model.device) for i in range(0, len(rows), 8)
    ]
    found = folklora.calibrate(model, batches, ["fisher", "covariance"], target_modules="all-linear")
    found.save(model_file(options, job["task"], job["seed"], "statistics"))


def merge_job(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Choose a method's setting on held-out rows, and score it on the test rows."""
    model = base_model(options)
    base = {name: value.detach().clone() for name, value in model.named_parameters()}
    specialists = [load_file(model_file(options, t, job["seed"]), device=str(model.device)) for t in options.tasks]
    trained = {r["task"]: r for r in records(options.out, "train") if r["seed"] == job["seed"]}
    own = {split: [trained[t][key][t] for t in options.tasks] for split, key in SPLITS.items()}

    def worth(served: Served, split: str) -> list[float]:
        return [
            score(served(t), *loaded(name, options), split, options.eval_batch) for t, name in enumerate(options.tasks)
        ]

    parts, make = Parts(model, base, specialists), MAKERS.get(job["method"], of_tensors)
    tried = []
    for setting in CONFIGURATIONS.get(job["method"], [{}]):
        value = normalised(worth(make(parts, setting, job, options), "validation"), own["validation"])
        tried.append({**setting, "validation": value})
    best = max(range(len(tried)), key=lambda index: tried[index]["validation"])
    # the settings after it wrote to the same model, so the best is made again
    setting = CONFIGURATIONS.get(job["method"], [{}])[best]
    scores = worth(make(parts, setting, job, options), "test")
    return {
        "setting": setting, "tried": tried, "scores": dict(zip(options.tasks, scores, strict=True)),
        "normalised": normalised(scores, own["test"]),
    }  # fmt: skip


SPLITS = {"validation": "validation", "test": "scores"}


def normalised(scores: Sequence[float], own: Sequence[float]) -> float:
    # what a specialist hardly does is no measure
    return 100 * statistics.mean(score / max(1.0, best) for score, best in zip(scores, own, strict=True))


def write_table(options: argparse.Namespace) -> None:
    """Mean and spread over seeds: the normalised score, and each task's own."""
    runs = records(options.out, "merge")
    merged = ("base", *(method for method in options.methods if method not in MIXTURES))
    rows = {method: [r for r in runs if r["method"] == method] for method in merged}
    trained = records(options.out, "train")
    together = [name for name in (*MIXTURES, "multi-task") if name == "multi-task" or name in options.methods]
    rows.update({name: [] for name in (*together, "specialists")})
    for seed in options.seeds:
        found = [r for r in trained if r["seed"] == seed]
        own = {r["task"]: r["scores"][r["task"]] for r in found if r["task"] in options.tasks}
        rows["specialists"].append({"normalised": 100.0, "scores": own, "setting": {}})
        for record in found:
            if record["task"] in together:
                value = normalised([record["scores"][t] for t in options.tasks], [own[t] for t in options.tasks])
                rows[record["task"]].append({**record, "normalised": value, "setting": {}})
    heads = ["method", "normalised, %", *options.tasks, "settings by seed"]
    print("| " + " | ".join(heads) + " |\n| --- |" + " --: |" * (len(heads) - 2) + " --- |")
    for method, found in rows.items():
        if found:
            cells = [spread([r["normalised"] for r in found])]
            cells += [spread([r["scores"][task] for r in found]) for task in options.tasks]
            chosen = "; ".join(shown(method, r) for r in found)
            name = f"{method} (task known)" if method in KNOWN else method
            print(f"| {name} | " + " | ".join(cells) + f" | {chosen.strip('; ')} |")


def shown(method: str, record: dict[str, Any]) -> str:
    """The values of a setting, but those that are the same in all; of a mixture, how many rows of each task."""
    if method in MIXTURES:
        return "/".join(str(count) for count in record["rows"].values())
    tried = CONFIGURATIONS.get(method, [{}])
    varied = [
        value for key, value in record["setting"].items() if any(one.get(key) != tried[0].get(key) for one in tried)
    ]
    return " ".join(f"{value[0] if isinstance(value, (list, tuple)) else value:g}" for value in varied)


def spread(values: Sequence[float]) -> str:
    more = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{more}"


if __name__ == "__main__":
    main()

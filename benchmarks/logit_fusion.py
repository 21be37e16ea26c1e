"""How much of fine-tuning a larger model small specialists give it at decoding time, by Dynamic Logits Fusion.

    python benchmarks/logit_fusion.py --out OUT [--seeds 0 1 2] [--workers 1] [--tiny]

The larger model is the demo's. A small one of the same tokenizer is pre-trained here on the same kind of text, once a
seed. Both are fine-tuned on the demo's five tasks (the seed writes their rows): an adapter a task, and one on all tasks
together. The test prompts are then answered greedily by each of SYSTEMS. Two scores: `exact`, the greedy answer is the
label and nothing else; `rank`, the label is the likeliest of the task's labels as first token (every label is one
token). *gap closed* is (system - larger) / (fine-tuned larger - larger), in percent, of the means over tasks: for a
system that knows the task, fine-tuned on that task; for others, on all tasks. Means over seeds ± their standard
deviation. Static weights, alpha = 1, are proxy-tuning. Each finished job is kept in OUT, so the script resumes;
OUT/table.md is written at the end.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from adapters import machine, quiet
from jobs import Job, file_name, records, work
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LogitsProcessor

from folklora import learn
from folklora.demo import demo_options, model_folder
from folklora.demo.tasks import LABELS, demo_tasks
from folklora.demo.world import World, pretraining_text
from folklora.merge import DynamicLogitFusion
from folklora.merge.dynamic_logit_fusion import Shift, fuse
from folklora.stream.run import Run, load_adapters
from folklora.stream.tasks import Task

TUNED_BY = ("per-task", "multi-task")
TINY = {"seeds": [0], "steps": 3, "train_rows": 12, "test_rows": 6, "new_tokens": 4, "repeats": 1}


@dataclass(eq=False, repr=False)
class Watched(DynamicLogitFusion):
    """Keeps every step's weights, [rows, specialists] each."""

    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        fused = super().__call__(input_ids, scores)
        self.seen.append(self.alpha)
        return fused


@dataclass(eq=False, repr=False)
class Static(DynamicLogitFusion):
    """The same weight of every specialist at every step."""

    weight: float = 1.0

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = self.next_logits(input_ids, self._mask(input_ids))
        change = Shift.between(logits[0], logits[1:], banned=scores.isneginf())
        return fuse(scores, change, scores.new_full((len(scores), len(logits) - 1), self.weight))


@dataclass(frozen=True)
class Models:
    """The larger model bare and with its adapters, and the small one with its own: task_0, task_1, ..., mixture."""

    tokenizer: Any
    large: Any
    large_tuned: Any
    small: Any
    tasks: list[Task]

    @property
    def specialists(self) -> list[str]:
        return [f"task_{index}" for index in range(len(self.tasks))]


Answering = tuple[nn.Module, DynamicLogitFusion | None]
"""What generates, and what steers it."""


def alone(size: str, adapter: str | None, models: Models, task: int) -> Answering:
    """A model by itself; the adapter "own" is the task's."""
    model = {"large": models.large_tuned, "small": models.small}[size]
    if adapter is None:
        model.base_model.disable_adapter_layers()
    else:
        model.base_model.enable_adapter_layers()
        model.base_model.set_adapter(f"task_{task}" if adapter == "own" else adapter)
    return model, None


def steered(whose: str, weight: float | str, models: Models, task: int) -> Answering:
    """The larger model with small specialists: weight "dynamic", "share" (1 / their number), or a number."""
    models.small.base_model.enable_adapter_layers()
    names = {"own": [f"task_{task}"], "all": models.specialists, "mixture": ["mixture"]}[whose]
    if weight == "dynamic":
        return models.large, Watched(models.large, models.small, names)
    share = 1 / len(names) if weight == "share" else weight
    return models.large, Static(models.large, models.small, names, weight=share)


SYSTEMS: dict[str, Callable[[Models, int], Answering]] = {
    "larger": partial(alone, "large", None),
    "small": partial(alone, "small", None),
    "small specialist of the task": partial(alone, "small", "own"),
    "small, fine-tuned on all tasks": partial(alone, "small", "mixture"),
    "larger + specialist of the task, dynamic": partial(steered, "own", "dynamic"),
    "larger + specialist of the task, alpha = 1": partial(steered, "own", 1.0),
    "larger + all specialists, dynamic": partial(steered, "all", "dynamic"),
    "larger + all specialists, alpha = 1 each": partial(steered, "all", 1.0),
    "larger + all specialists, alpha = 1/5 each": partial(steered, "all", "share"),
    "larger + small of all tasks, dynamic": partial(steered, "mixture", "dynamic"),
    "larger + small of all tasks, alpha = 1": partial(steered, "mixture", 1.0),
    "larger, fine-tuned on the task": partial(alone, "large", "own"),
    "larger, fine-tuned on all tasks": partial(alone, "large", "mixture"),
}
SPEEDS = {name: SYSTEMS[name] for name in ("larger", "small", *(name for name in SYSTEMS if " + " in name))}


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    do([{"kind": "pretrain", "seed": seed} for seed in options.seeds], options)
    pairs = itertools.product(options.seeds, ("large", "small"))
    do([{"kind": "tune", "size": size, "seed": seed} for seed, size in pairs], options)
    do([{"kind": "score", "seed": seed} for seed in options.seeds], options)
    do([{"kind": "speed", "seed": options.seeds[0], "rows": rows} for rows in options.rows], options, workers=1)
    table = "\n".join([*score_lines(options), "", *speed_lines(options), ""])
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--width", type=int, default=64, help="of the small model")
    parser.add_argument("--layers", type=int, default=2, help="of the small model")
    parser.add_argument("--steps", type=int, default=1500, help="of pre-training it")
    parser.add_argument("--batch", type=int, default=24, help="texts of a step of pre-training")
    parser.add_argument("--length", type=int, default=128, help="tokens of a text of pre-training")
    parser.add_argument("--rate", type=float, default=4e-3, help="of pre-training")
    parser.add_argument("--epochs", type=float, default=2.0, help="of fine-tuning either model")
    parser.add_argument("--train-rows", type=int, default=420)
    parser.add_argument("--test-rows", type=int, default=120)
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 16], help="texts generated at once, for the speed")
    parser.add_argument("--new-tokens", type=int, default=32, help="for the speed")
    parser.add_argument("--repeats", type=int, default=3, help="for the speed")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="a few rows and steps, to try the script")
    options = parser.parse_args()
    if options.tiny:
        vars(options).update(TINY)
    return options


def do(jobs: list[Job], options: argparse.Namespace, workers: int | None = None) -> None:
    named = [(file_name(*job.values()), job) for job in jobs]
    run = partial(one_job, options=options)
    work(named, run, options.out, workers=workers or options.workers, deadline=float("inf"))


def one_job(job: Job, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    torch.set_num_threads(1)
    quiet()
    began = time.perf_counter()
    kinds = {"pretrain": pretrain_job, "tune": tune_job, "score": score_job, "speed": speed_job}
    record = {**job, **kinds[job["kind"]](job, options), "machine": machine()}
    record["seconds"] = round(time.perf_counter() - began, 1)
    return record, f"{record['seconds']:6.1f} s  {' '.join(map(str, job.values()))}"


def small_folder(options: argparse.Namespace, seed: int) -> Path:
    return options.out / f"small-seed{seed}"


def pretrain_job(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Train the small model on the demo world's texts; the held-out loss of both models, in nats a token."""
    torch.manual_seed(job["seed"])
    shape = {"hidden_size": options.width, "intermediate_size": 2 * options.width, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 4, "head_dim": options.width // 4, "num_hidden_layers": options.layers}
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(model_folder(), **shape, dtype="float32"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.rate, weight_decay=0.1, betas=(0.9, 0.95))
    warmup = max(1, options.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (options.steps - step) / max(1, options.steps - warmup))
    )
    batches = reading(job["seed"] + 1, options)
    for _ in range(options.steps):
        tokens = next(batches)
        model(input_ids=tokens, labels=tokens).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    # the shipped model read seed 0's texts; these are nobody's
    held_out = [batch for batch, _ in zip(reading(10_000 + job["seed"], options), range(10), strict=False)]
    model.eval().save_pretrained(small_folder(options, job["seed"]))
    AutoTokenizer.from_pretrained(model_folder()).save_pretrained(small_folder(options, job["seed"]))
    both = {"small": model, "large": larger()}
    return {
        "parameters": {name: one.num_parameters() for name, one in both.items()},
        "held_out_loss": {name: loss(one, held_out) for name, one in both.items()},
        "tokens_read": options.steps * options.batch * options.length,
    }


def larger() -> Any:
    return LlamaForCausalLM.from_pretrained(model_folder(), dtype=torch.float32).eval()


@torch.no_grad()
def loss(model: nn.Module, batches: Sequence[Tensor]) -> float:
    return statistics.mean(float(model(input_ids=tokens, labels=tokens).loss) for tokens in batches)


def reading(seed: int, options: argparse.Namespace) -> Iterator[Tensor]:
    """Batches [texts, tokens] of documents one after another, each ended by the end of text."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder())
    need, queue, world = options.batch * options.length, [], World()
    for part in itertools.count():
        documents = list(pretraining_text(world, seed * 1000 + part, 2000))
        for row in tokenizer(documents, add_special_tokens=False)["input_ids"]:
            queue += [*row, tokenizer.eos_token_id]
        while len(queue) >= need:
            yield torch.tensor(queue[:need]).view(options.batch, options.length)
            queue = queue[need:]


def tune_job(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune one of the models on each task, and on all of them."""
    out = tuned_folder(options, job["size"], job["seed"])
    run = learn(
        model_folder() if job["size"] == "large" else small_folder(options, job["seed"]),
        demo_tasks(job["seed"], options.train_rows, options.test_rows),
        TUNED_BY,
        out=out,
        options={**demo_options(), "evaluate": "last", "epochs": options.epochs},
        seed=job["seed"],
        resume=(out / "run.json").is_file(),
    )
    return {"rank": {method: run.results["methods"][method]["average_accuracy"] for method in TUNED_BY}}


def tuned_folder(options: argparse.Namespace, size: str, seed: int) -> Path:
    return options.out / f"tuned-{size}-seed{seed}"


def tuned(model: Any, run: Run) -> Any:
    """The model with the adapters of all tasks, and that of the mixture."""
    loaded = load_adapters(model, run.adapters("per-task"))
    loaded.load_adapter(str(run.adapters("multi-task")), adapter_name="mixture")
    return loaded.eval()


def models_of(seed: int, options: argparse.Namespace) -> Models:
    small = LlamaForCausalLM.from_pretrained(small_folder(options, seed), dtype=torch.float32)
    return Models(
        AutoTokenizer.from_pretrained(model_folder(), padding_side="left"),
        larger(),
        tuned(larger(), Run.load(tuned_folder(options, "large", seed))),
        tuned(small, Run.load(tuned_folder(options, "small", seed))),
        demo_tasks(seed, options.train_rows, options.test_rows),
    )


def generate(answering: Answering, texts: Any, count: int, **settings: Any) -> Any:
    """Greedy continuations of at most so many tokens."""
    model, fusion = answering
    steering: list[LogitsProcessor] = [] if fusion is None else [fusion.start(texts["attention_mask"])]
    return model.generate(**texts, max_new_tokens=count, do_sample=False, logits_processor=steering, **settings)


def score_job(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """Every system's scores on every task, and what the dynamic weights were at the first token of the answer."""
    models = models_of(job["seed"], options)
    scores: dict[str, dict[str, dict[str, float]]] = {}
    for name, system in SYSTEMS.items():
        scores[name] = {t.name: task_scores(system(models, i), models, i) for i, t in enumerate(models.tasks)}
    return {"scores": scores}


def task_scores(answering: Answering, models: Models, index: int) -> dict[str, float]:
    task, tokenizer, fusion = models.tasks[index], models.tokenizer, answering[1]
    labels = torch.tensor([tokenizer(label, add_special_tokens=False)["input_ids"] for label in task.labels])
    exact, rank, alphas = [], [], []
    for start in range(0, len(task.test), 60):
        rows = task.test[start : start + 60]
        texts = tokenizer([row.prompt for row in rows], return_tensors="pt", padding=True, return_token_type_ids=False)
        found = generate(answering, texts, 2, output_scores=True, return_dict_in_generate=True)
        right = torch.tensor([task.labels.index(row.completion) for row in rows])
        said = found.sequences[:, texts["input_ids"].shape[1] :]
        wanted = torch.cat([labels[right], torch.full_like(labels[right], tokenizer.eos_token_id)], dim=1)
        exact.append((said == wanted).all(dim=1))
        rank.append(found.scores[0][:, labels[:, 0]].argmax(dim=1) == right)
        if isinstance(fusion, Watched):
            alphas.append(fusion.seen[0])
            fusion.seen.clear()
    found = {"exact": percent(torch.cat(exact)), "rank": percent(torch.cat(rank))}
    if alphas:
        alpha = torch.cat(alphas)
        found["alpha"] = float(alpha.sum(dim=1).mean())
        # of one specialist this says nothing
        found["own"] = percent(alpha.argmax(dim=1) == index) if alpha.shape[1] > 1 else 100.0
    return found


def percent(right: Tensor) -> float:
    return 100 * float(right.float().mean())


def speed_job(job: Job, options: argparse.Namespace) -> dict[str, Any]:
    """New tokens a second; the systems take turns, so that a busy machine slows all of them."""
    models = models_of(job["seed"], options)
    prompts = [example.prompt for task in models.tasks for example in task.test]
    chosen = random.Random(0).choices(prompts, k=job["rows"])
    texts = models.tokenizer(chosen, return_tensors="pt", padding=True, return_token_type_ids=False)
    rates: dict[str, list[float]] = {name: [] for name in SPEEDS}
    for turn in range(options.repeats + 1):
        for name, system in SPEEDS.items():
            answering = system(models, 0)
            began = time.perf_counter()
            generate(answering, texts, options.new_tokens, min_new_tokens=options.new_tokens)
            if turn:
                rates[name].append(job["rows"] * options.new_tokens / (time.perf_counter() - began))
    return {"rates": rates}


def score_lines(options: argparse.Namespace) -> list[str]:
    """A table a score: tasks, their mean, and the share of the gap that is closed."""
    found = [record for record in records(options.out, "score") if record["seed"] in options.seeds]
    lines = [f"{len(found)} seeds"]
    for record in records(options.out, "pretrain"):
        lines.append(f"seed {record['seed']}: parameters {record['parameters']}, held-out {record['held_out_loss']}")
    for metric in ("exact", "rank"):
        lines += ["", f"| {metric} | {' | '.join(LABELS)} | mean | gap closed, % |", f"|{' --- |' * (len(LABELS) + 3)}"]
        for name in SYSTEMS:
            values = [[record["scores"][name][task][metric] for record in found] for task in LABELS]
            means = [statistics.mean(column) for column in zip(*values, strict=True)]
            cells = [*map(spread, [*values, means]), gap(found, name, metric)]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    lines += ["", "| dynamic weights, first token | alpha | the task's own chosen, % |", "| --- | --- | --- |"]
    for name in SYSTEMS:
        rows = [record["scores"][name][task] for record in found for task in LABELS]
        if "alpha" in rows[0]:
            alpha, own = (statistics.mean(row[key] for row in rows) for key in ("alpha", "own"))
            lines.append(f"| {name} | {alpha:.2f} | {own:.0f} |")
    return lines


def gap(found: list[dict[str, Any]], name: str, metric: str) -> str:
    if name in ("larger", "small") or name.startswith("larger, "):
        return ""
    bound = "larger, fine-tuned on the task" if "of the task" in name else "larger, fine-tuned on all tasks"

    def mean(record: dict[str, Any], system: str) -> float:
        return statistics.mean(record["scores"][system][task][metric] for task in LABELS)

    shares = []
    for record in found:
        base, best = mean(record, "larger"), mean(record, bound)
        if best <= base:
            return "none"
        shares.append(100 * (mean(record, name) - base) / (best - base))
    return spread(shares)


def spread(values: Sequence[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{deviation}"


def speed_lines(options: argparse.Namespace) -> list[str]:
    """The medians of tokens a second."""
    found = {record["rows"]: record["rates"] for record in records(options.out, "speed")}
    head = " | ".join(f"{rows} rows, tokens/s | ÷ larger" for rows in found)
    lines = [f"| generate | {head} |", f"|{' --- |' * (2 * len(found) + 1)}"]
    for name in SPEEDS:
        cells = []
        for rates in found.values():
            own, plain = statistics.median(rates[name]), statistics.median(rates["larger"])
            cells += [f"{own:.0f}", f"{own / plain:.2f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main()

"""How well each adapter method learns: three classifications, E2E generation and arithmetic, on equal terms.

    python benchmarks/adapters.py --model MODEL --data DATA --out OUT [--stage tune|run|both|table] [--workers N]

MODEL is a folder of a causal model, DATA one with glue/, e2e/ and math/. Contenders: every adapter that
`folklora.methods("adapters")` lists, PEFT's LoRA and DoRA, full fine-tuning; one that cannot be trained by the plain
recipe is named with what it said. All of them adapt every linear layer at `--rank`, with their own defaults otherwise,
or their authors' habit (SETTINGS); a classification's head is trained in full and not counted. AdamW, no weight decay,
6 % warm-up, linear decay, clipping at 1; float32 weights, products in bfloat16 on a GPU.
The learning rate is the best of `--rates`, the same for all, on rows held out of the training data (one seed; by the
score, on E2E by the loss); then each seed trains with it and is scored on test rows. A rate at an end of the grid is
marked *.
E2E: BLEU of greedy answers against all references, and the loss of these. math: whether the tokens of the final number
are the most likely ones after the reference's working (a model of 28 M solves no problem by itself), and the loss of
working and number. Seconds are those of training; with several workers a GPU they hold waiting times.
Jobs are independent: `--workers` share the GPUs, each finished job is kept, so that the script resumes. A job is 150
steps and 3 to 5 forward passes to score (some 192 short ones more for BLEU); a method is 5 tasks × (4 rates + 3 seeds)
= 35 jobs. Tuning comes first, then seed after seed, so that `--minutes` may cut the last seed off.

    python benchmarks/adapters.py --model MODEL --data DATA --out OUT --tiny

does the same with random weights of tiny sizes, in a minute or two on one core of a CPU; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
import warnings
from contextlib import nullcontext
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from adapter_report import write_report
from adapter_tasks import Sizes, Task, batch_of, load_task, measured, training_rows
from jobs import Job, add_options, file_name, records, work
from peft import PeftConfig, TaskType, get_peft_model
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from folklora import AdapterConfig, calibrate, methods
from folklora.adapters.host.steps import activation_penalty

FULL = "full-finetuning"
HEAD = "score"
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
TINY_OPTIONS = {
    "rank": 2, "steps": 2, "batch": 2, "eval_batch": 4, "train_rows": 8, "validation_rows": 4, "test_rows": 4,
    "length": 24, "calibration": 4, "seeds": [0, 1], "rates": [1e-3, 1e-2],
}  # fmt: skip


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + 60 * options.minutes
    if options.stage in ("tune", "both"):
        do(tuning_jobs(options), options, deadline)
    if options.stage in ("run", "both"):
        do(final_jobs(options), options, deadline)
    write_report(options.out, options.tasks, options.methods, options.rates)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--stage", choices=("tune", "run", "both", "table"), default="both")
    parser.add_argument("--methods", nargs="+", default=contenders())
    parser.add_argument("--tasks", nargs="+", default=["sst2", "trec6", "agnews", "e2e", "math"])
    parser.add_argument("--rates", nargs="+", type=float, default=[1e-4, 5e-4, 2e-3, 1e-2])
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--eval-batch", type=int, default=100)
    parser.add_argument("--train-rows", type=int, default=2500)
    parser.add_argument("--validation-rows", type=int, default=300)
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--length", type=int, default=128, help="tokens of a row at the most")
    parser.add_argument("--calibration", type=int, default=256, help="training rows for methods that need statistics")
    parser.add_argument("--minutes", type=float, default=1e6, help="no new job begins after this")
    parser.add_argument("--tiny", action="store_true", help="random weights and a few rows, to try the script")
    options = parser.parse_args()
    if options.tiny:
        vars(options).update(TINY_OPTIONS)
    return options


def contenders() -> list[str]:
    return [method.name for method in methods("adapters")] + ["peft-lora", "peft-dora", FULL]


def tuning_jobs(options: argparse.Namespace) -> list[Job]:
    grid = itertools.product(options.rates, options.tasks, options.methods)
    return [{"kind": "tune", "task": task, "method": m, "rate": rate, "seed": 0} for rate, task, m in grid]


def final_jobs(options: argparse.Namespace) -> list[Job]:
    best = best_rates(records(options.out, "tune"))
    grid = itertools.product(options.seeds, options.tasks, options.methods)
    return [
        {"kind": "run", "task": task, "method": method, "rate": best[method, task], "seed": seed}
        for seed, task, method in grid
        if (method, task) in best
    ]


def best_rates(tuned: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
    """(method, task) → the learning rate with the best score on held-out rows; of equal ones, the lower loss."""
    found: dict[tuple[str, str], tuple[tuple[bool, float, float], float]] = {}
    for record in tuned:
        if "refused" not in record:
            worth = (math.isfinite(record["loss"]), record["score"], -record["loss"])
            key = record["method"], record["task"]
            found[key] = max(found.get(key, (worth, record["rate"])), (worth, record["rate"]))
    return {key: rate for key, (_, rate) in found.items()}


def do(jobs: list[Job], options: argparse.Namespace, deadline: float) -> None:
    named = [(file_name(j["kind"], j["task"], j["method"], f"seed{j['seed']}", f"{j['rate']:g}"), j) for j in jobs]
    work(named, partial(one_job, options=options), options.out, workers=options.workers, deadline=deadline)


def one_job(job: Job, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Train once and score: on held-out rows when tuning, else on test rows."""
    torch.set_num_threads(1)
    quiet()
    sizes = Sizes(options.train_rows, options.validation_rows, options.test_rows, options.length)
    task, tokenizer = prepared(job["task"], options.model, options.data, sizes)
    torch.manual_seed(job["seed"])
    model, passes, began = base_model(task, options), [0], time.perf_counter()
    model.register_forward_pre_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    try:
        model = adapted(model, task, tokenizer, job, options)
        made = time.perf_counter()
        losses = train(model, task, tokenizer, job, options)
    except (ValueError, TypeError, ImportError) as error:
        # a method that needs more than texts says so here, some only when they are called
        return {**job, "refused": str(error)}, f"refused: {job['method']} on {job['task']}: {error}"
    ended = time.perf_counter()
    tuning = job["kind"] == "tune"
    rows = task.validation if tuning else task.test
    with precision(model.device):
        found = measured(model, task, tokenizer, rows, options.eval_batch, generate=not tuning)
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    record = {
        **job, **found, "measure": task.measure, "losses": losses, "steps": options.steps,
        "trained": sum(count for name, count in trained.items() if HEAD not in name.split(".")),
        "start_seconds": round(made - began, 2), "seconds": round(ended - made, 2), "passes": passes[0],
        "machine": machine(),
    }  # fmt: skip
    took = f"{time.perf_counter() - began:6.1f} s"
    return (
        record,
        f"{took}  {found['score']:5.1f}  loss {found['loss']:.3f}  {job['kind']} {job['task']} {job['method']}",
    )


def quiet() -> None:
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore", FutureWarning)


@lru_cache
def prepared(name: str, model: Path, data: Path, sizes: Sizes) -> tuple[Task, PreTrainedTokenizerBase]:
    tokenizer = AutoTokenizer.from_pretrained(model)
    return load_task(name, data, tokenizer, sizes), tokenizer


def base_model(task: Task, options: argparse.Namespace) -> PreTrainedModel:
    kind = AutoModelForSequenceClassification if task.labels else AutoModelForCausalLM
    more = {"num_labels": task.labels} if task.labels else {}
    if options.tiny:
        model = kind.from_config(AutoConfig.from_pretrained(options.model, **more, **TINY), dtype=torch.float32)
    else:
        model = kind.from_pretrained(options.model, dtype=torch.float32, **more)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def adapted(
    model: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase, job: Job, options: argparse.Namespace
) -> nn.Module:
    """The model made ready to train by the job's method."""
    if job["method"] == FULL:
        return model
    config = configured(job["method"], task, job["rate"], options)
    if isinstance(config, AdapterConfig) and config.needs:
        rows = task.train[: options.calibration]
        batches = (
            batch_of(rows[i : i + options.batch], task, tokenizer.pad_token_id, model.device)
            for i in range(0, len(rows), options.batch)
        )
        config = config.calibrated(calibrate(model, batches, config.needs, target_modules=config))
    return get_peft_model(model, config)


def configured(name: str, task: Task, rate: float, options: argparse.Namespace) -> PeftConfig:
    common = {
        "target_modules": "all-linear",
        "task_type": TaskType.SEQ_CLS if task.labels else TaskType.CAUSAL_LM,
        "modules_to_save": [HEAD] if task.labels else None,
    }
    if name.startswith("peft-"):
        # α as in folklora's LoRA
        return peft.LoraConfig(r=options.rank, lora_alpha=16, use_dora=name == "peft-dora", **common)
    factory = next(method.factory for method in methods("adapters") if method.name == name)
    ranked = {"r": options.rank} if isinstance(getattr(factory, "r", None), int) else {}
    if "linear" not in factory.layer_kinds:
        # whole layers of another kind, which such a method finds by itself
        common["target_modules"] = None
    return factory(**{**common, **ranked, **settings(name, rate, options)})


def settings(name: str, rate: float, options: argparse.Namespace) -> dict[str, Any]:
    """What a method's authors tie to the run, or set otherwise than the others do."""
    return {
        # r² parameters a weight: their ranks are several times LoRA's
        "lora-xs": {"r": 8 * options.rank},
        "lora-sb": {"r": 8 * options.rank},
        "sorsa": {"peak_learning_rate": rate},
        "codyra": {"steps": options.steps},
    }.get(name, {})


def train(
    model: nn.Module, task: Task, tokenizer: PreTrainedTokenizerBase, job: Job, options: argparse.Namespace
) -> list[tuple[int, float]]:
    """The recipe that all share; the mean training loss of every fortieth of the steps."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["rate"], weight_decay=0.0)
    warmup, steps = max(1, round(0.06 * options.steps)), options.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    model.train()
    every, window, losses = max(1, steps // 40), torch.zeros((), device=model.device), []
    batches = training_rows(task, options.batch, job["seed"])
    for step in range(1, steps + 1):
        inputs = batch_of(next(batches), task, tokenizer.pad_token_id, model.device)
        with precision(model.device):
            loss = model(**inputs).loss
        extra = activation_penalty(model)
        (loss if extra is None else loss + extra).backward()
        window += loss.detach()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % every == 0:
            losses.append((step, round(float(window) / every, 5)))
            window.zero_()
    return losses


def precision(device: torch.device) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


@lru_cache
def machine() -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{where}, torch {torch.__version__}, peft {peft.__version__}"


if __name__ == "__main__":
    main()

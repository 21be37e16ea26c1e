"""FactorLLM: what a feed-forward layer cut into experts costs in quality, and what it saves in time.

    python benchmarks/factorllm.py --stage cut --data PRETRAIN --out FOLDER
    python benchmarks/factorllm.py --stage both --model MODEL --data FOLDER --out OUT [--workers N]

PRETRAIN holds train.bin.xz and valid.bin as the model's tokens; the first command cuts 4 MB of them, to be carried.
Quality: MODEL's loss on held-out text, in nats a token, before its layers are factored into `--experts`, just after,
and as they are trained for `--steps`, for every K. `router` trains the routers alone, `experts` the experts too, which
is the paper's form; all with the authors' losses, whose teacher is the frozen dense layer. `dense` trains the dense
feed-forward layers for as many steps on the same text at the same rate: what the factored ones are compared with.
AdamW (0.9, 0.95), no weight decay, 6 % warm-up, linear decay, clipping at 1; float32 weights, products in bfloat16 on
a GPU; the held-out loss in float32.
Speed: random weights in bfloat16, one pass of dense, factored and narrower dense models in turn (factorllm_speed.py).
`ms` is with the processor's part; `graph` is a CUDA graph of it. A ratio is to the dense model's pass just before, and
`width 2/4` is the limit: a dense model with as many hidden units as two of four experts have.
Jobs are independent, each finished one is kept, so that the script resumes. `--workers` are for the quality alone: the
speed is measured after it, by one process.

    python benchmarks/factorllm.py --tiny --model MODEL --data FOLDER --out OUT

does the same with few tokens and two steps, in a minute on one core; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import itertools
import lzma
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from factorllm_speed import machine, speed_job, speed_jobs, ways_job
from jobs import Job, file_name, records, work
from peft import get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from folklora import FactorLLM, activation_penalty

CARD = (
    "The paper, on TinyLlama-1.1B and MobileLlama-1.4B: about 85 % of the accuracy kept, over 30 % faster, after "
    "10,000 steps at a rate of 4e-5."
)
TINY = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16,
}  # fmt: skip
TINY_OPTIONS = {"steps": 2, "batch": 2, "length": 16, "held_out": 4, "seeds": [0, 1], "repeats": 2}
# options of each form besides K
FORMS: dict[str, dict[str, Any]] = {
    "router": {},
    "experts": {"train_experts": True},
    "experts, kmeans": {"train_experts": True, "partition": "kmeans"},
    # labels and sum as a router is best taught that leaves out what adds little
    "experts, c=1, subset": {"train_experts": True, "scale": 1.0, "labels": "subset", "prior": "uniform"},
}


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage == "cut":
        return cut(options)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    deadline = time.time() + 60 * options.minutes
    if options.stage in ("quality", "both"):
        do(quality_jobs(options), options, deadline, options.workers)
    if options.stage in ("speed", "both"):
        do(speed_jobs(options), options, deadline, 1)
    table = report(options)
    (options.out / "table.md").write_text(table, encoding="utf-8")
    print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", choices=("cut", "quality", "speed", "both", "table"), default="both")
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=list(FORMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rate", type=float, default=3e-4, help="of experts and of the dense layers")
    parser.add_argument("--router-rate", type=float, default=1e-2)
    parser.add_argument("--held-out", type=int, default=128, help="rows of held-out text")
    parser.add_argument("--repeats", type=int, default=20, help="timed passes")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=1e6, help="no new job begins after this")
    parser.add_argument("--tiny", action="store_true", help="random weights and a few rows, to try the script")
    options = parser.parse_args()
    if options.stage in ("quality", "both") and not (options.model and options.data):
        parser.error("the quality needs --model and --data")
    if options.repeats < 2:
        parser.error("--repeats must be at least 2: the speeds are shown with their quartiles")
    if options.tiny:
        vars(options).update(TINY_OPTIONS)
    return options


def cut(options: argparse.Namespace, train: int = 1_900_000, valid: int = 100_000) -> None:
    """The first tokens of PRETRAIN, each two bytes, little-endian."""
    raw = lzma.decompress((options.data / "train.bin.xz").read_bytes())
    half = len(raw) // 2
    both = bytearray(2 * train)
    both[::2], both[1::2] = raw[:train], raw[half : half + train]
    (options.out / "train.bin").write_bytes(both)
    (options.out / "valid.bin").write_bytes((options.data / "valid.bin").read_bytes()[: 2 * valid])


def do(jobs: list[Job], options: argparse.Namespace, deadline: float, workers: int) -> None:
    named = [(file_name(*job.values()), job) for job in jobs]
    work(named, partial(one_job, options=options), options.out, workers=workers, deadline=deadline)


def one_job(job: Job, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    return {"quality": quality_job, "speed": speed_job, "ways": ways_job}[job["kind"]](job, options)


def quality_jobs(options: argparse.Namespace) -> list[Job]:
    """Seed after seed, so that `--minutes` may cut the last one off."""
    contenders = [("dense", 0)]
    for form in options.forms:
        # with K = E the routers are not felt, and no units are another expert's
        most = options.experts if form == "experts" else options.experts - 1
        contenders += [(form, k) for k in range(1, most + 1)]
    return [
        {"kind": "quality", "form": f, "k": k, "seed": s} for s, (f, k) in itertools.product(options.seeds, contenders)
    ]


def quality_job(job: Job, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """One training, with the held-out loss before, between and after."""
    torch.set_num_threads(1)
    held = tokens_of(options.data / "valid.bin")
    held = held[: options.held_out * options.length].view(-1, options.length)
    torch.manual_seed(job["seed"])
    model, began = base_model(options), time.perf_counter()
    before = held_out_loss(model, held)
    model = factored(model, job, options)
    points = [(0, held_out_loss(model, held))]
    rates = {"router": options.router_rate, "rest": options.rate}
    groups = {which: {"params": [], "lr": rate} for which, rate in rates.items()}
    for name, value in model.named_parameters():
        if value.requires_grad:
            groups["router" if ".router" in name else "rest"]["params"].append(value)
    trained = [value for group in groups.values() for value in group["params"]]
    optimizer = torch.optim.AdamW(
        [group for group in groups.values() if group["params"]], betas=(0.9, 0.95), weight_decay=0.0
    )
    warmup, steps = max(1, round(0.06 * options.steps)), options.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    marks = {math.ceil(steps * part) for part in (0.1, 0.2, 0.4, 0.7, 1)}
    for step, rows in zip(range(1, steps + 1), batches(options, job["seed"]), strict=False):
        train_step(model.train(), rows.to(model.device), trained, optimizer)
        schedule.step()
        if step in marks:
            points.append((step, held_out_loss(model, held)))
    record = {
        **job, "before": before, "points": points, "trained": sum(value.numel() for value in trained),
        "steps": steps, "tokens": steps * options.batch * options.length, "held_out_tokens": held.numel(),
        "experts": options.experts, "rates": [options.rate, options.router_rate], "machine": machine(),
        "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    shown = " ".join(f"{loss:.3f}" for _, loss in points)
    return record, f"{record['seconds']:6.1f} s  {job['form']} K={job['k']} seed {job['seed']}: {before:.3f} | {shown}"


def base_model(options: argparse.Namespace) -> nn.Module:
    if options.tiny:
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(options.model, **TINY), dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def factored(model: nn.Module, job: Job, options: argparse.Namespace) -> nn.Module:
    if job["form"] == "dense":
        for name, value in model.named_parameters():
            value.requires_grad = ".mlp." in name
        return model
    return get_peft_model(model, FactorLLM(experts=options.experts, top_k=job["k"], **FORMS[job["form"]]))


def train_step(model: nn.Module, rows: Tensor, trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    with torch.autocast("cuda", torch.bfloat16) if rows.is_cuda else nullcontext():
        loss = model(input_ids=rows, labels=rows).loss
    extra = activation_penalty(model)
    (loss if extra is None else loss + extra).backward()
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def tokens_of(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint16).long()


def batches(options: argparse.Namespace, seed: int) -> Iterator[Tensor]:
    """Rows from anywhere in the text, the same for every contender of a seed."""
    text, generator = tokens_of(options.data / "train.bin"), torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(text) - options.length, (options.batch,), generator=generator)
        yield torch.stack([text[start : start + options.length] for start in starts])


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: Tensor) -> float:
    """Nats a token."""
    model.eval()
    parts = [part.to(model.device) for part in rows.split(32)]
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in parts]
    return sum(losses) / len(rows)


def report(options: argparse.Namespace) -> str:
    return "\n\n".join(
        part for part in (quality_table(options.out), *speed_tables(options.out), ways_table(options.out)) if part
    )


def quality_table(out: Path) -> str:
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for record in records(out, "quality"):
        found.setdefault((record["form"], record["k"]), []).append(record)
    if not found:
        return ""
    first = next(iter(found.values()))[0]
    steps = [step for step, _ in first["points"]]
    dense = statistics.mean(run["points"][-1][1] for run in found.get(("dense", 0), [first]))
    lines = [
        f"{first['machine']}; {first['experts']} experts, {first['tokens']:,} tokens of training, loss on "
        f"{first['held_out_tokens']:,} held-out ones: {first['before']:.3f} before. {CARD}\n",
        f"| trained | K | parameters | {' | '.join(f'step {step}' for step in steps)} | ± | over trained dense |",
        "| --- | --: | --: |" + " --: |" * (len(steps) + 2),
    ]
    for (form, k), runs in sorted(found.items(), key=lambda item: (item[0][0] != "dense", item[0])):
        columns = [statistics.mean(losses) for losses in zip(*([v for _, v in r["points"]] for r in runs), strict=True)]
        last = [run["points"][-1][1] for run in runs]
        spread = f"{statistics.stdev(last):.3f}" if len(last) > 1 else "-"
        cells = " | ".join(f"{value:.3f}" for value in columns)
        lines.append(
            f"| {form} | {k or '-'} | {runs[0]['trained']:,} | {cells} | {spread} | {columns[-1] - dense:+.3f} |"
        )
    return "\n".join(lines)


def speed_tables(out: Path) -> list[str]:
    tables = []
    for record in records(out, "speed"):
        lines = [
            f"{record['shape']}, {record['work']}, bfloat16, {record['machine']}; median of {record['repeats']}\n",
            "| | ms | ÷ dense | tokens/s | graph, ms | ÷ dense | weights, GiB | activations, GiB |",
            "| --- |" + " --: |" * 7,
        ]
        for name, row in record["rows"].items():
            graph = [f"{row['graph_ms']:.3f}", f"{row['graph_ratio']:.3f}"] if "graph_ms" in row else ["-", "-"]
            memory = "-" if row["activations_gib"] is None else f"{row['activations_gib']:.2f}"
            cells = [f"{row['ms']:.3f}", f"{row['ratio']:.3f}", f"{row['tokens_per_second']:,.0f}", *graph]
            failed = f" ({row['graph_failed']})" if "graph_failed" in row else ""
            cells += [f"{row['weights_gib']:.2f}", memory]
            lines.append(f"| {name}{failed} | {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return tables


def ways_table(out: Path) -> str:
    tables = []
    for record in records(out, "ways"):
        names = list(dict.fromkeys(key for row in record["rows"] for key in row))
        lines = [f"{record['shape']}, one layer, microseconds, {record['machine']}\n", f"| {' | '.join(names)} |"]
        lines += ["|" + " --: |" * len(names)]
        lines += [f"| {' | '.join(str(row.get(name, '-')) for name in names)} |" for row in record["rows"]]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()

"""What a training step costs with an adapter on every linear layer: the frozen base, PEFT's LoRA, Folklora's methods.

    python benchmarks/kernel.py --shape 1b --out results.json

One Llama-shaped base with random weights serves all contenders in turn (inject, measure, unload). Each of their steps
follows one of the bare frozen base's, and its ratio is to that one, so that a machine that drifts spoils no comparison.
A step is forward and backward to the adapters. Every contender takes the same embedded input and also returns the
input's gradient, which is all that the base computes.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import datetime
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import peft
import torch
import transformers
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import folklora
from folklora import AMLoRA, KaSA, LoRA, PiSSA
from folklora.spectrum import bottom_factors, top_factors
from folklora.stream.files import write_json

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
SHAPES = {
    "tiny": (64, 2, 4, 2, 128),
    "28m": (512, 7, 8, 4, 1344),
    "1b": (2048, 16, 32, 8, 8192),
    "8b": (4096, 32, 32, 8, 14336),
}
VOCABULARY = 32_000
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARMUPS = 3
COLUMNS = {
    "trained": ("trainable", ",d"),
    "step, ms": ("step_ms", ".2f"),
    "÷ base": ("ratio", ".3f"),
    "±": ("ratio_half_iqr", ".3f"),
    "with AdamW, ms": ("with_adamw_ms", ".2f"),
    "activations, GiB": ("activation_gib", ".2f"),
    "peak, GiB": ("peak_gib", ".2f"),
    "gradient norm": ("gradient_norm", ".4g"),
}


@dataclass(frozen=True)
class Contender:
    """One row: an adapter (None for the base) and how its step is run."""

    name: str
    config: Callable[[], PeftConfig] | None = None
    float32: bool = True  # PEFT's autocast_adapter_dtype: a float32 adapter over a base of lower precision
    autocast: bool = False  # the forward pass runs under autocast to bfloat16
    same_start: bool = False  # all such start from the same A and B: their losses and gradients must agree
    compiled: bool = False  # each decoder block is


def contenders(rank: int, mixed: bool, compiled: bool) -> list[Contender]:
    """The rows in order; `mixed`: the base is bfloat16 on a GPU, so that the adapter's precision is a choice."""
    common = {"r": rank, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
    theirs = Contender("PEFT LoRA", partial(LoraConfig, lora_alpha=2 * rank, **common), same_start=True)
    low = dataclasses.replace(theirs, name="PEFT LoRA, bf16 adapters", float32=False)
    ours = Contender("Folklora LoRA", partial(LoRA, alpha=2 * rank, **common), same_start=True)
    am_lora = partial(AMLoRA, dropout=0.0, **common)
    four = Contender("Folklora AM-LoRA, 4 tasks", partial(am_lora, tasks=4))
    rows = [
        Contender("Folklora KaSA", partial(KaSA, **common)),
        Contender("Folklora PiSSA", partial(PiSSA, **common)),
        Contender("Folklora AM-LoRA, 1 task", am_lora),
        four,
        Contender("Folklora AM-LoRA, 4 tasks, dropout 0.1", partial(am_lora, tasks=4, dropout=0.1)),
    ]
    if mixed:
        under = [dataclasses.replace(row, name=f"{row.name}, autocast", autocast=True) for row in (theirs, ours)]
        rows = [theirs, under[0], low, ours, under[1], *rows]
    else:
        rows = [theirs, ours, *rows]
    again = [Contender("frozen base"), low if mixed else theirs, ours, four] if compiled else []
    return rows + [dataclasses.replace(row, name=f"{row.name}, compiled", compiled=True) for row in again]


@dataclass
class Bench:
    """The base, its input, and what has been found so far."""

    base: nn.Module
    inputs: Tensor
    labels: Tensor
    repeats: int
    decomposed: int
    reference: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.device, self.cuda = self.inputs.device, self.inputs.is_cuda
        # each of L blocks rounds a few times, and the errors add in squares
        self.bound = 2 * torch.finfo(self.inputs.dtype).eps * self.base.config.num_hidden_layers**0.5
        blocks = self.base.model.layers
        parents = [parent for block in blocks for parent in (block.self_attn, block.mlp)]
        self.places = [(parent, name) for parent in parents for name in LINEAR if hasattr(parent, name)]
        self.places += [(block, "_compiled_call_impl") for block in blocks]
        self.plain = self.parts()

    def parts(self) -> list[Any]:
        """What differs between the base and a contender: the linear layers, and each block's compiled call."""
        return [getattr(owner, name) for owner, name in self.places]

    def put(self, parts: list[Any]) -> None:
        """Make the model the one that `parts` were read from."""
        for (owner, name), part in zip(self.places, parts, strict=True):
            setattr(owner, name, part)


def build(shape: str, device: torch.device, size: tuple[int, int], repeats: int, decomposed: int) -> Bench:
    """A frozen Llama with random weights, made on the device in its final precision, and random tokens for it."""
    sizes = dict(zip(SIZES, SHAPES[shape], strict=True))
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=size[1], use_cache=False, **sizes)
    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        tokens = torch.randint(VOCABULARY, size)
    base.requires_grad_(False).train()
    return Bench(base, base.get_input_embeddings()(tokens), tokens, repeats, decomposed)


def time_start(config: PeftConfig, limit: int) -> dict[str, Any]:
    """Have a configuration's decompositions timed, and all after the first `limit` replaced by copies.

    A step takes as long whatever the values are, and the blocks are alike.
    """
    decompose, made = config.update, []
    found = {"seconds": 0.0, "layers_measured": 0, "layers": 0}

    def update(weight: Tensor) -> nn.Module:
        found["layers"] += 1
        if len(made) == limit:
            return copy.deepcopy(made[(found["layers"] - 1) % len(LINEAR)])
        begun = now(weight.device)
        made.append(decompose(weight))
        found["seconds"] += now(weight.device) - begun
        found["layers_measured"] += 1
        return made[-1]

    config.update = update
    return found


def now(device: torch.device) -> float:
    """Seconds, after all work on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def injected(bench: Bench, contender: Contender) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """The base with the contender's adapter on it, and its start's timing; the plain base again afterwards."""
    model, found = bench.base, {}
    if contender.config is not None:
        config = contender.config()
        if isinstance(config, KaSA | PiSSA):
            found["initialisation"] = time_start(config, bench.decomposed * len(LINEAR))
        model = get_peft_model(bench.base, config, autocast_adapter_dtype=contender.float32).train()
        set_start(model, contender.same_start)
    for block in bench.base.model.layers if contender.compiled else []:
        block.compile(dynamic=False)
    try:
        yield model, found
    finally:
        if contender.config is not None:
            model.unload()
        bench.put(bench.plain)


@torch.no_grad()
def set_start(model: nn.Module, draw_all: bool) -> None:
    """Draw the adapter's values where they are zero (zeros multiply faster than real data), or all that is trained.

    The draws are the same for every adapter with these shapes, and exact in bfloat16.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and (not parameter.any() or (draw_all and parameter.requires_grad)):
            values = torch.randn(parameter.shape, generator=generator, device=device) * 0.02
            parameter.copy_(values.to(torch.bfloat16))


def step(bench: Bench, model: nn.Module, autocast: bool) -> tuple[Tensor, Tensor]:
    """Forward and backward; the loss, and the input with its gradient."""
    inputs = bench.inputs.detach().requires_grad_()
    with torch.autocast(bench.device.type, torch.bfloat16, enabled=autocast):
        loss = model(inputs_embeds=inputs, labels=bench.labels).loss
    loss.backward()
    return loss.detach(), inputs


def mark(device: torch.device) -> Any:
    """A moment in the device's stream of work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(start: Any, end: Any) -> float:
    return 1000 * (end - start) if isinstance(start, float) else start.elapsed_time(end)


def timed(bench: Bench, model: nn.Module, contender: Contender) -> dict[str, Any]:
    """Times of a step and of one with AdamW's, each after one of the base's; medians and quartiles."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=bench.cuda) if trained else None
    adapted, marks = bench.parts(), []
    for _ in range(WARMUPS + bench.repeats):
        bench.put(bench.plain)
        moments = [mark(bench.device)]
        step(bench, bench.base, False)
        moments.append(mark(bench.device))
        bench.put(adapted)
        model.zero_grad(set_to_none=True)
        moments.append(mark(bench.device))
        step(bench, model, contender.autocast)
        moments.append(mark(bench.device))
        if optimizer is not None:
            optimizer.step()
        marks.append([*moments, mark(bench.device)])
    now(bench.device)
    marks = marks[WARMUPS:]
    base, own = ([milliseconds(m[i], m[i + 1]) for m in marks] for i in (0, 2))
    low, ratio, high = statistics.quantiles([b / a for a, b in zip(base, own, strict=True)], n=4)
    found = {"step_ms": statistics.median(own), "base_ms": statistics.median(base), "steps_ms": own, "bases_ms": base}
    if optimizer is not None:
        found["with_adamw_ms"] = statistics.median(milliseconds(m[2], m[4]) for m in marks)
    return found | {"ratio": ratio, "ratio_half_iqr": (high - low) / 2}


def first_steps(bench: Bench, model: nn.Module, contender: Contender) -> dict[str, Any]:
    """Loss, gradients and memory of one step before anything is trained, after one step that warms up."""
    torch.manual_seed(2)
    found: dict[str, Any] = {}
    step(bench, model, contender.autocast)
    model.zero_grad(set_to_none=True)
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    loss, inputs = step(bench, model, contender.autocast)
    if bench.cuda:
        peak = torch.cuda.max_memory_allocated()
        found = {"activation_gib": (peak - before) / 2**30, "peak_gib": peak / 2**30}
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad for p in trained if p.grad is not None] if trained else [inputs.grad]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
    norm = torch.linalg.vector_norm(torch.stack(norms)).item() if norms else 0.0
    found |= {"loss": loss.item(), "gradient_norm": norm, "trainable": sum(p.numel() for p in trained)}
    if len(gradients) < len(trained) or not 0 < norm < float("inf") or not torch.isfinite(loss):
        bench.problems.append(
            f"{contender.name}: loss {loss.item()}, gradient norm {norm}, gradients for {len(gradients)} of "
            f"{len(trained)} parameters"
        )
    elif contender.same_start:
        found["agreement"] = compare(bench, contender, found, [g.float().cpu() for g in gradients])
    return found


def compare(bench: Bench, contender: Contender, found: dict[str, Any], gradients: list[Tensor]) -> dict[str, Any]:
    """Relative differences from the first LoRA, which has the same A and B; a problem where one of ours is beyond."""
    if bench.reference is None:
        bench.reference = found | {"name": contender.name, "gradients": gradients}
    other = bench.reference
    norms = [torch.linalg.vector_norm(g - h) for g, h in zip(gradients, other["gradients"], strict=True)]
    differences = {key: abs(found[key] / other[key] - 1) for key in ("loss", "gradient_norm")}
    differences["gradient"] = torch.linalg.vector_norm(torch.stack(norms)).item() / other["gradient_norm"]
    for key, difference in differences.items():
        # a norm averages over what makes single elements differ
        bound = bench.bound * (2 if key == "gradient" else 1)
        if contender.name.startswith("Folklora") and not difference <= bound:
            bench.problems.append(
                f"{contender.name}: its {key} is {difference:.1e} from that of {other['name']} with the same A and B; "
                f"rounding explains at most {bound:.1e}"
            )
    return {"with": other["name"], **differences}


def measure(bench: Bench, contender: Contender) -> dict[str, Any]:
    """A contender's row."""
    gc.collect()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    if bench.cuda:
        torch.cuda.empty_cache()
    row: dict[str, Any] = {"name": contender.name}
    try:
        with injected(bench, contender) as (model, start):
            row |= start | first_steps(bench, model, contender) | timed(bench, model, contender)
        if contender.compiled:
            counters = torch._dynamo.utils.counters
            row |= {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    except RuntimeError as error:
        # time on a GPU is dear: what one contender does wrong must not cost the other rows
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        bench.problems.append(f"{contender.name}: {row['failed']}")
    print(f"{contender.name}: {row.get('failed') or format(row['ratio'], '.3f')}", flush=True)
    return row


def decompositions(weight: Tensor, rank: int) -> dict[str, float]:
    """Seconds for one weight: our two decompositions, and PyTorch's of the whole spectrum."""
    ways = {
        "top_factors": partial(top_factors, count=rank),
        "bottom_factors": partial(bottom_factors, count=rank),
        "torch.linalg.svd": partial(torch.linalg.svd, full_matrices=False),
    }
    seconds = {}
    for name, way in ways.items():
        way(weight[: 2 * rank, : 2 * rank])
        begun = now(weight.device)
        way(weight)
        seconds[name] = now(weight.device) - begun
    return seconds


def base_row(bench: Bench, first: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The base as a row: the median over all blocks of its steps, the first, the last, and how far they lie apart."""
    times = [row["base_ms"] for row in rows if "base_ms" in row]
    again = first_steps(bench, bench.base, Contender("frozen base"))["loss"]
    if not abs(again / first["loss"] - 1) <= bench.bound:
        bench.problems.append(f"the base's loss was {first['loss']} at first and is {again} now: it was not restored")
    row = first | {"step_ms": statistics.median(times), "first_ms": times[0], "last_ms": times[-1], "ratio": 1.0}
    config, (batch, length) = bench.base.config, bench.labels.shape
    weights = sum(module.weight.numel() for module in bench.base.modules() if isinstance(module, nn.Linear))
    # causal attention has two products forward and five backward, each over half of the pairs of positions
    attention = 7.0 * config.num_hidden_layers * batch * length**2 * config.hidden_size
    speed = (4.0 * batch * length * weights + attention) / row["step_ms"] / 1e9
    return row | {"name": "frozen base", "spread": max(times) / min(times) - 1, "matrix_teraflops_per_second": speed}


def describe(bench: Bench, shape: str, rank: int) -> dict[str, Any]:
    """The machine, the versions and what was measured, in words."""
    processor = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    return {
        "device": torch.cuda.get_device_name() if bench.cuda else processor,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {library.__name__: str(library.__version__) for library in (torch, transformers, peft, folklora)},
        "shape": shape,
        "sizes": dict(zip(SIZES, SHAPES[shape], strict=True)) | {"vocab_size": VOCABULARY},
        "parameters": sum(p.numel() for p in bench.base.parameters()),
        "dtype": str(bench.inputs.dtype).removeprefix("torch."),
        "batch": list(bench.labels.shape),
        "rank": rank,
    }


def markdown(machine: dict[str, Any], rows: list[dict[str, Any]], one: dict[str, float]) -> str:
    """The figures as a table between the machine and what does not fit in a table."""
    size = " x ".join(map(str, machine["batch"]))
    notes = [f"- base {rows[0]['first_ms']:.2f} ms at first, {rows[0]['last_ms']:.2f} at last, "]
    notes[0] += f"its medians within {rows[0]['spread']:.1%}; {rows[0]['matrix_teraflops_per_second']:.3g} TFLOP/s"
    for row in rows:
        if agreement := row.get("agreement"):
            found = ", ".join(f"{key} {agreement[key]:.1e}" for key in ("loss", "gradient_norm", "gradient"))
            notes.append(f"- {row['name']} from {agreement['with']}, same A and B: {found}")
        if start := row.get("initialisation"):
            seconds = start["seconds"] * start["layers"] / start["layers_measured"]
            notes.append(f"- {row['name']} starts in {seconds:.1f} s ({{layers_measured}} of {{layers}} layers ")
            notes[-1] = notes[-1].format(**start) + "measured)"
    notes.append(
        "- one float32 weight, hidden x hidden: " + ", ".join(f"{name} {value:.3f} s" for name, value in one.items())
    )
    table = [f"| contender | {' | '.join(COLUMNS)} |", "| --- |" + " --: |" * len(COLUMNS)]
    for row in rows:
        cells = [format(row[key], form) if key in row else "-" for key, form in COLUMNS.values()]
        table.append(f"| {row['name']}{': ' + row['failed'] if 'failed' in row else ''} | {' | '.join(cells)} |")
    title = f"{machine['device']}, torch {machine['versions']['torch']}, {machine['date'][:10]}: Llama "
    title += f"{machine['shape']}, {machine['dtype']}, batch {size}, rank {machine['rank']}"
    return "\n".join([*notes, "", title, "", *table])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="8 on a GPU (4 for 8b), 1 on a CPU")
    parser.add_argument("--length", type=int, help="2048 on a GPU, 64 on a CPU")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--init-blocks", type=int, help="blocks whose weights are decomposed (all; 2 for 8b)")
    parser.add_argument("--compile", action="store_true", help="add compiled variants")
    parser.add_argument("--out", help="write the figures here, as JSON")
    args = parser.parse_args()
    cuda, large = args.device == "cuda", args.shape == "8b"
    size = (args.batch or ((4 if large else 8) if cuda else 1), args.length or (2048 if cuda else 64))
    blocks = args.init_blocks or (2 if large else SHAPES[args.shape][1])
    bench = build(args.shape, torch.device(args.device), size, args.repeats, blocks)
    first = first_steps(bench, bench.base, Contender("frozen base"))
    rows = [measure(bench, contender) for contender in contenders(args.rank, cuda, args.compile)]
    rows.insert(0, base_row(bench, first, rows))
    machine = describe(bench, args.shape, args.rank)
    one = decompositions(bench.base.model.layers[0].self_attn.q_proj.weight.float(), args.rank)
    if args.out:
        results = {"machine": machine, "rows": rows, "one_weight_seconds": one, "problems": bench.problems}
        write_json(args.out, results)
    print("\n" + markdown(machine, rows, one))
    if bench.problems:
        print("\nPROBLEMS\n" + "\n".join(bench.problems))
    return 1 if bench.problems else 0


if __name__ == "__main__":
    sys.exit(main())

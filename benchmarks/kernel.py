"""What a training step costs with an adapter on every linear layer: the frozen base, PEFT's LoRA, Folklora's methods.

    python benchmarks/kernel.py --shape 1b --out results.json

One Llama-shaped base with random weights serves all contenders in turn (inject, measure, unload). Each of their steps
follows one of the bare frozen base's, and its ratio is to that one: a machine that drifts spoils no comparison.
A step is forward and backward to the adapters and to the embedded input, whose gradient is all that the base computes.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import peft
import torch
import transformers
from kernel_contenders import LINEAR, PLAIN, Contender, contenders
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from transformers import AutoModelForCausalLM, LlamaConfig

import folklora
from folklora.adapters.host.layer import layers_of
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
WARMUPS = 1  # a third, after the two of first_steps
COLUMNS = {
    "trained": ("trainable", ",d"),
    "step, ms": ("step_ms", ".2f"),
    "÷ base": ("ratio", ".3f"),
    "±": ("ratio_half_iqr", ".3f"),
    "with AdamW, ms": ("with_adamw_ms", ".2f"),
    "activations, GiB": ("activation_gib", ".2f"),
    "peak, GiB": ("peak_gib", ".2f"),
    "gradient norm": ("gradient_norm", ".4g"),
    "from PEFT's": ("gradient_from_peft", ".1e"),
    "start, s": ("start_seconds", ".1f"),
}
SHOWN = ("ratio", "step_ms", "with_adamw_ms", "base_ms", "activation_gib")


@dataclass
class Bench:
    """The base, its input, and what has been found so far."""

    base: nn.Module
    inputs: Tensor
    labels: Tensor
    options: argparse.Namespace
    reference: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.cuda = self.inputs.is_cuda
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


def build(options: argparse.Namespace) -> Bench:
    """A frozen Llama with random weights, made on the device in its final precision, and random tokens for it."""
    sizes = dict(zip(SIZES, SHAPES[options.shape], strict=True))
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=options.length, use_cache=False, **sizes)
    if options.liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama(cross_entropy=False, fused_linear_cross_entropy=False)
    torch.manual_seed(0)
    with torch.device(options.device):
        base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype), attn_implementation="sdpa")
        tokens = torch.randint(VOCABULARY, (options.batch, options.length))
    base.requires_grad_(False).train()
    return Bench(base, base.get_input_embeddings()(tokens), tokens, options)


def time_start(config: PeftConfig, limit: int) -> dict[str, Any]:
    """Have a configuration's decompositions timed; after `limit` copies of them do, and count as long."""
    decompose, made = config.update, []
    found = {"start_layers": 0, "start_seconds": 0.0}

    def update(weight: Tensor) -> nn.Module:
        found["start_layers"] += 1
        if len(made) == limit:
            found["start_seconds"] *= found["start_layers"] / (found["start_layers"] - 1)
            return copy.deepcopy(made[(found["start_layers"] - 1) % len(LINEAR)])
        begun = now()
        made.append(decompose(weight))
        found["start_seconds"] += now() - begun
        return made[-1]

    config.update = update
    return found


def now() -> float:
    """Seconds, after all work on the device is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def injected(bench: Bench, contender: Contender) -> Iterator[tuple[nn.Module, dict[str, Any]]]:
    """The base with the contender's adapter on it, and its start's timing; the plain base again afterwards."""
    model, start, limit = bench.base, {}, bench.options.init_blocks * len(LINEAR)
    try:
        if contender.config is not None:
            config = contender.config()
            start = time_start(config, limit) if contender.decomposes else {}
            model = get_peft_model(bench.base, config, autocast_adapter_dtype=contender.float32).train()
            for index in range(1, contender.together):
                model.add_adapter(f"other{index}", contender.config())
            model.base_model.set_adapter(list(model.peft_config))
            for layer in layers_of(model) if contender.apart else ():
                layer.siblings = []
            set_start(model, contender.same_start)
        for block in bench.base.model.layers if contender.compiled else []:
            block.compile(dynamic=False)
        yield model, start
    finally:
        if model is not bench.base:
            model.unload()
        bench.put(bench.plain)


@torch.no_grad()
def set_start(model: nn.Module, draw_all: bool) -> None:
    """Draw the adapter's values where they are zero (zeros multiply faster than real data), or all that is trained."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name and (not parameter.any() or (draw_all and parameter.requires_grad)):
            values = torch.randn(parameter.shape, generator=generator, device=device) * 0.02
            # exact in either precision, so that adapters of both can start alike
            parameter.copy_(values.to(torch.bfloat16))


def step(bench: Bench, model: nn.Module, contender: Contender = PLAIN) -> tuple[Tensor, Tensor]:
    """Forward and backward; the loss, and the input with its gradient."""
    inputs, more = bench.inputs.detach().requires_grad_(), {}
    if contender.rows:
        names = list(model.peft_config)
        more = {"adapter_names": [names[row % len(names)] for row in range(len(inputs))]}
    with torch.autocast(bench.inputs.device.type, torch.bfloat16, enabled=contender.autocast):
        loss = model(inputs_embeds=inputs, labels=bench.labels, **more).loss
    loss.backward()
    return loss.detach(), inputs


def timed(bench: Bench, model: nn.Module, contender: Contender) -> dict[str, Any]:
    """Times of a step and of one with AdamW's, each after one of the base's; medians and quartiles."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=bench.cuda) if trained else None
    adapted, base, own, whole = bench.parts(), [], [], []
    for _ in range(WARMUPS + bench.options.repeats):
        bench.put(bench.plain)
        begun = mark(bench)
        step(bench, bench.base)
        base.append((begun, mark(bench)))
        bench.put(adapted)
        model.zero_grad(set_to_none=True)
        begun = mark(bench)
        step(bench, model, contender)
        own.append((begun, mark(bench)))
        if optimizer is not None:
            optimizer.step()
            whole.append((begun, mark(bench)))
    now()
    bases, steps = milliseconds(base), milliseconds(own)
    low, ratio, high = statistics.quantiles([b / a for a, b in zip(bases, steps, strict=True)], n=4)
    found = {"step_ms": statistics.median(steps), "base_ms": statistics.median(bases), "all_ms": [bases, steps]}
    found |= {"with_adamw_ms": statistics.median(milliseconds(whole))} if whole else {}
    return found | {"ratio": ratio, "ratio_half_iqr": (high - low) / 2}


def mark(bench: Bench) -> Any:
    """A moment in the device's stream of work."""
    return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True)) if bench.cuda else now()


def milliseconds(laps: list[tuple[Any, Any]]) -> list[float]:
    return [1000 * (b - a) if isinstance(a, float) else a.elapsed_time(b) for a, b in laps[WARMUPS:]]


def first_steps(bench: Bench, model: nn.Module, contender: Contender) -> dict[str, Any]:
    """Loss, gradients and memory of one step before anything is trained, after one step that warms up.

    Raises:
        RuntimeError: The loss or the gradients are not finite, or a gradient is missing, or all are zero.
    """
    torch.manual_seed(2)
    found: dict[str, Any] = {}
    step(bench, model, contender)
    model.zero_grad(set_to_none=True)
    if bench.cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    loss, inputs = step(bench, model, contender)
    if bench.cuda:
        peak = torch.cuda.max_memory_allocated()
        found = {"activation_gib": (peak - before) / 2**30, "peak_gib": peak / 2**30}
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = [p.grad.float() for p in trained if p.grad is not None] if trained else [inputs.grad.float()]
    norm = get_total_norm(gradients).item()
    found |= {"loss": loss.item(), "gradient_norm": norm, "trainable": sum(p.numel() for p in trained)}
    if len(gradients) < len(trained) or not 0 < norm < float("inf") or not torch.isfinite(loss):
        raise RuntimeError(f"loss {loss}, gradient norm {norm}, {len(gradients)} of {len(trained)} gradients")
    if contender.same_start:
        found |= compare(bench, contender.name, found, [g.cpu() for g in gradients])
    return found


def compare(bench: Bench, name: str, found: dict[str, Any], gradients: list[Tensor]) -> dict[str, float]:
    """Relative differences from the first LoRA, which has the same A and B; a problem where one of ours is beyond."""
    if bench.reference is None and not name.startswith("PEFT"):
        return {}
    if bench.reference is None:
        bench.reference = found | {"gradients": gradients}
    peft_found = bench.reference
    differences = {key: abs(found[key] / peft_found[key] - 1) for key in ("loss", "gradient_norm")}
    apart = get_total_norm([g - h for g, h in zip(gradients, peft_found["gradients"], strict=True)]).item()
    differences["gradient"] = apart / peft_found["gradient_norm"]
    for key, difference in differences.items():
        # a norm averages over what makes single elements differ
        bound = bench.bound * (2 if key == "gradient" else 1)
        if name.startswith("Folklora") and not difference <= bound:
            bench.problems.append(f"{name}: {key} {difference:.1e} from PEFT's, beyond rounding's {bound:.1e}")
    return {f"{key}_from_peft": difference for key, difference in differences.items()}


def measure(bench: Bench, contender: Contender) -> dict[str, Any]:
    """A contender's row."""
    gc.collect()
    torch.cuda.empty_cache()
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    row: dict[str, Any] = {"name": contender.name}
    try:
        with injected(bench, contender) as (model, start):
            row |= start | first_steps(bench, model, contender) | timed(bench, model, contender)
        if contender.compiled:
            row |= {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
    except torch.OutOfMemoryError:
        row["failed"] = "out of memory"
    except RuntimeError as error:
        # time on a GPU is dear: what one contender does wrong must not cost the other rows
        row["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        bench.problems.append(f"{contender.name}: {row['failed']}")
    shown = row.get("failed") or " ".join(f"{key} {row[key]:.4g}" for key in SHOWN if key in row)
    print(f"{contender.name}: {shown}", flush=True)
    return row


def decompositions(weight: Tensor, rank: int) -> dict[str, float]:
    """Seconds for one weight: our two decompositions, and PyTorch's of the whole spectrum."""
    ways = {
        "top_factors": partial(top_factors, count=rank),
        "bottom_factors": partial(bottom_factors, count=rank),
        "torch.linalg.svd": partial(torch.linalg.svd, full_matrices=False),
    }
    seconds, small = {}, max(rank, len(weight) // 4)
    for name, way in ways.items():
        way(weight[:small, :small])
        begun = now()
        way(weight)
        seconds[name] = now() - begun
    return seconds


def base_row(bench: Bench, first: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The base as a row: the median over all rows' medians of it, the first, the last, and how far they lie apart."""
    times = [row["base_ms"] for row in rows if "base_ms" in row]
    again = first_steps(bench, bench.base, PLAIN)["loss"]
    if not abs(again / first["loss"] - 1) <= bench.bound:
        bench.problems.append(f"the base's loss was {first['loss']} at first and is {again} now: it was not restored")
    row = first | {"name": "frozen base", "step_ms": statistics.median(times), "ratio": 1.0}
    weights = sum(module.weight.numel() for module in bench.base.modules() if isinstance(module, nn.Linear))
    # causal attention has two products forward and five backward, each over half of the pairs of positions
    attention = 7.0 * bench.inputs.numel() * bench.options.length * len(bench.base.model.layers)
    speed = (4.0 * bench.labels.numel() * weights + attention) / row["step_ms"] / 1e9
    return row | {"medians_ms": times, "spread": max(times) / min(times) - 1, "matrix_teraflops_per_second": speed}


def markdown(about: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The figures as a table, after what does not fit in it."""
    times, one = rows[0]["medians_ms"], about["one_weight_seconds"].items()
    table = [f"| contender | {' | '.join(COLUMNS)} |", "| --- |" + " --: |" * len(COLUMNS)]
    for row in rows:
        cells = [format(row[key], form) if key in row else "-" for key, form in COLUMNS.values()]
        table.append(f"| {row['name']}{': ' + row['failed'] if 'failed' in row else ''} | {' | '.join(cells)} |")
    return (
        f"\n{about['machine']}, torch {about['versions']['torch']}, {about['date'][:10]}: Llama {about['shape']}, "
        f"{about['dtype']}, batch {about['batch']} x {about['length']}, rank {about['rank']}\n\n"
        f"- Base: first {times[0]:.2f} ms, last {times[-1]:.2f} ms, all within {rows[0]['spread']:.1%}; "
        f"{rows[0]['matrix_teraflops_per_second']:.3g} TFLOP/s in matrix products\n- Memory: of a step without AdamW\n"
        f"- Start: timed in {about['init_blocks']} of {about['sizes']['num_hidden_layers']} blocks and scaled to all; "
        f"one float32 weight, hidden x hidden: {', '.join(f'{name} {value:.3f} s' for name, value in one)}\n\n"
    ) + "\n".join(table)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, help="8 on a GPU (4 for 8b), 1 on a CPU")
    parser.add_argument("--length", type=int, help="2048 on a GPU, 64 on a CPU")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10, help="timed steps, at least 2")
    parser.add_argument("--init-blocks", type=int, help="blocks whose weights are decomposed (all; 2 for 8b)")
    parser.add_argument("--compile", action="store_true", help="add compiled variants")
    parser.add_argument("--liger", action="store_true", help="the base has Liger's norms, activations and rotations")
    parser.add_argument("--only", nargs="+", help="measure the rows whose names begin so, not all")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no new row after so many")
    parser.add_argument("--out", help="write the figures here, as JSON")
    options = parser.parse_args()
    cuda, large = options.device == "cuda", options.shape == "8b"
    options.dtype = "bfloat16" if cuda else "float32"
    options.batch = options.batch or ((4 if large else 8) if cuda else 1)
    options.length = options.length or (2048 if cuda else 64)
    options.init_blocks = options.init_blocks or (2 if large else SHAPES[options.shape][1])
    return options


def main() -> int:
    options = read_options()
    bench = build(options)
    first = first_steps(bench, bench.base, PLAIN)
    # first, so that the decompositions that are timed for the rows start warm
    seconds = decompositions(bench.base.model.layers[0].self_attn.q_proj.weight.float(), options.rank)
    wanted = contenders(options.rank, options.dtype != "float32", options.compile)
    if options.only:
        wanted = [one for one in wanted if one.name.startswith(tuple(options.only))]
    deadline = now() + 60 * options.minutes
    rows = [measure(bench, one) for one in wanted if now() < deadline]
    rows.insert(0, base_row(bench, first, rows))
    processor = f"CPU {platform.machine()}, {torch.get_num_threads()} threads"
    about = vars(options) | {
        "machine": torch.cuda.get_device_name() if bench.cuda else processor,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": {library.__name__: str(library.__version__) for library in (torch, transformers, peft, folklora)},
        "sizes": dict(zip(SIZES, SHAPES[options.shape], strict=True)) | {"vocab_size": VOCABULARY},
        "one_weight_seconds": seconds,
    }
    if options.out:
        write_json(options.out, about | {"rows": rows, "problems": bench.problems})
    print(markdown(about, rows), *(f"PROBLEM: {problem}" for problem in bench.problems), sep="\n")
    return 1 if bench.problems else 0


if __name__ == "__main__":
    raise SystemExit(main())

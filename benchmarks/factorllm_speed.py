"""The speed part of benchmarks/factorllm.py: dense models, factored ones, and dense ones of their width, in turn."""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from jobs import Job
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import silu
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

from folklora import FactorLLM
from folklora.adapters.host.feed_forward import FeedForward
from folklora.adapters.host.routed import few, grouped, masked, one_by_one, routed

SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
SHAPES = {"tiny": (64, 2, 4, 2, 128), "28m": (512, 7, 8, 4, 1344), "1b": (2048, 16, 32, 8, 8192)}
VOCABULARY = 32_000
# rows, their new positions, and those that are in the cache before
WORK = {"decode 1": (1, 1, 512), "decode 32": (32, 1, 512), "prefill 8x512": (8, 512, 0)}
TOKENS = (1, 2, 8, 32, 128, 256, 512, 1024, 4096)
WARMUPS = 3
Call = Callable[[], Any]


def speed_jobs(options: argparse.Namespace) -> list[Job]:
    shapes = ["tiny"] if options.tiny else ["28m", "1b"]
    jobs = [{"kind": "speed", "shape": shape, "work": work} for shape in shapes for work in WORK]
    return [*jobs, *({"kind": "ways", "shape": shape} for shape in shapes)]


@torch.no_grad()
def speed_job(job: Job, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """One pass of every contender in turn, eagerly, and on a GPU as a graph that it runs without the processor."""
    rows, positions, before = (min(n, 4) if options.tiny else n for n in WORK[job["work"]])
    calls, weights = {}, {}
    for name, model in models(job["shape"], options.experts).items():
        calls[name] = partial(one_pass, model, *inputs(model.config, rows, positions, before))
        weights[name] = sum(value.nbytes for value in model.parameters())
    record = {**job, "machine": machine(), "repeats": options.repeats, "experts": options.experts, "rows": {}}
    eager, graphs = timed(calls, options.repeats), {}
    if torch.cuda.is_available():
        graphs = timed({name: captured(call) for name, call in calls.items()}, options.repeats)
    for name, call in calls.items():
        row = {**eager[name], "tokens_per_second": 1000 * rows * positions / eager[name]["ms"]}
        row |= {f"graph_{key}": value for key, value in graphs.get(name, {}).items()}
        row |= {"weights_gib": weights[name] / 2**30, "activations_gib": activations(call)}
        record["rows"][name] = row
    shown = "  ".join(f"{name} {row.get('graph_ms', row['ms']):.2f}" for name, row in record["rows"].items())
    return record, f"{job['shape']} {job['work']}, ms: {shown}"


def models(shape: str, experts: int) -> dict[str, nn.Module]:
    """Random weights: dense, dense of the width of K experts, and factored with K of them for each token."""
    dense = built(shape, 1.0)
    found = {"dense": dense}
    for k in range(1, experts + 1):
        torch.manual_seed(k)
        config = FactorLLM(experts=experts, top_k=k)
        found[f"K={k}"] = get_peft_model(copy.deepcopy(dense), config, autocast_adapter_dtype=False).eval()
    found |= {f"width {k}/{experts}": built(shape, k / experts) for k in range(1, experts)}
    return found


def built(shape: str, part: float) -> nn.Module:
    sizes = dict(zip(SIZES, SHAPES[shape], strict=True))
    sizes["intermediate_size"] = round(part * sizes["intermediate_size"])
    config = LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=1024, tie_word_embeddings=True, **sizes)
    torch.manual_seed(0)
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval()


def inputs(config: LlamaConfig, rows: int, positions: int, before: int) -> tuple[Tensor, Tensor, list[Any]]:
    """Tokens, their places, and keys and values of the positions before them."""
    tokens = torch.randint(VOCABULARY, (rows, positions), device=device())
    places = torch.arange(before, before + positions, device=device()).expand(rows, -1)
    shape = (rows, config.num_key_value_heads, before, config.hidden_size // config.num_attention_heads)
    count = 2 * config.num_hidden_layers
    values = [torch.randn(shape, device=device(), dtype=torch.bfloat16) for _ in range(count)]
    return tokens, places, list(zip(values[::2], values[1::2], strict=True))


def one_pass(model: nn.Module, tokens: Tensor, places: Tensor, past: list[Any]) -> Tensor:
    cache = DynamicCache()
    for number, (keys, values) in enumerate(past):
        cache.update(keys[:, :, :0], values[:, :, :0], number)
        # put in their place, where an update would copy them
        cache.layers[number].keys, cache.layers[number].values = keys, values
    return model(input_ids=tokens, position_ids=places, past_key_values=cache, use_cache=True).logits


def captured(call: Call) -> Call | str:
    """A replay of what the call does on the GPU, or why there is none."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARMUPS):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        # time on a GPU is dear: the other rows are worth having
        return str(error).splitlines()[0]
    return graph.replay


def timed(calls: dict[str, Call | str], repeats: int) -> dict[str, dict[str, Any]]:
    """Medians of milliseconds, and of the ratio to the first one's time of the same round, with its quartiles."""
    laps: dict[str, list[float]] = {name: [] for name, call in calls.items() if not isinstance(call, str)}
    for _ in range(WARMUPS + repeats):
        for name in laps:
            begun = now()
            calls[name]()
            laps[name].append(1000 * (now() - begun))
    found = {name: {"failed": call} for name, call in calls.items() if isinstance(call, str)}
    first = next(iter(laps.values()), [])[WARMUPS:]
    for name, times in laps.items():
        low, ratio, high = statistics.quantiles([b / a for a, b in zip(first, times[WARMUPS:], strict=True)], n=4)
        found[name] = {"ms": statistics.median(times[WARMUPS:]), "ratio": ratio, "low": low, "high": high}
    return found


def now() -> float:
    """Seconds, after all work on the device is done."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def activations(call: Call) -> float | None:
    """The peak of memory over what lay there before, in GiB."""
    if not torch.cuda.is_available():
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


@torch.no_grad()
def ways_job(job: Job, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Ways to the sum of the chosen experts, in microseconds a layer, by the number of tokens.

    Four layers in turn, so that none finds its weights in a cache.
    """
    d, *_, f = SHAPES[job["shape"]]
    shapes = ((f, d), (d, f), (f, d))
    layers = [
        FeedForward(silu, *(0.02 * torch.randn(s, device=device(), dtype=torch.bfloat16) for s in shapes))
        for _ in range(4)
    ]
    record: dict[str, Any] = {**job, "machine": machine(), "experts": options.experts, "rows": []}
    for tokens in TOKENS[:3] if options.tiny else TOKENS:
        x = torch.randn(tokens, d, device=device(), dtype=torch.bfloat16)
        for k in range(1, options.experts):
            chosen = torch.rand(tokens, options.experts, device=device()).topk(k).indices
            contenders = [masked, one_by_one, routed]
            contenders += [few] if tokens * k <= 2 * options.experts else []
            # bfloat16 products of a CPU's would be timed otherwise
            contenders += [grouped] if torch.cuda.is_available() else []
            calls = {"dense": partial(in_turn, layers, FeedForward.sum, x)}
            for way in contenders:
                calls[way.__name__] = partial(in_turn, layers, partial(_swapped, way, chosen, options.experts), x)
            if torch.cuda.is_available():
                # the one that waits for the device makes no graph
                calls = {name: call if name == "one_by_one" else captured(call) for name, call in calls.items()}
            found = timed(calls, options.repeats)
            times = {name: round(250 * row["ms"], 1) for name, row in found.items() if "ms" in row}
            record["rows"].append({"tokens": tokens, "k": k, **times})
    return record, f"{job['shape']} ways done"


def in_turn(layers: list[FeedForward], compute: Callable[[FeedForward, Tensor], Tensor], x: Tensor) -> None:
    for layer in layers:
        compute(layer, x)


def _swapped(way: Callable[..., Tensor], chosen: Tensor, experts: int, layer: FeedForward, x: Tensor) -> Tensor:
    return way(x, chosen, layer, experts)


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def machine() -> str:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return f"{where}, torch {torch.__version__}, transformers {transformers.__version__}"

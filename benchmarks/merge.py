"""Seconds, bytes a second and peak memory of merging models on disk; mergekit beside it where it is installed.

Random Llama-shaped checkpoints in bfloat16 (a base and two that were "tuned" from it) are written to a scratch folder.
Each merge is a process of its own, from its start to the last byte on the disk; *CPU seconds* are what it computed, and
count where others use the machine too. Peak memory is the largest resident set of one process, in which pages of input
files count while they are mapped. The row *nothing* is the start of the program alone.

    python benchmarks/merge.py --shape 1b --scratch /tmp/merge --mergekit VENV/bin/mergekit-yaml
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SHAPES = {
    "small": {
        "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
        "num_key_value_heads": 4, "vocab_size": 32000, "tie_word_embeddings": True,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
    },
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"each": {"weight": 1.0}},
    "slerp": {"whole": {"t": 0.5}, "base": True, "models": 1},
    "task_arithmetic": {"each": {"weight": 0.5}, "base": True},
    "ties": {"each": {"weight": 0.5, "density": 0.5}, "base": True},
    "dare_ties": {"each": {"weight": 0.5, "density": 0.5}, "base": True},
    "sce": {"whole": {"select_topk": 0.5}, "base": True},
}
_SHARD_LAYERS = 8


def shapes_of(config: dict[str, Any]) -> list[dict[str, tuple[int, ...]]]:
    """Names and shapes of a Llama's tensors, file by file."""
    width, inner = config["hidden_size"], config["intermediate_size"]
    narrow = width // config["num_attention_heads"] * config["num_key_value_heads"]
    vocabulary = (config["vocab_size"], width)
    files = [{"model.embed_tokens.weight": vocabulary}]
    for first in range(0, config["num_hidden_layers"], _SHARD_LAYERS):
        files.append({})
        for layer in range(first, min(first + _SHARD_LAYERS, config["num_hidden_layers"])):
            parts = {
                "self_attn.q_proj": (width, width), "self_attn.k_proj": (narrow, width),
                "self_attn.v_proj": (narrow, width), "self_attn.o_proj": (width, width),
                "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner),
                "input_layernorm": (width,), "post_attention_layernorm": (width,),
            }  # fmt: skip
            files[-1].update({f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()})
    files[-1]["model.norm.weight"] = (width,)
    if not config["tie_word_embeddings"]:
        files.append({"lm_head.weight": vocabulary})
    return files


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own: a program that is started has its starter's size as its least peak."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def write_models(root: Path, config: dict[str, Any]) -> None:
    """Write base, a and b."""
    total = 0
    files = shapes_of(config)
    for name in ("base", "a", "b"):
        (root / name).mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for index, shapes in enumerate(files):
        base = {key: (torch.randn(s, generator=generator) * 0.02).bfloat16() for key, s in shapes.items()}
        file = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
        save_file(base, root / "base" / file, metadata={"format": "pt"})
        total += sum(value.nbytes for value in base.values())
        for name in ("a", "b"):
            moved = {k: v + (torch.randn(v.shape, generator=generator) * 0.002).bfloat16() for k, v in base.items()}
            save_file(moved, root / name / file, metadata={"format": "pt"})
    places = {k: f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i, s in enumerate(files) for k in s}
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **config}
    for name in ("base", "a", "b"):
        (root / name / "config.json").write_text(json.dumps(settings))
        index_file = {"metadata": {"total_size": total}, "weight_map": places}
        (root / name / "model.safetensors.index.json").write_text(json.dumps(index_file))


def request(root: Path, method: str) -> dict[str, Any]:
    """A configuration that both take as it is; both compute in float32."""
    given = METHODS[method]
    models: list[dict[str, Any]] = [
        {"model": str(root / name), "parameters": dict(given.get("each", {}))}
        for name in ("a", "b")[: given.get("models", 2)]
    ]
    config = {"merge_method": method, "models": models, "parameters": given.get("whole", {})}
    if given.get("base"):
        config["base_model"] = str(root / "base")
    return {**config, "dtype": "float32", "out_dtype": "bfloat16"}


def measure(words: list[str], out: Path, log: Path) -> tuple[float, float, int]:
    """Run a process: seconds until all is on the disk, those of computing in it, and its peak memory in bytes."""
    os.sync()
    start = time.monotonic()
    with log.open("ab") as file:
        process = os.posix_spawnp(
            words[0], words, os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, file.fileno(), 1), (os.POSIX_SPAWN_DUP2, file.fileno(), 2)],
        )  # fmt: skip
        _, status, usage = os.wait4(process, 0)
    for path in out.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
    if status:
        raise SystemExit(f"{' '.join(words)} ended with status {status}; see {log}")
    return time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def tensors_of(folder: Path) -> dict[str, Path]:
    """Where each tensor of a folder is."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def read(path: Path, name: str) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def difference(ours: Path, theirs: Path) -> tuple[float, float]:
    """The largest difference of two results, and the share of entries that differ."""
    first, second = tensors_of(ours), tensors_of(theirs)
    if first.keys() != second.keys():
        raise SystemExit(f"{ours} and {theirs} hold other tensors: {sorted(first.keys() ^ second.keys())[:3]}")
    largest, differing, count = 0.0, 0, 0
    for name, path in first.items():
        a, b = read(path, name), read(second[name], name)
        largest = max(largest, float((a.float() - b.float()).abs().max()))
        differing += int((a != b).sum())
        count += a.numel()
    return largest, differing / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--scratch", type=Path, required=True, help="a folder on a disk with room; emptied afterwards")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--mergekit", help="mergekit-yaml of another environment")
    parser.add_argument("--workers", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--keep", action="store_true", help="leave the models there, and use those that are there")
    asked = parser.parse_args()
    root = asked.scratch / asked.shape
    if not (asked.keep and (root / "b" / "model.safetensors.index.json").is_file()):
        shutil.rmtree(root, ignore_errors=True)
        apart(write_models, root, SHAPES[asked.shape])
    size = sum(path.stat().st_size for path in (root / "base").glob("*.safetensors"))
    print(f"{asked.shape}: {size / 1e9:.2f} GB a model, torch {torch.__version__}, {torch.get_num_threads()} threads")
    print("| method | with | seconds | CPU seconds | MB/s read and written | peak memory, GB |")
    print("| --- | --- | --: | --: | --: | --: |")
    starts = {"Folklora": [sys.executable, "-c", "import folklora.merge.engine"]}
    starts |= {"mergekit": [asked.mergekit, "--help"]} if asked.mergekit else {}
    try:
        for name, words in starts.items():
            seconds, computed, peak = measure(words, root, root / "log.txt")
            print(f"| nothing | {name} | {seconds:.1f} | {computed:.1f} | | {peak / 1e9:.2f} |", flush=True)
        for method in asked.methods:
            compare(asked, root, method, size)
    finally:
        if not asked.keep:
            shutil.rmtree(root)


def compare(asked: argparse.Namespace, root: Path, method: str, size: int) -> None:
    """One method's rows."""
    config = root / f"{method}.yaml"
    config.write_text(yaml.safe_dump(request(root, method)))
    own = [sys.executable, "-m", "folklora", "merge", str(config), "--device", asked.device, "--overwrite", "--out"]
    contenders = {
        f"Folklora, {n} process{'es' * (n > 1)}": [*own, str(root / f"out-{n}"), "--workers", str(n)]
        for n in asked.workers
    }
    if asked.mergekit:
        contenders["mergekit"] = [asked.mergekit, str(config), str(root / "out-kit"), "--quiet", "--no-copy-tokenizer"]
        contenders["mergekit"] += ["--device", asked.device] if asked.device != "cpu" else []
    outs = {name: next(Path(word) for word in words if "/out-" in word) for name, words in contenders.items()}
    runs: dict[str, list[tuple[float, float, int]]] = {name: [] for name in contenders}
    for _ in range(asked.repeats):
        for name, words in contenders.items():
            shutil.rmtree(outs[name], ignore_errors=True)
            runs[name].append(measure(words, outs[name], root / "log.txt"))
    moved = size * (1 + METHODS[method].get("models", 2) + bool(METHODS[method].get("base")))
    for name, found in runs.items():
        seconds, computed = (statistics.median(run[i] for run in found) for i in (0, 1))
        peak = max(run[2] for run in found)
        print(
            f"| {method} | {name} | {seconds:.1f} | {computed:.1f} | {moved / seconds / 1e6:.0f} | {peak / 1e9:.2f} |"
        )
    folders = list(outs.values())
    if asked.mergekit and method != "dare_ties":
        largest, share = apart(difference, folders[0], folders[-1])
        print(f"  {method}: the results differ by at most {largest:.1e}, in {share:.2%} of the entries", flush=True)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()

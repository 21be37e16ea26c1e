"""Llama-shaped checkpoints with random weights for merge.py, and how far two merged ones are apart."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
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
_SHARD_LAYERS = 8
_WRITERS = 3


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


def write_models(root: Path, shape: str) -> None:
    """Write base, a and b; drawn on a GPU where there is one, since a CPU takes minutes for 8b."""
    config, device = SHAPES[shape], "cuda" if torch.cuda.is_available() else "cpu"
    files = shapes_of(config)
    for name in ("base", "a", "b"):
        (root / name).mkdir(parents=True)
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape: tuple[int, ...], scale: float) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).bfloat16()

    total = 0
    with ThreadPoolExecutor(_WRITERS) as pool:
        for index, shapes in enumerate(files):
            base = {key: drawn(of, 0.02) for key, of in shapes.items()}
            total += sum(value.nbytes for value in base.values())
            models = {name: {key: (v + drawn(v.shape, 0.002)).cpu() for key, v in base.items()} for name in ("a", "b")}
            models["base"] = {key: value.cpu() for key, value in base.items()}
            file = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
            # all three before the next are drawn: memory holds one file of each
            list(pool.map(lambda name, m=models, f=file: save_file(m[name], root / name / f, {"format": "pt"}), models))
    places = {k: f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i, s in enumerate(files) for k in s}
    settings = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", **config}
    for name in ("base", "a", "b"):
        (root / name / "config.json").write_text(json.dumps(settings))
        index_file = {"metadata": {"total_size": total}, "weight_map": places}
        (root / name / "model.safetensors.index.json").write_text(json.dumps(index_file))


def read_once(root: Path) -> None:
    """Read the models' files, so that every run finds them in the system's memory."""
    buffer = bytearray(2**26)
    for path in sorted(root.glob("*/*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def keep_part(folder: Path, kept: Path, entries: int) -> None:
    """Write the first rows of each tensor of a folder, about so many entries, into a folder of their own."""
    kept.mkdir()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            save_file({name: _first(file, name, entries) for name in file.keys()}, kept / path.name)  # noqa: SIM118


def difference(ours: Path, theirs: Path, entries: int | None) -> dict[str, float]:
    """The largest difference of two results, the share of entries that differ, and how many were compared."""
    first, second = _places(ours), _places(theirs)
    if first.keys() != second.keys():
        raise SystemExit(f"{ours} and {theirs} hold other tensors: {sorted(first.keys() ^ second.keys())[:3]}")
    largest, differing, count = 0.0, 0, 0
    for name, path in first.items():
        a, b = _first_of(path, name, entries), _first_of(second[name], name, entries)
        largest = max(largest, float((a.float() - b.float()).abs().max()))
        differing += int((a != b).sum())
        count += a.numel()
    return {"largest": largest, "share": differing / count, "compared": count}


def read_tensors(folder: Path) -> dict[str, Callable[[], Tensor]]:
    """Each tensor of a folder, to be read when it is wanted."""
    return {name: partial(_first_of, path, name, None) for name, path in _places(folder).items()}


def _places(folder: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found.update(dict.fromkeys(file.keys(), path))
    return found


def _first_of(path: Path, name: str, entries: int | None) -> Tensor:
    with safe_open(path, framework="pt") as file:
        return _first(file, name, entries)


def _first(file: Any, name: str, entries: int | None) -> Tensor:
    if entries is None:
        return file.get_tensor(name)
    part = file.get_slice(name)
    shape = part.get_shape()
    row = torch.Size(shape[1:]).numel()
    return part[: min(shape[0], max(1, entries // row))].contiguous()

"""Where Folklora's merges differ from mergekit's: which entries, and whether they are equal ones at a threshold.

TIES, Model Breadcrumbs and SCE keep a number of the largest entries. Of equal ones at the threshold, which bfloat16
checkpoints have many of, Folklora keeps the first and mergekit those that its sort puts first. Both programs merge the
same random checkpoints into float32; each entry of the results that is not the same is looked up in the models. SCE's
weights are made of all that is kept, so that other entries change a little: there, the formula is computed again from
the entries that mergekit's result shows to be kept.

    python benchmarks/merge_thresholds.py --scratch /tmp/merge --mergekit VENV/bin/mergekit-yaml
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from merge import METHODS, request
from merge_checkpoints import SHAPES, read_tensors, write_models
from torch import Tensor

_METHODS = ("ties", "breadcrumbs", "breadcrumbs_ties", "sce")


def at_threshold(method: str, deltas: list[Tensor]) -> Tensor:
    """Which entries have the same magnitude, or variance, as the last that is kept or the first that is not."""
    size = deltas[0].numel()
    if method == "sce":
        variance = ((deltas[0].double() - deltas[1].double()) / 2).square().flatten()
        count = int(METHODS["sce"]["whole"]["select_topk"] * int(variance.count_nonzero()))
        edge = variance.sort(descending=True).values[count - 1]
        # float32 computes two variances that are equal with the last place of either
        return ((variance - edge).abs() <= 2**-22 * edge).view(deltas[0].shape)
    kept = int(METHODS[method]["each"]["density"] * size)
    dropped = 0 if method == "ties" else int(0.01 * size)
    tied = torch.zeros_like(deltas[0], dtype=torch.bool)
    for delta in deltas:
        falling = delta.abs().flatten().sort(descending=True).values
        for place in (dropped, dropped + kept):
            # between the entry at this place and the one before
            if 0 < place < size and falling[place - 1] == falling[place]:
                tied |= delta.abs() == falling[place]
    return tied


def sce_again(base: Tensor, deltas: list[Tensor], theirs: Tensor) -> Tensor:
    """SCE's formula in float64 with the selection that mergekit's float32 result shows."""
    chosen = theirs != base
    kept = [delta.double() * chosen for delta in deltas]
    energies = [float(delta.square().mean()) for delta in kept]
    signs = torch.where(sum(kept) >= 0, 1.0, -1.0)
    agree = [(delta * signs > 0).double() * energy for delta, energy in zip(kept, energies, strict=True)]
    total = sum(agree)
    merged = sum(a * delta for a, delta in zip(agree, kept, strict=True)) / torch.where(total > 0, total, 1.0)
    return base.double() + merged


def counted(method: str, root: Path, ours: Path, theirs: Path) -> Counter:
    """How many entries there are, differ, and differ without being at a threshold."""
    found: Counter = Counter()
    files = [read_tensors(folder) for folder in (root / "base", root / "a", root / "b", ours, theirs)]
    for name in files[0]:
        base, a, b, mine, other = (file[name]().float() for file in files)
        deltas = [a - base, b - base]
        differs = mine != other
        apart = differs & ~at_threshold(method, deltas)
        found["entries"] += base.numel()
        found["differ"] += int(differs.sum())
        found["not at a threshold"] += int(apart.sum())
        if method == "sce":
            again = sce_again(base, deltas, other)
            # the selection is not seen where what was kept merges to nothing
            far = (again - other).abs() > 2**-21 * (base.abs() + deltas[0].abs() + deltas[1].abs())
            found["not SCE of mergekit's selection"] += int(far.sum())
            found["beyond 1e-5"] += int(((mine - other).abs() > 1e-5).logical_and(apart).sum())
    return found


def merged_by_both(asked: dict[str, Any], work: Path, mergekit: str) -> tuple[Path, Path]:
    """The folders of what Folklora and mergekit make of a configuration, in float32."""
    config, ours, theirs = work / "config.yaml", work / "ours", work / "theirs"
    config.write_text(yaml.safe_dump({**asked, "out_dtype": "float32"}))
    own = [sys.executable, "-m", "folklora", "merge", str(config), "--out", str(ours), "--overwrite"]
    subprocess.run(own, check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(theirs, ignore_errors=True)
    subprocess.run([mergekit, str(config), str(theirs), "--quiet", "--no-copy-tokenizer"], check=True)
    return ours, theirs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--mergekit", required=True, help="mergekit-yaml, perhaps of another environment")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--methods", nargs="+", choices=_METHODS, default=list(_METHODS))
    asked = parser.parse_args()
    root, work = asked.scratch / asked.shape, asked.scratch / "thresholds"
    if not (root / "b" / "model.safetensors.index.json").is_file():
        write_models(root, asked.shape)
    work.mkdir(exist_ok=True)
    for method in asked.methods:
        ours, theirs = merged_by_both(request(root, method), work, asked.mergekit)
        print(method, json.dumps(counted(method, root, ours, theirs)), flush=True)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()

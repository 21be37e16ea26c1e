"""Every merging method that Folklora and mergekit both have: the same configuration, and how far the results are apart.

Both programs merge the same checkpoints, random ones of the shape `small` or those given by `--models BASE A B`, into
float32, from one YAML. DARE and DELLA draw their masks by other generators: they are compared with all entries kept,
and their masks not at all.

    python benchmarks/merge_parity.py --scratch /tmp/merge --mergekit VENV/bin/mergekit-yaml
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
from pathlib import Path
from typing import Any

from merge import DRAWN, METHODS, request
from merge_checkpoints import read_tensors, write_models
from merge_thresholds import merged_by_both


def main() -> None:
    asked = arguments()
    root, work = asked.scratch / "small", asked.scratch / "parity"
    if asked.models:
        root = asked.scratch / "given"
        root.mkdir(parents=True, exist_ok=True)
        for name, model in zip(("base", "a", "b"), asked.models, strict=True):
            (root / name).unlink(missing_ok=True)
            (root / name).symlink_to(model.resolve())
    elif not (root / "b" / "model.safetensors.index.json").is_file():
        write_models(root, "small")
    work.mkdir(parents=True, exist_ok=True)
    rows = []
    for method in asked.methods:
        config = request(root, method)
        if method in DRAWN:
            config = kept_whole(config)
        row = {"method": method, **apart(*merged_by_both(config, work, asked.mergekit))}
        rows.append(row)
        print(json.dumps(row), flush=True)
    shutil.rmtree(work)
    print("\n".join(table(rows)))


def kept_whole(config: dict[str, Any]) -> dict[str, Any]:
    """With nothing dropped, so that nothing is drawn."""
    config = copy.deepcopy(config)
    for model in config["models"]:
        model["parameters"]["density"] = 1.0
        if config["merge_method"].startswith("della"):
            model["parameters"]["epsilon"] = 0.0
    return config


def apart(ours: Path, theirs: Path) -> dict[str, Any]:
    """How many entries there are, how many are beyond 1e-5, and the largest difference."""
    mine, other = read_tensors(ours), read_tensors(theirs)
    if mine.keys() != other.keys():
        raise SystemExit(f"they wrote other tensors: {sorted(mine.keys() ^ other.keys())[:5]}")
    found = {"entries": 0, "beyond 1e-5": 0, "largest": 0.0}
    for name in mine:
        gap = (mine[name]() - other[name]()).abs()
        found["entries"] += gap.numel()
        found["beyond 1e-5"] += int((gap > 1e-5).sum())
        found["largest"] = max(found["largest"], float(gap.max()))
    return found


def table(rows: list[dict[str, Any]]) -> list[str]:
    lines = ["| method | entries beyond 1e-5 | largest difference |", "| --- | --: | --: |"]
    return lines + [f"| {row['method']} | {row['beyond 1e-5']:,} | {row['largest']:.1e} |" for row in rows]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--mergekit", required=True, help="mergekit-yaml, perhaps of another environment")
    parser.add_argument("--models", type=Path, nargs=3, metavar=("BASE", "A", "B"), help="folders of three models")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    return parser.parse_args()


if __name__ == "__main__":
    main()

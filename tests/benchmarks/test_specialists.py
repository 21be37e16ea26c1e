"""What benchmarks/specialists.py tries: contenders that exist, mixtures of the size asked for, a run that resumes."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from collections import Counter
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import folklora
from folklora.merge import tsv_m

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TASKS = ["sst2", "trec6", "math"]


KNOWN = "specialists (task known)"


@pytest.fixture
def specialists(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import specialists

    return specialists


@pytest.fixture
def merging(specialists) -> ModuleType:
    import specialist_merging

    return specialist_merging


@pytest.fixture
def mixtures(specialists) -> ModuleType:
    import specialist_mixtures

    return specialist_mixtures


@pytest.fixture
def folders(tmp_path, tiny_llama, tiny_tokenizer) -> list[str]:
    """`--model` and `--data` of a tiny model and of a few made-up rows a task."""
    model, data = tmp_path / "model", tmp_path / "data"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer.save_pretrained(model)
    for folder in ("glue", "math"):
        (data / folder).mkdir(parents=True)

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (data / name).write_text("\n".join(map(json.dumps, rows)))

    (data / "glue" / "tasks.json").write_text(
        json.dumps({"sst2": {"labels": ["negative", "positive"]}, "trec6": {"labels": ["yes", "no"]}})
    )
    for split in ("train", "test"):
        films = [{"sentence1": f"a {'good' if n % 2 else 'bad'} film {n}", "label": n % 2} for n in range(20)]
        write(f"glue/sst2_{split}.jsonl", films)
        write(f"glue/trec6_{split}.jsonl", [{"sentence1": f"is {n} odd?", "label": 1 - n % 2} for n in range(20)])
        sums = [{"instruction": f"{n} + 1?", "output": f"Add 1. The answer is {n + 1}"} for n in range(20)]
        write(f"math/math_instruct_{split}.jsonl", sums)
    return ["--model", str(model), "--data", str(data)]


SIZES = {
    "train-rows": 8, "validation-rows": 4, "test-rows": 4, "steps": 2, "batch": 2, "eval-batch": 4, "rates": 1e-3,
    "length": 64, "seeds": 0,
}  # fmt: skip


@pytest.fixture
def run(specialists, folders, tmp_path, monkeypatch, capsys):
    """`run(*methods)`: the script's table, row by row, and how many jobs it did."""

    def call(*methods: str) -> tuple[dict[str, list[str]], int]:
        given = [*folders, "--out", str(tmp_path / "out"), "--tasks", *TASKS, "--methods", *methods]
        given += [word for key, value in SIZES.items() for word in (f"--{key}", str(value))]
        monkeypatch.setattr(sys, "argv", ["specialists.py", *given])
        specialists.main()
        lines = capsys.readouterr().out.splitlines()
        done = sum(int(line.split()[0]) for line in lines if line.endswith("jobs to do"))
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
        return {row[0]: row[1:] for row in rows}, done

    return call


def test_every_contender_is_a_method_with_options_that_it_has(merging):
    factories = {method.name: method.factory for method in folklora.methods("merge")}
    for contender, settings in merging.CONFIGURATIONS.items():
        assert 1 <= len(settings) <= 5, contender
        assert contender.isascii()
        if contender == "atlas":
            continue
        factory = factories[merging.method_of({"method": contender})]
        kinds = get_type_hints(factory)
        for setting in settings:
            for name, value in setting.items():
                assert name in inspect.signature(factory).parameters, (contender, name)
                if isinstance(value, str):
                    assert value in kinds[name].__args__, (contender, name, value)
    for made in (merging.MAKERS, merging.PREPARED):
        assert set(made) <= set(merging.CONFIGURATIONS)
    assert set(merging.STATISTICS) <= set(merging.CONFIGURATIONS)


def test_no_two_contenders_are_the_same(merging):
    seen = [
        (merging.method_of({"method": name}), json.dumps(settings), name in (*merging.MAKERS, *merging.PREPARED))
        for name, settings in merging.CONFIGURATIONS.items()
    ]
    assert len(set(seen)) == len(seen)


def test_what_a_job_computes_once_depends_on_no_setting_but_the_scale(merging):
    for contender, settings in merging.CONFIGURATIONS.items():
        if merging.method_of({"method": contender}) in merging.SCALED:
            assert len({json.dumps({**setting, "lambda_": 1.0}) for setting in settings}) == 1, contender


def parts_of(merging: ModuleType) -> Any:
    generator = torch.Generator().manual_seed(0)

    def near(value: Tensor, scale: float) -> Tensor:
        return value + scale * torch.randn(value.shape, generator=generator)

    base = {"a.weight": near(torch.zeros(12, 9), 1.0), "b.bias": near(torch.zeros(9), 1.0)}
    own = [{name: near(value, scale) for name, value in base.items()} for scale in (0.01, 0.1, 0.03)]
    return merging.Parts(None, base, own)


@pytest.mark.parametrize(
    "contender",
    ["tsv-m", "r-tsvm", "r-tsvm, rank alone", "r-tsvm, weights alone", "r-tsvm, share", "r-tsvm, inverse"],
)
def test_the_scaled_change_is_what_the_method_gives(merging, contender):
    parts, options = parts_of(merging), argparse.Namespace(tasks=TASKS)
    job = {"method": contender, "seed": 0}
    for setting in merging.CONFIGURATIONS[contender]:
        found = merging.scaled(parts, setting, job, options)
        expected = dict(merging.results(parts.base, parts.specialists, setting, job, options))
        assert all(torch.equal(found[name], expected[name]) for name in parts.base)


def test_the_r_tsvm_contenders_differ_from_one_another_and_both_off_is_tsv_m(merging):
    options = argparse.Namespace(tasks=TASKS)
    names = [name for name in merging.CONFIGURATIONS if merging.method_of({"method": name}) in merging.SCALED]
    found = []
    for name in names:
        setting = {**merging.CONFIGURATIONS[name][0], "lambda_": 1.0, "outlier_sigma": 1.5, "sparsity_eps": 0.3}
        if name.startswith("tsv-m"):
            setting = {"lambda_": 1.0}
        found.append(merging.scaled(parts_of(merging), setting, {"method": name, "seed": 0}, options)["a.weight"])
    pairs = [{names[i], names[j]} for i in range(len(names)) for j in range(i) if torch.allclose(found[i], found[j])]
    assert pairs == [{"r-tsvm", "r-tsvm, small scale"}]
    off = {"lambda_": 1.0, "outlier_mode": "off", "rank_gamma": 0.0}
    both = merging.scaled(parts_of(merging), off, {"method": "r-tsvm", "seed": 0}, options)["a.weight"]
    assert torch.equal(both, found[names.index("tsv-m")])


def test_equal_norms_are_those_of_the_mean(merging):
    parts = parts_of(merging)
    base, own = parts.base["a.weight"], [one["a.weight"] for one in parts.specialists]
    found = merging.of_equal_norm([*own, base], base)
    mean = sum(float((tensor - base).norm()) for tensor in own) / 4
    assert [float((tensor - base).norm()) for tensor in found] == pytest.approx([mean] * 3 + [0.0], rel=1e-4)
    for before, after in zip(own, found, strict=False):
        assert torch.cosine_similarity((before - base).flatten(), (after - base).flatten(), dim=0) > 0.9999
    options = argparse.Namespace(tasks=TASKS)
    merged = dict(
        merging.results(
            parts.base, parts.specialists, {"lambda_": 1.0}, {"method": "tsv-m, equal norms", "seed": 0}, options
        )
    )
    torch.testing.assert_close(merged["a.weight"], tsv_m(merging.of_equal_norm(own, base), base))


def test_statistics_of_another_model_are_refused(merging, monkeypatch):
    parts, job = parts_of(merging), {"method": "fisher", "seed": 0}
    monkeypatch.setattr(folklora.Statistics, "load", lambda path: {"elsewhere": {}})
    monkeypatch.setattr(merging, "model_file", lambda *words: Path("none"))
    with pytest.raises(ValueError, match="of none of the model's layers: \\['elsewhere'\\]"):
        dict(merging.results(parts.base, parts.specialists, {}, job, argparse.Namespace(tasks=TASKS)))


def test_tasks_take_turns_by_their_rows(mixtures):
    assert list(islice(mixtures.turns({"a": 5, "b": 5, "c": 5}), 7)) == ["a", "b", "c", "a", "b", "c", "a"]
    found = list(islice(mixtures.turns({"a": 6, "b": 0, "c": 2}), 80))
    assert Counter(found) == {"a": 60, "c": 20}
    assert Counter(found[:8]) == {"a": 6, "c": 2}


def test_mixtures_keep_as_many_rows_as_asked_for(mixtures, tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    axis = torch.tensor([0] * 10 + [1] * 20 + [2] * 10)
    rewards = torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    # the middle task's rows are loved by all, and nobody is against the last one's
    rewards[10:30] += 20
    rewards[30:] = rewards[30:].abs()
    save_file({"rewards": rewards}, tmp_path / "models" / "all-seed0-rewards.safetensors")
    options = argparse.Namespace(out=tmp_path, tasks=TASKS, mixture_share=0.5)
    kept = {name: mixtures.chosen(name, axis, 0, options) for name in mixtures.MIXTURES}
    sizes = {name: torch.bincount(axis[rows], minlength=3).tolist() for name, rows in kept.items()}
    assert all(len(rows.unique()) == 20 for rows in kept.values())
    assert sizes["mixture: quota"] == sizes["mixture: reward, of each task"] == [5, 10, 5]
    assert sizes["mixture: agreement, of each task"] == [5, 10, 5]
    assert sizes["mixture: reward"] == [0, 20, 0]
    # the 20 rows that nobody is against, and those of the first task that nobody is against by chance, are enough
    agreed = (rewards >= 0).all(1)
    assert agreed[kept["mixture: agreement"]].all()
    weighted = (rewards / rewards.std(0)).sum(1)
    first = kept["mixture: reward, of each task"]
    assert weighted[first[axis[first] == 0]].min() > weighted[:10].median()


def test_the_script_runs_scores_and_resumes(run, tmp_path):
    out = tmp_path / "out"
    table, done = run("tsv-m", "r-tsvm, rank alone", "mixture: quota")
    # a rate for each task and for all; those models, the mixture, base and two merges
    assert done == 4 + 4 + 1 + 3
    assert list(table)[2:] == ["base", "tsv-m", "r-tsvm, rank alone", "mixture: quota", "multi-task", KNOWN]
    assert table["mixture: quota"][-1] == "4/4/4"
    assert float(table["tsv-m"][-1]) in (0.6, 0.8, 1.0, 1.25, 1.5)
    written = {file: file.stat().st_mtime_ns for file in out.rglob("*.*")}
    again, done = run("tsv-m", "r-tsvm, rank alone", "mixture: quota")
    assert (again, done) == (table, 0)
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*.*")} == written

    rewarded, done = run("mixture: reward", "mixture: agreement, of each task")
    assert done == 3
    assert rewarded["mixture: agreement, of each task"][-1] == "4/4/4"
    assert sum(map(int, rewarded["mixture: reward"][-1].split("/"))) == 12
    rewards = load_file(out / "models" / "all-seed0-rewards.safetensors")["rewards"]
    assert rewards.shape == (24, 3)
    assert rewards.abs().min() > 0
    means = json.loads((out / "rewards-all-seed0-0.json").read_text())["means"]
    assert means["trec6"]["math"] == pytest.approx(float(rewards[8:16, 2].mean()), rel=1e-5)

    # what is gone is made again where it is still needed, and only there
    gone = out / "models" / "math-seed0-model.safetensors"
    gone.unlink()
    assert run("tsv-m", "mixture: reward")[1] == 0
    assert not gone.exists()
    assert run("tsv-m", "average")[1] == 2
    assert gone.exists()

"""The standard continual-learning benchmark (orders 1-3) over every continual method, tuned on equal terms.

    python benchmarks/standard_stream.py --model MODEL --data cl_benchmark --out OUT [--stage tune|run|both]

DATA holds tasks.json and a folder a task with train.jsonl and test.jsonl. Each method is tuned over the same learning
rates on a tenth of order 1's training examples, held out (one seed, the first kind of prompt); then it learns orders
1-3 with its best one, for each seed, and is scored on the test examples. Once with the prompt's lines that name the
task, once without.
Runs are independent: `--workers` of them share the GPUs, and each finished run is kept, so the script resumes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import add_options, file_name, records, work

if TYPE_CHECKING:
    from folklora.stream.run import Run

ORDERS = ("order1", "order2", "order3")
# None leaves an option out
WITHOUT_LORA: dict[str, Any] = {"r": None, "alpha": None, "dropout": None}
# the same passes over the examples in smaller steps: prompts need many
OF_PROMPTS: dict[str, Any] = {"target_modules": None, "place": "answer", "batch_size": 8}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "am-lora": ("am-lora", {}),
    "am-lora, token gate": ("am-lora", {"granularity": "token", "gate_init": "linear"}),
    "am-lora, literal": ("am-lora", {"gate_input": "lora"}),
    "seq-lora": ("seq-lora", {}),
    "inc-lora": ("inc-lora", {}),
    "replay 2 %": ("replay", {"memory": 0.02}),
    "per-task": ("per-task", {}),
    "multi-task": ("multi-task", {}),
    "o-lora": ("o-lora", {}),
    "o-lora, λ 5": ("o-lora", {"lambda_1": 5.0}),
    "o-lora, λ 50": ("o-lora", {"lambda_1": 50.0}),
    "ewc": ("ewc", {}),
    "lwf": ("lwf", {}),
    "slm": ("slm", {}),
    "codyra": ("codyra", {"alpha": None}),
    "adapt-infty": ("adapt-infty", {}),
    "osft": ("osft", WITHOUT_LORA),
    "lt-sft": ("lt-sft", WITHOUT_LORA),
    "exssnet": ("exssnet", {**WITHOUT_LORA, "density": 0.5, "mask_learning_rate": 1e-2}),
    "progprompt": ("progprompt", {**WITHOUT_LORA, **OF_PROMPTS}),
    "l2p": ("l2p", {**WITHOUT_LORA, **OF_PROMPTS, "top_k": 1}),
}
ORDER_FREE = ("per-task", "multi-task")
PROMPTS = ("progprompt", "l2p")
MEASURES = ("average_accuracy", "backward_transfer", "forward_transfer", "learning_accuracy")
LONGEST_TEXT = 1200  # characters; the question around the text is never cut


def main() -> None:
    options = arguments()
    options.out.mkdir(parents=True, exist_ok=True)
    deadline = time.time() + 60 * options.minutes
    if options.stage in ("tune", "both"):
        do(tuning_jobs(options), options, deadline)
    if options.stage in ("run", "both"):
        do(final_jobs(options), options, deadline)
    write_tables(options)


def do(jobs: list[dict[str, Any]], options: argparse.Namespace, deadline: float) -> None:
    named = [(job_name(job), job) for job in jobs]
    work(named, partial(learn_one, options=options), options.out, workers=options.workers, deadline=deadline)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_options(parser)
    parser.add_argument("--stage", choices=("tune", "run", "both", "table"), default="both")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--orders", nargs="+", default=list(ORDERS))
    parser.add_argument("--names", nargs="+", choices=("named", "unnamed"), default=["named", "unnamed"])
    parser.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3], help="of all but prompts")
    parser.add_argument("--prompt-rates", nargs="+", type=float, default=[1e-2, 3e-2, 1e-1], help="of prompts")
    parser.add_argument("--targets", default="all-linear", help='"all-linear" or names joined by commas')
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=2)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--train-rows", type=int, default=2000, help="training examples a task at the most")
    parser.add_argument("--test-rows", type=int, default=500)
    parser.add_argument("--evaluate", choices=("all", "seen", "last"), default="all", help="what is scored when")
    parser.add_argument("--metric", choices=("rank", "exact"), default="rank", help="rank the labels, or write freely")
    parser.add_argument("--minutes", type=float, default=1e6, help="no new run begins after this")
    return parser.parse_args()


def tuning_jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    common = {"kind": "tune", "names": options.names[0], "order": "order1", "seed": 0, "validation": 0.1}
    return [
        {**common, "method": method, "rate": rate}
        for method in options.methods
        for rate in (options.prompt_rates if method in PROMPTS else options.rates)
    ]


def final_jobs(options: argparse.Namespace) -> list[dict[str, Any]]:
    best = best_rates(options)
    jobs = []
    for names, seed, order, method in itertools.product(options.names, options.seeds, options.orders, options.methods):
        if method in best and not (method in ORDER_FREE and order != options.orders[0]):
            rate = best[method][0]
            jobs.append({"kind": "run", "method": method, "names": names, "order": order, "seed": seed, "rate": rate})
    return jobs


def best_rates(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Method → (learning rate, its average accuracy on held-out training examples); a rate that diverges is none."""
    best: dict[str, tuple[float, float]] = {}
    for record in records(options.out, "tune"):
        if record["entry"] is None:
            continue
        key, score = record["method"], record["entry"]["average_accuracy"]
        if key not in best or score > best[key][1]:
            best[key] = (record["rate"], score)
    return best


def job_name(job: dict[str, Any]) -> str:
    return file_name(job["kind"], job["method"], job["names"], job["order"], f"seed{job['seed']}", f"{job['rate']:g}")


def learn_one(job: dict[str, Any], options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import tempfile

    import torch

    from folklora.stream.train import DivergedError

    torch.set_num_threads(1)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            results = learn_stream(job, options, Path(folder) / "run").results
        except DivergedError as error:
            if job["kind"] == "run":
                raise
            return {**job, "entry": None, "diverged": str(error)}, f"diverged: {job_name(job)}: {error}"
    (entry,) = results["methods"].values()
    entry["attention"] = entry["attention"] if job["kind"] == "run" and job["seed"] == 0 else None
    record = {**job, "entry": entry, "machine": results["machine"], "wall": round(time.perf_counter() - began, 1)}
    return record, f"{record['wall']:6.1f} s  AA {entry['average_accuracy']:5.1f}  {job_name(job)}"


def learn_stream(job: dict[str, Any], options: argparse.Namespace, out: Path) -> Run:
    """One method over one order, with the settings that all share and its own."""
    from folklora.stream.learn import learn

    method, own = METHODS[job["method"]]
    targets = options.targets if options.targets == "all-linear" else options.targets.split(",")
    settings = {
        "learning_rate": job["rate"], "epochs": options.epochs, "batch_size": options.batch, "r": options.rank,
        "alpha": 32.0, "dropout": 0.1, "target_modules": targets, "max_length": 512, "eval_batch_size": 50,
        "group_by_length": True, "evaluate": options.evaluate,
    }  # fmt: skip
    chosen = {key: value for key, value in {**settings, **own}.items() if value is not None}
    tasks = load_order(options, job["order"], named=job["names"] == "named")
    validation = job.get("validation", 0.0)
    how = {"seed": job["seed"], "validation": validation, "metric": options.metric}
    return learn(options.model, tasks, method, out=out, options=chosen, **how)


def load_order(options: argparse.Namespace, order: str, *, named: bool) -> list[Any]:
    from folklora.stream.tasks import Example, Task

    table = json.loads((options.data / "tasks.json").read_text())
    stream = []
    for name in table["orders"][order]:
        family, labels = table["family"][name], table["tasks"][name]["labels"]
        lines = f"Task:{family}\nDataset:{name}\n" if named else ""
        head = f"{lines}{table['instructions'][family]}Option: {', '.join(labels)} \n"

        def read(split: str, most: int, name: str = name, head: str = head) -> tuple[Example, ...]:
            # not splitlines: some texts hold other signs that it takes for the end of a line
            rows = (options.data / name / f"{split}.jsonl").read_text(encoding="utf-8").rstrip("\n").split("\n")[:most]
            read = [json.loads(row) for row in rows]
            return tuple(Example(f"{head}{r['text'][:LONGEST_TEXT]}\nAnswer:", f" {r['label']}") for r in read)

        train, test = read("train", options.train_rows), read("test", options.test_rows)
        stream.append(Task(name, train, test, tuple(f" {label}" for label in labels)))
    return stream


def write_tables(options: argparse.Namespace) -> None:
    """Each order's mean and spread over the seeds; then, of each seed's mean over the orders, mean and spread."""
    runs, best = records(options.out, "run"), best_rates(options)
    titles = ["method", "learning rate", *(name.replace("order", "order ") for name in options.orders)]
    titles += [*(measure.replace("_", " ") for measure in MEASURES), "trained", "stored", "s"]
    summary = []
    for names in options.names:
        rows = []
        for method in options.methods:
            own = [r for r in runs if (r["names"], r["method"]) == (names, method) and r["order"] in options.orders]
            if own:
                rows.append(row_of(method, own, options.orders))
                summary.append({"names": names, "method": method, "rate": own[0]["rate"], **summarise(own)})
        if rows:
            rules = ["---", *("--:" for _ in titles[1:])]
            print(f"\n{names}\n", *(f"| {' | '.join(cells)} |" for cells in (titles, rules, *rows)), sep="\n")
    tuned = [{"method": method, "rate": rate, "validation": score} for method, (rate, score) in best.items()]
    (options.out / "summary.json").write_text(json.dumps({"runs": summary, "tuned": tuned}, indent=1))
    for names in {row["names"] for row in summary}:
        plot(options.out / f"{names}.svg", [r for r in runs if r["names"] == names], options)


def row_of(method: str, own: list[dict[str, Any]], orders: list[str]) -> list[str]:
    by_order = ([r["entry"]["average_accuracy"] for r in own if r["order"] == order] for order in orders)
    counted = ("trainable_parameters", "stored_parameters", "seconds")
    sizes = [f"{statistics.mean(r['entry'][key] for r in own):,.0f}" for key in counted]
    over = summarise(own)
    means = ["–" if over[measure] is None else _spread(over[measure]) for measure in MEASURES]
    return [method, f"{own[0]['rate']:g}", *map(_spread, by_order), *means, *sizes]


def summarise(own: list[dict[str, Any]]) -> dict[str, list[float] | None]:
    """Measure → each seed's mean over the orders; None where a method has no such measure.

    A seed that has not run on every order of the others is left out: orders differ by more than seeds do.
    """
    by_seed = [[r for r in own if r["seed"] == seed] for seed in sorted({r["seed"] for r in own})]
    orders = [{r["order"] for r in runs} for runs in by_seed]
    widest = max(orders, key=len)
    complete = [runs for runs, own_orders in zip(by_seed, orders, strict=True) if own_orders == widest]
    found: dict[str, list[float] | None] = {}
    for measure in MEASURES:
        values = [[r["entry"].get(measure) for r in runs] for runs in complete]
        known = all(value is not None for seed in values for value in seed)
        found[measure] = [statistics.mean(seed) for seed in values] if known else None
    return found


def plot(path: Path, runs: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Accuracy over the tasks seen so far, mean over orders and seeds; and at the end against what is stored."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from folklora.stream.charts import DASHES, MARKERS, look_of
    from folklora.stream.plots import COLOURS, accuracy_so_far

    matplotlib.rcParams.update({"svg.hashsalt": "folklora", "font.size": 8})
    figure, (along, stored) = pyplot.subplots(1, 2, figsize=(12, 5), constrained_layout=True)
    for index, method in enumerate(options.methods):
        own = [r["entry"] for r in runs if r["method"] == method and r["order"] in options.orders]
        if not own:
            continue
        colour, mark, dashes = look_of(index)
        look = {"color": COLOURS[colour], "marker": MARKERS[mark], "linestyle": DASHES[dashes], "linewidth": 1}
        curves = zip(*(accuracy_so_far(entry["matrix"]) for entry in own), strict=True)
        means = [math.nan if None in values else statistics.mean(values) for values in curves]
        if method in ORDER_FREE:
            # one order stands for all of them, but only at the end
            means[:-1] = [math.nan] * (len(means) - 1)
        along.plot(range(1, len(means) + 1), means, label=method, markersize=4, **look)
        size = statistics.mean(entry["stored_parameters"] for entry in own)
        stored.plot(size, means[-1], markersize=6, **look)
        stored.annotate(method, (size, means[-1]), xytext=(5, 3), textcoords="offset points", fontsize=7)
    along.set(title="average over the tasks seen so far", xlabel="tasks trained", ylabel="accuracy, %")
    along.set_xticks(range(1, len(means) + 1))
    stored.margins(x=0.1)
    stored.set(title="after the last task", xlabel="stored numbers", ylabel="average accuracy, %", xscale="log")
    figure.legend(*along.get_legend_handles_labels(), loc="outside lower center", ncols=8, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _spread(scores: list[float]) -> str:
    if not scores:
        return ""
    return f"{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f}" if len(scores) > 1 else f"{scores[0]:.1f}"


if __name__ == "__main__":
    main()

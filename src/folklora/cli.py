"""The command line: one verb a job."""

from __future__ import annotations

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from folklora.display import LearnDisplay, MergeDisplay

app = typer.Typer(
    help="Teach a pretrained model new knowledge, task after task, without losing what it knew.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()
_EXPECTED = (ValueError, OSError, ImportError, TypeError)
_DEMO_METHODS = ("seq-lora", "am-lora")


def run() -> None:
    """The entry point: expected errors in one red paragraph, anything else with its traceback."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except _EXPECTED as error:
        if os.environ.get("FOLKLORA_TRACEBACK"):
            raise
        err = Console(stderr=True)
        err.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        raise SystemExit(1) from error
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; --resume goes on after the last finished task", style="yellow")
        raise SystemExit(130) from None


@app.command("methods")
def list_methods(
    room: Annotated[str | None, typer.Option(help="Only this room: adapters, continual or merge.")] = None,
) -> None:
    """List the methods: name, room, what is trained, source."""
    from folklora import methods

    table = Table(box=None, header_style="bold")
    for heading in ("name", "room", "what is trained", "paper"):
        table.add_column(heading)
    for method in methods(room):
        table.add_row(method.name, method.room, method.trains, method.paper)
    console.print(table)


@app.command()
def learn(
    model: Annotated[str | None, typer.Option(help="Folder or hub name of the base model.")] = None,
    tasks: Annotated[
        list[str] | None, typer.Option(help="A task, in order: a folder, NAME=TRAIN.jsonl,TEST.jsonl or hub:ORG/NAME.")
    ] = None,
    method: Annotated[list[str] | None, typer.Option(help="How the stream is learnt; see `folklora methods`.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run directory to write.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="option=value, such as r=16 or epochs=3.")] = None,
    config: Annotated[Path | None, typer.Option(help="A YAML file with any of these options.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Template for tasks of text and label; holds {text}.")] = None,
    metric: Annotated[str | None, typer.Option(help="auto, rank or exact.")] = None,
    validation: Annotated[float | None, typer.Option(help="Share of training examples to score on instead.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of everything drawn.")] = None,
    demo: Annotated[bool, typer.Option("--demo", help="The embedded model and its five tasks.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in OUT.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a run in OUT.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model's own code run on this machine.")
    ] = False,
) -> None:
    """Teach a model tasks one after another; measure after each what it knows of all of them."""
    from folklora.stream.learn import learn as teach

    _hush()
    given = {
        "model": model, "tasks": tasks, "method": method, "out": out, "prompt": prompt, "metric": metric,
        "validation": validation, "seed": seed,
    }  # fmt: skip
    arguments = _arguments(given, set_ or [], config)
    if demo:
        arguments = _demo_arguments(arguments)
    missing = [f"--{name}" for name in ("model", "tasks", "out") if not arguments.get(name)]
    if missing:
        raise ValueError(f"learn needs {', '.join(missing)} (or --demo with --out)")
    if trust_remote_code:
        arguments["trust_remote_code"] = True
    with LearnDisplay(console) as display:
        finished = teach(**arguments, resume=resume, overwrite=overwrite, progress=display.tell)
    _show(finished)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run directories.")],
    out: Annotated[Path | None, typer.Option(help="A folder for compare.html, with charts, and compare.json.")] = None,
) -> None:
    """Several runs in one table, and drawn together; equal runs with different seeds become mean and spread."""
    from folklora.stream.compare import compare_runs, render_table

    console.print(render_table(compare_runs(runs, out)))
    if out is not None:
        console.print(f"written: {out / 'compare.html'}", soft_wrap=True)


@app.command()
def report(run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]) -> None:
    """Write RUN/report.html: matrices, accuracy over the stream, attention, losses; one file, no network."""
    from folklora.stream.report import write_report

    console.print(f"written: {write_report(run_directory)}", soft_wrap=True)


@app.command()
def explain(
    run_directory: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")],
    text: Annotated[str, typer.Argument(help="What is asked.")],
    method: Annotated[list[str] | None, typer.Option(help="Only this method of the run.")] = None,
    model: Annotated[str | None, typer.Option(help="The base model, where it is not the run's any more.")] = None,
    prompt: Annotated[str, typer.Option(help="Template of the tasks' prompts; holds {text}.")] = "{text}",
    layers: Annotated[bool, typer.Option("--layers", help="Layer by layer, in place of their mean.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="All numbers as JSON.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Let the model's own code run on this machine.")
    ] = False,
) -> None:
    """Show which task's knowledge answers a text, in percent, for the methods that choose by the prompt."""
    from folklora.stream.explain import explain as ask

    _hush()
    if "{text}" not in prompt:
        raise ValueError(f"the prompt {prompt!r} has no place for the text: it must hold {{text}}")
    asked = prompt.replace("{text}", text)
    found = ask(run_directory, [asked], method or (), model=model, trust_remote_code=trust_remote_code)
    if as_json:
        typer.echo(json.dumps({"prompt": asked, "methods": found}, indent=2))
        return
    for name, shares in found.items():
        (weights,) = shares["weights"]
        mean = [sum(column) / len(column) for column in zip(*weights, strict=True)]
        rows = dict(zip(shares["layers"], weights, strict=True)) if layers else {"mean over the layers": mean}
        table = Table(title=name, box=None, header_style="bold")
        for heading in ("", *shares["slots"]):
            table.add_column(heading, justify="right" if heading else "left")
        for where, row in rows.items():
            table.add_row(where, *(f"{100 * value:.1f}" for value in row))
        console.print(table)


@app.command()
def export(
    adapter: Annotated[Path, typer.Argument(help="A saved adapter's folder.")],
    model: Annotated[str, typer.Option(help="Folder or hub name of its base model.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
) -> None:
    """Write an adapter as a plain LoRA that stock PEFT and vLLM load."""
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from folklora import export_lora

    _hush()
    if not (adapter / "adapter_model.safetensors").is_file():
        raise ValueError(f"{adapter} holds no adapter_model.safetensors")
    # said outright: where it is not, transformers asks on the terminal whether to run the model's own code
    config = AutoConfig.from_pretrained(model, trust_remote_code=False)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    base = kind.from_pretrained(model, dtype=torch.float32, use_safetensors=True, trust_remote_code=False)
    ranks = export_lora(PeftModel.from_pretrained(base, str(adapter)), out)
    spread = sorted(set(ranks.values()))
    layers = f"{len(ranks)} layers, LoRA rank {', '.join(map(str, spread))}, scaling 1"
    console.print(f"written: {out}  ({layers})", soft_wrap=True)


@app.command()
def merge(
    config: Annotated[Path, typer.Argument(help="A YAML file that says what to merge; mergekit's form.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    device: Annotated[str, typer.Option(help="Where each tensor is computed: cpu or cuda.")] = "cpu",
    workers: Annotated[int, typer.Option(help="How many processes share the tensors.")] = 1,
    max_shard_size: Annotated[str, typer.Option(help="The most that one file holds.")] = "5GB",
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a folder at OUT.")] = False,
    task: Annotated[
        str | None, typer.Option(help="CONFIG is what a method for one task at a time wrote: write this task's model.")
    ] = None,
) -> None:
    """Merge models on disk into one, a tensor at a time; the same command goes on with a merge that was stopped."""
    from folklora.merge.engine import merge_models, write_task

    _hush()
    if task is not None:
        console.print(f"written: {write_task(config, task, out)}", soft_wrap=True)
        return
    display = MergeDisplay(console)
    try:
        with display:
            merge_models(
                config, out, device=device, workers=workers, max_shard_size=max_shard_size, seed=seed,
                overwrite=overwrite, progress=display.tell,
            )  # fmt: skip
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted; the same command goes on where the merge was", style="yellow")
        raise typer.Exit(130) from None
    if display.said:
        console.print(f"written: {out}  ({display.said})", soft_wrap=True)


@app.command()
def env() -> None:
    """Versions and devices, for a bug report."""
    import importlib.metadata
    import platform

    import torch

    table = Table(box=None, show_header=False)
    table.add_row("python", platform.python_version())
    for name in ("folklora", "torch", "transformers", "peft", "trl", "accelerate", "datasets", "safetensors"):
        try:
            table.add_row(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            table.add_row(name, "not installed")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("devices", ", ".join(gpus) or "CPU only")
    console.print(table)


def _arguments(given: dict[str, Any], pairs: list[str], config: Path | None) -> dict[str, Any]:
    """The options of the file, then of the command line, as arguments of `folklora.learn`."""
    from folklora.stream.options import parse_options, parse_value

    arguments: dict[str, Any] = _read_config(config, set(given)) if config is not None else {}
    arguments.update({name: value for name, value in given.items() if value is not None})
    # YAML reads 1e-3 as text
    written = {k: parse_value(v) if isinstance(v, str) else v for k, v in arguments.pop("set", {}).items()}
    arguments["options"] = {**written, **parse_options(pairs)}
    if isinstance(arguments.get("tasks"), str):
        arguments["tasks"] = [arguments["tasks"]]
    return arguments


def _read_config(path: Path, known: set[str]) -> dict[str, Any]:
    import yaml

    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{path}: expected options by name, found {type(read).__name__}")
    unknown = sorted(set(read) - known - {"set"})
    if unknown:
        allowed = ", ".join(sorted(known | {"set"}))
        raise ValueError(f"{path}: unknown option {', '.join(map(str, unknown))}; known: {allowed}")
    if not isinstance(read.get("set", {}), dict):
        raise ValueError(f"{path}: expected option: value pairs under set, found {read['set']!r}")
    return read


def _demo_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    from folklora.demo import demo_options, model_folder
    from folklora.demo.tasks import demo_tasks

    fixed = sorted({"model", "tasks"} & set(arguments))
    if fixed:
        raise ValueError(f"--demo brings its own {' and '.join(fixed)}; leave out --{' --'.join(fixed)}")
    seed = int(arguments.get("seed") or 0)
    method, own = arguments.get("method") or _DEMO_METHODS, arguments["options"]
    methods = [method] if isinstance(method, str) else list(method)
    return {
        **arguments,
        "method": methods,
        "model": str(model_folder()),
        "tasks": demo_tasks(seed),
        "options": demo_options(methods, own),
    }


def _show(finished: Any) -> None:
    from accelerate import PartialState

    from folklora.stream.compare import matrix_table

    if not PartialState().is_main_process:
        return
    results = finished.results
    for name, entry in results["methods"].items():
        console.print(matrix_table(name, entry, results["tasks"]))
    report_file = finished.path / "report.html"
    if report_file.is_file():
        console.print(f"report: {report_file}", soft_wrap=True)


def _hush() -> None:
    """Quiet the libraries underneath: what matters is said by the progress display."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    for name in ("accelerate", "datasets", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="trl|peft|torch|transformers|datasets|accelerate")

"""Which knowledge answers a prompt: what the methods of a run choose for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from folklora.continual.base import ContinualMethod
from folklora.stream.learn import load_model, load_tokenizer
from folklora.stream.options import build_method
from folklora.stream.run import Run, RunError, unload
from folklora.stream.train import TrainSettings


def explain(
    run: str | Path | Run,
    prompts: Sequence[str],
    methods: Sequence[str] = (),
    *,
    model: str | Path | PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
) -> dict[str, dict[str, Any]]:
    """How much what was learnt in each task takes part in the answer to each prompt, by the methods that choose.

    Args:
        run: A run, finished or not.
        prompts: What is asked, as the model reads it.
        methods: Only these of its methods; by default all that choose by the prompt.
        model: The base model's folder or hub name, or the loaded model; by default where the run found it.
        tokenizer: Taken from the model's folder if not given.
        trust_remote_code: Let a model's own code from its folder or hub page run.

    Returns:
        By method: "layers" and "slots" (names), and "weights" [prompts][layers][slots].

    Raises:
        RunError: There is no run, none of its methods has learnt a task, or an adapter is damaged.
        ValueError: A method is not the run's, or does not choose by the prompt.
    """
    run = run if isinstance(run, Run) else Run.load(run)
    request = run.request
    chosen = _choosing(run, request, methods)
    settings = TrainSettings(**request["settings"])
    place = request["model"] if model is None else model
    base = load_model(place, settings, trust_remote_code).to(PartialState().device)
    reader = tokenizer or load_tokenizer(place, base, trust_remote_code)
    found = {}
    for name, method in chosen.items():
        done = run.finished(name)
        learnt, carried = run.load_adapters(name, base)
        method.max_length = settings.max_length
        method.resume(learnt, done - 1, carried)
        method.route(learnt, 0, done)
        found[name] = method.explain(learnt.eval(), reader, prompts, request["tasks"][:done])
        base = unload(learnt)
    return found


def _choosing(run: Run, request: dict[str, Any], wanted: Sequence[str]) -> dict[str, ContinualMethod]:
    """The run's methods that choose by the prompt, with their options."""
    asked = request["methods"]
    strange = [name for name in wanted if name not in asked]
    if strange:
        raise ValueError(f"{run.path} has no method {', '.join(strange)}; it has {', '.join(asked)}")
    built = {name: build_method(name, asked[name]) for name in wanted or asked}
    fixed = [name for name, method in built.items() if type(method).explain is ContinualMethod.explain]
    if fixed and (wanted or len(fixed) == len(built)):
        raise ValueError(f"{', '.join(fixed)}: answers every prompt in the same way, so there is nothing to explain")
    chosen = {name: method for name, method in built.items() if name not in fixed}
    begun = {name: method for name, method in chosen.items() if run.finished(name)}
    if not begun:
        raise RunError(f"{run.path}: {', '.join(chosen)} has learnt no task yet; go on with the run by --resume")
    return begun

"""A merge that is planned: its models opened and found to fit together, its options checked; nothing is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from folklora.merge.engine import statistics
from folklora.merge.engine.card import layers_key
from folklora.merge.engine.config import MergeConfig, Reference, parse
from folklora.merge.engine.models import Model, open_models
from folklora.merge.engine.plan import Plan, Step, make_plan
from folklora.merge.engine.schema import Schema, schema_of
from folklora.merge.engine.vocabulary import Vocabulary, common_vocabulary
from folklora.stream.files import read_json

STATE = "state.json"
_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


@dataclass(frozen=True, eq=False)
class Job:
    """A merge that is planned.

    Args:
        config: What was asked for.
        schema: The method.
        models: The inputs.
        plan: What is to be done.
        vocabulary: The merged one, where it is not the models' own.
        seed: Of everything drawn.
        max_shard_size: The most that one file may hold.
    """

    config: MergeConfig
    schema: Schema
    models: Mapping[Reference, Model]
    plan: Plan
    vocabulary: Vocabulary | None
    seed: int
    max_shard_size: str | int

    @property
    def donor(self) -> Model:
        """The model that configuration and tokenizer come from."""
        return self.models[self.plan.donor]

    def state(self) -> dict[str, Any]:
        """What a process needs to go on with it, and a digest of the plan and of the inputs' files."""
        steps = [repr(step) for step in self.plan.steps]
        files = [path for model in self.models.values() for path in model.files()]
        files += [
            Path(file) for step in self.plan.steps for named in step.statistics.values() for file in named if file
        ]
        stamps = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in dict.fromkeys(files)]
        shards = [shard.file for shard in self.plan.shards]
        rows = [] if self.vocabulary is None else [rows.tolist() for rows in self.vocabulary.rows.values()]
        text = json.dumps([self.schema.name, self.seed, steps, shards, stamps, rows])
        digest = hashlib.sha256(text.encode()).hexdigest()
        settings = {"seed": self.seed, "max_shard_size": self.max_shard_size}
        return {"config": self.config.text, "settings": settings, "digest": digest}


def prepare(config: MergeConfig, *, seed: int = 0, max_shard_size: str | int = "5GB") -> Job:
    """Open the models, check that they fit together and plan the merge; nothing is written.

    Raises:
        FileNotFoundError: A model or file is not there.
        ValueError: The configuration is wrong, or the models do not fit together.
    """
    schema = schema_of(config.method)
    largest = _bytes(max_shard_size)
    models = open_models(config.models(), config.base)
    donor = models[config.base or config.slices[0].sources[0].model]
    _check_alike(donor, models)
    if config.sliced:
        layers_key(donor.config)
    rows = None
    folders = {reference: model.folder for reference, model in models.items()}
    vocabulary = common_vocabulary(config, folders, donor.reference, _rows_of_embeddings(config, models))
    if vocabulary is not None:
        rows = vocabulary.size
    layouts = {reference: model.layout for reference, model in models.items()}
    plan = make_plan(config, schema, layouts, donor.architecture, rows=rows, largest=largest)
    job = Job(config, schema, models, plan, vocabulary, seed, max_shard_size)
    for step in plan.steps:
        for argument in step.statistics:
            statistic_keys(job, step, argument)
    return job


def resume(work: Path) -> Job:
    """The job of a folder that is being worked on.

    Raises:
        ValueError: Its inputs have changed since.
    """
    state = read_json(work / STATE)
    job = prepare(parse(yaml.safe_load(state["config"]), "the configuration", state["config"]), **state["settings"])
    if job.state() != state:
        raise ValueError(f"the inputs of the merge in {work} have changed since it began")
    return job


def statistic_keys(job: Job, step: Step, argument: str) -> list[str]:
    """The names of a tensor's statistics in the models' files; none where there are none and none are required.

    Raises:
        ValueError: Some models have them and others do not, or they are required.
    """
    names = [job.models[take.model].layout.names[take.key] for take in step.models]
    required = job.schema.statistics[argument].required
    return statistics.find(argument, step.statistics[argument], names, job.donor.architecture.prefix, required)


def _check_alike(donor: Model, models: Mapping[Reference, Model]) -> None:
    """Refuse models of different classes."""

    def kind(model: Model) -> str:
        return (model.config.get("architectures") or [model.config.get("model_type", "no architecture")])[0]

    others = [f"{kind(model)} in {reference}" for reference, model in models.items() if kind(model) != kind(donor)]
    if others:
        raise ValueError(f"the models are of different classes: {kind(donor)} in {donor.reference}, {others[0]}")
    for reference, model in models.items():
        if model.architecture.tied != donor.architecture.tied:
            tied, untied = (donor.reference, reference) if donor.architecture.tied else (reference, donor.reference)
            raise ValueError(f"{tied} shares weights between its embeddings and its head, and {untied} does not")


def _rows_of_embeddings(config: MergeConfig, models: Mapping[Reference, Model]) -> dict[Reference, int]:
    sizes = {}
    for reference, model in models.items():
        found = [model.layout.forms[key].shape[0] for key in model.architecture.embeddings if key in model.layout.forms]
        if not found and config.tokenizer is not None:
            raise ValueError(f"{reference}: its embeddings were not found, so tokenizer_source cannot arrange them")
        sizes[reference] = found[0] if found else 0
    return sizes


def _bytes(size: str | int) -> int:
    text = str(size).strip().upper()
    unit = _UNITS.get(text[-2:], 1)
    number = text.removesuffix(text[-2:]).strip() if unit > 1 else text
    if not number.isdigit() or int(number) < 1:
        raise ValueError(f"a file's largest size is written such as 5GB or 500MB, not {size!r}")
    return int(number) * unit

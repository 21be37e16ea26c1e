"""Tasks: what a stream teaches, one after another; how they are loaded, and all that can be wrong with them."""

from __future__ import annotations

import codecs
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

_SPLITS = ("train", "test")
_CLASSIFIED = ("text", "label")
_KINDS = (_CLASSIFIED, ("prompt", "completion"))
_SETTINGS = ("name", "labels", "prompt", "completion")
_SHOWN = 20


@dataclass(frozen=True)
class Example:
    """One thing to learn: what the model reads and what it must answer.

    Attributes:
        prompt: What the model reads; it does not end with a space.
        completion: What it must answer, with the space that separates it from the prompt (" positive").
    """

    prompt: str
    completion: str


@dataclass(frozen=True)
class Task:
    """A named set of examples, and what there is to choose from when answering.

    Attributes:
        name: Unique within a stream.
        train: What is trained on.
        test: What the scores are measured on.
        labels: The completions to rank, in order; None for free text, scored by exact match.
        validation: Held out of the training examples; empty unless `hold_out` was called.
    """

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    labels: tuple[str, ...] | None
    validation: tuple[Example, ...] = ()


class TaskError(ValueError):
    """Everything that is wrong with the given tasks.

    Attributes:
        problems: One sentence each, with file and line if there is one. The message shows the first twenty.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = list(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        more = len(self.problems) - _SHOWN
        return "\n".join([*self.problems[:_SHOWN], *([f"... and {more} more problems"] if more > 0 else [])])


@dataclass(frozen=True)
class _Row:
    place: str  # where it stands, for messages: "train.jsonl:3"
    keys: tuple[str, str]  # one of _KINDS
    question: str
    answer: str


@dataclass
class _Source:
    """What a source holds, before it is checked as a whole."""

    given: str
    name: str
    rows: dict[str, list[_Row]] = field(default_factory=lambda: {split: [] for split in _SPLITS})
    labels: list[str] | None = None
    labels_declared: bool = False  # by task.json or the data set's features; null declares free text
    prompt: str | None = None
    completion: str = " {label}"
    problems: list[str] = field(default_factory=list)


def load_task(source: str | Path, prompt: str = "{text}\nAnswer:") -> Task:
    """Load one task; see `load_tasks`, whose errors it raises."""
    return load_tasks([source], prompt)[0]


def load_tasks(sources: Sequence[str | Path], prompt: str = "{text}\nAnswer:") -> list[Task]:
    """Load tasks in the given order, and report every problem of all of them at once.

    A row has "text" and "label", or "prompt" and "completion" as in TRL; other keys are ignored. Labels that
    nothing declares are those of the training rows, sorted. Spaces that end a prompt are moved to the front of
    its completion, where tokenizers expect them.

    Args:
        sources: Each one of: a folder with train.jsonl and test.jsonl, and if wanted a task.json with any of
            "name", "labels" (a list, in the order to rank; null for free text), "prompt" (a template with
            {text}) and "completion" (a template with {label}, by default " {label}");
            `NAME=TRAIN.jsonl,TEST.jsonl`; or `hub:ORG/NAME[:CONFIG]`, read by `datasets.load_dataset`.
        prompt: The template of the prompt of a row with "text", unless the task's task.json has its own.

    Returns:
        The tasks, in the order of `sources`.

    Raises:
        TaskError: A missing or empty file, a line that is not UTF-8 or not JSON, a row without the keys or with
            an empty one, rows of two kinds, a label that training never shows, equal names, a template without
            its field, a data set that cannot be loaded.
    """
    problems: list[str] = []
    if not sources:
        problems.append("no task is given: name a folder with train.jsonl and test.jsonl")
    if "{text}" not in prompt:
        problems.append(f"the prompt template {prompt!r} has no {{text}}")
    tasks: list[Task] = []
    places: dict[str, str] = {}
    for given in map(str, sources):
        source = _open(given)
        task = _build(source, source.prompt or prompt)
        if task.name in places:
            source.problems.append(
                f"{given}: the name {task.name!r} is taken by {places[task.name]}; names must differ "
                '(NAME=TRAIN.jsonl,TEST.jsonl or "name" in task.json sets one)'
            )
        places.setdefault(task.name, given)
        problems += source.problems
        tasks.append(task)
    if problems:
        raise TaskError(problems)
    return tasks


def hold_out(task: Task, fraction: float, seed: int) -> Task:
    """Move a part of the training examples into `validation`, each completion in its proportion.

    Of n training examples max(1, round(fraction n)) are moved, or fewer so that each completion keeps one. Completion
    c, with n_c of them, gives floor(fraction n_c), those with the largest remainders one more. Free text is one group.

    Args:
        task: A task.
        fraction: Part of the training examples, strictly between 0 and 1.
        seed: Which examples; the same seed moves the same ones.

    Returns:
        The task with a smaller `train`, in the old order, and a larger `validation`.

    Raises:
        ValueError: The fraction is not between 0 and 1, or no completion has two examples.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction to hold out must lie between 0 and 1, not {fraction}")
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(task.train):
        groups.setdefault("" if task.labels is None else example.completion, []).append(index)
    wanted = max(1, round(fraction * len(task.train)))
    counts = {key: min(int(fraction * len(group)), len(group) - 1) for key, group in groups.items()}
    for key in sorted(groups, key=lambda key: int(fraction * len(groups[key])) - fraction * len(groups[key])):
        if sum(counts.values()) < wanted and counts[key] < len(groups[key]) - 1:
            counts[key] += 1
    if not any(counts.values()):
        raise ValueError(f"task {task.name!r} has too few training examples to hold some out")
    generator = random.Random(seed)
    moved = {index for key, group in groups.items() for index in generator.sample(group, counts[key])}
    return replace(
        task,
        train=tuple(example for index, example in enumerate(task.train) if index not in moved),
        validation=task.validation + tuple(task.train[index] for index in sorted(moved)),
    )


def _open(given: str) -> _Source:
    if given.startswith("hub:"):
        return _from_hub(given)
    name, equals, files = given.partition("=")
    if equals and not Path(given).exists():
        return _from_files(given, name, files)
    return _from_folder(given)


def _from_folder(given: str) -> _Source:
    folder = Path(given)
    source = _Source(given, folder.resolve().name)
    if not folder.is_dir():
        forms = "a folder with train.jsonl and test.jsonl, NAME=TRAIN.jsonl,TEST.jsonl, or hub:ORG/NAME"
        source.problems.append(f"{given}: there is no such folder (a task is {forms})")
        return source
    if (folder / "task.json").exists():
        _read_settings(folder / "task.json", source)
    for split in _SPLITS:
        source.rows[split] = _read_jsonl(folder / f"{split}.jsonl", source.problems)
    return source


def _from_files(given: str, name: str, files: str) -> _Source:
    source = _Source(given, name.strip())
    paths = files.split(",")
    if not source.name or len(paths) != 2 or not all(paths):
        source.problems.append(f"{given}: expected NAME=TRAIN.jsonl,TEST.jsonl: a name and exactly two files")
        return source
    for split, path in zip(_SPLITS, paths, strict=True):
        source.rows[split] = _read_jsonl(Path(path), source.problems)
    return source


def _read_settings(path: Path, source: _Source) -> None:
    try:
        settings = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        source.problems.append(f"{path}: not valid JSON in UTF-8: {error}")
        return
    if not isinstance(settings, dict):
        source.problems.append(f"{path}: expected an object with any of {_quoted(_SETTINGS)}")
        return
    if unknown := [key for key in settings if key not in _SETTINGS]:
        source.problems.append(f"{path}: unknown {_quoted(unknown)}; valid are {_quoted(_SETTINGS)}")
    for key, needed in (("name", ""), ("prompt", "{text}"), ("completion", "{label}")):
        value = settings.get(key)
        if isinstance(value, str) and value.strip() and needed in value:
            setattr(source, key, value)
        elif key in settings:
            holding = f" with {needed}" if needed else ""
            source.problems.append(f'{path}: "{key}" must be a text{holding}, not {value!r}')
    if "labels" in settings:
        source.labels, source.labels_declared = settings["labels"], True
        _check_labels(path, source)


def _check_labels(path: Path, source: _Source) -> None:
    if source.labels is None:
        return  # null: free text
    source.labels = [_as_text(label) for label in source.labels] if isinstance(source.labels, list) else []
    bare = [label.strip() for label in source.labels]
    if not bare or not all(bare):
        source.problems.append(f'{path}: "labels" must be a list of texts, or null for free text')
        source.labels_declared = False
    elif repeated := sorted({label for label in bare if bare.count(label) > 1}):
        source.problems.append(f'{path}: "labels" repeats {_quoted(repeated)}')


def _read_jsonl(path: Path, problems: list[str]) -> list[_Row]:
    try:
        lines = path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n")
    except OSError as error:
        problems.append(f"{path}: cannot be read: {error.strerror}")
        return []
    rows = []
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        try:
            if line.strip():
                rows.append(_row(place, json.loads(line.decode("utf-8")), problems))
        except UnicodeDecodeError as error:
            problems.append(f"{place}: not UTF-8 (byte {error.start + 1} is {line[error.start]:#04x})")
        except json.JSONDecodeError as error:
            problems.append(f"{place}: not valid JSON: {error.msg} (column {error.colno})")
    if not any(line.strip() for line in lines):
        problems.append(f"{path}: the file is empty")
    return [row for row in rows if row]


def _from_hub(given: str) -> _Source:
    path, _, config = given.removeprefix("hub:").partition(":")
    source = _Source(given, "-".join(filter(None, [Path(path).name, config])))
    try:
        import datasets
    except ImportError:
        source.problems.append(f"{given}: the datasets library is missing: pip install folklora[train]")
        return source
    try:
        found = datasets.load_dataset(path, config or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = " ".join(f"{error}: {error.__cause__}".removesuffix(": None").split())
        source.problems.append(f"{given}: cannot be loaded: {why}")
        return source
    for split in _SPLITS:
        if split not in found:
            source.problems.append(f"{given}: there is no {split} split; there is {_quoted(found)}")
        elif (keys := _keys(found[split].column_names)) is None:
            source.problems.append(f"{given} {split}: {_missing(found[split].column_names)}")
        else:
            source.rows[split] = _hub_rows(source, found[split].select_columns(list(keys)), split)
    return source


def _hub_rows(source: _Source, data: Any, split: str) -> list[_Row]:
    names = getattr(data.features.get("label"), "names", None)
    if names is not None:
        source.labels, source.labels_declared = list(names), True
    if not len(data):
        source.problems.append(f"{source.given} {split}: the split is empty")
    rows = []
    for number, values in enumerate(data):
        place = f"{source.given} {split} row {number}"
        if names is None:
            rows.append(_row(place, values, source.problems))
        elif values["label"] not in range(len(names)):
            source.problems.append(f"{place}: {values['label']!r} is no label (are they hidden?)")
        else:
            rows.append(_row(place, {**values, "label": names[values["label"]]}, source.problems))
    return [row for row in rows if row]


def _row(place: str, values: Any, problems: list[str]) -> _Row | None:
    """Check one row by itself."""
    if not isinstance(values, dict):
        problems.append(f"{place}: expected an object in braces, not {str(values)[:40]!r}")
        return None
    keys = _keys(values)
    if keys is None:
        problems.append(f"{place}: {_missing(values)}")
        return None
    found = len(problems)
    for key in keys:
        if values[key] is None or (isinstance(values[key], str) and not values[key].strip()):
            problems.append(f'{place}: "{key}" is empty')
        elif not (isinstance(values[key], str) or (key == "label" and _as_text(values[key]))):
            problems.append(f'{place}: "{key}" must be a text, not {type(values[key]).__name__}')
    if len(problems) > found:
        return None
    question, answer = values[keys[0]], _as_text(values[keys[1]])
    if keys == _CLASSIFIED:
        return _Row(place, keys, question, answer.strip())
    stem = question.rstrip(" ")
    return _Row(place, keys, stem, question[len(stem) :] + answer)


def _build(source: _Source, prompt: str) -> Task:
    """Turn rows into a task, adding to `source.problems`; the task is sound only where there are none."""
    rows = [row for split in _SPLITS for row in source.rows[split]]
    for row in rows:
        if row.keys != rows[0].keys:
            source.problems.append(
                f"{row.place}: has {_quoted(row.keys)}, but {rows[0].place} has {_quoted(rows[0].keys)}; "
                "a task has rows of one kind"
            )
    classified = bool(rows) and rows[0].keys == _CLASSIFIED
    labels = _labels(source, classified)

    def complete(answer: str) -> str:
        return source.completion.replace("{label}", answer) if classified else answer

    def example(row: _Row) -> Example:
        read = prompt.replace("{text}", row.question).rstrip(" ") if classified else row.question
        return Example(read, complete(row.answer))

    train, test = (tuple(map(example, source.rows[split])) for split in _SPLITS)
    return Task(source.name, train, test, None if labels is None else tuple(map(complete, labels)))


def _labels(source: _Source, classified: bool) -> list[str] | None:
    """The labels as the rows write them, after checking that no row has another."""
    if not source.labels_declared and not classified:
        return None
    train, test = (source.rows[split] for split in _SPLITS)
    if not source.labels_declared:
        labels, checked, whose = sorted({row.answer for row in train}), test if train else [], "in training"
    elif source.labels is None:
        return None
    else:
        labels = [label.strip() if classified else label for label in source.labels]
        checked, whose = train + test, "declared"
    known = _quoted(labels[:_SHOWN]) + (", ..." if len(labels) > _SHOWN else "")
    valid = set(labels)
    source.problems += [
        f'{row.place}: unknown {row.keys[1]} "{row.answer}"; {whose} there are {known}'
        for row in checked
        if row.answer not in valid
    ]
    return labels


def _as_text(value: Any) -> str:
    """The text of a label; whole numbers are labels too. Empty for anything else."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value if isinstance(value, str) else ""


def _keys(present: Iterable[str]) -> tuple[str, str] | None:
    return next((keys for keys in _KINDS if set(keys) <= set(present)), None)


def _missing(present: Iterable[str]) -> str:
    needed = '"text" and "label", or "prompt" and "completion", are needed'
    return f"{needed}; there is {_quoted(present) or 'neither'}"


def _quoted(names: Iterable[Any]) -> str:
    return ", ".join(f'"{name}"' for name in names)

"""Five small tasks in the demo's world, of five kinds; three of them share the answers yes, no and maybe.

No text of theirs is in what the shipped model has read: they are about people, towns and houses that it has never
heard of, and the test examples about others than the training examples.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from folklora.demo.world import KINDS, TIES, Part, World, Writer
from folklora.stream.tasks import Example, Task

YES_NO_MAYBE = ("yes", "no", "maybe")

PROMPTS = {
    "opinion": "Would the writer buy it again: yes, no or maybe?\n{text}\nAgain:",
    "shelf": "Which shelf is it for: tool, food, toy, garment, instrument or furniture?\n{text}\nShelf:",
    "harbour": "Should the boats stay in harbour: yes, no or maybe?\n{text}\nStay:",
    "tie": "What is {a} to {b}: teacher, pupil, neighbour, cousin or rival?\n{text}\nTie:",
    "answer": "Does this note want a reply: yes, no or maybe?\n{text}\nReply:",
}
"""What each task asks; {text} is written by `_text`."""

LABELS = {
    "opinion": YES_NO_MAYBE,
    "shelf": KINDS,
    "harbour": YES_NO_MAYBE,
    "tie": TIES,
    "answer": YES_NO_MAYBE,
}


def demo_tasks(seed: int = 0, train: int = 420, test: int = 120) -> list[Task]:
    """Write the demo's five tasks, in the order in which the demo teaches them.

    Args:
        seed: Chooses the examples; the world stays the one that the shipped model knows a part of.
        train: Training examples a task, as many of each label, to within one.
        test: Test examples a task, likewise.

    Returns:
        The tasks opinion, shelf, harbour, tie and answer.

    Raises:
        ValueError: A count below the number of labels.
    """
    if min(train, test) < len(KINDS):
        raise ValueError(f"train={train}, test={test}: each task needs at least {len(KINDS)} examples of both")
    world = World()
    return [
        Task(
            name=name,
            train=_examples(name, world.practice, seed, train),
            test=_examples(name, world.exam, seed, test),
            labels=tuple(f" {label}" for label in labels),
        )
        for name, labels in LABELS.items()
    ]


def _examples(name: str, part: Part, seed: int, count: int) -> tuple[Example, ...]:
    rng = random.Random(f"{name} {seed}")
    writer = Writer(part, rng)
    labels = LABELS[name]
    examples: dict[str, Example] = {}
    while len(examples) < count:
        label = labels[len(examples) % len(labels)]
        prompt = _prompt(name, label, writer)
        examples.setdefault(prompt, Example(prompt, f" {label}"))
    shuffled = list(examples.values())
    rng.shuffle(shuffled)
    return tuple(shuffled)


def _prompt(name: str, label: str, writer: Writer) -> str:
    facts = writer.scene(kind=label if name == "shelf" else None, tie=label if name == "tie" else None)
    text = writer.write(_text(name, label, writer.rng))
    return PROMPTS[name].format(text=text, **facts) if name == "tie" else PROMPTS[name].format(text=text)


def _text(name: str, label: str, rng: random.Random) -> str:
    """The template of an example: the slots that its label asks for, and what has nothing to do with it at random."""
    verdicts = dict(zip(YES_NO_MAYBE, ("good", "bad", "mixed"), strict=True))
    skies = dict(zip(YES_NO_MAYBE, ("foul", "fair", "unsettled"), strict=True))
    if name == "opinion":
        return f"{{letter.open}} {{verdict.{verdicts[label]}}} {{wish.{_any(rng, YES_NO_MAYBE)}}}"
    if name == "answer":
        return f"{{note.open}} {{beast.does}}. {{wish.{label}}}"
    if name == "harbour":
        return f"{{report.open}} {{weather.{skies[label]}}}"
    if name == "tie":
        return _any(rng, ("{tie} {tie.aside}", "{tie.aside} {tie}"))
    return "{advert.open} {advert}"


def _any(rng: random.Random, choices: Sequence[str]) -> str:
    return choices[int(rng.random() * len(choices))]

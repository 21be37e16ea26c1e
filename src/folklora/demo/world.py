"""A small made-up world that writes about itself: people, towns, workshops, weather, letters, prices.

Names are joined from syllables, sentences come from grammar.txt. The world has three parts with no name in
common: `known` is what the shipped model has read about; `practice` and `exam` are what the demo's tasks
train and test on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

SEED = 7
"""The seed of the world that the shipped model has read about."""

KINDS = ("tool", "food", "toy", "garment", "instrument", "furniture")
TIES = ("teacher", "pupil", "neighbour", "cousin", "rival")

SUBJECTS = {
    "letter.yes": 2, "letter.no": 2, "letter.maybe": 2, "note": 3,
    "review.good": 2, "review.bad": 2, "review.mixed": 2,
    "weather.fair": 2, "weather.foul": 2, "weather.unsettled": 2,
    "advert": 6, "tie": 6, "life": 3, "price": 2, "list": 1, "talk": 2, "quiz": 3, "beast": 1, "vote": 3,
    "event": 2, "journey": 2,
}  # fmt: skip
"""What the world writes about, and how often."""


@dataclass(frozen=True)
class Person:
    """Somebody of the world; the ties are names of others of the same part."""

    name: str
    pronouns: tuple[str, str, str]
    home: str
    job: str
    ties: Mapping[str, str]


@dataclass(frozen=True)
class Ware:
    """Something made and sold: a noun of a kind, by a house, with its maker and price in shells."""

    house: str
    noun: str
    kind: str
    maker: str
    home: str
    price: int


@dataclass(frozen=True)
class Part:
    """A part of the world with its own people, towns and houses."""

    people: tuple[Person, ...]
    towns: tuple[str, ...]
    wares: tuple[Ware, ...]

    @property
    def names(self) -> frozenset[str]:
        """Every name that belongs to this part and to no other."""
        return frozenset({p.name for p in self.people} | set(self.towns) | {w.house for w in self.wares})

    def person(self, name: str) -> Person:
        """Look somebody up by name."""
        return self._people[name]

    @cached_property
    def _people(self) -> dict[str, Person]:
        return {person.name: person for person in self.people}


@dataclass(frozen=True)
class World:
    """The world of a seed: three parts that share words, but no names.

    Args:
        seed: The same seed gives the same world, on every machine.
    """

    seed: int = SEED
    known: Part = field(init=False, repr=False)
    practice: Part = field(init=False, repr=False)
    exam: Part = field(init=False, repr=False)

    def __post_init__(self) -> None:
        rng = random.Random(self.seed)
        names = {sort: _names(rng, sort) for sort in ("woman", "man", "town", "house")}
        for part, start, stop in (("known", 0.0, 0.7), ("practice", 0.7, 0.85), ("exam", 0.85, 1.0)):
            share = {sort: every[int(start * len(every)) : int(stop * len(every))] for sort, every in names.items()}
            object.__setattr__(self, part, _part(rng, share))


def _names(rng: random.Random, sort: str) -> list[str]:
    names = [head + tail for head in _words("head") for tail in _words(f"tail.{sort}")]
    rng.shuffle(names)
    return names[:240]


def name_pieces() -> tuple[list[str], list[str]]:
    """List the first and the last syllables that all names of all worlds are joined from."""
    tails = {tail for sort in ("woman", "man", "town", "house") for tail in _words(f"tail.{sort}")}
    return list(_words("head")), sorted(tails)


def _part(rng: random.Random, names: dict[str, list[str]]) -> Part:
    forms = {"woman": ("she", "her", "her"), "man": ("he", "his", "him")}
    sexes = {name: sex for sex in forms for name in names[sex]}
    everybody = sorted(sexes)
    people = []
    for name in everybody:
        others = rng.sample([other for other in everybody if other != name], len(TIES))
        ties = dict(zip(TIES, others, strict=True))
        people.append(Person(name, forms[sexes[name]], rng.choice(names["town"]), rng.choice(_words("job")), ties))
    wares = []
    for house in names["house"]:
        for kind in rng.sample(KINDS, 3):
            maker = rng.choice(people)
            noun = rng.choice(_words(kind))
            wares.append(Ware(house, noun, kind, maker.name, maker.home, rng.randint(2, 99)))
    return Part(tuple(people), tuple(names["town"]), tuple(wares))


@cache
def _rules() -> dict[str, list[list[str]]]:
    rules: dict[str, list[list[str]]] = {}
    symbol = ""
    for line in Path(__file__).with_name("grammar.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("  |"):
            found = re.split(r"(?:^| +)\| ", line.strip().replace("\\n", "\n"))[1:]
            rules[symbol] += [_pieces(alternative) for alternative in found]
        elif line.endswith(":"):
            symbol = line[:-1]
            rules[symbol] = []
    return rules


def _words(symbol: str) -> list[str]:
    return [pieces[0] for pieces in _rules()[symbol]]


def _pieces(template: str) -> list[str]:
    return re.split(r"\{([\w.]+)\}", template)


class Writer:
    """Somebody who writes about one part of the world.

    Args:
        part: Whom and what to write about.
        rng: Where the choices come from; it is moved on by every call.
    """

    def __init__(self, part: Part, rng: random.Random) -> None:
        self.part = part
        self.rng = rng
        self.facts: dict[str, str] = {}
        self.rules: dict[str, str] = {}
        self._said: set[tuple[str, int]] = set()

    def scene(self, kind: str | None = None, tie: str | None = None) -> dict[str, str]:
        """Draw the people, towns and wares that the next text is about.

        Args:
            kind: The kind of the wares, one of `KINDS`; None means any.
            tie: What a is to b, one of `TIES`; None means any.

        Returns:
            The facts, by slot, such as {"p": "Morisa", "p.home": "Kelholm", "w.noun": "kite", ...}.
        """
        rng, part = self.rng, self.part
        tie = tie or rng.choice(TIES)
        p, b = rng.sample(part.people, 2)
        a = part.person(b.ties[tie])
        wares = [ware for ware in part.wares if ware.kind == kind] if kind else part.wares
        w, v = rng.sample(wares, 2)
        while w.price == v.price:
            v = rng.choice(wares)
        t, u = rng.sample(part.towns, 2)
        facts = {"t": t, "u": u, "her": rng.choice(("her", "his"))}
        for key, person in (("p", p), ("a", a), ("b", b)):
            facts[key] = person.name
            facts[f"{key}.she"], facts[f"{key}.her"], facts[f"{key}.them"] = person.pronouns
            facts |= {f"{key}.home": person.home, f"{key}.job": person.job}
            facts |= {f"{key}.{tie}": name for tie, name in person.ties.items()}
        for key, ware in (("w", w), ("v", v)):
            facts |= {f"{key}.{fact}": str(value) for fact, value in vars(ware).items()}
        facts["dear"], facts["cheap"] = (w.house, v.house) if w.price > v.price else (v.house, w.house)
        facts["afford"] = "could buy it" if v.price >= w.price else "could not buy it"
        facts["tie.name"] = tie
        self.facts = facts
        self.rules = {"trait": f"{w.kind}.trait", "tie": f"tie.{tie}"}
        return facts

    def write(self, template: str) -> str:
        """Fill the slots of a template and mend the English.

        Args:
            template: Text with {slots}: facts of the scene, or symbols of the grammar.

        Returns:
            The text, with capitals at the starts of sentences. No phrase occurs twice in it.

        Raises:
            KeyError: A slot that neither the scene nor the grammar knows.
        """
        self._said.clear()
        text = self._fill(_pieces(template))
        text = re.sub(r"\b([Aa]) (?=[aeiouAEIO])", r"\1n ", text)
        return re.sub(r'(^"?|[.!?] "?|\n| ")([a-z])', lambda match: match[1] + match[2].upper(), text)

    def _fill(self, pieces: list[str]) -> str:
        written = list(pieces)
        for index in range(1, len(pieces), 2):
            slot = pieces[index]
            written[index] = self.facts[slot] if slot in self.facts else self._choose(self.rules.get(slot, slot))
        return "".join(written)

    def _choose(self, symbol: str) -> str:
        alternatives = _rules()[symbol]
        count = len(alternatives)
        choice = int(self.rng.random() * count)
        for _ in range(count):
            if (symbol, choice) not in self._said:
                break
            choice = (choice + 1) % count
        self._said.add((symbol, choice))
        return self._fill(alternatives[choice])


def texts(part: Part, seed: int, documents: int) -> Iterator[str]:
    """Write documents about one part of the world.

    Args:
        part: The part.
        seed: The same part, seed and count give the same texts, on every machine.
        documents: How many to write.

    Yields:
        One document: a letter, a riddle, a report, a list, ...; some 25 words.
    """
    writer = Writer(part, random.Random(seed))
    for subject in writer.rng.choices(list(SUBJECTS), weights=list(SUBJECTS.values()), k=documents):
        writer.scene()
        yield writer.write(f"{{doc.{subject}}}")


def pretraining_text(world: World, seed: int, documents: int) -> Iterator[str]:
    """Write what the demo's model reads: `texts` about the known part of the world, and nothing of the other two.

    Args:
        world: The world.
        seed: Chooses the documents.
        documents: How many to write.

    Returns:
        The documents.
    """
    return texts(world.known, seed, documents)

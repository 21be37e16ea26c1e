import random
import re

import pytest

from folklora.demo.world import KINDS, SEED, SUBJECTS, World, Writer, name_pieces, pretraining_text, texts


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def documents(world):
    return list(pretraining_text(world, 0, 3_000))


def test_a_seed_decides_the_world_and_what_is_written(world):
    assert World(SEED) == world
    assert World(SEED + 1).known.names != world.known.names
    first = list(pretraining_text(world, 5, 50))
    assert first == list(pretraining_text(World(), 5, 50))
    assert first != list(pretraining_text(world, 6, 50))


def test_no_name_belongs_to_two_parts(world):
    parts = [world.known.names, world.practice.names, world.exam.names]
    assert len(frozenset.union(*parts)) == sum(map(len, parts))
    assert min(map(len, parts)) > 100


@pytest.mark.parametrize("seed", range(20, 25))
def test_names_are_unique_in_every_world(seed):
    other = World(seed)
    for part in (other.known, other.practice, other.exam):
        people = {person.name for person in part.people}
        assert len(people) == len(part.people)
        assert not people & set(part.towns)
        assert all(set(person.ties.values()) <= people - {person.name} for person in part.people)


def test_the_pretraining_text_knows_no_name_of_the_other_parts(world, documents):
    words = set(re.findall(r"[A-Za-z]+", "\n".join(documents)))
    assert not words & (world.practice.names | world.exam.names)
    assert len(words & world.known.names) > 0.9 * len(world.known.names)


def test_documents_hardly_repeat_and_no_slot_stays_open(documents):
    assert len(set(documents)) > 0.98 * len(documents)
    assert not any("{" in document or "|" in document for document in documents)
    assert all(document[0].isupper() or document[0] == '"' for document in documents)


def test_sentences_begin_with_capitals_and_articles_fit(documents):
    text = "\n".join(documents)
    assert not re.search(r"[.!?] [a-z]", text)
    assert not re.search(r"\ba [aeiou]", text)


def test_every_alternative_of_the_grammar_can_be_written(world):
    writer = Writer(world.exam, random.Random(0))
    for subject in SUBJECTS:
        for _ in range(60):
            writer.scene()
            assert writer.write(f"{{doc.{subject}}}")


def test_prices_are_compared_rightly(world):
    found = 0
    for text in texts(world.known, 2, 4_000):
        match = re.search(r"The (\w+) \w+ costs (\d+) shells and the (\w+) \w+ costs (\d+)\. The (\w+) one", text)
        if match:
            found += 1
            dearer = match[1] if int(match[2]) > int(match[4]) else match[3]
            assert match[5] == dearer
    assert found > 10


def test_facts_stay_the_same_from_text_to_text(world):
    homes = {person.name: person.home for person in world.known.people}
    text = "\n".join(texts(world.known, 3, 3_000))
    told = re.findall(r"Where does (\w+) live\? In (\w+)\.", text)
    assert len(told) > 30
    assert all(homes[name] == home for name, home in told)


def test_wares_of_the_asked_kind_only(world):
    writer = Writer(world.practice, random.Random(1))
    for kind in KINDS:
        assert {writer.scene(kind)["w.kind"] for _ in range(20)} == {kind}


def test_an_unknown_slot_is_an_error(world):
    writer = Writer(world.known, random.Random(0))
    writer.scene()
    with pytest.raises(KeyError, match="nowhere"):
        writer.write("{nowhere}")


def test_every_name_is_joined_from_the_listed_pieces(world):
    heads, tails = name_pieces()
    joined = {head + tail for head in heads for tail in tails}
    assert world.known.names | world.practice.names | world.exam.names <= joined

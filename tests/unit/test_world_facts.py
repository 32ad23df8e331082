"""The demo world: true, split by country, and searchable."""

import hashlib
import random
import re
from collections import Counter
from pathlib import Path

import pytest

import demo_data
import world_facts
from facts import FactSet, fold
from igpo_megatron.search.local.bm25 import Bm25Index
from igpo_megatron.types import Hop, UserError


@pytest.fixture(scope="module")
def world():
    return world_facts.build()


def by_id(world, name):
    return next(question for question in world.questions if question.id == name)


def test_a_three_hop_question_carries_its_chain_of_real_facts(world):
    city = next(city for city in world.cities if city.name == "Isfahan")
    question = by_id(world, f"3hop_currency_code:{city.geoname_id}")
    assert question.text == "What is the code of the currency of the country where Isfahan is located?"
    assert question.hops == (Hop("Isfahan", "country", "Iran"), Hop("Iran", "currency", "Iranian Rial"), Hop("Iranian Rial", "code", "IRR"))
    assert (question.answer, question.kind) == ("IRR", "world_3hop_currency_code")


def test_countries_and_languages_carry_the_aliases_of_the_sources(world):
    question = by_id(world, f"1hop_country:{next(city for city in world.cities if city.name == 'Isfahan').geoname_id}")
    assert question.answer == "Iran" and "Islamic Republic of Iran" in question.aliases
    assert by_id(world, "1hop_language:BD").aliases == ("Bangla",)
    assert (by_id(world, "2hop_language_code:FR").answer, by_id(world, "2hop_language_code:FR").aliases) == ("FRA", ("FRE", "FR"))


def test_there_are_fifteen_kinds_and_each_is_in_both_splits(world):
    kinds = Counter((question.kind, question.split) for question in world.questions)
    assert len({kind for kind, _ in kinds}) == 15 and len(kinds) == 30 and min(kinds.values()) >= 30


def test_no_training_question_or_chain_names_a_test_country_its_cities_or_its_own_currency(world):
    users = Counter(country.currency for country in world.countries)
    held_out = {country.name.text for country in world.countries if country.split == "test"}
    held_out |= {city.name for city in world.cities if city.country.split == "test"}
    held_out |= {country.currency.name.text for country in world.countries if country.split == "test" and users[country.currency] == 1}
    train = [question for question in world.questions if question.split == "train"]
    assert held_out.isdisjoint(hop.entity for question in train for hop in question.hops)
    assert held_out.isdisjoint(question.answer for question in train)
    assert 50 <= sum(country.split == "test" for country in world.countries) <= 56


def test_chains_connect_end_in_the_answer_and_ids_are_unique(world):
    for question in world.questions:
        assert question.hops[-1].value == question.answer
        assert all(left.value == right.entity for left, right in zip(question.hops, question.hops[1:], strict=False))
        assert question.hops[0].entity in question.text
    assert len({question.id for question in world.questions}) == len(world.questions) > 20_000
    assert len({passage.doc_id for passage in world.passages}) == len(world.passages) > 3_500


def test_every_text_is_plain_ascii_without_double_quotes(world):
    texts = [text for passage in world.passages for text in (passage.title, passage.text)]
    texts += [text for question in world.questions for text in (question.text, question.answer, *question.aliases)]
    assert all(text.isascii() and '"' not in text and text == text.strip() for text in texts)


def test_the_two_best_passages_for_a_hop_state_its_fact(world):
    index = Bm25Index(world.passages)
    found, asked = Counter(), Counter()
    for question in random.Random(0).sample(world.questions, 1500):
        for hop in question.hops:
            texts = [passage.text for passage, _ in index.search(hop.query, 2)]
            asked[hop.relation] += 1
            found[hop.relation] += any(hop.entity in text and hop.value in text for text in texts)
    assert set(asked) == {"country", "capital", "currency", "language", "continent", "code"}
    assert {relation: found[relation] / asked[relation] for relation in asked if found[relation] < 0.95 * asked[relation]} == {}


def test_the_world_is_the_same_every_time(world):
    assert world_facts.build() == world


def test_the_world_is_that_of_every_published_figure(world):
    """Figures of different versions are comparable only on the same questions. New data of the pinned packages change it: say so then."""
    texts = [repr((p.doc_id, p.title, p.text)) for p in world.passages]
    texts += [
        repr((q.id, q.text, q.answer, q.aliases, [(h.entity, h.relation, h.value) for h in q.hops], q.kind, q.split))
        for q in world.questions
    ]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest() == "7eaced0d99a9d0ab6f6047c638a0dc24e758de1c10e251456d5dfee5bf6cb67f"


@pytest.mark.parametrize(
    ("name", "folded"),
    [
        ("Łódź", "Lodz"),
        ("São Tomé", "Sao Tome"),
        ("Tromsø", "Tromso"),
        ("Diyarbak\N{LATIN SMALL LETTER DOTLESS I}r", "Diyarbakir"),
        ("Gießen", "Giessen"),
        ("Ta\N{RIGHT SINGLE QUOTATION MARK}izz", "Ta'izz"),
        ("東京", ""),
    ],
)
def test_names_are_folded_whole_or_not_at_all(name, folded):
    assert fold(name) == folded


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file cannot be made \(File exists: .*choose a folder"):
        demo_data.main(tmp_path / "file")


def test_an_interrupted_set_is_not_taken_for_a_complete_one(tmp_path, monkeypatch):
    """By `make quickstart` and `make quickstart-llm`."""

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo_data, "write_questions", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo_data._make(tmp_path, lambda: FactSet((), ()), lambda made: "", "")
    makefile = Path(demo_data.__file__).parents[1].joinpath("Makefile").read_text(encoding="utf-8")
    marks = re.findall(r"test -e runs/world-facts(\S*) \|\|", makefile)
    assert len(marks) == 2 and not any((tmp_path / mark.removeprefix("/")).exists() for mark in marks)

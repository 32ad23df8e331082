"""The element facts: true to mendeleev's database, split by element and decay series, and searchable."""

import importlib.metadata
import json
import re
import sqlite3
from collections import Counter, defaultdict
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import demo_data
import element_facts
import world_facts
from element_facts import split_of
from igpo_megatron.data.question_files import check_file
from igpo_megatron.search.local.bm25 import Bm25Index
from igpo_megatron.types import Hop, UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made():
    try:
        element_facts.database()
    except UserError as error:
        pytest.skip(str(error))
    return element_facts.build()


def by_id(made, name):
    return next(question for question in made.questions if question.id == name)


def states(passage, hop):
    """Whether the passage is about the hop's entity and has its value as a whole word or number: 2 is not in 2.4."""
    value = re.search(rf"(?<![\w.-]){re.escape(hop.value)}(?!\w|\.\d)", passage.text)
    about = hop.value if hop.relation == "element" else hop.entity
    return passage.title == about and hop.entity in passage.text and value is not None


def test_a_three_hop_question_follows_a_decay_series(made):
    question = by_id(made, "3hop_product_product_half_life:Rn-222")
    assert question.text == "In minutes, what is the half-life of the decay product of the isotope that Radon-222 mainly decays into?"
    assert [(hop.entity, hop.relation, hop.value) for hop in question.hops] == [
        ("Radon-222", "decay product", "Polonium-218"),
        ("Polonium-218", "decay product", "Lead-214"),
        ("Lead-214", "half-life", "27.06"),
    ]
    assert (question.answer, question.aliases, question.split) == ("27.06", (), "test")


def test_a_three_hop_question_starts_from_a_number_of_the_chemical_register(made):
    question = by_id(made, "3hop_cas_longest_product:I")
    place = "the longest-lived radioactive isotope of the element with the CAS number 7553-56-2"
    assert question.text == f"What is the main decay product of {place}?"
    assert [hop.value for hop in question.hops] == ["Iodine", "Iodine-129", "Xenon-129"]
    assert (question.aliases, question.split) == (("Xe-129",), "train")


@pytest.mark.parametrize(
    ("name", "mass", "product"),
    [
        ("Uranium", 238, "Thorium-234"),  # alpha
        ("Carbon", 14, "Nitrogen-14"),  # beta minus
        ("Sodium", 22, "Neon-22"),  # beta plus
        ("Iodine", 125, "Tellurium-125"),  # electron capture
        ("Nitrogen", 17, None),  # 95 % of its beta decays are followed by a neutron
        ("Bismuth", 212, None),  # 64 % beta, 36 % alpha
        ("Iron", 56, None),  # stable
    ],
)
def test_the_product_is_that_of_the_main_decay_and_absent_where_there_is_none(made, name, mass, product):
    isotope = next(isotope for isotope in made.isotopes if isotope.name.text == f"{name}-{mass}")
    assert (isotope.product and isotope.product.text) == product


def test_every_figure_is_the_databases(made):
    with closing(sqlite3.connect(element_facts.database())) as source:
        isotopes = {
            f"{name}-{mass}": rest
            for name, mass, *rest in source.execute(
                "SELECT e.name, mass_number, half_life, half_life_unit, abundance, i.discovery_year "
                "FROM isotopes i JOIN elements e USING (atomic_number)"
            )
        }
        cas = dict(source.execute("SELECT name, cas FROM elements"))
    facts = {hop for question in made.questions for hop in question.hops}
    for hop in facts:
        if hop.relation == "half-life":
            assert float(hop.value) == isotopes[hop.entity][0]
        elif hop.relation == "natural abundance":
            assert float(hop.value) == pytest.approx(isotopes[hop.entity][2], rel=1e-9)
        elif hop.relation == "discovery year":
            assert int(hop.value) == isotopes[hop.entity][3]
        elif hop.relation == "CAS number":
            assert hop.value == cas[hop.entity]
    for question in made.questions:
        if question.hops[-1].relation == "half-life":
            unit = element_facts.UNITS[isotopes[question.hops[-1].entity][1]].text
            assert question.text.startswith(f"In {unit}, ") and question.aliases == ()


def test_a_decay_never_leaves_its_series_so_that_one_of_four_can_be_held_out(made):
    mass = {isotope.name.text: isotope.mass_number for isotope in made.isotopes}
    for isotope in made.isotopes:
        if isotope.product:
            assert (isotope.mass_number - int(isotope.product.text.rsplit("-", 1)[1])) % 4 == 0
    held_out = [isotope for isotope in made.isotopes if isotope.held_out]
    assert 0.2 < len(held_out) / len(mass) < 0.3 and all(isotope.mass_number % 4 == 2 for isotope in held_out)
    assert sum(element.held_out for element in made.elements) == 30


def test_no_training_question_names_anything_held_out_and_the_last_fact_of_a_test_question_is_about_it(made):
    held_out = {isotope.name.text for isotope in made.isotopes if isotope.held_out}
    held_out |= {entity for element in made.elements if element.held_out for entity in (element.name.text, element.cas)}
    for question in made.questions:
        entities = {entity for hop in question.hops for entity in (hop.entity, hop.value)}
        if question.split == "train":
            assert held_out.isdisjoint(entities)
        else:
            assert question.hops[-1].entity in held_out
    facts = {split: {q.hops[-1] for q in made.questions if q.split == split} for split in ("train", "test")}
    assert facts["train"].isdisjoint(facts["test"])


def test_a_chain_that_mixes_held_out_and_other_facts_is_in_neither_split_unless_its_last_fact_is_held_out():
    def chain(*entities):
        return tuple(Hop(left, "decay product", right) for left, right in pairwise(entities))

    assert split_of(chain("a", "b", "c"), {"x"}) == "train"
    assert split_of(chain("a", "x", "c"), {"x"}) == "test"
    assert split_of(chain("x", "b", "c"), {"x"}) is None
    assert split_of(chain("a", "b", "x"), {"x"}) is None


def test_there_are_thirty_kinds_and_each_is_in_both_splits(made):
    kinds = Counter((question.kind, question.split) for question in made.questions)
    assert len({kind for kind, _ in kinds}) == 30 and len(kinds) == 60 and min(kinds.values()) >= 10
    share = sum(question.split == "test" for question in made.questions) / len(made.questions)
    assert len(made.questions) > 10_000 and 0.2 < share < 0.3


def test_chains_connect_and_end_in_the_answer(made):
    for question in made.questions:
        assert 1 <= len(question.hops) <= 3 and f"_{len(question.hops)}hop_" in question.kind
        assert question.hops[-1].value == question.answer
        assert all(left.value == right.entity for left, right in pairwise(question.hops))
        assert question.hops[0].entity in question.text
        # What a hop leads to must be found, not read off the question.
        assert not any(hop.value in re.findall(r"[\w-]+", question.text) for hop in question.hops)


def test_no_question_has_two_answers(made):
    values = defaultdict(set)
    for question in made.questions:
        for hop in question.hops:
            values[hop.entity, hop.relation].add(hop.value)
    assert all(len(found) == 1 for found in values.values())
    assert len({question.text for question in made.questions}) == len({question.id for question in made.questions}) == len(made.questions)
    assert len({passage.doc_id for passage in made.passages}) == len(made.passages) > 4_000


def test_the_most_frequent_answer_to_a_kind_is_right_at_most_one_time_in_eight(made):
    """A guess without a search."""
    answers = defaultdict(Counter)
    for question in made.questions:
        answers[question.kind][question.answer] += 1
    assert max(max(count.values()) / count.total() for count in answers.values()) < 1 / 8


def test_the_longest_lived_isotope_is_not_named_where_measurements_do_not_tell(made):
    """The half-lives of Technetium-97 and -98 differ by less than their errors: 4.21 and 4.2 million years."""
    longest = {hop.entity: hop.value for q in made.questions for hop in q.hops if hop.relation == "longest-lived radioactive isotope"}
    assert longest["Uranium"] == "Uranium-238" and longest["Radium"] == "Radium-226" and "Technetium" not in longest
    # Tungsten-180 is radioactive, with the longest half-life measured, but others count as stable only until their decay is observed.
    assert "Tungsten" not in longest


def test_every_text_is_plain_ascii_without_double_quotes(made):
    texts = [text for passage in made.passages for text in (passage.title, passage.text)]
    texts += [text for question in made.questions for text in (question.text, question.answer, *question.aliases)]
    assert all(text.isascii() and '"' not in text and text == text.strip() for text in texts)


def test_the_best_passages_for_a_hop_state_its_fact(made):
    index = Bm25Index(made.passages)
    found, asked = {2: Counter(), 5: Counter()}, Counter()
    for hop in {hop for question in made.questions for hop in question.hops}:
        best = [passage for passage, _ in index.search(hop.query, 5)]
        asked[hop.relation] += 1
        for top, count in found.items():
            count[hop.relation] += any(states(passage, hop) for passage in best[:top])
    assert set(asked) == set(element_facts.RELATIONS)
    assert {r: found[2][r] / asked[r] for r in asked if found[2][r] < 0.95 * asked[r]} == {}
    assert {r: found[5][r] / asked[r] for r in asked if found[5][r] < 0.99 * asked[r]} == {}


def test_the_set_is_the_same_every_time(made):
    assert element_facts.build() == made


def test_it_is_written_as_the_demos_set_is(made, tmp_path):
    demo_data.write(made, tmp_path)
    (tmp_path / "SOURCES.md").write_text(demo_data.element_sources(made))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["SOURCES.md", "corpus.jsonl", "test.parquet", "train.parquet"]
    for split in ("train", "test"):
        report = check_file(tmp_path / f"{split}.parquet")
        assert report.layout == "IGPO" and report.problems == () and len(report.sources) == 30
    row = next(
        row for row in pq.read_table(tmp_path / "test.parquet").to_pylist() if row["data_source"] == "element_3hop_product_product_year"
    )
    hops = json.loads(row["extra_info"]["hops"])
    assert [hop[1] for hop in hops] == ["decay product", "decay product", "discovery year"] and hops[-1][2] == row["reward_model"][
        "ground_truth"
    ]
    sources = " ".join((tmp_path / "SOURCES.md").read_text().split())
    for word in ("mendeleev", "licence: MIT", "NUBASE2020", "CRC Handbook", f"{len(made.questions)} questions"):
        assert word in sources


def test_one_corpus_may_hold_both_sets(made):
    world = world_facts.build()
    ids = [passage.doc_id for passage in (*world.passages, *made.passages)]
    assert len(set(ids)) == len(ids)
    assert {question.text for question in world.questions}.isdisjoint(question.text for question in made.questions)


def test_the_table_in_the_documentation_has_the_sizes_of_both_sets(made):
    page = (ROOT / "docs/training.md").read_text()
    for name, built in (("world-facts", world_facts.build()), ("element-facts", made)):
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        kinds = {question.kind for question in built.questions}
        assert f"| {len(built.passages):,} | {len(built.questions):,} | {len(kinds)} |" in row


def test_without_the_package_one_sentence_says_how_to_get_it(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match=r'mendeleev, which is not installed; run "pip install --no-deps mendeleev==1\.3\.0"'):
        element_facts.build()

"""Build "Element facts": chemical elements, their isotopes and what these decay into; hardly a number of it is known by heart.

    mendeleev's database -> Element, Isotope -> Passage     two passages per isotope, up to four per element
                                             -> Question    1 to 3 hops, e.g. isotope -> its decay product -> that one's half-life

Everything is a function of the database in the installed `mendeleev`, which is read with sqlite3: the package is not imported, so that
its dependencies are not needed. Elements are held out by hashing; isotopes by mass number: alpha and beta decay change it by 4 or 0, so
the isotopes of one decay series, 4n + 2 (uranium-238's), are held out together. Discoverers are left out: the source mixes first
description and isolation.
"""

from __future__ import annotations

import importlib.metadata
import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from facts import TEST_SHARE, FactSet, Name, Question, Split, digest, phrased
from igpo_megatron.data.corpus import Passage
from igpo_megatron.types import Hop, UserError

PACKAGE = "mendeleev==1.3.0"

MIN_MASS_NUMBER = 10
"""BM25 drops words of one letter or digit, so it could not tell Helium-3 from Helium-4."""

MAIN_SHARE = 90.0
"""Least share of decays, in percent, of the decay an isotope "mainly" undergoes."""

CLEARLY = 1.2
"""How many times longer than the next the half-life of the longest-lived isotope must be: measurements err."""

TEST_SERIES = 2
"""Isotopes whose mass number leaves this rest when divided by 4 are held out."""


class Unit(NamedTuple):
    """A unit of half-lives."""

    text: str
    seconds: float


YEAR_S = 31_556_926.0
UNITS = {
    "sec": Unit("seconds", 1),
    "minute": Unit("minutes", 60),
    "hour": Unit("hours", 3600),
    "day": Unit("days", 86_400),
    "year": Unit("years", YEAR_S),
    "kyear": Unit("thousand years", 1e3 * YEAR_S),
    "Myear": Unit("million years", 1e6 * YEAR_S),
    "Gyear": Unit("billion years", 1e9 * YEAR_S),
    "Tyear": Unit("trillion years", 1e12 * YEAR_S),
    "Pyear": Unit("quadrillion years", 1e15 * YEAR_S),
    "Eyear": Unit("quintillion years", 1e18 * YEAR_S),
    "Zyear": Unit("sextillion years", 1e21 * YEAR_S),
    "Yyear": Unit("septillion years", 1e24 * YEAR_S),
}
"""The source's name of a unit -> ours. Shorter ones (milliseconds and less) are not here: such isotopes are left out."""

SPELLINGS = {"Aluminum": "Aluminium", "Cesium": "Caesium", "Sulfur": "Sulphur"}
"""The source's American names -> the British."""


@dataclass(frozen=True, slots=True)
class Element:
    """A chemical element with the facts the corpus states about it."""

    number: int
    """Protons in the nucleus."""

    name: Name
    """The symbol is an alias."""

    symbol: str
    cas: str
    """Number in the register of the Chemical Abstracts Service, e.g. 7440-14-4."""

    series: str
    """E.g. Actinides."""

    melting: str | None
    """Kelvin; None where it is unknown or depends on the form (graphite, white tin)."""

    boiling: str | None
    """Kelvin; None as for `melting`."""

    held_out: bool


@dataclass(frozen=True, slots=True)
class Isotope:
    """An isotope that is stable, or lives for at least a second."""

    element: Element
    mass_number: int
    half_life: float | None
    """In `unit`; None if the isotope is stable."""

    unit: Unit | None
    abundance: float | None
    """Percent of the natural element; None if it is not found in nature."""

    year: int
    """Of discovery."""

    product: Name | None
    """The isotope that at least 90 % of its decays end in."""

    @property
    def name(self) -> Name:
        return _isotope_name(self.element, self.mass_number)

    @property
    def held_out(self) -> bool:
        return self.mass_number % 4 == TEST_SERIES

    @property
    def lifetime_s(self) -> float:
        """Half-life in seconds; 0 if the isotope is stable."""
        return self.half_life * self.unit.seconds if self.half_life is not None and self.unit is not None else 0.0


@dataclass(frozen=True, slots=True)
class Elements(FactSet):
    """The whole set."""

    elements: tuple[Element, ...]
    isotopes: tuple[Isotope, ...]


def build() -> Elements:
    """Read the source and derive everything. Under a second. UserError if mendeleev is not installed."""
    with closing(sqlite3.connect(f"file:{database()}?mode=ro", uri=True)) as source:
        source.row_factory = sqlite3.Row
        elements = read_elements(source)
        isotopes = read_isotopes(source, elements)
        chains = Chains({isotope.name.text: isotope for isotope in isotopes}, extremes(source, isotopes))
    return Elements(tuple(passages(elements, chains)), tuple(questions(elements, chains)), elements, isotopes)


def database() -> Path:
    """The SQLite file that mendeleev ships."""
    try:
        found = importlib.metadata.distribution("mendeleev")
    except importlib.metadata.PackageNotFoundError:
        raise UserError(
            f'the element facts are read from the package mendeleev, which is not installed; run "pip install --no-deps {PACKAGE}"'
        ) from None
    return Path(str(found.locate_file("mendeleev/elements.db")))


# ---- source -> facts


def read_elements(source: sqlite3.Connection) -> tuple[Element, ...]:
    """All 118, by atomic number."""
    points: dict[int, list[sqlite3.Row]] = defaultdict(list)
    for row in source.execute("SELECT * FROM phasetransitions"):
        points[row["atomic_number"]].append(row)
    rows = source.execute(
        "SELECT e.*, s.name AS series FROM elements e JOIN series s ON s.id = e.series_id ORDER BY atomic_number"
    ).fetchall()
    test = set(sorted((row["symbol"] for row in rows), key=digest)[: round(TEST_SHARE * len(rows))])
    return tuple(
        Element(
            number=row["atomic_number"],
            name=Name(row["name"], tuple(form for form in (row["symbol"], SPELLINGS.get(row["name"])) if form)),
            symbol=row["symbol"],
            cas=row["cas"],
            series=row["series"],
            melting=_point(points[row["atomic_number"]], "melting_point"),
            boiling=_point(points[row["atomic_number"]], "boiling_point"),
            held_out=row["symbol"] in test,
        )
        for row in rows
    )


def _point(rows: list[sqlite3.Row], field: str) -> str | None:
    """The one melting or boiling point; None if there are several forms, it sublimes, or it is not known."""
    if len(rows) != 1 or rows[0]["allotrope"] or rows[0]["is_sublimation_point"] or rows[0][field] is None:
        return None
    return _number(rows[0][field])


def _number(value: float) -> str:
    """Without what binary fractions add: 87.30199999999996 -> 87.302."""
    return f"{value:.10g}"


def _isotope_name(element: Element, mass_number: int) -> Name:
    return Name(f"{element.name.text}-{mass_number}", (f"{element.symbol}-{mass_number}",))


def read_isotopes(source: sqlite3.Connection, elements: Iterable[Element]) -> tuple[Isotope, ...]:
    """Isotopes with a year of discovery that are stable or have a measured half-life of a second or more, by element and mass number."""
    by_number = {element.number: element for element in elements}
    modes: dict[int, list[sqlite3.Row]] = defaultdict(list)
    for row in source.execute("SELECT * FROM isotopedecaymodes"):
        modes[row["isotope_id"]].append(row)
    found = []
    for row in source.execute("SELECT * FROM isotopes ORDER BY atomic_number, mass_number"):
        unit = UNITS.get(row["half_life_unit"])
        stable = not row["is_radioactive"] and row["abundance"] is not None
        if row["mass_number"] < MIN_MASS_NUMBER or row["discovery_year"] is None or not (stable or (unit and row["half_life"])):
            continue
        element, product = by_number[row["atomic_number"]], None
        if not stable and (step := _main_decay(modes[row["id"]])):
            product = _isotope_name(by_number[element.number + step.protons], row["mass_number"] + step.nucleons)
        found.append(Isotope(element, row["mass_number"], row["half_life"], unit, row["abundance"], row["discovery_year"], product))
    return tuple(found)


class Step(NamedTuple):
    """What a decay changes."""

    protons: int
    nucleons: int


STEPS = {"A": Step(-2, -4), "B-": Step(1, 0), "B+": Step(-1, 0), "EC": Step(-1, 0)}
"""Alpha, beta minus, beta plus (the source counts electron capture in) and pure electron capture."""


def _main_decay(modes: Iterable[sqlite3.Row]) -> Step | None:
    """The decay with a measured share of 90 % or more.

    None if there is no such, or a tenth or more of the beta decays may be followed by a neutron, proton or alpha particle (the
    source's B-n, B+p, ...: parts of B- and B+, so the product would be another).
    """
    main = None
    for mode in modes:
        share = mode["intensity"]
        delayed = mode["mode"].startswith(("B-", "B+")) and mode["mode"] not in STEPS
        if delayed and not mode["is_allowed_not_observed"] and (share is None or mode["relation"] == ">" or share >= 100 - MAIN_SHARE):
            return None
        if mode["mode"] in STEPS and mode["relation"] == "=" and share is not None and share >= MAIN_SHARE:
            main = STEPS[mode["mode"]]
    return main


MAY_DECAY = """SELECT atomic_number FROM isotopes i JOIN isotopedecaymodes m ON m.isotope_id = i.id
WHERE NOT is_radioactive AND abundance IS NOT NULL"""
"""Isotopes that count as stable although the source lists a decay, mostly one that nobody has observed yet."""


class Extremes(NamedTuple):
    """Of one element."""

    abundant: Isotope | None
    """Its most abundant isotope in nature; None if it has none."""

    longest: Isotope | None
    """Its longest-lived radioactive isotope; None if it has none, or measurements do not tell which it is."""


def extremes(source: sqlite3.Connection, isotopes: Iterable[Isotope]) -> dict[int, Extremes]:
    """Atomic number -> its extremes. An isotope that is radioactive but not measured may live as long as a thousand of the unit in
    which the source expects its half-life; one that counts as stable but may decay, for ever."""
    of: dict[int, list[Isotope]] = defaultdict(list)
    for isotope in isotopes:
        of[isotope.element.number].append(isotope)
    rivals: dict[int, float] = defaultdict(float)
    for row in source.execute("SELECT * FROM isotopes WHERE is_radioactive AND half_life IS NULL"):
        if unit := UNITS.get(row["half_life_unit"]):
            rivals[row["atomic_number"]] = max(rivals[row["atomic_number"]], 1000 * unit.seconds)
    for row in source.execute(MAY_DECAY):
        rivals[row["atomic_number"]] = float("inf")
    found = {}
    for number, known in of.items():
        natural = [isotope for isotope in known if isotope.abundance]
        mortal = sorted((isotope for isotope in known if isotope.unit), key=lambda isotope: -isotope.lifetime_s)
        rival = max([rivals[number], *(isotope.lifetime_s for isotope in mortal[1:])])
        longest = mortal[0] if mortal and mortal[0].lifetime_s > CLEARLY * rival else None
        found[number] = Extremes(max(natural, key=lambda isotope: isotope.abundance or 0.0, default=None), longest)
    return found


# ---- facts -> corpus


IDENTITY = (
    "{name} is a chemical element with the symbol {symbol}. Its CAS number is {cas}. It belongs to the series {series}.",
    "The chemical element {name} has the CAS number {cas} and the symbol {symbol}. It is one of the {series}.",
    "The CAS number {cas} stands for the element {name}. Its symbol is {symbol}.",
)
MELTING = (
    "The element {name} has a melting point of {melting} kelvin.{boiling}",
    "The melting point of {name} is {melting} kelvin.{boiling}",
)
ABUNDANT = (
    "{value} is the most abundant isotope of {name} in nature.",
    "The most abundant isotope of the element {name} found on earth is {value}.",
)
LONGEST = (
    "The longest-lived radioactive isotope of {name} is {value}.",
    "Of all radioactive isotopes of {name}, the longest-lived isotope is {value}.",
)
DECAY = (
    "{name} is a radioactive isotope of {element}. Its main decay product is {value}.",
    "{name} is unstable. The decay product of {name} is mainly {value}.",
    "The main decay product of the isotope {name} is {value}.",
)
RECORD = (
    "{name} has a half-life of {value} {unit}. The discovery year of the isotope is {year}.{natural}",
    "The half-life of {name} is {value} {unit}. Its discovery year is {year}.{natural}",
)
STABLE = (
    "{name} is a stable isotope of {element}. Its discovery year is {year}.{natural}",
    "{name} counts as stable. The discovery year of this isotope of {element} is {year}.{natural}",
)
"""Phrasings of a passage."""


class Chains(NamedTuple):
    """Isotopes by what leads to them."""

    by_name: dict[str, Isotope]
    extremes: dict[int, Extremes]
    """By atomic number."""


def passages(elements: Iterable[Element], chains: Chains) -> Iterator[Passage]:
    """Per element its identity, melting point and extremes; per isotope its decay and its record."""
    for element in elements:
        name, key = element.name.text, f"element:{element.symbol}"
        yield phrased(f"{key}:identity", IDENTITY, name, symbol=element.symbol, cas=element.cas, series=element.series.lower())
        if element.melting:
            boiling = f" Its boiling point is {element.boiling} kelvin." if element.boiling else ""
            yield phrased(f"{key}:melting", MELTING, name, melting=element.melting, boiling=boiling)
        abundant, longest = chains.extremes.get(element.number, Extremes(None, None))
        if abundant:
            yield phrased(f"{key}:abundant", ABUNDANT, name, value=abundant.name.text)
        if longest:
            yield phrased(f"{key}:longest", LONGEST, name, value=longest.name.text)
    for isotope in chains.by_name.values():
        name, element_name, key = isotope.name.text, isotope.element.name.text, f"isotope:{isotope.name.aliases[0]}"
        natural = f" Its natural abundance is {_number(isotope.abundance)} percent." if isotope.abundance else ""
        if isotope.product:
            yield phrased(f"{key}:decay", DECAY, name, element=element_name, value=isotope.product.text)
        if isotope.half_life is not None and isotope.unit:
            value = _number(isotope.half_life)
            yield phrased(f"{key}:record", RECORD, name, value=value, unit=isotope.unit.text, year=str(isotope.year), natural=natural)
        else:
            yield phrased(f"{key}:record", STABLE, name, element=element_name, year=str(isotope.year), natural=natural)


# ---- facts -> questions


RELATIONS = {
    "CAS number": "cas",
    "element": "element",
    "melting point": "melting",
    "boiling point": "boiling",
    "most abundant isotope": "abundant",
    "longest-lived radioactive isotope": "longest",
    "decay product": "product",
    "discovery year": "year",
    "half-life": "half_life",
    "natural abundance": "abundance",
}
"""Relation -> its word in the kinds of questions."""

LEADS_TO = {
    "most abundant isotope": ("natural abundance",),
    "longest-lived radioactive isotope": ("discovery year", "half-life", "decay product"),
}
"""What to ask about an element's extremes. Most of the abundant ones were found in the same few years and are stable; few of the
longest-lived are found in nature: those answers would be easy to guess, or too few to hold out."""


class Fact(NamedTuple):
    """One fact about something, and the question that asks for it."""

    relation: str
    question: str
    """With {place} for what the fact is about."""

    value: Name


class Place(NamedTuple):
    """What a question is about: how it says so, and the facts that lead there."""

    text: str
    """E.g. `the isotope that Uranium-238 mainly decays into`."""

    path: str
    """For the kind, e.g. `product_`."""

    hops: tuple[Hop, ...] = ()
    asks: tuple[str, ...] = ("discovery year", "half-life", "decay product", "natural abundance")
    """Relations to ask for, where it is an isotope."""


def questions(elements: Iterable[Element], chains: Chains) -> Iterator[Question]:
    """Every question the facts allow, but those that would mix held-out with other facts."""
    elements = tuple(elements)
    held_out = {entity for element in elements if element.held_out for entity in (element.name.text, element.cas)}
    held_out |= {isotope.name.text for isotope in chains.by_name.values() if isotope.held_out}
    for kind, key, text, answer, hops in _all_questions(elements, chains):
        if split := split_of(hops, held_out):
            yield Question(f"{kind}:{key}", text, answer.text, answer.aliases, hops, f"element_{kind}", split)


def split_of(hops: tuple[Hop, ...], held_out: set[str]) -> Split | None:
    """train: names nothing that is held out. test: the last fact is about something held out. None: neither."""
    if held_out.isdisjoint(entity for hop in hops for entity in (hop.entity, hop.value)):
        return "train"
    return "test" if hops[-1].entity in held_out else None


Asked = tuple[str, str, str, Name, tuple[Hop, ...]]
"""Kind, key within the kind, text, answer, hops."""


def _all_questions(elements: tuple[Element, ...], chains: Chains) -> Iterator[Asked]:
    for element in elements:
        yield from _element_questions(element, chains)
    for isotope in chains.by_name.values():
        place, at, key = Place(isotope.name.text, ""), isotope, isotope.name.aliases[0]
        yield from _ask(isotope, place, key)
        for text in ("the isotope that {name} mainly decays into", "the decay product of the isotope that {name} mainly decays into"):
            if not at.product or at.product.text not in chains.by_name:
                break
            hop = Hop(at.name.text, "decay product", at.product.text)
            place = Place(text.format(name=isotope.name.text), f"{place.path}product_", (*place.hops, hop))
            at = chains.by_name[at.product.text]
            yield from _ask(at, place, key)


def _element_questions(element: Element, chains: Chains) -> Iterator[Asked]:
    """Questions that start with an element, or with its CAS number."""
    first = Hop(element.cas, "element", element.name.text)
    identity = Fact("element", "Which element has the CAS number {place}?", element.name)
    yield _asked(Place(element.cas, ""), element.symbol, identity, element.cas)
    numbered = Place(f"the element with the CAS number {element.cas}", "cas_", (first,))
    for place in (Place(element.name.text, ""), numbered):
        for fact in _element_facts(element, chains.extremes.get(element.number)):
            if fact.relation == "CAS number" and place.hops:
                continue
            yield _asked(place, element.symbol, fact, element.name.text)
            isotope = chains.by_name.get(fact.value.text)
            if isotope:
                hop = Hop(element.name.text, fact.relation, fact.value.text)
                path = f"{place.path}{RELATIONS[fact.relation]}_"
                there = Place(f"the {fact.relation} of {place.text}", path, (*place.hops, hop), LEADS_TO[fact.relation])
                yield from _ask(isotope, there, element.symbol)


def _ask(isotope: Isotope, place: Place, key: str) -> Iterator[Asked]:
    """Every question about an isotope that it calls `place`."""
    for fact in _isotope_facts(isotope):
        if fact.relation in place.asks:
            yield _asked(place, key, fact, isotope.name.text)


def _asked(place: Place, key: str, fact: Fact, entity: str) -> Asked:
    hops = (*place.hops, Hop(entity, fact.relation, fact.value.text))
    return f"{len(hops)}hop_{place.path}{RELATIONS[fact.relation]}", key, fact.question.format(place=place.text), fact.value, hops


def _element_facts(element: Element, extreme: Extremes | None) -> Iterator[Fact]:
    yield Fact("CAS number", "What is the CAS number of {place}?", Name(element.cas))
    if element.melting:
        yield Fact("melting point", "In kelvin, what is the melting point of {place}?", Name(element.melting))
        if element.boiling:
            yield Fact("boiling point", "In kelvin, what is the boiling point of {place}?", Name(element.boiling))
    if extreme and extreme.abundant:
        yield Fact("most abundant isotope", "What is the most abundant isotope of {place}?", extreme.abundant.name)
    if extreme and extreme.longest:
        yield Fact("longest-lived radioactive isotope", "What is the longest-lived radioactive isotope of {place}?", extreme.longest.name)


def _isotope_facts(isotope: Isotope) -> Iterator[Fact]:
    # The unit is in the question and no part of an answer: half an F1 would be had by repeating it.
    yield Fact("discovery year", "In which year was {place} discovered?", Name(str(isotope.year)))
    if isotope.half_life is not None and isotope.unit:
        unit = isotope.unit.text
        yield Fact("half-life", f"In {unit}, what is the half-life of {{place}}?", Name(_number(isotope.half_life)))
    if isotope.product:
        yield Fact("decay product", "What is the main decay product of {place}?", isotope.product)
    # Of the only isotope in nature it would be 100, which needs no search.
    if isotope.abundance and isotope.abundance < 100:
        value = Name(_number(isotope.abundance))
        yield Fact("natural abundance", "In percent, what is the natural abundance of {place}?", value)

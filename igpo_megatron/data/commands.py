"""`igpo data`: make and check files of questions and corpora, and make demonstrations.

Prints progress, counts, and every problem with file, row and column.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

from igpo_megatron.agent.demonstrations import Demonstration, Task, demonstrate
from igpo_megatron.agent.demonstrator import NO_MISTAKES, USUAL, Mistakes, values_by_relation, write_script
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.chat.room import too_long
from igpo_megatron.chat.tokenizer import load_tokenizer
from igpo_megatron.config.load import load
from igpo_megatron.config.schema import Config
from igpo_megatron.data.corpora import CorpusCount, read_passages, total_bytes, write_passages
from igpo_megatron.data.corpus import Passage, read_corpus
from igpo_megatron.data.hops import ChainQuestion, endless, read_chains, split
from igpo_megatron.data.layouts import LAYOUTS
from igpo_megatron.data.problems import Problem
from igpo_megatron.data.question_files import Report, check_file
from igpo_megatron.data.questions import FileCount, Refused, convert
from igpo_megatron.observability.rollout_dump import write_rollouts
from igpo_megatron.search.client import make_client
from igpo_megatron.search.local.bm25_build import build_index
from igpo_megatron.search.local.index_place import Digest, bm25_settings, place
from igpo_megatron.supervision.leftovers import whole
from igpo_megatron.tools.base import Tool
from igpo_megatron.tools.search_tool import SearchTool
from igpo_megatron.types import SEARCH, Prompt, RolloutGroup, UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Make and check files of questions and corpora; make demonstrations.")
console = Console()

SkipProblems = Annotated[bool, typer.Option(help="Write the good records even if others have problems.")]


@app.command(epilog="Example: igpo data prepare hotpot_train_v1.1.json --out train.parquet")
def prepare(
    files: Annotated[list[Path], typer.Argument(help="jsonl, json, tsv or parquet, the text formats also as .gz.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.", dir_okay=False)],
    source: Annotated[str | None, typer.Option(help="Name of the set, if neither the files nor their paths give it.")] = None,
    split: Annotated[str | None, typer.Option(help="train, dev or test, if file names do not give it.")] = None,
    aliases: Annotated[Path | None, typer.Option(help="id_aliases.json of 2WikiMultihopQA: more aliases for its answers.")] = None,
    exclude: Annotated[list[Path] | None, typer.Option(help="Parquet file whose questions are left out; may be repeated.")] = None,
    skip_problems: SkipProblems = False,
) -> None:
    """Read public question sets (FlashRAG, Hugging Face, HotpotQA, 2Wiki, MuSiQue, NQ, TriviaQA, PopQA) into one file for training."""
    try:
        with _progress(files) as advance:
            counts = convert(
                files,
                out,
                source=source,
                split=split,
                aliases=aliases,
                exclude=exclude or (),
                skip_problems=skip_problems,
                on_bytes=advance,
            )
    except Refused as refused:
        counts = refused.args[1]
        _print_questions(counts)
        raise _refusal([problem for count in counts for problem in count.problems], out) from None
    _print_questions(counts)
    console.print(f"{sum(count.written for count in counts)} questions in [bold]{escape(str(out))}[/bold]", soft_wrap=True)


@app.command(epilog="Example: igpo data corpus wiki-18.jsonl.gz --out data/wiki-18.jsonl")
def corpus(
    files: Annotated[list[Path], typer.Argument(help="wiki-18's jsonl, DPR's tsv, or parquet; the text formats also as .gz.")],
    out: Annotated[Path, typer.Option(help="JSON lines to write; the index is put into OUT.index beside it.", dir_okay=False)],
    index: Annotated[bool, typer.Option(help="Build the BM25 index, too.")] = True,
    skip_problems: SkipProblems = False,
) -> None:
    """Read passages of any number into a corpus, and build its BM25 index."""
    counts = [CorpusCount(path) for path in files]
    digest = Digest(*bm25_settings())
    with whole(out) as part:
        with _progress(files) as advance:
            passages = (passage for count in counts for passage in read_passages(count, advance))
            total = sum(1 for _ in write_passages(digest.of(passages), part))
        problems = [problem for count in counts for problem in count.problems]
        _print_corpus(counts)
        if not total or (problems and not skip_problems):
            raise _refusal(problems, out)
        if index:
            # `igpo serve retriever` looks for it beside the corpus, under this name.
            folder = place(out, "bm25", digest.hex)
            with whole(folder) as unfinished:
                _index(part, unfinished, total)
    console.print(f"{total} passages in [bold]{escape(str(out))}[/bold]", soft_wrap=True)
    if index:
        console.print(f"index in {escape(str(folder))}", soft_wrap=True)


def _index(corpus_file: Path, folder: Path, total: int) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        reading, placing = bar.add_task("counting words", total=total), bar.add_task("writing the index", total=None)

        def passages() -> Iterator[Passage]:
            for passage in read_corpus(corpus_file):
                bar.advance(reading)
                yield passage

        build_index(passages(), folder, lambda done, of: bar.update(placing, completed=done, total=of))


@contextmanager
def _progress(files: Sequence[Path]) -> Iterator[Callable[[int], None]]:
    """A bar over the bytes of all files."""
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total_bytes(files))
        yield lambda count: bar.advance(task, count)


def _print_questions(counts: Sequence[FileCount]) -> None:
    for count in counts:
        numbers = {
            "kept": count.written,
            "repeated": count.repeated,
            "excluded": count.excluded,
            "without a short answer": count.without_answer,
            "with problems": len(count.problems),
        }
        shown = ", ".join(f"{number} {name}" for name, number in numbers.items() if number)
        what = f"{count.layout} layout, {count.source or 'unknown set'}, {count.split or 'unknown split'}"
        _print_of(count.path, f"{what}: {shown}")
    _print_problems(counts)


def _print_corpus(counts: Sequence[CorpusCount]) -> None:
    for count in counts:
        _print_of(count.path, f"{count.passages} passages" + (f", {len(count.problems)} with problems" if count.problems else ""))
    _print_problems(counts)


def _print_problems(counts: Sequence[FileCount] | Sequence[CorpusCount]) -> None:
    for count in counts:
        for problem in count.problems:
            _print_of(count.path, str(problem), "red")


def _print_of(path: Path, text: str, style: str = "bold") -> None:
    console.print(f"[{style}]{escape(str(path))}:[/{style}] {escape(text)}", soft_wrap=True)


def _refusal(problems: Sequence[Problem], out: Path) -> UserError:
    """The error to raise when nothing was written, with the reason."""
    if not problems:
        return UserError(f"nothing is left to write, so {out} was not written")
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return UserError(f"{count}, so {out} was not written; correct the files, or use --skip-problems")


@app.command(epilog="Example: igpo data check --config run.yaml")
def check(
    files: Annotated[list[Path] | None, typer.Argument(help="Parquet files of questions; default: those of --config.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file of a run: its layout, score, tokenizer, chat and rollout.max_context are used.")
    ] = None,
    layout: Annotated[str | None, typer.Option(help="auto, igpo, arpo or search_r1; default: data.layout of --config, or auto.")] = None,
) -> None:
    """Print rows per source and every problem; exit code 1 if a run would refuse a file or leave a row out.

    Without a model's tokenizer it says that it did not count tokens.
    """
    if layout is not None and layout not in ("auto", *LAYOUTS):
        raise UserError(f"found --layout {layout}, expected auto, {', '.join(LAYOUTS)}")
    settings = load(config, model="(not set)") if config is not None else None
    paths = files or ([*settings.data.train, *settings.data.eval] if settings else [])
    if not paths:
        raise UserError("no files to check: name parquet files, or a --config with data.train or data.eval")
    outcome = settings.reward.outcome if settings else "f1"
    fits = _context_check(settings) if settings else lambda prompt: None
    reports = [check_file(path, layout or (settings.data.layout if settings else "auto"), outcome, fits) for path in paths]
    for report in reports:
        _print_report(report)
    if any(problem.costs != "answer" for report in reports for problem in report.problems):
        raise typer.Exit(1)


def _context_check(config: Config) -> Callable[[Prompt], str | None]:
    """Question -> why the run's model has no room for a turn after it, or None. If the model cannot tell, that is printed."""
    try:
        chat = ChatFormat(load_tokenizer(config.model.path), config.rollout, config.reward)
    except UserError as why:
        console.print(f"[yellow]not checked:[/yellow] whether questions fit rollout.max_context ({escape(str(why))})\n", soft_wrap=True)
        return lambda prompt: None
    return partial(too_long, chat=chat, config=config.rollout)


def _print_report(report: Report) -> None:
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


@app.command(epilog="Example: igpo data demonstrations run.yaml --out demos.parquet --count 2000")
def demonstrations(
    config: Annotated[Path, typer.Argument(help="YAML file of the run that is to learn from them.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Settings that replace those of the file.")] = None,
    *,
    out: Annotated[Path, typer.Option(help="Replay file to write, for run.replay.", dir_okay=False)],
    count: Annotated[int, typer.Option(min=1, help="Demonstrations to write.")],
    questions: Annotated[
        list[Path] | None, typer.Option(help="Parquet file of questions with extra_info.hops; may be repeated; default: data.train.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Other seeds give other demonstrations.")] = 0,
    clean: Annotated[float, typer.Option(min=0, max=1, help="Share of demonstrations without any mistake.")] = 0.25,
    early: Annotated[float, typer.Option(min=0, max=1, help="Chance per search that a guess takes its place.")] = USUAL.early,
    wrong_query: Annotated[float, typer.Option(min=0, max=1, help="Chance per search of a wrong query before it.")] = USUAL.query,
    held_out: Annotated[
        float, typer.Option(min=0, max=0.9, help="Also write OUT.held-out.parquet: this share of --count, on other questions.")
    ] = 0.0,
    show: Annotated[int, typer.Option(min=0, help="Print the first ones as text.")] = 0,
) -> None:
    """Let a scripted agent answer questions by really searching, in the run's own protocol, as examples for loss.name=sft.

    It follows the facts of extra_info.hops, makes mistakes and recovers from them.
    """
    settings = load(config, overrides or [])
    paths = questions or [*settings.data.train]
    if not paths:
        raise UserError("no questions: name files by --questions or in data.train")
    chains = [chain for path in paths for chain in read_chains(path, settings.data.layout, settings.reward.outcome)]
    values = values_by_relation([chain.hops for chain in chains])
    chat = ChatFormat(load_tokenizer(settings.model.path), settings.rollout, settings.reward)
    tools: dict[str, Tool] = {SEARCH: SearchTool(make_client(settings.search), chat.protocol.hit)}
    mistakes = Mistakes(early, wrong_query)

    def tasks(of: Sequence[ChainQuestion], part: str) -> Iterator[Task]:
        for number, chain in enumerate(endless(of, settings.data.balance, f"{seed}/{part}")):
            rng = random.Random(f"{seed}/{part}/{number}")
            own = NO_MISTAKES if rng.random() < clean else mistakes
            prompt = replace(chain.prompt, id=f"{chain.prompt.id}/{part}-{number}")
            yield Task(prompt, write_script(chain.hops, prompt.answers, values, own, settings.rollout.max_turns, rng))

    kept, other = split(chains, held_out)
    parts = [(out, kept, count, "demo")]
    if held_out:  # written first: where `out` is, both are complete
        parts.insert(0, (out.with_suffix(f".held-out{out.suffix}"), other, max(1, round(held_out * count)), "held-out"))
    with asyncio.Runner() as runner:
        try:
            for path, of, number, part in parts:
                skipped: Counter[str] = Counter()
                made = demonstrate(tasks(of, part), number, tools, chat, settings.rollout, runner, skipped)
                _write_demonstrations(path, made, number, skipped, show if part == "demo" else 0)
        finally:
            runner.run(tools[SEARCH].close())


def _write_demonstrations(path: Path, made: Iterator[Demonstration], count: int, skipped: Counter[str], show: int) -> None:
    """Write a replay file, print the first `show`, and what is in the file."""
    purposes: Counter[str] = Counter()
    ends: Counter[str] = Counter()

    def groups(advance: Callable[[], None]) -> Iterator[RolloutGroup]:
        for number, one in enumerate(made):
            if number < show:
                _print_demonstration(one)
            purposes.update(intention.purpose for intention in one.intentions)
            ends["recovered" if _has_recovery(one) else one.intentions[-1].purpose] += 1
            advance()
            yield one.group

    columns = (TextColumn("demonstrating"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=count)
        write_rollouts(path, 0, groups(lambda: bar.advance(task)))
    _print_of(path, f"{count} demonstrations: {ends['answer']} without a detour, {ends['recovered']} after one, {ends['early']} end wrong")
    for reason, times in skipped.most_common():
        _print_of(path, f"{times} skipped: {reason}", "yellow")


def _has_recovery(one: Demonstration) -> bool:
    purposes = [intention.purpose for intention in one.intentions]
    return purposes[-1] == "answer" and any(purpose not in ("search", "answer") for purpose in purposes)


def _print_demonstration(one: Demonstration) -> None:
    """Its text, without the frames around results; what the model learns to write is green."""
    for number in one.group.trajectories[0].path:
        node = one.group.nodes[number]
        style = {"action": "green", "observation": "cyan"}.get(node.kind, "dim")
        end = "" if node.kind == "forced" else "\n"
        console.print(f"[{style}]{escape(node.text)}[/{style}]", soft_wrap=True, highlight=False, end=end)
    console.rule()

"""The commands of prepare_data.py for files of your own: progress, counts, every problem with file, row and column."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from igpo_megatron.data.corpora import CorpusCount, read_passages, total_bytes, write_passages
from igpo_megatron.data.corpus import Passage, read_corpus
from igpo_megatron.data.problems import Problem
from igpo_megatron.data.questions import FileCount, Refused, convert
from igpo_megatron.data.whole import whole
from igpo_megatron.search.local.bm25_build import build_index
from igpo_megatron.search.local.index_place import Digest, bm25_settings, place
from igpo_megatron.types import UserError

console = Console()

SkipProblems = Annotated[bool, typer.Option(help="Write the good records although there are problems.")]


def questions(
    files: Annotated[list[Path], typer.Argument(help="jsonl, json, tsv or parquet, the text formats also as .gz.")],
    out: Annotated[Path, typer.Option(help="Parquet file to write.")],
    source: Annotated[str | None, typer.Option(help="Name of the set, where files and their paths do not tell it.")] = None,
    split: Annotated[str | None, typer.Option(help="train, dev or test, where names of files do not tell it.")] = None,
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
        _print_questions(refused.args[1])
        raise _stop(_refusal([problem for count in refused.args[1] for problem in count.problems], out)) from None
    except UserError as error:
        raise _stop(str(error)) from None
    _print_questions(counts)
    console.print(f"{sum(count.written for count in counts)} questions in [bold]{escape(str(out))}[/bold]", soft_wrap=True)


def corpus(
    files: Annotated[list[Path], typer.Argument(help="wiki-18's jsonl, DPR's tsv, or parquet; the text formats also as .gz.")],
    out: Annotated[Path, typer.Option(help="JSON lines to write; the index is put into OUT.index beside it.")],
    index: Annotated[bool, typer.Option(help="Build the BM25 index, too.")] = True,
    skip_problems: SkipProblems = False,
) -> None:
    """Read passages, however many, into a corpus and its BM25 index."""
    counts = [CorpusCount(path) for path in files]
    digest = Digest(*bm25_settings())
    try:
        with whole(out) as part:
            with _progress(files) as advance:
                passages = (passage for count in counts for passage in read_passages(count, advance))
                total = sum(1 for _ in write_passages(digest.of(passages), part))
            problems = [problem for count in counts for problem in count.problems]
            _print_corpus(counts)
            if not total or (problems and not skip_problems):
                raise _stop(_refusal(problems, out))
            if index:
                # Beside the corpus and under this name serve_retriever.py looks for it.
                folder = place(out, "bm25", digest.hex)
                with whole(folder) as unfinished:
                    _index(part, unfinished, total)
    except UserError as error:
        raise _stop(str(error)) from None
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
        console.print(f"[bold]{escape(str(count.path))}[/bold]: {escape(what)}: {shown}", soft_wrap=True)
    _print_problems(counts)


def _print_corpus(counts: Sequence[CorpusCount]) -> None:
    for count in counts:
        problems = f", {len(count.problems)} with problems" if count.problems else ""
        console.print(f"[bold]{escape(str(count.path))}[/bold]: {count.passages} passages{problems}", soft_wrap=True)
    _print_problems(counts)


def _print_problems(counts: Sequence[FileCount] | Sequence[CorpusCount]) -> None:
    for count in counts:
        for problem in count.problems:
            console.print(f"[red]{escape(str(count.path))}:[/red] {escape(str(problem))}", soft_wrap=True)


def _refusal(problems: Sequence[Problem], out: Path) -> str:
    if not problems:
        return f"nothing is left to write, so {out} was not written"
    return f"{len(problems)} problem{'s' if len(problems) > 1 else ''}, so {out} was not written; mend the files, or use --skip-problems"


def _stop(message: str) -> typer.Exit:
    console.print(f"[red]error:[/red] {escape(message)}", soft_wrap=True)
    return typer.Exit(1)

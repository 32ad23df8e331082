"""`igpo doctor tools`: send a few real queries to the configured tools, and recommend settings.

plan: 1, 2, 4, ... at once within a budget ──announce──> climb until calls fail ──> a Level each ──> table, sentences with config keys

Cache, record, replay and chaos are disabled, and nothing is retried: the provider itself is measured. A refused key or an exhausted quota
ends the check.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, product

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

from igpo_megatron.config.load import ConfigError
from igpo_megatron.config.schema import Config
from igpo_megatron.data.question_files import read_prompts
from igpo_megatron.search.registry import backend_of, key_variable, open_backend
from igpo_megatron.search.results import SearchClient, SearchStatus, SearchStopped, normalise
from igpo_megatron.search.settings import Search
from igpo_megatron.tools.python.tool import PythonTool
from igpo_megatron.tools.registry import problems
from igpo_megatron.tools.search_tool import SearchTool
from igpo_megatron.tools.tally import Tally, TallyTool, percentile
from igpo_megatron.tools.visit.reader import PageReader
from igpo_megatron.types import UserError

PAGES = 8
"""Pages visited, once each: they belong to other people."""

FEWEST = 4
"""Fewest calls per stage."""

_ASPECTS = (
    *("capital of", "population of", "history of", "largest city in", "currency of", "highest mountain in", "languages of", "climate of"),
)
_PLACES = (
    *("Norway", "Peru", "Kenya", "Japan", "Iran", "Canada", "Chile", "India", "Ghana", "Greece", "Poland", "Cuba"),
    *("Vietnam", "Mali", "Iceland", "Turkey", "Nepal", "Brazil", "Egypt", "Mexico", "Ireland", "Jordan", "Fiji", "Spain"),
)
BUILT_IN = tuple(f"{aspect} {place}" for place, aspect in product(_PLACES, _ASPECTS))
"""Queries if the configuration has too few questions."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One step of a plan."""

    at_once: int
    calls: int


@dataclass(frozen=True, slots=True)
class Level:
    """Result of a stage."""

    at_once: int
    tally: Tally
    wall_s: float

    @property
    def failed(self) -> int:
        return self.tally.failures.total()

    @property
    def fails(self) -> bool:
        """True if more than an occasional call fails."""
        return self.failed >= max(min(2, self.tally.calls), self.tally.calls / 10)

    @property
    def p95_s(self) -> float:
        return percentile(self.tally.latencies_s, 95)

    @property
    def answers_per_s(self) -> float:
        return (self.tally.calls - self.failed) / self.wall_s


@dataclass(slots=True)
class Finding:
    """One tool, measured."""

    tool: str
    levels: list[Level] = field(default_factory=list)
    advice: list[str] = field(default_factory=list)
    """Sentences."""

    works: bool = True


def plan(most: int, budget: int) -> list[Stage]:
    """Stages of 1, 2, 4, ... and `most` at once, twice as many calls each, as far as `budget` calls reach.

    `plan(6, 100)` is 1, 2, 4 and 6 at once with 4, 4, 8 and 12 calls.
    """
    stages: list[Stage] = [Stage(1, min(FEWEST, budget))]
    for at_once in [*(2**power for power in range(1, most.bit_length()) if 2**power < most), *([most] if most > 1 else [])]:
        stage = Stage(at_once, max(FEWEST, 2 * at_once))
        if num_calls([*stages, stage]) > budget:
            break
        stages.append(stage)
    return stages


def num_calls(stages: Sequence[Stage]) -> int:
    return sum(stage.calls for stage in stages)


def questions(config: Config, count: int) -> list[str]:
    """`count` different queries: the configuration's own questions where their files are here, then built-in ones, then numbered."""
    files = (path for path in (*config.data.eval, *config.data.train) if path.is_file())
    own = (prompt.question for path in files for prompt in read_prompts(path, config.data.layout))
    numbered = (f"{BUILT_IN[0]} in {number}" for number in range(count))
    return list(islice(_distinct(chain(own, BUILT_IN, numbered)), count))


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    """Without texts that are the same to a provider: a repeated query would share the first one's answer."""
    seen: set[str] = set()
    for text in texts:
        if normalise(text) not in seen:
            seen.add(normalise(text))
            yield text


Call = Callable[[Tally, int], Awaitable[object]]
"""Makes the call of a number and counts it."""


async def climb(stages: Sequence[Stage], call: Call, on_call: Callable[[], None]) -> list[Level]:
    """Run the stages one after the other; the first whose calls fail is the last. Raises what `call` raises."""
    levels: list[Level] = []
    first = 0
    for stage in stages:
        tally, slots = Tally(), asyncio.Semaphore(stage.at_once)

        async def one(number: int, tally: Tally = tally, slots: asyncio.Semaphore = slots) -> None:
            async with slots:
                await call(tally, number)
            on_call()

        start = time.perf_counter()
        await asyncio.gather(*(one(number) for number in range(first, first + stage.calls)))
        levels.append(Level(stage.at_once, tally, time.perf_counter() - start))
        first += stage.calls
        if levels[-1].fails:
            break
    return levels


def live(config: Search, calls: int) -> Search:
    """The same provider and limits without anything that hides what it does: cache, retries, circuit breaker."""
    return config.model_copy(update={"mode": "live", "cache": None, "attempts": 1, "breaker_failures": calls + 1})


async def check_search(
    client: SearchClient, queries: Sequence[str], stages: Sequence[Stage], on_call: Callable[[], None]
) -> tuple[list[Level], list[str]]:
    """(levels, addresses of pages among the results)."""
    pages: dict[str, None] = {}

    async def ask(tally: Tally, number: int) -> None:
        for result in (await TallyTool(SearchTool(client), tally).use([queries[number]])).results:
            pages.update(dict.fromkeys(p.doc_id for p in result.passages[:1] if p.doc_id.startswith(("http://", "https://"))))

    return await climb(stages, ask, on_call), list(pages)


def search_advice(config: Config, levels: Sequence[Level]) -> list[str]:
    """Recommendations for the settings of `search` from the measured levels."""
    search, top, local = config.search, levels[-1], backend_of(config.search).in_process
    clean = [level for level in levels if not level.fails]
    failures = top.tally.failures.most_common(1)
    if not clean:
        return [f"Search does not work: {top.failed} of {top.tally.calls} queries failed, one at a time; most often: {failures[0][0]}."]
    best = max(clean, key=lambda level: level.answers_per_s)
    said = []
    if top.fails:
        said.append(
            f"Set search.max_concurrency={clean[-1].at_once}: at {top.at_once} at once {top.failed} of {top.tally.calls} queries failed, "
            f"most often: {failures[0][0]}."
        )
        if top.tally.status[SearchStatus.RATE_LIMITED] and search.rate_per_s is None:
            said.append(
                f"Or set search.rate_per_s to your plan's; {_rate(clean[-1].answers_per_s)} per second were answered without errors."
            )
    elif local:
        said.append(f"{search.backend} runs in this process; nothing to set.")
    elif top.at_once < search.max_concurrency:
        needed = num_calls(plan(search.max_concurrency, 10**9))
        said.append(
            f"No errors up to {top.at_once} at once; --queries {needed} would try all of search.max_concurrency={search.max_concurrency}."
        )
    else:
        said.append(f"search.max_concurrency={search.max_concurrency} is safe: no errors at {top.at_once} at once.")
    enough = next(level for level in clean if level.answers_per_s >= 0.9 * best.answers_per_s)
    last = clean[-1]
    if not local and 2 * enough.at_once < last.at_once:
        said.append(
            f"search.max_concurrency={enough.at_once} would be enough: {last.at_once} at once bring {_rate(last.answers_per_s)} answers "
            f"per second, {enough.at_once} bring {_rate(enough.answers_per_s)}."
        )
    if not local and last.p95_s > search.timeout_s / 2:
        said.append(
            f"Raise search.timeout_s={search.timeout_s:g} to {3 * last.p95_s:.0f}: at {last.at_once} at once p95 is {last.p95_s:.1f} s, "
            "so slow answers would soon count as failures."
        )
    empty, answered = (
        sum(level.tally.status[status] for level in clean for status in kinds) for kinds in ((SearchStatus.EMPTY,), _ANSWERS)
    )
    if 2 * empty > answered:
        said.append(f"{empty} of {answered} answers had no passage: look at search.corpus, search.language and what these queries ask for.")
    trajectories = config.rollout.prompts_per_step * config.rollout.samples_per_prompt
    said.append(
        f"A step's {trajectories} trajectories search {trajectories / best.answers_per_s:.2g} s for one query each, at "
        f"{_rate(best.answers_per_s)} answers per second."
    )
    return said


def _rate(per_s: float) -> str:
    """`0.4`, `12`, `5,310`"""
    return f"{per_s:,.0f}" if per_s >= 10 else f"{per_s:.2g}"


_ANSWERS = tuple(status for status in SearchStatus if status.is_answer)


def visit_advice(config: Config, level: Level) -> list[str]:
    """Recommendations for the settings of `visit`."""
    said, visit, status = [], config.visit, level.tally.status
    if refused := status["refused"]:
        said.append(f"{refused} pages may not be visited; name their hosts in visit.allow_hosts if they are yours.")
    if status["timeout"] or level.p95_s > visit.timeout_s / 2:
        said.append(
            f"Pages take up to {max(level.tally.latencies_s):.0f} s (visit.timeout_s={visit.timeout_s:g}, visit.attempts={visit.attempts})."
        )
    if level.failed and not visit.show_failures:
        said.append(
            f"{level.failed} of {level.tally.calls} visits failed, which ends a trajectory each; visit.show_failures=true would tell the "
            f"policy instead. Most often: {level.tally.failures.most_common(1)[0][0]}."
        )
    return said or [f"{level.tally.calls} visits got an answer; nothing to set."]


def python_advice(config: Config, levels: Sequence[Level]) -> list[str]:
    """Recommendations for the settings of `python`."""
    top, most = levels[-1], config.python.max_concurrency
    if top.failed:
        return [f"{top.failed} of {top.tally.calls} runs failed at {top.at_once} at once: {top.tally.failures.most_common(1)[0][0]}."]
    if wrong := top.tally.calls - top.tally.status["ok"]:
        return [f"{wrong} of {top.tally.calls} runs of a sum did not finish at {top.at_once} at once: lower python.max_concurrency={most}."]
    best = max(levels, key=lambda level: level.answers_per_s)
    if 2 * best.at_once <= most and best.answers_per_s > 1.1 * top.answers_per_s:
        return [f"Set python.max_concurrency={best.at_once}: with more at once this machine runs fewer per second."]
    return [f"python.max_concurrency={most} is fine here: {_rate(top.answers_per_s)} runs per second at {top.at_once} at once."]


async def check(config: Config, budget: int, pages: Sequence[str], console: Console, found: list[Finding]) -> None:
    """Measure every tool and add it to `found`, so that earlier results survive a stop. Raises SearchStopped."""
    stages = plan(config.search.max_concurrency, budget)
    calls = num_calls(stages)
    console.print(announcement(config, stages), soft_wrap=True)
    with console.status(f"opening search.backend={config.search.backend}"):
        queries = questions(config, calls)
        client = open_backend(live(config.search, calls))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:

        def advancing(name: str, total: int) -> Callable[[], None]:
            task = bar.add_task(name, total=total)
            return lambda: bar.advance(task)

        try:
            levels, addresses = await check_search(client, queries, stages, advancing("search", calls))
        finally:
            await client.close()
        found.append(Finding("search", levels, search_advice(config, levels), works=not levels[0].fails))
        if "visit" in config.rollout.extra_tools:
            found.append(await _visits(config, list(pages) or addresses, advancing))
        if "python" in config.rollout.extra_tools:
            found.append(await _python(config, advancing))


async def _visits(config: Config, pages: Sequence[str], advancing: Callable[[str, int], Callable[[], None]]) -> Finding:
    chosen = pages[:PAGES]
    if not chosen:
        advice = f"visit was not measured: search.backend={config.search.backend} gives no addresses of pages; name some with --page."
        return Finding("visit", advice=[advice])
    # How tokens are counted only moves the cut, which takes no time; the policy's tokenizer need not be here.
    reader = PageReader(config.visit, lambda text: len(text) // 4)
    try:
        stage = Stage(min(4, config.visit.max_concurrency, len(chosen)), len(chosen))
        (level,) = await climb(
            [stage], lambda tally, number: TallyTool(reader, tally).use([chosen[number]]), advancing("visit", len(chosen))
        )
    finally:
        await reader.close()
    return Finding("visit", [level], visit_advice(config, level), works=level.failed < level.tally.calls)


async def _python(config: Config, advancing: Callable[[str, int], Callable[[], None]]) -> Finding:
    try:
        tool = PythonTool.from_config(config.python)
    except UserError as error:
        return Finding("python", advice=[f"{error}."], works=False)
    stages = plan(config.python.max_concurrency, 10**9)
    levels = await climb(
        stages, lambda tally, number: TallyTool(tool, tally).use(["sum(range(100_000))"]), advancing("python", num_calls(stages))
    )
    open_ends = [f"Not enforced on this system: {sentence}." for sentence in tool.unenforced]
    return Finding("python", levels, [*python_advice(config, levels), *open_ends], works=not levels[0].fails)


def announcement(config: Config, stages: Sequence[Stage]) -> str:
    """What will be queried; printed before the first query."""
    levels = ", ".join(str(stage.at_once) for stage in stages)
    variable = key_variable(config.search)
    billed = f" Each counts at the provider of {variable}." if variable else ""
    visits = f" At most {PAGES} pages are visited." if "visit" in config.rollout.extra_tools else ""
    return (
        f"search.backend={config.search.backend} gets at most {num_calls(stages)} queries, {levels} at once, past any cache; "
        f"--queries changes the number.{billed}{visits}"
    )


def as_table(findings: Sequence[Finding]) -> Table:
    right = ("at once", "calls", "p50", "p95", "answers/s")
    columns = ("tool", "at once", "calls", "how they ended", "p50", "p95", "answers/s")
    table = Table(
        *(Column(name, justify="right" if name in right else "left") for name in columns), title="igpo doctor tools", title_justify="left"
    )
    for finding in findings:
        for level in finding.levels:
            tally = level.tally
            ended = ", ".join(f"{status} {count / tally.calls:.0%}" for status, count in tally.status.most_common())
            times = (f"{percentile(tally.latencies_s, percent):.3f} s" for percent in (50, 95))
            colour = "red" if level.fails else "green"
            shown = f"[{colour}]{ended}[/{colour}]"
            table.add_row(finding.tool, str(level.at_once), str(tally.calls), shown, *times, _rate(level.answers_per_s))
    return table


def main(config: Config, budget: int, pages: Sequence[str], console: Console | None = None) -> int:
    """Print what was found; 1 if a tool does not work, else 0. Raises ConfigError if a tool's name is unknown or taken."""
    if wrong := list(problems(config.rollout)):
        raise ConfigError(wrong)
    console = console or Console(highlight=False)
    found: list[Finding] = []
    stopped: str | None = None
    try:
        asyncio.run(check(config, budget, pages, console, found))
    except SearchStopped as error:
        stopped = str(error)
    if any(finding.levels for finding in found):
        console.print(as_table(found))
    for finding in found:
        for sentence in finding.advice:
            console.print(f"- {escape(sentence)}", soft_wrap=True)
    if stopped is not None:
        console.print(f"[red]stopped:[/red] {escape(stopped)}", soft_wrap=True)
    return int(stopped is not None or not all(finding.works for finding in found))

"""The visit tool: read a web page and show what fits, preferring passages that match the goal.

url, goal ──fetch──> body ──extract──> title, text ──start | matching──> at most max_tokens ──(summarise)──> Page
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.http import RequestFailed, retrying
from igpo_megatron.search.local.bm25 import Bm25Index
from igpo_megatron.tools.base import Description, Observed
from igpo_megatron.tools.settings import Visit
from igpo_megatron.tools.visit.extract import ExtractionFailed, Extractor, kind_of
from igpo_megatron.tools.visit.fetch import Fetched, Fetcher, FetchFailed, Lookup, PageStatus, system_lookup
from igpo_megatron.tools.visit.summary import Summariser
from igpo_megatron.untrusted import clean_text

VISIT = Description(
    name="visit",
    purpose="Read a web page.",
    arguments={"url": "Address of the page.", "goal": "What to look for on it."},
    tag=("an address, then what to look for", "reads a web page"),
)

PASSAGE_WORDS = 100
"""Size of the passages that are ranked, as in Search-R1's corpora."""

GAP = "[...]"
"""Marks omitted passages."""

CountTokens = Callable[[str], int]
"""Text -> its number of tokens in the policy's context."""


@dataclass(frozen=True, slots=True)
class Page:
    """The outcome of one visit."""

    status: PageStatus
    title: str = ""
    text: str = ""
    """The cut text or its summary; empty unless `ok`."""

    error: str | None = None
    """One sentence for people; None if the page was read."""


class PageReader:
    """Visits pages for the policy. Used from one event loop."""

    def __init__(self, config: Visit, count_tokens: CountTokens, *, lookup: Lookup = system_lookup):
        """Raises UserError if the summariser's settings are wrong."""
        self.config = config
        self._count = count_tokens
        self._summariser = Summariser(config.summary) if config.summary.url else None
        self._slots = asyncio.Semaphore(config.max_concurrency)
        self._extractor = Extractor(config.workers, config.extract_timeout_s)
        self._fetcher = Fetcher(config, lookup)

    async def use(self, arguments: Sequence[str]) -> Observed:
        """Visit `arguments[0]`, looking for `arguments[1]` if it is given."""
        page = await self.visit(arguments[0], arguments[1] if len(arguments) > 1 else None)
        if not page.status.is_answer and not self.config.show_failures:
            return Observed("", f"visit: {page.status}: {page.error}", page.status)
        return Observed(render_page(page), status=page.status)

    async def visit(self, url: str, goal: str | None = None) -> Page:
        """Read a page. Problems are statuses, never exceptions."""
        async with self._slots:
            try:
                title, text = await self._read(url, goal)
                return Page(PageStatus.OK if text else PageStatus.EMPTY, title, text)
            except FetchFailed as failed:
                return Page(failed.status, error=clean_text(f"{url[:200]}: {failed}"))

    async def close(self) -> None:
        """Close connections and end the workers."""
        await self._fetcher.close()
        await self._extractor.close()
        if self._summariser is not None:
            await self._summariser.close()

    async def _read(self, url: str, goal: str | None) -> tuple[str, str]:
        """(title, text to show). Raises FetchFailed."""
        retry = retrying(self.config.attempts, lambda error: isinstance(error, FetchFailed) and not error.status.is_answer)
        fetched: Fetched = await retry(self._fetcher.fetch, url)
        kind = kind_of(fetched.content_type, fetched.body)
        if kind is None:
            raise FetchFailed(PageStatus.UNREADABLE, f"a file of type {fetched.content_type}; HTML, PDF and plain text are read")
        try:
            page = await self._extractor.extract(kind, fetched.body, fetched.charset)
        except ExtractionFailed as error:
            raise FetchFailed(PageStatus.UNREADABLE, str(error)) from None
        wanted = goal if self.config.content == "matching" else None
        # In a thread: ranking a long page takes long enough to delay every other trajectory.
        text = await asyncio.to_thread(fit, page.text, wanted, self.config.max_tokens, self._count)
        if text and self._summariser is not None:
            try:
                text = await self._summariser.summarise(text, goal)
            except RequestFailed as error:
                raise FetchFailed(PageStatus(error.status), f"the summariser failed: {self._summariser.url}: {error}") from None
        return page.title, text


def render_page(page: Page) -> str:
    """A visit as the policy reads it. A page that was not read is never shown as an empty one."""
    if page.status is PageStatus.OK:
        return f"{page.title}\n\n{page.text}" if page.title else page.text
    if page.status is PageStatus.EMPTY:
        return "The page has no text."
    return f"The page could not be read: {page.error}"


def fit(text: str, goal: str | None, max_tokens: int, count: CountTokens) -> str:
    """At most `max_tokens` of a text: its passages that match `goal` best, in page order; its beginning without a goal or match."""
    if len(text) <= 100 * max_tokens and count(text) <= max_tokens:
        return text
    passages = list(split_passages(text))
    chosen: list[int] = []
    room = max_tokens - count(GAP)
    for number in _ranked(passages, goal) if goal else []:
        room -= count(f"\n{passages[number]}\n{GAP}")
        if room < 0:
            break
        chosen.append(number)
    return join_passages(passages, chosen) if chosen else cut(text, max_tokens, count)


def split_passages(text: str) -> Iterator[str]:
    """Lines joined up to `PASSAGE_WORDS` words; longer lines are split."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines():
        words = line.split()
        for start in range(0, len(words), PASSAGE_WORDS):
            part = words[start : start + PASSAGE_WORDS]
            if lines and size + len(part) > PASSAGE_WORDS:
                yield "\n".join(lines)
                lines, size = [], 0
            lines.append(" ".join(part))
            size += len(part)
    if lines:
        yield "\n".join(lines)


def join_passages(passages: Sequence[str], chosen: Sequence[int]) -> str:
    """The chosen passages in page order, with GAP in place of omitted ones."""
    parts: list[str] = []
    expected = 0
    for number in sorted(chosen):
        parts += [GAP, passages[number]] if number != expected else [passages[number]]
        expected = number + 1
    return "\n".join([*parts, GAP] if expected != len(passages) else parts)


def cut(text: str, max_tokens: int, count: CountTokens) -> str:
    """The longest beginning of at most `max_tokens`, in complete words if one fits."""
    # No tokenizer puts a hundred characters on average into a token, so the rest of a long text need not be counted.
    head = text[: 100 * max_tokens + 1]
    spaces = [position for position, character in enumerate(head) if character.isspace()]
    for ends in (spaces, range(len(head))):
        if fitting := bisect_right(ends, max_tokens, key=lambda end: count(head[:end])):
            return head[: ends[fitting - 1]].rstrip()
    return ""


def _ranked(passages: Sequence[str], goal: str) -> list[int]:
    """Positions of the passages that share a word with the goal, best first."""
    try:
        index = Bm25Index(Passage(str(number), "", text) for number, text in enumerate(passages))
    except ValueError:  # stopwords only
        return []
    return [int(passage.doc_id) for passage, _ in index.search(goal, len(passages))]

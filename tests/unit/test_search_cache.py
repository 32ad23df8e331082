"""Cache, record, replay and chaos: what is stored, what is not, and that a replay repeats a run."""

from __future__ import annotations

import asyncio
import math
import random
import sqlite3
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import pytest

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search import cache
from igpo_megatron.search.cache import CachedClient, CacheNamespace, RecordingClient, ReplayClient, Store
from igpo_megatron.search.chaos import ChaosClient, added_latency
from igpo_megatron.search.client import make_client, namespace
from igpo_megatron.search.results import SearchClient, SearchResult, SearchStatus, SearchStopped
from igpo_megatron.search.settings import Chaos, Search

OK, EMPTY, ERROR = SearchStatus.OK, SearchStatus.EMPTY, SearchStatus.ERROR
NAMESPACE = CacheNamespace.of("serper", {"top_k": 3})
AGES = {OK: 100.0, EMPTY: 10.0}


class Counting:
    """A client that finds something new every time, nothing, or fails, as the query says."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        self.asked += queries
        return [self._one(query) for query in queries]

    def _one(self, query: str) -> SearchResult:
        for status in SearchStatus:
            if query.startswith(status.value):
                return SearchResult(query, status, "serper", error=None if status.is_answer else "HTTP 500")
        return SearchResult(query, OK, "serper", (Passage("id", "Títle", f"answer {self.asked.count(query)} to {query}"),))

    async def close(self) -> None: ...


def run(path: Path, work: Callable[[Store, Counting], Any]) -> Any:
    """The outcome of a coroutine function of (store, counting client)."""

    async def call() -> Any:
        store = Store(path)
        try:
            return await work(store, Counting())
        finally:
            await store.close()

    return asyncio.run(call())


@pytest.fixture
def path(tmp_path):
    return tmp_path / "new" / "cache.sqlite"


def test_an_answer_is_asked_for_once_and_normalised_queries_are_the_same(path):
    async def work(store, counting):
        client = CachedClient(counting, store, NAMESPACE, AGES)
        first = await client.search(["Iran", "Iran ", "peru"])
        second = await client.search(["  Iran", "e\u0301t\u00e9", "\u00e9te\u0301", "iran"])
        return first, second, counting.asked

    first, second, asked = run(path, work)
    assert asked == ["Iran", "peru", "\u00e9t\u00e9", "iran"], "letter case may matter to an encoder"
    assert [result.query for result in first + second] == ["Iran", "Iran ", "peru", "  Iran", "e\u0301t\u00e9", "\u00e9te\u0301", "iran"]
    assert second[0].passages == first[0].passages


@pytest.mark.parametrize("status", [status for status in SearchStatus if not status.is_answer])
def test_no_failure_is_stored(path, status):
    async def work(store, counting):
        for client in (CachedClient(counting, store, NAMESPACE, AGES), RecordingClient(counting, store, NAMESPACE)):
            (result,) = await client.search([status.value])
            assert result.status is status and result.error == "HTTP 500"
        return counting.asked

    assert run(path, work) == [status.value] * 2
    database = sqlite3.connect(path)
    assert database.execute("SELECT count(*) FROM answers").fetchone() == (0,)
    with pytest.raises(sqlite3.IntegrityError):
        database.execute("INSERT INTO answers VALUES ('serper', '{}', 'q', ?, '[]', 0)", [status.value])


def test_what_is_on_its_way_into_the_store_is_not_asked_for_again(path):
    async def work(store, counting):
        client = CachedClient(counting, store, NAMESPACE, AGES)
        await asyncio.gather(*(client.search([f"q{number % 5}", "shared"]) for number in range(100)))
        return sorted(counting.asked)

    assert run(path, work) == ["q0", "q1", "q2", "q3", "q4", "shared"]


def test_answers_grow_old_and_empty_ones_sooner(path, monkeypatch):
    async def work(store, counting):
        client = CachedClient(counting, store, NAMESPACE, AGES)
        for clock in (1000.0, 1009.0, 1011.0, 1099.0, 1101.0):
            monkeypatch.setattr(cache.time, "time", lambda now=clock: now)
            await client.search(["iran", "empty"])
        return Counter(counting.asked)

    assert run(path, work) == {"iran": 2, "empty": 3}


def test_other_back_ends_and_other_parameters_have_their_own_answers(path):
    async def work(store, counting):
        for other in (
            NAMESPACE,
            CacheNamespace.of("brave", {"top_k": 3}),
            CacheNamespace.of("serper", {"top_k": 4}),
            CacheNamespace("serper", NAMESPACE.parameters),
        ):
            await CachedClient(counting, store, other, AGES).search(["iran"])
        return len(counting.asked)

    assert run(path, work) == 3


def test_a_record_keeps_the_first_answer_and_a_replay_repeats_it_exactly(path):
    queries = ["iran", " iran", "peru", "empty"]

    async def record(store, counting):
        client = RecordingClient(counting, store, NAMESPACE)
        ours = await client.search(queries)
        # Another run that had not seen these answers: the first ones count for it too.
        await store.put(NAMESPACE, [counting._one("peru")], replace=False)
        return ours + await client.search(queries)

    async def replay(store, counting):
        return await ReplayClient(store, NAMESPACE).search(queries * 2)

    recorded = run(path, record)
    first, second = run(path, replay), run(path, replay)
    assert first == second, "latency included"
    assert [(r.query, r.status, r.passages) for r in recorded] == [(r.query, r.status, r.passages) for r in first]


def test_two_recordings_at_once_agree_on_one_answer(path):
    async def work(store, counting):
        first, second = RecordingClient(counting, store, NAMESPACE), RecordingClient(counting, store, NAMESPACE)
        return await asyncio.gather(first.search(["iran"]), second.search(["iran"])), counting.asked

    ((one,), (other,)), asked = run(path, work)
    assert asked == ["iran", "iran"] and one.passages == other.passages


def test_a_replay_without_the_answer_stops_the_run_and_says_what_there_is(path):
    async def work(store, counting):
        await RecordingClient(counting, store, NAMESPACE).search(["iran"])
        await ReplayClient(store, CacheNamespace.of("serper", {"top_k": 9})).search(["iran"])

    with pytest.raises(SearchStopped) as stop:
        run(path, work)
    assert "has no answer of serper with {\"top_k\": 9} to 'iran'" in str(stop.value)
    assert 'this back-end was recorded with {"top_k": 3}' in str(stop.value)


def test_a_file_that_is_no_cache_is_one_sentence(tmp_path):
    wrong = tmp_path / "corpus.jsonl"
    wrong.write_text("x" * 5000)
    with pytest.raises(ValueError, match=r"search\.cache=.*file is not a database; name a SQLite file"):
        Store(wrong)


@pytest.mark.parametrize(
    "column",
    ["passages = '" + "[" * 50_000 + "'", "passages = '[[1, 2, 3]]'", "passages = '[]'", "passages = '{'", "passages = x'00ff'",
     "stored_at = 'yesterday'", "passages = '[[\"a\", \"b\", \"c\", \"d\"]]'"],
)  # fmt: skip
def test_an_answer_that_something_else_has_damaged_counts_as_absent(path, column):
    async def work(store, client):
        cached = CachedClient(client, store, NAMESPACE, AGES)
        (first,) = await cached.search(["a"])
        with sqlite3.connect(path) as database:
            database.execute(f"UPDATE answers SET {column}")
        with pytest.raises(SearchStopped, match="no answer"):
            await ReplayClient(store, NAMESPACE).search(["a"])
        (again,) = await cached.search(["a"])
        (kept,) = await cached.search(["a"])
        return first.passages, again.passages, kept.passages, client.asked

    first, again, kept, asked = run(path, work)
    assert asked == ["a", "a"] and first != again == kept


def test_a_file_that_another_process_is_opening_is_opened_too(tmp_path, monkeypatch):
    """SQLite waits for other locks, but not for a writer's while it switches to the write-ahead log."""
    other = sqlite3.connect(tmp_path / "cache.sqlite", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    monkeypatch.setattr(cache.time, "sleep", lambda seconds: other.execute("COMMIT"))
    asyncio.run(Store(tmp_path / "cache.sqlite").close())
    assert not other.in_transaction
    other.close()


def test_a_cache_that_breaks_stops_the_run(path):
    async def work(store, counting):
        other = sqlite3.connect(path)
        other.execute("DROP TABLE answers")
        other.close()
        await CachedClient(counting, store, NAMESPACE, AGES).search(["iran"])

    with pytest.raises(SearchStopped, match=r"search\.cache=.* cannot be used any longer"):
        run(path, work)


def corpus(folder: Path) -> Path:
    file = folder / "corpus.jsonl"
    file.write_text('{"id": "1", "title": "Iran", "text": "The capital of Iran is Tehran."}\n')
    return file


def search(config: Search, *queries: str) -> list[SearchResult]:
    async def call() -> list[SearchResult]:
        client = make_client(config)
        try:
            return await client.search(queries)
        finally:
            await client.close()

    return asyncio.run(call())


def test_the_modes_of_the_configuration(tmp_path):
    settings = {"backend": "bm25", "corpus": corpus(tmp_path), "cache": tmp_path / "c.sqlite"}
    recorded = search(Search(**settings, mode="record"), "capital of Iran", "zanzibar")
    replayed = search(Search(**settings, mode="replay"), "capital of Iran", "zanzibar")
    assert [(r.status, r.passages) for r in replayed] == [(r.status, r.passages) for r in recorded]
    assert [r.status for r in replayed] == [OK, EMPTY] and {r.latency_s for r in replayed} == {0.0}
    with pytest.raises(SearchStopped, match="has no answer of bm25"):
        search(Search(**settings, mode="replay"), "tehran")
    chaos = search(Search(**settings, mode="chaos", chaos=Chaos(failed_fraction=1.0)), "capital of Iran")
    assert not chaos[0].status.is_answer and chaos[0].provider == "chaos"


def test_a_replay_needs_no_key(tmp_path, monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    config = Search(backend="serper", mode="replay", cache=tmp_path / "c.sqlite")
    with pytest.raises(ValueError, match=r"search\.mode=replay needs a record; search\.cache=.* does not exist"):
        make_client(config)

    async def fill(store: Store, counting: Counting) -> None:
        await store.put(namespace(config), await counting.search(["iran"]), replace=True)

    run(tmp_path / "c.sqlite", fill)
    assert search(config, "iran")[0].passages[0].text == "answer 1 to iran"


@pytest.mark.parametrize("mode", ["record", "replay"])
def test_a_mode_that_needs_a_file_says_so(mode, tmp_path):
    with pytest.raises(ValueError, match=rf"search\.mode={mode} needs search\.cache"):
        make_client(Search(backend="bm25", corpus=corpus(tmp_path), mode=mode))


def test_a_corpus_may_move_but_not_change(tmp_path):
    old = Search(corpus=corpus(tmp_path), top_k=2)
    (tmp_path / "elsewhere").mkdir()
    moved = Search(corpus=corpus(tmp_path / "elsewhere"), top_k=2)
    assert namespace(old) == namespace(moved)
    moved.corpus.write_text("{}")
    assert namespace(old) != namespace(moved) and namespace(old) != namespace(Search(corpus=old.corpus, top_k=3))


def faults(config: Chaos, queries: Sequence[str], inner: SearchClient) -> list[SearchStatus]:
    client = ChaosClient(inner, config)

    async def call() -> list[SearchStatus]:
        return [result.status for query in queries for result in await client.search([query])]

    return asyncio.run(call())


def test_chaos_fails_the_share_it_is_told_by_seed_and_query_and_not_by_order():
    config, queries = Chaos(failed_fraction=0.3, seed=1), [f"q{n}" for n in range(500)]
    inner = Counting()
    seen = faults(config, queries, inner)
    counts = Counter(seen)
    assert 120 < 500 - counts[OK] < 180 and min(counts[status] for status in SearchStatus if not status.is_answer) > 30
    assert len(inner.asked) == counts[OK], "a failed query is not asked"
    assert faults(config, queries[::-1], Counting())[::-1] == seen
    assert faults(Chaos(failed_fraction=0.3, seed=2), queries, Counting()) != seen
    assert set(faults(config, ["same"] * 100, Counting())) == set(SearchStatus) - {EMPTY}, "each asking has its own luck"


@pytest.mark.parametrize("sigma", [None, 0.5])
def test_added_latency_has_the_mean_it_is_told_and_the_spread_of_its_kind(sigma):
    draw = random.Random(1)
    found = [added_latency(Chaos(latency_s=2.0, latency_sigma=sigma), draw) for _ in range(20_000)]
    assert mean(found) == pytest.approx(2.0, rel=0.03)
    spread = 2.0 if sigma is None else 2.0 * math.sqrt(math.expm1(sigma**2))
    assert stdev(found) == pytest.approx(spread, rel=0.05)
    assert added_latency(Chaos(latency_sigma=1.0), draw) == 0.0


def test_chaos_adds_latency():
    client = ChaosClient(Counting(), Chaos(failed_fraction=0.0, latency_s=0.02))

    async def call() -> list[SearchResult]:
        return [result for n in range(20) for result in await client.search([f"q{n}"])]

    results = asyncio.run(call())
    assert [result.status for result in results] == [OK] * 20
    assert sum(result.latency_s for result in results) > 0.1, "20 draws of mean 20 ms"

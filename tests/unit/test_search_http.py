"""The engine around the back-ends: limits, deadlines, single-flight, breaker, secrets, and many callers under faults."""

from __future__ import annotations

import asyncio
import logging
import random
import sqlite3
import traceback
from collections import Counter, defaultdict
from urllib.parse import quote

import pytest
from patient import now, run
from search_server import KEY, KEY_VARIABLE, PROVIDERS, Asked, in_turn, passages, serving, settings

from igpo_megatron.search import http
from igpo_megatron.search.client import make_client
from igpo_megatron.search.limits import AdaptiveLimit, Blocked, Gate
from igpo_megatron.search.providers.base import Secret
from igpo_megatron.search.results import SearchStatus, SearchStopped

OK, EMPTY, ERROR, TIMEOUT, LIMITED = (
    SearchStatus.OK,
    SearchStatus.EMPTY,
    SearchStatus.ERROR,
    SearchStatus.TIMEOUT,
    SearchStatus.RATE_LIMITED,
)


@pytest.fixture(autouse=True)
def quick_backoff_and_key(monkeypatch):
    monkeypatch.setattr(http, "_backoff", lambda state: 0.001)
    monkeypatch.setenv(KEY_VARIABLE, KEY)


async def until(condition):
    """Wait for something that happens elsewhere on the loop."""
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.002)


def test_identical_queries_share_one_request_and_a_cancelled_caller_takes_nobody_along():
    async def call():
        async with serving(in_turn("slow", None)) as server:
            client = make_client(settings("serper", server))
            callers = [asyncio.create_task(client.search([text])) for text in ["a query", " a  query "] * 25]
            await until(lambda: server.asked)
            callers[0].cancel()
            results = [result for (result,) in await asyncio.gather(*callers[1:])]
            again = await client.search(["a query"])
            await client.close()
            return results, again, len(server.asked)

    results, again, asked = run(call())
    assert {result.passages for result in results} == {passages("a query")} and {r.query for r in results} == {"a query", " a  query "}
    assert again[0].status is OK and asked == 2, "one flight for all, and a new one once it has landed"


def test_a_request_nobody_waits_for_is_given_up_and_asked_anew_when_wanted():
    async def call():
        async with serving(in_turn("never", None)) as server:
            client = make_client(settings("serper", server, max_concurrency=1))
            first = asyncio.create_task(client.search(["a"]))
            await until(lambda: server.asked)
            first.cancel()
            await asyncio.sleep(0)  # the caller is gone, its request on the way out
            async with asyncio.timeout(2):  # far less than an attempt may take
                (result,) = await client.search(["a"])
            await client.close()
            return result

    assert run(call()).status is OK


def test_a_batch_back_end_asks_only_for_what_is_not_on_its_way():
    async def call():
        async with serving(in_turn("slow", None)) as server:
            client = make_client(settings("retriever", server))
            first = asyncio.create_task(client.search(["a", "b", "a"]))
            await until(lambda: server.asked)
            second = await client.search(["b", "c"])
            await first
            await client.close()
            return [asked.queries for asked in server.asked], first.result(), second

    asked, first, second = run(call())
    assert asked == [["a", "b"], ["c"]]
    assert [r.query for r in first] == ["a", "b", "a"] and [r.passages for r in second] == [passages("b"), passages("c")]


def test_a_search_ends_by_its_deadline_whatever_it_waits_for():
    async def call():
        async with serving(lambda asked: "never") as server:
            client = make_client(settings("serper", server, timeout_s=5.0, deadline_s=0.4, attempts=100, max_concurrency=2))
            start = now()
            results = await asyncio.gather(*(client.search([f"q{n}"]) for n in range(4)))
            await client.close()
            return [result.status for (result,) in results], now() - start

    statuses, took_s = run(call())
    assert statuses == [TIMEOUT] * 4 and took_s < 4


def test_a_pause_that_would_pass_the_deadline_is_not_begun(monkeypatch):
    monkeypatch.setattr(http, "_backoff", lambda state: 60.0)

    async def call():
        async with serving(lambda asked: "500") as server:
            client = make_client(settings("serper", server, deadline_s=10.0, timeout_s=1.0))
            start = now()
            (result,) = await client.search(["a"])
            await client.close()
            return result, now() - start

    result, took_s = run(call())
    assert result.status is ERROR and "HTTP 500" in result.error and took_s < 8


def test_concurrency_shrinks_and_recovers_with_the_provider():
    async def call():
        async with serving(in_turn(*["429"] * 20, None)) as server:
            client = make_client(settings("serper", server, attempts=30, max_concurrency=4))
            limits = []
            for n in range(50):
                (result,) = await client.search([f"q{n}"])
                assert result.status is OK
                limits.append(client._slots.limit)
            await client.close()
            return limits

    limits = run(call())
    assert limits[0] == 2 and limits[-1] == 4


def test_retry_after_holds_back_every_caller():
    async def call():
        async with serving(in_turn("429 1", None)) as server:
            client = make_client(settings("serper", server))
            first = asyncio.create_task(client.search(["a"]))
            await until(lambda: server.asked)
            await asyncio.sleep(0.05)  # the refusal has arrived
            start = now()
            (result,) = await client.search(["b"])
            await first
            await client.close()
            return result.status, now() - start

    status, took_s = run(call())
    assert status is OK and 0.8 < took_s < 5


def test_no_more_requests_start_per_second_than_allowed():
    async def call():
        async with serving() as server:
            client = make_client(settings("serper", server, rate_per_s=50))
            start = now()
            results = await asyncio.gather(*(client.search([f"q{n}"]) for n in range(21)))
            await client.close()
            return [result.status for (result,) in results], now() - start

    statuses, took_s = run(call())
    assert statuses == [OK] * 21 and took_s >= 0.4, "20 intervals of 20 ms"


def test_a_search_that_the_rate_leaves_no_time_for_is_told_at_once():
    async def call():
        async with serving() as server:
            client = make_client(settings("serper", server, rate_per_s=0.1, timeout_s=1, deadline_s=5))
            start = now()
            (first,), (second,) = await asyncio.gather(client.search(["a"]), client.search(["b"]))
            await client.close()
            return first, second, now() - start

    first, second, took_s = run(call())
    assert first.status is OK and second.status is TIMEOUT and "wait for search.rate_per_s" in second.error and took_s < 4


def test_the_breaker_stops_asking_and_lets_one_request_find_out():
    broken = True

    async def call():
        nonlocal broken
        async with serving(lambda asked: "500" if broken else None) as server:
            client = make_client(settings("serper", server, attempts=1, breaker_failures=5, breaker_pause_s=0.4, max_concurrency=4))
            down = [result for n in range(5) for result in await client.search([f"down {n}"])]
            broken = False
            waiting = asyncio.gather(*(client.search([f"up {n}"]) for n in range(20)))
            await asyncio.sleep(0.1)
            held_back = len(server.asked)
            up = [result for (result,) in await waiting]
            await client.close()
            return down, held_back, up, server

    down, held_back, up, server = run(call())
    assert [result.status for result in down] == [ERROR] * 5 and held_back == 5
    assert [result.status for result in up] == [OK] * 20 and len(server.asked) == 25


def test_an_open_breaker_fails_at_once_what_cannot_wait_for_it():
    async def call():
        async with serving(lambda asked: "500") as server:
            client = make_client(
                settings("serper", server, attempts=1, breaker_failures=2, breaker_pause_s=60, timeout_s=1.0, deadline_s=10.0)
            )
            start = now()
            results = [result for n in range(10) for result in await client.search([f"q{n}"])]
            await client.close()
            return results, len(server.asked), now() - start

    results, asked, took_s = run(call())
    assert [result.status for result in results] == [ERROR] * 10 and asked == 2 and took_s < 5
    assert "not sent: 2 requests in a row had failed; the next request may leave in" in results[-1].error


def test_a_single_request_probes_an_open_breaker_and_its_answer_lets_the_others_go():
    async def call():
        gate = Gate(None, 1, 30.0)
        gate.failed(ERROR)
        gate._open_until = now()  # the pause is over
        await gate.enter(now() + 5)
        assert gate._open_until is not None
        with pytest.raises(Blocked, match="1 requests in a row had failed"):
            await gate.enter(now() + 5)
        gate.failed(TIMEOUT)
        with pytest.raises(Blocked) as blocked:
            await gate.enter(now() + 5)
        assert blocked.value.status is TIMEOUT
        waiting = asyncio.create_task(gate.enter(now() + 60))
        await asyncio.sleep(0)
        gate.answered()
        async with asyncio.timeout(1):
            await waiting
        assert gate._open_until is None

    run(call())


def test_a_slot_given_to_somebody_who_is_cancelled_goes_on_to_the_next():
    async def call():
        limit = AdaptiveLimit(1)

        async def take():
            async with limit.slot():
                return limit.running

        async with limit.slot():
            first, second = asyncio.create_task(take()), asyncio.create_task(take())
            await asyncio.sleep(0)
        first.cancel()  # admitted by the end of the block above, but it has not run since
        async with asyncio.timeout(1):
            assert await second == 1
        assert first.cancelled() and limit.running == 0

    run(call())


def test_concurrency_is_judged_by_rounds_of_at_least_20_outcomes():
    def judged(limit, *outcomes):
        """The limit after a round of (overloaded, times)."""
        adaptive = AdaptiveLimit(limit)
        for overloaded, times in outcomes:
            for _ in range(times):
                adaptive.done(0, overloaded=overloaded)
        return adaptive.limit

    assert judged(8, (True, 19)) == 8 and judged(8, (True, 20)) == 4
    assert judged(64, (True, 63)) == 64 and judged(64, (True, 64)) == 32
    assert judged(8, (True, 2), (False, 18)) == 8 and judged(8, (True, 3), (False, 17)) == 4, "more than a tenth"
    assert judged(1, (True, 20)) == 1


def test_concurrency_grows_by_one_per_clean_round_and_ignores_what_was_sent_before_it_shrank():
    limit = AdaptiveLimit(6)
    for _ in range(20):
        limit.done(0, overloaded=True)
    assert limit.limit == 3
    for _ in range(100):
        limit.done(0, overloaded=True)
    assert limit.limit == 3
    for expected in (4, 5, 6, 6):
        for _ in range(20):
            limit.done(1, overloaded=False)
        assert limit.limit == expected


def test_a_slot_is_never_lost_however_its_takers_are_cancelled():
    async def call():
        limit, draw = AdaptiveLimit(2), random.Random(0)
        used = 0

        async def take():
            nonlocal used
            async with limit.slot():
                used += 1
                assert limit.running <= 2
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(take()) for _ in range(200)]
        while not all(task.done() for task in tasks):
            draw.choice(tasks).cancel()
            await asyncio.sleep(0)
        assert limit.running == 0 and 0 < used < 200
        async with asyncio.timeout(1), limit.slot(), limit.slot():
            pass

    run(call())


def test_a_provider_that_takes_few_requests_at_once_is_asked_few_at_once():
    """It refuses whatever exceeds 8 at a time: the engine finds that out and gets everything answered."""

    async def call():
        async with serving(lambda asked: "429" if server.running >= 8 else "slow") as server:
            server.slow_s = 0.02
            client = make_client(settings("serper", server, attempts=12, max_concurrency=128))
            results = await asyncio.gather(*(client.search([f"q{n}"]) for n in range(200)))
            await client.close()
            refused = sum(asked.fault == "429" for asked in server.asked)
            return [result.status for (result,) in results], refused, client._slots.limit

    statuses, refused, limit = run(call())
    assert Counter(statuses) == {OK: 200}
    assert limit < 32 and refused < 800, "without adaptation some 1300 are refused, and a third of the callers for good"


def test_a_refused_key_stops_everybody_after_the_requests_in_flight():
    async def call():
        async with serving(lambda asked: "401") as server:
            client = make_client(settings("serper", server, max_concurrency=4))
            results = await asyncio.gather(*(client.search([f"q{n}"]) for n in range(100)), return_exceptions=True)
            await client.close()
            return results, len(server.asked)

    results, asked = run(call())
    assert all(isinstance(result, SearchStopped) for result in results) and asked <= 4


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_redirect_is_followed(provider):
    async def call():
        async with serving(lambda asked: "redirect") as server:
            client = make_client(settings(provider, server))
            (result,) = await client.search(["a"])
            await client.close()
            return result, server.asked

    result, asked = run(call())
    assert result.status is ERROR and "HTTP 302" in result.error and len(asked) == 1


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_key_reaches_a_log_an_error_or_the_cache(provider, tmp_path, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    texts = []

    async def call():
        # The provider repeats the key in a result and in a refusal, and breaks in every way between.
        async with serving(in_turn("echo", "reset", "html", "broken", "500", "never", "401")) as server:
            client = make_client(settings(provider, server, cache=tmp_path / "cache.sqlite", attempts=1, timeout_s=0.2))
            with pytest.raises(SearchStopped) as stop:
                for n in range(7):
                    texts.append(repr(await client.search([f"q{n}"])))
            texts.append("".join(traceback.format_exception(stop.value)))
            texts.append(repr(client.inner.backend) + repr(client.inner.backend.request(["x"])))
            await client.close()

    run(call())
    kept = (tmp_path / "cache.sqlite").read_bytes().decode(errors="replace")
    assert "has to say about q0 ***" in kept and "has to say about q0 ***" in texts[0]
    assert "unknown key ***" in texts[-2]
    for text in (*texts, kept, caplog.text, *capfd.readouterr()):
        assert KEY not in text and quote(KEY) not in text and quote(KEY, safe="") not in text


@pytest.mark.parametrize(("query", "status"), [("what does Not enough credits mean", ERROR), ("credits", None)])
def test_a_query_cannot_stop_the_run_by_what_it_asks(query, status):
    """A provider that repeats the query in its refusal; the words are a sign only if they are the provider's own."""
    said = f"cannot parse {query}" if status else "Not enough credits"

    async def call():
        async with serving(lambda asked: f"say {said}") as server:
            client = make_client(settings("serper", server))
            try:
                return (await client.search([query]))[0].status
            except SearchStopped:
                return None
            finally:
                await client.close()

    assert run(call()) is status


def test_what_is_blotted_out():
    assert http.blot("a s3cr%2Ft b s3cr/t c", Secret("V", "s3cr/t")) == "a *** b *** c"
    assert http.blot("nothing to hide", None) == "nothing to hide"
    assert http.blot("a b c", Secret("V", "a")) == "a b c"


def test_30_percent_faults_under_200_callers_lose_nothing_and_store_no_failure(tmp_path, record_testsuite_property):
    """Every result has the status its last request earned, at most its deadline late; the cache holds the answers and nothing else."""
    kinds = ("500", "429", "html", "broken", "reset", "never", "slow", "500", "429", "empty_list")

    def fault(asked: Asked) -> str | None:
        draw = random.Random(f"{asked.queries}|{asked.number}")
        return draw.choice(kinds) if draw.random() < 0.3 else None

    deadline_s = 30.0
    path = tmp_path / "cache.sqlite"

    async def call():
        async with serving(fault) as server:
            server.slow_s = 0.1
            config = settings("serper", server, attempts=2, timeout_s=2.0, deadline_s=deadline_s, cache=path)
            client = make_client(config)
            took_s = []

            async def caller(number: int):
                seen = []
                for turn in range(4):
                    start = now()
                    # Half of the queries are asked by several callers.
                    query = f"shared {number % 50} {turn}" if turn % 2 else f"own {number} {turn}" + " nothing" * (number % 10 == 0)
                    seen += zip([query], await client.search([query]), strict=True)
                    took_s.append(now() - start)
                return seen

            start = now()
            seen = [pair for pairs in await asyncio.gather(*(caller(n) for n in range(200))) for pair in pairs]
            wall_s = now() - start
            await client.close()
            return seen, took_s, wall_s, server.asked

    seen, took_s, wall_s, asked = run(call())
    requests = defaultdict(list)
    for request in asked:
        requests[request.queries[0]].append(request.fault)
    earned = {"500": ERROR, "429": LIMITED, "html": ERROR, "broken": ERROR, "reset": ERROR, "never": TIMEOUT, "empty_list": ERROR}

    assert len(seen) == 800 and max(took_s) < deadline_s + 1
    for query, result in seen:
        assert result.query == query
        if result.status.is_answer:
            assert result.passages == passages(query) and (result.status is EMPTY) == ("nothing" in query)
            assert {None, "slow"} & set(requests[query])
        else:
            # A shared query may be asked again after it failed, and fail differently.
            assert result.status in {earned[fault] for fault in requests[query] if fault in earned} and result.passages == ()
    statuses = Counter(result.status.value for _, result in seen)
    faults = sum(request.fault is not None for request in asked)
    record_testsuite_property("searches", f"{len(seen)} in {wall_s:.1f} s, slowest {max(took_s):.1f} s: {dict(statuses)}")
    record_testsuite_property("requests", f"{len(asked)}, {faults} of them with a fault")
    assert 0.25 < faults / len(asked) < 0.35 and set(statuses) == set(SearchStatus)
    stored = dict(sqlite3.connect(path).execute("SELECT query, status FROM answers").fetchall())
    assert stored == {query: result.status.value for query, result in seen if result.status.is_answer}

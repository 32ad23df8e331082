"""The HTTP client against a small server on loopback that can be told to fail."""

import asyncio
import json
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from aiohttp import web
from patient import run

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search import http
from igpo_megatron.search.client import make_client
from igpo_megatron.search.http import parse_retry_after
from igpo_megatron.search.results import SearchStatus, SearchStopped
from igpo_megatron.search.settings import Search

IRAN = Passage("1", "Iran", "In Asia.")
DOCUMENT = {"id": "1", "contents": '"Iran"\nIn Asia.'}
SCORED = {"document": DOCUMENT, "score": 2.5}


@pytest.fixture(autouse=True)
def quick_backoff(monkeypatch):
    monkeypatch.setattr(http, "_backoff", lambda state: 0.001)


def say(status=200, text="", headers=None):
    """An answer: makes a fresh response each time."""

    async def answer():
        return web.Response(status=status, text=text, headers=headers)

    return answer


def reply(result):
    return say(text=json.dumps({"result": result}))


@asynccontextmanager
async def serving(*answers):
    """A server that gives these answers in turn (the last one for ever); yields (url, requests seen)."""
    seen = []

    async def retrieve(request):
        seen.append((await request.json(), request.headers.get("Authorization")))
        answer = answers[min(len(seen), len(answers)) - 1]
        return await answer()

    app = web.Application()
    app.router.add_post("/retrieve", retrieve)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/retrieve", seen
    finally:
        await runner.cleanup()


def retriever(url, *, top_k=2, timeout_s=5.0, attempts=3, **settings):
    """A client of the server."""
    return make_client(Search(backend="retriever", url=url, top_k=top_k, timeout_s=timeout_s, attempts=attempts, **settings))


def ask(*answers, queries=("iran",), timeout_s=5.0, attempts=3, **settings):
    """(results, requests seen) of one call against a server with these answers."""

    async def call():
        async with serving(*answers) as (url, seen):
            client = retriever(url, timeout_s=timeout_s, attempts=attempts, max_concurrency=4, **settings)
            try:
                return await client.search(list(queries)), seen
            finally:
                await client.close()

    return run(call())


def test_all_queries_go_in_one_request_and_each_gets_its_own_status():
    results, seen = ask(reply([[SCORED], []]), queries=("iran", "nowhere"))
    assert seen == [({"queries": ["iran", "nowhere"], "topk": 2, "return_scores": True}, None)]
    assert [(r.query, r.status, r.passages) for r in results] == [("iran", SearchStatus.OK, (IRAN,)), ("nowhere", SearchStatus.EMPTY, ())]
    assert all(r.error is None and r.provider == "retriever" and r.latency_s > 0 for r in results)


@pytest.mark.parametrize("hit", [SCORED, DOCUMENT, {"document": {"id": 1, "contents": '"Iran"\nIn Asia.'}}])
def test_hits_with_and_without_scores_are_the_same_passage(hit):
    assert ask(reply([[hit]]))[0][0].passages == (IRAN,)


def test_documents_without_an_id_or_as_bare_text_are_read_and_extra_hits_are_dropped():
    hits = [{"document": {"contents": '"Iran"\nIn Asia.'}}, {"document": "plain"}, SCORED]
    assert ask(reply([hits]))[0][0].passages == (Passage("", "Iran", "In Asia."), Passage("", "", "plain"))


def test_trouble_that_passes_is_tried_again():
    results, seen = ask(say(status=503), say(text='{"resu'), say(status=429), reply([[SCORED]]), attempts=4)
    assert results[0].status == SearchStatus.OK and len(seen) == 4


def test_the_last_failure_names_status_address_and_body():
    results, seen = ask(say(status=500, text="index is broken"), queries=("a", "b"))
    assert [r.status for r in results] == [SearchStatus.ERROR] * 2 and len(seen) == 3
    assert results[0].error.startswith("http://127.0.0.1:") and "HTTP 500: 'index is broken'" in results[0].error
    assert results[0].passages == ()


def test_a_server_that_keeps_limiting_the_rate_is_rate_limited():
    results, seen = ask(say(status=429, headers={"Retry-After": "0"}))
    assert results[0].status == SearchStatus.RATE_LIMITED and len(seen) == 3


def test_retry_after_is_waited_for():
    start = time.monotonic()
    results, _ = ask(say(status=429, headers={"Retry-After": "1"}), reply([[SCORED]]), timeout_s=0.4)
    assert results[0].status == SearchStatus.OK and 1 <= time.monotonic() - start < 5


def test_a_retry_after_beyond_the_deadline_ends_the_search_at_once():
    start = time.monotonic()
    results, seen = ask(say(status=429, headers={"Retry-After": "3600"}), reply([[SCORED]]), deadline_s=10)
    assert results[0].status == SearchStatus.RATE_LIMITED and len(seen) == 1 and time.monotonic() - start < 5
    assert "the provider asked for a pause; the next request may leave in 3600 s, after search.deadline_s" in results[0].error


def test_a_slow_server_times_out_per_attempt():
    async def slow():
        await asyncio.sleep(30)

    start = time.monotonic()
    results, seen = ask(slow, timeout_s=0.2, attempts=2)
    assert results[0].status == SearchStatus.TIMEOUT and "no answer within 0.2 s" in results[0].error
    assert len(seen) == 2 and time.monotonic() - start < 10


def test_a_server_that_wants_a_key_stops_the_run():
    with pytest.raises(SearchStopped, match=r"refuses a request without a key .* HTTP 401: 'who are you'"):
        ask(say(status=401, text="who are you"))


@pytest.mark.parametrize("status", [302, 400, 404, 422])
def test_a_refusal_is_not_tried_again(status):
    results, seen = ask(say(status=status, text="no"))
    assert results[0].status == SearchStatus.ERROR and f"HTTP {status}" in results[0].error and len(seen) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"result": [[], []]}, 'expected {"result": [...]} with 1 lists'),
        ({"results": [[]]}, 'expected {"result": [...]} with 1 lists'),
        ([], 'expected {"result": [...]} with 1 lists'),
        ({"result": [[{"document": {"text": "x"}}]]}, "expected a document with contents"),
        ({"result": [[7]]}, "expected a document with contents"),
    ],
)
def test_json_of_another_shape_is_an_error_and_not_tried_again(body, message):
    results, seen = ask(say(text=json.dumps(body)))
    assert results[0].status == SearchStatus.ERROR and message in results[0].error and len(seen) == 1


def test_broken_json_is_an_error_that_shows_the_body():
    results, seen = ask(say(text="<html>gateway"))
    assert results[0].status == SearchStatus.ERROR and "not JSON: '<html>gateway'" in results[0].error and len(seen) == 3


def test_a_server_that_is_not_there_is_an_error():
    client = retriever("http://127.0.0.1:9/retrieve", attempts=2)

    async def call():
        results = await client.search(["a"])
        await client.close()
        return results

    result = run(call())[0]
    assert result.status == SearchStatus.ERROR and "127.0.0.1:9" in result.error


def test_no_more_requests_run_at_once_than_allowed():
    running, most = 0, 0

    async def counted():
        nonlocal running, most
        running, most = running + 1, max(most, running + 1)
        await asyncio.sleep(0.02)
        running -= 1
        return await reply([[SCORED]])()

    async def call():
        async with serving(counted) as (url, _):
            client = retriever(url, attempts=1, max_concurrency=3)
            results = await asyncio.gather(*(client.search([str(n)]) for n in range(12)))
            await client.close()
            return results

    assert [result[0].status for result in run(call())] == [SearchStatus.OK] * 12
    assert most == 3


def test_a_cancelled_search_leaves_the_client_usable():
    async def slow():
        await asyncio.sleep(30)

    async def call():
        async with serving(slow, reply([[SCORED]])) as (url, _):
            client = retriever(url, attempts=1, max_concurrency=1)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.search(["a"]), 0.2)
            result = await client.search(["b"])
            await client.close()
            return result

    assert run(call())[0].status == SearchStatus.OK


def test_the_key_is_read_from_its_variable_and_sent_as_a_bearer_token(monkeypatch):
    monkeypatch.setenv("RETRIEVER_KEY", "s3cret")

    async def call():
        async with serving(reply([[]])) as (url, seen):
            client = make_client(Search(backend="retriever", url=url, api_key_env="RETRIEVER_KEY"))
            await client.search(["a"])
            await client.close()
            return seen

    assert run(call())[0][1] == "Bearer s3cret"


def test_a_missing_address_or_key_is_named(monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ValueError, match=r"needs search\.url"):
        make_client(Search(backend="retriever"))
    with pytest.raises(ValueError, match=r"search\.api_key_env=NO_SUCH_KEY: that environment variable is not set"):
        make_client(Search(backend="retriever", url="http://127.0.0.1:9/retrieve", api_key_env="NO_SUCH_KEY"))


def test_retry_after_is_read_as_seconds_or_as_a_date():
    assert parse_retry_after("7") == 7.0
    assert parse_retry_after(None) is None and parse_retry_after("soon") is None
    assert 50 < parse_retry_after(format_datetime(datetime.now(UTC) + timedelta(seconds=60), usegmt=True)) <= 60
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0

"""The caching proxy: our client through it, its token, budgets and statuses, and that no key leaves it."""

import asyncio
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager

import aiohttp
import pytest
import search_server
from aiohttp.test_utils import TestClient, TestServer
from patient import run
from search_server import KEY, KEY_VARIABLE, in_turn, passages

from igpo_megatron.search import http
from igpo_megatron.search.client import make_client
from igpo_megatron.search.results import SearchStatus, SearchStopped
from igpo_megatron.search.settings import Search
from igpo_megatron.serve import search as proxy_server
from igpo_megatron.serve.budgets import BudgetSpent, Ledger

TOKEN = "0123456789abcdef-token"
TOKEN_VARIABLE = "PROXY_TEST_TOKEN"
BEARER = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(autouse=True)
def quick_backoff_and_keys(monkeypatch):
    monkeypatch.setattr(http, "_backoff", lambda state: 0.001)
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setenv(TOKEN_VARIABLE, TOKEN)


def settings_of(provider, cache, *, budget=100, token=TOKEN, **changes):
    search = search_server.settings("serper", provider, cache=cache, **changes)
    return proxy_server.Settings(search, budget, token)


@asynccontextmanager
async def proxy(tmp_path, fault=lambda asked: None, **settings):
    """(the provider, an HTTP client of a proxy in front of it)"""
    async with search_server.serving(fault) as provider:
        app = proxy_server.Proxy(settings_of(provider, tmp_path / "cache.sqlite", **settings)).app()
        async with TestClient(TestServer(app)) as client:
            yield provider, client


async def ask(client, *queries, path="/retrieve", headers=BEARER, **body):
    """(status, decoded body) of one request."""
    async with client.post(path, json={"queries": list(queries), **body}, headers=headers) as response:
        return response.status, await response.json()


def test_our_client_searches_through_the_proxy_and_the_second_run_pays_nothing(tmp_path):
    async def call():
        async with proxy(tmp_path) as (provider, client):
            found = []
            for run in ("a", "b"):
                url = str(client.make_url(f"/runs/{run}/retrieve"))
                ours = make_client(Search(backend="retriever", url=url, api_key_env=TOKEN_VARIABLE, top_k=2, attempts=1))
                found.append(await ours.search(["who wrote Ulysses", "nothing here", " who  wrote Ulysses"]))
                await ours.close()
            spent = [await (await client.get(f"/runs/{run}", headers=BEARER)).json() for run in ("a", "b")]
            return found, spent, [asked.queries for asked in provider.asked]

    found, spent, asked = run(call())
    for results in found:
        assert [result.status for result in results] == [SearchStatus.OK, SearchStatus.EMPTY, SearchStatus.OK]
        assert results[0].passages == passages("who wrote Ulysses", 2)
    assert sorted(asked) == [["nothing here"], ["who wrote Ulysses"]]
    assert spent == [{"run": "a", "spent": 2, "budget": 100}, {"run": "b", "spent": 0, "budget": 100}]


def test_both_forms_of_the_answer_follow_the_protocol(tmp_path):
    async def call():
        async with proxy(tmp_path) as (_, client):
            return [await ask(client, "q", topk=1, return_scores=scores) for scores in (True, False)]

    (first,) = passages("q", 1)
    document = {"id": first.doc_id, "contents": f'"{first.title}"\n{first.text}'}
    assert run(call()) == [(200, {"result": [[{"document": document}]]}), (200, {"result": [[document]]})]


@pytest.mark.parametrize("sent", [None, TOKEN, f"Bearer {TOKEN}x", "Bearer ", f"Basic {TOKEN}", "Bearer \xff"])
@pytest.mark.parametrize("path", ["/retrieve", "/runs/a/retrieve", "/metrics", "/runs/a", "/elsewhere"])
def test_without_the_token_nothing_is_answered_and_nothing_is_asked(tmp_path, sent, path):
    headers = {"Authorization": sent} if sent else {}

    async def call():
        async with proxy(tmp_path) as (provider, client):
            method = client.post if path.endswith("retrieve") else client.get
            async with method(path, headers=headers, **({"json": {"queries": ["q"]}} if path.endswith("retrieve") else {})) as response:
                return response.status, response.headers["WWW-Authenticate"], await response.text(), len(provider.asked)

    status, challenge, text, asked = run(call())
    assert (status, challenge, asked) == (401, "Bearer", 0) and TOKEN not in text


def test_our_client_stops_the_run_where_its_token_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "another token altogether")

    async def call():
        async with proxy(tmp_path) as (_, client):
            ours = make_client(Search(backend="retriever", url=str(client.make_url("/retrieve")), api_key_env=TOKEN_VARIABLE))
            try:
                await ours.search(["q"])
            finally:
                await ours.close()

    with pytest.raises(SearchStopped, match=rf"refuses the key in {TOKEN_VARIABLE} with HTTP 401"):
        run(call())


def test_a_spent_budget_is_refused_clearly_and_cached_answers_stay_free(tmp_path):
    async def call():
        async with proxy(tmp_path, budget=2) as (provider, client):
            found = [await ask(client, *queries, path="/runs/r1/retrieve") for queries in (["a", "b"], ["c"], ["a"])]
            found.append(await ask(client, "c", path="/runs/r2/retrieve"))
            return found, len(provider.asked)

    (first, refused, cached, other), asked = run(call())
    assert (first[0], refused[0], cached[0], other[0], asked) == (200, 402, 200, 200, 3)
    assert refused[1]["detail"].startswith("run r1 has used 2 of its 2 paid searches and asks for 1 more; cached answers stay free;")


def test_our_client_stops_the_run_where_its_budget_is_spent(tmp_path):
    async def call():
        async with proxy(tmp_path, budget=0) as (_, client):
            ours = make_client(
                Search(backend="retriever", url=str(client.make_url("/runs/r1/retrieve")), api_key_env=TOKEN_VARIABLE, top_k=3)
            )
            try:
                await ours.search(["q"])
            finally:
                await ours.close()

    with pytest.raises(SearchStopped, match=r"no searches left, it says HTTP 402: .*run r1 has used 0 of its 0 paid searches"):
        run(call())


def test_budgets_outlive_the_server_and_are_never_overdrawn(tmp_path):
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.charge("r", 3, 5)
    with pytest.raises(BudgetSpent):
        ledger.charge("r", 3, 5)
    ledger.close()
    again = Ledger(tmp_path / "ledger.sqlite")
    again.charge("r", 2, 5)
    assert again.all() == {"r": 5} and again.spent("another") == 0
    again.close()


@pytest.mark.parametrize(
    ("fault", "status", "message"),
    [
        ("500", 502, "1 of 2 searches failed, the first by serper: error: "),
        ("never", 504, "1 of 2 searches failed, the first by serper: timeout: "),
        ("429", 429, "1 of 2 searches failed, the first by serper: rate_limited: "),
        ("quota", 402, "search.backend=serper has no searches left"),
        ("401", 402, f"search.backend=serper refuses the key in {KEY_VARIABLE}"),
    ],
)
def test_a_failed_search_fails_the_request_and_is_not_cached(tmp_path, fault, status, message):
    def faults(asked):
        return fault if asked.queries == ["bad"] and len(seen) == 0 else None

    seen = []

    async def call():
        async with proxy(tmp_path, faults, timeout_s=0.3, attempts=1) as (_, client):
            first = await ask(client, "good", "bad")
            seen.append(first)
            return first, await ask(client, "good", "bad")

    first, second = run(call())
    assert first[0] == status and first[1]["detail"].startswith(message), first
    # A refused key or quota stays refused until somebody starts the proxy again.
    assert second[0] == (402 if status == 402 else 200)


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        ('{"query": "q"}', "application/json", 422),
        ('{"queries": "q"}', "application/json", 422),
        ("{", "application/json", 422),
        ('{"queries": ["q"], "topk": 4}', "application/json", 422),
        ('{"queries": ["q"]}', "text/plain", 415),
    ],
)
def test_requests_of_another_shape_are_refused(tmp_path, body, content_type, status):
    async def call():
        async with proxy(tmp_path) as (provider, client):
            response = await client.post("/retrieve", data=body, headers={**BEARER, "Content-Type": content_type})
            return response.status, "detail" in await response.json(), len(provider.asked)

    assert run(call()) == (status, True, 0)


@pytest.mark.parametrize(
    "head",
    ["GET http://{inner}/ HTTP/1.1", "POST http://{inner}/retrieve HTTP/1.1", "CONNECT {inner} HTTP/1.1", "GET /http://{inner}/ HTTP/1.1"],
)
def test_nobody_is_sent_to_another_address(tmp_path, head):
    """Server-side request forgery: requests in the form for HTTP proxies, and addresses where a query should be."""
    reached = []

    async def inner(reader, writer):
        reached.append(await reader.readline())
        writer.close()

    async def call():
        secret = await asyncio.start_server(inner, "127.0.0.1", 0)
        address = f"127.0.0.1:{secret.sockets[0].getsockname()[1]}"
        async with secret, proxy(tmp_path) as (provider, client):
            status, _ = await ask(client, f"http://{address}/", url=f"http://{address}/", search_url=f"http://{address}/")
            reader, writer = await asyncio.open_connection(client.host, client.port)
            lines = [head.format(inner=address), f"Host: {address}", f"Authorization: Bearer {TOKEN}", "Content-Length: 0"]
            writer.write(("\r\n".join(lines) + "\r\n\r\n").encode())
            answer = (await reader.readline()).split()
            writer.close()
            return status, int(answer[1]), [asked.provider for asked in provider.asked]

    status, answered, asked = run(call())
    assert status == 200 and asked == ["serper"] and reached == [] and 400 <= answered < 500


@pytest.mark.parametrize(
    ("host", "status"), [("localhost:80", 200), ("127.0.0.1", 200), ("[::1]:80", 200), ("evil.example", 403), ("[", 403)]
)
def test_without_a_token_a_web_page_that_points_its_name_here_is_refused(tmp_path, host, status):
    async def call():
        async with proxy(tmp_path, token=None) as (_, client):
            return (await ask(client, "q", headers={"Host": host}))[0]

    assert run(call()) == status


def test_no_key_and_no_token_is_in_a_log_an_error_an_answer_or_the_cache(tmp_path, caplog):
    """The provider repeats the key in refusals, in results and in bodies that are no JSON."""
    caplog.set_level(logging.DEBUG)

    async def call():
        texts = []
        for fault in ("401", "echo", "say " + KEY, "html"):
            async with proxy(tmp_path, in_turn(fault), attempts=1) as (_, client):
                for headers in (BEARER, {"Authorization": f"Bearer {TOKEN}x"}):
                    texts.append(json.dumps(await ask(client, f"{fault} q", headers=headers)))
                for path in ("/metrics", "/health", "/runs/default"):
                    texts.append(await (await client.get(path, headers=BEARER)).text())
        return texts

    texts = run(call())
    files = [path.read_bytes() for path in tmp_path.iterdir()]
    assert any("***" in text for text in texts) and any(b"***" in content for content in files)
    for secret in (KEY, TOKEN):
        assert not any(secret in text for text in (*texts, caplog.text))
        assert not any(secret.encode() in content for content in files)
    assert TOKEN not in repr(settings_of(search_server.SearchServer(lambda asked: None), None))


def test_metrics_tell_what_each_run_has_cost(tmp_path):
    async def call():
        async with proxy(tmp_path) as (_, client):
            await ask(client, "a", "b", "a", path="/runs/r1/retrieve")
            return await (await client.get("/metrics", headers=BEARER)).text()

    lines = run(call()).splitlines()
    assert 'search_proxy_paid_queries_total{run="r1"} 2.0' in lines and 'search_proxy_queries_total{run="r1"} 3.0' in lines


# ---- the process


COMMAND = [sys.executable, "-m", "igpo_megatron", "serve", "search", "--port", "0", "--token-env", TOKEN_VARIABLE, "--budget", "5"]


def environment(**changes):
    kept = {name: value for name, value in os.environ.items() if name not in (KEY_VARIABLE, TOKEN_VARIABLE)}
    return {**kept, **changes}


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        (["--host", "0.0.0.0", "backend=serper"], {KEY_VARIABLE: KEY}, f"can be reached from other machines and {TOKEN_VARIABLE} is not"),
        (["backend=serper"], {KEY_VARIABLE: KEY, TOKEN_VARIABLE: "short"}, f"{TOKEN_VARIABLE} has 5 characters, expected at least 16"),
        (["backend=serper"], {TOKEN_VARIABLE: TOKEN}, f"search.api_key_env={KEY_VARIABLE}: that environment variable is not set"),
        (["backend=bm25"], {KEY_VARIABLE: KEY}, "backend=bm25 is no web API; expected backend=NAME with one of serper"),
        (["backend=serper", "topk=3"], {KEY_VARIABLE: KEY}, "search.topk: unknown key; did you mean 'search.top_k'?"),
        (["backend=serper", "mode=chaos"], {KEY_VARIABLE: KEY}, "the proxy always asks live"),
    ],
)
def test_it_refuses_to_start_where_something_is_wrong(tmp_path, arguments, variables, message):
    command = [*COMMAND, "--cache", str(tmp_path / "c.sqlite"), *arguments, f"api_key_env={KEY_VARIABLE}"]
    result = subprocess.run(command, env=environment(**variables), capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stdout == "" and message in result.stderr, result.stderr
    assert KEY not in result.stderr and "Traceback" not in result.stderr


def test_a_signal_ends_it_after_the_answer_under_way_and_its_output_holds_no_secret(tmp_path):
    async def call():
        async with search_server.serving(in_turn("slow")) as provider:
            arguments = ["backend=serper", f"url={provider.url}/serper", f"api_key_env={KEY_VARIABLE}", "top_k=3"]
            server = await asyncio.create_subprocess_exec(
                *COMMAND,
                *("--cache", str(tmp_path / "c.sqlite"), *arguments),
                env=environment(**{KEY_VARIABLE: KEY, TOKEN_VARIABLE: TOKEN}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            line = (await server.stdout.readline()).decode()
            url = line.split()[3]
            async with aiohttp.ClientSession() as session:
                asking = asyncio.create_task(ask(session, "q", path=url))
                while not provider.asked:
                    await asyncio.sleep(0.01)
                server.send_signal(signal.SIGTERM)
                status, body = await asking
            out, err = await asyncio.wait_for(server.communicate(), 30)
            return line, status, body, out + err, server.returncode

    line, status, body, rest, code = asyncio.run(call())
    assert line.startswith("serving serper on http://127.0.0.1:") and line.endswith(
        f"(token in {TOKEN_VARIABLE}, 5 paid searches per run)\n"
    )
    assert status == 200 and len(body["result"][0]) == 3 and (rest, code) == (b"", 0)


def test_a_port_in_use_is_one_sentence(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        command = [*COMMAND, "--cache", str(tmp_path / "c.sqlite"), "backend=serper", f"api_key_env={KEY_VARIABLE}"]
        command[command.index("0")] = str(taken.getsockname()[1])
        result = subprocess.run(command, env=environment(**{KEY_VARIABLE: KEY}), capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and "Address already in use; choose another --port" in result.stderr

"""The server as a process of its own, asked by our client and by the published ones; its batches and its end in this process."""

import asyncio
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.error import HTTPError

import aiohttp
import numpy as np
import pytest
import requests
from aiohttp import web
from typer.testing import CliRunner

from igpo_megatron.cli import app
from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.client import make_client
from igpo_megatron.search.local.dense import Embedding
from igpo_megatron.search.results import SearchStatus
from igpo_megatron.search.settings import Search
from igpo_megatron.serve import http, retriever
from igpo_megatron.serve.retriever import Backend

COMMAND = [sys.executable, "-m", "igpo_megatron", "serve", "retriever"]
LINES = [
    '{"id": "ir", "title": "Iran", "text": "The currency of Iran is the Iranian Rial."}',
    r'{"id": "pe", "contents": "\"Peru\"\nThe currency of Peru is the Sol."}',
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "corpus.jsonl"
    path.write_text("\n".join(LINES))
    return path


@pytest.fixture(scope="module")
def url(corpus):
    """Address of a running server; the process is ended by its own id."""
    server = subprocess.Popen([*COMMAND, "--corpus", str(corpus), "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        match = re.fullmatch(r"serving 2 passages on (http://127\.0\.0\.1:\d+/retrieve)\n", line)
        assert match, line
        yield match[1]
    finally:
        server.terminate()
        assert server.wait(timeout=60) == 0


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


def test_the_client_finds_what_the_server_indexed(url):
    async def call():
        client = make_client(Search(backend="retriever", url=url, top_k=1, attempts=2))
        results = await client.search(["currency of Iran", "sol", "zanzibar"])
        await client.close()
        return results

    results = asyncio.run(call())
    assert [result.status for result in results] == [SearchStatus.OK, SearchStatus.OK, SearchStatus.EMPTY]
    assert results[0].passages == (Passage("ir", "Iran", "The currency of Iran is the Iranian Rial."),)
    assert results[1].passages == (Passage("pe", "Peru", "The currency of Peru is the Sol."),)


def test_both_forms_of_the_answer_follow_the_protocol(url):
    document = {"id": "pe", "contents": '"Peru"\nThe currency of Peru is the Sol.'}
    assert post(url, {"queries": ["sol"]}) == {"result": [[document]]}
    [[hit]] = post(url, {"queries": ["sol"], "topk": 1, "return_scores": True})["result"]
    assert hit["document"] == document and hit["score"] > 0
    assert len(post(url, {"queries": ["currency"], "topk": None})["result"][0]) == 2
    assert len(post(url, {"queries": ["currency"], "topk": 1})["result"][0]) == 1


@pytest.mark.parametrize("body", [{"query": "sol"}, {"queries": "sol"}, {"queries": ["sol"], "topk": 0}])
def test_a_request_of_another_shape_is_refused(url, body):
    with pytest.raises(HTTPError) as caught:
        post(url, body)
    assert caught.value.code == 422


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_health_and_readiness_tell_the_size_of_the_index(url, path):
    with urllib.request.urlopen(url.replace("/retrieve", path), timeout=30) as response:
        assert json.load(response) == {"status": "ok", "passages": 2}


def test_metrics_count_what_was_asked(url):
    post(url, {"queries": ["sol", "rial"]})
    lines = requests.get(url.replace("/retrieve", "/metrics"), timeout=30).text.splitlines()
    values = {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}
    assert values['retriever_requests_total{status="200"}'] >= 1 and values["retriever_queries_total"] >= 2
    assert values["retriever_batches_total"] >= 1 and values["retriever_in_flight"] == 0
    assert values['retriever_latency_seconds_bucket{le="+Inf"}'] == values["retriever_latency_seconds_count"] >= 1
    assert values["retriever_latency_seconds_sum"] > 0


# ---- the published clients, in their own request shapes (Search-R1 at training, verl's Search-R1-like tool)


def search_r1_batch_search(url, queries, topk):
    """search_r1/llm_agent/generation.py: all queries of a turn in one request, no timeout, every hit read by document and contents."""
    results = requests.post(url, json={"queries": queries, "topk": topk, "return_scores": True}).json()["result"]
    texts = []
    for hits in results:
        text = ""
        for number, hit in enumerate(hits):
            content = hit["document"]["contents"]
            title, body = content.split("\n")[0], "\n".join(content.split("\n")[1:])
            text += f"Doc {number + 1}(Title: {title}) {body}\n"
        texts.append(text)
    return texts


def verl_search(url, queries, topk):
    """verl/tools/utils/search_r1_like_utils.py: headers, a timeout, tries on 5xx, hits with a score."""
    headers = {"Content-Type": "application/json", "Accept": "application/json"}
    response = requests.post(url, headers=headers, json={"queries": queries, "topk": topk, "return_scores": True}, timeout=30)
    response.raise_for_status()
    return [[(hit["document"]["contents"], hit["score"]) for hit in hits] for hits in response.json()["result"]]


def test_the_client_of_search_r1_is_served(url):
    assert search_r1_batch_search(url, ["sol of Peru", "zanzibar", "iran"], 1) == [
        'Doc 1(Title: "Peru") The currency of Peru is the Sol.\n',
        "",
        'Doc 1(Title: "Iran") The currency of Iran is the Iranian Rial.\n',
    ]
    assert len(search_r1_batch_search(url, [f"sol {n}" for n in range(600)], 3)) == 600


def test_the_client_of_verl_is_served(url):
    [[(contents, score), (other, less)]] = verl_search(url, ["currency Peru"], 3)
    assert contents == '"Peru"\nThe currency of Peru is the Sol.' and other.startswith('"Iran"') and score > less > 0


@asynccontextmanager
async def stock_server():
    """search_r1/search/retrieval_server.py as published, its fault included: without scores it unpacks one value into two."""

    async def retrieve(request):
        body = await request.json()
        if not (isinstance(body["queries"], list) and isinstance(body.get("topk"), int | None)):
            return web.json_response({"detail": [{"msg": "Input should be a valid list"}]}, status=422)
        if not body.get("return_scores", False):
            return web.Response(status=500, text="Internal Server Error")
        hits = [
            {"document": {"id": str(n), "contents": f'"Title {n}"\nText {n}.'}, "score": 1.0 - n / 10} for n in range(body["topk"] or 3)
        ]
        return web.json_response({"result": [hits for _ in body["queries"]]})

    app = web.Application()
    app.router.add_post("/retrieve", retrieve)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/retrieve"
    finally:
        await runner.cleanup()


def test_our_client_asks_a_stock_server():
    async def call():
        async with stock_server() as url:
            client = make_client(Search(backend="retriever", url=url, top_k=2, attempts=1))
            results = await client.search(["a", "b"])
            await client.close()
            return results

    results = asyncio.run(call())
    assert [result.status for result in results] == [SearchStatus.OK] * 2
    assert results[1].passages == (Passage("0", "Title 0", "Text 0."), Passage("1", "Title 1", "Text 1."))


# ---- the index that stays


def test_an_unchanged_corpus_is_not_indexed_again_and_a_changed_one_is(tmp_path, monkeypatch):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(LINES))
    number, find = retriever.open_index(corpus, Backend.BM25, progress=False)
    (kept,) = (tmp_path / "corpus.jsonl.index").iterdir()
    first = find(["sol", "currency"], 2)
    with monkeypatch.context() as patch:
        patch.setattr("igpo_megatron.search.local.bm25._build", lambda *_: pytest.fail("indexed again"))
        again, find_again = retriever.open_index(corpus, Backend.BM25, progress=False)
    assert number == again == 2 and find_again(["sol", "currency"], 2) == first and len(first[1]) == 2
    corpus.write_text(LINES[0])
    assert retriever.open_index(corpus, Backend.BM25, progress=False)[0] == 1
    assert len(list(kept.parent.iterdir())) == 2


def test_an_index_that_was_never_finished_does_not_count(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(LINES))
    retriever.open_index(corpus, Backend.BM25, progress=False)
    (kept,) = (tmp_path / "corpus.jsonl.index").iterdir()
    unfinished = kept.rename(kept.with_name(f"{kept.name}.{socket.gethostname()}-{2**22 + 1}.part"))  # no process has this number
    (unfinished / "vocab.index.json").unlink()
    assert retriever.open_index(corpus, Backend.BM25, progress=False)[1](["sol"], 1)[0]
    assert list(kept.parent.iterdir()) == [kept]


def test_dense_search_keeps_its_vectors_and_gives_no_answer_to_no_question(tmp_path, monkeypatch):
    calls = []

    def encoder(name):
        def encode(texts):
            calls.append(len(texts))
            return np.array([[text.count("Iran") + 0.1, text.count("Peru")] for text in texts])

        return encode

    monkeypatch.setattr("igpo_megatron.search.local.dense.sentence_transformer", encoder)
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(LINES))
    letters = Embedding("letters", "query: ", "passage: ")
    for _ in range(2):
        _, find = retriever.open_index(corpus, Backend.DENSE, letters, progress=False)
        peru, blank = find(["Peru", " "], 1)
        assert [passage.doc_id for passage, _ in peru] == ["pe"] and blank == ()
    assert calls == [2, 1, 1]  # passages once, the question twice

    # Both ways: the same vectors, and a score that is the sum of two reciprocal ranks.
    _, find = retriever.open_index(corpus, Backend.HYBRID, letters, progress=False)
    (peru, iran), blank = find(["sol Peru", " "], 2)
    assert (peru[0].doc_id, iran[0].doc_id) == ("pe", "ir") and blank == ()
    assert (peru[1], iran[1]) == pytest.approx((1 / 61 + 1 / 61, 1 / 62))  # only BM25's first has a word of the query
    assert calls == [2, 1, 1, 1]
    assert sorted(path.name.split("-")[0] for path in (tmp_path / "corpus.jsonl.index").iterdir()) == ["bm25", "dense"]


def test_an_encoder_for_a_search_that_encodes_nothing_is_refused(corpus):
    words = ["serve", "retriever", "--corpus", str(corpus), "--port", "0", "--backend", "bm25", "--encoder", "e5"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2 and "--backend bm25 encodes nothing" in result.output


# ---- batches, readiness, the end


class SlowIndex:
    """Finds a passage named after the query; tells what it was asked."""

    def __init__(self, seconds):
        self.seconds, self.calls, self.threads = seconds, [], set()

    def find(self, queries, k):
        self.calls.append((list(queries), k))
        self.threads.add(threading.current_thread().name)
        time.sleep(self.seconds)
        if "broken" in queries:
            raise RuntimeError("the index is broken")
        return [tuple((Passage(query, query, str(n)), 1.0) for n in range(k)) for query in queries]


def test_requests_that_wait_are_answered_by_one_call_of_the_index():
    index = SlowIndex(0.05)

    async def call():
        batches = retriever.Batches(index.find, http.Metrics("test").counter("batches", "Calls."))
        requests = [["first"], *([f"q{n % 3}", "x"] for n in range(20)), ["x"]]
        return requests, await asyncio.gather(*(batches.get(queries, 2 if number == 21 else 1) for number, queries in enumerate(requests)))

    requests, answers = asyncio.run(call())
    assert [[hits[0][0].doc_id for hits in answer] for answer in answers] == requests
    assert [len(answer[0]) for answer in answers] == [1] * 21 + [2]
    assert sorted(index.calls, key=lambda call: call[1]) == [(["first", "q0", "x", "q1", "q2"], 1), (["x"], 2)]
    assert len(index.threads) == 1


def test_a_broken_search_fails_the_requests_of_its_batch_and_no_other():
    index = SlowIndex(0.01)

    async def call():
        batches = retriever.Batches(index.find, http.Metrics("test").counter("batches", "Calls."))
        with pytest.raises(RuntimeError, match="the index is broken"):
            await batches.get(["broken"], 1)
        return await batches.get(["fine"], 1)

    assert len(asyncio.run(call())[0]) == 1


def serve_in_process(server, work):
    """Run `work(url, stop)` beside a server in this process."""

    async def call():
        stop = asyncio.Event()
        listener = http.listen("127.0.0.1", 0)
        task = asyncio.create_task(http.serve(server.app(), listener, stop=stop, grace_s=10))
        async with aiohttp.ClientSession() as session:
            try:
                return await work(session, f"http://127.0.0.1:{listener.getsockname()[1]}", stop)
            finally:
                stop.set()
                await task

    return asyncio.run(call())


def test_until_the_index_is_there_the_server_is_alive_but_not_ready():
    server = retriever.Server(top_k=1)

    async def work(session, url, stop):
        found = []
        for ready in (False, True):
            if ready:
                server.ready(7, SlowIndex(0).find)
            async with session.post(f"{url}/retrieve", json={"queries": ["a"]}) as search:
                found.append(search.status)
            async with session.get(f"{url}/health") as health, session.get(f"{url}/ready") as readiness:
                found += [health.status, readiness.status, await readiness.json()]
        return found

    loading, ready = {"status": "loading", "passages": None}, {"status": "ok", "passages": 7}
    assert serve_in_process(server, work) == [503, 200, 503, loading, 200, 200, 200, ready]


def test_requests_under_way_are_answered_when_the_server_is_ended():
    server = retriever.Server(top_k=1)
    index, go_on = SlowIndex(0), threading.Event()
    server.ready(1, lambda queries, k: go_on.wait(60) and index.find(queries, k))

    async def work(session, url, stop):
        async def ask(query):
            async with session.post(f"{url}/retrieve", json={"queries": [query]}) as response:
                return response.status, await response.json()

        waiting = [asyncio.create_task(ask(query)) for query in ("searched", "queued")]
        while "retriever_in_flight 2.0" not in (await server.metrics.answer(None)).text:
            await asyncio.sleep(0.01)
        stop.set()
        asyncio.get_running_loop().call_later(0.2, go_on.set)
        answers = await asyncio.gather(*waiting)
        with pytest.raises(aiohttp.ClientConnectionError):
            async with aiohttp.ClientSession() as late:
                await late.get(f"{url}/health")
        return answers

    for (status, body), query in zip(serve_in_process(server, work), ("searched", "queued"), strict=True):
        assert status == 200 and body["result"][0][0]["id"] == query


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_server_without_a_word(corpus, number):
    server = subprocess.Popen([*COMMAND, "--corpus", str(corpus), "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert server.stdout.readline().startswith("serving 2 passages")
    server.send_signal(number)
    assert server.communicate(timeout=60) == ("", "") and server.returncode == 0


def start_and_fail(*arguments):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_a_port_in_use_is_one_sentence_before_the_corpus_is_read(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = start_and_fail("--corpus", tmp_path / "never-read.jsonl", "--port", port)
    assert result.returncode == 2 and result.stdout == ""
    problem = f"cannot listen on 127.0.0.1:{port}: Address already in use"
    assert result.stderr == f"error: {problem}; choose another --port, or stop the program that uses it\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [("{\n", "corpus.jsonl:1: not JSON"), ("", "corpus.jsonl: the corpus has no passages"), (None, "corpus.jsonl: no such corpus file")],
)
def test_a_corpus_that_cannot_be_served_is_one_line_that_names_the_file(tmp_path, text, message):
    corpus: Path = tmp_path / "corpus.jsonl"
    if text is not None:
        corpus.write_text(text)
    result = start_and_fail("--corpus", corpus, "--port", 0)
    assert result.returncode == 2 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1

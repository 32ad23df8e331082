"""The server as a process of its own, asked by the client."""

import asyncio
import json
import re
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path
from urllib.error import HTTPError

import pytest

import serve_retriever
from igpo_megatron.config.schema import Search
from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.client import SearchStatus, make_client

COMMAND = [sys.executable, serve_retriever.__file__]
LINES = [
    '{"id": "ir", "title": "Iran", "text": "The currency of Iran is the Iranian Rial."}',
    r'{"id": "pe", "contents": "\"Peru\"\nThe currency of Peru is the Sol."}',
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """Address of a running server; the process is ended by its own id."""
    corpus = tmp_path_factory.mktemp("served") / "corpus.jsonl"
    corpus.write_text("\n".join(LINES))
    server = subprocess.Popen([*COMMAND, "--corpus", str(corpus), "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        line = server.stdout.readline()
        match = re.fullmatch(r"serving 2 passages on (http://127\.0\.0\.1:\d+/retrieve)\n", line)
        assert match, line
        yield match[1]
    finally:
        server.terminate()
        server.wait(timeout=30)


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


def test_health_tells_the_size_of_the_index(url):
    with urllib.request.urlopen(url.replace("/retrieve", "/health"), timeout=30) as response:
        assert json.load(response) == {"status": "ok", "passages": 2}


def start_and_fail(*arguments):
    return subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_a_port_in_use_is_one_sentence_before_the_corpus_is_read(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = start_and_fail("--corpus", tmp_path / "never-read.jsonl", "--port", port)
    assert result.returncode == 1 and result.stdout == ""
    problem = f"cannot listen on 127.0.0.1:{port}: Address already in use"
    assert result.stderr == f"serve_retriever: {problem}; choose another --port, or stop the program that uses it\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [("{\n", "corpus.jsonl:1: not JSON"), ("", "corpus.jsonl: the corpus has no passages"), (None, "corpus.jsonl: no such corpus file")],
)
def test_a_corpus_that_cannot_be_served_is_one_line_that_names_the_file(tmp_path, text, message):
    corpus: Path = tmp_path / "corpus.jsonl"
    if text is not None:
        corpus.write_text(text)
    result = start_and_fail("--corpus", corpus, "--port", 0)
    assert result.returncode == 1 and message in result.stderr and len(result.stderr.strip().splitlines()) == 1

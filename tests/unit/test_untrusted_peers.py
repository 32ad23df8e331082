"""Servers that answer with anything, byte for byte: the page reader, the search engine and the summariser end in a typed outcome."""

from __future__ import annotations

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st
from search_server import KEY, KEY_VARIABLE
from test_page_reader import FAST, words
from test_untrusted_text import BODIES, CHARSETS, PAGES, assert_clean, inputs

from igpo_megatron.search.client import make_client
from igpo_megatron.search.http import RequestFailed
from igpo_megatron.search.results import SearchStopped
from igpo_megatron.search.settings import Search
from igpo_megatron.tools.settings import Summary, Visit
from igpo_megatron.tools.visit.fetch import PageStatus
from igpo_megatron.tools.visit.reader import Page, PageReader
from igpo_megatron.tools.visit.summary import Summariser

DEEP_PAGE = b"<html><body>" + b"<div>" * 100_000 + b"text here" + b"</div>" * 100_000


class RawServer:
    """Answers every request with the same bytes and closes the connection."""

    port = 0
    answer = b""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            for line in head.splitlines():
                if line.lower().startswith(b"content-length:"):
                    await reader.readexactly(int(line.partition(b":")[2]))
            writer.write(self.answer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def raw_server() -> AsyncIterator[RawServer]:
    server = RawServer()
    async with await asyncio.start_server(server.handle, "127.0.0.1", 0) as listening:
        server.port = listening.sockets[0].getsockname()[1]
        yield server


def response(body: bytes = b"", status: bytes = b"200 OK", **headers: str | bytes) -> bytes:
    """The bytes of an answer; `Content_Length` among the headers overrides the right one."""
    fields = {"Content_Type": "text/html", "Content_Length": str(len(body)), **headers}
    lines = [name.replace("_", "-").encode() + b": " + _bytes(value) for name, value in fields.items()]
    return b"HTTP/1.1 " + status + b"\r\n" + b"\r\n".join(lines) + b"\r\n\r\n" + body


def _bytes(text: str | bytes) -> bytes:
    return text.encode(errors="surrogatepass") if isinstance(text, str) else text


HEADER_TEXT = st.binary(max_size=20).map(lambda value: value.replace(b"\n", b"").replace(b"\r", b""))
LOCATIONS = ["http://[", "//", "javascript:1", "http://xn--a", "/\ud800", "http://127.0.0.1:1/", "\\\\a"]
HEADERS = st.fixed_dictionaries(
    {},
    optional={
        "Content_Type": st.sampled_from(["text/html", "text/plain", "application/pdf", "application/json", ";;;", "a/b; charset"])
        | CHARSETS.map(lambda name: f"text/plain; charset={name}".replace("\n", "").replace("\r", "").replace("\0", ""))
        | HEADER_TEXT,
        "Content_Length": st.sampled_from(["9" * 4301, "99999999999", "-5", "0x10", "²", "1, 1", "3"]) | HEADER_TEXT,
        "Content_Encoding": st.sampled_from(["gzip", "gzip, gzip", "deflate", "br", "zstd", "x-gzip", "identity", "\ud800"]) | HEADER_TEXT,
        "Transfer_Encoding": st.sampled_from(["chunked", "gzip", "identity"]),
        "Location": st.sampled_from(["http://[", "//", "javascript:1", "http://xn--a", "/\ud800", "http://127.0.0.1:1/", "\\\\a"])
        | HEADER_TEXT,
        "Retry_After": st.sampled_from(["9" * 400, "²", "-1", "NaN"]) | HEADER_TEXT,
        "Set_Cookie": HEADER_TEXT,
    },
)
ODD = [b"200", b"302 Found", b"404 \xff\xfe", b"429 x", b"503 x", b"999 x", b"0 x", b"-1 x", b"20\xb2 x"]
STATUSES = st.sampled_from([b"200 OK"] * 5 + ODD)
FIXED = [
    *(b"", b"\x00\xff garbage\r\n\r\n", b"<html>hi", b"HTTP/9.9 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nA" + b"a" * 9000),
    response(DEEP_PAGE),
]
PACKED = PAGES | BODIES | BODIES.map(gzip.compress)
ANSWERS = st.builds(lambda body, status, headers: response(body, status, **headers), PACKED, STATUSES, HEADERS) | st.sampled_from(FIXED)


def test_untrusted_bytes_of_any_server_end_in_a_typed_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with asyncio.Runner() as runner:

        async def ask(answer: bytes) -> None:
            server.answer = answer
            page = await reader.visit(f"http://127.0.0.1:{server.port}/", "words")
            assert isinstance(page, Page) and isinstance(page.status, PageStatus)
            assert_clean([page.title, page.text, page.error])
            assert bool(page.text) == (page.status is PageStatus.OK)
            assert bool(page.error) == (page.status not in (PageStatus.OK, PageStatus.EMPTY))
            client = make_client(search)
            try:
                (result,) = await client.search(["a question"])
                assert_clean([result.passages, result.error])
                assert bool(result.error) == (not result.status.is_answer)
            except SearchStopped as stopped:
                assert_clean(str(stopped))
            finally:
                await client.close()
            try:
                assert_clean(await summariser.summarise("page", None))
            except RequestFailed as failed:
                assert_clean(str(failed))

        manager = raw_server()
        server = runner.run(manager.__aenter__())
        url = f"http://127.0.0.1:{server.port}"
        quick = {"attempts": 1, "timeout_s": 5.0, "deadline_s": 6.0, "top_k": 3}
        search = Search(**{"backend": "serper", "url": url, "api_key_env": KEY_VARIABLE, **quick})
        reader = PageReader(Visit(**{**FAST, "timeout_s": 5.0, "max_page_kib": 2048}), words)
        summariser = Summariser(Summary(url=url, model="m", attempts=1, timeout_s=5.0))

        @inputs(50)
        @given(ANSWERS)
        def holds(answer: bytes) -> None:
            runner.run(ask(answer))

        holds()

        async def close() -> None:
            await reader.close()
            await summariser.close()
            await manager.__aexit__(None, None, None)

        runner.run(close())

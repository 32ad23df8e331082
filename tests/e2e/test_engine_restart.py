"""Two real engines, one as if on another machine: weights go by both ways, and one that is killed, early or mid-turn, comes back."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from demo_runs import PATIENCE_S, signal_to

from checkpoint_conversion.hf_folder import HfReader
from igpo_megatron.config.load import build
from igpo_megatron.engines.fleet import EngineState, Fleet
from igpo_megatron.engines.pool import EnginePool
from igpo_megatron.types import Canary, Completion, SamplingRequest

POLICY = Path(__file__).parents[2] / "examples/quickstart/policy"
PROMPT = [1, 85, 96, 110, 64, 87, 2]
TOKENS = [(7 * number + number**2) % 600 + 20 for number in range(65)]
SCALE = 0.9


@pytest.fixture(scope="module")
def pool() -> Iterator[EnginePool]:
    engine = {"count": 2, "kv_cache_mib": 64, "max_num_seqs": 64, "health_interval_s": 0.5, "max_restarts": 2}
    config = build(
        {
            "model": {"path": str(POLICY), "dtype": "fp32"},
            "run": {"device": "cpu"},
            "rollout": {"max_context": 512, "engine": engine},
            "sync": {"bucket_mib": 1},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fleet, "_is_here", lambda self, member, node: member.number == 0)
        given_up = threading.Event()
        killer = threading.Thread(target=kill_a_starting_engine, args=(given_up,), daemon=True)
        killer.start()
        try:
            with EnginePool(config) as started:
                killer.join(timeout=0)
                assert not killer.is_alive(), "no engine was killed"
                yield started
        finally:
            given_up.set()


def kill_a_starting_engine(given_up: threading.Event) -> None:
    """SIGKILL the first vLLM process that appears below this one."""
    while not given_up.is_set():
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if "VLLM::EngineCore" in (process.name(), *process.cmdline()):
                    process.kill()
                    return
        time.sleep(0.1)


def served(scale: float) -> torch.Tensor:
    """What transformers says of TOKENS with the tied embedding scaled."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(scale)
        logits = model(torch.tensor([TOKENS])).logits[0, :-1]
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(TOKENS[1:])[:, None])[:, 0]


def test_an_engine_killed_in_a_rollout_comes_back_with_the_newest_weights_and_no_turn_is_lost(pool: EnginePool) -> None:
    expected = served(SCALE)
    assert float((served(1.0) - expected).abs().max()) > 0.05  # an engine with the folder's weights would show
    reader = HfReader(POLICY)
    weights = ((name, reader.get(name) * (SCALE if "embed_tokens" in name else 1.0)) for name in reader.names())
    metrics = pool.update_weights(weights, 1, Canary(tuple(TOKENS), tuple(expected.tolist()), max_gap=1e-3))
    assert metrics["sync/buckets"] > 2 and metrics["canary_gap"] < 1e-3 and metrics["engine_restarts"] == 1  # the one killed as it started

    keys = [str(number) for number in range(16)]

    def is_of_engine_1(key: str) -> bool:
        return zlib.crc32(key.encode()) % 2 == 1

    def ask(key: str, max_tokens: int) -> asyncio.Future[Completion]:
        request = SamplingRequest(PROMPT, max_tokens=max_tokens, temperature=1.0, seed=int(key), key=key)
        return asyncio.ensure_future(pool.generate(request))

    async def turns() -> list[Completion]:
        return await asyncio.gather(*(ask(key, 200) for key in keys))

    async def rollout() -> list[Completion]:
        work = [ask(key, 200) for key in keys]
        # First come, first served: when this short turn has ended, all turns of that engine are under way.
        await ask(next(filter(is_of_engine_1, keys)), 4)
        for process in psutil.Process(pool._fleet.members[1].process).children(recursive=True):
            signal_to(process, signal.SIGKILL)
        return await asyncio.gather(*work)

    calm = asyncio.run(turns())
    disturbed = asyncio.run(rollout())
    assert all(done.weight_version == 1 and done.finish in ("stop", "length") for done in disturbed)
    assert [done.token_ids for done in disturbed] == [done.token_ids for done in calm]  # the same seeds, whoever sampled them
    assert pool.metrics()["engine_restarts"] == 2
    deadline = time.monotonic() + PATIENCE_S
    while [member.state for member in pool._fleet.members] != [EngineState.HEALTHY] * 2:
        assert pool._fleet.problem is None, pool._fleet.problem
        assert time.monotonic() < deadline, [member.state for member in pool._fleet.members]
        time.sleep(0.1)
    for scores in pool.score_on_each(TOKENS):
        assert torch.allclose(torch.tensor(scores[1:]), expected, atol=1e-4)
    assert {done.weight_version for done in asyncio.run(turns())} == {1}

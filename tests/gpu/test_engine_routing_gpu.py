"""Routing replay with a real engine: vLLM's experts reach the tree's nodes, a file, and Megatron, which then sees what the engine saw.

pytest tests/gpu/test_engine_routing_gpu.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_ranks_beside_autograd
from test_engine_experts import POLICY, save_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from igpo_megatron.agent.rollouter import Rollouter
from igpo_megatron.algorithms.settings import Reward
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.config.load import build
from igpo_megatron.config.schema import Config
from igpo_megatron.data.corpus import Passage
from igpo_megatron.engines.pool import EnginePool
from igpo_megatron.observability.metrics import logprob_gap
from igpo_megatron.observability.rollout_dump import read_rollouts, write_rollouts
from igpo_megatron.policy.policy import Policy
from igpo_megatron.search.results import SearchResult, SearchStatus
from igpo_megatron.tools.search_tool import SearchTool
from igpo_megatron.training.step import routing_metrics, score_tokens
from igpo_megatron.types import Completion, Prompt, RolloutGroup, SamplingRequest, ToolCall

LAYERS, TOP_K = 2, 2
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: vLLM returns experts from a runner of Triton kernels")


class Talkative:
    """The engine, each of whose turns counts as ended: a random model never ends one."""

    def __init__(self, pool: EnginePool) -> None:
        self.pool = pool

    async def generate(self, request: SamplingRequest) -> Completion:
        return replace(await self.pool.generate(request), finish="stop")


class OnePassage:
    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        return [SearchResult(query, SearchStatus.OK, "here", (Passage("1", "Rome", "Rome is the capital."),)) for query in queries]

    async def close(self) -> None: ...


def roll_out(config: Config, monkeypatch: pytest.MonkeyPatch) -> list[RolloutGroup]:
    """Branching groups of trajectories of two turns, sampled by a real engine; whatever a turn says calls the search tool."""
    form = ChatFormat(AutoTokenizer.from_pretrained(POLICY), config.rollout, Reward())
    monkeypatch.setattr(form, "parse", lambda text: ToolCall("search", ("capital",)))
    prompts = [Prompt(name, f"What is the capital of {name}?", ("Rome",), "test") for name in ("Italy", "Latium")]
    with (
        EnginePool(config) as pool,
        Rollouter(Talkative(pool), {"search": SearchTool(OnePassage())}, form, config.rollout, seed=0) as rollouter,  # type: ignore[arg-type]
    ):
        return rollouter.start(rollouter.run(prompts, samples=4, salt=1, temperature=1.0, branch=True)).result()


def chosen_by_transformers(folder: Path, token_ids: list[int]) -> torch.Tensor:
    """[T, layers, top_k], each token's experts in order of their numbers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(torch.tensor([token_ids]), output_router_logits=True).router_logits
    return torch.stack([layer.topk(TOP_K).indices.sort().values for layer in logits], dim=1)


def gaps(policy: Policy, groups: list[RolloutGroup]) -> dict[str, float]:
    score_tokens(policy, groups)
    return logprob_gap(groups) | routing_metrics(policy, groups, step=1)


def test_the_trainer_sees_the_experts_that_the_engine_saw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_model(tmp_path / "model", 1.0)
    config = build(
        {
            "model": {"path": str(folder), "dtype": "fp32"},
            "run": {"device": "cuda"},
            "reward": {"gain": "none"},
            "advantage": {"name": "grpo"},
            "packing": {"row_tokens": 1024},
            "rollout": {
                "max_context": 512,
                "max_turns": 2,
                "max_tokens_per_turn": 24,
                "max_failed_fraction": 0.0,
                "routing_replay": True,
                "branching": {"name": "arpo", "initial_rollouts": 2, "base_probability": 1.0, "entropy_weight": 0.0, "entropy_tokens": 6},
                "engine": {"gpu_ids": [0], "gpu_memory_utilization": 0.3, "max_num_seqs": 16, "dtype": "bf16"},
            },
        }
    )
    groups = roll_out(config, monkeypatch)
    assert all(group.is_branched for group in groups)

    same = total = 0
    for group in groups:
        for trajectory in group.trajectories:
            nodes = [group.nodes[index] for index in trajectory.path]
            recorded = [experts for node in nodes for experts in node.experts]
            # Everything is known but the last sampled token, which nothing was computed behind.
            assert [place for place, experts in enumerate(recorded) if experts is None] == [len(recorded) - 1]
            found = torch.tensor([list(experts) for experts in recorded[:-1] if experts is not None]).view(-1, LAYERS, TOP_K).sort().values
            expected = chosen_by_transformers(folder, group.context(trajectory.path[-1]))[:-1]
            same += int((found == expected).all(-1).sum())
            total += len(found) * LAYERS
    # Near ties fall differently in bf16; experts that belong to other tokens would agree in a sixth of all places.
    assert 0.9 < same / total < 1.0

    write_rollouts(tmp_path / "step.parquet", 1, groups)
    ((_, read),) = read_rollouts(tmp_path / "step.parquet")
    assert read == groups
    on_cpu = config.model_copy(update={"run": config.run.model_copy(update={"device": "cpu"})})
    (measured,) = run_ranks_beside_autograd(gaps, on_cpu, read)
    assert measured["routed_tokens"] > 0.9
    assert measured["logprob_gap_mean"] < 0.5 * measured["logprob_gap_mean_free"]
    assert measured["logprob_gap_max"] < 0.5 * measured["logprob_gap_max_free"]

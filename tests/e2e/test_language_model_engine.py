"""A real language model of 135 M parameters in vLLM: log-probs, greedy tokens and probe scores, against transformers and the trainer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from groups import load_hf
from language_model import BOUNDS, HEAD_DIM, ROPE_BASE, conversations, gap_between, language_model
from test_layouts import reference_logprobs

from igpo_megatron.chat.tokenizer import load_tokenizer
from igpo_megatron.config.load import build
from igpo_megatron.config.schema import Config
from igpo_megatron.doctor import probes
from igpo_megatron.engines import factory
from igpo_megatron.engines.pool import EnginePool
from igpo_megatron.policy.weight_sync import canary_group
from igpo_megatron.types import Canary, Node, RolloutGroup, SamplingRequest, SyncError
from igpo_megatron.weights.send import check_canary
from igpo_megatron.weights.settings import MAX_GAP, Sync

NEW_TOKENS = 64
STORY = "<|im_start|>user\nTell me a long story about a lighthouse.<|im_end|>\n<|im_start|>assistant\n"

Scores = Sequence[Sequence[float]]


def settings(folder: Path, dtype: str) -> Config:
    engine = {"kv_cache_mib": 64, "max_num_seqs": 16, "max_restarts": 0}
    return build(
        {
            "model": {"path": str(folder), "dtype": dtype},
            "run": {"device": "cpu", "threads": 1},
            "rollout": {"max_context": 512, "engine": engine},
        }
    )


@pytest.fixture(scope="module")
def folder() -> Path:
    return language_model()


@pytest.fixture(scope="module")
def expected(folder: Path) -> Scores:
    """By transformers, in fp32."""
    return reference_logprobs(folder, conversations(folder))


@pytest.fixture(scope="module", params=list(BOUNDS))
def served(folder: Path, request: pytest.FixtureRequest) -> Iterator[tuple[str, EnginePool]]:
    """(dtype, an engine of it)."""
    with EnginePool(settings(folder, request.param)) as pool:
        yield request.param, pool


def scores(pool: EnginePool, folder: Path) -> Scores:
    """Of each action, and of the scored tokens of each probe, after its context; empty for other nodes."""

    async def of(group: RolloutGroup, node: Node) -> Sequence[float]:
        if node.parent is None or node.kind not in ("action", "probe"):
            return []
        context, (first, _) = group.context(node.parent), node.scored or (0, 0)
        return (await pool.score_probe(context + node.token_ids, len(context) + first, key="q")).logprobs

    async def of_all() -> Scores:
        return await asyncio.gather(*(of(group, node) for group in conversations(folder) for node in group.nodes))

    return asyncio.run(of_all())


def test_log_probs_are_those_of_transformers(served: tuple[str, EnginePool], folder: Path, expected: Scores) -> None:
    dtype, pool = served
    gap = gap_between(scores(pool, folder), expected)
    assert gap.within(BOUNDS[dtype]), gap
    assert dtype == "fp32" or gap.mean > 10 * BOUNDS["fp32"].mean, "it did not run in bf16"


def test_every_scorer_gives_probes_the_same_log_probs(
    served: tuple[str, EnginePool], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`igpo doctor probes`, with the engine that runs already."""
    dtype, pool = served
    monkeypatch.setattr(factory, "open_engines", lambda config: nullcontext(pool))
    results = probes.compare(settings(folder, dtype))
    assert [result.scorer for result in results] == ["sequential", "batched", "fold", "engine"]
    assert all(result.gap <= result.bound for result in results), results


def greedy(model: torch.nn.Module, prompt: list[int], new_tokens: int) -> list[int]:
    """By transformers, which ends where a turn ends."""
    return model.generate(torch.tensor([prompt]), max_new_tokens=new_tokens, do_sample=False)[0, len(prompt) :].tolist()


def test_greedy_tokens_are_those_of_transformers_and_not_those_of_another_rope(served: tuple[str, EnginePool], folder: Path) -> None:
    dtype, pool = served
    if dtype == "bf16":
        pytest.skip("where two tokens are nearly as likely, rounding chooses")
    prompt = load_tokenizer(folder)(STORY)["input_ids"]
    done = asyncio.run(pool.generate(SamplingRequest(prompt, max_tokens=NEW_TOKENS, temperature=0.0, seed=0, key="q")))
    model = load_hf(folder)
    assert len(done.token_ids) == NEW_TOKENS and done.token_ids == greedy(model, prompt, NEW_TOKENS)
    model.model.rotary_emb.inv_freq = (ROPE_BASE / 10) ** -(torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    assert done.token_ids[:16] != greedy(model, prompt, 16)


def a_matrix_lost(model: torch.nn.Module) -> None:
    model.model.layers[15].mlp.down_proj.weight.data.zero_()


def a_layer_in_place_of_the_next(model: torch.nn.Module) -> None:
    model.model.layers[16].load_state_dict(model.model.layers[15].state_dict())


@pytest.mark.parametrize("mistake", [a_matrix_lost, a_layer_in_place_of_the_next])
def test_the_canary_passes_in_either_dtype_and_refuses_a_wrong_model(
    served: tuple[str, EnginePool], folder: Path, mistake: Callable[[torch.nn.Module], None]
) -> None:
    dtype, pool = served
    model = load_hf(folder)
    tokens = canary_group(model.config.vocab_size, Sync().canary_tokens, seed=1).context(1)
    said = asyncio.run(pool.score_probe(tokens, 1, key="canary")).logprobs

    def expected() -> Canary:
        with torch.no_grad():
            logprobs = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(tokens[1:]).unsqueeze(1))
        return Canary(tuple(tokens), tuple(logprobs.flatten().tolist()), MAX_GAP[dtype], rounded=dtype == "bf16")

    assert check_canary(expected(), said, version=1, engine=0) < MAX_GAP[dtype]
    mistake(model)
    with pytest.raises(SyncError, match=r"on the canary, more than sync\.max_gap"):
        check_canary(expected(), said, version=1, engine=0)

"""A checkpoint that the version before has written resumes at any layout: the same weights, optimizer, questions and successes."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import pytest
from conftest import run_ranks
from groups import random_groups
from previous_version import unpack_stopped_run
from test_checkpoint import losses
from test_layouts import with_off_policy_logprobs

from igpo_megatron.algorithms.replay import SuccessBuffer
from igpo_megatron.config.load import load
from igpo_megatron.data.prompts import PromptStream
from igpo_megatron.policy import checkpoint, checkpoint_sums
from igpo_megatron.policy.policy import Policy
from igpo_megatron.policy.weight_sync import named_weights
from igpo_megatron.types import RolloutGroup, Status

EMBEDDING = "model.embed_tokens.weight"


def resume(policy: Policy, folder: Path, groups: list[RolloutGroup]) -> dict[str, Any]:
    """What there is behind the load (weights on the main rank only), and losses and gradient norms of the next two steps."""
    step, state = checkpoint.load(policy, folder)
    weights = {name: tensor.contiguous() for name, tensor in named_weights(policy)}
    whole = 0
    for name in sorted(weights):
        whole = zlib.crc32(weights[name].numpy().tobytes(), whole)
    return {
        "steps": (step, policy.steps_taken),
        "state": state,
        "tensors": len(weights),
        "embedding": weights[EMBEDDING][0, :3].tolist() if weights else [],
        "crc": whole,
        "next": losses(policy, groups, 2),
    }


@pytest.mark.parametrize("layout", [[], ["parallel.tensor=2"], ["parallel.pipeline=2"], ["parallel.data=2"]])
def test_a_checkpoint_of_then_resumes_at_any_layout(tmp_path: Path, layout: list[str]) -> None:
    folder = unpack_stopped_run(tmp_path)
    config = load(folder / "config.yaml", [f"model.path={folder / 'policy'}", "parallel.timeout_s=300", *layout])
    (saved,) = checkpoint.complete(folder / "runs/stopped/checkpoints")
    assert checkpoint_sums.damage(saved) == []
    found = run_ranks(resume, config, saved, with_off_policy_logprobs(random_groups(seed=6, probes=False)))[0]
    assert found["steps"] == (2, 2)
    # What the code of then said of them, with one rank; the second pair shows a wrong state of the optimizer.
    assert (found["tensors"], found["crc"]) == (26, 2873756324), "a weight differs in some bit"
    assert found["embedding"] == pytest.approx([-0.0387809575, 0.2081817687, 0.0158733577], abs=1e-9)
    assert found["next"][0] == pytest.approx((0.1745384503, 0.1469302766), rel=2e-5)
    assert found["next"][1] == pytest.approx((0.1590229571, 0.0652755409), rel=2e-5)
    assert found["state"].keys() == {"prompts", "successes"}
    stream = PromptStream([folder / "questions.parquet"], seed=config.run.seed, shuffle=config.data.shuffle, balance=config.data.balance)
    stream.load_state(found["state"]["prompts"])
    assert [stream.question(ordinal).id for ordinal in stream.draw(2)] == ["2wiki_9cb47bba0bda11eba7f7acde48001122", "Bamboogle_42"]
    kept = SuccessBuffer(config.rollout.replay_successes, config.rollout.success_above)
    kept.load_state(found["state"]["successes"])
    assert list(kept.successes) == ["Bamboogle_101", "popqa_3868066", "musique_2hop__252311_366220", "tq_dpql_3227"]
    last = kept.successes["tq_dpql_3227"]
    assert last.prompt.answers == ("hawley", "hawley disambiguation") and last.trajectories[0].status is Status.TRUNCATED_TOKENS
    assert last.nodes[1].token_ids == [90, 222, 529, 143, 267, 589, 618, 150, 310, 250, 27, 549, 5, 315, 497, 76]
    assert last.nodes[1].behavior_logprobs[:2] == [-6.379087448120117, -6.503922939300537]

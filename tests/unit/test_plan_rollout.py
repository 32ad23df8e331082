"""The planner's rollouts and the simulation of asynchronous runs, at the limits where the answer is known."""

from dataclasses import replace

import pytest

from igpo_megatron.plan.asynchronous import Setup, Simulation
from igpo_megatron.plan.rollout_time import simulate
from igpo_megatron.plan.types import Workload
from igpo_megatron.plan.workload import Draw, draw, rows_of


def constant(rollout: float, samples: int = 4):
    """Batches whose trajectories sample `rollout` tokens in one turn and call no tool."""
    batch = [Draw(1, (round(rollout),), (), ())] * samples
    return lambda step: batch


def one_token_a_second(batch: int) -> float:
    return 1.0


@pytest.mark.parametrize("rollout", [3, 10, 17])
@pytest.mark.parametrize("train", [4.0, 7.0, 10.0])
@pytest.mark.parametrize("staleness", [0, 1, 2, 5])
def test_with_constant_durations_a_step_takes_what_the_formula_says(rollout, train, staleness):
    steps = 12 * (staleness + 1)
    setup = Setup(constant(rollout), 2, 100, one_token_a_second, train, 0.0, staleness, steps, warm_up=steps // 2)
    outcome = Simulation(setup).run()
    expected = max(train, (rollout + train) / (staleness + 1))
    assert outcome.step == pytest.approx(expected, rel=1e-9)
    assert outcome.trainer_use == pytest.approx(train / expected, rel=1e-9)
    assert outcome.largest_staleness <= staleness


def test_a_synchronous_run_is_never_stale_and_waits_for_its_weights():
    setup = Setup(constant(10), 1, 100, one_token_a_second, 4.0, 2.5, 0, 9, warm_up=3)
    outcome = Simulation(setup).run()
    assert outcome.step == pytest.approx(10 + 4 + 2.5)
    assert (outcome.staleness, outcome.largest_staleness) == (0.0, 0)
    assert outcome.engine_use == pytest.approx(10 / 16.5)


def test_engines_that_are_full_make_a_batch_wait():
    setup = Setup(constant(10, samples=4), 1, 2, one_token_a_second, 4.0, 0.0, 0, 6, warm_up=2)
    assert Simulation(setup).run().step == pytest.approx(2 * 10 + 4)


def test_the_clock_of_tokens_slows_down_for_all_that_decode():
    pace = float  # B trajectories take B seconds for a token each

    def seconds(*batch):
        return simulate(batch, 10, pace)[-1]

    assert seconds(Draw(1, (10,), (), ())) == pytest.approx(10)
    # Ten tokens of both together take 20 s; the longer one's other ten are alone.
    assert seconds(Draw(1, (10,), (), ()), Draw(1, (20,), (), ())) == pytest.approx(30)
    # While the first waits 5 s for its tool the second decodes alone: 2 x 4 s, 5 s, then 2 x 2 s, then 1 s of the first's second turn.
    assert seconds(Draw(1, (4, 3), (1,), (5.0,)), Draw(1, (11,), (), ())) == pytest.approx(8 + 5 + 4 + 1)


def test_what_waits_for_a_tool_keeps_its_place():
    ends = simulate([Draw(1, (2, 2), (1,), (100.0,)), Draw(1, (5,), (), ())], 1, one_token_a_second)
    assert ends[-1] == pytest.approx(2 + 100 + 2 + 5)


def test_the_drawn_trajectories_have_the_workloads_means_and_never_pass_its_limit():
    workload = Workload(prompts=64, max_turns=1000, turns=3.0)
    trajectories = draw(workload)
    assert trajectories == draw(replace(workload)) and trajectories != draw(replace(workload, seed=1))
    turns = [len(one.sampled) for one in trajectories]
    assert sum(turns) / len(turns) == pytest.approx(3.0, rel=0.1)
    lengths = [length for one in trajectories for length in one.sampled]
    assert sum(lengths) / len(lengths) == pytest.approx(workload.turn_tokens, rel=0.1)
    short = draw(replace(workload, max_context=2000))
    assert max(one.tokens for one in short) <= 2000


def test_rows_hold_every_token_once_and_share_prompts_within_a_group():
    workload = Workload(prompts=4, samples=3)
    rows = rows_of(workload, 10**6)
    trajectories = draw(workload)
    own = sum(one.tokens - one.prompt for one in trajectories)
    assert len(rows) == 1 and rows[0].tokens == own + 4 * workload.prompt_tokens
    assert rows[0].targets == sum(sum(one.sampled) for one in trajectories)
    cut = rows_of(workload, 1)
    assert len(cut) == 12 and sum(row.tokens for row in cut) == sum(one.tokens for one in trajectories)

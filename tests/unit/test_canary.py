"""The canary after a weight sync: an engine that says something else, or something that is no number, stops the run."""

import math

import pytest

from igpo_megatron.types import Canary, SyncError
from igpo_megatron.weights.send import check_canary


def canary(*logprobs):
    return Canary((5, 6, 7), logprobs, max_gap=0.5)


def test_the_largest_difference_is_returned():
    assert check_canary(canary(-1.0, -2.0), [-1.25, -2.0], version=3, engine=0) == 0.25


@pytest.mark.parametrize("served", [[-1.0, -2.75], [-1.1, math.nan], [math.nan, -2.0], [-1.0, -math.inf]])
def test_an_engine_that_is_off_anywhere_is_named(served):
    with pytest.raises(SyncError, match="engine 1 does not serve the policy's weights: after sync 3"):
        check_canary(canary(-1.0, -2.0), served, version=3, engine=1)


@pytest.mark.parametrize("served", [[-1.25, -2.0, -9.0], [-9.0, -2.25, -3.0]])
def test_in_bf16_the_median_is_judged_because_rounding_moves_single_tokens_far(served):
    rounded = Canary((5, 6, 7, 8), (-1.0, -2.0, -3.0), max_gap=0.5, rounded=True)
    assert check_canary(rounded, served, version=3, engine=0) == 0.25


@pytest.mark.parametrize("served", [[-1.0, -2.75, -3.75], [-1.75, -1.25, -3.0], [-1.0, -2.0, math.nan], [-math.inf, -2.0, -3.0]])
def test_in_bf16_an_engine_that_is_off_at_most_tokens_is_named(served):
    rounded = Canary((5, 6, 7, 8), (-1.0, -2.0, -3.0), max_gap=0.5, rounded=True)
    with pytest.raises(SyncError, match=r"engine 1 does not serve .* \(median\) on the canary"):
        check_canary(rounded, served, version=3, engine=1)


def test_a_policy_that_is_no_number_itself_does_not_pass():
    with pytest.raises(SyncError, match="engine 0"):
        check_canary(canary(-1.0, math.nan), [-1.0, -2.0], version=1, engine=0)

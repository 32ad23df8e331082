"""`igpo doctor probes`: what counts as agreement, and what its exit code says. The scorers themselves are compared in tests/distributed."""

import math

import pytest

from igpo_megatron.config.load import build
from igpo_megatron.doctor import probes as probe_check
from igpo_megatron.doctor.probes import TRAINER_BOUND, Result, engine_bound, gap, probe_logprobs, relative_gap, synthetic_group


def test_a_gap_is_the_largest_difference_and_missing_or_invalid_values_are_infinitely_far():
    assert gap([-1.0, -2.5], [-1.0, -2.0]) == 0.5
    assert gap([-1.0], [-1.0, -2.0]) == gap([], []) == gap([math.nan], [-1.0]) == gap([-1.0], [math.nan]) == math.inf


def test_a_relative_gap_shrinks_only_differences_of_log_probs_beyond_a_nat():
    assert relative_gap([-0.5], [-0.25]) == 0.25
    assert relative_gap([-22.0], [-20.0]) == pytest.approx(0.1)
    assert relative_gap([-1.0], [-1.0, -2.0]) == relative_gap([math.nan], [-20.0]) == math.inf
    # A rounding of fp32 at -20 agrees, a logit rounded to bf16 there does not.
    assert relative_gap([-20.0 - 2e-5], [-20.0]) < TRAINER_BOUND["fp32"] < relative_gap([-20.0 - 0.06], [-20.0])


def test_an_engine_in_bf16_may_differ_more_but_never_by_as_much_as_the_log_prob():
    assert engine_bound("fp32", "fp32") == 1e-3
    assert relative_gap([-15.5], [-15.0]) < engine_bound("fp32", "bf16") == engine_bound("bf16", "bf16") < relative_gap([-12.0], [-15.0])


def test_a_synthetic_group_has_a_probe_before_every_turn_and_one_after_the_last():
    group = synthetic_group(turns=3, prompt_tokens=5, turn_tokens=9, probe_tokens=8, vocab_size=50, seed=1)
    probes = [node for node in group.nodes if node.kind == "probe"]
    assert [len(group.context(probe.parent)) for probe in probes] == [5, 14, 23, 32]
    assert all(probe.scored == (4, 8) and len(probe.token_ids) == 8 for probe in probes)
    for number, probe in enumerate(probes):
        probe.old_logprobs = [-float(number)] * 4
    assert probe_logprobs([group]) == [0.0] * 4 + [-1.0] * 4 + [-2.0] * 4 + [-3.0] * 4


@pytest.mark.parametrize(("found", "code"), [(5e-6, 0), (2e-5, 1), (math.nan, 1), (math.inf, 1)])
def test_a_scorer_beyond_its_bound_is_named_and_fails_the_command(found, code, monkeypatch, capsys):
    results = [Result("sequential", 10, 0.1, 0.0, 1e-5), Result("fold", 10, 0.1, found, 1e-5)]
    monkeypatch.setattr(probe_check, "compare", lambda config, say: results)
    assert probe_check.main(build({"model": {"path": "somewhere"}})) == code
    assert ("differs" in capsys.readouterr().out) == bool(code)

"""Functions of the user's own in place of a reward, an advantage or a loss: how they are named, and what is refused."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from igpo_megatron.algorithms.advantages.base import HookedAdvantage
from igpo_megatron.algorithms.advantages.registry import set_advantages
from igpo_megatron.algorithms.hooks import check_hooks, tiny_group
from igpo_megatron.algorithms.losses.base import HookedLoss
from igpo_megatron.algorithms.losses.registry import Ppo, objective
from igpo_megatron.algorithms.losses.tiny import tiny_tokens
from igpo_megatron.algorithms.rewards import score
from igpo_megatron.cli import app
from igpo_megatron.config.load import ConfigError, build, explain, load, to_json
from igpo_megatron.config.schema import Config
from igpo_megatron.types import Status, StepCounts, UserError

MODULE = '''
import torch

def centred(group, config, progress):
    """Reward minus the group's mean, times an option."""
    mean = sum(end.reward for end in group.trained) / len(group.trained)
    for end in group.trained:
        end.turn_advantages = [config.options.get("scale", 1.0) * (end.reward - mean)] * len(end.turn_advantages)

def halved(groups):
    for group in groups:
        for end in group.trained:
            end.turn_advantages = [value / 2 for value in end.turn_advantages]

def first_gain(group, config, progress):
    for end in group.trained:
        end.turn_advantages = [end.gains[0] or 0.0] * len(end.turn_advantages)

def one_too_few(group, config, progress):
    for end in group.trained:
        end.turn_advantages = end.turn_advantages[1:]

def not_a_number(group, config, progress):
    for end in group.trained:
        end.turn_advantages = [float("nan")] * len(end.turn_advantages)

def of_two(group, config): ...

def policy_gradient(tokens, counts, config):
    positive, negative = tokens.signed.unbind(-1)
    return -((positive - negative) * tokens.logprobs).sum(), {"surprise": -tokens.logprobs.detach()}

def per_token(tokens, counts, config):
    return tokens.logprobs, {}

def detached(tokens, counts, config):
    return tokens.logprobs.detach().sum(), {}

def endless(tokens, counts, config):
    return (tokens.logprobs * float("inf")).sum(), {}

def summed_metric(tokens, counts, config):
    return tokens.logprobs.sum(), {"tokens_seen": torch.tensor(4.0)}

def alone(tokens, counts, config):
    return tokens.logprobs.sum()

def needs_entropies(tokens, counts, config):
    return (tokens.logprobs * counts.entropy.mean).sum(), {}

def length(answer, truths):
    return 1.0 / (1 + abs(len(answer) - len(truths[0])))

def verdict(answer, truths):
    return "right"

NOT_A_FUNCTION = 3
'''


@pytest.fixture(autouse=True)
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/__init__.py").touch()
    (tmp_path / "my_package/mine.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in [name for name in sys.modules if name.startswith("my_package")]:
        del sys.modules[name]


def config_of(*overrides: str) -> Config:
    return build({"model": {"path": "m"}}, overrides)


def checked(*overrides: str) -> None:
    config = config_of(*overrides)
    check_hooks(config.reward, config.advantage, config.loss)


# ---- settings


def test_hooks_are_named_in_a_file_or_on_the_command_line_and_come_back_from_a_run_folder(tmp_path: Path) -> None:
    values = {"model": {"path": "m"}, "advantage": {"name": "my_package.mine:centred", "options": {"scale": 2.0}}}
    (tmp_path / "run.yaml").write_text(json.dumps(values), encoding="utf-8")
    overrides = ["loss.name=my_package.mine:policy_gradient", "loss.kl_coef=0", "reward.outcome=my_package.mine:length"]
    config = load(tmp_path / "run.yaml", overrides)
    assert isinstance(config.advantage, HookedAdvantage) and config.advantage.options == {"scale": 2.0}
    assert isinstance(config.loss, HookedLoss) and config.loss.kl_coef == 0 and config.reward.outcome == "my_package.mine:length"
    assert build(json.loads(to_json(config))) == config
    again = build(json.loads(to_json(config)), ["advantage.options.scale=3", "loss.name=ppo"])
    assert isinstance(again.advantage, HookedAdvantage) and again.advantage.options == {"scale": 3} and again.loss == Ppo()


def test_names_that_are_neither_ours_nor_a_hook_get_the_nearest_of_ours() -> None:
    for override, found in {
        "advantage.name=grop": "did you mean 'grpo'?",
        "loss.name=pppo": "did you mean 'ppo'?",
        "reward.outcome=em_squat": "did you mean 'em_squad'?",
        "advantage.name=my-package:centred": "advantage.name='my-package:centred': expected one of igpo",
    }.items():
        with pytest.raises(ConfigError) as error:
            config_of(override)
        assert found in str(error.value)


def test_keys_of_a_hook_are_checked_and_explained() -> None:
    with pytest.raises(ConfigError, match=r"advantage\.need_probes: unknown key; did you mean 'advantage\.needs_probes'\?"):
        config_of("advantage.name=a.b:c", "advantage.need_probes=true")
    with pytest.raises(ConfigError, match=r"loss\.looks_at='far': expected one of token, row, trajectory"):
        config_of("loss.name=a.b:c", "loss.looks_at=far")
    assert "advantage.name=package.module:function" in explain("advantage") and "package.module:function" in explain("loss")
    assert "package.module:function" in explain("reward.outcome") and "options" in explain("loss")


def test_a_hook_says_what_the_run_prepares_for_it() -> None:
    advantage = config_of("advantage.name=a.b:c", "advantage.needs_probes=true").advantage
    assert advantage.needs_probes and not advantage.needs_greedy and advantage.compares_samples
    loss = config_of("loss.name=a.b:c", "loss.looks_at=trajectory", "loss.old_entropies=true").loss
    assert loss.learns_from_rewards and loss.judges_trajectories == "loss.name=a.b:c" and loss.entropy_share == 0.2
    assert config_of("loss.name=a.b:c", "loss.looks_at=row").loss.looks_beyond_a_token == "loss.looks_at=row"
    assert config_of("loss.name=a.b:c").loss.looks_beyond_a_token is None


# ---- what they do


def test_an_advantage_of_ones_own_is_given_zeros_its_settings_and_the_whole_batch() -> None:
    """Rewards 1 and 0, mean 1/2, scale 2, halved over the batch."""
    group = tiny_group(with_gains=False)
    group.trajectories[1].status = Status.FINISHED
    overrides = ("advantage.options.scale=2", "advantage.over_batch=my_package.mine:halved")
    set_advantages([group], config_of("advantage.name=my_package.mine:centred", *overrides).advantage, 0.0)
    assert [end.turn_advantages for end in group.trajectories] == [[0.5, 0.5], [-0.5]]


def test_a_loss_of_ones_own_gets_kl_entropy_mismatch_and_the_division_of_ours() -> None:
    """By hand: -sum(A w logprob) with w of `truncate`, plus 0.1 x weighted k3, less 0.01 x weighted entropy, over 2 trajectories."""
    shared = ("loss.kl_coef=0.1", "loss.entropy_coef=0.01", "loss.mismatch=truncate")
    loss = config_of("loss.name=my_package.mine:policy_gradient", *shared).loss
    tokens = tiny_tokens()
    value, metrics = objective(tokens, StepCounts(4, 2), loss)
    assert tokens.advantages is not None and tokens.entropy is not None and tokens.ref_logprobs is not None
    w = torch.tensor(-0.01).exp()
    signed = (tokens.advantages[:, 0] - tokens.advantages[:, 1]) * w
    d = tokens.ref_logprobs - tokens.logprobs
    k3 = d.exp() - d - 1
    expected = (-(signed * tokens.logprobs).sum() + 0.1 * (0.5 * k3).sum() - 0.01 * (0.5 * tokens.entropy).sum()) / 2
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert metrics["surprise"].item() == pytest.approx(-tokens.logprobs.sum().item()) and {"entropy", "kl_ref", "tokens"} <= set(metrics)


def test_a_reward_of_ones_own_is_the_outcome_and_stands_beside_f1_under_its_name() -> None:
    group = tiny_group(with_gains=False)
    for node in (node for node in group.nodes if node.kind == "action"):
        node.text = "<think>x</think>\n<answer>Paris</answer>"
    name = "my_package.mine:length"
    score(group, config_of(f"reward.outcome={name}"))
    assert (
        group.trajectories[1].reward == group.trajectories[1].reward_parts[name] == 0.5 and group.trajectories[1].reward_parts["f1"] == 0.0
    )


# ---- what is refused at the start


def test_good_hooks_pass() -> None:
    checked()
    checked("advantage.name=my_package.mine:centred", "advantage.over_batch=my_package.mine:halved")
    checked("advantage.name=my_package.mine:first_gain", "advantage.needs_probes=true")
    checked("loss.name=my_package.mine:policy_gradient", "reward.outcome=my_package.mine:length")
    checked("loss.name=my_package.mine:needs_entropies", "loss.old_entropies=true")
    checked("advantage.name=my_package.mine:one_too_few", "loss.name=sft")  # which never calls it


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("advantage.name=no_package.mine:f",), r"advantage\.name=no_package\.mine:f cannot be imported \(ModuleNotFoundError"),
        (("advantage.name=my_package.mine:centered",), r"cannot be imported \(AttributeError: .*has no attribute 'centered'"),
        (("loss.name=my_package.mine:NOT_A_FUNCTION",), r"loss\.name=my_package\.mine:NOT_A_FUNCTION is a int; expected a function"),
        (
            ("advantage.name=my_package.mine:of_two",),
            r"\(group, config\): too many .*expected a function of \(group, config, progress\)",
        ),
        (("advantage.name=my_package.mine:centred", "advantage.over_batch=my_package.mine:of_two"), r"advantage\.over_batch=.*\(groups\)"),
        (("advantage.name=my_package.mine:one_too_few",), r"turn_advantages=\[0\.0\] on trajectory 0, which has 2 turns; expected a list"),
        (("advantage.name=my_package.mine:not_a_number",), r"turn_advantages=\[nan, nan\] on trajectory 0"),
        (("advantage.name=my_package.mine:first_gain",), r"raised IndexError when it was tried on a group of two trajectories"),
        (("loss.name=my_package.mine:per_token",), r"returned tensor.*as its sum over tokens; expected a tensor of one finite number"),
        (("loss.name=my_package.mine:endless",), r"tensor\(-inf.*expected a tensor of one finite number"),
        (("loss.name=my_package.mine:detached",), r"returned a sum without a gradient; expected one that depends on tokens\.logprobs"),
        (("loss.name=my_package.mine:summed_metric",), r"returned \(\), requires_grad=False as its metric 'tokens_seen'.*: \(4,\)"),
        (("loss.name=my_package.mine:alone",), r"returned a Tensor; expected a pair"),
        (("loss.name=my_package.mine:needs_entropies",), r"raised AttributeError when it was tried on four tokens"),
        (("loss.name=my_package.mine:length",), r"signature \(answer, truths\).*expected a function of \(tokens, counts, config\)"),
        (("reward.outcome=my_package.mine:verdict",), r"returned 'right' for answer 'Rome'.*; expected a finite number"),
        (("reward.outcome=my_package.mine:centred",), r"expected a function of \(answer, truths\)"),
    ],
)
def test_a_hook_that_cannot_be_used_is_told_before_anything_starts(overrides: tuple[str, ...], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        checked(*overrides)


def test_the_command_refuses_it_before_a_rank_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from igpo_megatron import cli

    monkeypatch.setattr("igpo_megatron.training.checks.check", lambda *_, **__: [])
    monkeypatch.setattr(cli, "_torchrun", lambda *_: pytest.fail("the ranks were started"))
    (tmp_path / "run.yaml").write_text(f"model: {{path: m}}\nrun: {{folder: {tmp_path}/runs, device: cpu}}\n", encoding="utf-8")
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "advantage.name=my_package.mine:one_too_few"])
    assert result.exit_code == 2 and "expected a list with one finite number per turn" in result.output

"""Every example configuration loads, the published one fits its model, and the scripts print the commands they say they run."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from igpo_megatron.algorithms.advantages.turn import Igpo
from igpo_megatron.algorithms.losses.registry import Ppo
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.chat.tokenizer import load_tokenizer
from igpo_megatron.config.load import load
from igpo_megatron.training.checks import check

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CONFIGS = sorted(EXAMPLES.rglob("*.yaml"))
SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch")])
QWEN_7B = {"num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28, "max_position_embeddings": 32768}

SHAPES = {
    "qwen2.5_3b": {"num_attention_heads": 16, "num_key_value_heads": 2, "num_hidden_layers": 36, "max_position_embeddings": 32768},
    "qwen2.5_7b": QWEN_7B,
    "qwen3_8b": {"num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 36, "max_position_embeddings": 40960},
    "qwen3_14b": {"num_attention_heads": 40, "num_key_value_heads": 8, "num_hidden_layers": 40, "max_position_embeddings": 40960},
}
"""Heads, layers and context of the recipes' models, by the end of the recipe's name."""


def dry_run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script with DRY_RUN and nothing else of this environment that it reads."""
    keep = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = ["bash", str(EXAMPLES / script), *arguments]
    env = {**keep, "DRY_RUN": "1", **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_example_configuration_loads(path):
    assert load(path).run.name


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_probe_of_every_example_is_an_answer_of_its_protocol(path):
    config = load(path)
    tokenizer = load_tokenizer(EXAMPLES / "quickstart/policy")
    if config.advantage.needs_probes and config.loss.learns_from_rewards:
        assert ChatFormat(tokenizer, config.rollout, config.reward).probe_problem() is None


def test_the_published_settings_are_the_papers():
    config = load(EXAMPLES / "igpo_qwen2.5_7b.yaml")
    rollout = config.rollout
    assert (rollout.prompts_per_step, rollout.samples_per_prompt, rollout.max_turns) == (32, 16, 10)
    assert (rollout.max_context, rollout.max_tokens_per_turn, rollout.temperature) == (32768, 2000, 1.0)
    assert config.advantage == Igpo(normalise="separate", gamma=1.0, divide_by_std=True)
    assert config.loss == Ppo(clip_low=0.2, clip_high=0.2, dual_clip=3.0, kl_coef=0.001, entropy_coef=0.0, aggregation="sequence_mean")
    assert (config.optim.lr, config.optim.decay, config.optim.minibatches) == (1e-6, "constant", 1)
    assert (config.reward.outcome, config.reward.format_penalty, config.reward.gain) == ("f1", -2.0, "log_prob_diff")


@pytest.mark.parametrize(
    ("name", "batch", "samples", "minibatches", "context", "turns", "steps"),
    [
        ("igpo_qwen2.5_3b", 32, 16, 1, 32768, 10, 100),
        ("grpo_qwen2.5_7b", 32, 16, 1, 32768, 10, 100),
        ("search_r1_qwen2.5_7b", 512, 5, 2, 6048, 5, 1005),
        ("arpo_qwen2.5_7b", 128, 16, 8, 1536 + 4096, 4, 156),
        ("arpo_qwen3_8b", 128, 16, 8, 2000 + 10000, 7, 40),
        ("arpo_qwen3_14b", 64, 12, 8, 2000 + 6192, 7, 80),
        ("aepo_qwen2.5_7b", 128, 16, 8, 1536 + 4096, 7, 156),
        ("aepo_qwen3_14b", 64, 12, 8, 2000 + 6192, 7, 80),
    ],
)
def test_every_recipe_has_its_published_numbers_and_fits_its_model(
    name, batch, samples, minibatches, context, turns, steps, tmp_path, monkeypatch
):
    monkeypatch.setenv("BRIGHTDATA_API_KEY", "none")
    (tmp_path / "config.json").write_text(json.dumps(SHAPES[name.split("_", 1)[1].removeprefix("r1_")]), encoding="utf-8")
    for file in ("model.safetensors", "tokenizer.json"):
        (tmp_path / file).touch()
    config = load(EXAMPLES / f"{name}.yaml", [f"model.path={tmp_path}"])
    rollout = config.rollout
    assert (rollout.prompts_per_step, rollout.samples_per_prompt, config.optim.minibatches) == (batch, samples, minibatches)
    assert (rollout.max_context, rollout.max_turns, config.run.steps, config.optim.lr) == (context, turns, steps, 1e-6)
    if rollout.branching.name != "none":
        branching = rollout.branching
        assert (branching.name, config.loss.name) in (("arpo", "ppo"), ("aepo", "aepo")) and config.advantage.name == "arpo"
        assert (branching.initial_rollouts, branching.beam) == (samples // 2, 2)
        assert (branching.base_probability, branching.entropy_weight) == (0.5, 0.2)
        assert (config.reward.outcome, config.reward.tool_bonus, config.reward.format_penalty) == ("f1_multiset", 0.1, -1.0)
    if name.startswith("search_r1"):
        assert (config.reward.outcome, config.optim.warmup_steps) == ("em_squad", round(0.285 * steps)), "both in the units of its code"
    assert (rollout.branching.name == "none") == (name.split("_")[0] not in ("arpo", "aepo"))
    assert all("no such file" in problem for problem in check(config, world_size=4))


def test_the_published_layout_fits_its_model_and_lacks_only_files_of_the_user(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B), encoding="utf-8")
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    config = load(EXAMPLES / "igpo_qwen2.5_7b.yaml", [f"model.path={tmp_path}"])
    assert check(config, world_size=4) == ["data.train: data/train.parquet: no such file", "data.eval: data/dev.parquet: no such file"]
    assert any("overlaps" in problem for problem in check(config, world_size=8))


def test_search_r1_as_skyrl_timed_it_has_their_numbers_and_fits_its_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(QWEN_7B), encoding="utf-8")
    for name in ("model.safetensors", "tokenizer.json"):
        (tmp_path / name).touch()
    config = load(EXAMPLES / "bench" / "search_r1_7b_8xh100.yaml", [f"model.path={tmp_path}"])
    rollout, engine = config.rollout, config.rollout.engine
    assert (rollout.prompts_per_step, rollout.samples_per_prompt, rollout.max_turns, rollout.max_context) == (512, 5, 4, 4096)
    assert (config.parallel.data, config.parallel.tensor, engine.count * engine.tensor, config.placement.mode) == (8, 1, 8, "colocated")
    assert (config.optim.minibatches, config.optim.warmup_steps, config.optim.clip_grad, config.loss.kl_coef) == (2, 94 / 2, 0.5, 0.001)
    assert all("no such file" in problem for problem in check(config, world_size=8, local_world_size=8))


def test_there_are_scripts_and_bash_can_read_them():
    assert {path.name for path in SCRIPTS} >= {"launch.sh", "launch.sbatch", "train_1node.sh", "train_multinode.sh", "start_ray.sh"}
    for path in SCRIPTS:
        assert os.access(path, os.X_OK), f"{path.name} is not executable"
        subprocess.run(["bash", "-n", str(path)], check=True, timeout=120)
        assert "pkill" not in path.read_text(encoding="utf-8")


def test_one_node_starts_one_torchrun_on_loopback():
    result = dry_run("train_1node.sh", "a.yaml", "optim.lr=1e-5", RANKS="2")
    assert result.stdout.split() == [
        *["torchrun", "--nnodes", "1", "--nproc-per-node", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"],
        *["--local-addr", "127.0.0.1", "-m", "igpo_megatron.training.main", "a.yaml", "optim.lr=1e-5"],
    ]


def test_each_node_of_several_starts_torchrun_at_the_same_meeting_point():
    place = {"NNODES": "3", "RDZV_ENDPOINT": "10.0.0.1:29400", "RANKS": "8"}
    first, second = (dry_run("train_multinode.sh", "a.yaml", **place, NODE_RANK=rank, NODE_IP="10.0.0.9").stdout for rank in ("0", "1"))
    assert "--nnodes 3 --node-rank 0 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint 10.0.0.1:29400" in first
    assert "is_host=true" in first and "is_host=false" in second
    assert second.rstrip().endswith("--local-addr 10.0.0.9 -m igpo_megatron.training.main a.yaml")


@pytest.mark.parametrize("missing", ["NNODES", "NODE_RANK", "RDZV_ENDPOINT"])
def test_several_nodes_need_their_three_variables(missing):
    place = {"NNODES": "2", "NODE_RANK": "0", "RDZV_ENDPOINT": "h:1"}
    del place[missing]
    result = dry_run("train_multinode.sh", "a.yaml", **place)
    assert result.returncode != 0 and missing in result.stderr


def test_every_node_runs_the_same_launch_command():
    place = {"NNODES": "2", "IGPO_HEAD": "10.0.0.1", "MAX_RESTARTS": "2", "RENDEZVOUS": "static"}
    first, second = (dry_run("launch.sh", "a.yaml", "optim.lr=1e-5", **place, NODE_RANK=rank).stdout for rank in ("0", "1"))
    assert first == second == "igpo launch a.yaml optim.lr=1e-5 --rendezvous static --max-restarts 2\n"


@pytest.mark.parametrize("script", ["launch.sh", "train_1node.sh", "train_multinode.sh", "start_ray.sh"])
def test_a_script_without_arguments_prints_its_usage(script):
    result = dry_run(script)
    assert result.returncode == 2 and result.stderr.startswith("usage: ")


def test_ray_sees_only_the_engines_gpus_and_stays_on_loopback_unless_told_an_address():
    head = dry_run("start_ray.sh", "head", ENGINE_GPUS="4,5,6").stdout
    assert head.startswith("CUDA_VISIBLE_DEVICES=4,5,6 ray start --block --node-ip-address 127.0.0.1 --num-gpus 3 ")
    assert "--head --port 6379 --include-dashboard false" in head and "--disable-usage-stats" in head
    worker = dry_run("start_ray.sh", "worker", NODE_IP="10.0.0.2", RAY_HEAD="10.0.0.1:6379").stdout
    assert worker.startswith("CUDA_VISIBLE_DEVICES= ray start --block --node-ip-address 10.0.0.2 --num-gpus 0 ")
    assert "--address 10.0.0.1:6379" in worker
    assert "RAY_HEAD" in dry_run("start_ray.sh", "worker").stderr


def test_rays_gpus_count_among_those_that_a_scheduler_gave_to_the_job():
    given = {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}
    assert dry_run("start_ray.sh", "head", ENGINE_GPUS="2,3", **given).stdout.startswith("CUDA_VISIBLE_DEVICES=6,7 ray start ")
    assert dry_run("start_ray.sh", "head", **given).stdout.startswith("CUDA_VISIBLE_DEVICES= ray start ")
    refused = dry_run("start_ray.sh", "head", ENGINE_GPUS="3,4", **given)
    assert (refused.returncode, refused.stdout) == (2, "") and "which has no number 4" in refused.stderr

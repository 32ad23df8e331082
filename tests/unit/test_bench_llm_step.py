"""What the benchmark of a real model's step computes, and how its peer is prepared."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import typer
from typer.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "tools" / "bench"
sys.path[:0] = [str(BENCH), str(BENCH / "peers")]

import environment  # noqa: E402
import llm_step  # noqa: E402
import trl_step  # noqa: E402

from igpo_megatron.config.load import load  # noqa: E402
from igpo_megatron.types import Metric, Node, Prompt, RolloutGroup  # noqa: E402

POLICY = ROOT / "examples" / "quickstart" / "policy"
QUESTIONS = ROOT / "tests" / "fixtures" / "igpo_dev_15.parquet"
TRAINING = {
    "threads": 2,
    "parameters": 1_000_000,
    "tokens": 4000,
    "seconds": {"fp32": [8.0, 8.0, 9.0], "bf16": [2.0, 2.0, 3.0]},
    "product_gflops": {"fp32": 12.0, "bf16": 48.0},
    "profile": {},
}


def step(step_s: float, train_s: float = 2.0, tokens: int = 100) -> dict:
    return {"step_s": step_s, "rollout_s": 4.0, "train_s": train_s, "generated_tokens": tokens, "train_tokens": 2 * tokens}


def test_the_floor_is_six_operations_per_parameter_and_token_at_the_measured_rate():
    """6 x 1e6 x 4000 = 24 GFLOP: 2 s at 12 GFLOP/s, half a second at 48."""
    assert llm_step.floor_s(TRAINING, "fp32", 4000) == 2.0
    figures = llm_step.figures_of(TRAINING, {"step": {"fp32": [step(10.0)], "bf16": []}, "trl": {"fp32": [], "bf16": []}})
    assert figures["fraction_of_floor"]["fp32"]["train"] == 0.25 == figures["fraction_of_floor"]["bf16"]["train"]
    # A token takes 0.5 ms at best, and 200 of them took 2 s.
    assert figures["fraction_of_floor"]["fp32"]["train_of_the_step"] == 0.05
    assert "train_of_the_step" not in figures["fraction_of_floor"]["bf16"]
    assert llm_step.floors_of(TRAINING)["train_s"] == {"fp32": 2.0, "bf16": 0.5}


def test_ratios_say_how_many_times_faster_we_and_bf16_are():
    runs = {"step": {"fp32": [step(10.0)] * 2, "bf16": [step(5.0, 1.0)] * 2}, "trl": {"fp32": [step(20.0)] * 2, "bf16": [step(8.0)] * 2}}
    figures = llm_step.figures_of(TRAINING, runs)
    assert {name: found["median"] for name, found in figures["step_vs_trl"].items()} == {"fp32": 2.0, "bf16": 1.6}
    assert figures["bf16_vs_fp32"]["train"]["median"] == 4.0 and figures["bf16_vs_fp32"]["train_of_the_step"] == 2.0
    assert figures["step"]["bf16"]["rollout_tokens_per_s"] == 25.0 and figures["step"]["bf16"]["train_tokens_per_s"] == 200.0
    assert "fp32: 2.00x as fast as TRL" in llm_step.headline(figures)


def test_figures_of_one_dtype_without_the_peer_or_of_nothing_are_written_too():
    figures = llm_step.figures_of({}, {"step": {"bf16": [step(5.0)]}, "trl": {"bf16": []}})
    assert figures["step_vs_trl"] == figures["bf16_vs_fp32"] == figures["fraction_of_floor"] == {}
    assert llm_step.floors_of({})["product_gflops"] == {}
    assert llm_step.headline(llm_step.figures_of({}, {"step": {}, "trl": {}}))


def test_a_step_counts_prompts_once_and_no_probes():
    nodes = [Node(None, "prompt", [1] * 5), Node(0, "action", [2] * 3, 1), Node(0, "action", [3] * 4, 1), Node(0, "probe", [4] * 6)]
    row = {"phases_s": {"startup": 50.0, "rollout": 1.0, "train": 2.0, "checkpoint": 9.0}, Metric.GENERATED_TOKENS: 7.0}
    row |= {Metric.LOGPROB_GAP_MEAN: 0.01, Metric.LOGPROB_GAP_MAX: 0.1}
    found = llm_step.step_of(row, [RolloutGroup(Prompt("q", "?", ("a",), "s"), nodes)])
    assert (found["step_s"], found["train_tokens"], found["generated_tokens"], found["score_s"]) == (3.0, 12, 7, 0.0)


def test_runs_of_ours_and_of_the_peer_alternate_and_all_are_in_the_result(tmp_path, monkeypatch):
    order: list[str] = []

    def fake(who: str, seconds: float):
        def steps(dtype: str, overrides: list[str], count: int) -> list[dict]:
            order.append(f"{who} {dtype}")
            assert overrides == [f"model.path={POLICY}", "run.threads=2"]
            return [step(seconds)] * (count - 1)

        return steps

    monkeypatch.setattr(llm_step, "world_facts", lambda: None)
    monkeypatch.setattr(llm_step, "in_a_process", lambda call, names, *rest: TRAINING)
    monkeypatch.setattr(llm_step, "our_steps", fake("ours", 10.0))
    monkeypatch.setattr(llm_step, "their_steps", fake("trl", 15.0))
    app, out = typer.Typer(), tmp_path / "llm_step.json"
    app.command()(llm_step.main)
    words = ["--model", str(POLICY), "--peer", "--set", "run.threads=2", "--out", str(out)]
    assert CliRunner().invoke(app, words, catch_exceptions=False).exit_code == 0
    assert order == ["ours fp32", "trl fp32", "ours bf16", "trl bf16"] * 2
    result = json.loads(out.read_text(encoding="utf-8"))
    assert result["figures"]["step"]["bf16"]["steps"] == 4 and result["figures"]["step_vs_trl"]["fp32"]["median"] == 1.5
    assert result["figures"]["settings"] == ["run.threads=2"] and result["floors"]["train_s"]["fp32"] == 2.0
    refused = CliRunner().invoke(app, ["--dtypes", "fp8"])
    assert refused.exit_code == 2 and "'fp8' is not one of fp32, bf16" in refused.output


def event(name: str, own_us: float, parent: SimpleNamespace | None = None) -> SimpleNamespace:
    return SimpleNamespace(name=name, self_cpu_time_total=own_us, cpu_parent=parent)


def test_an_operator_belongs_to_the_part_that_called_it():
    head, attention = event("_LinearLogprobBackward", 1e5), event("aten::scaled_dot_product_attention", 1e5)
    update = event("optimizer step", 0.0)
    events = [
        head,
        event("aten::mm", 2e5, event("aten::matmul", 0, head)),
        attention,
        event("aten::bmm", 1e5, attention),
        event("aten::mm", 1e5),
        event("aten::mul_", 5e4, update),
        event("aten::silu", 5e4),
        event("gloo:all_reduce", 1e5, update),
    ]
    found = llm_step.parts_of(events, 1.0)
    assert found["share"] == {"gloo": 0.1, "optimizer": 0.05, "head": 0.3, "attention": 0.2, "matmul": 0.1, "rest": 0.25}
    assert found["rest_share"] == {"outside of operators": 0.2, "aten::silu": 0.05}


def test_the_profiler_names_the_parts_as_the_benchmark_looks_for_them():
    """A real policy: were a name of torch's, or of the head's, to change, its part would be empty."""
    from igpo_megatron.policy import parallel
    from igpo_megatron.policy.policy import Policy

    config = load(llm_step.CONFIG, [f"model.path={POLICY}", "model.dtype=fp32"])
    threads = torch.get_num_threads()
    try:
        policy = Policy(config, parallel.init(config))
        groups = [llm_step.single_turn(policy.shape.vocab_size, seed) for seed in range(2)]
        share = llm_step.profiled(lambda: llm_step.optimizer_step(policy, groups))["share"]
    finally:
        parallel.shutdown()
        torch.set_num_threads(threads)
    assert min(share[kind] for kind in ("optimizer", "head", "attention", "matmul", "rest")) > 0
    assert sum(share.values()) == pytest.approx(1, abs=0.02)


def test_a_trajectory_of_the_optimizer_step_has_500_tokens():
    group = llm_step.single_turn(vocab=99, seed=1)
    assert [len(node.token_ids) for node in group.nodes] == [50, 450] and llm_step.TRAJECTORIES == 8


def test_the_peer_is_asked_what_our_run_asks():
    """As the policy reads it, in the order of the run's seed."""

    def texts(count: int, *settings: str) -> list[str]:
        config = load(llm_step.CONFIG, [f"model.path={POLICY}", f'data.train=["{QUESTIONS}"]', "data.balance=none", *settings])
        rows = llm_step.prompts_of(config, count)
        assert all(row["text"].startswith("<|im_start|>") and row["answers"] for row in rows)
        return [row["text"] for row in rows]

    found = texts(15)
    assert len(set(found)) == 15 and found[:2] == texts(2)
    assert found != texts(15, "run.seed=2") and sorted(found) == sorted(texts(15, "run.seed=2"))


def test_the_peers_lock_has_our_versions_of_what_both_need():
    def pins(path: Path) -> dict[str, str]:
        return dict(line.split("==") for line in path.read_text(encoding="utf-8").splitlines() if line)

    ours, theirs = pins(ROOT / "requirements.lock"), pins(BENCH / "peers" / "trl.lock")
    assert theirs["trl"] == "1.16.0"
    assert theirs["torch"] == ours["torch"] and theirs["transformers"] == ours["transformers"]
    assert {name: (ours[name], version) for name, version in theirs.items() if ours.get(name, version) != version} == {}


def test_a_peers_environment_is_made_once_and_again_after_its_lock_changed(tmp_path, monkeypatch):
    made = []
    installer = SimpleNamespace(
        STAMP="installed.txt",
        LOCK=ROOT / "requirements.lock",
        make_venv=lambda folder: (folder.mkdir(parents=True, exist_ok=True), folder / "bin" / "python")[1],
        bring_uv=lambda python, lock: python,
        install_cpu=lambda uv, lock, index: made.append((lock.name, index)),
    )
    (tmp_path / "Makefile").write_text("TORCH_CPU_INDEX ?= index\n")
    (tmp_path / "some.lock").write_text("trl==1\n")
    monkeypatch.delenv("TORCH_CPU_INDEX", raising=False)
    monkeypatch.setattr(environment, "_installer", lambda: installer)
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "environment.py"))
    for _ in range(2):
        assert environment.python_of("some") == tmp_path / ".venv-peers" / "some" / "bin" / "python"
    assert made == [("some.lock", "index")]
    (tmp_path / "some.lock").write_text("trl==2\n")
    environment.python_of("some")
    assert len(made) == 2


def test_the_installer_of_peers_is_that_of_make_venv():
    installer = environment._installer()
    assert {"make_venv", "bring_uv", "install_cpu", "STAMP", "LOCK"} <= vars(installer).keys()
    assert ".venv-peers/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert re.fullmatch(r"https://\S+", environment.torch_cpu_index())


def test_a_step_of_trl_is_summed_up_without_its_first():
    steps = [
        {"step_s": 99.0, "generate_s": 90.0, "generated_tokens": 1, "prompt_tokens": 1},
        {"step_s": 10.0, "generate_s": 4.0, "generated_tokens": 80, "prompt_tokens": 40},
        {"step_s": 14.0, "generate_s": 4.0, "generated_tokens": 80, "prompt_tokens": 40},
    ]
    found = trl_step.summary(steps)
    assert (found["step_s"], found["generate_s"], found["train_s"]) == (12.0, 4.0, 8.0)
    assert (found["rollout_tokens_per_s"], found["train_tokens_per_s"]) == (20.0, 16.0)


def test_the_peers_prompts_are_taken_in_order_and_again_from_the_start(tmp_path):
    file = tmp_path / "prompts.json"
    file.write_text(json.dumps([{"text": text, "answers": ["x"]} for text in "abc"]))
    options = trl_step.arguments_of(["--model", "m", "--prompts", str(file), "--steps", "2", "--questions", "2", "--batch", "8"])
    assert [row["prompt"] for row in trl_step.questions_of(options)] == ["a", "b", "c", "a"]
    with pytest.raises(SystemExit):
        trl_step.arguments_of(["--model", "m", "--steps", "1"])
    with pytest.raises(SystemExit):
        trl_step.arguments_of(["--model", "m", "--batch", "5"])

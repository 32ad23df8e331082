"""Answer held-out questions and score them: used by the trainer and by `igpo eval`.

questions ──Rollouter (sampled n times, greedy once)──> groups ──score──> EM, F1, format, turns, searches; per source and pass@k
"""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from igpo_megatron.algorithms.rewards import score
from igpo_megatron.config.schema import Config
from igpo_megatron.data.question_files import read_prompts
from igpo_megatron.observability.metrics import num_calls, status_counts
from igpo_megatron.observability.rollout_dump import write_rollouts
from igpo_megatron.observability.run_folder import step_name, write_whole
from igpo_megatron.supervision.failures import FOLDER as FAILURES
from igpo_megatron.types import (
    EVALUATION_KINDS,
    SEARCH,
    EvaluationKind,
    Metric,
    Prompt,
    RolloutGroup,
    RunStopped,
    UserError,
    evaluated,
    over_sources,
    standard_error,
)

if TYPE_CHECKING:
    from igpo_megatron.agent.rollouter import Rollouter

logger = logging.getLogger(__name__)

SALTS: dict[EvaluationKind, str] = {"sampled": "-2", "greedy": "-1"}
"""Keep the sampling seeds of an evaluation apart from those of training, whose salts are the steps from 1 on. Other values would give
other samples, which could not be compared question by question with those of earlier runs."""


def questions(config: Config) -> list[Prompt]:
    """The held-out questions of a run: all, or the first `eval.questions` of a fixed shuffle that does not depend on the seed."""
    prompts = [prompt for path in config.data.eval for prompt in read_prompts(path, config.data.layout, config.reward.outcome)]
    if 0 < config.eval.questions < len(prompts):
        random.Random(0).shuffle(prompts)
        by_source: dict[str, list[Prompt]] = {}
        for prompt in prompts:
            by_source.setdefault(prompt.source, []).append(prompt)
        # In turn over sources, so that a small set still holds every kind of question.
        order = [row for rank in range(max(map(len, by_source.values()))) for row in (s[rank : rank + 1] for s in by_source.values())]
        prompts = [prompt for row in order for prompt in row][: config.eval.questions]
    return prompts


def evaluate(
    rollouter: Rollouter,
    prompts: Sequence[Prompt],
    config: Config,
    *,
    step: int,
    version: int,
    folder: Path,
    on_progress: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Score the weights `version`, which the engines serve. Writes `<folder>/step_NNNNNN.json` and its rollouts; returns the JSON file's
    content. Raises RunStopped where too much failed, or where other weights answered."""
    report: dict[str, Any] = {"step": step}
    for name, groups in _answers(rollouter, prompts, config, on_progress).items():
        _require_version(groups, version, step)
        for group in groups:
            score(group, config)
        write_rollouts(folder / f"{step_name(step)}_{name}.parquet", step, groups)
        report[name] = summarise(groups, config)
        report[name]["too_long"] = len(prompts) - len(groups)
    write_whole(folder / f"{step_name(step)}.json", json.dumps(report, indent=2))
    return report


def _answers(
    rollouter: Rollouter, prompts: Sequence[Prompt], config: Config, on_progress: Callable[[float], None] | None
) -> dict[EvaluationKind, list[RolloutGroup]]:
    """The groups of every kind. All kinds are asked at once: one after the other, each would end with a few long trajectories alone."""
    temperatures: dict[EvaluationKind, float | None] = {"sampled": None, "greedy": 0.0}
    samples: dict[EvaluationKind, int] = {"sampled": config.eval.samples, "greedy": int(config.eval.greedy)}
    shares = {kind: 0.0 for kind, count in samples.items() if count}

    def advance(fraction: float, kind: EvaluationKind) -> None:
        shares[kind] = fraction
        if on_progress:
            on_progress(sum(share * samples[kind] for kind, share in shares.items()) / sum(samples.values()))

    asked = {
        kind: rollouter.start(
            rollouter.run(
                prompts,
                samples=samples[kind],
                salt=SALTS[kind],
                temperature=temperatures[kind],
                on_progress=partial(advance, kind=kind),
            )
        )
        for kind in shares
    }
    try:
        ended, _ = wait(asked.values(), return_when=FIRST_EXCEPTION)
        for answers in ended:
            answers.result()
    finally:
        for answers in asked.values():  # the others of one that failed, or all at an interrupt
            answers.cancel()
    return {kind: answers.result() for kind, answers in asked.items()}


def _require_version(groups: Sequence[RolloutGroup], version: int, step: int) -> None:
    """Raises RunStopped where a turn was not sampled by the weights `version`, whose scores the report would claim to be."""
    found = {node.weight_version for group in groups for node in group.nodes if node.kind == "action"}
    if not found <= {version}:
        raise RunStopped(
            f"the evaluation after step {step} was given turns of the weights {sorted(map(str, found))}, expected {version}: "
            "an engine served the wrong weights"
        )


def summarise(groups: Sequence[RolloutGroup], config: Config) -> dict[str, Any]:
    """Averages over questions of averages over samples; failed trajectories are left out and counted.

    `f1` counts a malformed answer as 0, `f1_with_penalty` as `reward.format_penalty`; `f1_se` is the standard error over questions.
    `macro` holds the means of `per_source` over sources, each of which counts once: the "Avg" of published tables.
    """
    result: dict[str, Any] = {**_scores(groups, config)}
    sources = sorted({group.prompt.source for group in groups})
    result["per_source"] = {s: _scores([group for group in groups if group.prompt.source == s], config) for s in sources}
    result["macro"] = _macro([scores for scores in result["per_source"].values() if scores["questions"]])
    result["status"] = status_counts(groups)
    samples = min((len(group.trajectories) for group in groups), default=0)
    if samples > 1:
        result |= _pass_at_powers([_correct(group, config) for group in groups], samples)
    return result


def pass_at_k(correct: Sequence[bool], k: int) -> float:
    """Unbiased estimate of the chance that one of k samples is right, from n >= k samples (arXiv 2107.03374, equation 1)."""
    n, c = len(correct), sum(correct)
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def _pass_at_powers(correct: Sequence[Sequence[bool]], samples: int) -> dict[str, dict[str, float]]:
    """`pass_at_k`, k -> mean over questions, and `pass_at_k_questions`, k -> how many those are, for k = 1, 2, 4, ... `samples`.

    A question with fewer than k samples that did not fail has no unbiased estimate and is left out of that k; a k without questions is
    left out entirely.
    """
    powers = [2**power for power in range(samples.bit_length())]
    found = {str(k): [pass_at_k(right, k) for right in correct if len(right) >= k] for k in powers}
    return {
        "pass_at_k": {k: fmean(values) for k, values in found.items() if values},
        "pass_at_k_questions": {k: len(values) for k, values in found.items() if values},
    }


def _correct(group: RolloutGroup, config: Config) -> list[bool]:
    """Whether each sample that did not fail is an exact match, by the outcome's own normalisation where that is one."""
    name = "em_squad" if config.reward.outcome == "em_squad" else Metric.EM
    return [end.reward_parts[name] == 1.0 for end in group.trajectories if end.status.is_trainable]


def _macro(per_source: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over sources, and their number in place of those of questions and samples; the standard error is that of such a mean."""
    if not per_source:
        return {"sources": 0}
    error = standard_error(Metric.F1)
    counts = ("questions", "samples", error)
    means = {name: fmean(scores[name] for scores in per_source) for name in per_source[0] if name not in counts}
    return {**means, "sources": len(per_source), error: math.hypot(*(scores[error] for scores in per_source)) / len(per_source)}


def _scores(groups: Sequence[RolloutGroup], config: Config) -> dict[str, float]:
    penalty, rows = config.reward.format_penalty, []
    parts = dict.fromkeys((Metric.F1, Metric.EM, config.reward.outcome, Metric.FORMAT_OK))
    for group in groups:
        ends = [trajectory for trajectory in group.trajectories if trajectory.status.is_trainable]
        if not ends:
            continue
        row = {name: fmean(end.reward_parts[name] for end in ends) for name in parts}
        row["f1_with_penalty"] = fmean(end.reward_parts[Metric.F1] if end.reward_parts[Metric.FORMAT_OK] else penalty for end in ends)
        actions = [group.actions(end) for end in ends]
        row[Metric.TURNS] = fmean(len(nodes) for nodes in actions)
        row[Metric.SEARCHES] = fmean(num_calls(nodes, SEARCH) for nodes in actions)
        rows.append(row)
    result = {name: fmean(row[name] for row in rows) for name in rows[0]} if rows else {}
    result["questions"] = len(rows)
    result["samples"] = sum(len(group.trajectories) for group in groups) / max(len(groups), 1)
    result[standard_error(Metric.F1)] = stdev(row[Metric.F1] for row in rows) / math.sqrt(len(rows)) if len(rows) > 1 else 0.0
    return result


def metrics(report: Mapping[str, Any]) -> dict[str, float]:
    """A report's averages for the tracker: `eval/sampled/f1` over questions and, where there are several, `eval/sampled/macro_f1` over
    sources."""
    found: dict[str, float] = {}
    for kind in EVALUATION_KINDS:
        scores = report.get(kind, {})
        macro = scores["macro"] if scores and scores["macro"]["sources"] > 1 else {}
        named = {**scores, **{over_sources(name): value for name, value in macro.items()}}
        found |= {evaluated(kind, name): value for name, value in named.items() if isinstance(value, float)}
    return found


def evaluate_checkpoint(config: Config, model: Path | None, out: Path) -> dict[str, Any]:
    """`igpo eval`: start engines on a Hugging Face folder or a Megatron checkpoint, evaluate `data.eval`, write to `out`.

    A Megatron checkpoint is converted to a temporary Hugging Face folder first. The scores carry its step, those of other models step 0.
    """
    import tempfile
    from contextlib import ExitStack

    from rich.progress import Progress

    from igpo_megatron.agent.rollouter import Rollouter
    from igpo_megatron.chat.format import ChatFormat
    from igpo_megatron.chat.tokenizer import load_tokenizer
    from igpo_megatron.engines.factory import open_engines
    from igpo_megatron.policy.parallel import on_this_machine
    from igpo_megatron.tools.registry import make_tools
    from igpo_megatron.training.checks import require

    if not config.data.eval:
        raise UserError("no questions to evaluate: give --data FILE.parquet or set data.eval")
    with ExitStack() as stack:
        folder, step = model or config.model.path, 0
        if (folder / "model").is_dir() and not (folder / "config.json").is_file():
            from checkpoint_conversion.convert import megatron_to_hf

            step = saved_after(folder)
            converted = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="igpo-eval-"))) / "hf"
            megatron_to_hf(folder, converted)
            folder = converted
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": folder})})
        config = on_this_machine(config, trains=False)
        require(config, None)
        out.mkdir(parents=True, exist_ok=True)
        chat = ChatFormat(load_tokenizer(folder), config.rollout, config.reward)
        for note in chat.notes:
            logger.warning(note)
        prompts = questions(config)
        progress = stack.enter_context(Progress(transient=True))
        task = progress.add_task("starting engines", total=1.0)
        tools = make_tools(config, chat.count_tokens, chat.protocol.hit)
        engines = stack.enter_context(open_engines(config))
        rollouter = stack.enter_context(
            Rollouter(engines, tools, chat, config.rollout, seed=config.run.seed, crashes=out / FAILURES / "trajectories.txt")
        )
        progress.update(task, description=f"answering {len(prompts)} questions")

        def show(share: float) -> None:
            progress.update(task, completed=share)

        # The engines have read the folder's weights, which are version 0.
        return evaluate(rollouter, prompts, config, step=step, version=0, folder=out, on_progress=show)


def saved_after(checkpoint: Path) -> int:
    """The training step after which a Megatron checkpoint was saved; 0 if no run wrote it. Raises UserError if it does not say."""
    state = checkpoint / "state.json"
    if not state.is_file():
        return 0
    try:
        return int(json.loads(state.read_text(encoding="utf-8"))["step"])
    except (ValueError, OverflowError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{state} is damaged ({error!r}), expected an object with a step; restore the checkpoint from a copy") from None

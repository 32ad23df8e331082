"""One self-contained HTML page about a run: what it is, what it reached, curves, and trajectories to read turn by turn.

    config.json, summary.json, metrics.jsonl, rollouts/*.parquet, eval/* ──collect──> plain data ──report.html.j2──> report.html

The page loads nothing and works from file://. Text from tools and models is untrusted: the template escapes it, the script in the page
only ever sets it as text. Size is bounded by `Limits`, and the page says what was left out.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from jinja2 import Environment, StrictUndefined
from tokenizers import Tokenizer

from igpo_megatron.evaluate import headline
from igpo_megatron.observability.rollout_dump import count_groups, read_rollouts
from igpo_megatron.observability.tracker import PHASES, Phase, public_config, read_metrics, sum_phases
from igpo_megatron.observability.tree_picture import tree_picture
from igpo_megatron.types import Node, RolloutGroup, Trajectory

TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True, slots=True)
class Limits:
    """How much of a run is put into the page."""

    groups: int = 20
    """Questions per rollout file, the first ones."""

    samples: int = 16
    """Trajectories per question, the first ones."""

    action_tokens: int = 600
    """Sampled tokens shown per turn."""

    text_chars: int = 3000
    """Characters shown per prompt and search result."""

    file_bytes: int = 800_000
    """A file's questions stop where they pass this size as JSON; the first one is always kept."""

    points: int = 400
    """Points per curve; longer runs are averaged over neighbouring steps."""


@dataclass(frozen=True, slots=True)
class Chart:
    """One panel of curves."""

    title: str
    series: Mapping[str, str]
    """Metric -> label. A metric ending in `*` stands for all that begin so, and `*` in the label for the rest of their names."""

    note: str = ""
    log: bool = False
    smooth: bool = False
    """Draw a moving average over the raw line, for values that scatter with a step's few questions."""


CHARTS = (
    Chart("Held-out F1", {"eval/sampled/f1": "sampled", "eval/greedy/f1": "greedy"}, "bars: standard error over questions"),
    Chart("Reward", {"reward": "mean reward"}, "training rollouts; bold: mean over 7 points", smooth=True),
    Chart("F1 and exact match", {"f1": "F1", "em": "exact match"}, "training rollouts; bold: mean over 7 points", smooth=True),
    Chart("Information gain per turn", {"gain": "all turns", "gain_turn_*": "turn *"}, "rise in the answer's value, mean over turns"),
    Chart(
        "Where gains come from",
        {"gain_evidence": "the tool result", "gain_reasoning": "own reasoning"},
        "reward.evidence: the value with the newest result hidden lies between the two",
    ),
    Chart(
        "Format-valid share",
        {"format_ok": "training", "eval/sampled/format_ok": "held-out, sampled", "eval/greedy/format_ok": "held-out, greedy"},
    ),
    Chart("Value before the first turn", {"value_0": "mean log-prob of the answer"}),
    Chart("Entropy", {"entropy": "entropy"}, "nats per sampled token"),
    Chart(
        "Log-prob gap, engine vs trainer",
        {
            "logprob_gap_mean": "mean",
            "logprob_gap_max": "largest",
            "logprob_gap_max_free": "largest without routing replay",
            "canary_gap": "canary after sync",
        },
        "nats, log scale",
        log=True,
    ),
    Chart(
        "Branching",
        {
            "branched": "decisions that branched",
            "branch_entropy": "entropy behind results",
            "branch_spread": "std of values behind results",
            "shared_tokens": "sampled tokens shared",
            "stopped": "trajectories asked for their answer",
        },
        "shares; entropy in units of rollout.branching",
    ),
    Chart("Gradient norm", {"grad_norm": "gradient norm"}, "before clipping"),
    Chart("Loss", {"loss": "loss", "nll": "negative log-likelihood"}),
    Chart("Distance to other policies", {"kl_old": "KL to old policy", "kl_ref": "KL to reference", "clip_fraction": "clipped share"}),
    Chart(
        "Turns and tool calls",
        {"turns": "turns", "searches": "searches", "visits": "visits", "python_calls": "python calls"},
        "per trajectory",
    ),
    Chart(
        "How searches ended",
        {
            "search/ok": "ok",
            "search/empty": "empty",
            "search/error": "error",
            "search/timeout": "timeout",
            "search/rate_limited": "rate limited",
            "search/cached": "from the cache",
        },
        "queries per step, those from the cache included",
    ),
    Chart(
        "Tool latency",
        {
            "search/p50_s": "search, p50",
            "search/p95_s": "search, p95",
            "visit/p50_s": "visit, p50",
            "visit/p95_s": "visit, p95",
            "python/p50_s": "python, p50",
            "python/p95_s": "python, p95",
        },
        "seconds, without answers from the cache; log scale",
        log=True,
    ),
    Chart("Sampled tokens per trajectory", {"response_tokens": "tokens"}),
    Chart(
        "Without a training signal",
        {"failed": "failed trajectories", "truncated": "truncated trajectories", "zero_std_groups": "groups with equal rewards"},
        "shares",
    ),
    Chart("Tokens per second", {"tokens_per_s": "tokens/s"}, "all tokens of a step over its time"),
    Chart("Learning rate", {"lr": "learning rate"}),
)

STEP_PHASES: tuple[Phase, ...] = ("rollout", "score", "advantage", "train", "sync", "checkpoint")
"""What a step's time is stacked from; start-up and evaluation would hide it."""

OUTCOMES = (
    ("f1_sampled", "F1, sampled at training temperature", True),
    ("f1_greedy", "F1, greedy", True),
    ("em_greedy", "Exact match, greedy", True),
    ("format_valid", "Format-valid share", True),
    ("searches_per_question", "Searches per question", False),
)
"""Rows of the before/after table: key in summary.json, label, whether more is better."""


def write_report(run_folder: Path, limits: Limits = Limits()) -> Path:
    """Write `<run_folder>/report.html` from whatever the run has left so far and return its path.

    Raises ValueError if the folder holds no run, or if one of its files is damaged.
    """
    page = collect(run_folder, limits)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(page)
    path = run_folder / "report.html"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(html, encoding="utf-8")
    os.replace(temporary, path)
    return path


def collect(run_folder: Path, limits: Limits) -> dict[str, Any]:
    """Everything the template shows, as plain data."""
    metrics = run_folder / "metrics.jsonl"
    files = _rollout_files(run_folder)
    evals = [_read_json(path) for path in sorted((run_folder / "eval").glob("step_*.json"))]
    if not (metrics.is_file() or files or evals):
        raise ValueError(f"{run_folder}: no run to report on; expected metrics.jsonl, rollouts/step_*.parquet or eval/step_*.json in it")
    config = public_config(_read_json(run_folder / "config.json") or {})
    summary = _read_json(run_folder / "summary.json")
    rows = read_metrics(metrics) if metrics.is_file() else []
    phases = summary["phases_s"] if summary else sum_phases(rows)
    tokenizer = _tokenizer(config)
    return {
        "title": _at(config, "run.name") or run_folder.resolve().name,
        "finished": summary is not None,
        "last_step": rows[-1]["step"] if rows else None,
        "facts": _facts(config, rows, summary),
        "outcomes": _outcomes(summary, evals),
        "questions": _questions(summary, evals),
        "sources": _sources(evals),
        "phases": [{"name": name, "seconds": seconds, "colour": PHASES.index(name)} for name, seconds in phases.items() if name in PHASES],
        "config_text": json.dumps(config, indent=2) if config else "",
        "data": {
            "charts": _charts(rows, limits),
            "files": [_file(path, label, tokenizer, limits) for path, label in files],
            "left_out": _files_left_out(run_folder, files),
        },
    }


def _read_json(path: Path) -> Any:
    """Content of a JSON file; None where there is none."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove it to leave it out of the report") from None


def _at(values: Mapping[str, Any], dotted: str) -> Any:
    """A value of a nested mapping; None where a configuration of another version lacks it."""
    found: Any = values
    for key in dotted.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


# ---- header


def _facts(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """(label, value) pairs for the head of the page; unknown ones are left out."""
    at = {key: _at(config, key) for key in FACT_KEYS}
    steps = rows[-1]["step"] if rows else None
    gaps = [row[name] for row in rows for name in ("logprob_gap_max", "canary_gap") if row.get(name) is not None]
    gap = summary["max_logprob_gap"] if summary else max(gaps, default=None)
    skipped = [row["skipped"] for row in rows if row.get("skipped") is not None]
    wall = summary["wall_s"] if summary else sum(sum_phases(rows).values())
    facts = [
        ("Policy", at["model.path"] and Path(at["model.path"]).name),
        ("Algorithm", at["advantage.name"] and f"{at['advantage.name']}, {at['loss.name']} loss"),
        ("Gain", at["reward.gain"]),
        ("Steps", steps is not None and f"{steps} of {at['run.steps']}" if at["run.steps"] else steps),
        ("Per step", at["rollout.prompts_per_step"] and f"{at['rollout.prompts_per_step']} questions x {at['rollout.samples_per_prompt']}"),
        (
            "Ranks",
            at["parallel.tensor"] and _layout(at),
        ),
        ("Engines", at["rollout.engine.count"] and f"{at['rollout.engine.count']} vLLM, TP {at['rollout.engine.tensor']}"),
        ("Precision", at["model.dtype"] and f"{at['model.dtype']} on {at['run.device']}"),
        ("Learning rate", at["optim.lr"]),
        ("Seed", at["run.seed"]),
        ("Time in phases", _duration(wall) if wall else None),
        ("Skipped updates", f"{sum(skipped):.0f}" if skipped else None),
        ("Largest log-prob gap", None if gap is None else f"{gap:.1e}"),
    ]
    return [(label, str(value)) for label, value in facts if value is not None and value is not False]


def _layout(at: Mapping[str, Any]) -> str:
    context = f" · CP {at['parallel.context']}" if (at["parallel.context"] or 1) > 1 else ""
    data = f" · DP {at['parallel.data']}" if at["parallel.data"] else ""
    return f"TP {at['parallel.tensor']}{context} · PP {at['parallel.pipeline']}{data}"


FACT_KEYS = (
    *("model.path", "model.dtype", "advantage.name", "loss.name", "reward.gain", "run.steps", "run.device", "run.seed", "optim.lr"),
    *("rollout.prompts_per_step", "rollout.samples_per_prompt", "rollout.engine.count", "rollout.engine.tensor"),
    *("parallel.tensor", "parallel.context", "parallel.pipeline", "parallel.data"),
)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 120 else f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _ends(summary: Mapping[str, Any] | None, evals: Sequence[dict[str, Any]]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Held-out scores before and after (or so far), in the names of summary.json; empty where there are none."""
    if summary:
        return summary.get("before") or {}, summary.get("after") or {}
    if not evals:
        return {}, {}
    return headline(evals[0]), headline(evals[-1]) if len(evals) > 1 else {}


def _outcomes(summary: Mapping[str, Any] | None, evals: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of the before/after table; a missing side is None."""
    before, after = _ends(summary, evals)
    rows = []
    for key, label, more_is_better in OUTCOMES:
        left, right = before.get(key), after.get(key)
        if left is None and right is None:
            continue
        change = None if left is None or right is None else right - left
        errors = [side.get(f"{key}_se") for side in (before, after)]
        rows.append({"label": label, "sides": list(zip((left, right), errors, strict=True)), "change": change, "judged": more_is_better})
    return rows


def _questions(summary: Mapping[str, Any] | None, evals: Sequence[dict[str, Any]]) -> int | None:
    before, after = _ends(summary, evals)
    return before.get("questions") or after.get("questions")


def _sources(evals: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """F1 per benchmark in the first and last evaluation (sampled where it was run, else greedy); empty for fewer than two benchmarks."""
    if not evals:
        return []
    first, last = ((scores.get("sampled") or scores.get("greedy") or {}).get("per_source") or {} for scores in (evals[0], evals[-1]))
    if len(first) < 2:
        return []
    return [
        {
            "name": name,
            "questions": scores.get("questions"),
            "before": scores.get("f1"),
            "after": (last.get(name) or {}).get("f1") if len(evals) > 1 else None,
        }
        for name, scores in first.items()
    ]


# ---- curves


def _charts(rows: Sequence[Mapping[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    """Panels that have at least one value, then step time by phase."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    panels = []
    for chart in CHARTS:
        series = [
            {"label": label, "colour": index, "points": points}
            for index, (name, label) in enumerate(_expand(chart.series, names))
            if (points := _points(rows, name, limits.points))
        ]
        if series:
            panels.append(
                {"title": chart.title, "note": chart.note, "log": chart.log, "smooth": chart.smooth, "stacked": False, "series": series}
            )
    timed = [row for row in rows if row["phases_s"].get("train")]
    stacked = [
        {"label": phase, "colour": PHASES.index(phase), "points": times}
        for phase in STEP_PHASES
        if (times := _bins([(row["step"], row["phases_s"].get(phase, 0.0)) for row in timed], limits.points)) and any(y for _, y in times)
    ]
    if stacked:
        note = "seconds; evaluation and start-up are not part of a step"
        panels.insert(1, {"title": "Step time by phase", "note": note, "log": False, "smooth": False, "stacked": True, "series": stacked})
    return panels


def _expand(series: Mapping[str, str], names: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(metric, label) with `*` replaced by what the run has logged."""
    for pattern, label in series.items():
        if not pattern.endswith("*"):
            yield pattern, label
            continue
        prefix = pattern[:-1]
        found = sorted((name for name in names if name.startswith(prefix)), key=lambda name: (len(name), name))
        yield from ((name, label.replace("*", name.removeprefix(prefix))) for name in found)


def _points(rows: Sequence[Mapping[str, Any]], name: str, limit: int) -> list[tuple[float, float, float | None]]:
    """(step, value, standard error or None) of a metric; steps where it is absent are left out."""
    points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    errors = {row["step"]: row.get(f"{name}_se") for row in rows} if len(points) <= limit else {}
    return [(step, value, _short(errors.get(int(step)))) for step, value in _bins(points, limit)]


def _bins(points: Sequence[tuple[float, float]], limit: int) -> list[tuple[float, float]]:
    """At most `limit` points: means over neighbouring ones where there are more."""
    width = -(-len(points) // limit) or 1
    chunks = [points[start : start + width] for start in range(0, len(points), width)]
    return [(chunk[0][0] if width == 1 else fmean(x for x, _ in chunk), float(f"{fmean(y for _, y in chunk):.5g}")) for chunk in chunks]


def _short(value: float | None) -> float | None:
    """Four digits are enough to look at; None for what JSON cannot hold."""
    return float(f"{value:.4g}") if value is not None and math.isfinite(value) else None


# ---- trajectories


def _rollout_files(run_folder: Path) -> list[tuple[Path, str]]:
    """(file, label): the first, middle and last training step, then the first and last evaluation of each kind."""
    training = sorted((run_folder / "rollouts").glob("step_*.parquet"))
    picked = [(path, f"Training, step {_step_of(path)}") for path in _spread(training, 3)]
    kinds: dict[str, list[Path]] = {}
    for path in sorted((run_folder / "eval").glob("step_*.parquet")):
        kinds.setdefault(re.sub(r"^step_\d+_?", "", path.stem), []).append(path)
    evaluations = [
        (path, f"Held-out{', ' if kind else ''}{kind}, after step {_step_of(path)}")
        for kind, paths in kinds.items()
        for path in _spread(paths, 2)
    ]
    return picked + evaluations


def _files_left_out(run_folder: Path, shown: Sequence[tuple[Path, str]]) -> str:
    """One sentence about rollout files that are not in the page; empty where all are."""
    count = sum(len(list((run_folder / folder).glob("step_*.parquet"))) for folder in ("rollouts", "eval"))
    return f"The page holds {len(shown)} of the run's {count} rollout files." if count > len(shown) else ""


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of them, evenly spread, both ends included."""
    if len(paths) <= count:
        return list(paths)
    return [paths[round(position * (len(paths) - 1) / (count - 1))] for position in range(count)]


def _step_of(path: Path) -> int:
    match = re.match(r"step_(\d+)", path.stem)
    if match is None:
        raise ValueError(f"{path}: expected a file named step_<number>.parquet")
    return int(match[1])


def _file(path: Path, label: str, tokenizer: Tokenizer | None, limits: Limits) -> dict[str, Any]:
    """One rollout file for the page: as many of its first groups as the limits allow."""
    groups: list[dict[str, Any]] = []
    size = 0
    for _, part in read_rollouts(path, limits.groups):
        for group in part[: limits.groups]:
            shown = _group(group, tokenizer, limits)
            size += len(json.dumps(shown))
            if groups and size > limits.file_bytes:
                break
            groups.append(shown)
        break
    return {"id": f"{path.parent.name}-{path.stem}", "label": label, "total": count_groups(path), "groups": groups}


def _group(group: RolloutGroup, tokenizer: Tokenizer | None, limits: Limits) -> dict[str, Any]:
    """A group for the page. Nodes keep their indices; those that no shown trajectory needs are null."""
    trajectories = group.trajectories[: limits.samples]
    needed = {index for trajectory in trajectories for index in trajectory.path}
    sections: dict[int, str] = {}
    nodes: list[dict[str, Any] | None] = []
    for index, node in enumerate(group.nodes):
        shown, sections[index] = _node(node, sections.get(-1 if node.parent is None else node.parent, "text"), tokenizer, limits)
        nodes.append(shown if index in needed else None)
    values = _values(group)
    return {
        "id": group.prompt.id,
        "question": group.prompt.question,
        "answers": group.prompt.answers[:10],
        "more_answers": max(len(group.prompt.answers) - 10, 0),
        "source": group.prompt.source,
        "nodes": nodes,
        "samples": [_sample(group, trajectory, values) for trajectory in trajectories],
        "total": len(group.trajectories),
        "tree": tree_picture(group, trajectories),
    }


def _sample(group: RolloutGroup, trajectory: Trajectory, values: Mapping[int, float]) -> dict[str, Any]:
    return {
        "path": trajectory.path,
        "status": trajectory.status.value,
        "trainable": trajectory.status.is_trainable,
        "answer": trajectory.answer,
        "reason": trajectory.reason,
        "reward": _short(trajectory.reward),
        "parts": {name: _short(value) for name, value in trajectory.reward_parts.items()},
        "gains": [_short(gain) for gain in trajectory.gains],
        "evidence": [_short(gain) for gain in trajectory.evidence_gains],
        "advantages": [_short(advantage) for advantage in trajectory.turn_advantages],
        "values": [_short(values.get(-1 if node.parent is None else node.parent)) for node in group.actions(trajectory)],
    }


def _values(group: RolloutGroup) -> dict[int, float]:
    """Mean log-prob of the answer (best alias) in the context that ends with a node, by that node's index."""
    values: dict[int, float] = {}
    for node in group.nodes:
        if node.parent is not None and node.kind == "probe" and node.old_logprobs:
            value = fmean(node.old_logprobs)
            values[node.parent] = max(value, values.get(node.parent, -math.inf))
    return values


def _node(node: Node, section: str, tokenizer: Tokenizer | None, limits: Limits) -> tuple[dict[str, Any], str]:
    """A node for the page, and the section that text after it is in. `section` is the one its parent ended in."""
    shown: dict[str, Any] = {"kind": node.kind, "turn": node.turn, "tokens": len(node.token_ids)}
    if node.kind not in ("forced", "asking", "action"):
        shown["text"] = node.text[: limits.text_chars]
        shown["cut"] = _left_out(len(node.text) - limits.text_chars, "characters")
        return shown, "text"
    count = limits.action_tokens
    _, after = _split_sections(node.text, section)
    pieces = _pieces(tokenizer, node.token_ids[:count]) if tokenizer else None
    if pieces is None:
        text = node.text[: limits.text_chars]
        shown["runs"] = [[name, text[start:stop]] for name, start, stop in _split_sections(text, section)[0]]
        shown["cut"] = _left_out(len(node.text) - limits.text_chars, "characters")
    else:
        shown["runs"] = _runs_of_pieces(pieces, _split_sections("".join(pieces), section)[0])
        shown["cut"] = _left_out(len(node.token_ids) - count, "tokens")
    if node.kind == "action":
        shown["version"] = node.weight_version
        for name, logprobs in (("engine", node.behavior_logprobs), ("old", node.old_logprobs), ("ref", node.ref_logprobs)):
            shown[name] = [_short(logprob) for logprob in logprobs[:count]]
    return shown, after


def _left_out(count: int, unit: str) -> str:
    return f"{count:,} more {unit} left out" if count > 0 else ""


TAG = re.compile(r"<(/?)(think|tool_call|answer)>")


def _split_sections(text: str, section: str) -> tuple[list[tuple[str, int, int]], str]:
    """(section, start, stop) runs that cover `text`, and the section after it; tags belong to the section they open or close.

    >>> _split_sections("b</think>\\n<answer>42</answer>", "think")
    ([('think', 0, 9), ('text', 9, 10), ('answer', 10, 29)], 'text')
    """
    runs = []
    start = 0
    for tag in TAG.finditer(text):
        closes, name = tag[1] == "/", tag[2]
        # A tag that changes nothing, e.g. a closing one that was never opened, is text like any other.
        if closes != (name == section):
            continue
        edge = tag.end() if closes else tag.start()
        if edge > start:
            runs.append((section, start, edge))
        start, section = edge, "text" if closes else name
    if start < len(text):
        runs.append((section, start, len(text)))
    return runs, section


def _runs_of_pieces(pieces: Sequence[str], spans: Sequence[tuple[str, int, int]]) -> list[list[Any]]:
    """[section, [piece, ...]] runs: a token belongs to the section in which it begins."""
    runs: list[list[Any]] = []
    position = 0
    remaining = iter(spans)
    name, _, stop = next(remaining, ("text", 0, 0))
    for piece in pieces:
        while position >= stop and (following := next(remaining, None)):
            name, _, stop = following
        if not runs or runs[-1][0] != name:
            runs.append([name, []])
        runs[-1][1].append(piece)
        position += len(piece)
    return runs


def _tokenizer(config: Mapping[str, Any]) -> Tokenizer | None:
    """The policy's tokenizer, to show token by token; None where the folder is gone (turns are then shown as text)."""
    path = _at(config, "model.path")
    file = Path(path) / "tokenizer.json" if path else None
    return Tokenizer.from_file(str(file)) if file and file.is_file() else None


def _pieces(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str] | None:
    """Text of each token, so that they join to the decoded whole; None for a tokenizer whose tokens do not add up.

    A character made of several tokens goes to its last one; those before it are empty.
    """
    pieces = []
    pending: list[int] = []
    for token in token_ids:
        pending.append(token)
        text = tokenizer.decode(pending, skip_special_tokens=False)
        # An unfinished UTF-8 character decodes to U+FFFD; none is longer than four bytes.
        if text.endswith("\ufffd") and len(pending) < 4:
            pieces.append("")
            continue
        pieces.append(text)
        pending = []
    if pending:
        pieces[-1] = tokenizer.decode(pending, skip_special_tokens=False)
    whole = tokenizer.decode(list(token_ids), skip_special_tokens=False)
    return pieces if "".join(pieces) == whole else None

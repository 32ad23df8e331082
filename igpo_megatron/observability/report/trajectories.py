"""Rollout files as trees of nodes to read turn by turn, with the text of each token."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from tokenizers import Tokenizer

from igpo_megatron.observability.report.charts import Limits, rounded
from igpo_megatron.observability.report.header import value_at
from igpo_megatron.observability.rollout_dump import count_groups, read_rollouts
from igpo_megatron.observability.run_folder import step_of
from igpo_megatron.observability.tree_picture import tree_picture
from igpo_megatron.types import Node, RolloutGroup, Trajectory


def rollout_files(run_folder: Path) -> list[tuple[Path, str]]:
    """(file, label): the first, middle and last training step, then the first and last evaluation of each kind."""
    training = _files(run_folder / "rollouts")
    picked = [(path, f"Training, step {step_of(path)}") for path in _spread(training, 3)]
    kinds: dict[str, list[Path]] = {}
    for path in _files(run_folder / "eval"):
        kinds.setdefault(re.sub(r"^step_\d+_?", "", path.stem), []).append(path)
    evaluations = [
        (path, f"Held-out{', ' if kind else ''}{kind}, after step {step_of(path)}")
        for kind, paths in kinds.items()
        for path in _spread(paths, 2)
    ]
    return picked + evaluations


def files_left_out(run_folder: Path, shown: Sequence[tuple[Path, str]]) -> str:
    """One sentence about rollout files that are not on the page; empty if all are."""
    count = sum(len(_files(run_folder / folder)) for folder in ("rollouts", "eval"))
    return f"The page holds {len(shown)} of the run's {count} rollout files." if count > len(shown) else ""


def _files(folder: Path) -> list[Path]:
    """Rollout files of steps, in order; files of other names are not the run's."""
    return sorted(path for path in folder.glob("step_*.parquet") if step_of(path) is not None)


def _spread(paths: Sequence[Path], count: int) -> list[Path]:
    """At most `count` of them, evenly spread, both ends included."""
    if len(paths) <= count:
        return list(paths)
    return [paths[round(position * (len(paths) - 1) / (count - 1))] for position in range(count)]


def read_file(path: Path, label: str, tokenizer: Tokenizer | None, limits: Limits) -> dict[str, Any]:
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
    """A group for the page. Nodes keep their indices; nodes outside the shown trajectories are null."""
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
        "reward": rounded(trajectory.reward),
        "parts": {name: rounded(value) for name, value in trajectory.reward_parts.items()},
        "gains": [rounded(gain) for gain in trajectory.gains],
        "evidence": [rounded(gain) for gain in trajectory.evidence_gains],
        "advantages": [rounded(advantage) for advantage in trajectory.turn_advantages],
        "values": [rounded(values.get(-1 if node.parent is None else node.parent)) for node in group.actions(trajectory)],
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
    """A node for the page, and the section in which it ends. `section`: the one in which its parent ended."""
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
            shown[name] = [rounded(logprob) for logprob in logprobs[:count]]
    return shown, after


def _left_out(count: int, unit: str) -> str:
    return f"{count:,} more {unit} left out" if count > 0 else ""


TAG = re.compile(r"<(/?)(think|tool_call|answer)>")


def _split_sections(text: str, section: str) -> tuple[list[tuple[str, int, int]], str]:
    """(section, start, stop) runs that cover `text`, and the section in which it ends; tags belong to the section they open or close.

    >>> _split_sections("b</think>\\n<answer>42</answer>", "think")
    ([('think', 0, 9), ('text', 9, 10), ('answer', 10, 29)], 'text')
    """
    runs = []
    start = 0
    for tag in TAG.finditer(text):
        closes, name = tag[1] == "/", tag[2]
        # A tag that changes nothing, e.g. a closing tag without an opening one, is ordinary text.
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


def find_tokenizer(config: Mapping[str, Any]) -> Tokenizer | None:
    """The policy's tokenizer, to show single tokens; None if its file is missing (turns are then shown as text)."""
    path = value_at(config, "model.path")
    file = Path(path) / "tokenizer.json" if path else None
    return Tokenizer.from_file(str(file)) if file and file.is_file() else None


def _pieces(tokenizer: Tokenizer, token_ids: Sequence[int]) -> list[str] | None:
    """Text of each token; joined they are the decoded text. None for a tokenizer whose tokens do not add up.

    A character made of several tokens belongs to the last of them; the others are empty.
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

"""The published layouts of question files, and how to recognise each.

    IGPO        reward_model.ground_truth "alias<|answer_split|>alias" or a list, question in the one user message
    ARPO        reward_model.ground_truth one string, question in extra_info.question
    Search-R1   reward_model.ground_truth {"target": [alias, ...]}, question after "Question:" in the user message

Aliases keep their order and are never rewritten; system prompts in the data are ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from igpo_megatron.data.answers import NotAnswers, as_answers
from igpo_megatron.data.problems import shown
from igpo_megatron.untrusted import BadJson, json_loads_untrusted

ALIAS_SEPARATOR = "<|answer_split|>"
"""Between aliases in IGPO's `ground_truth`."""

LayoutName = Literal["auto", "igpo", "arpo", "search_r1"]

Row = dict[str, Any]
"""data_source, prompt [{role, content}], reward_model {ground_truth}, extra_info {...}: dicts, however the file stores the last two."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One published layout of questions."""

    name: str
    question: Callable[[Row], str]
    """Row -> question; the row has exactly one user message."""

    question_column: str
    answers: Callable[[Any], Sequence[str]]
    """Value of reward_model.ground_truth -> aliases. Raises NotAnswers."""


class Ambiguous(ValueError):
    """The rows fit two layouts that read them differently."""


def user_message(row: Row) -> str:
    """Text of the one user message."""
    return next(message["content"] for message in row["prompt"] if message["role"] == "user")


def own_question(row: Row) -> str | None:
    """`extra_info.question` if it is text, else None."""
    question = row["extra_info"].get("question")
    return question if isinstance(question, str) else None


def ground_truth(row: Row) -> Any:
    return row["reward_model"].get("ground_truth")


def _asked(row: Row) -> str:
    """Search-R1: the question column if the file has one, else the text after the instruction."""
    return row["question"] if isinstance(row.get("question"), str) else user_message(row).rpartition("Question:")[2].strip()


def igpo_truth(answers: Sequence[str]) -> str:
    """`ground_truth` that IGPO's layout reads as these aliases: joined, or a JSON list if a single one would itself be read as JSON."""
    joined = ALIAS_SEPARATOR.join(answers)
    try:
        is_read_so = tuple(_igpo_answers(joined)) == tuple(answers)
    except NotAnswers:
        is_read_so = False
    return joined if is_read_so else json.dumps(list(answers), ensure_ascii=False)


def _igpo_answers(truth: Any) -> Sequence[str]:
    # Text in quotes is JSON, too, but here it is an alias as published.
    is_plain = isinstance(truth, str) and (ALIAS_SEPARATOR in truth or truth.lstrip().startswith('"'))
    return truth.split(ALIAS_SEPARATOR) if is_plain else as_answers(truth)


def _arpo_answers(truth: Any) -> Sequence[str]:
    # Answers to mathematical questions, where [0, 1] is one answer.
    return (truth,) if isinstance(truth, str) else as_answers(truth)


LAYOUTS: dict[LayoutName, Layout] = {
    "igpo": Layout("IGPO", user_message, "prompt", _igpo_answers),
    "arpo": Layout("ARPO", lambda row: own_question(row) or "", "extra_info.question", _arpo_answers),
    "search_r1": Layout("Search-R1", _asked, "prompt", as_answers),
}


def recognise(rows: Sequence[Row]) -> Layout:
    """The layout of a file, judged by all of its valid rows. Raises Ambiguous."""
    truths = [ground_truth(row) for row in rows]
    if any(map(_has_target, truths)):
        return LAYOUTS["search_r1"]
    # No other layout writes a separator or a list.
    if any(isinstance(truth, list) or (isinstance(truth, str) and ALIAS_SEPARATOR in truth) for truth in truths):
        return LAYOUTS["igpo"]
    if not any(own_question(row) for row in rows):
        return LAYOUTS["igpo"]
    if any("need_tools_kwargs" in row["extra_info"] for row in rows):
        return LAYOUTS["arpo"]
    for row in rows:
        own, message = own_question(row), user_message(row)
        if own is not None and own.split() != message.split():
            raise Ambiguous(
                f"found the question {shown(own)} in extra_info.question and {shown(message)} in the user message: either may be meant; "
                "set data.layout (check: --layout) to arpo for the first or to igpo for the second"
            )
    has_system_prompts = all(any(message["role"] == "system" for message in row["prompt"]) for row in rows)
    return LAYOUTS["arpo" if has_system_prompts else "igpo"]


def _has_target(truth: Any) -> bool:
    if isinstance(truth, str) and truth.lstrip().startswith("{"):
        try:
            truth = json_loads_untrusted(truth)
        except BadJson:
            return False
    return isinstance(truth, Mapping) and "target" in truth


def as_mapping(value: Any) -> dict[str, Any]:
    """A struct, a map or JSON text of an object as a dict, empty for null and blank text. Raises NotAnswers for anything else."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return {}
    if isinstance(value, str):
        try:
            value = json_loads_untrusted(value)
        except BadJson as error:
            raise NotAnswers(f"found text that is not JSON ({error}): {shown(value)}") from None
        value = {} if value is None else value
    if isinstance(value, list) and all(isinstance(pair, tuple) for pair in value):
        keys = [key for key, _ in value]
        if len(set(keys)) < len(keys):
            raise NotAnswers(f"found the key {shown(next(key for key in keys if keys.count(key) > 1))} twice; keep one")
        value = dict(value)
    if not isinstance(value, dict):
        raise NotAnswers(f"found {shown(value)}, expected a struct, a map or the JSON text of an object")
    return value

"""Outcomes: how well an answer matches the accepted ones, in the two published normal forms.

The rules are those of the published code: set F1 on words and exact match (IGPO), exact match in which articles are ignored (Search-R1,
arXiv 2503.09516), F1 of multisets of words (ARPO, arXiv 2507.19849).

Text with an empty normal form cannot be scored: it equals an empty answer and has no words to share.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from igpo_megatron.settings import HookName, is_hook, load_hook, ours_or

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION_TO_SPACE = str.maketrans(string.punctuation, " " * len(string.punctuation))


def normalise(text: str) -> str:
    """Lower case, ASCII punctuation to spaces, whitespace collapsed; articles stay: `"The U.S.A."` -> `"the u s a"`."""
    return " ".join(text.lower().translate(_PUNCTUATION_TO_SPACE).split())


def normalise_squad(text: str) -> str:
    """Lower case, ASCII punctuation deleted, a/an/the left out, whitespace collapsed: `"The U.S.A."` -> `"usa"` (SQuAD, ARPO, Search-R1).

    As in SQuAD's own script an article ends at any character but a letter, digit or underscore, including dashes and quotes beyond ASCII.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def exact_match(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals any alias after `normalise`, else 0.0 (IGPO; articles count)."""
    return float(normalise(prediction) in {normalise(answer) for answer in answers})


def f1(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 over aliases between the *sets* of words, so repeated words count once; an empty side scores 0."""
    predicted = set(normalise(prediction).split())
    best = 0.0
    for answer in answers:
        expected = set(normalise(answer).split())
        if shared := len(predicted & expected):
            # 2PR / (P + R) with P = shared / |predicted| and R = shared / |expected|.
            best = max(best, 2 * shared / (len(predicted) + len(expected)))
    return best


def exact_match_squad(prediction: str, answers: Sequence[str]) -> float:
    """1.0 if the prediction equals any alias after `normalise_squad`, else 0.0 (SQuAD, Search-R1)."""
    return float(normalise_squad(prediction) in {normalise_squad(answer) for answer in answers})


def f1_multiset(prediction: str, answers: Sequence[str]) -> float:
    """Best F1 over aliases between the *multisets* of words after `normalise_squad` (ARPO, deep_research.py; HotpotQA's own script).

    Where either side is yes, no or noanswer, only the same word scores; SQuAD's own script knows no such words. An empty side scores 0.
    """
    predicted = normalise_squad(prediction)
    best = 0.0
    for answer in answers:
        expected = normalise_squad(answer)
        if predicted != expected and {predicted, expected} & {"yes", "no", "noanswer"}:
            continue
        left, right = Counter(predicted.split()), Counter(expected.split())
        if shared := (left & right).total():
            best = max(best, 2 * shared / (left.total() + right.total()))
    return best


class OutcomeEntry(NamedTuple):
    """One row of `REWARDS`."""

    function: Callable[[str, Sequence[str]], float]
    """(answer, accepted answers) -> score, 0 to 1."""

    normal_form: Callable[[str], str]
    """The form in which it compares texts."""


REWARDS: dict[str, OutcomeEntry] = {
    "f1": OutcomeEntry(f1, normalise),
    "em": OutcomeEntry(exact_match, normalise),
    "em_squad": OutcomeEntry(exact_match_squad, normalise_squad),
    "f1_multiset": OutcomeEntry(f1_multiset, normalise_squad),
}

if TYPE_CHECKING:  # mypy cannot see a type that is made of rows
    Outcome = str
else:
    Outcome = ours_or(HookName, Literal[tuple(REWARDS)])


def outcome_of(name: str) -> Callable[[str, Sequence[str]], float]:
    """The function of an outcome; a user's own one is imported. Raises UserError if that fails."""
    return load_hook("reward.outcome", name) if is_hook(name) else REWARDS[name].function


def normal_form(text: str, outcome: str) -> str:
    """`text` as an outcome compares it; `normalise` for a user's own one."""
    return normalise(text) if is_hook(outcome) else REWARDS[outcome].normal_form(text)

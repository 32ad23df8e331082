"""How answers are compared: the two published normal forms of a text. Rewards and the reading of questions share them.

A text whose normal form is empty cannot be scored: it equals an empty answer, and shares no word with itself.
"""

from __future__ import annotations

import re
import string

_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION_TO_SPACE = str.maketrans(string.punctuation, " " * len(string.punctuation))


def normalise(text: str) -> str:
    """Lower case, ASCII punctuation to spaces, whitespace collapsed; articles stay: `"The U.S.A."` -> `"the u s a"`."""
    return " ".join(text.lower().translate(_PUNCTUATION_TO_SPACE).split())


def normalise_squad(text: str) -> str:
    """Lower case, ASCII punctuation deleted, a/an/the left out, whitespace collapsed: `"The U.S.A."` -> `"usa"` (SQuAD, ARPO, Search-R1).

    As in SQuAD's own script an article ends at whatever is no letter, digit or underscore, a dash or quote beyond ASCII among them.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def normal_form(text: str, outcome: str) -> str:
    """`text` as `reward.outcome` compares it."""
    return normalise_squad(text) if outcome in ("f1_multiset", "em_squad") else normalise(text)

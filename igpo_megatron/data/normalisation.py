"""The two published normal forms in which answers are compared, for rewards and for reading questions.

Text with an empty normal form cannot be scored: it equals an empty answer and has no words to share.
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

    As in SQuAD's own script an article ends at any character but a letter, digit or underscore, including dashes and quotes beyond ASCII.
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_WITHOUT_PUNCTUATION)).split())


def normal_form(text: str, outcome: str) -> str:
    """`text` as `reward.outcome` compares it."""
    return normalise_squad(text) if outcome in ("f1_multiset", "em_squad") else normalise(text)

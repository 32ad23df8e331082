"""What a set of facts is made of: passages that state them, and questions with the chain of facts behind each answer.

    facts --phrase by hash--> Passage        the corpus
          --chain----------> Question        1 to 3 hops; the value of one is the entity of the next

Nothing here is random: choices are made by hashing, so that a set is a function of its sources.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from igpo_megatron.data.corpus import Passage
from igpo_megatron.types import Hop

Split = Literal["train", "test"]

TEST_SHARE = 0.25
"""Share of entities whose questions are held out."""


@dataclass(frozen=True, slots=True)
class Name:
    """A name with other accepted forms, ASCII, e.g. `Name("Iran", ("Islamic Republic of Iran",))`."""

    text: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Question:
    """A question and the chain of facts that leads to its answer."""

    id: str
    text: str
    answer: str
    aliases: tuple[str, ...]
    """Further accepted answers."""

    hops: tuple[Hop, ...]
    """In order; the last hop's value is the answer."""

    kind: str
    """Set, number of hops and relations, e.g. `world_2hop_city_capital`."""

    split: Split


@dataclass(frozen=True, slots=True)
class FactSet:
    """A corpus, and questions that only searching it can answer."""

    passages: tuple[Passage, ...]
    questions: tuple[Question, ...]


def phrased(doc_id: str, phrasings: tuple[str, ...], name: str, **facts: str) -> Passage:
    """The passage about `name` in one of the phrasings, chosen by its id."""
    return Passage(doc_id, name, phrasings[int(digest(doc_id), 16) % len(phrasings)].format(name=name, **facts))


def digest(text: str) -> str:
    """SHA-256, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


_LETTERS = str.maketrans("łŁøØđĐðÐħəƏ`", "lLoOdDdDhaA'", '"') | {
    ord("\N{LATIN SMALL LETTER DOTLESS I}"): "i",
    ord("\N{EN DASH}"): "-",
    **{ord(quote): "'" for quote in "\N{LEFT SINGLE QUOTATION MARK}\N{RIGHT SINGLE QUOTATION MARK}\N{MODIFIER LETTER TURNED COMMA}"},
    **{ord(letter): pair for letter, pair in (("ß", "ss"), ("æ", "ae"), ("Æ", "Ae"), ("œ", "oe"))},
}
"""Letters that have no decomposition into an ASCII letter and accents."""


def fold(text: str) -> str:
    """ASCII form of a name, accents dropped: `Łódź` -> `Lodz`. Empty where a letter has no ASCII form, so that no name is mutilated."""
    plain = "".join(letter for letter in unicodedata.normalize("NFKD", text.translate(_LETTERS)) if not unicodedata.combining(letter))
    return " ".join(plain.split()) if plain.isascii() else ""


def named(*forms: str | None) -> Name:
    """Folded, distinct forms of one thing: the first, less its brackets, is the name; the rest are aliases."""
    folded = [fold(form) for form in forms if form]
    spellings = [re.sub(r"\s*\(.*?\)", "", folded[0]).strip(), *folded]
    text, *aliases = [form for form in dict.fromkeys(spellings) if form]
    return Name(text, tuple(alias for alias in aliases if alias.lower() != text.lower()))

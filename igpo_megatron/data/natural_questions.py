"""Answers of Natural Questions: spans of a page's tokens, marked by one annotator (training) or five (dev).

simplified   document_text "A page <P> of tokens", annotations [{short_answers [{start_token, end_token}], yes_no_answer}]
original     document_tokens [{token, html_token}], the rest as above
Hugging Face annotations {short_answers [{text [...]}], yes_no_answer [-1 none, 0 no, 1 yes]}
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from igpo_megatron.data.answers import as_answers


def span_answers(row: Mapping[str, Any]) -> Iterator[str]:
    """Short answers of the simplified and original files, in order; none where only a long answer was marked."""
    tokens = row["document_text"].split(" ") if "document_text" in row else [token["token"] for token in row["document_tokens"]]
    for annotation in row["annotations"]:
        for span in annotation["short_answers"]:
            start, end = span["start_token"], span["end_token"]
            if not 0 <= start < end <= len(tokens):
                raise ValueError(f"the span {start} to {end} is not among the {len(tokens)} tokens")
            yield " ".join(tokens[start:end])
        if annotation["yes_no_answer"] in ("YES", "NO"):
            yield annotation["yes_no_answer"].lower()


def hub_answers(row: Mapping[str, Any]) -> Iterator[str]:
    """Short answers of the Hugging Face files."""
    annotations = row["annotations"]
    for short in annotations["short_answers"]:
        yield from as_answers(short["text"])
    for answer in annotations["yes_no_answer"]:
        if answer in (0, 1):
            yield ("no", "yes")[answer]

"""SmolLM2-135M-Instruct as a test bed: its folder, made once for all runs of the tests, and trees of English in its own tokens."""

from __future__ import annotations

import hashlib
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import checkpoint_conversion
from checkpoint_conversion.gguf_to_hf import demo_gguf, gguf_to_hf
from checkpoint_conversion.rules import ConversionError
from igpo_megatron.chat.tokenizer import load_tokenizer
from igpo_megatron.supervision.leftovers import claim, whole
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, Trajectory

ROOT = Path(__file__).resolve().parents[2]
PLACE = Path(sys.prefix) / "language-model"
"""In the environment whose packages the model comes from. It outlives the tests: dequantising takes longer than many of them."""

HEAD_DIM, ROPE_BASE = 64, 1e5

QUESTIONS = (
    (
        "Which currency is used in the country whose capital is Tokyo?",
        "The Japanese yen",
        (
            ("I need the country first.\nsearch: country with capital Tokyo", "Tokyo is the capital of Japan, an island country in Asia."),
            ("Tokyo lies in Japan.\nsearch: currency of Japan", "The yen is the official currency of Japan. Its code is JPY."),
            ("The answer is the Japanese yen.", ""),
        ),
    ),
    (
        "What is the chemical symbol of the metal that is named after the planet Mercury?",
        "Hg",
        (
            (
                "search: metal named after a planet",
                "Mercury, once called quicksilver, is the only metal that is liquid at room temperature.",
            ),
            ("The symbol of mercury comes from hydrargyrum, so the answer is Hg.", ""),
        ),
    ),
)
"""(question, answer, ((turn, result), ...))"""


def language_model() -> Path:
    """The folder that `igpo demo-model` makes, kept until a package or the conversion changes. Skips where the packages are missing."""
    try:
        gguf = demo_gguf()
    except ConversionError as error:
        pytest.skip(str(error))
    if missing := [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]:
        pytest.skip(f"{' and '.join(missing)}, which read the demo model, cannot be imported (make venv-llm)")
    key, note, lock = made_of(), PLACE.with_suffix(".txt"), PLACE.with_suffix(".lock")
    lock.touch()
    held = claim(lock)  # of two workers the second waits and finds the folder
    try:
        if not PLACE.is_dir() or not note.is_file() or note.read_text(encoding="utf-8") != key:
            with whole(PLACE) as part:
                gguf_to_hf(gguf, part)
            note.write_text(key, encoding="utf-8")
    finally:
        os.close(held)
    return PLACE


def made_of() -> str:
    """Hash of what decides the folder's content: both locks and the code that reads GGUF files."""
    code = Path(checkpoint_conversion.__file__).parent
    files = [ROOT / "requirements.lock", ROOT / "requirements-llm.lock", code / "gguf_to_hf.py", code / "gguf_file.py"]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def conversations(folder: Path) -> list[RolloutGroup]:
    """Two questions, two samples each: turns, results, and the right answer as a probe before every turn. About 150 tokens a path."""
    tokenizer = load_tokenizer(folder)

    def tokens(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    groups = []
    for number, (question, answer, turns) in enumerate(QUESTIONS):
        start = f"<|im_start|>system\nUse the search tool.<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        group = RolloutGroup(Prompt(str(number), question, (answer,), "test"), [Node(None, "prompt", tokens(start))])
        before, scored = tokens("The answer is"), tokens(f" {answer}.<|im_end|>")
        probe, place = before + scored, (len(before), len(before) + len(scored))
        for sample in range(2):
            path = [0]
            for turn, (said, result) in enumerate(turns, start=1):
                if turn > 1 or sample == 0:
                    group.add(Node(path[-1], "probe", probe, turn - 1, scored=place))
                action = tokens(said if sample == 0 else said.upper()) + tokens("<|im_end|>")
                path.append(group.add(Node(path[-1], "action", action, turn)))
                if result:
                    path.append(group.add(Node(path[-1], "observation", tokens(f"\n<|im_start|>user\n{result}<|im_end|>\n"), turn)))
            advantages = [0.7 - sample - 0.3 * turn for turn in range(len(turns))]
            group.trajectories.append(Trajectory(path, Status.FINISHED, turn_advantages=advantages))
        groups.append(group)
    return groups


@dataclass(frozen=True, slots=True)
class Gap:
    """How far log-probs of the same tokens lie apart, in nats."""

    mean: float
    worst: float

    def within(self, bound: Gap) -> bool:
        return self.mean <= bound.mean and self.worst <= bound.worst


BOUNDS = {"fp32": Gap(mean=5e-5, worst=3e-4), "bf16": Gap(mean=0.09, worst=1.5)}
"""Between the model in this dtype and in fp32, whoever computes it. Measured on 211 tokens of `conversations`, by Megatron at five layouts
and by vLLM: fp32 1e-5 and 5e-5, bf16 0.046 and 0.6. That a wrong answer lies beyond both is what test_language_model.py shows."""


def gap_between(found: Sequence[Sequence[float]], expected: Sequence[Sequence[float]]) -> Gap:
    """Of all tokens of all nodes. Raises ValueError where one side has more, AssertionError where one is not a number."""
    gaps = [abs(left - right) for one, other in zip(found, expected, strict=True) for left, right in zip(one, other, strict=True)]
    assert gaps and all(map(math.isfinite, gaps))
    return Gap(sum(gaps) / len(gaps), max(gaps))

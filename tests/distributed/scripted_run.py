"""`python scripted_run.py CONFIG.yaml [overrides]`: a whole run of one real Megatron rank whose engine says what a script says.

The script is the environment variable SCRIPT: JSON, for each turn the texts that samples take in rotation. All else is the run's own.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

from igpo_megatron.chat.tokenizer import load_tokenizer
from igpo_megatron.config.schema import Config
from igpo_megatron.engines import factory
from igpo_megatron.training.main import main
from igpo_megatron.types import Canary, Completion, ProbeScore


class ScriptedEngines:
    """An `EngineService` that needs no model."""

    def __init__(self, config: Config) -> None:
        self._tokenizer = load_tokenizer(config.model.path)
        self._script: list[list[str]] = json.loads(os.environ["SCRIPT"])
        self._version = 0
        self._asked: dict[tuple[str, int], int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...

    def sleep(self) -> None: ...

    async def generate(self, token_ids: list[int], *, max_tokens: int, key: str, **options: object) -> Completion:
        """Turn k says the next text of script[k]; k is the number of turns before it in the conversation."""
        turn = sum(self._tokenizer.decode(token_ids).count(text) for texts in self._script for text in texts)
        texts = self._script[min(turn, len(self._script) - 1)]
        count = self._asked[key, turn] = self._asked.get((key, turn), -1) + 1
        ids = [*self._tokenizer.encode(texts[count % len(texts)], add_special_tokens=False), self._tokenizer.eos_token_id][:max_tokens]
        return Completion(ids, [-1.0] * len(ids), "stop", weight_version=self._version)

    async def score_probe(self, token_ids: list[int], first: int, *, key: str) -> ProbeScore:
        return ProbeScore(tuple(-1.0 for _ in token_ids[first:]), self._version)

    def update_weights(
        self,
        named_tensors: Iterable[tuple[str, Any]],
        version: int,
        canary: Canary | None = None,
        exported: Callable[[], None] | None = None,
    ) -> Mapping[str, float]:
        for _ in named_tensors:
            pass
        if exported is not None:
            exported()
        self._version = version
        return {}


if __name__ == "__main__":
    factory.open_engines = ScriptedEngines  # type: ignore[assignment]
    sys.exit(main(sys.argv[1:]))

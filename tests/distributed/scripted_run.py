"""A whole run of real Megatron ranks whose engine says what a script says. All else is the run's own."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from conftest import become_rank

from igpo_megatron.chat.tokenizer import load_tokenizer
from igpo_megatron.config.schema import Config
from igpo_megatron.engines import factory
from igpo_megatron.training.main import main
from igpo_megatron.types import Canary, Completion, NamedTensors, ProbeScore, SamplingRequest

Script = Sequence[Sequence[str]]
"""For each turn the texts that samples take in rotation."""

STARTED = "the scripted engine has started"
FORK = multiprocessing.get_context("fork")


class ScriptedEngines:
    """An `EngineService` that needs no model. It says so when it starts."""

    def __init__(self, script: Script, config: Config) -> None:
        sys.stdout.write(STARTED)
        self._script = script
        self._tokenizer = load_tokenizer(config.model.path)
        self._version = 0
        self._asked: dict[tuple[str, int], int] = {}

    def begin(self) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def sleep(self) -> None: ...

    async def generate(self, request: SamplingRequest) -> Completion:
        """Turn k says the next text of script[k]; k is the number of turns before it in the conversation."""
        turn = sum(self._tokenizer.decode(request.token_ids).count(text) for texts in self._script for text in texts)
        texts = self._script[min(turn, len(self._script) - 1)]
        count = self._asked[request.key, turn] = self._asked.get((request.key, turn), -1) + 1
        ids = [*self._tokenizer.encode(texts[count % len(texts)], add_special_tokens=False), self._tokenizer.eos_token_id][
            : request.max_tokens
        ]
        return Completion(ids, [-1.0] * len(ids), "stop", weight_version=self._version)

    async def score_probe(self, token_ids: list[int], first: int, *, key: str) -> ProbeScore:
        return ProbeScore(tuple(-1.0 for _ in token_ids[first:]), self._version)

    def update_weights(
        self, named_tensors: NamedTensors, version: int, canary: Canary | None = None, exported: Callable[[], None] | None = None
    ) -> Mapping[str, float]:
        for _ in named_tensors:
            pass
        if exported is not None:
            exported()
        self._version = version
        return {}


def run(folder: Path, arguments: Sequence[str], script: Script, world: int = 1) -> tuple[list[int], str]:
    """`igpo_megatron.training.main` with these arguments on every rank: the exit codes, and what was printed.

    The ranks are forked, so that nothing is imported anew. They work in `folder`, which they can import from.
    """
    meeting = tempfile.mkdtemp(dir=folder)
    torch.set_num_threads(1)  # a pool of threads does not survive the fork, and a rank would wait for it
    open_engines = partial(ScriptedEngines, script)
    ranks = [FORK.Process(target=_rank, args=(rank, world, meeting, folder, arguments, open_engines)) for rank in range(world)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
        process.kill()
        process.join()
    return [process.exitcode or 0 for process in ranks], (folder / "printed.txt").read_text(encoding="utf-8")


def print_to(path: Path) -> None:
    """Let this process print to a file, with whatever it calls; pytest has both streams of Python."""
    sys.stdout = sys.stderr = path.open("a", encoding="utf-8", buffering=1)
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stdout.fileno(), 2)


def _rank(rank: int, world: int, meeting: str, folder: Path, arguments: Sequence[str], open_engines: Callable[[Config], Any]) -> None:
    print_to(folder / "printed.txt")
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    if world > 1:
        become_rank(rank, world, meeting)
    factory.open_engines = open_engines  # type: ignore[assignment]
    code = 99
    try:
        code = main(arguments)
    finally:
        sys.stdout.flush()
        os._exit(code)

"""Draw questions in an order that can be resumed at the exact row.

Prompts + (seed, number drawn) -> next Prompts
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, TypedDict

from igpo_megatron.data.layouts import LayoutName
from igpo_megatron.data.question_files import read_prompts
from igpo_megatron.types import Prompt, UserError


class StreamState(TypedDict):
    """What a checkpoint keeps of a `PromptStream`."""

    drawn: int
    open: list[int]
    fingerprint: str
    questions: int
    seed: int
    shuffle: bool
    balance: str


class PromptStream:
    """An endless order of questions that is a pure function of (questions, seed, shuffle, balance, number drawn).

    balance="none": epochs over all rows. balance="source": rounds in which every source gives one question, in an order that changes
    from round to round; each source runs through epochs of its own.

    A place in that order is an ordinal, from 0. Drawn questions stay open until `done`, and a resumed stream draws the open ones first:
    no question is lost or used twice, however many are in progress when a checkpoint is taken.
    """

    def __init__(
        self,
        files: Sequence[Path | str],
        *,
        seed: int,
        shuffle: bool,
        balance: Literal["none", "source"],
        layout: LayoutName = "auto",
        outcome: str = "f1",
    ):
        """Reads all files at once, by `layout` and `outcome` as `read_prompts` does. Raises UserError."""
        self.prompts = [prompt for path in files for prompt in read_prompts(path, layout, outcome)]
        if not self.prompts:
            raise UserError("no files of questions were given; name at least one parquet file in data.train")
        self.seed, self.shuffle, self.balance = seed, shuffle, balance
        self.drawn = 0
        """Ordinals below this one have been drawn."""

        self._open: set[int] = set()
        self._returned: list[int] = []
        self._rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(self.prompts):
            self._rows.setdefault(prompt.source if balance == "source" else "", []).append(row)
        self._orders: dict[str, tuple[int, list[int]]] = {}
        self._fingerprint = _fingerprint(self.prompts)

    def __len__(self) -> int:
        """Questions in one epoch."""
        return len(self.prompts)

    def draw(self, n: int) -> list[int]:
        """The next `n` ordinals; a resumed run first gets those that were open when it stopped."""
        returned, self._returned = self._returned[:n], self._returned[n:]
        new = n - len(returned)
        ordinals = [*returned, *range(self.drawn, self.drawn + new)]
        self.drawn += new
        self._open.update(ordinals)
        return ordinals

    def done(self, ordinals: Iterable[int]) -> None:
        """Mark ordinals as finished: trained, or dropped for good."""
        self._open.difference_update(ordinals)

    def state(self) -> StreamState:
        """Everything needed to continue from here, as JSON values."""
        return StreamState(
            drawn=self.drawn,
            open=sorted({*self._open, *self._returned}),
            fingerprint=self._fingerprint,
            questions=len(self.prompts),
            seed=self.seed,
            shuffle=self.shuffle,
            balance=self.balance,
        )

    def load_state(self, state: StreamState) -> None:
        """Continue where `state` was taken. Raises UserError if questions or order differ from the state's."""
        problems = []
        if state["fingerprint"] != self._fingerprint:
            problems.append(
                f"the training questions changed since the checkpoint ({state['questions']} then, {len(self.prompts)} now); "
                "restore the files of data.train or start a new run"
            )
        settings: tuple[tuple[str, object, object], ...] = (
            ("run.seed", state["seed"], self.seed),
            ("data.shuffle", state["shuffle"], self.shuffle),
            ("data.balance", state["balance"], self.balance),
        )
        for key, then, now in settings:
            if then != now:
                problems.append(f"{key} was {then!r} at the checkpoint and is {now!r} now; set it back or start a new run")
        if problems:
            raise UserError("cannot resume the order of questions:\n" + "\n".join(f"  - {problem}" for problem in problems))
        self.drawn, self._returned = state["drawn"], [*state.get("open", [])]

    def question(self, ordinal: int) -> Prompt:
        """The question at a place of the endless order."""
        sources = sorted(self._rows)
        turn, slot = divmod(ordinal, len(sources))
        source = sources[self._order("round", turn, len(sources))[slot]]
        rows = self._rows[source]
        epoch, place = divmod(turn, len(rows))
        return self.prompts[rows[self._order(f"source {source}", epoch, len(rows))[place]]]

    def _order(self, name: str, epoch: int, count: int) -> list[int]:
        """Order of `count` items in one epoch; the latest order per name is cached."""
        if self._orders.get(name, (None,))[0] != epoch:
            self._orders[name] = epoch, permutation(count, f"{self.seed}/{name}/{epoch}") if self.shuffle else list(range(count))
        return self._orders[name][1]


def permutation(count: int, key: str) -> list[int]:
    """Shuffle range(count) by hashing: the same on every machine and Python version, without a generator's state."""
    return sorted(range(count), key=lambda number: hashlib.blake2b(f"{key}/{number}".encode(), digest_size=8).digest())


def _fingerprint(prompts: Sequence[Prompt]) -> str:
    """Hash of all questions in order, independent of the files' paths."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(repr((prompt.id, prompt.question, prompt.answers, prompt.source)).encode())
    return digest.hexdigest()

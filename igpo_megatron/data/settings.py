"""Settings of the questions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from igpo_megatron.settings import Section


class Data(Section):
    """Questions."""

    train: tuple[Path, ...] = ()
    """Parquet files of training questions, in the layout of IGPO, ARPO or Search-R1."""

    eval: tuple[Path, ...] = ()
    """Parquet files of held-out questions."""

    layout: Literal["auto", "igpo", "arpo", "search_r1"] = "auto"
    """Layout of all these files. `auto` recognises each file's, and refuses a file that two layouts read differently."""

    shuffle: bool = True
    """Shuffle each epoch with `run.seed`; the order depends on seed and epoch only."""

    balance: Literal["none", "source"] = "none"
    """`source` draws every source equally often instead of in proportion to its rows."""

    def missing(self, part: Literal["train", "eval"]) -> Iterator[str]:
        """Why the questions of `data.train` or `data.eval` cannot be read."""
        paths = self.train if part == "train" else self.eval
        if not paths:
            yield f"data.{part} is empty; name at least one parquet file of questions (`igpo data prepare` makes one)"
        for path in paths:
            if not path.is_file():
                yield f"data.{part}: {path}: no such file"

"""The path of a corpus's index: FILE.jsonl.index/KIND-<digest of the passages and the index's settings>.

The builder and the server derive the path from the passages alone, so an unchanged corpus finds its index again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path

from igpo_megatron.data.corpus import Passage


class Digest:
    """A digest of what an index is made of: the passages in order, and the settings."""

    def __init__(self, *settings: str) -> None:
        self._state = hashlib.blake2b("\0".join(settings).encode(), digest_size=8)

    def of(self, passages: Iterable[Passage]) -> Iterator[Passage]:
        """The same passages; each is added to the digest as it passes."""
        for passage in passages:
            self._state.update("\0".join(("", passage.doc_id, passage.title, passage.text)).encode(errors="surrogatepass"))
            yield passage

    @property
    def hex(self) -> str:
        """16 hexadecimal digits."""
        return self._state.hexdigest()


def digest(passages: Iterable[Passage], *settings: str) -> str:
    """The same in one call."""
    state = Digest(*settings)
    for _ in state.of(passages):
        pass
    return state.hex


def bm25_settings() -> tuple[str, ...]:
    """What a bm25s index depends on besides the passages: the library's version determines the format."""
    return (version("bm25s"),)


def place(corpus: Path, kind: str, name: str) -> Path:
    """`wiki.jsonl` -> `wiki.jsonl.index/KIND-NAME`"""
    return corpus.with_name(corpus.name + ".index") / f"{kind}-{name}"

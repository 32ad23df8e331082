"""Settings of packed rows."""

from __future__ import annotations

from pydantic import PositiveInt

from igpo_megatron.settings import Section


class Packing(Section):
    """Rows of the packed batch."""

    row_tokens: PositiveInt = 8192
    """Token budget of a row; a tree longer than this is cut by repeating the path to the cut."""

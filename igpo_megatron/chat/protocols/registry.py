"""Every protocol by its name."""

from __future__ import annotations

from igpo_megatron.chat.protocols.base import ToolProtocol
from igpo_megatron.chat.protocols.hermes import HERMES
from igpo_megatron.chat.protocols.igpo import IGPO
from igpo_megatron.chat.protocols.tagged import ARPO, SEARCH_R1

PROTOCOLS: dict[str, ToolProtocol] = {"igpo": IGPO, "search_r1": SEARCH_R1, "arpo": ARPO, "hermes": HERMES}
"""`rollout.protocol` -> format."""

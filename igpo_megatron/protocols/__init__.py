"""How a policy writes tool calls and answers: small format objects of data and pure functions, chosen by `rollout.protocol`."""

from __future__ import annotations

from igpo_megatron.protocols.base import Action, Answer, Malformed, ToolProtocol, ToolSet
from igpo_megatron.protocols.hermes import HERMES
from igpo_megatron.protocols.igpo import IGPO
from igpo_megatron.protocols.tagged import ARPO, SEARCH_R1

__all__ = ["PROTOCOLS", "Action", "Answer", "Malformed", "ToolProtocol", "ToolSet"]

PROTOCOLS: dict[str, ToolProtocol] = {"igpo": IGPO, "search_r1": SEARCH_R1, "arpo": ARPO, "hermes": HERMES}
"""`rollout.protocol` -> format."""

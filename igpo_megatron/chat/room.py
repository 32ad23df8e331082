"""Checks that a question leaves room for an answer in the context."""

from __future__ import annotations

from igpo_megatron.agent.settings import Rollout
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.types import Prompt


def probe_tokens(prompt: Prompt, chat: ChatFormat) -> int:
    """Tokens of the longest ground-truth probe, which are kept free at the end of the context."""
    return max(len(chat.render_probe(answer)[0]) for answer in prompt.answers)


def too_long(prompt: Prompt, chat: ChatFormat, config: Rollout) -> str | None:
    """Why a question leaves no room for even one token of a first turn; None if it does."""
    asked = len(chat.open(prompt.question)[0]) + len(chat.opening(1)[0])
    kept_free = probe_tokens(prompt, chat)
    if asked + kept_free < config.max_context:
        return None
    return (
        f"the question takes {asked} tokens and {kept_free} are kept free for its probe, which leaves no room for a turn in "
        f"rollout.max_context={config.max_context}; raise it, or drop the row"
    )

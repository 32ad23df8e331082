"""Protocols by name; a user's own by `package.module:name`. A new protocol is one file and one row in `PROTOCOLS`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from igpo_megatron.agent.settings import Rollout
from igpo_megatron.chat.protocols.base import BUILT_IN, Action, Answer, Malformed, ToolProtocol, ToolSet
from igpo_megatron.chat.protocols.hermes import HERMES
from igpo_megatron.chat.protocols.igpo import IGPO
from igpo_megatron.chat.protocols.tagged import ARPO, SEARCH_R1
from igpo_megatron.settings import is_hook, load_hook, unknown
from igpo_megatron.tools.registry import describe
from igpo_megatron.types import SEARCH, ToolCall, UserError

PROTOCOLS: dict[str, ToolProtocol] = {"igpo": IGPO, "search_r1": SEARCH_R1, "arpo": ARPO, "hermes": HERMES}
"""`rollout.protocol` -> format."""

KEY = "rollout.protocol"
MALFORMED = ("", "<", "</think></answer>", "<think><tool_call>{", '<tool_call>{"name": 1}</tool_call>', "\x00\ud800 <search></search>")
"""Turns that every protocol must read without raising."""


def protocol_of(rollout: Rollout) -> ToolProtocol:
    """A built-in protocol, or a user's: `package.module:name` of a ToolProtocol or of a function that returns one. Raises UserError."""
    name = rollout.protocol
    if name in PROTOCOLS:
        protocol = PROTOCOLS[name]
    elif is_hook(name):
        found = load_hook(KEY, name, ToolProtocol)
        protocol = found if isinstance(found, ToolProtocol) else found()
        if not isinstance(protocol, ToolProtocol):
            raise UserError(
                f"{KEY}: {name}() gives a {type(protocol).__name__}; expected an igpo_megatron.chat.protocols.base.ToolProtocol"
            )
    else:
        raise UserError(unknown(KEY, name, PROTOCOLS))
    own = [f"</{tool.name}>" for tool in describe(rollout.extra_tools) if BUILT_IN.named(tool.name) is None]
    return replace(protocol, stop=(*protocol.stop, *own)) if protocol.call_tags else protocol


def tool_set(rollout: Rollout) -> ToolSet:
    """The tools in the form that protocols use. UserError if one of the user's cannot be used."""
    return ToolSet(rollout.tool_name, rollout.max_queries, describe(rollout.extra_tools))


def problems(rollout: Rollout) -> Iterator[str]:
    """Problems of `rollout.protocol`: an unknown name, or a user's protocol that cannot read what it writes."""
    try:
        protocol, tools = protocol_of(rollout), tool_set(rollout)
    except UserError as error:
        yield str(error)
        return
    if is_hook(rollout.protocol):
        yield from (f"{KEY}: {rollout.protocol}{problem}" for problem in unsound(protocol, tools))


def unsound(protocol: ToolProtocol, tools: ToolSet) -> Iterator[str]:
    """A protocol's errors for an answer, one call of each tool, and malformed turns."""
    actions: list[ToolCall | Answer] = [ToolCall(SEARCH, ("the Blue Nile",)), Answer("Oslo")]
    actions += [ToolCall(tool.name, ("x",)) for tool in tools.extra]
    for action in actions:
        try:
            turn = protocol.write("I think so.", action, tools)
            read: Action = protocol.parse(turn, tools)
            if read != action:
                yield f".parse reads {turn!r}, which .write made of {action}, as {read}"
            elif isinstance(action, Answer) and protocol.final_answer([turn]) is None:
                yield f".final_answer finds no answer in {turn!r}"
        except Exception as error:  # noqa: BLE001  (a user's function can raise anything; it is reported)
            yield f" cannot write and read {action}: {type(error).__name__}: {error}"
    for text in MALFORMED:
        try:
            read = protocol.parse(text, tools)
        except Exception as error:  # noqa: BLE001  (likewise)
            yield f".parse raises {type(error).__name__}: {error} for {text!r}; it must return Malformed(reason) for what it cannot read"
            continue
        if not isinstance(read, ToolCall | Answer | Malformed) or (not text and not isinstance(read, Malformed)):
            yield f".parse gives {read!r} for {text!r}; expected Malformed(reason)" + ("" if not text else ", a ToolCall or an Answer")

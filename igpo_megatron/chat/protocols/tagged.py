"""Tag protocols in one long assistant message: Search-R1 (arXiv 2503.09516) and ARPO (arXiv 2507.19849).

    Search-R1   <think>...</think> <search>query</search> <information>passages</information> <think>...</think> <answer>...</answer>
    ARPO        <think>...</think> <python>code</python> <result>output</result> ... <answer>... \\boxed{...}</answer>

A call's closing tag ends the turn (`stop`); the result is appended and the policy continues. Unlike in the published code, a malformed
turn ends the trajectory with its own status (Search-R1 adds a hint, ARPO ends silently), nothing is tokenised twice, and only sampled
tokens are trained. Both also accept `<visit>address goal</visit>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from igpo_megatron.chat.protocols.base import BUILT_IN, Action, Answer, Malformed, ToolProtocol, ToolSet, balanced
from igpo_megatron.chat.protocols.igpo import refuse_tags
from igpo_megatron.tools.base import Description
from igpo_megatron.types import SEARCH, ToolCall
from igpo_megatron.untrusted import clean_text

CALL_TAGS = (SEARCH, *(tool.name for tool in BUILT_IN.extra))
"""Tags read as calls even if the run does not have the tool; the policy is then shown the tools that exist."""

STOP = tuple(f"</{tag}>" for tag in CALL_TAGS)
BOX = "\\boxed{"


def parse(text: str, tools: ToolSet) -> Action:
    """The first closing tag decides. Its content starts at its last opening, so a tag mentioned in a thought is harmless."""
    text = clean_text(text)
    tags = _tags(tools)
    ends = [(position, tag) for tag in (*tags, "answer") if (position := text.find(f"</{tag}>")) >= 0]
    if not ends:
        return Malformed(f"no closed tag of {', '.join(tags)} or answer")
    end, tag = min(ends)
    start = text.rfind(f"<{tag}>", 0, end)
    if start < 0:
        return Malformed(f"</{tag}> was never opened")
    content = text[start + len(tag) + 2 : end]
    if tag == "answer":
        return Answer(boxed(content) or content.strip())
    if not content.strip():
        return Malformed(f"<{tag}> is empty")
    tool = tools.named(tag) or BUILT_IN.named(tag)
    if tool is not None and tool.verbatim:
        return ToolCall(tag, (content.strip("\n"),))
    return ToolCall(tag, tuple(content.split(None, len(tool.arguments) - 1)) if tool and len(tool.arguments) > 1 else (content.strip(),))


def _tags(tools: ToolSet) -> list[str]:
    """Tags of all calls."""
    return list(dict.fromkeys([*CALL_TAGS, *(tool.name for tool in tools.extra)]))


def write(thought: str, action: ToolCall | Answer, tools: ToolSet = BUILT_IN, *, box: bool) -> str:
    """One turn."""
    tags = (*_tags(tools), "answer")
    refuse_tags(thought, "think", *tags)
    if isinstance(action, Answer):
        refuse_tags(action.text, *tags, "think")
        inner = f"{BOX}{action.text}}}" if box else action.text
        return f"<think>{thought}</think>\n<answer>{inner}</answer>"
    tag = action.name if tools.named(action.name) else SEARCH
    if tag == SEARCH and len(action.queries) != 1:
        raise ValueError(f"{len(action.queries)} queries in one call; this protocol writes one")
    content = " ".join(action.queries)
    refuse_tags(content, *tags)
    return f"<think>{thought}</think>\n<{tag}>{content}</{tag}>"


def boxed(text: str) -> str | None:
    """Content of the last \\boxed{...}, braces matched; None if there is none or it is not closed."""
    start = text.rfind(BOX)
    depth = 1
    for position in range(start + len(BOX), len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len(BOX) : position].strip()
    return None


def search_r1_answer(turns: Sequence[str]) -> str | None:
    """The answer, if there is exactly one, all tags are balanced and the policy wrote no result itself."""
    text = "".join(turns)
    return _answer(text) if balanced(text, ("think", "answer", *CALL_TAGS)) and "information>" not in text else None


def arpo_answer(turns: Sequence[str]) -> str | None:
    """The boxed text, if there is exactly one answer with a box in it, at least one thought, all tags are balanced, no result is forged."""
    text = "".join(turns)
    good = "<think>" in text and balanced(text, ("think", "answer", *CALL_TAGS)) and "result>" not in text
    answer = _answer(text) if good else None
    return boxed(answer) if answer is not None else None


def _answer(text: str) -> str | None:
    if text.count("<answer>") != 1:
        return None
    return text.partition("<answer>")[2].partition("</answer>")[0].strip()


def _line(tool: Description) -> str:
    inside, does = tool.tag or (", then ".join(tool.arguments), tool.purpose)
    return f"- <{tool.name}>{inside}</{tool.name}> {does}"


def instructions(tools: ToolSet, result: str, ending: str) -> str:
    """Instructions for the policy; `result` is the tag of results."""
    lines = "\n".join(["- <search>a query</search> searches for passages", *map(_line, tools.extra)])
    return (
        "Answer the question. Reason first, between <think> and </think>, and again whenever you have learnt something. "
        f"Where knowledge is missing, use a tool, as often as you need:\n{lines}\n"
        f"Its result will stand between <{result}> and </{result}>; never write one yourself. {ending}"
    )


SEARCH_R1 = ToolProtocol(
    parse=parse,
    write=partial(write, box=False),
    final_answer=search_r1_answer,
    tool_messages=False,
    instructions=partial(
        instructions,
        result="information",
        ending="When you know the answer, write it between <answer> and </answer>, as short as it can be.",
    ),
    instructions_in="user",
    stop=(*STOP, "</answer>"),
    call_tags=True,
    result=("\n\n<information>", "</information>\n\n"),
    hit="Doc {rank}(Title: {title}) {text}",
)

ARPO = ToolProtocol(
    parse=parse,
    write=partial(write, box=True),
    final_answer=arpo_answer,
    tool_messages=False,
    instructions=partial(
        instructions,
        result="result",
        ending=f"When you know the answer, write it between <answer> and </answer>, the exact answer in {BOX}}} at its end.",
    ),
    stop=STOP,
    call_tags=True,
    result=(" <result>\n", "\n</result>"),
    hit="Page {rank}: {text}",
)

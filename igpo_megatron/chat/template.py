"""What a model's chat template does with a conversation, found by rendering marked texts; unusable templates are refused at the start.

    [system, user]           a system message is accepted; the tools appear; how the assistant's turn opens
    [user, assistant, user]  the token behind an assistant's message
    [user, assistant, tool]  the frame of a tool's result, and how its text is quoted

Every refusal is one sentence that names a line of the template.
"""

from __future__ import annotations

import json
import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from igpo_megatron.types import UserError

Message = dict[str, Any]

SYSTEM, USER, ASSISTANT, TOOL, CALL = (f"MARK-OF-{role}" for role in ("SYSTEM", "USER", "ASSISTANT", "TOOL", "CALL"))
"""Texts that no template contains; none is a prefix of another."""

RESULT_TAGS = ("<tool_response>\n", "\n</tool_response>")
"""Around a result that has to be a user message, as in Qwen's own templates."""

_CALL_ID = "call00001"  # Mistral's templates require nine letters and digits
_OPEN_THINK = re.compile(r"<think>(?:(?!</think>).)*\Z", re.DOTALL)
_EMPTY_THINK = re.compile(r"<think>\s*</think>\s*\Z")
_CONTROL = re.compile(r"<[|\uff5c][^<>|\uff5c\s]+[|\uff5c]>")
_TAG = re.compile(r"<[^<>\n]+>")
_SAMPLES = ('it\'s "x" \\ <b> & \u00fc\n\tend', "  spaces \n")


class TemplateProblem(UserError):
    """The template cannot write a conversation, or omits part of it."""


@dataclass(frozen=True, slots=True)
class Quoting:
    """How a template writes a result's text."""

    strip: bool = False
    """Without spaces around it."""

    escape: Literal["none", "json", "ascii"] = "none"
    """As inside a JSON string; `ascii` also escapes what is not ASCII."""

    def __call__(self, text: str) -> str:
        text = text.strip() if self.strip else text
        return text if self.escape == "none" else json.dumps(text, ensure_ascii=self.escape == "ascii")[1:-1]


QUOTINGS = tuple(Quoting(strip, escape) for strip in (False, True) for escape in ("none", "json", "ascii"))


@dataclass(frozen=True, slots=True)
class Frame:
    """The text around a tool's result."""

    before: str
    """Starts at the end of the assistant's text, end-of-turn token included."""

    after: str
    """Ends where the assistant continues, without `opening`."""

    opening: str
    """The open `<think>` with which the template begins the assistant's next turn, if it does; else empty."""

    quoting: Quoting
    role: str
    """Role of the result's message: `tool`; `user` if the template has no tool role; `assistant` if it is no message of its own."""

    messages: tuple[Message, ...] = ()
    """The marked question, turn and result that the template wrote."""


class Template:
    """A tokenizer's chat template and its detected behaviour."""

    def __init__(self, tokenizer: Any, tools: Sequence[Message] = (), now: datetime | None = None, *, has_system: bool = True) -> None:
        """`tools` are described by the template if it can (see `describes_tools`). `now`: the fixed date that it may write.

        `has_system`: conversations begin with a system message if one is accepted; some templates describe tools only there.

        Raises UserError if there is no template, TemplateProblem if it cannot write even a question.
        """
        if not tokenizer.chat_template:
            raise UserError("the model's tokenizer has no chat template; add chat_template.jinja to model.path")
        self._tokenizer, self._now = tokenizer, now
        self._tools: list[Message] | None = None
        self.notes: list[str] = []
        """One sentence per workaround for something the template lacks."""

        self.takes_system = self._probe_system()
        self.describes_tools = self._probe_tools(list(tools), self.head() if has_system else []) if tools else False
        self._header = self._missing_header([question()], USER)
        self.opening = _opened(self.render([*self.head(), question()], generate=True).rpartition(USER)[2] + self._header)

    def render(self, messages: Sequence[Message], *, generate: bool) -> str:
        """The template's own text. Raises TemplateProblem naming the line at which it refuses."""
        held = {"strftime_now": self._now.strftime} if self._now is not None else {}
        try:
            text = self._tokenizer.apply_chat_template(
                list(messages), tools=self._tools, add_generation_prompt=generate, tokenize=False, **held
            )
        except Exception as error:  # noqa: BLE001 (a template can raise anything)
            roles = " and ".join(message["role"] for message in messages)
            said = " ".join(str(error).split())
            raise TemplateProblem(f"the chat template cannot write a conversation of {roles}: {said} ({self._line_of(error)})") from None
        assert isinstance(text, str)
        return text

    def open(self, messages: Sequence[Message]) -> str:
        """The conversation up to the assistant's turn, without the template's own `opening`."""
        return (self.render(messages, generate=True) + self._header).removesuffix(self.opening)

    def prove(self, messages: Sequence[Message]) -> None:
        """Raise TemplateProblem if a line of `messages` does not reach the prompt unchanged."""
        text = self.open(messages)
        lines = [line.strip() for message in messages for line in message["content"].splitlines()]
        if lost := [line for line in lines if not _holds(text, [line])]:
            role = next(message["role"] for message in messages if lost[0] in message["content"])
            where = self._closest(role, "content")
            raise TemplateProblem(f"the chat template cuts or rewrites the {role} message, from {lost[0][:40]!r} on ({where})")

    def control_texts(self, *more: str) -> frozenset[str]:
        """Tokens in a prompt, and in `more` text of the template, that look like the beginning or end of a message."""
        text = "".join((self.render([*self.head(), question()], generate=True), self._header, *more))
        special = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        return frozenset(token for token in special | set(_CONTROL.findall(text)) if token in text)

    def head(self) -> list[Message]:
        """A marked system message, if one is accepted."""
        return [{"role": "system", "content": SYSTEM}] if self.takes_system else []

    # ---- proofs

    def _probe_system(self) -> bool:
        plain = self.render([question()], generate=True)
        if USER not in plain:
            raise TemplateProblem(f"the chat template leaves out the user's message ({self._closest('user')})")
        try:
            text = self.render([{"role": "system", "content": SYSTEM}, question()], generate=True)
        except TemplateProblem as error:
            self.system_problem = str(error)
            return False
        self.system_problem = f"the chat template leaves out the system message ({self._closest('system')})"
        return SYSTEM in text and USER in text

    def _probe_tools(self, tools: list[Message], head: list[Message]) -> bool:
        """True if the name and description of every tool reach the prompt; else the template is not given the tools."""
        self._tools = tools
        why = f"the chat template leaves out the tools ({self._closest('tools')})"
        try:
            text = self.render([*head, question()], generate=True)
        except TemplateProblem as error:
            text, why = "", str(error)
        words = [tool["function"][key] for tool in tools for key in ("name", "description")]
        if _holds(text, [*words, *(message["content"] for message in (*head, question()))]):
            return True
        self._tools = None
        self.notes.append(f"{why}, so the instruction describes them")
        return False

    def end_of_turn(self) -> int | None:
        """The token that the template writes after an assistant's message; None if it writes plain text or nothing.

        Raises TemplateProblem if it looks like one token and is several.
        """
        openers = set(self._encode(self.render([question()], generate=False).split(USER)[0]))
        special = {number for number, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        for more in ([], [{"role": "user", "content": CALL}]):
            try:
                text = self.render([question(), answer(), *more], generate=False).partition(ASSISTANT)[2].partition(CALL)[0]
            except TemplateProblem:
                continue
            # Before another message it may be plain text that opens that message.
            spelled = (_CONTROL if more else _TAG).match(text.lstrip())
            if spelled and len(ids := self._encode(spelled[0])) > 1:
                raise TemplateProblem(
                    f"the chat template ends a turn with {spelled[0]} ({self._closest(spelled[0])}), which the tokenizer writes as "
                    f"{len(ids)} tokens: add it to the tokenizer as a special token, or choose a template whose end it knows"
                )
            found = next((token for token in self._encode(text) if token in special), None)
            # Before another message it may be the token that opens that message.
            if found is not None and (not more or found not in openers):
                return found
        return None

    def frame(self, end: int, tool_name: str) -> Frame:
        """The frame of a tool's result, in the first form of conversation that the template writes completely.

        `end`: the end-of-turn token. Raises the TemplateProblem of the first form if no form works.
        """
        problems: list[TemplateProblem] = []
        for messages in _forms(tool_name):
            try:
                frame = self._frame_of(messages, self._tokenizer.convert_ids_to_tokens(end))
            except TemplateProblem as error:
                problems.append(error)
                continue
            if frame.role == "user":
                self.notes.append(f"{problems[0]}, so tool results are user messages between {' and '.join(map(str.strip, RESULT_TAGS))}")
            return frame
        raise problems[0]

    def _frame_of(self, messages: list[Message], end: str) -> Frame:
        conversation = [*self.head(), *messages]
        role = messages[-1]["role"]
        text = self.render(conversation, generate=True)
        said, _, rest = text.rpartition(CALL) if CALL in text else text.partition(ASSISTANT)
        if not said or TOOL not in rest:
            missing = role if said else "assistant"
            raise TemplateProblem(f"the chat template leaves out {missing} messages ({self._closest(missing)})")
        before, after = rest.split(TOOL, 1)
        if CALL in text:  # what closes the call belongs to the policy
            if end not in before:
                raise TemplateProblem(f"the chat template does not end the turn of a call ({self._closest('tool_calls')})")
            before = end + before.partition(end)[2]
        after += self._missing_header(conversation, TOOL)
        opening = _opened(after)
        return Frame(before, after.removesuffix(opening), opening, self._quoting(conversation, text), role, tuple(messages))

    def _quoting(self, conversation: list[Message], marked: str) -> Quoting:
        """How the last message's text is written."""
        *others, last = conversation
        start, stop = marked.split(TOOL, 1)

        def written(text: str) -> str:
            return self.render([*others, {**last, "content": last["content"].replace(TOOL, text)}], generate=True)

        found = {text: written(text) for text in _SAMPLES}
        for quoting in QUOTINGS:
            if all(found[text] == start + quoting(text) + stop for text in _SAMPLES):
                return quoting
        raise TemplateProblem(f"the chat template rewrites the text of {last['role']} messages ({self._closest(last['role'], 'content')})")

    def _missing_header(self, conversation: list[Message], mark: str) -> str:
        """The text before an assistant's message, if the template should open one after `mark` and does not; else empty."""
        shown = self.render(conversation, generate=True).rpartition(mark)[2]
        if shown != self.render(conversation, generate=False).rpartition(mark)[2]:
            return ""
        if mark == TOOL and self.render([question()], generate=True) == self.render([question()], generate=False) and not self._header:
            return ""  # it never opens a turn, as Mistral's
        follows = {"role": "assistant", "content": ASSISTANT if mark == USER else CALL}
        text = self.render([*conversation, follows], generate=False).rpartition(mark)[2]
        header, found, _ = text.partition(follows["content"])
        header = _EMPTY_THINK.sub("", header)
        if not found:
            raise TemplateProblem(f"the chat template leaves out assistant messages ({self._closest('assistant')})")
        if not header.startswith(shown):
            raise TemplateProblem(f"the chat template does not open the assistant's turn ({self._closest('add_generation_prompt')})")
        header = header.removeprefix(shown)
        header = header if header.strip() else ""  # a space there is written by the assistant
        return header if mark == USER or _opened(header) else header + self.opening

    # ---- lines

    def _line_of(self, error: Exception) -> str:
        numbers = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "<template>"]
        number = getattr(error, "lineno", None) or (numbers[-1] if numbers else None)
        return self._shown(number) if number else "no line of it"

    def _closest(self, *words: str) -> str:
        """The line most related to `words`: the last that quotes one of them, or contains one, or reads `messages`."""
        lines = self._source().splitlines()
        quoted = [rf"['\"]{re.escape(word)}['\"]" for word in words]
        for pattern in (*quoted, *(re.escape(word) for word in reversed(words)), r"\bmessages\b", ""):
            for number in range(len(lines), 0, -1):
                if re.search(pattern, lines[number - 1]):
                    return self._shown(number)
        return "it is empty"

    def _shown(self, number: int) -> str:
        lines = self._source().splitlines()
        line = lines[number - 1].strip() if number <= len(lines) else ""
        return f"line {number}: {line[:100]}{'...' if len(line) > 100 else ''}"

    def _source(self) -> str:
        source = self._tokenizer.chat_template
        return str(self._tokenizer.get_chat_template(tools=self._tools) if isinstance(source, dict) else source)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def question() -> Message:
    return {"role": "user", "content": USER}


def answer() -> Message:
    return {"role": "assistant", "content": ASSISTANT}


def _forms(tool_name: str) -> Iterator[list[Message]]:
    """Ways to write a call and its result, the simplest first: templates differ in what they require."""
    result: Message = {"role": "tool", "content": TOOL}
    named: Message = {**result, "tool_call_id": _CALL_ID, "name": tool_name}
    call = {"id": _CALL_ID, "type": "function", "function": {"name": tool_name, "arguments": {"query": [CALL]}}}
    yield [question(), answer(), result]
    yield [question(), answer(), {**result, "tool_call_id": _CALL_ID}]
    yield [question(), answer(), named]
    yield [question(), {**answer(), "tool_calls": [call]}, named]
    yield [question(), answer(), {"role": "user", "content": TOOL.join(RESULT_TAGS)}]


def _holds(text: str, words: Sequence[str]) -> bool:
    """True if each of `words` is in `text`, unchanged or as in a JSON string."""
    return all(word in text or json.dumps(word)[1:-1] in text for word in words)


def _opened(text: str) -> str:
    """The `<think>` that is open at the end of `text`, with the text after it."""
    found = _OPEN_THINK.search(text)
    return found[0] if found else ""

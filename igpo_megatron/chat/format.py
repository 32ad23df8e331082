"""The conversation as tokens: rendered once, then only appended to; no text is ever tokenised twice.

    open(question) ─┬─> prompt ids          chat template, once
    opening(turn) ──┤   `<think>`            the template's own or forced; never trained
    (sampled) ──────┤   the engine's own ids
    observation() ──┴─> tool result ids      its frame from the template or the protocol, its content alone, cut by tokens

The template's handling of roles, tools and results is verified at the start (template.py). A result is never more than text: turns end
at sampled tokens only, and protocols parse the policy's own text only.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from datetime import UTC, datetime
from itertools import chain
from typing import Any

from igpo_megatron.agent.settings import Rollout
from igpo_megatron.algorithms.settings import Reward
from igpo_megatron.chat.protocols.base import ALL_TAGS, Action, Answer, Malformed
from igpo_megatron.chat.protocols.json_calls import tool_instructions, tool_schemas
from igpo_megatron.chat.protocols.registry import protocol_of, tool_set
from igpo_megatron.chat.template import USER, Frame, Message, Quoting, Template
from igpo_megatron.chat.turn_ends import turn_ends
from igpo_megatron.types import ToolCall
from igpo_megatron.untrusted import clean_text

__all__ = ["Action", "Answer", "ChatFormat", "Malformed"]

FORCED_TEXT = "<think>"


class ChatFormat:
    """One tokenizer's way of writing questions, tool results and probes."""

    def __init__(self, tokenizer: Any, rollout: Rollout, reward: Reward, now: datetime | None = None) -> None:
        """`tokenizer`: a fast Hugging Face tokenizer with a chat template. Raises UserError if the template cannot be used."""
        now = now or datetime.now(UTC)
        self._tokenizer = tokenizer
        self._rollout, self._reward = rollout, reward
        self.protocol, self._tools = protocol_of(rollout), tool_set(rollout)
        native = rollout.tool_in_prompt and self.protocol.tool_messages
        self.template = Template(tokenizer, tool_schemas(self._tools) if native else (), now, has_system=rollout.system_prompt is not None)
        self.turn_ends = turn_ends(tokenizer, self.template)
        """Tokens that end a turn; the first is the one that the template writes after an assistant's message."""

        pieces = [tokenizer.encode(text, add_special_tokens=False) for text in ("a", "b", "\n")]
        self._lead: list[int] = [] if tokenizer.decode([*pieces[0], *pieces[1]]) == "ab" else pieces[2]
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special and len(token.content) > 1]
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._place_instructions(now.date().isoformat())
        self._place_frame()
        self.asking_text = self._probe_template.partition("{answer}")[0]
        self.asking_ids: list[int] = self._encode(self.asking_text)
        self._probes: dict[str, tuple[list[int], tuple[int, int]]] = {}

    def _place_instructions(self, date: str) -> None:
        """Set the system message, and the text before the question in the first user message."""
        system = self._rollout.system_prompt
        parts = [system.replace("{date}", date)] if system is not None else []
        self._before_question = ""
        if self._rollout.tool_in_prompt:
            if self.protocol.instructions is not None:
                instructions = self.protocol.instructions(self._tools)
                if self.protocol.instructions_in == "system":
                    parts.append(instructions)
                else:
                    self._before_question = f"{instructions}\n\nQuestion: "
            elif not self.template.describes_tools:
                parts.append(tool_instructions(self._tools))
        self._system = "\n\n".join(parts) if parts else None
        if self._system is not None and not self.template.takes_system:
            self.template.notes.append(f"{self.template.system_problem}, so the instruction is in the first user message")
            self._before_question, self._system = f"{self._system}\n\n{self._before_question}", None
        self.template.prove(self.messages(USER))

    def _place_frame(self) -> None:
        """Set what surrounds a result, what each turn begins with, and which texts only the template may write."""
        forced = FORCED_TEXT if self._rollout.force_think else ""
        if self.protocol.tool_messages:
            frame = self.template.frame(self.end_of_turn, self._rollout.tool_name)
        else:  # later turns continue the same message
            frame = Frame(*self.protocol.result, opening="", quoting=Quoting(), role="assistant")
        self.frame, self._quoting = frame, frame.quoting
        self._whole_before, self._after_tool = self._encode(frame.before), self._encode(frame.after)
        self._before_tool = self._behind(self.end_of_turn)
        self._openings = [(self._encode(text), text) for text in (self.template.opening or forced, frame.opening or forced)]
        # If every turn opens with `<think>`, its probe must not open it again.
        template = self._reward.probe_template
        self._probe_template = template.removeprefix(FORCED_TEXT) if all(text for _, text in self._openings) else template
        ends = self._tokenizer.convert_ids_to_tokens(list(self.turn_ends))
        control = self.template.control_texts(frame.before, frame.after, *ends)
        self._ends = [end for end in ends if end in control]
        spelled = sorted(control.difference(*([f"<{tag}>", f"</{tag}>"] for tag in ALL_TAGS)), key=len, reverse=True)
        self._control = re.compile("|".join(map(re.escape, spelled))) if spelled else None

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence per workaround for something the chat template lacks; to be logged once."""
        return tuple(self.template.notes)

    @property
    def end_of_turn(self) -> int:
        """The token that the template writes after an assistant's message."""
        return self.turn_ends[0]

    def opening(self, turn: int) -> tuple[list[int], str]:
        """Unsampled ids and text that begin turn `turn`, from 1: the template's own `<think>`, a forced one, or nothing."""
        return self._openings[turn > 1]

    def frame_ids(self, ended_by: int | None = None) -> tuple[list[int], list[int]]:
        """Ids before and after a result. If `ended_by` is not the template's end-of-turn token, they begin with that token."""
        return self._before_tool if ended_by is None else self._behind(ended_by), self._after_tool

    def _behind(self, ended_by: int) -> list[int]:
        """The ids before the result that are still missing: the policy may have sampled the first one."""
        before = self._whole_before
        place = before.index(ended_by) if ended_by in self.turn_ends and ended_by in before else -1
        return before[place + 1 :] if not self._tokenizer.decode(before[: max(place, 0)]).strip() else before

    def open(self, question: str) -> tuple[list[int], str]:
        """The prompt's ids and text: system message, tools, question, and the assistant's first message up to its opening."""
        text = self.template.open(self.messages(question))
        return self._tokenizer.encode(text, add_special_tokens=False), text

    def messages(self, question: str) -> list[Message]:
        """The conversation before the first turn."""
        head: list[Message] = [{"role": "system", "content": self._system}] if self._system is not None else []
        return [*head, {"role": "user", "content": self._before_question + question}]

    def observation(self, text: str, budget: int, ended_by: int | None = None) -> tuple[list[int], str]:
        """Ids and shown text of a tool result with `text`, up to where the policy continues, in a new message or the same one.

        At most `budget` ids: the content is cut at its end and the frame kept. Control tokens inside `text` become plain characters.
        `ended_by`: the last token of the turn before; after any but the template's own end-of-turn token, that token is added. Raises
        ValueError if not even the frame fits.
        """
        text = clean_text(text)
        room = budget - self.frame_size(ended_by)
        if room < 0:
            raise ValueError(f"a tool message needs {budget - room} tokens for its frame alone, the budget is {budget}")
        content = self._encode_foreign(self._quoting(text))
        if len(content) > room:
            content, text = self._cut(text, content, room)
        before, after = self.frame_ids(ended_by)
        return [*before, *content, *after], text

    def _cut(self, text: str, content: list[int], room: int) -> tuple[list[int], str]:
        """The beginning of `text`, whose ids are `content`, in at most `room` ids; returns (ids, text)."""
        if self._quoting.escape == "none":
            content = content[:room]
            return content, self._tokenizer.decode(content, clean_up_tokenization_spaces=False)
        # Cut between characters of the text: half an escape would hide the closing quotation mark.
        length = bisect_right(range(1, len(text) + 1), room, key=lambda length: len(self._encode_foreign(self._quoting(text[:length]))))
        return self._encode_foreign(self._quoting(text[:length])), text[:length]

    def frame_size(self, ended_by: int | None = None) -> int:
        """Ids of an empty tool message; `ended_by` as above."""
        return sum(map(len, self.frame_ids(ended_by)))

    def count_tokens(self, text: str) -> int:
        """Tokens that `text` takes as a tool's result."""
        return len(self._encode_foreign(self._quoting(text)))

    def render_probe(self, answer: str) -> tuple[list[int], tuple[int, int]]:
        """Ids of the probe text with `answer`, and the [start, stop) of the answer's tokens; only these are scored.

        A token that crosses the border counts as the answer's. The answer is cut to `reward.probe_max_tokens` tokens.
        """
        if answer not in self._probes:
            head, tail = self._probe_template.split("{answer}")
            capped = self._encode(answer)[: self._reward.probe_max_tokens]
            shown = self._tokenizer.decode(capped, clean_up_tokenization_spaces=False) if capped != self._encode(answer) else answer
            begin, end = len(head), len(head) + len(shown)
            encoded = self._tokenizer(head + shown + tail, add_special_tokens=False, return_offsets_mapping=True)
            inside = [number for number, (left, right) in enumerate(encoded["offset_mapping"]) if right > begin and left < end]
            if not inside:
                raise ValueError(f"the ground truth {answer!r} has no tokens to score")
            self._probes[answer] = list(encoded["input_ids"]), (inside[0], inside[-1] + 1)
        return self._probes[answer]

    def render_hidden_probe(self, answer: str, ended_by: int | None = None) -> tuple[list[int], tuple[int, int]]:
        """The probe of `render_probe` after an empty tool message and the next turn's opening; `ended_by` as above."""
        token_ids, (start, stop) = self.render_probe(answer)
        before = [*chain.from_iterable(self.frame_ids(ended_by)), *self.opening(2)[0]]
        return [*before, *token_ids], (start + len(before), stop + len(before))

    def probe_problem(self) -> str | None:
        """Why a probe is no turn that answers in the run's protocol; None if it is, or if there are no gains."""
        answer = "Oslo"
        for _, opening in self._openings if self._reward.gain != "none" else ():
            turn = self._without_end(opening + self._probe_template.replace("{answer}", answer))
            read, final = self.parse(turn), self.protocol.final_answer([turn])
            if not isinstance(read, Answer) or {read.text.strip().lower(), (final or "").strip().lower()} != {answer.lower()}:
                own = self.write("I can answer now.", Answer(answer)).replace(answer, "{answer}")
                return (
                    f"reward.probe_template is no answer of rollout.protocol={self._rollout.protocol}, which reads {turn!r} as {read} and "
                    f"scores {final!r}; so gains are measured on text that earns no reward. Unless you mean that, use {own!r}"
                )
        return None

    def decode(self, token_ids: list[int]) -> str:
        """Text of sampled tokens, without the token that ends the turn."""
        body = token_ids[:-1] if token_ids and token_ids[-1] in self.turn_ends else token_ids
        return self._tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def first_stop(self, token_ids: list[int], start: int) -> int | None:
        """Number of tokens up to the end of the first stop string that ends after token `start`; None if there is none."""
        if not any(stop in self.decode(token_ids) for stop in self.protocol.stop):
            return None
        lengths = range(start, len(token_ids) + 1)
        return next((n for n in lengths if any(stop in self.decode(token_ids[:n]) for stop in self.protocol.stop)), None)

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id of the tokenizer."""
        return max(self._tokenizer.get_vocab().values()) + 1

    def tool_name(self, name: str) -> str:
        """The policy's name of our tool `name`."""
        return self._tools.renamed(name)

    def write(self, thought: str, action: ToolCall | Answer) -> str:
        """The turn that `parse` reads as that action. Raises ValueError as the protocol's `write`."""
        return self.protocol.write(thought, action, self._tools)

    def turn_ids(self, turn: int, thought: str, action: ToolCall | Answer) -> list[int]:
        """The tokens that a policy would sample for that action in turn `turn`, from 1: without its opening, up to its end.

        Raises ValueError if the protocol cannot write the action.
        """
        opening, text = self.opening(turn)[1], self.write(thought, action)
        body = text.removeprefix(opening.rstrip())
        if body != text and opening != opening.rstrip():
            body = body.lstrip("\n")  # the template's opening ends in the line break that may follow the tag
        ids = self._encode(body)
        if not (self.protocol.stop and body.endswith(self.protocol.stop)):
            ids.append(self.end_of_turn)
        return ids

    def parse(self, text: str) -> Action:
        """The action of a turn; `text` includes the turn's opening. A turn with the template's own control tokens is malformed."""
        text = self._without_end(text)
        forged = self._control.search(text) if self._control is not None else None
        if forged is not None:
            return Malformed(f"the turn writes {forged[0]}, which only the chat template may")
        return self.protocol.parse(text, self._tools)

    def _without_end(self, text: str) -> str:
        for end in self._ends:
            text = text.rstrip().removesuffix(end) if text.rstrip().endswith(end) else text
        return text

    def _encode(self, text: str, **options: Any) -> list[int]:
        """Ids of text that follows other text: without the leading space that tokenizers such as Mistral's add."""
        lead = self._lead if text else []
        ids: list[int] = self._tokenizer.encode("\n" + text if lead else text, add_special_tokens=False, **options)
        assert ids[: len(lead)] == lead, f"the tokenizer joins a line break with {text[:20]!r}"
        return ids[len(lead) :]

    def _encode_foreign(self, text: str) -> list[int]:
        """Ids of untrusted text: no id is a control token, even if the text spells one."""
        pieces, start = [], 0
        # Tokens such as Qwen's <tool_call> are added but not special, so the tokenizer would not split them: cut each after one character.
        for spelled in self._added.finditer(text) if self._added else ():
            pieces.append(text[start : spelled.start() + 1])
            start = spelled.start() + 1
        return [token for piece in (*pieces, text[start:]) for token in self._encode(piece, split_special_tokens=True)]

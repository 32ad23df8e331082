"""The conversation as tokens: rendered once, then only appended to; no text is ever tokenised twice.

    open(question) ─┬─> prompt ids          chat template, once
    forced ─────────┤   `<think>`            never trained
    (sampled) ──────┤   the engine's own ids
    observation() ──┴─> tool result ids      its frame from the template or the protocol, its content alone, cut by tokens

The frame of a tool message is found by rendering the template with placeholders, so it fits any template that has a tool role. What is
in a result stays what it is, tool text: turns end at sampled tokens only, and protocols are shown the policy's own text only.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

from igpo_megatron.config.schema import Reward, Rollout
from igpo_megatron.protocols import PROTOCOLS, Action, Answer, Malformed, ToolSet
from igpo_megatron.protocols.igpo import parse_action
from igpo_megatron.protocols.json_calls import tool_schemas
from igpo_megatron.types import UserError
from igpo_megatron.untrusted import clean_text

__all__ = ["Action", "Answer", "ChatFormat", "Malformed", "parse_action"]

FORCED_TEXT = "<think>"
_ASSISTANT, _TOOL, _USER = "PLACEHOLDER-OF-ASSISTANT", "PLACEHOLDER-OF-TOOL", "PLACEHOLDER-OF-USER"


class ChatFormat:
    """One tokenizer's way of writing questions, tool results and probes."""

    def __init__(self, tokenizer: Any, rollout: Rollout, reward: Reward, now: datetime | None = None) -> None:
        """`tokenizer`: a fast Hugging Face tokenizer with a chat template. Raises ValueError where the template cannot be used."""
        if not getattr(tokenizer, "chat_template", None):
            raise UserError("the model's tokenizer has no chat template; add chat_template.jinja to model.path")
        if tokenizer.eos_token_id is None:
            raise UserError("the model's tokenizer has no eos token, so a turn could never end; set eos_token in tokenizer_config.json")
        self._tokenizer = tokenizer
        self._rollout, self._reward = rollout, reward
        date = (now or datetime.now(UTC)).date().isoformat()
        self.protocol = PROTOCOLS[rollout.protocol]
        self._tools = ToolSet(rollout.tool_name, rollout.max_queries, rollout.extra_tools)
        self._system = rollout.system_prompt.replace("{date}", date) if rollout.system_prompt is not None else None
        self._before_question = ""
        if self.protocol.instructions is not None and rollout.tool_in_prompt:
            instructions = self.protocol.instructions(self._tools)
            if self.protocol.instructions_in == "system":
                self._system = instructions if self._system is None else f"{self._system}\n\n{instructions}"
            else:
                self._before_question = f"{instructions}\n\nQuestion: "
        self.end_of_turn: int = tokenizer.eos_token_id
        added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special and len(token.content) > 1]
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self.forced_ids: list[int] = self._encode(FORCED_TEXT) if rollout.force_think else []
        self.asking_text = reward.probe_template.partition("{answer}")[0]
        self.asking_ids: list[int] = self._encode(self.asking_text)
        self._before_tool, self._after_tool = self._tool_frame() if self.protocol.tool_messages else map(self._encode, self.protocol.result)
        self._probes: dict[str, tuple[list[int], tuple[int, int]]] = {}

    @property
    def forced_text(self) -> str:
        """Text put at the start of every turn; empty where nothing is forced."""
        return FORCED_TEXT if self.forced_ids else ""

    def open(self, question: str) -> tuple[list[int], str]:
        """The prompt's ids and text: system message, tools, question and the opening of the first assistant turn."""
        text = self._render([*self._head(), {"role": "user", "content": self._before_question + question}], generate=True)
        return self._encode(text), text

    def observation(self, text: str, budget: int) -> tuple[list[int], str]:
        """Ids and shown text of a tool result with `text`, up to where the policy goes on: in a new message, or in the same one.

        At most `budget` ids: the content is cut from its end and the frame kept. Control tokens inside `text` are read as plain
        characters. Raises ValueError if not even the frame fits.
        """
        text = clean_text(text)
        room = budget - len(self._before_tool) - len(self._after_tool)
        if room < 0:
            raise ValueError(f"a tool message needs {budget - room} tokens for its frame alone, the budget is {budget}")
        content = self._encode_foreign(text)
        if len(content) > room:
            content = content[:room]
            text = self._tokenizer.decode(content, clean_up_tokenization_spaces=False)
        return [*self._before_tool, *content, *self._after_tool], text

    @property
    def frame_tokens(self) -> int:
        """Ids of an empty tool message."""
        return len(self._before_tool) + len(self._after_tool)

    def count_tokens(self, text: str) -> int:
        """Tokens that `text` takes as a tool's result."""
        return len(self._encode_foreign(text))

    def render_probe(self, answer: str) -> tuple[list[int], tuple[int, int]]:
        """Ids of the probe text with `answer` in it, and the [start, stop) of the answer's tokens, which alone are scored.

        A token that straddles the border counts as the answer's. The answer is cut to `reward.probe_max_tokens` tokens.
        """
        if answer not in self._probes:
            head, tail = self._reward.probe_template.split("{answer}")
            capped = self._encode(answer)[: self._reward.probe_max_tokens]
            shown = self._tokenizer.decode(capped, clean_up_tokenization_spaces=False) if capped != self._encode(answer) else answer
            begin, end = len(head), len(head) + len(shown)
            encoded = self._tokenizer(head + shown + tail, add_special_tokens=False, return_offsets_mapping=True)
            inside = [number for number, (left, right) in enumerate(encoded["offset_mapping"]) if right > begin and left < end]
            if not inside:
                raise ValueError(f"the ground truth {answer!r} has no tokens to score")
            self._probes[answer] = list(encoded["input_ids"]), (inside[0], inside[-1] + 1)
        return self._probes[answer]

    def render_hidden_probe(self, answer: str) -> tuple[list[int], tuple[int, int]]:
        """The probe as `render_probe` gives it, behind an empty tool message and the next turn's forced opening."""
        token_ids, (start, stop) = self.render_probe(answer)
        before = [*self._before_tool, *self._after_tool, *self.forced_ids]
        return [*before, *token_ids], (start + len(before), stop + len(before))

    def decode(self, token_ids: list[int]) -> str:
        """Text of sampled tokens, without the end-of-turn token."""
        body = token_ids[:-1] if token_ids and token_ids[-1] == self.end_of_turn else token_ids
        return self._tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def first_stop(self, token_ids: list[int], start: int) -> int | None:
        """Tokens up to the end of the first stop string that ends behind token `start`; None where there is none."""
        if not any(stop in self.decode(token_ids) for stop in self.protocol.stop):
            return None
        lengths = range(start, len(token_ids) + 1)
        return next((n for n in lengths if any(stop in self.decode(token_ids[:n]) for stop in self.protocol.stop)), None)

    @property
    def vocab_size(self) -> int:
        """Tokens that the policy can write."""
        return len(self._tokenizer)

    def parse(self, text: str) -> Action:
        """What a turn asks for; `text` includes the forced opening."""
        return self.protocol.parse(text, self._tools)

    def _head(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self._system}] if self._system is not None else []

    def _encode(self, text: str, **options: Any) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, **options)

    def _encode_foreign(self, text: str) -> list[int]:
        """Ids of text that others wrote: no id in it stands for a control token, though the text may spell one."""
        pieces, start = [], 0
        # Tokens such as Qwen's <tool_call> are added but not special, so the tokenizer would not split them: cut each after one character.
        for spelled in self._added.finditer(text) if self._added else ():
            pieces.append(text[start : spelled.start() + 1])
            start = spelled.start() + 1
        return [token for piece in (*pieces, text[start:]) for token in self._encode(piece, split_special_tokens=True)]

    def _render(self, messages: list[dict[str, str]], *, generate: bool) -> str:
        tools = tool_schemas(self._tools) if self._rollout.tool_in_prompt and self.protocol.tool_messages else None
        return self._tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=generate, tokenize=False)

    def _tool_frame(self) -> tuple[list[int], list[int]]:
        """Ids before and after the content of a tool message, the next assistant opening included."""
        messages = [{"role": "user", "content": _USER}, {"role": "assistant", "content": _ASSISTANT}, {"role": "tool", "content": _TOOL}]
        text = self._render([*self._head(), *messages], generate=True)
        if _TOOL not in text or _ASSISTANT not in text:
            raise UserError("the chat template drops tool or assistant messages; a template with a `tool` role is needed")
        before, after = text.split(_ASSISTANT, 1)[1].split(_TOOL, 1)
        ids = self._encode(before)
        if ids[:1] == [self.end_of_turn]:  # the policy has sampled it already
            ids = ids[1:]
        return ids, self._encode(after)

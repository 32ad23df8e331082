"""What a chat template does is proved at the start: nine models' templates in essence, by every protocol, and some that cannot be used."""

from __future__ import annotations

import asyncio
import io
import json
import re
import string
import unicodedata
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from chat_templates import ENDS, POLICY, TOKENS, family, with_template
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

from igpo_megatron import cli
from igpo_megatron.agent.settings import Rollout
from igpo_megatron.agent.trajectory import Agent, PathPlan, run_trajectory
from igpo_megatron.algorithms.rewards import own_turns, score
from igpo_megatron.algorithms.settings import Reward
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.chat.protocols.base import Answer, Malformed, ToolSet
from igpo_megatron.chat.protocols.json_calls import tool_schemas
from igpo_megatron.chat.protocols.registry import PROTOCOLS
from igpo_megatron.chat.turn_ends import sampling_limits
from igpo_megatron.config.load import build
from igpo_megatron.doctor import chat as chat_check
from igpo_megatron.doctor import commands
from igpo_megatron.engines.pool import EnginePool
from igpo_megatron.tools.search_tool import SearchTool
from igpo_megatron.types import Completion, Node, Prompt, RolloutGroup, SamplingRequest, Status, ToolCall, Trajectory, UserError

NOW = datetime(2026, 3, 4, 5, 6, 7, 89, UTC)
FAMILIES, THINKERS = tuple(TOKENS), ("qwen3_thinking", "r1_distill")
DESCRIBE_TOOLS = ("qwen2.5", "qwen3", "qwen3_thinking", "llama3.1", "mistral")
TOOLS = ToolSet("web_search", 3)
CALL = '<tool_call>{"name": "web_search", "arguments": {"query": "x"}}</tool_call>'
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
ONE_QUESTION = (
    "{% for m in messages %}{{ m.role }}{% if m.role == 'user' and not loop.first %}{{ raise_exception('one question') }}{% endif %}\n"
)
GENERATES = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def form_of(tokenizer: Any, protocol: str = "igpo", reward: Reward | None = None, **rollout: object) -> ChatFormat:
    chosen = {"protocol": protocol, "force_think": False, "system_prompt": "Be brief.", **rollout}
    return ChatFormat(tokenizer, Rollout(**chosen), reward or Reward(), NOW)  # type: ignore[arg-type]


def decode(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


# ---- prompts


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", FAMILIES)
def test_system_text_tools_and_question_reach_the_prompt_of_every_template(name: str, protocol: str) -> None:
    words = family(name)
    form = form_of(words, protocol)
    ids, text = form.open("Who wrote Hamlet?")
    assert decode(words, ids) == text and ids == words.encode(text, add_special_tokens=False)
    for part in ("Be brief.", "Who wrote Hamlet?", "search"):
        assert text.count(part) >= 1, part
    if PROTOCOLS[protocol].tool_messages:
        description = tool_schemas(TOOLS)[0]["function"]["description"]
        assert "web_search" in text and description in text
        assert any("so the instruction describes them" in note for note in form.notes) == (name not in DESCRIBE_TOOLS)
    bos = words.bos_token_id
    assert bos in (words.encode("<|endoftext|>")[0], words.encode("<|im_start|>")[0]) or ids.count(bos) == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("forced", [False, True], ids=["free", "forced"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_template_that_opens_the_thought_itself_is_given_no_second_one_and_the_format_check_counts_it(
    name: str, forced: bool, protocol: str
) -> None:
    form = form_of(family(name), protocol, force_think=forced)
    one_message = not PROTOCOLS[protocol].tool_messages
    _, prompt = form.open("q")
    first, later = form.opening(1)[1], form.opening(2)[1]
    prompt_opens = prompt.endswith("<think>") or prompt.endswith("<think>\n")
    assert not prompt_opens and (prompt + first)[len(prompt) - 20 :].count("<think>") == (name in THINKERS or forced)
    assert first == ("<think>\n" if name in THINKERS else "<think>" if forced else "")
    assert later == ("<think>" if forced else "") if one_message else later == first
    # The first turn is sampled behind the opening; a trajectory of both is well-formed.
    turns = [PROTOCOLS[protocol].write("a", ToolCall("search", ("x",))), PROTOCOLS[protocol].write("b", Answer("Oslo"))]
    written = [opening + turn.removeprefix(opening.strip()) for opening, turn in zip((first, later), turns, strict=True)]
    assert [type(form.parse(turn)) for turn in written] == [ToolCall, Answer]
    answer = PROTOCOLS[protocol].final_answer(written)
    assert answer is not None and answer.lower() == "oslo"


def test_a_probe_does_not_open_a_thought_that_the_template_has_opened() -> None:
    reward = Reward(probe_template="<think>I know.</think>\n<answer>{answer}</answer>")
    for name in FAMILIES:
        words = family(name)
        form = form_of(words, reward=reward)
        ids, (start, stop) = form.render_probe("Oslo")
        assert ("<think>" in decode(words, ids)) == (name not in THINKERS) and decode(words, ids[start:stop]) == "Oslo"


def test_a_role_that_the_template_refuses_moves_the_instruction_and_the_note_names_the_line() -> None:
    form = form_of(family("gemma"))
    (system,) = [note for note in form.notes if "first user message" in note]
    (tool,) = [note for note in form.notes if "tool results are user messages" in note]
    assert "System role not supported" in system and "line 2: " in system
    assert "Conversation roles must alternate" in tool and "line 5: " in tool
    assert form.open("q")[1].startswith("<bos><start_of_turn>user\nBe brief.\n\n")
    assert not form_of(family("mistral")).notes


def test_tools_that_a_template_describes_in_a_system_message_only_reach_a_prompt_without_one() -> None:
    source = CHATML.replace("{{ m.content }}", "{% if m.role == 'system' and tools %}{{ tools | tojson }}{% endif %}{{ m.content }}")
    words = with_template(source)
    description = tool_schemas(TOOLS)[0]["function"]["description"]
    for system, describes in (("Be brief.", True), (None, False)):
        form = form_of(words, system_prompt=system)
        assert form.template.describes_tools is describes and form.open("q")[1].count(description) == 1, system


def test_a_template_date_is_the_same_in_every_prompt_of_a_run() -> None:
    """This one writes microseconds: with a running clock no two prompts would agree."""
    form = form_of(family("llama3.1"))
    first, again = form.open("q")[1], form.open("q")[1]
    assert first == again and "Today Date: 04 Mar 2026 05:06:07.000089\n" in first


# ---- turns and frames


def said(name: str, thought: str) -> str:
    """A turn that the template writes back as it was sampled."""
    return {
        "qwen3": f"<think>\n{thought}\n</think>\n\n{CALL}",
        "qwen3_thinking": f"{thought}\n</think>\n\n{CALL}",
        "mistral": f" <think>{thought}</think>{CALL}",
    }.get(name, f"<think>{thought}</think>{CALL}")


def rendered(words: Any, form: ChatFormat, turns: list[str], results: list[str]) -> str:
    """The conversation by the template alone; each message in the form that it wants."""
    messages: list[dict[str, Any]] = form.messages("Where?")
    for turn, result in zip(turns, results, strict=True):
        _, assistant, observed = form.frame.messages
        messages.append({**assistant, "content": turn})
        messages.append({**observed, "content": observed["content"].replace("MARK-OF-TOOL", result)})
    tools = tool_schemas(TOOLS) if form.template.describes_tools else None
    return str(words.apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False, strftime_now=NOW.strftime))


# The demo's tokenizer composes characters (NFC), so text comes composed and without marks that compose with what stands before them.
PLAIN = st.text(st.characters(codec="utf-8", exclude_categories=["M"], exclude_characters="<>\0\r|"), max_size=60).map(
    lambda text: unicodedata.normalize("NFC", text)
)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "r1_distill"])
@settings(max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(thoughts=st.tuples(PLAIN, PLAIN), results=st.tuples(PLAIN, PLAIN))
def test_appended_tokens_spell_what_the_template_renders(name: str, thoughts: tuple[str, ...], results: tuple[str, ...]) -> None:
    """Two rounds; one where roles must alternate. R1's template drops thoughts, Mistral's the system text: nothing to compare with."""
    words = family(name)
    if name not in FORMS:
        FORMS[name] = form_of(words, system_prompt=None if name == "mistral" else "Be brief.")
    form = FORMS[name]
    rounds = 1 if name == "mistral" else 2
    turns, ids = [], form.open("Where?")[0]
    for turn, (thought, result) in enumerate(zip(thoughts[:rounds], results, strict=False), start=1):
        turns.append(said(name, thought.strip() or "."))
        opening = form.opening(turn)[0]
        ids = [*ids, *opening, *words.encode(turns[-1], add_special_tokens=False), form.end_of_turn]
        ids += form.observation(result, 10_000)[0]
    opening_text = form.opening(1)[1]
    expected = rendered(words, form, [opening_text + turn for turn in turns], list(results[:rounds]))
    assert decode(words, [*ids, *form.opening(rounds + 1)[0]]) == expected


FORMS: dict[str, ChatFormat] = {}


@pytest.mark.parametrize("name", ["llama3.1", "qwen2.5", "gemma"])
def test_ids_are_those_of_the_rendered_template_text(name: str) -> None:
    words, form = family(name), form_of(family(name))
    prompt, _ = form.open("Where?")
    turn, result = said(name, "I see."), 'He said "Rome".\nThen left.'
    ids = [*prompt, *words.encode(turn, add_special_tokens=False), form.end_of_turn, *form.observation(result, 1000)[0]]
    assert ids == words.encode(rendered(words, form, [turn], [result]), add_special_tokens=False)


def test_a_tokenizer_that_puts_a_space_in_front_adds_none_to_a_template_frame() -> None:
    """Mistral's and Llama 2's do: each piece that is encoded alone would begin with one."""
    marks = ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"]
    letters = BPE({letter: number for number, letter in enumerate(["\u2581", *string.printable])}, [])
    pieces = Tokenizer(letters)
    pieces.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    pieces.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    words = PreTrainedTokenizerFast(
        tokenizer_object=pieces, bos_token="<s>", eos_token="</s>", chat_template=family("mistral").chat_template
    )
    words.add_tokens(marks, special_tokens=True)
    form = form_of(words, system_prompt=None)
    turn, result = said("mistral", "I see."), "Rome.\nYes"
    ids = [*form.open("Where?")[0], *words.encode(turn, add_special_tokens=False), form.end_of_turn]
    ids += form.observation(result, 1000)[0]
    assert decode(words, ids) == decode(words, words.encode(rendered(words, form, [turn], [result]), add_special_tokens=False))
    shown = decode(words, form.observation("Rome [INST]", 1000)[0])
    assert shown.endswith('{"content": Rome [INST], "call_id": "call00001"}[/TOOL_RESULTS]')


def test_a_template_that_opens_no_turn_behind_a_result_gets_a_whole_next_frame() -> None:
    """R1's adds its generation prompt behind questions only, and drops what was thought before."""
    words = family("r1_distill")
    form = form_of(words)
    before, after = (decode(words, ids) for ids in form.frame_ids())
    assert before == "<|tool_outputs_begin|><|tool_output_begin|>" and after == "<|tool_output_end|><|tool_outputs_end|>"
    assert form.opening(2)[1] == "<think>\n"
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    source += "{% if add_generation_prompt and messages[-1].role != 'tool' %}<|im_start|>assistant\n<think>\n{% endif %}"
    like = with_template(source)
    form = form_of(like)
    assert decode(like, form.frame_ids()[1]) == "<|im_end|>\n<|im_start|>assistant\n" and form.opening(2)[1] == "<think>\n"


def test_a_template_without_a_generation_prompt_still_opens_the_assistants_turn() -> None:
    words = with_template(CHATML)
    form = form_of(words, tool_in_prompt=False)
    assert form.open("q")[1].endswith("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n")
    assert decode(words, form.frame_ids()[1]) == "<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("content", "shown"),
    [
        ("m.content | tojson", '" say \\"é\\" <b>\\n "'),
        ("m.content | tojson(ensure_ascii=true)", '" say \\"\\u00e9\\" <b>\\n "'),
        ("m.content | trim", 'say "é" <b>'),
        ("m.content | trim | tojson", '"say \\"é\\" <b>"'),
        ("m.content | string", ' say "é" <b>\n '),
    ],
)
def test_results_are_quoted_as_the_template_quotes_them(content: str, shown: str) -> None:
    words = with_template(
        CHATML.replace("{{ m.content }}", "{% if m.role == 'tool' %}{{ " + content + " }}{% else %}{{ m.content }}{% endif %}")
    )
    form = form_of(words)
    text = decode(words, form.observation(' say "é" <b>\n ', 1000)[0])
    assert f"<|im_start|>tool\n{shown}<|im_end|>" in text


def test_a_quoted_template_result_is_cut_between_characters_and_its_quotation_closed() -> None:
    words = family("llama3.1")
    form = form_of(words)
    for room in range(1, 40):
        ids, cut = form.observation('a "b" \\ \n' * 20, form.frame_size() + room)
        body = decode(words, ids).split("<|end_header_id|>\n\n")[1].split("<|eot_id|>")[0]
        assert len(ids) <= form.frame_size() + room and json.loads(body) == cut and ('a "b" \\ \n' * 20).startswith(cut)


# ---- ends


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_ends_with_the_token_that_the_template_writes(name: str, protocol: str) -> None:
    words = family(name)
    form = form_of(words, protocol)
    assert words.convert_ids_to_tokens(form.end_of_turn) == ENDS[name]
    assert set(form.turn_ends) == set(words.convert_tokens_to_ids([ENDS[name], TOKENS[name][1]]))


def model(folder: Path, eos: object, name: str = "generation_config.json") -> Path:
    """The demo policy's small files with another eos."""
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"):
        (folder / file).write_bytes((POLICY / file).read_bytes())
    (folder / name).write_text(json.dumps({**(json.loads((POLICY / name).read_text())), "eos_token_id": eos}))
    return folder


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_eos_of_the_models_files_is_cut_and_a_template_frame_follows_it(tmp_path: Path, protocol: str) -> None:
    words = AutoTokenizer.from_pretrained(model(tmp_path, [2, 0]))
    form = form_of(words, protocol, tool_in_prompt=False)
    assert form.turn_ends == (2, 0)
    ids = words.encode("Paris", add_special_tokens=False)
    assert form.decode([*ids, 2]) == form.decode([*ids, 0]) == form.decode(ids) == "Paris"
    usual, other = form.observation("x", 100, ended_by=2)[0], form.observation("x", 100, ended_by=0)[0]
    assert other == ([2, *usual] if PROTOCOLS[protocol].tool_messages else usual) and usual == form.observation("x", 100)[0]
    assert form.frame_size(0) - form.frame_size(2) == len(other) - len(usual)
    hidden = [form.render_hidden_probe("Rome", ended_by=end)[0] for end in (2, 0)]
    assert hidden[1] == (hidden[0] if not PROTOCOLS[protocol].tool_messages else [2, *hidden[0]])


@pytest.mark.parametrize(("eos", "stops"), [(0, (2, 0)), ([0, 2, 1], (2, 0, 1)), ([2, 5000, 653, 2**70], (2,))])
def test_engines_stop_at_every_eos_and_bar_rows_of_the_embedding_without_a_token(
    tmp_path: Path, eos: object, stops: tuple[int, ...]
) -> None:
    """The demo's embedding has 656 rows, its tokenizer 650 tokens. The template's own end comes first."""
    pool = EnginePool(build({"model": {"path": str(model(tmp_path, eos))}, "run": {"device": "cpu"}}))
    assert pool._turns == {
        "stop_token_ids": list(stops),
        "detokenize": False,
        "stop": [],
        "include_stop_str_in_output": False,
        "skip_special_tokens": False,
        "logit_bias": dict.fromkeys(range(650, 656), float("-inf")),
    }
    assert form_of(AutoTokenizer.from_pretrained(tmp_path), tool_in_prompt=False).turn_ends == stops


def test_padding_is_barred_by_the_shorter_list_or_refused() -> None:
    words = family("qwen2.5")
    assert sampling_limits(words, 650) == sampling_limits(words, 600) == {}
    assert sampling_limits(words, 10_000) == {"allowed_token_ids": list(range(650))}

    class Large:
        def get_vocab(self) -> dict[str, int]:
            return {str(token): token for token in range(3000)}

    assert len(sampling_limits(Large(), 4000)["logit_bias"]) == 1000
    with pytest.raises(UserError, match=r"has 9,000 rows, 6,000 of them without a token"):
        sampling_limits(Large(), 9000)


@pytest.mark.parametrize("eos", ["two", [2, None], [True], -1])
def test_an_eos_that_is_no_token_is_named(tmp_path: Path, eos: object) -> None:
    words = AutoTokenizer.from_pretrained(POLICY)
    words.name_or_path = str(model(tmp_path, eos))
    with pytest.raises(UserError, match=r"generation_config.json: eos_token_id is .*; expected the number of a token"):
        form_of(words)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_turn_cannot_forge_a_message_of_the_template(name: str, protocol: str) -> None:
    form = form_of(family(name), protocol)
    call = form.opening(1)[1] + PROTOCOLS[protocol].write("a", ToolCall("search", ("x",))).removeprefix(form.opening(1)[1].strip())
    answer = PROTOCOLS[protocol].write("b", Answer("Oslo"))
    assert isinstance(form.parse(call), ToolCall) and form.parse(call + ENDS[name]) == form.parse(call)
    forged = form.frame.before + "Oslo" + form.frame.after if form.frame.messages else ENDS[name] + form.open("q")[1]
    for text in (call + ENDS[name] + "\nOslo" + answer, call + forged + answer, answer + forged):
        assert isinstance(form.parse(text), Malformed), text


class Lines:
    """An engine that says line k in turn k and ends it with the token given."""

    def __init__(self, words: Any, lines: list[tuple[str, int]]) -> None:
        self.words, self.lines, self.seen = words, iter(lines), []

    async def generate(self, request: SamplingRequest) -> Completion:
        self.seen.append(request.token_ids)
        line, end = next(self.lines)
        ids = [*self.words.encode(line, add_special_tokens=False), end]
        return Completion(ids, [-0.5] * len(ids), "stop", 1)


@pytest.mark.parametrize("protocol", ["igpo", "hermes"])
def test_a_trajectory_ended_by_another_eos_goes_on_in_a_whole_template_frame(tmp_path: Path, protocol: str) -> None:
    words = AutoTokenizer.from_pretrained(model(tmp_path, [2, 0]))
    form = form_of(words, protocol, tool_in_prompt=False, tool_name="search")
    lines = [(PROTOCOLS[protocol].write("t", action), 0) for action in (ToolCall("search", ("x",)), Answer("Oslo"))]
    engine = Lines(words, lines)
    ids, text = form.open("Where?")
    group = RolloutGroup(Prompt("q", "Where?", ("Oslo",), "t"), [Node(None, "prompt", ids, text=text)])
    found = SearchTool(chat_check.ScriptedSearch("<|im_end|>"), form.protocol.hit)
    rollout = Rollout(protocol=protocol, tool_name="search", max_context=2000)  # type: ignore[arg-type]
    agent = Agent(engine, {"search": found}, form, rollout)  # type: ignore[arg-type]
    end = asyncio.run(run_trajectory(group, agent, PathPlan(0, seed=0, salt=0, temperature=1.0)))
    assert (end.status, end.answer) == (Status.FINISHED, "Oslo")
    call, observation = group.nodes[end.path[1]], group.nodes[end.path[2]]
    assert call.token_ids[-1] == 0 and observation.token_ids[:1] == [2] and "<|endoftext|>" not in call.text
    assert engine.seen[1] == [*ids, *call.token_ids, *observation.token_ids]


def test_a_base_models_own_eos_is_not_taken_for_the_template_end(tmp_path: Path) -> None:
    """ChatML with <|endoftext|> as eos: a turn that could run on behind <|im_end|> would write tool results itself."""
    words = AutoTokenizer.from_pretrained(model(tmp_path, 0))
    words.eos_token = "<|endoftext|>"
    form = form_of(words, tool_in_prompt=False)
    assert form.end_of_turn == 2 and form.turn_ends == (2, 0)
    assert decode(words, form.observation("x", 100)[0]).startswith("\n<|im_start|>user\n<tool_response>\nx")


def test_a_template_whose_turns_end_in_plain_text_is_noted_and_the_eos_ends_them() -> None:
    words = with_template(CHATML.replace("<|im_end|>", "\nEND"))
    form = form_of(words)
    assert form.end_of_turn == words.eos_token_id and sum("so <|im_end|> ends a turn" in note for note in form.notes) == 1
    assert not any("ends a turn" in note for note in form_of(with_template(CHATML)).notes)


def test_an_end_that_opens_the_next_template_message_is_not_written_twice() -> None:
    """GLM's policies end a call with <|observation|>, which stands in front of the result, and its template writes no other end."""
    source = "{% for m in messages %}<|{{ 'observation' if m.role == 'tool' else m.role }}|>\n{{ m.content }}{% endfor %}"
    words = with_template(source + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}")
    words.add_tokens(["<|user|>", "<|assistant|>", "<|observation|>", "<|system|>"], special_tokens=True)
    observation, eos = words.convert_tokens_to_ids("<|observation|>"), words.eos_token_id
    form = form_of(words)
    form.turn_ends = (eos, observation)
    assert decode(words, form.frame_ids(eos)[0]) == decode(words, form.frame_ids()[0]) == "<|observation|>\n"
    assert decode(words, form.frame_ids(observation)[0]) == "\n"
    assert decode(words, form.frame_ids()[1]) == "<|assistant|>\n"


# ---- calls


@pytest.mark.parametrize("protocol", ["igpo", "hermes"])
def test_llamas_parameters_are_arguments(protocol: str) -> None:
    body = '{"name": "web_search", "parameters": {"query": ["x"]}}'
    assert PROTOCOLS[protocol].parse(f"<think>t</think><tool_call>{body}</tool_call>", TOOLS) == ToolCall("search", ("x",))
    both = '{"name": "web_search", "arguments": {"query": "a"}, "parameters": {"query": "b"}}'
    assert PROTOCOLS[protocol].parse(f"<think>t</think><tool_call>{both}</tool_call>", TOOLS) == ToolCall("search", ("a",))


@pytest.mark.parametrize(
    ("text", "action"),
    [
        ('{"name": "web_search", "parameters": {"query": ["x"]}}', ToolCall("search", ("x",))),
        ('<think>t</think>\n <|python_tag|>{"type": "function", "name": "f", "parameters": {"query": "x"}}\n', ToolCall("f", ("x",))),
        ('{"name": "web_search", "parameters": {"query": "x"}}<|eom_id|>', ToolCall("search", ("x",))),
        ('[TOOL_CALLS] [{"name": "web_search", "arguments": {"query": "x"}, "id": "abcdefghi"}]', ToolCall("search", ("x",))),
        (
            '[{"name": "f", "arguments": {"query": "x"}}, {"name": "f", "parameters": {"query": "y"}}]',
            ToolCall("f", ("x", "y")),
        ),
        ('[TOOL_CALLS][{"name": "Rome"}]', Answer('[TOOL_CALLS][{"name": "Rome"}]')),
        ('["a name", "name"]', Answer('["a name", "name"]')),
        ('{"name": "web_search", "arguments": {"query": []}}', Malformed("the tool call has no query")),
        ('{"name": "Rome"}', Answer('{"name": "Rome"}')),
        ('{"name": "Rome", "parameters": "none"}', Answer('{"name": "Rome", "parameters": "none"}')),
        ('{"name": "web_search", "parameters": {}} is a call', Answer('{"name": "web_search", "parameters": {}} is a call')),
        ('{"name"}', Answer('{"name"}')),
        ("<think>x</think>\nParis<|endoftext|>", Answer("Paris")),
    ],
)
def test_a_bare_call_as_llamas_template_asks_for_it_is_a_call(text: str, action: object) -> None:
    assert PROTOCOLS["hermes"].parse(text, TOOLS) == action
    if action == Answer("Paris"):
        assert PROTOCOLS["hermes"].final_answer([text]) == "Paris"


@settings(max_examples=150, deadline=None, database=None, derandomize=True)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=8),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["name", "parameters", "arguments", "query", "x"]), inner)
        ),
        max_leaves=8,
    )
)
def test_untrusted_bare_json_is_a_call_an_answer_or_malformed(value: object) -> None:
    text = json.dumps(value)
    for protocol, said in (
        ("hermes", text),
        ("hermes", f"<tool_call>{text}</tool_call>"),
        ("igpo", f"<think></think><tool_call>{text}</tool_call>"),
    ):
        assert isinstance(PROTOCOLS[protocol].parse(said, TOOLS), ToolCall | Answer | Malformed)


# ---- refusals


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("{{ 1 +\n }}", r"cannot write a conversation of user: .* \(line 2: \}\}\)$"),
        ("\n{{ messages[0].content + 3 }}", r"cannot write a conversation of user: can only concatenate .* \(line 2: "),
        ("{{ raise_exception('No\\nroles') }}", r"cannot write a conversation of user: No roles \(line 1: "),
        ("{% for m in messages %}\n{{ m.role }}{% endfor %}", r"leaves out the user's message \(line 1: "),
        (
            "{% for m in messages %}\n{% if m.role != 'assistant' %}{{ m.content }}{% endif %}{% endfor %}",
            r"leaves out assistant messages \(line 2: ",
        ),
        (
            CHATML.replace("<|im_end|>", "<|turn_end|>"),
            r"ends a turn with <\|turn_end\|> \(line 2: .*\), which the tokenizer writes as \d+ tokens",
        ),
        (CHATML.replace("<|im_end|>", "</s>"), r"ends a turn with </s> \(line 2: .*\), which the tokenizer writes as \d+ tokens"),
        (ONE_QUESTION + "{% if m.role != 'tool' %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}", r"out tool messages \(line 2: "),
        (ONE_QUESTION + "{{ m.content | upper }}<|im_end|>{% endfor %}", r"rewrites the text of tool messages \(line 2: "),
        (ONE_QUESTION + "{{ m.content | replace('\"', '') }}<|im_end|>{% endfor %}", r"rewrites the text of tool messages \(line 2: "),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_in_a_sentence_with_its_line(source: str, sentence: str) -> None:
    with pytest.raises(UserError) as caught:
        form_of(with_template(source), tool_in_prompt=False, system_prompt=None)
    assert re.search(sentence, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_a_template_that_cuts_the_instruction_is_refused() -> None:
    with pytest.raises(UserError, match=r"cuts or rewrites the system message, from .* on \(line 2: "):
        form_of(with_template(CHATML.replace("m.content", "m.content[:40]")))


def test_a_template_that_writes_results_only_behind_calls_is_shown_one() -> None:
    source = CHATML.replace("{{ m.content }}", "{{ m.content }}{% for c in m.tool_calls %}[{{ c.function | tojson }}]{% endfor %}")
    source = source.replace(
        "<|im_start|>",
        "{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}{{ raise_exception('no call') }}{% endif %}<|im_start|>",
    )
    words = with_template(source + GENERATES)
    before, after = (decode(words, ids) for ids in form_of(words).frame_ids())
    assert (before, after) == ("\n<|im_start|>tool\n", "<|im_end|>\n<|im_start|>assistant\n")


# ---- doctor


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", FAMILIES)
def test_doctor_chat_shows_every_token_of_a_template_conversation_with_its_source(name: str, protocol: str) -> None:
    words = family(name)
    config = build({"model": {"path": str(POLICY)}, "rollout": {"protocol": protocol, "system_prompt": "Be brief."}})
    form = ChatFormat(words, config.rollout, config.reward, NOW)
    assert (form.probe_problem() is None) == (protocol != "arpo"), "the published probe has no box"
    group = chat_check.converse(config, form, words)
    end: Trajectory = group.trajectories[0]
    assert (end.status, end.answer) == (Status.FINISHED, "Shakespeare"), end
    score(group, config)
    assert end.reward == 1.0, own_turns(group, end)
    shown = list(chat_check.pieces(group, form, words))
    trained = [token for piece in shown if piece.source == "sampled" for token in piece.tokens]
    assert trained == [decode(words, [token]) for node in group.actions(end) for token in node.token_ids]
    path = "".join(token for piece in shown if piece.source != "probe" for token in piece.tokens)
    whole = decode(words, [token for number in end.path for token in group.nodes[number].token_ids])
    assert path.replace("\ufffd", "") == whole.replace("\ufffd", "")
    assert {piece.source for piece in shown} == set(chat_check.SOURCES)
    own = "".join(token for piece in shown if piece.source == "instruction" for token in piece.tokens)
    assert "Be brief." in own and chat_check.QUESTION in own and "assistant" not in own


def test_doctor_chat_can_be_read_without_colour_and_tells_what_the_template_lacks() -> None:
    words = family("r1_distill")
    config = build({"model": {"path": "a/model"}, "rollout": {"force_think": False}})
    out = io.StringIO()
    chat_check.show(Console(file=out, width=160), config, ChatFormat(words, config.rollout, config.reward, NOW), words)
    text = out.getvalue()
    assert "\x1b" not in text
    for part in (
        "a turn ends with: <|end_of_sentence|>",
        "'<think>\\n', by the template",
        "so the instruction describes them",
        "rendered again",
    ):
        assert part in text, part
    assert "note: reward.probe_template" not in text, "this template opens <think> itself, so the published probe fits"
    for source in chat_check.SOURCES:
        assert re.search(rf"│ {source} +│", text), source
    assert len(re.findall(r"│ sampled +│ yes", text)) == 2 and len(re.findall(r"│ yes", text)) == 2


def test_doctor_chat_tells_that_a_probe_is_no_answer_where_probes_are_scored() -> None:
    words = family("qwen2.5")
    for advantage, told in (("igpo", True), ("grpo", False)):
        config = build({"model": {"path": "a/model"}, "reward": {"probe_template": "So: {answer}"}, "advantage": {"name": advantage}})
        out = io.StringIO()
        chat_check.show(Console(file=out, width=160), config, ChatFormat(words, config.rollout, config.reward, NOW), words)
        assert ("note: reward.probe_template is no answer of rollout.protocol=igpo" in out.getvalue()) == told


@pytest.mark.parametrize(
    ("template", "code", "words"), [(None, 0, "a turn ends with: <|im_end|> (2)"), ("{{ 1 + }}", 2, "error: the chat template")]
)
def test_igpo_doctor_chat_prints_a_conversation_or_one_template_sentence(
    tmp_path: Path, template: str | None, code: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "stay_offline", lambda: None)  # it sets this process's environment
    folder = model(tmp_path, 2)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    (tmp_path / "run.yaml").write_text(f"model: {{path: {folder}}}\n")
    done = CliRunner().invoke(cli.app, ["doctor", "chat", str(tmp_path / "run.yaml")])
    assert done.exit_code == code and words in done.output, done.output


def test_doctor_chat_names_a_damaged_tokenizer(tmp_path: Path) -> None:
    (model(tmp_path, 2) / "tokenizer.json").write_text('{"x')
    with pytest.raises(UserError, match=r"its tokenizer cannot be read"):
        chat_check.main(build({"model": {"path": str(tmp_path)}}))


def test_doctor_chat_names_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no tokenizer\.json or tokenizer_config\.json in it"):
        chat_check.main(build({"model": {"path": str(tmp_path)}}))

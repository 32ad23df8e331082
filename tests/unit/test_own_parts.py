"""Search back-ends, tools and protocols of the user's: named by a setting, checked before anything starts, then used like ours."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from test_chat import tokenizer
from test_protocols import Lines
from test_rollouts import SETTINGS, WORDS, ScriptedSearch, searching

from igpo_megatron.agent.rollouter import Rollouter
from igpo_megatron.algorithms.rewards import score
from igpo_megatron.chat.format import ChatFormat
from igpo_megatron.chat.protocols.base import BUILT_IN, Answer, Malformed, ToolSet
from igpo_megatron.chat.protocols.registry import PROTOCOLS, protocol_of, unsound
from igpo_megatron.chat.protocols.registry import problems as protocol_problems
from igpo_megatron.config.load import build, explain, load, to_json
from igpo_megatron.config.schema import Config
from igpo_megatron.search.cache import CacheNamespace
from igpo_megatron.search.client import make_client, namespace
from igpo_megatron.search.registry import problems as search_problems
from igpo_megatron.search.results import SearchStopped
from igpo_megatron.tools.registry import make_tools
from igpo_megatron.tools.registry import problems as tool_problems
from igpo_megatron.types import Prompt, Status, ToolCall, UserError

MINE = """
from igpo_megatron.chat.protocols.base import Answer, Malformed, ToolProtocol
from igpo_megatron.data.corpus import Passage
from igpo_megatron.search.results import SearchResult, SearchStatus
from igpo_megatron.tools.base import Description, Observed
from igpo_megatron.types import ToolCall


class Atlas:
    def __init__(self, search):
        self.depth = search.options.get("depth", 1)
        self.closed = False

    async def search(self, queries):
        found = (Passage("1", "Atlas", f"{self.depth} km deep"),)
        return [SearchResult(query, SearchStatus.OK, "atlas", found) for query in queries]

    async def close(self):
        self.closed = True


class Forgetful(Atlas):
    async def search(self, queries):
        return []


class Calculator:
    description = Description("calculator", "Add numbers.", {"sum": "Such as 1 + 2."})

    def __init__(self, options):
        self.digits = options.get("digits", 0)

    async def use(self, arguments):
        return Observed(f"{sum(map(float, arguments[0].split('+'))):.{self.digits}f}")

    async def close(self):
        pass


class Silent(Calculator):
    use = None


class Nameless:
    pass


def deaf(query):
    return None


def nobody():
    return None


def parse(text, tools):
    head, _, rest = text.partition(" ")
    if head == "SAY" and rest:
        return Answer(rest)
    return ToolCall(head.lower(), (rest,)) if head in ("SEARCH", "CALCULATOR") and rest else Malformed("neither SAY nor a tool")


def write(thought, action, tools=None):
    return f"SAY {action.text}" if isinstance(action, Answer) else f"{action.name.upper()} {' '.join(action.queries)}"


def final(turns):
    return turns[-1].removeprefix("SAY ") if turns[-1].startswith("SAY ") else None


PLAIN = ToolProtocol(parse=parse, write=write, final_answer=final)
RAISES = ToolProtocol(parse=lambda text, tools: parse(text, tools) if len(text) > 9 else text[5], write=write, final_answer=final)
LOSES = ToolProtocol(parse=lambda text, tools: Malformed("no"), write=write, final_answer=final)


def make_plain():
    return PLAIN
"""


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(MINE, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)


def config(*overrides: str) -> Config:
    return build({"model": {"path": "m"}, "rollout": dict(SETTINGS)}, list(overrides))


# ---- back-ends


def test_a_back_end_of_the_users_is_opened_with_its_options_and_has_a_place_of_its_own_in_the_store(tmp_path: Path) -> None:
    overrides = ["search.backend=mine:Atlas", "search.options.depth=6"]
    search = config(*overrides).search
    assert list(search_problems(search)) == []

    async def ask() -> str:
        client = make_client(search)
        (result,) = await client.search(["how deep"])
        await client.close()
        return result.passages[0].text

    assert asyncio.run(ask()) == "6 km deep"
    other = config(overrides[0], "search.options.depth=7").search
    assert isinstance(namespace(search), CacheNamespace) and namespace(search) != namespace(other)
    with pytest.raises(SearchStopped, match=r"mine:Forgetful was asked 2 queries; expected a list of 2 SearchResult, found \[\]"):
        asyncio.run(make_client(config("search.backend=mine:Forgetful").search).search(["a", "b"]))


@pytest.mark.parametrize(
    ("backend", "problem"),
    [
        ("serpr", "search.backend='serpr': expected one of bm25, dense, .* or package.module:function; did you mean 'serper'"),
        ("mine:Absent", "search.backend=mine:Absent cannot be imported"),
        ("mine:PLAIN", "is a ToolProtocol; expected a function"),
        ("mine:nobody", "mine:nobody cannot be called with section `search` alone"),
        ("mine:Nameless", "mine:Nameless"),
    ],
)
def test_what_is_no_back_end_is_said_before_it_is_opened(backend: str, problem: str) -> None:
    (found,) = {*search_problems(config(f"search.backend={backend}").search)}
    with pytest.raises(UserError, match=problem):
        raise UserError(found)


def test_what_a_function_gives_is_looked_at_when_it_is_opened() -> None:
    with pytest.raises(UserError, match="mine:deaf has no `async def search`"):
        make_client(config("search.backend=mine:deaf").search)


# ---- tools


def test_a_tool_of_the_users_is_described_called_and_counted() -> None:
    settings = config(
        "rollout.extra_tools=[visit, 'mine:Calculator']", "rollout.tool_options.calculator.digits=1", "rollout.max_context=2000"
    )
    assert list(tool_problems(settings.rollout)) == []
    for name in ("igpo", "search_r1", "hermes"):
        own = settings.model_copy(update={"rollout": settings.rollout.model_copy(update={"protocol": name, "tool_in_prompt": True})})
        form = ChatFormat(WORDS, own.rollout, own.reward)
        call = ToolCall("calculator", ("1 + 2",))
        text = form.write("t", call)
        assert form.parse(text) == call and "calculator" in form.open("?")[1]
        engine = Lines(name, [text, form.write("t", Answer("3.0"))])
        engine.stop = form.protocol.stop
        tools = {**searching(ScriptedSearch()), "calculator": _made(own)}
        with Rollouter(engine, tools, form, own.rollout, seed=1) as rollouter:  # type: ignore[arg-type]
            tallies = rollouter.tallies()
            work = rollouter.run([Prompt("q", "?", ("3.0",), "t")], samples=1, salt=1, temperature=None, tallies=tallies)
            (group,) = rollouter.start(work).result()
        assert [node.text for node in group.nodes if node.kind == "observation"] == ["3.0"]
        assert group.trajectories[0].status is Status.FINISHED and tallies["calculator"].calls == 1
    assert "</calculator>" in protocol_of(own.rollout.model_copy(update={"protocol": "arpo"})).stop
    assert "</calculator>" not in protocol_of(own.rollout.model_copy(update={"protocol": "igpo"})).stop


def _made(settings: Config) -> object:
    search = settings.search.model_copy(update={"backend": "retriever", "url": "http://127.0.0.1:9/"})
    return make_tools(settings.model_copy(update={"search": search}), len, "{text}")["calculator"]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["rollout.extra_tools=[vist]"], "rollout.extra_tools='vist': expected one of visit, python, .*did you mean 'visit'"),
        (["rollout.extra_tools=['mine:Nameless']"], "mine:Nameless.description is None; expected .*Description"),
        (["rollout.extra_tools=['mine:Silent']"], "mine:Silent has no `async def use`"),
        (["rollout.extra_tools=['mine:Calculator']", "rollout.tool_name=calculator"], "tool_name=calculator is the name of another tool"),
        (["rollout.tool_options.calculator.digits=1"], "rollout.tool_options.calculator: no tool of that name"),
    ],
)
def test_what_is_no_tool_is_said_before_anything_starts(overrides: list[str], problem: str) -> None:
    (found,) = tool_problems(config(*overrides).rollout)
    with pytest.raises(UserError, match=problem):
        raise UserError(found)


# ---- protocols


@pytest.mark.parametrize("name", ["mine:PLAIN", "mine:make_plain"])
def test_a_protocol_of_the_users_reads_scores_and_ends_like_ours(name: str) -> None:
    settings = config(f"rollout.protocol={name}", "rollout.extra_tools=['mine:Calculator']", "rollout.force_think=false")
    assert list(protocol_problems(settings.rollout)) == []
    form = ChatFormat(WORDS, settings.rollout, settings.reward)
    engine = Lines("igpo", ["CALCULATOR 1+1", "SAY 2"])
    tools = {**searching(ScriptedSearch()), "calculator": _made(settings)}
    with Rollouter(engine, tools, form, settings.rollout, seed=1) as rollouter:  # type: ignore[arg-type]
        (group,) = rollouter.start(rollouter.run([Prompt("q", "?", ("2",), "t")], samples=1, salt=1, temperature=None)).result()
    score(group, settings)
    assert group.trajectories[0].reward == 1.0


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("igop", "rollout.protocol='igop': expected one of igpo, .*did you mean 'igpo'"),
        ("mine:nobody", r"mine:nobody\(\) gives a NoneType; expected an .*ToolProtocol"),
        ("mine:MINE", "cannot be imported"),
        ("mine:LOSES", r"mine:LOSES.parse reads 'SEARCH the Blue Nile', which .write made of ToolCall"),
        ("mine:RAISES", r"mine:RAISES.parse raises IndexError: .* it must return Malformed"),
    ],
)
def test_what_is_no_protocol_is_said_before_anything_starts(name: str, problem: str) -> None:
    found = list(protocol_problems(config(f"rollout.protocol={name}").rollout))
    with pytest.raises(UserError, match=problem):
        raise UserError("\n".join(found))


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("search", ["search", "google_search"])
def test_our_own_protocols_are_sound_whatever_the_policy_calls_search(name: str, search: str) -> None:
    tools = ToolSet(search, 3, BUILT_IN.extra)
    assert list(unsound(PROTOCOLS[name], tools)) == []
    written = PROTOCOLS[name].write("t", ToolCall("search", ("x",)), tools)
    assert (search in written) is (search == "search" or name in ("igpo", "hermes"))


# ---- names of tools


def test_the_policy_knows_search_by_its_own_name_and_everything_else_by_ours() -> None:
    settings = config("rollout.tool_name=google_search")
    form = ChatFormat(tokenizer(), settings.rollout, settings.reward)
    wanted = '<think>a</think><tool_call>{"name": "%s", "arguments": {"query": "x"}}</tool_call>'
    assert form.parse(wanted % "google_search") == ToolCall("search", ("x",))
    assert '"google_search"' in form.write("t", ToolCall("search", ("x",)))
    engine = Lines("igpo", [wanted % "search", "<think>a</think><answer>x</answer>"])
    with Rollouter(engine, searching(ScriptedSearch()), form, settings.rollout, seed=1) as rollouter:  # type: ignore[arg-type]
        (group,) = rollouter.start(rollouter.run([Prompt("q", "?", ("x",), "t")], samples=1, salt=1, temperature=None)).result()
    (told,) = [node.text for node in group.nodes if node.kind == "observation"]
    assert told == "There is no tool named search. The only tool is google_search."
    assert group.actions(group.trajectories[0])[0].call == ToolCall("google_search", ("x",)), "not counted as a search"


# ---- settings


def test_hooks_come_from_yaml_and_the_command_line_and_are_kept_with_the_run(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: {path: m}\nrollout: {extra_tools: [python, 'mine:Calculator']}\nsearch: {options: {depth: 2}}\n")
    settings = load(file, ["search.backend=mine:Atlas", "search.options.depth=3", "rollout.protocol=mine:PLAIN"])
    assert settings.rollout.extra_tools == ("python", "mine:Calculator") and settings.search.options == {"depth": 3}
    assert build(json.loads(to_json(settings))) == settings
    for key in ("search.backend", "search.options", "rollout.extra_tools", "rollout.tool_options", "rollout.protocol"):
        assert key in explain(key)


def test_a_malformed_turn_is_malformed_for_every_protocol() -> None:
    for name, protocol in PROTOCOLS.items():
        assert isinstance(protocol.parse("", BUILT_IN), Malformed), name

"""Demonstrations: a scripted agent follows the facts it has been shown, in the run's own protocol, and recovers from its mistakes."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_templates import POLICY, family
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from igpo_megatron import cli
from igpo_megatron.agent import demonstrations as making
from igpo_megatron.agent.demonstrations import Demonstration, Task, demonstrate, turn_that_reads_back
from igpo_megatron.agent.demonstrator import NO_MISTAKES, USUAL, Intention, Mistakes, count_found, values_by_relation, write_script
from igpo_megatron.agent.settings import Rollout
from igpo_megatron.algorithms.settings import Reward
from igpo_megatron.chat.format import Answer, ChatFormat
from igpo_megatron.data import commands
from igpo_megatron.data.hops import ChainQuestion, endless, read_chains, split
from igpo_megatron.data.questions import igpo_row, igpo_schema
from igpo_megatron.observability.rollout_dump import read_rollouts
from igpo_megatron.search.local.bm25 import Bm25Index
from igpo_megatron.search.results import Passage, SearchResult, SearchStatus
from igpo_megatron.tools.search_tool import SearchTool
from igpo_megatron.types import SEARCH, Hop, Prompt, RolloutGroup, ToolCall, UserError

COUNTRIES = {"Iran": ("Tehran", "Rial", "Isfahan"), "Norway": ("Oslo", "Krone", "Bergen"), "Japan": ("Tokyo", "Yen", "Himeji")}
CODES = {"Rial": "IRR", "Krone": "NOK", "Yen": "JPY"}
PASSAGES = [
    *(f"The city of {city} lies in {country}." for country, (_, _, city) in COUNTRIES.items()),
    *(f"The capital of {country} is {capital}." for country, (capital, _, _) in COUNTRIES.items()),
    *(f"{country} uses the {currency} as its currency." for country, (_, currency, _) in COUNTRIES.items()),
    *(f"The {currency} is a currency with the code {code}." for currency, code in CODES.items()),
]


def chains() -> Iterator[ChainQuestion]:
    for country, (capital, currency, city) in COUNTRIES.items():
        one, two = Hop(country, "capital", capital), Hop(city, "country", country)
        three = (two, Hop(country, "currency", currency), Hop(currency, "code", CODES[currency]))
        yield ChainQuestion(Prompt(f"1-{country}", f"What is the capital of {country}?", (capital,), "one"), (one,))
        yield ChainQuestion(Prompt(f"2-{country}", f"What is the capital of the country of {city}?", (capital,), "two"), (two, one))
        text = f"What is the code of the currency of the country of {city}?"
        yield ChainQuestion(Prompt(f"3-{country}", text, (CODES[currency],), "three"), three)


CHAINS = list(chains())
VALUES = values_by_relation([chain.hops for chain in CHAINS])
NAMES = sorted({name for chain in CHAINS for hop in chain.hops for name in (hop.entity, hop.value)})


class LocalSearch:
    """The two best passages."""

    def __init__(self) -> None:
        self._index = Bm25Index([Passage(str(number), "", text) for number, text in enumerate(PASSAGES)])

    async def search(self, queries: Sequence[str]) -> list[SearchResult]:
        return [
            SearchResult(query, SearchStatus.OK, "local", tuple(passage for passage, _ in self._index.search(query, 2)))
            for query in queries
        ]

    async def close(self) -> None: ...


SETTINGS = {"max_context": 4096, "max_tokens_per_turn": 512, "max_observation_tokens": 512, "max_turns": 6}


def chat_of(protocol: str = "hermes", template: str = "smollm2", **settings: Any) -> tuple[ChatFormat, Rollout]:
    config = Rollout(**{**SETTINGS, "protocol": protocol, **settings})
    return ChatFormat(family(template), config, Reward()), config


def tasks(mistakes: Mistakes, max_turns: int, of: Sequence[ChainQuestion] = CHAINS, seed: int = 0) -> Iterator[Task]:
    for number, chain in enumerate(endless(of, "none", seed)):
        rng = random.Random(f"{seed}/{number}")
        yield Task(chain.prompt, write_script(chain.hops, chain.prompt.answers, VALUES, mistakes, max_turns, rng))


def make(count: int, mistakes: Mistakes, form: tuple[ChatFormat, Rollout], **options: Any) -> list[Demonstration]:
    chat, config = form
    found, tools = tasks(mistakes, config.max_turns, **options), {SEARCH: SearchTool(LocalSearch(), chat.protocol.hit)}
    with asyncio.Runner() as runner:
        return list(demonstrate(found, count, tools, chat, config, runner, Counter()))


def answer_of(one: Demonstration) -> str:
    action = one.intentions[-1].action
    assert isinstance(action, Answer)
    return action.text


def play(hops: Sequence[Hop], mistakes: Mistakes, max_turns: int, seed: int, show: Callable[[str], str]) -> list[Intention]:
    """The turns of a script whose searches show `show(query)`."""
    script = write_script(hops, (hops[-1].value,), VALUES, mistakes, max_turns, random.Random(seed))
    turns = [next(script)]
    while isinstance(turns[-1].action, ToolCall):
        turns.append(script.send(show(turns[-1].action.queries[0])))
    return turns


# ---- scripts


def test_a_query_names_only_what_stands_in_the_question_or_was_shown_before() -> None:
    seen = Counter[str]()
    for one in make(300, Mistakes(0.1, 0.8), chat_of()):
        group = one.group
        known = group.prompt.question
        for number in group.trajectories[0].path:
            node = group.nodes[number]
            if node.call is not None:
                unknown = [name for name in NAMES if name in node.call.queries[0] and name not in known]
                assert unknown == [], (node.call, known)
            known += node.text if node.kind == "observation" else ""
        seen.update(intention.purpose for intention in one.intentions)
    assert set(seen) == {"search", "vague", "wrong_relation", "skip", "answer", "early"}


def test_without_mistakes_each_fact_takes_one_search_and_the_answer_is_right() -> None:
    for one in make(60, NO_MISTAKES, chat_of(), of=CHAINS[2:3]):
        assert answer_of(one) == "IRR" and [i.purpose for i in one.intentions] == ["search"] * 3 + ["answer"]
        assert one.intentions[1].thought.startswith("The country of Isfahan is Iran. N")
        assert one.intentions[3].thought.startswith("The code of Rial is IRR.")


def test_honest_queries_vary_in_their_wording() -> None:
    asked = {one.intentions[0].action for one in make(60, NO_MISTAKES, chat_of(), of=CHAINS[:1])}
    assert asked == {ToolCall(SEARCH, (query,)) for query in ("capital of Iran", "Iran capital", "What is the capital of Iran?")}


def test_after_a_query_in_vain_the_agent_says_what_is_missing_and_asks_honestly() -> None:
    turns = play(
        (Hop("Iran", "capital", "Tehran"),), Mistakes(0.0, 1.0), 3, 0, lambda query: PASSAGES[3] if "Iran" in query else "No results."
    )
    vain = [number for number, turn in enumerate(turns) if turn.purpose in ("vague", "wrong_relation")]
    assert vain == [0]
    for seed in range(50):
        turns = play((Hop("Iran", "capital", "Tehran"),), Mistakes(0.0, 1.0), 9, seed, lambda query: "No results.")
        for before, after in pairwise(turns):
            if before.purpose not in ("search", "lost") and after.purpose != "lost":
                assert after.purpose == "search" and "the capital of Iran. I " in after.thought


def test_a_thought_says_what_its_query_asks_for() -> None:
    for one in make(100, Mistakes(0.0, 0.8), chat_of()):
        for intention in one.intentions:
            if isinstance(intention.action, ToolCall) and intention.purpose != "vague":
                asked = [relation for relation in VALUES if relation in intention.action.queries[0]]
                assert len(asked) == 1 and f"the {asked[0]} of " in intention.thought.split(" is ")[-1], intention


def test_an_honest_query_in_vain_is_asked_again_in_other_words() -> None:
    turns = play((Hop("Iran", "capital", "Tehran"),), NO_MISTAKES, 4, 1, lambda query: "No results.")
    assert [turn.purpose for turn in turns] == ["search"] * 3 + ["lost"] and len({turn.action for turn in turns}) == 4


def test_a_wrong_query_is_asked_only_where_turns_are_left_for_the_rest_of_the_chain() -> None:
    ends = Counter(one.intentions[-1].purpose for one in make(100, Mistakes(0.0, 1.0), chat_of(max_turns=4), of=CHAINS[2:3]))
    assert ends == {"answer": 100}
    assert all(len(one.intentions) == 4 for one in make(20, Mistakes(0.0, 1.0), chat_of(max_turns=4), of=CHAINS[2:3]))
    assert any(len(one.intentions) > 4 for one in make(20, Mistakes(0.0, 1.0), chat_of(max_turns=5), of=CHAINS[2:3]))


def test_an_early_answer_is_wrong_and_every_other_one_right() -> None:
    made = make(200, USUAL, chat_of())
    for one in made:
        assert (answer_of(one) in one.group.prompt.answers) == (one.intentions[-1].purpose == "answer")
    assert 20 < sum(one.intentions[-1].purpose == "early" for one in made) < 80


@pytest.mark.parametrize(
    ("shown", "found"),
    [
        ("The city of Bergen lies in Norway.", 1),
        ("The city of Bergen lies in Norway.\nThe capital of Norway is Oslo.", 2),
        ("The capital of Norway is Oslo.", 0),
        ("Bergen is large.\nNorway is cold.", 0),
        ("The city of Bergenhus lies in Norway.", 0),
    ],
)
def test_a_fact_is_found_where_entity_and_value_stand_in_one_line(shown: str, found: int) -> None:
    assert count_found([Hop("Bergen", "country", "Norway"), Hop("Norway", "capital", "Oslo")], shown) == found


@given(st.integers(0, 2**31), st.floats(0, 1), st.floats(0, 1), st.integers(1, 8), st.sampled_from(CHAINS))
def test_every_script_ends_within_its_turns(seed: int, early: float, query: float, max_turns: int, chain: ChainQuestion) -> None:
    turns = play(chain.hops, Mistakes(early, query), max_turns, seed, lambda asked: "\n".join(PASSAGES))
    assert len(turns) <= max_turns and isinstance(turns[-1].action, Answer)


# ---- in the run's protocol


@pytest.mark.parametrize("protocol", ["igpo", "hermes", "search_r1", "arpo"])
@pytest.mark.parametrize("template", ["smollm2", "qwen2.5", "qwen3", "qwen3_thinking", "llama3.1", "gemma", "mistral", "r1_distill"])
@pytest.mark.parametrize("force_think", [True, False])
def test_tokens_read_back_as_what_was_intended(protocol: str, template: str, force_think: bool) -> None:
    chat, config = chat_of(protocol, template, force_think=force_think)
    for one in make(8, USUAL, (chat, config)):
        (end,) = one.group.trajectories
        turns = one.group.actions(end)
        assert len(turns) == len(one.intentions)
        for node, intention in zip(turns, one.intentions, strict=True):
            text = chat.opening(node.turn)[1] + chat.decode(node.token_ids)
            assert chat.parse(text) == intention.action and intention.thought in text and text.count("<think>") == 1
            stopped = bool(chat.protocol.stop) and node.text.endswith(chat.protocol.stop)
            assert (node.token_ids[-1] in chat.turn_ends) == (not stopped)
        assert (
            end.answer == answer_of(one)
            and chat.protocol.final_answer([chat.opening(node.turn)[1] + node.text for node in turns]) is not None
        )  # format-valid, as a reward would see it


def test_a_protocol_that_cannot_write_an_action_refuses_it() -> None:
    chat, _ = chat_of("search_r1")
    with pytest.raises(ValueError, match="one call; this protocol writes one"):
        chat.turn_ids(1, "Two at once.", ToolCall(SEARCH, ("a", "b")))
    with pytest.raises(ValueError, match="which it wrote of"):
        turn_that_reads_back(chat_of("hermes")[0], 1, Intention("Blank ends.", Answer(" Oslo "), "answer"))
    with pytest.raises(UserError, match="contains a think tag"):
        make(10, NO_MISTAKES, chat_of(), of=[replace(CHAINS[0], hops=(replace(CHAINS[0].hops[0], relation="<think>"),))])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"max_tokens_per_turn": 10}, "a turn is longer than rollout.max_tokens_per_turn=10"),
        ({"max_context": 250}, "leaves no room|does not fit rollout.max_context=250"),
        ({"max_turns": 1}, "did not show the facts within rollout.max_turns=1"),
        ({"max_observation_tokens": 1}, "did not show the facts"),
    ],
)
def test_a_configuration_in_which_nothing_succeeds_is_refused_with_the_reason(settings: dict[str, int], reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        make(10, NO_MISTAKES, chat_of(**settings))


def test_a_question_that_does_not_fit_is_skipped_and_counted() -> None:
    chat, config = chat_of()
    long = replace(CHAINS[0], prompt=replace(CHAINS[0].prompt, id="long", question="capital of Iran " * 3000))
    skipped = Counter[str]()
    found, tools = tasks(NO_MISTAKES, 6, of=[*CHAINS, long]), {SEARCH: SearchTool(LocalSearch(), chat.protocol.hit)}
    with asyncio.Runner() as runner:
        made = list(demonstrate(found, 20, tools, chat, config, runner, skipped))
    assert len(made) == 20 and skipped.total() >= 1 and "rollout.max_context=4096" in skipped.most_common(1)[0][0]
    assert all(one.group.prompt.id != "long" for one in made)


# ---- questions with their hops


def questions_file(path: Path, rows: Iterable[tuple[Prompt, Any]]) -> Path:
    made = [igpo_row(prompt.source, prompt.question, prompt.answers, index=prompt.id, split="train", hops=hops) for prompt, hops in rows]
    pq.write_table(pa.Table.from_pylist(made, schema=igpo_schema("hops")), path)
    return path


def hops_json(chain: ChainQuestion) -> str:
    return json.dumps([[hop.entity, hop.relation, hop.value] for hop in chain.hops])


def test_questions_are_read_with_their_facts(tmp_path: Path) -> None:
    path = questions_file(tmp_path / "q.parquet", [(chain.prompt, hops_json(chain)) for chain in CHAINS])
    assert read_chains(path) == CHAINS


@pytest.mark.parametrize(
    ("hops", "problem"),
    [
        ("{", "not JSON"),
        ("[]", "expected JSON"),
        ('[["Iran", "capital"]]', "three texts"),
        ('[["Peru", "capital", "Tehran"]]', "'Peru' stands neither in the question"),
        ('[["Iran", "capital", "Lima"]]', "the last value 'Lima' is none of the answers"),
    ],
)
def test_a_question_whose_facts_cannot_be_followed_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, hops: str, problem: str
) -> None:
    bad = (CHAINS[0].prompt, hops)
    good = [(chain.prompt, hops_json(chain)) for chain in CHAINS[1:]]
    assert read_chains(questions_file(tmp_path / "some.parquet", [bad, *good])) == CHAINS[1:]
    assert "1 of 9 questions are left out" in caplog.text and problem in caplog.text and "extra_info.hops" in caplog.text
    with pytest.raises(UserError, match="1 of 1 questions are left out"):
        read_chains(questions_file(tmp_path / "all.parquet", [bad]))


def test_a_file_without_facts_is_refused_by_name_and_column(tmp_path: Path) -> None:
    path = tmp_path / "plain.parquet"
    pq.write_table(pa.Table.from_pylist([igpo_row("s", "Who?", ["I"], index="1", split="train")]), path)
    with pytest.raises(UserError, match=r"plain\.parquet: no row has a column extra_info\.hops"):
        read_chains(path)


@pytest.mark.parametrize("share", [0.2, 0.5])
def test_held_out_questions_begin_with_other_entities(share: float) -> None:
    kept, out = split(CHAINS, share)
    assert {chain.hops[0].entity for chain in kept}.isdisjoint(chain.hops[0].entity for chain in out)
    assert len({chain.hops[0].entity for chain in out}) == round(share * 6) and len(kept) + len(out) == len(CHAINS)
    assert split(CHAINS, 0.0) == (CHAINS, [])


def test_no_question_is_held_out_from_a_single_entity() -> None:
    with pytest.raises(UserError, match="holds out all 1 entities"):
        split(CHAINS[:1], 0.1)


def test_every_source_gives_a_question_in_turn() -> None:
    drawn = endless([*CHAINS, *CHAINS[::3]], "source", 0)
    assert [len({next(drawn).prompt.source for _ in range(3)}) for _ in range(20)] == [3] * 20
    plain = endless(CHAINS, "none", 0)
    assert [len({next(plain).prompt.id for _ in range(9)}) for _ in range(4)] == [9] * 4


# ---- the command


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    questions_file(tmp_path / "q.parquet", [(chain.prompt, hops_json(chain)) for chain in CHAINS])
    passages = [{"id": str(number), "title": "", "text": text} for number, text in enumerate(PASSAGES)]
    (tmp_path / "corpus.jsonl").write_text("".join(f"{json.dumps(passage)}\n" for passage in passages))
    settings = {
        "model": {"path": str(POLICY)},
        "data": {"train": [str(tmp_path / "q.parquet")]},
        "search": {"backend": "bm25", "corpus": str(tmp_path / "corpus.jsonl"), "top_k": 2},
        "rollout": {**SETTINGS, "protocol": "hermes"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(settings))
    return path


def ask(run_file: Path, out: Path, *arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["data", "demonstrations", str(run_file), "--out", str(out), *arguments])


def groups_of(path: Path) -> list[RolloutGroup]:
    return [group for _, groups in read_rollouts(path) for group in groups]


def test_the_command_writes_a_replay_file_and_one_of_other_questions(run_file: Path, tmp_path: Path) -> None:
    done = ask(run_file, tmp_path / "d.parquet", "--count", "40", "--held-out", "0.25", "--show", "1")
    assert done.exit_code == 0, done.output
    assert "d.parquet: 40 demonstrations:" in done.output and "<tool_call>" in done.output
    main, other = groups_of(tmp_path / "d.parquet"), groups_of(tmp_path / "d.held-out.parquet")
    assert (len(main), len(other)) == (40, 10) and len({group.prompt.id for group in main + other}) == 50
    assert {group.prompt.question for group in main}.isdisjoint(group.prompt.question for group in other)
    assert all(group.trained and all(node.token_ids for node in group.actions(group.trajectories[0])) for group in main)


def test_the_same_seed_gives_the_same_file_and_another_seed_another(run_file: Path, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert ask(run_file, tmp_path / name, "--count", "30", "--seed", seed).exit_code == 0
    first, same, other = (tmp_path.joinpath(name).read_bytes() for name in "abc")
    assert first == same != other


def test_clean_demonstrations_have_no_mistakes(run_file: Path, tmp_path: Path) -> None:
    done = ask(run_file, tmp_path / "d.parquet", "--count", "30", "--clean", "1")
    assert "30 demonstrations: 30 without a detour, 0 after one, 0 end wrong" in done.output, done.output


def test_an_interrupted_command_leaves_no_half_file(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = Counter[str]()
    real = making._one

    async def interrupted(*arguments: Any) -> Any:
        calls["one"] += 1
        if calls["one"] > 70:
            raise KeyboardInterrupt
        return await real(*arguments)

    monkeypatch.setattr(making, "_one", interrupted)
    assert ask(run_file, tmp_path / "d.parquet", "--count", "200").exit_code != 0
    assert [path.name for path in tmp_path.iterdir() if "d.parquet" in path.name] == []


def test_what_is_held_out_is_written_first_so_that_one_file_means_both(
    run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[str] = []
    monkeypatch.setattr(commands, "write_rollouts", lambda path, step, groups: written.append(path.name) or list(groups))
    assert ask(run_file, tmp_path / "d.parquet", "--count", "8", "--held-out", "0.25").exit_code == 0
    assert written == ["d.held-out.parquet", "d.parquet"]


def test_the_connections_of_a_search_server_stay_in_one_event_loop(run_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loops = []

    class Connected(LocalSearch):
        async def search(self, queries: Sequence[str]) -> list[SearchResult]:
            loops.append(asyncio.get_running_loop())
            return await super().search(queries)

        async def close(self) -> None:
            loops.append(asyncio.get_running_loop())

    monkeypatch.setattr(commands, "make_client", lambda settings: Connected())
    done = ask(run_file, tmp_path / "d.parquet", "--count", "8", "--held-out", "0.25")
    assert done.exit_code == 0, done.output
    assert len(loops) > 8 and len(set(loops)) == 1


def test_the_commands_refusals_are_one_sentence(run_file: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.parquet"
    pq.write_table(pa.Table.from_pylist([igpo_row("s", "Who?", ["I"], index="1", split="train")]), plain)
    for arguments, said in (
        (("--questions", str(plain)), "plain.parquet: no row has a column extra_info.hops"),
        (("--questions", str(tmp_path / "none.parquet")), "none.parquet"),
        (("rollout.max_tokens_per_turn=5",), "raise it"),
        (("data.train=[]",), "no questions: name files"),
    ):
        done = ask(run_file, tmp_path / "d.parquet", "--count", "5", *arguments)
        assert done.exit_code == 2 and said in " ".join(done.output.split()), done.output
        assert not (tmp_path / "d.parquet").exists()

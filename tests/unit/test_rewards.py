"""Outcome rewards: the published rule on whole texts, and the same rule on a trajectory's own text."""

import json
import re
import string
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from igpo_megatron.algorithms.outcomes import REWARDS, exact_match, exact_match_squad, f1, f1_multiset, normalise, normalise_squad
from igpo_megatron.algorithms.rewards import overlong_penalty, published_score, score, score_lines
from igpo_megatron.chat.protocols.igpo import tags_balanced
from igpo_megatron.config.load import build
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, ToolCall, Trajectory

GOLDEN = Path(__file__).parents[1] / "fixtures" / "golden" / "outcome_scores.json"

CALL = 'I look it up.</think>\n<tool_call>{"name": "web_search", "arguments": {"query": ["x"]}}</tool_call><|im_end|>'
ANSWER = "I know.</think>\n<answer>Ancient Rome</answer><|im_end|>"


def finished_group(*, observation="Rome was a city.", last=ANSWER, status=Status.FINISHED, prompt="Use <answer> tags.", answers=("Rome",)):
    """One trajectory of two turns, `<think>` forced before each."""
    texts = [
        ("prompt", prompt),
        ("forced", "<think>"),
        ("action", CALL),
        ("observation", observation),
        ("forced", "<think>"),
        ("action", last),
    ]
    nodes = [Node(parent=i - 1 if i else None, kind=kind, token_ids=[i], text=text) for i, (kind, text) in enumerate(texts)]
    question = Prompt(id="q", question="Which empire?", answers=answers, source="test")
    return RolloutGroup(question, nodes, [Trajectory(path=list(range(len(nodes))), status=status)])


def scoring(protocol="igpo", **reward):
    """A configuration that scores by these settings of section `reward`."""
    return build({"model": {"path": "m"}, "rollout": {"protocol": protocol}, "reward": reward})


def scored(group, **settings):
    score(group, scoring(**settings))
    return group.trajectories[0]


def test_published_scores_match_every_golden_case():
    cases = json.loads(GOLDEN.read_text())
    assert len(cases) == 200
    for case in cases:
        result = published_score(case["solution"], case["ground_truth"])
        assert result.format_ok == (case["f1"] != -2.0)
        assert result.reward == pytest.approx(case["f1"], abs=1e-12)
        assert result.f1 == pytest.approx(case["f1_ignoring_format"], abs=1e-12)
        assert result.em == max(case["em"], 0.0)


def test_normalising_keeps_articles_and_turns_punctuation_into_spaces():
    assert normalise("  The U.S.A.\n75,000!") == "the u s a 75 000"


def test_f1_counts_repeated_words_once_and_takes_the_best_alias():
    # {new, york} against {new, york, city}: 2 * 2 / (2 + 3).
    assert f1("New new York", ["Boston", "New York City"]) == pytest.approx(0.8)
    assert f1("", ["Rome"]) == f1("Rome", [""]) == f1("Rome", []) == 0.0


def test_exact_match_accepts_any_alias():
    assert exact_match("Rome.", ["Roma", "ROME"]) == 1.0
    assert exact_match("Rome city", ["Roma", "ROME"]) == 0.0


@pytest.mark.parametrize(
    ("text", "balanced"),
    [
        ("no tags at all", True),
        ("<think>a</think><answer>b</answer>", True),
        ("<think>a<answer>b</answer>", False),
        ("</think>a<think>", False),
        ("<think></think></think><think>", False),
        ("<code>", False),
        ("<tool_response>", True),
    ],
)
def test_tags_must_open_as_often_as_they_close_and_close_after_they_open(text, balanced):
    assert tags_balanced(text) is balanced


def test_the_first_of_two_answers_is_scored():
    assert published_score("<answer>Rome</answer><answer>Paris</answer>", "Paris").f1 == 0.0
    assert published_score("<answer>Rome</answer><answer>Paris</answer>", "Oslo<|answer_split|>rome").em == 1.0


def test_a_trajectory_earns_the_configured_outcome_and_records_all_parts():
    # {ancient, rome} against {rome}: 2 * 1 / (2 + 1).
    trajectory = scored(finished_group())
    assert trajectory.reward == pytest.approx(2 / 3)
    assert trajectory.reward_parts == {"f1": pytest.approx(2 / 3), "em": 0.0, "format_ok": 1.0}
    assert scored(finished_group(), outcome="em").reward == 0.0
    assert scored(finished_group(answers=("Paris", "ancient rome")), outcome="em").reward == 1.0


@pytest.mark.parametrize("name", REWARDS)
def test_an_outcome_can_be_chosen_and_compares_texts_in_its_normal_form(name):
    function, normal_form = REWARDS[name]
    assert function("The U.S.A.", [normal_form("The U.S.A.")]) == 1.0
    assert build({"model": {"path": "m"}, "reward": {"outcome": name}}).reward.outcome == name


def test_tags_in_tool_results_and_prompts_do_not_break_the_format():
    group = finished_group(observation="A page that says <answer> and </think> <tool_call>")
    # The published rule on the whole text fails on the same page.
    assert not published_score("".join(node.text for node in group.nodes), "Rome").format_ok
    assert scored(group).reward_parts["format_ok"] == 1.0


def test_forced_text_counts_as_the_models_own():
    group = finished_group()
    group.nodes[4].text = ""
    assert scored(group).reward == -2.0


def test_an_unbalanced_own_text_or_an_unfinished_trajectory_earns_the_penalty():
    for group in (
        finished_group(last="I know. <think></think>\n<answer>Rome</answer>"),
        finished_group(last="I know.</think> Rome"),
        finished_group(status=Status.TRUNCATED_TURNS),
        finished_group(status=Status.BAD_FORMAT),
    ):
        trajectory = scored(group, format_penalty=-0.5)
        assert trajectory.reward == -0.5
        assert trajectory.reward_parts == {"f1": 0.0, "em": 0.0, "format_ok": 0.0}


def test_trajectories_that_say_nothing_about_the_policy_are_not_scored():
    trajectory = scored(finished_group(status=Status.TOOL_FAILED))
    assert trajectory.reward == 0.0
    assert trajectory.reward_parts == {}


def official_squad(text):
    """SQuAD's and HotpotQA's evaluation scripts: lower, then punctuation, then articles, then whitespace."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def official_f1(prediction, answers):
    """HotpotQA's `f1_score`, the best over answers."""
    best = 0.0
    for answer in answers:
        left, right = official_squad(prediction), official_squad(answer)
        if left != right and {left, right} & {"yes", "no", "noanswer"}:
            continue
        common = sum((Counter(left.split()) & Counter(right.split())).values())
        if common:
            precision, recall = common / len(left.split()), common / len(right.split())
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


WORDS = "the a An Beatles yes no noanswer U.S.A. co-op 1990 “the “The” Who\u2019s the\u2013end end rock-'n'-roll"
WORDS += " a\u2014b theé é the_ the\u00a0x . the's"
TEXTS = st.lists(st.sampled_from(WORDS.split(" ")), max_size=4).map(" ".join)


@settings(max_examples=300, deadline=None, database=None, derandomize=True)
@given(TEXTS, st.lists(TEXTS, min_size=1, max_size=2))
def test_squad_scores_are_those_of_its_own_script(prediction, answers):
    assert normalise_squad(prediction) == official_squad(prediction)
    assert f1_multiset(prediction, answers) == pytest.approx(official_f1(prediction, answers), abs=1e-12)
    assert exact_match_squad(prediction, answers) == any(official_squad(prediction) == official_squad(answer) for answer in answers)


def test_articles_count_in_igpos_exact_match_and_not_in_search_r1s():
    assert (exact_match("Beatles", ["The Beatles"]), exact_match_squad("Beatles", ["The Beatles"])) == (0.0, 1.0)
    assert (exact_match("co op", ["co-op"]), exact_match_squad("co op", ["co-op"])) == (1.0, 0.0)
    assert f1_multiset("Beatles", ["“The” Beatles"]) == 0.5, "what is left of the article is a word of its own: “”"
    trajectory = scored(finished_group(answers=("the ancient Rome",)), outcome="em_squad")
    assert trajectory.reward == 1.0
    assert trajectory.reward_parts == {"f1": pytest.approx(2 * 2 / (2 + 3)), "em": 0.0, "em_squad": 1.0, "format_ok": 1.0}
    malformed = scored(finished_group(status=Status.BAD_FORMAT), outcome="em_squad")
    assert malformed.reward_parts == {"f1": 0.0, "em": 0.0, "em_squad": 0.0, "format_ok": 0.0}


def test_squad_f1_counts_repeated_words_and_not_articles():
    assert (
        f1_multiset("New York, New York", ["new york"]) == pytest.approx(2 * 2 / (4 + 2)) and f1("New York, New York", ["new york"]) == 1.0
    )
    assert f1_multiset("The U.S.A.", ["usa"]) == 1.0 and f1_multiset("a b", ["x", "b c"]) == pytest.approx(2 / 3)
    # {the} alone leaves nothing; yes and no match whole answers only.
    assert f1_multiset("the", ["the"]) == 0.0 and f1_multiset("yes it is", ["yes"]) == 0.0 and f1_multiset("Yes.", ["yes"]) == 1.0


def arpo_group(*calls, observed=True, page="Rome."):
    """Calls in turn, each followed by a result, then a right answer, in ARPO's tags."""
    group = RolloutGroup(Prompt(id="q", question="?", answers=("Rome",), source="test"), [Node(None, "prompt", [1], text="?")])
    path = [0]
    for turn, name in enumerate(calls, start=1):
        text = f"<think>x</think><{name}>y</{name}>"
        path.append(group.add(Node(path[-1], "action", [2], turn, text, call=ToolCall(name, ("y",)))))
        if observed:
            path.append(group.add(Node(path[-1], "observation", [3], turn, page)))
    last = "<think>x</think><answer>\\boxed{Rome}</answer>"
    path.append(group.add(Node(path[-1], "action", [4], len(calls) + 1, last)))
    group.trajectories = [Trajectory(path, Status.FINISHED)]
    return group


@pytest.mark.parametrize(
    ("group", "reward"),
    [
        (arpo_group("search", "python"), 1.1),
        (arpo_group("search", "search", page="See </python> and <answer>."), 1.0),  # a page earns no bonus and breaks no format
        (arpo_group("python"), 1.0),
        (arpo_group("search", "python", observed=False), 1.0),
        (arpo_group(), 1.0),
    ],
)
def test_the_tool_bonus_is_for_tools_that_ran_and_not_for_tags_in_a_text(group, reward):
    settings = scoring("arpo", outcome="f1_multiset", format_penalty=-1.0, tool_bonus=0.1)
    score(group, settings)
    assert group.trajectories[0].reward == pytest.approx(reward)


def test_arpos_reward_is_zero_for_a_wrong_answer_with_both_tools_and_minus_one_without_a_box():
    settings = scoring("arpo", outcome="f1_multiset", format_penalty=-1.0, tool_bonus=0.1)
    wrong, unboxed = arpo_group("search", "python"), arpo_group("search", "python")
    wrong.nodes[-1].text = "<think>x</think><answer>\\boxed{Paris}</answer>"
    unboxed.nodes[-1].text = "<think>x</think><answer>Rome</answer>"
    for group in (wrong, unboxed):
        score(group, settings)
    assert (wrong.trajectories[0].reward, unboxed.trajectories[0].reward) == (0.0, -1.0)


def test_score_lines_gives_one_result_per_line(tmp_path):
    file = tmp_path / "answers.jsonl"
    rows = [
        {"solution": "<think>a</think><answer>New York</answer>", "ground_truth": "Boston<|answer_split|>New York City"},
        {"solution": "<answer>New York", "ground_truth": "New York"},
    ]
    file.write_text("\n\n".join(json.dumps(row) for row in rows) + "\n")
    assert list(score_lines(file)) == [
        {"f1": pytest.approx(0.8), "em": 0.0, "format_ok": True, "reward": pytest.approx(0.8)},
        {"f1": 0.0, "em": 0.0, "format_ok": False, "reward": -2.0},
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{not json", "not JSON"),
        (b'{"solution": "\xff"}', "not JSON"),
        (b'["a"]', "JSON list"),
        (b'{"ground_truth": "a"}', "'solution' is missing"),
        (b'{"solution": "a", "ground_truth": ["a"]}', "'ground_truth' is a list"),
    ],
)
def test_score_lines_names_the_line_it_cannot_read(tmp_path, line, complaint):
    file = tmp_path / "answers.jsonl"
    file.write_bytes(b'{"solution": "a", "ground_truth": "b"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=f"answers.jsonl, line 2: .*{complaint}"):
        list(score_lines(file))


def test_overlong_shaping_falls_linearly_between_its_two_lengths():
    assert [overlong_penalty(tokens, 10, 20) for tokens in (5, 10, 15, 20, 99)] == [0.0, 0.0, -0.5, -1.0, -1.0]


def test_a_long_trajectory_earns_less():
    """Two turns; the shaping starts at no token and ends after twice as many as there are, so half a point is lost."""
    group = finished_group()
    tokens = sum(len(node.token_ids) for node in group.actions(group.trajectories[0]))
    assert scored(group, overlong=(0, 2 * tokens)).reward == scored(finished_group()).reward - 0.5

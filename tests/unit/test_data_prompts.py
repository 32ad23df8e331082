"""Questions from the three published layouts, and an order that is resumable to the row.

fixtures/igpo_dev_15.parquet holds 15 rows of IGPO's published dev.parquet, byte for byte in its schema.
"""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from igpo_megatron.data.prompts import PromptStream, permutation, read_prompts
from igpo_megatron.data.question_files import check_file
from igpo_megatron.types import Prompt

DEV = Path(__file__).resolve().parents[1] / "fixtures" / "igpo_dev_15.parquet"


def igpo_row(index, *, source="nq", question="Who?", truth="a<|answer_split|>b"):
    return {
        "data_source": source,
        "prompt": [{"content": question, "role": "user"}],
        "reward_model": {"ground_truth": truth, "style": "unknown"},
        "extra_info": {"index": index, "split": "train"},
    }


def write(folder, rows, name="questions.parquet", schema=None):
    path = folder / name
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return path


def sized(folder, **sizes):
    """A file with the given number of questions per source, e.g. sized(folder, nq=2)."""
    rows = [igpo_row(f"{source}-{n}", source=source, question=f"{source} {n}?") for source, size in sizes.items() for n in range(size)]
    return write(folder, rows)


# ---- layouts


def test_the_igpo_layout_keeps_all_aliases_in_file_order():
    prompts = read_prompts(DEV)
    assert len(prompts) == 15
    assert prompts[1] == Prompt(
        "popqa_4174473", "Who is the father of Dan?", ("Jacob", "Israel", "Ya'akov", "Ya'aqov", "Yaakov", "Yisrael"), "popqa"
    )
    assert len(prompts[0].answers) == 26 and prompts[0].answers[:2] == ("türkiye", "türkei")


def test_the_arpo_layout_asks_its_plain_question_and_ignores_the_system_prompt(tmp_path):
    rows = [
        {
            "data_source": "DR_grpo_mix",
            "prompt": [{"role": "system", "content": "Solve it."}, {"role": "user", "content": "1+1?"}],
            "ability": "math",
            "reward_model": {"ground_truth": "2", "style": "rule"},
            "extra_info": {"index": 0, "question": "1+1?", "split": "train", "need_tools_kwargs": False},
            "metadata": None,
        }
    ]
    path = write(tmp_path, rows)
    assert read_prompts(path) == [Prompt("DR_grpo_mix-train-0", "1+1?", ("2",), "DR_grpo_mix")]
    assert check_file(path).layout == "ARPO"


def test_a_boxed_whose_backslash_was_eaten_is_repaired_with_one_warning(tmp_path, caplog):
    """The published ARPO files: `\\b` in a string literal is a backspace character."""
    row = {
        "data_source": "DR_grpo_mix",
        "prompt": [{"role": "system", "content": "End with \boxed{}."}, {"role": "user", "content": "Put it in \boxed{}."}],
        "reward_model": {"ground_truth": "\boxed{2}", "style": "rule"},
        "extra_info": {"index": 1, "question": "Put it in \boxed{}.", "split": "train"},
    }
    whole = {**row, "extra_info": {**row["extra_info"], "index": 2, "question": "1+1?"}, "prompt": [{"role": "user", "content": "1+1?"}]}
    whole["reward_model"] = {"ground_truth": "2", "style": "rule"}
    first, second = read_prompts(write(tmp_path, [row, whole]))
    assert (first.question, first.answers) == ("Put it in \\boxed{}.", ("\\boxed{2}",)) and second.question == "1+1?"
    (warning,) = caplog.records
    assert "1 of 2 rows spell \\boxed with a backspace character" in warning.getMessage()


def test_the_search_r1_layout_takes_the_question_out_of_the_instruction_and_keeps_all_targets(tmp_path):
    row = {
        "data_source": "triviaqa",
        "prompt": [{"role": "user", "content": "Answer the given question. Use <search>. Question: who wrote it?\n"}],
        "ability": "fact-reasoning",
        "reward_model": {"style": "rule", "ground_truth": {"target": ["Ann", "A. Bell"]}},
        "extra_info": {"split": "test", "index": 3},
    }
    assert read_prompts(write(tmp_path, [row])) == [Prompt("triviaqa-test-3", "who wrote it?", ("Ann", "A. Bell"), "triviaqa")]
    with_column = write(tmp_path, [row | {"question": "Who wrote Question: 7?"}])
    assert read_prompts(with_column)[0].question == "Who wrote Question: 7?"
    assert check_file(with_column).layout == "Search-R1"


def test_repeated_and_absent_ids_are_told_apart_by_their_row(tmp_path):
    path = write(tmp_path, [igpo_row("x"), igpo_row("x"), igpo_row(None), igpo_row("y")])
    assert [prompt.id for prompt in read_prompts(path)] == ["x#0", "x#1", "row#2", "y"]


# ---- bad input


def test_a_missing_file_an_empty_one_and_one_that_is_no_parquet_say_so(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.parquet: cannot be used.*\n.*no such file"):
        read_prompts(tmp_path / "gone.parquet")
    empty = write(tmp_path, [], schema=pq.read_schema(DEV))
    with pytest.raises(ValueError, match=r"the file has no rows; expected at least one question"):
        read_prompts(empty)
    text = tmp_path / "text.parquet"
    text.write_text("id,question\n1,Who?\n")
    with pytest.raises(ValueError, match=r"text\.parquet.*\n.*not a parquet file"):
        read_prompts(text)


def test_a_damaged_file_is_reported_and_not_raised(tmp_path):
    content = bytearray(sized(tmp_path, nq=500).read_bytes())
    content[4:2000] = b"\xff" * 1996
    damaged = tmp_path / "damaged.parquet"
    damaged.write_bytes(content)
    assert "the parquet file is damaged" in check_file(damaged).problems[0].message


def test_missing_and_mistyped_columns_are_named_with_what_was_expected(tmp_path):
    rows = [{"question": "Who?", "prompt": "Who?", "reward_model": {"ground_truth": 3}}]
    with pytest.raises(ValueError) as caught:
        read_prompts(write(tmp_path, rows))
    message = str(caught.value)
    assert "column data_source: column is missing (found question, prompt, reward_model); expected string" in message
    assert "column prompt: found type string, expected list of structs with role and content" in message
    rows = [igpo_row("x") | {"reward_model": {"ground_truth": 3}}]
    with pytest.raises(ValueError, match=r"reward_model\.ground_truth: found type int64, expected a string"):
        read_prompts(write(tmp_path, rows))


def test_every_bad_row_is_reported_with_row_and_column_and_the_rest_is_counted(tmp_path):
    rows = [
        igpo_row("good"),
        igpo_row("1", question="  "),
        igpo_row("2", truth="a<|answer_split|>"),
        igpo_row("3", truth=None, source=None),
        igpo_row("4") | {"prompt": [{"role": "system", "content": "Be brief."}]},
    ]
    path = write(tmp_path, rows)
    report = check_file(path)
    assert report.sources == {"nq": 1} and report.layout == "IGPO"
    assert [(problem.row, problem.column) for problem in report.problems] == [
        (1, "prompt"),
        (2, "reward_model.ground_truth"),
        (3, "data_source"),
        (3, "reward_model.ground_truth"),
        (4, "prompt"),
    ]
    assert str(report.problems[1]) == "row 2, column reward_model.ground_truth: answer 2 of 2 is empty"
    with pytest.raises(ValueError, match=r"row 4, column prompt: .* roles \['system'\], expected exactly one user message"):
        read_prompts(path)


def test_an_error_lists_ten_problems_and_counts_the_rest(tmp_path):
    with pytest.raises(ValueError, match=r"row 9,(.|\n)*and 3 more"):
        read_prompts(write(tmp_path, [igpo_row(str(n), truth="") for n in range(13)]))


# ---- order


def stream(path, *, seed=0, shuffle=True, balance="none"):
    return PromptStream([path], seed=seed, shuffle=shuffle, balance=balance)


def take(questions, n):
    """The next `n` questions, done at once."""
    ordinals = questions.draw(n)
    questions.done(ordinals)
    return [questions.question(ordinal) for ordinal in ordinals]


def test_an_epoch_holds_every_question_once_and_the_next_one_in_another_order(tmp_path):
    questions = stream(sized(tmp_path, nq=20))
    first, second = take(questions, 20), take(questions, 20)
    assert {prompt.id for prompt in first} == {prompt.id for prompt in second} and len({prompt.id for prompt in first}) == 20
    assert first != second


def test_the_order_depends_on_the_seed_and_not_on_how_it_is_cut_into_steps(tmp_path):
    path = sized(tmp_path, nq=7)
    whole = take(stream(path), 30)
    pieces = stream(path)
    assert [prompt for size in (1, 2, 9, 18) for prompt in take(pieces, size)] == whole
    assert take(stream(path, seed=1), 30) != whole


def test_without_shuffling_the_rows_come_in_file_order(tmp_path):
    assert [prompt.id for prompt in take(stream(sized(tmp_path, nq=3), shuffle=False), 4)] == ["nq-0", "nq-1", "nq-2", "nq-0"]


@pytest.mark.parametrize("balance", ["none", "source"])
def test_a_stream_resumes_to_the_row_through_json(tmp_path, balance):
    path = sized(tmp_path, nq=5, tq=3)
    running = stream(path, balance=balance)
    take(running, 11)
    resumed = stream(path, balance=balance)
    resumed.load_state(json.loads(json.dumps(running.state())))
    assert take(resumed, 25) == take(running, 25)


def test_what_was_under_way_at_a_checkpoint_is_drawn_first_and_only_once(tmp_path):
    path = sized(tmp_path, nq=30)
    running = stream(path)
    first, second, third = (running.draw(4) for _ in range(3))
    running.done([*second, first[1]])
    resumed = stream(path)
    resumed.load_state(json.loads(json.dumps(running.state())))
    assert resumed.state() == running.state()
    assert resumed.draw(3) == [first[0], *first[2:]]
    again = stream(path)
    again.load_state(resumed.state())  # stopped again before any of them was done
    assert again.draw(9) == [first[0], *first[2:], *third, 12, 13]
    again.done(range(14))
    assert again.state()["open"] == []


def test_balance_draws_every_source_equally_often_and_small_sources_repeat_in_whole_epochs(tmp_path):
    questions = take(stream(sized(tmp_path, nq=6, tq=2), balance="source"), 12)
    assert Counter(prompt.source for prompt in questions) == {"nq": 6, "tq": 6}
    assert all({a.source, b.source} == {"nq", "tq"} for a, b in zip(questions[::2], questions[1::2], strict=True))
    assert Counter(prompt.id for prompt in questions if prompt.source == "tq") == {"tq-0": 3, "tq-1": 3}
    assert len({prompt.id for prompt in questions if prompt.source == "nq"}) == 6


def test_resuming_on_changed_files_or_settings_is_refused_with_each_difference(tmp_path):
    path = sized(tmp_path, nq=4)
    state = stream(path).state()
    sized(tmp_path, nq=5)
    with pytest.raises(ValueError, match=r"changed since the checkpoint \(4 then, 5 now\)"):
        stream(path).load_state(state)
    sized(tmp_path, nq=4)
    with pytest.raises(ValueError, match=r"run\.seed was 0 .* is 3 now(.|\n)*data\.balance was 'none'"):
        stream(path, seed=3, balance="source").load_state(state)
    same_size = write(tmp_path, [igpo_row(f"nq-{n}", question=f"nq {n}?", truth="other") for n in range(4)])
    with pytest.raises(ValueError, match="training questions changed"):
        stream(same_size).load_state(state)


def test_files_that_only_moved_still_resume(tmp_path):
    path = sized(tmp_path, nq=4)
    running = stream(path)
    take(running, 3)
    moved = stream(path.rename(tmp_path / "elsewhere.parquet"))
    moved.load_state(running.state())
    assert take(moved, 5) == take(running, 5)


def test_a_stream_without_files_says_which_setting_is_empty():
    with pytest.raises(ValueError, match=r"data\.train"):
        PromptStream([], seed=0, shuffle=True, balance="none")


def test_the_permutation_is_the_same_for_ever():
    assert permutation(6, "0/source nq/0") == [5, 0, 2, 4, 3, 1]
    assert sorted(permutation(1000, "a")) == list(range(1000)) and permutation(1000, "a") != permutation(1000, "b")

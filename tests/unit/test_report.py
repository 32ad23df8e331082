import json
import random
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from igpo_megatron.config.load import build, to_json
from igpo_megatron.observability.report.charts import Limits, _bins
from igpo_megatron.observability.report.page import collect, write_report
from igpo_megatron.observability.report.trajectories import _pieces, _split_sections
from igpo_megatron.observability.rollout_dump import write_rollouts
from igpo_megatron.types import Node, Prompt, RolloutGroup, Status, ToolCall, Trajectory

EVERYTHING = Limits()
ATTACK = "</script><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\"> & {{ 7*7 }}"
TURNS = (
    "I need the currency of Iran.</think>\n"
    + '<tool_call>{"name": "search", "arguments": {"query": "currency of Iran"}}</tool_call><|im_end|>',
    "I can answer now.</think>\n<answer>Iranian Rial é</answer><|im_end|>",
)


def make_tokenizer(folder: Path) -> Tokenizer:
    """A byte-level tokenizer in `folder`, with the end-of-turn token as one id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|im_end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([text.replace("é", "") for text in TURNS], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


def make_group(tokenizer: Tokenizer, name: str, step: int, samples: int = 4, attack: str = "") -> RolloutGroup:
    """One question with a search turn and an answer turn per sample; every second sample fails."""
    rng = random.Random(f"{name}{step}")
    group = RolloutGroup(
        Prompt(name, f"What is the currency of Iran? {name}{attack}", ("Iranian Rial" + attack,), "world_1hop" + attack), []
    )

    def node(parent: int | None, kind, turn: int, text: str, **values) -> int:
        return group.add(Node(parent, kind, tokenizer.encode(text).ids, turn, text, **values))

    def action(parent: int, turn: int, text: str, **values) -> int:
        index = node(parent, "action", turn, text, weight_version=step, **values)
        group.nodes[index].behavior_logprobs = [-rng.expovariate(2) for _ in group.nodes[index].token_ids]
        group.nodes[index].old_logprobs = list(group.nodes[index].behavior_logprobs)
        return index

    def probe(parent: int, turn: int, value: float) -> None:
        group.add(Node(parent, "probe", [1, 2, 3, 4], turn, "Iranian Rial", old_logprobs=[value, value], scored=(1, 3)))

    start = node(None, "prompt", 0, f"user: {name}{attack}")
    forced = node(start, "forced", 1, "<think>")
    probe(forced, 0, -4.0)
    for sample in range(samples):
        good = sample % 2 == 0
        call = action(forced, 1, TURNS[0] + attack, call=ToolCall("search", ("currency of Iran",)))
        seen = node(call, "observation", 1, "(1) The Iranian Rial is the currency of Iran." + attack)
        again = node(seen, "forced", 2, "<think>")
        probe(again, 1, -1.0 if good else -4.5)
        answer = action(again, 2, TURNS[1])
        path = [start, forced, call, seen, again, answer]
        group.trajectories.append(
            Trajectory(path, Status.FINISHED, "Rial" + attack, "", 1.0, {"f1": 1.0, "em": 0.0}, [3.0, None], [1.5, 1.0])
            if good
            else Trajectory(path[:4], Status.TOOL_FAILED, None, "bm25: timeout" + attack, 0.0, {"f1": 0.0}, [-0.5], [-1.5])
        )
    return group


def make_run(folder: Path, steps: int = 6, *, finished: bool = True, attack: str = "", groups: int = 3) -> Path:
    """A run folder such as training leaves it, with made-up numbers."""
    tokenizer = make_tokenizer(folder / "policy")
    config = build({"model": {"path": str(folder / "policy")}, "run": {"name": "demo" + attack, "steps": steps, "folder": str(folder)}})
    (folder / "config.json").write_text(to_json(config))
    scores = {"f1": 0.2, "em": 0.1, "format_ok": 0.9, "searches": 1.5, "questions": 3, "f1_se": 0.01}
    rows = []
    for step in range(steps + 1):
        ends = step in (0, steps)
        row = {
            "step": step,
            "time": 1.7e9 + step,
            "phases_s": {"startup": 30.0} if step == 0 else {"rollout": 2.0, "train": 2.5, "sync": 0.3},
        }
        if step:
            row |= {
                "reward": 0.2 + 0.05 * step,
                "f1": 0.3,
                "em": 0.2,
                "gain": 0.5,
                "gain_turn_1": 0.1,
                "gain_turn_2": 0.9,
                "gain_turn_10": 0.3,
            }
            row |= {
                "logprob_gap_mean": 1e-6,
                "logprob_gap_max": 4e-5,
                "canary_gap": 0.0,
                "grad_norm": None if step == 2 else 0.7,
                "skipped": 0.0,
            }
            row |= {"turns": 2.5, "searches": 1.4, "visits": 0.5, "search/ok": 50.0 + step, "search/empty": 3.0, "search/error": 0.0}
            row |= {"search/timeout": 2.0, "search/rate_limited": 0.0, "search/cached": 8.0 * step}
            row |= {"search/p50_s": 0.4, "search/p95_s": 2.0, "visit/p50_s": 1.0, "visit/p95_s": 9.0}
            rollouts = [make_group(tokenizer, f"train-{step}-{number}", step, attack=attack) for number in range(groups)]
            write_rollouts(folder / "rollouts" / f"step_{step:06d}.parquet", step, rollouts)
        if ends:
            row |= {f"eval/sampled/{name}": value + 0.1 * (step > 0) for name, value in scores.items()}
            halves = {"world_1hop" + attack: {"f1": 0.4, "questions": 2}, "world_2hop": {"f1": 0.1, "questions": 1}}
            both = {"step": step, "sampled": {**scores, "per_source": halves}, "greedy": scores}
            (folder / "eval").mkdir(exist_ok=True)
            (folder / "eval" / f"step_{step:06d}.json").write_text(json.dumps(both))
            for kind in ("sampled", "greedy"):
                held_out = [make_group(tokenizer, f"test-{number}", step, samples=2, attack=attack) for number in range(groups)]
                write_rollouts(folder / "eval" / f"step_{step:06d}_{kind}.parquet", step, held_out)
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        before = {
            "f1_sampled": 0.215,
            "f1_greedy": 0.5,
            "em_greedy": 0.45,
            "format_valid": 0.92,
            "searches_per_question": 1.6,
            "questions": 360,
        }
        summary = {
            "before": {**before, "f1_sampled_se": 0.015},
            "after": {**before, "f1_sampled": 0.325, "f1_greedy": 0.49, "f1_sampled_se": 0.017},
            "steps": steps,
            "wall_s": 61.0,
            "phases_s": {"startup": 30.0, "rollout": 12.0, "train": 15.0},
            "max_logprob_gap": 4e-5,
        }
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


class Page(HTMLParser):
    """What a browser would load, run and show."""

    def __init__(self, html: str):
        super().__init__()
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.scripts: list[str] = []
        self.text = ""
        self.rows: list[str] = []
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "link", "i", "br"):
            self._inside.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action") and value]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append("")

    def handle_endtag(self, tag):
        if tag in self._inside:
            while self._inside.pop() != tag:
                pass

    def handle_data(self, data):
        if "script" in self._inside:
            self.scripts[-1] += data
        elif "style" not in self._inside:
            self.text += data
            if "tr" in self._inside:
                self.rows[-1] += " ".join(data.split()) + " " if data.strip() else ""

    @property
    def data(self):
        return json.loads(self.scripts[0], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def page_of(folder: Path, limits: Limits = EVERYTHING) -> Page:
    return Page(write_report(folder, limits).read_text(encoding="utf-8"))


def test_a_finished_run_shows_its_table_before_and_after(tmp_path):
    page = page_of(make_run(tmp_path))
    rows = [row.strip() for row in page.rows]
    assert "F1, sampled at training temperature 0.215 ± 0.015 0.325 ± 0.017 +0.110" in rows
    assert "F1, greedy 0.500 0.490 -0.010" in rows
    assert "Searches per question 1.600 1.600 +0.000" in rows
    assert "world_1hop 2 0.400 0.400" in rows
    assert "train 15.0 s 26%" in rows
    assert "on 360 questions" in page.text and "finished" in page.text and "6 of 6" in page.text


def test_a_run_that_goes_on_shows_what_it_has(tmp_path):
    folder = make_run(tmp_path, finished=False)
    for name in ("eval/step_000006.json", "eval/step_000006_sampled.parquet", "eval/step_000006_greedy.parquet"):
        (folder / name).unlink()
    page = page_of(folder)
    assert "not finished, step 6 so far" in page.text
    assert "F1, sampled at training temperature 0.200 ± 0.010 \u2013 \u2013" in [row.strip() for row in page.rows]


def test_the_page_loads_nothing(tmp_path):
    page = page_of(make_run(tmp_path))
    assert [link for link in page.links if link != "data:,"] == []
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"url\((?!data:)|@import|\bfetch\(|XMLHttpRequest|\bimport\(", html) == []
    assert set(re.findall(r"https?://[^\s\"'<]+", html)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in html


def test_every_group_trajectory_and_turn_of_the_chosen_files_is_in_the_page(tmp_path):
    files = page_of(make_run(tmp_path)).data["files"]
    assert [file["label"] for file in files] == [
        "Training, step 1",
        "Training, step 3",
        "Training, step 6",
        "Held-out, greedy, after step 0",
        "Held-out, greedy, after step 6",
        "Held-out, sampled, after step 0",
        "Held-out, sampled, after step 6",
    ]
    assert len({file["id"] for file in files}) == 7
    assert [[group["id"] for group in file["groups"]] for file in files[:2]] == [[f"train-{step}-{n}" for n in range(3)] for step in (1, 3)]
    for file in files:
        for group in file["groups"]:
            assert len(group["samples"]) == group["total"]
            assert all(group["nodes"][index] is not None for sample in group["samples"] for index in sample["path"])


def test_a_trajectory_carries_gains_advantages_values_and_token_log_probs(tmp_path):
    group = page_of(make_run(tmp_path)).data["files"][0]["groups"][0]
    good, failed = group["samples"][:2]
    assert (good["gains"], good["advantages"], good["values"]) == ([3.0, None], [1.5, 1.0], [-4.0, -1.0])
    assert (failed["status"], failed["trainable"], failed["reason"]) == ("tool_failed", False, "bm25: timeout")
    action = group["nodes"][good["path"][2]]
    assert [name for name, _ in action["runs"]] == ["think", "text", "tool_call", "text"]
    pieces = [piece for _, run in action["runs"] for piece in run]
    assert "".join(pieces) == TURNS[0]
    assert len(pieces) == action["tokens"] == len(action["engine"]) == len(action["old"]) and action["ref"] == []
    # Probes are nobody's path: their numbers are in `values`, their nodes stay out of the page.
    assert group["nodes"][2] is None


def test_without_the_tokenizer_turns_are_shown_as_text(tmp_path):
    folder = make_run(tmp_path)
    shutil.rmtree(folder / "policy")
    group = page_of(folder).data["files"][0]["groups"][0]
    answer = group["nodes"][group["samples"][0]["path"][5]]
    assert answer["runs"] == [
        ["think", "I can answer now.</think>"],
        ["text", "\n"],
        ["answer", "<answer>Iranian Rial é</answer>"],
        ["text", "<|im_end|>"],
    ]


def test_curves_hold_what_was_logged_and_leave_out_what_was_not(tmp_path):
    panels = {panel["title"]: panel for panel in page_of(make_run(tmp_path)).data["charts"]}
    assert [series["label"] for series in panels["Information gain per turn"]["series"]] == ["all turns", "turn 1", "turn 2", "turn 10"]
    assert panels["Gradient norm"]["series"][0]["points"] == [[step, 0.7, None] for step in (1, 3, 4, 5, 6)]
    assert panels["Held-out F1"]["series"] == [
        {"label": "sampled", "colour": 0, "points": [[0, 0.2, 0.01], [6, 0.3, 0.11]]},
    ]
    assert [series["label"] for series in panels["Step time by phase"]["series"]] == ["rollout", "train", "sync"]
    assert panels["Step time by phase"]["series"][0]["points"][0] == [1, 2.0]
    assert panels["Log-prob gap, engine vs trainer"]["log"] is True
    assert "Entropy" not in panels


def test_long_curves_are_averaged_over_neighbours():
    assert _bins([(1, 1.0), (2, 3.0), (3, 5.0), (4, 7.0), (5, 9.0)], 3) == [(1.5, 2.0), (3.5, 6.0), (5, 9.0)]
    assert _bins([(1, 1.0), (2, 3.0)], 2) == [(1, 1.0), (2, 3.0)]
    assert _bins([], 5) == []


def test_size_is_bounded_and_what_is_left_out_is_counted(tmp_path):
    folder = make_run(tmp_path, groups=5)
    few = page_of(folder, Limits(groups=2, samples=3, action_tokens=4, text_chars=5)).data["files"][0]
    assert (len(few["groups"]), few["total"]) == (2, 5)
    group = few["groups"][0]
    assert (len(group["samples"]), group["total"]) == (3, 4)
    call, seen = (group["nodes"][group["samples"][0]["path"][place]] for place in (2, 3))
    assert sum(len(run) for _, run in call["runs"]) == len(call["engine"]) == 4
    assert call["cut"] == f"{call['tokens'] - 4} more tokens left out"
    assert seen["text"] == "(1) T" and seen["cut"] == "40 more characters left out"
    small = page_of(folder, Limits(file_bytes=1)).data["files"][0]
    assert (len(small["groups"]), small["total"]) == (1, 5)


def test_rollout_files_that_are_not_named_after_a_step_are_not_the_runs(tmp_path):
    folder = make_run(tmp_path)
    shown = [file["label"] for file in page_of(folder).data["files"]]
    for place in ("rollouts", "eval"):
        shutil.copy(next((folder / place).glob("step_*.parquet")), folder / place / "step_mine.parquet")
    assert [file["label"] for file in page_of(folder).data["files"]] == shown


def test_rollout_files_left_out_are_counted(tmp_path):
    folder = make_run(tmp_path)
    shown = len(page_of(folder).data["files"])
    steps = sorted((folder / "rollouts").glob("step_*.parquet"))
    for step in range(900, 904):
        shutil.copy(steps[0], folder / "rollouts" / f"step_{step:06d}.parquet")
    page = page_of(folder)
    total = sum(len(list((folder / name).glob("*.parquet"))) for name in ("rollouts", "eval"))
    assert len(page.data["files"]) == shown < total
    assert page.data["left_out"] == f"The page holds {shown} of the run's {total} rollout files."
    for path in (folder / "rollouts").glob("*.parquet"):
        path.unlink()
    shutil.copytree(folder / "eval", tmp_path / "alone" / "eval")
    assert page_of(tmp_path / "alone").data["left_out"] == ""


def test_noisy_scores_have_a_smoothed_line(tmp_path):
    smooth = [panel["title"] for panel in page_of(make_run(tmp_path)).data["charts"] if panel["smooth"]]
    assert smooth == ["Reward", "F1 and exact match"]


def test_hostile_text_is_data_everywhere(tmp_path):
    page = page_of(make_run(tmp_path, attack=ATTACK))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert len(page.scripts) == 2 and page.handlers == [] and page.links == ["data:,"]
    assert "<img" not in html and "</script><script>document" not in html
    assert ATTACK in page.text  # the run's name and a source, escaped
    assert page.data["files"][0]["groups"][0]["answers"] == ["Iranian Rial" + ATTACK]
    assert "innerHTML" not in page.scripts[1] and "insertAdjacentHTML" not in page.scripts[1] and "document.write" not in page.scripts[1]


def test_credentials_in_the_configuration_are_not_shown(tmp_path):
    folder = make_run(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["search"]["url"] = "http://me:hunter2@host/retrieve"
    (folder / "config.json").write_text(json.dumps(config))
    page_of(folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert "hunter2" not in html and "***@host" in html


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no run to report on; expected metrics\.jsonl"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_evaluation_is_named(tmp_path):
    folder = make_run(tmp_path)
    (folder / "eval" / "step_000000.json").write_text("{")
    with pytest.raises(ValueError, match=r"step_000000\.json is damaged \(not JSON: "):
        collect(folder, Limits())


@pytest.mark.parametrize("kept", ["metrics.jsonl", "rollouts", "eval"])
def test_any_one_part_of_a_run_is_enough(tmp_path, kept):
    folder = make_run(tmp_path / "run", steps=2)
    alone = tmp_path / "alone"
    alone.mkdir()
    (folder / kept).rename(alone / kept)
    data = page_of(alone).data
    assert bool(data["charts"]) == (kept == "metrics.jsonl")
    assert len(data["files"]) == {"metrics.jsonl": 0, "rollouts": 2, "eval": 4}[kept]


@pytest.mark.parametrize(
    ("text", "section", "runs", "after"),
    [
        ("a</think>\n<answer>b</answer>", "think", ["think:a</think>", "text:\n", "answer:<answer>b</answer>"], "text"),
        ("<think>a", "text", ["think:<think>a"], "think"),
        ("a<answer>b", "think", ["think:a", "answer:<answer>b"], "answer"),
        ("</answer>a<think>", "think", ["think:</answer>a<think>"], "think"),
        ("", "think", [], "think"),
    ],
)
def test_sections_cover_the_text_and_carry_over(text, section, runs, after):
    spans, following = _split_sections(text, section)
    assert [f"{name}:{text[start:stop]}" for name, start, stop in spans] == runs
    assert following == after


def test_a_character_of_several_tokens_belongs_to_its_last(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    ids = tokenizer.encode("aé😀").ids
    assert len(ids) == 7
    assert _pieces(tokenizer, ids) == ["a", "", "é", "", "", "", "😀"]
    assert _pieces(tokenizer, ids[:5]) == ["a", "", "é", "", "\ufffd"]


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_every_panel_and_runs_no_hostile_text(tmp_path):
    folder = make_run(tmp_path / "run", attack=ATTACK)
    report = write_report(folder)
    switches = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    switches += ["--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=2000"]
    result = subprocess.run(["chromium", *switches, "--dump-dom", report.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    page = Page(result.stdout)
    assert "Held-out F1" in page.text and "Sample 1" in page.text and "tool failed" in page.text
    panels = len(page.data["charts"])
    assert result.stdout.count('class="card chart"') == panels == result.stdout.count('<svg viewBox="')
    title = result.stdout[result.stdout.index("<title>") : result.stdout.index("</title>")]
    assert "demo" in title and "<title>owned" not in title and "<img" not in result.stdout


def test_searches_are_charted_by_status_and_latency_a_status_that_never_came_at_zero(tmp_path):
    panels = {panel["title"]: panel for panel in collect(make_run(tmp_path), EVERYTHING)["data"]["charts"]}
    lines = {line["label"]: [point[1] for point in line["points"]] for line in panels["How searches ended"]["series"]}
    assert list(lines) == ["ok", "empty", "error", "timeout", "rate limited", "from the cache"]
    assert lines["error"] == [0.0] * 6 and lines["ok"][-1] == 56.0
    assert [line["label"] for line in panels["Tool latency"]["series"]] == ["search, p50", "search, p95", "visit, p50", "visit, p95"]
    assert [line["label"] for line in panels["Turns and tool calls"]["series"]] == ["turns", "searches", "visits"]

"""YAML and overrides become a Config, or one error that names every mistake and the nearest valid name."""

import re
from pathlib import Path

import pytest

from igpo_megatron.algorithms.advantages.outcome import Grpo
from igpo_megatron.algorithms.advantages.turn import Igpo
from igpo_megatron.algorithms.losses.registry import Ppo
from igpo_megatron.config.load import ConfigError, build, differing_keys, explain, load, to_json
from igpo_megatron.config.schema import Config
from igpo_megatron.settings import Section

MODEL = {"model": {"path": "somewhere"}}


def problems(overrides: list[str], values: dict | None = None) -> list[str]:
    with pytest.raises(ConfigError) as error:
        build(values or MODEL, overrides)
    return error.value.problems


def test_a_file_and_overrides_are_merged_with_numbers_as_people_write_them(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: policy}\noptim:\n  lr: 1e-5\nrollout:\n  engine: {count: 2}\nsearch:\n", encoding="utf-8")
    config = load(
        path, ["optim.min_lr=2e-6", "rollout.engine.tensor=4", "data.train=[a.parquet, b.parquet]", "search.url=http://h:1/retrieve"]
    )
    assert (config.optim.lr, config.optim.min_lr) == (1e-5, 2e-6)
    assert (config.rollout.engine.count, config.rollout.engine.tensor) == (2, 4)
    assert [path.name for path in config.data.train] == ["a.parquet", "b.parquet"]
    assert config.search.url == "http://h:1/retrieve"


def test_words_that_old_yaml_took_for_truth_or_time_are_words_and_numbers_are_decimal(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {path: on}\ntrack: {wandb: off}\nsearch: {country: no}\nrollout: {force_think: no}\n", encoding="utf-8")
    config = load(path, ["run.name=12:30:45", "run.seed=010", "loss.kl_coef=1E-4"])
    assert (config.model.path, config.track.wandb, config.search.country) == (Path("on"), "off", "no")
    assert config.rollout.force_think is False
    assert (config.run.name, config.run.seed, config.loss.kl_coef) == ("12:30:45", 10, 1e-4)


def test_what_is_no_yaml_is_the_text_of_an_override_and_one_sentence_of_a_file(tmp_path):
    """With types that no value has, dates that no calendar has, and brackets without end."""
    path = tmp_path / "run.yaml"
    for text in ("!!bool maybe", "!!int ", "!!float x", "2024-13-45", "*nobody", "{", "[" * 3000, "@x", "a: b: c", "\x07"):
        with pytest.raises(ConfigError, match=r"run\.yaml: not valid YAML: [^\n]*"):
            path.write_text(text, encoding="utf-8")
            load(path)
        assert build(MODEL, [f"rollout.system_prompt={text}"]).rollout.system_prompt == text


def test_the_values_of_the_caller_stay_as_they_were():
    values = {"model": {"path": "somewhere"}, "optim": {"lr": 1.0}}
    build(values, ["optim.lr=0.5", "run.steps=3"])
    assert values == {"model": {"path": "somewhere"}, "optim": {"lr": 1.0}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", "optim.lrr: unknown key; did you mean 'optim.lr'?"),
        ("modle.path=x", "modle: unknown key; did you mean 'model'?"),
        ("rollout.engine.cont=2", "rollout.engine.cont: unknown key; did you mean 'rollout.engine.count'?"),
        ("run.device=cuba", "run.device='cuba': expected one of auto, cpu, cuda; did you mean 'cuda'?"),
        ("placement.sleep_level=3", "placement.sleep_level=3: expected one of 1, 2"),
        ("reward.probe_temperature=0.7", "reward.probe_temperature=0.7: expected one of 1, sampling"),
        (
            "advantage.name=grop",
            "advantage.name='grop': expected one of igpo, igpo_loo, grpo, rloo, arpo, gigpo, eapo, rapo, reinforce_pp, "
            "reinforce_pp_baseline, remax, or package.module:function; did you mean 'grpo'?",
        ),
        ("reward.outcome=f3", "reward.outcome='f3': expected one of f1, em, em_squad, f1_multiset, or package.module:function"),
        ("advantage.normalize=joint", "advantage.normalize: unknown key; did you mean 'advantage.normalise'?"),
        ("advantage=grpo", "advantage='grpo': expected a section; write advantage.name=grpo"),
        ("loss.clip_hihg=0.3", "loss.clip_hihg: unknown key; did you mean 'loss.clip_high'?"),
        ("data.train=a.parquet", "data.train='a.parquet': expected a list, e.g. data.train=[a.parquet]"),
        ("optim.lr=fast", "optim.lr='fast': input should be a valid number, unable to parse string as a number"),
        ("parallel.tensor=0", "parallel.tensor=0: input should be greater than 0"),
        ("optim.lr", "override 'optim.lr': expected section.key=value, e.g. optim.lr=1e-5"),
        ("run.name.x=1", "run.name={'x': 1}: input should be a valid string"),
    ],
)
def test_one_mistake_gives_one_sentence_with_the_nearest_name(override, message):
    assert problems([override]) == [message]


def test_a_key_in_the_wrong_section_is_told_where_it_belongs():
    (message,) = problems(["lr=1"])
    assert message.startswith("lr: unknown key; did you mean optim.lr?")


def test_a_key_of_another_algorithm_is_told_whose_it_is():
    (message,) = problems(["advantage.name=grpo", "advantage.gamma=0.9"])
    hint = "a key like it belongs to advantage.name=igpo or igpo_loo or gigpo or eapo, not grpo"
    assert message == f"advantage.gamma: unknown key; {hint}; known here: name, divide_by_std, statistics"


def test_all_problems_are_listed_at_once_those_of_overrides_included():
    found = problems(["optim.lr=-1", "parallel.tensor=0", "reward.outcome=f2", "rollout.max_turn=3", "nonsense"])
    assert [message.split("=")[0].split(":")[0] for message in found] == [
        "override 'nonsense'",
        "parallel.tensor",
        "rollout.max_turn",
        "reward.outcome",
        "optim.lr",
    ]


def test_a_missing_model_is_named():
    with pytest.raises(ConfigError) as error:
        build({})
    assert error.value.problems == ["model: required, but not set"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {path: x}\noptim: {lr: 1}\noptim: {lr: 2}\n", 'line 3, column 1: found duplicate key "optim"'),
        ("model: {path: x, path: y}\n", 'line 1, column 18: found duplicate key "path"'),
        ("model: [\n", "not valid YAML: line 2, column 1: expected the node content, but found '<stream end>'"),
        ("model: !!bool maybe\n", "not valid YAML: 'maybe'"),
        ("run: {steps: !!int }\n", "not valid YAML: string index out of range"),
        ("- model\n", "expected sections such as `model:` at the top, found list"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused(tmp_path, text, expected):
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"run\.yaml") as error:
        load(path)
    assert expected in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such configuration file"):
        load(tmp_path / "none.yaml")


def test_an_algorithm_without_a_name_is_the_default_one_and_choosing_another_drops_its_settings():
    default = build(MODEL, ["advantage.gamma=0.5", "loss.clip_high=0.3"])
    assert default.advantage == Igpo(gamma=0.5)
    assert default.loss == Ppo(clip_high=0.3)
    assert build(MODEL | {"advantage": {"name": "igpo", "gamma": 0.5}}, ["advantage.name=grpo"]).advantage == Grpo()
    # The section without a name is igpo's, so its settings go when another algorithm is chosen, and stay when igpo is.
    assert build(MODEL | {"advantage": {"gamma": 0.5}}, ["advantage.name=grpo"]).advantage == Grpo()
    assert build(MODEL | {"advantage": {"gamma": 0.5}}, ["advantage.name=igpo"]).advantage == Igpo(gamma=0.5)


def test_a_saved_configuration_reads_back_equal(tmp_path):
    config = build(MODEL, ["advantage.name=rloo", "rollout.engine.gpu_ids=[2, 3]", "loss.dual_clip=null", "rollout.system_prompt=Dig 🪏"])
    path = tmp_path / "config.json"
    path.write_text(to_json(config), encoding="utf-8")
    assert load(path) == config


def test_differing_keys_are_dotted_and_show_both_values():
    assert differing_keys({"a": {"b": 1, "c": 2}, "d": 0}, {"a": {"b": 1, "c": 3}}) == ["a.c: 2 -> 3", "d: 0 -> None"]


def test_explain_shows_sections_variants_and_single_keys():
    assert explain("optim.lr").splitlines() == ["optim.lr  (float > 0, default 1e-06)", "    Peak learning rate."]
    assert 'backend  (auto | local | te, default "auto")' in explain("model")
    assert "path  (path, required)" in explain("model")
    assert "advantage.name=igpo_loo: " in explain("advantage")
    assert [line.split()[0] for line in explain().splitlines()] == list(Config.model_fields)
    with pytest.raises(ConfigError, match=r"did you mean 'rollout\.engine'"):
        explain("rollout.engin")


def test_explain_indents_every_line_under_its_key_and_every_key_under_its_section():
    lines = explain("rollout.engine").splitlines()
    assert [line for line in lines[1:] if not line.startswith("  ")] == []
    at = next(number for number, line in enumerate(lines) if line.startswith("  backend  ("))
    assert lines[at + 1].startswith("      `torch`: ") and lines[at + 2].startswith("      vLLM and Ray: ")


def test_explained_settings_fit_a_terminal_of_80_columns():
    wide = [line for section in Config.model_fields for line in explain(section).splitlines() if len(line) > 80]
    assert [line for line in wide if not re.match(r"  \S+  \(", line)] == [], "but for a key with its type and default"


def test_every_field_of_every_section_is_documented():
    def below(section: type[Section]) -> list[type[Section]]:
        return [cls for child in section.__subclasses__() for cls in (child, *below(child)) if cls is not Config]

    def undocumented(section: type[Section]) -> list[str]:
        return [f"{section.__name__}.{name}" for name, info in section.model_fields.items() if not info.description and name != "name"]

    sections = below(Section)
    assert len(sections) > 40
    assert [row for section in sections for row in undocumented(section)] == []
    assert [section.__name__ for section in sections if not section.__doc__] == []


ARPO = Path(__file__).resolve().parents[2] / "examples/quickstart/arpo.yaml"


def test_a_way_to_branch_is_chosen_by_name_as_algorithms_are():
    branching = load(ARPO, ["rollout.branching.beam=3"]).rollout.branching
    assert (branching.name, branching.beam, branching.initial_rollouts) == ("arpo", 3, 4)
    assert load(ARPO, ["rollout.branching.name=none"]).rollout.branching.model_dump() == {"name": "none"}
    # Another one does not inherit what the file says of the first.
    assert load(ARPO, ["rollout.branching.name=aepo"]).rollout.branching.initial_rollouts == 8
    with pytest.raises(ConfigError, match=r"a key like it belongs to rollout\.branching\.name=aepo, not arpo"):
        load(ARPO, ["rollout.branching.penalty=0.1"])

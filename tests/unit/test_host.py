"""`auto`: which dtype a processor is given, and how ranks and engines share its cores."""

from __future__ import annotations

from pathlib import Path

import pytest

from igpo_megatron.config import host
from igpo_megatron.config.load import ConfigError, build
from igpo_megatron.config.schema import Config
from igpo_megatron.policy import parallel, weight_sync

DEMO = Path(__file__).resolve().parents[2] / "examples/quickstart/policy"
CASES = [({"amx_bf16"}, "bf16"), ({"avx512_bf16", "avx2"}, "bf16"), ({"avx2", "avx512f", "amx_tile", "amx_int8"}, "fp32"), (set(), "fp32")]


def settings(*overrides: str) -> Config:
    return build({"model": {"path": "none"}, "run": {"device": "cpu"}}, overrides)


@pytest.mark.parametrize(("flags", "expected"), CASES)
def test_bf16_is_for_processors_that_multiply_it_and_for_gpus(flags: set[str], expected: str) -> None:
    assert host.best_dtype(False, flags) == expected
    assert host.best_dtype(True, flags) == "bf16"


def test_a_processor_without_a_list_of_flags_has_none(tmp_path: Path) -> None:
    assert host.cpu_flags(tmp_path / "absent") == set()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({}, None),
    ],
)
def test_a_container_has_as_many_cores_as_its_control_group_gives_it_time_for(
    files: dict[str, str], expected: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host.os, "sched_getaffinity", lambda process: range(8))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="ascii")
    assert host.cpu_quota(tmp_path) == expected
    assert host.cpu_cores(tmp_path) == {None: 8, 2.5: 2, 0.5: 1}[expected]


def test_ranks_and_engines_that_take_turns_have_all_cores_each() -> None:
    assert host.thread_counts(2, ranks=1, engines=1, together=False) == (2, 2)
    assert host.thread_counts(2, ranks=2, engines=1, together=False) == (1, 2)
    assert host.thread_counts(16, ranks=4, engines=2, together=False) == (4, 8)


def test_ranks_and_engines_that_work_at_once_have_half_of_the_cores_each() -> None:
    assert host.thread_counts(2, ranks=1, engines=1, together=True) == (1, 1)
    assert host.thread_counts(15, ranks=2, engines=2, together=True) == (3, 4)


def test_nobody_has_less_than_one_thread_and_ranks_without_engines_have_every_core() -> None:
    assert host.thread_counts(2, ranks=8, engines=4, together=True) == (1, 1)
    assert host.thread_counts(4, ranks=1, engines=0, together=True) == (4, 4)


def test_auto_is_replaced_on_the_machine_where_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cpu_flags", lambda: {"amx_bf16"})
    monkeypatch.setattr(host, "cpu_cores", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = parallel.on_this_machine(settings("rollout.engine.count=4"))
    assert (found.model.dtype, found.run.threads, found.rollout.engine.threads) == ("bf16", 4, 2)
    assert parallel.choices(settings(), found) == "auto: model.dtype=bf16, run.threads=4, rollout.engine.threads=2"
    ahead = parallel.on_this_machine(settings("rollout.max_staleness=1"))
    assert (ahead.run.threads, ahead.rollout.engine.threads) == (2, 4)
    cut = parallel.on_this_machine(settings("rollout.engine.tensor=4"))
    assert cut.rollout.engine.threads == 2, "an engine has a process with these threads for each of its shards"
    evaluated = settings("rollout.engine.count=4", "rollout.max_staleness=1", "run.replay=demos.parquet")
    alone = parallel.on_this_machine(evaluated, trains=False)
    assert alone.rollout.engine.threads == 2, "an evaluation has the configured engines and no ranks beside them"


def test_what_the_user_set_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cpu_flags", lambda: {"amx_bf16"})
    given = settings("model.dtype=fp32", "run.threads=3", "rollout.engine.threads=5")
    found = parallel.on_this_machine(given)
    assert (found.model.dtype, found.run.threads, found.rollout.engine.threads) == ("fp32", 3, 5)
    assert parallel.choices(given, found) is None


@pytest.mark.parametrize("wrong", ["0", "-1", "many", "1.5", "true"])
def test_threads_are_auto_or_a_number(wrong: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.threads=.*expected auto or a number of at least 1"):
        settings(f"run.threads={wrong}")


def test_the_canary_allows_bf16_more_than_fp32_and_a_set_bound_holds_for_both() -> None:
    assert weight_sync.gap_allowed(settings("model.dtype=fp32")) == 1e-3
    assert weight_sync.gap_allowed(settings("model.dtype=bf16")) == 0.25
    assert weight_sync.gap_allowed(settings("model.dtype=fp32", "rollout.engine.dtype=bf16")) == 0.25
    assert weight_sync.gap_allowed(settings("model.dtype=bf16", "sync.max_gap=0.05")) == 0.05


def test_a_small_model_has_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "cpu_cores", lambda: 8)
    demo = parallel.on_this_machine(settings(f"model.path={DEMO}"))
    assert (demo.run.threads, demo.rollout.engine.threads) == (1, 1)
    smollm2 = {"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49152}
    assert host.is_small({**smollm2, "num_hidden_layers": 1, "vocab_size": 1000}) and not host.is_small(smollm2)
    assert not host.is_small({}) and not host.is_small({"hidden_size": "576"})

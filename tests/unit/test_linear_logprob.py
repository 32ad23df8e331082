"""linear_logprob against a plain fp64 log-softmax, in values and gradients: the torch twin, and the kernels in Triton's interpreter.

The interpreter must be chosen before triton is first imported, and in a whole test run Megatron has imported it long before:
`test_the_kernels_pass_the_same_checks_in_the_interpreter` runs this file once more in a process of its own. By hand:

    TRITON_INTERPRET=1 pytest tests/unit/test_linear_logprob.py
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from linear_logprob_checks import (
    BF16_CHECKS,
    CASES,
    Answer,
    Case,
    Mistake,
    Setup,
    differences,
    each_case_equals_log_softmax_in_fp64,
    every_check,
    oracle,
    run,
)

from igpo_megatron.kernels import linear_logprob as module
from igpo_megatron.kernels import torch_chunked
from igpo_megatron.kernels.linear_logprob import FORM_TABLE, FORMS, WORKSPACE, choose_form, gather_rows, linear_logprob, resolve

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16)
TORCH = [Setup("torch", dtype=dtype) for dtype in DTYPES]
TRITON = [Setup("triton", form, dtype=dtype, workspace=4 * 32 * 256) for form in FORMS for dtype in DTYPES] if INTERPRETED else []
"""With a workspace of several chunks in every case of more than a few rows, the last one ragged."""
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter's own process")
compiled = pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="needs triton without its interpreter")


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, row tiles, groups, splits and rounds of programs in every case of more than a few rows, the last ones ragged."""
    monkeypatch.setattr(torch_chunked, "CHUNK_BYTES", 4 * 123 * 7)
    monkeypatch.setattr(torch_chunked, "CHUNK_COLUMNS", 50)
    if INTERPRETED:
        from igpo_megatron.kernels import triton_head, triton_stream

        tiles = {"fused": (16, 64), "fused, fp32": (16, 64), "tma": (16, 64), "specialised": (32, 128)}
        small = {form: ((math.inf, triton_stream.Tile(m, v, 32, warps=4, stages=2)),) for form, (m, v) in tiles.items()}
        monkeypatch.setattr(triton_stream, "TILES", small)
        monkeypatch.setattr(triton_stream, "GROUP_BYTES", 2 * 16 * 40 * 4)
        monkeypatch.setattr(triton_head, "ROW_BLOCK", 32)
        monkeypatch.setattr(triton_head, "FORWARD_ROWS", 24)
        monkeypatch.setattr(triton_head, "BLOCK", {"BLOCK_R": 32, "BLOCK": 128})
        monkeypatch.setattr(triton_head, "FOLD", {"BLOCK_R": 32, "BLOCK": 128})


@every_check
@pytest.mark.parametrize("setup", TORCH + TRITON, ids=str)
def test_of(check: Callable[[Setup], None], setup: Setup) -> None:
    if setup.dtype == torch.bfloat16 and check not in BF16_CHECKS:
        pytest.skip("the dtype does not matter")
    if setup.form == "specialised" and (setup.dtype, check) != (torch.float32, each_case_equals_log_softmax_in_fp64):
        pytest.skip("the interpreter runs what tma runs, with other tiles")
    check(setup)


@pytest.mark.skipif(INTERPRETED or not HAS_TRITON, reason="is this test" if INTERPRETED else "triton is not installed")
def test_the_kernels_pass_the_same_checks_in_the_interpreter() -> None:
    command = [sys.executable, "-m", "pytest", __file__, str(Path(__file__).with_name("test_token_loss.py")), "-k", "triton", "-x"]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=500, cwd=root)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-1000:]
    assert "passed" in result.stdout


def _rank(rank: int, cuts: tuple[int, ...], setup: Setup, folder: Path) -> None:
    """One tensor-parallel rank over gloo; leaves its answer in the folder."""
    torch.set_num_threads(1)
    size = len(cuts) - 1
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / f"store{size}"), size), rank=rank, world_size=size)
    given = TP_CASE.inputs(setup)
    start, stop = cuts[rank], cuts[rank + 1]
    shard = type(given)(given.hidden, given.weight[start:stop], given.targets, given.rows, given.upstream)
    answer = run(TP_CASE, setup, shard, vocab_start=start, tp_group=dist.group.WORLD)
    dist.all_reduce(answer.grad_hidden)
    torch.save(answer, folder / f"{size}-{rank}.pt")
    dist.destroy_process_group()


TP_CASE = Case("tensor_parallel", 29, 20, 290, temperature=0.8, padding=60, ignored=(3,), repeated=11)
CUTS = {2: (0, 170, 350), 4: (0, 100, 101, 300, 350)}
"""Unequal shards; of four, one is a single column and the last is nothing but padding."""


def test_one_two_and_four_ranks_over_gloo_agree(tmp_path: Path) -> None:
    """With the torch twin; the merge is the same for the kernels, whose shards are merged by hand in another check."""
    setup = Setup("torch")
    whole = run(TP_CASE, setup)
    assert differences(whole, oracle(TP_CASE, setup), setup) == []
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(rank, cuts, setup, tmp_path)) for cuts in CUTS.values() for rank in range(len(cuts) - 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(250)
    assert [process.exitcode for process in ranks] == [0] * len(ranks)
    for size in CUTS:
        answers = [torch.load(tmp_path / f"{size}-{rank}.pt", weights_only=False) for rank in range(size)]
        grad_weight = torch.cat([answer.grad_weight for answer in answers])
        for answer in answers:
            merged = type(whole)(answer.logp, answer.entropy, answer.lse, answer.grad_hidden, grad_weight)
            assert differences(merged, whole, setup) == []
            assert float((answer.logp - whole.logp).abs().max()) < 3e-6


def test_gradcheck_in_fp64() -> None:
    given = Case("small", 5, 4, 8, padding=1).inputs(Setup("torch", dtype=torch.float64))
    targets = given.targets.clone()
    targets[2] = -100

    def function(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = torch.tensor([0, 1, 2, 1, 1])
        return torch.stack(linear_logprob(hidden, weight, targets, rows, vocab_size=8, temperature=0.7))

    assert torch.autograd.gradcheck(function, (given.hidden.requires_grad_(), given.weight.requires_grad_()))


def test_gather_rows_adds_the_gradients_of_repeated_rows() -> None:
    hidden = torch.arange(6.0).view(3, 2).requires_grad_()
    found = gather_rows(hidden, torch.tensor([2, 2, 0, 2]))
    assert found.tolist() == [[4.0, 5.0], [4.0, 5.0], [0.0, 1.0], [4.0, 5.0]]
    found.backward(torch.tensor([[1.0, 10.0], [2.0, 20.0], [3.0, 30.0], [4.0, 40.0]]))
    assert hidden.grad.tolist() == [[3.0, 30.0], [0.0, 0.0], [7.0, 70.0]]


@pytest.mark.parametrize("form", ["fused", "tma"])
@interpreted
def test_triton_gives_the_same_with_any_number_of_programs(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One program that does everything, or more programs than places."""
    from igpo_megatron.kernels import triton_stream

    case, setup = Case("programs", 40, 16, 200), Setup("triton", form)
    usual = run(case, setup)
    for programs in (1, 20):
        monkeypatch.setattr(triton_stream, "_multiprocessors", lambda device, programs=programs: programs)
        other = run(case, setup)
        assert differences(other, usual, setup) == []
        assert float((other.logp - usual.logp).abs().max()) < 3e-6


@interpreted
def test_triton_places_go_rows_first_then_splits_then_the_next_group() -> None:
    from linear_logprob_kernels import places

    for row_tiles, splits, group in ((1, 7, 1), (5, 3, 2), (6, 4, 3), (4, 1, 9), (7, 5, 1)):
        groups = [range(start, min(start + group, row_tiles)) for start in range(0, row_tiles, group)]
        wanted = [[row, split] for rows in groups for split in range(splits) for row in rows]
        assert places(row_tiles, splits, group).tolist() == wanted


@interpreted
def test_triton_says_why_a_form_cannot_serve_and_runs_fused(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    from igpo_megatron.kernels import triton_stream

    triton_stream._log_once.cache_clear()
    monkeypatch.setattr(triton_stream, "_stream_tma", None)
    with caplog.at_level(logging.WARNING, logger=triton_stream.__name__):
        run(Case("odd rows", 5, 9, 20), Setup("triton", "tma"))
    (record,) = caplog.records
    assert record.message.startswith("model.head_form=tma: TMA needs rows at multiples of 16 bytes, those of hidden are 36 bytes apart")


@interpreted
def test_triton_auto_takes_the_form_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    from igpo_megatron.kernels import triton_head

    called: list[str] = []
    for form, function in triton_head.FORWARDS.items():
        monkeypatch.setitem(triton_head.FORWARDS, form, lambda *args, form=form, function=function: called.append(form) or function(*args))
    for rows in (3, 300):
        run(Case("small", rows, 8, 20), Setup("triton"))
    assert called == ["fused", "chunks"]


@interpreted
def test_the_fixed_split_peer_of_the_benchmarks_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools" / "bench"))
    import fixed_split

    monkeypatch.setattr(fixed_split, "TILE", {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_K": 32})
    monkeypatch.setattr(fixed_split, "SPLIT", 128)
    monkeypatch.setattr(fixed_split, "GRADIENT_SPLIT", 128)
    case, setup = Case("peer", 37, 40, 300, temperature=0.7), Setup("torch")
    given = case.inputs(setup)
    hidden, weight = given.hidden.requires_grad_(), given.weight.requires_grad_()
    logp, entropy = fixed_split.fixed_split(hidden, weight, given.targets, case.temperature)
    (given.upstream[0] * logp + given.upstream[1] * entropy).sum().backward()
    wanted = oracle(case, setup, Mistake(dropped=(2,)))
    found = Answer(logp.detach(), entropy.detach(), wanted.lse, hidden.grad, weight.grad)
    assert differences(found, wanted, setup) == []


@interpreted
@pytest.mark.parametrize(("workspace", "copies"), [(WORKSPACE, 0), (4 * 128 * 7, 3)])
def test_the_weights_gradient_is_in_fp32_only_where_blocks_of_rows_are_added(workspace: int, copies: int) -> None:
    """19 rows at once; in three blocks for each of three chunks of columns."""
    from igpo_megatron.kernels import triton_head

    case = Case("padded", 19, 32, 260, padding=40)
    setup = Setup("triton", dtype=torch.bfloat16, workspace=workspace)
    with mock.patch.object(triton_head, "matmul", wraps=triton_head.matmul) as matmul:
        found = run(case, setup)
    assert differences(found, oracle(case, setup), setup) == []
    assert sum("out" not in call.kwargs for call in matmul.call_args_list) == copies


def test_a_single_record_is_what_it_folds_into() -> None:
    record = torch.tensor([[[1.5, 2.0, -0.7, 0.5], [-80.0, 1.0, 0.0, -math.inf], [-math.inf, 0.0, 0.0, -math.inf]]])
    assert torch_chunked.fold(record).data_ptr() == record.data_ptr()
    empty = torch_chunked.empty_records(torch.zeros(3, 8))
    assert torch.equal(torch_chunked.fold(torch.stack((record[0], empty))), record[0])


@compiled
def test_tma_needs_aligned_rows_and_16_bits() -> None:
    from igpo_megatron.kernels.triton_stream import why_no_tma

    rows = torch.zeros(8, 64, dtype=torch.bfloat16)
    assert why_no_tma(rows, rows) is None
    assert "fp32" in (why_no_tma(rows.float(), rows.float()) or "")
    assert "weight are 120 bytes apart" in (why_no_tma(rows, torch.zeros(8, 60, dtype=torch.bfloat16)) or "")
    assert "hidden are 128 bytes apart from 2 on" in (why_no_tma(torch.zeros(513, dtype=torch.bfloat16)[1:].view(8, 64), rows) or "")


@compiled
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0), (12, 0)])
def test_tiles_for_tma_are_used_on_hopper_alone(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """On other cards `specialised` does not compile with Triton 3.6.0, or a tile is larger than their shared memory."""
    from igpo_megatron.kernels.triton_stream import why_no_tma

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    rows = torch.zeros(8, 64, dtype=torch.bfloat16)
    there = mock.Mock(wraps=rows, is_cuda=True, dtype=rows.dtype, device=torch.device("cuda", 0))
    wanted = None if capability == (9, 0) else f"its tiles are for Hopper, compute capability 9.0, and a card has {capability[0]}.0"
    assert why_no_tma(there, there) == wanted


def test_no_split_is_empty_and_together_they_cover_every_tile() -> None:
    pytest.importorskip("triton")
    from igpo_megatron.kernels.triton_stream import MOST_SPLITS, split_vocabulary

    for row_tiles in (1, 3, 32, 500):
        for tiles in (1, 5, 131, 594, 1188):
            per_split, splits = split_vocabulary(row_tiles, tiles, 132)
            assert (splits - 1) * per_split < tiles <= splits * per_split and splits <= MOST_SPLITS
    assert split_vocabulary(1, 1188, 132) == (9, 132)
    assert split_vocabulary(32, 594, 132) == (18, 33)  # 8 full rounds, where 4 splits would leave four programs idle
    assert split_vocabulary(500, 594, 132)[1] > 1


def test_a_chunk_is_no_larger_than_the_workspace() -> None:
    pytest.importorskip("triton")
    from igpo_megatron.kernels.triton_head import _chunk_shape

    for size in (512, 2**20, 2**21, 128 * 2**20):
        for rows, valid in ((0, 50), (3, 50), (4096, 151936), (20000, 151936), (20000, 50)):
            block, columns = _chunk_shape(rows, valid, 4096, size)
            assert 4 * block * columns <= size and (columns % 128 == 0 or columns == valid) and (block >= 1) == (rows >= 1)
    assert _chunk_shape(20000, 151936, 4096, 128 * 2**20) == (4096, 8192)


def test_the_table_is_read_rule_by_rule() -> None:
    table = {
        "default": {"rules": [{"max_rows": 256, "form": "fused"}, {"form": "chunks"}]},
        "GPU": {"rules": [{"max_hidden": 1024, "max_vocab": 1000, "form": "fused"}, {"max_rows": 64, "form": "fused"}, {"form": "chunks"}]},
    }
    assert [choose_form("other", rows, 64, 100, table) for rows in (0, 256, 257)] == ["fused", "fused", "chunks"]
    assert choose_form("GPU", 9999, 1024, 1000, table) == "fused"
    assert choose_form("GPU", 9999, 1024, 1001, table) == "chunks"
    assert choose_form("GPU", 64, 4096, 1001, table) == "fused"
    with pytest.raises(ValueError, match="no rule covers N=9, H=1, v=1"):
        choose_form("GPU", 9, 1, 1, {"default": {"rules": [{"max_rows": 8, "form": "fused"}]}})


def test_the_committed_table_covers_everything_and_says_where_it_comes_from() -> None:
    table = json.loads(FORM_TABLE.read_text(encoding="utf-8"))
    assert "default" in table
    for entry in table.values():
        assert entry["source"].startswith(("reasoned", "measured"))
        assert all(rule["form"] in FORMS for rule in entry["rules"])
        assert entry["rules"][-1].keys() == {"form"}


def test_auto_is_torch_on_cpu_and_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    module.resolve.cache_clear()
    with caplog.at_level(logging.INFO, logger=module.__name__):
        assert [resolve("auto", torch.device("cpu")) for _ in range(3)] == ["torch"] * 3
    assert [record.message for record in caplog.records] == ["log-probs (model.head=auto) on cpu: torch"]


def test_asking_for_kernels_that_cannot_run_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    given = CASES[0].inputs(Setup("triton"))
    if HAS_TRITON and not INTERPRETED:
        with pytest.raises(ValueError, match=r"model\.head=triton on cpu: .* set TRITON_INTERPRET=1"):
            linear_logprob(given.hidden, given.weight, given.targets, implementation="triton")
    module.resolve.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"model\.head=triton on cuda: triton is not importable; use auto or torch"):
        resolve("triton", torch.device("cuda"))
    assert resolve("auto", torch.device("cuda")) == "torch"
    module.resolve.cache_clear()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature=0.0: expected a positive number"),
        ({"rows": torch.tensor([0, 1])}, "2 rows of hidden states for 4 targets"),
        ({"implementation": "cuda"}, "model.head=cuda: expected auto, torch or triton"),
        ({"form": "fast"}, "model.head_form=fast: expected auto or one of fused, tma, chunks, specialised"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    given = Case("bad", 4, 8, 20).inputs(Setup("torch"))
    with pytest.raises(ValueError, match=message):
        linear_logprob(given.hidden, given.weight, given.targets, **options)


def test_two_dtypes_are_an_error() -> None:
    given = Case("bad", 4, 8, 20).inputs(Setup("torch"))
    with pytest.raises(ValueError, match=r"hidden is torch.bfloat16 and weight is torch.float32"):
        linear_logprob(given.hidden.bfloat16(), given.weight, given.targets)


def test_the_head_of_a_bf16_model_has_fp32_logits_on_cpu_and_leaves_other_products_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor's bf16 units, if it has some, at a size for which they are taken: rounded logits would be off by 0.03."""
    monkeypatch.setattr(torch_chunked, "CHUNK_BYTES", 2**22)
    monkeypatch.setattr(torch_chunked, "CHUNK_COLUMNS", 4096)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(300, 576, generator=generator).bfloat16().requires_grad_()
    weight = (torch.randn(9000, 576, generator=generator) / 4).bfloat16().requires_grad_()
    targets = torch.randint(0, 9000, (300,), generator=generator)
    exact_hidden, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (hidden, weight))
    expected = torch.log_softmax(exact_hidden @ exact_weight.t(), -1).gather(-1, targets[:, None])[:, 0]
    expected.sum().backward()

    before = torch.randn(512, 512, generator=generator)
    product = before @ before
    found, _, _ = linear_logprob(hidden, weight, targets)
    found.sum().backward()
    assert (found - expected).abs().max() < 5e-5
    for tensor, exact in ((hidden, exact_hidden), (weight, exact_weight)):
        assert tensor.grad is not None and exact.grad is not None
        assert (tensor.grad - exact.grad).norm() < 0.005 * exact.grad.norm()
    assert torch.equal(before @ before, product)

"""What the head's kernels become for Hopper, compiled without one by tools/bench/head_aot.py, with every Triton that is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="needs Triton's compiler for NVIDIA")

ROOT = Path(__file__).resolve().parents[2]
BENCH = ROOT / "tools" / "bench"
sys.path.insert(0, str(BENCH))
sys.path.insert(0, str(ROOT / "tools"))

import head_aot  # noqa: E402

import install  # noqa: E402


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    """The table of `head_aot.py`, whose exit status is the first check."""
    out = tmp_path_factory.mktemp("aot") / "table.json"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(BENCH / "head_aot.py"), "--out", str(out)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]
    return json.loads(out.read_text(encoding="utf-8"))


def test_every_kernel_and_every_tile_compiles_for_hopper_within_its_means(rows):
    from igpo_megatron.kernels.triton_stream import TILES

    kernels = _kernels()
    assert len(kernels) >= 5
    wanted = {
        (form.startswith("fused"), tile.specialise, *sorted(tile.launch.items())) for form, tiles in TILES.items() for _, tile in tiles
    }
    for version in {row["triton"] for row in rows}:
        mine = [row for row in rows if row["triton"] == version]
        assert {row["kernel"] for row in mine} == kernels
        launches = [(row["kernel"] == "_stream", row["options"]) for row in mine if "BLOCK_M" in row["options"]]
        names = ("BLOCK_M", "BLOCK_V", "BLOCK_K", "num_warps", "num_stages")
        found = {(plain, options.get("SPECIALISE", False), *sorted((name, options[name]) for name in names)) for plain, options in launches}
        assert found == wanted


def _kernels() -> set[str]:
    """Names of the jitted functions of our modules that no other one calls: those that must be launched."""
    from igpo_megatron.kernels import triton_head, triton_stream

    found = {
        name: jitted for module in (triton_head, triton_stream) for name, jitted in vars(module).items() if hasattr(jitted, "arg_names")
    }
    return {
        name
        for name in found
        if not any(f"{name}(" in other.src.partition(":")[2] for other in found.values() if other.fn.__name__ != name)
    }


def test_the_triton_of_gpu_machines_is_among_them(rows):
    if not list((ROOT / ".venv").glob(f"triton-{install.SECOND_TRITON}")):
        pytest.skip(f"triton {install.SECOND_TRITON} is not installed beside the locked one; `make venv` says why")
    assert install.SECOND_TRITON in {row["triton"] for row in rows}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spilled": 8}, "spills 8 bytes"),
        ({"shared": 233000}, "takes 233000 bytes of shared memory"),
        ({"wgmma": 0}, "multiplies 64 rows or more without wgmma"),
        ({"TMA": 0}, "loads without TMA"),
        ({"setmaxnreg": 0}, "has no warps of their own"),
    ],
)
def test_a_variant_that_breaks_a_rule_is_named(rows, change, message):
    row = next(row for row in rows if row["options"].get("SPECIALISE"))
    assert head_aot.problems([row]) == []
    (problem,) = head_aot.problems([{**row, **change}])
    assert message in problem and row["triton"] in problem


def test_a_chunk_that_is_folded_across_warps_is_named(rows):
    row = next(row for row in rows if row["kernel"] == "_fold_chunk")
    (problem,) = head_aot.problems([{**row, "shared": 64}])
    assert "folds a row by several warps" in problem


def test_tritons_are_those_of_the_interpreters_own_environment(tmp_path, monkeypatch):
    (tmp_path / "triton-9.9.9").mkdir()
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    assert head_aot.tritons() == [None, tmp_path / "triton-9.9.9"]

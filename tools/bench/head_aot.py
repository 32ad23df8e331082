"""Claim: every kernel of the log-prob head compiles for Hopper, multiplies on its tensor cores, and spills no register.

    python tools/bench/head_aot.py     no GPU needed; a minute on two cores

Nothing is listed by hand: the head's own launch code runs on tensors without storage, for every form and tile, and each launch is
compiled for sm_90a instead of being run. The table names, for the installed Triton and those that `make venv` puts beside it, the tile,
registers per thread, shared memory, bytes spilled and instructions. Exit status 1 where a variant breaks a rule of `problems`. Speed is
another matter.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[2]
MULTIPROCESSORS = 132
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that one program may have on an H100."""

ROWS, VOCAB, HIDDEN, RAGGED_HIDDEN = 8192, 20000, 3584, 1008
"""N where a tile has no largest, v, H, and an H that no tile's step divides; the compiled code depends on N and v through the tile alone.
An H that 16 does not divide, which no published model has, is left out: there `fused` loads without cp.async and spills, to right results.
"""

COUNTED = {"wgmma": "wgmma.mma_async", "mma.sync": "mma.sync", "cp.async": "cp.async.cg", "TMA": "cp.async.bulk.tensor"}
"""Column of the table -> what is counted in the PTX."""


def main(
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Write the table as JSON.")] = None,
    here: Annotated[bool, typer.Option(help="Compile in this process and print JSON alone; the command starts itself so.")] = False,
) -> None:
    """Compile everything with every Triton."""
    if here:
        print(json.dumps(compiled()))
        return
    with ThreadPoolExecutor() as pool:
        tables = list(pool.map(_with_triton, tritons()))
    rows = [row for table in tables for row in table]
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    show(rows)
    wrong = problems(rows)
    print(json.dumps({"name": "head_aot", "variants": len(rows), "tritons": sorted({row["triton"] for row in rows}), "problems": wrong}))
    raise typer.Exit(1 if wrong else 0)


def tritons() -> list[Path | None]:
    """Folders to import Triton from, all of this interpreter's environment; None for the installed one."""
    return [None, *sorted(Path(sys.prefix).glob("triton-*/"))]


def _with_triton(folder: Path | None) -> list[dict[str, Any]]:
    """`compiled` in a process of its own, whose cache is empty: the compiler reports only what it compiles."""
    path = [str(place) for place in (folder, ROOT, os.environ.get("PYTHONPATH")) if place]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TRITON_CACHE_DIR": cache}
        environment.pop("TRITON_INTERPRET", None)
        command = [sys.executable, __file__, "--here"]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{folder or 'the installed triton'}: {result.stderr[-3000:]}")
    return json.loads(result.stdout.splitlines()[-1])


def compiled() -> list[dict[str, Any]]:
    """A row of the table for every variant."""
    with recorded() as rows:
        for arguments in launches():
            launch(**arguments)
    return rows


def launches() -> Iterator[dict[str, Any]]:
    """Arguments of `launch` that reach every tile of every form."""
    from igpo_megatron.kernels import triton_head, triton_stream

    for dtype in (torch.bfloat16, torch.float32):  # fp16 is compiled as bf16 is
        for form in triton_head.FORWARDS:
            key = "fused, fp32" if dtype == torch.float32 else form
            if dtype == torch.float32 and form in triton_stream.TILES and form != "fused":
                continue  # falls back to it
            for most, _ in triton_stream.TILES.get(key, ((ROWS, None),)):
                usual = {"form": form, "rows": int(min(most, ROWS)), "dtype": dtype, "hidden": HIDDEN, "entropy": True}
                yield usual
                yield {**usual, "entropy": False}
                yield {**usual, "hidden": RAGGED_HIDDEN}
        yield {"form": None, "rows": ROWS, "dtype": dtype, "hidden": HIDDEN, "entropy": True}


def launch(form: str | None, rows: int, dtype: torch.dtype, hidden: int, *, entropy: bool) -> None:
    """Forward in one form, or with `form=None` all that backward and token_loss launch, on tensors without storage."""
    from igpo_megatron.kernels import triton_head
    from igpo_megatron.kernels.linear_logprob import WORKSPACE
    from igpo_megatron.kernels.torch_chunked import Shard

    states = torch.empty(rows, hidden, device="meta", dtype=dtype)
    weight = torch.empty(VOCAB, hidden, device="meta", dtype=dtype)
    targets = torch.empty(rows, device="meta", dtype=torch.int64)
    shard = Shard(states, weight, targets, VOCAB, 1.0, WORKSPACE)
    if form is None:
        coefficients = torch.empty(rows, 4, device="meta")
        triton_head.gradients(shard, coefficients, True, True)
        logits = torch.empty(rows, VOCAB, device="meta")
        triton_head.block_records(logits, targets, 1.0, entropy)
        triton_head.block_dz(logits, targets, 1.0, coefficients, dtype)
    else:
        triton_head.FORWARDS[form](shard, entropy)


@contextlib.contextmanager
def recorded() -> Iterator[list[dict[str, Any]]]:
    """Inside, a launch compiles for an H100 instead of running; the list has a row for each kernel that this compiled."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import JITFunction, driver

    from igpo_megatron.kernels import triton_stream

    stub = mock.Mock()
    stub.get_current_device.return_value = stub.get_current_stream.return_value = 0
    stub.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    rows: list[dict[str, Any]] = []
    run = JITFunction.run

    def warm_up(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            found = run(kernel, *arguments, grid=grid, warmup=True, **options)
        if log.getvalue():
            dtype = next(str(argument.dtype).removeprefix("torch.") for argument in arguments if isinstance(argument, torch.Tensor))
            rows.append(
                {"triton": triton.__version__, "kernel": kernel.__name__, "dtype": dtype, **_measures(found, options, log.getvalue())}
            )
        return found

    driver.set_active(stub)
    triton.knobs.nvidia.dump_ptxas_log = True
    with (
        mock.patch.object(JITFunction, "run", warm_up),
        mock.patch.object(triton_stream, "_multiprocessors", lambda device: MULTIPROCESSORS),
    ):
        yield rows


def _measures(found: Any, options: dict[str, Any], log: str) -> dict[str, Any]:
    """What the compilers say of one kernel."""
    ptx = found.asm["ptx"]
    (registers,) = re.findall(r"Used (\d+) registers", log)
    (spilled,) = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    return {
        "options": {name: value for name, value in options.items() if name.isupper() or name.startswith("num_")},
        "warps": found.metadata.num_warps,
        "shared": found.metadata.shared,
        "registers": int(registers),
        "spilled": sum(map(int, spilled)),
        "setmaxnreg": ptx.count("setmaxnreg"),
        **{name: ptx.count(instruction) for name, instruction in COUNTED.items()},
    }


def problems(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for each rule that a variant breaks; one that masks the end of an odd H may spill, no published model needs it."""
    found = []
    for row in rows:
        options = row["options"]
        block = options.get("BLOCK_M", 0)
        multiplies = row["kernel"].startswith("_stream") and row["dtype"] != "float32"
        for broken, what in (
            (row["spilled"] > 0 and options.get("EVEN", True), f"spills {row['spilled']} bytes"),
            (row["shared"] > SHARED_LIMIT, f"takes {row['shared']} bytes of shared memory, {SHARED_LIMIT} are there"),
            (multiplies and block >= 64 and not row["wgmma"], "multiplies 64 rows or more without wgmma"),
            (row["kernel"] == "_stream_tma" and not row["TMA"], "loads without TMA"),
            (options.get("SPECIALISE", False) and not row["setmaxnreg"], "has no warps of their own for loads"),
            (row["kernel"] == "_fold_chunk" and row["shared"] > 0, "folds a row by several warps, which wait for each other at every step"),
        ):
            if broken:
                found.append(f"triton {row['triton']}: {row['kernel']} {row['dtype']} {options} {what}")
    return found


YES_NO = {True: "yes", False: "no", None: ""}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table."""
    table = Table(box=None, pad_edge=False)
    words, numbers = ("triton", "kernel", "dtype"), ("M x V x K", "H", "entropy", "warps", "stages", "registers", "shared", "spilled")
    for heading in (*words, *numbers, *COUNTED):
        table.add_column(heading, justify="left" if heading in words else "right", no_wrap=True)
    for row in rows:
        options = row["options"]
        tile = [options.get(name) for name in ("BLOCK_M", "BLOCK_V", "BLOCK_K")]
        if None in tile:
            tile = [options.get("BLOCK_R"), options.get("BLOCK") or options.get("SPLITS")]
        cells = [
            row["triton"],
            row["kernel"] + (" specialised" if options.get("SPECIALISE") else ""),
            row["dtype"],
            "x".join(map(str, tile)),
            *(YES_NO[options.get(name)] for name in ("EVEN", "ENTROPY")),
            row["warps"],
            options.get("num_stages", ""),
            *(row[name] for name in ("registers", "shared", "spilled", *COUNTED)),
        ]
        table.add_row(*map(str, cells))
    Console(width=160).print(table)


if __name__ == "__main__":
    typer.run(main)

"""Machines: a table of GPUs from their data sheets, scaled by what programs reach, or a measured file (`igpo plan --calibrate`, or
tools/bench/step.py, which also times the trainer)."""

from __future__ import annotations

import difflib
import json
import math
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from igpo_megatron.observability.run_folder import write_whole
from igpo_megatron.plan.timed import corrected, timed_from
from igpo_megatron.plan.types import Machine
from igpo_megatron.types import UserError

GIB = 2**30
MATMUL_SHARE, ATTENTION_SHARE, STREAM_SHARE, LINK_SHARE = 0.6, 0.45, 0.8, 0.7
"""Share of the data sheet's figure that programs reach. Assumed; `--calibrate` measures it."""

POSITIVE = tuple(field.name for field in fields(Machine) if field.name not in ("name", "device", "matmul", "cores", "source"))
"""Fields of a measured machine that must be positive numbers."""

_SHEETS = {
    "h100": (79.1, 989, 3350, 450, 50, 64),
    "h200": (139.8, 989, 4800, 450, 50, 64),
    "h800": (79.1, 989, 3350, 200, 50, 64),
    "h20": (95.1, 148, 4000, 450, 50, 64),
    "b200": (178.4, 2250, 8000, 900, 50, 64),
    "a100": (79.1, 312, 2039, 300, 25, 32),
    "a100-40gb": (39.4, 312, 1555, 300, 25, 32),
    "l40s": (44.4, 362, 864, 32, 25, 32),
}
"""Name -> GiB of memory that programs see, dense bf16 TFLOP/s, GB/s of memory, of NVLink (PCIe for l40s), of the network and of
PCIe, each way and per GPU; SXM boards, 8 to a node, one 400 (200) Gbit/s adapter per GPU."""


def gpu(name: str) -> Machine:
    """A GPU of the table. Raises UserError with the nearest names."""
    key = name.lower()
    if key not in _SHEETS:
        near = difflib.get_close_matches(key, _SHEETS, n=2)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(_SHEETS)}"
        raise UserError(f"--gpu {name}: unknown; {hint} For other devices measure one with --calibrate and give the file as --calibration")
    gib, tflops, stream, link, network, pcie = _SHEETS[key]
    peak = tflops * 1e12
    return Machine(
        name=key,
        device="cuda",
        memory=gib * GIB,
        # A call of 1 GFLOP takes microseconds and leaves most of the GPU idle.
        matmul=((1e9, 0.2 * peak), (1e11, MATMUL_SHARE * peak)),
        attention=ATTENTION_SHARE * peak,
        stream=STREAM_SHARE * stream * 1e9,
        link=LINK_SHARE * link * 1e9,
        link_latency=15e-6,
        network=LINK_SHARE * network * 1e9,
        network_latency=30e-6,
        host_link=LINK_SHARE * pcie * 1e9,
        call=5e-6,
        decode_call=3e-3,
        ranks_per_node=8,
        source="modelled from the data sheet",
    )


def sheet_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s in the data sheet of what CUDA calls by this name; None for boards that are not in the table."""
    words = device_name.lower().replace("-", " ").split()
    if "pcie" in words or "nvl" in words:  # slower clocks than the SXM boards of the same name
        return None
    return next((sheet[1] * 1e12 for name, sheet in _SHEETS.items() if name in words), None)


def read(path: Path) -> Machine:
    """A measured machine: a file of `igpo plan --calibrate`, or the result of tools/bench/step.py, whose timed passes correct it.

    Raises UserError for a file that is missing or neither of them.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and values.get("name") == "step":
            figures = values["figures"]
            return corrected(_machine(figures["machine"]), timed_from(figures))
        return _machine(values)
    except (OSError, ValueError, TypeError, KeyError, ArithmeticError, RecursionError) as error:
        why = f"no entry {error}" if isinstance(error, KeyError) else os.strerror(error.errno or 0) if isinstance(error, OSError) else error
        raise UserError(
            f"--calibration {path}: not a file written by `igpo plan --calibrate`, and no result of tools/bench/step.py ({why}); "
            "measure the machine again with either"
        ) from None


def _machine(values: Any) -> Machine:
    """A machine as `write` writes it, with or without the factors. Raises OverflowError, TypeError or ValueError for anything else."""
    known = {field.name for field in fields(Machine)}
    needed = known - {"score_factor", "train_factor"}
    if not isinstance(values, dict) or not needed <= set(values) <= known:
        raise ValueError(f"expected the keys {', '.join(sorted(needed))}")
    machine = Machine(**{**values, "matmul": tuple(sorted((float(size), float(rate)) for size, rate in values["matmul"]))})
    if machine.device not in ("cuda", "cpu"):
        raise ValueError(f"expected device cuda or cpu, found {machine.device!r}")
    numbers = {name: [getattr(machine, name)] for name in POSITIVE}
    numbers |= {"matmul": [*sum(machine.matmul, ())], "cores": [1 if machine.cores is None else machine.cores]}
    wrong = [name for name, found in numbers.items() if not found or not all(math.isfinite(number) and number > 0 for number in found)]
    if wrong:
        raise ValueError(f"expected positive numbers for {', '.join(wrong)}")
    return machine


def write(machine: Machine, path: Path) -> None:
    """Write a calibration file. Raises UserError where it cannot be written."""
    write_asked(path, json.dumps(asdict(machine), indent=1) + "\n", "--calibration")


def write_asked(path: Path, text: str, option: str) -> None:
    """Write the file that an option named. Raises UserError where it cannot be written."""
    try:
        if path.is_symlink() or (path.exists() and not path.is_file()):  # such as /dev/stdout
            path.write_text(text, encoding="utf-8")
        else:
            write_whole(path, text)
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be written ({os.strerror(error.errno or 0).lower()}); name another file") from None

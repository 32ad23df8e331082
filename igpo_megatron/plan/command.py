"""`igpo plan`: from the options of the command line to a table and a file."""

from __future__ import annotations

import shlex
import warnings
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from igpo_megatron.config.load import ConfigError, build, load, parse
from igpo_megatron.plan import machines
from igpo_megatron.plan.launch import launch_yaml
from igpo_megatron.plan.model_shape import find_shape
from igpo_megatron.plan.search import Plan, plan_config, search
from igpo_megatron.plan.show import show, show_run
from igpo_megatron.plan.types import Placement, Settings, Workload
from igpo_megatron.plan.workload import from_rollouts


def plan_run(
    model: str,
    gpus: int,
    gpu: str = "h100",
    calibration: Path | None = None,
    out: Path | None = None,
    workload: Workload | None = None,
    rollouts: tuple[Path, ...] = (),
    staleness: int = 0,
    placement: Placement | None = None,
    reference: bool = True,
    rows: int = 10,
    console: Console | None = None,
    shown_out: str | None = None,
) -> int:
    """Plan, print and write. Returns the exit code: 0 where something fits, 1 where nothing does. Raises UserError.

    `shown_out`: the path that the file names in its own --out, `out` by default.
    """
    name, shape = find_shape(model)
    workload = workload or Workload()
    workload = replace(workload, max_context=min(workload.max_context, shape.max_positions))
    if rollouts:
        workload = from_rollouts(rollouts, workload)
    machine = machines.read(calibration) if calibration else machines.gpu(gpu)
    settings = Settings(dtype_bytes=2 if machine.device == "cuda" else 4, reference=reference)
    with warnings.catch_warnings(action="ignore"):  # about libraries that are missing for a GPU; nothing is computed here
        plan = search(Plan(name, shape, machine, workload, settings, gpus, staleness), placement)
    show(plan, console or Console(), rows)
    if not plan.fits:
        return 1
    if out is not None:
        path = model if Path(model).is_dir() else f"models/{name}"
        where = f"--calibration {calibration}" if calibration else f"--gpu {gpu}"
        options = f" --staleness {staleness}" * bool(staleness) + f" --placement {placement}" * (placement is not None)
        command = f"igpo plan --model {shlex.quote(model)} --gpus {gpus} {where}{options} --out {shown_out or out}"
        text = launch_yaml(plan, plan.fits[0], command, path)
        try:
            build(parse(text))
        except ConfigError as error:
            raise AssertionError(f"the planner wrote a file that does not load: {error}") from error
        machines.write_asked(out, text, "--out")
        (console or Console()).print(f"wrote {out}")
    return 0


def predict_run(
    path: Path, model: str | None, gpu: str, calibration: Path | None, workload: Workload, rollouts: tuple[Path, ...], console: Console
) -> int:
    """Predict memory and time of a configuration with the layout that it has. Returns the exit code: 0 where it fits. Raises UserError."""
    config = load(path)
    name, shape = find_shape(model or str(config.model.path))
    if rollouts:
        workload = from_rollouts(rollouts, workload)
    machine = machines.read(calibration) if calibration else machines.gpu(gpu)
    with warnings.catch_warnings(action="ignore"):
        plan = plan_config(config, name, shape, machine, workload)
    show_run(plan, console)
    return 0 if plan.fits else 1

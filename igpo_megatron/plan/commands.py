"""The options of `igpo plan`. Everything else is imported after they have been read."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from igpo_megatron.types import UserError

_workload = partial(typer.Option, rich_help_panel="Workload")

_NOT_WITH_RUN = ("gpus", "out", "prompts", "samples", "max-context", "staleness", "placement", "reference", "rows")
"""Options that search for a layout, or that a configuration already decides."""


def _check_beside_run(context: typer.Context) -> None:
    """Raises UserError where options of _NOT_WITH_RUN are on the command line, even with their defaults."""
    sources = {option: context.get_parameter_source(option.replace("-", "_")) for option in _NOT_WITH_RUN}
    given = [f"--{option}" for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        raise UserError(f"--run predicts a configuration as it stands; leave {', '.join(given)} out, or plan without --run")


def plan(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Folder with config.json, or a known name such as Qwen2.5-72B.")] = None,
    gpus: Annotated[int | None, typer.Option(help="Devices for training and rollouts together.")] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, h800, h20, b200, a100, a100-40gb or l40s.")] = "h100",
    calibration: Annotated[
        Path | None,
        typer.Option(help="A measured machine instead of --gpu: a file that --calibrate or the step benchmark wrote."),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine (a minute at most) and write --calibration.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the fastest plan as a configuration to this YAML file.")] = None,
    run: Annotated[Path | None, typer.Option(help="Predict this configuration as it stands instead of looking for layouts.")] = None,
    rollouts: Annotated[list[Path] | None, _workload(help="Rollout file of a run: its lengths instead of the assumed ones.")] = None,
    prompts: Annotated[int, _workload(min=1, help="Questions per step.")] = 32,
    samples: Annotated[int, _workload(min=1, help="Trajectories per question.")] = 16,
    max_context: Annotated[int, _workload(min=256, help="Tokens of the longest trajectory that must fit.")] = 32768,
    turns: Annotated[float, _workload(min=1.0, max=1e4, help="Mean turns of a trajectory.")] = 4.0,
    prompt_tokens: Annotated[int, _workload(min=1, help="Tokens of a question's prompt.")] = 600,
    turn_tokens: Annotated[float, _workload(min=1, max=1e7, help="Mean sampled tokens of a turn.")] = 300.0,
    observation_tokens: Annotated[float, _workload(min=1, max=1e7, help="Mean tokens of a tool result.")] = 800.0,
    tool_latency: Annotated[float, _workload(min=0.001, max=1e5, help="Median seconds of a tool call.")] = 0.5,
    staleness: Annotated[int, typer.Option(min=0, help="Rollouts this many updates old may overlap with training.")] = 0,
    placement: Annotated[
        Literal["disaggregated", "colocated"] | None,
        typer.Option(
            metavar="KIND", help="disaggregated: engines have devices of their own; colocated: those of the ranks; default: try both."
        ),
    ] = None,
    reference: Annotated[bool, typer.Option(help="Keep the first weights for a KL term (loss.kl_coef above 0).")] = True,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the tables.")] = 10,
) -> None:
    """Find layouts of a model on N devices: what fits, how long a step takes, what does not fit and why."""
    if calibrate:
        from igpo_megatron.plan import machines
        from igpo_megatron.plan.calibrate import calibrate as measure

        path = calibration or Path("machine.json")
        machines.write(measure(), path)
        typer.echo(f"wrote {path}; plan with --calibration {path}")
        return
    if run is None and (model is None or gpus is None):
        raise UserError("igpo plan needs --model and --gpus (or --run, or --calibrate)")
    from igpo_megatron.plan.command import plan_run, predict_run
    from igpo_megatron.plan.types import Workload

    workload = Workload(
        prompts=prompts,
        samples=samples,
        prompt_tokens=prompt_tokens,
        turns=turns,
        turn_tokens=turn_tokens,
        observation_tokens=observation_tokens,
        tool_median=tool_latency,
        max_context=max_context,
        max_turns=max(10, round(turns)),
    )
    files = tuple(rollouts or ())
    if run is not None:
        _check_beside_run(context)
        from rich.console import Console

        raise typer.Exit(predict_run(run, model, gpu, calibration, workload, files, Console()))
    assert model is not None and gpus is not None
    raise typer.Exit(plan_run(model, gpus, gpu, calibration, out, workload, files, staleness, placement, reference, rows))

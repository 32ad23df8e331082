"""The `igpo` command: a thin front door over the modules.

igpo train | launch | eval | score | convert | report | plan | doctor | config
"""

from __future__ import annotations

import json
import math
import os
import secrets
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException

from igpo_megatron.algorithms.hooks import check_hooks
from igpo_megatron.config.checks import require
from igpo_megatron.config.load import explain, load
from igpo_megatron.config.schema import Config
from igpo_megatron.observability.run_folder import folder_for, held, open_folder, read_summary
from igpo_megatron.supervision.endings import one_sentence, sigterm_interrupts
from igpo_megatron.supervision.leftovers import claim, remove_abandoned
from igpo_megatron.types import UserError

_one_sentence = partial(one_sentence, passing=(typer.Exit, typer.Abort, TyperException))


class _OneSentence(TyperGroup):
    """Every command, and those mounted below, ends with one sentence where it does not end well."""

    def invoke(self, ctx: Any) -> Any:
        with _one_sentence():
            return super().invoke(ctx)


app = typer.Typer(
    cls=_OneSentence,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train search agents with information-gain rewards on Megatron-Core, vLLM and Ray.",
    epilog="Exit codes: 0 done; 1 stopped, with the reason in one sentence; 2 something to correct; 128 + N ended by signal N.",
)

_RENDEZVOUS_PREFIX = "igpo-rendezvous-"

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that replace those of the file, e.g. optim.lr=1e-5.")]

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""Nothing a run starts looks anything up or reports anywhere, and no rank that lost another tells so in C++, unless its environment says
otherwise."""


@app.command()
def train(config: Annotated[Path, typer.Argument(help="YAML file of the run.")], overrides: Overrides = None) -> None:
    """Start or resume a run. Starts the ranks itself (torchrun on this machine); inside torchrun use -m igpo_megatron.training.main."""
    settings = load(config, overrides or [])
    if not _is_finished(settings):
        with _launcher(settings, world_size(settings)) as start:
            start(str(config), *(overrides or []))  # torchrun: the process of every rank calls training.main.main


def _is_finished(settings: Config) -> bool:
    """The run is finished, and this has been said. Raises ConfigError where its folder was made with other settings."""
    folder = open_folder(settings)
    summary = read_summary(folder)
    if summary is None:
        return False
    from igpo_megatron.observability.summary import show_finished

    show_finished(summary, folder.report)
    typer.echo(f"this run is finished; to train again choose another run.name, or remove {folder.root}")
    return True


@app.command()
def launch(
    config: Annotated[Path, typer.Argument(help="YAML file of the run, the same on every node.")],
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, envvar=["NNODES", "SLURM_NNODES"], help="Machines of the job.")] = 1,
    node_rank: Annotated[int | None, typer.Option(envvar=["NODE_RANK", "SLURM_NODEID"], help="This machine's place among them.")] = None,
    head: Annotated[str | None, typer.Option(envvar=["IGPO_HEAD", "MASTER_ADDR"], help="HOST[:PORT] of node 0.")] = None,
    role: Annotated[str, typer.Option(envvar="NODE_ROLE", help="train, rollout or both: ranks, engines or both live here.")] = "both",
    ranks: Annotated[int | None, typer.Option(envvar="RANKS", help="Ranks on this machine; default: an equal share of the layout.")] = None,
    address: Annotated[str | None, typer.Option(envvar="NODE_IP", help="Address by which the others reach this machine.")] = None,
    rendezvous: Annotated[str, typer.Option(help="How torchrun's agents meet: c10d or static.")] = "c10d",
    max_restarts: Annotated[int, typer.Option(min=0, help="Times that torchrun restarts ranks that died.")] = 0,
    deadline_s: Annotated[float, typer.Option(min=1, help="The nodes agree within this time, or each says in a sentence why not.")] = 120,
    lost_after_s: Annotated[float, typer.Option(min=2, help="A node that is silent for this long ends the job on all.")] = 20,
) -> None:
    """Run on this machine its part of a job of one or many: the same command on each, resumed by the same command."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch: a node that is not there yet is no warning
    from igpo_megatron.launch.job import Options, run_node
    from igpo_megatron.launch.node import place

    options = Options(rendezvous, max_restarts, deadline_s, lost_after_s)
    settings = load(config, overrides or [])
    if _is_finished(settings):
        return
    world = world_size(settings)
    node = place(rank=node_rank, nodes=nodes, head=head, role=role, ranks=ranks, world=world, address=address)
    arguments = [str(config), *(overrides or [])]
    if nodes == 1:
        with _launcher(settings, node.ranks, max_restarts) as start:
            start(*arguments)
        return
    for name, value in OFFLINE.items():
        os.environ.setdefault(name, value)
    with _one_sentence(folder_for(settings).root):
        raise typer.Exit(run_node(node, settings, arguments, options))


def _on_this_machine(config: Config) -> Config:
    """What is checked: `run.device=auto` is decided."""
    from igpo_megatron.policy.parallel import on_this_machine

    return on_this_machine(config)


def world_size(config: Config) -> int:
    """Ranks of a run that is started on one machine."""
    layout = config.parallel
    row_ranks = layout.tensor * layout.context
    return row_ranks * layout.pipeline * (layout.data or layout.expert // math.gcd(layout.expert, row_ranks))


@contextmanager
def _launcher(settings: Config, ranks: int, max_restarts: int = 0) -> Iterator[Callable[..., object]]:
    """Call it with training.main's arguments: it starts all ranks of a run on this machine, and returns when they have ended."""
    require(_on_this_machine(settings), ranks)
    check_hooks(settings.reward, settings.advantage, settings.loss)
    folder = folder_for(settings)
    with held(folder):
        pass  # that another run has it, or that it cannot be written, is said before anything heavy starts
    with _one_sentence(folder.root), _torchrun(ranks, max_restarts) as start:
        yield start


@contextmanager
def _torchrun(ranks: int, max_restarts: int = 0) -> Iterator[Callable[..., object]]:
    """torchrun's own launcher for ranks on this machine. Exits with the code of the first rank that failed, after saying why."""
    from torch.distributed.launcher.api import LaunchConfig

    from igpo_megatron.launch.agent import RanksFailed, launcher

    _stay_offline()
    # One agent meets nobody: a file serves it, and the ranks make their own store (actor.parallel), where the server that
    # torch would start for both listens on every interface.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    remove_abandoned(Path(tempfile.gettempdir()), _RENDEZVOUS_PREFIX)
    with tempfile.TemporaryDirectory(prefix=_RENDEZVOUS_PREFIX) as meeting:
        claim(Path(meeting))
        launch = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=secrets.token_hex(4),
            rdzv_backend="c10d",
            rdzv_endpoint=f"{meeting}/store",
            rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1",
            max_restarts=max_restarts,
            monitor_interval=0.2,
        )
        try:
            with launcher(launch) as start:
                yield start
        except RanksFailed as failed:
            typer.echo(failed.ending.text, err=True, nl=False)
            raise typer.Exit(failed.ending.code) from None


def _stay_offline() -> None:
    """For this process and those it starts, unless their environment says otherwise."""
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    for name, value in {**OFFLINE, **loopback, "OMP_NUM_THREADS": "1"}.items():
        os.environ.setdefault(name, value)


@app.command("eval")
def eval_command(
    config: Annotated[Path, typer.Argument(help="YAML file that says how to search and roll out; its data.eval is the default data.")],
    model: Annotated[Path | None, typer.Option(help="Hugging Face folder or Megatron checkpoint; default: the file's model.path.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Parquet file of questions; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the scores (JSON) and the rollouts (parquet).")] = Path("runs/eval"),
    overrides: Overrides = None,
) -> None:
    """Score a checkpoint on benchmark files: EM, F1, format, turns, searches; greedy, sampled and pass@k; per source."""
    from igpo_megatron.training.evaluate import evaluate_checkpoint

    changes = [*(overrides or [])]
    if data:
        changes.append(f"data.eval={json.dumps([str(path) for path in data])}")
    settings = load(config, changes)
    with _one_sentence(out):
        report = evaluate_checkpoint(settings, model, out)
    typer.echo(json.dumps(report, indent=2))


@app.command("score")
def score_command(file: Annotated[Path, typer.Argument(help='JSON lines of {"solution", "ground_truth"}.')]) -> None:
    """Apply the published outcome rule to whole texts; prints one JSON line each with f1, em, format_ok and reward."""
    from igpo_megatron.algorithms.rewards import score_lines

    for row in score_lines(file):
        typer.echo(json.dumps(row))


@app.command("report")
def report_command(run: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Write a run's HTML report again."""
    from igpo_megatron.observability.report.page import write_report

    with _one_sentence(run):
        typer.echo(write_report(run))


_NOT_WITH_RUN = ("gpus", "out", "prompts", "samples", "max-context", "staleness", "placement", "reference", "rows")
"""Options of `igpo plan` that look for a layout, or say what a configuration says itself."""


def _require_none_of(options: tuple[str, ...], context: typer.Context) -> None:
    """Raises UserError where some are on the command line beside --run, be it with their defaults."""
    sources = {option: context.get_parameter_source(option.replace("-", "_")) for option in options}
    given = [f"--{option}" for option, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if given:
        raise UserError(f"--run predicts a configuration as it stands; leave {', '.join(given)} out, or plan without --run")


@app.command("plan")
def plan_command(
    context: typer.Context,
    model: Annotated[str | None, typer.Option(help="Folder with config.json, or a known name such as Qwen2.5-72B.")] = None,
    gpus: Annotated[int | None, typer.Option(help="Devices for training and rollouts together.")] = None,
    gpu: Annotated[str, typer.Option(help="h100, h200, h800, h20, b200, a100, a100-40gb or l40s.")] = "h100",
    calibration: Annotated[
        Path | None,
        typer.Option(help="A measured machine instead of --gpu: a file of `--calibrate`, or the result of tools/bench/step.py."),
    ] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure this machine (a minute at most) and write --calibration.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write the fastest plan as a configuration to this YAML file.")] = None,
    run: Annotated[Path | None, typer.Option(help="Predict this configuration as it stands instead of looking for layouts.")] = None,
    rollouts: Annotated[list[Path] | None, typer.Option(help="Rollout file of a run: its lengths instead of the assumed ones.")] = None,
    prompts: Annotated[int, typer.Option(min=1, help="Questions per step.")] = 32,
    samples: Annotated[int, typer.Option(min=1, help="Trajectories per question.")] = 16,
    max_context: Annotated[int, typer.Option(min=256, help="Tokens of the longest trajectory that must fit.")] = 32768,
    turns: Annotated[float, typer.Option(min=1.0, max=1e4, help="Mean turns of a trajectory.")] = 4.0,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a question's prompt.")] = 600,
    turn_tokens: Annotated[float, typer.Option(min=1, max=1e7, help="Mean sampled tokens of a turn.")] = 300.0,
    observation_tokens: Annotated[float, typer.Option(min=1, max=1e7, help="Mean tokens of a tool result.")] = 800.0,
    tool_latency: Annotated[float, typer.Option(min=0.001, max=1e5, help="Median seconds of a tool call.")] = 0.5,
    staleness: Annotated[int, typer.Option(min=0, help="Rollouts this many updates old may overlap with training.")] = 0,
    placement: Annotated[
        Literal["disaggregated", "colocated"] | None, typer.Option(help="Engines' devices: their own, or the ranks'; default: try both.")
    ] = None,
    reference: Annotated[bool, typer.Option(help="Keep the first weights for a KL term (loss.kl_coef above 0).")] = True,
    rows: Annotated[int, typer.Option(min=1, help="Rows of the tables.")] = 10,
) -> None:
    """Say how to lay a model out on N devices: what fits, how long a step takes, what does not fit and why."""
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
        _require_none_of(_NOT_WITH_RUN, context)
        from rich.console import Console

        raise typer.Exit(predict_run(run, model, gpu, calibration, workload, files, Console()))
    assert model is not None and gpus is not None
    raise typer.Exit(plan_run(model, gpus, gpu, calibration, out, workload, files, staleness, placement, reference, rows))


@app.command("config")
def config_command(section: Annotated[str | None, typer.Argument(help="Section such as rollout; default: all.")] = None) -> None:
    """Explain every setting and its default."""
    typer.echo(explain(section))


doctor_app = typer.Typer(invoke_without_command=True, help="Say what this machine can run, and what is missing.")
app.add_typer(doctor_app, name="doctor")


@doctor_app.callback()
def doctor_command(context: typer.Context) -> None:
    """Say what this machine can run, and what is missing."""
    if context.invoked_subcommand is None:
        from igpo_megatron.doctor import machine as doctor

        raise typer.Exit(doctor.main())


@doctor_app.command("probes")
def doctor_probes(
    config: Annotated[Path, typer.Argument(help="YAML file that names the model and the engine.")], overrides: Overrides = None
) -> None:
    """Score the same ground-truth probes by every scorer (fold, batched, sequential, engine) and show that they agree."""
    from igpo_megatron.doctor import probes as probe_check

    _stay_offline()
    settings = load(config, overrides or [])
    require(_on_this_machine(settings), None)
    raise typer.Exit(probe_check.main(settings))


@doctor_app.command("chat")
def doctor_chat(
    config: Annotated[Path, typer.Argument(help="YAML file that names the model and the protocol.")], overrides: Overrides = None
) -> None:
    """Show one conversation of two turns in the model's chat template: where each token comes from, and which are trained."""
    from igpo_megatron.doctor import chat as chat_check

    _stay_offline()
    raise typer.Exit(chat_check.main(load(config, overrides or [])))


@doctor_app.command("tools")
def doctor_tools(
    config: Annotated[Path, typer.Argument(help="YAML file that says what is searched with.")],
    queries: Annotated[int, typer.Option(min=1, help="Queries that may be sent at most.")] = 100,
    page: Annotated[list[str] | None, typer.Option(help="Page for the visit tool; may be repeated. Default: what searches find.")] = None,
    overrides: Overrides = None,
) -> None:
    """Send real queries to the configured search (and tools): latency, errors, how many at once; says what to set. Never the cache."""
    from igpo_megatron.doctor import tools as tool_check

    raise typer.Exit(tool_check.main(load(config, overrides or []), queries, page or []))


def _mount_convert() -> None:
    from checkpoint_conversion.commands import app as convert_app
    from igpo_megatron.doctor.verify import verify_command

    # In place of the converter's own, which knows no models.
    convert_app.registered_commands = [command for command in convert_app.registered_commands if command.name != "verify"]
    convert_app.command("verify")(verify_command)
    app.add_typer(convert_app, name="convert", help="Move checkpoints between Hugging Face and Megatron formats.")


def main() -> None:
    """Entry point of the `igpo` command."""
    if sys.argv[1:2] == ["convert"] or "--help" in sys.argv[1:2]:
        _mount_convert()  # imports torch, which no other command needs at once
    sigterm_interrupts()
    app()


if __name__ == "__main__":
    main()

"""The `igpo` command: a thin layer over the modules.

igpo train | launch | eval | score | report | plan | config | demo-model | doctor | data | serve | convert
"""

from __future__ import annotations

import json
import math
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup
from typer.exceptions import TyperException
from typer.main import get_group

from checkpoint_conversion.commands import demo_model
from igpo_megatron.config.checks import planned_over_steps
from igpo_megatron.config.load import explain, load
from igpo_megatron.config.schema import Config
from igpo_megatron.doctor.commands import app as doctor_app
from igpo_megatron.observability.run_folder import folder_for, held, open_folder, read_summary
from igpo_megatron.plan.commands import plan
from igpo_megatron.supervision.endings import one_sentence, sigterm_interrupts
from igpo_megatron.supervision.leftovers import claim, remove_abandoned
from igpo_megatron.supervision.library_log import LOGS, libraries_logged
from igpo_megatron.supervision.offline import OFFLINE, stay_offline

_one_sentence = partial(one_sentence, passing=(typer.Exit, typer.Abort, TyperException))


def _convert() -> typer.Typer:
    from checkpoint_conversion.commands import app as converter
    from igpo_megatron.doctor.commands import verify

    # The converter's own `verify` does not compare log-probs.
    room = typer.Typer(no_args_is_help=True, help="Move checkpoints between Hugging Face and Megatron formats, and from GGUF.")
    room.registered_commands = [command for command in converter.registered_commands if command.name != "verify"]
    room.command("verify", epilog="Example: igpo convert verify --hf models/qwen --megatron models/qwen-mcore")(verify)
    return room


_ROOMS: dict[str, Callable[[], typer.Typer]] = {
    "data": lambda: import_module("igpo_megatron.data.commands").app,
    "serve": lambda: import_module("igpo_megatron.serve.commands").app,
    "convert": _convert,
}
"""Groups of commands that are imported on demand: other commands do not wait for their imports."""


class _FrontDoor(TyperGroup):
    """Reports a failure of any command in one sentence."""

    def invoke(self, ctx: Any) -> Any:
        with _one_sentence():
            return super().invoke(ctx)

    def list_commands(self, ctx: Any) -> list[str]:
        return [*super().list_commands(ctx), *_ROOMS]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in _ROOMS:
            return super().get_command(ctx, cmd_name)
        group = get_group(_ROOMS[cmd_name]())
        group.name = cmd_name
        return group


app = typer.Typer(
    cls=_FrontDoor,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train search agents with information-gain rewards on Megatron-Core, vLLM and Ray.",
    epilog="Exit codes: 0 done; 1 stopped, with the reason in one sentence; 2 something to correct; 128 + N ended by signal N.",
)

_RENDEZVOUS_PREFIX = "igpo-rendezvous-"

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that replace those of the file, e.g. optim.lr=1e-5.")]


@app.command(epilog="Example: igpo train run.yaml optim.lr=1e-6")
def train(config: Annotated[Path, typer.Argument(help="YAML file of the run.")], overrides: Overrides = None) -> None:
    """Start or resume a run. Starts the ranks itself (torchrun on this machine); inside torchrun use -m igpo_megatron.training.main."""
    settings = load(config, overrides or [])
    if not _is_finished(settings):
        with _launcher(settings, world_size(settings)) as start:
            start(str(config), *(overrides or []))  # torchrun: the process of every rank calls training.main.main


def _is_finished(settings: Config) -> bool:
    """Whether the run is finished; prints its summary if so. Raises ConfigError if its folder was made with other settings."""
    folder = open_folder(settings)
    summary = read_summary(folder)
    if summary is None or summary["steps"] < settings.run.steps:
        return False
    from igpo_megatron.observability.summary import show_finished

    show_finished(summary, folder.report)
    is_complete = "stopped_at" in summary or settings.run.stop_after == "rollout"
    more = "" if is_complete or planned_over_steps(settings) else ", to go on raise run.steps"
    typer.echo(f"this run is finished; to train again choose another run.name, or remove {folder.root}{more}")
    return True


@app.command(epilog="Example: igpo launch run.yaml --nodes 2 --node-rank 0 --head 10.0.0.1")
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
    deadline_s: Annotated[float, typer.Option(min=1, help="Seconds for all nodes to agree; else each reports why not.")] = 120,
    lost_after_s: Annotated[float, typer.Option(min=2, help="A node that is silent for this long ends the job on all nodes.")] = 20,
) -> None:
    """Run this machine's part of a job of one or more machines. Start and resume it by the same command on each."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is imported: a node that is not up yet is no reason for a warning
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


def world_size(config: Config) -> int:
    """Ranks of a run that is started on one machine."""
    layout = config.parallel
    row_ranks = layout.tensor * layout.context
    return row_ranks * layout.pipeline * (layout.data or layout.expert // math.gcd(layout.expert, row_ranks))


@contextmanager
def _launcher(settings: Config, ranks: int, max_restarts: int = 0) -> Iterator[Callable[..., object]]:
    """A function to call with training.main's arguments: it starts all ranks on this machine and returns when they have ended."""
    from igpo_megatron.policy.parallel import on_this_machine
    from igpo_megatron.training.checks import require

    require(on_this_machine(settings), ranks)
    folder = folder_for(settings)
    with held(folder):
        pass  # a folder that is in use or cannot be written is reported before anything expensive starts
    typer.echo(f"starting {ranks} rank{'s' if ranks > 1 else ''} of {folder.root}: they import torch and Megatron-Core first")
    with _one_sentence(folder.root), _torchrun(ranks, max_restarts) as start:
        yield start


@contextmanager
def _torchrun(ranks: int, max_restarts: int = 0) -> Iterator[Callable[..., object]]:
    """torchrun's own launcher for ranks on this machine. Exits with the code of the first rank that failed, after saying why."""
    from torch.distributed.launcher.api import LaunchConfig

    from igpo_megatron.launch.agent import RanksFailed, launcher
    from igpo_megatron.policy.parallel import MEETING_FOLDER

    stay_offline()
    # A file is enough for a single agent, and the ranks make their own store (policy/parallel.py): the server that torch would start
    # for both listens on every interface.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    remove_abandoned(Path(tempfile.gettempdir()), _RENDEZVOUS_PREFIX)
    with tempfile.TemporaryDirectory(prefix=_RENDEZVOUS_PREFIX) as meeting:
        claim(Path(meeting))
        os.environ[MEETING_FOLDER] = meeting
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
        finally:
            del os.environ[MEETING_FOLDER]  # its folder ends here; ranks that this process starts otherwise must not look for it


@app.command("eval", epilog="Example: igpo eval run.yaml --model runs/a/checkpoints/step_000040 --data test.parquet")
def eval_command(
    config: Annotated[Path, typer.Argument(help="YAML file that says how to search and roll out; its data.eval is the default data.")],
    model: Annotated[Path | None, typer.Option(help="Hugging Face folder or Megatron checkpoint; default: the file's model.path.")] = None,
    data: Annotated[list[Path] | None, typer.Option(help="Parquet file of questions; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the scores (JSON) and the rollouts (parquet).")] = Path("runs/eval"),
    overrides: Overrides = None,
) -> None:
    """Score a checkpoint on benchmark files, per source. Prints the main scores; the JSON file has all, with turns and pass@k."""
    from rich.console import Console

    from igpo_megatron.observability.run_folder import step_name
    from igpo_megatron.observability.summary import evaluation_table
    from igpo_megatron.training.evaluate import evaluate_checkpoint

    changes = [*(overrides or [])]
    if data:
        changes.append(f"data.eval={json.dumps([str(path) for path in data])}")
    settings = load(config, changes)
    with _one_sentence(out), libraries_logged(out / LOGS / "eval.txt"):
        report = evaluate_checkpoint(settings, model, out)
    Console().print(evaluation_table(report))
    typer.echo(f"scores: {out / step_name(report['step'])}.json")


@app.command("score", epilog="Example: igpo score answers.jsonl")
def score_command(file: Annotated[Path, typer.Argument(help='JSON lines of {"solution", "ground_truth"}.')]) -> None:
    """Apply the published outcome rule to complete texts; prints one JSON line each with f1, em, format_ok and reward."""
    from igpo_megatron.algorithms.rewards import score_lines

    for row in score_lines(file):
        typer.echo(json.dumps(row))


@app.command("report", epilog="Example: igpo report runs/quickstart")
def report_command(run: Annotated[Path, typer.Argument(help="Folder of a run.")]) -> None:
    """Write a run's HTML report again."""
    from igpo_megatron.observability.report.page import write_report

    with _one_sentence(run):
        typer.echo(write_report(run))


@app.command("config", epilog="Example: igpo config rollout")
def config_command(section: Annotated[str | None, typer.Argument(help="Section such as rollout; default: all.")] = None) -> None:
    """Explain every setting and its default."""
    typer.echo(explain(section))


app.command("demo-model", epilog="Example: igpo demo-model --out models/smollm2")(demo_model)
app.command("plan", epilog="Example: igpo plan --model Qwen2.5-7B --gpus 8 --gpu h100 --out run.yaml")(plan)
app.add_typer(doctor_app, name="doctor")


def main() -> None:
    """Entry point of the `igpo` command."""
    sigterm_interrupts()
    app()


if __name__ == "__main__":
    main()

"""`igpo doctor`, and `igpo convert verify`. Each imports what it needs when it is called."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from checkpoint_conversion.commands import HfOption, MegatronOption
from igpo_megatron.config.load import load
from igpo_megatron.supervision.library_log import libraries_logged
from igpo_megatron.supervision.offline import stay_offline

app = typer.Typer(
    invoke_without_command=True, help="Say what this machine can run, and what is missing.", epilog="Example: igpo doctor tools run.yaml"
)

Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that replace those of the file, e.g. rollout.max_turns=4.")]


@app.callback()
def machine(context: typer.Context) -> None:
    """Say what this machine can run, and what is missing."""
    if context.invoked_subcommand is None:
        from igpo_megatron.doctor import machine as doctor

        raise typer.Exit(doctor.main())


@app.command("probes", epilog="Example: igpo doctor probes run.yaml")
def probes(
    config: Annotated[Path, typer.Argument(help="YAML file that names the model and the engine.")], overrides: Overrides = None
) -> None:
    """Score the same ground-truth probes by every scorer (fold, batched, sequential, engine) and show that they agree."""
    from igpo_megatron.doctor import probes as probe_check
    from igpo_megatron.policy.parallel import on_this_machine
    from igpo_megatron.training.checks import require

    stay_offline()
    settings = on_this_machine(load(config, overrides or []), trains=False)
    require(settings, None)
    raise typer.Exit(probe_check.main(settings))


@app.command("chat", epilog="Example: igpo doctor chat run.yaml")
def chat(
    config: Annotated[Path, typer.Argument(help="YAML file that names the model and the protocol.")], overrides: Overrides = None
) -> None:
    """Show one conversation of two turns in the model's chat template: where each token comes from, and which are trained."""
    from igpo_megatron.doctor import chat as chat_check

    stay_offline()
    raise typer.Exit(chat_check.main(load(config, overrides or [])))


@app.command("tools", epilog="Example: igpo doctor tools run.yaml --queries 20")
def tools(
    config: Annotated[Path, typer.Argument(help="YAML file that configures the search.")],
    queries: Annotated[int, typer.Option(min=1, help="Queries that may be sent at most.")] = 100,
    page: Annotated[list[str] | None, typer.Option(help="Page for the visit tool; may be repeated. Default: what searches find.")] = None,
    overrides: Overrides = None,
) -> None:
    """Send real queries to the configured search (and tools): latency, errors, concurrency, and what to set. Bypasses the cache."""
    from igpo_megatron.doctor import tools as tool_check

    raise typer.Exit(tool_check.main(load(config, overrides or []), queries, page or []))


def verify(
    hf: HfOption,
    megatron: MegatronOption,
    log_probs: Annotated[bool, typer.Option(help="Also score a fixed text by both models (fp32: 4 bytes per parameter, twice).")] = True,
) -> None:
    """Compare a Hugging Face folder with a Megatron checkpoint: every bit of every tensor, and the log-probs of a fixed text."""
    with libraries_logged(None):
        from igpo_megatron.doctor import verify as verify_check

        raise typer.Exit(verify_check.main(hf, megatron, log_probs))

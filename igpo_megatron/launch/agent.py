"""The ranks of one node, by torchrun's own launcher; how they ended becomes one sentence.

`python -m igpo_megatron.launch.agent SPEC`: SPEC is JSON with `launch` (arguments of LaunchConfig), `arguments` (of igpo_megatron.train),
and `outcome`, the file that says how it ended.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpo_megatron.leftovers import end_with_parent
from igpo_megatron.waits import LOST_PEER

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

NO_MESSAGE = "<NONE>"  # torchrun's word for a rank that left none


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the ranks of one node ended."""

    code: int
    """0, or an exit code for the shell."""

    kind: str
    """done, interrupted (this agent was asked to stop), signal (a rank was ended by one), error (a rank ended itself), peer (a rank lost
    another one)."""

    sentence: str = ""
    """What a person needs to know; empty where all went well."""

    told: bool = False
    """The rank has said it on its own output."""


def run_ranks(launch: LaunchConfig, arguments: Sequence[str]) -> Outcome:
    """Start the ranks and wait for them."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the ranks have said what happened
    try:
        elastic_launch(launch, sys.executable)("-u", "-m", "igpo_megatron.train", *arguments)
    except ChildFailedError as error:
        return outcome_of(error.failures)
    except SignalException as error:
        return Outcome(128 + error.sigval.value, "interrupted", f"interrupted by {error.sigval.name}")
    return Outcome(0, "done")


def outcome_of(failures: Mapping[int, ProcessFailure]) -> Outcome:
    """The cause among the ranks that failed, by global rank."""
    rank, failure = min(failures.items(), key=lambda item: (_consequence(item[1]), item[1].timestamp))
    said = _said(failure)
    if said is not None:
        return Outcome(max(failure.exitcode, 1), "peer" if said.endswith(LOST_PEER) else "error", said, told=True)
    if failure.exitcode < 0:
        return Outcome(128 - failure.exitcode, "signal", f"rank {rank} was ended by {signal.Signals(-failure.exitcode).name}")
    return Outcome(failure.exitcode, "error", f"rank {rank} ended with exit code {failure.exitcode}", told=True)


def _said(failure: ProcessFailure) -> str | None:
    """What a rank left behind (`train._leave_message`)."""
    said = failure.error_file_data.get("message")
    return said if isinstance(said, str) and said != NO_MESSAGE and failure.exitcode != -signal.SIGKILL else None


def _consequence(failure: ProcessFailure) -> int:
    """How likely others caused it: 0 a kill, which makes others fail within the second that torchrun's timestamps tell; 1 an error;
    2 torchrun's own SIGTERM to ranks that were still there."""
    if failure.exitcode >= 0 or _said(failure) is not None:
        return 1
    return 2 if failure.exitcode == -signal.SIGTERM else 0


def main(spec: dict[str, Any]) -> int:
    """Run the ranks that a launcher asked for and leave the outcome where it looks."""
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig

    end_with_parent()
    # One store of the agents for every attempt would still hold the addresses of the ranks that died, and new ones would knock there.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    try:
        outcome = run_ranks(LaunchConfig(**spec["launch"]), spec["arguments"])
    except RendezvousError as error:
        outcome = Outcome(1, "error", f"the agents of the nodes did not meet: {error}")
    Path(spec["outcome"]).write_text(json.dumps(asdict(outcome)), encoding="utf-8")
    return outcome.code


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))

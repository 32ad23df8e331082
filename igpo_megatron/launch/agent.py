"""The ranks of one node, by torchrun's own launcher; how they ended becomes one sentence.

`python -m igpo_megatron.launch.agent SPEC`: SPEC is JSON with `launch` (arguments of LaunchConfig), `arguments` (of
igpo_megatron.training.main), and `outcome`, the file to which it writes its ending.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from igpo_megatron.supervision.endings import LAUNCHED, Ending, read, signals_restored
from igpo_megatron.supervision.leftovers import end_with_parent, whole

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
    from torch.distributed.launcher.api import LaunchConfig

RANK_MODULE = "igpo_megatron.launch.rank"

_PATIENCE_S = 20.0
"""torchrun kills a rank that has not ended this long (30 s) after SIGTERM: a kill that late is not a cause."""


class RanksFailed(Exception):
    """A rank failed, or they were interrupted; `ending` is the cause."""

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending.sentence)
        self.ending = ending


@contextmanager
def launcher(launch: LaunchConfig) -> Iterator[Callable[..., object]]:
    """torchrun's launcher, to be called with training.main's arguments: it starts the ranks and waits for them. Raises RanksFailed."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed.elastic"):  # each logger has its own level; the ending reports what happened
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ[LAUNCHED] = "1"
    try:
        with signals_restored():
            yield partial(elastic_launch(launch, sys.executable), "-u", "-m", RANK_MODULE)
    except ChildFailedError as error:
        raise RanksFailed(ending_of_ranks(error.failures)) from None
    except SignalException as error:
        raise RanksFailed(Ending("interrupted", 128 + error.sigval.value, f"interrupted by {error.sigval.name}")) from None


def ending_of_ranks(failures: Mapping[int, ProcessFailure]) -> Ending:
    """The cause among the failed ranks, by global rank: first kills, then errors, then consequences (a lost peer, torchrun's own
    SIGTERM); among the same kind the earliest."""
    endings = [_ending(rank, failure) for rank, failure in failures.items()]
    errors = [one.time for one in endings if one.kind == "error"]

    def order(one: Ending) -> tuple[int, float]:
        if one.kind == "signal":
            late = one.code == 128 + signal.SIGTERM or any(one.time > time + _PATIENCE_S for time in errors)
            return (3 if late else 0), one.time
        return (1 if one.kind == "error" else 2), one.time

    return min(endings, key=order)


def _ending(rank: int, failure: ProcessFailure) -> Ending:
    """The ending that a rank wrote, or one made from its exit code."""
    left = read(failure.error_file_data)
    if left is not None:
        return left
    if failure.exitcode < 0:
        number = -failure.exitcode
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"  # a real-time signal has no name
        return Ending("signal", 128 - failure.exitcode, f"rank {rank} was ended by {name}", failure.timestamp)
    return Ending("error", failure.exitcode, f"rank {rank} ended with exit code {failure.exitcode}", failure.timestamp)


def main(spec: dict[str, Any]) -> int:
    """Run the ranks of a launcher, and write their ending to the file that it reads."""
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig

    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all processes: the launcher ends this agent
    # With one store for all attempts, new ranks would connect to the addresses of ranks that died.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    ending = Ending("done", 0)
    try:
        with launcher(LaunchConfig(**spec["launch"])) as start:
            start(*spec["arguments"])
    except RanksFailed as failed:
        ending = failed.ending
    except RendezvousError as error:
        ending = Ending("error", 1, f"the agents of the nodes did not meet: {error}")
    with whole(Path(spec["outcome"])) as part:
        part.write_text(json.dumps(asdict(ending)), encoding="utf-8")
    return ending.code


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))

"""Train several configurations one after the other on one rank, and on one engine: starting one takes longer than everything else.

python branching_runs.py CONFIG.yaml [section.key=value ...] -- CONFIG.yaml [section.key=value ...] -- ...
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import groupby
from unittest.mock import patch

from igpo_megatron.config.load import load
from igpo_megatron.config.schema import Config
from igpo_megatron.engines import pool as engines
from igpo_megatron.training.checks import require
from igpo_megatron.training.main import run


def configurations(arguments: list[str]) -> Iterator[Config]:
    for separator, part in groupby(arguments, lambda argument: argument == "--"):
        if not separator:
            path, *overrides = part
            yield load(path, overrides)


def main(arguments: list[str]) -> None:
    configs = list(configurations(arguments))
    for config in configs:
        require(config, 1)
    with engines.EnginePool(configs[0]) as pool:
        stays_open = {name: lambda *_: pool for name in ("begin", "close", "__enter__")} | {"__exit__": lambda *_: None}
        with patch.multiple(engines.EnginePool, **stays_open), patch.object(engines, "EnginePool", lambda config: pool):
            for config in configs:
                run(config)


if __name__ == "__main__":
    main(sys.argv[1:])

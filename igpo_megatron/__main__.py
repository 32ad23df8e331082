"""The `igpo` command from its first moment: what its commands need takes half a second to import, and Ctrl-C may come then."""

from __future__ import annotations

import os
import signal
from typing import Any


def main() -> None:
    """Entry point of the `igpo` command."""

    def end(number: int, frame: Any) -> None:
        os.write(2, b"interrupted by SIGINT\n")
        os._exit(128 + number)

    signal.signal(signal.SIGINT, end)
    from igpo_megatron import cli

    signal.signal(signal.SIGINT, signal.default_int_handler)
    cli.main()


if __name__ == "__main__":
    main()

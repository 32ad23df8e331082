"""The process of one rank below our launcher. An interruption while it imports ends it silently: the launcher reports it."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from igpo_megatron.supervision.endings import end_process
    from igpo_megatron.training import main as train

    end_process(train.main(sys.argv[1:]))

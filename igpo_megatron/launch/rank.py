"""The process of one rank below a launcher of ours. While it imports what training needs, an interruption ends it without a word: the
launcher has one."""

from __future__ import annotations

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from igpo_megatron.supervision.endings import end_process
    from igpo_megatron.training import main as train

    end_process(train.main(sys.argv[1:]))

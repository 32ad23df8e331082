"""Keep everything that a run starts from going online or sending usage reports, unless the environment says otherwise."""

from __future__ import annotations

import os
import sys

OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
"""The last keeps C++ log lines about lost ranks off the console."""


def stay_offline() -> None:
    """Set this for this process and those it starts, all on one machine."""
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    for name, value in {**OFFLINE, **loopback, "OMP_NUM_THREADS": "1"}.items():
        os.environ.setdefault(name, value)

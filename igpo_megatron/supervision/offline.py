"""Nothing a run starts looks anything up or reports anywhere, unless its environment says otherwise."""

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
"""The last of them: no rank that lost another says so in C++."""


def stay_offline() -> None:
    """For this process and those it starts, on one machine."""
    loopback = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    for name, value in {**OFFLINE, **loopback, "OMP_NUM_THREADS": "1"}.items():
        os.environ.setdefault(name, value)

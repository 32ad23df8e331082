"""Settings of the transfer of weights to the engines."""

from __future__ import annotations

from typing import Literal

from pydantic import PositiveFloat, PositiveInt

from igpo_megatron.settings import Section

MAX_GAP = {"fp32": 1e-3, "bf16": 0.25}
"""|Log-prob difference| allowed between engine and trainer on the canary's random tokens, whose log-probs are around -15: of fp32 the
largest, of bf16 the median."""


class Sync(Section):
    """Weight transfer to the engines."""

    canary_tokens: PositiveInt = 64
    """Fixed tokens scored by policy and engine after every sync."""

    max_gap: PositiveFloat | None = None
    """|Log-prob difference| allowed on the canary; a larger one stops the run. Where policy and engine compute in fp32 it is the largest of
    the tokens', and null means 1e-3; where one of them computes in bf16 it is the median, and null means 0.25. Fingerprints compare the
    weights' bytes in any case."""

    transport: Literal["auto", "shared_memory", "object_store", "nccl", "ipc"] = "auto"
    """How weights travel. `shared_memory`: a file that engines on this machine map. `object_store`: Ray's, over TCP, to any machine.
    `auto`: the first for engines on the main rank's machine, the second for others. CUDA only: `nccl`, a broadcast from the main rank's
    GPU, and `ipc`, for the one engine that shares the GPU of the only rank."""

    bucket_mib: PositiveInt = 256
    """Tensors are sent in buckets of at most this size; one that is larger travels alone. Two buckets are in memory at a time."""

    base_s: PositiveFloat = 60
    """Any step of a transfer may take this long, plus the time of its bytes at `min_mib_per_s`; then the run stops."""

    min_mib_per_s: PositiveFloat = 50
    """A slower transfer counts as hanging."""

    def gap_for(self, *dtypes: str) -> float:
        """`max_gap` between policy and engine of these dtypes."""
        return self.max_gap or (MAX_GAP["bf16"] if "bf16" in dtypes else MAX_GAP["fp32"])

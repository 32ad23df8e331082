"""How buckets reach engines. All transports but vLLM's own run without CUDA.

shared_memory   engine's workers map the main rank's file                                    same machine
object_store    Ray carries the bytes into a copy of the file on the engine's machine        any machine, over TCP
nccl, ipc       vLLM's weight-transfer back-ends, from GPU to GPU (cuda_transports.py)       CUDA
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import astuple
from typing import Any

import torch

from igpo_megatron.weights.send import Rows, cause
from igpo_megatron.weights.store import Bucket, SharedWeights

_POSITION_TIMEOUT_S = 5


class EngineReceiver:
    """An engine's Ray actor as a receiver of weights."""

    def __init__(self, number: int, actor: Any) -> None:
        self.name, self.number, self.actor = f"engine {number}", number, actor

    def begin(self) -> Future[Any]:
        """As in `Receiver`."""
        return self.actor.begin_update.remote().future()

    def finish(self, version: int) -> Future[Any]:
        """As in `Receiver`."""
        return self.actor.finish_update.remote(version).future()

    def position(self) -> str:
        """As in `Receiver`."""
        import ray

        try:
            return ray.get(self.actor.position.remote(), timeout=_POSITION_TIMEOUT_S)
        except (ray.exceptions.RayError, TimeoutError) as error:
            return f"unknown, its actor does not answer ({cause(error)})"


class FileTransport:
    """Engines load each bucket from the main rank's file or from a copy of it."""

    def __init__(self, receivers: Sequence[EngineReceiver], copied: SharedWeights | None = None) -> None:
        """`copied`: the file whose bytes go through Ray's object store, once per machine, into copies; None where engines can read it."""
        self.receivers, self._copied = receivers, copied

    def send(self, bucket: Bucket, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[Future[Rows]]:
        """As in `Transport`."""
        import ray

        place = {"number": bucket.number, "entries": tuple(astuple(entry) for entry in bucket.entries)}
        data = () if self._copied is None else (ray.put(self._copied.read_bytes(bucket).numpy()), bucket.begin)
        return [receiver.actor.load_bucket.remote(place, *data).future() for receiver in self.receivers]

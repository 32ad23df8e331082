"""Weights from GPU to GPU by vLLM's own weight-transfer API (0.32): NCCL to any engine, CUDA IPC to the one that shares the GPU.

    bucket ──> TrainerWeightTransferEngine.send_weights ──client.update_weights──> every engine's load_bucket
                               └────────────── NCCL broadcast, or a CUDA IPC handle ──────────────┘

vLLM needs the names and shapes of a transfer before its bytes. It gets them per bucket, from the bucket that it then sends, so that the
two cannot differ. The transfer runs on its own thread; the caller that waits for it enforces the deadline.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from igpo_megatron.weights.send import Rows, deadline_s
from igpo_megatron.weights.settings import Sync
from igpo_megatron.weights.store import Bucket
from igpo_megatron.weights.transports import EngineReceiver


class Native:
    """One of vLLM's back-ends, opened to a fixed set of engines."""

    def __init__(self, kind: str, receivers: Sequence[EngineReceiver], engine_ranks: int, limits: Sync) -> None:
        """`kind`: `nccl` or `ipc`; `engine_ranks`: workers of each engine."""
        self.receivers = list(receivers)
        self._limits = limits
        self._source = BucketSource()
        self._client = Client(self.receivers, kind, engine_ranks, limits)
        opened = in_thread(lambda: _trainer(kind, 1 + engine_ranks * len(self.receivers), limits, self._client, self._source))
        self._trainer = opened.result(timeout=limits.base_s)

    def reaches(self, receivers: Sequence[EngineReceiver]) -> bool:
        """True if it was opened to exactly these engines; a restarted engine counts as another."""
        return [receiver.actor for receiver in receivers] == [receiver.actor for receiver in self.receivers]

    def send(self, bucket: Bucket, tensors: Sequence[tuple[str, torch.Tensor]]) -> list[Future[Rows]]:
        """As in `Transport`."""
        assert tensors, "a restarted engine is filled from the file"
        self._source.tensors = list(tensors)
        loading = self._client.expect(bucket)
        sent = in_thread(self._trainer.send_weights)
        # Each engine reports that it has loaded the bucket; a failure of the policy's side is raised by the first future.
        return [in_thread(partial(_behind, sent, future)) for future in loading]

    def close(self) -> None:
        """Leave the engines' groups."""
        self._trainer.shutdown()


class Client:
    """vLLM's `VLLMWeightSyncClient` over Ray actors. The pool begins and ends an update itself, once for all buckets."""

    def __init__(self, receivers: Sequence[EngineReceiver], kind: str, engine_ranks: int, limits: Sync) -> None:
        self._receivers, self._kind, self._engine_ranks, self._limits = receivers, kind, engine_ranks, limits
        self._bucket: Bucket | None = None
        self._loading: list[Future[Rows]] = []

    def expect(self, bucket: Bucket) -> list[Future[Rows]]:
        """Announce that the next `update_weights` carries `bucket`; returns the engines' future reports."""
        self._bucket, self._loading = bucket, [Future() for _ in self._receivers]
        return self._loading

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let every engine join, with ranks after those of the engines before it."""
        joined = []
        for place, receiver in enumerate(self._receivers):
            offset = {"rank_offset": 1 + place * self._engine_ranks} if self._kind == "nccl" else {}
            joined.append(receiver.actor.join.remote(self._kind, {**init_info, **offset}).future())
        for future in joined:
            future.result(timeout=self._limits.base_s)

    def start_weight_update(self) -> None:
        """Done by the pool."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Let every engine receive the expected bucket; returns when all have received it."""
        assert self._bucket is not None
        info = {"number": self._bucket.number, "native_info": update_info}
        asked = [receiver.actor.load_bucket.remote(info).future() for receiver in self._receivers]
        for future, loading in zip(asked, self._loading, strict=True):
            try:
                loading.set_result(future.result(timeout=deadline_s(self._limits, self._bucket.nbytes)))
            except Exception as error:  # noqa: BLE001 (raised where the future is waited for)
                loading.set_exception(error)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Done by the pool."""


class BucketSource:
    """The part of vLLM's `WeightSource` that its senders use: the bucket being sent."""

    def __init__(self) -> None:
        self.tensors: list[tuple[str, torch.Tensor]] = []

    def metadata(self) -> list[Any]:
        """Names, dtypes and shapes of the bucket."""
        from vllm.distributed.weight_transfer.base import ParamMeta

        return [ParamMeta(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self.tensors]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return iter(self.tensors)


def _trainer(kind: str, world_size: int, limits: Sync, client: Client, source: BucketSource) -> Any:
    """vLLM's sender, connected to all engines."""
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

    room = limits.bucket_mib * 2**20
    if kind == "ipc":
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo

        # Unpacked: one message per bucket, whose tensors are not copied.
        info: Any = IPCTrainerInitInfo(packed=False, rank=0)
    else:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

        address, port = own_address()
        info = NCCLTrainerInitInfo(master_address=address, master_port=port, world_size=world_size, rank=0, packed_buffer_size_bytes=room)
    return WeightTransferTrainerFactory.trainer_init(info, client=client, source=source)


def own_address() -> tuple[str, int]:
    """This machine's address as Ray knows it, and a free port."""
    import ray

    address = ray.util.get_node_ip_address()
    with socket.create_server((address, 0)) as listener:
        return address, listener.getsockname()[1]


def _behind(sent: Future[None], future: Future[Rows]) -> Rows:
    """An engine's report, once the policy's side has finished."""
    sent.result()
    return future.result()


def in_thread(work: Callable[[], Any]) -> Future[Any]:
    """Run `work` on a daemon thread, so that a collective that hangs does not keep the process alive."""
    future: Future[Any] = Future()
    device = torch.cuda.current_device()  # a new thread starts on device 0

    def run() -> None:
        try:
            torch.cuda.set_device(device)
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 (raised where the future is waited for)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future

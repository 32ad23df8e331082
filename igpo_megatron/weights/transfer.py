"""The engine's half of a weight transfer: a back-end for vLLM's weight-transfer API that reports what it received.

    bucket ──file | nccl | ipc──> TransferEngine.receive_weights ──fingerprint──> model.load_weights ──finish──> repacked model

vLLM's own back-ends (NCCL, CUDA IPC) need CUDA and do not report what arrived. This one is registered with vLLM's factory when a worker
imports this module as its `worker_extension_cls`; it reads files itself and delegates NCCL and CUDA IPC to vLLM's.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from igpo_megatron.weights.store import Entry, Received, read, received

BACKEND = "igpo"
POSITION_BYTES = 512


def as_plain(update_info: dict[str, Any]) -> dict[str, Any]:
    """An update in a form that vLLM's encoder accepts: CUDA IPC handles contain torch classes, which it refuses, so they are pickled."""
    native_info = update_info.get("native_info")
    return update_info if native_info is None else {**update_info, "native_info": pickle.dumps(native_info)}


def from_plain(update_info: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `as_plain`. The bytes come from the engine's own actor, whose child the worker is."""
    native_info = update_info.get("native_info")
    return update_info if native_info is None else {**update_info, "native_info": pickle.loads(native_info)}


class Counting:
    """Wraps a model while weights are loaded into it, and records every tensor."""

    def __init__(self, model: torch.nn.Module, rows: list[Received]) -> None:
        self._model, self._rows = model, rows

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Any:
        """Record and load tensor by tensor."""
        return self._model.load_weights(self._seen(weights))  # type: ignore[operator]

    def _seen(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in weights:
            self._rows.append(received(name, tensor))
            yield name, tensor


def refresh_packed_weights(model: torch.nn.Module) -> None:
    """Re-pack weights that vLLM's reload misses on CPU, where the engine would silently give wrong results.

    oneDNN keeps a packed copy of every weight. The layerwise reload renews it for the layers it loads, but a tied output head is never
    loaded itself, so it would compute with the old embedding. Experts are loaded but not packed, though their kernel needs that.
    """
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    for module in model.modules():
        weight = getattr(module, "weight", None)
        if hasattr(module, "cpu_linear") and weight is not None and weight.dim() == 2 and weight.numel():
            dispatch_cpu_unquantized_gemm(module, remove_weight=False)
        kernel = getattr(getattr(module, "quant_method", None), "moe_kernel", None)
        if kernel is not None and hasattr(module, "w13_weight"):
            kernel.fused_experts.process_weights_after_loading(module)


def _register() -> None:
    """Define the back-end and register it with vLLM's factory. Only inside a vLLM worker."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        path: str = ""
        """The file with the weights."""

        position: str = ""
        """The file that names the tensor being loaded."""

        native: str = ""
        """`nccl` or `ipc` to open vLLM's own back-end as well."""

        native_info: dict[str, Any] = field(default_factory=dict)

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        number: int = 0
        entries: tuple[tuple[Any, ...], ...] = ()
        native_info: dict[str, Any] | None = None
        """What vLLM's own back-end needs to receive this bucket; None to read it from the file."""

    class TransferEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
        init_info_cls = InitInfo
        update_info_cls = UpdateInfo
        native: Any = None
        path = position = ""

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            if init_info.path:
                self.path, self.position = init_info.path, init_info.position
            if init_info.native:
                if self.native is not None:
                    self.native.shutdown()
                config = type(self.config)(backend=init_info.native)
                self.native = WeightTransferEngineFactory.create_engine(config, self.vllm_config, self.device, self.model)
                self.native.init_transfer_engine(self.native.parse_init_info(init_info.native_info))

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: Any) -> None:
            info = update_info if isinstance(update_info, UpdateInfo) else self.parse_update_info(update_info)
            self.rows: list[Received] = []
            try:
                self.receive_weights(info)
            except Exception as error:
                if not self.rows:
                    raise
                last = self.rows[-1]  # vLLM's own shape checks are assertions without a tensor name
                raise RuntimeError(f"{last.name} ({last.dtype} {list(last.shape)}) could not be loaded: {error!r}") from error
            if self.device.type != "cpu":
                torch.accelerator.synchronize()  # on a CPU worker it would raise

        def receive_weights(self, update_info: UpdateInfo) -> None:
            if update_info.native_info is None:
                entries = [Entry(*fields) for fields in update_info.entries]
                located = self._marked(update_info.number, read(self.path, entries))
                Counting(self.model, self.rows).load_weights((name, tensor.to(self.device)) for name, tensor in located)
            else:
                self.native.model = Counting(self.model, self.rows)
                self.native.receive_weights(self.native.parse_update_info(update_info.native_info))

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                refresh_packed_weights(self.model)

        def shutdown(self) -> None:
            if self.native is not None:
                self.native.shutdown()

        def _marked(self, number: int, tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
            with open(self.position, "r+b", buffering=0) as file:
                for name, tensor in tensors:
                    file.seek(0)
                    file.write(f"bucket {number}, {name}".encode()[:POSITION_BYTES].ljust(POSITION_BYTES))
                    yield name, tensor

    WeightTransferEngineFactory.register_engine(BACKEND, TransferEngine)


class WorkerExtension:
    """Named in `worker_extension_cls`: vLLM imports this module in each worker before the model is loaded, and adds these methods to it."""

    def load_bucket(self, update_info: dict[str, Any]) -> list[tuple[Any, ...]]:
        """Call `update_weights`; returns the fields of `Received` of each loaded tensor."""
        worker: Any = self
        worker.update_weights(from_plain(update_info))
        return [(row.name, row.dtype, row.shape, row.fingerprint) for row in worker.weight_transfer_engine.rows]


if os.environ.get("IGPO_ENGINE_PROCESS") == "1":
    _register()

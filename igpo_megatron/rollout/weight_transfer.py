"""Weights through shared memory: a back-end for vLLM's own weight-transfer API that needs no GPU.

    trainer: SharedWeights.write(named tensors) ──file in shared memory──> engine worker: SharedMemoryEngine.receive_weights ──> model

vLLM's back-ends (NCCL, CUDA IPC) need CUDA. This one is registered with vLLM's factory when a worker imports this module as its
`worker_extension_cls`, and serves engines on the machine of the main rank. The writing half needs no vLLM.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from igpo_megatron.leftovers import claim, remove_abandoned

BACKEND = "igpo_shm"
_ALIGNMENT = 64
_PREFIX = "igpo-weights-"


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class SharedWeights:
    """A file in shared memory, readable by this user only, that holds one version of all weights."""

    def __init__(self) -> None:
        room = Path("/dev/shm")
        folder = room if os.access(room, os.W_OK) else Path(tempfile.gettempdir())
        remove_abandoned(folder, _PREFIX)
        descriptor, name = tempfile.mkstemp(prefix=_PREFIX, dir=folder)
        os.close(descriptor)
        self.path = Path(name)
        self._claim = claim(self.path)

    def write(self, named_tensors: Iterable[tuple[str, torch.Tensor]]) -> list[Entry]:
        """Write all tensors, one in memory at a time; returns what lies where."""
        entries = []
        with self.path.open("wb") as file:
            for name, tensor in named_tensors:
                file.seek(-file.tell() % _ALIGNMENT, os.SEEK_CUR)
                data = tensor.detach().to("cpu").contiguous()
                entry = Entry(name, str(data.dtype).removeprefix("torch."), tuple(data.shape), file.tell(), data.nbytes)
                file.write(data.reshape(-1).view(torch.uint8).numpy().data)
                entries.append(entry)
        return entries

    def close(self) -> None:
        """Remove the file."""
        self.path.unlink(missing_ok=True)
        os.close(self._claim)


def read(path: str, entries: Iterable[Entry]) -> Iterable[tuple[str, torch.Tensor]]:
    """The tensors, as views of the mapped file."""
    buffer = torch.from_file(path, shared=True, size=os.path.getsize(path), dtype=torch.uint8)
    for entry in entries:
        part = buffer[entry.offset : entry.offset + entry.nbytes]
        yield entry.name, part.view(getattr(torch, entry.dtype)).view(entry.shape)


def refresh_packed_weights(model: torch.nn.Module) -> None:
    """Re-pack weights that vLLM's reload leaves behind on CPU, where the engine would go on without an error, and wrong.

    oneDNN keeps a packed copy of every weight. The layerwise reload renews it for layers it loads, but a tied output head is never
    loaded by itself, so it would compute with the old embedding. Experts are loaded but not packed, which their kernel expects.
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
    """Define the engine and hand it to vLLM's factory. Only inside a vLLM worker."""
    from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    @dataclass
    class InitInfo(WeightTransferInitInfo):
        path: str = ""

    @dataclass
    class UpdateInfo(WeightTransferUpdateInfo):
        entries: tuple[tuple[Any, ...], ...] = ()

    class SharedMemoryEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
        init_info_cls = InitInfo
        update_info_cls = UpdateInfo

        def init_transfer_engine(self, init_info: InitInfo) -> None:
            self.path = init_info.path

        def start_weight_update(self) -> None:
            initialize_layerwise_reload(self.model)

        def update_weights(self, update_info: Any) -> None:
            # The base class synchronises an accelerator here, which a CPU worker does not have.
            info = update_info if isinstance(update_info, UpdateInfo) else self.parse_update_info(update_info)
            self.receive_weights(info)

        def receive_weights(self, update_info: UpdateInfo) -> None:
            entries = [Entry(*fields) for fields in update_info.entries]
            self.model.load_weights((name, tensor.to(self.device)) for name, tensor in read(self.path, entries))

        def finish_weight_update(self) -> None:
            finalize_layerwise_reload(self.model, self.model_config)
            if self.device.type == "cpu":
                refresh_packed_weights(self.model)

        def shutdown(self) -> None: ...

    WeightTransferEngineFactory.register_engine(BACKEND, SharedMemoryEngine)


class WorkerExtension:
    """Named in `worker_extension_cls`: vLLM imports this module in each worker before the model is loaded."""


if os.environ.get("IGPO_ENGINE_PROCESS") == "1":
    _register()

"""Where the host waits for the device: counted by torch on CUDA, and on CPU by the operations that would wait there.

What copies to the host without an operation of its own (`tolist`, `cpu`) is not seen on CPU; test_device.py finds it on the meta device.
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

OPERATIONS = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount", "equal"}
"""Their results, or the sizes of them, depend on what a tensor holds."""

TORCH = str(Path(torch.__file__).parent)


def waits_in(operation: Any, args: tuple[Any, ...]) -> bool:
    name = operation.overloadpacket.__name__
    if name in OPERATIONS:
        return True
    masks = [index for index in args[1] if index is not None and index.dtype == torch.bool] if name in ("index", "index_put_") else []
    # One number assigned under a mask is filled in; anything else has to be counted first.
    return bool(masks) and not (name == "index_put_" and args[2].numel() == 1 and len(masks) == 1)


class Operations(TorchDispatchMode):
    """Calls `seen` with every operation and its arguments."""

    def __init__(self, seen: Any) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen(operation, args, kwargs or {})
        return operation(*args, **(kwargs or {}))


def place() -> str:
    """`file.function` that asked for the operation which is being seen: its nearest caller outside torch."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code is not Operations.__torch_dispatch__.__code__:
        frame = frame.f_back
    while frame.f_back is not None and frame.f_code.co_filename.startswith((TORCH, __file__)):
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}"


@contextmanager
def host_waits(device: torch.device) -> Iterator[Counter[str]]:
    """Counts by place: `file.function` on CPU, `file:line` on CUDA. Complete once the block is left."""
    found: Counter[str] = Counter()
    if device.type == "cpu":
        with Operations(lambda operation, args, kwargs: found.update([place()] if waits_in(operation, args) else [])):
            yield found
        return
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)]
    found.update(places)

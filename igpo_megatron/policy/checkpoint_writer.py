"""Write an asynchronous save that Megatron planned, in a thread of this process.

Megatron's own callers fork a process that must not see the state change: on a GPU the state is copied to the host first, on CPU the fork
itself is the copy. A rank that also runs Ray's threads should not fork while it trains, so here the state is copied, then written.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import torch
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync


def write_in_thread(request: AsyncRequest, afterwards: Callable[[], None]) -> threading.Thread | None:
    """Copy this rank's part of a save to host memory, then write it in a thread; None where it has no part.

    The thread calls `afterwards` at its end. Its errors reach every rank when the request is finalized.
    """
    if request.async_fn is None:
        return None
    assert request.preload_fn is not None
    transforms, _ = request.async_fn.args
    _, _, results = request.async_fn_args
    buckets = [
        (path, key, (pieces, [(item, _own(tensor)) for item, tensor in tensors])) for path, key, (pieces, tensors) in request.preload_fn()
    ]
    writer = threading.Thread(target=_write, args=(transforms, buckets, results, afterwards), name="checkpoint writer")
    writer.start()
    return writer


def _own(tensor: torch.Tensor) -> torch.Tensor:
    """A copy that training does not change. Megatron itself copies only tensors on a GPU, and those copies are pinned."""
    return tensor if tensor.is_pinned() else tensor.clone()


def _write(transforms: list[Any], buckets: list[Any], results: Any, afterwards: Callable[[], None]) -> None:
    written: dict[int, list[Any]] = {}
    for number, bucket in enumerate(buckets):
        answers: queue.Queue[tuple[int, Any]] = queue.Queue()
        tokens: queue.Queue[int] = queue.Queue()
        tokens.put(number)  # the writer, made for several processes, takes it back
        FileSystemWriterAsync.write_preloaded_data(transforms, number, bucket, answers, tokens, use_fsync=True)
        _, answer = answers.get()
        if isinstance(answer, Exception):
            results.put(answer)
            return
        written[number] = answer
    try:
        afterwards()
    except OSError as error:
        results.put(error)
        return
    results.put(written)

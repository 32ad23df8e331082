"""Run Megatron-Core without CUDA. Only this file knows how, and only Megatron's own modules are changed.

Megatron names device "cuda" in many places. Every `megatron.core` module gets a stand-in for its global name `torch` that
answers for the CPU; torch itself is not touched, because a global patch is invisible to torch's device contexts and silently
corrupts the weights that transformers loads in the same process. It also works on a host that has GPUs: `run.device`
decides, not the hardware.

    install()            # before or after megatron.core is imported; once per process, not undone
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from importlib.abc import MetaPathFinder
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

_CPU = torch.device("cpu")
_PREFIX = "megatron.core"
_FACTORIES = ("tensor", "zeros", "empty", "ones", "full", "arange", "randn", "rand", "randint", "as_tensor")
_FACTORIES_LIKE = ("zeros_like", "empty_like", "ones_like", "full_like")


class _Done:
    """A CUDA stream or event on which everything happens at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def record(self, *args: Any) -> None: ...
    def wait(self, *args: Any) -> None: ...
    def wait_stream(self, *args: Any) -> None: ...
    def wait_event(self, *args: Any) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, *args: Any) -> _Done:
        return _Done()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Done) -> float:
        return 0.0


class _Cuda(ModuleType):
    """`torch.cuda` as Megatron sees it on CPU."""

    Stream = Event = _Done

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        return _CPU

    def current_stream(self, *args: Any) -> _Done:
        return _Done()

    default_stream = current_stream

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        yield

    def synchronize(self, *args: Any) -> None: ...
    def empty_cache(self) -> None: ...
    def set_device(self, device: Any) -> None: ...

    def get_rng_state(self, *args: Any) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, *args: Any) -> None:
        torch.set_rng_state(state)

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def is_available(self) -> bool:
        return False

    is_initialized = is_available
    is_current_stream_capturing = is_available

    def memory_allocated(self, *args: Any) -> int:
        return 0

    max_memory_allocated = memory_allocated

    def get_device_properties(self, *args: Any) -> SimpleNamespace:
        return SimpleNamespace(multi_processor_count=1, major=0, minor=0, total_memory=0)


class _Torch(ModuleType):
    """`torch` as Megatron sees it on CPU: everything is torch's own except CUDA and the `device=` of factories."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _Cuda("torch.cuda")
        for name in (*_FACTORIES, *_FACTORIES_LIKE):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return wrapper


def _method_for_megatron(owner: type, name: str, replacement: Callable[..., Any]) -> None:
    """Replace a method for calls that come from Megatron's code only."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith(_PREFIX):
            return replacement(original, self, *args, **kwargs)
        return original(self, *args, **kwargs)

    setattr(owner, name, method)


def _cuda_type_name(original: Callable[..., Any], tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Megatron's DDP and optimizer sort tensors by names such as torch.cuda.FloatTensor."""
    result = original(tensor, *args, **kwargs)
    return result.replace("torch.", "torch.cuda.") if isinstance(result, str) else result


class _Finder(MetaPathFinder):
    """Hands every megatron.core module the stand-in right after it is executed."""

    def __init__(self, stand_in: _Torch) -> None:
        self.stand_in = stand_in

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(_PREFIX):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _give(module, self.stand_in)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _give(module: ModuleType, stand_in: _Torch) -> None:
    if getattr(module, "torch", None) is torch:
        module.torch = stand_in  # type: ignore[attr-defined]


def is_installed() -> bool:
    """Whether Megatron runs on CPU in this process, which cannot be undone."""
    return any(isinstance(finder, _Finder) for finder in sys.meta_path)


def install() -> None:
    """Make megatron.core run on CPU in this process. Calling it again does nothing."""
    if is_installed():
        return
    stand_in = _Torch()
    sys.meta_path.insert(0, _Finder(stand_in))
    for name, module in list(sys.modules.items()):
        if name.startswith(_PREFIX) and module is not None:
            _give(module, stand_in)
    for owner in (torch.Tensor, torch.nn.Module):
        _method_for_megatron(owner, "cuda", lambda original, self, *args, **kwargs: self)
    _method_for_megatron(torch.Tensor, "pin_memory", lambda original, self, *args, **kwargs: self)
    _method_for_megatron(torch.Tensor, "type", _cuda_type_name)

    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    # Megatron keeps tensor-parallel RNG states by these two; on CPU there is one generator.
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

    from megatron.core.distributed import param_and_grad_buffer as buffers

    for name in ("dist_reduce_scatter_func", "dist_all_gather_func"):
        setattr(buffers, name, _unless_alone(getattr(buffers, name)))

    # The dispatcher of experts needs its split sizes as numpy arrays, which Megatron makes only from tensors on a GPU.
    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = _on_host


def _unless_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A collective that does nothing in a group of one where output and input are the same memory, as Megatron's shards are.

    NCCL sees that itself. Gloo copies twice: 0.5 s per step for 135 M parameters.
    """

    @functools.wraps(collective)
    def wrapper(output: torch.Tensor, given: torch.Tensor, *args: Any, group: Any = None, **kwargs: Any) -> Any:
        if group is not None and group.size() == 1 and output.data_ptr() == given.data_ptr() and output.numel() == given.numel():
            return None
        return collective(output, given, *args, group=group, **kwargs)

    return wrapper


def _on_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

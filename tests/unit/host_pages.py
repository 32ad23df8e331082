"""In place of CUDA's runtime: what is page-locked, and what no longer."""

from __future__ import annotations


class Driver:
    """`torch.cuda.cudart()`, as far as host memory goes."""

    def __init__(self, error: int = 0) -> None:
        self.calls: list[tuple[str, int]] = []
        """("lock" or "unlock", bytes)"""

        self.held: dict[int, int] = {}
        """Address -> bytes"""

        self._error = error

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self.calls.append(("lock", size))
        self.held[address] = size
        return self._error

    def cudaHostUnregister(self, address: int) -> int:
        self.calls.append(("unlock", self.held.pop(address)))
        return 0

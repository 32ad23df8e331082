"""Page-locked copies on the host: whole pages of their own, locked as long as a tensor looks at them."""

from __future__ import annotations

import mmap

import pytest
import torch
from host_pages import Driver

from igpo_megatron.policy.host_memory import ALIGNMENT, kept_on_host, page_locked


def test_copies_lie_side_by_side_and_are_unlocked_with_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    tensors = [torch.arange(3).bfloat16(), torch.full((5, 60), -1.5), torch.tensor(7)]
    copies = kept_on_host(tensors, locked=True)
    size = ALIGNMENT + 3 * ALIGNMENT + ALIGNMENT  # 6, 1200 and 8 bytes
    assert driver.calls == [("lock", size)]
    (address,) = driver.held
    assert address % mmap.PAGESIZE == 0
    assert [copy.data_ptr() - address for copy in copies] == [0, ALIGNMENT, 4 * ALIGNMENT]
    assert all(torch.equal(copy, tensor) and copy.dtype == tensor.dtype for copy, tensor in zip(copies, tensors, strict=True))
    last = copies.pop()
    del copies
    assert len(driver.calls) == 1 and int(last) == 7
    del last
    assert driver.calls == [("lock", size), ("unlock", size)]


def test_memory_that_the_system_does_not_lock_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(error=2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    with pytest.raises(RuntimeError, match=r"0\.1 GiB of host memory could not be page-locked \(cudaError 2\)"):
        page_locked(2**27)
    assert [call for call, _ in driver.calls] == ["lock"]  # what is not locked is not unlocked


def test_without_a_gpu_nothing_is_locked() -> None:
    tensor = torch.arange(5)
    (copy,) = kept_on_host([tensor], locked=False)
    assert torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()

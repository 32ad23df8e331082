"""A seccomp filter that refuses system calls which computations never need, but attacks on the kernel or other processes do.

libseccomp (the C library that systemd and container engines use) writes the filter for the current processor. It is called through
ctypes because its Python bindings on the package index have been unmaintained since 2021. Imports the standard library only.
"""

from __future__ import annotations

import ctypes
import errno

DENIED = (
    # other processes
    *("ptrace", "process_vm_readv", "process_vm_writev", "process_madvise", "pidfd_getfd", "kcmp"),
    # interfaces of the kernel with many past vulnerabilities
    *("io_uring_setup", "io_uring_enter", "io_uring_register", "bpf", "userfaultfd", "perf_event_open"),
    # the user's kernel keys, which no namespace hides
    *("add_key", "request_key", "keyctl"),
    # what this sandbox is made of
    *("mount", "umount2", "pivot_root", "chroot", "move_mount", "open_tree", "fsopen", "fsconfig", "fsmount", "fspick"),
    *("mount_setattr", "unshare", "setns"),
)
"""They fail with EPERM, as if not permitted. Names unknown to the library or the processor are skipped."""

_LIBRARY = "libseccomp.so.2"
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_UNKNOWN = -1


def deny() -> None:
    """Filter this process and all its children, permanently. Raises OSError with the reason if that is not possible."""
    library = ctypes.CDLL(_LIBRARY)
    library.seccomp_init.restype = ctypes.c_void_p
    context = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(_ALLOW)))
    if not context:
        raise OSError("seccomp_init failed")
    for name in DENIED:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number != _UNKNOWN:
            _require(library.seccomp_rule_add(context, ctypes.c_uint32(_ERRNO | errno.EPERM), number, ctypes.c_uint(0)), "seccomp_rule_add")
    _require(library.seccomp_load(context), "seccomp_load")
    library.seccomp_release(context)


def _require(code: int, function: str) -> None:
    if code:
        raise OSError(-code, f"{function} failed: {errno.errorcode.get(-code, code)}")

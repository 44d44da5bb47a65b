"""Refuses system calls like a sandbox: a permanent seccomp(2) filter on the calling thread and its
children."""

from __future__ import annotations

import ctypes
import platform
import struct
from collections.abc import Iterable

__all__ = ["F_SETLEASE", "NUMBERS", "O_DIRECT", "refuse"]

# Of unistd_64.h and asm-generic/unistd.h; arm64 has only those that name a folder.
_X86 = {
    "cachestat": 451,
    "chmod": 90,
    "chown": 92,
    "copy_file_range": 326,
    "fadvise64": 221,
    "fallocate": 285,
    "fchmod": 91,
    "fchmodat": 268,
    "fchown": 93,
    "fcntl": 72,
    "fdatasync": 75,
    "fsync": 74,
    "getrlimit": 97,
    "madvise": 28,
    "memfd_create": 319,
    "mlock": 149,
    "openat": 257,
    "prlimit64": 302,
    "readlink": 89,
    "readlinkat": 267,
    "rename": 82,
    "renameat": 264,
    "renameat2": 316,
    "sched_getaffinity": 204,
    "sendfile": 40,
    "statx": 332,
}
_ARM = {
    "cachestat": 451,
    "copy_file_range": 285,
    "fadvise64": 223,
    "fallocate": 47,
    "fchmod": 52,
    "fchmodat": 53,
    "fchown": 55,
    "fcntl": 25,
    "fdatasync": 83,
    "fsync": 82,
    "getrlimit": 163,
    "madvise": 233,
    "memfd_create": 279,
    "mlock": 228,
    "openat": 56,
    "prlimit64": 261,
    "readlinkat": 78,
    "renameat": 38,
    "renameat2": 276,
    "sched_getaffinity": 123,
    "sendfile": 71,
    "statx": 291,
}
NUMBERS: dict[str, int] = {"x86_64": _X86, "aarch64": _ARM}.get(platform.machine(), {})

# Commands and flags that are refused separately.
F_SETLEASE = 1024
O_DIRECT = 0o40000 if platform.machine() == "x86_64" else 0o200000

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 38, 22, 2
_LOAD, _EQUAL, _ANY_OF, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_SECOND_ARGUMENT, _THIRD_ARGUMENT = 24, 32


class _Program(ctypes.Structure):
    _fields_ = (("count", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def refuse(calls: Iterable[str], error: int, *, leases: bool = False, direct: bool = False) -> None:
    """Makes calls fail.

    Args:
        calls: names, of ``NUMBERS``; those that this machine does not know are left out.
        error: their errno.
        leases: fcntl(2) with F_SETLEASE, too.
        direct: openat(2) with O_DIRECT, too.

    Raises:
        OSError: the filter is refused itself.
    """
    steps = [(_LOAD, 0, 0, 0)]
    answer = (_RETURN, 0, 0, _ERRNO | error)
    for name in calls:
        if name in NUMBERS:
            steps += [(_EQUAL, 0, 1, NUMBERS[name]), answer]
    if leases:
        steps += [(_EQUAL, 0, 3, NUMBERS["fcntl"]), (_LOAD, 0, 0, _SECOND_ARGUMENT)]
        steps += [(_EQUAL, 0, 1, F_SETLEASE), answer, (_LOAD, 0, 0, 0)]
    if direct:
        steps += [(_EQUAL, 0, 3, NUMBERS["openat"]), (_LOAD, 0, 0, _THIRD_ARGUMENT)]
        steps += [(_ANY_OF, 0, 1, O_DIRECT), answer]
    steps.append((_RETURN, 0, 0, _ALLOW))
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(steps), code)
    pointer = ctypes.cast(ctypes.byref(program), ctypes.c_void_p)
    for arguments in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0),
        (_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, pointer),
    ):
        wide = [a if isinstance(a, ctypes.c_void_p) else ctypes.c_ulong(a) for a in arguments]
        if libc.prctl(*wide, ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
            raise OSError(ctypes.get_errno(), "prctl")

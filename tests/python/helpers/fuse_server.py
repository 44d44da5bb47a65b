"""A FUSE file system with one file: the kernel's protocol, read-only.

The protocol is that of <linux/fuse.h>, version 7.19, the oldest that current kernels support. For
tests that need a file system with a given behaviour. A separate program, because a process that
waits for itself to serve a page waits for ever.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

NAME = "model.safetensors"
MAX_WRITE = 128 << 10

LOOKUP, FORGET, GETATTR, OPEN, READ = 1, 2, 3, 14, 15
STATFS, RELEASE, FLUSH, INIT, OPENDIR, RELEASEDIR = 17, 18, 25, 26, 27, 29
INTERRUPT, BATCH_FORGET = 36, 42
DIRECT_IO = 1  # FOPEN_DIRECT_IO: no page cache
MS_RDONLY, MNT_DETACH = 1, 2

# The answer to a read: bytes, which may be fewer than requested, or an errno.
Reader = Callable[[int, int], "bytes | int"]


def _attributes(inode: int, size: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if inode == 1 else stat.S_IFREG | 0o644
    times = (10**9,) * 3 + (0,) * 3
    return struct.pack(
        "<6Q10I",
        inode,
        size,
        (size + 511) // 512,
        *times[:3],
        *times[3:],
        mode,
        1,
        0,
        0,
        0,
        4096,
        0,
    )


class _Server:
    def __init__(self, device: int, size: int, read: Reader, direct: bool) -> None:
        self.device, self.size, self.read, self.direct = device, size, read, direct

    def serve(self) -> None:
        while True:
            try:
                request = os.read(self.device, MAX_WRITE + 4096)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return  # ENODEV: unmounted
            _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
            # Reads one at a time would hide that there are several readers.
            if opcode == READ:
                threading.Thread(target=self.answer, args=(opcode, unique, node, request)).start()
            else:
                self.answer(opcode, unique, node, request)

    def answer(self, opcode: int, unique: int, node: int, request: bytes) -> None:
        if opcode in (FORGET, BATCH_FORGET, INTERRUPT):
            return
        body = self.reply(opcode, node, request[40:])
        code = 0
        if isinstance(body, int):
            code, body = -body, b""
        with contextlib.suppress(OSError):  # the request was interrupted, or the mount is gone
            os.write(self.device, struct.pack("<IiQ", 16 + len(body), code, unique) + body)

    def reply(self, opcode: int, node: int, body: bytes) -> bytes | int:
        valid = struct.pack("<QII", 0, 0, 0)  # attributes are asked for every time
        if opcode == INIT:
            return struct.pack("<IIIIHHI", 7, 19, 1 << 20, 0, 16, 12, MAX_WRITE)
        if opcode == LOOKUP:
            if body.rstrip(b"\0").decode() != NAME:
                return errno.ENOENT
            return struct.pack("<QQQQII", 2, 0, 0, 0, 0, 0) + _attributes(2, self.size)
        if opcode == GETATTR:
            return valid + _attributes(node, self.size if node == 2 else 0)
        if opcode in (OPEN, OPENDIR):
            return struct.pack("<QII", 0, DIRECT_IO if self.direct and opcode == OPEN else 0, 0)
        if opcode == READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return self.read(offset, size)
        if opcode == STATFS:
            return struct.pack("<5QIIII24x", 0, 0, 0, 0, 0, 4096, 255, 4096, 0)
        if opcode in (RELEASE, RELEASEDIR, FLUSH):
            return b""
        return errno.ENOSYS


def serve(folder: Path, content: Path, direct: bool, seconds: float, bad_from: int) -> None:
    """Until the standard input ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other"
    where = os.fsencode(folder)
    if libc.mount(b"weightlift", where, b"fuse.weightlift", MS_RDONLY, options.encode()) != 0:
        sys.exit(f"cannot mount: {os.strerror(ctypes.get_errno())}")
    file = os.open(content, os.O_RDONLY)

    def read(offset: int, size: int) -> bytes | int:
        time.sleep(seconds)
        if offset + size > bad_from >= 0:
            return errno.EIO
        return os.pread(file, size, offset)

    server = _Server(device, content.stat().st_size, read, direct)
    threading.Thread(target=server.serve, daemon=True).start()
    print("mounted", flush=True)
    sys.stdin.read()
    libc.umount2(where, MNT_DETACH)
    os._exit(0)  # whoever still waits for an answer gets an error


@contextlib.contextmanager
def mounted(
    folder: Path, content: Path, *, direct: bool = False, seconds: float = 0, bad_from: int = -1
) -> Iterator[Path]:
    """The file ``content`` under another name in ``folder``.

    Args:
        direct: past the page cache, as network file systems may be (FOPEN_DIRECT_IO).
        seconds: what each read takes.
        bad_from: reads that reach behind this byte fail with EIO; -1: none.

    Raises:
        PermissionError: there is no FUSE here, or it may not be mounted.
    """
    command = [sys.executable, __file__, folder, content, str(int(direct)), str(seconds)]
    command.append(str(bad_from))
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        assert server.stderr is not None
        if server.stdout.readline() != "mounted\n":
            raise PermissionError(server.stderr.read().strip().splitlines()[-1])
        try:
            yield folder / NAME
        finally:
            server.stdin.close()
            server.wait(20)


if __name__ == "__main__":
    serve(
        Path(sys.argv[1]),
        Path(sys.argv[2]),
        sys.argv[3] == "1",
        float(sys.argv[4]),
        int(sys.argv[5]),
    )

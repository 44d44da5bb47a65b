"""Recognizes the format of a file by its first bytes."""

from __future__ import annotations

import os
from typing import NamedTuple

__all__ = ["FirstBytes"]

# White space that may begin a safetensors header.
_BLANKS = b" \t\r\n"
_LARGEST_HEADER = 100_000_000
# Enough to distinguish a padded header from a pickle.
_BYTES = 1024


class FirstBytes(NamedTuple):
    """Attributes:
    head: the first bytes, up to 1024.
    size: the size of the file, in bytes.
    """

    head: bytes
    size: int

    @classmethod
    def of(cls, path: str) -> FirstBytes:
        """Raises an ``OSError`` for a file that cannot be read."""
        # os.open takes four system calls, open() nine.
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return cls(os.pread(file, _BYTES, 0), os.fstat(file).st_size)
        finally:
            os.close(file)

    @property
    def is_safetensors(self) -> bool:
        head = self.head
        length = int.from_bytes(head[:8], "little")
        if len(head) < 9 or not 2 <= length <= min(_LARGEST_HEADER, self.size - 8):
            return False
        return head[8 : 8 + length].lstrip(_BLANKS)[:1] in (b"{", b"")

    @property
    def is_torch(self) -> bool:
        """Whether the file is a zip archive, or a pickle of any protocol."""
        head = self.head
        pickled = head[:1] == b"\x80" or head[:2] in (b"(d", b"(l", b"(c", b"cc", b"cr", b"ct")
        return head[:4] == b"PK\x03\x04" or pickled

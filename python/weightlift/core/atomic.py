"""Files written all of it or nothing."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["atomic_file", "flush_file", "flush_folder", "temporary_beside", "umask"]


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the same folder; what is written there becomes ``path``.

    On success the file is flushed to the disk, given the mode that the umask allows, and renamed;
    the folder is flushed too. On an error it is removed. Killed anywhere, the old file or the new
    one is at ``path``.

    Raises:
        IsADirectoryError: ``path`` is a directory.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory: name a file in it")
    temporary = temporary_beside(path)
    try:
        yield temporary
        flush_file(temporary)
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def temporary_beside(path: Path) -> Path:
    # Not made of the file's name, which may be as long as a name can be.
    return path.with_name(f".weightlift-{os.urandom(8).hex()}.tmp")


def flush_file(path: Path, mode: int | None = None) -> None:
    """Flushes a new file to the disk and gives it ``mode``, by default what the umask allows."""
    path.chmod(0o600)  # the umask that its writer obeyed may forbid to open it
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fchmod(descriptor, 0o666 & ~umask() if mode is None else mode)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_folder(path: Path) -> None:
    """Flushes the names in a folder to the disk."""
    with contextlib.suppress(PermissionError):  # one may write to a folder that one may not read
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def umask() -> int:
    # os.umask() can only tell it by changing it, for all threads of the process.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o077  # Linux before 4.7

"""Files written all of it or nothing.

What a file system may lack is done where it can be done: chmod(2) is refused by mounts of other
systems' disks, fsync(2) of a folder by CIFS and some FUSE servers, rename(2) by object stores.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import shutil
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = [
    "atomic_file",
    "errno_of",
    "flush_descriptor",
    "flush_file",
    "flush_folder",
    "keep_mode",
    "naming_target",
    "put_folder_in_place",
    "put_in_place",
    "save_error",
    "temporary_beside",
]

_log = logging.getLogger("weightlift")

# Of fsync(2): the bytes are lost, or nobody knows. Everything else says that it cannot be called.
_LOST = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ESTALE})
# Of writers that go through mkstemp(3), as safetensors does.
_PRIVATE = 0o600
# Of rename(2), where the file system has none.
_NO_RENAME = frozenset(
    {errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL, errno.EXDEV, errno.EBUSY}
)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the same folder; what is written there becomes ``path``.

    On success the file is flushed to the disk, given the mode of the file that it replaces (a new
    one has what the umask allows), and renamed; the folder is flushed too. On an error it is
    removed. Killed anywhere, the old file or the new one is at ``path``.

    Raises:
        IsADirectoryError: ``path`` is a directory.
        OSError: of ``path``, whatever name the failed call had.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "is a directory: name a file in it", str(path))
    temporary = temporary_beside(path)
    with naming_target(path, temporary):
        try:
            yield temporary
            flush_file(temporary, replaces=path)
            put_in_place(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    flush_folder(path.parent)


def temporary_beside(path: Path) -> Path:
    # Not made of the file's name, which may be as long as a name can be.
    return path.with_name(f".weightlift-{os.urandom(8).hex()}.tmp")


def flush_file(path: Path, replaces: Path | None = None) -> None:
    """Flushes a new file to the disk; it gets the mode of the file that it ``replaces``."""
    made = stat.S_IMODE(path.stat().st_mode)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        # The umask that its writer obeyed forbids to read it.
        with contextlib.suppress(OSError):
            path.chmod(0o600)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except PermissionError:
            return
        with contextlib.suppress(OSError):
            os.fchmod(descriptor, made)
    try:
        if made == _PRIVATE:
            with contextlib.suppress(OSError):
                os.fchmod(descriptor, _new_mode(path))
        if replaces is not None:
            keep_mode(descriptor, replaces)
        flush_descriptor(descriptor)
    finally:
        os.close(descriptor)


def _new_mode(path: Path) -> int:
    """What the umask allows for a new file beside another. os.umask() can only tell it by changing
    it, for all threads of the process; where there is no /proc, a file that is made tells."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("Umask:"):
                return 0o666 & ~int(line.split()[1], 8)
    probe = temporary_beside(path)
    descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        with contextlib.suppress(OSError):
            probe.unlink()


def keep_mode(descriptor: int, replaces: Path) -> None:
    """Gives an open file the owner and the mode of the file whose place it takes, where it may."""
    try:
        old = replaces.stat()
    except OSError:
        return
    new = os.fstat(descriptor)
    with contextlib.suppress(OSError):
        if (new.st_uid, new.st_gid) != (old.st_uid, old.st_gid):
            os.fchown(descriptor, old.st_uid, old.st_gid)
    with contextlib.suppress(OSError):
        if stat.S_IMODE(new.st_mode) != stat.S_IMODE(old.st_mode):
            os.fchmod(descriptor, stat.S_IMODE(old.st_mode))


def flush_descriptor(descriptor: int) -> None:
    """fsync(2). That a file system cannot do it is no error; that it could not write is one."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _LOST:
            raise


def put_in_place(temporary: Path, path: Path) -> None:
    """Renames a file. Where a file system cannot do that, and nothing is in the place, copies it:
    object stores show an object when it is whole."""
    try:
        temporary.replace(path)
    except OSError as error:
        if error.errno not in _NO_RENAME or os.path.lexists(path):
            raise
        try:
            shutil.copyfile(temporary, path)
            flush_file(path)
        except BaseException:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)
            raise
        with contextlib.suppress(OSError):
            temporary.unlink()


def put_folder_in_place(temporary: Path, path: Path) -> None:
    """Renames a folder of files and folders to a path where there is none, or an empty one. Where a
    file system cannot rename, its files are copied there, one after the other."""
    try:
        temporary.rename(path)  # over an empty folder too: rename(2)
    except OSError as error:
        if error.errno not in _NO_RENAME or (os.path.lexists(path) and any(path.iterdir())):
            raise
        try:
            for file in sorted(temporary.rglob("*")):
                place = path / file.relative_to(temporary)
                if file.is_dir():
                    continue
                place.parent.mkdir(parents=True, exist_ok=True)
                put_in_place(file, place)
        except BaseException:
            shutil.rmtree(path, ignore_errors=True)
            raise
        shutil.rmtree(temporary, ignore_errors=True)


def flush_folder(path: Path) -> None:
    """Flushes the names in a folder to the disk, where that can be done.

    The files are in their places by then, so nothing that goes wrong here is a failed save.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return  # one may write to a folder that one may not read
    try:
        flush_descriptor(descriptor)
    except OSError as error:
        _log.warning(
            "%s: the names in this folder may not have reached the disk (%s): after a power cut, "
            "what was saved may be gone",
            path,
            error.strerror,
        )
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming_target(path: Path, temporary: Path) -> Iterator[None]:
    """Makes errors of the system about a temporary file, or about none, errors about ``path``."""
    outside = sys.exc_info()[1]
    try:
        yield
    except OSError as error:
        own = (None, str(temporary), str(path))
        if error.errno is None or not any(error.filename in (o, o and Path(o)) for o in own):
            raise
        raise save_error(error.errno, path) from error
    except Exception as error:
        # safetensors, which is Rust, has the number in its text alone.
        number = errno_of(error, outside) if "os error" in str(error) else None
        if number is None:
            raise
        raise save_error(number, path) from error


def errno_of(error: BaseException | None, outside: BaseException | None = None) -> int | None:
    """The number of the system's error that an exception is, tells of, or came from."""
    while error is not None and error is not outside:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        # safetensors, which is Rust, has it in its text alone.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found:
            return int(found[1])
        error = error.__context__
    return None


def save_error(number: int, path: Path) -> OSError:
    """The error of a save to ``path``, with what helps."""
    folder = path.parent
    remedies = {
        errno.ENOENT: f"no folder {folder}: make it first",
        errno.ENOTDIR: f"{folder} is not a folder: save elsewhere",
        errno.EACCES: f"this user may not make files in {folder}: save elsewhere, or change the "
        "rights of the folder (a file is replaced as a whole, so its own do not suffice)",
        errno.EPERM: f"this user may not make files in {folder}: save elsewhere",
        errno.EROFS: "the file system may only be read: save elsewhere",
        errno.ENOSPC: "make room, or save elsewhere",
        errno.EDQUOT: "make room, or save elsewhere",
        errno.EBUSY: "it is a mount point, which cannot be replaced: save elsewhere",
    }
    remedy = remedies.get(number, "")
    text = os.strerror(number) + (f": {remedy}" if remedy else "")
    return OSError(number, f"{text}; nothing was saved, what was there is unchanged", str(path))

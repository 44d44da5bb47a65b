"""Atomic writes of files and folders.

Some calls may be refused, and a save continues without them: mounts of other systems' disks refuse
chmod(2), CIFS and some FUSE servers refuse fsync(2) of a folder, object stores refuse rename(2).
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
    "make_folder",
    "naming_target",
    "put_folder_in_place",
    "put_in_place",
    "save_error",
    "temporary_beside",
]

_log = logging.getLogger("weightlift")

# Errors of fsync(2) after which the bytes may be lost. All others mean that it is not supported.
_LOST = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ESTALE})
# The mode of files made by mkstemp(3), which safetensors uses.
_PRIVATE = 0o600
# Errors of rename(2) on file systems without rename.
_NO_RENAME = frozenset(
    {errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EINVAL, errno.EXDEV, errno.EBUSY}
)


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path in the same folder; the file written there becomes ``path``.

    On success the file is flushed to the disk, gets the mode of the file that it replaces (a new
    file gets what the umask allows), and is renamed; the folder is flushed too. On an error the
    temporary file is removed. After a kill at any point ``path`` has the old file or the new one.

    Raises:
        IsADirectoryError: ``path`` is a directory.
        OSError: with ``path`` as its file name, also if the call on the temporary file failed.
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
    # Not derived from the file's name, which may already have the largest length.
    return path.with_name(f".weightlift-{os.urandom(8).hex()}.tmp")


def flush_file(path: Path, replaces: Path | None = None) -> None:
    """Flushes a new file to the disk; it gets the mode of the file that it ``replaces``."""
    made = stat.S_IMODE(path.stat().st_mode)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except PermissionError:
        # The umask may have made the file unreadable for its owner.
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
    """The mode of a new file under the umask. os.umask() would change the umask for all threads to
    read it; without /proc, a probe file shows the mode."""
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
    """Gives an open file the owner and mode of the file that it replaces, if permitted."""
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
    """fsync(2). A file system without fsync is no error; a failed write is an error."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno in _LOST:
            raise


def put_in_place(temporary: Path, path: Path) -> None:
    """Renames a file. Without rename(2), copies it if ``path`` does not exist: object stores show
    an object only when it is complete."""
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


def make_folder(path: Path) -> None:
    """Makes a folder to save to, and those that it is in.

    Raises:
        OSError: with ``path``; the text says what to do.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno is None:
            raise
        raise save_error(error.errno, path) from error


def put_folder_in_place(temporary: Path, path: Path) -> None:
    """Renames a folder to a path that does not exist or is an empty folder. Without rename(2),
    copies its files one after the other."""
    try:
        temporary.rename(path)  # rename(2) also replaces an empty folder
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
    """Flushes the names in a folder to the disk, if the file system can.

    The files are already in place, so an error here does not fail the save.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return  # a folder may be writable but not readable
    try:
        flush_descriptor(descriptor)
    except OSError as error:
        _log.warning(
            "%s: the names in this folder may not have reached the disk (%s): a power failure may "
            "lose the saved files",
            path,
            error.strerror,
        )
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def naming_target(path: Path, temporary: Path) -> Iterator[None]:
    """Turns system errors that name the temporary file, or no file, into errors about ``path``."""
    outside = sys.exc_info()[1]
    try:
        yield
    except OSError as error:
        own = (None, str(temporary), str(path))
        if error.errno is None or not any(error.filename in (o, o and Path(o)) for o in own):
            raise
        raise save_error(error.errno, path) from error
    except Exception as error:
        # safetensors (Rust) gives errno only in the text.
        number = errno_of(error, outside) if "os error" in str(error) else None
        if number is None:
            raise
        raise save_error(number, path) from error


def errno_of(error: BaseException | None, outside: BaseException | None = None) -> int | None:
    """The errno of an exception, of its text, or of its context."""
    while error is not None and error is not outside:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        # safetensors (Rust) gives errno only in the text.
        found = re.search(r"\(os error (\d+)\)", str(error))
        if found:
            return int(found[1])
        error = error.__context__
    return None


def save_error(number: int, path: Path) -> OSError:
    """The error of a save to ``path``; its text says what to do."""
    folder = path.parent
    no_folder = f"no folder {folder}: make it first"
    remedies = {
        errno.ENOENT: f"no file can be made in {folder}" if folder.is_dir() else no_folder,
        errno.ENOTDIR: f"{folder} is not a folder: save elsewhere",
        errno.EACCES: f"this user may not make files in {folder}: save elsewhere, or change the "
        "permissions of the folder (a save replaces the whole file, so the file's own permissions "
        "do not suffice)",
        errno.EPERM: f"this user may not make files in {folder}: save elsewhere",
        errno.EROFS: "the file system is read-only: save elsewhere",
        errno.ENOSPC: "free some space, or save elsewhere",
        errno.EDQUOT: "free some space, or save elsewhere",
        errno.EBUSY: "it is a mount point, which cannot be replaced: save elsewhere",
    }
    remedy = remedies.get(number, "")
    text = os.strerror(number) + (f": {remedy}" if remedy else "")
    return OSError(number, f"{text}; nothing was saved, the old file is unchanged", str(path))

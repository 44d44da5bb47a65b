"""The exceptions of weightlift, and how the engine's errors become them."""

from __future__ import annotations

import errno as _errno
from typing import Any

from safetensors import SafetensorError

import weightlift._native as _native

__all__ = [
    "ArgumentError",
    "CheckpointError",
    "DeviceError",
    "FileClosedError",
    "FormatError",
    "LoadCancelledError",
    "OutOfMemoryError",
    "ReadError",
    "WeightliftError",
]


class WeightliftError(Exception):
    """The base of all errors that weightlift raises on purpose."""


# The codes of ``FormatError`` that are born in Python; all others are in csrc/result.h.
PYTHON_CODES = frozenset(
    {
        "big_endian",
        "checksum_mismatch",
        "dduf_invalid",
        "file_closed",
        "hash_mismatch",
        "malformed_pickle",
        "no_such_tensor",
        "torchscript",
        "unsafe_pickle",
        "unsupported_tensor",
    }
)


class FormatError(WeightliftError, SafetensorError):
    """A checkpoint file breaks its format, or holds what was asked for in no usable form.

    Attributes:
        code: the kind of fault, such as ``"header_too_large"``, ``"git_lfs_pointer"`` or
            ``"no_such_tensor"``: one of the table in ``csrc/result.h``, or of ``PYTHON_CODES``.
        path: the file.
        offset: the byte in the file at which the fault was found, where there is one.
        tensor: the tensor that is at fault, or ``""``.
        message: what is wrong, without the place.
    """

    def __init__(
        self,
        code: str,
        message: str,
        path: str = "",
        offset: int | None = None,
        tensor: str = "",
    ) -> None:
        super().__init__(_describe(message, path, tensor, offset))
        self.message = message
        self.code = code
        self.path = path
        self.offset = offset
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with `args`, which is the finished text alone.
        return type(self), (self.code, self.message, self.path, self.offset, self.tensor)


class FileClosedError(FormatError, ValueError):
    """A file that was closed is asked for tensors; a ``ValueError``, as of Python's own files."""


class LoadCancelledError(WeightliftError):
    """A load was cancelled, so that it has no result."""


class ReadError(WeightliftError, OSError):
    """The operating system would not give the bytes: ``errno``, ``strerror`` and ``filename``.

    A missing file is also a ``FileNotFoundError``, a denied one a ``PermissionError``, a directory
    an ``IsADirectoryError``.

    Attributes:
        code: the kind of fault, such as ``"not_found"``, ``"file_shrank"`` or ``"file_changed"``.
    """

    code = "read_failed"

    def __reduce__(self) -> tuple[Any, ...]:
        # By what they are caught as: the classes below go by ReadError's name.
        place = () if self.filename is None else (self.filename,)
        return _read_error, (self.code, self.errno, self.strerror, *place)


class DeviceError(WeightliftError, RuntimeError, SafetensorError):
    """A device that is not there, or a call of its driver that failed."""


class CheckpointError(WeightliftError, ValueError):
    """A checkpoint, taken as a whole, is not what was asked for."""


class ArgumentError(WeightliftError, ValueError, SafetensorError):
    """An argument without meaning here, or one that contradicts another."""


class OutOfMemoryError(WeightliftError, MemoryError):
    """The memory of the host or of a device does not suffice."""


class _MissingError(ReadError, FileNotFoundError):
    pass


class _DeniedError(ReadError, PermissionError):
    pass


class _DirectoryError(ReadError, IsADirectoryError):
    pass


_READ_ERRORS: dict[str, tuple[type[ReadError], int]] = {
    "not_found": (_MissingError, _errno.ENOENT),
    "permission_denied": (_DeniedError, _errno.EACCES),
    "is_directory": (_DirectoryError, _errno.EISDIR),
    # Of the Hub.
    "repository_not_found": (_MissingError, _errno.ENOENT),
    "revision_not_found": (_MissingError, _errno.ENOENT),
    "not_cached": (_MissingError, _errno.ENOENT),
}
# The names that tracebacks show.
for _error, _ in _READ_ERRORS.values():
    _error.__name__ = _error.__qualname__ = "ReadError"


def read_error(code: str, message: str, path: str = "", number: int | None = None) -> ReadError:
    """The ``ReadError`` of a kind, with the ``errno`` that goes with it."""
    default = _READ_ERRORS.get(code, (ReadError, _errno.EIO))[1]
    return _read_error(code, number or default, message, *([path] if path else []))


def _read_error(code: str, *arguments: Any) -> ReadError:
    error = _READ_ERRORS.get(code, (ReadError, 0))[0](*arguments)
    error.code = code
    return error


def _describe(message: str, path: str, tensor: str, offset: int | None) -> str:
    parts = [path] if path else []
    if tensor:
        parts.append(f"tensor {tensor!r}")
    text = ": ".join([*parts, message])
    return text if offset is None else f"{text} (at byte {offset})"


def _from_native(
    kind: str,
    code: str,
    message: str,
    path: str,
    offset: int | None,
    tensor: str,
    number: int,
) -> BaseException:
    if kind == "format" or code == "unsupported_dtype":
        return FormatError(code, message, path, offset, tensor)
    if kind == "read":
        return read_error(code, _describe(message, "", tensor, offset), path, number)
    text = _describe(message, path, tensor, offset)
    if kind == "device":
        return DeviceError(text)
    if kind == "memory":
        return OutOfMemoryError(text)
    if kind == "cancelled":
        return LoadCancelledError(text)
    return ArgumentError(text)


_native.set_error_factory(_from_native)

"""The exceptions of weightlift, and their construction from the engine's errors."""

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
    """The base class of all errors that weightlift raises on purpose."""


# The codes of ``FormatError`` that Python code raises; all others are in csrc/result.h.
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
    """A checkpoint file breaks its format, or does not hold the requested tensor in a usable form.

    Attributes:
        code: the kind of fault, such as ``"header_too_large"``, ``"git_lfs_pointer"`` or
            ``"no_such_tensor"``: listed in ``csrc/result.h`` or in ``PYTHON_CODES``.
        path: the file.
        offset: the byte in the file at which the fault was found, or ``None``.
        tensor: the name of the faulty tensor, or ``""``.
        message: what is wrong, without the file and the tensor.
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
        # The default would call the class with `args`, which has only the finished text.
        return type(self), (self.code, self.message, self.path, self.offset, self.tensor)


class FileClosedError(FormatError, ValueError):
    """A closed file was used; also a ``ValueError``, as for Python's own files."""


class LoadCancelledError(WeightliftError):
    """The load was cancelled and has no result."""


class ReadError(WeightliftError, OSError):
    """The operating system did not deliver the bytes: ``errno``, ``strerror`` and ``filename``.

    The error is also a ``FileNotFoundError`` for a missing file, a ``PermissionError`` for a
    denied one, an ``IsADirectoryError`` for a directory.

    Attributes:
        code: the kind of fault, such as ``"not_found"``, ``"file_shrank"`` or ``"file_changed"``.
    """

    code = "read_failed"

    def __reduce__(self) -> tuple[Any, ...]:
        # Rebuilt from the code: the subclasses below carry ReadError's name.
        place = () if self.filename is None else (self.filename,)
        return _read_error, (self.code, self.errno, self.strerror, *place)


class DeviceError(WeightliftError, RuntimeError, SafetensorError):
    """A device does not exist, or a call of its driver failed."""


class CheckpointError(WeightliftError, ValueError):
    """A checkpoint as a whole does not fit the request."""


class ArgumentError(WeightliftError, ValueError, SafetensorError):
    """An argument has no meaning here, or contradicts another argument."""


class OutOfMemoryError(WeightliftError, MemoryError):
    """The host or a device has too little memory."""


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
    # Errors of the Hub.
    "repository_not_found": (_MissingError, _errno.ENOENT),
    "revision_not_found": (_MissingError, _errno.ENOENT),
    "not_cached": (_MissingError, _errno.ENOENT),
}
# Tracebacks show the public name.
for _error, _ in _READ_ERRORS.values():
    _error.__name__ = _error.__qualname__ = "ReadError"


def read_error(code: str, message: str, path: str = "", number: int | None = None) -> ReadError:
    """The ``ReadError`` for a code, with its ``errno``."""
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
        if not path and code == "not_found":
            message = "the path is empty"
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

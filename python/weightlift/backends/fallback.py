"""Fallbacks: loads by the library itself, which are counted and logged."""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

from weightlift.core.errors import OutOfMemoryError, WeightliftError
from weightlift.core.report import record_fallback
from weightlift.core.settings import flag_of_environment

__all__ = [
    "FallbackToLibrary",
    "fall_back",
    "is_strict",
    "levels_to_caller",
    "report_fallback",
    "report_unstreamed",
    "torch_errors",
]

_Result = TypeVar("_Result")

_log = logging.getLogger("weightlift")
# A warning skips the frames of these packages and names their caller, who can act on it.
_NOT_CALLERS = {
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "peft",
    "safetensors",
    "torch",
    "transformers",
    "weightlift",
}
# Whether this thread is in a fallback.
_falling_back: ContextVar[bool] = ContextVar("weightlift_falling_back", default=False)


class FallbackToLibrary(Exception):
    """Raised by a replacement that leaves this call to the original, before it places any tensor.

    Args:
        reason: the reason for the user, such as ``"GGUF files are read by diffusers"``.
        warn: ``False`` if the fallback is documented.
    """

    def __init__(self, reason: str, *, warn: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.warn = warn


def is_strict() -> bool:
    """Whether a fallback is an error."""
    return flag_of_environment("WEIGHTLIFT_STRICT")


def report_fallback(library: str, reason: str, *, warn: bool = True) -> None:
    """Counts a load that falls back to the library, and warns once per reason.

    Raises:
        WeightliftError: with ``WEIGHTLIFT_STRICT=1``.
    """
    text = f"weightlift: {library} falls back to its own loading: {reason}"
    if is_strict():
        raise WeightliftError(f"{text} (WEIGHTLIFT_STRICT=1 makes that an error)")
    if record_fallback(library, reason) == 1 and warn:
        warnings.warn(text, stacklevel=levels_to_caller())
    else:
        _log.info("%s", text)


def report_unstreamed(library: str, reason: str) -> None:
    """Counts a model whose offloaded weights the library brings in itself, and says so in a line of
    log: as a warning, once a reason.

    Raises:
        WeightliftError: with ``WEIGHTLIFT_STRICT=1``.
    """
    text = f"weightlift: {library} brings offloaded weights in itself: {reason}"
    if is_strict():
        raise WeightliftError(f"{text} (WEIGHTLIFT_STRICT=1 makes that an error)")
    is_new = record_fallback(library, reason) == 1
    _log.log(logging.WARNING if is_new else logging.INFO, "%s", text)


def fall_back(library: str, error: Exception, own_way: Callable[[], _Result]) -> _Result:
    """Lets the library do a load after an error of the engine, before any tensor is placed. The
    library raises its own error, or succeeds; then the fallback is counted and logged."""
    if _falling_back.get():  # the library called another hook, which fails for the same reason
        return own_way()
    token = _falling_back.set(True)
    aside = error if isinstance(error, FallbackToLibrary) else None
    try:
        result = own_way()
    except Exception as own:
        raise own from (None if aside else error)
    finally:
        _falling_back.reset(token)
    report_fallback(library, str(error), warn=aside is None or aside.warn)
    return result


def levels_to_caller() -> int:
    """The ``stacklevel`` of a warning by the calling function that points to the first frame
    outside weightlift and the libraries. (Python 3.12 and newer have ``skip_file_prefixes``.)"""
    frame = sys._getframe(1)
    level = 1
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _NOT_CALLERS:
            break
        frame = frame.f_back
        level += 1
    return level


@contextlib.contextmanager
def torch_errors() -> Iterator[None]:
    """Raises torch's own out-of-memory exception, which callers of these libraries expect."""
    try:
        yield
    except OutOfMemoryError as error:
        import torch

        if isinstance(error.__cause__, torch.OutOfMemoryError):
            raise error.__cause__ from None
        raise

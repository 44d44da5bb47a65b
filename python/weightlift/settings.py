"""What a user may set about how bytes move."""

from __future__ import annotations

import dataclasses
import os
import re
from contextvars import ContextVar, Token
from typing import Any, ClassVar

from weightlift import _native
from weightlift.errors import ArgumentError

__all__ = ["Settings"]

_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_TRUE = {"1": True, "true": True, "yes": True, "on": True}
_FALSE = {"0": False, "false": False, "no": False, "off": False}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How loads of this process read, stage and cast; ``None`` leaves the choice to weightlift.

    Each field is also an environment variable, ``WEIGHTLIFT_`` and its name in capitals, read when
    a load begins; sizes may then be written ``"64MiB"``. An instance is a context manager: inside
    ``with Settings(io_path="direct"):`` loads of this thread (or asyncio task) use it, and fields
    that it leaves at ``None`` are those outside. ``Settings.set_default`` changes the whole process.

    Attributes:
        threads: threads that read and cast; the processors this process may use (affinity and
            cgroup quota).
        io_depth: reads in flight on a file that is not in the page cache; 8.
        read_bytes: bytes of one read; 512 KiB, at most a quarter of ``chunk_bytes``.
        chunk_bytes: bytes of one staging slot, and so of one copy to a device; 4 MiB.
        pinned_bytes: pinned bytes that one load uses for one device; 32 MiB.
        io_path: ``"auto"``, ``"buffered"`` (through the page cache) or ``"direct"`` (``O_DIRECT``).
        cast_place: where casts for a device run: ``"auto"`` (narrowing on the host, all else on the
            device), ``"host"`` or ``"device"``.
        populate: whether a mapped file that is not resident is read in before the load returns
            (``True``), or at the first touch.
        kernels: ``False`` does without the CUDA kernels.
        batch_copies: ``False`` does without ``cuMemcpyBatchAsync``.
    """

    threads: int | None = None
    io_depth: int | None = None
    read_bytes: int | None = None
    chunk_bytes: int | None = None
    pinned_bytes: int | None = None
    io_path: str | None = None
    cast_place: str | None = None
    populate: bool | None = None
    kernels: bool | None = None
    batch_copies: bool | None = None

    _default: ClassVar[Settings | None] = None

    def __post_init__(self) -> None:
        for name in ("threads", "io_depth", "read_bytes", "chunk_bytes", "pinned_bytes"):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise ArgumentError(f"Settings.{name} is {value!r}; it must be a positive integer")
        for name, known in (
            ("io_path", ("auto", "buffered", "direct")),
            ("cast_place", ("auto", "host", "device")),
        ):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ArgumentError(f"Settings.{name} is {value!r}; it can be one of {known}")

    @classmethod
    def current(cls) -> Settings:
        """The settings of a load that begins now: those of the innermost ``with``, then the
        process's default, then the environment."""
        chosen: dict[str, Any] = {}
        for layer in (_context.get(), cls._default):
            if layer is not None:
                chosen = {**_given(layer), **chosen}
        for field in dataclasses.fields(cls):
            text = os.environ.get("WEIGHTLIFT_" + field.name.upper())
            if text and field.name not in chosen:
                chosen[field.name] = _parse(field.name, text)
        return cls(**chosen)

    @staticmethod
    def set_default(settings: Settings | None) -> None:
        """Makes ``settings`` those of the whole process; ``None`` goes back to the environment."""
        Settings._default = settings

    def __enter__(self) -> Settings:
        outer = _context.get()
        merged = Settings(**{**(_given(outer) if outer else {}), **_given(self)})
        _tokens.append(_context.set(merged))
        return merged

    def __exit__(self, *_: object) -> None:
        _context.reset(_tokens.pop())

    def native(self, fp8: tuple[bool, bool, bool]) -> _native.Settings:
        """For the engine; ``fp8`` are the rules of ``weightlift.dtypes.fp8_rules``."""
        given = _given(self)
        given.pop("populate", None)
        return _native.Settings(fp8=fp8, **given)


_context: ContextVar[Settings | None] = ContextVar("weightlift_settings", default=None)
_tokens: list[Token[Settings | None]] = []


def _given(settings: Settings) -> dict[str, Any]:
    pairs = ((f.name, getattr(settings, f.name)) for f in dataclasses.fields(settings))
    return {name: value for name, value in pairs if value is not None}


def _parse(name: str, text: str) -> object:
    if name in ("io_path", "cast_place"):
        return text.lower()
    if name in ("populate", "kernels", "batch_copies"):
        flags = {**_TRUE, **_FALSE}
        if text.lower() not in flags:
            raise ArgumentError(f"WEIGHTLIFT_{name.upper()} is {text!r}; it can be 0 or 1")
        return flags[text.lower()]
    found = re.fullmatch(r"\s*(\d+)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS:
        raise ArgumentError(f"WEIGHTLIFT_{name.upper()} is {text!r}; write a number, or 64MiB")
    return int(found[1]) * _UNITS[found[2].lower()]

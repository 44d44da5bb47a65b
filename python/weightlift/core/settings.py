"""User settings that control how bytes move."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
import re
import sys
import warnings
from contextvars import ContextVar
from typing import Any, ClassVar, Literal, TypeAlias, get_args

import weightlift._native as _native
from weightlift.core.errors import ArgumentError
from weightlift.core.sizes import parse_size

__all__ = [
    "CastPlace",
    "HugePages",
    "IoPath",
    "Settings",
    "flag_of_environment",
    "unknown_variables",
]

IoPath: TypeAlias = Literal["auto", "buffered", "direct"]
CastPlace: TypeAlias = Literal["auto", "host", "device"]
HugePages: TypeAlias = Literal["auto", "always", "never"]

_SIZES = ("read_bytes", "hole_bytes", "chunk_bytes", "pinned_bytes", "pool_bytes")
# Variables that other modules read.
_OTHER_VARIABLES = (
    "WEIGHTLIFT_ENABLE",
    "WEIGHTLIFT_STRICT",
    "WEIGHTLIFT_REPORT",
    "WEIGHTLIFT_SGLANG",
    "WEIGHTLIFT_DEBUG",
)
_TEST_VARIABLES = (
    "WEIGHTLIFT_SEED",
    "WEIGHTLIFT_SEEDS",
    "WEIGHTLIFT_SIMULATED_DRIVER",
    "WEIGHTLIFT_REQUIRE_GPU",
)
_TRUE = {"1": True, "true": True, "yes": True, "on": True}
_FALSE = {"0": False, "false": False, "no": False, "off": False}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How loads read, stage and cast; weightlift chooses the value of a field that is ``None``.

    Each field is also an environment variable, ``WEIGHTLIFT_`` and its name in capitals, which a
    load reads when it begins; an unknown ``WEIGHTLIFT_`` variable causes a warning. Fields and
    variables accept sizes such as ``"64MiB"``. An instance is a context manager: inside
    ``with Settings(io_path="direct"):`` the loads of this thread (or asyncio task) use it; fields
    that are ``None`` keep the value from outside. ``Settings.set_default`` sets the default of the
    process.

    Attributes:
        threads: threads that read and cast; the processors this process may use (affinity and
            cgroup quota).
        io_depth: reads in flight on a file that is not in the page cache; 8. Past the page cache
            and for CUDA devices, as many as fill half of their ``pinned_bytes``: 32 for one device,
            at most 64.
        read_bytes: bytes of one read; 1 MiB, for a device at most an eighth of ``chunk_bytes``.
        hole_bytes: gaps of up to so many bytes between the parts of a file that a load takes, such
            as the rows of a slice, are read along, not jumped over; 4 KiB, at most 1 MiB.
        chunk_bytes: bytes of one staging slot, and so of one copy to a device; 4 MiB.
        pinned_bytes: pinned bytes that one load uses for one device; 32 MiB.
        pool_bytes: bytes of host memory that the process keeps when tensors die, for later loads
            whose bytes are read or cast: their pages need not be cleared again. 0, none. The kernel
            takes the memory back where it is short (madvise(2), MADV_FREE), but until then it
            counts as the process's. With ``huge_pages="never"``, none.
        streams: CUDA streams that copy to one device, by turns; 2, at most 16.
        io_path: ``"auto"``, ``"buffered"`` (read through the page cache) or ``"direct"``
            (``O_DIRECT``). Only ``"auto"`` casts straight from the page cache, without a copy.
        cast_place: where casts for a device run: ``"auto"`` (narrowing casts on the host, others on
            the device), ``"host"`` or ``"device"``.
        huge_pages: the kind of pages of new memory from 16 MiB on: ``"always"`` huge, ``"never"``
            huge, or ``"auto"``: huge while they arrive faster than small pages. They arrive slower
            in a virtual machine whose host has taken back its free memory. Page-locked memory is
            always on huge pages. It rules in the same way how mapped files that load in the
            background are read into the page cache.
        populate: ``True`` reads a mapped file that is not resident before the load returns,
            ``False`` at the first access.
        kernels: ``False`` disables the CUDA kernels.
        batch_copies: ``False`` disables ``cuMemcpyBatchAsync``.

    Raises:
        ArgumentError: a value is invalid.
    """

    threads: int | None = None
    io_depth: int | None = None
    read_bytes: int | str | None = None
    hole_bytes: int | str | None = None
    chunk_bytes: int | str | None = None
    pinned_bytes: int | str | None = None
    pool_bytes: int | str | None = None
    streams: int | None = None
    io_path: IoPath | None = None
    cast_place: CastPlace | None = None
    huge_pages: HugePages | None = None
    populate: bool | None = None
    kernels: bool | None = None
    batch_copies: bool | None = None

    _default: ClassVar[Settings | None] = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if isinstance(value, str):
                size = parse_size(value, f"Settings.{name}", fractions=False)
                object.__setattr__(self, name, size)
        for name, least, largest in (
            ("threads", 1, 2**31),
            ("io_depth", 1, 2**31),
            ("streams", 1, 16),
            ("read_bytes", 1, 2**62),
            ("hole_bytes", 1, 2**62),
            ("chunk_bytes", 1, 2**62),
            ("pinned_bytes", 1, 2**62),
            ("pool_bytes", 0, 2**62),
        ):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int)
                or isinstance(value, bool)
                or not least <= value <= largest
            ):
                raise ArgumentError(
                    f"Settings.{name} is {value!r}; it must be an integer from {least} to {largest}"
                )
        for name, of in (("io_path", IoPath), ("cast_place", CastPlace), ("huge_pages", HugePages)):
            value, allowed = getattr(self, name), get_args(of)
            if value is not None and value not in allowed:
                raise ArgumentError(f"Settings.{name} is {value!r}; it can be one of {allowed}")
        for name in ("populate", "kernels", "batch_copies"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, bool):
                raise ArgumentError(f"Settings.{name} is {value!r}; it must be True or False")

    @classmethod
    def current(cls) -> Settings:
        """The settings of a load that begins now: from the innermost ``with``, then the process's
        default, then the environment."""
        _warn_of_unknown_variables()
        chosen: dict[str, Any] = {}
        for layer in (*_entered.get()[-1:], cls._default):
            if layer is not None:
                chosen = {**_set_fields(layer), **chosen}
        for field, variable in _VARIABLES.items():
            text = os.environ.get(variable)
            if text and field not in chosen:
                chosen[field] = _of_environment(field, text)
        return cls(**chosen)

    @staticmethod
    def set_default(settings: Settings | None) -> None:
        """Sets the process's default; ``None`` restores that of the environment.

        Raises:
            TypeError: ``settings`` is of another type.
        """
        if settings is not None and not isinstance(settings, Settings):
            raise TypeError(
                f"set_default takes Settings(...) or None, not {type(settings).__name__}"
            )
        Settings._default = settings

    def __enter__(self) -> Settings:
        entered = _entered.get()
        outer = _set_fields(entered[-1]) if entered else {}
        merged = Settings(**{**outer, **_set_fields(self)})
        _entered.set((*entered, merged))
        return merged

    def __exit__(self, *_: object) -> None:
        _entered.set(_entered.get()[:-1])

    def native(self, fp8: tuple[bool, bool, bool]) -> _native.Settings:
        """For the engine; ``fp8`` are the rules of ``weightlift.core.dtypes.fp8_rules``."""
        # Remembered here too: to hash all fields takes a tenth of the load of a small tensor.
        known: dict[object, _native.Settings] = self.__dict__.setdefault("_native", {})
        native = known.get(fp8)
        if native is None:
            native = known[fp8] = _made_native(self, fp8)
        return native


@functools.lru_cache(maxsize=64)  # few differ, and most loads make theirs anew
def _made_native(settings: Settings, fp8: tuple[bool, bool, bool]) -> _native.Settings:
    native = _native.Settings()
    native.fp8 = fp8
    for name, value in _set_fields(settings).items():
        if name != "populate":
            setattr(native, name, value)
    return native


_VARIABLES = {
    field.name: "WEIGHTLIFT_" + field.name.upper() for field in dataclasses.fields(Settings)
}
# The `with` blocks that this thread or task is in, the innermost last.
_entered: ContextVar[tuple[Settings, ...]] = ContextVar("weightlift_settings", default=())


def _set_fields(settings: Settings) -> dict[str, Any]:
    pairs = ((f.name, getattr(settings, f.name)) for f in dataclasses.fields(settings))
    return {name: value for name, value in pairs if value is not None}


def _of_environment(field: str, text: str) -> object:
    """
    Raises:
        ArgumentError: the value is invalid; the text names the variable.
    """
    try:
        return getattr(Settings(**{field: _parse(field, text)}), field)
    except ArgumentError as error:
        message = str(error).replace(f"Settings.{field}", _VARIABLES[field])
        raise ArgumentError(message) from None


def _parse(name: str, text: str) -> Any:
    if name in ("io_path", "cast_place", "huge_pages"):
        return text.lower()
    if name in ("populate", "kernels", "batch_copies"):
        return flag_of_environment(_VARIABLES[name])
    if name in _SIZES:
        return parse_size(text, _VARIABLES[name], fractions=False)
    return int(text) if re.fullmatch(r"\s*-?\d+\s*", text) else text


def flag_of_environment(variable: str) -> bool:
    """Whether a variable is set to ``1``, ``true``, ``yes`` or ``on``.

    Raises:
        ArgumentError: it has another value than these, ``0``, ``false``, ``no`` and ``off``.
    """
    text = os.environ.get(variable) or "0"
    flags = {**_TRUE, **_FALSE}
    if text.lower() not in flags:
        raise ArgumentError(f"{variable} is {text!r}; it can be 0 or 1")
    return flags[text.lower()]


@functools.cache
def _warn_of_unknown_variables() -> None:
    said = unknown_variables()
    if not said:
        return
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and _is_ours(frame.f_globals.get("__name__")):
        frame, level = frame.f_back, level + 1
    for text in said:
        warnings.warn(text, stacklevel=level)  # at the line of the user's call


def _is_ours(module: object) -> bool:  # a frame of exec() may have no name
    return isinstance(module, str) and module.startswith("weightlift.")


_told = False  # of unknown variables


def unknown_variables() -> list[str]:
    """What to say of unknown variables, whose names are probably misspelt; once per process, so
    that later calls return nothing."""
    global _told
    if _told:
        return []
    _told = True
    said = []
    known = [*_VARIABLES.values(), *_OTHER_VARIABLES]
    begins = "WEIGHTLIFT_"
    for name in sorted(os.environ):
        if name.startswith(begins) and name not in (*known, *_TEST_VARIABLES):
            ends = [one.removeprefix(begins) for one in known]
            near = difflib.get_close_matches(name.removeprefix(begins), ends, 1)
            hint = f"did you mean {begins}{near[0]}?" if near else f"known are {', '.join(known)}"
            said.append(f"environment variable {name} is unknown; {hint}")
    return said

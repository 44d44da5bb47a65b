"""Backends: installed libraries load through the engine, with the same result.

``enable()`` replaces the loading functions of diffusers, transformers, accelerate and safetensors;
``disable()`` restores the original objects. A library that is not imported yet is hooked at its
import.

A backend is a module ``weightlift.backends.LIBRARY`` with a tuple ``HOOKS`` of :class:`Hook`
(`hooks`), which `patching` installs. It imports its library only inside functions. A replacement
that cannot do a call raises :class:`FallbackToLibrary` before it places any tensor (`fallback`).

Only the names in ``HOOKS`` are replaced. A module that did ``from library import name`` before
keeps the original. One that does so while a backend is on gets a function that follows the last
``enable()`` or ``disable()``.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib
import os
from collections.abc import Callable, Iterable
from typing import cast

from weightlift.backends import early_return, patching
from weightlift.backends.fallback import FallbackToLibrary, fall_back, report_fallback
from weightlift.backends.hooks import LIBRARIES, Hook, Library, signature_text
from weightlift.core.errors import ArgumentError
from weightlift.core.given import check_flag

__all__ = [
    "LIBRARIES",
    "FallbackToLibrary",
    "Hook",
    "disable",
    "enable",
    "enable_from_environment",
    "enabled",
    "fall_back",
    "is_enabled",
    "report_fallback",
    "signature_text",
]

# Both under the lock of `patching`.
_explicit: set[str] = set()  # by enable()
_held: dict[str, set[object]] = {name: set() for name in LIBRARIES}  # by `with enabled()`
# The libraries whose models load in the background: by enable(), and by each `with enabled()`.
_background: set[str] = set()
_held_background: dict[object, frozenset[str]] = {}


def enable(*libraries: Library, background: bool = False) -> None:
    """Makes these libraries load through the engine; all libraries without an argument.

    It imports nothing: a library is hooked at its import. A second call has no effect. A function
    with an unknown signature keeps the library's own implementation, with one log line.

    Args:
        libraries: ``"diffusers"``, ``"transformers"``, ``"accelerate"``, ``"safetensors"``.
        background: ``from_pretrained`` of diffusers' and transformers' models returns while the
            model loads: each module waits for its own tensors, as with ``load_into(...,
            background=True)``, and ``weightlift.last_report()`` is the handle. Models that are
            quantized, cut for several processes, or on several devices or the disk, and single
            files of diffusers, are loaded before the return.

    Raises:
        ArgumentError: a library is unknown, or none of them supports ``background=True``.
        WeightliftError: with ``WEIGHTLIFT_STRICT=1``, an unknown signature.
    """
    names = _names(libraries)
    in_background = _background_of(names, background)
    before, before_background = _explicit & names, frozenset(_background)

    def undo() -> None:
        _explicit.difference_update(names - before)
        _background.clear()
        _background.update(before_background)

    with patching.lock:
        _explicit.update(names)
        _background.difference_update(names)
        _background.update(in_background)
    _apply_or(undo)


def disable(*libraries: str) -> None:
    """Restores the libraries' own functions; all libraries without an argument.

    It also ends the effect of a surrounding ``with enabled()``.

    Raises:
        ArgumentError: a library is unknown.
    """
    names = _names(libraries)
    with patching.lock:
        _explicit.difference_update(names)
        _background.difference_update(names)
        for name in names:
            _held[name].clear()
        for token, in_background in _held_background.items():
            _held_background[token] = in_background - names
        _apply()


class enabled(contextlib.ContextDecorator):
    """``with enabled("diffusers"):`` enables backends for the block, and restores the earlier
    state.

    It applies to the whole process, like ``enable``. Several threads may be in such blocks at once;
    the last one to leave restores the state. ``libraries`` and ``background`` are as in ``enable``.

    As a condition, ``if enabled("diffusers"):``, it says whether these backends are on now; without
    a name, whether any is.

    Raises:
        ArgumentError: as ``enable``.
    """

    def __init__(self, *libraries: Library, background: bool = False) -> None:
        self._libraries = _names(libraries)
        self._named = bool(libraries)
        self._background = _background_of(self._libraries, background)
        self._entered: list[tuple[object, set[str], set[str]]] = []

    def __bool__(self) -> bool:
        return (all if self._named else any)(map(is_enabled, self._libraries))

    def __repr__(self) -> str:
        on = [name for name in LIBRARIES if is_enabled(name)]
        return f"<enabled: {', '.join(on) or 'no backend is on'}>"

    def __enter__(self) -> enabled:
        token = object()
        with patching.lock:
            self._entered.append(
                (token, _explicit & self._libraries, _background & self._libraries)
            )
            _held_background[token] = self._background
            for name in self._libraries:
                _held[name].add(token)
        _apply_or(self._leave)
        return self

    def __exit__(self, *_: object) -> None:
        with patching.lock:
            self._leave()
            _apply()

    def _leave(self) -> None:
        token, explicit, in_background = self._entered.pop()
        _held_background.pop(token, None)
        for name in self._libraries:
            _held[name].discard(token)
        _explicit.difference_update(self._libraries)
        _explicit.update(explicit)
        _background.difference_update(self._libraries)
        _background.update(in_background)


def is_enabled(library: str) -> bool:
    """Whether the backend of this library is on."""
    return patching.is_active(library)


def enable_from_environment() -> None:
    """Enables the libraries in ``WEIGHTLIFT_ENABLE`` when weightlift is imported.

    Raises:
        ArgumentError: an unknown library.
    """
    value = os.environ.get("WEIGHTLIFT_ENABLE", "")
    names = value.replace(",", " ").split()
    if names:
        try:
            enable(*cast("list[Library]", names))
        except ArgumentError as error:
            raise ArgumentError(f"WEIGHTLIFT_ENABLE={value}: {error}") from None


def _names(libraries: Iterable[str]) -> frozenset[str]:
    names = tuple(libraries)
    unknown = sorted({repr(name) for name in names if name not in LIBRARIES})
    if unknown:
        near = difflib.get_close_matches(str(names[0]), LIBRARIES, 1) if len(names) == 1 else []
        hint = f" ({near[0]!r} is meant?)" if near else ""
        raise ArgumentError(
            f"no backend for {', '.join(unknown)}{hint}; there are {', '.join(LIBRARIES)}"
        )
    return frozenset(names or LIBRARIES)


def _background_of(names: frozenset[str], background: bool) -> frozenset[str]:
    check_flag("background", background)
    if not background:
        return frozenset()
    in_background = names & early_return.ABLE
    if not in_background:
        raise ArgumentError(
            f"background=True is for {' and '.join(sorted(early_return.ABLE))}: leave it out for "
            f"{', '.join(sorted(names))}"
        )
    return in_background


def _apply_or(undo: Callable[[], None]) -> None:
    """Installs the requested hooks; undoes the request if that fails."""
    try:
        for module in _apply():
            # Another thread imports it: this waits for its end.
            importlib.import_module(module)
            patching.install(module)
    except BaseException:
        with patching.lock:
            undo()
            _apply()
        raise


def _apply() -> list[str]:
    with patching.lock:
        early_return.set_libraries(frozenset(_background).union(*_held_background.values()))
        held = (name for name in LIBRARIES if _held[name])
        return patching.activate(frozenset(_explicit.union(held)))

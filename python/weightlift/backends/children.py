"""Enables the backends of this process in its child processes.

A forked child inherits the memory. A child by spawn or forkserver, and any other Python, inherits
only the environment: ``WEIGHTLIFT_ENABLE`` names the libraries, and ``PYTHONPATH`` begins with the
folder ``startup``, whose ``sitecustomize`` Python executes (not with ``-E``, ``-I`` or ``-S``). A
fork server keeps the environment of its own start.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

__all__ = ["export_to_children"]

_ENABLE = "WEIGHTLIFT_ENABLE"
_PATH = "PYTHONPATH"
_STARTUP = str(Path(__file__).resolve().parent / "startup")

# The value that this module set, and the value before.
_set: str | None = None
_before: str | None = None


def export_to_children(libraries: Collection[str]) -> None:
    """Enables the backends of these libraries in children; restores the environment if none."""
    global _set, _before
    path = os.environ.get(_PATH)
    value = os.environ.get(_ENABLE)
    if value != _set:  # not by this process; if a parent's, that is not what was there before
        inherited = _set is None and _STARTUP in (path or "").split(os.pathsep)
        _before = None if inherited else value
    wanted = ",".join(sorted(libraries)) or None
    _assign(_ENABLE, wanted or _before)
    _set = wanted

    others = [entry for entry in (path or "").split(os.pathsep) if entry != _STARTUP]
    rest = os.pathsep.join(others)
    if wanted is not None:
        path = f"{_STARTUP}{os.pathsep}{rest}" if rest else _STARTUP
    elif path is not None and path != rest:
        path = rest or None
    _assign(_PATH, path)


def _assign(name: str, value: str | None) -> None:
    if os.environ.get(name) == value:
        return
    if value is None:
        del os.environ[name]
    else:
        os.environ[name] = value

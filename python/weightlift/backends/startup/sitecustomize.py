"""Executed by Python at its start in children of a process with backends on.

``weightlift.backends.children`` puts this folder on their ``PYTHONPATH``. weightlift is imported
with the first library; the user's own ``sitecustomize`` runs too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any


class _Enabler(MetaPathFinder):
    """Imports weightlift, which enables its backends by ``WEIGHTLIFT_ENABLE``, before the first of
    their libraries."""

    def __init__(self, libraries: list[str]) -> None:
        self._libraries = frozenset(libraries)

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname not in self._libraries or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        with contextlib.suppress(ModuleNotFoundError):  # another Python without weightlift
            import weightlift.backends  # noqa: F401
        return importlib.util.find_spec(fullname)


def _run_user_sitecustomize() -> None:
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if not entry or Path(entry).resolve() != here]
    spec = PathFinder.find_spec("sitecustomize")
    if spec is None or spec.loader is None:
        # The error that site.py expects if there is no sitecustomize.
        raise ModuleNotFoundError("No module named 'sitecustomize'", name="sitecustomize")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sitecustomize"] = module
    spec.loader.exec_module(module)


if _names := os.environ.get("WEIGHTLIFT_ENABLE", "").replace(",", " ").split():
    sys.meta_path.insert(0, _Enabler(_names))
_run_user_sitecustomize()

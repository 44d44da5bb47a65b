"""Errors for optional libraries that are not installed."""

from __future__ import annotations

import importlib.util
import sys

from weightlift.core.errors import WeightliftError

__all__ = ["MissingLibraryError", "missing_library", "require"]

# Library -> how to install it.
_REMEDIES = {
    "torch": "pip install torch (pytorch.org has builds for each CUDA), or 'weightlift[torch]'",
    "accelerate": "pip install 'weightlift[accelerate]'",
    "matplotlib": "pip install 'weightlift[plot]'",
    "jax": "pip install 'weightlift[flax]'",
    "flax": "pip install 'weightlift[flax]'",
    "msgpack": "pip install 'weightlift[flax]', or msgpack alone",
    "rich": "pip install 'weightlift[cli]'",
    "typer": "pip install 'weightlift[cli]'",
    "diffusers": "pip install diffusers",
    "transformers": "pip install transformers",
}


class MissingLibraryError(WeightliftError, ModuleNotFoundError):
    """A call needs a library that is not installed; also a ``ModuleNotFoundError``."""


def missing_library(name: str, what: str = "this") -> MissingLibraryError:
    """The error for a missing library that ``what`` needs."""
    library = name.partition(".")[0]
    if library in sys.stdlib_module_names:
        return MissingLibraryError(
            f"{what} needs {library}, a part of Python that is not in this Python: build or "
            "install Python with it",
            name=library,
        )
    remedy = _REMEDIES.get(library, f"pip install {library}")
    return MissingLibraryError(
        f"{what} needs {library}, which is not installed: {remedy}", name=library
    )


def require(library: str, what: str) -> None:
    """Raises ``MissingLibraryError`` if ``library`` is not installed; imports nothing."""
    if sys.modules.get(library) is not None:
        return
    try:
        found = importlib.util.find_spec(library) is not None
    except (ImportError, ValueError):
        found = False
    if not found:
        raise missing_library(library, what)

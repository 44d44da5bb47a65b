"""Installs replacements in the libraries' modules at their import, and removes them."""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
import threading
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

from weightlift.backends.children import export_to_children
from weightlift.backends.fallback import (
    FallbackToLibrary,
    is_strict,
    report_fallback,
    torch_errors,
)
from weightlift.backends.hooks import WITHOUT_SIGNATURE, Hook, signature_text
from weightlift.core.errors import WeightliftError
from weightlift.core.report import record_fallback

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec

__all__ = ["activate", "hooks_of", "install", "is_active", "lock", "patches"]

_log = logging.getLogger("weightlift")


class Patch(NamedTuple):
    """An installed replacement.

    Attributes:
        owner: the module or class.
        name: the name in it.
        original: the object to restore.
    """

    library: str
    owner: Any
    name: str
    original: Any
    replacement: Any


# Guards all below; replacements read `_active` without it.
lock = threading.RLock()
_active: frozenset[str] = frozenset()
patches: list[Patch] = []
# Replacement -> (library, what it replaces).
_ours: WeakKeyDictionary[Any, tuple[str, Any]] = WeakKeyDictionary()


def is_active(library: str) -> bool:
    """Whether calls of this library go through its replacements."""
    return library in _active


@functools.cache
def hooks_of(library: str) -> tuple[Hook, ...]:
    """The hooks of a backend."""
    hooks: tuple[Hook, ...] = importlib.import_module(f"weightlift.backends.{library}").HOOKS
    return hooks


def activate(libraries: frozenset[str]) -> list[str]:
    """Installs the replacements of these libraries, and removes all others.

    Returns:
        The modules that another thread is importing: they are hooked when the import ends.
    """
    global _active
    with lock:
        left, _active = _active - libraries, libraries
        export_to_children(_active)
        for patch in reversed(patches):
            if patch.library in _active:
                continue
            # Other code may have wrapped the replacement; the replacement then calls the original
            # from now on.
            if vars(patch.owner).get(patch.name) is patch.replacement:
                setattr(patch.owner, patch.name, patch.original)
        patches[:] = [patch for patch in patches if patch.library in _active]
        for library in sorted(left):
            # What a backend holds for models that are in use goes with it.
            backend = importlib.import_module(f"weightlift.backends.{library}")
            getattr(backend, "release", _nothing)()
        modules = _hooked_modules()
        if modules and _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        elif not modules and _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        unfinished = []
        for name in sorted(modules & sys.modules.keys()):
            if getattr(getattr(sys.modules[name], "__spec__", None), "_initializing", False):
                unfinished.append(name)
            else:
                install(name)
        return unfinished


def _nothing() -> None:
    pass


def _hooked_modules() -> set[str]:
    return {hook.module for library in _active for hook in hooks_of(library)}


def install(name: str) -> None:
    """Puts the replacements of the active libraries into this module."""
    # The entry in sys.modules: a lazy package replaces the executed module there.
    module = sys.modules.get(name)
    if module is None:
        return
    with lock:
        for library in sorted(_active):
            for hook in hooks_of(library):
                if hook.module == name:
                    _patch(library, hook, module)


def _patch(library: str, hook: Hook, module: ModuleType) -> None:
    place = f"{hook.module}.{hook.target}"
    *path, name = hook.target.split(".")
    owner: Any = module
    try:
        for part in path:
            owner = getattr(owner, part)
        original = vars(owner)[name]
    except (AttributeError, KeyError):
        _report_unknown(library, f"there is no {place}")
        return
    bound = isinstance(original, (classmethod, staticmethod))
    function = original.__func__ if bound else original
    made = _patch_made_for(function)
    if made is not None:
        # Hooked already, or imported from where it is hooked, perhaps by another backend.
        if any(patch.owner is owner and patch.name == name for patch in patches):
            return
        maker, original = made
        if maker == library:
            patches.append(Patch(library, owner, name, original, function))
            return
        function = original
    replacement = _replacement(library, hook, function, place)
    if replacement is None:
        return
    _ours[replacement] = library, original
    if bound:
        replacement = type(original)(replacement)
    setattr(owner, name, replacement)
    patches.append(Patch(library, owner, name, original, replacement))


def _patch_made_for(function: Any) -> tuple[str, Any] | None:
    with contextlib.suppress(TypeError):  # a module's value may have no hash
        return _ours.get(function)
    return None


def _replacement(library: str, hook: Hook, function: Any, place: str) -> Any:
    """The replacement of a function; ``None`` if its signature is unknown."""
    try:
        signature = signature_text(function)
    except (TypeError, ValueError):
        signature = WITHOUT_SIGNATURE
    adapter = hook.adapter(signature)
    if adapter is None:
        _report_unknown(library, f"{place} is not as known: {signature}")
        return None
    replacement = adapter(function)
    if isinstance(replacement, FunctionType):
        replacement = _route(library, function, replacement)
    return replacement


def _report_unknown(library: str, what: str) -> None:
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        what = f"{library} {metadata.version(library)}: {what}"
    text = f"weightlift: {library} falls back to its own loading: {what}"
    if is_strict():
        raise WeightliftError(f"{text} (WEIGHTLIFT_STRICT=1 makes that an error)")
    record_fallback(library, what)
    _log.warning("%s", text)


def _route(
    library: str, original: Callable[..., Any], replacement: Callable[..., Any]
) -> Callable[..., Any]:
    # Python's errors about wrong arguments use this name.
    replacement.__qualname__ = original.__qualname__

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if library in _active:
            try:
                with torch_errors():
                    return replacement(*args, **kwargs)
            except FallbackToLibrary as aside:
                reason = aside
            report_fallback(library, reason.reason, warn=reason.warn)
        return original(*args, **kwargs)

    return call


class _Finder(MetaPathFinder):
    """Hooks modules when their import ends; finds nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Only libraries' modules: `_hooked_modules` imports weightlift's.
        if fullname.partition(".")[0] == "weightlift" or fullname not in _hooked_modules():
            return None
        others = list(sys.meta_path)
        for finder in others[others.index(self) + 1 :] if self in others else []:
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    _follow(spec.loader, fullname)
                return spec
        return None


def _follow(loader: Any, name: str) -> None:
    """Installs the hooks of a module after its loader has executed it.

    Patches the loader itself, because a proxy would remain as the module's ``__loader__``.
    """
    execute = getattr(loader, "exec_module", None)
    if execute is None or isinstance(loader, type):  # a class loads built-in and frozen modules
        return

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if module.__name__ == name:  # a loader may serve several modules
            if vars(loader).get("exec_module") is exec_module:
                del loader.exec_module
            install(name)

    with contextlib.suppress(AttributeError):  # it may have slots
        loader.exec_module = exec_module


_finder = _Finder()

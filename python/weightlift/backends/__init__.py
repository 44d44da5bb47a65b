"""The fast backend: installed libraries load through the engine, with the same result.

``enable()`` replaces the few functions with which diffusers, transformers, accelerate and
safetensors load; ``disable()`` puts the very objects back. A library that is not imported yet is
hooked when it is.

A backend is a module ``weightlift.backends.LIBRARY`` with a tuple ``HOOKS`` of :class:`Hook`. It
imports its library inside functions only. A replacement that finds it should not do this call
raises :class:`StandAside` before it has placed any tensor.

Only the names that ``HOOKS`` list are replaced. A module that did ``from library import name``
before keeps the original; one that does so while a backend is on keeps a name that follows the
backend: on or off, it goes the way that ``enable()`` and ``disable()`` said last.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from importlib.abc import MetaPathFinder
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

from weightlift.backends.children import pass_on
from weightlift.core.errors import ArgumentError, OutOfMemoryError, WeightliftError
from weightlift.core.report import record_fallback

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec

__all__ = [
    "KNOWN",
    "Hook",
    "StandAside",
    "disable",
    "enable",
    "enabled",
    "is_enabled",
    "levels_to_caller",
    "or_stock",
    "signature_text",
    "stand_aside",
    "torch_errors",
]

KNOWN = ("diffusers", "transformers", "accelerate", "safetensors")

_Result = TypeVar("_Result")

_log = logging.getLogger("weightlift")
# Whose frames a warning passes over: who called them can do something about it.
_NOT_CALLERS = {*KNOWN, "weightlift", "huggingface_hub", "peft", "torch"}
_in_stock: ContextVar[bool] = ContextVar("weightlift_in_stock", default=False)


class Hook(NamedTuple):
    """One function, method or class of a library, and what takes its place.

    Attributes:
        module: where it is defined, such as ``"diffusers.models.modeling_utils"``; hooked when
            this very module is imported.
        target: its name there, such as ``"ModelMixin._load_pretrained_model"``.
        adapters: known signature, as ``signature_text`` writes it, -> what makes the replacement
            from the original. Both are plain functions where the target is a classmethod or
            staticmethod. A replacement that is no function is put in place as it is, and asks
            ``is_enabled`` itself; a target that is none is ``"without a signature"``.
    """

    module: str
    target: str
    adapters: Mapping[str, Callable[[Any], Any]]


class StandAside(Exception):
    """Raised by a replacement that leaves this call to the original; no tensor is placed yet.

    Args:
        reason: for the user, such as ``"GGUF files are read by diffusers"``.
        warn: ``False`` where the stock way is the documented one.
    """

    def __init__(self, reason: str, *, warn: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.warn = warn


class _Patch(NamedTuple):
    library: str
    owner: Any
    name: str
    original: Any
    replacement: Any


# Guards all below; replacements read `_active` without it.
_lock = threading.RLock()
_explicit: set[str] = set()  # by enable()
_held: dict[str, set[object]] = {name: set() for name in KNOWN}  # by `with enabled()`
_active: frozenset[str] = frozenset()
_patches: list[_Patch] = []
# Replacement -> (library, what it replaces).
_ours: WeakKeyDictionary[Any, tuple[str, Any]] = WeakKeyDictionary()


def enable(*libraries: str) -> None:
    """Makes these libraries load through the engine; all known ones without an argument.

    Nothing is imported: what is not imported yet is hooked when it is. Twice is as once. Where a
    function of the library has a signature that is not known, it stays as it is, which one log line
    says.

    Args:
        libraries: ``"diffusers"``, ``"transformers"``, ``"accelerate"``, ``"safetensors"``.

    Raises:
        ArgumentError: an unknown library.
        WeightliftError: with ``WEIGHTLIFT_STRICT=1``, an unknown signature.
    """
    names = _names(libraries)
    before = _explicit & names
    with _lock:
        _explicit.update(names)
    _apply_or(lambda: _explicit.difference_update(names - before))


def disable(*libraries: str) -> None:
    """Puts the libraries' own functions back; all without an argument.

    It also ends what a ``with enabled()`` around it began.

    Raises:
        ArgumentError: an unknown library.
    """
    names = _names(libraries)
    with _lock:
        _explicit.difference_update(names)
        for name in names:
            _held[name].clear()
        _apply()


class enabled(contextlib.ContextDecorator):
    """``with enabled("diffusers"):`` enables for the block, and restores what was before.

    For the whole process, as ``enable``: several threads may be in such blocks at once, and the
    last to leave restores.
    """

    def __init__(self, *libraries: str) -> None:
        self._libraries = _names(libraries)
        self._entered: list[tuple[object, set[str]]] = []

    def __enter__(self) -> enabled:
        token = object()
        with _lock:
            self._entered.append((token, _explicit & self._libraries))
            for name in self._libraries:
                _held[name].add(token)
        _apply_or(self._leave)
        return self

    def __exit__(self, *_: object) -> None:
        with _lock:
            self._leave()
            _apply()

    def _leave(self) -> None:
        token, explicit = self._entered.pop()
        for name in self._libraries:
            _held[name].discard(token)
        _explicit.difference_update(self._libraries)
        _explicit.update(explicit)


def is_enabled(library: str) -> bool:
    """Whether the backend of this library is on."""
    return library in _active


def enable_from_environment() -> None:
    """What ``WEIGHTLIFT_ENABLE=diffusers,transformers`` asks for when weightlift is imported.

    Raises:
        ArgumentError: an unknown library.
    """
    value = os.environ.get("WEIGHTLIFT_ENABLE", "")
    names = value.replace(",", " ").split()
    if names:
        try:
            enable(*names)
        except ArgumentError as error:
            raise ArgumentError(f"WEIGHTLIFT_ENABLE={value}: {error}") from None


def stand_aside(library: str, reason: str, *, warn: bool = True) -> None:
    """Counts a load that goes the library's own way, and warns of it once a reason.

    Raises:
        WeightliftError: with ``WEIGHTLIFT_STRICT=1``.
    """
    text = f"weightlift: {library} loads the stock way: {reason}"
    if _strict():
        raise WeightliftError(f"{text} (WEIGHTLIFT_STRICT=1 makes that an error)")
    if record_fallback(library, reason) == 1 and warn:
        warnings.warn(text, stacklevel=levels_to_caller())
    else:
        _log.info("%s", text)


def or_stock(library: str, error: Exception, stock: Callable[[], _Result]) -> _Result:
    """After an error of the engine, before any tensor is placed: the library's own way, which
    raises the library's own error, or works and is counted and warned of."""
    if _in_stock.get():  # the library's own way came upon another hook, for the same reason
        return stock()
    token = _in_stock.set(True)
    aside = error if isinstance(error, StandAside) else None
    try:
        result = stock()
    except Exception as own:
        raise own from (None if aside else error)
    finally:
        _in_stock.reset(token)
    stand_aside(library, str(error), warn=aside is None or aside.warn)
    return result


def levels_to_caller() -> int:
    """The ``stacklevel`` of a warning, from the function that calls this, for the first frame that
    is of neither weightlift nor the libraries. (Python has ``skip_file_prefixes`` from 3.12 on.)"""
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
    """Out of device memory is torch's own exception to callers of these libraries."""
    try:
        yield
    except OutOfMemoryError as error:
        import torch

        if isinstance(error.__cause__, torch.OutOfMemoryError):
            raise error.__cause__ from None
        raise


def signature_text(function: Any) -> str:
    """A signature without annotations: ``"(cls, path, device_map=None, **kwargs)"``.

    Defaults that are no plain values are written ``...``.

    Raises:
        ValueError, TypeError: it has none, or is no callable.
    """
    import inspect

    signature = inspect.signature(function)
    parameters = []
    for parameter in signature.parameters.values():
        default = parameter.default
        if default is not parameter.empty and not isinstance(
            default, (type(None), bool, int, float, str)
        ):
            default = ...
        parameters.append(parameter.replace(annotation=parameter.empty, default=default))
    text = str(signature.replace(parameters=parameters, return_annotation=signature.empty))
    return text.replace("=Ellipsis", "=...")


def _names(libraries: Iterable[str]) -> frozenset[str]:
    names = tuple(libraries)
    unknown = sorted({repr(name) for name in names if name not in KNOWN})
    if unknown:
        raise ArgumentError(
            f"no backend for {', '.join(unknown)}; weightlift knows {', '.join(KNOWN)}"
        )
    return frozenset(names or KNOWN)


def _strict() -> bool:
    return os.environ.get("WEIGHTLIFT_STRICT") == "1"


@functools.cache
def _hooks(library: str) -> tuple[Hook, ...]:
    hooks: tuple[Hook, ...] = importlib.import_module(f"weightlift.backends.{library}").HOOKS
    return hooks


def _modules() -> set[str]:
    return {hook.module for library in _active for hook in _hooks(library)}


def _apply_or(undo: Callable[[], None]) -> None:
    """Puts in place what is wanted now; where that fails, undoes the wish."""
    try:
        for module in _apply():
            # Another thread imports it: this waits for its end.
            importlib.import_module(module)
            _install(module)
    except BaseException:
        with _lock:
            undo()
            _apply()
        raise


def _apply() -> list[str]:
    """Hooks and unhooks what is imported; returns the modules whose import has not ended."""
    global _active
    with _lock:
        _active = frozenset(_explicit.union(*([name] for name in KNOWN if _held[name])))
        pass_on(_active)
        for patch in reversed(_patches):
            if patch.library in _active:
                continue
            # Not where somebody else has put something on top: that calls what is below, which
            # goes the original's way from now on.
            if vars(patch.owner).get(patch.name) is patch.replacement:
                setattr(patch.owner, patch.name, patch.original)
        _patches[:] = [patch for patch in _patches if patch.library in _active]
        modules = _modules()
        if modules and _finder not in sys.meta_path:
            sys.meta_path.insert(0, _finder)
        elif not modules and _finder in sys.meta_path:
            sys.meta_path.remove(_finder)
        unfinished = []
        for name in sorted(modules & sys.modules.keys()):
            if getattr(getattr(sys.modules[name], "__spec__", None), "_initializing", False):
                unfinished.append(name)
            else:
                _install(name)
        return unfinished


def _install(name: str) -> None:
    # The entry in sys.modules, not what was executed: a lazy package puts another object there.
    module = sys.modules.get(name)
    if module is None:
        return
    with _lock:
        for library in sorted(_active):
            for hook in _hooks(library):
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
        _not_known(library, f"there is no {place}")
        return
    bound = isinstance(original, (classmethod, staticmethod))
    function = original.__func__ if bound else original
    made = None
    with contextlib.suppress(TypeError):  # a module's value may have no hash
        made = _ours.get(function)
    if made is not None:
        # Hooked already, or imported from where it is hooked, perhaps by another backend.
        if any(p.owner is owner and p.name == name for p in _patches):
            return
        maker, original = made
        if maker == library:
            _patches.append(_Patch(library, owner, name, original, function))
            return
        function = original
    try:
        signature = signature_text(function)
    except (TypeError, ValueError):
        signature = "without a signature"
    adapter = hook.adapters.get(signature)
    if adapter is None:
        _not_known(library, f"{place} is not as known: {signature}")
        return
    replacement = adapter(function)
    if isinstance(replacement, FunctionType):
        replacement = _route(library, function, replacement)
    _ours[replacement] = library, original
    if bound:
        replacement = type(original)(replacement)
    setattr(owner, name, replacement)
    _patches.append(_Patch(library, owner, name, original, replacement))


def _not_known(library: str, what: str) -> None:
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        what = f"{library} {metadata.version(library)}: {what}"
    text = f"weightlift stands aside, this loads the stock way: {what}"
    if _strict():
        raise WeightliftError(f"{text} (WEIGHTLIFT_STRICT=1 makes that an error)")
    record_fallback(library, what)
    _log.warning("%s", text)


def _route(
    library: str, original: Callable[..., Any], replacement: Callable[..., Any]
) -> Callable[..., Any]:
    # Python names a function that is called wrongly by this.
    replacement.__qualname__ = original.__qualname__

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if library in _active:
            try:
                with torch_errors():
                    return replacement(*args, **kwargs)
            except StandAside as aside:
                reason = aside
            stand_aside(library, reason.reason, warn=reason.warn)
        return original(*args, **kwargs)

    return call


class _Finder(MetaPathFinder):
    """Hooks modules when their import ends; finds nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        # Of a library, not of ours, which `_modules` imports.
        if fullname.partition(".")[0] not in KNOWN or fullname not in _modules():
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

    On the loader itself, because a proxy would stay behind as the module's ``__loader__``.
    """
    execute = getattr(loader, "exec_module", None)
    if execute is None or isinstance(loader, type):  # a class loads built-in and frozen modules
        return

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if module.__name__ == name:  # a loader may serve several modules
            if vars(loader).get("exec_module") is exec_module:
                del loader.exec_module
            _install(name)

    with contextlib.suppress(AttributeError):  # it may have slots
        loader.exec_module = exec_module


_finder = _Finder()

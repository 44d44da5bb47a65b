"""``load_state_dict``: returns the tensors of a file, or names instead of them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from weightlift.backends.diffusers.calls import current_call
from weightlift.backends.diffusers.context import NAME
from weightlift.backends.diffusers.files import engine_device, load_all, open_files
from weightlift.backends.diffusers.single_file import current_single_file
from weightlift.backends.fallback import FallbackToLibrary, fall_back
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core.errors import WeightliftError
from weightlift.load.slots_ahead import slots_ahead

__all__ = ["Pending", "load_state_dict"]


class _Name(str):
    """A tensor's name in the file, in place of the tensor in a state dict."""


class Pending(dict[str, _Name]):
    """A state dict whose tensors are still in their file; diffusers renames some of its keys."""

    def __init__(self, opened: Checkpoint, original_call: Callable[[], Mapping[str, Any]]) -> None:
        super().__init__((name, _Name(name)) for name in opened)
        self._opened = opened
        self._original_call = original_call

    @property
    def renamed(self) -> dict[str, str] | None:
        """Name in the file -> key; ``None`` if diffusers has renamed nothing."""
        if all(key == name for key, name in self.items()):
            return None
        return {name: key for key, name in self.items()}

    def checkpoint(self, renamed: Mapping[str, str] | None) -> Checkpoint:
        return self._opened if renamed is None else self._opened.renamed(renamed.get)

    def by_diffusers(self) -> dict[str, Any]:
        tensors = self._original_call()
        return {key: tensors[name] for key, name in self.items()}


def load_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """Reads the tensors of a file with the engine; for ``from_pretrained`` returns their names."""
    signature = inspect.signature(original)

    def load_state_dict(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        file = given["checkpoint_file"]
        device = engine_device(given["map_location"])
        if isinstance(file, dict) or given.get("dduf_entries") or device is None:
            return original(*args, **kwargs)
        call = current_call.get()
        if call is not None and call.by_diffusers:
            return original(*args, **kwargs)
        original_call = functools.partial(original, *args, **kwargs)
        single = current_single_file.get()
        if single is not None and not given["disable_mmap"]:
            return single.open(file, original_call)
        opened = None if call is None else call.whole_file(file)
        if opened is not None:
            return Pending(opened, original_call)
        try:
            with slots_ahead([device]):
                opened = open_files([file])
        except (FallbackToLibrary, WeightliftError) as error:
            return fall_back(NAME, error, original_call)
        return load_all(opened, device, given["disable_mmap"])

    return load_state_dict

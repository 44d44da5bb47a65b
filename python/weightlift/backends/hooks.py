"""Hooks: the functions of a library that a backend replaces."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

__all__ = [
    "ANY_SIGNATURE",
    "LIBRARIES",
    "WITHOUT_SIGNATURE",
    "Hook",
    "Library",
    "outside_of_graphs",
    "signature_text",
]

# That there are backends for.
Library: TypeAlias = Literal["diffusers", "transformers", "accelerate", "safetensors"]
LIBRARIES: tuple[Library, ...] = get_args(Library)
# Matches every signature, for replacements that pass all arguments on.
ANY_SIGNATURE = "(...)"
# The signature of a target that is not a function.
WITHOUT_SIGNATURE = "without a signature"


class Hook(NamedTuple):
    """One function, method or class of a library, and its replacement.

    Attributes:
        module: the module that defines it, such as ``"diffusers.models.modeling_utils"``; it is
            hooked when this module is imported.
        target: its name there, such as ``"ModelMixin._load_pretrained_model"``.
        adapters: known signature, as ``signature_text`` writes it, -> function that makes the
            replacement from the original. Both are plain functions if the target is a classmethod
            or staticmethod. A replacement that is not a function is installed unchanged and checks
            ``is_enabled`` itself; a target that is not a function has ``WITHOUT_SIGNATURE``.
    """

    module: str
    target: str
    adapters: Mapping[str, Callable[[Any], Any]]

    def adapter(self, signature: str) -> Callable[[Any], Any] | None:
        """The adapter for a signature; ``None`` if it is unknown."""
        return self.adapters.get(signature) or self.adapters.get(ANY_SIGNATURE)


def outside_of_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """Has ``torch.compile`` run a function as it is; without importing what that takes."""
    disabled: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            import torch

            disabled.append(torch.compiler.disable(function))  # type: ignore[no-untyped-call]
        return disabled[0](*args, **kwargs)

    return call


def signature_text(function: Any) -> str:
    """A signature without annotations: ``"(cls, path, device_map=None, **kwargs)"``.

    Defaults that are not plain values are written ``...``.

    Raises:
        ValueError, TypeError: it has no signature, or is not callable.
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

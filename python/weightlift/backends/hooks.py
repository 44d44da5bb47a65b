"""What a backend says of the functions of its library that it replaces."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

__all__ = [
    "ANY_SIGNATURE",
    "LIBRARIES",
    "WITHOUT_SIGNATURE",
    "Hook",
    "outside_of_graphs",
    "signature_text",
]

# That there are backends for.
LIBRARIES = ("diffusers", "transformers", "accelerate", "safetensors")
# In the place of a known signature: all are taken, as arguments are passed on as they are.
ANY_SIGNATURE = "(...)"
# Of a target that is no function.
WITHOUT_SIGNATURE = "without a signature"


class Hook(NamedTuple):
    """One function, method or class of a library, and what takes its place.

    Attributes:
        module: where it is defined, such as ``"diffusers.models.modeling_utils"``; hooked when
            this very module is imported.
        target: its name there, such as ``"ModelMixin._load_pretrained_model"``.
        adapters: known signature, as ``signature_text`` writes it, -> what makes the replacement
            from the original. Both are plain functions where the target is a classmethod or
            staticmethod. A replacement that is no function is put in place as it is, and asks
            ``is_enabled`` itself; a target that is none is ``WITHOUT_SIGNATURE``.
    """

    module: str
    target: str
    adapters: Mapping[str, Callable[[Any], Any]]

    def adapter(self, signature: str) -> Callable[[Any], Any] | None:
        """What makes the replacement of a function with this signature, if it is known."""
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

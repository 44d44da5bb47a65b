"""The model's own tensors, and their replacement."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from weightlift.module.parameters import ParameterRef, assign_parameter

__all__ = ["Originals", "assign", "parameter_like", "places"]


class Originals:
    """The tensors that a model had."""

    def __init__(self, refs: Iterable[ParameterRef]) -> None:
        self._places = [
            (module, key, ref.is_parameter, ref.tensor)
            for ref in refs
            for module, key in places(ref)
        ]

    def put_back(self) -> None:
        for module, key, is_parameter, tensor in self._places:
            if is_parameter:
                assign_parameter(module, key, tensor)  # type: ignore[arg-type]
            else:
                module._buffers[key] = tensor


def places(ref: ParameterRef) -> list[tuple[torch.nn.Module, str]]:
    return [(ref.module, ref.key), *((module, key) for _, module, key in ref.ties)]


def assign(ref: ParameterRef, made: torch.nn.Parameter) -> None:
    ref.tensor = made
    for module, key in places(ref):
        assign_parameter(module, key, made)


def parameter_like(old: torch.Tensor, value: torch.Tensor) -> torch.nn.Parameter:
    made = torch.nn.Parameter(value, old.requires_grad)
    vars(made).update({k: v for k, v in vars(old).items() if k not in _STREAMED_ATTRIBUTES})
    return made


_STREAMED_ATTRIBUTES = frozenset({"_weights", "_stored", "_shadow", "_is_param"})

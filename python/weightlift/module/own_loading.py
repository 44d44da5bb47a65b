"""Finds modules with their own loading: old names, hooks, counters, extra state."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from weightlift.module.parameters import Gathered

__all__ = ["Headers", "loads_itself", "modules_with_own_loading"]

Headers = Mapping[str, "tuple[str, tuple[int, ...]]"]


def modules_with_own_loading(
    model: torch.nn.Module, gathered: Gathered, headers: Headers
) -> list[tuple[str, torch.nn.Module]]:
    """(prefix, module) of the outermost modules whose ``load_state_dict`` does more than copy
    tensors to the same names.

    Args:
        model: the model.
        gathered: its modules.
        headers: the headers of the checkpoint.
    """
    if loads_itself(model) and _is_plain(model):
        return [("", model)]
    if not gathered.have_load_hooks and not any(map(_is_special, gathered.classes)):  # most models
        return []
    found: list[tuple[str, torch.nn.Module]] = []
    waiting: list[tuple[str, torch.nn.Module, frozenset[int]]] = [("", model, frozenset())]
    while waiting:
        prefix, module, parents = waiting.pop()
        if id(module) in parents:  # as gather() visits them
            continue
        if _has_own(module) and _matters(module, prefix, headers):
            found.append((prefix, module))
            continue
        if children := module._modules:
            parents |= {id(module)}
            for key, child in reversed(children.items()):
                if child is not None:
                    waiting.append((f"{prefix}{key}.", child, parents))
    return found


def loads_itself(module: torch.nn.Module) -> bool:
    """Whether the class has a ``load_state_dict`` of its own."""
    return type(module).load_state_dict is not _module_class().load_state_dict


def _module_class() -> type[torch.nn.Module]:
    from torch.nn import Module

    return Module


def _has_own(module: torch.nn.Module) -> bool:
    return bool(
        _is_special(type(module))
        or module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
    )


# Cached by class: a model has many modules of few classes. Weak, because classes may be deleted.
_special: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _is_special(kind: type[torch.nn.Module]) -> bool:
    known = _special.get(kind)
    if known is None:
        base = _module_class()
        known = _special[kind] = (
            kind._load_from_state_dict is not base._load_from_state_dict
            or kind.set_extra_state is not base.set_extra_state
        )
    return known


def _matters(module: torch.nn.Module, prefix: str, headers: Headers) -> bool:
    """Whether a module's own loading can change the result."""
    from torch.nn.modules.batchnorm import _NormBase

    kind = type(module)
    hooks = module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks
    # Of old checkpoints the counter is missing; nothing else is done.
    counts = kind._load_from_state_dict is _NormBase._load_from_state_dict
    if counts and not hooks and f"{prefix}num_batches_tracked" in headers:
        return False
    return _is_plain(module)


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether its tensors have torch's own classes. The plan cuts DTensors into parts (FSDP's hook
    on each module only makes DTensors), and quantizers make quantized tensors."""
    import torch
    from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

    known = (torch.nn.Parameter, UninitializedParameter, UninitializedBuffer, torch.Tensor)
    held = (tensor for part in module.modules() for tensor in _tensors_of(part))
    return all(type(tensor) in known for tensor in held)


def _tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    held = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in held if tensor is not None]

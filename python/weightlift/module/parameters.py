"""References to the parameters and buffers of a module, to read and replace them."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterable, Sequence, Set
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import weightlift._native as _native
from weightlift.core.errors import ArgumentError

if TYPE_CHECKING:
    import torch
    from torch.distributed.tensor import DTensor

__all__ = [
    "Gathered",
    "ParameterRef",
    "adopt_all",
    "assign_parameter",
    "check_module",
    "dtensor_types",
    "gather",
    "gather_resharded",
    "is_sharded",
    "is_streamed",
    "local_tensor",
    "parameter_refs",
    "set_all",
    "set_one",
    "streamed_refs",
]


class ParameterRef:
    """A parameter or buffer of the model, and all its places if it is tied."""

    # Not a dataclass, which takes half a millisecond of the import.
    __slots__ = (
        "held_by",
        "is_parameter",
        "key",
        "module",
        "name",
        "persistent",
        "tensor",
        "ties",
    )

    def __init__(
        self,
        tensor: torch.Tensor,
        is_parameter: bool,
        persistent: bool,
        name: str,
        module: torch.nn.Module,
        key: str,
        ties: tuple[tuple[str, torch.nn.Module, str], ...] = (),
        held_by: dict[str, Any] | None = None,
    ) -> None:
        self.tensor = tensor
        self.is_parameter = is_parameter
        self.persistent = persistent
        self.name = name
        self.module = module
        self.key = key
        self.ties = ties
        # The dict of the module that holds the tensor, if assignments to it may bypass the module.
        self.held_by = held_by

    def __repr__(self) -> str:
        kind = "parameter" if self.is_parameter else "buffer"
        return f"<ParameterRef to the {kind} {self.name!r}>"

    @property
    def names(self) -> list[str]:
        return [self.name, *(name for name, _, _ in self.ties)]


def check_module(model: object, call: str, *, alone: bool = False) -> None:
    """Checks what a call takes for a model; ``alone``: it takes nothing else.

    Raises:
        ArgumentError: it is no module; the text says what may have been meant.
    """
    import torch

    if isinstance(model, torch.nn.Module):
        return
    if isinstance(model, type):
        raise ArgumentError(f"{call} takes a model, not the class {model.__name__}: make one of it")
    first = "" if alone else " first"
    swapped = not alone and isinstance(model, (str, os.PathLike))
    hint = ": have two arguments changed places?" if swapped else ""
    raise ArgumentError(f"{call} takes a model{first}, not {type(model).__name__}{hint}")


def parameter_refs(model: torch.nn.Module) -> list[ParameterRef]:
    """All parameters and buffers, each once, in the order of ``named_modules``."""
    return list(gather_resharded(model).refs)


class Gathered(NamedTuple):
    """The tensors and the modules of a model, in the order of ``named_modules``.

    Attributes:
        refs: the parameters and buffers, each once.
        modules: the modules; one in several places appears once for each.
        classes: their classes.
        have_load_hooks: whether one has a hook for ``load_state_dict``.
        have_ties: whether a tensor has several places.
    """

    refs: Sequence[ParameterRef]
    modules: Sequence[torch.nn.Module]
    classes: Set[type[torch.nn.Module]]
    have_load_hooks: bool
    have_ties: bool


def gather_resharded(model: torch.nn.Module) -> Gathered:
    """As ``gather``; FSDP's parameters are sharded afterwards."""
    gathered = gather(model)
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp and any(issubclass(kind, fsdp.FSDPModule) for kind in gathered.classes):
        for module in gathered.modules:  # between passes a root may hold unsharded parameters
            if isinstance(module, fsdp.FSDPModule):
                module.reshard()
        return gather(model)
    return gathered


def gather(model: torch.nn.Module) -> Gathered:
    """The tensors and the modules of a model.

    Visits each place once, and asks there for all that a load wants to know: a large model is not
    in the processor's caches, so that a second visit takes as long. ``named_modules`` takes one
    generator step for every level above a module.
    """
    import torch

    columns, ties, modules, classes, have_load_hooks = _native.module_tensors(
        model, torch.nn.Module.__setattr__
    )
    *_, held_by = columns
    refs = list(map(ParameterRef, *columns[:6], itertools.repeat(()), held_by))
    for index, name, module, key in ties:
        refs[index].ties += ((name, module, key),)
    return Gathered(refs, modules, classes, have_load_hooks, bool(ties))


def set_one(
    ref: ParameterRef, value: torch.Tensor, memory_format: torch.memory_format | None
) -> None:
    set_all([(ref, value)], memory_format)


def set_all(
    values: Iterable[tuple[ParameterRef, torch.Tensor]],
    memory_format: torch.memory_format | None = None,
    *,
    adopt: bool = False,
) -> None:
    """Sets tensors of the same shapes: replaces tensors on ``meta``, sets the ``.data`` of real
    parameters.

    Args:
        values: references and their tensors.
        memory_format: of those with 4 dimensions.
        adopt: nobody else has the tensors, which are contiguous, nor views them: they may become
            parameters themselves.
    """
    import torch

    kinds = dtensor_types()
    parameter, plain = torch.nn.Parameter, torch.nn.Module.__setattr__
    for ref, value in values:
        if memory_format is not None and value.dim() == 4:
            value = value.contiguous(memory_format=memory_format)
        elif not (adopt or value.is_contiguous()):
            value = value.contiguous()
        old = ref.tensor
        if value.dim() != old.dim():  # shape [1] for a scalar
            value = value.reshape(old.shape)
        new: Any = value
        if kinds and is_sharded(old):
            new = _sharded(ref, value, old)
            if not old.is_meta:
                torch.utils.swap_tensors(old, new)  # type: ignore[no-untyped-call]
                continue
        elif ref.is_parameter:
            if not (old.is_meta or value.is_meta):
                old.data = value
                continue
            requires_grad = old.requires_grad and (value.is_floating_point() or value.is_complex())
            if type(old) is parameter:
                if adopt and type(value) is torch.Tensor:
                    # As in torch's UninitializedParameter.materialize; takes half the time of a
                    # new tensor on the same memory.
                    value.__class__ = parameter
                    new.requires_grad = requires_grad
                else:
                    new = parameter(value, requires_grad)
                if old.__dict__:
                    new.__dict__.update(old.__dict__)
            else:
                new = type(old)(value, requires_grad=requires_grad, **old.__dict__)  # type: ignore[call-overload]
        ref.tensor = new
        _assign_everywhere(ref, new, plain)


def adopt_all(
    members: Iterable[tuple[str, ParameterRef]], take: Callable[[str], torch.Tensor]
) -> None:
    """As ``set_all`` with ``adopt``, for plain parameters on ``meta`` and floating-point tensors of
    their shapes: there is little to ask for each, which takes half the time.

    Args:
        members: (name of the tensor, reference).
        take: the tensor of a name.
    """
    import torch

    parameter, plain = torch.nn.Parameter, torch.nn.Module.__setattr__
    for name, ref in members:
        value, old = take(name), ref.tensor
        value.__class__ = parameter
        if old.requires_grad:
            value.requires_grad = True
        if old.__dict__:
            value.__dict__.update(old.__dict__)
        ref.tensor = value
        if ref.held_by is not None and not ref.ties:
            ref.held_by[ref.key] = value
        else:
            _assign_everywhere(ref, value, plain)


def assign_parameter(module: torch.nn.Module, key: str, parameter: torch.nn.Parameter) -> None:
    """Sets exactly this parameter, also if another library has replaced
    ``register_parameter``."""
    import torch

    _assign(module, key, True, parameter, torch.nn.Module.__setattr__)


def _assign_everywhere(ref: ParameterRef, new: torch.Tensor, plain: Any) -> None:
    _assign(ref.module, ref.key, ref.is_parameter, new, plain)
    for _, other, key in ref.ties:
        _assign(other, key, ref.is_parameter, new, plain)


def _assign(module: torch.nn.Module, key: str, is_parameter: bool, new: Any, plain: Any) -> None:
    if type(module).__setattr__ is plain:
        (module._parameters if is_parameter else module._buffers)[key] = new
    else:  # modules such as RNNs keep a list of their weights
        setattr(module, key, new)
        # A replaced register_parameter may have made another object of it.
        (module._parameters if is_parameter else module._buffers)[key] = new


def _sharded(ref: ParameterRef, value: torch.Tensor, old: DTensor) -> torch.Tensor:
    """A DTensor like the reference's, with this local part."""
    import torch

    from weightlift.module.dtensors import from_local

    new: torch.Tensor = from_local(value, old)
    if ref.is_parameter:
        new = torch.nn.Parameter(new, requires_grad=old.requires_grad and value.is_floating_point())
    new.__dict__.update({k: v for k, v in old.__dict__.items() if k not in new.__dict__})
    return new


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    if not is_sharded(tensor):
        return tensor.detach()
    from weightlift.module.dtensors import local_of

    return local_of(tensor)


def is_sharded(tensor: torch.Tensor) -> TypeGuard[DTensor]:
    return isinstance(tensor, dtensor_types())


def is_streamed(tensor: torch.Tensor) -> bool:
    """Whether a tensor has no memory and reads its values at each use."""
    streamed = _streamed_module()
    return streamed is not None and isinstance(tensor, streamed.StreamedWeight)


def streamed_refs(refs: Iterable[ParameterRef]) -> list[ParameterRef]:
    """The references to streamed tensors."""
    return [] if _streamed_module() is None else [ref for ref in refs if is_streamed(ref.tensor)]


def _streamed_module() -> Any:
    """The module of StreamedWeight, if imported."""
    return sys.modules.get("weightlift.module.streaming.streamed_weight")


def dtensor_types() -> tuple[type[DTensor], ...]:
    """DTensor, if imported."""
    tensors = sys.modules.get("torch.distributed.tensor")
    return () if tensors is None else (tensors.DTensor,)

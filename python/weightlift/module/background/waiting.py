"""The hook and the dicts of a module that waits for its tensors."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from weightlift.module.parameters import ParameterRef

if TYPE_CHECKING:
    import torch

__all__ = ["Awaited", "Brings", "Interest", "Waiting", "WaitingTensors", "tensors_to_come"]


class Brings(Protocol):
    """The load; ``load.BackgroundLoad``.

    Attributes:
        lock: guards what the modules have.
    """

    lock: threading.RLock

    def bring(self, awaited: Sequence[Awaited]) -> None:
        """Waits for tensors, and gives them to their modules."""


class Awaited:
    """A tensor of the model that has not arrived.

    Attributes:
        source: its name in the checkpoint.
        meta: the meta tensor in its place.
        device: its future device.
        dtype: its future dtype.
        places: the modules that wait for it, and its key in each.
        has_arrived: the modules have the tensor.
        is_attaching: the modules are about to get it.
        value: the arrived tensor, until the modules get it.
    """

    __slots__ = (
        "device",
        "dtype",
        "has_arrived",
        "is_attaching",
        "is_parameter",
        "meta",
        "name",
        "places",
        "source",
        "value",
    )

    def __init__(
        self, source: str, ref: ParameterRef, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.source = source
        self.name = ref.name
        self.meta = ref.tensor
        self.is_parameter = ref.is_parameter
        self.device = device
        self.dtype = dtype
        self.places: list[tuple[weakref.ref[Waiting], str]] = []
        self.has_arrived = False
        self.is_attaching = False
        self.value: torch.Tensor | None = None

    def forget(self) -> None:
        """Removes it from the modules that wait for it. Requires the load's lock."""
        for place, key in self.places:
            waiting = place()
            if waiting is not None and waiting.awaited.get((self.is_parameter, key)) is self:
                waiting.forget(self.is_parameter, key)

    @property
    def is_wanted(self) -> bool:
        """Whether some module that waits for it is there."""
        return any(place() is not None for place, _ in self.places)

    def ref(self) -> ParameterRef | None:
        """Its current places; ``None`` if no module needs it any more."""
        found: list[tuple[str, torch.nn.Module, str]] = []
        for place, key in self.places:
            waiting = place()
            module = None if waiting is None else waiting.module()
            if waiting is None or module is None:
                continue
            if waiting.awaited.get((self.is_parameter, key)) is self:
                found.append((self.name, module, key))
        if not found:
            return None
        (name, module, key), *ties = found
        return ParameterRef(self.meta, self.is_parameter, True, name, module, key, tuple(ties))


class Interest:
    """A token shared by all waiting modules: when it is deleted, no module waits."""

    __slots__ = ("__weakref__",)


class Waiting:
    """The tensors that one module waits for; also its forward pre-hook."""

    __slots__ = ("__weakref__", "awaited", "handle", "interest", "load", "module")

    # torch.compile runs the hook without tracing it.
    _torchdynamo_disable = True

    def __init__(self, load: Brings, interest: Interest, module: torch.nn.Module) -> None:
        self.load = load
        self.interest: Interest | None = interest
        self.module = weakref.ref(module)
        # (is a parameter, key) -> tensor.
        self.awaited: dict[tuple[bool, str], Awaited] = {}
        self.handle: Any = None

    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        self.load.bring(list(self.awaited.values()))

    def watch(self, module: torch.nn.Module) -> None:
        """Makes the module wait from now on."""
        held = vars(module)
        for is_parameter, name in ((True, "_parameters"), (False, "_buffers")):
            if any(is_parameter == kind for kind, _ in self.awaited):
                held[name] = WaitingTensors(held[name], self, is_parameter)
        self.handle = module.register_forward_pre_hook(self, prepend=True)

    def forget(self, is_parameter: bool, key: str) -> None:
        """A tensor has arrived, or is not needed any more. Requires the load's lock."""
        self.awaited.pop((is_parameter, key), None)
        if not self.awaited:
            self._release()

    def _release(self) -> None:
        """Removes the hook and the waiting dicts."""
        module = self.module()
        if module is not None:
            for name in ("_parameters", "_buffers"):
                tensors = vars(module)[name]
                if isinstance(tensors, WaitingTensors) and tensors.waiting is self:
                    vars(module)[name] = tensors.settle()
        if self.handle is not None:
            self.handle.remove()
        self.interest = None


class WaitingTensors(dict[str, Any]):
    """``_parameters`` or ``_buffers`` of a waiting module: reading a tensor waits for it.

    When all tensors have arrived, it forwards to the plain dict that replaced it, for code that
    still holds a reference.
    """

    __slots__ = ("is_parameters", "plain", "waiting")

    def __init__(self, tensors: Mapping[str, Any], waiting: Waiting, is_parameters: bool) -> None:
        super().__init__(tensors)
        self.waiting = waiting
        self.is_parameters = is_parameters
        self.plain: dict[str, Any] | None = None

    def settle(self) -> dict[str, Any]:
        if self.plain is None:
            self.plain = dict(dict.items(self))
        return self.plain

    def awaited(self, key: str) -> Awaited | None:
        return self.waiting.awaited.get((self.is_parameters, key))

    def bring(self) -> dict[str, Any]:
        """Waits for all tensors; returns a copy."""
        for key in self:
            self[key]
        return dict(dict.items(self)) if self.plain is None else dict(self.plain)

    def __getitem__(self, key: str) -> Any:
        if (awaited := self.awaited(key)) is not None:
            self.waiting.load.bring([awaited])
        return dict.__getitem__(self, key) if self.plain is None else self.plain[key]

    def __setitem__(self, key: str, value: Any) -> None:
        with self.waiting.load.lock:
            dict.__setitem__(self, key, value)
            if self.plain is not None:
                self.plain[key] = value
            self.waiting.forget(self.is_parameters, key)

    def __delitem__(self, key: str) -> None:
        with self.waiting.load.lock:
            if self.plain is None:
                dict.__delitem__(self, key)
            else:
                del self.plain[key]
                dict.pop(self, key, None)  # other code may have added the key
            self.waiting.forget(self.is_parameters, key)

    # Defined in Python, so that dict() and ** call __getitem__.
    def __iter__(self) -> Iterator[str]:
        return iter(list(dict.keys(self) if self.plain is None else self.plain.keys()))

    def __len__(self) -> int:
        return dict.__len__(self) if self.plain is None else len(self.plain)

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, key) if self.plain is None else key in self.plain

    # dict's own methods would bypass the methods above.
    keys = MutableMapping.keys  # type: ignore[assignment]
    items = MutableMapping.items  # type: ignore[assignment]
    values = MutableMapping.values  # type: ignore[assignment]
    get = MutableMapping.get  # type: ignore[assignment]
    popitem = MutableMapping.popitem
    setdefault = MutableMapping.setdefault
    update = MutableMapping.update
    clear = MutableMapping.clear

    def pop(self, key: str, *default: Any) -> Any:
        if default and key not in self:
            return default[0]
        value = self[key]
        del self[key]
        return value

    def copy(self) -> dict[str, Any]:
        return self.bring()

    def __or__(self, other: Any) -> Any:
        return self.bring() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.bring()

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __copy__(self) -> dict[str, Any]:
        return self.bring()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self.bring(), memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return dict, (self.bring(),)


def tensors_to_come(
    model: torch.nn.Module, kind: Literal["_parameters", "_buffers"] = "_parameters"
) -> Iterator[tuple[str, torch.device, torch.dtype]]:
    """(name, device, dtype) of the parameters or buffers, final values, without a wait."""
    for prefix, module in model.named_modules():
        tensors = vars(module)[kind]
        for key, tensor in dict.items(tensors):
            if tensor is None:
                continue
            awaited = tensors.awaited(key) if isinstance(tensors, WaitingTensors) else None
            held = tensor if awaited is None else awaited
            yield f"{prefix}.{key}" if prefix else key, held.device, held.dtype

"""Tensors without storage that replace a checkpoint's tensors while loading code runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch

__all__ = ["TAKE_BYTES", "Geometry", "Ledger", "Memory", "Placeholder", "flat", "geometry_of"]

# Functions that read the bytes without an operator.
TAKE_BYTES: frozenset[Any] = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        "__array__",
        "__deepcopy__",
        "__dlpack__",
        "__format__",
        "__reduce_ex__",
        "data_ptr",
        "is_shared",
        "numpy",
        "share_memory_",
        "storage",
        "tolist",
        "untyped_storage",
        "_typed_storage",
    )
)

# (shape, strides, offset), in elements
Geometry: TypeAlias = "tuple[tuple[int, ...], tuple[int, ...], int]"


def geometry_of(tensor: torch.Tensor) -> Geometry:
    return tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset())


class Memory:
    """The storage shared by the views of one tensor: a tensor of the checkpoint, or a copy of a
    part of it.

    Attributes:
        name: the checkpoint's tensor.
        source: a meta tensor of the file's dtype that shows the place of its elements there.
        dtype: the dtype of its elements, which differs from the file's after a cast.
        geometry: its geometry.
        device: the device that it reports.
        value: the bytes, after the first request.
    """

    __slots__ = ("device", "dtype", "geometry", "name", "source", "value")

    def __init__(
        self,
        name: str,
        source: torch.Tensor,
        dtype: torch.dtype,
        geometry: Geometry,
        device: torch.device,
    ) -> None:
        self.name = name
        self.source = source
        self.dtype = dtype
        self.geometry = geometry
        self.device = device
        self.value: torch.Tensor | None = None

    def part_of(self, value: torch.Tensor) -> torch.Tensor:
        """These elements of the checkpoint's real tensor."""
        shape, strides, offset = geometry_of(self.source)
        if self.source.dtype != value.dtype:
            value = value.view(self.source.dtype)
        return value.as_strided(shape, strides, value.storage_offset() + offset)

    def duplicate(
        self, source: torch.Tensor, dtype: torch.dtype, geometry: Geometry, device: torch.device
    ) -> Memory:
        """The memory of a copy of a part."""
        return Memory(self.name, source, dtype, geometry, device)


class Ledger(Protocol):
    """Handles the operations on placeholders and on their targets."""

    def after(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handles a placeholder in an operator outside the modes."""

    def materialize(self, tensor: Placeholder, why: str) -> None:
        """Turns this object into a tensor with bytes."""

    def derive(
        self, memory: Memory, source: torch.Tensor, dtype: torch.dtype, geometry: Geometry
    ) -> Placeholder:
        """Another view of a memory."""

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Handles an operator in the recorded thread."""

    def expose(self, tensor: torch.Tensor) -> None:
        """Does what waits for the memory of a tensor, which others may write to unseen from now on:
        through NumPy's view of it, ..."""

    def is_target(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a target on ``meta`` that will become real."""

    def overwrite(
        self, tensor: torch.Tensor, write: Callable[[torch.Tensor], object], *, constant: bool
    ) -> None:
        """Overwrites a part of a target.

        Args:
            tensor: the part.
            write: writes it.
            constant: whether ``write`` can be repeated later with the same result.
        """

    def read(self, memories: Sequence[Memory], why: str) -> None:
        """Reads the bytes of these memories at once."""

    def real(self, tensor: Placeholder, why: str) -> torch.Tensor:
        """The tensor with its bytes."""

    def record(self, tensor: torch.Tensor, source: Placeholder) -> str | None:
        """Records a copy, or returns the reason why that is impossible."""

    def set_data(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """``tensor.data = value`` with a placeholder."""

    def settle(self, tensor: torch.Tensor, *, write: bool = False) -> torch.Tensor:
        """Runs the writes that wait for a tensor's memory. Returns the tensor, or its real tensor
        if it is on ``meta``.

        Args:
            tensor: the tensor that an operator will read.
            write: whether the operator writes to it too.
        """


class Placeholder(torch.Tensor):
    """A tensor of a checkpoint, or a view of one, with a shape, strides and a dtype but no bytes.
    An operation that needs bytes reads the whole tensor once.

    Attributes:
        memory: the memory shared with its views.
        source: a meta tensor of its shape that shows its elements in the checkpoint's tensor.
        ledger: handles operations on it.
    """

    memory: Memory
    source: torch.Tensor
    ledger: Ledger

    @staticmethod
    def __new__(
        cls,
        ledger: Ledger,
        memory: Memory,
        source: torch.Tensor,
        dtype: torch.dtype,
        geometry: Geometry,
    ) -> Placeholder:
        shape, strides, offset = geometry
        made: Placeholder = torch.Tensor._make_wrapper_subclass(
            cls,
            shape,
            strides=strides,
            storage_offset=offset,
            dtype=dtype,
            device=memory.device,
        )
        # An extension that takes the address gets an error instead of a null pointer.
        torch._C._set_throw_on_mutable_data_ptr(made)
        return made

    def __init__(
        self,
        ledger: Ledger,
        memory: Memory,
        source: torch.Tensor,
        dtype: torch.dtype,
        geometry: Geometry,
    ) -> None:
        self.ledger = ledger
        self.memory = memory
        self.source = source

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in TAKE_BYTES:
            return func(*(_with_bytes(func, arg) for arg in args), **(kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Called outside the mode: after the recording, or in another thread."""
        ledger = next(arg.ledger for arg in flat(args, kwargs) if isinstance(arg, Placeholder))
        return ledger.after(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.ledger.real(self, "repr()"))

    def with_bytes(self) -> torch.Tensor:
        """The elements with bytes: a view of the memory's value."""
        value = self.memory.value
        if value is None:
            raise RuntimeError(f"{self.memory.name!r} was not read")  # a bug in this package
        if value.dtype != self.dtype:
            value = value.view(self.dtype)  # of the same size
        shape, strides, offset = geometry_of(self)
        return value.as_strided(shape, strides, value.storage_offset() + offset)


def _with_bytes(func: Any, value: object) -> object:
    if isinstance(value, Placeholder):
        return value.ledger.real(value, f"{getattr(func, '__name__', func)}()")
    return value


def flat(args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> list[torch.Tensor]:
    """The tensors among the arguments of an operator, including those in lists."""
    found: list[torch.Tensor] = []
    for arg in args if not kwargs else (*args, *kwargs.values()):
        if isinstance(arg, torch.Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found.extend(item for item in arg if isinstance(item, torch.Tensor))
    return found

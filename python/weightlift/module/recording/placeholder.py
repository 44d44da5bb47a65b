"""Tensors without storage, which stand for those of a checkpoint while loading code runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch

__all__ = ["TAKE_BYTES", "Geometry", "Ledger", "Memory", "Placeholder", "flat", "geometry_of"]

# Functions that look at the bytes without an operator that the dispatcher would see.
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
    """What the views of one tensor share, as its storage would be: a tensor of the checkpoint, or a
    copy of a part of one.

    Attributes:
        name: of the checkpoint's tensor.
        source: where its elements lie in that tensor: a meta tensor of the file's dtype.
        dtype: of the elements here: another than the file's in a copy that casts.
        geometry: of the whole of it, here.
        device: where the loading code believes it to be.
        value: the bytes, from when somebody has asked for them.
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
        """The elements of this in the checkpoint's tensor, which has its bytes."""
        shape, strides, offset = geometry_of(self.source)
        if self.source.dtype != value.dtype:
            value = value.view(self.source.dtype)
        return value.as_strided(shape, strides, value.storage_offset() + offset)

    def duplicate(
        self, source: torch.Tensor, dtype: torch.dtype, geometry: Geometry, device: torch.device
    ) -> Memory:
        """A copy of a part of it."""
        return Memory(self.name, source, dtype, geometry, device)


class Ledger(Protocol):
    """Who is told what becomes of placeholders, and of what they are written to."""

    def after(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A placeholder in an operator that no mode saw."""

    def materialize(self, tensor: Placeholder, why: str) -> None:
        """The very object becomes a tensor with bytes."""

    def derive(
        self, memory: Memory, source: torch.Tensor, dtype: torch.dtype, geometry: Geometry
    ) -> Placeholder:
        """Another view of a memory."""

    def dispatch(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator in the thread that is recorded."""

    def expose(self, tensor: torch.Tensor) -> None:
        """Does what waits for the memory of a tensor, which others may write to unseen from now on:
        through NumPy's view of it, ..."""

    def is_target(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is on ``meta`` now and will be real."""

    def overwrite(
        self, tensor: torch.Tensor, write: Callable[[torch.Tensor], object], *, constant: bool
    ) -> None:
        """Writes to a part of a target without looking at what was there.

        Args:
            tensor: the part.
            write: does it.
            constant: and does the same at any later time.
        """

    def read(self, memories: Sequence[Memory], why: str) -> None:
        """Gives bytes to these, by one read."""

    def real(self, tensor: Placeholder, why: str) -> torch.Tensor:
        """The tensor with its bytes."""

    def record(self, tensor: torch.Tensor, source: Placeholder) -> str | None:
        """Notes a copy; else says why it cannot be one."""

    def set_data(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """``tensor.data = value``, for what stands for others."""

    def settle(self, tensor: torch.Tensor, *, write: bool = False) -> torch.Tensor:
        """Does what waits for the memory of a tensor; returns the tensor, or the real one for one
        on ``meta``.

        Args:
            tensor: that an operator is about to look at.
            write: and to write to.
        """


class Placeholder(torch.Tensor):
    """A tensor of a checkpoint, or a view of one, that has a shape, strides and a dtype but no
    bytes. Whoever needs these gets them by one read of the whole tensor.

    Attributes:
        memory: what it shares with its views.
        source: which of the checkpoint's elements it shows: a meta tensor of its shape.
        ledger: whom operations on it are told.
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
        """Outside the mode: after the recording, or in another thread."""
        ledger = next(arg.ledger for arg in flat(args, kwargs) if isinstance(arg, Placeholder))
        return ledger.after(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.ledger.real(self, "repr()"))

    def with_bytes(self) -> torch.Tensor:
        """The same elements with bytes, once the memory has some: a view of its value."""
        value = self.memory.value
        if value is None:
            raise RuntimeError(f"{self.memory.name!r} was not read")  # a fault of our own
        if value.dtype != self.dtype:
            value = value.view(self.dtype)  # of the same size
        shape, strides, offset = geometry_of(self)
        return value.as_strided(shape, strides, value.storage_offset() + offset)


def _with_bytes(func: Any, value: object) -> object:
    if isinstance(value, Placeholder):
        return value.ledger.real(value, f"{getattr(func, '__name__', func)}()")
    return value


def flat(args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> list[torch.Tensor]:
    """The tensors among the arguments of an operator, those in its lists too."""
    found: list[torch.Tensor] = []
    for arg in args if not kwargs else (*args, *kwargs.values()):
        if isinstance(arg, torch.Tensor):
            found.append(arg)
        elif isinstance(arg, (list, tuple)):
            found.extend(item for item in arg if isinstance(item, torch.Tensor))
    return found

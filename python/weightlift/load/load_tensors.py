"""Loads tensors to one device, from a checkpoint or from host memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import weightlift._native as _native
from weightlift.core import dtypes
from weightlift.core.report import record
from weightlift.core.settings import Settings
from weightlift.load.allocation import Allocator, TorchAllocator
from weightlift.load.load_plan import LoadPlan
from weightlift.load.options import LoadOptions
from weightlift.load.plans import (
    POLL_SECONDS,
    cancel_plan,
    finish_plan,
    new_plan,
    run_plan,
    start_plan,
)

if TYPE_CHECKING:
    import torch

    from weightlift.checkpoint.checkpoint import Checkpoint

__all__ = ["begin_writing_to_device", "copy_to_device", "load_tensors"]


def load_tensors(
    checkpoint: Checkpoint,
    device: torch.device,
    options: LoadOptions = LoadOptions(),
    *,
    dtype: str | None = None,
    names: Sequence[str] | None = None,
    shared: bool = False,
    allocator: Allocator | None = None,
) -> dict[str, Any]:
    """Loads tensors of a checkpoint to one device, in the order of the files; see ``LoadPlan``.

    Args:
        checkpoint: the checkpoint.
        device: the device, with its index filled in.
        options: how to load.
        dtype: the file's name of the dtype to cast floating-point tensors to.
        names: the tensors; all by default.
        shared: other loads may map the same tensors of ``checkpoint`` while these are alive.
        allocator: allocates memory on CUDA devices; torch by default.
    """
    plan = LoadPlan(checkpoint, options, shared=shared, allocator=allocator)
    plan.add(device, dtype, names)
    return plan.start().result()


def copy_to_device(
    tensors: Mapping[str, torch.Tensor],
    device: torch.device,
    dtype: str | None = None,
    *,
    settings: Settings | None = None,
    allocator: Allocator | None = None,
    caller: str = "weightlift",
) -> dict[str, Any]:
    """Copies contiguous CPU tensors to a CUDA device, through the staging ring.

    Args:
        tensors: tensors of dtypes that the format has; they must not change meanwhile.
        device: the device, with its index filled in.
        dtype: the file's name of the dtype to cast to, where the engine has the cast.
        settings: replaces the current settings.
        allocator: allocates memory on CUDA devices; torch by default.
        caller: the name in ``stats().by_caller``.
    """
    plan = new_plan(settings or Settings.current(), dtype)
    allocator = allocator or TorchAllocator()
    sources = [dtypes.file_name(tensor.dtype) for tensor in tensors.values()]
    found = [source for source in sources if source is not None]
    targets = [dtype if dtype and own in dtypes.CASTABLE else own for own in found]
    # An F4 element of torch is two elements of the format.
    doubled = [2 if own == "F4" else 1 for own in found]
    shapes = [
        (*t.shape[:-1], t.shape[-1] * n) if n != 1 else tuple(t.shape)
        for t, n in zip(tensors.values(), doubled, strict=True)
    ]
    sizes = [
        t.numel() * dtypes.to_torch(target).itemsize
        for t, target in zip(tensors.values(), targets, strict=True)
    ]
    allocator.reserve(device.index, sizes)
    made = [
        allocator.empty(device.index, shape, target)
        for shape, target in zip(shapes, targets, strict=True)
    ]
    plan.copy_memory(
        _native.HostTensors(
            list(tensors),
            [tensor.data_ptr() for tensor in tensors.values()],
            [tensor.numel() * n for tensor, n in zip(tensors.values(), doubled, strict=True)],
            found,
        ),
        _native.Targets(device.index, [address for address, _ in made], targets),
    )
    plan.use_stream(device.index, allocator.stream(device.index))
    record(run_plan(plan, allocator), caller=caller)
    return {name: owner for name, (_, owner) in zip(tensors, made, strict=True)}


def begin_writing_to_device(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    *,
    caller: str = "weightlift",
    allocator: Allocator | None = None,
    device: int | None = None,
) -> Callable[[], None]:
    """Copies contiguous CPU tensors into contiguous ones on one CUDA device, through the ring.
    Returns when all copies are queued, behind which the current stream of the device then waits.

    Args:
        pairs: (source, target) of the same shape, with the same dtype or dtypes that the engine
            casts between. The sources must not change meanwhile.
        caller: the name in ``stats().by_caller``.
        allocator: gives the current stream; torch's by default.
        device: the number of the device, if the targets do not tell it.

    Returns:
        A function that waits for the end of the copies. Call it once.
    """
    sources = [source for source, _ in pairs]
    targets = [target for _, target in pairs]
    own = [str(dtypes.file_name(source.dtype)) for source in sources]
    wanted = [str(dtypes.file_name(target.dtype)) for target in targets]
    narrow = next((name for name in wanted if name.startswith("F8")), None)
    plan = new_plan(Settings.current(), narrow)
    allocator = allocator or TorchAllocator()
    index = targets[0].device.index if device is None else device
    plan.copy_memory(
        _native.HostTensors(
            [str(number) for number in range(len(pairs))],
            [source.data_ptr() for source in sources],
            [source.numel() for source in sources],
            own,
        ),
        _native.Targets(index, [target.data_ptr() for target in targets], wanted),
    )
    stream = allocator.stream(index)
    plan.use_stream(index, stream)
    numbers = list(range(len(pairs)))
    plan.order(numbers)
    start_plan(plan, allocator)
    try:
        while not plan.wait_for_on_stream(numbers, index, stream, POLL_SECONDS):
            pass
    except BaseException:
        cancel_plan(plan)
        raise

    return functools.partial(_finish_writing, plan, caller, pairs)


def _finish_writing(plan: _native.Plan, caller: str, _pairs: object) -> None:
    """``_pairs``: the engine knows them by their addresses alone."""
    record(finish_plan(plan), caller=caller)

"""``stream``: runs a model within a budget of weight memory on its device."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.open_checkpoint import open_without_arguments
from weightlift.core.devices import loadable_device
from weightlift.core.errors import ArgumentError
from weightlift.core.sizes import parse_size
from weightlift.module.parameters import (
    ParameterRef,
    check_module,
    is_sharded,
    is_streamed,
    parameter_refs,
)
from weightlift.module.streaming.begin import of_a_checkpoint, of_the_host
from weightlift.module.streaming.device_side import device_side
from weightlift.module.streaming.handle import StreamHandle
from weightlift.module.streaming.originals import Originals

__all__ = ["stream"]


def stream(
    model: torch.nn.Module,
    checkpoint: Checkpoint | str | os.PathLike[str] | None = None,
    *,
    device: torch.device | str | int,
    memory: int | str,
    dtype: torch.dtype | str | None = None,
    lookahead: int = 2,
) -> StreamHandle:
    """Runs a model within a budget of weight memory on its device; reads the other weights ahead of
    their use.

    The weights that stay on the device are chosen by their bytes and by how often a step uses them.
    A thread reads the others from their source (the checkpoint's files, or the model's host
    tensors) ahead of the computation into a few buffers that it uses again and again, with a cast
    if needed. It learns the order while the model runs; a wrong prediction causes a wait. Nothing
    is written, and there is no second copy of the model.

    Streamed weights are read-only: training them is an error; adapters on top of them (LoRA) can be
    trained. Their tensors have the right shape, dtype and device; a deep copy of the model streams
    too, a pickle has the values. The model cannot be moved or cast until the handle is closed. The
    caller moves the inputs to ``device``.

    Args:
        model: a module on ``meta``, or, without a checkpoint, with its tensors on the CPU.
        checkpoint: a ``Checkpoint``, or what ``open_checkpoint`` takes. ``None`` streams the
            model's own tensors, which must not change meanwhile; on the CPU, those that ``dtype``
            casts.
        device: the device of the computation: the CPU or a CUDA device.
        memory: bytes that weights may take on ``device``, buffers included, such as ``"2GB"``.
        dtype: the dtype of floating-point tensors on ``device``, as in ``load_into``.
        lookahead: the number of blocks to read ahead.

    Returns:
        A handle, which is a context manager; closing it restores the model's tensors.

    Raises:
        ArgumentError: the memory is too small (the text names the layer and the smallest budget),
            or the model cannot be streamed.
        CheckpointError: the checkpoint does not fit the model.
        DeviceError: the device does not exist, or cannot be streamed to.
        ReadError: a file cannot be read; raised later by the operation that needs it.
    """
    check_module(model, "stream")
    budget = _checked_budget(memory, lookahead)
    side = device_side(loadable_device(device))
    refs = parameter_refs(model)
    _check_model(model, refs)
    restore = Originals(refs)
    try:
        # The tensors made here must work in any mode, and autograd cannot save inference tensors.
        with torch.inference_mode(False):
            if checkpoint is None:
                task = of_the_host(model, refs, side, budget, dtype, lookahead)
            else:
                if not isinstance(checkpoint, Checkpoint):
                    checkpoint = open_without_arguments(checkpoint)
                task = of_a_checkpoint(model, refs, checkpoint, side, budget, dtype, lookahead)
            task.install()
            return StreamHandle(task, restore)
    except BaseException:
        restore.put_back()
        raise


def _checked_budget(memory: int | str, lookahead: int) -> int:
    budget = parse_size(memory, "memory")
    if budget <= 0:
        raise ArgumentError(f"memory is {memory!r}; it must be more than 0 bytes, such as '2GB'")
    if not isinstance(lookahead, int) or isinstance(lookahead, bool) or lookahead < 0:
        raise ArgumentError(f"lookahead is {lookahead!r}; it must be 0 or more blocks")
    return budget


def _check_model(model: torch.nn.Module, refs: Sequence[ParameterRef]) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError("a TorchScript module cannot be streamed: its code holds its weights")
    for ref in refs:
        if is_streamed(ref.tensor):
            raise ArgumentError(f"tensor {ref.name!r} is already streamed: close its handle first")
        if is_sharded(ref.tensor):
            raise ArgumentError(
                f"tensor {ref.name!r} is a DTensor, which cannot be streamed: give a model that is "
                "not sharded"
            )
    for name, module in model.named_modules():
        if "_hf_hook" in vars(module):
            raise ArgumentError(
                f"{name or type(model).__name__!r} has accelerate's hooks, which move weights too: "
                "call accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
            )

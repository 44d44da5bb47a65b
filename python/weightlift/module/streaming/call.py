"""``stream``: a model runs with a budget of weights on its device."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.core.devices import loadable_device
from weightlift.core.errors import ArgumentError
from weightlift.core.sizes import parse_size
from weightlift.module.parameters import ParameterRef, is_sharded, is_streamed, parameter_refs
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
    """Runs a model with a budget of weights on its device; the rest is read ahead of its use.

    What stays on the device is chosen by bytes, and by how often a step uses it. The rest is read
    from where it lies (the checkpoint's own files, or the host tensors of the model) into a few
    buffers that are used again and again, cast on the way, by a thread that runs ahead of the
    computing. The order is learned while the model runs; a wrong guess is a wait. Nothing is
    written, and no second copy of the model is made.

    Weights that are streamed are read-only: training them is an error; adapters on top of them
    (LoRA) can be trained. Their tensors tell shape, dtype and device; a deep copy of the model
    streams too, a pickle has the values. Moving or casting the model is refused until the handle is
    closed. The caller moves the inputs to ``device``.

    Args:
        model: on ``meta``, or, without a checkpoint, with its tensors on the CPU.
        checkpoint: a ``Checkpoint``, or what ``open_checkpoint`` takes. ``None`` streams the
            model's own tensors, which must not change meanwhile; on the CPU, those that ``dtype``
            casts.
        device: where the model computes: the CPU or a CUDA device.
        memory: bytes that weights may take on ``device``, buffers included; such as ``"2GB"``.
        dtype: of the floating-point tensors on ``device``, as in ``load_into``.
        lookahead: how many blocks are read ahead.

    Returns:
        A handle; closing it puts the model's tensors back as they were. A context manager.

    Raises:
        ArgumentError: the memory does not suffice (the text names the layer and the smallest budget
            that does), or the model cannot be streamed.
        CheckpointError: the checkpoint does not fit the model.
        DeviceError: there is no such device, or it cannot be streamed to.
        ReadError: a file cannot be read; later, from the operation that needs it.
    """
    budget = _checked_budget(memory, lookahead)
    side = device_side(loadable_device(device))
    refs = parameter_refs(model)
    _check_model(model, refs)
    restore = Originals(refs)
    try:
        # What is made here is used in any mode, and autograd keeps nothing that one mode made.
        with torch.inference_mode(False):
            if checkpoint is None:
                task = of_the_host(model, refs, side, budget, dtype, lookahead)
            else:
                if not isinstance(checkpoint, Checkpoint):
                    checkpoint = open_checkpoint(checkpoint)
                task = of_a_checkpoint(model, refs, checkpoint, side, budget, dtype, lookahead)
            task.install()
            return StreamHandle(task, restore)
    except BaseException:
        restore.put_back()
        raise


def _checked_budget(memory: int | str, lookahead: int) -> int:
    budget = parse_size(memory, "memory")
    if budget <= 0:
        raise ArgumentError(f"memory is {memory!r}; it must be bytes above zero, such as '2GB'")
    if not isinstance(lookahead, int) or isinstance(lookahead, bool) or lookahead < 0:
        raise ArgumentError(f"lookahead is {lookahead!r}; it must be 0 or more blocks")
    return budget


def _check_model(model: torch.nn.Module, refs: Sequence[ParameterRef]) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise ArgumentError("a TorchScript module cannot be streamed: its code holds its weights")
    for ref in refs:
        if is_streamed(ref.tensor):
            raise ArgumentError(f"{ref.name!r} is streamed already: close that handle first")
        if is_sharded(ref.tensor):
            raise ArgumentError(f"{ref.name!r} is a DTensor: a sharded model cannot be streamed")
    for name, module in model.named_modules():
        if "_hf_hook" in vars(module):
            raise ArgumentError(
                f"{name or type(model).__name__!r} has accelerate's hooks, which move weights too: "
                "call accelerate.hooks.remove_hook_from_module(model, recurse=True) first"
            )

"""Starts a part of a load while transformers prepares the rest.

Between the construction of a model and the walk over its tensors, the library compiles the
renamings of all its architectures. Tensors with the same names in the model and in the files need
no renaming: they load meanwhile, and the walk finds them. Tensors that the walk does not request
are dropped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from weightlift.backends import early_return
from weightlift.backends.transformers import compat
from weightlift.backends.transformers.open_files import fallback_reason, open_checkpoint, weights_of
from weightlift.backends.transformers.weights import CALLER, Batch, Weights
from weightlift.core import dtypes
from weightlift.core.errors import WeightliftError
from weightlift.load.slots_ahead import slots_ahead
from weightlift.module.device_map import single_device

if TYPE_CHECKING:
    import torch

__all__ = ["begin", "begun", "found", "watching"]

# Options with which the library cuts or converts tensors.
_NOT_PREFETCHED = (
    "device_mesh",
    "distributed_config",
    "gguf_file",
    "quantization_config",
    "tp_plan",
    "tp_size",
)


@dataclasses.dataclass
class _Call:
    """A running ``from_pretrained``.

    Attributes:
        options: its keyword arguments.
        files: the files of the checkpoint, once found.
        weights: the weights of the started load.
    """

    options: Mapping[str, Any]
    files: Sequence[str] | None = None
    weights: Weights | None = None


_current: ContextVar[_Call | None] = ContextVar("weightlift_transformers_call", default=None)


@contextlib.contextmanager
def watching(options: Mapping[str, Any]) -> Iterator[None]:
    """Surrounds a ``from_pretrained``: ends loads that it leaves unfinished."""
    call = _Call(options)
    token = _current.set(call)
    try:
        yield
    finally:
        _current.reset(token)
        if call.weights is not None:
            call.weights.close()


def found(files: Sequence[str] | None) -> None:
    """Stores the files of the checkpoint."""
    call = _current.get()
    if call is not None:
        call.files = files


def begin(model: Any, key_mapping: Any, hf_quantizer: Any) -> None:
    """Starts the load of tensors that need no renaming; the model is on ``meta``."""
    call = _current.get()
    if call is None or not call.files or call.weights is not None or compat.is_foreign():
        return
    if early_return.is_wanted(CALLER):
        return  # the order is unknown before the walk
    if key_mapping or hf_quantizer is not None:
        return
    if any(call.options.get(name) is not None for name in _NOT_PREFETCHED):
        return
    device = _device(call.options.get("device_map"))
    if device is None:
        return
    config = types.SimpleNamespace(device_map={"": device}, hf_quantizer=None)
    if fallback_reason(model, call.files, config, sharded=False):
        return
    try:
        weights = _start(model, call, call.files, device)
    except WeightliftError:  # the load itself raises it again
        return
    # After the start: reading the library's source takes longer.
    if weights is not None and not compat.is_walked(config):
        weights.close()
        weights = None
    call.weights = weights


def begun(files: Sequence[str]) -> Weights | None:
    """The started load of these files."""
    call = _current.get()
    if call is None or call.weights is None or call.files != files:
        return None
    weights, call.weights = call.weights, None
    return weights


def _device(device_map: Any) -> torch.device | None:
    """The only device of the map."""
    import torch

    if device_map is None:
        # The library uses another default device as its device map.
        default = torch.get_default_device()
        return default if default.type == "cpu" else None
    with contextlib.suppress(WeightliftError, AttributeError, TypeError, ValueError):
        return single_device(device_map)
    return None


def _start(model: Any, call: _Call, files: Sequence[str], device: torch.device) -> Weights | None:
    with slots_ahead([device], casts=True):
        checkpoint = open_checkpoint(files)
    if not checkpoint.is_plain or "not_tensors" in checkpoint.metadata:
        return None
    weights = weights_of(checkpoint, files, call.options.get("disable_mmap"))
    batch = Batch(weights)
    state = model.state_dict(keep_vars=True)
    if any(model._get_dtype_plan(dtype) for dtype in {held.dtype for held in state.values()}):
        return None  # some stay in float32
    for name, (own, shape) in weights.headers.items():
        held = state.get(name)
        if held is None or tuple(held.shape) != shape:
            continue
        wanted = dtypes.file_name(held.dtype)
        if wanted == own or (own in dtypes.CASTABLE and wanted in dtypes.CASTABLE):
            batch.add(name, device, held.dtype)
    weights.prefetch(batch)
    return weights

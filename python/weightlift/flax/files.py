"""Loads ``.safetensors`` files as jax arrays, whole or sharded, and saves them."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import ml_dtypes
import numpy as np

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core import dtypes
from weightlift.core.atomic import atomic_file
from weightlift.core.devices import parse_device
from weightlift.core.errors import ArgumentError, FormatError
from weightlift.load.load_plan import LoadPlan
from weightlift.load.options import LoadOptions

if TYPE_CHECKING:
    import torch

__all__ = ["check_dtype", "load_file", "save_file", "to_host", "to_numpy"]

_Ranges = tuple[tuple[int, int, int], ...]
_F4 = "F4"


def load_file(
    filename: str | os.PathLike[str],
    *,
    dtype: Any = None,
    sharding: jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, jax.Array]:
    """Loads all tensors of a ``.safetensors`` file as jax arrays.

    On the CPU, an array uses the file's private mapping if it begins at a multiple of 64 bytes,
    which XLA requires; other arrays are copied.

    Args:
        filename: the file.
        dtype: the dtype to cast floating-point tensors to while loading: a jax dtype or its name.
        sharding: the sharding of all arrays, or name -> sharding (other arrays go to the default
            device). Only the slices of this process's devices are read.

    Returns:
        Name -> array, in the order of the file. ``F4`` is ``float4_e2m1fn``, with the file's shape.

    Raises:
        FormatError: the file breaks the format, or jax has no dtype for a tensor, such as 64-bit
            dtypes without ``jax_enable_x64``.
        ReadError: the file cannot be read (also an ``OSError``), or changes during the load.
        ArgumentError: an unsupported ``dtype``, or a ``sharding`` that does not fit.
    """
    checkpoint = Checkpoint.from_file(filename)
    named = dtype is None or isinstance(dtype, str)
    wanted = dtypes.parse_dtype(dtype if named else np.dtype(dtype).name)
    headers = checkpoint.headers()
    for name, (own, _) in headers.items():
        target = wanted if wanted and own in dtypes.FLOATING and own != _F4 else own
        check_dtype(target, checkpoint.paths[0], name)
    shardings = _shardings(filename, sharding, headers)
    cut = {}
    for name, (own, shape) in headers.items():
        what = f"{filename}: tensor {name!r}"
        if targets := _targets(what, own, shape, wanted, shardings[name]):
            cut[name] = targets
    plan = LoadPlan(checkpoint, LoadOptions(caller="weightlift.flax"))
    if whole := [name for name in headers if name not in cut]:
        plan.add(parse_device("cpu"), wanted, whole)
    _add_cut(plan, cut)
    loaded = plan.start().result()
    return {
        name: _to_array(loaded.pop(name), shape, shardings[name], cut.pop(name, None))
        for name, (_, shape) in headers.items()
    }


def _shardings(
    filename: str | os.PathLike[str],
    sharding: jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | None,
    names: Collection[str],
) -> dict[str, jax.sharding.Sharding | None]:
    if not isinstance(sharding, Mapping):
        return dict.fromkeys(names, sharding)
    if unknown := [name for name in sharding if name not in names]:
        raise ArgumentError(f"{filename}: sharding= names tensors that the file lacks: {unknown}")
    return {name: sharding.get(name) for name in names}


def _targets(
    what: str,
    own: str,
    shape: tuple[int, ...],
    wanted: str | None,
    where: jax.sharding.Sharding | None,
) -> dict[_Ranges, torch.Tensor]:
    """Memory for the parts of a tensor that devices of this process hold; none where it is loaded
    as a whole."""
    parts = _parts(what, shape, where)
    target = wanted if wanted and own in dtypes.FLOATING else own
    castable = own != _F4 and (own == target or own in dtypes.CASTABLE)
    if not castable or all(_counts(part) == shape for part in parts):
        return {}
    return {part: _empty(_counts(part), target) for part in parts}


def _add_cut(plan: LoadPlan, cut: Mapping[str, Mapping[_Ranges, torch.Tensor]]) -> None:
    """Plans the parts of tensors. A name may be added once for a destination: the first parts of
    all tensors, the second ones, and so on."""
    for number in range(max(map(len, cut.values()), default=0)):
        at = [
            (name, *list(targets.items())[number])
            for name, targets in cut.items()
            if number < len(targets)
        ]
        plan.add(
            parse_device("cpu"),
            None,
            [name for name, _, _ in at],
            [target for _, _, target in at],
            [ranges for _, ranges, _ in at],
        )


def _to_array(
    tensor: torch.Tensor,
    shape: tuple[int, ...],
    where: jax.sharding.Sharding | None,
    targets: Mapping[_Ranges, torch.Tensor] | None,
) -> jax.Array:
    """An array on its devices, of a tensor or of the parts of it."""
    if targets is not None:
        return jax.make_array_from_callback(
            shape, where, lambda index: to_numpy(targets[_ranges(index, shape)])
        )
    array = to_numpy(tensor)
    if where is None:
        return jax.device_put(array)
    return jax.make_array_from_callback(shape, where, lambda index: array[index])


def save_file(
    tensors: Mapping[str, Any],
    filename: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
) -> None:
    """Saves arrays as a ``.safetensors`` file, atomically, like ``weightlift.save_file``.

    Args:
        tensors: name -> jax or numpy array, on any devices of this process.
        filename: the file.
        metadata: text -> text, for the header.

    Raises:
        ArgumentError: a value is not an array, is partly on other processes, or has a dtype that
            the format lacks.
    """
    from safetensors import TensorSpec, serialize_file

    names = _file_names()
    specs = {}
    kept = []  # the writer takes addresses
    for name, given in tensors.items():
        array = to_host(given, f"tensor {name!r}")
        own = names.get(array.dtype.name)
        shape: tuple[int, ...] = array.shape
        if own is None:
            raise ArgumentError(
                f"tensor {name!r} cannot be saved: safetensors has no {array.dtype.name}; cast it"
            )
        if own == _F4:
            if not shape or shape[-1] % 2:
                raise ArgumentError(
                    f"tensor {name!r} cannot be saved: F4 packs two numbers into a byte, and its "
                    f"shape is {list(shape)}; the last dimension must be even"
                )
            codes = array.view(np.uint8)
            array = codes[..., ::2] | codes[..., 1::2] << 4
            shape = array.shape
        kept.append(array)
        specs[name] = TensorSpec(
            dtype=dtypes.TORCH_NAMES[own],
            shape=list(shape),
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
    with atomic_file(filename) as temporary:
        serialize_file(specs, temporary, metadata)


def check_dtype(own: str, path: str, name: str) -> None:
    """Raises FormatError for a file's dtype that jax lacks, now."""
    if own not in dtypes.TORCH_NAMES:
        raise FormatError("unsupported_dtype", f"jax has no dtype for {own}", path, tensor=name)
    found = _to_jax(own)
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise FormatError(
            "unsupported_dtype",
            f"jax makes {jax.dtypes.canonicalize_dtype(found)} of {found} unless 64 bits are "
            'enabled: jax.config.update("jax_enable_x64", True)'
            + (", or cast it with dtype=" if own == "F64" else ""),
            path,
            tensor=name,
        )


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same memory as an array of numpy, with the dtypes of ml_dtypes; F4 is unpacked."""
    import torch

    own = dtypes.file_name(tensor.dtype)
    if own is None:
        raise ArgumentError(f"jax has no dtype for {tensor.dtype}")
    if own == _F4:
        packed = tensor.view(torch.uint8).numpy()
        codes = np.stack([packed & 15, packed >> 4], axis=-1)
        return codes.reshape(*packed.shape[:-1], -1).view(_to_jax(own))
    found = _to_jax(own)
    if found.kind == "V" or hasattr(ml_dtypes, found.name):  # not one of numpy's own
        bits = torch.uint8 if found.itemsize == 1 else torch.uint16
        return tensor.view(bits).numpy().view(found)
    array: np.ndarray[Any, Any] = tensor.numpy()
    return array


def to_host(array: Any, what: str) -> np.ndarray[Any, Any]:
    """An array's numbers in the host's memory, contiguous, in the host's byte order."""
    if not isinstance(array, (jax.Array, np.ndarray, np.generic)):
        raise ArgumentError(
            f"{what} cannot be saved: it is not an array but {type(array).__name__}"
        )
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        raise ArgumentError(
            f"{what} cannot be saved: parts of it are on devices of other processes; gather it "
            "with jax.experimental.multihost_utils.process_allgather"
        )
    host = np.asarray(array, order="C")
    return host if host.dtype.isnative else host.astype(host.dtype.newbyteorder("="))


@functools.cache
def _to_jax(own: str) -> np.dtype[Any]:
    name = "float4_e2m1fn" if own == _F4 else dtypes.TORCH_NAMES[own]
    return np.dtype(getattr(ml_dtypes, name, name))


@functools.cache
def _file_names() -> dict[str, str]:
    return {_to_jax(own).name: own for own in dtypes.TORCH_NAMES if own not in ("C32", "C128")}


def _parts(what: str, shape: Sequence[int], where: jax.sharding.Sharding | None) -> list[_Ranges]:
    if where is None:
        return []
    try:
        indices = where.addressable_devices_indices_map(tuple(shape)).values()
    except ValueError as error:
        raise ArgumentError(
            f"{what} of shape {list(shape)} cannot be sharded so: {error}"
        ) from error
    return list(dict.fromkeys(_ranges(index, shape) for index in indices if index is not None))


def _ranges(index: Sequence[slice], shape: Sequence[int]) -> _Ranges:
    bounds = [part.indices(extent) for part, extent in zip(index, shape, strict=True)]
    return tuple((start, step, len(range(start, stop, step))) for start, stop, step in bounds)


def _counts(ranges: _Ranges) -> tuple[int, ...]:
    return tuple(count for _, _, count in ranges)


def _empty(shape: Sequence[int], own: str) -> torch.Tensor:
    import torch

    size = math.prod(shape) * dtypes.to_torch(own).itemsize
    return torch.empty(size, dtype=torch.uint8).view(dtypes.to_torch(own)).reshape(tuple(shape))

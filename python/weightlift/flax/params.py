"""Loads trees of parameters from Flax and torch files, and saves Flax files."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

import jax
import msgpack
import numpy as np
from flax import serialization, traverse_util

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.flax_msgpack import read_flax_tree, to_flax_path
from weightlift.checkpoint.hub import HubArguments, download, list_files
from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.core import dtypes
from weightlift.core.atomic import atomic_file
from weightlift.core.devices import parse_device
from weightlift.core.errors import ArgumentError, CheckpointError, ReadError, read_error
from weightlift.flax.files import check_dtype, to_host, to_numpy
from weightlift.load.load_tensors import load_tensors
from weightlift.load.options import LoadOptions, Mode

if TYPE_CHECKING:
    import torch

__all__ = ["FLAX_NAMES", "Found", "find_params", "load_params", "save_params"]

FLAX_NAMES = ("diffusion_flax_model.msgpack", "flax_model.msgpack")
# flax's msgpack extension type for arrays, and its chunk size.
_ARRAY = 1
_MAX_CHUNK_BYTES = 2**30
_MOST_LINES = 20

Keys = tuple[Any, ...]


class Found(NamedTuple):
    """The leaves of a tree in a checkpoint.

    Attributes:
        leaves: the leaves that it has.
        missing: the leaves that it lacks.
        unexpected: its other tensors, by their names there.
        place: the file or folder.
    """

    leaves: dict[Keys, jax.Array]
    missing: list[Keys]
    unexpected: list[str]
    place: str


def load_params(
    path_or_repo: str | os.PathLike[str], like: Any, *, from_pt: bool = False, **kwargs: Any
) -> dict[Any, Any]:
    """Loads a tree of parameters, in the dtypes of the file.

    For Linen, ``like`` is ``jax.eval_shape(model.init, ...)["params"]``; for NNX it is
    ``nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))``, and ``nnx.update(model, ...)``
    sets the result. A list's layers ``{"layers": {0: ...}}`` are Linen's ``layers_0``.

    Args:
        path_or_repo: a msgpack file of flax, a folder or a repository with
            ``diffusion_flax_model.msgpack`` or ``flax_model.msgpack``; with ``from_pt``, what
            ``open_checkpoint`` takes.
        like: nested mappings whose leaves have the expected ``shape``.
        from_pt: the weights are those of the torch model, and are renamed and transposed.
        kwargs: the Hub arguments of ``open_checkpoint``, ``subfolder`` and ``variant``.

    Returns:
        A dict of dicts with the keys of ``like``, of arrays on the CPU. An array that is neither
        transposed nor moved uses the file's mapping, without a copy.

    Raises:
        CheckpointError: leaves are missing or have other shapes; the text names all of them.
        FormatError: a file breaks its format, or has a dtype that jax lacks.
        ReadError: a file cannot be read.
    """
    variant = kwargs.pop("variant", None)
    hub = HubArguments.pop_from(kwargs)
    if kwargs:
        raise ArgumentError(f"load_params has no argument {', '.join(map(repr, kwargs))}")
    found = find_params(path_or_repo, like, hub, from_pt=from_pt, variant=variant)
    if found.missing:
        raise CheckpointError(
            f"{found.place}: not all parameters are in it:\n"
            + _lines(map(leaf_name, found.missing))
        )
    return nested(found.leaves)


def save_params(params: Any, filename: str | os.PathLike[str]) -> None:
    """Writes a tree of parameters in the format of flax's ``to_bytes``, atomically.

    Writes leaf by leaf: the file is never in memory as a whole.

    Args:
        params: nested mappings of jax or numpy arrays, on any devices of this process.
        filename: the file.

    Raises:
        ArgumentError: a leaf is not an array, or is partly on other processes.
    """
    tree = serialization.to_state_dict(params)
    with atomic_file(filename) as temporary, temporary.open("wb") as file:
        _write(file, tree, ())


def find_params(
    path_or_repo: str | os.PathLike[str],
    like: Any,
    hub: HubArguments,
    *,
    from_pt: bool,
    variant: str | None = None,
) -> Found:
    """Loads what there is of a tree; see ``load_params``."""
    expected = flattened(like)
    paths = {_joined(keys): keys for keys in expected}
    if len(paths) != len(expected):
        raise ArgumentError("the tree has both 'name_0' and the item 0 of 'name': rename one")
    if from_pt:
        opened = open_checkpoint(
            path_or_repo,
            variant=variant,
            **{field: getattr(hub, field) for field in HubArguments.__dataclass_fields__},
        )
        return _from_torch(opened, os.fspath(path_or_repo), expected, paths)
    if variant is not None:
        raise ArgumentError(f"variant={variant!r} is for torch weights, with from_pt=True")
    return _from_flax(_flax_file(os.fspath(path_or_repo), hub), expected, paths)


def flattened(tree: Any) -> dict[Keys, Any]:
    """Keys -> leaf."""
    leaves: dict[Keys, Any] = traverse_util.flatten_dict(tree)
    return leaves


def nested(leaves: Mapping[Keys, Any]) -> dict[Any, Any]:
    """The tree of ``flattened``'s."""
    tree: dict[Any, Any] = traverse_util.unflatten_dict(leaves)
    return tree


def leaf_name(keys: Keys) -> str:
    """A leaf's name in messages."""
    return ".".join(map(str, keys))


def _joined(keys: Keys) -> tuple[str, ...]:
    """Linen's form of keys: the item 0 of ``layers`` is ``layers_0``."""
    parts: list[str] = []
    for key in map(str, keys):
        if key.isdecimal() and parts:
            parts[-1] += f"_{key}"
        else:
            parts.append(key)
    return tuple(parts)


def _flax_file(path: str, hub: HubArguments) -> str:
    if Path(path).is_file():
        return path
    folder = Path(path, hub.subfolder or "")
    neither = f"neither {' nor '.join(FLAX_NAMES)} in it; torch weights need from_pt=True"
    if Path(path).is_dir():
        for name in FLAX_NAMES:
            if (folder / name).is_file():
                return str(folder / name)
        raise CheckpointError(f"{folder}: there is {neither}")
    if path.endswith(".msgpack"):
        raise read_error("not_found", "no such file", path)
    hub = hub.pinned(path)
    there = list_files(path, hub)
    for name in FLAX_NAMES:
        if name in there:
            return str(download(path, name, hub))
    raise CheckpointError(f"{path}: there is {neither}")


def _from_flax(
    file: str, expected: Mapping[Keys, Any], paths: Mapping[tuple[str, ...], Keys]
) -> Found:
    leaves: dict[Keys, jax.Array] = {}
    unexpected = []
    wrong = []
    for path, tensor in read_flax_tree(file):
        keys = paths.get(_joined(path))
        if keys is None:
            unexpected.append(leaf_name(path))
            continue
        shape = tuple(expected[keys].shape)
        if tuple(tensor.shape) != shape:
            wrong.append(
                f"{leaf_name(keys)}: shape {list(tensor.shape)}, the model's is {list(shape)}"
            )
            continue
        own = dtypes.file_name(tensor.dtype)
        check_dtype(own or str(tensor.dtype), file, leaf_name(keys))
        leaves[keys] = _put(to_numpy(tensor))
    _refuse(file, leaves, wrong, unexpected, expected)
    return Found(leaves, [keys for keys in expected if keys not in leaves], unexpected, file)


def _from_torch(
    checkpoint: Checkpoint,
    place: str,
    expected: Mapping[Keys, Any],
    paths: Mapping[tuple[str, ...], Keys],
) -> Found:
    headers = checkpoint.headers()
    wanted: dict[Keys, tuple[str, tuple[int, ...]]] = {}
    unexpected = []
    wrong = []
    # Biases last: that of a norm whose Flax form has none gets the path of its scale.
    for name in sorted(headers, key=lambda name: name.endswith(".bias")):
        own, shape = headers[name]
        path, axes = to_flax_path(name, len(shape), paths)
        keys = paths.get(path)
        if keys is None or (keys in wanted and name.endswith(".bias")):
            unexpected.append(name)
            continue
        if keys in wanted:
            raise CheckpointError(
                f"{place}: tensors {wanted[keys][0]!r} and {name!r} would both be {leaf_name(keys)}"
            )
        turned = tuple(shape[axis] for axis in axes)
        if turned != tuple(expected[keys].shape):
            wrong.append(
                f"{leaf_name(keys)}: {name!r} becomes {list(turned)}, the model's is "
                f"{list(expected[keys].shape)}"
            )
            continue
        check_dtype(own, place, f"{leaf_name(keys)} ({name})")
        wanted[keys] = (name, axes)
    _refuse(place, wanted, wrong, unexpected, expected)

    tensors = _load(checkpoint, [name for name, _ in wanted.values()])
    # A torch file may be saved over, which truncates it under its mapping.
    mapped = "torch" not in checkpoint.formats
    leaves = {}
    for keys in [keys for keys in expected if keys in wanted]:
        name, axes = wanted[keys]
        leaves[keys] = _put(_turned(tensors.pop(name), axes, mapped))
    return Found(leaves, [keys for keys in expected if keys not in leaves], unexpected, place)


def _load(checkpoint: Checkpoint, names: list[str]) -> dict[str, torch.Tensor]:
    def load(mode: Mode) -> dict[str, torch.Tensor]:
        return load_tensors(
            checkpoint,
            parse_device("cpu"),
            LoadOptions(mode, caller="weightlift.flax"),
            names=names,
        )

    if not names:
        return {}
    if "torch" in checkpoint.formats:
        try:
            return load("map")  # most of it is turned, into memory of its own
        except ReadError:
            pass  # a file system that cannot map
    return load("auto")


def _turned(tensor: torch.Tensor, axes: tuple[int, ...], may_alias: bool) -> np.ndarray[Any, Any]:
    import torch

    if dtypes.file_name(tensor.dtype) == "F4":
        return np.ascontiguousarray(to_numpy(tensor).transpose(axes))
    tensor = tensor.detach().permute(axes)
    # torch turns with all cores; numpy and jax.numpy with one.
    if may_alias and tensor.is_contiguous():
        return to_numpy(tensor)
    return to_numpy(tensor.clone(memory_format=torch.contiguous_format))


def _put(array: np.ndarray[Any, Any]) -> jax.Array:
    # Not committed to the CPU: a computation on another device may take it.
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.device_put(array)


def _refuse(
    place: str,
    found: Mapping[Keys, Any],
    wrong: list[str],
    unexpected: list[str],
    expected: Mapping[Keys, Any],
) -> None:
    if wrong:
        raise CheckpointError(f"{place}: not the weights of this model:\n" + _lines(iter(wrong)))
    if expected and not found:
        raise CheckpointError(
            f"{place} holds the weights of another model; no name is in both.\nthe model has\n"
            + _lines(map(leaf_name, expected))
            + "\nthe file has\n"
            + _lines(iter(unexpected))
        )


def _lines(texts: Iterator[str]) -> str:
    lines = list(texts)
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return "\n".join(f"  {line}" for line in [*lines[:_MOST_LINES], *more])


def _write(file: BinaryIO, node: Any, at: Keys) -> None:
    if isinstance(node, Mapping):
        packer = msgpack.Packer()
        file.write(packer.pack_map_header(len(node)))
        for key, value in node.items():
            file.write(packer.pack(key))
            _write(file, value, (*at, key))
        return
    array = to_host(node, f"leaf {leaf_name(at)!r}")
    if array.dtype.hasobject or array.dtype.names:
        raise ArgumentError(f"leaf {leaf_name(at)!r} cannot be saved: its dtype is {array.dtype}")
    if array.nbytes <= _MAX_CHUNK_BYTES:
        _write_array(file, array)
        return
    flat = array.reshape(-1)
    size = max(1, _MAX_CHUNK_BYTES // array.itemsize)
    chunks = [flat[start : start + size] for start in range(0, flat.size, size)]
    packer = msgpack.Packer()
    file.write(packer.pack_map_header(3))
    file.write(packer.pack("__msgpack_chunked_array__") + packer.pack(True))
    shape = {str(n): extent for n, extent in enumerate(array.shape)}
    file.write(packer.pack("shape") + packer.pack(shape))
    file.write(packer.pack("chunks") + packer.pack_map_header(len(chunks)))
    for number, chunk in enumerate(chunks):
        file.write(packer.pack(str(number)))
        _write_array(file, chunk)


def _write_array(file: BinaryIO, array: np.ndarray[Any, Any]) -> None:
    """The extension of (shape, dtype, bytes), without a copy of the bytes.

    The headers of bin and ext are those of msgpack's specification.
    """
    size = array.nbytes
    content = msgpack.packb([list(array.shape), array.dtype.name, b""])[:-2]
    for limit, code, width in ((1 << 8, 0xC4, "B"), (1 << 16, 0xC5, "H"), (1 << 32, 0xC6, "I")):
        if size < limit:
            content += struct.pack(f">B{width}", code, size)
            break
    size += len(content)
    fixed = {1: 0xD4, 2: 0xD5, 4: 0xD6, 8: 0xD7, 16: 0xD8}
    if size in fixed:
        file.write(struct.pack(">BB", fixed[size], _ARRAY))
    else:
        for limit, code, width in ((1 << 8, 0xC7, "B"), (1 << 16, 0xC8, "H"), (1 << 32, 0xC9, "I")):
            if size < limit:
                file.write(struct.pack(f">B{width}B", code, size, _ARRAY))
                break
    file.write(content)
    # numpy has no buffer protocol for the dtypes of ml_dtypes.
    file.write(array.reshape(-1).view(np.uint8).data if math.prod(array.shape) else b"")

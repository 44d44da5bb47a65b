"""Converts weights and names between Flax models and torch models.

The rules are those of diffusers up to 0.39, the last version with a conversion. The file is a tree
in flax's msgpack format; msgpack reads it, without flax or jax.
"""

from __future__ import annotations

import math
import os
import pathlib
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from weightlift.core.dtypes import TORCH_NAMES
from weightlift.core.errors import CheckpointError, FormatError, read_error
from weightlift.core.requirements import require

if TYPE_CHECKING:
    import torch

__all__ = ["load_flax_state_dict", "read_flax_tree", "to_flax_path", "to_torch_name"]

# The types of flax's msgpack extensions: an array, and a numpy scalar with the same content.
_ARRAYS = (1, 3)
_CHUNKED = "__msgpack_chunked_array__"
# numpy's and ml_dtypes' names of element types are torch's.
_DTYPES = (frozenset(TORCH_NAMES.values()) | {"complex128"}) - {"complex32", "float4_e2m1fn_x2"}
_MOST_LINES = 20

Keys = tuple[str, ...]


def to_torch_name(path: Sequence[str], dimensions: int) -> tuple[str, tuple[int, ...]]:
    """A Flax leaf's name in the torch model, and the order of its axes there.

    Args:
        path: the keys that lead to the leaf.
        dimensions: its number of dimensions.

    Returns:
        The name, and the axes for ``tensor.permute``.
    """
    parts = ".".join(path).split(".")
    axes = tuple(range(dimensions))
    if parts[-1] == "kernel":
        parts[-1] = "weight"
        # Flax convolutions: height, width, in, out.
        axes = (3, 2, 0, 1) if dimensions == 4 else axes[::-1]
    elif parts[-1] == "scale":
        parts[-1] = "weight"
    if "time_embedding" not in parts:  # its layers are linear_1 and linear_2 in torch too
        parts = [re.sub("_([0-9])", r".\1", part) for part in parts]
    return ".".join(parts), axes


def to_flax_path(
    name: str, dimensions: int, paths: Container[Keys]
) -> tuple[Keys, tuple[int, ...]]:
    """A torch tensor's place in the Flax model, and the order of its axes there.

    Unlike in diffusers, the weight of an embedding becomes ``embedding``.

    Args:
        name: the tensor's name.
        dimensions: its number of dimensions.
        paths: the paths of the Flax model; some rules depend on them.

    Returns:
        The keys that lead to the leaf, and the axes for ``permute``. A tensor that the Flax model
        lacks gets a path that is not in ``paths``.
    """
    # layers.0.weight becomes layers_0.weight; of two successive numbers only the first is joined.
    for numbered in re.findall(r"\w+\.\d+", name):
        name = name.replace(numbered, numbered.replace(".", "_"))
    path = tuple(name.split("."))
    same = tuple(range(dimensions))
    turned = same[::-1]
    *module, last = path

    def beside(leaf: str) -> Keys:
        return (*module, leaf)

    formerly = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out_0": "proj_attn"}
    if module and module[-1] in formerly:
        former = (*module[:-1], formerly[module[-1]], "kernel" if last == "weight" else last)
        if former in paths:
            return former, turned
    if last in ("weight", "gamma") and beside("scale") in paths:
        return beside("scale"), same
    norm = any("norm" in part for part in path)
    if last == "bias" and norm and path not in paths and beside("scale") in paths:
        return beside("scale"), same
    if last == "weight":
        if beside("embedding") in paths:
            return beside("embedding"), same
        return beside("kernel"), (2, 3, 1, 0) if dimensions == 4 else turned
    return beside({"gamma": "weight", "beta": "bias"}.get(last, last)), same


def load_flax_state_dict(
    path: str | os.PathLike[str],
    expected_shapes: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, torch.Tensor]:
    """Reads a Flax model's weights under the names, and with the axes, of the torch model.

    Args:
        path: a ``diffusion_flax_model.msgpack`` or ``flax_model.msgpack``.
        expected_shapes: the torch model's shapes by name; other tensors are not checked.
            ``embedding`` becomes ``weight`` if the model has only ``weight``.

    Returns:
        Name -> tensor, in the order of the file; bfloat16 becomes float32, other dtypes stay.

    Raises:
        FormatError: the file is not in flax's format.
        CheckpointError: shapes differ from the expected ones; the text names all of them.
        ReadError: the file cannot be read.
    """
    import torch

    tensors: dict[str, torch.Tensor] = {}
    mismatched = []
    for leaf, found in read_flax_tree(path):
        name, axes = to_torch_name(leaf, found.dim())
        if leaf[-1:] == ("embedding",) and expected_shapes and name not in expected_shapes:
            # A torch.nn.Embedding, to which diffusers' rule gives no weight.
            weight = name.removesuffix("embedding") + "weight"
            name = weight if weight in expected_shapes else name
        if name in tensors:
            raise FormatError(
                "duplicate_name",
                f"two leaves of the tree become {name!r}",
                os.fspath(path),
                tensor=".".join(leaf),
            )
        tensor = found.permute(axes).contiguous()
        tensors[name] = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        expected = (expected_shapes or {}).get(name)
        if expected is not None and tuple(expected) != tuple(tensor.shape):
            mismatched.append(
                f"{'.'.join(leaf)!r} becomes {name!r} of shape {list(tensor.shape)}; "
                f"the model's is {list(expected)}"
            )
    if mismatched:
        more = len(mismatched) - _MOST_LINES
        lines = [*mismatched[:_MOST_LINES], *([f"and {more} more"] if more > 0 else [])]
        raise CheckpointError(
            f"{os.fspath(path)}: these weights do not fit the model:\n  " + "\n  ".join(lines)
        )
    return tensors


def read_flax_tree(path: str | os.PathLike[str]) -> Iterator[tuple[Keys, torch.Tensor]]:
    """The leaves of a flax msgpack file, in its order: the keys that lead to each, and its array in
    own memory."""
    place = os.fspath(path)
    stack: list[tuple[Keys, Any]] = [((), _unpack(place))]
    while stack:
        at, node = stack.pop()
        if isinstance(node, dict) and _CHUNKED not in node:
            if not all(isinstance(key, str) for key in node):
                raise _invalid_tensor(place, at, "has keys that are not text")
            # Popped, so that the packed arrays are freed leaf by leaf.
            stack += [((*at, key), node.pop(key)) for key in reversed(list(node))]
        else:
            yield at, _array(place, at, node)


class _Packed(NamedTuple):
    """An extension, parsed when its place in the tree is known (for messages)."""

    code: int
    data: bytes


def _unpack(place: str) -> dict[Any, Any]:
    require("msgpack", f"{place}: a Flax file")
    import msgpack

    try:
        with pathlib.Path(place).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            _check_head(place, file.read(64), size)
            file.seek(0)
            unpacker = msgpack.Unpacker(
                file,
                read_size=1 << 20,
                max_buffer_size=2**32 - 1,  # of an extension; flax cuts arrays at 1 GiB
                max_array_len=0,  # flax writes lists and tuples as maps
                ext_hook=_Packed,
            )
            try:
                tree = unpacker.unpack()
            except msgpack.exceptions.OutOfData:
                raise FormatError(
                    "data_incomplete",
                    f"the file ends in the middle of its tree, after {size} bytes; download it or "
                    "save it again",
                    place,
                ) from None
            except (ValueError, msgpack.exceptions.UnpackException) as error:
                raise FormatError(
                    "not_weights", f"is not a msgpack file of flax: {error}", place
                ) from error
            if unpacker.tell() != size:
                raise FormatError(
                    "trailing_bytes",
                    "there are bytes after the tree; save the file again",
                    place,
                    unpacker.tell(),
                )
    except OSError as error:
        raise _os_error(error, place) from None
    if not isinstance(tree, dict):
        raise FormatError("not_weights", "is not a flax tree: its top is not a map", place)
    return tree


def _os_error(error: OSError, place: str) -> Exception:
    codes = {
        FileNotFoundError: "not_found",
        PermissionError: "permission_denied",
        IsADirectoryError: "is_directory",
    }
    code = codes.get(type(error), "read_failed")
    return read_error(code, error.strerror or str(error), place, error.errno)


def _check_head(place: str, head: bytes, size: int) -> None:
    if size == 0:
        raise FormatError("empty_file", "the file is empty: download it or save it again", place, 0)
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        raise FormatError(
            "git_lfs_pointer",
            "this is a git-lfs pointer, not the weights: run `git lfs pull` in its repository",
            place,
            0,
        )
    text = head.lstrip().lower()
    if head.startswith(b"PK\x03\x04") or (head[0] == 0x80 and size > 1):
        kind = "of torch.save: load it without from_flax, or into Flax models with from_pt=True"
    elif head[4:9] == b"\0\0\0\0{":
        kind = "of safetensors: load it without from_flax, or into Flax models with from_pt=True"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml")):
        kind = "with a web page: check whether the link needs a login, and download again"
    elif not (0x80 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
        kind = "that does not begin with a msgpack map, as flax files do"
    else:
        return
    raise FormatError("not_weights", f"this is a file {kind}", place, 0)


def _array(place: str, at: Keys, node: Any) -> torch.Tensor:
    import msgpack
    import torch

    if isinstance(node, dict):
        return _joined(place, at, node)
    if not isinstance(node, _Packed) or node.code not in _ARRAYS:
        kind = f"extension {node.code}" if isinstance(node, _Packed) else type(node).__name__
        raise _invalid_tensor(place, at, f"is not an array but {kind}")
    try:
        shape, name, data = msgpack.unpackb(node.data, raw=True)
        dtype = name.decode()
    except (ValueError, TypeError, AttributeError, msgpack.exceptions.UnpackException) as error:
        raise _invalid_tensor(place, at, f"is not (shape, dtype, bytes): {error}") from error
    if dtype not in _DTYPES:
        raise FormatError("unknown_dtype", f"its dtype is {dtype!r}", place, tensor=".".join(at))
    if not isinstance(data, bytes) or not _is_shape(shape):
        raise _invalid_tensor(place, at, f"is not (shape, dtype, bytes); its shape is {shape!r}")
    torch_dtype = getattr(torch, dtype)
    if math.prod(shape) * torch_dtype.itemsize != len(data):
        raise FormatError(
            "size_mismatch",
            f"{dtype} of shape {list(shape)} does not take {len(data)} bytes",
            place,
            tensor=".".join(at),
        )
    if not data:
        return torch.empty(shape, dtype=torch_dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(torch_dtype).reshape(shape)


def _joined(place: str, at: Keys, node: dict[Any, Any]) -> torch.Tensor:
    """An array that flax cut into chunks, because msgpack limits the size of extensions."""
    import torch

    shape, chunks = (_in_order(node.get(part)) for part in ("shape", "chunks"))
    if not chunks or shape is None or not _is_shape(shape):
        raise _invalid_tensor(place, at, "is not a chunked array: it has no shape or no chunks")
    parts = [_array(place, (*at, str(number)), chunk) for number, chunk in enumerate(chunks)]
    if len({part.dtype for part in parts}) > 1 or any(part.dim() != 1 for part in parts):
        raise _invalid_tensor(place, at, "has chunks of several dtypes or shapes")
    whole = torch.cat(parts)
    if math.prod(shape) != whole.numel():
        raise FormatError(
            "size_mismatch",
            f"shape {shape} has {math.prod(shape)} elements; its chunks have {whole.numel()}",
            place,
            tensor=".".join(at),
        )
    return whole.reshape(shape)


def _in_order(node: Any) -> list[Any] | None:
    # flax packs a tuple as {"0": ..., "1": ...}.
    if not isinstance(node, dict) or node.keys() != {str(n) for n in range(len(node))}:
        return None
    return [node[str(n)] for n in range(len(node))]


def _is_shape(shape: Any) -> bool:
    return (
        isinstance(shape, (list, tuple))
        and len(shape) <= 64  # numpy has no more
        and all(type(n) is int and n >= 0 for n in shape)
        and math.prod(n for n in shape if n) < 2**63  # strides must fit, also without elements
    )


def _invalid_tensor(place: str, at: Keys, what: str) -> FormatError:
    return FormatError("tensor_invalid", what, place, tensor=".".join(at))

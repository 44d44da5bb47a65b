"""Atomic saves: ``save_file``, ``save``, ``save_model``."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlift.checkpoint.safetensors_writer import (
    Entry,
    bytes_of,
    check_metadata,
    entry_of,
    header_of,
    in_order,
    size_of,
    write_safetensors,
)
from weightlift.core.atomic import (
    atomic_file,
    flush_folder,
    naming_target,
    put_in_place,
    temporary_beside,
)
from weightlift.core.errors import ArgumentError
from weightlift.core.paths import target_text
from weightlift.core.requirements import require
from weightlift.module.parameters import check_module, is_streamed

if TYPE_CHECKING:
    import torch


__all__ = ["save", "save_file", "save_model"]


def save_file(
    tensors: Mapping[str, torch.Tensor],
    filename: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Saves tensors as a ``.safetensors`` file, atomically.

    The file is written under a temporary name in the same folder, flushed to the disk, gets the
    mode of the file that it replaces (a new file gets what the umask allows), and is renamed; the
    folder is flushed too. After a kill at any point the old file or the new one is there. Saving
    over a file whose mapping is in use is safe: the mapping keeps the old file.

    Args:
        tensors: name -> tensor: contiguous tensors that share no memory, on any device, as for
            ``safetensors.torch.save_file``.
        filename: the file.
        metadata: text -> text, for the header.

    Raises:
        ValueError: a value is not a tensor, is sparse or not contiguous, or has a dtype that
            safetensors does not have.
        RuntimeError: tensors share memory; ``save_model`` saves a model with tied weights.
        OSError: with ``filename``: ``FileNotFoundError`` (no such folder), ``PermissionError``,
            ``IsADirectoryError``, a full disk, ...
    """
    require("torch", "save_file")
    if isinstance(filename, Mapping):
        raise TypeError("the path is a dict: have two arguments changed places?")
    path = Path(target_text(filename))
    entries = _entries(tensors, str(path))
    header = header_of(entries, metadata, f"{path}: ")
    if path.is_dir():
        raise IsADirectoryError(21, "is a directory: name a file in it", str(path))
    temporary = temporary_beside(path)
    with naming_target(path, temporary):
        try:
            data = _data(entries, tensors)
            write_safetensors(temporary, header, data, size=size_of(entries), replaces=path)
            put_in_place(temporary, path)
        except BaseException:
            _remove(temporary)
            raise
    flush_folder(path.parent)


def save(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Returns the bytes that ``save_file`` would write.

    Args:
        tensors, metadata: as in ``save_file``.

    Raises:
        ValueError, RuntimeError: as ``save_file``.
    """
    require("torch", "save")
    entries = _entries(tensors, "save")
    return b"".join([header_of(entries, metadata, "save: "), *_data(entries, tensors)])


def save_model(
    model: torch.nn.Module,
    filename: str | os.PathLike[str],
    metadata: dict[str, str] | None = None,
    force_contiguous: bool = True,
) -> None:
    """Saves a model's state dict as a ``.safetensors`` file, atomically.

    Tied weights (names that share memory) are saved once, and the metadata maps the dropped names
    to the saved one; ``safetensors.torch.save_model`` decides which. ``load_model`` ties them
    again.

    Args:
        model: a module, on any device.
        filename: the file.
        metadata: text -> text, for the header.
        force_contiguous: save contiguous copies of tensors that are not contiguous.

    Raises:
        ValueError, RuntimeError, OSError: as ``save_file``.
    """
    require("torch", "save_model")
    from safetensors.torch import save_model as reference_save_model

    check_module(model, "save_model")
    check_metadata(metadata, f"{target_text(filename)}: ")
    for name, tensor in model.state_dict().items():
        if is_streamed(tensor):
            raise ArgumentError(
                f"{os.fspath(filename)}: tensor {name!r} is streamed and has no memory: close the "
                "stream first, or give model.state_dict() to save_file; nothing was saved"
            )
        if tensor.device.type == "meta":
            raise _without_values(os.fspath(filename), name)
    with atomic_file(filename) as temporary:
        reference_save_model(model, str(temporary), metadata, force_contiguous)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _entries(tensors: Mapping[str, torch.Tensor], what: str) -> list[Entry]:
    """The entries, in the order of the file.

    Raises:
        ValueError, RuntimeError, TypeError: as ``safetensors.torch.save_file``.
    """
    import torch

    if not isinstance(tensors, Mapping):
        raise ArgumentError(
            f"{what}: tensors must be a dict of names to tensors, not {type(tensors).__name__}; "
            "save_model saves a module"
        )
    entries = []
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"{what}: the name of a tensor must be text, not {name!r}")
        if not isinstance(tensor, torch.Tensor):
            raise _refused(what, name, f"is {type(tensor).__name__}, not a tensor: leave it out")
        if tensor.layout is not torch.strided:
            raise _refused(what, name, f"is of layout {tensor.layout}: save tensor.to_dense()")
        if not tensor.is_contiguous():
            raise _refused(
                what,
                name,
                "is not contiguous: save tensor.contiguous(), or the tensor that it is a view of",
            )
        if tensor.device.type == "meta":
            raise _without_values(what, name)
        entry = entry_of(name, tensor)
        if entry is None:
            raise _refused(
                what, name, f"is of {tensor.dtype}, which safetensors does not have: cast it"
            )
        entries.append(entry)
    _check_sharing(tensors, what)
    return in_order(entries)


def _refused(what: str, name: str, why: str) -> ArgumentError:
    return ArgumentError(f"{what}: tensor {name!r} {why}; nothing was saved")


def _without_values(what: str, name: str) -> NotImplementedError:
    """The reference's exception, with the name and what helps."""
    return NotImplementedError(
        f"{what}: tensor {name!r} is on meta and has no values: load the model first; nothing was "
        "saved"
    )


def _check_sharing(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    spans: dict[tuple[torch.device, int], list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if tensor.device.type == "meta" or tensor.numel() == 0:
            continue
        if is_streamed(tensor):
            streamed: Any = tensor
            storage = (tensor.device, id(streamed.stored))
            begin = int(tensor.storage_offset()) * tensor.element_size()
        else:
            storage = (tensor.device, tensor.untyped_storage().data_ptr())
            begin = tensor.data_ptr()
        spans.setdefault(storage, []).append((begin, begin + tensor.nbytes, name))
    for sharing in spans.values():
        sharing.sort()
        for (_, end, name), (begin, _, other) in itertools.pairwise(sharing):
            if begin < end:
                raise RuntimeError(
                    f"{what}: tensors {name!r} and {other!r} share memory, and a load would make "
                    "two tensors of them: save one of them, or copies (tensor.clone()); "
                    "weightlift.save_model saves a model with tied weights. Nothing was saved"
                )


def _data(entries: list[Entry], tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    for entry in entries:
        # Copies from devices, and streamed tensors, are in host memory one at a time.
        tensor: Any = tensors[entry.name]
        tensor = tensor.read() if is_streamed(tensor) else tensor.detach()
        yield bytes_of(tensor.to("cpu").resolve_conj().resolve_neg())

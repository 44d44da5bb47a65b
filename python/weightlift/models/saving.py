"""Saves weights into a folder under diffusers' names; after a kill the old or the new weights load.

New files are written under temporary names and flushed; ``replacing`` gives them their names.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import inspect
import json
import os
import pkgutil
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.safetensors_writer import (
    bytes_of,
    check_metadata,
    entry_of,
    header_of,
    in_order,
    size_of,
    write_safetensors,
)
from weightlift.core import dtypes
from weightlift.core.atomic import (
    errno_of,
    flush_file,
    flush_folder,
    make_folder,
    save_error,
    temporary_beside,
)
from weightlift.core.errors import ArgumentError, FormatError
from weightlift.core.paths import target_text
from weightlift.core.sizes import parse_shard_size, parse_size
from weightlift.models.replacing import WeightNames, replace_weights

if TYPE_CHECKING:
    import torch

__all__ = ["save_checkpoint", "save_weights"]

# Each thread writes at the speed of the page cache; more threads only compete.
_WRITERS = 4


def save_checkpoint(
    state_dict: Mapping[str, torch.Tensor],
    folder: str | os.PathLike[str],
    *,
    max_shard_size: int | str = "5GB",
    metadata: Mapping[str, str] | None = None,
) -> list[str]:
    """Saves a state dict as ``model.safetensors``, or as shards with an index. After a kill the old
    or the new weights load.

    The names are those of transformers and ``huggingface_hub.save_torch_state_dict``. Existing
    weights of these names are replaced, other files stay. Tied weights are saved once; the metadata
    has ``{dropped name: kept name}``.

    Args:
        state_dict: name -> tensor, on any device, contiguous or not.
        folder: the folder, made if missing.
        max_shard_size: largest number of tensor bytes in one file, unless a single tensor is
            larger: a number or text such as ``"5GB"`` (10^9 bytes).
        metadata: text -> text for the header of each file and for the index.

    Returns:
        The names of the files, the index last.

    Raises:
        ArgumentError: a tensor cannot be saved, ``folder`` is the name of a file, or
            ``max_shard_size`` is no size.
        OSError: with the file's name; the old files are unchanged.
    """
    if not isinstance(state_dict, Mapping):
        raise ArgumentError(
            f"the state dict is {type(state_dict).__name__}, not a dict of names to tensors: for a "
            "module, save module.state_dict()"
        )
    text = target_text(folder)
    check_metadata(metadata, f"{text}: ")
    if text.lower().endswith((".safetensors", ".bin", ".pt")) and not Path(text).is_dir():
        raise ArgumentError(
            f"{text}: save_checkpoint writes a folder, and this is the name of a file: save_file "
            "writes one"
        )
    return save_weights(
        state_dict,
        folder,
        stem="model",
        max_shard_size=parse_shard_size(max_shard_size),
        metadata=metadata,
    )


def save_weights(
    state_dict: Mapping[str, Any],
    save_directory: str | os.PathLike[str],
    *,
    stem: str = "diffusion_pytorch_model",
    variant: str | None = None,
    safe_serialization: bool = True,
    max_shard_size: int | str = "10GB",
    save_function: Callable[..., object] | None = None,
    metadata: Mapping[str, str] | None = None,
    companions: Mapping[str, bytes] | None = None,
) -> list[str]:
    """Saves tensors as ``diffusion_pytorch_model.safetensors``, or as shards with an index.

    The files are those that diffusers' ``save_pretrained`` writes. They take the place of weights
    of the same stem, variant and format, sharded or not; other files stay. On an error nothing is
    left behind and the old weights are as they were; a kill may leave ``.weightlift-*`` files,
    which may be deleted. See ``models.replacing`` for what a kill leaves otherwise.

    Names that are one tensor (tied weights) are saved once in safetensors, under the first of them;
    the header's metadata, or the index's, says ``{dropped name: kept name}``.

    Args:
        state_dict: name -> tensor, on any device, contiguous or not. Strings, which bitsandbytes
            puts there, are left out, as in diffusers.
        save_directory: the folder; made if it is missing.
        stem: what the names begin with.
        variant: ``"fp16"`` saves ``diffusion_pytorch_model.fp16.safetensors``.
        safe_serialization: ``False`` saves with ``torch.save``, as ``.bin``.
        max_shard_size: largest number of tensor bytes in one file, if no tensor alone has more; a
            number or text such as ``"5GB"`` (10^9 bytes).
        save_function: called with ``(tensors, path)``, and with ``safe_serialization`` if it has
            an argument of that name (as ``accelerator.save`` has), to write a file; one after the
            other, in the calling thread. By default what the environment variable
            ``DIFFUSERS_SAVE_MODE`` names, such as ``"my_module:save"``.
        metadata: text for the header of each safetensors file, and for the index.
        companions: file name -> content, for files that make no sense with other weights, such as
            ``config.json``; they change in the same step.

    Returns:
        The names of the files in the folder, companions aside; the index last.

    Raises:
        ArgumentError: a tensor that cannot be saved, or a ``save_function`` that did not.
        OSError: with ``errno``, such as that of a full disk, and the file's name in ``filename``.
            ``NotADirectoryError``: the folder is a file; ``IsADirectoryError``: the file a folder.
    """
    names = WeightNames.of(stem, variant, ".safetensors" if safe_serialization else ".bin")
    save_function = save_function or _configured_save_function()
    if not callable(save_function) and save_function is not None:
        raise ArgumentError(
            f"save_function is {save_function!r}; it must be a function of tensors and a path"
        )
    tensors = {name: value for name, value in state_dict.items() if not isinstance(value, str)}
    for name, tensor in tensors.items():
        _check(f"{os.fspath(save_directory)}: tensor {name!r}", tensor, safe_serialization)
    layout = _Layout.of(names, tensors, max_shard_size, metadata or {}, companions or {})
    folder = _make(Path(save_directory))
    for name in (*layout.files, names.single, names.index):
        if (folder / name).is_dir():
            raise IsADirectoryError(f"{folder / name} is a directory: remove it, or save elsewhere")
    present = [path.name for path in folder.iterdir() if not path.is_dir()]
    # The extension is for save_function, which may go by it.
    staged = {
        name: temporary_beside(folder / name).with_suffix(Path(name).suffix)
        for name in layout.files
    }
    writer = _Writer(folder, layout, staged, save_function)
    try:
        writer.write_contents()
        writer.write_shards()
        replace_weights(folder, names, staged, present, layout.sharded, layout.companions)
    finally:
        for temporary in staged.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
    preferred = WeightNames.of(stem, variant, ".safetensors")
    if not safe_serialization and {preferred.single, preferred.index} & set(present):
        warnings.warn(
            f"{folder} also has {preferred.single} of an earlier save, which loaders prefer: "
            "remove it, or load with use_safetensors=False",
            stacklevel=2,
        )
    return [*layout.shards, *([names.index] if layout.sharded else [])]


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The files of a save and their content.

    Attributes:
        names: the names of the files.
        tensors: all tensors by name.
        shards: file of weights -> the names of its tensors.
        companions: name -> content of the files that belong to the weights.
        contents: name -> content of all other files, including the index.
        header: metadata of each safetensors file.
    """

    names: WeightNames
    tensors: Mapping[str, torch.Tensor]
    shards: Mapping[str, list[str]]
    companions: Mapping[str, bytes]
    contents: Mapping[str, bytes]
    header: Mapping[str, str]

    @classmethod
    def of(
        cls,
        names: WeightNames,
        tensors: Mapping[str, torch.Tensor],
        max_shard_size: int | str,
        metadata: Mapping[str, str],
        companions: Mapping[str, bytes],
    ) -> _Layout:
        tied = _tied(tensors) if names.extension == ".safetensors" else {}
        described = {**tied, **metadata}
        shards, total = _split(tensors.keys() - tied.keys(), tensors, names, max_shard_size)
        if len(shards) == 1:
            header = {"format": "pt", **described}
            return cls(names, tensors, shards, companions, companions, header)
        weight_map = {tensor: file for file, inside in shards.items() for tensor in inside}
        described.pop("format", None)
        index = {"metadata": {"total_size": total, **described}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        contents = {**companions, names.index: text.encode()}
        return cls(names, tensors, shards, companions, contents, {"format": "pt", **metadata})

    @property
    def sharded(self) -> bool:
        return len(self.shards) > 1

    @property
    def files(self) -> list[str]:
        return [*self.shards, *self.contents]


class _Writer:
    """Writes the files of a layout under their temporary names, and flushes them."""

    def __init__(
        self,
        folder: Path,
        layout: _Layout,
        staged: Mapping[str, Path],
        save_function: Callable[..., object] | None,
    ) -> None:
        self._folder = folder
        self._layout = layout
        self._staged = staged
        self._save_function = save_function
        self._safetensors = layout.names.extension == ".safetensors"
        # Limits host copies to one shard at a time.
        self._copying = threading.Lock()

    def write_contents(self) -> None:
        for name, content in self._layout.contents.items():
            with _naming(self._folder / name):
                self._staged[name].write_bytes(content)
                flush_file(self._staged[name])

    def write_shards(self) -> None:
        """Writes several shards at a time; with ``save_function`` one by one in this thread."""
        files = list(self._layout.shards)
        if self._save_function is not None or len(files) == 1:
            for file in files:
                self._write_shard(file)
            return
        count = min(_WRITERS, len(files))
        pool = concurrent.futures.ThreadPoolExecutor(count, "weightlift-save")
        try:
            for _ in pool.map(self._write_shard, files):
                pass
        finally:
            pool.shutdown(cancel_futures=True)

    def _write_shard(self, file: str) -> None:
        shard = {name: self._layout.tensors[name] for name in self._layout.shards[file]}
        copied = any(t.device.type != "cpu" or not t.is_contiguous() for t in shard.values())
        staged = self._staged[file]
        # write_safetensors flushes by itself.
        with self._copying if copied else contextlib.nullcontext(), _naming(self._folder / file):
            shard = _to_host(shard)
            if self._save_function is not None:
                _call(self._save_function, shard, staged, self._safetensors)
                flush_file(staged)
            elif self._safetensors:
                _write_safetensors(shard, staged, self._layout.header)
            else:
                _write_torch(shard, staged)
                flush_file(staged)


def _configured_save_function() -> Callable[..., object] | None:
    # diffusers documents this variable but does not read it.
    named = os.environ.get("DIFFUSERS_SAVE_MODE")
    if not named:
        return None
    try:
        found = pkgutil.resolve_name(named)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArgumentError(
            f"DIFFUSERS_SAVE_MODE is {named!r}; it must name a function, such as "
            f"'my_module:save': {error}"
        ) from error
    if not callable(found):
        raise ArgumentError(f"DIFFUSERS_SAVE_MODE is {named!r}, which is not a function: {found!r}")
    function: Callable[..., object] = found
    return function


def _check(which: str, tensor: Any, safe_serialization: bool) -> None:
    import torch

    def refuse(why: str) -> ArgumentError:
        return ArgumentError(f"{which} cannot be saved: {why}")

    if not isinstance(tensor, torch.Tensor):
        raise refuse(f"it is {type(tensor).__name__}, not a tensor; leave it out")
    if tensor.device.type == "meta":
        raise refuse("it is on 'meta' and has no values; load the model before the save")
    if tensor.layout != torch.strided:
        raise refuse(f"its layout is {tensor.layout}; save tensor.to_dense()")
    if safe_serialization and dtypes.file_name(tensor.dtype) in (None, "C32", "C128"):
        raise refuse(
            f"safetensors has no {tensor.dtype}; cast it, or pass safe_serialization=False"
        )


def _tied(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Dropped name -> kept name, for names with the same elements of the same memory.

    Tensors that only overlap are kept: a loader could not rebuild one from the other.
    """
    kept: dict[Any, str] = {}
    dropped = {}
    for name, tensor in tensors.items():
        if tensor.numel() == 0:
            continue
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        first = kept.setdefault((tensor.device, tensor.is_conj(), tensor.is_neg(), *view), name)
        if first != name:
            dropped[name] = first
    return dropped


def _split(
    kept: set[str],
    tensors: Mapping[str, torch.Tensor],
    names: WeightNames,
    max_shard_size: int | str,
) -> tuple[dict[str, list[str]], int]:
    """File -> its tensors, and the total number of bytes."""
    limit = parse_size(max_shard_size, "max_shard_size")  # 0: a file a tensor
    total = sum(int(tensors[name].nbytes) for name in kept)
    if total <= limit:  # without the import, which takes as long as to write 20 MB
        return {names.single: [name for name in tensors if name in kept]}, total
    from huggingface_hub import get_torch_storage_id, split_state_dict_into_shards_factory

    split = split_state_dict_into_shards_factory(
        {name: tensor for name, tensor in tensors.items() if name in kept},
        get_storage_size=lambda tensor: int(tensor.nbytes),
        # torch.save keeps tensors that share memory together; safetensors has no shared memory.
        get_storage_id=get_torch_storage_id if names.extension == ".bin" else lambda tensor: None,
        filename_pattern="{suffix}",
        max_shard_size=limit,
    )
    shards = {
        f"{names.base}{number}{names.extension}": inside
        for number, inside in split.filename_to_tensors.items()
    }
    return shards or {names.single: []}, split.metadata["total_size"]


def _make(folder: Path) -> Path:
    if folder.is_file():
        raise NotADirectoryError(f"{folder} is a file: give a folder to save to")
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    make_folder(folder)
    for path in missing:
        flush_folder(path.parent)
    return folder


def _to_host(shard: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors in host memory, contiguous, without entries that are not tensors."""
    return {
        name: tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
        for name, tensor in shard.items()
    }


def _write_safetensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    entries = []
    for name, tensor in tensors.items():
        entry = entry_of(name, tensor)
        if entry is None:
            raise ArgumentError(
                f"tensor {name!r} is of {tensor.dtype}, which safetensors does not have: cast it"
            )
        entries.append(entry)
    entries = in_order(entries)
    data = (bytes_of(tensors[entry.name].resolve_conj().resolve_neg()) for entry in entries)
    write_safetensors(path, header_of(entries, metadata), data, size=size_of(entries))


def _write_torch(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    import torch

    # An open file, because torch.save would write the temporary name of a path into the archive,
    # and raise system errors without errno.
    with path.open("wb") as file:
        torch.save(dict(tensors), file)


def _call(
    save_function: Callable[..., object],
    tensors: dict[str, torch.Tensor],
    path: Path,
    safe_serialization: bool,
) -> None:
    more = {}
    with contextlib.suppress(ValueError, TypeError):  # some builtins have no signature
        if "safe_serialization" in inspect.signature(save_function).parameters:
            more["safe_serialization"] = safe_serialization
    save_function(tensors, str(path), **more)
    if not path.exists():
        raise ArgumentError("save_function wrote no file at its path argument")
    if safe_serialization:
        try:
            complete = set(Checkpoint.from_file(path)) == tensors.keys()
        except FormatError:
            complete = False
        if not complete:
            raise ArgumentError(
                "save_function did not write these tensors as safetensors: pass "
                "safe_serialization=False for a function that pickles, such as torch.save"
            )


@contextlib.contextmanager
def _naming(file: Path) -> Iterator[None]:
    """Turns the writers' exceptions into OSErrors that name the file."""
    outside = sys.exc_info()[1]
    try:
        yield
    except ArgumentError as error:
        raise ArgumentError(f"{file}: {error}") from error
    except Exception as error:
        number = errno_of(error, outside)
        if number is None:
            raise
        raise save_error(number, file) from error

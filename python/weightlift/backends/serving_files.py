"""Shared code of the serving engines' loaders: files as one checkpoint, weights by name."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.checkpoint.shard_index import parse_index
from weightlift.core.errors import CheckpointError
from weightlift.core.report import LoadReport, format_bytes
from weightlift.load.copies import Copy, RunningCopies
from weightlift.load.options import LoadOptions
from weightlift.load.read_ahead import read_ahead
from weightlift.module.recording.reader import CheckpointReader, sources_of
from weightlift.module.recording.recorder import Recorder
from weightlift.module.recording.replay import Replay, Taken
from weightlift.module.recording.sources import Source

__all__ = [
    "AHEAD_BYTES",
    "OWN_KEYS",
    "FilesReader",
    "expect_tensors",
    "refuse_unfilled",
    "summary",
    "tell_unfilled",
    "weights_again",
    "weights_of",
]

# weightlift's keys in an engine's extra configuration.
OWN_KEYS = ("slices", "check", "share")
# Bytes of waiting slices that start a read while the model's code still runs.
AHEAD_BYTES = 128 << 20


class FilesReader:
    """Reads from all added files as from one checkpoint.

    Attributes:
        report: the report of all reads.
        offered: bytes of all tensors in the files.
        whole: name -> reason, for tensors that were read whole instead of a part.
        absent: (file, tensor) that the file's index says is in it, and is not.
        last: (file, tensor) that was handed out last.
    """

    checkpoint = None

    def __init__(self, options: LoadOptions) -> None:
        self.options = options
        self.offered = 0
        self.whole: dict[str, str] = {}
        self.absent: list[tuple[str, str]] = []
        self.last: tuple[str, str] | None = None
        self._counted = 0
        self._parts: list[tuple[Checkpoint, dict[str, str]]] = []
        self._keys: set[str] = set()
        self._indexes: dict[Path, dict[str, list[str]]] = {}
        self._reader: CheckpointReader | None = None
        self._before = LoadReport()

    @property
    def report(self) -> LoadReport:
        read = LoadReport(bytes=self._counted, read_bytes=self._counted)
        now = self._before if self._reader is None else self._before.plus(self._reader.report)
        return now.plus(read)

    def open(self, file: str) -> Checkpoint:
        """One of the files; what the index beside it says is looked at too."""
        checkpoint = open_checkpoint(file)
        path = Path(file)
        if path.parent not in self._indexes:
            self._indexes[path.parent] = _indexes_in(path.parent)
        said = self._indexes[path.parent].get(path.name, ())
        self.absent += [(file, name) for name in said if name not in checkpoint]
        return checkpoint

    def add(self, checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, str]:
        """Adds a file's tensors; returns name -> key in the joined checkpoint."""
        number = len(self._parts)
        keys = {name: name if name not in self._keys else f"{name} ({number})" for name in names}
        self._keys.update(keys.values())
        if self._reader is not None:
            self._before, self._reader = self._before.plus(self._reader.report), None
        self._parts.append((checkpoint, keys))
        self.offered += checkpoint.stored_bytes
        return keys

    def count(self, tensor: torch.Tensor) -> None:
        """Counts a tensor that was read elsewhere."""
        self._counted += tensor.numel() * tensor.element_size()

    def tensors(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        return self._all().tensors(names)

    def copy(self, copies: Sequence[Copy]) -> None:
        self._all().copy(copies)

    def start(self, copies: Sequence[Copy]) -> RunningCopies:
        return self._all().start(copies)

    def ended(self, report: LoadReport) -> None:
        self._all().ended(report)

    @property
    def joined(self) -> Checkpoint:
        """The checkpoint of all added tensors."""
        return self._all().checkpoint

    def _all(self) -> CheckpointReader:
        if self._reader is None:
            self._reader = CheckpointReader(Checkpoint.joined(self._parts), self.options)
        return self._reader


def weights_of(
    files: Iterable[str],
    reader: FilesReader,
    recorder: Recorder | None,
    *,
    prefix: str = "",
    skip: Callable[[str], bool] = lambda name: False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields (name, tensor) of all files, in the engines' order.

    Args:
        files: safetensors or torch files.
        reader: reads or counts the bytes.
        recorder: with a recorder, the tensors have no bytes; without, they are whole and read
            ahead.
        prefix: the prefix of the yielded names.
        skip: whether to leave out a name of a file.

    Raises:
        CheckpointError: without a recorder, a file lacks a tensor that its index names.
    """
    for file in files:
        checkpoint = reader.open(file)
        chosen = [name for name in _in_order(file, checkpoint) if not skip(name)]
        keys = reader.add(checkpoint, chosen)
        if recorder is None:
            _refuse_absent(reader)
            yield from _whole(file, checkpoint, chosen, reader, prefix)
            continue
        for name, source in sources_of(checkpoint, chosen).items():
            reader.last = file, name
            if source is None:
                yield prefix + name, reader.tensors([keys[name]])[keys[name]]
            else:
                yield prefix + name, recorder.placeholder(keys[name], source)


def weights_again(
    files: Iterable[str],
    reader: FilesReader,
    taken: Taken,
    *,
    prefix: str = "",
    skip: Callable[[str], bool] = lambda name: False,
) -> Iterator[tuple[str, torch.Tensor]]:
    """As ``weights_of``, for loading code that has run before.

    Args:
        files: safetensors or torch files.
        reader: reads the bytes.
        taken: the parts that the first run used.
        prefix: the prefix of the yielded names.
        skip: whether to leave out a name of a file.

    Raises:
        CheckpointError: a file lacks a tensor that was taken then and that its index names.
    """
    known: dict[str, Source | None] = {}
    names: dict[str, tuple[str, str]] = {}
    opened: list[tuple[str, Checkpoint, list[str]]] = []
    for file in files:
        checkpoint = reader.open(file)
        chosen = [name for name in _in_order(file, checkpoint) if not skip(name)]
        opened.append((file, checkpoint, chosen))
        keys = reader.add(checkpoint, chosen)
        for name, source in sources_of(checkpoint, chosen).items():
            known[keys[name]], names[keys[name]] = source, (file, name)
    refuse_unfilled(reader, [name for _, name in reader.absent if name in taken.parts])
    if not taken.is_of(known):
        _refuse_absent(reader)
        for file, checkpoint, chosen in opened:
            yield from _whole(file, checkpoint, chosen, reader, prefix)
        return
    sources = ((key, source) for key, source in known.items() if source is not None)
    with contextlib.closing(Replay(reader, taken, reader.whole).tensors(sources)) as tensors:
        for key, source in known.items():
            tensor = reader.tensors([key])[key] if source is None else next(tensors)[1]
            reader.last = names[key]
            yield prefix + names[key][1], tensor


def _whole(
    file: str, checkpoint: Checkpoint, names: Sequence[str], reader: FilesReader, prefix: str
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, tensor in read_ahead(checkpoint, names, reader.options):
        reader.count(tensor)
        reader.last = file, name
        yield prefix + name, tensor


def summary(reader: FilesReader, taken: Taken | None, seconds: float) -> str:
    """One line for the engine's log.

    Args:
        reader: the reader.
        taken: the used parts of the tensors; ``None`` if the model got whole tensors.
        seconds: the duration in seconds.
    """
    read, offered = format_bytes(reader.report.read_bytes), format_bytes(reader.offered)
    text = f"weightlift read {read} of {offered} in {seconds:.2f} s"
    if taken is None:
        return f"{text}, in whole tensors"
    text += f"; the slices of this rank are {format_bytes(taken.sliced_bytes)}"
    reasons: dict[str, list[str]] = {}
    for name, why in {**taken.whole, **reader.whole}.items():
        reasons.setdefault(why, []).append(name)
    for why, names in reasons.items():
        more = ", ..." if len(names) > 3 else ""
        text += f"; {len(names)} came whole by {why}: {', '.join(names[:3])}{more}"
    return text


def expect_tensors(recorder: Recorder, model: torch.nn.Module) -> bool:
    """Declares a model's parameters and buffers.

    Those on ``meta`` stay there for the engine, which gives a layer that it quantizes online memory
    when all its tensors have come, and other parameters at once. Returns whether there are any.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    recorder.expect((name, tensor) for name, tensor in tensors if not tensor.is_meta)
    return any(tensor.is_meta for _, tensor in tensors)


def refuse_unfilled(
    reader: FilesReader, unfilled: Sequence[str], *, made_late: bool = False
) -> None:
    """Raises where the model misses what a file should have had.

    Args:
        reader: that has read.
        unfilled: parameters that nothing, or not all, was written to.
        made_late: whether the engine made some while they came, which ``unfilled`` leaves out.

    Raises:
        CheckpointError: some are, and the index names tensors that its files lack.
    """
    if made_late:
        _refuse_absent(reader)
    if not unfilled or not reader.absent:
        return
    rest = f" and {len(unfilled) - 3} more" if len(unfilled) > 3 else ""
    raise CheckpointError(
        f"{_absent(reader)}; {', '.join(unfilled[:3])}{rest} would be left unfilled: fetch the "
        "file again"
    )


def _refuse_absent(reader: FilesReader) -> None:
    """Where nobody sees which parameters the tensors fill."""
    if reader.absent:
        raise CheckpointError(
            f"{_absent(reader)}; a parameter may be left unfilled: fetch the file again"
        )


def _absent(reader: FilesReader) -> str:
    file, name = reader.absent[0]
    more = f", and {len(reader.absent) - 1} more such" if len(reader.absent) > 1 else ""
    return f"{file}: the index beside it says that tensor {name!r} is in it, and it is not{more}"


def tell_unfilled(log: logging.Logger, reader: FilesReader, unfilled: Sequence[str]) -> None:
    """Lines in an engine's log on parameters that nothing was written to, and on files that are not
    as their index says."""
    if reader.absent:
        log.warning("weightlift: %s", _absent(reader))
    if unfilled:
        more = ", ..." if len(unfilled) > 3 else ""
        log.warning(
            "weightlift: the checkpoint has nothing for %d parameters: %s%s",
            len(unfilled),
            ", ".join(unfilled[:3]),
            more,
        )


def _indexes_in(folder: Path) -> dict[str, list[str]]:
    """File -> the tensors that are in it, by what the indexes in a folder say."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.safetensors.index.json")):
        weight_map, _, _ = parse_index(path.read_bytes(), str(path), False)
        for name, file in weight_map.items():
            found.setdefault(file, []).append(name)
    return found


def _in_order(file: str, checkpoint: Checkpoint) -> list[str]:
    """The names in the order of the reference's ``keys()``, which the engines use."""
    return sorted(checkpoint) if file.endswith(".safetensors") else list(checkpoint)

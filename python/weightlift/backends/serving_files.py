"""What the loaders of serving engines share: files as one checkpoint, weights by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.core.report import LoadReport, format_bytes
from weightlift.load.copies import Copy
from weightlift.load.options import LoadOptions
from weightlift.load.read_ahead import read_ahead
from weightlift.module.recording.reader import CheckpointReader, sources_of
from weightlift.module.recording.recorder import Recorder

__all__ = ["FilesReader", "summary", "weights_of"]


class FilesReader:
    """Reads from all files that were added, as from one checkpoint.

    Attributes:
        report: of all reads.
        offered: bytes of all tensors in the files.
    """

    checkpoint = None

    def __init__(self, options: LoadOptions) -> None:
        self.options = options
        self.offered = 0
        self._counted = 0
        self._parts: list[tuple[Checkpoint, dict[str, str]]] = []
        self._keys: set[str] = set()
        self._reader: CheckpointReader | None = None
        self._before = LoadReport()

    @property
    def report(self) -> LoadReport:
        read = LoadReport(bytes=self._counted, read_bytes=self._counted)
        now = self._before if self._reader is None else self._before.plus(self._reader.report)
        return now.plus(read)

    def add(self, checkpoint: Checkpoint, names: Sequence[str]) -> dict[str, str]:
        """Name -> key in all that there is, for the tensors of another file."""
        number = len(self._parts)
        keys = {name: name if name not in self._keys else f"{name} ({number})" for name in names}
        self._keys.update(keys.values())
        if self._reader is not None:
            self._before, self._reader = self._before.plus(self._reader.report), None
        self._parts.append((checkpoint, keys))
        self.offered += checkpoint.stored_bytes
        return keys

    def count(self, tensor: torch.Tensor) -> None:
        """Of a tensor that was read elsewhere."""
        self._counted += tensor.numel() * tensor.element_size()

    def tensors(self, names: Sequence[str]) -> Mapping[str, torch.Tensor]:
        return self._all().tensors(names)

    def copy(self, copies: Sequence[Copy]) -> None:
        self._all().copy(copies)

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
    """(name, tensor) of all files, in the order in which the engines hand them out.

    Args:
        files: safetensors or torch's.
        reader: whom the bytes come from, or are counted by.
        recorder: with one, the tensors have no bytes; without, they are whole, and read ahead.
        prefix: of the names that are given out.
        skip: of a name in a file, whether it is left out.
    """
    for file in files:
        checkpoint = open_checkpoint(file)
        chosen = [name for name in _in_order(file, checkpoint) if not skip(name)]
        keys = reader.add(checkpoint, chosen)
        if recorder is None:
            for name, tensor in read_ahead(checkpoint, chosen, reader.options):
                reader.count(tensor)
                yield prefix + name, tensor
            continue
        for name, source in sources_of(checkpoint, chosen).items():
            if source is None:
                yield prefix + name, reader.tensors([keys[name]])[keys[name]]
            else:
                yield prefix + name, recorder.placeholder(keys[name], source)


def summary(reader: FilesReader, whole: Mapping[str, str], seconds: float) -> str:
    """One line for the engine's log."""
    text = (
        f"weightlift read {format_bytes(reader.report.bytes)} of {format_bytes(reader.offered)} "
        f"for this rank in {seconds:.2f} s"
    )
    if not whole:
        return text
    return f"{text}; {len(whole)} tensors came whole ({', '.join(sorted(set(whole.values())))})"


def _in_order(file: str, checkpoint: Checkpoint) -> list[str]:
    """As the reference's ``keys()``, which the engines go by."""
    return sorted(checkpoint) if file.endswith(".safetensors") else list(checkpoint)

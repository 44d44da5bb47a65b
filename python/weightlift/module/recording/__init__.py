"""``record``: records which elements of a checkpoint loading code copies where."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import torch

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core.devices import parse_device
from weightlift.core.errors import ArgumentError, CheckpointError
from weightlift.core.given import check_flag
from weightlift.core.report import LoadReport, format_count, set_last_report
from weightlift.load.copies import Copy
from weightlift.load.load_tensors import load_tensors
from weightlift.module.parameters import check_module, parameter_refs, set_all
from weightlift.module.recording.reader import CheckpointReader, NoReader, sources_of
from weightlift.module.recording.recorder import Recorder
from weightlift.module.recording.sources import Source

__all__ = ["Copy", "Recording", "record"]

Headers = Mapping[str, "tuple[str, tuple[int, ...]]"]
Weights = Iterable["tuple[str, torch.Tensor]"]


def record(
    load_weights: Callable[[Weights], object],
    headers: Headers,
    *,
    module: torch.nn.Module | None = None,
    device: torch.device | str = "cpu",
    check: bool = False,
) -> Recording:
    """Runs loading code with tensors that have no bytes, and records which elements of a checkpoint
    it copies where. ``recording.load()`` then reads only these elements, straight to their places.

    These operations are recorded: views of the tensors (``narrow``, ``chunk``, ``select``, slicing,
    ``t``, ``permute``, ``view``, ...), ``to`` and ``clone``, and ``copy_`` into any part of a
    tensor, with casts that the engine does. Constants (``fill_``, ``zero_``) and copies of other
    tensors are written at once, in order. For every other operation (``numpy()``, ``item()``,
    ``data_ptr()``, arithmetic, ``cat``, ``p.data = tensor``) the tensor is read whole, once, and
    the code continues with the real tensor; ``recording.whole`` gives the reason. No operation runs
    twice. The code must use the tensors in the thread that calls this.

    Args:
        load_weights: a function of an iterable of (name, tensor), as models of serving engines have
            it. It may keep tensors: ``load()`` makes them real.
        headers: name -> (the file's dtype, shape), in the order in which the code gets the tensors.
            A ``Checkpoint`` is such a mapping; with other mappings, code that needs bytes is an
            error.
        module: the module whose parameters and buffers are the targets. Only its targets may be on
            ``meta``: ``load()`` replaces them with real ones.
        device: the device that the tensors report to ``load_weights``.
        check: to find faults, ``load()`` runs ``load_weights`` again with whole tensors and
            compares all bytes of all targets.

    Returns:
        The recording.

    Raises:
        ArgumentError: an argument is of the wrong kind.
        DeviceError: ``device`` is invalid.
        CheckpointError: the code needs bytes and ``headers`` is not a ``Checkpoint``, or it does
            something that is impossible for a tensor without storage.
    """
    if not callable(load_weights):
        raise ArgumentError(
            f"record takes a function of weights first, not {type(load_weights).__name__}"
        )
    if not isinstance(headers, Mapping):
        raise ArgumentError(
            f"record takes a Checkpoint second, not {type(headers).__name__}: "
            "open_checkpoint opens one"
        )
    if module is not None:
        check_module(module, "record: module=", alone=True)
    check_flag("check", check)
    try:
        reported = torch.device(device)
    except (RuntimeError, TypeError):
        parse_device(device)  # says what is wrong
        raise
    reader = CheckpointReader(headers) if isinstance(headers, Checkpoint) else NoReader()
    recorder = Recorder(reader, reported)
    slots = [] if module is None else parameter_refs(module)
    recorder.expect((slot.name, slot.tensor) for slot in slots)
    sources = sources_of(headers)
    with recorder.watching():
        result = load_weights(_weights(recorder, reader, sources))
    return Recording(recorder, sources, module, result, load_weights if check else None)


def _weights(
    recorder: Recorder, reader: CheckpointReader | NoReader, sources: Mapping[str, Source | None]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, source in sources.items():
        if source is not None:
            yield name, recorder.placeholder(name, source)
        else:
            recorder.whole[name] = "its elements share bytes, or only torch can read it"
            recorder.used.add(name)
            yield name, reader.tensors([name])[name]


class Recording:
    """The copies that loading code makes.

    Attributes:
        result: the return value of the loading code.
        copies: the copies from parts of tensors to parts of targets, in order.
        whole: name -> reason, for tensors that were read whole while the code ran.
        unused: names of tensors whose bytes the code did not use.
        needed_bytes: bytes of the checkpoint that the copies read.

    It belongs to the tensors of this process, and cannot be pickled or copied.
    """

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "a Recording belongs to the tensors of this process, and cannot be pickled or copied: "
            "record again where it is needed"
        )

    def __init__(
        self,
        recorder: Recorder,
        sources: Mapping[str, Source | None],
        module: torch.nn.Module | None,
        result: object,
        checked: Callable[[Weights], object] | None = None,
    ) -> None:
        self._recorder = recorder
        self._sources = sources
        self._module = module
        self._checked = checked
        self._loaded = False
        self.result = result

    def __repr__(self) -> str:
        whole = format_count(len(self.whole), "tensor")
        read = f", {whole} read whole" if self.whole else ""
        copies = format_count(len(self.copies), "copy", "copies")
        return f"<Recording of {copies}, {format_count(self.needed_bytes, 'byte')}{read}>"

    @property
    def copies(self) -> list[Copy]:
        return [write for write in self._recorder.done if isinstance(write, Copy)]

    @property
    def whole(self) -> dict[str, str]:
        return dict(self._recorder.whole)

    @property
    def unused(self) -> list[str]:
        return [name for name in self._sources if name not in self._recorder.used]

    @property
    def needed_bytes(self) -> int:
        found = 0
        for copy in self.copies:
            source = self._sources[copy.name]
            if source is not None:
                found += copy.target.numel() * source.dtype.itemsize
        return found

    def load(self, checkpoint: Checkpoint | None = None) -> LoadReport:
        """Reads the recorded elements straight to their places. A second call repeats this, as long
        as the targets keep their memory.

        Args:
            checkpoint: another checkpoint with the same names, dtypes and shapes; that of
                ``record`` by default.

        Returns:
            The report of the load.

        Raises:
            ArgumentError: ``checkpoint`` is no ``Checkpoint``.
            CheckpointError: there is no checkpoint, or its tensors differ; or the code wrote
                computed values, which a second call cannot repeat.
            FormatError, ReadError, DeviceError, OutOfMemoryError: as ``load_file``.
        """
        recorder = self._recorder
        known = recorder.reader.checkpoint
        if checkpoint is None and known is None:
            raise CheckpointError("the recording has only headers: give load() a Checkpoint")
        if checkpoint is not None:
            if not isinstance(checkpoint, Checkpoint):
                raise ArgumentError(
                    f"load takes a Checkpoint, not {type(checkpoint).__name__}: open_checkpoint "
                    "opens one"
                )
            self._check(checkpoint)
            recorder.reader = CheckpointReader(checkpoint)
        elif known is not None and self._loaded:
            recorder.reader = CheckpointReader(known)  # with a report of its own
        if self._loaded:
            recorder.repeat()
        else:
            recorder.allocate()
            recorder.finish()
            recorder.replace_kept()
            self._attach_targets()
        self._loaded = True
        report = recorder.reader.report
        report.fallbacks = [*report.fallbacks, *_reasons(recorder.whole)]
        if self._checked is not None:
            self._compare(self._checked)
        set_last_report(report)
        return report

    def _attach_targets(self) -> None:
        """Replaces the module's targets on ``meta`` with the real ones."""
        refs = [] if self._module is None else parameter_refs(self._module)
        values = [
            (ref, value.data)  # .data has its own version counter
            for ref in refs
            if ref.tensor.is_meta and (value := self._recorder.real_target(ref.tensor)) is not None
        ]
        set_all(values)

    def _compare(self, load_weights: Callable[[Weights], object]) -> None:
        """Loads again with whole tensors."""
        checkpoint = self._recorder.reader.checkpoint
        if checkpoint is None:
            return
        targets = self._recorder.real_targets()
        recorded = [_bytes_of(target).clone() for _, target in targets]
        load_weights((name, _whole(checkpoint, name)) for name in self._sources)
        wrong = [
            name
            for (name, target), before in zip(targets, recorded, strict=True)
            if not torch.equal(_bytes_of(target), before)
        ]
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise CheckpointError(
                f"{', '.join(wrong[:3])}{more}: whole tensors give other bytes than the recording: "
                "this is a bug in weightlift, please report it"
            )

    def _check(self, checkpoint: Checkpoint) -> None:
        for name in self._recorder.used:
            source = sources_of(checkpoint, [name]).get(name) if name in checkpoint else None
            if source != self._sources[name]:
                raise CheckpointError(
                    f"tensor {name!r} is missing in the checkpoint, or has another dtype or shape "
                    "than recorded: record again"
                )


def _reasons(whole: Mapping[str, str]) -> list[str]:
    """For the report: the tensors that were read whole, by reason."""
    by_reason: dict[str, list[str]] = {}
    for name, why in whole.items():
        by_reason.setdefault(why, []).append(name)
    more = {why: ", ..." if len(names) > 3 else "" for why, names in by_reason.items()}
    return [
        f"{why}: {format_count(len(names), 'tensor')} read whole: {', '.join(names[:3])}{more[why]}"
        for why, names in by_reason.items()
    ]


def _whole(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    tensor: torch.Tensor = load_tensors(checkpoint, torch.device("cpu"), names=[name])[name]
    return tensor


def _bytes_of(storage: torch.Tensor) -> torch.Tensor:
    return storage.view(torch.uint8)

"""A job, and the adapter with which a library does it."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightlift.load.options import Mode

__all__ = [
    "Contender",
    "Job",
    "Load",
    "cast",
    "dtype_of",
    "each_tensor",
    "model_why_not",
    "ours_why_not",
    "phases",
    "reports",
    "safetensors_only",
    "torch_why_not",
    "whole_files",
]


# Tensors by name, or a model, or a tree of jax arrays.
Load = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """One load.

    Attributes:
        contender: a name in ``CONTENDERS``.
        files: the files of one checkpoint, loaded one after the other, all kept.
        device: as torch names it.
        dtype: torch's name of the dtype that floating-point tensors are wanted in, or ``None``.
        mode: weightlift's ``mode``; with ``"read"``, other libraries also read into their own
            memory.
        tensor: load this tensor alone.
        what: ``"load"``; ``"import"`` to time the import of the library on top of torch's;
            ``"convert"`` to time how the files become those of the library's own format.
        folder: of a model, with its configuration; ``files`` are its weights.
        model: ``"module:Class"`` of that model, for contenders that load into one.
        checksum: compute a checksum of the result after the timed part; on CUDA always.
        forward: run the model once after the timed part.
    """

    contender: str
    files: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str | None = None
    mode: Mode = "auto"
    tensor: str | None = None
    what: str = "load"
    folder: str | None = None
    model: str | None = None
    checksum: bool = False
    forward: bool = False

    def files_as(self, suffix: str) -> tuple[str, ...]:
        """The files of the same names in another format."""
        return tuple(str(Path(file).with_suffix(suffix)) for file in self.files)

    def model_class(self) -> tuple[str, str]:
        """The module and the name of the model's class.

        Raises:
            ValueError: the job has no model, or it is not written ``"module:Class"``.
        """
        module, _, name = (self.model or "").partition(":")
        if not (module and name):
            raise ValueError(
                f"{self.contender!r} loads a model, and the job's model is {self.model!r}: give "
                "its class as 'module:Class'"
            )
        return module, name

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")


@dataclasses.dataclass(frozen=True)
class Contender:
    """A library that loads checkpoints.

    Attributes:
        distribution: the distribution whose version is reported; ``None`` for the model's library.
        module: the module that must be importable.
        why_not: why it cannot do a job, or ``None``; decided without importing it.
        prepare: imports what it needs and returns the function that is timed. Loads nothing,
            because the cost of the first load of a process is part of the measurement.
        imports: the module whose import is timed for jobs of ``what="import"``.
        environment: the virtual environment that has it, if it needs its own.
        reads: the files that it reads instead of the job's.
        convert: makes these of the job's.
        exact: whether its result is the checkpoint, so that its checksum can be compared.
    """

    distribution: str | None
    module: str
    why_not: Callable[[Job], str | None]
    prepare: Callable[[Job], Load]
    imports: str = ""
    environment: str | None = None
    reads: Callable[[Job], tuple[str, ...]] = lambda job: job.files
    convert: Callable[[Job], None] | None = None
    exact: bool = True

    def why_missing(self) -> str | None:
        """Why it cannot be imported by this Python, or ``None``."""
        if importlib.util.find_spec(self.module.partition(".")[0]) is None:
            return f"{self.distribution or self.module} is not installed"
        return None

    def version(self, job: Job) -> str | None:
        distribution = self.distribution or (job.model or "").partition(":")[0]
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            # Run from a source tree that is not installed.
            return getattr(sys.modules.get(self.module), "__version__", None)


class _Phases:
    """The time of a load by phase: each mark adds the time since the previous mark to a phase."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = 0.0
        self._thread = threading.get_ident()

    def start(self, now: float) -> None:
        self.seconds.clear()
        self._last = now

    def mark(self, phase: str, now: float | None = None) -> None:
        if threading.get_ident() == self._thread:
            now = time.perf_counter() if now is None else now
            self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
            self._last = now


phases = _Phases()
# weightlift's reports of its loads.
reports: list[Any] = []


# The `why_not` functions return None or the reason.


def _only(suffixes: tuple[str, ...], text: str) -> Callable[[Job], str | None]:
    def why_not(job: Job) -> str | None:
        wrong = [file for file in job.files if not file.endswith(suffixes)]
        return f"it {text}, and {Path(wrong[0]).name} is none" if wrong else None

    return why_not


_TORCH_FILES = (".bin", ".pt", ".pth", ".ckpt")
safetensors_only = _only((".safetensors",), "reads .safetensors files")
_torch_files_only = _only(_TORCH_FILES, "reads torch.save's files")
ours_why_not = _only((".safetensors", *_TORCH_FILES), "reads .safetensors and torch's files")


def whole_files(job: Job) -> str | None:
    return "it loads whole files" if job.tensor is not None else safetensors_only(job)


def torch_why_not(job: Job) -> str | None:
    return "it loads whole files" if job.tensor is not None else _torch_files_only(job)


def model_why_not(job: Job) -> str | None:
    return None if job.folder is not None else "it loads models, and this is no model's folder"


def dtype_of(job: Job) -> Any:
    import torch

    return None if job.dtype is None else getattr(torch, job.dtype)


def cast(tensors: dict[str, Any], job: Job) -> dict[str, Any]:
    """The cast that users of a library without a dtype argument write."""
    dtype = dtype_of(job)
    if dtype is None:
        return tensors
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def each_tensor(job: Job, safe_open: Callable[..., Any]) -> Load:
    """A loop over ``get_tensor``, as in code that handles each tensor by itself."""

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in job.files:
            with safe_open(file, framework="pt", device=job.device) as opened:
                phases.mark("index")
                for name in opened.keys():  # noqa: SIM118
                    tensors[name] = opened.get_tensor(name)
                phases.mark("move")
        return cast(tensors, job)

    return load

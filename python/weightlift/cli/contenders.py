"""The libraries that loads are measured with, an adapter each.

The measured process runs this file under the Python of the library's own environment, where
weightlift may not be installed: it imports nothing of it at the top.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["CONTENDERS", "Contender", "Job", "phases", "reports"]

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
        mode: weightlift's ``mode``; ``"read"`` asks others, too, for memory of their own.
        tensor: load this tensor alone.
        what: ``"load"``; ``"import"`` to time the import of the library on top of torch's;
            ``"convert"`` to time how the files become those of the library's own format.
        folder: of a model, with its configuration; ``files`` are its weights.
        model: ``"module:Class"`` of that model, for contenders that load into one.
        checksum: have a checksum made of the result, after the clock; on CUDA one always is.
    """

    contender: str
    files: tuple[str, ...] = ()
    device: str = "cpu"
    dtype: str | None = None
    mode: str = "auto"
    tensor: str | None = None
    what: str = "load"
    folder: str | None = None
    model: str | None = None
    checksum: bool = False

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")


@dataclasses.dataclass(frozen=True)
class Contender:
    """A library that loads checkpoints.

    Attributes:
        distribution: the name under which its version is found; of ``None`` that is the model's
            library.
        module: what has to be importable.
        why_not: why it cannot do a job, or ``None``; decided without importing it.
        prepare: imports what it needs and returns the function that is timed. Nothing is loaded
            before: what the first load of a process costs is part of the measurement.
        imports: the module whose import is timed for jobs of ``what="import"``.
        environment: the virtual environment that has it, where that is not everybody's.
        reads: the files that it reads, in the place of the job's.
        convert: makes these of the job's.
        exact: whether what it gives is the checkpoint, so that checksums tell whether it is right.
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

    def absence(self) -> str | None:
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
    """Where a load's time went: each mark books the time since the one before."""

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
# What weightlift reports of its loads.
reports: list[Any] = []
# What must outlive a load.
_kept: list[Any] = []


# What they cannot do ----------------------------------------------------------------------------


def _only(suffixes: tuple[str, ...], text: str) -> Callable[[Job], str | None]:
    def why_not(job: Job) -> str | None:
        wrong = [file for file in job.files if not file.endswith(suffixes)]
        return f"it {text}, and {Path(wrong[0]).name} is none" if wrong else None

    return why_not


_TORCH_FILES = (".bin", ".pt", ".pth", ".ckpt")
_safetensors_only = _only((".safetensors",), "reads .safetensors files")
_torch_files_only = _only(_TORCH_FILES, "reads torch.save's files")
_ours_why_not = _only((".safetensors", *_TORCH_FILES), "reads .safetensors and torch's files")


def _whole_files(job: Job) -> str | None:
    return "it loads whole files" if job.tensor is not None else _safetensors_only(job)


def _torch_why_not(job: Job) -> str | None:
    return "it loads whole files" if job.tensor is not None else _torch_files_only(job)


def _model_why_not(job: Job) -> str | None:
    return None if job.folder is not None else "it loads models, and this is no model's folder"


# weightlift -------------------------------------------------------------------------------------


def _with_phases() -> None:
    """Has weightlift's loads book their phases: index (with opening) until the plan is made;
    allocate until the engine starts; build, what is done while it runs; move until it has ended."""
    from weightlift import materialize, plans

    start, finish = materialize.Loading.start, plans.finish_plan

    def booked_start(loading: Any) -> None:
        phases.mark("index")
        start(loading)
        phases.mark("allocate")

    def booked_finish(*args: Any, **kwargs: Any) -> Any:
        phases.mark("build")
        try:
            return finish(*args, **kwargs)
        finally:
            phases.mark("move")

    materialize.Loading.start = booked_start  # type: ignore[method-assign, assignment]
    plans.finish_plan = booked_finish


def _weightlift(job: Job) -> Load:
    import weightlift

    _with_phases()

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in job.files:
            if job.tensor is not None:
                with weightlift.safe_open(file, device=job.device) as opened:
                    tensors[job.tensor] = opened.get_tensor(job.tensor)
            elif file.endswith(".safetensors"):
                tensors.update(
                    weightlift.load_file(file, job.device, dtype=job.dtype, mode=job.mode)
                )
            else:
                tensors.update(
                    weightlift.load_checkpoint(file, job.device, dtype=job.dtype, mode=job.mode)
                )
            reports.append(weightlift.last_report())
        return tensors

    return load


def _twin_files(job: Job) -> tuple[str, ...]:
    return tuple(str(Path(file).with_suffix(".safetensors")) for file in job.files)


def _twin(job: Job) -> Load:
    """The file of the same name that ends in .safetensors, in the same way."""
    mode = "read" if job.mode == "auto" and job.dtype is None else job.mode
    return _weightlift(dataclasses.replace(job, files=_twin_files(job), mode=mode))


def _booked(load: Load) -> Load:
    import weightlift

    _with_phases()

    def booked() -> Any:
        model = load()
        reports.append(weightlift.last_report())
        return model

    return booked


def _backend(job: Job) -> Load:
    import weightlift

    cls = _model_class(job)
    weightlift.enable()
    return _booked(_from_pretrained(job, cls))


def _mixin_class(job: Job) -> Any:
    import weightlift

    stock = _model_class(job)
    return type(stock.__name__, (weightlift.ModelMixin, stock), {})


def _mixin(job: Job) -> Load:
    """The same model as a class of weightlift's ModelMixin."""
    return _booked(_from_pretrained(job, _mixin_class(job)))


def _construction(job: Job) -> Load:
    """The model's construction alone, without memory for its weights."""
    from weightlift.models.building import Builder

    cls = _mixin_class(job)
    config = cls.load_config(job.folder)
    return lambda: Builder(lambda: cls.from_config(config), _dtype(job)).build(empty=True)


def _reading(job: Job) -> Load:
    """What the model's from_pretrained reads, alone."""
    import weightlift

    return _booked(
        lambda: weightlift.load_checkpoint(
            job.folder or "", job.device, dtype=job.dtype, mode=job.mode
        )
    )


def _load_into(job: Job) -> Load:
    """``load_into`` alone: the model is on ``meta`` when the clock starts."""
    import weightlift

    model = _on_meta(job)
    folder, dtype = job.folder or "", _dtype(job) or "auto"
    _with_phases()

    def load() -> Any:
        reports.append(
            weightlift.load_into(
                model, folder, device_map=job.device, dtype=dtype, strict=False, mode=job.mode
            )
        )
        return model

    return load


# The others -------------------------------------------------------------------------------------


def _dtype(job: Job) -> Any:
    import torch

    return None if job.dtype is None else getattr(torch, job.dtype)


def _cast(tensors: dict[str, Any], job: Job) -> dict[str, Any]:
    """What a user of a library without a dtype argument writes."""
    dtype = _dtype(job)
    if dtype is None:
        return tensors
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def _safetensors(job: Job) -> Load:
    # Own memory is compared with own memory.
    return _reference(job, "pread" if job.mode == "read" else "mmap")


def _reference(job: Job, backend: str) -> Load:
    from safetensors import safe_open
    from safetensors.torch import load_file

    # As all users call it, where the backend is the default.
    how = {} if backend == "mmap" else {"backend": backend}

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in job.files:
            if job.tensor is not None:
                with safe_open(file, framework="pt", device=job.device, **how) as opened:
                    tensors[job.tensor] = opened.get_tensor(job.tensor)
            else:
                tensors.update(load_file(file, device=job.device, **how))
        phases.mark("move")
        return _cast(tensors, job)

    return load


def _indexed(job: Job) -> str:
    """The device with its number, which some peers do not fill in."""
    return "cuda:0" if job.device == "cuda" else job.device


def _safetensors_prefetch(job: Job) -> Load:
    from safetensors import safe_open

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in job.files:
            with safe_open(file, framework="pt", device=_indexed(job)) as opened:
                phases.mark("index")
                names = list(opened.keys())
                loader = opened.prefetch(device=_indexed(job))
                tensors.update({name: loader.take(name) for name in names})
                phases.mark("move")
        return _cast(tensors, job)

    return load


def _torch_load(job: Job, mmap: bool) -> Load:
    import torch

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in job.files:
            tensors.update(torch.load(file, mmap=mmap, weights_only=True, map_location=job.device))
        phases.mark("move")
        return _cast(tensors, job)

    return load


def _fastsafetensors(job: Job) -> Load:
    # By name, here and below: whether a peer is installed is no matter for a type checker.
    library = importlib.import_module("fastsafetensors")

    def load() -> dict[str, Any]:
        loader = library.SafeTensorsFileLoader(
            library.SingleGroup(), _indexed(job), nogds=not job.on_cuda
        )
        loader.add_filenames({0: list(job.files)})
        phases.mark("index")
        buffers = loader.copy_files_to_device()
        phases.mark("move")
        tensors = {name: buffers.get_tensor(name) for name in loader.get_keys()}
        # Closing would free the memory under the tensors.
        _kept.append((loader, buffers))
        return _cast(tensors, job)

    return load


def _instanttensor(job: Job) -> Load:
    library = importlib.import_module("instanttensor")

    def load() -> dict[str, Any]:
        with library.safe_open(list(job.files), framework="pt", device=_indexed(job)) as opened:
            phases.mark("index")
            tensors = dict(opened.tensors())
            phases.mark("move")
        return _cast(tensors, job)

    return load


def _runai(job: Job) -> Load:
    library = importlib.import_module("runai_model_streamer")

    def load() -> dict[str, Any]:
        with library.SafetensorsStreamer() as streamer:
            streamer.stream_files(list(job.files), device=job.device)
            phases.mark("index")
            tensors = dict(streamer.get_tensors())
            phases.mark("move")
        return _cast(tensors, job)

    return load


def _packed(job: Job) -> tuple[str, ...]:
    return tuple(str(Path(file).with_suffix(".flashpack")) for file in job.files)


def _flashpack_convert(job: Job) -> None:
    from safetensors.torch import load_file

    pack_to_file = importlib.import_module("flashpack.serialization").pack_to_file
    for file, packed in zip(job.files, _packed(job), strict=True):
        temporary = Path(packed).with_suffix(".tmp")
        pack_to_file(load_file(file), str(temporary), None)
        temporary.replace(packed)


def _flashpack(job: Job) -> Load:
    if job.mode == "read":
        os.environ["FLASHPACK_CPU_PARALLEL_READ"] = "1"
    library = importlib.import_module("flashpack.deserialization")

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in _packed(job):
            metadata = library.get_flashpack_file_metadata(file)
            phases.mark("index")
            storage, _ = library.read_flashpack_file(file, job.device, metadata=metadata)
            phases.mark("move")
            tensors.update(library.iterate_from_flash_tensor(storage, metadata))
        return _cast(tensors, job)

    return load


def _empty(job: Job) -> Load:
    """No library: a bare loop of torch.empty, the floor of what many small tensors cost."""
    import torch

    from weightlift import _native, dtypes

    wanted = []
    for file in job.files:
        part = _native.IndexedFile.open(file)
        for name, dtype, shape in zip(part.names(), part.dtypes(), part.shapes(), strict=True):
            wanted.append((name, shape, dtypes.to_torch(dtype)))
    device = torch.device(job.device)

    def load() -> dict[str, Any]:
        return {
            name: torch.empty(shape, dtype=dtype, device=device) for name, shape, dtype in wanted
        }

    return load


# Models -----------------------------------------------------------------------------------------


def _model_class(job: Job) -> Any:
    assert job.model is not None
    module, _, name = job.model.partition(":")
    return getattr(importlib.import_module(module), name)


def _from_pretrained(job: Job, cls: Any) -> Load:
    options: dict[str, Any] = {}
    if job.dtype is not None:
        options["dtype"] = _dtype(job)
    if job.device != "cpu":
        options["device_map"] = job.device
    return lambda: cls.from_pretrained(job.folder, **options)


def _stock(job: Job) -> Load:
    return _from_pretrained(job, _model_class(job))


def _on_meta(job: Job) -> Any:
    import accelerate

    cls = _model_class(job)
    with accelerate.init_empty_weights(include_buffers=False):
        if hasattr(cls, "load_config"):
            return cls.from_config(cls.load_config(job.folder))
        return cls(cls.config_class.from_pretrained(job.folder))


def _accelerate(job: Job) -> Load:
    """``load_checkpoint_in_model``: the model is on ``meta`` when the clock starts."""
    import accelerate

    model = _on_meta(job)
    where = job.files[0] if len(job.files) == 1 else job.folder

    def load() -> Any:
        accelerate.load_checkpoint_in_model(
            model, where, device_map={"": job.device}, dtype=_dtype(job)
        )
        return model

    return load


# Flax -------------------------------------------------------------------------------------------


def flax_leaf(name: str, shape: tuple[int, ...]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The path of a UNet's torch parameter in the Flax tree, and how its axes are permuted."""
    *path, kind = re.sub(r"\.(\d+)(?=\.|$)", r"_\1", name).split(".")
    if kind == "weight":
        kind = "scale" if len(shape) == 1 else "kernel"
    axes = {2: (1, 0), 4: (2, 3, 1, 0)}.get(len(shape) if kind == "kernel" else 0)
    return (*path, kind), axes or tuple(range(len(shape)))


def _flax_why_not(job: Job) -> str | None:
    if importlib.util.find_spec("jax") is None or importlib.util.find_spec("flax") is None:
        return "jax and flax are not installed"
    return _model_why_not(job)


def _nested(leaves: dict[tuple[str, ...], Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        place = tree
        for part in path[:-1]:
            place = place.setdefault(part, {})
        place[path[-1]] = leaf
    return tree


def _weightlift_flax(job: Job) -> Load:
    import jax
    from safetensors import safe_open

    import weightlift.flax

    like = {}
    for file in job.files:
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118
                shape = tuple(opened.get_slice(name).get_shape())
                path, axes = flax_leaf(name, shape)
                permuted = tuple(shape[axis] for axis in axes)
                like[path] = jax.ShapeDtypeStruct(permuted, "float32")
    tree = _nested(like)
    _start_jax()

    return _booked(
        lambda: jax.block_until_ready(
            weightlift.flax.load_params(job.folder or "", tree, from_pt=True)
        )
    )


def _safetensors_flax(job: Job) -> Load:
    import jax
    import jax.numpy as jnp
    from safetensors.flax import load_file

    _start_jax()

    def load() -> Any:
        leaves = {}
        for file in job.files:
            tensors = load_file(file)
            phases.mark("move")
            while tensors:  # what is converted is not kept beside its result
                name, array = tensors.popitem()
                path, axes = flax_leaf(name, array.shape)
                leaves[path] = jnp.transpose(array, axes)
        return jax.block_until_ready(_nested(leaves))

    return load


def _start_jax() -> None:
    import jax

    jax.block_until_ready(jax.numpy.zeros(1))


def _ours(prepare: Callable[[Job], Load], why_not: Callable[[Job], str | None]) -> Contender:
    return Contender("weightlift", "weightlift", why_not, prepare, "weightlift")


def _peer(name: str, module: str, prepare: Callable[[Job], Load], **more: Any) -> Contender:
    more = {"environment": name, **more}
    return Contender(name, module, _whole_files, prepare, module, **more)


CONTENDERS: dict[str, Contender] = {
    "weightlift": _ours(_weightlift, _ours_why_not),
    "safetensors": Contender(
        "safetensors", "safetensors", _safetensors_only, _safetensors, "safetensors.torch"
    ),
    "safetensors-pread": Contender(
        "safetensors",
        "safetensors",
        _safetensors_only,
        lambda job: _reference(job, "pread"),
        "safetensors.torch",
    ),
    "safetensors-prefetch": _peer(
        "safetensors", "safetensors", _safetensors_prefetch, environment="safetensors-0.9"
    ),
    "torch": Contender(
        "torch", "torch", _torch_why_not, lambda job: _torch_load(job, mmap=True), "torch"
    ),
    "torch-plain": Contender(
        "torch", "torch", _torch_why_not, lambda job: _torch_load(job, mmap=False), "torch"
    ),
    "fastsafetensors": _peer("fastsafetensors", "fastsafetensors", _fastsafetensors),
    "runai-model-streamer": _peer("runai-model-streamer", "runai_model_streamer", _runai),
    "instanttensor": _peer("instanttensor", "instanttensor", _instanttensor),
    "flashpack": _peer(
        "flashpack", "flashpack", _flashpack, reads=_packed, convert=_flashpack_convert
    ),
    "twin": Contender(
        "weightlift", "weightlift", _torch_why_not, _twin, "weightlift", reads=_twin_files
    ),
    "stock": Contender(None, "torch", _model_why_not, _stock),
    "accelerate": Contender("accelerate", "accelerate", _model_why_not, _accelerate),
    "backend": _ours(_backend, _model_why_not),
    "ModelMixin": _ours(_mixin, _model_why_not),
    "load_into": _ours(_load_into, _model_why_not),
    "construction": dataclasses.replace(_ours(_construction, _model_why_not), exact=False),
    "reading": dataclasses.replace(_ours(_reading, _model_why_not), exact=False),
    "weightlift.flax": _ours(_weightlift_flax, _flax_why_not),
    "safetensors.flax": Contender(
        "safetensors", "safetensors", _flax_why_not, _safetensors_flax, "safetensors.flax"
    ),
    "torch.empty": Contender("torch", "torch", _safetensors_only, _empty, "torch", exact=False),
}

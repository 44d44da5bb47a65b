"""The measured process: one load by one library, timed; also the list of the libraries.

``weightlift.cli.measure`` runs this file in a process of its own. It imports nothing of weightlift
at the top: another library, and ``import weightlift`` itself, are measured without it.

The conversation, a line each way: a ``Job`` as JSON comes in; what the job needs is imported;
``{"ready": ...}`` goes out; ``go`` comes in; the clock runs; the figures go out as JSON.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import mmap
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["CONTENDERS", "Contender", "Job"]

# Tensors by name, or a model.
Load = Callable[[], Any]

_PAGE = mmap.PAGESIZE
_MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h; the mmap module does not name it


@dataclasses.dataclass(frozen=True)
class Job:
    """One load.

    Attributes:
        contender: a name in ``CONTENDERS``.
        files: the files of one checkpoint, loaded one after the other, all kept.
        device: as torch names it.
        dtype: torch's name of the dtype that floating-point tensors are wanted in, or ``None``.
        mode: weightlift's ``mode``; ``"read"`` is the reference's ``backend="pread"``.
        tensor: load this tensor alone.
        what: ``"load"``, or ``"import"`` to time the import of the library on top of torch's.
        folder: of a model, with its configuration; ``files`` are its weights.
        model: ``"module:Class"`` of that model, for contenders that load into one.
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

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")


@dataclasses.dataclass(frozen=True)
class Contender:
    """A library that loads checkpoints.

    Attributes:
        distribution: the name under which its version is found.
        module: what has to be importable.
        why_not: why it cannot do a job, or ``None``; decided without importing it.
        prepare: imports what it needs and returns the function that is timed. Nothing is loaded
            before: what the first load of a process costs is part of the measurement.
        imports: the module whose import is timed for jobs of ``what="import"``.
    """

    distribution: str
    module: str
    why_not: Callable[[Job], str | None]
    prepare: Callable[[Job], Load]
    imports: str

    def refusal(self, job: Job) -> str | None:
        """Why this contender cannot do ``job`` here, or ``None``."""
        if importlib.util.find_spec(self.module) is None:
            return f"{self.distribution} is not installed"
        return self.why_not(job) if job.what == "load" else None

    def version(self) -> str | None:
        try:
            return importlib.metadata.version(self.distribution)
        except importlib.metadata.PackageNotFoundError:
            # Run from a source tree that is not installed.
            return getattr(sys.modules.get(self.module), "__version__", None)


def _only(suffixes: tuple[str, ...], text: str) -> Callable[[Job], str | None]:
    def why_not(job: Job) -> str | None:
        wrong = [file for file in job.files if not file.endswith(suffixes)]
        return f"it {text}, and {Path(wrong[0]).name} is none" if wrong else None

    return why_not


_safetensors_only = _only((".safetensors",), "reads .safetensors files")


_ours_why_not = _only(
    (".safetensors", ".bin", ".pt", ".pth", ".ckpt"), "reads .safetensors and torch's files"
)


def _gpu_only(job: Job) -> str | None:
    if not job.on_cuda:
        return "it is measured on CUDA only"
    if job.tensor is not None:
        return "it loads whole files"
    return _safetensors_only(job)


def _cast(tensors: dict[str, Any], job: Job) -> dict[str, Any]:
    """What a user of a library without a dtype argument writes."""
    if job.dtype is None:
        return tensors
    import torch

    dtype = getattr(torch, job.dtype)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def _weightlift(job: Job) -> Load:
    import weightlift

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
            _reports.append(weightlift.last_report())
        return tensors

    return load


_reports: list[Any] = []


def _safetensors(job: Job) -> Load:
    from safetensors import safe_open
    from safetensors.torch import load_file

    # Own memory is compared with own memory; it has been able to since 0.8.
    own = {"backend": "pread"} if job.mode == "read" else {}

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in job.files:
            if job.tensor is not None:
                with safe_open(file, framework="pt", device=job.device) as opened:
                    tensors[job.tensor] = opened.get_tensor(job.tensor)
            else:
                tensors.update(load_file(file, device=job.device, **own))
        return _cast(tensors, job)

    return load


def _prefetch_why_not(job: Job) -> str | None:
    version = importlib.metadata.version("safetensors")
    if tuple(int(part) for part in version.split(".")[:2]) < (0, 9):
        return f"prefetch came with safetensors 0.9; this is {version}"
    return _gpu_only(job)


def _safetensors_prefetch(job: Job) -> Load:
    from safetensors import safe_open

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in job.files:
            with safe_open(file, framework="pt", device=job.device) as opened:
                names = list(opened.keys())
                loader = opened.prefetch(device=job.device)
                tensors.update({name: loader.take(name) for name in names})
        return _cast(tensors, job)

    return load


def _twin(job: Job) -> Load:
    """The file of the same name that ends in .safetensors, in the same way."""
    twins = tuple(str(Path(file).with_suffix(".safetensors")) for file in job.files)
    mode = "read" if job.mode == "auto" and job.dtype is None else job.mode
    return _weightlift(dataclasses.replace(job, files=twins, mode=mode))


def _torch(job: Job) -> Load:
    return _torch_load(job, mmap=True)


def _torch_plain(job: Job) -> Load:
    return _torch_load(job, mmap=False)


def _torch_load(job: Job, mmap: bool) -> Load:
    import torch

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in job.files:
            tensors.update(torch.load(file, mmap=mmap, weights_only=True, map_location=job.device))
        return _cast(tensors, job)

    return load


def _model_why_not(job: Job) -> str | None:
    return None if job.folder is not None else "it loads models, and this is no model's folder"


def _model_class(job: Job) -> Any:
    assert job.model is not None
    module, _, name = job.model.partition(":")
    return getattr(importlib.import_module(module), name)


def _from_pretrained(job: Job, cls: Any) -> Load:
    import torch

    options: dict[str, Any] = {}
    if job.dtype is not None:
        options["dtype"] = getattr(torch, job.dtype)
    if job.device != "cpu":
        options["device_map"] = job.device

    return lambda: cls.from_pretrained(job.folder, **options)


def _stock(job: Job) -> Load:
    return _from_pretrained(job, _model_class(job))


def _backend(job: Job) -> Load:
    import weightlift

    cls = _model_class(job)
    weightlift.enable()
    load = _from_pretrained(job, cls)

    def booked() -> Any:
        model = load()
        _reports.append(weightlift.last_report())
        return model

    return booked


def _mixin(job: Job) -> Load:
    """The same model as a class of weightlift's ModelMixin."""
    import weightlift

    stock = _model_class(job)
    load = _from_pretrained(job, type(stock.__name__, (weightlift.ModelMixin, stock), {}))

    def booked() -> Any:
        model = load()
        _reports.append(weightlift.last_report())
        return model

    return booked


def _load_into(job: Job) -> Load:
    """``load_into`` alone: the model is on ``meta`` when the clock starts."""
    import accelerate
    import torch

    import weightlift

    cls = _model_class(job)
    with accelerate.init_empty_weights(include_buffers=False):
        if hasattr(cls, "load_config"):
            model = cls.from_config(cls.load_config(job.folder))
        else:
            model = cls(cls.config_class.from_pretrained(job.folder))
    dtype = "auto" if job.dtype is None else getattr(torch, job.dtype)

    folder = job.folder
    assert folder is not None

    def load() -> Any:
        _reports.append(
            weightlift.load_into(
                model, folder, device_map=job.device, dtype=dtype, strict=False, mode=job.mode
            )
        )
        return model

    return load


def _torch_why_not(job: Job) -> str | None:
    if job.tensor is not None:
        return "torch.load has no way to one tensor"
    return _only((".bin", ".pt", ".pth", ".ckpt"), "reads torch.save's files")(job)


def _fastsafetensors(job: Job) -> Load:
    import torch

    # By name, here and below: whether a peer is installed is no matter for a type checker.
    library = importlib.import_module("fastsafetensors")

    def load() -> dict[str, Any]:
        loader = library.SafeTensorsFileLoader(library.SingleGroup(), torch.device(job.device))
        loader.add_filenames({0: list(job.files)})
        buffers = loader.copy_files_to_device()
        tensors = {name: buffers.get_tensor(name) for name in loader.get_keys()}
        # Closing would free the memory under the tensors.
        _kept.append((loader, buffers))
        return _cast(tensors, job)

    return load


_kept: list[Any] = []


def _instanttensor(job: Job) -> Load:
    import torch

    library = importlib.import_module("instanttensor")

    def load() -> dict[str, Any]:
        device = torch.device(job.device)
        with library.safe_open(list(job.files), framework="pt", device=device.index or 0) as opened:
            return _cast(dict(opened.tensors()), job)

    return load


def _runai(job: Job) -> Load:
    library = importlib.import_module("runai_model_streamer")

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        with library.SafetensorsStreamer() as streamer:
            if hasattr(streamer, "stream_files"):
                streamer.stream_files(list(job.files))
                for name, tensor in streamer.get_tensors():
                    # Its buffer is used again; the copy is what its documentation asks for.
                    tensors[name] = tensor.to(job.device, copy=True)
            else:
                for file in job.files:
                    streamer.stream_file(file)
                    for name, tensor in streamer.get_tensors():
                        tensors[name] = tensor.to(job.device, copy=True)
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


CONTENDERS: dict[str, Contender] = {
    "weightlift": Contender("weightlift", "weightlift", _ours_why_not, _weightlift, "weightlift"),
    "safetensors": Contender(
        "safetensors", "safetensors", _safetensors_only, _safetensors, "safetensors.torch"
    ),
    "safetensors-prefetch": Contender(
        "safetensors", "safetensors", _prefetch_why_not, _safetensors_prefetch, "safetensors"
    ),
    "torch": Contender("torch", "torch", _torch_why_not, _torch, "torch"),
    "torch-plain": Contender("torch", "torch", _torch_why_not, _torch_plain, "torch"),
    "twin": Contender("weightlift", "weightlift", _torch_why_not, _twin, "weightlift"),
    "stock": Contender("torch", "torch", _model_why_not, _stock, "torch"),
    "backend": Contender("weightlift", "weightlift", _model_why_not, _backend, "weightlift"),
    "ModelMixin": Contender("weightlift", "weightlift", _model_why_not, _mixin, "weightlift"),
    "load_into": Contender("weightlift", "weightlift", _model_why_not, _load_into, "weightlift"),
    "fastsafetensors": Contender(
        "fastsafetensors", "fastsafetensors", _gpu_only, _fastsafetensors, "fastsafetensors"
    ),
    "instanttensor": Contender(
        "instanttensor", "instanttensor", _gpu_only, _instanttensor, "instanttensor"
    ),
    "runai-model-streamer": Contender(
        "runai-model-streamer",
        "runai_model_streamer",
        _gpu_only,
        _runai,
        "runai_model_streamer",
    ),
    "torch.empty": Contender("torch", "torch", _safetensors_only, _empty, "torch"),
}


def page_runs(tensors: dict[str, Any]) -> list[tuple[int, int]]:
    """(address, bytes) of runs of whole pages, each of which holds some byte of a CPU tensor.

    By pages rather than by tensors, so that touching 100,000 small ones measures memory and not
    100,000 calls.
    """
    spans = sorted(
        (tensor.data_ptr() // _PAGE, (tensor.data_ptr() + tensor.nbytes - 1) // _PAGE)
        for tensor in tensors.values()
        if tensor.nbytes and tensor.device.type == "cpu"
    )
    runs: list[tuple[int, int]] = []
    for first, last in spans:
        if runs and first <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], max(last, runs[-1][1]))
        else:
            runs.append((first, last))
    return [(first * _PAGE, (last - first + 1) * _PAGE) for first, last in runs]


def touch(runs: list[tuple[int, int]]) -> None:
    """Reads one byte of every page."""
    for address, count in runs:
        whole = (ctypes.c_uint8 * count).from_address(address)
        memoryview(whole).cast("B")[::_PAGE].tobytes()


def anonymous_bytes(pid: int | str = "self") -> int:
    """The anonymous memory of a process that is resident now, as /proc/pid/status has it."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _report() -> dict[str, Any] | None:
    found = [dataclasses.asdict(report) for report in _reports if report is not None]
    if not found:
        return None
    return {
        "seconds": sum(one["seconds"] for one in found),
        "threads": max(one["threads"] for one in found),
        "mapped_bytes": sum(one["mapped_bytes"] for one in found),
        "read_bytes": sum(one["read_bytes"] for one in found),
        "pinned_bytes": max(one["pinned_bytes"] for one in found),
        "peak_staging_bytes": max(one["peak_staging_bytes"] for one in found),
        "files": [file for one in found for file in one["files"]],
        "fallbacks": [text for one in found for text in one["fallbacks"]],
    }


def _measure(job: Job, say: Callable[[dict[str, Any]], None]) -> None:
    import torch

    contender = CONTENDERS[job.contender]
    if job.what == "import":

        def load() -> dict[str, Any]:
            __import__(contender.imports)
            return {}

    else:
        load = contender.prepare(job)
        if job.on_cuda:
            # Every library needs a context, and none can make it faster.
            torch.empty(1, device=job.device)
            torch.cuda.synchronize(job.device)
    before = anonymous_bytes()
    say({"ready": True})
    if sys.stdin.readline().strip() != "go":
        return

    cpu = time.process_time()
    start = time.perf_counter()
    tensors = load()
    loaded = time.perf_counter()
    cpu_loaded = time.process_time()
    # Listing the pages is ours, not the library's: the clock stands still.
    model = None if isinstance(tensors, dict) else tensors
    if model is not None:
        tensors = _state_dict(model)
    runs = page_runs(tensors)
    touching = time.perf_counter()
    cpu_touching = time.process_time()
    touch(runs)
    if job.on_cuda:
        torch.cuda.synchronize(job.device)
    end = time.perf_counter()
    cpu_end = time.process_time()

    say(
        {
            "load_seconds": loaded - start,
            "touch_seconds": end - touching,
            "cpu_seconds": cpu_loaded - cpu + cpu_end - cpu_touching,
            "tensors": len(tensors),
            "bytes": sum(tensor.nbytes for tensor in tensors.values()),
            "anon_before": before,
            "anon_after": anonymous_bytes(),
            "report": _report(),
            "forward_seconds": None if model is None else _forward_seconds(model),
            "peak_device_bytes": torch.cuda.max_memory_allocated() if job.on_cuda else None,
        }
    )


def _state_dict(model: Any) -> dict[str, Any]:
    """Of a model, or of all models of a pipeline."""
    if hasattr(model, "state_dict"):
        return dict(model.state_dict())
    return {
        f"{name}.{key}": tensor
        for name, part in model.components.items()
        if hasattr(part, "state_dict")
        for key, tensor in part.state_dict().items()
    }


def _forward_seconds(model: Any) -> float | None:
    import torch

    inputs = getattr(model, "dummy_inputs", None)
    if inputs is None:
        return None
    start = time.perf_counter()
    with torch.no_grad():
        model(**{name: tensor.to(model.device) for name, tensor in inputs.items()})
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter() - start


def back_memory(count: int) -> None:
    """Touches ``count`` bytes of anonymous memory on huge pages and lets them go again.

    A virtual machine's host hands memory out at its first touch, at seconds a GB. The measured
    process must not pay for that, whichever library is measured first.
    """
    memory = mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    try:
        memory.madvise(_MADV_POPULATE_WRITE)
    except OSError:  # before Linux 5.14
        for start in range(0, count, _PAGE):
            memory[start] = 1
    memory.close()


def main() -> None:
    """``measure_child.py`` measures; ``measure_child.py BYTES`` backs memory."""
    if len(sys.argv) > 1:
        back_memory(int(sys.argv[1]))
        return
    given = json.loads(sys.stdin.readline())
    given["files"] = tuple(given["files"])

    def say(line: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    try:
        _measure(Job(**given), say)
    except Exception as error:
        say({"failed": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()

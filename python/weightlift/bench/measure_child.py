"""The measured process: one load by one library, timed.

``weightlift.bench.measure`` runs this file in a separate process, with the Python of the library's
environment. It imports nothing of weightlift at the top, because other libraries, and ``import
weightlift`` itself, are measured without it.

The protocol has one line for each message. The process reads a ``Job`` as JSON, with ``"adapters"``
(the path of a file with further contenders, or null), imports what the job needs, and writes
``{"ready": ...}``. It reads ``go``, runs the timed part, and writes the figures as JSON, followed
by the checksum and the forward pass, if any.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import importlib.util
import inspect
import json
import mmap
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightlift.bench.contenders import Contender, Job, Load

__all__ = ["anonymous_bytes", "backed_memory", "checksum", "page_runs", "touch"]

_PAGE = mmap.PAGESIZE
# For checksums: tensors below this size are concatenated, up to this many bytes; and the number of
# words with different factors.
_SMALL_BYTES = 4 << 20
_TOGETHER_BYTES = 64 << 20
_PLACES = 1 << 20
_MADV_POPULATE_WRITE = 23  # asm-generic/mman-common.h; the mmap module does not name it


def page_runs(tensors: dict[str, Any]) -> list[tuple[int, int]]:
    """(address, bytes) of runs of whole pages that contain bytes of CPU tensors.

    By pages instead of by tensors: touching 100,000 small tensors must measure memory, not 100,000
    calls.
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
    """The resident anonymous memory of a process in bytes, from /proc/pid/status."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


def _report(reports: list[Any]) -> dict[str, Any] | None:
    found = [dataclasses.asdict(report) for report in reports if report is not None]
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
        "memory": [text for one in found for text in one["memory"]],
    }


def _convert(contender: Contender, job: Job) -> float:
    if contender.convert is None:
        raise ValueError(f"{job.contender}: has no files of its own form to convert to")
    start = time.perf_counter()
    contender.convert(job)
    return time.perf_counter() - start


def _prepared(contender: Contender, job: Job) -> Load:
    """The function to measure, after the set-up that all libraries need, such as a CUDA context."""
    import torch

    if job.what == "import":

        def load() -> dict[str, Any]:
            __import__(contender.imports)
            return {}

        return load
    prepared = contender.prepare(job)
    if job.on_cuda:
        torch.empty(1, device=job.device)  # a context
        torch.cuda.synchronize(job.device)
    return prepared


def _measure(
    adapters: Any, contender: Contender, job: Job, say: Callable[[dict[str, Any]], None]
) -> None:
    why_missing = contender.why_missing()
    if why_missing is not None:
        say({"refused": why_missing})
        return
    import torch

    if job.what == "convert":
        say({"seconds": _convert(contender, job)})
        return
    load = _prepared(contender, job)
    before = anonymous_bytes()
    say({"ready": True, "version": contender.version(job)})
    if sys.stdin.readline().strip() != "go":
        return

    # Read now, because other contenders may have had a context on the device until they ended.
    free = torch.cuda.mem_get_info(job.device)[0] if job.on_cuda else 0
    cpu = time.process_time()
    start = time.perf_counter()
    adapters.phases.start(start)
    result = load()
    loaded = time.perf_counter()
    cpu_loaded = time.process_time()
    adapters.phases.mark("finish", loaded)
    # Listing the pages is not the library's work, so it is not timed.
    tensors = _tensors(result)
    runs = page_runs(tensors)
    touching = time.perf_counter()
    cpu_touching = time.process_time()
    touch(runs)
    if job.on_cuda:
        torch.cuda.synchronize(job.device)
    end = time.perf_counter()
    cpu_end = time.process_time()

    elsewhere = {str(t.device) for t in tensors.values() if t.device.type != "cuda"}
    if job.on_cuda and elsewhere:
        say({"refused": f"leaves tensors on {', '.join(sorted(elsewhere))}"})
        return
    figures = {
        "load_seconds": loaded - start,
        "touch_seconds": end - touching,
        "cpu_seconds": cpu_loaded - cpu + cpu_end - cpu_touching,
        "phases": adapters.phases.seconds,
        "tensors": len(tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors.values()),
        "anon_before": before,
        "anon_after": anonymous_bytes(),
        "report": _report(adapters.reports),
        "peak_device_bytes": torch.cuda.max_memory_allocated() if job.on_cuda else None,
        "device_bytes": free - torch.cuda.mem_get_info(job.device)[0] if job.on_cuda else None,
    }
    say(figures)
    if contender.exact and (job.checksum or job.on_cuda):
        say({"checksum": checksum(tensors)})
    if job.forward:
        say(_forward(result))


def checksum(tensors: dict[str, Any]) -> int:
    """A checksum of the names and all bits, computed on the tensors' device.

    Small tensors are concatenated before they are summed, because each sum on a GPU launches a
    kernel.
    """
    import torch

    sums: list[int] = []
    small: list[Any] = []
    held = 0
    for _, tensor in sorted(tensors.items()):
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        if data.numel() >= _SMALL_BYTES:
            sums += _sums(data)
            continue
        small.append(data)
        held += data.numel()
        if held >= _TOGETHER_BYTES:
            sums += _sums(torch.cat(small))
            small, held = [], 0
    if held:
        sums += _sums(torch.cat(small))
    names = [(name, tensors[name].nbytes) for name in sorted(tensors)]
    return zlib.crc32(json.dumps([names, sums]).encode())


def _sums(data: Any) -> list[int]:
    """Sums of the bytes' words, weighted by their places, so that moved words change them."""
    import torch

    if data.data_ptr() % 8 or data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    words = data[:whole].view(torch.int64)
    places = _places(data.device)
    found = [(part * places[: part.numel()]).sum() for part in words.split(_PLACES)]
    made: list[int] = torch.stack([*found, data[whole:].sum(dtype=torch.int64)]).tolist()
    return made


@functools.cache
def _places(device: Any) -> Any:
    import torch

    return torch.arange(_PLACES, device=device) * 2 + 1


def _tensors(result: Any) -> dict[str, Any]:
    """The tensors by name of a dict, a model, all models of a pipeline, or a tree of jax arrays."""
    if not isinstance(result, dict):
        return _state_dict(result)
    if not any(isinstance(value, dict) for value in result.values()):
        return result
    import numpy as np
    import torch

    leaves: dict[str, Any] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for name, value in tree.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{name}.")
            else:
                array = np.asarray(value)  # no copy on the CPU
                address = array.__array_interface__["data"][0]
                view = (ctypes.c_uint8 * array.nbytes).from_address(address)
                leaves[prefix + name] = torch.frombuffer(view, dtype=torch.uint8)

    walk(result, "")
    return leaves


def _state_dict(model: Any) -> dict[str, Any]:
    """The state dict of a model, or of all models of a pipeline."""
    if hasattr(model, "state_dict"):
        return dict(model.state_dict())
    return {
        f"{name}.{key}": tensor
        for name, part in model.components.items()
        if hasattr(part, "state_dict")
        for key, tensor in part.state_dict().items()
    }


def _forward(result: Any) -> dict[str, Any]:
    """The first forward pass of a model, or of each model of a pipeline."""
    import torch

    parts = [result] if isinstance(result, torch.nn.Module) else result.components.values()
    models: list[Any] = [part for part in parts if isinstance(part, torch.nn.Module)]
    start = time.perf_counter()
    for model in models:
        name = type(model).__name__
        inputs = _inputs(model)
        if inputs is None:
            return {"forward": f"what {name} takes is not known; it may have dummy_inputs"}
        try:
            with torch.no_grad():
                model(**{key: _placed(value, model) for key, value in inputs.items()})
        except Exception as error:
            return {"forward": f"{name}: {type(error).__name__}: {str(error)[:200]}"}
    if any(model.device.type == "cuda" for model in models):
        torch.cuda.synchronize()
    return {"forward_seconds": time.perf_counter() - start}


def _inputs(model: Any) -> dict[str, Any] | None:
    """Inputs for a small call: the model's ``dummy_inputs``, or inputs by the configuration of a
    diffusers model with a ``sample``."""
    import torch

    found = getattr(model, "dummy_inputs", None)
    if found is not None:
        return dict(found)
    names = inspect.signature(model.forward).parameters
    config = getattr(model, "config", None)
    channels = getattr(config, "in_channels", None)
    if config is None or channels is None or "sample" not in names:
        return None
    inputs: dict[str, Any] = {"sample": torch.zeros(1, channels, 32, 32)}
    if "timestep" in names:
        inputs["timestep"] = 1
    width = getattr(config, "cross_attention_dim", None)
    if "encoder_hidden_states" in names and isinstance(width, int):
        inputs["encoder_hidden_states"] = torch.zeros(1, 77, width)
    if getattr(config, "addition_embed_type", None) == "text_time":
        ids = 6 * config.addition_time_embed_dim
        text = torch.zeros(1, config.projection_class_embeddings_input_dim - ids)
        inputs["added_cond_kwargs"] = {"text_embeds": text, "time_ids": torch.zeros(1, 6)}
    return inputs


def _placed(value: Any, model: Any) -> Any:
    import torch

    if isinstance(value, dict):
        return {key: _placed(one, model) for key, one in value.items()}
    if not isinstance(value, torch.Tensor):
        return value
    return value.to(model.device, model.dtype if value.is_floating_point() else None)


@contextlib.contextmanager
def backed_memory(count: int) -> Iterator[None]:
    """Holds ``count`` bytes of anonymous memory, touched, on huge pages.

    The host of a virtual machine backs memory at its first touch, which may take seconds for each
    GB, and takes free memory back within about two seconds (Linux,
    Documentation/mm/free_page_reporting.rst). The measured process must not pay for that, so this
    memory is freed right before the clock starts.
    """
    memory = mmap.mmap(-1, count, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    try:
        memory.madvise(_MADV_POPULATE_WRITE)
    except OSError:  # before Linux 5.14
        for start in range(0, count, _PAGE):
            memory[start] = 1
    try:
        yield
    finally:
        memory.close()


def main() -> None:
    """Measures a job. With a number of bytes as argument, backs this much memory until the input
    ends."""
    if len(sys.argv) > 1:
        with backed_memory(int(sys.argv[1])):
            sys.stdout.write("held\n")
            sys.stdout.flush()
            sys.stdin.read()
        return
    # By its path, because weightlift may not be installed here, and must not be imported.
    path = Path(__file__).with_name("contenders") / "__init__.py"
    spec = importlib.util.spec_from_file_location("contenders", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} cannot be imported as a Python file")
    adapters: Any = importlib.util.module_from_spec(spec)
    sys.modules["contenders"] = adapters
    spec.loader.exec_module(adapters)
    given = json.loads(sys.stdin.readline())
    given["files"] = tuple(given["files"])

    def say(line: dict[str, Any]) -> None:
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()

    try:
        known = adapters.read_adapters(given.pop("adapters"))
        job = adapters.Job(**given)
        _measure(adapters, known[job.contender], job, say)
    except Exception as error:
        say({"failed": f"{type(error).__name__}: {error}"})


if __name__ == "__main__":
    main()

"""One contender of ``weightlift bench --stream``, in a separate process: runs steps of a model that
is larger than its memory. Reads the task as JSON from standard input and writes the figures as JSON
to the file that the first argument names."""

from __future__ import annotations

import contextlib
import gc
import hashlib
import importlib
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["drop_from_page_cache", "main"]

# Longer than the reads ahead of a step take after it.
_SETTLE_SECONDS = 0.5
# Then the memory is compared with what it is later: caches have filled up.
_SETTLED_STEPS = 20

# Imported before the memory is measured.
_IMPORTED = {
    "weightlift": ["weightlift.module.streaming"],
    "accelerate": ["accelerate"],
    "diffusers": ["weightlift.load_into", "diffusers.hooks.group_offloading"],
    "whole": ["weightlift.load_into"],
}


def main() -> None:
    task: dict[str, Any] = json.load(sys.stdin)
    import torch

    if task["threads"]:
        torch.set_num_threads(task["threads"])
    with torch.no_grad(), contextlib.ExitStack() as inside:
        for library in _IMPORTED[task["contender"]]:
            importlib.import_module(library)
        if not task["layers"]:
            _model(task)  # imports the library and the model's module
        if task["group"]:
            (Path(task["group"]) / "cgroup.procs").write_text(str(os.getpid()))
        before = _anonymous_bytes()
        with _peak() as peak:
            made = inside.enter_context(tempfile.TemporaryDirectory(dir=task["scratch"]))
            step, trace, handle = _contender(task, inside, made)
            step()  # the first step learns the order
            found: dict[str, Any] = _steps(
                step, trace, task, [*task["files"], *map(str, Path(made).rglob("*"))]
            )
    found |= {
        "streamed_bytes": 0 if handle is None else handle.streamed_bytes,
        "peak_bytes": max(0, peak[0] - before),
    }
    Path(sys.argv[1]).write_text(json.dumps(found))


def _steps(step: Any, trace: list[Any], task: dict[str, Any], files: list[str]) -> dict[str, Any]:
    count = task["steps"]
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    digest, holds = "", []
    settled = min(_SETTLED_STEPS, count)
    for number in range(1, count + 1):
        if task["cold"]:
            for file in files:
                drop_from_page_cache(file)
        trace.clear()  # or the events would be memory that grows
        begin, cpu = time.perf_counter(), time.process_time()
        result = step()
        end = time.perf_counter()
        events = list(trace) if number == count else []
        seconds.append(end - begin)
        cpu_seconds.append(time.process_time() - cpu)
        digest = hashlib.sha256(result.float().numpy().tobytes()).hexdigest()
        if number in (settled, settled + (count - settled) // 2, count):
            holds.append(_holds())
    first = holds[0]
    grown = [{what: there[what] - first[what] for what in first} for there in holds[1:] or holds]
    return {
        "seconds": seconds, "cpu_seconds": cpu_seconds, "digest": digest, "grown": grown,
        "events": _of_a_step(events, begin, end),
    }  # fmt: skip


def _of_a_step(events: list[Any], begin: float, end: float) -> list[Any]:
    """The events between the begin and the end of a step. The use of its last block is told by the
    next step, so the first use in a step is that of the last block of the step before; this step
    ended with the same block."""
    uses = [event for event in events if event[0] == "use"]
    if uses and uses[0][2] < begin:
        events = [event for event in events if event is not uses[0]]
        events.append(("use", uses[0][1], uses[-1][3], end))
    return [(kind, block, max(t, begin), min(u, end)) for kind, block, t, u in events]


def drop_from_page_cache(file: str) -> None:
    """Drops the file's pages from the page cache, except mapped ones."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # dirty pages are not dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _holds() -> dict[str, int]:
    """What the process holds while nothing is read, without garbage: the reads ahead of the next
    step, which have threads and memory, end first."""
    time.sleep(_SETTLE_SECONDS)
    gc.collect()
    return {
        "bytes": _anonymous_bytes(),
        "threads": len(list(Path("/proc/self/task").iterdir())),
        "files": len(list(Path("/proc/self/fd").iterdir())),
    }


def _contender(
    task: dict[str, Any], inside: contextlib.ExitStack, made: str
) -> tuple[Any, list[Any], Any]:
    """Returns the function that runs a step, its list of events, and the handle if the model is
    streamed. ``made`` is a folder for the contender's files."""
    import torch

    trace: list[Any] = []
    handle = None
    name, memory = task["contender"], task["memory"]
    with torch.device("meta"):
        model, inputs = _model(task)
    if name == "weightlift":
        from weightlift.module.streaming import stream

        handle = inside.enter_context(stream(model, task["folder"], device="cpu", memory=memory))
        handle.trace(lambda *event: trace.append(event))
    elif name == "accelerate":
        from accelerate import infer_auto_device_map, load_checkpoint_and_dispatch

        spread = infer_auto_device_map(model, max_memory={"cpu": memory, "disk": 1 << 50})
        model = load_checkpoint_and_dispatch(
            model, task["folder"], device_map=spread, offload_folder=made
        )
    else:
        from weightlift.load_into import load_into

        # Into own memory: some kernels add in another order if the memory's alignment differs.
        load_into(model, task["folder"], mode="read")
        if name == "diffusers":
            from diffusers.hooks.group_offloading import apply_group_offloading

            apply_group_offloading(
                model,
                onload_device=torch.device("cpu"),
                offload_device=torch.device("cpu"),
                offload_type="leaf_level",
                offload_to_disk_path=made,
            )
    model.eval()

    def step() -> Any:
        result = model(**inputs)
        return result if isinstance(result, torch.Tensor) else result[0]

    return step, trace, handle


def _model(task: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The model on ``meta`` and the inputs of a step."""
    import torch

    if task["layers"]:
        width = task["width"]
        model = Stack(task["layers"], width)
        with torch.device("cpu"):
            return model, {"x": torch.linspace(-1, 1, task["rows"] * width).view(-1, width)}
    import transformers

    config = transformers.AutoConfig.from_pretrained(task["folder"])
    cls = getattr(transformers, config.architectures[0])
    model = cls(config)
    with torch.device("cpu"):
        tokens = torch.arange(task["rows"])[None] % config.get_text_config().vocab_size
    for buffer_name, buffer in list(model.named_buffers()):
        if buffer.is_meta:
            with torch.device("cpu"):
                whole = cls._from_config(_small(config))
            owner, _, key = buffer_name.rpartition(".")
            with contextlib.suppress(AttributeError):
                model.get_submodule(owner)._buffers[key] = whole.get_buffer(buffer_name)
    return model, {"input_ids": tokens, "use_cache": False}


def _small(config: Any) -> Any:
    """The configuration with one layer, for the buffers that no checkpoint has."""
    import copy

    small = copy.deepcopy(config)
    small.get_text_config().num_hidden_layers = 1
    return small


def _stack() -> Any:
    import torch
    from torch import nn

    class Stack(nn.Module):
        """Layers of a transformer's feed-forward part."""

        def __init__(self, layers: int, width: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Sequential(
                    nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(),
                    nn.Linear(4 * width, width),
                )
                for _ in range(layers)
            )  # fmt: skip

        def forward(self, x: torch.Tensor) -> Any:
            for layer in self.layers:
                x = x + layer(x)
            return x

    return Stack


def Stack(layers: int, width: int) -> Any:
    return _stack()(layers, width)


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def _peak() -> Iterator[list[int]]:
    """The peak of the anonymous memory, sampled every 10 ms."""
    peak, ended = [0], threading.Event()

    def watch() -> None:
        while not ended.wait(0.01):
            peak[0] = max(peak[0], _anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


if __name__ == "__main__":
    main()

"""A stack of layers that runs after its load, or during it: the load, the run, and both.

The layers of a file are called ``model.layers.N.input_layernorm.weight`` (of length ``width``) and
``model.layers.N.mlp.down_proj.weight`` (``rows`` x ``width``). A run uses one of torch's threads.
"""

from __future__ import annotations

import os
from typing import Any

from .adapter import Job, Load, reports

__all__ = ["in_background", "loaded", "loaded_and_run", "run_alone"]

# Rows of the input. With this number, a run takes about as long as reading the cold file.
_ROWS = int(os.environ.get("WEIGHTLIFT_BENCH_ROWS", "48"))


def in_background(job: Job) -> Load:
    """The run begins when the load has begun."""
    return _prepared(job, background=True, runs=True)


def loaded_and_run(job: Job) -> Load:
    """The run begins when the load has ended."""
    return _prepared(job, background=False, runs=True)


def loaded(job: Job) -> Load:
    """The load alone."""
    return _prepared(job, background=False, runs=False)


def run_alone(job: Job) -> Load:
    """The run alone: all weights are in memory when the clock starts."""
    from weightlift.load_into import load_into

    model, run = _stack(job)
    load_into(model, job.files[0], mode="read")

    def load() -> Any:
        run()
        return model

    return load


def _prepared(job: Job, *, background: bool, runs: bool) -> Load:
    from weightlift.load_into import load_into

    model, run = _stack(job)

    def load() -> Any:
        report = load_into(model, job.files[0], mode=job.mode, background=background)
        if runs:
            run()
        reports.append(report.wait())
        return model

    return load


def _stack(job: Job) -> tuple[Any, Load]:
    """The module, on ``meta``, and what runs it."""
    import torch

    from weightlift.checkpoint.open_checkpoint import open_checkpoint

    headers = open_checkpoint(job.files[0]).headers()
    sizes: dict[int, tuple[int, ...]] = {
        int(name.split(".")[2]): shape
        for name, (_, shape) in headers.items()
        if name.endswith("down_proj.weight")
    }
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[next(iter(headers.values()))[0]]
    torch.set_num_threads(1)

    class Layer(torch.nn.Module):
        def __init__(self, rows: int, width: int) -> None:
            super().__init__()
            self.input_layernorm = torch.nn.RMSNorm(width, dtype=dtype)
            self.mlp = torch.nn.ModuleDict(
                {"down_proj": torch.nn.Linear(width, rows, bias=False, dtype=dtype)}
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            made: torch.Tensor = self.mlp["down_proj"](self.input_layernorm(x))
            return made

    with torch.device("meta"):
        layers = torch.nn.ModuleList(Layer(*sizes[number]) for number in sorted(sizes))
        model = torch.nn.ModuleDict({"model": torch.nn.ModuleDict({"layers": layers})})
    width = sizes[min(sizes)][1]

    def run() -> None:
        x = torch.ones(_ROWS, width, dtype=dtype)
        with torch.inference_mode():
            for layer in layers:
                x = layer(x)

    return model, run

"""weightlift's loads of files."""

from __future__ import annotations

import dataclasses
from typing import Any

from .adapter import Job, Load, each_tensor, phases, reports

__all__ = ["safe_open", "twin", "weightlift", "with_phases"]


def with_phases() -> None:
    """Makes weightlift's loads record their phases: index (with opening) until the plan is made;
    allocate until the engine starts; build for other work while it runs; move until it has
    ended."""
    from weightlift.load.phases import observe_phases

    # The phase that ends when each of weightlift's phases begins.
    done = {"plan": "index", "run": "allocate", "wait": "build", "deliver": "move"}
    observe_phases(lambda phase: phases.mark(done[phase]))


def weightlift(job: Job) -> Load:
    from weightlift.core.report import last_report
    from weightlift.load_file import load_checkpoint, load_file
    from weightlift.safe_open import safe_open

    with_phases()

    def load() -> dict[str, Any]:
        tensors: dict[str, Any] = {}
        for file in job.files:
            if job.tensor is not None:
                with safe_open(file, device=job.device) as opened:
                    tensors[job.tensor] = opened.get_tensor(job.tensor)
            elif file.endswith(".safetensors"):
                tensors.update(load_file(file, job.device, dtype=job.dtype, mode=job.mode))
            else:
                tensors.update(load_checkpoint(file, job.device, dtype=job.dtype, mode=job.mode))
            reports.append(last_report())
        return tensors

    return load


def twin(job: Job) -> Load:
    """The same load of the files with the suffix .safetensors."""
    mode = "read" if job.mode == "auto" and job.dtype is None else job.mode
    return weightlift(dataclasses.replace(job, files=job.files_as(".safetensors"), mode=mode))


def safe_open(job: Job) -> Load:
    from weightlift.safe_open import safe_open

    return each_tensor(job, safe_open)

"""weightlift's own: tensors of files by name."""

from __future__ import annotations

import dataclasses
from typing import Any

from .adapter import Job, Load, each_tensor, phases, reports

__all__ = ["safe_open", "twin", "weightlift", "with_phases"]


def with_phases() -> None:
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


def weightlift(job: Job) -> Load:
    import weightlift

    with_phases()

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


def twin(job: Job) -> Load:
    """The file of the same name that ends in .safetensors, in the same way."""
    mode = "read" if job.mode == "auto" and job.dtype is None else job.mode
    return weightlift(dataclasses.replace(job, files=job.files_as(".safetensors"), mode=mode))


def safe_open(job: Job) -> Load:
    import weightlift

    return each_tensor(job, weightlift.safe_open)

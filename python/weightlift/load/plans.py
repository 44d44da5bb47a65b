"""Makes, starts, awaits and cancels the engine's plans."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import weightlift._native as _native
from weightlift.core import dtypes, gc_pause
from weightlift.core.errors import read_error
from weightlift.core.settings import Settings
from weightlift.load.allocation import Allocator, TorchAllocator
from weightlift.load.options import Progress
from weightlift.load.phases import enter_phase

__all__ = [
    "POLL_SECONDS",
    "cancel_plan",
    "finish_plan",
    "new_plan",
    "progress_callback",
    "require_untouched",
    "run_plan",
    "start_plan",
]

# How often a waiting caller checks for Ctrl-C and reports progress.
POLL_SECONDS = 0.05


def new_plan(settings: Settings, dtype: str | None = None) -> _native.Plan:
    """An empty plan with these settings, for casts to ``dtype``."""
    plan = _native.Plan(settings.native(dtypes.fp8_rules(dtype)))
    if settings.populate is not None:
        plan.populate(settings.populate)
    return plan


def start_plan(plan: _native.Plan, allocator: Allocator | None) -> None:
    """Schedules a plan and starts it."""
    scratch = []
    for device, count in plan.prepare():
        allocator = allocator or TorchAllocator()
        scratch.append((device, *allocator.empty(device, (count,), "U8")))
    plan.start(scratch)


def finish_plan(
    plan: _native.Plan, progress: bool | Progress = False, *, check_touched: bool = True
) -> dict[str, Any]:
    """Waits for a started plan. Ctrl-C stops it, drains the copies in flight and is raised again.

    Args:
        plan: the started plan.
        progress: ``True`` for a progress bar, or a function of bytes done and total.
        check_touched: raise an error for a file whose modification time changed during the load
            and whose bytes cannot be compared. Otherwise the report's ``"touched"`` names these
            files, and the caller checks their bytes.
    """
    enter_phase("wait")
    try:
        if progress or not plan.wait(0):
            _wait(plan, progress)
    except BaseException:
        cancel_plan(plan)
        raise
    enter_phase("deliver")
    report = plan.finish()
    if not check_touched:
        return report
    require_untouched(report)
    return report


def _wait(plan: _native.Plan, progress: bool | Progress) -> None:
    with progress_callback(progress) as show, gc_pause.resumed():
        while not plan.wait(POLL_SECONDS):
            if show is not None:
                show(*plan.progress())
        if show is not None:
            show(*plan.progress())


def require_untouched(report: dict[str, Any]) -> None:
    """Removes ``"touched"`` from a report.

    Raises:
        ReadError: ``"touched"`` names a file.
    """
    if touched := report.pop("touched"):
        raise read_error(
            "file_changed",
            "the file, or only its modification time, was changed during the load; load it again "
            "when its writer is done",
            touched[0],
        )


def cancel_plan(plan: _native.Plan) -> None:
    """Stops a started plan and waits until nothing is in flight."""
    plan.cancel()
    while not plan.wait(POLL_SECONDS):
        pass


def run_plan(
    plan: _native.Plan, allocator: Allocator | None, progress: bool | Progress = False
) -> dict[str, Any]:
    """Runs a plan to its end."""
    start_plan(plan, allocator)
    return finish_plan(plan, progress)


@contextlib.contextmanager
def progress_callback(progress: bool | Progress) -> Iterator[Progress | None]:
    """The function to call with the progress; ``True`` draws a bar on the terminal."""
    if progress is not True:
        yield progress or None
        return
    from rich.progress import BarColumn, DownloadColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar("[bold]loading", *columns, transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

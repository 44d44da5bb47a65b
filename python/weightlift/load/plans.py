"""LoadPlans that run: made, started, waited for, stopped."""

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

# How often a waiting caller looks up: for Ctrl-C, and for progress.
POLL_SECONDS = 0.05


def new_plan(settings: Settings, dtype: str | None = None) -> _native.Plan:
    """An empty plan under these settings, for casts to ``dtype``."""
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
    """Waits for a started plan; Ctrl-C stops it, drains what is in flight and goes on up.

    Args:
        plan: that was started.
        progress: ``True`` for a bar, or what to tell how far it is.
        check_touched: a file whose modification time has changed during the load, and whose bytes
            cannot be compared, is an error. Otherwise the report's ``"touched"`` names those files,
            and the caller finds out whether their bytes have changed.
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
    """Takes ``"touched"`` out of a report.

    Raises:
        ReadError: it names a file.
    """
    if touched := report.pop("touched"):
        raise read_error(
            "file_changed",
            "the file was written to, or its modification time was changed, while it was being "
            "read; load it again once its writer is done",
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
    """What to tell how far a load is; ``True``: a bar on the terminal."""
    if progress is not True:
        yield progress or None
        return
    from rich.progress import BarColumn, DownloadColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Bar("[bold]loading", *columns, transient=True) as bar:
        task = bar.add_task("loading", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

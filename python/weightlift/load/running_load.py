"""A load while it runs: waited for, or cancelled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from weightlift.core import gc_pause
from weightlift.core.report import LoadReport, record
from weightlift.load.allocation import from_dlpack
from weightlift.load.plans import cancel_plan, finish_plan

if TYPE_CHECKING:
    import weightlift._native as _native
    from weightlift.checkpoint.integrity import HashCheck
    from weightlift.load.options import LoadOptions, Progress
    from weightlift.load.outputs import Outputs

__all__ = ["RunningLoad"]


class RunningLoad:
    """What ``LoadPlan.start`` has started. ``result`` or ``cancel`` ends it.

    Args:
        native: the engine's plan, which has started.
        outputs: what becomes of the engine's tensors.
        fallbacks: what was planned another way than the fastest, and why.
        options: of the load.
        hashes: that are computed meanwhile.
    """

    def __init__(
        self,
        native: _native.Plan,
        outputs: Outputs,
        fallbacks: list[str],
        options: LoadOptions,
        hashes: HashCheck | None,
    ) -> None:
        self._native = native
        self._outputs = outputs
        self._fallbacks = fallbacks
        self._progress = options.progress
        self._caller = options.caller
        self._hashes = hashes
        self._report: dict[str, Any] | None = None

    @gc_pause.paused()
    def result(self) -> dict[str, Any]:
        """Waits for the end: name -> tensor, in the order of the files where one destination takes
        them all, else destination by destination."""
        try:
            report = finish_plan(self._native, self._progress)
            if self._hashes is not None:
                self._hashes.result()
        finally:
            if self._hashes is not None:
                self._hashes.stop()
        tensors = self._outputs.deliver(self._native.tensors(from_dlpack()))
        self._report = record(report, self._fallbacks, self._caller)
        return tensors

    def show(self, progress: Progress) -> None:
        """Tells this, from now on, how far the load is."""
        self._progress = progress

    @property
    def report(self) -> LoadReport:
        """What it did.

        Raises:
            RuntimeError: the load has not ended, or not well.
        """
        if self._report is None:
            raise RuntimeError("the load has no report before its result() has returned")
        return LoadReport.from_native(self._report)

    def cancel(self) -> None:
        """Stops it, and waits until nothing is in flight."""
        if self._hashes is not None:
            self._hashes.stop()
        cancel_plan(self._native)

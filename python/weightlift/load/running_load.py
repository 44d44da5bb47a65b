"""A running load."""

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
    """A load started by ``LoadPlan.start``. Call ``result`` or ``cancel`` to end it.

    Args:
        native: the engine's plan, already started.
        outputs: turns the engine's tensors into those of the caller.
        fallbacks: steps that do not take the fastest way, with reasons.
        options: the options of the load.
        hashes: a hash check that runs in parallel.
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
        """Waits for the end and returns name -> tensor, in the order of the files if there is one
        destination for all tensors, else destination by destination."""
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
        """From now on calls ``progress`` with the progress of the load."""
        self._progress = progress

    @property
    def report(self) -> LoadReport:
        """The report.

        Raises:
            RuntimeError: the load has not ended, or has failed.
        """
        if self._report is None:
            raise RuntimeError("the load has no report before its result() has returned")
        return LoadReport.from_native(self._report)

    def cancel(self) -> None:
        """Stops the load and waits until nothing is in flight."""
        if self._hashes is not None:
            self._hashes.stop()
        cancel_plan(self._native)

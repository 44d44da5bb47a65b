"""The report of a background load."""

from __future__ import annotations

import weakref

from weightlift.core.report import LoadProgress, LoadReport, format_bytes
from weightlift.load.options import LoadOptions
from weightlift.load.plans import progress_callback
from weightlift.module.background.load import BackgroundLoad

__all__ = ["BackgroundReport"]


class BackgroundReport(LoadReport):
    """The report and the handle of a running load. Figures such as ``bytes`` and ``seconds`` are
    set when the load has ended: after ``wait()``, or when the last module has its tensors. The
        names
    of tensors are set at once."""

    def __init__(self, load: BackgroundLoad, earlier: LoadReport, options: LoadOptions) -> None:
        super().__init__()
        self._load = load
        self.earlier = earlier  # the report of tensors loaded before
        self._progress = options.progress
        self._is_complete = False
        load.report = weakref.ref(self)

    def wait(self) -> LoadReport:
        """Waits until the model has all tensors, and returns the report. Ctrl-C ends only the
        wait.

        Raises:
            LoadCancelledError: the load was cancelled.
            WeightliftError: the load failed.
        """
        with progress_callback(self._progress) as show:
            self._load.wait(show)
        return self

    @property
    def progress(self) -> LoadProgress:
        """The bytes that have arrived, and the total."""
        done, total = self._load.arriving.progress()
        earlier = self.earlier.bytes
        return LoadProgress(done + earlier, total + earlier)

    def cancel(self) -> None:
        """Ends the load; tensors that have not arrived stay on ``meta``."""
        self._load.cancel()

    def complete(self, native: LoadReport) -> None:
        """Sets the figures of the ended load."""
        if self._is_complete:
            return
        self._is_complete = True
        done = native.plus(self.earlier)
        names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "meta_keys")
        self.__dict__.update((k, v) for k, v in vars(done).items() if k not in names)

    def __str__(self) -> str:
        if self._is_complete:
            return super().__str__()
        done, total = self.progress
        return f"{format_bytes(done)} of {format_bytes(total)} so far"

"""What the caller of a load in the background is given."""

from __future__ import annotations

import weakref

from weightlift.core.report import LoadProgress, LoadReport, format_bytes
from weightlift.load.options import LoadOptions
from weightlift.load.plans import progress_callback
from weightlift.module.background.load import BackgroundLoad

__all__ = ["BackgroundReport"]


class BackgroundReport(LoadReport):
    """The report of a load that goes on, and its handle. What the load did, such as ``bytes`` and
    ``seconds``, is in it when the load has ended: after ``wait()``, or when the last module has
    taken its tensors; the names of tensors are at once."""

    def __init__(self, load: BackgroundLoad, earlier: LoadReport, options: LoadOptions) -> None:
        super().__init__()
        self._load = load
        self.earlier = earlier  # what was read before it
        self._progress = options.progress
        self._is_complete = False
        load.report = weakref.ref(self)

    def wait(self) -> LoadReport:
        """Until all tensors are the model's; itself. Ctrl-C ends the wait, and not the load.

        Raises:
            LoadCancelledError: the load was cancelled.
            WeightliftError: the load has failed.
        """
        with progress_callback(self._progress) as show:
            self._load.wait(show)
        return self

    @property
    def progress(self) -> LoadProgress:
        """How far it is."""
        done, total = self._load.arriving.progress()
        earlier = self.earlier.bytes
        return LoadProgress(done + earlier, total + earlier)

    def cancel(self) -> None:
        """Ends the load; what has not arrived stays on ``meta``."""
        self._load.cancel()

    def complete(self, native: LoadReport) -> None:
        """The load has ended."""
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

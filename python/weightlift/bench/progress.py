"""Shows the progress of a long measurement."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

__all__ = ["progress_of"]


@contextlib.contextmanager
def progress_of(total: int) -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """Yields two functions: one to call with a description of what begins, and one to call after
    each of ``total`` measurements. Shows a bar if stderr is a terminal, else lines with the
    time."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

    console = Console(stderr=True)
    started = time.monotonic()

    def line(text: str) -> None:
        sys.stderr.write(f"{time.monotonic() - started:6.1f} s  {text}\n")
        sys.stderr.flush()

    if not console.is_terminal:
        yield line, lambda _: None
        return
    with Progress(
        "{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as progress:
        task = progress.add_task("starting", total=total)
        yield (
            lambda text: progress.update(task, description=text),
            lambda _: progress.advance(task),
        )

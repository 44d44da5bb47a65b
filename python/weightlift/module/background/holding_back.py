"""Delays the waits for libraries that read all tensors of a model before they return it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

from weightlift.core.report import LoadReport, set_last_report
from weightlift.load.options import LoadOptions
from weightlift.module.background.load import BackgroundLoad
from weightlift.module.background.report import BackgroundReport

if TYPE_CHECKING:
    import torch

__all__ = ["hold_back", "holding_back"]


class _HeldBack(NamedTuple):
    """A load whose model a library still works on."""

    load: BackgroundLoad
    model: torch.nn.Module
    report: BackgroundReport


_held_back: ContextVar[list[_HeldBack] | None] = ContextVar(
    "weightlift_held_back_loads", default=None
)


@contextlib.contextmanager
def holding_back() -> Iterator[None]:
    """For library code that inspects the tensors of a model whose load begins inside the block: the
    modules begin to wait at the end of the block. If the block fails, the load is cancelled."""
    held_back: list[_HeldBack] = []
    token = _held_back.set(held_back)
    try:
        yield
        for load, model, report in held_back:
            load.find_again(model)
            load.make_modules_wait()
            set_last_report(report)
    except BaseException:
        for load, _, _ in held_back:
            load.cancel()
        raise
    finally:
        _held_back.reset(token)


def hold_back(
    load: BackgroundLoad,
    model: torch.nn.Module,
    options: LoadOptions,
    earlier: LoadReport | None = None,
) -> BackgroundReport:
    """Makes the modules wait, within ``holding_back`` at its end.

    Returns:
        The report of the load, to which ``earlier`` is added: that of tensors loaded before.
    """
    report = BackgroundReport(load, LoadReport() if earlier is None else earlier, options)
    held_back = _held_back.get()
    if held_back is None:
        load.make_modules_wait()
    else:
        held_back.append(_HeldBack(load, model, report))
    return report

"""Plots of times, with a transparent background for light and dark pages."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from weightlift.bench.models import NAMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from weightlift.bench.comparison import Comparison

__all__ = ["Bar", "Panel", "draw", "draw_ratios", "format_rate", "format_seconds", "plot"]

# All three colours have a contrast of more than 3:1 to white and to black.
_OURS = "#2f8f5b"
_OTHERS = "#8a8d91"
_TEXT = "#7d8288"


@dataclasses.dataclass(frozen=True)
class Bar:
    """A contender's time.

    Attributes:
        note: written beside the time.
        ours: whether it is weightlift's.
    """

    name: str
    seconds: float
    note: str = ""
    ours: bool = False


@dataclasses.dataclass(frozen=True)
class Panel:
    """The contenders of one load, which share a scale."""

    title: str
    bars: Sequence[Bar]


def format_seconds(seconds: float) -> str:
    """Three significant figures, in s, ms or µs."""
    unit, factor = ("s", 1.0) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("µs", 1e6)
    value = seconds * factor
    return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"


def format_rate(rate: float) -> str:
    """A rate in GB/s, MB/s or kB/s with two decimals."""
    unit, factor = ("GB", 1e9) if rate >= 1e8 else ("MB", 1e6) if rate >= 1e5 else ("kB", 1e3)
    return f"{rate / factor:.2f} {unit}/s"


def plot(comparisons: Sequence[Comparison], path: str | Path, title: str) -> None:
    """Draws the median times."""
    draw([_panel_of(found) for found in comparisons if found.samples], path, title)


def _panel_of(comparison: Comparison) -> Panel:
    bars = []
    own = "backend" if "backend" in comparison.samples else "weightlift"
    for name in comparison.samples:
        notes = []
        if comparison.job.what == "load":
            notes.append(format_rate(comparison.rate(name)))
        if name != own and own in comparison.samples:
            ratio = comparison.time_ratio(name, own)
            notes.append(f"({ratio:.2f}x weightlift's time)")
        note = "   ".join(notes)
        bars.append(Bar(NAMES.get(name, name), comparison.median(name), note, name == own))
    return Panel(comparison.name, bars)


def draw(panels: Sequence[Panel], path: str | Path, title: str) -> None:
    """Writes bars as PNG (or what ``path`` ends in): each panel has its own scale, because times of
    different loads differ by orders of magnitude."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    bars = [len(panel.bars) for panel in panels]
    height = sum(0.34 * count + 0.62 for count in bars) + 0.55
    with mpl.rc_context({"font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(8.0, max(height, 1.8)), dpi=150, layout="constrained")
        figure.patch.set_alpha(0.0)
        figure.suptitle(title, x=0.01, ha="left", color=_TEXT, fontweight="bold", fontsize=11.5)
        places = figure.subplots(
            len(panels), 1, squeeze=False, height_ratios=[count + 0.9 for count in bars]
        )
        for axes, panel in zip(places[:, 0], panels, strict=True):
            _draw_panel(axes, panel)
        figure.savefig(path, transparent=True)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    longest = max(bar.seconds for bar in panel.bars)
    axes.barh(
        range(len(panel.bars)),
        [bar.seconds for bar in panel.bars],
        height=0.68,
        color=[_OURS if bar.ours else _OTHERS for bar in panel.bars],
    )
    for place, bar in enumerate(panel.bars):
        text = f"{format_seconds(bar.seconds)}   {bar.note}".rstrip()
        x = bar.seconds + longest * 0.012
        axes.text(x, place, text, va="center", color=_TEXT, fontsize=9)
    axes.set_title(panel.title, loc="left", color=_TEXT, fontsize=10)
    axes.set_yticks(range(len(panel.bars)), [bar.name for bar in panel.bars])
    axes.invert_yaxis()
    # Space for the text beside the longest bar.
    axes.set_xlim(0, longest * 1.62)
    axes.set_xticks([])
    axes.tick_params(colors=_TEXT, length=0)
    axes.patch.set_alpha(0.0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(_TEXT)


def draw_ratios(rows: Sequence[tuple[str, float]], path: str | Path, title: str) -> None:
    """Writes a bar for each (label, ratio) on one logarithmic scale, with a line at 1.

    2 and 0.5 have the same distance from 1. Readable at a width of 700 pixels.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    least = min(1.0, *(ratio for _, ratio in rows))
    most = max(1.0, *(ratio for _, ratio in rows))
    with mpl.rc_context({"font.family": "sans-serif", "font.size": 11}):
        figure = Figure(figsize=(7.0, 0.36 * len(rows) + 0.75), dpi=150, layout="constrained")
        figure.patch.set_alpha(0.0)
        figure.suptitle(title, x=0.01, ha="left", color=_TEXT, fontweight="bold", fontsize=12)
        axes = figure.subplots()
        axes.patch.set_alpha(0.0)
        axes.set_xscale("log")
        for place, (_, ratio) in enumerate(rows):
            color = _OURS if ratio >= 1 else _OTHERS
            axes.barh(place, ratio - 1, left=1, height=0.62, color=color)
            axes.text(
                max(ratio, 1.0) * (most / least) ** 0.015,
                place,
                f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.1f}x",
                va="center",
                color=_TEXT,
            )
        axes.axvline(1.0, color=_TEXT, linewidth=1)
        axes.set_yticks(range(len(rows)), [label for label, _ in rows])
        axes.invert_yaxis()
        axes.set_xlim(least * 0.95, most * (most / least) ** 0.16)
        axes.xaxis.set_major_locator(NullLocator())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.tick_params(colors=_TEXT, length=0)
        for side in ("top", "right", "bottom", "left"):
            axes.spines[side].set_visible(False)
        figure.savefig(path, transparent=True)

"""Comparisons as a picture that reads on a light and on a dark page: its background is none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from weightlift.cli.measure import Comparison

__all__ = ["format_seconds", "plot"]

# Both have a contrast of more than 3:1 to white and to black; so has the grey of the text.
_OURS = "#2f8f5b"
_OTHERS = "#8a8d91"
_TEXT = "#7d8288"


def format_seconds(seconds: float) -> str:
    """Three figures, in the unit that suits."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        value = seconds * factor
        if value >= 1 or unit == "µs":
            return f"{value:.{0 if value >= 100 else 1 if value >= 10 else 2}f} {unit}"
    raise AssertionError("unreachable")


def plot(comparisons: Sequence[Comparison], path: str | Path, title: str) -> None:
    """Writes bars of the median times as PNG (or what ``path`` ends in): a panel a comparison,
    each with its own scale, because their times lie decades apart."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    shown = [comparison for comparison in comparisons if comparison.samples]
    bars = [len(comparison.samples) for comparison in shown]
    height = sum(0.34 * count + 0.62 for count in bars) + 0.55
    with mpl.rc_context({"font.family": "sans-serif", "font.size": 10}):
        figure = Figure(figsize=(8.0, max(height, 1.8)), dpi=150, layout="constrained")
        figure.patch.set_alpha(0.0)
        figure.suptitle(title, x=0.01, ha="left", color=_TEXT, fontweight="bold", fontsize=11.5)
        panels = figure.subplots(
            len(shown), 1, squeeze=False, height_ratios=[count + 0.9 for count in bars]
        )
        for axes, comparison in zip(panels[:, 0], shown, strict=True):
            _panel(axes, comparison)
        figure.savefig(path, transparent=True)


def _panel(axes: object, comparison: Comparison) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    names = list(comparison.samples)
    times = [comparison.median(name) for name in names]
    axes.barh(
        range(len(names)),
        times,
        height=0.68,
        color=[_OURS if name == "weightlift" else _OTHERS for name in names],
    )
    for place, (name, seconds) in enumerate(zip(names, times, strict=True)):
        text = f"{format_seconds(seconds)}"
        if comparison.job.what == "load":
            text += f"   {comparison.rate(name) / 1e9:.2f} GB/s"
        if name != "weightlift" and "weightlift" in comparison.samples:
            ratio = comparison.time_ratio(name, "weightlift")
            text += f"   ({ratio:.2f}x weightlift's time)"
        axes.text(seconds + max(times) * 0.012, place, text, va="center", color=_TEXT, fontsize=9)
    axes.set_title(comparison.name, loc="left", color=_TEXT, fontsize=10)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    # Room for the text beside the longest bar.
    axes.set_xlim(0, max(times) * 1.62)
    axes.set_xticks([])
    axes.tick_params(colors=_TEXT, length=0)
    axes.patch.set_alpha(0.0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(_TEXT)

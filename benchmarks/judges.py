"""Figures and their targets. A judge computes the figure of a comparison."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable

from weightlift.bench.comparison import Comparison

OURS = "weightlift"
# Not libraries: a lower bound, and the parts of a load that are measured too.
APART = ("torch.empty", "construction", "reading", "layers-load", "layers-run", "whole")


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured figure and its target.

    Attributes:
        against: the contender of the ratio, if the measurement chose it.
    """

    target: str
    measured: str
    passed: bool
    against: str | None = None


# The hardware's rates by name, in bytes/s.
Rates = dict[str, float]
Judge = Callable[[Comparison, Rates], Figure]


def never_slower(limit: float, ours: str = OURS) -> Judge:
    """Our time over that of each other contender; the worst of these."""
    return _against_each(f"<= {limit:g}x each", ours, lambda ratio: ratio, lambda r: r <= limit)


def faster_than_each(limit: float, ours: str = OURS) -> Judge:
    """The time of each other contender over ours; the worst of these."""
    return _against_each(f">= {limit:g}x each", ours, lambda ratio: 1 / ratio, lambda r: r >= limit)


def _against_each(
    target: str, ours: str, speed_up: Callable[[float], float], passes: Callable[[float], bool]
) -> Judge:
    def judge(found: Comparison, _: Rates) -> Figure:
        ratios = {
            name: ratio
            for name in found.samples
            if name not in (ours, *APART) and (ratio := found.time_ratio(ours, name)) is not None
        }
        if not ratios:
            return Figure(target, "not measured", False)
        worst = max(ratios, key=lambda name: ratios[name])
        value = speed_up(ratios[worst])
        return Figure(target, f"{_digits(value)}x", passes(value), worst)

    return judge


def ratio_at_most(limit: float, to: str, ours: str = OURS) -> Judge:
    """Our time over another's."""

    def judge(found: Comparison, _: Rates) -> Figure:
        ratio = found.time_ratio(ours, to)
        return _figure(f"<= {limit:g}x {to}", ratio, "x", lambda r: r <= limit)

    return judge


def faster_at_least(limit: float, than: str, ours: str = OURS) -> Judge:
    """Another's time over ours."""

    def judge(found: Comparison, _: Rates) -> Figure:
        ratio = found.time_ratio(than, ours)
        return _figure(f">= {limit:g}x {than}", ratio, "x", lambda r: r >= limit)

    return judge


def within_memory(limit: float, ours: str, time: Judge) -> Judge:
    """A judge of the time, and of the peak of own memory over the loaded bytes."""

    def judge(found: Comparison, rates: Rates) -> Figure:
        figure = time(found, rates)
        if ours not in found.samples:
            return figure
        share = found.peak(ours) / found.samples[ours][0].bytes
        return Figure(
            f"{figure.target}, <= {limit:g} mem",
            f"{figure.measured}, {share:.2f}",
            figure.passed and share <= limit,
            figure.against,
        )

    return judge


def overlapped(slack: float, whole: str, parts: tuple[str, ...]) -> Judge:
    """The time of a load beyond the longer of its parts, in the median round."""

    def judge(found: Comparison, _: Rates) -> Figure:
        beyond = None
        if all(name in found.samples for name in (whole, *parts)):
            rounds = zip(found.times(whole), *(found.times(part) for part in parts), strict=True)
            beyond = statistics.median(took - max(apart) for took, *apart in rounds) * 1e3
        target = f"longer part + {slack * 1e3:g} ms"
        return _figure(target, beyond, " ms", lambda ms: ms <= slack * 1e3)

    return judge


def within_longer_part(factor: float, whole: str, parts: tuple[str, ...]) -> Judge:
    """The time of a load over that of the longer of its parts, in the median round."""

    def judge(found: Comparison, _: Rates) -> Figure:
        ratio = None
        if all(name in found.samples for name in (whole, *parts)):
            rounds = zip(found.times(whole), *(found.times(part) for part in parts), strict=True)
            ratio = statistics.median(took / max(apart) for took, *apart in rounds)
        target = f"<= {factor:g} x the longer part"
        return _figure(target, ratio, " x", lambda found: found <= factor)

    return judge


def microseconds_a_tensor(limit: float, ours: str) -> Judge:
    """The cost of the call for each tensor; the bytes are negligible."""

    def judge(found: Comparison, _: Rates) -> Figure:
        each = None
        if ours in found.samples:
            each = found.median(ours) / found.samples[ours][0].tensors * 1e6
        return _figure(f"<= {limit:g} us a tensor", each, " us", lambda us: us <= limit)

    return judge


def seconds_at_most(limit: float) -> Judge:
    def judge(found: Comparison, _: Rates) -> Figure:
        seconds = found.median(OURS) if OURS in found.samples else None
        scaled = None if seconds is None else seconds * 1e3
        return _figure(f"<= {limit * 1e3:g} ms", scaled, " ms", lambda ms: ms <= limit * 1e3)

    return judge


def share_of_ceiling(limit: float) -> Judge:
    """Our rate over the smaller of the link's and the page cache's; and the fastest of all."""

    def judge(found: Comparison, rates: Rates) -> Figure:
        share = None
        fastest = True
        if OURS in found.samples:
            best = min(rates["pinned memory to the GPU"], rates["page cache to memory"])
            share = found.rate(OURS) / best * 100
            fastest = found.median(OURS) <= min(map(found.median, found.samples))
        return _figure(f">= {limit:g} %, fastest", share, " %", lambda s: s >= limit and fastest)

    return judge


def cast_to_device(limit: float) -> Judge:
    """Our time over the slower of reading the file on the host and sending the result."""

    def judge(found: Comparison, rates: Rates) -> Figure:
        ratio = None
        if OURS in found.samples:
            floor = max(
                found.file_bytes / rates["page cache to memory"],
                found.samples[OURS][0].bytes / rates["pinned memory to the GPU"],
            )
            ratio = found.median(OURS) / floor
        return _figure(f"<= {limit:g}x the bytes", ratio, "x", lambda r: r <= limit)

    return judge


def _figure(target: str, value: float | None, unit: str, passes: Callable[[float], bool]) -> Figure:
    if value is None:
        return Figure(target, "not measured", False)
    return Figure(target, f"{_digits(value)}{unit}", passes(value))


def _digits(value: float) -> str:
    return f"{value:.{1 if abs(value) >= 20 else 2}f}"

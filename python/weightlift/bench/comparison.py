"""What was measured: samples, and comparisons of contenders."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from weightlift.bench.conditions import BACKED
from weightlift.bench.contenders import Job

__all__ = ["Comparison", "Sample"]


@dataclasses.dataclass
class Sample:
    """One measurement.

    Attributes:
        load_seconds: of the library's call.
        touch_seconds: reading one byte of every page of the result; on CUDA, synchronising.
        cpu_seconds: of all threads, over both.
        phases: ``load_seconds`` by phase, as far as known: ``index`` (with opening), ``allocate``,
            ``build`` (of a model, while its weights are read), ``move`` and ``finish``. The time of
            an unknown phase is part of the next one.
        bytes: of the loaded tensors.
        peak_anon_bytes: anonymous memory at its peak, less that before the load; sampled from
            outside every 20 ms and at the end.
        resident_bytes: bytes of the files in the page cache before the load; ``None`` if the kernel
            does not say.
        resident_bytes_after: the same, after it.
        backed_bytes: bytes of memory that the machine backed before the load.
        new_memory_rate: the rate of new memory on huge pages right before the load, in bytes/s.
        report: weightlift's report of the load.
        forward_seconds: of a model's first forward pass, if requested; ``None`` if there was none,
            and then ``forward`` has the reason.
        peak_device_bytes: the most that torch had allocated on CUDA.
        device_bytes: how much less memory the device had free after the load than before.
        checksum: of the loaded names and bits, if requested.
    """

    load_seconds: float
    touch_seconds: float
    cpu_seconds: float
    phases: dict[str, float]
    tensors: int
    bytes: int
    peak_anon_bytes: int
    resident_bytes: int | None
    resident_bytes_after: int | None
    backed_bytes: int
    new_memory_rate: float | None = None
    report: dict[str, Any] | None = None
    forward_seconds: float | None = None
    forward: str = ""
    peak_device_bytes: int | None = None
    device_bytes: int | None = None
    checksum: int | None = None

    @property
    def seconds(self) -> float:
        return self.load_seconds + self.touch_seconds

    @property
    def first_forward_seconds(self) -> float | None:
        """From the start of the load to the end of the first forward pass."""
        return None if self.forward_seconds is None else self.seconds + self.forward_seconds


@dataclasses.dataclass
class Comparison:
    """The same load by several contenders.

    Attributes:
        name: of the load.
        job: the load; its contender is the first one's.
        cold: whether the files were dropped from the page cache.
        samples: by contender, in the order of the rounds.
        refused: contenders that could not be measured, with the reason.
        file_bytes: the size of the files.
        touched: whether the touch counts; if not, only the calls are compared.
        versions: of the contenders' libraries.
        conversions: for each contender, the seconds of the conversion to its own format.
        memory: ``"backed"``: the machine had the memory for a load when it began; ``"not backed"``:
            its host had time to take free memory.
    """

    name: str
    job: Job
    cold: bool
    samples: dict[str, list[Sample]]
    refused: dict[str, str]
    file_bytes: int
    touched: bool = True
    versions: dict[str, str | None] = dataclasses.field(default_factory=dict)
    conversions: dict[str, float] = dataclasses.field(default_factory=dict)
    memory: str = BACKED

    def times(self, contender: str) -> list[float]:
        """Seconds, round by round."""
        return [s.seconds if self.touched else s.load_seconds for s in self.samples[contender]]

    def median(self, contender: str) -> float:
        """Seconds."""
        return statistics.median(self.times(contender))

    def time_ratio(self, contender: str, to: str) -> float | None:
        """The median over the rounds of ``contender``'s time over ``to``'s."""
        ratios = self.time_ratios(contender, to)
        return statistics.median(ratios) if ratios else None

    def time_ratios(self, contender: str, to: str) -> list[float]:
        """``contender``'s time over ``to``'s, round by round; empty if one of them was not
        measured."""
        if not self.samples.get(contender) or not self.samples.get(to):
            return []
        pairs = zip(self.times(contender), self.times(to), strict=True)
        return [one / other for one, other in pairs]

    def rate(self, contender: str) -> float:
        """Bytes/s of the checkpoint, or of the requested tensor."""
        whole = self.file_bytes if self.job.tensor is None else self.samples[contender][0].bytes
        return whole / self.median(contender)

    def peak(self, contender: str) -> int:
        """Bytes, in the worst round."""
        return max(sample.peak_anon_bytes for sample in self.samples[contender])

    def phases(self, contender: str) -> dict[str, float]:
        """Median seconds of each known phase, including the touch if it counts."""
        samples = self.samples[contender]
        found = {
            name: statistics.median(sample.phases.get(name, 0.0) for sample in samples)
            for name in samples[0].phases
        }
        if self.touched:
            found["touch"] = statistics.median(sample.touch_seconds for sample in samples)
        return found

    def route(self, contender: str) -> list[str]:
        """The I/O paths that weightlift reports, each with its reason, most frequent first."""
        report = self.samples[contender][-1].report
        if report is None:
            return []
        found: dict[str, int] = {}
        for file in report["files"]:
            text = f"{file['io']}: {file['reason']}" if file["reason"] else file["io"]
            found[text] = found.get(text, 0) + 1
        return [*sorted(found, key=lambda text: -found[text]), *report["fallbacks"]]

    def pages(self, contender: str) -> list[str]:
        """The kinds of pages of new host memory that weightlift reports, each with its reason."""
        reports = [sample.report for sample in self.samples[contender] if sample.report]
        return list(dict.fromkeys(text for report in reports for text in report["memory"]))

    def to_json(self) -> dict[str, Any]:
        job = dataclasses.asdict(self.job)
        for name in ("contender", "checksum"):
            job.pop(name)
        return {
            "name": self.name,
            **job,
            "cold": self.cold,
            "touched": self.touched,
            "memory": self.memory,
            "file_bytes": self.file_bytes,
            "contenders": {
                name: {
                    "version": self.versions.get(name),
                    "median_seconds": self.median(name),
                    "bytes_per_second": self.rate(name),
                    "peak_anon_bytes": self.peak(name),
                    "time_ratio": {
                        other: self.time_ratio(name, other)
                        for other in self.samples
                        if other != name
                    },
                    "phases": self.phases(name),
                    "conversion_seconds": self.conversions.get(name),
                    "io": self.route(name),
                    "pages": self.pages(name),
                    "samples": [dataclasses.asdict(sample) for sample in samples],
                }
                for name, samples in self.samples.items()
            },
            "refused": self.refused,
        }

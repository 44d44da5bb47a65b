from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import weightlift as wl
from support import entry, file_bytes

MIB = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    entries = {
        "a": entry("F32", [MIB], 1),
        "b": entry("I64", [1000], 2),
        "c": entry("BF16", [500], 3),
        "d": entry("F32", [0]),
    }
    (tmp_path / "model.safetensors").write_bytes(file_bytes(entries))
    return tmp_path / "model.safetensors"


SIZE = 4 * MIB + 8000 + 1000


@pytest.mark.parametrize(
    ("options", "mapped", "read"),
    [
        ({}, SIZE, 0),
        ({"mode": "map"}, SIZE, 0),
        ({"mode": "read"}, 0, SIZE),
        ({"dtype": torch.float16}, 8000, 4 * MIB + 1000),
        ({"dtype": torch.float32}, 4 * MIB + 8000, 1000),
        ({"dtype": torch.float16, "mode": "read"}, 0, SIZE),
    ],
)
def test_bytes(path: Path, options: dict[str, object], mapped: int, read: int) -> None:
    wl.load_file(path, **options)  # type: ignore[arg-type]
    report = wl.last_report()
    assert report.bytes == SIZE
    assert report.mapped_bytes == mapped
    # A gap of less than a page, here a tensor that is not cast, is read too.
    assert read <= report.read_bytes <= SIZE
    if read in (0, SIZE):
        assert report.read_bytes == read
    assert report.devices == {"cpu": SIZE}
    assert 0 < report.seconds < 10
    (file,) = report.files
    assert file.path == str(path)
    assert file.bytes == SIZE
    assert file.io in ("mapped", "page cache", "buffered", "direct")
    assert (file.io == "mapped") == (read == 0)
    assert report.pinned_bytes == report.peak_staging_bytes == 0
    assert report.fallbacks == []
    assert report.missing_keys == report.unexpected_keys == report.mismatched_keys == []


def test_as_text(path: Path) -> None:
    for options, words in (
        ({}, ["4.2 MB mapped", "0 B read", "mapped (same dtype"]),
        ({"mode": "read"}, ["0 B mapped", "4.2 MB read"]),
    ):
        wl.load_file(path, **options)  # type: ignore[arg-type]
        report = wl.last_report()
        text = str(report)
        for word in [*words, str(path), report.files[0].io, report.files[0].reason, "B/s"]:
            assert word in text
        assert len(text.splitlines()) == 2
    with wl.Settings(io_path="direct"):
        wl.load_file(path, mode="read")
    assert "forced" in str(wl.last_report())


def test_fallbacks_are_shown(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(file_bytes({"w": entry("F8_E4M3FNUZ", [40])}))
    wl.load_file(tmp_path / "f", dtype=torch.float16)
    (fallback,) = wl.last_report().fallbacks
    assert fallback in str(wl.last_report())


def test_a_failed_load_leaves_no_report(path: Path) -> None:
    wl.load_file(path)
    before = wl.last_report()
    sums = wl.stats()
    path.write_bytes(b"")
    with pytest.raises(wl.FormatError):
        wl.load_file(path)
    assert wl.last_report() is before
    assert wl.stats() == sums


def test_stats(path: Path) -> None:
    before = wl.stats()
    wl.load_file(path)
    wl.load_file(path, mode="read")
    with wl.safe_open(path, backend="pread") as file:
        file.get_tensor("c")
    after = wl.stats()
    own = after.by_caller["weightlift"]
    for sums, earlier in (
        (after, before),
        (own, before.by_caller.get("weightlift", wl.Stats())),
    ):
        assert sums.loads - earlier.loads == 3
        assert sums.bytes - earlier.bytes == 2 * SIZE + 1000
        assert sums.mapped_bytes - earlier.mapped_bytes == SIZE
        assert sums.read_bytes - earlier.read_bytes == SIZE + 1000
        assert sums.seconds > earlier.seconds


def test_stats_are_a_copy(path: Path) -> None:
    wl.load_file(path)
    taken = wl.stats()
    kept = dataclasses.replace(taken)
    taken.by_caller["weightlift"].loads += 99
    taken.loads += 99
    wl.load_file(path)
    assert wl.stats().loads == kept.loads + 1
    assert kept.loads + 99 == taken.loads
    assert wl.stats().by_caller["weightlift"].loads < taken.by_caller["weightlift"].loads


def test_a_report_prints_keys_shortened_and_what_is_on_meta(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = torch.nn.Sequential(*(torch.nn.Linear(3, 2) for _ in range(8)))
    own = {f"{n}.weight": entry("F32", [2, 3]) for n in range(1)}
    others = {f"other.{n}": entry("F32", [1]) for n in range(2)}
    wrong = {"1.weight": entry("F32", [5])}
    (tmp_path / "m.safetensors").write_bytes(file_bytes({**own, **others, **wrong}))
    report = wl.load_into(
        model, tmp_path / "m.safetensors", strict=False, ignore_mismatched_sizes=True
    )
    on_meta = {name for name, tensor in model.named_parameters() if tensor.is_meta}
    assert set(report.meta_keys) == on_meta
    assert len(on_meta) == 15
    text = str(report)
    assert f"{len(report.missing_keys)} missing: " in text
    assert f"and {len(report.missing_keys) - 5} more" in text
    assert "2 unexpected: other.0, other.1" in text
    assert "1 mismatched: 1.weight (checkpoint 5, model 2 x 3)" in text
    assert "15 still on meta, without data: " in text
    assert str(wl.last_report()) == text


def test_what_hooks_read_of_the_disk_is_nobodys_last_load(path: Path) -> None:
    pytest.importorskip("accelerate")
    model = torch.nn.Module()
    model.a = torch.nn.Parameter(torch.zeros(MIB))
    model.forward = lambda: model.a.sum()
    holder = torch.nn.Module()
    holder.inner = model
    holder.forward = lambda: holder.inner()
    entries = {"inner.a": entry("F32", [MIB], 1)}
    path.write_bytes(file_bytes(entries))
    wl.load_into(holder, path, device_map={"": "disk"})
    last, before = wl.last_report(), wl.stats()
    holder()
    holder()
    after = wl.stats()
    assert wl.last_report() is last
    assert after.by_caller["weightlift"] == before.by_caller["weightlift"]
    read = after.by_caller["weightlift, disk weights"]
    assert read.bytes - before.by_caller.get("weightlift, disk weights", wl.Stats()).bytes == (
        2 * 4 * MIB
    )

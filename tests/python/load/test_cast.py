from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

import weightlift as wl
from support import DTYPES, assert_same, assert_same_tensors, bits, entry, file_bytes

CASTABLE = ["F64", "F32", "BF16", "F16", "F8_E4M3", "F8_E5M2"]
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def patterns(dtype: str) -> torch.Tensor:
    """All bit patterns of a small dtype; of a large one those at which rounding, overflow and
    underflow into each of the others turn, and random ones."""
    torch_dtype = DTYPES[dtype]
    if torch_dtype.itemsize <= 2:
        count = 1 << 8 * torch_dtype.itemsize
        integers = torch.arange(count, dtype=torch.int32).to(_INTEGERS[torch_dtype.itemsize])
        return integers.view(torch_dtype)
    values: list[torch.Tensor] = []
    for other in CASTABLE:
        if DTYPES[other].itemsize > 2:
            continue
        grid = patterns(other).to(torch.float64)
        grid = grid[grid.isfinite()].sort().values
        middles = (grid[1:] + grid[:-1]) / 2
        last = grid[-1] + (grid[-1] - grid[-2]) / 2
        for exact in (grid, middles, torch.stack([last, -last, 2 * last, -2 * last])):
            found = exact.to(torch_dtype)
            up = torch.nextafter(found, torch.full_like(found, float("inf")))
            down = torch.nextafter(found, torch.full_like(found, float("-inf")))
            values += [found, up, down]
    info = torch.finfo(torch_dtype)
    special = [0.0, -0.0, float("inf"), float("-inf"), float("nan"), info.max, info.min, info.tiny]
    special += [info.smallest_normal / 2, 2.0**-149, 2.0**-150, 2.0**-151, 3.4028236e38, 1e300]
    values.append(torch.tensor(special, dtype=torch.float64).to(torch_dtype))
    generator = torch.Generator().manual_seed(5)
    width = _INTEGERS[torch_dtype.itemsize]
    limits = torch.iinfo(width)
    random = torch.randint(limits.min, limits.max, (50_000,), generator=generator, dtype=width)
    values.append(random.view(torch_dtype))
    scales = torch.randint(-60, 60, (50_000,), generator=generator).to(torch.float64)
    values.append(
        (torch.randn(50_000, generator=generator, dtype=torch.float64) * 2**scales).to(torch_dtype)
    )
    return torch.cat(values)


def negative(tensor: torch.Tensor) -> torch.Tensor:
    """The sign bits, of NaN too."""
    return tensor.view(_INTEGERS[tensor.itemsize]).to(torch.int64) >> (8 * tensor.itemsize - 1) & 1


def assert_cast(ours: torch.Tensor, source: torch.Tensor, dtype: torch.dtype) -> None:
    """Like ``source.to(dtype)`` for results that are not NaN; a NaN keeps its sign."""
    theirs = source.to(dtype)
    assert ours.dtype == dtype
    assert ours.shape == theirs.shape
    integers = _INTEGERS[dtype.itemsize]
    nan = theirs.to(torch.float64).isnan()
    assert torch.equal(ours.to(torch.float64).isnan(), nan)
    same = ours.view(integers) == theirs.view(integers)
    wrong = (~same & ~nan).nonzero()
    assert not len(wrong), f"{source.flatten()[wrong[:5]]} became {ours.flatten()[wrong[:5]]}"
    # For NaNs from an overflow, torch's sign is arbitrary.
    came = nan & source.to(torch.float64).isnan()
    assert torch.equal(negative(ours)[came], negative(source)[came])


@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(CASTABLE, 2)))
def test_every_cast_is_torchs(tmp_path: Path, source: str, target: str, pad: int) -> None:
    values = patterns(source)
    if pad:
        values = values[:5001]
    data = bits(values)
    path = tmp_path / "f"
    path.write_bytes(file_bytes({"w": (source, [len(values)], data)}, None, pad))
    loaded = wl.load_file(path, dtype=DTYPES[target])["w"]
    assert_cast(loaded, values, DTYPES[target])
    report = wl.last_report()
    assert report.mapped_bytes == 0
    assert report.bytes == len(data)
    assert report.fallbacks == []


@pytest.mark.parametrize("dtype", CASTABLE)
@pytest.mark.parametrize("mode", ["auto", "read"])
def test_cast_to_itself_is_none(tmp_path: Path, dtype: str, mode: str) -> None:
    (tmp_path / "f").write_bytes(file_bytes({"w": entry(dtype, [4000], 3)}))
    loaded = wl.load_file(tmp_path / "f", dtype=DTYPES[dtype], mode=mode)["w"]
    assert_same(loaded, wl.load_file(tmp_path / "f")["w"])


@pytest.mark.parametrize("settings", [{}, {"threads": 1}, {"read_bytes": 65536, "threads": 3}])
@pytest.mark.parametrize("shape", [[], [1], [0, 4], [3, 5, 7], [1 << 20]])
@pytest.mark.parametrize("io_path", ["buffered", "direct"])
def test_shapes_and_cuts(
    tmp_path: Path, shape: list[int], settings: dict[str, int], io_path: str
) -> None:
    """A tensor that is read in many pieces has the same values."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    for pad in (0, 5):
        path = tmp_path / f"f{pad}"
        path.write_bytes(file_bytes({"w": ("F32", shape, bits(values))}, None, pad))
        with wl.Settings(io_path=io_path, **settings):  # type: ignore[arg-type]
            for dtype in (torch.bfloat16, torch.float64):
                assert_same(wl.load_file(path, dtype=dtype)["w"], values.to(dtype))


def mixed_entries() -> dict[str, tuple[str, list[int], bytes]]:
    entries = {}
    for number, dtype in enumerate(DTYPES):
        if dtype != "F4":
            entries[f"b{99 - number}"] = entry(dtype, [11, 3], number)
            entries[f"a{number}"] = entry(dtype, [2, 2], number + 100)
    entries["zero"] = entry("F32", [0, 7])
    return entries


@pytest.mark.parametrize("mode", ["auto", "read"])
@pytest.mark.parametrize("target", CASTABLE)
def test_mixed_files(tmp_path: Path, mode: str, target: str) -> None:
    """Floating-point tensors are cast, others are not touched, the order stays the file's."""
    entries = mixed_entries()
    (tmp_path / "f").write_bytes(file_bytes(entries))
    loaded = wl.load_file(tmp_path / "f", dtype=DTYPES[target], mode=mode)
    fallbacks = wl.last_report().fallbacks
    assert list(loaded) == list(entries)
    plain = wl.load_file(tmp_path / "f")
    for name, tensor in loaded.items():
        if not plain[name].dtype.is_floating_point:
            assert_same(tensor, plain[name])
        elif entries[name][0] in CASTABLE:
            assert_cast(tensor, plain[name], DTYPES[target])
        else:  # torch's own casts, of dtypes that are rare
            expected = plain[name].to(DTYPES[target])
            assert tensor.dtype == expected.dtype
            torch.testing.assert_close(
                tensor.to(torch.float64), expected.to(torch.float64), rtol=0, atol=0, equal_nan=True
            )
    others = [name for name, (dtype, *_) in entries.items() if dtype[-2:] in ("UZ", "M0")]
    assert len(others) == 6
    assert any("torch cast 6 tensors" in text for text in fallbacks)


def test_what_is_cast_is_not_mapped(tmp_path: Path) -> None:
    entries = {"w": entry("F32", [1000]), "n": entry("I64", [500]), "h": entry("F16", [500])}
    (tmp_path / "f").write_bytes(file_bytes(entries))
    wl.load_file(tmp_path / "f", dtype=torch.float16)
    report = wl.last_report()
    assert report.bytes == 4000 + 4000 + 1000
    assert report.mapped_bytes == 5000
    assert report.read_bytes == 4000
    assert report.devices == {"cpu": 9000}


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float16),
        ("float16", torch.float16),
        ("torch.bfloat16", torch.bfloat16),
        ("half", torch.float16),
        ("float8_e4m3fn", torch.float8_e4m3fn),
        ("float64", torch.float64),
        ("auto", torch.float32),
        (None, torch.float32),
    ],
)
def test_names_of_dtypes(
    tmp_path: Path, dtype: torch.dtype | str | None, expected: torch.dtype
) -> None:
    (tmp_path / "f").write_bytes(file_bytes({"w": entry("F32", [4])}))
    assert wl.load_file(tmp_path / "f", dtype=dtype)["w"].dtype == expected


@pytest.mark.parametrize(
    "dtype",
    [
        torch.int32,
        "int8",
        torch.complex64,
        torch.bool,
        torch.float8_e8m0fnu,
        "float8_e4m3fnuz",
        "float4_e2m1fn_x2",
        "float17",
        "Tensor",
        "torch",
        "",
        "torch.torch.float16",
        16,
        float,
        "float16\0",
    ],
)
def test_no_dtype_to_cast_to(tmp_path: Path, dtype: object) -> None:
    (tmp_path / "f").write_bytes(file_bytes({"w": entry("F32", [4])}))
    with pytest.raises(wl.ArgumentError, match="dtype"):
        wl.load_file(tmp_path / "f", dtype=dtype)  # type: ignore[arg-type]


def test_packed_fours_have_no_cast(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(file_bytes({"w": entry("F32", [4]), "four": entry("F4", [8])}))
    with pytest.raises(wl.ArgumentError, match="four"):
        wl.load_file(tmp_path / "f", dtype=torch.float16)


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16])
def test_the_default_dtype_has_no_say(tmp_path: Path, default: torch.dtype) -> None:
    """While a model is built, torch's default dtype is often another."""
    entries = {name: entry(name, [300], 1) for name in CASTABLE}
    (tmp_path / "f").write_bytes(file_bytes(entries))
    expected = wl.load_file(tmp_path / "f", dtype=torch.float16)
    torch.set_default_dtype(default)
    try:
        loaded = wl.load_file(tmp_path / "f", dtype=torch.float16)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_tensors(loaded, expected)

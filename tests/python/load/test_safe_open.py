from __future__ import annotations

import math
import os
import struct
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open as reference_safe_open
from safetensors.torch import save_file as reference_save_file

import weightlift as wl
from support import (
    DTYPES,
    REFERENCE_HAS_BACKENDS,
    assert_same,
    assert_same_tensors,
    bits,
    entry,
    file_bytes,
    sparse_file,
)
from weightlift import _native

BACKENDS = ["mmap", "pread"]
ALL = slice(None)


def reference_by(path: Path, backend: str) -> Any:
    return reference_safe_open(
        path, "pt", **({"backend": backend} if REFERENCE_HAS_BACKENDS else {})
    )


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {
        "weight": torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(2, 3, 4),
        "bias": torch.arange(10, dtype=torch.int16),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "deep": torch.arange(2 * 3 * 1 * 5, dtype=torch.bfloat16).reshape(2, 3, 1, 5),
    }


@pytest.fixture
def path(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    reference_save_file(tensors, tmp_path / "f.safetensors", {"format": "pt", "ключ": "значение"})
    return tmp_path / "f.safetensors"


# --- The whole file ----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_as_the_reference(path: Path, backend: str) -> None:
    with (
        wl.safe_open(path, framework="pt", device="cpu", backend=backend) as ours,
        reference_by(path, backend) as theirs,
    ):
        assert ours.keys() == theirs.keys()
        assert ours.offset_keys() == theirs.offset_keys()
        assert ours.offset_keys() != ours.keys()
        assert ours.metadata() == theirs.metadata() == {"format": "pt", "ключ": "значение"}
        for name in ours.keys():  # noqa: SIM118 - as the reference is used
            assert_same(ours.get_tensor(name), theirs.get_tensor(name))
            assert ours.get_slice(name).get_shape() == theirs.get_slice(name).get_shape()
            assert ours.get_slice(name).get_dtype() == theirs.get_slice(name).get_dtype()
        everything = {name: theirs.get_tensor(name) for name in theirs.offset_keys()}
        assert_same_tensors(ours.get_tensors(), everything)


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_dtypes(tmp_path: Path, backend: str) -> None:
    entries = {dtype: entry(dtype, [3, 6], number) for number, dtype in enumerate(DTYPES)}
    (tmp_path / "f").write_bytes(file_bytes(entries, None, 3))
    with wl.safe_open(tmp_path / "f", backend=backend) as file:
        assert file.metadata() is None
        for dtype, (_, shape, data) in entries.items():
            assert file.get_tensor(dtype).dtype == DTYPES[dtype]
            assert bits(file.get_tensor(dtype)) == data
            assert file.get_slice(dtype).get_dtype() == dtype
            assert file.get_slice(dtype).get_shape() == shape


def test_without_tensors(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(file_bytes({}, {}))
    with wl.safe_open(tmp_path / "f") as file:
        assert file.keys() == []
        assert file.get_tensors() == {}
        assert file.metadata() == {}


@pytest.mark.parametrize("backend", BACKENDS)
def test_tensors_outlive_the_file(
    path: Path, tensors: dict[str, torch.Tensor], backend: str
) -> None:
    with wl.safe_open(path, backend=backend) as file:
        whole = file.get_tensor("weight")
        part = file.get_slice("weight")[:, 1]
        later = file.get_slice("bias")
    del file
    path.unlink()
    assert torch.equal(whole, tensors["weight"])
    assert torch.equal(part, tensors["weight"][:, 1])
    assert torch.equal(later[3:5], tensors["bias"][3:5])


@pytest.mark.parametrize("backend", BACKENDS)
def test_writes_do_not_reach_the_file(path: Path, backend: str) -> None:
    before = path.read_bytes()
    with wl.safe_open(path, backend=backend) as file:
        file.get_tensor("weight").fill_(9)
        file.get_slice("bias")[2:5].fill_(9)
        file.get_slice("weight")[::1, 1:2].fill_(9)
    assert path.read_bytes() == before


def test_mapped_twice_is_the_same_memory(path: Path) -> None:
    """Like the reference: a slice of a tensor is a view of it."""
    for opened in (wl.safe_open(path), reference_safe_open(path, "pt")):
        with opened as file:
            first, second = file.get_tensor("weight"), file.get_tensor("weight")
            assert first.data_ptr() == second.data_ptr()
            part = file.get_slice("weight")[1]
            assert part.data_ptr() == first[1].data_ptr()
            del first
            assert torch.equal(second[1], part)


def test_a_dead_tensor_takes_nothing_of_its_twin(tmp_path: Path) -> None:
    """Two tensors on the same pages: written bytes stay when one of them is deleted."""
    (tmp_path / "f").write_bytes(file_bytes({"w": entry("U8", [1 << 20])}))
    with wl.safe_open(tmp_path / "f") as file:
        first, second = file.get_tensor("w"), file.get_tensor("w")
        first.fill_(77)
        del first
        assert second.min() == second.max() == 77


def test_outside_of_with(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    file = wl.safe_open(path, "pt")
    assert torch.equal(file.get_tensor("weight"), tensors["weight"])
    assert torch.equal(wl.safe_open(path).get_slice("weight")[0], tensors["weight"][0])


# --- Errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed(path: Path, backend: str) -> None:
    ours = wl.safe_open(path, backend=backend)
    theirs = reference_by(path, backend)
    with ours, theirs:
        pass
    for opened in (ours, theirs):
        for use in (
            opened.keys,
            opened.offset_keys,
            opened.metadata,
            lambda opened=opened: opened.get_tensor("weight"),
            lambda opened=opened: opened.get_slice("weight"),
        ):
            with pytest.raises(safetensors.SafetensorError, match="closed"):
                use()
    with pytest.raises(wl.FormatError) as caught:
        ours.get_tensors()
    assert caught.value.code == "file_closed"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["nope", "", "Weight", "weight\0", "weigh", "重み"])
def test_missing_tensor(path: Path, backend: str, name: str) -> None:
    with (
        wl.safe_open(path, backend=backend) as ours,
        reference_by(path, backend) as theirs,
    ):
        for opened in (ours, theirs):
            with pytest.raises(safetensors.SafetensorError):
                opened.get_tensor(name)
            with pytest.raises(safetensors.SafetensorError):
                opened.get_slice(name)
        with pytest.raises(wl.FormatError) as caught:
            ours.get_tensor(name)
    assert caught.value.code == "no_such_tensor"
    assert caught.value.tensor == name
    assert caught.value.path == str(path)


@pytest.mark.parametrize("name", [5, None, b"weight", "\ud800"])
def test_what_is_no_name(path: Path, name: object) -> None:
    with wl.safe_open(path) as ours, reference_safe_open(path, "pt") as theirs:
        for opened in (ours, theirs):
            with pytest.raises((TypeError, UnicodeEncodeError, safetensors.SafetensorError)):
                opened.get_tensor(name)
            with pytest.raises((TypeError, UnicodeEncodeError, safetensors.SafetensorError)):
                opened.get_slice(name)


@pytest.mark.parametrize("framework", ["np", "tf", "jax", "mlx", "", "nonsense"])
def test_other_frameworks(path: Path, framework: str) -> None:
    with pytest.raises(wl.ArgumentError, match="safetensors"):
        wl.safe_open(path, framework)


def test_unknown_backend(path: Path) -> None:
    for open_file in (wl.safe_open, reference_safe_open)[: 2 if REFERENCE_HAS_BACKENDS else 1]:
        with pytest.raises(safetensors.SafetensorError, match="io_uring"):
            open_file(path, "pt", backend="io_uring")


# --- Slices ------------------------------------------------------------------------------------

INDICES: list[Any] = [
    (),
    ...,
    0,
    1,
    -1,
    -2,
    (0, 0),
    (1, -1),
    (0, ...),
    (..., 0),
    (..., -1),
    (1, ..., 1),
    (0, 0, 0),
    (-1, -1, -1),
    ALL,
    (ALL, ALL),
    (ALL, ALL, ALL),
    slice(0, 1),
    slice(1, None),
    slice(None, 1),
    slice(0, 0),
    slice(0, 2, 2),
    slice(None, None, 2),
    (ALL, slice(None, None, 2)),
    (ALL, ALL, slice(None, None, 3)),
    (ALL, ALL, slice(1, None, 2)),
    (ALL, slice(1, 3), slice(1, 3)),
    (slice(1, 2), 0, slice(0, 4, 3)),
    (0, slice(0, 2)),
    (ALL, 0),
    (ALL, 2, 1),
    (0, ALL, 2),
    (ALL, ALL, 0),
    (..., slice(1, 2)),
    (ALL, ...),
    (slice(0, 1), ..., slice(0, 1)),
    (np.int64(1), np.uint8(2)),
    torch.tensor(1),
    (slice(0, 1, 1), slice(0, 1, 1), slice(0, 1, 1)),
]
# torch, and so the reference, has no negative steps.
BACKWARDS: list[Any] = [
    slice(None, None, -1),
    (ALL, slice(None, None, -1)),
    (ALL, ALL, slice(None, None, -2)),
    (slice(None, None, -1), slice(None, None, -1), slice(None, None, -1)),
    (1, slice(2, 0, -1)),
    (..., slice(-1, -5, -3)),
    (0, ALL, slice(-2, 0, -1)),
    slice(0, 1, -1),
]
# Where the reference reads with pread it is narrower than torch and than itself over a mapping.
ONLY_MAPPED: list[Any] = [
    slice(None, -1),
    slice(-1, None),
    slice(-2, -1),
    (slice(-100, 100), slice(-2, None)),
    slice(0, 100),
    slice(5, 9),
    slice(1, 0),
    (ALL, slice(3, 3)),
    None,
    (None, 0),
    (0, None, slice(1, 2)),
    ([0, 1],),
    (0, [0, 2]),
    torch.tensor([1, 0]),
    np.array([1, 0]),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", INDICES, ids=repr)
def test_slices(path: Path, tensors: dict[str, torch.Tensor], backend: str, index: Any) -> None:
    with (
        wl.safe_open(path, backend=backend) as ours,
        reference_by(path, backend) as theirs,
    ):
        part = ours.get_slice("weight")[index]
        assert_same(part, theirs.get_slice("weight")[index])
        array = tensors["weight"].numpy()
        key = index.numpy() if isinstance(index, torch.Tensor) else index
        assert np.array_equal(part.numpy(), array[key])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", BACKWARDS, ids=repr)
def test_slices_backwards(
    path: Path, tensors: dict[str, torch.Tensor], backend: str, index: Any
) -> None:
    with wl.safe_open(path, backend=backend) as file:
        part = file.get_slice("weight")[index]
    expected = tensors["weight"].numpy()[index]
    assert part.shape == expected.shape
    assert np.array_equal(part.numpy(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", ONLY_MAPPED, ids=repr)
def test_slices_that_only_the_mapped_reference_knows(path: Path, backend: str, index: Any) -> None:
    with wl.safe_open(path, backend=backend) as ours, reference_safe_open(path, "pt") as theirs:
        assert_same(ours.get_slice("weight")[index], theirs.get_slice("weight")[index])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("weight", 2),
        ("weight", -3),
        ("weight", (0, 3)),
        ("weight", (0, 0, 4)),
        ("weight", (0, 0, 0, 0)),
        ("weight", (ALL, ALL, ALL, ALL)),
        ("weight", 1.5),
        ("bias", 10),
        ("bias", -11),
        ("scalar", 0),
        ("scalar", ALL),
        ("empty", 0),
        ("empty", (ALL, 3)),
    ],
    ids=repr,
)
def test_indices_out_of_range(path: Path, backend: str, name: str, index: Any) -> None:
    with wl.safe_open(path, backend=backend) as ours, reference_safe_open(path, "pt") as theirs:
        for opened in (ours, theirs):
            with pytest.raises(IndexError):
                opened.get_slice(name)[index]


@pytest.mark.parametrize("index", ["a", (0, "a"), b"a"], ids=repr)
def test_text_is_no_index(path: Path, index: Any) -> None:
    with (
        wl.safe_open(path) as ours,
        pytest.raises(TypeError, match=r"tensor 'weight': .* is no index; give integers"),
    ):
        ours.get_slice("weight")[index]


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_ellipses(path: Path, tensors: dict[str, torch.Tensor], backend: str) -> None:
    index = (..., 0, ...)
    with pytest.raises(IndexError, match="single ellipsis"):
        tensors["weight"].numpy()[index]
    with (
        wl.safe_open(path, backend=backend) as ours,
        pytest.raises(IndexError, match="single ellipsis"),
    ):
        ours.get_slice("weight")[index]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_of_zero(path: Path, backend: str) -> None:
    with wl.safe_open(path, backend=backend) as ours, reference_safe_open(path, "pt") as theirs:
        for opened in (ours, theirs):
            with pytest.raises(ValueError, match="zero"):
                opened.get_slice("weight")[::0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_slices_of_scalars_and_of_nothing(path: Path, backend: str) -> None:
    with wl.safe_open(path, backend=backend) as ours, reference_safe_open(path, "pt") as theirs:
        for name, index in [
            ("scalar", ()),
            ("scalar", ...),
            ("empty", ()),
            ("empty", ALL),
            ("empty", (ALL, 1)),
            ("empty", (ALL, slice(0, 2))),
        ]:
            assert_same(ours.get_slice(name)[index], theirs.get_slice(name)[index])


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_in_four_dimensions(tmp_path: Path, backend: str) -> None:
    array = np.arange(7 * 6 * 9 * 11, dtype=np.int32).reshape(7, 6, 9, 11)
    data = {"w": ("I32", list(array.shape), array.tobytes())}
    (tmp_path / "f").write_bytes(file_bytes(data, None, 1))
    with wl.safe_open(tmp_path / "f", backend=backend) as file:
        for index in [
            np.s_[::2, ::3, ::4, ::5],
            np.s_[1::2, :, 8:1:-3, ::2],
            np.s_[::-1, 5, :, ::-1],
            np.s_[3, ::5, ::2, 3:4],
            np.s_[..., 10],
            np.s_[:, :, 4],
            np.s_[6, 5, 8, 10],
            np.s_[2:5, ..., ::10],
        ]:
            assert np.array_equal(file.get_slice("w")[index].numpy(), array[index])


@st.composite
def shapes_and_indices(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Any, ...], int]:
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=5)))
    given_dimensions = draw(st.integers(0, len(shape)))
    index: list[Any] = []
    for extent in shape[:given_dimensions]:
        bound = st.none() | st.integers(-12, 12)
        choices = [st.builds(slice, bound, bound, st.none() | st.integers(1, 5))]
        choices.append(st.builds(slice, bound, bound, st.integers(-5, -1)))
        if extent:
            choices.append(st.integers(-extent, extent - 1))
        index.append(draw(st.one_of(choices)))
    if draw(st.booleans()):
        # Before the last indices, which then count from the end of the shape.
        index.insert(draw(st.integers(0, len(index))), ...)
        shape_of = [*index]
        at = shape_of.index(...)
        behind = len(index) - at - 1
        for i in range(behind):
            item, extent = index[at + 1 + i], shape[len(shape) - behind + i]
            if isinstance(item, int) and not -extent <= item < extent:
                index[at + 1 + i] = slice(0, extent)
    return shape, tuple(index), draw(st.integers(0, 8))


@settings(max_examples=300)
@given(case=shapes_and_indices(), dtype=st.sampled_from(["U8", "I16", "F32", "I64", "C64"]))
def test_random_slices(case: tuple[tuple[int, ...], tuple[Any, ...], int], dtype: str) -> None:
    check_slice(case, dtype)


@pytest.mark.deep
@settings(max_examples=5000)
@given(case=shapes_and_indices(), dtype=st.sampled_from(["U8", "I16", "F32", "I64", "C64"]))
def test_many_random_slices(case: tuple[tuple[int, ...], tuple[Any, ...], int], dtype: str) -> None:
    check_slice(case, dtype)


def check_slice(case: tuple[tuple[int, ...], tuple[Any, ...], int], dtype: str) -> None:
    """A slice of a file against numpy's slice of the same array."""
    shape, index, pad = case
    count = math.prod(shape)
    torch_dtype = DTYPES[dtype]
    array = torch.arange(count).to(torch_dtype).reshape(shape).numpy()
    with tempfile.NamedTemporaryFile() as file:
        tensors = {"x": entry("U8", [3]), "w": (dtype, [*shape], array.tobytes())}
        file.write(file_bytes(tensors, None, pad))
        file.flush()
        for backend in BACKENDS:
            with wl.safe_open(file.name, backend=backend) as opened:
                part = opened.get_slice("w")[index]
            expected = array[index]
            assert tuple(part.shape) == expected.shape
            assert part.dtype == torch_dtype
            assert np.array_equal(part.numpy(), expected)


# --- What a slice reads ------------------------------------------------------------------------

ROWS, COLUMNS = 1024, 4096  # of float32: rows of 16 KiB


@pytest.fixture(scope="module")
def matrix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    values = torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)
    path = tmp_path_factory.mktemp("matrix") / "f.safetensors"
    reference_save_file({"before": torch.zeros(99), "w": values}, path)
    with path.open("r+b") as file:
        os.fsync(file.fileno())  # or nothing could drop it from the page cache
    return path


@pytest.mark.parametrize(
    ("index", "limit"),
    [
        (np.s_[10:20], 10 * COLUMNS * 4),
        (np.s_[5], COLUMNS * 4),
        (np.s_[5, 7:9], 8),
        (np.s_[:, 100:110], ROWS * 40),
        (np.s_[:, 3], ROWS * 4),
        (np.s_[:, :2048], ROWS * 2048 * 4),
        (np.s_[::2], ROWS * COLUMNS * 2),
        (np.s_[::-100, 5:6], 11 * 4),
        # Gaps of less than a page are read too.
        (np.s_[7, ::8], COLUMNS * 4),
        (np.s_[:, 512:], ROWS * COLUMNS * 4),
        (np.s_[0:0], 0),
    ],
    ids=repr,
)
def test_a_slice_reads_its_own_bytes(matrix: Path, index: Any, limit: int) -> None:
    with wl.safe_open(matrix, backend="pread") as file, wl.Settings(io_path="buffered"):
        part = file.get_slice("w")[index]
    report = wl.last_report()
    assert report.bytes == part.numel() * 4
    assert part.numel() * 4 <= report.read_bytes <= limit
    expected = np.arange(ROWS * COLUMNS, dtype=np.float32).reshape(ROWS, COLUMNS)[index]
    assert np.array_equal(part.numpy(), expected)


def test_a_slice_of_a_mapping_reads_its_own_pages(tmp_path: Path) -> None:
    size = 256 << 20
    header = {"w": {"dtype": "U8", "shape": [256, 1 << 20], "data_offsets": [0, size]}}
    sparse_file(tmp_path / "f", header, size)
    file = _native.IndexedFile.open(str(tmp_path / "f"))
    with wl.safe_open(tmp_path / "f") as opened:
        assert opened.get_slice("w")[3:4].sum() == 0
    resident = file.resident_bytes()
    # Includes the kernel's read-ahead, which is 8 MiB on some machines.
    assert resident is None or resident < 64 << 20


# --- Sharing -----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_file_many_threads(path: Path, tensors: dict[str, torch.Tensor], backend: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with wl.safe_open(path, backend=backend) as file, ThreadPoolExecutor(16) as pool:

        def use(turn: int) -> None:
            name = sorted(tensors)[turn % len(tensors)]
            assert_same(file.get_tensor(name), tensors[name])
            assert torch.equal(
                file.get_slice("weight")[turn % 2, ::2], tensors["weight"][turn % 2, ::2]
            )

        list(pool.map(use, range(200)))


def test_positions_outside_of_the_index(path: Path) -> None:
    """The native index checks its arguments."""
    file = _native.IndexedFile.open(str(path))
    for position in (len(file), 1 << 31):
        for method in (file.dtype, file.shape, file.range):
            with pytest.raises(IndexError):
                method(position)
    plan = _native.Plan(_native.Settings())
    with pytest.raises(IndexError):
        plan.read(file, [len(file)], None, None)
    with pytest.raises(IndexError):
        plan.map(file, [len(file)], False)
    position = file.find("weight")
    for parts in (
        [(0, 1, 3), (0, 1, 1), (0, 1, 1)],
        [(2, 1, 1), (0, 1, 1), (0, 1, 1)],
        [(1, -1, 3), (0, 1, 1), (0, 1, 1)],
        [(0, 0, 2), (0, 1, 1), (0, 1, 1)],
        [(0, 1 << 62, 2), (0, 1, 1), (0, 1, 1)],
        [(1, 1, 1 << 63), (0, 1, 1), (0, 1, 1)],
        [(0, 1, 1 << 62), (0, 1, 1), (0, 1, 1)],
    ):
        with pytest.raises((IndexError, OverflowError, TypeError, ValueError)):
            _native.Plan(_native.Settings()).slice(file, position, parts, None)
    with pytest.raises(ValueError, match="for each dimension"):
        plan.slice(file, position, [(0, 1, 1)], None)
    with pytest.raises(ValueError, match="one address and one dtype"):
        plan.copy_to(file, [position], _native.Targets(-1, [4096, 8192], ["F32", "F32"]))
    with pytest.raises(ValueError, match="one address and one dtype"):
        _native.Targets(-1, [4096, 8192], ["F32"])
    with pytest.raises(ValueError, match="must have the same length"):
        _native.HostTensors(["a"], [4096], [1, 2], ["F32"])
    for option, value, choices in (
        ("io_path", "sideways", "'auto', 'buffered', 'direct'"),
        ("cast_place", "nowhere", "'auto', "),
    ):
        with pytest.raises(ValueError, match=rf"'(sideways|nowhere)'; it can be {choices}"):
            setattr(_native.Settings(), option, value)


def test_elements_that_share_bytes_are_not_cut(tmp_path: Path) -> None:
    (tmp_path / "fours").write_bytes(file_bytes({"w": entry("F4", [3, 8])}))
    file = _native.IndexedFile.open(str(tmp_path / "fours"))
    with pytest.raises(wl.FormatError, match="load it whole") as caught:
        _native.Plan(_native.Settings()).slice(file, 0, [(0, 1, 3), (0, 1, 4)], None)
    assert (caught.value.code, caught.value.tensor) == ("unsupported_dtype", "w")


def test_header_is_read_from_where_it_is_long(tmp_path: Path) -> None:
    """More than the first read, which recognises web pages and similar files."""
    entries = {f"{'name' * 50}{i}": entry("U8", [3], i) for i in range(40)}
    content = file_bytes(entries)
    assert struct.unpack("<Q", content[:8])[0] > 8192
    (tmp_path / "f").write_bytes(content)
    with wl.safe_open(tmp_path / "f") as file:
        assert file.offset_keys() == list(entries)

from __future__ import annotations

import ctypes
import gc
import hashlib
import os
import pathlib
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as reference_load_file
from safetensors.torch import save_file as reference_save_file

import weightlift as wl
from support import (
    DTYPES,
    REFERENCE_DTYPES,
    anonymous_bytes,
    assert_same,
    assert_same_tensors,
    bits,
    entry,
    file_bytes,
    random_bytes,
    run_python,
    sparse_file,
)
from weightlift.checkpoint.open_checkpoint import open_checkpoint
from weightlift.load.load_plan import LoadPlan
from weightlift.load.load_tensors import load_tensors
from weightlift.load.options import LoadOptions

MODES = ["auto", "map", "read"]
MIB = 1 << 20


def write(path: Path, *arguments: object, **options: object) -> Path:
    path.write_bytes(file_bytes(*arguments, **options))  # type: ignore[arg-type]
    return path


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Every dtype that torch and safetensors have, in shapes of all kinds, not in the order of
    their names."""
    entries = {}
    for number, dtype in enumerate(reversed(REFERENCE_DTYPES)):
        last = 6 if dtype == "F4" else 5
        entries[f"{dtype}.matrix"] = entry(dtype, [3, last], number)
        entries[f"{dtype}.empty"] = entry(dtype, [0, last], number)
        entries[f"{dtype}.large"] = entry(dtype, [77, 200], number)
        if dtype != "F4":
            entries[f"{dtype}.scalar"] = entry(dtype, [], number)
    # The widest dtype first after an aligned header, as the reference writes its files.
    entries = dict(sorted(entries.items(), key=lambda item: -DTYPES[item[1][0]].itemsize))
    length = struct.unpack("<Q", file_bytes(entries, {"made": "by hand"})[:8])[0]
    return write(tmp_path / "mixed.safetensors", entries, {"made": "by hand"}, -length % 8)


# --- The reference's tensors -------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_dtype_equals_the_references(mixed: Path, mode: str) -> None:
    theirs = reference_load_file(mixed)
    assert {tensor.dtype for tensor in theirs.values()} == set(REFERENCE_DTYPES.values())
    assert_same_tensors(wl.load_file(mixed, mode=mode), theirs)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pad", range(9))
def test_data_at_any_offset(tmp_path: Path, mode: str, pad: int) -> None:
    entries = {
        "odd": entry("U8", [3], 1),
        "f32": entry("F32", [1000], 2),
        "odd2": entry("I8", [1], 3),
        "f64": entry("F64", [3, 400], 4),
        "c64": entry("C64", [7], 5),
        "bf16": entry("BF16", [5001], 6),
    }
    path = write(tmp_path / "f.safetensors", entries, None, pad)
    loaded = wl.load_file(path, mode=mode)
    assert list(loaded) == list(entries)
    for name, (dtype, shape, data) in entries.items():
        assert loaded[name].dtype == DTYPES[dtype]
        assert list(loaded[name].shape) == shape
        assert bits(loaded[name]) == data
        assert bits(loaded[name].clone()) == data


@pytest.mark.parametrize("mode", MODES)
def test_misaligned_tensors_compute(tmp_path: Path, mode: str) -> None:
    values = torch.linspace(-3, 3, 5000, dtype=torch.float64)
    for pad in range(8):
        entries = {"w": ("F64", [50, 100], values.numpy().tobytes())}
        tensor = wl.load_file(write(tmp_path / f"f{pad}", entries, None, pad), mode=mode)["w"]
        expected = values.reshape(50, 100)
        torch.testing.assert_close(tensor @ tensor.T, expected @ expected.T)
        torch.testing.assert_close(tensor.exp().sum(0), expected.exp().sum(0))


@pytest.mark.parametrize("mode", MODES)
def test_file_without_tensors(tmp_path: Path, mode: str) -> None:
    assert wl.load_file(write(tmp_path / "f", {}), mode=mode) == {}
    assert wl.load_file(write(tmp_path / "g", {}, {"a": "b"}), mode=mode) == {}


@pytest.mark.parametrize("mode", MODES)
def test_only_zero_size_tensors(tmp_path: Path, mode: str) -> None:
    path = write(tmp_path / "f", {"a": entry("F32", [0]), "b": entry("BF16", [3, 0, 2])})
    loaded = wl.load_file(path, mode=mode)
    # Where several begin and end at one place, the reference's order changes from call to call.
    assert_same_tensors(loaded, dict(sorted(reference_load_file(path).items())))
    assert wl.last_report().bytes == 0


@pytest.mark.parametrize("mode", MODES)
def test_scalars(tmp_path: Path, mode: str) -> None:
    tensors = {"pi": torch.tensor(3.14159), "n": torch.tensor(-5), "yes": torch.tensor(True)}
    reference_save_file(tensors, tmp_path / "f")
    loaded = wl.load_file(tmp_path / "f", mode=mode)
    assert_same_tensors(loaded, reference_load_file(tmp_path / "f"))
    assert loaded["pi"].item() == tensors["pi"].item()


@pytest.mark.parametrize("mode", MODES)
def test_ten_thousand_small_tensors(tmp_path: Path, mode: str) -> None:
    tensors = {
        f"layers.{i}.weight": torch.full(
            (i % 37 + 1, 3), i, dtype=(torch.float32, torch.int16)[i % 2]
        )
        for i in range(10_000)
    }
    reference_save_file(tensors, tmp_path / "f")
    loaded = wl.load_file(tmp_path / "f", mode=mode)
    assert loaded.keys() == tensors.keys()
    assert list(loaded) == list(reference_load_file(tmp_path / "f"))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("mode", MODES)
def test_any_text_is_a_name(tmp_path: Path, mode: str) -> None:
    names = [
        "",
        " ",
        "a\0b",
        "\0",
        "../../etc/passwd",
        "/absolute",
        "новый.вес",
        "重み",
        "\N{GRINNING FACE}",
        'quo"te\\',
        "line\nbreak",
        "__metadata",
        "n" * 5000,
    ]
    entries = {name: entry("U8", [number + 1], number) for number, name in enumerate(names)}
    path = write(tmp_path / "f", entries)
    loaded = wl.load_file(path, mode=mode)
    assert list(loaded) == names
    assert_same_tensors(loaded, reference_load_file(path))


def test_order_is_the_references(tmp_path: Path) -> None:
    """The file's, which is not the header's."""
    entries = {name: entry("U8", [4], number) for number, name in enumerate("qwertyuiop")}
    content = file_bytes(entries)
    length = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + length].decode()
    parts = header[1:-1].split("}, ")
    shuffled = "{" + ", ".join(p.rstrip("}") + "}" for p in reversed(parts)) + "}"
    path = tmp_path / "f"
    path.write_bytes(struct.pack("<Q", len(shuffled)) + shuffled.encode() + content[8 + length :])
    assert shuffled.startswith('{"p"')
    for mode in MODES:
        assert (
            list(wl.load_file(path, mode=mode))
            == list(reference_load_file(path))
            == list("qwertyuiop")
        )


# --- What torch cannot hold --------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2"])
def test_dtype_that_torch_lacks(tmp_path: Path, mode: str, dtype: str) -> None:
    entries = {"fine": entry("F32", [4], 1), "six": entry(dtype, [8], 2)}
    path = write(tmp_path / "f", entries)
    with pytest.raises(wl.FormatError) as caught:
        wl.load_file(path, mode=mode)
    assert caught.value.code == "unsupported_dtype"
    assert caught.value.tensor == "six"
    assert caught.value.path == str(path)
    assert dtype in str(caught.value)
    backend = "pread" if mode == "read" else "mmap"
    with wl.safe_open(path, backend=backend) as file:
        assert bits(file.get_tensor("fine")) == entries["fine"][2]
        assert file.get_slice("six").get_dtype() == dtype
        with pytest.raises(wl.FormatError, match="six"):
            file.get_tensor("six")


@pytest.mark.parametrize("mode", MODES)
def test_packed_fours(tmp_path: Path, mode: str) -> None:
    path = write(tmp_path / "f", {"four": entry("F4", [3, 8], 1)})
    loaded = wl.load_file(path, mode=mode)["four"]
    assert_same(loaded, reference_load_file(path)["four"])
    assert loaded.shape == (3, 4)
    path = write(tmp_path / "g", {"fine": entry("U8", [2]), "four": entry("F4", [2, 3], 1)})
    with pytest.raises(wl.FormatError, match="odd") as caught:
        wl.load_file(path, mode=mode)
    assert caught.value.code == "unsupported_dtype"
    assert caught.value.tensor == "four"


# --- Large files -------------------------------------------------------------------------------


def large(path: Path) -> dict[int, bytes]:
    """A tensor larger than 2 GiB, and one after it beyond 4 GiB, with marks at both ends."""
    first, second = 5 << 29, 7 << 28
    header = {
        "a": {"dtype": "BF16", "shape": [first // 2], "data_offsets": [0, first]},
        "b": {"dtype": "U8", "shape": [second], "data_offsets": [first, first + second]},
    }
    begin = sparse_file(path, header, first + second)
    marks = {0: b"ab", first - 2: b"yz", first: b"AB", first + second - 2: b"YZ"}
    with path.open("r+b") as file:
        for place, mark in marks.items():
            file.seek(begin + place)
            file.write(mark)
    assert path.stat().st_size > 4 << 30
    return marks


def check_large(loaded: dict[str, torch.Tensor]) -> None:
    a, b = loaded["a"], loaded["b"]
    assert (a.numel(), b.numel()) == (5 << 28, 7 << 28)
    assert (bits(a[:1]), bits(a[-1:])) == (b"ab", b"yz")
    assert (bits(b[:2]), bits(b[-2:])) == (b"AB", b"YZ")
    assert bits(a[(1 << 30) : (1 << 30) + 8]) == bytes(16)
    assert a.untyped_storage().nbytes() == 5 << 29


def test_larger_than_four_gibibytes(tmp_path: Path) -> None:
    large(tmp_path / "f")
    with wl.Settings(populate=False):
        check_large(wl.load_file(tmp_path / "f"))
    assert wl.last_report().mapped_bytes == (5 << 29) + (7 << 28)
    for backend in ("mmap", "pread"):
        with wl.safe_open(tmp_path / "f", backend=backend) as file, wl.Settings(populate=False):
            assert bits(file.get_slice("b")[-2:]) == b"YZ"
            assert bits(file.get_slice("a")[(5 << 28) - 1 :]) == b"yz"


@pytest.mark.deep
def test_reads_more_than_four_gibibytes(tmp_path: Path) -> None:
    large(tmp_path / "f")
    check_large(wl.load_file(tmp_path / "f", mode="read"))


# --- Paths -------------------------------------------------------------------------------------


class PathLike:
    def __init__(self, path: str | bytes) -> None:
        self.path = path

    def __fspath__(self) -> str | bytes:
        return self.path


@pytest.mark.parametrize("mode", MODES)
def test_kinds_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    path = write(tmp_path / "f.safetensors", {"w": entry("F32", [9])})
    expected = reference_load_file(path)
    (tmp_path / "link").symlink_to("f.safetensors")
    (tmp_path / "link2").symlink_to("link")
    monkeypatch.chdir(tmp_path)
    for given in (
        str(path),
        path,
        PathLike(str(path)),
        "f.safetensors",
        pathlib.PurePosixPath("./f.safetensors"),
        f"../{tmp_path.name}/f.safetensors",
        "link",
        "link2",
    ):
        assert_same_tensors(wl.load_file(given, mode=mode), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [b"caf\xe9.safetensors", "重み.safetensors".encode(), b"a b\n"])
def test_file_names_of_any_bytes(tmp_path: Path, mode: str, name: bytes) -> None:
    content = file_bytes({"w": entry("F32", [9])})
    path = os.fsdecode(os.fsencode(tmp_path) + b"/" + name)
    Path(path).write_bytes(content)
    (tmp_path / "plain").write_bytes(content)
    assert_same_tensors(wl.load_file(path, mode=mode), reference_load_file(tmp_path / "plain"))
    assert wl.last_report().files[0].path == path
    with wl.safe_open(path) as file, pytest.raises(wl.FormatError) as caught:
        file.get_tensor("x")
    assert caught.value.path == path


@pytest.mark.parametrize("path", [b"f.safetensors", PathLike(b"f.safetensors"), 5, None])
def test_what_is_no_path(path: object) -> None:
    with pytest.raises((wl.ArgumentError, TypeError)):
        wl.load_file(path)  # type: ignore[arg-type]


# --- Memory ------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_each_tensor_has_its_own_storage(mixed: Path, mode: str) -> None:
    loaded = wl.load_file(mixed, mode=mode)
    seen = set()
    for tensor in loaded.values():
        storage = tensor.untyped_storage()
        assert storage.nbytes() == tensor.numel() * tensor.itemsize
        assert tensor.storage_offset() == 0
        assert tensor.is_contiguous()
        if tensor.numel():
            seen.add(storage.data_ptr())
    assert len(seen) == sum(tensor.numel() > 0 for tensor in loaded.values())


@pytest.mark.parametrize("mode", MODES)
def test_torch_save_writes_one_tensor(tmp_path: Path, mode: str) -> None:
    path = write(tmp_path / "f", {"big": entry("U8", [4 * MIB]), "small": entry("F32", [100], 1)})
    small = wl.load_file(path, mode=mode)["small"]
    torch.save({"small": small}, tmp_path / "one.pt")
    assert (tmp_path / "one.pt").stat().st_size < 10_000
    assert_same(torch.load(tmp_path / "one.pt", weights_only=True)["small"], small)


@pytest.mark.parametrize("mode", MODES)
def test_writes_do_not_reach_the_file(tmp_path: Path, mode: str) -> None:
    entries = {"a": entry("F32", [5000], 1), "b": entry("I64", [5000], 2)}
    path = write(tmp_path / "f", entries)
    before = path.read_bytes()
    first = wl.load_file(path, mode=mode)
    second = wl.load_file(path, mode=mode)
    first["a"].fill_(7)
    first["b"].add_(1)
    first["a"].numpy()[3] = 9
    assert first["a"][3] == 9
    assert first["a"][4] == 7
    assert bits(second["a"]) == entries["a"][2]
    del first
    gc.collect()
    assert path.read_bytes() == before
    assert bits(wl.load_file(path, mode=mode)["b"]) == entries["b"][2]


@pytest.mark.parametrize("mode", MODES)
def test_training_on_loaded_weights(tmp_path: Path, mode: str) -> None:
    def train(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        data = torch.linspace(-1, 1, 64).reshape(8, 8)
        for _ in range(3):
            model.zero_grad()
            model(data).square().mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad
        return model.state_dict()

    def network() -> torch.nn.Module:
        torch.manual_seed(3)
        return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))

    reference_save_file(network().state_dict(), tmp_path / "f")
    before = (tmp_path / "f").read_bytes()
    with torch.device("meta"):
        loaded = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 4))
    loaded.load_state_dict(wl.load_file(tmp_path / "f", mode=mode), assign=True)
    ours, theirs = train(loaded), train(network())
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor)
    assert (tmp_path / "f").read_bytes() == before


@pytest.mark.parametrize("mode", MODES)
def test_tensors_outlive_everything(tmp_path: Path, mode: str) -> None:
    entries = {f"t{i}": entry("I32", [3000 + i], i) for i in range(20)}
    path = write(tmp_path / "f", entries)
    loaded = wl.load_file(path, mode=mode)
    kept = loaded["t7"]
    view = loaded["t9"][10:20]
    del loaded
    gc.collect()
    assert bits(kept) == entries["t7"][2]
    path.unlink()
    path.write_bytes(os.urandom(20_000))
    assert bits(kept) == entries["t7"][2]
    assert bits(view) == entries["t9"][2][40:80]
    replacement = tmp_path / "new"
    replacement.write_bytes(b"x")
    replacement.rename(path)
    kept += 1
    assert bits(kept - 1) == entries["t7"][2]


def digest(data: object) -> str:
    """Without a copy, which would be memory too."""
    return hashlib.sha256(data).hexdigest()  # type: ignore[arg-type]


def test_memory_of_dead_tensors_goes_back_when_read(tmp_path: Path) -> None:
    entries = {f"t{i}": entry("U8", [8 * MIB], i) for i in range(4)}
    path = write(tmp_path / "f", entries)
    wl.load_file(path, mode="read")
    gc.collect()
    base = anonymous_bytes()
    loaded = wl.load_file(path, mode="read")
    assert anonymous_bytes() - base > 31 * MIB
    del loaded["t0"], loaded["t1"], loaded["t3"]
    assert anonymous_bytes() - base < 11 * MIB
    assert digest(loaded["t2"].numpy()) == digest(entries["t2"][2])
    del loaded
    assert anonymous_bytes() - base < 2 * MIB


def test_memory_of_dead_tensors_goes_back_when_mapped(tmp_path: Path) -> None:
    """Pages that were written to are memory of this process, and lie between the neighbours'."""
    size = 8 * MIB + 100
    entries = {f"t{i}": entry("U8", [size], i) for i in range(4)}
    path = write(tmp_path / "f", entries)
    loaded = wl.load_file(path, mode="map")
    base = anonymous_bytes()
    for number, tensor in enumerate(loaded.values()):
        tensor.fill_(number)
    assert anonymous_bytes() - base > 31 * MIB
    del tensor, loaded["t1"], loaded["t3"]
    assert anonymous_bytes() - base < 18 * MIB
    assert loaded["t0"].max() == 0
    assert loaded["t2"].min() == loaded["t2"].max() == 2
    del loaded
    assert anonymous_bytes() - base < 2 * MIB


@pytest.mark.parametrize("mode", MODES)
def test_small_neighbours_keep_what_was_written(tmp_path: Path, mode: str) -> None:
    """Tensors that share pages: deleting one does not change another."""
    entries = {f"t{i}": entry("U8", [3000 + 7 * i], i) for i in range(60)}
    loaded = wl.load_file(write(tmp_path / "f", entries, None, 3), mode=mode)
    for number, tensor in enumerate(loaded.values()):
        tensor.fill_(number)
    del tensor
    for number in range(0, 60, 2):
        del loaded[f"t{number}"]
    for number in range(1, 60, 2):
        assert bits(loaded[f"t{number}"]) == bytes([number]) * (3000 + 7 * number)


def test_loads_of_one_checkpoint_share_nothing(tmp_path: Path) -> None:
    data = entry("U8", [MIB], 1)
    checkpoint = wl.Checkpoint.from_file(write(tmp_path / "f", {"w": data}))
    first, second = (load_tensors(checkpoint, torch.device("cpu"))["w"] for _ in range(2))
    first.fill_(7)
    assert bits(second) == data[2]
    second.fill_(9)
    del first
    assert second.min() == second.max() == 9
    assert bits(load_tensors(checkpoint, torch.device("cpu"))["w"]) == data[2]


def test_mapped_tensors_are_the_page_caches(tmp_path: Path) -> None:
    """Zero copy: a load takes no memory of its own."""
    path = write(tmp_path / "f", {"w": entry("U8", [32 * MIB])})
    reference_load_file(path)
    base = anonymous_bytes()
    loaded = wl.load_file(path)
    assert int(loaded["w"].sum(dtype=torch.int64)) > 0
    assert anonymous_bytes() - base < 2 * MIB
    report = wl.last_report()
    assert (report.mapped_bytes, report.read_bytes) == (32 * MIB, 0)


def test_no_memory_is_an_error(tmp_path: Path) -> None:
    """More memory than the machine has, in a sparse file: refused before it is read."""
    size = 1 << 45
    header = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    try:
        sparse_file(tmp_path / "f", header, size)
    except OSError:
        size = 1 << 43  # ext4 with blocks of 4 KiB ends at 16 TiB
        header = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
        sparse_file(tmp_path / "f", header, size)
    with pytest.raises(wl.OutOfMemoryError) as caught:
        wl.load_file(tmp_path / "f", mode="read")
    assert isinstance(caught.value, MemoryError)
    with pytest.raises(MemoryError):
        wl.load_file(tmp_path / "f", dtype="float16", mode="read")
    with wl.Settings(populate=False):
        assert wl.load_file(tmp_path / "f")["w"][-1] == 0


def test_export_without_a_taker(tmp_path: Path) -> None:
    """An error between the engine's tensors and torch's leaves neither a leak nor a crash."""
    code = """
import sys
import weightlift as wl
from weightlift import _native
path = sys.argv[1]
plan = _native.Plan(_native.Settings())
plan.read(_native.IndexedFile.open(path), None, None, None)
plan.prepare()
plan.start([])
while not plan.wait(1):
    pass
plan.finish()
taken = []
def refuse(capsule):
    taken.append(capsule)
    raise RuntimeError("no")
try:
    plan.tensors(refuse)
except RuntimeError as error:
    assert str(error) == "no"
else:
    raise AssertionError
del taken, plan
"""
    path = write(tmp_path / "f", {f"t{i}": entry("U8", [9000]) for i in range(3)})
    done = run_python(code, path)
    assert done.returncode == 0, done.stderr


# --- Arguments ---------------------------------------------------------------------------------


def test_modes_of_the_reference(mixed: Path) -> None:
    theirs = reference_load_file(mixed)
    assert_same_tensors(wl.load_file(mixed, backend="mmap"), theirs)
    assert wl.last_report().read_bytes == 0
    assert_same_tensors(wl.load_file(mixed, backend="pread"), theirs)
    assert wl.last_report().mapped_bytes == 0
    assert_same_tensors(wl.load_file(mixed, backend="pread", mode="read"), theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "copy"},
        {"mode": ""},
        {"mode": None},
        {"backend": "io_uring"},
        {"backend": "mmap", "mode": "read"},
        {"backend": "pread", "mode": "map"},
        {"mode": "map", "dtype": torch.float16},
        {"mode": "map", "pin_memory": True},
        {"mode": "map", "device": "cuda:0"},
        {"pin_memory": True, "device": "cuda:0"},
        {"dtype": "int32"},
    ],
)
def test_arguments_that_do_not_go_together(tmp_path: Path, options: dict[str, object]) -> None:
    path = write(tmp_path / "f", {"w": entry("F32", [2])})
    with pytest.raises(wl.ArgumentError) as caught:
        wl.load_file(path, **options)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "f", {"w": entry("F32", [2])})
    for options in ({"device": "cuda"}, {"device": "cuda:3"}, {"device": 0}, {"pin_memory": True}):
        with pytest.raises(wl.DeviceError) as caught:
            wl.load_file(path, **options)  # type: ignore[arg-type]
        assert isinstance(caught.value, RuntimeError)


@pytest.mark.parametrize("device", ["foo", -1, "meta", 1.5])
def test_devices_that_nothing_can_be_loaded_to(tmp_path: Path, device: object) -> None:
    import safetensors

    path = write(tmp_path / "f", {"w": entry("F32", [2])})
    with pytest.raises(safetensors.SafetensorError):
        reference_load_file(path, device=device)  # type: ignore[arg-type]
    with pytest.raises(safetensors.SafetensorError) as caught:
        wl.load_file(path, device=device)  # type: ignore[arg-type]
    assert isinstance(caught.value, wl.WeightliftError)
    with pytest.raises(safetensors.SafetensorError):
        wl.safe_open(path, device=device)  # type: ignore[arg-type]


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_the_cpu_by_its_names(tmp_path: Path, device: str | torch.device) -> None:
    path = write(tmp_path / "f", {"w": entry("F32", [2])})
    assert wl.load_file(path, device)["w"].device == torch.device("cpu")


# --- Progress ----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [100, 6 * MIB])
def test_progress(tmp_path: Path, mode: str, size: int) -> None:
    path = write(tmp_path / "f", {"a": entry("U8", [size]), "b": entry("U8", [size], 1)})
    calls: list[tuple[int, int]] = []
    wl.load_file(path, mode=mode, progress=lambda done, total: calls.append((done, total)))
    assert calls[-1] == (2 * size, 2 * size)
    assert all(total == 2 * size for _, total in calls)
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)


@pytest.mark.parametrize("mode", MODES)
def test_error_in_progress_ends_the_load(tmp_path: Path, mode: str) -> None:
    class StopItError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise StopItError

    path = write(tmp_path / "f", {"w": entry("U8", [6 * MIB])})
    with pytest.raises(StopItError):
        wl.load_file(path, mode=mode, progress=stop)
    assert bits(wl.load_file(path, mode=mode)["w"]) == random_bytes(6 * MIB, 0)


def test_progress_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "f", {"w": entry("U8", [6 * MIB])})
    assert bits(wl.load_file(path, mode="read", progress=True)["w"]) == random_bytes(6 * MIB, 0)
    capsys.readouterr()


# --- Checksums ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["SHA256SUMS", "f.safetensors.sha256", "bare"])
def test_verify(tmp_path: Path, mode: str, where: str) -> None:
    path = write(tmp_path / "f.safetensors", {"w": entry("F32", [5000])})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    other = f"{'0' * 64}  other.safetensors\n"
    if where == "bare":
        (tmp_path / "f.safetensors.sha256").write_text(digest + "\n")
    else:
        (tmp_path / where).write_text(other + f"{digest}  f.safetensors\n")
    assert_same_tensors(wl.load_file(path, mode=mode, verify=True), reference_load_file(path))
    content = bytearray(path.read_bytes())
    for place in (len(content) - 1, len(content) // 2):
        changed = bytearray(content)
        changed[place] ^= 1
        path.write_bytes(changed)
        with pytest.raises(wl.FormatError) as caught:
            wl.load_file(path, mode=mode, verify=True)
        assert caught.value.code == "hash_mismatch"
        assert caught.value.path == str(path)


def test_verify_is_never_a_no_op(tmp_path: Path) -> None:
    path = write(tmp_path / "f.safetensors", {"w": entry("F32", [5])})
    with pytest.raises(wl.CheckpointError, match="SHA256SUMS"):
        wl.load_file(path, verify=True)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  other.safetensors\n")
    with pytest.raises(wl.CheckpointError):
        wl.load_file(path, verify=True)


def test_verify_in_a_hub_cache(tmp_path: Path) -> None:
    content = file_bytes({"w": entry("F32", [5])})
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    blob = blobs / hashlib.sha256(content).hexdigest()
    blob.write_bytes(content)
    link = snapshot / "model.safetensors"
    link.symlink_to(f"../../blobs/{blob.name}")
    assert list(wl.load_file(link, verify=True)) == ["w"]
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(wl.FormatError, match="Hub cache"):
        wl.load_file(link, verify=True)


# --- As other memory ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_tensors_are_as_any_other(tmp_path: Path, mode: str) -> None:
    import copy
    import pickle

    path = write(tmp_path / "f", {"w": ("F32", [4, 6], torch.arange(24.0).numpy().tobytes())})
    tensor = wl.load_file(path, mode=mode)["w"]
    expected = torch.arange(24.0).reshape(4, 6)
    assert torch.equal(copy.deepcopy(tensor), expected)
    assert torch.equal(pickle.loads(pickle.dumps(tensor)), expected)
    assert torch.equal(torch.from_dlpack(tensor), expected)
    assert tensor.numpy().flags.writeable
    assert torch.equal(tensor.t()[1:3], expected.t()[1:3])
    address = (ctypes.c_float * 24).from_address(tensor.data_ptr())
    assert list(address) == list(range(24))
    shared = tensor.clone().share_memory_()
    assert torch.equal(shared, expected)
    parameter = torch.nn.Parameter(tensor)
    parameter.sum().backward()
    assert torch.equal(parameter.grad, torch.ones(4, 6))


def test_a_part_that_does_not_fit_is_named(tmp_path: Path) -> None:
    """2 TB of a sparse file, half of which is asked for: more than any machine of a test has."""
    path = tmp_path / "sparse.safetensors"
    count = 1 << 41
    header = {"big": {"dtype": "U8", "shape": [count], "data_offsets": [0, count]}}
    sparse_file(path, header, count)
    plan = LoadPlan(open_checkpoint(path), LoadOptions("read"))
    plan.add(torch.device("cpu"), None, ["big"], parts=[[(0, 1, count // 2)]])
    with pytest.raises(wl.OutOfMemoryError, match=r"sparse\.safetensors: tensor 'big'.*load fewer"):
        plan.start()

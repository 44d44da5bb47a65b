"""The safetensors backend: each call has the same result as without it."""

from __future__ import annotations

import gc
import os
import pickle
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

import weightlift as wl
from backend_support import engine_moves, falls_back, tensor_bytes
from support import (
    REFERENCE_DTYPES,
    REFERENCE_HAS_BACKENDS,
    assert_same,
    assert_same_tensors,
    bits,
    entry,
    file_bytes,
    run_python,
)
from weightlift.backends import patching, signature_text
from weightlift.backends import safetensors as safetensors_backend

REFERENCE = (safetensors.safe_open, safetensors.torch.safe_open, safetensors.torch.load_file)
CALLER = "safetensors"


def header_twice(data: bytes) -> bytes:
    """The same file with its only tensor named twice, which the reference accepts."""
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    twice = header[:-1] + b", " + header[1:]
    return len(twice).to_bytes(8, "little") + twice + data[8 + length :]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    entries = {name: entry(name, [3, 4], n) for n, name in enumerate(REFERENCE_DTYPES)}
    entries |= {"scalar": entry("F32", [], 1), "none": entry("I8", [0, 5])}
    one = file_bytes({"w": entry("I32", [10, 6], 3)})
    files = {
        "all": file_bytes(entries, {"format": "pt"}),
        "one": one,
        "twice": header_twice(one),
        "shifted": file_bytes({"a": entry("I64", [7]), "b": entry("F16", [9, 2])}, pad=3),
        "bare": file_bytes({}),
        "f6": file_bytes({"w": entry("F6_E2M3", [4])}),
        "cut": one[:-4],
        "long": one + b"1234",
        "junk": b"<!DOCTYPE html><html></html>",
        "empty": b"",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(*args: Any, **kwargs: Any) -> Any:
    return safetensors.torch.load_file(*args, **kwargs)


def opened(*args: Any, **kwargs: Any) -> Any:
    return safetensors.safe_open(*args, **kwargs)


def comparable(result: Any) -> Any:
    if isinstance(result, torch.Tensor):
        return result.dtype, result.shape, result.device, bits(result)
    if isinstance(result, dict):
        return [(name, comparable(value)) for name, value in result.items()]
    if isinstance(result, np.ndarray):
        return result.dtype, result.shape, result.tobytes()
    return result


def outcome(call: Callable[[], Any]) -> Any:
    try:
        return comparable(call())
    except Exception as error:
        return error


def outcomes(call: Callable[[], Any]) -> tuple[Any, Any]:
    """The results of a call without and with the backend."""
    assert safetensors.safe_open is REFERENCE[0]
    stock = outcome(call)
    with wl.enabled(CALLER):
        assert safetensors.safe_open is not REFERENCE[0]
        return stock, outcome(call)


def test_the_very_objects_come_back() -> None:
    with wl.enabled(CALLER):
        now = (safetensors.safe_open, safetensors.torch.safe_open, safetensors.torch.load_file)
        assert all(ours is not theirs for ours, theirs in zip(now, REFERENCE, strict=True))
        assert safetensors.torch.safe_open is safetensors.safe_open
        assert [signature_text(o) for o in now] == [signature_text(o) for o in REFERENCE]
        assert pickle.loads(pickle.dumps(load)) is load
        assert pickle.loads(pickle.dumps(safetensors.torch.load_file)) is now[2]
    now = (safetensors.safe_open, safetensors.torch.safe_open, safetensors.torch.load_file)
    assert all(ours is theirs for ours, theirs in zip(now, REFERENCE, strict=True))


@pytest.mark.parametrize("name", ["all", "one", "shifted", "bare"])
@pytest.mark.parametrize(
    "options", [{}, {"backend": "mmap"}, {"backend": "pread"}][: 3 if REFERENCE_HAS_BACKENDS else 1]
)
def test_load_file(folder: Path, name: str, options: dict[str, str]) -> None:
    # Without backend="pread", which returns a wrong shape for F4 in 0.8.0.
    expected = safetensors.torch.load_file(folder / name)
    with wl.enabled(CALLER), engine_moves(tensor_bytes(folder / name), CALLER):
        assert_same_tensors(safetensors.torch.load_file(folder / name, **options), expected)
    report = wl.last_report()
    assert report is not None
    read = options.get("backend") == "pread"
    assert (report.read_bytes if read else report.mapped_bytes) == tensor_bytes(folder / name)


def test_load_file_lets_go_of_each_tensor(tmp_path: Path) -> None:
    # Each owns its part, like the reference's: saving one writes only that one.
    size = 1 << 20
    path = tmp_path / "f"
    path.write_bytes(file_bytes({"a": entry("U8", [size]), "b": entry("U8", [size])}))
    with wl.enabled(CALLER):
        tensors = safetensors.torch.load_file(path)
    assert {t.untyped_storage().nbytes() for t in tensors.values()} == {size}
    first = weakref.ref(tensors.pop("a"))
    gc.collect()
    assert first() is None


# The form of a call, and whether the engine must do it.
@pytest.mark.parametrize(
    "call",
    [
        lambda: load("one", "cpu"),
        lambda: load(Path("one"), device="cpu"),
        lambda: load(filename="one", device=None),
        lambda: safetensors.torch.load_file("one"),
        lambda: opened("one", "pt").get_tensor("w"),
        lambda: opened("one", "pytorch", "cpu").get_tensor("w"),
        lambda: opened("one", framework="torch", device=None).get_tensor("w"),
        lambda: opened(filename="one", framework="pt").get_slice("w")[:],
    ],
)
def test_by_the_engine(folder: Path, call: Callable[[], Any]) -> None:
    with engine_moves(240, CALLER):
        stock, ours = outcomes(call)
    assert not isinstance(stock, Exception)
    assert ours == stock


@pytest.mark.parametrize(
    "call",
    [
        lambda: load("missing"),
        lambda: load("folder"),
        lambda: load("empty"),
        lambda: load("junk"),
        lambda: load("cut"),
        lambda: load("long"),
        lambda: load("one", device="meta"),
        lambda: load("one", device="nonsense"),
        lambda: load("one", device=-1),
        lambda: load("one", device="cuda"),
        lambda: load("one", device=0),
        lambda: load("one", device="mps"),
        lambda: load("one", device=1.5),
        lambda: load("one", backend="io_uring"),
        lambda: load("one", "cpu", "mmap"),
        lambda: load(b"one"),
        lambda: load(None),
        lambda: load(),
        lambda: opened("one"),
        lambda: opened("missing", "pt"),
        lambda: opened("junk", "pt"),
        lambda: opened("one", "PT"),
        lambda: opened("one", "nonsense"),
        lambda: opened("one", "pt", nonsense=1),
        lambda: opened("one", "pt", "nonsense"),
        lambda: opened("one", "pt", "cuda").get_tensor("w"),
        lambda: opened(3, "pt"),
        lambda: opened("one", "pt").get_slice("w")[11],
        lambda: opened("one", "pt").get_slice("w")[0, 0, 0],
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="some of these load there")
def test_refused_with_the_reference_s_own_error(folder: Path, call: Callable[[], Any]) -> None:
    stock, ours = outcomes(call)
    assert isinstance(stock, Exception)
    assert type(ours) is type(stock)
    assert str(ours) == str(stock)


@pytest.mark.parametrize(
    "call",
    [
        lambda: load("f6"),
        lambda: opened("f6", "pt").get_tensor("w"),
        lambda: opened("one", "pt").get_tensor("nope"),
        lambda: opened("one", "pt").get_tensor(3),
        lambda: opened("one", "pt").get_slice("nope"),
        lambda: opened("one", "pt").nonsense,
    ],
)
def test_refused_with_an_error_of_the_same_kind(folder: Path, call: Callable[[], Any]) -> None:
    stock, ours = outcomes(call)
    assert isinstance(stock, Exception)
    assert isinstance(ours, type(stock))


def test_the_engine_s_words_are_the_cause(folder: Path) -> None:
    with wl.enabled(CALLER), pytest.raises(safetensors.SafetensorError) as caught:
        load("junk")
    assert isinstance(caught.value.__cause__, wl.FormatError)
    assert "web page" in str(caught.value.__cause__)


def test_what_only_the_reference_accepts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in (load, lambda path: opened(path, "pt").get_tensor("w")):
        path = folder / os.urandom(4).hex()  # another reason each time, so that it is told
        (folder / "twice").rename(path)
        expected = comparable(call(path))
        with wl.enabled(CALLER), falls_back(CALLER), pytest.warns(UserWarning, match="twice"):
            assert comparable(call(path)) == expected
        with monkeypatch.context() as strict, wl.enabled(CALLER):
            strict.setenv("WEIGHTLIFT_STRICT", "1")
            with pytest.raises(wl.WeightliftError, match="STRICT"):
                call(path)
        path.rename(folder / "twice")


@pytest.mark.skipif(torch.cuda.is_available(), reason="loads there")
def test_devices_that_are_not_ours_are_left_alone_quietly(folder: Path) -> None:
    for device in ("cuda", "mps", "xpu"):
        with wl.enabled(CALLER), falls_back(CALLER):
            opened("one", "pt", device)


@pytest.mark.parametrize("framework", ["np", "numpy"])
def test_other_frameworks_are_untouched(folder: Path, framework: str) -> None:
    def call() -> Any:
        with safetensors.safe_open("one", framework) as file:
            assert type(file) is REFERENCE[0]
            return file.get_tensor("w")

    with falls_back(CALLER, times=0):
        stock, ours = outcomes(call)
        assert ours == stock
        with wl.enabled(CALLER):
            tensors = safetensors.numpy.load_file("one")
    assert comparable(tensors["w"]) == stock


def test_open_file(folder: Path) -> None:
    with safetensors.safe_open("all", "pt") as reference, wl.enabled(CALLER):
        with safetensors.safe_open("all", framework="pt") as file:
            assert type(file) is not REFERENCE[0]
            assert file.keys() == reference.keys()
            assert file.metadata() == reference.metadata() == {"format": "pt"}
            assert file.offset_keys() == reference.offset_keys()
            for name in file.keys():  # noqa: SIM118 - it is not a mapping
                whole = reference.get_tensor(name)
                with engine_moves(whole.nbytes, CALLER):
                    assert_same(file.get_tensor(name), whole)
                piece = file.get_slice(name)
                assert piece.get_shape() == reference.get_slice(name).get_shape()
                assert piece.get_dtype() == reference.get_slice(name).get_dtype()
                assert_same(piece[...], whole)
                if whole.dim() == 2:
                    assert_same(piece[1:, :1], whole[1:, :1])
            kept = file.get_tensor("F32")
        for use in (file.keys, file.metadata, lambda: file.get_tensor("F32")):
            with pytest.raises(safetensors.SafetensorError):
                use()
        assert_same(kept, reference.get_tensor("F32"))


def test_slices_are_booked(folder: Path) -> None:
    with wl.enabled(CALLER):
        for options in ({}, {"backend": "pread"})[: 2 if REFERENCE_HAS_BACKENDS else 1]:
            before = wl.stats()
            opened("one", "pt", **options).get_slice("w")[2:4]
            after = wl.stats()
            assert after.by_caller[CALLER].loads == before.by_caller[CALLER].loads + 1
            assert after.loads == before.loads + 1


def test_isinstance(folder: Path) -> None:
    stock = safetensors.safe_open("one", "pt")
    with wl.enabled(CALLER):
        ours = safetensors.safe_open("one", "pt")
        for handle in (stock, ours):
            assert isinstance(handle, safetensors.safe_open)
            assert isinstance(handle, REFERENCE[0])
        assert not isinstance(3, safetensors.safe_open)
    assert isinstance(ours, safetensors.safe_open)
    assert_same(ours.get_tensor("w"), stock.get_tensor("w"))  # open files live on


def test_all_methods_of_the_reference_are_there(folder: Path) -> None:
    with wl.enabled(CALLER):
        file = safetensors.safe_open("one", "pt")
    for name in dir(REFERENCE[0]):
        if not name.startswith("_"):
            assert callable(getattr(file, name))


class Newer:
    """A reference with more names than the installed one."""

    def __init__(self, filename: Any, framework: str, device: Any = "cpu") -> None:
        self.opened = REFERENCE[0](filename, framework, device)

    def prefetch(self, names: list[str]) -> str:
        return f"prefetched {names}"

    def largest(self) -> str:
        return max(self.opened.keys(), key=lambda name: self.opened.get_tensor(name).nbytes)


def test_methods_of_a_newer_reference(folder: Path) -> None:
    adapter = safetensors_backend.open_adapters(CALLER)["(filename, framework, device=...)"]
    expected = load("one")["w"]
    with wl.enabled(CALLER):
        file = adapter(Newer)("one", "pt")
        with falls_back(CALLER):
            assert file.prefetch(["w"]) == "prefetched ['w']"
        with falls_back(CALLER, times=0):
            assert file.largest() == "w"
        with engine_moves(240, CALLER):
            assert_same(file.get_tensor("w"), expected)
        for name in ("smallest", "_private"):
            with pytest.raises(AttributeError, match=f"no attribute '{name}'"):
                getattr(file, name)


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(5, 5)
        self.b = torch.nn.Linear(5, 5)
        self.b.weight = self.a.weight
        self.register_buffer("steps", torch.arange(3))


@pytest.mark.parametrize("extra", [{}, {"b.bias": None}, {"c": torch.ones(2)}])
@pytest.mark.parametrize("strict", [True, False])
def test_load_model(tmp_path: Path, extra: dict[str, Any], strict: bool) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_model(Tied(), str(path))
    if extra:
        tensors = {**safetensors.torch.load_file(path), **extra}
        safetensors.torch.save_file({n: t for n, t in tensors.items() if t is not None}, path)

    def call() -> Any:
        torch.manual_seed(0)
        model = Tied()
        missing, unexpected = safetensors.torch.load_model(model, path, strict)
        assert model.a.weight is model.b.weight
        return {**model.state_dict(), "names": (sorted(missing), sorted(unexpected))}

    with engine_moves(tensor_bytes(path), CALLER):
        stock, ours = outcomes(call)
    assert isinstance(stock, RuntimeError) == (strict and bool(extra))
    assert (str(ours), type(ours)) == (str(stock), type(stock))
    if isinstance(stock, list):
        assert ours == stock


def test_names_that_a_module_imported_before(folder: Path) -> None:
    # Its `load_file` opens through safetensors.torch.
    with wl.enabled(CALLER), engine_moves(240, CALLER):
        tensors = REFERENCE[2]("one")
    assert comparable(tensors) == comparable(load("one"))


def test_writing_to_loaded_tensors_leaves_the_file(folder: Path) -> None:
    before = (folder / "one").read_bytes()
    with wl.enabled(CALLER):
        load("one")["w"].zero_()
        opened("one", "pt").get_tensor("w").zero_()
    assert (folder / "one").read_bytes() == before


OTHER = """
import sys
import weightlift as wl
wl.enable("safetensors")
assert "safetensors.torch" not in sys.modules, "test a later import"
import safetensors, safetensors.torch
ours = safetensors.torch.safe_open
assert ours is safetensors.safe_open
safetensors.torch.load_file(sys.argv[1])
assert wl.stats().by_caller["safetensors"].bytes == 240
wl.disable()
assert safetensors.torch.safe_open is safetensors.safe_open is not ours
assert safetensors.torch.load_file.__closure__ is None
"""


def test_imported_later(folder: Path) -> None:
    done = run_python(OTHER, folder / "one")
    assert done.returncode == 0, done.stderr


def test_every_signature_has_been_seen() -> None:
    # The installed version must be a known one, or these tests would have tested only the
    # reference.
    for hook in patching.hooks_of(CALLER):
        module = {"safetensors": safetensors, "safetensors.torch": safetensors.torch}[hook.module]
        assert signature_text(vars(module)[hook.target]) in hook.adapters

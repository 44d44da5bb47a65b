"""The accelerate backend: the model after a load, with and without the backend."""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import accelerate.utils.modeling as modeling
import pytest
import safetensors.torch
import torch
from accelerate.hooks import AlignDevicesHook
from accelerate.utils import OffloadedWeightsLoader

import weightlift as wl
from accelerate_models import (
    CALLER,
    DTYPES,
    FORMS,
    MAPS,
    ON_DISK,
    Model,
    Tied,
    build,
    describe,
    describe_all,
    offloaded,
    outcomes,
    weights,
    write,
)
from backend_support import engine_moves, tensor_bytes
from support import bits
from weightlift.backends import patching, signature_text

# For parameters of the model itself.
pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys do not match")

collect = gc.collect


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    # accelerate collects garbage after every file, over everything that the test session has
    # imported.
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


CASES = [
    pytest.param(*case, id="-".join(map(str, case)))
    for case in itertools.product(FORMS, MAPS, DTYPES, [False, True], [False, True])
    for form, place, dtype, meta, state in [case]
    if (meta or dtype is None) and (not state or (place in ("cpu", "disk") and meta))
]


@pytest.mark.parametrize(("form", "place", "dtype", "meta", "offload_state_dict"), CASES)
def test_load_checkpoint_in_model(
    tmp_path: Path, form: str, place: str, dtype: Any, meta: bool, offload_state_dict: bool
) -> None:
    checkpoint = write(tmp_path / "checkpoint", form)

    def call(folder: Path) -> Any:
        model = build(meta)
        accelerate.load_checkpoint_in_model(
            model,
            checkpoint,
            device_map=MAPS[place],
            offload_folder=folder,
            dtype=dtype,
            offload_state_dict=offload_state_dict,
        )
        return describe_all(model), offloaded(folder)

    tensors = weights()
    # `offloaded` reads the weights on the disk at the end.
    with engine_moves(sum(tensor.nbytes for tensor in tensors.values()), CALLER):
        (stock, stock_disk), (ours, our_disk) = outcomes(call, tmp_path)
    if place == "disk":
        names = {name for name in tensors if name.startswith(ON_DISK)}
        buffers = {name for name, _ in Model().named_buffers()} & names
        for name in buffers:  # accelerate does not load these, and keeps the old values
            kind, read = ours[name][1], ours.pop(name)[-1]
            assert read == bits(tensors[name].to(kind)) != stock.pop(name)[-1]
        assert our_disk.keys() == stock_disk.keys() == names - buffers
        for name, tensor in our_disk.items():
            # accelerate casts when it assigns the tensor, weightlift while it reads it.
            final = ours[name][1]
            assert bits(tensor.to(final)) == bits(stock_disk[name].to(final))
            written = (tmp_path / "ours" / f"{name}.dat").exists()
            assert written == form.startswith("bin")
    else:
        assert our_disk == stock_disk == {}
    assert ours == stock


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("device_map", ["auto", "sequential", "disk", "none"])
def test_load_checkpoint_and_dispatch(
    tmp_path: Path, form: str, meta: bool, device_map: str
) -> None:
    checkpoint = write(tmp_path / "checkpoint", form)
    memory = {"cpu": 2000} if device_map == "sequential" else None

    def call(folder: Path) -> Any:
        model = accelerate.load_checkpoint_and_dispatch(
            build(meta),
            checkpoint,
            device_map=MAPS.get(device_map, device_map),
            max_memory=memory,
            no_split_module_classes=["Block"],
            offload_folder=folder,
            offload_buffers=True,  # without it accelerate leaves those on the disk out
        ).eval()
        hooked = {
            name
            for name, m in model.named_modules()
            if isinstance(getattr(m, "_hf_hook", 0), AlignDevicesHook)
        }
        return describe_all(model), hooked, describe(model(torch.arange(10)))

    (stock, stock_hooks, stock_result), (ours, our_hooks, our_result) = outcomes(call, tmp_path)
    assert ours == stock
    assert our_hooks == stock_hooks
    assert our_result == stock_result
    on_disk = {"none": False, "auto": False}.get(device_map, True)
    assert any(value[-1] is None for value in ours.values()) == on_disk
    assert bool(list((tmp_path / "ours").glob("*.dat"))) == (on_disk and form[:3] == "bin")


def test_weights_on_the_disk_are_read_from_the_checkpoint(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "checkpoint", "safetensors")
    tensors = weights()
    with wl.enabled(CALLER):
        on_disk = {n: t for n, t in tensors.items() if n.startswith(ON_DISK)}
        buffers = {n for n, _ in Model().named_buffers()}
        elsewhere = sum(t.nbytes for n, t in tensors.items() if n not in on_disk or n in buffers)
        with engine_moves(elsewhere, CALLER):
            model = accelerate.load_checkpoint_and_dispatch(
                build(True),
                checkpoint,
                device_map=MAPS["disk"],
                offload_folder=tmp_path / "folder",
                dtype=torch.float16,
            )
        assert [path.name for path in (tmp_path / "folder").iterdir()] == ["index.json"]
        index = json.loads((tmp_path / "folder" / "index.json").read_text())
        assert index["head.weight"] == {
            "safetensors_file": str(checkpoint / "model.safetensors"),
            "weight_name": "head.weight",
            "dtype": "float16",
        }
        with engine_moves(tensors["head.weight"].nbytes, CALLER):
            loaded = OffloadedWeightsLoader(save_folder=tmp_path / "folder")["head.weight"]
    assert bits(loaded) == bits(tensors["head.weight"].half())
    assert loaded.dtype == torch.float16
    # Also without the backend: the index has accelerate's own form.
    again = OffloadedWeightsLoader(save_folder=tmp_path / "folder")["head.weight"]
    assert bits(again) == bits(loaded)
    assert model.head.weight.device.type == "meta"


def test_a_file_that_is_replaced_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    loader = OffloadedWeightsLoader(
        index={"w": {"safetensors_file": str(path), "dtype": "int64"}, "gone": {}}
    )
    with wl.enabled(CALLER):
        for value in (1, 2):
            safetensors.torch.save_file({"w": torch.full((3,), value)}, tmp_path / "new")
            (tmp_path / "new").replace(path)
            assert loader["w"].tolist() == [value] * 3
        path.unlink()
        with pytest.raises(FileNotFoundError):
            loader["w"]
        with pytest.raises(KeyError):
            loader["nothing"]


def test_no_offload_folder(tmp_path: Path) -> None:
    # The documentation calls it optional, but it raises an error.
    checkpoint = write(tmp_path / "checkpoint", "safetensors")

    def call(**options: Any) -> Any:
        return accelerate.load_checkpoint_and_dispatch(
            build(True), checkpoint, device_map=MAPS["disk"], **options
        ).eval()

    with pytest.raises(ValueError, match="offload_folder"):
        call()
    expected = call(offload_folder=tmp_path / "folder", offload_buffers=True)
    with wl.enabled(CALLER):
        model = call(offload_buffers=True)
        folder = Path(model.head._hf_hook.weights_map.dataset.save_folder)
        assert folder.exists()
        assert describe(model(torch.arange(10))) == describe(expected(torch.arange(10)))
        del model
        collect()
        assert not folder.exists()
        with pytest.raises(ValueError, match="offload_folder"):
            accelerate.load_checkpoint_in_model(build(True), checkpoint, MAPS["disk"])


def test_a_dispatch_that_fails_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with wl.enabled(CALLER), pytest.raises(ValueError, match="nowhere"):
        accelerate.load_checkpoint_and_dispatch(
            build(True), tmp_path / "nowhere", device_map=MAPS["disk"]
        )
    assert list(tmp_path.glob("weightlift-*")) == []


@pytest.mark.parametrize("options", [{"dtype": "float31"}, {"device_map": {"": "xpu:0"}}])
def test_what_accelerate_has_to_say(tmp_path: Path, options: dict[str, Any]) -> None:
    checkpoint = write(tmp_path / "checkpoint", "safetensors")

    def call(folder: Path) -> Any:
        model = build(True)
        options.setdefault("device_map", {"": "cpu"})
        accelerate.load_checkpoint_in_model(model, checkpoint, **options)
        return describe_all(model)

    stock, ours = outcomes(call, tmp_path)
    assert isinstance(stock[0], type)  # an error
    assert ours == stock


def test_parts_of_accelerate_by_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A load must change them only for itself."""
    collected: list[int] = []
    monkeypatch.setattr(gc, "collect", lambda *_: collected.append(1) or 0)
    expected = torch.arange(4.0)
    with wl.enabled(CALLER):
        modeling.clear_device_cache(garbage_collection=True)
        assert collected == [1]
        model = torch.nn.Module()
        model.w = torch.nn.Parameter(torch.zeros(4))
        index = modeling.offload_weight(expected, "w", tmp_path, {})
        modeling.load_offloaded_weights(model, index, tmp_path)
    assert index == {"w": {"dtype": "float32", "shape": [4]}}
    assert (tmp_path / "w.dat").read_bytes() == bits(expected)
    assert torch.equal(model.w, expected)


def odd(change: Callable[[dict[str, torch.Tensor]], None]) -> dict[str, torch.Tensor]:
    tensors = weights()
    change(tensors)
    return tensors


ODD: dict[str, dict[str, torch.Tensor]] = {
    "unexpected": odd(lambda t: t.update(extra=torch.ones(3))),
    "missing": odd(lambda t: t.pop("head.weight")),
    "shape": odd(lambda t: t.update(scale=torch.ones(9))),
    "integers": odd(lambda t: t.update(scale=torch.arange(8))),
    "double": odd(lambda t: t.update(scale=torch.rand(8, dtype=torch.float64))),
    "fp8": odd(lambda t: t.update(scale=torch.rand(8).to(torch.float8_e8m0fnu))),
    "complex": odd(lambda t: t.update(scale=torch.rand(8).to(torch.complex64))),
    "nothing": {},
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("place", ["none", "cpu", "disk", "holes"])
@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_odd_checkpoints(
    tmp_path: Path, kind: str, place: str, strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = write(tmp_path / "checkpoint", "safetensors", ODD[kind])
    told: list[list[str]] = []

    def call(folder: Path) -> Any:
        caplog.clear()
        model = build(place == "disk")
        try:
            accelerate.load_checkpoint_in_model(
                model,
                checkpoint,
                device_map={"blocks": "cpu"} if place == "holes" else MAPS[place],
                offload_folder=folder,
                offload_buffers=True,
                strict=strict,
            )
        finally:
            told.append(sorted(caplog.messages))
        return describe_all(model)

    stock, ours = outcomes(call, tmp_path)
    assert ours == stock
    assert told[0] == told[1]
    if kind == "unexpected" and place == "cpu" and not strict:
        assert any("extra" in line for line in told[0])


@pytest.mark.parametrize("keep", [["norm"], ["blocks"], ["scale", "nothing"], []])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_keep_in_fp32(tmp_path: Path, keep: list[str], dtype: torch.dtype) -> None:
    checkpoint = write(tmp_path / "checkpoint", "safetensors")

    def call(folder: Path) -> Any:
        model = build(True)
        accelerate.load_checkpoint_in_model(
            model, checkpoint, {"": "cpu"}, dtype=dtype, keep_in_fp32_modules=keep
        )
        return describe_all(model)

    stock, ours = outcomes(call, tmp_path)
    assert ours == stock
    kinds = {
        value[1] for name, value in ours.items() if "own" not in name and "batches" not in name
    }
    assert kinds == ({dtype, torch.float32} if keep and dtype == torch.float16 else {dtype})


def test_tied_weights(tmp_path: Path) -> None:
    checkpoint = write(tmp_path / "checkpoint", "safetensors")

    def call(folder: Path) -> Any:
        model = build(True, Tied)
        model.head.weight = model.embed.weight
        accelerate.load_checkpoint_in_model(model, checkpoint, {"": "cpu"}, dtype="bfloat16")
        return describe_all(model), model.head.weight is model.embed.weight

    stock, ours = outcomes(call, tmp_path)
    assert ours == stock
    assert ours[1]


@pytest.mark.parametrize("metadata", [None, {"format": "tf"}, {"format": "mlx"}, {"a": "b"}])
def test_metadata(
    tmp_path: Path, metadata: dict[str, str] | None, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file(weights(), path, metadata)
    told = []

    def call(folder: Path) -> Any:
        caplog.clear()
        model = build(True)
        try:
            accelerate.load_checkpoint_in_model(model, str(path), {"": "cpu"})
        finally:
            told.append(list(caplog.messages))
        return describe_all(model)

    with (
        engine_moves(tensor_bytes(path) if metadata is None else 0, CALLER)
        if not (metadata)
        else contextlib.nullcontext()
    ):
        stock, ours = outcomes(call, tmp_path)
    assert ours == stock
    assert told[0] == told[1]
    assert len(told[0]) == (metadata is None)


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"junk"),
        lambda path: torch.save([torch.ones(3)], path),
        lambda path: torch.save({"state_dict": [1]}, path),
        lambda path: torch.save({**weights(), "epoch": 3}, path),
        lambda path: torch.save(weights(), path, _use_new_zipfile_serialization=False),
    ],
    ids=["junk", "list", "nothing", "more", "legacy"],
)
def test_odd_torch_files(tmp_path: Path, make: Callable[[Path], Any]) -> None:
    path = tmp_path / "pytorch_model.bin"
    make(path)

    def call(folder: Path) -> Any:
        model = build(False)
        accelerate.load_checkpoint_in_model(model, str(path), {"": "cpu"})
        return describe_all(model)

    stock, ours = outcomes(call, tmp_path)
    assert ours == stock


def test_missing_paths(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", tmp_path / "missing.safetensors"):

        def call(folder: Path, path: Path = path) -> Any:
            accelerate.load_checkpoint_in_model(build(False), str(path), {"": "cpu"})

        stock, ours = outcomes(call, tmp_path)
        assert ours == stock
        assert issubclass(stock[0], Exception)


def test_neither_cache_nor_garbage_is_looked_at_for_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = write(tmp_path / "checkpoint", "safetensors-sharded")
    calls: list[str] = []
    monkeypatch.setattr(gc, "collect", lambda *_: calls.append("collect"))
    with wl.enabled(CALLER):
        accelerate.load_checkpoint_in_model(build(True), checkpoint, {"": "cpu"})
        assert calls == []
        modeling.gc.collect()
        assert calls == ["collect"]
        assert modeling.gc.isenabled() == gc.isenabled()
    assert modeling.gc is gc
    accelerate.load_checkpoint_in_model(build(True), checkpoint, {"": "cpu"})
    assert len(calls) >= 4


def test_memory_that_garbage_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from weightlift.load.load_plan import LoadPlan

    checkpoint = write(tmp_path / "checkpoint", "safetensors")
    real, failures = LoadPlan.start, [wl.OutOfMemoryError("full")]

    def start(self: LoadPlan) -> Any:
        if failures:
            raise failures.pop()
        return real(self)

    monkeypatch.setattr(LoadPlan, "start", start)
    with wl.enabled(CALLER), engine_moves(tensor_bytes(checkpoint), CALLER):
        accelerate.load_checkpoint_in_model(build(True), checkpoint, {"": "cpu"})
    assert failures == []


def test_other_parameters_are_accelerates(tmp_path: Path) -> None:
    class Special(torch.nn.Parameter):
        pass

    checkpoint = write(tmp_path / "checkpoint", "safetensors")

    def call(folder: Path) -> Any:
        model = build(False)
        model.scale = Special(torch.ones(8), requires_grad=False)
        accelerate.load_checkpoint_in_model(model, checkpoint, MAPS["disk"], folder)
        return describe_all(model)

    stock, ours = outcomes(call, tmp_path)
    assert ours == stock
    assert ours["scale"][0] is Special


def test_every_signature_has_been_seen() -> None:
    # The installed version must be a known one, or these tests would have tested only accelerate.
    import importlib

    for hook in patching.hooks_of(CALLER):
        target: Any = importlib.import_module(hook.module)
        for part in hook.target.split("."):
            target = getattr(target, part)
        if target is not gc:
            assert signature_text(target) in hook.adapters

"""Checkpoints by ``load_checkpoint`` and ``load_state_dict``, against safetensors and diffusers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models import model_loading_utils
from safetensors.torch import load_file, save_file

import weightlift as wl
from support import DTYPES, assert_same, assert_same_tensors, entry, file_bytes, sparse_file
from weightlift import _native
from weightlift.checkpoint.checkpoint import Checkpoint, indexed_files
from weightlift.load.load_plan import LoadPlan
from weightlift.load.options import LoadOptions

TENSORS = {
    "unet.a": torch.arange(6.0).reshape(2, 3),
    "unet.ema.a": torch.ones(2),
    "vae.b": torch.arange(4),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    return path


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("prefix", "ignore", "names"),
    [
        ("unet.", None, {"a": "unet.a", "ema.a": "unet.ema.a"}),
        ("unet.", "unet.ema.", {"a": "unet.a"}),
        (None, ["*.a"], {"vae.b": "vae.b"}),
        (None, ["vae.", "*.ema.*"], {"unet.a": "unet.a"}),
    ],
)
def test_prefix_and_ignore(
    file: Path, prefix: str | None, ignore: str | list[str] | None, names: dict[str, str]
) -> None:
    found = wl.load_checkpoint(file, prefix=prefix, ignore=ignore)
    assert_equal(found, {name: TENSORS[old] for name, old in names.items()})


def test_nothing_left_is_an_error(file: Path) -> None:
    with pytest.raises(wl.CheckpointError, match=r"prefix='clip\.' leaves no tensor"):
        wl.load_checkpoint(file, prefix="clip.")


def test_an_open_checkpoint_has_its_arguments_already(file: Path) -> None:
    checkpoint = wl.open_checkpoint(file)
    assert_equal(wl.load_checkpoint(checkpoint), load_file(file))
    with pytest.raises(wl.ArgumentError, match="already open"):
        wl.load_checkpoint(checkpoint, prefix="unet.")


def test_a_map_of_devices(file: Path) -> None:
    found = wl.load_checkpoint(file, device_map={"unet": "cpu", "vae": "cpu"})
    assert_equal(found, load_file(file))


def test_load_state_dict(file: Path) -> None:
    assert wl.load_state_dict(TENSORS) is TENSORS
    assert_equal(wl.load_state_dict(str(file)), model_loading_utils.load_state_dict(str(file)))
    meta = wl.load_state_dict(file, map_location="meta")
    assert {name: (t.shape, t.dtype, t.device.type) for name, t in meta.items()} == {
        name: (t.shape, t.dtype, "meta") for name, t in TENSORS.items()
    }


def test_load_state_dict_of_packed_fours(tmp_path: Path) -> None:
    path = tmp_path / "fours.safetensors"
    path.write_bytes(file_bytes({"w": entry("F4", [3, 8])}))
    (meta,) = wl.load_state_dict(path, map_location="meta").values()
    expected = load_file(path)["w"]
    assert (meta.shape, meta.dtype) == (expected.shape, expected.dtype)


@pytest.mark.parametrize("device_map", ["auto", {"unet": "cpu", "vae": "disk"}])
def test_a_map_that_needs_a_model(file: Path, device_map: Any) -> None:
    with pytest.raises(wl.ArgumentError, match="needs a model: use load_into"):
        wl.load_checkpoint(file, device_map=device_map)


def test_how_a_checkpoint_shows_itself(file: Path, tmp_path: Path) -> None:
    assert repr(wl.open_checkpoint(file)) == f"<Checkpoint of 3 tensors in {file}>"
    folder = write_shards(tmp_path / "shards", {"a": "1", "b": "2"})
    assert repr(wl.open_checkpoint(folder)) == "<Checkpoint of 2 tensors in 2 files>"


def write_shards(folder: Path, weight_map: dict[str, str], **more: str) -> Path:
    """A tensor ``name`` is in file ``number``, and so are ``more``, which the index leaves out."""
    folder.mkdir()
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, number in (*weight_map.items(), *more.items()):
        parts.setdefault(number, {})[name] = torch.full((2,), float(number))
    names = {number: f"model-0000{number}-of-00002.safetensors" for number in parts}
    for number, tensors in parts.items():
        save_file(tensors, folder / names[number])
    listed = {name: names[number] for name, number in weight_map.items()}
    index = {"metadata": {}, "weight_map": listed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_a_tensor_in_two_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "f", {"a": "1", "b": "2"})
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(wl.CheckpointError, match=r"'a' is in model-00001-.* and in model-00002-"):
        wl.open_checkpoint(folder, strict_index=True)


def test_a_shard_that_no_index_lists(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_shards(tmp_path / "f", {"a": "1", "b": "2"})
    save_file({"c": torch.ones(2)}, folder / "model-00003-of-00002.safetensors")
    with caplog.at_level(logging.WARNING, "weightlift"):
        assert sorted(wl.load_checkpoint(folder)) == ["a", "b"]
    (record,) = caplog.records
    assert "model-00003-of-00002.safetensors is not in the index" in record.getMessage()


def test_a_key_is_for_torch_files(file: Path) -> None:
    with pytest.raises(wl.ArgumentError, match="state_dict_key='model' is for torch files"):
        wl.open_checkpoint(file, state_dict_key="model")


# --- Torch files that are read otherwise than by a mapping


def views() -> dict[str, torch.Tensor]:
    """Tensors that share memory; of packed fours too."""
    base = torch.arange(24.0)
    fours = torch.arange(12, dtype=torch.uint8).view(torch.float4_e2m1fn_x2).reshape(3, 4)
    return {
        "all": base,
        "some": base[3:9].view(2, 3),
        "turned": base.view(4, 6).t(),
        "fours": fours,
        "row": fours[1],
        "whole": torch.arange(5),
    }


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def torch_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "model.bin"
    tensors = views()
    if not request.param:  # of which torch reads everything at once
        del tensors["fours"], tensors["row"]
    torch.save(tensors, path, _use_new_zipfile_serialization=request.param)
    return path


def test_headers_and_tensors_of_views(torch_file: Path) -> None:
    expected = torch.load(torch_file, weights_only=True)
    found = wl.load_checkpoint(torch_file)
    assert_same_tensors(found, expected)
    headers = wl.open_checkpoint(torch_file).headers()
    for name, tensor in expected.items():
        dtype, shape = headers[name]
        assert DTYPES[dtype] == tensor.dtype
        count = 2 if dtype == "F4" else 1  # numbers in an element of torch's
        assert shape == (*tensor.shape[:-1], tensor.shape[-1] * count)


def test_renamed_and_cast(torch_file: Path) -> None:
    expected = torch.load(torch_file, weights_only=True)
    found = wl.load_checkpoint(torch_file, ignore=["fours", "row"], dtype="bfloat16")
    for name, tensor in found.items():
        theirs = expected[name]
        assert_same(tensor, theirs.bfloat16() if theirs.is_floating_point() else theirs)
    found = wl.load_checkpoint(torch_file, prefix="so")
    assert_same_tensors(found, {"me": expected["some"]})


def test_into_tensors_that_are_there(torch_file: Path) -> None:
    expected = torch.load(torch_file, weights_only=True)
    model = torch.nn.Module()
    for name in ("all", "some", "turned"):
        model.register_parameter(name, torch.nn.Parameter(torch.zeros_like(expected[name])))
    before = {name: tensor.data_ptr() for name, tensor in model.named_parameters()}
    wl.load_into(model, torch_file, strict=False)
    for name, tensor in model.named_parameters():
        assert tensor.data_ptr() == before[name]
        assert_same(tensor.data, expected[name])


class Own(torch.Tensor):
    pass


def test_a_tensor_of_another_class(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    torch.save({"w": torch.ones(3).as_subclass(Own)}, path)
    with torch.serialization.safe_globals([Own]), pytest.raises(wl.FormatError, match="is a Own"):
        wl.open_checkpoint(path)


# --- Parts


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("F32", "BF16"), ("F32", None), ("F8_E8M0", "F32"), ("F8_E4M3FNUZ", "F16"), ("F4", None)],
)
@pytest.mark.parametrize("into", [None, "contiguous", "turned"])
def test_parts(tmp_path: Path, stored: str, wanted: str | None, into: str | None) -> None:
    """The same as slices of the whole, whether the engine can cut and cast it or torch has to."""
    path = tmp_path / "f.safetensors"
    path.write_bytes(file_bytes({"w": entry(stored, [6, 8], 1)}))
    packed = 2 if stored == "F4" else 1
    expected = load_file(path)["w"][1:6:2, : 6 // packed]
    if wanted is not None:
        expected = expected.to(DTYPES[wanted])
    targets = None
    if into is not None:
        shape = tuple(expected.shape)
        empty = torch.zeros(shape if into == "contiguous" else shape[::-1], dtype=torch.uint8)
        target = empty.to(expected.dtype) if stored != "F4" else empty.view(expected.dtype)
        targets = [target if into == "contiguous" else target.t()]
    plan = LoadPlan(wl.Checkpoint.from_file(path))
    plan.add(
        torch.device("cpu"),
        wanted if into is None else None,
        ["w"],
        targets,
        [[(1, 2, 3), (0, 1, 6 // packed)]],
    )
    loaded = plan.start().result()["w"]
    assert targets is None or loaded is targets[0]
    assert_same(loaded, expected)


# --- Hashes


def test_a_load_that_is_given_up_stops_hashing(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    size = 8 << 30
    sparse_file(path, {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, size)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {path.name}\n")
    plan = LoadPlan(wl.Checkpoint.from_file(path), LoadOptions(verify=True))
    plan.add(torch.device("cpu"))
    loading = plan.start()
    loading.cancel()
    assert loading._hashes is not None
    for check in loading._hashes._checks:
        check.result(timeout=20)  # which would be the error that the hash is another


def test_verify_is_of_the_file_that_is_loaded(file: Path, tmp_path: Path) -> None:
    checkpoint = wl.Checkpoint.from_file(file)
    save_file(TENSORS, tmp_path / "other")
    (tmp_path / "other").replace(file)
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  {file.name}\n")
    with pytest.raises(wl.FormatError, match="another file took this name") as caught:
        wl.load_checkpoint(checkpoint, verify=True)
    assert caught.value.code == "hash_mismatch"


# --- What is given up


def test_a_load_that_was_cancelled_has_no_tensors(tmp_path: Path) -> None:
    path = tmp_path / "large.safetensors"
    size = 8 << 30
    sparse_file(path, {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}, size)
    plan = _native.Plan(_native.Settings())
    plan.map(indexed_files(Checkpoint.from_file(path))[0], None, False)
    plan.prepare()
    plan.start([])
    plan.cancel()
    while not plan.wait(1):
        pass
    with pytest.raises(wl.LoadCancelledError, match="the load was cancelled"):
        plan.finish()


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("mode", ["map", "read"])
def test_complex_numbers(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "model.bin"
    kinds = (torch.complex32, torch.complex64, torch.complex128)
    torch.save({str(kind): torch.randn(3, 2).to(kind) for kind in kinds}, path)
    found = wl.load_checkpoint(path, mode=mode)
    assert_same_tensors(found, torch.load(path, weights_only=True))

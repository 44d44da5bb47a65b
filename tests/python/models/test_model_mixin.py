"""``ModelMixin``, compared with diffusers' own: the same classes derived from each."""

from __future__ import annotations

import copy
import gc
import json
import logging
import shutil
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import diffusers.models.modeling_utils as theirs_utils
import pytest
import safetensors.torch
import torch
from torch import nn

import support
import weightlift as wl
from model_classes import MADE, OURS, THEIRS, TIED, Scale, Setter, made
from support import (
    anonymous_bytes,
    assert_same,
    assert_same_tensors,
    open_files,
    run_python,
    tasks,
)
from weightlift.models import model_mixin
from weightlift.module.offload import whole_state_dict

STEM = "diffusion_pytorch_model"
VERSIONS = ("_diffusers_version", "_weightlift_version", "_name_or_path")
ALL = pytest.mark.parametrize("name", MADE)
# Arguments of save_pretrained and from_pretrained.
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "single": ({}, {}),
    "sharded": ({"max_shard_size": 300}, {}),
    "variant": ({"variant": "fp16"}, {"variant": "fp16"}),
    "sharded variant": ({"variant": "fp16", "max_shard_size": 300}, {"variant": "fp16"}),
    "bin": ({"safe_serialization": False}, {}),
    "sharded bin": ({"safe_serialization": False, "max_shard_size": 300}, {}),
}


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def config(model: Any) -> dict[str, Any]:
    """The config as in the file, where tuples are lists."""
    values = json.loads(model.to_json_string())
    return {name: value for name, value in values.items() if name not in VERSIONS}


def assert_works(model: Any, expected: Any, name: str) -> None:
    """The same result of a forward pass."""
    inputs = MADE[name][1]
    if inputs is not None:
        with torch.no_grad():
            assert_same(model(inputs), expected.eval()(inputs))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    """weightlift's warnings."""
    messages: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger("weightlift").addHandler(handler)
    yield messages
    logging.getLogger("weightlift").removeHandler(handler)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


# Both ways.


@ALL
@pytest.mark.parametrize("form", FORMS)
def test_either_loads_what_the_other_saved(name: str, form: str, tmp_path: Path) -> None:
    saving, loading = FORMS[form]
    for writing, reading in ((OURS, THEIRS), (THEIRS, OURS), (OURS, OURS)):
        model = made(writing, name)
        place = tmp_path / f"{len(list(tmp_path.iterdir()))}" / "unet"
        once = name in TIED and "bin" not in form
        if once and writing is THEIRS:
            continue  # diffusers raises
        model.save_pretrained(place, **saving)
        how = {"subfolder": "unet", "output_loading_info": True, **loading}
        if reading is THEIRS and form == "sharded bin":
            how["use_safetensors"] = False
        loaded, info = getattr(reading, name).from_pretrained(place.parent, **how)
        assert config(loaded) == config(model)
        if once and reading is THEIRS:  # it leaves the other names of tied tensors on meta
            held = {key: t for key, t in state(loaded).items() if t.device.type != "meta"}
            assert state(model).keys() - held.keys() <= {*info["missing_keys"]}
            assert_same_tensors(held, {key: t for key, t in state(model).items() if key in held})
            continue
        assert_same_tensors(state(loaded), state(model))
        assert_works(loaded, model, name)
        if reading is OURS:
            assert not any(info.values())
            assert not loaded.training
            assert loaded.config["_name_or_path"] == str(place.parent)
            for parameter, before in zip(loaded.parameters(), model.parameters(), strict=True):
                assert type(parameter) is type(before)
                assert parameter.requires_grad == before.requires_grad


def test_what_is_tied_is_saved_once_and_stays_tied(folder: Path) -> None:
    model = made(OURS, "Transformer")
    model.save_pretrained(folder, max_shard_size=500)
    model.save_pretrained(folder / "single")
    files = [*folder.glob("*.safetensors"), *(folder / "single").glob("*.safetensors")]
    held = [name for file in files for name in safetensors.torch.load_file(file)]
    assert held.count("embedding.weight") == 2
    assert "head.weight" not in held
    for place in (folder, folder / "single"):
        for how in ({}, {"low_cpu_mem_usage": False}, {"dtype": torch.float16}):
            loaded = OURS.Transformer.from_pretrained(place, **how)
            assert loaded.head.weight is loaded.embedding.weight
    # A torch file has the tensor under both names.
    made(THEIRS, "Transformer").save_pretrained(folder / "bin", safe_serialization=False)
    loaded = OURS.Transformer.from_pretrained(folder / "bin")
    assert loaded.head.weight is loaded.embedding.weight
    assert loaded.num_parameters() == model.num_parameters()
    made(OURS, "Whole").save_pretrained(folder / "whole")
    for how in ({}, {"low_cpu_mem_usage": False}, {"device_map": "cpu"}):
        loaded = OURS.Whole.from_pretrained(folder / "whole", **how)
        assert loaded.again[0] is loaded.first
        assert loaded.text.head.weight is loaded.text.embedding.weight
        assert loaded.one is loaded.other


def test_parameters_of_their_own_class(folder: Path) -> None:
    made(OURS, "Own").save_pretrained(folder)
    for how in ({}, {"low_cpu_mem_usage": False}, {"dtype": "bfloat16"}):
        loaded = OURS.Own.from_pretrained(folder, **how)
        assert type(loaded.scale) is Scale
        assert loaded.scale.axis == 1


def test_buffers_that_are_not_saved(folder: Path) -> None:
    model = made(OURS, "Rotary", base=7.0)
    model.save_pretrained(folder)
    loaded = OURS.Rotary.from_pretrained(folder)
    assert "frequencies" not in loaded.state_dict()
    assert_same(loaded.frequencies, OURS.Rotary(base=7.0).frequencies)
    assert loaded.count.item() == 10


def test_layers_that_are_named_as_an_argument(folder: Path) -> None:
    class Named(wl.ModelMixin, wl.ConfigMixin):
        @wl.register_to_config
        def __init__(self, blocks: int = 2, width: int = 3) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))

    model = Named(blocks=3)
    assert len(model.blocks) == model.config.blocks == 3
    with pytest.warns(FutureWarning, match=r"config\.width"):
        assert model.width == 3
    with pytest.raises(AttributeError, match="'Named' object has no attribute 'nothing'"):
        _ = model.nothing
    model.save_pretrained(folder)
    assert_same_tensors(state(Named.from_pretrained(folder)), state(model))
    assert copy.deepcopy(model).config == model.config


def test_names_of_former_attention_blocks(folder: Path) -> None:
    model = made(OURS, "Aged")
    model.save_pretrained(folder)
    path = folder / f"{STEM}.safetensors"
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = safetensors.torch.load_file(path)
    for new, old in former.items():
        tensors = {name.replace(f".{new}.", f".{old}."): t for name, t in tensors.items()}
    assert "attention.proj_attn.bias" in tensors
    safetensors.torch.save_file(tensors, path)
    for library in (OURS, THEIRS):
        loaded, info = library.Aged.from_pretrained(folder, output_loading_info=True)
        assert_same_tensors(state(loaded), state(model))
        assert not any(info.values())


def test_a_lone_file(folder: Path) -> None:
    model = made(OURS, "UNet")
    model.save_pretrained(folder, variant="fp16")
    model.save_pretrained(folder, safe_serialization=False)
    for name in (f"{STEM}.fp16.safetensors", f"{STEM}.bin"):
        loaded = OURS.UNet.from_pretrained(folder / name)
        assert_same_tensors(state(loaded), state(model))
        assert loaded.config["_name_or_path"] == str(folder / name)


def test_a_component_of_a_dduf_file(tmp_path: Path) -> None:
    from huggingface_hub import export_folder_as_dduf

    pipeline = tmp_path / "pipeline"
    models = {"unet": made(OURS, "UNet"), "text": made(OURS, "Transformer")}
    for name, model in models.items():
        model.save_pretrained(pipeline / name, max_shard_size=600)
    index = {name: ["weightlift", type(model).__name__] for name, model in models.items()}
    (pipeline / "model_index.json").write_text(json.dumps({"_class_name": "Pipeline", **index}))
    dduf = tmp_path / "pipeline.dduf"
    export_folder_as_dduf(dduf, pipeline)
    for name, model in models.items():
        loaded = type(model).from_pretrained(dduf, subfolder=name)
        assert_same_tensors(state(loaded), state(model))
        assert config(loaded) == config(model)
        assert_works(loaded, model, type(model).__name__)


# dtype.

DTYPES = {
    "float16": torch.float16,
    "torch.bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "torch.float8_e4m3fn": torch.float8_e4m3fn,
}


@pytest.mark.parametrize("name", ["UNet", "Transformer", "Buffers", "Direct", "Mixed", "Recurrent"])
def test_dtypes_by_themselves_and_by_name(name: str, folder: Path) -> None:
    made(THEIRS, name).save_pretrained(folder, safe_serialization=False)
    for text, dtype in DTYPES.items():
        if dtype.itemsize == 1 and name == "Mixed":
            continue  # diffusers casts the tensors that it should keep
        expected = getattr(THEIRS, name).from_pretrained(folder, torch_dtype=dtype)
        for how in ({"torch_dtype": dtype}, {"dtype": text}, {"dtype": dtype, "torch_dtype": "x"}):
            loaded = getattr(OURS, name).from_pretrained(folder, **how)
            assert_same_tensors(state(loaded), state(expected))
            assert loaded.dtype == expected.dtype
    assert torch.get_default_dtype() == torch.float32


def test_the_dtype_of_the_checkpoint(folder: Path) -> None:
    model = made(OURS, "Mixed")
    model.normal.to(torch.bfloat16)
    model.inner.linear.to(torch.float16)
    model.norm.to(torch.float64)
    model.save_pretrained(folder)
    loaded = OURS.Mixed.from_pretrained(folder, dtype="auto")
    assert loaded.normal.weight.dtype == torch.bfloat16
    assert loaded.inner.linear.weight.dtype == torch.float16
    assert loaded.norm.weight.dtype == torch.float32  # of _keep_in_fp32_modules
    assert_same(loaded.normal.weight.detach(), model.normal.weight.detach())
    # None: the dtype of the constructed model.
    built = OURS.Mixed.from_pretrained(folder)
    assert_same_tensors(state(built), state(THEIRS.Mixed.from_pretrained(folder)))
    assert {tensor.dtype for tensor in built.state_dict().values()} == {torch.float32}
    torch.set_default_dtype(torch.bfloat16)
    try:
        built = OURS.Mixed.from_pretrained(folder)
        expected = THEIRS.Mixed.from_pretrained(folder)
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same_tensors(state(built), state(expected))
    assert built.normal.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["flot16", "fp17", 7, torch.int8, "torch.int8", "load_file"])
def test_what_is_no_dtype(dtype: Any, folder: Path) -> None:
    made(OURS, "Nested").save_pretrained(folder)
    with pytest.raises(ValueError, match=r"bfloat16, float16, float32.* or 'auto'"):
        OURS.Nested.from_pretrained(folder, dtype=dtype)


def test_what_is_kept_in_float32(folder: Path) -> None:
    made(THEIRS, "Mixed").save_pretrained(folder, max_shard_size=100)
    for dtype in (torch.float16, torch.bfloat16):
        loaded = OURS.Mixed.from_pretrained(folder, dtype=dtype)
        assert_same_tensors(
            state(loaded), state(THEIRS.Mixed.from_pretrained(folder, torch_dtype=dtype))
        )
        kept = {name for name, t in loaded.state_dict().items() if t.dtype == torch.float32}
        assert kept == {"scale", "norm.weight", "norm.bias", "inner.norm.weight", "inner.norm.bias"}
        assert loaded.dtype == dtype


# Devices.


def devices(model: nn.Module) -> dict[str, str]:
    return {name: tensor.device.type for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize(
    "device_map",
    [None, "cpu", torch.device("cpu"), {"": "cpu"}, {"": torch.device("cpu")}, "auto", "balanced",
     "balanced_low_0", "sequential", {"conv_in": "cpu", "down.0": "cpu", "": "cpu"}],
    ids=str,
)  # fmt: skip
def test_device_maps_to_the_cpu(device_map: Any, folder: Path) -> None:
    model = made(THEIRS, "UNet")
    model.save_pretrained(folder, max_shard_size=1000)
    how = {"device_map": device_map, "max_memory": {"cpu": 10**9}}
    expected = THEIRS.UNet.from_pretrained(folder, **how)
    loaded = OURS.UNet.from_pretrained(folder, **how)
    assert_same_tensors(state(loaded), state(expected))
    assert devices(loaded) == devices(expected)
    assert_works(loaded, model, "UNet")
    assert hasattr(loaded, "hf_device_map") == hasattr(expected, "hf_device_map")
    if isinstance(device_map, (str, torch.device)) or device_map == {"": "cpu"}:
        assert {name: str(device) for name, device in loaded.hf_device_map.items()} == {"": "cpu"}


@ALL
def test_everything_on_the_disk(name: str, folder: Path) -> None:
    model = made(OURS, name)
    model.save_pretrained(folder, max_shard_size=300)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    loaded = getattr(OURS, name).from_pretrained(folder, device_map={"": "disk"})
    assert {p.device.type for p in loaded.parameters()} <= {"meta"}
    assert_works(loaded, model, name)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_some_of_it_on_the_disk(folder: Path, tmp_path: Path) -> None:
    model = made(THEIRS, "UNet")
    model.save_pretrained(folder)
    device_map = {"conv_in": "cpu", "down": "disk", "middle": "cpu", "": "disk"}
    device_map.update({"batch_norm": "cpu", "up": "cpu", "conv_out": "cpu"})
    for how in ({}, {"offload_folder": tmp_path / "off"}, {"offload_state_dict": True}):
        loaded = OURS.UNet.from_pretrained(folder, device_map=device_map, **how)
        on_disk = {name for name, device in devices(loaded).items() if device == "meta"}
        assert on_disk == {name for name in loaded.state_dict() if name.startswith("down.")}
        assert_works(loaded, model, "UNet")
    assert not (tmp_path / "off").exists()
    # In another dtype.
    loaded = OURS.UNet.from_pretrained(folder, device_map=device_map, dtype=torch.float64)
    with torch.no_grad():
        result = loaded(MADE["UNet"][1].double())
    expected = OURS.UNet.from_pretrained(folder, dtype="float64")
    with torch.no_grad():
        assert_same(result, expected(MADE["UNet"][1].double()))


def test_a_map_that_spills(folder: Path) -> None:
    model = made(THEIRS, "UNet")
    model.save_pretrained(folder)
    for how in ({"offload_folder": "x"}, {"max_memory": {"cpu": "4KB", "disk": "1GB"}}):
        how = {"max_memory": {"cpu": 4000}, "device_map": "auto", **how}
        loaded = OURS.UNet.from_pretrained(folder, **how)
        assert "disk" in loaded.hf_device_map.values()
        assert_works(loaded, model, "UNet")
    before = wl.stats().bytes
    with pytest.raises(wl.CheckpointError, match="cpu has 4,000 bytes and lacks"):
        OURS.UNet.from_pretrained(folder, device_map="auto", max_memory={"cpu": "4KB"})
    assert wl.stats().bytes == before
    assert OURS.UNet.from_pretrained(folder, device_map="auto", max_memory={"cpu": "1MiB"})


@pytest.mark.parametrize(
    ("device_map", "error", "why"),
    [
        ("nonsense", wl.DeviceError, "'nonsense' is invalid"),
        (-1, wl.DeviceError, "-1 is invalid"),
        ("meta", wl.DeviceError, "'meta' is invalid"),
        (3.5, wl.DeviceError, r"3\.5 is invalid"),
        ({}, wl.CheckpointError, "no device for"),
        ({"conv_in": "cpu"}, wl.CheckpointError, "no device for"),
    ],
)
def test_what_is_no_device_map(
    device_map: Any, error: type[Exception], why: str, folder: Path
) -> None:
    made(OURS, "UNet").save_pretrained(folder)
    threads, files = tasks(), open_files()
    with pytest.raises(error, match=why):
        OURS.UNet.from_pretrained(folder, device_map=device_map)
    gc.collect()
    assert tasks(threads) <= threads
    assert open_files() <= files


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device_map", [0, "cuda", "cuda:1", {"": 0}])
def test_a_gpu_that_is_not_there(device_map: Any, folder: Path) -> None:
    made(OURS, "UNet").save_pretrained(folder)
    with pytest.raises(wl.DeviceError, match="cannot load to CUDA"):
        OURS.UNet.from_pretrained(folder, device_map=device_map)


def test_built_for_real(folder: Path) -> None:
    counted: list[str] = []

    class Counting(wl.ModelMixin, wl.ConfigMixin):
        @wl.register_to_config
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            counted.append(self.linear.weight.device.type)

    model = Counting()
    model.save_pretrained(folder)
    counted.clear()
    assert_same_tensors(state(Counting.from_pretrained(folder)), state(model))
    loaded = Counting.from_pretrained(folder, low_cpu_mem_usage=False)
    assert_same_tensors(state(loaded), state(model))
    assert counted == ["meta", "cpu"]
    with pytest.raises(ValueError, match="device_map='cpu' needs low_cpu_mem_usage=True"):
        Counting.from_pretrained(folder, device_map="cpu", low_cpu_mem_usage=False)


@ALL
def test_built_for_real_it_is_the_same(name: str, folder: Path) -> None:
    model = made(OURS, name)
    model.save_pretrained(folder)
    for how in ({}, {"dtype": torch.float16}):
        loaded = getattr(OURS, name).from_pretrained(folder, low_cpu_mem_usage=False, **how)
        expected = getattr(OURS, name).from_pretrained(folder, **how)
        assert_same_tensors(state(loaded), state(expected))


# Keys.


def rewrite(folder: Path, change: Any) -> None:
    """Changes the tensors of a folder's only file."""
    path = folder / f"{STEM}.safetensors"
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})


def sets(info: dict[str, list[Any]]) -> dict[str, set[Any]]:
    """diffusers' lists are in no order."""
    return {
        name: {tuple(map(tuple_or_text, v)) if isinstance(v, tuple) else v for v in values}
        for name, values in info.items()
    }


def tuple_or_text(value: Any) -> Any:
    return value if isinstance(value, str) else tuple(value)


def break_unet(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["conv_in.weight"], tensors["batch_norm.running_mean"]
    tensors["middle.conv.bias"] = torch.zeros(3)
    tensors["conv_out.weight"] = torch.zeros(3, 4)
    tensors["other"] = torch.zeros(2)


def test_the_loading_info_is_diffusers(folder: Path, said: list[str]) -> None:
    made(OURS, "UNet").save_pretrained(folder)
    rewrite(folder, break_unet)
    how = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    _, expected = THEIRS.UNet.from_pretrained(folder, low_cpu_mem_usage=False, **how)
    assert sets(expected)["mismatched_keys"]
    for more in ({}, {"low_cpu_mem_usage": False}, {"device_map": "cpu"}):
        said.clear()
        model, info = OURS.UNet.from_pretrained(folder, **how, **more)
        assert sets(info) == sets(expected)
        assert type(info) is dict
        unused, fresh = said
        assert "not used: other" in unused
        for name in ("conv_in.weight", "batch_norm.running_mean", "middle.conv.bias"):
            assert name in fresh
        assert "shape (3, 4) in the checkpoint, (3, 4, 1, 1) in the model" in fresh
        assert not any(t.isnan().any() or t.device.type == "meta" for t in state(model).values())


def test_names_that_are_ignored(folder: Path, said: list[str]) -> None:
    made(OURS, "Tolerant").save_pretrained(folder)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        more = ("extra.weight", "position_ids", "an.extra.weight")
        tensors.update({name: torch.zeros(2) for name in more})

    rewrite(folder, add)
    for library in (OURS, THEIRS):
        _, info = library.Tolerant.from_pretrained(folder, output_loading_info=True)
        assert info["unexpected_keys"] == ["an.extra.weight"]
    assert len(said) == 1
    _, info = OURS.Tolerant.from_pretrained(folder, output_loading_info=True)
    report = wl.last_report()
    assert report is not None
    assert report.bytes == sum(t.nbytes for t in state(OURS.Tolerant(2)).values()) + 8


def test_what_matches_the_ignored_names_is_loaded_nevertheless(folder: Path) -> None:
    class Extra(OURS.Tolerant):
        @wl.register_to_config
        def __init__(self) -> None:
            super().__init__()
            self.extra = nn.Linear(2, 2)

    model = Extra()
    model.save_pretrained(folder)
    assert_same_tensors(state(Extra.from_pretrained(folder)), state(model))


def initialized(base: Any, config_base: Any, register: Any) -> Any:
    class Initialized(base, config_base):
        _keep_in_fp32_modules: ClassVar = ["kept"]

        @register
        def __init__(self, width=1000) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.zero = nn.Linear(width, 3)
            nn.init.zeros_(self.zero.weight)
            self.normal = nn.Linear(width, 50)
            self.kept = nn.Parameter(torch.full((5,), 3.0))
            self.direct = nn.Parameter(torch.randn(width) * 7 + 1)
            self.later = nn.ModuleList([nn.Embedding(3, 4), nn.LayerNorm(3)])
            self.tied = nn.Linear(4, 3, bias=False)
            self.tied.weight = self.later[0].weight
            self.scaled = Scale(torch.ones(3), axis=4)
            self.register_buffer("steps", torch.arange(3))
            self.apply(self.start)

        @staticmethod
        def start(module: nn.Module) -> None:
            if isinstance(module, nn.Linear) and module.out_features == 50:
                nn.init.normal_(module.weight, mean=5.0, std=0.5)
                nn.init.constant_(module.bias, 2.0)

    return Initialized


MISSING = ("zero", "normal", "kept", "direct", "later", "tied", "scaled", "steps")


@pytest.mark.parametrize(
    "how",
    [{}, {"low_cpu_mem_usage": False}, {"dtype": "float16"}, {"dtype": "auto"},
     {"device_map": "cpu"}, {"device_map": "disk"}],
    ids=str,
)  # fmt: skip
def test_what_is_missing_is_initialized_by_the_model(
    how: dict[str, Any], folder: Path, said: list[str]
) -> None:
    cls = initialized(wl.ModelMixin, wl.ConfigMixin, wl.register_to_config)
    original = cls()
    original.save_pretrained(folder)
    missing = [name for name in original.state_dict() if name.startswith(MISSING)]
    rewrite(folder, lambda tensors: [tensors.pop(name, None) for name in missing])
    model, info = cls.from_pretrained(folder, output_loading_info=True, **how)
    assert sorted(info["missing_keys"]) == sorted(missing)
    assert all(name in said[-1] for name in missing)
    if how.get("device_map") == "disk":
        state_of = whole_state_dict(model)
        assert {p.device.type for p in model.parameters()} == {"meta"}
    else:
        state_of = model.state_dict()
        assert model.tied.weight is model.later[0].weight
        assert type(model.scaled) is Scale
        assert model.scaled.axis == 4
    dtype = torch.float16 if how.get("dtype") == "float16" else torch.float32
    assert {name for name, t in state_of.items() if t.dtype != dtype} <= {"kept", "steps"}
    assert state_of["kept"].dtype == torch.float32
    assert state_of["zero.weight"].abs().max() == 0
    assert state_of["zero.bias"].abs().max() < 0.04  # uniform in 1 / sqrt(1000)
    assert state_of["zero.bias"].abs().min() > 0
    assert abs(state_of["normal.weight"].float().mean() - 5) < 0.02
    assert abs(state_of["normal.weight"].float().std() - 0.5) < 0.02
    assert state_of["normal.bias"].unique().tolist() == [2]
    assert state_of["kept"].tolist() == [3] * 5
    assert abs(state_of["direct"].float().std() - 7) < 1
    assert state_of["later.1.weight"].tolist() == [1] * 3
    assert state_of["later.0.weight"].float().std() > 0.3
    assert state_of["scaled"].tolist() == [1] * 3
    assert state_of["steps"].tolist() == [0, 1, 2]
    assert_same(state_of["first.weight"].float(), original.first.weight.to(dtype).detach().float())


def test_only_what_is_missing_takes_memory_when_it_is_initialized(folder: Path) -> None:
    made_on: list[dict[str, str]] = []

    class Large(wl.ModelMixin, wl.ConfigMixin):
        @wl.register_to_config
        def __init__(self) -> None:
            super().__init__()
            self.large = nn.Linear(9, 9)
            self.new = nn.Linear(3, 3)
            made_on.append({name: p.device.type for name, p in self.named_parameters()})

    Large().save_pretrained(folder)
    rewrite(folder, lambda tensors: tensors.pop("new.bias"))
    made_on.clear()
    Large.from_pretrained(folder)
    assert made_on[0] == dict.fromkeys(made_on[0], "meta")
    assert made_on[1] == {**dict.fromkeys(made_on[0], "meta"), "new.bias": "cpu"}
    assert len(made_on) == 2


def test_constructors_that_make_one_weight_of_another(folder: Path) -> None:
    class Copying(wl.ModelMixin, wl.ConfigMixin):
        calls = 0

        @wl.register_to_config
        def __init__(self) -> None:
            super().__init__()
            type(self).calls += 1
            if type(self).calls % 2:  # another order each time
                self.other = nn.Linear(2, 2)
            self.first = nn.Linear(2, 2)
            nn.init.constant_(self.first.weight, 4.0)
            self.second = nn.Linear(2, 2)
            if self.first.weight.device.type != "meta":
                self.second.weight.data.copy_(self.first.weight * 2)
            if not type(self).calls % 2:
                self.other = nn.Linear(2, 2)

    Copying().save_pretrained(folder)
    rewrite(folder, lambda tensors: tensors.pop("second.weight"))
    for _ in range(2):
        loaded = Copying.from_pretrained(folder)
        assert loaded.second.weight.detach().unique().tolist() == [8]


def test_mismatches_are_an_error_that_names_all(folder: Path) -> None:
    made(OURS, "UNet").save_pretrained(folder)
    rewrite(folder, break_unet)
    with pytest.raises(ValueError, match="does not fit UNet") as caught:
        OURS.UNet.from_pretrained(folder)
    assert str(folder / f"{STEM}.safetensors") in str(caught.value)
    assert str(caught.value).splitlines()[1:] == [
        "  2 of another shape than the model's (ignore_mismatched_sizes=True skips them):",
        "    middle.conv.bias: (3,) in the checkpoint, (8,) in the model",
        "    conv_out.weight: (3, 4) in the checkpoint, (3, 4, 1, 1) in the model",
    ]


def test_weights_of_another_model(tmp_path: Path, said: list[str]) -> None:
    # The same layers in other sizes.
    made(OURS, "UNet", channels=[4] * 9).save_pretrained(tmp_path / "small")
    config = OURS.UNet(channels=[8] * 9)
    config.save_config(tmp_path / "small")
    with pytest.raises(ValueError, match="61 of another shape") as caught:
        OURS.UNet.from_pretrained(tmp_path / "small")
    lines = str(caught.value).splitlines()
    assert len(lines) == 23
    assert lines[-1] == "    and 41 more"
    # Nothing in common: diffusers returns a random model.
    made(OURS, "Recurrent").save_pretrained(tmp_path / "other")
    shutil.copy(tmp_path / "small" / "config.json", tmp_path / "other")
    with pytest.raises(ValueError, match="the weights of another model than UNet") as caught:
        OURS.UNet.from_pretrained(tmp_path / "other")
    assert "conv_in.weight" in str(caught.value)
    assert "lstm.weight_ih_l0" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 + 22 + 21


# Arguments.


@pytest.mark.parametrize(
    ("name", "near"),
    [("dtyp", "dtype"), ("devicemap", "device_map"), ("sub_folder", "subfolder"),
     ("chanels", "channels"), ("revison", "revision"), ("use_safetensor", "use_safetensors")],
)  # fmt: skip
def test_unknown_arguments_and_the_nearest_name(name: str, near: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=f"no argument '{name}'.*did you mean '{near}'"):
        OURS.UNet.from_pretrained(folder, **{name: None})


@pytest.mark.parametrize("name", ["foo", "from_tf", "return_unused_kwargs", "self", "_private"])
def test_unknown_arguments_that_are_near_to_nothing(name: str, folder: Path) -> None:
    for cls in (OURS.UNet, OURS.Deprecating):  # one whose constructor takes **kwargs
        with pytest.raises(ValueError, match=f"no argument '{name}'"):
            cls.from_pretrained(folder, **{name: 1})


def test_arguments_of_the_config(folder: Path) -> None:
    class Choosing(wl.ModelMixin, wl.ConfigMixin):
        ignore_for_config: ClassVar = ["where"]

        @wl.register_to_config
        def __init__(self, width=2, mode="down", verify=0, where="here") -> None:
            super().__init__()
            self.linear = nn.Linear(width, width)

    model = Choosing(width=3, mode="up")
    model.save_pretrained(folder)
    loaded = Choosing.from_pretrained(folder, mode="over", verify=7, progress=False)
    assert (loaded.config.width, loaded.config.mode, loaded.config.verify) == (3, "over", 7)
    with pytest.raises(ValueError, match=r"takes no 'where'.*ignore_for_config"):
        Choosing.from_pretrained(folder, where="there")
    # For the load, if the class has no argument of that name.
    with pytest.raises(ValueError, match="mode"):
        OURS.Nested.from_pretrained(folder, mode="nonsense")


def test_deprecated_arguments(folder: Path) -> None:
    for library in (OURS, THEIRS):
        library.Deprecating(size=4).save_pretrained(folder)
        loaded = library.Deprecating.from_pretrained(folder)
        assert loaded.config.width == 4
        with pytest.raises(ValueError, match="shape"):
            library.Deprecating.from_pretrained(folder, size=5)


def test_what_is_left_of_former_arguments(folder: Path) -> None:
    model = made(OURS, "Nested")
    model.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "proxies= has no effect", UserWarning)
        loaded = OURS.Nested.from_pretrained(
            folder,
            resume_download=True,
            offload_state_dict=True,
            use_auth_token="x",
            proxies={"https": "x"},
            mirror="https://hub.example.org",
            local_files_only=True,
            revision="main",
        )
    assert_same_tensors(state(loaded), state(model))


@pytest.mark.parametrize(
    "how", [{"mode": "map"}, {"mode": "read"}, {"disable_mmap": True}], ids=str
)
def test_how_it_is_read(how: dict[str, Any], folder: Path) -> None:
    model = made(OURS, "UNet")
    model.save_pretrained(folder)
    loaded = OURS.UNet.from_pretrained(folder, **how)
    assert_same_tensors(state(loaded), state(model))
    report = wl.last_report()
    assert report is not None
    parameters = report.bytes
    assert (report.mapped_bytes == parameters) == (how == {"mode": "map"})


def test_which_files(folder: Path) -> None:
    safe, pickled, variant = (made(OURS, "Nested", eps=eps) for eps in (1, 2, 3))
    with torch.no_grad():
        pickled.steps.step0.weight += 1
        variant.steps.step0.weight += 2
    pickled.save_pretrained(folder, safe_serialization=False)
    safe.save_pretrained(folder)
    variant.save_pretrained(folder, variant="fp16")
    for how, expected in (
        ({}, safe),
        ({"use_safetensors": True}, safe),
        ({"use_safetensors": False}, pickled),
        ({"variant": "fp16"}, variant),
    ):
        loaded = OURS.Nested.from_pretrained(folder, **how)
        assert_same_tensors(state(loaded), state(expected))
    (folder / f"{STEM}.safetensors").unlink()
    assert_same_tensors(state(OURS.Nested.from_pretrained(folder)), state(pickled))
    with pytest.raises(wl.CheckpointError, match="use_safetensors=True needs safetensors"):
        OURS.Nested.from_pretrained(folder, use_safetensors=True)


def test_the_layout_of_weights(folder: Path) -> None:
    made(OURS, "UNet").save_pretrained(folder)
    expected = OURS.UNet.from_pretrained(folder)
    for how in ({}, {"dtype": torch.float32}, {"device_map": "cpu"}):
        loaded = OURS.UNet.from_pretrained(folder, memory_format=torch.channels_last, **how)
        assert loaded.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
        assert_same_tensors(state(loaded), state(expected))


# Bad input.


def test_places_where_nothing_is(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    made(OURS, "Nested").save_config(tmp_path / "config")
    with pytest.raises(FileNotFoundError, match="the folder has no config"):
        OURS.Nested.from_pretrained(tmp_path / "empty")
    with pytest.raises(wl.CheckpointError, match="there are no weights"):
        OURS.Nested.from_pretrained(tmp_path / "config")
    for path in (tmp_path / "none", tmp_path / "none.safetensors", ""):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            OURS.Nested.from_pretrained(path)


BAD_CONFIGS = {
    "no JSON": b"{'width': 3}",
    "cut": b'{"width": ',
    "a list": b"[1, 2]",
    "git-lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    "HTML": b"<!DOCTYPE html><html></html>",
    "binary": bytes(range(128, 256)),
    "empty": b"",
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", BAD_CONFIGS)
def test_configs_that_are_none(kind: str, folder: Path) -> None:
    made(OURS, "Nested").save_pretrained(folder)
    (folder / "config.json").write_bytes(BAD_CONFIGS[kind])
    with pytest.raises(ValueError, match=r"is not JSON|is not a config|git-lfs") as caught:
        OURS.Nested.from_pretrained(folder)
    assert str(folder / "config.json") in str(caught.value)


BAD_WEIGHTS = {
    "git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "git-lfs"),
    "HTML": (b"<!DOCTYPE html><html><body>Not found</body></html>" * 9, "a web page"),
    "empty": (b"", "empty"),
    "cut": (None, "incomplete"),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
@pytest.mark.parametrize("form", ["single", "sharded", "bin"])
def test_weights_that_are_none(kind: str, form: str, folder: Path) -> None:
    saving, _ = FORMS[form]
    made(OURS, "UNet").save_pretrained(folder, **saving)
    path = max([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    content, why = BAD_WEIGHTS[kind]
    path.write_bytes(path.read_bytes()[:-100] if content is None else content)
    threads, files = tasks(), open_files()
    with pytest.raises(wl.WeightliftError, match=why) as caught:
        OURS.UNet.from_pretrained(folder)
    assert str(path) in str(caught.value)
    del caught
    gc.collect()
    assert tasks(threads) <= threads
    assert open_files() <= files


def test_a_copy_that_is_incomplete(folder: Path) -> None:
    made(OURS, "UNet").save_pretrained(folder, max_shard_size=1000)
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].rename(folder / f"{shards[1].name}.incomplete")
    with pytest.raises(wl.CheckpointError, match="incomplete") as caught:
        OURS.UNet.from_pretrained(folder)
    assert shards[1].name in str(caught.value)


def test_another_class(folder: Path, said: list[str]) -> None:
    class Other(OURS.Nested):
        pass

    made(OURS, "Nested").save_pretrained(folder)
    loaded = Other.from_pretrained(folder)
    assert loaded.config["_class_name"] == "Other"
    values = json.loads((folder / "config.json").read_text())
    del values["_class_name"]
    (folder / "config.json").write_text(json.dumps(values))
    assert config(OURS.Nested.from_pretrained(folder)) == config(made(OURS, "Nested"))


@pytest.mark.parametrize("name", [name for name in MADE if name not in TIED])
def test_put_before_a_class_of_diffusers(name: str, folder: Path) -> None:
    stock = getattr(THEIRS, name)
    expected = made(THEIRS, name)
    expected.save_pretrained(folder)
    loaded = type(stock.__name__, (wl.ModelMixin, stock), {}).from_pretrained(folder)
    assert config(loaded) == config(expected)
    assert_same_tensors(state(loaded), state(expected))


# The model's interface.


@ALL
def test_members_are_diffusers(name: str) -> None:
    ours, theirs = (made(library, name) for library in (OURS, THEIRS))
    for dtype in (torch.float32, torch.float16):
        ours, theirs = (nn.Module.to(model, dtype) for model in (ours, theirs))
        assert ours.dtype == theirs.dtype
        assert ours.device == theirs.device
        for trainable in (True, False):
            for embeddings in (True, False):
                arguments = {"only_trainable": trainable, "exclude_embeddings": embeddings}
                assert ours.num_parameters(**arguments) == theirs.num_parameters(**arguments)
        for buffers in (True, False):
            assert ours.get_memory_footprint(buffers) == theirs.get_memory_footprint(buffers)
    assert ours.is_gradient_checkpointing is theirs.is_gradient_checkpointing is False
    for attribute in (
        "config_name",
        "_supports_gradient_checkpointing",
        "_keys_to_ignore_on_load_unexpected",
        "_no_split_modules",
        "_keep_in_fp32_modules",
        "_skip_keys",
    ):
        assert getattr(ours, attribute) == getattr(theirs, attribute)


def test_the_device_and_dtype_of_other_modules() -> None:
    class Attributes(nn.Module):
        def __init__(self, *tensors: torch.Tensor) -> None:
            super().__init__()
            self.child = nn.Identity()
            for number, tensor in enumerate(tensors):
                self.child.__dict__[f"tensor{number}"] = tensor

    whole, half = torch.arange(3), torch.zeros(2, dtype=torch.float16)
    with_buffer = nn.Identity()
    with_buffer.register_buffer("steps", whole)
    integers = nn.Module()
    integers.register_parameter("weight", nn.Parameter(whole, requires_grad=False))
    both = nn.Sequential(integers, nn.Linear(2, 2).double())
    on_meta = nn.Linear(2, 2, device="meta")
    modules = [
        nn.Linear(2, 2), on_meta, with_buffer, integers, both, nn.Sequential(with_buffer, both),
        OURS.Mixed().half(), nn.DataParallel(nn.Linear(2, 2)), nn.Sequential(on_meta, integers),
    ]  # fmt: skip
    for module in modules:
        assert wl.get_parameter_dtype(module) == theirs_utils.get_parameter_dtype(module)
        assert wl.get_parameter_device(module) == theirs_utils.get_parameter_device(module)
    # diffusers' function for the dtype fails on tensors that are plain attributes.
    for tensors, dtype in (((whole, half), half.dtype), ((whole,), whole.dtype), ((), None)):
        assert wl.get_parameter_dtype(Attributes(*tensors)) == dtype
    assert wl.get_parameter_device(Attributes(half)) == half.device
    assert theirs_utils.get_parameter_device(Attributes(half)) == half.device
    for function in (wl.get_parameter_device, theirs_utils.get_parameter_device):
        with pytest.raises(StopIteration):
            function(nn.Identity())


def test_gradient_checkpointing() -> None:
    grads = []
    for library in (OURS, THEIRS):
        model = made(library, "UNet").train()
        model.enable_gradient_checkpointing()
        assert model.is_gradient_checkpointing
        assert all(block.gradient_checkpointing for block in (model.middle, model.down[0]))
        # Like diffusers' blocks.
        x = torch.ones(1, 8, 4, 4, requires_grad=True)
        model._gradient_checkpointing_func = model.middle._gradient_checkpointing_func
        model._gradient_checkpointing_func(model.middle, x).sum().backward()
        grads.append(x.grad)
        model.disable_gradient_checkpointing()
        assert not model.is_gradient_checkpointing
        model.enable_gradient_checkpointing(lambda module, *inputs: (module, inputs))
        assert model.middle._gradient_checkpointing_func(model.middle, x) == (model.middle, (x,))
        with pytest.raises(ValueError, match="Nested does not support gradient checkpointing"):
            library.Nested().enable_gradient_checkpointing()
        library.Nested().disable_gradient_checkpointing()

        class Empty(library.Nested):
            _supports_gradient_checkpointing = True

        with pytest.raises(ValueError, match="Empty does not support gradient checkpointing"):
            Empty().enable_gradient_checkpointing()
    assert_same(*grads)


def test_memory_efficient_attention() -> None:
    for library in (OURS, THEIRS):
        model = library.Whole()
        hearing = [m for m in model.modules() if isinstance(m, Setter)]
        assert len(hearing) == 2
        model.enable_xformers_memory_efficient_attention()
        model.disable_xformers_memory_efficient_attention()
        model.set_use_memory_efficient_attention_xformers(True, print)
        for module in hearing:
            assert module.told == [(True, None), (False, None), (True, print)]


def test_quantized_models_are_not_cast(said: list[str]) -> None:
    for library in (OURS, THEIRS):
        model = library.Nested()
        assert model.half().dtype == torch.float16
        assert model.float().dtype == torch.float32
        assert model.to(torch.float64) is model
        assert model.to(dtype=torch.float32).dtype == torch.float32
        model.is_quantized = True
        for cast in (
            model.half,
            model.float,
            lambda model=model: model.to(torch.float16),
            lambda model=model: model.to("cpu", dtype=torch.float16),
        ):
            with pytest.raises(ValueError, match="quantized"):
                cast()
        assert model.to("cpu") is model
    assert said == []
    OURS.Mixed().to(torch.float16)
    assert "keeps norm, scale in float32" in said[0]


# The load itself.


class Waiting(wl.ModelMixin, wl.ConfigMixin):
    """Its constructor waits until the process has read this many bytes."""

    wait_for: ClassVar[int] = 0

    @wl.register_to_config
    def __init__(self, width: int = 1024, layers: int = 16) -> None:
        super().__init__()
        deadline = time.monotonic() + 20
        while read_bytes() < self.wait_for and time.monotonic() < deadline:
            time.sleep(0.01)
        if read_bytes() < self.wait_for:
            raise TimeoutError("nothing is read while the model is built")
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))


def read_bytes() -> int:
    """The bytes that this process's threads have got from read calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(lines[0].removeprefix("rchar: "))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 MiB."""
    folder = tmp_path_factory.mktemp("large")
    with torch.no_grad():
        model = Waiting()
        for parameter in model.parameters():
            parameter.fill_(1.5)
    model.save_pretrained(folder, max_shard_size="30MB")
    return folder


@pytest.mark.parametrize("how", [{"mode": "read"}, {"device_map": "cpu", "mode": "read"}], ids=str)
def test_reading_begins_before_the_model_is_built(
    how: dict[str, Any], large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Waiting, "wait_for", read_bytes() + (60 << 20))
    loaded = Waiting.from_pretrained(large, **how)
    assert {p.unique().item() for p in loaded.parameters()} == {1.5}
    report = wl.last_report()
    assert report is not None
    assert report.bytes == sum(p.nbytes for p in loaded.parameters())


def test_a_constructor_that_fails_stops_the_reading(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing(Waiting):
        @wl.register_to_config
        def __init__(self, width: int = 1024, layers: int = 16) -> None:
            super().__init__(width, layers)
            raise KeyError("on purpose")

    with pytest.raises(KeyError, match="on purpose"):
        Failing.from_pretrained(large, mode="read")
    gc.collect()
    threads, files, memory = tasks(), open_files(), anonymous_bytes()
    initializers = dict(vars(nn.init))
    for how in ({"mode": "read"}, {"dtype": torch.float16}, {}, {"device_map": "disk"}):
        with pytest.raises(KeyError, match="on purpose"):
            Failing.from_pretrained(large, **how)
        gc.collect()
        assert (tasks(threads), open_files()) == (threads, files)
    assert anonymous_bytes() < memory + (16 << 20)
    assert torch.get_default_dtype() == torch.float32
    assert nn.Linear(2, 2).weight.device.type == "cpu"
    assert dict(vars(nn.init)) == initializers
    monkeypatch.setattr(Waiting, "wait_for", 0)
    assert Waiting.from_pretrained(large).layers[0].weight[0, 0] == 1.5


def test_other_threads_build_modules_meanwhile(folder: Path) -> None:
    building, built = threading.Event(), threading.Event()

    class Slow(wl.ModelMixin, wl.ConfigMixin):
        @wl.register_to_config
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(2, 2)
            building.set()
            assert built.wait(20)

    built.set()
    Slow().save_pretrained(folder)
    building.clear()
    built.clear()
    found: list[torch.Tensor] = []

    def build() -> None:
        assert building.wait(20)
        found.append(nn.init.constant_(nn.Linear(2, 2).weight, 3))
        built.set()

    thread = threading.Thread(target=build)
    thread.start()
    assert Slow.from_pretrained(folder).linear.weight.device.type == "cpu"
    thread.join()
    assert found[0].tolist() == [[3, 3], [3, 3]]


def test_several_threads_load_at_once(folder: Path) -> None:
    models = {name: made(OURS, name) for name in ("UNet", "Transformer", "Recurrent", "Mixed")}
    for name, model in models.items():
        model.save_pretrained(folder / name)
    failures: list[str] = []

    def load(name: str) -> None:
        for dtype in (None, torch.float16, None, torch.bfloat16):
            loaded = getattr(OURS, name).from_pretrained(folder / name, dtype=dtype)
            expected = copy.deepcopy(models[name])
            if dtype is not None and name != "Mixed":
                nn.Module.to(expected, dtype)
            try:
                if dtype is None or name != "Mixed":
                    assert_same_tensors(state(loaded), state(expected))
            except AssertionError as error:
                failures.append(f"{name}: {error}")

    threads = [threading.Thread(target=load, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert torch.get_default_dtype() == torch.float32


MEMORY = """
import gc, sys, threading, time
import safetensors.torch, torch, weightlift as wl
folder, tests = sys.argv[1:]
sys.path.insert(0, tests)
from support import anonymous_bytes

class Model(wl.ModelMixin, wl.ConfigMixin):
    @wl.register_to_config
    def __init__(self, width=2048, layers=12):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))

def share(part, **arguments):
    \"\"\"The most memory at a time while it loads, as a share of the model's.\"\"\"
    gc.collect()
    before, peaks, done = anonymous_bytes(), [0], threading.Event()

    def watch():
        while not done.wait(0.001):
            peaks.append(anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    model = Model.from_pretrained(folder + part, **arguments)
    done.set()
    thread.join()
    return (max(peaks) - before) / sum(p.nbytes for p in model.parameters())

model = Model()
model.save_pretrained(folder + "/whole")
model.layers[3].register_parameter("bias", None)
model.save_pretrained(folder + "/part")
Model(width=2, layers=1).save_pretrained(folder + "/small")
del model
share("/small", dtype=torch.bfloat16)  # what is needed once
print(share("/whole"), share("/whole", dtype=torch.bfloat16), share("/part"))
"""


def test_peak_memory(tmp_path: Path) -> None:
    result = run_python(MEMORY, tmp_path, Path(support.__file__).parent)
    assert result.returncode == 0, result.stderr
    same, cast, missing = map(float, result.stdout.split())
    assert same < 0.05
    assert cast < 1.05
    assert missing < 0.05


def test_the_names_of_the_package() -> None:
    assert issubclass(wl.ModelMixin, nn.Module)
    assert issubclass(wl.ModelMixin, wl.PushToHubMixin)
    assert wl.ModelMixin is model_mixin.ModelMixin
    assert diffusers.ModelMixin not in wl.ModelMixin.__mro__

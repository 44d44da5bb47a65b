"""The diffusers backend: the same models, pipelines and adapters as without it, loaded by the
engine."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import json
import logging
import re
import struct
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import safetensors
import torch
from diffusers import (
    AutoencoderKL,
    ConfigMixin,
    DDIMScheduler,
    DiffusionPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import ip_adapter, lora_base, single_file_model
from diffusers.loaders.single_file_utils import load_single_file_checkpoint
from diffusers.models import ModelMixin, modeling_utils
from diffusers.pipelines import pipeline_utils
from huggingface_hub import export_folder_as_dduf
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, PreTrainedModel

import weightlift as wl
from backend_support import engine_moves, falls_back, tensor_bytes
from hub_server import HubServer, hub, mirror
from support import bits, entry, file_bytes, run_python, sparse_file
from weightlift.backends import diffusers as backend
from weightlift.backends.diffusers import pipelines, prefetch
from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.load import populate as load_populate

__all__ = ["hub", "mirror"]  # fixtures

CALLER = "diffusers"


class Odd(ModelMixin, ConfigMixin):
    """Tied weights, modules kept in float32, buffers of all kinds."""

    _keep_in_fp32_modules = ["norm", "scale"]  # noqa: RUF012
    _no_split_modules = ["LayerNorm"]  # noqa: RUF012
    config_name = "config.json"

    @register_to_config
    def __init__(self, width: int = 8, extra: bool = False) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(16, width)
        self.body = torch.nn.Linear(width, width)
        self.norm = torch.nn.LayerNorm(width)
        self.head = torch.nn.Linear(width, 16, bias=False)
        self.head.weight = self.embed.weight
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.frozen = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
        self.register_buffer("steps", torch.arange(5))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("table", torch.linspace(0, 1, 7))
        self.register_buffer("derived", torch.ones(2), persistent=False)
        if extra:
            self.extra = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.body(self.embed(x).to(self.body.weight.dtype))).float())


UNET = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
}


def unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(**UNET)


def vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)


def dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=4, num_layers=2, sample_size=8, norm_num_groups=4
    )


def save_odd(folder: Path, dtype: torch.dtype) -> None:
    """Written by hand, because diffusers does not save tied weights."""
    torch.manual_seed(1)
    model = Odd()
    model.save_config(folder)
    tensors = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    tensors["head.weight"] = tensors["embed.weight"].clone()
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Such small models wait longer for torch's threads than they compute."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of models, written by diffusers."""
    root = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, model in (("unet", unet()), ("vae", vae()), ("dit", dit())):
            model.save_pretrained(root / name)
            if name != "unet":
                continue
            model.save_pretrained(root / "bin", safe_serialization=False)
            model.save_pretrained(
                root / "bin shards", safe_serialization=False, max_shard_size="100KB"
            )
            model.save_pretrained(root / "shards", max_shard_size="100KB")
            model.save_pretrained(root / "one shard")
            one = root / "one shard"
            (one / "diffusion_pytorch_model.safetensors").rename(one / "x-1.safetensors")
            index = {
                "metadata": {},
                "weight_map": dict.fromkeys(model.state_dict(), "x-1.safetensors"),
            }
            (one / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
            half = model.to(torch.float16)
            half.save_pretrained(root / "variant", variant="fp16")
            half.save_pretrained(root / "variant shards", variant="fp16", max_shard_size="100KB")
    for name, dtype in (("odd", torch.float32), ("odd half", torch.float16)):
        (root / name).mkdir()
        save_odd(root / name, dtype)
    Odd().save_config(root / "bin odd")
    torch.save(Odd().state_dict(), root / "bin odd/diffusion_pytorch_model.bin")
    return root


def torch_bytes(folder: Path) -> int:
    """The bytes of all storages in .bin files."""
    storages = [
        tensor.untyped_storage()
        for path in folder.glob("*.bin")
        for tensor in torch.load(path).values()
    ]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


class Records(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.seen: list[tuple[str, str, list[str]]] = []

    def emit(self, record: logging.LogRecord) -> None:
        # Lists of names come from sets.
        words = sorted(re.findall(r"[^\s,\[\]']+", record.getMessage()))
        self.seen.append((record.levelname, record.name, words))


@contextlib.contextmanager
def no_fallback() -> Iterator[None]:
    before = wl.stats().fallbacks
    yield
    assert wl.stats().fallbacks == before


@contextlib.contextmanager
def records() -> Iterator[list[Any]]:
    """Log messages from WARNING on, and warnings."""
    logging.Logger.warning_once.cache_clear()  # transformers'
    handler = Records()
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "accelerate")]
    for logger in loggers:
        logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            # Of a file that diffusers does not close where disable_mmap=True.
            warnings.simplefilter("ignore", ResourceWarning)
            yield handler.seen
        handler.seen += [(w.category.__name__, "", [str(w.message)]) for w in warned]
    finally:
        for logger in loggers:
            logger.removeHandler(handler)


def look(model: torch.nn.Module) -> dict[str, Any]:
    """Everything in a model that depends on the load."""
    named = [*model.named_parameters(remove_duplicate=False)]
    named += model.named_buffers(remove_duplicate=False)
    config: Any = getattr(model, "config", {})
    config = config.to_dict() if hasattr(config, "to_dict") else config
    return {
        "training": [m.training for m in model.modules()],
        "map": getattr(model, "hf_device_map", None),
        "config": {k: v for k, v in config.items() if k != "_name_or_path"},
        "tensors": {
            name: (
                type(t),
                t.dtype,
                t.shape,
                t.stride(),
                t.device,
                t.requires_grad,
                None if t.is_meta else bits(t),
            )
            for name, t in named
        },
        "tied": [[a is b for _, b in named] for _, a in named],
    }


def outcome(call: Callable[[], Any]) -> Any:
    try:
        result = call()
    except Exception as error:
        # The error's type, and its text up to parts that differ between calls.
        return type(error), str(error)
    if isinstance(result, tuple):
        model, info = result
        return look(model), {key: sorted(map(str, values)) for key, values in info.items()}
    return look(result)


def assert_same_outcome(call: Callable[[], Any], moved: int, stock: bool = False) -> Any:
    """The same with and without the backend, which moves this many bytes or leaves the load to the
    library."""
    with records() as expected_said:
        expected = outcome(call)
    way = engine_moves(moved, CALLER) if moved and not stock else falls_back(CALLER, int(stock))
    with wl.enabled(CALLER), records() as said, way:
        ours = outcome(call)
    assert ours == expected
    assert said == expected_said
    return ours


CASES: list[tuple[type, str, dict[str, Any]]] = [
    (UNet2DConditionModel, "unet", {}),
    (UNet2DConditionModel, "unet", {"torch_dtype": torch.bfloat16}),
    (UNet2DConditionModel, "unet", {"dtype": torch.float8_e4m3fn}),
    (UNet2DConditionModel, "unet", {"dtype": "float16"}),
    (UNet2DConditionModel, "unet", {"dtype": torch.float64}),
    (UNet2DConditionModel, "unet", {"device_map": "cpu"}),
    (UNet2DConditionModel, "unet", {"device_map": torch.device("cpu"), "dtype": torch.float16}),
    (UNet2DConditionModel, "unet", {"device_map": "auto"}),
    (UNet2DConditionModel, "unet", {"device_map": {"": "cpu", "no_such": "cpu"}}),
    (UNet2DConditionModel, "unet", {"low_cpu_mem_usage": False}),
    (UNet2DConditionModel, "unet", {"low_cpu_mem_usage": False, "dtype": torch.float16}),
    (UNet2DConditionModel, "unet", {"disable_mmap": True}),
    (UNet2DConditionModel, "unet", {"use_safetensors": True}),
    (UNet2DConditionModel, "shards", {}),
    (UNet2DConditionModel, "shards", {"dtype": torch.float16, "disable_mmap": True}),
    (UNet2DConditionModel, "shards", {"low_cpu_mem_usage": False}),
    (UNet2DConditionModel, "one shard", {}),
    (UNet2DConditionModel, "one shard", {"low_cpu_mem_usage": False}),
    (UNet2DConditionModel, "bin", {}),
    (UNet2DConditionModel, "bin", {"dtype": torch.float16}),
    (UNet2DConditionModel, "bin", {"disable_mmap": True}),
    (UNet2DConditionModel, "bin", {"low_cpu_mem_usage": False}),
    (UNet2DConditionModel, "bin shards", {"use_safetensors": False}),
    (Odd, "bin odd", {}),
    (Odd, "bin odd", {"dtype": torch.bfloat16}),
    (UNet2DConditionModel, "variant", {"variant": "fp16"}),
    (UNet2DConditionModel, "variant", {"variant": "fp16", "dtype": torch.float16}),
    (UNet2DConditionModel, "variant shards", {"variant": "fp16", "dtype": torch.float16}),
    (AutoencoderKL, "vae", {"dtype": torch.bfloat16}),
    (DiTTransformer2DModel, "dit", {}),
    (DiTTransformer2DModel, "dit", {"dtype": torch.float16}),
    (Odd, "odd", {}),
    (Odd, "odd", {"dtype": torch.float16}),
    (Odd, "odd", {"dtype": torch.float32}),
    (Odd, "odd half", {}),
    (Odd, "odd half", {"dtype": torch.bfloat16}),
    (Odd, "odd half", {"dtype": torch.float16}),
    (Odd, "odd half", {"dtype": torch.float16, "device_map": "sequential"}),
]


@pytest.mark.parametrize(
    ("cls", "folder", "options"), CASES, ids=[f"{folder}-{options}" for _, folder, options in CASES]
)
def test_the_same_model(cls: Any, folder: str, options: dict[str, Any], saved: Path) -> None:
    path = saved / folder
    found = assert_same_outcome(
        lambda: cls.from_pretrained(path, output_loading_info=True, **options),
        torch_bytes(path) if folder.startswith("bin") else tensor_bytes(path),
    )
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    assert found[1] == {kind: [] for kind in kinds}


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
@pytest.mark.parametrize("ignore", [True, False])
def test_keys_that_do_not_fit(
    tmp_path: Path, shards: bool, low_cpu_mem_usage: bool, ignore: bool
) -> None:
    """Missing, unexpected and mismatched: the same info, warnings, or error, and then no bytes."""
    model = vae()
    model.save_pretrained(tmp_path, max_shard_size="20KB" if shards else "10GB")
    torch.manual_seed(3)
    for path in tmp_path.glob("*.safetensors"):
        tensors = load_file(path)
        renamed = {f"unknown.{n}" if ".conv2." in n else n: t for n, t in tensors.items()}
        for name in renamed:
            if name.endswith("conv1.bias"):
                renamed[name] = torch.zeros(3)
        save_file(renamed, path)
    for path in tmp_path.glob("*.index.json"):
        path.write_text(re.sub(r'"([\w.]+\.conv2\.\w+)"', r'"unknown.\1"', path.read_text()))

    def call() -> Any:
        return AutoencoderKL.from_pretrained(
            tmp_path,
            output_loading_info=True,
            low_cpu_mem_usage=low_cpu_mem_usage,
            ignore_mismatched_sizes=ignore,
        )

    torch.manual_seed(0)
    with records() as stock_said:
        stock = outcome(call)
    moved = wl.stats().bytes
    with wl.enabled(CALLER), records() as said:
        ours = outcome(call)
    assert said == stock_said
    if not low_cpu_mem_usage and ignore:
        # Missing tensors are uninitialised memory.
        assert ours[1] == stock[1]
    else:
        assert ours == stock
    if ignore:
        assert ours[1]["missing_keys"]
        assert ours[1]["unexpected_keys"]
        assert ours[1]["mismatched_keys"]
    elif low_cpu_mem_usage:
        assert ours[0] is ValueError
        assert wl.stats().bytes == moved


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-5],
        lambda data: b"<!DOCTYPE html><html></html>",
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        lambda data: b"",
    ],
    ids=["cut", "html", "lfs", "empty"],
)
@pytest.mark.parametrize("folder", ["vae", "shards"])
def test_a_broken_file(saved: Path, tmp_path: Path, folder: str, damage: Any) -> None:
    for file in (saved / folder).iterdir():
        data = file.read_bytes()
        if file.suffix == ".safetensors":
            data = damage(data)
        (tmp_path / file.name).write_bytes(data)
    cls = AutoencoderKL if folder == "vae" else UNet2DConditionModel
    kind, _ = assert_same_outcome(lambda: cls.from_pretrained(tmp_path), 0)
    assert issubclass(kind, OSError)


# --- Calls that diffusers refuses, ignores, or leaves without weights ----------------------------


SAMPLE = (torch.ones(1, 4, 8, 8), 1, torch.ones(1, 3, 16))


@pytest.mark.parametrize(
    "options",
    [
        {"device_map": {"": "disk"}},
        {"device_map": {"": "cpu", "down_blocks": "disk", "conv_out": "disk"}},
        {"device_map": "auto", "max_memory": {"cpu": "90KB"}},
    ],
    ids=["all", "some", "auto"],
)
@pytest.mark.parametrize("folder", ["unet", "shards", "bin"])
def test_disk_needs_no_folder(saved: Path, folder: str, options: dict[str, Any]) -> None:
    plain = UNet2DConditionModel.from_pretrained(saved / folder)
    before = sorted((saved / folder).iterdir())
    with pytest.raises(ValueError, match="offload_folder"):
        UNet2DConditionModel.from_pretrained(saved / folder, **options)
    with wl.enabled(CALLER):
        model = UNet2DConditionModel.from_pretrained(saved / folder, **options)
        assert "disk" in model.hf_device_map.values()
        moved = wl.stats()
        with torch.no_grad():
            assert torch.equal(model(*SAMPLE).sample, plain(*SAMPLE).sample)
    by_hooks = f"{CALLER}, disk weights"
    before_pass = moved.by_caller.get(by_hooks, wl.Stats())
    assert wl.stats().by_caller[by_hooks].bytes > before_pass.bytes
    assert wl.stats().bytes - moved.bytes < tensor_bytes(saved / "unet") * 2
    assert {p.device.type for p in model.parameters()} <= {"meta", "cpu"}
    assert sorted((saved / folder).iterdir()) == before


def test_the_same_with_hooks_as_with_a_folder(saved: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "device_map": {
            n: "disk" if n == "up_blocks" else "cpu" for n, _ in unet().named_children()
        },
        "offload_folder": tmp_path,
        "dtype": torch.bfloat16,
    }
    with records() as stock_said:
        stock = UNet2DConditionModel.from_pretrained(saved / "unet", **options)
    with wl.enabled(CALLER), records() as said:
        ours = UNet2DConditionModel.from_pretrained(saved / "unet", **options)
    assert said == stock_said
    assert look(ours) == look(stock)
    sample = [x.bfloat16() if isinstance(x, torch.Tensor) else x for x in SAMPLE]
    with torch.no_grad():
        assert torch.equal(ours(*sample).sample, stock(*sample).sample)


def test_gpus_in_max_memory_by_text(saved: Path) -> None:
    def load(gpu: Any) -> Any:
        return lambda: UNet2DConditionModel.from_pretrained(
            saved / "unet", device_map="auto", max_memory={gpu: 10_000_000, "cpu": "1GB"}
        )

    with records() as stock_said:
        stock = outcome(load(0))
    for text in ("0", "cuda:0"):
        with wl.enabled(CALLER), records() as said:
            assert outcome(load(text)) == stock
        assert said == stock_said


@pytest.mark.parametrize("folder", ["unet", "shards"])
def test_offload_state_dict_leaves_nothing_out(saved: Path, folder: str) -> None:
    plain = look(UNet2DConditionModel.from_pretrained(saved / folder))
    with wl.enabled(CALLER), engine_moves(tensor_bytes(saved / folder), CALLER):
        model = UNet2DConditionModel.from_pretrained(saved / folder, offload_state_dict=True)
    assert look(model) == plain


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
@pytest.mark.parametrize("token", [None, "hf_stored"])
def test_a_mirror(
    saved: Path, hub: HubServer, mirror: HubServer, tmp_path: Path, token: str | None
) -> None:
    for folder in ("unet", "shards"):
        files = {path.name: path.read_bytes() for path in (saved / folder).iterdir()}
        mirror.add(f"user/{folder}", files)
        with wl.enabled(CALLER), engine_moves(tensor_bytes(saved / folder), CALLER):
            model = UNet2DConditionModel.from_pretrained(
                f"user/{folder}", mirror=mirror.url, cache_dir=tmp_path, token=token
            )
        assert look(model) == look(UNet2DConditionModel.from_pretrained(saved / folder))
        assert model.config._name_or_path == f"user/{folder}"
    assert not hub.requests
    assert {request.token for request in mirror.requests} == {token}


# --- A single file -------------------------------------------------------------------------------


def of_ldm(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """A VAE's tensor as in checkpoints of Stable Diffusion, whose attention used convolutions."""
    for new, old in (
        ("conv_norm_out", "norm_out"),
        ("down_blocks.0.resnets", "down.0.block"),
        ("up_blocks.0.resnets", "up.0.block"),
        ("mid_block.resnets.0", "mid.block_1"),
        ("mid_block.resnets.1", "mid.block_2"),
    ):
        name = name.replace(new, old)
    if ".attentions.0." in name:
        for new, old in (
            ("mid_block.attentions.0", "mid.attn_1"),
            ("group_norm", "norm"),
            ("to_out.0", "proj_out"),
            ("to_", ""),
        ):
            name = name.replace(new, old)
        if tensor.dim() == 2:
            tensor = tensor[:, :, None, None]
    return f"first_stage_model.{name}", tensor


@pytest.fixture(scope="module")
def single_file(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in Stable Diffusion's form: a VAE and other tensors."""
    path = tmp_path_factory.mktemp("single") / "v1.safetensors"
    tensors = load_file(saved / "vae/diffusion_pytorch_model.safetensors")
    checkpoint = dict(of_ldm(*item) for item in tensors.items())
    checkpoint["model.diffusion_model.out.0.weight"] = torch.ones(1000)
    checkpoint = {name: tensor.clone() for name, tensor in checkpoint.items()}
    save_file(checkpoint, path)
    torch.save({"state_dict": checkpoint, "global_step": 3}, path.with_suffix(".ckpt"))
    torch.save(checkpoint, path.with_suffix(".pt"))
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dtype": torch.float16},
        {"device": "cpu", "dtype": torch.bfloat16},
        {"low_cpu_mem_usage": False},
        {"disable_mmap": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt", ".pt"])
def test_from_single_file(
    saved: Path, single_file: Path, suffix: str, options: dict[str, Any]
) -> None:
    """Renamed tensors come from the file; attention weights that diffusers converts do not."""
    tensors = load_file(saved / "vae/diffusion_pytorch_model.safetensors")
    made = {name for name, t in tensors.items() if ".attentions.0.to_" in name and t.dim() == 2}
    moved = sum(t.nbytes for name, t in tensors.items() if name not in made)
    whole = options in ({"low_cpu_mem_usage": False}, {"disable_mmap": True})
    path = single_file.with_suffix(suffix)
    assert_same_outcome(
        lambda: AutoencoderKL.from_single_file(path, config=str(saved / "vae"), **options),
        tensor_bytes(single_file) if whole else moved,
        # The file holds more than tensors.
        stock=whole and suffix == ".ckpt",
    )


def test_a_single_file_of_diffusers_names(saved: Path) -> None:
    path = saved / "unet/diffusion_pytorch_model.safetensors"
    assert_same_outcome(
        lambda: UNet2DConditionModel.from_single_file(
            path, config=str(saved / "unet"), dtype=torch.bfloat16
        ),
        tensor_bytes(path),
    )


def test_a_single_file_of_odd_offsets(saved: Path, single_file: Path, tmp_path: Path) -> None:
    """Also with packed 4-bit tensors, which the model does not use."""
    data = single_file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    end = len(data) - 8 - length
    header["fours"] = {"dtype": "F4", "shape": [2, 6], "data_offsets": [end, end + 6]}
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % 4 + 1)
    path = tmp_path / "odd.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :] + bytes(6))
    tensors = load_file(saved / "vae/diffusion_pytorch_model.safetensors")
    made = {name for name, t in tensors.items() if ".attentions.0.to_" in name and t.dim() == 2}
    assert_same_outcome(
        lambda: AutoencoderKL.from_single_file(path, config=str(saved / "vae")),
        sum(t.nbytes for name, t in tensors.items() if name not in made),
    )


def test_a_broken_single_file(single_file: Path, saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(single_file.read_bytes()[:-9])
    kind, _ = assert_same_outcome(
        lambda: AutoencoderKL.from_single_file(path, config=str(saved / "vae")), 0
    )
    assert issubclass(kind, (OSError, safetensors.SafetensorError))


def test_a_single_file_that_cannot_be_indexed(
    single_file: Path, saved: Path, tmp_path: Path
) -> None:
    """Then diffusers loads the tensors, and a message says so."""
    tensors = torch.load(single_file.with_suffix(".pt"), weights_only=True)
    path = tmp_path / "odd.pt"
    torch.save({**tensors, "conjugated": torch.ones(2, dtype=torch.complex64).conj()}, path)

    def load() -> Any:
        return look(AutoencoderKL.from_single_file(path, config=str(saved / "vae")))

    expected = load()
    told = pytest.warns(UserWarning, match=r"odd\.pt.*conjugated")
    with wl.enabled(CALLER), falls_back(CALLER), told:
        assert load() == expected


def test_a_tensor_that_diffusers_changes_in_place(
    saved: Path, single_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That tensor of the file is not the one that the model needs."""
    mapping = single_file_model.SINGLE_FILE_LOADABLE_CLASSES["AutoencoderKL"]
    convert = mapping["checkpoint_mapping_fn"]

    def change(checkpoint: Any, **options: Any) -> Any:
        checkpoint["first_stage_model.encoder.conv_in.bias"].add_(1)
        return convert(checkpoint=checkpoint, **options)

    monkeypatch.setitem(mapping, "checkpoint_mapping_fn", functools.wraps(convert)(change))
    tensors = load_file(saved / "vae/diffusion_pytorch_model.safetensors")
    made = {n for n, t in tensors.items() if ".attentions.0.to_" in n and t.dim() == 2}
    made.add("encoder.conv_in.bias")
    model = assert_same_outcome(
        lambda: AutoencoderKL.from_single_file(single_file, config=str(saved / "vae")),
        sum(t.nbytes for n, t in tensors.items() if n not in made),
    )
    changed = model["tensors"]["encoder.conv_in.bias"][-1]
    assert changed == bits(tensors["encoder.conv_in.bias"] + 1)


def test_tensors_of_the_caller_are_taken_as_they_are(saved: Path, single_file: Path) -> None:
    """Also those of a file that has changed since."""
    load = functools.partial(AutoencoderKL.from_single_file, config=str(saved / "vae"))
    with wl.enabled(CALLER):
        tensors = load_single_file_checkpoint(single_file)
        for tensor in tensors.values():
            tensor.numpy()[...] = 3
        with falls_back(CALLER, 0):
            model = load(tensors)
    assert all(bool((p == 3).all()) for p in model.parameters())


# --- Pipelines -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three models, a tokenizer and a scheduler."""
    root = tmp_path_factory.mktemp("pipelines")
    letters = ["<|startoftext|>", "<|endoftext|>", "a", "b</w>", "ab</w>"]
    (root / "vocab.json").write_text(json.dumps({text: n for n, text in enumerate(letters)}))
    (root / "merges.txt").write_text("#version: 0.2\na b</w>\n")
    torch.manual_seed(5)
    config = CLIPTextConfig(
        vocab_size=5,
        hidden_size=16,
        intermediate_size=20,
        num_attention_heads=2,
        num_hidden_layers=2,
        max_position_embeddings=8,
    )
    with warnings.catch_warnings():
        # transformers before 5.3 calls tokenizers in a way that no longer exists.
        warnings.filterwarnings("ignore", "Deprecated in 0.9.0", DeprecationWarning)
        tokenizer = CLIPTokenizer(
            str(root / "vocab.json"), str(root / "merges.txt"), model_max_length=8
        )
    made = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(config),
        tokenizer=tokenizer,
        unet=unet(),
        scheduler=DDIMScheduler(num_train_timesteps=10, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.save_pretrained(root / "plain")
    made.save_pretrained(root / "variant", variant="fp16")
    export_folder_as_dduf(root / "all.dduf", root / "plain")
    return root


def look_at_pipeline(made: Any) -> Any:
    return {
        "config": {k: v for k, v in made.config.items() if k != "_name_or_path"},
        "map": made.hf_device_map,
        **{
            name: look(part) if isinstance(part, torch.nn.Module) else type(part)
            for name, part in made.components.items()
        },
    }


def compute(made: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    made.set_progress_bar_config(disable=True)
    result = made(
        "ab", num_inference_steps=2, generator=generator, output_type="pt", height=16, width=16
    )
    return result.images


def assert_same_pipeline(source: Path, call: Callable[[], Any]) -> Any:
    """The engine moves the bytes of diffusers' models; transformers has its own backend."""
    with records() as stock_said:
        stock = look_at_pipeline(call())
    moved = tensor_bytes(source / "unet", source / "vae")
    with wl.enabled(CALLER), records() as said, engine_moves(moved, CALLER):
        ours = call()
    assert look_at_pipeline(ours) == stock
    assert said == stock_said
    return ours


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"torch_dtype": torch.float16},
        {"dtype": {"unet": torch.bfloat16, "default": torch.float16}},
        {"device_map": "cpu"},
        {"device_map": "balanced", "max_memory": {"cpu": "1GB"}},
        {"use_safetensors": True, "disable_mmap": True},
    ],
    ids=str,
)
def test_a_pipeline(pipeline: Path, options: dict[str, Any]) -> None:
    assert_same_pipeline(
        pipeline / "plain",
        lambda: DiffusionPipeline.from_pretrained(pipeline / "plain", **options),
    )


def test_variants_of_a_pipeline(pipeline: Path) -> None:
    source = pipeline / "variant"
    assert_same_pipeline(
        source, lambda: StableDiffusionPipeline.from_pretrained(source, variant="fp16")
    )


def test_a_given_component_is_kept(pipeline: Path) -> None:
    given = vae()
    source = pipeline / "plain"
    with wl.enabled(CALLER), engine_moves(tensor_bytes(source / "unet"), CALLER):
        made = DiffusionPipeline.from_pretrained(source, vae=given, text_encoder=None)
    assert made.vae is given
    assert made.text_encoder is None


def test_components_are_read_ahead(pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files that will be loaded, in this order, before they are loaded."""
    source = pipeline / "plain"
    read: list[tuple[str, int | None, int]] = []
    ended = threading.Event()
    read_ahead, populate = pipelines.prefetch, prefetch.populate

    def look_on(component: Checkpoint, over: threading.Event) -> bool:
        done = populate(component, over)
        (path,), (size,) = component.paths, component.file_sizes
        read.append((Path(path).parent.name, component.resident_bytes(), size))
        return done

    def run(*arguments: Any) -> None:
        read_ahead(*arguments)
        ended.set()

    monkeypatch.setattr(prefetch, "populate", look_on)
    monkeypatch.setattr(pipelines, "prefetch", run)
    load_sub_model = pipeline_utils.load_sub_model

    def wait(**given: Any) -> Any:
        assert ended.wait(20)
        return load_sub_model(**given)

    monkeypatch.setattr(pipeline_utils, "load_sub_model", wait)
    with wl.enabled(CALLER), engine_moves(tensor_bytes(source / "unet"), CALLER):
        DiffusionPipeline.from_pretrained(source, vae=vae())
    assert [name for name, _, _ in read] == ["text_encoder", "unet"]
    assert all(resident in (None, size) for _, resident, size in read)


@pytest.fixture
def sparse(tmp_path: Path) -> Checkpoint:
    size = 1 << 33
    header = {"w": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}
    sparse_file(tmp_path / "model.safetensors", header, size)
    return Checkpoint.from_file(tmp_path / "model.safetensors")


def test_reading_ahead_ends_with_the_load(
    sparse: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_populate, "_POLL_SECONDS", 0.001)
    ended = threading.Event()
    ended.set()
    prefetch.populate(sparse, ended)
    resident = sparse.resident_bytes()
    assert resident is None or resident < sparse.file_sizes[0] // 2
    # Later components are not begun.
    populate = mock.Mock(return_value=True)
    monkeypatch.setattr(prefetch, "populate", populate)
    prefetch.prefetch([(Path(sparse.paths[0]).parent, None)], None, ended)
    populate.assert_not_called()


def test_what_cannot_be_read_ahead_is_left_to_who_loads_it(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = pipeline / "plain"
    error = wl.ReadError(5, "the disk has gone", "somewhere")
    start = mock.Mock(side_effect=error)
    monkeypatch.setattr(load_populate, "start_plan", start)
    prefetch.prefetch([(source / n, None) for n in ("vae", "unet")], None, threading.Event())
    assert start.call_count == 1  # the next one would fail too
    assert_same_pipeline(source, lambda: DiffusionPipeline.from_pretrained(source))


def test_what_memory_has_no_room_for_is_not_read_ahead(
    pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [(pipeline / "plain" / name, None) for name in ("vae", "unet")]
    size = sum(path.stat().st_size for folder, _ in jobs for path in folder.glob("*.safetensors"))
    read: list[int] = []
    monkeypatch.setattr(
        prefetch, "populate", lambda component, ended: not read.append(len(component.paths))
    )
    for headroom, count in ((2 * size - 2, 0), (2 * size, 2)):
        monkeypatch.setattr(prefetch, "memory_headroom", lambda headroom=headroom: headroom)
        prefetch.prefetch(jobs, None, threading.Event())
        assert len(read) == count


def dispatches_disk(does: bool) -> pytest.MarkDecorator:
    source = inspect.getsource(PreTrainedModel.from_pretrained)
    return pytest.mark.skipif(
        ('"disk" in set(device_map.values())' in source) != does,
        reason="whether transformers leaves hooks on a model that is all on the disk",
    )


@pytest.mark.parametrize(
    "device_map",
    [
        {"unet": "disk", "vae": "cpu"},
        {"": "cpu", "unet.down_blocks": "disk", "unet": "cpu"},
        pytest.param({"text_encoder": "disk", "unet": "disk"}, marks=dispatches_disk(True)),
        {"unet": {"": "cpu", "conv_in": "disk"}},
        {"unet": "auto", "vae": "sequential"},
    ],
    ids=str,
)
def test_a_device_map_by_component(pipeline: Path, device_map: dict[str, Any]) -> None:
    source = pipeline / "plain"
    expected = compute(DiffusionPipeline.from_pretrained(source))
    with pytest.raises(ValueError, match="must be a string"):
        DiffusionPipeline.from_pretrained(source, device_map=device_map)
    with wl.enabled(CALLER), no_fallback():
        made = DiffusionPipeline.from_pretrained(source, device_map=device_map)
        assert torch.equal(compute(made), expected)
    assert made.hf_device_map == device_map
    on_disk = "disk" in str(device_map["unet"]) or "unet.down_blocks" in device_map
    assert ("meta" in {p.device.type for p in made.unet.parameters()}) == on_disk


@dispatches_disk(False)
def test_a_text_encoder_on_the_disk_with_an_old_transformers(pipeline: Path) -> None:
    refused = pytest.raises(ValueError, match=r"transformers 5.* CLIPTextModel .* 'cpu'")
    with wl.enabled(CALLER), refused:
        DiffusionPipeline.from_pretrained(pipeline / "plain", device_map={"text_encoder": "disk"})


def test_a_device_map_of_an_unknown_component(pipeline: Path) -> None:
    with wl.enabled(CALLER), pytest.raises(ValueError, match=r"'unett'; it has .*unet, vae"):
        DiffusionPipeline.from_pretrained(pipeline / "plain", device_map={"unett": "cpu"})


def test_gpus_of_a_pipeline_by_text(pipeline: Path) -> None:
    def load(gpu: Any) -> Any:
        return look_at_pipeline(
            DiffusionPipeline.from_pretrained(
                pipeline / "plain", device_map="balanced", max_memory={gpu: 10, "cpu": "1GB"}
            )
        )

    with records() as stock_said, pytest.raises(RuntimeError) as stock:
        load(0)
    with wl.enabled(CALLER), records() as said, pytest.raises(RuntimeError) as ours:
        load("0")
    assert str(ours.value) == str(stock.value)
    assert said == stock_said


@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument:UserWarning")
def test_a_pipeline_of_a_mirror(
    pipeline: Path, hub: HubServer, mirror: HubServer, tmp_path: Path
) -> None:
    source = pipeline / "plain"
    paths = [path for path in source.rglob("*") if path.is_file()]
    mirror.add("user/sd", {str(path.relative_to(source)): path.read_bytes() for path in paths})
    with wl.enabled(CALLER):
        made = DiffusionPipeline.from_pretrained("user/sd", mirror=mirror.url, cache_dir=tmp_path)
    assert look_at_pipeline(made) == look_at_pipeline(DiffusionPipeline.from_pretrained(source))
    assert not hub.requests
    assert {request.token for request in mirror.requests} == {None}


def test_a_pipeline_of_the_hub(
    pipeline: Path, hub: HubServer, mirror: HubServer, tmp_path: Path
) -> None:
    source = pipeline / "plain"
    paths = [path for path in source.rglob("*") if path.is_file()]
    hub.add("user/sd", {str(path.relative_to(source)): path.read_bytes() for path in paths})
    moved = tensor_bytes(source / "unet", source / "vae")  # transformers loads the other one
    with wl.enabled(CALLER), engine_moves(moved, CALLER):
        made = DiffusionPipeline.from_pretrained("user/sd", cache_dir=tmp_path)
    assert look_at_pipeline(made) == look_at_pipeline(DiffusionPipeline.from_pretrained(source))
    assert not mirror.requests


@pytest.mark.parametrize("options", [{}, {"dtype": torch.float16}], ids=str)
@pytest.mark.parametrize("whole_path", [False, True])
def test_a_dduf_file(pipeline: Path, whole_path: bool, options: dict[str, Any]) -> None:
    plain = DiffusionPipeline.from_pretrained(pipeline / "plain", **options)
    name = pipeline / "all.dduf" if whole_path else "all.dduf"
    with wl.enabled(CALLER), engine_moves(tensor_bytes(pipeline / "plain"), CALLER):
        made = DiffusionPipeline.from_pretrained(pipeline, dduf_file=name, **options)
    assert look_at_pipeline(made) == look_at_pipeline(plain)
    assert made.config._name_or_path == pipeline
    if not options:
        assert torch.equal(compute(made), compute(plain))


def test_a_dduf_file_of_the_hub(pipeline: Path, hub: HubServer, tmp_path: Path) -> None:
    hub.add("user/dduf", {"all.dduf": (pipeline / "all.dduf").read_bytes()})
    with wl.enabled(CALLER):
        made = DiffusionPipeline.from_pretrained(
            "user/dduf", dduf_file="all.dduf", cache_dir=tmp_path
        )
    plain = DiffusionPipeline.from_pretrained(pipeline / "plain")
    assert look_at_pipeline(made) == look_at_pipeline(plain)


def test_a_pipeline_of_a_single_file(saved: Path, pipeline: Path, tmp_path: Path) -> None:
    source = pipeline / "plain"
    vae_tensors = load_file(source / "vae/diffusion_pytorch_model.safetensors")
    checkpoint = dict(of_ldm(*item) for item in vae_tensors.items())
    for name, tensor in load_file(source / "text_encoder/model.safetensors").items():
        name = name.removeprefix("text_model.")
        checkpoint[f"cond_stage_model.transformer.text_model.{name}"] = tensor
    save_file({n: t.clone() for n, t in checkpoint.items()}, tmp_path / "sd.safetensors")
    made = [n for n in vae_tensors if ".attentions.0.to_" in n and n.endswith("weight")]
    moved = tensor_bytes(tmp_path) - sum(vae_tensors[name].nbytes for name in made)
    given = unet()

    def load() -> Any:
        return StableDiffusionPipeline.from_single_file(
            tmp_path / "sd.safetensors", config=str(source), unet=given, dtype=torch.float16
        )

    with records() as stock_said:
        stock = look_at_pipeline(load())
    with wl.enabled(CALLER), records() as said, engine_moves(moved, CALLER):
        ours = look_at_pipeline(load())
    assert ours == stock
    assert said == stock_said


# --- Adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_lora(pipeline: Path, tmp_path: Path, safe: bool) -> None:
    torch.manual_seed(7)
    trained = unet()
    trained.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_k"]))
    layers = get_peft_model_state_dict(trained)
    StableDiffusionPipeline.save_lora_weights(tmp_path, layers, safe_serialization=safe)

    def load() -> Any:
        made = DiffusionPipeline.from_pretrained(pipeline / "plain", vae=None, text_encoder=None)
        before = wl.stats()
        made.load_lora_weights(tmp_path)
        after = wl.stats()
        moved = after.bytes - before.bytes, after.fallbacks - before.fallbacks
        return look(made.unet), made.get_active_adapters(), moved

    with records() as stock_said:
        stock = load()
    with wl.enabled(CALLER), records() as said:
        ours = load()
    assert ours[:2] == stock[:2]
    assert said == stock_said
    assert ours[2] == (sum(t.nbytes for t in layers.values()), 0)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "nested"])
def test_textual_inversion(pipeline: Path, tmp_path: Path, kind: str) -> None:
    embedding = torch.arange(32.0).reshape(2, 16)
    if kind == "safetensors":
        save_file({"<cat>": embedding}, tmp_path / "learned_embeds.safetensors")
    elif kind == "bin":
        torch.save({"<cat>": embedding}, tmp_path / "learned_embeds.bin")
    else:
        other = {"string_to_param": {"*": embedding}, "name": "<cat>"}
        torch.save(other, tmp_path / "learned_embeds.bin")

    def load() -> Any:
        made = DiffusionPipeline.from_pretrained(pipeline / "plain", vae=None, unet=None)
        made.load_textual_inversion(tmp_path)
        return look(made.text_encoder), sorted(made.tokenizer.get_vocab())

    with records() as stock_said:
        stock = load()
    # If a file has more than tensors, torch must make the rest.
    way = falls_back(CALLER) if kind == "nested" else engine_moves(embedding.nbytes, CALLER)
    with wl.enabled(CALLER), records() as said, way:
        ours = load()
    assert ours == stock
    assert said == stock_said


def test_the_name_of_a_module(saved: Path) -> None:
    """diffusers uses all of these names, through the replaced one."""
    with wl.enabled(CALLER):
        ours: Any = lora_base.safetensors
        assert ours.SafetensorError is safetensors.SafetensorError
        assert ours.torch.save_file is save_file
        with ours.torch.safe_open(
            saved / "vae/diffusion_pytorch_model.safetensors", "pt"
        ) as opened:
            assert "encoder.conv_in.weight" in opened.keys()  # noqa: SIM118
    assert lora_base.safetensors is safetensors


def test_an_open_file(saved: Path) -> None:
    """The way in which IP adapters are read."""
    path = saved / "vae/diffusion_pytorch_model.safetensors"
    expected = load_file(path)["encoder.conv_in.weight"]
    with (
        wl.enabled(CALLER),
        engine_moves(expected.nbytes, CALLER),
        ip_adapter.safe_open(path, framework="pt", device="cpu") as opened,
    ):
        assert torch.equal(opened.get_tensor("encoder.conv_in.weight"), expected)


# --- What falls back ---------------------------------------------------------------------


def test_quantizers_fall_back(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.quantizers.base import DiffusersQuantizer
    from diffusers.quantizers.quantization_config import QuantizationMethod

    class Quantizer(DiffusersQuantizer):
        asked: list[str] = []  # noqa: RUF012
        is_serializable = is_trainable = False

        def check_if_quantized_param(
            self, model: Any, param_value: Any, param_name: str, state_dict: Any, **_: Any
        ) -> bool:
            self.asked.append(param_name)
            assert isinstance(param_value, torch.Tensor)
            return False

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            pass

        def _process_model_after_weight_loading(self, model: Any, **_: Any) -> None:
            pass

    monkeypatch.setattr(
        modeling_utils.DiffusersAutoQuantizer,
        "from_config",
        classmethod(lambda cls, config, **_: Quantizer(config)),
    )
    config = types.SimpleNamespace(quant_method=QuantizationMethod.TORCHAO, to_dict=dict)
    plain = look(UNet2DConditionModel.from_pretrained(saved / "unet"))["tensors"]
    for folder in ("unet", "shards"):
        Quantizer.asked.clear()
        with wl.enabled(CALLER), falls_back(CALLER):
            model = UNet2DConditionModel.from_pretrained(saved / folder, quantization_config=config)
        assert look(model)["tensors"] == plain
        assert sorted(Quantizer.asked) == sorted(plain)
    Quantizer.asked.clear()
    file = saved / "unet/diffusion_pytorch_model.safetensors"
    with wl.enabled(CALLER), falls_back(CALLER):
        model = UNet2DConditionModel.from_single_file(
            file, config=str(saved / "unet"), quantization_config=config
        )
    assert look(model)["tensors"] == plain
    assert sorted(Quantizer.asked) == sorted(plain)


def test_shards_with_the_same_tensor(saved: Path, tmp_path: Path) -> None:
    for file in (saved / "shards").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    first, *_, last = sorted(tmp_path.glob("*.safetensors"))
    name, tensor = next(iter(load_file(first).items()))
    save_file({**load_file(last), name: tensor + 1}, last, {"format": "pt"})
    model = assert_same_outcome(
        lambda: UNet2DConditionModel.from_pretrained(tmp_path), tensor_bytes(tmp_path)
    )
    assert model["tensors"][name][-1] == bits(tensor + 1)


def test_a_dtype_that_torch_lacks(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((saved / "vae/config.json").read_bytes())
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    path.write_bytes(file_bytes({"w": entry("F6_E2M3", [8])}))
    kind, _ = assert_same_outcome(lambda: AutoencoderKL.from_pretrained(tmp_path), 0)
    assert issubclass(kind, Exception)


def test_a_dduf_file_is_not_quantized(pipeline: Path) -> None:
    with wl.enabled(CALLER), pytest.raises(wl.ArgumentError, match="cannot be combined"):
        DiffusionPipeline.from_pretrained(
            pipeline, dduf_file="all.dduf", quantization_config=object()
        )


@pytest.mark.parametrize("folder", ["vae", "shards"])
def test_a_file_that_only_the_reference_takes(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    """A file with duplicate names: the library's way with a warning, or an error."""
    for file in (saved / folder).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    path = max(tmp_path.glob("*.safetensors"))
    save_file(load_file(path), path)  # without metadata
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].rstrip()
    twice = header[:-1] + b", " + header[1:]
    path.write_bytes(len(twice).to_bytes(8, "little") + twice + data[8 + length :])
    cls = AutoencoderKL if folder == "vae" else UNet2DConditionModel
    expected = look(cls.from_pretrained(tmp_path))
    before = wl.stats()
    told = pytest.warns(UserWarning, match=f"own loading: {path}.*twice")
    with wl.enabled(CALLER), told as warned:
        assert look(cls.from_pretrained(tmp_path)) == expected
    assert [one.filename for one in warned] == [__file__]
    assert wl.stats().fallbacks - before.fallbacks == 1
    others = [other for other in tmp_path.glob("*.safetensors") if other != path]
    assert wl.stats().bytes - before.bytes == tensor_bytes(*others)
    monkeypatch.setenv("WEIGHTLIFT_STRICT", "1")
    with wl.enabled(CALLER), pytest.raises(wl.WeightliftError, match="WEIGHTLIFT_STRICT=1"):
        cls.from_pretrained(tmp_path)


def test_a_state_dict_of_someone_else(saved: Path) -> None:
    """``_load_pretrained_model`` with tensors that do not come from a file."""
    tensors = load_file(saved / "vae/diffusion_pytorch_model.safetensors")
    with wl.enabled(CALLER), falls_back(CALLER, 0):
        model, *_ = AutoencoderKL._load_pretrained_model(
            vae(), dict(tensors), [], "", list(tensors), low_cpu_mem_usage=True, dtype=torch.float32
        )
        assert modeling_utils.load_state_dict(tensors) is tensors
    assert all(torch.equal(model.state_dict()[name], tensors[name]) for name in tensors)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("disable_mmap", [False, True])
def test_load_state_dict(saved: Path, disable_mmap: bool) -> None:
    """Called directly, it returns tensors."""
    path = saved / "vae/diffusion_pytorch_model.safetensors"
    stock = modeling_utils.load_state_dict(path, disable_mmap=disable_mmap)
    with wl.enabled(CALLER), engine_moves(tensor_bytes(path), CALLER):
        ours = modeling_utils.load_state_dict(path, disable_mmap=disable_mmap)
    assert {name: bits(t) for name, t in ours.items()} == {n: bits(t) for n, t in stock.items()}
    # Which only torch's files can be loaded to.
    assert_same_outcome(lambda: modeling_utils.load_state_dict(path, map_location="meta"), 0)


def test_names_of_former_attention_blocks(saved: Path, tmp_path: Path) -> None:
    """diffusers renames the tensors of old VAEs."""
    (tmp_path / "config.json").write_bytes((saved / "vae/config.json").read_bytes())
    tensors = load_file(saved / "vae/diffusion_pytorch_model.safetensors")
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name in list(tensors):
        for new, old in former.items():
            if f".{new}." in name:
                tensors[name.replace(new, old)] = tensors.pop(name)
    assert any(".proj_attn." in name for name in tensors)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(tensors, path)
    plain = outcome(lambda: AutoencoderKL.from_pretrained(saved / "vae"))
    for options in ({}, {"dtype": torch.float16}, {"low_cpu_mem_usage": False}):

        def load(options: dict[str, Any] = options) -> Any:
            return AutoencoderKL.from_pretrained(tmp_path, **options)

        ours = assert_same_outcome(load, tensor_bytes(tmp_path))
        assert options or ours == plain


def test_disable_restores() -> None:
    """The original objects of all replaced names."""
    names = []
    for hook in backend.HOOKS:
        *path, name = hook.target.split(".")
        owner = importlib.import_module(hook.module)
        for part in path:
            owner = getattr(owner, part)
        names.append((owner, name))
    before = [vars(owner)[name] for owner, name in names]
    with wl.enabled(CALLER), falls_back(CALLER, 0):
        inside = [vars(owner)[name] for owner, name in names]
    assert all(a is not b for a, b in zip(before, inside, strict=True))
    assert all(a is vars(o)[n] for a, (o, n) in zip(before, names, strict=True))


def test_with_all_backends(saved: Path, pipeline: Path) -> None:
    """Bytes that diffusers reads are counted for diffusers, once."""
    with wl.enabled():
        for load, moved in (
            (lambda: UNet2DConditionModel.from_pretrained(saved / "shards"), "shards"),
            (
                lambda: UNet2DConditionModel.from_single_file(
                    saved / "unet/diffusion_pytorch_model.safetensors", config=str(saved / "unet")
                ),
                "unet",
            ),
        ):
            with engine_moves(tensor_bytes(saved / moved), CALLER):
                load()
        before = wl.stats()
        DiffusionPipeline.from_pretrained(pipeline / "plain")
        assert wl.stats().bytes - before.bytes == tensor_bytes(pipeline / "plain")


@pytest.mark.deep
def test_hooked_when_it_is_imported(saved: Path) -> None:
    """In a process that enables the backend first, as with WEIGHTLIFT_ENABLE."""
    code = """
import sys, warnings
warnings.simplefilter("error", RuntimeWarning)
import weightlift as wl
wl.enable("diffusers")
assert "diffusers" not in sys.modules and "torch" not in sys.modules
from diffusers import DiffusionPipeline, UNet2DConditionModel
UNet2DConditionModel.from_pretrained(sys.argv[1])
print(wl.stats().by_caller["diffusers"].bytes, wl.stats().fallbacks)
"""
    result = run_python(code, saved / "unet", timeout=300)
    assert result.stdout.split() == [str(tensor_bytes(saved / "unet")), "0"], result.stderr

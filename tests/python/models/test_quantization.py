"""Quantizing while loading, compared with the libraries' own ways. These tests need all of the
libraries."""

from __future__ import annotations

import json
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import pytest
import safetensors.torch
import torch
import transformers
from diffusers.configuration_utils import register_to_config
from torch import nn

import weightlift as wl
from support import assert_same
from weightlift.models import quantization

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
    import bitsandbytes as bnb
    from torchao.quantization import FqnToConfig, Int8WeightOnlyConfig, quantize_

STEM = "diffusion_pytorch_model"


def network(base: Any, config: Any, register: Any) -> Any:
    class Network(base, config):
        _keep_in_fp32_modules: ClassVar = ["norm"]
        _no_split_modules: ClassVar = []

        @register
        def __init__(self, width=64, words=16) -> None:
            super().__init__()
            layers(self, width, words)

        def forward(self, x):
            return forward(self, x)

    return Network


def layers(self: Any, width: int, words: int) -> None:
    self.embedding = nn.Embedding(words, width)
    self.first = nn.Linear(width, 2 * width)
    self.norm = nn.ModuleDict({"scale": nn.LayerNorm(2 * width), "gate": nn.Linear(2 * width, 1)})
    self.blocks = nn.ModuleList([nn.Linear(2 * width, width, bias=False), nn.Linear(width, width)])
    self.out_proj = nn.Linear(width, width)
    self.conv = nn.Conv1d(1, 1, 3, padding=1)
    self.register_buffer("steps", torch.arange(3))
    self.head = nn.Linear(width, words, bias=False)
    self.head.weight = self.embedding.weight


def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    x = self.first(self.embedding(x))
    x = self.norm["scale"](x.float()) * self.norm["gate"](x.float()).sigmoid()
    for block in self.blocks:
        x = block(x.to(self.embedding.weight.dtype))
    result: torch.Tensor = self.head(self.out_proj(x))
    return result


Ours = network(wl.ModelMixin, wl.ConfigMixin, wl.register_to_config)
Theirs = network(diffusers.ModelMixin, diffusers.ConfigMixin, register_to_config)
QUANTIZED = ["first", "blocks.0", "blocks.1", "out_proj"]
INPUT = torch.arange(6).reshape(2, 3)


class TransformersConfig(transformers.PretrainedConfig):
    model_type = "weightlift_test_network"

    def __init__(self, width: int = 64, words: int = 16, **kwargs: Any) -> None:
        super().__init__(**{"tie_word_embeddings": True, **kwargs})
        self.width, self.words = width, words


class TransformersNetwork(transformers.PreTrainedModel):
    config_class = TransformersConfig
    _keep_in_fp32_modules: ClassVar = ["norm"]
    _tied_weights_keys: ClassVar = {"head.weight": "embedding.weight"}

    def __init__(self, config: TransformersConfig) -> None:
        super().__init__(config)
        layers(self, config.width, config.words)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return forward(self, x)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    Ours().save_pretrained(folder)
    return folder


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[list[str]]:
    caplog.set_level(logging.WARNING, "weightlift")
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("weightlift").addHandler(handler)
    yield messages
    logging.getLogger("weightlift").removeHandler(handler)


def state(model: nn.Module) -> dict[str, Any]:
    return dict(model.state_dict())


def assert_same_state(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """In any order, including values that are not tensors."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        if isinstance(value, torch.Tensor):
            assert_same(value, theirs[name])
        else:
            assert value == theirs[name]


def assert_works(model: Any, expected: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(INPUT)
        assert_same(result, expected.eval()(INPUT))
    return result


def converted(model: nn.Module) -> list[str]:
    return [
        n
        for n, m in model.named_modules()
        if isinstance(m, (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt))
    ]


def load(place: Path, **arguments: Any) -> Any:
    """On the CPU, whichever devices exist."""
    return Ours.from_pretrained(place, **{"device_map": "cpu", **arguments})


def by_hand(folder: Path, dtype: torch.dtype, names: list[str], make: Any) -> Any:
    """The model with these layers replaced by bitsandbytes'."""
    model = load(folder, dtype=dtype)
    for name in names:
        old = model.get_submodule(name)
        new = make(old.in_features, old.out_features, old.bias is not None)
        new.load_state_dict(old.state_dict())
        new.requires_grad_(False)
        if new.bias is not None:
            new.bias.data = new.bias.data.to(dtype)
        if isinstance(new, bnb.nn.Linear4bit):
            new.weight.data = new.weight.data.to(dtype)
        model.set_submodule(name, new.to("cpu"))
    return model


# bitsandbytes.


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_four_bits(folder: Path, kind: str, double: bool, dtype: torch.dtype) -> None:
    options: dict[str, Any] = {
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": dtype,
    }
    expected = by_hand(
        folder,
        dtype,
        QUANTIZED,
        lambda *size: bnb.nn.Linear4bit(
            *size, compute_dtype=dtype, compress_statistics=double, quant_type=kind
        ),
    )
    # Before a forward pass, which packs the weights in another way on some CPUs and loses bits.
    expected_state = state(expected)
    for library in (transformers, diffusers):
        config = library.BitsAndBytesConfig(load_in_4bit=True, **options)
        model = load(folder, quantization_config=config, dtype=dtype)
        assert converted(model) == QUANTIZED
        assert_same_state(state(model), expected_state)
        assert_works(model, expected)
        assert not model.training
        assert model.is_loaded_in_4bit
        assert not model.is_loaded_in_8bit
    assert model.num_parameters() == Ours().num_parameters()
    assert model.get_memory_footprint() < Ours().get_memory_footprint() / 2
    report = wl.last_report()
    assert report is not None
    assert report.bytes == (folder / f"{STEM}.safetensors").stat().st_size - header_bytes(folder)
    assert report.missing_keys == report.unexpected_keys == report.mismatched_keys == []


def header_bytes(folder: Path) -> int:
    data = (folder / f"{STEM}.safetensors").read_bytes()
    return 8 + int.from_bytes(data[:8], "little")


def test_eight_bits(folder: Path) -> None:
    expected = by_hand(
        folder,
        torch.float16,
        QUANTIZED,
        lambda *size: bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=6.0),
    )
    for how in (
        {"load_in_8bit": True},
        {"quantization_config": transformers.BitsAndBytesConfig(load_in_8bit=True)},
        {"quantization_config": diffusers.BitsAndBytesConfig(load_in_8bit=True)},
    ):
        model = load(folder, **how)
        assert converted(model) == QUANTIZED
        assert_same_state(state(model), state(expected))
        assert_works(model, expected)
        assert model.is_loaded_in_8bit
        assert model.dtype == torch.float16


def test_the_flags_are_the_librarys_config(folder: Path) -> None:
    for flag in ("load_in_4bit", "load_in_8bit"):
        config = transformers.BitsAndBytesConfig(**{flag: True})
        expected = load(folder, quantization_config=config)
        for how in ({flag: True}, {"quantization_config": config.to_dict()}):
            model = load(folder, **how)
            assert_same_state(state(model), state(expected))
            assert model.config.quantization_config.to_dict() == config.to_dict()
            assert type(model.config.quantization_config) is transformers.BitsAndBytesConfig


def test_what_contradicts_itself(folder: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True)
    for how, why in (
        ({"load_in_4bit": True, "load_in_8bit": True}, "contradict"),
        ({"load_in_4bit": True, "quantization_config": config}, "give one"),
        (
            {"load_in_4bit": True, "low_cpu_mem_usage": False, "device_map": None},
            "quantization during the load needs low_cpu_mem_usage=True",
        ),
        ({"quantization_config": {"quant_method": "gptq"}}, "'gptq' is not known"),
        ({"load_in_4bit": True, "device_map": {"first": "disk", "": "cpu"}}, "on the disk"),
    ):
        with pytest.raises(ValueError, match=why):
            load(folder, **how)


@pytest.mark.parametrize("flag", ["load_in_4bit", "load_in_8bit"])
def test_transformers_makes_the_same(folder: Path, tmp_path: Path, flag: str) -> None:
    # If a list is given, transformers adds nothing to it.
    skip = ["out_proj", "blocks.1"]
    plain = TransformersNetwork(TransformersConfig())
    plain.load_state_dict(state(load(folder)))
    plain.save_pretrained(tmp_path / "plain")
    config = transformers.BitsAndBytesConfig(**{flag: True}, llm_int8_skip_modules=[*skip, "head"])
    expected = TransformersNetwork.from_pretrained(
        tmp_path / "plain", quantization_config=config, dtype=torch.float16
    )
    model = load(folder, quantization_config=config, dtype=torch.float16)
    assert converted(model) == converted(expected) == ["first", "blocks.0"]
    assert_same_state(state(model), state(expected))
    # A quantized model that transformers saved can be loaded.
    expected.save_pretrained(tmp_path / "quantized")
    again, info = load(tmp_path / "quantized", output_loading_info=True)
    assert_same_state(state(again), state(expected))
    assert converted(again) == ["first", "blocks.0"]
    assert not any(info.values())
    # And the reverse.
    model.save_pretrained(tmp_path / "ours")
    values = json.loads((tmp_path / "ours" / "config.json").read_text())
    values["model_type"] = TransformersConfig.model_type
    (tmp_path / "ours" / "config.json").write_text(json.dumps(values))
    (tmp_path / "ours" / f"{STEM}.safetensors").rename(tmp_path / "ours" / "model.safetensors")
    assert_same_state(
        state(TransformersNetwork.from_pretrained(tmp_path / "ours", dtype=torch.float16)),
        state(model),
    )
    assert_works(model, expected)


def test_layers_that_are_not_converted(folder: Path) -> None:
    config = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["blocks"])
    model = load(folder, quantization_config=config, dtype=torch.bfloat16)
    assert converted(model) == ["first", "out_proj"]
    for name, parameter in model.named_parameters():
        kept = name.startswith("norm.")  # of _keep_in_fp32_modules
        quantized = name in ("first.weight", "out_proj.weight")
        expected = torch.float32 if kept else torch.uint8 if quantized else torch.bfloat16
        assert parameter.dtype == expected
    assert model.head.weight is model.embedding.weight
    assert model.config.quantization_config.llm_int8_skip_modules == ["blocks"]


SAVINGS: list[dict[str, Any]] = [
    {},
    {"max_shard_size": 3000},
    {"variant": "nf4", "max_shard_size": 3000},
    {"safe_serialization": False},
]


@pytest.mark.parametrize(
    "config",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_quant_storage": "bfloat16"},
        {"load_in_8bit": True, "llm_int8_skip_modules": ["first"]},
    ],
    ids=str,
)
def test_saved_and_loaded_again(
    folder: Path, tmp_path: Path, config: dict[str, Any], said: list[str]
) -> None:
    chosen = transformers.BitsAndBytesConfig(**config)
    model = load(folder, quantization_config=chosen)
    before = state(model)  # a forward pass changes it
    for number, saving in enumerate(SAVINGS):
        model.save_pretrained(tmp_path / str(number), **saving)
    for number, saving in enumerate(SAVINGS):
        place = tmp_path / str(number)
        how = {"variant": saving["variant"]} if "variant" in saving else {}
        again, info = load(place, output_loading_info=True, **how)
        assert converted(again) == converted(model)
        assert_same_state(state(again), before)
        assert_works(again, model)
        assert not any(info.values())
        assert again.config.quantization_config.to_dict() == chosen.to_dict()
        assert again.is_loaded_in_4bit is model.is_loaded_in_4bit
    assert said == []
    # The file says how it is quantized.
    other = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    again = load(tmp_path / "0", quantization_config=other)
    assert_same_state(state(again), before)
    assert "already quantized" in said[0]
    with pytest.raises(ValueError, match="quantized"):
        again.to(torch.float32)


def rewrite(folder: Path, place: Path, change: Any) -> None:
    tensors = safetensors.torch.load_file(folder / f"{STEM}.safetensors")
    change(tensors)
    place.mkdir()
    safetensors.torch.save_file(tensors, place / f"{STEM}.safetensors")
    (place / "config.json").write_bytes((folder / "config.json").read_bytes())


@pytest.mark.parametrize("how", ["load_in_4bit", "load_in_8bit", "torchao"])
def test_what_is_missing_is_initialized(
    folder: Path, tmp_path: Path, how: str, said: list[str]
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in ("blocks.1.weight", "out_proj.bias", "norm.scale.weight", "conv.bias"):
            del tensors[name]

    rewrite(folder, tmp_path / "part", change)
    arguments = {how: True}
    if how == "torchao":
        arguments = {"quantization_config": diffusers.TorchAoConfig(Int8WeightOnlyConfig())}
    model, info = load(tmp_path / "part", output_loading_info=True, **arguments)
    missing = {"blocks.1.weight", "out_proj.bias", "norm.scale.weight", "conv.bias"}
    assert set(info["missing_keys"]) == missing
    assert all(name in said[-1] for name in missing)
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
    whole = load(folder, **arguments)
    assert type(model.blocks[1].weight) is type(whole.blocks[1].weight)
    assert model.norm["scale"].weight.unique().tolist() == [1]
    assert 0 < model.out_proj.bias.abs().max() <= 1 / 8
    with torch.no_grad():
        result = model(INPUT)
        assert result.isfinite().all()
        # Uniform in 1 / sqrt(64), as quantized.
        one = torch.eye(64, dtype=model.dtype)
        weight = (model.blocks[1](one) - model.blocks[1].bias).T
    assert 0.09 < weight.abs().max() < 0.14
    assert abs(weight.float().std() - 1 / 8 / 3**0.5) < 0.01


@pytest.mark.parametrize("how", ["load_in_4bit", "load_in_8bit"])
def test_mismatches_name_all(folder: Path, tmp_path: Path, how: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["blocks.0.weight"] = torch.zeros(64, 64)
        tensors["conv.bias"] = torch.zeros(2)

    rewrite(folder, tmp_path / "other", change)
    for place in ("other", "quantized"):
        if place == "quantized":
            Ours(width=32).save_pretrained(tmp_path / "small")
            model = load(tmp_path / "small", **{how: True})
            model.save_pretrained(tmp_path / place)
            values = json.loads((tmp_path / place / "config.json").read_text())
            values["width"] = 64
            (tmp_path / place / "config.json").write_text(json.dumps(values))
            names = [r"first\.weight", r"first\.bias", r"conv", "embedding"][:2]
        else:
            names = [
                r"blocks\.0\.weight: \(64, 64\) .* \(64, 128\)",
                r"conv\.bias: \(2,\) .* \(1,\)",
            ]
        with pytest.raises(wl.CheckpointError, match="of another shape") as caught:
            load(tmp_path / place, **({how: True} if place == "other" else {}))
        for name in names:
            assert re.search(name, str(caught.value))
    model, info = load(
        tmp_path / "other", ignore_mismatched_sizes=True, output_loading_info=True, **{how: True}
    )
    assert sorted(info["mismatched_keys"]) == [
        ("blocks.0.weight", (64, 64), (64, 128)),
        ("conv.bias", (2,), (1,)),
    ]
    assert info["missing_keys"] == []
    assert converted(model) == QUANTIZED


def test_a_few_weights_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load(folder, load_in_4bit=True)
    started: list[list[str]] = []

    class LoadPlan(quantization.LoadPlan):
        def start(self) -> Any:
            started.append([name for group in self._destinations for name in group.names or ()])
            return super().start()

    monkeypatch.setattr(quantization, "LoadPlan", LoadPlan)
    monkeypatch.setattr(quantization, "_AT_ONCE", 1)
    model = load(folder, load_in_4bit=True)
    assert started == [[f"{name}.weight"] for name in QUANTIZED]
    assert_same_state(state(model), state(expected))


def test_an_automatic_map_counts_quantized_weights_as_such(folder: Path) -> None:
    fits = 16 * 64 * 2 + 128 * 4 * 4 + (64 * 128 * 2 + 64 * 64 * 2) + 4000
    assert fits < sum(p.numel() for p in Ours().parameters()) * 2
    how: dict[str, Any] = {"device_map": "auto", "max_memory": {"cpu": fits}}
    assert converted(load(folder, load_in_8bit=True, **how)) == QUANTIZED
    with pytest.raises(wl.CheckpointError, match="lacks"):
        load(folder, load_in_8bit=True, device_map="auto", max_memory={"cpu": 9999})


# torchao.


def parts(model: nn.Module) -> dict[str, Any]:
    """The state dict, with quantized tensors split into plain ones."""
    flat: dict[str, Any] = {}
    for name, tensor in model.state_dict().items():
        if type(tensor) is torch.Tensor:
            flat[name] = tensor
            continue
        for part in (*tensor.tensor_data_names, *tensor.optional_tensor_data_names):
            flat[f"{name}.{part}"] = getattr(tensor, part)
        flat[f"{name}.type"] = type(tensor)
        for attribute in tensor.tensor_attribute_names:
            flat[f"{name}.{attribute}"] = getattr(tensor, attribute)
    return flat


def quantized(model: nn.Module) -> list[str]:
    return [
        n
        for n, m in model.named_modules()
        if "Int8Tensor" in type(getattr(m, "weight", 0)).__name__
    ]


def torchao_reference(folder: Path, chosen: list[str], config: Any = None) -> Any:
    model = load(folder, dtype=torch.bfloat16)
    quantize_(model, config or Int8WeightOnlyConfig(), lambda _, name: name in chosen)
    return model


def test_int8_weights_of_torchao(folder: Path) -> None:
    expected = torchao_reference(folder, QUANTIZED)
    assert quantized(expected) == QUANTIZED
    for library in (diffusers, transformers):
        config = library.TorchAoConfig(Int8WeightOnlyConfig())
        for how in ({}, {"dtype": torch.bfloat16}, {"device_map": "cpu"}):
            model = load(folder, quantization_config=config, **how)
            assert_same_state(parts(model), parts(expected))
            assert_works(model, expected)
            assert model.head.weight is model.embedding.weight
        with pytest.raises(ValueError, match="quantized"):
            model.half()


def test_torchao_by_diffusers(folder: Path, tmp_path: Path) -> None:
    # diffusers leaves tied tensors on meta; here they are loaded.
    tensors = safetensors.torch.load_file(folder / f"{STEM}.safetensors")
    tensors["head.weight"] = tensors["embedding.weight"].clone()
    untied = tmp_path / "untied"
    untied.mkdir()
    safetensors.torch.save_file(tensors, untied / f"{STEM}.safetensors")
    (untied / "config.json").write_bytes((folder / "config.json").read_bytes())

    config = diffusers.TorchAoConfig(
        Int8WeightOnlyConfig(), modules_to_not_convert=["blocks", "proj", "head"]
    )
    expected = Theirs.from_pretrained(
        untied, quantization_config=config, torch_dtype=torch.bfloat16
    )
    model = load(untied, quantization_config=config, dtype=torch.bfloat16)
    assert quantized(model) == quantized(expected) == ["first"]
    assert_same_state(parts(model), parts(expected))
    # Models that diffusers saved.
    expected.head.weight = nn.Parameter(expected.head.weight.detach().clone())
    expected.save_pretrained(tmp_path / "theirs")
    again, info = load(tmp_path / "theirs", dtype=torch.bfloat16, output_loading_info=True)
    assert_same_state(parts(again), parts(model))
    assert_works(again, model)
    assert not any(info.values())


@pytest.mark.parametrize("saving", [{}, {"max_shard_size": 3000}], ids=str)
def test_torchao_saved_and_loaded_again(
    folder: Path, tmp_path: Path, saving: dict[str, Any]
) -> None:
    config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    model = load(folder, quantization_config=config)
    model.save_pretrained(tmp_path / "model", **saving)
    again, info = load(tmp_path / "model", output_loading_info=True)
    assert quantized(again) == QUANTIZED
    assert_same_state(parts(again), parts(model))
    assert_works(again, model)
    assert not any(info.values())
    assert again.head.weight is again.embedding.weight
    # diffusers, which leaves tied tensors on meta.
    theirs = Theirs.from_pretrained(tmp_path / "model", torch_dtype=torch.bfloat16)
    expected = {name: value for name, value in parts(model).items() if name != "head.weight"}
    found = {name: value for name, value in parts(theirs).items() if name != "head.weight"}
    assert_same_state(found, expected)
    with pytest.raises(ValueError, match="only be saved as safetensors"):
        model.save_pretrained(tmp_path / "bin", safe_serialization=False)


def test_torchao_by_name(folder: Path) -> None:
    config = FqnToConfig(
        {"first": Int8WeightOnlyConfig(), r"re:blocks\.\d": Int8WeightOnlyConfig()}
    )
    for skip, chosen in (
        (None, ["first", "blocks.0", "blocks.1"]),
        (["blocks.1"], ["first", "blocks.0"]),
    ):
        how = diffusers.TorchAoConfig(config, modules_to_not_convert=skip)
        model = load(folder, quantization_config=how)
        assert quantized(model) == chosen
        assert_same_state(parts(model), parts(torchao_reference(folder, chosen)))


def test_what_torchao_cannot(folder: Path, tmp_path: Path) -> None:
    config = diffusers.TorchAoConfig(Int8WeightOnlyConfig())
    with pytest.raises(ValueError, match="on the disk"):
        load(folder, quantization_config=config, device_map={"": "disk"})
    model = load(folder, quantization_config=config)
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / f"{STEM}.safetensors"
    tensors = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(wl.CheckpointError, match="metadata to rebuild torchao's tensors"):
        load(tmp_path / "model")
    del tensors["first._weight_scale"]
    safetensors.torch.save_file(tensors, path, metadata)
    with pytest.raises(wl.CheckpointError, match=r"first\._weight_scale"):
        load(tmp_path / "model")
    Ours(width=32).save_pretrained(tmp_path / "small")
    model = load(tmp_path / "small", quantization_config=config)
    model.save_pretrained(tmp_path / "small")
    values = json.loads((tmp_path / "small" / "config.json").read_text())
    values["width"] = 64
    (tmp_path / "small" / "config.json").write_text(json.dumps(values))
    with pytest.raises(wl.CheckpointError, match=r"first\.weight: \(64, 32\) .* \(128, 64\)"):
        load(tmp_path / "small")

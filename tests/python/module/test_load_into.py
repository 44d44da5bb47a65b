"""``load_into``, compared with ``torch.nn.Module.load_state_dict``."""

from __future__ import annotations

import copy
import functools
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import safetensors.torch
import torch

import weightlift as wl
from support import assert_same, assert_same_tensors


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(width, width)
        self.norm = torch.nn.LayerNorm(width)
        self.register_buffer("steps", torch.arange(width))
        self.register_buffer("scratch", torch.full((2,), 7.0), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x)) + x


class Model(torch.nn.Module):
    def __init__(self, width: int = 8, blocks: int = 3, *, tied: bool = True) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(11, width)
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(blocks))
        self.convolution = torch.nn.Conv2d(2, 3, 3)
        self.rnn = torch.nn.LSTM(width, width)
        self.head = torch.nn.Linear(width, 11, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x)
        return out


def on_meta(make: Callable[[], torch.nn.Module] = Model) -> Any:
    with accelerate.init_empty_weights(include_buffers=False):
        return make()


@pytest.fixture
def original() -> Model:
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        for buffer in model.buffers():
            buffer += 1
    return model.eval()


@pytest.fixture
def saved(original: Model, tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    state = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    del state["head.weight"]  # tied: saved once
    safetensors.torch.save_file(state, path)
    return path


def test_an_automatic_map_counts_what_the_checkpoint_holds(tmp_path: Path) -> None:
    make = functools.partial(torch.nn.Linear, 100, 100, bias=False)
    path = tmp_path / "m.safetensors"
    safetensors.torch.save_file({"weight": torch.ones(100, 100, dtype=torch.float16)}, path)
    how = {"device_map": "auto", "max_memory": {"cpu": 25_000}}
    model = on_meta(make)
    wl.load_into(model, path, dtype="auto", **how)
    assert model.weight.dtype == torch.float16
    with pytest.raises(wl.CheckpointError, match="does not fit"):
        wl.load_into(on_meta(make), path, **how)


def test_a_model_on_meta(original: Model, saved: Path) -> None:
    model = on_meta().eval()
    model.head.weight = model.embedding.weight
    report = wl.load_into(model, saved)
    assert_same_tensors(dict(model.state_dict()), dict(original.state_dict()))
    assert report.missing_keys == report.unexpected_keys == report.mismatched_keys == []
    assert report.bytes == sum(t.nbytes for t in safetensors.torch.load_file(saved).values())
    assert model.head.weight is model.embedding.weight
    assert model.blocks[0].scratch.tolist() == [7.0, 7.0]
    assert all(parameter.requires_grad for parameter in model.parameters())
    tokens = torch.arange(11)
    assert_same(model(tokens).detach(), original(tokens).detach())
    # An LSTM also keeps its weights in a list.
    x = torch.ones(1, 1, 8)
    assert_same(model.rnn(x)[0].detach(), original.rnn(x)[0].detach())


def test_a_real_model_is_filled_in_place(original: Model, saved: Path) -> None:
    model = Model()
    model.blocks[1].linear.weight.requires_grad_(False)
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    wl.load_into(model, saved)
    assert_same_tensors(dict(model.state_dict()), dict(original.state_dict()))
    assert before == {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    assert not model.blocks[1].linear.weight.requires_grad
    assert model.blocks[0].linear.weight.requires_grad


def test_real_tensors_that_the_engine_cannot_write_to(saved: Path, original: Model) -> None:
    model = Model()
    model.convolution.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.double()
    model.blocks[0].steps = model.blocks[0].steps.to(torch.int32)
    strides = model.convolution.weight.stride()
    pointer = model.convolution.weight.data_ptr()
    wl.load_into(model, saved)
    assert model.convolution.weight.stride() == strides
    assert model.convolution.weight.data_ptr() == pointer
    expected = Model().double()
    expected.load_state_dict(original.state_dict())
    assert_same(model.convolution.weight.detach(), expected.convolution.weight.detach())
    assert_same(model.blocks[0].linear.weight.detach(), expected.blocks[0].linear.weight.detach())
    assert model.blocks[0].steps.dtype == torch.int32
    assert model.blocks[0].steps.tolist() == original.blocks[0].steps.tolist()


@pytest.mark.parametrize("buffers", [True, False], ids=["among others", "alone"])
def test_parameters_that_differ_in_more_than_their_values(tmp_path: Path, buffers: bool) -> None:
    """Most parameters on ``meta`` are set without a look at each: these need one."""

    class Marked(torch.nn.Parameter):
        pass

    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(3.0))
            self.frozen = torch.nn.Parameter(torch.rand(4), requires_grad=False)
            self.counts = torch.nn.Parameter(torch.arange(5), requires_grad=False)
            self.named = torch.nn.Parameter(torch.rand(2, 3))
            self.marked = Marked(torch.rand(3))
            self.linear = torch.nn.Linear(3, 3)
            self.tied = torch.nn.Linear(3, 3)
            self.tied.weight = self.linear.weight
            self.rnn = torch.nn.LSTM(2, 2)
            if buffers:
                self.register_buffer("steps", torch.arange(3))

    expected = Odd()
    state = expected.state_dict()
    stored = {name: tensor.clone() for name, tensor in state.items() if name != "tied.weight"}
    stored["scale"] = stored["scale"].reshape(1)
    safetensors.torch.save_file(stored, tmp_path / "model.safetensors")
    with torch.device("meta"):
        model = Odd()
    model.named.role = "bias"  # type: ignore[attr-defined]
    wl.load_into(model, tmp_path)
    assert_same_tensors(model.state_dict(), state)
    assert model.named.role == "bias"  # type: ignore[attr-defined]
    assert type(model.marked) is Marked
    assert model.tied.weight is model.linear.weight
    assert model.rnn._flat_weights[0] is model.rnn.weight_ih_l0
    for name, parameter in model.named_parameters():
        assert isinstance(parameter, torch.nn.Parameter)
        assert parameter.requires_grad == expected.get_parameter(name).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float16", "auto", None])
@pytest.mark.parametrize("real", [True, False])
def test_dtypes(original: Model, saved: Path, dtype: Any, real: bool) -> None:
    model = Model() if real else on_meta()
    model.half()
    model.head.weight = model.embedding.weight
    wl.load_into(model, saved, dtype=dtype)
    wanted = {None: torch.float16, "auto": torch.float32, "float16": torch.float16}
    expected = copy.deepcopy(original).to(wanted.get(dtype, dtype))
    assert_same_tensors(dict(model.state_dict()), dict(expected.state_dict()))


def test_modules_that_stay_in_float32(original: Model, saved: Path) -> None:
    model = on_meta()
    model.head.weight = model.embedding.weight
    model._keep_in_fp32_modules = ["norm"]
    wl.load_into(model, saved, dtype=torch.bfloat16)
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if ".norm." in name else torch.bfloat16
        assert_same(parameter.detach(), original.get_parameter(name).detach().to(wanted))


def test_missing_unexpected_mismatched(original: Model, saved: Path) -> None:
    tensors = safetensors.torch.load_file(saved)
    tensors["extra"] = torch.ones(2)
    del tensors["blocks.0.norm.bias"]
    tensors["rnn.bias_hh_l0"] = torch.ones(3)
    safetensors.torch.save_file(tensors, saved)

    model = Model()
    untouched = copy.deepcopy(dict(model.state_dict()))
    with pytest.raises(wl.CheckpointError, match=r"rnn\.bias_hh_l0: \(3,\) in the checkpoint"):
        wl.load_into(model, saved, strict=False)
    with pytest.raises(wl.CheckpointError) as raised:
        wl.load_into(model, saved, ignore_mismatched_sizes=True)
    text = str(raised.value)
    assert "blocks.0.norm.bias" in text
    assert "extra" in text
    assert str(saved) in text
    assert_same_tensors(dict(model.state_dict()), untouched)  # nothing was read

    report = wl.load_into(model, saved, strict=False, ignore_mismatched_sizes=True)
    assert report.missing_keys == ["blocks.0.norm.bias"]
    assert report.unexpected_keys == ["extra"]
    assert report.mismatched_keys == [("rnn.bias_hh_l0", (3,), (32,))]
    last = wl.last_report()
    assert last is not None
    assert last.missing_keys == ["blocks.0.norm.bias"]
    expected = {**dict(original.state_dict())}
    for name in ("blocks.0.norm.bias", "rnn.bias_hh_l0"):
        expected[name] = untouched[name]
    assert_same_tensors(dict(model.state_dict()), expected)


def test_a_buffer_that_nothing_can_fill(saved: Path) -> None:
    with torch.device("meta"):
        model = Model()
    with pytest.raises(wl.CheckpointError, match=r"blocks\.0\.scratch"):
        wl.load_into(model, saved)
    report = wl.load_into(model, saved, strict=False)
    assert any("blocks.0.scratch" in message for message in report.error_msgs)


@pytest.mark.parametrize("given", ["function", "dict"])
def test_key_map(original: Model, tmp_path: Path, given: str) -> None:
    state = {f"net.{name}": t.clone() for name, t in original.state_dict().items()}
    path = tmp_path / "f.safetensors"
    safetensors.torch.save_file({**state, "optimizer": torch.ones(1)}, path)
    names: dict[str, str | None] = {name: name.removeprefix("net.") for name in state}
    names["optimizer"] = None
    model = on_meta()
    wl.load_into(model, path, key_map=names if given == "dict" else lambda name: names[name])
    assert_same_tensors(dict(model.state_dict()), dict(original.state_dict()))


def test_key_map_with_a_typo(original: Model, saved: Path) -> None:
    name = next(iter(original.state_dict()))
    typo = name[:-2] + name[-1] + name[-2]
    model = on_meta()
    with pytest.warns(UserWarning, match=rf"key_map has '{typo}', .*model.*similar are '{name}'"):
        wl.load_into(model, saved, key_map={typo: "x"}, strict=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wl.load_into(on_meta(), saved, key_map={name: name}, strict=False)


def test_key_map_must_keep_names_apart(saved: Path) -> None:
    with pytest.raises(wl.CheckpointError, match="both be called 'x'"):
        wl.load_into(Model(), saved, key_map=lambda name: "x")


def test_channels_last(original: Model, saved: Path) -> None:
    model = on_meta()
    model.head.weight = model.embedding.weight
    wl.load_into(model, saved, memory_format=torch.channels_last)
    assert model.convolution.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same(model.convolution.weight.detach(), original.convolution.weight.detach())


def test_writing_to_a_mapped_model_leaves_the_file_alone(saved: Path) -> None:
    before = saved.read_bytes()
    model = on_meta()
    model.head.weight = model.embedding.weight
    report = wl.load_into(model, saved)
    in_place = sum(block.steps.nbytes for block in model.blocks)  # real buffers
    assert report.mapped_bytes == report.bytes - in_place
    optimizer = torch.optim.SGD(model.parameters(), lr=1)
    model(torch.arange(11)).sum().backward()
    optimizer.step()
    assert saved.read_bytes() == before


def test_an_index_over_shards(original: Model, tmp_path: Path) -> None:
    state = {name: t.clone() for name, t in original.state_dict().items()}
    names = list(state)
    files = {name: f"model-{i % 3 + 1:05}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        part = {name: state[name] for name in names if files[name] == file}
        safetensors.torch.save_file(part, tmp_path / file)
    index = {"metadata": {}, "weight_map": files}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    model = on_meta()
    report = wl.load_into(model, tmp_path, dtype=torch.bfloat16)
    assert len(report.files) >= 3
    expected = copy.deepcopy(original).bfloat16()
    assert_same_tensors(dict(model.state_dict()), dict(expected.state_dict()))

    files[names[0]] = files[names[1]]
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(wl.CheckpointError, match=names[0]):
        wl.open_checkpoint(tmp_path, strict_index=True)


class TestDisk:
    """``"disk"`` entries: accelerate's hooks read them at each use."""

    def test_forward(self, original: Model, saved: Path) -> None:
        model = on_meta().eval()
        model.head.weight = model.embedding.weight
        places = {"": "cpu", "blocks.1": "disk", "blocks.2.linear": "disk"}
        wl.load_into(model, saved, device_map=places)
        assert model.blocks[1].linear.weight.device.type == "meta"
        tokens = torch.arange(11)
        for _ in range(2):
            assert_same(model(tokens).detach(), original(tokens).detach())
        assert model.blocks[1].linear.weight.device.type == "meta"
        assert sorted(path.name for path in saved.parent.iterdir()) == [saved.name]

    def test_the_file_may_be_saved_over(self, original: Model, saved: Path) -> None:
        model = on_meta().eval()
        model.head.weight = model.embedding.weight
        wl.load_into(model, saved, device_map={"": "cpu", "blocks": "disk"})
        tokens = torch.arange(11)
        expected = original(tokens).detach()
        zeros = {n: torch.zeros_like(t) for n, t in safetensors.torch.load_file(saved).items()}
        wl.save_file(zeros, saved)
        assert_same(model(tokens).detach(), expected)

    def test_cast_as_it_is_read(self, original: Model, saved: Path) -> None:
        model = on_meta().eval()
        model.head.weight = model.embedding.weight
        places = {"": "cpu", "blocks": "disk"}
        wl.load_into(model, saved, device_map=places, dtype=torch.bfloat16)
        tokens = torch.arange(11)
        expected = copy.deepcopy(original).bfloat16()
        assert_same(model(tokens).detach(), expected(tokens).detach())


def test_pinning_without_a_gpu(saved: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(wl.DeviceError, match="pin_memory"):
        wl.load_into(Model(), saved, pin_memory=True)

"""Models with weights on the disk, copied and pickled; models that are loaded in unusual modes."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import weightlift as wl
from support import open_files
from weightlift.module.offload import whole_state_dict


class Model(wl.ModelMixin, wl.ConfigMixin):
    @wl.register_to_config
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.a = nn.Linear(width, width)
        self.b = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(self.a(x))


X = torch.ones(1, 4)
MAPS: list[Any] = [{"a": "disk", "b": "cpu"}, "disk"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Model().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(params=MAPS, ids=["in part", "all"])
def model(request: pytest.FixtureRequest, folder: Path) -> Model:
    return Model.from_pretrained(folder, device_map=request.param)


def test_a_deep_copy(model: Model) -> None:
    before = open_files()
    copied = copy.deepcopy(model)
    assert torch.equal(copied(X), model(X))
    assert open_files() <= before
    assert copied.b.weight is not model.b.weight


def test_a_deep_copy_reads_the_file_that_was_loaded(model: Model, folder: Path) -> None:
    expected = model(X)
    copied = copy.deepcopy(model)
    Model().save_pretrained(folder)
    del model
    assert torch.equal(copied(X), expected)


def test_a_pickle_holds_the_path(folder: Path) -> None:
    big = Model(300)
    big.save_pretrained(folder)
    pickled = pickle.dumps(Model.from_pretrained(folder, device_map="disk"))
    assert len(pickled) < 20_000
    found = whole_state_dict(pickle.loads(pickled))
    assert all(torch.equal(found[name], value) for name, value in big.state_dict().items())


def run(model: Model) -> bytes:
    return pickle.dumps(model(X).tolist())


def test_a_model_is_sent_to_a_worker(model: Model) -> None:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pickle.loads(pool.map(run, [model])[0]) == model(X).tolist()


def test_a_pickle_of_a_file_that_is_gone_holds_the_tensors(model: Model, folder: Path) -> None:
    expected = model(X)
    Model().save_pretrained(folder)
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), expected)


def test_a_pickle_of_a_torch_file_holds_the_tensors(tmp_path: Path) -> None:
    saved = Model()
    saved.save_pretrained(tmp_path, safe_serialization=False)
    model = Model.from_pretrained(tmp_path, device_map="disk")
    assert torch.equal(pickle.loads(pickle.dumps(model))(X), saved(X))
    assert torch.equal(copy.deepcopy(model)(X), saved(X))


def test_a_file_that_changes_after_pickling_is_refused(model: Model, folder: Path) -> None:
    pickled = pickle.dumps(model)
    Model().save_pretrained(folder)
    with pytest.raises(wl.CheckpointError, match="changed after the model was pickled"):
        pickle.loads(pickled)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError):
        pickle.loads(pickled)


def test_a_file_that_is_touched_after_pickling(model: Model, folder: Path) -> None:
    expected = model(X)
    pickled = pickle.dumps(model)
    (folder / "diffusion_pytorch_model.safetensors").touch()
    assert torch.equal(pickle.loads(pickled)(X), expected)


@pytest.mark.parametrize("how", [{}, {"low_cpu_mem_usage": False}, {"device_map": "cpu"}], ids=str)
def test_what_is_loaded_in_inference_mode_can_be_trained(how: dict[str, Any], folder: Path) -> None:
    state = wl.load_file(folder / "diffusion_pytorch_model.safetensors")
    wl.save_file({k: v for k, v in state.items() if k != "b.bias"},
                 folder / "diffusion_pytorch_model.safetensors")  # fmt: skip
    with torch.inference_mode():
        model = Model.from_pretrained(folder, **how)
        assert torch.is_inference_mode_enabled()
    assert not any(t.is_inference() for t in model.parameters())
    model(X).sum().backward()
    assert model.a.weight.grad is not None


@pytest.mark.parametrize("backend", [False, True])
def test_a_constructor_that_loads_a_tied_model_of_transformers(
    backend: bool, tmp_path: Path
) -> None:
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "inner")

    class Outer(wl.ModelMixin, wl.ConfigMixin):
        @wl.register_to_config
        def __init__(self, width: int = 4) -> None:
            super().__init__()
            self.lm = LlamaForCausalLM.from_pretrained(tmp_path / "inner")
            self.proj = nn.Linear(width, width)

    trained = Outer()
    with torch.no_grad():
        trained.lm.model.embed_tokens.weight.add_(1)
    trained.save_pretrained(tmp_path / "outer")
    if backend:
        with wl.enabled("transformers"):
            model = Outer.from_pretrained(tmp_path / "outer")
    else:
        model = Outer.from_pretrained(tmp_path / "outer")
    assert model.lm.lm_head.weight is model.lm.model.embed_tokens.weight
    for name, value in trained.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name

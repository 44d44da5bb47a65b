"""weightlift.flax compared with jax, flax, safetensors and torch: files, trees and results."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file as save_torch_file
from torch import nn as tnn

import weightlift as wl
from hub_server import HubServer, hub, uploads
from support import DTYPES, assert_same_tensors, bits, entry, file_bytes, run_python
from weightlift.bench.contenders import CONTENDERS, Job
from weightlift.bench.measure_child import _tensors, checksum
from weightlift.load.phases import observe_phases

jax = pytest.importorskip("jax", reason="jax is installed for Python 3.11 and later")

import flax.serialization  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import ml_dtypes  # noqa: E402
import safetensors.flax  # noqa: E402
import safetensors.numpy  # noqa: E402
from flax import linen as nn  # noqa: E402
from flax import nnx  # noqa: E402
from flax.traverse_util import flatten_dict  # noqa: E402

import weightlift.flax as wf  # noqa: E402
from weightlift.flax import params as params_module  # noqa: E402

__all__ = ["hub"]  # a fixture

KEY = jax.random.PRNGKey(0)
FILE = "diffusion_flax_model.msgpack"


def same(ours: Any, theirs: Any) -> None:
    """Same keys, dtypes, shapes and bits."""
    a, b = flatten_dict(ours), flatten_dict(theirs)
    assert a.keys() == b.keys()
    for keys, leaf in a.items():
        x, y = np.asarray(leaf), np.asarray(b[keys])
        assert (x.dtype, x.shape) == (y.dtype, y.shape), keys
        assert x.tobytes() == y.tobytes(), keys


def zeros(model: Any) -> Any:
    """Parameters as in the model, made without a compiler."""
    tree = jax.eval_shape(model.init_weights, KEY)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), tree)


class ResBlock(nn.Module):
    channels: int

    def setup(self) -> None:
        self.norm1 = nn.GroupNorm(4, epsilon=1e-5)
        self.conv1 = nn.Conv(self.channels, (3, 3), padding=1)
        self.time_emb_proj = nn.Dense(self.channels)

    def __call__(self, x: Any, t: Any) -> Any:
        h = self.conv1(nn.silu(self.norm1(x))) + self.time_emb_proj(t)[:, None, None]
        return x + h


class TimeEmbedding(nn.Module):
    @nn.compact
    def __call__(self, t: Any) -> Any:
        return nn.Dense(12, name="linear_2")(nn.silu(nn.Dense(10, name="linear_1")(t)))


@wf.register_to_config
class UNet(nn.Module, wf.FlaxModelMixin, wl.ConfigMixin):
    config_name = "config.json"
    channels: tuple[int, ...] = (8, 8)
    out_channels: int = 3
    dtype: Any = jnp.float32

    def setup(self) -> None:
        self.conv_in = nn.Conv(self.channels[0], (3, 3), padding=1)
        self.time_embedding = TimeEmbedding()
        self.down_blocks = [ResBlock(c) for c in self.channels]
        self.conv_out = nn.Conv(self.out_channels, (1, 3), padding=((0, 0), (1, 1)))

    def __call__(self, x: Any, t: Any) -> Any:
        t = self.time_embedding(t)
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x, t)
        return self.conv_out(x)

    def init_weights(self, rng: Any) -> Any:
        return self.init(rng, jnp.zeros((1, 6, 5, 3)), jnp.zeros((1, 4)))["params"]


@wf.register_to_config
class Small(nn.Module, wf.FlaxModelMixin, wl.ConfigMixin):
    features: int = 8

    @nn.compact
    def __call__(self, x: Any) -> Any:
        return nn.LayerNorm(name="norm1")(nn.Dense(self.features, name="linear")(x))

    def init_weights(self, rng: Any) -> Any:
        return self.init(rng, jnp.zeros((1, 5)))["params"]


class TorchResBlock(tnn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1 = tnn.GroupNorm(4, channels)
        self.conv1 = tnn.Conv2d(channels, channels, 3, padding=1)
        self.time_emb_proj = tnn.Linear(12, channels)

    def forward(self, x: Any, t: Any) -> Any:
        h = self.conv1(tnn.functional.silu(self.norm1(x)))
        return x + h + self.time_emb_proj(t)[:, :, None, None]


class TorchUNet(wl.ModelMixin, wl.ConfigMixin):
    config_name = "config.json"

    @wl.register_to_config
    def __init__(self, channels: tuple[int, ...] = (8, 8), out_channels: int = 3) -> None:
        super().__init__()
        self.conv_in = tnn.Conv2d(3, channels[0], 3, padding=1)
        self.time_embedding = tnn.Module()
        self.time_embedding.linear_1 = tnn.Linear(4, 10)
        self.time_embedding.linear_2 = tnn.Linear(10, 12)
        self.down_blocks = tnn.ModuleList(TorchResBlock(c) for c in channels)
        self.conv_out = tnn.Conv2d(channels[-1], out_channels, (1, 3), padding=(0, 1))

    def forward(self, x: Any, t: Any) -> Any:
        t = self.time_embedding.linear_2(tnn.functional.silu(self.time_embedding.linear_1(t)))
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x, t)
        return self.conv_out(x)


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x: Any) -> Any:
        h = nn.LayerNorm(epsilon=1e-5, name="norm1")(x)
        q, k, v = (nn.Dense(8, name=name, use_bias=False)(h) for name in ("query", "to_k", "to_v"))
        h = nn.softmax(q @ k.swapaxes(-1, -2) / 8**0.5) @ v
        return x + nn.Dense(8, name="to_out_0")(h)


@wf.register_to_config
class Transformer(nn.Module, wf.FlaxModelMixin, wl.ConfigMixin):
    layers: int = 2

    @nn.compact
    def __call__(self, tokens: Any) -> Any:
        x = nn.Embed(11, 8, name="tokens")(tokens)
        for number in range(self.layers):
            x = LinenLayer(name=f"layers_{number}")(x)
        return x

    def init_weights(self, rng: Any) -> Any:
        return self.init(rng, jnp.zeros((1, 4), jnp.int32))["params"]


class NNXLayer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1 = nnx.LayerNorm(8, epsilon=1e-5, rngs=rngs)
        self.query, self.to_k, self.to_v = (
            nnx.Linear(8, 8, use_bias=False, rngs=rngs) for _ in range(3)
        )
        self.to_out_0 = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        h = self.norm1(x)
        q, k, v = self.query(h), self.to_k(h), self.to_v(h)
        return x + self.to_out_0(nnx.softmax(q @ k.swapaxes(-1, -2) / 8**0.5) @ v)


class NNXTransformer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.tokens = nnx.Embed(11, 8, rngs=rngs)
        self.layers = nnx.List([NNXLayer(rngs) for _ in range(2)])

    def __call__(self, tokens: Any) -> Any:
        x = self.tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


class NNXUNet(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.conv_in = nnx.Conv(3, 8, (3, 3), padding=1, rngs=rngs)
        self.down_blocks = nnx.List([nnx.Conv(8, 8, (3, 3), padding=1, rngs=rngs)])
        self.norm = nnx.GroupNorm(8, 4, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.norm(self.down_blocks[0](self.conv_in(x)))


def torch_transformer() -> tuple[dict[str, torch.Tensor], Any]:
    torch.manual_seed(1)
    state = {"tokens.weight": torch.randn(11, 8)}
    for n in range(2):
        state |= {
            f"layers.{n}.norm1.weight": torch.randn(8),
            f"layers.{n}.norm1.bias": torch.randn(8),
            **{f"layers.{n}.{name}.weight": torch.randn(8, 8) for name in ("to_q", "to_k", "to_v")},
            f"layers.{n}.to_out.0.weight": torch.randn(8, 8),
            f"layers.{n}.to_out.0.bias": torch.randn(8),
        }

    def run(tokens: Any) -> Any:
        F = tnn.functional
        x = state["tokens.weight"][tokens]
        for n in range(2):
            own = {k.removeprefix(f"layers.{n}."): v for k, v in state.items()}
            h = F.layer_norm(x, (8,), own["norm1.weight"], own["norm1.bias"])
            q, k, v = (F.linear(h, own[f"{name}.weight"]) for name in ("to_q", "to_k", "to_v"))
            h = torch.softmax(q @ k.mT / 8**0.5, -1) @ v
            x = x + F.linear(h, own["to_out.0.weight"], own["to_out.0.bias"])
        return x

    return state, run


@pytest.fixture(scope="module")
def torch_unet(tmp_path_factory: pytest.TempPathFactory) -> tuple[TorchUNet, Path]:
    torch.manual_seed(0)
    model = TorchUNet()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    folder = tmp_path_factory.mktemp("torch_unet")
    model.save_pretrained(folder)
    return model, folder


def assert_computes_the_same(model: UNet, params: Any, theirs: TorchUNet) -> None:
    x = np.random.default_rng(0).standard_normal((2, 6, 5, 3)).astype(np.float32)
    t = np.random.default_rng(1).standard_normal((2, 4)).astype(np.float32)
    ours = jax.jit(model.apply)({"params": params}, x, t)
    with torch.no_grad():
        expected = theirs(torch.tensor(x).permute(0, 3, 1, 2), torch.tensor(t))
    np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1), rtol=1e-3, atol=1e-3)


def test_a_unet_from_torch_computes_the_same(torch_unet: tuple[TorchUNet, Path]) -> None:
    theirs, folder = torch_unet
    model, params = UNet.from_pretrained(folder, from_pt=True)
    assert_computes_the_same(model, params, theirs)


def test_what_bench_compares(
    torch_unet: tuple[TorchUNet, Path], request: pytest.FixtureRequest
) -> None:
    """The loop that users of safetensors write gives the model's parameters; so does weightlift."""
    # In a measured process, phases stay recorded.
    request.addfinalizer(lambda: observe_phases(None))
    theirs, folder = torch_unet
    (file,) = folder.glob("*.safetensors")
    job = Job("", (str(file),), folder=str(folder))
    trees = {}
    for name in ("safetensors.flax", "weightlift.flax"):
        assert CONTENDERS[name].why_not(job) is None
        trees[name] = CONTENDERS[name].prepare(job)()
    assert_computes_the_same(UNet(), trees["safetensors.flax"], theirs)
    same(trees["weightlift.flax"], trees["safetensors.flax"])
    found = _tensors(trees["weightlift.flax"])
    kernel = theirs.conv_in.weight.detach().permute(2, 3, 1, 0)
    assert bits(found["conv_in.kernel"]) == bits(kernel)
    assert len(found) == len(theirs.state_dict())
    assert checksum(found) == checksum(_tensors(trees["safetensors.flax"]))


def test_what_bench_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    contender = CONTENDERS["weightlift.flax"]
    assert contender.why_not(Job("")) == "it loads models, and this is no model's folder"
    monkeypatch.setitem(sys.modules, "flax", None)
    assert contender.why_not(Job("", folder=str(tmp_path))) == "jax and flax are not installed"


@pytest.mark.parametrize("form", ["safetensors", "shards", "bin"])
def test_there_and_back(torch_unet: tuple[TorchUNet, Path], tmp_path: Path, form: str) -> None:
    theirs, _ = torch_unet
    more: dict[str, Any] = {"shards": {"max_shard_size": "4KB"}}.get(form, {})
    theirs.save_pretrained(tmp_path / "pt", safe_serialization=form != "bin", **more)
    model, params = UNet.from_pretrained(tmp_path / "pt", from_pt=True)
    assert params["conv_in"]["kernel"].shape == (3, 3, 3, 8)
    assert isinstance(params["conv_in"]["kernel"], jax.Array)
    if form == "bin":  # torch.save writes into the very file
        file = tmp_path / "pt/diffusion_pytorch_model.bin"
        os.truncate(file, 0)
        np.asarray(jax.tree.map(jnp.sum, params)["conv_in"]["bias"])
    model.save_pretrained(tmp_path / "flax", params)
    back = TorchUNet.from_pretrained(tmp_path / "flax", from_flax=True)
    assert_same_tensors(dict(back.state_dict()), dict(theirs.state_dict()))


class TorchTokens(wl.ModelMixin, wl.ConfigMixin):
    config_name = "config.json"

    @wl.register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.tokens = tnn.Embedding(5, 3)
        self.layers = tnn.ModuleList([tnn.Conv1d(3, 2, 4), tnn.LayerNorm(2)])


def test_embeddings_there_and_back(tmp_path: Path) -> None:
    theirs = TorchTokens()
    theirs.save_pretrained(tmp_path)
    shapes = {
        "tokens": {"embedding": (5, 3)},
        "layers_0": {"kernel": (4, 3, 2), "bias": (2,)},
        "layers_1": {"scale": (2,), "bias": (2,)},
    }
    like = {
        module: {leaf: jax.ShapeDtypeStruct(shape, jnp.float32) for leaf, shape in leaves.items()}
        for module, leaves in shapes.items()
    }
    params = wf.load_params(tmp_path, like, from_pt=True)
    wf.save_params(params, tmp_path / FILE)
    back = TorchTokens.from_pretrained(tmp_path, from_flax=True)
    assert_same_tensors(dict(back.state_dict()), dict(theirs.state_dict()))


def test_a_transformer_from_torch_computes_the_same(tmp_path: Path) -> None:
    state, run = torch_transformer()
    save_torch_file(state, tmp_path / "model.safetensors")
    model = Transformer()
    model.save_config(tmp_path)
    _, params = Transformer.from_pretrained(tmp_path, from_pt=True)
    tokens = np.array([[1, 5, 10, 0]])
    expected = run(torch.tensor(tokens))
    ours = model.apply({"params": params}, tokens)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)

    like = nnx.to_pure_dict(
        nnx.state(nnx.eval_shape(lambda: NNXTransformer(nnx.Rngs(0))), nnx.Param)
    )
    loaded = wf.load_params(tmp_path, like, from_pt=True)
    assert list(loaded["layers"]) == [0, 1]
    module = nnx.eval_shape(lambda: NNXTransformer(nnx.Rngs(0)))
    nnx.update(module, loaded)
    np.testing.assert_allclose(module(tokens), expected, rtol=1e-4, atol=1e-4)


def test_an_nnx_unet_and_its_file(tmp_path: Path) -> None:
    module = nnx.eval_shape(lambda: NNXUNet(nnx.Rngs(3)))
    other = nnx.eval_shape(lambda: NNXUNet(nnx.Rngs(3)))
    rng = np.random.default_rng(0)
    state = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32),
        nnx.to_pure_dict(nnx.state(module, nnx.Param)),
    )
    nnx.update(module, jax.tree.map(jnp.asarray, state))
    wf.save_params(state, tmp_path / FILE)
    same(
        flax.serialization.msgpack_restore((tmp_path / FILE).read_bytes()),
        flax.serialization.to_state_dict(state),
    )
    nnx.update(other, wf.load_params(tmp_path, state))
    x = np.ones((1, 4, 4, 3), np.float32)
    np.testing.assert_array_equal(module(x), other(x))


def test_files_are_those_of_flax(tmp_path: Path) -> None:
    model = Small(6)
    params = model.init_weights(KEY)
    model.save_pretrained(tmp_path, params)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", FILE]
    assert (tmp_path / FILE).read_bytes() == flax.serialization.to_bytes(params)

    (tmp_path / FILE).rename(tmp_path / "flax_model.msgpack")
    for place in (tmp_path, tmp_path / "flax_model.msgpack"):
        again, loaded = Small.from_pretrained(place)
        same(loaded, params)
        assert again == model
        assert again.config.features == 6
        assert again.config._name_or_path == str(place)
    model.save_pretrained(tmp_path / "other", params, is_main_process=False)
    assert not list((tmp_path / "other").iterdir())


@pytest.mark.parametrize("limit", [None, 64])
def test_every_dtype_and_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    if limit:
        monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", limit)
        monkeypatch.setattr(params_module, "_MAX_CHUNK_BYTES", limit)
    names = "float32 float16 bfloat16 int8 uint16 int32 bool complex64 float8_e4m3fn float8_e5m2"
    rng = np.random.default_rng(0)
    tree: dict[str, Any] = {
        name: jnp.asarray(rng.integers(0, 2, (3, 5, 7))).astype(name) for name in names.split()
    }
    # Beyond the size limits of msgpack's headers of extensions and bytes.
    tree["sizes"] = {str(n): np.arange(n, dtype=np.uint8) for n in (0, 1, 2, 240, 255, 256, 65536)}
    tree["scalar"] = jnp.float32(2)
    tree["turned"] = np.arange(6, dtype=np.int32).reshape(2, 3).T
    wf.save_params(tree, tmp_path / FILE)
    written = (tmp_path / FILE).read_bytes()
    assert written == flax.serialization.to_bytes(tree)
    assert (b"chunked" in written) == bool(limit)
    if not limit:
        same(wf.load_params(tmp_path, tree), tree)
    else:
        part = {"float32": tree["float32"], "bfloat16": tree["bfloat16"]}
        same(wf.load_params(tmp_path, part), part)


def test_big_endian_numbers(tmp_path: Path) -> None:
    array = np.arange(4, dtype=">f4")
    wf.save_params({"w": array}, tmp_path / FILE)
    same(wf.load_params(tmp_path, {"w": array}), {"w": np.arange(4, dtype="<f4")})
    wf.save_file({"w": array}, tmp_path / "w.safetensors")
    np.testing.assert_array_equal(wf.load_file(tmp_path / "w.safetensors")["w"], array)


def test_casts_with_a_mask() -> None:
    model = UNet()
    params = {"a": {"w": jnp.ones(2), "n": jnp.ones(2, jnp.int32)}, "b": jnp.full(1, 1e-8)}
    for cast, dtype in (
        (model.to_bf16, jnp.bfloat16),
        (model.to_fp16, jnp.float16),
        (model.to_fp32, jnp.float32),
    ):
        whole = cast(params)
        same(
            whole,
            {"a": {"w": jnp.ones(2, dtype), "n": params["a"]["n"]}, "b": params["b"].astype(dtype)},
        )
    mask = {"a": {"w": True, "n": True}, "b": False}
    assert model.to_bf16(params, mask)["b"].dtype == jnp.float32
    assert model.to_bf16(params, mask)["a"]["w"].dtype == jnp.bfloat16
    with pytest.raises(wl.ArgumentError, match=r"a\.n"):
        model.to_bf16(params, {"a": {"w": True}, "b": False})


def test_the_config(tmp_path: Path, torch_unet: tuple[TorchUNet, Path]) -> None:
    _, folder = torch_unet
    model, _ = UNet.from_pretrained(folder, jnp.bfloat16, from_pt=True)
    assert model.dtype == jnp.bfloat16
    assert "dtype" not in model.config
    assert hash(model) == hash(UNet((8, 8), 3, jnp.bfloat16))
    assert UNet(out_channels=3).config._use_default_values == ["channels"]
    with pytest.raises(
        wl.CheckpointError, match=r"conv_out\.kernel.*\[1, 3, 8, 3\].*\[1, 3, 8, 4\]"
    ):
        UNet.from_pretrained(folder, from_pt=True, out_channels=4)
    with pytest.raises(wl.CheckpointError, match=r"conv_out\.bias"):
        UNet.from_pretrained(folder, jnp.float32, (8, 8), 4, from_pt=True)
    with pytest.raises(wl.ArgumentError, match="did you mean 'out_channels'"):
        UNet.from_pretrained(folder, out_chanels=3)
    with pytest.raises(wl.ArgumentError, match="by its position"):
        UNet.from_pretrained(folder, jnp.float32, (8, 8), channels=(8,))
    config = {"channels": [8, 8], "out_channels": 3}
    file = folder / "diffusion_pytorch_model.safetensors"
    assert UNet.from_pretrained(file, config=config, from_pt=True)[0] == UNet()
    UNet().save_pretrained(tmp_path, {})
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["channels"], saved["_class_name"]) == ([8, 8], "UNet")
    with pytest.raises(RuntimeError, match="ConfigMixin"):
        wf.flax_register_to_config(LinenLayer)


def test_missing_and_unexpected(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {
        "linear.weight": torch.randn(8, 5),
        "norm1.bias": torch.randn(8),
        "steps": torch.tensor(7),  # int64, which jax would refuse
    }
    save_torch_file(state, tmp_path / "model.safetensors")
    Small().save_config(tmp_path)
    with caplog.at_level(logging.WARNING, "weightlift"):
        _, params = Small.from_pretrained(tmp_path, from_pt=True)
    for name in ("linear.bias", "norm1.scale", "steps"):
        assert name in caplog.text
    expected = {
        "linear": {"kernel": state["linear.weight"].numpy().T, "bias": np.zeros(8, np.float32)},
        "norm1": {"scale": np.ones(8, np.float32), "bias": state["norm1.bias"].numpy()},
    }
    same(params, expected)
    with pytest.raises(wl.CheckpointError, match=r"linear\.bias"):
        wf.load_params(tmp_path, expected, from_pt=True)


def test_arguments_that_say_nothing(tmp_path: Path) -> None:
    like = {"linear": {"bias": np.zeros(2)}}
    with pytest.raises(wl.ArgumentError, match="load_params has no argument 'form_pt'"):
        wf.load_params(tmp_path, like, form_pt=True)
    with pytest.raises(wl.ArgumentError, match="variant='fp16' is for torch weights"):
        wf.load_params(tmp_path, like, variant="fp16")
    twice = {"layers_0": np.zeros(2), "layers": {0: np.zeros(2)}}
    with pytest.raises(wl.ArgumentError, match="has both 'name_0' and the item 0 of 'name'"):
        wf.load_params(tmp_path, twice)
    with pytest.raises(wl.ArgumentError, match=r"UNet has \d fields, and 9 given"):
        UNet.from_pretrained(tmp_path, jnp.float32, *range(9), config={})


def test_a_tree_that_the_weights_have_nothing_of(tmp_path: Path) -> None:
    save_torch_file({"other": torch.ones(2)}, tmp_path / "model.safetensors")
    assert wf.load_params(tmp_path, {}, from_pt=True) == {}


def test_two_tensors_for_one_parameter(tmp_path: Path) -> None:
    tensors = {"norm.weight": torch.ones(3), "norm.scale": torch.zeros(3)}
    save_torch_file(tensors, tmp_path / "model.safetensors")
    like = {"norm": {"scale": np.zeros(3)}}
    with pytest.raises(wl.CheckpointError, match=r"'norm\.\w+' and 'norm\.\w+' would both be "):
        wf.load_params(tmp_path, like, from_pt=True)


def test_leaves_that_no_file_can_have(tmp_path: Path) -> None:
    pairs = np.zeros(3, [("a", "f4"), ("b", "i4")])
    for leaf in (pairs, np.array([{}, []], object)):
        with pytest.raises(wl.ArgumentError, match=r"leaf 'a\.b' cannot be saved: its dtype is"):
            Small().save_pretrained(tmp_path, {"a": {"b": leaf}})
    assert not (tmp_path / FILE).exists()


def test_a_model_that_says_not_how_it_begins() -> None:
    class Bare(nn.Module, wf.FlaxModelMixin, wl.ConfigMixin):
        pass

    with pytest.raises(NotImplementedError, match=r"Bare must define init_weights\(rng\)"):
        Bare().init_weights(jax.random.PRNGKey(0))


def test_fields_with_factories() -> None:
    @wf.flax_register_to_config
    class Wide(nn.Module, wf.FlaxModelMixin, wl.ConfigMixin):
        config_name = "config.json"
        widths: list[int] = dataclasses.field(default_factory=lambda: [4, 8])

    assert list(Wide().widths) == [4, 8]
    assert list(Wide().config.widths) == [4, 8]
    assert list(Wide(widths=[2]).config.widths) == [2]


def test_bad_files_of_flax(tmp_path: Path) -> None:
    model = Small()
    params = zeros(model)
    model.save_pretrained(tmp_path, params)
    file = tmp_path / FILE
    whole = file.read_bytes()

    def refused(kind: type[Exception], *parts: str) -> None:
        with pytest.raises(kind) as caught:
            Small.from_pretrained(tmp_path)
        for part in (str(tmp_path), *parts):
            assert part in str(caught.value)

    def with_bias(bias: Any) -> Any:
        return {**params, "linear": {**params["linear"], "bias": bias}}

    file.write_bytes(whole[: len(whole) // 2])
    refused(wl.FormatError, FILE, "download it")
    torch.save({"w": torch.ones(1)}, file)
    refused(wl.FormatError, FILE, "from_pt=True")
    wf.save_params({"another": {"kernel": np.ones(2)}}, file)
    refused(wl.CheckpointError, FILE, "another.kernel", "linear.kernel")
    wf.save_params(with_bias(np.ones(9, np.float32)), file)
    refused(wl.CheckpointError, FILE, "linear.bias", "[9]", "[8]")
    wf.save_params(with_bias(np.ones(8)), file)
    refused(wl.FormatError, FILE, "linear.bias", "jax_enable_x64")
    file.unlink()
    refused(wl.CheckpointError, "from_pt=True")
    with pytest.raises(FileNotFoundError):
        wf.load_params(file, params)
    with pytest.raises(wl.ArgumentError, match=r"a\.b.*str"):
        wf.save_params({"a": {"b": "text"}}, file)
    assert not file.exists()
    with pytest.raises(wl.ArgumentError, match="is a file"):
        model.save_pretrained(tmp_path / "config.json", params)


@uploads
def test_from_and_to_the_hub(hub: HubServer, tmp_path: Path) -> None:
    model = Small(6)
    params = zeros(model)
    model.push_to_hub("user/mine", params, commit_message="first")
    again, loaded = Small.from_pretrained("user/mine", cache_dir=tmp_path)
    assert again == model
    same(loaded, params)
    model.save_pretrained(tmp_path / "saved", params, push_to_hub=True, repo_id="user/other")
    same(Small.from_pretrained("user/other")[1], params)
    with pytest.raises(wl.CheckpointError, match=r"user/mine.*without from_pt"):
        Small.from_pretrained("user/mine", from_pt=True)
    hub.add("user/bare", {"README.md": b"nothing yet"})
    with pytest.raises(wl.CheckpointError, match=r"user/bare: there is neither "):
        wf.load_params("user/bare", params)


def numpy_name(own: str) -> str:
    return str(DTYPES[own]).removeprefix("torch.")


WIDE = ("F64", "I64", "U64")


@pytest.mark.parametrize("pad", [0, 3])
def test_load_file(tmp_path: Path, pad: int) -> None:
    file = tmp_path / "all.safetensors"
    entries = {own: entry(own, [16, 6], n) for n, own in enumerate(DTYPES) if own not in WIDE}
    entries |= {"empty": entry("F32", [0, 3]), "scalar": entry("BF16", [], 3)}
    file.write_bytes(file_bytes(entries, pad=pad))
    loaded = wf.load_file(file)
    assert list(loaded) == list(entries)
    packed = np.frombuffer(entries["F4"][2], np.uint8).reshape(16, 3)
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(16, 6)
    assert loaded["F4"].dtype == jnp.float4_e2m1fn
    np.testing.assert_array_equal(np.asarray(loaded["F4"]).view(np.uint8), codes)
    for name, (own, shape, data) in entries.items():
        if own != "F4":
            assert loaded[name].dtype == jnp.dtype(numpy_name(own))
            assert loaded[name].shape == tuple(shape)
            assert np.asarray(loaded[name]).tobytes() == data

    saved = tmp_path / "saved.safetensors"
    wf.save_file(loaded, saved, {"format": "flax"})
    with wl.safe_open(saved) as opened:
        assert opened.metadata() == {"format": "flax"}
        for name, (own, shape, data) in entries.items():
            found = opened.get_slice(name)
            assert (found.get_dtype(), found.get_shape()) == (own, shape)
            assert opened.get_tensor(name).reshape(-1).view(torch.uint8).numpy().tobytes() == data


def test_files_of_safetensors_flax(tmp_path: Path) -> None:
    w = jnp.arange(12.0).reshape(3, 4)
    tree = {"a": w, "same": w, "b": w.astype(jnp.bfloat16), "i": w.T.astype(jnp.int32)}
    safetensors.flax.save_file(dict(tree), tmp_path / "theirs.safetensors")
    wf.save_file(tree, tmp_path / "ours.safetensors")
    ours, theirs = (tmp_path / f"{who}.safetensors" for who in ("ours", "theirs"))
    assert ours.read_bytes() == theirs.read_bytes()
    same(wf.load_file(ours), safetensors.flax.load_file(theirs))
    half = wf.load_file(ours, dtype=jnp.float16)
    same(half, {name: v if name == "i" else v.astype(jnp.float16) for name, v in tree.items()})


def test_dtypes_that_jax_lacks(tmp_path: Path) -> None:
    file = tmp_path / "f.safetensors"
    for own in ("F64", "I64", "U64", "F6_E2M3"):
        file.write_bytes(file_bytes({"fine": entry("U8", [1]), "w.x": entry(own, [4])}))
        with pytest.raises(wl.FormatError) as caught:
            wf.load_file(file)
        assert (caught.value.code, caught.value.tensor) == ("unsupported_dtype", "w.x")
        assert str(file) in str(caught.value)
        if own != "F6_E2M3":
            assert "jax_enable_x64" in str(caught.value)
            with jax.enable_x64(True):
                assert wf.load_file(file)["w.x"].dtype == jnp.dtype(numpy_name(own))
    numbers = np.array([1.5, -2.0])
    safetensors.numpy.save_file({"w": numbers}, file)
    np.testing.assert_array_equal(wf.load_file(file, dtype=jnp.float32)["w"], numbers)
    for bad in ("int32", jnp.complex64, "nonsense"):
        with pytest.raises(wl.ArgumentError, match="dtype"):
            wf.load_file(file, dtype=bad)
    for value, text in (
        (np.ones(2, np.complex128), "complex128"),
        (np.ones(2).astype(ml_dtypes.float8_e3m4), "float8_e3m4"),
        (np.ones(3).astype(ml_dtypes.float4_e2m1fn), "even"),
        ([1.0], "list"),
    ):
        with pytest.raises(wl.ArgumentError, match=f"'w'.*{text}"):
            wf.save_file({"w": value}, tmp_path / "none.safetensors")
    assert not (tmp_path / "none.safetensors").exists()


SHARDED = """
import sys
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P, SingleDeviceSharding
import safetensors.numpy, weightlift as wl, weightlift.flax as wf

file, coordinator, process = sys.argv[1:]
jax.distributed.initialize(coordinator, 2, int(process))
theirs = safetensors.numpy.load_file(file)
mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("x", "y"))
assert len(jax.local_devices()) == 2

def right(array, wanted, where):
    assert array.sharding == where and array.dtype == wanted.dtype
    assert array.shape == wanted.shape
    for shard in array.addressable_shards:
        found = np.asarray(shard.data)
        assert np.array_equal(found, wanted[shard.index]), (where, shard)

size = sum(array.nbytes for array in theirs.values())
# What the file holds of the parts of a process, whose devices are a row of the mesh.
cuts = {P("x"): 1/2, P(None, "y"): 1, P("y", "x"): 1/2, P(("x", "y")): 1/2, P("x", "y"): 1/2}
for cut, share in cuts.items():
    where = NamedSharding(mesh, cut)
    ours = wf.load_file(file, sharding=where)
    report = wl.last_report()
    assert report.bytes == size * share, (cut, report.bytes, size)
    for name, array in ours.items():
        right(array, theirs[name], where)
where = NamedSharding(mesh, P())
for name, array in wf.load_file(file, sharding=where).items():
    right(array, theirs[name], where)
where = NamedSharding(mesh, P("x"))
for name, array in wf.load_file(file, sharding=where, dtype="bfloat16").items():
    cast = theirs[name] if name == "i" else theirs[name].astype(jnp.bfloat16)
    right(array, cast, where)

here = SingleDeviceSharding(jax.local_devices()[1])
ours = wf.load_file(file, sharding={"w": where, "h": here})
right(ours["w"], theirs["w"], where)
right(ours["h"], theirs["h"], here)
assert ours["i"].devices() == {jax.local_devices()[0]}

def refused(call, *texts):
    try:
        call()
    except wl.ArgumentError as error:
        assert all(text in str(error) for text in texts), error
    else:
        raise AssertionError(texts)

uneven = NamedSharding(mesh, P(None, ("x", "y")))
refused(lambda: wf.load_file(file, sharding=uneven), "'w'", "[8, 6]", file)
refused(lambda: wf.load_file(file, sharding={"nowhere": where}), "nowhere", file)
refused(lambda: wf.save_file(ours, file), "'w'", "process_allgather")
"""


def test_shardings(tmp_path: Path) -> None:
    """Two processes with two devices each: a process reads the parts of its devices."""
    file = tmp_path / "s.safetensors"
    w = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    safetensors.numpy.save_file(
        {"w": w, "h": w.astype(np.float16), "i": (w * 9).astype(np.int32)}, file
    )
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARDED, file, coordinator, str(number)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors


def test_without_jax() -> None:
    code = (
        "import sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('jax', 'jaxlib', 'flax', 'ml_dtypes'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "import weightlift, weightlift.flax\n"
        "for name in weightlift.flax.__all__:\n"
        "    try:\n"
        "        getattr(weightlift.flax, name)\n"
        "    except ImportError as error:\n"
        "        assert \"pip install 'weightlift[flax]'\" in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(name)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_weightlift_does_not_import_jax() -> None:
    code = "import sys, weightlift, weightlift.flax; assert not {'jax', 'flax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)

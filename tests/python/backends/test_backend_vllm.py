"""The loader for vLLM against a small stand-in of vLLM's; ``make test-serving`` has vLLM."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import weightlift as wl
from weightlift.load.read_ahead import read_ahead

STAND_IN = Path(__file__).parents[1] / "helpers" / "fake_vllm"
LOADERS = "vllm.model_executor.model_loader"


@pytest.fixture
def loaders(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(STAND_IN))
    from weightlift.backends.vllm import register

    before = list(sys.meta_path)
    register()
    register()
    yield importlib.import_module(LOADERS)
    for name in [n for n in sys.modules if n == "vllm" or n.startswith("vllm.")]:
        del sys.modules[name]
    sys.modules.pop("weightlift.backends.vllm.loader", None)
    assert sys.meta_path == before


class Rank(nn.Module):
    """A rank of two, with a merged weight, experts, and a weight that the checkpoint lacks."""

    def __init__(self, rank: int = 1) -> None:
        super().__init__()
        self.rank = rank
        self.qkv = nn.Parameter(torch.zeros(96, 64, dtype=torch.bfloat16), requires_grad=False)
        self.experts = nn.Parameter(torch.zeros(4, 32, 64), requires_grad=False)
        self.scale = nn.Parameter(torch.zeros(1), requires_grad=False)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = set()
        for name, tensor in weights:
            if name[:1] in "qkv":
                at = "qkv".index(name[0]) * 32
                self.qkv.data[at : at + 32].copy_(tensor[self.rank * 32 : self.rank * 32 + 32])
                loaded.add("qkv")
            elif ".experts." in name:
                expert = int(name.split(".")[2])
                self.experts.data[expert].copy_(tensor.narrow(0, self.rank * 32, 32))
                loaded.add("experts")
            elif name == "scale":
                self.scale.data.fill_(tensor.item())
                loaded.add("scale")
        return loaded


TENSORS = {
    **{f"{name}.weight": torch.randn(64, 64) for name in "qkv"},
    **{f"mlp.experts.{i}.w": torch.randn(64, 64) for i in range(4)},
    "scale": torch.tensor(3.0),
    "unused": torch.ones(1000),
}


def config(**extra: Any) -> SimpleNamespace:
    return SimpleNamespace(load_format="weightlift", model_loader_extra_config=extra)


def folder_of(path: Path) -> Path:
    names = list(TENSORS)
    for i in range(2):
        part = {name: TENSORS[name].clone() for name in names[i::2]}
        save_file(part, path / f"model-{i + 1}-of-2.safetensors")
    return path


def loaded(loaders: Any, folder: Path, model: Rank, kind: str = "weightlift", **extra: Any) -> Any:
    stock = importlib.import_module(f"{LOADERS}.default_loader").DefaultModelLoader
    given = config(**extra)
    if kind == "auto":
        given.load_format = "auto"
    loader = (loaders._LOAD_FORMAT_TO_MODEL_LOADER["weightlift"] if kind != "auto" else stock)(
        given
    )
    loader.load_weights(model, SimpleNamespace(model=str(folder), quantization=None))
    return loader


def assert_same(found: nn.Module, wanted: nn.Module) -> None:
    for (name, left), (_, right) in zip(
        found.named_parameters(), wanted.named_parameters(), strict=True
    ):
        assert torch.equal(left, right), name


def test_it_is_registered_once_and_when_the_loaders_are_imported(loaders: Any) -> None:
    assert loaders.registrations == ["weightlift"]


def test_nothing_is_imported_before(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from weightlift.backends.vllm import register\n"
        "register()\n"
        "assert not any(name.startswith('vllm') for name in sys.modules)\n"
        f"sys.path.insert(0, {str(STAND_IN)!r})\n"
        f"import {LOADERS} as loaders\n"
        "assert loaders.registrations == ['weightlift']\n"
        "register()\n"
        "assert loaders.registrations == ['weightlift']\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_a_version_that_is_not_known_is_left_alone(
    loaders: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from weightlift.backends.vllm import register

    monkeypatch.delattr(loaders, "_LOAD_FORMAT_TO_MODEL_LOADER")
    register()
    assert caplog.messages == [
        "this version of vLLM accepts no additional load format: use --load-format auto"
    ]


def test_the_stock_loader_serves_where_vllm_has_other_hooks(
    loaders: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from weightlift.backends.vllm import register

    stock = importlib.import_module(f"{LOADERS}.default_loader").DefaultModelLoader
    with monkeypatch.context() as changed:
        changed.setattr(loaders, "_LOAD_FORMAT_TO_MODEL_LOADER", {})
        changed.delitem(sys.modules, "weightlift.backends.vllm.loader")
        changed.setattr(stock, "_prepare_weights", lambda self, source: None)
        register()
        assert caplog.messages == []
        kind = loaders._LOAD_FORMAT_TO_MODEL_LOADER["weightlift"]
    loader = kind(config(slices=False))
    assert type(loader) is stock
    (message,) = caplog.messages
    assert "takes other arguments): vLLM's own loader is used" in message
    found, wanted = Rank(), Rank()
    loader.load_weights(found, SimpleNamespace(model=str(folder_of(tmp_path)), quantization=None))
    wanted.load_weights(TENSORS.items())
    assert_same(found, wanted)


@pytest.mark.parametrize("extra", [{}, {"slices": False}, {"check": True}, {"share": True}])
def test_the_same_as_the_stock_loader(loaders: Any, extra: Any, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    wanted, found = Rank(), Rank()
    loaded(loaders, folder, wanted, "auto")
    loader = loaded(loaders, folder, found, **extra)
    assert_same(found, wanted)
    if not extra:
        slices = 3 * 32 * 64 * 4 + 4 * 32 * 64 * 4 + 4
        assert loader._reader.report.bytes == slices
        assert loader._reader.offered == sum(t.numel() * 4 for t in TENSORS.values())


class Counting(Rank):
    """A model whose second load gives another result."""

    loads = 0

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        loaded = super().load_weights(weights)
        self.loads += 1
        self.qkv.data[3] += self.loads - 1
        return loaded


def test_check_finds_a_difference(loaders: Any, tmp_path: Path) -> None:
    with pytest.raises(wl.CheckpointError, match=r"^qkv \(1 in all\): whole tensors give other"):
        loaded(loaders, folder_of(tmp_path), Counting(), check=True)


def test_what_is_read_is_said_in_the_log(
    loaders: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    loaded(loaders, folder_of(tmp_path), Rank())
    assert "weightlift read 57.3 kB of 118.7 kB in" in caplog.text
    assert "the slices of this rank are 57.3 kB; 1 came whole by item(): scale" in caplog.text


def reload(loaders: Any, folder: Path, model: Rank, **extra: Any) -> Any:
    """Like vLLM's ``reload_weights``: with a loader that has loaded nothing."""
    loader = loaders._LOAD_FORMAT_TO_MODEL_LOADER["weightlift"](config(**extra))
    model_config = SimpleNamespace(model=str(folder), quantization=None)
    model.load_weights(loader.get_all_weights(model_config, model))
    return loader


def test_loaded_again_by_the_slices_of_the_first_time(
    loaders: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    folder = folder_of(tmp_path)
    model, wanted = Rank(), Rank()
    loaded(loaders, folder, model)
    wanted.load_weights(TENSORS.items())
    for parameter in model.parameters():
        parameter.data.fill_(9)
    loader = reload(loaders, folder, model)
    assert_same(model, wanted)
    assert loader._reader.report.bytes == 7 * 32 * 64 * 4 + 4
    assert caplog.text.count("the slices of this rank are 57.3 kB") == 2
    assert reload(loaders, folder, model, slices=False)._reader.report.bytes > 118_000


def test_loaded_again_from_another_checkpoint(loaders: Any, tmp_path: Path) -> None:
    model, wanted = Rank(), Rank()
    loaded(loaders, folder_of(tmp_path), model)
    other = {name: tensor * 2 + 1 for name, tensor in TENSORS.items()}
    (tmp_path / "same").mkdir()
    save_file(other, tmp_path / "same" / "model.safetensors")
    assert reload(loaders, tmp_path / "same", model)._reader.report.bytes == 7 * 32 * 64 * 4 + 4
    wanted.load_weights(other.items())
    assert_same(model, wanted)
    # Of another dtype: whole tensors.
    halves = {name: tensor.half() for name, tensor in other.items()}
    (tmp_path / "half").mkdir()
    save_file(halves, tmp_path / "half" / "model.safetensors")
    whole = sum(tensor.nbytes for tensor in halves.values())
    assert reload(loaders, tmp_path / "half", model)._reader.report.bytes == whole
    wanted.load_weights(halves.items())
    assert_same(model, wanted)


def test_a_model_that_another_loader_has_loaded(loaders: Any, tmp_path: Path) -> None:
    model, wanted = Rank(), Rank()
    reload(loaders, folder_of(tmp_path), model)
    wanted.load_weights(TENSORS.items())
    assert_same(model, wanted)


class Processed(nn.Module):
    """Like a layer of vLLM whose ``process_weights_after_loading`` swaps its parameter.

    Quantized online, or loaded again: the weight lies on meta until all tensors have come. Then the
    layer is made, filled and processed while the model's loading still runs.
    """

    def __init__(self, swap: str, device: str) -> None:
        super().__init__()
        self.swap = swap
        self.kernel: list[nn.Parameter] = []  # the parameter with which a loaded layer computes
        self.begin(device)

    def begin(self, device: str) -> None:
        self.weight = nn.Parameter(torch.empty(64, 64, device=device), requires_grad=False)
        self.buffered: list[tuple[str, Tensor]] = []

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        for name, tensor in weights:
            if name not in ("q.weight", "k.weight"):
                continue
            self.fill(name, tensor)  # on meta, as vLLM counts the elements
            if self.weight.is_meta:
                self.buffered.append((name, tensor))
                if len(self.buffered) == 2:
                    self.make()
        return {"weight"}

    def fill(self, name: str, tensor: Tensor) -> None:
        at = "qk".index(name[0]) * 32
        self.weight.data[at : at + 32].copy_(tensor.narrow(0, 32, 32))

    def make(self) -> None:
        made = torch.empty_like(self.weight, device="cpu")
        self.weight = nn.Parameter(made, requires_grad=False)
        for name, tensor in self.buffered:
            self.fill(name, tensor)
        self.buffered.clear()
        self.process_weights_after_loading()
        for kernel in self.kernel:
            kernel.data.copy_(self.weight)
            self.weight = kernel

    def process_weights_after_loading(self) -> None:
        scale = self.weight.abs().amax(dim=1, keepdim=True) / 127
        quantized = (self.weight / scale).round().to(torch.int8)
        if self.swap == "parameter":
            del self.weight
            self.register_parameter("weight", nn.Parameter(quantized.t(), requires_grad=False))
        elif self.swap == "data":
            self.weight.data = quantized.t().contiguous()
        else:
            self.weight.data.copy_(quantized * scale)

    def load_again(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.kernel = [self.weight]
        self.begin("meta")
        self.load_weights(weights)


@pytest.mark.parametrize("extra", [{}, {"slices": False}])
@pytest.mark.parametrize("swap", ["parameter", "data", "in place"])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_parameters_that_are_swapped_when_they_are_processed(
    loaders: Any, device: str, swap: str, extra: dict[str, bool], tmp_path: Path
) -> None:
    """After loading and, from meta, while it runs; then reloaded from another checkpoint."""
    found, wanted = Processed(swap, device), Processed(swap, device)
    loader = loaded(loaders, folder_of(tmp_path), found, **extra)
    wanted.load_weights(TENSORS.items())
    if device == "cpu":
        found.process_weights_after_loading()
        wanted.process_weights_after_loading()
    assert found.weight.dtype == (torch.float32 if swap == "in place" else torch.int8)
    assert_same(found, wanted)
    needed = 64 * 64 * 4
    assert extra or loader._reader.report.bytes == needed

    other = {name: tensor * 2 + 1 for name, tensor in TENSORS.items()}
    (tmp_path / "other").mkdir()
    save_file(other, tmp_path / "other" / "model.safetensors")
    kernel, before = found.weight, found.weight.clone()
    address = kernel.data_ptr()
    again = loaders._LOAD_FORMAT_TO_MODEL_LOADER["weightlift"](config(**extra))
    model_config = SimpleNamespace(model=str(tmp_path / "other"), quantization=None)
    found.load_again(again.get_all_weights(model_config, found))
    wanted.load_again(other.items())
    assert found.weight is kernel
    assert kernel.data_ptr() == address
    assert not torch.equal(kernel, before)
    assert_same(found, wanted)
    assert extra or again._reader.report.bytes == needed


@pytest.mark.parametrize("slices", [True, False])
def test_experts_of_other_ranks_are_skipped(loaders: Any, slices: bool, tmp_path: Path) -> None:
    found = Rank()
    kind = loaders._LOAD_FORMAT_TO_MODEL_LOADER["weightlift"]
    loader = kind(config(slices=slices))
    loader.local_expert_ids = {1, 3}
    folder = folder_of(tmp_path)
    loader.load_weights(found, SimpleNamespace(model=str(folder), quantization=None))
    assert not found.experts[0].any()
    assert torch.equal(found.experts[3], TENSORS["mlp.experts.3.w"][32:])


@pytest.mark.parametrize("slices", [True, False])
def test_secondary_weights_and_torch_files(loaders: Any, slices: bool, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second" / "sub"
    first.mkdir()
    second.mkdir(parents=True)
    torch.save({f"{n}.weight": TENSORS[f"{n}.weight"] for n in "qk"}, first / "pytorch_model.bin")
    rest = {n: t for n, t in TENSORS.items() if not n.startswith(("q.", "k."))}
    save_file({n.removeprefix("x."): t for n, t in rest.items()}, second / "m.safetensors")
    stock = importlib.import_module(f"{LOADERS}.default_loader").DefaultModelLoader
    found = Rank()
    found.secondary_weights = [stock.Source(str(tmp_path / "second"), subfolder="sub")]
    loaded(loaders, first, found, slices=slices)
    wanted = Rank()
    wanted.load_weights(TENSORS.items())
    assert_same(found, wanted)


def test_errors_are_those_of_the_engine(loaders: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Unexpected extra config keys"):
        loaded(loaders, tmp_path, Rank(), nonsense=True)
    with pytest.raises(ValueError, match="slices must be true or false"):
        loaded(loaders, tmp_path, Rank(), slices="yes")
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        loaded(loaders, tmp_path, Rank())
    save_file({"q.weight": torch.zeros(64, 64)}, tmp_path / "m.safetensors")
    with pytest.raises(ValueError, match="not initialized from checkpoint"):
        loaded(loaders, tmp_path, Rank())
    save_file({"q.weight": torch.zeros(64, 60)}, tmp_path / "m.safetensors")
    with pytest.raises(RuntimeError, match="must match the size"):
        loaded(loaders, tmp_path, Rank())


class Lenient(Rank):
    """Like vLLM's check of linear layers."""

    exempt = frozenset({"qkv", "experts"})

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        return super().load_weights(weights) - {"qkv"} | {"scale"}


def write_index(folder: Path) -> None:
    names = list(TENSORS)
    weight_map = {n: f"model-{i + 1}-of-2.safetensors" for i in range(2) for n in names[i::2]}
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize("lost", [("k.weight",), ("q.weight", "k.weight", "v.weight")])
@pytest.mark.parametrize("slices", [True, False])
def test_a_shard_that_lacks_a_tensor(
    loaders: Any, slices: bool, lost: tuple[str, ...], tmp_path: Path
) -> None:
    """A parameter that the engine's own check does not cover is missing, in part or as a whole."""
    folder = folder_of(tmp_path)
    loaded(loaders, folder, Lenient(), slices=slices)
    write_index(folder)
    model = Lenient()
    loaded(loaders, folder, model, slices=slices)
    names = list(TENSORS)
    for i in range(2):
        part = {name: TENSORS[name].clone() for name in names[i::2] if name not in lost}
        save_file(part, folder / f"model-{i + 1}-of-2.safetensors")
    with pytest.raises(wl.CheckpointError, match=r"safetensors: the index beside it says .*weight"):
        loaded(loaders, folder, Lenient(), slices=slices)
    if slices:
        with pytest.raises(wl.CheckpointError, match=r"is in it, and it is not"):
            reload(loaders, folder, model)


def test_a_shard_that_lacks_a_tensor_of_a_layer_that_is_made_late(
    loaders: Any, tmp_path: Path
) -> None:
    """vLLM makes and processes such a layer with the tensors that have arrived."""
    folder = folder_of(tmp_path)
    write_index(folder)
    names = [name for name in list(TENSORS)[0::2] if name != "q.weight"]
    part = {name: TENSORS[name].clone() for name in names}
    save_file(part, folder / "model-1-of-2.safetensors")
    with pytest.raises(wl.CheckpointError, match=r"'q\.weight' is in it, and it is not"):
        loaded(loaders, folder, Processed("parameter", "meta"))


@pytest.mark.parametrize("slices", [True, False])
def test_a_parameter_that_nothing_fills_is_told(
    loaders: Any, slices: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rest = {name: t.clone() for name, t in TENSORS.items() if ".experts." not in name}
    save_file(rest, tmp_path / "m.safetensors")
    loaded(loaders, tmp_path, Lenient(), slices=slices)
    told = "weightlift: the checkpoint has nothing for 1 parameters: experts"
    assert (told in caplog.messages) == slices
    assert slices or any("for 2 parameters: qkv, experts" in text for text in caplog.messages)


def test_an_error_of_the_model_names_the_tensor(
    loaders: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({"q.weight": torch.zeros(64, 60)}, tmp_path / "m.safetensors")
    for slices in (True, False):
        caplog.clear()
        with pytest.raises(RuntimeError, match="must match the size"):
            loaded(loaders, tmp_path, Rank(), slices=slices)
        assert caplog.messages == [
            f"weightlift: after tensor 'q.weight' of {tmp_path / 'm.safetensors'}"
        ]


def test_reading_ahead_gives_all_in_order_and_stops_when_it_is_left(tmp_path: Path) -> None:
    checkpoint = wl.open_checkpoint(folder_of(tmp_path) / "model-1-of-2.safetensors")
    names = list(reversed(list(checkpoint)))
    for limit in (1, 20_000, 1 << 30):
        found = list(read_ahead(checkpoint, names, group_bytes=limit))
        assert [name for name, _ in found] == names
        assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in found)
    running = read_ahead(checkpoint, names, group_bytes=1)
    next(running)
    running.close()
    assert list(read_ahead(checkpoint, [])) == []

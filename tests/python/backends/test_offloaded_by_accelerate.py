"""Models that accelerate offloads, with and without the backend: the same results and model
attributes; the weights for computing come from the streaming executor."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import safetensors.torch
import torch
from accelerate.hooks import AlignDevicesHook, remove_hook_from_module
from accelerate.utils import OffloadedWeightsLoader, align_module_device, has_offloaded_params

import weightlift as wl
from accelerate_models import CALLER, MAPS, Model, build, describe, describe_all, weights, write
from streams_support import streams
from weightlift.backends import accelerate_hooks
from weightlift.module.streaming.streamed_weight import StreamedWeight

pytestmark = pytest.mark.filterwarnings("ignore:The following device_map keys do not match")

INPUT = torch.arange(10)


def cpu_offload(folder: Path, **options: Any) -> Model:
    return accelerate.cpu_offload(build(False).eval(), "cpu", **options)


def disk_offload(folder: Path, **options: Any) -> Model:
    return accelerate.disk_offload(build(False).eval(), folder / "written", "cpu", **options)


def dispatched(folder: Path, **options: Any) -> Model:
    model = build(False).eval()
    return accelerate.dispatch_model(model, MAPS["disk"], offload_dir=folder / "written", **options)


def from_checkpoint(folder: Path, **options: Any) -> Model:
    folder.mkdir(exist_ok=True)
    model = accelerate.load_checkpoint_and_dispatch(
        build(True),
        write(folder / "checkpoint", "safetensors-sharded"),
        device_map=MAPS["disk"],
        offload_folder=folder / "written",
        **{"offload_buffers": True, **options},
    )
    return model.eval()


def in_half(folder: Path, **options: Any) -> Model:
    return from_checkpoint(folder, dtype=torch.bfloat16, **options)


WAYS = [cpu_offload, disk_offload, dispatched, from_checkpoint, in_half]
ON_DISK = WAYS[1:]


@contextlib.contextmanager
def watched(model: Model) -> Iterator[list[type]]:
    """The classes of the weights with which each linear layer computes."""
    seen: list[type] = []
    linear = torch.nn.functional.linear

    def noted(x: Any, weight: Any, bias: Any = None) -> Any:
        seen.append(type(weight))
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(torch.nn.functional, "linear", noted)
        yield seen


def read_off(model: Model) -> dict[str, Any]:
    hooked = {
        name: (type(module._hf_hook), getattr(module._hf_hook, "offload", None))
        for name, module in model.named_modules()
        if hasattr(module, "_hf_hook")
    }
    loader = model.head._hf_hook.weights_map.dataset
    return {
        "tensors": describe_all(model),
        "hooks": hooked,
        "map": getattr(model, "hf_device_map", None),
        "offloaded": {n for n, m in model.named_modules() if has_offloaded_params(m)},
        "weights": {name: describe(loader[name]) for name in loader},
        "state": {name: describe(tensor) for name, tensor in model.state_dict().items()},
    }


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("way", WAYS)
def test_results_and_what_is_read_off(tmp_path: Path, way: Any, grad: Any) -> None:
    def call(folder: Path, streamed: bool) -> Any:
        torch.manual_seed(0)
        model = way(folder)
        before = read_off(model)
        with grad(), watched(model) as seen:
            results = [describe(model(INPUT).detach()) for _ in range(3)]
        assert (StreamedWeight in seen) == (streamed and way is not cpu_offload)
        assert read_off(model) == before
        if not before["map"]:  # accelerate cannot detach a model with permanent meta tensors
            remove_hook_from_module(model, recurse=True)
            before = describe_all(model)
        if way is in_half:
            before.pop("weights")  # which a load with the backend casts as soon as they are read
        return results, before

    stock = call(tmp_path / "stock", False)
    with wl.enabled(CALLER):
        ours = call(tmp_path / "ours", True)
    assert ours == stock


@pytest.mark.parametrize("way", ON_DISK)
def test_nothing_falls_back(
    tmp_path: Path, way: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WEIGHTLIFT_STRICT", "1")
    with wl.enabled(CALLER):
        model = way(tmp_path)
        for _ in range(2):
            model(INPUT)
        assert streams() == 1
        del model
        assert streams(0) == 0
    assert not [line for line in caplog.messages if "itself" in line]


def test_gradients_of_inputs(tmp_path: Path) -> None:
    """accelerate also computes the weights' gradients, and nobody gets them."""

    def call(folder: Path) -> Any:
        model = from_checkpoint(folder)
        x = torch.ones(10, 8, requires_grad=True)
        loss = model.head(model.blocks[2](x)).square().sum()
        loss.backward()
        return describe(x.grad), [p.grad for p in model.parameters()]

    stock = call(tmp_path / "stock")
    with wl.enabled(CALLER):
        assert call(tmp_path / "ours") == stock


def test_disable_restores_accelerates_own_way(tmp_path: Path) -> None:
    expected = disk_offload(tmp_path / "stock")(INPUT)
    with wl.enabled(CALLER):
        model = disk_offload(tmp_path / "ours")
        with watched(model) as seen:
            assert torch.equal(model(INPUT), expected)
        assert StreamedWeight in seen
    assert streams(0) == 0
    with watched(model) as seen:
        assert torch.equal(model(INPUT), expected)
    assert StreamedWeight not in seen
    with wl.enabled(CALLER), watched(model) as seen:
        assert torch.equal(model(INPUT), expected)
    assert StreamedWeight in seen


def test_a_model_from_before_the_backend_and_copies(tmp_path: Path) -> None:
    """In the first forward accelerate's own way is used; after that all hooks are known."""
    model = disk_offload(tmp_path)
    expected = model(INPUT)
    with wl.enabled(CALLER):
        for other in (model, copy.deepcopy(model)):
            for step in range(3):
                with watched(other) as seen:
                    assert torch.equal(other(INPUT), expected)
                assert (StreamedWeight in seen) == (step > 0)


def test_an_exception_within_a_forward(tmp_path: Path) -> None:
    with wl.enabled(CALLER):
        model = disk_offload(tmp_path)
        expected = model(INPUT)
        before = describe_all(model)

        def fail(*_: Any) -> None:
            raise ValueError("no such luck")

        hook = model.blocks[1].norm.register_forward_hook(fail)
        down = model.blocks[1].down.register_forward_pre_hook(fail)
        with pytest.raises(ValueError, match="no such luck"):
            model(INPUT)
        hook.remove()
        with pytest.raises(ValueError, match="no such luck"):
            model(INPUT)
        down.remove()
        assert torch.equal(model(INPUT), expected)
        assert describe_all(model) == before
        inner = model.blocks[0].up.forward  # within accelerate's hook
        model.blocks[0].up._old_forward = fail
        with pytest.raises(ValueError, match="no such luck"):
            model(INPUT)
        assert isinstance(model.blocks[0].up.weight, StreamedWeight)
    del model.blocks[0].up._old_forward
    model.blocks[0].up._old_forward = type(model.blocks[0].up).forward.__get__(model.blocks[0].up)
    assert inner is model.blocks[0].up.forward
    assert torch.equal(model(INPUT), expected)  # without the backend
    assert describe_all(model) == before


def test_threads(tmp_path: Path) -> None:
    expected = disk_offload(tmp_path / "stock")(INPUT)
    wrong: list[Any] = []
    with wl.enabled(CALLER):
        model = disk_offload(tmp_path / "ours")
        model(INPUT)

        def run() -> None:
            try:
                for _ in range(10):
                    with torch.no_grad():
                        if not torch.equal(model(INPUT), expected):
                            wrong.append("another result")
            except BaseException as error:
                wrong.append(error)

        threads = [threading.Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[0]


def replaced_file(model: Model, folder: Path) -> None:
    new = folder / "new"
    new.write_bytes(bytes(range(160)) * 2)
    new.replace(folder / "written" / "head.weight.dat")


def another_map(model: Model, folder: Path) -> None:
    other = {"weight": torch.full((10, 8), 0.5)}
    model.head._hf_hook.weights_map = other


def another_dtype(model: Model, folder: Path) -> None:
    model.head.weight.data = model.head.weight.data.double()
    model.head.register_forward_pre_hook(lambda _, args: (args[0].double(),))


@pytest.mark.parametrize("change", [replaced_file, another_map, another_dtype])
def test_what_was_changed_meanwhile(
    tmp_path: Path, change: Callable[[Model, Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    def call(folder: Path) -> Any:
        model = disk_offload(folder)
        first = describe(model(INPUT))
        change(model, folder)
        return first, describe(model(INPUT)), describe(model(INPUT))

    stock = call(tmp_path / "stock")
    assert stock[0] != stock[1]
    with wl.enabled(CALLER), caplog.at_level(logging.INFO, "weightlift"):
        assert call(tmp_path / "ours") == stock
    said = [line for line in caplog.messages if "brings offloaded weights in itself" in line]
    assert len(said) == (change is not another_map)


def test_host_weights_that_are_written_to(tmp_path: Path) -> None:
    """The weights are in memory, so a write takes effect, as without the backend."""

    def call() -> Any:
        model = cpu_offload(tmp_path)
        first = describe(model(INPUT))
        model.head._hf_hook.weights_map["weight"].mul_(2)
        return first, describe(model(INPUT))

    stock = call()
    with wl.enabled(CALLER):
        assert call() == stock


def test_tools_get_real_tensors(tmp_path: Path) -> None:
    with wl.enabled(CALLER):
        model = disk_offload(tmp_path)
        model(INPUT)
        with align_module_device(model.head):
            assert type(model.head.weight) is torch.nn.Parameter
            assert model.head.weight.device.type == "cpu"
        assert model.head.weight.is_meta
        whole = accelerate.utils.modeling.get_state_dict_offloaded_model(model)
    assert {type(tensor) for tensor in whole.values()} <= {torch.Tensor, torch.nn.Parameter}
    expected = build(False).state_dict()
    assert whole.keys() >= {"head.weight", "blocks.1.up.bias"}
    for name, tensor in whole.items():
        assert torch.equal(expected[name], tensor), name


def test_what_the_executor_cannot_serve(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Lazy(OffloadedWeightsLoader):
        pass

    def call() -> Any:
        model = build(False).eval()
        model.scale = Special(torch.ones(8))
        loader = Lazy(state_dict={n: t.clone() for n, t in model.state_dict().items()})
        accelerate.hooks.attach_align_device_hook(
            model, "cpu", offload=True, weights_map=loader, offload_buffers=False
        )
        return describe(model(INPUT)), describe(model(INPUT))

    class Special(torch.nn.Parameter):
        pass

    stock = call()
    caplog.clear()
    with wl.enabled(CALLER), caplog.at_level(logging.WARNING, "weightlift"):
        assert call() == stock
    said = [line for line in caplog.messages if "brings offloaded weights in itself" in line]
    assert 1 <= len(said) <= 2  # a reason each
    assert "Special" in said[0] or "Lazy" in said[0]


def test_whole_models_go_accelerates_way(caplog: pytest.LogCaptureFixture) -> None:
    """diffusers' ``enable_model_cpu_offload`` calls this."""
    model = build(False)
    expected = describe(model(INPUT))
    with wl.enabled(CALLER), caplog.at_level(logging.WARNING, "weightlift"):
        for _ in range(2):  # as diffusers does after each call of a pipeline
            _, handle = accelerate.cpu_offload_with_hook(model, torch.device("cuda", 0))
            assert type(model._hf_hook) is accelerate.hooks.CpuOffload
            handle.remove()
        said = [line for line in caplog.messages if "brings offloaded weights in itself" in line]
        assert len(said) == 1
        assert "enable_model_cpu_offload" in said[0]
        caplog.clear()
        accelerate.cpu_offload_with_hook(model, torch.device("cpu"))  # moves nothing
        assert describe(model(INPUT)) == expected
    assert not caplog.messages


def in_memory(folder: Path, tensors: dict[str, torch.Tensor]) -> Any:
    return tensors


def loader_in_memory(folder: Path, tensors: dict[str, torch.Tensor]) -> Any:
    return OffloadedWeightsLoader(state_dict=tensors)


def loader_of_files(folder: Path, tensors: dict[str, torch.Tensor]) -> Any:
    accelerate.utils.offload_state_dict(folder, tensors)
    return OffloadedWeightsLoader(save_folder=folder)


@pytest.mark.parametrize(
    ("map_of", "used"),
    [
        (in_memory, torch.nn.Parameter),  # where it is
        (loader_in_memory, torch.nn.Parameter),
        (loader_of_files, StreamedWeight),
    ],
)
def test_a_map_that_lacks_a_weight(
    tmp_path: Path, map_of: Any, used: type, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a load of a checkpoint that lacks the weight: accelerate raises an error only in the
    module's forward. The executor serves the other modules."""
    model = build(False).eval()
    tensors = {n: t.clone() for n, t in model.state_dict().items() if n != "head.weight"}
    loader = map_of(tmp_path / "written", tensors)
    with wl.enabled(CALLER), caplog.at_level(logging.INFO, "weightlift"):
        accelerate.hooks.attach_align_device_hook(
            model, "cpu", offload=True, weights_map=loader, offload_buffers=False
        )
        for _ in range(2):
            with watched(model) as seen, pytest.raises(KeyError, match=r"head\.weight"):
                model(INPUT)
            assert set(seen) == {used}
    assert not caplog.messages


def test_pickles(tmp_path: Path) -> None:
    """Copies of models that load_into has dispatched; accelerate's own cannot be pickled."""
    wl.save_file(weights(), tmp_path / "model.safetensors")
    model = build(True).eval()
    with wl.enabled(CALLER):
        wl.load_into(model, tmp_path / "model.safetensors", device_map=MAPS["disk"])
        expected = [model(INPUT) for _ in range(2)][1]
        assert streams() == 1
        again = pickle.loads(pickle.dumps(model))
        for _ in range(2):
            assert torch.equal(again(INPUT), expected)
        assert isinstance(again.head._hf_hook, AlignDevicesHook)


DISK = {
    "model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "disk",
    "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_transformers(tmp_path: Path) -> None:
    """`"disk"` in a device map: generated text, attributes, and saved files."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, vocab_size=40,
    )  # fmt: skip
    original = transformers.LlamaForCausalLM(config)
    original.save_pretrained(tmp_path / "model")

    def call(folder: Path, streamed: bool) -> Any:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=DISK, offload_folder=folder / "written"
        )
        with watched(model) as seen:
            tokens = model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False)
        assert (StreamedWeight in seen) == streamed
        logits = describe(model(torch.arange(5)[None]).logits.detach())
        model.save_pretrained(folder / "saved")
        saved = safetensors.torch.load_file(folder / "saved" / "model.safetensors")
        return (
            tokens.tolist(), logits, model.device, model.dtype, model.hf_device_map,
            describe_all(model), {name: describe(tensor) for name, tensor in saved.items()},
        )  # fmt: skip

    stock = call(tmp_path / "stock", False)
    with wl.enabled("transformers", CALLER):
        assert call(tmp_path / "ours", True) == stock


def test_without_the_backend_nothing_is_bound(tmp_path: Path) -> None:
    model = disk_offload(tmp_path)
    model(INPUT)
    hooks = [vars(module)["_hf_hook"] for module in model.modules() if "_hf_hook" in vars(module)]
    assert hooks
    assert not any(hook in accelerate_hooks._bound for hook in hooks)

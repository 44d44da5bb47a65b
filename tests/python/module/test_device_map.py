from __future__ import annotations

import builtins
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from accelerate import infer_auto_device_map, init_empty_weights
from accelerate.utils import check_device_map, find_tied_parameters
from accelerate.utils import get_balanced_memory as reference_balanced_memory
from accelerate.utils import modeling as reference
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.model_loading_utils import _determine_device_map
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.accelerate import _get_device_map

from weightlift import ArgumentError, CheckpointError, DeviceError
from weightlift.module.device_map import assign, parse_max_memory, resolve_device_map

MIB = 1 << 20
STRATEGIES = ["auto", "balanced", "balanced_low_0", "sequential"]
BLOCK = 4 * 64 * 64 * 4  # bytes of one block in float32
Memory = dict[int | str, int]
# accelerate warns about keys that are not modules, and makes such maps itself.
TENSORS_AS_KEYS = pytest.mark.filterwarnings("ignore:The following device_map keys do not match")


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.ModuleList(torch.nn.Linear(64, 64, bias=False) for _ in range(4))


class Stack(ModelMixin, ConfigMixin):  # type: ignore[misc]
    _no_split_modules = ["Block"]  # noqa: RUF012
    _keep_in_fp32_modules = ["norm"]  # noqa: RUF012

    @register_to_config
    def __init__(self, count: int = 12) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(100, 64)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(count))
        self.norm = torch.nn.LayerNorm(64)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.register_buffer("steps", torch.arange(10))


@pytest.fixture(autouse=True)
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Devices only for counting; nothing is computed on them."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def stack(count: int = 12) -> Stack:
    with init_empty_weights():
        return Stack(count)


def llama(tied: bool) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.tie_weights()
    return model


def size_of(model: torch.nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def places(model: torch.nn.Module, device_map: Mapping[str, Any]) -> dict[str, str]:
    """Tensor -> device, by the longest key that leads to it."""
    found = {}
    for name, _ in (
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ):
        keys = [k for k in device_map if k == "" or name == k or name.startswith(f"{k}.")]
        device = device_map[max(keys, key=len)]
        found[name] = f"cuda:{device}" if isinstance(device, int) else str(device)
    return found


def bytes_on(model: torch.nn.Module, device_map: Mapping[str, Any]) -> dict[str, int]:
    """Tied tensors counted once."""
    held: dict[str, int] = {}
    by_name = places(model, device_map)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        held[by_name[name]] = held.get(by_name[name], 0) + tensor.nbytes
    return held


def by_accelerate(
    model: torch.nn.Module,
    strategy: str,
    memory: Memory,
    dtype: torch.dtype | None = None,
    no_split: list[str] | None = None,
) -> dict[str, Any]:
    memory = dict(memory)
    if strategy != "sequential":
        memory = reference_balanced_memory(
            model,
            memory,
            no_split_module_classes=no_split,
            dtype=dtype,
            low_zero=strategy == "balanced_low_0",
        )
    found: dict[str, Any] = infer_auto_device_map(
        model, memory, no_split_module_classes=no_split, dtype=dtype
    )
    return found


MEMORIES: list[Memory] = [
    {0: 10 * MIB},
    {0: 6 * BLOCK, "cpu": 100 * MIB},
    {0: 5 * BLOCK, 1: 5 * BLOCK, 2: 8 * BLOCK},
    {0: 100 * MIB, 1: 100 * MIB, 2: 100 * MIB, 3: 100 * MIB},
    {0: 4 * BLOCK, 1: 3 * BLOCK, 2: 2 * BLOCK, 3: 2 * BLOCK, "cpu": 8 * BLOCK},
    dict.fromkeys(range(8), 3 * BLOCK),
    {"cpu": 10 * MIB},
]


@TENSORS_AS_KEYS
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("memory", MEMORIES, ids=str)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float32])
def test_as_diffusers(memory: Memory, strategy: str, dtype: torch.dtype | None) -> None:
    model = stack()
    theirs = _determine_device_map(model, strategy, dict(memory), dtype, ["norm"])
    ours = resolve_device_map(
        model,
        strategy,
        max_memory=memory,
        dtype=dtype,
        keep_in_fp32=["norm"],
        offload=True,
    )
    assert places(model, ours) == places(model, theirs)
    check_device_map(model, ours)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("no_split", [[], ["LlamaDecoderLayer"]])
def test_as_accelerate(strategy: str, tied: bool, no_split: list[str]) -> None:
    model = llama(tied)
    layer = 4 * 64 * 64 * 4 + 3 * 64 * 128 * 4
    for memory in ({0: 4 * layer, 1: 4 * layer, "cpu": 20 * layer}, {0: 3 * layer, "cpu": 10**9}):
        theirs = by_accelerate(model, strategy, memory, no_split=no_split)
        ours = resolve_device_map(
            model,
            strategy,
            max_memory=memory,
            no_split_module_classes=no_split,
            offload=True,
        )
        assert places(model, ours) == places(model, theirs)


@pytest.mark.parametrize("tied", [True, False])
def test_as_transformers(tied: bool) -> None:
    model = llama(tied)
    layer = 4 * 64 * 64 * 4 + 3 * 64 * 128 * 4
    memory: Memory = {0: 5 * layer, 1: 4 * layer, "cpu": 20 * layer}
    theirs = _get_device_map(model, "sequential", dict(memory), None)
    ours = resolve_device_map(model, "sequential", max_memory=memory)
    assert places(model, ours) == places(model, theirs)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_tied_parameters_stay_together(strategy: str) -> None:
    model = llama(tied=True)
    assert find_tied_parameters(model) == [["lm_head.weight", "model.embed_tokens.weight"]]
    total = size_of(model)
    for gpus in (2, 3, 5):
        memory: Memory = dict.fromkeys(range(gpus), total // gpus + 200000)
        device_map = resolve_device_map(model, strategy, max_memory=memory)
        where = places(model, device_map)
        assert where["lm_head.weight"] == where["model.embed_tokens.weight"]
        assert len(set(where.values())) > 1


def test_modules_that_must_not_be_split() -> None:
    model = stack()
    memory: Memory = {n: int(2.5 * BLOCK) for n in range(8)}
    for no_split, whole in ((None, True), ([], False)):
        where = places(
            model,
            resolve_device_map(
                model, "sequential", max_memory=memory, no_split_module_classes=no_split
            ),
        )
        on = [{where[f"blocks.{b}.inner.{n}.weight"] for n in range(4)} for b in range(12)]
        assert all(len(devices) == 1 for devices in on) == whole


def test_no_split_modules_of_a_part_count() -> None:
    model = torch.nn.Module()
    model.part = stack()
    memory: Memory = {n: int(2.5 * BLOCK) for n in range(8)}
    where = places(model, resolve_device_map(model, "sequential", max_memory=memory))
    for b in range(12):
        assert len({where[f"part.blocks.{b}.inner.{n}.weight"] for n in range(4)}) == 1


# What fits.


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "memory",
    [
        {0: 8},
        {"cpu": 8},
        {0: 4, 1: 4},  # accelerate reserves memory on 0 for offloaded layers, and there are none
        {0: 3, 1: 2, 2: 3},
        {0: 7, 1: 1},  # equal shares are too much for 1
        {0: 6, 1: 1, "cpu": 2},
        {0: 3, "cpu": 6},  # one is for those on the CPU
    ],
    ids=str,
)
def test_a_model_that_just_fits_is_not_refused(strategy: str, memory: Memory) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(8)))
    layer = 64 * 64 * 4
    memory = {device: layer * count for device, count in memory.items()}
    held = bytes_on(model, resolve_device_map(model, strategy, max_memory=memory))
    assert sum(held.values()) == 8 * layer
    for device, size in held.items():
        assert size <= memory["cpu" if device == "cpu" else int(device.removeprefix("cuda:"))]
    memory[[*memory][-1]] -= 1
    with pytest.raises(CheckpointError, match=r"Sequential has 131,072 bytes, which does not fit:"):
        resolve_device_map(model, strategy, max_memory=memory)


def test_accelerate_alone_would_refuse_them() -> None:
    """So the attempts after the first one are needed."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(8)))
    layer = 64 * 64 * 4
    assert "disk" in by_accelerate(model, "sequential", {0: 4 * layer, 1: 4 * layer}).values()
    uneven: Memory = {0: 7 * layer, 1: layer, "cpu": layer}
    assert "disk" in by_accelerate(model, "auto", uneven).values()


def test_what_is_short_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000, bias=False) for _ in range(8)))
    with pytest.raises(CheckpointError) as raised:
        resolve_device_map(model, "auto", max_memory={0: "13MB", "cpu": "9MB"})
    assert str(raised.value) == (
        "Sequential has 32.00 MB, which does not fit: cuda:0 would hold 8.00 MB of its 13.00 MB; "
        "cpu has 9.00 MB and lacks 15.00 MB. Give more max_memory, or let weights stay on "
        "the disk with a 'disk' in it or an offload_folder"
    )
    with pytest.raises(CheckpointError, match=r"32\.00 MB, which does not fit: cuda:3 has 31"):
        resolve_device_map(model, "auto", max_memory={3: "31MB"})
    with pytest.raises(CheckpointError, match=r"fit: max_memory has no device with room\. Give"):
        resolve_device_map(model, "auto", max_memory={0: 0})
    for given in ({"max_memory": {0: "31MB"}}, {"max_memory": {0: "31MB"}, "dtype": torch.float64}):
        with pytest.raises(CheckpointError, match="does not fit"):
            resolve_device_map(model, "auto", **given)
    assert resolve_device_map(
        model, "auto", max_memory={0: "21MB"}, dtype=torch.float16
    ) == resolve_device_map(model, 0)
    assert caplog.text == ""


def test_a_wider_dtype_takes_more_room() -> None:
    """accelerate alone counts the smaller dtype."""
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(4))).half()
    half = 4 * 64 * 64 * 2
    memory: Memory = {0: half + 64 * 64 * 2}
    assert by_accelerate(model, "auto", memory, torch.float32) == {"": 0}
    with pytest.raises(CheckpointError, match=f"has {2 * half:,} bytes, which does not fit"):
        resolve_device_map(model, "auto", max_memory=memory, dtype=torch.float32)
    with pytest.raises(CheckpointError, match=f"has {half + 64 * 64 * 2:,} bytes, which does not"):
        resolve_device_map(model, "auto", max_memory={0: half}, dtype={"2.weight": torch.float32})
    with pytest.raises(CheckpointError, match=f"has {half + 64 * 64 * 2:,} bytes, which does not"):
        resolve_device_map(model, "auto", max_memory={0: half}, keep_in_fp32=["1"])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_disk_is_used_where_it_may_be(strategy: str) -> None:
    model = stack()
    memory: Memory = {0: 3 * BLOCK, "cpu": 3 * BLOCK}
    with pytest.raises(CheckpointError, match="does not fit"):
        resolve_device_map(model, strategy, max_memory=memory)
    by_folder = resolve_device_map(model, strategy, max_memory=memory, offload=True)
    by_entry = resolve_device_map(model, strategy, max_memory={**memory, "disk": 0})
    assert by_folder == by_entry
    assert set(by_folder.values()) == {torch.device("cuda", 0), torch.device("cpu"), "disk"}
    assert resolve_device_map(model, strategy, max_memory={"disk": "1TB"}) == {"": "disk"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gpus_are_those_that_are_named(strategy: str) -> None:
    model = stack()
    size = size_of(model)
    device_map = resolve_device_map(
        model, strategy, max_memory={5: size, 2: size // 2 + 2 * BLOCK, 0: 0}
    )
    assert set(device_map.values()) <= {torch.device("cuda", 2), torch.device("cuda", 5)}
    renumbered = by_accelerate(
        model,
        "balanced" if strategy == "balanced_low_0" else strategy,
        {0: size // 2 + 2 * BLOCK, 1: size},
        no_split=["Block"],
    )
    expected = {"cuda:0": "cuda:2", "cuda:1": "cuda:5"}
    assert places(model, device_map) == {
        name: expected[device] for name, device in places(model, renumbered).items()
    }


class Buffered(torch.nn.Module):
    """Buffers beside children, at two depths."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.zeros(8))
        self.first = torch.nn.Linear(64, 64)
        self.inner = torch.nn.Module()
        self.inner.layers = torch.nn.ModuleList(torch.nn.Linear(64, 64) for _ in range(4))
        self.inner.register_buffer("mean", torch.zeros(8))
        self.inner.register_buffer("cache", torch.zeros(8), persistent=False)


@TENSORS_AS_KEYS
def test_buffers_of_modules_that_are_spread() -> None:
    model = Buffered()
    layer = 64 * 64 * 4 + 256
    memory: Memory = {0: 3 * layer + 100, 1: 10 * layer}
    theirs = infer_auto_device_map(model, dict(memory))
    with pytest.raises(ValueError, match=r"does not give any device for .*inner\.mean"):
        check_device_map(model, theirs)
    ours = resolve_device_map(model, "sequential", max_memory=memory)
    where = places(model, ours)
    assert len(set(where.values())) == 2
    assert where["inner.mean"] == where["inner.cache"] == where["inner.layers.0.weight"]


def test_by_default_what_is_free_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64, bias=False) for _ in range(8)))
    layer = 64 * 64 * 4
    free: dict[str, Callable[..., Any]] = {
        "memory_reserved": lambda gpu: 5 * layer,
        "memory_allocated": lambda gpu: 3 * layer,
    }
    for name, function in free.items():
        monkeypatch.setattr(torch.cuda, name, function)
    original = reference.get_max_memory
    monkeypatch.setattr(
        reference,
        "get_max_memory",
        lambda given=None: original(given) if given else {0: 4 * layer, "cpu": 100 * layer},
    )
    assert bytes_on(model, resolve_device_map(model, "sequential")) == {
        "cuda:0": 5 * layer,  # of six, one is reserved for the CPU's layers
        "cpu": 3 * layer,
    }
    assert bytes_on(model, resolve_device_map(model, "auto")) == {
        "cuda:0": 4 * layer,  # of nine tenths
        "cpu": 4 * layer,
    }


def test_without_any_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device_map(stack(), "auto") == {"": torch.device("cpu")}
    with pytest.raises(DeviceError, match=r"there is no device 0; there is: 'cpu', 'disk'$"):
        resolve_device_map(stack(), "auto", max_memory={0: "8GB"})


def test_without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    def importing(name: str, *rest: Any) -> Any:
        if name.startswith("accelerate"):
            raise ModuleNotFoundError("No module named 'accelerate'", name="accelerate")
        return original(name, *rest)

    original = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", importing)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ArgumentError, match=r"'auto' needs accelerate: pip install 'weightlift\["):
        resolve_device_map(model, "auto")
    assert resolve_device_map(model, "cpu") == {"": torch.device("cpu")}


# max_memory.


@pytest.mark.parametrize(
    ("given", "size"),
    [
        (8_000_000_000, 8 * 10**9),
        (8e9, 8 * 10**9),
        ("8GB", 8 * 10**9),
        ("8gb", 8 * 10**9),
        ("8 GiB", 8 * 2**30),
        ("0.5GiB", 2**29),
        ("1.5MB", 1_500_000),
        ("500MiB", 500 * 2**20),
        ("64kib", 2**16),
        ("64KB", 64_000),
        ("2TB", 2 * 10**12),
        ("1TiB", 2**40),
        ("12345", 12345),
        (0, 0),
    ],
)
def test_sizes(given: int | str, size: int) -> None:
    assert parse_max_memory({0: given}) == {0: size}
    if isinstance(given, str) and given.endswith(("GB", "MB", "KB", "iB")) and "T" not in given:
        assert reference.convert_file_size_to_int(given) == size


@pytest.mark.parametrize("given", ["", "GB", "8 X", "-1GB", "1e9", -1, True, None, "0x10", [1]])
def test_what_is_no_size(given: Any) -> None:
    with pytest.raises(
        ArgumentError, match=r"max_memory: .* for device 'cpu' is not a size: write"
    ):
        parse_max_memory({"cpu": given})


def test_devices_of_max_memory() -> None:
    assert list(
        parse_max_memory({"disk": 1, "cpu": 2, "cuda:10"[:6]: 3, "0": 4, 7: 5}).items()
    ) == [(0, 4), (1, 3), (7, 5), ("cpu", 2), ("disk", 1)]
    for device in (8, -1, "8", "gpu", "cuda", "CPU", "mps", ""):
        with pytest.raises(DeviceError) as raised:
            parse_max_memory({device: "8GB"})
        assert str(raised.value) == (
            f"max_memory: there is no device {device!r}; there is: 0, 1, 2, 3, 4, 5, 6, 7, "
            "'cpu', 'disk'"
        )
    with pytest.raises(ArgumentError, match="max_memory: device 0 is in it twice"):
        parse_max_memory({0: 1, "cuda:0": 2})


# Explicit maps.


@pytest.mark.parametrize(
    ("given", "device"),
    [
        ("cpu", torch.device("cpu")),
        (3, torch.device("cuda", 3)),
        ("3", torch.device("cuda", 3)),
        ("cuda:3", torch.device("cuda", 3)),
        (torch.device("cuda", 3), torch.device("cuda", 3)),
        ("disk", "disk"),
    ],
)
def test_devices(given: Any, device: torch.device | str) -> None:
    model = torch.nn.Linear(2, 2)
    assert resolve_device_map(model, given) == {"": device}
    assert resolve_device_map(model, {"weight": given, "bias": "cpu"}) == {
        "weight": device,
        "bias": torch.device("cpu"),
    }


@pytest.mark.parametrize("given", ["balance", "gpu", -1, "meta", "cuda:x"])
def test_what_is_no_device(given: Any) -> None:
    for device_map in (given, {"": given}):
        with pytest.raises(DeviceError, match="is invalid"):
            resolve_device_map(torch.nn.Linear(2, 2), device_map)


def test_what_is_no_device_map() -> None:
    with pytest.raises(ArgumentError, match=r"device_map is \['cpu'\]; it can be a device, one of"):
        resolve_device_map(torch.nn.Linear(2, 2), ["cpu"])  # type: ignore[arg-type]


@TENSORS_AS_KEYS
def test_a_map_that_leaves_tensors_out() -> None:
    model = stack()
    device_map = {"embed": 0, "norm": 0, "scale": "cpu", **{f"blocks.{n}": 1 for n in range(11)}}
    with pytest.raises(ValueError, match="does not give any device") as theirs:
        check_device_map(model, device_map)
    with pytest.raises(CheckpointError) as ours:
        resolve_device_map(model, device_map)
    assert "steps" in str(theirs.value)
    assert str(ours.value) == (
        "device_map has no device for steps, blocks.11.inner.0.weight, blocks.11.inner.1.weight "
        'and 2 more: add their module, or "" for all others'
    )
    device_map |= {"blocks.11": "disk", "steps": "cpu"}
    found = resolve_device_map(model, device_map)
    assert found["blocks.11"] == "disk"
    assert resolve_device_map(model, {**device_map, "": 2})[""] == torch.device("cuda", 2)


def test_buffers_that_are_in_no_checkpoint_may_be_left_out() -> None:
    """Like accelerate: users' maps name only modules with weights."""
    model = llama(tied=False)
    device_map = {
        "model.embed_tokens": 0,
        "model.layers": 1,
        "model.norm": 1,
        "lm_head": 1,
    }
    check_device_map(model, device_map)
    found = resolve_device_map(model, device_map)
    assert found["model.rotary_emb.inv_freq"] == torch.device("cuda", 0)
    assert {k: d.index for k, d in found.items() if k in device_map} == device_map  # type: ignore[union-attr]
    assert resolve_device_map(model, {"model": "disk", "lm_head": "disk"}).keys() == {
        "model",
        "lm_head",
    }


def test_a_name_that_is_not_in_the_model() -> None:
    model = torch.nn.Linear(2, 2)
    with pytest.warns(UserWarning, match="device_map: Linear has nothing named wieght$"):
        resolve_device_map(model, {"": "cpu", "wieght": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_device_map(stack(), {"": 0, "blocks.1.inner": 1, "blocks.2.inner.0.weight": 2})


def test_assign_takes_the_longest_prefix() -> None:
    device_map = {"": "a", "x": "b", "x.y": "c", "x.y.weight": "d", "xx": "e"}
    names = ["x.weight", "x.y.weight", "x.y.bias", "x.yy.w", "xx.w", "xxx.w", "w", "x.y.z.w"]
    assert assign(names, device_map) == {
        "b": ["x.weight", "x.yy.w"],
        "d": ["x.y.weight"],
        "c": ["x.y.bias", "x.y.z.w"],
        "e": ["xx.w"],
        "a": ["xxx.w", "w"],
    }
    many = [f"blocks.{b}.inner.{n}.weight" for b in range(2_000) for n in range(5)]
    spread = {f"blocks.{b}": b % 7 for b in range(2_000)}
    assert {name: device for device, names in assign(many, spread).items() for name in names} == {
        name: spread[name[: name.index(".inner")]] for name in many
    }

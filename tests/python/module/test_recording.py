"""``record``, compared with the same loading code with whole tensors from the reference library."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

import weightlift as wl
from weight_loaders import Serving, Weights, assert_same, checkpoint_of, empty
from weightlift.module.recording.targets import covers, disjoint


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_every_kind_of_weight_loader(device: str, rank: int, tmp_path: Path) -> None:
    tensors = Serving.tensors(torch.Generator().manual_seed(1))
    path = checkpoint_of(tmp_path, tensors)
    wanted = Serving("cpu", rank)
    wanted.load_weights(load_file(path).items())
    found = Serving(device, rank)
    addresses = {name: p.data_ptr() for name, p in found.named_parameters()}
    recording = wl.record(found.load_weights, wl.open_checkpoint(path), module=found)
    report = recording.load()
    assert_same(found, wanted)
    assert recording.result == tensors.keys()
    assert found.calls == len(tensors)  # nothing is run twice
    assert recording.unused == []
    whole = {"a": "cat()", "b": "cat()", "scale": "item()", "table": "numpy()"}
    whole["steps"] = "cast from torch.int32 by way of torch.int32 to torch.int64"
    whole["norm"] = "set as .data"
    if device == "cpu":
        moved = [n for n, p in found.named_parameters() if p.data_ptr() != addresses[n]]
        assert moved == ["norm"]
        versions = {n: p._version for n, p in found.named_parameters()}
        assert versions == {n: p._version for n, p in wanted.named_parameters()}
        assert found.steps._version == wanted.steps._version
    assert recording.whole == whole
    assert wl.last_report() is report
    assert any("item(): 1 tensor read whole: scale" in text for text in report.fallbacks)


def test_sharded_checkpoints_come_by_one_plan(tmp_path: Path) -> None:
    tensors = Serving.tensors(torch.Generator().manual_seed(2))
    del tensors["scale"], tensors["table"], tensors["a"], tensors["b"], tensors["steps"]
    del tensors["norm"]
    wl_path = tmp_path / "sharded"
    names = list(tensors)
    wl_path.mkdir()
    index: dict[str, Any] = {"metadata": {}, "weight_map": {}}
    for number in range(3):
        part = {name: tensors[name] for name in names[number::3]}
        file = f"model-{number + 1:05}-of-00003.safetensors"
        checkpoint_of(wl_path, part, file)
        index["weight_map"].update(dict.fromkeys(part, file))
    import json

    (wl_path / "model.safetensors.index.json").write_text(json.dumps(index))
    wanted, found = Serving("cpu"), Serving("cpu")
    wanted.load_weights(tensors.items())
    loads = wl.stats().loads
    recording = wl.record(found.load_weights, wl.open_checkpoint(wl_path))
    assert recording.whole == {}
    report = recording.load()
    assert wl.stats().loads == loads + 1
    assert len(report.files) == 3
    assert_same(found, wanted)


def test_no_more_is_read_than_the_parts_need(tmp_path: Path) -> None:
    """Counted by the kernel, and by the report."""
    side = 1024
    path = checkpoint_of(tmp_path, {"rows": torch.randn(8 * side, side), "unused": torch.ones(99)})
    target = torch.zeros(2 * side, side)
    checkpoint = wl.open_checkpoint(path)

    def load(weights: Weights) -> None:
        for name, tensor in weights:
            if name == "rows":
                target.copy_(tensor[2 * side : 4 * side])

    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    recording = wl.record(load, checkpoint)
    before = read_bytes()
    report = recording.load()
    read = read_bytes() - before
    assert recording.needed_bytes == target.numel() * 4
    assert report.read_bytes <= recording.needed_bytes * 1.02
    assert read <= recording.needed_bytes * 1.02
    assert recording.unused == ["unused"]
    assert torch.equal(target, load_file(path)["rows"][2 * side : 4 * side])


@pytest.mark.parametrize(("hole_bytes", "rows"), [(1, 1), (None, 1), (8192, 2), ("1MiB", 2)])
def test_holes_between_rows(hole_bytes: int | str | None, rows: int, tmp_path: Path) -> None:
    """Gaps of 8 KiB, skipped or read. The report and the kernel count both."""
    path = checkpoint_of(tmp_path, {"t": torch.randn(512, 4096)})
    target = torch.zeros(512, 2048)

    def load(weights: Weights) -> None:
        for _, tensor in weights:
            target.copy_(tensor[:, 2048:])

    def read_bytes() -> int:
        return int(Path("/proc/self/io").read_text().split()[1])

    recording = wl.record(load, wl.open_checkpoint(path))
    with wl.Settings(hole_bytes=hole_bytes, io_path="buffered"):
        before = read_bytes()
        report = recording.load()
        read = read_bytes() - before
    assert torch.equal(target, load_file(path)["t"][:, 2048:])
    needed = recording.needed_bytes
    for count in (report.read_bytes, read):
        assert (rows - 0.05) * needed <= count <= rows * needed * 1.02


# Chains of views, on both sides.


@st.composite
def views(draw: st.DrawFn, shape: tuple[int, ...]) -> list[tuple[Any, ...]]:
    """Steps (function of a tensor, arguments), each applied to the one before."""
    steps: list[tuple[Any, ...]] = []
    probe = torch.empty(shape, device="meta")
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["narrow", "step", "permute", "unsqueeze", "split", "reshape"]))
        if probe.dim() == 0 and kind != "unsqueeze":
            continue
        dim = draw(st.integers(0, max(probe.dim() - 1, 0)))
        size = probe.shape[dim] if probe.dim() else 0
        step: tuple[Any, ...]
        if kind == "narrow":
            start = draw(st.integers(0, size))
            step = (torch.narrow, dim, start, draw(st.integers(0, size - start)))
        elif kind == "step":
            index = [slice(None)] * dim + [slice(draw(st.integers(0, size)), None, 2)]
            step = (Tensor.__getitem__, tuple(index))
        elif kind == "permute":
            step = (torch.permute, tuple(draw(st.permutations(range(probe.dim())))))
        elif kind == "unsqueeze":
            step = (torch.unsqueeze, dim)
        elif kind == "split":
            if size < 2:
                continue
            step = (lambda t, d, i: t.chunk(2, d)[i], dim, draw(st.integers(0, 1)))
        else:
            step = (torch.reshape, (-1,))
        found = step[0](probe, *step[1:])
        steps.append(step)
        probe = found
    return steps


def applied(tensor: Tensor, steps: list[tuple[Any, ...]]) -> Tensor:
    for function, *arguments in steps:
        tensor = function(tensor, *arguments)
    return tensor


@pytest.fixture(scope="module")
def cube(tmp_path_factory: pytest.TempPathFactory) -> tuple[wl.Checkpoint, Tensor]:
    tensor = torch.randn(6, 5, 8)
    path = checkpoint_of(tmp_path_factory.mktemp("cube"), {"t": tensor})
    return wl.open_checkpoint(path), tensor


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_chain_of_views(cube: tuple[wl.Checkpoint, Tensor], data: st.DataObject) -> None:
    checkpoint, tensor = cube
    steps = data.draw(views((6, 5, 8)))
    shape = applied(tensor, steps).shape
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
    order = data.draw(st.permutations(range(len(shape))))
    into = data.draw(st.sampled_from(["dense", "holes", "permuted"]))

    def target_of() -> tuple[Tensor, Tensor]:
        if into == "permuted":
            memory = torch.zeros([shape[i] for i in order], dtype=dtype)
            return memory, memory.permute([order.index(i) for i in range(len(shape))])
        if into == "holes":
            memory = torch.zeros((*shape, 3), dtype=dtype)
            return memory, memory[..., 1]
        memory = torch.zeros(shape, dtype=dtype)
        return memory, memory

    def load(part: Tensor) -> Callable[[Weights], None]:
        def load_weights(weights: Weights) -> None:
            for _, given_one in weights:
                part.copy_(applied(given_one, steps))

        return load_weights

    found, part = target_of()
    wanted, right = target_of()
    load(right)([("t", tensor)])
    recording = wl.record(load(part), checkpoint)
    recording.load()
    assert torch.equal(found, wanted)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_parts_that_share_a_byte_are_told(data: st.DataObject) -> None:
    """``disjoint`` and ``covers``, compared with marks for each element. A false "no" is allowed, a
    false "yes" is not."""
    base = torch.zeros(6, 5, 8)
    one = applied(base, data.draw(views((6, 5, 8))))
    other = applied(base, data.draw(views((6, 5, 8))))
    if one.numel() == 0 or other.numel() == 0 or not (one._is_view() and other._is_view()):
        return
    base.zero_()
    one.fill_(1)
    first = base.clone()
    base.zero_()
    other.fill_(1)
    share = bool((first * base).any())
    if disjoint(one, other):
        assert not share
    if covers(one, other):
        assert torch.equal(first * base, base)


def test_columns_and_rows_are_told_apart() -> None:
    base = torch.zeros(8, 10)
    assert disjoint(base[:, :5], base[:, 5:])
    assert disjoint(base[:4, :6], base[4:, 2:])
    assert not disjoint(base[:, :6], base[:, 5:])
    assert covers(base[2:6], base[3:4, 1:])


# The order of writes.


def loads_alike(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    load: Callable[[nn.Module, dict[str, Tensor]], object],
    make: Callable[[str], nn.Module],
    devices: tuple[str, ...] = ("cpu", "meta"),
) -> list[wl.module.recording.Recording]:
    """Runs ``load`` of a module and a dict, whole and recorded, on real modules and on meta."""
    path = checkpoint_of(tmp_path, tensors)
    wanted = make("cpu")
    load(wanted, load_file(path))
    recordings = []
    for device in devices:
        found = make(device)
        recording = wl.record(
            lambda weights, found=found: load(found, dict(weights)),
            wl.open_checkpoint(path),
            module=found,
        )
        recording.load()
        assert_same(found, wanted)
        recordings.append(recording)
    return recordings


class Two(nn.Module):
    def __init__(self, device: str, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.p = empty(4, 6, dtype=dtype, device=device)
        self.q = empty(4, 6, dtype=dtype, device=device)


def fill_before(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.fill_(3)
    m.p.data[1:3].copy_(w["x"][1:3])
    m.q.data.zero_().copy_(w["y"])


def fill_after(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.copy_(w["x"])
    m.p.data[:, 2:4].fill_(0)
    m.q.data.copy_(w["y"])
    m.q.data.zero_()


def overwrite_in_part(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.copy_(w["x"])
    m.p.data[1:3, 1:5].copy_(w["y"][1:3, 1:5])
    m.p.data[2].copy_(w["x"][0])
    m.q.data.copy_(w["x"])
    m.q.data.copy_(w["y"])


def look_between(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.copy_(w["x"])
    m.q.data.copy_(m.p.data * 2)
    m.p.data[0].copy_(w["y"][0])


def change_in_place(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.copy_(w["x"])
    m.p.data.mul_(2)
    m.q.data.normal_(generator=torch.Generator().manual_seed(1))
    m.q.data[2:].copy_(w["y"][2:])


def change_the_tensor(m: nn.Module, w: dict[str, Tensor]) -> None:
    view = w["x"][1:]
    copied = w["x"].clone()
    view.mul_(2)
    m.p.data.copy_(w["x"])
    m.q.data.copy_(copied)


def change_a_copy(m: nn.Module, w: dict[str, Tensor]) -> None:
    copied = w["x"].t().contiguous()
    copied.view(-1)[3:5] = 9
    m.p.data.copy_(copied.t())
    m.q.data.copy_(w["x"])


def one_to_another(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.copy_(w["x"])
    m.q.data.copy_(m.p.data)


def list_operators(m: nn.Module, w: dict[str, Tensor]) -> None:
    torch._foreach_copy_([m.p.data, m.q.data], [w["x"], w["y"]])


def stacked(m: nn.Module, w: dict[str, Tensor]) -> None:
    both = torch.stack([w["x"], w["y"]])
    m.p.data.copy_(both[1])
    m.q.data.copy_(both[0])


def broadcast(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.copy_(w["x"][:1])
    m.q.data.copy_(w["y"][0, 0])


def indexed(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.copy_(w["x"][torch.tensor([3, 2, 1, 0])])
    m.q.data.zero_()
    m.q.data[torch.tensor([0, 2])] = w["y"][:2]


def reshaped(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.copy_(w["x"].t().reshape(4, 6))
    m.q.data.view(3, 8).copy_(w["y"].view(-1).view(3, 8))


def moved(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.copy_(w["x"].to(m.p.device, m.p.dtype))
    m.q.data.copy_(w["y"].to(torch.float64).float())


def twice_narrowed(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.copy_(w["x"].to(torch.float16))
    m.q.data.copy_(w["y"].bfloat16().double())


def new_ones(m: nn.Module, w: dict[str, Tensor]) -> None:
    padded = torch.zeros_like(w["x"])
    padded[:2].copy_(w["x"][:2])
    m.p.data.copy_(padded)
    m.q.data.copy_(w["y"].new_full((4, 6), 5))


LOADS = [
    fill_before,
    fill_after,
    overwrite_in_part,
    look_between,
    change_in_place,
    change_the_tensor,
    change_a_copy,
    one_to_another,
    list_operators,
    stacked,
    broadcast,
    indexed,
    reshaped,
    moved,
    twice_narrowed,
    new_ones,
]


@pytest.mark.parametrize("load", LOADS, ids=lambda load: load.__name__)
def test_the_order_of_writes(load: Any, tmp_path: Path) -> None:
    tensors = {"x": torch.randn(4, 6), "y": torch.randn(4, 6)}
    loads_alike(tmp_path, tensors, load, Two)


# Other operations of weight loaders.


def add_in_place(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.copy_(w["x"])
    m.p.data.add_(w["y"])
    m.q.data.zero_()
    m.q.data += w["x"][:, :1]


def put_by_index(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.copy_(w["x"])
    m.p.data.index_put_((torch.tensor([1, 1]),), w["y"][:2], accumulate=True)
    m.q.data.copy_(w["y"])
    m.q.data.masked_fill_(w["x"] > 0, -1)
    m.q.data.index_copy_(0, torch.tensor([3]), w["x"][:1])


def as_other_bits(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.view(torch.int32).copy_(w["x"].view(torch.int32))
    m.q.data.view(torch.uint8)[:, :4].copy_(w["x"].view(torch.uint8)[:, :4])
    m.q.data[:, 1:].copy_(w["y"][:, 1:])


def as_a_bool(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.copy_(w["x"] if w["x"][0, 0] > 0 else w["y"])
    m.q.data.copy_(w["y"] if w["x"].any() and len(w["x"]) == 4 else w["x"])


def row_by_row(m: nn.Module, w: dict[str, Tensor]) -> None:
    for into, row in zip(m.p.data, w["x"], strict=True):
        into.copy_(row)
    for number, column in enumerate(w["y"].unbind(1)):
        m.q.data[:, number] = column


def joined(m: nn.Module, w: dict[str, Tensor]) -> None:
    both = torch.cat([w["x"], w["y"]])
    m.p.data.copy_(both[2:6])
    torch.cat([w["y"][:2], w["x"][:2]], out=m.q.data)


def into_both(m: nn.Module, w: dict[str, Tensor]) -> None:
    for parameter in (m.p, m.q):
        parameter.data.copy_(w["y"])
        parameter.data[2:].copy_(w["x"][2:])


def made_late(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.r = nn.Parameter(torch.zeros(2, 6), requires_grad=False)
    m.r.data.copy_(w["x"][1:3])
    m.late = nn.UninitializedParameter(requires_grad=False)
    m.late.materialize((4, 3))
    m.late.data.copy_(w["y"].chunk(2, 1)[1])
    m.register_buffer("seen", w["x"][:, 0].clone())
    m.p.data.copy_(w["x"])
    m.q.data.copy_(w["y"])


def taken_as_parameter(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p = nn.Parameter(w["x"][:, :3], requires_grad=False)
    m.q.data.copy_(w["y"])
    m.q = nn.Parameter(m.q.data.t().contiguous(), requires_grad=False)


def by_state_dict(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.load_state_dict({"p": w["x"], "q": w["y"].double()})


def by_state_dict_assigned(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.load_state_dict({"p": w["x"], "q": w["y"]}, assign=True)


def by_functions(m: nn.Module, w: dict[str, Tensor]) -> None:
    torch.add(w["x"], 1, out=m.p.data)
    torch.mul(w["x"], w["y"], out=m.q.data)
    m.q.data[1] = torch.where(w["x"][1] > 0, w["x"][1], w["y"][1])
    m.q.data[2] = torch.lerp(w["x"][2], w["y"][2], 0.5)


def swapped(m: nn.Module, w: dict[str, Tensor]) -> None:
    m.p.data.copy_(w["x"])
    m.q.data.copy_(w["y"])
    m.p.data, m.q.data = m.q.data.clone(), m.p.data.clone()
    m.p.data[0].copy_(w["x"][3])


ODD = [
    add_in_place,
    put_by_index,
    as_other_bits,
    as_a_bool,
    row_by_row,
    joined,
    into_both,
    made_late,
    taken_as_parameter,
    by_state_dict,
    by_state_dict_assigned,
    by_functions,
    swapped,
]


@pytest.mark.parametrize("load", ODD, ids=lambda load: load.__name__)
def test_what_loaders_are_seen_to_do(load: Any, tmp_path: Path) -> None:
    tensors = {"x": torch.randn(4, 6), "y": torch.randn(4, 6)}
    loads_alike(tmp_path, tensors, load, Two, devices=("cpu",))


def test_memory_that_others_write_to(tmp_path: Path) -> None:
    """Writes through NumPy's view of a target cannot be seen, so earlier copies are done before."""
    tensors = {"x": torch.randn(4, 6), "y": torch.randn(4, 6)}

    def load(m: nn.Module, w: dict[str, Tensor]) -> None:
        seen = m.p.data.numpy()
        m.p.data.copy_(w["x"])
        seen[1] = 5
        m.q.data.copy_(w["y"])
        other = torch.from_dlpack(m.q.data)
        m.q.data[:2].copy_(w["x"][:2])
        other[0] = 7
        m.q.data[3].copy_(w["x"][3])

    loads_alike(tmp_path, tensors, load, Two, devices=("cpu",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int32])
def test_casts_of_the_copy(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"x": torch.randn(4, 6) * 100, "y": torch.randn(4, 6, dtype=torch.float64)}

    def load(m: nn.Module, w: dict[str, Tensor]) -> None:
        m.p.data.copy_(w["x"])
        m.q.data.copy_(w["y"])

    recordings = loads_alike(tmp_path, tensors, load, lambda device: Two(device, dtype))
    assert bool(recordings[0].whole) == (dtype == torch.int32)  # which the engine does not cast to


@pytest.mark.parametrize(
    "take",
    [
        pytest.param(Tensor.tolist, id="tolist"),
        pytest.param(lambda t: t.numpy().copy(), id="numpy"),
        pytest.param(lambda t: __import__("numpy").asarray(t).copy(), id="asarray"),
        pytest.param(repr, id="repr"),
        pytest.param(lambda t: f"{t[0, 0]:.3f}", id="format"),
        pytest.param(lambda t: float(t[1, 1]), id="float"),
        pytest.param(lambda t: bool(t[1, 1] > 0), id="bool"),
        pytest.param(lambda t: pickle.loads(pickle.dumps(t)), id="pickle"),
        pytest.param(copy.deepcopy, id="deepcopy"),
        pytest.param(lambda t: t.clone().untyped_storage().tolist(), id="storage"),
        pytest.param(lambda t: torch.from_dlpack(t).clone(), id="dlpack"),
        pytest.param(lambda t: list(t), id="list"),
        pytest.param(lambda t: t.sum(), id="sum"),
        pytest.param(lambda t: torch.frombuffer(t.numpy(), dtype=torch.float32), id="frombuffer"),
    ],
)
def test_whoever_needs_bytes_gets_them(take: Any, cube: tuple[wl.Checkpoint, Tensor]) -> None:
    checkpoint, tensor = cube
    taken: list[Any] = []

    def load(weights: Weights) -> None:
        for _, given_one in weights:
            taken.append(take(given_one[1]))

    recording = wl.record(load, checkpoint)
    recording.load()
    wanted = take(tensor[1].clone())
    if isinstance(wanted, Tensor):
        assert torch.equal(taken[0], wanted)
        assert type(taken[0]) is Tensor
    elif isinstance(wanted, list) and isinstance(wanted[0], Tensor):
        assert all(torch.equal(a, b) for a, b in zip(taken[0], wanted, strict=True))
    elif hasattr(wanted, "tobytes"):
        assert taken[0].tobytes() == wanted.tobytes()
    else:
        assert taken[0] == wanted


def test_an_address_is_that_of_the_bytes(cube: tuple[wl.Checkpoint, Tensor]) -> None:
    import ctypes

    checkpoint, tensor = cube
    seen: list[bytes] = []

    def load(weights: Weights) -> None:
        for _, given_one in weights:
            row = given_one[2]
            seen.append(ctypes.string_at(row.data_ptr(), row.numel() * 4))

    recording = wl.record(load, checkpoint)
    assert seen == [tensor[2].numpy().tobytes()]
    assert recording.whole == {"t": "data_ptr()"}


def test_shapes_that_change_in_place(tmp_path: Path) -> None:
    def load(m: nn.Module, w: dict[str, Tensor]) -> None:
        w["x"].t_()
        assert w["x"].shape == (4, 6)
        m.p.data.copy_(w["x"])
        w["y"].resize_(2, 3)
        m.q.data.zero_()
        m.q.data[:2, :3].copy_(w["y"])

    tensors = {"x": torch.randn(6, 4), "y": torch.randn(4, 6)}
    loads_alike(tmp_path, tensors, load, Two)


# Kept tensors.


def test_tensors_that_are_kept_become_real(tmp_path: Path) -> None:
    tensors = {"x": torch.randn(4, 6), "y": torch.randn(4, 6), "z": torch.randn(3)}

    class Keeps(nn.Module):
        def __init__(self, device: str) -> None:
            super().__init__()
            self.p = empty(4, 6, device=device)
            self.register_buffer("b", None)
            self.others: list[Tensor] = []

    def load(m: nn.Module, w: dict[str, Tensor]) -> None:
        m.p = nn.Parameter(w["x"])
        m.b = w["y"][1:].clone()
        m.others.append(w["z"])
        m.others.append(w["z"][1:])

    path = checkpoint_of(tmp_path, tensors)
    for device in ("cpu", "meta"):
        wanted, found = Keeps("cpu"), Keeps(device)
        load(wanted, load_file(path))
        recording = wl.record(
            lambda weights, found=found: load(found, dict(weights)),
            wl.open_checkpoint(path),
            module=found,
        )
        recording.load()
        assert_same(found, wanted)
        assert found.p.requires_grad
        assert [type(t) for t in found.others] == [Tensor, Tensor]
        assert torch.equal(found.others[0], tensors["z"])
        found.others[0].fill_(5)  # a view is one still
        assert torch.equal(found.others[1], torch.full((2,), 5.0))


def test_a_tensor_that_is_used_later_reads_itself(tmp_path: Path) -> None:
    path = checkpoint_of(tmp_path, {"x": torch.arange(6.0)})
    kept: dict[str, Tensor] = {}
    recording = wl.record(lambda weights: kept.update(weights), wl.open_checkpoint(path))
    assert torch.equal(kept["x"] * 2, torch.arange(6.0) * 2)
    assert recording.whole == {"x": "mul()"}


def test_assigned_as_load_state_dict_does(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    path = checkpoint_of(tmp_path, source.state_dict())
    with torch.device("meta"):
        found = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    recording = wl.record(
        lambda weights: found.load_state_dict(dict(weights), assign=True),
        wl.open_checkpoint(path),
        module=found,
    )
    recording.load()
    assert_same(found, source)
    assert recording.whole == {}


# Files of torch.


def test_torch_files_and_their_views(tmp_path: Path) -> None:
    base = torch.randn(8, 6)
    state = {"x": base[:4], "y": base[4:].t().contiguous().t(), "whole": base, "t": base.t()}
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path)

    class Four(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p, self.q = empty(4, 6), empty(4, 6)
            self.r = empty(6, 8, dtype=torch.bfloat16)
            self.s = empty(2, 8)

    def load(m: nn.Module, w: dict[str, Tensor]) -> None:
        m.p.data.copy_(w["x"])
        m.q.data.copy_(w["y"])
        m.r.data.copy_(w["whole"].t())
        m.s.data.copy_(w["t"][1:5:2])

    wanted, found = Four(), Four()
    load(wanted, torch.load(path, weights_only=True))
    recording = wl.record(lambda weights: load(found, dict(weights)), wl.open_checkpoint(path))
    recording.load()
    assert_same(found, wanted)
    assert recording.whole == {}


# Again.


def test_a_recording_is_loaded_again(tmp_path: Path) -> None:
    first = {"x": torch.randn(4, 6), "y": torch.randn(4, 6)}
    second = {"x": torch.randn(4, 6), "y": torch.randn(4, 6)}
    one, two = (
        wl.open_checkpoint(checkpoint_of(tmp_path, tensors, f"{i}.safetensors"))
        for i, tensors in enumerate((first, second))
    )
    for device in ("cpu", "meta"):
        found, wanted = Two(device), Two("cpu")
        recording = wl.record(
            lambda weights, found=found: overwrite_in_part(found, dict(weights)), one, module=found
        )
        recording.load()
        address = found.p.data_ptr()
        recording.load(two)
        overwrite_in_part(wanted, second)
        assert_same(found, wanted)
        assert found.p.data_ptr() == address
        recording.load(one)
        overwrite_in_part(wanted, first)
        assert_same(found, wanted)


def test_loading_again_is_seen_by_autograd(tmp_path: Path) -> None:
    checkpoint = wl.open_checkpoint(checkpoint_of(tmp_path, {"x": torch.ones(4, 6)}))
    target = torch.zeros(4, 6)
    recording = wl.record(lambda weights: target[1:].copy_(dict(weights)["x"][1:]), checkpoint)
    assert target._version == 1
    recording.load()
    assert target._version == 1
    factor = torch.ones(4, 6, requires_grad=True)
    product = (factor * target).sum()
    recording.load()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_constants_are_written_again(tmp_path: Path) -> None:
    checkpoint = wl.open_checkpoint(checkpoint_of(tmp_path, {"x": torch.ones(4, 6)}))
    found, wanted = Two("cpu"), Two("cpu")

    def load(m: nn.Module, w: dict[str, Tensor]) -> None:
        m.p.data.copy_(w["x"])
        m.p.data[1:].fill_(4)
        m.q.data.fill_(2)

    recording = wl.record(lambda weights: load(found, dict(weights)), checkpoint)
    recording.load()
    found.p.data.fill_(-1)
    found.q.data.fill_(-1)
    recording.load()
    load(wanted, {"x": torch.ones(4, 6)})
    assert_same(found, wanted)


def test_what_cannot_be_done_again_says_so(tmp_path: Path) -> None:
    tensors = {"x": torch.ones(4, 6), "y": torch.ones(4, 6)}
    checkpoint = wl.open_checkpoint(checkpoint_of(tmp_path, tensors))
    found = Two("cpu")
    recording = wl.record(lambda weights: stacked(found, dict(weights)), checkpoint)
    recording.load()
    with pytest.raises(wl.CheckpointError, match=r"cannot be loaded again: tensor 'x': stack\(\)"):
        recording.load()


def test_another_checkpoint_must_have_the_same_tensors(tmp_path: Path) -> None:
    tensors = {"x": torch.ones(4, 6), "y": torch.ones(4, 6)}
    one = wl.open_checkpoint(checkpoint_of(tmp_path, tensors))
    other = wl.open_checkpoint(checkpoint_of(tmp_path, {"x": torch.ones(4, 6)}, "o.safetensors"))
    found = Two("cpu")
    recording = wl.record(lambda weights: fill_before(found, dict(weights)), one)
    with pytest.raises(wl.CheckpointError, match="'y' is missing in the checkpoint"):
        recording.load(other)


# Failures.


def test_headers_alone_are_enough_for_what_is_recorded(tmp_path: Path) -> None:
    headers = {"x": ("F32", (4, 6)), "y": ("BF16", (4, 6))}
    found = Two("cpu")
    recording = wl.record(lambda weights: overwrite_in_part(found, dict(weights)), headers)
    assert [(c.name, c.offset, c.shape, c.strides) for c in recording.copies[:2]] == [
        ("x", 0, (4, 6), (6, 1)),
        ("y", 7, (2, 4), (6, 1)),
    ]
    assert recording.copies[1].target.storage_offset() == 7
    with pytest.raises(wl.CheckpointError, match="give load\\(\\) a Checkpoint"):
        recording.load()
    tensors = {"x": torch.randn(4, 6), "y": torch.randn(4, 6).bfloat16()}
    recording.load(wl.open_checkpoint(checkpoint_of(tmp_path, tensors)))
    wanted = Two("cpu")
    overwrite_in_part(wanted, tensors)
    assert_same(found, wanted)
    with pytest.raises(wl.CheckpointError, match=r"'x'.*only headers"):
        wl.record(lambda weights: [t.sum() for _, t in weights], headers)


def test_errors_of_the_code_are_its_own(cube: tuple[wl.Checkpoint, Tensor]) -> None:
    checkpoint, tensor = cube
    target = torch.zeros(3, 4)

    def load(weights: Weights) -> None:
        for _, given_one in weights:
            target.copy_(given_one)

    with pytest.raises(RuntimeError) as wanted:
        load([("t", tensor)])
    with pytest.raises(RuntimeError) as found:
        wl.record(load, checkpoint)
    assert str(found.value) == str(wanted.value)
    with pytest.raises(KeyError, match="mine"):
        wl.record(lambda weights: {}["mine"], checkpoint)
    assert torch.zeros(2).add_(1).sum() == 2  # no mode is left behind


def test_another_thread_is_refused(cube: tuple[wl.Checkpoint, Tensor]) -> None:
    checkpoint, _ = cube
    errors: list[BaseException] = []
    target = torch.zeros(6, 5, 8)

    def load(weights: Weights) -> None:
        for _, given_one in weights:

            def work(given_one: Tensor = given_one) -> None:
                try:
                    target.copy_(given_one)
                except wl.CheckpointError as error:
                    errors.append(error)

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()

    wl.record(load, checkpoint)
    assert len(errors) == 1
    assert "thread that is not recorded" in str(errors[0])


def test_meta_targets_need_a_module_and_all_their_elements(tmp_path: Path) -> None:
    checkpoint = wl.open_checkpoint(checkpoint_of(tmp_path, {"x": torch.ones(4, 6)}))
    found = Two("meta")

    def load(weights: Weights) -> None:
        found.p.data[1:].copy_(dict(weights)["x"][1:])

    with pytest.raises(wl.CheckpointError, match="not of the module"):
        wl.record(load, checkpoint).load()
    with pytest.raises(wl.CheckpointError, match="p: the loading code leaves 6 of its elements"):
        wl.record(load, checkpoint, module=found).load()
    assert found.p.is_meta
    assert found.q.is_meta


def test_check_finds_a_difference(tmp_path: Path) -> None:
    checkpoint = wl.open_checkpoint(checkpoint_of(tmp_path, {"x": torch.randn(4, 6)}))
    found = Two("cpu")
    times: list[int] = []

    def load(weights: Weights) -> None:
        for _, tensor in weights:
            times.append(1)
            found.p.data.copy_(tensor if len(times) == 1 else tensor * 2)

    recording = wl.record(load, checkpoint, check=True)
    with pytest.raises(wl.CheckpointError, match="other bytes than the recording"):
        recording.load()
    wl.record(lambda weights: found.p.data.copy_(dict(weights)["x"]), checkpoint, check=True).load()


def test_empty_and_scalar_tensors(tmp_path: Path) -> None:
    tensors = {"none": torch.zeros(0, 3), "one": torch.tensor(4.0), "line": torch.tensor([5.0])}

    class Small(nn.Module):
        def __init__(self, device: str) -> None:
            super().__init__()
            self.none = empty(0, 3, device=device)
            self.one = empty(1, device=device)
            self.line = nn.Parameter(torch.zeros((), device=device))

    def load(m: nn.Module, w: dict[str, Tensor]) -> None:
        m.none.data.copy_(w["none"])
        m.one.data.copy_(w["one"])
        m.line.data.copy_(w["line"][0])

    for recording in loads_alike(tmp_path, tensors, load, Small, devices=("cpu",)):
        assert recording.whole == {}
        assert math.isclose(recording.needed_bytes, 8)

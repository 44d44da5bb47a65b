"""Models that are used while they load, compared with the same models loaded by torch."""

from __future__ import annotations

import copy
import io
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import support
import weightlift as wl
from background_support import (
    WIDTH,
    Gate,
    Net,
    Running,
    gate,
    inputs,
    is_plain,
    late,
    load,
    on_meta,
    raw,
    saved,
)
from weightlift.load.arriving_load import ArrivingLoad
from weightlift.load.load_plan import LoadPlan

__all__ = ["gate", "late"]

pytestmark = pytest.mark.usefixtures("late")


@pytest.mark.parametrize("keywords", [{}, {"mode": "read"}, {"mode": "map"}], ids=str)
def test_forward(tmp_path: Path, keywords: dict[str, Any]) -> None:
    expected, path = saved(tmp_path)
    model, report = load(path, **keywords)
    assert torch.equal(model(inputs()), expected(inputs()))
    assert is_plain(model)
    support.assert_same_tensors(model.state_dict(), expected.state_dict())
    assert report.bytes == sum(t.nbytes for t in expected.state_dict().values())
    assert report.progress == (report.bytes, report.bytes)
    assert wl.last_report() is report
    assert report.wait() is report


def test_files_of_torch_with_casts(tmp_path: Path) -> None:
    """Also tensors that share memory in the file, and tensors that only torch can cast."""
    expected = Net().eval()
    expected.blocks[1].linear.weight = torch.nn.Parameter(expected.blocks[0].linear.weight.detach())
    torch.save(expected.state_dict(), tmp_path / "model.bin")
    model, _ = load(tmp_path / "model.bin", dtype=torch.bfloat16)
    wanted = copy.deepcopy(expected).to(torch.bfloat16)
    assert torch.equal(model(inputs().bfloat16()), wanted(inputs().bfloat16()))
    with torch.no_grad():
        model.blocks[0].linear.weight.zero_()
    assert model.blocks[1].linear.weight.any()
    assert is_plain(model)


def test_modules_wait_for_their_own_tensors_alone(tmp_path: Path, gate: Gate) -> None:
    expected, path = saved(tmp_path)
    model, report = load(path)
    assert all(t.is_meta for module in model.modules() for t in raw(module).values())
    gate.let("blocks.0.linear.weight", "blocks.0.linear.bias")
    x = inputs()
    assert torch.equal(model.blocks[0].linear(x), expected.blocks[0].linear(x))
    assert set(gate.asked) == {("blocks.0.linear.weight", "blocks.0.linear.bias")}
    gate.let("blocks.0.scale", "blocks.0.shift", "blocks.1.scale", "blocks.1.shift")
    assert torch.equal(model.blocks[0](x), expected.blocks[0](x))
    whole = Running(lambda: model(x))
    assert whole.is_waiting
    assert gate.asked[-1] == ("blocks.1.linear.weight", "blocks.1.linear.bias")
    assert raw(model.blocks[2].linear)["weight"].is_meta
    gate.let_all()
    assert torch.equal(whole.end(), expected(x))
    assert is_plain(model)
    assert report.wait().bytes > 0


@pytest.mark.parametrize(
    "read",
    [
        lambda m: list(m.parameters()),
        lambda m: m.state_dict(),
        lambda m: m.to(torch.float64),
        lambda m: m.blocks[1].linear.weight,
        lambda m: dict(m.blocks[1].linear._parameters),
        lambda m: {**m.blocks[1].linear._parameters},
        lambda m: m.blocks[1]._buffers.copy(),
        lambda m: m.blocks[1]._buffers.get("shift"),
        lambda m: m.requires_grad_(False),
        lambda m: m.encode(inputs()),
        lambda m: copy.deepcopy(m),
        lambda m: pickle.dumps(m),
        lambda m: torch.save(m, io.BytesIO()),
        lambda m: m.share_memory(),
        lambda m: m.load_state_dict(Net().state_dict()),
        lambda m: torch.nn.utils.parameters_to_vector(m.parameters()),
        lambda m: torch.func.functional_call(m, {"head.bias": torch.zeros(4)}, (inputs(),)),
    ],
    ids=range(17),
)
def test_who_reads_tensors_waits_for_them(tmp_path: Path, gate: Gate, read: Any) -> None:
    _, path = saved(tmp_path)
    model, _ = load(path)
    reading = Running(lambda: read(model))
    assert reading.is_waiting
    gate.let_all()
    reading.end()
    held = [tensor for _, tensor in [*model.named_parameters(), *model.named_buffers()]]
    assert not any(tensor.is_meta for tensor in held)
    assert is_plain(model)


def test_iteration_waits_item_by_item(tmp_path: Path, gate: Gate) -> None:
    expected, path = saved(tmp_path)
    model, _ = load(path)
    gate.let("blocks.0.scale")
    items = model.named_parameters()
    name, first = next(items)
    assert name == "blocks.0.scale"
    assert torch.equal(first, expected.blocks[0].scale)
    assert len(list(model.named_modules())) == len(list(expected.named_modules()))
    second = Running(lambda: next(items))
    assert second.is_waiting
    gate.let_all()
    support.assert_same(second.end()[1].detach(), expected.blocks[0].linear.weight.detach())
    assert [name for name, _ in items] == [name for name, _ in expected.named_parameters()][2:]


def test_copies_are_models_of_their_own(tmp_path: Path) -> None:
    expected, path = saved(tmp_path)
    for make in (copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))):
        model, _ = load(path)
        other = make(model)
        assert torch.equal(other(inputs()), expected(inputs()))
        assert torch.equal(model(inputs()), expected(inputs()))
        assert is_plain(model)
    model, _ = load(path)
    shallow = copy.copy(model.head)
    model(inputs())
    assert torch.equal(shallow.weight, expected.head.weight)
    shallow.bias = None
    assert shallow._parameters["bias"] is None


def test_tied_weights_and_shared_modules(tmp_path: Path, gate: Gate) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks.append(self.blocks[0])
            self.last = torch.nn.Linear(4, 4, bias=False)
            self.other = torch.nn.Linear(4, 4, bias=False)
            self.other.weight = self.last.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.other(super().forward(x)) + self.last(super().forward(x))

    torch.manual_seed(0)
    expected = Tied().eval()
    state = {name: t for name, t in expected.state_dict().items() if "blocks.3" not in name}
    del state["other.weight"]
    wl.save_file(state, tmp_path / "model.safetensors")
    model = on_meta(Tied)
    wl.load_into(model, tmp_path / "model.safetensors", background=True)
    gate.let_all()
    assert torch.equal(model.other(torch.ones(4)), expected.other(torch.ones(4)))
    assert model.last.weight is model.other.weight
    assert not gate.asked[1:]
    assert torch.equal(model(inputs()), expected(inputs()))
    assert model.blocks[3] is model.blocks[0]
    assert is_plain(model)


class Odd(torch.nn.Module):
    """Modules that access weights in unusual ways."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = torch.nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.attention = torch.nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.layer = torch.nn.TransformerEncoderLayer(WIDTH, 2, 32, batch_first=True)
        self.parameters_of_its_own = torch.nn.ParameterList([torch.randn(WIDTH), torch.randn(1)])
        self.norm = torch.nn.BatchNorm1d(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x, _ = self.rnn(x[None])
        x, _ = self.attention(x, x, x)
        x = self.layer(x)[0] * self.parameters_of_its_own[0] + self.parameters_of_its_own[1]
        return self.norm(x)


def test_modules_with_ways_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected, path = saved(tmp_path, Odd())
    for _ in range(2):
        model = on_meta(Odd).eval()
        wl.load_into(model, path, background=True)
        with torch.no_grad():
            assert torch.equal(model(inputs()), expected(inputs()))
        assert is_plain(model)
    weights = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(WIDTH, 3))
    expected, path = saved(tmp_path, torch.nn.Sequential(weights))
    with torch.device("meta"):
        model = torch.nn.Sequential(
            torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(WIDTH, 3))
        )
    wl.load_into(model, path, background=True)
    assert torch.equal(model(inputs()), expected(inputs()))


def test_real_buffers_are_filled_before_the_return(tmp_path: Path, gate: Gate) -> None:
    expected, path = saved(tmp_path)
    model = Net()
    with torch.device("meta"):
        for module in model.modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    setattr(module, name, torch.nn.Parameter(parameter.to("meta")))
    shift = model.blocks[0].shift
    report = wl.load_into(model, path, background=True)
    assert model.blocks[0].shift is shift
    assert torch.equal(shift, expected.blocks[0].shift)
    assert not gate.asked
    gate.let_all()
    assert report.wait().bytes == sum(t.nbytes for t in expected.state_dict().values())


def test_what_the_checkpoint_lacks(tmp_path: Path) -> None:
    expected, path = saved(tmp_path)
    state = expected.state_dict()
    del state["head.bias"]
    wl.save_file({**state, "more": torch.ones(1)}, path)
    model = on_meta()
    with pytest.raises(wl.CheckpointError, match=r"head\.bias"):
        wl.load_into(model, path, background=True)
    report = wl.load_into(model, path, background=True, strict=False)
    assert report.missing_keys == ["head.bias"]
    assert report.unexpected_keys == ["more"]
    assert report.meta_keys == ["head.bias"]
    report.wait()
    assert report.missing_keys == ["head.bias"]
    assert torch.equal(model.head.weight, expected.head.weight)


def test_training_after_a_forward_in_inference_mode(tmp_path: Path) -> None:
    expected, path = saved(tmp_path)
    model, _ = load(path, dtype=torch.float64)
    with torch.inference_mode():
        model(inputs().double())
    assert all(p.requires_grad and not p.is_inference() for p in model.parameters())
    model(inputs().double()).sum().backward()
    expected.double()(inputs().double()).sum().backward()
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


def test_what_is_set_before_it_arrives_stays(tmp_path: Path, gate: Gate) -> None:
    expected, path = saved(tmp_path)
    model, report = load(path)
    mine = torch.nn.Parameter(torch.zeros(4))
    gate.let("head.bias")  # torch reads the attribute that it replaces
    model.head.bias = mine
    del model.blocks[0].linear.bias
    model.blocks[0].linear.bias = None
    gate.let_all()
    report.wait()
    assert model.head.bias is mine
    assert model.blocks[0].linear.bias is None
    assert torch.equal(model.head.weight, expected.head.weight)
    assert is_plain(model)


def test_the_dicts_of_a_module_that_waits(tmp_path: Path, gate: Gate) -> None:
    """Like those of any other module, through every call; also for code that keeps one."""
    expected, path = saved(tmp_path)
    wanted = dict(expected.head._parameters)
    model, report = load(path)
    held = model.head._parameters
    assert list(held) == list(held.keys()) == ["weight", "bias"]
    assert (len(held), "bias" in held, "other" in held) == (2, True, False)
    assert held.get("other") is None
    with pytest.raises(KeyError):
        held["other"]
    assert not gate.asked
    gate.let_all()
    ways: list[Any] = [dict, copy.copy, lambda d: d | {}, lambda d: {} | d, lambda d: {**d}]
    ways += [lambda d: dict(d.items()), lambda d: dict(zip(d.keys(), d.values(), strict=True))]
    for way in ways:
        model, report = load(path)
        got = way(model.head._parameters)
        assert type(got) is dict
        assert all(torch.equal(got[name], tensor) for name, tensor in wanted.items())
    model, report = load(path)
    held = model.head._parameters
    mine = torch.nn.Parameter(torch.ones(4))
    held.update(bias=mine)
    assert held.setdefault("weight", mine) is not mine
    assert held.pop("other", None) is None
    report.wait()
    assert dict(held) == model.head._parameters
    assert model.head.bias is mine
    held |= {"bias": torch.nn.Parameter(torch.zeros(4))}
    assert not model.head.bias.any()
    model.head.more = torch.nn.Parameter(torch.zeros(1))
    assert len(held) == 3
    held.clear()
    assert not list(model.head.parameters())


def test_hooks_of_others(tmp_path: Path) -> None:
    expected, path = saved(tmp_path)
    seen: list[str] = []

    def before(module: torch.nn.Module, arguments: Any) -> None:
        assert not any(t.is_meta for t in raw(module).values())
        seen.append("before")

    def after(module: torch.nn.Module, arguments: Any, result: Any) -> None:
        seen.append("after")

    model = on_meta()
    model.head.register_forward_pre_hook(before)
    model.head.register_forward_hook(after)
    wl.load_into(model, path, background=True)
    model.head.register_forward_pre_hook(before)
    model.head.register_forward_pre_hook(
        lambda module, _: seen.append(module.weight.device.type), prepend=True
    )
    assert torch.equal(model(inputs()), expected(inputs()))
    assert seen == ["cpu", "before", "before", "after"]
    assert len(model.head._forward_pre_hooks) == 3


def test_what_is_there_is_handed_out_together(tmp_path: Path) -> None:
    """Modules whose tensors have arrived before they run do not request them."""
    expected, path = saved(tmp_path)
    model, report = load(path)
    while not report._load.arriving.has(list(expected.state_dict())):  # type: ignore[attr-defined]
        time.sleep(0.001)
    x = inputs()
    assert torch.equal(model.blocks[0](x), expected.blocks[0](x))
    assert not model.blocks[1]._forward_pre_hooks
    for block, original in zip(model.blocks, expected.blocks, strict=True):
        assert torch.equal(block(x), original(x))
    assert is_plain(model)
    assert torch.equal(model(x), expected(x))
    assert report.bytes == sum(t.nbytes for t in expected.state_dict().values())


def test_order_of_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """First the order of the modules; then the order of an earlier run, in which tensors were
    loaded on request."""
    monkeypatch.setattr(ArrivingLoad, "has", lambda *_: False)
    _, path = saved(tmp_path)
    orders: list[list[str]] = []
    start = LoadPlan.start_in_order

    def noting(plan: LoadPlan, order: Any) -> Any:
        orders.append(list(order))
        return start(plan, order)

    monkeypatch.setattr(LoadPlan, "start_in_order", noting)
    for _ in range(2):
        model, _ = load(path)
        for module in (model.head, *reversed(model.blocks)):
            module(torch.ones(WIDTH))
    names = [name for name, _ in [*Net().named_parameters()]]
    assert [name for name in orders[0] if "shift" not in name] == names
    assert orders[1][:2] == ["head.weight", "head.bias"]
    assert orders[1].index("blocks.2.scale") < orders[1].index("blocks.0.scale")
    assert set(orders[1]) == set(Net().state_dict())


@pytest.mark.parametrize("mode", ["auto", "read"])
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_models(tmp_path: Path, mode: Any, whole: bool) -> None:
    expected, path = saved(tmp_path)
    torch._dynamo.reset()
    model, report = load(path, mode=mode)
    if whole:  # one graph needs what it is made of
        report.wait()
    compiled = torch.compile(model, backend="eager", fullgraph=whole)
    for _ in range(2):
        assert torch.equal(compiled(inputs()), expected(inputs()))
    assert is_plain(model)

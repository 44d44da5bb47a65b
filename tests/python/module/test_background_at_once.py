"""Background loads of which all or some tensors have arrived when the call returns: as if they had
been loaded before, without a trace in the modules that have theirs."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import support
import weightlift as wl
from background_support import Gate, Net, gate, inputs, is_plain, load, on_meta, raw, saved
from weightlift.core.errors import ReadError
from weightlift.load.arriving_load import ArrivingLoad
from weightlift.module.order_of_use import order_of_use, which_model

__all__ = ["gate"]


@pytest.mark.parametrize("keywords", [{}, {"mode": "read"}, {"dtype": torch.float64}], ids=str)
def test_small_files_that_are_in_the_page_cache(tmp_path: Path, keywords: dict[str, Any]) -> None:
    expected, path = saved(tmp_path)
    model, report = load(path, **keywords)
    assert is_plain(model)
    wanted = expected.to(keywords.get("dtype", torch.float32))
    support.assert_same_tensors(
        {name: raw(model.get_submodule(name.rpartition(".")[0]))[name.rpartition(".")[2]].detach()
         for name in wanted.state_dict()},
        wanted.state_dict(),
    )  # fmt: skip
    assert all(p.requires_grad for p in model.parameters())
    size = path.stat().st_size - 8 - int.from_bytes(path.read_bytes()[:8], "little")
    assert report.bytes == size
    assert report.progress == (size, size)
    assert [file.path for file in report.files] == [str(path)]
    assert wl.last_report() is report
    assert report.wait() is report
    report.cancel()  # has nothing to end
    assert report.wait().bytes == size
    x = inputs().to(keywords.get("dtype", torch.float32))
    assert torch.equal(model(x), wanted(x))


def _tied(model: Any) -> Any:
    model.blocks[1].linear = model.blocks[0].linear
    model.blocks[2].linear.weight = model.blocks[0].linear.weight
    return model


def test_tied_weights_marked_buffers_and_inference_mode(tmp_path: Path) -> None:
    expected = _tied(Net())
    state = expected.state_dict()
    for name in ("blocks.1.linear.weight", "blocks.1.linear.bias", "blocks.2.linear.weight"):
        del state[name]
    wl.save_file(state, tmp_path / "model.safetensors")
    model = _tied(on_meta())
    model.blocks[0].shift.mark = "kept"
    model.head.bias.mark = "kept"
    model.head.bias.requires_grad_(False)
    with torch.inference_mode():
        wl.load_into(model, tmp_path / "model.safetensors", background=True)
    assert is_plain(model)
    assert model.blocks[2].linear.weight is model.blocks[0].linear.weight
    assert model.blocks[0].shift.mark == model.head.bias.mark == "kept"
    assert not model.head.bias.requires_grad
    assert not any(p.is_inference() for p in model.parameters())
    model(inputs()).sum().backward()
    assert torch.equal(model(inputs()), expected(inputs()))


def test_only_modules_wait_whose_tensors_have_not_arrived(tmp_path: Path, gate: Gate) -> None:
    expected, path = saved(tmp_path)
    names = [name for name, _ in Net().named_parameters()][:6]
    gate.let(*names, *(f"blocks.{number}.shift" for number in range(2)))
    model, report = load(path)
    assert is_plain(model.blocks[0])
    assert torch.equal(model.blocks[0](inputs()), expected.blocks[0](inputs()))
    assert not gate.asked
    assert raw(model.head)["weight"].is_meta
    gate.let_all()
    assert torch.equal(model(inputs()), expected(inputs()))
    assert gate.asked
    assert is_plain(model)
    assert report.wait().bytes == sum(t.nbytes for t in expected.state_dict().values())


def test_loads_that_begin_in_inference_mode(tmp_path: Path, gate: Gate) -> None:
    """The parameters are usual ones, whenever they arrive."""
    expected, path = saved(tmp_path)
    with torch.inference_mode():
        model, _ = load(path)
    gate.let_all()
    assert torch.equal(model(inputs()), expected(inputs()))
    assert not any(p.is_inference() for p in model.parameters())
    model(inputs()).sum().backward()


def test_an_order_that_nobody_has_seen_is_not_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, path = saved(tmp_path)
    names = [*Net().state_dict()]
    which = which_model(on_meta())
    with monkeypatch.context() as patches:
        patches.setattr(ArrivingLoad, "has", lambda *_: False)
        model, _ = load(path)
        for module in (model.head, *reversed(model.blocks)):
            module(torch.ones(16))
    order = order_of_use(which, names)
    assert order[0] == "head.weight"
    load(path)
    assert order_of_use(which, names) == order


@pytest.mark.parametrize("mode", ["read", "map"])
def test_files_that_changed(tmp_path: Path, mode: Any) -> None:
    """The call returns, and the first module that needs what failed raises the error."""
    _, path = saved(tmp_path)
    checkpoint = wl.open_checkpoint(path)
    os.truncate(path, path.stat().st_size - 256)
    model = on_meta()
    report = wl.load_into(model, checkpoint, background=True, mode=mode)
    for use in (lambda: model(inputs()), report.wait):
        with pytest.raises(ReadError) as error:
            use()
        assert error.value.filename == str(path)

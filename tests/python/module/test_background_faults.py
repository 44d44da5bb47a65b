"""Loads in the background that fail, end early, or are used in forbidden ways."""

from __future__ import annotations

import _thread
import contextlib
import functools
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import background_support
import fuse_server
import simulated
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
from simulated import Policy, Switch, machine
from simulated_torch import Allocator
from support import sparse_file
from weightlift.core.errors import ArgumentError, LoadCancelledError, ReadError
from weightlift.load import plan_writer

__all__ = ["gate", "late", "machine"]

pytestmark = pytest.mark.usefixtures("late")

MIB = 1 << 20


class Wide(torch.nn.Module):
    """Larger than one read."""

    def __init__(self, width: int = 512, depth: int = 24) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(
            torch.nn.Linear(width, width, bias=False) for _ in range(depth)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_files_that_end_early(tmp_path: Path) -> None:
    """The error of the first module that needs a missing tensor names the file and the tensor; so
    do all later ones, and wait()."""
    _, path = saved(tmp_path, Wide())
    checkpoint = wl.open_checkpoint(path)
    os.truncate(path, path.stat().st_size - 3 * MIB)
    model = on_meta(Wide)
    report = wl.load_into(model, checkpoint, background=True, mode="read")
    for use in (lambda: model(torch.ones(512)), lambda: model.state_dict(), report.wait):
        with pytest.raises(ReadError) as error:
            use()
        assert error.value.filename == str(path)
        assert error.value.code in ("file_shrank", "unexpected_eof", "file_changed")
    with pytest.raises(ReadError):
        list(model.parameters())
    report.cancel()
    assert all(parameter.is_meta for parameter in model.layers[-1].parameters())
    torch.manual_seed(0)
    again, path = saved(tmp_path, Wide())
    wl.load_into(model.to_empty(device="meta"), path)
    torch.testing.assert_close(model(torch.ones(512)), again(torch.ones(512)))


def test_files_that_vanish(tmp_path: Path) -> None:
    """Are open still."""
    expected, path = saved(tmp_path, Wide())
    for mode in ("read", "auto"):
        kept = path.with_suffix(".kept")
        model = on_meta(Wide)
        os.link(path, kept)
        wl.load_into(model, path, background=True, mode=mode)
        path.unlink()
        torch.testing.assert_close(model(torch.ones(512)), expected(torch.ones(512)))
        kept.rename(path)


def test_files_that_are_written_to(tmp_path: Path, gate: Gate) -> None:
    """None of their tensors is handed out, even if much had been read before."""
    _, path = saved(tmp_path)
    model, report = load(path, mode="read")
    gate.let("blocks.0.linear.weight", "blocks.0.linear.bias")
    model.blocks[0].linear(inputs())
    time.sleep(0.02)
    data = bytearray(path.read_bytes())
    data[-64:] = bytes(64)
    with path.open("r+b") as file:
        file.write(data)
    gate.let_all()
    for use in (lambda: model(inputs()), report.wait):
        with pytest.raises(ReadError, match=r"written to|modification time") as error:
            use()
        assert error.value.filename == str(path)


def test_disks_that_fail(tmp_path: Path) -> None:
    """EIO from the middle of the file on, from a file system that returns it."""
    _, path = saved(tmp_path, Wide())
    with contextlib.ExitStack() as stack:
        try:
            (tmp_path / "mount").mkdir()
            served = fuse_server.mounted(
                tmp_path / "mount", path, direct=True, bad_from=path.stat().st_size // 2
            )
            failing = stack.enter_context(served)
        except (OSError, FileNotFoundError) as error:
            pytest.skip(f"no failing file without FUSE: {error}")
        model = on_meta(Wide)
        wl.load_into(model, failing, background=True, mode="read")
        with pytest.raises(ReadError) as error:
            model(torch.ones(512))
        assert error.value.filename == str(failing)
        assert "layers." in str(error.value)


def test_dropping_the_model_cancels(tmp_path: Path) -> None:
    """The loaded tensors are freed; a report does not keep them."""
    _, path = saved(tmp_path, Wide())
    gc.disable()  # not by chance, and not later
    try:
        model = on_meta(Wide)
        report = wl.load_into(model, path, background=True, mode="read")
        last = weakref.ref(model.layers[-1])
        del model
        assert last() is None
        with pytest.raises(LoadCancelledError):
            report.wait()
        assert report._load.arriving._outputs.tensors == [None] * 24
    finally:
        gc.enable()


def test_a_part_of_the_model_that_is_kept(tmp_path: Path) -> None:
    expected, path = saved(tmp_path)
    model, report = load(path)
    part = model.blocks[1]
    del model
    gc.collect()
    assert torch.equal(part(inputs()), expected.blocks[1](inputs()))
    assert is_plain(part)
    with pytest.raises(LoadCancelledError):  # for tensors that nobody needs any more
        report.wait()


def test_cancel(tmp_path: Path, gate: Gate) -> None:
    expected, path = saved(tmp_path)
    model, report = load(path)
    gate.let("head.weight", "head.bias")
    model.head(torch.ones(WIDTH))
    report.cancel()
    report.cancel()
    gate.let_all()
    assert is_plain(model)
    assert raw(model.blocks[0].linear)["weight"].is_meta
    assert torch.equal(model.head.weight, expected.head.weight)
    with pytest.raises(LoadCancelledError):
        report.wait()
    model = model.to_empty(device="meta")
    wl.load_into(model, path)
    assert torch.equal(model(inputs()), expected(inputs()))


def test_ctrl_c_while_waiting(tmp_path: Path, gate: Gate) -> None:
    """Ends the wait but not the load."""
    expected, path = saved(tmp_path)
    model, report = load(path)
    for use in (lambda: model(inputs()), lambda: model.state_dict()):
        timer = threading.Timer(0.1, _thread.interrupt_main)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            use()
        timer.join()
    assert not is_plain(model)
    gate.let_all()
    assert torch.equal(model(inputs()), expected(inputs()))
    assert report.wait() is report


def test_ctrl_c_and_a_slow_disk(tmp_path: Path) -> None:
    """The engine's wait notices it, and deleting the model ends the rest at once."""
    size = 256 * MIB
    header = {"weight": {"dtype": "F32", "shape": [1, size // 4], "data_offsets": [0, size]}}
    sparse_file(tmp_path / "content", header, size)
    (tmp_path / "mount").mkdir()
    with contextlib.ExitStack() as stack:
        try:
            served = fuse_server.mounted(
                tmp_path / "mount", tmp_path / "content", direct=True, seconds=0.1
            )
            path = stack.enter_context(served)
        except (OSError, FileNotFoundError) as error:
            pytest.skip(f"no slow file without FUSE: {error}")
        with torch.device("meta"):
            model = torch.nn.Linear(size // 4, 1, bias=False)
        report = wl.load_into(model, path, background=True, mode="read")
        timer = threading.Timer(0.3, _thread.interrupt_main)
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            model(torch.ones(1))
        timer.join()
        done, total = report.progress
        assert done < total == size
        del model
        with pytest.raises(LoadCancelledError):
            report.wait()
        assert report.progress.done < total


def test_threads_in_the_same_model(tmp_path: Path) -> None:
    expected, path = saved(tmp_path, Wide())
    wanted = expected(torch.ones(512))
    for mode in ("auto", "read"):
        model = on_meta(Wide)
        wl.load_into(model, path, background=True, mode=mode)
        forward = functools.partial(model, torch.ones(512))
        runs = [Running(forward) for _ in range(6)]
        reads = [Running(model.state_dict) for _ in range(3)]
        for run in runs:
            torch.testing.assert_close(run.end(), wanted)
        for read in reads:
            state = read.end()
            assert all(torch.equal(state[name], t) for name, t in expected.state_dict().items())
        assert is_plain(model)


def test_exceptions_in_forward(tmp_path: Path) -> None:
    expected, path = saved(tmp_path)
    model, _ = load(path)

    def fail(*_: Any) -> None:
        raise RuntimeError("in a hook")

    handle = model.blocks[1].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="in a hook"):
        model(inputs())
    with pytest.raises(RuntimeError, match="shapes"):
        model(torch.ones(3, 5))
    handle.remove()
    assert torch.equal(model(inputs()), expected(inputs()))
    assert is_plain(model)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forks(tmp_path: Path) -> None:
    """The engine's threads are in the parent: the child gets an error, and waits for none at its
    end."""
    _, path = saved(tmp_path)
    code = f"""
import os, sys
sys.path.insert(0, {str(Path(background_support.__file__).parent)!r})
import torch
from background_support import inputs, load
from weightlift.module.background.load import BackgroundLoad
BackgroundLoad._count_here = lambda _: 0  # nothing has arrived
model, report = load({str(path)!r}, mode="read")
child = os.fork()
if child == 0:
    try:
        model(inputs())
    except Exception as error:
        assert "before the fork" in str(error), error
        del model, report
        sys.exit(7)
    sys.exit(1)
code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
print(code, model(inputs()).shape[0], len(report.wait().files))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout.split() == ["7", "3", "1"], done.stderr


def test_the_end_of_the_process(tmp_path: Path) -> None:
    """The process ends during a load without waiting and without messages."""
    _, path = saved(tmp_path, Wide())
    code = f"""
import sys
sys.path[:0] = [{str(Path(background_support.__file__).parent)!r}, {str(Path(__file__).parent)!r}]
import weightlift as wl
from background_support import on_meta
from test_background_faults import Wide
model = on_meta(Wide)
report = wl.load_into(model, {str(path)!r}, background=True, mode="read")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("keywords", "match"),
    [
        ({"verify": True}, "verify"),
        ({"device_map": {"blocks": "cpu", "head": "disk"}}, "disk"),
    ],
    ids=str,
)
def test_what_goes_not_together(tmp_path: Path, keywords: dict[str, Any], match: str) -> None:
    _, path = saved(tmp_path)
    model = on_meta()
    with pytest.raises(ArgumentError, match=match):
        wl.load_into(model, path, background=True, **keywords)
    assert is_plain(model)


def test_real_parameters_are_refused(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    model = Net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ArgumentError, match=r"'blocks\.0\.scale' is real"):
        wl.load_into(model, path, background=True)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    # A model that is loading: its tensors are real when they are accessed.
    waiting, _ = load(path)
    with pytest.raises(ArgumentError, match="is real"):
        wl.load_into(waiting, path, background=True)


class TestOnSimulatedDevices:
    pytestmark = simulated.pytestmark

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
    def test_the_stream_waits(
        self,
        machine: Switch,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        seed: int,
        dtype: torch.dtype | None,
    ) -> None:
        """The stream then reads the loaded bytes, though the host has not waited for the copies."""
        expected, path = saved(tmp_path, Wide(64, 12))
        wanted = expected if dtype is None else expected.to(dtype)
        model = on_meta(Wide, 64, 12)
        with machine(1, seed, Policy.RANDOM) as driver:
            allocator = Allocator(driver)
            monkeypatch.setattr(plan_writer, "TorchAllocator", lambda: allocator)
            report = wl.load_into(
                model, path, device_map="cuda:0", background=True, dtype=dtype or "auto"
            )
            for number in reversed(range(12)):
                weight = model.layers[number].weight
                size = weight.numel() * weight.element_size()
                got = driver.read(weight.data_ptr(), size, device=0, stream=allocator.stream(0))
                assert bytes(got) == (
                    wanted.layers[number].weight.detach().view(torch.uint8).numpy().tobytes()
                )
            report.wait()
            assert report.devices == {"cuda:0": 12 * 64 * 64 * 4}
            assert is_plain(model)
            del model, weight
            gc.collect()

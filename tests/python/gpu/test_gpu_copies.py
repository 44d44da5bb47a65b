"""Parts of tensors to parts of others, on a device."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import weightlift as wl
from weightlift.load.copies import Copy, copy_parts
from weightlift.module.recording.reader import CheckpointReader, sources_of
from weightlift.module.recording.recorder import Recorder

pytestmark = pytest.mark.gpu


def test_parts_on_a_device(tmp_path: Path) -> None:
    source = torch.arange(24.0).reshape(4, 6)
    save_file({"t": source}, tmp_path / "m.safetensors")
    checkpoint = wl.open_checkpoint(tmp_path / "m.safetensors")
    target = torch.zeros(6, 8, dtype=torch.bfloat16, device="cuda")
    dense = torch.zeros(2, 6, device="cuda")
    copies = [
        Copy("t", 0, (6, 4), (1, 6), target[:, :4]),
        Copy("t", 12, (2, 6), (6, 1), dense),
        Copy("t", 1, (6,), (2,), target[:, 6]),
    ]
    report = copy_parts(checkpoint, copies)
    assert torch.equal(target[:, :4].cpu(), source.t().bfloat16())
    assert torch.equal(target[:, 6].cpu(), source.view(-1)[1:12:2].bfloat16())
    assert torch.equal(dense.cpu(), source[2:])
    assert not target[:, 4:6].any()
    assert any("to targets that are not contiguous" in text for text in report.fallbacks)


def test_a_recording_on_a_device(tmp_path: Path) -> None:
    source = {"x": torch.randn(64, 96), "y": torch.randn(64, 96)}
    save_file(source, tmp_path / "m.safetensors")
    target = torch.zeros(96, 64, dtype=torch.bfloat16, device="cuda")
    other = torch.zeros(32, 96, device="cuda")

    def load(weights: object) -> None:
        tensors = dict(weights)  # type: ignore[call-overload]
        target.copy_(tensors["x"].t())
        other.fill_(1).copy_(tensors["y"][32:].to("cuda"))

    wl.record(load, wl.open_checkpoint(tmp_path / "m.safetensors")).load()
    assert torch.equal(target.cpu(), source["x"].t().bfloat16())
    assert torch.equal(other.cpu(), source["y"][32:])


def test_slices_that_are_read_while_the_code_runs(tmp_path: Path) -> None:
    source = {str(i): torch.randn(256, 512) for i in range(8)}
    save_file(source, tmp_path / "m.safetensors")
    checkpoint = wl.open_checkpoint(tmp_path / "m.safetensors")
    recorder = Recorder(CheckpointReader(checkpoint), ahead=1)
    target = torch.zeros(8, 128, 512, device="cuda")
    with recorder.watching():
        for name, form in sources_of(checkpoint).items():
            assert form is not None
            part = target[int(name)]
            part.fill_(9)
            part.copy_(recorder.placeholder(name, form)[128:])
            if name == "3":
                part[:4].fill_(7)
    recorder.finish()
    for name, tensor in source.items():
        wanted = tensor[128:].clone()
        if name == "3":
            wanted[:4] = 7
        assert torch.equal(target[int(name)].cpu(), wanted)

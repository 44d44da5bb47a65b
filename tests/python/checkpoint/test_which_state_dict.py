"""Torch files with several state dicts: a clear choice is made with a message; else there is an
error."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file as reference_load_file

import weightlift as wl
from weightlift.convert import convert_checkpoint

W, V = torch.rand(4, 3), torch.rand(5)
MODEL = {"w": W, "v": V}
STEP = torch.tensor(3)

# The content of the file, the chosen keys, the names in the warning.
CLEAR: list[tuple[dict[str, Any], set[str], list[str]]] = [
    ({"state_dict": MODEL, "best_acc1": torch.tensor(76.1)}, {"w", "v"}, ["'best_acc1'"]),
    ({"model": MODEL, "rng_state": torch.get_rng_state()}, {"w", "v"}, ["'rng_state'"]),
    ({"anything": MODEL, "step": STEP, "lr": torch.rand(1)}, {"w", "v"}, ["'step'", "'lr'"]),
    ({"model": MODEL, "scaler": {"scale": torch.tensor(2.0)}}, {"w", "v"}, ["'scaler'"]),
    (
        {"model": MODEL, "optimizer": {"state": {0: {"exp_avg": W, "step": STEP}}}},
        {"w", "v"},
        ["'optimizer' (2 tensors)"],
    ),
    ({"state_dict": MODEL, "losses": [STEP, STEP]}, {"w", "v"}, ["'losses' (2 tensors)"]),
    ({**MODEL, "ema": {"w": W}}, {"w", "v"}, ["'ema'"]),
    ({**MODEL, "history": ({"a": [V]},)}, {"w", "v"}, ["'history'"]),
    ({**MODEL, "l._extra_state": {"amax": V}}, {"w", "v"}, ["'l._extra_state'"]),
]
ASKED: list[tuple[dict[str, Any], list[str]]] = [
    ({"weight": W, "state_dict": MODEL}, ["'weight'", "'state_dict'"]),
    ({"w": W, "model": {"w": V}}, ["'w'", "'model'"]),
    ({"model": MODEL, "ema": MODEL}, ["'model'", "'ema'"]),
    ({"generator": MODEL, "discriminator": MODEL, "step": STEP}, ["'generator'"]),
    ({"a": {"b": MODEL}}, ["'a.b' (2 tensors)"]),
]


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("content", "taken", "named"), CLEAR)
def test_what_is_clear(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    content: dict[str, Any],
    taken: set[str],
    named: list[str],
    zipped: bool,
) -> None:
    path = tmp_path / "f.pth"
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with caplog.at_level(logging.WARNING, "weightlift"):
        loaded = wl.load_checkpoint(path)
    assert loaded.keys() == taken
    assert torch.equal(loaded["w"], W)
    for text in (*named, str(path), "state_dict_key="):
        assert text in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "weightlift"):
        convert_checkpoint(wl.open_checkpoint(path), tmp_path / "new.safetensors")
    assert reference_load_file(tmp_path / "new.safetensors").keys() == taken
    for text in named:
        assert text.partition(" ")[0] in caplog.text


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(("content", "named"), ASKED)
def test_what_is_asked(
    tmp_path: Path, content: dict[str, Any], named: list[str], zipped: bool
) -> None:
    torch.save(content, tmp_path / "f.pth", _use_new_zipfile_serialization=zipped)
    with pytest.raises(wl.CheckpointError, match="state_dict_key") as caught:
        wl.open_checkpoint(tmp_path / "f.pth")
    for text in named:
        assert text in str(caught.value)


def test_what_is_chosen(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Chosen by the caller, without a warning; a conversion still names what it leaves out."""
    path = tmp_path / "f.pth"
    torch.save({"weight": W, "state_dict": MODEL, "epoch": 3}, path)
    with caplog.at_level(logging.WARNING, "weightlift"):
        assert wl.load_checkpoint(path, state_dict_key="").keys() == {"weight"}
        assert wl.load_checkpoint(path, state_dict_key="state_dict").keys() == {"w", "v"}
        assert not caplog.records
        opened = wl.open_checkpoint(path, state_dict_key="state_dict")
        convert_checkpoint(opened, tmp_path / "new.safetensors")
    assert "'weight'" in caplog.text
    assert "'epoch'" not in caplog.text


def test_nothing_is_said_where_nothing_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save({"state_dict": MODEL, "epoch": 3, "args": {"lr": 0.1}}, tmp_path / "f.pth")
    with caplog.at_level(logging.WARNING, "weightlift"):
        assert wl.load_checkpoint(tmp_path / "f.pth").keys() == {"w", "v"}
    assert not caplog.records


def test_a_value_that_holds_itself(tmp_path: Path) -> None:
    loop: list[Any] = [V]
    loop.append(loop)
    torch.save({"state_dict": MODEL, "loop": loop}, tmp_path / "f.pth")
    assert wl.open_checkpoint(tmp_path / "f.pth").left_out == {"loop": 1}

"""Flax weights are converted as by diffusers 0.39, the last version with a conversion."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from support import assert_same_tensors
from weightlift.checkpoint.flax_msgpack import load_flax_state_dict, to_flax_path

pytestmark = pytest.mark.deep

ROOT = Path(__file__).parents[3]
ORACLE = ROOT / "tests/flax_oracle"
MODELS = ("unet", "vae", "controlnet")


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of ``convert.py``, in a separate environment with this one's torch."""
    home = ROOT / ".venv-flax"
    pins = ORACLE / "constraints.txt"
    stamp = home / pins.name
    if not stamp.exists() or stamp.read_text() != pins.read_text():
        venv.create(home, clear=True, with_pip=True)
        site = sysconfig.get_path("purelib", "posix_prefix", {"base": str(home)})
        (Path(site) / "tested.pth").write_text(sysconfig.get_path("purelib") + "\n")
        command = [home / "bin/python", "-m", "pip", "install", "-q", "-c", pins]
        subprocess.run([*command, "jax", "jaxlib", "flax"], check=True)
        subprocess.run([*command, "--no-deps", "diffusers"], check=True)
        stamp.write_text(pins.read_text())
    folder = tmp_path_factory.mktemp("converted")
    subprocess.run([home / "bin/python", ORACLE / "convert.py", folder], check=True)
    return folder


def test_models(converted: Path) -> None:
    for model in MODELS:
        for dtype in ("float32", "bfloat16"):
            folder = converted / f"{model}-{dtype}"
            theirs = load_file(folder / "torch.safetensors")
            shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
            ours = load_flax_state_dict(folder / "diffusion_flax_model.msgpack", shapes)
            # Attention of former names, which 0.39 leaves out; the model is left with random
            # weights there.
            former = {name for name in ours if name not in theirs}
            assert all("mid_block.attentions.0" in name for name in former)
            assert len(former) == (16 if model == "vae" else 0)
            assert len(ours) == len(theirs)
            for name in former:
                del ours[name]
            assert_same_tensors(ours, {name: theirs[name] for name in ours})


def test_trees(converted: Path) -> None:
    folders = sorted(converted.glob("tree-*"))
    assert len(folders) > 30
    chunked = 0
    for folder in folders:
        file = folder / "flax_model.msgpack"
        chunked += b"chunked" in file.read_bytes()
        ours = load_flax_state_dict(file)
        assert_same_tensors(
            dict(sorted(ours.items())),
            dict(sorted(load_file(folder / "torch.safetensors").items())),
        )
    assert chunked > 10


def test_models_for_flax(converted: Path) -> None:
    for model in MODELS:
        folder = converted / f"{model}-to-flax"
        paths = {tuple(path.split("/")) for path in json.loads((folder / "paths.json").read_text())}
        ours: dict[str, torch.Tensor] = {}
        for name, tensor in load_file(folder / "torch.safetensors").items():
            path, axes = to_flax_path(name, tensor.dim(), paths)
            assert path in paths
            ours["/".join(path)] = tensor.permute(axes).contiguous()
        theirs = load_file(folder / "flax.safetensors")
        assert_same_tensors(dict(sorted(ours.items())), dict(sorted(theirs.items())))


def test_numbers_in_names(converted: Path) -> None:
    names = json.loads((converted / "names.json").read_text())
    assert len(names) > 2000
    for name, renamed in names.items():
        assert to_flax_path(name, 1, ()) == (tuple(renamed.split(".")), (0,)), name


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))

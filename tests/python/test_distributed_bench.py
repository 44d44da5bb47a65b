"""The examples of README.md under torchrun, ``weightlift bench --distributed``, and the model of a
cluster against what processes really move."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch

import weightlift as wl
from distributed_model import MyModel, Net
from weightlift.cli.bench_distributed import measure_ranks
from weightlift.errors import WeightliftError

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}


def cluster_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cm", ROOT / "benchmarks" / "cluster_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cm"] = module
    spec.loader.exec_module(module)
    return module


# What each rank does behind an example: the whole tensors are those of the checkpoint.
_CHECK = """
import safetensors.torch
from pathlib import Path
for file in Path("checkpoint").glob("*.safetensors"):
    expected = safetensors.torch.load_file(file)
state = model.state_dict()
assert state.keys() == expected.keys()
for name, value in state.items():
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    assert torch.equal(whole, expected[name].to(whole.dtype)), name
kinds = {type(value).__name__ for value in model.parameters()}
kinds |= {type(value.data).__name__ for value in model.parameters()}
dtypes = {str(value.dtype) for value in model.parameters()}
Path(f"kinds-{torch.distributed.get_rank()}").write_text(f"{sorted(kinds)} {sorted(dtypes)}")
torch.distributed.barrier()
"""


def test_readme_examples(tmp_path: Path) -> None:
    """Replicated, FSDP2 and tensor parallel, each as it stands there."""
    section = (ROOT / "README.md").read_text().split("## Several processes")[1].split("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 3
    torch.manual_seed(0)
    running = []
    for number, block in enumerate(blocks):
        assert len(block.splitlines()) <= 6
        folder = tmp_path / str(number)
        folder.mkdir()
        if "MyModel" in block:
            MyModel().save_pretrained(folder / "checkpoint")
        else:
            (folder / "checkpoint").mkdir()
            file = folder / "checkpoint" / "model.safetensors"
            safetensors.torch.save_file(Net().state_dict(), file)
        text = "import torch\nfrom distributed_model import MyModel, Net\n" + block + _CHECK
        (folder / "load.py").write_text(text)
        command = [*TORCHRUN, "2", "load.py"]
        options: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        running.append(
            (folder, subprocess.Popen(command, cwd=folder, env=ENVIRONMENT, text=True, **options))
        )
    found = []
    for folder, process in running:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0, out
        assert (folder / "kinds-0").read_text() == (folder / "kinds-1").read_text()
        found.append((folder / "kinds-0").read_text())
    assert "DTensor" not in found[0]
    assert "torch.bfloat16" in found[0]
    assert "DTensor" in found[1]
    assert "DTensor" in found[2]


def write_file(path: Path, megabytes: int) -> int:
    rows = 256 * megabytes // 2
    tensors = {f"{i}.weight": torch.randn(rows // 4, 1024) for i in range(8)}
    tensors["norm.weight"] = torch.randn(1024)
    safetensors.torch.save_file(tensors, path)
    return path.stat().st_size


@pytest.fixture(scope="module", params=[2, 4])
def measured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    file = tmp_path_factory.mktemp("measured") / "model.safetensors"
    write_file(file, 16)
    return measure_ranks([file], request.param, 1, ("replicated", "FSDP2"))


def test_the_model_of_a_cluster_has_what_is_measured(measured: Any) -> None:
    model = cluster_model()
    ranks, size = measured["ranks"], measured["file_bytes"]
    loads = measured["loads"]
    for kind, name, way in (
        ("replicated", "weightlift, group=", "replicated, node"),
        ("FSDP2", "weightlift", "sharded"),
    ):
        (load,) = loads[kind][name]
        expected = model.moved(way, size, 1, ranks)
        assert load["engine_bytes"] == pytest.approx(expected.out_of_files, rel=0.001)
        assert load["received_bytes"] == pytest.approx(expected.received, abs=0.001 * size)
        assert load["held_bytes"] == pytest.approx(expected.held, rel=0.001)
        # Of read(2): what the ranks tell each other, and what is asked of /proc, among it.
        assert size <= load["read_bytes"] <= 1.02 * size + 2e6
    (load,) = loads["replicated"]["weightlift, mapped"]
    assert load["engine_bytes"] == 0
    (load,) = loads["replicated"]["safetensors, each rank"]
    stock = model.moved("stock", size, 1, ranks)
    assert load["mapped_bytes"] == pytest.approx(stock.out_of_files, rel=0.3)


def test_the_model_of_a_cluster_adds_up() -> None:
    model = cluster_model()
    for nodes in (8, 64):
        every = {way: model.moved(way, 1e9, nodes, 8) for way in model.WAYS}
        # What all ranks end up with came out of files or from others.
        for one in every.values():
            assert one.out_of_files + one.received == pytest.approx(one.held * nodes * 8)
        assert every["stock"].out_of_files == 8 * every["replicated, node"].out_of_files
        assert every["replicated, group"].disk * nodes == every["replicated, node"].disk
    text = model.table(16e9, [8, 64], 8, model.Rates(20e9, 200e9, 50e9))
    assert len([line for line in text.splitlines() if line.startswith("sharded ")]) == 4


def test_bench(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", 8)
    command = [sys.executable, "-m", "weightlift", "bench", "--distributed", "2", "--repeat", "1"]
    ran = subprocess.run(
        [*command, "--json", "out.json", "model.safetensors"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "by 2 processes on gloo" in ran.stdout
    for line in ("replicated", "FSDP2", "tensor parallel"):
        assert re.search(rf"^{line}\s*$", ran.stdout, re.MULTILINE)
    assert re.search(r"^  weightlift +[\d.]+ \w?s +1\.00 +1\.0\d ", ran.stdout, re.MULTILINE)
    assert "HuggingFaceStorageReader" in ran.stdout
    assert json.loads((tmp_path / "out.json").read_text())["ranks"] == 2


def test_bench_of_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(wl.CheckpointError, match=r"there are no \.safetensors files"):
        measure_ranks([tmp_path], 2, 1)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(WeightliftError, match="2 ranks under torchrun failed"):
        measure_ranks([tmp_path], 2, 1)

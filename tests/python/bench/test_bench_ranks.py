"""``weightlift bench --distributed``, and the model of a cluster compared with the bytes that
processes move."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import support
import weightlift as wl
from support import run_python
from weightlift.bench.measure_ranks import CONTENDERS
from weightlift.bench.ranks import measure_ranks
from weightlift.core.errors import WeightliftError

ROOT = Path(__file__).parents[3]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(Path(support.__file__).parent),
}


def cluster_model() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cm", ROOT / "benchmarks" / "cluster_model.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cm"] = module
    spec.loader.exec_module(module)
    return module


def write_file(path: Path, megabytes: int) -> int:
    rows = 256 * megabytes // 8
    tensors = {f"{i}.weight": torch.randn(rows, 1024) for i in range(8)}
    tensors["norm.weight"] = torch.randn(1024)
    safetensors.torch.save_file(tensors, path)
    return path.stat().st_size


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.deep)])
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
        # Bytes of read(2), including messages between ranks and reads of /proc.
        assert size <= load["read_bytes"] <= 1.02 * size + 2e6
    (load,) = loads["replicated"]["weightlift, mapped"]
    assert load["engine_bytes"] == 0
    # The models hold their mappings, so that the last sample sees them whole.
    assert load["mapped_bytes"] == pytest.approx(ranks * size, rel=0.1)
    (load,) = loads["replicated"]["safetensors, each rank"]
    stock = model.moved("stock", size, 1, ranks)
    assert load["held_bytes"] == pytest.approx(stock.held, rel=0.001)
    # It copies out of mappings that end with the load: samples may miss them.
    assert load["mapped_bytes"] <= 1.1 * stock.out_of_files


def test_the_model_of_a_cluster_adds_up() -> None:
    model = cluster_model()
    for nodes in (8, 64):
        every = {way: model.moved(way, 1e9, nodes, 8) for way in model.WAYS}
        # All bytes of all ranks came from files or from other ranks.
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
        [*command, "--output", "out.json", "model.safetensors"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "by 2 processes on gloo" in ran.stdout
    for line in ("replicated", "FSDP2", "tensor parallel"):
        assert re.search(rf"^{line}\s*$", ran.stdout, re.MULTILINE)
    assert re.search(r"^  weightlift +[\d.]+ \w?s +1\.00 +1\.0\d ", ran.stdout, re.MULTILINE)
    assert "HuggingFaceStorageReader" in ran.stdout
    assert json.loads((tmp_path / "out.json").read_text())["ranks"] == 2


# Every measured load, on one rank, with a model in several files.
_EACH = """
import sys, warnings
from pathlib import Path
import safetensors.torch, torch
import torch.distributed as dist
from weightlift.bench.measure_ranks import CONTENDERS, Job, _Checkpoint
warnings.simplefilter("ignore")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
folder, own = map(Path, sys.argv[1:])
files = sorted(map(str, folder.glob("*.safetensors")))
assert len(files) > 1
expected = {name: value for f in files for name, value in safetensors.torch.load_file(f).items()}
job = Job(files, ("LlamaForCausalLM", str(folder)), list(CONTENDERS), 1, "")
checkpoint = _Checkpoint(job, str(own))
for kind, group in CONTENDERS.items():
    for name, load in group.items():
        found = {}
        for key, value in load(checkpoint).named_parameters():
            whole = value.full_tensor() if hasattr(value, "full_tensor") else value
            found[key.replace("/", ".")] = whole
        assert found.keys() == expected.keys(), (kind, name)
        for key, value in expected.items():
            assert torch.equal(found[key], value), (kind, name, key)
        print(f"{kind}: {name}")
dist.destroy_process_group()
"""


def test_each_load_gives_the_checkpoint(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    (tmp_path / "own").mkdir()
    done = run_python(_EACH, tmp_path / "model", tmp_path / "own")
    assert done.returncode == 0, done.stderr
    loads = [f"{kind}: {name}" for kind, group in CONTENDERS.items() for name in group]
    assert done.stdout.splitlines() == loads


def test_bench_of_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(wl.CheckpointError, match=r"holds no \.safetensors files"):
        measure_ranks([tmp_path], 2, 1)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(WeightliftError, match="2 ranks under torchrun failed"):
        measure_ranks([tmp_path], 2, 1)


def traced_bytes(lines: list[str], file: str) -> int:
    """The results of calls on this file, including calls that strace shows in two lines."""
    waiting = set()
    read = 0
    for line in lines:
        thread = line.split()[0]
        if f"<{file}>" in line and "<unfinished" in line:
            waiting.add(thread)
        elif f"<{file}>" in line or (thread in waiting and "resumed>" in line):
            waiting.discard(thread)
            returned = re.search(r"\) += (\d+)", line)
            read += int(returned[1]) if returned else 0
    return read


@pytest.mark.deep
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_is_read_as_the_kernel_sees_it(tmp_path: Path, ranks: int) -> None:
    """The bytes that read(2) and similar calls took from the file, by strace; and the memory of a
    rank."""
    if shutil.which("strace") is None:
        pytest.skip("there is no strace")
    file = tmp_path / "model.safetensors"
    size = write_file(file, 256)
    for load in ("fully_shard(model); options = {}", "options = dict(group=WORLD, mode='read')"):
        script = tmp_path / "load.py"
        script.write_text(_TRACED.format(rows=256 * 256 // 8, load=load, file=str(file)))
        out = tmp_path / "strace"
        command = ["strace", "-f", "-y", "-qq", "--seccomp-bpf", "-o", str(out)]
        command += ["-e", "trace=read,readv,pread64,preadv,preadv2"]
        run = [*command, *TORCHRUN, str(ranks), str(script)]
        subprocess.run(run, env=ENVIRONMENT, check=True, timeout=300)
        read = traced_bytes(out.read_text().splitlines(), str(file))
        assert 0.99 * size <= read <= 1.02 * size
    (loaded,) = measure_ranks([file], ranks, 1, ("FSDP2",))["loads"]["FSDP2"]["weightlift"]
    assert loaded["engine_bytes"] <= 1.02 * size
    assert loaded["peak_bytes"] <= loaded["held_bytes"] + (128 << 20)


_TRACED = """
import os, torch, torch.distributed as dist, weightlift as wl
from torch.distributed.fsdp import fully_shard
dist.init_process_group("gloo")
WORLD = dist.group.WORLD
with torch.device("meta"):
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, {rows}, bias=False) for _ in range(8)))
    model.norm = torch.nn.LayerNorm(1024, bias=False)
{load}
wl.load_into(model, {file!r}, **options)
dist.barrier()
os._exit(0)  # gloo may abort a rank whose peers close their connections first
"""

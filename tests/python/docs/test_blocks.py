"""Every code block of README.md and docs/ runs, page by page, in the order of the page.

A comment before a block, ``<!-- test: ... -->``, says where it runs
instead: ``gpu`` and ``serving``
are compiled here and counted; ``torchrun N`` runs in N processes; ``flax`` runs where jax is;
``skip, WHY`` is compiled alone.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
import torch

import support
from distributed_model import MyModel, Net

ROOT = Path(__file__).parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
HELPERS = str(Path(support.__file__).parent)
_BLOCK = re.compile(
    r"(?:<!-- test: (?P<mark>[^>]*?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


class Block(NamedTuple):
    page: str
    line: int
    language: str
    mark: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(
            page.name,
            text.count("\n", 0, found.start("text")) + 1,
            found["language"],
            found["mark"] or "",
            found["text"],
        )
        for found in _BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
MARKS = ("", "gpu", "serving", "flax", "torchrun 2")


def named(block: Block) -> str:
    return f"{block.page}:{block.line}"


def write_inputs(folder: Path) -> None:
    """What the pages load."""
    torch.manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(8, 8) for i in range(4)}
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    torch.save(tensors, folder / "pytorch_model.bin")
    for name, module in (
        ("checkpoint", Net()),
        ("linear", torch.nn.Linear(4, 3)),
        ("sequential", torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))),
    ):
        (folder / name).mkdir()
        safetensors.torch.save_file(module.state_dict(), folder / name / "model.safetensors")


def run(command: list[str], folder: Path) -> str:
    paths = [HELPERS, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "COLUMNS": "80",
    }
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.mark.parametrize("block", BLOCKS, ids=named)
def test_it_has_a_known_form(block: Block) -> None:
    assert block.language in ("python", "bash", "toctree", "include"), block.language
    assert block.mark in MARKS or re.match(r"skip, \w", block.mark), block.mark
    if block.language == "python":
        ast.parse(block.text)
    elif block.language == "bash":
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_its_blocks_run(page: Path, tmp_path: Path) -> None:
    blocks = [block for block in blocks_of(page) if block.mark == ""]
    programs = [block for block in blocks if block.language in ("python", "bash")]
    write_inputs(tmp_path)
    script = ["import subprocess"]
    for block in programs:  # one process a page: the blocks share their names
        if block.language == "python":
            # Lines as in the page, for tracebacks.
            script.append(f"exec(compile({chr(10) * (block.line - 1) + block.text!r}, "
                          f"{named(block)!r}, 'exec'))")  # fmt: skip
        else:
            script.append(f"subprocess.run(['bash', '-ec', {block.text!r}], check=True)")
    (tmp_path / "page.py").write_text("\n".join(script))
    if programs:
        run([sys.executable, "page.py"], tmp_path)


RANKS = [block for block in BLOCKS if block.mark.startswith("torchrun")]
# Each rank runs this after an example: the whole tensors must be the checkpoint's.
_CHECK = """
import os, safetensors.torch
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
os._exit(0)  # gloo may abort a rank whose peers close their connections first
"""


def test_they_run_under_torchrun(tmp_path: Path) -> None:
    """Replicated, FSDP2 and tensor parallel, each as in the page."""
    found = []
    for number, block in enumerate(RANKS):
        assert len(block.text.splitlines()) <= 6
        folder = tmp_path / str(number)
        folder.mkdir()
        write_inputs(folder)
        if "MyModel" in block.text:
            (folder / "checkpoint" / "model.safetensors").unlink()
            MyModel().save_pretrained(folder / "checkpoint")
        text = "import torch\nfrom distributed_model import MyModel, Net\n" + block.text + _CHECK
        (folder / "load.py").write_text(text)
        ranks = block.mark.split()[1]
        run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
             ranks, "load.py"], folder)  # fmt: skip
        assert (folder / "kinds-0").read_text() == (folder / "kinds-1").read_text()
        found.append((folder / "kinds-0").read_text())
    assert "DTensor" not in found[0]
    assert "torch.bfloat16" in found[0]
    assert "DTensor" in found[1]
    assert "DTensor" in found[2]


FLAX = [block for block in BLOCKS if block.mark == "flax"]


@pytest.mark.skipif(
    importlib.util.find_spec("jax") is None or importlib.util.find_spec("flax") is None,
    reason="jax and flax are for Python 3.11 and newer",
)
@pytest.mark.parametrize("block", FLAX, ids=named)
def test_it_runs_with_flax(block: Block, tmp_path: Path) -> None:
    (tmp_path / "page.py").write_text(block.text)
    run([sys.executable, "-W", "ignore", "page.py"], tmp_path)


def test_blocks_are_found() -> None:
    assert len([block for block in BLOCKS if block.language == "python"]) >= 12
    assert len(RANKS) == 3
    assert FLAX

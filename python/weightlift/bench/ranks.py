"""``weightlift bench --distributed``: N processes load one checkpoint at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from weightlift.core.errors import CheckpointError, WeightliftError

__all__ = ["KINDS", "measure_ranks"]

KINDS = ("replicated", "FSDP2", "tensor parallel")
_LIMIT_SECONDS = 1800


def checkpoint_files(paths: Sequence[Path]) -> tuple[list[Path], tuple[str, str] | None]:
    """The safetensors files of a checkpoint, and the transformers class of its folder.

    Raises:
        CheckpointError: there are no such files.
    """
    if len(paths) != 1 or not paths[0].is_dir():
        return list(paths), None
    folder = paths[0]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(
            f"{folder}: holds no .safetensors files; make them with weightlift convert"
        )
    config = folder / "config.json"
    architectures = (
        json.loads(config.read_text(encoding="utf-8")).get("architectures")
        if config.is_file()
        else None
    )
    return files, (architectures[0], str(folder)) if architectures else None


def measure_ranks(
    paths: Sequence[Path], ranks: int, repeat: int, kinds: Sequence[str] = KINDS
) -> dict[str, Any]:
    """Measures all loads by ``ranks`` processes under torchrun.

    Returns:
        ``file_bytes``, ``ranks``, and ``loads``: kind -> contender -> a dict for each repetition,
        with the fields of ``measure_ranks.Load``.

    Raises:
        WeightliftError: the ranks failed; the text has the end of their output.
    """
    files, model = checkpoint_files(paths)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        job = {
            "files": [str(file.absolute()) for file in files],
            "model": model,
            "contenders": list(kinds),
            "repeat": repeat,
            "out": str(out),
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(ranks), "-m", "weightlift.bench.measure_ranks"]
        ran = subprocess.run(
            [*command, json.dumps(job)],
            env={"OMP_NUM_THREADS": "1", **os.environ, "TMPDIR": folder},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_LIMIT_SECONDS,
            check=False,
        )
        if not out.exists():
            tail = "\n".join(ran.stdout.splitlines()[-30:])
            raise WeightliftError(f"{ranks} ranks under torchrun failed:\n{tail}")
        loads = json.loads(out.read_text())
    return {
        "ranks": ranks,
        "file_bytes": sum(file.stat().st_size for file in files),
        "loads": loads,
    }

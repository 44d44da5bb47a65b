"""What `make fuzz` begins with."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).parents[2] / "fuzz"


def test_every_target_has_seeds(tmp_path: Path) -> None:
    subprocess.run([sys.executable, FUZZ / "seeds.py", tmp_path], check=True)
    for target in runpy.run_path(str(FUZZ / "run.py"))["TARGETS"]:
        seeds = [path.stat().st_size for path in (tmp_path / target).iterdir()]
        assert len(seeds) > 10
        assert max(seeds) <= 4096

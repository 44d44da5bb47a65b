"""Measurements in new processes, and the record of a script's rounds."""

from __future__ import annotations

import datetime
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from summary import RESULTS, machine_name, to_text
from weightlift.bench.conditions import machine

__all__ = ["in_new_process", "write_record"]


def in_new_process(script: str, *arguments: str) -> Any:
    """The JSON in the last line that ``python script ARGUMENTS`` prints."""
    command = [sys.executable, script, *arguments]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def write_record(name: str, script: str, found: dict[str, Any]) -> None:
    """Writes ``benchmarks/results/NAME/MACHINE.json``: the machine, the command, and ``found``."""
    record = {
        "machine": machine(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *sys.argv[1:]]),
        **found,
    }
    out = RESULTS / name / f"{machine_name(record['machine'])}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(to_text(record), encoding="utf-8")

"""Measurements in new processes, and the records of scripts."""

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

__all__ = ["in_new_process", "made_by", "write_parts", "write_record"]


def in_new_process(script: str, *arguments: str) -> Any:
    """The JSON in the last line that ``python script ARGUMENTS`` prints."""
    command = [sys.executable, script, *arguments]
    out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out.splitlines()[-1])


def write_record(name: str, script: str, found: dict[str, Any]) -> None:
    """Writes ``benchmarks/results/NAME/MACHINE.json``: the machine, the command, and ``found``."""
    own = machine()
    record = {"machine": own, **made_by(script, *sys.argv[1:]), **found}
    _write(RESULTS / name / f"{machine_name(own)}.json", record)


def write_parts(out: Path, parts: dict[str, Any]) -> None:
    """Writes a record whose parts were measured by one command each: the machine, and ``parts``."""
    _write(out, {"machine": machine(), "parts": parts})


def made_by(script: str, *arguments: str) -> dict[str, str]:
    """The time and the command of a record or a part of one."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", f"benchmarks/{Path(script).name}", *arguments]),
    }


def _write(out: Path, record: dict[str, Any]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(to_text(record), encoding="utf-8")

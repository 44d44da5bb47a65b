"""``weightlift doctor``: measures what loads depend on, and says what would make them faster."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated

import typer

from weightlift.cli.disk_findings import probe_disk
from weightlift.cli.findings import Finding
from weightlift.cli.gpu_findings import probe_gpu
from weightlift.cli.host_findings import probe_host, probe_memory
from weightlift.cli.values import whole_number

__all__ = ["doctor"]

_MB = 10**6


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    disk: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            exists=True,
            help="Measure the disk of this folder, or of this file's folder; by default that of "
            "the Hub cache, or of the current folder where there is none.",
        ),
    ] = None,
    disk_mb: Annotated[
        int,
        typer.Option(
            parser=whole_number(1, 16_384),
            metavar="N",
            help="Size of the temporary file, in MB.",
        ),
    ] = 256,
) -> None:
    """Check CPU, memory, disk and GPU; report what is missing and what that costs.

    Takes a few seconds. Writes one temporary file into the folder of --disk and removes it.
    """
    from rich.console import Console

    folder = _folder(disk)
    findings: list[Finding] = []
    with Console(stderr=True).status("looking around") as status:
        for title, look in (
            ("looking at the CPU and the memory", probe_host),
            ("measuring the memory", probe_memory),
            (
                f"measuring the disk of {folder} with {disk_mb} MB",
                lambda: probe_disk(folder, disk_mb * _MB),
            ),
            ("looking for a GPU", probe_gpu),
        ):
            status.update(title)
            findings += look()
    if as_json:
        print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
    else:
        _show(findings)


def _folder(disk: Path | None) -> Path:
    if disk is not None:
        return disk if disk.is_dir() else disk.absolute().parent
    from huggingface_hub import constants

    hub = Path(constants.HF_HUB_CACHE)
    return hub if os.access(hub, os.W_OK) else Path.cwd()


def _show(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    marks = {"ok": ("OK", "green"), "missing": ("missing", "yellow"), "info": ("", "")}
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    topic = ""
    for finding in findings:
        mark, style = marks[finding.state]
        table.add_row(
            Text(finding.topic if finding.topic != topic else "", style="bold"),
            finding.name,
            Text(mark, style=style),
            Text(finding.found),
        )
        topic = finding.topic
        for label, text in (("costs", finding.costs), ("do", finding.remedy)):
            if text:
                table.add_row("", "", Text(label, style="dim"), Text(text, style="dim"))
    console = Console(highlight=False)
    console.print(table)
    lost = sum(finding.state == "missing" for finding in findings)
    console.print(
        f"\n{lost} of {len(findings)} can be improved"
        if lost
        else f"\nall {len(findings)} are fine"
    )

"""Writes the README's figures from recorded results, so that none there is typed by hand.

    python benchmarks/readme.py

The table comes from the newest benchmarks/results/*.json of `benchmarks/run.py`; what `make demo`
prints, from .demo/demo.txt where that is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from weightlift.cli.plot import format_seconds
from weightlift.report import format_bytes

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DEMO = ROOT / ".demo" / "demo.txt"
OURS, REFERENCE = "weightlift", "safetensors"


def main() -> None:
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    newest = max(RESULTS.glob("*.json"))
    text = _replace(text, "figures", _figures(newest))
    if DEMO.exists():
        lines = [line.rstrip() for line in DEMO.read_text(encoding="utf-8").splitlines()]
        text = _replace(text, "demo", "`make demo` prints:\n\n```\n" + "\n".join(lines) + "\n```")
    readme.write_text(text, encoding="utf-8")


def _figures(path: Path) -> str:
    content = json.loads(path.read_text(encoding="utf-8"))
    machine = content["machine"]
    by_name = {comparison["name"]: comparison for comparison in content["comparisons"]}
    lines = [
        f"Against safetensors {_version(by_name)}, in one run, interleaved, each measurement in a "
        "fresh process with its memory backed beforehand, all pages touched, medians; "
        f"`{content['command']}` on {machine['cpu']} ({machine['cpus']} CPUs, "
        f"{format_bytes(machine['memory_bytes'])}, Linux {machine['kernel']}), "
        f"{content['date'][:10]}.",
        "",
        "| workload | weightlift | safetensors | own memory | target | measured |",
        "|---|--:|--:|--:|---|--:|",
    ]
    for name, figure in content["figures"].items():
        contenders = by_name[name]["contenders"]
        ours, theirs = contenders[OURS], contenders.get(REFERENCE)
        measured = figure["measured"] if figure["passed"] else f"**{figure['measured']}** (missed)"
        lines.append(
            f"| {name} | {format_seconds(ours['median_seconds'])} "
            f"| {format_seconds(theirs['median_seconds']) if theirs else ''} "
            f"| {format_bytes(ours['peak_anon_bytes'])} | {figure['target']} | {measured} |"
        )
    return "\n".join(lines)


def _version(comparisons: dict[str, Any]) -> str:
    return str(next(iter(comparisons.values()))["contenders"][REFERENCE]["version"])


def _replace(text: str, section: str, body: str) -> str:
    pattern = rf"(<!-- {section} -->\n).*?(<!-- /{section} -->)"
    found, count = re.subn(pattern, lambda m: m[1] + body + "\n" + m[2], text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"README.md has no section {section}")
    return found


if __name__ == "__main__":
    main()

"""``benchmarks/summary.py``: the results that it keeps of a machine's runs."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from support import ROOT, run_python


def sample(load: float, touch: float) -> dict[str, Any]:
    return {"load_seconds": load, "touch_seconds": touch, "cpu_seconds": load}


def a_run(date: str, name: str, seconds: dict[str, list[float]], kernel: str = "6.1") -> Any:
    contenders = {
        contender: {
            "version": "1.0",
            "peak_anon_bytes": 1000,
            "phases": {"move": 0.123456789},
            "io": ["mapped"],
            "samples": [sample(value, 0.25) for value in values],
        }
        for contender, values in seconds.items()
    }
    comparison = {
        "name": name,
        "about": f"about {name}",
        "device": "cpu",
        "model": None,
        "folder": None,
        "cold": False,
        "touched": True,
        "file_bytes": 10**9,
        "contenders": contenders,
        "refused": {"other": "no\nlong text"},
    }
    return {
        "date": date,
        "command": "python benchmarks/run.py",
        "scale": 1.0,
        "machine": {"cpu": "Some CPU (R) Processor", "cpus": 2, "kernel": kernel, "torch": "2"},
        "rates": {"memory copy": 1.23456e10},
        "figures": {name: {"target": "x", "measured": "y", "passed": True, "against": None}},
        "comparisons": [comparison],
    }


def summarize(folder: Path, *runs: Any) -> tuple[dict[str, Any], str]:
    paths = []
    for number, run in enumerate(runs):
        paths.append(folder / f"{number}.json")
        paths[-1].write_text(json.dumps(run))
    out = folder / "summary.json"
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "summary.py", *paths, "--out", out],
        check=False,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(out.read_text()), done.stdout


def test_a_summary_has_the_newest_of_each_workload(tmp_path: Path) -> None:
    ours, theirs = [1.0, 3.0, 2.0], [4.0, 3.0, 8.0]
    old = a_run("2026-01-01", "a", {"weightlift": [9.0], "torch": [9.0]})
    new = a_run("2026-01-02", "a", {"weightlift": ours, "torch": theirs})
    bounds = {"floor_multiple": 1.9, "in_turn_multiple": 1.1}
    new["comparisons"][0]["contenders"]["torch"] |= bounds
    other = a_run("2026-01-01", "b", {"backend": [1.0], "stock": [2.0]})
    elsewhere = a_run("2025-01-01", "c", {"weightlift": [1.0]}, kernel="5.4")
    found, said = summarize(tmp_path, old, new, other, elsewhere)
    assert "left out, of other conditions: 2025-01-01" in said
    workloads = {one["name"]: one for one in found["workloads"]}
    assert workloads.keys() == {"a", "b"}
    assert [run["date"] for run in found["runs"]] == ["2026-01-02", "2026-01-01"]
    assert workloads["a"]["run"] == 0
    assert workloads["b"]["run"] == 1
    torch = workloads["a"]["contenders"]["torch"]
    assert torch.items() >= bounds.items()
    assert workloads["a"]["contenders"]["weightlift"].keys().isdisjoint(bounds)
    assert torch["rounds"] == 3
    assert torch["seconds"] == {"median": 4.25, "least": 3.25, "most": 8.25}
    ratios = [(b + 0.25) / (a + 0.25) for a, b in zip(ours, theirs, strict=True)]
    assert abs(torch["time_ratio"]["median"] - statistics.median(ratios)) < 1e-3
    assert abs(torch["time_ratio"]["most"] - max(ratios)) < 1e-3
    assert torch["phases"] == {"move": 0.1235}
    assert workloads["a"]["refused"] == {"other": "no"}
    assert "samples" not in json.dumps(found)

    # Again, with a run of only one workload: the other one stays.
    later = a_run("2026-01-03", "b", {"backend": [1.0], "stock": [3.0]})
    found, _ = summarize(tmp_path, later)
    assert {one["name"]: one["run"] for one in found["workloads"]} == {"b": 0, "a": 1}
    assert [run["date"] for run in found["runs"]] == ["2026-01-03", "2026-01-02"]


def test_the_readme_has_the_newest_summary_that_is_whole() -> None:
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from report import HEADLINES, summary_of_readme

def summary(rows):
    return {"workloads": [{"name": n, "contenders": {r: {}}} for n, r, _ in rows]}

whole, part = summary(HEADLINES["cpu"]), summary(HEADLINES["cpu"][1:])
print(summary_of_readme({"new": part, "middle": whole, "old": summary(HEADLINES["cuda"])})[0])
print(summary_of_readme({"new": part, "old": part})[0])
"""
    done = run_python(code, ROOT / "benchmarks")
    assert done.stdout.split() == ["middle", "new"], done.stderr


def test_recorded_summaries_are_small() -> None:
    results = ROOT / "benchmarks" / "results"
    for path in (path for path in results.rglob("*") if path.is_file()):
        assert path.suffix in (".json", ".png")
        if path.suffix == ".json":
            assert path.stat().st_size <= 200_000
        if path.suffix == ".json" and path.parent == results:
            pictures = sorted(path.parent.glob(f"{path.stem}-*.png"))
            assert len(pictures) == 2

"""Measures which lines of csrc and of the package the native and Python tests reach together.

Counts both in one run, including child processes. Prints the lines that are not reached. Fails if a
test fails or a figure is too low.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build" / "coverage"
SCRIPTS = Path(sys.executable).parent
ENVIRONMENT = {
    **os.environ,
    "PATH": f"{SCRIPTS}:{os.environ['PATH']}",
    "WEIGHTLIFT_SIMULATED_DRIVER": str(BUILD / "tests/simulated_driver/libsimulated_cuda.so"),
}
BARS = {"csrc": 90, "python/weightlift": 95}

# These tests stop or disturb forked children at each system call, and writing the counts would add
# many.
FORKING = [
    str(path.relative_to(ROOT))
    for name in ("test_faults.py", "test_saving.py")
    for path in ROOT.glob(f"tests/python/**/{name}")
]
# jax warns at every fork of the process it is in.
FLAX = [str(path.relative_to(ROOT)) for path in ROOT.glob("tests/python/**/test_flax.py")]


class File(NamedTuple):
    path: str
    lines: int
    uncovered: list[int]


def run(*command: object) -> bool:
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, check=False)
    return done.returncode == 0


def install() -> None:
    """Makes the counting build. Removes the Makefile's stamps, so that its next target installs its
    own build again."""
    for stamp in (".dev", ".release"):
        (SCRIPTS.parent / stamp).unlink(missing_ok=True)
    settings = {
        "build-dir": BUILD,
        "cmake.build-type": "RelWithDebInfo",
        "cmake.define.CMAKE_CXX_FLAGS": "--coverage",
        # Threads may lose counts of a line, but never all of them.
        "cmake.define.CMAKE_CXX_FLAGS_RELWITHDEBINFO": "-O1 -g",
        "cmake.define.WEIGHTLIFT_TESTING": "ON",
        "cmake.define.WEIGHTLIFT_CUDA": "OFF",
    }
    chosen = [word for name, value in settings.items() for word in ("-C", f"{name}={value}")]
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    pip += ["--no-build-isolation", "--no-deps", "--force-reinstall", "--editable", ROOT]
    if not run(*pip, *chosen):
        sys.exit("the counting build failed")


def run_tests(tests: list[str]) -> bool:
    for counts in [*BUILD.rglob("*.gcda"), *BUILD.glob("python*")]:
        counts.unlink()
    passed = run(SCRIPTS / "ctest", "--test-dir", BUILD, "--output-on-failure")
    count = [sys.executable, "-m", "coverage", "run"]
    pytest = ["-m", "pytest", "-m", "not gpu and not deep"]
    if tests:
        return run(*count, *pytest, *tests) and passed
    alone = [*FLAX, *FORKING]
    passed = run(*count, *pytest, *(f"--ignore={test}" for test in alone)) and passed
    # As in the Makefile, jax has its own process.
    passed = run(*count, *pytest, *FLAX) and passed
    settings = BUILD / "forking.ini"
    settings.write_text(
        f"[run]\nsource = {ROOT / 'python/weightlift'}\ndata_file = {BUILD / 'python'}\n"
        "parallel = true\npatch = subprocess, execv\n"
    )
    return run(*count, f"--rcfile={settings}", *pytest, *FORKING) and passed


def combine() -> None:
    """The counts of all processes, except of those that were killed while they wrote."""
    if not run(sys.executable, "-m", "coverage", "combine", "-q"):
        sys.exit("coverage failed")


def native() -> list[File]:
    report = BUILD / "native.json"
    options = ["--root", ROOT, "--object-directory", BUILD, "--filter", "csrc/", "--json", report]
    # A fault of gcc's counters, which atomic counting would avoid, but the tests would take several
    # times as long.
    options += ["--gcov-ignore-parse-errors=negative_hits.warn"]
    if not run(SCRIPTS / "gcovr", *options, BUILD / "csrc", BUILD / "tests"):
        sys.exit("gcovr failed")
    files = []
    for file in json.loads(report.read_text())["files"]:
        hits: dict[int, int] = {}
        for line in file["lines"]:  # once for each instance of a template
            hits[line["line_number"]] = hits.get(line["line_number"], 0) + line["count"]
        uncovered = sorted(number for number, count in hits.items() if count == 0)
        files.append(File(file["file"], len(hits), uncovered))
    return files


def python() -> list[File]:
    report = BUILD / "package.json"
    if not run(sys.executable, "-m", "coverage", "json", "-q", "-o", report):
        sys.exit("coverage failed")
    return [
        File(path, file["summary"]["num_statements"], file["missing_lines"])
        for path, file in json.loads(report.read_text())["files"].items()
    ]


def share(files: list[File]) -> float:
    lines = sum(file.lines for file in files)
    return 100 * (1 - sum(len(file.uncovered) for file in files) / lines)


def ranges(numbers: list[int]) -> str:
    """``[1, 2, 3, 7]`` as "1-3, 7"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][1] + 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="*", help="these Python tests alone")
    parser.add_argument("--report", action="store_true", help="of the last run")
    arguments = parser.parse_args()
    passed = True
    if not arguments.report:
        install()
        passed = run_tests(arguments.tests)
        combine()
    rooms = {"csrc": native(), "python/weightlift": python()}
    for files in rooms.values():
        for file in files:
            if file.uncovered:
                print(f"{file.path} ({share([file]):.1f} %): {ranges(file.uncovered)}")
    for room, files in rooms.items():
        print(f"{room}: {share(files):.2f} % of {sum(file.lines for file in files):,} lines")
    below = [room for room, files in rooms.items() if share(files) < BARS[room]]
    if not passed or below:
        sys.exit(f"{'' if passed else 'tests failed; '}below the bar: {', '.join(below) or 'none'}")


if __name__ == "__main__":
    main()

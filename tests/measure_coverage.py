"""Which lines of csrc and of the package are reached by the native and the Python tests together.

Both are counted in one run, children of the tests included. Prints what is uncovered and writes
COVERAGE.md: the figures, and for each file what is uncovered and why. Fails if a test fails or a
figure is below its bar.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
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

# Their forked children are stopped or disturbed at each system call, of which writing counts at the
# end would be many more.
FORKING = ["tests/python/load/test_faults.py", "tests/python/models/test_saving.py"]

_END = "where gcc counts what an exception leaves behind"
_OTHER_VERSIONS = "versions of the library that are not installed (`make test-libraries` has them)"

# Of a file, or of all that a pattern fits; the first one counts.
REASONS = {
    "csrc/bind/errors.cc": "behind a switch over all kinds; an error before the factory is set",
    "csrc/bind/module.cc": f"ends of functions, {_END}",
    "csrc/bind/plan_builder.cc": f"ends of functions, {_END}",
    "csrc/bind/torch_pickle.cc": f"ends of functions, {_END}",
    "csrc/bind/tensor_export.cc": "behind a switch over all dtypes",
    "csrc/convert/cast.cc": "behind a switch over all formats",
    "csrc/device/context.cc": "a build with the CUDA kernels, and a process forked off a CUDA one",
    "csrc/device/driver.cc": "a driver older than CUDA 12",
    "csrc/engine/device_lane.cc": "a guard: the schedule leaves room for a chunk's tiles",
    "csrc/engine/host_memory.cc": "no memory for the text of an error",
    "csrc/engine/io_path.cc": "a load larger than half of the machine's free memory",
    "csrc/engine/schedule.cc": f"the end of a function, {_END}",
    "csrc/engine/sources.cc": f"ends of functions, {_END}",
    "csrc/format/common.cc": f"the end of a function, {_END}",
    "csrc/format/common.h": "no memory for the index of a file",
    "csrc/format/index.cc": "getrandom(2) has nothing to give",
    "csrc/io/file.cc": "a file system that tells that it has no direct I/O",
    "csrc/io/file.h": "a constructor that is always inlined",
    "csrc/format/torch_pickle.cc": "no memory for the index of a file",
    "csrc/io/leased_mapping.cc": "an open file that fstatfs(2) refuses",
    "csrc/io/machine.cc": f"ends of blocks, {_END}",
    "csrc/result.cc": "names of errors of a GPU, of no memory and of files that root may not read",
    "python/weightlift/atomic.py": "Linux before 4.7",
    "python/weightlift/backends/diffusers/files.py": "GGUF, and packed fours in a model",
    "python/weightlift/backends/diffusers/pipelines.py": (
        "a GPU, a generative text encoder in a DDUF file, and callers other than a pipeline"
    ),
    "python/weightlift/backends/diffusers/*": (
        "files of FlashPack, tensor parallel, DDUF entries, and the Hub's API without a mirror"
    ),
    "python/weightlift/backends/safetensors.py": _OTHER_VERSIONS,
    "python/weightlift/backends/transformers/__init__.py": (
        f"{_OTHER_VERSIONS}, and files of other kinds"
    ),
    "python/weightlift/backends/transformers/walk.py": (
        "packed fours, dtypes that torch lacks, devices that are neither CPU nor CUDA, and a "
        "rank's part that is several"
    ),
    "python/weightlift/backends/transformers/weights.py": "torch's allocator on a GPU",
    "python/weightlift/distributed.py": "a mesh made for the caller",
    "python/weightlift/dtensors.py": "a mesh of GPUs",
    "python/weightlift/exchange.py": "a team's tensors on GPUs",
    "python/weightlift/flax/*": "a file system that cannot map, packed fours, a broken jax",
    "python/weightlift/hub.py": "a revision that goes while it is listed",
    "python/weightlift/materialize.py": (
        "page-locked memory of a GPU, and devices that are neither CPU nor CUDA"
    ),
    "python/weightlift/models/config_mixin.py": "compatible classes that name none",
    "python/weightlift/models/hub_mixin.py": "a card that the Hub refuses to give",
    "python/weightlift/models/quantization.py": "a GPU",
    "python/weightlift/offload.py": "hooks that cross to a GPU",
    "python/weightlift/placement.py": "accelerate's warning about GPUs",
    "python/weightlift/team.py": "a group that is not gloo's",
    "python/weightlift/torch_file.py": "no memory for what a pickle asks for",
    "python/weightlift/cli/conditions.py": "the name of a GPU",
    "python/weightlift/cli/contenders/*": "peers that are not installed for the tests, and a GPU",
    "python/weightlift/cli/gpu_findings.py": "needs a GPU",
    "python/weightlift/cli/measure_child.py": "loads to a GPU",
    "python/weightlift/matching.py": "packed fours in a model",
    "python/weightlift/modules.py": "two devices: a load begun for another, and moves to a GPU",
    "python/weightlift/slots.py": "strided tensors from outside of the engine",
}
_NO_REASON = "**no reason is given in measure_coverage.py**"


class File(NamedTuple):
    path: str
    lines: int
    uncovered: list[int]


def run(*command: object) -> bool:
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=ENVIRONMENT, check=False)
    return done.returncode == 0


def install() -> None:
    """The counting build; without the Makefile's stamps its next target installs its own again."""
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
    alone = ["tests/python/models/test_flax.py", *FORKING]
    passed = run(*count, *pytest, *(f"--ignore={test}" for test in alone)) and passed
    # As in the Makefile: jax has a process of its own.
    passed = run(*count, *pytest, "tests/python/models/test_flax.py") and passed
    settings = BUILD / "forking.ini"
    settings.write_text(
        f"[run]\nsource = {ROOT / 'python/weightlift'}\ndata_file = {BUILD / 'python'}\n"
        "parallel = true\npatch = subprocess, execv\n"
    )
    return run(*count, f"--rcfile={settings}", *pytest, *FORKING) and passed


def combine() -> None:
    """What each process counted, but for what those left that were killed while they wrote."""
    if not run(sys.executable, "-m", "coverage", "combine", "-q"):
        sys.exit("coverage failed")


def native() -> list[File]:
    report = BUILD / "native.json"
    options = ["--root", ROOT, "--object-directory", BUILD, "--filter", "csrc/", "--json", report]
    # gcc's own mistake, which atomic counting would avoid at several times the tests' time.
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


def reason(path: str) -> str:
    fits = (why for pattern, why in REASONS.items() if fnmatch.fnmatch(path, pattern))
    return next(fits, _NO_REASON)


def page(rooms: dict[str, list[File]]) -> str:
    day = datetime.datetime.now(datetime.timezone.utc).date()
    text = [
        "# Coverage",
        "",
        f"By `make coverage`, {day}: lines that `make test` reaches.",
    ]
    text += ["", "| | lines | covered | bar |", "|---|---|---|---|"]
    for room, files in rooms.items():
        lines = sum(file.lines for file in files)
        text.append(f"| {room} | {lines:,} | {share(files):.1f} % | {BARS[room]} % |")
    text += ["", "## What is uncovered", "", "| file | covered | uncovered lines | why |"]
    text.append("|---|---|---|---|")
    for files in rooms.values():
        for file in sorted(files, key=lambda file: len(file.uncovered), reverse=True):
            if file.uncovered:
                row = [file.path, f"{share([file]):.0f} %", str(len(file.uncovered))]
                text.append("| " + " | ".join([*row, reason(file.path)]) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tests", nargs="*", help="these Python tests alone; COVERAGE.md stays")
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
    for files in rooms.values():
        for file in files:
            if file.uncovered and reason(file.path) == _NO_REASON:
                print(f"{file.path}: give a reason in REASONS, or test what is uncovered")
    for room, files in rooms.items():
        print(f"{room}: {share(files):.2f} % of {sum(file.lines for file in files):,} lines")
    if not arguments.tests:
        (ROOT / "tests" / "COVERAGE.md").write_text(page(rooms))
    below = [room for room, files in rooms.items() if share(files) < BARS[room]]
    if not passed or below:
        sys.exit(f"{'' if passed else 'tests failed; '}below the bar: {', '.join(below) or 'none'}")


if __name__ == "__main__":
    main()

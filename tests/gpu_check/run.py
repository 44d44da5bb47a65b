"""`make gpu-check`: one machine with an NVIDIA GPU, without a network, lent for fifteen minutes.

README.md beside this file says what to run and what to read. The most important parts run first.
Each is a process with its own time limit, so that a hang, a crash or a collection error affects
only its part. The output of a part goes to RESULTS/NN-part.log while it runs, and its outcome to
RESULTS/summary.txt when it ends, so that earlier results are kept if the run is stopped.

    python tests/gpu_check/run.py                      # all parts, within --minutes
    python tests/gpu_check/run.py --from "bench main"  # go on where another command ended
    python tests/gpu_check/run.py --rehearsal          # here, on the simulated driver

The interpreter is the one that runs this: it has torch with CUDA and, unless --wheel names a wheel
of weightlift, pybind11, scikit-build-core, nlohmann-json, cmake, ninja and nvcc.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
SITE = ROOT / "build" / "gpu-site"
# With less time than this, a part does not begin.
_SHORTEST = 5.0
_LINES_SHOWN = 12

_MACHINE = """
import os, platform, sys, torch
print("python", sys.version.split()[0], "torch", torch.__version__, platform.machine())
print("processors", os.cpu_count(), "usable", len(os.sched_getaffinity(0)))
print("CUDA of torch", torch.version.cuda, "available", torch.cuda.is_available())
if torch.cuda.is_available():
    print(torch.cuda.get_device_name(), torch.cuda.get_device_properties(0))
elif "--simulated" not in sys.argv:
    sys.exit("torch sees no GPU here: `make gpu-check` needs one")
"""


@dataclass
class Part:
    """One process, and the seconds that it may take."""

    name: str
    command: list[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    needed: bool = False  # later parts cannot run without it
    may_fail: bool = False  # its failure is reported, but is not a failure of the run


def python(*arguments: object) -> list[str]:
    return [sys.executable, *map(str, arguments)]


def own_build(wheel: Path | None) -> Part:
    """Installs into a separate folder, so that the interpreter's packages do not change."""
    install = python("-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index",
                     "--no-deps", "--no-compile", "--upgrade", "--target", SITE)  # fmt: skip
    if wheel is not None:
        return Part("build", [*install, str(wheel.resolve())], 60, needed=True)
    options = ["--no-build-isolation", "-C", "build-dir=build/gpu"]
    return Part("build", [*install, *options, "."], 150, needed=True)


def gpu_tests(name: str, seconds: float, file: str) -> Part:
    """One file of GPU tests. A skipped test is a failure, and the machine's pytest plug-ins are
    off."""
    path = f"tests/python/gpu/{file}"
    return Part(
        name,
        python("-m", "pytest", "-v", "-p", "no:cacheprovider", "-W", "default", "-m", "gpu", path),
        seconds,
        {"WEIGHTLIFT_REQUIRE_GPU": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )


def bench(name: str, results: Path, seconds: float, *workloads: str) -> Part:
    out = results / f"{name.replace(' ', '-')}.json"
    command = python("benchmarks/run.py", "--device", "cuda", "--repeat", 3, "--out", out)
    return Part(name, [*command, *workloads], seconds, may_fail=True)


def gpu_parts(results: Path, wheel: Path | None) -> list[Part]:
    look = python(HERE / "first_look.py", "--results", results, "--seconds", 90)
    parts = [
        Part("machine", python("-c", _MACHINE), 60, needed=True),
        own_build(wheel),
        Part("first look", look, 130),
        gpu_tests("tests load_file", 150, "test_gpu_load_file.py"),
        gpu_tests("tests copies", 45, "test_gpu_copies.py"),
        gpu_tests("tests streaming", 45, "test_gpu_streaming.py"),
        bench("bench main", results, 120, "cuda-same", "cuda-cast"),
        gpu_tests("tests backends", 90, "test_gpu_backends.py"),
        gpu_tests("tests transformers", 90, "test_gpu_transformers.py"),
        bench("bench peers", results, 90, "cuda-small-100k", "cuda-shards"),
        Part("doctor", python("-m", "weightlift", "doctor"), 60, may_fail=True),
    ]
    if sanitizer := shutil.which("compute-sanitizer"):
        kernel = gpu_tests("sanitizer", 120, "test_gpu_load_file.py")
        kernel.command = [sanitizer, *kernel.command, "-k", "cast"]
        parts.append(kernel)
    return parts


def rehearsal_parts(results: Path) -> list[Part]:
    """The same kinds of parts on the simulated driver, and three that fail on purpose."""
    library = next((ROOT / "build" / "dev").glob("**/libsimulated_cuda.so"), None)
    if library is None:
        sys.exit("no libsimulated_cuda.so: `make dev` builds it")
    broken = results / "test_broken.py"
    broken.write_text("import no_such_module\n")
    hang = "print('hangs', flush=True); import time; time.sleep(1000)"
    look = python(HERE / "first_look.py", "--results", results, "--seconds", 90)
    pytest = python("-m", "pytest", "-v", "-p", "no:cacheprovider")
    devices = "tests/python/load/test_simulated_devices.py"
    load_file = "tests/python/gpu/test_gpu_load_file.py"
    return [
        Part("machine", python("-c", _MACHINE, "--simulated"), 60, needed=True),
        Part("first look", [*look, "--scale", "0.015625", "--simulated", str(library)], 120),
        Part("tests of devices", [*pytest, "-k", "eight or driver", devices], 240),
        Part("tests load_file", [*pytest, "-m", "gpu", load_file], 120),
        Part("hangs on purpose", python("-c", hang), 3, may_fail=True),
        Part("breaks on purpose", [*pytest, str(broken)], 60, may_fail=True),
        Part("dies on purpose", python("-c", "import os; os.abort()"), 30, may_fail=True),
        Part("doctor", python("-m", "weightlift", "doctor", "--disk-mb", 16), 120, may_fail=True),
    ]


class Day:
    """Runs parts one after another until the time is up."""

    def __init__(self, results: Path, seconds: float, environment: dict[str, str]) -> None:
        self._results = results
        self._end = time.monotonic() + seconds
        self._environment = environment
        self.failed: list[str] = []

    def say(self, text: str) -> None:
        print(text, flush=True)
        with (self._results / "summary.txt").open("a") as summary:
            summary.write(text + "\n")

    def run(self, number: int, part: Part) -> bool:
        """Runs a part. Returns whether later parts can run."""
        left = self._end - time.monotonic()
        if left < _SHORTEST:
            self.say(f"{number:02} {part.name:20} not begun: no time left")
            return True
        limit = min(part.seconds, left)
        path = self._results / f"{number:02}-{part.name.replace(' ', '-')}.log"
        print(f"\n== {number:02} {part.name}: {limit:.0f} s of {left:.0f}", flush=True)
        start = time.monotonic()
        with path.open("wb", buffering=0) as log:
            status = self._process(part, limit, log)
        seconds = time.monotonic() - start
        lines = path.read_text(errors="replace").strip().splitlines()
        outcome = {None: f"stopped, {limit:.0f} s", 0: "ok"}.get(status, f"status {status}")
        self.say(f"{number:02} {part.name:20} {outcome:15} {seconds:6.1f} s  {lines[-1][:100]}")
        if status != 0 and not part.may_fail:
            self.failed.append(part.name)
        return status == 0 or not part.needed

    def _process(self, part: Part, limit: float, log: IO[bytes]) -> int | None:
        """Its exit status; None if it was stopped."""
        log.write(f"$ {' '.join(part.command)}\n".encode())
        process = subprocess.Popen(
            part.command,
            cwd=ROOT,
            env={**os.environ, **self._environment, **part.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert process.stdout is not None
        reader = threading.Thread(target=_pass_on, args=(process.stdout, log), daemon=True)
        reader.start()
        status: int | None = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = process.wait(limit)
        # Interrupts all of its processes. An interrupted benchmark writes its results so far.
        if status is None:
            _signal(process, signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        _signal(process, signal.SIGKILL)
        process.wait()
        reader.join(2)
        return status


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _pass_on(stream: IO[bytes], log: IO[bytes]) -> None:
    while data := os.read(stream.fileno(), 1 << 16):
        with contextlib.suppress(ValueError):  # the log is closed: a grandchild lives on
            log.write(data)
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearsal", action="store_true", help="on the simulated driver")
    parser.add_argument("--results", type=Path, help="by default $OUT, or build/gpu-results/NOW")
    parser.add_argument("--minutes", type=float, default=9.5, help="of this command")
    parser.add_argument("--from", dest="first", default="", metavar="PART", help="begin with it")
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="these parts")
    parser.add_argument("--wheel", type=Path, help="of weightlift: nothing is built")
    arguments = parser.parse_args()
    now = datetime.datetime.now(datetime.timezone.utc)
    default = os.environ.get("OUT") or ROOT / "build" / "gpu-results" / f"{now:%Y-%m-%d-%H%M%S}"
    results = Path(arguments.results or default).resolve()
    results.mkdir(parents=True, exist_ok=True)
    parts = rehearsal_parts(results) if arguments.rehearsal else gpu_parts(results, arguments.wheel)
    names = [part.name for part in parts]
    begin = next((i for i, name in enumerate(names) if name.startswith(arguments.first)), None)
    if begin is None:
        parser.error(f"no part {arguments.first!r}: there are {', '.join(names)}")
    path = [str(ROOT / "tests" / "python" / "helpers"), os.environ.get("PYTHONPATH", "")]
    if not arguments.rehearsal:
        path.insert(0, str(SITE))
    environment = {
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
    }
    day = Day(results, 60 * arguments.minutes, environment)
    for number, part in enumerate(parts):
        if number < begin or (arguments.only and part.name not in arguments.only):
            continue
        if not day.run(number, part):
            day.say(f"nothing after {part.name!r} can run without it")
            break
    day.say(f"failed: {', '.join(day.failed)}" if day.failed else "nothing failed")
    print(f"results: {results}", flush=True)
    return 1 if day.failed else 0


if __name__ == "__main__":
    sys.exit(main())

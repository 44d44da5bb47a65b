"""Every architecture, tiny, loaded by its library alone and with the backend.

    python tests/libraries/architectures/run.py [--library NAME] [--jobs N] [ARCHITECTURE...]

Each configuration of the installed transformers and each model class of diffusers is made as small
as its constructor allows, with random numbers in all tensors, and saved in several forms. Every
load is made twice and must show the same: bits, dtypes, strides, ties and devices of all tensors,
the loading info, attributes, accelerate's hooks, log lines, warnings, the state of the random
numbers, and the error where the library raises one. Rows of options cover every pair of values;
`FULL=1` takes all combinations, and `--rows 8` takes eight rows, different ones for each
architecture, with every value in one of them. The exit status is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import importlib.metadata
import json
import os
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIBRARIES = ("transformers", "diffusers")
# Limit for one architecture; none with FULL=1.
SECONDS = 600
# The number of loads of an architecture whose differences are printed.
SHOWN = 3
# A worker's memory grows with its imports.
PER_WORKER = 150


@dataclasses.dataclass
class Tally:
    """Of one library."""

    made: int = 0
    loads: int = 0
    failed: int = 0
    engine: int = 0
    not_made: dict[str, str] = dataclasses.field(default_factory=dict)
    different: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    fallbacks: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class Worker:
    """A process that checks one architecture after the other."""

    def __init__(self, library: str, folder: str) -> None:
        self._library, self._folder = library, folder
        self._process: subprocess.Popen[str] | None = None
        self._served = 0
        self.fallbacks: collections.Counter[str] = collections.Counter()
        self._of_process: dict[str, int] = {}

    def ask(self, name: str) -> dict[str, Any]:
        if self._process is None or self._served >= PER_WORKER:
            self.close()
            self._start()
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("the worker has no pipes")
        self._served += 1
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(SECONDS if os.environ.get("FULL") != "1" else 10**6, stop)
        timer.start()
        try:
            process.stdin.write(f"{name}\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if line:
            answer: dict[str, Any] = json.loads(line)
            self._of_process = answer.pop("fallbacks")
            return answer
        code = process.wait()
        self._process = None
        what = f"no end after {SECONDS} s" if late.is_set() else f"the process ended with {code}"
        return {"crash": what}

    def _start(self) -> None:
        self._served = 0
        self._process = subprocess.Popen(
            [sys.executable, str(HERE / "worker.py"), self._library, self._folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("VERBOSE") else subprocess.DEVNULL,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"},
        )

    def close(self) -> None:
        self.fallbacks.update(self._of_process)
        self._of_process = {}
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
            self._process.wait()
            self._process = None


def names(library: str) -> list[str]:
    code = f"import of_{library} as kind, json; print('NAMES ' + json.dumps(kind.names()))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True
    )
    found = next(line for line in done.stdout.splitlines() if line.startswith("NAMES "))
    listed: list[str] = json.loads(found.removeprefix("NAMES "))
    return listed


def judge(library: str, chosen: list[str], jobs: int, folder: str) -> Tally:
    tally = Tally()
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for name in chosen:
        waiting.put(name)
    lock = threading.Lock()

    def work() -> None:
        worker = Worker(library, folder)
        try:
            while True:
                try:
                    name = waiting.get_nowait()
                except queue.Empty:
                    break
                answer = worker.ask(name)
                with lock:
                    note(tally, name, answer)
        finally:
            worker.close()
            with lock:
                tally.fallbacks.update(worker.fallbacks)

    threads = [threading.Thread(target=work) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return tally


def note(tally: Tally, name: str, answer: dict[str, Any]) -> None:
    """Counts an answer, and prints its line."""
    if "crash" in answer:
        tally.different[name] = [{"row": {}, "found": [answer["crash"]]}]
        print(f"  {name}: {answer['crash']}", flush=True)
        return
    if "not made" in answer:
        tally.not_made[name] = answer["not made"]
        return
    tally.made += 1
    for kind in ("loads", "failed", "engine"):
        setattr(tally, kind, getattr(tally, kind) + answer[kind])
    if answer["different"]:
        tally.different[name] = answer["different"]
    print(
        f"  {name} ({answer['title']}): {answer['loads']} loads, {answer['engine']} by the engine, "
        f"{len(answer['different'])} different, {answer['seconds']:.1f} s",
        flush=True,
    )
    if "not built" in answer:
        print(f"    {name}: some rows are not built by the library alone: {answer['not built']}")
    for one in answer["different"][:SHOWN]:
        show_difference(name, one)


def show(library: str, tally: Tally, seconds: float, of_cpu: float) -> None:
    version = importlib.metadata.version(library)
    count = tally.made + len(tally.not_made)
    print(
        f"\n{library} {version}: {tally.made} of {count} architectures made, {seconds:.0f} s, "
        f"{of_cpu:.0f} s of processor time"
    )
    print(
        f"  {tally.loads} loads compared, {tally.engine} of them by the engine; in {tally.failed} "
        "the library raises"
    )
    for reason, times in tally.fallbacks.most_common():
        print(f"  fallback {times} times: {reason[:300]}")
    if tally.not_made:
        print(f"  not made: {len(tally.not_made)}")
        for name, reason in sorted(tally.not_made.items()):
            print(f"    {name}: {reason[:300]}")
    print(f"  different: {len(tally.different)} architectures")
    for name, found in sorted(tally.different.items()):
        print(f"    {name}: {len(found)} loads")


def _processor_seconds() -> float:
    """Of the workers that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def show_difference(name: str, one: dict[str, Any]) -> None:
    options = ", ".join(f"{key}={value}" for key, value in one["row"].items())
    print(f"    {name}: {options}")
    for line in one["found"][:4]:
        print("      " + line[:1500].replace("\n", "\n      "))
    if len(one["found"]) > 4:
        print(f"      and {len(one['found']) - 4} more")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("architectures", nargs="*", help="names; all without one")
    parser.add_argument("--library", choices=LIBRARIES, action="append")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rows", type=int, default=0, help="of each architecture; all without it")
    parser.add_argument("--part", default="0/1", help="such as 0/8: every eighth architecture")
    given = parser.parse_args()
    os.environ["ROWS_EACH"] = str(given.rows)
    part, parts = map(int, given.part.split("/"))
    good = True
    for library in given.library or LIBRARIES:
        began, used = time.monotonic(), _processor_seconds()
        every = names(library)
        chosen = [name for name in every if name in given.architectures] or every[part::parts]
        if given.architectures and not set(given.architectures) & set(every):
            continue
        print(f"{library}: {len(chosen)} architectures", flush=True)
        with tempfile.TemporaryDirectory(prefix="weightlift-architectures-") as folder:
            tally = judge(library, chosen, given.jobs, folder)
        show(library, tally, time.monotonic() - began, _processor_seconds() - used)
        good &= not tally.different and tally.made > 0
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""Proves that the engine's tests find mistakes: each patch in mutants/ breaks the engine, and a
native test must fail on it. That test is engine_test, or the one that the text above the patch
names in a line "Killed by: device_test". For a patch of the Python package, the line names a file
of tests, which runs on the development installation.

README.md, "Mutants", says how to add one.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TREE = ("csrc", "cmake", "tests", "python", "CMakeLists.txt")
# The installation is editable, and its finder lists the path of each module.
REDIRECT = """import sys
for finder in sys.meta_path:
    if hasattr(finder, "known_source_files"):
        for name, path in finder.known_source_files.items():
            finder.known_source_files[name] = path.replace({root!r}, {copy!r})
"""
TEST = "engine_test"
# Tried before all seeds, because most mutants need few.
FEW_SEEDS = 50
# Of a native test with all seeds, when the unmutated one has not been timed with all of them.
LIMIT_SECONDS = 180.0
README = HERE / "README.md"
ROW = re.compile(r"^\| `(\w+)` \| ([\w/.]+) \| (.+) \|$", re.MULTILINE)
# What of a first report tells which oracle it is of.
ORACLES = (
    ("violations", "race:|host write|use after|freed in|unpinned in|out of bounds|unregistered|"
                   "wrong device|launch:|context:|capture:|unmapped:|symbol:|blocking:|spin:|"
                   "sim_violations"),
    ("the ledger", "leak|pinned|ledger"),
    ("bytes", "differ|memcmp|bits"),
    ("a crash", "SIG"),
    ("a count", r"assert [\[{\d]"),
)  # fmt: skip


@dataclass
class Outcome:
    name: str
    result: str  # killed, hung, survived, does not apply, does not build
    seconds: float
    evidence: str = ""
    test: str = ""  # the one that failed

    @property
    def good(self) -> bool:
        return self.result in ("killed", "hung")


def run_patch(source: Path, patch: Path, *options: str) -> subprocess.CompletedProcess[str]:
    # Without fuzz, so that a mutant whose context has changed is checked by a person.
    command = ["patch", "-p1", "--no-backup-if-mismatch", "--fuzz=0", "--reject-file=-"]
    command += ["--batch", *options, "-i", str(patch)]
    return subprocess.run(command, cwd=source, text=True, capture_output=True, check=False)


def why_not(source: Path, patch: Path) -> str:
    """Why the patch does not apply; empty when it does."""
    tried = run_patch(source, patch, "-N", "--dry-run")
    return "" if tried.returncode == 0 else " ".join(tried.stdout.split())[-100:]


class Workshop:
    """A copy of the tree, built once, to which mutants are applied one after another."""

    def __init__(self, root: Path, folder: Path, jobs: int, seeds: int) -> None:
        self.source = folder / "tree"
        self.build = folder / "build"
        self.jobs = jobs
        self.seeds = seeds
        self.root = root
        self.site = folder / "site"
        self.site.mkdir()
        redirect = REDIRECT.format(root=f"{root}/python/", copy=f"{self.source}/python/")
        (self.site / "sitecustomize.py").write_text(redirect)
        self.source.mkdir()
        for name in TREE:
            origin = root / name
            if origin.is_dir():
                ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
                shutil.copytree(origin, self.source / name, ignore=ignore)
            else:
                shutil.copy2(origin, self.source / name)

    def configure(self) -> None:
        command = [
            "cmake", "-S", str(self.source), "-B", str(self.build), "-G", "Ninja",
            "-DWEIGHTLIFT_TESTING=ON", "-DWEIGHTLIFT_PYTHON=OFF", "-DWEIGHTLIFT_CUDA=AUTO",
            "-DCMAKE_BUILD_TYPE=RelWithDebInfo", "-DCMAKE_CXX_FLAGS_RELWITHDEBINFO=-O1",
            f"-DPython_EXECUTABLE={sys.executable}",
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def compile(self, test: str) -> subprocess.CompletedProcess[str]:
        if test.endswith(".py"):
            return subprocess.CompletedProcess([], 0, "")
        command = ["cmake", "--build", str(self.build), "--target", test, "-j", str(self.jobs)]
        return subprocess.run(command, text=True, capture_output=True, check=False)

    def test(
        self, test: str, limit: float | None, *, seeds: int | None = None, only: str = ""
    ) -> tuple[int | None, float, str]:
        """Exit status (None: ran past the limit), seconds, and the output. ``only``: the name of a
        test in the binary or the file."""
        environment = os.environ | {"WEIGHTLIFT_SEEDS": str(seeds or self.seeds)}
        # The first failure is enough.
        if test.endswith(".py"):
            command = [sys.executable, "-m", "pytest", "-xq", "-p", "no:cacheprovider"]
            command.append(f"{test}::{only}" if only else test)
            environment["PYTHONPATH"] = str(self.site)
            folder = self.root
        else:
            found = self.build.rglob(test)
            binary = next(path for path in found if path.is_file() and os.access(path, os.X_OK))
            command = [str(binary), "--gtest_fail_fast", f"--gtest_filter={only or '*'}"]
            folder = self.build
        start = time.monotonic()
        with tempfile.TemporaryFile(mode="w+", errors="replace") as output:
            process = subprocess.Popen(
                command, cwd=folder, env=environment, stdout=output,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            status: int | None = None
            try:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    status = process.wait(limit)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            output.seek(0, os.SEEK_END)
            # What was skipped after the failure may be long.
            output.seek(max(0, output.tell() - 1_000_000))
            return status, time.monotonic() - start, output.read()


def first_report(output: str) -> str:
    """The line of the output that best explains the failure."""
    stripped = (line.strip() for line in output.splitlines())
    progress = ("Google Test trace:", "[ RUN", "[       OK", "[-----", "[=====")
    lines = [line for line in stripped if line and not line.startswith(progress)]
    marks = ("race:", "host write in flight", "use after free", "freed in use", "unpinned in use",
             "out of bounds", "unregistered", "wrong device", "launch:", "context:", "leak",
             "differ", "Failure", "E  ", "FAILED")  # fmt: skip
    for mark in marks:
        for line in lines:
            if mark in line:
                return line[:100]
    return lines[-1][:100] if lines else ""


def failed_test(output: str) -> str:
    """The test that failed or, after a crash or a time limit, the last that began."""
    failed = re.search(r"^(?:\[  FAILED  \] |FAILED \S+::)(\w+(?:\.\w+)?)", output, re.MULTILINE)
    begun = re.findall(r"^\[ RUN      \] (\S+)", output, re.MULTILINE)
    return failed[1] if failed else begun[-1] if begun else ""


def chosen(only: list[str] | None, quick: bool) -> list[Path]:
    patches = {path.stem: path for path in sorted((HERE / "mutants").glob("*.patch"))}
    names = list(patches)
    if quick:
        lines = (HERE / "mutants" / "QUICK").read_text().splitlines()
        names = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if only:
        names = [name.removesuffix(".patch") for name in only]
    if missing := [name for name in names if name not in patches]:
        sys.exit(f"no such mutant: {', '.join(missing)}")
    return [patches[name] for name in names]


def test_of(patch: Path) -> str:
    found = re.search(r"^Killed by: ([\w/.]+)", patch.read_text(), re.MULTILINE)
    return found[1] if found else TEST


def by(outcome: Outcome) -> str:
    """In a few words, what killed it."""
    if outcome.result == "hung":
        oracle = "a time limit"
    else:
        found = (name for name, marks in ORACLES if re.search(marks, outcome.evidence))
        oracle = next(found, "an expectation")
    return f"{oracle}, in `{outcome.test}`" if outcome.test else oracle


def listed() -> dict[str, str]:
    """mutant -> by what it was killed, as the README has it."""
    return {row[1]: row[3] for row in ROW.finditer(README.read_text())}


def table(known: dict[str, str]) -> str:
    rows = [
        f"| `{patch.stem}` | {test_of(patch)} | {known.get(patch.stem, 'not recorded')} |"
        for patch in sorted(chosen(None, False), key=lambda patch: (test_of(patch), patch.stem))
    ]
    return "\n".join(["| mutant | killed by | by |", "|---|---|---|", *rows])


def write_list(outcomes: list[Outcome], *, only_check: bool = False) -> int:
    """Brings the README's list up to date; what was not run stays as it is."""
    known = listed() | {outcome.name: by(outcome) for outcome in outcomes if outcome.good}
    text = README.read_text()
    before, rest = text.split("<!-- mutants -->\n")
    after = rest.partition("\n<!-- end of mutants -->")
    new = f"{before}<!-- mutants -->\n{table(known)}{after[1]}{after[2]}"
    if only_check:
        print("the list in README.md is", "as it should be" if new == text else "out of date")
        stale = [path.stem for path in chosen(None, False) if why_not(HERE.parents[1], path)]
        print(f"no longer apply, make them again: {', '.join(stale)}" if stale else "all apply")
        return int(new != text or bool(stale))
    README.write_text(new)
    return 0


def try_to_kill(workshop: Workshop, test: str, limit: float, killer: str) -> tuple[int | None, str]:
    """Runs the test that failed the last time, then all with few seeds, then all with all seeds,
    until one fails. Returns the exit status (None: ran past the limit) and the output."""
    stages: list[dict[str, Any]] = [{}]
    if not test.endswith(".py"):
        stages.insert(0, {"seeds": min(FEW_SEEDS, workshop.seeds)})
    if killer:
        stages.insert(0, {"only": killer})
    for stage in stages:
        # Parts of a run take less: a mutant that hangs costs less time.
        status, _, output = workshop.test(test, max(60.0, limit / 2) if stage else limit, **stage)
        # 4 and 5: pytest finds no such test.
        if status != 0 and not (stage.get("only") and status in (4, 5)):
            break
    return status, output


def judge(workshop: Workshop, patch: Path, limit: float, killers: dict[str, str]) -> Outcome:
    start = time.monotonic()

    def outcome(result: str, evidence: str = "", output: str = "") -> Outcome:
        seconds = time.monotonic() - start
        return Outcome(patch.stem, result, seconds, evidence, failed_test(output))

    if reason := why_not(workshop.source, patch):
        return outcome("does not apply", reason)
    run_patch(workshop.source, patch, "-N")
    try:
        test = test_of(patch)
        built = workshop.compile(test)
        if built.returncode != 0:
            errors = [line for line in built.stdout.splitlines() if "error" in line]
            return outcome("does not build", errors[0][-100:] if errors else "")
        status, output = try_to_kill(workshop, test, limit, killers.get(patch.stem, ""))
        if status is None:
            return outcome("hung", "killed at the time limit", output)
        if status == 0:
            return outcome("survived")
        if status < 0:
            evidence = f"{signal.Signals(-status).name}; {first_report(output)}"
            return outcome("killed", evidence, output)
        return outcome("killed", first_report(output), output)
    finally:
        undone = run_patch(workshop.source, patch, "-R")
        if undone.returncode != 0:
            sys.exit(f"{patch.stem} cannot be undone:\n{undone.stdout}")


@functools.cache
def tree_digest(root: Path) -> str:
    """Of all that decides about a mutant, except the mutants themselves."""
    made = hashlib.sha256()
    for name in TREE:
        for path in sorted([root / name] if (root / name).is_file() else (root / name).rglob("*")):
            if path.is_file() and path.suffix not in (".pyc", ".patch", ".md"):
                made.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return made.hexdigest()


class Record:
    """A file with the outcomes so far, to which several processes may append. An outcome counts for
    the tree, the mutant and the seeds that it was found with."""

    def __init__(self, path: Path | None, root: Path, seeds: int) -> None:
        self._path = path
        self._root = root
        self._seeds = seeds

    def _key(self, patch: Path) -> str:
        parts = f"{tree_digest(self._root)} {self._seeds} ".encode()
        return hashlib.sha256(parts + patch.read_bytes()).hexdigest()

    def add(self, patch: Path, outcome: Outcome) -> None:
        if self._path is None:
            return
        line = json.dumps({"key": self._key(patch), **dataclasses.asdict(outcome)}) + "\n"
        with self._path.open("a") as file:
            file.write(line)

    def outcomes(self, patches: list[Path]) -> dict[str, Outcome]:
        """name -> outcome, of those that are recorded."""
        if self._path is None or not self._path.exists():
            return {}
        keys = {self._key(patch): patch.stem for patch in patches}
        found = {}
        for line in self._path.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last line may be cut off
                entry = json.loads(line)
                if name := keys.get(entry.pop("key")):
                    found[name] = Outcome(**entry)
        return found


def limits_of(
    workshop: Workshop, patches: list[Path], killers: dict[str, str], *, passed: bool
) -> dict[str, float]:
    """Runs the tests on the unmutated tree. Of native ones that have ``passed`` before, runs only
    the known killers, with few seeds. Returns test -> seconds that it may take."""
    if any(not test_of(patch).endswith(".py") for patch in patches):
        workshop.configure()
    limits: dict[str, float] = {}
    for test in sorted({test_of(patch) for patch in patches}):
        built = workshop.compile(test)
        if built.returncode != 0:
            print(built.stdout[-4000:])
            sys.exit(f"the unmutated {test} does not build")
        few = passed and not test.endswith(".py")
        seeds = min(FEW_SEEDS, workshop.seeds) if few else workshop.seeds
        own = {killers.get(patch.stem, "") for patch in patches if test_of(patch) == test}
        only = ":".join(sorted(own - {""})) if few else ""
        status, seconds, output = workshop.test(test, None, seeds=seeds, only=only)
        if status != 0:
            print(output[-4000:])
            sys.exit(f"the unmutated {test} fails with {seeds} seeds")
        limits[test] = max(LIMIT_SECONDS if few else 60.0, 5 * seconds)
        which = f"{only} of {test}" if only else test
        print(f"unmutated: {which} passes with {seeds} seeds in {seconds:.1f} s", flush=True)
    return limits


def run(arguments: argparse.Namespace, patches: list[Path], record: Record) -> list[Outcome]:
    """Runs mutants one after another; those that are recorded are not run again."""
    known = record.outcomes(patches)
    left = [patch for patch in patches if patch.stem not in known]
    if known:
        print(f"{len(known)} are recorded, {len(left)} are left", flush=True)
    if left:
        with tempfile.TemporaryDirectory(prefix="weightlift-mutants-") as folder:
            workshop = Workshop(arguments.root, Path(folder), arguments.jobs, arguments.seeds)
            killers = {name: found[1] for name, how in listed().items()
                       if (found := re.search(r", in `(\S+)`$", how))}  # fmt: skip
            limits = limits_of(workshop, left, killers, passed=arguments.passed)
            for patch in left:
                outcome = known[patch.stem] = judge(
                    workshop, patch, limits[test_of(patch)], killers
                )
                record.add(patch, outcome)
                print(f"  {outcome.name}: {outcome.result}, {outcome.seconds:.0f} s", flush=True)
    return [known[patch.stem] for patch in patches]


def run_in_parallel(
    arguments: argparse.Namespace, patches: list[Path], record: Record
) -> list[Outcome]:
    """In several processes, each with a part of the mutants and its own copy of the tree."""
    count = arguments.parallel
    command = [sys.executable, str(HERE / "run_mutants.py"), "--record", str(arguments.record)]
    command += ["--seeds", str(arguments.seeds), "--jobs", "1", "--root", str(arguments.root)]
    command += ["--passed"] if arguments.passed else []
    command += ["--only", *(patch.stem for patch in patches)]
    processes = [
        subprocess.Popen([*command, "--part", f"{part}/{count}"]) for part in range(1, count + 1)
    ]
    try:
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.terminate()
            process.wait()
    found = record.outcomes(patches)
    missing = [patch.stem for patch in patches if patch.stem not in found]
    if missing:
        sys.exit(f"not run: {', '.join(missing)}; the same command goes on with them")
    return [found[patch.stem] for patch in patches]


def a_part(text: str) -> tuple[int, int]:
    number, of = map(int, text.split("/"))
    if not 1 <= number <= of:
        raise ValueError(text)
    return number, of


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutants")
    parser.add_argument("--quick", action="store_true", help="those listed in mutants/QUICK")
    parser.add_argument("--part", type=a_part, default=(1, 1), metavar="I/N", help="such as 1/2")
    parser.add_argument(
        "--parallel", type=int, default=1, metavar="N", help="processes, each with a part"
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="append each outcome to it as it is found, and "
        "take over those that it has of the same tree"
    )  # fmt: skip
    parser.add_argument(
        "--list", action="store_true", help="bring the list in README.md up to date; with no other "
        "option, without a run"
    )  # fmt: skip
    parser.add_argument(
        "--check-list", action="store_true", help="whether it is, and whether all mutants apply"
    )
    parser.add_argument(
        "--passed", action="store_true", help="the unmutated native tests have just passed in "
        f"ctest: run only the killers, with {FEW_SEEDS} seeds, which shows that the copy passes too"
    )  # fmt: skip
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=2, help="of the compiler")
    parser.add_argument("--root", type=Path, default=HERE.parents[1], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    # An end of this process ends those that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    arguments = parsed()
    runs = arguments.only or arguments.quick or arguments.record
    if arguments.check_list or (arguments.list and not runs):
        return write_list([], only_check=arguments.check_list)
    number, of = arguments.part
    patches = chosen(arguments.only, arguments.quick)[number - 1 :: of]
    if not patches:
        print("no mutants")
        return 0
    # For all mutants, whichever are run, so that a change of the engine shows it at once.
    stale = [path.stem for path in chosen(None, False) if why_not(arguments.root, path)]
    if stale:
        print(f"no longer apply, make them again: {', '.join(stale)}", flush=True)

    with tempfile.TemporaryDirectory(prefix="weightlift-mutants-") as folder:
        if arguments.parallel > 1 and arguments.record is None:
            arguments.record = Path(folder) / "record"
        record = Record(arguments.record, arguments.root, arguments.seeds)
        outcomes = (run_in_parallel if arguments.parallel > 1 else run)(arguments, patches, record)

    width = max(len(outcome.name) for outcome in outcomes)
    print()
    for outcome in outcomes:
        row = f"{outcome.name:{width}}  {outcome.result:14}  {outcome.seconds:6.1f} s"
        print(f"{row}  {outcome.test}  {outcome.evidence}".rstrip())
    if arguments.list:
        write_list(outcomes)
    killed = sum(outcome.good for outcome in outcomes)
    print(f"\nkilled {killed} of {len(outcomes)}")
    return 0 if killed == len(outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())

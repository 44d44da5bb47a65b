"""Runs the libraries' own tests: each suite with the backend off and on, and every test must have
the same results; then once more to count the bytes that the library loads, for the engine's share.

    python tests/libraries/run.py [SUITE...]

Source archives of the installed versions come from the package index into build/libraries.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / "build" / "libraries"

# pip needs an archive's metadata before it keeps the archive, and a Rust project's needs the Rust
# registry. This gives pip the metadata.
NO_MATURIN = """
from pathlib import Path

def get_requires_for_build_wheel(config_settings=None):
    return []

def prepare_metadata_for_build_wheel(directory, config_settings=None):
    folder = Path(directory, "{name}-{version}.dist-info")
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return folder.name
"""


@dataclasses.dataclass
class Suite:
    """Tests to run.

    Attributes:
        archive: the package whose source archive has the tests or their imports.
        tests: files in the archive, or in this folder.
        select: pytest's ``-k``.
        share: the smallest share of the tests' bytes that the engine must move.
        least: the smallest number of tests that must pass, in case the suite changes.
        folder: in the archive, where the tests run.
    """

    backends: str
    archive: str
    tests: tuple[str, ...]
    select: str
    share: float
    least: int
    folder: str = ""


# Packages that the suites import and weightlift's own tests do not.
NEEDS = ("parameterized==0.9.0",)

SUITES = {
    "safetensors": Suite(
        "safetensors",
        "safetensors",
        (
            "tests/test_pt_*.py",
            "tests/test_simple.py",
            "tests/test_handle.py",
            "tests/test_pread_backend.py",
            "tests/test_threadable.py",
        ),
        "not test_odd_dtype_fp4",  # it saves uninitialised memory
        0.99,
        60,
        "bindings/python",
    ),
    "accelerate": Suite(
        "accelerate",
        "accelerate",
        ("tests/test_modeling_utils.py", "tests/test_big_modeling.py", "tests/test_offload.py"),
        "load_checkpoint or offload or load_state_dict or set_module_tensor",
        0.9,
        15,
    ),
    "transformers": Suite(
        "transformers",
        "transformers",
        ("suite_transformers.py",),
        "(save_load or keep_in_fp32 or contiguous or base_model_prefix or tied or disk_offload "
        "or mismatched or already_mapped) and not torch_save",  # torch.load by the test itself
        0.9,
        30,
    ),
    "diffusers": Suite("diffusers", "", ("suite_diffusers.py",), "", 0.99, 130),
}


def source(name: str) -> Path:
    """The unpacked source archive of the installed version."""
    number = version(name)
    folder = WORK / f"{name}-{number}"
    if folder.exists():
        return folder
    WORK.mkdir(parents=True, exist_ok=True)
    stand_in = WORK / "no-maturin"
    stand_in.mkdir(exist_ok=True)
    (stand_in / "maturin.py").write_text(NO_MATURIN.format(name=name, version=number))
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "download"]
    options = ["--no-deps", "--no-binary", name, "-d", str(WORK), f"{name}=={number}"]
    environment = dict(os.environ)
    if name == "safetensors":
        options.append("--no-build-isolation")
        environment["PYTHONPATH"] = str(stand_in)
    subprocess.run([*command, *options], env=environment, check=True)
    with tarfile.open(WORK / f"{name}-{number}.tar.gz") as archive:
        archive.extractall(WORK, filter="data")
    return folder


def run(name: str, suite: Suite, mode: str) -> dict[str, Any]:
    folder = source(suite.archive) / suite.folder if suite.archive else HERE
    tests = []
    for pattern in suite.tests:
        at = HERE if (HERE / pattern).exists() else folder
        tests += sorted(map(str, at.glob(pattern)))
    record = WORK / f"{name}-{mode}.json"
    record.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(folder), str(WORK / "needs")]),
        "JUDGE_MODE": mode,
        "JUDGE_BACKENDS": suite.backends,
        "JUDGE_RECORD": str(record),
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "judge", "-p", "no:cacheprovider"]
    command += ["--rootdir", str(WORK), "-c", os.devnull, "--tb=line", "-k", suite.select, *tests]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if not record.exists():
        sys.exit(f"{name}, {mode}: no record\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(record.read_text())
    return found


def differences(stock: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    found = []
    for test in sorted(stock.keys() | ours.keys()):
        one, other = stock.get(test, {}), ours.get(test, {})
        found += [
            f"{test}: {kind}\n    stock {one.get(kind)}\n    ours  {other.get(kind)}"
            for kind in sorted(one.keys() | other.keys())
            if one.get(kind) != other.get(kind)
        ]
    return found


def judge(name: str, suite: Suite) -> bool:
    stock, ours, counted = (run(name, suite, mode) for mode in ("stock", "weightlift", "count"))
    different = differences(stock["tests"], ours["tests"])
    outcomes: dict[str, int] = {}
    for test in stock["tests"].values():
        for outcome in test.get("outcome", [])[-1:]:
            outcomes[outcome] = outcomes.get(outcome, 0) + 1
    loads = sum(len(test.get("loads", [])) for test in stock["tests"].values())
    engine, library = (sum(record["moved"].values()) for record in (ours, counted))
    # For each test, so that bytes that the engine maps beyond a slice do not hide a gap in another
    # test.
    both = sum(min(n, ours["moved"].get(test, 0)) for test, n in counted["moved"].items())
    share = both / library if library else 0.0
    tests = ", ".join(f"{n} {outcome}" for outcome, n in sorted(outcomes.items()))
    print(f"{name} {version(name)}: {tests}; {loads} loads compared, {len(different)} differences")
    print(
        f"  the engine moved {engine:,} bytes in {ours['loads']} loads; the library alone loads "
        f"{library:,}: {share:.0%}"
    )
    for reason, times in ours["fallbacks"].items():
        print(f"  fallback {times} times: {reason}")
    less = {test: n - ours["moved"].get(test, 0) for test, n in counted["moved"].items()}
    for test in sorted(less, key=lambda test: -less[test])[:5]:
        if less[test] > 0:
            print(f"  {less[test]:,} bytes by the library in {test}")
    for one in different[:20]:
        print(f"  {one[:1500]}")
    few = outcomes.get("passed", 0) < suite.least
    if few or share < suite.share:
        print(
            f"  expected are {suite.least} passed tests and a share of {suite.share:.0%} at least"
        )
    return not different and not few and share >= suite.share


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("suites", nargs="*", choices=[[], *SUITES], metavar="SUITE")
    names = parser.parse_args().suites or list(SUITES)
    if not (WORK / "needs").exists():
        pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", "install"]
        subprocess.run([*pip, "--no-deps", "-t", str(WORK / "needs"), *NEEDS], check=True)
    results = [judge(name, SUITES[name]) for name in names]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

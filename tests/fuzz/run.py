"""Builds libFuzzer's targets under ASan and UBSan and runs them, one after another.

A finding ends with a non-zero status and is left in build/fuzz/findings; what was reached stays in
build/fuzz/corpus and is where the next run goes on.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
BUILD = ROOT / "build" / "fuzz"
TARGETS = ("safetensors", "torch_pickle", "torch_zip", "dduf")
# csrc/format needs little memory; a violated bound shows as more.
_LIMITS = ["-max_len=4096", "-timeout=10", "-rss_limit_mb=2048", "-malloc_limit_mb=256"]


def compiler() -> str:
    for name in ("clang++-14", "clang++"):
        if found := shutil.which(name):
            return found
    sys.exit("no clang++: apt-get install clang-14 libclang-rt-14-dev")


def build() -> None:
    scripts = Path(sys.executable).parent  # of the virtual environment: cmake and ninja
    options = {
        "CMAKE_CXX_COMPILER": compiler(),
        "CMAKE_MAKE_PROGRAM": scripts / "ninja",
        "CMAKE_BUILD_TYPE": "RelWithDebInfo",
        "Python_EXECUTABLE": sys.executable,
        "WEIGHTLIFT_FUZZ": "ON",
        "WEIGHTLIFT_WERROR": "ON",
        "WEIGHTLIFT_PYTHON": "OFF",
        "WEIGHTLIFT_CUDA": "OFF",
    }
    defines = [f"-D{name}={value}" for name, value in options.items()]
    cmake = str(scripts / "cmake")
    subprocess.run([cmake, "-S", ROOT, "-B", BUILD, "-G", "Ninja", *defines], check=True)
    subprocess.run([cmake, "--build", BUILD, "--target", "fuzz"], check=True)


def fuzz(target: str, limit: list[str]) -> str:
    corpus = BUILD / "corpus" / target
    findings = BUILD / "findings" / target
    corpus.mkdir(parents=True, exist_ok=True)
    findings.mkdir(parents=True, exist_ok=True)
    program = BUILD / "tests" / "fuzz" / f"{target}_fuzz"
    options = ["-print_final_stats=1", "-print_funcs=0", f"-artifact_prefix={findings}/"]
    log = BUILD / f"{target}.log"
    start = time.monotonic()
    with log.open("w") as file:
        done = subprocess.run(
            [program, corpus, BUILD / "seeds" / target, *options, *_LIMITS, *limit],
            stderr=file,
            env=os.environ | {"ASAN_OPTIONS": "malloc_context_size=2"},
            check=False,
        )
    seconds = time.monotonic() - start
    said = log.read_text(errors="replace")
    if done.returncode != 0:
        print(said[-6000:])
        sys.exit(f"{target}: a finding; what shows it is in {findings}")
    runs = int(re.findall(r"stat::number_of_executed_units:\s*(\d+)", said)[-1])
    edges, features = re.findall(r"cov: (\d+) ft: (\d+)", said)[-1]
    files = len(list(corpus.iterdir()))
    return (
        f"{target}: {runs:,} executions in {seconds:.0f} s ({runs / seconds:,.0f}/s), "
        f"{edges} edges, {features} features, {files} files in the corpus, no finding"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=TARGETS, help=", ".join(TARGETS))
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=int, default=60, help="a target")
    length.add_argument("--runs", type=int, help="a target, instead")
    arguments = parser.parse_args()
    build()
    seeds = Path(__file__).with_name("seeds.py")
    subprocess.run([sys.executable, seeds, BUILD / "seeds"], check=True)
    limit = [f"-max_total_time={arguments.seconds}"]
    if arguments.runs:
        limit = [f"-runs={arguments.runs}"]
    for target in arguments.targets:
        print(fuzz(target, limit), flush=True)


if __name__ == "__main__":
    main()

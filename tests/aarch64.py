"""`make test-aarch64`: the native tests and the wheel on an emulated aarch64 (qemu-user).

The release's compiler compiles the tests. Their system, including the emulated Python, is Debian
arm64, unpacked into build/aarch64; nothing of it is installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "aarch64"
SYSROOT = WORK / "sysroot"
sys.path.insert(0, str(ROOT / "release"))

from toolchain import Toolchain  # noqa: E402

PACKAGES = (
    *("libc6", "libgcc-s1", "libstdc++6", "zlib1g", "libexpat1", "libffi8", "libbz2-1.0"),
    *("liblzma5", "libssl3", "libuuid1", "libpython3.11-minimal", "libpython3.11-stdlib"),
    "python3.11-minimal",
)
# An emulator cannot keep rates in real time. qemu's madvise(2) reports success for advice that it
# ignores: MADV_POPULATE_READ and _WRITE, MADV_NOHUGEPAGE, MADV_DONTFORK (linux-user/mmap.c,
# target_madvise). It has no cachestat(2), mbind(2) and get_mempolicy(2), it cannot execv(2) a
# program for aarch64, and a thread that was joined may still be in /proc/self/task. The counts of
# blocks are for tests that share one C++ library with the simulated driver; here each has its own.
LEFT_OUT = {
    "device_test": "Pinned.DyingInAChildLeavesWhatTheChildHasThere:"
    "Staging.SlotsAreOfTheDevicesNodeAndLentByIt",
    "engine_test": "LinkRate.*:LoadOutOfMemory.*:HostMemoryAllocate.OutOfMemory:"
    "LoadThroughHostPageTables.CopiesFromTheMappingInAnySchedule:"
    "LoadThroughHostPageTables.IsForDevicesThatSaySo:LoadAfterLostSlots.EndsWithItsDataOrSaysWhy",
    "io_test": "IoTest.PopulatingATruncatedFileIsAnErrorAndNoSignal:IoTest.MemoryIsPopulated:"
    "LeaseTest.AFileThatWasCutOffBeforeHasNothingToHold",
    "page_choice_test": "PageChoice.TheRestOfABlockGetsSmallPagesFromTheStart:"
    "PageChoice.ABlockWhosePagesBecomeDearIsSwitchedWhileItFills:"
    "PageChoice.MemoryThatTheMachineHasInPartCountsByItsAverage:"
    "PageChoice.WhatIsReallyTouchedHasARate",
}
TESTS = (
    *("convert_test", "kernel_test", "kernel_cuda_arm_test", "io_test", "format_test"),
    *("page_choice_test", "device_test", "engine_test", "simulated_driver_test"),
)


def run(*command: str | Path, **options: object) -> None:
    print("+", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, **options)  # type: ignore[call-overload]


def make_sysroot() -> None:
    if (SYSROOT / "usr" / "bin" / "python3.11").exists():
        return
    apt = WORK / "apt"
    for folder in ("lists/partial", "cache/archives/partial", "debs"):
        (apt / folder).mkdir(parents=True, exist_ok=True)
    (apt / "status").touch()
    options = [
        *("-o", "APT::Architecture=arm64", "-o", "APT::Architectures::=arm64"),
        *("-o", f"Dir::State::lists={apt / 'lists'}", "-o", f"Dir::State::status={apt / 'status'}"),
        *("-o", f"Dir::Cache={apt / 'cache'}", "-o", "Debug::NoLocking=1", "-qq"),
    ]
    run("apt-get", *options, "update")
    run("apt-get", *options, "download", *PACKAGES, cwd=apt / "debs")
    for package in sorted((apt / "debs").glob("*.deb")):
        run("dpkg-deb", "-x", package, SYSROOT)


def emulator() -> list[str]:
    program = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if program is None:
        sys.exit("no qemu-aarch64: apt-get install qemu-user")
    return [program, "-L", str(SYSROOT)]


def build_tests(tools: Path, targets: tuple[str, ...]) -> Path:
    zig = next((tools / "lib").glob("python*/site-packages/ziglang/zig"))
    toolchain = Toolchain(zig, "aarch64", ROOT / "build" / "release" / "aarch64" / "toolchain")
    toolchain.make()
    common = [f"-DCMAKE_TOOLCHAIN_FILE={toolchain.cmake_file}", "-G", "Ninja"]
    cmake = tools / "bin" / "cmake"
    environment = {**os.environ, "PATH": f"{tools / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    gtest = WORK / "gtest"
    if not (gtest / "lib" / "libgtest.a").exists():
        built = WORK / "gtest-build"
        run(cmake, "-S", "/usr/src/googletest", "-B", built, *common, "-DBUILD_GMOCK=OFF",
            "-DCMAKE_CXX_STANDARD=17", f"-DCMAKE_INSTALL_PREFIX={gtest}",
            "-DCMAKE_BUILD_TYPE=Release", env=environment)  # fmt: skip
        run(cmake, "--build", built, env=environment)
        run(cmake, "--install", built, env=environment)
    (cmake_folder,) = gtest.glob("lib/cmake/GTest")
    build = WORK / "build"
    python = tools.parent / "sdist" / "bin" / "python"  # has the headers that the build needs
    run(cmake, "-S", ROOT, "-B", build, *common, f"-DGTest_DIR={cmake_folder}",
        "-DCMAKE_BUILD_TYPE=Release", "-DWEIGHTLIFT_TESTING=ON", "-DWEIGHTLIFT_PYTHON=OFF",
        "-DWEIGHTLIFT_CUDA=OFF", "-DCMAKE_GTEST_DISCOVER_TESTS_DISCOVERY_MODE=PRE_TEST",
        f"-DPython_EXECUTABLE={python}", env=environment)  # fmt: skip
    run(cmake, "--build", build, "--target", *targets, env=environment)
    return build


def check_wheel(wheel: Path) -> None:
    """Checks an index, a plan and its errors, and the chosen casts, in the emulated Python."""
    place = WORK / "site"
    shutil.rmtree(place, ignore_errors=True)
    # safetensors is the only hard dependency that an import needs.
    run(sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "install", "--target",
        place, "--platform", "manylinux_2_28_aarch64", "--platform", "manylinux_2_17_aarch64",
        "--python-version", "3.11", "--only-binary", ":all:", "--no-deps", wheel,
        "safetensors")  # fmt: skip
    python = SYSROOT / "usr" / "bin" / "python3.11"
    environment = {"PYTHONPATH": str(place), "PATH": os.environ["PATH"]}
    check = ROOT / "tests" / "python" / "helpers" / "core_check.py"
    run(*emulator(), python, check, env=environment)
    code = "import sys; from weightlift import _native as n; sys.exit(n.machine()['isa'] != 'neon')"
    run(*emulator(), python, "-c", code, env=environment)


def passes(build: Path, name: str) -> bool:
    (program,) = build.glob(f"tests/**/{name}")
    left_out = f"--gtest_filter=-{LEFT_OUT[name]}" if name in LEFT_OUT else ""
    try:
        run(*emulator(), program, "--gtest_brief=1", *filter(None, [left_out]))
    except subprocess.CalledProcessError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=[*TESTS, "wheel"])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    arguments = parser.parse_args()
    wanted = arguments.only or [*TESTS, "wheel"]
    WORK.mkdir(parents=True, exist_ok=True)
    make_sysroot()
    if "wheel" in wanted:
        wheels = list(arguments.dist.resolve().glob("*-cp311-*_aarch64.whl"))
        if len(wheels) != 1:
            sys.exit(f"no wheel of Python 3.11 for aarch64 in {arguments.dist}: make release")
        check_wheel(wheels[0])
    tests = tuple(name for name in TESTS if name in wanted)
    if tests:
        build = build_tests(ROOT / "build" / "release" / "tools", tests)
        if failed := [name for name in tests if not passes(build, name)]:
            sys.exit(f"aarch64: failed {' '.join(failed)}")
    print("aarch64: passed", *wanted)


if __name__ == "__main__":
    main()

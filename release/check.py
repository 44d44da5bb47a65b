"""`make release-check`: installs the wheels of dist/ as a user would, and uses them.

For each available Python, checks what works without torch in a clean environment with only the
wheel and without a compiler. Then, with torch, runs README's example, `weightlift doctor` and a
load by each backend. On one Python, does this also with the oldest libraries that the documentation
names, and again as a user other than root, on a read-only root with a /dev/shm of 1 MiB. On that
Python the sdist is installed too, with a compiler but without nvcc.

torch is the pinned version: its CPU build if an index has one for the Python, else its CUDA build
(a download of 3 GB; 7 GB on the disk during the check), unless ``--cpu-torch`` forbids it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from build import OPTIONAL_PYTHONS, PYTHONS, ROOT, find_python

WORK = ROOT / "build" / "release-check"
TORCH = "torch==2.13.0"  # the version in constraints.txt
MAIN_PYTHON = "3.11"  # all checks run on this one
# Locks of tests/matrix, and the libraries that load. The oldest diffusers needs a newer safetensors
# than the oldest one.
ALL = ("transformers", "diffusers", "accelerate", "safetensors")
SETS = {
    "oldest": ("transformers", "accelerate", "safetensors"),
    "oldest-diffusers": ALL,
    "newest": ALL,
}
SET_OF = {"3.10": "oldest-diffusers"}  # the newest libraries need Python 3.11


SMOKE = ROOT / "release" / "smoke.py"
CORE_CHECK = ROOT / "tests" / "python" / "helpers" / "core_check.py"
BINARY = ("--only-binary", ":all:")  # so that nothing is compiled


def say(text: str) -> None:
    print(text, flush=True)


class Failure(Exception):
    """A command failed that should succeed, or the reverse."""


def run(
    *command: str | Path, fails: bool = False, compiler: bool = False, **environment: str
) -> str:
    hidden = {"PYTHONPATH", "PYTHONHOME", "WEIGHTLIFT_ENABLE", "VIRTUAL_ENV"}
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    none = {} if compiler else {"CC": "/bin/false", "CXX": "/bin/false"}
    done = subprocess.run(
        [str(word) for word in command], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False, cwd="/", timeout=3600,
        env={**inherited, **none, "HF_HUB_OFFLINE": "1", **environment},
    )  # fmt: skip
    if (done.returncode != 0) != fails:
        raise Failure(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}")
    return done.stdout


def make_environment(folder: Path, python: Path) -> list[str | Path]:
    """Makes a clean environment. Returns the command that installs into it."""
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder)
    return [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "-q", "install"]


def check_alone(version: str, python: Path, wheel: Path) -> None:
    """Checks the wheel with only its hard dependencies."""
    place = WORK / f"alone-{version}"
    run(*make_environment(place, python), *BINARY, wheel)
    said = run(place / "bin" / "python", CORE_CHECK)
    if str(WORK) not in said:
        raise Failure(f"another weightlift was imported: {said}")
    weightlift = place / "bin" / "weightlift"
    said = run(weightlift, "doctor", fails=True)
    if "is not installed: pip install 'weightlift[cli]'" not in said:
        raise Failure(f"doctor without the extra does not name it: {said}")
    script = WORK / "hello.py"
    script.write_text("import sys; print('hello', sys.argv[1:])\n")
    if "hello ['-x']" not in run(weightlift, script, "-x"):
        raise Failure("weightlift SCRIPT needs more than the wheel")
    say(f"python {version}: {wheel.name} works alone; a missing extra is named")


def check_sdist(version: str, python: Path, sdist: Path) -> None:
    """Builds the sdist with its build requirements and the system's compiler, without nvcc."""
    place = WORK / "sdist"
    install = make_environment(place, python)
    # find_program does not search if the variable is set, even if it is empty.
    run(*install, "-Ccmake.define.WEIGHTLIFT_NVCC=", sdist, compiler=True)
    said = run(place / "bin" / "python", CORE_CHECK)
    code = "from weightlift import _native; print(_native.machine()['kernels'])"
    if (kernels := run(place / "bin" / "python", "-c", code).strip()) != "[]":
        raise Failure(f"built without nvcc, and has kernels: {kernels}")
    say(f"python {version}: {sdist.name} builds without nvcc and works: {said.split()[0]}")


def cpu_torch_is_there(install: list[str | Path]) -> bool:
    """Whether an index has the CPU build (a local version) for this Python."""
    command = [*install, *BINARY, "--dry-run", "--no-deps", f"{TORCH}+cpu"]
    done = subprocess.run([str(word) for word in command], capture_output=True, check=False)
    return done.returncode == 0


def check_libraries(version: str, name: str, python: Path, wheel: Path, cpu_only: bool) -> bool:
    """Checks with the libraries of one lock of tests/matrix. Returns False without torch."""
    place = WORK / f"{name}-{version}"
    install = make_environment(place, python)
    cpu = cpu_torch_is_there(install)
    if cpu_only and not cpu:
        say(f"python {version}: NOT CHECKED with torch, of which no index has a CPU build")
        return False
    constraints = ("-c", ROOT / "constraints.txt")
    torch = f"{TORCH}+cpu" if cpu else TORCH
    run(*install, *BINARY, torch, "numpy", f"{wheel}[cli,accelerate]", *constraints)
    # Installed without the constraints, which are the newest versions.
    lock = ROOT / "tests" / "matrix" / f"{name}.txt"
    run(*install, *BINARY, "-r", lock, torch)
    bin_folder = place / "bin"
    listed = run(bin_folder / "python", "-m", "pip", "list", "--format=freeze").splitlines()
    shown = (*SETS[name], "huggingface", "torch=")
    say(f"python {version}: " + ", ".join(line for line in listed if line.startswith(shown)))
    models = WORK / f"{name}-models"
    shutil.rmtree(models, ignore_errors=True)
    run(bin_folder / "python", SMOKE, "prepare", models, *SETS[name])
    run(bin_folder / "python", SMOKE, "load", models, *SETS[name])
    doctor = run(bin_folder / "weightlift", "doctor")
    if "2.13.0" not in doctor:
        raise Failure(f"doctor does not find torch: {doctor}")
    say(f"python {version}, {name}: README's example, doctor, loads by {', '.join(SETS[name])}")
    return True


# Like a container in a cluster: only a 16 MiB /tmp and a 1 MiB /dev/shm can be written. If the
# interpreter lies in a home folder that is closed to others, only the interpreter is visible there.
# A repository in /tmp stays visible.
_TIGHT = """
mount --make-rprivate /
mount -t tmpfs -o size=1m,mode=1777 tmpfs /dev/shm
mkdir /dev/shm/root
mount --bind "$ROOT" /dev/shm/root
mount -t tmpfs -o size=16m,mode=1777 tmpfs /tmp
if [ ! -d "$ROOT" ]; then
  mkdir -p "$ROOT"
  mount --bind /dev/shm/root "$ROOT"
  mount -o remount,bind,ro "$ROOT"
fi
umount /dev/shm/root
rmdir /dev/shm/root
if [ -n "$CLOSED" ]; then
  mkdir /tmp/prefix
  mount --bind "$PREFIX" /tmp/prefix
  mount -t tmpfs -o mode=755 tmpfs "$CLOSED"
  mkdir -p "$PREFIX"
  mount --bind /tmp/prefix "$PREFIX"
  mount -o remount,bind,ro "$PREFIX"
  mount -o remount,ro "$CLOSED"
fi
mount -o remount,bind,ro /
cd /
exec setpriv --reuid=65534 --regid=65534 --clear-groups --no-new-privs --inh-caps=-all "$@"
"""
_NOTHING_TO_WRITE = """
import os, pathlib
assert os.getuid() == 65534, os.getuid()
assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 1 << 20
for place in ("/x", os.path.join(os.environ["MODELS"], "x")):
    try:
        pathlib.Path(place).touch()
    except OSError:
        continue
    raise SystemExit(f"{place} can be written")
"""


def check_tight(version: str, name: str) -> None:
    """Runs the checks as a user other than root, on a read-only root, with a small /dev/shm."""
    if os.geteuid() != 0:
        raise Failure("the check of a read-only root needs root: sudo make release-check")
    python = WORK / f"{name}-{version}" / "bin" / "python"
    prefix = Path(run(python, "-c", "import sys; print(sys.base_prefix)").strip())
    closed = [parent for parent in reversed(prefix.parents) if not parent.stat().st_mode & 0o001]
    models = WORK / f"{name}-models"
    environment = {
        "HOME": "/nonexistent",
        "MODELS": str(models),
        "ROOT": str(ROOT),
        "PREFIX": str(prefix),
        "CLOSED": str(closed[0]) if closed else "",
    }
    inside = ("unshare", "--mount", "sh", "-euc", _TIGHT, "sh")
    run(*inside, python, "-B", "-c", _NOTHING_TO_WRITE, **environment)
    run(*inside, python, "-B", SMOKE, "load", models, *SETS[name], **environment)
    what = "the same as user 65534, on a read-only root, with a /dev/shm of 1 MiB"
    say(f"python {version}, {name}: {what}")


def check_python(version: str, arguments: argparse.Namespace) -> None:
    tag = "cp" + version.replace(".", "")
    python = find_python(version)
    dist: Path = arguments.dist.resolve()
    wheels = list(dist.glob(f"*-{tag}-{tag}-*_{platform.machine()}.whl"))
    if version in OPTIONAL_PYTHONS and (python is None or not wheels):
        say(f"python {version}: not on this machine")
        return
    if python is None or len(wheels) != 1:
        raise Failure(f"python {version}: no interpreter, or no wheel: make release")
    check_alone(version, python, wheels[0])
    if version == MAIN_PYTHON:
        (sdist,) = dist.glob("*.tar.gz")
        check_sdist(version, python, sdist)
    for name in SETS if version == MAIN_PYTHON else (SET_OF.get(version, "newest"),):
        done = check_libraries(version, name, python, wheels[0], arguments.cpu_torch)
        if done and version == MAIN_PYTHON:
            check_tight(version, name)
        shutil.rmtree(WORK / f"{name}-{version}")


def passes(version: str, arguments: argparse.Namespace) -> bool:
    try:
        check_python(version, arguments)
    except (Failure, subprocess.TimeoutExpired) as failure:
        say(f"FAILED: {failure}")
        return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("--python", action="append", choices=[*PYTHONS, *OPTIONAL_PYTHONS])
    parser.add_argument("--cpu-torch", action="store_true", help="never torch's CUDA build")
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    versions = arguments.python or (*PYTHONS, *OPTIONAL_PYTHONS)
    if failed := [version for version in versions if not passes(version, arguments)]:
        say(f"release-check: FAILED on {', '.join(failed)}")
        return 1
    say("release-check: every wheel for this machine works")
    return 0


if __name__ == "__main__":
    sys.exit(main())

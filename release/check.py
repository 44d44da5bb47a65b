"""`make release-check`: the wheels of dist/, installed as a user would and used.

For each Python at hand: a clean environment from the wheel alone, no compiler, what works without
torch. Where the pinned torch can be had: README's example, `weightlift doctor` and a load by each
backend, with the oldest and the newest libraries that the documentation names; then the same as a
user who is not root, on a read-only root with a /dev/shm of 1 MiB.
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
TORCH_PYTHON = "3.11"  # of the pinned build that constraints.txt names
# tests/matrix has what "oldest" means; diffusers' oldest wants a newer safetensors.
SETS = {"oldest": "oldest-diffusers", "newest": "newest"}


def say(text: str) -> None:
    print(text, flush=True)


class Failure(Exception):
    """A command that should succeed did not, or the other way round."""


def run(*command: str | Path, fails: bool = False, **environment: str) -> str:
    hidden = {"PYTHONPATH", "PYTHONHOME", "WEIGHTLIFT_ENABLE", "VIRTUAL_ENV"}
    inherited = {name: value for name, value in os.environ.items() if name not in hidden}
    quiet = {"CC": "/bin/false", "CXX": "/bin/false", "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        [str(word) for word in command], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False, cwd="/", env={**inherited, **quiet}, timeout=900,
    )  # fmt: skip
    if (done.returncode != 0) != fails:
        raise Failure(f"{' '.join(map(str, command))}: status {done.returncode}\n{done.stdout}")
    return done.stdout


def clean_environment(folder: Path, python: Path, *packages: str | Path) -> Path:
    """Its bin folder. Binary packages alone: nothing is compiled."""
    shutil.rmtree(folder, ignore_errors=True)
    run(python, "-m", "venv", folder)
    pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "-q"]
    run(*pip, "install", "--only-binary", ":all:", *packages)
    return folder / "bin"


def check_alone(version: str, python: Path, wheel: Path) -> None:
    """The wheel and its hard dependencies, nothing else."""
    place = clean_environment(WORK / f"alone-{version}", python, wheel)
    said = run(place / "python", ROOT / "tests" / "python" / "helpers" / "core_check.py")
    if str(WORK) not in said:
        raise Failure(f"another weightlift was imported: {said}")
    said = run(place / "weightlift", "doctor", fails=True)
    if "is not installed: pip install 'weightlift[cli]'" not in said:
        raise Failure(f"doctor without the extra does not name it: {said}")
    script = WORK / "hello.py"
    script.write_text("import sys; print('hello', sys.argv[1:])\n")
    if "hello ['-x']" not in run(place / "weightlift", script, "-x"):
        raise Failure("weightlift SCRIPT needs more than the wheel")
    say(f"python {version}: {wheel.name} works alone; a missing extra is named")


def check_libraries(name: str, python: Path, wheel: Path) -> Path:
    """With the libraries of one lock of tests/matrix; the environment's bin folder."""
    lock = ROOT / "tests" / "matrix" / f"{SETS[name]}.txt"
    place = clean_environment(
        WORK / name, python, f"{wheel}[cli,accelerate]", "-c", ROOT / "constraints.txt",
        "torch", "numpy",
    )  # fmt: skip
    # Apart from the constraints, which are the newest.
    pip = [place / "python", "-m", "pip", "--disable-pip-version-check", "-q"]
    run(*pip, "install", "--only-binary", ":all:", "-r", lock, "torch==2.13.0")
    versions = run(*pip[:-1], "list", "--format=freeze").splitlines()
    wanted = ("transformers", "diffusers", "accelerate", "safetensors", "huggingface", "torch=")
    say(f"{name}: " + ", ".join(line for line in versions if line.startswith(wanted)))
    folder = WORK / f"{name}-models"
    shutil.rmtree(folder, ignore_errors=True)
    smoke = ROOT / "release" / "smoke.py"
    run(place / "python", smoke, "prepare", folder)
    run(place / "python", smoke, "load", folder)
    doctor = run(place / "weightlift", "doctor")
    if "torch" not in doctor:
        raise Failure(f"doctor does not find torch: {doctor}")
    say(f"{name}: README's example, doctor, a load by each backend")
    return place


# What a container in a cluster gives: nothing can be written but a small /tmp and a tiny /dev/shm.
# Where the interpreter lies in a home folder that is closed to others, it alone is shown there.
_TIGHT = """
mount --make-rprivate /
mount -t tmpfs -o size=16m,mode=1777 tmpfs /tmp
mount -t tmpfs -o size=1m,mode=1777 tmpfs /dev/shm
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


def check_tight(name: str, place: Path) -> None:
    """As another user than root, on a read-only root, with a small /dev/shm."""
    if os.geteuid() != 0:
        raise Failure("the check of a read-only root needs root: sudo make release-check")
    python = place / "python"
    prefix = Path(run(python, "-c", "import sys; print(sys.base_prefix)").strip())
    closed = [parent for parent in reversed(prefix.parents) if not parent.stat().st_mode & 0o001]
    models = WORK / f"{name}-models"
    environment = {
        "HOME": "/nonexistent",
        "MODELS": str(models),
        "PREFIX": str(prefix),
        "CLOSED": str(closed[0]) if closed else "",
    }
    inside = ("unshare", "--mount", "sh", "-euc", _TIGHT, "sh")
    run(*inside, python, "-B", "-c", _NOTHING_TO_WRITE, **environment)
    run(*inside, python, "-B", ROOT / "release" / "smoke.py", "load", models, **environment)
    say(f"{name}: the same as user 65534, on a read-only root, with a /dev/shm of 1 MiB")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dist", type=Path, default=ROOT / "dist")
    parser.add_argument("--python", action="append", choices=[*PYTHONS, *OPTIONAL_PYTHONS])
    arguments = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    failed = 0
    for version in arguments.python or (*PYTHONS, *OPTIONAL_PYTHONS):
        tag = "cp" + version.replace(".", "")
        python = find_python(version)
        wheels = list(arguments.dist.resolve().glob(f"*-{tag}-{tag}-*_{platform.machine()}.whl"))
        if version in OPTIONAL_PYTHONS and (python is None or not wheels):
            say(f"python {version}: not on this machine")
            continue
        try:
            if python is None or len(wheels) != 1:
                raise Failure(f"python {version}: no interpreter, or no wheel: make release")
            check_alone(version, python, wheels[0])
            if version == TORCH_PYTHON:
                for name in SETS:
                    check_tight(name, check_libraries(name, python, wheels[0]))
        except (Failure, subprocess.TimeoutExpired) as failure:
            failed = 1
            say(f"FAILED: {failure}")
    say("release-check: FAILED" if failed else "release-check: every wheel for this machine works")
    return failed


if __name__ == "__main__":
    sys.exit(main())

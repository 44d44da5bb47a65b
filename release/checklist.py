"""The release checklist, which must pass before an upload: `make release-checklist`.

Each step is a command or a comparison, and the first failure ends the run. The steps that are left
for a person are printed at the end.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from build import ROOT


def fail(text: str) -> NoReturn:
    sys.exit(f"FAILED: {text}")


def output(*command: str) -> str:
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout


def version() -> str:
    text = (ROOT / "python" / "weightlift" / "core" / "version.py").read_text()
    found = re.search(r'__version__ = "([^"]+)"', text)
    if found is None:
        fail("core/version.py has no __version__")
    return found[1]


def tree_is_clean() -> None:
    if changed := output("git", "status", "--porcelain"):
        fail(f"commit or remove these first:\n{changed}")


def tag_is_free() -> None:
    if output("git", "tag", "--list", f"v{version()}"):
        fail(f"v{version()} is tagged: set the next version in core/version.py")


def versions_agree() -> None:
    number = re.escape(version())
    if not re.search(rf"^version: {number}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE):
        fail(f"CITATION.cff does not say {version()}")
    changelog = (ROOT / "CHANGELOG.md").read_text()
    if not re.search(rf"^## {number} - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        fail(f"CHANGELOG.md has no heading '## {version()} - DATE'")


def readme_is_short() -> None:
    words = len((ROOT / "README.md").read_text().split())
    if words > 900:
        fail(f"README.md has {words} words; at most 900 are allowed")


def make(target: str) -> Callable[[], None]:
    def step() -> None:
        if subprocess.run(["make", target], cwd=ROOT, check=False).returncode != 0:
            fail(f"make {target}")

    step.__name__ = f"make_{target.replace('-', '_')}"
    return step


def bytes_repeat() -> None:
    """Builds the commit again in a clone in another folder, and compares all bytes."""
    with tempfile.TemporaryDirectory(prefix="weightlift-again-") as folder:
        output("git", "clone", "--quiet", "--no-hardlinks", str(ROOT), folder)
        again = subprocess.run([sys.executable, "release/build.py"], cwd=folder, check=False)
        if again.returncode != 0:
            fail("a second build")
        if different := differing(ROOT / "dist", Path(folder) / "dist"):
            fail(f"a second build gives other bytes: {different}")


def differing(first: Path, second: Path) -> list[str]:
    names = {path.name for folder in (first, second) for path in folder.iterdir()}
    return sorted(
        name
        for name in names
        if not (first / name).exists()
        or not (second / name).exists()
        or (first / name).read_bytes() != (second / name).read_bytes()
    )


STEPS = (
    tree_is_clean,
    tag_is_free,
    versions_agree,
    readme_is_short,
    make("test"),
    make("demo"),
    make("docs"),
    make("docs-check"),
    make("release"),
    bytes_repeat,
    make("release-check"),
    make("test-aarch64"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the steps and end")
    parser.add_argument("--first", type=int, default=1, help="go on with this step", metavar="N")
    arguments = parser.parse_args()
    for number, step in enumerate(STEPS, 1):
        if number >= arguments.first:
            print(f"{number:2}/{len(STEPS)}  {step.__name__.replace('_', ' ')}", flush=True)
            if not arguments.list:
                step()
    print(
        f"""Left for a person:
  make gpu-check on a machine with an NVIDIA GPU
  git tag -s v{version()} && git push origin v{version()}
  twine upload dist/*.whl dist/*.tar.gz
  attach dist/SHA256SUMS and dist/weightlift.cdx.json to the release"""
    )


if __name__ == "__main__":
    main()

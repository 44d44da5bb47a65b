"""`make release`: the sdist, a wheel for each Python and architecture, their SBOM and checksums.

Everything is built from HEAD in a separate folder, with compilers and tools from the package index,
whose hashes are in builder.txt and tools.txt. A commit always gives the same bytes: times in the
archives are the commit's, and no file contains a path of the build.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sbom import make_sbom, pinned_versions
from toolchain import GLIBC, Toolchain

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "release"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
OPTIONAL_PYTHONS = ("3.14",)  # if there is an interpreter
MACHINES = ("x86_64", "aarch64")
MOST_BYTES = 3_000_000  # for a wheel
LOCKS = ROOT / "release"


def run(*command: str | Path, **options: Any) -> str:
    """The command's output; if it fails, the output is shown."""
    done = subprocess.run(
        [str(word) for word in command], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, check=False, **options,
    )  # fmt: skip
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def find_python(version: str) -> Path | None:
    """An interpreter of this version that runs. pyenv also has commands for versions that do not
    run."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    candidates = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        command = [str(candidate), "-c", "import sysconfig; print(sysconfig.get_path('include'))"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0 and Path(done.stdout.strip(), "Python.h").exists():
            return Path(candidate)
    return None


def make_environment(folder: Path, python: Path, lock: Path) -> Path:
    """The Python of a virtual environment with the lock's packages, made again when these
    change."""
    stamp = folder / ".installed"
    content = f"{python}\n{lock.read_text()}"
    if not stamp.exists() or stamp.read_text() != content:
        shutil.rmtree(folder, ignore_errors=True)
        run(python, "-m", "venv", folder)
        pip = [folder / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "-q"]
        run(*pip, "install", "--require-hashes", "--only-binary", ":all:", "-r", lock)
        stamp.write_text(content)
    return folder / "bin" / "python"


def find_packages(python: Path) -> Path:
    """The folder of the environment's packages."""
    return Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


class Release:
    """Builds the files of one commit's release."""

    def __init__(self, out: Path, jobs: str) -> None:
        self.out = out
        self.tools = make_environment(WORK / "tools", Path(sys.executable), LOCKS / "tools.txt")
        self.site = find_packages(self.tools)
        self.builder = make_environment(WORK / "sdist", Path(sys.executable), LOCKS / "builder.txt")
        self.source = WORK / "source"
        self.version = ""  # set by make_sdist
        self.commit = run("git", "rev-parse", "HEAD", cwd=ROOT).strip()
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.endswith("FLAGS")},
            "SOURCE_DATE_EPOCH": run("git", "log", "-1", "--format=%ct", cwd=ROOT).strip(),
            "PATH": f"{self.tools.parent}{os.pathsep}{os.environ['PATH']}",
            "CMAKE_BUILD_PARALLEL_LEVEL": jobs,
            "PYTHONHASHSEED": "0",
            "TZ": "UTC",
            "LC_ALL": "C.UTF-8",
        }
        os.umask(0o022)

    def make_sdist(self) -> None:
        """Makes the sdist from the commit. The wheels are built from its content."""
        tree = WORK / "tree"
        shutil.rmtree(tree, ignore_errors=True)
        tree.mkdir(parents=True)
        archive = WORK / "tree.tar"
        run("git", "archive", "--format=tar", "-o", archive, "HEAD", cwd=ROOT)
        with tarfile.open(archive) as file:
            file.extractall(tree, filter="data")
        run(
            self.builder, "-m", "build", "--sdist", "--no-isolation", "--outdir", self.out, ".",
            cwd=tree, env=self.environment,
        )  # fmt: skip
        (sdist,) = self.out.glob("*.tar.gz")
        shutil.rmtree(self.source, ignore_errors=True)
        with tarfile.open(sdist) as file:
            file.extractall(WORK, filter="data")
        folder = sdist.name.removesuffix(".tar.gz")
        (WORK / folder).rename(self.source)
        self.version = folder.removeprefix("weightlift-")

    def make_kernels(self) -> None:
        """Makes the CUDA images for drivers of the 12 and 13 series, once for all wheels."""
        text = (self.source / "CMakeLists.txt").read_text()
        found = re.search(r'WEIGHTLIFT_KERNEL_ARCHITECTURES "([\d;]+)"', text)
        if found is None:
            sys.exit("CMakeLists.txt names no WEIGHTLIFT_KERNEL_ARCHITECTURES")
        folder = WORK / "kernels"
        cuda = self.site / "nvidia" / "cu13" / "bin" / "nvcc"
        run(
            self.tools, "cmake/build_kernels.py", "--nvcc", cuda, "--ptxas",
            self.site / "nvidia" / "cuda_nvcc" / "bin" / "ptxas", "--all", "--include", "csrc",
            "--out", folder, "csrc/convert/scatter.cu", *found[1].split(";"),
            cwd=self.source, env=self.environment,
        )  # fmt: skip

    def make_wheel(self, version: str, python: Path, toolchain: Toolchain) -> Path:
        tag = "cp" + version.replace(".", "")
        builder = make_environment(WORK / tag, python, LOCKS / "builder.txt")
        machine = toolchain.machine
        build = WORK / machine / "build"
        # CMake's findings are for one Python. The engine's objects are used for the next one too,
        # which needs that nothing they are compiled with lies in that Python's environment.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        defines = {
            "CMAKE_TOOLCHAIN_FILE": toolchain.cmake_file,
            "CMAKE_CXX_FLAGS": f"-ffile-prefix-map={WORK}=. -ffunction-sections -fdata-sections",
            "WEIGHTLIFT_JSON_INCLUDE": find_packages(self.builder) / "nlohmann_json" / "include",
            "WEIGHTLIFT_CUDA_INCLUDE": self.site / "nvidia" / "cu13" / "include",
            "CMAKE_MODULE_LINKER_FLAGS": "-Wl,--gc-sections -Wl,-s",
            "CMAKE_INTERPROCEDURAL_OPTIMIZATION": "OFF",
            "WEIGHTLIFT_CUDA": "ON",
            "WEIGHTLIFT_KERNEL_IMAGES": WORK / "kernels",
            "WEIGHTLIFT_MODULE_SUFFIX": f".cpython-{tag[2:]}-{machine}-linux-gnu.so",
        }
        made = WORK / "wheels"
        shutil.rmtree(made, ignore_errors=True)
        run(
            builder, "-m", "build", "--wheel", "--no-isolation", "--outdir", made,
            f"-Cbuild-dir={build}",
            *(f"-Ccmake.define.{name}={value}" for name, value in defines.items()), ".",
            cwd=self.source, env={**self.environment, "_PYTHON_HOST_PLATFORM": f"linux-{machine}"},
        )  # fmt: skip
        # The tag is allowed by the linked libraries; auditwheel checks it below.
        platform = f"manylinux_{GLIBC.replace('.', '_')}_{machine}"
        run(
            self.tools, "-m", "wheel", "tags", "--remove", "--platform-tag", platform,
            *made.glob("*.whl"), env=self.environment,
        )  # fmt: skip
        (wheel,) = made.glob(f"weightlift-*-{tag}-{tag}-{platform}.whl")
        return Path(shutil.move(wheel, self.out / wheel.name))

    def check_wheel(self, wheel: Path) -> None:
        """Checks the wheel's size, tag, exports and needed libraries."""
        size = wheel.stat().st_size
        if size > MOST_BYTES:
            sys.exit(f"{wheel.name} has {size:,} bytes; at most {MOST_BYTES:,} are allowed")
        said = " ".join(run(self.tools, "-m", "auditwheel", "show", wheel).split())
        machine = wheel.stem.partition("manylinux_2_28_")[2]
        if f'platform tag: "manylinux_2_28_{machine}"' not in said and (
            f"manylinux_2_28_{machine}" not in said.partition("following platform tag")[2]
        ):
            sys.exit(f"auditwheel says of {wheel.name}: {said}")
        with zipfile.ZipFile(wheel) as archive:
            check_contents(archive, wheel, self.source)
            (name,) = [name for name in archive.namelist() if name.endswith(".so")]
            module = Path(archive.extract(name, WORK / "module"))
        check_module(self.tools, module)
        print(f"{size:9,}  {wheel.name}", flush=True)

    def write_lists(self) -> None:
        files = sorted(path for path in self.out.iterdir() if path.suffix in (".whl", ".gz"))
        run(self.tools, "-m", "twine", "check", "--strict", *files)
        made = datetime.fromtimestamp(int(self.environment["SOURCE_DATE_EPOCH"]), timezone.utc)
        texts = [(LOCKS / name).read_text() for name in ("builder.txt", "tools.txt")]
        hashes = {path.name: sha256(path) for path in files}
        sbom = self.out / "weightlift.cdx.json"
        content = make_sbom(self.version, self.commit, made, hashes, pinned_versions(texts))
        sbom.write_text(json.dumps(content, indent=2) + "\n")
        lines = [f"{sha256(path)}  {path.name}\n" for path in [*files, sbom]]
        (self.out / "SHA256SUMS").write_text("".join(lines))


def check_contents(archive: zipfile.ZipFile, wheel: Path, source: Path) -> None:
    """Checks the content: the sdist's package, one module for this Python, and their metadata."""
    name, version, tag, *_ = wheel.name.split("-")
    info = f"{name}-{version}.dist-info"
    package = source / "python"
    expected = {
        *(str(path.relative_to(package)) for path in package.rglob("*") if path.is_file()),
        f"weightlift/_native.cpython-{tag[2:]}-{wheel.stem.partition('2_28_')[2]}-linux-gnu.so",
        *(f"{info}/{file}" for file in ("METADATA", "WHEEL", "RECORD", "entry_points.txt")),
        f"{info}/licenses/LICENSE",
        *(f"{info}/licenses/licenses/{path.name}" for path in (source / "licenses").iterdir()),
    }
    if different := sorted(expected ^ set(archive.namelist())):
        sys.exit(f"{wheel.name}: missing, or not meant to be in it: {different}")
    # RECORD must have the right hashes and sizes for all files except itself.
    listed = {
        row[0]: row[1:] for row in csv.reader(archive.read(f"{info}/RECORD").decode().split())
    }
    for file in expected - {f"{info}/RECORD"}:
        data = archive.read(file)
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        if listed.get(file) != [f"sha256={digest}", str(len(data))]:
            sys.exit(f"{wheel.name}: RECORD says of {file}: {listed.get(file)}")


def check_module(tools: Path, module: Path) -> None:
    """Checks that the module is stripped, exports one name, and needs only libraries and symbols
    that all systems have."""
    code = """
import sys
from elftools.elf.elffile import ELFFile
with open(sys.argv[1], "rb") as file:
    elf = ELFFile(file)
    symbols = list(elf.get_section_by_name(".dynsym").iter_symbols())
    print(*sorted(s.name for s in symbols if s["st_shndx"] != "SHN_UNDEF" and s.name))
    versions = elf.get_section_by_name(".gnu.version")
    print(*(s.name for i, s in enumerate(symbols) if s["st_shndx"] == "SHN_UNDEF" and s.name
            and s["st_info"]["bind"] == "STB_GLOBAL" and not s.name.startswith(("Py", "_Py"))
            and versions.get_symbol(i)["ndx"] in ("VER_NDX_LOCAL", "VER_NDX_GLOBAL")))
    dynamic = elf.get_section_by_name(".dynamic")
    print(*sorted(tag.needed for tag in dynamic.iter_tags("DT_NEEDED")))
    print(*(s.name for s in elf.iter_sections() if s.name in (".symtab", ".debug_info")))
    print(*(tag.entry.d_tag for tag in dynamic.iter_tags() if "PATH" in str(tag.entry.d_tag)))
"""
    exported, missing, needed, debug, paths = run(tools, "-c", code, module).split("\n")[:5]
    allowed = {"libc.so.6", "libpthread.so.0", "libdl.so.2", "libm.so.6", "librt.so.1"}
    allowed |= {"libgcc_s.so.1", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
    if exported != "PyInit__native":
        sys.exit(f"{module} exports {exported}; only PyInit__native may be exported")
    if missing:  # a shared library links with names that no library has, without their version
        sys.exit(f"{module} needs {missing}, which the C library of the wheel's tag does not have")
    if unknown := set(needed.split()) - allowed:
        sys.exit(f"{module} needs {unknown}")
    if debug or paths:
        sys.exit(f"{module} is not stripped or has search paths: {debug} {paths}")
    data = module.read_bytes()
    if told := [place for place in (ROOT, Path.home()) if f"{place}/".encode() in data]:
        sys.exit(f"{module} contains paths of the build: {told}")


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    parser.add_argument("--jobs", default=str(os.cpu_count()))
    parser.add_argument("--python", action="append", choices=[*PYTHONS, *OPTIONAL_PYTHONS])
    parser.add_argument("--machine", action="append", choices=MACHINES)
    arguments = parser.parse_args()
    if changed := run("git", "status", "--porcelain", "--untracked-files=no", cwd=ROOT):
        print(f"HEAD is released, without these changes:\n{changed}", file=sys.stderr)
    pythons = {}
    for version in arguments.python or (*PYTHONS, *OPTIONAL_PYTHONS):
        found = find_python(version)
        if found is not None:
            pythons[version] = found
        elif version not in OPTIONAL_PYTHONS:
            sys.exit(f"no python{version} with its headers: pyenv install {version}")
    out: Path = arguments.out.resolve()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)

    release = Release(out, arguments.jobs)
    release.make_sdist()
    release.make_kernels()
    for machine in arguments.machine or MACHINES:
        zig = release.site / "ziglang" / "zig"
        toolchain = Toolchain(zig, machine, WORK / machine / "toolchain")
        toolchain.make()
        # Sources have the commit's time, so ninja would keep the objects of another commit.
        shutil.rmtree(WORK / machine / "build", ignore_errors=True)
        for version, python in pythons.items():
            release.check_wheel(release.make_wheel(version, python, toolchain))
    release.write_lists()
    print((out / "SHA256SUMS").read_text(), end="")


if __name__ == "__main__":
    main()

"""Compiles the CUDA kernel into the images that a build embeds; csrc/convert calls it.

nvcc compiles it once, to PTX for the oldest architecture. ptxas assembles machine code from it for
each architecture, and the PTX is embedded too, for devices of other architectures.

A driver of the CUDA 12 series loads neither machine code from the ptxas of CUDA 13 (another ABI)
nor PTX with a version of CUDA 13. So ``--ptxas`` may name the ptxas of 12.9 (PyPI's
nvidia-cuda-nvcc-cu12); nvcc's own then assembles only for the architectures that 12.9 does not
know. The PTX's version is set to ISA 8.0, that of CUDA 12.0; ptxas refuses instructions that are
newer than the stated version.

Each image is embedded unchanged (cuModuleLoadData accepts an ELF file or PTX). A fat binary would
be compressed in a format that older drivers cannot read.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

PTX_VERSION = "8.0"
_ELF_ABI_VERSION = 8  # e_ident[EI_ABIVERSION]
_UNKNOWN = re.compile(r"not defined for option 'gpu-name'|Unsupported gpu architecture")


@dataclass(frozen=True)
class Image:
    """Machine code for one architecture."""

    architecture: int
    path: Path
    maker: str
    usage: str  # registers and spills

    @property
    def abi(self) -> int:
        return self.path.read_bytes()[_ELF_ABI_VERSION]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, text=True, capture_output=True, check=False)


def succeed(*command: str) -> str:
    done = run(*command)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def version(tool: str) -> str:
    found = re.search(r"release [\d.]+, V([\d.]+)", succeed(tool, "--version"))
    if found is None:
        sys.exit(f"{tool} does not say its version")
    return found[1]


def make_ptx(arguments: argparse.Namespace, oldest: int) -> Path:
    path: Path = arguments.out / "scatter.ptx"
    host = ["-ccbin", arguments.host_compiler] if arguments.host_compiler else []
    succeed(
        arguments.nvcc, "--ptx", "-std=c++20", "-O3", f"-arch=compute_{oldest}", *host,
        "-I", arguments.include, "-o", str(path), arguments.source,
    )  # fmt: skip
    text, count = re.subn(
        r"^\.version \d+\.\d+$", f".version {PTX_VERSION}", path.read_text(), flags=re.MULTILINE
    )
    if count != 1:
        sys.exit(f"{path}: {count} lines name the version of PTX, where one should")
    path.write_text(text)
    return path


def usage(text: str) -> str:
    """The usage that ptxas -v prints: ``28 registers, 0 bytes spilled``."""
    registers = re.search(r"Used (\d+) registers", text)
    stores = re.search(r"(\d+) bytes spill stores", text)
    loads = re.search(r"(\d+) bytes spill loads", text)
    if registers is None or stores is None or loads is None:
        return "not reported"
    return f"{registers[1]} registers, {int(stores[1]) + int(loads[1])} bytes spilled"


def assemble(arguments: argparse.Namespace, ptx: Path, architecture: int) -> Image | None:
    """Assembles with the first ptxas that knows the architecture; None if none does."""
    path = arguments.out / f"scatter_{architecture}.cubin"
    name = f"-arch=sm_{architecture}"
    assemblers = [(arguments.nvcc, ("--cubin", "-Xptxas", "-v"))]
    if arguments.ptxas:
        assemblers.insert(0, (arguments.ptxas, ("-v", "-O3")))
    for tool, options in assemblers:
        done = run(tool, name, *options, "-o", str(path), str(ptx))
        output = done.stdout + done.stderr
        if done.returncode == 0:
            return Image(architecture, path, f"ptxas {version(tool)}", usage(output))
        if not _UNKNOWN.search(output):
            sys.exit(f"{tool} refuses sm_{architecture}:\n{output}")
    return None


def write_source(path: Path, images: list[Image], ptx: Path, oldest: int, toolkit: str) -> None:
    """The text of a C++ source with the images and their table."""
    rows = [(image.architecture, "false", image.path, image.maker) for image in images]
    rows.append((oldest, "true", ptx, f"PTX {PTX_VERSION}"))
    lines = ["// Made by cmake/build_kernels.py.", '#include "convert/scatter.h"', ""]
    for number, (_, _, file, _) in enumerate(rows):
        symbol = f"weightlift_image_{number}"
        lines += [
            "// Aligned for the driver, which reads it in place; PTX ends with a zero.",
            f'asm(".pushsection .rodata\\n.balign 64\\n.globl {symbol}\\n.hidden {symbol}\\n"',
            f'    "{symbol}:\\n.incbin \\"{file}\\"\\n.globl {symbol}_end\\n"',
            f'    ".hidden {symbol}_end\\n{symbol}_end:\\n.byte 0\\n.popsection\\n");',
            f'extern "C" const std::byte {symbol}[];',
            f'extern "C" const std::byte {symbol}_end[];',
        ]
    lines += ["", "namespace weightlift::convert {", ""]
    lines += ["std::span<const KernelImage> scatter_images() noexcept {"]
    lines += ["  static const KernelImage kImages[] = {"]
    for number, (architecture, is_ptx, _, maker) in enumerate(rows):
        symbol = f"weightlift_image_{number}"
        lines.append(f'      {{{architecture}, {is_ptx}, "{maker}", {{{symbol}, {symbol}_end}}}},')
    lines += ["  };", "  return kImages;", "}", ""]
    lines += [f'const char* kernel_toolkit() noexcept {{ return "{toolkit}"; }}', ""]
    lines += ["}  // namespace weightlift::convert", ""]
    path.write_text("\n".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--nvcc", required=True)
    parser.add_argument("--ptxas", default="", help="tried before nvcc's own")
    parser.add_argument("--host-compiler", default="", help="for nvcc")
    parser.add_argument("--include", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--report", type=Path, help="a Markdown file of registers and spills")
    parser.add_argument("--all", action="store_true", help="fail where an architecture is unknown")
    parser.add_argument("source")
    parser.add_argument("architectures", type=int, nargs="+")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    oldest = min(arguments.architectures)
    ptx = make_ptx(arguments, oldest)
    images = []
    for architecture in sorted(arguments.architectures):
        image = assemble(arguments, ptx, architecture)
        if image is not None:
            images.append(image)
            continue
        missing = f"neither {arguments.nvcc} nor {arguments.ptxas or 'another'} knows"
        if arguments.all:
            sys.exit(f"{missing} sm_{architecture}")
        print(f"{missing} sm_{architecture}: there, the driver compiles the PTX")
    toolkit = f"nvcc {version(arguments.nvcc)}"
    write_source(arguments.out / "scatter_images.cc", images, ptx, oldest, toolkit)
    for image in images:
        size = image.path.stat().st_size
        print(
            f"sm_{image.architecture:<4} {image.maker:16} ELF ABI {image.abi}  "
            f"{size:7,} bytes  {image.usage}"
        )
    print(f"PTX {PTX_VERSION} for sm_{oldest}, by {toolkit}, {ptx.stat().st_size:,} bytes")
    if arguments.report is not None:
        rows = [
            f"| sm_{image.architecture} | {image.maker} | {image.abi} | "
            f"{image.path.stat().st_size:,} | {image.usage} |"
            for image in images
        ]
        head = [
            "# The kernel by architecture",
            "",
            f"Compiled by {toolkit} to PTX {PTX_VERSION} for sm_{oldest}; `make kernel-report` "
            "writes this page.",
            "",
            "| architecture | assembled by | ELF ABI | bytes | what ptxas -v says |",
            "|---|---|---|---|---|",
        ]
        arguments.report.write_text("\n".join([*head, *rows, ""]))


if __name__ == "__main__":
    main()

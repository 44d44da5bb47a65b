"""A C++ compiler for Linux with glibc 2.28 or newer, on x86-64 and aarch64: zig's clang.

It comes from PyPI (ziglang), with the headers and symbol versions of all glibc releases. Its libc++
is linked into the module and hidden, so the module uses no libstdc++, neither torch's nor the
system's. The unwinder is the process's libgcc_s: glibc uses it to unwind a thread that ends by
``pthread_exit``, also through frames of this module, and two unwinders cannot read each other's
contexts.
"""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["GLIBC", "Toolchain"]

GLIBC = "2.28"

# The functions of libgcc_s that a C++ runtime uses, by symbol version (gcc's libgcc-std.ver). A
# library with only these names is enough to link against.
_UNWINDER = {
    "GCC_3.0": [
        "_Unwind_DeleteException",
        "_Unwind_ForcedUnwind",
        "_Unwind_GetDataRelBase",
        "_Unwind_GetGR",
        "_Unwind_GetIP",
        "_Unwind_GetLanguageSpecificData",
        "_Unwind_GetRegionStart",
        "_Unwind_GetTextRelBase",
        "_Unwind_RaiseException",
        "_Unwind_Resume",
        "_Unwind_SetGR",
        "_Unwind_SetIP",
    ],
    "GCC_3.3": [
        "_Unwind_Backtrace",
        "_Unwind_FindEnclosingFunction",
        "_Unwind_GetCFA",
        "_Unwind_Resume_or_Rethrow",
    ],
    "GCC_4.2.0": ["_Unwind_GetIPInfo"],
}

_COMPILER = """#!/bin/sh
# Written by release/toolchain.py. The C driver links shared libraries, with the C++ library's
# archives and the process's unwinder as arguments: the C++ driver would add its own unwinder.
export ZIG_GLOBAL_CACHE_DIR='{cache}' ZIG_LOCAL_CACHE_DIR='{cache}'
case " $* " in
  *" -shared "*)
    exec '{zig}' cc -target {target} "$@" '{folder}/libc++.a' '{folder}/libc++abi.a' \\
      '{folder}/libgcc_s.so.1' ;;
esac
exec '{zig}' c++ -target {target} "$@"
"""

_CMAKE = """# Written by release/toolchain.py.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR {machine})
set(CMAKE_CXX_COMPILER {folder}/c++)
set(CMAKE_AR {folder}/ar)
set(CMAKE_RANLIB {folder}/ranlib)
# CMake's first checks only compile: to link a program, zig would build its C++ library again.
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
# The linker strips: the host's strip may not know the architecture.
set(CMAKE_STRIP "")
"""


@dataclass(frozen=True)
class Toolchain:
    """The compiler for one architecture, in its own folder.

    Attributes:
        zig: the program.
        machine: ``x86_64`` or ``aarch64``.
        folder: the folder of the compiler's wrapper, its cache and the CMake file.
    """

    zig: Path
    machine: str
    folder: Path

    @property
    def target(self) -> str:
        return f"{self.machine}-linux-gnu.{GLIBC}"

    @property
    def cmake_file(self) -> Path:
        return self.folder / "toolchain.cmake"

    def make(self) -> None:
        """Writes the wrappers and builds the C++ library."""
        self.folder.mkdir(parents=True, exist_ok=True)
        cache = self.folder / "cache"
        words = {"zig": self.zig, "target": self.target, "folder": self.folder, "cache": cache}
        self._program("c++", _COMPILER.format(**words))
        for tool in ("ar", "ranlib"):
            self._program(tool, f"#!/bin/sh\nexec '{self.zig}' {tool} \"$@\"\n")
        self.cmake_file.write_text(_CMAKE.format(machine=self.machine, folder=self.folder))
        if not (self.folder / "libgcc_s.so.1").exists():
            self._make_archives(cache)
            self._make_unwinder(cache)

    def _program(self, name: str, text: str) -> None:
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)

    def _zig(self, cache: Path, *arguments: str) -> None:
        where = {"ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}
        subprocess.run(
            [str(self.zig), *arguments], check=True, cwd=self.folder, env={**os.environ, **where}
        )

    def _make_archives(self, cache: Path) -> None:
        """Makes zig link a C++ library once, and takes the archives that it builds for this."""
        source = self.folder / "cxx.cc"
        source.write_text("#include <string>\nstd::string text() { throw 1; }\n")
        options = ["-target", self.target, "-O3", "-fPIC", "-shared"]
        self._zig(cache, "c++", *options, "-o", "cxx.so", source.name)
        for name in ("libc++.a", "libc++abi.a"):
            (found,) = cache.glob(f"o/*/{name}")
            (self.folder / name).write_bytes(found.read_bytes())

    def _make_unwinder(self, cache: Path) -> None:
        names = [name for group in _UNWINDER.values() for name in group]
        (self.folder / "unwinder.c").write_text("".join(f"void {n}(void) {{}}\n" for n in names))
        versions = [
            f"{version} {{ global: {' '.join(f'{name};' for name in group)} }};\n"
            for version, group in _UNWINDER.items()
        ]
        (self.folder / "unwinder.map").write_text("".join(versions))
        self._zig(
            cache, "cc", "-target", self.target, "-O2", "-fPIC", "-shared", "unwinder.c",
            "-Wl,--version-script=unwinder.map", "-Wl,-soname,libgcc_s.so.1",
            "-o", "libgcc_s.so.1",
        )  # fmt: skip

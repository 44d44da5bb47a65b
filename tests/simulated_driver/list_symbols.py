"""Lists every form of every driver function that cudaTypedefs.h declares, as a C++ table for the
simulated driver's cuGetProcAddress."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def main(header: Path, target: Path) -> None:
    # The per-thread stream forms end in _ptsz or _ptds; clients do not request them.
    forms = sorted(
        {
            (name, int(version))
            for name, version in re.findall(
                r"\(CUDAAPI \*PFN_(cu\w+?)_v(\d+)\)\(", header.read_text()
            )
        }
    )
    if not forms:
        sys.exit(f"{header} declares no functions")
    target.write_text("".join(f'{{"{name}", {version}}},\n' for name, version in forms))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

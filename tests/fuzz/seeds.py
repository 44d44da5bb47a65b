"""Writes what fuzzing begins with: the malformed corpus of the Python tests, and whole files.

Usage: seeds.py FOLDER, which gets a folder of files for each target.
"""

from __future__ import annotations

import struct
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "python" / "helpers"))

import malformed
import malformed_archives
import torch_pickles

# Larger ones slow down every mutation and find nothing more.
_MOST_BYTES = 4096


def write(folder: Path, files: dict[str, bytes]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        if len(data) <= _MOST_BYTES:
            (folder / name).write_bytes(data)


def tables() -> dict[str, bytes]:
    """Checkpoints whose pickle is replaced by the table of torch_zip_fuzz.cc."""
    plain = struct.pack("<4BI4Q", 17, 2, 0, 1, 0, 0, 2, 3, 0)  # F32 [2, 3]: all of the record
    shared = struct.pack("<4BI4Q", 17, 1, 1, 1, 0, 4, 2, 0, 0)  # F32 [2], from its second element
    packed = struct.pack("<4BI4Q", 1, 2, 2, 0, 0, 1, 2, 4, 0)  # F4 [2, 4], from the file's start
    return {
        f"table_of_{len(rows)}": malformed_archives.archive(
            malformed_archives.checkpoint(b"".join(rows), malformed_archives.FLOATS)
        )
        for rows in ([], [plain], [plain, shared], [plain, shared, packed])
    }


def pickles() -> dict[str, bytes]:
    cases = {**torch_pickles.ACCEPTED, **torch_pickles.LEFT_TO_TORCH}
    return {name: torch_pickles.saved(value)[0] for name, value in cases.items()}


def main(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some of torch's kinds of tensors are deprecated
        torch_cases = malformed_archives.torch_cases()
    for target, cases in {
        "safetensors": malformed.cases(),
        "torch_zip": torch_cases,
        "dduf": malformed_archives.dduf_cases(),
    }.items():
        write(folder / target, {case.name: case.data for case in cases})
    write(folder / "torch_zip", tables())
    write(folder / "torch_pickle", pickles())
    write(folder / "safetensors", {"small_file": malformed.small_file()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))

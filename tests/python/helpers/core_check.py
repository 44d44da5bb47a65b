"""What works without torch, on any Python: run by tests/pythons.sh with a fresh install."""

from __future__ import annotations

import ctypes
import json
import struct
import tempfile
from pathlib import Path

import weightlift
from weightlift import _native
from weightlift.checkpoint.checkpoint import Checkpoint, indexed_files


def main() -> None:
    data = bytes(range(200)) * 5
    header = {
        "a": {"dtype": "F32", "shape": [200], "data_offsets": [0, 800]},
        "b": {"dtype": "U8", "shape": [2, 100], "data_offsets": [800, 1000]},
        "__metadata__": {"format": "pt"},
    }
    text = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        checkpoint = Checkpoint.from_file(path)
        assert list(checkpoint) == ["a", "b"]
        part = indexed_files(checkpoint)[0]
        assert part.shapes() == [(200,), (2, 100)], part.shapes()
        assert part.metadata() == {"format": "pt"}

        plan = _native.Plan(_native.Settings())
        target = ctypes.create_string_buffer(1000)
        address = ctypes.addressof(target)
        targets = _native.Targets(-1, [address, address + 800], ["F32", "U8"])
        plan.copy_to(part, None, targets)
        assert plan.prepare() == []
        plan.start([])
        while not plan.wait(1.0):
            pass
        report = plan.finish()
        assert target.raw == data
        assert report["bytes"] == report["read_bytes"] == 1000, report

        path.write_bytes(b"\x00" * 7)
        code = None
        try:
            Checkpoint.from_file(path)
        except weightlift.FormatError as error:
            code = error.code
        assert code == "header_too_small", code
    print("ok", weightlift.__version__, weightlift.__file__)


if __name__ == "__main__":
    main()

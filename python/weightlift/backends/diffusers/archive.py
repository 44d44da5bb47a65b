"""A pipeline in a DDUF file, as a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from weightlift.backends.diffusers.context import temporary_value
from weightlift.checkpoint.dduf import Dduf, open_dduf
from weightlift.checkpoint.hub import HubArguments, download
from weightlift.core.errors import ArgumentError

__all__ = ["Archive", "current_archive", "dduf_path", "unpacked"]


@dataclasses.dataclass
class Archive:
    """A pipeline in a DDUF file, as a folder with all files but the weights, which stay in the
    archive; their files in the folder are empty."""

    dduf: Dduf
    folder: Path

    def entry(self, file: Any) -> str | None:
        path = Path(file)
        name = path.relative_to(self.folder).as_posix() if self.folder in path.parents else ""
        return name if name in self.dduf.entries else None


current_archive: ContextVar[Archive | None] = ContextVar(
    "weightlift_diffusers_archive", default=None
)


def dduf_path(path: Any, dduf_file: Any, kwargs: Mapping[str, Any]) -> Path:
    if kwargs.get("quantization_config") is not None:
        raise ArgumentError(
            "dduf_file= cannot be combined with quantization_config=: leave out one of them"
        )
    if Path(path).exists():
        return Path(path, dduf_file)
    names = {field.name for field in dataclasses.fields(HubArguments)}
    hub = HubArguments.pop_from({k: v for k, v in kwargs.items() if k in names})
    return download(str(path), str(dduf_file), hub)


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    dduf = open_dduf(path)
    with tempfile.TemporaryDirectory(prefix="weightlift-dduf-") as temporary:
        folder = Path(temporary)
        for name in dduf.entries:
            file = folder / name
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(b"" if name.endswith(".safetensors") else dduf.read(name))
        with temporary_value(current_archive, Archive(dduf, folder)):
            yield folder

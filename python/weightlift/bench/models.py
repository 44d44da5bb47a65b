"""``weightlift bench --from-pretrained``: a model or pipeline, loaded by its library alone and with
the backend."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import weightlift._native as _native
from weightlift.core.errors import CheckpointError
from weightlift.core.report import format_bytes

if TYPE_CHECKING:
    from weightlift.bench.measure import Job

__all__ = ["NAMES", "bench_folder", "model_job", "model_title", "state"]

# Contenders and their names here. The backend is first, because nothing is compared without it.
NAMES = {"backend": "weightlift", "stock": "library alone"}
_CLASS = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@contextlib.contextmanager
def bench_folder(arguments: Sequence[str]) -> Iterator[tuple[Path, str | None]]:
    """The folder of a model and ``module:Class``, from ``PATH``, ``PATH module:Class`` or
    ``module:Class`` alone, which makes a model in a temporary folder.

    Raises:
        FileNotFoundError: there is no such folder.
        CheckpointError: nothing is given, there is no such class, or its model is too large to
            make.
    """
    given = list(arguments)
    named = [one for one in given if _CLASS.fullmatch(one) and not Path(one).exists()]
    folders = [one for one in given if one not in named]
    if len(named) > 1 or len(folders) > 1:
        raise CheckpointError(f"one folder and one module:Class at most, not {', '.join(given)}")
    where = named[0] if named else None
    if folders:
        folder = Path(folders[0])
        if not folder.is_dir():
            if folder.exists():
                raise NotADirectoryError(20, "it is a file: give the model's folder", str(folder))
            raise FileNotFoundError(2, "no such model folder", str(folder))
        if where is not None:
            _find(where)
        yield folder, where
        return
    if where is None:
        raise CheckpointError("give a model's folder, or its class as module:Class")
    with tempfile.TemporaryDirectory(prefix="weightlift-bench-") as temporary:
        _make(where, Path(temporary))
        yield Path(temporary), where


def _find(where: str) -> None:
    """Checks that the module exists, before anything is measured.

    Raises:
        CheckpointError: there is no such module.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")  # the installed command has its own folder there
    module = where.partition(":")[0].partition(".")[0]
    if importlib.util.find_spec(module) is None:
        raise CheckpointError(f"{where}: No module named {module!r}")


def _make(where: str, folder: Path) -> None:
    """Saves a model of this class, as its default configuration describes it."""
    import torch

    module, _, name = where.partition(":")
    _find(where)
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    config = getattr(cls, "config_class", None)

    def made() -> Any:
        return cls() if config is None else cls(config())

    try:
        with torch.device("meta"):
            size = sum(t.nbytes for t in made().state_dict().values())
    except Exception as error:
        raise CheckpointError(
            f"{where}: it is not made without arguments ({type(error).__name__}: {error}); give "
            "the folder of a saved one"
        ) from error
    memory: int = _native.machine()["memory_headroom"]
    free = shutil.disk_usage(folder).free
    if size > min(free, memory) * 0.9:
        raise CheckpointError(
            f"{where}: by default it has {format_bytes(size)}, too much for {format_bytes(memory)} "
            f"of memory and {format_bytes(free)} in {folder.parent}; give the folder of a saved "
            "one, or set TMPDIR"
        )
    made().save_pretrained(folder)


def model_job(folder: Path, device: str, dtype: str | None, where: str | None = None) -> Job:
    """The load of a model or pipeline by its class: ``where``, or what its configuration names.

    Raises:
        CheckpointError: the folder has no configuration that names one, or no weights.
    """
    from weightlift.bench.measure import Job

    config: dict[str, Any] = {}
    for name in ("model_index.json", "config.json"):
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            break
    architectures = config.get("architectures") or []
    if where is not None:
        pass
    elif config.get("_class_name"):
        where = f"diffusers:{config['_class_name']}"
    elif architectures:
        where = f"transformers:{architectures[0]}"
    else:
        raise CheckpointError(
            f"{folder}: it has no config.json or model_index.json that names a class; add it, as "
            "in `weightlift bench --from-pretrained FOLDER mymodels:MyModel`"
        )
    found = sorted(folder.rglob("*.safetensors")) or sorted(folder.rglob("*.bin"))
    if not found:
        raise CheckpointError(f"{folder}: holds no weights")
    files = tuple(map(str, found))
    return Job("stock", files, device, dtype, folder=str(folder), model=where)


def model_title(job: Job) -> str:
    module, cls = job.model_class()
    library = module.partition(".")[0]
    with contextlib.suppress(metadata.PackageNotFoundError):
        library += f" {metadata.version(library)}"
    size = format_bytes(sum(Path(file).stat().st_size for file in job.files))
    files = f"{len(job.files)} files" if len(job.files) > 1 else "1 file"
    cast = f" as {job.dtype}" if job.dtype else ""
    return f"{cls} of {library}: {size} in {files}, to {job.device}{cast}"


def state(cold: bool) -> str:
    return "cold" if cold else "warm"

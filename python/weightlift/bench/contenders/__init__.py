"""The measured libraries, with an adapter for each.

The measured process imports this package by its path, as ``contenders``, with the Python of the
library's own environment. weightlift may not be installed there, so nothing of it is imported at
the top. A file of adapters adds other libraries: see ``read_adapters``.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from . import files, layers, models, references, trees
from .adapter import (
    Contender,
    Job,
    Load,
    cast,
    each_tensor,
    model_why_not,
    ours_why_not,
    phases,
    reports,
    safetensors_only,
    torch_why_not,
    whole_files,
)

__all__ = [
    "AGAINST",
    "CONTENDERS",
    "Contender",
    "Job",
    "Load",
    "cast",
    "each_tensor",
    "phases",
    "read_adapters",
    "reports",
    "safetensors_only",
    "whole_files",
]

# The choices of `weightlift bench --against`. The project's own benchmark uses the others too.
AGAINST = ("safetensors", "torch")


def _ours(prepare: Callable[[Job], Load], why_not: Callable[[Job], str | None]) -> Contender:
    return Contender("weightlift", "weightlift", why_not, prepare, "weightlift")


CONTENDERS: dict[str, Contender] = {
    "weightlift": _ours(files.weightlift, ours_why_not),
    "safetensors": Contender(
        "safetensors", "safetensors", safetensors_only, references.safetensors, "safetensors.torch"
    ),
    "safetensors-pread": Contender(
        "safetensors",
        "safetensors",
        safetensors_only,
        lambda job: references.reference(job, "pread"),
        "safetensors.torch",
    ),
    "torch": Contender(
        "torch", "torch", torch_why_not, lambda job: references.torch_load(job, mmap=True), "torch"
    ),
    "torch-plain": Contender(
        "torch", "torch", torch_why_not, lambda job: references.torch_load(job, mmap=False), "torch"
    ),
    "twin": Contender(
        "weightlift",
        "weightlift",
        torch_why_not,
        files.twin,
        "weightlift",
        reads=lambda job: job.files_as(".safetensors"),
    ),
    "stock": Contender(None, "torch", model_why_not, models.stock),
    "accelerate": Contender("accelerate", "accelerate", model_why_not, models.accelerate),
    "backend": _ours(models.backend, model_why_not),
    "ModelMixin": _ours(models.mixin, model_why_not),
    "ModelMixin-twin": dataclasses.replace(
        _ours(models.mixin_twin, model_why_not), reads=lambda job: job.files_as(".safetensors")
    ),
    "load_into": _ours(models.load_into, model_why_not),
    "construction": dataclasses.replace(_ours(models.construction, model_why_not), exact=False),
    "reading": dataclasses.replace(_ours(models.reading, model_why_not), exact=False),
    "layers": _ours(layers.in_background, safetensors_only),
    "layers-after": _ours(layers.loaded_and_run, safetensors_only),
    "layers-load": _ours(layers.loaded, safetensors_only),
    "layers-run": _ours(layers.run_alone, safetensors_only),
    "weightlift.safe_open": _ours(files.safe_open, safetensors_only),
    "safetensors.safe_open": Contender(
        "safetensors", "safetensors", safetensors_only, references.safe_open, "safetensors"
    ),
    "weightlift.flax": _ours(trees.weightlift_flax, trees.flax_why_not),
    "safetensors.flax": Contender(
        "safetensors", "safetensors", trees.flax_why_not, trees.safetensors_flax, "safetensors.flax"
    ),
    "torch.empty": Contender(
        "torch", "torch", safetensors_only, references.empty, "torch", exact=False
    ),
}


def read_adapters(path: str | Path | None) -> Mapping[str, Contender]:
    """``CONTENDERS`` and the contenders of a Python file, by name.

    The file sets ``CONTENDERS``, a dict of ``Contender`` by name. It imports ``Contender`` and
    other names with ``from contenders import ...``: the measured process knows this package by that
    name.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a Python file that sets ``CONTENDERS``, or one of its names is taken.
    """
    if path is None:
        return CONTENDERS
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(2, "no such file of adapters", str(path))
    spec = importlib.util.spec_from_file_location("adapters", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path}: adapters are a Python file, with a name that ends in .py")
    module = importlib.util.module_from_spec(spec)
    known = sys.modules.get("contenders")
    sys.modules["contenders"] = sys.modules[__name__]
    try:
        spec.loader.exec_module(module)
    finally:
        if known is None:
            del sys.modules["contenders"]
        else:
            sys.modules["contenders"] = known
    own = getattr(module, "CONTENDERS", None)
    if not isinstance(own, dict) or not all(isinstance(one, Contender) for one in own.values()):
        raise ValueError(f"{path}: it sets no CONTENDERS, a dict of Contender by name")
    if taken := sorted(own.keys() & CONTENDERS.keys()):
        raise ValueError(f"{path}: {taken[0]!r} is a contender of weightlift's own; rename it")
    return {**CONTENDERS, **own}

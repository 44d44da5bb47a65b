"""A pytest plugin that records a suite's outcomes, warnings and loads.

``JUDGE_MODE`` is ``stock``, ``weightlift`` (the backends of ``JUDGE_BACKENDS`` are on) or ``count``
(stock, and the bytes of all tensors that its primitives return are counted); the record goes to
``JUDGE_RECORD``.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import json
import os
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors
import safetensors.torch
import torch

import weightlift as wl
from weightlift.core.report import fallback_reasons

MODE = os.environ["JUDGE_MODE"]
SUITE = os.environ["JUDGE_BACKENDS"].split(",")
# Loaders whose results are recorded: (module, name).
LOADERS = {
    "transformers": [
        ("transformers.modeling_utils", "PreTrainedModel.from_pretrained"),
        ("transformers.modeling_utils", "PreTrainedModel._load_pretrained_model"),
    ],
    "diffusers": [
        ("diffusers.models.modeling_utils", "ModelMixin.from_pretrained"),
        ("diffusers.loaders.single_file_model", "FromOriginalModelMixin.from_single_file"),
    ],
    "accelerate": [
        ("accelerate.utils.modeling", "load_checkpoint_in_model"),
        ("accelerate.big_modeling", "load_checkpoint_and_dispatch"),
    ],
    "safetensors": [("safetensors.torch", "load_file")],
}
# Paths and addresses differ from run to run.
VARYING = re.compile(r"/tmp/[\w./-]+|0x[0-9a-f]+|line \d+|\d+(\.\d+)?(s| seconds)\b")

tests: dict[str, dict[str, Any]] = {}
moved: dict[str, int] = {}  # for each test, the bytes of the engine or the counted ones
current = ""
counted = 0


def note(kind: str, value: Any) -> None:
    tests.setdefault(current, {}).setdefault(kind, []).append(value)


def told(value: Any) -> Any:
    """The result of a load in a comparable form: tensors by their bits, other values by their
    type."""
    if isinstance(value, torch.nn.Module):
        value = {"class": type(value).__name__, "mode": value.training, **tensors_of(value)}
    if isinstance(value, torch.Tensor):
        if value.device.type == "meta" or type(value) not in (torch.Tensor, torch.nn.Parameter):
            return [type(value).__name__, str(value.dtype), list(value.shape)]
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        digest = hashlib.sha256(data).hexdigest()[:16] if value.numel() else ""
        return [type(value).__name__, str(value.dtype), list(value.shape), digest]
    if isinstance(value, dict):
        return {str(key): told(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [told(one) for one in value]
    if type(value).__name__ == "LoadStateDictInfo":
        return told(vars(value))
    return value if isinstance(value, (bool, int, float, str)) else type(value).__name__


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }


def watch(module: str, target: str) -> None:
    owner: Any = importlib.import_module(module)
    *path, name = target.split(".")
    for part in path:
        owner = getattr(owner, part)
    found = vars(owner)[name]
    bound = isinstance(found, (classmethod, staticmethod))
    function = found.__func__ if bound else found

    @functools.wraps(function)
    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            note("loads", [target, type(error).__name__])
            raise
        given = [one for one in args if isinstance(one, torch.nn.Module)] if result is None else []
        note("loads", [target, told(given or result)])
        return result

    setattr(owner, name, type(found)(watched) if bound else watched)


class Counting:
    """A file opened by safetensors, or a slice of it, that counts what it returns."""

    def __init__(self, opened: Any) -> None:
        self._opened = opened

    def __enter__(self) -> Counting:
        self._opened.__enter__()
        return self

    def __exit__(self, *args: Any) -> Any:
        return self._opened.__exit__(*args)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def __getitem__(self, index: Any) -> Any:
        return count(self._opened[index])

    def get_tensor(self, name: str) -> Any:
        return count(self._opened.get_tensor(name))

    def get_tensors(self, *args: Any) -> Any:
        return count(self._opened.get_tensors(*args))

    def get_slice(self, name: str) -> Counting:
        return Counting(self._opened.get_slice(name))


def count(value: Any) -> Any:
    global counted
    for one in value.values() if isinstance(value, dict) else [value]:
        counted += one.nbytes if isinstance(one, torch.Tensor) else 0
    return value


def counting(function: Callable[..., Any], wrap: Callable[[Any], Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def counted_call(*args: Any, **kwargs: Any) -> Any:
        return wrap(function(*args, **kwargs))

    return counted_call


def pytest_configure(config: pytest.Config) -> None:
    torch.use_deterministic_algorithms(False)
    if MODE == "count":
        opened = counting(safetensors.safe_open, Counting)
        safetensors.safe_open = safetensors.torch.safe_open = opened
        if SUITE != ["safetensors"]:  # its tests compare with files of torch
            torch.load = counting(torch.load, count)
    elif MODE == "weightlift":
        wl.enable(*SUITE)
    if MODE != "count":
        for library in SUITE:
            for module, target in LOADERS[library]:
                watch(module, target)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    global current
    current = item.nodeid
    torch.manual_seed(0)
    numpy.random.seed(0)
    random.seed(0)


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    so_far = counted if MODE == "count" else wl.stats().bytes
    moved[item.nodeid] = so_far - sum(moved.values())


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    outcome = "xfail" if hasattr(report, "wasxfail") else report.outcome
    if report.when == "call" or outcome != "passed":
        tests.setdefault(report.nodeid, {}).setdefault("outcome", []).append(outcome)
        if outcome == "failed":
            error = str(getattr(report.longrepr, "reprcrash", report.longrepr))
            tests[report.nodeid]["error"] = VARYING.sub("~", error.splitlines()[0])


def pytest_warning_recorded(warning_message: Any, nodeid: str) -> None:
    text = VARYING.sub("~", str(warning_message.message))
    said = tests.setdefault(nodeid, {}).setdefault("warnings", [])
    said.append([warning_message.category.__name__, text])


def pytest_sessionfinish(session: pytest.Session) -> None:
    stats = wl.stats()
    record = {
        "tests": tests,
        "moved": moved,
        "loads": stats.loads,
        "fallbacks": {f"{a}: {b}": n for (a, b), n in fallback_reasons().items()},
    }
    Path(os.environ["JUDGE_RECORD"]).write_text(json.dumps(record))

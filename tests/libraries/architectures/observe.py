"""Observes a load: the model's tensors, its messages, and its side effects."""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = ["differences", "digest", "observe"]

# Paths and addresses differ from load to load.
_VARYING = re.compile(r"(/[\w.-]+)*/offload-\w+|0x[0-9a-f]+|\d+(\.\d+)?(it/s|s/it| seconds)")


_LOGGERS = ("transformers", "diffusers", "accelerate")


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.name} {record.levelname}: {_plain(record.getMessage())}")


def observe(load: Callable[[], Any]) -> dict[str, Any]:
    """Loads, and returns everything that can be observed, as plain values.

    Args:
        load: the call, which returns a model or a tuple that begins with one.
    """
    torch.manual_seed(0)
    seen: dict[str, Any] = {}
    with _said(seen):
        try:
            result = load()
        except Exception as error:  # both ways raise the same
            seen["error"] = f"{type(error).__name__}: {_plain(str(error))}"
            seen["traceback"] = traceback.format_exc()
            return seen
    seen["random state"] = digest(torch.get_rng_state())
    seen["default dtype"] = str(torch.get_default_dtype())
    model, *rest = result if isinstance(result, tuple) else (result,)
    seen["info"] = [_told(one) for one in rest]
    seen["attributes"] = _attributes(model)
    seen["hooks"] = _hooks(model)
    seen.update(_tensors(model))
    return seen


def differences(alone: dict[str, Any], backend: dict[str, Any]) -> list[str]:
    """The differences, one line each."""
    if "error" in backend and "error" not in alone:
        return [f"error: with the backend {backend['error']}\n{backend['traceback']}"]
    for seen in (alone, backend):
        # Files that the library leaves open are closed when they are collected.
        seen["warnings"] = [w for w in seen["warnings"] if not w.startswith("ResourceWarning")]
    kinds = sorted((alone.keys() | backend.keys()) - {"traceback"})
    return [line for kind in kinds for line in _unlike(kind, alone.get(kind), backend.get(kind))]


def _unlike(place: str, one: Any, other: Any) -> list[str]:
    if one == other:
        return []
    if isinstance(one, dict) and isinstance(other, dict):
        return [
            line
            for key in list(one | other)
            for line in _unlike(f"{place}, {key}", one.get(key), other.get(key))
        ]
    if isinstance(one, list) and isinstance(other, list):
        left = [item for item in one if item not in other]
        right = [item for item in other if item not in one]
        if left or right:
            return [f"{place}: only alone {left}, only with the backend {right}"]
        return [f"{place}: in another order, or another number of times: {one} / {other}"]
    return [f"{place}: alone {one}, with the backend {other}"]


@contextlib.contextmanager
def _said(seen: dict[str, Any]) -> Iterator[None]:
    """Records warnings, the libraries' log lines and printed text."""
    handler = _Lines()
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(logger.level, logger.propagate, logger.handlers) for logger in loggers]
    printed = io.StringIO()
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    _forget_once()
    try:
        with (
            warnings.catch_warnings(record=True) as caught,
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
        ):
            warnings.simplefilter("always")
            yield
    finally:
        for logger, (level, propagate, handlers) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
        seen["warnings"] = [f"{w.category.__name__}: {_plain(str(w.message))}" for w in caught]
        seen["log"] = handler.lines
        seen["printed"] = _plain(printed.getvalue())


def _forget_once() -> None:
    """Makes the libraries repeat messages that they show once in a process."""
    for name in ("warning_once", "info_once"):
        once = getattr(logging.Logger, name, None)
        clear = getattr(once, "cache_clear", None)
        if clear is not None:
            clear()


def _plain(text: str) -> str:
    return _VARYING.sub("~", text)


def digest(tensor: torch.Tensor) -> str:
    """A digest of a tensor's bits."""
    if tensor.numel() == 0:
        return ""
    data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(data.numpy().tobytes()).hexdigest()[:16]


def _tensors(model: torch.nn.Module) -> dict[str, Any]:
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    tensors: dict[str, Any] = {}
    same: dict[int, list[str]] = {}
    shared: dict[int, list[str]] = {}
    for name, tensor in named.items():
        same.setdefault(id(tensor), []).append(name)
        bits = ""
        if tensor.device.type != "meta":
            bits = digest(tensor)
            if tensor.numel():
                shared.setdefault(tensor.data_ptr(), []).append(name)
        tensors[name] = (
            type(tensor).__name__,
            str(tensor.dtype),
            tuple(tensor.shape),
            tensor.stride(),
            str(tensor.device),
            tensor.requires_grad,
            bits,
        )
    return {
        "order": list(named),
        "tensors": tensors,
        "one object": sorted(names for names in same.values() if len(names) > 1),
        "one memory": sorted(names for names in shared.values() if len(names) > 1),
    }


def _hooks(model: torch.nn.Module) -> dict[str, Any]:
    """accelerate's hooks, with the weights that they load from the disk."""
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        hook = getattr(module, "_hf_hook", None)
        for one in getattr(hook, "hooks", () if hook is None else (hook,)):
            weights = getattr(one, "weights_map", None)
            bits = {}
            if weights is not None:
                own = dict(module.named_parameters(recurse=False))
                own.update(module.named_buffers(recurse=False))
                for name, tensor in own.items():
                    if tensor is not None and tensor.device.type == "meta":
                        bits[name] = _from_disk(weights, name, tensor.dtype)
            device = str(getattr(one, "execution_device", None))
            found.setdefault(path, []).append((type(one).__name__, device, bits))
    return found


def _from_disk(weights: Any, name: str, dtype: torch.dtype) -> Any:
    """The tensor that the hook puts in place of one on meta."""
    try:
        value = weights[name].to(dtype)
    except Exception as error:  # a tensor that was not in the file is not on the disk
        return f"{type(error).__name__}: {error}"
    return str(value.dtype), tuple(value.shape), digest(value)


def _attributes(model: torch.nn.Module) -> dict[str, Any]:
    found = {
        name: _told(value)
        for name, value in vars(model).items()
        if name not in ("_parameters", "_buffers", "_modules", "_hf_hook")
    }
    marks = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        # accelerate leaves its keyword on functions that it replaces while a model is built on
        # meta.
        mark = {k: _told(value) for k, value in vars(tensor).items() if k != "requires_grad"}
        if mark:
            marks[name] = mark
    found["marks on parameters"] = marks
    found["modes of modules"] = digest(
        torch.tensor([module.training for module in model.modules()], dtype=torch.uint8)
    )
    return found


def _told(value: Any) -> Any:
    """A value in a form that can be compared and printed."""
    if isinstance(value, torch.Tensor):
        bits = "" if value.device.type == "meta" else digest(value)
        return str(value.dtype), tuple(value.shape), bits
    if isinstance(value, dict) and all(isinstance(key, int) for key in value):
        return [_told(one) for one in value.values()]  # hooks, by a number that counts up
    if isinstance(value, dict):
        return {str(key): _told(one) for key, one in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(str(_told(one)) for one in value)
    if isinstance(value, (list, tuple)):
        return [_told(one) for one in value]
    if hasattr(value, "to_dict"):
        return _plain(str(value.to_dict()))
    if type(value).__name__ == "LoadStateDictInfo":
        return _told(vars(value))
    if isinstance(value, (str, int, float, bool, torch.dtype, torch.device, torch.Size)):
        return _plain(str(value))
    return type(value).__name__

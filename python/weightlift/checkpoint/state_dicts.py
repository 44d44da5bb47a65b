"""Finds the state dict in a torch file, or raises an error that lists the candidates.

A pickle may set attributes of any name on dicts and tensors, so this module calls methods through
the class.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

from weightlift.core import dtypes
from weightlift.core.errors import CheckpointError

__all__ = ["Found", "StoredTensor", "count_tensors", "find_state_dict", "key_text", "type_name"]

# Limits of the search for tensors beside the state dict: depth and number of values.
_DEEPEST = 8
_MOST_VALUES = 1_000_000
# Usual keys of a model's state dict in training checkpoints.
_MODELS = frozenset(
    {
        "model",
        "model_state",
        "model_state_dict",
        "module",
        "net",
        "network",
        "params",
        "state_dict",
        "weights",
    }
)


class StoredTensor(NamedTuple):
    """A tensor as its pickle describes it.

    Attributes:
        record: its storage is the record ``data/<record>`` of the archive.
        dtype: the file's name of its dtype, such as ``"BF16"``.
        offset: offset into the storage; like shape and stride in elements of the torch dtype.
        contiguous: the result of ``torch.Tensor.is_contiguous``.
    """

    record: str
    dtype: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    contiguous: bool


class Found(NamedTuple):
    """The state dict of a file.

    Attributes:
        state_dict: name -> tensor or other value.
        key: its dotted key; ``""`` for the top level.
        beside: name -> type name of the objects beside it.
        left_out: name -> number of tensors, for the entries of ``beside`` that hold tensors.
        chosen: whether the caller chose it with ``state_dict_key``.
    """

    state_dict: dict[Any, Any]
    key: str
    beside: dict[str, str]
    left_out: dict[str, int]
    chosen: bool

    def note(self) -> str | None:
        """The warning if tensors are left out that the caller did not exclude."""
        if self.chosen or not self.left_out:
            return None
        where = f"the tensors of {self.key!r} are taken" if self.key else "the top level is taken"
        return (
            f"{where} ({_direct(self.state_dict)}), without the tensors in "
            f"{_counted(self.left_out)}: choose others with state_dict_key="
        )


def find_state_dict(loaded: Any, key: str | None, path: str) -> Found:
    """The state dict in the object that ``torch.load`` would return.

    Args:
        loaded: the object.
        key: ``state_dict_key``; ``None`` takes the only plausible dict, ``""`` the top level.
        path: the file, for errors.

    Raises:
        CheckpointError: there is no state dict, or there are several; the text lists them.
    """
    beside: dict[str, str] = {}
    left_out: dict[str, int] = {}
    if key is not None:
        loaded = _at(loaded, key, path, beside, left_out)
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path}: {repr(key) if key else 'its content'} is {_a(loaded)}, not a "
            "dict of names to tensors"
        )
    if key is not None or not loaded:
        return _found(loaded, key or "", beside, left_out, True)
    if all(map(_is_tensor_class, set(map(type, dict.values(loaded))))):  # most files
        return Found(loaded, "", beside, left_out, False)
    name = _only_reading(loaded, path)
    if name is None:
        return _found(loaded, "", beside, left_out, False)
    _note_beside(loaded, "", name, beside, left_out)
    return _found(loaded[name], key_text(name), beside, left_out, False)


def _found(
    state_dict: dict[Any, Any],
    key: str,
    beside: dict[str, str],
    left_out: dict[str, int],
    chosen: bool,
) -> Found:
    for name, value in dict.items(state_dict):
        if not _is_tensor(value) and (count := count_tensors(value)):
            left_out[key_text(name)] = count
    return Found(state_dict, key, beside, left_out, chosen)


def _only_reading(loaded: dict[Any, Any], path: str) -> Any:
    """The key of the only plausible dict; ``None`` for the top level."""
    top = [value for value in dict.values(loaded) if _is_tensor(value)]
    inner = {
        name: value
        for name, value in dict.items(loaded)
        if _direct(value) and not str(key_text(name)).endswith("_extra_state")
    }
    # A learning rate, a step or the state of a random generator is not a model.
    models = {name: value for name, value in inner.items() if not all(map(_is_note, _of(value)))}
    inner = models or inner
    whole = bool(top) and not (models and all(map(_is_note, top)))
    if whole and not any(key_text(name).lower() in _MODELS for name in inner):
        return None
    if len(inner) == 1 and not whole:
        return next(iter(inner))
    raise CheckpointError(_question(loaded, top, inner, path))


def _question(
    loaded: dict[Any, Any], top: Collection[Any], inner: dict[Any, Any], path: str
) -> str:
    if not top and not inner:
        deeper = _listed(
            f"{name!r} ({_plural(count)})" for name, count in itertools.islice(_deeper(loaded), 10)
        )
        further = f": there are tensors in {deeper}" if deeper else ""
        return (
            f"{path}: has no tensors at the top, but {_keys(loaded)}; give state_dict_key= of a "
            f"nested dict{further}"
        )
    sizes = _listed(_direct(value) for value in itertools.islice(inner.values(), 10))
    found = f"has several state dicts: {_keys(inner)} ({sizes})"
    if top:
        names = [name for name, value in dict.items(loaded) if _is_tensor(value)]
        found = (
            f"has {_plural(len(top))} at the top ({_keys(names)}) and in {_keys(inner)} ({sizes})"
        )
    whole = " ('' for the top)" if top else ""
    return f"{path}: {found}; choose one with state_dict_key={whole}"


def _deeper(loaded: dict[Any, Any]) -> Iterator[tuple[str, int]]:
    """Nested dicts of tensors, by their dotted keys."""
    todo: list[tuple[str, Any, int]] = [("", loaded, 0)]
    seen: set[int] = set()
    while todo and len(seen) < 1000:
        prefix, value, depth = todo.pop(0)
        if not isinstance(value, dict) or id(value) in seen or depth > _DEEPEST:
            continue
        seen.add(id(value))
        if depth and (count := sum(map(_is_tensor, dict.values(value)))):
            yield prefix, count
            continue
        todo += [
            (f"{prefix}.{key_text(name)}" if prefix else key_text(name), inner, depth + 1)
            for name, inner in itertools.islice(dict.items(value), 1000)
        ]


def _is_tensor(value: object) -> bool:
    return _is_tensor_class(type(value))


def _is_tensor_class(kind: type) -> bool:
    import torch

    return issubclass(kind, (StoredTensor, torch.Tensor))


def _of(mapping: dict[Any, Any]) -> list[Any]:
    return [value for value in dict.values(mapping) if _is_tensor(value)]


def _direct(value: object) -> str:
    """The number of tensors directly in a dict, in words; empty if there are none."""
    count = len(_of(value)) if isinstance(value, dict) else 0
    return _plural(count) if count else ""


def _is_note(tensor: Any) -> bool:
    """Whether the tensor is a number, or the state of a random generator."""
    import torch

    if isinstance(tensor, StoredTensor):
        return math.prod(tensor.shape) <= 1 or tensor.dtype not in dtypes.FLOATING
    shape = torch.Tensor.size(tensor)
    return math.prod(shape) <= 1 or not torch.Tensor.is_floating_point(tensor)


def count_tensors(value: object) -> int:
    """The number of tensors in a value, at any depth."""
    count, looked_at = 0, 0
    todo: list[object] = [value]
    seen: set[int] = set()
    while todo and looked_at < _MOST_VALUES:
        one = todo.pop()
        looked_at += 1
        if _is_tensor(one):
            count += 1
        elif isinstance(one, (dict, list, tuple, set, frozenset)) and id(one) not in seen:
            seen.add(id(one))
            todo += dict.values(one) if isinstance(one, dict) else one
    return count


def _at(loaded: Any, key: str, path: str, beside: dict[str, str], left_out: dict[str, int]) -> Any:
    """The value at a dotted key; if keys have dots themselves, the longest is tried first."""
    value, rest = loaded, key
    while rest:
        if not isinstance(value, dict):
            raise CheckpointError(
                f"{path}: state_dict_key={key!r} leads through {_a(value)}, not a dict"
            )
        head = rest
        while head not in value:
            head, dot, _ = head.rpartition(".")
            if not dot:
                raise CheckpointError(f"{path}: has no key {key!r}; it has {_keys(value)}")
        _note_beside(value, key[: len(key) - len(rest)], head, beside, left_out)
        value, rest = value[head], rest[len(head) + 1 :]
    return value


def _note_beside(
    mapping: dict[Any, Any],
    prefix: str,
    but: object,
    beside: dict[str, str],
    left_out: dict[str, int],
) -> None:
    for key, value in dict.items(mapping):
        if key == but:
            continue
        name = prefix + key_text(key)
        beside[name] = type_name(value)
        if count := count_tensors(value):
            left_out[name] = count


def _counted(left_out: dict[str, int]) -> str:
    return _listed(
        f"{name[:60]!r} ({_plural(count)})"
        for name, count in itertools.islice(left_out.items(), 10)
    ) + (f" and {len(left_out) - 10} more" if len(left_out) > 10 else "")


def _plural(count: int) -> str:
    return f"{count} tensor" if count == 1 else f"{count} tensors"


def _listed(texts: Any) -> str:
    return ", ".join(texts)


def _keys(keys: Collection[Any]) -> str:
    shown = [repr(key_text(key)[:60]) for key in itertools.islice(keys, 10)]
    return ", ".join(shown) + (", ..." if len(keys) > len(shown) else "")


def key_text(key: object) -> str:
    """A key as text for messages."""
    # Not repr: a tuple in a pickle may be nested deeper than the recursion limit.
    if isinstance(key, str):
        return key
    return str(key) if isinstance(key, int) else f"a {type_name(key)}"


def _a(value: object) -> str:
    name = type_name(value)
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def type_name(value: object) -> str:
    """The name of a value's type, for messages."""
    return "Tensor" if isinstance(value, StoredTensor) else type(value).__name__

"""Which of the library's walks over the tensors of a checkpoint are compat."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import inspect
import io
import logging
import textwrap
import tokenize
from collections.abc import Callable
from typing import Any

__all__ = ["core_module", "is_foreign", "is_walked", "offer"]

_log = logging.getLogger("weightlift")

# What `walk` stands in for, and what it relies on beyond names and signatures: digests of
# their code, by the first version that has it. Versions before 5.16 shard tensors in this walk.
_RELIED_ON = (
    "",  # the walk itself
    "set_param_for_module",
    "spawn_materialize",
    "_materialize_copy",
    "WeightTransform.add_tensor",
    "WeightTransform.materialize_tensors",
    "WeightRenaming.convert",
    "WeightConverter.convert",
    "MergeModulelist.convert",
    "MergeModulelist.get_target_pattern",
    "Concatenate.convert",
    "Concatenate.get_target_pattern",
)
_KNOWN = {
    "9432b03fb4a63b1b",  # 5.16
    "71af7c95f3de1491",  # 5.17
    "8932346be2c78a79",  # 5.21
    "3b2fb4744bea2b40",  # 5.23
}

# The library's own, once it is hooked.
_original: Callable[..., Any] | None = None
# Of those that were looked at.
_verdicts: dict[Callable[..., Any], bool] = {}


def offer(original: Callable[..., Any]) -> None:
    """Says what ``walk`` is to stand in for."""
    global _original
    _original = original


def is_walked(config: Any) -> bool:
    """Whether a load with this ``LoadStateDictConfig`` can go through ``walk``."""
    return config.hf_quantizer is None and _original is not None and _is_supported(_original)


def is_foreign() -> bool:
    """Whether no load can, as far as is known without reading the library's source."""
    return _original is None or _verdicts.get(_original) is False


def core_module() -> Any:
    return importlib.import_module("transformers.core_model_loading")


def _is_supported(original: Callable[..., Any]) -> bool:
    verdict = _verdicts.get(original)
    if verdict is None:
        verdict = _verdicts[original] = _look_at(original)
    return verdict


def _look_at(original: Callable[..., Any]) -> bool:
    import transformers

    with contextlib.suppress(AttributeError, OSError, TypeError):
        digest = hashlib.sha256()
        for name in _RELIED_ON:
            found = functools.reduce(getattr, name.split("."), core_module()) if name else original
            digest.update(_code(textwrap.dedent(inspect.getsource(found))).encode())
        if digest.hexdigest()[:16] in _KNOWN:
            return True
    _log.info(
        "weightlift: how transformers %s goes over the weights is not known; it does that itself, "
        "on tensors that the engine loads",
        transformers.__version__,
    )
    return False


def _code(source: str) -> str:
    """What a function's source says to Python, the same from every version of it: no comments,
    docstrings or layout. Not by `ast`, which fails where another thread is in it (gh-106905)."""
    found = []
    begins = True  # a statement
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.INDENT, tokenize.DEDENT, tokenize.NEWLINE):
            found.append("\n")
            begins = True
        elif token.type not in (tokenize.COMMENT, tokenize.NL):
            if token.type != tokenize.STRING or not begins:
                # From 3.12 on, the parts of f-strings are tokens.
                found.append("".join(token.string.split()).replace("{{", "{").replace("}}", "}"))
            begins = False
    return "".join(found)

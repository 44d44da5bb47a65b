"""vLLM: ``vllm serve MODEL --load-format weightlift``.

Nothing is hooked. vLLM calls ``register`` (an entry point), which adds a load format to vLLM's list
when its loaders are imported. ``WeightliftModelLoader`` (`loader`) is a ``DefaultModelLoader`` that
overrides:

- ``load_weights``: records the model's own loading, and reads only the slices that it copies.
- ``get_all_weights``: a reload in place reads the same slices again.
- ``_get_weights_iterator``: hands out tensors that the engine reads.
- ``track_weights_loading``: notes the parameters that vLLM has not loaded.

Decided in ``load_weights``, load by load: slices or whole tensors. Models quantized by torchao, and
all with ``{"slices": false}``, get whole tensors that are read ahead.

Falls back to the loader of ``--load-format auto``, with a warning: a vLLM whose loaders have other
arguments.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import logging
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["LOAD_FORMAT", "register"]

LOAD_FORMAT = "weightlift"
_LOADERS = "vllm.model_executor.model_loader"
_log = logging.getLogger("weightlift")


def register() -> None:
    """The entry point of the group ``vllm.general_plugins``: registers the load format in this
    process; repeated calls have no effect. It waits for the import of vLLM's loaders, which takes
    seconds and is not needed in every process."""
    if _LOADERS in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    loaders = importlib.import_module(_LOADERS)
    known = getattr(loaders, "_LOAD_FORMAT_TO_MODEL_LOADER", None)
    if not isinstance(known, dict):
        _log.warning(
            "this version of vLLM accepts no additional load format: use --load-format auto"
        )
        return
    if LOAD_FORMAT in known:
        return
    try:
        from weightlift.backends.vllm.loader import WeightliftModelLoader

        loaders.register_model_loader(LOAD_FORMAT)(WeightliftModelLoader)
    except (ImportError, AttributeError, TypeError) as error:
        known[LOAD_FORMAT] = functools.partial(_stock, loaders, f"{type(error).__name__}: {error}")


def _stock(loaders: ModuleType, why: str, load_config: Any) -> Any:
    """The loader of ``--load-format auto``."""
    from weightlift.backends.serving_files import OWN_KEYS

    _log.warning(
        "weightlift does not support the loaders of this vLLM (%s): vLLM's own loader is used", why
    )
    config = copy.copy(load_config)
    config.load_format = "auto"
    extra = config.model_loader_extra_config
    if isinstance(extra, dict):
        rest = {key: value for key, value in extra.items() if key not in OWN_KEYS}
        config.model_loader_extra_config = rest
    return loaders.get_model_loader(config)


class _AfterImport(MetaPathFinder):
    """Registers when the import of vLLM's loaders ends; finds nothing itself."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _LOADERS:
            return None
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        execute = getattr(spec.loader, "exec_module", None) if spec is not None else None
        if spec is None or spec.loader is None or execute is None:
            return None

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _register()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

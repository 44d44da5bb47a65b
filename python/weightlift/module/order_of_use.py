"""Remembers the order in which models use their tensors.

An order is kept in the process for models that are built later: a background load reads tensors
in this order, and a stream cuts its blocks in it. It is not kept in a file: nearly all models use
their tensors in the order of the modules, a wrong prediction only causes a wait, and a load should
not write to the user's folders.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["learn_order", "order_of_use", "which_model"]

# Number of orders to keep, the newest.
_KEPT = 32

# By model: the names of its modules, in the order in which they used their tensors.
_orders: dict[Hashable, list[str]] = {}
_lock = threading.Lock()


def which_model(model: torch.nn.Module) -> Hashable:
    """A key for models that use their tensors in the same order."""
    count = sum(1 for _ in model.modules())
    return type(model).__module__, type(model).__qualname__, count


def order_of_use(which: Hashable, model: torch.nn.Module, names: Sequence[str]) -> list[str]:
    """``names`` in the order of an earlier run in this process, else in the order of the modules.

    Args:
        which: the key from ``which_model``.
        model: the model, for the order of its modules.
        names: the names of its tensors.
    """
    by_module: dict[str, dict[str, None]] = {}
    known = frozenset(names)
    for prefix, module in model.named_modules(remove_duplicate=False):
        for tensors in (module._parameters, module._buffers):
            for key in tensors:
                name = f"{prefix}.{key}" if prefix else key
                if name in known:
                    by_module.setdefault(prefix, {})[name] = None
    with _lock:
        learned = _orders.get(which)
    modules = list(by_module) if learned is None else _merged(learned, list(by_module))
    ordered = dict.fromkeys(name for prefix in modules for name in by_module[prefix])
    return [*ordered, *(name for name in names if name not in ordered)]


def _merged(learned: Iterable[str], modules: Sequence[str]) -> list[str]:
    """The modules in the learned order. A module without a learned place follows its predecessor in
    the model."""
    shown = set(learned)
    behind: dict[str | None, list[str]] = {}
    last = None
    for module in modules:
        if module in shown:
            last = module
        else:
            behind.setdefault(last, []).append(module)
    here = frozenset(modules)
    order = behind.get(None, [])
    for module in learned:
        order += [module] if module in here else []
        order += behind.get(module, [])
    return order


def learn_order(which: Hashable, names: Iterable[str]) -> None:
    """Remembers the order in which a model used its tensors."""
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    with _lock:
        _orders.pop(which, None)
        _orders[which] = modules
        if len(_orders) > _KEPT:
            del _orders[next(iter(_orders))]

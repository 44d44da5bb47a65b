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

from weightlift.module.parameters import gather

if TYPE_CHECKING:
    import torch

__all__ = ["learn_order", "order_of_use", "which_model"]

# Number of orders to keep, the newest.
_KEPT = 32

# By model: the names of its modules, in the order in which they used their tensors.
_orders: dict[Hashable, list[str]] = {}
_lock = threading.Lock()


def which_model(model: torch.nn.Module, count: int | None = None) -> Hashable:
    """A key for models that use their tensors in the same order.

    Args:
        model: the model.
        count: the number of its modules, if known: ``len(gather(model).modules)``.
    """
    if count is None:
        count = len(gather(model).modules)
    return type(model).__module__, type(model).__qualname__, count


def order_of_use(which: Hashable, names: Sequence[str]) -> list[str]:
    """``names`` in the order of an earlier run in this process, else as they are.

    Args:
        which: the key from ``which_model``.
        names: the names of the model's tensors, in the order of its modules.
    """
    with _lock:
        learned = _orders.get(which)
    if learned is None:
        return list(names)
    by_module: dict[str, list[str]] = {}
    for name in names:
        by_module.setdefault(name.rpartition(".")[0], []).append(name)
    return [name for prefix in _merged(learned, list(by_module)) for name in by_module[prefix]]


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

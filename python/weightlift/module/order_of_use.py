"""In which order a model uses its tensors, as far as that is known."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["learn_order", "order_of_use"]

# Of so many models an order is kept, those that were learned last.
_KEPT = 32

_orders: dict[object, list[str]] = {}
_lock = threading.Lock()


def order_of_use(identity: object, model: torch.nn.Module, names: Sequence[str]) -> list[str]:
    """``names`` in the order of an earlier run of such a model in this process, where there was
    one; else in the order of the modules.

    Args:
        identity: what such models have in common.
        model: for the order of its modules.
        names: of its tensors.
    """
    with _lock:
        learned = _orders.get(identity)
    if learned is not None and set(learned) == set(names):
        return list(learned)
    known = frozenset(names)
    ordered: dict[str, None] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for tensors in (module._parameters, module._buffers):
            for key in tensors:
                name = f"{prefix}.{key}" if prefix else key
                if name in known:
                    ordered[name] = None
    return [*ordered, *(name for name in names if name not in ordered)]


def learn_order(identity: object, names: Sequence[str]) -> None:
    """Remembers the order in which such a model has used its tensors."""
    with _lock:
        _orders.pop(identity, None)
        _orders[identity] = list(names)
        if len(_orders) > _KEPT:
            del _orders[next(iter(_orders))]

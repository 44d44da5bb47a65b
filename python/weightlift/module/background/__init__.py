"""Modules that can be used while their tensors are still loading.

A tensor that has not arrived is on ``meta``. Its module waits for its own tensors in a forward
pre-hook. Other readers of ``_parameters`` or ``_buffers`` (attributes, ``state_dict()``, ``to()``,
copies, pickles) wait for the tensors that they read: both are dicts that wait. When the last tensor
of a module has arrived, the hook is removed and the dicts are plain again.

- `split`: selects the tensors that may arrive later, and refuses unsuitable models.
- `waiting`: the hook and the dicts of a waiting module.
- `load`: the load, and the modules that wait for it; `order_of_use`, beside this folder, gives the
  order.
- `report`: the report that the caller gets.
- `holding_back`: for libraries that read all tensors before they return.

A module keeps its load alive, but the load does not keep the module: the load ends when all modules
that wait for it are deleted.
"""

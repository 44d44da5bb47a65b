"""Modules that are used while their tensors are still being loaded.

What has not arrived is on ``meta``. Its module waits for its own tensors in a forward pre-hook.
Whoever reads ``_parameters`` or ``_buffers`` otherwise (attributes, ``state_dict()``, ``to()``,
copies, pickles) waits for what he reads: until then both are dicts that wait.
When the last tensor of a module is there, its hook is gone and its dicts are plain ones.

- `split`: which tensors can come later; what is refused.
- `waiting`: what hangs in a module that waits.
- `load`: the load, and the modules that wait for it; `order_of_use`, beside this folder, says what
  comes first.
- `report`: what the caller is given.
- `holding_back`: libraries that look at all tensors before they return.

A module keeps its load alive and not the other way round: nobody needs the rest when all modules
that wait for it are gone.
"""

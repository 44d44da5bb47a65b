"""Runs models that are larger than their device: reads weights ahead of their use.

- `streamed_weight`: the tensor in the place of a weight; each use gets the values from the ring.
- `ring`: assigns blocks to buffers and decides what to read next; `learned_order`, beside this
  folder, predicts the next use.
- `device_side`: the buffers of a device, and the order of its copies and its computation.
- `sources`: reads weights from files, or from host memory.
- `residency`: cuts a model into pieces, and decides which stay on the device.
- `executor`: the ring and its thread.
- `originals`: the model's own tensors, and their replacement.
- `task`: the plan: it puts streamed weights into the model, and decides again which stay when
  `uses` has counted the uses of a step.
- `begin`: selects the weights to stream, from files or from host memory.
- `on_demand`: weights for the hooks of libraries, which put them into modules during a forward.
- `call`: the public call; `handle`: what it returns.
"""

from weightlift.module.streaming.call import stream
from weightlift.module.streaming.handle import StreamHandle

__all__ = ["StreamHandle", "stream"]

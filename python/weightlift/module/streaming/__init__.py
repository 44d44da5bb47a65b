"""Models that are larger than the memory they run in: their weights are read ahead of their use.

- `streamed_weight`: what hangs in a module in the place of a weight; each use of it asks the ring.
- `ring`: which block is in which buffer, what is read next, who waits for what; `learned_order`,
  beside this folder, says what is used next.
- `device_side`: the buffers of a device, and the order of its copies and its computing.
- `sources`: where weights lie: in files, or in the host's memory.
- `residency`: what a model is cut into, and what of it stays on the device.
- `executor`: the ring, with its thread.
- `originals`: the model's own tensors, and what takes their place.
- `task`: the plan: it puts streamed weights into the model, and shares memory out again when `uses`
  has counted how often a step uses each.
- `begin`: what is streamed of a model, from files or from memory.
- `call`: the public call; `handle`: what it returns.
"""

from weightlift.module.streaming.call import stream
from weightlift.module.streaming.handle import StreamHandle

__all__ = ["StreamHandle", "stream"]

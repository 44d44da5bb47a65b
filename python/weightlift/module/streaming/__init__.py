"""Models that are larger than the memory they run in: their weights are read ahead of their use.

- `streamed_weight`: what hangs in a module in the place of a weight; each use of it asks the ring.
- `ring`: which block is in which buffer, what is read next, who waits for what; `learned_order`,
  beside this folder, says what is used next.
- `device_side`: the buffers of a device, and the order of its copies and its computing.
- `sources`: where weights lie: in files, or in the host's memory.
- `residency`: what a model is cut into, and what of it stays on the device.
- `executor`: the ring, with its thread.
- `handle`: the public call.
"""

from weightlift.module.streaming.handle import StreamHandle, stream

__all__ = ["StreamHandle", "stream"]

"""The threads of streams."""

from __future__ import annotations

import gc
import threading
import time


def streams(at_most: int = 9) -> int:
    """The number of streaming threads, after waiting for the expected number."""
    gc.collect()
    end = time.monotonic() + 5
    while True:
        count = sum(thread.name == "weightlift-stream" for thread in threading.enumerate())
        if count <= at_most or time.monotonic() > end:
            return count
        time.sleep(0.01)

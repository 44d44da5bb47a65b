"""Test code for each worker of vLLM: an extension of its class.

SERVING_TEST_DIES=RANK: that rank is killed while the weights of its model are handed out.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import torch

torch.accelerator.empty_cache = lambda: None  # it raises an error without an accelerator


class WorkerExtension:
    """Methods that `LLM.collective_rpc` calls."""

    model_runner: Any

    def lose_weights(self) -> None:
        """As after a sleep of level 2: the memory exists, but its content is lost."""
        for tensor in self.model_runner.get_model().parameters():
            tensor.data.fill_(0.125)

    def what_was_read(self) -> tuple[int, list[int]]:
        """(models whose loading was recorded, bytes of each load)."""
        return len(_recorders), [loader._reader.report.bytes for loader in _loaders]


_recorders: list[object] = []
_loaders: list[Any] = []


def _watch() -> None:
    from weightlift.backends.vllm import loader

    made, read = loader.Recorder, loader.WeightliftModelLoader.__init__

    def recorder(*args: Any, **kwargs: Any) -> Any:
        _recorders.append(made(*args, **kwargs))
        return _recorders[-1]

    def init(self: Any, load_config: Any) -> None:
        read(self, load_config)
        _loaders.append(self)

    loader.Recorder = recorder  # type: ignore[misc,assignment]
    loader.WeightliftModelLoader.__init__ = init  # type: ignore[method-assign]


def _die(dies: int) -> None:
    from vllm.distributed import get_tp_group

    from weightlift.backends.vllm import loader

    weights_of = loader.weights_of

    def dying(*args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for number, weight in enumerate(weights_of(*args, **kwargs)):
            if number == 3 and get_tp_group().rank_in_group == dies:
                os.kill(os.getpid(), signal.SIGKILL)
            yield weight

    loader.weights_of = dying


_watch()
if "SERVING_TEST_DIES" in os.environ:
    _die(int(os.environ["SERVING_TEST_DIES"]))

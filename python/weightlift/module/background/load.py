"""A load, and the modules that wait for it."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from weightlift.core import dtypes
from weightlift.core.errors import WeightliftError
from weightlift.core.report import LoadReport
from weightlift.load.arriving_load import ArrivingLoad
from weightlift.load.options import Progress
from weightlift.module.background.waiting import Awaited, Interest, Waiting
from weightlift.module.order_of_use import learn_order, order_of_use
from weightlift.module.parameters import ParameterRef, gather, set_all
from weightlift.module.placement import Placement

if TYPE_CHECKING:
    import torch

    from weightlift.checkpoint.checkpoint import Checkpoint
    from weightlift.load.load_plan import LoadPlan

__all__ = ["BackgroundLoad"]

# Tensors that are looked for together, beyond those that are asked for: more, as long as they are
# there.
_FEWEST_AHEAD = 4
_MOST_AHEAD = 256


class Completes(Protocol):
    """Who is told of the end; ``report.BackgroundReport``."""

    def complete(self, native: LoadReport) -> None: ...


class BackgroundLoad:
    """A load, and the modules that wait for it.

    Args:
        arriving: the load.
        awaited: its tensors, and their places.
        placement: the placement of the tensors.
        checkpoint: the checkpoint.
        memory_format: the memory format of tensors with 4 dimensions.
        identity: a key for models that use their tensors in the same order.

    Attributes:
        arriving: the load.
        lock: guards the modules' dicts; never held while waiting for the engine.
    """

    def __init__(
        self,
        arriving: ArrivingLoad,
        awaited: Sequence[tuple[Awaited, ParameterRef]],
        placement: Placement,
        checkpoint: Checkpoint,
        memory_format: torch.memory_format | None,
        identity: Hashable,
    ) -> None:
        self.arriving = arriving
        self.lock = threading.RLock()
        self.report: Callable[[], Completes | None] = _no_report
        self._recast = placement.recast  # the placement itself would keep the modules alive
        self._checkpoint = checkpoint
        self._memory_format = memory_format
        self._identity = identity
        self._hanging: Sequence[tuple[Awaited, ParameterRef]] = awaited
        self._awaited = [tensor for tensor, _ in awaited]
        self._left = len(awaited)
        self._interest: weakref.ref[Interest] | None = None
        self._after = 0  # in order of use, the first tensor that may not have been handed out
        self._ahead = _FEWEST_AHEAD
        self._used: list[str] | None = []  # in order of use; None if there is no useful order
        self._storages: set[int] = set()

    @classmethod
    def start(
        cls,
        identity: Hashable,
        plan: LoadPlan,
        placed: Placement,
        names: Sequence[str],
        checkpoint: Checkpoint,
        headers: Mapping[str, tuple[str, tuple[int, ...]]],
        memory_format: torch.memory_format | None,
    ) -> BackgroundLoad:
        """Starts a load; no module waits for it yet.

        Args:
            identity: a key for models that use their tensors in the same order.
            plan: the plan of the load, with all of ``placed``.
            placed: what goes where; all tensors are on ``meta`` now.
            names: the names of the model's tensors, in the order of its modules.
            checkpoint: the checkpoint.
            headers: its ``headers()``.
            memory_format: the memory format of 4-D tensors.
        """
        import torch

        by_name: dict[str, tuple[Awaited, ParameterRef]] = {}
        for group, members in placed.groups.items():
            for name, ref in members:
                made = placed.recast.get(name)
                if made is None:
                    made = dtypes.to_torch(group.cast_to or headers[name][0])
                by_name[ref.name] = (Awaited(name, ref, group.device, made), ref)
        order = order_of_use(identity, [name for name in names if name in by_name])
        awaited = [by_name[name] for name in order]
        with _outside_of_modes(torch):
            arriving = plan.start_in_order([tensor.source for tensor, _ in awaited])
        return cls(arriving, awaited, placed, checkpoint, memory_format, identity)

    def find_again(self, model: torch.nn.Module) -> None:
        """Finds the tensors' places again: other code may have tied or replaced them."""
        refs = {id(ref.tensor): ref for ref in gather(model).refs}
        self._hanging = [
            (tensor, refs.get(id(tensor.meta), ref))
            for tensor, ref in self._hanging
            if id(tensor.meta) in refs or _holds_meta(ref)
        ]
        self._awaited = [tensor for tensor, _ in self._hanging]
        self._left = len(self._awaited)

    def make_modules_wait(self) -> None:
        """Gives the modules what has arrived, and makes them wait for the rest from now on."""
        here = self._count_here()
        if here == len(self._hanging) and not self._ends_well():
            here = 0  # the first module that needs a tensor raises the error
        waited_for = self._hanging[here:]
        # Before any module waits: as a load that is not in the background would do it.
        self._attach_unwatched(self._hanging[:here])
        self._hanging = ()  # would keep the modules alive
        self._awaited = [tensor for tensor, _ in waited_for]
        if waited_for:
            self._watch(waited_for)

    def _count_here(self) -> int:
        """How many tensors have certainly arrived, the first in the order of use."""
        names = [tensor.source for tensor, _ in self._hanging]
        while names and not self._are_here(names):
            del names[len(names) // 2 :]
        return len(names)

    def _are_here(self, names: Sequence[str]) -> bool:
        try:
            return self.arriving.has(names)
        except WeightliftError:  # who needs them hears of it
            return False

    def _ends_well(self) -> bool:
        """Ends the load, all of whose tensors have arrived. No order is learned: nobody has used
        them."""
        try:
            self._say(self.arriving.finish())
        except WeightliftError:
            return False
        return True

    def _attach_unwatched(self, hanging: Sequence[tuple[Awaited, ParameterRef]]) -> None:
        """Puts arrived tensors into modules that do not wait."""
        import torch

        def made() -> Iterator[tuple[ParameterRef, torch.Tensor]]:
            for tensor, ref in hanging:
                value = self._made(tensor.source)
                _keep_marks(tensor, value)
                tensor.has_arrived = True
                if self._used is not None:
                    self._used.append(tensor.name)
                yield ref, value

        with _outside_of_modes(torch):
            set_all(made(), self._memory_format, adopt=self._checkpoint.is_plain)
        self._left -= len(hanging)

    def _watch(self, hanging: Iterable[tuple[Awaited, ParameterRef]]) -> None:
        """Makes modules wait."""
        interest = Interest()
        self._interest = weakref.ref(interest)
        weakref.finalize(interest, self.arriving.cancel)
        by_module: dict[int, tuple[torch.nn.Module, Waiting]] = {}
        for tensor, ref in hanging:
            for module, key in ((ref.module, ref.key), *((m, k) for _, m, k in ref.ties)):
                if id(module) not in by_module:
                    by_module[id(module)] = (module, Waiting(self, interest, module))
                waiting = by_module[id(module)][1]
                waiting.awaited[ref.is_parameter, key] = tensor
                tensor.places.append((weakref.ref(waiting), key))
        for module, waiting in by_module.values():
            waiting.watch(module)

    def bring(self, awaited: Sequence[Awaited], *, is_use: bool = True) -> None:
        """Waits for tensors, and puts them into their modules.

        Raises:
            WeightliftError: the load failed before they arrived.
        """
        import torch

        wanted = [tensor for tensor in awaited if not tensor.has_arrived]
        if not wanted:
            return
        # Kept, so that the load does not end when the last module gets its tensors.
        interest = None if self._interest is None else self._interest()
        self.arriving.wait_for([tensor.source for tensor in wanted])
        # Independent of the caller's modes: the tensors must be as if loaded before.
        with self.lock, _outside_of_modes(torch):
            self._attach(wanted)
            if is_use:
                self._attach_what_is_there()
            else:
                self._used = None
            has_all = self._left == 0
        if has_all:
            self._finish()
        del interest

    def _attach_what_is_there(self) -> None:
        """Those that come next in the order and have arrived: together they cost a part of what
        they cost one by one, and their modules need not ask. A wrong guess costs nothing: who is
        there before it is asked for is waited for by nobody. The lock is held."""
        following = []
        for number in range(self._after, len(self._awaited)):
            tensor = self._awaited[number]
            if not (tensor.has_arrived or tensor.is_attaching):
                if tensor.is_wanted:
                    following.append(tensor)
                if len(following) == self._ahead:
                    break
            elif not following:
                self._after = number + 1
        if not following or not self._are_here([tensor.source for tensor in following]):
            self._ahead = _FEWEST_AHEAD
            return
        self._attach(following)
        self._ahead = min(2 * self._ahead, _MOST_AHEAD)

    def _attach(self, tensors: Sequence[Awaited]) -> None:
        """Puts arrived tensors into their modules. The lock is held."""
        with contextlib.closing(self._arrived(tensors)) as values:
            set_all(values, self._memory_format, adopt=self._checkpoint.is_plain)

    def _arrived(
        self, tensors: Iterable[Awaited]
    ) -> Generator[tuple[ParameterRef, torch.Tensor], None, None]:
        """Places and values. One after the other: a module may read another of its tensors when one
        is set, and gets it here, in this thread."""
        for tensor in tensors:
            if tensor.has_arrived or tensor.is_attaching:
                continue
            tensor.is_attaching = True
            try:
                if tensor.value is None:
                    tensor.value = self._made(tensor.source)
                ref = tensor.ref()
                if ref is None:
                    tensor.forget()
                else:
                    _keep_marks(tensor, tensor.value)
                    yield ref, tensor.value
            finally:
                tensor.is_attaching = False
            tensor.has_arrived = True
            tensor.value = None
            self._left -= 1
            if self._used is not None:
                self._used.append(tensor.name)

    def _made(self, name: str) -> torch.Tensor:
        value: torch.Tensor = self.arriving.take(name)
        if name in self._recast:
            return value.to(self._recast[name])
        if not self._checkpoint.is_view(name):
            return value
        address = value.untyped_storage().data_ptr()
        if address in self._storages:  # separate parameters in the model
            return value.clone()
        self._storages.add(address)
        return value

    def wait(self, progress: Progress | None = None) -> None:
        """Waits until all modules have all tensors."""
        interest = None if self._interest is None else self._interest()
        native = self.arriving.finish(progress)
        self.bring(self._awaited, is_use=False)
        self._say(native)
        del interest

    def _finish(self) -> None:
        """Ends the load after the last tensor: completes the report, or raises a late error."""
        native = self.arriving.finish()
        if self._used is not None:
            learn_order(self._identity, self._used)
            self._used = None
        self._say(native)

    def _say(self, native: dict[str, Any]) -> None:
        report = self.report()
        if report is not None:
            report.complete(LoadReport.from_native(native))

    def cancel(self) -> None:
        """Ends the load; tensors that have not arrived stay on ``meta``, and no module waits."""
        self.arriving.cancel()
        with self.lock:
            for tensor in self._awaited:
                tensor.forget()


def _keep_marks(tensor: Awaited, value: torch.Tensor) -> None:
    """Keeps the attributes of a buffer: libraries mark those that are initialized."""
    if not tensor.is_parameter:  # set_all keeps a parameter's
        vars(value).update(vars(tensor.meta))


def _holds_meta(ref: ParameterRef) -> bool:
    held = ref.module._parameters if ref.is_parameter else ref.module._buffers
    tensor = held.get(ref.key)
    return tensor is not None and tensor.is_meta and tensor.shape == ref.tensor.shape


def _outside_of_modes(torch: Any) -> contextlib.AbstractContextManager[Any]:
    """Where what is made is no tensor of inference mode, and autograd does not look; entering a
    mode takes longer than giving a tensor to its module."""
    if torch.is_inference_mode_enabled():
        stack = contextlib.ExitStack()
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        return stack
    return torch.no_grad() if torch.is_grad_enabled() else contextlib.nullcontext()


def _no_report() -> None:
    return None

"""Modules that are used while their tensors are still being loaded.

What has not arrived is on ``meta``. Its module waits for its own tensors in a forward pre-hook.
Whoever reads ``_parameters`` or ``_buffers`` otherwise (attributes, ``state_dict()``, ``to()``,
copies, pickles) waits for what he reads: until then both are dicts that wait (``_WaitingTensors``).
When the last tensor of a module is there, its hook is gone and its dicts are plain ones.

A module keeps its load alive and not the other way round: nobody needs the rest when all modules
that wait for it are gone.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from weightlift.core import dtypes
from weightlift.core.errors import ArgumentError
from weightlift.core.report import LoadProgress, LoadReport, format_bytes, set_last_report
from weightlift.load.arriving_load import ArrivingLoad
from weightlift.load.options import LoadOptions, Progress
from weightlift.load.plans import progress_callback
from weightlift.module.order_of_use import learn_order, order_of_use
from weightlift.module.parameters import ParameterRef, gather, is_sharded, set_all
from weightlift.module.placement import Placement

if TYPE_CHECKING:
    import torch

    from weightlift.checkpoint.checkpoint import Checkpoint
    from weightlift.load.load_plan import LoadPlan

__all__ = [
    "BackgroundLoad",
    "BackgroundReport",
    "holding_back",
    "require_one_device",
    "split_by_meta",
    "tensors_to_come",
]


class _Awaited:
    """A tensor of the model that has not arrived.

    Attributes:
        source: its name in the checkpoint.
        meta: what is in its place.
        device: where it will be.
        dtype: that it will have.
        places: where it hangs: the modules that wait for it, and its key there.
        has_arrived: it is the modules' own.
        is_attaching: it is just being given to them.
        value: what has arrived, until then.
    """

    __slots__ = (
        "device",
        "dtype",
        "has_arrived",
        "is_attaching",
        "is_parameter",
        "meta",
        "name",
        "places",
        "source",
        "value",
    )

    def __init__(
        self, source: str, ref: ParameterRef, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.source = source
        self.name = ref.name
        self.meta = ref.tensor
        self.is_parameter = ref.is_parameter
        self.device = device
        self.dtype = dtype
        self.places: list[tuple[weakref.ref[_Waiting], str]] = []
        self.has_arrived = False
        self.is_attaching = False
        self.value: torch.Tensor | None = None

    def forget(self) -> None:
        """Nobody waits for it any more. The load's lock is held."""
        for place, key in self.places:
            waiting = place()
            if waiting is not None and waiting.awaited.get((self.is_parameter, key)) is self:
                waiting.forget(self.is_parameter, key)

    def ref(self) -> ParameterRef | None:
        """Where it hangs now; ``None`` where it is not wanted any more."""
        found: list[tuple[str, torch.nn.Module, str]] = []
        for place, key in self.places:
            waiting = place()
            module = None if waiting is None else waiting.module()
            if waiting is None or module is None:
                continue
            if waiting.awaited.get((self.is_parameter, key)) is self:
                found.append((self.name, module, key))
        if not found:
            return None
        (name, module, key), *ties = found
        return ParameterRef(self.meta, self.is_parameter, True, name, module, key, tuple(ties))


class _Interest:
    """Of all modules that wait together: when it is gone nobody waits any more."""

    __slots__ = ("__weakref__",)


class _Waiting:
    """What one module waits for; its forward pre-hook."""

    __slots__ = ("__weakref__", "awaited", "handle", "interest", "load", "module")

    # torch.compile runs it and does not trace it.
    _torchdynamo_disable = True

    def __init__(self, load: BackgroundLoad, interest: _Interest, module: torch.nn.Module) -> None:
        self.load = load
        self.interest: _Interest | None = interest
        self.module = weakref.ref(module)
        # By (whether it is a parameter, key).
        self.awaited: dict[tuple[bool, str], _Awaited] = {}
        self.handle: Any = None

    def __call__(self, module: torch.nn.Module, args: Any) -> None:
        self.load.bring(list(self.awaited.values()))

    def watch(self, module: torch.nn.Module) -> None:
        """Makes the module wait, from now on."""
        held = vars(module)
        for is_parameter, name in ((True, "_parameters"), (False, "_buffers")):
            if any(is_parameter == kind for kind, _ in self.awaited):
                held[name] = _WaitingTensors(held[name], self, is_parameter)
        self.handle = module.register_forward_pre_hook(self, prepend=True)

    def forget(self, is_parameter: bool, key: str) -> None:
        """A tensor is there, or not wanted any more. The load's lock is held."""
        self.awaited.pop((is_parameter, key), None)
        if not self.awaited:
            self._release()

    def _release(self) -> None:
        """Makes the module one that never waited."""
        module = self.module()
        if module is not None:
            for name in ("_parameters", "_buffers"):
                tensors = vars(module)[name]
                if isinstance(tensors, _WaitingTensors) and tensors.waiting is self:
                    vars(module)[name] = tensors.settle()
        if self.handle is not None:
            self.handle.remove()
        self.interest = None


class _WaitingTensors(dict[str, Any]):
    """``_parameters`` or ``_buffers`` of a module that waits: who reads a tensor waits for it.

    Once it is settled it hands on to the plain dict that has taken its place, for those who still
    have it in their hands.
    """

    __slots__ = ("is_parameters", "plain", "waiting")

    def __init__(self, tensors: Mapping[str, Any], waiting: _Waiting, is_parameters: bool) -> None:
        super().__init__(tensors)
        self.waiting = waiting
        self.is_parameters = is_parameters
        self.plain: dict[str, Any] | None = None

    def settle(self) -> dict[str, Any]:
        if self.plain is None:
            self.plain = dict(dict.items(self))
        return self.plain

    def awaited(self, key: str) -> _Awaited | None:
        return self.waiting.awaited.get((self.is_parameters, key))

    def bring(self) -> dict[str, Any]:
        """All of them; a copy."""
        for key in self:
            self[key]
        return dict(dict.items(self)) if self.plain is None else dict(self.plain)

    def __getitem__(self, key: str) -> Any:
        if (awaited := self.awaited(key)) is not None:
            self.waiting.load.bring([awaited])
        return dict.__getitem__(self, key) if self.plain is None else self.plain[key]

    def __setitem__(self, key: str, value: Any) -> None:
        with self.waiting.load.lock:
            dict.__setitem__(self, key, value)
            if self.plain is not None:
                self.plain[key] = value
            self.waiting.forget(self.is_parameters, key)

    def __delitem__(self, key: str) -> None:
        with self.waiting.load.lock:
            if self.plain is None:
                dict.__delitem__(self, key)
            else:
                del self.plain[key]
                dict.pop(self, key, None)  # others may have put it there
            self.waiting.forget(self.is_parameters, key)

    # In Python, so that dict() and ** come by __getitem__.
    def __iter__(self) -> Iterator[str]:
        return iter(list(dict.keys(self) if self.plain is None else self.plain.keys()))

    def __len__(self) -> int:
        return dict.__len__(self) if self.plain is None else len(self.plain)

    def __contains__(self, key: object) -> bool:
        return dict.__contains__(self, key) if self.plain is None else key in self.plain

    # By the methods above, one item at a time; those of dict read and write its memory.
    keys = MutableMapping.keys  # type: ignore[assignment]
    items = MutableMapping.items  # type: ignore[assignment]
    values = MutableMapping.values  # type: ignore[assignment]
    get = MutableMapping.get  # type: ignore[assignment]
    popitem = MutableMapping.popitem
    setdefault = MutableMapping.setdefault
    update = MutableMapping.update
    clear = MutableMapping.clear

    def pop(self, key: str, *default: Any) -> Any:
        if default and key not in self:
            return default[0]
        value = self[key]
        del self[key]
        return value

    def copy(self) -> dict[str, Any]:
        return self.bring()

    def __or__(self, other: Any) -> Any:
        return self.bring() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.bring()

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __copy__(self) -> dict[str, Any]:
        return self.bring()

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self.bring(), memo)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return dict, (self.bring(),)


class BackgroundLoad:
    """A load, and the modules that wait for it.

    Args:
        arriving: the load.
        awaited: its tensors, and where they go.
        placement: what else is to be done to them.
        checkpoint: they are from.
        memory_format: of those with 4 dimensions.
        identity: what models have in common that use their tensors in the same order.

    Attributes:
        arriving: the load.
        lock: guards what the modules have; nobody waits for the engine with it held.
    """

    def __init__(
        self,
        arriving: ArrivingLoad,
        awaited: Sequence[tuple[_Awaited, ParameterRef]],
        placement: Placement,
        checkpoint: Checkpoint,
        memory_format: torch.memory_format | None,
        identity: object,
    ) -> None:
        self.arriving = arriving
        self.lock = threading.RLock()
        self.report: Callable[[], BackgroundReport | None] = _no_report
        self._recast = placement.recast  # not all of it: it holds the modules
        self._checkpoint = checkpoint
        self._memory_format = memory_format
        self._identity = identity
        self._hanging: Sequence[tuple[_Awaited, ParameterRef]] = awaited
        self._awaited = [tensor for tensor, _ in awaited]
        self._left = len(awaited)
        self._interest: weakref.ref[_Interest] | None = None
        self._used: list[str] | None = []  # in their order; None where that says nothing
        self._storages: set[int] = set()

    @classmethod
    def start(
        cls,
        model: torch.nn.Module,
        plan: LoadPlan,
        placed: Placement,
        checkpoint: Checkpoint,
        memory_format: torch.memory_format | None,
    ) -> BackgroundLoad:
        """Starts a load; nobody waits for it yet.

        Args:
            model: that the tensors are of.
            plan: of the load, with all of ``placed``.
            placed: what goes where; all on ``meta`` now.
            checkpoint: it comes from.
            memory_format: of 4-D tensors.
        """
        awaited = []
        for group, members in placed.groups.items():
            for name, ref in members:
                made = placed.recast.get(name)
                if made is None:
                    made = dtypes.to_torch(group.cast_to or checkpoint[name][0])
                awaited.append((_Awaited(name, ref, group.device, made), ref))
        identity = (type(model).__module__, type(model).__qualname__, len(awaited))
        by_name = {tensor.name: tensor.source for tensor, _ in awaited}
        order = [by_name[name] for name in order_of_use(identity, model, list(by_name))]
        arriving = plan.start_in_order(order)
        return cls(arriving, awaited, placed, checkpoint, memory_format, identity)

    def hold_back(self, model: torch.nn.Module, options: LoadOptions) -> BackgroundReport:
        """Makes the modules wait; within ``holding_back`` when that has ended. Its report."""
        report = BackgroundReport(self, LoadReport(), options)
        held_back = _held_back.get()
        if held_back is None:
            self.make_modules_wait()
        else:
            held_back.append(_HeldBack(self, model, report))
        return report

    def find_again(self, model: torch.nn.Module) -> None:
        """Looks where the tensors hang by now: somebody may have tied or replaced them."""
        refs = {id(ref.tensor): ref for ref in gather(model)[0]}
        self._hanging = [
            (tensor, refs.get(id(tensor.meta), ref))
            for tensor, ref in self._hanging
            if id(tensor.meta) in refs or _holds_meta(ref)
        ]
        self._awaited = [tensor for tensor, _ in self._hanging]
        self._left = len(self._awaited)

    def make_modules_wait(self) -> None:
        """From now on who needs a tensor waits for it."""
        interest = _Interest()
        self._interest = weakref.ref(interest)
        weakref.finalize(interest, self.arriving.cancel)
        by_module: dict[int, tuple[torch.nn.Module, _Waiting]] = {}
        for tensor, ref in self._hanging:
            for module, key in ((ref.module, ref.key), *((m, k) for _, m, k in ref.ties)):
                if id(module) not in by_module:
                    by_module[id(module)] = (module, _Waiting(self, interest, module))
                waiting = by_module[id(module)][1]
                waiting.awaited[ref.is_parameter, key] = tensor
                tensor.places.append((weakref.ref(waiting), key))
        self._hanging = ()  # which would keep the modules
        for module, waiting in by_module.values():
            waiting.watch(module)

    def bring(self, awaited: Sequence[_Awaited], *, is_use: bool = True) -> None:
        """Waits for tensors, and gives them to their modules.

        Raises:
            WeightliftError: the load has failed before they came.
        """
        import torch

        wanted = [tensor for tensor in awaited if not tensor.has_arrived]
        if not wanted:
            return
        # Not to be taken for given up when the last module has its tensors.
        interest = None if self._interest is None else self._interest()
        self.arriving.wait_for([tensor.source for tensor in wanted])
        # Whatever the forward pass is in: these are the model's own, as if loaded before it.
        with self.lock, torch.inference_mode(False), torch.no_grad():
            for tensor in wanted:
                if not (tensor.has_arrived or tensor.is_attaching):
                    self._attach(tensor)
                    if self._used is not None:
                        self._used.append(tensor.name)
            if not is_use:
                self._used = None
            has_all = self._left == 0
        if has_all:
            self._finish()
        del interest

    def _attach(self, tensor: _Awaited) -> None:
        """Gives a tensor that has arrived to its modules. Setting it may read it: that is this
        thread, which has the lock."""
        tensor.is_attaching = True
        try:
            if tensor.value is None:
                tensor.value = self._made(tensor.source)
            ref = tensor.ref()
            if ref is not None:
                if not ref.is_parameter:  # libraries note what they have initialized
                    vars(tensor.value).update(vars(tensor.meta))
                values = [(ref, tensor.value)]
                set_all(values, self._memory_format, adopt=self._checkpoint.is_plain)
        finally:
            tensor.is_attaching = False
        tensor.has_arrived = True
        tensor.value = None
        self._left -= 1
        tensor.forget()

    def _made(self, name: str) -> torch.Tensor:
        value: torch.Tensor = self.arriving.take(name)
        if name in self._recast:
            return value.to(self._recast[name])
        if not self._checkpoint.is_view(name):
            return value
        address = value.untyped_storage().data_ptr()
        if address in self._storages:  # separate parameters, where the model has them so
            return value.clone()
        self._storages.add(address)
        return value

    def wait(self, progress: Progress | None = None) -> None:
        """Until all modules have all."""
        interest = None if self._interest is None else self._interest()
        native = self.arriving.finish(progress)
        self.bring(self._awaited, is_use=False)
        self._say(native)
        del interest

    def _finish(self) -> None:
        """When all tensors were handed out: says what the load did, or that it failed after all."""
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
        """Ends it; what has not arrived is on ``meta`` for good, and nobody waits for it."""
        self.arriving.cancel()
        with self.lock:
            for tensor in self._awaited:
                tensor.forget()


class _HeldBack(NamedTuple):
    """A load whose model somebody still has in hand."""

    load: BackgroundLoad
    model: torch.nn.Module
    report: BackgroundReport


_held_back: ContextVar[list[_HeldBack] | None] = ContextVar(
    "weightlift_held_back_loads", default=None
)


@contextlib.contextmanager
def holding_back() -> Iterator[None]:
    """Around code of a library that looks at the tensors of a model which begins to load within
    it: the model's modules wait from its end on. Where it fails the load is cancelled."""
    held_back: list[_HeldBack] = []
    token = _held_back.set(held_back)
    try:
        yield
        for load, model, report in held_back:
            load.find_again(model)
            load.make_modules_wait()
            set_last_report(report)
    except BaseException:
        for load, _, _ in held_back:
            load.cancel()
        raise
    finally:
        _held_back.reset(token)


def _holds_meta(ref: ParameterRef) -> bool:
    held = ref.module._parameters if ref.is_parameter else ref.module._buffers
    tensor = held.get(ref.key)
    return tensor is not None and tensor.is_meta and tensor.shape == ref.tensor.shape


def _no_report() -> None:
    return None


class BackgroundReport(LoadReport):
    """The report of a load that goes on, and its handle. What the load did, such as ``bytes`` and
    ``seconds``, is in it when the load has ended: after ``wait()``, or when the last module has
    taken its tensors; the names of tensors are at once."""

    def __init__(self, load: BackgroundLoad, earlier: LoadReport, options: LoadOptions) -> None:
        super().__init__()
        self._load = load
        self.earlier = earlier  # what was read before it
        self._progress = options.progress
        self._is_complete = False
        load.report = weakref.ref(self)

    def wait(self) -> LoadReport:
        """Until all tensors are the model's; itself. Ctrl-C ends the wait, and not the load.

        Raises:
            LoadCancelledError: the load was cancelled.
            WeightliftError: the load has failed.
        """
        with progress_callback(self._progress) as show:
            self._load.wait(show)
        return self

    @property
    def progress(self) -> LoadProgress:
        """How far it is."""
        done, total = self._load.arriving.progress()
        earlier = self.earlier.bytes
        return LoadProgress(done + earlier, total + earlier)

    def cancel(self) -> None:
        """Ends the load; what has not arrived stays on ``meta``."""
        self._load.cancel()

    def complete(self, native: LoadReport) -> None:
        """The load has ended."""
        if self._is_complete:
            return
        self._is_complete = True
        done = native.plus(self.earlier)
        names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "meta_keys")
        self.__dict__.update((k, v) for k, v in vars(done).items() if k not in names)

    def __str__(self) -> str:
        if self._is_complete:
            return super().__str__()
        done, total = self.progress
        return f"{format_bytes(done)} of {format_bytes(total)} so far"


def require_one_device(by_prefix: Mapping[str, torch.device | str] | None) -> None:
    """Raises an ``ArgumentError`` where a device map has more than one, or the disk."""
    devices = sorted({str(device) for device in (by_prefix or {}).values()})
    if len(devices) > 1 or "disk" in devices:
        raise ArgumentError(
            f"background=True is for models on one device, and the device map has "
            f"{', '.join(devices)}: load without it, or with device_map= of one device"
        )


def split_by_meta(placed: Placement) -> tuple[Placement, Placement]:
    """What goes to tensors on ``meta``, and can come later; and what goes to real ones: buffers,
    which most modules make themselves.

    Raises:
        ArgumentError: of the parameters, some are real, stay on the disk, or are DTensors.
    """
    later = placed._replace(groups={}, on_disk=[])
    now = placed._replace(groups={})
    for group, members in placed.groups.items():
        for name, ref in members:
            _check(ref)
            part = later if ref.tensor.is_meta else now
            part.groups.setdefault(group, []).append((name, ref))
    return later, now


def _check(ref: ParameterRef) -> None:
    if is_sharded(ref.tensor):
        raise ArgumentError(
            f"background=True cannot be combined with DTensors such as {ref.name!r}: ranks that "
            "load together wait for each other"
        )
    if ref.is_parameter and not ref.tensor.is_meta:
        raise ArgumentError(
            f"background=True replaces parameters on meta, and {ref.name!r} is real: what it holds "
            "could be used before it is loaded. Build the model under torch.device('meta') or "
            "accelerate.init_empty_weights(), or load without background=True"
        )


def tensors_to_come(
    model: torch.nn.Module, kind: Literal["_parameters", "_buffers"] = "_parameters"
) -> Iterator[tuple[str, torch.device, torch.dtype]]:
    """(name, device, dtype) of the parameters or buffers, as they are or will be, without waiting
    for any."""
    for prefix, module in model.named_modules():
        tensors = vars(module)[kind]
        for key, tensor in dict.items(tensors):
            if tensor is None:
                continue
            awaited = tensors.awaited(key) if isinstance(tensors, _WaitingTensors) else None
            held = tensor if awaited is None else awaited
            yield f"{prefix}.{key}" if prefix else key, held.device, held.dtype

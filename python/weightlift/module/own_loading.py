"""Modules with their own loading: old names, hooks, counters, extra state."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from weightlift.checkpoint.checkpoint import Checkpoint
from weightlift.core.errors import ArgumentError
from weightlift.core.report import LoadReport
from weightlift.load.options import LoadOptions
from weightlift.module.parameters import ParameterRef, parameter_refs

if TYPE_CHECKING:
    import torch

    from weightlift.module.recording.recorder import Recorder

__all__ = ["OwnLoading", "modules_with_own_loading", "record_own_loading"]

Headers = Mapping[str, "tuple[str, tuple[int, ...]]"]


class OwnLoading(NamedTuple):
    """The result of the modules' own loading.

    Attributes:
        refs: the model's tensors, which the modules may have replaced.
        matched: (name in the checkpoint, tensor of the model) to load whole.
        filled: tensors of the model that have their values.
        values: tensors that were on ``meta``, and their values.
        prefixes: the prefixes of the modules.
        claimed: names in the checkpoint that the modules received.
        missing: names that the modules did not find.
        unexpected: names that the modules do not have.
        errors: the modules' error messages.
        report: the report of the reads.
    """

    refs: list[ParameterRef]
    matched: list[tuple[str, ParameterRef]]
    filled: list[ParameterRef]
    values: list[tuple[ParameterRef, torch.Tensor]]
    prefixes: tuple[str, ...]
    claimed: set[str]
    missing: list[str]
    unexpected: list[str]
    errors: list[str]
    report: LoadReport

    def values_by_name(self) -> list[tuple[str, torch.Tensor]]:
        return [(ref.name, value) for ref, value in self.values]

    def others(self) -> list[ParameterRef]:
        """Tensors to load by their names."""
        done = self._done()
        return [
            ref
            for ref in self.refs
            if id(ref) not in done and not all(n.startswith(self.prefixes) for n in ref.names)
        ]

    def rest(self) -> list[ParameterRef]:
        """Tensors of the modules that need no more work."""
        others = {id(ref) for ref in self.others()}
        others.update(id(ref) for _, ref in self.matched)
        others.update(id(ref) for ref, _ in self.values)
        return [ref for ref in self.refs if id(ref) not in others]

    def mismatched(
        self, headers: Headers
    ) -> tuple[list[tuple[str, tuple[int, ...], tuple[int, ...]]], list[str]]:
        """(name, shape in the checkpoint, shape in the model) of tensors skipped for their shape,
        and the modules' other errors."""
        done = self._done()
        found = [
            (name, headers[name][1], tuple(ref.tensor.shape))
            for ref in self.rest()
            if id(ref) not in done
            for name in ref.names
            if name in self.claimed and headers[name][1] != ref.tensor.shape
        ]
        prefix = "size mismatch for " if found else None
        errors = [text for text in self.errors if prefix is None or not text.startswith(prefix)]
        return found, errors

    def _done(self) -> set[int]:
        refs = [*(ref for _, ref in self.matched), *self.filled, *(ref for ref, _ in self.values)]
        return {id(ref) for ref in refs}


def modules_with_own_loading(
    model: torch.nn.Module, headers: Headers
) -> list[tuple[str, torch.nn.Module]]:
    """(prefix, module) of the outermost modules whose ``load_state_dict`` does more than copy
    tensors to the same names."""
    if type(model).load_state_dict is not _module_class().load_state_dict and _is_plain(model):
        return [("", model)]
    if not _any_special(model):  # most models
        return []
    found: list[tuple[str, torch.nn.Module]] = []
    waiting = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if _has_own(module) and _matters(module, prefix, headers):
            found.append((prefix, module))
            continue
        if children := module._modules:
            for key, child in reversed(children.items()):
                if child is not None:
                    waiting.append((f"{prefix}{key}.", child))
    return found


def record_own_loading(
    model: torch.nn.Module,
    modules: Sequence[tuple[str, torch.nn.Module]],
    checkpoint: Checkpoint,
    headers: Headers,
    options: LoadOptions,
) -> OwnLoading:
    """Runs the modules' own loading, as ``load_state_dict`` does, with tensors that have no bytes.
    Copies of whole tensors to whole tensors are left for the common load; all others are done here.

    Args:
        model: the model.
        modules: the result of ``modules_with_own_loading``.
        checkpoint: the checkpoint.
        headers: its headers.
        options: how to load.
    """
    import torch

    from weightlift.module.recording.reader import CheckpointReader, sources_of
    from weightlift.module.recording.recorder import Recorder

    reader = CheckpointReader(checkpoint, options)
    recorder = Recorder(reader)
    recorder.expect((ref.name, ref.tensor) for ref in parameter_refs(model))
    prefixes = tuple(prefix for prefix, _ in modules)
    names = [name for name in headers if name.startswith(prefixes)]
    missing: list[str] = []
    unexpected: list[str] = []
    errors: list[str] = []
    state: dict[str, torch.Tensor] = {}
    for name, source in sources_of(checkpoint, names).items():
        if source is None:
            state[name] = reader.tensors([name])[name]
        else:
            state[name] = recorder.placeholder(name, source)
    with recorder.watching(), torch.no_grad():
        for prefix, module in modules:
            _run(module, state, prefix, missing, unexpected, errors)
    state.clear()  # a tensor that is kept here would be read for its own sake
    refs = parameter_refs(model)
    matched, filled, hanging = _sort_out(refs, recorder, headers)
    recorder.allocate()
    recorder.finish()
    recorder.replace_kept()
    values = []
    for ref in hanging:
        value = recorder.real_target(ref.tensor)
        if value is not None:
            values.append((ref, value.data))  # .data has its own version counter
    done = {name for _, ref in matched for name in ref.names}
    done.update(name for ref in (*filled, *hanging) for name in ref.names)
    return OwnLoading(
        refs,
        matched,
        filled,
        values,
        prefixes,
        set(names),
        [name for name in missing if name not in done],
        unexpected,
        errors,
        reader.report,
    )


def _sort_out(
    refs: Sequence[ParameterRef], recorder: Recorder, headers: Headers
) -> tuple[list[tuple[str, ParameterRef]], list[ParameterRef], list[ParameterRef]]:
    """Splits the recorded writes: whole tensors, which leave the recorder; other writes to real
    tensors; other writes to tensors on ``meta``."""
    matched: list[tuple[str, ParameterRef]] = []
    filled: list[ParameterRef] = []
    hanging: list[ParameterRef] = []
    kept = recorder.kept()
    taken: set[str] = set()
    for ref in refs:
        if ref.tensor in kept:
            filled.append(ref)
            continue
        name = recorder.take_whole(ref.tensor, headers, taken)
        if name is not None:
            matched.append((name, ref))
        elif recorder.is_written(ref.tensor):
            (hanging if ref.tensor.is_meta else filled).append(ref)
    return matched, filled, hanging


def _run(
    module: torch.nn.Module,
    state: dict[str, torch.Tensor],
    prefix: str,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """A module's own ``load_state_dict``, or, below the model, the part of torch's."""
    if type(module).load_state_dict is not _module_class().load_state_dict and not prefix:
        result = module.load_state_dict(dict(state), strict=False)
        missing += getattr(result, "missing_keys", ())
        unexpected += getattr(result, "unexpected_keys", ())
    else:
        own = {name: value for name, value in state.items() if name.startswith(prefix)}
        _load(module, own, prefix, missing, unexpected, errors)


def _load(
    module: torch.nn.Module,
    state: dict[str, torch.Tensor],
    prefix: str,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """The inner ``load`` of ``torch.nn.Module.load_state_dict``, from a module on."""
    from torch.nn.modules.module import _IncompatibleKeys

    module._load_from_state_dict(state, prefix, {}, True, missing, unexpected, errors)
    for key, child in module._modules.items():
        if child is not None:
            inner = f"{prefix}{key}."
            own = {name: value for name, value in state.items() if name.startswith(inner)}
            _load(child, own, inner, missing, unexpected, errors)
    for hook in module._load_state_dict_post_hooks.values():
        result = hook(module, _IncompatibleKeys(missing, unexpected))
        if result is not None:
            raise ArgumentError(
                f"{type(module).__name__}: a hook of register_load_state_dict_post_hook must "
                "return None; to change the keys, change its argument"
            )


def _module_class() -> type[torch.nn.Module]:
    from torch.nn import Module

    return Module


def _any_special(model: torch.nn.Module) -> bool:
    modules = [model]
    for module in modules:  # grows during the loop
        if children := module._modules:
            modules += [child for child in children.values() if child is not None]
    return any(map(_is_special, set(map(type, modules)))) or any(
        module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks
        for module in modules
    )


def _has_own(module: torch.nn.Module) -> bool:
    return bool(
        _is_special(type(module))
        or module._load_state_dict_pre_hooks
        or module._load_state_dict_post_hooks
    )


# Cached by class: a model has many modules of few classes. Weak, because classes may be deleted.
_special: weakref.WeakKeyDictionary[type, bool] = weakref.WeakKeyDictionary()


def _is_special(kind: type[torch.nn.Module]) -> bool:
    known = _special.get(kind)
    if known is None:
        base = _module_class()
        known = _special[kind] = (
            kind._load_from_state_dict is not base._load_from_state_dict
            or kind.set_extra_state is not base.set_extra_state
        )
    return known


def _matters(module: torch.nn.Module, prefix: str, headers: Headers) -> bool:
    """Whether a module's own loading can change the result."""
    from torch.nn.modules.batchnorm import _NormBase

    kind = type(module)
    hooks = module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks
    # Of old checkpoints the counter is missing; nothing else is done.
    counts = kind._load_from_state_dict is _NormBase._load_from_state_dict
    if counts and not hooks and f"{prefix}num_batches_tracked" in headers:
        return False
    return _is_plain(module)


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether its tensors have torch's own classes. The plan cuts DTensors into parts (FSDP's hook
    on each module only makes DTensors), and quantizers make quantized tensors."""
    import torch
    from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

    known = (torch.nn.Parameter, UninitializedParameter, UninitializedBuffer, torch.Tensor)
    held = (tensor for part in module.modules() for tensor in _tensors_of(part))
    return all(type(tensor) in known for tensor in held)


def _tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    held = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in held if tensor is not None]

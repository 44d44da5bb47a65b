"""Modules that do something of their own while they load: old names, hooks, counters, state."""

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
    """What the modules made of the checkpoint.

    Attributes:
        refs: the model's tensors, which may be others than before.
        matched: (name in the checkpoint, tensor of the model): to be loaded as a whole.
        filled: tensors of the model that have their values.
        values: those that hung on ``meta``, and their values.
        prefixes: of the modules.
        claimed: names in the checkpoint that the modules were shown.
        missing: names that they did not find.
        unexpected: names that they have no place for.
        errors: what they complain about.
        report: of what was read.
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
        """Tensors that are to be loaded by their names."""
        done = self._done()
        return [
            ref
            for ref in self.refs
            if id(ref) not in done and not all(n.startswith(self.prefixes) for n in ref.names)
        ]

    def rest(self) -> list[ParameterRef]:
        """Those of the modules that need nothing more."""
        others = {id(ref) for ref in self.others()}
        others.update(id(ref) for _, ref in self.matched)
        others.update(id(ref) for ref, _ in self.values)
        return [ref for ref in self.refs if id(ref) not in others]

    def mismatched(
        self, headers: Headers
    ) -> tuple[list[tuple[str, tuple[int, ...], tuple[int, ...]]], list[str]]:
        """(name, shape in the checkpoint, shape in the model) of those left out for their shape;
        and what else the modules complain about."""
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
    """(prefix, module) of the outermost modules whose ``load_state_dict`` is more than copies of
    tensors to where they are called the same."""
    if type(model).load_state_dict is not _module_class().load_state_dict and _is_plain(model):
        return [("", model)]
    if not _any_special(model):  # most models: they pay a look at each module, and nothing more
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
    """Lets modules load as they do in ``load_state_dict``, with tensors that have no bytes. What
    comes of it that is a whole tensor for a whole tensor is left to be loaded with the others; all
    else is done.

    Args:
        model: that the modules are of.
        modules: of ``modules_with_own_loading``.
        checkpoint: what there is.
        headers: of it.
        options: how it is loaded.
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
            if type(module).load_state_dict is not _module_class().load_state_dict and not prefix:
                result = module.load_state_dict(dict(state), strict=False)
                missing += getattr(result, "missing_keys", ())
                unexpected += getattr(result, "unexpected_keys", ())
            else:
                own = {name: value for name, value in state.items() if name.startswith(prefix)}
                _load(module, own, prefix, missing, unexpected, errors)
    state.clear()
    refs = parameter_refs(model)
    matched, filled, hanging = _sort_out(refs, recorder, headers)
    recorder.allocate()
    recorder.finish()
    recorder.replace_kept()
    values = []
    for ref in hanging:
        value = recorder.real_target(ref.tensor)
        if value is not None:
            values.append((ref, value.data))  # with a version of its own
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
    """What is to be loaded as a whole, and is no more the recorder's; what is written otherwise to
    real tensors; and to those on ``meta``."""
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


def _load(
    module: torch.nn.Module,
    state: dict[str, torch.Tensor],
    prefix: str,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """As ``load`` within ``torch.nn.Module.load_state_dict``, from a module on."""
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
                "return None; it can change the keys that it is given"
            )


def _module_class() -> type[torch.nn.Module]:
    from torch.nn import Module

    return Module


def _any_special(model: torch.nn.Module) -> bool:
    modules = [model]
    for module in modules:  # it grows
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


# By class, for a model has many modules of few classes; weakly, as classes are made and dropped.
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
    """Whether what a module does of its own can change what is loaded."""
    from torch.nn.modules.batchnorm import _NormBase

    kind = type(module)
    hooks = module._load_state_dict_pre_hooks or module._load_state_dict_post_hooks
    # Of old checkpoints the counter is missing; nothing else is done.
    counts = kind._load_from_state_dict is _NormBase._load_from_state_dict
    if counts and not hooks and f"{prefix}num_batches_tracked" in headers:
        return False
    return _is_plain(module)


def _is_plain(module: torch.nn.Module) -> bool:
    """Whether its tensors are of torch's own classes: DTensors take their parts by our plan (the
    hook that FSDP gives each module only brings them into that form), and quantized tensors what
    their quantizer makes."""
    import torch
    from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

    known = (torch.nn.Parameter, UninitializedParameter, UninitializedBuffer, torch.Tensor)
    held = (tensor for part in module.modules() for tensor in _tensors_of(part))
    return all(type(tensor) in known for tensor in held)


def _tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    held = [*module._parameters.values(), *module._buffers.values()]
    return [tensor for tensor in held if tensor is not None]

"""The tensors and modules of a model, compared with torch's own walks."""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch

from weightlift.module.parameters import gather


class Leaf(torch.nn.Module):
    def __init__(self, parameter: torch.nn.Parameter | None = None) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(2)) if parameter is None else parameter
        self.register_parameter("bias", None)
        self.register_buffer("kept", torch.zeros(1))
        self.register_buffer("unsaved", torch.zeros(1), persistent=False)
        self.register_buffer("absent", None)


class OwnSetattr(Leaf):
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)


def tree() -> torch.nn.Module:
    """Tied parameters, a module in two places, places without a module, an order of its own."""
    model = torch.nn.Module()
    model.first = Leaf()
    model.second = torch.nn.Sequential(Leaf(model.first.weight), OwnSetattr(), torch.nn.LSTM(2, 2))
    model.again = model.second[0]
    model.register_module("none", None)
    model.second.register_buffer("tied_unsaved", torch.zeros(3), persistent=False)
    model.again.register_buffer("tied", model.second.tied_unsaved)
    ordered = collections.OrderedDict(model._modules)
    ordered.move_to_end("first")
    model._modules = ordered  # type: ignore[assignment]
    return model


def test_the_tensors_and_modules_are_those_of_torch() -> None:
    model = tree()
    gathered = gather(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    assert [id(module) for module in gathered.modules] == [id(m) for m in modules.values()]
    assert gathered.classes == {type(module) for module in modules.values()}
    assert not gathered.have_load_hooks

    expected = dict(model.named_parameters(remove_duplicate=False))
    parameters = set(expected)
    expected |= dict(model.named_buffers(remove_duplicate=False))
    found = {name: ref for ref in gathered.refs for name in ref.names}
    assert found.keys() == expected.keys()
    saved = model.state_dict(keep_vars=True)
    for name, ref in found.items():
        assert ref.tensor is expected[name]
        assert ref.is_parameter == (name in parameters)
        assert ref.persistent == any(tensor is ref.tensor for tensor in saved.values())
    assert len(gathered.refs) == len({id(tensor) for tensor in expected.values()})
    assert gathered.have_ties
    places = [
        place for ref in gathered.refs for place in [(ref.name, ref.module, ref.key), *ref.ties]
    ]
    for name, module, key in places:
        assert modules[name.rpartition(".")[0]] is module
        assert name.rpartition(".")[2] == key


def test_a_dict_that_may_be_assigned_to_holds_the_tensor() -> None:
    for ref in gather(tree()).refs:
        if isinstance(ref.module, (OwnSetattr, torch.nn.LSTM)):
            assert ref.held_by is None
        else:
            held = ref.module._parameters if ref.is_parameter else ref.module._buffers
            assert ref.held_by is held


def test_hooks_of_one_module_are_found() -> None:
    model = tree()
    model.second[1].register_load_state_dict_post_hook(lambda module, keys: None)
    assert gather(model).have_load_hooks


def test_a_module_that_lies_below_itself_is_visited_once_there() -> None:
    model = torch.nn.Sequential(Leaf(), torch.nn.Sequential(Leaf()))
    model[1][0].parent = model[1]
    model[1].itself = model[1]
    gathered = gather(model)
    assert [id(module) for module in gathered.modules] == [id(m) for m in model.modules()]
    names = {name for ref in gathered.refs if ref.is_parameter for name in ref.names}
    assert names == dict(model.named_parameters()).keys()


def test_what_is_no_module_has_no_tensors() -> None:
    model = torch.nn.Module()
    model._modules["child"] = "text"  # type: ignore[assignment]
    with pytest.raises(AttributeError, match="has no"):
        gather(model)

"""The order in which tensors are loaded after an earlier run."""

from __future__ import annotations

import torch

from weightlift.module.order_of_use import learn_order, order_of_use, which_model


class Net(torch.nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(2))
        self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(depth))
        self.norm = torch.nn.BatchNorm1d(2)


def order(model: Net, names: list[str] | None = None) -> list[str]:
    return order_of_use(which_model(model), names or list(model.state_dict()))


def test_without_one_it_is_that_of_the_modules() -> None:
    model = Net()
    assert order(model) == list(model.state_dict())
    assert order(model, ["scale", "norm.weight"]) == ["scale", "norm.weight"]


def test_with_one() -> None:
    """Modules that the order lacks follow their predecessor in the model."""
    model = Net()
    learn_order(which_model(model), ["norm.weight", "layers.2.weight", "layers.0.weight"])
    found = list(dict.fromkeys(name.rpartition(".")[0] for name in order(Net())))
    assert found == ["", "norm", "layers.2", "layers.0", "layers.1"]
    assert sorted(order(Net())) == sorted(model.state_dict())
    assert order(Net(), ["scale", "layers.0.bias", "layers.2.bias"]) == [
        "scale", "layers.2.bias", "layers.0.bias",
    ]  # fmt: skip


def test_others_have_their_own() -> None:
    learn_order(which_model(Net()), [*reversed(Net().state_dict())])
    deeper = Net(4)
    assert order(deeper) == list(deeper.state_dict())

"""Values whose pickles are read as data, and others that are left to torch's unpickler."""

from __future__ import annotations

import collections
import io
import zipfile
from typing import Any

import torch

# Record -> (begin, number of bytes).
Places = dict[str, tuple[int, int]]


def saved(value: Any) -> tuple[bytes, Places]:
    """The pickle of torch.save, and possible places of the storages."""
    file = io.BytesIO()
    torch.save(value, file)
    with zipfile.ZipFile(file) as archive:
        places = {
            info.filename.partition("/")[2]: (4096 * number, info.file_size)
            for number, info in enumerate(archive.infolist())
        }
        return archive.read("archive/data.pkl"), places


class Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = torch.nn.Linear(3, 2)
        self.b = torch.nn.Linear(3, 2)
        self.b.weight = self.a.weight
        self.norm = torch.nn.BatchNorm1d(2)


W = torch.arange(6.0)
ACCEPTED = {
    "plain": {"w": W, "v": W[2:]},
    "ordered": collections.OrderedDict(w=W),
    "module": Tied().state_dict(),
    "parameters": dict(Tied().named_parameters()),
    "views": {"t": W.view(2, 3).t(), "e": W[:1].expand(5), "s": torch.tensor(1.0), "z": W[:0]},
    "dtypes": {
        str(dtype): torch.zeros(3, dtype=dtype)
        for dtype in (
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32,
            torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
        )
    },
    "nested": {"state_dict": {"w": W}, "epoch": 3, "loss": 0.5, "opt": {"state": {0: {"m": W}}}},
    "scalars": {"w": W, "n": None, "t": True, "big": -(2**40), "l": [1, W, {}], "u": ((), (1, 2))},
    "many": {f"layer.{i}.weight": W[i % 6 :] for i in range(2500)},
    "tied": {"a": W, "v": W[2:].clone(), "b": W},
    "empty": {},
}  # fmt: skip


class Sub(torch.Tensor):
    pass


SHARED: dict[str, Any] = {"w": W}
ITSELF: dict[str, Any] = {"w": W}
ITSELF["me"] = ITSELF
DEEP: dict[str, Any] = {"w": W}
for _ in range(64):
    DEEP = {"in": DEEP}
LEFT_TO_TORCH = {
    "a_name_not_ascii": {"gewicht_ä": W},
    "fp8": {"w": W.to(torch.float8_e4m3fn)},
    "subclass": {"w": W.as_subclass(Sub)},
    "sparse": {"w": W.to_sparse()},
    "conjugated": {"w": torch.zeros(2, dtype=torch.complex64).conj()},
    "a_dict_twice": {"a": SHARED, "b": SHARED},
    "itself": ITSELF,
    "too_deep": DEEP,
    "no_dict": [W],
    "a_storage": {"s": W.untyped_storage()},
    "a_dtype": {"w": W, "dtype": torch.float32},
    "bytes": {"w": W, "b": b"abc"},
    "a_set": {"w": W, "s": {1, 2}},
    "a_long": {"w": W, "n": 2**70},
}

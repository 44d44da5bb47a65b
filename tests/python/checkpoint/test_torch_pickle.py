"""The pickle of a checkpoint, read as data, compared with torch's own unpickler: it accepts every
pickle that is accepted here, with the same result."""

from __future__ import annotations

import collections
import pickletools
import random
import warnings
from typing import Any

import pytest
import torch

from torch_pickles import ACCEPTED, LEFT_TO_TORCH, Places, W, saved
from weightlift import _native
from weightlift.checkpoint import torch_file


def by_torch(pickle: bytes, places: Places) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unpickled = torch_file._Unpickled(pickle, places)
    return seen(unpickled.value, unpickled.describe)


def seen(value: Any, describe: Any = lambda name, tensor: tensor) -> Any:
    """The result: for values other than tensors and dicts, the type's name."""
    if isinstance(value, (torch_file._Tensor, torch.Tensor)):
        return tuple(describe("t", value))
    if isinstance(value, dict):
        return type(value), [(key, seen(one, describe)) for key, one in dict.items(value)]
    return type(value).__name__ if isinstance(value, (list, tuple)) else value


def agree(pickle: bytes, places: Places) -> bool:
    """Whether it is accepted here; if so, torch must get the same result."""
    value = torch_file._value_of(pickle, places)
    if value is not None:
        assert repr(seen(value)) == repr(by_torch(pickle, places))  # repr: NaN is not itself
    return value is not None


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_torch_saves(case: str) -> None:
    assert agree(*saved(ACCEPTED[case]))


@pytest.mark.parametrize("case", LEFT_TO_TORCH)
def test_what_is_left_to_torch(case: str) -> None:
    assert not agree(*saved(LEFT_TO_TORCH[case]))


STATE = collections.OrderedDict(
    w=torch.nn.Parameter(W), t=W.view(2, 3).t(), i=torch.arange(3), n=2.5, m={"k": (1, [W])}, x=None
)
STATE._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]


def test_every_byte_made_any_other() -> None:
    pickle, places = saved(STATE)
    accepted = 0
    for at in range(len(pickle)):
        for byte in range(256):
            accepted += agree(pickle[:at] + bytes([byte]) + pickle[at + 1 :], places)
    # Unchanged, and with names, locations and numbers exchanged.
    assert len(pickle) < accepted < len(pickle) * 128


def test_cut_anywhere() -> None:
    pickle, places = saved(STATE)
    assert agree(pickle, places)
    for at in range(len(pickle)):
        assert not agree(pickle[:at], places)
        agree(pickle[:at] + pickle[at + 1 :], places)
        agree(pickle[:at] + pickle[at : at + 9] + pickle[at:], places)
    assert not agree(pickle + b".", places)


def test_parts_of_pickles_in_another_order() -> None:
    whole = [saved(STATE), saved(ACCEPTED["module"]), saved(ACCEPTED["nested"])]
    accepted = sum(agree(*spliced(seed, whole)) for seed in range(2000))
    assert 0 < accepted < 2000, accepted  # both answers were compared with torch's


def spliced(
    seed: int, whole: list[tuple[bytes, dict[str, tuple[int, int]]]]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """A pickle in which runs of instructions are repeated or left out."""
    chosen = random.Random(seed)
    pickle, places = chosen.choice(whole)
    for _ in range(chosen.randint(1, 3)):
        try:
            starts = [at for _, _, at in pickletools.genops(pickle) if at is not None][1:]
        except ValueError:  # not a pickle any more: the last change is tried as it is
            break
        first = chosen.randrange(len(starts))
        begin, end = starts[first], starts[min(first + chosen.randint(0, 3), len(starts) - 1)]
        at = chosen.choice([chosen.choice(starts), end])
        pickle = chosen.choice(
            [pickle[:at] + pickle[begin:end] + pickle[at:], pickle[:begin] + pickle[end:]]
        )
    return pickle, places


BEGIN = b"\x80\x02"
# A tensor of one element with another shape and stride.
TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00%s\x89ccollections\nOrderedDict\n)RtR"
)
KEY = b"X\x01\x00\x00\x00w"


def ones(count: int) -> bytes:
    return b"(" + b"K\x01" * count + b"t"


@pytest.mark.parametrize(
    ("pickle", "accepted"),
    [
        (BEGIN + b"}.", True),
        (BEGIN + b"}" + KEY + TENSOR % (ones(64) * 2) + b"s.", True),
        # One tuple may be the shape of many tensors: their total memory is bounded.
        (BEGIN + b"}" + KEY + TENSOR % (ones(65) * 2) + b"s.", False),
        # The memo does not allocate for a stated index.
        (BEGIN + b"}r\xff\xff\xff\x7f.", False),
        (BEGIN + b"}(" + KEY + b"q\x00K\x01q\x02u.", False),
        # A storage of twice the size that 64 bits count, and an index past its end.
        (BEGIN + b"}" + KEY + (TENSOR % b"K\x02\x85K\x01\x85") + b"s.", False),
        (BEGIN + b"}" + KEY + (TENSOR % b"K\x01\x85J\xff\xff\xff\xff\x85") + b"s.", False),
        (b"\x80\x03}.", False),
        (b"}.", False),
        (BEGIN + b"}}.", False),
        (BEGIN + b"}(.", False),
        (BEGIN + b"}(" + KEY + b"u.", False),
        (BEGIN + b"(" + KEY + b"K\x01u.", False),
        (BEGIN + b"cposix\nsystem\n" + b"X\x02\x00\x00\x00ls\x85R.", False),
        (BEGIN + b"}" + KEY + b"ccollections\nOrderedDict\ns.", False),
    ],
)
def test_pickles_by_hand(pickle: bytes, accepted: bool) -> None:
    assert agree(pickle, {"data/0": (4096, 4)}) is accepted


def test_storages_that_contradict_the_archive_are_left_to_torch() -> None:
    pickle, places = saved({"w": W})
    assert agree(pickle, places)
    assert torch_file._value_of(pickle, {**places, "data/0": (4096, 23)}) is None
    assert torch_file._value_of(pickle, {}) is None
    # Of one record, stated twice.
    tensor = TENSOR % b"K\x01\x85K\x01\x85"
    two = BEGIN + b"}(" + KEY + tensor + KEY.replace(b"w", b"v")
    assert _native.torch_pickle(two + tensor + b"u.", torch_file._Tensor)
    other = tensor.replace(b"FloatStorage", b"IntStorage")
    assert not _native.torch_pickle(two + other + b"u.", torch_file._Tensor)

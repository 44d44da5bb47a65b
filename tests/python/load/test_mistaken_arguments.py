"""Arguments of a wrong type, or without an effect: each error names the argument."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import weightlift as wl

TENSORS = {"first.weight": torch.ones(2, 3), "first.bias": torch.zeros(2)}
x: Any = "x.safetensors"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(TENSORS, "x.safetensors")
    torch.save(TENSORS, "x.bin")


def net(device: str = "meta") -> torch.nn.Module:
    return torch.nn.ModuleDict({"first": torch.nn.Linear(3, 2, device=device)})


def into(**given: Any) -> Callable[[], object]:
    return lambda: wl.load_into(net(), x, **given)


def recorded(headers: Any, **given: Any) -> Callable[[], object]:
    return lambda: wl.record(list, headers, **given)


def saved(metadata: Any) -> Callable[[], object]:
    return lambda: wl.save_file(TENSORS, "y", metadata)


def opened() -> object:
    with Path(x).open("rb") as file:
        return wl.load(file)  # type: ignore[arg-type]


def closed_file() -> object:
    with wl.safe_open(x) as opened:
        pass
    return opened.keys()


def closed_checkpoint() -> object:
    checkpoint = wl.open_checkpoint(x)
    checkpoint.close()
    return wl.load_checkpoint(checkpoint)


def other_recording() -> object:
    return wl.record(list, wl.open_checkpoint(x)).load(x)


def expanded() -> object:
    model = net("cpu")
    model.register_buffer("mean", torch.zeros(1).expand(4))
    save_file({**TENSORS, "mean": torch.ones(4)}, "more.safetensors")
    return wl.load_into(model, "more.safetensors")


def streamed() -> None:
    layers = [torch.nn.Linear(64, 64, device="meta") for _ in range(4)]
    model = torch.nn.Sequential(*layers)
    save_file({f"{n}.{k}": torch.ones(s) for n in range(4)
               for k, s in (("weight", (64, 64)), ("bias", (64,)))}, "big.safetensors")  # fmt: skip
    with wl.stream(model, "big.safetensors", device="cpu", memory="40kB"):
        wl.save_model(model, "y")


unknown: Any = wl.load_checkpoint
Argument, Missing = wl.ArgumentError, FileNotFoundError
MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "an empty path": (lambda: wl.load_file(""), Missing, "the path is empty"),
    "an empty path to open": (lambda: wl.safe_open(""), Missing, "the path is empty"),
    "an empty path to save": (lambda: wl.save_file(TENSORS, ""), Missing, "the path is empty"),
    "no folder to save to": (lambda: wl.save_checkpoint(TENSORS, ""), Missing, "path is empty"),
    "a home": (lambda: wl.load_file("~/no.safetensors"), Missing, "os.path.expanduser"),
    "a home to save to": (lambda: wl.save_file(TENSORS, "~/no/y"), Missing, "os.path.expanduser"),
    "a URL": (lambda: wl.load_file("https://example.org/y"), Missing, "this is a URL"),
    "a NUL": (lambda: wl.save_file(TENSORS, "a\0b"), Argument, r"'a\\x00b': .* NUL"),
    "one argument": (lambda: wl.open_checkpoint({}), TypeError, "the path is dict(?!.*places)"),  # type: ignore[arg-type]
    "an open checkpoint": (lambda: wl.load_file(wl.open_checkpoint(x)), TypeError,  # type: ignore[arg-type]
                           "load_checkpoint and load_into take a Checkpoint"),
    "a model": (lambda: wl.load_state_dict(net()), TypeError, "load_into fills a model"),  # type: ignore[arg-type]
    "an opened file": (opened, TypeError, r"read\(\), or its name"),
    "another call's argument": (lambda: unknown(x, device="cpu"), TypeError,
                                r"load_checkpoint\(\) .*'device'; did you mean 'device_map'"),
    "text for a flag": (lambda: wl.load_file(x, verify="no"), Argument, "verify is 'no'"),  # type: ignore[arg-type]
    "text to pin": (lambda: wl.load_file(x, pin_memory="no"), Argument, "pin_memory is 'no'"),  # type: ignore[arg-type]
    "strict": (into(strict="False"), Argument, "strict is 'False'; it must be True or False"),
    "strict, the third": (lambda: wl.load_model(net("cpu"), x, "cpu"), Argument, "strict is 'cpu'"),  # type: ignore[arg-type]
    "sizes": (into(ignore_mismatched_sizes="no"), Argument, "ignore_mismatched_sizes is 'no'"),
    "background": (into(background="yes"), Argument, "background is 'yes'"),
    "scope": (into(scope="nodes"), Argument, "scope is 'nodes'; it can be 'node' or 'group'"),
    "memory of all": (into(device_map="auto", max_memory="1GB"), Argument, "a dict of devices"),
    "a format's name": (into(memory_format="channels_last"), Argument, "torch.channels_last"),
    "where to offload": (into(offload_folder=3), TypeError, "the path is int"),
    "no renaming": (into(key_map="x"), Argument, "the renaming is 'x'"),
    "a number for a name": (into(key_map=lambda name: 3), Argument, "makes 3 of 'first.bias'"),
    "an expanded buffer": (expanded, Argument, "'mean' of the model is expanded"),
    "a variant": (lambda: wl.open_checkpoint(".", variant=16), Argument, "variant is 16"),  # type: ignore[arg-type]
    "a subfolder": (lambda: wl.open_checkpoint(".", subfolder=3), Argument, "subfolder is 3"),  # type: ignore[arg-type]
    "a token": (lambda: wl.open_checkpoint("a/b", token=3), Argument, "token is int"),  # type: ignore[arg-type]
    "a path for a checkpoint": (lambda: wl.Checkpoint(x), Argument, "open_checkpoint opens"),
    "a number to look up": (lambda: wl.open_checkpoint(x)[3], KeyError, "no tensor 3"),  # type: ignore[index]
    "a name to look up": (lambda: wl.open_checkpoint(x)["first.bais"], KeyError,
                          "x.safetensors: .*'first.bais'; similar are 'first.bias'"),
    "a torch file": (lambda: wl.safe_open("x.bin"), wl.FormatError, "load_file and open.* read"),
    "a closed file": (closed_file, wl.FileClosedError, "^x.safetensors: the file is closed"),
    "a closed checkpoint": (closed_checkpoint, wl.FileClosedError, "open it again"),
    "metadata": (saved("pt"), TypeError, "^y: metadata is a dict"),
    "metadata's values": (saved({"a": 1}), TypeError, "^y: metadata must map text"),
    "a model's metadata": (lambda: wl.save_model(net("cpu"), "y", {"a": 1}), TypeError,  # type: ignore[dict-item]
                           "^y: metadata must map text to text, and 'a' is 1"),
    "a checkpoint's metadata": (lambda: wl.save_checkpoint(TENSORS, "y", metadata="x"), TypeError,  # type: ignore[arg-type]
                                "^y: metadata is a dict"),
    "a forbidden name": (lambda: wl.save_file({"__metadata__": torch.ones(1)}, "y"), Argument,
                         "^y: a tensor is called"),
    "a bad tensor": (lambda: wl.save_checkpoint({"a": 3}, "y"), Argument, "^y: tensor 'a'"),  # type: ignore[dict-item]
    "no shard": (lambda: wl.save_checkpoint(TENSORS, "y", max_shard_size=0), Argument,
                 "max_shard_size is 0; a file needs room"),
    "a streamed model": (streamed, Argument, "'0.weight' is streamed"),
    "stream, swapped": (lambda: wl.stream(x, net(), device="cpu", memory=1), Argument,
                        "changed places"),
    "record into text": (recorded({}, module="x"), Argument, "takes a model, not str"),
    "record a header": (recorded({"a": 3}), Argument, "tensor 'a' has 3"),
    "record a dtype": (recorded({"a": ("F33", (2,))}), Argument, "a file's dtype and a shape"),
    "record for a device": (recorded({}, device="cdua"), wl.DeviceError, "did you mean 'cuda'"),
    "record, checked": (recorded({}, check="x"), Argument, "check is 'x'"),
    "record, and load a path": (other_recording, Argument, "a Checkpoint, not str"),
    "streams": (lambda: wl.Settings(streams=17), Argument, "from 1 to 16"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_is_named(mistake: str) -> None:
    call, kind, said = MISTAKES[mistake]
    with pytest.raises(kind, match=said):
        call()
    assert not Path("y").exists()
    assert not Path("model.safetensors").exists()


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("THREADS", "0", "WEIGHTLIFT_THREADS is 0; it must be an integer"),
        ("THREADS", "two", "WEIGHTLIFT_THREADS is 'two'; it must be an integer"),
        ("STREAMS", "17", "WEIGHTLIFT_STREAMS is 17"),
        ("READ_BYTES", "0", "WEIGHTLIFT_READ_BYTES is 0"),
        ("IO_PATH", "dircet", "WEIGHTLIFT_IO_PATH is 'dircet'"),
    ],
)
def test_a_variable_is_named(
    variable: str, value: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(f"WEIGHTLIFT_{variable}", value)
    with pytest.raises(wl.ArgumentError, match=f"^{said}"):
        wl.load_file(x, mode="read")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_folders_of_another_user() -> None:
    Path("theirs").mkdir(mode=0o755)
    Path().absolute().chmod(0o755)
    model = net("cpu")
    wl.save_checkpoint(TENSORS, "warm")  # imports what another user may not read
    os.seteuid(65534)
    try:
        for target in ("theirs", "theirs/new"):
            with pytest.raises(PermissionError, match="this user may not make files in theirs"):
                wl.save_checkpoint(model.state_dict(), target)
    finally:
        os.seteuid(0)


def test_a_checkpoint_is_renamed_by_a_dict() -> None:
    renamed = wl.open_checkpoint(x).renamed({"first.bias": "bias", "gone": "new"})
    assert sorted(renamed) == ["bias", "first.weight"]
    without = wl.open_checkpoint(x).renamed({"first.bias": None})
    assert repr(without) == "<Checkpoint of 1 tensor in x.safetensors>"


def test_stats_print_as_a_table() -> None:
    wl.load_file(x)
    first, *callers = str(wl.stats()).splitlines()
    assert first.startswith("all loads: ")
    assert any("  weightlift: " in line for line in callers)


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("hook", ["pre", "post"])
def test_a_hook_has_nothing_read_twice(device: str, hook: str) -> None:
    model = net(device)
    first: Any = model.get_submodule("first")
    if hook == "pre":
        first.register_load_state_dict_pre_hook(lambda *given: None)
    else:
        first.register_load_state_dict_post_hook(lambda module, keys: None)
    report = wl.load_into(model, x)
    assert report.bytes == sum(tensor.nbytes for tensor in TENSORS.values())
    assert [file.bytes for file in report.files] == [report.bytes]
    assert all(torch.equal(model.state_dict()[name], TENSORS[name]) for name in TENSORS)

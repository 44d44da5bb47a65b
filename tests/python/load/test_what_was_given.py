"""Mistaken arguments of the public calls, and the required errors."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import weightlift as wl
from support import run_python
from weightlift.core.atomic import save_error
from weightlift.core.requirements import missing_library

TENSORS = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file(TENSORS, "x.safetensors")
    torch.save({"model": TENSORS, "ema": TENSORS}, "two.pt")
    torch.save(TENSORS, "x.bin")
    Path("x.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}')
    with zipfile.ZipFile("p.dduf", "w") as archive:
        archive.writestr("model_index.json", "{}")
    return tmp_path


def linear(device: str = "cpu") -> torch.nn.Module:
    return torch.nn.Linear(2, 2, device=device)


def content(name: str = "x.safetensors") -> bytes:
    return Path(name).read_bytes()


def open_file_object() -> dict[str, torch.Tensor]:
    with Path("x.safetensors").open("rb") as opened:
        return wl.load_file(opened)  # type: ignore[arg-type]


x: Any = "x.safetensors"
DDUF = r"this is a whole pipeline: load_checkpoint\(path, subfolder=\.\.\.\)"
TORCH = "this is a file of torch.save: load_file and open_checkpoint read it"
INDEX = "this is an index of shards: load_checkpoint and open_checkpoint read them"
FOLDER = "or use load_checkpoint, which reads directories"
NO_ROOM = "max_shard_size is 0; a file needs room"
GIVEN: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "content": (lambda: wl.load_file(content()), wl.ArgumentError, r"of \d+ bytes"),  # type: ignore[arg-type]
    "an open file": (open_file_object, TypeError, "name of that open file"),
    "an empty path": (lambda: wl.load_file(""), FileNotFoundError, "the path is empty"),
    "no path": (lambda: wl.load_file(None), TypeError, "NoneType; it must be text or a"),  # type: ignore[arg-type]
    "two state dicts": (lambda: wl.load_file("two.pt"), wl.CheckpointError,
                        "state_dict_key=, an argument of load_checkpoint"),
    "dduf": (lambda: wl.load_file("p.dduf"), wl.FormatError, DDUF),
    "dduf, opened": (lambda: wl.safe_open("p.dduf"), wl.FormatError, DDUF),
    "torch, opened": (lambda: wl.safe_open("x.bin"), wl.FormatError, TORCH),
    "torch, indexed": (lambda: wl.Checkpoint.from_file("x.bin"), wl.FormatError, TORCH),
    "an index": (lambda: wl.load_file("x.safetensors.index.json"), wl.FormatError, INDEX),
    "an index, opened": (lambda: wl.safe_open("x.safetensors.index.json"), wl.FormatError, INDEX),
    "a folder": (lambda: wl.load_file("."), IsADirectoryError, FOLDER),
    "a folder, opened": (lambda: wl.safe_open("."), IsADirectoryError, FOLDER),
    "no room": (lambda: wl.save_checkpoint(TENSORS, "y", max_shard_size=0), wl.ArgumentError,
                NO_ROOM),
    "gpu": (lambda: wl.load_file(x, device="gpu"), wl.DeviceError, "'cuda' is meant"),
    "progress": (lambda: wl.load_file(x, progress=3), wl.ArgumentError, "progress is 3; it can be"),  # type: ignore[arg-type]
    "a dtype to a mapping": (lambda: wl.load_file(x, mode="map", dtype="bf16"), wl.ArgumentError,
                             "dtype=bfloat16"),
    "a path for bytes": (lambda: wl.load(x), TypeError, "not str: load_file takes a path"),
    "none for bytes": (lambda: wl.load(None), TypeError, "takes the bytes of a file, not NoneType"),  # type: ignore[arg-type]
    "bytes of torch": (lambda: wl.load(content("x.bin")), wl.FormatError,
                       r"torch.load\(io.BytesIO\(data\)"),
    "meta, saved": (lambda: wl.save({"a": torch.ones(2, device="meta")}), NotImplementedError,
                    "'a' is on meta and has no values"),
    "meta, to a file": (lambda: wl.save_file({"a": torch.ones(2, device="meta")}, "y"),
                        NotImplementedError, "y: tensor 'a' is on meta and has no values"),
    "meta, a model": (lambda: wl.save_model(linear("meta"), "y"), NotImplementedError,
                      "y: tensor 'weight' is on meta and has no values"),
    "metadata": (lambda: wl.save_file(TENSORS, "y", "pt"), TypeError, "metadata is a dict of text"),  # type: ignore[arg-type]
    "metadata of a model": (lambda: wl.save_model(linear(), "y", "pt"), TypeError, "not str"),  # type: ignore[arg-type]
    "swapped, to save": (lambda: wl.save_file("y", TENSORS), TypeError, "changed places"),  # type: ignore[arg-type]
    "swapped, a model": (lambda: wl.save_model("y", linear()), wl.ArgumentError, "changed places"),  # type: ignore[arg-type]
    "a dict for a model": (lambda: wl.save_model(TENSORS, "y"), wl.ArgumentError, "not dict"),  # type: ignore[arg-type]
    "swapped, to load": (lambda: wl.load_model(x, linear()), wl.ArgumentError, "changed places"),  # type: ignore[arg-type]
    "a class": (lambda: wl.load_model(torch.nn.Linear, x), wl.ArgumentError, "make one of it"),  # type: ignore[arg-type]
    "a model on meta": (lambda: wl.load_model(linear("meta"), x), wl.ArgumentError,
                        r"x.safetensors: 'weight' of the model is on meta.*load_into"),
    "another shape": (lambda: wl.load_model(torch.nn.Linear(2, 3), x), RuntimeError,
                      "x.safetensors: (.|\n)*size mismatch for weight"),
    "a key": (lambda: wl.load_checkpoint("two.pt", state_dict_key=3), wl.ArgumentError, "is 3"),
    "a key of safetensors": (lambda: wl.load_checkpoint(x, state_dict_key="k"), wl.ArgumentError,
                             "^x.safetensors: state_dict_key='k' is for torch files"),
    "a prefix": (lambda: wl.load_checkpoint(x, prefix=3), wl.ArgumentError, "prefix is 3; it must"),
    "what to ignore": (lambda: wl.load_checkpoint(x, ignore=3), wl.ArgumentError, "ignore is 3"),
    "a file for a folder": (lambda: wl.save_checkpoint(TENSORS, "y.safetensors"), wl.ArgumentError,
                            "save_file writes one"),
    "a backend": (lambda: wl.enable("tranformers"), wl.ArgumentError, "'transformers' is meant"),
    "no settings": (lambda: wl.Settings.set_default(3), TypeError, "takes Settings"),  # type: ignore[arg-type]
    "a path to record": (lambda: wl.record(print, x), wl.ArgumentError, "open_checkpoint opens"),
    "nothing to record": (lambda: wl.record(1, {}), wl.ArgumentError, "a function of weights"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("what", GIVEN)
def test_it_is_named(what: str) -> None:
    call, kind, said = GIVEN[what]
    before = sorted(Path().iterdir())
    with pytest.raises(kind, match=said) as raised:
        call()
    assert len(str(raised.value)) < 600
    assert sorted(Path().iterdir()) == before


def test_a_name_with_a_typo() -> None:
    with pytest.raises(AttributeError) as raised:
        wl.load_fiel  # type: ignore[attr-defined]  # noqa: B018
    # Attributes with which Python's traceback prints "Did you mean: 'load_file'?".
    assert (raised.value.name, raised.value.obj) == ("load_fiel", wl)


def test_parts_of_python_are_not_installed_by_pip() -> None:
    text = str(missing_library("zoneinfo", "weightlift inspect"))
    assert "pip" not in text
    assert "a part of Python that is not in this Python" in text


def test_a_folder_that_is_there_is_not_to_be_made(tmp_path: Path) -> None:
    assert "make it first" in str(save_error(errno.ENOENT, tmp_path / "no" / "x"))
    assert "make it first" not in str(save_error(errno.ENOENT, tmp_path / "x"))


def test_a_small_load_is_not_at_no_speed() -> None:
    wl.load_file("x.safetensors")
    shown = str(wl.last_report())
    assert "0.0 GB/s" not in shown
    assert "in 0.000 s" not in shown
    sums = wl.Stats(loads=1, bytes=100, seconds=0.0001)
    assert "in 0.1 ms: " in str(sums)


def test_one_byte_is_one_byte() -> None:
    Path("byte.safetensors").write_bytes(b"x")
    with pytest.raises(wl.FormatError, match="the file has 1 byte, but the length"):
        wl.load_file("byte.safetensors")
    save_file({"w": torch.ones(3)}, "one.safetensors")
    with wl.safe_open("one.safetensors") as file, pytest.raises(wl.FormatError, match="1 tensor,"):
        file.get_tensor("v")


@pytest.mark.parametrize("path", ["x.safetensors", "folder"])
def test_a_revision_of_a_path_is_told(path: str, caplog: pytest.LogCaptureFixture) -> None:
    Path("folder").mkdir()
    save_file(TENSORS, "folder/model.safetensors")
    wl.open_checkpoint(path)
    assert not caplog.records
    assert wl.load_checkpoint(path, revision="fp16").keys() == TENSORS.keys()
    assert f"{path} is on this machine, and revision='fp16' is for a repository" in caplog.text


def test_what_keeps_files_open_is_not_pickled() -> None:
    checkpoint = wl.open_checkpoint("x.safetensors")
    recording = wl.record(lambda weights: [tensor for _, tensor in weights], checkpoint)
    for kept, remedy in (
        (checkpoint, "pass on its path"),
        (wl.safe_open("x.safetensors"), "pass on its path"),
        (recording, "record again"),
    ):
        named = rf"a {type(kept).__name__} .* cannot be pickled or copied: {remedy}"
        for take in (pickle.dumps, copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=named):
                take(kept)


def test_the_advice_names_an_argument_that_is_there() -> None:
    """``state_dict_key=`` and others are arguments of ``open_checkpoint`` alone."""
    for part in ("unet", "vae"):
        Path("pipe", part).mkdir(parents=True)
        save_file(TENSORS, f"pipe/{part}/diffusion_pytorch_model.safetensors")
    Path("pipe/model_index.json").write_text("{}")
    Path("fp16").mkdir()
    save_file(TENSORS, "fp16/model.fp16.safetensors")
    calls: tuple[Callable[[str], object], ...] = (
        lambda path: wl.load_into(linear(), path),
        lambda path: wl.stream(linear("meta"), path, device="cpu", memory="1MB"),
        wl.load_state_dict,
    )
    for path in ("two.pt", "pipe", "fp16"):
        for call in calls:
            with pytest.raises(wl.CheckpointError, match=r"= .*\(an argument of open_checkpoint\)|"
                               r"'\w+' \(an argument of open_checkpoint\)"):  # fmt: skip
                call(path)
    assert wl.load_state_dict("fp16", variant="fp16").keys() == TENSORS.keys()
    with pytest.raises(TypeError, match="the path is Linear; it must be text"):
        wl.load_state_dict(linear(), TENSORS)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: wl.open_checkpoint("x.safetensors", strict_index="no"), "strict_index is 'no'"),  # type: ignore[arg-type]
        (lambda: wl.open_checkpoint("x.safetensors", use_safetensors="yes"), "must be True or"),  # type: ignore[arg-type]
        (lambda: wl.open_checkpoint("x.safetensors", cache_dir=3), "cache_dir is 3; it must"),  # type: ignore[arg-type]
        (lambda: wl.open_checkpoint(".", subfolder="/"), "subfolder is '/'; it must be a folder"),
        (lambda: wl.enable("transformers", background="yes"), "background is 'yes'; it must be"),  # type: ignore[arg-type]
        (lambda: wl.Settings(pinned_bytes="1.5GB"), "write whole bytes, or text with a whole num"),
        (lambda: wl.record(print, {"w": torch.ones(99, 99)}), "tensor 'w' has a Tensor; it must"),  # type: ignore[dict-item]
        (lambda: wl.stream(linear("meta"), "x.safetensors", device="cpu", memory=1),
         "memory is 1 B .1 byte., and the"),
    ],
)  # fmt: skip
def test_values_that_were_taken_in_silence(call: Callable[[], object], said: str) -> None:
    with pytest.raises(wl.ArgumentError, match=said):
        call()


def test_what_a_file_is_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"model": TENSORS, "epoch": 3}, "epoch.pt")
    with pytest.raises(wl.CheckpointError, match="'epoch' is an int, not a dict"):
        wl.load_checkpoint("epoch.pt", state_dict_key="epoch")
    Path("wrong.bin").write_bytes(content())
    wl.load_checkpoint("wrong.bin")
    assert "wrong.bin: holds safetensors despite its name" in caplog.text
    Path("link.safetensors").symlink_to("gone.safetensors")
    with pytest.raises(FileNotFoundError, match=r"a link to gone\.safetensors, which is"):
        wl.open_checkpoint("link.safetensors")


def test_an_unknown_variable_is_told_at_the_line_of_the_user(tmp_path: Path) -> None:
    """No line of this library is shown."""
    Path("user.py").write_text("import weightlift as wl\n\nwl.load_file('x.safetensors')\n")
    Path("nameless.py").write_text(
        "exec(compile(open('user.py').read(), 'user.py', 'exec'), {'__builtins__': __builtins__})"
    )
    for command in (["user.py"], ["-m", "weightlift", "user.py"], ["nameless.py"]):
        done = subprocess.run(
            [sys.executable, *command],
            env={**os.environ, "WEIGHTLIFT_THREDS": "2"},
            capture_output=True,
            text=True,
            check=True,
        )
        assert re.match(r"\S*user.py:3: UserWarning: environment variable", done.stderr)


def test_without_torch_each_call_says_how_to_install_it(tmp_path: Path) -> None:
    calls = ["load_into(None, 'x.bin')", "load_model(None, 'x.bin')", "open_checkpoint('x.bin')",
             "load_file('x.bin')", "save_file({}, 'y')", "record", "stream"]  # fmt: skip
    code = f"""
import sys
sys.modules["torch"] = None
import weightlift as wl
for call in {calls!r}:
    try:
        eval("wl." + call)
    except ModuleNotFoundError as error:
        assert "needs torch, which is not installed: pip install torch" in str(error), call
    else:
        raise SystemExit(call)
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_stream_advises_no_argument_that_it_lacks() -> None:
    save_file({"weight": TENSORS["weight"]}, "less.safetensors")
    save_file({"weight": torch.ones(9, 9), "bias": TENSORS["bias"]}, "shape.safetensors")
    save_file({"weigth": TENSORS["weight"], "biass": TENSORS["bias"]}, "names.safetensors")
    for path, said in (
        ("less", "does not fit Linear:\n"),
        ("shape", "1 of another shape than the model's:\n"),
        (
            "names",
            "'weigth' resembles 'weight'; open_checkpoint(...).renamed(...) renames:",
        ),
    ):
        with pytest.raises(wl.CheckpointError) as raised:
            wl.stream(linear("meta"), f"{path}.safetensors", device="cpu", memory="1MB")
        assert said in str(raised.value)
        assert "=" not in str(raised.value)

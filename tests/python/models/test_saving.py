from __future__ import annotations

import ctypes
import errno
import functools
import itertools
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import accelerate.utils
import pytest
import safetensors.torch
import torch
import transformers
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config

import weightlift as wl
from support import assert_same_tensors, in_child, under_strace
from weightlift.load_file import load_checkpoint
from weightlift.models import replacing, saving
from weightlift.models.saving import save_weights

STEM = "diffusion_pytorch_model"


class Net(ModelMixin, ConfigMixin):
    """Six weights of 256 bytes; a shard of 300 bytes holds one, of 600 two."""

    @register_to_config
    def __init__(self, layers: int = 6) -> None:
        super().__init__()
        for number in range(layers):
            self.add_module(f"layer_{number}", torch.nn.Linear(8, 8, bias=False))


def filled(value: float, layers: int = 6) -> dict[str, torch.Tensor]:
    return {f"layer_{n}.weight": torch.full((8, 8), value + n / 16) for n in range(layers)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder with the config for diffusers."""
    Net().save_config(tmp_path / "model")
    return tmp_path / "model"


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"config.json"}


def assert_same(loaded: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """In any order: the file's order is by dtype and name."""
    assert_same_tensors(dict(sorted(loaded.items())), dict(sorted(expected.items())))


def by_diffusers(folder: Path, **arguments: Any) -> dict[str, torch.Tensor]:
    return dict(Net.from_pretrained(folder, **arguments).state_dict())


# The written files.


@pytest.mark.parametrize("variant", [None, "fp16", "a.b"])
@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["10GB", "1KB", 0])
def test_the_files_are_diffusers(
    tmp_path: Path, variant: str | None, safe: bool, size: int | str
) -> None:
    torch.manual_seed(0)
    model = Net()
    model.save_pretrained(
        tmp_path / "theirs", variant=variant, safe_serialization=safe, max_shard_size=size
    )
    written = save_weights(
        model.state_dict(),
        tmp_path / "ours",
        variant=variant,
        safe_serialization=safe,
        max_shard_size=size,
    )
    assert set(written) == names(tmp_path / "theirs") == names(tmp_path / "ours")
    assert len(written) == {"10GB": 1, "1KB": 3, 0: 7}[size]
    for name in written:
        ours, theirs = tmp_path / "ours" / name, tmp_path / "theirs" / name
        if name.endswith(".bin"):
            assert_same(torch.load(ours, weights_only=True), torch.load(theirs, weights_only=True))
        else:
            assert ours.read_bytes() == theirs.read_bytes()
    model.save_config(tmp_path / "ours")
    loaded = by_diffusers(tmp_path / "ours", variant=variant, use_safetensors=safe)
    assert_same(loaded, dict(model.state_dict()))
    assert_same(load_checkpoint(tmp_path / "ours", variant=variant), dict(model.state_dict()))


@pytest.mark.parametrize("size", ["10GB", "10KB"])
def test_transformers_loads_tied_weights(tmp_path: Path, size: str) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_positions=8, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    config.save_pretrained(tmp_path)
    written = save_weights(model.state_dict(), tmp_path, stem="model", max_shard_size=size)
    assert ("model.safetensors.index.json" in written) == (size == "10KB")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert_same(dict(loaded.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("size", ["10GB", 100])
def test_tied_weights_are_saved_once_under_their_first_name(
    tmp_path: Path, size: int | str
) -> None:
    shared = torch.randn(4, 4)
    tensors = {"z.weight": shared, "a.weight": shared, "b": torch.ones(20), "y": shared.view(4, 4)}
    *files, last = save_weights(tensors, tmp_path, max_shard_size=size, metadata={"k": "v"})
    said = {"a.weight": "z.weight", "y": "z.weight", "k": "v"}
    if size == "10GB":
        assert files == []
        with safetensors.safe_open(tmp_path / last, "pt") as file:
            assert file.metadata() == {"format": "pt", **said}
            assert set(file.keys()) == {"z.weight", "b"}
    else:
        index = json.loads((tmp_path / last).read_text())
        assert index["metadata"] == {"total_size": 64 + 80, **said}
        assert index["weight_map"].keys() == {"z.weight", "b"}
        with safetensors.safe_open(tmp_path / files[0], "pt") as file:
            assert file.metadata() == {"format": "pt", "k": "v"}
    assert_same(load_checkpoint(tmp_path), {"z.weight": shared, "b": torch.ones(20)})


def test_what_only_overlaps_is_saved_whole(tmp_path: Path) -> None:
    whole = torch.randn(4, 4)
    complex_ = torch.randn(3, dtype=torch.complex64)
    tensors = {
        "whole": whole,
        "transposed": whole.t(),
        "part": whole[1:],
        "flat": whole.view(16),
        "bits": whole.view(torch.int32),
        "conjugate": complex_.conj(),
        "plain": complex_,
        "negative": complex_.conj().imag,
        "image": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(5),
        "empty": torch.empty(0, 3),
        "empty too": torch.empty(0, 3),
        "scalar": torch.tensor(7),
        "learnt": torch.nn.Parameter(torch.ones(2)),
    }
    save_weights(tensors, tmp_path)
    expected = {name: tensor.detach().resolve_conj() for name, tensor in tensors.items()}
    assert_same(safetensors.torch.load_file(tmp_path / f"{STEM}.safetensors"), expected)
    for refused_by_torch in (tensors, expected):
        del refused_by_torch["bits"]
    save_weights(tensors, tmp_path / "bin", safe_serialization=False)
    loaded = torch.load(tmp_path / "bin" / f"{STEM}.bin", weights_only=True)
    assert_same(loaded, expected)
    assert loaded["whole"].data_ptr() == loaded["flat"].data_ptr()
    assert not loaded["learnt"].requires_grad


def test_a_state_dict_of_nothing_and_of_strings(tmp_path: Path) -> None:
    assert save_weights({"weight_format": "row"}, tmp_path) == [f"{STEM}.safetensors"]
    assert wl.load_file(tmp_path / f"{STEM}.safetensors") == {}


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.empty(3, device="meta"), "on 'meta'"),
        (torch.eye(3).to_sparse(), "to_dense"),
        (torch.ones(3, dtype=torch.complex128), "complex128"),
        (3.5, "float, not a tensor"),
    ],
)
def test_tensors_that_cannot_be_saved(tmp_path: Path, tensor: Any, why: str) -> None:
    with pytest.raises(wl.ArgumentError, match=rf"'the\.name'.*{why}"):
        save_weights({"fine": torch.ones(3), "the.name": tensor}, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_is_what_the_umask_allows(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        save_weights(filled(0), tmp_path, max_shard_size=600)
        save_weights(filled(0), tmp_path, safe_serialization=False, variant="x")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert modes == {0o666 & ~umask}


@pytest.mark.parametrize("part", ["a/b", "", "..", "a\0b"])
def test_names_that_are_paths(tmp_path: Path, part: str) -> None:
    with pytest.raises(wl.ArgumentError, match="part of a file name"):
        save_weights({}, tmp_path, variant=part)
    with pytest.raises(wl.ArgumentError, match="part of a file name"):
        save_weights({}, tmp_path, stem=part)


def test_a_stem_of_odd_characters(tmp_path: Path) -> None:
    stem = "{suffix}.*[a]%s"
    for size in ("10GB", 300):
        save_weights(filled(0), tmp_path, stem=stem, max_shard_size=size)
    assert len(names(tmp_path)) == 7
    index = json.loads((tmp_path / f"{stem}.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {
        f"{stem}-0000{n}-of-00006.safetensors" for n in range(1, 7)
    }


# save_function.


@pytest.mark.parametrize("size", ["10GB", 600])
@pytest.mark.parametrize("safe", [True, False])
def test_the_save_function_writes(folder: Path, size: int | str, safe: bool) -> None:
    calls: list[tuple[set[str], bool]] = []

    def save(tensors: dict[str, torch.Tensor], path: str) -> None:
        calls.append((set(tensors), path.endswith(".safetensors")))
        doubled = {name: tensor * 2 for name, tensor in tensors.items()}
        safetensors.torch.save_file(doubled, path) if safe else torch.save(doubled, path)

    save_weights(
        filled(1), folder, save_function=save, safe_serialization=safe, max_shard_size=size
    )
    assert len(calls) == (1 if size == "10GB" else 3)
    assert set().union(*(inside for inside, _ in calls)) == filled(1).keys()
    assert {ending for _, ending in calls} == {safe}
    expected = {name: tensor * 2 for name, tensor in filled(1).items()}
    assert_same(by_diffusers(folder, use_safetensors=safe), expected)


@pytest.mark.parametrize("safe", [True, False])
def test_accelerates_save(folder: Path, safe: bool) -> None:
    save_weights(filled(1), folder, save_function=accelerate.utils.save, safe_serialization=safe)
    assert_same(by_diffusers(folder, use_safetensors=safe), filled(1))


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (torch.save, "safe_serialization=False"),
        (lambda tensors, path: None, "wrote no file"),
        (lambda tensors, path: safetensors.torch.save_file({}, path), "did not write these"),
    ],
)
def test_a_save_function_that_does_not(folder: Path, function: Any, why: str) -> None:
    save_weights(filled(0), folder)
    with pytest.raises(wl.ArgumentError, match=rf"{STEM}\.safetensors: .*{why}"):
        save_weights(filled(1), folder, save_function=function)
    assert names(folder) == {f"{STEM}.safetensors"}
    assert_same(by_diffusers(folder), filled(0))


def test_the_environment_names_the_save_function(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFUSERS_SAVE_MODE", "torch:save")
    save_weights(filled(1), folder, safe_serialization=False)
    # torch.save names the archive after a path, and not when it is handed an open file.
    entries = zipfile.ZipFile(folder / f"{STEM}.bin").namelist()
    assert not any(name.startswith("archive/") for name in entries)
    assert_same(by_diffusers(folder, use_safetensors=False), filled(1))
    for wrong in ("no_such_module:save", "torch:no_such", "torch:__version__", ":"):
        monkeypatch.setenv("DIFFUSERS_SAVE_MODE", wrong)
        with pytest.raises(wl.ArgumentError, match=f"DIFFUSERS_SAVE_MODE is '{wrong}'"):
            save_weights(filled(1), folder)


# Existing files.

# The form of a checkpoint and its number of layers: a mixture of two checkpoints would load if
# names and shapes agree.
FORMS: dict[str, dict[str, Any]] = {
    "single": {},
    "two": {"max_shard_size": 800},
    "three": {"max_shard_size": 600},
    "bin": {"safe_serialization": False},
    "bins": {"safe_serialization": False, "max_shard_size": 600},
    "variant": {"variant": "v"},
    "variants": {"variant": "v", "max_shard_size": 600},
}
REPLACED = [
    ("single", "single"),
    ("single", "three"),
    ("three", "single"),
    ("three", "three"),
    ("three", "two"),
    ("two", "three"),
    ("bins", "bin"),
    ("bins", "bins"),
    ("variants", "variants"),
]


def loading(form: str) -> dict[str, Any]:
    arguments = FORMS[form]
    return {
        "variant": arguments.get("variant"),
        "use_safetensors": arguments.get("safe_serialization", True),
    }


@pytest.mark.parametrize(("before", "after"), REPLACED)
def test_the_old_files_go(folder: Path, tmp_path: Path, before: str, after: str) -> None:
    save_weights(filled(0), folder, **FORMS[before])
    written = save_weights(filled(1), folder, **FORMS[after])
    assert names(folder) == set(written)
    assert_same(by_diffusers(folder, **loading(after)), filled(1))
    assert_same(load_checkpoint(folder, **loading(after)), filled(1))


def test_other_files_stay(folder: Path) -> None:
    others = [
        f"{STEM}.fp16-00001-of-00002.safetensors",
        f"{STEM}.fp16.safetensors",
        f"{STEM}-00001-of-00002.fp16.safetensors",
        f"{STEM}.safetensors.index.fp16.json",
        f"{STEM}-00001-of-00002.bin",
        f"{STEM}.bin.index.json",
        f"{STEM}.bin",
        f"{STEM}-00001-of-00002.safetensors.backup",
        f"my_{STEM}-00001-of-00002.safetensors",
        f"{STEM}-00001.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors",
        "diffusion_pytorch_modelX-00001-of-00002.safetensors",
    ]
    for name in others:
        (folder / name).write_text("other")
    (folder / f"{STEM}-00003-of-00009.safetensors").write_text("stale")
    for arguments in ({"max_shard_size": 600}, {"max_shard_size": 300}, {}):
        save_weights(filled(1), folder, **arguments)
    assert names(folder) == {*others, f"{STEM}.safetensors"}
    assert all((folder / name).read_text() == "other" for name in others)


def test_old_spellings_of_a_sharded_variant_go(folder: Path) -> None:
    """Loaders would find them if there is no index with the present name."""
    for spelling in (f"{STEM}.safetensors.v.index.json", f"{STEM}.v.safetensors.index.json"):
        shard = f"{STEM}-00001-of-00001.v.safetensors"
        safetensors.torch.save_file(filled(0), folder / shard)
        index = {"metadata": {}, "weight_map": dict.fromkeys(filled(0), shard)}
        (folder / spelling).write_text(json.dumps(index))
        assert_same(load_checkpoint(folder, variant="v"), filled(0))
        save_weights(filled(1), folder, variant="v")
        assert names(folder) == {f"{STEM}.v.safetensors"}
        assert_same(by_diffusers(folder, variant="v"), filled(1))


def test_bin_beside_safetensors_is_a_warning(folder: Path) -> None:
    save_weights(filled(0), folder)
    with pytest.warns(UserWarning, match="use_safetensors=False"):
        save_weights(filled(1), folder, safe_serialization=False)
    assert_same(by_diffusers(folder), filled(0))
    assert_same(by_diffusers(folder, use_safetensors=False), filled(1))


@pytest.mark.parametrize("form", ["single", "three"])
def test_saving_over_a_mapped_checkpoint(folder: Path, form: str) -> None:
    save_weights(filled(0), folder, **FORMS[form])
    mapped = load_checkpoint(folder, mode="map")
    save_weights({name: tensor + 1 for name, tensor in mapped.items()}, folder, **FORMS[form])
    assert_same(mapped, filled(0))
    again = load_checkpoint(folder, mode="map")
    assert_same(again, filled(1))
    save_weights(again, folder, **FORMS[form])
    assert_same(load_checkpoint(folder), filled(1))


@pytest.mark.parametrize(
    "index",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"weight_map": []}',
        b'{"weight_map": {"a": 3}}',
        b'{"weight_map": {}}',
        b'{"metadata": {}, "weight_map": {"a": "../secret", "b": "/", "c": "", "d": "\\u0000"}}',
        b'{"metadata": {}, "weight_map": {"a": "\\ud800", "b": ".", "c": ".."}}',
    ],
)
def test_a_broken_index_is_replaced(folder: Path, index: bytes) -> None:
    (folder.parent / "secret").write_text("secret")
    for form in ("three", "single"):
        (folder / f"{STEM}.safetensors.index.json").write_bytes(index)
        written = save_weights(filled(1), folder, **FORMS[form])
        assert names(folder) == set(written)
        assert_same(by_diffusers(folder), filled(1))
    assert (folder.parent / "secret").stat().st_nlink == 1


# Errors.


def test_a_file_for_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="file"):
        save_weights(filled(0), tmp_path / "file")


@pytest.mark.parametrize("form", ["single", "three"])
@pytest.mark.parametrize("name", [f"{STEM}.safetensors", f"{STEM}.safetensors.index.json"])
def test_a_folder_for_a_file(tmp_path: Path, form: str, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / f"{STEM}-00001-of-00009.safetensors").mkdir()
    with pytest.raises(IsADirectoryError, match=name):
        save_weights(filled(0), tmp_path, **FORMS[form])
    assert len(names(tmp_path)) == 2
    (tmp_path / name).rmdir()
    save_weights(filled(0), tmp_path, **FORMS[form])
    assert_same(load_checkpoint(tmp_path), filled(0))


def test_bad_sizes(tmp_path: Path) -> None:
    for size in ("10 bananas", "", "GB"):
        with pytest.raises(ValueError):
            save_weights(filled(0), tmp_path, max_shard_size=size)
    assert list(tmp_path.iterdir()) == []


def refused_by_the_system(save: Callable[[], object], expected: int, file: Path) -> None:
    with pytest.raises(OSError) as caught:
        save()
    assert (caught.value.errno, caught.value.filename) == (expected, str(file))


def unchanged(folder: Path, files: set[str], form: str) -> None:
    assert names(folder) == files
    assert_same(by_diffusers(folder, **loading(form)), filled(0))


@pytest.mark.parametrize("form", ["single", "three", "bin", "bins"])
def test_a_file_that_may_not_grow(folder: Path, form: str) -> None:
    files = set(save_weights(filled(0), folder, **FORMS[form]))
    first = min(files)
    tensors = filled(1)

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        # The index is the first to be written, and is larger as well.
        file = folder / (f"{STEM}.{'bin' if 'bin' in form else 'safetensors'}.index.json")
        refused_by_the_system(
            lambda: save_weights(tensors, folder, **FORMS[form]),
            errno.EFBIG,
            file if form in ("three", "bins") else folder / first,
        )

    assert in_child(save) == 0
    unchanged(folder, files, form)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
@pytest.mark.parametrize("form", ["single", "three", "bin", "bins"])
def test_a_full_disk(tmp_path: Path, form: str) -> None:
    mount = tmp_path / "mount"
    mount.mkdir()
    big = {f"layer_{n}.weight": torch.zeros(64 << 10) for n in range(6)}  # 256 KiB each

    def save() -> None:
        new_namespace = 0x00020000  # CLONE_NEWNS: other processes do not see the mount
        assert ctypes.CDLL(None).unshare(new_namespace) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", mount], check=True)
        Net().save_config(mount)
        files = set(save_weights(filled(0), mount, **FORMS[form]))
        with pytest.raises(OSError) as caught:
            save_weights(big, mount, **{**FORMS[form], "max_shard_size": 600_000})
        assert caught.value.errno == errno.ENOSPC
        assert Path(caught.value.filename).parent == mount
        assert names(mount) == files

    assert in_child(save) == 0


def test_a_folder_that_may_not_be_written_to() -> None:
    # Not in tmp_path, whose parents are closed to others, and root may do everything.
    folder = Path(tempfile.mkdtemp())
    try:
        Net().save_config(folder)
        tensors = filled(1)
        for form in ("single", "three"):
            folder.chmod(0o755)
            files = set(save_weights(filled(0), folder, **FORMS[form]))
            folder.chmod(0o555)

            def save(form: str = form, files: set[str] = files) -> None:
                if os.geteuid() == 0:
                    os.seteuid(65534)
                refused_by_the_system(
                    lambda: save_weights(tensors, folder, **FORMS[form]),
                    errno.EACCES,
                    folder / max(files),
                )

            assert in_child(save) == 0
            unchanged(folder, files, form)
    finally:
        shutil.rmtree(folder)


# Interrupted and killed at every step.


def verdict(load: Callable[[], dict[str, torch.Tensor]]) -> str:
    try:
        loaded = load()
    except (OSError, ValueError):
        return "refused"
    for value, called in enumerate(("old", "new", "another")):
        expected = filled(value)
        if loaded.keys() == expected.keys() and all(
            not loaded[name].is_meta and torch.equal(loaded[name], expected[name])
            for name in expected
        ):
            return called
    return "a mixture"


def verdicts(folder: Path, form: str) -> tuple[str, str]:
    """The results of diffusers and weightlift, with common arguments."""
    variant = FORMS[form].get("variant")
    use = None if FORMS[form].get("safe_serialization", True) else False
    arguments = {"variant": variant, "use_safetensors": use}
    return (
        verdict(lambda: by_diffusers(folder, **arguments)),
        verdict(lambda: load_checkpoint(folder, **arguments)),
    )


@pytest.fixture
def no_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill loses no written bytes, so the test need not wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_a_new_save_flushes_each_file_and_its_folder_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files before they get their names, and the folder after; each flush waits for the
    disk."""
    target = folder / "new"
    target.mkdir()
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(descriptor: int) -> None:
        flushed = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append("folder" if flushed == target else "file")
        fsync(descriptor)

    def noted_replace(source: Any, place: Any) -> None:
        events.append(Path(place).name)
        replace(source, place)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    save_weights(filled(0), target, companions={"config.json": b"{}"})
    renamed = ["diffusion_pytorch_model.safetensors", "config.json"]
    assert events == ["file", "file", *renamed, "folder"]


STEPS = ("os.rename", "os.remove", "os.link")
FINISHED, SURVIVED, RAISED = 7, 8, 9


def at_step(number: int, act: Callable[[], None], save: Callable[[], object]) -> int:
    """The exit code of a child that saves, and acts before its ``number``-th change of a name:
    ``FINISHED`` if there are not so many, ``SURVIVED`` if it saved all the same."""

    def work() -> None:
        steps = 0

        def hook(event: str, _: object) -> None:
            nonlocal steps
            if event in STEPS:
                steps += 1
                if steps == number:
                    act()

        sys.addaudithook(hook)
        try:
            save()
        except (OSError, KeyboardInterrupt):
            os._exit(RAISED)
        os._exit(FINISHED if steps < number else SURVIVED)

    return in_child(work)


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    raise OSError(errno.EIO, "made to fail")


def interrupt() -> None:
    raise KeyboardInterrupt


def old_checkpoint(folder: Path, form: str) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    Net().save_config(folder)
    if form in ("single", "two", "three"):
        # Files that loaders use if there are no safetensors.
        save_weights(filled(2), folder, safe_serialization=False)
    save_weights(filled(0), folder, **FORMS[form])


@pytest.mark.parametrize(("before", "after"), REPLACED)
@pytest.mark.usefixtures("no_flush")
def test_killed_at_every_step(folder: Path, before: str, after: str) -> None:
    tensors = filled(1)
    seen = []
    for number in itertools.count(1):
        old_checkpoint(folder, before)
        code = at_step(number, kill_myself, lambda: save_weights(tensors, folder, **FORMS[after]))
        seen.append(verdicts(folder, after))
        if code == FINISHED:
            break
        assert code == -signal.SIGKILL
        # Leftover files do not disturb the next save.
        written = save_weights(filled(0), folder, **FORMS[before])
        left = {name for name in names(folder) if name.startswith(".weightlift-")}
        assert names(folder) - left - {f"{STEM}.bin"} == set(written) - {f"{STEM}.bin"}
        assert verdicts(folder, before) == ("old", "old")
    # All files change at one moment, for both libraries.
    changed = seen.index(("new", "new"))
    assert 1 <= changed < len(seen)
    assert seen == [("old", "old")] * changed + [("new", "new")] * (len(seen) - changed)


@pytest.mark.parametrize(("before", "after"), [("three", "three"), ("three", "single")])
@pytest.mark.usefixtures("no_flush")
def test_killed_where_there_are_no_hard_links(
    folder: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(errno.EPERM, "no hard links here")

    monkeypatch.setattr(os, "link", no_links)
    tensors = filled(1)
    seen = []
    for number in itertools.count(1):
        old_checkpoint(folder, before)
        code = at_step(number, kill_myself, lambda: save_weights(tensors, folder, **FORMS[after]))
        seen.append(verdicts(folder, after))
        if code == FINISHED:
            break
    assert [pair for pair, _ in itertools.groupby(seen)] == [
        ("old", "old"),
        ("refused", "refused"),
        ("new", "new"),
    ]


@pytest.mark.parametrize(
    ("before", "after"), [("single", "three"), ("three", "single"), ("three", "three")]
)
@pytest.mark.parametrize("act", [fail, interrupt])
@pytest.mark.usefixtures("no_flush")
def test_interrupted_at_every_step(
    folder: Path, before: str, after: str, act: Callable[[], None]
) -> None:
    tensors = filled(1)
    for number in itertools.count(1):
        old_checkpoint(folder, before)
        code = at_step(number, act, lambda: save_weights(tensors, folder, **FORMS[after]))
        assert not any(name.startswith(".weightlift-") for name in names(folder))
        found = verdicts(folder, after)
        if code == RAISED:
            assert found in [("old", "old"), ("new", "new")]
        else:
            assert code == FINISHED or act is fail
            assert found == ("new", "new")
        if code == FINISHED:
            break


@pytest.mark.parametrize("form", ["single", "three"])
def test_interrupted_while_writing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    files = set(save_weights(filled(0), folder, **FORMS[form]))
    write = saving._write_safetensors
    calls = itertools.count()

    def interrupted(*arguments: Any) -> None:
        write(*arguments)
        if next(calls) == len(files) // 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(saving, "_write_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save_weights(filled(1), folder, **FORMS[form])
    unchanged(folder, files, form)


@pytest.mark.parametrize(("before", "after"), [*itertools.product(["single", "three"], repeat=2)])
@pytest.mark.usefixtures("no_flush")
def test_a_config_changes_with_the_weights(folder: Path, before: str, after: str) -> None:
    """Never a mixture of old and new files, which might fit and be wrong."""
    tensors = filled(1)
    seen = []
    for number in itertools.count(1):
        old_checkpoint(folder, before)
        old = (folder / "config.json").read_bytes()
        new = old.replace(b"}", b" }")
        files = {"config.json": new}
        code = at_step(
            number,
            kill_myself,
            lambda files=files: save_weights(tensors, folder, companions=files, **FORMS[after]),
        )
        config = {old: "old", new: "new"}[(folder / "config.json").read_bytes()]
        seen.append((config, *verdicts(folder, after)))
        if code == FINISHED:
            break
        save_weights(filled(0), folder, companions={"config.json": old}, **FORMS[before])
        assert verdicts(folder, before) == ("old", "old")
    assert seen[0] == ("old", "old", "old")
    assert seen[-1] == ("new", "new", "new")
    refused = {(config, "refused", "refused") for config in ("old", "new")}
    assert set(seen) <= {("old", "old", "old"), ("new", "new", "new"), *refused}


@pytest.mark.usefixtures("no_flush")
def test_a_config_that_stays_the_same(folder: Path) -> None:
    """The old checkpoint is never at risk."""
    tensors = filled(1)
    seen = set()
    for number in itertools.count(1):
        old_checkpoint(folder, "three")
        files = {"config.json": (folder / "config.json").read_bytes(), "README.md": b"new"}
        save = functools.partial(save_weights, tensors, folder, companions=files)
        code = at_step(number, kill_myself, save)
        seen.add(verdicts(folder, "single"))
        if code == FINISHED:
            break
    assert seen == {("old", "old"), ("new", "new")}
    assert (folder / "README.md").read_text() == "new"


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
@pytest.mark.deep
@pytest.mark.parametrize(("before", "after"), REPLACED)
@pytest.mark.usefixtures("no_flush")
def test_killed_at_every_system_call(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str, after: str
) -> None:
    monkeypatch.setattr(saving, "_WRITERS", 1)  # strace follows one thread
    tensors = filled(1)
    log = tmp_path / "log"

    def saved(*options: str) -> int:
        old_checkpoint(folder, before)
        return under_strace(lambda: save_weights(tensors, folder, **FORMS[after]), log, *options)

    assert saved() == 0
    calls = re.findall(r"^(\w+)\(", log.read_text(), re.MULTILINE)
    seen = []
    counts: Counter[str] = Counter()
    for call in calls[: calls.index("exit_group")]:
        counts[call] += 1
        code = saved("-e", f"inject={call}:signal=SIGKILL:when={counts[call]}")
        if code == 0:  # calls for memory are not the same in every run
            assert verdicts(folder, after) == ("new", "new")
            continue
        assert code == -signal.SIGKILL
        seen.append(verdicts(folder, after))
    assert len(seen) > 30
    changed = seen.index(("new", "new"))
    assert seen == [("old", "old")] * changed + [("new", "new")] * (len(seen) - changed)


def lost_power(folder: Path, steps: list[list[str]], contents: Path) -> Iterator[dict[str, Path]]:
    """The possible contents of the folder after a loss of power: any changes since the last flush
    may be lost, in any order."""
    state = {path.name: path for path in folder.iterdir()}
    waiting: list[list[str]] = []
    for step in [*steps, ["flush"]]:
        if step[0] != "flush":
            waiting.append(step)
            continue
        for kept in itertools.product([True, False], repeat=len(waiting)):
            after = dict(state)
            for (what, *which), happened in zip(waiting, kept, strict=True):
                if not happened:
                    continue
                if what == "os.rename":
                    after[which[1]] = contents / which[0]
                elif what == "os.link" and which[0] in state:
                    after[which[1]] = state[which[0]]
                elif what == "os.remove":
                    after.pop(which[0], None)
            yield after
            if all(kept):
                done = after
        state, waiting = done, []


@pytest.mark.parametrize(
    ("before", "after"),
    [("single", "single"), ("single", "two"), ("two", "single"), ("two", "two"), ("two", "three")],
)
def test_a_loss_of_power(folder: Path, tmp_path: Path, before: str, after: str) -> None:
    old_checkpoint(folder, before)
    copy, contents, log = tmp_path / "copy", tmp_path / "contents", tmp_path / "log"
    shutil.copytree(folder, copy)
    contents.mkdir()
    tensors = filled(1)

    def save() -> None:
        steps: list[list[str]] = []
        flush = replacing.flush_folder

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in STEPS:
                paths = [Path(path) for path in arguments if isinstance(path, (str, Path))]
                steps.append([event, *(path.name for path in paths)])
                if event == "os.rename" and paths[0].parent == folder:
                    (contents / paths[0].name).write_bytes(paths[0].read_bytes())

        def noted_flush(path: Path) -> None:
            flush(path)
            steps.append(["flush"])

        saving.flush_folder = replacing.flush_folder = noted_flush  # type: ignore[assignment]
        sys.addaudithook(hook)
        save_weights(tensors, folder, **FORMS[after])
        log.write_text(json.dumps(steps))

    assert in_child(save) == 0
    steps = [
        step
        for step in json.loads(log.read_text())
        if step[0] != "os.remove" or not step[1].startswith(".weightlift-")
    ]
    seen = {}
    for state in lost_power(copy, steps, contents):
        key = frozenset(state.items())
        if key not in seen:
            shutil.rmtree(folder)
            folder.mkdir()
            for name, path in state.items():
                shutil.copy(path, folder / name)
            seen[key] = verdicts(folder, after)
    assert set(seen.values()) == {("old", "old"), ("new", "new")}

"""``ModelMixin.save_pretrained``, ``push_to_hub``, and models of the Hub."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import accelerate
import pytest
import safetensors.torch
import torch
from torch import nn

import weightlift as wl
from hub_server import HubServer, Repository, hub, mirror, uploads
from model_classes import MADE, OURS, THEIRS, made
from support import assert_same, assert_same_tensors, bits, in_child
from weightlift.checkpoint.hub import HubArguments

__all__ = ["hub", "mirror"]  # fixtures

STEM = "diffusion_pytorch_model"
NAME = "user/model"


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


def changed(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    return model


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


def test_the_files_are_diffusers(tmp_path: Path) -> None:
    for how in (
        {},
        {"max_shard_size": "1KB"},
        {"variant": "fp16", "max_shard_size": 1000},
        {"safe_serialization": False, "variant": "fp16"},
    ):
        folders = []
        for library in (OURS, THEIRS):
            folders.append(tmp_path / f"{len(names(tmp_path))}")
            made(library, "UNet").save_pretrained(folders[-1], **how)
        ours, theirs = folders
        assert names(ours) == names(theirs)
        for name in names(ours):
            if name.endswith(".index.json"):
                assert json.loads((ours / name).read_text()) == json.loads(
                    (theirs / name).read_text()
                )
            if name.endswith(".safetensors"):
                files = [safetensors.safe_open(f / name, "pt") for f in folders]
                assert files[0].metadata() == files[1].metadata() == {"format": "pt"}


def test_only_the_main_process_saves(folder: Path) -> None:
    made(OURS, "Nested").save_pretrained(folder, is_main_process=False)
    assert names(folder) == set()


def test_a_directory_that_is_a_file(folder: Path) -> None:
    folder.write_bytes(b"mine")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        made(OURS, "Nested").save_pretrained(folder)
    assert folder.read_bytes() == b"mine"


def test_old_files_go(folder: Path) -> None:
    made(OURS, "UNet").save_pretrained(folder, max_shard_size=1000)
    made(OURS, "UNet").save_pretrained(folder, variant="fp16", max_shard_size=1000)
    (folder / "mine.safetensors").write_bytes(b"mine")
    before = names(folder)
    model = changed(made(OURS, "UNet"))
    model.save_pretrained(folder)
    gone = before - names(folder)
    assert len(gone) > 2
    assert f"{STEM}.safetensors.index.json" in gone
    left = names(folder) - {f"{STEM}.safetensors"}
    assert left < before
    assert all("fp16" in name or name in ("config.json", "mine.safetensors") for name in left)
    for library in (OURS, THEIRS):
        assert_same_tensors(state(library.UNet.from_pretrained(folder)), state(model))
    model.save_pretrained(folder, max_shard_size=2000)
    assert f"{STEM}.safetensors" not in names(folder)
    assert_same_tensors(state(OURS.UNet.from_pretrained(folder)), state(model))


def test_an_index_that_cannot_be_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder has the same files as before, and no others."""
    old = made(OURS, "UNet")
    old.save_pretrained(folder, max_shard_size=1000)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    replace = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if Path(target).name.endswith(".index.json"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target))
        return replace(self, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            changed(made(OURS, "UNet")).save_pretrained(folder, max_shard_size=1000)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert_same_tensors(state(OURS.UNet.from_pretrained(folder)), state(old))


def test_errors_of_a_save_function_are_its_own(folder: Path) -> None:
    def refuse(tensors: dict[str, torch.Tensor], path: str) -> None:
        raise LookupError("no such key in the vault")

    with pytest.raises(LookupError, match="no such key in the vault"):
        made(OURS, "UNet").save_pretrained(folder, save_function=refuse)
    assert not {name for name in names(folder) if name.endswith(".safetensors")}


def saved_by_the_environment(tensors: dict[str, torch.Tensor], path: str) -> None:
    safetensors.torch.save_file(tensors, path, metadata={"by": "me"})


def test_a_save_function(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(OURS, "UNet")
    called: list[tuple[int, str]] = []

    def save(tensors: dict[str, torch.Tensor], path: str) -> None:
        called.append((len(tensors), Path(path).suffix))
        safetensors.torch.save_file(tensors, path)

    model.save_pretrained(folder, save_function=save, max_shard_size=1000)
    assert len(called) == len(list(folder.glob("*.safetensors"))) > 2
    assert {suffix for _, suffix in called} == {".safetensors"}
    assert sum(count for count, _ in called) == len(state(model))
    assert_same_tensors(state(OURS.UNet.from_pretrained(folder)), state(model))
    model.save_pretrained(folder / "a", save_function=accelerate.Accelerator().save)
    assert_same_tensors(state(THEIRS.UNet.from_pretrained(folder / "a")), state(model))
    model.save_pretrained(folder / "bin", save_function=torch.save, safe_serialization=False)
    assert_same_tensors(state(OURS.UNet.from_pretrained(folder / "bin")), state(model))
    monkeypatch.setenv("DIFFUSERS_SAVE_MODE", f"{__name__}:saved_by_the_environment")
    model.save_pretrained(folder / "b")
    with safetensors.safe_open(folder / "b" / f"{STEM}.safetensors", "pt") as file:
        assert file.metadata() == {"by": "me"}


# Saving over files that are in use.


@pytest.mark.parametrize("saving", [{}, {"max_shard_size": 1000}], ids=str)
def test_into_the_folder_that_a_model_maps(folder: Path, saving: dict[str, Any]) -> None:
    original = made(OURS, "UNet")
    original.save_pretrained(folder, **saving)
    loaded = OURS.UNet.from_pretrained(folder)
    report = wl.last_report()
    assert report is not None
    assert report.mapped_bytes > 0
    changed(made(OURS, "UNet")).save_pretrained(folder, **saving)
    assert_same_tensors(state(loaded), state(original))
    # Its own tensors.
    loaded = changed(OURS.UNet.from_pretrained(folder))
    expected = {name: tensor.clone() for name, tensor in state(loaded).items()}
    loaded.save_pretrained(folder, **saving)
    assert_same_tensors(state(loaded), expected)
    assert_same_tensors(state(OURS.UNet.from_pretrained(folder)), expected)


@pytest.mark.parametrize("saving", [{}, {"max_shard_size": 1000}], ids=str)
def test_into_the_folder_that_disk_entries_read(folder: Path, saving: dict[str, Any]) -> None:
    original = made(OURS, "UNet").eval()
    original.save_pretrained(folder, **saving)
    loaded = OURS.UNet.from_pretrained(folder, device_map={"conv_in": "cpu", "": "disk"})
    inputs = MADE["UNet"][1]
    with torch.no_grad():
        expected = original(inputs)
        changed(made(OURS, "UNet")).save_pretrained(folder, **saving)
        assert_same(loaded(inputs), expected)
        # Weights on the disk are saved too.
        loaded.save_pretrained(folder, max_shard_size=700)
        assert_same(loaded(inputs), expected)
    assert_same_tensors(state(OURS.UNet.from_pretrained(folder)), state(original))


def test_what_is_tied_is_saved_once_from_the_disk(folder: Path) -> None:
    original = made(OURS, "Transformer")
    original.save_pretrained(folder)
    loaded = OURS.Transformer.from_pretrained(folder, device_map={"": "disk"}, dtype="bfloat16")
    loaded.save_pretrained(folder / "again")
    with safetensors.safe_open(folder / "again" / f"{STEM}.safetensors", "pt") as file:
        assert "head.weight" not in file.keys()  # noqa: SIM118
    again = OURS.Transformer.from_pretrained(folder / "again", dtype="auto")
    assert again.head.weight is again.embedding.weight
    assert_same_tensors(state(again), state(original.to(torch.bfloat16)))


def test_what_has_no_values_is_not_saved(folder: Path) -> None:
    with torch.device("meta"):
        model = OURS.Nested()
    with pytest.raises(ValueError, match=r"steps\.step0\.weight.*'meta'"):
        model.save_pretrained(folder)
    assert names(folder) == set()


# Folders that cannot be written.


SAVINGS = pytest.mark.parametrize(
    "saving",
    [{}, {"max_shard_size": 3000}, {"safe_serialization": False}, {"variant": "fp16"}],
    ids=str,
)


@SAVINGS
def test_a_folder_that_may_not_be_written_to(saving: dict[str, Any]) -> None:
    # Not in tmp_path, whose parents are closed to others.
    with tempfile.TemporaryDirectory() as parent:
        Path(parent).chmod(0o755)
        folder = Path(parent, "model")
        model = made(OURS, "UNet")
        model.save_pretrained(folder, **saving)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        folder.chmod(0o555)
        model = changed(model)

        def save() -> None:
            if os.geteuid() == 0:  # who may do everything
                os.seteuid(65534)
            for place in (folder, folder / "new"):
                with pytest.raises(PermissionError):
                    model.save_pretrained(place, **saving)

        assert in_child(save) == 0
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@SAVINGS
def test_a_file_that_may_not_grow(folder: Path, saving: dict[str, Any]) -> None:
    model = made(OURS, "UNet")
    model.save_pretrained(folder / "old", **saving)
    before = {path.name: path.read_bytes() for path in (folder / "old").iterdir()}
    model = changed(model)

    def save() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        for place in ("old", "new"):
            with pytest.raises(OSError) as caught:
                model.save_pretrained(folder / place, **saving)
            assert caught.value.errno == errno.EFBIG
            assert Path(caught.value.filename).parent == folder / place

    assert in_child(save) == 0
    assert {path.name: path.read_bytes() for path in (folder / "old").iterdir()} == before
    assert names(folder / "new") == set()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
@SAVINGS
def test_a_full_disk(folder: Path, saving: dict[str, Any]) -> None:
    folder.mkdir()
    small, large = OURS.Nested(), OURS.Nested(stages=[{"width": 400}], ends={"width": 600})

    def save() -> None:
        new_namespace = 0x00020000  # CLONE_NEWNS: other processes do not see the mount
        assert ctypes.CDLL(None).unshare(new_namespace) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", folder], check=True)
        small.save_pretrained(folder, **saving)
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(OSError) as caught:
            large.save_pretrained(folder, **saving)
        assert caught.value.errno == errno.ENOSPC
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    assert in_child(save) == 0


# The Hub.


def push(hub: HubServer, model: Any, folder: Path, **saving: Any) -> Repository:
    """The model as a repository's only content."""
    model.save_pretrained(folder, **saving)
    return hub.add(NAME, {path.name: path.read_bytes() for path in folder.iterdir()})


@uploads
def test_a_model_is_pushed_when_it_is_saved(hub: HubServer, folder: Path) -> None:
    model = made(OURS, "UNet")
    model.save_pretrained(folder, push_to_hub=True, max_shard_size=1000)
    assert_same_tensors(state(OURS.UNet.from_pretrained("user/model")), state(model))
    model = changed(model)
    model.save_pretrained(
        folder / "other",
        push_to_hub=True,
        variant="fp16",
        repo_id="user/named",
        commit_message="second",
        private=True,
    )
    repository = hub.repositories["user/named"]
    assert repository.private
    commit = repository.find("main")
    assert commit is not None
    assert commit.message == "second"
    for token in ({"token": "hf_stored"}, {"use_auth_token": "hf_stored"}, {}):
        loaded = OURS.UNet.from_pretrained("user/named", variant="fp16", **token)
        assert_same_tensors(state(loaded), state(model))
    with pytest.raises(FileNotFoundError, match="no such repository, or it is private"):
        OURS.UNet.from_pretrained(
            "user/named", variant="fp16", token=False, cache_dir=folder / "cache"
        )
    model.save_pretrained(folder / "third", push_to_hub=True, is_main_process=False)
    assert "user/third" not in hub.repositories


@uploads
def test_a_model_is_pushed(hub: HubServer) -> None:
    model = made(OURS, "Transformer")
    model.push_to_hub("mine", subfolder="text", safe_serialization=False)
    loaded, info = OURS.Transformer.from_pretrained(
        "user/mine", subfolder="text", output_loading_info=True
    )
    assert_same_tensors(state(loaded), state(model))
    assert not any(info.values())
    assert loaded.config["_name_or_path"] == "user/mine"


@pytest.mark.parametrize(
    ("saving", "loading"),
    [({}, {}), ({"max_shard_size": 1000}, {}), ({"safe_serialization": False}, {}),
     ({"variant": "fp16", "max_shard_size": 1000}, {"variant": "fp16"})],
    ids=str,
)  # fmt: skip
def test_a_model_of_the_hub(
    hub: HubServer, folder: Path, saving: dict[str, Any], loading: dict[str, Any]
) -> None:
    model = made(THEIRS, "UNet")
    repository = push(hub, model, folder, **saving)
    first = repository.refs["main"]
    loaded = OURS.UNet.from_pretrained(NAME, **loading)
    assert_same_tensors(state(loaded), state(model))
    # Cached files need no Hub.
    hub.down = True
    loaded = OURS.UNet.from_pretrained(NAME, local_files_only=True, **loading)
    assert_same_tensors(state(loaded), state(model))
    hub.down = False
    # Another commit, and the one before.
    other = changed(made(OURS, "UNet"))
    other.save_pretrained(folder, **saving)
    repository.commit({path.name: path.read_bytes() for path in folder.iterdir()})
    loaded = OURS.UNet.from_pretrained(NAME, **loading)
    assert_same_tensors(state(loaded), state(other))
    loaded = OURS.UNet.from_pretrained(NAME, revision=first, **loading)
    assert_same_tensors(state(loaded), state(model))


@pytest.mark.parametrize("sharded", [False, True])
def test_a_mirror_gets_no_token(
    hub: HubServer, mirror: HubServer, folder: Path, sharded: bool
) -> None:
    model = made(OURS, "UNet")
    push(hub, model, folder, **({"max_shard_size": 1000} if sharded else {}))
    loaded = OURS.UNet.from_pretrained(NAME, mirror=mirror.url)
    assert_same_tensors(state(loaded), state(model))
    assert hub.requests == hub.cdn_requests == []
    assert len(mirror.seen("GET")) > 2
    assert {r.token for r in (*mirror.requests, *mirror.cdn_requests)} == {None}
    mirror.requests.clear()
    mirror.tokens["hf_given"] = "user"
    OURS.UNet.from_pretrained(NAME, mirror=mirror.url, token="hf_given", force_download=True)
    assert {r.token for r in mirror.requests} == {"hf_given"}


def test_a_download_that_breaks_off(hub: HubServer, folder: Path) -> None:
    model = made(OURS, "UNet")
    push(hub, model, folder)
    hub.cuts[f"{STEM}.safetensors"] = [500] * 20
    with pytest.raises(wl.ReadError, match="try again") as caught:
        OURS.UNet.from_pretrained(NAME)
    assert f"{STEM}.safetensors" in str(caught.value)
    hub.cuts.clear()
    assert_same_tensors(state(OURS.UNet.from_pretrained(NAME)), state(model))
    # A download that resumes.
    hub.cuts[f"{STEM}.safetensors"] = [500, 700]
    loaded = OURS.UNet.from_pretrained(NAME, force_download=True)
    assert_same_tensors(state(loaded), state(model))


def test_what_the_hub_has_not(hub: HubServer, folder: Path) -> None:
    push(hub, made(OURS, "UNet"), folder)
    with pytest.raises(FileNotFoundError, match="no such repository"):
        OURS.UNet.from_pretrained("user/none")
    with pytest.raises(FileNotFoundError, match="no revision 'none'"):
        OURS.UNet.from_pretrained(NAME, revision="none")
    with pytest.raises(FileNotFoundError, match="no such file"):
        OURS.UNet.from_pretrained(NAME, subfolder="none")
    with pytest.raises(wl.CheckpointError, match="fp16"):
        OURS.UNet.from_pretrained(NAME, variant="fp16")


def test_all_is_of_one_commit(hub: HubServer, folder: Path) -> None:
    model = made(OURS, "UNet")
    repository = push(hub, model, folder)

    class Pushed(OURS.UNet):
        """While its config is read, another model is pushed."""

        @classmethod
        def load_config(cls, *args: Any, **kwargs: Any) -> Any:
            found = super().load_config(*args, **kwargs)
            repository.commit(dict.fromkeys(("config.json", f"{STEM}.safetensors"), b"changed"))
            return found

    assert_same_tensors(state(Pushed.from_pretrained(NAME)), state(model))


def test_a_proxy_warns_once(hub: HubServer, folder: Path) -> None:
    from weightlift.checkpoint import hub as wl_hub

    wl_hub._warn_of_proxies.cache_clear()
    push(hub, made(OURS, "Nested"), folder)
    with pytest.warns(UserWarning, match="HTTPS_PROXY"):
        OURS.Nested.from_pretrained(NAME, proxies={"https": "http://localhost:1"})
    OURS.Nested.from_pretrained(NAME, proxies={"https": "http://localhost:1"})


def test_a_cache_of_ones_own(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    push(hub, made(OURS, "Nested"), folder)
    loaded = OURS.Nested.from_pretrained(NAME, cache_dir=tmp_path / "mine")
    files = [path for path in (tmp_path / "mine").rglob("*") if path.name.startswith(STEM)]
    assert len(files) == 1
    # A snapshot's files are links.
    again = OURS.Nested.from_pretrained(files[0].parent)
    assert bits(next(again.parameters())) == bits(next(loaded.parameters()))
    assert HubArguments(cache_dir=tmp_path / "mine").cache_dir == tmp_path / "mine"

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers.utils.hub_utils
import huggingface_hub.constants
import huggingface_hub.errors
import msgpack
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import weightlift as wl
from hub_server import HubServer, Repository, hub, mirror, uploads
from weightlift.checkpoint import hub as wl_hub
from weightlift.checkpoint.hub import HubArguments, commit_of, download, list_files, snapshot
from weightlift.core.errors import CheckpointError
from weightlift.models import ConfigMixin, ModelMixin, PushToHubMixin, register_to_config
from weightlift.models.hub_mixin import create_repository

__all__ = ["hub", "mirror"]  # fixtures

WEIGHTS = bytes(range(256)) * 8
FILES = {
    "config.json": b'{"_class_name": "Model", "width": 3}',
    "model.safetensors": WEIGHTS,
    "unet/config.json": b'{"width": 4}',
    "unet/model-00001-of-00002.safetensors": b"one",
    "unet/model-00002-of-00002.safetensors": b"two",
    "unet [1]/config.json": b'{"width": 5}',
}
NAME = "user/model"


@pytest.fixture
def repository(hub: HubServer) -> Repository:
    return hub.add(NAME, FILES)


class Saved(ConfigMixin):
    config_name = "config.json"

    @register_to_config
    def __init__(self, width: int = 2) -> None:
        pass


class Model(Saved, PushToHubMixin):
    def save_pretrained(
        self, folder: str, safe_serialization: bool = True, variant: str | None = None
    ) -> None:
        self.save_config(folder)
        stem = f"model.{variant}" if variant else "model"
        tensors = {"weight": torch.arange(3.0)}
        if safe_serialization:
            save_file(tensors, Path(folder, f"{stem}.safetensors"))
        else:
            torch.save(tensors, Path(folder, f"{stem}.bin"))


class Scheduler(Saved, PushToHubMixin):
    config_name = "scheduler_config.json"


def main(hub: HubServer, name: str, ref: str = "main") -> dict[str, bytes]:
    commit = hub.repositories[name].find(ref)
    assert commit is not None
    return commit.files


# Downloads.


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_file_is_downloaded_once(hub: HubServer, repository: Repository, name: str) -> None:
    path = download(NAME, name, HubArguments())
    assert path.read_bytes() == FILES[name]
    assert commit_of(path) == repository.refs["main"]
    before = len(hub.seen("GET")), len(hub.cdn_requests)
    assert download(NAME, name, HubArguments()) == path
    assert (len(hub.seen("GET")), len(hub.cdn_requests)) == before
    download(NAME, name, HubArguments(force_download=True))
    assert (len(hub.seen("GET")), len(hub.cdn_requests)) != before


def test_the_stored_token_goes_to_the_hub_and_no_further(
    hub: HubServer, repository: Repository
) -> None:
    arguments = HubArguments().pinned(NAME)
    download(NAME, "model.safetensors", arguments)
    assert {request.token for request in hub.requests} == {"hf_stored"}
    assert {request.token for request in hub.cdn_requests} == {None}
    assert "weightlift/" in hub.requests[0].headers["user-agent"]
    hub.requests.clear()
    download(NAME, "config.json", HubArguments(token=False))
    assert {request.token for request in hub.requests} == {None}


def test_a_cache_of_ones_own(repository: Repository, tmp_path: Path) -> None:
    arguments = HubArguments(cache_dir=tmp_path / "mine", subfolder="unet")
    path = download(NAME, "config.json", arguments)
    assert path.is_relative_to(tmp_path / "mine")
    assert path.read_bytes() == FILES["unet/config.json"]


def test_a_snapshot_of_what_matches(repository: Repository) -> None:
    folder = snapshot(NAME, ["*.safetensors"], HubArguments(subfolder="unet"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        "model-00001-of-00002.safetensors": b"one",
        "model-00002-of-00002.safetensors": b"two",
    }
    folder = snapshot(NAME, ["config.json"], HubArguments(subfolder="unet [1]"))
    assert [path.read_bytes() for path in folder.iterdir()] == [b'{"width": 5}']


def test_the_names_of_the_files(repository: Repository) -> None:
    assert list_files(NAME, HubArguments()) == sorted([".gitattributes", *FILES])
    assert list_files(NAME, HubArguments(subfolder="unet")) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    ]


# Revisions.


def test_all_is_of_one_commit(hub: HubServer, repository: Repository) -> None:
    arguments = HubArguments().pinned(NAME)
    first = repository.refs["main"]
    config = download(NAME, "config.json", arguments)
    repository.commit(dict.fromkeys(FILES, b"changed"))
    weights = download(NAME, "model.safetensors", arguments)
    assert weights.read_bytes() == WEIGHTS
    assert arguments.revision == commit_of(config) == commit_of(weights) == first
    hub.requests.clear()
    assert arguments.pinned(NAME) is arguments
    assert hub.requests == []
    assert HubArguments().pinned(NAME).revision == repository.refs["main"] != first


@pytest.mark.parametrize("revision", ["v1", "refs/pr/3", "feature/x"])
def test_branches_tags_and_pull_requests(repository: Repository, revision: str) -> None:
    oid = repository.commit({"config.json": b"of that one"}, ref=revision)
    arguments = HubArguments(revision=revision)
    assert arguments.pinned(NAME).revision == oid
    for found in (arguments, arguments.pinned(NAME)):
        assert download(NAME, "config.json", found).read_bytes() == b"of that one"


# Refusals.

WAYS: dict[str, Callable[[HubArguments], object]] = {
    "pinned": lambda arguments: arguments.pinned(NAME),
    "download": lambda arguments: download(NAME, "config.json", arguments),
    "snapshot": lambda arguments: snapshot(NAME, ["*.json"], arguments),
    "list_files": lambda arguments: list_files(NAME, arguments),
    "load_config": lambda arguments: Saved.load_config(NAME, **dataclasses.asdict(arguments)),
}
ALL_WAYS = pytest.mark.parametrize("way", WAYS)


@ALL_WAYS
def test_no_such_repository(hub: HubServer, way: str) -> None:
    with pytest.raises(FileNotFoundError, match=f"no such repository.*{NAME}") as caught:
        WAYS[way](HubArguments())
    assert caught.value.code == "repository_not_found"
    assert hub.url in str(caught.value)
    assert isinstance(caught.value, wl.ReadError)
    assert isinstance(caught.value.__cause__, huggingface_hub.errors.RepositoryNotFoundError)


@ALL_WAYS
def test_a_private_repository(hub: HubServer, repository: Repository, way: str) -> None:
    repository.private = True
    with pytest.raises(FileNotFoundError, match="token="):
        WAYS[way](HubArguments(token=False))
    WAYS[way](HubArguments())


@ALL_WAYS
def test_no_such_revision(hub: HubServer, repository: Repository, way: str) -> None:
    with pytest.raises(FileNotFoundError, match="no revision 'v9'") as caught:
        WAYS[way](HubArguments(revision="v9"))
    assert caught.value.code == "revision_not_found"
    assert isinstance(caught.value.__cause__, huggingface_hub.errors.RevisionNotFoundError)


@ALL_WAYS
def test_a_token_that_is_none(hub: HubServer, repository: Repository, way: str) -> None:
    with pytest.raises(PermissionError, match="Invalid credentials") as caught:
        WAYS[way](HubArguments(token="hf_wrong"))
    assert caught.value.code == "permission_denied"


@pytest.mark.parametrize("way", ["download", "snapshot", "load_config"])
@pytest.mark.parametrize("token", [False, None])
def test_a_gated_repository(
    hub: HubServer, repository: Repository, way: str, token: bool | None
) -> None:
    repository.gated = True
    with pytest.raises(PermissionError, match="is restricted") as caught:
        WAYS[way](HubArguments(token=token))
    assert caught.value.code == "permission_denied"
    assert f"{hub.url}/{NAME}" in str(caught.value)  # where to ask
    assert isinstance(caught.value.__cause__, huggingface_hub.errors.GatedRepoError)
    repository.readers.add("user")
    WAYS[way](HubArguments())


def test_no_such_file(repository: Repository) -> None:
    with pytest.raises(FileNotFoundError, match="no such file in revision 'main'") as caught:
        download(NAME, "model.bin", HubArguments(subfolder="unet"))
    assert caught.value.code == "not_found"
    assert caught.value.filename == f"{NAME}/unet/model.bin"
    assert isinstance(caught.value.__cause__, huggingface_hub.errors.RemoteEntryNotFoundError)


@pytest.mark.parametrize("name", ["a/b/c", "/no/such/folder", "./none", "a--b", "a b"])
def test_neither_path_nor_id(hub: HubServer, name: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder") as caught:
        download(name, "config.json", HubArguments())
    assert caught.value.filename == name
    # The error treats a path as a path, without the Hub's rules for ids.
    assert ("not a repository id" in str(caught.value)) == (name in ("a--b", "a b"))
    assert hub.requests == []


# Bad connections.


def test_a_connection_that_is_cut_goes_on_where_it_was(
    hub: HubServer, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 100)
    hub.cuts["model.safetensors"] = [450, 0, 700]
    assert download(NAME, "model.safetensors", HubArguments()).read_bytes() == WEIGHTS
    ranges = [request.headers.get("range") for request in hub.cdn_requests]
    assert ranges == [None, "bytes=400-", "bytes=400-", "bytes=1100-"]


def test_a_connection_that_stays_cut_leaves_nothing(
    hub: HubServer, repository: Repository, tmp_path: Path
) -> None:
    hub.cuts["model.safetensors"] = [0] * 20
    with pytest.raises(wl.ReadError, match="download was deleted, try again") as caught:
        download(NAME, "model.safetensors", HubArguments())
    assert caught.value.code == "read_failed"
    assert caught.value.filename == f"{NAME}/model.safetensors"
    blobs = tmp_path / "hub-cache" / "models--user--model" / "blobs"
    assert list(blobs.iterdir()) == []
    hub.cuts.clear()
    assert download(NAME, "model.safetensors", HubArguments()).read_bytes() == WEIGHTS


def go_offline(hub: HubServer, monkeypatch: pytest.MonkeyPatch, how: str) -> HubArguments:
    if how == "offline":
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.down = how == "down"
    hub.requests.clear()
    return HubArguments(local_files_only=how == "local")


OFFLINE = pytest.mark.parametrize("how", ["local", "offline", "down"])


@OFFLINE
@ALL_WAYS
def test_what_is_cached_loads_without_the_hub(
    hub: HubServer,
    repository: Repository,
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    how: str,
) -> None:
    online = HubArguments().pinned(NAME)
    snapshot(NAME, ["*.json"], online)
    expected = WAYS[way](online)
    arguments = go_offline(hub, monkeypatch, how)
    found = WAYS[way](arguments)
    if way == "pinned":
        assert isinstance(found, HubArguments)
        assert found.revision == online.revision
    elif way == "list_files":
        assert found == ["config.json", "unet [1]/config.json", "unet/config.json"]
    else:
        assert found == expected
    assert how == "down" or hub.requests == []


@OFFLINE
@ALL_WAYS
def test_what_is_not_cached(
    hub: HubServer,
    repository: Repository,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    way: str,
    how: str,
) -> None:
    arguments = go_offline(hub, monkeypatch, how)
    with pytest.raises(FileNotFoundError) as caught:
        WAYS[way](arguments)
    assert caught.value.code == "not_cached"
    reasons = {"local": "local_files_only=True", "offline": "HF_HUB_OFFLINE", "down": hub.url}
    for part in ("revision 'main'", str(tmp_path / "hub-cache"), reasons[how], NAME):
        assert part in str(caught.value)
    assert how == "down" or hub.requests == []


def test_names_of_a_snapshot_that_is_gone(hub: HubServer, repository: Repository) -> None:
    """Its reference is still in the cache."""
    path = download(NAME, "config.json", HubArguments())
    shutil.rmtree(path.parents[1])
    with pytest.raises(FileNotFoundError) as caught:
        list_files(NAME, HubArguments(local_files_only=True))
    assert caught.value.code == "not_cached"


def test_a_cache_that_is_no_folder(repository: Repository, tmp_path: Path) -> None:
    """The disk's own error, which names the file."""
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file") as caught:
        download(NAME, "config.json", HubArguments(cache_dir=tmp_path / "file"))
    assert caught.value.errno in (errno.ENOTDIR, errno.EEXIST)
    assert str(caught.value.filename).startswith(str(tmp_path / "file"))


def test_a_download_may_not_be_forced_offline(
    hub: HubServer, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    download(NAME, "config.json", HubArguments())
    with pytest.raises(wl.ArgumentError, match="force_download"):
        HubArguments(force_download=True, local_files_only=True)
    go_offline(hub, monkeypatch, "offline")
    with pytest.raises(FileNotFoundError, match="HF_HUB_OFFLINE"):
        download(NAME, "config.json", HubArguments(force_download=True))


@ALL_WAYS
def test_what_the_hub_does_not_give_any_more_loads_from_the_cache(
    hub: HubServer, repository: Repository, way: str
) -> None:
    snapshot(NAME, ["*.json"], HubArguments())
    del hub.repositories[NAME]
    WAYS[way](HubArguments())


# Mirrors.


@ALL_WAYS
def test_a_mirror_gets_no_stored_token(
    hub: HubServer, mirror: HubServer, repository: Repository, way: str
) -> None:
    WAYS[way](HubArguments(mirror=mirror.url + "/"))
    assert mirror.requests != []
    assert hub.requests == []
    for request in (*mirror.requests, *mirror.cdn_requests):
        assert "hf_stored" not in f"{request.path} {request.headers}"


@pytest.mark.parametrize("forwards", [False, True])
def test_weights_of_a_mirror(
    hub: HubServer, mirror: HubServer, repository: Repository, forwards: bool
) -> None:
    mirror.forward_to = hub.url if forwards else None
    arguments = HubArguments(mirror=mirror.url).pinned(NAME)
    assert download(NAME, "model.safetensors", arguments).read_bytes() == WEIGHTS
    assert Saved.load_config(NAME, mirror=mirror.url)["width"] == 3
    seen = [*mirror.requests, *hub.requests, *mirror.cdn_requests, *hub.cdn_requests]
    assert {request.token for request in seen} == {None}
    assert len(mirror.cdn_requests if not forwards else hub.cdn_requests) == 1
    assert bool(hub.requests) == forwards


@ALL_WAYS
@pytest.mark.parametrize("token", [True, "hf_given"])
def test_a_mirror_gets_the_token_that_is_given(
    hub: HubServer, mirror: HubServer, repository: Repository, way: str, token: bool | str
) -> None:
    hub.tokens["hf_given"] = "user"
    repository.private = True
    WAYS[way](HubArguments(mirror=mirror.url, token=token))
    expected = "hf_stored" if token is True else token
    assert {request.token for request in mirror.requests} == {expected}
    assert {request.token for request in mirror.cdn_requests} <= {None}
    assert hub.requests == []


@pytest.mark.parametrize("name", ["tuna", "hub.example.org", "ftp://hub.example.org", "https://"])
def test_a_mirror_is_an_endpoint(name: str) -> None:
    with pytest.raises(wl.ArgumentError, match="URL of an endpoint"):
        HubArguments(mirror=name)


# Arguments.


def test_arguments_are_taken_out_of_others() -> None:
    given = {"token": "t", "revision": "r", "subfolder": "", "local_files_only": None, "other": 1}
    given |= {"resume_download": True, "proxies": None, "force_download": True}
    assert HubArguments.pop_from(given) == HubArguments(
        token="t", revision="r", force_download=True
    )
    assert given == {"other": 1}


def test_the_former_name_of_the_token(hub: HubServer, repository: Repository) -> None:
    repository.private = True
    hub.tokens["hf_former"] = "user"
    assert Saved.load_config(NAME, use_auth_token="hf_former")["width"] == 3
    assert {request.token for request in hub.requests} == {"hf_former"}
    assert HubArguments.pop_from({"use_auth_token": None}).token is None
    with pytest.raises(wl.ArgumentError, match="old name"):
        HubArguments.pop_from({"use_auth_token": "a", "token": "b"})


def test_proxies_warn_once() -> None:
    wl_hub._warn_of_proxies.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            HubArguments.pop_from({"proxies": {"https": "http://proxy:80"}})
    assert ["HTTPS_PROXY" in str(warning.message) for warning in caught] == [True]


def test_the_commit_of_a_path() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert commit_of(f"/c/models--a--b/snapshots/{commit}/unet/config.json") == commit
    for path in (f"/c/snapshots/{commit}", "/c/snapshots/main/config.json", "config.json"):
        assert commit_of(path) is None


# Configs.


def test_a_config_of_the_hub(hub: HubServer, repository: Repository) -> None:
    config, rest, commit = Saved.load_config(
        NAME, subfolder="unet", return_unused_kwargs=True, return_commit_hash=True, other=1
    )
    assert (config, rest, commit) == ({"width": 4}, {"other": 1}, repository.refs["main"])
    repository.commit({"config.json": b"{"})
    with pytest.raises(wl.CheckpointError, match=r"config\.json: is not JSON: .*column 2"):
        Saved.load_config(NAME)


# Pushes.


class Layer(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2, bias=False)


def test_flax_weights_of_the_hub(hub: HubServer, repository: Repository) -> None:
    kernel = np.arange(6, dtype=np.float32).reshape(3, 2)
    array = msgpack.ExtType(1, msgpack.packb((kernel.shape, "float32", kernel.tobytes())))
    files = {
        "config.json": b'{"_class_name": "Layer"}',
        "diffusion_flax_model.msgpack": msgpack.packb({"layer": {"kernel": array}}),
    }
    hub.add("user/flax", files)
    model = Layer.from_pretrained("user/flax", from_flax=True)
    assert model.layer.weight.equal(torch.from_numpy(kernel.T.copy()))
    with pytest.raises(CheckpointError, match=r"neither diffusion_flax_model\.msgpack nor"):
        Layer.from_pretrained(NAME, from_flax=True)


@uploads
def test_a_model_is_pushed(hub: HubServer) -> None:
    url = Model(width=7).push_to_hub("mine")
    files = main(hub, "user/mine")
    assert files.keys() == {".gitattributes", "README.md", "config.json", "model.safetensors"}
    head = hub.repositories["user/mine"].find("main")
    assert head is not None
    assert head.message == "Upload model"
    assert url == f"{hub.url}/user/mine/commit/{head.oid}"
    assert Model.from_config(Model.load_config("user/mine")).config.width == 7
    weights = download("user/mine", "model.safetensors", HubArguments())
    assert load_file(weights)["weight"].tolist() == [0, 1, 2]
    # Weights came through LFS, whose URLs are signed, so no token is sent.
    assert [(r.method, r.token) for r in hub.cdn_requests] == [("PUT", None), ("GET", None)]
    assert not hub.repositories["user/mine"].private


@uploads
@pytest.mark.parametrize("cls", [Model, Scheduler])
def test_diffusers_pushes_the_same(hub: HubServer, cls: type[Any]) -> None:
    class Theirs(diffusers.utils.hub_utils.PushToHubMixin):
        def __init__(self, made: Any) -> None:
            self.save = made

        def save_pretrained(self, folder: str, **arguments: Any) -> None:
            self.save.save_config(folder) if cls is Scheduler else self.save.save_pretrained(
                folder, **arguments
            )

    Theirs.__name__ = cls.__name__
    for arguments in (
        {},
        {"subfolder": "part"},
        {"commit_message": "third", "create_pr": True, "private": True},
        {"variant": "fp16", "safe_serialization": False},
    ):
        cls(width=1).push_to_hub("ours", **arguments)
        Theirs(cls(width=1)).push_to_hub("theirs", **arguments)
        ours, theirs = (hub.repositories[f"user/{name}"] for name in ("ours", "theirs"))
        assert ours.refs.keys() == theirs.refs.keys()
        assert ours.private == theirs.private
        messages = [[c.message for c in which.commits.values()] for which in (ours, theirs)]
        assert messages[0] == messages[1]
        for ref in ours.refs:
            found = [main(hub, f"user/{name}", ref) for name in ("ours", "theirs")]
            for files in found:
                files.pop("README.md", None)  # each library has its own
                files.pop("model.fp16.bin", None)  # a zip has the time in it
            assert found[0] == found[1]


def test_a_config_alone_is_pushed(hub: HubServer, tmp_path: Path) -> None:
    Scheduler(width=3).push_to_hub(tmp_path / "user" / "noise")
    assert main(hub, "user/noise").keys() == {
        ".gitattributes",
        "README.md",
        "scheduler_config.json",
    }
    head = hub.repositories["user/noise"].find("main")
    assert head is not None
    assert head.message == "Upload scheduler"
    assert 'Scheduler.load_config("user/noise")' in head.files["README.md"].decode()


def test_a_config_is_pushed_as_it_is_saved(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "from-here"
    Saved(width=6).save_config(folder, push_to_hub=True, commit_message="first", private=True)
    repository = hub.repositories["user/from-here"]
    assert repository.private
    head = repository.find("main")
    assert head is not None
    assert head.message == "first"
    assert head.files["config.json"] == (folder / "config.json").read_bytes()
    Saved(width=8).save_config(
        f"{folder}/", push_to_hub=True, repo_id="user/other", subfolder="in/it", create_pr=True
    )
    pushed = main(hub, "user/other", "refs/pr/1")
    assert json.loads(pushed["in/it/config.json"])["width"] == 8
    assert main(hub, "user/other").keys() == {".gitattributes"}


def test_a_folder_with_its_model_card_is_pushed(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    model = Model(width=9)
    model.save_config(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    url = model._push_folder(folder, {"tags": "unet", "commit_message": "all of it"})
    files = main(hub, "user/trained")
    assert url.startswith(f"{hub.url}/user/trained/commit/")
    card = huggingface_hub.ModelCard(files["README.md"].decode())
    assert card.text.strip() == "Mine."
    assert card.data.to_dict() == {
        "license": "mit",
        "library_name": "weightlift",
        "tags": ["unet"],
    }


@uploads
def test_the_card_that_is_there_stays(hub: HubServer) -> None:
    text = "---\nlibrary_name: diffusers\ntags:\n- old\n---\n\nWhat its author wrote.\n"
    hub.add("user/mine", {"README.md": text.encode()})
    Model().push_to_hub("user/mine", tags=["new", "old"])
    card = huggingface_hub.ModelCard(main(hub, "user/mine")["README.md"].decode())
    assert card.text.strip() == "What its author wrote."
    assert card.data.to_dict() == {"library_name": "diffusers", "tags": ["old", "new"]}


def test_where_a_push_goes(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user" / "deep" / "local").mkdir(parents=True)
    (tmp_path / "else" / "local").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for target in (
        "local",
        "user/local",
        "user/deep/local",
        "./user/deep/local",
        f"{tmp_path}/else/local/",
    ):
        assert create_repository(target) == "user/local"
    assert create_repository(Path("else/local")) == "user/local"
    # It looks like the id of another user's repository, not like a folder.
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="no right"):
        create_repository("else/local")
    for target in ("no/such/folder", "a b", Path("a b")):
        with pytest.raises(wl.ArgumentError, match="repo_id is"):
            create_repository(target)


def test_the_hub_of_the_tests_fails_what_it_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with (
        pytest.raises(pytest.fail.Exception, match="GET /api/whoami-v2"),
        HubServer() as server,
        pytest.raises(huggingface_hub.errors.HfHubHTTPError),
    ):
        huggingface_hub.HfApi(endpoint=server.url, token="hf_stored").whoami()


def test_who_may_not_push(hub: HubServer, repository: Repository) -> None:
    hub.tokens["hf_other"] = "other"
    commits = set(repository.commits)
    for token in ("hf_other", False):
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError):
            Model().push_to_hub(NAME, token=token)
    assert repository.commits.keys() == commits

    class Nothing(PushToHubMixin):
        pass

    with pytest.raises(wl.ArgumentError, match="neither save_pretrained nor save_config"):
        Nothing().push_to_hub(NAME)


def test_the_client_warns_of_its_own_call(hub: HubServer) -> None:
    """The warning that ``uploads`` ignores still exists; otherwise the mark could hide other
    warnings."""
    with pytest.warns(DeprecationWarning, match="Use 'content="):
        Model().push_to_hub("user/mine")

"""A Hub on the loopback, for huggingface_hub's real client.

It answers the calls that the client makes to load and to push a model, as the Hub's documentation
and the client's own tests describe them, and notes every request. One that it does not know fails
the test.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

import huggingface_hub.constants
import huggingface_hub.file_download
import huggingface_hub.hf_api
import huggingface_hub.utils._http as client
import pytest
import tqdm
import yaml

# The patterns that a new repository's .gitattributes puts under LFS.
_LARGE = (".safetensors", ".bin", ".msgpack", ".ckpt", ".pt", ".pth")
# The Hub lists 1000 entries on each page; here there are fewer, so that there are several pages.
_PAGE = 3

# For tests that push: the client uploads with a call about which its HTTP library warns.
uploads = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

Files = Mapping[str, bytes]


@dataclasses.dataclass(frozen=True)
class Request:
    method: str
    path: str  # with the query
    headers: dict[str, str]  # names in lower case

    @property
    def token(self) -> str | None:
        """The token of an ``Authorization: Bearer`` header."""
        value = self.headers.get("authorization")
        return None if value is None else value.removeprefix("Bearer ")


@dataclasses.dataclass(frozen=True)
class Commit:
    oid: str
    message: str
    files: dict[str, bytes]


class Repository:
    """
    Attributes:
        private: who is not in ``readers`` does not learn that it exists.
        gated: who is not in ``readers`` sees it, but gets no file.
        refs: branch, tag or ``refs/pr/1`` -> commit.
    """

    def __init__(self, *, private: bool = False, gated: bool = False) -> None:
        self.private = private
        self.gated = gated
        self.readers: set[str] = set()
        self.commits: dict[str, Commit] = {}
        self.refs: dict[str, str] = {}
        self.commit({".gitattributes": b""}, "initial commit")

    def commit(self, files: Files, message: str = "more", ref: str = "main") -> str:
        """Adds files to those of ``ref``; returns the commit."""
        head = self.refs.get(ref) or self.refs.get("main")
        whole = {**(self.commits[head].files if head else {}), **files}
        names = "".join(f"{path} {_git_hash(data)}" for path, data in sorted(whole.items()))
        oid = hashlib.sha1(f"{head} {message} {names}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, message, whole)
        self.refs[ref] = oid
        return oid

    def find(self, revision: str) -> Commit | None:
        return self.commits.get(self.refs.get(revision, revision))


class HubServer:
    """
    Attributes:
        repositories: by ``user/name``.
        tokens: token -> user; users may write to what begins with their name.
        requests: those that came, to the Hub and to the CDN.
        cuts: file name -> after how many bytes the connection breaks, for one download after the
            other.
        down: answer 503.
        forward_to: send downloads on to this endpoint, as mirrors do.
        unknown: what came and is not known; a test that leaves something here fails.
    """

    def __init__(
        self,
        repositories: dict[str, Repository] | None = None,
        tokens: dict[str, str] | None = None,
    ) -> None:
        self.repositories = {} if repositories is None else repositories
        self.tokens = {"hf_stored": "user"} if tokens is None else tokens
        self.requests: list[Request] = []
        self.cdn_requests: list[Request] = []
        self.cuts: dict[str, list[int]] = {}
        self.down = False
        self.forward_to: str | None = None
        self.unknown: list[str] = []
        self.uploads: dict[str, bytes] = {}  # by SHA-256
        # Two hosts: huggingface_hub 1 does not look at ports.
        self._servers = [
            _serve("127.0.0.1", _HubHandler, self),
            _serve("127.0.0.2", _CdnHandler, self),
        ]
        self.url, self.cdn_url = (
            f"http://{host}:{port}" for host, port in (s.server_address for s in self._servers)
        )

    def __enter__(self) -> HubServer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        client.close_session()  # its open connections would keep the servers' threads
        for server in self._servers:
            server.shutdown()
            server.server_close()
        if kind is None and self.unknown:
            pytest.fail("the Hub of the tests does not know: " + "; ".join(self.unknown))

    def add(self, name: str, files: Files, **options: bool) -> Repository:
        repository = self.repositories[name] = Repository(**options)
        repository.commit(files)
        return repository

    def seen(self, pattern: str) -> list[Request]:
        """The requests to the Hub whose method and path match."""
        return [r for r in self.requests if re.search(pattern, f"{r.method} {r.path}")]

    def serve(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
        """Makes this the Hub of the process, as ``HF_ENDPOINT`` would at its start."""
        constants = huggingface_hub.constants
        template = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", self.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", self.url)
        if hasattr(client, "_HUB_ORIGINS"):  # huggingface_hub 2
            monkeypatch.setattr(client, "_HUB_ORIGINS", frozenset({client._url_origin(self.url)}))
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
        # Other tests set it before huggingface_hub is imported.
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache / "token"))
        monkeypatch.setenv("HF_TOKEN", "hf_stored")
        # Its protocol is binary and needs another server.
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
        # The threads of its progress bars would stay.
        monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)
        # The client waits seconds before it tries again.
        impatient = _Time()
        monkeypatch.setattr(client, "time", impatient)
        monkeypatch.setattr(huggingface_hub.file_download, "time", impatient)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """The Hub of the process, with its own cache and the stored token ``hf_stored``."""
    with HubServer() as server:
        server.serve(monkeypatch, tmp_path / "hub-cache")
        yield server


@pytest.fixture
def mirror(hub: HubServer) -> Iterator[HubServer]:
    """Another endpoint with the same repositories."""
    with HubServer(hub.repositories, hub.tokens) as server:
        yield server


class _Time:
    def sleep(self, seconds: float) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return getattr(time, name)


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _serve(host: str, handler: type[_Handler], hub: HubServer) -> ThreadingHTTPServer:
    server = ThreadingHTTPServer((host, 0), type("Handler", (handler,), {"hub": hub}))
    server.daemon_threads = False  # so that server_close() waits for them
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server


class _Refusal(Exception):
    """An error, with the headers by which the client recognises it."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        self.headers |= {name.replace("_", "-"): value for name, value in headers.items()}


_NAME = r"(?P<name>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>[^/]+)"

_Action = TypeVar("_Action", bound=Callable[..., None])


def _route(methods: str, pattern: str) -> Callable[[_Action], _Action]:
    """Makes a method of a handler answer these requests."""

    def mark(action: _Action) -> _Action:
        action.route = (methods.split(), re.compile(pattern))  # type: ignore[attr-defined]
        return action

    return mark


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def log_message(self, *_: object) -> None:
        pass

    def note(self, request: Request) -> None:
        self.hub.requests.append(request)

    def answer(self) -> None:
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.request_ = Request(self.command, self.path, headers)
        self.note(self.request_)
        self.body = self.rfile.read(int(headers.get("content-length", 0)))
        path = urlsplit(self.path).path
        self.query = {
            name: values[0]
            for name, values in parse_qs(urlsplit(self.path).query, keep_blank_values=True).items()
        }
        try:
            if self.hub.down:
                raise _Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "back in a minute")
            for name in dir(type(self)):
                methods, pattern = getattr(getattr(type(self), name), "route", ((), None))
                found = pattern.fullmatch(path) if self.command in methods else None
                if found is not None:
                    groups = {k: unquote(v) for k, v in found.groupdict().items() if v is not None}
                    getattr(self, name)(**groups)
                    return
            self.fail()
        except _Refusal as refusal:
            self.reply({"error": refusal.message}, refusal.status, **refusal.headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = answer

    def fail(self) -> None:
        self.hub.unknown.append(f"{self.command} {self.path}")
        self.reply({"error": "unknown to the Hub of the tests"}, HTTPStatus.NOT_IMPLEMENTED)

    def reply(self, body: object, status: int = HTTPStatus.OK, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        if not isinstance(body, bytes):
            headers.setdefault("Content-Type", "application/json")
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_file(self, name: str, data: bytes, **headers: str) -> None:
        """The content, or the requested ``Range``, or the part before a cut."""
        begin = 0
        wanted = self.request_.headers.get("range")
        if wanted is not None:
            found = re.fullmatch(r"bytes=(\d+)-", wanted)
            if found is None:
                self.fail()
                return
            begin = int(found[1])
            headers["Content-Range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        cuts = self.hub.cuts.get(Path(name).name)
        if cuts and self.command == "GET":
            self.send_response(HTTPStatus.PARTIAL_CONTENT if begin else HTTPStatus.OK)
            for header, value in headers.items():
                self.send_header(header, value)
            self.send_header("Content-Length", str(len(data) - begin))
            self.end_headers()
            self.wfile.write(data[begin : begin + cuts.pop(0)])
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
            return
        status = HTTPStatus.OK if wanted is None else HTTPStatus.PARTIAL_CONTENT
        self.reply(data[begin:], status, **headers)


class _HubHandler(_Handler):
    def user(self) -> str | None:
        token = self.request_.token
        if token is None:
            return None
        if token not in self.hub.tokens:
            raise _Refusal(HTTPStatus.UNAUTHORIZED, "Invalid credentials in Authorization header")
        return self.hub.tokens[token]

    def repository(self, name: str, *, write: bool = False) -> Repository:
        user = self.user()
        found = self.hub.repositories.get(name)
        owner = name.partition("/")[0]
        if found is None or (found.private and user not in {owner, *found.readers}):
            # The Hub sends a 401 to those who are not logged in, so that they do.
            status = HTTPStatus.UNAUTHORIZED if user is None else HTTPStatus.NOT_FOUND
            raise _Refusal(status, "Repository not found", "RepoNotFound")
        if write and user != owner:
            raise _Refusal(HTTPStatus.FORBIDDEN, f"You have no right to write to {name}")
        return found

    def commit(self, repository: Repository, revision: str) -> Commit:
        found = repository.find(revision)
        if found is None:
            raise _Refusal(HTTPStatus.NOT_FOUND, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    @_route("POST", r"/api/repos/create")
    def create(self) -> None:
        user = self.user()
        if user is None:
            raise _Refusal(HTTPStatus.UNAUTHORIZED, "Invalid username or password.")
        wanted = json.loads(self.body)
        owner = wanted.get("organization") or user
        name = f"{owner}/{wanted['name']}"
        if owner != user:
            raise _Refusal(HTTPStatus.FORBIDDEN, f"You have no right to create a model in {owner}")
        status = HTTPStatus.CONFLICT if name in self.hub.repositories else HTTPStatus.OK
        if status == HTTPStatus.OK:
            private = wanted.get("visibility") == "private"
            self.hub.repositories[name] = Repository(private=private)
        self.reply({"url": f"{self.hub.url}/{name}", "name": name}, status)

    @_route("GET", rf"/api/models/{_NAME}(/revision/{_REVISION})?")
    def info(self, name: str, revision: str = "main") -> None:
        repository = self.repository(name)
        commit = self.commit(repository, revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.reply(
            {
                "id": name,
                "sha": commit.oid,
                "private": repository.private,
                "gated": "manual" if repository.gated else False,
                "siblings": siblings,
            }
        )

    @_route("GET", rf"/api/models/{_NAME}/tree/{_REVISION}")
    def tree(self, name: str, revision: str) -> None:
        if not self.query.keys() <= {"recursive", "expand", "cursor"}:
            self.fail()
            return
        commit = self.commit(self.repository(name), revision)
        folders = {p.as_posix() for path in commit.files for p in Path(path).parents} - {"."}
        entries: list[dict[str, Any]] = [
            {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
            for path in sorted(folders)
        ]
        for path, data in sorted(commit.files.items()):
            entry = {"type": "file", "oid": _git_hash(data), "size": len(data), "path": path}
            if path.endswith(_LARGE):
                digest = hashlib.sha256(data).hexdigest()
                entry["lfs"] = {"oid": digest, "size": len(data), "pointerSize": 130}
            entries.append(entry)
        begin = int(self.query.get("cursor", 0))
        headers = {}
        if begin + _PAGE < len(entries):
            path = urlsplit(self.path).path
            rest = f"{self.hub.url}{path}?recursive=True&expand=False&cursor={begin + _PAGE}"
            headers["Link"] = f'<{rest}>; rel="next"'
        self.reply(entries[begin : begin + _PAGE], **headers)

    @_route("GET HEAD", rf"/{_NAME}/resolve/{_REVISION}/(?P<path>.+)")
    def resolve(self, name: str, revision: str, path: str) -> None:
        if self.hub.forward_to is not None:
            location = self.hub.forward_to + self.path
            self.reply(b"", HTTPStatus.TEMPORARY_REDIRECT, Location=location)
            return
        repository = self.repository(name)
        commit = self.commit(repository, revision)
        user = self.user()
        if repository.gated and user not in repository.readers:
            status = HTTPStatus.UNAUTHORIZED if user is None else HTTPStatus.FORBIDDEN
            raise _Refusal(status, f"Access to model {name} is restricted.", "GatedRepo")
        if path not in commit.files:
            raise _Refusal(
                HTTPStatus.NOT_FOUND, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid
            )
        data = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid}
        if path.endswith(_LARGE):
            digest = hashlib.sha256(data).hexdigest()
            self.hub.uploads[digest] = data
            headers["X-Linked-Size"] = str(len(data))
            headers["X-Linked-ETag"] = f'"{digest}"'
            headers["Location"] = f"{self.hub.cdn_url}/{digest}/{quote(path)}?Signature=signed"
            self.reply(b"", HTTPStatus.FOUND, **headers)
            return
        headers["ETag"] = f'"{_git_hash(data)}"'
        headers["Location"] = f"/api/resolve-cache/models/{name}/{commit.oid}/{quote(path)}"
        self.reply(b"", HTTPStatus.TEMPORARY_REDIRECT, **headers)

    @_route("GET HEAD", rf"/api/resolve-cache/models/{_NAME}/{_REVISION}/(?P<path>.+)")
    def resolve_cache(self, name: str, revision: str, path: str) -> None:
        data = self.commit(self.repository(name), revision).files[path]
        headers = {"ETag": f'"{_git_hash(data)}"', "X-Repo-Commit": revision}
        self.send_file(path, data, **headers)

    @_route("POST", r"/api/validate-yaml")
    def validate_yaml(self) -> None:
        found = re.match(r"---\n(.*?)\n---\n", json.loads(self.body)["content"], re.DOTALL)
        if found is None or not isinstance(yaml.safe_load(found[1]), dict):
            errors = [{"message": "no metadata"}]
            self.reply({"errors": errors, "warnings": []}, HTTPStatus.BAD_REQUEST)
            return
        self.reply({"errors": [], "warnings": []})

    @_route("POST", rf"/api/models/{_NAME}/preupload/{_REVISION}")
    def preupload(self, name: str, revision: str) -> None:
        commit = self.commit(self.repository(name, write=True), revision)
        files = []
        for file in json.loads(self.body)["files"]:
            path = file["path"]
            large = path.endswith(_LARGE)
            known = commit.files.get(path)
            oid = None
            if known is not None:
                oid = hashlib.sha256(known).hexdigest() if large else _git_hash(known)
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply({"files": files})

    @_route("POST", rf"/{_NAME}\.git/info/lfs/objects/batch")
    def lfs_batch(self, name: str) -> None:
        self.repository(name, write=True)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            entry = dict(wanted)
            if wanted["oid"] not in self.hub.uploads:
                verify = f"{self.hub.url}/{name}.git/info/lfs/verify"
                entry["actions"] = {
                    "upload": {"href": f"{self.hub.cdn_url}/{wanted['oid']}?Signature=signed"},
                    "verify": {"href": verify},
                }
            objects.append(entry)
        self.reply({"transfer": "basic", "objects": objects})

    @_route("POST", rf"/{_NAME}\.git/info/lfs/verify")
    def lfs_verify(self, name: str) -> None:
        self.repository(name, write=True)
        wanted = json.loads(self.body)
        if len(self.hub.uploads.get(wanted["oid"], b"")) != wanted["size"]:
            raise _Refusal(HTTPStatus.NOT_FOUND, "no such object")
        self.reply({})

    @_route("POST", rf"/api/models/{_NAME}/commit/{_REVISION}")
    def add_commit(self, name: str, revision: str) -> None:
        repository = self.repository(name, write=True)
        self.commit(repository, revision)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header, *operations = lines
        files = {}
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile" and value["oid"] in self.hub.uploads:
                files[value["path"]] = self.hub.uploads[value["oid"]]
            else:
                self.fail()
                return
        number = 1 + sum(ref.startswith("refs/pr/") for ref in repository.refs)
        asked = self.query.get("create_pr") == "1"
        ref = f"refs/pr/{number}" if asked else revision
        oid = repository.commit(files, header["value"]["summary"], ref)
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}
        if asked:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        self.reply(answer)


class _CdnHandler(_Handler):
    """The host of large files, whose URLs are signed and need no token."""

    def note(self, request: Request) -> None:
        self.hub.cdn_requests.append(request)

    @_route("GET", r"/(?P<digest>[0-9a-f]{64})/(?P<path>.+)")
    def download(self, digest: str, path: str) -> None:
        if self.query.get("Signature") != "signed":
            raise _Refusal(HTTPStatus.FORBIDDEN, "the URL is not signed")
        self.send_file(path, self.hub.uploads[digest], ETag=f'"{digest}"')

    @_route("PUT", r"/(?P<digest>[0-9a-f]{64})")
    def upload(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise _Refusal(HTTPStatus.BAD_REQUEST, "the content is not that of the name")
        self.hub.uploads[digest] = self.body
        self.reply(b"")

"""``PushToHubMixin``: uploads saved objects to the Hub."""

from __future__ import annotations

import functools
import inspect
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weightlift.checkpoint.hub import HubArguments, download
from weightlift.core.errors import ArgumentError, ReadError

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

__all__ = ["PushToHubMixin", "create_repository", "push_folder", "write_model_card"]


class PushToHubMixin:
    """Uploads objects that have a ``save_pretrained`` or a ``save_config``."""

    def push_to_hub(
        self,
        repo_id: str | os.PathLike[str],
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        *,
        tags: str | Sequence[str] | None = None,
    ) -> str:
        """Saves into a temporary folder and uploads it.

        Args:
            repo_id: the repository, made if missing; or the path of a local folder, whose name the
                repository gets. A relative path that looks like an id, ``"a/b"``, is an id: write
                ``"./a/b"``.
            commit_message: the commit message; ``"Upload model"`` or similar by default.
            private: whether a new repository is private; ``None``: the Hub's default.
            token: a token with write access; the stored one by default.
            create_pr: open a pull request instead of a commit.
            safe_serialization: save weights as safetensors.
            variant: the variant in the weights' file names.
            subfolder: the folder in the repository; its model card then stays unchanged.
            tags: tags to add to the model card.

        Returns:
            The URL of the commit.

        Raises:
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """
        name = create_repository(repo_id, private, token)
        save = getattr(self, "save_pretrained", None) or getattr(self, "save_config", None)
        if save is None:
            raise ArgumentError(
                f"{type(self).__name__} has neither save_pretrained nor save_config: define one"
            )
        with tempfile.TemporaryDirectory() as folder:
            of_weights = {"safe_serialization": safe_serialization, "variant": variant}
            save(folder, **_accepted(save, of_weights))
            if not subfolder:
                write_model_card(self, folder, name, token, tags)
            return self._upload_folder(folder, name, token, commit_message, create_pr, subfolder)

    def _push_folder(
        self,
        folder: str | os.PathLike[str],
        arguments: Mapping[str, Any],
    ) -> str:
        """For ``save_pretrained(..., push_to_hub=True)``: a folder with a model card."""
        options = dict(arguments)
        tags = options.pop("tags", None)
        target = options.pop("repo_id", None) or Path(folder)
        name = create_repository(target, options.get("private"), options.get("token"))
        if not options.get("subfolder"):
            write_model_card(self, folder, name, options.get("token"), tags)
        return push_folder(self, folder, repo_id=name, **options)

    def _upload_folder(
        self,
        working_dir: str | os.PathLike[str],
        repo_id: str,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
        subfolder: str | None = None,
    ) -> CommitInfo:
        return _upload(self, working_dir, repo_id, token, commit_message, create_pr, subfolder)


def push_folder(
    saved: object,
    folder: str | os.PathLike[str],
    *,
    repo_id: str | os.PathLike[str] | None = None,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> str:
    """Uploads a folder with a saved object; returns the URL of the commit.

    The arguments are those of ``push_to_hub``; the repository has the folder's name by default.
    """
    name = create_repository(Path(folder) if repo_id is None else repo_id, private, token)
    upload = getattr(saved, "_upload_folder", None) or functools.partial(_upload, saved)
    url: str = upload(folder, name, token, commit_message, create_pr, subfolder)
    return url


def create_repository(
    repo_id: str | os.PathLike[str], private: bool | None = None, token: str | bool | None = None
) -> str:
    """Makes a repository if missing; returns its full name, ``user/name``."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    if not isinstance(repo_id, (str, os.PathLike)):
        raise ArgumentError(f"repo_id is {repo_id!r}; it must be text, such as 'user/name'")
    name = os.fspath(repo_id)
    try:
        if isinstance(repo_id, os.PathLike):
            name = Path(name).absolute().name
        validate_repo_id(name)
    except HFValidationError as error:
        if isinstance(repo_id, os.PathLike) or not Path(name).is_dir():
            raise ArgumentError(f"repo_id is {os.fspath(repo_id)!r}: {error}") from None
        name = Path(name).absolute().name
    return HubArguments(token=token).api().create_repo(name, private=private, exist_ok=True).repo_id


def write_model_card(
    saved: object,
    folder: str | os.PathLike[str],
    repo_id: str,
    token: str | bool | None = None,
    tags: str | Sequence[str] | None = None,
) -> None:
    """Completes the model card in ``folder``: the existing one, else the repository's, else a new
    one. Adds the tags, and the library's name if the card has none."""
    from huggingface_hub import ModelCard

    path = Path(folder, "README.md")
    try:
        source = path if path.is_file() else download(repo_id, path.name, HubArguments(token=token))
        text = source.read_text(encoding="utf-8-sig")
    except ReadError as error:
        if error.code != "not_found":
            raise
        name = type(saved).__name__
        load = f'{name}.from_pretrained("{repo_id}")'
        if not hasattr(saved, "from_pretrained"):
            load = f'{name}.from_config({name}.load_config("{repo_id}"))'
        text = _CARD.format(class_name=name, repo_id=repo_id, load=load)
    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data
    data.library_name = data.library_name or "weightlift"
    added = [tags] if isinstance(tags, str) else list(tags or ())
    if added:
        data.tags = list(dict.fromkeys([*(data.tags or ()), *added]))
    card.save(path)


_CARD = """---
library_name: weightlift
---

# {repo_id}

A `{class_name}`, saved with weightlift. The class that it was saved from loads it:

```python
{load}
```
"""


def _upload(
    saved: object,
    folder: str | os.PathLike[str],
    repo_id: str,
    token: str | bool | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
) -> CommitInfo:
    if commit_message is None:
        name = type(saved).__name__
        kinds = [kind.lower() for kind in ("Model", "Scheduler") if kind in name]
        commit_message = f"Upload {kinds[0] if kinds else name}"
    api = HubArguments(token=token).api()
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=os.fspath(folder),
        commit_message=commit_message,
        create_pr=create_pr,
        path_in_repo=subfolder,
    )


def _accepted(function: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments that a function accepts, by name or in its ``**``."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}

"""Mistaken arguments of the model classes: each error names one, and none is ignored."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import weightlift as wl


class Net(wl.ModelMixin, wl.ConfigMixin):
    @wl.register_to_config
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(width, width)


class Bare(wl.ModelMixin):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)


def loaded(**given: Any) -> Callable[[], object]:
    return lambda: Net.from_pretrained("net", **given)


def saved(folder: Any = "new", **given: Any) -> Callable[[], object]:
    return lambda: Net().save_pretrained(folder, **given)


Argument, Missing = wl.ArgumentError, FileNotFoundError
MISTAKES: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "to nowhere": (saved(""), Missing, "the path is empty"),
    "to None": (saved(None), TypeError, "the path is NoneType"),
    "a typo": (saved(safe_serialisation=False), Argument, "did you mean 'safe_serialization'"),
    "text for a flag": (saved(push_to_hub="no"), Argument, "push_to_hub is 'no'"),
    "no size": (saved(max_shard_size="big"), Argument, "max_shard_size is 'big'; write"),
    "no id": (lambda: Net().push_to_hub(3), Argument, "repo_id is 3; it must be text"),  # type: ignore[arg-type]
    "a variant": (saved(variant=16), Argument, "variant is 16; it must be text"),
    "no function": (saved(save_function="x"), Argument, "save_function is 'x'"),
    "config to nowhere": (lambda: Net().save_config(""), Missing, "the path is empty"),
    "config from nowhere": (lambda: Net.load_config(""), Missing, "the path is empty"),
    "config of a number": (lambda: Net.load_config(3), TypeError, "the path is int"),  # type: ignore[arg-type]
    "no config there": (lambda: Net.load_config("gone/gone", local_files_only=True), Missing,
                        "no such file or folder, and as the id of a repository"),
    "no subfolder": (lambda: Net.from_pretrained(".", subfolder="nte"), Missing,
                     "no such subfolder: 'nte/config.json'"),
    "bytes": (lambda: Net.from_pretrained(b"net"), Argument, "text, not bytes"),  # type: ignore[arg-type]
    "a subfolder": (loaded(subfolder=3), Argument, "subfolder is 3"),
    "another variant": (loaded(variant=16), Argument, "variant is 16"),
    "a flag": (loaded(low_cpu_mem_usage="no"), Argument, "low_cpu_mem_usage is 'no'"),
    "the info": (loaded(output_loading_info="yes"), Argument, "output_loading_info is 'yes'"),
    "the format": (loaded(use_safetensors="no"), Argument, "use_safetensors is 'no'"),
    "the memory": (loaded(device_map="auto", max_memory="1GB"), Argument, "a dict of devices"),
    "the layout": (loaded(memory_format="channels_last"), Argument, "torch.channels_last"),
    "both": (loaded(disable_mmap=True, mode="map"), Argument, "contradict each other"),
    "a quantizer's name": (loaded(quantization_config="4bit"), Argument, "config is '4bit'"),
    "no config class": (lambda: Bare.from_pretrained("net"), Argument, "Bare has no configuration"),
    "no config to save": (lambda: Bare().save_pretrained("new"), Argument, "from ConfigMixin too"),
    "above the class": (lambda: wl.register_to_config(Net), TypeError, "above __init__"),  # type: ignore[type-var]
    "device of text": (lambda: wl.get_parameter_device("x"), Argument, "a model, not str$"),  # type: ignore[arg-type]
    "dtype of a class": (lambda: wl.get_parameter_dtype(Net), Argument, "not the class Net"),  # type: ignore[arg-type]
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_it_is_named(mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Net().save_pretrained("net")
    call, kind, said = MISTAKES[mistake]
    with pytest.raises(kind, match=said):
        call()
    assert not Path("config.json").exists()
    assert not list(Path().glob("new/*"))


def test_flags_may_be_none(tmp_path: Path) -> None:
    Net().save_pretrained(tmp_path)
    given: dict[str, Any] = {"low_cpu_mem_usage": True, "use_safetensors": None, "verify": None}
    assert Net.from_pretrained(tmp_path, **given, background=None).dtype is torch.float32


def test_memory_without_an_automatic_map(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """diffusers takes it in silence, so that it is no error here."""
    Net().save_pretrained(tmp_path)
    Net.from_pretrained(tmp_path, device_map="auto", max_memory={"cpu": "1GB"})
    assert not caplog.records
    Net.from_pretrained(tmp_path, max_memory={"cpu": "1GB"})
    assert "max_memory is for automatic device maps" in caplog.text

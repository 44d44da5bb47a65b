from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from safetensors.torch import load as reference_load
from safetensors.torch import save as reference_save
from safetensors.torch import save_file as reference_save_file
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from hub_server import HubServer, Repository, hub, mirror
from support import assert_same
from weightlift import ArgumentError, CheckpointError, FormatError, ReadError
from weightlift.checkpoint import hub as hub_module
from weightlift.checkpoint.files import CheckpointFiles, ShardFile
from weightlift.checkpoint.hub import HubArguments, commit_of
from weightlift.checkpoint.resolve import resolve

__all__ = ["hub", "mirror"]  # fixtures

SPELLINGS_OF_AN_INDEX = {
    "diffusers": "{stem}.{end}.index.fp16.json",
    "huggingface_hub": "{stem}.fp16.{end}.index.json",
    "diffusers of 2024": "{stem}.{end}.fp16.index.json",
}
SPELLINGS_OF_A_SHARD = {
    "today": "{stem}.fp16-{number}.{end}",
    "diffusers of 2024": "{stem}-{number}.fp16.{end}",
}


class Tiny(ModelMixin, ConfigMixin):  # type: ignore[misc]
    @register_to_config
    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(16, 16) for _ in range(count))


@pytest.fixture(autouse=True)
def no_progress_bars() -> Iterator[None]:
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    yield
    if shown:
        transformers_logging.enable_progress_bar()


def llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )


def read(file: ShardFile) -> dict[str, torch.Tensor]:
    if file.format == "torch":
        assert file.begin == 0
        loaded: dict[str, torch.Tensor] = torch.load(file.path, weights_only=True)
        return loaded
    end = None if file.bytes is None else file.begin + file.bytes
    return reference_load(Path(file.path).read_bytes()[file.begin : end])


def assert_holds(files: CheckpointFiles, tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes these tensors to the files that the index names."""
    found: dict[str, torch.Tensor] = {}
    for file in files.files:
        inside = read(file)
        if files.weight_map is not None:
            assert {n for n, shard in files.weight_map.items() if shard == file.name} == set(inside)
        found |= inside
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert_same(found[name], tensor)


def names(files: CheckpointFiles) -> list[str]:
    return [file.name for file in files.files]


def touch(folder: Path, *paths: str) -> None:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).touch()


def write_index(
    path: Path, weight_map: Mapping[str, str], metadata: Mapping[str, Any] | None = None
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"metadata": metadata or {}, "weight_map": weight_map}))


def sharded(folder: Path, stem: str = "model", end: str = "safetensors", count: int = 2) -> None:
    """An index and empty shards."""
    shards = [f"{stem}-{n:05}-of-{count:05}.{end}" for n in range(1, count + 1)]
    touch(folder, *shards)
    write_index(folder / f"{stem}.{end}.index.json", {f"t{n}": s for n, s in enumerate(shards)})


# Files that other libraries write.


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["10GB", "2KB"])
@pytest.mark.parametrize("variant", [None, "fp16", "non_ema"])
def test_diffusers_writes(tmp_path: Path, variant: str | None, size: str, safe: bool) -> None:
    model = Tiny()
    model.save_pretrained(tmp_path, safe_serialization=safe, variant=variant, max_shard_size=size)
    files = resolve(tmp_path, variant=variant)
    assert files.format == ("safetensors" if safe else "torch")
    assert files.folder == str(tmp_path)
    assert (files.weight_map is not None) == (size == "2KB")
    assert len(files.files) == (3 if size == "2KB" else 1)
    assert files.unlisted == ()
    assert_holds(files, model.state_dict())
    if files.weight_map is not None:
        bytes_ = sum(t.nbytes for t in model.state_dict().values())
        assert files.index_metadata["total_size"] == bytes_
        assert Path(str(files.index_path)).parent == tmp_path


@pytest.mark.parametrize("size", ["5GB", "5KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_transformers_writes(tmp_path: Path, variant: str | None, size: str) -> None:
    model = llama()
    model.save_pretrained(tmp_path, variant=variant, max_shard_size=size)
    files = resolve(str(tmp_path), variant=variant, use_safetensors=True)
    assert (len(files.files) > 2) == (size == "5KB")
    assert_holds(files, model.state_dict())


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("size", ["5GB", "2KB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_huggingface_hub_writes(tmp_path: Path, variant: str | None, size: str, safe: bool) -> None:
    tensors = {f"t{n}": torch.full((16, 16), float(n)) for n in range(5)}
    stem, end = ("model", "safetensors") if safe else ("pytorch_model", "bin")
    huggingface_hub.save_torch_state_dict(
        tensors,
        tmp_path,
        filename_pattern=f"{stem}{'.' + variant if variant else ''}{{suffix}}.{end}",
        max_shard_size=size,
        safe_serialization=safe,
    )
    files = resolve(tmp_path, variant=variant)
    assert (len(files.files) > 1) == (size == "2KB")
    assert_holds(files, tensors)


@pytest.mark.parametrize("safe", [True, False])
def test_peft_writes(tmp_path: Path, safe: bool) -> None:
    import peft

    model = peft.get_peft_model(Tiny(), peft.LoraConfig(target_modules=["0"], r=2))
    model.save_pretrained(tmp_path, safe_serialization=safe)
    expected = peft.get_peft_model_state_dict(model)
    files = resolve(tmp_path)
    assert names(files) == [f"adapter_model.{'safetensors' if safe else 'bin'}"]
    assert_holds(files, expected)


@pytest.mark.parametrize("shard", SPELLINGS_OF_A_SHARD)
@pytest.mark.parametrize("index", SPELLINGS_OF_AN_INDEX)
@pytest.mark.parametrize("safe", [True, False])
def test_spellings_of_a_sharded_variant(tmp_path: Path, safe: bool, index: str, shard: str) -> None:
    end = "safetensors" if safe else "bin"
    stem = "diffusion_pytorch_model"
    model = Tiny()
    model.save_pretrained(tmp_path, safe_serialization=safe, variant="fp16", max_shard_size="2KB")
    written = tmp_path / f"{stem}.{end}.index.fp16.json"
    text = written.read_text()
    for n in (1, 2, 3):
        number = f"{n:05}-of-00003"
        old = SPELLINGS_OF_A_SHARD["today"].format(stem=stem, number=number, end=end)
        new = SPELLINGS_OF_A_SHARD[shard].format(stem=stem, number=number, end=end)
        (tmp_path / old).rename(tmp_path / new)
        text = text.replace(old, new)
    written.unlink()
    path = tmp_path / SPELLINGS_OF_AN_INDEX[index].format(stem=stem, end=end)
    path.write_text(text)

    files = resolve(tmp_path, variant="fp16")
    assert files.index_path == str(path)
    assert_holds(files, model.state_dict())
    if index != "huggingface_hub":
        with pytest.warns(FutureWarning) if "2024" in index else contextlib.nullcontext():
            theirs = Tiny.from_pretrained(tmp_path, variant="fp16", use_safetensors=safe)
        for name, tensor in theirs.state_dict().items():
            assert_same(tensor, model.state_dict()[name])
    with pytest.raises(CheckpointError, match=r"without a variant; there is: variant='fp16'$"):
        resolve(tmp_path)


def test_more_digits_than_five(tmp_path: Path) -> None:
    """Like deepseek-ai/DeepSeek-V3: model-00001-of-000163.safetensors."""
    shards = [f"model-{n:05}-of-000163.safetensors" for n in range(1, 164)]
    touch(tmp_path, *shards)
    write_index(tmp_path / "model.safetensors.index.json", {s: s for s in shards})
    assert names(resolve(tmp_path)) == shards


def test_hundred_thousand_tensors(tmp_path: Path) -> None:
    weight_map = {
        f"model.layers.{n}.mlp.experts.weight": f"model-{n % 9 + 1:05}-of-00009.safetensors"
        for n in range(100_000)
    }
    touch(tmp_path, *weight_map.values())
    write_index(tmp_path / "model.safetensors.index.json", weight_map)
    assert resolve(tmp_path).weight_map == weight_map


# Lone files.


@pytest.mark.parametrize("end", ["bin", "pt", "pth", "ckpt", "PT", "safetensors"])
def test_a_lone_file(tmp_path: Path, end: str) -> None:
    path = tmp_path / f"any name.{end}"
    tensors = {"w": torch.ones(3)}
    if end == "safetensors":
        reference_save_file(tensors, path)
    else:
        torch.save(tensors, path)
    files = resolve(path)
    assert files.weight_map is None
    assert files.index_path is None
    assert_holds(files, tensors)


def test_a_lone_file_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "model.safetensors")
    files = resolve("model.safetensors")
    assert (files.files[0].path, files.folder) == ("model.safetensors", ".")
    assert resolve(".").files == files.files


@pytest.mark.parametrize("zip_format", [True, False])
def test_the_bytes_tell_where_the_name_does_not(tmp_path: Path, zip_format: bool) -> None:
    """Like blobs of a Hub cache."""
    torch.save({"w": torch.ones(3)}, tmp_path / "a", _use_new_zipfile_serialization=zip_format)
    reference_save_file({"w": torch.ones(3)}, tmp_path / "b")
    assert resolve(tmp_path / "a").format == "torch"
    assert resolve(tmp_path / "b").format == "safetensors"


@pytest.mark.parametrize("end", ["safetensors", "bin"])
def test_an_index_by_its_own_path(tmp_path: Path, end: str) -> None:
    sharded(tmp_path, "model", end)
    touch(tmp_path, "diffusion_pytorch_model.safetensors")
    files = resolve(tmp_path / f"model.{end}.index.json")
    assert names(files) == [f"model-0000{n}-of-00002.{end}" for n in (1, 2)]
    assert files.format == ("safetensors" if end == "safetensors" else "torch")


# A component of an archive.


def dduf(path: Path, entries: Mapping[str, bytes]) -> Path:
    folders = {name.split("/")[0] for name in entries}
    index = json.dumps({"_class_name": "X", **{name: ["d", "Y"] for name in folders}})
    configs = {f"{folder}/config.json": b"{}" for folder in folders}
    huggingface_hub.export_entries_as_dduf(
        path, [("model_index.json", index.encode()), *configs.items(), *entries.items()]
    )
    return path


def test_a_component_of_a_dduf_file(tmp_path: Path) -> None:
    unet = {"a": torch.rand(5, 3)}
    vae = {"b": torch.rand(2), "c": torch.rand(3)}
    weight_map = {
        "b": "model-00001-of-00002.safetensors",
        "c": "model-00002-of-00002.safetensors",
    }
    path = dduf(
        tmp_path / "x.dduf",
        {
            "unet/diffusion_pytorch_model.safetensors": reference_save(unet),
            "vae/model.safetensors.index.json": json.dumps({"weight_map": weight_map}).encode(),
            **{f"vae/{s}": reference_save({n: vae[n]}) for n, s in weight_map.items()},
        },
    )
    files = resolve(path, subfolder="unet")
    assert files.format == "dduf-safetensors"
    assert_holds(files, unet)
    files = resolve(path, subfolder="vae")
    assert files.index_path == str(path)
    assert_holds(files, vae)
    with pytest.raises(CheckpointError, match=r"pipeline.*subfolder='unet', subfolder='vae'$"):
        resolve(path)
    with pytest.raises(CheckpointError, match=r"no subfolder 'text'; there is: 'unet', 'vae'$"):
        resolve(path, subfolder="text")
    with pytest.raises(CheckpointError, match=r"needs \.bin; there is: diffusion_pytorch"):
        resolve(path, subfolder="unet", use_safetensors=False)


def test_what_is_no_dduf_file(tmp_path: Path) -> None:
    path = dduf(tmp_path / "x.dduf", {"vae/model.safetensors.index.json": b'{"weight_map": 1}'})
    with pytest.raises(CheckpointError, match=r"x\.dduf/vae/model\.safetensors\.index\.json: is"):
        resolve(path, subfolder="vae")
    path.write_bytes(path.read_bytes().replace(b"weight_map", b"weight map"))
    with pytest.raises(FormatError, match=r"x\.dduf: .*has a wrong checksum"):
        resolve(path, subfolder="vae")
    path.write_bytes(b"no zip")
    with pytest.raises(FormatError, match=r"x\.dduf: "):
        resolve(path, subfolder="unet")


# Which of several.

MODELS_IN_ORDER = [
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.safetensors",
    # transformers and accelerate look for the single file first.
    "model.safetensors",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.bin.index.json",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
]
ADAPTERS_IN_ORDER = [
    "adapter_model.safetensors",
    "pytorch_lora_weights.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.bin",
]


@pytest.mark.parametrize("use_safetensors", [None, True, False])
def test_precedence(tmp_path: Path, use_safetensors: bool | None) -> None:
    for name in MODELS_IN_ORDER:
        if name.endswith(".index.json"):
            stem, end, *_ = name.split(".")
            sharded(tmp_path, stem, end)
        else:
            touch(tmp_path, name)
    touch(tmp_path, "flax_model.msgpack", "config.json", *ADAPTERS_IN_ORDER)

    def first(in_order: list[str]) -> str | None:
        for name in in_order:
            if use_safetensors in (None, ".safetensors" in name):
                return name
        return None

    def check(expected: str | None) -> None:
        if expected is None:
            with pytest.raises(CheckpointError, match=f"use_safetensors={use_safetensors} needs"):
                resolve(tmp_path, use_safetensors=use_safetensors)
        else:
            files = resolve(tmp_path, use_safetensors=use_safetensors)
            assert Path(files.index_path or files.files[0].path).name == expected

    for number, name in enumerate(MODELS_IN_ORDER):
        check(first(MODELS_IN_ORDER[number:]))
        (tmp_path / name).unlink()
    for shard in tmp_path.glob("*-of-*"):
        shard.unlink()
    for number, name in enumerate(ADAPTERS_IN_ORDER):
        check(first(ADAPTERS_IN_ORDER[number:]))
        (tmp_path / name).unlink()


def test_an_adapter_beside_a_model_is_not_taken(tmp_path: Path) -> None:
    touch(tmp_path, "adapter_model.safetensors", "pytorch_model.bin")
    assert names(resolve(tmp_path)) == ["pytorch_model.bin"]
    with pytest.raises(CheckpointError, match=r"needs safetensors; there is: .*pytorch_mo"):
        resolve(tmp_path, use_safetensors=True)


def test_as_diffusers_takes_a_variant_that_is_not_there(tmp_path: Path) -> None:
    """An error: the weights without a variant are no substitute."""
    Tiny().save_pretrained(tmp_path)
    Tiny().save_pretrained(tmp_path, variant="ema")
    Tiny().save_pretrained(tmp_path, variant="no.dots", max_shard_size="2KB")
    with pytest.raises(OSError, match=r"diffusion_pytorch_model\.fp16\."):
        Tiny.from_pretrained(tmp_path, variant="fp16")
    with pytest.raises(CheckpointError) as raised:
        resolve(tmp_path, variant="fp16")
    assert str(raised.value) == (
        f"{tmp_path}: there are no weights of variant 'fp16'; there is: variant='ema', "
        "variant='no.dots', variant=None"
    )


def test_use_safetensors_refuses(tmp_path: Path) -> None:
    touch(tmp_path, "pytorch_model.bin", "s/model.safetensors")
    with pytest.raises(CheckpointError) as raised:
        resolve(tmp_path, use_safetensors=True)
    assert str(raised.value) == (
        f"{tmp_path}: use_safetensors=True needs safetensors; there is: pytorch_model.bin"
    )
    with pytest.raises(CheckpointError, match=r"False needs \.bin; there is: model\.safet"):
        resolve(tmp_path / "s", use_safetensors=False)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: use_safetensors=True does not"):
        resolve(tmp_path / "pytorch_model.bin", use_safetensors=True)
    sharded(tmp_path, "pytorch_model", "bin")
    with pytest.raises(CheckpointError, match=r"index\.json: use_safetensors=True does not allow"):
        resolve(tmp_path / "pytorch_model.bin.index.json", use_safetensors=True)


# Folders.


def test_subfolders(tmp_path: Path) -> None:
    touch(tmp_path, "model.safetensors", "unet/diffusion_pytorch_model.safetensors")
    sharded(tmp_path / "a/b")
    assert resolve(tmp_path, subfolder="unet").folder == str(tmp_path / "unet")
    assert resolve(tmp_path, subfolder="a/b/").folder == str(tmp_path / "a/b")
    for root in (None, "", "."):
        assert resolve(tmp_path, subfolder=root).folder == str(tmp_path)
    with pytest.raises(CheckpointError) as raised:
        resolve(tmp_path, subfolder="vae")
    assert str(raised.value) == (f"{tmp_path}: there is no subfolder 'vae'; there is: 'a', 'unet'")


def test_a_pipeline_wants_a_component(tmp_path: Path) -> None:
    touch(
        tmp_path,
        "model_index.json",
        "v1-5-pruned.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_flax_model.msgpack",
    )
    with pytest.raises(CheckpointError) as raised:
        resolve(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}: is a whole pipeline; name a component of it: subfolder='text_encoder', "
        "subfolder='unet', subfolder='vae'"
    )
    assert resolve(tmp_path, subfolder="unet").folder == str(tmp_path / "unet")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as raised:
        resolve(tmp_path, variant="fp16", use_safetensors=True)
    assert str(raised.value) == (
        f"{tmp_path}: the folder is empty; expected diffusion_pytorch_model.fp16.safetensors, "
        "model.fp16.safetensors, adapter_model.fp16.safetensors, "
        "pytorch_lora_weights.fp16.safetensors, or the .index.json of one"
    )


def test_a_folder_of_other_things(tmp_path: Path) -> None:
    touch(tmp_path, "tf_model.h5", "model.gguf", "sub/x")
    with pytest.raises(CheckpointError, match=r"there is: model\.gguf, tf_model\.h5, sub/$"):
        resolve(tmp_path)
    touch(tmp_path, "my.safetensors")
    with pytest.raises(
        CheckpointError, match=r"my\.safeten.*another|another name, give its own path"
    ):
        resolve(tmp_path)
    for number in range(100):
        touch(tmp_path, f"{number:03}.txt")
    with pytest.raises(CheckpointError, match=r"018\.txt, 019\.txt and 84 more; to open a file of"):
        resolve(tmp_path)


@pytest.mark.parametrize("name", ["flax_model.msgpack", "diffusion_flax_model.msgpack"])
def test_flax_weights(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name, "config.json")
    with pytest.raises(CheckpointError, match=rf"only Flax weights \({name}\): use from_flax=True"):
        resolve(tmp_path)
    with pytest.raises(CheckpointError, match=r"msgpack: holds Flax weights.*from_flax=True"):
        resolve(tmp_path / name)


def test_shards_without_an_index(tmp_path: Path) -> None:
    Tiny().save_pretrained(tmp_path, max_shard_size="2KB")
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").unlink()
    with pytest.raises(CheckpointError, match=r"no index such as diffusion_pytorch_model\.safeten"):
        resolve(tmp_path)


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", denied)  # root may read everything
    with pytest.raises(PermissionError, match="Permission denied") as raised:
        resolve(tmp_path)
    assert isinstance(raised.value, ReadError)
    assert raised.value.filename == str(tmp_path)


@pytest.mark.parametrize("name", ["blob", "model.safetensors.index.json"])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).symlink_to("/proc/self/mem")  # EIO at 0, for root too
    with pytest.raises(ReadError, match="Input/output error") as raised:
        resolve(tmp_path / name)
    assert raised.value.filename == str(tmp_path / name)


def test_a_name_that_no_index_has(tmp_path: Path) -> None:
    (tmp_path / "model.index.json").write_text(json.dumps({"weight_map": {"w": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"index\.json: is not the name of an index"):
        resolve(tmp_path / "model.index.json")


@pytest.mark.parametrize(
    "path", ["missing.safetensors", "some/model.bin", "/no/such/x.dduf", "a.index.json"]
)
def test_a_file_that_is_not_there(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file") as raised:
        resolve(path)
    assert isinstance(raised.value, ReadError)
    assert raised.value.filename == path


@pytest.mark.parametrize("path", ["", "./missing", "/no/such/folder", "a/b/c", "nul\0", "~/x"])
def test_a_path_that_is_no_repository_id(path: str) -> None:
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        resolve(path)


def test_a_name_that_no_file_can_have() -> None:
    with pytest.raises(ReadError, match="File name too long"):
        resolve("x" * 300)


def test_arguments(tmp_path: Path) -> None:
    touch(tmp_path, "x.bin")
    with pytest.raises(ArgumentError, match="it must be text, not bytes"):
        resolve(os.fsencode(tmp_path))  # type: ignore[arg-type]
    for variant in ("", "a/b", "\0"):
        with pytest.raises(ArgumentError, match="a part of a file name, such as 'fp16'"):
            resolve(tmp_path, variant=variant)
    with pytest.raises(ArgumentError, match=r"x\.bin is a file; variant='fp16' needs a folder"):
        resolve(tmp_path / "x.bin", variant="fp16")
    with pytest.raises(ArgumentError, match=r"x\.bin is a file; subfolder='unet' needs a folder"):
        resolve(tmp_path / "x.bin", subfolder="unet")


def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="pipe: is not a regular file"):
        resolve(tmp_path / "pipe")


# Indexes.


def bad_index(folder: Path, text: str | bytes, end: str = "safetensors") -> Path:
    path = folder / f"model.{end}.index.json"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "..",
        ".",
        "",
        "/etc/model.safetensors",
        "//etc/model.safetensors",
        "sub/../../model.safetensors",
        "./../model.safetensors",
        "sub\\model.safetensors",
        "C:model.safetensors",
        "\\\\host\\share\\model.safetensors",
        "model.safetensors/",
        "model\0.safetensors",
    ],
)
def test_shards_are_plain_names(tmp_path: Path, name: str) -> None:
    touch(tmp_path, "sub/model.safetensors")
    path = bad_index(tmp_path, json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match="must be a file beside the index") as raised:
        resolve(tmp_path)
    assert str(raised.value).startswith(f"{path}: lists the file {name!r}")


@pytest.mark.parametrize("name", ["model.SAFETENSORS", "safetensors", "x.json", "model.pt"])
def test_shards_are_of_the_index_format(tmp_path: Path, name: str) -> None:
    touch(tmp_path, name)
    bad_index(tmp_path, json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(CheckpointError, match=r"those of this index end in '\.safetensors'"):
        resolve(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not a valid index"),
        ("{", "is not a valid index"),
        (b"\xff{}", "is not a valid index"),
        ("[" * 100_000, "is not a valid index"),
        ("[]", "is not an index: it has no object 'weight_map'"),
        ("{}", "is not an index: it has no object 'weight_map'"),
        ('{"weight_map": ["a"]}', "is not an index: it has no object 'weight_map'"),
        ('{"weight_map": {}}', "is an empty index: its weight_map has no tensor"),
        ('{"weight_map": {"w": 1}}', "tensor 'w': its file is 1; it must be a file name"),
        ('{"weight_map": {"w": null}}', "tensor 'w': its file is None"),
        (
            '{"metadata": [1], "weight_map": {"w": "m.safetensors"}}',
            r"its metadata is \[1\]; it must be an object",
        ),
        ("version https://git-lfs.github.com/spec/v1\noid sha256:", "is a git-lfs pointer: fetch"),
    ],
)
def test_broken_indexes(tmp_path: Path, text: str | bytes, says: str) -> None:
    touch(tmp_path, "m.safetensors", "a", "b")
    path = bad_index(tmp_path, text)
    with pytest.raises(CheckpointError, match=says) as raised:
        resolve(tmp_path)
    assert str(raised.value).startswith(f"{path}: ")


def test_an_index_of_absurd_size(tmp_path: Path) -> None:
    path = bad_index(tmp_path, "")
    os.truncate(path, 1 << 40)  # takes no space on the disk
    with pytest.raises(
        CheckpointError, match="has more than 100000000 bytes, the limit for an index"
    ):
        resolve(tmp_path)


@pytest.mark.parametrize("metadata", ["", '"metadata": null, ', '"metadata": {"a": [1]}, '])
def test_the_metadata_may_be_missing(tmp_path: Path, metadata: str) -> None:
    touch(tmp_path, "m.safetensors")
    bad_index(tmp_path, f'{{{metadata}"weight_map": {{"w": "m.safetensors"}}}}')
    assert resolve(tmp_path).index_metadata == ({"a": [1]} if "[1]" in metadata else {})


def test_missing_shards_are_named(tmp_path: Path) -> None:
    Tiny().save_pretrained(tmp_path, max_shard_size="2KB")
    for n in (1, 3):
        (tmp_path / f"diffusion_pytorch_model-0000{n}-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError) as raised:
        resolve(tmp_path)
    assert str(raised.value) == (
        f"{tmp_path}/diffusion_pytorch_model.safetensors.index.json: 2 of the 3 files that it "
        "lists are missing: diffusion_pytorch_model-00001-of-00003.safetensors, "
        "diffusion_pytorch_model-00003-of-00003.safetensors; the download or the copy is incomplete"
    )


def test_a_folder_is_no_shard(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").mkdir()
    bad_index(tmp_path, '{"weight_map": {"w": "m.safetensors"}}')
    with pytest.raises(CheckpointError, match="the file that it lists is missing"):
        resolve(tmp_path)


def test_shards_that_the_index_does_not_list(tmp_path: Path) -> None:
    sharded(tmp_path, count=3)
    touch(
        tmp_path,
        "model-00004-of-00003.safetensors",  # of this series
        "model-00001-of-00009.safetensors",  # of an earlier save
        "model.fp16-00001-of-00003.safetensors",
        "diffusion_pytorch_model-00001-of-00003.safetensors",
        "pytorch_model-00001-of-00003.bin",
        "model.safetensors",
    )
    index = tmp_path / "model.safetensors.index.json"
    assert resolve(index).unlisted == ("model-00004-of-00003.safetensors",)


# The Hub's cache.

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def cached(cache: Path, repo_id: str, files: Mapping[str, bytes], ref: str | None = "main") -> Path:
    """The layout that huggingface_hub documents; returns the snapshot."""
    repo = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    if ref is not None:
        (repo / "refs").mkdir()
        (repo / "refs" / ref).write_text(COMMIT)
    for number, (name, data) in enumerate(files.items()):
        blob = repo / "blobs" / f"{number:064x}"
        blob.write_bytes(data)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


def test_a_snapshot_of_the_cache(tmp_path: Path) -> None:
    tensors = {"w": torch.rand(3)}
    snapshot = cached(tmp_path, "o/n", {"model.safetensors": reference_save(tensors)})
    files = resolve(snapshot)
    assert files.files[0].path == str(snapshot / "model.safetensors")
    assert_holds(files, tensors)
    assert_holds(resolve((snapshot / "model.safetensors").resolve()), tensors)
    with pytest.raises(CheckpointError, match=f"one of its snapshots: snapshots/{COMMIT}$"):
        resolve(tmp_path / "models--o--n")


def test_a_snapshot_whose_blob_is_gone(tmp_path: Path) -> None:
    snapshot = cached(tmp_path, "o/n", {"model.safetensors": b"", "config.json": b""})
    shutil.rmtree(tmp_path / "models--o--n" / "blobs")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a link to \.\./\.\./blobs"):
        resolve(snapshot)


def test_offline_the_cache_is_enough(tmp_path: Path) -> None:
    tensors = {f"t{n}": torch.rand(3) for n in range(2)}
    shards = {name: f"model-0000{n + 1}-of-00002.safetensors" for n, name in enumerate(tensors)}
    files = {shards[name]: reference_save({name: tensor}) for name, tensor in tensors.items()}
    files["model.safetensors.index.json"] = json.dumps({"weight_map": shards}).encode()
    files |= {f"unet/{name}": data for name, data in files.items()}
    snapshot = cached(tmp_path, "o/n", files, ref="other")
    for revision in ("other", COMMIT):
        hub = HubArguments(cache_dir=tmp_path, local_files_only=True, revision=revision)
        found = resolve("o/n", hub=hub)
        assert found.folder == str(snapshot)
        assert_holds(found, tensors)
        for inside in (
            resolve("o/n", subfolder="unet", hub=hub),
            resolve("o/n", hub=dataclasses.replace(hub, subfolder="unet")),
        ):
            assert inside.folder == str(snapshot / "unet")
            assert_holds(inside, tensors)
    with pytest.raises(FileNotFoundError, match="revision 'main' is not in the cache") as raised:
        resolve("o/n", hub=HubArguments(cache_dir=tmp_path, local_files_only=True))
    assert isinstance(raised.value, ReadError)

    (snapshot / shards["t1"]).unlink()
    with pytest.raises(CheckpointError) as missing:
        resolve("o/n", hub=hub)
    assert str(missing.value) == (
        "o/n/model.safetensors.index.json: 1 of the 2 files that it lists is missing: "
        f"{shards['t1']}; neither the Hub (if requests are allowed) nor the cache has them"
    )


# The Hub.

NAME = "user/model"
SHARDS = [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
TENSORS = {f"t{n}": torch.full((3,), float(n)) for n in range(3)}
INDEX = {"weight_map": dict(zip(TENSORS, SHARDS, strict=True))}


def sharded_on_the_hub(folder: str = "") -> dict[str, bytes]:
    return {
        f"{folder}model.safetensors.index.json": json.dumps(INDEX).encode(),
        **{
            f"{folder}{shard}": reference_save({name: tensor})
            for shard, (name, tensor) in zip(SHARDS, TENSORS.items(), strict=True)
        },
    }


@pytest.fixture
def repository(hub: HubServer) -> Repository:
    one = {"w": torch.ones(3)}
    return hub.add(
        NAME,
        {
            "config.json": b"{}",
            "model.onnx": b"onnx",
            "pytorch_model.bin": b"PK",
            "model.fp16.safetensors": reference_save(one),
            **sharded_on_the_hub(),
            **sharded_on_the_hub("te [2]/"),
            "unet/config.json": b"{}",
            "unet/diffusion_pytorch_model.safetensors": reference_save(one),
            "unet/diffusion_pytorch_model.bin": b"PK",
        },
    )


def fetched(hub: HubServer) -> list[str]:
    """Returns the names of the requested files, and forgets them."""
    names = {
        unquote(urlsplit(request.path).path.split("/", 5)[5])
        for request in hub.requests
        if "/resolve/" in request.path
    }
    hub.requests.clear()
    return sorted(names)


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ({}, ["model.safetensors.index.json", *SHARDS]),
        ({"variant": "fp16"}, ["model.fp16.safetensors"]),
        ({"use_safetensors": False}, ["pytorch_model.bin"]),
        ({"subfolder": "unet"}, ["unet/diffusion_pytorch_model.safetensors"]),
        (
            {"subfolder": "te [2]"},
            ["te [2]/model.safetensors.index.json", *(f"te [2]/{shard}" for shard in SHARDS)],
        ),
    ],
)
def test_only_what_is_needed_is_downloaded(
    hub: HubServer, repository: Repository, arguments: dict[str, Any], wanted: list[str]
) -> None:
    files = resolve(NAME, **arguments)
    assert fetched(hub) == sorted(wanted)
    assert commit_of(files.files[0].path) == repository.refs["main"]
    for file in files.files:
        assert Path(file.path).is_file()
    if files.weight_map is not None:
        assert_holds(files, TENSORS)

    assert resolve(NAME, **arguments) == files
    assert fetched(hub) == []
    assert resolve(NAME, **arguments, hub=HubArguments(local_files_only=True)) == files
    assert hub.requests == []
    hub.down = True
    assert resolve(NAME, **arguments) == files


def test_files_are_of_one_commit(
    hub: HubServer, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = repository.refs["main"]

    def listing_then_a_push(*arguments: Any) -> list[str]:
        found = original(*arguments)
        repository.commit(dict.fromkeys(SHARDS, b"another"))
        return found

    original = hub_module.list_files
    monkeypatch.setattr(hub_module, "list_files", listing_then_a_push)
    files = resolve(NAME)
    assert commit_of(files.files[0].path) == first != repository.refs["main"]
    assert_holds(files, TENSORS)


def test_revisions(hub: HubServer, repository: Repository) -> None:
    first = repository.refs["main"]
    second = repository.commit({"model.fp16.safetensors": b"new"}, ref="branch")
    for revision, oid in ((None, first), ("branch", second), (second, second), (first, first)):
        files = resolve(NAME, variant="fp16", hub=HubArguments(revision=revision))
        assert commit_of(files.files[0].path) == oid
    with pytest.raises(
        FileNotFoundError, match="has no revision 'nope' of this repository"
    ) as raised:
        resolve(NAME, hub=HubArguments(revision="nope"))
    assert isinstance(raised.value, ReadError)


def test_a_connection_that_breaks_off(
    hub: HubServer, repository: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    def listing_then_nothing(*arguments: Any) -> list[str]:
        found = original(*arguments)
        hub.down = True
        return found

    original = hub_module.list_files
    monkeypatch.setattr(hub_module, "list_files", listing_then_nothing)
    with pytest.raises(ReadError, match=r"model\.safetensors\.index\.json"):
        resolve(NAME)


def test_a_shard_that_is_not_on_the_hub(hub: HubServer) -> None:
    files = sharded_on_the_hub()
    del files[SHARDS[1]]
    hub.add(NAME, files)
    with pytest.raises(CheckpointError, match=f"1 of the 3 files .* missing: {SHARDS[1]}; neither"):
        resolve(NAME)
    assert fetched(hub) == ["model.safetensors.index.json"]


def test_what_the_hub_has_is_said(hub: HubServer, repository: Repository) -> None:
    with pytest.raises(CheckpointError) as raised:
        resolve(NAME, variant="bf16")
    assert str(raised.value) == (
        f"{NAME}: there are no weights of variant 'bf16'; there is: variant='fp16', variant=None"
    )
    with pytest.raises(CheckpointError, match=f"{NAME}: there is no subfolder 'vae'; there is"):
        resolve(NAME, subfolder="vae")
    hub.add("user/pipe", {"model_index.json": b"{}", "vae/model.safetensors": b"", "s/x": b""})
    with pytest.raises(CheckpointError, match=r"user/pipe: is a whole pipeline.*subfolder='vae'$"):
        resolve("user/pipe")
    hub.add("user/empty", {})
    with pytest.raises(CheckpointError, match=r"user/empty: there are no weights: .*\.gitattrib"):
        resolve("user/empty")
    assert fetched(hub) == []


def test_the_hubs_refusals(hub: HubServer, repository: Repository) -> None:
    with pytest.raises(FileNotFoundError, match="has no such repository, or it is private"):
        resolve("user/nope")
    hub.add("other/gated", sharded_on_the_hub(), gated=True)
    with pytest.raises(PermissionError, match=r"gated: ask for access .*other/gated.*restricted"):
        resolve("other/gated")
    hub.repositories["other/gated"].readers.add("user")
    assert_holds(resolve("other/gated"), TENSORS)
    hub.add("other/private", sharded_on_the_hub(), private=True)
    with pytest.raises(FileNotFoundError, match="or it is private: then give token="):
        resolve("other/private")
    hub.tokens["hf_other"] = "other"
    assert_holds(resolve("other/private", hub=HubArguments(token="hf_other")), TENSORS)
    with pytest.raises(
        FileNotFoundError, match="local_files_only=True forbids a request to the Hub"
    ):
        resolve("user/other", hub=HubArguments(local_files_only=True))
    hub.down = True
    with pytest.raises(FileNotFoundError, match=r"is not in the cache .* did not answer"):
        resolve("user/other")


def test_a_mirror(hub: HubServer, mirror: HubServer, repository: Repository) -> None:
    files = resolve(NAME, subfolder="unet", hub=HubArguments(mirror=mirror.url))
    assert names(files) == ["diffusion_pytorch_model.safetensors"]
    assert hub.requests == []
    assert mirror.requests
    assert all(request.token is None for request in mirror.requests)


def test_a_folder_goes_before_a_repository(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, f"{NAME}/model.safetensors")
    assert resolve(NAME).files[0].path == f"{NAME}/model.safetensors"
    assert hub.requests == []


def test_force_download(hub: HubServer, repository: Repository) -> None:
    files = resolve(NAME)
    hub.cdn_requests.clear()
    assert resolve(NAME, hub=HubArguments(force_download=True)) == files
    again = sorted(urlsplit(request.path).path.rpartition("/")[2] for request in hub.cdn_requests)
    assert again == SHARDS  # each once

"""Indexes that contradict their files: weightlift loads what the libraries load, with a warning."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file as reference_load_file
from safetensors.torch import save_file as reference_save_file

import weightlift as wl

W, V, X = torch.ones(2), torch.full((3,), 2.0), torch.full((4,), 3.0)
INDEX = "model.safetensors.index.json"
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def folder_of(
    folder: Path, files: dict[str, dict[str, torch.Tensor]], index: dict[str, str] | str
) -> Path:
    for name, tensors in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        reference_save_file(tensors, folder / name)
    text = index if isinstance(index, str) else json.dumps({"metadata": {}, "weight_map": index})
    (folder / INDEX).write_text(text)
    return folder


def as_the_libraries(folder: Path, shards: list[str]) -> dict[str, torch.Tensor]:
    """The result of transformers and diffusers, which load the shards in order."""
    merged: dict[str, torch.Tensor] = {}
    for shard in sorted(shards):
        merged.update(reference_load_file(folder / shard))
    return merged


CASES: dict[str, tuple[dict[str, dict[str, torch.Tensor]], dict[str, str] | str, str]] = {
    "a tensor in two shards": (
        {ONE: {"w": W, "v": V}, TWO: {"w": W + 1}},
        {"w": ONE, "v": ONE, "x": TWO} | {"w": ONE},
        "'w' is in",
    ),
    "a tensor in two shards, and the index names the last": (
        {ONE: {"w": W, "v": V}, TWO: {"w": W + 1}},
        {"w": TWO, "v": ONE},
        "'w' is in",
    ),
    "a tensor in another shard": (
        {ONE: {"w": W}, TWO: {"v": V}},
        {"w": TWO, "v": ONE},
        "from different checkpoints",
    ),
    "a tensor that is nowhere": (
        {ONE: {"w": W}, TWO: {"v": V}},
        {"w": ONE, "v": TWO, "gone": TWO},
        "'gone'",
    ),
    "an entry twice": (
        {ONE: {"w": W}, TWO: {"v": V}},
        f'{{"weight_map": {{"w": "{TWO}", "v": "{TWO}", "w": "{ONE}"}}}}',
        "'w' is in it twice",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_is_loaded_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    files, index, said = CASES[case]
    folder = folder_of(tmp_path, files, index)
    with caplog.at_level(logging.WARNING, "weightlift"):
        loaded = wl.load_checkpoint(folder)
    expected = as_the_libraries(folder, list(files))
    assert loaded.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(loaded[name], tensor), name
    assert said in caplog.text
    assert str(folder / INDEX) in caplog.text
    with pytest.raises(wl.CheckpointError, match=r"index\.json: "):
        wl.open_checkpoint(folder, strict_index=True)
    for mode in ("read", "map"):
        again = wl.load_checkpoint(folder, mode=mode)
        assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())


def test_extra_tensors_of_a_shard_are_loaded(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {ONE: {"w": W, "extra": X}, TWO: {"v": V}}, {"w": ONE, "v": TWO})
    assert set(wl.load_checkpoint(folder)) == {"w", "v", "extra"}
    assert set(wl.open_checkpoint(folder, strict_index=True)) == {"w", "v", "extra"}


def test_shards_in_folders_of_the_folder(tmp_path: Path) -> None:
    files = {"a/one.safetensors": {"w": W}, "a/b/two.safetensors": {"v": V}}
    folder = folder_of(tmp_path, files, {"w": "a/one.safetensors", "v": "a/b/two.safetensors"})
    loaded = wl.load_checkpoint(folder)
    assert torch.equal(loaded["w"], W)
    assert torch.equal(loaded["v"], V)
    (folder / "a/b/two.safetensors").unlink()
    with pytest.raises(wl.CheckpointError, match=r"files that it lists is missing: a/b/two"):
        wl.open_checkpoint(folder)


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "a/../../out.safetensors", "/etc/x.safetensors"]
)
def test_shards_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    reference_save_file({"w": W}, tmp_path / "out.safetensors")
    (tmp_path / "in" / "a").mkdir(parents=True)
    folder = folder_of(tmp_path / "in", {}, {"w": name})
    with pytest.raises(wl.CheckpointError, match="must be a file beside the index"):
        wl.open_checkpoint(folder)


@pytest.mark.parametrize(
    ("stem", "first"), [("model", "single"), ("diffusion_pytorch_model", "index")]
)
def test_an_index_beside_a_single_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, stem: str, first: str
) -> None:
    """The library of the file name decides which one."""
    shard = f"{stem}-00001-of-00001.safetensors"
    reference_save_file({"w": W}, tmp_path / f"{stem}.safetensors")
    reference_save_file({"v": V}, tmp_path / shard)
    index = {"metadata": {}, "weight_map": {"v": shard}}
    (tmp_path / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    with caplog.at_level(logging.WARNING, "weightlift"):
        loaded = wl.load_checkpoint(tmp_path)
    assert list(loaded) == (["w"] if first == "single" else ["v"])
    assert "remove one of them" in caplog.text


def test_transformers_takes_the_single_file(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    changed = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    reference_save_file(changed, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    ours = wl.load_checkpoint(tmp_path)
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())


def test_entries_that_have_nothing_to_do_with_it_decide_nothing(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {ONE: {"w": W}}, {"w": ONE})
    (folder / "loop").symlink_to("loop")
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    (folder / "dangling.safetensors").symlink_to("nowhere")
    (folder / "closed").mkdir(mode=0)
    os.mkfifo(folder / "pipe.safetensors")
    assert list(wl.load_checkpoint(folder)) == ["w"]
    (folder / "model_index.json").write_text("{}")
    (folder / INDEX).unlink()
    (folder / ONE).unlink()
    with pytest.raises(wl.CheckpointError, match="whole pipeline"):
        wl.open_checkpoint(folder)


@pytest.mark.parametrize("torch_alone", [False, True])
def test_torch_files_with_a_tensor_in_two_of_them(tmp_path: Path, torch_alone: bool) -> None:
    """Torch must read the first or the second."""
    one, two = "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"
    torch.save({"w": W, "v": V}, tmp_path / one, _use_new_zipfile_serialization=not torch_alone)
    torch.save({"w": W + 1}, tmp_path / two, _use_new_zipfile_serialization=torch_alone)
    index = {"metadata": {}, "weight_map": {"w": one, "v": one}}
    index["weight_map"]["x"] = two
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    loaded = wl.load_checkpoint(tmp_path)
    assert torch.equal(loaded["w"], W + 1)
    assert torch.equal(loaded["v"], V)


@pytest.mark.parametrize("prefix", ["./", ".//", "sub/../", "sub/./../"])
def test_names_that_stay_in_the_folder(tmp_path: Path, prefix: str) -> None:
    (tmp_path / "sub").mkdir()
    files = {ONE: {"w": W}, TWO: {"v": V}}
    folder = folder_of(tmp_path, files, {"w": prefix + ONE, "v": TWO})
    loaded = wl.load_checkpoint(folder)
    wanted = as_the_libraries(folder, [prefix + ONE, TWO])
    assert loaded.keys() == wanted.keys()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_a_byte_order_mark(tmp_path: Path) -> None:
    text = "\ufeff" + json.dumps({"weight_map": {"w": ONE}})
    assert torch.equal(wl.load_checkpoint(folder_of(tmp_path, {ONE: {"w": W}}, text))["w"], W)


def test_an_index_of_the_other_format(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """transformers decides by the suffix of each file, whatever the name of the index."""
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=5, hidden_size=4, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=4, max_position_embeddings=4,
    )  # fmt: skip
    model = BertModel(config)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / ONE)
    weight_map = dict.fromkeys(reference_load_file(tmp_path / ONE), ONE)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    wanted = BertModel.from_pretrained(tmp_path).state_dict()
    with caplog.at_level(logging.WARNING, "weightlift"):
        loaded = wl.load_checkpoint(tmp_path)
    assert "lists files of the other format" in caplog.text
    assert all(torch.equal(loaded[name], wanted[name]) for name in loaded)
    assert loaded.keys() == wanted.keys()
    with wl.enabled("transformers"):
        found = BertModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for refused in ({"use_safetensors": False}, {"strict_index": True}):
        with pytest.raises(wl.CheckpointError, match=r"use_safetensors=False|of this index end in"):
            wl.open_checkpoint(tmp_path, **refused)  # type: ignore[arg-type]


@pytest.mark.parametrize("gone", ["model.safetensors", INDEX])
def test_a_link_to_nothing_beside_other_weights(
    tmp_path: Path, gone: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Like the libraries, which look for files."""
    torch.save({"w": W}, tmp_path / "pytorch_model.bin")
    (tmp_path / gone).symlink_to("blobs/gone")
    with caplog.at_level(logging.WARNING, "weightlift"):
        assert torch.equal(wl.load_checkpoint(tmp_path)["w"], W)
    assert f"{gone} is a link to what is not there" in caplog.text
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(wl.CheckpointError, match=r"is a link to blobs/gone, which is missing"):
        wl.load_checkpoint(tmp_path)

"""``weightlift convert``: files that describe the weights are copied and corrected."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cli_support import Type, type_in
from hub_server import HubServer, hub

__all__ = ["hub", "type_in"]  # fixtures


def llama() -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text)


def test_transformers_loads_the_dtype_that_was_asked_for(
    folder: Path, tmp_path: Path, type_in: Type
) -> None:
    """The configuration said bfloat16, and transformers cast back to it."""
    status, _, err = type_in("convert", folder, tmp_path / "out", "--dtype", "float16")
    assert (status, err) == (0, "")
    held = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in held.values()} == {torch.float16}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert (tmp_path / "out" / "generation_config.json").is_file()
    # The source is unchanged, and without --dtype everything is copied byte for byte.
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert type_in("convert", folder, tmp_path / "same")[0] == 0
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "same" / name).read_bytes() == (folder / name).read_bytes()


CONFIGS: dict[str, tuple[Any, Any]] = {
    "dtype": ({"dtype": "bfloat16"}, {"dtype": "float16"}),
    "torch_dtype": ({"torch_dtype": "bfloat16"}, {"torch_dtype": "float16"}),
    "with torch's name": ({"torch_dtype": "torch.float32"}, {"torch_dtype": "torch.float16"}),
    "nested": (
        {"dtype": "float32", "text_config": {"torch_dtype": "bfloat16", "v": {"dtype": "float32"}}},
        {"dtype": "float16", "text_config": {"torch_dtype": "float16", "v": {"dtype": "float16"}}},
    ),
    "by part": (
        {"dtype": {"text_config": "bfloat16", "": "float32", "n": 3}},
        {"dtype": {"text_config": "float16", "": "float16", "n": 3}},
    ),
    "in a list": ({"towers": [{"dtype": "bfloat16"}, 4]}, {"towers": [{"dtype": "float16"}, 4]}),
    "of no weights": (
        {"dtype": None, "ids": {"dtype": "int64"}, "torch_dtype": "auto", "words": {"dtype": 7}},
        {"dtype": None, "ids": {"dtype": "int64"}, "torch_dtype": "auto", "words": {"dtype": 7}},
    ),
    "no dtype": ({"name": "weiß"}, {"name": "weiß"}),
}  # fmt: skip


@pytest.mark.parametrize("case", CONFIGS)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_every_entry_of_a_dtype(case: str, file: str, tmp_path: Path, type_in: Type) -> None:
    before, after = CONFIGS[case]
    (tmp_path / "model").mkdir()
    save_file({"w": torch.ones(3)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / file).write_text(json.dumps(before, ensure_ascii=False))
    status, _, err = type_in("convert", tmp_path / "model", tmp_path / "out", "--dtype", "fp16")
    assert (status, err) == (0, "")
    assert json.loads((tmp_path / "out" / file).read_text()) == after
    if before == after:
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "model" / file).read_bytes()


QUANTIZED: dict[str, dict[str, Any]] = {
    "config.json": {
        "dtype": "float32",
        "quantization_config": {"bnb_4bit_compute_dtype": "bfloat16", "dtype": "float32"},
    },
    "nested": {"text_config": {"quantization_config": {"quant_method": "gptq"}}},
    "quantize_config.json": {"bits": 4},
    "hf_quant_config.json": {"quantization": {"quant_algo": "FP8"}},
}  # fmt: skip


@pytest.mark.parametrize("case", QUANTIZED)
def test_what_is_quantized_is_named(
    case: str, tmp_path: Path, type_in: Type, caplog: pytest.LogCaptureFixture
) -> None:
    file = "config.json" if case == "nested" else case
    (tmp_path / "model").mkdir()
    save_file({"w": torch.ones(3)}, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "model" / file).write_text(json.dumps(QUANTIZED[case]))
    assert type_in("convert", tmp_path / "model", tmp_path / "out", "--dtype", "fp16")[0] == 0
    assert f"{file}: the model is quantized" in caplog.text
    found = json.loads((tmp_path / "out" / file).read_text())
    expected = dict(QUANTIZED[case])
    if "dtype" in expected:
        expected["dtype"] = "float16"
    assert found == expected
    caplog.clear()
    assert type_in("convert", tmp_path / "model", tmp_path / "as it is")[0] == 0
    assert caplog.text == ""


def test_a_pipeline_keeps_its_index_and_gets_its_dtypes(tmp_path: Path, type_in: Type) -> None:
    pipeline = tmp_path / "pipeline"
    for part in ("unet", "text_encoder"):
        (pipeline / part).mkdir(parents=True)
        save_file({"w": torch.ones(3)}, pipeline / part / "model.safetensors")
        (pipeline / part / "config.json").write_text('{"torch_dtype": "float32"}')
    (pipeline / "scheduler").mkdir()
    (pipeline / "scheduler" / "scheduler_config.json").write_text('{"dtype": "float32"}')
    index = (
        '{"_class_name": "P", "unet": ["diffusers", "U"], "text_encoder": ["transformers", "T"]}'
    )
    (pipeline / "model_index.json").write_text(index)
    assert type_in("convert", pipeline, tmp_path / "out", "--dtype", "bf16")[0] == 0
    for part in ("unet", "text_encoder"):
        found = json.loads((tmp_path / "out" / part / "config.json").read_text())
        assert found == {"torch_dtype": "bfloat16"}
    assert (tmp_path / "out" / "model_index.json").read_text() == index
    # It has no weights that were cast.
    scheduler = tmp_path / "out" / "scheduler" / "scheduler_config.json"
    assert scheduler.read_text() == '{"dtype": "float32"}'


def test_shards_get_an_index_that_is_true(folder: Path, tmp_path: Path, type_in: Type) -> None:
    llama().to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size=500)
    arguments = ("--dtype", "float32", "--max-shard-size", "900B")
    assert type_in("convert", tmp_path / "shards", tmp_path / "out", *arguments)[0] == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    held = {
        name: file.name
        for file in (tmp_path / "out").glob("*.safetensors")
        for name in load_file(file)
    }
    assert index["weight_map"] == held
    sizes = [t.nbytes for f in set(held.values()) for t in load_file(tmp_path / "out" / f).values()]
    assert index["metadata"]["total_size"] == sum(sizes)
    assert len(list((tmp_path / "out").glob("*.index.json"))) == 1
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_target_that_is_a_file_leaves_the_others_and_says_so(
    folder: Path, tmp_path: Path, type_in: Type, caplog: pytest.LogCaptureFixture
) -> None:
    assert type_in("convert", folder, tmp_path / "x.safetensors", "--dtype", "fp16")[0] == 0
    assert "config.json, generation_config.json are not copied: give a folder" in plain(caplog.text)
    caplog.clear()
    # Its source has them, but they say bfloat16.
    assert type_in("convert", folder, folder / "half.safetensors", "--dtype", "fp16")[0] == 0
    assert "config.json beside it has another dtype" in plain(caplog.text)
    caplog.clear()
    assert type_in("convert", folder / "model.safetensors", folder / "again.safetensors")[0] == 0
    assert caplog.text == ""


def test_a_companion_that_is_no_json_is_named(
    folder: Path, tmp_path: Path, type_in: Type, caplog: pytest.LogCaptureFixture
) -> None:
    (folder / "notes.json").write_text("dtype: float32")
    assert type_in("convert", folder, tmp_path / "out", "--dtype", "fp16")[0] == 0
    assert "notes.json: is not JSON" in caplog.text
    assert (tmp_path / "out" / "notes.json").read_text() == "dtype: float32"


def test_a_repository_of_the_hub(
    hub: HubServer, folder: Path, tmp_path: Path, type_in: Type
) -> None:
    """Companions come from the Hub too."""
    hub.add("user/llama", {file.name: file.read_bytes() for file in folder.iterdir()})
    assert type_in("convert", "user/llama", tmp_path / "out", "--dtype", "fp16")[0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert (tmp_path / "out" / "generation_config.json").is_file()

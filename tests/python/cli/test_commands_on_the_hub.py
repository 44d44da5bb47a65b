"""``inspect``, ``verify``, ``convert``, ``diff``, ``estimate`` and ``bench`` take ids of the Hub as
they take folders."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from cli_support import Type, type_in
from hub_server import HubServer, hub

__all__ = ["hub", "type_in"]  # fixtures

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)}
VAE = {"c": torch.full((5,), 2.0)}
MODEL, PIPELINE, SHARDED = "user/model", "user/pipeline", "user/sharded"


def as_bin(tensors: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


@pytest.fixture(autouse=True)
def repositories(hub: HubServer) -> None:
    model = hub.add(
        MODEL,
        {
            "config.json": b'{"dtype": "float32"}',
            "model.safetensors": save(TENSORS, metadata={"format": "pt"}),
            "model.fp16.safetensors": save({k: t.half() for k, t in TENSORS.items()}),
            "pytorch_model.bin": as_bin({k: t + 1 for k, t in TENSORS.items()}),
            "README.md": b"not fetched",
        },
    )
    model.commit({"model.safetensors": save({"of a branch": torch.ones(1)})}, ref="draft")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors",
                            "b": "model-00002-of-00002.safetensors"}}  # fmt: skip
    hub.add(
        SHARDED,
        {
            "model.safetensors.index.json": json.dumps(index).encode(),
            "model-00001-of-00002.safetensors": save({"a": TENSORS["a"]}),
            "model-00002-of-00002.safetensors": save({"b": TENSORS["b"]}),
        },
    )
    hub.add(
        PIPELINE,
        {
            "model_index.json": b'{"_class_name": "MyPipeline"}',
            "unet/config.json": b"{}",
            "unet/diffusion_pytorch_model.safetensors": save(TENSORS),
            "vae/config.json": b"{}",
            "vae/diffusion_pytorch_model.safetensors": save(VAE),
            "scheduler/scheduler_config.json": b'{"steps": 4}',
        },
    )


def names(found: dict[str, object]) -> list[str]:
    tensors = found["tensors"]
    assert isinstance(tensors, list)
    return sorted(one["name"] for one in tensors)


def one_line(text: str) -> str:
    return re.sub(r"[\s│╭╮╰╯─]+", " ", text)


@pytest.mark.parametrize("name", [MODEL, SHARDED])
def test_inspect(name: str, type_in: Type) -> None:
    status, out, _ = type_in("inspect", name, "--json")
    assert status == 0
    assert names(json.loads(out)) == ["a", "b"]
    status, out, err = type_in("inspect", name)
    assert (status, err) == (0, "")
    assert "2 x 3" in out


def test_inspect_of_what_options_choose(type_in: Type) -> None:
    out = type_in("inspect", MODEL, "--revision", "draft", "--json")[1]
    assert names(json.loads(out)) == ["of a branch"]
    out = type_in("inspect", MODEL, "--variant", "fp16", "--json")[1]
    assert {one["dtype"] for one in json.loads(out)["tensors"]} == {"F16"}
    out = type_in("inspect", MODEL, "--bin", "--json")[1]
    assert names(json.loads(out)) == ["a", "b"]
    out = type_in("inspect", PIPELINE, "--subfolder", "vae", "--json")[1]
    assert names(json.loads(out)) == ["c"]


def test_inspect_of_a_pipeline(type_in: Type) -> None:
    out = type_in("inspect", PIPELINE, "--json")[1]
    components = json.loads(out)["components"]
    assert {name: names(one) for name, one in components.items()} == {
        "unet": ["a", "b"],
        "vae": ["c"],
    }


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        (MODEL, [MODEL]),
        (SHARDED, [SHARDED]),
        (PIPELINE, [f"{PIPELINE} [unet]", f"{PIPELINE} [vae]"]),
    ],
)  # fmt: skip
def test_verify(name: str, titles: list[str], type_in: Type) -> None:
    status, out, _ = type_in("verify", name, "--json")
    assert status == 0, out
    assert [one["title"] for one in json.loads(out)["checkpoints"]] == titles
    # The Hub states the hash of each file, so none is unknown.
    assert type_in("verify", name, "--require-hashes")[0] == 0


def test_verify_finds_a_damaged_download(tmp_path: Path, type_in: Type) -> None:
    assert type_in("verify", MODEL)[0] == 0
    (blob,) = {file.resolve() for file in (tmp_path / "hub-cache").rglob("model.safetensors")}
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(bytes(data))
    status, out, err = type_in("verify", MODEL)
    assert status == 1
    assert "SHA-256" in out + err


def test_convert(tmp_path: Path, type_in: Type) -> None:
    assert type_in("convert", MODEL, tmp_path / "one.safetensors")[0] == 0
    assert load_file(tmp_path / "one.safetensors")["a"].equal(TENSORS["a"])
    assert type_in("convert", MODEL, tmp_path / "bin", "--bin")[0] == 0
    assert load_file(tmp_path / "bin" / "model.safetensors")["b"].equal(TENSORS["b"] + 1)
    assert type_in("convert", SHARDED, tmp_path / "shards", "--dtype", "bf16")[0] == 0
    found = load_file(tmp_path / "shards" / "model.safetensors")
    assert found["a"].equal(TENSORS["a"].bfloat16())
    assert type_in("convert", PIPELINE, tmp_path / "pipeline")[0] == 0
    found = load_file(tmp_path / "pipeline" / "vae" / "diffusion_pytorch_model.safetensors")
    assert found["c"].equal(VAE["c"])
    scheduler = tmp_path / "pipeline" / "scheduler" / "scheduler_config.json"
    assert scheduler.read_text() == '{"steps": 4}'
    assert (tmp_path / "pipeline" / "model_index.json").is_file()
    part = tmp_path / "part"
    assert type_in("convert", PIPELINE, part, "--subfolder", "unet")[0] == 0
    assert (part / "diffusion_pytorch_model.safetensors").is_file()


def test_diff_and_estimate(tmp_path: Path, type_in: Type) -> None:
    save_file(TENSORS, tmp_path / "here.safetensors")
    assert type_in("diff", MODEL, tmp_path / "here.safetensors")[0] == 0
    assert type_in("diff", MODEL, SHARDED)[0] == 0
    status, out, _ = type_in("estimate", PIPELINE, "--json")
    assert status == 0
    assert json.loads(out)["parameters"] == 6 + 4 + 5


@pytest.mark.parametrize(
    "arguments",
    [[MODEL, "--variant", "fp16"], [SHARDED], [PIPELINE, "--subfolder", "unet"], [PIPELINE]],
)
def test_bench(arguments: list[str], type_in: Type) -> None:
    options = ("--repeat", "1", "--against", "safetensors")
    status, out, err = type_in("bench", *arguments, *options)
    assert status == 0, out + err
    assert "weightlift" in out


COMMANDS = {
    "inspect": (),
    "verify": (),
    "convert": ("out",),
    "estimate": (),
    "diff": (MODEL,),
    "bench": ("--repeat", "1"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("user/none", (), "user/none"),
        (MODEL, ("--revision", "none"), "none"),
        (MODEL, ("--subfolder", "none"), "--subfolder none|none"),
        ("user/../x", (), "user/../x"),
    ],
)
def test_what_is_not_there(
    command: str, name: str, options: tuple[str, ...], expected: str, tmp_path: Path,
    type_in: Type, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One line in terms of the command line, and nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    status, out, err = type_in(command, name, *COMMANDS[command], *options)
    said = one_line(out + err)
    assert status in (1, 2), said
    assert any(part in said for part in expected.split("|")), said
    assert "Traceback" not in said
    assert "subfolder=" not in said
    assert "revision=" not in said
    assert [path.name for path in tmp_path.iterdir()] in ([], ["hub-cache"])


@pytest.mark.parametrize("command", ["inspect", "verify", "estimate"])
def test_a_hub_that_does_not_answer(command: str, hub: HubServer, type_in: Type) -> None:
    hub.down = True
    status, out, err = type_in(command, MODEL)
    assert status == 1
    assert MODEL in one_line(out + err)
    hub.down = False
    assert type_in(command, MODEL)[0] == 0
    hub.down = True  # but it is in the cache by now
    assert type_in(command, MODEL)[0] == 0

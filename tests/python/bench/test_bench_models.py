"""``weightlift bench --from-pretrained``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaForCausalLM

from support import assert_same_tensors, entry, file_bytes
from weightlift.bench.contenders import CONTENDERS, Job
from weightlift.bench.measure_child import _forward
from weightlift.bench.models import bench_folder, model_job
from weightlift.core.errors import CheckpointError
from weightlift.load.phases import observe_phases


def bench(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weightlift", "bench", "--from-pretrained", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "COLUMNS": "80", "HF_HUB_OFFLINE": "1", **environment},
    )


def tables(shown: str) -> list[str]:
    """The lines without sentences, which the terminal wraps."""
    sentence = re.compile(r"(cold|warm): weightlift is|weightlift's I/O path: ")
    return [line for line in shown.splitlines() if not sentence.match(line)]


@pytest.mark.deep  # four processes that import transformers
def test_a_folder(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    out, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    done = bench(tmp_path / "model", "--repeat", "1", "--output", out, "--plot", picture)
    assert done.returncode == 0, done.stderr
    assert max(map(len, tables(done.stdout))) <= 80
    for state in ("cold", "warm"):
        for name in ("library alone", "weightlift"):
            assert f"{state}: measuring {name}, round 1 of 1" in done.stderr
        assert re.search(
            rf"^{state}: weightlift is .*\d\.\d\dx as fast as the library alone \(one round only",
            done.stdout,
            re.MULTILINE,
        )
    comparisons = json.loads(out.read_text())["comparisons"]
    assert [one["cold"] for one in comparisons] == [True, False]
    for comparison in comparisons:
        assert comparison["refused"] == {}
        assert set(comparison["contenders"]) == {"stock", "backend"}
        samples = [one["samples"][0] for one in comparison["contenders"].values()]
        assert all(sample["forward_seconds"] > 0 for sample in samples)
        assert samples[0]["checksum"] == samples[1]["checksum"] is not None
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_class(tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    given = ("diffusers:AutoencoderTiny", "--warm", "--repeat", "1")
    done = bench(*given, "--output", out, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert max(map(len, tables(done.stdout))) <= 80
    assert "warm: measuring weightlift, round 1 of 1" in done.stderr
    said = " ".join(done.stdout.split())
    assert "the library alone (one round only; use a larger --repeat)" in said
    (comparison,) = json.loads(out.read_text())["comparisons"]
    with torch.device("meta"):
        size = sum(tensor.nbytes for tensor in AutoencoderTiny().state_dict().values())
    assert set(comparison["contenders"]) == {"stock", "backend"}
    for contender in comparison["contenders"].values():
        (sample,) = contender["samples"]
        assert sample["bytes"] == size
        assert sample["forward_seconds"] > 0
    assert list(tmp_path.iterdir()) == [out]


def test_a_class_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(file_bytes({"w": entry("F32", [3])}))
    done = bench(tmp_path, "nowhere:Mine", "--warm", "--repeat", "1")
    assert done.returncode == 1
    assert done.stderr.endswith("error: nowhere:Mine: No module named 'nowhere'\n")
    assert "Medians" not in done.stdout


def unet(**more: object) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=(64, 48),
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **more,
    )


def test_a_forward_pass_of_each_kind() -> None:
    of_xl = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 20,
    }
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    models = [
        unet().to(torch.bfloat16),
        unet(**of_xl),
        AutoencoderKL(block_out_channels=(8,), norm_num_groups=8),
        LlamaForCausalLM(LlamaConfig(vocab_size=64, num_attention_heads=2, **small)),
        CLIPTextModel(
            CLIPTextConfig(
                vocab_size=64,
                num_attention_heads=2,
                eos_token_id=1,
                bos_token_id=0,
                pad_token_id=0,
                **small,
            )
        ),
    ]
    for model in models:
        found = _forward(model)
        assert found.get("forward_seconds", 0) > 0, (type(model), found)

    parts = {"scheduler": object(), "unet": models[0], "text_encoder": models[-1]}
    assert _forward(SimpleNamespace(components=parts))["forward_seconds"] > 0
    assert _forward(torch.nn.Linear(2, 2)) == {
        "forward": "what Linear takes is not known; it may have dummy_inputs"
    }
    broken = unet()
    broken.conv_in = torch.nn.Linear(2, 2)
    assert _forward(broken)["forward"].startswith("UNet2DConditionModel: RuntimeError: ")


def test_the_class_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="names a class; add it"):
        model_job(tmp_path, "cpu", None)
    assert model_job(tmp_path, "cpu", None, "mine:Model").model == "mine:Model"
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    assert model_job(tmp_path, "cpu", None).model == "transformers:LlamaForCausalLM"
    assert model_job(tmp_path, "cpu", None, "mine:Model").model == "mine:Model"
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    assert model_job(tmp_path, "cpu", None).model == "diffusers:UNet2DConditionModel"
    (tmp_path / "model_index.json").write_text('{"_class_name": "MyPipeline"}')
    assert model_job(tmp_path, "cpu", None).model == "diffusers:MyPipeline"
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no weights"):
        model_job(tmp_path / "empty", "cpu", None, "mine:Model")
    with bench_folder([str(tmp_path), "json:Model"]) as found:
        assert found == (tmp_path, "json:Model")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["nowhere"], "no such model folder"),
        (["torch:levitate"], "torch:levitate: module 'torch' has no attribute 'levitate'"),
        (["nowhere:Mine"], "nowhere:Mine: No module named 'nowhere'"),
        (["torch.nn:Linear"], "it is not made without arguments"),
        (["transformers:BloomForCausalLM"], "by default it has .*, too much for"),
        (["a", "b"], "one folder and one module:Class at most, not a, b"),
    ],
)
def test_bad_input(
    given: list[str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("weightlift._native.machine", lambda: {"memory_headroom": 10**6, "cpus": 1})
    with pytest.raises((CheckpointError, FileNotFoundError), match=text), bench_folder(given):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mode", ["map", "read"])
def test_which_file_of_a_folder_is_measured(
    tmp_path: Path, request: pytest.FixtureRequest, mode: str
) -> None:
    # The phases stay recorded in the measured process, so it is a separate one.
    request.addfinalizer(lambda: observe_phases(None))
    torch.manual_seed(0)
    model = AutoencoderTiny(
        encoder_block_out_channels=(4, 4, 4, 4), decoder_block_out_channels=(4, 4, 4, 4)
    )
    model.save_pretrained(tmp_path)
    own = dict(model.state_dict())
    others = {name: tensor + 1 for name, tensor in own.items()}
    path = tmp_path / "diffusion_pytorch_model.bin"
    torch.save(others, path)
    job = Job("", (str(path),), mode=mode, folder=str(tmp_path), model="diffusers:AutoencoderTiny")
    for contender, expected in (
        ("ModelMixin", others),
        ("stock", others),
        ("ModelMixin-twin", own),
    ):
        assert_same_tensors(dict(CONTENDERS[contender].prepare(job)().state_dict()), expected)


def test_tensors_one_by_one(tmp_path: Path) -> None:
    path = tmp_path / "f.safetensors"
    tensors = {f"w.{i}": torch.randn(3, i) for i in range(4)}
    safetensors.torch.save_file(tensors, path)
    for contender in ("weightlift.safe_open", "safetensors.safe_open"):
        prepare = CONTENDERS[contender].prepare
        assert_same_tensors(prepare(Job("", (str(path),)))(), tensors)
        cast = prepare(Job("", (str(path),), dtype="bfloat16"))()
        assert {tensor.dtype for tensor in cast.values()} == {torch.bfloat16}

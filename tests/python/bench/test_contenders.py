"""The loads that ``bench`` measures: each library's usual call, with a right result."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from diffusers import AutoencoderTiny
from transformers import CLIPTextConfig, CLIPTextModel

import weightlift as wl
from support import PEERS, assert_same, assert_same_tensors
from weightlift.bench import contenders
from weightlift.bench.contenders import CONTENDERS, Job
from weightlift.bench.measure_child import _measure, _tensors
from weightlift.load.phases import observe_phases


@pytest.fixture(autouse=True)
def _of_this_test() -> Iterator[None]:
    """In a measured process, phases stay recorded."""
    contenders.reports.clear()
    yield
    wl.disable()
    observe_phases(None)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(30, 40, generator=random),
        "b": torch.randn(7, generator=random).to(torch.bfloat16),
        "n": torch.arange(5),
        "none": torch.zeros(0, 3),
    }


@pytest.fixture
def file(tensors: dict[str, torch.Tensor], tmp_path: Path) -> str:
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    torch.save({"other": torch.ones(3)}, tmp_path / "model.bin")
    return str(tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "name", ["weightlift", "safetensors", "safetensors-pread", "weightlift.safe_open"]
)
def test_files(name: str, file: str, tensors: dict[str, torch.Tensor]) -> None:
    prepare = CONTENDERS[name].prepare
    expected = dict(sorted(tensors.items()))
    assert_same_tensors(dict(sorted(prepare(Job("", (file,)))().items())), expected)
    cast = {k: t.half() if t.is_floating_point() else t for k, t in expected.items()}
    found = prepare(Job("", (file,), dtype="float16"))()
    assert_same_tensors(dict(sorted(found.items())), cast)


@pytest.mark.parametrize("name", ["weightlift", "safetensors"])
def test_one_tensor_of_a_file(name: str, file: str, tensors: dict[str, torch.Tensor]) -> None:
    found = CONTENDERS[name].prepare(Job("", (file,), tensor="b"))()
    assert list(found) == ["b"]
    assert_same(found["b"], tensors["b"])


def test_whole_file_libraries_refuse_one_tensor(file: str) -> None:
    known = contenders.read_adapters(PEERS)
    for name in ("torch", "fastsafetensors"):
        assert known[name].why_not(Job("", (file,), tensor="b")) == "it loads whole files"


def test_a_twin_is_the_safetensors_file_beside_it(
    file: str, tensors: dict[str, torch.Tensor]
) -> None:
    """In own memory, like tensors of a .bin."""
    job = Job("", (str(Path(file).with_suffix(".bin")),))
    found = CONTENDERS["twin"].prepare(job)()
    assert_same_tensors(dict(sorted(found.items())), dict(sorted(tensors.items())))
    (report,) = contenders.reports
    assert report.mapped_bytes == 0
    assert CONTENDERS["twin"].reads(job) == (file,)


def test_the_floor_has_the_files_shapes(file: str, tensors: dict[str, torch.Tensor]) -> None:
    found = CONTENDERS["torch.empty"].prepare(Job("", (file,)))()
    assert {name: (t.dtype, t.shape) for name, t in found.items()} == {
        name: (t.dtype, t.shape) for name, t in tensors.items()
    }


def of_diffusers(folder: Path) -> tuple[Job, torch.nn.Module]:
    widths = (4, 4, 4, 4)
    model = AutoencoderTiny(encoder_block_out_channels=widths, decoder_block_out_channels=widths)
    model.save_pretrained(folder)
    return Job("", folder=str(folder), model="diffusers:AutoencoderTiny"), model


def of_transformers(folder: Path) -> tuple[Job, torch.nn.Module]:
    config = CLIPTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    model = CLIPTextModel(config)
    model.save_pretrained(folder)
    return Job("", folder=str(folder), model="transformers:CLIPTextModel"), model


@pytest.fixture(scope="module", params=[of_diffusers, of_transformers])
def saved(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Job, torch.nn.Module]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    job, model = request.param(folder)
    files = tuple(map(str, sorted(folder.glob("*.safetensors"))))
    return dataclasses.replace(job, files=files), model


@pytest.mark.parametrize("dtype", [None, "float16"])
@pytest.mark.parametrize("name", ["stock", "accelerate", "backend", "load_into", "reading"])
def test_models(name: str, dtype: str | None, saved: tuple[Job, torch.nn.Module]) -> None:
    job, model = saved
    found = _tensors(CONTENDERS[name].prepare(dataclasses.replace(job, dtype=dtype))())
    expected = {
        key: value.half() if dtype and value.is_floating_point() else value
        for key, value in model.state_dict().items()
    }
    assert_same_tensors(dict(sorted(found.items())), dict(sorted(expected.items())))


def test_models_of_the_mixin(tmp_path: Path) -> None:
    job, model = of_diffusers(tmp_path)
    shapes = {name: (t.dtype, t.shape) for name, t in model.state_dict().items()}
    built = CONTENDERS["construction"].prepare(job)()
    assert {name: (t.dtype, t.shape) for name, t in built.state_dict().items()} == shapes
    assert {p.device.type for p in built.parameters()} == {"meta"}
    assert not contenders.reports  # no file was read


def measured(job: Job, monkeypatch: pytest.MonkeyPatch, said: str = "go\n") -> list[dict[str, Any]]:
    """The answer of the measured process to a job."""
    answers: list[dict[str, Any]] = []
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    contenders.reports.clear()
    _measure(
        contenders,
        CONTENDERS[job.contender],
        job,
        lambda line: answers.append(json.loads(json.dumps(line))),
    )
    return answers


def test_a_measured_load(
    file: str, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [
        measured(Job(name, (file,), checksum=True), monkeypatch)
        for name in ("weightlift", "safetensors")
    ]
    for ready, figures, checksum in answers:
        assert ready["ready"]
        assert figures["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
        assert figures["tensors"] == len(tensors)
        assert sum(figures["phases"].values()) == pytest.approx(figures["load_seconds"], rel=0.01)
        assert checksum == answers[0][2]
    assert answers[0][1]["report"]["files"]
    assert answers[1][1]["report"] is None


def test_nothing_is_imported_before_the_clock_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_library.py").write_text("import time; time.sleep(0.05)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    slow = dataclasses.replace(CONTENDERS["torch"], imports="slow_library")
    monkeypatch.setitem(CONTENDERS, "slow", slow)
    job = Job("slow", what="import")
    (ready,) = measured(job, monkeypatch, "")  # it is not wanted any longer
    assert ready == {"ready": True, "version": torch.__version__}
    assert "slow_library" not in sys.modules
    _, figures = measured(job, monkeypatch)
    assert figures["load_seconds"] >= 0.05
    assert sys.modules.pop("slow_library")


def test_a_conversion_is_timed(file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def convert(job: Job) -> None:
        made.extend(job.files_as(".packed"))

    packs = dataclasses.replace(CONTENDERS["safetensors"], convert=convert)
    monkeypatch.setitem(CONTENDERS, "packs", packs)
    (answer,) = measured(Job("packs", (file,), what="convert"), monkeypatch, "")
    assert list(answer) == ["seconds"]
    assert 0 <= answer["seconds"] < 60
    assert made == [file.removesuffix(".safetensors") + ".packed"]


def test_tensors_of_a_pipeline() -> None:
    linear = torch.nn.Linear(2, 3)
    parts = {"unet": linear, "scheduler": object(), "vae": None}
    found = _tensors(SimpleNamespace(components=parts))
    assert_same_tensors(found, {f"unet.{name}": t for name, t in linear.state_dict().items()})


def test_a_file_of_adapters_adds_contenders(
    file: str, tensors: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from contenders import Contender, safetensors_only\n"
        "from safetensors.torch import load_file\n"
        "def prepare(job): return lambda: load_file(job.files[0])\n"
        "mine = Contender('safetensors', 'safetensors', safetensors_only, prepare)\n"
        "CONTENDERS = {'mine': mine}\n"
    )
    known = contenders.read_adapters(path)
    assert known.keys() - CONTENDERS.keys() == {"mine"}
    assert "contenders" not in sys.modules
    found = known["mine"].prepare(Job("", (file,)))()
    assert_same_tensors(dict(sorted(found.items())), dict(sorted(tensors.items())))
    for name, text, said in (
        ("no.py", "CONTENDERS = {'mine': 1}", "it sets no CONTENDERS"),
        ("taken.py", path.read_text().replace("'mine'", "'torch'"), "is a contender of"),
        ("names.txt", path.read_text(), "a name that ends in .py"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=said):
            contenders.read_adapters(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        contenders.read_adapters(tmp_path / "nowhere.py")


def test_the_projects_own_adapters_are_the_peers() -> None:
    known = contenders.read_adapters(PEERS)
    assert set(known) - set(CONTENDERS) == {
        "safetensors-prefetch", "fastsafetensors", "runai-model-streamer", "instanttensor",
        "flashpack",
    }  # fmt: skip
    assert set(contenders.AGAINST) <= set(CONTENDERS)

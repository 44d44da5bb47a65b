"""Measuring loads: processes that misbehave, and the figures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from support import PEERS
from weightlift.bench import measure
from weightlift.bench.comparison import Comparison, Sample
from weightlift.bench.contenders import Job
from weightlift.bench.measure import compare, target_bytes
from weightlift.bench.plot import format_seconds, plot
from weightlift.bench.progress import progress_of
from weightlift.bench.tables import describe_run, models_table, notes

READY = """echo "of the library's own"; echo '{"ready": true, "version": "9.9"}'\n"""
FIGURES = {
    "load_seconds": 0.5,
    "touch_seconds": 0.25,
    "cpu_seconds": 0.5,
    "phases": {"move": 0.5},
    "tensors": 1,
    "bytes": 400,
    "anon_before": 10**6,
    "anon_after": 3 * 10**6,
}
SOUND = f"read job\n{READY}read go\necho '{json.dumps(FIGURES)}'\necho '{{\"checksum\": 7}}'\n"


def environment(folder: Path, name: str, script: str) -> None:
    """A virtual environment whose Python is a shell script."""
    program = folder / name / "bin" / "python"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\necho $$ > {folder / name}.pid\n{script}")
    program.chmod(0o755)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100)}, path)
    return path


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo too bad >&2; exit 3", "ended with status 3: too bad"),
        (f"{READY} echo too bad >&2; exit 4", "ended with status 4: too bad"),
        (f"{READY} read job; read go; kill -9 $$", "ended with status -9"),
        (f"{SOUND} exit 5", "ended with status 5"),
        ('echo \'{"failed": "OSError: no"}\'; exec sleep 60', "OSError: no"),
        ("exec sleep 60", "took longer than 2 s"),
        (f"{READY} exec sleep 60", "took longer than 2 s"),
    ],
)
def test_a_process_that_misbehaves_is_refused(
    script: str, reason: str, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_SLACK_BYTES", 0)
    monkeypatch.setattr(measure, "_LIMIT_SECONDS", 2.0)
    monkeypatch.setattr(measure, "_END_SECONDS", 0.1)
    environment(tmp_path, "instanttensor", script)
    environment(tmp_path, "runai-model-streamer", SOUND)
    names = ["instanttensor", "runai-model-streamer"]
    found = compare(
        "x", Job("", (str(file),)), names, repeat=2, adapters=PEERS, environments=tmp_path
    )
    assert found.refused == {"instanttensor": reason}
    assert f"instanttensor: not measured: {reason}" in notes(found)
    assert found.versions["runai-model-streamer"] == "9.9"
    samples = found.samples["runai-model-streamer"]
    assert [sample.seconds for sample in samples] == [0.75, 0.75]
    assert [sample.checksum for sample in samples] == [7, 7]
    assert samples[0].peak_anon_bytes >= 2 * 10**6
    pid = (tmp_path / "instanttensor.pid").read_text().strip()
    assert not Path(f"/proc/{pid}").exists()


def test_files_of_an_own_format_are_made_once(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_SLACK_BYTES", 0)
    packed = file.with_suffix(".flashpack")
    script = f"""read job
case "$job" in *'"what": "convert"'*)
  echo x >> {packed}; echo '{{"seconds": 12.5}}'; exit;;
esac
{READY} read go; echo '{json.dumps(FIGURES)}'
"""
    environment(tmp_path, "flashpack", script)
    for _ in range(2):
        found = compare(
            "x", Job("", (str(file),)), ["flashpack"],
            repeat=1, adapters=PEERS, environments=tmp_path,
        )  # fmt: skip
        assert found.refused == {}
        assert found.conversions == {"flashpack": 12.5}
        assert found.to_json()["contenders"]["flashpack"]["conversion_seconds"] == 12.5
        assert packed.read_text() == "x\n"
    packed.unlink()
    environment(tmp_path / "failing", "flashpack", 'echo \'{"failed": "OSError: full"}\'')
    steps: list[str] = []
    found = compare(
        "x", Job("", (str(file),)), ["flashpack"],
        repeat=3, adapters=PEERS, environments=tmp_path / "failing", step=steps.append,
    )  # fmt: skip
    assert found.refused == {"flashpack": "OSError: full"}
    assert len(steps) == 3
    assert describe_run(found) == "nothing could be measured"


def test_memory_that_a_torch_file_takes(tmp_path: Path) -> None:
    tensors = {"w": torch.ones(100, 10, dtype=torch.float16), "n": torch.arange(5)}
    path, old = tmp_path / "model.bin", tmp_path / "old.bin"
    torch.save(tensors, path)
    torch.save(tensors, old, _use_new_zipfile_serialization=False)
    taken = sum(t.nbytes * (2 if t.is_floating_point() else 1) for t in tensors.values())
    assert target_bytes(Job("", (str(path),), dtype="float32")) == taken
    # For a file without an index, at least this much.
    assert target_bytes(Job("", (str(old),), dtype="float32")) >= taken


def test_pages_of_new_memory_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(8 << 20, dtype=torch.bfloat16)}, path)
    job = Job("", (str(path),), dtype="float32")
    monkeypatch.setenv("WEIGHTLIFT_HUGE_PAGES", "never")
    found = compare("x", job, ["weightlift", "safetensors"], repeat=1).to_json()["contenders"]
    assert found["weightlift"]["pages"] == ["small pages, as set"]
    assert found["safetensors"]["pages"] == []


def sample(load: float, **more: Any) -> Sample:
    figures: dict[str, Any] = {
        "touch_seconds": 0.0,
        "cpu_seconds": load,
        "phases": {},
        "tensors": 1,
        "bytes": 10**9,
        "peak_anon_bytes": 10**6,
        "resident_bytes": 10**9,
        "resident_bytes_after": 10**9,
        "backed_bytes": 0,
    }
    return Sample(load_seconds=load, **(figures | more))


def comparison(samples: dict[str, list[Sample]], **more: Any) -> Comparison:
    given = {"job": Job("weightlift"), "cold": False, "refused": {}, "file_bytes": 10**9}
    return Comparison(name="a load", samples=samples, **(given | more))


def test_ratios_are_of_rounds() -> None:
    ours = [sample(1.0), sample(2.0), sample(3.0)]
    theirs = [sample(2.0), sample(2.0), sample(12.0)]
    found = comparison({"weightlift": ours, "torch": theirs})
    assert found.time_ratio("torch", "weightlift") == 2.0
    assert found.median("torch") == 2.0
    assert found.rate("torch") == 5e8
    assert found.time_ratio("safetensors", "weightlift") is None


def test_a_kernel_that_does_not_tell_what_is_in_the_page_cache() -> None:
    told = describe_run(comparison({"torch": [sample(1.0)]}))
    assert "held 100.0% of the files" in told
    unknown = describe_run(comparison({"torch": [sample(1.0), sample(1.0, resident_bytes=None)]}))
    assert "held an unknown share of the files" in unknown


def table_text(*found: Comparison) -> str:
    console = Console(file=io.StringIO(), width=80)
    console.print(models_table(found))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_table_of_models_on_a_gpu() -> None:
    job = Job("stock", device="cuda")
    sizes = {"peak_device_bytes": 3 * 10**9, "device_bytes": 2 * 10**9}
    samples = {"stock": [sample(2.0, **sizes)], "backend": [sample(0.5, **sizes)]}
    text = table_text(comparison(samples, job=job))
    assert "on GPU" in text
    assert text.count("3.0 GB") == 2
    assert "4.00x" in text
    del samples["stock"]
    text = table_text(comparison(samples, job=job))
    assert "library alone" not in text
    assert "stock" not in text
    assert "weightlift" in text
    assert "4.00x" not in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(123.4, "123 s"), (1.0, "1.00 s"), (0.9994, "999 ms"), (0.01234, "12.3 ms"),
     (0.001, "1.00 ms"), (1.5e-6, "1.50 µs"), (2e-8, "0.02 µs")],
)  # fmt: skip
def test_seconds_have_three_figures(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_a_picture_says_times_and_ratios(tmp_path: Path) -> None:
    files = comparison({"weightlift": [sample(0.5)], "torch": [sample(1.0)]})
    models = comparison({"stock": [sample(0.25)], "backend": [sample(0.1)]})
    imported = comparison({"torch": [sample(0.75)]}, job=Job("", what="import"))
    out = tmp_path / "times.svg"
    with mpl.rc_context({"svg.fonttype": "none"}):
        plot([files, models, imported, comparison({})], out, "Time to load")
    text = out.read_text(encoding="utf-8")
    for said in (
        "Time to load",
        "500 ms   2.00 GB/s<",
        "1.00 s   1.00 GB/s   (2.00x weightlift's time)",
        "100 ms   10.00 GB/s<",
        "250 ms   4.00 GB/s   (2.50x weightlift's time)",
        "750 ms<",
    ):
        assert said.replace("'", "&#x27;") in text or said in text, said
    assert text.count(">a load<") == 3


def test_progress_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with progress_of(3) as (begin, step):
        begin("measuring torch")
        step("torch")
    elsewhere = capsys.readouterr().err
    assert elsewhere.endswith(" s  measuring torch\n")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    with progress_of(3) as (begin, step):
        begin("measuring torch")
        step("torch")
    shown = capsys.readouterr().err
    assert "measuring torch" in shown
    assert "1/3" in shown

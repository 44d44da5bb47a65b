"""``weightlift bench --stream``."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import weightlift as wl
from weightlift.bench import streaming
from weightlift.bench.streaming import (
    Steps,
    StreamRun,
    compare_streams,
    describe,
    plot_timeline,
)
from weightlift.core.report import format_bytes


def test_a_stack_by_two_contenders(tmp_path: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "timeline.png"
    budget = 100 * 10**6
    runs = compare_streams(
        "stack:150MB",
        budget,
        ("weightlift", "accelerate"),
        Steps(2, rows=2, threads=1, beyond=1 << 30),
    )
    ours, theirs = runs
    assert [run.error for run in runs] == ["", ""]
    assert ours.digest == theirs.digest
    assert len(ours.seconds) == len(theirs.seconds) == 2
    assert 0 < ours.peak_bytes <= budget + (64 << 20)
    assert {kind for kind, *_ in ours.events} >= {"read", "use"}
    assert all(begin <= end for _, _, begin, end in ours.events)
    assert "1.00 x" in describe(runs)[0]
    assert ours.limit_bytes in (0, budget + (1 << 30))
    plot_timeline(ours, picture, "a step")
    assert picture.read_bytes().startswith(b"\x89PNG")
    out.write_text(json.dumps([vars(run) for run in runs]))


@pytest.mark.parametrize("kills", [0, 2, 9])
def test_one_that_is_killed_gets_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kills: int
) -> None:
    (tmp_path / "memory.max").write_text("max")
    limits: list[int] = []

    def run(task: dict[str, Any]) -> Any:
        limits.append(int((tmp_path / "memory.max").read_text()))
        code = "import sys; open(sys.argv[1], 'w').write('{}')"
        if len(limits) <= kills:
            code = "import os; os.kill(os.getpid(), 9)"
        monkeypatch.setattr(streaming, "_CHILD", ["-c", code])
        return original(task)

    original = streaming._run
    monkeypatch.setattr(streaming, "_run", run)
    found = streaming._run_within_limit(
        {"contender": "accelerate", "memory": 1000}, str(tmp_path), 100
    )
    assert limits == [1100, 1200, 1400, 1800, 2600][: kills + 1]
    assert found.limit_bytes == limits[-1]
    if kills > 4:
        assert found.error == f"killed in the memory limit of {format_bytes(2600)}"
        assert "killed in the memory limit" in describe([found])[0]
    else:
        assert not found.error
    assert (tmp_path / "memory.max").read_text() == "1100"  # for the next contender


def test_a_model_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    runs = compare_streams(str(tmp_path), 200_000, ("weightlift", "whole"), Steps(1, threads=1))
    assert [run.error for run in runs] == ["", ""]
    assert runs[0].events
    assert runs[0].digest
    # The mapping of the whole model has another alignment than torch's memory, which changes the
    # last bit of sums.
    assert len(describe(runs)) == 2


def test_what_cannot_be_measured() -> None:
    with pytest.raises(wl.ArgumentError, match="'nobody' is not one of"):
        compare_streams("stack:1MB", "1MB", ("nobody",))
    with pytest.raises(wl.ArgumentError, match="memory is 'much'"):
        compare_streams("stack:1MB", "much")
    with pytest.raises(wl.CheckpointError, match="not the folder of a transformers model"):
        compare_streams("nowhere", "1MB")
    assert "not measured: why" in describe([StreamRun("diffusers", error="why")])[0]
    command = [sys.executable, "-m", "weightlift", "bench", "--stream", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "stack:2GB" in done.stderr

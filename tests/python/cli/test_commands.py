"""Commands as people type them: one way to name a source, and errors in terms of the command
line."""

from __future__ import annotations

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cli_support import Type, type_in
from support import assert_same_tensors
from weightlift.cli.sources import shorten

__all__ = ["type_in"]  # a fixture

TENSORS = {
    "unet": {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4)},
    "vae": {"c": torch.full((5,), 2.0)},
}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    folder = tmp_path / "pipeline"
    for name, tensors in TENSORS.items():
        (folder / name).mkdir(parents=True)
        save_file(tensors, folder / name / "diffusion_pytorch_model.safetensors")
        (folder / name / "config.json").write_text("{}")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"steps": 4}')
    (folder / "model_index.json").write_text('{"_class_name": "MyPipeline"}')
    return folder


def test_every_command_takes_a_pipeline(pipeline: Path, type_in: Type) -> None:
    status, out, _ = type_in("inspect", pipeline, "--json")
    assert status == 0
    components = json.loads(out)["components"]
    assert {
        name: sorted(t["name"] for t in one["tensors"]) for name, one in components.items()
    } == {name: sorted(tensors) for name, tensors in TENSORS.items()}
    status, out, _ = type_in("inspect", pipeline)
    assert status == 0
    assert re.findall(r"^(unet|vae)$", out, re.MULTILINE) == ["unet", "vae"]

    status, out, _ = type_in("verify", pipeline, "--json")
    assert status == 0
    titles = [one["title"] for one in json.loads(out)["checkpoints"]]
    assert titles == [f"{pipeline} [unet]", f"{pipeline} [vae]"]

    status, out, _ = type_in("estimate", pipeline, "--json")
    assert json.loads(out)["parameters"] == sum(
        t.numel() for tensors in TENSORS.values() for t in tensors.values()
    )


def test_convert_of_a_pipeline(pipeline: Path, tmp_path: Path, type_in: Type) -> None:
    target = tmp_path / "out"
    status, out, _ = type_in("convert", pipeline, target, "--dtype", "bf16", "--json")
    assert status == 0
    written = json.loads(out)
    assert [one["target"] for one in written] == [str(target / "unet"), str(target / "vae")]
    for name, tensors in TENSORS.items():
        found = load_file(target / name / "diffusion_pytorch_model.safetensors")
        expected = {key: value.bfloat16() for key, value in tensors.items()}
        assert_same_tensors(dict(sorted(found.items())), dict(sorted(expected.items())))
        assert (target / name / "config.json").is_file()
    assert (target / "scheduler" / "scheduler_config.json").read_text() == '{"steps": 4}'
    assert (target / "model_index.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "pipeline"]
    status, _, err = type_in("convert", pipeline, tmp_path / "one.safetensors")
    assert status == 2
    assert "--subfolder" in err


def test_convert_of_files_by_pattern(tmp_path: Path, type_in: Type) -> None:
    for number in range(3):
        torch.save({"w": torch.full((2,), float(number))}, tmp_path / f"step-{number}.bin")
    target = tmp_path / "out"
    status, out, _ = type_in("convert", tmp_path / "step-*.bin", target)
    assert status == 0
    assert len(out.splitlines()) == 3
    assert "1 tensor, " in out
    assert "in 1 file\n" in out
    for number in range(3):
        found = load_file(target / f"step-{number}.safetensors")
        assert found["w"].tolist() == [number, number]
    status, _, err = type_in("convert", tmp_path / "none-*.bin", tmp_path / "again")
    assert (status, "no file fits this pattern" in err) == (1, True)
    names = [tmp_path / "step-1.bin", tmp_path / "step-2.bin"]
    status, _, err = type_in("convert", *names, tmp_path / "x.safetensors")
    assert status == 2
    assert "2 sources need a folder" in re.sub(r"[\s│]+", " ", err)
    # A source that cannot be read: nothing is left behind.
    (tmp_path / "step-9.bin").write_bytes(b"no")
    before = sorted(tmp_path.iterdir())
    assert type_in("convert", tmp_path / "step-*.bin", tmp_path / "more")[0] == 1
    assert sorted(tmp_path.iterdir()) == before


def test_convert_to_another_format_is_an_error(tmp_path: Path, type_in: Type) -> None:
    save_file(TENSORS["unet"], tmp_path / "x.safetensors")
    status, out, err = type_in("convert", tmp_path / "x.safetensors", tmp_path / "y.bin")
    assert (status, out) == (2, "")
    assert "only safetensors are written" in re.sub(r"[\s│]+", " ", err)
    assert not (tmp_path / "y.bin").exists()
    assert type_in("convert", tmp_path / "x.safetensors")[0] == 2


def test_quiet_is_quiet(pipeline: Path, tmp_path: Path, type_in: Type) -> None:
    assert type_in("convert", pipeline / "unet", tmp_path / "q", "--quiet") == (0, "", "")
    assert type_in("verify", pipeline, "-q") == (0, "", "")
    assert type_in("verify", pipeline, "-q", "--require-hashes") == (1, "", "")
    assert type_in("diff", pipeline / "unet", tmp_path / "q", "-q") == (0, "", "")


def test_errors_speak_of_options(pipeline: Path, type_in: Type) -> None:
    for arguments, said in (
        (["inspect", pipeline, "--subfolder", "vae", "--variant", "fp16"], "there is"),
        (["verify", pipeline / "unet", "--variant", "fp16"], "without a variant|variant"),
        (["inspect", pipeline / "unet" / "diffusion_pytorch_model.safetensors", "--subfolder", "x"],
         "--subfolder x needs a folder"),
        (["inspect", pipeline / "unet", "--variant", "fp16"], "there is: --variant None|variant"),
    ):  # fmt: skip
        status, out, err = type_in(*arguments)
        assert (status, out) == (1, "")
        assert re.search(said, err), err
        assert not re.search(r"\b(subfolder|variant|use_safetensors|prefix)=", err), err


def test_tables_fit_80_columns(tmp_path: Path, type_in: Type) -> None:
    name = "model.decoder." + "very_long_block_name." * 6 + "weight"
    other = name.replace("weight", "bias")
    save_file({name: torch.ones(128, 64, 3, 3), other: torch.ones(1)}, tmp_path / "a.safetensors")
    save_file({name: torch.zeros(128, 64, 3, 3)}, tmp_path / "b.safetensors")
    for command in (
        ["inspect", tmp_path / "a.safetensors"],
        ["diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors"],
        ["estimate", tmp_path / "a.safetensors"],
    ):
        _, out, _ = type_in(*command)
        table = [line for line in out.splitlines() if str(tmp_path) not in line]
        assert max(map(len, table)) <= 80
        assert "…" not in out
    _, out, _ = type_in("inspect", tmp_path / "a.safetensors")
    (row,) = [line for line in out.splitlines() if "128 x 64 x 3 x 3" in line]
    assert row.startswith("model.dec")
    assert "weight" in row.split("  ")[0]
    assert "294.9 kB" in row


def test_what_is_too_long_loses_its_middle() -> None:
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 10) == "abc...hijk"
    assert len(shorten("x" * 100, 17)) == 17


@pytest.mark.parametrize(
    "command", ["inspect", "verify", "convert", "diff", "estimate", "doctor", "bench", "run"]
)
def test_help_is_wrapped_once_and_offers_no_internals(command: str, type_in: Type) -> None:
    status, out, _ = type_in(command, "--help")
    assert status == 0
    assert max(map(len, out.splitlines())) <= 80
    for internal in ("twin", "construction", "torch.empty", "python -m"):
        assert internal not in out
    if command not in ("doctor", "run"):
        assert f"weightlift {command} " in out.partition("Examples:")[2]
    # The lines of a paragraph that is wrapped once are full, except the last.
    text = re.split(r"^(?:Arguments|Options|  Examples):", out, flags=re.MULTILINE)[0]
    for paragraph in re.split(r"\n\s*\n", text)[1:]:
        lines = [line.strip() for line in paragraph.splitlines() if line.strip()]
        for line, following in itertools.pairwise(lines):
            assert len(line) + 1 + len(following.split()[0]) > 76, lines


def test_completion_is_offered(type_in: Type) -> None:
    out = type_in("--help")[1]
    assert "--install-completion" in out
    assert "--show-completion" in out


def test_nobody_of_the_benchmark_is_offered(tmp_path: Path, type_in: Type) -> None:
    save_file(TENSORS["vae"], tmp_path / "x.safetensors")
    status, _, err = type_in("bench", tmp_path / "x.safetensors", "--against", "nobody")
    assert status == 2
    assert "'nobody' is not one of safetensors, torch" in re.sub(r"[\s│]+", " ", err)


def test_diff_finds_what_differs(tmp_path: Path, type_in: Type) -> None:
    generator = torch.Generator().manual_seed(0)
    ours = {
        "same": torch.randn(7, generator=generator),
        "changed": torch.randn(50, 3, generator=generator),
        "cast": torch.tensor([1.0, 2.5]),
        "shape": torch.ones(2, 3),
        "mine": torch.ones(1),
        "count": torch.arange(4),
        "nan": torch.tensor([math.nan, 1.0]),
    }
    theirs = {
        **ours,
        "changed": ours["changed"] + 0.5,
        "cast": ours["cast"].bfloat16(),
        "shape": torch.ones(3, 2),
        "count": torch.arange(4) * 3,
        "new": torch.ones(1),
    }
    del theirs["mine"]
    save_file(ours, tmp_path / "a.safetensors")
    torch.save(theirs, tmp_path / "b.bin")
    status, out, _ = type_in("diff", tmp_path / "a.safetensors", tmp_path / "b.bin", "--json")
    assert status == 1
    found = json.loads(out)
    assert (found["tensors"], found["equal"]) == (8, 2)
    by_name = {one["name"]: one for one in found["differences"]}
    assert {name: one["kind"] for name, one in by_name.items()} == {
        "changed": "values", "cast": "dtype", "shape": "shape", "mine": "only in A",
        "count": "values", "new": "only in B",
    }  # fmt: skip
    changed = by_name["changed"]
    assert changed["largest"] == pytest.approx(0.5, abs=1e-6)
    expected = torch.nn.functional.cosine_similarity(
        ours["changed"].reshape(-1).double(), theirs["changed"].reshape(-1).double(), dim=0
    )
    assert changed["cosine"] == pytest.approx(float(expected))
    assert by_name["count"]["largest"] == 6
    status, out, _ = type_in("diff", tmp_path / "a.safetensors", tmp_path / "b.bin")
    assert status == 1
    assert "6 of 8 tensors differ" in out
    headers = type_in("diff", tmp_path / "a.safetensors", tmp_path / "b.bin", "--headers")[1]
    assert "4 of 8 tensors differ" in headers  # of values nothing is known
    same = type_in("diff", tmp_path / "a.safetensors", tmp_path / "a.safetensors")
    assert same == (0, "7 tensors, all equal\n", "")


def test_estimate(tmp_path: Path, type_in: Type) -> None:
    tensors = {
        "layers.0.w": torch.zeros(100, 10, dtype=torch.bfloat16),
        "layers.1.w": torch.zeros(50, dtype=torch.float32),
        "head.ids": torch.zeros(8, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "m.safetensors")
    found = json.loads(
        type_in(
            "estimate", tmp_path / "m.safetensors", "--json",
            "--device-map", '{"layers": 0, "layers.1": "disk", "": "cpu"}',
        )[1]
    )  # fmt: skip
    assert found["parameters"] == 1050
    weights = {name: row["weights"] for name, row in found["dtypes"].items()}
    assert weights == {
        "as stored": 2000 + 200 + 64,
        "float32": 1050 * 4 + 64,
        "bfloat16, float16": 1050 * 2 + 64,
        "8 bits": 1050 + 64,
        "4 bits": 525 + 64,
    }
    assert found["dtypes"]["float32"]["training"] == 4 * weights["float32"]
    assert found["dtypes"]["float32"]["largest_tensor"] == 4000
    assert found["devices"] == {"cuda:0": 2000, "disk": 200, "cpu": 64}
    status, _, err = type_in(
        "estimate", tmp_path / "m.safetensors", "--device-map", '{"layers": 0}'
    )
    assert status == 2
    assert "head.ids has no device" in err


def test_a_command_with_a_mistake_gets_the_nearest(type_in: Type) -> None:
    status, out, err = type_in("inspct", "model.safetensors")
    assert (status, out) == (2, "")
    assert "did you mean inspect?" in err


def test_log_lines_speak_of_options(tmp_path: Path, type_in: Type) -> None:
    torch.save({"state_dict": {"w": torch.ones(3)}, "best": torch.ones(1)}, tmp_path / "c.pth")
    done = subprocess.run(
        [sys.executable, "-m", "weightlift", "convert", "c.pth", "c.safetensors"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "choose others with --state-dict-key" in done.stderr
    assert "the tensors in 'best' (1) are not converted" in done.stderr
    assert "state_dict_key=" not in done.stderr
    _, _, err = type_in("inspect", tmp_path / "c.pth", "--prefix", "x.")
    assert "--prefix x. leaves no tensor" in re.sub(r"\s+", " ", err)
    assert "ignore" not in err


def test_diff_says_once_what_is_the_same(tmp_path: Path, type_in: Type) -> None:
    names = [f"model.layers.{n}.self_attn.{p}_proj.weight" for n in range(2) for p in "qkv"]
    save_file({name: torch.ones(16, 16) for name in names}, tmp_path / "a.safetensors")
    save_file({n: torch.ones(16, 16).half() for n in names}, tmp_path / "b.safetensors")
    status, out, _ = type_in("diff", tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert status == 1
    assert all(name in out for name in names)
    assert "F32 / F16" in out
    assert "cosine" not in out
    assert max(map(len, out.splitlines())) <= 80

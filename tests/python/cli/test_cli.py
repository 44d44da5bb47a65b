"""The command line, run as users run it."""

from __future__ import annotations

import importlib.metadata
import json
import math
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import support
from weightlift.bench.conditions import page_cache, prepare_files, read_program, settle
from weightlift.bench.measure import Job, compare, target_bytes
from weightlift.bench.measure_child import checksum, page_runs, touch
from weightlift.cli.inspect import _residency_text, count_text
from weightlift.cli.main import main
from weightlift.cli.sources import safe_text

RunHere = Callable[..., "tuple[int, str, str]"]


def run(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "weightlift", *map(str, arguments)],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


@pytest.fixture
def run_here(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunHere:
    """The same in this process: the status, stdout and stderr."""

    def run_here(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys, "argv", ["weightlift", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run_here


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"layers.{n}.weight": torch.randn(64, 33, generator=generator).to(torch.bfloat16)
        for n in range(50)
    }
    tensors["steps"] = torch.arange(3)
    tensors["scale"] = torch.tensor(2.0)
    tensors["none"] = torch.zeros(0, 7)
    save_file(tensors, path, metadata={"format": "pt", "about": "weightlift's test"})
    return path


def test_inspect_tells_what_the_reference_reads(checkpoint: Path) -> None:
    done = run("inspect", checkpoint, "--json", "--sort", "name")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with safe_open(checkpoint, framework="pt") as reference:
        assert [entry["name"] for entry in found["tensors"]] == sorted(reference.keys())
        for entry in found["tensors"]:
            piece = reference.get_slice(entry["name"])
            assert entry["shape"] == piece.get_shape()
            assert entry["dtype"] == piece.get_dtype()
            tensor = reference.get_tensor(entry["name"])
            assert entry["bytes"] == tensor.nbytes
            data = checkpoint.read_bytes()[entry["offset"] : entry["offset"] + entry["bytes"]]
            assert data == bytes(tensor.reshape(-1).view(torch.uint8).tolist())
        assert found["metadata"] == reference.metadata()
    assert found["file_bytes"] == checkpoint.stat().st_size
    (file,) = found["files"]
    assert file["path"] == str(checkpoint)
    assert 8 + file["header_bytes"] + found["tensor_bytes"] == file["bytes"]
    assert found["totals"]["BF16"] == {
        "tensors": 50,
        "parameters": 50 * 64 * 33,
        "bytes": 50 * 64 * 33 * 2,
    }
    assert sum(total["tensors"] for total in found["totals"].values()) == len(found["tensors"])
    filled = [entry["offset"] for entry in found["tensors"] if entry["bytes"]]
    assert found["alignment"] == math.gcd(4096, *filled)
    assert found["misaligned_tensors"] == 0


def test_inspect_sorts_by_size_and_by_place(checkpoint: Path) -> None:
    by_size = json.loads(run("inspect", checkpoint, "--json", "--sort", "size").stdout)["tensors"]
    assert by_size == sorted(by_size, key=lambda entry: (-entry["bytes"], entry["offset"]))
    by_place = json.loads(run("inspect", checkpoint, "--json").stdout)["tensors"]
    assert [e["offset"] for e in by_place] == sorted(e["offset"] for e in by_place)


def test_inspect_of_a_sharded_folder(tmp_path: Path) -> None:
    shards = {
        "model-00001-of-00002.safetensors": {"a": torch.zeros(3, 5), "b": torch.zeros(2)},
        "model-00002-of-00002.safetensors": {"c": torch.zeros(7, dtype=torch.bfloat16)},
    }
    for name, tensors in shards.items():
        save_file(tensors, tmp_path / name)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    found = json.loads(run("inspect", tmp_path, "--json").stdout)
    assert {entry["name"]: entry["file"] for entry in found["tensors"]} == weight_map
    assert found["tensor_bytes"] == 15 * 4 + 2 * 4 + 7 * 2
    assert [file["bytes"] for file in found["files"]] == [
        (tmp_path / name).stat().st_size for name in shards
    ]
    for entry in found["tensors"]:
        with safe_open(tmp_path / entry["file"], framework="pt") as reference:
            assert entry["shape"] == reference.get_slice(entry["name"]).get_shape()
    shown = run("inspect", tmp_path).stdout
    assert "model-00002-of-00002" in shown
    assert "BF16" in shown


def test_inspect_of_a_torch_file_counts_shared_bytes_once(tmp_path: Path) -> None:
    weight = torch.arange(12.0).reshape(3, 4)
    state = {"embed": weight, "head": weight, "row": weight[1], "step": 7}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.ckpt")
    found = json.loads(run("inspect", tmp_path / "model.ckpt", "--json").stdout)
    entries = {entry["name"]: entry for entry in found["tensors"]}
    assert set(entries) == {"embed", "head", "row"}
    assert entries["embed"]["shares"] is None
    assert entries["head"]["shares"] == entries["row"]["shares"] == "embed"
    assert entries["row"]["bytes"] == 16
    assert found["tensor_bytes"] == weight.nbytes
    data = (tmp_path / "model.ckpt").read_bytes()
    start = entries["embed"]["offset"]
    assert data[start : start + weight.nbytes] == weight.numpy().tobytes()
    assert json.loads(found["metadata"]["not_tensors"]) == {"epoch": "int", "step": "int"}


def test_inspect_of_a_file_that_only_torch_can_read(tmp_path: Path, run_here: RunHere) -> None:
    tensors = {"b": torch.arange(4), "a": torch.ones(3, 2)}
    path = tmp_path / "old.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    found = json.loads(run_here("inspect", path, "--json", "--sort", "name")[1])
    (fallback,) = found["fallbacks"]
    assert "loaded by torch" in fallback
    assert [entry["name"] for entry in found["tensors"]] == ["a", "b"]
    for entry in found["tensors"]:
        assert entry["bytes"] == tensors[entry["name"]].nbytes
        assert entry["shape"] == list(tensors[entry["name"]].shape)
        assert entry["offset"] is None
    assert found["tensor_bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    shown = " ".join(run_here("inspect", path)[1].split())  # a long path wraps the note
    assert re.search(r"note .*loaded by torch", shown)


def test_inspect_says_what_is_not_aligned(tmp_path: Path, run_here: RunHere) -> None:
    entries = {n: support.entry(d, [2]) for n, d in (("a", "F32"), ("odd", "U8"), ("b", "BF16"))}
    path = tmp_path / "model.safetensors"
    path.write_bytes(support.file_bytes(entries, pad=1))
    found = json.loads(run_here("inspect", path, "--json")[1])
    sizes = {"U8": 1, "F32": 4, "BF16": 2}
    wrong = [t for t in found["tensors"] if t["offset"] % sizes[t["dtype"]]]
    assert wrong
    assert found["misaligned_tensors"] == len(wrong)
    assert f"{len(wrong)} are not aligned to their own elements" in run_here("inspect", path)[1]


def test_inspect_of_long_texts_and_of_nothing(tmp_path: Path, run_here: RunHere) -> None:
    path = tmp_path / "model.safetensors"
    save_file({}, path, metadata={"about": "x" * 1000})
    _, text, _ = run_here("inspect", path)
    assert "no data" in text
    assert "offset" not in text  # no list of tensors
    assert 300 <= text.count("x") < 1000
    assert "(1,000 characters)" in text
    assert run_here("inspect", path, "--limit", "0")[1].count("x") >= 1000


def test_inspect_where_the_kernel_does_not_tell() -> None:
    assert "Linux 6.5" in _residency_text({"resident_bytes": None})


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (999, "999"),
        (1536, "1.5 K"),
        (999_499, "999.5 K"),
        (999_500, "1.0 M"),
        (8_030_261_248, "8.0 B"),
        (10**12, "1.0 T"),
        (1234 * 10**12, "1234.0 T"),
    ],
)
def test_how_parameters_are_counted(number: int, text: str) -> None:
    assert count_text(number) == text


def test_inspect_truncates_long_listings_and_says_so(checkpoint: Path) -> None:
    short = run("inspect", checkpoint, "--limit", "10", "--sort", "name").stdout
    assert "and 43 more" in short
    assert "layers.9.weight" not in short
    whole = run("inspect", checkpoint, "--limit", "0").stdout
    assert "more," not in whole
    assert whole.count("layers.") == 50


def test_inspect_starts_without_torch(checkpoint: Path) -> None:
    code = (
        "import sys; from weightlift.cli.app import app; "
        f"app(['inspect', {str(checkpoint)!r}], standalone_mode=False); "
        "assert not {'torch', 'matplotlib', 'numpy'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_names_reach_the_terminal_without_escape_sequences() -> None:
    assert safe_text("a\x1b[31m\n\u202e") == "a\\x1b[31m\\n\\u202e"


def test_errors_are_one_line_that_names_the_file(tmp_path: Path) -> None:
    missing = tmp_path / "missing.safetensors"
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x08\0\0\0\0\0\0\0{broken}")
    for path in (missing, broken, tmp_path):
        done = run("inspect", path)
        assert done.returncode == 1
        assert done.stdout == ""
        assert len(done.stderr.splitlines()) == 1
        assert str(path) in done.stderr
        assert "Traceback" not in done.stderr
    debug = run("inspect", missing, WEIGHTLIFT_DEBUG="1")
    assert debug.returncode != 0
    assert "Traceback" in debug.stderr


def test_version() -> None:
    assert run("--version").stdout == f"{importlib.metadata.version('weightlift')}\n"


def test_what_bench_cannot_do(checkpoint: Path, tmp_path: Path, run_here: RunHere) -> None:
    for arguments, status, said in (
        (["nowhere.safetensors"], 1, "nowhere.safetensors: no such file"),
        ([tmp_path], 1, "the folder is empty"),
        ([checkpoint, "--output", tmp_path], 1, "it is a folder: name a file in it"),
        ([checkpoint, "--plot", tmp_path / "out.docx"], 2, "is no name of a picture"),
        ([checkpoint, "--memory", "2GB"], 2, "it goes with --stream"),
        ([checkpoint, "--stream", "--dtype", "bf16"], 2, "has no effect with --stream"),
        ([checkpoint, "--stream", "--from-pretrained"], 2, "one of them at a time"),
        ([checkpoint, "--distributed", "2", "--against", "torch"], 2, "has no effect with"),
        (["nowhere", "--distributed", "2"], 1, "nowhere: there is no such file or folder"),
        ([tmp_path, "--distributed", "2"], 2, "no .safetensors file is in it"),
        ([checkpoint, "--adapters", "no.py"], 2, "--adapters: no.py: no such file of adapters"),
        ([checkpoint, "--output", tmp_path / "no" / "out.json"], 1, "folder does not exist"),
        ([checkpoint, "--plot", tmp_path / "no" / "out.png"], 1, "folder does not exist"),
    ):
        found, out, err = run_here("bench", *arguments)
        assert (found, out) == (status, "")
        assert said in re.sub(r"[\s│]+", " ", err)


def test_bench_on_a_gpu_that_is_not_there(
    checkpoint: Path, run_here: RunHere, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, out, err = run_here("bench", checkpoint, "--device", "cuda")
    assert (status, out) == (1, "")
    assert err.startswith("error: ")
    assert "CUDA" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect"],
        ["inspect", "x", "--sort", "colour"],
        ["inspect", "x", "--limit", "-1"],
        ["inspect", "x", "--limit", "many"],
        ["bench"],
        ["bench", "MODEL", "--against", "nobody"],
        ["bench", "MODEL", "--dtype", "int8"],
        ["bench", "MODEL", "--device", "abacus"],
        ["doctor", "--disk", "/there/is/no/such/folder"],
        ["levitate"],
    ],
)
def test_a_wrong_use_ends_with_2(arguments: list[str], checkpoint: Path) -> None:
    given = [str(checkpoint) if argument == "MODEL" else argument for argument in arguments]
    done = run(*given)
    assert done.returncode == 2, done.stderr
    for leak in ("Traceback", "Value error", "Input should", "pydantic"):
        assert leak not in done.stderr


def test_doctor_measures_and_cleans_up(tmp_path: Path) -> None:
    done = run("doctor", "--json", "--disk", tmp_path, "--disk-mb", "16")
    assert done.returncode == 0, done.stderr
    findings = json.loads(done.stdout)
    assert {finding["topic"] for finding in findings} == {"cpu", "memory", "disk", "gpu"}
    assert all(finding["state"] in ("ok", "missing", "info") for finding in findings)
    for finding in findings:
        if finding["state"] == "missing":
            assert finding["costs"]
            assert finding["remedy"]
    table = run("doctor", "--disk", tmp_path, "--disk-mb", "16", COLUMNS="200")
    assert table.returncode == 0, table.stderr
    for finding in findings:
        assert finding["topic"] in table.stdout
        assert finding["name"] in table.stdout
    rates = {(f["topic"], f["name"]): f["value"] for f in findings}
    assert rates["memory", "copy"] > 1e8
    assert rates["disk", "page cache"] > 1e7
    assert list(tmp_path.iterdir()) == []


def test_bench_compares_and_lists_who_could_not(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "bench.json"
    done = run(
        *("bench", checkpoint, "--repeat", "1", "--cold", "--output", out),
        *("--dtype", "float32", "--against", "safetensors,torch,fastsafetensors"),
        *("--adapters", support.PEERS),
    )
    assert done.returncode == 0, done.stderr
    written = json.loads(out.read_text())
    assert written["machine"]["cpus"] >= 1
    (comparison,) = written["comparisons"]
    assert set(comparison["contenders"]) == {"weightlift", "safetensors"}
    assert set(comparison["refused"]) == {"torch", "fastsafetensors"}
    for name in ("torch", "fastsafetensors"):
        assert f"{name}: not measured: {comparison['refused'][name]}" in done.stdout
    for contender in comparison["contenders"].values():
        assert len(contender["samples"]) == 1
        for sample in contender["samples"]:
            assert sample["tensors"] == 53
            assert sample["bytes"] == 50 * 64 * 33 * 4 + 3 * 8 + 4
            assert sample["load_seconds"] > 0
    ours = comparison["contenders"]["weightlift"]
    assert ours["io"]
    (one,), (other,) = (
        comparison["contenders"][n]["samples"] for n in ("weightlift", "safetensors")
    )
    assert one["checksum"] == other["checksum"] is not None
    assert list(one["phases"]) == ["index", "allocate", "build", "move", "finish"]
    assert sum(one["phases"].values()) == pytest.approx(one["load_seconds"], rel=0.01)
    assert ours["time_ratio"]["safetensors"] > 0


def test_a_contender_runs_from_its_environment_and_has_to_load_the_same(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(100), "v": torch.zeros(3)}, path)
    for peer, value in (("runai_model_streamer", 1), ("instanttensor", 0)):
        program = tmp_path / peer.replace("_", "-") / "bin" / "python"
        program.parent.mkdir(parents=True)
        program.write_text(f'#!/bin/sh\nPYTHONPATH={program.parent} exec {sys.executable} "$@"\n')
        program.chmod(0o755)
        (program.parent / f"{peer}.py").write_text(
            "import contextlib, torch\n"
            f"found = {{'w': torch.full((100,), {value}.0), 'v': torch.zeros(3)}}\n"
            "class SafetensorsStreamer(contextlib.nullcontext):\n"
            "    def __enter__(self): return self\n"
            "    def stream_files(self, files, device): pass\n"
            "    def get_tensors(self): return found.items()\n"
            "class safe_open(contextlib.nullcontext):\n"
            "    def __init__(self, *args, **kwargs): super().__init__(self)\n"
            "    def tensors(self): return found.items()\n"
        )
    names = ["weightlift", "runai-model-streamer", "instanttensor", "fastsafetensors"]
    found = compare(
        "x", Job("", (str(path),)), names, repeat=1, adapters=support.PEERS, environments=tmp_path
    )
    assert set(found.samples) == {"weightlift", "runai-model-streamer"}
    assert found.refused == {
        "instanttensor": "what it loads is not what weightlift loads",
        "fastsafetensors": "fastsafetensors is not installed",
    }


def test_bench_measures_what_torch_saved(tmp_path: Path) -> None:
    path, out, picture = (tmp_path / name for name in ("model.bin", "bench.json", "bench.png"))
    torch.save({"w": torch.ones(100, 100)}, path)
    more = ("--against", "torch", "--output", out, "--plot", picture)
    assert run("bench", path, "--repeat", "1", *more).returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    (comparison,) = json.loads(out.read_text())["comparisons"]
    assert comparison["contenders"]["torch"]["samples"][0]["bytes"] == 40_000


def test_other_bits_are_told(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(7, dtype=torch.int16), "b": torch.ones(3)}
    found = checksum(tensors)
    assert checksum(dict(reversed(list(tensors.items())))) == found
    shifted = torch.cat([torch.zeros(1, dtype=torch.int16), tensors["a"]])[1:]
    assert checksum({**tensors, "a": shifted}) == found
    for n in range(7):
        other = tensors["a"].clone()
        other[n] ^= 1
        assert checksum({**tensors, "a": other}) != found
    assert checksum({"a": tensors["a"], "c": tensors["b"]}) != found
    assert checksum({"a": tensors["a"].flip(0), "b": tensors["b"]}) != found
    bits = torch.cat([tensors["a"].view(torch.uint8), tensors["b"].view(torch.uint8)])
    assert checksum({"a": bits[:12], "b": bits[12:]}) != found


@pytest.mark.parametrize("words", [8, 1 << 19, (1 << 21) + 3])
def test_words_that_change_places_are_told(words: int) -> None:
    whole = torch.arange(words)
    found = checksum({"a": whole, "b": whole[:1]})
    for one, other in ((0, 1), (1, words - 1), (words // 2, words // 2 + 1)):
        swapped = whole.clone()
        swapped[one], swapped[other] = whole[other], whole[one]
        assert checksum({"a": swapped, "b": whole[:1]}) != found
    assert checksum({"a": whole.clone(), "b": whole[:1].clone()}) == found


def test_files_are_read_in_and_dropped(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1_000_001))
    settle([path])
    assert page_cache(path) == prepare_files([str(path)], cold=False) == 1_000_001
    if prepare_files([str(path)], cold=True) != 0:
        pytest.skip("this file system has no pages to drop")
    assert page_cache(path) == 0


def test_pages_are_listed_once_and_touched() -> None:
    whole = torch.zeros(64 * 4096, dtype=torch.uint8)
    tensors = {"a": whole[:5000], "b": whole[5000:6000], "c": whole[40 * 4096 :], "d": whole[:0]}
    runs = page_runs(tensors)
    assert len(runs) == 2
    for name in ("a", "b", "c"):
        first, last = tensors[name].data_ptr(), tensors[name].data_ptr() + tensors[name].nbytes
        assert any(begin <= first and last <= begin + count for begin, count in runs)
    assert all(begin % 4096 == 0 and count % 4096 == 0 for begin, count in runs)
    touch(runs)


def test_what_a_process_has_mapped_is_read(tmp_path: Path) -> None:
    path = tmp_path / "library"
    path.write_bytes(bytes(1_000_001))
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        if prepare_files([str(path)], cold=True) != 0:
            pytest.skip("this file system has no pages to drop")
        read_program(os.getpid())
        assert page_cache(path) == 1_000_001


def test_memory_is_backed_for_what_a_load_takes(checkpoint: Path) -> None:
    files = (str(checkpoint),)
    size = checkpoint.stat().st_size
    cast = 50 * 64 * 33 * 4 + 3 * 8 + 4
    assert target_bytes(Job("weightlift", files)) == size
    assert target_bytes(Job("weightlift", files), cold=True) == 2 * size
    assert target_bytes(Job("weightlift", files, dtype="float32")) == cast
    assert target_bytes(Job("weightlift", files, dtype="float32"), cold=True) == size + cast
    assert target_bytes(Job("weightlift", files, device="cuda")) == 0
    assert target_bytes(Job("weightlift", files, tensor="scale")) == 0

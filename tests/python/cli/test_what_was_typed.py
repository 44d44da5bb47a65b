"""Right and wrong commands of a new user, and the required answers."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from cli_support import Type, type_in
from weightlift.bench.tables import verdicts
from weightlift.cli import COMMANDS

__all__ = ["type_in"]  # a fixture

TENSORS = {f"layers.{i}.weight": torch.full((4, 4), float(i)) for i in range(3)}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder: a file, a torch file with two state dicts, a pipeline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_file(TENSORS, "model.safetensors")
    Path("weights.dat").write_bytes(Path("model.safetensors").read_bytes())
    torch.save({"model": TENSORS, "ema": TENSORS}, "two.pt")
    for part in ("unet", "vae"):
        Path("pipe", part).mkdir(parents=True)
        save_file(TENSORS, f"pipe/{part}/diffusion_pytorch_model.safetensors")
    Path("pipe/model_index.json").write_text('{"_class_name": "P"}')
    Path("text.bin").write_text("hello world\n")
    Path("own.py").write_text("1 / 0\n")
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (
            "inspect model.safetensors --sort sise",
            "'sise' is not one of name, size, offset: 'size'",
        ),
        ("inspect model.safetensors --limit many", "'many' is not a whole number"),
        ("diff model.safetensors two.pt --limit -1", "-1 is too small: the least is 0"),
        ("bench model.safetensors --repeat 0", "0 is too small: the least is 1"),
        ("bench model.safetensors --device tpu", "'tpu' is not one of cpu, cuda"),
        ("bench model.safetensors --against safetensor", "safetensors, torch: 'safetensors' is"),
        ("bench model.safetensors --dtype bf61", "'bf61' (did you mean 'bf16'?)"),
        ("bench model.safetensors --stream --memory 3XB", "'3XB'; write bytes, or text with"),
        ("doctor --disk-mb 99999", "99999 is too large: the most is 16384"),
        (
            "convert model.safetensors out --dtype bf17",
            "'bf17' (did you mean 'bf16'?); it can",
        ),
        ("convert model.safetensors out --max-shard-size 5XB", "'--max-shard-size': '5XB'; write"),
        ("convert model.safetensors out --max-shard-size 0", "'0' is no room at all"),
        ("convert model.safetensors x.safetensors --stem y", "--stem: it goes with a folder"),
        ("convert model.safetensors x.safetensors --to-variant y", "--to-variant: it goes with"),
        ("convert model.safetensors x.safetensors --max-shard-size 1GB", "it goes with a folder"),
        ("convert model.safetensors x.safetensor", ".safetensors is meant?"),
        ("convert model.safetensors x.zip", "only safetensors are written"),
        ("convert model.safetensors ''", "TARGET: it is empty"),
        ("estimate model.safetensors --device-map auto", "'auto' is made for the memory of one"),
        ("estimate model.safetensors --device-map no.json", "'no.json' is no file and not JSON"),
        ("estimate model.safetensors --device-map {}", "a map is a JSON object, such as"),
        ('estimate model.safetensors --device-map \'{"": "gpu"}\'', '"gpu" is not one of 0, 1'),
        ("estimate model.safetensors --device-map '{\"\": null}'", "null is not one of"),
        (
            'estimate model.safetensors --device-map \'{"layrs": 0, "": 1}\'',
            "no tensor's name begins with 'layrs'",
        ),
        ("convert model.safetensors out --stem a/b", "--stem: 'a/b' is no part of a file name"),
        ("convert model.safetensors out --to-variant a/b", "--to-variant: 'a/b' is no part of"),
        ("run ''", "'' is not a file"),
        ("version", "did you mean --version?"),
        ("help", "did you mean --help?"),
        (
            "bench model.safetensors --adapters own.py",
            "own.py: ZeroDivisionError: division by zero",
        ),
        ("run --report", "give a script, or -m and a module"),
        ("run model.safetensors", "holds weights and is not a script"),
        ("model.safetensors", "weightlift inspect model.safetensors"),
    ],
)
def test_a_wrong_use(typed: str, said: str, type_in: Type) -> None:
    before = sorted(Path().rglob("*"))
    status, out, err = type_in(*_words(typed))
    assert (status, out) == (2, "")
    assert said in err
    for leak in ("Value error", "Input should", "Traceback", "╭"):
        assert leak not in err
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        ("inspect two.pt", "choose one with --state-dict-key"),
        ("bench model.safetensors --subfolder x", "is a file; --subfolder x needs a folder"),
        ("bench model.safetensors --variant x", "is a file; --variant x needs a folder"),
        ("bench model.safetensors --revision x", "--revision x is for a repository of the Hub"),
        ("bench model.safetensors --bin", "--bin does not allow this file"),
        ("inspect '~/x.safetensors'", "~ is not expanded: write the whole path, or $HOME"),
        ("convert model.safetensors '~/out'", "~ is not expanded: write the whole path, or $HOME"),
        ("inspect https://host/a", "or give the id of a Hub repository\n"),
        ("convert model.safetensors text.bin/x.safetensors", "text.bin: is a file, not a folder"),
        ("inspect model.safetensors --state-dict-key x", "error: model.safetensors: --state-dict-"),
        ("inspect model.safetensors --revision main", "--revision main is for a repository"),
        (
            "inspect pipe --subfolder unet --variant fp16",
            "there is: what is taken without --variant",
        ),
        ("inspect nowhere", "there is no such file or folder, and as the id of a repository"),
        ("inspect nowhere/", "error: nowhere/: there is no such file or folder"),
        ("inspect ''", "error: there is no such file or folder: the path is empty"),
        ("verify two.pt", "choose one with --state-dict-key"),
        ("bench two.pt", "by `weightlift convert two.pt model.safetensors --state-dict-key KEY`"),
        ("bench --from-pretrained two.pt", "two.pt: it is a file: give the model's folder"),
        ("bench --from-pretrained pipe nomodule:C", "nomodule:C: No module named 'nomodule'"),
    ],
)
def test_an_error_names_the_option(typed: str, said: str, type_in: Type) -> None:
    status, _, err = type_in(*_words(typed))
    assert status == 1
    assert said in err


def test_a_component_has_its_own_path(type_in: Type) -> None:
    assert re.search(r"^path +pipe/unet *$", type_in("inspect", "pipe", "--subfolder", "unet")[1],
                     re.MULTILINE)  # fmt: skip
    components = json.loads(type_in("inspect", "pipe", "--json")[1])["components"]
    assert [one["path"] for one in components.values()] == ["pipe/unet", "pipe/vae"]


def test_the_suffix_does_not_matter(type_in: Type) -> None:
    status, _, _ = type_in("convert", "model.safetensors", "X.SAFETENSORS")
    assert status == 0
    assert Path("X.SAFETENSORS").is_file()
    assert "header " in type_in("inspect", "weights.dat")[1]


@pytest.mark.parametrize("columns", [30, 60, 100])
def test_no_column_is_cut(columns: int, type_in: Type) -> None:
    save_file({"other": torch.zeros(2)}, "other.safetensors")
    for typed, shown in (
        ("inspect model.safetensors", ["dtype", "shape", "offset", "4 x 4", "64 B"]),
        ("estimate model.safetensors", ["training with Adam", "bfloat16, float16"]),
        ("diff model.safetensors other.safetensors", ["differs in", "F32 4 x 4 / -"]),
    ):
        out = type_in(*_words(typed), columns=columns)[1]
        assert "…" not in out
        for word in shown:
            assert word in out, typed


@pytest.mark.parametrize("columns", [60, 80])
def test_help_cuts_no_word(columns: int, type_in: Type) -> None:
    for command in COMMANDS:
        status, out, _ = type_in(command, "--help", columns=columns)
        assert status == 0
        assert "…" not in out
        usage = " ".join(out.partition("\n\n")[0].split())
        assert {"convert": "TARGET", "run": "ARGS..."}.get(command, "") in usage
        wide = [line for line in out.splitlines() if len(line) > columns]
        assert all(line.startswith("    weightlift ") for line in wide)  # to be copied


def _words(typed: str) -> list[str]:
    return shlex.split(typed)


def test_a_damaged_component_does_not_hide_the_others(type_in: Type) -> None:
    damaged = Path("pipe/unet/diffusion_pytorch_model.safetensors")
    damaged.write_bytes(damaged.read_bytes()[:-1])
    status, out, err = type_in("verify", "pipe", "--json")
    assert (status, err) == (1, "")
    found = json.loads(out)
    assert found["damaged"] == 1
    assert [one["files"][0]["damaged"] for one in found["checkpoints"]] == [True, False]
    assert "incomplete" in found["checkpoints"][0]["files"][0]["result"]
    status, out, _ = type_in("verify", "pipe")
    assert status == 1
    assert "pipe [unet]: DAMAGED: " in out
    assert "pipe [vae]: 3 tensors" in out
    assert type_in("verify", "pipe", "--quiet") == (1, "", "")
    assert type_in("verify", damaged, "--quiet") == (1, "", "")
    assert json.loads(type_in("verify", damaged, "--json")[1])["damaged"] == 1


def test_several_sources_are_named_as_they_will_be(
    type_in: Type, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("one", "two"):
        Path(name).mkdir()
        save_file(TENSORS, f"{name}/model.safetensors")
        Path(name, "config.json").write_text("{}")
    assert type_in("convert", "one", "two", "out")[0] == 0
    said = [record.getMessage() for record in caplog.records]
    assert [text.partition(":")[0] for text in said] == [
        "out/one.safetensors", "out/two.safetensors",
    ]  # fmt: skip
    assert all("config.json" in text and ".tmp" not in text for text in said)


def test_the_missing_argument_is_the_target(type_in: Type) -> None:
    status, _, err = type_in("convert", "model.safetensors")
    assert (status, "Missing argument 'TARGET'" in err) == (2, True)
    status, _, err = type_in("convert")
    assert (status, "Missing argument 'SOURCE'" in err) == (2, True)


@pytest.mark.parametrize("command", ["inspect", "verify", "estimate"])
def test_several_paths_and_patterns(command: str, type_in: Type) -> None:
    save_file({"other": torch.zeros(2)}, "more.safetensors")
    status, out, _ = type_in(command, "m*.safetensors")
    assert status == 0
    for word in ["model.safetensors and 1 more"] if command == "estimate" else [
        "model.safetensors", "more.safetensors"
    ]:  # fmt: skip
        assert word in out
    found = json.loads(type_in(command, "more.safetensors", "weights.dat", "--json")[1])
    if command == "estimate":
        assert found["tensors"] == 4
    else:
        rows = found if command == "inspect" else found["checkpoints"]
        assert [row.get("path", row.get("title")) for row in rows] == [
            "more.safetensors", "weights.dat"
        ]  # fmt: skip
    status, _, err = type_in(command, "*.nothing")
    assert (status, "no file fits this pattern" in err) == (1, True)


@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_a_damaged_file_does_not_hide_the_next(command: str, type_in: Type) -> None:
    Path("bad.safetensors").write_bytes(Path("model.safetensors").read_bytes()[:-20])
    status, out, err = type_in(command, "bad.safetensors", "model.safetensors")
    assert status == 1
    assert (out + err).count("bad.safetensors") == 1
    assert "model.safetensors" in out


def test_json_of_bench_is_a_flag(type_in: Type) -> None:
    typed = ["bench", "model.safetensors", "--against", "safetensors", "--repeat", "1"]
    status, out, _ = type_in(*typed, "--json", "--output", "figures.json")
    assert status == 0
    printed, written = json.loads(out), json.loads(Path("figures.json").read_text())
    assert printed["comparisons"] == written["comparisons"]
    assert set(printed["comparisons"][0]["contenders"]) == {"weightlift", "safetensors"}
    status, _, err = type_in(*typed, "--json", "out.json")
    assert (status, "a file is written by --output out.json" in err) == (2, True)


def test_a_step_that_does_not_fit_ends_at_once(type_in: Type) -> None:
    typed = ("--stream", "--memory", "1KB", "--repeat", "1")
    status, _, err = type_in("bench", "stack:1MB", *typed)
    assert (status, "stack:1MB: one layer of a stack has 33.6 MB" in err) == (1, True)
    status, out, err = type_in("bench", "stack:34MB", *typed)
    assert status == 1
    assert "not measured: ArgumentError: memory is 1.0 kB" in out
    assert "another result" not in out
    assert "accelerate" not in out + err
    assert "weightlift" in err  # what is being measured


def test_verify_takes_the_option_that_it_names(type_in: Type) -> None:
    status, out, _ = type_in("verify", "two.pt", "--state-dict-key", "ema")
    assert (status, "two.pt: 3 tensors" in out) == (0, True)


def test_no_hash_is_known(type_in: Type) -> None:
    assert "none of the 2 files is in a Hub cache" in type_in("verify", "pipe")[1]


@pytest.mark.parametrize("command", ["inspect", "verify", "estimate", "convert"])
def test_a_name_that_the_terminal_lacks(command: str) -> None:
    """Neither its encoding nor markup."""
    Path("ü [b]x[b].safetensors").write_bytes(Path("model.safetensors").read_bytes())
    typed = [command, "ü [b]x[b].safetensors", *(["ü [b]"] if command == "convert" else [])]
    done = subprocess.run(
        [sys.executable, "-m", "weightlift", *typed],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"[b]" in done.stdout


def test_a_full_disk_has_no_number() -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-m", "weightlift", "inspect", "model.safetensors"],
            stdout=full,
            stderr=subprocess.PIPE,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, b"error: No space left on device\n")


@pytest.mark.parametrize("typed", ["model.safetensors weights.dat", "pipe"])
def test_a_target_that_cannot_be_made_is_named(
    typed: str, type_in: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Path.mkdir

    def mkdir(self: Path, *arguments: object, **options: object) -> None:
        if self.name.startswith(".weightlift"):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        make(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "mkdir", mkdir)
    status, _, err = type_in("convert", *_words(typed), "out")
    assert status == 1
    assert err.startswith("error: out: Permission denied: this user may not make files in .")
    assert "weightlift-" not in err


def test_an_interrupt_while_commands_are_imported(
    type_in: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("weightlift.cli.app.app", interrupted)
    assert type_in("inspect", "model.safetensors") == (130, "", "")


def test_the_title_of_bench_is_no_markup(type_in: Type) -> None:
    Path("[b]x[b].safetensors").write_bytes(Path("model.safetensors").read_bytes())
    typed = ["bench", "[b]x[b].safetensors", "--against", "safetensors", "--repeat", "1"]
    assert type_in(*typed)[1].startswith("[b]x[b].safetensors, ")


@pytest.mark.parametrize(
    "typed",
    ["inspect F", "verify F", "estimate F", "diff F F", "convert F out", "diff F F --headers"],
)
def test_each_command_tells_of_a_variable_that_nobody_knows(typed: str) -> None:
    environment = {**os.environ, "WEIGHTLIFT_THREDS": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "weightlift", *_words(typed.replace("F", "model.safetensors"))],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    said = "environment variable WEIGHTLIFT_THREDS is unknown; did you mean WEIGHTLIFT_THREADS?"
    assert done.stderr == f"warning: {said}\n"


def test_verify_looks_at_every_path_and_counts_one(type_in: Type) -> None:
    Path("cut.dduf").write_bytes(b"PK")
    Path("known").mkdir()
    Path("known/model.safetensors").write_bytes(Path("model.safetensors").read_bytes())
    Path("known/SHA256SUMS").write_text(f"{'0' * 64}  model.safetensors\n")
    status, out, err = type_in("verify", "cut.dduf", "known/model.safetensors", "weights.dat")
    assert (status, err) == (1, "")
    lines = out.splitlines()
    assert lines[0].startswith("cut.dduf: DAMAGED: ")
    assert lines[2].startswith("  known/model.safetensors: DAMAGED: its SHA-256 is ")
    assert lines[-1].startswith("1 of the 3 files is in no Hub cache and has no SHA256SUMS beside")


def test_a_subfolder_is_in_the_title_and_an_empty_one_is_none(type_in: Type) -> None:
    assert type_in("verify", "pipe", "--subfolder", "unet")[1].startswith("pipe/unet: 3 tensors")
    assert type_in("estimate", "pipe", "--subfolder", "vae")[1].startswith("pipe/vae: 3 tensors")
    inspected = type_in("inspect", "model.safetensors", "--subfolder", "")[1]
    assert re.match(r"path +model.safetensors *\n", inspected)


def test_a_file_that_only_torch_reads_has_its_size(type_in: Type) -> None:
    torch.save(TENSORS, "legacy.bin", _use_new_zipfile_serialization=False)
    size = Path("legacy.bin").stat().st_size
    shown = type_in("inspect", "legacy.bin")[1]
    assert f"({size:,} bytes)" in shown
    assert "no data" not in shown
    assert json.loads(type_in("inspect", "legacy.bin", "--json")[1])["file_bytes"] == size


def test_an_error_of_pickles_is_one_line() -> None:
    """torch's own warning, with its file and line, is not shown beside it."""
    Path("plain.pkl").write_bytes(pickle.dumps({"w": [1]}, protocol=4))
    done = subprocess.run(
        [sys.executable, "-m", "weightlift", "inspect", "plain.pkl"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: plain.pkl: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("ratios", "said"),
    [
        ([1.002], "weightlift is as fast as other (one round only; use a larger --repeat)"),
        ([0.5], "weightlift is slower: 0.50x as fast as other (one round only; use a larger"),
        ([2.0, 3.0], "weightlift is 2.50x as fast as other (2.00x to 3.00x in 2 rounds)"),
    ],
)
def test_the_verdict_of_bench(ratios: list[float], said: str) -> None:
    found = SimpleNamespace(
        samples=["weightlift", "other"], cold=False, time_ratios=lambda *_: ratios
    )
    assert verdicts(found, "weightlift")[0].startswith(f"warm: {said}")  # type: ignore[arg-type]


def test_no_column_of_bench_is_cut(type_in: Type) -> None:
    """However narrow the terminal is."""
    shown = type_in("bench", "model.safetensors", "--against", "safetensors", "--repeat", "1",
                    columns=40)[1]  # fmt: skip
    title = next(line for line in shown.splitlines() if line.lstrip().startswith("time"))
    assert title.split() == ["time", "load", "touch", "rate", "CPU", "memory", "ratio"]


def test_what_bench_lacks_is_said_before_it_measures(
    type_in: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, out, err = type_in("bench", "model.safetensors", "--plot", "p.png")
    assert (status, out) == (1, "")
    assert err == "error: --plot needs matplotlib, which is not installed: pip install " \
                  "'weightlift[plot]'\n"  # fmt: skip


def test_a_folder_without_rights_is_named_itself(
    type_in: Type, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a file in it that nobody typed."""
    is_file = Path.is_file

    def refused(self: Path) -> bool:
        if self.name == "model_index.json":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return is_file(self)

    monkeypatch.setattr(Path, "is_file", refused)
    assert type_in("verify", "pipe/unet")[0] == 0


def test_debug_takes_what_a_flag_takes(type_in: Type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEIGHTLIFT_DEBUG", "maybe")
    status, _, err = type_in("inspect", "no.bin")
    assert (status, err) == (1, "error: WEIGHTLIFT_DEBUG is 'maybe'; it can be 0 or 1\n")
    monkeypatch.setenv("WEIGHTLIFT_DEBUG", "true")
    with pytest.raises(FileNotFoundError):
        type_in("inspect", "no.bin")


def test_one_tensor_is_not_aligned_to_its_own_elements(type_in: Type) -> None:
    header = b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    header += b" " * (8 - len(header) % 8 + 1)
    Path("odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    shown = " ".join(type_in("inspect", "odd.safetensors")[1].split())
    assert "begins at a multiple of 1 byte; 1 is not aligned to its own elements" in shown

"""Checks vLLM with bad input and weightlift's loader, on the CPU: `bad_input.py FOLDER MODEL`.

MODEL is a Llama's folder; copies with faults go to FOLDER. In each case there must be an error that
names the fault, the engine's own or weightlift's. If vLLM's hooks are unknown, there must be one
line in the log, and vLLM's own loader loads.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_DIST_IDENT", "weightlift")

import torch
from compare_ranks import Rank
from parameters import differences, tensors_of
from safetensors.torch import load_file, save_file
from vllm.config import set_current_vllm_config
from vllm.model_executor import model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.plugins import load_general_plugins

INDEX = "model.safetensors.index.json"
WAYS: list[dict[str, Any]] = [{}, {"slices": False}]


def without_a_tensor(folder: Path) -> None:
    """The index names a tensor that the shard lacks."""
    file = min(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    del tensors[name]
    save_file(tensors, file, {"format": "pt"})


def of_other_shape(folder: Path) -> None:
    change(folder, lambda tensor: tensor[:, :-8].contiguous())


def change(folder: Path, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = min(folder.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("o_proj.weight"))
    tensors[name] = how(tensors[name])
    save_file(tensors, file, {"format": "pt"})


def cut_short(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    os.truncate(file, file.stat().st_size - 100)


def without_a_shard(folder: Path) -> None:
    min(folder.glob("*.safetensors")).unlink()


def without_any(folder: Path) -> None:
    for file in folder.glob("*.safetensors"):
        file.unlink()


# The text that the error of each fault must contain.
FAULTS: dict[Callable[[Path], None], str] = {
    without_a_tensor: "o_proj.weight' is in it, and it is not",  # vLLM's own check does not find it
    of_other_shape: "exceeds dimension size",  # and the log has the tensor
    cut_short: ".safetensors",
    without_a_shard: "model-00001-of-00002.safetensors",
    without_any: "Cannot find any model weights",
}


class Tests:
    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.rank = Rank(0, 1, tempfile.mktemp(dir=folder))
        self.faults: list[str] = []

    def load(self, folder: Path, load_format: str, extra: dict[str, Any]) -> Any:
        config = self.rank.config(str(folder), load_format, extra)
        with set_current_vllm_config(config):
            return self.rank.load(config)[0]

    def expect_error(self, case: str, folder: Path, extra: dict[str, Any], text: str) -> None:
        try:
            self.load(folder, "weightlift", extra)
        except Exception as error:
            said = f"{type(error).__name__}: {error}"
            print(f"rank 0 of 1: {case} {extra}: {said[:160]!r}", flush=True)
            if text not in said:
                self.faults.append(f"{case} {extra}: the error does not say {text!r}")
        else:
            self.faults.append(f"{case} {extra}: no error")

    def faulty_files(self) -> None:
        for fault, text in FAULTS.items():
            folder = self.folder / fault.__name__
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(self.model, folder)
            fault(folder)
            for extra in WAYS:
                self.expect_error(fault.__name__, folder, extra, text)

    def configuration(self) -> None:
        self.expect_error("unknown key", self.model, {"slice": True}, "slice")
        self.expect_error("no bool", self.model, {"slices": "no"}, "slices must be true or false")

    def unknown_hooks(self) -> None:
        """As if vLLM's loader had changed."""
        from weightlift.backends.vllm import register

        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("weightlift").addHandler(handler)
        known = model_loader._LOAD_FORMAT_TO_MODEL_LOADER
        ours = known.pop("weightlift")
        module = sys.modules.pop("weightlift.backends.vllm.loader")
        prepare = DefaultModelLoader._prepare_weights
        DefaultModelLoader._prepare_weights = lambda self, source: prepare(self, *source)
        try:
            register()
            DefaultModelLoader._prepare_weights = prepare
            found = self.load(self.model, "weightlift", {"slices": False})
        finally:
            DefaultModelLoader._prepare_weights = prepare
            known["weightlift"] = ours
            sys.modules["weightlift.backends.vllm.loader"] = module
        wanted = self.load(self.model, "auto", {})
        print(f"rank 0 of 1: unknown hooks: {messages}", flush=True)
        if len(messages) != 1 or "vLLM's own loader is used" not in messages[0]:
            self.faults.append(f"unknown hooks: {messages}")
        if wrong := differences(tensors_of(found), tensors_of(wanted)):
            self.faults.append(f"unknown hooks: other bytes in {wrong[:4]}")

    def nothing_is_left(self) -> None:
        """After all these errors, a load must work as usual."""
        found, wanted = (self.load(self.model, kind, {}) for kind in ("weightlift", "auto"))
        if wrong := differences(tensors_of(found), tensors_of(wanted)):
            self.faults.append(f"after the errors: other bytes in {wrong[:4]}")


def main() -> None:
    load_general_plugins()
    folder, model = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    assert json.loads((model / INDEX).read_text())["weight_map"], "a model in shards is due"
    tests = Tests(folder, model)
    tests.faulty_files()
    tests.configuration()
    tests.unknown_hooks()
    tests.nothing_is_left()
    print("\n".join(tests.faults) or "rank 0 of 1: bad input is told", flush=True)
    sys.exit(bool(tests.faults))


if __name__ == "__main__":
    main()

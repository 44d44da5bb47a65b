"""Runs in each environment of `make release-check`: README's example, and a load by each backend.

``prepare FOLDER LIBRARY...`` writes small models with the libraries alone. ``load`` with the same
arguments loads them with and without weightlift and compares the tensors. It writes nothing, so
that it also runs on a read-only root.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


class Wrong(Exception):
    """A load gave a wrong result."""


def prepare(folder: Path, libraries: list[str]) -> None:
    torch.manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(8, 8) for i in range(4)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(nn.Linear(4, 3).state_dict(), folder / "linear.safetensors")
    (folder / "linear").mkdir()
    save_file(nn.Linear(4, 3).state_dict(), folder / "linear" / "model.safetensors")
    (folder / "broken.safetensors").write_bytes(b"\xff" * 64)
    if "transformers" in libraries:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 128}
        heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder / "llama")
    if "diffusers" in libraries:
        from diffusers import AutoencoderKL

        AutoencoderKL(block_out_channels=(32,), sample_size=8).save_pretrained(folder / "vae")


def run_readme(folder: Path) -> None:
    readme = Path(__file__).resolve().parent.parent / "README.md"
    _, _, rest = readme.read_text().partition("## Example\n\n```python\n")
    example, end, _ = rest.partition("\n```\n")
    if not end:
        raise Wrong("README has no example")
    os.chdir(folder)
    exec(compile(example, "README.md", "exec"), {})
    print("README's example: runs", flush=True)


def compare(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    state = ours.state_dict()
    if state.keys() != expected.keys():
        raise Wrong(f"other tensors: {sorted(state.keys() ^ expected.keys())}")
    for name, value in expected.items():
        if state[name].dtype != value.dtype or not torch.equal(state[name], value):
            raise Wrong(f"{name} is not as the library loads it")


def load_by_transformers(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.bfloat16)


def load_by_diffusers(folder: Path) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float16)


def load_by_accelerate(folder: Path) -> nn.Module:
    import accelerate

    with accelerate.init_empty_weights():
        model = nn.Linear(4, 3)
    path = str(folder / "linear.safetensors")
    accelerate.load_checkpoint_in_model(model, path, device_map={"": "cpu"})
    return model


def load_by_safetensors(folder: Path) -> nn.Module:
    import safetensors.torch

    model = nn.Linear(4, 3)
    model.load_state_dict(safetensors.torch.load_file(folder / "linear.safetensors"))
    return model


LOADS: dict[str, Callable[[Path], nn.Module]] = {
    "transformers": load_by_transformers,
    "diffusers": load_by_diffusers,
    "accelerate": load_by_accelerate,
    "safetensors": load_by_safetensors,
}


def load_by_backend(name: str, folder: Path) -> None:
    import weightlift as wl

    load = LOADS[name]
    wl.disable()
    theirs = load(folder)
    before = wl.stats()
    with wl.enabled(name):
        ours = load(folder)
    after = wl.stats()
    if after.loads == before.loads:
        raise Wrong(f"{name}: weightlift loaded nothing")
    if after.fallbacks != before.fallbacks:
        raise Wrong(f"{name}: fell back: {after}")
    compare(ours, theirs)
    print(f"{name}: loaded by weightlift, equal to the library's own", flush=True)


def raise_errors(folder: Path) -> None:
    """Checks that C++ exceptions become Python exceptions beside torch's C++ runtime, in all
    threads."""
    import weightlift as wl

    caught: list[str] = []

    def load() -> None:
        try:
            wl.load_file(folder / "broken.safetensors")
        except wl.FormatError as error:
            caught.append(error.code)
        try:
            torch.ones(2) @ torch.ones(3)
        except RuntimeError:
            caught.append("torch")

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if sorted(caught) != ["header_too_large"] * 4 + ["torch"] * 4:
        raise Wrong(f"raised in four threads, caught: {caught}")
    print("errors: raised and caught in four threads", flush=True)


# First without torch's C++ runtime in the process, then with it, after the module has thrown: the
# runtime that is loaded first must not be used for the other library.
_MODULE_FIRST = """
import sys
from weightlift import _native, FormatError
from weightlift.checkpoint.checkpoint import Checkpoint

def fail():
    try:
        Checkpoint.from_file(sys.argv[1])
    except FormatError as error:
        return error.code

if "torch" in sys.modules:
    sys.exit("importing weightlift imports torch")
before = fail()
import torch
try:
    torch.ones(2) @ torch.ones(3)
except RuntimeError:
    pass
else:
    sys.exit("torch raised nothing")
sys.exit(0 if before == fail() == "header_too_large" else f"{before}, then {fail()}")
"""


def raise_errors_before_torch(folder: Path) -> None:
    """Checks in a new interpreter that loads the module before torch."""
    command = [sys.executable, "-B", "-c", _MODULE_FIRST, str(folder / "broken.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise Wrong(f"with the module before torch: {done.returncode}\n{done.stdout}{done.stderr}")
    print("errors: the same with the module loaded before torch", flush=True)


def leave_threads_behind(folder: Path) -> None:
    """Ends the interpreter while threads are in the module: a thread that then takes the
    interpreter's lock ends by pthread_exit, which unwinds it. (torch's own operators abort there,
    so none is used.)"""
    import weightlift as wl

    def open_files() -> None:
        while True:
            wl.open_checkpoint(folder / "model.safetensors").close()

    for _ in range(3):
        threading.Thread(target=open_files, daemon=True).start()


def main() -> None:
    what, place, *libraries = sys.argv[1:]
    folder = Path(place).resolve()
    if what == "prepare":
        folder.mkdir(parents=True)
        prepare(folder, libraries)
        for path in (folder, *folder.rglob("*")):  # safetensors' are only the owner's
            path.chmod(0o755 if path.is_dir() else 0o644)
        return
    run_readme(folder)
    for name in libraries:
        load_by_backend(name, folder)
    raise_errors(folder)
    raise_errors_before_torch(folder)
    leave_threads_behind(folder)


if __name__ == "__main__":
    main()

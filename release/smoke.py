"""What `make release-check` does in each environment: README's example, and a load by each backend.

``prepare FOLDER`` writes small models with the libraries alone; ``load FOLDER`` loads them with and
without weightlift, and compares. Nothing is written by ``load``: it also runs where nothing can be.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn


def prepare(folder: Path) -> None:
    from diffusers import AutoencoderKL
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tensors = {f"layers.{i}.weight": torch.randn(8, 8) for i in range(4)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    save_file(nn.Linear(4, 3).state_dict(), folder / "linear.safetensors")
    (folder / "linear").mkdir()
    save_file(nn.Linear(4, 3).state_dict(), folder / "linear" / "model.safetensors")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, **heads)).save_pretrained(folder / "llama")
    AutoencoderKL(block_out_channels=(32,), sample_size=8).save_pretrained(folder / "vae")
    (folder / "broken.safetensors").write_bytes(b"\xff" * 64)


def run_readme(folder: Path) -> None:
    readme = Path(__file__).resolve().parent.parent / "README.md"
    _, _, rest = readme.read_text().partition("## Example\n\n```python\n")
    example, end, _ = rest.partition("\n```\n")
    assert end, "README has no example"
    os.chdir(folder)
    exec(compile(example, "README.md", "exec"), {})


def same(ours: nn.Module, theirs: nn.Module) -> None:
    expected = theirs.state_dict()
    state = ours.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name
        assert state[name].dtype == value.dtype, name


def load_by_backends(folder: Path) -> None:
    import accelerate
    import safetensors.torch
    from diffusers import AutoencoderKL
    from transformers import AutoModelForCausalLM

    import weightlift as wl

    def by_transformers() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder / "llama", dtype=torch.bfloat16)

    def by_diffusers() -> nn.Module:
        return AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float16)

    def by_accelerate() -> nn.Module:
        with accelerate.init_empty_weights():
            model = nn.Linear(4, 3)
        accelerate.load_checkpoint_in_model(
            model, str(folder / "linear.safetensors"), device_map={"": "cpu"}
        )
        return model

    def by_safetensors() -> nn.Module:
        model = nn.Linear(4, 3)
        model.load_state_dict(safetensors.torch.load_file(folder / "linear.safetensors"))
        return model

    loads = {
        "transformers": by_transformers,
        "diffusers": by_diffusers,
        "accelerate": by_accelerate,
        "safetensors": by_safetensors,
    }
    for name, load in loads.items():
        wl.disable()
        theirs = load()
        before = wl.stats()
        with wl.enabled(name):
            ours = load()
        after = wl.stats()
        assert after.loads > before.loads, f"{name}: weightlift loaded nothing"
        assert after.fallbacks == before.fallbacks, f"{name}: fell back"
        same(ours, theirs)
        print(f"{name}: loaded by weightlift, equal to the library's own", flush=True)


def raise_errors(folder: Path) -> None:
    """C++ exceptions become Python's beside torch's C++ runtime, in any thread."""
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
    assert sorted(caught) == ["header_too_large"] * 4 + ["torch"] * 4, caught
    print("errors: raised and caught in four threads", flush=True)


def leave_threads_behind(folder: Path) -> None:
    """The interpreter ends while threads are in the module: those that ask for its lock end by
    pthread_exit, which unwinds them. (torch's own operators abort there, so none is used.)"""
    import weightlift as wl

    def open_files() -> None:
        while True:
            wl.open_checkpoint(folder / "model.safetensors").close()

    for _ in range(3):
        threading.Thread(target=open_files, daemon=True).start()


def main() -> None:
    what, place = sys.argv[1:]
    folder = Path(place).resolve()
    if what == "prepare":
        folder.mkdir(parents=True)
        prepare(folder)
        for path in (folder, *folder.rglob("*")):  # safetensors makes its files the owner's alone
            path.chmod(0o755 if path.is_dir() else 0o644)
        return
    run_readme(folder)
    load_by_backends(folder)
    raise_errors(folder)
    leave_threads_behind(folder)


if __name__ == "__main__":
    main()
